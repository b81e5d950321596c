"""Keys, names, concepts and splits of emoji."""

import hashlib

import pytest

from ldm_jax.emoji import assign_cell
from ldm_jax.emoji_names import get_concept, get_name, get_skin_tones, normalise_key, slugify
from ldm_jax.emoji_styles import STYLES
from ldm_jax.pictures import assign_split


@pytest.mark.parametrize(
    "hexcode, key",
    [
        ("0031-FE0F-20E3", "31-20e3"),
        ("1F600", "1f600"),
        ("00A9", "a9"),
        ("1F441-FE0F-200D-1F5E8-FE0F", "1f441-200d-1f5e8"),
    ],
)
def test_keys_drop_variation_selectors_and_leading_zeros(hexcode, key):
    assert normalise_key(hexcode) == key


@pytest.mark.parametrize(
    "key, label, name",
    [
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
    ],
)
def test_names_say_what_the_picture_shows(key, label, name):
    assert get_name(key, label) == name


@pytest.mark.parametrize(
    "keys",
    [
        ("1f9d1-200d-1f3a8", "1f468-200d-1f3a8", "1f469-200d-1f3a8", "1f469-1f3fd-200d-1f3a8"),
        ("1f466", "1f467", "1f9d2"),
        ("1f3c3", "1f3c3-200d-2640", "1f3c3-200d-2642-200d-27a1"),
        ("1f46b", "1f46c", "1f46d", "1f9d1-200d-1f91d-200d-1f9d1"),
        ("1f491", "1f469-200d-2764-200d-1f468"),
        ("1f46a", "1f468-200d-1f466", "1f9d1-200d-1f9d1-200d-1f9d2"),
    ],
)
def test_genders_and_skin_tones_are_one_concept(keys):
    assert len({get_concept(key) for key in keys}) == 1


def test_skin_tones_have_the_names_of_cldr():
    assert get_skin_tones("1f44b") == set()
    assert get_skin_tones("1f469-1f3fd-200d-1f3a8") == {"medium skin tone"}
    assert get_skin_tones("1f46b-1f3fb") == {"light skin tone"}
    pair = "1f469-1f3fe-200d-1f91d-200d-1f468-1f3fc"
    assert get_skin_tones(pair) == {"medium-dark skin tone", "medium-light skin tone"}


def test_different_things_stay_different_concepts():
    keys = [
        "1f9d1",
        "1f9d2",
        "1f476",
        "2640",
        "2642",
        "1f48f",
        "1f491",
        "1f46a",
        "1f9d1-200d-1f3a8",
    ]
    assert len({get_concept(key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "text, slug",
    [
        ("flag: Åland Islands", "flag-aland-islands"),
        ("keycap: #", "keycap-pound"),
        ("St. Kitts & Nevis", "st-kitts-and-nevis"),
        ("woman’s hat", "womans-hat"),
    ],
)
def test_slugs_are_icon_names(text, slug):
    assert slugify(text) == slug


def test_held_out_concepts_are_held_out_in_every_style():
    for number in range(2000):
        concept = f"{number:x}"
        splits = {assign_cell(style, concept) for style in STYLES}
        own = assign_split(concept)
        assert splits <= {"train", "cell"} if own == "train" else splits == {own}


def test_cells_are_five_percent_of_the_training_concepts_by_hash():
    concepts = [c for c in (f"{n:x}" for n in range(20000)) if assign_split(c) == "train"]
    cells = [c for c in concepts if assign_cell("noto", c) == "cell"]
    assert abs(len(cells) / len(concepts) - 0.05) < 0.006  # four standard deviations
    first = int.from_bytes(hashlib.sha256(f"noto/{cells[0]}".encode()).digest()[:8], "big")
    assert first < 0.05 * 2**64
