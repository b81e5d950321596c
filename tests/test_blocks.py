"""The network's layers against numpy: embedding, norms, attention, pooling and upsampling."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import softmax_attention

from ldm_jax.blocks import (
    CrossAttention,
    DownBlock,
    ResidualBlock,
    SpatialAttention,
    Unit,
    UpBlock,
    sinusoidal_embedding,
    upsample,
)
from ldm_jax.conditioning import Condition


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draw_variables(variables, seed=0):
    """Random values for all weights and statistics, variances positive."""
    rng = np.random.default_rng(seed)

    def draw_leaf(path, x):
        is_variance = path[-1].key == "var"
        x = rng.uniform(0.5, 1.5, x.shape) if is_variance else 0.4 * rng.standard_normal(x.shape)
        return x.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw_leaf, variables)


def init(layer, *inputs):
    return draw_variables(jax.eval_shape(layer.init, jax.random.key(0), *inputs))


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def running_norm(x, params, stats):
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-3)
    return x * params["scale"] + params["bias"]


def test_sinusoidal_embedding_follows_the_formula():
    a = np.linspace(0, 0.95, 50, dtype=np.float32)
    frequencies = np.exp(np.linspace(np.log(1), np.log(1000), 16))
    angles = 2 * np.pi * a.astype(np.float64)[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    # The highest angle is near 6000, where neighbouring float32 numbers are 5e-4 apart.
    np.testing.assert_allclose(sinusoidal_embedding(a), expected, atol=1e-3)
    np.testing.assert_allclose(jax.jit(sinusoidal_embedding)(a), expected, atol=1e-3)
    assert sinusoidal_embedding(a, emb_dim=8).shape == (50, 8)


@pytest.mark.parametrize("levels, emb_dim", [(np.zeros(2), 31), (np.zeros((2, 1)), 32)])
def test_sinusoidal_embedding_requires_an_even_width_and_rank_one(levels, emb_dim):
    with pytest.raises(ValueError, match="must (be even|have shape)"):
        sinusoidal_embedding(levels, emb_dim)


@pytest.mark.parametrize("fields", [{}, {"heads": 2, "scaled": True, "key_fraction": 2}])
def test_spatial_attention_equals_a_literal_softmax_over_positions(fields):
    x = draw(2, 3, 4, 16)
    layer = SpatialAttention(**fields)
    variables = init(layer, x)
    params, stats = variables["params"], variables["batch_stats"]
    h = running_norm(x, params["norm_in"], stats["norm_in"]).reshape(2, 12, 16)
    q, k, v = (dense(h, params[name]) for name in ("query", "key", "value"))
    assert k.shape[-1] == 16 // fields.get("key_fraction", 8)
    h = softmax_attention(q, k, v, fields.get("heads", 1), fields.get("scaled", False))
    h = dense(h, params["out"]).reshape(x.shape)
    expected = running_norm(h, params["norm_out"], stats["norm_out"])
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"heads": 2, "scaled": True, "key_fraction": 2}])
def test_cross_attention_to_tokens_equals_a_literal_softmax(fields):
    image, cond = draw(2, 3, 4, 16), draw(2, 5, 9, seed=1)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    layer = CrossAttention(**fields)
    variables = init(layer, image, cond, mask)
    params, stats = variables["params"], variables["batch_stats"]
    tokens = running_norm(cond, params["norm_cond"], stats["norm_cond"])
    positions = running_norm(image, params["norm_image"], stats["norm_image"]).reshape(2, 12, 16)
    h = softmax_attention(
        dense(tokens, params["query"]),
        dense(positions, params["key"]),
        dense(tokens, params["value"]),
        fields.get("heads", 1),
        fields.get("scaled", False),
        mask,
    )
    h = dense(h, params["out"]).reshape(image.shape)
    expected = running_norm(h, params["norm_out"], stats["norm_out"])
    result = jax.jit(layer.apply)(variables, image, cond, mask)
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_equal_tokens_give_the_result_of_the_one_token(norm):
    image, cond = draw(2, 4, 4, 32), draw(2, 1, 48, seed=1)
    layer = CrossAttention(norm=norm)
    several = np.repeat(cond, 6, axis=1)
    variables = init(layer, image, several)
    expected = layer.apply(variables, image, cond)
    assert expected.shape == (2, 1, 1, 32)
    result = layer.apply(variables, image, several)
    assert result.shape == (2, 4, 4, 32)
    np.testing.assert_allclose(result, np.broadcast_to(expected, result.shape), atol=1e-5)


def test_one_token_needs_no_queries_and_no_keys():
    variables = init(CrossAttention(), draw(2, 4, 4, 16), draw(2, 1, 9))
    assert set(variables["params"]) == {"norm_cond", "value", "out", "norm_out"}


def test_a_residual_block_has_a_convolution_of_size_one_where_the_width_changes():
    x = draw(1, 4, 4, 16)
    narrow, wide = (ResidualBlock(width).init(jax.random.key(0), x) for width in (16, 24))
    assert set(narrow["params"]) == {"conv_0", "conv_1"}  # The norm has no scale, no offset.
    assert wide["params"]["residual"]["kernel"].shape == (1, 1, 16, 24)
    zeros = jax.tree.map(jnp.zeros_like, narrow["params"])
    y = ResidualBlock(16).apply(narrow | {"params": zeros}, x)
    np.testing.assert_array_equal(y, x)


def test_an_embedding_scales_and_shifts_the_normalised_activations():
    x, embedding = draw(2, 4, 4, 16), draw(2, 5, seed=1)
    layer = ResidualBlock(16, norm="rms")
    params = init(layer, x, embedding)["params"]
    scale, shift = np.split(dense(embedding, params["film"])[:, None, None], 2, axis=-1)

    def conv(x, name):
        layer = nn.Conv(16, (3, 3))
        return np.asarray(layer.apply({"params": params[name]}, x))

    def norm(x):
        return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5)

    h = (1 + scale) * norm(conv(norm(x), "conv_0")) + shift
    expected = conv(h / (1 + np.exp(-h)), "conv_1") + x
    result = jax.jit(layer.apply)({"params": params}, x, embedding)
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_scales_and_shifts_start_at_zero():
    x, layer = draw(2, 4, 4, 16), ResidualBlock(16, norm="rms")
    variables = layer.init(jax.random.key(0), x, draw(2, 5))
    results = [layer.apply(variables, x, draw(2, 5, seed=seed)) for seed in (1, 2)]
    np.testing.assert_array_equal(*results)


def test_dropout_zeroes_activations_in_training_alone():
    x = draw(2, 8, 8, 16)
    layer = ResidualBlock(16, dropout=0.5)
    variables = init(layer, x)
    np.testing.assert_array_equal(layer.apply(variables, x), ResidualBlock(16).apply(variables, x))

    def train(key):
        rngs = {"dropout": jax.random.key(key)}
        return layer.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    np.testing.assert_array_equal(train(0), train(0))
    assert np.mean(np.abs(train(0) - train(1))) > 0.1


@pytest.mark.parametrize("norm", ["group", "rms"])
@pytest.mark.parametrize("conditioned", [True, False])
def test_a_block_drops_its_share_of_activations_and_raises_the_others(norm, conditioned):
    x, embedding = draw(4, 8, 8, 16), draw(4, 6, seed=1) if conditioned else None
    layer = ResidualBlock(16, dropout=0.3, norm=norm)
    variables = init(layer, x, embedding)
    params = jax.tree.map(lambda w: w + 0.3 * draw(*w.shape, seed=2), variables["params"])
    # The second convolution hands on what it gets, so that the block adds the activations to x.
    params["conv_1"] = {"kernel": np.zeros((3, 3, 16, 16), np.float32), "bias": np.zeros(16)}
    params["conv_1"]["kernel"][1, 1] = np.eye(16)
    apply = lambda **options: layer.apply({"params": params}, x, embedding, **options) - x  # noqa: E731
    whole, some = apply(), apply(train=True, rngs={"dropout": jax.random.key(0)})
    kept = np.abs(some) > 1e-6
    np.testing.assert_allclose(some[kept], whole[kept] / 0.7, rtol=1e-3, atol=1e-5)
    assert abs(np.mean(kept) - 0.7) < 0.02


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("heads", [1, 2])
def test_kernels_that_travel_in_bfloat16_change_no_unit_in_bfloat16(train, norm, heads):
    # As with FSDP: a device gets the others' parts of a kernel rounded to the network's dtype.
    x, cond = jnp.bfloat16(draw(2, 4, 4, 48)), Condition(jnp.bfloat16(draw(2, 3, 16, seed=1)))
    unit = Unit(32, heads=heads, norm=norm, dtype=jnp.bfloat16)
    variables = init(unit, x, cond)
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(jnp.bfloat16(x)) if path[-1].key == "kernel" else x, variables
    )

    @jax.jit
    def apply(variables):
        def loss(variables):
            result = unit.apply(variables, x, cond, train=train, mutable=["batch_stats"])
            return jnp.sum(jnp.float32(result[0])), result

        return jax.grad(loss, has_aux=True)(variables)

    chex.assert_trees_all_equal(apply(rounded), apply(variables))


NOTHING = Condition(np.zeros((1, 1, 1), np.float32))


class Identity(nn.Module):
    """Stands in for a unit."""

    width: int
    attention: bool = True

    def __call__(self, x, cond, *, train=False):
        return x


def test_upsampling_is_bilinear_with_half_pixel_centres():
    x = draw(2, 3, 4, 2)
    upsampled = UpBlock(2, unit=Identity).apply({}, x, [], NOTHING)

    def double(x, axis):  # 3/4 of the near pixel, 1/4 of the far one; the border repeats.
        x = np.moveaxis(x, axis, 0)
        before, after = np.concatenate([x[:1], x[:-1]]), np.concatenate([x[1:], x[-1:]])
        pairs = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=1)
        return np.moveaxis(pairs.reshape(-1, *x.shape[1:]), 0, axis)

    np.testing.assert_allclose(upsampled, double(double(x, 1), 2), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (4, 5)])
def test_upsampling_s_gradient_is_its_transpose(size):
    # <A x, y> = <x, A^T y> of a linear map A, for each x that is one at one place, zero elsewhere.
    places = np.eye(math.prod(size), dtype=np.float32).reshape(-1, *size, 1)
    dy = draw(1, 2 * size[0], 2 * size[1], 1)
    expected = np.sum(np.asarray(upsample(places)) * dy, (1, 2, 3)).reshape(size)
    for run in (upsample, jax.jit(upsample)):
        found = jax.vjp(run, np.zeros((1, *size, 1), np.float32))[1](dy)[0]
        np.testing.assert_allclose(found[0, ..., 0], expected, atol=1e-6)


def test_an_up_block_takes_the_latest_skip_first():
    x, skips = draw(1, 2, 2, 1), [np.full((1, 4, 4, 1), i, np.float32) for i in range(3)]
    result = UpBlock(1, unit=Identity).apply({}, x, skips, NOTHING)
    np.testing.assert_array_equal(result[0, 0, 0, 1:], [2, 1, 0])


def test_a_down_block_pools_averages_and_keeps_the_output_of_each_unit():
    x = draw(2, 4, 6, 3)
    pooled, skips = DownBlock(3, block_depth=2, unit=Identity).apply({}, x, NOTHING)
    expected = x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(pooled, expected, atol=1e-6)
    assert len(skips) == 2
    np.testing.assert_array_equal(skips[0], x)


@pytest.mark.parametrize("mean, tolerance", [(0, 0.02), (3, 0.04), (10, 0.08)])
def test_attention_s_gradients_keep_most_of_their_digits_far_from_zero(mean, tolerance):
    # By norm and product apart it is 0.013 everywhere; with queries left off centre 0.3 at ten.
    channels = np.where(draw(32) < 0, -mean, mean).astype(np.float32)
    x = np.float32(jnp.bfloat16(draw(16, 4, 4, 32) + channels))
    weights = draw(*x.shape, seed=1)

    def derive(dtype):
        layer = SpatialAttention(key_fraction=2, dtype=dtype)
        variables = layer.init(jax.random.key(0), x)

        def loss(params, x):
            changed = variables | {"params": params}
            y, _ = layer.apply(changed, x.astype(dtype), train=True, mutable=["batch_stats"])
            return jnp.sum(weights * y.astype(jnp.float32))

        params, dx = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], x)
        return [dx, *(params[name]["kernel"] for name in ("query", "key", "value", "out"))]

    for found, exact in zip(derive(jnp.bfloat16), derive(jnp.float32), strict=True):
        assert np.linalg.norm(found - exact) < tolerance * np.linalg.norm(exact)
