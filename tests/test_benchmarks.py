"""The benchmarks at toy size: what they run and report; never how fast."""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import rows, train_step
from benchmarks.processes import run_processes
from benchmarks.train_step import Trainer
from ldm_jax import sharding
from ldm_jax.plotting import read_png_metadata


def run_benchmark(name, *arguments):
    """Output of a benchmark that ran as from the command line."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    [(code, output)] = run_processes([command], devices=1, timeout=240)
    assert code == 0, output
    return output


def read_table(output):
    """Markdown table => {first cell: {title: cell}}."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    titles, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {row[0]: dict(zip(titles[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.slow
def test_compile_time_measures_a_cold_and_a_warm_process(tmp_path):
    cache = tmp_path / "cache"
    arguments = ("--tiny", "--batch_size=4", f"--cache={cache}")
    table = read_table(run_benchmark("compile_time", *arguments))
    assert list(table) == ["cold", "warm"]
    for row in table.values():
        seconds = {phase: float(cell) for phase, cell in row.items()}
        assert list(seconds) == ["import", "set-up", "init", "first step", "total", "next step"]
        assert all(seconds[phase] > 0 for phase in ("import", "init", "first step", "total"))
        parts = ("import", "set-up", "init", "first step")
        assert seconds["total"] == pytest.approx(sum(map(seconds.get, parts)), abs=0.03)
    assert any("create_in_place" in path.name for path in cache.iterdir())
    assert len(list((cache / "programs").iterdir())) == 2  # The initial state's and the step's.


@pytest.mark.slow
def test_compile_time_wants_an_empty_cache(tmp_path):
    (tmp_path / "entry").touch()
    with pytest.raises(AssertionError, match="the cache must be empty at first, got .*"):
        run_benchmark("compile_time", "--tiny", f"--cache={tmp_path}")


@pytest.mark.slow
def test_end_to_end_draws_pictures_and_times_each_stage(tmp_path):
    output = run_benchmark("end_to_end", "--tiny", "--num=2", "--repeats=2", f"--out={tmp_path}")
    assert output.startswith("2 pictures, median of 2; JAX on cpu, the VAE on cpu\n")
    table = read_table(output)
    assert list(table) == ["text", "sampling", "decoding", "PNG", "total"]
    seconds = {stage: float(row["s"]) for stage, row in table.items()}
    assert min(seconds.values()) > 0
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), abs=1e-3)
    shares = [float(row["share"].rstrip("%")) for row in table.values()]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.3)
    pictures = sorted(tmp_path.iterdir())
    assert [path.name for path in pictures] == ["0000.png", "0001.png"]
    pixels = [np.asarray(Image.open(path)) for path in pictures]
    assert pixels[0].shape == (128, 128, 3) and pixels[0].std() > 1
    assert (pixels[0] != pixels[1]).any()
    text = "picture 1 of round 2, a red apple on a table"
    assert read_png_metadata(pictures[1]) == {"prompt": text}


def test_the_training_step_that_is_timed_has_a_loss():
    trainer = Trainer(rows.TINY, sharding.get_mesh("data", jax.devices()[:1]))
    call = trainer.get_call(trainer.get_step(), 2)
    losses = [float(call()["loss"]) for _ in range(3)]
    assert np.isfinite(losses).all()


def run_rows(name, folder, *arguments):
    """Rows of the table that a benchmark printed and wrote, the same ones."""
    out = folder / "rows.json"
    output = run_benchmark(name, "--tiny", "--repeats=1", f"--out={out}", *arguments)
    rows = json.loads(out.read_text())
    cells = [line.split("|")[1].strip() for line in output.splitlines() if line.startswith("|")]
    assert [cell for cell in cells if cell not in ("work", "---")] == [row["work"] for row in rows]
    return rows


@pytest.mark.slow
def test_train_step_times_ours_beside_pytorch_and_goes_on_after_errors(tmp_path):
    works = "ours", "ours-remat-accumulate2", "ours-accumulate3", "torch-one-eager", "torch-none"
    arguments = ("--batch_sizes=4", f"--rows={','.join(works)}")
    rows = run_rows("train_step", tmp_path, *arguments)
    assert [row["work"] for row in rows] == list(works)
    assert "must be divisible by accumulate=3" in rows[2]["error"]
    assert "a row must be ours, ours-OPTION or torch-TOKENS-MODE" in rows[4]["error"]
    for row in (rows[0], rows[1], rows[3]):
        assert 0 < row["lowest"] <= row["ms"] <= row["highest"]
        assert row["img/s"] == pytest.approx(4000 / row["ms"])
        assert row["of peak"] > 0 and row["compile s"] > 0
    assert rows[0]["program GB"] > 0


@pytest.mark.slow
def test_train_step_times_a_recipe(tmp_path):
    arguments = "--batch_sizes=4", "--recipe=emoji"
    [row] = run_rows("train_step", tmp_path, *arguments)
    assert row["work"] == "ours" and row["ms"] > 0


def test_train_step_refuses_pytorch_s_rows_of_a_recipe_and_unknown_recipes(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--tiny", "--recipe=emoji", "--rows=ours,torch-one-eager"])
    assert "all rows are ours, got ours,torch-one-eager" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.main(["--tiny", "--recipe=emojis"])
    known = "demo, emoji, folder, guide, seed, tiny"
    assert f"must be one of {known}, got emojis" in capsys.readouterr().err


@pytest.mark.slow
def test_sampling_times_ours_beside_pytorch(tmp_path):
    works = "ours", "ours-unfolded", "torch-tiled-eager"
    arguments = ("--nums=2,1", "--steps=4", f"--rows={','.join(works)}")
    rows = run_rows("sampling", tmp_path, *arguments)
    found = [(row["work"], row["size"]) for row in rows]
    assert found == [(work, num) for num in (2, 1) for work in works[:2]] + [
        (works[2], 2),
        (works[2], 1),
    ]
    for row in rows:
        assert row["img/s"] == pytest.approx(1000 * row["size"] / row["ms"])
        assert row["of peak"] > 0


@pytest.mark.slow
def test_solver_steps_compares_all_methods_and_schedules():
    arguments = ("--evaluations=3,9", "--reference=6", "--captions=1")
    table = read_table(run_benchmark("solver_steps", *arguments))
    assert len(table) == 9
    errors = {row: {k: float(v) for k, v in cells.items()} for row, cells in table.items()}
    assert all(np.isfinite(list(cells.values())).all() for cells in errors.values())
    # Nine evaluations of Heun on the reference's levels are the reference itself.
    assert errors["heun, log_snr"]["9"] == 0 < errors["ddim, angle"]["9"]
