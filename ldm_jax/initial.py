"""Random first weights, cut from a few long draws: a program that compiles in seconds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

SHORTEST, LONGEST = 2**16, 2**24  # Numbers of the first draw, and of the last ones: 64 MB.
# Standard deviation of the normal law, cut off at -2 and 2.
_TRUNCATED = np.float32(0.87962566103423978)


def lecun_normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """A kernel (..., in, out) of truncated normal numbers with a variance of 1 / (... x in).

    The law of `flax.linen.initializers.lecun_normal` (LeCun et al. 1998, section 4.6), and its
    numbers for a key. Inside `long_draws` they come from there, whatever the key.
    """
    draws = _DRAWS.get()
    numbers = _draw(key, tuple(shape)) if draws is None else draws.cut(shape)
    deviation = np.sqrt(np.float32(1 / math.prod(shape[:-1]))) / _TRUNCATED
    return (numbers * deviation).astype(dtype)


@contextmanager
def long_draws(key: PRNGKeyArray) -> Iterator[None]:
    """Within it, `lecun_normal` cuts kernels one after the other from long draws.

    A compiler makes a kernel of its own of each draw: those of the default network, 165 and their
    165 copies for the average, took two CPU cores 39 s and an H200's host 42 to 63 s to compile.
    The draws begin short and grow fourfold, so that a small network wastes little. In a
    transformation within, like nn.remat or nn.scan, a draw may begin that does not outlive it: the
    next kernel then raises JAX's UnexpectedTracerError.

    Args:
        key: of all draws, consumed.
    """
    token = _DRAWS.set(_LongDraws(key))
    try:
        yield
    finally:
        _DRAWS.reset(token)


class _LongDraws:
    """Hands out the numbers of its draws, each of them once."""

    def __init__(self, key):
        self.key, self.count, self.numbers, self.used = key, 0, jnp.zeros(0), 0

    def cut(self, shape):
        size = math.prod(shape)
        if self.used + size > self.numbers.size:
            length = max(size, min(SHORTEST * 4**self.count, LONGEST))
            # The barrier keeps a compiler from drawing again for each kernel cut from it.
            drawn = _draw(jax.random.fold_in(self.key, self.count), (length,))
            self.numbers, self.used = jax.lax.optimization_barrier(drawn), 0
            self.count += 1
        start, self.used = self.used, self.used + size
        return self.numbers[start : self.used].reshape(shape)


@partial(jax.jit, static_argnums=1)
def _draw(key, shape):
    return jax.random.truncated_normal(key, -2, 2, shape)


_DRAWS: ContextVar[_LongDraws | None] = ContextVar("_DRAWS", default=None)
