"""The door encode.py: which source is read, what is said at the end, which settings are refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import app, flags
from ml_collections import ConfigDict
from PIL import Image
from stand_ins import LetterEncoder, MeanVAE, contents, make_pictures

import encode
from ldm_jax.data import open_cache
from ldm_jax.encoders import load_vae

ROOT = Path(encode.__file__).parent
CONFIG = """
from ml_collections import ConfigDict
from PIL import Image
def get_config():
    data = dict(source="folder", path="", cache="", styles=(), image_size=16)
    encoders = dict(vae="mean", text="letters")
    return ConfigDict(dict(data=data, encoders=encoders)).lock()
"""


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve pictures with captions.csv, the first of them broken."""
    folder = tmp_path / "pictures"
    names = [picture.path.name for picture in make_pictures(folder, n=12, broken=(0,))]
    lines = [f"{name},{'abcd'[i % 4]} picture,train" for i, name in enumerate(names)]
    (folder / "captions.csv").write_text("\n".join(["file_name,text,split", *lines, ""]))
    return folder


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(encode, "load_vae", MeanVAE)
    monkeypatch.setattr(encode, "load_text_encoder", lambda name: LetterEncoder())


def make_config(cache, **data):
    data = dict(source="folder", path="", cache=str(cache), styles=(), image_size=16) | data
    return ConfigDict(dict(data=data, encoders=dict(vae="mean", text="letters"))).lock()


def run_main(monkeypatch, config):
    monkeypatch.setattr(flags, "FLAGS", ConfigDict(dict(config=config)))
    encode.main(["encode.py"])


def test_a_folder_is_encoded_and_summed_up(tmp_path, monkeypatch, capsys, pictures, stand_ins):
    config = make_config(tmp_path / "cache", path=str(pictures))
    run_main(monkeypatch, config)
    said = capsys.readouterr().out
    cache = open_cache(tmp_path / "cache", verify=True)
    assert cache.manifest["skipped"][0]["file"] == "00.png"
    assert cache.captions(range(3)) == ["b picture", "c picture", "d picture"]
    for line in (
        str(tmp_path / "cache"),
        "pictures    11, skipped 1",
        "examples    train 11, valid 0, test 0, cell 0",
        f"latents     (2, 2, 3), std_latent {cache.std_latent:.4f}, by mean",
        "embeddings  (4,), by letters",
        " pictures/s",
    ):
        assert line in said


def test_a_second_run_says_that_all_is_done(tmp_path, monkeypatch, capsys, pictures, stand_ins):
    config = make_config(tmp_path / "cache", path=str(pictures))
    encode.encode(config, progress=False)
    before = contents(tmp_path / "cache")
    run_main(monkeypatch, config)
    assert "complete already; nothing was encoded" in capsys.readouterr().out
    assert contents(tmp_path / "cache") == before


def test_a_real_autoencoder_encodes_a_folder(tmp_path, monkeypatch, pictures):
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(encode, "load_text_encoder", lambda name: LetterEncoder())
    config = make_config(tmp_path / "cache", path=str(pictures))
    config.encoders.vae = str(tmp_path / "vae")
    vae = load_vae(tmp_path / "vae")
    cache = open_cache(encode.encode(config, progress=False), vae.identity)
    images = [np.asarray(Image.open(path)) for path in sorted(pictures.glob("*.png"))[1:]]
    mean, std = vae.encode(np.stack(images))
    assert cache.latent_shape == (8, 8, 3)
    batch = cache.take(range(11))
    np.testing.assert_allclose(batch["latents_mean"], mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(batch["latents_std"], std, rtol=1e-3, atol=1e-3)


def test_emoji_are_drawn_into_the_cache_of_the_user(tmp_path, monkeypatch, pictures, stand_ins):
    asked = []

    def draw(folder, styles, progress, skin_tones):
        asked.append((folder, tuple(styles), progress, skin_tones))
        return pictures

    monkeypatch.setattr(encode, "draw_emoji", draw)
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "home"))
    cache = encode.encode(make_config("", source="emoji"), progress=False)
    assert cache == tmp_path / "home" / "caches" / "emoji-16-mean-letters"
    assert open_cache(cache).num_examples() == 11
    other = make_config(tmp_path / "other", source="emoji", styles=("noto",), path="/drawn")
    encode.encode(other, progress=False)
    toned = encode.encode(make_config("", source="emoji", skin_tones=True), progress=False)
    assert toned == tmp_path / "home" / "caches" / "emoji-tones-16-mean-letters"
    assert asked == [
        (tmp_path / "home" / "emoji", encode.DEFAULT_STYLES, False, False),
        (Path("/drawn"), ("noto",), False, False),
        (tmp_path / "home" / "emoji-tones", encode.DEFAULT_STYLES, False, True),
    ]


def test_an_npy_pair_is_taken_with_the_names_of_its_encoders(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "z.npy", rng.normal(size=(30, 2, 2, 3)))
    np.save(tmp_path / "e.npy", rng.normal(size=(30, 4)))
    path = f"{tmp_path}/z.npy, {tmp_path}/e.npy"
    config = make_config(tmp_path / "cache", source="npy", path=path)
    cache = open_cache(encode.encode(config, progress=False))
    assert cache.manifest["vae"] == dict(name="mean", sha256=None)
    assert cache.manifest["text_encoder"] == dict(name="letters", sha256=None)
    # A VAE in a folder is known by the folder's full path, as load_vae has it.
    (tmp_path / "vae").mkdir()
    config = make_config(tmp_path / "other", source="npy", path=path)
    config.encoders.vae = f"{tmp_path}/pictures/../vae"
    (tmp_path / "pictures").mkdir()
    cache = open_cache(encode.encode(config, progress=False))
    assert cache.manifest["vae"]["name"] == str((tmp_path / "vae").resolve())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dict(source="folder"), "data.path must name the folder of pictures, got nothing"),
        (dict(source="hub"), "data.source must be one of emoji, folder, npy, got 'hub'"),
        (dict(source="npy", path="z.npy"), "data.path must be latents.npy,text_emb.* got 'z.npy'"),
        (dict(source="folder", path="/nowhere"), "must be given as a folder, got /nowhere"),
    ],
)
def test_wrong_settings_end_the_program_with_one_line(tmp_path, monkeypatch, data, message):
    with pytest.raises(SystemExit, match=f"^encode.py: .*{message}"):
        run_main(monkeypatch, make_config(tmp_path / "cache", **data))


def test_words_that_are_no_flags_are_refused():
    with pytest.raises(app.UsageError, match="must look like --config.data.path=..., got .'x'"):
        encode.main(["encode.py", "x"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.data.sorce=emoji", 'Did you mean "source" instead of "sorce"?'),
        ("--config.data.path=/nowhere", "encode.py: pictures must be given as a folder"),
    ],
)
def test_the_program_names_what_is_wrong(tmp_path, argument, message):
    (tmp_path / "config.py").write_text(CONFIG)
    command = [sys.executable, ROOT / "encode.py", f"--config={tmp_path}/config.py", argument]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
