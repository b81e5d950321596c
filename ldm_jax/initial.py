"""Key, shapes => random first weights, cut from a few long draws that compile in seconds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

SHORTEST, LONGEST = 2**16, 2**24  # Numbers of the first draw, and of the last ones: 64 MB.
# Standard deviation of the normal law, cut off at -2 and 2.
_TRUNCATED = np.float32(0.87962566103423978)


def lecun_normal(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Float[Array, "*shape"]:
    """A kernel (..., in, out) of truncated normal numbers with a variance of 1 / (... x in).

    The law of `flax.linen.initializers.lecun_normal` (LeCun et al. 1998, section 4.6) and, in
    float32, its numbers for a key. Inside `long_draws` they come from there, whatever the key.

    Raises:
        ValueError: for a shape without two axes, or with an empty one.
    """
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"a kernel must have a shape like (..., in, out), got {tuple(shape)}")
    draws = _DRAWS.get()
    numbers = _draw(key, tuple(shape)) if draws is None else draws.cut(shape)
    deviation = np.sqrt(np.float32(1 / math.prod(shape[:-1]))) / _TRUNCATED
    return (numbers * deviation).astype(dtype)


Conv = partial(nn.Conv, kernel_init=lecun_normal)
Dense = partial(nn.Dense, kernel_init=lecun_normal)


def init_network(
    network: Any,
    rng: PRNGKeyArray,
    latent_shape: tuple[int, ...],
    embedding_shape: tuple[int, ...],
) -> dict[str, Any]:
    """`network.init` with long draws: its variables. Run it under jit, which leaves out the rest.

    Args:
        network: called with (x_t, noise_levels, text_embeddings).
        rng: key, consumed.
        latent_shape: (h, w, c).
        embedding_shape: (e,) or (n, e).
    """
    init_key, draw_key = jax.random.split(rng)
    inputs = jnp.zeros((1, *latent_shape)), jnp.zeros((1,)), jnp.ones((1, *embedding_shape))
    with long_draws(draw_key):
        return network.init(init_key, *inputs)


@contextmanager
def long_draws(key: PRNGKeyArray) -> Iterator[None]:
    """Within it, `lecun_normal` cuts kernels one after the other from long draws.

    A compiler writes code for each draw: the default network's 164 kernels and their copies for the
    average took two CPU cores 39 s, and an H100's host 55 s, to compile; ten long draws take 8 and
    4 s. The first is short and each is four times the one before, so that a small network wastes
    little; what is too short for the next kernel is left, up to a quarter of all. Every device of a
    mesh draws all numbers and keeps its part of them, without a message.

    Enter it inside a jitted function, never around one: jax.jit would keep the numbers of the first
    key for good. A draw that begins within a transformation of its own (nn.remat, nn.scan, a layer
    that is called twice) does not outlive it, and the next kernel raises UnexpectedTracerError.

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
        self.key, self.count, self.used = key, 0, 0
        self.numbers = jnp.zeros(0, jnp.float32)

    def cut(self, shape):
        size = math.prod(shape)
        if self.used + size > self.numbers.size:
            length = max(size, min(SHORTEST * 4**self.count, LONGEST))
            # The barrier keeps a compiler from drawing again for each kernel cut from it.
            drawn = _draw(jax.random.fold_in(self.key, self.count), (length,))
            self.numbers, self.used = jax.lax.optimization_barrier(drawn), 0
            self.count += 1
        # A compiler does not know the start. Where it does, XLA splits the draw over devices as the
        # kernel is to be split, and sends parts around.
        start = jax.lax.optimization_barrier(jnp.int32(self.used))
        self.used += size
        return jax.lax.dynamic_slice(self.numbers, (start,), (size,)).reshape(shape)


@partial(jax.jit, static_argnums=1)
def _draw(key, shape):
    return jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)


_DRAWS: ContextVar[_LongDraws | None] = ContextVar("_DRAWS", default=None)
