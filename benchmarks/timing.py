"""Calls on a device => seconds, kernels and memory of each, in the rows of a markdown table.

What benchmarks/train_step.py, sampling.py and scaling.py measure with.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.forecast import count_messages
from ldm_jax.profiling import Kernel, profile_calls, summarise_trace


class Table:
    """Prints rows as they come, and keeps them in a JSON file.

    Args:
        columns: titles, each with the format of its values.
        path: of the file; "" for none.
        append: go on with the rows of the file.
        header: print the titles.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        path: str = "",
        *,
        append: bool = False,
        header: bool = True,
    ):
        self._columns, self._path = columns, Path(path) if path else None
        if self._path and not append:
            self._path.write_text("[]")
        if header:
            rule = ("---" if kind == "" else "---:" for kind in columns.values())
            print(f"| {' | '.join(columns)} |\n|{'|'.join(rule)}|", flush=True)

    def add(self, row: Mapping[str, Any]) -> None:
        """Values by title; "error", if there is one, stands in the place of those that lack."""
        cells = [self._format(title, row.get(title)) for title in self._columns]
        error = f" {row['error']}" if "error" in row else ""
        print(f"| {' | '.join(cells)} |{error}", flush=True)
        if self._path:
            rows = json.loads(self._path.read_text()) if self._path.exists() else []
            self._path.write_text(json.dumps([*rows, dict(row)], indent=1))

    def attempt(self, about: Mapping[str, Any], work: Callable[..., Mapping], *args: Any) -> None:
        """Adds the row work(*args), or its error.

        The except is broad on purpose: a row that finds no memory, or whose compiler fails, must
        not cost the rows after it.
        """
        try:
            row = work(*args)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.add({**about, **row})

    def _format(self, title: str, value: Any) -> str:
        return "-" if value is None else format(value, self._columns[title])


def measure(
    call: Callable[[], Any],
    items: int,
    repeats: int = 5,
    calls: int = 10,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, float]:
    """Milliseconds of a call: median, lowest and highest of the rounds; and items a second.

    Args:
        call: starts work on the device; called once before.
        items: of a call.
        repeats: rounds.
        calls: of a round, at whose end alone the device is waited for.
        wait: given what the last call returned.
    """
    wait(call())
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        rounds.append((time.perf_counter() - start) / calls)
    median = statistics.median(rounds)
    milliseconds = {"ms": median, "lowest": min(rounds), "highest": max(rounds)}
    return {k: 1e3 * v for k, v in milliseconds.items()} | {"img/s": items / median}


def matrix_peak(size: int = 8192) -> float:
    """FLOP/s of a product of two bfloat16 matrices, the most that arithmetic can reach here."""
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 * measure(lambda: product(left, right), 1, 5, 20)["img/s"]


def trace(call: Callable[[], Any], calls: int = 3) -> list[Kernel]:
    """The kernels of `calls` calls, on all devices; none on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        profile_calls(call, folder, calls)
        return summarise_trace(folder)


def count_kernels(call: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """How many kernels a call runs, and for how long; nothing where it cannot be known."""
    kernels = trace(call, calls)
    return add_up(sum(k.count for k in kernels), sum(k.seconds for k in kernels), calls)


def count_torch_kernels(call: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """The same of a call of PyTorch's."""
    import torch

    if not torch.cuda.is_available():
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    on_device = [
        event.time_range.elapsed_us() / 1e6
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)  # These hold kernels.
    ]
    return add_up(len(on_device), sum(on_device), calls)


def add_up(count: int, seconds: float, calls: int) -> dict[str, float]:
    """Kernels and busy milliseconds of one call, if there were any."""
    return {"kernels": count / calls, "busy ms": 1e3 * seconds / calls} if count else {}


def count_collectives(call: Any, devices: int, calls: int = 3) -> dict[str, float]:
    """Milliseconds of a device and call in NCCL's kernels, and in all."""
    kernels = trace(call, calls)
    busy = sum(k.seconds for k in kernels)
    nccl = sum(k.seconds for k in kernels if "nccl" in k.name.lower())
    share = 1e3 / (calls * devices)
    return {"collective ms": share * nccl, "busy ms": share * busy} if kernels else {}


def count_megabytes(compiled: Any) -> float:
    """MB of the collectives' arrays in a program."""
    return sum(message.bytes for message in count_messages(compiled.as_text())) / 1e6


def peak_memory() -> dict[str, float]:
    """GB that a device has held at once since the process started, compiling included; the most."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"GB": max(peaks) / 1e9} if peaks else {}


def program_memory(compiled: Any) -> dict[str, float]:
    """GB that a program holds at once on a device, by the compiler's account."""
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    size += memory.output_size_in_bytes - memory.alias_size_in_bytes  # The donated count once.
    return {"program GB": size / 1e9}


def compile_all(programs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Future]:
    """Lowers programs one after the other and compiles them side by side.

    Args:
        programs: name => function that lowers.

    Returns:
        Name => future of the compiled program and its seconds. All are done; one that failed raises
        its error when it is asked for.
    """

    def compile_timed(lowered):
        start = time.perf_counter()
        return lowered.compile(), time.perf_counter() - start

    lowered: dict[Any, Any] = {}
    for name, lower in programs.items():  # All before the first compilation, which slows it down.
        try:
            lowered[name] = lower()
        except Exception as error:  # Raised again where the row is measured.
            lowered[name] = Future()
            lowered[name].set_exception(error)
    with ThreadPoolExecutor(max(len(programs), 1)) as pool:
        return {
            name: found if isinstance(found, Future) else pool.submit(compile_timed, found)
            for name, found in lowered.items()
        }


def draw_weights(shapes: Any) -> Any:
    """Weights to measure with, by their shapes and shardings: normal kernels, vectors of ones.

    They come from the host: compiling what draws the first weights takes longer than a benchmark.
    """
    rng = np.random.default_rng(0)

    def draw(leaf):
        drawn = np.ones(leaf.shape, leaf.dtype)
        if leaf.ndim > 1:
            drawn = rng.standard_normal(leaf.shape, leaf.dtype) / math.prod(leaf.shape[:-1]) ** 0.5
        return _place(drawn, leaf.sharding)

    return jax.tree.map(draw, shapes)


def draw_zeros(shapes: Any) -> Any:
    """Zeros of those shapes and shardings, as an optimizer's moments start."""
    return jax.tree.map(lambda x: _place(np.zeros(x.shape, x.dtype), x.sharding), shapes)


def _place(array, sharding):
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def measure_torch(call: Callable[[], Any], items: int, repeats: int, calls: int) -> dict:
    """Seconds, kernels and memory of a call of PyTorch's, whose first one compiles."""
    import torch

    cuda = torch.cuda.is_available()

    def wait(_=None):
        if cuda:
            torch.cuda.synchronize()

    start = time.perf_counter()
    wait(call())
    row = {"compile s": time.perf_counter() - start}
    wait(call())  # CUDA graphs are recorded at the second.
    row |= measure(call, items, repeats, calls, wait) | count_torch_kernels(call, 1)
    return row | ({"GB": torch.cuda.max_memory_allocated() / 1e9} if cuda else {})


def create_torch_network(tokens: str, fields: Mapping[str, Any]) -> Any:
    """PyTorch's network on the GPU, if there is one, in channels_last."""
    import torch

    from benchmarks.torch_unet import TorchUNet

    torch.compiler.reset()  # Or it compiles a second size for all sizes, which is slower.
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    network = TorchUNet(**fields, tokens=tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device, memory_format=torch.channels_last)


class Efficiency:
    """Rows of several numbers of devices => their img/s a device against those of one."""

    def __init__(self):
        self._one: dict[int, float] = {}

    def __call__(self, row: dict, devices: int, size: int) -> dict:
        if devices == 1:
            self._one.setdefault(size, row["img/s"])
        one = self._one.get(size)
        return row | ({"efficiency": row["img/s"] / (devices * one)} if one else {})
