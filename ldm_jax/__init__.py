"""Text-to-image latent diffusion in JAX: captions and noise => pictures."""

from ldm_jax.gpu_memory import share_gpu_memory

share_gpu_memory()

from ldm_jax.blocks import (  # noqa: E402
    CrossAttention,
    DownBlock,
    ResidualBlock,
    SpatialAttention,
    UpBlock,
    sinusoidal_embedding,
)
from ldm_jax.conditioning import Condition  # noqa: E402
from ldm_jax.encoders import decode_latents, load_vae  # noqa: E402
from ldm_jax.noising import ForwardProcess, SignalRule, add_noise  # noqa: E402
from ldm_jax.plotting import imshow, plot_images  # noqa: E402
from ldm_jax.sampler import Denoiser, Diffuser, dynamic_thresholding, sample_seeds  # noqa: E402
from ldm_jax.text import load_text_encoder  # noqa: E402
from ldm_jax.training import TrainState, get_train_step  # noqa: E402
from ldm_jax.unet import get_network  # noqa: E402

__all__ = [
    "Condition",
    "CrossAttention",
    "Denoiser",
    "Diffuser",
    "DownBlock",
    "ForwardProcess",
    "ResidualBlock",
    "SignalRule",
    "SpatialAttention",
    "TrainState",
    "UpBlock",
    "add_noise",
    "decode_latents",
    "dynamic_thresholding",
    "get_network",
    "get_train_step",
    "imshow",
    "load_text_encoder",
    "load_vae",
    "plot_images",
    "sample_seeds",
    "sinusoidal_embedding",
]
