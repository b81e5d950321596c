"""Emoji sets from npm packages => a folder of 128x128 pictures on white with metadata.jsonl."""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ldm_jax.cores import count_cores
from ldm_jax.emoji_names import FAMILY, count_genders, get_concept, get_skin_tones
from ldm_jax.emoji_sources import (
    NAMES,
    SIZE,
    Emoji,
    get_sources,
    load_emoji,
    load_toned_emoji,
)
from ldm_jax.emoji_styles import DEFAULT_STYLES, STYLES, Style
from ldm_jax.features import get_thumbnails
from ldm_jax.metrics import nearest_rms
from ldm_jax.pictures import assign_split, load_picture

CELL_SHARE = 0.05
TWIN = 0.03  # RMS difference of two thumbnails, of a pixel's range, below which they show the same.
TONED = ", skin tones"  # ends the stamp of what was drawn with them
LAYOUT = 1  # Raise it when the drawing changes, so that old pictures are drawn again.
MANY = 200  # Fewer pictures than this are drawn without starting other processes.


def draw_emoji(
    folder: str | Path,
    styles: Sequence[str] = DEFAULT_STYLES,
    progress: bool = True,
    skin_tones: bool = False,
) -> Path:
    """Draws emoji pictures with captions and splits into a folder, once.

    A finished folder is returned as it is; an interrupted one is finished. A concept (an emoji
    without skin tone and gender) has one split in all styles; of the training concepts 5 % of the
    (style, concept) cells are split "cell": the concept is known, this style of it is not. A style
    that is not measured serves training alone: it holds nothing out, and of its pictures those of
    held-out concepts and near twins of held-out pictures are left out.

    Args:
        folder: made if need be; holds <style>/<code points>.png, metadata.jsonl and CREDITS.md.
        styles: keys of STYLES.
        progress: whether to show a bar for each style.
        skin_tones: whether training also gets the pictures that have one of the five skin tones,
            of its (style, concept) cells alone. The other splits do not depend on it.

    Returns:
        The folder.

    Raises:
        ValueError: if a style is unknown.
        RuntimeError: if a package cannot be fetched, or gives too few pictures.
        OSError: if the folder cannot be written, or was drawn with the other `skin_tones`.
    """
    unknown = [key for key in styles if key not in STYLES]
    if unknown or not styles:
        raise ValueError(f"styles must be some of {', '.join(STYLES)}, got {list(styles)}")
    folder = Path(folder)
    chosen = [STYLES[key] for key in dict.fromkeys(styles)]
    stamps = {style.key: _get_stamp(style, skin_tones) for style in chosen}
    seal = folder / "drawn.json"
    if (
        seal.exists()
        and json.loads(seal.read_text()) == stamps
        and all((folder / style.key).is_dir() for style in chosen)
    ):
        return folder
    if find_spec("resvg_py") is None:
        raise RuntimeError("drawing emoji needs resvg-py: `pip install resvg-py`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        seal.unlink(missing_ok=True)
        drawn = [_draw_style(folder, style, progress, skin_tones) for style in chosen]
        records = _leave_out(folder, [record for of_style in drawn for record in of_style])
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        _write(folder / "metadata.jsonl", lines.encode())
        _write(folder / "CREDITS.md", get_credits(chosen).encode())
        _write(seal, json.dumps(stamps, indent=1).encode())
    except OSError as error:
        why = f"emoji cannot be drawn into {folder}: {error.strerror or error}"
        raise OSError(error.errno, why, error.filename) from error
    return folder


def get_credits(styles: Sequence[Style]) -> str:
    """The credit lines that the pictures' licences ask for, as Markdown."""
    lines = [
        f"- {style.key}: {style.credit}; {style.licence}; npm {style.package} "
        f"{style.version}. Drawn at {SIZE}x{SIZE} on white."
        for style in styles
    ]
    names = f"- names: Unicode CLDR, through npm {NAMES[0]} {NAMES[1]} (MIT)."
    return "\n".join(["# Credits of these pictures", "", *lines, names, ""])


def assign_cell(style: str, concept: str) -> str:
    """The split of one style of a concept: the concept's own, or "cell" for 5 % of training's."""
    split = assign_split(concept)
    digest = hashlib.sha256(f"{style}/{concept}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    return "cell" if split == "train" and u < CELL_SHARE else split


def _leave_out(folder: Path, records: list[dict]) -> list[dict]:
    """Without what styles that serve training alone would show of what is held out."""
    alone = {style.key for style in STYLES.values() if not style.measured}
    known = [r for r in records if r["style"] not in alone or r["split"] == "train"]
    held_out = [r for r in known if r["split"] != "train"]
    extra = [r for r in known if r["style"] in alone]
    if not held_out or not extra:
        return known
    thumbnails = (_load_thumbnails(folder, group) for group in (extra, held_out))
    twin = nearest_rms(*thumbnails) < 255 * TWIN
    left_out = {r["file_name"] for r, is_twin in zip(extra, twin) if is_twin}
    return [r for r in known if r["file_name"] not in left_out]


def _load_thumbnails(folder: Path, records: list[dict]):
    return get_thumbnails(np.stack([load_picture(folder / r["file_name"]) for r in records]))


# One style: sources, pictures, records.
def _get_stamp(style: Style, skin_tones: bool) -> str:
    stamp = f"{style.package}@{style.version}, {NAMES[0]}@{NAMES[1]}, layout {LAYOUT}"
    return stamp + TONED if skin_tones else stamp


def _draw_style(folder: Path, style: Style, progress: bool, skin_tones: bool) -> list[dict]:
    """Draws one style next to its place and moves it there when it is whole."""
    target, stamp = folder / style.key, _get_stamp(style, skin_tones)
    seal = target / "drawn.json"
    if seal.exists():
        drawn = json.loads(seal.read_text(encoding="utf-8"))
        if drawn["stamp"] == stamp:
            return drawn["records"]
        if drawn["stamp"].endswith(TONED) != skin_tones:
            why = f"name another folder, this one was drawn with skin_tones={not skin_tones}"
            raise FileExistsError(errno.EEXIST, why, str(target))
    elif target.exists():
        raise FileExistsError(errno.EEXIST, "move away what draw_emoji did not draw", str(target))
    emoji = load_emoji()
    toned = [
        e
        for e in (load_toned_emoji() if skin_tones else ())
        if _get_split(style, get_concept(e.key)) == "train"
    ]
    # Apart, since sets are matched by names, and the match of one depends on the others.
    sources = get_sources(style, emoji) | get_sources(style, toned)
    part = folder / f".{style.key}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}.part"
    part.mkdir(exist_ok=True)
    skipped = _draw_pictures(style, part, sources, progress)
    made = sources.keys() - skipped.keys()
    kept = _choose(part, *([e for e in group if e.key in made] for group in (emoji, toned)))
    plain = sum(not get_skin_tones(e.key) for e in kept)
    if plain < style.fewest:
        raise RuntimeError(
            f"{style.package} {style.version} must give at least {style.fewest} "
            f"pictures, got {plain} ({len(skipped)} could not be drawn)"
        )
    records = [_get_record(style, e) for e in kept]
    drawn = {"stamp": stamp, "skipped": skipped, "records": records}
    _write(part / "drawn.json", json.dumps(drawn, ensure_ascii=False).encode())
    for leftover in part.glob(".*.png.*"):  # of a write that was cut off
        leftover.unlink()
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
    return records


def _get_record(style: Style, emoji: Emoji) -> dict:
    concept = get_concept(emoji.key)
    return {
        "file_name": f"{style.key}/{emoji.key}.png",
        "text": [f"{emoji.name}, {style.phrase}", emoji.name],
        "split": _get_split(style, concept),
        "concept": concept,
        "style": style.key,
    }


def _get_split(style: Style, concept: str) -> str:
    return assign_cell(style.key, concept) if style.measured else assign_split(concept)


def _draw_pictures(
    style: Style, part: Path, sources: dict[str, str | Path], progress: bool
) -> dict[str, str]:
    """Draws what is not there yet; returns what could not be drawn, and why."""
    from tqdm import tqdm

    jobs = [
        (source, part / f"{key}.png")
        for key, source in sources.items()
        if not (part / f"{key}.png").exists()
    ]
    bar = tqdm(
        total=len(sources),
        initial=len(sources) - len(jobs),
        desc=f"drawing {style.key}",
        unit="picture",
        disable=not progress,
    )
    skipped = {}
    with bar:
        for (_, path), fault in zip(jobs, _run(jobs), strict=True):
            bar.update()
            if fault:
                skipped[path.stem] = fault
    if skipped:
        named = "; ".join(f"{key}: {fault}" for key, fault in skipped.items())
        warnings.warn(f"{len(skipped)} {style.key} pictures skipped: {named}", stacklevel=4)
    return skipped


def _run(jobs: list[tuple[str | Path, Path]]) -> Iterator[str]:
    """Runs draw_picture over all jobs in order, on all cores where that pays."""
    cores = min(count_cores(), 16)
    if cores == 1 or len(jobs) < MANY:
        yield from map(draw_picture, jobs)
        return
    try:
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
            yield from pool.map(draw_picture, jobs, chunksize=16)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "the drawing processes died; a script that draws emoji needs its call "
            "under `if __name__ == '__main__':`"
        ) from error


def draw_picture(job: tuple[str | Path, Path]) -> str:
    """Draws one SVG document or picture file on white and writes it as PNG.

    Args:
        job: the source, as `get_sources` gives it, and the path to write.

    Returns:
        What went wrong, empty if nothing.
    """
    import io

    from PIL import Image

    source, path = job
    try:
        if isinstance(source, str):
            import resvg_py

            source = io.BytesIO(resvg_py.svg_to_bytes(svg_string=source, skip_system_fonts=True))
        with Image.open(source) as opened:
            picture = opened.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
        picture = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    except (OSError, ValueError) as error:
        return str(error)
    if picture.convert("L").getextrema() == (255, 255):
        return "blank"
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    _write(path, encoded.getvalue())
    return ""


def _choose(part: Path, emoji: Sequence[Emoji], toned: Sequence[Emoji]) -> list[Emoji]:
    """Keeps one emoji of each picture, the simplest, and no grey family sign; drops the rest.

    Of the toned ones none is kept whose picture an emoji without a tone has.
    """
    by_picture = _group_by_picture(part, toned) | _group_by_picture(part, emoji)
    kept = {
        min(same, key=lambda e: (e.key.count("-"), count_genders(e.key), len(e.name)))
        for same in by_picture.values()
    }
    for e in (*emoji, *toned):
        if e not in kept:
            (part / f"{e.key}.png").unlink()
    return [e for e in (*emoji, *toned) if e in kept]


def _group_by_picture(part: Path, emoji: Sequence[Emoji]) -> dict[bytes, list[Emoji]]:
    by_picture = defaultdict(list)
    for e in emoji:
        path = part / f"{e.key}.png"
        if get_concept(e.key) != FAMILY or not _is_grey(path):
            by_picture[hashlib.sha256(path.read_bytes()).digest()].append(e)
    return by_picture


def _is_grey(path: Path) -> bool:
    from PIL import Image

    with Image.open(path) as picture:
        colours = np.asarray(picture, np.int16)
    return bool(np.ptp(colours, axis=-1).max() < 32)


def _write(path: Path, content: bytes):
    """Writes a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    os.replace(scratch, path)
