"""What JAX compiles is kept and found again, in processes with settings of their own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ldm_jax.cache import cache_home

CODE = """
import jax, jax.numpy as jnp
from ldm_jax.compiled import keep_compiled
print(keep_compiled())
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
for k in range(3):
    jax.jit(lambda x: jnp.sin(x @ x + k))(jnp.ones((8, 8)))
print(sum(hits))
"""


def run(cache, code=CODE, **settings):
    """Lines that a process prints whose user has these settings."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    settings = {"JAX_PLATFORMS": "cpu", "LDM_JAX_CACHE": str(cache)} | settings
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=ours | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def kept(folder):
    return len(list(folder.glob("*-cache")))


ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def test_programs_are_kept_and_taken_by_the_next_run(tmp_path):
    folder = tmp_path / "compiled"
    line, hits = run(tmp_path, **ALL)
    assert line == f"compiled programs are kept in {folder}: 0.0 MB of at most 4000"
    assert hits == "0" and kept(folder) >= 3
    (folder / "large").write_bytes(bytes(1_500_000))
    line, hits = run(tmp_path, **ALL)
    assert line.endswith(": 1.5 MB of at most 4000") and int(hits) >= 3


def test_the_programs_used_longest_ago_go_beyond_the_limit(tmp_path):
    limit = 20_000
    line, _ = run(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE=str(limit), **ALL)
    assert line.endswith("0.0 MB of at most 0")
    sizes = [path.stat().st_size for path in (tmp_path / "compiled").glob("*-cache")]
    assert sizes and sum(sizes) <= limit


def test_a_folder_of_the_users_own_is_left_as_it_is(tmp_path):
    own = tmp_path / "own"
    line, _ = run(tmp_path / "cache", JAX_COMPILATION_CACHE_DIR=str(own), **ALL)
    assert line == f"compiled programs are kept in {own}: 0.0 MB"
    assert kept(own) >= 3 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "JAX_ENABLE_COMPILATION_CACHE is off"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, "JAX_COMPILATION_CACHE_DIR is empty"),
    ],
)
def test_keeping_nothing_is_said(tmp_path, settings, reason):
    line, _ = run(tmp_path / "cache", **settings)
    assert line == f"compiled programs are not kept: {reason}"
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_to_is_said_and_the_run_goes_on(tmp_path):
    (tmp_path / "file").touch()
    line, hits = run(tmp_path / "file", **ALL)
    folder = tmp_path / "file" / "compiled"
    assert line.startswith(f"compiled programs are not kept: {folder} cannot be written to (")
    assert hits == "0"


def test_several_processes_need_a_folder_that_they_share(tmp_path):
    several = "import jax; jax.process_count = lambda: 2\n"
    line, _ = run(tmp_path / "cache", several + CODE)
    assert "several processes need JAX_COMPILATION_CACHE_DIR" in line
    assert not (tmp_path / "cache").exists()


def test_the_tests_themselves_leave_the_users_programs_alone():
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    assert folder.is_dir() and folder.name.startswith("ldm_jax_tests_")
    assert not folder.is_relative_to(cache_home())
