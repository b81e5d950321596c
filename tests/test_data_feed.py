"""The benchmark of the data feed at toy size: what it writes, reads and reports; never how fast."""

from pathlib import Path

import numpy as np
import pytest

from ldm_jax.data import open_cache


@pytest.fixture
def data_feed(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import data_feed

    return data_feed


@pytest.mark.parametrize("std", [False, True])
def test_the_rows_of_a_batch_hold_the_numbers_of_its_examples(tmp_path, data_feed, std):
    cache = open_cache(data_feed.write_cache(tmp_path / "c", 700, std, 64), verify=True)
    assert len(cache.manifest["shards"]) == 11
    assert cache.manifest["counts"] == dict(train=693, valid=7, test=0, cell=0)
    for k in (0, 9, 25):
        batch, indices = cache.batch(0, k, 48, dtype=np.float16), cache.batch_indices(0, k, 48)
        names = {"latents_mean", "text_embeddings"} | ({"latents_std"} if std else set())
        assert set(batch) == names
        for array in batch.values():
            np.testing.assert_array_equal(data_feed.read_marks(array), indices)
    assert cache.examples("valid").tolist() == list(range(0, 700, 100))


def test_marks_are_exact_for_ten_million_rows(data_feed):
    numbers = np.array([0, 2047, 2048, 9_999_999, 2**33 - 1])
    marked = data_feed.mark_rows(np.ones((9, 2, 3), np.float16), numbers)
    assert data_feed.read_marks(marked).tolist() == numbers.tolist()


@pytest.mark.slow
def test_the_figures_are_measured_and_the_caches_removed(tmp_path, data_feed, capsys):
    found = data_feed.run(tmp_path, [300, 700], batch_size=32, seconds=0.01, shard_size=64)
    assert [figures["records"] for figures in found] == [300, 700]
    rates = {"cold", "warm", "middle", "window", "hosts_cold", "hosts_warm", "epoch"}
    for figures in found:
        assert set(figures) == rates | {"records", "bytes", "disk", "first", "peak", "private"}
        assert all(value > 0 for value in figures.values())
        assert figures["bytes"] > 3072 * figures["records"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in (lines[0], *lines[2:])] == ["records", "300", "700"]
    assert {line.count("|") for line in lines} == {14}
    assert list(tmp_path.iterdir()) == []
