"""Figures, PNG files and grids; expected pixels are written out or come from numpy."""

import stat
import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image, ImageFont

from ldm_jax.plotting import (
    CAPTION_LINES,
    GAP,
    imshow,
    plot_curves,
    plot_images,
    read_png_metadata,
    save_grid,
    save_png,
    save_pngs,
    to_uint8,
)

plt.switch_backend("agg")
RNG = np.random.default_rng(0)


def draw_bytes(n, height=12, width=16):
    return RNG.integers(0, 256, (n, height, width, 3), np.uint8)


def read(path):
    return np.asarray(Image.open(path))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_floats_become_bytes_and_bytes_stay():
    values = np.array([-9.0, -1.0, -0.5, 0.0, 1.0, 9.0])
    expected = [0, 0, 64, 128, 255, 255]  # 63.75 and 127.5, which rounds to even
    image = np.broadcast_to(values[:, None, None], (6, 1, 3))
    assert to_uint8(image)[:, 0, 0].tolist() == expected
    assert to_uint8(jnp.asarray(image, jnp.float32))[:, 0, 2].tolist() == expected
    images = draw_bytes(2)
    assert to_uint8(images) is images
    np.testing.assert_array_equal(to_uint8(images / 127.5 - 1), images)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4)), r"must have shape \(..., H, W, 3\), none 0, got \(4, 4, 4\)"),
        (np.zeros((0, 4, 3)), r"none 0, got \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.int32), "must be uint8 or floats in .* got int32"),
        (np.full((4, 4, 3), np.nan), "must be finite"),
        (np.full((4, 4, 3), -np.inf), "must be finite"),
        (np.zeros((4, 3)), r"must have shape \(H, W, 3\), got \(4, 3\)"),
        (np.zeros((1, 4, 4, 3)), r"must have shape \(H, W, 3\), got \(1, 4, 4, 3\)"),
    ],
)
def test_an_image_that_is_none_leaves_no_file(image, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_png(tmp_path / "a.png", image)
    with pytest.raises(ValueError, match=message):
        imshow(image)
    assert not list(tmp_path.iterdir())


def test_png_keeps_pixels_and_any_text(tmp_path):
    image = draw_bytes(1)[0]
    metadata = {"prompt": "日本の旗 🎌, “naïve”\nline 2", "seed": "7", "empty": ""}
    save_png(tmp_path / "new/a.png", image, metadata)
    np.testing.assert_array_equal(read(tmp_path / "new/a.png"), image)
    assert read_png_metadata(tmp_path / "new/a.png") == metadata
    assert all(type(text) is str for text in read_png_metadata(tmp_path / "new/a.png").values())


def test_png_is_readable_by_the_others_and_needs_no_metadata(tmp_path):
    image = draw_bytes(1)[0]
    (tmp_path / "plain").write_text("")
    save_png(str(tmp_path / "a.png"), image / 127.5 - 1)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), image)
    assert read_png_metadata(str(tmp_path / "a.png")) == {}
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.png")}
    assert len(modes) == 1


def test_pngs_written_at_once_are_those_written_one_by_one(tmp_path):
    images, texts = draw_bytes(9), [{"number": str(i)} for i in range(9)]
    for i in range(9):
        save_png(tmp_path / f"one/{i}.png", images[i], texts[i])
    save_pngs([tmp_path / f"many/{i}.png" for i in range(9)], images, texts)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()
    save_pngs([tmp_path / "plain.png"], images[:1] / 127.5 - 1)
    np.testing.assert_array_equal(read(tmp_path / "plain.png"), images[0])
    save_pngs([], images[:0])


def test_pngs_that_cannot_be_written_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="must be as many as images, 2, got 1 and 2"):
        save_pngs([tmp_path / "a.png"], draw_bytes(2))
    images = np.stack([np.zeros((4, 4, 3)), np.full((4, 4, 3), np.nan)])
    with pytest.raises(ValueError, match="must be finite"):
        save_pngs([tmp_path / "a.png", tmp_path / "b.png"], images)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_failed_write_keeps_the_former_file(tmp_path, monkeypatch):
    save_png(tmp_path / "a.png", draw_bytes(1)[0], {"seed": "1"})
    former = (tmp_path / "a.png").read_bytes()

    def fill_disk(self, file, **options):
        file.write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        save_png(tmp_path / "a.png", draw_bytes(1)[0])
    assert (tmp_path / "a.png").read_bytes() == former
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"": "x"}, "keys must be 1 to 79 ASCII characters, got ''"),
        ({"k" * 80: "x"}, "keys must be 1 to 79"),
        ({"schlüssel": "x"}, "keys must be 1 to 79 ASCII characters, got 'schlüssel'"),
        ({"seed": 3}, "must be text, got seed=3"),
    ],
)
def test_metadata_that_png_cannot_hold_is_refused(metadata, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_png(tmp_path / "a.png", draw_bytes(1)[0], metadata)
    assert not list(tmp_path.iterdir())


def test_metadata_of_something_else_is_refused_with_the_path(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: metadata is read from PNG files, got JPEG"):
        read_png_metadata(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"b\.png"):
        read_png_metadata(tmp_path / "b.png")


def test_grid_without_captions_places_every_pixel(tmp_path):
    images = draw_bytes(5)
    save_grid(tmp_path / "grid.png", images, columns=3, metadata={"seed": "0"})
    expected = np.full((2 * (12 + GAP) + GAP, 3 * (16 + GAP) + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = GAP + i // 3 * (12 + GAP), GAP + i % 3 * (16 + GAP)
        expected[y : y + 12, x : x + 16] = image
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), expected)
    assert read_png_metadata(tmp_path / "grid.png") == {"seed": "0"}


def test_grid_is_no_wider_than_its_images(tmp_path):
    save_grid(tmp_path / "grid.png", draw_bytes(2), columns=8)
    assert read(tmp_path / "grid.png").shape == (12 + 2 * GAP, 2 * (16 + GAP) + GAP, 3)


def test_captions_stand_below_their_own_tiles(tmp_path):
    images = draw_bytes(4, 128, 128)
    captions = ["red apple", "a caption of two lines or so", "", "W" * 500]
    save_grid(tmp_path / "grid.png", images, captions, columns=2)
    grid = read(tmp_path / "grid.png")
    line_height = sum(ImageFont.load_default(size=12).getmetrics())
    down = 128 + CAPTION_LINES * line_height + GAP
    assert grid.shape == (2 * down + GAP, 2 * (128 + GAP) + GAP, 3)

    def count_inked_lines(i):
        y, x = GAP + i // 2 * down + 128, GAP + i % 2 * (128 + GAP)
        below = grid[y : y + CAPTION_LINES * line_height, x : x + 128]
        lines = below.reshape(CAPTION_LINES, line_height, 128, 3)
        return int(((lines < 128).any(axis=(1, 2, 3))).sum())

    assert [count_inked_lines(i) for i in range(4)] == [1, 2, 0, 3]
    for i, image in enumerate(images):
        y, x = GAP + i // 2 * down, GAP + i % 2 * (128 + GAP)
        np.testing.assert_array_equal(grid[y : y + 128, x : x + 128], image)
    gaps = np.concatenate([grid[:, x : x + GAP] for x in (0, 128 + GAP, 2 * (128 + GAP))])
    assert (gaps == 255).all()  # No caption runs into a neighbour.


def test_long_captions_end_in_an_ellipsis(tmp_path):
    """Two captions that differ behind the last line that fits draw the same picture."""
    image = draw_bytes(1, 96, 96)
    start = "a caption with many words " * 6
    for name, caption in (("a", start + "cats"), ("b", start + "dogs"), ("c", start[:20])):
        save_grid(tmp_path / f"{name}.png", image, [caption])
    a, b, c = (read(tmp_path / f"{name}.png") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert c.shape[0] < a.shape[0]


def test_accents_that_the_font_lacks_are_left_out(tmp_path):
    image = draw_bytes(1)
    save_grid(tmp_path / "a.png", image, ["piñata,\ncafé"])
    save_grid(tmp_path / "b.png", image, ["pinata, cafe"])
    np.testing.assert_array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


def test_small_tiles_get_room_for_their_captions(tmp_path):
    save_grid(tmp_path / "grid.png", draw_bytes(2, 8, 8), ["red apple", "日本"])
    assert read(tmp_path / "grid.png").shape[1] == 2 * (96 + GAP) + GAP


@pytest.mark.parametrize("draw", [lambda *args: save_grid("unused.png", *args), plot_images])
def test_grids_refuse_what_they_cannot_lay_out(draw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"must have shape \(n, H, W, 3\), got \(12, 16, 3\)"):
        draw(draw_bytes(1)[0])
    with pytest.raises(ValueError, match="captions must be as many as images, 2, got 1"):
        draw(draw_bytes(2), ["one"])
    with pytest.raises(ValueError, match="columns must be positive, got 0"):
        draw(draw_bytes(2), None, 0)
    with pytest.raises(ValueError, match=r"none 0, got \(0, 12, 16, 3\)"):
        draw(draw_bytes(0))
    assert not list(tmp_path.iterdir())


def test_imshow_draws_the_bytes_without_ticks():
    image = draw_bytes(1)[0]
    axes = imshow(image / 127.5 - 1)
    np.testing.assert_array_equal(axes.images[0].get_array(), image)
    assert not axes.axison


def test_plot_images_lays_out_rows_and_captions():
    images = draw_bytes(5)
    captions = ["costs $5 or $6", "b", "c", "d", "e"]
    figure = plot_images(images, captions, columns=3)
    axes = figure.axes
    assert len(axes) == 6 and not any(ax.axison for ax in axes)
    for ax, image, caption in zip(axes, images, captions):
        np.testing.assert_array_equal(ax.images[0].get_array(), image)
        assert ax.get_title() == caption
    assert not axes[5].images
    figure.canvas.draw()
    assert [ax.get_title() for ax in plot_images(images[:2]).axes] == ["", ""]


def test_curves_have_a_bar_for_each_interval_and_a_tick_for_each_abscissa():
    curves = {"one": [(12, 2.0, 1.5, 3.0), (6, 4.0, 3.5, 5.0)], "two": [(5, 1.0, 0.0, 2.0)]}
    figure = plot_curves({"left": curves, "right": {"one": curves["one"]}}, "runs", log=True)
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("left", "right")
    assert left.get_xlabel() == "runs" and left.get_xscale() == "log"
    assert list(left.get_xticks()) == [5, 6, 12] and list(right.get_xticks()) == [6, 12]
    assert [c.get_label() for c in left.containers] == ["one", "two"]
    line, _, (bars,) = right.containers[0]
    np.testing.assert_array_equal(line.get_xydata(), [(6, 4), (12, 2)])
    np.testing.assert_allclose(bars.get_segments(), [[(6, 3.5), (6, 5)], [(12, 1.5), (12, 3)]])
    # Beside each other, and all of them in sight.
    (six, _), (five,) = (c[0].get_xdata() for c in left.containers)
    assert 5.9 < six < 6 and 5 < five < 5.1
    (bottom, top), (first, last) = left.get_ylim(), right.get_xlim()
    assert -1 < bottom < 0 and 5 < top < 6 and 5 < first < 6 and 12 < last < 14
    plt.close(figure)


def test_ticks_that_would_touch_are_left_out():
    points = [(x, 1.0, 0.0, 2.0) for x in (11, 12, 24)]
    for log, ticks in ((True, [12, 24]), (False, [11, 12, 24])):
        figure = plot_curves({"one": {"a": points}}, "x", log=log)
        assert list(figure.axes[0].get_xticks()) == ticks
        plt.close(figure)


@pytest.mark.parametrize("low, scale", [(1.0, "log"), (10.0, "linear"), (-1.0, "linear")])
def test_positive_values_that_differ_much_lie_on_a_logarithmic_ordinate(low, scale):
    figure = plot_curves({"one": {"a": [(1, 90.0, 80.0, 100.0)], "b": [(2, 20.0, low, 30.0)]}}, "x")
    figure.canvas.draw()
    assert figure.axes[0].get_yscale() == scale
    assert all("10^" not in tick.get_text() for tick in figure.axes[0].get_yticklabels())
    plt.close(figure)


def test_plots_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[plot\]"'):
        plot_images(draw_bytes(1))
