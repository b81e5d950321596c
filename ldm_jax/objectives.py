"""What training minimises: the network's outputs, their targets, noise levels => a number."""

import dataclasses

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ldm_jax.noising import ForwardProcess

LOSSES = ("mae", "mse", "huber")
WEIGHTINGS = ("none", "min_snr")


@dataclasses.dataclass(frozen=True)
class Objective:
    """A distance between output and target, weighted by the noise level.

    Attributes:
        loss: "mae", |d|; "mse", d^2; or "huber", d^2 / 2 up to huber_delta and
            huber_delta (|d| - huber_delta / 2) beyond (Huber 1964).
        loss_weighting: "none", or "min_snr" of `min_snr_weights`.
        huber_delta: where "huber" turns from a parabola to a line.
        min_snr_gamma: the highest weight of "min_snr".

    Raises:
        ValueError: for other names, or numbers that are not positive.
    """

    loss: str = "mae"
    loss_weighting: str = "none"
    huber_delta: float = 0.1
    min_snr_gamma: float = 5.0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {self.loss!r}")
        if self.loss_weighting not in WEIGHTINGS:
            raise ValueError(
                f"loss_weighting must be one of {WEIGHTINGS}, got {self.loss_weighting!r}"
            )
        for name in ("huber_delta", "min_snr_gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def __call__(
        self,
        output: Float[Array, "b h w c"],
        target: Float[Array, "b h w c"],
        noise_levels: Float[Array, " b"],
        process: ForwardProcess,
    ) -> Float[Array, ""]:
        """Mean over all numbers of the weighted distances."""
        distances = self._get_distances(output - target)
        if self.loss_weighting == "min_snr":
            weights = min_snr_weights(noise_levels, process, self.min_snr_gamma)
            distances = distances * weights[:, None, None, None]
        return jnp.mean(distances)

    def _get_distances(self, differences):
        if self.loss == "mse":
            return jnp.square(differences)
        if self.loss == "huber":
            return optax.huber_loss(differences, delta=self.huber_delta)
        return jnp.abs(differences)


def min_snr_weights(
    noise_levels: Float[Array, " b"], process: ForwardProcess, gamma: float = 5.0
) -> Float[Array, " b"]:
    """min(SNR, gamma) of an error of x_0, SNR = (g / a)^2 (Hang et al. 2023, section 3.4).

    A velocity that errs by d makes x_0 err by a d, so that min(SNR, gamma) a^2 = min(g^2, gamma
    a^2) is the same weight of its square: min(SNR, gamma) / (SNR + 1) where variance is preserved.
    """
    noise, signal = jnp.square(noise_levels), jnp.square(process.rule.signal_levels(noise_levels))
    if process.target == "velocity":
        return jnp.minimum(signal, gamma * noise)
    return jnp.minimum(signal / noise, gamma)  # Without noise SNR is infinite.
