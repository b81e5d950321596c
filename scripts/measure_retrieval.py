"""A model and a latent cache => how often a drawn picture finds its concept among the real ones.

    python scripts/measure_retrieval.py --cache=CACHE --num=64 [--guidance=3 --steps=70]

draws --num captions of each group (training, held-out cells, held-out concepts), picture i of a
group from the noise of seed i, and prints one JSON object. A drawn picture is looked up by
EfficientNet-lite0 features, less their mean over all real pictures, by cosine. `recall_1` and
`recall_5`: among all real pictures of the style that the caption names, of every split, one of
the nearest 1 or 5 shows the caption's concept. `right_style`: the nearest of the real pictures of
all styles has the caption's style. `psnr`: decibels to the real picture of the caption, the median.

"real_of_another_style" looks up, in the same way, a real picture of the same concept in another
style, chosen by the seed, for those captions whose concept has one: what the features can do. Its
`right_style` looks up the captions' own real pictures among all others.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags
from contact_sheet import GROUPS, choose_examples, draw_examples, load_real

from ldm_jax import models
from ldm_jax.data import LatentCache, open_cache
from ldm_jax.encoders import load_vae
from ldm_jax.features import load_extractor
from ldm_jax.metrics import psnr


class Gallery(NamedTuple):
    """Every real picture once."""

    features: np.ndarray  # (m, 1280), less `centre`, of length 1
    centre: np.ndarray  # (1280,)
    records: list[dict]  # file, concept and style of each


def load_gallery(cache: LatentCache, folder: Path) -> Gallery:
    """Reads all real pictures of a cache from their folder and computes their features."""
    examples = np.arange(sum(cache.manifest["counts"].values()))
    _, first = np.unique(cache.pictures(examples), return_index=True)
    features = load_extractor()(load_real(cache, folder, first, cache.manifest["image_size"]))
    centre = features.mean(0)
    return Gallery(to_unit(features, centre), centre, cache.records(first))


def to_unit(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Features less `centre`, of length 1, so that a product of two is their cosine."""
    features = features - centre
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def measure_group(features: np.ndarray, wanted: list[dict], gallery: Gallery) -> dict[str, float]:
    """Looks up pictures among the real ones.

    Args:
        features: unit features of the pictures (n, d).
        wanted: concept and style that each should show.
        gallery: the real pictures.
    """
    concepts, styles = (np.array([r[k] for r in gallery.records]) for k in ("concept", "style"))
    found_1, found_5, right_style = [], [], []
    for likeness, want in zip(features @ gallery.features.T, wanted):
        right_style.append(styles[likeness.argmax()] == want["style"])
        rows = np.flatnonzero(styles == want["style"])
        nearest = rows[np.argsort(-likeness[rows])[:5]]
        hits = concepts[nearest] == want["concept"]
        found_1.append(hits[0])
        found_5.append(hits.any())
    names = ("recall_1", "recall_5", "right_style")
    values = (float(np.mean(x)) for x in (found_1, found_5, right_style))
    return {"n": len(wanted), **dict(zip(names, values))}


def measure_model(
    model: models.Model,
    cache: LatentCache,
    folder: Path,
    gallery: Gallery,
    num: int,
    seed: int,
    **overrides,
) -> dict[str, dict]:
    """Draws `num` captions of each group with the model and looks the pictures up.

    Args:
        overrides: sampler settings to put in the place of the model's.
    """
    vae, report = load_vae(model.meta["vae"]["name"]), {}
    for split in GROUPS:
        examples = choose_examples(cache, split, num, seed)
        seeds = np.arange(len(examples))
        drawn = draw_examples(model, cache, vae, examples, seeds, **overrides)
        real = load_real(cache, folder, examples, drawn.shape[1])
        features = to_unit(load_extractor()(drawn), gallery.centre)
        pairs = (x.astype(np.float32) / 127.5 - 1 for x in (drawn, real))
        report[split] = measure_group(features, cache.records(examples), gallery)
        report[split]["psnr"] = float(np.median(psnr(*pairs)))
    return report


def measure_reference(cache: LatentCache, gallery: Gallery, num: int, seed: int) -> dict[str, dict]:
    """Looks up a real picture of the same concept in another style, where there is one."""
    rng, report = np.random.default_rng(seed), {}
    for split in GROUPS:
        wanted = cache.records(choose_examples(cache, split, num, seed))
        others = [_others(want, gallery.records) for want in wanted]
        kept = [(want, rng.choice(rows)) for want, rows in zip(wanted, others) if rows]
        features = gallery.features[[row for _, row in kept]]
        report[split] = measure_group(features, [want for want, _ in kept], gallery)
        # Those pictures have another style by choice: ask the captions' own for theirs.
        report[split]["right_style"] = _style_share(wanted, gallery)
    return report


def main(argv):
    f = flags.FLAGS
    model = models.load_model(f.checkpoint)
    cache = open_cache(f.cache, model.meta["vae"], model.meta["text_encoder"])
    folder = Path(f.pictures or cache.manifest["source"])
    overrides = {"class_guidance": f.guidance, "diffusion_steps": f.steps}
    overrides = {k: v for k, v in overrides.items() if v is not None}
    gallery = load_gallery(cache, folder)
    report = {
        "checkpoint": f.checkpoint or "bundled",
        "sampling": model.meta["sampling"] | overrides,
        "drawn": measure_model(model, cache, folder, gallery, f.num, f.seed, **overrides),
        "real_of_another_style": measure_reference(cache, gallery, f.num, f.seed),
    }
    print(json.dumps(report, indent=1))


def _style_share(wanted: list[dict], gallery: Gallery) -> float:
    """How often the nearest other real picture has the style of a real one."""
    places = {record["file"]: i for i, record in enumerate(gallery.records)}
    rows = np.array([places[want["file"]] for want in wanted])
    likeness = gallery.features[rows] @ gallery.features.T
    likeness[np.arange(len(rows)), rows] = -np.inf
    styles = np.array([record["style"] for record in gallery.records])
    return float(np.mean(styles[likeness.argmax(1)] == styles[rows]))


def _others(want: dict, records: list[dict]) -> list[int]:
    """The real pictures of a concept in the other styles."""
    return [
        i
        for i, r in enumerate(records)
        if r["concept"] == want["concept"] and r["style"] != want["style"]
    ]


if __name__ == "__main__":
    flags.DEFINE_string("cache", None, "latent cache that encode.py wrote, of a set with styles")
    flags.DEFINE_string("pictures", None, "folder of its pictures; default: where they lay then")
    flags.DEFINE_string("checkpoint", None, "a run's workdir or exported model; default: bundled")
    flags.DEFINE_integer("num", 64, "captions of each group", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "chooses the captions", lower_bound=0)
    flags.DEFINE_float("guidance", None, "weight of the text; default: the model's")
    flags.DEFINE_integer("steps", None, "noise levels; default: the model's")
    flags.mark_flag_as_required("cache")
    app.run(main)
