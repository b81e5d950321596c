"""A config, the name of a pod => what its training step needs there: compiled, never run.

XLA compiles for TPUs that are not there (through libtpu, `pip install -e ".[tpu]"`), so memory,
arithmetic and messages are the compiler's own account. For GPUs it would need one; there the
partitioned program of as many virtual CPU devices stands in, whose messages are the same.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from ldm_jax import power_ema, sharding, training
from ldm_jax.chips import CHIPS, Message, Target, estimate_seconds
from ldm_jax.latents import LatentScale
from ldm_jax.noising import get_process
from ldm_jax.packing import pack_state
from ldm_jax.unet import get_network

UTILISATION = 0.4  # Of the peak, in convolutions and products; what well-kept training reaches.
COLLECTIVE = re.compile(
    r"= (?P<shape>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\((?P<rest>.*)"
)
ARRAY = re.compile(r"(?P<dtype>pred|bf16|[fsu]\d+)\[(?P<shape>[\d,]*)\]")
ITEMSIZES = {"pred": 1, "bf16": 2}


class Forecast(NamedTuple):
    """Of one training step, for one device unless it says otherwise.

    Attributes:
        devices: how many; a v4 or v5p chip is one.
        batch_size: of all devices.
        weights: number of parameters.
        flops: arithmetic.
        state_bytes: train state and batch.
        peak_bytes: all that is held at once.
        capacity: memory of a chip.
        messages: what crosses the network.
        compute_seconds, message_seconds: estimates.
        fits: whether the compiler finds room.
        note: the compiler's own words where it does not.
    """

    devices: int
    batch_size: int
    weights: int
    flops: float
    state_bytes: float
    peak_bytes: float
    capacity: float
    messages: list[Message]
    compute_seconds: float
    message_seconds: float
    fits: bool
    note: str = ""

    @property
    def efficiency(self) -> float:
        """Images per second and device, against one device without messages."""
        return self.compute_seconds / (self.compute_seconds + self.message_seconds)


def get_devices(target: Target) -> list[Any]:
    """Devices to compile for. For GPUs it needs as many CPU devices, see `prepare`.

    Raises:
        ImportError: without libtpu.
        ValueError: for a topology that does not exist, or too few devices.
    """
    if not target.topology:
        devices = jax.devices("cpu")
        if len(devices) < target.size:
            raise ValueError(f"needs {target.size} virtual CPU devices, got {len(devices)}")
        return devices[: target.size]
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.chip == "v4":
        options["chip_config_name"] = "megacore"
    name = f"{target.chip}:{target.topology}"
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(
                "compiling for a TPU that is not here needs its compiler, libtpu, of the version "
                f"that fits JAX {jax.__version__}: pip install -e '.[tpu]'"
            ) from error
        raise ValueError(f"there is no TPU topology {name}: {error}") from error
    return list(topology.devices)


def prepare(target: Target) -> None:
    """Before JAX's first computation: only the CPU, as many of it as there would be GPUs."""
    jax.config.update("jax_platforms", "cpu")
    # No TPU is touched: libtpu need neither look for its pod nor keep others from it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if not target.topology:
        jax.config.update("jax_num_cpu_devices", target.size)


def forecast_step(config: Any, target: Target, embedding_shape: tuple[int, ...]) -> Forecast:
    """Compiles the training step of a config for a pod.

    Args:
        config: with the keys that configs/seed.py declares.
        target: the pod.
        embedding_shape: (e,) of pooled text embeddings, or (n, e).

    Raises:
        ValueError: for settings that do not fit together.
    """
    settings, chip = config.to_dict(), CHIPS[target.chip]
    devices = get_devices(target)
    mesh = sharding.get_mesh(config.sharding.mesh, devices)
    if config.batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be divisible by the {mesh.size} devices, got {config.batch_size}"
        )
    network = get_network(**settings["network"])
    optimizer = training.get_optimizer(steps=config.steps, **settings["optimizer"])
    fields = network.latent_image_size, network.latent_image_size, network.latent_channels
    process, scale = get_process(**settings["noising"]), LatentScale(1.0)
    train_step = training.get_train_step(
        network,
        optimizer,
        scale,
        process,
        **settings["training"],
        mesh=mesh,
        reduce_dtype=config.sharding.reduce_dtype,
        unroll=False,  # A CPU stands in for what is forecast.
    )

    def create(key):
        state = training.create_train_state(key, network, optimizer, fields, embedding_shape)
        return pack_state(power_ema.add_averages(state, config.power_ema.sigma_rels))

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = sharding.place_shapes(mesh, jax.eval_shape(create, key))
    key = jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.replicated(mesh))

    def part(*shape):
        shape = (config.batch_size, *shape)
        return jax.ShapeDtypeStruct(shape, np.float16, sharding=sharding.batch_sharding(mesh))

    batch = {"latents_mean": part(*fields), "latents_std": part(*fields)}
    batch["text_embeddings"] = part(*embedding_shape)
    options = {"exec_time_optimization_effort": -1.0} if target.topology else {}
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    state_bytes = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves((state, batch))
    )
    about: dict[str, Any] = dict(
        devices=mesh.size,
        batch_size=config.batch_size,
        weights=weights,
        state_bytes=state_bytes,
        capacity=chip.memory,
    )
    try:
        compiled = train_step.lower(state, key, batch).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Forecast(
            **about,
            flops=math.nan,
            peak_bytes=_read_needed(str(error)),
            messages=[],
            compute_seconds=math.nan,
            message_seconds=math.nan,
            fits=False,
            note=" ".join(str(error).split())[:300],
        )
    # XLA counts the body of a loop once.
    flops = compiled.cost_analysis()["flops"] * config.training.accumulate
    memory = compiled.memory_analysis()
    # Donated arguments are outputs as well, and are counted once.
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    messages = count_messages(compiled.as_text())
    return Forecast(
        **about,
        flops=flops,
        peak_bytes=peak,
        messages=messages,
        compute_seconds=flops / (UTILISATION * chip.flops),
        message_seconds=sum(estimate_seconds(m, target) for m in messages),
        fits=peak <= chip.memory,
    )


def count_messages(text: str) -> list[Message]:
    """The collectives of an optimised program, largest first."""
    counts: dict[tuple, list[int]] = {}
    for line in text.splitlines():
        found = COLLECTIVE.search(line)
        if not found:
            continue
        group = _get_group(found["rest"])
        if group == 1:
            continue  # Nobody to talk to.
        arrays = [(m["dtype"], _count_bytes(m)) for m in ARRAY.finditer(found["shape"])]
        in_halves = found["kind"] != "all-reduce" or found["shape"].startswith("((")
        if "-start(" in line and in_halves:  # Operands first, results after them.
            arrays = arrays[len(arrays) // 2 :]
        dtypes = sorted({dtype for dtype, _ in arrays})
        total = counts.setdefault((found["kind"], "+".join(dtypes), group), [0, 0])
        total[0] += 1
        total[1] += sum(size for _, size in arrays)
    messages = [Message(*key, *value) for key, value in counts.items()]
    return sorted(messages, key=lambda m: -m.bytes)


def describe(forecast: Forecast, target: Target) -> str:
    """The forecast as the lines that a person wants before renting the pod."""
    f, chip = forecast, CHIPS[target.chip]
    name = f"{target.chip}:{target.topology}" if target.topology else target.chip
    lines = [
        f"{target.size} x {name}, {f.devices} devices, batch {f.batch_size} "
        f"({f.batch_size // f.devices} a device), {f.weights / 1e6:.2f} M weights",
        f"memory a device   {f.peak_bytes / 1e9:.2f} GB of {f.capacity / 1e9:.0f} GB, "
        f"{f.state_bytes / 1e9:.2f} GB of it train state and batch",
    ]
    if not target.topology:
        lines[-1] += " (temporaries as on a CPU)"
    if not f.fits:
        lines.append(f"DOES NOT FIT      {f.note or 'more than the chip has'}")
    if not math.isnan(f.flops):
        step = f.compute_seconds + f.message_seconds
        lines.append(
            f"arithmetic        {f.flops / 1e12:.3f} TFLOP a device and step, "
            f"{f.flops * f.devices / f.batch_size / 1e9:.2f} GFLOP an image"
        )
        lines += [
            f"message           {m.count} x {m.kind}, {m.dtype}, groups of {m.group or f.devices}: "
            f"{m.bytes / 1e6:.2f} MB"
            for m in f.messages
        ] or ["message           none"]
        lines += [
            f"estimate          {step * 1e3:.2f} ms a step ({f.compute_seconds * 1e3:.2f} of "
            f"arithmetic, {f.message_seconds * 1e3:.2f} of messages), "
            f"{f.batch_size / step:,.0f} img/s, scaling efficiency {f.efficiency:.0%}",
            f"assumes           {UTILISATION:.0%} of {chip.flops / 1e12:.0f} TFLOP/s, rings at "
            f"{chip.links / 1e9:.0f} GB/s ({chip.network / 1e9:.0f} GB/s between "
            f"{'slices' if target.topology else 'hosts'}), messages not hidden behind arithmetic",
        ]
    return "\n".join(lines)


def _count_bytes(array: re.Match) -> int:
    dtype = array["dtype"]
    size = ITEMSIZES.get(dtype) or int(dtype[1:]) // 8
    return size * math.prod(int(n) for n in array["shape"].split(",") if n)


def _get_group(rest: str) -> int:
    """Devices that exchange with one another; 0 for all."""
    found = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
    if found:
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if found:
        return len(found[1].split(","))
    found = re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", rest)
    if not found:
        return 0
    sizes = dict(axis.split("=") for axis in found[1].split(","))
    # 'b':(1)2 is a part of size 2 of the axis 'b'.
    named = (axis.partition(":(") for axis in found[2].split(","))
    return math.prod(int(part.split(")")[-1] if part else sizes[axis]) for axis, _, part in named)


def _read_needed(error: str) -> float:
    """Bytes that the compiler says are needed, if it says so."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", error)
    if not found:
        return math.nan
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]
