"""Points of curves, each a group of captions drawn with some settings => a JSON file, and back."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMING = ("checkpoint", "step", "ema", "vae")  # Told, not compared: digests of weights decide.


def get_key(group: str, settings: Mapping[str, Any]) -> str:
    """Names a point in the file."""
    return json.dumps([group, settings], sort_keys=True)


def load_points(path: Path, told: Mapping[str, Any]) -> dict[str, dict]:
    """The points of a file, by `get_key`; none if there is no file.

    Raises:
        ValueError: if it belongs to other weights, captions, features or another seed.
    """
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text())
        points = {get_key(p["group"], p["sampling"]): p for p in saved.pop("points")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of this script: {error!r}") from error
    wrong = [
        f"{key} is {saved.get(key)!r} there, {told.get(key)!r} here"
        for key in dict.fromkeys([*told, *saved])
        if key not in NAMING and saved.get(key) != told.get(key)
    ]
    if wrong:
        raise ValueError(
            f"{path} holds points of another exam, of checkpoint {saved.get('checkpoint')!r}, step "
            f"{saved.get('step')!r}: {'; '.join(wrong)}. Choose another --out"
        )
    return points


def save_points(path: Path, told: Mapping[str, Any], points: Mapping[str, dict]) -> None:
    """Writes the file anew, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**told, "points": list(points.values())}, indent=1) + "\n")
    os.replace(part, path)
