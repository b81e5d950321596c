"""Draws pictures: prompts, a checkpoint => one PNG per picture, and a grid of them.

    python sample.py --prompt="red apple" --prompt="a cat, Fluent 3D" --num=4 --out=pictures

Without --checkpoint it uses the weights that come with the package. A checkpoint alone says which
VAE, text encoder and scale of the latents it needs.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from ldm_jax import models
from ldm_jax.alignment import HEAD_TITLE, decode_best, load_judge
from ldm_jax.compiled import keep_compiled
from ldm_jax.encoders import DTYPES, load_vae
from ldm_jax.plotting import save_grid, save_pngs
from ldm_jax.sampler import in_float32_on_cpu
from ldm_jax.schedules import SCHEDULES
from ldm_jax.solvers import METHODS
from ldm_jax.spreading import sample_latents
from ldm_jax.text import check_parts, check_prompt, load_text_encoder

NO_GUIDE = "none"
# Flags => arguments of `get_diffuser`.
SETTINGS = {
    "steps": "diffusion_steps",
    "guidance": "class_guidance",
    "guidance_style": "style_guidance",
    **{
        name: name
        for name in ("guidance_interval", "guidance_rescale", "method", "eta", "schedule")
    },
}


def sample(
    prompts: Sequence[str],
    out: str | Path,
    *,
    checkpoint_folder: str | Path | None = None,
    checkpoint_step: str | int = "last",
    ema: float | None = None,
    num: int = 1,
    seed: int = 0,
    negative_prompt: str | None = None,
    guide_folder: str | Path | None = None,
    guide_step: str | int = "last",
    batch_size: int = 16,
    best_of: int = 1,
    judge: str | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    vae_dtype: str = "float32",
    **settings: Any,
) -> list[Path]:
    """Draws `num` pictures for each prompt and writes them, and "grid.png", to `out`.

    Picture j of a prompt starts from the noise of seed + j, so that it can be drawn again alone.
    With `best_of` it is the one of as many seeds, from seed + j best_of on, that fits its prompt
    best, by the CLIP in the folder `judge` or, without one, by the bundled alignment head, which
    knows emoji. The PNG files carry prompt, seed and settings as text; `settings` are arguments of
    `get_diffuser` in the place of the checkpoint's own. Guidance leads away from what a weaker
    checkpoint estimates, that in `guide_folder` or the checkpoint's own guide; from no text, where
    there is none or `guide_folder` is NO_GUIDE; or from `negative_prompt`. `vae` names an
    autoencoder whose decoder is taken in the place of the training's; its encoder must be the same.
    `text_encoder` is where the training's lies now, if it was moved.
    With a `vae_dtype` of "bfloat16" a GPU decodes faster, at some 55 dB from the float32 pictures
    (the bundled VAE). With `ema` the weights are the average of that sigma_rel, made of the run's
    snapshots.

    Raises:
        ValueError: for an empty or overlong prompt, seeds outside [0, 2^32), settings that do not
            exist or go together, a guide of another model, encoders that are not those of the
            training, or an `ema` out of reach.
        OSError: if the checkpoint or the CLIP is missing.
        ImportError: if a package of an encoder or of the judge is missing.
    """
    if not prompts:
        raise ValueError("at least one prompt is needed, got none")
    negative_prompts = [] if negative_prompt is None else [negative_prompt]
    for prompt in [*prompts, *negative_prompts]:
        check_prompt(prompt)
    if guide_folder in (None, NO_GUIDE) and guide_step != "last":
        raise ValueError(f"guide_step {guide_step} needs a guide's run (--guide), got none")
    if guide_folder not in (None, NO_GUIDE) and negative_prompts:
        raise ValueError("a guide and a negative prompt do not go together: choose one")
    judge_pictures = load_judge(best_of, judge)
    model = models.load_model(checkpoint_folder, checkpoint_step, ema)
    if guide_folder == NO_GUIDE or negative_prompts:
        model = model.guided_by(None)
    elif guide_folder is not None:
        model = model.guided_by(models.load_model(guide_folder, guide_step))
    diffuser = model.convert(in_float32_on_cpu).get_diffuser(**settings)
    settings = model.meta["sampling"] | settings
    check_parts(model.meta["text_encoder"]["name"], settings)
    encode = models.load_encoder(load_text_encoder, model.meta["text_encoder"], text_encoder)
    decoder = models.load_encoder(load_vae, model.meta["vae"], vae, dtype=vae_dtype)

    shape = tuple(model.meta["latent_shape"])
    if judge_pictures:  # Raises before the long part.
        side = shape[0] * decoder.downsampling
        judge_pictures(np.zeros((1, side, side, 3), np.uint8), prompts[:1])
    drawn = num * best_of  # for each prompt
    captions = [prompt for prompt in prompts for _ in range(drawn)]
    labels = np.repeat(encode(list(prompts)), drawn, axis=0)
    negative_labels = None
    if negative_prompts:
        negative_labels = np.repeat(encode(negative_prompts), len(captions), axis=0)
    picture_seeds = np.tile(np.arange(seed, seed + drawn), len(prompts))
    latents = sample_latents(
        diffuser, labels, picture_seeds, shape, batch_size, negative_labels=negative_labels
    )
    latents = np.asarray(model.scale.restore(jnp.asarray(latents)))
    images, kept = decode_best(
        partial(decoder.decode, as_bytes=True),
        judge_pictures,
        latents,
        captions,
        best_of,
        batch_size,
    )
    captions, picture_seeds = captions[::best_of], picture_seeds[kept]

    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    described = {k: str(v) for k, v in settings.items()}
    described["checkpoint"] = str(checkpoint_folder or "bundled")
    described |= {} if model.step is None else {"step": str(model.step)}
    described |= {} if ema is None else {"ema": str(ema)}
    described |= {"vae": decoder.identity["name"], "decoder_sha256": decoder.decoder_sha256}
    if judge_pictures:
        described["best_of"] = f"{best_of}, by {judge or HEAD_TITLE}"
    described |= {"negative_prompt": negative_prompt} if negative_prompts else {}
    if model.guide:
        told = guide_step if model.guide.step is None else model.guide.step
        described["guide"] = f"{guide_folder}, step {told}" if guide_folder else "its own"
    paths, metadata = [], []
    for i, (caption, picture_seed) in enumerate(zip(captions, picture_seeds)):
        paths.append(out / f"{i // num:03d}-{_file_stem(caption)}-{picture_seed}.png")
        metadata.append({"prompt": caption, "seed": str(picture_seed), **described})
    save_pngs(paths, images, metadata)
    save_grid(out / "grid.png", images, captions, columns=num if num > 1 else min(8, len(captions)))
    return paths


def _file_stem(prompt):
    """The prompt in letters that any file system takes."""
    return re.sub(r"\W+", "-", prompt).strip("-").lower()[:60] or "picture"


def _get_settings(f):
    """The arguments of `get_diffuser` that the command line gives."""
    settings = {name: f[flag].value for flag, name in SETTINGS.items()}
    settings = {name: value for name, value in settings.items() if value not in (None, [])}
    if "guidance_interval" in settings:
        given = settings["guidance_interval"]
        try:
            settings["guidance_interval"] = [float(level) for level in given]
        except ValueError as error:
            needed = "--guidance_interval needs two numbers, as 0.1,0.8"
            raise ValueError(f"{needed}, got {','.join(given)}") from error
    return settings


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"prompts are given by --prompt=..., got {argv[1:]}")
    f = flags.FLAGS
    if f.verbosity <= 0:
        logging.set_verbosity(logging.WARNING)  # Orbax tells each of its steps as "info".
    print(keep_compiled(), flush=True)
    try:
        paths = sample(
            f.prompt,
            f.out,
            checkpoint_folder=f.checkpoint,
            checkpoint_step=f.step,
            ema=f.ema,
            num=f.num,
            seed=f.seed,
            negative_prompt=f.negative_prompt,
            guide_folder=f.guide,
            guide_step=f.guide_step,
            batch_size=f.batch_size,
            best_of=f.best_of,
            judge=f.judge,
            vae=f.vae,
            text_encoder=f.text_encoder,
            vae_dtype=f.vae_dtype,
            **_get_settings(f),
        )
    except (ValueError, OSError, ImportError) as error:
        logging.debug("Raised here:", exc_info=True)  # Shown by --verbosity=1.
        raise SystemExit(f"sample.py: {error}") from error
    print(f"{len(paths)} pictures and grid.png in {Path(f.out).resolve()}")


if __name__ == "__main__":
    flags.DEFINE_multi_string("prompt", None, "what to draw; may be given several times")
    flags.DEFINE_string("checkpoint", None, "a run's workdir or an exported model")
    flags.DEFINE_string("step", "last", "a run's checkpoint: last, best (held-out loss), a number")
    flags.DEFINE_float("ema", None, "sigma_rel of an average made of the run's snapshots, as 0.08")
    flags.DEFINE_integer("num", 1, "pictures for each prompt", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of a prompt's first picture; the next has seed + best_of")
    flags.DEFINE_integer("best_of", 1, "drawn for each picture, of which the best is kept")
    flags.DEFINE_string("judge", None, "folder of a CLIP to choose by; default: the bundled head")
    # Without one of these the checkpoint's own setting counts.
    flags.DEFINE_integer("steps", None, "noise levels")
    flags.DEFINE_float("guidance", None, "weight of the text")
    flags.DEFINE_float("guidance_style", None, "weight of the text's style, where it stands apart")
    flags.DEFINE_list("guidance_interval", None, "noise levels where guidance counts, as 0.1,0.8")
    flags.DEFINE_float("guidance_rescale", None, "how much guided estimates keep their spread")
    flags.DEFINE_enum("method", None, METHODS, "how to walk from noise to latents")
    flags.DEFINE_float("eta", None, "fresh noise of the method ddim, from 0 to 1")
    flags.DEFINE_enum("schedule", None, SCHEDULES, "which noise levels")
    flags.DEFINE_string("negative_prompt", None, "what guidance leads away from")
    flags.DEFINE_string(
        "guide", None, f"a weaker checkpoint that guidance leads away from; {NO_GUIDE}: no text"
    )
    flags.DEFINE_string("guide_step", "last", "of the guide, as --step")
    flags.DEFINE_integer("batch_size", 16, "pictures drawn at once", lower_bound=1)
    flags.DEFINE_string("vae", None, "an autoencoder to decode by; default: the training's")
    flags.DEFINE_string("text_encoder", None, "where the training's lies now, as clip:FOLDER")
    flags.DEFINE_enum("vae_dtype", "float32", DTYPES, "of the decoding's computation")
    flags.DEFINE_string("out", "pictures", "folder for the PNG files")
    flags.mark_flag_as_required("prompt")
    app.run(main)
