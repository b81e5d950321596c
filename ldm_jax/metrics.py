"""Pictures, or their features => how alike they are: PSNR, SSIM, KID, Fréchet distance, retrieval.

Host side, numpy alone. Features come from `features.py`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

Z = 1.959964  # Of 95 % of a normal distribution.


class Estimate(NamedTuple):
    """A figure and its confidence interval at 95 %."""

    value: float
    low: float
    high: float


def psnr(
    a: Float[np.ndarray, "n h w c"], b: Float[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """Peak signal-to-noise ratio of each pair, 10 log10(4 / MSE): the range of [-1, 1] is 2.

    Args:
        a: images in [-1, 1], NHWC.
        b: the images to compare them with.

    Returns:
        Decibels, one number a pair; infinity where the two are equal.
    """
    _check_pairs(a, b)
    error = np.mean(np.square(a.astype(np.float64) - b), axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(4.0 / error)


def ssim(
    a: Float[np.ndarray, "n h w c"],
    b: Float[np.ndarray, "n h w c"],
    window: int = 11,
    sigma: float = 1.5,
) -> Float[np.ndarray, " n"]:
    """Structural similarity of each pair (Wang et al. 2004, equation 13), data range 2.

    Means, variances and the covariance are taken under a Gaussian window wherever it fits whole
    into the picture, channel by channel, and the index is averaged over places and channels.

    Args:
        a: images in [-1, 1], NHWC, at least `window` pixels wide and high.
        b: the images to compare them with.
        window: width of the Gaussian window in pixels.
        sigma: its standard deviation in pixels.
    """
    _check_pairs(a, b)
    if min(a.shape[1:3]) < window:
        raise ValueError(f"ssim needs images of at least {window} pixels, got {a.shape[1:3]}")
    rows, columns = (_gaussian_band(size, window, sigma) for size in a.shape[1:3])
    return np.array([_ssim_of_pair(x, y, rows, columns.T) for x, y in zip(a, b)])


def kid(
    features_a: Float[np.ndarray, "n d"],
    features_b: Float[np.ndarray, "m d"],
    seed: int,
    n_subsets: int = 100,
    subset_size: int = 100,
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): the unbiased squared MMD under the
    kernel k(x, y) = (x.y / d + 1)^3, averaged over random subsets.

    Args:
        features_a: features of one set of pictures, in any order.
        features_b: features of the other set; no picture should be in both.
        seed: of the subsets; the same seed gives the same numbers.
        n_subsets: number of subsets drawn, each without repetition.
        subset_size: pictures of each set in a subset, at most the size of the smaller set.

    Returns:
        The mean, which may be slightly negative, and its standard error over the subsets (the
        error of subsampling: it leaves out that the sets themselves are samples).
    """
    if features_a.ndim != 2 or features_a.shape[1:] != features_b.shape[1:]:
        shapes = f"{features_a.shape} and {features_b.shape}"
        raise ValueError(f"kid needs features (n, d) and (m, d), got {shapes}")
    smaller = min(len(features_a), len(features_b))
    if not 2 <= subset_size <= smaller:
        raise ValueError(f"subset_size must be in [2, {smaller}], got {subset_size}")
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(n_subsets):
        x, y = (
            f[rng.choice(len(f), subset_size, replace=False)].astype(np.float64)
            for f in (features_a, features_b)
        )
        distances.append(_mmd(x, y))
    error = np.std(distances, ddof=1) / np.sqrt(n_subsets) if n_subsets > 1 else np.nan
    return float(np.mean(distances)), float(error)


def paired_kid(
    features_a: Float[np.ndarray, "n d"], features_b: Float[np.ndarray, "n d"]
) -> Estimate:
    """KID of pairs, with the interval: no picture is compared with itself or with its own pair.

    Gretton et al. 2012, equation 4, a U-statistic over the pairs z = (x, y): the mean over i != j
    of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i), under the kernel of `kid`. It is
    unbiased where x_i was made for the caption of y_i, while `kid` of such sets is too low; of sets
    without pairs any pairing will do. The interval is the value +- 1.96 standard errors of the
    jackknife that leaves out one pair after the other.

    Args:
        features_a: features of one set of pictures.
        features_b: features of the other; row i belongs to row i.
    """
    if features_a.ndim != 2 or features_a.shape != features_b.shape or len(features_a) < 3:
        shapes = f"{features_a.shape} and {features_b.shape}"
        raise ValueError(f"paired_kid needs features (n, d) of 3 pairs at least, got {shapes}")
    x, y = features_a.astype(np.float64), features_b.astype(np.float64)
    n, between = len(x), _kernel(x, y)
    h = _kernel(x, x) + _kernel(y, y) - between - between.T
    np.fill_diagonal(h, 0.0)
    without = (h.sum() - 2.0 * h.sum(0)) / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    value = h.sum() / (n * (n - 1))
    return Estimate(float(value), float(value - Z * error), float(value + Z * error))


def frechet_distance(
    features_a: Float[np.ndarray, "n d"], features_b: Float[np.ndarray, "m d"]
) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B covariances (Heusel et al. 2017).

    With A = P'P and B = Q'Q the trace of the root is the sum of the singular values of P Q', which
    needs no root of a matrix. It is biased upwards, the more the fewer the pictures: only figures
    of as many pictures stand beside each other.
    """
    if features_a.ndim != 2 or features_a.shape[1:] != features_b.shape[1:]:
        shapes = f"{features_a.shape} and {features_b.shape}"
        raise ValueError(f"frechet_distance needs features (n, d) and (m, d), got {shapes}")
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError("frechet_distance needs at least 2 pictures of each set")
    means, factors = [], []
    for features in (features_a, features_b):
        x = features.astype(np.float64)
        means.append(x.mean(0))
        factors.append((x - means[-1]) / np.sqrt(len(x) - 1))
    root = np.linalg.norm(_shorten(factors[0]) @ _shorten(factors[1]).T, "nuc")
    traces = sum(np.square(p).sum() for p in factors)
    return max(float(np.square(means[0] - means[1]).sum() + traces - 2.0 * root), 0.0)


def share(hits: Bool[np.ndarray, " n"]) -> Estimate:
    """The share of hits, with Wilson's interval at 95 % (Wilson 1927)."""
    n, p = len(hits), float(np.mean(hits))
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(float(centre - reach), 0.0), min(float(centre + reach), 1.0))


def to_unit(
    features: Float[np.ndarray, "n d"], centre: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "n d"]:
    """Features less `centre`, of length 1, so that a product of two is their cosine."""
    features = features - centre
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def get_ranks(
    likeness: Float[np.ndarray, "n m"],
    right: Bool[np.ndarray, "n m"],
    among: Bool[np.ndarray, "n m"] | bool = True,
) -> Float[np.ndarray, " n"]:
    """At which place of a search the first right answer comes, 1 for the first.

    Args:
        likeness: of each query to each item, the larger the more alike.
        right: whether the item answers the query.
        among: whether the item is searched at all.

    Returns:
        The rank for each query, infinity where no item that is searched is right. An item as alike
        as the right one does not come before it.
    """
    best = np.where(right & among, likeness, -np.inf).max(1)
    before = ((likeness > best[:, None]) & among).sum(1)
    return np.where(np.isneginf(best), np.inf, before + 1.0)


def nearest_rms(
    queries: Shaped[np.ndarray, "n h w c"], items: Shaped[np.ndarray, "m h w c"]
) -> Float[np.ndarray, " n"]:
    """Root mean square difference of each query to the item that is nearest by it."""
    if queries.shape[1:] != items.shape[1:] or not len(items):
        raise ValueError(
            f"nearest_rms needs (n, ...) and (m, ...), got {queries.shape}, {items.shape}"
        )
    a, b = (x.reshape(len(x), -1).astype(np.float32) for x in (queries, items))
    nearest = np.argmin(np.square(b).sum(1) - 2.0 * a @ b.T, 1)
    return np.sqrt(np.mean(np.square(a - b[nearest]), 1))


def _kernel(u: Float[np.ndarray, "k d"], v: Float[np.ndarray, "j d"]) -> Float[np.ndarray, "k j"]:
    """k(x, y) = (x.y / d + 1)^3."""
    return (u @ v.T / u.shape[1] + 1.0) ** 3


def _shorten(p: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "k d"]:
    """A factor of P'P with at most d rows."""
    return np.asarray(np.linalg.qr(p, mode="r")) if len(p) > p.shape[1] else p


def _mmd(x: Float[np.ndarray, "k d"], y: Float[np.ndarray, "k d"]) -> float:
    """Unbiased squared maximum mean discrepancy: no picture is compared with itself."""
    k = len(x)
    within = sum((m.sum() - np.trace(m)) / (k * (k - 1)) for m in (_kernel(x, x), _kernel(y, y)))
    return within - 2.0 * _kernel(x, y).mean()


def _ssim_of_pair(x, y, rows, columns) -> float:
    """SSIM of two images (h, w, c); filtering is rows @ channel @ columns."""
    x, y = (np.moveaxis(z.astype(np.float64), -1, 0) for z in (x, y))
    mean_x, mean_y, xx, yy, xy = (rows @ z @ columns for z in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2
    luminance = (2.0 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2.0 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float(np.mean(luminance * structure))


def _gaussian_band(size: int, window: int, sigma: float) -> Float[np.ndarray, "places size"]:
    """The matrix whose row i is the normalised Gaussian window that starts at pixel i."""
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.exp(-(offsets**2) / (2.0 * sigma**2))
    band = np.zeros((size - window + 1, size))
    for i, row in enumerate(band):
        row[i : i + window] = weights / weights.sum()
    return band


def _check_pairs(a: np.ndarray, b: np.ndarray) -> None:
    """Raises where the two are not floating pictures of one shape."""
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"images must be two arrays of one shape NHWC, got {a.shape}, {b.shape}")
    for x in (a, b):
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"images must be floating, in [-1, 1], got {x.dtype}")
