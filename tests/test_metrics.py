"""Picture measures against formulas, literal loops and known cases; numpy is the reference."""

import math

import numpy as np
import pytest

from ldm_jax.metrics import (
    frechet_distance,
    get_ranks,
    kid,
    nearest_rms,
    paired_kid,
    psnr,
    share,
    ssim,
    to_unit,
)


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


def draw_features(n, d, seed, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) * 0.7 + shift


def test_paired_kid_equals_the_double_loop_over_pairs():
    x, y = draw_features(6, 5, 0), draw_features(6, 5, 1, 0.5)

    def kernel(u, v):
        return (float(np.dot(u, v)) / 5 + 1.0) ** 3

    def statistic(kept):
        terms = [
            kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
            for i in kept
            for j in kept
            if i != j
        ]
        return np.mean(terms)

    without = [statistic([j for j in range(6) if j != i]) for i in range(6)]
    error = np.sqrt(5 / 6 * np.sum((without - np.mean(without)) ** 2))
    value, low, high = paired_kid(x, y)
    np.testing.assert_allclose(value, statistic(range(6)), rtol=1e-9)
    np.testing.assert_allclose([low, high], [value - 1.96 * error, value + 1.96 * error], rtol=1e-4)


def test_paired_kid_is_unbiased_where_pairs_are_alike_and_kid_is_not():
    # Pairs that share nearly everything: of one distribution, so the true distance is 0.
    paired, plain = [], []
    for seed in range(60):
        x = draw_features(20, 8, seed)
        y = x + 0.01 * draw_features(20, 8, seed + 1000)
        paired.append(paired_kid(x, y).value)
        plain.append(kid(x, y, seed=0, n_subsets=1, subset_size=20)[0])
    error = np.std(paired) / np.sqrt(60)
    assert abs(np.mean(paired)) < 4 * error
    assert np.mean(plain) < -20 * error


def test_the_interval_of_paired_kid_holds_the_truth_as_often_as_it_says():
    # The truth by a large sample of the same two laws.
    truth = paired_kid(draw_features(3000, 4, 0), draw_features(3000, 4, 1, 0.4)).value
    held = []
    for seed in range(2, 202, 2):
        _, low, high = paired_kid(draw_features(80, 4, seed), draw_features(80, 4, seed + 1, 0.4))
        held.append(low <= truth <= high)
    assert 0.88 <= np.mean(held) <= 1.0


def test_frechet_distance_equals_scipys_root_of_the_matrix():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    for n, m in ((400, 300), (9, 12)):  # more and fewer pictures than numbers
        x, y = draw_features(n, 16, 0), 2.0 * draw_features(m, 16, 1, 0.3)
        a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = scipy_linalg.sqrtm(a @ b + 1e-14 * np.eye(16)).real
        expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * root)
        np.testing.assert_allclose(frechet_distance(x, y), expected, rtol=1e-4)


def test_frechet_distance_of_commuting_covariances_follows_the_closed_form():
    # y = x s + t in each number: sum of t^2 + (1 - s)^2 variances, if the numbers do not correlate.
    x = np.linalg.qr(draw_features(60, 4, 0) - draw_features(60, 4, 0).mean(0))[0] * 7
    scale, shift = np.array([1.0, 2.0, 0.5, 3.0]), np.array([0.0, 1.0, -2.0, 0.5])
    expected = np.sum((x.mean(0) * (scale - 1) + shift) ** 2 + (1 - scale) ** 2 * x.var(0, ddof=1))
    np.testing.assert_allclose(frechet_distance(x, x * scale + shift), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(x, x), 0.0, atol=1e-9)


def test_the_interval_of_a_share_is_wilsons():
    # Wilson's bounds solve |p - q| = z sqrt(q (1 - q) / n) for q.
    value, low, high = share(np.arange(20) < 3)
    assert value == 0.15
    for q in (low, high):
        np.testing.assert_allclose(abs(0.15 - q), 1.959964 * np.sqrt(q * (1 - q) / 20), rtol=1e-6)
    assert share(np.ones(5, bool)).high == 1.0 and 0.5 < share(np.ones(5, bool)).low < 1.0


def test_ranks_count_what_is_more_alike_than_the_first_right_answer():
    likeness = np.array([[0.9, 0.5, 0.7, 0.1]] * 4)
    right = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    among = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]], bool)
    np.testing.assert_equal(get_ranks(likeness, right, among), [1, 3, 2, np.inf])
    np.testing.assert_equal(get_ranks(likeness[:2], right[:2]), [1, 3])


def test_unit_features_are_centred_and_of_length_one():
    np.testing.assert_allclose(to_unit(np.array([[4.0, 5.0]]), np.ones(2)), [[0.6, 0.8]])


def test_the_nearest_item_is_that_of_the_smallest_difference():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 4, 4, 3), np.uint8) for n in (5, 7))
    b[3] = a[2]  # a planted copy
    b[4] = np.where(a[1] < 250, a[1] + 3, a[1] - 3)
    differences = a[:, None].astype(float) - b[None]
    expected = np.sqrt(np.square(differences).mean((2, 3, 4))).min(1)
    found = nearest_rms(a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(found[1:3], [3.0, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: psnr(a, b[:1]), "one shape NHWC"),
        (lambda a, b: ssim(a.astype(np.uint8), b), "floating"),
        (lambda a, b: ssim(a[:, :8], b[:, :8]), "at least 11 pixels"),
        (lambda a, b: kid(a[0, 0], b[0, 0, :, :2], 0), "features"),
        (lambda a, b: kid(a[0, 0], b[0, 0], 0), r"subset_size must be in \[2, 16\], got 100"),
        (lambda a, b: paired_kid(a[0, 0], b[0, 0, 1:]), r"3 pairs at least, got \(16, 3\)"),
        (lambda a, b: paired_kid(a[0, 0, :2], b[0, 0, :2]), "3 pairs"),
        (lambda a, b: frechet_distance(a[0, 0], b[0, 0, :, :2]), "features"),
        (lambda a, b: nearest_rms(a, b[:, 0]), "nearest_rms needs"),
        (lambda a, b: frechet_distance(a[0, 0], b[0, 0, :1]), "at least 2 pictures"),
    ],
)
def test_wrong_input_says_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw_pair((2, 16, 16, 3)))
