"""Measures drawn pictures: a checkpoint, real pictures => a table, quality.json, a contact sheet.

    python evaluate.py --captions_per_group=24
    python evaluate.py --checkpoint=runs/mine --step=best --captions_per_group=370 --out=quality

Without --checkpoint it measures the weights that come with the package. A run's own config says
which pictures it was trained on; of an exported model --pictures must. docs/quality.md says what
each figure means.
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jaxtyping import UInt8
from ml_collections import ConfigDict

from configs import emoji
from encode import get_pictures
from ldm_jax import models, quality, report
from ldm_jax.alignment import HEAD_TITLE, decode_best, load_clip_score, load_judge
from ldm_jax.compiled import keep_compiled
from ldm_jax.encoders import load_vae
from ldm_jax.features import load_extractor
from ldm_jax.pictures import read_folder
from ldm_jax.sampler import in_float32_on_cpu
from ldm_jax.spreading import sample_latents
from ldm_jax.text import check_parts, load_text_encoder

DECODED_AT_ONCE = 256  # Pictures among which are candidates that are not kept.


class Examinee(NamedTuple):
    """A model with all that its pictures are drawn and measured with; `load_examinee` makes it.

    Attributes:
        model: on a CPU in float32.
        latent_shape: (h, w, c).
        vae: from `load_vae`.
        text_encoder: from `load_text_encoder`.
        exam: captions and real pictures.
        labels: of each group, its captions' text embeddings.
        seeds: of each group, (n best_of), those of the candidates for each of n captions.
        judge: images, captions => how well they go together, by which one of them is kept.
        told: what a report says of the exam, see `quality.json`.
    """

    model: models.Model
    latent_shape: tuple[int, ...]
    vae: Any
    text_encoder: Callable
    exam: quality.Exam
    labels: Mapping[str, np.ndarray]
    seeds: Mapping[str, np.ndarray]
    judge: Callable | None
    told: dict


def evaluate(
    out: str | Path,
    *,
    checkpoint_folder: str | Path | None = None,
    checkpoint_step: str | int = "last",
    ema: float | None = None,
    pictures: str | Path | None = None,
    captions_per_group: int = 64,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    features: str = "efflite0",
    clip: str = "",
    best_of: int = 1,
    judge: str | None = None,
    ends: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, dict[str, dict]]:
    """Draws captions of each group, measures them, and writes quality.json and sheet.png to `out`.

    The captions and the noise that each starts from depend on `seed` and the pictures alone, so
    that two checkpoints draw the same. With `ema` the weights are the average of that sigma_rel,
    made of the run's snapshots. `sampling` holds settings of `sampler.get_diffuser` that replace
    the checkpoint's. `vae` names an autoencoder whose decoder is taken in the place of the
    training's; its encoder must be the same. `text_encoder` is where the training's lies now, if it
    was moved. With `best_of` as many are drawn for each caption, and the one is measured that fits
    it best, by the CLIP in the folder `judge` or, without one, by the bundled alignment head.

    Returns:
        The figures, by group and source, see `quality.measure`.

    Raises:
        ValueError: for settings that do not exist, encoders that are not those of the training, or
            pictures of which too few are trained on or held out, or an `ema` out of reach.
        OSError: if the checkpoint, a picture or the weights of the features are missing.
    """
    model = models.load_model(checkpoint_folder, checkpoint_step, ema)
    settings = model.meta["sampling"] | dict(sampling or {})
    model.get_diffuser(**settings)  # Raises before the long part.
    check_parts(model.meta["text_encoder"]["name"], settings)
    examinee = load_examinee(
        model,
        checkpoint_folder,
        pictures,
        captions_per_group,
        seed,
        vae=vae,
        text_encoder=text_encoder,
        features=features,
        clip=clip,
        best_of=best_of,
        judge=judge,
        progress=progress,
    )

    # Drawing.
    began, drawn = time.perf_counter(), {}
    for split in examinee.exam.chosen:
        drawn[split] = draw_group(examinee, split, settings, batch_size, progress)
    seconds = time.perf_counter() - began

    # Measuring.
    figures = quality.measure(examinee.exam, drawn)
    if ends:
        ends_of_scale = quality.measure_ends(examinee.exam, examinee.vae, examinee.text_encoder)
        for split, sources in ends_of_scale.items():
            figures[split] |= sources
    told = {
        "checkpoint": str(checkpoint_folder or "bundled"),
        "step": checkpoint_step if model.step is None else model.step,
        **({} if ema is None else {"ema": model.meta["ema"]}),
        **examinee.told,
        "sampling": settings,
        "near_copy": quality.NEAR,
        "seconds_of_drawing": round(seconds, 1),
    }
    out = Path(out).expanduser()
    report.save_report(out / "quality.json", figures, told)
    report.save_sheet(out / "sheet.png", examinee.exam, drawn, told)
    return figures


def load_examinee(
    model: models.Model,
    checkpoint_folder: str | Path | None,
    pictures: str | Path | None,
    captions_per_group: int,
    seed: int,
    *,
    vae: str | None = None,
    text_encoder: str | None = None,
    features: str = "efflite0",
    clip: str = "",
    best_of: int = 1,
    judge: str | None = None,
    progress: bool = True,
) -> Examinee:
    """Loads once what any number of sampler settings are measured with.

    Args:
        model: whose pictures are to be drawn.
        checkpoint_folder: where it was, see `find_pictures`.
        pictures: folder of the real pictures; None: those that `find_pictures` finds.
        captions_per_group: see `quality.choose_captions`, as is `seed`.
        vae: autoencoder to decode by, with the training's encoder; None: the training's.
        text_encoder: where the training's lies now; None: where it was.
        features: of `load_extractor`.
        clip: folder of a CLIP, or empty.
        best_of: pictures drawn for each caption, of which `judge` chooses one, see `evaluate`.

    Raises:
        ValueError: for encoders that are not those of the training, too few pictures, or a
            `best_of` below 1 or, with a judge, 2.
        OSError: if a picture or the weights of the features are missing.
    """
    judge_pictures = load_judge(best_of, judge)
    clip_score = load_clip_score(clip) if clip else None
    extractor = load_extractor(features)
    folder = Path(pictures).expanduser() if pictures else find_pictures(checkpoint_folder, progress)
    listed = read_folder(folder)
    quality.choose_captions(listed, captions_per_group, seed)  # Raises before the long part.
    autoencoder = models.load_encoder(load_vae, model.meta["vae"], vae)
    encode = models.load_encoder(load_text_encoder, model.meta["text_encoder"], text_encoder)
    shape = tuple(model.meta["latent_shape"])
    size = shape[0] * autoencoder.downsampling
    exam = quality.create_exam(
        listed, extractor, size, captions_per_group, seed, clip_score, progress
    )
    told = {
        "features": extractor.title,
        "features_sha256": extractor.identity["sha256"],
        "pictures": len(exam.pictures),
        "captions_per_group": captions_per_group,
        "seed": seed,
        "vae": autoencoder.identity["name"],
        "decoder_sha256": autoencoder.decoder_sha256,
    }
    model = model.convert(in_float32_on_cpu)
    if judge_pictures:
        told |= {"best_of": best_of, "judge": judge or HEAD_TITLE}
    labels, seeds = {}, {}
    for split in exam.chosen:
        captions = exam.captions(split)
        labels[split] = encode(captions)
        candidates = [quality.get_seeds(captions, seed, k) for k in range(best_of)]
        seeds[split] = np.stack(candidates, axis=1)
    return Examinee(model, shape, autoencoder, encode, exam, labels, seeds, judge_pictures, told)


def draw_group(
    examinee: Examinee, split: str, settings: Mapping, batch_size: int = 16, progress: bool = True
) -> UInt8[np.ndarray, "n H W 3"]:
    """A picture for each caption of a group, the best of its candidates, from the same noise.

    Args:
        examinee: the model and the captions.
        split: the group.
        settings: of `sampler.get_diffuser`.
    """
    diffuser, seeds = examinee.model.get_diffuser(**settings), examinee.seeds[split]
    best_of = seeds.shape[1]
    latents = sample_latents(
        diffuser,
        np.repeat(examinee.labels[split], best_of, axis=0),
        seeds.reshape(-1),
        examinee.latent_shape,
        batch_size,
        progress=progress,
    )
    latents = np.asarray(examinee.model.scale.restore(jnp.asarray(latents)))
    captions = np.repeat(examinee.exam.captions(split), best_of).tolist()
    decode = partial(examinee.vae.decode, as_bytes=True)
    images, _ = decode_best(decode, examinee.judge, latents, captions, best_of, DECODED_AT_ONCE)
    return images


def find_pictures(checkpoint_folder: str | Path | None, progress: bool = True) -> Path:
    """The pictures that a run was trained on, as its config.json says, or the bundled weights.

    Raises:
        ValueError: if there is no config.json, or the run had latents without pictures.
    """
    if checkpoint_folder is None:
        return get_pictures(emoji.get_config(), progress)
    run = Path(checkpoint_folder).expanduser().resolve()
    run = run.parent if run.name == "checkpoints" else run
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"--pictures must name the folder of pictures, {run} has no config.json")
    config: Any = ConfigDict(json.loads(path.read_text()))
    if config.data.source == "npy":
        raise ValueError(f"--pictures must name the folder of pictures, {run} was trained on .npy")
    return get_pictures(config, progress)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"flags must look like --captions_per_group=24, got {argv[1:]}")
    f = flags.FLAGS
    if f.verbosity <= 0:
        logging.set_verbosity(logging.ERROR)  # Orbax tells each of its steps as "info".
    print(keep_compiled(), flush=True)
    began = time.perf_counter()
    sampling = {
        "diffusion_steps": f.steps,
        "class_guidance": f.guidance,
        "style_guidance": f.guidance_style,
    }
    try:
        figures = evaluate(
            f.out,
            checkpoint_folder=f.checkpoint,
            checkpoint_step=f.step,
            ema=f.ema,
            pictures=f.pictures,
            captions_per_group=f.captions_per_group,
            seed=f.seed,
            sampling={k: v for k, v in sampling.items() if v is not None},
            vae=f.vae,
            text_encoder=f.text_encoder,
            features=f.features,
            clip=f.clip,
            best_of=f.best_of,
            judge=f.judge,
            ends=f.ends,
            batch_size=f.batch_size,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        logging.debug("Raised here:", exc_info=True)  # Shown by --verbosity=1.
        raise SystemExit(f"evaluate.py: {error}") from error
    print(report.format_table(figures))
    chosen = f"best of {f.best_of} by {f.judge or HEAD_TITLE}; " if f.best_of > 1 else ""
    print(
        f"features: {f.features}; {chosen}95 % intervals; near copy: within {quality.NEAR} of a "
        f"training picture; {time.perf_counter() - began:.0f} s"
    )
    print(f"quality.json and sheet.png in {Path(f.out).resolve()}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "a run's workdir or an exported model")
    flags.DEFINE_string("step", "last", "a run's checkpoint: last, best (held-out loss), a number")
    flags.DEFINE_float("ema", None, "sigma_rel of an average made of the run's snapshots, as 0.08")
    flags.DEFINE_string("pictures", None, "folder of the real pictures; default: the run's own")
    flags.DEFINE_integer("captions_per_group", 64, "drawn of each group, at most", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "chooses the captions, and the noise of each", lower_bound=0)
    flags.DEFINE_integer("steps", None, "noise levels; default: the checkpoint's")
    flags.DEFINE_float("guidance", None, "weight of the text; default: the checkpoint's")
    flags.DEFINE_float("guidance_style", None, "weight of its style; default: the checkpoint's")
    flags.DEFINE_string("vae", None, "an autoencoder to decode by; default: the training's")
    flags.DEFINE_string("text_encoder", None, "where the training's lies now, as clip:FOLDER")
    flags.DEFINE_string("features", "efflite0", "efflite0, or inception:<weights file>")
    flags.DEFINE_string("clip", "", "folder of a CLIP, for its score; default: without")
    flags.DEFINE_integer("best_of", 1, "drawn for each caption, of which the best is kept")
    flags.DEFINE_string("judge", None, "folder of a CLIP to choose by; default: the bundled head")
    flags.DEFINE_bool("ends", False, "also measure reconstructions and copies: the scale's ends")
    flags.DEFINE_integer("batch_size", 16, "pictures drawn at once", lower_bound=1)
    flags.DEFINE_string("out", "quality", "folder for quality.json and sheet.png")
    app.run(main)
