"""The VAE, PyTorch behind numpy: images (n H W 3) => raw latents (n h w c) => images.

Arrays are NHWC and float32 on the outside; NCHW exists only in here. No scaling factor is applied
in either direction (the 0.18215 of Stable Diffusion): `std_latent` does the scaling.
"""

import functools
import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from tqdm import tqdm

BUNDLED = {"bundled:emoji": "vae_emoji"}
DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
NEEDED = (
    "A VAE is a folder that must hold config.json and diffusion_pytorch_model.safetensors, as "
    "AutoencoderKL.save_pretrained writes them, or a name on the Hugging Face hub. Without a "
    "network: download these two files elsewhere into a folder, and give the folder's path."
)
# Pixels of the images of a batch: 64 of 128 x 128 on a GPU, 16 on a CPU. On an H200 Stable
# Diffusion's decoder in bfloat16 takes 42 ms for 64 at once and 64 ms in batches of 16; in
# channels_last 59 and 64 ms.
GPU_PIXELS, CPU_PIXELS = 2**20, 2**18
DTYPES = ("float32", "bfloat16", "float16")
# What decides the functions that the weights compute. Other fields of a config.json differ between
# releases of diffusers, or hold paths and scaling factors that are not applied here.
ENCODER_FIELDS = tuple(
    "act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block "
    "mid_block_add_attention norm_num_groups use_quant_conv".split()
)
DECODER_FIELDS = (*ENCODER_FIELDS, "out_channels", "up_block_types", "use_post_quant_conv")
# What follows the latents.
DECODER = ("decoder.", "post_quant_conv.")


class VAE:
    """A loaded autoencoder; `load_vae` makes it.

    Attributes:
        identity: name (what `load_vae` takes) and sha256 of architecture and encoder. Latents hang
            on nothing else: autoencoders that differ in the decoder, as stabilityai's sd-vae-ft-ema
            and sd-vae-ft-mse, share caches and checkpoints. The digest is the same on every
            machine, in every folder and file format; compare this, not the name.
        decoder_sha256: the same of the decoder, by which pictures are told apart.
        latent_channels, downsampling: c of the latents, and H / h.
        device: where PyTorch computes.
    """

    def __init__(self, name: str, model: Any, device: Any = "cpu", dtype: str = "float32"):
        import torch

        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
        # The digests are taken of the float32 weights, before they are rounded to `dtype`.
        self.identity = {"name": name, "sha256": _digest_half(model, ENCODER_FIELDS, False)}
        self.decoder_sha256 = _digest_half(model, DECODER_FIELDS, True)
        self.latent_channels: int = model.config.latent_channels
        self.downsampling: int = 2 ** (len(model.config.block_out_channels) - 1)
        self.device = torch.device(device)
        self._dtype = getattr(torch, dtype)
        model = torch.nn.Module.to(model, self.device, self._dtype)  # diffusers' `to` would warn
        self._model = model.eval().requires_grad_(False)

    def encode(
        self,
        images: Shaped[np.ndarray, "n H W 3"],
        batch_size: int | None = None,
        progress: bool = False,
    ) -> tuple[Float[np.ndarray, "n h w c"], Float[np.ndarray, "n h w c"]]:
        """Images => mean and standard deviation, exp(logvar / 2), of the raw latents, float32.

        Args:
            images: uint8, or floats in [-1, 1]; H and W divisible by `downsampling`.
            batch_size: images that are computed at once; the result does not depend on it. By
                default as many as have GPU_PIXELS or CPU_PIXELS together.
            progress: whether to show a progress bar.

        Raises:
            ValueError: for another rank, channel count, dtype, size or range.
        """
        import torch

        images = self._check_images(images)
        n, height, width = images.shape[:3]
        h, w, c = height // self.downsampling, width // self.downsampling, self.latent_channels

        def encode_batch(batch):
            x = batch.to(self._dtype)
            x = x / 127.5 - 1 if images.dtype == np.uint8 else x
            posterior = self._model.encode(x).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1).float()

        moments = np.empty((n, h, w, 2 * c), np.float32)
        self._run(encode_batch, images, moments, batch_size, progress, "encode")
        return np.ascontiguousarray(moments[..., :c]), np.ascontiguousarray(moments[..., c:])

    def decode(
        self,
        latents: Float[np.ndarray, "n h w c"],
        batch_size: int | None = None,
        progress: bool = False,
        as_bytes: bool = False,
    ) -> Shaped[np.ndarray, "n H W 3"]:
        """Raw latents => images, float32, clipped to [-1, 1].

        Args:
            latents: in the VAE's own scale; `decode_latents` takes normalised ones.
            batch_size, progress: as in `encode`.
            as_bytes: give the uint8 that `plotting.to_uint8` would, made on the device: a quarter
                of the transfer.

        Raises:
            ValueError: for another rank, channel count or dtype, for NaN or infinity, and for NaN
                in images that are to become bytes.
        """
        import torch

        latents = self.check_latents(latents)
        n, h, w, _ = latents.shape
        shape = (n, h * self.downsampling, w * self.downsampling, 3)
        images = np.empty(shape, np.uint8 if as_bytes else np.float32)

        def decode_batch(batch):
            x = self._model.decode(batch.to(self._dtype)).sample.float().clamp(-1, 1)
            if not as_bytes:
                return x
            if x.isnan().any():
                raise ValueError("images must be finite to become bytes, got NaN")
            return ((x + 1) * 127.5).round().to(torch.uint8)

        self._run(decode_batch, latents, images, batch_size, progress, "decode")
        return images

    def _run(self, function: Callable, inputs, outputs, batch_size, progress, label):
        """outputs[i] = function(inputs[i]), by batches, NHWC outside and NCHW for `function`."""
        import torch

        if batch_size is None:
            most = CPU_PIXELS if self.device.type == "cpu" else GPU_PIXELS
            of_one = max(math.prod(array.shape[1:3]) for array in (inputs, outputs))
            batch_size = max(most // max(of_one, 1), 1)
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        done = 0
        with tqdm(total=len(inputs), desc=label, unit="image", disable=not progress) as bar:
            while done < len(inputs):
                batch = inputs[done : done + batch_size]
                try:
                    with torch.inference_mode():
                        x = torch.tensor(batch, device=self.device).permute(0, 3, 1, 2)
                        # Into the order of `outputs` on the device, which is faster at it.
                        y = function(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()
                except torch.cuda.OutOfMemoryError:
                    # JAX may have left little room; a smaller batch gives the same result.
                    if len(batch) == 1:
                        raise
                    batch_size = len(batch) // 2
                    continue
                outputs[done : done + len(batch)] = y
                done += len(batch)
                bar.update(len(batch))

    def _check_images(self, images) -> np.ndarray:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must have shape (n, H, W, 3), got {images.shape}")
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise ValueError(f"images must be uint8 or floats in [-1, 1], got {images.dtype}")
        height, width = images.shape[1:3]
        if 0 in (height, width) or height % self.downsampling or width % self.downsampling:
            needed = f"divisible by {self.downsampling} (the VAE's downsampling)"
            raise ValueError(f"height and width must be {needed}, got {height}x{width}")
        if images.dtype != np.uint8 and images.size:
            low, high = images.min(), images.max()
            if not (low >= -1.001 and high <= 1.001):  # NaN fails as well
                raise ValueError(f"float images must lie in [-1, 1], got [{low:.4g}, {high:.4g}]")
        return images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)

    def check_latents(self, latents: Any) -> Float[np.ndarray, "n h w c"]:
        """The latents as float32, if this VAE can decode them; ValueError otherwise."""
        latents = np.asarray(latents)
        if latents.ndim != 4 or latents.shape[-1] != self.latent_channels:
            needed = f"(n, h, w, {self.latent_channels})"
            raise ValueError(f"latents must have shape {needed}, got {latents.shape}")
        if latents.dtype.kind != "f":
            raise ValueError(f"latents must be floats, got {latents.dtype}")
        if not np.isfinite(latents).all():
            raise ValueError("latents must be finite, got NaN or infinity")
        return latents.astype(np.float32, copy=False)


def load_vae(name: str | Path, device: Any = None, dtype: str = "float32") -> VAE:
    """Loads a diffusers `AutoencoderKL`.

    Args:
        name: a bundled VAE ("bundled:emoji"), a folder that `AutoencoderKL.save_pretrained` wrote,
            or a name on the Hugging Face hub ("stabilityai/sd-vae-ft-ema").
        device: of PyTorch; CUDA if there is any, else the CPU.
        dtype: of the computation, whatever the file holds. "float32" gives the same result
            everywhere up to rounding; "bfloat16" and "float16" save time and memory on a GPU.

    Raises:
        FileNotFoundError: if a folder is missing.
        OSError: if the VAE cannot be loaded, with the reason.
        ValueError: for an unknown bundled name, and for weights that lack part of the network.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    source, known_as = _find(str(name))
    options: Any = dict(low_cpu_mem_usage=False, output_loading_info=True)
    try:
        found: Any = AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise OSError(f"cannot load a VAE from {source}: {error}\n{NEEDED}") from error
    model, missing = found[0], sorted(found[1]["missing_keys"])
    if missing:
        lacking = f"none for {len(missing)} of its arrays: {', '.join(missing[:3])} ..."
        raise ValueError(f"the weights of {source} must fill an AutoencoderKL, got {lacking}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return VAE(known_as, model, device, dtype)


def decode_latents(
    latents: Float[np.ndarray, "n h w c"],
    std_latent: float | Float[np.ndarray, " c"],
    vae: VAE | str = DEFAULT_VAE,
    mean_latent: float | Float[np.ndarray, " c"] = 0.0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "n H W 3"]:
    """Normalised latents => images in [-1, 1]: decode(latents std_latent + mean_latent).

    Args:
        latents: as the denoiser gives them, (raw - mean_latent) / std_latent.
        std_latent: one number, or one for each channel.
        vae: from `load_vae`, or a name for it, by which the VAE is loaded once and kept.
        mean_latent: one number, or one for each channel.
        batch_size, progress: as in `VAE.encode`.

    Raises:
        ValueError: for statistics of another shape, and what `VAE.decode` refuses.
    """
    if isinstance(vae, str):
        vae = _load_once(vae)
    scale, shift = np.asarray(std_latent, np.float32), np.asarray(mean_latent, np.float32)
    for label, value in (("std_latent", scale), ("mean_latent", shift)):
        if value.shape not in ((), (vae.latent_channels,)):
            needed = f"a number or of shape ({vae.latent_channels},)"
            raise ValueError(f"{label} must be {needed}, got shape {value.shape}")
    return vae.decode(vae.check_latents(latents) * scale + shift, batch_size, progress)


_load_once = functools.lru_cache(maxsize=1)(load_vae)


def _find(name: str) -> tuple[str, str]:
    """Name => what diffusers loads from, and the name to be known by."""
    if name.startswith("bundled:"):
        if name not in BUNDLED:
            raise ValueError(f"bundled VAEs are {', '.join(BUNDLED)}, got {name!r}")
        weights = importlib.resources.files("ldm_jax") / "weights" / BUNDLED[name]
        if not weights.is_dir():
            raise FileNotFoundError(f"{weights}: {name} is missing. {NEEDED}")
        return str(weights), name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder), str(folder.resolve())  # found again from any working directory
    if HUB_NAME.fullmatch(name):
        return name, name
    raise FileNotFoundError(f"{name}: there is no such folder. {NEEDED}")


def _digest_half(model: Any, fields: tuple[str, ...], behind_latents: bool) -> str:
    named = model.named_parameters()
    weights = [weight for key, weight in named if key.startswith(DECODER) == behind_latents]
    return digest_weights(json.dumps([model.config[field] for field in fields]), weights)


def digest_weights(header: str, weights: Iterable[Any]) -> str:
    """sha256 over a header and PyTorch weights, as little-endian float32.

    Weights are taken by content, not by name or order: libraries rename them between releases.
    """
    arrays = (weight.detach().float().cpu().numpy().astype("<f4") for weight in weights)
    digests = (hashlib.sha256(f"{a.shape}".encode() + a.tobytes()).hexdigest() for a in arrays)
    return hashlib.sha256((header + "".join(sorted(digests))).encode()).hexdigest()
