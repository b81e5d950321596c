"""The script that shows drawn pictures: what it chooses; and where a sheet of pairs puts them."""

from pathlib import Path

import numpy as np
import pytest

from ldm_jax import plotting
from ldm_jax.cache_files import ShardRows, begin_cache, finish_cache
from ldm_jax.data import open_cache

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def sheet(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import contact_sheet

    return contact_sheet


@pytest.fixture
def cache(tmp_path):
    """Six pictures of two captions each, in two shards; the last two are of split "test"."""
    latents = np.random.default_rng(0).normal(size=(6, 2, 2, 3)).astype(np.float16)

    def get_shard(start):
        splits = ["test" if start + i // 2 >= 4 else "train" for i in range(6)]
        arrays = {
            "latents_mean": (3, [latents[start : start + 3]]),
            "text_embeddings": (6, [np.zeros((6, 4), np.float16)]),
        }
        return ShardRows([dict(split=split) for split in splits], [0, 0, 1, 1, 2, 2], arrays)

    about = dict(vae=dict(name="vae", sha256=None), text_encoder=dict(name="text", sha256=None))
    begin_cache(tmp_path / "cache", about, needed=0)
    return open_cache(finish_cache(tmp_path / "cache", map(get_shard, (0, 3)), 2, about))


def test_the_first_caption_of_each_picture_is_chosen_once_in_the_seeds_order(sheet, cache):
    chosen = sheet.choose_examples(cache, "train", 4, seed=3)
    assert sorted(chosen) == [0, 2, 4, 6]
    assert list(sheet.choose_examples(cache, "train", 2, seed=3)) == list(chosen[:2])
    assert any(
        list(sheet.choose_examples(cache, "train", 4, seed)) != list(chosen) for seed in range(4, 9)
    )
    assert sorted(sheet.choose_examples(cache, "test", 10, seed=0)) == [8, 10]


def test_a_split_that_does_not_exist_is_refused(sheet, cache):
    with pytest.raises(ValueError, match="split must be one of"):
        sheet.choose_examples(cache, "training", 1, seed=0)


def test_the_sheet_shows_drawn_and_real_side_by_side_group_by_group():
    drawn = np.arange(3, dtype=np.uint8)[:, None, None, None] + np.full((3, 32, 32, 3), 50, "uint8")
    groups = [plotting.Pairs(name, ["piñata"] * 3, drawn, drawn + 100) for name in ("one", "two")]
    pixels = plotting.compose_pairs(groups, columns=2)
    across, down = 2 * 32 + 2 * plotting.PAIR_GAP, 32 + 2 * plotting.LINE_HEIGHT + plotting.PAIR_GAP
    group_height = plotting.TITLE_HEIGHT + 2 * down
    assert pixels.shape == (2 * group_height + plotting.PAIR_GAP, 2 * across + plotting.PAIR_GAP, 3)
    for top in (
        plotting.PAIR_GAP + plotting.TITLE_HEIGHT,
        plotting.PAIR_GAP + plotting.TITLE_HEIGHT + group_height,
    ):
        for i, (y, x) in enumerate([(0, 0), (0, across), (down, 0)]):
            place = pixels[
                top + y : top + y + 32, plotting.PAIR_GAP + x : plotting.PAIR_GAP + x + 64
            ]
            assert (place[:, :32] == 50 + i).all() and (place[:, 32:] == 150 + i).all()
