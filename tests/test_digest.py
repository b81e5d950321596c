"""Digests: the same on every mesh, another for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ldm_jax.digest import get_digests


def mix(x):
    """MurmurHash3's finaliser, in Python's integers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def digest_by_hand(bits):
    salts = (0x9E3779B9, 0x7F4A7C15)
    words = [sum(mix(int(x) ^ mix(i ^ salt)) for i, x in enumerate(bits)) for salt in salts]
    return "".join(f"{word % 2**32:08x}" for word in words)


@pytest.mark.parametrize(
    "array, bits",
    [
        (np.float32([[1.5, -0.0], [np.nan, 2]]), [0x3FC00000, 0x80000000, 0x7FC00000, 0x40000000]),
        (np.float16([1.5, -2]), [0x3E00, 0xC000]),
        (np.asarray([1.5, -2], jnp.bfloat16), [0x3FC0, 0xC000]),
        (np.int32(-1), [0xFFFFFFFF]),
        (np.uint32([7, 2**32 - 1]), [7, 2**32 - 1]),
        (np.uint8([[7, 255]]), [7, 255]),
        (np.asarray([True, False]), [1, 0]),
        (np.zeros((0, 3), np.float32), []),
    ],
)
def test_a_digest_is_the_sum_of_mixed_bits(array, bits):
    assert get_digests({"a": {"b": jnp.asarray(array)}}) == {"a/b": digest_by_hand(bits)}


def test_a_digest_is_the_same_for_every_sharding():
    x = jax.random.normal(jax.random.key(0), (16, 4, 8))
    expected = get_digests([x])
    devices = np.asarray(jax.devices())
    for shape in [(1, 1), (1, 8), (2, 4), (8, 1)]:
        part = devices[: shape[0] * shape[1]].reshape(shape)
        mesh = Mesh(part, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        for spec in [(), ("data",), (None, None, "fsdp"), ("fsdp", None, "data")]:
            placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            assert get_digests([placed]) == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_every_flipped_bit_is_noticed(dtype):
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=(3, 5)) * 100, dtype)
    expected = get_digests([x])
    for bit in range(x.itemsize * 8 * x.size):
        flipped = bytearray(x.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        found = get_digests([np.frombuffer(bytes(flipped), dtype).reshape(x.shape)])
        assert found != expected


def test_two_flipped_signs_swapped_values_and_lost_zeros_are_noticed():
    x = np.float32([1, 2, 3, 4, 0, 0])
    expected = get_digests([x])
    assert get_digests([x * np.float32([-1, -1, 1, 1, 1, 1])]) != expected
    assert get_digests([x[[1, 0, 2, 3, 4, 5]]]) != expected
    assert get_digests([x[:5]]) != expected


def test_arrays_of_one_shape_compile_once():
    from ldm_jax.digest import _digest_leaf

    get_digests([jnp.ones((3, 7))])
    size = _digest_leaf._cache_size()
    get_digests([jnp.zeros((3, 7)), jnp.ones((3, 7)) * 2])
    assert _digest_leaf._cache_size() == size
