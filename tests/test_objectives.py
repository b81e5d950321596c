"""Losses and weights against the formulas, in numpy and float64; what is comparable stays so."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.latents import LatentScale
from ldm_jax.noising import MIXTURES, TARGETS, get_process
from ldm_jax.objectives import LOSSES, Objective, min_snr_weights
from ldm_jax.training import TrainState, get_eval_step, get_loss

LEVELS = np.array([0.02, 0.4, 0.408, 0.6, 0.95], np.float32)  # SNR 5 is at 0.408 and 0.309.


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def get_snr(mixture):
    a = LEVELS.astype(np.float64)
    return (1 / a - 1) ** 2 if mixture == "convex" else 1 / a**2 - 1


def get_distances(loss, d):
    d = np.abs(d.astype(np.float64))
    huber = np.where(d < 0.5, d**2 / 2, 0.5 * (d - 0.25))
    return {"mae": d, "mse": d**2, "huber": huber}[loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_an_objective_is_the_weighted_mean_of_its_distances(loss, weighting):
    output, target = draw(2, 5, 3, 3, 2)
    process = get_process("variance_preserving", "uniform", 1.0)
    objective = Objective(loss, weighting, huber_delta=0.5, min_snr_gamma=4.0)
    weights = np.minimum(get_snr("variance_preserving"), 4) if weighting == "min_snr" else 1
    expected = np.mean(weights * get_distances(loss, output - target).mean((1, 2, 3)))
    for call in (objective, jax.jit(objective, static_argnums=3)):
        np.testing.assert_allclose(call(output, target, LEVELS, process), expected, rtol=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_min_snr_weights_follow_the_paper(mixture):
    snr = get_snr(mixture)
    for target in TARGETS:
        weights = min_snr_weights(LEVELS, get_process(mixture, "uniform", 1.0, target=target))
        error = 1 if target == "x_zero" else LEVELS.astype(np.float64) ** 2
        np.testing.assert_allclose(weights, np.minimum(snr, 5) * error, rtol=1e-5)
        if (mixture, target) == ("variance_preserving", "velocity"):
            np.testing.assert_allclose(weights, np.minimum(snr, 5) / (snr + 1), rtol=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_weighted_squares_do_not_depend_on_the_target(mixture):
    x_zero, noise, error = draw(3, 5, 4, 4, 2)
    objective, losses = Objective("mse", "min_snr"), []
    for target in TARGETS:
        process = get_process(mixture, "uniform", 1.0, target=target)
        wanted = process.get_target(x_zero, noise, LEVELS)
        scale = 1 if target == "x_zero" else -1 / LEVELS[:, None, None, None]
        losses.append(objective(wanted + scale * error, wanted, LEVELS, process))
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_finite_at_both_ends(target):
    process = get_process("variance_preserving", "uniform", 1.0, target=target)
    weights = jax.jit(min_snr_weights, static_argnums=1)(jnp.array([0.0, 1.0]), process)
    np.testing.assert_array_equal(weights, [5.0 if target == "x_zero" else 0.0, 0.0])


LATENTS = np.random.default_rng(0).uniform(-1, 1, (16, 4, 4, 2)).astype(np.float32)
BATCH = {"latents_mean": LATENTS, "text_embeddings": draw(16, 6)}


def create_oracle(process, error=0.0):
    """A network that puts out what it should where x_0 is LATENTS + error."""

    def apply(variables, x_t, noise_levels, labels, **_):
        a = noise_levels[:, None, None, None]
        noise = (x_t - process.rule.signal_levels(a) * LATENTS) / a
        # Another x_0 and the noise that goes with it: both estimates are of the same x_t.
        x_zero = LATENTS + error
        noise = noise - process.rule.signal_levels(a) * error / a
        return process.get_target(x_zero, noise, noise_levels), {}

    return types.SimpleNamespace(apply=apply)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_held_out_loss_is_the_error_of_x_zero_whatever_the_target(mixture, target):
    process = get_process(mixture, "uniform", 1.5, target=target)
    state = TrainState(jnp.int32(0), {}, {}, {}, {}, optax.EmptyState())
    for error in (0.0, 0.25):
        eval_step = get_eval_step(create_oracle(process, error), LatentScale(1.0), process)
        found = eval_step(state, jax.random.key(0), BATCH)
        np.testing.assert_allclose(found, error, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_the_network_that_puts_out_the_target_has_no_loss(target):
    process = get_process("variance_preserving", "uniform", 1.5, target=target)
    for objective in (Objective(), Objective("huber"), Objective("mse", "min_snr")):
        options = {"objective": objective, "train": True}
        loss_fn = get_loss(create_oracle(process), LatentScale(1.0), process, **options)
        assert loss_fn({}, {}, jax.random.key(0), BATCH)[0] < 1e-3
        loss_fn = get_loss(create_oracle(process, 0.5), LatentScale(1.0), process, **options)
        assert loss_fn({}, {}, jax.random.key(0), BATCH)[0] > 0.03


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"loss": "l1"}, "loss must be one of .*got 'l1'"),
        ({"loss_weighting": "snr"}, "loss_weighting must be one of .*got 'snr'"),
        ({"huber_delta": 0.0}, "huber_delta must be positive and finite, got 0.0"),
        ({"min_snr_gamma": -5.0}, "min_snr_gamma must be positive and finite, got -5.0"),
    ],
)
def test_objectives_that_do_not_exist_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**fields)
