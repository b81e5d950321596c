"""Weights => fewer bits for the disk, and back: float16, or int8 with a scale for each channel."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Shaped

SCALE = ":scale"  # ends the name of the scales of what is stored in int8
LARGE = 4096  # Fewer numbers than this stay float16, as all vectors do.


def pack(name: str, value: Float[np.ndarray, "..."], dtype: str) -> dict[str, np.ndarray]:
    """One array of weights as the tensors that are stored for it.

    In int8 a kernel w is q s: s, a number for each of its output channels, the last axis, is
    max |w| / 127, and q is w / s to the nearest integer, at most 0.4 % of the channel's largest
    weight away.

    Args:
        name: of the array.
        value: finite.
        dtype: "int8" or a floating dtype of numpy.

    Returns:
        One tensor of that name, or two: in int8 their scales as well, under name + SCALE.

    Raises:
        ValueError: if a weight is beyond the range of a floating `dtype`.
    """
    if dtype == "int8" and value.ndim > 1 and value.size >= LARGE:
        largest = np.abs(value).max(tuple(range(value.ndim - 1)))
        scale = np.maximum(largest / 127, np.finfo(np.float32).tiny).astype(np.float32)
        return {name: np.rint(value / scale).astype(np.int8), name + SCALE: scale}
    dtype = "float16" if dtype == "int8" else dtype
    with np.errstate(over="ignore"):  # Looked for below, with a better message.
        rounded = value.astype(dtype)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{name} has values beyond the range of {dtype}: {np.abs(value).max()}")
    return {name: np.ascontiguousarray(rounded)}


def unpack(tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, np.ndarray]:
    """What `pack` has stored, in float32."""
    values = {k: np.asarray(v, np.float32) for k, v in tensors.items() if not k.endswith(SCALE)}
    for name in values:
        if name + SCALE in tensors:
            values[name] *= tensors[name + SCALE]
    return values
