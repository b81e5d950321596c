"""What the quality table chooses, counts and writes, on pictures whose answers are known."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stand_ins
import torch
from PIL import Image

import evaluate
from ldm_jax import examiner, exports, models, quality, report, spreading
from ldm_jax.data import open_cache
from ldm_jax.encoders import load_vae
from ldm_jax.features import Extractor, Reference, get_thumbnails
from ldm_jax.latents import LatentScale
from ldm_jax.meta import create_meta
from ldm_jax.metrics import Estimate
from ldm_jax.pictures import Picture, find_measured
from ldm_jax.sampler import Denoiser, get_diffuser
from ldm_jax.text import load_text_encoder
from ldm_jax.unet import get_network

STYLES = ("flat", "round")


def list_pictures(folder=Path("pictures"), n=32):
    """Two styles of n concepts: of each style in turn 16 train, 8 cell, 8 test."""
    splits = ["train", "train", "cell", "test"]
    return [
        Picture(folder / f"{style}-{i}.png", (f"thing {i}, {style}", f"thing {i}"), splits[i % 4],
                str(i), style)
        for style in STYLES
        for i in range(n)
    ]  # fmt: skip


def write_pictures(folder):
    """Noise of 64 pixels for each of `list_pictures`, with their captions."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for picture in list_pictures(folder):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(picture.path)
        rows.append((picture.path.name, picture.captions[0], *picture[2:]))
    with open(folder / "captions.csv", "w", newline="") as file:
        header = ("file_name", "text", "split", "concept", "style")
        csv.writer(file).writerows([header, *rows])
    return folder


def create_exam():
    """An exam on noise pictures, with their mean colours as features."""
    pictures = list_pictures()
    images = np.random.default_rng(0).integers(0, 256, (len(pictures), 4, 4, 3), np.uint8)
    images = images.repeat(8, 1).repeat(8, 2)  # each a mosaic of 4 x 4 fields
    means = Extractor("means", {"name": "means"}, 48, 1, lambda x: x, "cpu")

    class Means(Extractor):
        def __call__(self, images):
            return images[:, ::8, ::8].reshape(len(images), -1).astype(np.float32) / 255

    extractor = Means(*means)
    reference = Reference(extractor(images), get_thumbnails(images))
    chosen = quality.choose_captions(pictures, 10, seed=0)
    real = {split: images[rows] for split, rows in chosen.items()}
    exam = quality.Exam(pictures, chosen, reference, real, extractor, None, None)
    return exam, images


def test_captions_are_chosen_by_hash_so_that_more_contain_fewer():
    pictures = list_pictures()
    few, many = (quality.choose_captions(pictures, n, seed=1) for n in (6, 9))
    assert list(few) == ["train", "cell", "test"]
    for split, rows in few.items():
        assert [pictures[i].split for i in rows] == [split] * 6
        np.testing.assert_array_equal(rows, many[split][:6])
    other = quality.choose_captions(pictures, 6, seed=2)
    assert any((other[split] != rows).any() for split, rows in few.items())
    # Other pictures of the set do not change the choice.
    fewer = [p for p in pictures if p.split != "train"]
    kept = quality.choose_captions(fewer, 6, seed=1)
    assert "train" not in kept
    assert quality.get_captions(fewer, kept["test"]) == quality.get_captions(pictures, few["test"])


def test_seeds_belong_to_captions():
    one = quality.get_seeds(["a", "b", "a"], seed=0)
    assert one[0] == one[2] != one[1] and 0 <= one.min() and one.max() < 2**32
    assert quality.get_seeds(["a"], seed=1)[0] != one[0]
    candidates = [quality.get_seeds(["a", "b"], seed=0, candidate=k) for k in range(3)]
    np.testing.assert_array_equal(candidates[0], one[:2])
    assert len(np.unique(candidates)) == 6


def test_real_pictures_find_themselves_and_training_pictures_are_their_own_near_copies():
    exam, _ = create_exam()
    figures = quality.measure(exam, exam.real)
    for split, by_source in figures.items():
        drawn, real = by_source["drawn"], by_source["real"]
        for found in (drawn, real):
            for key in ("recall_1", "recall_5", "right_style"):
                assert found[key].value == 1.0
            assert found["near_copies"].value == (1.0 if split == "train" else 0.0)
        # Drawn to the bit as they are: no distance at all; the real ones in halves have one.
        assert drawn["kid"] == pytest.approx((0, 0, 0), abs=1e-9)
        assert drawn["frechet"] == pytest.approx(0, abs=1e-4) and "frechet" not in real
        assert real["kid"].low < real["kid"].value < real["kid"].high


def test_planted_faults_are_counted():
    exam, images = create_exam()
    drawn = exam.real["test"].copy()
    concept, style = ([getattr(p, k) for p in exam.pictures] for k in ("concept", "style"))
    rows = exam.chosen["test"]
    trained = next(i for i, p in enumerate(exam.pictures) if p.split == "train")
    # The first four show the right concept in the wrong style, the next two a training picture.
    for j, row in enumerate(rows[:4]):
        drawn[j] = images[(row + 32) % 64]
        assert concept[(row + 32) % 64] == concept[row] and style[(row + 32) % 64] != style[row]
    drawn[4:6] = np.maximum(images[trained], 8) - 8  # nearly
    figures = quality.measure_pictures(exam, "test", drawn)
    assert figures["n"] == 10
    assert figures["near_copies"].value == 0.2
    same = sum(style[row] == style[trained] for row in rows[4:6])
    assert figures["right_style"].value == pytest.approx((4 + same) / 10)
    assert figures["recall_1"].value <= 0.6 and figures["frechet"] > 0


def test_a_style_that_holds_nothing_out_is_not_searched_but_may_be_copied():
    """What it shows lies nearer to the drawn pictures than anything of the two other styles."""
    exam, _ = create_exam()
    plain = quality.measure(exam, exam.real)
    rows = exam.chosen["test"]
    extra = [exam.pictures[i]._replace(split="train", style="extra") for i in rows]
    pictures = [*exam.pictures, *extra]
    reference = Reference(*(np.concatenate([x, x[rows]]) for x in exam.reference))
    assert not find_measured(pictures)[-len(rows) :].any()
    for split, chosen in quality.choose_captions(pictures, 10, seed=0).items():
        np.testing.assert_array_equal(chosen, exam.chosen[split])
    found = quality.measure(exam._replace(pictures=pictures, reference=reference), exam.real)
    assert plain["test"]["drawn"]["near_copies"].value == 0
    assert found["test"]["drawn"].pop("near_copies").value == 1
    assert plain["test"]["drawn"].pop("near_copies").value == 0
    assert found["test"]["drawn"] == plain["test"]["drawn"]
    assert found["cell"] == plain["cell"]


def test_one_style_has_no_right_style():
    exam, _ = create_exam()
    exam = exam._replace(pictures=[p._replace(style="") for p in exam.pictures])
    assert "right_style" not in quality.measure_pictures(exam, "test", exam.real["test"])


def test_the_table_has_a_line_for_each_source_and_a_dash_for_what_is_not_known():
    figures = {
        "test": {
            "drawn": {"n": 6, "kid": Estimate(1.25, -0.01, 2.5), "frechet": 3.0},
            "real": {"n": 6, "kid": Estimate(0.0, -1.0, 1.0)},
        }
    }
    lines = report.format_table(figures).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["captions", "pictures", "n", "KID x1000", "FD"]
    assert cells[2] == ["Held-out concepts", "drawn", "6", "1.2 [0.0, 2.5]", "3.0"]
    assert cells[3] == ["Held-out concepts", "real", "6", "0.0 [-1.0, 1.0]", "-"]
    assert report.flatten(figures) == {"quality/test/kid": 1.25, "quality/test/frechet": 3.0}
    for by_source in figures["test"].values():
        assert report.from_json(json.loads(json.dumps(report.to_json(by_source)))) == by_source


def test_the_pictures_of_a_cache_are_those_it_was_made_of(tmp_path):
    pictures = stand_ins.make_pictures(tmp_path / "pictures")
    cache = open_cache(stand_ins.encode(tmp_path, pictures=pictures))
    assert quality.list_pictures(cache) == pictures


def test_wrong_input_says_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match="captions_per_group must be at least 6, got 5"):
        quality.choose_captions(list_pictures(), 5, seed=0)
    with pytest.raises(ValueError, match="a group must have at least 6 pictures, got .*'test': 2"):
        quality.choose_captions(list_pictures()[:8], 6, seed=0)
    with pytest.raises(
        ValueError, match="--pictures must name the folder of pictures, .*no config"
    ):
        evaluate.find_pictures(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"data": {"source": "npy"}}))
    with pytest.raises(ValueError, match="was trained on .npy"):
        evaluate.find_pictures(tmp_path / "checkpoints")


def export_tiny(folder, text_encoder):
    """Random weights of a small network for 64-pixel pictures, with the bundled autoencoder."""
    import jax

    meta = json.loads((models.BUNDLED / exports.META_FILE).read_text())
    [width] = text_encoder.shape
    style_guidance = 5.0 if text_encoder.name == "use-parts" else 0.0
    fields = dict(latent_image_size=8, block_depth=1, emb_size=width, widths=(16, 32), norm="group")
    network = get_network(**fields)
    shapes = (1, 8, 8, 4), (1,), (1, width)
    inputs = [np.zeros(shape, np.float32) for shape in shapes]
    variables = jax.jit(network.init)(jax.random.key(0), *inputs)
    scale = LatentScale(np.ones(4, np.float32), np.zeros(4, np.float32))
    meta = create_meta(
        network=fields,
        noising=meta["noising"],
        sampling=meta["sampling"] | {"diffusion_steps": 3, "style_guidance": style_guidance},
        scale=scale,
        vae=meta["vae"],
        text_encoder=text_encoder.identity,
        latent_shape=(8, 8, 4),
        embedding_shape=(width,),
    )
    variables = {"params": variables["params"], "batch_stats": {}}
    return exports.export_model(models.Model(Denoiser(network, variables), scale, meta), folder)


def test_a_picture_does_not_depend_on_the_batches_it_is_drawn_in():
    import jax

    denoiser = jax.tree_util.Partial(lambda x_t, levels, labels: x_t * labels[:, :1, None, None])
    diffuser = get_diffuser(denoiser, diffusion_steps=4)
    labels = np.linspace(0, 1, 5, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    seeds = quality.get_seeds("abcde", seed=0)
    one, other = (
        spreading.sample_latents(diffuser, labels, seeds, (2, 2, 4), batch_size)
        for batch_size in (2, 8)
    )
    assert one.shape == (5, 2, 2, 4)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("text_encoder", ["use", "use-parts"])
def test_evaluate_draws_measures_and_writes(tmp_path, monkeypatch, text_encoder):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "home"))
    options = dict(
        checkpoint_folder=export_tiny(tmp_path / "model", load_text_encoder(text_encoder)),
        pictures=write_pictures(tmp_path / "pictures"),
        captions_per_group=6,
        batch_size=4,
        progress=False,
    )
    figures = evaluate.evaluate(tmp_path / "out", ends=True, **options)
    assert list(figures) == ["train", "cell", "test"]
    for by_source in figures.values():
        assert list(by_source) == ["drawn", "real", "reconstructed", "copied"]
        assert by_source["real"]["recall_1"].value == 1.0
        assert by_source["copied"]["near_copies"].value == 1.0
        assert 0 <= by_source["drawn"]["caption_5"].value <= 1
    told = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert told["features"] == "EfficientNet-lite0" and told["sampling"]["diffusion_steps"] == 3
    value, low, high = figures["test"]["drawn"]["kid"]
    written = told["groups"]["test"]["drawn"]["kid"]
    assert written == {"value": value, "low": low, "high": high}
    assert Image.open(tmp_path / "out" / "sheet.png").size[0] > 64
    vae = load_vae("bundled:emoji")._model
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    vae.save_pretrained(tmp_path / "grey")
    evaluate.evaluate(tmp_path / "out", vae=str(tmp_path / "grey"), **options)
    grey = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert grey["vae"] == str(tmp_path / "grey") and told["vae"] == "bundled:emoji"
    assert grey["decoder_sha256"] != told["decoder_sha256"]
    assert grey["groups"]["test"]["drawn"]["kid"] != written
    with pytest.raises(ValueError, match="features must be one of"):
        evaluate.evaluate(tmp_path / "out", features="resnet", **options)
    best = evaluate.evaluate(tmp_path / "out", best_of=3, **options)
    assert best["test"]["drawn"]["alignment"] > figures["test"]["drawn"]["alignment"]
    told = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert told["best_of"] == 3 and told["judge"] == "the alignment head"
    with pytest.raises(ValueError, match="best_of must be at least 1, and 2 with a judge, got 1"):
        evaluate.evaluate(tmp_path / "out", judge="folder", **options)


@pytest.mark.parametrize("text_encoder", ["use", "use-parts"])
def test_the_nearest_caption_is_that_of_a_training_picture(text_encoder):
    exam, images = create_exam()
    encode = load_text_encoder(text_encoder)

    class Eye:
        """A VAE that keeps what it sees."""

        def encode(self, images):
            return images, images

        def decode(self, latents, as_bytes):
            return latents

    copied = {}

    def load(path, size):
        copied[path] = size
        return images[[p.path for p in exam.pictures].index(path)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "load_picture", load)
        figures = quality.measure_ends(exam, Eye(), encode)
    assert {p.split for p in exam.pictures if p.path in copied} == {"train"}
    # On training captions a machine that copies is perfect; what is kept whole always is.
    assert figures["train"]["copied"]["recall_1"].value == 1.0
    assert figures["test"]["copied"]["recall_1"].value == 0.0
    assert figures["test"]["reconstructed"]["recall_1"].value == 1.0


def test_exams_of_a_run_refuse_pictures_that_can_no_longer_be_read(monkeypatch, tmp_path):
    exam, _ = create_exam()
    whole = list(exam.pictures)
    gone = whole[exam.chosen["cell"][0]]
    broken = exam._replace(
        pictures=[p for p in whole if p is not gone],
        chosen=quality.choose_captions([p for p in whole if p is not gone], len(whole), 0),
    )
    monkeypatch.setattr(quality, "list_pictures", lambda cache: whole)
    monkeypatch.setattr(quality, "create_exam", lambda *args, **kwargs: broken)
    monkeypatch.setattr(examiner, "load_extractor", lambda name: exam.extractor)
    cache = SimpleNamespace(latent_shape=(2, 2, 4), manifest={"source": "there"}, folder="there")
    vae, scale = SimpleNamespace(downsampling=8), LatentScale(1.0)
    arguments = cache, vae, lambda texts: np.zeros((len(texts), 3)), scale, {}, 0, len(whole)
    with pytest.raises(ValueError, match="some pictures of there cannot be read any more"):
        examiner.get_examiner(tmp_path, *arguments, "efflite0", 4)
