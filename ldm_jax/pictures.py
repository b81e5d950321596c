"""A folder of pictures with captions => Picture records; one picture file => uint8 (size, size, 3)."""

import hashlib

TEST_SHARE = 0.06
VALID_SHARE = 0.04


def assign_split(concept: str) -> str:
    """Chooses the split of a concept by its hash: 6 % test, 4 % valid, the rest train.

    u = (first 8 bytes of SHA-256, big-endian) / 2^64 is uniform in [0, 1) and the same on every
    machine, so that a concept which is held out once is held out in every style and every run.

    Args:
        concept: what the picture shows, e.g. an emoji's code points or a file name.

    Returns:
        "test", "valid" or "train".
    """
    u = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    if u < TEST_SHARE:
        return "test"
    return "valid" if u < TEST_SHARE + VALID_SHARE else "train"
