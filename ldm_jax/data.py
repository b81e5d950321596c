"""A latent cache folder => batches of latent moments and text embeddings.

The folder is written once by `encoding.py`, in shards, and read by whole batches from memory maps:

    manifest.json                          encoders, shapes, counts, statistics; files of each shard
    latents_mean-00000-of-00003.npy        float16 (n h w c), raw VAE scale
    latents_std-00000-of-00003.npy         float16 (n h w c), the VAE's posterior; may be absent
    text_embeddings-00000-of-00003.npy     float16 (m ...), one for each caption of each picture
    picture_index-00000-of-00003.npy       int32 (m), the picture of each example, within the shard
    split-00000-of-00003.npy               uint8 (m), index into `pictures.SPLITS`
    examples-00000-of-00003.jsonl          m lines: caption, file, split, concept, style

No list of all examples is ever made, in memory or on the disk: see `docs/data.md`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ldm_jax.cache import cache_home, check_local
from ldm_jax.meta import same_encoder
from ldm_jax.order import WINDOW, Part, draw_permutation, locate_batch, next_window, order_epoch
from ldm_jax.pictures import SPLITS
from ldm_jax.shards import ReadAhead, Shards, check_file

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SOURCES = ("emoji", "folder", "npy")


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCache:
    """An open latent cache; an example is one caption of one picture.

    Examples are numbered over all shards, in the order of the source.
    """

    folder: Path
    manifest: Mapping

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
        return sum(self._counts(split))

    def examples(self, split: str = "train") -> Int[np.ndarray, " m"]:
        """The numbers of a split's examples, in the order of the source.

        It reads every shard and holds eight bytes for each example: for small sets and held-out
        splits.
        """
        counts, code = self._counts(split), SPLITS.index(split)
        return np.concatenate([self._shards.examples(n, code) for n in range(len(counts))])

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Int[np.ndarray, " m"]:
        """The pictures of some examples, numbered over all shards."""
        return self._shards.pictures(indices)

    def records(self, indices: Sequence[int] | np.ndarray) -> list[dict]:
        """What is known of some examples: caption, file, split, concept, style."""
        return [json.loads(line) for line in self._shards.lines(indices)]

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
        taken = self._shards.take(indices)
        return {name: array.astype(dtype, copy=False) for name, array in taken.items()}

    def batch_indices(
        self, seed: int, k: int, batch_size: int, split: str = "train"
    ) -> Int[np.ndarray, " b"]:
        """Examples of batch k, a pure function of (seed, k) that goes on over the ends of epochs.

        They are those at places k batch_size to (k + 1) batch_size of the order that `order.py`
        draws. In the batch they stand as on the disk, window by window, so that a host with one
        part of the rows reads about that part of each window's files, and no other host does.
        """
        return self._draw(seed, self._locate(seed, k, batch_size, split), split)

    def batch(
        self,
        seed: int,
        k: int,
        batch_size: int,
        split: str = "train",
        dtype: np.typing.DTypeLike = np.float32,
        rows: slice | Sequence[int] | np.ndarray | None = None,
    ) -> dict[str, Float[np.ndarray, "b ..."]]:
        """Reads batch k, or some of its rows: `take` of `batch_indices`.

        Args:
            seed: of the run.
            k: number of the batch.
            batch_size: examples of the batch, on all hosts together.
            split: which examples.
            dtype: of the result.
            rows: of the batch, those that this host reads; None: all.
        """
        parts = self._locate(seed, k, batch_size, split)
        indices = self._draw(seed, parts, split)
        kept = np.arange(batch_size) if rows is None else np.arange(batch_size)[rows]
        if len(kept):
            for part in parts:
                self._enter(seed, split, part, kept.min(), kept.max() + 1, batch_size)
        return self.take(indices[kept], dtype)

    @functools.cached_property
    def _shards(self) -> Shards:
        # A batch may reach over the end of a window: the maps of two stay.
        return Shards(self.folder, self.manifest["shards"], keep=2 * WINDOW)

    @functools.cached_property
    def _all_counts(self) -> dict[str, tuple[int, ...]]:
        shards = self.manifest["shards"]
        return {split: tuple(about["counts"][split] for about in shards) for split in SPLITS}

    def _counts(self, split: str) -> tuple[int, ...]:
        """The examples of a split in each shard."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        return self._all_counts[split]

    def _locate(self, seed: int, k: int, batch_size: int, split: str) -> list[Part]:
        counts = self._counts(split)
        if not any(counts):
            raise ValueError(
                f"split {split!r} must have examples, {self.folder} has {self.manifest['counts']}"
            )
        return locate_batch(seed, k, batch_size, counts)

    def _draw(self, seed: int, parts: list[Part], split: str) -> Int[np.ndarray, " b"]:
        windows = (self._window(seed, part.epoch, part.window, split) for part in parts)
        return np.concatenate([np.sort(w[p.start : p.stop]) for w, p in zip(windows, parts)])

    @functools.cached_property
    def _window(self) -> Callable[[int, int, int, str], Int[np.ndarray, " n"]]:
        """The examples of a window in its order, by seed, epoch, number and split."""

        def draw(seed: int, epoch: int, number: int, split: str) -> np.ndarray:
            shards = order_epoch(seed, epoch, self._counts(split)).windows[number]
            code = SPLITS.index(split)
            examples = np.concatenate([self._shards.examples(shard, code) for shard in shards])
            return examples[draw_permutation(seed, epoch, number, len(examples))]

        return functools.lru_cache(4)(draw)  # Two windows of two splits.

    @functools.cached_property
    def _read_ahead(self) -> ReadAhead:
        return ReadAhead()

    def _enter(self, seed: int, split: str, part: Part, first: int, end: int, batch_size: int):
        """Asks for the files of a window and of the next, when a batch first comes there.

        Rows `first` to `end` of the batches are about that part of the files: a row strays from it
        by a standard deviation of up to 0.5 / sqrt(batch_size), and three of these are added.
        """
        counts, stray = self._counts(split), 1.5 / math.sqrt(batch_size)
        low, high = first / batch_size - stray, end / batch_size + stray
        for epoch, number in ((part.epoch, part.window), next_window(seed, part, counts)):
            shards = order_epoch(seed, epoch, counts).windows[number]
            of_split = sum(counts[shard] for shard in shards)
            # Of a held-out split only a few rows of each file are read.
            if 2 * of_split > self._shards.num_examples(shards):
                key = (seed, epoch, number, split, low, high)
                self._read_ahead.ask(key, self._shards.spans(shards, low, high))


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
    for shard in manifest["shards"]:
        for name, about in shard["files"].items():
            check_file(folder / name, about, verify)
    return LatentCache(folder, manifest)


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
        raise ValueError(
            f"{path} must have format_version {FORMAT_VERSION}, got {version}: "
            "remove the cache, or name another folder, and encode again"
        )
    return manifest


def partial_folder(cache: Path) -> Path:
    """Where an unfinished cache is kept."""
    return cache.with_name(cache.name + ".partial")


def default_cache(config) -> Path:
    """Where the latent cache of a config lies.

    Args:
        config: with `data.source`, `data.path`, `data.cache`, `data.styles`, `data.skin_tones`,
            `data.image_size`, `encoders.vae` and `encoders.text`.

    Returns:
        `data.cache` if it is set, else a folder under `cache_home()` with a readable name.
    """
    data, encoders = config.data, config.encoders
    if data.source not in SOURCES:
        raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {data.source!r}")
    if data.cache:
        check_local(data.cache)
        return Path(data.cache).expanduser()
    parts = [data.source]
    if data.path:
        parts.append("+".join(_readable(_absolute(path)) for path in data.path.split(",")))
    if data.source == "emoji" and data.styles:
        parts.append(_readable("+".join(data.styles)))
    if data.source == "emoji" and data.get("skin_tones", False):
        parts.append("tones")
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
