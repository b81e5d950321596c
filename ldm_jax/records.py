"""Records: the folder of one checkpoint => its record and its tensors, verified or refused.

The record is the JSON item beside the tensors: the model's meta, step and held-out loss, a digest
of each tensor, and a SHA-256 of all that, so that a flipped bit in either is noticed.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from ldm_jax.digest import get_digests

STATE_ITEM, RECORD_ITEM = "state", "meta"


# Of failures that say nothing of a file: too little memory or rights, a file system that is away.
PASSING_ERRNOS = (
    *(errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
)
PASSING_TEXTS = (
    *("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
    *(os.strerror(number) for number in PASSING_ERRNOS),
)


class DamagedError(OSError):
    """A checkpoint on the disk is not what was saved."""


class UnreadableError(OSError):
    """A checkpoint could not be read, which says nothing of what is on the disk."""


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, which is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def create_record(meta: dict, state: Any, held_out_loss: float | None) -> dict:
    """What is saved beside a state.

    Args:
        meta: see `meta.create_meta`.
        state: a TrainState; digested, for which the host waits.
        held_out_loss: of the averaged weights; one that is not finite counts as unknown.

    Raises:
        ValueError: for tensors without elements, which orbax does not save.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    empty = [jax.tree_util.keystr(p, simple=True, separator="/") for p, x in leaves if x.size == 0]
    if empty:
        raise ValueError(f"every tensor of a state must have elements, got none in {empty}")
    if held_out_loss is not None:
        held_out_loss = float(held_out_loss) if math.isfinite(held_out_loss) else None
    record = {
        "model": meta,
        "step": int(state.step),
        "held_out_loss": held_out_loss,
        "digests": get_digests(state),
    }
    return record | {"sha256": _get_sha256(record)}


def read_record(folder: str | os.PathLike, step: int) -> dict:
    """The record of a step, verified. Its digests are None in a checkpoint of format version 1.

    Raises:
        DamagedError: if it is not what was saved.
        Exception: whatever reading a damaged file raises.
    """
    record = ocp.JsonCheckpointHandler().restore(epath.Path(folder) / str(step) / RECORD_ITEM)
    if not {"sha256", "digests", "model"} & set(record) and record.get("format_version") == 1:
        return {"model": record, "step": step, "held_out_loss": None, "digests": None}
    content = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("sha256") != _get_sha256(content):
        raise DamagedError("its record (meta/metadata) differs from what was saved")
    if record["step"] != step:
        raise DamagedError(f"its record is that of step {record['step']}")
    return content


def read_tensors(
    folder: str | os.PathLike, step: int, target: Any, *, partial: bool = False
) -> Any:
    """Tensors of a step, onto the shardings of `target`. No process waits for another.

    Args:
        folder: of the checkpoints.
        step: which one.
        target: a tree of ShapeDtypeStructs with shardings.
        partial: `target` holds a part of what was saved; the rest is not read.

    Raises:
        UnreadableError: if they could not be read for a reason that `is_passing`.
        DamagedError: if they cannot be read for any other.
    """
    args = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=partial,
    )
    path = epath.Path(folder) / str(step) / STATE_ITEM
    with _told_once():
        try:
            return ocp.PyTreeCheckpointHandler().restore(path, args=args)
        except Exception as error:
            fault, passing = describe(error), is_passing(error)
            absl_logging.debug("Raised here:", exc_info=True)
    raise UnreadableError(fault) if passing else DamagedError(fault)


def is_passing(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, may be gone tomorrow: the file may be whole."""
    while error is not None:
        if isinstance(error, (UnreadableError, MemoryError)):
            return True
        if isinstance(error, OSError) and error.errno in PASSING_ERRNOS:
            return True
        if any(text in str(error) for text in PASSING_TEXTS):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Keeps asyncio quiet, which would tell a failed reading once more for each tensor, at length,
    when it frees them.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda unraisable: None
    try:
        yield
    finally:
        gc.collect()
        logger.disabled, sys.unraisablehook = False, hook


def read_structure(folder: str | os.PathLike, step: int) -> Any:
    """Names, shapes and dtypes of the saved tensors, as nested dictionaries."""
    path = epath.Path(folder) / str(step) / STATE_ITEM
    return ocp.PyTreeCheckpointHandler().metadata(path).tree


def check_tensors(tensors: Any, digests: dict[str, str]) -> None:
    """Compares tensors with the digests of what was saved. Every process must call it.

    Raises:
        DamagedError: names the first tensor that differs.
    """
    found = get_digests(tensors)
    wrong = [k for k in sorted({*found, *digests}) if found.get(k) != digests.get(k)]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise DamagedError(f"the tensor {wrong[0]}{more} differs from what was saved")


def list_steps(folder: str | os.PathLike) -> list[int]:
    """Numbers of the directories that are named as checkpoints are: whole, damaged or empty."""
    paths = [path for path in epath.Path(folder).iterdir() if path.is_dir()]
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and str(int(p.name)) == p.name)


def is_empty(folder: str | os.PathLike, step: int) -> bool:
    """Whether the directory of a step has no entry at all."""
    return not any((epath.Path(folder) / str(step)).iterdir())


def describe(error: Exception) -> str:
    """The first line of an error, or of its cause; of a long one its beginning and its end."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
    told = isinstance(error, (DamagedError, UnreadableError))
    return text if told else f"{type(error).__name__}: {text}"


def _get_sha256(content: dict) -> str:
    """Of the canonical form, so that only what is said counts, not how it is laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
