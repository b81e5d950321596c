"""Rows of numbers => a percentile of each, from the few numbers above it.

XLA's top_k keeps the largest numbers of a row in order, in 9.5 us for 64 rows of 1 024 on an H200:
a tenth of what a step of the sampler spends outside its convolutions. To find the seventh largest
alone, a kernel takes the largest away six times: 70 steps of 95 ms take 0.6 ms less
(docs/performance-log.md).
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ldm_jax import tiles

MOST_ROUNDS = 16  # Ranks further down are left to XLA,
MOST_NUMBERS = 16_384  # and longer rows, which a warp or four do not hold.


def percentile(x: Float[Array, "b n"], perc: float) -> Float[Array, " b"]:
    """jnp.percentile of each row, perc in [0, 100]; no row is sorted."""
    place = perc / 100 * (x.shape[1] - 1)
    below = math.floor(place)
    low, high = get_ranks(x, x.shape[1] - below)
    return low + (place - below) * (high - low)


def get_ranks(x: Float[Array, "b n"], k: int) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """The k-th largest number of each row, from 1 on, and the next larger one (k = 1: the same)."""
    n = x.shape[1]
    fits = k <= MOST_ROUNDS and n & (n - 1) == 0 and 32 <= n <= MOST_NUMBERS
    if fits and x.dtype == jnp.float32 and tiles.are_possible():
        return _by_either(k)(x)
    return _by_xla(x, k)


def _by_xla(x, k):
    largest, _ = jax.lax.top_k(x, k)
    return largest[:, -1], largest[:, max(k - 2, 0)]


@cache
def _by_either(k):
    return tiles.choose(partial(by_kernel, k=k), partial(_by_xla, k=k))


def by_kernel(x: Float[Array, "b n"], k: int) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """`get_ranks` in Pallas, a block of threads for each row; n a power of two."""
    rows, n = x.shape
    return pl.pallas_call(
        partial(_take_away, k=k),
        out_shape=[tiles.describe((rows,), x.dtype, x)] * 2,
        grid=(rows,),
        compiler_params=tiles.triton.CompilerParams(num_warps=4 if n > 2048 else 1),
        interpret=tiles.interpret(),
        name=f"rank_{k}_of_{n}",
    )(x)


def _take_away(x, low, high, *, k):
    row = pl.program_id(0)
    left = x[row, jnp.arange(x.shape[1])]
    taken, lower, upper = jnp.int32(0), jnp.max(left), jnp.max(left)
    for _ in range(k):  # As many rounds as if no two were equal; those too many change nothing.
        largest = jnp.max(left)
        upper = jnp.where(taken < max(k - 1, 1), largest, upper)
        lower = jnp.where(taken < k, largest, lower)
        equal = left == largest
        taken += jnp.sum(equal.astype(jnp.int32))
        left = jnp.where(equal, -jnp.inf, left)
    low[row], high[row] = lower, upper
