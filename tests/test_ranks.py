"""Percentiles from the largest numbers of a row: by the kernel, interpreted, and by XLA."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import as_on_a_gpu, count_lowered

from ldm_jax import ranks, tiles


def draw(rows, n):
    """Rows that differ, and repeat numbers, are all the same, or hold what is not finite."""
    x = np.random.default_rng(n).normal(size=(rows, n)).astype(np.float32)
    x[1] = np.round(2 * x[1])
    x[2] = 1.5
    x[3, ::5] = np.inf
    x[4, 3:] = -np.inf
    return jnp.asarray(x)


@pytest.mark.parametrize("n, k", [(1024, 7), (4096, 16), (32, 1), (32, 2), (64, 3)])
def test_the_kernel_finds_the_numbers_of_a_sorted_row(n, k):
    pytest.importorskip("jax.experimental.pallas.triton", reason="a JAX without Pallas' Triton")
    x = draw(6, n)
    rows = np.sort(x)[:, ::-1]
    for found in (ranks.by_kernel(x, k), ranks.get_ranks(x, k)):
        chex.assert_trees_all_equal(found, (rows[:, k - 1], rows[:, max(k - 2, 0)]))


@pytest.mark.parametrize("perc", [99.5, 99.99, 100.0, 98.5])
def test_a_percentile_is_that_of_numpy(monkeypatch, perc):
    x = draw(6, 1024)[:3]
    expected = np.percentile(np.float64(x), perc, axis=1)
    np.testing.assert_allclose(ranks.percentile(x, perc), expected, rtol=1e-6)
    monkeypatch.setattr(ranks, "get_ranks", ranks.by_kernel)
    np.testing.assert_allclose(ranks.percentile(x, perc), expected, rtol=1e-6)


def test_the_kernel_is_for_short_ranks_of_float32_on_a_gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)
    array = jax.ShapeDtypeStruct((4, 1024), jnp.float32)
    find = lambda x: ranks.percentile(x, 99.5)  # noqa: E731
    pytest.importorskip("jax.experimental.pallas.triton", reason="a JAX without Pallas' Triton")
    assert count_lowered(find, [array]) == 1
    assert count_lowered(find, [array], "cpu") == 0
    assert count_lowered(jax.grad(lambda x: find(x).sum()), [array]) == 0
    assert count_lowered(jax.vmap(find), [jax.ShapeDtypeStruct((2, 4, 1024), jnp.float32)]) == 1
    assert count_lowered(lambda x: ranks.percentile(x, 50.0), [array]) == 0
    assert count_lowered(find, [jax.ShapeDtypeStruct((4, 768), jnp.float32)]) == 0
    assert count_lowered(find, [jax.ShapeDtypeStruct((4, 1024), jnp.bfloat16)]) == 0


def test_gradients_are_those_of_the_two_numbers(monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).permutation(128).reshape(2, 64), jnp.float32)
    by_xla = jax.grad(lambda x: ranks.percentile(x, 97.0).sum())(x)
    monkeypatch.setattr(tiles, "are_possible", lambda: True)
    by_either = jax.grad(lambda x: ranks.percentile(x, 97.0).sum())(x)
    chex.assert_trees_all_equal(by_either, by_xla)
    place = 0.97 * 63
    expected = np.zeros(x.shape)
    order = np.argsort(x)
    for row in range(2):
        expected[row, order[row, int(place)]] = 1 - place % 1
        expected[row, order[row, int(place) + 1]] = place % 1
    np.testing.assert_allclose(by_xla, expected, atol=1e-5)
