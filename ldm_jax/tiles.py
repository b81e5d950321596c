"""What kernels in Pallas have in common: a block of threads works out a tile of an array."""

import os
from collections.abc import Callable
from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX 0.11 announces that a later version will lack it.
    triton = None


def are_possible() -> bool:
    """Whether all GPUs of this process are of the capability that the kernels are measured on, 9.

    LDM_JAX_KERNELS=0 in the environment says no. Whether a program is one for a GPU at all is asked
    where it is lowered, not here.
    """
    if triton is None or os.environ.get("LDM_JAX_KERNELS") == "0":
        return False
    capabilities = [str(getattr(device, "compute_capability", "")) for device in jax.devices()]
    return all(capability.startswith("9.") for capability in capabilities)


def choose(by_kernels: Callable, by_xla: Callable) -> Callable:
    """`by_kernels` in a program for CUDA; `by_xla` in any other, and where gradients are asked for.

    Args:
        by_kernels: arrays => arrays, without a gradient.
        by_xla: the same in JAX's own operations.
    """

    @jax.jit  # Otherwise a call outside jit would ask for the default device, not for the arrays'.
    def run_by_platform(*inputs):
        return jax.lax.platform_dependent(*inputs, cuda=by_kernels, default=by_xla)

    @jax.custom_vjp
    def run(*inputs):
        return run_by_platform(*inputs)

    run.defvjp(
        lambda *inputs: jax.vjp(by_xla, *inputs),
        lambda backward, gradient: backward(gradient),
    )
    return run


def interpret() -> bool:
    """As JAX, on devices that have no such kernels: slow, for tests."""
    return jax.default_backend() != "gpu"


def describe(shape: tuple[int, ...], dtype: Any, *inputs: Array) -> jax.ShapeDtypeStruct:
    """An output, which varies over the axes of a shard_map over which any of the inputs does."""
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    axes = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def store(at: Any, y: Array, rows: Array, total: int, columns: Array | None = None) -> None:
    """Stores the rows before `total`, of these the `columns` that are True (None: all).

    A mask that is not needed makes a kernel a fifth slower.
    """
    masks = [] if columns is None else [columns[None]]
    if total % len(rows):
        masks.append(rows < total if y.ndim == 1 else (rows < total)[:, None])
    masks = [jnp.broadcast_to(mask, y.shape) for mask in masks]
    triton.store(at, y, mask=reduce(and_, masks) if masks else None)


def dot(a: Array, b: Array) -> Array:
    """a b, added up in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def div(a: Any, b: int) -> Any:
    """a // b of what is not negative, without the cases of what is."""
    return jax.lax.div(a, jnp.full_like(a, b))


def rem(a: Any, b: int) -> Any:
    """a % b, likewise."""
    return jax.lax.rem(a, jnp.full_like(a, b))
