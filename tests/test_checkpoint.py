"""Checkpoints: what is saved comes back on any mesh, or the run goes back and says so."""

import errno
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from states import (
    FIELDS,
    at_step,
    create_meta,
    create_small_state,
    create_state,
    save_run,
    target_of,
)

from benchmarks.processes import run_processes
from ldm_jax import checkpoint, models, records, training
from ldm_jax.records import DamagedError


@pytest.fixture(scope="module")
def state():
    return create_state()


@pytest.fixture(scope="module")
def run_folder(state, tmp_path_factory):
    """A run's folder with checkpoints of the steps 5 and 7."""
    return save_run(tmp_path_factory.mktemp("run"), state, {5: 0.5, 7: 0.5})


@pytest.fixture
def warnings(monkeypatch):
    """The texts of the warnings that `checkpoint` shows; orbax has others of its own."""
    texts = []
    shown = SimpleNamespace(warning=lambda text, *args: texts.append(text % args))
    monkeypatch.setattr(checkpoint, "logging", shown)
    return texts


def restore(folder, state, meta=None):
    with checkpoint.open_checkpoints(folder / "checkpoints") as manager:
        return checkpoint.restore_checkpoint(manager, target_of(state), meta or create_meta())


def copy_run(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


def test_a_restored_state_is_the_saved_one_bit_for_bit(run_folder, state, warnings):
    chex.assert_trees_all_equal(restore(run_folder, state), at_step(state, 7))
    assert warnings == []


def test_an_empty_folder_restores_nothing(tmp_path, state):
    assert restore(tmp_path, state) is None


# Retention.


def save_steps(folder, state, losses, keep=2):
    with checkpoint.open_checkpoints(folder, keep=keep) as manager:
        for step, loss in losses.items():
            checkpoint.save_checkpoint(manager, at_step(state, step), create_meta(), loss)
        manager.wait_until_finished()
        return manager.all_steps()


def test_only_the_newest_checkpoints_are_kept(tmp_path, state):
    assert save_steps(tmp_path, state, {1: None, 2: None, 3: None}) == [2, 3]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, state):
    losses = {1: 0.5, 2: 0.2, 3: float("nan"), 4: 0.3, 5: None}
    assert save_steps(tmp_path, state, losses) == [2, 4, 5]
    # Another process knows the losses from the records, and a better one takes the place.
    assert save_steps(tmp_path, state, {6: 0.4}) == [2, 5, 6]
    assert save_steps(tmp_path, state, {7: 0.2, 8: 0.9, 9: 0.9}) == [7, 8, 9]


def test_a_broken_record_keeps_neither_the_folder_from_opening_nor_from_pruning(
    tmp_path, state, warnings
):
    save_steps(tmp_path, state, {1: 0.1, 2: 0.2})
    (tmp_path / "1" / "meta" / "metadata").write_text("{")
    assert save_steps(tmp_path, state, {3: 0.3}) == [2, 3]
    assert "step 1" in warnings[0] and "its held-out loss is unknown" in warnings[0]


def test_a_record_that_could_not_be_read_may_be_the_best_and_stays(
    tmp_path, state, monkeypatch, warnings
):
    save_steps(tmp_path, state, {1: 0.1, 2: 0.2, 3: 0.3})
    read = records.read_record

    def fail_once(folder, step):
        if step == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(folder, step)

    monkeypatch.setattr(records, "read_record", fail_once)
    assert save_steps(tmp_path, state, {4: 0.4}) == [1, 2, 3, 4]
    with pytest.raises(records.UnreadableError, match="step 1 in .* may be the best"):
        models.load_model(tmp_path, "best")
    monkeypatch.undo()
    assert save_steps(tmp_path, state, {5: 0.5}) == [1, 4, 5]
    assert warnings == []


def test_at_least_one_checkpoint_must_be_kept(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.open_checkpoints(tmp_path, keep=0)


# Refusals.


def test_another_architecture_is_refused_and_its_fields_are_named(run_folder, state):
    meta = create_meta(network={**FIELDS, "block_depth": 3, "norm": "group"})
    with pytest.raises(ValueError) as error:
        restore(run_folder, state, meta)
    assert "network.block_depth is 1 there, 3 here" in str(error.value)
    assert "network.norm is batch there, group here" in str(error.value)
    assert "widths" not in str(error.value)


def test_another_optimizer_is_refused_and_is_not_damage(tmp_path, run_folder, state):
    folder = copy_run(run_folder, tmp_path)
    clipped = training.get_optimizer(steps=10, warmup_steps=2, clip_norm=1.0)
    other = state.replace(opt_state=clipped.init(state.params))
    with pytest.raises(ValueError, match="saved with another optimizer"):
        restore(folder, other)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["5", "7"]


def test_a_step_that_is_there_is_not_saved_again(tmp_path, state):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_checkpoint(manager, state, create_meta())
        with pytest.raises(ValueError, match="must lie before step 7, got 7"):
            checkpoint.save_checkpoint(manager, state, create_meta())
        with pytest.raises(ValueError, match="must lie before step 6, got 7"):
            checkpoint.save_checkpoint(manager, at_step(state, 6), create_meta())


def test_a_state_with_an_empty_tensor_is_refused(tmp_path, state):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        with pytest.raises(
            ValueError, match=r"must have elements, got none in \['batch_stats/x'\]"
        ):
            broken = state.replace(batch_stats={"x": jnp.zeros((0, 3))})
            checkpoint.save_checkpoint(manager, broken, create_meta())


# Damage.


def get_largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step):
    file = get_largest_file(step / "state" / "ocdbt.process_0")
    file.write_bytes(file.read_bytes()[:100])


def flip_in_tensors(step):
    file = get_largest_file(step / "state" / "ocdbt.process_0")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_in_record(step):
    file = step / "meta" / "metadata"
    content = bytearray(file.read_bytes())
    content[content.index(b"std_latent") + 14] ^= 1
    file.write_bytes(content)


def delete_record(step):
    (step / "meta" / "metadata").unlink()


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize(
    "damage", [truncate, flip_in_tensors, flip_in_record, delete_record, empty]
)
def test_a_run_goes_back_from_a_damaged_checkpoint_and_says_so(
    tmp_path, run_folder, state, warnings, damage
):
    folder = copy_run(run_folder, tmp_path)
    damage(folder / "checkpoints" / "7")
    chex.assert_trees_all_equal(restore(folder, state), at_step(state, 5))
    assert len(warnings) == 1
    assert "the checkpoint of step 7" in warnings[0]
    assert f"moved to {folder / 'damaged' / '7'}; the run goes back to step 5" in warnings[0]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["5"]
    # The step is saved again, and a second damaged one does not take the first one's place.
    with checkpoint.open_checkpoints(folder / "checkpoints") as manager:
        checkpoint.save_checkpoint(manager, at_step(state, 7), create_meta())
    flip_in_record(folder / "checkpoints" / "7")
    chex.assert_trees_all_equal(restore(folder, state), at_step(state, 5))
    assert sorted(p.name for p in (folder / "damaged").iterdir()) == ["7", "7-2"]


def test_a_flipped_bit_names_the_tensor(tmp_path, run_folder, state, warnings):
    # What the storage itself does not notice: a digest of another value, in a record that is whole.
    from ldm_jax import records

    folder = copy_run(run_folder, tmp_path)
    path = folder / "checkpoints" / "7" / "meta" / "metadata"
    record = json.loads(path.read_text())
    name = next(name for name in record["digests"] if name.startswith("opt_state/0/mu/"))
    record["digests"][name] = "0" * 16
    record["sha256"] = records._get_sha256({k: v for k, v in record.items() if k != "sha256"})
    path.write_text(json.dumps(record))
    chex.assert_trees_all_equal(restore(folder, state), at_step(state, 5))
    assert f"the tensor {name} differs from what was saved" in warnings[0]


def test_without_a_whole_checkpoint_each_is_named_and_none_is_moved(tmp_path, run_folder, state):
    folder = copy_run(run_folder, tmp_path)
    flip_in_record(folder / "checkpoints" / "5")
    delete_record(folder / "checkpoints" / "7")
    with pytest.raises(
        DamagedError, match=r"none .* is whole: step 7: FileNotFound.*; step 5: its"
    ):
        restore(folder, state)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["5", "7"]


@pytest.mark.parametrize(
    "fault",
    [
        ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"),
        ValueError('Error opening "zarr": Too many open files'),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ESTALE, "Stale file handle"),
    ],
)
def test_what_could_not_be_read_is_not_taken_for_damaged(
    tmp_path, run_folder, state, monkeypatch, fault
):
    folder = copy_run(run_folder, tmp_path)

    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(records.ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(records.UnreadableError, match="may be whole: nothing was moved"):
        restore(folder, state)
    with pytest.raises(records.UnreadableError, match="step 7 in .* may be whole"):
        models.load_model(folder)
    assert not (folder / "damaged").exists()
    monkeypatch.undo()
    chex.assert_trees_all_equal(restore(folder, state), at_step(state, 7))


def test_an_empty_directory_is_not_taken_for_a_checkpoint(tmp_path, state, warnings):
    (tmp_path / "checkpoints" / "30").mkdir(parents=True)
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as manager:
        assert checkpoint.restore_checkpoint(manager, target_of(state), create_meta()) is None
        checkpoint.save_checkpoint(manager, state, create_meta())
    assert "an empty directory" in warnings[0] and "starts from the beginning" in warnings[0]
    chex.assert_trees_all_equal(restore(tmp_path, state), state)


def test_a_checkpoint_of_format_version_1_is_read_with_a_warning(
    tmp_path, run_folder, state, warnings
):
    folder = copy_run(run_folder, tmp_path)
    path = folder / "checkpoints" / "7" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text())["model"] | {"format_version": 1}))
    chex.assert_trees_all_equal(restore(folder, state), at_step(state, 7))
    assert len(warnings) == 1 and "step 7 has no digests" in warnings[0]


# Full disks.


def test_without_room_on_the_disk_nothing_is_written(tmp_path, state, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needed = sum(x.nbytes for x in jax.tree.leaves(state))
    message = f"{needed} bytes are needed, 1000 are free in {tmp_path}"
    with checkpoint.open_checkpoints(tmp_path) as manager:
        with pytest.raises(OSError, match=message):
            checkpoint.save_checkpoint(manager, state, create_meta())
    assert list(tmp_path.iterdir()) == []


FILL_THE_DISK = """
import resource
from ldm_jax import checkpoint
from states import at_step, create_meta, create_state

state = create_state()
with checkpoint.open_checkpoints({folder!r}) as manager:
    checkpoint.save_checkpoint(manager, at_step(state, 1), create_meta())
    manager.wait_until_finished()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # As a full disk: writing fails.
    checkpoint.save_checkpoint(manager, at_step(state, 2), create_meta())
    manager.wait_until_finished()
"""


def test_a_disk_that_fills_ends_the_run_with_the_last_checkpoint_whole(tmp_path, state, warnings):
    folder = tmp_path / "checkpoints"
    script = FILL_THE_DISK.format(folder=str(folder))
    [(code, output)] = run_processes([[sys.executable, "-c", script]])
    assert code == 1
    assert f"SaveError: a checkpoint could not be written to {folder}" in output
    assert "Those saved before it are untouched" in output
    chex.assert_trees_all_equal(restore(tmp_path, state), at_step(state, 1))
    assert warnings == []


# Other meshes.


@pytest.fixture(scope="module")
def small_state():
    return create_small_state()


def shard(state, shape, axis="fsdp"):
    """The state with its large tensors split over one axis of a mesh, as FSDP does."""
    devices = np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    size = dict(zip(mesh.axis_names, shape))[axis]

    def place(x):
        spec = [None] * x.ndim
        if x.ndim and x.shape[-1] % size == 0:
            spec[-1] = axis
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, state)


@pytest.mark.parametrize("shape, axis", [((1, 8), "fsdp"), ((2, 4), "fsdp"), ((8, 1), "data")])
def test_a_checkpoint_of_one_mesh_restores_on_any_other(tmp_path, small_state, shape, axis):
    saved = shard(small_state, shape, axis)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_checkpoint(manager, saved, create_meta())
        manager.wait_until_finished()
        for target in (
            small_state,
            shard(small_state, (1, 2)),
            shard(small_state, (2, 4)),
            shard(small_state, (4, 2), "data"),
        ):
            restored = checkpoint.restore_checkpoint(manager, target_of(target), create_meta())
            chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(small_state))
            assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
                lambda x: x.sharding, target
            )


WORKER = str(Path(__file__).parent / "worker.py")


def test_a_checkpoint_of_two_processes_restores_on_one_and_on_four(tmp_path, small_state, warnings):
    def run(mode, processes):
        command = [sys.executable, WORKER, mode, str(tmp_path)]
        return run_processes([command] * processes, devices=8 // processes)

    assert [code for code, _ in run("save", 2)] == [0, 0]
    # One process with eight devices is this one.
    restored = restore(tmp_path, shard(small_state, (2, 4)))
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(at_step(small_state, 7)))
    assert warnings == []
    results = run("restore", 4)
    assert all(code == 0 and "restored step 7" in output for code, output in results), results
    # Without what the second process wrote they go back together.
    shutil.rmtree(tmp_path / "checkpoints" / "7" / "state" / "ocdbt.process_1" / "d")
    results = run("restore", 2)
    assert [code for code, _ in results] == [0, 0], results
    assert all("restored step 5" in output for _, output in results)
    assert sum("the run goes back to step 5" in output for _, output in results) == 1
    assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["7"]
