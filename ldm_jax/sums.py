"""Vectors added to maps, and sums over all but the channels, in which their gradients end."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ROWS = 256  # Positions of a partial sum; a sample that has more makes one by itself.


def column_sums(*maps):
    """Sums over all axes but the last: partial sums over ROWS positions, then the sum of these.

    XLA leaves a column sum that it merges with an elementwise result to a few blocks of threads,
    which takes ten times as long on maps of 4 x 4. The barrier keeps the stages apart. Positions
    of several samples go together: of 64 rows, a GPU's kernel for columns leaves half of its
    threads idle. Samples of one position need one stage only.
    """
    samples, channels = maps[0].shape[0], maps[0].shape[-1]
    rows = math.prod(maps[0].shape[1:-1])
    if rows > 1:
        rows *= math.gcd(samples, max(ROWS // rows, 1))
    groups = [x.reshape(-1, rows, channels) for x in maps]
    parts = jax.lax.optimization_barrier([jnp.sum(x, axis=1) for x in groups])
    zeros = [np.zeros((), part.dtype) for part in parts]
    add = lambda sums, more: [a + b for a, b in zip(sums, more)]  # noqa: E731
    return jax.lax.reduce(parts, zeros, add, dimensions=(0,))  # One kernel for all.


@jax.custom_vjp
def add_bias(x: Float[Array, "b *n c"], bias: Float[Array, " c"]) -> Float[Array, "b *n c"]:
    """x + bias, in the dtype of x; the bias' gradient is summed in float32, see `column_sums`."""
    return _add_bias(x, bias)[0]


def _add_bias(x, bias) -> tuple[Any, None]:
    bias = jnp.reshape(bias, (1,) * (x.ndim - bias.ndim) + bias.shape)
    return (x.astype(jnp.float32) + bias).astype(x.dtype), None


def _add_bias_backward(_, dy):
    return dy, column_sums(dy.astype(jnp.float32))[0]


add_bias.defvjp(_add_bias, _add_bias_backward)


@jax.custom_vjp
def add_offset(
    x: Float[Array, "b h w c"], offset: Float[Array, "h w c"]
) -> Float[Array, "b h w c"]:
    """x + offset, in the dtype of x; the offset's gradient is summed in float32, as above."""
    return _add_bias(x, offset)[0]


def _add_offset_backward(_, dy):
    # A place of a map is a column here, and up to 64 sums lie between all samples and one.
    samples = len(dy)
    columns = dy.astype(jnp.float32).reshape(math.gcd(samples, 64), -1, 1, math.prod(dy.shape[1:]))
    return dy, jnp.sum(jax.lax.optimization_barrier(jnp.sum(columns, 1)), (0, 1)).reshape(
        dy.shape[1:]
    )


add_offset.defvjp(_add_bias, _add_offset_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat(vector: Float[Array, " c"], samples: int) -> Float[Array, "b c"]:
    """The vector for each sample; its gradient is summed as above, in a kernel of its own."""
    return jnp.broadcast_to(vector[None], (samples, len(vector)))


repeat.defvjp(
    lambda vector, samples: (repeat(vector, samples), None),
    lambda samples, _, dy: (column_sums(dy)[0],),
)
