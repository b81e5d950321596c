"""A trained denoiser with batch norms => the same function of fewer, larger products, for sampling.

With running statistics a batch norm multiplies and shifts each channel, so it merges with the
products beside it: of a unit's five norms none is left. The values of an attention merge with the
projection that follows, because the weights of a softmax add up to one; for the same reason their
bias can be added later, and a softmax does not see the bias of the queries. A single conditioning
token meets the maps as one vector for each unit, the sum of a part that depends on the noise level
and a part that depends on the text: the second is the same at every step.

What is left are convolutions and attentions; `ldm_jax.estimating` runs them.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax import kernels
from ldm_jax.normed import spread_places
from ldm_jax.norms import EPSILON

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
    """The same for `ldm_jax.kernels`: skips with kernels of their own, and padded keys.

    Maps that meet a skip must be larger than 2 x 2.
    """
    down, bottleneck, up = jax.tree.map(
        _pad_keys,
        (folded.down, folded.bottleneck, folded.up),
        is_leaf=lambda node: isinstance(node, FoldedUnit),
    )
    return folded._replace(
        down=down, bottleneck=bottleneck, up=[list(map(_cut_skip, block)) for block in up]
    )


def _fold_unit(params: Any, stats: Any, size: int) -> tuple[FoldedUnit, Any]:
    """And the bias of its attention's values, which is added to every position."""
    residual = params["residual"]
    factor, shift = _fold_norm({}, stats["residual"]["norm"])
    conv_0, conv_1 = residual["conv_0"], residual["conv_1"]

    # Zeros around the normalised map are not zeros around the map: what the shift adds differs at
    # the edges, where fewer of the kernel's nine places count, and is a map itself.
    places = jnp.einsum("c,ijcd->ijd", shift, conv_0["kernel"], precision="highest")
    bias = spread_places(places, size, size)
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
