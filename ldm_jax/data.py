"""A latent cache folder => batches of latent moments and text embeddings.

The folder is written once by `encoding.py` and read by whole batches from memory maps:

    manifest.json        which encoders, shapes, counts, statistics, checksums
    latents_mean.npy     float16 (n h w c), raw VAE scale
    latents_std.npy      float16 (n h w c), the VAE's posterior; absent if only latents were given
    text_embeddings.npy  float16 (m ...), one for each caption of each picture
    picture_index.npy    int32 (m), the picture of each example
    split.npy            uint8 (m), index into `pictures.SPLITS`
    examples.jsonl       m lines: caption, file, split, concept, style
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ldm_jax.cache import cache_home
from ldm_jax.pictures import SPLITS

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SOURCES = ("emoji", "folder", "npy")


@functools.lru_cache(maxsize=4)  # Two epochs of two splits.
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
    order.flags.writeable = False
    return order


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCache:
    """An open latent cache; an example is one caption of one picture."""

    folder: Path
    manifest: Mapping
    arrays: Mapping[str, np.ndarray]  # memory maps, by file name without .npy

    @property
    def std_latent(self) -> float:
        """2.5 standard deviations of all training latents, as they are drawn in training."""
        return self.manifest["std_latent"]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return tuple(self.manifest["latent_shape"])

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """(e,) for pooled text embeddings, (tokens, e) for token states."""
        return tuple(self.manifest["embedding_shape"])

    def num_examples(self, split: str = "train") -> int:
        """Counts the examples of a split."""
        return len(self.examples(split))

    def examples(self, split: str = "train") -> Int[np.ndarray, " m"]:
        """The indices of a split's examples, in the order of the source."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        return self._by_split[split]

    @functools.cached_property
    def _by_split(self) -> dict[str, np.ndarray]:
        codes = self.arrays["split"]
        return {split: np.flatnonzero(codes == i) for i, split in enumerate(SPLITS)}

    @functools.cached_property
    def _records(self) -> list[dict]:
        text = (self.folder / "examples.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    def records(self, indices: Sequence[int] | np.ndarray) -> list[dict]:
        """What is known of some examples: caption, file, split, concept, style."""
        return [self._records[i] for i in indices]

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The captions of some examples."""
        return [record["caption"] for record in self.records(indices)]

    def take(
        self, indices: Sequence[int] | np.ndarray, dtype: np.typing.DTypeLike = np.float32
    ) -> dict[str, Float[np.ndarray, "b ..."]]:
        """Reads some examples, in the order given.

        Args:
            indices: which examples.
            dtype: of the result; float16 is as it is stored, and half as much to move.

        Returns:
            `latents_mean` and `text_embeddings`, and `latents_std` if the cache holds it.
        """
        pictures = self.arrays["picture_index"][indices]
        rows = {"latents_mean": pictures, "latents_std": pictures, "text_embeddings": indices}
        return {
            name: self.arrays[name][row].astype(dtype, copy=False)
            for name, row in rows.items()
            if name in self.arrays
        }

    def batch_indices(
        self, seed: int, k: int, batch_size: int, split: str = "train"
    ) -> Int[np.ndarray, " b"]:
        """Examples of batch k, a pure function of (seed, k) that goes on over the ends of epochs.

        Epoch e visits the split in the order of the permutation that Philox draws with the key
        [seed, e]; batch k is places k batch_size to (k + 1) batch_size of all epochs in a row.
        """
        examples = self.examples(split)
        if not len(examples):
            raise ValueError(
                f"split {split!r} must have examples, {self.folder} has {self.manifest['counts']}"
            )
        if min(seed, k, batch_size - 1) < 0:
            raise ValueError(
                f"requires seed >= 0, k >= 0 and batch_size >= 1, got {seed=} {k=} {batch_size=}"
            )
        place, end = k * batch_size, (k + 1) * batch_size
        parts = []
        while place < end:
            epoch, start = divmod(place, len(examples))
            parts.append(_permutation(seed, epoch, len(examples))[start : start + end - place])
            place += len(parts[-1])
        return examples[np.concatenate(parts)]

    def batch(
        self,
        seed: int,
        k: int,
        batch_size: int,
        split: str = "train",
        dtype: np.typing.DTypeLike = np.float32,
        rows: slice | Sequence[int] | np.ndarray | None = None,
    ) -> dict[str, Float[np.ndarray, "b ..."]]:
        """Reads batch k, or some of its rows: `take` of `batch_indices`."""
        indices = self.batch_indices(seed, k, batch_size, split)
        return self.take(indices if rows is None else indices[rows], dtype)


def same_encoder(one: Mapping, other: Mapping) -> bool:
    """Compares encoders by the digest of their weights if both are known, else by name."""
    if one.get("sha256") and other.get("sha256"):
        return one["sha256"] == other["sha256"]
    return one["name"] == other["name"]


def open_cache(
    folder: str | os.PathLike,
    vae_identity: Mapping | None = None,
    text_identity: Mapping | None = None,
    verify: bool = False,
) -> LatentCache:
    """Opens a latent cache and checks that it is whole and made with the expected encoders.

    Args:
        folder: the cache folder.
        vae_identity: `identity` of the VAE that the cache must have been made with.
        text_identity: the same of the text encoder.
        verify: also read every file and compare its checksum.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for kind, expected in (("vae", vae_identity), ("text_encoder", text_identity)):
        if expected is not None and not same_encoder(manifest[kind], expected):
            raise ValueError(
                f"{folder} must have been made with the {kind} {dict(expected)}, "
                f"got {manifest[kind]}: encode again into another folder"
            )
    arrays = {}
    for name, about in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size
        if size != about["bytes"]:
            raise ValueError(f"{path} must have {about['bytes']} bytes, got {size}: encode again")
        if verify and file_digest(path) != about["sha256"]:
            raise ValueError(f"{path} must have sha256 {about['sha256']}: damaged, encode again")
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r").view(np.ndarray)
            if [*array.shape, str(array.dtype)] != [*about["shape"], about["dtype"]]:
                raise ValueError(
                    f"{path} must be {about['dtype']} {about['shape']}, "
                    f"got {array.dtype} {list(array.shape)}"
                )
            arrays[path.stem] = array
    return LatentCache(folder, manifest, arrays)


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        partial = partial_folder(folder).exists()
        why = "encode.py was interrupted, run it again" if partial else "make it with encode.py"
        raise FileNotFoundError(f"{folder} is not a latent cache, it has no {MANIFEST}: {why}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} must have format_version {FORMAT_VERSION}, got {version}")
    return manifest


def partial_folder(cache: Path) -> Path:
    """Where an unfinished cache is kept."""
    return cache.with_name(cache.name + ".partial")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_cache(config) -> Path:
    """Where the latent cache of a config lies.

    Args:
        config: with `data.source`, `data.path`, `data.cache`, `data.styles`, `data.image_size`,
            `encoders.vae` and `encoders.text`.

    Returns:
        `data.cache` if it is set, else a folder under `cache_home()` with a readable name.
    """
    data, encoders = config.data, config.encoders
    if data.source not in SOURCES:
        raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {data.source!r}")
    if data.cache:
        return Path(data.cache).expanduser()
    parts = [data.source]
    if data.path:
        parts.append("+".join(_readable(_absolute(path)) for path in data.path.split(",")))
    if data.source == "emoji" and data.styles:
        parts.append(_readable("+".join(data.styles)))
    if data.source != "npy":
        parts.append(str(data.image_size))
    parts += [_readable(encoders.vae), _readable(encoders.text)]
    return cache_home() / "caches" / "-".join(parts)


def _absolute(path: str) -> str:
    return str(Path(path.strip()).expanduser().absolute())


def _readable(name: str) -> str:
    """A name or path in letters that suit a file name; a digest keeps long ones apart."""
    short = re.sub(r"[^\w.+-]+", "-", name).strip("-")
    if not os.path.isabs(name) and len(short) <= 48:
        return short
    return f"{short.rsplit('-', 1)[-1][-32:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
