"""Caches of many shards: the order of their batches, what each host reads, files that are missing.

Expected batches come from a literal implementation that writes out every epoch.
"""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from stand_ins import encode, make_pictures

from ldm_jax import order, shards
from ldm_jax.data import open_cache

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LARGE = ("latents_mean", "latents_std", "text_embeddings")


@pytest.fixture
def cache(tmp_path):
    """Twenty pictures of 30 examples, 25 of them to train on, in ten shards."""
    return open_cache(encode(tmp_path, chunk_size=2, shard_size=2))


@pytest.fixture
def write_cache(monkeypatch):
    """Writes noise whose rows hold their numbers, without encoders; every hundredth held out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import data_feed

    return data_feed.write_cache


def count_maps(folder):
    """The files of a folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line for line in lines)


def draw(seed, epoch, word, n):
    key, counter = (np.array(x, np.uint64) for x in ([seed, epoch], [0, 0, 0, word]))
    bits = np.random.Philox(key=key, counter=counter)
    return np.random.Generator(bits).permutation(n)


def literal_epoch(by_shard, seed, epoch):
    """Window and example of each place of an epoch, from the examples of each shard."""
    places = []
    shuffled = draw(seed, epoch, 2**64 - 1, len(by_shard)).tolist()
    for window in range(-(-len(shuffled) // 4)):
        examples = []
        for shard in sorted(shuffled[4 * window : 4 * window + 4]):
            examples += by_shard[shard]
        order = draw(seed, epoch, window, len(examples))
        places += [((epoch, window), examples[i]) for i in order]
    return places


def literal_batch(by_shard, seed, k, batch_size):
    """Batch k: its places of all epochs in a row, and within each window ascending."""
    epochs = range((k + 1) * batch_size // sum(map(len, by_shard)) + 1)
    places = [place for epoch in epochs for place in literal_epoch(by_shard, seed, epoch)]
    return [example for _, example in sorted(places[k * batch_size : (k + 1) * batch_size])]


def examples_by_shard(shard_size):
    """The training examples of the stand-in pictures, of which odd ones have two captions."""
    by_shard, example = [], 0
    for i in range(20):
        if i % shard_size == 0:
            by_shard.append([])
        for _ in range(1 + i % 2):
            if i not in (3, 4, 5):
                by_shard[-1].append(example)
            example += 1
    return by_shard


# Order.


@pytest.mark.parametrize("shard_size", [1, 2, 4, 6, 20])
def test_order_equals_a_literal_implementation(tmp_path, shard_size):
    cache = open_cache(encode(tmp_path, chunk_size=shard_size, shard_size=shard_size))
    by_shard = examples_by_shard(shard_size)
    assert len(cache.manifest["shards"]) == len(by_shard)
    for batch_size, k in itertools.product((1, 7, 25, 60), (3, 0, 11, 3)):
        expected = literal_batch(by_shard, 5, k, batch_size)
        assert cache.batch_indices(5, k, batch_size).tolist() == expected


@pytest.mark.parametrize("shard_size", [1, 2, 4, 6, 20])
def test_an_epoch_of_any_number_of_shards_visits_every_example_once(tmp_path, shard_size):
    cache = open_cache(encode(tmp_path, chunk_size=shard_size, shard_size=shard_size))
    for epoch in range(3):
        batches = range(5 * epoch, 5 * epoch + 5)
        seen = np.concatenate([cache.batch_indices(1, k, 5) for k in batches])
        assert sorted(seen) == cache.examples("train").tolist()


def test_epochs_and_windows_have_orders_of_their_own():
    epochs = [order.order_epoch(0, epoch, (5,) * 12) for epoch in range(3)]
    assert len({str(epoch.windows) for epoch in epochs}) == 3
    drawn = {tuple(order.draw_permutation(0, e, w, 20)) for e in range(3) for w in range(4)}
    assert len(drawn) == 12


def test_windows_without_examples_are_passed_over():
    counts = (0,) * 9 + (3,)
    for epoch in range(5):
        places = [order.locate_batch(0, k, 1, counts) for k in range(3 * epoch, 3 * epoch + 3)]
        assert [(part.epoch, part.start) for (part,) in places] == [(epoch, i) for i in range(3)]
    with pytest.raises(ValueError, match="requires examples, got none"):
        order.locate_batch(0, 0, 4, (0, 0))


# Content.


def test_shards_and_one_shard_hold_the_same_content(tmp_path, cache):
    whole = open_cache(encode(tmp_path, "whole"))
    assert len(cache.manifest["shards"]) == 10 and len(whole.manifest["shards"]) == 1
    scattered = np.random.default_rng(0).permutation(30)
    for indices in (range(30), scattered, scattered[:3]):
        one, other = cache.take(indices), whole.take(indices)
        for name in LARGE:
            np.testing.assert_array_equal(one[name], other[name])
        assert cache.records(indices) == whole.records(indices)
        assert cache.pictures(indices).tolist() == whole.pictures(indices).tolist()
    for split in ("train", "valid", "test", "cell"):
        assert cache.examples(split).tolist() == whole.examples(split).tolist()
        assert cache.num_examples(split) == whole.num_examples(split)
    for name in ("std_latent", "channel_mean", "channel_std"):
        np.testing.assert_allclose(cache.manifest[name], whole.manifest[name], rtol=1e-12)


def test_up_to_a_window_of_shards_the_batches_are_those_of_one_shard(tmp_path):
    caches = [open_cache(encode(tmp_path, f"{n}", shard_size=n, chunk_size=n)) for n in (5, 20)]
    assert [len(cache.manifest["shards"]) for cache in caches] == [4, 1]
    for k in range(9):
        batches = [cache.batch(3, k, 7) for cache in caches]
        for name in LARGE:
            np.testing.assert_array_equal(batches[0][name], batches[1][name])


def test_a_shard_without_a_readable_picture_is_left_out(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", broken=range(6, 13))
    cache = open_cache(encode(tmp_path, pictures=pictures, chunk_size=2, shard_size=4))
    assert [about["pictures"] for about in cache.manifest["shards"]] == [4, 2, 3, 4]
    files = [record["file"] for record in cache.records(range(20))]
    assert sorted(set(files)) == [f"{i:02d}.png" for i in (*range(6), *range(13, 20))]


# Hosts.


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_disjoint_rows_that_make_the_same_batch(cache, hosts):
    for k in range(6):
        whole = cache.batch(0, k, 8)
        parts = [
            cache.batch(0, k, 8, rows=slice(8 * h // hosts, 8 * (h + 1) // hosts))
            for h in range(hosts)
        ]
        for name in LARGE:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])
    rows = np.array([6, 1])
    np.testing.assert_array_equal(
        cache.batch(0, 2, 8, rows=rows)["latents_mean"], cache.batch(0, 2, 8)["latents_mean"][rows]
    )


def test_each_host_asks_for_its_part_of_the_files_and_of_the_next_window(
    tmp_path, monkeypatch, write_cache
):
    folder = write_cache(tmp_path / "cache", 2000, shard_size=100)
    asked = []
    monkeypatch.setattr(shards, "_advise", asked.extend)
    for host in range(2):
        cache = open_cache(folder)
        cache.batch(0, 0, 200, rows=slice(100 * host, 100 * host + 100))
        cache._read_ahead._pool.shutdown()
        windows = order.order_epoch(0, 0, (99,) * 20).windows[:2]
        spans = {path.name: (start, stop) for path, start, stop in asked}
        asked.clear()
        # By hand: half of four shards is two of them, and 3 x 0.5 / sqrt(200) of four is 0.42.
        for window in windows:
            near, far = (window[:2], window[2:]) if host == 0 else (window[2:], window[:2])
            for shard in near:
                for name in ("latents_mean", "text_embeddings"):
                    assert spans.pop(f"{name}-{shard:05d}-of-00020.npy") == (0.0, 1.0)
            shard, expected = (far[0], (0, 0.424)) if host == 0 else (far[1], (0.576, 1))
            for name in ("latents_mean", "text_embeddings"):
                found = spans.pop(f"{name}-{shard:05d}-of-00020.npy")
                assert found == pytest.approx(expected, abs=1e-3)
        assert not spans


def test_nothing_is_asked_for_a_held_out_split(tmp_path, monkeypatch, write_cache):
    asked = []
    monkeypatch.setattr(shards, "_advise", asked.extend)
    cache = open_cache(write_cache(tmp_path / "cache", 2000, shard_size=500))
    cache.batch(0, 0, 10, "valid")
    cache._read_ahead._pool.shutdown()
    assert asked == []


# Files and memory.


def test_a_missing_shard_is_named(cache):
    path = cache.folder / "text_embeddings-00003-of-00010.npy"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing.* encode again"):
        open_cache(cache.folder)
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
        cache.take(range(30))
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{path.name} must have {len(content)} bytes, got"):
        open_cache(cache.folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{path.name} must have sha256 .*damaged: copy the file"):
        open_cache(cache.folder, verify=True)


def test_a_picture_outside_its_shard_is_named(cache):
    path = cache.folder / "picture_index-00003-of-00010.npy"
    content = np.load(path)
    np.save(path, content + 2)
    with pytest.raises(ValueError, match=f"{path.name} must be below 2, got up to 3"):
        cache.take(range(30))


def test_few_maps_are_open_at_a_time(tmp_path, write_cache):
    cache = open_cache(write_cache(tmp_path / "cache", 4000, shard_size=100))
    assert count_maps(cache.folder) == 0
    most = 0
    for k in range(100):
        cache.batch(0, k, 64)
        most = max(most, count_maps(cache.folder))
    # Two windows of four shards, four arrays each.
    assert 0 < most <= 2 * 4 * 4


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path, write_cache):
    def peak(cache):
        cache.batch(0, 0, 64)  # Modules are imported, tables of the shards are made.
        tracemalloc.start()
        for k in range(cache.num_examples() // 64):
            cache.batch(0, k, 64)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = (
        peak(open_cache(write_cache(tmp_path / str(n), n, shard_size=100))) for n in (4000, 16_000)
    )
    # A list of the examples would be eight bytes for each, 96 kB more; tables of 120 more shards
    # take some of the half of it that is allowed here.
    assert many < few + 48_000
