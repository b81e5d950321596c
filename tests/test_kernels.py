"""Kernels for a GPU, run here by Pallas' interpreter, against what they stand for; and compiled."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import count_lowered

from ldm_jax import blocks, kernels, tiles

pytest.importorskip("jax.experimental.pallas.triton", reason="a JAX without Pallas' Triton")


def draw(*shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), dtype)


def draw_map(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), dtype)


def convolve_plainly(maps, convolutions, bias, residual=None, swish=False):
    samples = max(map(len, maps))
    y = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    y = y if residual is None else y + residual
    for x, kernel in zip(maps, convolutions):
        kernel = kernel if kernel.ndim == 4 else kernel[None, None]
        convolved = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = y + jnp.tile(convolved, (samples // len(x), 1, 1, 1))
    return jax.nn.swish(y) if swish else y


@pytest.mark.parametrize(
    "enough, sms",
    [(1, 132), (1, 0), (20, 132), (10**6, 10**6)],
    ids=["whole", "many", "as it comes", "in parts"],
)
@pytest.mark.parametrize(
    "samples, size, channels, width",
    [
        ((2,), 4, (48,), 32),  # 48 = 3 x 16: three steps a tap.
        ((3, 3), 4, (32, 16), 48),  # 48 positions, in tiles of 64 or 128.
        ((4, 2), 8, (16, 32), 16),  # A map of half the samples.
    ],
)
@pytest.mark.parametrize("second", [3, 1])
@pytest.mark.parametrize("ends", ["vector", "map", "residual"])
def test_a_convolution_is_the_sum_of_all_maps_and_what_follows(
    monkeypatch, enough, sms, samples, size, channels, width, second, ends
):
    monkeypatch.setattr(kernels, "BLOCKS", enough)
    monkeypatch.setattr(kernels, "SMS", sms)
    maps = [draw_map(b, size, size, c) for b, c in zip(samples, channels)]
    shapes = [(3, 3), (3, 3) if second == 3 else ()]
    convolutions = [draw(*shape, c, width) for shape, c in zip(shapes, channels)]
    bias = draw_map(size, size, width) if ends == "map" else draw_map(width)
    residual = draw_map(samples[0], size, size, width) if ends == "residual" else None
    arguments = {"residual": residual, "swish": ends != "residual"}
    found = kernels.convolve(maps, convolutions, bias, **arguments)
    expected = convolve_plainly(maps, convolutions, bias, **arguments)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_few_tiles_share_their_taps_and_many_do_not():
    parts = {rows: kernels._choose_tile(rows, 512, 1) for rows in (32, 512, 2048, 32768)}
    assert [taps for _, taps in parts.values()] == [1, 3, 9, 9]
    assert [tile.rows for tile, _ in parts.values()] == [32, 64, 64, 128]
    for rows, (tile, taps) in parts.items():
        tiles = np.prod(tile.count(rows, 512))
        assert tiles >= kernels.BLOCKS or tiles * 9 // taps >= kernels.BLOCKS // 2


@pytest.mark.parametrize(
    "samples, places, channels, inner",
    [
        (2, 4, 64, 16),  # Four samples to a product of 16 rows, of which two are there.
        (5, 4, 80, 16),
        (2, 16, 48, 32),
        (1, 64, 32, 16),
        (1, 2 * kernels.WINDOW, 32, 16),
        (1, kernels.WINDOW, 128, 64),  # Wide keys: in large tiles, two windows of half the size.
    ],
)
@pytest.mark.parametrize("with_vectors", [False, True])
@pytest.mark.parametrize("enough", [1, 10**6])  # Large tiles, small ones.
def test_attention_is_that_of_the_blocks(
    monkeypatch, enough, samples, places, channels, inner, with_vectors
):
    monkeypatch.setattr(kernels, "BLOCKS", enough)
    projected = draw_map(samples, places, 2 * inner + channels)
    x, bias = draw_map(samples, places, channels), draw_map(inner)
    vectors = draw_map(samples, channels) if with_vectors else None
    queries, keys, values = jnp.split(projected, [inner, 2 * inner], axis=-1)
    expected = x + blocks.attend(queries, keys + bias[None, None], values)
    expected = expected if vectors is None else expected + vectors[:, None]
    chex.assert_trees_all_close(kernels.attend(projected, bias, x, vectors), expected, atol=1e-5)


def test_padded_keys_change_no_attention():
    inner, padded = 10, kernels.pad_keys(10)
    assert padded == 16 and kernels.pad_keys(16) == 16 and kernels.pad_keys(80) == 128
    parts = [draw_map(2, 16, width) for width in (inner, inner, 32)]
    bias, x = draw_map(inner), parts[2]
    expected = x + blocks.attend(parts[0], parts[1] + bias[None, None], parts[2])
    more = [(0, 0), (0, 0), (0, padded - inner)]
    projected = jnp.concatenate([jnp.pad(p, more) for p in parts[:2]] + parts[2:], axis=-1)
    found = kernels.attend(projected, jnp.pad(bias, more[2]), x)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 2, 32), (3, 4, 4, 48), (2, 8, 8, 16)])
def test_upsampling_is_that_of_the_blocks(shape):
    x = draw_map(*shape)
    chex.assert_trees_all_close(kernels.upsample(x), blocks.upsample(x), atol=1e-6)


def convolve_ones(*shapes, width=16):
    maps, convolutions = map(jnp.ones, shapes), [jnp.ones((shape[-1], width)) for shape in shapes]
    return kernels.convolve(list(maps), convolutions, jnp.ones(width))


def attend_ones(places, inner, channels):
    projected, x = (jnp.ones((1, places, c)) for c in (2 * inner + channels, channels))
    return kernels.attend(projected, jnp.ones(inner), x)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: convolve_ones((3, 4, 4, 16), (2, 4, 4, 16)),
            r"must divide the largest, got \[3, 2\]",
        ),
        (lambda: convolve_ones((1, 4, 4, 24)), r"divisible by 16, got \[24, 16\]"),
        (lambda: convolve_ones((1, 4, 4, 16), width=40), r"divisible by 16, got \[16, 40\]"),
        (lambda: attend_ones(12, 16, 32), "must be a power of two, got 12"),
        (lambda: attend_ones(16, 20, 32), "must have 32 channels each, got 20"),
        (lambda: attend_ones(16, 8, 32), "must have 16 channels each, got 8"),
        (lambda: attend_ones(16, 16, 24), "multiple of 16 channels, got 24"),
        (lambda: kernels.upsample(jnp.ones((1, 1, 3, 32))), "divisible by 4, got 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "capability, fields, runs",
    [
        ("9.0", {}, True),
        ("8.0", {}, False),
        (None, {}, False),  # A CPU or TPU.
        ("9.0", {"dtype": jnp.dtype("float32")}, False),
        ("9.0", {"latent_image_size": 24}, False),
        ("9.0", {"latent_image_size": 32}, False),
        ("9.0", {"widths": (128, 160)}, False),
        ("9.0", {"widths": (128, 1152)}, False),  # Keys of 144.
        ("9.0", {"key_fraction": 4}, False),
        ("9.0", {"latent_image_size": 4}, False),  # Maps of 1 x 1 after two poolings.
    ],
)
def test_they_run_for_what_was_measured_and_what_is_like_it(monkeypatch, capability, fields, runs):
    device = SimpleNamespace(**({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    fields = {
        "dtype": jnp.dtype("bfloat16"),
        "latent_image_size": 16,
        "widths": (128, 256, 640),
        "key_fraction": 8,
    } | fields
    assert kernels.can_run(SimpleNamespace(**fields)) == runs
    with monkeypatch.context() as patch:
        patch.setenv("LDM_JAX_KERNELS", "0")
        assert not kernels.can_run(SimpleNamespace(**fields))
    with monkeypatch.context() as patch:
        older = SimpleNamespace(compute_capability="8.0")
        patch.setattr(jax, "devices", lambda: [device, older])
        assert not kernels.can_run(SimpleNamespace(**fields))
    monkeypatch.setattr(tiles, "triton", None)
    assert not kernels.can_run(SimpleNamespace(**fields))


@pytest.mark.parametrize("pictures", [1, 64])
def test_they_compile_for_a_gpu(monkeypatch, pictures):
    """To Triton's language; the rest is the GPU's driver's."""
    monkeypatch.setattr(tiles, "interpret", lambda: False)
    samples, bf16 = 2 * pictures, jnp.bfloat16
    array = jax.ShapeDtypeStruct

    def run(x, skip, conv, product, bias, projected, vectors):
        y = kernels.upsample(x)
        y = kernels.convolve([y, skip], [conv, product], bias, swish=True)
        flat = y.reshape(samples, 64, 32)
        return kernels.attend(projected, bias[:16], flat, vectors)

    arguments = (
        array((samples, 4, 4, 48), bf16),
        array((pictures, 8, 8, 32), bf16),
        array((3, 3, 48, 32), bf16),
        array((32, 32), bf16),
        array((32,), jnp.float32),
        array((samples, 64, 64), bf16),
        array((samples, 32), jnp.float32),
    )
    assert count_lowered(run, arguments) == 3
