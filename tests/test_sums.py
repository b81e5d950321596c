"""Vectors added to maps, and the sums that their gradients are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.sums import add_bias, add_offset, column_sums, repeat


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "shape", [(12, 4, 4, 5), (7, 2, 2, 3), (2, 32, 16, 3), (300, 9), (8, 1, 6)]
)
def test_column_sums_are_those_of_all_positions(shape):
    x = draw(*shape)
    axes = tuple(range(len(shape) - 1))
    total, squares = column_sums(x, x**2)
    x = x.astype(np.float64)
    np.testing.assert_allclose(total, x.sum(axes), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(squares, (x**2).sum(axes), rtol=1e-5)


def test_partial_sums_join_samples_up_to_256_positions():
    for shape, partials in {(64, 4, 4, 5): 4, (64, 16, 16, 5): 64, (6, 4, 4, 5): 3}.items():
        jaxpr = jax.make_jaxpr(column_sums)(np.zeros(shape, np.float32))
        [barrier] = [e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]
        assert barrier.outvars[0].aval.shape == (partials, 5)


@pytest.mark.parametrize("samples", [1, 6, 48])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_biases_and_offsets_are_added_and_their_gradients_are_sums(samples, dtype):
    x, dy = (jnp.asarray(draw(samples, 3, 5, 7, seed=seed), dtype) for seed in (0, 1))
    for add, shape in [(add_bias, (7,)), (add_offset, (3, 5, 7))]:
        term = draw(*shape, seed=2)
        y, pullback = jax.vjp(jax.jit(add), x, term)
        exact = np.float32(x) + np.broadcast_to(term, x.shape)
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.float32(y), np.float32(jnp.asarray(exact, dtype)))
        dx, d_term = pullback(dy)
        assert (dx.dtype, d_term.dtype) == (dtype, np.float32)
        np.testing.assert_array_equal(dx, dy)
        axes = tuple(range(4 - len(shape)))
        np.testing.assert_allclose(d_term, np.float64(dy).sum(axes), rtol=1e-5, atol=1e-5)


def test_a_bias_goes_to_products_too():
    x, bias = draw(6, 7), draw(7, seed=1)
    np.testing.assert_array_equal(add_bias(x, bias), x + bias[None])
    d_bias = jax.grad(lambda bias: jnp.sum(x * add_bias(x, bias)))(bias)
    np.testing.assert_allclose(d_bias, x.sum(0), rtol=1e-5)


def test_a_vector_is_repeated_and_its_gradient_is_the_sum_of_all_samples():
    vector, dy = draw(5), draw(300, 5, seed=1)
    y, pullback = jax.vjp(lambda vector: repeat(vector, 300), vector)
    np.testing.assert_array_equal(y, np.tile(vector, (300, 1)))
    np.testing.assert_allclose(pullback(dy)[0], np.float64(dy).sum(0), rtol=1e-5)
    stacked = jax.vmap(lambda vector: repeat(vector, 2))(draw(3, 5))
    np.testing.assert_array_equal(stacked, np.repeat(draw(3, 5)[:, None], 2, axis=1))
