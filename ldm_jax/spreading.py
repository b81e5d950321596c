"""Pictures spread over the devices of a process: each draws its own, and none waits for another."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int
from tqdm import tqdm

from ldm_jax import graphs, sampler, sharding
from ldm_jax.sampler import Diffuser


def spread(diffuser: Diffuser, devices: Sequence[Any] | None = None) -> Callable:
    """draw(seeds, labels, negative_labels, keys) -> latents, as `Diffuser.reverse_diffusion`.

    Each device holds the weights and draws its share of the pictures; a number that does not divide
    is filled up with the last picture. Of fewer pictures than devices, each has a device of its
    own. Pictures are the same on any number of devices, to rounding.

    Args:
        diffuser: whose weights are copied to the devices, once.
        devices: by default this machine's GPUs or TPU cores; on a CPU one, since its virtual
            devices share the cores. In a job of several processes, whose weights lie on the devices
            of all, it is `reverse_diffusion` itself, as it is of one device where the weights lie
            on one.

    Raises:
        ValueError: by `draw`, if the numbers of seeds, labels and keys differ.
    """
    if devices is None:
        if jax.process_count() > 1:
            return diffuser.reverse_diffusion
        devices = jax.devices()[: 1 if jax.default_backend() == "cpu" else None]
    if len(devices) == 1:
        return _gather(diffuser, devices[0]).reverse_diffusion

    @cache
    def place(number):
        mesh = sharding.get_mesh("data", devices[:number])
        return mesh, jax.device_put(diffuser, sharding.replicated(mesh))

    def draw(seeds, labels, negative_labels=None, keys=None):
        arrays = seeds, labels, negative_labels, keys
        numbers = [len(array) for array in arrays if array is not None]
        if len(set(numbers)) > 1:
            raise ValueError(f"got {numbers} seeds, labels and whatever else was given")
        number = min(len(devices), len(seeds))
        if number == 1:
            return _gather(diffuser, devices[0]).reverse_diffusion(*arrays)
        mesh, placed = place(number)
        filled = np.arange(-(-len(seeds) // number) * number)
        rows, part = np.minimum(filled, len(seeds) - 1), sharding.batch_sharding(mesh)
        parts = jax.tree.map(lambda array: jax.device_put(array[rows], part), arrays)
        latents = np.asarray(get_loop(mesh)(placed, *parts))  # A device would ask all for a slice.
        return latents[: len(seeds)]

    return draw


def _gather(diffuser, device):
    """The diffuser on one device: with weights on several, each would draw all pictures."""
    leaves = [x for x in jax.tree.leaves(diffuser) if isinstance(x, jax.Array)]
    several = any(len(x.devices()) > 1 for x in leaves)
    return jax.device_put(diffuser, device) if several else diffuser


def sample_latents(
    diffuser: Diffuser,
    labels: Float[np.ndarray, "n *t e"],
    seeds: Int[np.ndarray, " n"],
    latent_shape: tuple[int, ...],
    batch_size: int = 16,
    *,
    negative_labels: Float[np.ndarray, "n *t e"] | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "n h w c"]:
    """Latents in [-1, 1] for text embeddings, in batches of one size, so that one is compiled.

    Args:
        diffuser: spread over this process's devices.
        labels: text embeddings.
        seeds: of each picture, see `sampler.sample_seeds`.
        latent_shape: (h, w, c).
        batch_size: pictures at once, at most.
        negative_labels: see `Diffuser.predict_x_zero`.
        progress: whether to show a bar.

    Raises:
        ValueError: for no labels, or a `batch_size` below 1.
    """
    draw, latents, n = spread(diffuser), [], len(labels)
    if min(n, batch_size) < 1:
        raise ValueError(f"at least one picture is needed, got {n} in batches of {batch_size}")
    size = -(-n // -(-n // batch_size))  # No more batches than are needed.
    for i in tqdm(range(0, n, size), desc="drawing", disable=not progress):
        rows = np.minimum(np.arange(i, i + size), n - 1)
        noise = np.asarray(sampler.sample_seeds(seeds[rows], latent_shape))
        negative = None if negative_labels is None else negative_labels[rows]
        keys = sampler.get_picture_keys(seeds[rows])
        latents.append(np.asarray(draw(noise, labels[rows], negative, keys)))
    return np.concatenate(latents)[:n]


@cache
def get_loop(mesh: Mesh) -> graphs.RecordedJit:
    """(diffuser, seeds, labels, negative_labels, keys) -> latents, for arrays that lie on a mesh.

    Left to itself, XLA gathers whole maps where a sample's two texts are put side by side: of four
    H200s that cost a sixth (docs/performance.md). It would gather for all of `ldm_jax.kernels`.

    Args:
        mesh: has the weights on every device; all else is split over its devices.
    """
    split = PartitionSpec(sharding.AXES)

    def loop(diffuser, seeds, labels, negative_labels, keys):
        return diffuser.reverse_diffusion(seeds, labels, negative_labels, keys)

    return graphs.RecordedJit(
        jax.shard_map(
            loop,
            mesh=mesh,
            in_specs=(PartitionSpec(), split, split, split, split),
            out_specs=split,
            # The loop starts from zeros, which are alike on all devices; and kernels say nothing.
            check_vma=False,
        )
    )
