"""Picture records, or a pair of .npy files => a latent cache folder, whole or not there at all.

Work is kept chunk by chunk in `<cache>.partial`, so that an interrupted run goes on where it was.
"""

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float16, Shaped
from tqdm import tqdm

from ldm_jax.cache_files import (
    ShardRows,
    begin_cache,
    digest_json,
    finish_cache,
    get_shard_size,
    is_whole,
    run_chunks,
    save_rows,
)
from ldm_jax.pictures import Picture, PictureError, assign_split, load_picture

PICTURES_PER_CHUNK = 512
PICTURES_PER_BATCH = 64
CAPTIONS_PER_CHUNK = 256
ROWS_PER_BLOCK = 4096
MAX_FLOAT16 = float(np.finfo(np.float16).max)


def encode_pictures(
    pictures: Sequence[Picture],
    cache: str | os.PathLike,
    vae: Any,
    text_encoder: Any,
    source: str | os.PathLike,
    image_size: int = 128,
    chunk_size: int = PICTURES_PER_CHUNK,
    shard_size: int | None = None,
    progress: bool = False,
) -> Path:
    """Encodes pictures and their captions into a latent cache; a whole cache is left as it is.

    A broken picture is named in the log, skipped, and listed in the manifest.

    Args:
        pictures: as `read_folder` gives them.
        cache: the folder to write.
        vae: from `load_vae`.
        text_encoder: from `load_text_encoder`.
        source: the folder of the pictures; the cache names files relative to it.
        image_size: side of the square pictures that the VAE sees.
        chunk_size: how many pictures an interruption can cost.
        shard_size: how many pictures a shard can hold, whole chunks of them; None: 65 536, or as
            many as fill 512 MiB.
        progress: whether to show progress bars.

    Returns:
        The cache folder.

    Raises:
        ValueError: the cache, or the begun part of it, is of other pictures or encoders; no
            picture can be read; the encoders' numbers do not fit float16.
        OSError: the cache cannot be written; what is done so far is kept.
    """
    cache, files = Path(cache), [os.path.relpath(picture.path, source) for picture in pictures]
    plan = dict(
        source_sha256=digest_json(
            [[file, p.path.stat().st_size, *p[1:]] for file, p in zip(files, pictures)]
        ),
        image_size=image_size,
        vae=vae.identity,
        text_encoder=text_encoder.identity,
    )
    if is_whole(cache, plan):
        return cache
    side, rest = divmod(image_size, vae.downsampling)
    if rest:
        needed = f"divisible by {vae.downsampling} (the VAE's downsampling)"
        raise ValueError(f"image_size must be {needed}, got {image_size}")
    latent_shape = (side, side, vae.latent_channels)
    examples = sum(len(picture.captions) for picture in pictures)
    # Float16 mean and std in chunks and in shards; embeddings in one copy more.
    moments = 4 * len(pictures) * int(np.prod(latent_shape))
    embeddings = 2 * examples * int(np.prod(text_encoder.shape))
    needed = 2 * moments + 3 * embeddings
    shard_size = shard_size or get_shard_size((moments + embeddings) / len(pictures))
    partial = begin_cache(cache, plan | dict(chunk_size=chunk_size), needed)

    # Captions, each distinct one once.
    captions = list(dict.fromkeys(text for picture in pictures for text in picture.captions))
    embed = functools.partial(_embed_captions, text_encoder=text_encoder)
    chunks = run_chunks(
        partial / "captions", captions, CAPTIONS_PER_CHUNK, embed, ["embeddings"], progress
    )
    distinct = partial / "embeddings.npy"
    save_rows(distinct, len(captions), (np.load(path) for (path,) in chunks))

    # Pictures.
    with ThreadPoolExecutor() as pool:
        encode = functools.partial(
            _encode_pictures, vae=vae, size=image_size, latent_shape=latent_shape, pool=pool
        )
        names = ["mean", "std", "errors"]
        chunks = run_chunks(partial / "pictures", pictures, chunk_size, encode, names, progress)
    means, stds, errors = zip(*chunks)
    errors = np.concatenate([np.load(path) for path in errors]).tolist()
    if all(errors):
        shutil.rmtree(partial)
        raise ValueError(f"none of {len(errors)} pictures can be read; {files[0]} {errors[0]}")

    # Shards: chunks in a row, and every caption of every picture that is left.
    row_of = {caption: row for row, caption in enumerate(captions)}
    size = max(shard_size // chunk_size, 1) * chunk_size
    starts = [i for i in range(0, len(pictures), size) if not all(errors[i : i + size])]

    def get_shard(start: int) -> ShardRows:
        kept = [i for i in range(start, min(start + size, len(errors))) if not errors[i]]
        records, picture_index, caption_rows = [], [], []
        for place, i in enumerate(kept):
            _, texts, split, concept, style = pictures[i]
            for text in texts:
                about = dict(caption=text, file=files[i], split=split, concept=concept, style=style)
                records.append(about)
                picture_index.append(place)
                caption_rows.append(row_of[text])
        part = slice(start // chunk_size, (start + size) // chunk_size)
        arrays = {
            "latents_mean": (len(kept), (np.load(path) for path in means[part])),
            "latents_std": (len(kept), (np.load(path) for path in stds[part])),
            "text_embeddings": (len(records), _gather(distinct, np.array(caption_rows))),
        }
        return ShardRows(records, picture_index, arrays)

    skipped = [dict(file=file, error=error) for file, error in zip(files, errors) if error]
    about = plan | dict(source=str(source), skipped=skipped)
    return finish_cache(cache, map(get_shard, starts), len(starts), about)


def from_npy_pair(
    latents: str | os.PathLike,
    text_embeddings: str | os.PathLike,
    cache: str | os.PathLike,
    vae: str,
    text_encoder: str,
    shard_size: int | None = None,
    progress: bool = False,
) -> Path:
    """Copies a pair of .npy files into a latent cache; a whole cache is left as it is.

    Args:
        latents: .npy of floats (n h w c), raw VAE scale.
        text_embeddings: .npy of floats (n e) or (n tokens e); row i belongs to latents i.
        cache: the folder to write.
        vae: name of the VAE that made the latents, taken on trust.
        text_encoder: name of the text encoder, taken on trust.
        shard_size: how many rows a shard can hold; None: as in `encode_pictures`.
        progress: whether to show progress bars.

    Returns:
        The cache folder. Its splits follow the hash of the row number; its captions are empty.
    """
    cache, paths = Path(cache), (Path(latents), Path(text_embeddings))
    z, embeddings = (_open_npy(path) for path in paths)
    if z.ndim != 4 or not z.size or z.shape[1] != z.shape[2]:
        raise ValueError(f"{paths[0]}: latents must be square, (n, h, w, c), got {z.shape}")
    if embeddings.ndim not in (2, 3) or not embeddings.size:
        needed = "(n, e) or (n, tokens, e)"
        raise ValueError(f"{paths[1]}: text embeddings must be {needed}, got {embeddings.shape}")
    n = len(z)
    if len(embeddings) != n:
        raise ValueError(f"{n} latents need {n} text embeddings, got {len(embeddings)}")
    stats = [path.stat() for path in paths]
    plan = dict(
        source_sha256=digest_json([[stat.st_size, stat.st_mtime_ns] for stat in stats]),
        vae=dict(name=vae, sha256=None),
        text_encoder=dict(name=text_encoder, sha256=None),
    )
    if is_whole(cache, plan):
        return cache
    needed = 2 * (z.size + embeddings.size)
    size = shard_size or get_shard_size(needed / n)
    partial = begin_cache(cache, plan, needed)

    def copy(array: np.ndarray, path: Path, rows: range) -> Iterator[np.ndarray]:
        for i in rows[::ROWS_PER_BLOCK]:
            block = array[i : min(i + ROWS_PER_BLOCK, rows.stop)]
            yield _to_float16(block, f"{path} from row {i} on")

    def get_shard(start: int) -> ShardRows:
        rows = range(start, min(start + size, n))
        records = [
            dict(caption="", file=f"row {i}", split=assign_split(str(i)), concept=str(i), style="")
            for i in rows
        ]
        arrays = {
            "latents_mean": (len(rows), copy(z, paths[0], rows)),
            "text_embeddings": (len(rows), copy(embeddings, paths[1], rows)),
        }
        return ShardRows(records, range(len(rows)), arrays)

    starts = range(0, n, size)
    bar = tqdm(starts, desc=cache.name, unit="shard", disable=not progress)
    about = plan | dict(source=",".join(map(str, paths)), skipped=[])
    try:
        return finish_cache(cache, map(get_shard, bar), len(starts), about)
    except BaseException:
        shutil.rmtree(partial)  # Copying is quick, there is nothing to keep.
        raise


def _embed_captions(
    captions: Sequence[str], advance: Callable[[int], Any], text_encoder: Any
) -> list[Float16[np.ndarray, "n ..."]]:
    embeddings = text_encoder(captions)
    advance(len(captions))
    return [_to_float16(embeddings, f"text embeddings of {captions[0]!r} and those after it")]


def _encode_pictures(
    pictures: Sequence[Picture],
    advance: Callable[[int], Any],
    vae: Any,
    size: int,
    latent_shape: tuple[int, ...],
    pool: ThreadPoolExecutor,
) -> tuple[Shaped[np.ndarray, "n ..."], ...]:
    """Mean and std of the pictures that can be read; for every picture what is wrong, or ''."""
    means = [np.empty((0, *latent_shape), np.float16)]
    stds, errors = list(means), []
    for start in range(0, len(pictures), PICTURES_PER_BATCH):
        part = pictures[start : start + PICTURES_PER_BATCH]
        loaded = list(pool.map(functools.partial(_load_or_error, size=size), part))
        for picture, image in zip(part, loaded):
            errors.append(image if isinstance(image, str) else "")
            if errors[-1]:
                logging.warning("skipped %s: it %s", picture.path, errors[-1])
        images = [image for image in loaded if not isinstance(image, str)]
        if images:
            mean, std = vae.encode(np.stack(images))
            what = f"latents of {part[0].path} and the pictures after it"
            means.append(_to_float16(mean, what))
            stds.append(_to_float16(std, what))
        advance(len(part))
    return np.concatenate(means), np.concatenate(stds), np.array(errors)


def _load_or_error(picture: Picture, size: int) -> np.ndarray | str:
    from PIL.Image import DecompressionBombError

    try:
        return load_picture(picture.path, size)
    except PictureError as error:
        return error.what
    except DecompressionBombError as error:
        return f"is too large: {error}"


def _gather(path: Path, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of an .npy file in any order, some at a time."""
    array = np.load(path, mmap_mode="r")
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        yield array[rows[start : start + ROWS_PER_BLOCK]]


def _to_float16(array: np.ndarray, what: str) -> Float16[np.ndarray, "..."]:
    """Rounds to float16 what is finite and fits."""
    largest = np.abs(array).max(initial=0)
    if not largest <= MAX_FLOAT16:  # NaN fails as well.
        raise ValueError(f"{what} must be finite and at most {MAX_FLOAT16:.0f}, got {largest}")
    return array.astype(np.float16)


def _open_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} must be an .npy file: {error}") from error
    kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
    if not isinstance(kind, np.dtype) or kind.kind != "f":
        raise ValueError(f"{path} must be an .npy file of floats, got {kind}")
    return array
