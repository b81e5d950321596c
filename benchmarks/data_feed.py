"""A synthetic latent cache => how fast its batches are read, and the memory that this takes.

    python benchmarks/data_feed.py --folder=/data/feed [--records=100000,1000000,10000000] [--std]

writes caches of real bytes under --folder, one after the other (3 kB a record of 16 x 16 x 4
latents and 512 embeddings in float16, 5 kB with --std), measures each in fresh processes, removes
it, and prints a markdown table of examples/s:

    cold      from the first batch on, after the kernel was asked to drop the files
    warm      the same batches again, the better of two times
    middle    cold, from the middle of the first epoch on
    window    warm, 64 batches around the end of the first window
    2 hosts   cold and warm, two processes at once, each with half of the rows, together
    epoch     one whole epoch, cold

`disk` is what reading the same files from end to end gives, `first` the time to open the cache and
read the first batch, both cold; `peak` is the largest resident memory of a reading process, and
`private` what of it does not lie in mapped files.
"""

import concurrent.futures
import gc
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags

from ldm_jax.cache_files import PICTURES_PER_SHARD, ShardRows, begin_cache, finish_cache
from ldm_jax.data import LatentCache, open_cache, partial_folder
from ldm_jax.order import order_epoch

BLOCK = 4096
LATENT_SHAPE, EMBEDDING_SIZE = (16, 16, 4), 512
HOSTS = 2  # that read one cache side by side


def mark_rows(array: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Writes numbers below 2^33 into the first three values of rows, exactly in float16."""
    marked = array[: len(numbers)].copy()
    for i in range(3):
        marked.reshape(len(numbers), -1)[:, i] = numbers // 2048**i % 2048
    return marked


def read_marks(array: np.ndarray) -> np.ndarray:
    """The numbers that `mark_rows` wrote."""
    digits = array.reshape(len(array), -1)[:, :3].astype(np.int64)
    return digits @ 2048 ** np.arange(3)


def write_cache(
    folder: Path, records: int, std: bool = False, shard_size: int = PICTURES_PER_SHARD
) -> Path:
    """Writes a cache of noise, every hundredth example held out; each row holds its number."""
    rng = np.random.default_rng(0)
    noise = {"latents_mean": LATENT_SHAPE, "text_embeddings": (EMBEDDING_SIZE,)}
    if std:
        noise["latents_std"] = LATENT_SHAPE
    noise = {k: rng.normal(size=(BLOCK, *shape)).astype(np.float16) for k, shape in noise.items()}

    def get_rows(array: np.ndarray, numbers: range) -> Iterator[np.ndarray]:
        for start in numbers[::BLOCK]:
            yield mark_rows(array, np.arange(start, min(start + BLOCK, numbers.stop)))

    def get_shard(start: int) -> ShardRows:
        numbers = range(start, min(start + shard_size, records))
        texts = [
            dict(caption="", file=f"row {i}", split="train" if i % 100 else "valid")
            for i in numbers
        ]
        arrays = {name: (len(numbers), get_rows(array, numbers)) for name, array in noise.items()}
        return ShardRows(texts, range(len(numbers)), arrays)

    plan = dict(vae=dict(name="noise", sha256=None), text_encoder=dict(name="noise", sha256=None))
    bytes_of_record = sum(array[0].nbytes for array in noise.values())
    begin_cache(folder, plan, records * bytes_of_record)
    starts = range(0, records, shard_size)
    return finish_cache(folder, map(get_shard, starts), len(starts), plan | dict(skipped=[]))


def drop_pages(folder: Path):
    """Asks the kernel to forget what it holds of a folder's files."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Reading(NamedTuple):
    """What was read, and in which time."""

    batches: int
    examples: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.examples / self.seconds


def read_batches(
    cache: LatentCache, batches: range, batch_size: int, seconds: float, rows: slice = slice(None)
) -> Reading:
    """Reads batches for some seconds at most."""
    done, examples, start = 0, 0, time.perf_counter()
    for k in batches:
        batch = cache.batch(0, k, batch_size, dtype=np.float16, rows=rows)
        done, examples = done + 1, examples + len(batch["latents_mean"])
        if time.perf_counter() - start > seconds:
            break
    return Reading(done, examples, time.perf_counter() - start)


def read_files(folder: Path, seconds: float) -> float:
    """Bytes per second of reading the arrays from end to end, cold, for some seconds at most."""
    drop_pages(folder)
    buffer, done, start = bytearray(2**22), 0, time.perf_counter()
    for path in sorted(folder.glob("*.npy")):
        with open(path, "rb", buffering=0) as file:
            while time.perf_counter() - start < seconds and (size := file.readinto(buffer)):
                done += size
    return done / (time.perf_counter() - start)


def measure_one(folder: Path, batch_size: int, seconds: float) -> dict:
    """All figures of one reading process."""
    batches = max(open_cache(folder).num_examples() // batch_size, 1)

    def read(batches: range, cold: bool, seconds: float = seconds) -> Reading:
        gc.collect()  # The kernel keeps what a process has mapped: no cache may be left open.
        if cold:
            drop_pages(folder)
        return read_batches(open_cache(folder), batches, batch_size, seconds)

    found = {"disk": read_files(folder, seconds)}
    found["first"] = read(range(1), cold=True).seconds
    cold = read(range(batches), cold=True)
    found["cold"] = cold.rate
    found["warm"] = max(read(range(cold.batches), cold=False, seconds=math.inf).rate for _ in "ab")
    found["middle"] = read(range(batches // 2, batches), cold=True).rate

    counts = (shard["counts"]["train"] for shard in open_cache(folder).manifest["shards"])
    border = int(order_epoch(0, 0, tuple(counts)).ends[0]) // batch_size
    around = range(max(border - 32, 0), border + 32)
    read(around, cold=False)  # The pages come in.
    found["window"] = read(around, cold=False).rate
    found["epoch"] = read(range(batches), cold=True, seconds=math.inf).rate
    return found | read_memory()


def read_memory() -> dict[str, float]:
    """Peak and private resident memory of this process in bytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split(":")[1] for line in lines}
    names = {"peak": "VmHWM", "private": "RssAnon"}
    return {name: 1024 * int(values[key].split()[0]) for name, key in names.items()}


def measure_host(
    folder: Path, batches: range, batch_size: int, seconds: float, host: int, hosts: int, barrier
) -> Reading:
    """What one reads of several processes that read disjoint rows of the same batches."""
    cache = open_cache(folder)
    rows = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
    barrier.wait()
    return read_batches(cache, batches, batch_size, seconds, rows)


def measure_cache(folder: Path, batch_size: int, seconds: float) -> dict[str, float]:
    """Figures of a cache by the names in this file's first lines, each process a fresh one."""
    context = multiprocessing.get_context("spawn")
    files = [path.stat().st_size for path in folder.iterdir()]
    found = {"records": sum(open_cache(folder).manifest["counts"].values()), "bytes": sum(files)}
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        found |= pool.submit(measure_one, folder, batch_size, seconds).result()
    # The same batches cold and warm, as many as the slowest host read.
    drop_pages(folder)
    batches, limit = range(max(open_cache(folder).num_examples() // batch_size, 1)), seconds
    with context.Manager() as manager:
        for name in ("hosts_cold", "hosts_warm"):
            barrier = manager.Barrier(HOSTS)
            with concurrent.futures.ProcessPoolExecutor(HOSTS, context) as pool:
                runs = [
                    pool.submit(
                        measure_host, folder, batches, batch_size, limit, host, HOSTS, barrier
                    )
                    for host in range(HOSTS)
                ]
                read = [run.result() for run in runs]
            found[name] = sum(reading.rate for reading in read)
            batches, limit = range(min(reading.batches for reading in read)), math.inf
    return found


def format_row(found: dict[str, float]) -> str:
    """One line of the table."""

    def thousands(name: str) -> str:
        return f"{found[name] / 1e3:.0f} k"

    cells = [
        f"{found['records']:,}".replace(",", " "),
        f"{found['bytes'] / 1e9:.1f}",
        f"{found['disk'] / 1e9:.2f}",
        f"{1e3 * found['first']:.0f}",
        *(thousands(name) for name in ("cold", "warm", "middle", "window")),
        *(thousands(name) for name in ("hosts_cold", "hosts_warm", "epoch")),
        f"{found['peak'] / 1e6:.0f}",
        f"{found['private'] / 1e6:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def run(
    folder: Path,
    sizes: Sequence[int],
    std: bool = False,
    shard_size: int = PICTURES_PER_SHARD,
    batch_size: int = 1024,
    seconds: float = 4.0,
) -> list[dict[str, float]]:
    """Writes, measures and removes a cache of each size, prints the table, returns the figures."""
    titles = ["records", "GB", "disk, GB/s", "first, ms", "cold", "warm", "middle", "window"]
    titles += ["2 hosts cold", "2 hosts warm", "epoch", "peak, MB", "private, MB"]
    print("| " + " | ".join(titles) + " |\n|" + "---:|" * len(titles), flush=True)
    rows = []
    for records in sizes:
        cache = folder / f"feed-{records}"
        try:
            write_cache(cache, records, std, shard_size)
            rows.append(measure_cache(cache, batch_size, seconds))
            print(format_row(rows[-1]), flush=True)
        finally:
            for path in (cache, partial_folder(cache)):
                shutil.rmtree(path, ignore_errors=True)
    return rows


def main(argv):
    f = flags.FLAGS
    sizes = [int(records) for records in f.records]
    run(Path(f.folder), sizes, f.std, f.shard_size, f.batch_size, f.seconds)


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "where the caches are written, and removed again")
    flags.DEFINE_list("records", ["100000", "1000000", "10000000"], "examples of each cache")
    flags.DEFINE_bool("std", False, "whether the caches hold standard deviations")
    flags.DEFINE_integer("shard_size", PICTURES_PER_SHARD, "records of a shard", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1024, "examples of a batch, of all hosts", lower_bound=1)
    flags.DEFINE_float("seconds", 4.0, "how long each figure is measured")
    flags.mark_flag_as_required("folder")
    app.run(main)
