"""Caption files in their three forms, and picture files of every kind, good and bad."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax.pictures import (
    PictureError,
    assign_split,
    find_measured,
    load_picture,
    read_folder,
    read_measured,
)


def paint(path, size=(16, 16), colour=(255, 0, 0), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        paint(tmp_path / name)
    return tmp_path


def write_jsonl(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# Splits.


def test_split_follows_the_first_eight_bytes_of_sha256():
    for concept in map(str, range(200)):
        u = int(hashlib.sha256(concept.encode("utf-8")).hexdigest()[:16], 16) / 16**16
        assert assign_split(concept) == ("test" if u < 0.06 else "valid" if u < 0.1 else "train")


def test_splits_of_many_concepts_have_the_stated_shares():
    splits = [assign_split(f"concept {i}") for i in range(20_000)]
    # Binomial with n = 20 000: five standard deviations are 0.0084 and 0.0070.
    assert abs(splits.count("test") / 20_000 - 0.06) < 0.0084
    assert abs(splits.count("valid") / 20_000 - 0.04) < 0.0070


# Captions.


def test_jsonl_gives_captions_split_concept_and_style(folder):
    write_jsonl(
        folder,
        dict(file_name="b.png", text=["a red square", " red "], split="cell", concept="1F7E5"),
        "",
        dict(file_name="./sub/c.png", text="rouge é", style="flat", width=16),
    )
    first, second = read_folder(folder)
    assert first == (folder / "b.png", ("a red square", "red"), "cell", "1F7E5", "")
    split = assign_split("sub/c.png")
    assert second == (folder / "sub/c.png", ("rouge é",), split, "sub/c.png", "flat")


def test_csv_joins_the_captions_of_a_repeated_picture(folder):
    lines = ["\ufefffile_name,text,split", 'a.png,"red, and flat",test', 'b.png,"two', 'lines",']
    (folder / "captions.csv").write_bytes("\r\n".join([*lines, "a.png,red,test"]).encode())
    first, second = read_folder(folder)
    assert first[:4] == (folder / "a.png", ("red, and flat", "red"), "test", "a.png")
    assert second[1:3] == (("two\nlines",), assign_split("b.png"))


def test_styles_that_hold_nothing_out_are_not_measured(folder):
    styles = {
        "a.png": ("flat", "train"),
        "b.png": ("flat", "test"),
        "sub/c.png": ("extra", "train"),
    }
    write_jsonl(
        folder,
        *(
            {"file_name": name, "text": name, "style": style, "split": split}
            for name, (style, split) in styles.items()
        ),
    )
    assert list(find_measured(read_folder(folder))) == [True, True, False]
    assert [p.path.name for p in read_measured(folder)] == ["a.png", "b.png"]
    trained = [p for p in read_folder(folder) if p.split == "train"]
    assert list(find_measured(trained)) == [True, True]  # Nothing is held out at all.
    assert list(find_measured([])) == []


def test_text_files_give_a_caption_a_line_and_other_pictures_are_left_out(folder):
    (folder / "sub/c.txt").write_text("a square\n\n  red\n")
    (folder / "a.txt").write_text("flat")
    pictures = read_folder(folder)
    assert [(p.path.name, p.captions) for p in pictures] == [
        ("a.png", ("flat",)),
        ("c.png", ("a square", "red")),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"', "line 2: malformed JSON"),
        ('["a.png", "red"]', "line 2: must be an object"),
        ('{"text": "red"}', "line 2: file_name must be a string, got None"),
        ('{"file_name": "", "text": "red"}', "line 2: file_name must not be empty"),
        ('{"file_name": "a.png"}', "line 2: text must be a string or a list of strings, got None"),
        ('{"file_name": "a.png", "text": [1]}', r"line 2: text must be .* got \[1\]"),
        ('{"file_name": "a.png", "text": " "}', "line 2: captions must not be empty"),
        ('{"file_name": "a.png", "text": []}', "line 2: captions must not be empty"),
        ('{"file_name": "a.png", "text": ["x", "x"]}', "line 2: duplicate captions"),
        ('{"file_name": "a.png", "text": "x", "split": "dev"}', "must be one of train, .*'dev'"),
        ('{"file_name": "a.png", "text": "x", "style": 3}', "style must be a string, got 3"),
        ('{"file_name": "./b.png", "text": "red"}', "line 2: duplicate of .* line 1: b.png"),
        ('{"file_name": "b.png", "text": "x", "style": "y"}', "line 2: b.png must have the split"),
    ],
)
def test_a_malformed_jsonl_line_is_named(folder, line, message):
    write_jsonl(folder, dict(file_name="b.png", text="red"), line)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with the header file_name,text, got an empty file"),
        ("a.png,red\n", "must start with the header file_name,text, got a.png,red"),
        ("file_name,text\n", "must name at least one picture"),
        ("file_name,text\na.png,red, flat\n", "line 2: must have 2 columns"),
        ("file_name,text\nb.png,red\na.png\n", "line 3: must have 2 columns"),
        ('file_name,text\na.png,"red\n', "line 2: malformed CSV"),
        ("file_name,text\na.png,\n", "line 2: captions must not be empty"),
        ("file_name,text\na.png,red\na.png,red\n", "line 3: duplicate of .*line 2: a.png"),
        ("file_name,text,style\na.png,x,u\na.png,y,v\n", "line 3: a.png must have the split"),
    ],
)
def test_a_malformed_csv_is_refused_with_its_line(folder, text, message):
    (folder / "captions.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


def test_an_empty_jsonl_is_refused(folder):
    write_jsonl(folder, "")
    with pytest.raises(ValueError, match="metadata.jsonl must name at least one picture"):
        read_folder(folder)


def test_captions_in_another_encoding_are_refused(folder):
    (folder / "captions.csv").write_bytes("file_name,text\na.png,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match="captions.csv must be UTF-8"):
        read_folder(folder)


def test_absent_pictures_are_counted_and_the_first_are_listed(folder):
    names = ["a.png", *(f"{i}.png" for i in range(7))]
    write_jsonl(folder, *(dict(file_name=name, text="x") for name in names))
    message = "7 of 8 captioned pictures are absent: 0.png, 1.png, 2.png, 3.png, 4.png, ..."
    with pytest.raises(FileNotFoundError, match=message):
        read_folder(folder)


def test_two_caption_tables_are_refused(folder):
    write_jsonl(folder, dict(file_name="a.png", text="x"))
    (folder / "captions.csv").write_text("file_name,text\na.png,red\n")
    with pytest.raises(ValueError, match="metadata.jsonl or captions.csv, got both"):
        read_folder(folder)


def test_pictures_without_any_caption_are_refused(folder):
    with pytest.raises(ValueError, match="holds 3 pictures but no captions: needs metadata.jsonl"):
        read_folder(folder)


def test_an_empty_text_file_is_named(folder):
    (folder / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="a.txt: captions must not be empty"):
        read_folder(folder)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold pictures .* got none"):
        read_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="must be given as a folder, got .*nowhere"):
        read_folder(tmp_path / "nowhere")


# Pictures.


def test_a_picture_of_the_right_size_is_kept_bit_for_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    loaded = load_picture(tmp_path / "x.png", size=32)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, pixels)


def test_a_wide_picture_is_cropped_at_its_centre(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(load_picture(tmp_path / "x.png", size=16), pixels[:, 12:28])


def test_a_large_picture_is_filtered_before_it_is_reduced(tmp_path):
    # Alternate black and white columns have the mean 127.5 and nothing else left at half size.
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, ::2] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    inner = load_picture(tmp_path / "x.png", size=16)[:, 2:-2]
    assert np.abs(inner - 127.5).max() <= 2


def test_a_small_picture_is_enlarged(tmp_path):
    loaded = load_picture(paint(tmp_path / "x.png", (8, 9), (1, 2, 3)), size=128)
    np.testing.assert_array_equal(loaded, np.broadcast_to([1, 2, 3], (128, 128, 3)))


def test_a_picture_is_turned_as_exif_says(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera lay on its side: turn by 90 degrees clockwise.
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(load_picture(tmp_path / "x.png", size=16), np.rot90(pixels, -1))


def test_transparency_becomes_white(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:, 4:8, 3] = 51
    pixels[:, 8:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    row = load_picture(tmp_path / "x.png", size=16)[0]
    # 51 / 255 = 0.2 of the colour over white.
    for column, expected in ((0, (255, 255, 255)), (5, (244, 204, 204)), (12, (200, 0, 0))):
        np.testing.assert_allclose(row[column].astype(int), expected, atol=1)


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([0, 0, 0, 0, 0, 255])
    picture.paste(0, (0, 0, 16, 8))
    picture.save(tmp_path / "x.png", transparency=0)
    loaded = load_picture(tmp_path / "x.png", size=16)
    assert loaded[0, 0].tolist() == [255, 255, 255]
    assert loaded[15, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path, suffix):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    loaded = load_picture(tmp_path / f"x{suffix}", size=16)
    expected = np.round(values / 65535 * 255)
    np.testing.assert_array_equal(loaded, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("mode", "colour", "name", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "x.tif", (255, 0, 0)),
        ("L", 77, "x.png", (77, 77, 77)),
        ("1", 1, "x.png", (255, 255, 255)),
        ("LA", (9, 0), "x.png", (255, 255, 255)),
        ("RGB", (10, 20, 30), "x.jpg", (10, 20, 30)),
    ],
)
def test_other_colour_modes_become_rgb(tmp_path, mode, colour, name, expected):
    loaded = load_picture(paint(tmp_path / name, (16, 16), colour, mode), size=16)
    np.testing.assert_allclose(loaded.astype(int), np.broadcast_to(expected, (16, 16, 3)), atol=2)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_the_first_frame_of_an_animation_counts(tmp_path, name):
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    red.save(tmp_path / name, save_all=True, append_images=[blue], lossless=True)
    loaded = load_picture(tmp_path / name, size=16)
    np.testing.assert_array_equal(loaded, np.broadcast_to([255, 0, 0], (16, 16, 3)))


def test_unusable_pictures_are_refused_by_name(tmp_path):
    whole = paint(tmp_path / "whole.png", (64, 64)).read_bytes()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "truncated.png").write_bytes(whole[:90])
    paint(tmp_path / "pixel.png", (1, 1))
    paint(tmp_path / "thin.png", (500, 7))
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((16, 16), 70_000, np.int32)).save(tmp_path / "wide.tif")
    for name, message in {
        "text.png": "cannot be read as a picture: cannot identify",
        "empty.png": "cannot be read as a picture",
        "truncated.png": "cannot be read as a picture",
        "absent.png": "cannot be read as a picture: .*No such file",
        "pixel.png": "must be at least 8 pixels wide and high, got 1x1",
        "thin.png": "must be at least 8 pixels wide and high, got 500x7",
        "float.tif": "cannot be read as a picture: 32-bit pictures have no defined white",
        "wide.tif": "cannot be read as a picture: 32-bit pictures have no defined white",
    }.items():
        with pytest.raises(PictureError, match=f"{name} {message}"):
            load_picture(tmp_path / name)


def test_a_decompression_bomb_keeps_the_error_of_pillow(tmp_path, monkeypatch):
    paint(tmp_path / "bomb.png", (64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError, match="bomb.png: Image size"):
        load_picture(tmp_path / "bomb.png")
