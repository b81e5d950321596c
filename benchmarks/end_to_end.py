"""Captions => PNG files, by the library's own stages, and where the seconds go.

    python -m benchmarks.end_to_end [--num=64] [--dtype=bfloat16] [--vae_dtype=float32]
    python -m benchmarks.end_to_end --tiny

The text encoder is Universal Sentence Encoder, where CLIP would need to be downloaded, the denoiser
the network of configs/seed.py (of configs/tiny.py with --tiny), the VAE has the architecture of
Stable Diffusion's and goes through the bridge that sample.py uses. Denoiser and VAE have random
weights: the pictures are noise, which is the hardest for PNG. Prints a markdown table of the
medians of `repeats` calls after a first one, each with captions of its own.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from configs import seed, tiny
from ldm_jax.encoders import VAE, load_vae
from ldm_jax.initial import init_network
from ldm_jax.latents import LatentScale
from ldm_jax.noising import get_process
from ldm_jax.plotting import save_pngs
from ldm_jax.sampler import Denoiser, Diffuser, get_diffuser, sample_seeds
from ldm_jax.text import TextEncoder, load_text_encoder
from ldm_jax.unet import get_network

STAGES = ("text", "sampling", "decoding", "PNG")
SCALE = LatentScale(2.5)


class Pipeline(NamedTuple):
    """All that turns captions into pictures."""

    text_encoder: TextEncoder
    diffuser: Diffuser
    vae: VAE
    latent_shape: tuple[int, ...]


def create_pipeline(config: Any, vae: VAE, dtype: str) -> Pipeline:
    """The config's network with random weights, and the encoders."""
    fields = config.network.to_dict() | {"dtype": dtype}
    network = get_network(**fields)
    latent_shape = (fields["latent_image_size"],) * 2 + (fields["latent_channels"],)
    init_key, out_key = jax.random.split(jax.random.key(0))
    create = partial(
        init_network, network, latent_shape=latent_shape, embedding_shape=(fields["emb_size"],)
    )
    variables = jax.jit(create)(init_key)
    # The last kernel starts as zeros, which would give a grey picture.
    kernel = variables["params"]["conv_out"]["kernel"]
    variables["params"]["conv_out"]["kernel"] = jax.random.normal(out_key, kernel.shape)
    denoiser = Denoiser(network, variables, get_process(**config.noising.to_dict()))
    diffuser = get_diffuser(denoiser, **config.sampling.to_dict())
    return Pipeline(load_text_encoder("use"), diffuser, vae, latent_shape)


def create_vae(folder: Path, widths: tuple[int, ...], dtype: str) -> VAE:
    """A VAE of Stable Diffusion's kind with random weights, through a folder as users have it."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )
    model.save_pretrained(folder)
    return load_vae(folder, dtype=dtype)


def draw(pipeline: Pipeline, captions: list[str], folder: Path) -> dict[str, float]:
    """Seconds of each stage from these captions to PNG files in the folder."""
    marks = [time.perf_counter()]

    def mark():
        marks.append(time.perf_counter())

    labels = pipeline.text_encoder(captions)
    mark()
    noise = sample_seeds(range(len(captions)), pipeline.latent_shape)
    latents = SCALE.restore(pipeline.diffuser.reverse_diffusion(noise, labels))
    latents = np.asarray(latents)  # Waits for the device.
    mark()
    images = pipeline.vae.decode(latents, as_bytes=True)
    mark()
    paths = [folder / f"{i:04d}.png" for i in range(len(captions))]
    save_pngs(paths, images, [{"prompt": caption} for caption in captions])
    mark()
    return dict(zip(STAGES, np.diff(marks).tolist(), strict=True))


def run(pipeline: Pipeline, num: int, repeats: int, folder: Path) -> dict[str, float]:
    """Draws `num` pictures again and again, and prints the table of medians."""
    rounds = []
    for k in range(repeats + 1):
        captions = [f"picture {i} of round {k}, a red apple on a table" for i in range(num)]
        rounds.append(draw(pipeline, captions, folder))
    medians = {stage: statistics.median(r[stage] for r in rounds[1:]) for stage in STAGES}
    total = sum(medians.values())
    device, torch_device = jax.devices()[0].device_kind, pipeline.vae.device
    print(f"{num} pictures, median of {repeats}; JAX on {device}, the VAE on {torch_device}\n")
    print("| stage | s | share | first call, s |\n|---|---:|---:|---:|")
    for stage, seconds in medians.items():
        print(f"| {stage} | {seconds:.4f} | {seconds / total:.1%} | {rounds[0][stage]:.2f} |")
    print(f"| total | {total:.4f} | 100.0% | {sum(rounds[0].values()):.2f} |")
    return medians


def main(argv):
    f = flags.FLAGS
    config = tiny.get_config() if f.tiny else seed.get_config()
    widths = (32, 32, 32, 32) if f.tiny else (128, 256, 512, 512)
    with tempfile.TemporaryDirectory() as folder:
        vae = create_vae(Path(folder) / "vae", widths, f.vae_dtype)
        pipeline = create_pipeline(config, vae, f.dtype or config.network.dtype)
        run(pipeline, f.num, f.repeats, Path(f.out or folder).expanduser())


if __name__ == "__main__":
    flags.DEFINE_bool("tiny", False, "networks of toy size")
    flags.DEFINE_integer("num", 64, "pictures of a call", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "calls that are measured", lower_bound=1)
    flags.DEFINE_string("dtype", "", "of the denoiser's computation; default: the config's")
    flags.DEFINE_string("vae_dtype", "float32", "of the VAE's computation")
    flags.DEFINE_string("out", "", "folder for the PNG files; default: a temporary one")
    app.run(main)
