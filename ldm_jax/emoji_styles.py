"""The emoji styles that can be drawn: where each comes from, and what is owed to whom."""

from typing import NamedTuple


class Style(NamedTuple):
    """One way of drawing emoji: where it comes from and what is owed to whom."""

    key: str  # folder name
    package: str  # npm name
    version: str
    phrase: str  # how captions name the style
    fewest: int  # fewer pictures than this means that something went wrong
    licence: str
    credit: str
    measured: bool = True  # Holds pictures out. Else it serves training alone, see `emoji`.


STYLES = {
    style.key: style
    for style in (
        Style(
            "twemoji",
            "@iconify-json/twemoji",
            "1.2.5",
            "Twemoji",
            1850,
            "CC-BY-4.0",
            "Twemoji, (c) Twitter, Inc and other contributors, https://github.com/jdecked/twemoji",
        ),
        Style(
            "noto",
            "@iconify-json/noto",
            "1.2.9",
            "Noto",
            1550,
            "Apache-2.0",
            "Noto Emoji, (c) Google Inc, https://github.com/googlefonts/noto-emoji",
        ),
        Style(
            "blob",
            "@iconify-json/noto-v1",
            "1.2.5",
            "blob",
            1150,
            "Apache-2.0",
            "Noto Emoji v1 (blobs), (c) Google Inc, https://github.com/googlefonts/noto-emoji",
        ),
        Style(
            "fluent-flat",
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "Fluent flat",
            1500,
            "MIT",
            "Fluent Emoji, (c) Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
        ),
        Style(
            "fluent-3d",
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "Fluent 3D",
            1750,
            "MIT",
            "Fluent Emoji, (c) Microsoft Corporation, https://github.com/microsoft/fluentui-emoji,"
            " packed by LobeHub, https://github.com/lobehub/fluent-emoji",
        ),
        Style(
            "emojione",
            "@iconify-json/emojione",
            "1.2.3",
            "EmojiOne",
            1150,
            "CC-BY-4.0",
            "EmojiOne 2.3 / EmojiTwo, https://github.com/EmojiTwo/emojitwo",
        ),
        Style(
            "openmoji",
            "@iconify-json/openmoji",
            "1.2.29",
            "OpenMoji",
            1800,
            "CC-BY-SA-4.0",
            "OpenMoji, https://openmoji.org",
        ),
        Style(
            "fluent-color",
            "@iconify-json/fluent-emoji",
            "1.2.7",
            "Fluent color",
            1400,
            "MIT",
            "Fluent Emoji, (c) Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
            measured=False,
        ),
        Style(
            "fxemoji",
            "@iconify-json/fxemoji",
            "1.2.2",
            "Firefox OS",
            750,
            "Apache-2.0",
            "Firefox OS Emoji, (c) Mozilla, https://github.com/mozilla/fxemoji",
            measured=False,
        ),
        Style(
            "streamline",
            "@iconify-json/streamline-emojis",
            "1.2.4",
            "Streamline",
            450,
            "CC-BY-4.0",
            "Streamline Emojis, (c) Streamline, https://github.com/webalys-hq/streamline-vectors",
            measured=False,
        ),
    )
}
# Without OpenMoji, whose licence goes over to what is made of it. No bundled weights have seen it.
DEFAULT_STYLES = tuple(key for key in STYLES if key != "openmoji")
