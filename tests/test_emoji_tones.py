"""Drawing emoji with skin tones, on packages made up here."""

import json
from pathlib import Path

import pytest
from test_emoji import CATALOGUE, CHARS, ICONS, packages, read_records, write_icons  # noqa: F401

from ldm_jax import emoji
from ldm_jax.emoji import draw_emoji
from ldm_jax.emoji_sources import Emoji, get_sources, load_toned_emoji
from ldm_jax.emoji_styles import STYLES

CODES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
HAND, WOMAN, PAIR = "1f44b", "1f469-200d-1f9b0", "1f46b"
SPLITS = {"1f44b": "train", "1f9d1-200d-1f9b0": "cell", "1f46c": "test"}  # by concept


@pytest.fixture
def toned(packages, monkeypatch):  # noqa: F811
    """Three more emoji with skin tones: of a training concept, of a cell and of a test concept."""
    hand = {"hexcode": "1F44B", "label": "waving hand", "group": 1}
    hand["skins"] = [{"hexcode": f"1F44B-{c}", "label": f"waving hand: {c}"} for c in CODES]
    woman = {"hexcode": "1F469-200D-1F9B0", "label": "woman: red hair", "group": 1}
    woman["skins"] = [
        {"hexcode": "1F469-1F3FD-200D-1F9B0", "label": "woman: medium skin tone, red hair"}
    ]
    pair = {"hexcode": "1F46B", "label": "woman and man holding hands", "group": 1}
    pair["skins"] = [
        {"hexcode": "1F46B-1F3FE", "label": "holding hands: medium-dark skin tone"},
        {"hexcode": "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF", "label": "light, dark skin tone"},
    ]
    catalogue = [*CATALOGUE, hand, woman, pair]
    (packages / "emojibase-data" / "en" / "data.json").write_text(json.dumps(catalogue))
    keys = [e.key for e in load_toned_emoji()] + [HAND, WOMAN, PAIR]
    icons = {
        f"i{i}": f'<circle cx="8" cy="8" r="8" fill="#{i:02}{i:02}50"/>' for i in range(len(keys))
    }
    icons[f"i{keys.index('1f44b-1f3ff')}"] = icons[f"i{keys.index(HAND)}"]  # a set without it
    chars = {key: f"i{i}" for i, key in enumerate(keys)}
    flip = {"right": {"parent": "left", "hFlip": True}}
    write_icons(packages / "@iconify-json-twemoji", ICONS | icons, CHARS | chars, flip)
    monkeypatch.setattr(emoji, "assign_cell", lambda style, concept: SPLITS.get(concept, "valid"))
    return packages


def test_toned_emoji_are_named_by_cldr_and_pairs_have_one_tone(toned):
    names = {e.key: e.name for e in load_toned_emoji()}
    assert names["1f44b-1f3fc"] == "waving hand: medium-light skin tone"
    assert names["1f469-1f3fd-200d-1f9b0"] == "woman with red hair: medium skin tone"
    assert names["1f46b-1f3fe"] == "woman and man holding hands: medium-dark skin tone"
    assert len(names) == 8  # Five hands, a face, a woman and a pair.


def test_training_alone_gets_tones_and_nothing_else_changes(toned, tmp_path):
    plain, with_tones = (
        read_records(draw_emoji(tmp_path / str(tones), ["twemoji"], False, skin_tones=tones))
        for tones in (False, True)
    )
    assert {f"twemoji/{key}.png" for key in (HAND, WOMAN, PAIR)} <= plain.keys()
    assert {file: with_tones[file] for file in plain} == plain
    added = {file: with_tones[file] for file in with_tones if file not in plain}
    # Not the dark one, which is drawn as the one without a tone is.
    assert sorted(added) == [f"twemoji/{HAND}-{code.lower()}.png" for code in CODES[:4]]
    assert added["twemoji/1f44b-1f3fd.png"] == {
        "file_name": "twemoji/1f44b-1f3fd.png",
        "text": ["waving hand: medium skin tone, Twemoji", "waving hand: medium skin tone"],
        "split": "train",
        "concept": HAND,
        "style": "twemoji",
    }
    assert {p.stem for p in (tmp_path / "True" / "twemoji").glob("*.png")} == {
        file.split("/")[1].removesuffix(".png") for file in with_tones
    }
    for file in plain:
        assert (tmp_path / "True" / file).read_bytes() == (tmp_path / "False" / file).read_bytes()


def test_tones_that_a_package_swaps_are_swapped_back(toned):
    assets = toned / "@lobehub-fluent-emoji-3d" / "assets"
    keys = ["1f44b", "1f44b-1f3fb", "1f44b-1f3fc", "1f44b-1f3fd", "1f491-1f3fc", "1f491-1f3fd"]
    for key in keys:
        (assets / f"{key}.webp").touch()
    sources = get_sources(STYLES["fluent-3d"], [Emoji(key, "", "") for key in keys])
    assert list(sources) == keys
    found = [Path(source).stem for source in sources.values()]
    assert found == [*keys[:2], "1f44b-1f3fd", "1f44b-1f3fc", *keys[4:]]


def test_a_folder_holds_one_setting_and_is_not_overwritten_by_the_other(toned, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], False, skin_tones=True)
    before = (folder / "metadata.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="another folder, .* drawn with skin_tones=True"):
        draw_emoji(folder, ["twemoji"], False)
    draw_emoji(folder, ["twemoji"], False, skin_tones=True)
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_tones_do_not_make_up_for_pictures_that_are_missing(toned, tmp_path, monkeypatch):
    fewest = len(read_records(draw_emoji(tmp_path / "plain", ["twemoji"], False))) + 1
    monkeypatch.setitem(emoji.STYLES, "twemoji", emoji.STYLES["twemoji"]._replace(fewest=fewest))
    with pytest.raises(RuntimeError, match=f"at least {fewest} pictures, got {fewest - 1} "):
        draw_emoji(tmp_path / "emoji", ["twemoji"], False, skin_tones=True)
