"""The benchmarks at toy size: what they run and report; never how fast."""

import sys

import pytest

from benchmarks.processes import run_processes


def run_benchmark(name, *arguments):
    """Output of a benchmark that ran as from the command line."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    [(code, output)] = run_processes([command], devices=1, timeout=240)
    assert code == 0, output
    return output


def read_table(output):
    """Markdown table => {first cell: {title: cell}}."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    titles, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {row[0]: dict(zip(titles[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.slow
def test_compile_time_measures_a_cold_and_a_warm_process(tmp_path):
    cache = tmp_path / "cache"
    arguments = ("--tiny", "--batch_size=4", f"--cache={cache}")
    table = read_table(run_benchmark("compile_time", *arguments))
    assert list(table) == ["cold", "warm"]
    for row in table.values():
        seconds = {phase: float(cell) for phase, cell in row.items()}
        assert list(seconds) == ["import", "set-up", "init", "first step", "total", "next step"]
        assert all(seconds[phase] > 0 for phase in ("import", "init", "first step", "total"))
        parts = ("import", "set-up", "init", "first step")
        assert seconds["total"] == pytest.approx(sum(map(seconds.get, parts)), abs=0.03)
    assert any("create_state" in path.name for path in cache.iterdir())


@pytest.mark.slow
def test_compile_time_wants_an_empty_cache(tmp_path):
    (tmp_path / "entry").touch()
    with pytest.raises(AssertionError, match="the cache must be empty at first, got .*"):
        run_benchmark("compile_time", "--tiny", f"--cache={tmp_path}")
