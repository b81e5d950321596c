"""The scale of the latents against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.latents import LatentScale, draw_latents, get_latent_scale

MANIFEST = {"std_latent": 5.0, "channel_mean": [1.0, -2.0, 0.5], "channel_std": [2.0, 0.5, 1.0]}


def draw(shape=(4, 3, 3, 3), spread=6.0):
    return spread * np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_the_global_scale_clips_to_std_latent_and_divides():
    latents = draw()
    expected = np.clip(latents, -5.0, 5.0) / 5.0
    scale = get_latent_scale(MANIFEST, "global", 2.5)
    np.testing.assert_allclose(scale.normalise(latents), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(scale.normalise)(latents), expected, rtol=1e-6)


def test_deviations_scale_the_global_number():
    # std_latent is 2.5 standard deviations, so that 3 of them are 6.
    assert get_latent_scale(MANIFEST, "global", 3.0).std_latent == pytest.approx(6.0)


def test_the_channel_scale_has_a_mean_and_a_width_for_each_channel():
    latents = draw()
    mean, std = np.array(MANIFEST["channel_mean"]), np.array(MANIFEST["channel_std"])
    expected = np.clip((latents - mean) / (3 * std), -1, 1)
    scale = get_latent_scale(MANIFEST, "channel", 3.0)
    np.testing.assert_allclose(scale.normalise(latents), expected, atol=1e-6)
    assert np.all(np.abs(scale.normalise(latents)) <= 1)


@pytest.mark.parametrize("normalisation", ["global", "channel"])
def test_restore_undoes_normalise_where_nothing_was_clipped(normalisation):
    latents = draw(spread=0.3)
    scale = get_latent_scale(MANIFEST, normalisation, 8.0)
    np.testing.assert_allclose(scale.restore(scale.normalise(latents)), latents, atol=1e-5)


def test_restore_gives_an_extreme_of_one_its_raw_value():
    ones = np.ones((1, 1, 1, 3), np.float32)
    scale = get_latent_scale(MANIFEST, "channel", 3.0)
    np.testing.assert_allclose(jax.jit(scale.restore)(ones).ravel(), [7.0, -0.5, 3.5], rtol=1e-6)
    scale = get_latent_scale(MANIFEST, "global", 2.5)
    np.testing.assert_allclose(scale.restore(ones).ravel(), [5.0, 5.0, 5.0], rtol=1e-6)


def test_a_scale_is_a_pytree_that_crosses_jit():
    scale = LatentScale(jnp.array([1.0, 2.0, 4.0]), jnp.zeros(3))
    restored = jax.jit(lambda s, x: s.restore(x))(scale, np.ones((1, 2, 2, 3), np.float32))
    np.testing.assert_array_equal(restored[0, 0, 0], [1.0, 2.0, 4.0])


def test_draw_latents_draws_from_the_posterior():
    shape = (2000, 2, 2, 3)
    mean = np.broadcast_to(np.array([0.0, 3.0, -1.0], np.float32), shape)
    std = np.broadcast_to(np.array([1.0, 0.1, 0.0], np.float32), shape)
    latents = np.asarray(jax.jit(draw_latents)(jax.random.key(0), mean, std))
    np.testing.assert_allclose(latents.mean((0, 1, 2)), [0.0, 3.0, -1.0], atol=0.04)
    np.testing.assert_allclose(latents.std((0, 1, 2)), [1.0, 0.1, 0.0], atol=0.03)
    other = draw_latents(jax.random.key(1), mean, std)
    assert not np.any(other[..., :2] == latents[..., :2])


def test_without_a_standard_deviation_the_mean_is_the_latent():
    mean = draw()
    np.testing.assert_array_equal(draw_latents(jax.random.key(0), mean, None), mean)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="must be 'global' or 'channel', got 'layer'"):
        get_latent_scale(MANIFEST, "layer", 2.5)


@pytest.mark.parametrize("deviations", [0.0, -1.0, float("inf"), float("nan")])
def test_a_number_of_deviations_that_cannot_divide_is_refused(deviations):
    with pytest.raises(ValueError, match=r"deviations must lie in \(0, inf\), got"):
        get_latent_scale(MANIFEST, "global", deviations)


def test_a_channel_that_never_varies_has_no_scale_of_its_own():
    manifest = MANIFEST | {"channel_std": [1.0, 0.0, 2.0]}
    with pytest.raises(ValueError, match=r"every channel .* must vary .* \[1.0, 0.0, 2.0\]"):
        get_latent_scale(manifest, "channel", 2.5)
