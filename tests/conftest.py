"""Settings of every test: eight virtual devices, strict ranks, keys used once."""

import os

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
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # The user's cache is not the tests'.

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
