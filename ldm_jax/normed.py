"""Linear layers of a batch norm's output => the same of its input, with the norm in their kernels.

(x - mean) factor W = x W' - mean W', where W' is W with its rows times the factor. In training that
leaves out a map, which would be written once and read twice, and the two sums over maps that a
norm's gradient needs: here they come with the gradient of W', which is smaller by far. Variables,
what the network puts out and its gradients are those of norm and layer one after the other. In
bfloat16 the mean's part of a result and of a kernel's gradient is rounded with the rest: where x
has a mean of three deviations, these are twice as far from float32 as by norm and layer, of ten,
six times.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax.sums import add_offset


def conv(x: Float[Array, "b h w c"], kernel: Float[Array, "_ _ c d"]) -> Float[Array, "b h w d"]:
    """A convolution with zeros around the map, in its dtype."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


def normed_conv(
    x: Float[Array, "b h w c"],
    mean: Float[Array, " c"],
    factor: Float[Array, " c"],
    kernel: Float[Array, "3 3 c d"],
    bias: Float[Array, " d"],
) -> Float[Array, "b h w d"]:
    """`conv` of (x - mean) factor, with its bias, in the dtype of x."""
    scaled, shift = merge_norm(kernel, mean, factor, None, x.dtype)
    offset = spread_places(shift, *x.shape[1:3]) + bias[None, None]
    return add_offset(conv(x, scaled), offset)


def merge_norm(
    kernel: Float[Array, "*n c d"],
    mean: Float[Array, " c"],
    factor: Float[Array, " c"],
    bias: Float[Array, " c"] | None,
    dtype: Any,
) -> tuple[Float[Array, "*n c d"], Float[Array, "*n d"]]:
    """W' in `dtype`, and bias W - mean W' in float32, of a W rounded to `dtype` as layers do.

    The mean goes through W' as it is rounded, so that x - mean has the digits of x.
    """
    return _merge_norm(kernel, mean, factor, bias, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _merge_norm(kernel, mean, factor, bias, dtype) -> Any:
    return _merge_norm_forward(kernel, mean, factor, bias, dtype)[0]


def _merge_norm_forward(kernel, mean, factor, bias, dtype) -> tuple[Any, Any]:
    rounded = round_to(kernel, dtype)
    scaled = round_to(rounded * _rows(kernel, factor), dtype)
    rows = -_rows(kernel, mean) * scaled
    rows = rows if bias is None else rows + _rows(kernel, bias) * rounded
    return (scaled.astype(dtype), jnp.sum(rows, axis=-2)), (kernel, mean, factor, bias)


def _merge_norm_backward(dtype, saved, cotangents):
    kernel, mean, factor, bias = saved
    kernel = round_to(kernel, dtype)
    # Without the barrier XLA has the product that makes d_scaled add what follows, and then cannot
    # split it among enough blocks of threads.
    d_scaled, d_shift = jax.lax.optimization_barrier(cotangents)
    d_shift = d_shift[..., None, :]
    d_scaled = d_scaled.astype(jnp.float32) - _rows(kernel, mean) * d_shift
    d_kernel = d_scaled * _rows(kernel, factor)
    scaled = kernel * _rows(kernel, factor)
    sums = [-jnp.sum(scaled * d_shift, -1), jnp.sum(kernel * d_scaled, -1)]
    if bias is not None:
        d_kernel += _rows(kernel, bias) * d_shift
        sums.append(jnp.sum(kernel * d_shift, -1))
    axes = tuple(range(kernel.ndim - 2))
    sums = [jnp.sum(row, axes) for row in jax.lax.optimization_barrier(sums)]
    return d_kernel, *sums, *([] if bias is not None else [None])


_merge_norm.defvjp(_merge_norm_forward, _merge_norm_backward)


def _rows(kernel, vector):
    """A number for each row of the kernel."""
    return jnp.reshape(vector, (1,) * (kernel.ndim - 2) + (-1, 1))


def round_to(x: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """x, in its dtype, with the digits of another; its gradient is not rounded.

    A cast there and back XLA leaves out.
    """
    return _round_to(x, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _round_to(x, dtype) -> Any:
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


_round_to.defvjp(
    lambda x, dtype: (_round_to(x, dtype), None), lambda dtype, _, gradient: (gradient,)
)


def spread_places(
    places: Float[Array, "3 3 d"], height: int, width: int
) -> Float[Array, "height width d"]:
    """What a 3 x 3 convolution makes of a map that is the same everywhere, with zeros around it.

    Args:
        places: what each place of the kernel makes of it.
    """

    def count(size):
        line = np.arange(size)[:, None] + np.arange(3)[None, :] - 1
        return ((line >= 0) & (line < size)).astype(np.float32)

    counts = np.einsum("hi,wj->hwij", count(height), count(width)).reshape(-1, 9)
    spread = jnp.matmul(counts, places.reshape(9, -1), precision="highest")
    return spread.reshape(height, width, -1)
