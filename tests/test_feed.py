"""Batches arrive on the mesh in order, each device with its own rows."""

import threading
import time

import chex
import jax
import numpy as np
import pytest

from ldm_jax.feed import feed_batches, local_rows, shard_batch
from ldm_jax.sharding import batch_sharding, get_mesh


def draw_batch(size=16):
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((size, 8, 4)), "b": rng.integers(0, 9, (size,))}


@pytest.mark.parametrize("layout", ["data", "data=2,fsdp=4", "fsdp"])
def test_a_batch_is_split_over_the_devices_in_order(layout):
    mesh, batch = get_mesh(layout), jax.tree.map(np.float32, draw_batch())
    np.testing.assert_array_equal(local_rows(mesh, 16), np.arange(16))
    sharded = shard_batch(mesh, batch)
    chex.assert_trees_all_equal(jax.device_get(sharded), batch)
    places = {device: i for i, device in enumerate(mesh.devices.flat)}
    for name, array in sharded.items():
        assert array.sharding == batch_sharding(mesh)
        for shard in array.addressable_shards:
            i = places[shard.device]
            np.testing.assert_array_equal(shard.data, batch[name][2 * i : 2 * i + 2])


@pytest.mark.parametrize(
    "batch, size, message",
    [
        ({"a": np.zeros((12, 2))}, None, "divisible by the 8 devices, got 12"),
        ({"a": np.zeros((0, 2))}, None, "divisible by the 8 devices, got 0"),
        ({"a": np.zeros((8, 2)), "b": np.zeros(16)}, None, "same number .* {'a': 8, 'b': 16}"),
        ({}, None, "same number of samples everywhere, got {}"),
        ({"a": np.zeros(8)}, 16, "this host needs 16 of 16 samples, got 8"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(batch, size, message):
    with pytest.raises(ValueError, match=message):
        shard_batch(get_mesh(), batch, size)


def get_rows(k, rows):
    return {"k": np.full(8, k)}


def test_batches_arrive_in_order():
    batches = list(feed_batches(get_mesh(), get_rows, range(3, 9), 8))
    assert [int(batch["k"][0]) for batch in batches] == [3, 4, 5, 6, 7, 8]
    assert batches[0]["k"].sharding == batch_sharding(get_mesh())
    assert list(feed_batches(get_mesh(), get_rows, range(5, 5), 8)) == []


def test_batches_are_read_ahead_but_not_far():
    mesh, read = get_mesh(), []

    def note(k, rows):
        read.append(k)
        return get_rows(k, rows)

    batches = feed_batches(mesh, note, range(50), 8, ahead=2)
    next(batches)
    deadline = time.monotonic() + 10
    while len(read) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert read == [0, 1, 2, 3]  # One used, two waiting, one in the reader's hands.
    batches.close()


def test_an_error_is_raised_where_the_batch_would_have_come():
    def fail(k, rows):
        if k == 2:
            raise OSError("the disk is gone")
        return get_rows(k, rows)

    batches = feed_batches(get_mesh(), fail, range(5), 8)
    assert [int(next(batches)["k"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_leaving_early_ends_the_reader():
    before = threading.active_count()
    batches = feed_batches(get_mesh(), get_rows, range(1000), 8)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
