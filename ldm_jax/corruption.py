"""A batch, a key => what the network learns from: noisy latents, levels, labels and the target."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ldm_jax.augmentation import translate
from ldm_jax.latents import LatentScale, draw_latents
from ldm_jax.noising import ForwardProcess, draw_noise
from ldm_jax.norms import sample_keys


class Corrupted(NamedTuple):
    """What the network learns from; `target` is what it should put out."""

    target: Float[Array, "b h w c"]
    latents: Float[Array, "b h w c"]
    x_t: Float[Array, "b h w c"]
    noise_levels: Float[Array, " b"]
    labels: Float[Array, "b *n e"]


def corrupt(
    rng: PRNGKeyArray,
    batch: Mapping,
    scale: LatentScale,
    process: ForwardProcess,
    label_dropout: float,
    axis_name: Any = None,
    translation: float = 0.0,
) -> Corrupted:
    """Draws latents, noise levels and noise, drops labels and moves pictures.

    Each sample has a key of its own, by its place in the whole batch: its noise is the same bit for
    bit however the batch is spread over devices.

    Args:
        rng: key of the step, consumed.
        batch: see `training.get_loss`.
        scale, process, label_dropout: see `training.get_train_step`.
        axis_name: the axes over which the batch is spread by hand, see norms.py.
        translation: probability of a picture being moved, see augmentation.py.
    """

    def corrupt_one(key, sample):
        # As a batch of one, which is what the functions below take.
        sample = {name: x[None].astype(jnp.float32) for name, x in sample.items()}
        latent_key, noise_key, drop_key, *more = jax.random.split(key, 4 if translation else 3)
        latents = draw_latents(latent_key, sample["latents_mean"], sample.get("latents_std"))
        latents = scale.normalise(latents)
        labels = drop_labels(drop_key, sample["text_embeddings"], label_dropout)
        if translation:
            moved = translate(more[0], latents[0], labels[0], translation)
            latents, labels = (x[None] for x in moved)
        noise, noise_levels = draw_noise(noise_key, latents, process)
        x_t = process.rule.mix(latents, noise, noise_levels)
        target = process.get_target(latents, noise, noise_levels)
        return Corrupted(target[0], latents[0], x_t[0], noise_levels[0], labels[0])

    keys = sample_keys(rng, len(batch["latents_mean"]), axis_name)
    return jax.vmap(corrupt_one)(keys, dict(batch))


def drop_labels(
    rng: PRNGKeyArray, text_embeddings: Float[Array, "b *n e"], rate: float
) -> Float[Array, "b *n e"]:
    """Replaces whole embeddings by zeros, "no text", with probability `rate`. Consumes the key."""
    keep_shape = (text_embeddings.shape[0],) + (1,) * (text_embeddings.ndim - 1)
    keep = jax.random.bernoulli(rng, 1 - rate, keep_shape)
    return jnp.where(keep, text_embeddings, 0.0)
