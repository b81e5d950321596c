"""A folder of captioned pictures => Picture records; one picture file => uint8 (size, size, 3)."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, UInt8

SPLITS = ("train", "valid", "test", "cell")
TEST_SHARE = 0.06
VALID_SHARE = 0.04
MIN_SIDE = 8
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class PictureError(ValueError):
    """A picture file that cannot be used; the message is its path and `what` is wrong."""

    def __init__(self, path: str | os.PathLike, what: str):
        super().__init__(path, what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.args[0]} {self.what}"


class Picture(NamedTuple):
    """One picture file and what is said about it."""

    path: Path
    captions: tuple[str, ...]  # at least one, none blank, none twice
    split: str  # "train", "valid", "test" or "cell" (known concept in a held-out style)
    concept: str  # what decides the split: the file name if nothing else was given
    style: str = ""


class _Row(NamedTuple):
    """One line of a caption file, before lines of the same picture are joined."""

    where: str  # file and line, for error messages
    file_name: str
    captions: tuple[str, ...]
    split: str
    concept: str
    style: str


def assign_split(concept: str) -> str:
    """Chooses the split of a concept by its hash: 6 % test, 4 % valid, the rest train.

    u = (first 8 bytes of SHA-256, big-endian) / 2^64 is uniform in [0, 1) and the same on every
    machine, so that a concept which is held out once is held out in every style and every run.

    Args:
        concept: what the picture shows, e.g. an emoji's code points or a file name.

    Returns:
        "test", "valid" or "train".
    """
    u = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    if u < TEST_SHARE:
        return "test"
    return "valid" if u < TEST_SHARE + VALID_SHARE else "train"


def read_folder(folder: str | os.PathLike) -> list[Picture]:
    """Reads which pictures a folder holds and what their captions are; opens no picture.

    The captions come from the first of these that is there, and having both tables is an error:
    `metadata.jsonl`, one object a line with `file_name` and `text` (a string or a list of them);
    `captions.csv` with the columns `file_name,text`; or one `.txt` beside each picture, a caption
    a line. Both tables may also give `split`, `concept` and `style`, and may name a picture
    several times, once for each caption. Pictures that no caption file names are left out.

    Args:
        folder: the folder; file names in the tables are relative to it.

    Returns:
        The pictures in the order of the table, or by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"pictures must be given as a folder, got {folder}")
    tables = [folder / name for name in ("metadata.jsonl", "captions.csv")]
    tables = [table for table in tables if table.exists()]
    if len(tables) > 1:
        raise ValueError(f"{folder} must hold metadata.jsonl or captions.csv, got both")
    if not tables:
        return _join(folder, list(_read_texts(folder)))
    rows = list((_read_jsonl if tables[0].suffix == ".jsonl" else _read_csv)(tables[0]))
    if not rows:
        raise ValueError(f"{tables[0]} must name at least one picture, got none")
    return _join(folder, rows)


def find_measured(pictures: Sequence[Picture]) -> Bool[np.ndarray, " n"]:
    """Which pictures are of a style that holds any out; the other styles serve training alone.

    What those show is neither drawn nor searched where quality is measured. Of pictures that hold
    nothing out at all, all are measured.
    """
    held_out = {picture.style for picture in pictures if picture.split != "train"}
    return np.array([not held_out or picture.style in held_out for picture in pictures], bool)


def read_measured(folder: str | os.PathLike) -> list[Picture]:
    """`read_folder`, without the styles that serve training alone."""
    pictures = read_folder(folder)
    return [picture for picture, kept in zip(pictures, find_measured(pictures)) if kept]


def _join(folder: Path, rows: list[_Row]) -> list[Picture]:
    """Joins the lines of one picture and checks that every picture is there."""
    joined: dict[str, _Row] = {}
    for row in rows:
        name = os.path.normpath(row.file_name)
        before = joined.setdefault(name, row)
        if before is row:
            continue
        twice = sorted(set(before.captions) & set(row.captions))
        if twice:
            raise ValueError(f"{row.where}: duplicate of {before.where}: {name} with {twice[0]!r}")
        if before[3:] != row[3:]:
            raise ValueError(
                f"{row.where}: {name} must have the split, concept and style of {before.where}, "
                f"{before[3:]}, got {row[3:]}"
            )
        joined[name] = before._replace(captions=before.captions + row.captions)
    absent = [name for name in joined if not (folder / name).is_file()]
    if absent:
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise FileNotFoundError(
            f"{folder}: {len(absent)} of {len(joined)} captioned pictures are absent: {shown}"
        )
    pictures = []
    for name, row in joined.items():
        concept = row.concept or Path(name).as_posix()
        split = row.split or assign_split(concept)
        pictures.append(Picture(folder / name, row.captions, split, concept, row.style))
    return pictures


def _row(where: str, fields: dict) -> _Row:
    """Checks the fields of one line."""
    texts = fields.get("text")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: text must be a string or a list of strings, got {texts!r}")
    captions = tuple(text.strip() for text in texts)
    if not captions or not all(captions):
        raise ValueError(f"{where}: captions must not be empty, got {texts!r}")
    if len(set(captions)) < len(captions):
        raise ValueError(f"{where}: duplicate captions for one picture, got {texts!r}")
    others = [fields.get(key) or "" for key in ("split", "concept", "style")]
    file_name = fields.get("file_name")
    for key, value in zip(("file_name", "split", "concept", "style"), (file_name, *others)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be a string, got {value!r}")
    if not file_name:
        raise ValueError(f"{where}: file_name must not be empty")
    if others[0] not in ("", *SPLITS):
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {others[0]!r}")
    return _Row(where, file_name, captions, *others)


def _read_text(path: Path) -> str:
    """Reads UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error


def _read_jsonl(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: malformed JSON, {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be an object with file_name and text, got {line!r}")
        yield _row(where, fields)


def _read_csv(path: Path) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = reader.fieldnames
        if not header:
            raise ValueError(f"{path} must start with the header file_name,text, got an empty file")
        if not {"file_name", "text"} <= set(header):
            raise ValueError(
                f"{path} must start with the header file_name,text, got {','.join(header)}"
            )
        for fields in reader:
            where = f"{path} line {reader.line_num}"
            if None in fields or None in fields.values():
                raise ValueError(
                    f"{where}: must have {len(header)} columns ({','.join(header)}); a caption "
                    "that holds a comma must be in double quotes"
                )
            yield _row(where, fields)
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.reader.line_num}: malformed CSV, {error}") from error


def _read_texts(folder: Path) -> Iterator[_Row]:
    """One .txt beside each picture, in sub-folders as well."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} must hold pictures ({', '.join(SUFFIXES)}), got none")
    captioned = [path for path in paths if path.with_suffix(".txt").is_file()]
    if not captioned:
        raise ValueError(
            f"{folder} holds {len(paths)} pictures but no captions: needs metadata.jsonl, "
            "captions.csv or one .txt beside each picture"
        )
    left_out = len(paths) - len(captioned)
    if left_out:
        logging.warning("%s: left out %d pictures that have no .txt", folder, left_out)
    for path in captioned:
        text = path.with_suffix(".txt")
        lines = [line for line in _read_text(text).splitlines() if line.strip()]
        yield _row(str(text), dict(file_name=str(path.relative_to(folder)), text=lines))


def load_picture(path: str | os.PathLike, size: int = 128) -> UInt8[np.ndarray, "size size 3"]:
    """Loads one picture as the VAE wants it: upright, square, RGB.

    Turned as its EXIF orientation says, transparency composited on white, centre-cropped to a
    square and resampled with a Lanczos filter. 16-bit, CMYK, grey and palette pictures become 8-bit
    RGB; of an animation the first frame counts. Colour profiles are not applied.

    Args:
        path: the picture file, any format that Pillow reads.
        size: side of the result in pixels.

    Returns:
        The picture, 0 to 255.

    Raises:
        PictureError: the file is not a picture, is broken, or is smaller than 8 pixels.
        PIL.Image.DecompressionBombError: the picture is so large that Pillow refuses it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            rgb = _to_rgb(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError as error:
        raise Image.DecompressionBombError(f"{path}: {error}") from error
    except Exception as error:  # A broken file raises nearly anything, by its format.
        raise PictureError(path, f"cannot be read as a picture: {error}") from error
    width, height = rgb.size
    side = min(width, height)
    if side < MIN_SIDE:
        what = f"must be at least {MIN_SIDE} pixels wide and high, got {width}x{height}"
        raise PictureError(path, what)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    square = rgb.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.array(square, dtype=np.uint8)


def _to_rgb(picture):
    """A Pillow image of any mode => the same in 8-bit RGB on white."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pictures have no defined white, save it with 8 or 16 bits")
        values = values.astype(np.int64)
        picture = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
