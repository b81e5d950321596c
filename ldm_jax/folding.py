"""A trained denoiser with batch norms => the same function of fewer, larger products, for sampling.

With running statistics a batch norm multiplies and shifts each channel, so it merges with the
products beside it: of a unit's five norms none is left. The values of an attention merge with the
projection that follows, because the weights of a softmax add up to one. And a single conditioning
token meets the maps as one vector for each unit, the sum of a part that depends on the noise level
and a part that depends on the text: the second is the same at every step.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.blocks import attend, sinusoidal_embedding, upsample
from ldm_jax.norms import EPSILON

# Positions up to which matrix products are faster than a convolution, by JAX's backend.
MATRIX_ROWS = {"cpu": 0, "gpu": 512, "tpu": 512}
_exactly = partial(jnp.matmul, precision="highest")


class Affine(NamedTuple):
    """x kernel + bias, over the last axis or, with a kernel of four axes, a convolution."""

    kernel: Array
    bias: Array


class FoldedUnit(NamedTuple):
    """A `Unit`; `residual` is there if its width changes, `spatial` if it has attention.

    `spatial` gives queries, keys and values side by side, the values already projected.
    """

    conv_0: Affine
    conv_1: Affine
    residual: Array | None
    spatial: Affine | None


class FoldedUNet(NamedTuple):
    """What `fold` returns; a pytree.

    `noise` and `text` lead to the vectors that all units add, side by side.
    """

    conv_in: Affine
    conv_out: Affine
    down: list[list[FoldedUnit]]
    bottleneck: list[FoldedUnit]
    up: list[list[FoldedUnit]]
    noise: Array
    text: Affine


def can_fold(network: Any, labels: Float[Array, "k n *t e"]) -> bool:
    """Whether `fold` knows the network: batch norms, one head, unscaled, conditioned by one token.

    Scales that depend on noise level and text, between norm and convolution, merge with neither.
    """
    tokens = 1 if labels.ndim == 3 else labels.shape[2]
    plain = network.heads == 1 and not network.scaled and network.conditioning == "token"
    return plain and network.norm == "batch" and tokens == 1


def fold(network: Any, variables: Any) -> FoldedUNet:
    """Merges norms and projections, once, in float32; products are then stored in network.dtype.

    Args:
        network: a `UNet` for which `can_fold` holds.
        variables: its params and batch_stats.
    """
    params, stats = variables["params"], variables["batch_stats"]
    *widths, _ = network.widths
    size, cross = network.latent_image_size, []

    def fold_units(names: Iterator[tuple[str, ...]], size: int, attention: bool = True):
        units = []
        for path in names:
            unit_params, unit_stats = params, stats
            for name in path:
                unit_params, unit_stats = unit_params[name], unit_stats[name]
            units.append(_fold_unit(unit_params, unit_stats, size, network.dtype))
            if attention:
                cross.append(_fold_cross(unit_params["cross"], unit_stats["cross"]))
        return units

    def names(block, count):
        return ((block, f"unit_{i}") for i in range(count))

    depth = network.block_depth
    down = []
    for i in range(len(widths)):
        down.append(fold_units(names(f"down_{i}", depth), size >> i, attention=i > 0))
    bottleneck = fold_units(((f"bottleneck_{i}",) for i in range(depth)), size >> len(widths))
    up = []
    for i in range(len(widths)):
        up.append(fold_units(names(f"up_{i}", depth), size >> (len(widths) - 1 - i)))

    # The token is [noise embedding, projected text]; all units' vectors are one product of it.
    kernel = jnp.concatenate([unit.kernel for unit in cross], axis=-1)
    bias = jnp.concatenate([unit.bias for unit in cross])
    noise, text = jnp.split(kernel, [network.noise_emb_dim])
    bias = _exactly(params["text"]["bias"], text) + bias
    dtype = network.dtype
    conv_in = Affine(*(params["conv_in"][name].astype(dtype) for name in Affine._fields))
    return FoldedUNet(
        conv_in=conv_in._replace(kernel=conv_in.kernel[0, 0]),
        conv_out=Affine(params["conv_out"]["kernel"][0, 0], params["conv_out"]["bias"]),
        down=down,
        bottleneck=bottleneck,
        up=up,
        noise=noise,
        text=Affine(_exactly(params["text"]["kernel"], text), bias),
    )


def get_estimator(
    network: Any, variables: Any, labels: Float[Array, "k n *t e"]
) -> Callable[[Float[Array, "n h w c"], Float[Array, ""]], Float[Array, "k n h w c"]]:
    """Folds a network for k sets of labels: estimate(x_t, noise_level) -> (k, n, h, w, c).

    The estimate is what the network itself puts out, whatever its target. All sets see the same
    noisy latents, so what comes before the first cross-attention is computed once. Call it outside
    the loop, and the estimate in it.
    """
    folded = fold(network, variables)
    k, n = labels.shape[:2]
    text = _exactly(labels.reshape(k, n, -1), folded.text.kernel) + folded.text.bias[None, None]

    def estimate(x_t, noise_level):
        noise = sinusoidal_embedding(jnp.reshape(noise_level, (1,)), network.noise_emb_dim)
        vectors = text + noise[None] @ folded.noise
        x_zero = _run(folded, x_t.astype(network.dtype), vectors)
        return jnp.broadcast_to(_by_set(x_zero, vectors), (k, *x_t.shape))

    return estimate


def _run(folded: FoldedUNet, x: Array, vectors: Float[Array, "k n v"]) -> Array:
    """The network's forward pass, see `UNet.__call__`; x is (n, h, w, c) until sets differ."""
    taken = 0

    def run_unit(unit: FoldedUnit, x: Array) -> Array:
        nonlocal taken
        x = _residual_block(unit, x)
        if unit.spatial is None:
            return x
        width = x.shape[-1]
        vector = vectors[..., taken : taken + width]
        taken += width
        y = _by_set(x + _attend(unit.spatial, x), vectors) + vector[:, :, None, None]
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
        x = upsample(x)
        for unit in block:
            skip = _by_set(skips.pop(), vectors)
            skip = jnp.broadcast_to(skip, (len(x) // skip.shape[1], *skip.shape[1:]))
            x = jnp.concatenate([x, skip.reshape(-1, *skip.shape[2:])], axis=-1)
            x = run_unit(unit, x)
    return _multiply(x.astype(jnp.float32), folded.conv_out)


def _multiply(x: Array, affine: Affine) -> Array:
    """x kernel + bias over the last axis, in float32."""
    y = (x @ affine.kernel).astype(jnp.float32)
    return y + affine.bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _by_set(x: Array, vectors: Float[Array, "k n v"]) -> Array:
    """(n, ...) or (k n, ...) => (1, n, ...) or (k, n, ...)."""
    return x.reshape(-1, vectors.shape[1], *x.shape[1:])


def _residual_block(unit: FoldedUnit, x: Array) -> Array:
    h = jax.nn.swish(_conv(x, unit.conv_0)).astype(x.dtype)
    residual = x if unit.residual is None else x @ unit.residual
    return (_conv(h, unit.conv_1) + residual).astype(x.dtype)


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
        y = jax.lax.conv_general_dilated(
            x, conv.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return y.reshape(b, height, width, -1).astype(jnp.float32) + conv.bias[None]


def _attend(spatial: Affine, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """What the spatial attention adds."""
    b, height, width, channels = x.shape
    projected = _multiply(x.reshape(b, -1, channels), spatial).astype(x.dtype)
    inner = (projected.shape[-1] - channels) // 2
    return attend(*jnp.split(projected, [inner, 2 * inner], axis=-1)).reshape(x.shape)


def _pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    b, height, width, channels = x.shape
    windows = x.reshape(b, height // 2, 2, width // 2, 2, channels)
    return windows.astype(jnp.float32).mean((2, 4)).astype(x.dtype)


def _fold_unit(params: Any, stats: Any, size: int, dtype: Any) -> FoldedUnit:
    residual = params["residual"]
    factor, shift = _fold_norm({}, stats["residual"]["norm"])
    conv_0, conv_1 = residual["conv_0"], residual["conv_1"]

    # Zeros around the normalised map are not zeros around the map: what the shift adds differs at
    # the edges, where fewer of the kernel's nine places count, and is a map itself.
    places = jnp.einsum("c,ijcd->ijd", shift, conv_0["kernel"], precision="highest")
    line = jnp.arange(size)[:, None] + jnp.arange(3)[None, :] - 1
    counts = ((line >= 0) & (line < size)).astype(jnp.float32)
    bias = jnp.einsum("hi,wj,ijd->hwd", counts, counts, places, precision="highest")
    folded_0 = Affine(
        conv_0["kernel"] * factor[None, None, :, None], bias + conv_0["bias"][None, None]
    )
    bias_1, kernel = conv_1["bias"][None, None], None
    if "residual" in residual:
        bias_1 = bias_1 + residual["residual"]["bias"][None, None]
        kernel = residual["residual"]["kernel"][0, 0].astype(dtype)
    folded_1 = Affine(conv_1["kernel"], bias_1)
    spatial = None
    if "spatial" in params:
        spatial = _fold_spatial(params["spatial"], stats["spatial"])
        spatial = spatial._replace(kernel=spatial.kernel.astype(dtype))
    return FoldedUnit(_store(folded_0, size, dtype), _store(folded_1, size, dtype), kernel, spatial)


def _store(conv: Affine, size: int, dtype: Any) -> Affine:
    """In the compute dtype; on a 2 x 2 map, where each position reaches every one, as a matrix."""
    kernel = conv.kernel.astype(dtype)
    if size == 2:
        place = jnp.arange(2)
        reach = place[:, None] - place[None, :] + 1  # From, to => place in the kernel.
        kernel = kernel[reach[:, None, :, None], reach[None, :, None, :]]
        kernel = kernel.transpose(0, 1, 4, 2, 3, 5).reshape(4 * kernel.shape[-2], -1)
    return conv._replace(kernel=kernel)


def _fold_norm(params: Any, stats: Any) -> tuple[Array, Array]:
    """factor, shift: the norm is x factor + shift."""
    factor = jax.lax.rsqrt(stats["var"] + EPSILON) * params.get("scale", 1.0)
    return factor, params.get("bias", 0.0) - stats["mean"] * factor


def _fold_spatial(params: Any, stats: Any) -> Affine:
    factor, shift = _fold_norm(params["norm_in"], stats["norm_in"])

    def after_norm(dense):
        return Affine(
            factor[:, None] * dense["kernel"], _exactly(shift, dense["kernel"]) + dense["bias"]
        )

    query, key, value = (after_norm(params[name]) for name in ("query", "key", "value"))
    value = _project(value, params, stats)
    return Affine(*(jnp.concatenate(parts, axis=-1) for parts in zip(query, key, value)))


def _fold_cross(params: Any, stats: Any) -> Affine:
    factor, shift = _fold_norm(params["norm_cond"], stats["norm_cond"])
    kernel, bias = params["value"]["kernel"], params["value"]["bias"]
    value = Affine(factor[:, None] * kernel, _exactly(shift, kernel) + bias)
    return _project(value, params, stats)


def _project(value: Affine, params: Any, stats: Any) -> Affine:
    """Values, then "out", then "norm_out"."""
    factor, shift = _fold_norm(params["norm_out"], stats["norm_out"])
    out = Affine(params["out"]["kernel"] * factor[None], params["out"]["bias"] * factor + shift)
    return Affine(_exactly(value.kernel, out.kernel), _exactly(value.bias, out.kernel) + out.bias)
