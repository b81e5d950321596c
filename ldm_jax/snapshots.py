"""Snapshots of a run's power-function averages => WORKDIR/snapshots, and averages of any length.

One safetensors file a step holds the averages of every length: weights in float16, as exported
models have them, running statistics in float32. Rounding costs a weight 2^-12 of itself at most,
less than a network in bfloat16 rounds off anyway, and at the same size on the disk twice as many
snapshots bring a reconstruction nearer than twice as many digits do.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax import power_ema, records, rounding
from ldm_jax.power_ema import ProfiledState

FOLDER = "snapshots"


def save_snapshot(
    workdir: str | os.PathLike, step: int, power_emas: Mapping[str, Any], meta: dict
) -> Path:
    """Writes the averages of a step; the file appears when it is whole.

    Args:
        workdir: of the run.
        step: how many steps the averages are over.
        power_emas: of a ProfiledState, whole on this host.
        meta: see `meta.create_meta`.

    Raises:
        ValueError: if a weight is beyond the range of float16.
        OSError: if it cannot be written.
    """
    from safetensors.numpy import save_file

    tensors = {}
    for name, value in flatten_dict(power_emas, sep="/").items():
        tensors |= rounding.pack(
            name, np.asarray(value), "float16" if "/params/" in name else "float32"
        )
    about = {"step": step, "sigma_rels": sorted(map(float, power_emas)), "model": meta}
    about["sha256"] = _get_digest(about, tensors)
    path = Path(workdir) / FOLDER / f"{step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"about": json.dumps(about)})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception as error:
        raise OSError(f"a snapshot could not be written to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def list_snapshots(workdir: str | os.PathLike) -> dict[int, Path]:
    """The file of each step, in order."""
    paths = sorted((Path(workdir) / FOLDER).glob("*.safetensors"))
    return {int(path.stem): path for path in paths if path.stem.isdecimal()}


def drop_later(workdir: str | os.PathLike, start: int) -> None:
    """Removes the snapshots of steps that will be taken again, as their lines of the log are."""
    for step, path in list_snapshots(workdir).items():
        if step > start:
            path.unlink()


def describe_cost(state: ProfiledState, snapshots: int) -> str:
    """What the snapshots of a run need on the disk, in a line."""
    averages, size = state.power_emas, 0
    for average in averages.values():
        size += sum(2 * x.size for x in jax.tree.leaves(average["params"]))
        size += sum(4 * x.size for x in jax.tree.leaves(average["batch_stats"]))
    return (
        f"power-function averages of sigma_rel {' and '.join(averages)}: {snapshots} snapshots of "
        f"{size / 2**20:.1f} MiB, {snapshots * size / 2**30:.2f} GiB in all, never deleted"
    )


def reconstruct(
    workdir: str | os.PathLike, sigma_rel: float, step: int | None = None
) -> tuple[dict, dict]:
    """The model's meta and the average of a length, made from a run's snapshots up to a step.

    Args:
        workdir: of the run.
        sigma_rel: length of the average, relative to the training up to `step`.
        step: of a snapshot; None for the newest.

    Returns:
        The meta, which says how it was made under "ema", and the network's variables, float32.

    Raises:
        FileNotFoundError: without snapshots, or one of that step.
        ValueError: for a length that is out of range or too far from those of the snapshots.
        DamagedError: if a snapshot is not what was saved.
    """
    power_ema.check_sigma_rels([sigma_rel])
    found = list_snapshots(workdir)
    if not found:
        raise FileNotFoundError(
            f"{workdir} has no {FOLDER}: an average of another length needs a run of train.py with "
            "--config.power_ema.sigma_rels='(0.05, 0.1)'"
        )
    step = max(found) if step is None else step
    if step not in found:
        raise FileNotFoundError(f"{workdir} has snapshots of the steps {[*found]}, got step {step}")
    paths = {k: path for k, path in found.items() if k <= step}
    about = {k: _read_about(path, k) for k, path in paths.items()}
    known = [(k, name) for k in paths for name in about[k]["sigma_rels"]]
    steps, sigma_rels = [k for k, _ in known], [name for _, name in known]
    fit = power_ema.fit_profile(steps, sigma_rels, step, sigma_rel)
    if not fit.is_good:
        shortest, longest = power_ema.get_reach(steps, sigma_rels, step)
        raise ValueError(
            f"{len(paths)} snapshots up to step {step} give averages of sigma_rel {shortest} to "
            f"{longest}, got {sigma_rel} (its profile would be off by {fit.error:.1%}, errors of "
            f"rounding {fit.gain:.0f} times as large)"
        )
    logging.info("sigma_rel %s at step %d: error %.2e, gain %.2f", sigma_rel, step, *fit[1:])
    variables = power_ema.reconstruct(_read_all(paths, about), fit.weights)
    made = {"sigma_rel": sigma_rel, "step": step, "error": fit.error}
    return about[step]["model"] | {"ema": made}, {"batch_stats": {}} | unflatten_dict(
        variables, sep="/"
    )


def _read_all(paths: Mapping[int, Path], about: Mapping[int, dict]) -> Iterator[dict]:
    """The averages of each file, of each of its lengths, verified and without their prefix."""
    from safetensors.numpy import load_file

    for step, path in paths.items():
        try:
            tensors = load_file(path)
        except Exception as error:
            raise _get_fault(path, error) from error
        if _get_digest(about[step], tensors) != about[step]["sha256"]:
            raise _get_damage(path, "it differs from what was saved")
        for sigma_rel in about[step]["sigma_rels"]:
            prefix = f"{sigma_rel}/"
            yield {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def _read_about(path: Path, step: int) -> dict[str, Any]:
    """What a file says of itself; verified with its tensors, when they are read."""
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["about"])
        if about["step"] != step:
            raise ValueError(f"it is that of step {about['step']}")
        return {key: about[key] for key in ("step", "sigma_rels", "model", "sha256")}
    except Exception as error:
        raise _get_fault(path, error) from error


def _get_fault(path: Path, error: Exception) -> OSError:
    if records.is_passing(error):
        told = records.describe(error)
        return records.UnreadableError(f"the snapshot {path} could not be read: {told}")
    return _get_damage(path, records.describe(error))


def _get_damage(path: Path, fault: str) -> records.DamagedError:
    return records.DamagedError(
        f"the snapshot {path} is damaged: {fault}. Move it away: the others may do without it"
    )


def _get_digest(about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of what is said and of every tensor, in the order of their names."""
    said = {key: value for key, value in about.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()
