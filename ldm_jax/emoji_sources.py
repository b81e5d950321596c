"""Emoji packages => names, and the SVG document or file that each picture is drawn from."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldm_jax.emoji_names import (
    BORROWED_FLAGS,
    get_concept,
    get_name,
    get_skin_tones,
    normalise_key,
    slugify,
)
from ldm_jax.emoji_styles import STYLES, Style
from ldm_jax.npm import fetch_package

SIZE = 128
NAMES = ("emojibase-data", "17.0.0")
COMPONENTS = 2  # emojibase's group of skin tones and hair; regional indicators have no group.


# Packages that map code points to icon names, for the packages that do not.
NAME_GUIDES = ("twemoji", "noto", "fluent-flat")
OLD_ICON_NAMES = {"1f199": ("up-exclamation-button", "up-text-button"), "1f635": ("dizzy-face",)}
# Fluent 3D's package gives each of these two skin tones the other's pictures, but of technologists,
# couples and people holding hands.
SWAPPED_TONES = {"1f3fc": "1f3fd", "1f3fd": "1f3fc"}
NOT_SWAPPED = {"1f9d1-200d-1f4bb", "1f46c", "1f48f", "1f491"}
REDRAWN = {"1f52b"}  # A revolver in the old sets, a water pistol by its name today.


class Emoji(NamedTuple):
    """One emoji, whatever its style."""

    key: str  # code points, see normalise_key
    name: str  # caption
    label: str  # CLDR short name


def load_emoji() -> list[Emoji]:
    """The emoji of the Unicode standard.

    Left out: skin tones, components, regional indicator letters, and the flags of territories
    that fly another emoji's flag.
    """
    emoji = []
    for entry in _load_catalogue():
        key = normalise_key(entry["hexcode"])
        if entry.get("group", COMPONENTS) != COMPONENTS and key not in BORROWED_FLAGS:
            emoji.append(Emoji(key, get_name(key, entry["label"]), entry["label"]))
    return emoji


def load_toned_emoji() -> list[Emoji]:
    """The emoji of the Unicode standard with a skin tone: "waving hand: medium skin tone".

    Left out: two people of different tones.
    """
    emoji = []
    for entry in _load_catalogue():
        name = get_name(normalise_key(entry["hexcode"]), entry["label"])
        for skin in entry.get("skins", ()):
            key = normalise_key(skin["hexcode"])
            tone, *others = get_skin_tones(key)
            if not others:
                emoji.append(Emoji(key, f"{name}: {tone}", skin["label"]))
    return emoji


def _load_catalogue() -> list[dict]:
    path = fetch_package(*NAMES) / "en" / "data.json"
    return json.loads(path.read_text(encoding="utf-8"))


def get_sources(style: Style, emoji: Sequence[Emoji]) -> dict[str, str | Path]:
    """Where each emoji's picture of one style comes from.

    Returns:
        For each key that the style draws, an SVG document or the path of a picture file.
    """
    package = fetch_package(style.package, style.version)
    assets = package / "assets"
    if assets.is_dir():
        files = {normalise_key(path.stem): path for path in sorted(assets.iterdir())}
        names = {e.key: _get_asset_key(e.key) for e in emoji}
        return {key: files[name] for key, name in names.items() if name in files}
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    names = _load_chars(package)
    if style.key == "fxemoji":  # Named by its own words for code points: looked at one by one.
        names = json.loads(Path(__file__).with_name("fxemoji.json").read_text(encoding="utf-8"))
    names = names or _match_names(icons, emoji, numbered=style.key == "streamline")
    return {e.key: _get_svg(icons, names[e.key]) for e in emoji if e.key in names}


def _get_asset_key(key: str) -> str:
    if get_concept(key) in NOT_SWAPPED:
        return key
    return "-".join(SWAPPED_TONES.get(part, part) for part in key.split("-"))


def _load_chars(package: Path) -> dict[str, str]:
    """Code points => icon name, as the package says; empty where it does not."""
    path = package / "chars.json"
    chars = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {normalise_key(hexcode): name for hexcode, name in chars.items()}


def _match_names(icons: dict, emoji: Sequence[Emoji], numbered: bool = False) -> dict[str, str]:
    """Code points => icon name by likeness of name: the CLDR label, or another set's icon name."""
    emoji = [e for e in emoji if e.key not in REDRAWN]
    guesses = {e.key: [slugify(e.label)] for e in emoji}
    for e in emoji:
        guesses[e.key] += OLD_ICON_NAMES.get(e.key, ())
        if e.label.startswith("flag: "):
            guesses[e.key].append(f"flag-for-{slugify(e.label.removeprefix('flag: '))}")
    for guide in NAME_GUIDES:
        package = fetch_package(STYLES[guide].package, STYLES[guide].version)
        aliases = json.loads((package / "icons.json").read_text(encoding="utf-8"))["aliases"]
        also = defaultdict(list)
        for alias, change in aliases.items():
            if set(change) == {"parent"}:
                also[change["parent"]].append(alias)
        for key, name in _load_chars(package).items():
            root = aliases.get(name, {}).get("parent", name)
            guesses.get(key, []).extend([name, root, *also[root]])
    if numbered:  # "cook-1" is yellow, "cook-2" is not; flags go by their country's name alone.
        flags = {e.key: [slugify(e.label[6:])] for e in emoji if e.label.startswith("flag: ")}
        for key, known in guesses.items():
            known += [f"{name}-1" for name in known] + [f"{name}-face" for name in known]
            known += [f"{name}-1" for name in known if name.endswith("-face")]
            known += flags.get(key, [])
    # An icon under its own name beats the same icon under an alias: cricket game, cricket.
    taken = {name for names in guesses.values() for name in names if name in icons["icons"]}
    matches = {}
    for key, names in guesses.items():
        own = [name for name in names if name in icons["icons"]]
        by_alias = [
            name
            for name in names
            if name in icons.get("aliases", {}) and icons["aliases"][name]["parent"] not in taken
        ]
        if own or by_alias:
            matches[key] = (own or by_alias)[0]
    return matches


def _get_svg(icons: dict, name: str) -> str:
    """One icon of an iconify set as an SVG document of SIZE x SIZE, aliases and flips resolved."""
    flip = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        name, flip = alias["parent"], flip != alias.get("hFlip", False)
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}">{body}</svg>'
    )
