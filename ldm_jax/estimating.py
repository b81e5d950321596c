"""A folded network, noisy latents => its estimates, by XLA or by `ldm_jax.kernels`.

What is left of a network that `ldm_jax.folding` folded are convolutions and attentions. The kernels
run them in a program for CUDA, of networks and on GPUs that they were made for; XLA runs all else.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax import folding, kernels, normed, tiles
from ldm_jax.attention import attend
from ldm_jax.blocks import sinusoidal_embedding, upsample
from ldm_jax.folding import Affine, FoldedUNet, FoldedUnit

# Positions up to which matrix products are faster than a convolution, by JAX's backend.
MATRIX_ROWS = {"cpu": 0, "gpu": 512, "tpu": 512}


def get_estimator(
    network: Any, variables: Any, labels: Float[Array, "k n *t e"]
) -> Callable[[Float[Array, "n h w c"], Float[Array, ""]], Float[Array, "k n h w c"]]:
    """Folds a network for k sets of labels: estimate(x_t, noise_level) -> (k, n, h, w, c).

    The estimate is what the network itself puts out, whatever its target. All sets see the same
    noisy latents, so what comes before the first cross-attention is computed once. Call it outside
    the loop, and the estimate in it.
    """
    folded, run = folding.fold(network, variables), partial(_run, BY_XLA)
    if kernels.can_run(network):
        folded, run = folding.arrange(folded), _run_by_either
    k, n = labels.shape[:2]
    text = jnp.matmul(labels.reshape(k, n, -1), folded.text.kernel, precision="highest")
    text += folded.text.bias[None, None]

    def estimate(x_t, noise_level):
        noise = sinusoidal_embedding(jnp.reshape(noise_level, (1,)), network.noise_emb_dim)
        vectors = text + noise[None] @ folded.noise
        output = run(folded, x_t.astype(network.dtype), vectors)
        return jnp.broadcast_to(_by_set(output, vectors), (k, *x_t.shape))

    return estimate


class Operations(NamedTuple):
    """What XLA and the kernels do each in its way."""

    residual_block: Callable[[FoldedUnit, Sequence[Array]], Array]
    attend: Callable[[Affine, Array, Array | None], Array]
    upsample: Callable[[Array], Array]


def _run(
    operations: Operations, folded: FoldedUNet, x: Array, vectors: Float[Array, "k n v"]
) -> Array:
    """The network's forward pass, see `UNet.__call__`; x is (n, h, w, c) until sets differ."""
    taken = 0

    def run_unit(unit: FoldedUnit, *maps: Array) -> Array:
        nonlocal taken
        x = operations.residual_block(unit, maps)
        if unit.spatial is None:
            return x
        width = x.shape[-1]
        vector = vectors[..., taken : taken + width]
        taken += width
        if len(x) == vector.shape[0] * vector.shape[1]:
            return operations.attend(unit.spatial, x, vector.reshape(-1, width))
        y = operations.attend(unit.spatial, x, None)
        y = _by_set(y, vectors) + vector[:, :, None, None]
        return y.reshape(-1, *x.shape[1:]).astype(x.dtype)

    x = _multiply(x, folded.conv_in).astype(x.dtype)
    skips = []
    for block in folded.down:
        for unit in block:
            x = run_unit(unit, x)
            skips.append(x)
        x = _pool(x)
    for unit in folded.bottleneck:
        x = run_unit(unit, x)
    for block in folded.up:
        x = operations.upsample(x)
        for unit in block:
            x = run_unit(unit, x, skips.pop())
    return _multiply(x.astype(jnp.float32), folded.conv_out)


def _multiply(x: Array, affine: Affine) -> Array:
    """x kernel + bias over the last axis, in float32."""
    y = (x @ affine.kernel).astype(jnp.float32)
    return y + affine.bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _by_set(x: Array, vectors: Float[Array, "k n v"]) -> Array:
    """(n, ...) or (k n, ...) => (1, n, ...) or (k, n, ...)."""
    return x.reshape(-1, vectors.shape[1], *x.shape[1:])


def _residual_block(unit: FoldedUnit, maps: Sequence[Array]) -> Array:
    """Of maps whose channels lie side by side; one with fewer samples is repeated."""
    samples = max(map(len, maps))
    x = jnp.concatenate([_repeat(x, samples) for x in maps], axis=-1)
    conv_0 = unit.conv_0._replace(kernel=jnp.concatenate(unit.conv_0.kernel, axis=-2))
    h = jax.nn.swish(_conv(x, conv_0)).astype(x.dtype)
    residual = x @ jnp.concatenate(unit.residual) if unit.residual else x
    return (_conv(h, unit.conv_1) + residual).astype(x.dtype)


def _residual_block_by_kernels(unit: FoldedUnit, maps: Sequence[Array]) -> Array:
    """The same by two kernels; by XLA's products for 2 x 2 maps."""
    conv_0, conv_1 = unit.conv_0, unit.conv_1
    if conv_1.kernel.ndim == 2:
        return _residual_block(unit, maps)
    h = kernels.convolve(maps, conv_0.kernel, conv_0.bias, swish=True)
    if not unit.residual:
        return kernels.convolve([h], [conv_1.kernel], conv_1.bias, residual=maps[0])
    return kernels.convolve([h, *maps], [conv_1.kernel, *unit.residual], conv_1.bias)


def _repeat(x: Array, samples: int) -> Array:
    x = jnp.broadcast_to(x[None], (samples // len(x), *x.shape))
    return x.reshape(samples, *x.shape[2:])


def _conv(x: Float[Array, "b h w c"], conv: Affine) -> Float[Array, "b h w d"]:
    """A 3 x 3 convolution with zeros around the map, and its bias, in float32."""
    b, height, width, channels = x.shape
    if conv.kernel.ndim == 2:  # All positions to all positions.
        y = x.reshape(b, -1) @ conv.kernel
    elif b * height * width <= MATRIX_ROWS.get(jax.default_backend(), 0):
        # A product for each of the nine shifts, side by side: one alone is too little for a GPU.
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        # The barrier keeps XLA from making nine shifts part of each product that it tries out.
        shifted = jax.lax.optimization_barrier(jnp.stack(shifted).reshape(9, -1, channels))
        y = jnp.einsum(
            "trc,tcd->trd",
            shifted,
            conv.kernel.reshape(9, channels, -1),
            preferred_element_type=jnp.float32,
        ).sum(0)
    else:
        y = normed.conv(x, conv.kernel)
    return y.reshape(b, height, width, -1).astype(jnp.float32) + conv.bias[None]


def _attend(
    spatial: Affine, x: Float[Array, "b h w c"], vectors: Float[Array, "b c"] | None
) -> Float[Array, "b h w c"]:
    """x, what the spatial attention adds and, if given, the vectors."""
    b, _, _, channels = x.shape
    inner = len(spatial.bias)
    bias = jnp.pad(spatial.bias, (inner, channels))  # For all channels: XLA fuses it.
    projected = _multiply(x.reshape(b, -1, channels), Affine(spatial.kernel, bias))
    parts = jnp.split(projected.astype(x.dtype), [inner, 2 * inner], axis=-1)
    y = x + attend(*parts).reshape(x.shape)
    return y if vectors is None else (y + vectors[:, None, None]).astype(x.dtype)


def _attend_by_kernel(
    spatial: Affine, x: Float[Array, "b h w c"], vectors: Float[Array, "b c"] | None
) -> Float[Array, "b h w c"]:
    """The same by a kernel."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    return kernels.attend(flat @ spatial.kernel, spatial.bias, flat, vectors).reshape(x.shape)


BY_XLA = Operations(_residual_block, _attend, upsample)
BY_KERNELS = Operations(_residual_block_by_kernels, _attend_by_kernel, kernels.upsample)
_run_by_either = tiles.choose(partial(_run, BY_KERNELS), partial(_run, BY_XLA))


def _pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    b, height, width, channels = x.shape
    windows = x.reshape(b, height // 2, 2, width // 2, 2, channels)
    return windows.astype(jnp.float32).mean((2, 4)).astype(x.dtype)
