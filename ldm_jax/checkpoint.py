"""Checkpoints of a run: a train state with its model's meta => a folder, and back on any mesh.

Saving goes on in the background. What is restored is compared, tensor by tensor, with digests of
what was saved; from a damaged checkpoint the run goes back to the newest whole one.
"""

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ldm_jax import hosts, records
from ldm_jax.meta import check_meta
from ldm_jax.packing import pack_state, unpack
from ldm_jax.records import RECORD_ITEM, STATE_ITEM, DamagedError
from ldm_jax.training import TrainState

T = TypeVar("T")
EMPTY = "an empty directory"
UNREADABLE = "not read: "  # Begins a fault that is not the checkpoint's.

# Orbax lets every replica write a slice of a replicated tensor, and cuts the slices one by one.
# With slices of a MiB or more, saving 451 small tensors of 8 devices holds a run up for 0.4 s and
# not for 3.1 s.
_ARRAY_HANDLER: Any = ocp.type_handlers.get_type_handler(jax.Array)
_ARRAY_HANDLER._min_slice_bytes_for_replica_parallel = 2**20


class SaveError(OSError):
    """A checkpoint could not be written."""


class Checkpoints(ocp.CheckpointManager):
    """Orbax's manager. A save that failed in the background is told by whatever waits for it."""

    def wait_until_finished(self) -> None:
        """Waits for the save that is going on.

        Raises:
            SaveError: if it could not be written.
        """
        try:
            super().wait_until_finished()
        except Exception as error:
            raise _get_save_error(self.directory, error) from error

    def check_last_save(self) -> None:
        """Raises SaveError if the last save has failed; does not wait for one that is going on."""
        if not self.is_saving_in_progress():
            self.wait_until_finished()


@dataclasses.dataclass
class NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """The newest `keep` checkpoints stay, and the one with the lowest held-out loss.

    Among equals the newest is the best. One whose record is damaged has no known loss; one whose
    record could not be read, for lack of memory say, stays.
    """

    folder: epath.Path
    keep: int

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: ocp.checkpoint_managers.PreservationContext
    ) -> Sequence[bool]:
        kept = {info.step for info in checkpoints[-self.keep :]}
        losses = {}
        for info in checkpoints:
            try:
                loss = self._get_loss(info)
            except records.UnreadableError:
                kept.add(info.step)  # It may be the best.
            else:
                losses |= {} if loss is None else {info.step: loss}
        if losses:
            kept.add(min(losses, key=lambda step: (losses[step], -step)))
        return [info.step in kept for info in checkpoints]

    def _get_loss(self, info: Any) -> float | None:
        if info.metrics is not None:  # Saved by this process, perhaps not yet on the disk.
            return info.metrics["held_out_loss"]
        try:
            return records.read_record(self.folder, info.step)["held_out_loss"]
        except Exception as error:
            if records.is_passing(error):
                raise records.UnreadableError(records.describe(error)) from error
            logging.warning(
                "the checkpoint of step %d in %s is damaged, its held-out loss is unknown: %s",
                *(info.step, self.folder, records.describe(error)),
            )
            return None


def open_checkpoints(folder: str | os.PathLike, keep: int = 2) -> Checkpoints:
    """The checkpoints of a run, kept as `NewestAndBest` says. Close it, or use it in `with`.

    Raises:
        OSError: if the folder cannot be made.
        ValueError: for a `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    path = Path(folder).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=NewestAndBest(epath.Path(path), keep), cleanup_tmp_directories=True
    )
    return Checkpoints(path, options=options, item_names=(STATE_ITEM, RECORD_ITEM))


def save_checkpoint(
    manager: Checkpoints, state: TrainState, meta: dict, held_out_loss: float | None = None
) -> None:
    """Saves the state under its step, in the background. Copies it first, so it may be donated.

    Args:
        manager: see `open_checkpoints`.
        state: on any mesh, packed or not; every process calls with its part. It is saved as trees.
        meta: see `meta.create_meta`.
        held_out_loss: of the averaged weights, by which the best checkpoint is known.

    Raises:
        OSError: if the disk has no room for it.
        SaveError: if it could not be written, or the one before it.
        ValueError: if a checkpoint of this step or a later one is there, or a tensor is empty.
    """
    state = unpack(state)
    _check_space(manager.directory, sum(x.nbytes for x in jax.tree.leaves(state)))
    record = records.create_record(meta, state, held_out_loss)
    items = {STATE_ITEM: ocp.args.StandardSave(state), RECORD_ITEM: ocp.args.JsonSave(record)}
    try:
        saved = manager.save(
            record["step"],
            args=ocp.args.Composite(**items),
            metrics={"held_out_loss": record["held_out_loss"]},
        )
    except SaveError:
        raise  # Of the save before this one.
    except Exception as error:
        raise _get_save_error(manager.directory, error) from error
    if not saved:
        raise ValueError(
            f"the steps saved in {manager.directory} must lie before step {record['step']}, "
            f"got {manager.latest_step()}"
        )


def restore_checkpoint(manager: Checkpoints, target: TrainState, meta: dict) -> TrainState | None:
    """The newest whole state, or None where nothing has been saved yet.

    Damaged checkpoints that are newer are named in a warning and moved to "damaged", beside the
    folder of the checkpoints. Every process of a run comes to the same decision.

    Args:
        manager: see `open_checkpoints`.
        target: a state of ShapeDtypeStructs with shardings, where the result will live: on any
            mesh, not only the one that saved. Packed, if the result shall be.
        meta: of the run that goes on.

    Raises:
        ValueError: if a checkpoint belongs to another model; the fields that differ are named.
        DamagedError: if there are checkpoints and none is whole. They stay where they are.
        UnreadableError: if one could not be read for a reason that says nothing of it, such as a
            lack of memory; it stays where it is, too.
    """
    faults: dict[int, str] = {}
    trees = unpack(target)  # As it was saved.
    packed = jax.tree.structure(trees) != jax.tree.structure(target)
    for step in reversed(records.list_steps(manager.directory)):
        state, fault = _restore_step(manager.directory, step, trees, meta)
        if fault is None:
            _set_aside(manager, faults, f"the run goes back to step {step}")
            return pack_state(state) if packed else state
        faults[step] = fault
    if any(fault != EMPTY for fault in faults.values()):
        found = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
        raise DamagedError(
            f"none of the checkpoints in {manager.directory} is whole: {found}. Repair one, or "
            "move the folder away to start from the beginning"
        )
    _set_aside(manager, faults, "the run starts from the beginning")
    return None


def _restore_step(
    folder: epath.Path, step: int, target: TrainState, meta: dict
) -> tuple[TrainState | None, str | None]:
    """A state and None, or None and what is wrong with the checkpoint: the same on each process."""
    if records.is_empty(folder, step):
        return None, EMPTY
    where = f"{folder}, step {step}"
    record, fault = _attempt(where, lambda: records.read_record(folder, step))
    if record is None:
        return None, fault
    check_meta(record["model"], meta, where)
    digests = record["digests"]
    if digests is None:
        logging.warning("%s has no digests: damage to it would not be noticed", where)
    else:
        _check_names(digests, target, where)
    state, fault = _attempt(where, lambda: records.read_tensors(folder, step, target))
    if state is not None and digests is not None:
        _, fault = _attempt(where, lambda: records.check_tensors(state, digests))
    return (state, None) if fault is None else (None, fault)


def _attempt(where: str, read: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `read` returns, or what is wrong with what it reads, on any of the processes.

    Raises:
        UnreadableError: on all processes, if one of them could not read for another reason.
    """
    try:
        result, fault = read(), None
    except Exception as error:
        result, fault = None, records.describe(error)
        fault = f"{UNREADABLE}{fault}" if records.is_passing(error) else fault
    fault = hosts.agree_on_fault(fault)
    if fault is not None and fault.startswith(UNREADABLE):
        raise records.UnreadableError(
            f"the checkpoint in {where} could not be read ({fault.removeprefix(UNREADABLE)}), and "
            "may be whole: nothing was moved. Start again when that is mended, or move the folder "
            "of that step away to go back to the one before"
        )
    return (result, None) if fault is None else (None, fault)


def _check_names(digests: dict[str, str], target: TrainState, where: str) -> None:
    """Raises ValueError unless the saved state has the tensors of `target`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(target)
    wanted = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths}
    differences = sorted(wanted ^ set(digests))
    if differences:
        name = differences[0]
        raise ValueError(
            f"the checkpoint in {where} {'lacks' if name in wanted else 'also has'} {name} "
            f"({len(differences)} tensors differ): it was saved with another optimizer or other "
            "power_ema.sigma_rels. Use another workdir, or the config that it was trained with"
        )


def _set_aside(manager: Checkpoints, faults: dict[int, str], outcome: str) -> None:
    """Moves damaged checkpoints out of the way, and says so. They are evidence: none is deleted."""
    if not faults:
        return
    if hosts.is_leader():
        for step, fault in faults.items():
            parent = manager.directory.parent / "damaged"
            parent.mkdir(parents=True, exist_ok=True)
            names = [str(step), *(f"{step}-{k}" for k in range(2, 1000))]
            aside = next(parent / name for name in names if not (parent / name).exists())
            (manager.directory / str(step)).rename(aside)
            logging.warning(
                "the checkpoint of step %d in %s is damaged: %s. It was moved to %s; %s",
                *(step, manager.directory, fault, aside, outcome),
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
    manager.reload()


def _check_space(folder: epath.Path, needed: int) -> None:
    """Raises OSError, on every process, if the disk has less room than the state's bytes."""
    free = shutil.disk_usage(folder).free
    fault = f"{needed} bytes are needed, {free} are free in {folder}" if free < needed else None
    fault = hosts.agree_on_fault(fault)
    if fault is not None:
        raise OSError(errno.ENOSPC, f"no room for a checkpoint: {fault}")


def _get_save_error(folder: epath.Path, error: Exception) -> SaveError:
    return SaveError(
        f"a checkpoint could not be written to {folder}: {records.describe(error)}. Those saved "
        "before it are untouched"
    )
