"""An autoencoder folder and held-out pictures => figures of each style, and of each channel's use.

    python scripts/autoencoder_by_style.py --autoencoder=ldm_jax/weights/vae_emoji \
        --pictures=FOLDER --pictures=FOLDER_OF_OTHER_STYLES --out=FILE.json

Each folder is one that `draw_emoji` drew. --out gets the figures with intervals at 95 %, and the
standard output the same as Markdown tables. Everything is float32, from the float16 weights.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags
from diffusers import AutoencoderKL
from evaluate_autoencoder import (  # It keeps JAX off the GPU, and comes first.
    HELD_OUT,
    decode_latents,
    encode_pictures,
)

from ldm_jax.features import load_extractor
from ldm_jax.metrics import Estimate, Z, paired_kid, psnr
from ldm_jax.pictures import Picture, load_picture, read_folder

IMAGE_SIZE = 128


def choose_pictures(pictures: list[Picture], per_style: int, seed: int) -> dict[str, list[Picture]]:
    """Up to that many held-out pictures of each style, drawn by the seed."""
    chosen = {}
    for style in sorted({p.style for p in pictures}):
        held = [p for p in pictures if p.style == style and p.split in HELD_OUT]
        order = np.random.default_rng(seed).permutation(len(held))[:per_style]
        chosen[style] = [held[i] for i in order]
    return chosen


def get_psnr(images: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Of each pair of uint8 pictures, decibels; 100 at most, since equal ones have infinity."""
    a, b = (x.astype(np.float32) / 127.5 - 1.0 for x in (images, made))
    return psnr(a, b).clip(max=100.0)


def get_mean(values: np.ndarray) -> Estimate:
    """The mean, and 1.96 of its standard errors to both sides."""
    mean, reach = values.mean(), Z * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(mean), float(mean - reach), float(mean + reach))


def get_kid(features: np.ndarray, others: np.ndarray) -> Estimate:
    """`paired_kid` x 1000."""
    return Estimate(*(1000.0 * value for value in paired_kid(features, others)))


def measure_channels(
    model: Any, images: np.ndarray, mean: np.ndarray, std: np.ndarray, made: np.ndarray
) -> list[dict]:
    """What each latent channel carries, and what is lost without it.

    Args:
        model: the autoencoder.
        images: the pictures, uint8 (n, h, w, 3).
        mean: of their posteriors (n, c, h/8, w/8), and so is `std`.
        made: the pictures decoded from `mean`.

    Returns:
        Of each channel its share of the latents' variance; log2 of its deviation over the
        posterior's, the bits of one number that stand out of the noise; and how many decibels of
        PSNR each picture loses with the channel at its mean over all pictures.
    """
    axes = (0, 2, 3)
    centre, variance = mean.mean(axes), mean.var(axes, dtype=np.float64)
    noise = np.square(std).mean(axes, dtype=np.float64)
    whole, channels = get_psnr(images, made), []
    for i in range(len(centre)):
        silenced = mean.copy()
        silenced[:, i] = centre[i]
        lost = whole - get_psnr(images, decode_latents(model, silenced))
        channels.append({
            "share_of_variance": float(variance[i] / variance.sum()),
            "bits": float(0.5 * np.log2(variance[i] / noise[i])),
            "psnr_lost": get_mean(lost)._asdict(),
        })  # fmt: skip
    return channels


def measure_styles(
    model: Any, chosen: dict[str, list[Picture]], channel_pictures: int, device: str
) -> dict[str, dict]:
    """The figures of each style: reconstructions from the posterior's mean, and the channels."""
    extract, report = load_extractor("efflite0", device), {}
    for style, pictures in chosen.items():
        images = np.stack([load_picture(p.path, IMAGE_SIZE) for p in pictures])
        mean, std = encode_pictures(model, images)
        made = decode_latents(model, mean)
        features, real = extract(made), extract(images)
        half, few = len(real) // 2, slice(channel_pictures)
        report[style] = {
            "pictures": len(images),
            "psnr": get_mean(get_psnr(images, made))._asdict(),
            "kid_x1000": get_kid(features, real)._asdict(),
            "kid_x1000_of_real_halves": get_kid(real[:half], real[half : 2 * half])._asdict(),
            "channel_pictures": len(images[few]),
            "channels": measure_channels(model, *(x[few] for x in (images, mean, std, made))),
        }
        print(f"{style}: {len(images)} pictures", flush=True)
    return report


def format_tables(report: dict[str, dict]) -> str:
    """The figures of `measure_styles` as two Markdown tables."""

    def tell(figure, digits=1):
        value, low, high = (f"{figure[k]:.{digits}f}" for k in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    lines = ["| style | n | PSNR, dB | KID x1000 | of real halves |", "| --- " * 5 + "|"]
    for style, f in report.items():
        kids = (tell(f[k]) for k in ("kid_x1000", "kid_x1000_of_real_halves"))
        lines.append(f"| {style} | {f['pictures']} | {tell(f['psnr'], 2)} | {' | '.join(kids)} |")
    lines += ["", "| style | channel | variance | bits | PSNR lost, dB |", "| --- " * 5 + "|"]
    for style, f in report.items():
        for i, c in enumerate(f["channels"]):
            share, bits = f"{100 * c['share_of_variance']:.0f} %", f"{c['bits']:.1f}"
            lines.append(f"| {style} | {i} | {share} | {bits} | {tell(c['psnr_lost'])} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    began, f = time.monotonic(), flags.FLAGS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    model = AutoencoderKL.from_pretrained(f.autoencoder, torch_dtype=torch.float32)
    pictures = [p for folder in f.pictures for p in read_folder(Path(folder))]
    chosen = choose_pictures(pictures, f.per_style, f.seed)
    styles = measure_styles(model.eval().to(device), chosen, f.channel_pictures, device)
    report = {"seed": f.seed, "seconds": round(time.monotonic() - began), "styles": styles}
    Path(f.out).write_text(json.dumps(report, indent=1) + "\n")
    print(format_tables(styles))


if __name__ == "__main__":
    flags.DEFINE_string("autoencoder", None, "a diffusers folder")
    flags.DEFINE_multi_string("pictures", None, "a folder of pictures with splits; may be repeated")
    flags.DEFINE_string("out", None, "file of the figures")
    flags.DEFINE_integer("per_style", 100, "held-out pictures of each style, at most", 6)
    flags.DEFINE_integer("channel_pictures", 25, "of these, decoded without a channel", 2)
    flags.DEFINE_integer("seed", 0, "of the pictures")
    flags.mark_flags_as_required(["autoencoder", "pictures", "out"])
    app.run(main)
