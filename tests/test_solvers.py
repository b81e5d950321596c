"""Each method walks as its equations say; on Gaussian data the exact walk is known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ldm_jax import solvers
from ldm_jax.guidance import drop_style, guide
from ldm_jax.noising import SignalRule
from ldm_jax.sampler import (
    Diffuser,
    dynamic_thresholding,
    get_diffuser,
    get_picture_keys,
    sample_seeds,
)
from ldm_jax.schedules import SCHEDULES, get_noise_levels

SHAPE = (4, 4, 2)
MEAN, SPREAD = 0.3, 0.5  # Of the data, N(MEAN, SPREAD^2).
RULES = [SignalRule("variance_preserving"), SignalRule("convex")]


def estimate_exactly(rule):
    """E[x_0 | x_t] for Gaussian data: regression of x_0 on x_t."""

    def estimate(x_t, level):
        g = rule.signal_levels(level)
        gain = g * SPREAD**2 / (g**2 * SPREAD**2 + level**2)
        return MEAN + gain * (x_t - g * MEAN)

    return estimate


def solve_exactly(rule, x_t, levels):
    """The last estimate; dy/dr is solved by y - MEAN that grows as sqrt(SPREAD^2 + r^2)."""
    first, last = levels[0], levels[-2]
    ratio = lambda a: a / rule.signal_levels(a)  # noqa: E731
    y = MEAN + (x_t / rule.signal_levels(first) - MEAN) * np.sqrt(
        (SPREAD**2 + ratio(last) ** 2) / (SPREAD**2 + ratio(first) ** 2)
    )
    return estimate_exactly(rule)(rule.signal_levels(last) * y, last)


def get_error(method, rule, steps):
    levels = jnp.sin(jnp.linspace(1.3, 0.1, steps + 2))  # The last one is not visited.
    x_t = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)))
    found = jax.jit(lambda x: solvers.walk(method, estimate_exactly(rule), rule, x, levels))(x_t)
    return float(jnp.abs(found - solve_exactly(rule, x_t, levels)).max())


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.mixture)
@pytest.mark.parametrize("method, order", [("ddim", 1), ("heun", 2), ("dpm_solver_pp_2m", 2)])
def test_method_converges_with_its_order(double_precision, method, order, rule):
    errors = [get_error(method, rule, steps) for steps in (160, 320, 640)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, order, atol=0.15)


def test_higher_order_needs_fewer_steps(double_precision):
    errors = {m: get_error(m, RULES[0], 20) for m in ("ddim", "heun", "dpm_solver_pp_2m")}
    assert errors["heun"] < errors["dpm_solver_pp_2m"] < errors["ddim"] / 5


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_walk_equals_a_loop_in_numpy(double_precision, method):
    """The loop is algorithm 1 of Karras et al. 2022, without its second slope for DDIM."""
    rule = RULES[0]
    levels = get_noise_levels(9, "karras").astype(np.float64)
    estimate, x_t = estimate_exactly(rule), np.random.default_rng(1).normal(size=(2, *SHAPE))
    ratios = levels / np.sqrt(1 - levels**2)
    g = np.sqrt(1 - levels**2)
    y = x_t / g[0]
    for i in range(7):
        slope = (y - np.asarray(estimate(g[i] * y, levels[i]))) / ratios[i]
        ahead = y + (ratios[i + 1] - ratios[i]) * slope
        if method == "heun":
            there = np.asarray(estimate(g[i + 1] * ahead, levels[i + 1]))
            slope = (slope + (ahead - there) / ratios[i + 1]) / 2
        y = y + (ratios[i + 1] - ratios[i]) * slope
    expected = estimate(g[7] * y, levels[7])
    found = solvers.walk(method, estimate, rule, jnp.asarray(x_t), jnp.asarray(levels))
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_ancestral_steps_keep_the_distribution_of_the_data(double_precision):
    """With the exact estimate each step leads from the marginal of one level to that of the next;
    the last estimate is E[x_0 | x_t], of which the variance is known.
    """
    rule, n = RULES[0], 4000
    levels = jnp.sin(jnp.linspace(1.5, 0.2, 60))
    keys = get_picture_keys(range(n))
    x_t = jnp.asarray(np.random.default_rng(2).normal(size=(n, *SHAPE)))
    walk = jax.jit(
        lambda x: solvers.walk(
            "euler_ancestral", estimate_exactly(rule), rule, x, levels, keys=keys
        )
    )
    found = walk(x_t)
    ratio = float(levels[-2] / rule.signal_levels(levels[-2]))
    variance = SPREAD**4 / (SPREAD**2 + ratio**2)
    assert abs(float(found.mean()) - MEAN) < 0.01
    np.testing.assert_allclose(float(found.std()), np.sqrt(variance), rtol=0.05)


def test_noise_on_the_way_belongs_to_the_picture():
    def draw(picture_seeds):
        seeds, keys = sample_seeds(picture_seeds, SHAPE), get_picture_keys(picture_seeds)
        diffuser = get_diffuser(Partial(halve), method="euler_ancestral", diffusion_steps=6)
        labels = jnp.ones((len(picture_seeds), 12))
        return diffuser.reverse_diffusion(seeds, labels, keys=keys)

    np.testing.assert_allclose(draw([5, 6, 7])[1:2], draw([6]), atol=1e-6)
    assert float(jnp.abs(draw([5]) - draw([6])).max()) > 0.01


def test_levels_that_rise_at_the_end_leave_the_ancestral_walk_its_numbers():
    levels = jnp.asarray(get_noise_levels(70))  # The original's: 0.0096, 0.01.
    x_t, keys = jnp.ones((1, 2, 2, 1)), get_picture_keys([0])
    with jax.debug_nans(True):
        x_zero = solvers.walk(
            "euler_ancestral", lambda x, level: x / 2, SignalRule("convex"), x_t, levels, keys=keys
        )
    assert np.isfinite(x_zero).all()


def test_eta_leads_from_ddim_to_euler_ancestral():
    seeds, keys = sample_seeds([1, 2], SHAPE), get_picture_keys([1, 2])
    labels = jnp.ones((2, 12))

    def draw(**settings):
        diffuser = get_diffuser(Partial(halve), diffusion_steps=6, **settings)
        return diffuser.reverse_diffusion(seeds, labels, keys=keys)

    ancestral = draw(method="euler_ancestral")
    np.testing.assert_allclose(draw(method="ddim", eta=1.0), ancestral, atol=1e-6)
    np.testing.assert_allclose(draw(method="ddim", eta=1e-6), draw(method="ddim"), atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_fall_to_the_last(schedule):
    levels = get_noise_levels(12, schedule)
    assert levels.dtype == np.float32 and len(levels) == 12
    assert np.all(np.diff(levels) < 0) and levels[-1] == np.float32(0.01)


def test_karras_levels_equal_their_equation():
    ratios = np.tan(np.arcsin(get_noise_levels(10, "karras").astype(np.float64)))
    high, low = np.tan(np.arcsin(0.999)), np.tan(np.arcsin(0.01))
    i = np.arange(10) / 9
    expected = (high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    np.testing.assert_allclose(ratios, expected, rtol=1e-4)


def halve(x_t, noise_levels, labels):
    """A denoiser that looks at its latents and at the first number of its label."""
    return 0.5 * x_t + 0.1 * labels[:, :1, None, None]


def draw_pair():
    rng = np.random.default_rng(3)
    return (jnp.asarray(rng.normal(size=(3, *SHAPE)) * s, jnp.float32) for s in (0.4, 0.7))


def test_guide_equals_its_equations():
    preferred, other = (np.asarray(x) for x in draw_pair())
    guided = 3 * preferred - 2 * other
    np.testing.assert_allclose(guide(preferred, other, 3.0), guided, rtol=1e-5)
    for i in range(3):  # Lin et al. 2024, eq. 15 and 16, in numpy, picture by picture.
        rescaled = guided[i] * preferred[i].std() / guided[i].std()
        expected = 0.7 * rescaled + 0.3 * guided[i]
        found = guide(preferred, other, 3.0, 0.7)[i]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def halve_by_parts(x_t, noise_levels, labels):
    """Half of x_t, and the means of both halves of the text, the second ten times."""
    name, style = (jnp.mean(part, -1)[:, None, None, None] for part in jnp.split(labels, 2, -1))
    return 0.5 * x_t + name + 10 * style


def test_name_and_style_are_guided_apart():
    x_t = sample_seeds([1, 2], SHAPE) / 4
    labels = jnp.concatenate([jnp.full((2, 6), 0.01), jnp.full((2, 6), 0.002)], -1)
    diffuser = get_diffuser(Partial(halve_by_parts), class_guidance=3.0, style_guidance=5.0)
    found = diffuser.predict_x_zero(x_t, labels, 0.4)
    np.testing.assert_allclose(found, 0.5 * x_t + 3 * 0.01 + 5 * 0.02, atol=1e-6)
    away = diffuser.predict_x_zero(x_t, labels, 0.4, negative_labels=-labels)
    none = -0.01 - 0.02
    np.testing.assert_allclose(away, 0.5 * x_t + none + 3 * (0.01 - none) + 5 * 0.02, atol=1e-6)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_equal_weights_are_plain_guidance(rescale):
    x_t, labels = sample_seeds([1, 2], SHAPE), 0.1 * jnp.arange(24.0).reshape(2, 12)
    settings = dict(class_guidance=3.0, guidance_rescale=rescale, guidance_interval=(0.2, 0.6))
    for level in (0.1, 0.4):
        apart, plain = (
            get_diffuser(Partial(halve_by_parts), **settings, **more).predict_x_zero(
                x_t, labels, level
            )
            for more in ({"style_guidance": 3.0}, {})
        )
        np.testing.assert_allclose(apart, plain, atol=1e-5)


def test_guidance_counts_inside_its_interval_alone():
    x_t, labels = sample_seeds([1, 2], SHAPE) / 4, jnp.ones((2, 12))
    diffuser = get_diffuser(Partial(halve), class_guidance=3.0, guidance_interval=(0.2, 0.6))
    guided, plain = 0.5 * x_t + 0.3, 0.5 * x_t + 0.1
    for level, expected in ((0.1, plain), (0.4, guided), (0.8, plain)):
        found = diffuser.predict_x_zero(x_t, labels, level)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_negative_labels_stand_in_for_no_text():
    x_t, labels = sample_seeds([1, 2], SHAPE) / 4, jnp.ones((2, 12))
    diffuser = get_diffuser(Partial(halve), class_guidance=3.0)
    found = diffuser.predict_x_zero(x_t, labels, 0.4, negative_labels=2 * labels)
    np.testing.assert_allclose(found, 0.5 * x_t + 3 * 0.1 - 2 * 0.2, atol=1e-6)


def test_autoguidance_leads_away_from_the_guide():
    x_t, labels = sample_seeds([1, 2], SHAPE) / 4, jnp.ones((2, 12))
    weaker = Partial(lambda x, a, text: 0.4 * x)
    diffuser = get_diffuser(Partial(halve), class_guidance=2.0, guide=weaker)
    found = diffuser.predict_x_zero(x_t, labels, 0.4)
    np.testing.assert_allclose(found, 2 * (0.5 * x_t + 0.1) - 0.4 * x_t, atol=1e-6)
    with pytest.raises(ValueError, match="negative labels do not go with a guide"):
        diffuser.predict_x_zero(x_t, labels, 0.4, negative_labels=labels)


def test_style_is_weighed_beside_autoguidance():
    x_t, labels = sample_seeds([1, 2], SHAPE), 0.1 * jnp.arange(24.0).reshape(2, 12)
    weaker = Partial(lambda x, a, text: 0.4 * halve_by_parts(x, a, text))
    whole, styleless = (halve_by_parts(x_t, 0.4, text) for text in (labels, drop_style(labels)))
    options = dict(class_guidance=2.0, guide=weaker, perc=100.0)
    for style, rescale in ((3.0, 0.0), (1.0, 0.0), (2.5, 0.7)):
        expected = 2 * whole - 0.4 * whole + (style - 1) * (whole - styleless)
        spread = [x.std((1, 2, 3), keepdims=True) for x in (whole, expected)]
        expected *= rescale * spread[0] / spread[1] + 1 - rescale
        settings = dict(style_guidance=style, guidance_rescale=rescale)
        found = get_diffuser(Partial(halve_by_parts), **options, **settings).predict_x_zero(
            x_t, labels, 0.4
        )
        np.testing.assert_allclose(found, dynamic_thresholding(expected, 100.0), atol=1e-5)


def test_new_guidance_never_retraces():
    sample = jax.jit(chex.assert_max_traces(Diffuser.predict_x_zero, n=1))
    x_t, labels = sample_seeds([1, 2], SHAPE), jnp.ones((2, 12))
    kinds = [dict(), dict(guidance_rescale=0.7), dict(guidance_interval=(0.1, 0.5)), dict()]
    for w, settings in zip((1.0, 4.0, 7.0, 2.0), kinds):
        diffuser = get_diffuser(Partial(halve), class_guidance=w, **settings)
        sample(diffuser, x_t, labels, jnp.float32(0.3))
    chex.clear_trace_counter()
    sample = jax.jit(chex.assert_max_traces(Diffuser.predict_x_zero, n=1))
    for w_style in (1.0, 5.0):
        diffuser = get_diffuser(Partial(halve), style_guidance=w_style)
        sample(diffuser, x_t, labels, jnp.float32(0.3))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "euler"}, "method must be one of"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"eta": 0.5, "method": "heun"}, "eta belongs to the method 'ddim'"),
        ({"guidance_rescale": -1}, r"guidance_rescale must lie in \[0, 1\], got -1"),
        ({"guidance_interval": (0.5, 0.2)}, "0 <= low <= high <= 1"),
        ({"style_guidance": float("nan")}, "style_guidance must be a finite number, got nan"),
        ({"schedule": "cosine"}, "schedule must be one of"),
    ],
)
def test_wrong_settings_say_what_was_needed(settings, message):
    with pytest.raises(ValueError, match=message):
        get_diffuser(Partial(halve), **settings)


def test_missing_keys_are_asked_for():
    diffuser = get_diffuser(Partial(halve), method="euler_ancestral", diffusion_steps=4)
    with pytest.raises(ValueError, match="draws noise and needs keys"):
        diffuser.reverse_diffusion(sample_seeds([1], SHAPE), jnp.ones((1, 12)))


def test_levels_are_the_most_that_a_number_of_evaluations_allows():
    for method in solvers.METHODS:
        for evaluations in range(1, 20):
            levels = solvers.count_levels(method, evaluations)
            assert levels >= 2 and solvers.count_evaluations(method, levels) <= evaluations
            assert solvers.count_evaluations(method, levels + 1) > evaluations
    assert solvers.count_evaluations("ddim", 70) == 69
    assert solvers.count_evaluations("heun", 70) == 137
    with pytest.raises(ValueError, match="evaluations must be at least 1, got 0"):
        solvers.count_levels("ddim", 0)
    with pytest.raises(ValueError, match="method must be one of"):
        solvers.count_evaluations("euler", 70)
