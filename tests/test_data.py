"""Latent caches are checked when they are opened, and read in batches."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from stand_ins import encode

from ldm_jax.data import default_cache, open_cache, partial_folder


@pytest.fixture
def cache(tmp_path):
    return open_cache(encode(tmp_path), verify=True)


# Opening.


def test_a_cache_of_other_encoders_is_refused(cache):
    assert open_cache(cache.folder, dict(name="renamed", sha256="aa"), dict(name="letters"))
    with pytest.raises(ValueError, match="vae .*'mean', .*'dd'.*got .*'mean', .*'aa'"):
        open_cache(cache.folder, dict(name="mean", sha256="dd"))
    with pytest.raises(ValueError, match="text_encoder .*'clip'.* got .*'letters'"):
        open_cache(cache.folder, text_identity=dict(name="clip", sha256=None))


def test_what_is_no_whole_cache_is_refused(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match="nowhere is not a latent cache.*make it with"):
        open_cache(tmp_path / "nowhere")
    partial_folder(tmp_path / "cut").mkdir()
    with pytest.raises(FileNotFoundError, match="cut is not a latent cache.*interrupted"):
        open_cache(tmp_path / "cut")


def test_damaged_files_are_named(cache):
    path = cache.folder / "latents_mean-00000-of-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert open_cache(cache.folder)
    with pytest.raises(ValueError, match="latents_mean-00000-of.* must have sha256 .* damaged"):
        open_cache(cache.folder, verify=True)
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match="latents_mean-.* must have 608 bytes, got 606: copy"):
        open_cache(cache.folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="latents_mean-00000-of-00001.npy is missing.*copy"):
        open_cache(cache.folder)


def test_a_manifest_that_does_not_fit_is_named(cache):
    path = cache.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    about = manifest["shards"][0]["files"]["split-00000-of-00001.npy"]
    about["dtype"] = "int64"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"split-.* must be int64 \[30\], got uint8 \[30\]"):
        open_cache(cache.folder).batch(0, 0, 4)
    path.write_text(json.dumps(manifest | {"format_version": 1}))
    with pytest.raises(ValueError, match="must have format_version 2, got 1: .* encode again"):
        open_cache(cache.folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        open_cache(cache.folder)


# Batches.


def literal_batch(examples, seed, k, batch_size):
    """Batch k by writing out all epochs up to it; in a batch each epoch's examples ascend."""
    stream, epoch = [], 0
    while len(stream) < (k + 1) * batch_size:
        bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
        order = np.random.Generator(bits).permutation(len(examples))
        stream += [(epoch, examples[i]) for i in order]
        epoch += 1
    return [example for _, example in sorted(stream[k * batch_size : (k + 1) * batch_size])]


@pytest.mark.parametrize("batch_size", [1, 7, 25, 60])
def test_batches_equal_a_literal_implementation_in_any_order(cache, batch_size):
    examples = [i for i in range(30) if i not in (4, 5, 6, 7, 8)]
    for k in (3, 0, 11, 4, 3):
        indices = cache.batch_indices(5, k, batch_size)
        assert indices.tolist() == literal_batch(examples, 5, k, batch_size)
        batch, expected = cache.batch(5, k, batch_size), cache.take(indices)
        for name in ("latents_mean", "latents_std", "text_embeddings"):
            np.testing.assert_array_equal(batch[name], expected[name])


def test_an_epoch_visits_every_training_example_once(cache):
    seen = np.concatenate([cache.batch_indices(0, k, 5) for k in range(5)])
    assert sorted(seen) == cache.examples("train").tolist()
    assert seen.tolist() != sorted(seen)
    assert seen[:5].tolist() != cache.batch_indices(1, 0, 5).tolist()


def test_examples_outside_the_cache_are_refused(cache):
    for wrong in (-1, 30):
        with pytest.raises(IndexError, match=f"must be from 0 to 29, got .*{wrong}"):
            cache.take([3, wrong])


def test_no_examples_are_empty_arrays(cache):
    assert {k: v.shape for k, v in cache.take([]).items()} == {
        "latents_mean": (0, 2, 2, 3),
        "latents_std": (0, 2, 2, 3),
        "text_embeddings": (0, 4),
    }
    assert cache.records([]) == []


def test_splits_are_read_in_order(cache):
    assert cache.examples("valid").tolist() == [4, 5, 6]
    assert cache.num_examples("valid") == 3
    assert set(cache.batch_indices(0, 0, 9, "valid")) == {4, 5, 6}


def test_wrong_batches_are_refused(cache):
    with pytest.raises(ValueError, match="split 'cell' must have examples, .* has .*'cell': 0"):
        cache.batch(0, 0, 4, split="cell")
    with pytest.raises(ValueError, match="split must be one of train, .* got 'validation'"):
        cache.num_examples("validation")
    for seed, k, batch_size in ((-1, 0, 4), (0, -1, 4), (0, 0, 0)):
        with pytest.raises(ValueError, match="requires seed >= 0, k >= 0 and batch_size >= 1"):
            cache.batch(seed, k, batch_size)


# Places.


def config(**data):
    data = dict(source="emoji", path="", cache="", styles=(), image_size=128) | data
    return ConfigDict(dict(data=data, encoders=dict(vae="bundled:emoji", text="use")))


def test_default_caches_have_readable_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path))
    caches = tmp_path / "caches"
    assert default_cache(config()) == caches / "emoji-128-bundled-emoji-use"
    styles = default_cache(config(styles=("noto", "twemoji")))
    assert styles == caches / "emoji-noto+twemoji-128-bundled-emoji-use"
    toned = default_cache(config(styles=("noto", "twemoji"), skin_tones=True))
    assert toned == caches / "emoji-noto+twemoji-tones-128-bundled-emoji-use"
    one, other = (default_cache(config(source="folder", path=f"/{x}/my cats")) for x in "ab")
    assert one.name.startswith("folder-cats-") and one.name.endswith("-128-bundled-emoji-use")
    assert one != other
    pair = default_cache(config(source="npy", path="a.npy,b.npy"))
    assert pair.name.startswith("npy-a.npy-") and pair.name.endswith("-bundled-emoji-use")


def test_a_cache_that_is_named_is_taken():
    assert default_cache(config(cache="/data/x")).as_posix() == "/data/x"


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="must be one of emoji, folder, npy, got 'hub'"):
        default_cache(config(source="hub"))
