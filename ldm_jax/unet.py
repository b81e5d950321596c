"""The denoiser: noisy latents, noise levels, text embeddings => estimate of the clean latents."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.blocks import (
    CrossAttention,
    DownBlock,
    LinearParams,
    Unit,
    UpBlock,
    sinusoidal_embedding,
)
from ldm_jax.conditioning import Condition, attend_to_token
from ldm_jax.group_kernels import GROUP_SIZE
from ldm_jax.initial import Conv, Dense
from ldm_jax.norms import NORMS
from ldm_jax.parts import matmul

CONDITIONINGS = ("token", "adaptive")


class RematUnit(Unit):
    """A unit whose activations are computed again for its gradient instead of being kept.

    Chen et al. 2016. Its variables, names and values are the unit's.
    """

    def __call__(self, x, cond, *, train=False):
        def run(unit, *inputs):
            return Unit.__call__(unit, *inputs, train=train)

        if self.is_initializing():  # A long draw that begins in here is for later units as well.
            return run(self, x, cond)
        return nn.remat(run)(self, x, cond)


class UNet(nn.Module):
    """The denoiser; see `get_network` for its fields."""

    latent_image_size: int
    block_depth: int = 3
    emb_size: int = 512
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 640)
    conditioning: str = "token"
    norm: str = "batch"
    heads: int = 1
    scaled: bool = False
    key_fraction: int = 8
    dropout: float = 0.0
    noise_emb_dim: int = 32
    text_features: int = 256
    dtype: Any = jnp.float32
    remat: bool = False
    axis_name: Any = None  # set where the batch is spread over devices by hand, see norms.py

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        noise_levels: Float[Array, " b"],
        text_embeddings: Float[Array, "b *n e"],
        *,
        train: bool = False,
    ) -> Float[Array, "b h w c"]:
        """Estimates the clean latents.

        Args:
            x_t: noisy latents, NHWC.
            noise_levels: a in [0, 1], one for each sample.
            text_embeddings: one vector for each sample (b, e), or a sequence (b, n, e) in which a
                row of zeros after the first is padding. All zeros means "no text".
            train: use the batch's statistics, update the running ones ("batch_stats"), drop out.

        Raises:
            ValueError: for shapes that the network was not built for.
        """
        self._check(x_t, noise_levels, text_embeddings)
        layer = {
            "heads": self.heads,
            "scaled": self.scaled,
            "key_fraction": self.key_fraction,
            "norm": self.norm,
            "dtype": self.dtype,
            "axis_name": self.axis_name,
        }
        unit = partial(RematUnit if self.remat else Unit, dropout=self.dropout, **layer)
        cond = self._condition(noise_levels, text_embeddings)
        if cond.tokens.shape[1] == 1 and not self.is_initializing():
            cross = CrossAttention(**layer, parent=None)
            added = attend_to_token(cross, self.variables, cond.tokens, train=train)
            cond = cond._replace(added=added)
        *widths, bottleneck = self.widths
        x = Conv(widths[0], (1, 1), dtype=self.dtype, name="conv_in")(x_t.astype(self.dtype))

        # Down. The first resolution is without attention.
        skips = []
        for i, width in enumerate(widths):
            down = DownBlock(width, self.block_depth, attention=i > 0, unit=unit, name=f"down_{i}")
            x, block_skips = down(x, cond.of(f"down_{i}"), train=train)
            skips.append(block_skips)

        # Bottleneck.
        for i in range(self.block_depth):
            name = f"bottleneck_{i}"
            x = unit(bottleneck, name=name)(x, cond.of(name), train=train)

        # Up. Attention at every resolution.
        for i, width in enumerate(reversed(widths)):
            up = UpBlock(width, unit=unit, name=f"up_{i}")
            x = up(x, skips.pop(), cond.of(f"up_{i}"), train=train)

        # In float32, and zero at first.
        shape, zeros = (1, 1, widths[0], self.latent_channels), nn.initializers.zeros
        kernel, bias = LinearParams(shape, zeros, name="conv_out")()
        return matmul(x, kernel[0, 0]) + bias[None, None, None]

    def _condition(self, noise_levels, text_embeddings) -> Condition:
        if text_embeddings.ndim == 2:
            text_embeddings = text_embeddings[:, None]
        b, n, _ = text_embeddings.shape
        mask = jnp.any(text_embeddings != 0, axis=-1) | (jnp.arange(n) == 0)[None, :]
        text = Dense(self.text_features, dtype=self.dtype, name="text")(text_embeddings)
        level = sinusoidal_embedding(noise_levels, self.noise_emb_dim).astype(self.dtype)
        noise = jnp.broadcast_to(level[:, None], (b, n, self.noise_emb_dim))
        tokens = jnp.concatenate([noise, text], axis=-1)
        embedding = self._embed(level, text, mask) if self.conditioning == "adaptive" else None
        return Condition(tokens, mask if n > 1 else None, embedding)

    def _embed(self, level, text, mask):
        """What scales and shifts all residual blocks: an MLP of noise level and mean token."""
        dense = partial(Dense, 4 * self.widths[0], dtype=self.dtype)
        pooled = jnp.mean(text, axis=1, where=mask[..., None])
        h = nn.swish(dense(name="embedding_0")(jnp.concatenate([level, pooled], axis=-1)))
        return nn.swish(dense(name="embedding_1")(h))

    def _check(self, x_t, noise_levels, text_embeddings):
        size, channels = self.latent_image_size, self.latent_channels
        if x_t.ndim != 4 or x_t.shape[1:] != (size, size, channels):
            raise ValueError(
                f"x_t must have shape (b, {size}, {size}, {channels}), got {x_t.shape}"
            )
        if not jnp.issubdtype(x_t.dtype, jnp.floating):
            raise ValueError(f"x_t must hold floating-point numbers, got {x_t.dtype}")
        b = x_t.shape[0]
        if noise_levels.shape != (b,):
            raise ValueError(f"noise_levels must have shape ({b},), got {noise_levels.shape}")
        shape = text_embeddings.shape
        if len(shape) not in (2, 3) or shape[0] != b or shape[-1] != self.emb_size:
            raise ValueError(
                f"text_embeddings must have shape ({b}, {self.emb_size}) or "
                f"({b}, n, {self.emb_size}), got {shape}"
            )


def get_network(
    latent_image_size: int,
    block_depth: int = 3,
    emb_size: int = 512,
    latent_channels: int = 4,
    *,
    widths: tuple[int, ...] = (128, 256, 512, 640),
    conditioning: str = "token",
    norm: str = "batch",
    heads: int = 1,
    scaled: bool = False,
    key_fraction: int = 8,
    dropout: float = 0.0,
    noise_emb_dim: int = 32,
    text_features: int = 256,
    dtype: Any = "float32",
    remat: bool = False,
) -> UNet:
    """The UNet denoiser; with the default fields, the original's network.

    Args:
        latent_image_size: height and width of the latents, divisible by 2 for every pooling.
        block_depth: units at each resolution.
        emb_size: width of the text embeddings.
        latent_channels: channels of the latents.
        widths: channels at each resolution, then of the bottleneck.
        conditioning: "token", noise level and text reach the maps through cross-attention alone;
            or "adaptive", they also scale and shift the activations of each `ResidualBlock`, by an
            MLP of the noise level's embedding and the mean of the text's tokens.
        norm: "batch"; or "group" (groups of 16 channels) or "rms" (the channels of a position),
            under which pictures do not interact.
        heads: attention heads.
        scaled: divide the attention's logits by the square root of a head's width.
        key_fraction: queries and keys have 1 / key_fraction of a map's channels.
        dropout: share of the activations inside residual blocks zeroed in training, which then
            needs a key: apply(..., train=True, rngs={"dropout": key}).
        noise_emb_dim: width of the noise level's sinusoidal embedding.
        text_features: width to which text embeddings are projected.
        dtype: compute dtype, "float32" or "bfloat16". Weights are float32 either way.
        remat: keep only the inputs of each unit for the gradient and compute the rest again: less
            memory, more arithmetic, the same numbers and variables.

    Raises:
        ValueError: for sizes, widths or names that do not fit together.
    """
    widths = tuple(widths)
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must name a resolution and the bottleneck, got {widths}")
    poolings = len(widths) - 1
    if latent_image_size < 1 or latent_image_size % 2**poolings:
        raise ValueError(
            f"latent_image_size must be divisible by {2**poolings} "
            f"({poolings} poolings by 2), got {latent_image_size}"
        )
    if block_depth < 1:
        raise ValueError(f"block_depth must be at least 1, got {block_depth}")
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"conditioning must be one of {CONDITIONINGS}, got {conditioning!r}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    grouped = (*widths, noise_emb_dim + text_features)
    if norm == "group" and any(width % GROUP_SIZE for width in grouped):
        raise ValueError(
            f"norm='group' needs widths and noise_emb_dim + text_features divisible by "
            f"{GROUP_SIZE}, got {grouped}"
        )
    if any(width % (key_fraction * heads) or width % heads for width in widths):
        raise ValueError(
            f"widths must be divisible by key_fraction * heads = {key_fraction * heads}, "
            f"got {widths}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
    return UNet(
        latent_image_size=latent_image_size,
        block_depth=block_depth,
        emb_size=emb_size,
        latent_channels=latent_channels,
        widths=widths,
        conditioning=conditioning,
        norm=norm,
        heads=heads,
        scaled=scaled,
        key_fraction=key_fraction,
        dropout=dropout,
        noise_emb_dim=noise_emb_dim,
        text_features=text_features,
        dtype=dtype,
        remat=remat,
    )
