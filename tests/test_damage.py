"""train.py as a process: killed, preempted, on a full disk, with damaged files. Nothing is lost."""

import resource
import signal
import time

import pytest

from benchmarks import damage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Examples, their cache and a config; programs that were compiled once are kept in it."""
    folder = tmp_path_factory.mktemp("damage")
    damage.prepare(folder)
    return folder


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 300  # On a busy machine a first start takes over a minute.
    while damage.get_logged_step(workdir) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_ends_with_0_and_a_full_disk_with_1_and_nothing_is_lost(folder):
    workdir = folder / "run"
    process = damage.start(folder, workdir)
    wait_for_step(process, workdir, 4)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    saved = damage.get_last_step(workdir)
    assert 4 <= saved == damage.get_logged_step(workdir)
    assert f"stopped after step {saved}, which is saved" in (workdir / "output.txt").read_text()

    process = damage.start(folder, workdir)
    wait_for_step(process, workdir, saved + 1)
    # As on a full disk, writing a file of some length fails from here on; the output is shorter.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (400_000, 400_000))
    assert process.wait(60) == 1
    output = (workdir / "output.txt").read_text()
    assert f"going on from step {saved}" in output
    assert "train.py: a checkpoint could not be written" in output
    assert int(damage.read_newest(workdir).step) == damage.get_last_step(workdir) >= saved
    assert not (workdir / "damaged").exists()


def test_runs_survive_kills_and_damaged_files(folder):
    kills, outcomes = damage.run(folder, kills=3, damages=12, seed=1)
    assert kills["kills"] == 3
    assert sum(counts.total() for counts in outcomes.values()) == 2 * 12
    assert damage.is_good(kills, outcomes), (kills, outcomes)
