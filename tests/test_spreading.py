"""Drawing spread over eight devices, against drawing on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.timing import draw_weights
from ldm_jax.forecast import count_messages
from ldm_jax.sampler import Denoiser, get_diffuser, get_picture_keys, sample_seeds
from ldm_jax.sharding import batch_sharding, get_mesh, replicated
from ldm_jax.spreading import get_loop, spread
from ldm_jax.unet import get_network


@pytest.fixture(scope="module")
def denoiser():
    network = get_network(8, 1, 6, widths=(16, 32), text_features=16, norm="batch")
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 6))
    return Denoiser(network, draw_weights(jax.eval_shape(network.init, jax.random.key(0), *inputs)))


def draw_inputs(num):
    labels = np.random.default_rng(0).standard_normal((num, 6), np.float32)
    return np.asarray(sample_seeds(range(num), (8, 8, 4))), labels, get_picture_keys(range(num))


@pytest.mark.parametrize("num", [8, 11, 3, 1])
def test_pictures_of_eight_devices_are_those_of_one(denoiser, num):
    diffuser = get_diffuser(denoiser, diffusion_steps=5, eta=0.5)
    seeds, labels, keys = draw_inputs(num)
    negative = np.flip(labels, 1)
    expected = diffuser.reverse_diffusion(seeds, labels, negative, keys)
    latents = spread(diffuser, jax.devices())(seeds, labels, negative, keys)
    assert latents.shape == (num, 8, 8, 4) and np.std(latents) > 0.05
    np.testing.assert_allclose(latents, expected, atol=1e-4)
    without = spread(diffuser, jax.devices())(seeds, labels, keys=keys)
    np.testing.assert_allclose(
        without, diffuser.reverse_diffusion(seeds, labels, None, keys), atol=1e-4
    )
    assert np.abs(without - latents).max() > 1e-2


def test_devices_that_draw_say_nothing_to_each_other(denoiser):
    mesh = get_mesh("data")
    diffuser = jax.device_put(get_diffuser(denoiser, diffusion_steps=3), replicated(mesh))
    seeds, labels, _ = draw_inputs(8)
    arrays = jax.device_put((seeds, labels), batch_sharding(mesh))
    program = get_loop(mesh).lower(diffuser, *arrays, None, None).compile()
    assert count_messages(program.as_text()) == []


def test_a_guide_half_precision_and_weights_on_a_mesh(denoiser):
    seeds, labels, _ = draw_inputs(6)
    labels = labels.astype(np.float16)
    guide = jax.device_put(denoiser, replicated(get_mesh("data=2,fsdp=4")))
    diffuser = get_diffuser(denoiser, diffusion_steps=3, guide=guide)
    expected = get_diffuser(denoiser, diffusion_steps=3, guide=denoiser)
    np.testing.assert_allclose(
        spread(diffuser, jax.devices())(seeds, labels),
        expected.reverse_diffusion(seeds, labels),
        atol=1e-4,
    )


def test_on_a_cpu_one_device_draws(denoiser):
    # With weights on all of them, each would draw every picture.
    diffuser = get_diffuser(denoiser, diffusion_steps=3)
    placed = jax.device_put(diffuser, replicated(get_mesh("data")))
    seeds, labels, _ = draw_inputs(2)
    latents = spread(placed)(seeds, labels)
    assert latents.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(latents, diffuser.reverse_diffusion(seeds, labels))


def test_other_numbers_of_labels_than_seeds_are_refused(denoiser):
    seeds, labels, _ = draw_inputs(3)
    with pytest.raises(ValueError, match=r"got \[3, 2\] seeds, labels"):
        spread(get_diffuser(denoiser), jax.devices())(seeds, labels[:2])
