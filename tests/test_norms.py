"""Norms and dropout against numpy, on one device and with a batch that is spread by hand."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ldm_jax.forecast import count_messages
from ldm_jax.norms import (
    BatchNorm,
    BatchNormApart,
    Dropout,
    batch_places,
    draw_halves,
    get_norm,
    sample_keys,
)
from ldm_jax.sharding import AXES, get_mesh


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_batch_norm_has_the_originals_epsilon_and_momentum():
    x = 3 + 2 * draw(6, 4, 4, 5)
    layer = get_norm("batch", train=True, dtype=jnp.float32)()
    variables = layer.init(jax.random.key(0), x)
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2), dtype=np.float64), x.var((0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.01 * mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.99 + 0.01 * var, rtol=1e-5)


def test_the_batch_norm_keeps_its_digits_far_from_zero_near_its_running_mean():
    x = 1000 + 0.1 * draw(64, 2, 2, 3)
    layer = get_norm("batch", train=True, dtype=jnp.float32)()
    stats = {"mean": np.full(3, 999.7, np.float32), "var": np.ones(3, np.float32)}
    variables = layer.init(jax.random.key(0), x) | {"batch_stats": stats}
    y, _ = layer.apply(variables, x, mutable=["batch_stats"])
    x = x.astype(np.float64)
    expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)
    np.testing.assert_allclose(y, expected, atol=2e-3)


def test_the_group_norm_normalises_groups_of_16_channels_of_one_picture():
    x = 3 + 2 * draw(2, 4, 4, 48)
    layer = get_norm("group", train=True, dtype=jnp.float32)()
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    groups = x.astype(np.float64).reshape(2, 16, 3, 16)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_the_group_norm_of_tokens_normalises_each_alone():
    x = draw(2, 3, 32) * np.array([1, 10, 0.1], np.float32)[None, :, None]
    layer = get_norm("group", train=False, dtype=jnp.float32, per_token=True)()
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    groups = x.astype(np.float64).reshape(2, 3, 2, 16)
    groups = groups - groups.mean(3, keepdims=True)
    expected = groups / np.sqrt((groups**2).mean(3, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (2, 3, 6)])
def test_the_rms_norm_divides_each_position_by_its_root_mean_square(shape):
    x = 3 + 2 * draw(*shape)
    scale = np.linspace(0.5, 2, 6, dtype=np.float32)
    norm = get_norm("rms", train=True, dtype=jnp.float32, per_token=len(shape) == 3)
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-5)
    y = jax.jit(norm().apply)({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(y, expected * np.broadcast_to(scale, shape), rtol=1e-5)
    plain = get_norm("rms", train=True, dtype=jnp.float32, affine=False)()
    np.testing.assert_allclose(plain.apply({}, x), expected, rtol=1e-5)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm must be one of .*got 'layer'"):
        get_norm("layer", train=False, dtype=jnp.float32)


def spread(function, *, whole=1, layout="data=2,fsdp=4", devices=None):
    """`function` on eight devices; the first `whole` arguments go to each, the others in parts."""
    mesh = get_mesh(layout, devices)

    def run(*arguments):
        specs = [PartitionSpec()] * whole + [PartitionSpec(AXES)] * (len(arguments) - whole)
        out = (PartitionSpec(AXES), PartitionSpec())
        return jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=out)(*arguments)

    return jax.jit(run)


@pytest.mark.parametrize("masked", [False, True])
def test_the_batch_norm_of_a_spread_batch_has_the_statistics_of_the_whole(masked):
    # Each device's tokens have another mean, and with the mask another number of them counts.
    x = draw(16, 5, 6) + np.arange(16, dtype=np.float32)[:, None, None]
    mask = np.arange(5)[None, :, None] <= (np.arange(16) % 5)[:, None, None]
    layer = BatchNorm(use_running_average=False, axis_name=AXES)
    variables = layer.init(jax.random.key(0), x)

    def apply(variables, x, mask):
        return layer.apply(variables, x, mask if masked else None, mutable=["batch_stats"])

    y, updates = spread(apply)(variables, x, mask)
    counted = x[np.broadcast_to(mask, x.shape)].reshape(-1, 6) if masked else x.reshape(-1, 6)
    mean, var = counted.mean(0, dtype=np.float64), counted.var(0, dtype=np.float64)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.01 * mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.99 + 0.01 * var, rtol=1e-5)


def test_a_spread_batch_norm_keeps_its_digits_near_its_running_mean():
    # Means of a thousand deviations: squares alone, in float32, would leave none of the variance.
    x = 1000 + draw(16, 5, 6) + np.arange(16, dtype=np.float32)[:, None, None] / 8
    layer = BatchNorm(use_running_average=False, axis_name=AXES)
    stats = {"mean": np.full(6, 999, np.float32), "var": np.ones(6, np.float32)}
    apply = partial(layer.apply, mutable=["batch_stats"])
    variables = layer.init(jax.random.key(0), x) | {"batch_stats": stats}
    y, _ = spread(apply)(variables, x)
    expected = x.astype(np.float64) - x.mean((0, 1), dtype=np.float64)
    expected /= np.sqrt(x.var((0, 1), dtype=np.float64) + 1e-3)
    np.testing.assert_allclose(y, expected, atol=1e-3)


@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("layer_class", [BatchNorm, BatchNormApart])
def test_a_new_batch_norm_keeps_the_digits_that_its_docstring_says(layer_class, number):
    # Means of ten and a hundred deviations, of a norm whose running means are zero.
    x = draw(16, 50, 6)
    layer = layer_class(use_running_average=False, momentum=0.0, axis_name=AXES)

    def get_variance(variables, x):
        updates = layer.apply(variables, x, mutable=["batch_stats"])[1]
        return x, updates["batch_stats"]["var"]

    on_devices = spread(get_variance, layout="data", devices=jax.devices()[:number])
    for mean, lost in [(0, 1e-6), (10, 3e-5), (100, 3e-3)]:
        _, var = on_devices(layer.init(jax.random.key(0), x), mean + x)
        errors = np.abs(var / (mean + x).var((0, 1), dtype=np.float64) - 1)
        assert np.median(errors) < lost and errors.max() < 2 * lost
    # And little is lost that far from the running mean either if that is where the mean is.
    stats = {"mean": np.full(6, 100, np.float32), "var": np.ones(6, np.float32)}
    _, var = on_devices(layer.init(jax.random.key(0), x) | {"batch_stats": stats}, 100 + x)
    np.testing.assert_allclose(var, (100 + x).var((0, 1), dtype=np.float64), rtol=1e-6)


def test_the_devices_of_a_batch_norm_wait_for_each_other_once_in_either_direction():
    x = draw(16, 4, 4, 6)
    layer = BatchNorm(False, use_scale=False, use_bias=False, axis_name=AXES)
    variables = layer.init(jax.random.key(0), x)

    def forward(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    def backward(variables, x):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(forward(variables, x)[0])))(x)
        return gradient, jnp.zeros(())

    def masked(variables, x):
        mask = jnp.arange(4)[None, :, None, None] < 2 + (x[:, :1, :1, :1] > 0)
        return layer.apply(variables, x, mask, mutable=["batch_stats"])

    for function, messages in ((forward, 1), (masked, 1), (backward, 2)):
        text = spread(function).lower(variables, x).compile().as_text()
        assert sum(message.count for message in count_messages(text)) == messages


def test_the_batch_norm_is_linens_where_there_is_no_mask():
    x = 2 + 3 * draw(4, 3, 3, 8)
    own = BatchNorm(use_running_average=False)
    linens = nn.BatchNorm(
        use_running_average=False, momentum=0.99, epsilon=1e-3, use_fast_variance=False
    )
    variables = linens.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, own.init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, variables
    )
    results = [layer.apply(variables, x, mutable=["batch_stats"]) for layer in (own, linens)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    layer, x = Dropout(0.3), jnp.ones((100, 20, 20))
    y = np.asarray(layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(y)) == {0.0, np.float32(layer.gain)}
    np.testing.assert_allclose(layer.gain, 1 / 0.7, rtol=1e-5)
    assert abs(np.mean(y == 0) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / y.size)
    shares = np.mean(y == 0, axis=(1, 2))  # Each sample has a mask of its own, of the same share.
    assert 0.01 < shares.std() < 0.04 and len(np.unique(y, axis=0)) == 100
    np.testing.assert_array_equal(layer.apply({}, x), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)


def test_what_is_kept_is_not_made_larger_by_rounding():
    layer, x = Dropout(0.15), jnp.bfloat16(1 + 0.9 * jnp.linspace(0, 1, 2**18)[None])
    y = jax.jit(lambda x, key: layer.apply({}, x, train=True, rngs={"dropout": key}))
    y = np.float64(y(x, jax.random.key(0)))
    kept, x = y != 0, np.float64(x)
    np.testing.assert_allclose(np.mean(y[kept] / x[kept]), 1 / 0.85, rtol=2e-4)


@pytest.mark.parametrize("rate", [2.0**-20, 1 - 2.0**-20])
def test_a_dropout_rate_beyond_its_digits_is_the_nearest(rate):
    y = Dropout(rate).apply({}, jnp.ones((1, 50)), train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(np.isfinite(y), True)
    assert np.mean(y == 0) == round(rate)


@pytest.mark.parametrize("shape", [(1000, 64), (1000, 63), (20_000,)])
def test_halves_of_random_words_are_uniform_and_do_not_go_together(shape):
    halves = np.int64(draw_halves(jax.random.key(0), shape))
    assert halves.shape == shape and halves.min() >= 0 and halves.max() < 2**16
    counts = np.bincount(halves.ravel() // 2**12, minlength=16)
    expected = halves.size / 16
    assert np.sum((counts - expected) ** 2) / expected < 37.7  # Chi-squared, 15 degrees: p 0.001.
    pairs = halves.reshape(-1, shape[-1])[:, : shape[-1] // 2 * 2].reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4 / np.sqrt(len(pairs))


def test_dropout_is_the_same_on_any_number_of_devices():
    x, key = jnp.ones((16, 30)), jax.random.key(3)

    def apply(key, x, axis_name=None):
        y = Dropout(0.5, axis_name).apply({}, x, train=True, rngs={"dropout": key})
        return y, jnp.zeros(())

    expected, _ = jax.jit(apply)(key, x)
    for layout in ("data", "data=2,fsdp=4", "fsdp"):
        found, _ = spread(partial(apply, axis_name=AXES), layout=layout)(key, x)
        np.testing.assert_array_equal(found, expected)


def test_the_places_of_a_spread_batch_are_those_of_the_whole():
    places, _ = spread(lambda x: (batch_places(len(x), AXES), jnp.zeros(())), whole=0)(np.zeros(16))
    np.testing.assert_array_equal(places, np.arange(16))
    keys = jax.random.key_data(sample_keys(jax.random.key(0), 4))
    expected = [jax.random.key_data(jax.random.fold_in(jax.random.key(0), i)) for i in range(4)]
    np.testing.assert_array_equal(keys, expected)
