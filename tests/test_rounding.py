"""Weights in fewer bits."""

import numpy as np
import pytest

from ldm_jax import rounding


def draw(*shape):
    spread = 10.0 ** np.linspace(-3, 1, shape[-1])  # Channels of very different sizes.
    return (np.random.default_rng(0).standard_normal(shape) * spread).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 3, 16, 32), (512, 64)])
def test_int8_is_within_half_a_step_of_each_channel(shape):
    value = draw(*shape)
    stored = rounding.pack("params/kernel", value, "int8")
    assert stored["params/kernel"].dtype == np.int8
    assert stored["params/kernel:scale"].shape == shape[-1:]
    [found] = rounding.unpack(stored).values()
    step = np.abs(value).max(tuple(range(value.ndim - 1))) / 127
    assert found.dtype == np.float32
    assert (np.abs(found - value) <= 0.5001 * step).all()
    again = rounding.unpack(rounding.pack("params/kernel", found, "int8"))["params/kernel"]
    np.testing.assert_allclose(again, found, rtol=1e-6)


def test_a_channel_of_zeros_stays_one():
    value = draw(64, 64)
    value[:, 3] = 0
    found = rounding.unpack(rounding.pack("kernel", value, "int8"))["kernel"]
    assert np.isfinite(found).all() and not found[:, 3].any()


@pytest.mark.parametrize(
    "shape, dtype, stored",
    [((4096,), "int8", "float16"), ((4, 128), "int8", "float16"), ((64, 64), "float16", "float16"),
     ((64, 64), "float32", "float32")],
)  # fmt: skip
def test_vectors_and_small_kernels_are_rounded_to_float16(shape, dtype, stored):
    value = draw(*shape)
    packed = rounding.pack("w", value, dtype)
    assert list(packed) == ["w"] and packed["w"].dtype == stored
    np.testing.assert_array_equal(rounding.unpack(packed)["w"], np.float32(value.astype(stored)))


@pytest.mark.parametrize("dtype, shape", [("float16", (64, 64)), ("int8", (64,))])
def test_what_float16_cannot_hold_is_refused(dtype, shape):
    with pytest.raises(ValueError, match="w has values beyond the range of float16: 1000000"):
        rounding.pack("w", np.full(shape, 1e6, np.float32), dtype)
