"""Preemption: SIGTERM saves and ends with 0, on one process and on two; the next start goes on."""

import re
import signal
import sys
import time
from pathlib import Path

from benchmarks.processes import finish_processes, start_processes
from ldm_jax.preemption import watch_preemption

WORKER = str(Path(__file__).parent / "worker.py")


def wait_for(process, text):
    """Reads a process's output up to a line with `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process ended without {text!r}")


def test_a_signal_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with watch_preemption() as preempted:
        assert not preempted(1)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert preempted(2) and preempted(3)
    assert signal.getsignal(signal.SIGTERM) is before


def preempt(folder, number, start, times=1):
    """Starts `number` processes, sends SIGTERM to the last of them; the step that they saved."""
    processes = start_processes(
        [[sys.executable, WORKER, "preempt", str(folder)]] * number, devices=4
    )
    for process in processes:
        wait_for(process, f"start at {start}\n")
    time.sleep(0.5)
    began = time.monotonic()
    for _ in range(times):
        processes[-1].send_signal(signal.SIGTERM)
    results = finish_processes(processes, timeout=60)
    assert time.monotonic() - began < 30
    assert [code for code, _ in results] == [0] * number, results
    steps = {int(re.search(r"saved step (\d+)", output)[1]) for _, output in results}
    assert len(steps) == 1 and steps.pop() > start
    return int(re.search(r"saved step (\d+)", results[0][1])[1])


def test_one_process_saves_and_the_next_start_goes_on_from_there(tmp_path):
    step = preempt(tmp_path, 1, 0, times=2)
    assert preempt(tmp_path, 1, step) > step


def test_two_processes_save_at_the_same_step_when_one_is_preempted(tmp_path):
    step = preempt(tmp_path, 2, 0)
    assert preempt(tmp_path, 2, step) > step
