"""Rows of latents and embeddings => the shards of a latent cache, which appears in one step."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Shaped
from tqdm import tqdm

from ldm_jax.data import (
    FORMAT_VERSION,
    MANIFEST,
    open_cache,
    partial_folder,
)
from ldm_jax.meta import same_encoder
from ldm_jax.moments import Moments, get_moments, get_statistics
from ldm_jax.pictures import SPLITS
from ldm_jax.shards import file_digest, open_shard, shard_file

PICTURES_PER_SHARD = 65_536
BYTES_PER_SHARD = 2**29  # Two windows of four are read ahead into memory.


class ShardRows(NamedTuple):
    """What goes into one shard."""

    records: Sequence[Mapping]  # of each example caption, file, split, concept, style
    picture_index: Sequence[int]  # the picture of each example, within the shard
    arrays: Mapping[str, tuple[int, Iterable[np.ndarray]]]  # number of rows, and they in blocks


def digest_json(content) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def get_shard_size(bytes_of_picture: float) -> int:
    """How many pictures a shard can hold, with the embeddings of their captions."""
    return min(PICTURES_PER_SHARD, max(int(BYTES_PER_SHARD // bytes_of_picture), 1))


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


def run_chunks(
    folder: Path,
    items: Sequence,
    size: int,
    function: Callable[[Sequence, Callable[[int], Any]], Sequence[np.ndarray]],
    names: Sequence[str],
    progress: bool,
) -> list[list[Path]]:
    """Runs function on chunks of items and keeps its arrays as files; those there are left alone.

    Args:
        folder: where the files go.
        items: what is to be encoded.
        size: items of a chunk.
        function: a chunk, and what to call with each number of items done => its arrays.
        names: of the arrays.
        progress: whether to show a progress bar.

    Returns:
        For each chunk the files of its arrays, in the order of names.
    """
    folder.mkdir(exist_ok=True)
    chunks = []
    with tqdm(total=len(items), desc=folder.name, disable=not progress) as bar:
        for start in range(0, len(items), size):
            part = items[start : start + size]
            paths = [folder / f"{start // size:05d}.{name}.npy" for name in names]
            if paths[-1].exists():  # The last file of a chunk is its seal.
                bar.update(len(part))
            else:
                for path, array in zip(paths, function(part, bar.update)):
                    save_rows(path, len(array), [array])
            chunks.append(paths)
    return chunks


def finish_cache(cache: Path, shards: Iterable[ShardRows], num_shards: int, about: Mapping) -> Path:
    """Writes the shards of a cache beside its unfinished work and gives them the cache's name.

    Args:
        cache: the folder that will be.
        shards: what they hold, one after the other; no two of them are in memory.
        num_shards: how many they are.
        about: what else the manifest says.

    Returns:
        The cache folder.
    """
    whole = partial_folder(cache) / "whole"
    if whole.exists():
        shutil.rmtree(whole)
    whole.mkdir()
    listed, moments = [], []
    for number, shard in enumerate(shards):
        listed.append(_write_shard(whole, number, num_shards, shard))
        moments.append(_measure_shard(whole, listed[-1]))
    if len(listed) != num_shards:
        raise ValueError(f"{cache} must get {num_shards} shards, got {len(listed)}")
    counts = {split: sum(shard["counts"][split] for shard in listed) for split in SPLITS}
    if not counts["train"]:
        raise ValueError(f"the source must have pictures to train on, got the examples {counts}")
    arrays = open_shard(whole, listed[0])
    manifest = {
        "format_version": FORMAT_VERSION,
        **about,
        "latent_shape": arrays["latents_mean"].shape[1:],
        "embedding_shape": arrays["text_embeddings"].shape[1:],
        "pictures": sum(shard["pictures"] for shard in listed),
        "counts": counts,
        **get_statistics(moments),
        "shards": listed,
    }
    _save_text(whole / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    with _name_errors(cache, 0):
        whole.rename(cache)
    shutil.rmtree(partial_folder(cache))
    return cache


def _write_shard(folder: Path, number: int, num_shards: int, shard: ShardRows) -> dict:
    """Writes the files of a shard and returns its entry in the manifest."""
    codes = np.array([SPLITS.index(record["split"]) for record in shard.records], np.uint8)
    index = np.array(shard.picture_index, np.int32)
    small = {"picture_index": (len(index), [index]), "split": (len(codes), [codes])}
    paths = []
    for name, (rows, blocks) in {**shard.arrays, **small}.items():
        paths.append(folder / shard_file(name, ".npy", number, num_shards))
        save_rows(paths[-1], rows, blocks)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in shard.records)
    paths.append(folder / shard_file("examples", ".jsonl", number, num_shards))
    _save_text(paths[-1], "".join(lines))
    files = {}
    for path in paths:
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
            files[path.name] |= {"shape": array.shape, "dtype": str(array.dtype)}
    return {
        "pictures": shard.arrays["latents_mean"][0],
        "counts": {split: int((codes == i).sum()) for i, split in enumerate(SPLITS)},
        "files": files,
    }


def _measure_shard(folder: Path, about: Mapping) -> Moments:
    """The moments of a shard's training pictures."""
    arrays = open_shard(folder, about)
    train = np.unique(arrays["picture_index"][arrays["split"] == SPLITS.index("train")])
    return get_moments(arrays["latents_mean"], arrays.get("latents_std"), train)


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
