"""Small encoders and pictures with known results for the tests of latent caches; and a GPU."""

import json
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax import tiles
from ldm_jax.encoding import encode_pictures
from ldm_jax.pictures import Picture


class MeanVAE:
    """Stands in for a VAE: the mean of each block of 8 x 8 pixels and two channels of its own."""

    latent_channels = 3
    downsampling = 8

    def __init__(self, name="mean", sha256="aa", fail_at=None):
        self.identity = dict(name=name, sha256=sha256)
        self.calls, self.fail_at = 0, fail_at

    def encode(self, images, batch_size=64, progress=False):
        assert images.dtype == np.uint8
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the power went off")
        n, height, width, _ = images.shape
        blocks = images.astype(np.float32).reshape(n, height // 8, 8, width // 8, 8, 3) / 127.5 - 1
        mean = blocks.mean((2, 4))
        return mean, 0.1 + mean**2


class LetterEncoder:
    """Stands in for a text encoder: counts of the letters a, b, c, d."""

    name, shape = "letters", (4,)

    def __init__(self, sha256="bb"):
        self.identity = dict(name="letters", sha256=sha256)
        self.seen = []

    def __call__(self, captions, progress=False):
        self.seen += captions
        counts = [[text.count(letter) for letter in "abcd"] for text in captions]
        return np.array(counts, np.float32)


def make_pictures(folder, n=20, broken=()):
    """Noise with one or two captions; all the same "abba", and another one for odd pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(n):
        path = folder / f"{i:02d}.png"
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])
        captions = ("abba", "d" * i) if i % 2 else ("abba",)
        split = "valid" if i in (3, 4) else "test" if i == 5 else "train"
        pictures.append(Picture(path, captions, split, f"concept {i}", "noise"))
    return pictures


def encode(tmp_path, cache="cache", pictures=None, vae=None, text=None, chunk_size=6, **options):
    source = tmp_path / "pictures"
    pictures = make_pictures(source) if pictures is None else pictures
    vae, text = vae or MeanVAE(), text or LetterEncoder()
    options = dict(image_size=16, chunk_size=chunk_size) | options
    return encode_pictures(pictures, tmp_path / cache, vae, text, source, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def create_clip(folder):
    """Writes a CLIP with letters for tokens, 8 of them at most; the model and its vocabulary."""
    import torch
    import transformers

    letters = "abcdert"
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=0)
    config = transformers.CLIPConfig(
        text_config=dict(vocab_size=len(words), max_position_embeddings=8, **small, **ends),
        vision_config=dict(image_size=8, patch_size=4, **small),
        projection_dim=12,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model, vocabulary


needs_triton = pytest.mark.skipif(tiles.triton is None, reason="a JAX without Pallas' Triton")


def as_on_a_gpu(monkeypatch):
    """A process with a GPU, as far as it can be told before anything is compiled."""
    monkeypatch.setattr(tiles, "are_possible", lambda: True)
    monkeypatch.setattr(tiles, "interpret", lambda: False)


def lower_for(run, arguments, platform="cuda"):
    """The text of the program for a platform."""
    with _pretend_gpu():
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def count_triton_calls(program):
    """Calls of kernels by Triton in what `lower_for` gives."""
    return program.count("__gpu$xla.gpu.triton")


def count_lowered(run, arguments, platform="cuda"):
    """Calls of kernels by Triton in the program for a platform."""
    return count_triton_calls(lower_for(run, arguments, platform))


def _pretend_gpu():
    """To lower for: JAX 0.11 wants to know which one, 0.10 takes any."""
    if jax.__version_info__ < (0, 11):
        return nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("gpu",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
