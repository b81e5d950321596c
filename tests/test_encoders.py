"""The VAE bridge, against diffusers called directly; no weights are downloaded."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from ldm_jax import encoders
from ldm_jax.encoders import VAE, decode_latents, load_vae
from ldm_jax.plotting import to_uint8

WEIGHTS = "diffusion_pytorch_model.safetensors"


def get_model(seed=0, **changes):
    torch.manual_seed(seed)
    fields = dict(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=3,
        norm_num_groups=4,
    )
    model = AutoencoderKL(**(fields | changes)).eval()
    with torch.no_grad():
        model.decoder.conv_out.weight *= 4  # Some pixels leave [-1, 1].
    return model


@pytest.fixture(scope="module")
def model():
    return get_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(folder, device="cpu")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)


def to_torch(images):
    return torch.tensor(images).permute(0, 3, 1, 2)


def test_encode_gives_the_posterior_of_diffusers(vae, model, images):
    mean, std = vae.encode(images)
    with torch.inference_mode():
        posterior = model.encode(to_torch(images.astype(np.float32) / 127.5 - 1)).latent_dist
    expected_std = np.exp(0.5 * posterior.logvar.numpy())
    chex.assert_shape([mean, std], (5, 2, 3, 3))
    chex.assert_type([mean, std], np.float32)
    np.testing.assert_allclose(mean, posterior.mean.permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(std, expected_std.transpose(0, 2, 3, 1), atol=1e-5)
    assert mean.flags.c_contiguous and std.flags.c_contiguous


def test_decode_gives_the_images_of_diffusers_clipped(vae, model):
    latents = 30 * np.random.default_rng(1).standard_normal((3, 2, 3, 3)).astype(np.float32)
    images = vae.decode(latents)
    with torch.inference_mode():
        expected = model.decode(to_torch(latents)).sample.permute(0, 2, 3, 1).numpy()
    assert images.shape == (3, 16, 24, 3) and images.dtype == np.float32
    assert np.abs(expected).max() > 1.1
    np.testing.assert_allclose(images, np.clip(expected, -1, 1), atol=1e-5)


def test_bytes_are_those_of_the_images(vae):
    latents = 30 * np.random.default_rng(1).standard_normal((5, 2, 3, 3)).astype(np.float32)
    found = vae.decode(latents, batch_size=2, as_bytes=True)
    chex.assert_type(found, np.uint8)
    np.testing.assert_array_equal(found, to_uint8(vae.decode(latents, batch_size=2)))


def test_images_with_nan_do_not_become_bytes(model):
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.decoder.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="must be finite to become bytes, got NaN"):
        VAE("broken", broken).decode(np.zeros((1, 2, 2, 3), np.float32), as_bytes=True)


def test_bytes_and_floats_of_the_same_picture_encode_alike(vae, images):
    chex.assert_trees_all_close(
        vae.encode(images), vae.encode(images.astype(np.float64) / 127.5 - 1), atol=1e-5
    )


def test_batch_size_and_progress_do_not_change_the_result(vae, images, capfd):
    mean, std = vae.encode(images, batch_size=5)
    assert capfd.readouterr().err == ""
    # Torch sums in another order for another batch size; a byte's step is 80 times this.
    close = {"rtol": 0, "atol": 1e-4}
    again = vae.encode(images, batch_size=2, progress=True)
    chex.assert_trees_all_close(again, (mean, std), **close)
    assert "encode: 100%" in capfd.readouterr().err
    np.testing.assert_allclose(vae.decode(mean, batch_size=3), vae.decode(mean), **close)


def test_a_batch_holds_as_many_pictures_as_their_pixels_allow(vae, monkeypatch):
    rounds, decode = [], vae._model.decode
    monkeypatch.setattr(vae._model, "decode", lambda z: rounds.append(len(z)) or decode(z))
    for pixels in (2 * 16 * 24, 3 * 16 * 24 - 1, 10):
        monkeypatch.setattr(encoders, "CPU_PIXELS", pixels)
        vae.decode(np.zeros((3, 2, 3, 3), np.float32))
    assert rounds == [2, 1, 2, 1, 1, 1, 1]


def test_no_images_give_no_latents_and_no_latents_no_images(vae):
    mean, std = vae.encode(np.zeros((0, 16, 16, 3), np.uint8))
    assert mean.shape == std.shape == (0, 2, 2, 3)
    assert vae.decode(mean).shape == (0, 16, 16, 3)


def test_too_little_gpu_memory_halves_the_batch(model, images):
    class Crowded(torch.nn.Module):
        """Stands for a GPU that has room for two images."""

        config, sizes = model.config, []

        def encode(self, x):
            self.sizes.append(len(x))
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("no room")
            return model.encode(x)

    crowded = VAE("crowded", Crowded())
    chex.assert_trees_all_close(
        crowded.encode(images), VAE("roomy", model).encode(images), atol=1e-5
    )
    assert Crowded.sizes == [5, 2, 2, 1]


def test_too_little_gpu_memory_for_one_image_is_an_error(model, images):
    class Full(torch.nn.Module):
        config = model.config

        def encode(self, x):
            raise torch.cuda.OutOfMemoryError("no room")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="no room"):
        VAE("full", Full()).encode(images)


def test_decode_latents_scales_and_shifts_by_channel(vae):
    latents = np.random.default_rng(2).standard_normal((2, 2, 2, 3)).astype(np.float32)
    scale, shift = np.array([1.0, 2.0, 3.0]), [0.5, 0.0, -0.5]
    np.testing.assert_allclose(
        decode_latents(jnp.asarray(latents), scale, vae, mean_latent=shift),
        vae.decode((latents * scale + shift).astype(np.float32)),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        decode_latents(latents, 2.5, vae), vae.decode(latents * np.float32(2.5)), atol=1e-5
    )


def test_decode_latents_takes_a_name_and_loads_it_once(monkeypatch):
    encoders._load_once.cache_clear()
    loaded = []
    monkeypatch.setattr(VAE, "decode", lambda self, *args: loaded.append(self))
    for _ in range(2):
        decode_latents(np.ones((1, 2, 2, 4), np.float32), 2.5, "bundled:emoji")
    assert loaded[0] is loaded[1] and loaded[0].identity["name"] == "bundled:emoji"


def test_decode_latents_refuses_statistics_of_other_channels(vae):
    latents = np.zeros((1, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r"std_latent must be a number or of shape \(3,\), got"):
        decode_latents(latents, np.ones(4), vae)
    with pytest.raises(ValueError, match=r"mean_latent .* got shape \(1, 3\)"):
        decode_latents(latents, 1.0, vae, mean_latent=np.ones((1, 3)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((16, 16, 3), np.uint8), r"must have shape \(n, H, W, 3\), got \(16, 16, 3\)"),
        (np.zeros((1, 16, 16, 4), np.uint8), r"got \(1, 16, 16, 4\)"),
        (np.zeros((1, 16, 16, 3), np.int64), "must be uint8 or floats in .*, got int64"),
        (np.zeros((1, 16, 20, 3), np.uint8), "divisible by 8 .* got 16x20"),
        (np.zeros((1, 0, 16, 3), np.uint8), "divisible by 8 .* got 0x16"),
        (np.full((1, 16, 16, 3), 255.0), r"must lie in \[-1, 1\], got \[255, 255\]"),
        (np.full((1, 16, 16, 3), np.nan), r"must lie in \[-1, 1\], got \[nan, nan\]"),
    ],
)
def test_encode_refuses_images_and_says_what_it_needs(vae, images, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(images)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((2, 2, 3), np.float32), r"must have shape \(n, h, w, 3\), got \(2, 2, 3\)"),
        (np.zeros((1, 2, 2, 4), np.float32), r"\(n, h, w, 3\), got \(1, 2, 2, 4\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), "must be floats, got uint8"),
        (np.full((1, 2, 2, 3), np.inf, np.float32), "must be finite"),
    ],
)
def test_decode_refuses_latents_and_says_what_it_needs(vae, latents, message):
    with pytest.raises(ValueError, match=message):
        vae.decode(latents)


def test_a_batch_of_no_images_is_refused(vae, images):
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        vae.encode(images, batch_size=0)


def test_loading_prints_nothing(folder, capfd):
    load_vae(folder, dtype="bfloat16")
    assert capfd.readouterr() == ("", "")


def test_vae_knows_its_geometry(vae, folder):
    assert (vae.latent_channels, vae.downsampling) == (3, 8)
    assert vae.identity["name"] == str(folder)
    assert vae.device == torch.device("cpu")


def test_identity_survives_a_move_a_new_release_and_a_new_file_format(vae, model, tmp_path):
    model.save_pretrained(tmp_path / "moved", safe_serialization=False)
    config = json.loads((tmp_path / "moved/config.json").read_text())
    config |= {"_diffusers_version": "9.9", "scaling_factor": 0.5, "sample_size": 7}
    (tmp_path / "moved/config.json").write_text(json.dumps(config))
    moved = load_vae(tmp_path / "moved")
    assert moved.identity["name"] != vae.identity["name"]
    assert moved.identity["sha256"] == vae.identity["sha256"]


def test_identity_tells_weights_and_architectures_apart(vae):
    others = [VAE("x", get_model(seed=1)), VAE("x", get_model(act_fn="gelu"))]
    assert len({vae.identity["sha256"], *(other.identity["sha256"] for other in others)}) == 3


def test_identity_is_that_of_the_encoder(vae):
    def change(get_weight):
        """Which of the two digests another weight changes."""
        other = get_model()
        with torch.no_grad():
            get_weight(other)[0] += 1
        other = VAE("x", other)
        return (
            other.identity["sha256"] != vae.identity["sha256"],
            other.decoder_sha256 != vae.decoder_sha256,
        )

    assert change(lambda m: m.decoder.conv_out.bias) == (False, True)
    assert change(lambda m: m.post_quant_conv.bias) == (False, True)
    assert change(lambda m: m.encoder.conv_in.bias) == (True, False)
    assert change(lambda m: m.quant_conv.bias) == (True, False)


def test_half_precision_files_are_computed_with_in_float32(model, tmp_path, images):
    model.half().save_pretrained(tmp_path)
    model.float()
    rounded = get_model()
    rounded.load_state_dict({k: v.half().float() for k, v in rounded.state_dict().items()})
    halved = load_vae(tmp_path)
    assert halved.identity["sha256"] == VAE("x", rounded).identity["sha256"]
    chex.assert_trees_all_close(halved.encode(images), VAE("x", rounded).encode(images), atol=1e-6)


def test_bfloat16_is_near_float32_and_has_its_identity(vae, folder, images):
    rough = load_vae(folder, dtype="bfloat16")
    assert rough.identity == vae.identity
    mean, std = rough.encode(images)
    chex.assert_type([mean, std], np.float32)
    chex.assert_trees_all_close((mean, std), vae.encode(images), atol=0.05)
    with pytest.raises(ValueError, match="dtype must be one of .*float32.*, got 'int8'"):
        load_vae(folder, dtype="int8")


def test_weights_with_the_attention_names_of_2022_load(vae, folder, tmp_path):
    """stabilityai/sd-vae-ft-ema was saved with them."""
    shutil.copy(folder / "config.json", tmp_path)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    arrays = {}
    for name, array in load_file(folder / WEIGHTS).items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        arrays[name] = array
    assert any(".proj_attn." in name for name in arrays)
    save_file(arrays, tmp_path / WEIGHTS)
    assert load_vae(tmp_path).identity["sha256"] == vae.identity["sha256"]


def test_bundled_name_is_found_inside_the_package(vae, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "weights/vae_emoji")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package / "..")
    (tmp_path / "ldm_jax").mkdir()
    bundled = load_vae("bundled:emoji")
    assert bundled.identity == {"name": "bundled:emoji", "sha256": vae.identity["sha256"]}
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="bundled:emoji is missing. .*config.json"):
        load_vae("bundled:emoji")
    with pytest.raises(ValueError, match="bundled VAEs are bundled:emoji, got 'bundled:cats'"):
        load_vae("bundled:cats")


def test_missing_folder_is_named_with_what_it_must_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/gone: .*must hold config.json and"):
        load_vae(tmp_path / "gone")


def test_folder_without_or_with_broken_files_is_named(folder, tmp_path):
    with pytest.raises(OSError, match=f"(?s){tmp_path}.*must hold config.json"):
        load_vae(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(OSError, match=f"(?s){tmp_path}.*must hold .* diffusion_pytorch_model"):
        load_vae(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(OSError, match=f"cannot load a VAE from {tmp_path}"):
        load_vae(tmp_path)


def test_weights_that_lack_a_part_are_refused(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    arrays = load_file(folder / WEIGHTS)
    del arrays["decoder.conv_out.bias"]
    save_file(arrays, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="none for 1 of its arrays: decoder.conv_out.bias"):
        load_vae(tmp_path)


def test_hub_name_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match="(?s)someone/no-such-vae: .*download.*give the folder's path"
    ):
        load_vae("someone/no-such-vae")


def test_sharing_the_gpu_leaves_a_fifth_and_respects_the_user():
    program = (
        "from ldm_jax.gpu_memory import share_gpu_memory; share_gpu_memory()\n"
        "from jaxlib.xla_client import generate_pjrt_gpu_plugin_options as options\n"
        "print(options()['memory_fraction'], options()['preallocate'])"
    )

    def run(**settings):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
        return subprocess.run(
            [sys.executable, "-c", program],
            env=clean | settings,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()

    assert run() == ["0.8", "False"]
    assert run(XLA_CLIENT_MEM_FRACTION=".5") == ["0.5", "False"]
    assert run(XLA_PYTHON_CLIENT_MEM_FRACTION=".3") == ["0.3", "False"]
    assert run(XLA_PYTHON_CLIENT_PREALLOCATE="true") == ["0.8", "True"]
