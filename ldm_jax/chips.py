"""Names of pods => their chips, by the makers' data sheets, and how long messages take there."""

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """By the makers' data sheets: dense bfloat16 FLOP/s, bytes, and bytes/s one way.

    `links` is what a chip sends to its neighbours at once; `network` what it sends to other slices
    of a pod (TPU) or other hosts (GPU, which hold eight).
    """

    flops: float
    memory: float
    links: float
    network: float


CHIPS = {
    "v4": Chip(275e12, 32e9, 135e9, 6e9),
    "v5e": Chip(197e12, 16e9, 90e9, 6e9),
    "v5p": Chip(459e12, 95e9, 270e9, 6e9),
    "v6e": Chip(918e12, 32e9, 180e9, 12e9),
    "h100": Chip(989e12, 80e9, 450e9, 50e9),
    "h200": Chip(989e12, 141e9, 450e9, 50e9),
    "a100": Chip(312e12, 80e9, 300e9, 25e9),
}
# Names of chips as JAX reports them. Slower ones of the same family (PCIe, NVL) are not these.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
}
GPUS_OF_A_HOST = 8
LATENCY = 10e-6  # Seconds of a collective, however small.
TARGET = re.compile(r"(?:(?P<count>\d+)\*?)?(?P<chip>[a-z]\w*)?(?::(?P<topology>\d+(?:x\d+)*))?")


class Target(NamedTuple):
    """A pod: chip by name, topology ("" for GPUs), number of slices, number of chips of all."""

    chip: str
    topology: str
    slices: int
    size: int


class Message(NamedTuple):
    """All collectives of one kind, dtype and group: bytes of the arrays, summed over `count`."""

    kind: str
    dtype: str
    group: int
    count: int
    bytes: int


def parse_target(text: str) -> Target:
    """ "v5e:16x16", "2*v5e:16x16" (two slices), "64*h100", or a number of H100s.

    Raises:
        ValueError: for chips that are not known, or a form that is none of these.
    """
    found = TARGET.fullmatch(text.strip().lower())
    needed = (
        "compile_for must look like v5e:16x16, 2*v5e:16x16 (two slices), 64*h100 or 8 "
        f"(H100s), with one of {', '.join(CHIPS)}; got {text!r}"
    )
    if not found or not text.strip():
        raise ValueError(needed)
    chip, topology = found["chip"] or "h100", found["topology"] or ""
    count = int(found["count"] or 1)
    if chip not in CHIPS or count < 1 or (chip[0] == "v") != bool(topology):
        raise ValueError(needed)
    size = count * math.prod(map(int, topology.split("x"))) if topology else count
    if size < 1:
        raise ValueError(needed)
    return Target(chip, topology, count if topology else 1, size)


def get_peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by the name that JAX reports; None if it is not known."""
    name = DEVICE_KINDS.get(device_kind)
    return CHIPS[name].flops if name else None


def estimate_seconds(message: Message, target: Target) -> float:
    """Time of collectives by rings, one after the other, none behind arithmetic.

    An all-reduce of n devices sends 2 (n - 1) / n of its bytes, an all-gather (n - 1) / n of its
    result, a reduce-scatter n - 1 times its result. Each takes LATENCY besides.
    """
    chip, n = CHIPS[target.chip], message.group or target.size
    sent = {
        "all-reduce": 2 * (n - 1) / n,
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,
    }.get(message.kind, 1.0)
    inside = target.size // target.slices if target.topology else GPUS_OF_A_HOST
    rate = chip.links if n <= inside else chip.network
    return sent * message.bytes / rate + message.count * LATENCY
