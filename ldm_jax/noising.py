"""Forward process: clean latents, noise => noisy latents at a noise level.

The signal rule is the one object that training and every sampler share. It says how much of the
clean latents is left at noise level a, and with that both the mixture x_t = g(a) x_0 + a eps and
the deterministic update that leads from one noise level to the next.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

MIXTURES = ("variance_preserving", "convex")
NOISE_LAWS = ("half_normal", "uniform", "log_normal")
TARGETS = ("x_zero", "velocity")


@dataclasses.dataclass(frozen=True)
class SignalRule:
    """Signal level g as a function of the noise level a.

    Attributes:
        mixture: "variance_preserving", g = sqrt(1 - a^2), or "convex", g = 1 - a.

    Raises:
        ValueError: for a mixture of another name.
    """

    mixture: str = "variance_preserving"

    def __post_init__(self):
        if self.mixture not in MIXTURES:
            raise ValueError(f"mixture must be one of {MIXTURES}, got {self.mixture!r}")

    def signal_levels(self, noise_levels: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Signal level g of each noise level a in [0, 1]."""
        if self.mixture == "convex":
            return 1 - noise_levels
        return jnp.sqrt((1 - noise_levels) * (1 + noise_levels))

    def noise_levels(self, ratios: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Noise level a at each ratio of noise to signal, sigma = a / g."""
        if self.mixture == "convex":
            return ratios / (1 + ratios)
        return ratios * jax.lax.rsqrt(1 + jnp.square(ratios))

    def mix(
        self,
        x_zero: Float[Array, "b h w c"],
        noise: Float[Array, "b h w c"],
        noise_levels: Float[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """x_t = g(a) x_0 + a eps, with a noise level for each sample."""
        a = _per_sample(noise_levels)
        return self.signal_levels(a) * x_zero + a * noise

    def get_velocity(
        self,
        x_zero: Float[Array, "b h w c"],
        noise: Float[Array, "b h w c"],
        noise_levels: Float[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """Direction in which x_t moves with growing noise: g eps - a x_0, convex eps - x_0.

        Salimans & Ho 2022, section 4; of the convex mixture Liu et al. 2023 (rectified flow),
        eq. 1, with the other sign.
        """
        if self.mixture == "convex":
            return noise - x_zero
        a = _per_sample(noise_levels)
        return self.signal_levels(a) * noise - a * x_zero

    def get_x_zero(
        self,
        x_t: Float[Array, "b h w c"],
        velocity: Float[Array, "b h w c"],
        noise_levels: Float[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """What `get_velocity` was of: x_0 = g x_t - a v, convex x_t - a v."""
        a = _per_sample(noise_levels)
        kept = x_t if self.mixture == "convex" else self.signal_levels(a) * x_t
        return kept - a * velocity

    def update(
        self,
        x_t: Float[Array, "b h w c"],
        x_zero: Float[Array, "b h w c"],
        noise_levels: Float[Array, " b"],
        next_noise_levels: Float[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """From noise level a to a', keeping the noise that x_t and the estimate x_0 imply.

        x' = (a' / a) x + (g' - a' g / a) x_0, exact where x = g x_0 + a eps. The convex rule turns
        it into ((a - a') x_0 + a' x) / a. This is the deterministic step of DDIM (Song et al. 2021,
        eq. 12 with sigma = 0), written in x_0.
        """
        a, next_a = _per_sample(noise_levels), _per_sample(next_noise_levels)
        kept = next_a / a
        return kept * x_t + (self.signal_levels(next_a) - kept * self.signal_levels(a)) * x_zero


@dataclasses.dataclass(frozen=True)
class ForwardProcess:
    """How training draws noise levels, the rule by which it mixes, and what the network estimates.

    A noise level is a = sin(max_angle u) with u in [0, 1): u = |z| / 3 for z from N(0, 1) truncated
    to (-3, 3) under the "half_normal" law, u uniform under "uniform". Under "log_normal" it is that
    of the noise-to-signal ratio sigma, ln sigma from N(p_mean, p_std^2) (Karras et al. 2022, table
    1), up to 1 and whatever max_angle is.

    Attributes:
        rule: the mixture.
        noise_law: "half_normal", "uniform" or "log_normal".
        max_angle: in radians, at most pi / 2. With 1, the original's, no level exceeds 0.841.
        p_mean, p_std: of "log_normal".
        target: what the network puts out, "x_zero" or the "velocity" of the rule.

    Raises:
        ValueError: for another law or target, an angle outside (0, pi / 2], or a p_mean or p_std
            that no law has.
    """

    rule: SignalRule = SignalRule()
    noise_law: str = "half_normal"
    max_angle: float = 1.0
    p_mean: float = -1.2
    p_std: float = 1.2
    target: str = "x_zero"

    def __post_init__(self):
        if self.noise_law not in NOISE_LAWS:
            raise ValueError(f"noise_law must be one of {NOISE_LAWS}, got {self.noise_law!r}")
        if not 0 < self.max_angle <= math.pi / 2:
            raise ValueError(f"max_angle must lie in (0, pi/2], got {self.max_angle}")
        if not math.isfinite(self.p_mean):
            raise ValueError(f"p_mean must be a finite number, got {self.p_mean}")
        if not 0 < self.p_std < math.inf:
            raise ValueError(f"p_std must be positive and finite, got {self.p_std}")
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}, got {self.target!r}")

    def sample_noise_levels(self, rng: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        """Draws n noise levels from the law. Consumes the key."""
        if self.noise_law == "log_normal":
            ratios = jnp.exp(self.p_mean + self.p_std * jax.random.normal(rng, (n,)))
            return self.rule.noise_levels(ratios)
        if self.noise_law == "uniform":
            u = jax.random.uniform(rng, (n,))
        else:
            u = jnp.abs(jax.random.truncated_normal(rng, -3.0, 3.0, (n,))) / 3
        return jnp.sin(self.max_angle * u)

    def get_target(
        self,
        x_zero: Float[Array, "b h w c"],
        noise: Float[Array, "b h w c"],
        noise_levels: Float[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """What the network should put out."""
        if self.target == "velocity":
            return self.rule.get_velocity(x_zero, noise, noise_levels)
        return x_zero

    def get_x_zero(
        self,
        x_t: Float[Array, "b h w c"],
        output: Float[Array, "b h w c"],
        noise_levels: Float[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """The estimate of the clean latents that the network's output means."""
        if self.target == "velocity":
            return self.rule.get_x_zero(x_t, output, noise_levels)
        return output


def draw_noise(
    rng: PRNGKeyArray, latents: Float[Array, "b h w c"], process: ForwardProcess
) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """N(0, I) of the latents' shape, and a noise level for each sample. Consumes the key."""
    level_key, noise_key = jax.random.split(rng)
    noise_levels = process.sample_noise_levels(level_key, latents.shape[0])
    return jax.random.normal(noise_key, latents.shape, latents.dtype), noise_levels


def add_noise(
    rng: PRNGKeyArray,
    latents: Float[Array, "b h w c"],
    process: ForwardProcess = ForwardProcess(),
) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """Mixes latents with Gaussian noise at random levels, x_t = g(a) x_0 + a eps.

    Args:
        rng: key, consumed.
        latents: clean latents in [-1, 1], NHWC.
        process: law of the levels and mixture; the original's by default.

    Returns:
        The noisy latents, and the noise level a of each sample.

    Raises:
        ValueError: for latents that are not of rank 4.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents must have 4 axes (b, h, w, c), got shape {latents.shape}")
    noise, noise_levels = draw_noise(rng, latents, process)
    return process.rule.mix(latents, noise, noise_levels.astype(latents.dtype)), noise_levels


def _per_sample(levels):
    """(b,) => (b, 1, 1, 1); a scalar holds for all samples."""
    return jnp.reshape(levels, (-1, 1, 1, 1))


def get_process(mixture: str, noise_law: str, max_angle: float, **settings: Any) -> ForwardProcess:
    """A forward process from plain settings, as configs and checkpoints hold them."""
    return ForwardProcess(SignalRule(mixture), noise_law, max_angle, **settings)
