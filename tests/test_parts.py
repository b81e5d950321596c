"""Products by parts against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.parts import matmul, split


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(found, expected):
    return np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_two_parts_have_the_first_16_bits(transform):
    x = draw(64, 5) * np.float32(10.0) ** np.arange(-2, 3, dtype=np.float32)
    parts = transform(split)(x)
    assert parts.shape == (64, 10) and parts.dtype == jnp.bfloat16
    high, low = np.split(np.float32(parts), 2, axis=-1)
    np.testing.assert_array_equal(high, np.float32(jnp.bfloat16(x)))
    np.testing.assert_allclose(high + low, x, rtol=2**-16)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2**-16), ("float32", 1e-6)])
def test_a_product_and_its_gradients_have_more_digits_than_the_map(transform, dtype, tolerance):
    x, kernel, dy = jnp.asarray(draw(2, 3, 64), dtype), draw(64, 4, seed=1), draw(2, 3, 4, seed=2)

    def derive(x, kernel, dy):
        y, pullback = jax.vjp(matmul, x, kernel)
        return y, *pullback(dy)

    y, d_x, d_kernel = transform(derive)(x, kernel, dy)
    assert y.dtype == d_kernel.dtype == jnp.float32 and d_x.dtype == dtype
    exact_x, exact_kernel, exact_dy = (np.float64(a) for a in (x, kernel, dy))
    assert relative_error(y, exact_x @ exact_kernel) < tolerance
    rows = exact_x.reshape(-1, 64), exact_dy.reshape(-1, 4)
    assert relative_error(d_kernel, rows[0].T @ rows[1]) < tolerance
    # Given in the map's dtype, and rounded once.
    expected = jnp.asarray(exact_dy @ exact_kernel.T, dtype)
    np.testing.assert_allclose(np.float32(d_x), np.float32(expected), rtol=2**-7, atol=1e-4)
    assert np.mean(np.float32(d_x) == np.float32(expected)) > 0.9 or dtype == "float32"
