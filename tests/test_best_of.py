"""Of several candidates the picture that fits its caption best, by the head and by a CLIP."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_ins import create_clip
from test_quality import export_tiny

import sample
from ldm_jax.alignment import decode_best, load_alignment_score, load_head, load_judge
from ldm_jax.features import load_extractor
from ldm_jax.plotting import read_png_metadata
from ldm_jax.text import load_text_encoder

PROMPTS = ["red apple, Noto", "cat face, blob"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("model"), load_text_encoder("use"))


@pytest.fixture(scope="module")
def candidates(model, tmp_path_factory):
    """Six pictures of each prompt, of the seeds 5 to 10."""
    folder = tmp_path_factory.mktemp("all")
    paths = sample.sample(PROMPTS, folder, checkpoint_folder=model, num=6, seed=5)
    return np.stack([np.asarray(Image.open(path)) for path in paths])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_the_highest_score_of_each_group_is_chosen(batch_size):
    latents = np.array([0.1, 0.3, -0.2, -0.5, -0.4, -0.9, 0.7, 0.6, 0.5])
    decode = lambda part: part * 10  # noqa: E731
    judge = lambda images, captions: images / 10 + np.array([float(x) for x in captions])  # noqa: E731
    captions = ["0"] * 6 + ["0", "0.05", "0.3"]
    images, rows = decode_best(decode, judge, latents, captions, 3, batch_size)
    np.testing.assert_array_equal(rows, [1, 4, 8])
    np.testing.assert_array_equal(images, latents[rows] * 10)
    images, rows = decode_best(decode, None, latents, captions, 1, batch_size)
    np.testing.assert_array_equal(rows, range(9))
    np.testing.assert_array_equal(images, latents * 10)


def test_the_score_is_the_cosine_of_picture_and_caption():
    head, images = load_head(), np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert head is not None
    x = load_extractor("efflite0")(images) @ head.params["image_kernel"] + head.params["image_bias"]
    y = load_text_encoder("use")(PROMPTS) @ head.params["text_kernel"] + head.params["text_bias"]
    expected = np.sum(x * y, 1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(load_alignment_score()(images, PROMPTS), expected, atol=1e-4)


@pytest.mark.parametrize("judge", ["the alignment head", "a CLIP"])
def test_the_best_candidate_is_kept_and_can_be_drawn_again_alone(
    model, candidates, judge, tmp_path
):
    clip = None
    if judge == "a CLIP":
        (tmp_path / "clip").mkdir()
        clip = str(tmp_path / "clip")
        create_clip(Path(clip))
    score = load_judge(3, clip)
    assert score is not None
    scores = score(candidates, np.repeat(PROMPTS, 6).tolist()).reshape(4, 3)
    assert np.diff(np.sort(scores, axis=1)).min() > 1e-5  # No two of them are alike.
    options = dict(checkpoint_folder=model, num=2, seed=5, best_of=3, judge=clip)
    paths = sample.sample(PROMPTS, tmp_path / "best", **options)
    for i, path in enumerate(paths):
        picture, told = np.asarray(Image.open(path), np.int16), read_png_metadata(path)
        assert told["prompt"] == PROMPTS[i // 2]
        assert told["best_of"] == f"3, by {clip or judge}"
        place = 3 * i + scores[i].argmax()
        assert int(told["seed"]) == 5 + place % 6 and path.stem.endswith(f"-{told['seed']}")
        assert np.abs(picture - candidates[place]).max() <= 1
    alone = sample.sample(PROMPTS[1:], tmp_path, checkpoint_folder=model, seed=int(told["seed"]))
    assert np.abs(np.asarray(Image.open(alone[0]), np.int16) - picture).max() <= 1


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"best_of": 0}, ValueError, "best_of must be at least 1.*got 0"),
        ({"judge": "folder"}, ValueError, "2 with a judge, got 1"),
        ({"best_of": 2, "judge": "gone"}, FileNotFoundError, "no such folder of a CLIP"),
    ],
)
def test_what_cannot_be_chosen_among_is_refused_before_anything_is_drawn(
    model, options, error, message, tmp_path
):
    with pytest.raises(error, match=message):
        sample.sample(PROMPTS, tmp_path / "out", checkpoint_folder=model, **options)
    assert not (tmp_path / "out").exists()
