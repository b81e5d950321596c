"""A model and a latent cache => one PNG of drawn pictures beside the real ones, chosen by a seed.

    python scripts/contact_sheet.py --cache=CACHE --out=docs/images/contact_sheet.png

draws 32 captions of the training split, 16 held-out cells (concept known, this style of it not)
and 16 held-out concepts (split test), picture i of the sheet from the noise of seed i. --seed
chooses the captions. 200 s of CPU time.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import UInt8

from ldm_jax import models
from ldm_jax.data import LatentCache, open_cache
from ldm_jax.encoders import VAE, load_vae
from ldm_jax.pictures import load_picture
from ldm_jax.plotting import Pairs, compose_pairs, save_png
from ldm_jax.quality import GROUPS
from ldm_jax.sampler import in_float32_on_cpu
from ldm_jax.spreading import sample_latents


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
) -> UInt8[np.ndarray, "n h w 3"]:
    """Draws the examples' captions, from the text embeddings that the cache holds.

    A CPU computes in float32, whatever the model's dtype: it has no fast bfloat16.
    """
    diffuser = model.convert(in_float32_on_cpu).get_diffuser()
    labels = cache.take(examples)["text_embeddings"]
    shape = cache.latent_shape
    latents = sample_latents(diffuser, labels, picture_seeds, shape, progress=True)
    return vae.decode(np.asarray(model.scale.restore(jnp.asarray(latents))), as_bytes=True)


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
            groups.append(Pairs(GROUPS[split], cache.captions(indices), pictures, real))
            done += len(indices)
    settings = {k: str(v) for k, v in model.meta["sampling"].items()}
    settings |= {"seed": str(f.seed), "checkpoint": f.checkpoint or "bundled"}
    save_png(f.out, compose_pairs(groups), settings)
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
