from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.initial import LONGEST, SHORTEST, lecun_normal, long_draws
from ldm_jax.training import create_train_state, get_optimizer
from ldm_jax.unet import get_network

KEY = partial(jax.random.key, 3)  # Keys are consumed: a new one for each use.
SMALL = {"latent_image_size": 8, "emb_size": 6, "widths": (32, 64), "text_features": 32}


def create_params(key, **fields):
    network = get_network(**SMALL | fields)
    create = lambda key: create_train_state(key, network, get_optimizer(steps=10), (8, 8, 4), (6,))  # noqa: E731
    return create, jax.device_get(jax.jit(create)(key).params)


@pytest.mark.parametrize("shape", [(5, 7), (3, 3, 8, 16), (1, 1, 4, 32)])
def test_a_kernel_drawn_by_its_key_is_linens(shape):
    expected = nn.initializers.lecun_normal()(KEY(), shape, jnp.float32)
    np.testing.assert_array_equal(lecun_normal(KEY(), shape), expected)


@pytest.mark.parametrize("fan_in", [9 * 32, 64])
def test_long_draws_follow_the_law(fan_in):
    with long_draws(KEY()):
        kernel = np.asarray(lecun_normal(KEY(), (fan_in, 1024)))
    deviations = fan_in**0.5 * kernel
    standard_error = kernel.size**-0.5
    assert abs(deviations.mean()) < 4 * standard_error
    assert abs(deviations.var() - 1) < 4 * 1.42 * standard_error
    # Cut off at two standard deviations of the normal law, which is not the truncated one's.
    assert 2.2 < np.abs(deviations).max() < 2.2738


def test_kernels_are_consecutive_parts_of_the_draws():
    shapes = [(100, 300), (2, 2, 30, 50), (SHORTEST, 3), (40, 40)]
    with long_draws(KEY()):
        kernels = [np.asarray(lecun_normal(KEY(), shape)) for shape in shapes]
    bare = [kernel * np.prod(kernel.shape[:-1]) ** 0.5 for kernel in kernels]
    lengths = [SHORTEST, max(4 * SHORTEST, 3 * SHORTEST)]
    scale = 0.87962566103423978
    draws = [
        jax.random.truncated_normal(jax.random.fold_in(KEY(), k), -2, 2, (length,)) / scale
        for k, length in enumerate(lengths)
    ]
    sizes = [kernel.size for kernel in kernels]
    np.testing.assert_allclose(bare[0].ravel(), draws[0][: sizes[0]], rtol=1e-5)
    np.testing.assert_allclose(bare[1].ravel(), draws[0][sizes[0] : sum(sizes[:2])], rtol=1e-5)
    np.testing.assert_allclose(bare[2].ravel(), draws[1][: sizes[2]], rtol=1e-5)
    np.testing.assert_allclose(bare[3].ravel(), draws[1][sizes[2] : sum(sizes[2:])], rtol=1e-5)


def test_a_kernel_longer_than_any_draw_has_one_of_its_own():
    def draw(key):
        with long_draws(key):
            return lecun_normal(key, (LONGEST // 4, 5))

    assert jax.eval_shape(draw, KEY()).shape == (LONGEST // 4, 5)


def test_keys_count_again_after_an_error_within():
    with pytest.raises(RuntimeError, match="stop"), long_draws(KEY()):
        lecun_normal(KEY(), (3, 3))
        raise RuntimeError("stop")
    expected = nn.initializers.lecun_normal()(KEY(), (3, 3), jnp.float32)
    np.testing.assert_array_equal(lecun_normal(KEY(), (3, 3)), expected)


@pytest.mark.parametrize("fields", [{}, {"conditioning": "adaptive", "norm": "group"}])
def test_a_state_begins_with_the_laws_of_the_network(fields):
    network = get_network(**SMALL | fields)
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,)), jnp.ones((1, 6))
    expected = jax.device_get(network.init(KEY(), *inputs)["params"])
    _, params = create_params(KEY(), **fields)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    drawn = 0
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        if wanted.std() == 0:
            np.testing.assert_array_equal(found, wanted)
        else:
            drawn += 1
            assert not np.array_equal(found, wanted)
            assert 0.6 < found.std() / wanted.std() < 1.6
    assert drawn > 20


def test_weights_depend_on_the_key_alone():
    _, params = create_params(KEY())
    assert_equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    assert_equal(params, create_params(KEY())[1])
    assert_equal(params, create_params(KEY(), remat=True)[1])
    other = create_params(jax.random.key(4))[1]
    assert not np.array_equal(params["conv_in"]["kernel"], other["conv_in"]["kernel"])


def test_a_state_takes_few_draws():
    create, params = create_params(KEY())
    kernels = sum(x.ndim > 1 for x in jax.tree.leaves(params))
    program = str(jax.make_jaxpr(create)(KEY()))
    draws = program.count("name=_draw")
    assert 1 <= draws <= 3 < kernels
