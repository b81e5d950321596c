"""Snapshots on the disk, and the doors that make an average of any length of them."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from states import create_meta, create_state
from test_doors import get_config

import encode
import sample
import train
from ldm_jax import models, power_ema, snapshots
from ldm_jax.plotting import read_png_metadata
from ldm_jax.records import DamagedError

LENGTHS = (0.05, 0.1)
EXPORT = Path(__file__).parents[1] / "scripts" / "export_model.py"


@pytest.fixture(scope="module")
def state():
    """A state whose averages are its weights, moved: by 1 those of 0.05, by 2 those of 0.1."""
    state = power_ema.add_averages(create_state(), LENGTHS)
    moved = {
        name: jax.tree.map(lambda x, k=k: x + k, average)
        for k, (name, average) in enumerate(state.power_emas.items(), start=1)
    }
    return state.replace(power_emas=moved)


@pytest.fixture
def workdir(tmp_path, state):
    """Snapshots of the steps 10, 20, ... 100, all of the same averages."""
    for step in range(10, 101, 10):
        snapshots.save_snapshot(tmp_path, step, jax.device_get(state.power_emas), create_meta())
    return tmp_path


def test_a_length_that_was_kept_comes_back_as_it_was_rounded(workdir, state):
    meta, variables = snapshots.reconstruct(workdir, 0.1)
    assert meta["ema"] == {"sigma_rel": 0.1, "step": 100, "error": meta["ema"]["error"]}
    assert meta["ema"]["error"] < 1e-6
    assert {k: v for k, v in meta.items() if k != "ema"} == create_meta()
    kept = jax.device_get(state.power_emas["0.1"])
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), kept["params"])
    chex.assert_trees_all_close(variables["params"], rounded, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(variables["batch_stats"], kept["batch_stats"], rtol=1e-5, atol=1e-6)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


def test_only_snapshots_up_to_the_step_are_read(workdir):
    for step, path in snapshots.list_snapshots(workdir).items():
        if step > 50:
            path.write_bytes(b"not a snapshot")
    (workdir / "checkpoints").mkdir()
    model = models.load_model(workdir / "checkpoints", step="50", ema=0.08)
    assert model.meta["ema"]["step"] == 50


def test_the_cost_is_what_the_files_take(workdir, state):
    size = snapshots.list_snapshots(workdir)[10].stat().st_size
    told = snapshots.describe_cost(state, 10_000)
    assert told.startswith("power-function averages of sigma_rel 0.05 and 0.1: 10000 snapshots of ")
    stated = float(told.split(" MiB, ")[1].split(" GiB")[0]) * 2**30 / 10_000
    # Beside the tensors a file holds their names and the meta.
    assert 0.99 * stated < size < stated + 30_000


def test_steps_taken_again_are_dropped(workdir):
    snapshots.drop_later(workdir, 35)
    assert list(snapshots.list_snapshots(workdir)) == [10, 20, 30]
    snapshots.drop_later(workdir, 30)
    assert list(snapshots.list_snapshots(workdir)) == [10, 20, 30]


def test_a_write_that_fails_leaves_no_snapshot(workdir, state, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="a snapshot could not be written to .*110.*: disk full"):
        snapshots.save_snapshot(workdir, 110, jax.device_get(state.power_emas), create_meta())
    assert max(snapshots.list_snapshots(workdir)) == 100


def test_a_weight_beyond_float16_is_refused(tmp_path):
    averages = {"0.1": {"params": {"kernel": np.float32([1e6])}, "batch_stats": {}}}
    with pytest.raises(ValueError, match="0.1/params/kernel has values beyond .*: 1000000.0"):
        snapshots.save_snapshot(tmp_path, 1, averages, create_meta())
    assert not snapshots.list_snapshots(tmp_path)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.9])
def test_damage_is_noticed_and_named(workdir, place):
    path = snapshots.list_snapshots(workdir)[40]
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=f"the snapshot {path} is damaged: .* Move it away"):
        models.load_model(workdir, ema=0.1)
    path.unlink()
    models.load_model(workdir, ema=0.1)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"ema": 0.4}, ValueError, r"sigma_rel must lie in \(0, 0.2887\), got 0.4"),
        ({"ema": 0.01}, ValueError, r"10 snapshots up to step 100 give averages of sigma_rel 0.03"),
        ({"ema": 0.1, "step": 45}, FileNotFoundError, r"of the steps \[10, 20, .*got step 45"),
        ({"ema": 0.1, "step": "first"}, ValueError, "step must be 'last', 'best' or a number"),
        ({"ema": 0.1, "step": "best"}, FileNotFoundError, "no such checkpoint folder"),
    ],
)
def test_what_the_snapshots_do_not_give_is_refused(workdir, options, error, message):
    with pytest.raises(error, match=message):
        models.load_model(workdir, **options)


def test_without_snapshots_the_error_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no snapshots: .*--config.power_ema.sigma_rels"):
        models.load_model(tmp_path, ema=0.1)
    with pytest.raises(
        ValueError, match=r"ema 0.1\) needs the workdir of a run, .* is an exported"
    ):
        models.load_model(ema=0.1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A cache of random latents."""
    root = tmp_path_factory.mktemp("snapshots")
    rng = np.random.default_rng(0)
    np.save(root / "latents.npy", rng.normal(size=(64, 8, 8, 4)).astype(np.float32))
    np.save(root / "text.npy", rng.normal(size=(64, 512)).astype(np.float32))
    encode.encode(get_tiny(root), progress=False)
    return root


@pytest.fixture(scope="module")
def alone(root):
    """The last state of a run of 20 steps with snapshots of every second one, in "run"."""
    return train.train(get_tiny(root), root / "run")


@pytest.fixture(scope="module")
def run(root, alone):
    """The folder of that run."""
    return root / "run"


def get_tiny(root, sigma_rels=LENGTHS):
    config = get_config(root)
    config.data.source = "npy"
    config.data.path = f"{root / 'latents.npy'},{root / 'text.npy'}"
    config.network.norm = "batch"
    config.power_ema.sigma_rels = sigma_rels
    config.power_ema.snapshot_every = 2
    return config


def test_a_run_resumed_after_sigterm_has_the_snapshots_of_one_left_alone(root, run, alone, capsys):
    class Preempted(train.RunLog):
        def add_step(self, metrics, waited):
            super().add_step(metrics, waited)
            if self._bar.n == 14:  # A step whose snapshot is due.
                signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "RunLog", Preempted)
        assert int(train.train(get_tiny(root), root / "preempted").step) == 14
    told = capsys.readouterr().out
    assert "power-function averages of sigma_rel 0.05 and 0.1: 10 snapshots of" in told
    # As if the run had come further before it was killed: of steps that it takes again.
    whole, found = (snapshots.list_snapshots(folder) for folder in (run, root / "preempted"))
    assert list(whole) == [*range(2, 21, 2)] and list(found) == [*range(2, 15, 2)]
    (root / "preempted" / "snapshots" / "00000015.safetensors").write_bytes(b"of another day")
    resumed = train.train(get_tiny(root), root / "preempted")
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(alone))
    found = snapshots.list_snapshots(root / "preempted")
    assert {k: p.read_bytes() for k, p in found.items()} == {
        k: p.read_bytes() for k, p in whole.items()
    }
    # A length that was kept: the newest snapshot is that of the state.
    model = models.load_model(run, ema=0.05)
    chex.assert_trees_all_close(
        model.denoiser.variables["params"],
        jax.device_get(alone.power_emas["0.05"]["params"]),
        rtol=1e-3,
        atol=1e-6,
    )


def test_a_third_length_is_that_of_a_run_that_kept_it(root, run):
    """To a hundredth of what the two kept lengths differ by, or rounding to float16."""
    train.train(get_tiny(root, (0.08,)), root / "third")
    kept = snapshots.reconstruct(root / "third", 0.08)[1]
    made = snapshots.reconstruct(run, 0.08)[1]
    near, far = (snapshots.reconstruct(run, length)[1] for length in LENGTHS)
    for part in ("params", "batch_stats"):
        flat = [
            np.concatenate([x.ravel() for x in jax.tree.leaves(variables[part])])
            for variables in (kept, made, near, far)
        ]
        assert np.linalg.norm(flat[2] - flat[3]) > 0
        rounding = 2**-11 * np.linalg.norm(flat[0]) if part == "params" else 0
        bound = 0.01 * np.linalg.norm(flat[2] - flat[3]) + rounding
        assert np.linalg.norm(flat[1] - flat[0]) < bound


def test_the_doors_draw_and_export_an_average_of_any_length(run, tmp_path):
    paths = [
        sample.sample(["a"], tmp_path / str(ema), checkpoint_folder=run, ema=ema)[0]
        for ema in (None, 0.05, 0.08)
    ]
    assert len({path.read_bytes() for path in paths}) == 3
    told = [read_png_metadata(path) for path in paths]
    assert "ema" not in told[0] and told[2]["ema"] == "0.08"
    command = [sys.executable, EXPORT, run, tmp_path / "model", "--ema=0.08"]
    subprocess.run(command, check=True, cwd=EXPORT.parents[1])
    meta = json.loads((tmp_path / "model" / "meta.json").read_text())
    assert meta["ema"]["sigma_rel"] == 0.08 and meta["ema"]["step"] == 20
    exported, made = models.load_model(tmp_path / "model"), models.load_model(run, ema=0.08)
    chex.assert_trees_all_close(exported.denoiser.variables, made.denoiser.variables, atol=1e-3)
    command[-1] = "--ema=0.7"
    shutil.rmtree(tmp_path / "model")
    refused = subprocess.run(command, capture_output=True, text=True, cwd=EXPORT.parents[1])
    assert refused.returncode == 1
    assert refused.stderr.startswith("export_model.py: sigma_rel must lie in (0, 0.2887), got 0.7")
