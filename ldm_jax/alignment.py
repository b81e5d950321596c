"""Image features, text embeddings => one space of 256 numbers, where a cosine says how well a
picture goes with a caption; the same by a whole CLIP from a local folder; and of several pictures
the one that goes best.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from ldm_jax.features import load_extractor
from ldm_jax.text import load_text_encoder

WIDTH = 256
HEAD_FILE = "head.safetensors"
HEAD_TITLE = "the alignment head"
BUNDLED = Path(__file__).parent / "weights" / "alignment"
CLIP_BATCH_SIZE = 32
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Head(NamedTuple):
    """Two linear maps into the common space, and what their inputs must come from.

    Attributes:
        params: image_kernel (d 256), image_bias (256), text_kernel (e 256), text_bias (256).
        features: name of the extractor, see features.py.
        text_encoder: name of the text encoder.
    """

    params: dict[str, Float[np.ndarray, "..."]]
    features: str
    text_encoder: str

    def embed_images(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 256"]:
        """Features of pictures in the common space, of length 1."""
        return np.asarray(project(self.params, "image", features))

    def embed_captions(self, embeddings: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n 256"]:
        """Text embeddings in the common space, of length 1."""
        return np.asarray(project(self.params, "text", embeddings))


def project(params: Any, side: str, x: Float[Any, "n d"]) -> Float[Array, "n 256"]:
    """x kernel + bias, divided by its length; `side` is "image" or "text"."""
    bias = params[f"{side}_bias"]
    z = jnp.asarray(x) @ params[f"{side}_kernel"] + bias[None]
    return z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-6)


def contrastive_loss(
    params: Any,
    features: Float[Array, "b d"],
    embeddings: Float[Array, "b e"],
    same: Float[Array, "b b"],
) -> Float[Array, ""]:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3) of cosines times exp(params["scale"]).

    Args:
        params: of a `Head`, and "scale".
        features: of the pictures.
        embeddings: of their captions, row by row.
        same: 1 where two rows show one concept; such rows are not held against each other.
    """
    images, texts = project(params, "image", features), project(params, "text", embeddings)
    logits = jnp.exp(params["scale"]) * images @ texts.T
    logits = jnp.where((same > 0) & ~jnp.eye(len(logits), dtype=bool), -jnp.inf, logits)
    rows, columns = (jnp.diagonal(jax.nn.log_softmax(logits, axis)) for axis in (0, 1))
    return -0.5 * (rows.mean() + columns.mean())


def load_head(folder: str | os.PathLike = BUNDLED) -> Head | None:
    """The head in a folder, or None if there is none."""
    from safetensors import safe_open

    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        return None
    with safe_open(path, "numpy") as file:
        params = {key: file.get_tensor(key).astype(np.float32) for key in file.keys()}
        about = file.metadata()
    return Head(params, about["features"], about["text_encoder"])


def save_head(folder: str | os.PathLike, head: Head) -> Path:
    """Writes a head, rounded to float16, as HEAD_FILE."""
    from safetensors.numpy import save_file

    path = Path(folder) / HEAD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.asarray(value, np.float16) for key, value in head.params.items()}
    about = {"features": head.features, "text_encoder": head.text_encoder}
    save_file(tensors, path, metadata=about)
    return path


def load_alignment_score(folder: str | os.PathLike = BUNDLED) -> Callable:
    """The cosine of picture and caption in the space of a head, in [-1, 1].

    Returns:
        A function of images, uint8 (n H W 3), and as many captions, to n scores.

    Raises:
        FileNotFoundError: if the folder holds no head.
        ImportError: if a package of its feature network is missing.
    """
    head = load_head(folder)
    if head is None:
        raise FileNotFoundError(f"no alignment head ({HEAD_FILE}) in {folder}")
    extractor, encode = load_extractor(head.features), load_text_encoder(head.text_encoder)

    def score(images: UInt8[np.ndarray, "n H W 3"], captions: Sequence[str]) -> np.ndarray:
        different, own = np.unique(captions, return_inverse=True)
        embeddings = head.embed_captions(encode(different.tolist()))[own]
        return np.sum(head.embed_images(extractor(images)) * embeddings, axis=1)

    return score


def load_judge(best_of: int, clip: str | os.PathLike | None = None) -> Callable | None:
    """Images, captions => cosines by which the best of several candidates is chosen.

    Args:
        best_of: how many candidates; of 1 there is nothing to choose, and no judge.
        clip: folder of a CLIP; None: the bundled head, which knows emoji.

    Raises:
        ValueError: for a `best_of` below 1 or, with a CLIP, 2.
        OSError, ImportError: see `load_clip_score` and `load_alignment_score`.
    """
    if best_of < 1 or (clip and best_of == 1):
        raise ValueError(f"best_of must be at least 1, and 2 with a judge, got {best_of}")
    if best_of == 1:
        return None
    return load_clip_score(clip, clamped=False) if clip else load_alignment_score()


def decode_best(
    decode: Callable,
    judge: Callable | None,
    latents: Float[np.ndarray, "n h w c"],
    captions: Sequence[str],
    best_of: int,
    batch_size: int,
) -> tuple[UInt8[np.ndarray, "n/best_of H W 3"], Int[np.ndarray, " n/best_of"]]:
    """Pictures of latents, of every `best_of` in a row the one that goes best with its caption.

    Ramesh et al. 2021, section 2.6. No more than `batch_size` pictures that are not chosen are held
    at once, or `best_of`.

    Args:
        decode: latents => images, uint8.
        judge: from `load_judge`; None, with a `best_of` of 1: every picture is kept.
        latents: in the decoder's own scale.
        captions: of each of them.

    Returns:
        The pictures, and the row of each.
    """
    images, rows = [], []
    size = max(batch_size // best_of, 1) * best_of
    for i in range(0, len(latents), size):
        part = decode(latents[i : i + size])
        best = np.arange(len(part))
        if judge:
            scores = judge(part, captions[i : i + size]).reshape(-1, best_of)
            best = best[::best_of] + scores.argmax(1)
        images.append(part[best])
        rows.append(i + best)
    return np.concatenate(images), np.concatenate(rows)


def load_clip_score(
    folder: str | os.PathLike, device: Any = None, clamped: bool = True
) -> Callable:
    """CLIP score (Hessel et al. 2021, times 100 / 2.5): 100 max(cosine, 0) of picture and caption.

    Args:
        folder: a whole CLIP as `CLIPModel.save_pretrained` writes it, with its tokenizer's files;
            no hub is asked.
        device: of PyTorch; CUDA if there is any, else the CPU.
        clamped: whether negative cosines count as 0.

    Returns:
        A function of images, uint8 (n H W 3), and as many captions, to n scores.

    Raises:
        OSError: if the folder is missing or holds no CLIP.
        ImportError: if transformers is missing.
    """
    import torch

    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        needed = 'pip install -e ".[clip]"'
        raise ImportError(f"the CLIP score needs a package ({error}): {needed}") from error
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder of a CLIP: {path}")
    try:
        model: Any = CLIPModel.from_pretrained(path, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"cannot load a CLIP from {path}: {error}") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.float().eval().to(device)
    size = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))

    @torch.inference_mode()
    def score(images: UInt8[np.ndarray, "n H W 3"], captions: Sequence[str]) -> np.ndarray:
        scores = []
        for i in range(0, len(images), CLIP_BATCH_SIZE):
            part = slice(i, i + CLIP_BATCH_SIZE)
            x = torch.from_numpy(images[part]).to(device).permute(0, 3, 1, 2) / 255.0
            options: dict[str, Any] = dict(mode="bicubic", antialias=True, align_corners=False)
            x = torch.nn.functional.interpolate(x, (size, size), **options).clamp(0.0, 1.0)
            options = dict(padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = tokenizer(list(captions[part]), **options).to(device)
            mask = tokens["attention_mask"]
            found = model(tokens["input_ids"], (x - mean) / std, attention_mask=mask)
            cosines = (found.image_embeds * found.text_embeds).sum(1)  # both of length 1
            cosines = cosines.clamp(min=0.0) if clamped else cosines
            scores.append(100.0 * cosines.cpu().numpy())
        return np.concatenate(scores)

    return score
