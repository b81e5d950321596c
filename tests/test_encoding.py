"""Pictures, or a pair of .npy files, become latent caches: values, resuming, broken input."""

import os

import numpy as np
import pytest
from PIL import Image
from stand_ins import LetterEncoder, MeanVAE, contents, encode, make_pictures

from ldm_jax import encoding
from ldm_jax.data import open_cache, partial_folder
from ldm_jax.encoding import from_npy_pair
from ldm_jax.pictures import SPLITS


@pytest.fixture
def cache(tmp_path):
    return open_cache(encode(tmp_path), verify=True)


def test_cache_holds_the_moments_and_embeddings_of_every_caption(tmp_path, cache):
    pictures = make_pictures(tmp_path / "again")
    images = np.stack([np.asarray(Image.open(picture.path)) for picture in pictures])
    mean, std = MeanVAE().encode(images)
    examples = [(i, text) for i, picture in enumerate(pictures) for text in picture.captions]
    batch = cache.take(np.arange(len(examples)))
    index = [i for i, _ in examples]
    np.testing.assert_array_equal(batch["latents_mean"], mean[index].astype(np.float16))
    np.testing.assert_array_equal(batch["latents_std"], std[index].astype(np.float16))
    letters = [[text.count(letter) for letter in "abcd"] for _, text in examples]
    np.testing.assert_array_equal(batch["text_embeddings"], letters)
    assert all(array.dtype == np.float32 for array in batch.values())
    assert cache.take([0], np.float16)["latents_mean"].dtype == np.float16
    assert cache.captions([0, 2, 1]) == ["abba", "d", "abba"]
    record = dict(caption="ddd", file="03.png", split="valid", concept="concept 3", style="noise")
    assert cache.records([5]) == [record]


def test_manifest_says_what_the_cache_is(tmp_path, cache):
    manifest = cache.manifest
    assert manifest["vae"] == dict(name="mean", sha256="aa")
    assert manifest["text_encoder"] == dict(name="letters", sha256="bb")
    assert cache.latent_shape == (2, 2, 3)
    assert cache.embedding_shape == (4,)
    assert manifest["pictures"] == 20
    assert manifest["counts"] == dict(train=25, valid=3, test=2, cell=0)
    assert manifest["skipped"] == []
    assert not partial_folder(cache.folder).exists()


def test_each_distinct_caption_is_embedded_once(tmp_path):
    text = LetterEncoder()
    encode(tmp_path, text=text)
    assert text.seen == ["abba", *("d" * i for i in range(1, 20, 2))]


@pytest.mark.parametrize("shard_size", [6, 13, 100])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path, shard_size):
    pictures = make_pictures(tmp_path / "pictures", broken=(1, 13))
    whole = contents(encode(tmp_path, "whole", pictures, shard_size=shard_size))
    with pytest.raises(RuntimeError, match="power"):
        encode(tmp_path, "cut", pictures, vae=MeanVAE(fail_at=2), shard_size=shard_size)
    assert not (tmp_path / "cut").exists()
    rest, text = MeanVAE(), LetterEncoder()
    resumed = contents(
        encode(tmp_path, "cut", pictures, vae=rest, text=text, shard_size=shard_size)
    )
    assert rest.calls == 3  # Of four chunks; the first was kept.
    assert text.seen == []
    assert resumed == whole


def test_broken_pictures_are_named_skipped_and_counted(tmp_path, caplog):
    pictures = make_pictures(tmp_path / "pictures", broken=(0, 7))
    pictures[9].path.unlink()
    Image.new("RGB", (1, 1)).save(pictures[11].path)
    with pytest.raises(FileNotFoundError, match="09.png"):
        encode(tmp_path, pictures=pictures)
    pictures.pop(9)
    cache = open_cache(encode(tmp_path, pictures=pictures))
    skipped = {entry["file"]: entry["error"] for entry in cache.manifest["skipped"]}
    assert list(skipped) == ["00.png", "07.png", "11.png"]
    assert all(f"skipped {tmp_path}/pictures/{file}: it " in caplog.text for file in skipped)
    assert "cannot be read" in skipped["00.png"]
    assert skipped["11.png"] == "must be at least 8 pixels wide and high, got 1x1"
    assert cache.manifest["pictures"] == 16
    files = [
        record["file"] for record in cache.records(range(sum(cache.manifest["counts"].values())))
    ]
    assert not set(skipped) & set(files)
    pictures_of_files = cache.pictures(range(len(files))).tolist()
    assert pictures_of_files == [sorted(set(files)).index(file) for file in files]


def test_a_chunk_of_broken_pictures_leaves_the_others(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", broken=range(6, 12))
    cache = open_cache(encode(tmp_path, pictures=pictures))
    assert cache.manifest["pictures"] == 14


def test_a_decompression_bomb_is_skipped(tmp_path, monkeypatch):
    pictures = make_pictures(tmp_path / "pictures")
    Image.new("RGB", (100, 100)).save(pictures[2].path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (skipped,) = open_cache(encode(tmp_path, pictures=pictures)).manifest["skipped"]
    assert skipped["file"] == "02.png"
    assert "is too large" in skipped["error"]


def test_a_source_of_broken_pictures_only_is_refused(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", n=3, broken=(0, 1, 2))
    with pytest.raises(ValueError, match="none of 3 pictures can be read; 00.png cannot be read"):
        encode(tmp_path, pictures=pictures)
    assert os.listdir(tmp_path) == ["pictures"]


def test_an_image_size_that_the_vae_cannot_halve_is_refused(tmp_path):
    with pytest.raises(ValueError, match="image_size must be divisible by 8 .* got 20"):
        encode(tmp_path, image_size=20)


@pytest.mark.parametrize("value", [70_000, np.nan, -np.inf])
def test_latents_that_do_not_fit_float16_are_refused(tmp_path, monkeypatch, value):
    vae = MeanVAE()
    monkeypatch.setattr(vae, "encode", lambda images: (np.full((6, 2, 2, 3), value),) * 2)
    with pytest.raises(ValueError, match="latents of .*00.png .* finite and at most 65504, got"):
        encode(tmp_path, vae=vae)
    assert not (tmp_path / "cache").exists()


# A pair of .npy files.


def save_pair(folder, latents, embeddings):
    folder.mkdir(exist_ok=True)
    paths = folder / "latents.npy", folder / "text_embeddings.npy"
    for path, array in zip(paths, (latents, embeddings)):
        np.save(path, array)
    return paths


def random_pair(n=200):
    rng = np.random.default_rng(0)
    return rng.normal(0, 4, (n, 2, 2, 3)).astype(np.float32), rng.normal(0, 1, (n, 5))


@pytest.mark.parametrize("shard_size", [90, 200])
def test_an_npy_pair_is_copied_and_split_by_row(tmp_path, monkeypatch, shard_size):
    monkeypatch.setattr(encoding, "ROWS_PER_BLOCK", 64)
    latents, embeddings = random_pair()
    paths = save_pair(tmp_path, latents, embeddings)
    folder = from_npy_pair(*paths, tmp_path / "c", "sd-vae", "clip", shard_size=shard_size)
    cache = open_cache(folder, verify=True)
    assert len(cache.manifest["shards"]) == -(-200 // shard_size)
    batch = cache.take(range(200))
    assert set(batch) == {"latents_mean", "text_embeddings"}
    np.testing.assert_array_equal(batch["latents_mean"], latents.astype(np.float16))
    np.testing.assert_array_equal(batch["text_embeddings"], embeddings.astype(np.float16))
    expected = [encoding.assign_split(str(i)) for i in range(200)]
    for split in SPLITS:
        assert cache.examples(split).tolist() == [i for i in range(200) if expected[i] == split]
    assert cache.manifest["vae"] == dict(name="sd-vae", sha256=None)
    train = latents.astype(np.float16)[np.array(expected) == "train"].astype(float)
    np.testing.assert_allclose(cache.std_latent, 2.5 * train.std(), rtol=1e-12)
    assert "latents_std" not in cache.batch(0, 0, 4)
    assert cache.captions([3]) == [""]


def test_an_npy_pair_is_copied_once_and_changes_are_noticed(tmp_path):
    paths = save_pair(tmp_path, *random_pair())
    cache = from_npy_pair(*paths, tmp_path / "c", "sd-vae", "clip")
    before = contents(cache)
    assert contents(from_npy_pair(*paths, cache, "sd-vae", "clip")) == before
    with pytest.raises(ValueError, match="vae .*'other'.* got .*'sd-vae'"):
        from_npy_pair(*paths, cache, "other", "clip")
    save_pair(tmp_path, *random_pair(150))
    with pytest.raises(ValueError, match="the source has changed"):
        from_npy_pair(*paths, cache, "sd-vae", "clip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, e: (z[0], e), r"latents must be square, \(n, h, w, c\), got \(2, 2, 3\)"),
        (lambda z, e: (z.transpose(0, 3, 1, 2), e), r"must be square.* got \(200, 3, 2, 2\)"),
        (lambda z, e: (z[:0], e[:0]), r"latents must be square.* got \(0, 2, 2, 3\)"),
        (lambda z, e: (z, e[0]), r"text embeddings must be \(n, e\) or .* got \(5,\)"),
        (lambda z, e: (z, e[:9]), "200 latents need 200 text embeddings, got 9"),
        (lambda z, e: (z.astype(int), e), "latents.npy must be an .npy file of floats, got int64"),
        (lambda z, e: (z, np.where(e > 2, np.nan, e)), "text_embeddings.npy from row 0 on must be"),
        (lambda z, e: (z * 1e5, e), "latents.npy from row 0 on must be finite and at most 65504"),
        (lambda z, e: (z * 0 + 1, e), "training latents must vary, got .*1.0"),
    ],
)
def test_a_wrong_npy_pair_is_refused_and_leaves_nothing(tmp_path, change, message):
    paths = save_pair(tmp_path / "pair", *change(*random_pair()))
    with pytest.raises(ValueError, match=message):
        from_npy_pair(*paths, tmp_path / "c", "sd-vae", "clip")
    assert os.listdir(tmp_path) == ["pair"]


def test_files_that_are_no_npy_are_refused(tmp_path):
    paths = save_pair(tmp_path, *random_pair())
    with open(paths[1], "wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(ValueError, match="text_embeddings.npy must be .* of floats, got NpzFile"):
        from_npy_pair(*paths, tmp_path / "c", "sd-vae", "clip")
    paths[0].write_text("latents")
    with pytest.raises(ValueError, match="latents.npy must be an .npy file: "):
        from_npy_pair(*paths, tmp_path / "c", "sd-vae", "clip")
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match="latents.npy"):
        from_npy_pair(*paths, tmp_path / "c", "sd-vae", "clip")
