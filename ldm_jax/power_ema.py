"""Averages of weights with power-function profiles: snapshots => an average of any length.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(arXiv:2312.02696), section 3 and appendix C. After step t an average of exponent gamma is

    theta_gamma(t) = integral from 0 to t of p(s) theta(s) ds
    p(s) = (gamma + 1) s^gamma / t^(gamma + 1)

(equation 121), whose width is a fixed share of the training so far, sigma_rel t. Averages of two
lengths are kept while training and copied now and then; afterwards a sum of the copies, weighted by
least squares over their profiles, is an average of another length.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ldm_jax.training import TrainState

LONGEST = 12**-0.5  # sigma_rel of gamma = 0, the mean over all steps.
# A reconstruction is refused beyond these, see `Fit`.
MAX_ERROR = 0.05
MAX_GAIN = 64.0


@flax.struct.dataclass
class ProfiledState(TrainState):
    """A TrainState with averages of power-function profiles.

    A class of its own, so that states and checkpoints of runs without them stay as they are.

    Attributes:
        power_emas: {"params", "batch_stats"} for each sigma_rel, by its name, such as "0.05".
    """

    power_emas: dict[str, Any]

    def update_more(self) -> "ProfiledState":
        """The averages after the step whose weights are `params` and whose number is `step`."""
        averages, latest = {}, {"params": self.params, "batch_stats": self.batch_stats}
        for name, average in self.power_emas.items():
            rate = get_rate(sigma_rel_to_gamma(float(name)), self.step)
            averages[name] = jax.tree.map(
                lambda old, new, rate=rate: old + rate * (new - old), average, latest
            )
        return dataclasses.replace(self, power_emas=averages)


def add_averages(state: TrainState, sigma_rels: Sequence[float]) -> TrainState:
    """A fresh state with averages of these lengths; without any, the state itself.

    Raises:
        ValueError: for a sigma_rel out of range, or two that are equal.
    """
    check_sigma_rels(sigma_rels)
    if not sigma_rels:
        return state
    latest = {"params": state.params, "batch_stats": state.batch_stats}
    averages = {str(float(name)): jax.tree.map(jnp.copy, latest) for name in sigma_rels}
    return ProfiledState(**vars(state), power_emas=averages)


class Fit(NamedTuple):
    """How an average is put together.

    Attributes:
        weights: of the snapshots, float64 (n).
        error: RMS difference of the profile that they make and the one that was asked for, relative
            to the latter's RMS.
        gain: factor by which independent errors of the snapshots, such as those of rounding, come
            out larger: the norm of `weights`.
    """

    weights: Float[np.ndarray, " n"]
    error: float
    gain: float

    @property
    def is_good(self) -> bool:
        """Whether it is near enough to what was asked for."""
        return self.error <= MAX_ERROR and self.gain <= MAX_GAIN


def check_sigma_rels(sigma_rels: Sequence[float]) -> None:
    """Raises ValueError unless they are different relative widths in (0, LONGEST)."""
    for sigma_rel in sigma_rels:
        if not 0 < sigma_rel < LONGEST:
            raise ValueError(f"sigma_rel must lie in (0, {LONGEST:.4f}), got {sigma_rel}")
    if len(set(sigma_rels)) < len(sigma_rels):
        raise ValueError(f"sigma_rels must differ from each other, got {tuple(sigma_rels)}")


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent gamma > 0 of a profile of relative width sigma_rel (equation 126, algorithm 2).

    The largest root of sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2), which is
    equation 123.

    Args:
        sigma_rel: standard deviation of the profile over its length t, in (0, LONGEST).

    Raises:
        ValueError: for a sigma_rel outside that range.
    """
    check_sigma_rels([sigma_rel])
    t = float(sigma_rel) ** -2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def get_rate(gamma: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """What the weights of step t >= 1 count for: 1 - beta, beta = (1 - 1/t)^(gamma + 1), eq. 127.

    With it the weights of step k count for (k/t)^(gamma + 1) - ((k - 1)/t)^(gamma + 1) at step t,
    the integral of the profile over that step. Written so that float32 keeps its digits where beta
    is near 1; at t = 1 it is 1, so that the initial weights are forgotten.
    """
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / step.astype(jnp.float32)))


def inner_product(
    steps_a: Float[np.ndarray, "*shape"],
    gammas_a: Float[np.ndarray, "*shape"],
    steps_b: Float[np.ndarray, "*shape"],
    gammas_b: Float[np.ndarray, "*shape"],
) -> Float[np.ndarray, "*shape"]:
    """Integral of the product of two profiles, equation 151, of float64; shapes broadcast.

    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1)
    (m / t_a)^gamma_a (m / t_b)^gamma_b / max(t_a, t_b), with m = min(t_a, t_b).
    """
    shorter, longer = np.minimum(steps_a, steps_b), np.maximum(steps_a, steps_b)
    overlap = (shorter / steps_a) ** gammas_a * (shorter / steps_b) ** gammas_b / longer
    return (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1) * overlap


def fit_profile(
    steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float
) -> Fit:
    """The weights of n snapshots whose sum comes nearest to an average (algorithm 3).

    They are scaled to add up to one, so that what stood still while training comes back as it was.

    Args:
        steps: of the snapshots, from 1.
        sigma_rels: their lengths, likewise n.
        step: of the average; snapshots of later steps must not be among them.
        sigma_rel: its length.

    Raises:
        ValueError: for a sigma_rel out of range, or without snapshots of steps up to `step`.
    """
    if not len(steps) or max(steps) > step:
        raise ValueError(f"snapshots of steps up to {step} are needed, got steps {list(steps)}")
    # In units of the whole length, for which the matrix has elements near 1.
    times = np.asarray(steps, np.float64) / step
    gammas = np.asarray([sigma_rel_to_gamma(value) for value in sigma_rels])
    whole, gamma = np.ones(()), np.asarray(sigma_rel_to_gamma(sigma_rel))
    products = inner_product(times[:, None], gammas[:, None], times, gammas)
    wanted = inner_product(times, gammas, whole, gamma)
    # Two of the profiles may be as good as equal: the least of all solutions.
    weights = np.linalg.lstsq(products, wanted, rcond=1e-12)[0]
    weights = weights / weights.sum()
    square = inner_product(whole, gamma, whole, gamma)
    rest = max(square - 2 * wanted @ weights + weights @ products @ weights, 0.0)
    return Fit(weights, float(np.sqrt(rest / square)), float(np.linalg.norm(weights)))


def get_reach(steps: Sequence[int], sigma_rels: Sequence[float], step: int) -> tuple[float, float]:
    """The shortest and the longest sigma_rel that the snapshots give, see `Fit.is_good`.

    Looked for upwards and downwards from their own, in steps of 0.005. Arguments as `fit_profile`.
    """

    def walk(start, stride):
        reached = start
        for k in range(1, 60):
            value = round(start + k * stride, 6)
            if not 0 < value < LONGEST or not fit_profile(steps, sigma_rels, step, value).is_good:
                break
            reached = value
        return reached

    return walk(min(sigma_rels), -0.005), walk(max(sigma_rels), 0.005)


def reconstruct(
    snapshots: Iterable[Mapping[str, np.ndarray]], weights: Float[np.ndarray, " n"]
) -> dict[str, np.ndarray]:
    """The weighted sum of snapshots, float32, added up in float64.

    Args:
        snapshots: the tensors of each by name; an iterator needs room for one at a time.
        weights: of `fit_profile`.

    Returns:
        Tensors by the same names. A running variance ("batch_stats/.../var") that a negative weight
        would bring below zero is zero.
    """
    total: dict[str, np.ndarray] = {}
    for tensors, weight in zip(snapshots, weights, strict=True):
        for name, value in tensors.items():
            part = weight * value.astype(np.float64)
            total[name] = total[name] + part if name in total else part
    return {
        name: np.maximum(value, 0 if _is_variance(name) else -np.inf).astype(np.float32)
        for name, value in total.items()
    }


def _is_variance(name: str) -> bool:
    return name.startswith("batch_stats/") and name.endswith("/var")
