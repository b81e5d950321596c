"""What the doors are told: keys of configs and flags, and what importing the package costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import demo, emoji, folder, guide, seed, tiny

ROOT = Path(seed.__file__).parents[1]


@pytest.mark.parametrize("file", [seed, emoji, guide, folder, demo, tiny])
def test_every_key_of_a_config_is_declared_in_seed(file):
    def keys(config, prefix=""):
        for key, value in config.items():
            yield prefix + key
            if hasattr(value, "items"):
                yield from keys(value, f"{prefix}{key}.")

    assert set(keys(file.get_config())) == set(keys(seed.get_config()))
    with pytest.raises(AttributeError):
        file.get_config().steps_ = 1


def run_door(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_misspelt_key_or_flag_ends_the_doors(tmp_path):
    key = run_door(
        "train.py", "--config=configs/tiny.py", f"--workdir={tmp_path}", "--config.stepz=3"
    )
    assert key.returncode != 0 and "stepz" in key.stderr
    flag = run_door("sample.py", "--prompts=a")
    assert flag.returncode != 0 and "prompts" in flag.stderr
    missing = run_door("sample.py", "--prompt=a", f"--checkpoint={tmp_path / 'none'}")
    assert missing.returncode == 1
    assert missing.stderr.strip().splitlines()[-1].startswith("sample.py: no such checkpoint")


@pytest.mark.slow
def test_importing_the_package_loads_jax_alone():
    heavy = ["torch", "diffusers", "transformers", "matplotlib", "PIL", "keras", "tensorboardX"]
    code = f"import sys, ldm_jax; print([m for m in sys.modules if m in {heavy}])"
    result = run_door("-c", code)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.slow
def test_importing_the_package_looks_for_no_devices():
    look = "import ldm_jax; print('imported', flush=True); ldm_jax.sample_seeds([0], (2, 2, 4))"
    result = run_door("-c", look, JAX_PLATFORMS="none_such")
    assert result.stdout.strip() == "imported" and "none_such" in result.stderr, result.stderr
