"""CUDA graphs: a GPU's kernels recorded once, and started together from then on."""

import os
import warnings
from collections.abc import Callable, Iterable
from functools import cache, update_wrapper
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FLAG = "xla_gpu_enable_command_buffer"
# XLA's own choice leaves convolutions out, and each of them ends a graph.
RECORDED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONVOLUTION"

# No trials of elementwise kernels, cuBLAS's products alone without XLA's own (Triton), and quick
# trials of convolutions. A training step's kernels are as fast: batch 1024 busy for 37.5 ms on an
# H200 without the first, 37.6 with; on an H100 for 42.05 ms with cuBLAS alone and 42.03 with both,
# 256 for 15.6 and 15.8 ms.
QUICK_TRIALS = {
    "xla_gpu_experimental_enable_fusion_autotuner": False,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 1,
}


def get_options(devices: Iterable[Any], quick: bool = False) -> dict[str, Any] | None:
    """Options of jax.jit by which XLA records convolutions into its CUDA graphs as well.

    A training step is some 2 400 kernels of a few microseconds, a step of sampling 120; started one
    by one, they come slower than the GPU works them off. None where programs are not for this
    job's GPUs, where XLA_FLAGS says what to record, and, with a warning, where a try fails.

    Args:
        devices: those that the program is for; those of this process are tried.
        quick: compile with QUICK_TRIALS, but for what XLA_FLAGS names.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG in flags or jax.default_backend() != "gpu":
        return None
    devices = set(devices)
    here = tuple(device for device in jax.local_devices() if device in devices)
    if not here or not _can_record_convolutions(here):
        return None
    options: dict[str, Any] = {FLAG: RECORDED}
    if quick and _knows_quick_trials():
        options |= {name: value for name, value in QUICK_TRIALS.items() if name not in flags}
    return options


class RecordedJit:
    """jax.jit of a function or method, with the options of `get_options` for where arguments lie.

    They are asked for at a call, since an import must not look for devices; equal options share one
    jit. JAX takes no options inside another jit: there, and wherever arguments are tracers, it is a
    plain one.
    """

    def __init__(self, function: Callable):
        update_wrapper(self, function)
        self._get_jit = cache(lambda *options: jax.jit(function, compiler_options=dict(options)))

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args, **kwargs) -> Any:
        return self._choose_jit(args, kwargs)(*args, **kwargs)

    def lower(self, *args, **kwargs) -> Any:
        """As a jit's: the program of a call, with its options, to be compiled."""
        return self._choose_jit(args, kwargs).lower(*args, **kwargs)

    def _choose_jit(self, args, kwargs):
        here = jax.lax.iota("int32", 1)  # On the default device; inside another jit, a tracer.
        leaves = jax.tree.leaves((here, args, kwargs))
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return self._get_jit()
        placed = next((leaf for leaf in leaves if getattr(leaf, "committed", False)), here)
        options = get_options(placed.devices())
        return self._get_jit(*(options or {}).items())


@cache
def _can_record_convolutions(devices: tuple) -> bool:
    """Whether a convolution and its gradients run from a graph on each of these GPUs.

    They run without one first: what cuDNN sets up for a device at its first convolution cannot be
    recorded, whichever kernel is chosen. So none are tried: the check takes 0.5 instead of 4 s. A
    device that was left out would fail in the first step, while the others wait for it.
    """
    recorded = {FLAG: RECORDED, "xla_gpu_graph_min_graph_size": 1}
    try:
        for options in ({FLAG: ""}, recorded, recorded):  # Recorded, and started again.
            _convolve(devices, options | {"xla_gpu_autotune_level": 0})
    except Exception as error:  # XLA has no class of its own for it.
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"going on without convolutions in CUDA graphs: {reason}")
        return False
    return True


@cache
def _knows_quick_trials() -> bool:
    """Whether this XLA has these options; one of them is experimental, and may go."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=QUICK_TRIALS).lower(0).compile()
    except Exception as error:  # As above.
        warnings.warn(f"compiling training steps with all trials: {' '.join(str(error).split())}")
        return False
    return True


def _convolve(devices: tuple, options: dict[str, Any]) -> Any:
    """A convolution's gradients, of its own on each device, by one program."""
    mesh = Mesh(devices, "devices")
    split = PartitionSpec("devices")

    def convolve(x, kernel):
        dimensions = "NHWC", "HWIO", "NHWC"
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    def differentiate(x, kernel):
        return [g[None] for g in jax.grad(convolve, argnums=(0, 1))(x[0], kernel[0])]

    program = jax.jit(
        jax.shard_map(differentiate, mesh=mesh, in_specs=split, out_specs=split),
        compiler_options=options,
    )
    inputs = [np.ones((mesh.size, *s), jnp.bfloat16) for s in ((8, 8, 8, 64), (3, 3, 64, 64))]
    return jax.block_until_ready(program(*jax.device_put(inputs, NamedSharding(mesh, split))))
