"""The noise levels that reverse diffusion visits: a number of steps => levels from high to low."""

import numpy as np

SCHEDULES = ("cube_root", "angle", "karras", "log_snr")
HIGHEST, LOWEST = 0.999, 0.01  # Noise levels of all schedules but the original's.


def get_noise_levels(diffusion_steps: int, schedule: str = "cube_root") -> np.ndarray:
    """The noise levels that reverse diffusion visits, float32, each below the one before.

    "cube_root", the original's: 1 - t^(1/3) for t in arange(1e-4, 0.99, 1 / steps), the last level
    set to 0.01, which from 70 steps on may lie a little above the one before (0.0096); from 100
    steps on there is one level in a hundred less, since t ends at 0.99. The others go from level
    0.999 to 0.01: "angle" by equal steps of the angle whose sine the level is, "karras" of the
    seventh root of the noise-to-signal ratio (Karras et al. 2022, eq. 5), "log_snr" of its
    logarithm (Lu et al. 2022); both ratios are those of the variance-preserving mixture. The
    network sees all levels but the last.

    Raises:
        ValueError: for fewer than 2 steps, or another schedule.
    """
    if diffusion_steps < 2:
        raise ValueError(f"diffusion_steps must be at least 2, got {diffusion_steps}")
    if schedule == "cube_root":
        levels = 1 - np.arange(1e-4, 0.99, 1 / diffusion_steps) ** (1 / 3)
        levels[-1] = 0.01
    elif schedule == "angle":
        first, last = np.arcsin([HIGHEST, LOWEST])
        levels = np.sin(np.linspace(first, last, diffusion_steps))
    elif schedule in ("karras", "log_snr"):
        to, back = (np.log, np.exp) if schedule == "log_snr" else (_seventh_root, _seventh_power)
        first, last = to(np.tan(np.arcsin([HIGHEST, LOWEST])))
        levels = np.sin(np.arctan(back(np.linspace(first, last, diffusion_steps))))
    else:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    return levels.astype(np.float32)


def _seventh_root(x):
    return x ** (1 / 7)


def _seventh_power(x):
    return x**7
