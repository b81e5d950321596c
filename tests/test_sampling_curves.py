"""The script that draws quality against evaluations and guidance: points, counts, plots, resume."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_quality import create_exam, export_tiny, write_pictures

import evaluate
from ldm_jax import models, quality, sampler, solvers
from ldm_jax.latents import LatentScale
from ldm_jax.metrics import Estimate
from ldm_jax.report import to_json
from ldm_jax.text import load_text_encoder
from scripts import sampling_curves as script

SAMPLING = {"class_guidance": 3.0, "diffusion_steps": 5, "schedule": "angle"}
TOLD = {"checkpoint": "bundled", "step": "last", "weights": "aa", "seed": 0}


class Fields:
    """A VAE whose latents are the colours of fields of 8 x 8 pixels."""

    def decode(self, latents, as_bytes):
        images = np.rint((np.clip(latents, -1, 1) + 1) * 127.5).astype(np.uint8)
        return images.repeat(8, 1).repeat(8, 2)


def create_examinee():
    exam, _ = create_exam()
    captions = {split: exam.captions(split) for split in exam.chosen}
    seeds = {split: quality.get_seeds(texts, 0)[:, None] for split, texts in captions.items()}
    labels = {split: np.ones((len(texts), 2), np.float32) for split, texts in captions.items()}
    denoiser = jax.tree_util.Partial(lambda x_t, levels, labels: x_t * (0.5 + labels[0, 0] / 4))
    scale = LatentScale(np.ones(3, np.float32), np.zeros(3, np.float32))
    model = models.Model(denoiser, scale, {"sampling": {}})
    return evaluate.Examinee(model, (4, 4, 3), Fields(), None, exam, labels, seeds, None, {})


@pytest.mark.parametrize("name", [*solvers.METHODS, "ddim:angle", "heun:cube_root"])
def test_evaluations_are_as_many_as_the_network_runs(name):
    runs = []

    def denoise(x_t, noise_levels, labels):
        jax.debug.callback(lambda level: runs.append(float(level)), noise_levels[0])
        return x_t

    noise, labels = np.ones((2, 2, 2, 1), np.float32), np.zeros((2, 3), np.float32)
    _, settings = script.plan_evaluations(SAMPLING, [name], [6, 3]).values()
    for asked, planned in zip((3, 6), settings, strict=True):
        runs.clear()
        diffuser = sampler.get_diffuser(jax.tree_util.Partial(denoise), **planned)
        diffuser.reverse_diffusion(noise, labels, keys=sampler.get_picture_keys([0, 1]))
        jax.effects_barrier()
        assert len(runs) == script.count_evaluations(planned)
        assert asked - ("heun" in name) <= len(runs) <= asked


def test_the_plan_varies_what_it_says_and_keeps_the_rest():
    sampling = SAMPLING | {"method": "ddim", "eta": 0.5, "perc": 90.0}
    own, heun, angle = script.plan_evaluations(
        sampling, ["heun", "ddim:angle"], [6, 5, 69]
    ).values()
    assert own == [script.complete(sampling) | {"diffusion_steps": 70}]
    assert [s["diffusion_steps"] for s in heun] == [4, 36]  # 5 and 6 are the same walk.
    assert {s["schedule"] for s in heun} == {"log_snr"} and {s["eta"] for s in heun} == {0.0}
    assert angle[-1] == own[0] | {"eta": 0.0}  # Else its point is not drawn twice.
    everywhere, inside = script.plan_guidance(sampling, [3.0, 1.0], 24, (0.1, 0.8)).values()
    assert [s["class_guidance"] for s in everywhere] == [1.0, 3.0]
    assert {s["diffusion_steps"] for s in everywhere} == {25} and everywhere[0]["perc"] == 90.0
    assert inside[0] == everywhere[0] and inside[1]["guidance_interval"] == [0.1, 0.8]
    with pytest.raises(ValueError, match="guidance_interval must be two levels or none"):
        script.plan_guidance(sampling, [3.0], 24, (0.1,))


def test_points_are_drawn_once_and_plotted(tmp_path, monkeypatch):
    examinee, drawn = create_examinee(), []
    draw = evaluate.draw_group
    monkeypatch.setattr(evaluate, "draw_group", lambda *a, **k: drawn.append(a[1:3]) or draw(*a))
    samplers = ["dpm_solver_pp_2m", "ddim:angle"]
    few = script.plan_evaluations(SAMPLING, samplers, [3])
    many = script.plan_evaluations(SAMPLING, samplers, [3, 12])
    guidance = script.plan_guidance(SAMPLING, [1.0, 3.0], 12, (0.1, 0.8))
    path = tmp_path / "out" / "curves.json"
    script.measure_points(examinee, [few], ["cell"], path, TOLD)
    assert len(drawn) == 3 and len(json.loads(path.read_text())["points"]) == 3
    script.measure_points(examinee, [many, guidance], ["cell", "test"], path, TOLD)
    # Two more evaluations; of guidance 1, and 3 on the interval: 3 everywhere is among them.
    assert len(drawn) == 3 + 4 + 7
    assert len({script.get_key(*point) for point in drawn}) == len(drawn)
    before = path.read_bytes()
    points = script.measure_points(examinee, [many, guidance], ["cell"], path, TOLD)
    assert len(drawn) == 14 and path.read_bytes() == before

    # A point is what evaluate.py would measure with its settings.
    point = points[script.get_key("cell", many["ddim, angle"][0])]
    assert point["evaluations"] == 3
    images = draw(examinee, "cell", SAMPLING | {"diffusion_steps": 4})
    assert point["figures"] == to_json(quality.measure_pictures(examinee.exam, "cell", images))

    text = script.write_curves(path.parent, points, many, guidance, ["cell", "test"], TOLD)
    assert (path.parent / "curves.md").read_text() == text
    assert text.count("dpm_solver_pp_2m, log_snr, 12 evaluations, guidance 3") == 2
    assert text.count("DPM-Solver++(2M) at 12 network evaluations within") == 2
    for name in ("evaluations.png", "guidance.png"):
        with Image.open(path.parent / name) as picture:
            assert picture.format == "PNG" and picture.size[0] > 600


def test_points_of_another_exam_are_refused(tmp_path):
    path = tmp_path / "curves.json"
    script.save_points(path, TOLD, {})
    assert script.load_points(path, TOLD | {"step": 5}) == {}
    with pytest.raises(ValueError, match="of checkpoint 'bundled', .*seed is 0 there, 1 here"):
        script.load_points(path, TOLD | {"seed": 1})
    with pytest.raises(ValueError, match="weights is 'aa' there, 'bb' here.*Choose another --out"):
        script.load_points(path, TOLD | {"weights": "bb"})
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a file of this script"):
        script.load_points(path, TOLD)


@pytest.mark.parametrize(
    "kid, recall, verdict",
    [(110, 0.3, "holds"), (10, 0.9, "holds"), (151, 0.3, "does not"), (110, 0.19, "does not")],
)
def test_few_evaluations_are_held_against_the_interval_of_70_levels(kid, recall, verdict):
    plan = script.plan_evaluations(SAMPLING, ["dpm_solver_pp_2m"], [12])
    (own,), (fast,) = plan.values()
    figures = [
        {"kid": Estimate(120, 90, 150), "recall_1": Estimate(0.3, 0.2, 0.4)},
        {"kid": Estimate(kid, kid, kid), "recall_1": Estimate(recall, recall, recall)},
    ]
    points = {
        script.get_key("cell", s): {"figures": to_json(f)} for s, f in zip((own, fast), figures)
    }
    line = script.judge(points, plan, "cell")
    assert f"levels of ddim, angle, or better: {verdict}" in line
    assert f"{kid:.1f} to [90.0, 150.0]" in line
    del points[script.get_key("cell", fast)]
    assert script.judge(points, plan, "cell").endswith("12 network evaluations was not measured.")


@pytest.mark.slow
def test_the_curves_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "home"))
    options = dict(
        checkpoint_folder=export_tiny(tmp_path / "model", load_text_encoder("use")),
        pictures=write_pictures(tmp_path / "pictures"),
        captions_per_group=6,
        samplers=["dpm_solver_pp_2m"],
        evaluations=[2],
        guidance=[],
        batch_size=6,
        progress=False,
    )
    text = script.sampling_curves(tmp_path / "out", **options)
    assert "captions_per_group: 6" in text and "was not measured" in text
    told = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert [p["evaluations"] for p in told["points"]] == [69, 2]
    assert not (tmp_path / "out" / "guidance.png").exists()
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        script.sampling_curves(tmp_path / "out", seed=1, **options)
    with pytest.raises(ValueError, match="groups must be among .*'cell'.*, got .'valid'"):
        script.sampling_curves(tmp_path / "out", groups=["valid"], **options)
    with pytest.raises(ValueError, match="was trained with use of digest"):
        script.sampling_curves(tmp_path / "out", text_encoder="use-parts", **options)


@pytest.mark.slow
def test_the_command_says_what_is_missing(tmp_path):
    command = ["-m", "scripts.sampling_curves", f"--checkpoint={tmp_path / 'none'}"]
    result = subprocess.run(
        [sys.executable, *command],
        cwd=Path(script.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith("sampling_curves.py: no such checkpoint folder")
    )
