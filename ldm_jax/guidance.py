"""Estimates of x_0 with a text and without one => the estimate that a sampler follows."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(
    preferred: Float[Array, "n h w c"],
    other: Float[Array, "n h w c"],
    weight: Float[Array, ""] | float,
    rescale: Float[Array, ""] | float = 0.0,
) -> Float[Array, "n h w c"]:
    """w preferred + (1 - w) other (Ho & Salimans 2022), its spread drawn towards the preferred's.

    Guidance makes estimates too bright and too dark. `rescale`, phi in [0, 1], mixes in, with that
    weight, the same estimate at the standard deviation of `preferred`, sample by sample (Lin et al.
    2024, eq. 15 and 16).
    """
    return _keep_spread(weight * preferred + (1 - weight) * other, preferred, rescale)


def guide_apart(
    preferred: Float[Array, "n h w c"],
    none: Float[Array, "n h w c"],
    styleless: Float[Array, "n h w c"],
    weight: Float[Array, ""] | float,
    style_weight: Float[Array, ""] | float,
    rescale: Float[Array, ""] | float = 0.0,
) -> Float[Array, "n h w c"]:
    """A weight for what a picture shows and another for its style.

    none + w (styleless - none) + w_style (preferred - styleless), as Brooks et al. 2023,
    eq. 3, weigh picture and instruction; equal weights make it `guide`.

    Args:
        preferred: estimates with the whole text.
        none: without any.
        styleless: with the text less its style.
        weight: w.
        style_weight: w_style.
        rescale: see `guide`.
    """
    guided = guide(styleless, none, weight) + style_weight * (preferred - styleless)
    return _keep_spread(guided, preferred, rescale)


def guide_by_weaker(
    preferred: Float[Array, "n h w c"],
    weaker: Float[Array, "n h w c"],
    styleless: Float[Array, "n h w c"],
    weight: Float[Array, ""] | float,
    style_weight: Float[Array, ""] | float,
    rescale: Float[Array, ""] | float = 0.0,
) -> Float[Array, "n h w c"]:
    """Autoguidance (Karras et al. 2024), and a weight for the text's style beside it.

    weaker + w (preferred - weaker) + (w_style - 1) (preferred - styleless); a style weight of 1
    makes it `guide`, which goes away from what a weaker denoiser makes of the same text.

    Args:
        preferred: estimates with the whole text.
        weaker: those of the weaker denoiser, likewise.
        styleless: with the text less its style.
        weight: w.
        style_weight: w_style.
        rescale: see `guide`.
    """
    guided = guide(preferred, weaker, weight) + (style_weight - 1) * (preferred - styleless)
    return _keep_spread(guided, preferred, rescale)


def _keep_spread(guided, preferred, rescale):
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(preferred, axes, keepdims=True) / jnp.std(guided, axes, keepdims=True)
    return jnp.where(rescale > 0, guided * (rescale * ratio + (1 - rescale)), guided)


def drop_style(labels: Float[Array, "n *t e"]) -> Float[Array, "n *t e"]:
    """Text embeddings of two parts side by side, the second, the style's, replaced by zeros."""
    return jnp.asarray(labels).at[..., labels.shape[-1] // 2 :].set(0)
