"""Drawing emoji, on packages made up here."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm_jax import emoji, emoji_sources
from ldm_jax.emoji import draw_emoji, draw_picture, get_credits

RED = '<rect width="16" height="16" fill="#ff0000"/>'
BLUE = '<rect width="16" height="16" fill="#0000ff"/>'
GREEN = '<rect width="16" height="16" fill="#00ff00"/>'
GREY = '<rect width="16" height="16" fill="#808080"/>'
LEFT_HALF = '<rect width="8" height="16" fill="#ff0000"/>'
CATALOGUE = [
    {
        "hexcode": "1F600",
        "label": "grinning face",
        "group": 0,
        "skins": [{"hexcode": "1F600-1F3FB", "label": "grinning face: light skin tone"}],
    },
    {"hexcode": "0031-FE0F-20E3", "label": "keycap: 1", "group": 8},
    {"hexcode": "1F1E8-1F1F3", "label": "flag: China", "group": 9},
    {"hexcode": "1F1E7-1F1FB", "label": "flag: Bouvet Island", "group": 9},
    {"hexcode": "1F997", "label": "cricket", "group": 3},
    {"hexcode": "1F3CF", "label": "cricket game", "group": 6},
    {"hexcode": "1F468-200D-1F466", "label": "family: man, boy", "group": 1},
    {"hexcode": "1F449", "label": "backhand index pointing right", "group": 1},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
]
CHARS = {
    "1f600": "grin",
    "1f600-1f3fb": "grin-light",
    "0031-20e3": "one",
    "1f1e8-1f1f3": "cn",
    "1f997": "cricket",
    "1f468-200d-1f466": "fam",
    "1f449": "right",
    "1f1e6": "letter-a",
    "1f1e7-1f1fb": "bv",
    "1f3fb": "tone",
}
ICONS = {
    "grin": RED,
    "grin-light": GREY,
    "one": BLUE,
    "cn": RED,
    "cricket": GREEN,
    "fam": GREY,
    "left": LEFT_HALF,
    "letter-a": GREEN,
    "bv": GREEN,
    "tone": GREEN,
}


def write_icons(folder: Path, icons: dict, chars: dict, aliases: dict):
    folder.mkdir(parents=True, exist_ok=True)
    bodies = {name: {"body": body} for name, body in icons.items()}
    (folder / "icons.json").write_text(
        json.dumps({"icons": bodies, "aliases": aliases, "width": 16, "height": 16})
    )
    (folder / "chars.json").write_text(json.dumps(chars))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A tree of small packages in place of npm's; one icon set by code points, one by names."""
    root = tmp_path / "packages"

    def fetch(package, version):
        return root / package.replace("/", "-")

    flip = {"right": {"parent": "left", "hFlip": True}}
    for guide in ("twemoji", "noto", "fluent-emoji-flat"):
        write_icons(root / f"@iconify-json-{guide}", ICONS, CHARS, flip)
    write_icons(
        root / "@iconify-json-emojione",
        {"grinning-face": RED, "flag-for-china": BLUE, "cricket-game": GREEN},
        {},
        {"cricket": {"parent": "cricket-game"}},
    )
    (root / "emojibase-data" / "en").mkdir(parents=True)
    (root / "emojibase-data" / "en" / "data.json").write_text(json.dumps(CATALOGUE))
    assets = root / "@lobehub-fluent-emoji-3d" / "assets"
    assets.mkdir(parents=True)
    for name in ("1f600", "0031-fe0f-20e3"):
        half = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
        half.paste((0, 0, 255, 255), (0, 0, 128 + 10 * len(name), 256))
        half.save(assets / f"{name}.webp", lossless=True)
    monkeypatch.setattr(emoji_sources, "fetch_package", fetch)
    for key, style in list(emoji.STYLES.items()):
        monkeypatch.setitem(emoji.STYLES, key, style._replace(fewest=1))
    return root


def read_records(folder):
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["file_name"]: record for record in map(json.loads, lines)}


def get_pixel(path, x, y):
    with Image.open(path) as picture:
        assert picture.mode == "RGB" and picture.size == (128, 128)
        return picture.getpixel((x, y))


def test_drawing_gives_pictures_captions_and_credits(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    records = read_records(folder)
    assert sorted(p.name for p in (folder / "twemoji").glob("*.png")) == sorted(
        Path(name).name for name in records
    )
    flag_or_face = records["twemoji/1f600.png"]  # the red flag is the same picture and goes
    assert flag_or_face["text"] == ["grinning face, Twemoji", "grinning face"]
    assert flag_or_face["concept"] == "1f600" and flag_or_face["style"] == "twemoji"
    assert records["twemoji/31-20e3.png"]["text"][1] == "keycap 1"
    assert get_pixel(folder / "twemoji" / "1f600.png", 64, 64) == (255, 0, 0)
    assert "CC-BY-4.0" in (folder / "CREDITS.md").read_text()
    assert all(
        style.credit in get_credits(list(emoji.STYLES.values())) for style in emoji.STYLES.values()
    )


def test_tones_components_letters_twins_and_grey_families_are_left_out(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    assert {Path(name).stem for name in read_records(folder)} == {
        "1f600",
        "31-20e3",
        "1f997",
        "1f449",
    }


def test_a_flipped_alias_is_drawn_mirrored(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    hand = folder / "twemoji" / "1f449.png"
    assert get_pixel(hand, 20, 64) == (255, 255, 255) and get_pixel(hand, 108, 64) == (255, 0, 0)


def test_sets_without_code_points_are_matched_by_name(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["emojione"], progress=False)
    names = {Path(name).stem: record["text"][0] for name, record in read_records(folder).items()}
    assert names == {
        "1f600": "grinning face, EmojiOne",
        "1f1e8-1f1f3": "flag of China, EmojiOne",
        "1f3cf": "cricket game, EmojiOne",
    }


def test_transparent_files_come_out_on_white(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["fluent-3d"], progress=False)
    assert set(read_records(folder)) == {"fluent-3d/1f600.png", "fluent-3d/31-20e3.png"}
    assert get_pixel(folder / "fluent-3d" / "1f600.png", 120, 5) == (255, 255, 255)
    assert get_pixel(folder / "fluent-3d" / "1f600.png", 5, 5) == (0, 0, 255)


def test_a_style_that_serves_training_alone_shows_nothing_that_is_held_out(
    packages, tmp_path, monkeypatch
):
    """The hand is held out; the red face is so in Twemoji alone, as a cell."""
    split = {"1f449": "test"}
    monkeypatch.setattr(emoji, "assign_split", lambda concept: split.get(concept, "train"))
    monkeypatch.setattr(
        emoji, "assign_cell", lambda _, c: "cell" if c == "1f600" else split.get(c, "train")
    )
    icons = {"grin": BLUE, "one": RED, "cricket": GREEN, "left": GREY}
    chars = {key: name for key, name in CHARS.items() if name in icons} | {"1f449": "left"}
    write_icons(packages / "@iconify-json-fluent-emoji", icons, chars, {})
    both = ["twemoji", "fluent-color"]
    records = read_records(draw_emoji(tmp_path / "emoji", both, progress=False))
    splits = {name: record["split"] for name, record in records.items()}
    assert splits["twemoji/1f600.png"] == "cell" and splits["twemoji/1f449.png"] == "test"
    # No hand, and no keycap, which is as red as the face.
    extra = {name: split for name, split in splits.items() if name.startswith("fluent-color")}
    assert extra == {"fluent-color/1f600.png": "train", "fluent-color/1f997.png": "train"}
    alone = draw_emoji(tmp_path / "alone", both[1:], progress=False)
    assert set(read_records(alone)) == {*extra, "fluent-color/31-20e3.png"}


def test_firefox_os_and_streamline_are_matched_by_their_own_names(packages, tmp_path):
    icons = {"right": RED, "chineseflag": GREEN}  # All of CATALOGUE that the set draws.
    write_icons(packages / "@iconify-json-fxemoji", icons, {}, {})
    numbered = {"grinning-face-1": RED, "grinning-face-2": GREY, "china": BLUE}
    write_icons(packages / "@iconify-json-streamline-emojis", numbered, {}, {})
    folder = draw_emoji(tmp_path / "emoji", ["fxemoji", "streamline"], progress=False)
    names = {name: record["text"][1] for name, record in read_records(folder).items()}
    assert names["streamline/1f600.png"] == "grinning face"
    assert get_pixel(folder / "streamline" / "1f600.png", 64, 64) == (255, 0, 0)
    assert names["streamline/1f1e8-1f1f3.png"] == "flag of China"
    assert names["fxemoji/1f1e8-1f1f3.png"] == "flag of China"
    assert get_pixel(folder / "fxemoji" / "1f1e8-1f1f3.png", 64, 64) == (0, 255, 0)


def test_a_picture_that_is_not_square_keeps_its_shape(tmp_path):
    svg = emoji_sources._get_svg(
        {
            "icons": {"tall": {"body": '<rect width="16" height="32" fill="#f00"/>', "height": 32}},
            "width": 16,
            "height": 16,
        },
        "tall",
    )
    assert draw_picture((svg, tmp_path / "tall.png")) == ""
    assert get_pixel(tmp_path / "tall.png", 10, 64) == (255, 255, 255)
    assert get_pixel(tmp_path / "tall.png", 64, 2) == (255, 0, 0)


def test_a_finished_folder_is_returned_at_once(packages, tmp_path, monkeypatch):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji", "noto"], progress=False)
    before = (folder / "metadata.jsonl").read_bytes()

    def fail(*args):
        raise AssertionError("drawn again")

    monkeypatch.setattr(emoji, "_draw_style", fail)
    assert draw_emoji(folder, ["twemoji", "noto"], progress=False) == folder
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_a_style_is_added_without_drawing_the_others_again(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    drawn = (folder / "twemoji" / "1f600.png").stat().st_mtime_ns
    draw_emoji(folder, ["twemoji", "noto"], progress=False)
    assert (folder / "twemoji" / "1f600.png").stat().st_mtime_ns == drawn
    assert {record["style"] for record in read_records(folder).values()} == {"twemoji", "noto"}


def test_an_interrupted_drawing_leaves_no_half_set_and_is_finished_later(
    packages, tmp_path, monkeypatch
):
    whole = draw_emoji(tmp_path / "whole", ["twemoji"], progress=False)
    done = []

    def stop_after_two(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job[1].name)
        return draw_picture(job)

    monkeypatch.setattr(emoji, "draw_picture", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    assert not (tmp_path / "emoji" / "metadata.jsonl").exists()
    assert not (tmp_path / "emoji" / "twemoji").exists()
    [part] = (tmp_path / "emoji").glob(".*.part")
    (part / ".1f997.png.123").write_bytes(b"cut off")
    again = []
    monkeypatch.setattr(
        emoji, "draw_picture", lambda job: again.append(job[1].name) or draw_picture(job)
    )
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    assert len(done) == 2 and not set(done) & set(again)
    assert (folder / "metadata.jsonl").read_text() == (whole / "metadata.jsonl").read_text()
    assert sorted(p.name for p in (folder / "twemoji").iterdir()) == sorted(
        p.name for p in (whole / "twemoji").iterdir()
    )


def test_processes_draw_what_one_process_draws(packages, tmp_path, monkeypatch):
    one = draw_emoji(tmp_path / "one", ["twemoji"], progress=False)
    monkeypatch.setattr(emoji, "MANY", 1)
    many = draw_emoji(tmp_path / "many", ["twemoji"], progress=False)
    for name in read_records(one):
        assert (one / name).read_bytes() == (many / name).read_bytes()
    assert read_records(one) == read_records(many)


@pytest.mark.parametrize("body, fault", [("<rect", "expected a whitespace"), ("", "blank")])
def test_a_bad_svg_is_named_counted_and_skipped(packages, tmp_path, body, fault):
    flip = {"right": {"parent": "left", "hFlip": True}}
    write_icons(packages / "@iconify-json-twemoji", ICONS | {"one": body}, CHARS, flip)
    with pytest.warns(UserWarning, match=f"1 twemoji pictures skipped: 31-20e3: .*({fault})"):
        folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    assert "twemoji/31-20e3.png" not in read_records(folder)
    assert list(json.loads((folder / "twemoji" / "drawn.json").read_text())["skipped"]) == [
        "31-20e3"
    ]


def test_too_few_pictures_are_an_error(packages, tmp_path, monkeypatch):
    monkeypatch.setitem(emoji.STYLES, "noto", emoji.STYLES["noto"]._replace(fewest=5))
    with pytest.raises(RuntimeError, match="must give at least 5 pictures, got 4"):
        draw_emoji(tmp_path / "emoji", ["noto"], progress=False)
    assert not (tmp_path / "emoji" / "noto").exists()


def test_unknown_styles_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"styles must be some of twemoji.*got \['apple'\]"):
        draw_emoji(tmp_path, ["apple"])


def test_a_folder_that_cannot_be_written_is_named(packages, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="emoji cannot be drawn into .*file"):
        draw_emoji(tmp_path / "file", ["twemoji"], progress=False)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match="emoji cannot be drawn into .*locked: Permission"):
        draw_emoji(tmp_path / "locked", ["twemoji"], progress=False)


def test_somebody_elses_folder_is_not_overwritten(packages, tmp_path):
    (tmp_path / "emoji" / "twemoji").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="did not draw"):
        draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
