"""Files of a latent cache: statistics, another plan, full and read-only disks."""

import errno
import os
import resource
import shutil

import numpy as np
import pytest
from stand_ins import LetterEncoder, MeanVAE, contents, encode, make_pictures

from ldm_jax.cache_files import begin_cache, finish_cache, get_shard_size, save_rows
from ldm_jax.data import open_cache, partial_folder
from ldm_jax.moments import get_moments, get_statistics


def test_statistics_are_those_of_drawn_training_latents(tmp_path):
    cache = open_cache(encode(tmp_path))
    # Drawn from the stored moments, many times, by numpy alone.
    examples = cache.examples("train")
    train, first = np.unique(cache.pictures(examples), return_index=True)
    assert len(train) == 17
    moments = cache.take(examples[first], float)
    mean, std = moments["latents_mean"], moments["latents_std"]
    drawn = mean + std * np.random.default_rng(0).standard_normal((5000, *mean.shape))
    np.testing.assert_allclose(cache.std_latent, 2.5 * drawn.std(), rtol=3e-3)
    np.testing.assert_allclose(cache.manifest["channel_std"], drawn.std((0, 1, 2, 3)), rtol=5e-3)
    np.testing.assert_allclose(cache.manifest["channel_mean"], mean.mean((0, 1, 2)), rtol=1e-12)


def test_statistics_without_std_are_those_of_the_means():
    mean = np.random.default_rng(0).normal(3, 2, (9000, 2, 2, 3)).astype(np.float16)
    rows = np.arange(0, 9000, 2)
    # In three parts, one of them without a picture that counts.
    parts = [rows[:7], rows[7:7], rows[7:]]
    found = get_statistics([get_moments(mean, None, part) for part in parts])
    picked = mean[rows].astype(float)
    np.testing.assert_allclose(found["std_latent"], 2.5 * picked.std(), rtol=1e-12)
    np.testing.assert_allclose(found["channel_std"], picked.std((0, 1, 2)), rtol=1e-12)


def test_a_complete_cache_is_left_as_it_is(tmp_path):
    before = contents(encode(tmp_path))
    vae = MeanVAE()
    partial_folder(tmp_path / "cache").mkdir()  # As after a kill in the last moment.
    assert contents(encode(tmp_path, vae=vae)) == before
    assert vae.calls == 0
    assert not partial_folder(tmp_path / "cache").exists()


def test_a_complete_cache_of_something_else_is_refused(tmp_path):
    encode(tmp_path)
    with pytest.raises(ValueError, match="vae .*'cc'.* got .*'aa'"):
        encode(tmp_path, vae=MeanVAE(sha256="cc"))
    with pytest.raises(ValueError, match="image_size 32, got 16"):
        encode(tmp_path, image_size=32)
    with pytest.raises(ValueError, match=r"the source has changed\): remove it or name another"):
        encode(tmp_path, pictures=make_pictures(tmp_path / "pictures", n=7))


def test_unfinished_work_of_something_else_is_refused(tmp_path):
    with pytest.raises(RuntimeError):
        encode(tmp_path, vae=MeanVAE(fail_at=2))
    message = "cache.partial was begun with {}.*remove it to start anew"
    with pytest.raises(ValueError, match=message.format("vae .*'aa'.* now it is .*'cc'")):
        encode(tmp_path, vae=MeanVAE(sha256="cc"))
    with pytest.raises(ValueError, match=message.format("text_encoder")):
        encode(tmp_path, text=LetterEncoder(sha256="cc"))
    with pytest.raises(ValueError, match=message.format("chunk_size 6, now it is 7")):
        encode(tmp_path, chunk_size=7)
    with pytest.raises(ValueError, match=message.format("source_sha256")):
        encode(tmp_path, pictures=make_pictures(tmp_path / "pictures", n=7))


def test_a_folder_that_is_no_cache_is_not_touched(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists and is not a latent cache"):
        encode(tmp_path)
    assert contents(tmp_path / "cache") == {"thesis.txt": b"years of work"}


def test_a_source_without_training_pictures_is_refused(tmp_path):
    pictures = [p._replace(split="test") for p in make_pictures(tmp_path / "pictures", n=3)]
    with pytest.raises(ValueError, match="must have pictures to train on, .*'test': 4"):
        encode(tmp_path, pictures=pictures)


def test_too_little_room_is_said_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100))
    vae = MeanVAE()
    with pytest.raises(OSError, match="bytes are needed, 100 are free.*cache") as caught:
        encode(tmp_path, vae=vae)
    assert caught.value.errno == errno.ENOSPC
    assert vae.calls == 0


def test_a_disk_that_fills_up_keeps_the_work_and_names_the_file(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    whole = contents(encode(tmp_path, "whole", pictures))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))  # No file may be larger.
    try:
        with pytest.raises(OSError, match="bytes are needed.*cut.partial/") as caught:
            encode(tmp_path, "cut", pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "cut").exists()
    assert not [path for path in (tmp_path / "cut.partial").rglob("*.npy.*")]
    assert contents(encode(tmp_path, "cut", pictures)) == whole


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    pictures = make_pictures(tmp_path / "pictures")
    monkeypatch.setattr(os, "mkdir", refuse)
    message = "Read-only file system .about [0-9]+ bytes are needed.: .*cache.partial"
    with pytest.raises(OSError, match=message) as caught:
        encode(tmp_path, pictures=pictures)
    assert caught.value.errno == errno.EROFS


def test_a_shard_holds_65536_pictures_or_half_a_gibibyte():
    assert get_shard_size(3072) == 65_536
    assert get_shard_size(2**17) == 4096
    assert get_shard_size(2**31) == 1


def test_another_number_of_shards_than_was_said_is_refused(tmp_path):
    begin_cache(tmp_path / "cache", {}, needed=0)
    with pytest.raises(ValueError, match="cache must get 2 shards, got 0"):
        finish_cache(tmp_path / "cache", [], 2, {})


def test_rows_of_another_shape_or_number_are_never_written(tmp_path):
    path = tmp_path / "rows.npy"
    with pytest.raises(ValueError, match=r"rows must be float64 \(3,\), got float64 \(4,\)"):
        save_rows(path, 4, [np.zeros((2, 3)), np.zeros((2, 4))])
    with pytest.raises(ValueError, match="must get 4 rows, got 2"):
        save_rows(path, 4, [np.zeros((2, 3))])
    assert os.listdir(tmp_path) == []
