"""The doors together: captioned pictures => cache => run => pictures, with the real encoders."""

import csv
import json
import signal
from functools import partial
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import encode
import sample
import train
from configs import tiny
from ldm_jax import checkpoint, exports, models
from ldm_jax.data import open_cache
from ldm_jax.encoders import load_vae
from ldm_jax.plotting import read_png_metadata

COLOURS = ("red", "green", "blue", "orange")
SHAPES = ("ellipse", "rectangle")


def draw_pictures(folder, n=50):
    """Coloured shapes on white with captions.csv; every tenth picture is held out."""
    folder.mkdir()
    rows = []
    for i in range(n):
        colour, shape = COLOURS[i % 4], SHAPES[i // 4 % 2]
        image = Image.new("RGB", (64, 64), "white")
        getattr(ImageDraw.Draw(image), shape)((8 + i % 7, 8, 50, 40 + i % 11), fill=colour)
        image.save(folder / f"{i:02d}.png")
        split = "valid" if i % 10 == 9 else "train"
        rows.append((f"{i:02d}.png", f"a {colour} {shape}", split))
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text", "split"), *rows])


def get_config(root, **changes):
    """configs/tiny.py on that folder, at half its size, with one level less and x_0 as target."""
    config = tiny.get_config()
    config.update(
        {
            "data": {"source": "folder", "path": str(root / "pictures"), "image_size": 64},
            "network": {"latent_image_size": 8, "widths": (16, 32)},
            "noising": {"target": "x_zero"},
            "training": {"loss": "mae"},
            "captions": ("a red ellipse", "a blue rectangle"),
        }
    )
    config.data.cache = str(root / "cache")
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with pictures, their cache, and a run of 20 steps."""
    root = tmp_path_factory.mktemp("doors")
    draw_pictures(root / "pictures")
    encode.encode(get_config(root), progress=False)
    train.train(get_config(root), root / "run")
    return root


@pytest.fixture(scope="module")
def whole(root):
    """What that run gives when its command is given again: it is complete, the newest state."""
    return train.train(get_config(root), root / "run")


def test_a_run_leaves_its_log_config_checkpoints_and_samples(root):
    run = root / "run"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(0 < line["loss"] < 2 and line["images_per_second"] > 0 for line in lines)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [10, 20]
    assert json.loads((run / "config.json").read_text())["network"]["widths"] == [16, 32]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "20"]
    assert [p.name for p in (run / "samples").iterdir()] == ["0000020.png"]
    assert list((run / "tensorboard").iterdir())


def test_the_loss_falls_below_that_of_predicting_zero(root):
    lines = [json.loads(line) for line in (root / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


def test_resume_equals_an_uninterrupted_run(root, whole):
    # The schedule belongs to the whole run, so the first half is the same config, cut short.
    config = get_config(root)
    half = root / "half"
    with pytest.raises(KeyboardInterrupt):
        stop_at(15, config, half)
    assert checkpoint.open_checkpoints(half / "checkpoints").latest_step() == 10
    resumed = train.train(config, half)
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(whole))


def test_the_next_run_takes_the_compiled_step_without_tracing_it(root, whole, tmp_path):
    class Untraced:
        __name__ = "step_in_place"

        def lower(self, *args):
            raise AssertionError("the step was traced")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.training, "get_train_step", lambda *args, **settings: Untraced())
        state = train.train(get_config(root), tmp_path / "again")
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(whole))


def stop_at(step, config, workdir):
    """Trains, and interrupts as Ctrl-C would when the line of `step` is logged."""

    class Interrupted(train.RunLog):
        def write(self, at, values):
            super().write(at, values)
            if at == step:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "RunLog", Interrupted)
        train.train(config, workdir)


def test_a_run_that_gets_sigterm_saves_returns_and_goes_on(root, whole, capsys):
    config = get_config(root)
    workdir = root / "preempted"
    with pytest.MonkeyPatch.context() as patch:

        class Preempted(train.RunLog):
            def add_step(self, metrics, waited):
                super().add_step(metrics, waited)
                if self._bar.n == 13:
                    signal.raise_signal(signal.SIGTERM)

        patch.setattr(train, "RunLog", Preempted)
        state = train.train(config, workdir)
    assert int(state.step) == 13
    assert "SIGTERM: stopped after step 13, which is saved" in capsys.readouterr().out
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["10", "13"]
    resumed = train.train(config, workdir)
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(whole))
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 13, 15, 20]


@pytest.mark.slow
def test_quality_is_measured_while_training_on_request(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "home"))
    evaluation = {"captions_per_group": 6, "batch_size": 4}
    changes = {"evaluate_every": 2, "evaluation": evaluation, "log_every": 3}
    train.train(get_config(root, steps=4, **changes), tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    # No picture here is held out as a cell or for testing.
    assert [line["step"] for line in lines if "quality/train/recall_1" in line] == [2, 4]
    assert all(line["quality/seconds"] > 0 for line in lines if line["step"] != 3)
    written = sorted(path.name for path in (tmp_path / "run" / "quality").iterdir())
    assert written == ["0000002.json", "0000002.png", "0000004.json", "0000004.png"]
    assert "quality at step 4, by EfficientNet-lite0 (6 pictures, " in capsys.readouterr().out


def test_a_window_of_steps_is_traced_on_request(root, tmp_path, capsys):
    train.train(get_config(root, steps=4, save_every=4), tmp_path, profile="2:2")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert f"traced the steps 2 to 3 into {tmp_path / 'profile'}" in capsys.readouterr().out


def test_the_best_checkpoint_is_drawn_from_on_request(root, tmp_path):
    losses = {}
    for line in (root / "run" / "log.jsonl").read_text().splitlines():
        line = json.loads(line)
        losses[line["step"]] = line.get("held_out_loss", float("inf"))
    best = min(losses, key=lambda step: losses[step])
    pictures = [
        sample.sample(["a red ellipse"], tmp_path / str(step), **from_step(root, step))[0]
        for step in ("best", best)
    ]
    one, other = (np.asarray(Image.open(path)) for path in pictures)
    np.testing.assert_array_equal(one, other)


def find_first_step(root):
    steps = [int(path.name) for path in (root / "run" / "checkpoints").iterdir()]
    return min(steps)


def from_step(root, step):
    return {"checkpoint_folder": root / "run", "checkpoint_step": step}


def test_pictures_are_drawn_from_the_checkpoint_alone(root, tmp_path):
    prompts = ["a red ellipse", "a green rectangle"]
    paths = sample.sample(prompts, tmp_path, checkpoint_folder=root / "run", num=2, seed=5)
    assert [p.name for p in paths] == [
        "000-a-red-ellipse-5.png",
        "000-a-red-ellipse-6.png",
        "001-a-green-rectangle-5.png",
        "001-a-green-rectangle-6.png",
    ]
    assert all(Image.open(path).size == (64, 64) for path in paths)
    assert (tmp_path / "grid.png").exists()
    metadata = read_png_metadata(paths[3])
    assert metadata["prompt"] == "a green rectangle"
    assert metadata["seed"] == "6"
    assert metadata["diffusion_steps"] == "5"
    assert metadata["checkpoint"] == str(root / "run") and metadata["step"] == "20"


def test_a_picture_is_drawn_again_alone_from_its_seed(root, tmp_path):
    run = {"checkpoint_folder": root / "run"}
    prompts = ["a red ellipse", "a green rectangle"]
    together = sample.sample(prompts, tmp_path / "a", num=2, seed=5, **run)
    alone = sample.sample(["a green rectangle"], tmp_path / "b", num=1, seed=6, **run)
    one, other = (np.asarray(Image.open(p), np.int16) for p in (together[3], alone[0]))
    assert np.abs(one - other).max() <= 1


def test_steps_and_guidance_override_the_checkpoint(root, tmp_path):
    options = {"checkpoint_folder": root / "run", "diffusion_steps": 3, "class_guidance": 0.0}
    paths = sample.sample(["a red ellipse", "a blue ellipse"], tmp_path, **options)
    metadata = read_png_metadata(paths[0])
    assert (metadata["diffusion_steps"], metadata["class_guidance"]) == ("3", "0.0")
    # Without guidance by the text, two prompts give the same picture.
    one, other = (np.asarray(Image.open(p), np.int16) for p in paths)
    assert np.abs(one - other).max() <= 1


def test_ways_to_walk_and_to_guide_change_the_picture_and_are_written_into_it(root, tmp_path):
    options = {"checkpoint_folder": root / "run", "diffusion_steps": 4}
    kinds = {
        "plain": {},
        "heun": {"method": "heun"},
        "ancestral": {"method": "euler_ancestral"},
        "interval": {"guidance_interval": (0.0, 0.3)},
        "negative": {"negative_prompt": "a blue rectangle"},
        "guide": {"guide_folder": root / "run", "guide_step": find_first_step(root)},
    }
    pictures = {}
    for name, kind in kinds.items():
        path = sample.sample(["a red ellipse"], tmp_path / name, **options, **kind)[0]
        pictures[name], metadata = np.asarray(Image.open(path)), read_png_metadata(path)
        assert metadata["method"] == kind.get("method", "dpm_solver_pp_2m")
        assert metadata.get("negative_prompt") == kind.get("negative_prompt")
        assert ("guide" in metadata) == (name == "guide")
    assert all(np.any(pictures[name] != pictures["plain"]) for name in list(kinds)[1:])
    # Exported together, the guide is the model's own, unless there is to be none.
    guide = models.load_model(root / "run", find_first_step(root))
    folder = tmp_path / "guided"
    exports.export_model(models.load_model(root / "run").guided_by(guide), folder, "float32")
    for name, kind, told in (("guide", {}, "its own"), ("plain", {"guide_folder": "none"}, None)):
        options = {"checkpoint_folder": folder, "diffusion_steps": 4} | kind
        path = sample.sample(["a red ellipse"], tmp_path / "again", **options)[0]
        np.testing.assert_array_equal(Image.open(path), pictures[name])
        assert read_png_metadata(path).get("guide") == told
    # Without a guide there is room for a negative prompt.
    options = {"checkpoint_folder": folder, "diffusion_steps": 4, "guide_folder": "none"}
    path = sample.sample(["a red ellipse"], tmp_path / "n", **options, **kinds["negative"])[0]
    np.testing.assert_array_equal(Image.open(path), pictures["negative"])


def test_a_guide_of_other_data_or_beside_a_negative_prompt_is_refused(root, tmp_path):
    options = {"checkpoint_folder": root / "run", "guide_folder": root / "run"}
    with pytest.raises(ValueError, match="do not go together"):
        sample.sample(["a"], tmp_path, negative_prompt="b", **options)
    model = models.load_model(root / "run")
    model.meta["std_latent"] = 2.0
    exports.export_model(model, tmp_path / "model")
    options["guide_folder"] = tmp_path / "model"
    with pytest.raises(ValueError, match="belongs to other data: its std_latent is 2.0"):
        sample.sample(["a"], tmp_path, **options)


def test_decoding_in_bfloat16_changes_little(root, tmp_path):
    options = {"checkpoint_folder": root / "run", "diffusion_steps": 3}
    exact, rounded = (
        np.asarray(Image.open(sample.sample(["a cat"], tmp_path / d, vae_dtype=d, **options)[0]))
        for d in ("float32", "bfloat16")
    )
    error = exact.astype(float) - rounded
    assert 0 < np.sqrt(np.mean(error**2)) < 2  # of 255


def get_npy_config(folder, **changes):
    config = get_config(folder, **changes)
    config.data.source = "npy"
    config.data.path = f"{folder / 'latents.npy'},{folder / 'text.npy'}"
    config.latents.normalisation = "global"
    config.latents.deviations = 2.5
    return config


def test_a_pair_of_npy_files_is_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "latents.npy", rng.normal(size=(64, 8, 8, 4)).astype(np.float32))
    np.save(tmp_path / "text.npy", rng.normal(size=(64, 512)).astype(np.float32))
    config = get_npy_config(tmp_path, steps=5, sample_every=0)
    encode.encode(config, progress=False)
    state = train.train(config, tmp_path / "run")
    assert int(state.step) == 5
    assert not (tmp_path / "run" / "samples").exists()
    with pytest.raises(ValueError, match="evaluate_every needs a cache of pictures with captions"):
        train.train(get_npy_config(tmp_path, steps=6, evaluate_every=2), tmp_path / "other")
    model = models.load_model(tmp_path / "run")
    train_split = open_cache(tmp_path / "cache").examples("train")
    latents = np.load(tmp_path / "latents.npy")[train_split]
    np.testing.assert_allclose(model.scale.std_latent, 2.5 * latents.std(), rtol=1e-3)
    paths = sample.sample(["anything"], tmp_path / "out", checkpoint_folder=tmp_path / "run")
    assert paths[0].exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, r"the loss became nan at step 2 \(steps 1 to 5 were"),
        ({"sample_every": 3}, r"the loss became nan at step 2 \(steps 1 to 3 were"),
        # The loss of step 1 is that of the weights before it.
        ({"save_every": 1}, r"the held-out loss became (nan|inf) at step 1 "),
    ],
)
def test_nan_stops_the_run_before_it_is_saved_or_drawn(root, tmp_path, changes, message):
    config = get_config(root, **changes)
    config.optimizer.learning_rate = 1e38
    config.optimizer.clip_norm = 0.0
    config.optimizer.warmup_steps = 0
    with pytest.raises(FloatingPointError, match=message):
        train.train(config, tmp_path)
    assert checkpoint.open_checkpoints(tmp_path / "checkpoints").latest_step() is None
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"save_every": 0}, "config.save_every must be at least 1, got 0"),
        ({"steps": 0}, "config.steps must be at least 1, got 0"),
        ({"sample_every": -1}, "config.sample_every must be at least 0, got -1"),
    ],
)
def test_numbers_of_steps_that_make_no_sense_are_refused(root, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train(get_config(root, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_address_is_no_folder(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="got gs://bucket/run: mount what it names"):
        train.train(get_config(root), "gs://bucket/run")
    with pytest.raises(ValueError, match="got gs://bucket/run: mount what it names"):
        models.load_model("gs://bucket/run")
    config = get_config(root)
    config.data.cache = "gs://bucket/cache"
    with pytest.raises(ValueError, match="got gs://bucket/cache: mount what it names"):
        encode.encode(config, progress=False)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_another_network_is_not_gone_on_with(root):
    config = get_config(root)
    config.network.block_depth = 2
    with pytest.raises(ValueError, match="network.block_depth is 1 there, 2 here"):
        train.train(config, root / "run")


def test_a_network_of_other_sizes_than_the_cache_is_refused(root, tmp_path):
    config = get_config(root)
    config.network.latent_image_size = 16
    with pytest.raises(ValueError, match=r"built for latents of shape \(16, 16, 4\)"):
        train.train(config, tmp_path)
    config = get_config(root)
    config.network.emb_size = 384
    with pytest.raises(ValueError, match="emb_size is 384, .* holds text embeddings of width 512"):
        train.train(config, tmp_path)


def test_a_cache_of_another_text_encoder_is_refused(root, tmp_path):
    manifest_file = root / "cache" / "manifest.json"
    text = manifest_file.read_text()
    manifest = json.loads(text)
    manifest["text_encoder"]["sha256"] = "00"
    manifest_file.write_text(json.dumps(manifest))
    try:
        with pytest.raises(ValueError, match="must have been made with the text_encoder"):
            train.train(get_config(root), tmp_path)
    finally:
        manifest_file.write_text(text)


def test_a_missing_cache_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it with encode.py"):
        train.train(get_config(tmp_path), tmp_path / "run")


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "at least one prompt"),
        (["  "], "at least one visible character"),
        (["x" * 10_000], "1000"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(root, tmp_path, prompts, message):
    with pytest.raises(ValueError, match=message):
        sample.sample(prompts, tmp_path / "out", checkpoint_folder=root / "run")
    assert not (tmp_path / "out").exists()


def test_a_decoder_of_the_same_latents_is_taken_and_one_of_others_refused(root, tmp_path):
    vae = load_vae("bundled:emoji")._model
    options = {"checkpoint_folder": root / "run", "diffusion_steps": 3}
    draw = partial(sample.sample, ["a cat"], **options)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.5
        vae.save_pretrained(tmp_path / "decoder")
        vae.encoder.conv_in.bias += 0.5
        vae.save_pretrained(tmp_path / "encoder")
    plain, brighter = (
        Image.open(draw(tmp_path / str(name), vae=name)[0])
        for name in (None, str(tmp_path / "decoder"))
    )
    difference = np.asarray(brighter).astype(int) - np.asarray(plain)
    assert np.median(difference[np.asarray(plain) < 190]) == 64  # 0.5 of 2 is 63.75 of 255
    assert brighter.text["vae"] == str(tmp_path / "decoder")
    assert plain.text["vae"] == "bundled:emoji"
    assert brighter.text["decoder_sha256"] != plain.text["decoder_sha256"]
    with pytest.raises(ValueError, match="bundled:emoji of digest .*/encoder found here has"):
        draw(tmp_path / "out", vae=str(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="trained with use of digest .* use-parts found here has"):
        draw(tmp_path / "out", text_encoder="use-parts")
    with pytest.raises(ValueError, match="guide_step 3 needs a guide's run"):
        draw(tmp_path / "out", guide_step=3)


def test_an_interval_that_is_no_pair_of_numbers_says_what_was_needed():
    given = dict.fromkeys(sample.SETTINGS, SimpleNamespace(value=None))
    given["guidance_interval"] = SimpleNamespace(value=["0.1", "b"])
    with pytest.raises(ValueError, match="needs two numbers, as 0.1,0.8, got 0.1,b"):
        sample._get_settings(given)


def test_another_vae_than_the_trainings_is_refused(root, tmp_path):
    model = models.load_model(root / "run")
    model.meta["vae"]["sha256"] = "00"
    exports.export_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="was trained with bundled:emoji of digest 00"):
        sample.sample(["a"], tmp_path / "out", checkpoint_folder=tmp_path / "model")
