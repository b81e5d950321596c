"""1, 2, 4, ... GPUs of one host => training and sampling on them, and what they say to each other.

    python -m benchmarks.scaling [--parts=train,sample,checkpoint,processes] [--devices=1,2]
        [--batch_a_device=1024,256] [--ways=data,fsdp,both,pmap] [--pictures=1024]
    python -m benchmarks.scaling --tiny    on 8 virtual devices of this machine's CPU

The network is that of configs/seed.py in bfloat16; state and batches lie on the devices as train.py
puts them. The programs of a part are compiled side by side, those of pmap at their first step.
Prints a markdown table for each part:

    train        every way to spread a step; "both" is data=2,fsdp=N/2
    sample       see spread_sampling.py; against the first row, whether the noise is the same bit
                 for bit, and how far the latents differ
    checkpoint   a small state, saved from all devices (fsdp), restored on each number of them
    processes    as train, in one process for each device: a job for each row, so name few --ways

`efficiency` is img/s a device against one device of the same part. `messages MB` are bytes of
the collectives in the compiled program; `collective ms` and `busy ms` what a device spends of a
step in NCCL's kernels (with the waiting for others) and in all kernels, by a profile. `GB` is the
most that a device has held since the process started, `program GB` what the compiler plans.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import rows, timing
from benchmarks.parallelism import get_ways
from benchmarks.processes import ROOT, run_processes
from benchmarks.spread_sampling import sample
from benchmarks.train_step import Trainer
from ldm_jax import hosts, sharding

SPEED = {"ms": ".2f", "lowest": ".2f", "highest": ".2f", "img/s": ",.0f", "efficiency": ".1%"}
MEMORY = {"GB": ".2f", "program GB": ".2f", "compile s": ".1f"}
WHERE = {"work": "", "devices": "", "way": "", "size": ""}
COLUMNS = {
    "train": WHERE
    | SPEED
    | {"messages MB": ",.1f", "collective ms": ".2f", "busy ms": ".2f"}
    | MEMORY,
    "sample": WHERE
    | SPEED
    | {"messages MB": ",.1f", "same noise": "", "difference": ".1e"}
    | MEMORY,
    "checkpoint": WHERE | {"seconds": ".2f", "same": ""},
    "processes": WHERE | SPEED | {"collective ms": ".2f", "busy ms": ".2f"} | MEMORY,
}


def measure_step(trainer: Trainer, size: int, options: argparse.Namespace, future: Any) -> dict:
    """Training steps of `size` images a device; pmap's without a compiled program."""
    devices, row = trainer.mesh.size, {}
    if future is None:
        step = trainer.get_step(parallelism="pmap")
    else:
        step, row["compile s"] = future.result()
        row |= {"messages MB": timing.count_megabytes(step)} | timing.program_memory(step)
    call = trainer.get_call(step, size * devices)
    start = time.perf_counter()
    jax.block_until_ready(call())
    row.setdefault("compile s", time.perf_counter() - start)
    row |= timing.measure(call, size * devices, options.repeats, options.calls)
    return (
        row | timing.count_collectives(call, len(trainer.mesh.local_devices)) | timing.peak_memory()
    )


def choose_ways(options: argparse.Namespace, devices: int) -> list[str]:
    """Those of --ways that so many devices have; of two, "both" would be "fsdp".

    One device always has "data", with which the others are compared.
    """
    asked = options.ways.split(",") + (["data"] if devices == 1 else [])
    return [way for way in get_ways(devices) if way in asked and (way != "both" or devices > 2)]


def train(table: timing.Table, options: argparse.Namespace, fields: dict) -> None:
    """A row for each size, number of devices and way."""
    ways, trainers = {}, {}
    for devices in options.counts:
        for way in choose_ways(options, devices):
            layout, parallelism = get_ways(devices)[way]
            ways[devices, way] = layout, parallelism
            mesh = sharding.get_mesh(layout, jax.devices()[:devices])
            trainers.setdefault((devices, layout), Trainer(fields, mesh))
    compiled = timing.compile_all(
        {
            (size, devices, way): partial(trainers[devices, layout].lower, size * devices)
            for size in options.sizes
            for (devices, way), (layout, parallelism) in ways.items()
            if parallelism == "jit"
        }
    )
    efficiency = timing.Efficiency()

    def work(trainer, devices, size, future):
        return efficiency(measure_step(trainer, size, options, future), devices, size)

    for size in options.sizes:
        for (devices, way), (layout, _) in ways.items():
            about = {"work": "train", "devices": devices, "way": way, "size": size}
            arguments = trainers[devices, layout], devices, size, compiled.get((size, devices, way))
            table.attempt(about, work, *arguments)


def restore(table: timing.Table, options: argparse.Namespace, fields: dict) -> None:
    """A row for each number of devices that the state of all comes back on."""
    from ldm_jax import checkpoint
    from ldm_jax.latents import LatentScale
    from ldm_jax.meta import create_meta

    fields = rows.TINY | {"widths": (64, 128)}  # Small, whatever the rest measures.

    def create_trainer(devices):
        return Trainer(fields, sharding.get_mesh("fsdp", jax.devices()[:devices]))

    trainer = create_trainer(max(options.counts))
    state = trainer.create_state()
    meta = create_meta(
        network=fields,
        noising={"mixture": "variance_preserving", "noise_law": "uniform", "max_angle": 1.0},
        sampling={},
        scale=LatentScale(2.5),
        vae={"name": "none", "sha256": None},
        text_encoder={"name": "none", "sha256": None},
        latent_shape=trainer.shapes[0],
        embedding_shape=trainer.shapes[1],
    )
    with tempfile.TemporaryDirectory() as folder, checkpoint.open_checkpoints(folder) as manager:
        checkpoint.save_checkpoint(manager, state, meta)
        manager.wait_until_finished()

        def work(devices):
            start = time.perf_counter()
            target = create_trainer(devices).state_shapes
            restored = jax.block_until_ready(checkpoint.restore_checkpoint(manager, target, meta))
            seconds = time.perf_counter() - start
            same = jax.tree.map(np.array_equal, *map(jax.device_get, (state, restored)))
            return {"seconds": seconds, "same": all(jax.tree.leaves(same))}

        for devices in options.counts:
            about = {"work": "checkpoint", "devices": devices, "way": "fsdp"}
            table.attempt(about | {"size": trainer.mesh.size}, work, devices)


def run_process(options: argparse.Namespace, fields: dict) -> None:
    """One process of several, each with a device of its own; the first prints the row."""
    number = int(os.environ["PROCESS_ID"])
    if not options.tiny:
        jax.config.update("jax_cuda_visible_devices", str(number))
    count = int(os.environ["NUM_PROCESSES"])
    if count > 1:
        hosts.join_hosts(os.environ["COORDINATOR"], count, number)
    layout, parallelism = get_ways(count)[options.ways]
    trainer, [size] = Trainer(fields, sharding.get_mesh(layout)), options.sizes
    future = None
    if parallelism == "jit":
        future = timing.compile_all({size: partial(trainer.lower, size * count)})[size]
    row = measure_step(trainer, size, options, future)
    if hosts.is_leader():
        print("\n" + json.dumps(row), flush=True)


def join(table: timing.Table, options: argparse.Namespace, fields: dict) -> None:
    """A row for each size, number of processes and way."""
    efficiency = timing.Efficiency()
    environment: dict[str, str] = {}
    if not options.tiny:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {name: os.environ.get(name, "") for name in ("JAX_PLATFORMS", "XLA_FLAGS")}
        environment |= {"PYTHONPATH": os.pathsep.join(paths)}

    def work(devices, way, size):
        command = [sys.executable, "-m", "benchmarks.scaling", "--part_of_job", f"--ways={way}"]
        command += [f"--batch_a_device={size}", f"--repeats={options.repeats}"]
        command += [f"--calls={options.calls}", *(["--tiny"] if options.tiny else [])]
        done = run_processes([command] * devices, 1, timeout=400, **environment)
        for code, output in done:
            if code:
                raise RuntimeError(f"a process ended with {code}: {output[-300:]}")
        line = next(line for line in done[0][1].splitlines() if line.startswith("{"))
        return efficiency(json.loads(line), devices, size)

    for size in options.sizes:
        for devices in options.counts:
            for way in choose_ways(options, devices):
                about = {"work": "processes", "devices": devices, "way": way, "size": size}
                table.attempt(about, work, devices, way, size)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(COLUMNS), help="separated by commas")
    parser.add_argument("--devices", default="", help="numbers of them; default: 1, 2, 4, ... all")
    parser.add_argument("--batch_a_device", default="", help="sizes; default: 1024,256")
    parser.add_argument("--ways", default="data,fsdp,both,pmap", help="to spread training")
    parser.add_argument("--pictures", type=int, default=0, help="default: 1024")
    parser.add_argument("--steps", type=int, default=70, help="noise levels of sampling")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--calls", type=int, default=0, help="training steps of a round")
    parser.add_argument("--out", default="", help="JSON file of all rows, written at each")
    parser.add_argument("--append", action="store_true", help="to the rows of --out")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on 8 virtual CPU devices")
    parser.add_argument("--here", action="store_true", help="set by --tiny itself")
    parser.add_argument("--part_of_job", action="store_true", help="set by `processes` itself")
    options = parser.parse_args(arguments)
    options.calls = options.calls or (2 if options.tiny else 20)
    options.pictures = options.pictures or (8 if options.tiny else 1024)
    sizes = options.batch_a_device or ("2" if options.tiny else "1024,256")
    options.sizes = [int(size) for size in sizes.split(",")]
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    fields = rows.TINY if options.tiny else rows.SEED
    if options.part_of_job:
        run_process(options, fields)
        return 0
    if options.tiny and not options.here:
        command = [sys.executable, "-m", "benchmarks.scaling", *arguments, "--here"]
        [(code, output)] = run_processes([command], devices=8, timeout=900)
        print(output)
        return code
    count = jax.device_count()
    options.counts = [2**k for k in range(count.bit_length()) if 2**k < count] + [count]
    if options.devices:
        options.counts = [int(devices) for devices in options.devices.split(",")]
    print(f"{jax.devices()[0].device_kind}, {count} devices")
    parts = {"train": train, "sample": sample, "checkpoint": restore, "processes": join}
    for i, part in enumerate(options.parts.split(",")):
        print(flush=True)
        append = options.append or i > 0
        table = timing.Table(COLUMNS[part], options.out, append=append)
        parts[part](table, options, fields)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
