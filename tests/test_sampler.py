"""Reverse diffusion against numpy loops, and what a picture may depend on."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ldm_jax import graphs
from ldm_jax.noising import SignalRule
from ldm_jax.sampler import (
    Denoiser,
    Diffuser,
    dynamic_thresholding,
    get_diffuser,
    get_noise_levels,
    sample_seeds,
)
from ldm_jax.unet import get_network

SHAPE = (8, 8, 4)


def draw(*shape, seed=0, spread=1.0):
    return spread * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear_denoiser(scale, x_t, noise_levels, labels):
    """An estimate that depends on all its inputs, and often leaves [-1, 1]."""
    text = labels.mean(axis=-1)[:, None, None, None]
    return scale * x_t * (1 - noise_levels[:, None, None, None]) + 0.2 * text


def level_denoiser(x_t, noise_levels, labels):
    """Says which level it was given."""
    return jnp.broadcast_to(noise_levels[:, None, None, None], x_t.shape)


def threshold(x, perc=99.5):
    for i in range(len(x)):
        s = max(np.percentile(np.abs(x[i]), perc), 1)
        x[i] = np.clip(x[i], -s, s) / s
    return x


def test_the_schedule_has_the_originals_70_levels():
    levels = get_noise_levels(70)
    expected = [1 - (1e-4 + i / 70) ** (1 / 3) for i in range(70)]
    expected[-1] = 0.01
    assert levels.dtype == np.float32
    np.testing.assert_allclose(levels, expected, rtol=1e-6)
    np.testing.assert_allclose(levels[[0, 1, -1]], [0.9536, 0.7568, 0.01], atol=5e-5)


@pytest.mark.parametrize("steps", [2, 10, 70])
def test_both_schedules_have_as_many_levels_as_steps(steps):
    for schedule in ("cube_root", "angle"):
        levels = get_noise_levels(steps, schedule)
        assert len(levels) == steps and levels[-1] == np.float32(0.01)
        assert np.all(np.diff(levels[:-1]) < 0) and 0 < levels.min() < levels.max() < 1


def test_the_angle_schedule_has_equal_steps_of_the_angle():
    angles = np.arcsin(get_noise_levels(9, "angle").astype(np.float64))
    np.testing.assert_allclose(np.sin(angles[[0, -1]]), [0.999, 0.01], rtol=1e-6)
    np.testing.assert_allclose(np.diff(angles), (angles[-1] - angles[0]) / 8, atol=1e-5)


@pytest.mark.parametrize("perc", [90.0, 99.5, 99.75])
def test_thresholding_takes_the_percentile_of_each_sample(perc):
    x = draw(5, 8, 8, 4) * np.array([0.1, 1, 2, 5, 50], np.float32)[:, None, None, None]
    expected = threshold(x.astype(np.float64).copy(), perc)
    np.testing.assert_allclose(dynamic_thresholding(x, perc), expected, rtol=1e-5)
    jitted = jax.jit(dynamic_thresholding, static_argnums=1)(x, perc)
    np.testing.assert_allclose(jitted, expected, rtol=1e-5)


def test_thresholding_leaves_samples_within_one_alone():
    x = np.clip(draw(3, 8, 8, 4), -1, 1)
    np.testing.assert_array_equal(dynamic_thresholding(x), x)


def test_seeds_alone_and_among_others_are_the_same_bits():
    for shape in (SHAPE, (3, 5, 1)):
        many = sample_seeds(range(100, 164), shape)
        for i in (0, 1, 37, 63):
            np.testing.assert_array_equal(sample_seeds([100 + i], shape)[0], many[i])
        np.testing.assert_array_equal(sample_seeds([163, 100], shape), many[jnp.array([63, 0])])


def test_seeds_are_standard_normal_and_unrelated():
    seeds = np.asarray(sample_seeds(np.arange(200), (16, 16, 4))).reshape(200, -1)
    np.testing.assert_allclose([seeds.mean(), seeds.std()], [0, 1], atol=0.01)
    assert np.abs(np.corrcoef(seeds) - np.eye(200)).max() < 0.2
    assert np.all(np.isfinite(sample_seeds([0, 2**32 - 1], SHAPE)))


@pytest.mark.parametrize(
    "picture_seeds, message",
    [
        ([-1], r"seed must lie in \[0, 2\^32\), got \[-1\]"),
        ([2**32], r"seed must lie in \[0, 2\^32\), got \[4294967296\]"),
        ([0.5], "must be a sequence of integers"),
        ([], "must be a sequence of integers"),
        (3, "must be a sequence of integers, got 3"),
    ],
)
def test_seeds_out_of_range_are_refused(picture_seeds, message):
    with pytest.raises(ValueError, match=message):
        sample_seeds(picture_seeds, SHAPE)


@pytest.mark.parametrize("w", [0.0, 1.0, 4.0])
def test_predict_x_zero_guides_and_thresholds(w):
    x_t, labels = draw(3, *SHAPE), draw(3, 12, spread=3)
    diffuser = Diffuser(Partial(linear_denoiser, 2.0), class_guidance=w)
    level = np.full(3, 0.3)
    with_text = linear_denoiser(2.0, x_t.astype(np.float64), level, labels)
    without = linear_denoiser(2.0, x_t.astype(np.float64), level, 0 * labels)
    expected = threshold(w * with_text + (1 - w) * without)
    np.testing.assert_allclose(diffuser.predict_x_zero(x_t, labels, 0.3), expected, atol=1e-5)
    jitted = jax.jit(Diffuser.predict_x_zero)(diffuser, x_t, labels, jnp.float32(0.3))
    np.testing.assert_allclose(jitted, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(12,), (5, 12)])
def test_predict_x_zero_asks_once_for_text_and_for_zeros(shape):
    calls = []

    def denoiser(x_t, noise_levels, labels):
        calls.append((x_t, noise_levels, labels))
        return x_t

    x_t, labels = draw(3, *SHAPE), draw(3, *shape)
    Diffuser(denoiser).predict_x_zero(x_t, labels, 0.7)
    ((both_x_t, noise_levels, both_labels),) = calls
    np.testing.assert_array_equal(both_x_t, np.concatenate([x_t, x_t]))
    np.testing.assert_array_equal(noise_levels, np.full(6, 0.7, np.float32))
    np.testing.assert_array_equal(both_labels, np.concatenate([labels, 0 * labels]))


@pytest.mark.parametrize("mixture", ["convex", "variance_preserving"])
def test_reverse_diffusion_equals_a_loop_in_numpy(mixture):
    seeds, labels = draw(2, *SHAPE), draw(2, 12, seed=1)
    levels = np.asarray(get_noise_levels(70), np.float64)
    x_t = seeds.astype(np.float64)
    for a, next_a in zip(levels[:-1], levels[1:]):
        level = np.full(2, a)
        with_text = linear_denoiser(1.5, x_t, level, labels)
        x_zero = threshold(4 * with_text - 3 * linear_denoiser(1.5, x_t, level, 0 * labels))
        if mixture == "convex":  # Update A of the original, then update B.
            x_t = ((a - next_a) * x_zero + next_a * x_t) / a
        else:
            g, next_g = np.sqrt(1 - a**2), np.sqrt(1 - next_a**2)
            x_t = next_a / a * x_t + (next_g - next_a * g / a) * x_zero
    diffuser = get_diffuser(Partial(linear_denoiser, 1.5), mixture=mixture)
    assert diffuser.rule == SignalRule(mixture)
    latents = diffuser.reverse_diffusion(seeds, labels)
    assert np.std(x_zero) > 0.1
    np.testing.assert_allclose(latents, x_zero, atol=2e-4)


def test_the_last_estimate_is_the_result_and_the_last_level_is_never_shown():
    shown = []

    def denoiser(x_t, noise_levels, labels):
        jax.debug.callback(lambda levels: shown.append(set(levels.tolist())), noise_levels)
        return level_denoiser(x_t, noise_levels, labels)

    diffuser = Diffuser(Partial(denoiser), diffusion_steps=20)
    latents = diffuser.reverse_diffusion(draw(2, *SHAPE), draw(2, 12))
    jax.effects_barrier()
    levels = get_noise_levels(20)
    assert sorted(shown, key=min, reverse=True) == [{level} for level in levels[:-1].tolist()]
    np.testing.assert_allclose(latents, np.full((2, *SHAPE), levels[-2]), rtol=1e-5)


def test_the_defaults_are_the_originals():
    for diffuser in (Diffuser(level_denoiser), get_diffuser(level_denoiser)):
        settings = dataclasses.asdict(dataclasses.replace(diffuser, denoiser=None))
        assert settings == {
            "denoiser": None,
            "class_guidance": 4.0,
            "diffusion_steps": 70,
            "rule": {"mixture": "convex"},
            "schedule": "cube_root",
            "perc": 99.5,
            "method": "ddim",
            "eta": 0.0,
            "guidance_interval": (0.0, 1.0),
            "guidance_rescale": 0.0,
            "style_guidance": None,
            "guide": None,
        }


class SmallNetwork:
    """A network, whose weights are functions of a seed."""

    def __init__(self):
        self.fields = {"block_depth": 1, "emb_size": 12, "widths": (16, 32), "norm": "group"}
        self.network = get_network(8, **self.fields)
        inputs = jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros((1, 12))
        self.shapes = jax.eval_shape(self.network.init, jax.random.key(0), *inputs)

    def variables(self, seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda x: np.float32(rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1]))),
            self.shapes,
        )

    def diffuser(self, seed=0, **settings):
        network = get_network(8, **self.fields)  # A new object with equal fields.
        denoiser = Denoiser(network, self.variables(seed))
        return get_diffuser(denoiser, **{"diffusion_steps": 12, **settings})


@pytest.fixture(scope="module")
def small():
    return SmallNetwork()


def test_new_weights_guidance_seeds_and_prompts_never_retrace(small):
    predict = jax.jit(chex.assert_max_traces(Diffuser.predict_x_zero, n=1))
    prompts = draw(3, 1, 12)
    results = [
        predict(small.diffuser(i, class_guidance=w), sample_seeds([i], SHAPE), prompts[i], a)
        for i, w, a in [(0, 4.0, 0.5), (1, 1.5, 0.9), (2, 0.0, 0.1)]
    ]
    assert np.abs(results[0] - results[1]).max() > 1e-2
    with pytest.raises(AssertionError, match="traced > 1 times"):  # Other steps do.
        predict(small.diffuser(diffusion_steps=13), sample_seeds([0], SHAPE), draw(1, 12), 0.5)


def test_the_whole_loop_traces_its_denoiser_once():
    traced = []

    def denoiser(weights, x_t, noise_levels, labels):
        traced.append(x_t.shape)
        return linear_denoiser(weights, x_t, noise_levels, labels)

    for weights, w in [(1.0, 4.0), (2.0, 2.0), (0.5, 0.0)]:
        diffuser = Diffuser(Partial(denoiser, jnp.float32(weights)), w, 5)
        diffuser.reverse_diffusion(draw(2, *SHAPE), draw(2, 12))
    assert traced == [(4, *SHAPE)]


@pytest.fixture
def options(monkeypatch):
    """Compiler options of every device, to be changed."""
    options = {graphs.FLAG: graphs.RECORDED}  # A CPU's compiler knows it as well.
    monkeypatch.setattr(graphs, "get_options", lambda device: options)
    return options


def test_the_loop_is_compiled_with_the_options_for_graphs_once(small, options, caplog):
    def draw_one(i, w):
        seeds, labels = sample_seeds([i], SHAPE), draw(1, 12, seed=i)
        return small.diffuser(i, class_guidance=w, diffusion_steps=6).reverse_diffusion(
            seeds, labels
        )

    with jax.log_compiles():
        for i, w in enumerate([4.0, 1.5, 0.0]):
            draw_one(i, w)
    compiled = [m for m in caplog.messages if "XLA compilation of jit(reverse_diffusion)" in m]
    assert len(compiled) == 1
    options["xla_wish"] = True
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_wish"):
        draw_one(0, 4.0)
    lowered = Diffuser.reverse_diffusion.lower(small.diffuser(), draw(1, *SHAPE), draw(1, 12))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_wish"):
        lowered.compile()


def test_the_loop_inside_jit_is_the_loop_outside(small, options):
    diffuser, seeds, labels = small.diffuser(), sample_seeds([0, 1], SHAPE), draw(2, 12)
    expected = diffuser.reverse_diffusion(seeds, labels)
    inside = [
        jax.jit(Diffuser.reverse_diffusion)(diffuser, seeds, labels),
        jax.jit(lambda: diffuser.reverse_diffusion(seeds, labels))(),
        jax.vmap(diffuser.reverse_diffusion)(seeds[None], labels[None])[0],
    ]
    assert np.std(expected) > 0.1
    for latents in inside:
        np.testing.assert_allclose(latents, expected, atol=2e-5)


def test_picture_i_of_64_is_the_picture_drawn_alone(small):
    diffuser = small.diffuser()
    labels = draw(64, 12)
    picture_seeds = np.arange(64) + 1000
    many = diffuser.reverse_diffusion(sample_seeds(picture_seeds, SHAPE), labels)
    assert np.std(many) > 0.1 and np.abs(many).max() < 1 + 1e-6
    for i in (0, 17, 63):
        seeds = sample_seeds(picture_seeds[[i]], SHAPE)
        alone = diffuser.reverse_diffusion(seeds, labels[i : i + 1])
        np.testing.assert_allclose(alone[0], many[i], atol=2e-5)


def test_another_seed_or_prompt_gives_another_picture(small):
    sample = small.diffuser().reverse_diffusion
    first = sample(sample_seeds([0], SHAPE), draw(1, 12))
    np.testing.assert_array_equal(sample(sample_seeds([0], SHAPE), draw(1, 12)), first)
    assert np.abs(sample(sample_seeds([1], SHAPE), draw(1, 12)) - first).mean() > 2e-3
    assert np.abs(sample(sample_seeds([0], SHAPE), draw(1, 12, seed=1)) - first).mean() > 2e-3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"class_guidance": float("nan")}, "class_guidance must be a finite number, got nan"),
        ({"class_guidance": float("inf")}, "class_guidance must be a finite number, got inf"),
        ({"perc": 101.0}, r"perc must lie in \[0, 100\], got 101.0"),
        ({"diffusion_steps": 1}, "diffusion_steps must be at least 2, got 1"),
        ({"schedule": "cosine"}, "schedule must be one of .*got 'cosine'"),
        ({"mixture": "linear"}, "mixture must be one of .*got 'linear'"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_diffuser(level_denoiser, **settings)


def test_each_seed_needs_its_label():
    diffuser = Diffuser(Partial(level_denoiser))
    with pytest.raises(ValueError, match="got 2 seeds for 3 labels"):
        diffuser.reverse_diffusion(draw(2, *SHAPE), draw(3, 12))
