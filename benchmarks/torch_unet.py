"""The original's network in PyTorch, which ours is compared with: our weights => our outputs.

Maps are NCHW, in channels_last memory. The compute dtype is autocast's.
"""

import math
import re
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict
from torch import Tensor, nn

TOKENS = ("tiled", "one")
NOISE_FEATURES, TEXT_FEATURES = 32, 256
KINDS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# In the tiled form alone, and without effect there: all that cross-attention looks at is alike.
DEAD = re.compile(r"\.cross\.(query|key|norm_image)\.")


def batch_norm(width: int, affine: bool = True) -> nn.BatchNorm2d:
    """PyTorch keeps the unbiased variance, ours the biased one; all else is the same."""
    norm = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01, affine=affine)
    norm.num_batches_tracked = None  # A counter that costs a kernel, for a momentum of None.
    return norm


def to_sequence(x: Tensor) -> Tensor:
    """(b, c, h, w) => (b, h w, c), for a channels_last map without a copy."""
    return x.flatten(2).mT


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(k q^T) v in the original's roles: its keys receive, and are PyTorch's queries."""
    k, q, v = keys[:, None], queries[:, None], values[:, None]  # The fused kernels want heads.
    return F.scaled_dot_product_attention(k, q, v, scale=1.0)[:, 0]


class ResidualBlock(nn.Module):
    """r + Conv3x3(silu(Conv3x3(norm(x)))), r = x, or Conv1x1(x) where the width changes."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.residual = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()
        self.norm = batch_norm(channels, affine=False)
        self.conv_0 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1(F.silu(self.conv_0(self.norm(x)))) + self.residual(x)


class SpatialAttention(nn.Module):
    """Self-attention over the positions of a map; what is to be added to it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_in, self.norm_out = batch_norm(width), batch_norm(width)
        self.query, self.key = nn.Linear(width, width // 8), nn.Linear(width, width // 8)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = to_sequence(self.norm_in(x))
        h = self.out(attend(self.query(h), self.key(h), self.value(h)))
        return self.norm_out(h.mT.unflatten(2, x.shape[2:]))


class CrossAttention(nn.Module):
    """Attention of a map over the conditioning's; of one token the value alone, (b, c, 1, 1)."""

    def __init__(self, width: int, cond_width: int, literal: bool):
        super().__init__()
        self.literal = literal
        self.norm_cond, self.norm_out = batch_norm(cond_width), batch_norm(width)
        self.value, self.out = nn.Linear(cond_width, width), nn.Linear(width, width)
        if literal:
            self.norm_image = batch_norm(width)
            self.query, self.key = nn.Linear(cond_width, width // 8), nn.Linear(width, width // 8)

    def forward(self, image: Tensor, cond: Tensor) -> Tensor:
        tokens, size = to_sequence(self.norm_cond(cond)), cond.shape[2:]
        h = self.value(tokens)
        if self.literal:
            keys, size = self.key(to_sequence(self.norm_image(image))), image.shape[2:]
            h = attend(self.query(tokens), keys, h)
        return self.norm_out(self.out(h).mT.unflatten(2, size))


class Unit(nn.Module):
    """ResidualBlock, then, with attention, x + SpatialAttention(x) and x + CrossAttention(x)."""

    def __init__(self, channels: int, width: int, cond_width: int, literal: bool, attention=True):
        super().__init__()
        self.residual, self.attention = ResidualBlock(channels, width), attention
        if attention:
            self.spatial = SpatialAttention(width)
            self.cross = CrossAttention(width, cond_width, literal)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        x = self.residual(x)
        if not self.attention:
            return x
        x = x + self.spatial(x)
        return x + self.cross(x, cond)


class TorchUNet(nn.Module):
    """The denoiser of ldm_jax.unet with its default fields, under the same names.

    Args:
        latent_image_size, block_depth, emb_size, latent_channels, widths: as in `get_network`.
        tokens: "tiled", the original's literal form, a map of conditioning that cross-attention
            computes queries, keys and a softmax for; or "one", the same function by one token.
    """

    def __init__(
        self,
        latent_image_size: int,
        block_depth: int = 3,
        emb_size: int = 512,
        latent_channels: int = 4,
        *,
        widths: tuple[int, ...] = (128, 256, 512, 640),
        tokens: str = "one",
    ):
        super().__init__()
        if tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {TOKENS}, got {tokens!r}")
        poolings = len(widths) - 1
        if latent_image_size % 2**poolings:
            needed = f"divisible by {2**poolings} ({poolings} poolings by 2)"
            raise ValueError(f"latent_image_size must be {needed}, got {latent_image_size}")
        self.latent_shape = (latent_channels, latent_image_size, latent_image_size)
        self.emb_size, self.tiled = emb_size, tokens == "tiled"
        frequencies = np.exp(np.linspace(0, math.log(1000), NOISE_FEATURES // 2))
        frequencies = torch.tensor(frequencies, dtype=torch.float32)
        self.register_buffer("frequencies", frequencies, persistent=False)
        unit = partial(Unit, cond_width=NOISE_FEATURES + TEXT_FEATURES, literal=self.tiled)
        *widths, bottleneck = widths
        self.text = nn.Linear(emb_size, TEXT_FEATURES)
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 1)

        def chain(channels: int, width: int, skip: int = 0, **options) -> nn.ModuleList:
            inputs = [channels] + (block_depth - 1) * [width]
            return nn.ModuleList(unit(c + skip, width, **options) for c in inputs)

        before = (widths[0], *widths)
        self.down = nn.ModuleList(
            chain(before[i], width, attention=i > 0) for i, width in enumerate(widths)
        )
        self.bottleneck = chain(widths[-1], bottleneck)
        before = (bottleneck, *reversed(widths))
        self.up = nn.ModuleList(
            chain(before[i], width, skip=width) for i, width in enumerate(reversed(widths))
        )
        self.conv_out = nn.Conv2d(widths[0], latent_channels, 1)
        nn.init.zeros_(self.conv_out.weight)
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, noise_levels: Tensor, text_embeddings: Tensor) -> Tensor:
        """x_t (b, c, h, w), noise_levels (b,), text_embeddings (b, e) => x_0 (b, c, h, w)."""
        self._check(x_t, noise_levels, text_embeddings)
        cond = self._condition(noise_levels, text_embeddings)
        x = self.conv_in(x_t)

        # Down.
        skips = []
        for units in self.down:
            for unit in units:
                x = unit(x, cond)
                skips.append(x)
            x = F.avg_pool2d(x, 2)
            cond = F.avg_pool2d(cond, 2) if self.tiled else cond

        # Bottleneck.
        for unit in self.bottleneck:
            x = unit(x, cond)

        # Up.
        for i, units in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            for unit in units:
                x = unit(torch.cat([x, skips.pop()], 1), cond)
            if self.tiled and i + 1 < len(self.up):
                cond = F.interpolate(cond, scale_factor=2, mode="nearest")
        return self.conv_out(x).float()

    def _condition(self, noise_levels: Tensor, text_embeddings: Tensor) -> Tensor:
        """The conditioning (b, channels, 1, 1), or tiled over the positions."""
        text = self.text(text_embeddings)
        angles = 2 * math.pi * noise_levels[:, None] * self.frequencies
        noise = torch.cat([angles.sin(), angles.cos()], 1).to(text.dtype)
        cond = torch.cat([noise, text], 1)[:, :, None, None]
        if not self.tiled:
            return cond
        cond = cond.expand(-1, -1, *self.latent_shape[1:])
        return cond.contiguous(memory_format=torch.channels_last)

    def _check(self, x_t: Tensor, noise_levels: Tensor, text_embeddings: Tensor) -> None:
        shapes = tuple(map(tuple, (x_t.shape, noise_levels.shape, text_embeddings.shape)))
        b = len(x_t)
        wanted = (b, *self.latent_shape), (b,), (b, self.emb_size)
        if shapes != wanted:
            raise ValueError(f"the inputs must have shapes {wanted}, got {shapes}")


def load_jax_variables(model: TorchUNet, variables: Mapping) -> None:
    """Copies the weights and running statistics of our network of the same fields.

    The queries, keys and norms that the tiled form alone has stay as they are.

    Raises:
        ValueError: if an array is missing, has another shape, or no place in the model.
    """
    state, found = model.state_dict(), {}
    for tree in variables.values():
        found |= to_torch(tree)
    wanted = {name: tuple(x.shape) for name, x in state.items() if not DEAD.search(name)}
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    for name in sorted({*wanted, *shapes}):
        if wanted.get(name) != shapes.get(name):
            raise ValueError(f"{name} must be {wanted.get(name)}, got {shapes.get(name)}")
    model.load_state_dict(state | found, strict=False)  # It would ask for the norms' counters.


def to_torch(tree: Mapping) -> dict[str, Tensor]:
    """A collection of our network's variables, or its gradients, under PyTorch's names."""
    tensors = {}
    for path, value in flatten_dict(tree, sep=".").items():
        layer, kind = path.replace("unit_", "").rsplit(".", 1)
        layer = re.sub(r"^(down|bottleneck|up)_", r"\1.", layer)
        value = torch.tensor(np.asarray(value))
        if kind == "kernel":  # (in, out), or (height, width, in, out)
            value = value.mT if value.ndim == 2 else value.permute(3, 2, 0, 1)
        tensors[f"{layer}.{KINDS.get(kind, kind)}"] = value
    return tensors
