"""The train step against one written by hand in numpy, its keys and its refusals.

`Recorder` stands in for the network: its estimate is w x_t + b, so that the loss can be derived by
hand, and it hands out what it was given in place of statistics, so that no test has to know how the
step splits its key.
"""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.corruption import drop_labels
from ldm_jax.latents import LatentScale
from ldm_jax.noising import ForwardProcess, SignalRule
from ldm_jax.training import (
    TrainState,
    check_losses,
    create_train_state,
    get_eval_step,
    get_loss,
    get_optimizer,
    get_train_step,
)

BATCH = 64
SCALE = LatentScale(2.0)
PROCESS = ForwardProcess(SignalRule("convex"), "uniform", 1.5)


def draw_batch(embedding_shape=(6,), seed=0, size=BATCH):
    rng = np.random.default_rng(seed)
    return {
        "latents_mean": rng.uniform(-2.5, 2.5, (size, 4, 4, 2)).astype(np.float32),
        "text_embeddings": rng.standard_normal((size, *embedding_shape)).astype(np.float32),
    }


@dataclasses.dataclass
class Recorder:
    traces: int = 0

    def apply(self, variables, x_t, noise_levels, labels, *, train, mutable, rngs):
        self.traces += 1
        w, b = variables["params"]["w"], variables["params"]["b"]
        given = {"x_t": x_t, "noise_levels": noise_levels, "labels": labels}
        return w * x_t + b, {"batch_stats": given if train else {}}

    def create_state(self, optimizer, batch):
        def fresh():  # Its own buffers, for a donated state must not share any.
            return {"w": jnp.float32(0.7), "b": jnp.float32(-0.1)}

        def statistics():
            shape = batch["latents_mean"].shape
            return {
                "x_t": jnp.zeros(shape),
                "noise_levels": jnp.zeros(len(batch["latents_mean"])),
                "labels": jnp.zeros(batch["text_embeddings"].shape),
            }

        opt_state = optimizer.init(fresh())
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, fresh(), statistics(), fresh(), statistics(), opt_state)


@pytest.fixture(scope="module")
def recorded():
    """Four steps of Adam on the recorder: states (the first is the start) and metrics, as numpy."""
    recorder, batch = Recorder(), draw_batch()
    optimizer = get_optimizer(1e-2, steps=100)
    train_step = get_train_step(
        recorder, optimizer, SCALE, PROCESS, label_dropout=0.4, ema_decay=0.15
    )
    state = recorder.create_state(optimizer, batch)
    states, metrics = [jax.device_get(state)], []
    for _ in range(4):
        state, step_metrics = train_step(state, jax.random.key(0), batch)
        states.append(jax.device_get(state))
        metrics.append(step_metrics)
    return recorder, batch, states, metrics


def test_the_loss_is_the_mean_absolute_error_of_x_zero(recorded):
    _, batch, states, metrics = recorded
    x_zero = np.clip(batch["latents_mean"] / 2, -1, 1)
    for before, after, step_metrics in zip(states, states[1:], metrics):
        estimate = before.params["w"] * after.batch_stats["x_t"] + before.params["b"]
        loss = np.abs(estimate - x_zero).mean(dtype=np.float64)
        np.testing.assert_allclose(step_metrics["loss"], loss, rtol=1e-5)
        assert isinstance(step_metrics["loss"], jax.Array)


def test_the_noise_is_standard_and_mixed_by_the_process(recorded):
    _, batch, states, _ = recorded
    x_zero = np.clip(batch["latents_mean"] / 2, -1, 1)
    for state in states[1:]:
        a = state.batch_stats["noise_levels"][:, None, None, None]
        assert 0 <= a.min() and np.sin(1) < a.max() < np.sin(1.5)
        noise = ((state.batch_stats["x_t"] - (1 - a) * x_zero) / a)[a.ravel() > 0.05]
        np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.08)


def test_a_step_is_adam_on_the_gradient_derived_by_hand(recorded):
    _, batch, states, metrics = recorded
    x_zero = np.clip(batch["latents_mean"] / 2, -1, 1).astype(np.float64)
    moment, square = np.zeros(2), np.zeros(2)
    for t, (before, after) in enumerate(zip(states, states[1:]), start=1):
        x_t = after.batch_stats["x_t"].astype(np.float64)
        sign = np.sign(before.params["w"] * x_t + before.params["b"] - x_zero)
        gradient = np.array([(sign * x_t).mean(), sign.mean()])
        moment = 0.9 * moment + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        change = moment / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        for name, c in zip(("w", "b"), change):
            expected = before.params[name] - 1e-2 * c
            np.testing.assert_allclose(after.params[name], expected, rtol=1e-4)
        np.testing.assert_allclose(metrics[t - 1]["grad_norm"], np.linalg.norm(gradient), rtol=1e-4)


def test_the_averages_warm_up_and_cover_the_statistics(recorded):
    states = recorded[2]
    for step, (before, after) in enumerate(zip(states, states[1:])):
        decay = min(0.15, (1 + step) / (10 + step))  # 0.1, then 0.15
        for name in ("params", "batch_stats"):
            expected = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new,
                getattr(before, f"ema_{name}"),
                getattr(after, name),
            )
            chex.assert_trees_all_close(getattr(after, f"ema_{name}"), expected, atol=1e-6)
        assert after.step == step + 1
        assert after.ema_variables == {
            "params": after.ema_params,
            "batch_stats": after.ema_batch_stats,
        }


def test_the_network_sees_whole_labels_or_none(recorded):
    _, batch, states, _ = recorded
    for state in states[1:]:
        labels = state.batch_stats["labels"]
        kept = np.any(labels != 0, axis=1)
        np.testing.assert_array_equal(labels[kept], batch["text_embeddings"][kept])
        assert 0.4 < kept.mean() < 0.8


def test_each_step_has_its_own_noise_and_labels(recorded):
    first, second = (state.batch_stats for state in recorded[2][1:3])
    assert not np.any(first["x_t"] == second["x_t"])
    assert not np.any(first["noise_levels"] == second["noise_levels"])
    assert np.any(np.any(first["labels"] != 0, axis=1) != np.any(second["labels"] != 0, axis=1))


def test_all_steps_share_one_trace(recorded):
    assert recorded[0].traces == 1


@functools.cache
def get_sgd_step():
    return get_train_step(Recorder(), optax.sgd(0.1), SCALE, PROCESS)


def step_once(key=0, start=0, batch=None):
    """The state before, the state after, and the metrics of one step."""
    batch = draw_batch() if batch is None else batch
    state = Recorder().create_state(optax.sgd(0.1), batch).replace(step=jnp.int32(start))
    return state, *get_sgd_step()(state, jax.random.key(key), batch)


def test_the_same_key_and_step_give_the_same_bits():
    (_, first, _), (_, again, _) = step_once(key=3, start=7), step_once(key=3, start=7)
    chex.assert_trees_all_equal(first, again)
    for other in (step_once(key=4, start=7), step_once(key=3, start=8)):
        assert not np.any(other[1].batch_stats["x_t"] == first.batch_stats["x_t"])


def test_the_state_is_donated_and_the_batch_is_not():
    batch = jax.tree.map(jnp.asarray, draw_batch())
    before, after, _ = step_once(batch=batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, batch)))


def test_jit_changes_nothing():
    jitted = step_once()[1:]
    with jax.disable_jit():
        chex.assert_trees_all_close(step_once()[1:], jitted, rtol=1e-4, atol=1e-5)


def test_half_precision_batches_train_in_float32():
    half = jax.tree.map(np.float16, draw_batch())
    single = jax.tree.map(np.float32, half)
    results = [step_once(batch=batch)[1:] for batch in (half, single)]
    chex.assert_trees_all_equal(*results)


def test_fresh_latents_are_drawn_from_the_moments_at_each_step():
    batch = draw_batch()
    spread = {"latents_std": np.full_like(batch["latents_mean"], 0.5)}
    exact, drawn, later = (
        step_once(batch=b, start=s)[1].batch_stats
        for b, s in [(batch, 0), (batch | spread, 0), (batch | spread, 1)]
    )
    # The same step has the same noise and levels, so what differs is the latents.
    np.testing.assert_array_equal(exact["noise_levels"], drawn["noise_levels"])
    signal = 1 - drawn["noise_levels"][:, None, None, None]
    inside = np.abs(batch["latents_mean"]) < 0.5  # Far from where the scale clips, for most draws.
    moved = ((drawn["x_t"] - exact["x_t"]) / signal)[inside]
    np.testing.assert_allclose([moved.mean(), moved.std()], [0, 0.25], atol=0.03)
    assert not np.any(later["x_t"] == drawn["x_t"])


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_labels_are_dropped_whole_at_their_rate(shape):
    labels = 1 + np.random.default_rng(0).uniform(size=(20_000, *shape)).astype(np.float32)
    dropped = np.asarray(jax.jit(drop_labels)(jax.random.key(0), labels, 0.15))
    is_zero = (dropped == 0).reshape(20_000, -1)
    np.testing.assert_array_equal(is_zero.any(1), is_zero.all(1))
    np.testing.assert_array_equal(dropped[~is_zero.all(1)], labels[~is_zero.all(1)])
    assert abs(is_zero.all(1).mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 20_000)
    np.testing.assert_array_equal(drop_labels(jax.random.key(0), labels, 0.0), labels)


def test_the_held_out_loss_is_that_of_the_averages_and_repeats():
    recorder, batch = Recorder(), draw_batch()
    state = recorder.create_state(optax.sgd(0.1), batch)
    state = state.replace(ema_params={"w": jnp.float32(0.0), "b": jnp.float32(0.25)})
    eval_step = get_eval_step(recorder, SCALE, PROCESS)
    loss = eval_step(state, jax.random.key(0), batch)
    expected = np.abs(0.25 - np.clip(batch["latents_mean"] / 2, -1, 1)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    state = state.replace(ema_params=state.params)
    losses = [eval_step(state, jax.random.key(i), batch) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_held_out_labels_are_never_dropped():
    batch, given = draw_batch(), []
    network = types.SimpleNamespace(
        apply=lambda variables, x_t, noise_levels, labels, **_: (given.append(labels) or x_t, {})
    )
    loss_fn = get_loss(network, SCALE, PROCESS)
    loss_fn({}, {}, jax.random.key(0), batch)
    loss_fn = get_loss(network, SCALE, PROCESS, label_dropout=0.9, train=True)
    loss_fn({}, {}, jax.random.key(0), batch)
    np.testing.assert_array_equal(given[0], batch["text_embeddings"])
    assert np.mean(given[1] == 0) > 0.7


def test_a_fresh_state_can_be_donated():
    network = types.SimpleNamespace(
        init=lambda *_: {"params": {"w": jnp.float32(0.5), "b": jnp.float32(0.0)}}
    )
    state = create_train_state(jax.random.key(0), network, optax.sgd(0.1), (4, 4, 2), (6,))
    assert state.step == 0 and state.step.dtype == np.int32 and state.batch_stats == {}
    chex.assert_trees_all_equal(state.ema_params, state.params)
    # A buffer cannot be donated twice, so the averages must not be the weights themselves.
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers) == 5


def test_a_loss_that_is_no_number_names_its_step_and_the_window():
    check_losses(np.array([0.5, 0.4]), last_step=20)
    for value in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match=rf"{value} at step 18 \(steps 17 to 20 were"):
            check_losses(np.array([0.5, value, 0.1, value]), last_step=20)


@pytest.mark.parametrize(
    "create, message",
    [
        (
            lambda: get_train_step(Recorder(), optax.sgd(0.1), SCALE, label_dropout=1.0),
            r"label_dropout must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda: get_train_step(Recorder(), optax.sgd(0.1), SCALE, ema_decay=-0.1),
            r"ema_decay must lie in \[0, 1\), got -0.1",
        ),
        (
            lambda: get_train_step(Recorder(), optax.sgd(0.1), SCALE, translation=1.1),
            r"translation must lie in \[0, 1\], got 1.1",
        ),
        # Optax would turn every gradient round.
        (
            lambda: get_optimizer(steps=2, clip_norm=-1.0),
            r"clip_norm must lie in \[0, inf\), got -1",
        ),
        (lambda: get_optimizer(np.nan, steps=2), r"learning_rate must lie in \[0, inf\), got nan"),
        (lambda: get_optimizer(steps=2, b2=1.0), r"b2 must lie in \[0, 1\), got 1.0"),
        (lambda: get_optimizer(steps=0), "steps must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(create, message):
    with pytest.raises(ValueError, match=message):
        create()
