"""Whole programs kept: the next run with the same code and settings does not even trace them.

JAX's own cache (compiled.py) saves the compiler's work. It finds a program by its text, and to have
that, a function must be traced and lowered again: seconds of Python for a network. A program that
is kept here is found by what it would be made from.
"""

import hashlib
import os
import pickle
import platform
import secrets
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding

from ldm_jax import graphs, hosts

MAX_BYTES = 10**9  # Of all programs; those used longest ago go first.
DIGEST_BYTES = hashlib.sha256().digest_size
CODE = hosts.describe_code()  # As it was imported: a file may be edited while a run begins.
# What changes programs without being seen in arguments or in JAX's settings.
ENVIRONMENT = ("FLAX_", "LDM_JAX_KERNELS", "LIBTPU_", "TF_", "XLA_")
STACK = ("jax", "nvidia")  # Beginnings of the names of packages that compile and run them.
OF_CACHES = ("jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache")
# These want a jit's own call.
OWN_CALL = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_enable_pgle")
OF_PROCESSORS = ("flags", "Features", "model name")  # Lines that say what a processor can do.
HIT = "/jax/compilation_cache/cache_hits"

_hits: list[str] = []


def _note_hit(event: str, **_: Any) -> None:
    if event == HIT:
        _hits.append(event)


jax.monitoring.register_event_listener(_note_hit)


class KeptProgram:
    """A jit of one program, that of its first call, taken from the folder where it is kept.

    It is kept in "programs" inside of JAX's folder of compiled programs. Where JAX keeps nothing or
    looks for what is no number, for several processes, and for a folder that is no path, it is the
    jit itself. What JAX's cache has already is not kept: XLA writes down whole only what it has
    compiled itself. A file that is damaged or does not load is named in a warning, and removed.

    Args:
        jitted: of jax.jit, without static arguments. A function of another kind, which has no
            `lower`, is called as it is.
        mesh: of the devices that it runs on.
        identity: whatever the function depends on beside its arguments, the mesh, versions and the
            package's source, as JSON: all settings, constants, and the source of the caller.
    """

    def __init__(self, jitted: Callable, mesh: Mesh, identity: Any):
        self._jitted, self._mesh, self._identity = jitted, mesh, identity
        self._program: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        """As the jit's, of arrays like those of the first call."""
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
            before = len(_hits)
            program = self._jitted.lower(*args).compile()
            if len(_hits) == before:
                _save(path, program)
        return program

    def _get_name(self, args):
        devices = list(self._mesh.devices.flat)
        leaves, tree = jax.tree.flatten(args)
        settings = {k: v for k, v in jax.config.values.items() if not k.startswith(OF_CACHES)}
        made_from = {
            "identity": self._identity,
            "code": CODE,
            "stack": {
                name: package.version
                for package in metadata.distributions()
                if (name := str(package.name).lower()).startswith(STACK)
            },
            "name": getattr(self._jitted, "__name__", ""),
            "options": graphs.get_options(devices, quick=True),
            "arguments": [str(tree), *(_describe_leaf(leaf) for leaf in leaves)],
            "mesh": dict(self._mesh.shape),
            "devices": [f"{device.id}: {device.device_kind}" for device in devices],
            "platform": devices[0].client.platform_version,
            "processor": _describe_processor() if devices[0].platform == "cpu" else "",
            "settings": settings,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)},
        }
        return hosts.digest_settings(made_from).hex()[:32]


def _get_folder():
    """Where programs are kept; None where they are not."""
    values = jax.config.values
    own = values["jax_compilation_cache_dir"]
    on = values["jax_enable_compilation_cache"] and own and "://" not in own
    if not on or jax.process_count() > 1 or any(values.get(name) for name in OWN_CALL):
        return None
    return Path(own) / "programs"


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
    lines = set(known.read_text().splitlines()) if known.exists() else set()
    told = sorted(line for line in lines if line.startswith(OF_PROCESSORS))
    return told or platform.machine()


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
        with suppress(OSError):  # A folder that can only be read serves as well.
            os.utime(path)
        return program
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # XLA has no class of its own for what it cannot load.
        _warn(f"the kept program {path} does not load, and is removed", error)
        with suppress(OSError):
            path.unlink()
        return None


def _save(path, program):
    """Writes a program beside others; a warning if that is not possible."""
    part = path.with_suffix(f".{secrets.token_hex(8)}")
    try:
        content = pickle.dumps(serialize_executable.serialize(program))
        if len(content) > _get_limit():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        _drop_oldest(path.parent)
    except Exception as error:  # As above, of programs that cannot be written down; a full disk.
        _warn(f"the program could not be kept as {path}", error)


def _warn(what, error):
    warnings.warn(f"{what}: {' '.join(str(error).split())[:200]}")


def _get_limit():
    """MAX_BYTES, or what JAX's cache may hold where that is less."""
    own = jax.config.values["jax_compilation_cache_max_size"]
    return MAX_BYTES if own < 0 else min(MAX_BYTES, own)


def _drop_oldest(folder):
    """Leaves the files used last, up to the limit: programs, and parts that a kill left."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # Another process drops files as well.
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > _get_limit():
            path.unlink(missing_ok=True)
