"""Baselines of the figures, on features whose structure is known."""

import numpy as np
import pytest

from scripts import quality_baselines as baselines

STYLES = ("flat", "shaded", "outlined")


def make_pictures(noise=0.0, apart=1.0, concepts=40):
    """Features: concept + apart x style + noise; a fifth of concepts lack a style, five are new."""
    rng = np.random.default_rng(0)
    words, hands = rng.normal(size=(concepts, 24)), rng.normal(size=(len(STYLES), 24))
    rows = [(c, s) for c in range(concepts) for s in range(len(STYLES))]
    concept, style = np.array(rows).T
    split = np.where((concept % 5 == 0) & (style == concept // 5 % 3), "cell", "train")
    split = np.where(concept >= concepts - 5, "test", split)
    features = words[concept] + apart * hands[style] + noise * rng.normal(size=(len(rows), 24))
    return baselines.Pictures(features, words[concept], np.array(STYLES)[style], concept, split)


def find(pictures, name, split):
    return next(f for n, s, f in baselines.compare(pictures) if (n, s) == (name, split))


def test_a_concept_moved_from_other_styles_is_found_where_styles_only_move_it():
    r1, r5, style = find(make_pictures(), "moved", "cell")
    assert r1.value == r5.value == style.value == 1


def test_a_text_that_says_all_is_enough_for_known_concepts_and_not_for_new_ones():
    pictures = make_pictures()
    known, new = (find(pictures, "text, g = 8", split)[0].value for split in ("cell", "test"))
    assert known == 1 and new < 0.5


def test_a_picture_apart_finds_its_style_where_styles_are_strong_alone():
    strong, weak = make_pictures(apart=20.0), make_pictures(apart=0.05, noise=0.01)
    assert find(strong, "apart", "cell")[2].value == 1
    assert find(weak, "apart", "cell")[2].value == 0  # The same concept in another style is nearer.
    assert find(strong, "apart", "cell")[:2] == [None, None]


def test_a_ridge_for_each_style_undoes_more_than_a_shift():
    pictures = make_pictures(concepts=200)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))[0]
    turned = np.where(
        (pictures.style == "flat")[:, None], pictures.features @ turn, pictures.features
    )
    pictures = pictures._replace(features=turned)
    ridge = find(pictures, "moved by W", "cell")[0].value
    assert ridge > find(pictures, "moved", "cell")[0].value


@pytest.mark.parametrize("sharpness", baselines.SHARPNESS)
def test_a_regression_repeats_what_it_learnt(sharpness):
    pictures = make_pictures()
    trained = pictures.find("train")
    [found] = baselines.regress(pictures, [trained], sharpness, ridge=1e-6)
    np.testing.assert_allclose(found, pictures.features[trained], atol=0.05)
