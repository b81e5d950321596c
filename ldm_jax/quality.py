"""Pictures drawn for captions, and the real ones => figures: how good, how faithful, how copied."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from ldm_jax.alignment import Head, load_head
from ldm_jax.data import LatentCache
from ldm_jax.features import Extractor, Reference, get_reference, get_thumbnails
from ldm_jax.metrics import (
    Estimate,
    frechet_distance,
    get_ranks,
    nearest_rms,
    paired_kid,
    share,
    to_unit,
)
from ldm_jax.pictures import Picture, find_measured, load_picture
from ldm_jax.text import load_text_encoder

GROUPS = {
    "train": "Training captions: this picture was trained on",
    "cell": "Held-out cells: the concept was trained on in other styles, not in this one",
    "test": "Held-out concepts: never trained on in any style",
}
NEAR = 0.05  # RMS difference of two thumbnails, of the range of a pixel: a near copy
FEWEST = 6  # captions of a group: two halves of three


class Exam(NamedTuple):
    """Captions to draw, and all that is known of the real pictures; `create_exam` makes it.

    Attributes:
        pictures: every real picture.
        chosen: of each group, the rows of the pictures whose first captions are drawn.
        reference: features and thumbnails of `pictures`.
        real: of each group, the real pictures, uint8 (n H W 3).
        extractor: of the features.
        candidates: the head, and each picture's first caption in its space; None: without.
        clip_score: images, captions => scores; None: without.
    """

    pictures: Sequence[Picture]
    chosen: Mapping[str, Int[np.ndarray, " n"]]
    reference: Reference
    real: Mapping[str, UInt8[np.ndarray, "n H W 3"]]
    extractor: Extractor
    candidates: tuple[Head, Float[np.ndarray, "m 256"]] | None
    clip_score: Callable | None

    def captions(self, split: str) -> list[str]:
        """The captions of a group that are drawn."""
        return get_captions(self.pictures, self.chosen[split])


def choose_captions(
    pictures: Sequence[Picture], captions_per_group: int, seed: int
) -> dict[str, Int[np.ndarray, " n"]]:
    """Rows of up to that many pictures of each group, by the hash of seed and file name.

    More captions contain fewer, and other pictures of the set do not change the choice. Pictures
    that `find_measured` leaves out are not chosen, nor groups of less than FEWEST pictures.

    Raises:
        ValueError: if no group is left.
    """
    if captions_per_group < FEWEST:
        raise ValueError(f"captions_per_group must be at least {FEWEST}, got {captions_per_group}")
    chosen, measured = {}, [int(i) for i in np.flatnonzero(find_measured(pictures))]
    for split in GROUPS:
        rows = [i for i in measured if pictures[i].split == split]
        names = {i: f"{seed}/{pictures[i].style}/{pictures[i].path.name}" for i in rows}
        rows.sort(key=lambda i: _hash(names[i]))
        if len(rows) >= FEWEST:
            chosen[split] = np.array(rows[:captions_per_group])
    if not chosen:
        splits = [pictures[i].split for i in measured]
        counts = {split: splits.count(split) for split in GROUPS}
        raise ValueError(f"a group must have at least {FEWEST} pictures, got {counts}")
    return chosen


def get_captions(pictures: Sequence[Picture], rows: Int[np.ndarray, " n"]) -> list[str]:
    """The first captions of some pictures: of an emoji's captions, the one that names its style."""
    return [pictures[i].captions[0] for i in rows]


def get_seeds(captions: Sequence[str], seed: int, candidate: int = 0) -> Int[np.ndarray, " n"]:
    """A seed for each caption, by its hash: any two models start from the same noise.

    Where several pictures are drawn for a caption, `candidate` counts them.
    """
    drawn = f"{seed}/{candidate}" if candidate else str(seed)
    return np.array([int.from_bytes(_hash(f"{drawn}/{text}")[:4], "big") for text in captions])


def list_pictures(cache: LatentCache) -> list[Picture]:
    """The pictures that a latent cache was made of, with their captions; opens none of them."""
    source, examples = Path(cache.manifest["source"]), sum(cache.manifest["counts"].values())
    joined: dict[str, Picture] = {}
    for record in cache.records(np.arange(examples)):
        caption, file, *about = (
            record[k] for k in ("caption", "file", "split", "concept", "style")
        )
        picture = joined.setdefault(file, Picture(source / file, (), *about))
        joined[file] = picture._replace(captions=(*picture.captions, caption))
    return list(joined.values())


def create_exam(
    pictures: Sequence[Picture],
    extractor: Extractor,
    image_size: int,
    captions_per_group: int,
    seed: int,
    clip_score: Callable | None = None,
    progress: bool = False,
) -> Exam:
    """Chooses the captions, and reads every real picture or what is kept of it.

    Args:
        pictures: all of them, of every split, as `read_folder` gives them.
        extractor: from `load_extractor`.
        image_size: side of the pictures that are drawn.
        captions_per_group: how many of each group at most.
        seed: of the choice.
        clip_score: from `load_clip_score`.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError: if a picture is not there.
        ValueError: if too few pictures are held out or trained on.
    """
    choose_captions(pictures, captions_per_group, seed)  # Raises before the long part.
    reference = get_reference(pictures, extractor, image_size, progress)
    whole = np.flatnonzero(np.isfinite(reference.features).all(1))
    pictures = [pictures[int(i)] for i in whole]
    reference = Reference(*(array[whole] for array in reference))
    chosen = choose_captions(pictures, captions_per_group, seed)
    real = {
        split: np.stack([load_picture(pictures[i].path, image_size) for i in rows])
        for split, rows in chosen.items()
    }
    candidates, head = None, load_head()
    if head and head.features == extractor.identity["name"]:
        embeddings = load_text_encoder(head.text_encoder)([p.captions[0] for p in pictures])
        candidates = head, head.embed_captions(embeddings)
    return Exam(pictures, chosen, reference, real, extractor, candidates, clip_score)


def measure(
    exam: Exam, drawn: Mapping[str, UInt8[np.ndarray, "n H W 3"]]
) -> dict[str, dict[str, dict]]:
    """Figures of drawn pictures beside those of the real ones, group by group.

    Args:
        exam: the captions and the real pictures.
        drawn: of each group, a picture for each caption.

    Returns:
        report[split][source] for the sources "drawn" and "real", as `measure_pictures` gives them.
    """
    report = {}
    for split, images in drawn.items():
        rows = exam.chosen[split]
        real = Reference(*(array[rows] for array in exam.reference))
        report[split] = {
            "drawn": measure_pictures(exam, split, images),
            "real": measure_pictures(exam, split, exam.real[split], real),
        }
    return report


def measure_ends(exam: Exam, vae: Any, text_encoder: Callable) -> dict[str, dict[str, dict]]:
    """Figures of what needs no denoiser: the ends of the scale, as in `measure`.

    The source "reconstructed" is the real pictures through the autoencoder, the best that a
    denoiser of its latents can reach; "copied" is, for each caption, the training picture whose
    caption is nearest by the cosine of the text embeddings, what a model without any idea can do.
    """
    report: dict[str, dict[str, dict]] = {}
    trained = np.array([i for i, p in enumerate(exam.pictures) if p.split == "train"], np.int64)
    if len(trained):
        known = _flat_unit(text_encoder(get_captions(exam.pictures, trained)))
    for split, images in exam.real.items():
        made = vae.decode(vae.encode(images)[0], as_bytes=True)
        report[split] = {"reconstructed": measure_pictures(exam, split, made)}
        if len(trained):
            asked = _flat_unit(text_encoder(exam.captions(split)))
            nearest = trained[np.argmax(asked @ known.T, 1)]
            paths, size = [exam.pictures[i].path for i in nearest], images.shape[1]
            copies = np.stack([load_picture(path, size) for path in paths])
            report[split]["copied"] = measure_pictures(exam, split, copies)
    return report


def measure_pictures(
    exam: Exam,
    split: str,
    images: UInt8[np.ndarray, "n H W 3"],
    seen: Reference | None = None,
) -> dict[str, Any]:
    """Figures of pictures for the captions of a group, whoever made them.

    Args:
        exam: the captions and the real pictures.
        split: the group.
        images: a picture for each of its captions.
        seen: their features and thumbnails, if they are the real pictures themselves, which are
            then compared with each other, half by half.

    Returns:
        "n", and each figure of `report.FIGURES` that can be told, a number or an Estimate.
    """
    rows, halves = exam.chosen[split], seen is not None
    if not seen:
        seen = Reference(exam.extractor(images), get_thumbnails(images))
    concepts, styles = (
        np.array([getattr(p, k) for p in exam.pictures]) for k in ("concept", "style")
    )
    splits = np.array([p.split for p in exam.pictures])
    same_concept, same_style = (x[rows][:, None] == x[None] for x in (concepts, styles))
    figures: dict[str, Any] = {"n": len(rows)}

    # The set of pictures.
    n = len(rows) // 2
    real = exam.reference.features[rows]
    pair = (real[:n], real[n : 2 * n]) if halves else (seen.features, real)
    figures["kid"] = Estimate(*(1000.0 * x for x in paired_kid(*pair)))
    if not halves:  # Of half as many pictures it is another figure.
        figures["frechet"] = frechet_distance(*pair)

    # What each picture shows.
    searched = find_measured(exam.pictures)
    features = exam.reference.features[searched]
    centre = features.mean(0)
    likeness = to_unit(seen.features, centre) @ to_unit(features, centre).T
    ranks = get_ranks(likeness, same_concept[:, searched], same_style[:, searched])
    figures["recall_1"], figures["recall_5"] = share(ranks <= 1), share(ranks <= 5)
    if len(set(styles[searched])) > 1:
        nearest = styles[searched][likeness.argmax(1)]
        figures["right_style"] = share(nearest == styles[rows])
    if exam.candidates:
        head, captions = exam.candidates
        likeness = head.embed_images(seen.features) @ captions.T
        figures["alignment"] = float(likeness[np.arange(len(rows)), rows].mean())
        ranks = get_ranks(likeness, same_concept, same_style & (splits == split)[None])
        figures["caption_1"], figures["caption_5"] = share(ranks <= 1), share(ranks <= 5)
    if exam.clip_score:
        figures["clip_score"] = float(exam.clip_score(images, exam.captions(split)).mean())

    # Where it has seen that before.
    trained = exam.reference.thumbnails[splits == "train"]
    if len(trained):
        figures["near_copies"] = share(nearest_rms(seen.thumbnails, trained) < 255.0 * NEAR)
    return figures


def _flat_unit(embeddings: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n e"]:
    flat = embeddings.reshape(len(embeddings), -1)
    return to_unit(flat, np.zeros_like(flat[0]))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
