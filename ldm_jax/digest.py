"""Digests: a tree of arrays, on any mesh => sixteen hexadecimal digits for each leaf.

A digest is a function of a leaf's bits and of their order alone, made of integer operations: the
same for every sharding, number of devices and kind of device.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

SALTS = (0x9E3779B9, 0x7F4A7C15)


def get_digests(tree: Any) -> dict[str, str]:
    """The digest of each leaf under its path, such as "params/Conv_0/kernel".

    Computed where the leaves live, and fetched together. Those of leaves that are split over
    devices are waited for one at a time: programs that add up over virtual devices can block each
    other when several are queued. Every process of a run must call it.
    """
    digests = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        split = isinstance(leaf, jax.Array) and not leaf.is_fully_replicated
        if isinstance(leaf, jax.Array) and not split:
            leaf = leaf.addressable_data(0)  # Each process looks at a copy of its own.
        words = _digest_leaf(leaf, _get_output_sharding(leaf))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digests[name] = jax.block_until_ready(words) if split else words
    return {k: "".join(f"{word:08x}" for word in v) for k, v in jax.device_get(digests).items()}


@partial(jax.jit, static_argnames="sharding")
def _digest_leaf(leaf: Array, sharding: NamedSharding | None) -> UInt32[Array, "2"]:
    """Two words, d_s = sum_i mix(x_i ^ mix(i ^ s)) mod 2^32 for two salts s; x_i the bits at i.

    `mix` is a bijection, so that a change within one element changes both sums for certain, and any
    other change each of them but for one time in 2^32. (A sum of w_i x_i with fixed odd weights
    would miss two flipped signs: 2^31 w_i + 2^31 w_j = 0.)
    """
    bits = _get_bits(leaf)
    position = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    words = [jnp.sum(_mix(bits ^ _mix(position ^ jnp.uint32(s))), dtype=jnp.uint32) for s in SALTS]
    digest = jnp.stack(words)
    return digest if sharding is None else jax.lax.with_sharding_constraint(digest, sharding)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3: each bit of x reaches every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _get_bits(x: Array) -> UInt32[Array, "..."]:
    """The bit pattern of each element; of 8 bytes in two elements, on a last axis of their own."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _get_output_sharding(leaf: Any) -> NamedSharding | None:
    """On every device of the leaf's mesh, so that each process can read the digest."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return None
