"""What devices send each other in a step: parts of weights => whole weights, gradients => means.

It is called inside shard_map or pmap, by `sharding.get_gradients`. Arrays travel in buckets (Li et
al. 2020, PyTorch Distributed), from the last to the first. XLA for GPUs packs messages too, but
after it has fused everything else, so that each array is then copied out by a kernel of its own;
out of these buckets, Adam reads its gradients.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

BUCKET_BYTES = 30_000_000  # Of a message.


def gather(weights: Any, specs: Any, mesh: Mesh, axes: tuple[str, ...], dtype: Any = None) -> Any:
    """The whole weights, as values of this device alone: their gradients are left unreduced.

    Args:
        weights: a tree of this device's parts.
        specs: a tree of what `sharding.get_spec` says of each weight.
        mesh: has the axes "data" and "fsdp".
        axes: those over which the batch is spread.
        dtype: in which split weights travel; None for their own.
    """
    leaves, tree = jax.tree.flatten(weights)
    specs = tree.flatten_up_to(specs)
    split = [i for i, spec in enumerate(specs) if spec]
    sent = [leaves[i].astype(dtype or leaves[i].dtype) for i in split]
    places = [get_split_axis(specs[i]) for i in split]
    sizes = [x.nbytes * mesh.shape["fsdp"] for x in sent]
    for i, whole in zip(split, _exchange(_gather, sent, places, sizes, mesh, ("fsdp",))):
        leaves[i] = whole.astype(leaves[i].dtype)
    for i, spec in enumerate(specs):
        leaves[i] = jax.lax.pcast(leaves[i], ("data",) if spec else axes, to="varying")
    return tree.unflatten(leaves)


def reduce_means(grads: Any, specs: Any, mesh: Mesh, axes: tuple[str, ...], dtype: Any) -> Any:
    """This device's parts of the means over all devices, added up in `dtype`.

    What is split over "fsdp" is scattered, then summed over "data"; all else is summed.

    Args:
        grads: a tree of whole gradients, of this device's part of the batch.
        specs, mesh, axes: as in `gather`.
        dtype: in which gradients are added up.
    """
    leaves, tree = jax.tree.flatten(grads)
    specs = tree.flatten_up_to(specs)
    dtypes = [leaf.dtype for leaf in leaves]
    leaves = [(leaf / mesh.size).astype(dtype) for leaf in leaves]
    sizes = [leaf.nbytes for leaf in leaves]
    places = [get_split_axis(spec) if spec else None for spec in specs]
    scatter, add = partial(_scatter, mesh=mesh), partial(_sum, axes=axes)
    for send, over, split in ((add, axes, False), (scatter, ("fsdp",), True)):
        members = [i for i, spec in enumerate(specs) if bool(spec) == split]
        sent, to, held = ([values[i] for i in members] for values in (leaves, places, sizes))
        for i, part in zip(members, _exchange(send, sent, to, held, mesh, over), strict=True):
            leaves[i] = part
    return tree.unflatten([leaf.astype(old) for leaf, old in zip(leaves, dtypes, strict=True)])


def get_split_axis(spec: PartitionSpec) -> int:
    """Which axis `sharding.get_spec` splits, if it splits any."""
    return len(spec) - 1


def _exchange(send: Callable, arrays, places, sizes, mesh, over) -> list[Any]:
    """What send(arrays, places) gives of each array, sent in buckets; `places` are split axes."""
    found = {}
    for bucket in _fill_buckets(sizes, _bucket_bytes(mesh, over)):
        results = send([arrays[i] for i in bucket], [places[i] for i in bucket])
        found |= zip(bucket, results, strict=True)
    return [found[i] for i in range(len(arrays))]


def _gather(arrays, places):
    """The wholes of arrays that are split over "fsdp", by one message."""
    if len(arrays) == 1:
        return [jax.lax.all_gather(arrays[0], "fsdp", axis=places[0], tiled=True)]
    rows = jax.lax.all_gather(_pack(arrays), "fsdp")
    cuts = _unpack(rows, [x.size for x in arrays])
    return [_join(cut, x.shape, axis) for cut, x, axis in zip(cuts, arrays, places, strict=True)]


def _sum(arrays, places=None, *, axes):
    """The sums over devices, by one message."""
    parts = _unpack(jax.lax.psum(_pack(arrays), axes), [x.size for x in arrays])
    return [part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True)]


def _scatter(arrays, places, *, mesh):
    """This device's parts of the sums, one message on either axis of the mesh."""
    if len(arrays) == 1:
        part = {"scatter_dimension": places[0], "tiled": True}
        return _sum([jax.lax.psum_scatter(arrays[0], "fsdp", **part)], axes="data")
    cuts = [_cut(x, axis, mesh.shape["fsdp"]) for x, axis in zip(arrays, places, strict=True)]
    rows = jnp.concatenate([cut.reshape(len(cut), -1) for cut in cuts], axis=1)
    flat = jax.lax.psum(jax.lax.psum_scatter(rows, "fsdp"), "data")
    parts = _unpack(flat, [cut[0].size for cut in cuts])
    return [part.reshape(cut.shape[1:]) for part, cut in zip(parts, cuts, strict=True)]


def _pack(arrays):
    return jnp.concatenate([x.ravel() for x in arrays])


def _unpack(flat, sizes):
    """The last axis in pieces of these sizes."""
    return jnp.split(flat, np.cumsum(sizes)[:-1], axis=-1)


def _cut(whole, axis, parts):
    """(parts, shape of a part): an array as the devices of the "fsdp" axis hold it."""
    shape = whole.shape
    apart = whole.reshape(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])
    return jnp.moveaxis(apart, axis, 0)


def _join(rows, shape, axis):
    """The whole of an array, of whose parts, each of a `shape`, the rows hold the numbers."""
    apart = jnp.moveaxis(rows.reshape(-1, *shape), 0, axis)
    return apart.reshape(*shape[:axis], -1, *shape[axis + 1 :])


def _bucket_bytes(mesh, axes):
    """0, a message for each array, where nobody listens, and on TPUs, whose XLA packs well."""
    alone = math.prod(mesh.shape[axis] for axis in axes) == 1
    return 0 if alone or mesh.devices.flat[0].platform == "tpu" else BUCKET_BYTES


def _fill_buckets(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Places from the last to the first, in buckets that hold up to `most` or a single one."""
    buckets, held = [], 0
    for place in reversed(range(len(sizes))):
        if not buckets or held + sizes[place] > most:
            buckets.append([])
            held = 0
        buckets[-1].append(place)
        held += sizes[place]
    return buckets
