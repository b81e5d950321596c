"""A CPU becomes several devices for narrow networks, unless the user has said how many."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from ldm_jax import cores


@pytest.mark.parametrize(
    "samples, number, expected",
    [
        (64, 2, 4),  # 16 samples each
        (32, 2, 2),
        (256, 2, 8),  # no more than four of a core
        (16, 2, 2),
        (8, 2, 1),  # no fewer than eight samples each
        (64, 16, 8),
        (256, 16, 16),
        (64, 1, 4),
        (62, 2, 2),  # a divisor
        (61, 2, 1),
        (0, 2, 1),  # refused later, by name
    ],
)
def test_devices_have_few_samples_and_divide_them(samples, number, expected):
    assert cores.choose_number(samples, number) == expected


@pytest.mark.parametrize(
    "flags, own, widths",
    [
        ("", -1, (32, 128)),
        ("", 3, (32,)),
        ("--xla_force_host_platform_device_count=3", -1, (32,)),
    ],
)
def test_wide_networks_and_what_the_user_says_are_left_alone(monkeypatch, flags, own, widths):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "config", SimpleNamespace(values={"jax_num_cpu_devices": own}))
    assert cores.divide_cpu(64, widths) is None  # It has no `update` to call.


def test_jax_has_as_many_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    program = (
        "import jax; from ldm_jax import cores; cores.count_cores = lambda: 2; "
        "print(cores.divide_cpu(64, (32, 64)), len(jax.devices()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.split() == ["4", "4"]


@pytest.mark.parametrize("quota, expected", [("max", 64), ("150000", 2), ("9900000", 64)])
def test_a_containers_quota_counts(monkeypatch, tmp_path, quota, expected):
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert cores.count_cores() == 64
    cores.QUOTA.write_text(f"{quota} 100000\n")
    assert cores.count_cores() == expected
