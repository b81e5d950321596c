"""A run's latent cache and settings => a function of step and denoiser that measures quality."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax import hosts, quality, report, sampler
from ldm_jax.data import LatentCache
from ldm_jax.features import load_extractor
from ldm_jax.latents import LatentScale
from ldm_jax.spreading import sample_latents


def get_examiner(
    folder: Path,
    cache: LatentCache,
    vae: Any,
    text_encoder: Callable,
    scale: LatentScale,
    sampling: dict[str, Any],
    seed: int,
    captions_per_group: int,
    features: str,
    batch_size: int,
) -> Callable[[int, sampler.Denoiser], dict[str, float]]:
    """Chooses the captions of a run's exams and reads the real pictures.

    Args:
        folder: gets a JSON file and a contact sheet for each exam.
        cache: of the run; its pictures must still lie where they were encoded from.
        vae: of the run, and so are `text_encoder`, `scale` and `sampling`.
        seed: chooses the captions and the noise of each.
        captions_per_group, features, batch_size: see configs/seed.py.

    Returns:
        examine(step, denoiser) => figures for the log. Every host must call it: all draw; one,
        which alone reads the real pictures, measures, writes and prints what it took.

    Raises:
        FileNotFoundError: if a picture is no longer there.
        ValueError: if the cache was made of no pictures, too few are trained on or held out, or one
            that was chosen cannot be read any more.
    """
    pictures = quality.list_pictures(cache)
    if not all(picture.captions[0] for picture in pictures):
        raise ValueError(
            f"evaluate_every needs a cache of pictures with captions, got {cache.folder}, "
            "which was made of arrays: set it to 0"
        )
    chosen = quality.choose_captions(pictures, captions_per_group, seed)
    captions = {split: quality.get_captions(pictures, rows) for split, rows in chosen.items()}
    labels = {split: text_encoder(texts) for split, texts in captions.items()}
    exam, fault = None, None
    if hosts.is_leader():
        size = cache.latent_shape[0] * vae.downsampling
        extractor = load_extractor(features)
        exam = quality.create_exam(
            pictures, extractor, size, captions_per_group, seed, progress=True
        )
        # All hosts draw what was chosen; a picture that cannot be read is chosen no more.
        if {split: exam.captions(split) for split in exam.chosen} != captions:
            fault = (
                f"some pictures of {cache.manifest['source']} cannot be read any more (named "
                "above), and captions would be compared with others: restore them, or encode again"
            )
    fault = hosts.agree_on_fault(fault)
    if fault is not None:
        raise ValueError(fault)

    def examine(step, denoiser):
        began, drawn = time.perf_counter(), {}
        diffuser = sampler.get_diffuser(sampler.in_float32_on_cpu(denoiser), **sampling)
        for split, texts in captions.items():
            seeds = quality.get_seeds(texts, seed)
            latents = sample_latents(diffuser, labels[split], seeds, cache.latent_shape, batch_size)
            if exam:
                latents = np.asarray(scale.restore(jnp.asarray(latents)))
                drawn[split] = vae.decode(latents, as_bytes=True)
        if not exam:
            return {}
        figures = quality.measure(exam, drawn)
        told = {"step": step, "features": exam.extractor.title, "sampling": sampling}
        report.save_report(folder / f"{step:07d}.json", figures, told)
        report.save_sheet(folder / f"{step:07d}.png", exam, drawn, told)
        seconds = time.perf_counter() - began
        print(
            f"\nquality at step {step}, by {exam.extractor.title} "
            f"({sum(map(len, drawn.values()))} pictures, {seconds:.1f} s)\n"
            + report.format_table(figures, intervals=False),
            flush=True,
        )
        return report.flatten(figures) | {"quality/seconds": seconds}

    return examine
