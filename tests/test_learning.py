"""The optimizer by its formulas, and small networks that learn a toy set."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.latents import LatentScale
from ldm_jax.training import create_train_state, get_eval_step, get_optimizer, get_train_step
from ldm_jax.unet import get_network


def rates(optimizer, steps):
    """Under a constant gradient Adam changes a weight by its learning rate."""
    weight, changes = jnp.float32(0), []
    opt_state = optimizer.init(weight)
    for _ in range(steps):
        change, opt_state = optimizer.update(jnp.float32(1), opt_state)
        changes.append(-float(change))
    return changes


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_warms_up_and_decays(decay, warmup):
    optimizer = get_optimizer(0.3, steps=12, warmup_steps=warmup, decay=decay)
    expected = [
        0.3 * t / warmup
        if t < warmup
        else 0.3 * (1 + np.cos(np.pi * (t - warmup) / (12 - warmup))) / 2
        if decay == "cosine"
        else 0.3
        for t in range(12)
    ]
    np.testing.assert_allclose(rates(optimizer, 12), expected, atol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # Norm 5.
    optimizer = get_optimizer(0.1, steps=10, clip_norm=2.5, b2=0.9)
    _, opt_state = optimizer.update(gradients, optimizer.init(params), params)
    moments = optax.tree.get(opt_state, "mu"), optax.tree.get(opt_state, "nu")
    np.testing.assert_allclose(moments[0]["a"], [0.15, 0.0], rtol=1e-5)  # 0.1 of 3 / 2
    np.testing.assert_allclose(moments[1]["b"], [0.4], rtol=1e-5)  # 0.1 of (4 / 2)^2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decay": "linear"}, "decay must be one of .*got 'linear'"),
        ({"warmup_steps": 10}, r"warmup_steps must lie in \[0, steps=10\), got 10"),
        ({"warmup_steps": -1}, r"warmup_steps must lie in \[0, steps=10\), got -1"),
    ],
)
def test_schedules_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_optimizer(steps=10, **settings)


class Run:
    """A small network on one picture a caption, trained for `steps` steps."""

    def __init__(self, steps, embedding_shape, **fields):
        network = get_network(8, 1, embedding_shape[-1], widths=(16, 32), **fields)
        rng = np.random.default_rng(0)
        colours = np.repeat(rng.uniform(-1, 1, (8, 1, 1, 4)), 4, axis=0)
        texts = np.repeat(rng.standard_normal((8, *embedding_shape)), 4, axis=0)
        self.batch = {
            "latents_mean": np.float32(colours * np.ones((1, 8, 8, 1))),
            "text_embeddings": np.float32(texts),
        }
        optimizer = get_optimizer(1e-2, steps=steps, warmup_steps=3, decay="cosine", clip_norm=1.0)
        create = jax.jit(
            lambda key: create_train_state(key, network, optimizer, (8, 8, 4), embedding_shape)
        )
        state = create(jax.random.key(0))
        self.start = jax.device_get(state)
        train_step = get_train_step(network, optimizer, LatentScale(1.0), ema_decay=0.9)
        self.eval_step = get_eval_step(network, LatentScale(1.0))
        self.losses = []
        for _ in range(steps):
            state, metrics = train_step(state, jax.random.key(1), self.batch)
            self.losses.append(metrics["loss"])
        self.losses, self.state = jax.device_get(self.losses), state
        self.compilations = train_step._cache_size()

    def held_out_loss(self, state):
        return self.eval_step(state, jax.random.key(2), self.batch)


@pytest.fixture(scope="module")
def run():
    return Run(40, (6,))


def test_a_fresh_state_answers_zero_and_averages_start_at_the_weights(run):
    state = run.start
    assert state.step == 0 and state.step.dtype == np.int32
    np.testing.assert_array_equal(state.params["conv_out"]["kernel"], 0)
    chex.assert_trees_all_equal(state.ema_params, state.params)
    chex.assert_trees_all_equal(state.ema_batch_stats, state.batch_stats)
    # So the first loss is the mean of the latents' magnitudes.
    np.testing.assert_allclose(run.losses[0], np.abs(run.batch["latents_mean"]).mean(), rtol=1e-5)


def test_a_small_network_learns_a_toy_set(run):
    first, last = np.mean(run.losses[:5]), np.mean(run.losses[-5:])
    assert last < 0.4 * first
    assert run.compilations == 1


def test_the_averages_follow_weights_and_statistics(run):
    distance = jax.tree.map(
        lambda new, average, old: np.linalg.norm(new - average) <= np.linalg.norm(new - old),
        (run.state.params, run.state.batch_stats),
        (run.state.ema_params, run.state.ema_batch_stats),
        (run.start.params, run.start.batch_stats),
    )
    assert all(jax.tree.leaves(distance))


def test_tokens_dropout_and_bfloat16_train():
    fields = {"norm": "group", "scaled": True, "heads": 2, "dropout": 0.1, "dtype": "bfloat16"}
    run = Run(12, (3, 6), key_fraction=4, **fields)
    assert run.state.batch_stats == {}
    assert np.mean(run.losses[-3:]) < 0.8 * run.losses[0]
    assert run.held_out_loss(run.state) < 0.8 * run.held_out_loss(run.start)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(run.state.params))
