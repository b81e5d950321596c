"""Checkpoints: what is saved comes back, for training and for sampling, or the error says why."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm_jax import checkpoint, training
from ldm_jax.latents import LatentScale
from ldm_jax.sampler import Denoiser
from ldm_jax.unet import get_network

FIELDS = {"latent_image_size": 8, "block_depth": 1, "emb_size": 6, "widths": (8, 16)}
SCALE = LatentScale(np.float32([2, 3, 4, 5]), np.float32([0, 1, 0, -1]))


def create_meta(**changes):
    fields = {
        "network": FIELDS,
        "noising": {"mixture": "variance_preserving", "noise_law": "uniform", "max_angle": 1.5},
        "sampling": {"class_guidance": 2.0, "diffusion_steps": 4},
        "scale": SCALE,
        "vae": {"name": "some/vae", "sha256": "ab"},
        "text_encoder": {"name": "use", "sha256": "cd"},
        "latent_shape": (8, 8, 4),
        "embedding_shape": (6,),
    }
    return checkpoint.create_meta(**{**fields, **changes})


@pytest.fixture(scope="module")
def state():
    """A train state whose averaged weights differ from the weights."""
    network = get_network(**FIELDS)
    optimizer = training.get_optimizer(steps=10)
    state = jax.jit(training.create_train_state, static_argnums=(1, 2, 3, 4))(
        jax.random.key(0), network, optimizer, (8, 8, 4), (6,)
    )
    ema = jax.tree.map(lambda x: x + 0.25, state.ema_params)
    return state.replace(step=jnp.int32(7), ema_params=ema)


def target_of(state):
    """What restore needs to know: shapes, dtypes, shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture(scope="module")
def run_folder(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with checkpoint.open_checkpoints(folder / "checkpoints") as manager:
        checkpoint.save_checkpoint(manager, state, create_meta())
    return folder


def test_a_restored_state_is_the_saved_one_bit_for_bit(run_folder, state):
    with checkpoint.open_checkpoints(run_folder / "checkpoints") as manager:
        restored = checkpoint.restore_checkpoint(manager, target_of(state), create_meta())
    chex.assert_trees_all_equal(restored, state)


def test_an_empty_folder_restores_nothing(tmp_path, state):
    with checkpoint.open_checkpoints(tmp_path / "new") as manager:
        assert checkpoint.restore_checkpoint(manager, target_of(state), create_meta()) is None


def test_only_the_newest_checkpoints_are_kept(tmp_path, state):
    with checkpoint.open_checkpoints(tmp_path, keep=2) as manager:
        for step in (1, 2, 3):
            checkpoint.save_checkpoint(manager, state.replace(step=jnp.int32(step)), create_meta())
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]


def test_another_architecture_is_refused_and_its_fields_are_named(run_folder, state):
    meta = create_meta(network={**FIELDS, "block_depth": 3, "norm": "group"})
    with checkpoint.open_checkpoints(run_folder / "checkpoints") as manager:
        with pytest.raises(ValueError) as error:
            checkpoint.restore_checkpoint(manager, target_of(state), meta)
    assert "network.block_depth is 1 there, 3 here" in str(error.value)
    assert "network.norm is None there, group here" in str(error.value)
    assert "widths" not in str(error.value)


def test_another_vae_or_scale_is_refused():
    saved, where = create_meta(), "there"
    with pytest.raises(ValueError, match="vae.sha256 is ab there, ef here"):
        checkpoint.check_meta(saved, create_meta(vae={"name": "some/vae", "sha256": "ef"}), where)
    with pytest.raises(ValueError, match=r"std_latent is \[2.0, 3.0, 4.0, 5.0\] there, 1.0 here"):
        checkpoint.check_meta(saved, create_meta(scale=LatentScale(1.0)), where)


def test_a_damaged_checkpoint_is_named(tmp_path, state):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_checkpoint(manager, state, create_meta())
    for file in (tmp_path / "7" / "state").rglob("*"):
        if file.is_file() and "ocdbt" not in file.name and file.stat().st_size > 4096:
            file.write_bytes(file.read_bytes()[:100])
    with checkpoint.open_checkpoints(tmp_path) as manager:
        with pytest.raises(Exception) as error:
            checkpoint.restore_checkpoint(manager, target_of(state), create_meta())
    assert any(f"{tmp_path}, step 7" in note for note in error.value.__notes__)


def test_a_model_is_loaded_from_a_run_with_its_averaged_weights(run_folder, state):
    for folder in (run_folder, run_folder / "checkpoints"):
        model = checkpoint.load_model(folder)
        chex.assert_trees_all_equal(model.denoiser.variables, state.ema_variables)
        assert model.denoiser.network == get_network(**FIELDS)
        np.testing.assert_array_equal(model.scale.std_latent, SCALE.std_latent)
        np.testing.assert_array_equal(model.scale.mean_latent, SCALE.mean_latent)
        assert model.meta == create_meta()


def test_an_exported_model_is_the_weights_rounded_to_float16(tmp_path, run_folder, state):
    folder = checkpoint.export_model(checkpoint.load_model(run_folder), tmp_path / "model")
    model = checkpoint.load_model(folder)
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(np.float16).astype(np.float32), state.ema_params
    )
    chex.assert_trees_all_equal(model.denoiser.variables["params"], rounded)
    chex.assert_trees_all_equal(model.denoiser.variables["batch_stats"], state.ema_batch_stats)
    assert model.meta == create_meta()
    stored = load_file(folder / checkpoint.WEIGHTS_FILE)
    assert {v.dtype for k, v in stored.items() if k.startswith("params/")} == {np.dtype("float16")}


def test_weights_beyond_float16_are_not_exported(tmp_path, run_folder):
    model = checkpoint.load_model(run_folder)
    variables = jax.tree.map(lambda x: x * 1e6 + 1e6, model.denoiser.variables)
    model = model._replace(denoiser=Denoiser(model.denoiser.network, variables))
    with pytest.raises(ValueError, match="beyond the range of float16"):
        checkpoint.export_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_exported_model_is_not_overwritten(tmp_path, run_folder):
    model = checkpoint.load_model(run_folder)
    checkpoint.export_model(model, tmp_path)
    with pytest.raises(FileExistsError, match="already holds a model"):
        checkpoint.export_model(model, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        checkpoint.load_model(tmp_path / "nowhere")


def edit_meta(folder, **changes):
    path = folder / checkpoint.META_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_format_is_refused(tmp_path, run_folder):
    folder = checkpoint.export_model(checkpoint.load_model(run_folder), tmp_path)
    edit_meta(folder, format_version=99)
    with pytest.raises(ValueError, match="format version 99"):
        checkpoint.load_model(folder)


def test_weights_of_another_network_are_refused(tmp_path, run_folder):
    folder = checkpoint.export_model(checkpoint.load_model(run_folder), tmp_path)
    edit_meta(folder, network={**FIELDS, "widths": (8, 24)})
    with pytest.raises(ValueError, match=r"do not fit .* first at .*needed \(.*got \("):
        checkpoint.load_model(folder)


def test_truncated_weights_are_named(tmp_path, run_folder):
    folder = checkpoint.export_model(checkpoint.load_model(run_folder), tmp_path)
    path = folder / checkpoint.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(Exception) as error:
        checkpoint.load_model(folder)
    assert any(str(path) in note for note in error.value.__notes__)
