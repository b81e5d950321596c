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

from ldm_jax.cache_files import begin_cache, digest_json, finish_cache, is_whole, save_rows
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
    # Float16 mean and std in chunks and in whole files; embeddings in one copy more.
    needed = 8 * len(pictures) * int(np.prod(latent_shape))
    needed += 6 * examples * int(np.prod(text_encoder.shape))
    partial = begin_cache(cache, plan | dict(chunk_size=chunk_size), needed)

    # Captions, each distinct one once.
    captions = list(dict.fromkeys(text for picture in pictures for text in picture.captions))
    embed = functools.partial(_embed_captions, text_encoder=text_encoder)
    chunks = _run_chunks(
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
        chunks = _run_chunks(partial / "pictures", pictures, chunk_size, encode, names, progress)
    means, stds, errors = zip(*chunks)
    errors = np.concatenate([np.load(path) for path in errors]).tolist()
    kept = [i for i, error in enumerate(errors) if not error]
    if not kept:
        shutil.rmtree(partial)
        raise ValueError(f"none of {len(errors)} pictures can be read; {files[0]} {errors[0]}")

    # Examples: every caption of every picture that is left.
    row_of = {caption: row for row, caption in enumerate(captions)}
    records, picture_index, caption_rows = [], [], []
    for place, i in enumerate(kept):
        _, texts, split, concept, style = pictures[i]
        for text in texts:
            about = dict(caption=text, file=files[i], split=split, concept=concept, style=style)
            records.append(about)
            picture_index.append(place)
            caption_rows.append(row_of[text])
    arrays = {
        "latents_mean": (len(kept), (np.load(path) for path in means)),
        "latents_std": (len(kept), (np.load(path) for path in stds)),
        "text_embeddings": (len(records), _gather(distinct, np.array(caption_rows))),
    }
    skipped = [dict(file=file, error=error) for file, error in zip(files, errors) if error]
    about = plan | dict(source=str(source), skipped=skipped)
    return finish_cache(cache, records, picture_index, arrays, about)


def from_npy_pair(
    latents: str | os.PathLike,
    text_embeddings: str | os.PathLike,
    cache: str | os.PathLike,
    vae: str,
    text_encoder: str,
    progress: bool = False,
) -> Path:
    """Copies a pair of .npy files into a latent cache; a whole cache is left as it is.

    Args:
        latents: .npy of floats (n h w c), raw VAE scale.
        text_embeddings: .npy of floats (n e) or (n tokens e); row i belongs to latents i.
        cache: the folder to write.
        vae: name of the VAE that made the latents, taken on trust.
        text_encoder: name of the text encoder, taken on trust.
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
    partial = begin_cache(cache, plan, needed=2 * (z.size + embeddings.size))

    def copy(array: np.ndarray, path: Path) -> Iterator[np.ndarray]:
        for i in tqdm(range(0, n, ROWS_PER_BLOCK), desc=path.name, disable=not progress):
            yield _to_float16(array[i : i + ROWS_PER_BLOCK], f"{path} from row {i} on")

    records = [
        dict(caption="", file=f"row {i}", split=assign_split(str(i)), concept=str(i), style="")
        for i in range(n)
    ]
    arrays = {
        "latents_mean": (n, copy(z, paths[0])),
        "text_embeddings": (n, copy(embeddings, paths[1])),
    }
    about = plan | dict(source=",".join(map(str, paths)), skipped=[])
    try:
        return finish_cache(cache, records, range(n), arrays, about)
    except BaseException:
        shutil.rmtree(partial)  # Copying is quick, there is nothing to keep.
        raise


def _run_chunks(
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
