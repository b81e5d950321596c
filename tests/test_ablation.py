"""The ablation: its rows lead to the recipe, and each trains, is measured, and is not run twice."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablation
from configs import emoji, guide

# What a run is called and when it draws makes no difference to what it learns.
FREE = {"steps", "sample_every", "captions"}


def test_every_default_of_the_recipe_is_in_a_row():
    built = ablation.get_config(len(ablation.ROWS)).to_dict()
    recipe = emoji.get_config().to_dict()
    assert {k: v for k, v in built.items() if k not in FREE} == {
        k: v for k, v in recipe.items() if k not in FREE
    }


def test_the_last_rows_guide_is_that_of_the_recipe():
    config = ablation.get_config(len(ablation.ROWS))
    config.update_from_flattened_dict(dict(ablation.ROWS[-1].guide))
    recipe = guide.get_config().to_dict()
    assert {k: v for k, v in config.to_dict().items() if k not in FREE - {"steps"}} == {
        k: v for k, v in recipe.items() if k not in FREE - {"steps"}
    }


def test_each_row_changes_the_config():
    configs = [ablation.get_config(k).to_dict() for k in range(len(ablation.ROWS) + 1)]
    assert all(one != other for one, other in zip(configs, configs[1:]))


def write_pictures(folder):
    """Noise pictures of two styles: of each 16 for training, 8 held-out cells, 8 concepts."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for style in ("flat", "round"):
        for i in range(32):
            name = f"{style}-{i}.png"
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name)
            split = ("train", "train", "cell", "test")[i % 4]
            rows.append((name, f"thing {i}, {style}", split, str(i), style))
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text", "split", "concept", "style"), *rows])


@pytest.mark.slow
def test_a_row_is_trained_for_its_minutes_and_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "home"))
    write_pictures(tmp_path / "pictures")
    tiny = {
        "data.path": str(tmp_path / "pictures"),
        "data.image_size": 64,
        "encoders.vae": "bundled:emoji",
        "encoders.text": "use",
        "batch_size": 16,
        "network.latent_image_size": 8,
        "network.block_depth": 1,
        "network.widths": (16, 32),
        "sampling.diffusion_steps": 3,
    }
    rows = (
        ablation.Row("tiny", tiny),
        ablation.Row("strong", {"sampling.class_guidance": 9.0}),
        ablation.Row("guided", {"sampling.class_guidance": 2.0}, {"steps": 2}),
    )
    monkeypatch.setattr(ablation, "ROWS", rows)
    out = tmp_path / "out"
    settings = {"captions_per_group": 6, "batch_size": 8, "progress": False}
    ablation.run_row(0, out, 0.02, 8, **settings)
    run = ablation.get_folder(out, 0) / "run"
    written = json.loads((run / "config.json").read_text())
    steps = written["steps"]
    assert steps >= 8 and written["network"]["norm"] == "batch"
    assert (run / "checkpoints" / str(steps)).is_dir()

    # Another sampler draws with the same weights.
    monkeypatch.setattr(ablation, "count_steps", None)
    ablation.run_row(1, out, 0.02, 8, **settings)
    assert [path.name for path in ablation.get_folder(out, 1).iterdir()] == ["quality"]
    told = [json.loads((ablation.get_folder(out, k) / ablation.DONE).read_text()) for k in (0, 1)]
    assert [t["sampling"]["class_guidance"] for t in told] == [4.0, 9.0]
    assert told[0]["groups"]["cell"]["drawn"]["kid"] != told[1]["groups"]["cell"]["drawn"]["kid"]

    # And with a guide; the rows before it draw without, whatever the run's folder holds by then.
    ablation.run_row(2, out, 0.02, 8, **settings)
    assert (run / "guide" / "meta.json").exists()
    path = ablation.get_folder(out, 1) / ablation.DONE
    before = path.read_bytes()
    ablation.run_row(1, out, 0.02, 8, **settings)
    again, drawn = json.loads(path.read_text()), json.loads(before)["groups"]["cell"]["drawn"]
    assert again["groups"]["cell"]["drawn"] == drawn

    header, rule, *lines = ablation.format_table(out).splitlines()
    assert header.startswith("| change | steps | batch | training R@1 | cells R@1 |")
    assert [line.split(" | ")[:3] for line in lines] == [
        [f"| {name}", str(steps), "16"] for name in ("tiny", "strong", "guided")
    ]
    assert {line.count("|") for line in (header, rule, *lines)} == {header.count("|")}
    assert all("[" in line for line in lines)


def test_a_row_of_the_sampler_alone_draws_with_the_weights_before_it():
    names = [row.name for row in ablation.ROWS]
    trained = [ablation.get_trained(k) for k in range(len(names))]
    assert trained[names.index("guidance 3")] == names.index("log-normal noise levels")
    assert trained[names.index("style guided apart")] == names.index("name and style apart")
    assert trained[names.index("guided by a weaker network")] == names.index("larger batch")
    assert sum(k == trained[k] for k in range(len(names))) == len(names) - 5
