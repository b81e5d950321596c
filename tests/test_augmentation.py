"""Pictures moved by whole cells, and what the network is told of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.augmentation import MOST_CELLS, TOLD, translate
from ldm_jax.corruption import corrupt
from ldm_jax.latents import LatentScale
from ldm_jax.noising import ForwardProcess
from ldm_jax.text import load_text_encoder

NUMBER = 600


def draw(embedding_shape=(6,), size=(5, 7), number=NUMBER):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((number, *size, 2)).astype(np.float32)
    return latents, rng.standard_normal((number, *embedding_shape)).astype(np.float32)


def move_plainly(latents, down, right):
    """By indices: each cell shows the one that lies so far up and left, or the nearest there is."""
    rows, columns = (
        np.clip(np.arange(n) - by, 0, n - 1) for n, by in zip(latents.shape, (down, right))
    )
    return latents[rows][:, columns]


@pytest.mark.parametrize("embedding_shape", [(6,), (3, 6)])
def test_pictures_are_moved_by_as_much_as_is_told(embedding_shape):
    latents, labels = draw(embedding_shape)
    keys = jax.random.split(jax.random.key(1), NUMBER)
    moved, told = jax.jit(jax.vmap(lambda *x: translate(*x, share=0.5)))(keys, latents, labels)
    added = np.asarray(told - labels)
    np.testing.assert_array_equal(added[..., 2:], 0)
    offsets = added[..., :2].reshape(NUMBER, -1, 2) / TOLD
    np.testing.assert_allclose(offsets, offsets[:, :1].round() * np.ones_like(offsets), atol=1e-5)
    offsets = offsets[:, 0].round().astype(int)
    for before, after, (down, right) in zip(latents, moved, offsets):
        np.testing.assert_array_equal(after, move_plainly(before, down, right))
    # Half stay, and of the moved ones each of the 25 places has its share.
    assert set(offsets.ravel()) == set(range(-MOST_CELLS, MOST_CELLS + 1))
    stay = (offsets == 0).all(1).mean()
    assert abs(stay - (0.5 + 0.5 / 25)) < 4 * np.sqrt(0.25 / NUMBER)
    assert len({tuple(offset) for offset in offsets}) == 25


def test_a_cell_is_more_than_what_texts_have_there():
    """Else the network takes the numbers of a name that it has not seen for a move."""
    names = "apple", "pen", "open hands", "man rowing boat", "admission tickets", "planet", "face"
    numbers = load_text_encoder("use-parts")([f"{name}, Noto" for name in names])
    assert np.sqrt(np.mean(numbers**2)) == pytest.approx(1, rel=1e-3)
    assert np.abs(numbers[:, :2]).max() < TOLD / 2


def test_a_share_of_zero_moves_nothing():
    latents, labels = draw(number=20)
    keys = jax.random.split(jax.random.key(1), 20)
    chex.assert_trees_all_equal(
        jax.vmap(lambda *x: translate(*x, share=0.0))(keys, latents, labels), (latents, labels)
    )


def test_the_network_learns_from_moved_pictures_and_is_told_so_without_a_text_as_well():
    latents, labels = draw(number=64)
    batch = {"latents_mean": latents, "text_embeddings": labels}
    scale, process = LatentScale(10.0), ForwardProcess()
    options = dict(label_dropout=0.5, translation=1.0)
    drawn = corrupt(jax.random.key(0), batch, scale, process, **options)
    dropped = np.asarray((drawn.labels[:, 2:] == 0).all(1))
    assert 10 < dropped.sum() < 54
    kept = np.where(dropped[:, None], 0, labels)
    offsets = (np.asarray(drawn.labels - kept)[:, :2] / TOLD).round().astype(int)
    for before, after, (down, right) in zip(latents, drawn.latents, offsets):
        np.testing.assert_allclose(after, move_plainly(before, down, right) / 10, rtol=1e-6)
    assert offsets[dropped].any() and offsets[~dropped].any()
    # The noisy latents and the target are of the moved picture.
    signal = process.rule.signal_levels(drawn.noise_levels)[:, None, None, None]
    noise = (drawn.x_t - signal * drawn.latents) / drawn.noise_levels[:, None, None, None]
    assert jnp.std(noise) == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(drawn.target, drawn.latents)
