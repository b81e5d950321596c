"""Mixtures, updates and noise levels against the formulas, in numpy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from scipy.stats import kstest, norm

from ldm_jax.noising import ForwardProcess, SignalRule, add_noise, get_process
from ldm_jax.sampler import get_noise_levels

MIXTURES = ["variance_preserving", "convex"]


def signal_levels(mixture, a):
    a = np.asarray(a, np.float64)
    return 1 - a if mixture == "convex" else np.sqrt(1 - a**2)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_signal_levels_follow_the_formula_to_both_ends(mixture):
    a = np.concatenate([np.linspace(0, 1, 101), [1 - 1e-6]]).astype(np.float32)
    for levels in (SignalRule(mixture).signal_levels, jax.jit(SignalRule(mixture).signal_levels)):
        np.testing.assert_allclose(levels(a), signal_levels(mixture, a), rtol=1e-6)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mix_weighs_each_sample_by_its_own_level(mixture):
    x_zero, noise = draw((2, 5, 4, 4, 3))
    a = np.array([0.0, 0.1, 0.5, 0.9, 1.0], np.float32)
    g = signal_levels(mixture, a)
    expected = g[:, None, None, None] * x_zero + a[:, None, None, None] * noise
    rule = SignalRule(mixture)
    np.testing.assert_allclose(rule.mix(x_zero, noise, a), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(rule.mix)(x_zero, noise, a), expected, atol=1e-6)


def test_the_convex_update_is_the_originals_update_a():
    x_t, x_zero = draw((2, 3, 4, 4, 2)).astype(np.float64)
    a, next_a = np.array([0.95, 0.5, 0.02]), np.array([0.76, 0.4, 0.01])
    column = (slice(None), None, None, None)
    expected = ((a - next_a)[column] * x_zero + next_a[column] * x_t) / a[column]
    result = SignalRule("convex").update(*(jnp.float32(x) for x in (x_t, x_zero, a, next_a)))
    np.testing.assert_allclose(result, expected, atol=2e-6)


def test_the_variance_preserving_update_is_update_b():
    x_t, x_zero = draw((2, 3, 4, 4, 2)).astype(np.float64)
    a, next_a = np.array([0.95, 0.5, 0.02]), np.array([0.76, 0.4, 0.01])
    g, next_g = np.sqrt(1 - a**2), np.sqrt(1 - next_a**2)
    column = (slice(None), None, None, None)
    expected = (next_a / a)[column] * x_t + (next_g - next_a * g / a)[column] * x_zero
    update = SignalRule("variance_preserving").update
    for f in (update, jax.jit(update)):
        result = f(*(jnp.float32(x) for x in (x_t, x_zero, a, next_a)))
        np.testing.assert_allclose(result, expected, atol=2e-6)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_update_with_the_true_x_zero_stays_on_its_own_mixture(mixture):
    x_zero, noise = draw((2, 4, 2, 2, 3), seed=1)
    a = np.array([0.99, 0.8, 0.5, 0.1], np.float32)
    rule = SignalRule(mixture)
    moved = rule.update(rule.mix(x_zero, noise, a), x_zero, a, a / 3)
    np.testing.assert_allclose(moved, rule.mix(x_zero, noise, a / 3), atol=2e-6)


def test_update_a_on_the_variance_preserving_mixture_shows_too_little_of_x_zero():
    # The original's first step: 0.445 of x_0 at level 0.757, where training had 0.654.
    a, next_a = (jnp.full((1,), level) for level in get_noise_levels(70)[:2])
    x_zero, no_noise = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    trained = SignalRule("variance_preserving")
    seen = SignalRule("convex").update(trained.mix(x_zero, no_noise, a), x_zero, a, next_a)
    np.testing.assert_allclose(next_a, 0.757, atol=5e-4)
    np.testing.assert_allclose(seen.item(), 0.445, atol=5e-4)
    np.testing.assert_allclose(trained.signal_levels(next_a), 0.654, atol=5e-4)


@pytest.mark.parametrize("max_angle", [1.0, np.pi / 2])
def test_half_normal_noise_levels_follow_their_law(max_angle):
    levels = ForwardProcess(max_angle=max_angle).sample_noise_levels(jax.random.key(0), 100_000)

    def cdf(a):  # of sin(max_angle |z| / 3), z ~ N(0, 1) within +-3
        return erf(3 * np.arcsin(a) / max_angle / np.sqrt(2)) / erf(3 / np.sqrt(2))

    assert kstest(np.asarray(levels, np.float64), cdf).pvalue > 0.01
    median = np.sin(max_angle * norm.ppf(0.5 + erf(3 / np.sqrt(2)) / 4) / 3)
    np.testing.assert_allclose(np.median(levels), median, atol=3e-3)


def test_uniform_noise_levels_follow_their_law():
    process = ForwardProcess(noise_law="uniform", max_angle=1.2)
    levels = jax.jit(process.sample_noise_levels, static_argnums=1)(jax.random.key(1), 100_000)
    assert kstest(np.asarray(levels, np.float64), lambda a: np.arcsin(a) / 1.2).pvalue > 0.01


@pytest.mark.parametrize("mixture", MIXTURES)
def test_log_normal_noise_to_signal_ratios_follow_their_law(mixture):
    process = get_process(mixture, "log_normal", 1.0, p_mean=-0.5, p_std=1.5)
    levels = jax.jit(process.sample_noise_levels, static_argnums=1)(jax.random.key(1), 100_000)
    a = np.asarray(levels, np.float64)
    assert 0 < a.min() and np.sin(1) < a.max() <= 1
    a = a[a < 0.999]  # Float32 has few digits left beyond, of what is missing to 1.
    highest = norm.cdf((np.log(0.999 / signal_levels(mixture, 0.999)) + 0.5) / 1.5)

    def cdf(a):  # of ln(a / g) from N(-0.5, 1.5^2), as far as 0.999
        return norm.cdf((np.log(a / signal_levels(mixture, a)) + 0.5) / 1.5) / highest

    assert kstest(a, cdf).pvalue > 0.01


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_velocity_is_the_derivative_of_the_mixture(mixture):
    # By the angle where variance is preserved, a = sin(angle), and by a where it is convex.
    x_zero, noise = draw((2, 5, 2, 2, 3), seed=1).astype(np.float64)
    time = np.array([0.02, 0.3, 0.7, 1.1, 1.5]) / (1.6 if mixture == "convex" else 1)

    def mix(time):
        a = time if mixture == "convex" else np.sin(time)
        g = signal_levels(mixture, a)
        return a[:, None, None, None] * noise + g[:, None, None, None] * x_zero

    expected = (mix(time + 1e-5) - mix(time - 1e-5)) / 2e-5
    a = np.float32(time if mixture == "convex" else np.sin(time))
    velocity = jax.jit(SignalRule(mixture).get_velocity)(np.float32(x_zero), np.float32(noise), a)
    np.testing.assert_allclose(velocity, expected, atol=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_target_leads_back_to_x_zero_at_every_level(mixture):
    x_zero, noise = draw((2, 5, 4, 4, 3))
    a = np.array([0.0, 0.1, 0.5, 0.9, 1.0], np.float32)
    for target in ("x_zero", "velocity"):
        process = get_process(mixture, "uniform", 1.5, target=target)
        x_t, wanted = process.rule.mix(x_zero, noise, a), process.get_target(x_zero, noise, a)
        assert np.array_equal(wanted, x_zero) == (target == "x_zero")
        found = jax.jit(process.get_x_zero)(x_t, wanted, a)
        np.testing.assert_allclose(found, x_zero, atol=1e-6)


@pytest.mark.parametrize("law", ["half_normal", "uniform"])
def test_noise_levels_lie_between_zero_and_the_sine_of_the_largest_angle(law):
    levels = ForwardProcess(noise_law=law).sample_noise_levels(jax.random.key(2), 200_000)
    assert levels.shape == (200_000,)
    assert 0 <= levels.min() < 1e-3
    assert 0.99 * np.sin(1) < levels.max() < np.sin(1)


def test_add_noise_mixes_standard_noise_at_the_levels_it_returns():
    x_zero = np.random.default_rng(0).uniform(-1, 1, (512, 4, 4, 4)).astype(np.float32)
    x_t, a = add_noise(jax.random.key(3), x_zero)
    a = np.asarray(a, np.float64)[:, None, None, None]
    assert a.max() < np.sin(1)
    noise = ((x_t - np.sqrt(1 - a**2) * x_zero) / a)[a.ravel() > 0.05]
    assert kstest(noise.ravel(), "norm").pvalue > 0.01
    covariance = np.cov(noise.reshape(len(noise), -1).T)  # Each number has its own noise.
    np.testing.assert_allclose(covariance, np.eye(64), atol=0.25)


def test_add_noise_uses_the_mixture_of_its_process():
    x_zero = np.ones((64, 2, 2, 1), np.float32)
    process = get_process("convex", "uniform", 1.5)
    assert process == ForwardProcess(SignalRule("convex"), "uniform", 1.5)
    x_t, a = add_noise(jax.random.key(4), x_zero, process)
    noise, _ = add_noise(jax.random.key(4), np.zeros_like(x_zero), process)  # The same draws.
    np.testing.assert_allclose((x_t - noise)[:, 0, 0, 0], 1 - a, atol=1e-6)
    assert a.max() > np.sin(1)


def test_add_noise_is_a_function_of_its_key_and_jits():
    x_zero = draw((8, 2, 2, 4))
    x_t, a = add_noise(jax.random.key(5), x_zero)
    again, same_a = jax.jit(add_noise)(jax.random.key(5), x_zero)
    np.testing.assert_allclose(again, x_t, atol=1e-6)
    np.testing.assert_allclose(same_a, a, atol=1e-6)
    other, other_a = add_noise(jax.random.key(6), x_zero)
    assert not np.any(other == x_t) and not np.any(other_a == a)


def test_add_noise_requires_four_axes():
    with pytest.raises(ValueError, match=r"4 axes.*got shape \(2, 8, 4\)"):
        add_noise(jax.random.key(0), jnp.zeros((2, 8, 4)))


@pytest.mark.parametrize(
    "create, message",
    [
        (lambda: SignalRule("linear"), "mixture must be one of .*got 'linear'"),
        (lambda: ForwardProcess(noise_law="normal"), "noise_law must be one of .*got 'normal'"),
        (lambda: ForwardProcess(max_angle=0.0), r"max_angle must lie in \(0, pi/2\], got 0.0"),
        (lambda: get_process("convex", "uniform", 1.6), "max_angle must lie in .*got 1.6"),
        (lambda: ForwardProcess(p_std=0.0), "p_std must be positive and finite, got 0.0"),
        (lambda: ForwardProcess(p_mean=np.nan), "p_mean must be a finite number, got nan"),
        (lambda: ForwardProcess(target="noise"), "target must be one of .*got 'noise'"),
    ],
)
def test_unknown_names_and_angles_are_refused(create, message):
    with pytest.raises(ValueError, match=message):
        create()
