"""Choices of network and training work together, from text tokens to a checkpoint and a picture."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import SCALE, create_meta

from configs import seed
from ldm_jax import checkpoint, models, sampler, training
from ldm_jax.noising import get_process
from ldm_jax.text import load_text_encoder
from ldm_jax.unet import get_network

SMALL = {"latent_image_size": 4, "block_depth": 1, "widths": (16, 32), "text_features": 32}
STEPS = 100
HEADS = {"heads": 2, "scaled": True, "key_fraction": 4, "dropout": 0.2}
COMBINATIONS = {
    "adaptive batch norm": (
        {"conditioning": "adaptive"},
        {"target": "velocity", "max_angle": 1.57},
        {"loss": "mse", "loss_weighting": "min_snr"},
    ),
    "adaptive rms norm of tokens": (
        HEADS | {"conditioning": "adaptive", "norm": "rms", "dtype": "bfloat16"},
        {"target": "velocity", "noise_law": "log_normal", "mixture": "convex"},
        {"loss": "huber", "loss_weighting": "min_snr"},
    ),
    "adaptive group norm": (
        HEADS | {"conditioning": "adaptive", "norm": "group", "remat": True},
        {"noise_law": "log_normal"},
        {"loss": "huber", "accumulate": 2},
    ),
    "rms norm of tokens": (
        HEADS | {"norm": "rms", "remat": True},
        {"noise_law": "uniform", "max_angle": 1.57},
        {"loss": "mse", "loss_weighting": "min_snr", "accumulate": 2},
    ),
}


@pytest.fixture(scope="module")
def embeddings():
    """Of two captions, by the number of axes: one vector each, or MiniLM's states."""
    tokens = load_text_encoder("minilm-tokens")(["a red apple", "the moon at night"])
    assert tokens.ndim == 3 and np.any(tokens[1] != 0, axis=-1).sum() > 4
    return {"tokens": tokens, "vector": tokens[:, 0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_learns_is_saved_and_draws(name, embeddings, tmp_path):
    network_changes, noising_changes, training_changes = COMBINATIONS[name]
    text = embeddings["tokens" if "tokens" in name else "vector"]
    config = seed.get_config().to_dict()
    fields = config["network"] | SMALL | {"emb_size": text.shape[-1]} | network_changes
    noising = config["noising"] | noising_changes
    network, process = get_network(**fields), get_process(**noising)

    # One caption is bright latents, the other dark ones.
    optimizer = training.get_optimizer(5e-3, steps=STEPS)
    brightness = np.repeat(np.float32([0.8, -0.8]), 8)[:, None, None, None]
    clean = np.broadcast_to(brightness, (16, 4, 4, 4))
    batch = {
        "latents_mean": np.asarray(SCALE.restore(clean)),
        "text_embeddings": np.repeat(text, 8, axis=0),
    }
    state = jax.jit(training.create_train_state, static_argnums=(1, 2, 3, 4))(
        jax.random.key(0), network, optimizer, (4, 4, 4), text.shape[1:]
    )
    options = config["training"] | {"label_dropout": 0.0, "ema_decay": 0.5} | training_changes
    train_step = training.get_train_step(network, optimizer, SCALE, process, **options)
    eval_step = training.get_eval_step(network, SCALE, process)

    def get_loss_by_batch(state):
        # With the batch's statistics: running ones of so few samples fit no other noise.
        loss_fn = jax.jit(training.get_loss(network, SCALE, process, train=True))
        return loss_fn(state.ema_params, state.ema_batch_stats, jax.random.key(2), batch)[0]

    evaluate = get_loss_by_batch
    if network.norm != "batch":
        evaluate = lambda state: eval_step(state, jax.random.key(2), batch)  # noqa: E731
    before, losses = evaluate(state), []
    for _ in range(STEPS):
        state, metrics = train_step(state, jax.random.key(1), batch)
        losses.append(metrics["loss"])
    assert np.isfinite(losses).all() and np.isfinite(metrics["grad_norm"])
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert evaluate(state) < 0.6 * before

    # The checkpoint alone says how to draw.
    meta = create_meta(
        network=fields,
        noising=noising,
        latent_shape=(4, 4, 4),
        embedding_shape=text.shape[1:],
    )
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_checkpoint(manager, state, meta)
    denoiser = models.load_model(tmp_path).denoiser
    assert denoiser == sampler.Denoiser(network, denoiser.variables, process)
    settings = {"mixture": noising["mixture"], "class_guidance": 1.0, "schedule": "angle"}
    diffuser = sampler.get_diffuser(denoiser, diffusion_steps=6, **settings)
    latents = diffuser.reverse_diffusion(sampler.sample_seeds([3, 4], (4, 4, 4)), jnp.asarray(text))
    chex.assert_shape(latents, (2, 4, 4, 4))
    chex.assert_tree_all_finite(latents)
    assert np.mean(latents[0]) > np.mean(latents[1]) + 0.5
