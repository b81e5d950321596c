"""Reverse diffusion's walk: noise, an estimate of x_0 at any noise level => the last estimate.

Each function is one method of the literature. With the noise-to-signal ratio r = a / g and the
scaled latents y = x / g, every signal rule leads to the same equation, dy/dr = (y - x_0(y, r)) / r
(Karras et al. 2022, eq. 1 with sigma = r), whose right side is the noise that x implies. Levels
fall; the last one is where the walk would end, and is not visited: what is returned is the estimate
at the one before it. The network runs once in the body of each scan.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ldm_jax.noising import SignalRule

Estimate = Callable[[Float[Array, "n h w c"], Float[Array, ""]], Float[Array, "n h w c"]]
METHODS = ("ddim", "euler_ancestral", "heun", "dpm_solver_pp_2m")


def walk(
    method: str,
    estimate: Estimate,
    rule: SignalRule,
    x_t: Float[Array, "n h w c"],
    levels: Float[Array, " t"],
    *,
    eta: float = 0.0,
    keys: PRNGKeyArray | None = None,
) -> Float[Array, "n h w c"]:
    """Walks by the method of that name.

    Args:
        method: one of METHODS.
        estimate: of x_0, called with latents and a noise level.
        rule: the signal rule.
        x_t: latents at the first level.
        levels: noise levels in (0, 1), each below the one before, but perhaps for the last.
        eta: share of fresh noise in "ddim".
        keys: one for each picture, where noise is drawn.

    Raises:
        ValueError: for other methods, eta where it has no meaning, or keys that are missing.
    """
    check_method(method, eta)
    eta = 1.0 if method == "euler_ancestral" else eta
    if method == "heun":
        return heun(estimate, rule, x_t, levels)
    if method == "dpm_solver_pp_2m":
        return dpm_solver_pp_2m(estimate, rule, x_t, levels)
    if not eta:
        return ddim(estimate, rule, x_t, levels)
    if keys is None:
        raise ValueError(f"the method {method!r} with eta={eta} draws noise and needs keys")
    return ancestral(estimate, rule, x_t, levels, eta, keys)


def check_method(method: str, eta: float) -> None:
    """Raises ValueError for another method, or eta where it has no meaning."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if eta and method != "ddim":
        raise ValueError(f"eta belongs to the method 'ddim', got eta={eta} with {method!r}")


def count_evaluations(method: str, levels: int) -> int:
    """How often a walk over that many levels runs the network: t - 1, by Heun's method 2 t - 3."""
    check_method(method, 0.0)
    return 2 * levels - 3 if method == "heun" else levels - 1


def count_levels(method: str, evaluations: int) -> int:
    """The most levels for which the network runs at most that often; Heun's runs are odd.

    Raises:
        ValueError: for another method, or less than one run.
    """
    check_method(method, 0.0)
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}")
    return (evaluations + 3) // 2 if method == "heun" else evaluations + 1


def ddim(
    estimate: Estimate, rule: SignalRule, x_t: Float[Array, "n h w c"], levels: Float[Array, " t"]
) -> Float[Array, "n h w c"]:
    """Song et al. 2021, eq. 12 with sigma = 0: Euler's method for y. First order."""

    def step(carry, pair):
        x_t, _ = carry  # noisy latents at the level, the latest estimate of x_0
        level, next_level = pair
        x_zero = estimate(x_t, level)
        return (rule.update(x_t, x_zero, level, next_level), x_zero), None

    (_, x_zero), _ = jax.lax.scan(step, (x_t, jnp.zeros_like(x_t)), (levels[:-1], levels[1:]))
    return x_zero


def ancestral(
    estimate: Estimate,
    rule: SignalRule,
    x_t: Float[Array, "n h w c"],
    levels: Float[Array, " t"],
    eta: float,
    keys: PRNGKeyArray,
) -> Float[Array, "n h w c"]:
    """DDIM with fresh noise, Song et al. 2021, eq. 16; eta = 1 is the ancestral step.

    y' = x_0 + s_down eps + s_up z, s_up = eta r' sqrt(1 - r'^2 / r^2), s_down^2 + s_up^2 = r'^2.
    In y, DDIM with eta = 1 and k-diffusion's Euler ancestral are the same step.
    """
    ratios = _get_ratios(rule, levels)

    def step(carry, inputs):
        x_t, _ = carry  # noisy latents at the level, the latest estimate of x_0
        i, level, next_level, ratio, next_ratio = inputs
        x_zero = estimate(x_t, level)
        eps = (x_t / rule.signal_levels(level) - x_zero) / ratio
        up = eta * next_ratio * jnp.sqrt(jnp.maximum(1 - jnp.square(next_ratio / ratio), 0))
        down = jnp.sqrt(jnp.maximum(jnp.square(next_ratio) - jnp.square(up), 0))
        fresh = jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, i), x_t.shape[1:], x_t.dtype)
        )(keys)
        y = x_zero + down * eps + up * fresh
        return (rule.signal_levels(next_level) * y, x_zero), None

    steps = jnp.arange(len(levels) - 1)
    inputs = steps, levels[:-1], levels[1:], ratios[:-1], ratios[1:]
    (_, x_zero), _ = jax.lax.scan(step, (x_t, jnp.zeros_like(x_t)), inputs)
    return x_zero


def heun(
    estimate: Estimate, rule: SignalRule, x_t: Float[Array, "n h w c"], levels: Float[Array, " t"]
) -> Float[Array, "n h w c"]:
    """Karras et al. 2022, algorithm 1: Euler's step, then the mean of both slopes. Second order.

    Runs the network twice a level but for the last: at a_0, a_1, a_1, a_2, a_2, ...
    """
    ratios = _get_ratios(rule, levels)
    visits = 2 * (len(levels) - 1) - 1
    places = (jnp.arange(visits) + 1) // 2  # Which level a visit is at.
    corrects = jnp.arange(visits) % 2 == 1
    starts = jnp.arange(visits) // 2  # Where its step began.
    lengths = ratios[starts + 1] - ratios[starts]

    def step(carry, inputs):
        y, start, start_slope, _ = carry  # latents; of the step's start; the latest estimate
        level, ratio, length, correct = inputs
        x_zero = estimate(y * rule.signal_levels(level), level)
        slope = (y - x_zero) / ratio
        predicted = y + length * slope
        corrected = start + length * (start_slope + slope) / 2
        start, start_slope = jnp.where(correct, start, y), jnp.where(correct, start_slope, slope)
        return (jnp.where(correct, corrected, predicted), start, start_slope, x_zero), None

    y = x_t / rule.signal_levels(levels[0])
    zeros = jnp.zeros_like(x_t)
    inputs = levels[places], ratios[places], lengths, corrects
    (_, _, _, x_zero), _ = jax.lax.scan(step, (y, zeros, zeros, zeros), inputs)
    return x_zero


def dpm_solver_pp_2m(
    estimate: Estimate, rule: SignalRule, x_t: Float[Array, "n h w c"], levels: Float[Array, " t"]
) -> Float[Array, "n h w c"]:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2: two steps' estimates, extrapolated. Second order.

    DDIM's update with D = x_0 + h / (2 h') (x_0 - x_0') in the place of x_0; h is the step in
    log(g / a), and ' marks the step before.
    """
    log_ratios = jnp.log(_get_ratios(rule, levels))
    steps = log_ratios[:-1] - log_ratios[1:]
    weights = jnp.concatenate([jnp.zeros(1), steps[1:] / (2 * steps[:-1])])

    def step(carry, inputs):
        x_t, before = carry  # noisy latents at the level, the latest estimate of x_0
        level, next_level, weight = inputs
        x_zero = estimate(x_t, level)
        extrapolated = x_zero + weight * (x_zero - before)
        return (rule.update(x_t, extrapolated, level, next_level), x_zero), None

    inputs = levels[:-1], levels[1:], weights
    (_, x_zero), _ = jax.lax.scan(step, (x_t, jnp.zeros_like(x_t)), inputs)
    return x_zero


def _get_ratios(rule, levels):
    """Noise to signal, r = a / g."""
    return levels / rule.signal_levels(levels)
