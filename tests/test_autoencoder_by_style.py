"""Figures of an autoencoder style by style: the choice, each figure, the command at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_autoencoder import SCRIPTS, write_pictures

from ldm_jax.pictures import Picture


@pytest.fixture
def measurer(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import autoencoder_by_style

    return autoencoder_by_style


def test_held_out_pictures_alone_are_chosen_and_more_contain_fewer(measurer):
    splits = ["train", "valid", "test", "cell"]
    pictures = [
        Picture(Path(f"{style}{i}"), (), splits[i % 4], str(i), style)
        for style in ("round", "flat")
        for i in range(40)
    ]
    few, many = (measurer.choose_pictures(pictures, n, 0) for n in (5, 99))
    assert list(few) == ["flat", "round"]
    for style in few:
        assert len(few[style]) == 5 and len(many[style]) == 30
        assert many[style][:5] == few[style]
        assert {p.split for p in many[style]} == {"valid", "test", "cell"}


def test_a_mean_has_the_interval_of_its_standard_error(measurer):
    x = np.random.default_rng(0).standard_normal(400)
    value, low, high = measurer.get_mean(x)
    np.testing.assert_allclose(value, x.mean())
    np.testing.assert_allclose(high - value, 1.959964 * x.std(ddof=1) / 20)
    np.testing.assert_allclose(value - low, high - value)


def test_a_channel_that_nothing_is_made_of_costs_nothing(measurer):
    """On a decoder that shows channel 0 as all three colours and does not look at channel 1."""

    def decode(z):
        return SimpleNamespace(sample=z[:, :1].repeat(1, 3, 1, 1))

    rng = np.random.default_rng(0)
    mean = rng.uniform(-0.5, 0.5, (6, 2, 4, 4)).astype(np.float32)
    mean[:, 1] *= 3.0
    model = SimpleNamespace(decode=decode, device=torch.device("cpu"))
    made = measurer.decode_latents(model, mean)
    used, unused = measurer.measure_channels(model, made, mean, np.full_like(mean, 0.25), made)
    assert unused["psnr_lost"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    # Grey at the mean in place of the picture: the error is the picture's deviation from it.
    error = np.square(mean[:, 0] - mean[:, 0].mean()).mean((1, 2))
    lost = 100.0 - 10.0 * np.log10(4.0 / error)
    np.testing.assert_allclose(used["psnr_lost"]["value"], lost.mean(), atol=0.1)
    variances = mean.var((0, 2, 3))
    np.testing.assert_allclose(used["share_of_variance"], variances[0] / variances.sum(), rtol=1e-5)
    np.testing.assert_allclose(unused["bits"], np.log2(np.sqrt(variances[1]) / 0.25), rtol=1e-5)


def test_the_command_writes_the_figures_of_each_style(measurer, tmp_path):
    from autoencoder_objective import create_autoencoder

    torch.manual_seed(0)
    create_autoencoder((4, 4, 8, 8), 1, 2).save_pretrained(tmp_path / "autoencoder")
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
        write_pictures(folder, n=64)
    lines = (folders[1] / "metadata.jsonl").read_text()
    (folders[1] / "metadata.jsonl").write_text(lines.replace("flat", "new").replace("bold", "odd"))
    command = [sys.executable, SCRIPTS / "autoencoder_by_style.py", "--channel_pictures=2",
               f"--autoencoder={tmp_path}/autoencoder", f"--out={tmp_path}/figures.json",
               *(f"--pictures={folder}" for folder in folders)]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "figures.json").read_text()
    styles = json.loads(text)["styles"]
    assert list(styles) == ["bold", "flat", "new", "odd"]
    for figures in styles.values():
        assert figures["pictures"] == 8 and figures["channel_pictures"] == 2
        assert figures["psnr"]["low"] < figures["psnr"]["value"] < figures["psnr"]["high"]
        assert np.isfinite(figures["kid_x1000"]["value"])
        assert sum(c["share_of_variance"] for c in figures["channels"]) == pytest.approx(1.0)
    for name, other in (("flat", "new"), ("bold", "odd")):  # the same pictures
        assert styles[name]["psnr"] == styles[other]["psnr"]
    assert "| odd | 3 | " in done.stdout and str(tmp_path) not in text
