"""The ablation: its rows lead to the recipe, and each trains, is measured, and is not run twice."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablation
from configs import emoji

# What a run is called and when it draws makes no difference to what it learns.
FREE = {"steps", "sample_every", "captions"}


def test_every_default_of_the_recipe_is_in_a_row():
    built = ablation.get_config(len(ablation.ROWS)).to_dict()
    recipe = emoji.get_config().to_dict()
    assert {k: v for k, v in built.items() if k not in FREE} == {
        k: v for k, v in recipe.items() if k not in FREE
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
        "captions": ("thing 1, flat",),
    }
    rows = ablation.Row("tiny", tiny), ablation.Row("group norm", {"network.norm": "group"})
    monkeypatch.setattr(ablation, "ROWS", rows)
    out = tmp_path / "out"
    folder = ablation.get_folder(out, 0)
    settings = {"captions_per_group": 6, "batch_size": 8, "progress": False}
    ablation.run_row(ablation.get_config(1), folder, 0.02, 8, **settings)
    written = json.loads((folder / "run" / "config.json").read_text())
    assert written["steps"] >= 8 and written["network"]["norm"] == "batch"
    assert (folder / "run" / "checkpoints" / str(written["steps"])).is_dir()
    header, rule, row = ablation.format_table(out).splitlines()
    assert header.startswith("| change | steps | batch | training R@1 | cells R@1 |")
    assert row.startswith(f"| tiny | {written['steps']} | 16 | ") and "[" in row
    assert header.count("|") == rule.count("|") == row.count("|")
