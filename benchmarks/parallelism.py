"""The same 20 training steps on every number of processes and devices, in every way to spread them.

    python -m benchmarks.parallelism [--steps=20] [--layouts=1x1,2x4]

A layout is processes x devices of each, virtual ones of this machine's CPU. Prints a table of the
largest differences to one process with one device, in losses and in weights; ends with 1 if one
lies beyond the tolerance.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from benchmarks.processes import run_processes
from ldm_jax import feed, hosts, sharding, training
from ldm_jax.latents import LatentScale
from ldm_jax.packing import pack_state
from ldm_jax.unet import get_network

LAYOUTS = "1x1,1x4,1x8,2x2,2x4,4x1,4x2"
BATCH = 16
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 1e-3


def get_ways(devices: int) -> dict[str, tuple[str, str]]:
    """Mesh and parallelism of each way to spread a step over so many devices."""
    ways = {"data": ("data", "jit"), "pmap": ("data", "pmap")}
    if devices > 1:
        ways |= {"fsdp": ("fsdp", "jit"), "both": (f"data=2,fsdp={devices // 2}", "jit")}
    return ways


def read_rows(k: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of batch k. The further down the batch, the brighter: no part is like the whole."""
    rng = np.random.default_rng(k)
    latents = 0.2 * rng.standard_normal((BATCH, 8, 8, 4))
    latents += np.linspace(-1, 1, BATCH)[:, None, None, None]
    texts = rng.standard_normal((BATCH, 6))
    batch = {"latents_mean": latents, "latents_std": np.full(latents.shape, 0.1)}
    return {k: v[rows].astype(np.float32) for k, v in (batch | {"text_embeddings": texts}).items()}


def train(layout: str, parallelism: str, steps: int) -> dict[str, np.ndarray]:
    """Losses of a small network with batch norms and dropout, and its weights after the last step.

    SGD: Adam divides gradients that are only rounding by themselves.
    """
    mesh = sharding.get_mesh(layout)
    network = get_network(8, 1, 6, widths=(32, 64), text_features=32, dropout=0.1)
    optimizer = optax.sgd(0.02, momentum=0.9)

    def create(key):
        state = training.create_train_state(key, network, optimizer, (8, 8, 4), (6,))
        return pack_state(state)

    state = sharding.compile_creation(create, mesh)(jax.random.key(0))
    train_step = training.get_train_step(
        network, optimizer, LatentScale(2.0), mesh=mesh, parallelism=parallelism
    )
    losses = []
    for batch in feed.feed_batches(mesh, read_rows, range(steps), BATCH):
        state, metrics = train_step(state, jax.random.key(0), batch)
        losses.append(jax.device_get(metrics["loss"]))
    gather = jax.jit(partial(sharding.gather, mesh))
    leaves = jax.tree.leaves(gather((state.params, state.batch_stats)))
    weights = np.concatenate([x.ravel() for x in jax.device_get(leaves)])
    return {"losses": np.array(losses), "weights": weights}


def work(folder: Path, steps: int) -> None:
    """One process of a layout: every way in turn; the first writes what came out."""
    count = int(os.environ["NUM_PROCESSES"])
    if count > 1:
        hosts.join_hosts(os.environ["COORDINATOR"], count, int(os.environ["PROCESS_ID"]))
    for name, (layout, parallelism) in get_ways(jax.device_count()).items():
        found = train(layout, parallelism, steps)
        if hosts.is_leader():
            np.savez(folder / f"{name}.npz", **found)


def measure(layouts: list[str], steps: int) -> list[dict]:
    """Runs the layouts one after the other; a row for each way, the first is the reference."""
    rows, reference = [], None
    for layout in layouts:
        processes, devices = map(int, layout.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.parallelism", "--folder", folder]
            command += ["--steps", str(steps)]
            for code, output in run_processes([command] * processes, devices, timeout=600):
                if code:
                    raise RuntimeError(f"a process of {layout} ended with {code}:\n{output}")
            for way in get_ways(processes * devices):
                found = dict(np.load(Path(folder) / f"{way}.npz"))
                reference = reference or found
                row = {"processes": processes, "devices": processes * devices, "way": way}
                for name in ("losses", "weights"):
                    row[name] = float(np.abs(found[name] - reference[name]).max())
                row["loss"] = float(found["losses"][-1])
                rows.append(row)
                print(
                    f"| {row['processes']} | {row['devices']} | {way} | {row['loss']:.5f} | "
                    f"{row['losses']:.1e} | {row['weights']:.1e} |",
                    flush=True,
                )
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--folder", help="of a worker, set by this program itself")
    options = parser.parse_args(arguments)
    if options.folder:
        work(Path(options.folder), options.steps)
        return 0
    print(f"| processes | devices | way | loss {options.steps} | losses differ | weights differ |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = measure(options.layouts.split(","), options.steps)
    beyond = [
        row
        for row in rows
        if not (row["losses"] <= LOSS_TOLERANCE and row["weights"] <= WEIGHT_TOLERANCE)
    ]
    print(f"\n{len(rows)} runs, {len(beyond)} beyond {LOSS_TOLERANCE} and {WEIGHT_TOLERANCE}")
    return int(bool(beyond))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
