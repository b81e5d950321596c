"""Batch norms in the kernels of linear layers against norm and layer one after the other."""

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.normed import conv, merge_norm, normed_conv, round_to, spread_places
from ldm_jax.norms import BatchNormApart
from ldm_jax.sums import add_bias

SHAPES = [(3, 5, 7, 6), (4, 4, 4, 8), (2, 1, 3, 5), (1, 8, 2, 4)]  # Maps (b, h, w, c).


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def draw_kernel(*shape, seed=0):
    return draw(*shape, seed=seed) / np.sqrt(np.float32(np.prod(shape[:-1])))


def convolve_literally(x, kernel, bias):
    """In float64, place by place of the kernel, with zeros around the map."""
    x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
    height, width = x.shape[1:3]
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    y = np.zeros((*x.shape[:3], kernel.shape[-1])) + bias
    for i in range(3):
        for j in range(3):
            y += padded[:, i : i + height, j : j + width] @ kernel[i, j]
    return y


def measure(found, expected):
    """The error's root mean square over that of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("far", [0, 1, 30])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 0.01)])
def test_a_normed_convolution_is_one_of_the_normalised_map(shape, far, dtype, tolerance):
    channels = shape[-1]
    x, kernel, bias = draw(*shape), draw_kernel(3, 3, channels, 9), draw(9)
    mean, factor = far * draw(channels, seed=1), np.exp(draw(channels, seed=2))
    x = jnp.asarray(x + mean, dtype)
    expected = convolve_literally((np.float64(x) - mean) * factor, kernel, bias)
    for run in (normed_conv, jax.jit(normed_conv)):
        found = run(x, mean, factor, kernel, bias)
        assert found.dtype == dtype
        # A sum of products with x has digits of x, which lies as far from zero as its mean.
        assert measure(np.float32(found), expected) < tolerance * max(1, far)


class NormedConv(nn.Module):
    """As a residual block has them; the same variables as `Literal`."""

    @nn.compact
    def __call__(self, x, kernel, bias):
        mean, factor, offset = BatchNormApart(False, use_scale=False, use_bias=False, name="norm")(
            x
        )
        assert offset is None
        return normed_conv(x, mean, factor, kernel, bias)


class Literal(nn.Module):
    """linen's norm and convolution."""

    @nn.compact
    def __call__(self, x, kernel, bias):
        norm: Any = partial(nn.BatchNorm, False, momentum=0.99, epsilon=1e-3)
        h = norm(use_scale=False, use_bias=False, use_fast_variance=False, name="norm")(x)
        layer = nn.Conv(kernel.shape[-1], (3, 3))
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, h)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("far", [0, 10])
def test_its_gradients_and_statistics_are_those_of_norm_and_convolution(shape, far):
    channels = shape[-1]
    x, kernel, bias = far + 2 * draw(*shape), draw_kernel(3, 3, channels, 9), draw(9)
    weights = draw(*shape[:3], 9, seed=1)
    near = np.full(channels, far, np.float32)
    stats = {"batch_stats": {"norm": {"mean": near, "var": np.ones(channels, np.float32)}}}

    def derive(layer):
        def loss(*inputs):
            y, updates = layer.apply(stats, *inputs, mutable=["batch_stats"])
            return jnp.sum(weights * jnp.sin(y)), (y, updates)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, kernel, bias)

    (_, (y, updates)), gradients = derive(NormedConv())
    (_, (expected, statistics)), literal = derive(Literal())
    chex.assert_trees_all_close(updates, statistics, rtol=1e-5)
    np.testing.assert_allclose(y, expected, atol=2e-5 * max(1, far))
    for found, exact in zip(gradients, literal, strict=True):
        np.testing.assert_allclose(found, exact, atol=2e-5 * max(1, far) * np.abs(exact).max())


class NormedProduct(nn.Module):
    """As attention has them."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, kernel):
        mean, factor, bias = BatchNormApart(False, name="norm")(x)
        kernel, offset = merge_norm(kernel, mean, factor, bias, self.dtype)
        return add_bias(x @ kernel, offset)


def test_a_product_has_the_norm_s_bias_and_scale_too():
    x, kernel = 1 + 2 * draw(6, 5, 8), draw_kernel(8, 12)
    params = {"norm": {"scale": np.exp(draw(8)), "bias": draw(8, seed=1)}}
    stats = {"norm": {"mean": np.zeros(8, np.float32), "var": np.ones(8, np.float32)}}

    def derive(run):
        def loss(params, x, kernel):
            y, updates = run(params, x, kernel)
            return jnp.sum(jnp.sin(y)), (y, updates)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, kernel)

    def ours(params, *inputs):
        variables = {"params": params, "batch_stats": stats}
        return NormedProduct().apply(variables, *inputs, mutable=["batch_stats"])

    def literal(params, x, kernel):
        norm = nn.BatchNorm(False, momentum=0.99, epsilon=1e-3, use_fast_variance=False)
        variables = {"params": params["norm"], "batch_stats": stats["norm"]}
        h, updates = norm.apply(variables, x, mutable=["batch_stats"])
        return h @ kernel, {"batch_stats": {"norm": updates["batch_stats"]}}

    chex.assert_trees_all_close(derive(ours), derive(literal), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 5), (3, 3, 8, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_kernel_and_offset_follow_the_formula(shape, with_bias, dtype):
    kernel, mean, factor = draw(*shape), draw(8), np.exp(draw(8, seed=1))
    bias = draw(8, seed=2) if with_bias else None
    scaled, offset = jax.jit(merge_norm, static_argnums=4)(kernel, mean, factor, bias, dtype)
    rounded = np.float32(jnp.asarray(kernel, dtype))
    expected = np.float32(jnp.asarray(rounded * factor[:, None], dtype))
    assert scaled.dtype == dtype and offset.dtype == np.float32
    rtol = 0 if dtype == "bfloat16" else 1e-6
    np.testing.assert_allclose(np.float32(scaled), expected, rtol=rtol)
    rows = -mean[:, None] * expected + (0 if bias is None else bias[:, None] * rounded)
    np.testing.assert_allclose(offset, rows.sum(-2), rtol=1e-5, atol=1e-5)


def test_kernels_that_were_rounded_on_the_way_give_the_same():
    # As where they travel between devices in the network's dtype.
    kernel, mean, factor, bias = draw(8, 5), draw(8), np.exp(draw(8, seed=1)), draw(8, seed=2)
    rounded = np.float32(jnp.bfloat16(kernel))
    derive = lambda kernel: jax.vjp(  # noqa: E731
        lambda *inputs: merge_norm(*inputs, jnp.bfloat16), kernel, mean, factor, bias
    )
    (found, pullback), (expected, plain) = derive(kernel), derive(rounded)
    chex.assert_trees_all_equal(found, expected)
    cotangents = jnp.bfloat16(draw(8, 5, seed=3)), draw(5, seed=3)
    chex.assert_trees_all_equal(pullback(cotangents), plain(cotangents))


@pytest.mark.parametrize("far", [0, 1, 3, 10])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit])
def test_in_bfloat16_it_is_as_close_as_norm_and_convolution(run, far):
    # Means of so many deviations, of a map that is rounded. Compiled for a CPU, a convolution's
    # result is not; operation by operation it is, and has a mean again that is taken away.
    exact, kernel = far + draw(16, 8, 8, 64), draw_kernel(3, 3, 64, 64)
    bias = np.zeros(64, np.float32)
    mean, factor = exact.mean((0, 1, 2)), 1 / np.sqrt(exact.var((0, 1, 2)) + 1e-3)
    expected = convolve_literally((np.float64(exact) - mean) * factor, kernel, bias)
    x = jnp.bfloat16(exact)
    normalised = jnp.bfloat16((np.float32(x) - mean) * factor)
    plain = measure(np.float32(run(conv)(normalised, jnp.bfloat16(kernel))), expected)
    merged = measure(np.float32(run(normed_conv)(x, mean, factor, kernel, bias)), expected)
    assert merged < 1.5 * plain


@pytest.mark.parametrize("run", [lambda f: f, jax.jit])
def test_numbers_are_rounded_in_a_compiled_program_too_and_their_gradients_are_not(run):
    x = draw(1000)
    found = run(lambda x: round_to(x, jnp.bfloat16))(x)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32(jnp.bfloat16(x)))
    assert np.abs(found - x).max() > 1e-3
    gradient = run(jax.grad(lambda x, dy: jnp.sum(dy * round_to(x, jnp.bfloat16))))(x, x[::-1])
    np.testing.assert_array_equal(gradient, x[::-1])
    np.testing.assert_array_equal(run(lambda x: round_to(x, jnp.float32))(x), x)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (5, 8)])
def test_places_spread_to_the_convolution_of_a_constant_map(size):
    constant, kernel = draw(6), draw(3, 3, 6, 4)
    places = np.einsum("ijcd,c->ijd", kernel, constant)
    expected = convolve_literally(np.broadcast_to(constant, (1, *size, 6)), kernel, np.zeros(4))[0]
    for run in (spread_places, jax.jit(spread_places, static_argnums=(1, 2))):
        np.testing.assert_allclose(run(places, *size), expected, atol=1e-5)
