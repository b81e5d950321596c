"""A model and a latent cache => one PNG of drawn pictures beside the real ones, chosen by a seed.

    python scripts/contact_sheet.py --cache=CACHE --out=docs/images/contact_sheet.png

draws 32 captions of the training split, 16 held-out cells (concept known, this style of it not)
and 16 held-out concepts (split test), picture i of the sheet from the noise of seed i. --seed
chooses the captions. 200 s of CPU time.
"""

import dataclasses
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags
from jaxtyping import UInt8

from ldm_jax import models, sampler
from ldm_jax.data import LatentCache, open_cache
from ldm_jax.encoders import VAE, load_vae
from ldm_jax.pictures import load_picture
from ldm_jax.plotting import save_png, to_uint8

GROUPS = {
    "train": "Training captions: this picture was trained on",
    "cell": "Held-out cells: the concept was trained on in other styles, not in this one",
    "test": "Held-out concepts: never trained on in any style",
}
GAP, TITLE_HEIGHT, LINE_HEIGHT, FONT_SIZE, LETTERS = 8, 34, 16, 13, 38


class Group(NamedTuple):
    """Captions of one split with their pictures."""

    title: str
    captions: Sequence[str]
    drawn: UInt8[np.ndarray, "n h w 3"]
    real: UInt8[np.ndarray, "n h w 3"]


def choose_examples(cache: LatentCache, split: str, n: int, seed: int) -> np.ndarray:
    """The first caption of up to n pictures of a split, in an order that the seed draws.

    Of an emoji's captions the first names its style.
    """
    examples = cache.examples(split)
    _, first = np.unique(cache.pictures(examples), return_index=True)
    return examples[np.random.default_rng(seed).permutation(first)[:n]]


def load_real(cache: LatentCache, folder: Path, examples: np.ndarray, size: int) -> np.ndarray:
    """The pictures that belong to the examples, uint8 (n, size, size, 3)."""
    return np.stack([load_picture(folder / r["file"], size) for r in cache.records(examples)])


def draw_examples(
    model: models.Model,
    cache: LatentCache,
    vae: VAE,
    examples: np.ndarray,
    picture_seeds: np.ndarray,
    batch_size: int = 16,
    **overrides,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Draws the examples' captions, from the text embeddings that the cache holds.

    A CPU computes in float32, whatever the model's dtype: it has no fast bfloat16.

    Args:
        overrides: sampler settings to put in the place of the model's.
    """
    from tqdm import tqdm

    denoiser = model.denoiser
    if jax.default_backend() == "cpu":
        network = denoiser.network.clone(dtype="float32")
        denoiser = dataclasses.replace(denoiser, network=network)
    diffuser = sampler.get_diffuser(denoiser, **(model.meta["sampling"] | overrides))
    labels = cache.take(examples)["text_embeddings"]
    noise = sampler.sample_seeds(picture_seeds, cache.latent_shape)
    images = []
    for i in tqdm(range(0, len(examples), batch_size), desc="drawing", unit="batch"):
        part = slice(i, i + batch_size)
        latents = model.scale.restore(diffuser.reverse_diffusion(noise[part], labels[part]))
        images.append(to_uint8(vae.decode(np.asarray(latents))))
    return np.concatenate(images)


def compose_sheet(groups: Sequence[Group], columns: int = 4) -> UInt8[np.ndarray, "H W 3"]:
    """Pairs of a drawn picture and the real one at its right, the caption below, group by group."""
    from PIL import Image, ImageDraw, ImageFont

    size = groups[0].drawn.shape[1]
    across, down = 2 * size + 2 * GAP, size + 2 * LINE_HEIGHT + GAP
    rows = [-(-len(group.captions) // columns) for group in groups]
    height = sum(TITLE_HEIGHT + n * down for n in rows) + GAP
    sheet = Image.new("RGB", (columns * across + GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    small, large = (ImageFont.load_default(size=s) for s in (FONT_SIZE, FONT_SIZE + 5))
    top = GAP
    for group, n_rows in zip(groups, rows):
        draw.text((GAP, top), group.title + " (left: drawn, right: real)", "black", large)
        top += TITLE_HEIGHT
        for i, caption in enumerate(group.captions):
            x, y = GAP + i % columns * across, top + i // columns * down
            sheet.paste(Image.fromarray(group.drawn[i]), (x, y))
            sheet.paste(Image.fromarray(group.real[i]), (x + size, y))
            # Pillow's own font has no accents.
            letters = unicodedata.normalize("NFKD", caption)
            plain = "".join(c for c in letters if not unicodedata.combining(c))
            lines = textwrap.wrap(plain, LETTERS, max_lines=2, placeholder="...")
            draw.multiline_text((x, y + size), "\n".join(lines), "black", small, spacing=2)
        top += n_rows * down
    return np.asarray(sheet)


def main(argv):
    f = flags.FLAGS
    model = models.load_model(f.checkpoint)
    cache = open_cache(f.cache, model.meta["vae"], model.meta["text_encoder"])
    vae = load_vae(model.meta["vae"]["name"])
    folder = Path(f.pictures or cache.manifest["source"])
    sizes = zip(GROUPS, (f.num, f.num // 2, f.num // 2), strict=True)
    chosen = {split: choose_examples(cache, split, n, f.seed) for split, n in sizes}
    examples = np.concatenate(list(chosen.values()))
    drawn = draw_examples(model, cache, vae, examples, np.arange(len(examples)))
    groups, done = [], 0
    for split, indices in chosen.items():
        if len(indices):
            pictures = drawn[done : done + len(indices)]
            real = load_real(cache, folder, indices, pictures.shape[1])
            groups.append(Group(GROUPS[split], cache.captions(indices), pictures, real))
            done += len(indices)
    settings = {k: str(v) for k, v in model.meta["sampling"].items()}
    settings |= {"seed": str(f.seed), "checkpoint": f.checkpoint or "bundled"}
    save_png(f.out, compose_sheet(groups), settings)
    for i, caption in enumerate(cache.captions(examples)):
        print(f"seed {i}: {caption}")


if __name__ == "__main__":
    flags.DEFINE_string("cache", None, "latent cache that encode.py wrote")
    flags.DEFINE_string("pictures", None, "folder of its pictures; default: where they lay then")
    flags.DEFINE_string("checkpoint", None, "a run's workdir or exported model; default: bundled")
    flags.DEFINE_integer("num", 32, "training captions; of the other groups half as many each")
    flags.DEFINE_integer("seed", 0, "chooses the captions", lower_bound=0)
    flags.DEFINE_string("out", "contact_sheet.png", "file to write")
    flags.mark_flag_as_required("cache")
    app.run(main)
