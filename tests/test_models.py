"""Models: what is saved comes back for sampling, alone and verified, or the error says why."""

import json
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file
from states import FIELDS, NOISING, SCALE, at_step, create_meta, create_state, save_run

from configs import emoji, guide
from ldm_jax import checkpoint, exports, models
from ldm_jax.latents import LatentScale
from ldm_jax.meta import check_meta
from ldm_jax.noising import get_process
from ldm_jax.records import DamagedError
from ldm_jax.sampler import Denoiser, in_float32_on_cpu
from ldm_jax.unet import get_network


@pytest.fixture(scope="module")
def state():
    return create_state()


@pytest.fixture(scope="module")
def run_folder(state, tmp_path_factory):
    """Checkpoints of the steps 3, 5 and 7; the one of step 3 is the best."""
    return save_run(tmp_path_factory.mktemp("run"), state, {3: 0.1, 5: 0.3, 7: 0.2})


def test_another_vae_or_scale_is_refused():
    saved, where = create_meta(), "there"
    with pytest.raises(ValueError, match="vae.sha256 is ab there, ef here"):
        check_meta(saved, create_meta(vae={"name": "some/vae", "sha256": "ef"}), where)
    # The same encoder in another folder.
    check_meta(saved, create_meta(vae=saved["vae"] | {"name": "/moved/vae"}), where)
    with pytest.raises(ValueError, match=r"std_latent is \[2.0, 3.0, 4.0, 5.0\] there, 1.0 here"):
        check_meta(saved, create_meta(scale=LatentScale(1.0)), where)


def test_how_a_network_is_computed_makes_no_other_model():
    saved, fields = create_meta(), FIELDS | {"remat": True, "dtype": "bfloat16"}
    check_meta(saved, create_meta(network=fields), "there")
    check_meta(create_meta(network=fields), saved, "there")
    with pytest.raises(ValueError, match="network.norm is batch there, group here"):
        check_meta(saved, create_meta(network=fields | {"norm": "group"}), "there")


def test_a_field_that_an_older_release_did_not_save_has_its_default():
    newer = create_meta(network=FIELDS | {"conditioning": "token"})
    check_meta(create_meta(), newer, "there")
    check_meta(newer, create_meta(), "there")
    newer = create_meta(noising=NOISING | {"p_mean": 0.0, "target": "x_zero"})
    check_meta(create_meta(), newer, "there")
    newer = create_meta(network=FIELDS | {"conditioning": "adaptive"})
    with pytest.raises(ValueError, match="network.conditioning is token there, adaptive here"):
        check_meta(create_meta(), newer, "there")


def test_what_a_network_puts_out_makes_another_model_and_how_it_is_trained_does_not():
    velocity = create_meta(noising=NOISING | {"target": "velocity"})
    with pytest.raises(ValueError, match="noising.target is x_zero there, velocity here"):
        check_meta(create_meta(), velocity, "there")
    convex = create_meta(noising=NOISING | {"target": "velocity", "mixture": "convex"})
    with pytest.raises(ValueError, match="noising.mixture is variance_preserving there, convex he"):
        check_meta(velocity, convex, "there")
    check_meta(create_meta(), create_meta(noising=NOISING | {"mixture": "convex"}), "there")


def test_a_model_knows_what_its_network_puts_out(tmp_path, state):
    noising = NOISING | {"target": "velocity"}
    with checkpoint.open_checkpoints(tmp_path / "run") as manager:
        checkpoint.save_checkpoint(manager, state, create_meta(noising=noising))
    model = models.load_model(tmp_path / "run")
    assert model.denoiser.process == get_process(**noising)
    model = models.load_model(exports.export_model(model, tmp_path / "model"))
    assert model.denoiser.process == get_process(**noising)


def test_a_run_of_a_newer_format_is_refused():
    with pytest.raises(ValueError, match="there has format version 99, this release reads up to 2"):
        check_meta(create_meta() | {"format_version": 99}, create_meta(), "there")


def test_a_model_is_loaded_from_a_run_with_its_averaged_weights(run_folder, state):
    state = at_step(state, 7)
    for folder in (run_folder, run_folder / "checkpoints"):
        model = models.load_model(folder)
        chex.assert_trees_all_equal(model.denoiser.variables, state.ema_variables)
        assert model.denoiser.network == get_network(**FIELDS)
        np.testing.assert_array_equal(model.scale.std_latent, SCALE.std_latent)
        np.testing.assert_array_equal(model.scale.mean_latent, SCALE.mean_latent)
        assert model.meta == create_meta()


def test_an_exported_model_is_the_weights_rounded_to_float16(tmp_path, run_folder, state):
    folder = exports.export_model(models.load_model(run_folder), tmp_path / "model")
    model = models.load_model(folder)
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(np.float16).astype(np.float32),
        at_step(state, 7).ema_params,
    )
    chex.assert_trees_all_equal(model.denoiser.variables["params"], rounded)
    chex.assert_trees_all_equal(model.denoiser.variables["batch_stats"], state.ema_batch_stats)
    assert model.meta == create_meta()
    stored = load_file(folder / exports.WEIGHTS_FILE)
    assert {v.dtype for k, v in stored.items() if k.startswith("params/")} == {np.dtype("float16")}


def test_a_model_in_eight_bits_draws_nearly_as_before(tmp_path):
    model = models.load_model()
    halves, bytes_ = (
        exports.export_model(model, tmp_path / dtype, dtype) for dtype in ("float16", "int8")
    )
    sizes = [(f / exports.WEIGHTS_FILE).stat().st_size for f in (halves, bytes_)]
    assert sizes[1] < 0.52 * sizes[0]
    denoisers = [models.load_model(folder).denoiser for folder in (halves, bytes_)]
    rng = np.random.default_rng(0)
    x_t, text = rng.normal(size=(4, 16, 16, 4)), rng.normal(size=(4, 1024)) / 32
    levels = np.array([0.1, 0.3, 0.6, 0.9])
    found, expected = (
        np.asarray(jax.jit(lambda d: d(x_t, levels, text))(in_float32_on_cpu(denoiser)))
        for denoiser in denoisers
    )
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_weights_in_several_files_are_those_in_one(tmp_path, run_folder, dtype):
    model = models.load_model(run_folder)
    one = exports.export_model(model, tmp_path / "one", dtype)
    whole = (one / exports.WEIGHTS_FILE).stat().st_size
    several = exports.export_model(model, tmp_path / "several", dtype, file_bytes=whole // 2)
    paths = sorted(several.glob("*.safetensors"))
    names = [f"denoiser-{i}-of-{len(paths)}.safetensors" for i in range(1, len(paths) + 1)]
    assert len(paths) > 1 and [path.name for path in paths] == names
    stored = [load_file(path) for path in paths]
    assert all(sum(x.nbytes for x in part.values()) <= whole // 2 for part in stored)
    variables = [models.load_model(folder).denoiser.variables for folder in (one, several)]
    chex.assert_trees_all_equal(*variables)
    paths[-1].unlink()
    with pytest.raises(FileNotFoundError, match=names[-1]):
        models.load_model(several)


def test_one_digest_of_one_file_is_read_as_older_releases_wrote_it(tmp_path, run_folder):
    folder = exports.export_model(models.load_model(run_folder), tmp_path)
    [digest] = json.loads((folder / exports.META_FILE).read_text())["weights_sha256"].values()
    edit_meta(folder, weights_sha256=digest)
    assert models.load_model(folder).meta == create_meta()
    edit_meta(folder, weights_sha256=digest[::-1])
    with pytest.raises(DamagedError, match="differs from what was exported"):
        models.load_model(folder)


def test_a_guide_is_exported_and_loaded_with_its_model(tmp_path, run_folder):
    weaker, model = models.load_model(run_folder, 3), models.load_model(run_folder)
    assert model.guide is None and model.get_diffuser().guide is None
    folder = exports.export_model(model.guided_by(weaker), tmp_path / "model")
    assert models.load_model(folder / exports.GUIDE).meta == weaker.meta
    for expected, found in (
        (model.guided_by(weaker), models.load_model(folder)),
        (weaker, models.load_model(folder).guide),
    ):
        rounded = jax.tree.map(lambda x: np.float32(np.float16(x)), expected.denoiser.variables)
        chex.assert_trees_all_equal(found.denoiser.variables["params"], rounded["params"])
    model = models.load_model(folder)
    diffuser = model.get_diffuser(diffusion_steps=5)
    assert diffuser.guide is model.guide.denoiser and diffuser.diffusion_steps == 5
    assert model.get_diffuser(guide=None).guide is None
    changed = model.convert(lambda d: Denoiser(d.network, "w"))
    assert [m.denoiser.variables for m in (changed, changed.guide)] == ["w", "w"]


def test_a_guide_in_a_runs_workdir_is_its_own(tmp_path, state):
    run = save_run(tmp_path, state, {3: 0.1, 5: 0.3})
    exports.export_model(models.load_model(run, 3), tmp_path / exports.GUIDE)
    for folder in (run, run / "checkpoints"):
        assert models.load_model(folder).guide is not None
    edit_meta(tmp_path / exports.GUIDE, std_latent=2.5)
    with pytest.raises(ValueError, match="the guide belongs to other data: its std_latent is 2.5"):
        models.load_model(run)


def test_weights_beyond_float16_are_not_exported(tmp_path, run_folder):
    model = models.load_model(run_folder)
    variables = jax.tree.map(lambda x: x * 1e6 + 1e6, model.denoiser.variables)
    model = model._replace(denoiser=Denoiser(model.denoiser.network, variables))
    with pytest.raises(ValueError, match="beyond the range of float16"):
        exports.export_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_exported_model_is_not_overwritten(tmp_path, run_folder):
    model = models.load_model(run_folder)
    exports.export_model(model, tmp_path)
    with pytest.raises(FileExistsError, match="already holds a model"):
        exports.export_model(model, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        models.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        models.load_model(tmp_path / "nowhere")


def edit_meta(folder, **changes):
    path = folder / exports.META_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_format_is_refused(tmp_path, run_folder):
    folder = exports.export_model(models.load_model(run_folder), tmp_path)
    edit_meta(folder, format_version=99)
    with pytest.raises(ValueError, match="format version 99"):
        models.load_model(folder)


def test_weights_of_another_network_are_refused(tmp_path, run_folder):
    folder = exports.export_model(models.load_model(run_folder), tmp_path)
    edit_meta(folder, network={**FIELDS, "widths": (8, 24)})
    with pytest.raises(ValueError, match=r"do not fit .* first at .*needed \(.*got \("):
        models.load_model(folder)


def test_truncated_weights_are_named(tmp_path, run_folder):
    folder = exports.export_model(models.load_model(run_folder), tmp_path)
    path = folder / exports.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DamagedError, match=f"{path} differs from what was exported"):
        models.load_model(folder)
    edit_meta(folder, weights_sha256=None)  # As in a model that an older release exported.
    with pytest.raises(DamagedError, match=f"{path} cannot be read: "):
        models.load_model(folder)


def test_a_truncated_meta_file_is_named(tmp_path, run_folder):
    folder = exports.export_model(models.load_model(run_folder), tmp_path)
    path = folder / exports.META_FILE
    path.write_text(path.read_text()[:500])
    with pytest.raises(DamagedError, match=f"{path} is not what was exported"):
        models.load_model(folder)
    assert sorted(p.name for p in folder.iterdir()) == [exports.WEIGHTS_FILE, exports.META_FILE]


def test_a_flipped_bit_of_exported_weights_is_noticed(tmp_path, run_folder):
    folder = exports.export_model(models.load_model(run_folder), tmp_path)
    path = folder / exports.WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{path} differs from what was exported"):
        models.load_model(folder)


def test_the_bundled_model_is_the_recipe_of_emoji():
    model, config = models.load_model(), emoji.get_config().to_dict()
    weights = sum(x.size for x in jax.tree.leaves(model.denoiser.variables))
    assert round(weights / 1e6, 1) == 27.7  # As docs/emoji.md says.
    for part, recipe in ((model, config), (model.guide, guide.get_config().to_dict())):
        said = json.loads(json.dumps(recipe))
        assert {k: part.meta[k] for k in ("network", "noising", "sampling")} == {
            k: said[k] for k in ("network", "noising", "sampling")
        }
    assert model.meta["text_encoder"]["name"] == config["encoders"]["text"]


def test_a_model_of_format_version_1_is_read(tmp_path, run_folder):
    model = models.load_model(run_folder)
    folder = exports.export_model(model, tmp_path)  # Its meta lacks what version 1 did not have.
    edit_meta(folder, format_version=1)
    old = models.load_model(folder)
    assert old.meta["format_version"] == 1 and old.denoiser.process.target == "x_zero"
    assert old.denoiser.network == model.denoiser.network


def test_the_last_the_best_or_a_numbered_checkpoint_is_loaded(run_folder, state):
    for step, number in [("last", 7), ("best", 3), (5, 5), ("5", 5)]:
        model = models.load_model(run_folder, step)
        chex.assert_trees_all_equal(
            model.denoiser.variables["params"], at_step(state, number).ema_params
        )


def test_a_step_that_is_not_there_is_refused(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds the steps \[3, 5, 7\], got step 4"):
        models.load_model(run_folder, 4)
    with pytest.raises(ValueError, match="'last', 'best' or a number, got 'first'"):
        models.load_model(run_folder, "first")
    folder = exports.export_model(models.load_model(run_folder), tmp_path)
    with pytest.raises(ValueError, match="step must be 'last' for an exported model, got 'best'"):
        models.load_model(folder, "best")


def test_without_held_out_losses_there_is_no_best(tmp_path, state):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_checkpoint(manager, state, create_meta(), float("nan"))
    with pytest.raises(ValueError, match=r"has a held-out loss: choose one of \[7\]"):
        models.load_model(tmp_path, "best")


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_record_is_refused_and_the_other_steps_are_named(tmp_path, state, monkeypatch):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        for step, loss in [(3, 0.2), (7, 0.1)]:
            checkpoint.save_checkpoint(manager, at_step(state, step), create_meta(), loss)
    record = tmp_path / "7" / "meta" / "metadata"
    flip_bit(record, record.read_bytes().index(b'std_latent": [2.0') + 14)  # Now 3.0.
    (tmp_path / "9").mkdir()  # Empty, so not a checkpoint.
    with pytest.raises(
        DamagedError,
        match=r"step 7 in .* is damaged: its record .* differs .*another by its step: 3$",
    ):
        models.load_model(tmp_path)
    warnings = []
    shown = SimpleNamespace(warning=lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(models, "logging", shown)
    model = models.load_model(tmp_path, "best")
    chex.assert_trees_all_equal(model.denoiser.variables["params"], at_step(state, 3).ema_params)
    assert len(warnings) == 1 and "step 7" in warnings[0] and "not considered" in warnings[0]


def test_sampling_reads_the_averages_and_not_the_optimizer(tmp_path, state):
    # A large tensor of noise, which does not compress, first in the optimizer, then in the average.
    def save_and_load(folder, **changes):
        with checkpoint.open_checkpoints(folder) as manager:
            checkpoint.save_checkpoint(manager, state.replace(**changes), create_meta())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "_check_variables", lambda *args: None)
            before = count_bytes_read()
            models.load_model(folder)
            return count_bytes_read() - before

    noise = jax.random.normal(jax.random.key(0), (1 << 20,))
    with_optimizer = save_and_load(tmp_path / "a", opt_state=(noise, state.opt_state))
    with_average = save_and_load(tmp_path / "b", ema_params={**state.ema_params, "noise": noise})
    assert with_average > 0.8 * noise.nbytes
    assert with_optimizer < 0.2 * noise.nbytes


def count_bytes_read():
    """What the storage library has read from files since the process began."""
    found = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return sum(value["value"] for metric in found for value in metric["values"])
