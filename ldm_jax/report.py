"""Figures of pictures, by group and source => a table, a JSON file, scalars of a log, a sheet."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ldm_jax.metrics import Estimate
from ldm_jax.plotting import Pairs, compose_pairs, save_png
from ldm_jax.quality import GROUPS, Exam

Report = Mapping[str, Mapping[str, Mapping[str, Any]]]  # [split][source][figure]
SHOWN = 16  # pictures of each group on a contact sheet


FIGURES = {  # key: heading, how a number is written
    "kid": ("KID x1000", "{:.1f}"),
    "frechet": ("FD", "{:.1f}"),
    "recall_1": ("R@1", "{:.2f}"),
    "recall_5": ("R@5", "{:.2f}"),
    "right_style": ("style", "{:.2f}"),
    "near_copies": ("near copies", "{:.3f}"),
    "alignment": ("alignment", "{:.3f}"),
    "caption_1": ("caption R@1", "{:.2f}"),
    "caption_5": ("caption R@5", "{:.2f}"),
    "clip_score": ("CLIP score", "{:.1f}"),
}


def format_table(report: Mapping[str, Mapping[str, Mapping]], intervals: bool = True) -> str:
    """The report as a Markdown table, one line for each source of each group."""
    lines = [(split, source, f) for split, by in report.items() for source, f in by.items()]
    keys = [key for key in FIGURES if any(key in figures for *_, figures in lines)]
    table = [["captions", "pictures", "n", *(FIGURES[key][0] for key in keys)]]
    for split, source, figures in lines:
        title = GROUPS[split].partition(":")[0]
        cells = [_write(figures.get(key), FIGURES[key][1], intervals) for key in keys]
        table.append([title, source, str(figures["n"]), *cells])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in table
    )


def flatten(report: Mapping[str, Mapping[str, Mapping]]) -> dict[str, float]:
    """The values of the drawn pictures, for a log: "quality/<group>/<figure>"."""
    return {
        f"quality/{split}/{key}": figure.value if isinstance(figure, Estimate) else float(figure)
        for split, by_source in report.items()
        for key, figure in by_source["drawn"].items()
        if key != "n"
    }


def _write(figure: Any, form: str, intervals: bool) -> str:
    if figure is None:
        return "-"
    parts = figure if isinstance(figure, Estimate) else (figure,)
    value, *ends = (re.sub(r"^-(0\.0+)$", r"\1", form.format(x)) for x in parts)
    if not ends:
        return value
    low, high = ends
    return f"{value} [{low}, {high}]" if intervals else value


def to_json(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as JSON holds them, an interval as {"value", "low", "high"}."""
    return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in figures.items()}


def from_json(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_json` was given."""
    return {k: Estimate(**v) if isinstance(v, dict) else v for k, v in figures.items()}


def save_report(path: str | Path, report: Report, settings: Mapping[str, Any]) -> None:
    """Writes settings and figures as JSON, see `to_json`."""
    groups = {
        split: {source: to_json(figures) for source, figures in by_source.items()}
        for split, by_source in report.items()
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**settings, "groups": groups}, indent=1) + "\n")


def save_sheet(
    path: str | Path,
    exam: Exam,
    drawn: Mapping[str, UInt8[np.ndarray, "n H W 3"]],
    settings: Mapping[str, Any],
) -> None:
    """Writes the first SHOWN drawn pictures of each group beside the real ones as one PNG."""
    shown = slice(SHOWN)
    pairs = [
        Pairs(GROUPS[split], exam.captions(split)[shown], images[shown], exam.real[split][shown])
        for split, images in drawn.items()
    ]
    save_png(path, compose_pairs(pairs), {key: str(value) for key, value in settings.items()})
