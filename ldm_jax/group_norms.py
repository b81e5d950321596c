"""Group norms (Wu & He 2018): maps => maps, groups of channels of a sample with mean 0, variance 1.

On some GPUs, in training, by kernels of our own that take in what surrounds the norm as well, see
group_kernels.py; elsewhere by XLA.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ldm_jax import group_kernels
from ldm_jax.group_kernels import EPSILON, GROUP_SIZE, Settings, Terms
from ldm_jax.sums import add_bias, repeat


class GroupNorm(nn.Module):
    """The norm of x + bias, times a scale and with a shift of each channel, where it has these.

    Its variables are linen's: the shift is called "bias" there.

    Attributes:
        affine: whether it has scale and shift.
        dtype: of the result.
        per_token: whether each position of a sequence is a sample.
        by_kernels: see `group_norm`.
    """

    affine: bool = True
    dtype: Any = jnp.float32
    per_token: bool = False
    by_kernels: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *n c"], bias: Float[Array, " c"] | None = None
    ) -> Float[Array, "b *n c"]:
        channels = x.shape[-1]
        x = x.astype(self.dtype)
        flat = x.reshape(-1, channels) if self.per_token else x
        terms = Terms(bias)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (channels,))
            shift = self.param("bias", nn.initializers.zeros, (channels,))
            terms = Terms(bias, repeat(scale, len(flat)), repeat(shift, len(flat)))
        return group_norm(flat, terms, by_kernels=self.by_kernels).reshape(x.shape)


def group_norm(
    x: Float[Array, "b *n c"],
    terms: Terms = Terms(),
    *,
    swish: bool = False,
    gain: float = 1.0,
    by_kernels: bool = False,
) -> Float[Array, "b *n c"]:
    """What `Terms` says of a map and its norm over the groups of each sample, in its dtype.

    Args:
        x: the map; GROUP_SIZE divides its channels.
        terms: see `Terms`.
        swish, gain: see `Settings`.
        by_kernels: whether kernels of our own may do it, where they can. XLA alone splits arrays
            over devices by itself.

    Raises:
        ValueError: for a scale without a shift, a shift without a scale, or another shape of them.
    """
    shapes = [None if term is None else term.shape for term in (terms.scale, terms.shift)]
    if shapes not in ([None] * 2, [(len(x), x.shape[-1])] * 2):
        expected = len(x), x.shape[-1]
        raise ValueError(f"scale and shift must have shape {expected}, or be None, got {shapes}")
    settings = Settings(swish, gain)
    if by_kernels and group_kernels.can_run(x):
        return _by_kernels(x, terms, settings)
    return _by_xla(x, terms, settings)


def _by_xla(x, terms, settings):
    if terms.bias is not None:
        x = add_bias(x, terms.bias)
    rows = (len(x),) + (1,) * (x.ndim - 2) + (-1,)
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, GROUP_SIZE)
    axes = (*range(1, x.ndim - 1), x.ndim)
    mean, square = (jnp.mean(g, axes, keepdims=True) for g in (groups, jnp.square(groups)))
    rstd = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + EPSILON)
    y = ((groups - mean) * rstd).reshape(x.shape)
    if terms.scale is not None and terms.shift is not None:
        # The weights' in float32; of what a network makes of its conditioning, in its dtype.
        y = y.astype(terms.scale.dtype) * terms.scale.reshape(rows) + terms.shift.reshape(rows)
    y = y.astype(x.dtype)
    y = nn.swish(y) if settings.swish else y
    return y if terms.keep is None else drop(y, terms.keep, settings.gain)


def drop(x: Array, keep: Bool[Array, "..."], gain: float) -> Array:
    """x times the gain, which is not rounded to its dtype, or 0."""
    return jnp.where(keep, x.astype(jnp.float32) * gain, 0).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_kernels(x, terms, settings) -> Array:
    """By kernels where the program is compiled for an NVIDIA GPU."""
    return _by_kernels_forward(x, terms, settings)[0]


def _by_kernels_forward(x, terms, settings) -> tuple[Array, Any]:
    def by_xla(x, terms):
        unused = jnp.zeros_like(x, jnp.float32).reshape(len(x), -1)
        unused = unused[:, : x.shape[-1] // GROUP_SIZE]
        return _by_xla(x, terms, settings), unused, unused

    by_kernels = partial(group_kernels.normalise, settings=settings)
    y, mean, rstd = jax.lax.platform_dependent(x, terms, cuda=by_kernels, default=by_xla)
    return y, (x, terms, mean, rstd)


def _by_kernels_backward(settings, saved, dy) -> tuple[Array, Terms]:
    def by_kernels(x, terms, mean, rstd, dy):
        dx, d_terms = group_kernels.get_gradient(x, terms, mean, rstd, dy, settings)
        return dx, _like(d_terms, terms)

    def by_xla(x, terms, mean, rstd, dy):
        shared = terms._replace(keep=None)
        run = lambda x, shared: _by_xla(x, shared._replace(keep=terms.keep), settings)  # noqa: E731
        return jax.vjp(run, x, shared)[1](dy)

    return jax.lax.platform_dependent(*saved, dy, cuda=by_kernels, default=by_xla)


def _like(gradients, terms):
    """In the terms' dtypes."""
    return jax.tree.map(lambda g, term: g.astype(term.dtype), gradients, terms._replace(keep=None))


_by_kernels.defvjp(_by_kernels_forward, _by_kernels_backward)
