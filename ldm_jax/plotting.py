"""Pictures for people: images (n H W 3) => a figure, a PNG with its story inside, or a grid.

Images are uint8, or floats in [-1, 1]; floats beyond that range are clipped.
"""

import bisect
import math
import os
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

GAP = 4  # pixels around the tiles of a grid
CAPTION_LINES = 3
PAIR_GAP, TITLE_HEIGHT, LINE_HEIGHT, FONT_SIZE = 8, 34, 16, 13  # of a sheet of pairs
CAPTIONED_WIDTH = 96  # a tile with a caption takes at least this many pixels


class Pairs(NamedTuple):
    """Drawn pictures of some captions, and the real ones."""

    title: str
    captions: Sequence[str]
    drawn: UInt8[np.ndarray, "n H W 3"]
    real: UInt8[np.ndarray, "n H W 3"]


def to_uint8(images: Shaped[np.ndarray, "*n H W 3"]) -> UInt8[np.ndarray, "*n H W 3"]:
    """Bytes of images: round(127.5 (x + 1)) for floats, bytes as they are.

    Raises:
        ValueError: for another channel count or dtype, and for NaN or infinity.
    """
    images = np.asarray(images)
    if images.ndim < 3 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (..., H, W, 3), none 0, got {images.shape}")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise ValueError(f"images must be uint8 or floats in [-1, 1], got {images.dtype}")
    if not np.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity")
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def imshow(image: Shaped[np.ndarray, "H W 3"]) -> Any:
    """Draws one image into matplotlib's current axes, without ticks; returns the axes."""
    plt = _get_pyplot()
    axes = plt.gca()
    axes.imshow(_check_image(image))
    axes.set_axis_off()
    return axes


def plot_images(
    images: Shaped[np.ndarray, "n H W 3"],
    captions: Sequence[str] | None = None,
    columns: int = 8,
) -> Any:
    """Draws images in rows of `columns` with captions above; returns matplotlib's figure."""
    images = _check_grid(images, captions, columns)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    plt = _get_pyplot()
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(1.6 * columns, 1.9 * rows), layout="constrained"
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (ax, image) in enumerate(zip(axes.flat, images)):
        ax.imshow(image)
        if captions is not None:
            ax.set_title(captions[i], fontsize=7, wrap=True, parse_math=False)
    return figure


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    x_title: str,
    columns: int = 2,
    log: bool = False,
) -> Any:
    """Draws curves with a bar at each point for its interval; returns matplotlib's figure.

    An ordinate of positive numbers, the greatest over ten times the least, is logarithmic.

    Args:
        panels: title of the ordinate => title of a curve => points (x, value, low, high).
        x_title: of the abscissa.
        columns: panels in a row.
        log: whether the abscissa is logarithmic.
    """
    plt = _get_pyplot()
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(5.5 * columns, 4 * rows), layout="constrained"
    )
    for ax, (title, curves) in zip(axes.flat, panels.items()):
        places = sorted({point[0] for points in curves.values() for point in points})
        width = 0.01 * (places[-1] - places[0])
        for i, (name, points) in enumerate(curves.items()):
            x, value, low, high = (np.array(column) for column in zip(*sorted(points)))
            # Side by side, so that bars of one abscissa do not hide each other.
            aside = i - (len(curves) - 1) / 2
            x = x * 1.02**aside if log else x + width * aside
            style = dict(marker="o", markersize=4, linewidth=1.2, elinewidth=0.8, capsize=2)
            ax.errorbar(x, value, [value - low, high - value], label=name, **style)
        if log:
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
            # Of two ticks whose labels would touch, the greater.
            places = [p for p, after in zip(places, [*places[1:], np.inf]) if after > 1.15 * p]
        every = np.array([point[1:] for points in curves.values() for point in points])
        if 0 < 10 * every.min() < every.max():
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.set_xticks(places)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set(xlabel=x_title, ylabel=title)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    return figure


def save_png(
    path: str | Path,
    image: Shaped[np.ndarray, "H W 3"],
    metadata: Mapping[str, str] | None = None,
):
    """Writes one image as PNG, whole or not at all, and text beside it into the file.

    Args:
        path: of the file; missing folders are made.
        image: uint8, or floats in [-1, 1].
        metadata: keywords of 1 to 79 ASCII characters => any text (iTXt chunks, UTF-8).

    Raises:
        ValueError: for another shape or dtype, NaN or infinity, and metadata that PNG cannot hold.
    """
    from PIL import Image

    _write_png(Path(path), Image.fromarray(_check_image(image)), metadata or {})


def save_pngs(
    paths: Sequence[str | Path],
    images: Shaped[np.ndarray, "n H W 3"],
    metadata: Sequence[Mapping[str, str]] | None = None,
):
    """`save_png` for each of n images, in threads: compression lets other threads run.

    Args:
        paths: of the files.
        images: uint8, or floats in [-1, 1].
        metadata: of each file.

    Raises:
        ValueError: as `save_png`, for the first image that cannot be written, and for other numbers
            of paths or metadata than images.
    """
    metadata = [{}] * len(images) if metadata is None else metadata
    if not len(paths) == len(metadata) == len(images):
        got = f"{len(paths)} and {len(metadata)}"
        raise ValueError(f"paths and metadata must be as many as images, {len(images)}, got {got}")
    with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1) or 1) as pool:
        list(pool.map(save_png, paths, images, metadata))  # The list raises what a thread raised.


def read_png_metadata(path: str | Path) -> dict[str, str]:
    """The text that `save_png` put into the file.

    Raises:
        ValueError: if the file is a picture of another format.
    """
    from PIL import Image

    with Image.open(path) as picture:
        if picture.format != "PNG":
            raise ValueError(f"{path}: metadata is read from PNG files, got {picture.format}")
        picture.load()  # Text may stand behind the pixels.
        png: Any = picture
        return {key: str(text) for key, text in png.text.items()}


def save_grid(
    path: str | Path,
    images: Shaped[np.ndarray, "n H W 3"],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    metadata: Mapping[str, str] | None = None,
):
    """Writes images as one PNG, in rows of `columns`, on white, captions below the tiles.

    Long captions are wrapped, and end in an ellipsis after CAPTION_LINES lines.

    Args:
        path: of the file; missing folders are made.
        images: uint8, or floats in [-1, 1].
        captions: one for each image.
        columns: tiles in a row.
        metadata: as in `save_png`.

    Raises:
        ValueError: as `save_png`, and for captions of another number than images.
    """
    from PIL import Image, ImageDraw, ImageFont

    images = _check_grid(images, captions, columns)
    n, height, width, _ = images.shape
    columns = min(columns, n)
    cell_width = width if captions is None else max(width, CAPTIONED_WIDTH)
    font: Any = ImageFont.load_default(size=min(max(cell_width // 10, 11), 24))
    texts = [_wrap(caption, font, cell_width) for caption in captions or ()]
    line_height = sum(font.getmetrics())
    text_height = max(map(len, texts), default=0) * line_height

    rows = math.ceil(n / columns)
    across, down = cell_width + GAP, height + text_height + GAP
    grid = Image.new("RGB", (columns * across + GAP, rows * down + GAP), "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = GAP + i % columns * across, GAP + i // columns * down
        grid.paste(Image.fromarray(image), (x, y))
        for j, line in enumerate(texts[i] if texts else ()):
            draw.text((x, y + height + j * line_height), line, fill="black", font=font)
    _write_png(Path(path), grid, metadata or {})


def compose_pairs(groups: Sequence[Pairs], columns: int = 4) -> UInt8[np.ndarray, "H W 3"]:
    """Pairs of a drawn picture and the real one at its right, the caption below, group by group."""
    from PIL import Image, ImageDraw, ImageFont

    size = groups[0].drawn.shape[1]
    across, down = 2 * size + 2 * PAIR_GAP, size + 2 * LINE_HEIGHT + PAIR_GAP
    rows = [math.ceil(len(group.captions) / columns) for group in groups]
    height = sum(TITLE_HEIGHT + n * down for n in rows) + PAIR_GAP
    sheet = Image.new("RGB", (columns * across + PAIR_GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    small: Any = ImageFont.load_default(size=FONT_SIZE)
    large = ImageFont.load_default(size=FONT_SIZE + 5)
    top = PAIR_GAP
    for group, n_rows in zip(groups, rows):
        draw.text((PAIR_GAP, top), group.title + " (left: drawn, right: real)", "black", large)
        top += TITLE_HEIGHT
        for i, caption in enumerate(group.captions):
            x, y = PAIR_GAP + i % columns * across, top + i // columns * down
            sheet.paste(Image.fromarray(group.drawn[i]), (x, y))
            sheet.paste(Image.fromarray(group.real[i]), (x + size, y))
            for j, line in enumerate(_wrap(caption, small, 2 * size, 2)):
                draw.text((x, y + size + j * LINE_HEIGHT), line, "black", small)
        top += n_rows * down
    return np.asarray(sheet)


def _check_image(image: Any) -> np.ndarray:
    if np.ndim(image) != 3:
        raise ValueError(f"an image must have shape (H, W, 3), got {np.shape(image)}")
    return to_uint8(image)


def _check_grid(images: Any, captions: Sequence[str] | None, columns: int) -> np.ndarray:
    if np.ndim(images) != 4:
        raise ValueError(f"images must have shape (n, H, W, 3), got {np.shape(images)}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions must be as many as images, {len(images)}, got {len(captions)}")
    if columns < 1:
        raise ValueError(f"columns must be positive, got {columns}")
    return to_uint8(images)


def _get_pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(f'plots need matplotlib ({error}): pip install -e ".[plot]"') from error
    return plt


def _write_png(path: Path, picture: Any, metadata: Mapping[str, str]):
    """A reader of `path` finds the former file or the whole new one."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for key, value in metadata.items():
        if not (1 <= len(key) <= 79 and key.isascii() and key.isprintable()):
            raise ValueError(f"metadata keys must be 1 to 79 ASCII characters, got {key!r}")
        if not isinstance(value, str):
            raise ValueError(f"metadata must be text, got {key}={value!r}")
        text.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        picture.save(part, format="PNG", pnginfo=text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _wrap(text: str, font: Any, width: int, most: int = CAPTION_LINES) -> list[str]:
    """At most `most` lines of at most `width` pixels, broken at spaces where there are any."""
    # Pillow's own font, the same on every machine, has no accents: "piñata" is drawn "pinata".
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    rest, lines = " ".join("".join(letters).split()), []
    while rest and len(lines) < most:
        fits = _count_fitting(rest, font, width)
        if fits < len(rest):
            if len(lines) == most - 1:
                lines.append(rest[: _count_fitting(rest, font, width, "...")].rstrip() + "...")
                break
            fits = max(rest.rfind(" ", 0, fits + 1), 0) or fits
        lines.append(rest[:fits])
        rest = rest[fits:].lstrip()
    return lines


def _count_fitting(text: str, font: Any, width: int, end: str = "") -> int:
    """How many first characters fit into `width` pixels with `end` behind them, at least 1."""
    counts = range(1, len(text) + 1)
    return max(1, bisect.bisect_right(counts, width, key=lambda n: font.getlength(text[:n] + end)))
