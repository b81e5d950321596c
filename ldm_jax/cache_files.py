"""Rows of latents and embeddings => the files of a latent cache, which appears in one step."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from absl import logging
from jaxtyping import Float, Int, Shaped

from ldm_jax.data import (
    FORMAT_VERSION,
    MANIFEST,
    file_digest,
    open_cache,
    partial_folder,
    same_encoder,
)
from ldm_jax.pictures import SPLITS

CLIP_DEVIATIONS = 2.5
BLOCK = 4096


def digest_json(content) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_whole(cache: Path, plan: Mapping) -> bool:
    """Whether the cache is there already; it is an error if it is another than the planned one."""
    if not (cache / MANIFEST).exists():
        return False
    manifest = open_cache(cache, plan["vae"], plan["text_encoder"]).manifest
    for key in sorted(plan.keys() - {"vae", "text_encoder"}):
        if manifest.get(key) != plan[key]:
            raise ValueError(
                f"{cache} must have been made with {key} {plan[key]}, got {manifest.get(key)}"
                f"{' (the source has changed)' if key == 'source_sha256' else ''}: "
                "remove it or name another folder"
            )
    # What a run leaves behind that is killed after its last step but one.
    shutil.rmtree(partial_folder(cache), ignore_errors=True)
    return True


def begin_cache(cache: Path, plan: Mapping, needed: int) -> Path:
    """Makes the folder for unfinished work, or goes on in the one that is there.

    Args:
        cache: the folder that will be.
        plan: what decides the content; work that was begun with another plan is an error.
        needed: how many bytes will be written, about.

    Returns:
        The folder to work in.
    """
    if cache.exists() and not (cache.is_dir() and not any(cache.iterdir())):
        raise FileExistsError(f"{cache} exists and is not a latent cache: name another folder")
    partial = partial_folder(cache)
    path = partial / "plan.json"
    plan = {"format_version": FORMAT_VERSION, **plan}
    with _name_errors(partial, needed):
        partial.mkdir(parents=True, exist_ok=True)
        begun = json.loads(path.read_text()) if path.exists() else plan
    for key in sorted(plan.keys() | begun.keys()):
        old, new = begun.get(key), plan.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            same = same_encoder(old, new)
        else:
            same = old == new
        if not same:
            raise ValueError(
                f"{partial} was begun with {key} {old}, now it is {new}: remove it to start anew"
            )
    done = sum(file.stat().st_size for file in partial.rglob("*.npy"))
    free = shutil.disk_usage(partial).free
    if needed - done > free:
        message = f"about {needed - done} bytes are needed, {free} are free"
        raise OSError(errno.ENOSPC, message, str(cache))
    if done:
        logging.info("going on in %s", partial)
    _save_text(path, json.dumps(plan, indent=1))
    return partial


def finish_cache(
    cache: Path,
    records: Sequence[Mapping],
    picture_index: Sequence[int],
    arrays: Mapping[str, tuple[int, Iterable[np.ndarray]]],
    about: Mapping,
) -> Path:
    """Writes the files of a cache beside its unfinished work and gives them the cache's name.

    Args:
        cache: the folder that will be.
        records: of each example caption, file, split, concept and style.
        picture_index: the picture of each example.
        arrays: number of rows, and the rows in blocks, of each large array.
        about: what else the manifest says.

    Returns:
        The cache folder.
    """
    codes = np.array([SPLITS.index(record["split"]) for record in records], np.uint8)
    index = np.array(picture_index, np.int32)
    train_pictures = np.unique(index[codes == SPLITS.index("train")])
    counts = {split: int((codes == i).sum()) for i, split in enumerate(SPLITS)}
    if not len(train_pictures):
        raise ValueError(f"the source must have pictures to train on, got the examples {counts}")
    whole = partial_folder(cache) / "whole"
    if whole.exists():
        shutil.rmtree(whole)
    whole.mkdir()
    small = {"picture_index": (len(index), [index]), "split": (len(codes), [codes])}
    for name, (rows, blocks) in {**arrays, **small}.items():
        save_rows(whole / f"{name}.npy", rows, blocks)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _save_text(whole / "examples.jsonl", "".join(lines))

    opened = {name: np.load(whole / f"{name}.npy", mmap_mode="r") for name in arrays}
    files = {}
    for path in sorted(whole.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
            files[path.name] |= {"shape": array.shape, "dtype": str(array.dtype)}
    manifest = {
        "format_version": FORMAT_VERSION,
        **about,
        "latent_shape": opened["latents_mean"].shape[1:],
        "embedding_shape": opened["text_embeddings"].shape[1:],
        "pictures": len(opened["latents_mean"]),
        "counts": counts,
        **get_statistics(opened["latents_mean"], opened.get("latents_std"), train_pictures),
        "files": files,
    }
    _save_text(whole / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    with _name_errors(cache, 0):
        whole.rename(cache)
    shutil.rmtree(partial_folder(cache))
    return cache


def get_statistics(
    mean: Float[np.ndarray, "n h w c"],
    std: Float[np.ndarray, "n h w c"] | None,
    rows: Int[np.ndarray, " m"],
) -> dict:
    """Mean and standard deviation of latents that are drawn from N(mean, std^2).

    By the law of total variance var(z) = var(mean) + E(std^2), for each channel, and once more
    over the channels for `std_latent` = 2.5 sqrt(var(z)).

    Args:
        mean, std: moments of all pictures; without std the latents are the means.
        rows: the pictures that count.

    Returns:
        `std_latent`, `channel_mean` and `channel_std` as Python numbers.
    """

    def average(array: np.ndarray, function) -> np.ndarray:
        blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
        sums = [function(array[block].astype(np.float64)).sum((0, 1, 2)) for block in blocks]
        return np.sum(sums, axis=0) / (len(rows) * math.prod(array.shape[1:3]))

    channel_mean = average(mean, lambda z: z)
    channel_var = average(mean, lambda z: (z - channel_mean) ** 2)
    if std is not None:
        channel_var = channel_var + average(std, np.square)
    variance = channel_var.mean() + channel_mean.var()
    if variance == 0:
        raise ValueError(f"training latents must vary, got {channel_mean.tolist()} everywhere")
    return {
        "std_latent": CLIP_DEVIATIONS * math.sqrt(variance),
        "channel_mean": channel_mean.tolist(),
        "channel_std": np.sqrt(channel_var).tolist(),
    }


def save_rows(path: Path, rows: int, blocks: Iterable[Shaped[np.ndarray, "b ..."]]):
    """Writes blocks of rows as one .npy file, which is there when it is whole."""
    blocks = iter(blocks)
    first = next(blocks)
    shape, written = (rows, *first.shape[1:]), 0
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
    with _replacing(path, math.prod(shape) * first.itemsize) as file:
        np.lib.format.write_array_header_1_0(file, header)
        # Not through a memory map: there a full disk kills the process.
        for block in itertools.chain([first], blocks):
            if block.shape[1:] != shape[1:] or block.dtype != first.dtype:
                raise ValueError(
                    f"{path}: rows must be {first.dtype} {shape[1:]}, "
                    f"got {block.dtype} {block.shape[1:]}"
                )
            file.write(block.tobytes())
            written += len(block)
        if written != rows:
            raise ValueError(f"{path} must get {rows} rows, got {written}")


def _save_text(path: Path, text: str):
    content = text.encode()
    with _replacing(path, len(content)) as file:
        file.write(content)


@contextlib.contextmanager
def _replacing(path: Path, needed: int) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of path when it is whole and on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with _name_errors(path, needed):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _name_errors(path: Path, needed: int) -> Iterator[None]:
    """Says in an OSError which path was written and how much room it needs."""
    try:
        yield
    except OSError as error:
        message = f"{error.strerror or error} (about {needed} bytes are needed)"
        raise OSError(error.errno, message, str(path)) from error
