"""Moments of stored latents, shard by shard => the statistics that a latent cache records."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

CLIP_DEVIATIONS = 2.5
BLOCK = 4096


class Moments(NamedTuple):
    """Latents of some pictures, drawn from N(mean, std^2), channel by channel."""

    count: int  # numbers of each channel
    mean: Float[np.ndarray, " c"]
    var: Float[np.ndarray, " c"]  # about that mean


def get_moments(
    mean: Float[np.ndarray, "n h w c"],
    std: Float[np.ndarray, "n h w c"] | None,
    rows: Int[np.ndarray, " m"],
) -> Moments:
    """Mean and variance of latents that are drawn from N(mean, std^2), for each channel.

    By the law of total variance var(z) = var(mean) + E(std^2).

    Args:
        mean, std: moments of all pictures; without std the latents are the means.
        rows: the pictures that count.
    """
    count = len(rows) * math.prod(mean.shape[1:3])

    def average(array: np.ndarray, function) -> np.ndarray:
        blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
        sums = [function(array[block].astype(np.float64)).sum((0, 1, 2)) for block in blocks]
        return np.sum(sums, axis=0) / count

    if not count:
        return Moments(0, np.zeros(mean.shape[-1]), np.zeros(mean.shape[-1]))
    channel_mean = average(mean, lambda z: z)
    channel_var = average(mean, lambda z: (z - channel_mean) ** 2)
    if std is not None:
        channel_var = channel_var + average(std, np.square)
    return Moments(count, channel_mean, channel_var)


def get_statistics(moments: Sequence[Moments]) -> dict:
    """Mean and standard deviation of latents from the moments of their parts.

    By the law of total variance, for each channel over the parts, and once more over the channels
    for `std_latent` = 2.5 sqrt(var(z)).

    Returns:
        `std_latent`, `channel_mean` and `channel_std` as Python numbers.
    """
    counts, means, variances = (np.array(x, np.float64) for x in zip(*moments))
    shares = counts / counts.sum()
    channel_mean = shares @ means
    channel_var = shares @ (variances + (means - channel_mean) ** 2)
    variance = channel_var.mean() + channel_mean.var()
    if variance == 0:
        raise ValueError(f"training latents must vary, got {channel_mean.tolist()} everywhere")
    return {
        "std_latent": CLIP_DEVIATIONS * math.sqrt(variance),
        "channel_mean": channel_mean.tolist(),
        "channel_std": np.sqrt(channel_var).tolist(),
    }
