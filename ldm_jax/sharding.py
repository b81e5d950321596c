"""Devices and hosts: one line of a config => a mesh, and which part of each array a device holds.

A mesh has two axes. Batches are split over both. Over "data" the train state is replicated; over
"fsdp" (fully sharded data parallel, Rajbhandari et al. 2020) each device holds a part of every
large weight, of its averages and of the optimizer's moments, and the weights are gathered for the
length of a step. What crosses the network is written out, so that its dtype is chosen.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ldm_jax import graphs, messages

AXES = ("data", "fsdp")
METHODS = ("jit", "pmap")
REDUCE_DTYPES = ("float32", "bfloat16")
MIN_SHARDED = 4096  # Elements; a smaller array costs more as a message than as a copy.


def parse_layout(layout: str, devices: int) -> tuple[int, int]:
    """Sizes of the axes "data" and "fsdp".

    Args:
        layout: "data", "fsdp", or both, as in "data,fsdp=8" or "data=2,fsdp=4". An axis without a
            number takes the devices that are left; one that is not named has size 1.
        devices: how many there are.

    Raises:
        ValueError: for other axes, or sizes whose product is not `devices`.
    """
    needed = (
        f"a mesh must look like 'data', 'fsdp', 'data,fsdp=8' or 'data=2,fsdp=4', got {layout!r}"
    )
    sizes = {}
    for part in layout.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or (size and not size.isdecimal()) or size == "0":
            raise ValueError(needed)
        sizes[name] = int(size) if size else None
    free = [name for name, size in sizes.items() if size is None]
    if len(free) > 1:
        raise ValueError(needed)
    given = math.prod(size for size in sizes.values() if size is not None)
    for name in free:
        sizes[name] = max(devices // given, 1)
    data, fsdp = (sizes.get(name, 1) for name in AXES)
    if data * fsdp != devices:
        raise ValueError(f"the mesh {layout!r} needs {data * fsdp} devices, got {devices}")
    return data, fsdp


def get_mesh(layout: str = "data", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes "data" and "fsdp" over `devices`, those of all hosts by default.

    Neighbours on the "fsdp" axis, which talk most, are neighbours in the machine. On a pod of
    several slices of TPUs only "data" crosses from one to another.

    Raises:
        ValueError: see `parse_layout`; also if "data" cannot be divided among the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    data, fsdp = parse_layout(layout, len(devices))
    on_tpu = devices[0].platform == "tpu"
    # Of GPUs each host is a slice to JAX, and "fsdp" may cross hosts.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if data % slices:
        raise ValueError(f"the mesh {layout!r} has {data} parts of the data for {slices} slices")
    if fsdp == 1 or not on_tpu:
        grid = np.asarray(devices).reshape(data, fsdp)  # As JAX numbers them, host by host.
    elif slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh((data // slices, fsdp), (slices, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def get_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Which axis of a weight is split over "fsdp": the longest that divides, the last of equals.

    Vectors, arrays of fewer than MIN_SHARDED elements and those of which no axis divides are
    replicated.
    """
    parts = mesh.shape["fsdp"]
    fitting = [i for i, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or len(shape) < 2 or math.prod(shape) < MIN_SHARDED or not fitting:
        return PartitionSpec()
    axis = max(fitting, key=lambda i: (shape[i], i))
    return PartitionSpec(*(None,) * axis, "fsdp")


def get_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each array of a train state, by its shape alone."""
    return jax.tree.map(lambda x: NamedSharding(mesh, get_spec(mesh, x.shape)), tree)


def compile_creation(create: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Compiles state = create(rng, ...), with each array made where `get_shardings` places it.

    Args:
        create: key, consumed, and whatever else => a train state.
        mesh: of `get_mesh`; None leaves it to JAX.
    """
    if mesh is None:
        return jax.jit(create)

    def create_in_place(*args):
        state = create(*args)
        return jax.lax.with_sharding_constraint(state, get_shardings(mesh, state))

    return jax.jit(create_in_place)


def place_shapes(mesh: Mesh, tree: Any) -> Any:
    """ShapeDtypeStructs with those shardings: what a restored train state is to be."""
    shardings = get_shardings(mesh, tree)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def batch_axes(parallelism: str) -> tuple[str, ...]:
    """Names of the axes over which a loss sees its batch spread, for psum and its like."""
    return AXES if parallelism == "jit" else ("data",)


def get_gradients(
    value_and_grad: Callable,
    mesh: Mesh,
    parallelism: str = "jit",
    reduce_dtype: str = "float32",
    gather_dtype: Any = None,
) -> Callable:
    """Spreads a loss and its gradient over a mesh, with the messages between devices written out.

    Each device gathers the whole weights, derives the loss of its own part of the batch, and keeps
    its part of the mean of all gradients. Left to itself, XLA adds up gradients in the dtype that
    the network computes in, bfloat16, and splits convolutions by channels.

    Args:
        value_and_grad: (params, batch_stats, rng, batch) -> ((loss, batch_stats), gradients), for
            the part of a batch that one device holds; its statistics are the same on all, reduced
            over `batch_axes`.
        mesh: of `get_mesh`.
        parallelism: "jit", or "pmap" to be called inside `compile_step`.
        reduce_dtype: in which gradients are added up, "float32" or "bfloat16". The second halves
            the bytes and rounds every partial sum to 8 bits.
        gather_dtype: in which split weights travel; None for their own. bfloat16 halves the bytes,
            and changes no number for layers that round their weights to it anyway.

    Returns:
        (params, batch_stats, rng, batch) -> ((loss, batch_stats), gradients).

    Raises:
        ValueError: for another parallelism or dtype, or pmap on a mesh with an "fsdp" axis.
    """
    if parallelism not in METHODS:
        raise ValueError(f"parallelism must be one of {METHODS}, got {parallelism!r}")
    if reduce_dtype not in REDUCE_DTYPES:
        raise ValueError(f"reduce_dtype must be one of {REDUCE_DTYPES}, got {reduce_dtype!r}")
    if parallelism == "pmap" and mesh.shape["fsdp"] > 1:
        raise ValueError(f"pmap is data parallel alone, got a mesh of {dict(mesh.shape)}")
    axes, whole = batch_axes(parallelism), PartitionSpec()

    def on_device(specs, params, batch_stats, rng, batch):
        weights = messages.gather(params, specs, mesh, axes, gather_dtype)
        (loss, batch_stats), grads = value_and_grad(weights, batch_stats, rng, batch)
        grads = messages.reduce_means(grads, specs, mesh, axes, reduce_dtype)
        return (jax.lax.pmean(loss, axes), batch_stats), grads

    def gradients(params, batch_stats, rng, batch):
        specs = jax.tree.map(lambda x: get_spec(mesh, x.shape), params)
        run = partial(on_device, specs)
        if parallelism == "jit":
            run = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(specs, whole, whole, PartitionSpec(AXES)),
                out_specs=((whole, whole), specs),
            )
        return run(params, batch_stats, rng, batch)

    return gradients


def add_up(add: Callable[[list[Array]], Array], grads: Any, mesh: Mesh | None) -> Array:
    """add(leaves of `grads`), for gradients that lie as `get_gradients` gives them.

    Each device adds up its parts of those that are split over "fsdp", and one number crosses. Left
    to itself, XLA gathers sums of rows by some 70 messages, or splits them over the devices anew.

    Args:
        add: arrays => a sum over all their elements, each by itself; 0 for an empty list.
        grads: a tree of gradients.
        mesh: as in `get_gradients`; None without one.
    """
    leaves = jax.tree.leaves(grads)
    if mesh is None or mesh.shape["fsdp"] == 1:  # The only mesh of pmap.
        return add(leaves)
    specs = [get_spec(mesh, x.shape) for x in leaves]

    def on_device(leaves):
        split = [x for x, spec in zip(leaves, specs) if spec]
        whole = [x for x, spec in zip(leaves, specs) if not spec]
        return jax.lax.psum(add(split), "fsdp") + add(whole)

    run = jax.shard_map(on_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())
    return run(leaves)


def compile_step(step: Callable, mesh: Mesh | None, parallelism: str = "jit") -> Callable:
    """Compiles state, metrics = step(state, rng, batch); the state is donated and stays in place.

    Args:
        step: pure; its gradients come from `get_gradients` for the same mesh and parallelism.
        mesh: where the state lives as `get_shardings` says; None leaves it to XLA.
        parallelism: "jit" or "pmap".
    """
    if mesh is not None and parallelism == "pmap":
        return _pmap_step(step, mesh)
    devices = jax.devices()[:1] if mesh is None else mesh.devices.flat
    options = graphs.get_options(devices, quick=True)
    if mesh is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)

    def step_in_place(state, rng, batch):
        state, metrics = step(state, rng, batch)
        return jax.lax.with_sharding_constraint(state, get_shardings(mesh, state)), metrics

    return jax.jit(step_in_place, donate_argnums=0, compiler_options=options)


def _pmap_step(step, mesh):
    """`step` under pmap, between arrays that live on the mesh as they do under jit."""
    run = jax.pmap(
        step,
        "data",
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=list(mesh.devices.flat),
    )

    def join_hosts(x):
        # What pmap returns is known to this host alone.
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), parts)

    def step_on_mesh(state, rng, batch):
        parts = {name: x.reshape(mesh.size, -1, *x.shape[1:]) for name, x in batch.items()}
        state, metrics = run(state, rng, parts)
        if jax.process_count() > 1:
            state = jax.tree.map(join_hosts, state)
        return state, metrics

    return step_on_mesh


def gather(mesh: Mesh | None, tree: Any) -> Any:
    """Inside jit: the whole of each array on every device, for networks that only estimate."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, replicated(mesh))


def describe_shardings(tree: Any) -> str:
    """A table of the weights' shapes, how each is split, and what a device holds of it.

    Args:
        tree: of arrays or ShapeDtypeStructs with NamedShardings.
    """
    rows = [("weight", "shape", "split over", "bytes a device")]
    held = whole = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        held, whole = held + size, whole + math.prod(leaf.shape) * leaf.dtype.itemsize
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        spec = leaf.sharding.spec
        split = f"fsdp, axis {messages.get_split_axis(spec)}" if any(spec) else "-"
        rows.append((name, "x".join(map(str, leaf.shape)) or "scalar", split, f"{size:,}"))
    rows.append(("all", "", f"of {whole:,}", f"{held:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], widths)), row[3].rjust(widths[3])])
        for row in rows
    )
