"""Devices: a mesh of all of them; batches are split over it, weights are replicated."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def get_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis "data" over `devices`, all of them by default."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the mesh."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a batch of numpy arrays on the mesh, its first axis split.

    Raises:
        ValueError: if the number of samples is not divisible by that of the devices.
    """
    sizes = {name: len(array) for name, array in batch.items()}
    if len(set(sizes.values())) != 1 or next(iter(sizes.values())) % mesh.size:
        raise ValueError(
            f"a batch must have the same number of samples everywhere, divisible by the "
            f"{mesh.size} devices, got {sizes}"
        )
    return {k: jax.device_put(v, batch_sharding(mesh)) for k, v in batch.items()}


def feed_batches(
    mesh: Mesh, get_batch: Callable[[int], Mapping[str, np.ndarray]], steps: range, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Batches k for k in `steps`, read and sent to the mesh by a thread that stays `ahead` of them.

    An error of `get_batch` is raised where the batch would have come. Leaving the loop early ends
    the thread.
    """
    ready: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item):
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read():
        try:
            for k in steps:
                if stopped.is_set():
                    return
                put((shard_batch(mesh, get_batch(k)), None))
        except Exception as error:
            put((None, error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        for _ in steps:
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch
    finally:
        stopped.set()
        thread.join()
