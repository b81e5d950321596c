"""The scripts that show and look up drawn pictures: what they choose, place and count."""

from pathlib import Path

import numpy as np
import pytest

from ldm_jax.cache_files import ShardRows, begin_cache, finish_cache
from ldm_jax.data import open_cache

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import contact_sheet
    import measure_retrieval

    return contact_sheet, measure_retrieval


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


def test_the_first_caption_of_each_picture_is_chosen_once_in_the_seeds_order(scripts, cache):
    sheet, _ = scripts
    chosen = sheet.choose_examples(cache, "train", 4, seed=3)
    assert sorted(chosen) == [0, 2, 4, 6]
    assert list(sheet.choose_examples(cache, "train", 2, seed=3)) == list(chosen[:2])
    assert any(
        list(sheet.choose_examples(cache, "train", 4, seed)) != list(chosen) for seed in range(4, 9)
    )
    assert sorted(sheet.choose_examples(cache, "test", 10, seed=0)) == [8, 10]


def test_a_split_that_does_not_exist_is_refused(scripts, cache):
    with pytest.raises(ValueError, match="split must be one of"):
        scripts[0].choose_examples(cache, "training", 1, seed=0)


def test_the_sheet_shows_drawn_and_real_side_by_side_group_by_group(scripts):
    sheet, _ = scripts
    drawn = np.arange(3, dtype=np.uint8)[:, None, None, None] + np.full((3, 32, 32, 3), 50, "uint8")
    groups = [sheet.Group(name, ["piñata"] * 3, drawn, drawn + 100) for name in ("one", "two")]
    pixels = sheet.compose_sheet(groups, columns=2)
    across, down = 2 * 32 + 2 * sheet.GAP, 32 + 2 * sheet.LINE_HEIGHT + sheet.GAP
    group_height = sheet.TITLE_HEIGHT + 2 * down
    assert pixels.shape == (2 * group_height + sheet.GAP, 2 * across + sheet.GAP, 3)
    for top in (sheet.GAP + sheet.TITLE_HEIGHT, sheet.GAP + sheet.TITLE_HEIGHT + group_height):
        for i, (y, x) in enumerate([(0, 0), (0, across), (down, 0)]):
            place = pixels[top + y : top + y + 32, sheet.GAP + x : sheet.GAP + x + 64]
            assert (place[:, :32] == 50 + i).all() and (place[:, 32:] == 150 + i).all()


def test_recall_counts_the_concept_within_the_style_and_the_style_among_all(scripts):
    _, retrieval = scripts
    # By hand: real pictures are unit vectors of a plane, at these angles.
    angles = np.radians([0, 10, 20, 30, 90])
    records = [
        {"concept": concept, "style": style}
        for concept, style in [("a", "s"), ("b", "t"), ("b", "s"), ("c", "s"), ("d", "t")]
    ]
    plane = np.stack([np.cos(angles), np.sin(angles)], 1)
    gallery = retrieval.Gallery(plane, np.zeros(2), records)
    # The first is nearest to its own concept; the second to "a" of its style, then to its own,
    # and to another style among all; the third's concept is not drawn in its style.
    queries = np.radians([1, 9, 31])
    features = np.stack([np.cos(queries), np.sin(queries)], 1)
    wanted = [
        {"concept": "a", "style": "s"},
        {"concept": "b", "style": "s"},
        {"concept": "d", "style": "s"},
    ]
    measured = retrieval.measure_group(features, wanted, gallery)
    assert measured == pytest.approx(
        {"n": 3, "recall_1": 1 / 3, "recall_5": 2 / 3, "right_style": 2 / 3}
    )


def test_unit_features_are_centred_and_of_length_one(scripts):
    features = scripts[1].to_unit(np.array([[4.0, 5.0]]), np.array([1.0, 1.0]))
    assert np.allclose(features, [[0.6, 0.8]])
