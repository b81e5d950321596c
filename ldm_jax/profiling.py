"""Steps on a device => a trace in a folder, and a table of where the device's time went."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

TRACE = "*.xplane.pb"


class Kernel(NamedTuple):
    """All runs of one kernel, on all traced devices: how many, and the seconds they took."""

    name: str
    count: int
    seconds: float


class StepWindow:
    """Traces a few steps of a run, waiting for the device only before and after them.

    Use it in `with`; tell it of each step, `before` and `after`. When the last of its steps is
    done, or the run ends before, it says where the trace is and what took the time.

    Args:
        steps: "20:5" for the five steps from the 20th on, "" for none.
        folder: gets the trace.

    Raises:
        ValueError: for steps in another form.
    """

    def __init__(self, steps: str, folder: str | Path):
        self._first, self._count = parse_steps(steps) if steps else (0, 0)
        self._folder = Path(folder)
        self._traced = 0
        self._open = False

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._open:
            self._close()
        elif self._count and not self._traced:
            tqdm.write(f"no trace: the run took no step {self._first}")

    def before(self, step: int, state: Any) -> None:
        """`state` is what the step starts from."""
        if self._count and step == self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def after(self, state: Any) -> None:
        """`state` is what a step gave."""
        if self._open:
            self._traced += 1
            if self._traced == self._count:
                jax.block_until_ready(state)
                self._close()

    def _close(self):
        self._open = False
        jax.profiler.stop_trace()
        last = self._first + self._traced - 1
        tqdm.write(
            f"traced the steps {self._first} to {last} into {self._folder}: look at it with "
            f"`pip install xprof; xprof {self._folder}`, or give its trace.json.gz to "
            "https://ui.perfetto.dev\n"
            + describe(summarise_trace(self._folder), max(self._traced, 1))
        )


def parse_steps(text: str) -> tuple[int, int]:
    """First step and number of steps of "20:5".

    Raises:
        ValueError: for another form, or numbers below 1.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    first, count = map(int, found.groups()) if found else (0, 0)
    if first < 1 or count < 1:
        raise ValueError(f"profile must look like 20:5 (five steps from the 20th on), got {text!r}")
    return first, count


def profile_calls(run: Callable[[], Any], folder: str | Path, calls: int = 1) -> Any:
    """Traces `calls` calls of `run` into a folder.

    It waits for the device only at the two ends: call `run` once before, or compiling is traced.

    Args:
        run: returns arrays, those of the last of its computations.
        folder: gets the trace, in a folder of its own beside earlier ones.
        calls: how many.

    Returns:
        What the last call returned.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    with jax.profiler.trace(str(folder)):
        for _ in range(calls):
            result = run()
        return jax.block_until_ready(result)


def summarise_trace(folder: str | Path) -> list[Kernel]:
    """Where the devices' time went in the newest trace of a folder, the longest first.

    A GPU's kernels lie on the lines of its streams, a TPU's on the line of XLA's operations. An
    operation that holds others, a loop say, counts only what they leave it. Without a device's
    plane, as on a CPU, the list is empty.

    Raises:
        FileNotFoundError: if there is no trace in the folder.
    """
    traces = sorted(Path(folder).expanduser().rglob(TRACE), key=lambda p: p.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"no trace ({TRACE}) in {folder}")
    totals: dict[str, tuple[int, float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream") or line.name == "XLA Ops":
                for name, nanoseconds in _own_times(line.events):
                    count, total = totals.get(name, (0, 0.0))
                    totals[name] = count + 1, total + nanoseconds
    kernels = [Kernel(name, count, total / 1e9) for name, (count, total) in totals.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def describe(kernels: list[Kernel], steps: int = 1, rows: int = 12) -> str:
    """A table of the kernels that took longest: milliseconds and runs of a step, of all devices.

    Args:
        kernels: of `summarise_trace`.
        steps: how many the trace holds.
        rows: how many kernels are named.
    """
    if not kernels:
        return "the trace holds no device plane with kernels: on a CPU there is none"

    def add_up(name, kernels):
        return Kernel(name, sum(k.count for k in kernels), sum(k.seconds for k in kernels))

    rest, total = kernels[rows:], add_up("all kernels", kernels)
    shown = kernels[:rows] + ([add_up(f"{len(rest)} others", rest)] if rest else []) + [total]
    lines = [f"{'ms a step':>10}  {'share':>6}  {'runs a step':>11}  kernel"]
    lines += [
        f"{1e3 * k.seconds / steps:10.3f}  {k.seconds / (total.seconds or 1):6.1%}  "
        f"{k.count / steps:11.1f}  {k.name if len(k.name) <= 60 else k.name[:57] + '...'}"
        for k in shown
    ]
    return "\n".join(lines)


def _own_times(events: Any) -> list[tuple[str, float]]:
    """Names and nanoseconds of the events of a line, less those of the events that they hold."""
    times: list[tuple[str, float]] = []
    holders: list[tuple[int, float]] = []  # Indices and ends, the innermost last.
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        end = event.start_ns + event.duration_ns
        while holders and holders[-1][1] < end:
            holders.pop()
        if holders:
            outer, _ = holders[-1]
            times[outer] = times[outer][0], times[outer][1] - event.duration_ns
        holders.append((len(times), end))
        times.append((event.name, event.duration_ns))
    return times
