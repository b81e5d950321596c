"""A folder of emoji => what simple learners reach in the figures of docs/quality.md, undrawn.

    python -m scripts.quality_baselines --pictures=FOLDER

FOLDER is what `encode.py --config=configs/emoji.py` draws, `emoji` in the user's cache. Nothing is
drawn, and regressions in closed form are all that is trained, in the feature space in which
pictures are compared:

    apart        each real picture, looked up among all others: how much the nearest picture says of
                 a style where the picture itself is not there
    moved        the mean of the concept's training pictures in other styles, each moved by the
                 difference of the two styles' means. Its parts are among what is searched, so that
                 the nearest is easily one of them, in another style
    moved by W   the same, moved by a ridge regression for the style
    text         kernel ridge regression from the embedding of the name, and the style, to features:
                 what a text says of a picture, learnt from all training pictures

The last three end in features, not in pictures: a denoiser has to draw as well.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags
from jaxtyping import Float, Int

from ldm_jax.features import get_reference, load_extractor
from ldm_jax.metrics import Estimate, get_ranks, share, to_unit
from ldm_jax.pictures import read_measured
from ldm_jax.text import load_text_encoder, split_caption

GROUPS = {"cell": "held-out cells", "test": "held-out concepts"}
SHARPNESS = 1.0, 3.0, 8.0  # g of the kernel exp(-g |a - b|^2) of two names of length 1.
ACROSS = 0.7  # Of the kernel, what two pictures of different styles keep.
RIDGE = 0.1
RIDGE_OF_MOVES = 100.0


class Pictures(NamedTuple):
    """Real pictures: features, embeddings of their names, style, concept and split of each."""

    features: Float[np.ndarray, "n d"]
    names: Float[np.ndarray, "n e"]
    style: np.ndarray
    concept: np.ndarray
    split: np.ndarray

    def find(self, split: str) -> Int[np.ndarray, " m"]:
        """Rows of a split."""
        return np.flatnonzero(self.split == split)


def measure(p: Pictures, rows: np.ndarray, found: Float[np.ndarray, "m d"]) -> list[Estimate]:
    """R@1, R@5 and style of features for the captions of some rows, as `ldm_jax.quality` has it."""
    likeness = _get_likeness(p, found)
    ranks = get_ranks(likeness, *(x[rows][:, None] == x[None] for x in (p.concept, p.style)))
    right = p.style[likeness.argmax(1)] == p.style[rows]
    return [share(ranks <= 1), share(ranks <= 5), share(right)]


def measure_apart(p: Pictures, rows: np.ndarray) -> Estimate:
    """How often the nearest other real picture has the style of a real one."""
    likeness = _get_likeness(p, p.features[rows])
    likeness[np.arange(len(rows)), rows] = -np.inf
    return share(p.style[likeness.argmax(1)] == p.style[rows])


def _get_likeness(p, features):
    centre = p.features.mean(0)
    return to_unit(features, centre) @ to_unit(p.features, centre).T


def get_means(p: Pictures) -> dict[str, np.ndarray]:
    """The mean of each style's training pictures."""
    trained = p.split == "train"
    return {str(s): p.features[trained & (p.style == s)].mean(0) for s in np.unique(p.style)}


def move(p: Pictures) -> Float[np.ndarray, "n d"]:
    """Of each picture's concept, what its training pictures in other styles have in common."""
    means, trained = get_means(p), p.split == "train"
    moved = p.features - np.stack([means[s] for s in p.style])
    total = np.zeros_like(p.features)
    for i, (style, concept) in enumerate(zip(p.style, p.concept)):
        others = trained & (p.concept == concept) & (p.style != style)
        if others.any():
            total[i] = moved[others].mean(0)
    return total


def move_by_ridge(p: Pictures, common: Float[np.ndarray, "n d"], rows: np.ndarray) -> np.ndarray:
    """What the concept's pictures have in common => features in the style of each row."""
    means, found = get_means(p), np.zeros((len(rows), p.features.shape[1]))
    for style in np.unique(p.style[rows]):
        learnt = np.flatnonzero((p.split == "train") & (p.style == style) & common.any(1))
        x, y = common[learnt], p.features[learnt] - means[style]
        weights = np.linalg.solve(x.T @ x + RIDGE_OF_MOVES * np.eye(x.shape[1]), x.T @ y)
        of_style = p.style[rows] == style
        found[of_style] = common[rows[of_style]] @ weights + means[style]
    return found


def regress(
    p: Pictures, rows: list[np.ndarray], sharpness: float, ridge: float = RIDGE
) -> list[np.ndarray]:
    """Features for the names and styles of some rows, learnt from all training pictures."""
    means, trained = get_means(p), p.find("train")
    names = to_unit(p.names, np.zeros_like(p.names[0]))

    def get_kernel(a, b):
        alike = np.exp(-2 * sharpness * (1 - names[a] @ names[b].T))
        return alike * np.where(p.style[a][:, None] == p.style[b][None], 1.0, ACROSS)

    y = p.features[trained] - np.stack([means[s] for s in p.style[trained]])
    weights = np.linalg.solve(get_kernel(trained, trained) + ridge * np.eye(len(trained)), y)
    return [
        get_kernel(r, trained) @ weights + np.stack([means[s] for s in p.style[r]]) for r in rows
    ]


def compare(p: Pictures) -> Iterator[tuple[str, str, list[Estimate | None]]]:
    """Name, group and R@1, R@5, style of each row of the table."""
    groups = {split: p.find(split) for split in GROUPS}
    for split, rows in groups.items():
        yield "apart", split, [None, None, measure_apart(p, rows)]
    cells, common, means = groups["cell"], move(p), get_means(p)
    moved = common[cells] + np.stack([means[s] for s in p.style[cells]])
    yield "moved", "cell", measure(p, cells, moved)
    yield "moved by W", "cell", measure(p, cells, move_by_ridge(p, common, cells))
    for sharpness in SHARPNESS:
        found = regress(p, list(groups.values()), sharpness)
        for (split, rows), features in zip(groups.items(), found):
            yield f"text, g = {sharpness:g}", split, measure(p, rows, features)


def read_pictures(folder: Path, image_size: int) -> Pictures:
    """All pictures of a folder that `draw_emoji` drew, by EfficientNet-lite0."""
    pictures = read_measured(folder)
    reference = get_reference(pictures, load_extractor(), image_size, progress=True)
    names = [split_caption(p.captions[0])[0] for p in pictures]
    fields = (np.array([getattr(p, k) for p in pictures]) for k in ("style", "concept", "split"))
    return Pictures(reference.features, load_text_encoder("use")(names), *fields)


def main(argv: list[str]) -> None:
    pictures = read_pictures(Path(flags.FLAGS.pictures), flags.FLAGS.image_size)
    print("| | captions | R@1 | R@5 | style |\n| --- | --- | --- | --- | --- |")
    for name, split, figures in compare(pictures):
        cells = ["-" if f is None else f"{f[0]:.2f} [{f[1]:.2f}, {f[2]:.2f}]" for f in figures]
        print(f"| {name} | {GROUPS[split]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("pictures", None, "a folder of emoji with splits", required=True)
    flags.DEFINE_integer("image_size", 128, "side at which they are compared", 32)
    app.run(main)
