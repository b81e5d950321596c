"""What an emoji is called: code points and CLDR labels => keys, concepts and caption names."""

import re
import unicodedata

SKIN_TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}
GENDER_SIGNS = {"2640", "2642"}
FACING_RIGHT = "27a1"
JOINER = "200d"
# Man, woman => person; boy, girl => child; and the same for the pairs that have single code points.
WITHOUT_GENDER = {
    "1f468": "1f9d1",
    "1f469": "1f9d1",
    "1f466": "1f9d2",
    "1f467": "1f9d2",
    "1f474": "1f9d3",
    "1f475": "1f9d3",
    "1f934": "1fac5",
    "1f478": "1fac5",
    "1f930": "1fac4",
    "1fac3": "1fac4",
    "1f57a": "1f483",
    "1f936": "1f385",
    "1f46b": "1f46c",
    "1f46d": "1f46c",
}
# Sequences of people that have a code point of their own as well.
SAME_CONCEPT = {
    "1f9d1-200d-1f91d-200d-1f9d1": "1f46c",
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",
    "1f9d1-200d-2764-200d-1f9d1": "1f491",
    "1f9d1-200d-1f384": "1f385",
}
FAMILY = "1f46a"
# Territories that fly another emoji's flag: BV, CP, DG, EA, HM, MF, SJ, UM.
BORROWED_FLAGS = {
    "1f1e7-1f1fb",
    "1f1e8-1f1f5",
    "1f1e9-1f1ec",
    "1f1ea-1f1e6",
    "1f1ed-1f1f2",
    "1f1f2-1f1eb",
    "1f1f8-1f1ef",
    "1f1fa-1f1f2",
}

SIGNS = {  # Labels that mean something else, or nothing, without a word more.
    **{key: "zodiac sign" for key in [f"{code:x}" for code in range(0x2648, 0x2654)] + ["26ce"]},
    **dict.fromkeys(
        [
            "2139",
            "26a0",
            "26d4",
            "1f6ab",
            "2622",
            "2623",
            "1f6c2",
            "1f6c3",
            "1f6c4",
            "1f6c5",
            "1f6d0",
            "1f6bb",
            "1f6be",
            "2716",
            "2795",
            "2796",
            "2797",
            "a9",
            "2122",
            "1f6b0",
            "1f6b1",
        ],
        "sign",
    ),
    **dict.fromkeys(
        ["1f549", "267e", "2747", "1faaf", "1f3a6", "1f6dc", "ae", "1f4ab", "1f4a4"], "symbol"
    ),
}
RENAMED = {"#": "hash", "*": "asterisk"}


def normalise_key(hexcode: str) -> str:
    """Code points as lower-case hexadecimal without FE0F and leading zeros, joined by "-"."""
    parts = hexcode.lower().split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def get_concept(key: str) -> str:
    """The emoji without skin tone, gender and direction: man, woman and person are one concept.

    Args:
        key: code points as `normalise_key` gives them.
    """
    parts = [WITHOUT_GENDER.get(part, part) for part in key.split("-") if part not in SKIN_TONES]
    first, *rest = "-".join(parts).split(f"-{JOINER}-")
    rest = [piece for piece in rest if piece not in GENDER_SIGNS | {FACING_RIGHT}]
    people = {"1f9d1", "1f9d2"}
    if rest and {first, *rest} <= people:
        return FAMILY
    concept = f"-{JOINER}-".join([first, *rest])
    return SAME_CONCEPT.get(concept, concept)


def get_skin_tones(key: str) -> set[str]:
    """The names of the emoji's skin tones, none for a yellow one, two for some pairs of people."""
    return {SKIN_TONES[part] for part in key.split("-") if part in SKIN_TONES}


def count_genders(key: str) -> int:
    """How many of the emoji's code points are a man's, a woman's, a boy's or a girl's."""
    return sum(part in WITHOUT_GENDER or part in GENDER_SIGNS for part in key.split("-"))


def get_name(key: str, label: str) -> str:
    """A caption that says what the picture shows, made from the CLDR label."""
    label = label.translate(str.maketrans("’“”", '\'""'))
    head, _, tail = label.partition(": ")
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {RENAMED.get(tail, tail)}"
    if tail == "bald":
        return f"bald {head}"
    if tail == "facing right":
        return f"{head} facing right"
    if tail == "beard" or tail.endswith("hair"):
        return f"{head} with {'a ' if tail == 'beard' else ''}{tail}"
    if head in ("kiss", "couple with heart", "family") and tail:
        *most, last = tail.split(", ")
        return f"{head} of {', '.join(most)} and {last}"
    if label.endswith(" (blood type)"):
        return f"blood type {label.removesuffix(' (blood type)')}"
    return f"{label} {SIGNS[key]}" if key in SIGNS else label


def slugify(text: str) -> str:
    """Lower-case ASCII words joined by "-", the way icon sets name their icons."""
    text = text.replace("’", "").replace("&", " and ").replace("#", " pound ")
    text = text.replace("*", " asterisk ")
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
