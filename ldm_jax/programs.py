"""Whole programs kept: the next run with the same code and settings does not even trace them.

JAX's own cache (compiled.py) saves the compiler's work. It finds a program by its text, and to have
that, a function must be traced and lowered again: seconds of Python for a network. A program that
is kept here is found by what it would be made from.
"""

import hashlib
import json
import os
import pickle
import platform
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding

from ldm_jax import hosts

MAX_BYTES = 10**9  # Of all programs; those used longest ago go first.
DIGEST_BYTES = hashlib.sha256().digest_size
# What changes a program without being seen in its arguments: settings of XLA, JAX and ours.
ENVIRONMENT = ("XLA_", "JAX_", "LDM_JAX_", "CUDA_", "NVIDIA_", "LIBTPU_", "TF_")
OF_PROCESSORS = ("flags", "Features", "model name")  # Lines that say what a processor can do.
# Of JAX's settings, those that change no program.
OF_CACHES = ("jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache")


class KeptProgram:
    """A jit of one program, that of its first call, taken from the folder where it is kept.

    It is kept in "programs" inside of JAX's folder of compiled programs, and not at all where JAX
    keeps nothing, by several processes, or in a folder that is no path: then it is the jit itself.
    A file that is damaged or does not load is named in a warning, and made again.

    Args:
        jitted: of jax.jit, without static arguments. A function of another kind, which has no
            `lower`, is called as it is.
        mesh: of the devices that it runs on.
        identity: whatever the function depends on beside its arguments, versions and the package's
            source, as JSON: all settings, constants, and the source of the caller.
    """

    def __init__(self, jitted: Callable, mesh: Mesh, identity: Any):
        self._jitted, self._mesh, self._identity = jitted, mesh, identity
        self._program: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        """As the jit's. Arguments of other shapes than the first call's are a TypeError."""
        if self._program is None:
            self._program = self._prepare(args)
        return self._program(*args)

    def _prepare(self, args: tuple) -> Callable:
        folder = _get_folder()
        if folder is None or not hasattr(self._jitted, "lower"):
            return self._jitted
        path = folder / f"{self._get_name(args)}.program"
        program = _load(path, self._mesh)
        if program is None:
            program = self._jitted.lower(*args).compile()
            _save(path, program)
        return program

    def _get_name(self, args):
        devices = list(self._mesh.devices.flat)
        leaves, tree = jax.tree.flatten(args)
        settings = {
            name: value
            for name, value in jax.config.values.items()
            if not name.startswith(OF_CACHES)
        }
        made_from = {
            "identity": self._identity,
            "code": hosts.describe_code(),
            "name": getattr(self._jitted, "__name__", ""),
            "arguments": [str(tree), *(_describe_leaf(leaf) for leaf in leaves)],
            "devices": [f"{device.id}: {device.device_kind}" for device in devices],
            "platform": devices[0].client.platform_version,
            "processor": _describe_processor() if devices[0].platform == "cpu" else "",
            "settings": settings,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)},
        }
        text = json.dumps(made_from, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _get_folder():
    """Where programs are kept; None where they are not."""
    values = jax.config.values
    own = values["jax_compilation_cache_dir"]
    on = values["jax_enable_compilation_cache"] and own and "://" not in own
    return Path(own) / "programs" if on and jax.process_count() == 1 else None


def _describe_leaf(leaf):
    """Shape, dtype, and which axes of the mesh each of its own is split over."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return f"{leaf.shape} {leaf.dtype} {sharding}"
    split = [*sharding.spec] + [None] * (leaf.ndim - len(sharding.spec))
    return f"{leaf.shape} {leaf.dtype} {split}"


def _describe_processor():
    """What a program for a CPU may use of it."""
    known = Path("/proc/cpuinfo")  # Of Linux.
    lines = known.read_text().splitlines() if known.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(OF_PROCESSORS)}) or lines


def _load(path: Path, mesh: Mesh) -> Callable | None:
    """The program in a file, or None: with a warning, if there is a file."""
    try:
        content = path.read_bytes()
        digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its digest is another")
        devices = list(mesh.devices.flat)
        program = serialize_executable.deserialize_and_load(
            *pickle.loads(content), backend=devices[0].client, execution_devices=devices
        )
        os.utime(path)
        return program
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # XLA has no class of its own for what it cannot load.
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"the kept program {path} does not load, and is made again: {reason}")
        return None


def _save(path, program):
    """Writes a program beside others; a warning if that is not possible."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        content = pickle.dumps(serialize_executable.serialize(program))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        _drop_oldest(path.parent)
    except Exception as error:  # As above, of programs that cannot be written down; a full disk.
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"the program could not be kept as {path}: {reason}")


def _drop_oldest(folder):
    """Leaves the files used last, of MAX_BYTES together: programs, and parts that a kill left."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # Another process drops files as well.
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)
