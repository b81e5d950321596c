"""Batches in a host's memory => arrays on the mesh, read ahead of the step that needs them."""

import queue
import threading
from collections.abc import Callable, Generator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from ldm_jax.sharding import batch_sharding


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " r"]:
    """Rows of a batch that this host's devices hold, in increasing order.

    Raises:
        ValueError: if the number of samples is not divisible by that of the devices.
    """
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"a batch must have a number of samples that is divisible by the {mesh.size} devices, "
            f"got {batch_size}"
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def shard_batch(
    mesh: Mesh, part: Mapping[str, np.ndarray], batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Puts a batch of numpy arrays on the mesh, its first axis split over all devices.

    Args:
        mesh: of `get_mesh`.
        part: on a single host the batch; on several the rows that `local_rows` names.
        batch_size: of the whole batch; by default the part is all of it.

    Raises:
        ValueError: if the arrays differ in length or are not of these rows.
    """
    sizes = {name: len(array) for name, array in part.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"a batch must have the same number of samples everywhere, got {sizes}")
    held = next(iter(sizes.values()))
    whole = held if batch_size is None else batch_size
    rows = local_rows(mesh, whole)
    if len(rows) != held:
        raise ValueError(f"this host needs {len(rows)} of {whole} samples, got {held}")
    sharding = batch_sharding(mesh)
    return {name: _put(sharding, array, rows, whole) for name, array in part.items()}


def _put(sharding: NamedSharding, array: np.ndarray, rows: np.ndarray, whole: int) -> jax.Array:
    def read(index):
        first = np.searchsorted(rows, index[0].start or 0)
        count = len(range(*index[0].indices(whole)))
        return array[first : first + count]

    return jax.make_array_from_callback((whole, *array.shape[1:]), sharding, read)


def feed_batches(
    mesh: Mesh,
    get_rows: Callable[[int, np.ndarray], Mapping[str, np.ndarray]],
    steps: range,
    batch_size: int,
    ahead: int = 2,
) -> Generator[dict[str, jax.Array], None, None]:
    """Batches k for k in `steps`, read and sent to the mesh by a thread that stays `ahead` of them.

    Args:
        mesh: of `get_mesh`.
        get_rows: (k, rows) -> those rows of batch k; each host asks for its own.
        steps: which batches.
        batch_size: of the whole batch.
        ahead: how many batches wait in the devices' memory.

    An error of `get_rows` is raised where the batch would have come. Leaving the loop early ends
    the thread.
    """
    rows = local_rows(mesh, batch_size)
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
                put((shard_batch(mesh, get_rows(k, rows), batch_size), None))
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
