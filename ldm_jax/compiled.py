"""Compiled programs => a folder from which the next run takes them instead of compiling again."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import jax

from ldm_jax.cache import cache_home

MAX_BYTES = 4 * 10**9
# Of JAX's settings, those that are ours where the environment says nothing.
SETTINGS = {
    "jax_compilation_cache_max_size": MAX_BYTES,  # The programs used longest ago go first.
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}
NOT_KEPT = "compiled programs are not kept: "


def keep_compiled() -> str:
    """Has JAX keep what it compiles in the user's cache, under "compiled"; a line that says so.

    Call it before the first computation. What the user has set wins: a folder of their own in
    JAX_COMPILATION_CACHE_DIR, used as JAX has it, or JAX_ENABLE_COMPILATION_CACHE=false. Several
    processes keep nothing without such a folder, one that all of them see: only the first writes,
    and where it finds a program, the others would compile it without the first. On a GPU, XLA keeps
    its choices of kernels beside the programs, by JAX's own default.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return f"{NOT_KEPT}JAX_ENABLE_COMPILATION_CACHE is off"
    own = jax.config.values["jax_compilation_cache_dir"]
    if own is not None:
        return _describe(own) if own else f"{NOT_KEPT}JAX_COMPILATION_CACHE_DIR is empty"
    if jax.process_count() > 1:
        needed = "several processes need JAX_COMPILATION_CACHE_DIR, a folder that all of them see"
        return NOT_KEPT + needed
    folder = cache_home() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"{NOT_KEPT}{folder} cannot be written to ({error})"
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return _describe(str(folder))


def _describe(folder):
    if "://" in folder:
        return f"compiled programs are kept in {folder}"
    sizes = []
    for path in Path(folder).glob("*"):
        with suppress(FileNotFoundError):  # Another process may be removing files.
            # What programs.py keeps, in a folder of its own, has a limit of its own.
            sizes += [path.stat().st_size] if path.is_file() else []
    limit = jax.config.values["jax_compilation_cache_max_size"]
    most = "" if limit < 0 else f" of at most {limit / 1e6:.0f}"
    return f"compiled programs are kept in {folder}: {sum(sizes) / 1e6:.1f} MB{most}"
