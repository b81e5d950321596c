"""Names of rows, sizes => a table of ours beside PyTorch's, whose rows run in own processes.

The frame of benchmarks/train_step.py and sampling.py.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import timing

ROOT = Path(__file__).parent.parent
SEED = {
    "latent_image_size": 16,
    "block_depth": 3,
    "emb_size": 512,
    "widths": (128, 256, 512, 640),
}
DEMO = SEED | {"block_depth": 1, "widths": (32, 64, 96)}  # As wide as that of configs/demo.py.
TINY = {"latent_image_size": 8, "block_depth": 1, "emb_size": 6, "widths": (16, 32)}
COLUMNS = {
    "work": "",
    "size": "",
    "ms": ".2f",
    "lowest": ".2f",
    "highest": ".2f",
    "img/s": ",.0f",
    "of peak": ".1%",
    "kernels": ",.0f",
    "busy ms": ".2f",
    "GB": ".2f",
    "program GB": ".2f",
    "compile s": ".1f",
}


class Work(NamedTuple):
    """What a benchmark measures.

    Attributes:
        module: the benchmark's name.
        flops: of one image.
        calls: of a round.
        steps: times that a call runs the network; kernels are those of one.
        lower: (row, size) => our program, lowered.
        get_call: (row, size, compiled program) => a call of it.
        get_torch_call: (tokens, mode, size) => a call of PyTorch's.
    """

    module: str
    flops: float
    calls: int
    steps: int
    lower: Callable[[str, int], Any]
    get_call: Callable[[str, int, Any], Callable]
    get_torch_call: Callable[[str, str, int], Callable]


def get_parser(description: str, rows: str) -> argparse.ArgumentParser:
    """Options that the benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=rows, help="what to measure, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="networks of toy size")
    parser.add_argument("--demo", action="store_true", help="networks for a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--calls", type=int, default=0, help="of a round; default: by the work")
    parser.add_argument("--peak", type=float, default=0.0, help="FLOP/s; default: measured")
    parser.add_argument("--out", default="", help="JSON file of all rows, written at each")
    parser.add_argument("--append", action="store_true", help="to the rows of --out, no header")
    return parser


def get_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Of `get_network`, but for its dtype."""
    return TINY if options.tiny else DEMO if options.demo else SEED


def get_dtype() -> str:
    """That of the activations: bfloat16, but for a CPU, which has no fast bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def run(options: argparse.Namespace, work: Work, sizes: list[int]) -> None:
    """Measures and prints all rows: first ours, then those of PyTorch."""
    rows = options.rows.split(",")
    ours = [(row, size) for size in sizes for row in rows if row.startswith("ours")]
    torch_rows = [row for row in rows if row not in dict(ours)]
    compiled = timing.compile_all({pair: partial(work.lower, *pair) for pair in ours})
    small = options.tiny or options.demo
    options.peak = options.peak or timing.matrix_peak(512 if small else 8192)
    options.calls = options.calls or (2 if small else work.calls)
    if not options.append:
        device, peak = jax.devices()[0].device_kind, options.peak / 1e12
        print(f"{device}, {work.flops / 1e9:.4g} GFLOP an image, peak {peak:.4g} TFLOP/s\n")
    table = timing.Table(COLUMNS, options.out, append=options.append, header=not options.append)

    def finish(measure, *arguments):
        row = measure(work, options, *arguments)
        for name in {"kernels", "busy ms"} & set(row):
            row[name] /= work.steps
        return row | {"of peak": work.flops * row["img/s"] / options.peak}

    for row, size in ours:
        about = {"work": row, "size": size}
        table.attempt(about, finish, measure_ours, row, size, compiled[row, size])
    for row in torch_rows:
        if not options.append:
            run_child(table, work.module, row, options)
            continue
        for size in sizes:
            table.attempt({"work": row, "size": size}, finish, measure_torch, row, size)


def measure_ours(work: Work, options: argparse.Namespace, row: str, size: int, future: Any) -> dict:
    """The figures of a row of ours."""
    program, seconds = future.result()
    call = work.get_call(row, size, program)
    found = timing.measure(call, size, options.repeats, options.calls)
    found |= timing.count_kernels(call, 1 if work.steps > 1 else 3) | timing.peak_memory()
    return found | timing.program_memory(program) | {"compile s": seconds}


def measure_torch(work: Work, options: argparse.Namespace, row: str, size: int) -> dict:
    """The figures of a row of PyTorch's, in this process.

    Raises:
        ValueError: for a row that does not exist.
    """
    kind, *names = row.split("-")
    if kind != "torch" or len(names) != 2:
        raise ValueError(f"a row must be ours, ours-OPTION or torch-TOKENS-MODE, got {row!r}")
    call = work.get_torch_call(*names, size)
    return timing.measure_torch(call, size, options.repeats, options.calls)


def run_child(table: timing.Table, module: str, row: str, options: argparse.Namespace) -> None:
    """Measures a row in a process that prints it and adds it to the file. JAX has no GPU there."""
    given = vars(options) | {"rows": row}
    arguments = [f"--{name}={value}" for name, value in given.items() if type(value) is not bool]
    arguments += ["--append", *(f"--{name}" for name in ("tiny", "demo") if given[name])]
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        table.add({"work": row, "error": f"the process ended with {done.returncode}"})
