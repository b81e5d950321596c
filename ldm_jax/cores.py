"""A CPU as several devices, each of which trains on a few samples of a batch.

XLA runs a convolution of fewer than some 128 channels on one core, however many there are, and the
gradient of its kernel takes twice as long for each sample where there are more than 16 of 16 x 16.
As several devices a CPU works on as many convolutions at once (docs/performance.md).
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax

NARROW = 128  # Channels, below which it pays. Each device has the weights: wide ones fill memory.
MOST = 16  # Samples of a device, where there may be more devices than cores.
LEAST = 8
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # Of a container: microseconds of all cores in a period.
DEVICES_OF_A_CORE = 4  # At most.


def divide_cpu(samples: int, widths: Sequence[int]) -> int | None:
    """Has JAX make several devices of the CPU for training; how many, or None for no change.

    Call it before JAX looks for devices. What the user has set wins (in XLA_FLAGS or
    JAX_NUM_CPU_DEVICES), and a job of several processes, a wide network and GPUs or TPUs are left
    as they are.

    Args:
        samples: that are worked through at once, by all devices.
        widths: channels of the network.
    """
    own = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    own |= jax.config.values["jax_num_cpu_devices"] > 0
    if own or jax.distributed.is_initialized() or max(widths) >= NARROW:
        return None
    number = choose_number(samples, count_cores())
    jax.config.update("jax_num_cpu_devices", number)
    return number


def choose_number(samples: int, cores: int) -> int:
    """Devices for so many samples: as many as cores, more where each would have over MOST samples.

    It divides the samples, of which each device has at least LEAST.
    """
    most = min(max(cores, samples // MOST), DEVICES_OF_A_CORE * cores, max(samples // LEAST, 1))
    return max(n for n in range(1, most + 1) if samples % n == 0)


def count_cores() -> int:
    """Cores that this process may use."""
    on_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    if QUOTA.is_file():
        most, period = QUOTA.read_text().split()
        if most != "max":
            cores = min(cores, math.ceil(int(most) / int(period)))
    return cores
