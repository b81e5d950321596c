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

from ldm_jax.initial import Conv, Dense, lecun_normal
from ldm_jax.norms import Dropout, get_norm


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


def attend(
    queries: Float[Array, "b n d"],
    keys: Float[Array, "b p d"],
    values: Float[Array, "b n c"],
    *,
    heads: int = 1,
    scaled: bool = False,
    mask: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b p c"]:
    """softmax(k q^T) v, the softmax over the n query positions, in float32.

    The original's roles are kept: what it calls keys are the p places that receive, what it calls
    queries the n places that are looked at. `scaled` divides by sqrt(d / heads); positions where
    `mask` is False are not looked at.
    """

    def split(x):
        return x.reshape(*x.shape[:-1], heads, -1)

    q, k, v = split(queries), split(keys), split(values)
    divisor = math.sqrt(q.shape[-1]) if scaled else 1.0
    return jnp.reshape(_attend(q, k, v, mask, divisor), (*keys.shape[:2], -1))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask, divisor) -> Array:
    """`attend` with heads apart, (b, n, heads, d); its gradient is written out.

    Derived by JAX, it keeps the logits in float32, reads them again, and hands on their gradient in
    float32. Here the weights are kept instead of the logits, and the gradient of the logits is
    rounded to the values' dtype, as the weights are. There is no forward-mode derivative.
    """
    return _attend_forward(q, k, v, mask, divisor)[0]


def _attend_forward(q, k, v, mask, divisor) -> tuple[Array, tuple]:
    logits = jnp.einsum("bphd,bnhd->bhpn", k, q, preferred_element_type=jnp.float32) / divisor
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhpn,bnhc->bphc", weights, v), (q, k, v, weights)


def _attend_backward(divisor, saved, dy):
    q, k, v, weights = saved
    d_weights = jnp.einsum("bphc,bnhc->bhpn", dy, v).astype(jnp.float32)
    through_sum = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_logits = (weights * (d_weights - through_sum) / divisor).astype(v.dtype)
    d_q = jnp.einsum("bhpn,bphd->bnhd", d_logits, k)
    d_k = jnp.einsum("bhpn,bnhd->bphd", d_logits, q)
    d_v = jnp.einsum("bhpn,bphc->bnhc", weights, dy)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Bilinear upsampling by 2 with half-pixel centres, the edges repeated.

    Each new row lies a quarter of a pixel from an old one: 3/4 of it and 1/4 of the next. Written
    so, XLA fuses it with its neighbours; jax.image.resize multiplies by matrices.
    """

    def along(x, axis):
        n = x.shape[axis]
        part = partial(jax.lax.slice_in_dim, x, axis=axis)
        before = jnp.concatenate([part(0, 1), part(0, n - 1)], axis)
        after = jnp.concatenate([part(1, n), part(n - 1, n)], axis)
        both = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        return both.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])

    return along(along(x.astype(jnp.float32), 1), 2).astype(x.dtype)


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
        conv = partial(Conv, self.width, dtype=self.dtype)
        layer = {"train": train, "dtype": self.dtype, "axis_name": self.axis_name}
        norm = get_norm(self.norm, affine=False, **layer)
        residual = x
        if x.shape[-1] != self.width:
            residual = conv(kernel_size=(1, 1), name="residual")(x)
        h = norm(name="norm")(x)
        h = conv(kernel_size=(3, 3), name="conv_0")(h)
        if embedding is not None:
            zeros = nn.initializers.zeros
            film = Dense(2 * self.width, kernel_init=zeros, dtype=self.dtype, name="film")
            scale, shift = jnp.split(film(embedding)[:, None, None], 2, axis=-1)
            h = (1 + scale) * norm(name="norm_film")(h) + shift
        h = Dropout(self.dropout, self.axis_name)(nn.swish(h), train=train)
        return conv(kernel_size=(3, 3), name="conv_1")(h) + residual


class DenseParams(nn.Module):
    """Kernel and bias of an nn.Dense, by the same names and with the same first values."""

    features: int

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, "w f"], Float[Array, " f"]]:
        """Args: width: of what the kernel is multiplied with."""
        kernel = self.param("kernel", lecun_normal, (width, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


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
        width = x.shape[-1]
        norm = get_norm(self.norm, train=train, dtype=self.dtype, axis_name=self.axis_name)
        h = norm(name="norm_in")(x).reshape(x.shape[0], -1, width)
        # One product for all three reads the map once, and its gradient likewise.
        inner = width // self.key_fraction
        sizes = {"query": inner, "key": inner, "value": width}
        layers = [DenseParams(size, name=name)(width) for name, size in sizes.items()]
        kernel, bias = (
            jnp.concatenate(parts, axis=-1).astype(self.dtype) for parts in zip(*layers)
        )
        projected = h @ kernel + bias[None, None]
        queries, keys, values = jnp.split(projected, [inner, 2 * inner], axis=-1)
        h = attend(queries, keys, values, heads=self.heads, scaled=self.scaled)
        h = Dense(width, dtype=self.dtype, name="out")(h).reshape(x.shape)
        return norm(name="norm_out")(h)


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
        cond: Float[Array, "b n e"],
        mask: Bool[Array, "b n"] | None = None,
        embedding: Float[Array, "b e"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w width"]:
        layer = {"norm": self.norm, "dtype": self.dtype, "axis_name": self.axis_name}
        block = ResidualBlock(self.width, self.dropout, **layer, name="residual")
        x = block(x, embedding, train=train)
        if not self.attention:
            return x
        layer |= {"heads": self.heads, "scaled": self.scaled, "key_fraction": self.key_fraction}
        x = x + SpatialAttention(**layer, name="spatial")(x, train=train)
        return x + CrossAttention(**layer, name="cross")(x, cond, mask, train=train)


class DownBlock(nn.Module):
    """block_depth units, the output of each a skip, then average pooling by 2.

    `unit` is Unit, or a partial of it that fixes its norm, heads and dtype.
    """

    width: int
    block_depth: int = 3
    attention: bool = True
    unit: Any = Unit

    @nn.compact
    def __call__(self, x, cond, mask=None, embedding=None, *, train: bool = False):
        """x (b, h, w, c), cond (b, n, e) => (b, h/2, w/2, width) and the skips (b, h, w, width)."""
        skips = []
        for i in range(self.block_depth):
            unit = self.unit(self.width, self.attention, name=f"unit_{i}")
            x = unit(x, cond, mask, embedding, train=train)
            skips.append(x)
        return nn.avg_pool(x, (2, 2), strides=(2, 2)), skips


class UpBlock(nn.Module):
    """Upsampling by 2, then a unit for each skip, latest first."""

    width: int
    attention: bool = True
    unit: Any = Unit

    @nn.compact
    def __call__(self, x, skips, cond, mask=None, embedding=None, *, train: bool = False):
        """x (b, h, w, c), skips (b, 2h, 2w, s) in the order made => (b, 2h, 2w, width)."""
        x = upsample(x)
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            unit = self.unit(self.width, self.attention, name=f"unit_{i}")
            x = unit(x, cond, mask, embedding, train=train)
        return x
