"""A model <=> a folder of safetensors files and a JSON file, as the package ships its weights."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax import records, rounding
from ldm_jax.cache import check_local
from ldm_jax.shards import file_digest

WEIGHTS_FILE, META_FILE = "denoiser.safetensors", "meta.json"
GUIDE = "guide"  # folder of the guide, an exported model, in that of the model that it guides


def export_model(
    model: Any,
    folder: str | os.PathLike,
    dtype: str = "float16",
    file_bytes: int | None = None,
) -> Path:
    """Writes a model as weights and META_FILE; the weights rounded as `rounding.pack` does.

    The weights are WEIGHTS_FILE, or several files that are named after it; META_FILE has the
    SHA-256 of each. Running statistics stay float32, since their range is not bounded. A guide is
    written into GUIDE.

    Args:
        model: a `models.Model`.
        folder: made if need be.
        dtype: "float16", another floating dtype, or "int8": half the bytes of float16.
        file_bytes: about how many a file has at most; None: all are in one.

    Raises:
        ValueError: if a weight is beyond the range of `dtype`.
        FileExistsError: if the folder holds a model already.
    """
    check_local(folder)
    folder = Path(folder).expanduser()
    if (folder / META_FILE).exists():
        raise FileExistsError(f"{folder} already holds a model")
    if model.guide:
        _write(model.guide, folder / GUIDE, dtype, file_bytes)
    _write(model, folder, dtype, file_bytes)
    return folder


def _write(model, folder, dtype, file_bytes):
    from safetensors.numpy import save_file

    tensors = {}
    for name, value in flatten_dict(model.denoiser.variables, sep="/").items():
        tensors |= rounding.pack(
            name, np.asarray(value), dtype if name.startswith("params/") else "float32"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files, digests = _divide(tensors, file_bytes), {}
    for i, part in enumerate(files, 1):
        ending = "" if len(files) == 1 else f"-{i}-of-{len(files)}"
        path = folder / WEIGHTS_FILE.replace(".", f"{ending}.")
        partial = path.with_suffix(".partial")
        try:
            save_file(part, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        digests[path.name] = file_digest(path)
    # The meta file comes last: a folder that has one is whole.
    records.write_json(folder / META_FILE, model.meta | {"weights_sha256": digests})


def _divide(tensors: Mapping[str, np.ndarray], most: int | None) -> list[dict[str, np.ndarray]]:
    """The tensors in order, in groups of at most that many bytes where none alone has more."""
    groups, size = [{}], 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if most is not None and size > most and groups[-1]:
            groups.append({})
            size = tensor.nbytes
        groups[-1][name] = tensor
    return groups


def read_meta(folder: Path) -> dict:
    """The JSON object in META_FILE.

    Raises:
        DamagedError: if the file holds none.
    """
    path = folder / META_FILE
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise records.DamagedError(f"{path} is not what was exported: {error}") from error


def read_weights(folder: Path, digests: Mapping[str, str] | str | None) -> dict:
    """Of all files that there are digests for; an older release wrote one file, and its digest.

    Raises:
        DamagedError: if a file differs from what was exported, or cannot be read.
    """
    from safetensors.numpy import load_file

    files = digests if isinstance(digests, Mapping) else {WEIGHTS_FILE: digests}
    tensors = {}
    for name, sha256 in files.items():
        path = folder / name
        try:
            if sha256 is not None and sha256 != file_digest(path):
                raise records.DamagedError(f"{path} differs from what was exported")
            tensors |= load_file(path)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # Of the library's own kind, which is a bare Exception.
            raise records.DamagedError(f"{path} cannot be read: {error}") from error
    variables = unflatten_dict(rounding.unpack(tensors), sep="/")
    variables.setdefault("batch_stats", {})
    return jax.tree.map(jax.numpy.asarray, variables)
