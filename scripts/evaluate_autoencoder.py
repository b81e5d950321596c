"""An autoencoder folder and held-out pictures => metrics.json and reconstructions.png beside it.

    python scripts/evaluate_autoencoder.py --pictures=FOLDER --out=AUTOENCODER

loads the folder as any user would, AutoencoderKL.from_pretrained, and computes in float32 from
the float16 weights in it. Encoding takes the posterior's mean. What an earlier metrics.json says of
the training is kept.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from absl import app, flags
from autoencoder_objective import to_signal
from diffusers import AutoencoderKL

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # The GPU's memory is torch's here.
from ldm_jax.features import load_extractor  # noqa: E402
from ldm_jax.metrics import kid, psnr, ssim  # noqa: E402
from ldm_jax.pictures import load_picture, read_folder, read_measured  # noqa: E402

HELD_OUT = ("valid", "test", "cell")
# Pictures at once, by device. Two CPU cores took 4 minutes for 1 363 in batches of 128.
BATCH_SIZES = {"cuda": 128, "cpu": 16}
METRICS = "metrics.json"


class Pictures(NamedTuple):
    images: np.ndarray  # (n, 128, 128, 3), uint8
    splits: np.ndarray  # (n,), "train", "valid", "test" or "cell"
    styles: np.ndarray  # (n,)


def load_pictures(
    folder: Path, exclude_styles: tuple[str, ...] = (), extra_styles: bool = False
) -> Pictures:
    """Reads a folder of pictures with splits into memory.

    Args:
        folder: with metadata.jsonl.
        exclude_styles: to leave out.
        extra_styles: also take the styles that serve training alone.

    Raises:
        ValueError: for a table that is not one of pictures.
        OSError: if a picture cannot be read.
    """
    read = read_folder if extra_styles else read_measured
    chosen = [p for p in read(folder) if p.style not in exclude_styles]
    with ThreadPoolExecutor(16) as pool:
        images = np.stack(list(pool.map(lambda p: load_picture(p.path, 128), chosen)))
    splits, styles = (np.array([getattr(p, k) for p in chosen]) for k in ("split", "style"))
    return Pictures(images, splits, styles)


def encode_pictures(model: AutoencoderKL, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, h, w, 3) => posterior mean and standard deviation (n, c, h/8, w/8), float32."""
    batch_size = BATCH_SIZES[model.device.type]
    means, stds = [], []
    with torch.inference_mode():
        for i in range(0, len(images), batch_size):
            x = to_signal(torch.from_numpy(images[i : i + batch_size]).to(model.device))
            posterior = model.encode(x).latent_dist
            means.append(posterior.mean.cpu().numpy())
            stds.append(posterior.std.cpu().numpy())
    return np.concatenate(means), np.concatenate(stds)


def decode_latents(model: AutoencoderKL, latents: np.ndarray) -> np.ndarray:
    """Raw latents (n, c, h, w) => uint8 pictures (n, 8h, 8w, 3), as they would be saved."""
    batch_size = BATCH_SIZES[model.device.type]
    images = []
    with torch.inference_mode():
        for i in range(0, len(latents), batch_size):
            x = model.decode(torch.from_numpy(latents[i : i + batch_size]).to(model.device)).sample
            x = ((x + 1.0) * 127.5).round().clamp(0, 255).byte()
            images.append(x.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def measure_latents(mean: np.ndarray, std: np.ndarray) -> dict[str, list[float] | float]:
    """Statistics of latents drawn from the posteriors: Var z = Var mean + E std^2, by channel."""
    axes = (0, 2, 3)
    centre = mean.mean(axes, dtype=np.float64)
    spread = np.sqrt(mean.var(axes, dtype=np.float64) + np.square(std).mean(axes, dtype=np.float64))
    z = (mean - centre[:, None, None]) / spread[:, None, None]
    second_moment = np.mean(spread**2 + centre**2)
    return {
        "channel_mean": centre.tolist(),
        "channel_std": spread.tolist(),
        "channel_std_of_means": mean.std(axes, dtype=np.float64).tolist(),
        "channel_posterior_std": std.mean(axes, dtype=np.float64).tolist(),
        "channel_beyond_2.5_deviations": (np.abs(z) > 2.5).mean(axes).tolist(),
        "channel_kurtosis": (z**4).mean(axes, dtype=np.float64).tolist(),
        "channel_correlation": np.corrcoef(mean.swapaxes(0, 1).reshape(len(centre), -1)).tolist(),
        "std_of_all": float(np.sqrt(second_moment - centre.mean() ** 2)),
    }


def get_normalisations(latents: dict) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What the diffusion model's range costs: raw latents => raw latents clipped to it."""
    limit = 2.5 * latents["std_of_all"]
    centre, spread = (
        np.array(latents[k], np.float32)[:, None, None] for k in ("channel_mean", "channel_std")
    )
    choices = {"none": lambda z: z, "global_2.5": lambda z: np.clip(z, -limit, limit)}
    for k in (2.5, 3.0, 3.5, 4.0, 5.0):
        low, high = centre - k * spread, centre + k * spread
        choices[f"channel_{k}"] = lambda z, low=low, high=high: np.clip(z, low, high)
    return choices


def measure_pictures(originals: np.ndarray, reconstructions: np.ndarray) -> dict[str, float]:
    """PSNR as the mean over pictures and of the pooled error, and SSIM; both arrays uint8."""
    a, b = (x.astype(np.float32) / 127.5 - 1.0 for x in (originals, reconstructions))
    flat = (1, 1, -1, 3)
    return {
        "n_pictures": len(a),
        "psnr_mean": float(psnr(a, b).clip(max=100.0).mean()),
        "psnr_pooled": float(psnr(a.reshape(flat), b.reshape(flat))[0]),
        "ssim": float(ssim(a, b).mean()),
    }


def measure_kid(real: np.ndarray, made: np.ndarray, seed: int) -> dict[str, list[float] | int]:
    """KID x 1000 and its standard error: of pictures made from one half against the other half of
    the real ones, and of the two real halves for scale; nothing below four pictures.

    Args:
        real: features of the real pictures (n, d).
        made: features of their reconstructions, in the same order.
        seed: of the halves and subsets.
    """
    order = np.random.default_rng(seed).permutation(len(real))
    if (half := len(real) // 2) < 2:
        return {}
    a, b = order[:half], order[half:]
    size = min(100, half)

    def times_1000(x, y):
        return [1000.0 * value for value in kid(x, y, seed, subset_size=size)]

    return {
        "subset_size": size,
        "reconstructions_against_other_half": times_1000(made[a], real[b]),
        "real_against_other_half": times_1000(real[a], real[b]),
        "reconstructions_against_their_originals": times_1000(made, real),
    }


def save_reconstructions(path: Path, originals: np.ndarray, made: np.ndarray, seed: int) -> None:
    """32 held-out pictures drawn by the seed, in two bands: originals above reconstructions."""
    from PIL import Image

    chosen = np.random.default_rng(seed).permutation(len(originals))[:32]
    bands = [chosen[i : i + 16] for i in range(0, len(chosen), 16)]
    rows = [np.concatenate(list(x[band]), axis=1) for band in bands for x in (originals, made)]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), mode="edge") for r in rows]
    Image.fromarray(np.concatenate(padded)).save(path, optimize=True)


def evaluate_autoencoder(
    folder: Path, pictures: Pictures, seed: int, device: str, record: dict | None = None
) -> dict:
    """Measures the autoencoder in a folder and writes the figures there.

    Args:
        folder: a diffusers folder; metrics.json and reconstructions.png are written into it.
        pictures: the latents' statistics are those of split "train", all else is held out.
        seed: of the halves and subsets of KID and of the pictures shown.
        device: torch's name of the device that computes.
        record: what else the record should say, e.g. of the training.
    """
    began = time.monotonic()
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    extract = load_extractor("efflite0", device)
    model = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval().to(device)
    trained = pictures.images[pictures.splits == "train"]
    held = np.isin(pictures.splits, HELD_OUT)
    originals, splits, styles = (x[held] for x in pictures)
    latents = measure_latents(*encode_pictures(model, trained))
    mean, std = encode_pictures(model, originals)
    made = decode_latents(model, mean)
    noise = np.random.default_rng(seed).standard_normal(mean.shape, dtype=np.float32)

    real_features, features = (extract(x) for x in (originals, made))
    sample = np.random.default_rng(seed).permutation(len(trained))[: len(originals)]
    seen = trained[np.sort(sample)]
    normalised = {}
    for name, clip in get_normalisations(latents).items():
        normalised[name] = measure_pictures(originals, decode_latents(model, clip(mean)))
    report = {
        **(record or {}),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "precision_of_these_figures": "float32, from the float16 weights in this folder",
        "seed": seed,
        "n_training_pictures": len(trained),
        "held_out": measure_pictures(originals, made),
        "held_out_from_drawn_latents": measure_pictures(
            originals, decode_latents(model, mean + std * noise)
        ),
        "held_out_from_latents_with_noise_0.1": measure_pictures(
            originals, decode_latents(model, mean + 0.1 * latents["std_of_all"] * noise)
        ),
        "training_pictures": measure_pictures(
            seen, decode_latents(model, encode_pictures(model, seen)[0])
        ),
        "kid_x1000_efficientnet_lite0": measure_kid(real_features, features, seed),
        "normalisation": normalised,
        "training_latents": latents,
        "splits": {s: measure_pictures(originals[i], made[i]) for s, i in _groups(splits)},
        "styles": {
            s: {
                **measure_pictures(originals[i], made[i]),
                "kid_x1000": measure_kid(real_features[i], features[i], seed),
            }
            for s, i in _groups(styles)
        },
        "seconds_of_evaluation": time.monotonic() - began,
    }
    (folder / METRICS).write_text(json.dumps(report, indent=1) + "\n")
    save_reconstructions(folder / "reconstructions.png", originals, made, seed)
    for name in ("held_out", "training_pictures", "kid_x1000_efficientnet_lite0", "normalisation",
                 "training_latents", "styles"):  # fmt: skip
        print(f"{name}: {json.dumps(report[name])}", flush=True)
    return report


def read_training(folder: Path) -> dict:
    """What the metrics.json of a folder says of the training; nothing without one."""
    path = folder / METRICS
    known = json.loads(path.read_text()) if path.is_file() else {}
    return {key: known[key] for key in ("training", "flags") if key in known}


def _groups(names: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Each name with the rows that bear it."""
    return [(str(name), np.flatnonzero(names == name)) for name in np.unique(names)]


def main(argv: list[str]) -> None:
    pictures = load_pictures(Path(flags.FLAGS.pictures))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(flags.FLAGS.out)
    evaluate_autoencoder(out, pictures, flags.FLAGS.seed, device, read_training(out))


if __name__ == "__main__":
    flags.DEFINE_string("pictures", None, "folder of pictures with splits (metadata.jsonl)")
    flags.DEFINE_string("out", None, "autoencoder to measure, and folder of the figures")
    flags.DEFINE_integer("seed", 0, "of the halves and subsets of KID and of the pictures shown")
    flags.mark_flags_as_required(["pictures", "out"])
    app.run(main)
