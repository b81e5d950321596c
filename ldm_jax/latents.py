"""Scale of the latents: VAE posterior => normalised latents in [-1, 1], and back.

The original clips the raw latents at 2.5 standard deviations of all of them and divides by that
number, `std_latent`. A number for each channel, with a mean, does the same channel by channel.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray


class LatentScale(NamedTuple):
    """What maps raw VAE latents to [-1, 1].

    Attributes:
        std_latent: the raw value that becomes 1, a number or one for each channel (c,).
        mean_latent: the raw value that becomes 0, likewise.
    """

    std_latent: ArrayLike
    mean_latent: ArrayLike = 0.0

    def normalise(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Clips to mean_latent +- std_latent and divides: raw VAE latents => [-1, 1]."""
        mean, std = jnp.asarray(self.mean_latent), jnp.asarray(self.std_latent)
        return jnp.clip((latents - _last_axis(mean)) / _last_axis(std), -1.0, 1.0)

    def restore(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """[-1, 1] => raw VAE latents, the inverse of `normalise` where nothing was clipped."""
        mean, std = jnp.asarray(self.mean_latent), jnp.asarray(self.std_latent)
        return latents * _last_axis(std) + _last_axis(mean)


def draw_latents(
    rng: PRNGKeyArray,
    latents_mean: Float[Array, "b h w c"],
    latents_std: Float[Array, "b h w c"] | None,
) -> Float[Array, "b h w c"]:
    """Draws raw latents from the VAE's posterior N(mean, std^2). Consumes the key.

    Without a standard deviation, as in a cache made from stored latents, the mean is returned.
    """
    if latents_std is None:
        return latents_mean
    return latents_mean + latents_std * jax.random.normal(rng, latents_mean.shape)


def get_latent_scale(manifest: Mapping, normalisation: str, deviations: float) -> LatentScale:
    """The scale that a latent cache's statistics give.

    Args:
        manifest: the cache's, with "std_latent" (2.5 standard deviations of all latents) and
            "channel_mean" and "channel_std", one number for each channel.
        normalisation: "global", one number for all channels, or "channel".
        deviations: the number of standard deviations that becomes 1.

    Raises:
        ValueError: for another normalisation, deviations that are no positive number, or a channel
            that is the same everywhere and cannot be divided by its deviation.
    """
    if not 0 < deviations < math.inf:
        raise ValueError(f"deviations must lie in (0, inf), got {deviations}")
    if normalisation == "global":
        return LatentScale(manifest["std_latent"] * deviations / 2.5)
    if normalisation == "channel":
        if not all(std > 0 for std in manifest["channel_std"]):
            raise ValueError(
                "every channel of the latents must vary for the normalisation 'channel', got "
                f"standard deviations {manifest['channel_std']}"
            )
        std = [deviations * s for s in manifest["channel_std"]]
        return LatentScale(jnp.asarray(std), jnp.asarray(manifest["channel_mean"]))
    raise ValueError(f"normalisation must be 'global' or 'channel', got {normalisation!r}")


def _last_axis(x):
    """A scalar or (c,) as (1, 1, 1, c)."""
    return jnp.reshape(x, (1, 1, 1, -1))
