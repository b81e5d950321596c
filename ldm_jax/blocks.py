"""What the denoiser is built of: maps, conditioning tokens => maps.

Conditioning is a short sequence of tokens. One token, the original's case, makes cross-attention
exact and free: the softmax over a single key is 1, so the token's value is added at every position
and no query or key is needed. Several tokens, a text encoder's hidden states, are attended to.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ldm_jax.attention import attend, attend_projected
from ldm_jax.conditioning import AddedByToken, Condition
from ldm_jax.group_kernels import Terms
from ldm_jax.group_norms import group_norm
from ldm_jax.initial import Dense, lecun_normal
from ldm_jax.normed import conv, merge_norm, normed_conv, round_to
from ldm_jax.norms import Dropout, get_norm
from ldm_jax.sums import add_bias


def sinusoidal_embedding(
    noise_levels: Float[Array, " b"], emb_dim: int = 32
) -> Float[Array, "b emb_dim"]:
    """[sin(2 pi f_k a) for all k, cos(2 pi f_k a) for all k], f_k from 1 to 1000, geometric.

    Args:
        noise_levels: a in [0, 1], one for each sample.
        emb_dim: even.

    Raises:
        ValueError: for an odd emb_dim or levels that are not of rank 1.
    """
    if emb_dim % 2 or emb_dim < 2:
        raise ValueError(f"emb_dim must be even and positive, got {emb_dim}")
    if jnp.ndim(noise_levels) != 1:
        raise ValueError(f"noise_levels must have shape (b,), got {jnp.shape(noise_levels)}")
    # In float64, on the host: the highest angle is 6283, which magnifies a frequency's rounding.
    frequencies = np.exp(np.linspace(math.log(1.0), math.log(1000.0), emb_dim // 2))
    angles = 2 * jnp.pi * noise_levels[:, None] * frequencies.astype(np.float32)[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@jax.custom_vjp
def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Bilinear upsampling by 2 with half-pixel centres, the edges repeated.

    Each new row lies a quarter of a pixel from an old one: 3/4 of it and 1/4 of the next. Written
    so, XLA fuses it with its neighbours, and the gradient likewise; jax.image.resize multiplies by
    matrices.
    """

    def along(x, axis):
        before, after = _shift(x, x, axis)
        both = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        return both.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])

    return along(along(x.astype(jnp.float32), 1), 2).astype(x.dtype)


def _upsample_backward(_, dy):
    def along(dy, axis):
        first, second = (jax.lax.slice_in_dim(dy, i, None, 2, axis) for i in (0, 1))
        before, after = _shift(second, first, axis)
        return 0.75 * (first + second) + 0.25 * (before + after)

    return (along(along(dy.astype(jnp.float32), 2), 1).astype(dy.dtype),)


def _shift(x, y, axis):
    """x moved by one along an axis, behind the first of y; and y moved back, before the last of x.

    Two places of y's and x's pairs are neighbours at the edges.
    """
    n, part = x.shape[axis], partial(jax.lax.slice_in_dim, axis=axis)
    before = jnp.concatenate([part(y, 0, 1), part(x, 0, n - 1)], axis)
    after = jnp.concatenate([part(y, 1, n), part(x, n - 1, n)], axis)
    return before, after


upsample.defvjp(lambda x: (upsample(x), None), _upsample_backward)


class ResidualBlock(nn.Module):
    """r + Conv3x3(swish(Conv3x3(norm(x)))), r = x, or Conv1x1(x) where the width changes.

    An embedding, where one is given, scales and shifts what the first convolution makes, channel by
    channel: swish((1 + scale) norm(h) + shift) (FiLM, Perez et al. 2018, eq. 2; adaptive group
    normalisation, Dhariwal & Nichol 2021, section 3). Both are projections that start at zero.

    In training, `dropout` is the share of the activations between the convolutions that is zeroed.
    """

    width: int
    dropout: float = 0.0
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis_name: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        embedding: Float[Array, "b e"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w width"]:
        layer = {"train": train, "dtype": self.dtype, "axis_name": self.axis_name}
        norm = partial(get_norm, self.norm, affine=False, **layer)
        x, channels = x.astype(self.dtype), x.shape[-1]
        residual, bias = x, 0.0
        if channels != self.width:
            kernel, bias = LinearParams((1, 1, channels, self.width), name="residual")()
            residual = conv(x, kernel)
        kernel_0, bias_0 = LinearParams((3, 3, channels, self.width), name="conv_0")()
        kernel_1, bias_1 = LinearParams((3, 3, self.width, self.width), name="conv_1")()
        if self.norm == "batch":
            mean, factor, _ = norm(apart=True)(name="norm")(x)
            h = normed_conv(x, mean, factor, kernel_0, bias_0)
        else:
            h = conv(norm()(name="norm")(x), kernel_0)
        dropout = Dropout(self.dropout, self.axis_name)
        if self.norm == "group" and embedding is not None:
            keep = dropout.draw_keep(h.shape, train=train)
            terms = Terms(bias_0, *self._get_film(embedding), keep)
            h = group_norm(h, terms, swish=True, gain=dropout.gain, by_kernels=train)
        else:
            h = h if self.norm == "batch" else add_bias(h, bias_0)
            if embedding is not None:
                scale, shift = (x[:, None, None] for x in self._get_film(embedding))
                h = scale * norm()(name="norm_film")(h) + shift
            h = dropout(nn.swish(h), train=train)
        return add_bias(conv(h, kernel_1), bias_1 + bias) + residual

    def _get_film(self, embedding):
        """What each sample's channels are multiplied by, and what is added."""
        zeros = nn.initializers.zeros
        film = Dense(2 * self.width, kernel_init=zeros, dtype=self.dtype, name="film")
        scale, shift = jnp.split(film(embedding), 2, axis=-1)
        return 1 + scale, shift


class LinearParams(nn.Module):
    """Kernel (..., in, out) and bias (out,) as nn.Dense or nn.Conv name and begin them."""

    shape: tuple[int, ...]
    kernel_init: Any = lecun_normal

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "*n c d"], Float[Array, " d"]]:
        kernel = self.param("kernel", self.kernel_init, self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[-1:])


class SpatialAttention(nn.Module):
    """Self-attention over the positions of a map; queries and keys have c / key_fraction channels.

    Returns what is to be added to x. The convolutions of size 1 are written as Dense layers.
    """

    heads: int = 1
    scaled: bool = False
    key_fraction: int = 8
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis_name: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h w c"]:
        width, inner = x.shape[-1], x.shape[-1] // self.key_fraction
        layer = {"train": train, "dtype": self.dtype, "axis_name": self.axis_name}
        sizes = {"query": inner, "key": inner, "value": width, "out": width}
        layers = [LinearParams((width, size), name=name)() for name, size in sizes.items()]
        (query, _), (key, key_bias), (value, value_bias), (out, out_bias) = layers
        out = round_to(out, self.dtype)
        if self.heads == 1:  # Nothing but a weighted mean lies between the two.
            value = round_to(value, self.dtype) @ out

        # One product for all three reads the map once, and its gradient likewise. The queries' own
        # bias is the same for all places that are looked at, and is left out.
        kernel = jax.lax.optimization_barrier(jnp.concatenate([query, key, value], axis=-1))
        if self.norm == "batch":
            apart = get_norm("batch", apart=True, **layer)(name="norm_in")
            mean, factor, bias = apart(x)
            kernel, offset = merge_norm(kernel, mean, factor, bias, self.dtype)
        else:
            offset = jnp.zeros(kernel.shape[1])
            x = get_norm(self.norm, **layer)(name="norm_in")(x)
        projected = x.reshape(x.shape[0], -1, width) @ kernel.astype(self.dtype)
        offset, constant = jnp.split(offset, [2 * inner])
        options = {"heads": self.heads, "scaled": self.scaled, "by_kernels": train}
        h = attend_projected(projected, offset + jnp.pad(key_bias, (inner, 0)), **options)
        if self.heads > 1:
            h, constant = h @ out.astype(self.dtype), constant @ out

        # What is added to all values goes through the weighted mean as it is, and a batch norm in
        # training takes it away again.
        constant += value_bias @ out + out_bias
        if self.norm == "batch" and train:
            constant = jax.lax.stop_gradient(constant)
        norm_out, h = get_norm(self.norm, **layer)(name="norm_out"), h.reshape(x.shape)
        if self.norm == "group":
            return norm_out(h, constant)
        return norm_out((h + constant[None, None, None]).astype(self.dtype))


class CrossAttention(nn.Module):
    """Attention of a map's positions over the conditioning tokens; what is to be added to it.

    With one token the result is that token's value at every position, returned as (b, 1, 1, c) to
    be broadcast; the queries, the keys and the norm that feeds the keys would get no gradient at
    all, so they do not exist.
    """

    heads: int = 1
    scaled: bool = False
    key_fraction: int = 8
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis_name: Any = None

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b h w c"],
        cond: Float[Array, "b n e"],
        mask: Bool[Array, "b n"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b _ _ c"]:
        b, height, width_px, width = image.shape
        dense = partial(Dense, dtype=self.dtype)
        layer = {"train": train, "dtype": self.dtype, "axis_name": self.axis_name}
        norm, token_norm = (
            get_norm(self.norm, **layer),
            get_norm(self.norm, per_token=True, **layer),
        )
        # Batch statistics leave padding out; other norms look at one token at a time anyway.
        statistics = {"mask": mask[..., None]} if self.norm == "batch" and mask is not None else {}
        tokens = token_norm(name="norm_cond")(cond, **statistics)
        values = dense(width, name="value")(tokens)
        if cond.shape[1] == 1:
            h = values[:, None]
        else:
            positions = norm(name="norm_image")(image).reshape(b, -1, width)
            queries = dense(width // self.key_fraction, name="query")(tokens)
            keys = dense(width // self.key_fraction, name="key")(positions)
            h = attend(queries, keys, values, heads=self.heads, scaled=self.scaled, mask=mask)
            h = h.reshape(b, height, width_px, width)
        return norm(name="norm_out")(dense(width, name="out")(h))


class Unit(nn.Module):
    """ResidualBlock, then, with attention, x + SpatialAttention(x) and x + CrossAttention(x, cond).

    The step that the whole network repeats: block_depth times at each resolution.
    """

    width: int
    attention: bool = True
    heads: int = 1
    scaled: bool = False
    key_fraction: int = 8
    dropout: float = 0.0
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis_name: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        cond: Condition,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w width"]:
        layer = {"norm": self.norm, "dtype": self.dtype, "axis_name": self.axis_name}
        block = ResidualBlock(self.width, self.dropout, **layer, name="residual")
        x = block(x, cond.embedding, train=train)
        if not self.attention:
            return x
        layer |= {"heads": self.heads, "scaled": self.scaled, "key_fraction": self.key_fraction}
        x = x + SpatialAttention(**layer, name="spatial")(x, train=train)
        if cond.added is not None:
            return x + AddedByToken(name="cross")(cond.added)
        cross = CrossAttention(**layer, name="cross")
        return x + cross(x, cond.tokens, cond.mask, train=train)


class DownBlock(nn.Module):
    """block_depth units, the output of each a skip, then average pooling by 2.

    `unit` is Unit, or a partial of it that fixes its norm, heads and dtype.
    """

    width: int
    block_depth: int = 3
    attention: bool = True
    unit: Any = Unit

    @nn.compact
    def __call__(self, x, cond: Condition, *, train: bool = False):
        """x (b, h, w, c) => (b, h/2, w/2, width) and the skips (b, h, w, width)."""
        skips = []
        for i in range(self.block_depth):
            unit = self.unit(self.width, self.attention, name=f"unit_{i}")
            x = unit(x, cond.of(f"unit_{i}"), train=train)
            skips.append(x)
        return nn.avg_pool(x, (2, 2), strides=(2, 2)), skips


class UpBlock(nn.Module):
    """Upsampling by 2, then a unit for each skip, latest first."""

    width: int
    attention: bool = True
    unit: Any = Unit

    @nn.compact
    def __call__(self, x, skips, cond: Condition, *, train: bool = False):
        """x (b, h, w, c), skips (b, 2h, 2w, s) in the order made => (b, 2h, 2w, width)."""
        x = upsample(x)
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            unit = self.unit(self.width, self.attention, name=f"unit_{i}")
            x = unit(x, cond.of(f"unit_{i}"), train=train)
        return x
