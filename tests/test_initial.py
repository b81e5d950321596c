import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ldm_jax import initial, sharding
from ldm_jax.initial import SHORTEST, lecun_normal, long_draws
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


def draw(k, length):
    """What draw k of `long_draws` holds, with a variance of 1."""
    numbers = jax.random.truncated_normal(jax.random.fold_in(KEY(), k), -2, 2, (length,))
    return numbers / 0.87962566103423978


def test_kernels_are_consecutive_parts_of_the_draws():
    shapes = [(100, 300), (2, 2, 30, 50), (SHORTEST, 3), (40, 40)]
    with long_draws(KEY()):
        kernels = [np.asarray(lecun_normal(KEY(), shape)) for shape in shapes]
    bare = [kernel.ravel() * np.prod(kernel.shape[:-1]) ** 0.5 for kernel in kernels]
    first, second = draw(0, SHORTEST), draw(1, 4 * SHORTEST)
    np.testing.assert_allclose(np.concatenate(bare[:2]), first[:36_000], rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(bare[2:]), second[: 3 * SHORTEST + 1600], rtol=1e-5)


def test_a_draw_ends_with_the_kernel_that_fits(monkeypatch):
    monkeypatch.setattr(initial, "SHORTEST", 12)
    with long_draws(KEY()):
        kernels = [np.asarray(lecun_normal(KEY(), shape)) for shape in [(2, 3), (3, 2), (2, 2)]]
    first, second = (draw(k, length) for k, length in [(0, 12), (1, 48)])
    np.testing.assert_allclose(kernels[0].ravel() * 2**0.5, first[:6], rtol=1e-5)
    np.testing.assert_allclose(kernels[1].ravel() * 3**0.5, first[6:], rtol=1e-5)
    np.testing.assert_allclose(kernels[2].ravel() * 2**0.5, second[:4], rtol=1e-5)


def test_a_kernel_longer_than_any_draw_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr(initial, "SHORTEST", 4)
    monkeypatch.setattr(initial, "LONGEST", 8)
    with long_draws(KEY()):
        kernels = [np.asarray(lecun_normal(KEY(), shape)) for shape in [(5, 4), (2, 4), (1, 1)]]
    for k, (kernel, length) in enumerate(zip(kernels, [20, 8, 8])):
        bare = kernel.ravel() * kernel.shape[0] ** 0.5
        np.testing.assert_allclose(bare, draw(k, length)[: kernel.size], rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (3, 0)])
def test_a_shape_that_is_no_kernels_is_refused(shape):
    with pytest.raises(ValueError, match="must have a shape like"):
        lecun_normal(KEY(), shape)


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
            assert 0.6 < found.std() / wanted.std() < 1.6
    assert drawn > 20


def test_equal_keys_give_equal_weights():
    create, params = create_params(KEY())
    assert_equal = partial(jax.tree.map, np.testing.assert_array_equal)
    assert_equal(params, create_params(KEY())[1])
    assert_equal(params, create_params(KEY(), remat=True)[1])
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, params, jax.device_get(create(KEY()).params))  # Without jit.
    other = create_params(jax.random.key(4))[1]
    assert not np.array_equal(params["conv_in"]["kernel"], other["conv_in"]["kernel"])


@pytest.mark.parametrize("layout", ["fsdp", "data=2,fsdp=4"])
def test_devices_draw_the_same_weights_without_a_message(layout):
    create, params = create_params(KEY())
    mesh = sharding.get_mesh(layout)
    shardings = sharding.get_shardings(mesh, jax.eval_shape(create, KEY()))
    program = jax.jit(create, out_shardings=shardings).lower(KEY()).compile()
    messages = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    assert not re.findall(f"({messages})[(]", program.as_text())
    placed = program(KEY()).params
    split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed)]
    assert sum(split) > 10
    # But for rounding, which differs from program to program.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, params, jax.device_get(placed))


@pytest.mark.parametrize("fields", [{}, {"conditioning": "adaptive"}])
def test_a_state_takes_few_draws_and_draws_them_once(fields):
    create, params = create_params(KEY(), **fields)
    kernels = sum(x.ndim > 1 for x in jax.tree.leaves(params))
    program = str(jax.make_jaxpr(create)(KEY()))
    # A layer with another initializer would have a draw of its own.
    draws = program.count("name=_draw")
    assert 1 <= draws <= 3 < kernels
    assert draws == program.count("random_bits[")
    # A barrier for each draw, one for each place where it is cut, and that of each attention.
    attentions = sum(path[-2:] == ("query", "kernel") for path in flatten_dict(params))
    barriers = draws + program.count(" dynamic_slice[") + attentions
    assert program.count("optimization_barrier") == barriers
