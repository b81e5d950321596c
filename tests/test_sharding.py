"""Eight virtual devices give the numbers of one; batches arrive in order."""

import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.latents import LatentScale
from ldm_jax.sampler import Denoiser, get_diffuser, sample_seeds
from ldm_jax.sharding import batch_sharding, feed_batches, get_mesh, replicated, shard_batch
from ldm_jax.training import TrainState, get_eval_step, get_train_step
from ldm_jax.unet import get_network


def draw_batch(k=0, size=16):
    rng = np.random.default_rng(k)
    # The further down the batch, the brighter: no shard has the statistics of the whole.
    brightness = np.linspace(-1, 1, size)[:, None, None, None]
    return {
        "latents_mean": np.float32(brightness + 0.2 * rng.standard_normal((size, 8, 8, 4))),
        "latents_std": np.full((size, 8, 8, 4), 0.1, np.float32),
        "text_embeddings": rng.standard_normal((size, 6)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def runs():
    """For one device and for eight: state and losses after three steps, and what was compiled."""
    network = get_network(8, 1, 6, widths=(16, 32))
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 6))
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.float32(rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1]))),
        shapes["params"],
    )
    # Adam would divide the gradients that are rounding noise by themselves.
    optimizer = optax.sgd(0.05, momentum=0.9)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["batch_stats"])
    results = {}
    for devices in (1, 8):
        mesh = get_mesh(jax.devices()[:devices])
        state = TrainState(np.int32(0), params, zeros, params, zeros, optimizer.init(params))
        state = jax.jit(lambda s: s, out_shardings=replicated(mesh))(state)
        train_step = get_train_step(network, optimizer, LatentScale(2.0))
        losses = []
        for k in range(3):
            batch = shard_batch(mesh, draw_batch(k))
            state, metrics = train_step(state, jax.random.key(0), batch)
            losses.append(metrics)
        eval_step = get_eval_step(network, LatentScale(2.0))
        losses.append(eval_step(state, jax.random.key(1), batch))
        results[devices] = jax.device_get((state, losses)), train_step, state
    return results


def test_eight_devices_train_as_one_does(runs):
    (one, one_losses), _, _ = runs[1]
    (eight, eight_losses), _, _ = runs[8]
    assert one.step == eight.step == 3
    chex.assert_trees_all_close(eight_losses, one_losses, rtol=1e-4)
    for name in ("params", "ema_params"):
        chex.assert_trees_all_close(getattr(eight, name), getattr(one, name), atol=1e-4)


def test_batch_norms_have_the_statistics_of_the_whole_batch(runs):
    (one, _), _, _ = runs[1]
    (eight, _), _, _ = runs[8]
    chex.assert_trees_all_close(eight.batch_stats, one.batch_stats, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(eight.ema_batch_stats, one.ema_batch_stats, rtol=1e-4, atol=1e-6)


def test_the_weights_stay_whole_on_every_device_and_the_step_compiles_once(runs):
    _, train_step, state = runs[8]
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8
    assert train_step._cache_size() == 1


def test_a_picture_does_not_depend_on_the_number_of_devices(runs):
    network = get_network(8, 1, 6, widths=(16, 32))
    denoiser = Denoiser(network, runs[1][0][0].ema_variables)
    diffuser = get_diffuser(denoiser, diffusion_steps=8)
    seeds, labels = sample_seeds(range(8), (8, 8, 4)), draw_batch(size=8)["text_embeddings"]
    expected = diffuser.reverse_diffusion(seeds, labels)
    sharded = jax.device_put((seeds, labels), batch_sharding(get_mesh()))
    latents = diffuser.reverse_diffusion(*sharded)
    assert np.std(latents) > 0.05
    np.testing.assert_allclose(latents, expected, atol=1e-4)


def test_a_mesh_has_all_devices_or_those_given():
    assert dict(get_mesh().shape) == {"data": 8}
    assert get_mesh(jax.devices()[2:4]).devices.tolist() == jax.devices()[2:4]


def test_a_batch_is_split_over_the_devices_in_order():
    mesh, batch = get_mesh(), draw_batch()
    sharded = shard_batch(mesh, batch)
    chex.assert_trees_all_equal(jax.device_get(sharded), batch)
    for name, array in sharded.items():
        assert array.sharding == batch_sharding(mesh)
        for i, shard in enumerate(array.addressable_shards):
            assert shard.device == mesh.devices[i]
            np.testing.assert_array_equal(shard.data, batch[name][2 * i : 2 * i + 2])


@pytest.mark.parametrize(
    "batch",
    [{"a": np.zeros((12, 2))}, {"a": np.zeros((8, 2)), "b": np.zeros(16)}, {}],
)
def test_batches_that_cannot_be_split_are_refused(batch):
    with pytest.raises(ValueError, match="divisible by the 8 devices, got {"):
        shard_batch(get_mesh(), batch)


def get_batch(k):
    return {"k": np.full(8, k)}


def test_batches_arrive_in_order():
    batches = list(feed_batches(get_mesh(), get_batch, range(3, 9)))
    assert [int(batch["k"][0]) for batch in batches] == [3, 4, 5, 6, 7, 8]
    assert batches[0]["k"].sharding == batch_sharding(get_mesh())
    assert list(feed_batches(get_mesh(), get_batch, range(5, 5))) == []


def test_batches_are_read_ahead_but_not_far():
    read = []
    batches = feed_batches(get_mesh(), lambda k: read.append(k) or get_batch(k), range(50), ahead=2)
    next(batches)
    deadline = time.monotonic() + 10
    while len(read) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert read == [0, 1, 2, 3]  # One used, two waiting, one in the reader's hands.
    batches.close()


def test_an_error_is_raised_where_the_batch_would_have_come():
    def fail(k):
        if k == 2:
            raise OSError("the disk is gone")
        return get_batch(k)

    batches = feed_batches(get_mesh(), fail, range(5))
    assert [int(next(batches)["k"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_leaving_early_ends_the_reader():
    before = threading.active_count()
    batches = feed_batches(get_mesh(), get_batch, range(1000))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
