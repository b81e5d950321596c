"""A trained denoiser with batch norms => the same function of fewer, larger products, for sampling.

With running statistics a batch norm multiplies and shifts each channel, so it merges with the
products beside it: of a unit's five norms none is left. The values of an attention merge with the
projection that follows, because the weights of a softmax add up to one; for the same reason their
bias can be added later, and a softmax does not see the bias of the queries. A single conditioning
token meets the maps as one vector for each unit, the sum of a part that depends on the noise level
and a part that depends on the text: the second is the same at every step.

What is left are convolutions and attentions, by XLA or, where they can run, by `ldm_jax.kernels`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax import kernels
from ldm_jax.blocks import attend, sinusoidal_embedding, upsample
from ldm_jax.norms import EPSILON

# Positions up to which matrix products are faster than a convolution, by JAX's backend.
MATRIX_ROWS = {"cpu": 0, "gpu": 512, "tpu": 512}
_exactly = partial(jnp.matmul, precision="highest")


class Affine(NamedTuple):
    """x kernel + bias, over the last axis or, with a kernel of four axes, a convolution."""

    kernel: Any
    bias: Array


class FoldedUnit(NamedTuple):
    """A `Unit`; `residual` is not empty if its width changes, `spatial` is there with attention.

    A skip may have kernels of its own: `conv_0` has several then, and so has `residual`. `spatial`
    gives queries, keys and values side by side, the values already projected; its bias is the keys'
    alone.
    """

    conv_0: Affine
    conv_1: Affine
    residual: tuple[Array, ...]
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
            unit, value_bias = _fold_unit(unit_params, unit_stats, size)
            units.append(_store(unit, size, network.dtype))
            if attention:
                folded = _fold_cross(unit_params["cross"], unit_stats["cross"])
                cross.append(folded._replace(bias=folded.bias + value_bias))
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


def arrange(folded: FoldedUNet) -> FoldedUNet:
    """The same for `ldm_jax.kernels`: skips with kernels of their own, and padded keys."""
    down, bottleneck, up = jax.tree.map(
        _pad_keys,
        (folded.down, folded.bottleneck, folded.up),
        is_leaf=lambda node: isinstance(node, FoldedUnit),
    )
    return folded._replace(
        down=down, bottleneck=bottleneck, up=[list(map(_cut_skip, block)) for block in up]
    )


def get_estimator(
    network: Any, variables: Any, labels: Float[Array, "k n *t e"]
) -> Callable[[Float[Array, "n h w c"], Float[Array, ""]], Float[Array, "k n h w c"]]:
    """Folds a network for k sets of labels: estimate(x_t, noise_level) -> (k, n, h, w, c).

    The estimate is what the network itself puts out, whatever its target. All sets see the same
    noisy latents, so what comes before the first cross-attention is computed once. Call it outside
    the loop, and the estimate in it.
    """
    folded, run = fold(network, variables), partial(_run, BY_XLA)
    if kernels.can_run(network):
        folded, run = arrange(folded), _run_by_either
    k, n = labels.shape[:2]
    text = _exactly(labels.reshape(k, n, -1), folded.text.kernel) + folded.text.bias[None, None]

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


@jax.custom_vjp
def _run_by_either(folded: FoldedUNet, x: Array, vectors: Float[Array, "k n v"]) -> Array:
    """`_run` by kernels, which have no gradients: where one is asked for, XLA runs all of it."""
    return _run_by_platform(folded, x, vectors)


@jax.jit  # Otherwise a call outside jit would ask for the default device, not for the arrays'.
def _run_by_platform(folded: FoldedUNet, x: Array, vectors: Float[Array, "k n v"]) -> Array:
    """`_run` by kernels in a program for CUDA, by XLA in any other."""
    by_kernels, by_xla = partial(_run, BY_KERNELS), partial(_run, BY_XLA)
    return jax.lax.platform_dependent(folded, x, vectors, cuda=by_kernels, default=by_xla)


_run_by_either.defvjp(
    lambda *inputs: jax.vjp(partial(_run, BY_XLA), *inputs),
    lambda backward, gradient: backward(gradient),
)


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
        y = jax.lax.conv_general_dilated(
            x, conv.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
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


def _pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    b, height, width, channels = x.shape
    windows = x.reshape(b, height // 2, 2, width // 2, 2, channels)
    return windows.astype(jnp.float32).mean((2, 4)).astype(x.dtype)


def _fold_unit(params: Any, stats: Any, size: int) -> tuple[FoldedUnit, Any]:
    """And the bias of its attention's values, which is added to every position."""
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
        (conv_0["kernel"] * factor[None, None, :, None],), bias + conv_0["bias"][None, None]
    )
    bias_1, kernel = conv_1["bias"][None, None], ()
    if "residual" in residual:
        bias_1 = bias_1 + residual["residual"]["bias"][None, None]
        kernel = (residual["residual"]["kernel"][0, 0],)
    spatial, value_bias = None, 0.0
    if "spatial" in params:
        spatial, value_bias = _fold_spatial(params["spatial"], stats["spatial"])
    return FoldedUnit(folded_0, Affine(conv_1["kernel"], bias_1), kernel, spatial), value_bias


def _cut_skip(unit: FoldedUnit) -> FoldedUnit:
    """With kernels of its own for the skip, which is as wide as what the unit makes."""

    def cut(kernel):
        return tuple(jnp.split(kernel, [kernel.shape[-2] - kernel.shape[-1]], axis=-2))

    conv_0 = unit.conv_0._replace(kernel=cut(*unit.conv_0.kernel))
    return unit._replace(conv_0=conv_0, residual=cut(*unit.residual))


def _pad_keys(unit: FoldedUnit) -> FoldedUnit:
    """With queries and keys as wide as `kernels.attend` wants them."""
    if unit.spatial is None:
        return unit
    kernel, bias = unit.spatial
    inner = len(bias)
    more = kernels.pad_keys(inner) - inner
    query, key, value = jnp.split(kernel, [inner, 2 * inner], axis=1)
    query, key = (jnp.pad(part, ((0, 0), (0, more))) for part in (query, key))
    kernel = jnp.concatenate([query, key, value], axis=1)
    return unit._replace(spatial=Affine(kernel, jnp.pad(bias, (0, more))))


def _store(unit: FoldedUnit, size: int, dtype: Any) -> FoldedUnit:
    """Kernels in the compute dtype, biases in float32; those of 2 x 2 maps as matrices.

    There, each position reaches every one.
    """

    def store(kernel):
        kernel = kernel.astype(dtype)
        if size == 2 and kernel.ndim == 4:
            place = jnp.arange(2)
            reach = place[:, None] - place[None, :] + 1  # From, to => place in the kernel.
            kernel = kernel[reach[:, None, :, None], reach[None, :, None, :]]
            kernel = kernel.transpose(0, 1, 4, 2, 3, 5).reshape(4 * kernel.shape[-2], -1)
        return kernel

    def store_affine(affine):
        return affine._replace(kernel=jax.tree.map(store, affine.kernel))

    return FoldedUnit(
        store_affine(unit.conv_0),
        store_affine(unit.conv_1),
        jax.tree.map(store, unit.residual),
        None if unit.spatial is None else store_affine(unit.spatial),
    )


def _fold_norm(params: Any, stats: Any) -> tuple[Array, Array]:
    """factor, shift: the norm is x factor + shift."""
    factor = jax.lax.rsqrt(stats["var"] + EPSILON) * params.get("scale", 1.0)
    return factor, params.get("bias", 0.0) - stats["mean"] * factor


def _fold_spatial(params: Any, stats: Any) -> tuple[Affine, Array]:
    """Queries, keys and values with the keys' bias; the values' bias.

    What the queries' bias adds to the logits is the same for all places that are looked at.
    """
    factor, shift = _fold_norm(params["norm_in"], stats["norm_in"])

    def after_norm(dense):
        return Affine(
            factor[:, None] * dense["kernel"], _exactly(shift, dense["kernel"]) + dense["bias"]
        )

    query, key, value = (after_norm(params[name]) for name in ("query", "key", "value"))
    value = _project(value, params, stats)
    kernel = jnp.concatenate([query.kernel, key.kernel, value.kernel], axis=-1)
    return Affine(kernel, key.bias), value.bias


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
