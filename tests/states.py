"""A small train state and its meta, for the tests of what is saved."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import checkpoint, meta, training
from ldm_jax.latents import LatentScale
from ldm_jax.unet import get_network

FIELDS = {"latent_image_size": 8, "block_depth": 1, "emb_size": 6, "widths": (8, 16)}
NOISING = {"mixture": "variance_preserving", "noise_law": "uniform", "max_angle": 1.5}
SCALE = LatentScale(np.float32([2, 3, 4, 5]), np.float32([0, 1, 0, -1]))


def create_meta(**changes):
    fields = {
        "network": FIELDS,
        "noising": NOISING,
        "sampling": {"class_guidance": 2.0, "diffusion_steps": 4},
        "scale": SCALE,
        "vae": {"name": "some/vae", "sha256": "ab"},
        "text_encoder": {"name": "use", "sha256": "cd"},
        "latent_shape": (8, 8, 4),
        "embedding_shape": (6,),
    }
    return meta.create_meta(**{**fields, **changes})


def create_state(step=7):
    """A train state whose averaged weights differ from the weights."""
    network = get_network(**FIELDS)
    optimizer = training.get_optimizer(steps=10)
    state = jax.jit(training.create_train_state, static_argnums=(1, 2, 3, 4))(
        jax.random.key(0), network, optimizer, (8, 8, 4), (6,)
    )
    ema = jax.tree.map(lambda x: x + 0.25, state.ema_params)
    return state.replace(step=jnp.int32(step), ema_params=ema)


def create_small_state(step=7):
    """A few tensors of all kinds in the place of weights: enough for what is not about networks."""
    rng = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(8, 64, 32)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=8), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16),
    }
    return training.TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats={"flags": jnp.asarray([True, False, True])},
        ema_params=jax.tree.map(jnp.copy, params),
        ema_batch_stats={"count": jnp.uint32(3)},
        opt_state=training.get_optimizer(steps=10).init(params),
    )


def at_step(state, step):
    """The state with another number, its averaged weights moved by as much."""
    ema = jax.tree.map(lambda x: x + step, state.ema_params)
    return state.replace(step=jnp.int32(step), ema_params=ema)


def target_of(state, sharding=None):
    """What restore needs to know: shapes, dtypes, shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def save_run(folder, state, losses):
    """A run's folder with a checkpoint of the state at each step, with its held-out loss."""
    with checkpoint.open_checkpoints(folder / "checkpoints") as manager:
        for step, loss in losses.items():
            checkpoint.save_checkpoint(manager, at_step(state, step), create_meta(), loss)
    return folder
