"""Processes that find each other and agree, and errors that say what to check."""

import json
import socket
import sys

import jax
import pytest

from benchmarks.parallelism import measure
from benchmarks.processes import find_free_port, run_processes
from ldm_jax import hosts


def test_one_process_needs_no_flags(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert hosts.join_hosts() == "one process"
    assert hosts.join_hosts(cluster="none") == "one process"
    assert hosts.is_leader()
    hosts.check_agreement(config={"a": 1})


@pytest.mark.parametrize(
    "environ, cluster",
    [
        ({}, "none"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, "slurm"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "none"),
        ({"SLURM_NTASKS": "4"}, "none"),  # sbatch's own shell: no task.
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "none"),
    ],
)
def test_clusters_are_known_by_their_environment(environ, cluster):
    assert hosts.detect_cluster(environ) == cluster


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("10.0.0.1:9000", 2), "go together, got no process_id"),
        (("", 2, 0), "go together, got no coordinator"),
        (("10.0.0.1:9000", 2, 2), r"process_id must lie in \[0, num_processes\), got process_id=2"),
        (("10.0.0.1:9000", 0, 0), "num_processes=0"),
        (("10.0.0.1", 2, 1), "coordinator must look like host:port, got '10.0.0.1'"),
        (("10.0.0.1:90000", 2, 1), "coordinator must look like host:port"),
        (("", None, None, "pbs"), "cluster must be one of .* got 'pbs'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.join_hosts(*arguments)


def test_a_name_that_nobody_knows_is_said():
    with pytest.raises(ConnectionError, match="name 'no.such.host.invalid' is unknown on"):
        hosts.join_hosts("no.such.host.invalid:9000", 2, 1)


def test_a_name_that_means_this_machine_is_said(monkeypatch):
    local = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 9000))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: local)
    with pytest.raises(ConnectionError, match="leads to 127.0.1.1 .* to this machine itself"):
        hosts.join_hosts("gpu-node-0:9000", 2, 1)


def test_a_coordinator_that_does_not_answer_is_said():
    address = f"127.0.0.1:{find_free_port()}"
    with pytest.raises(ConnectionError, match=f"found nobody at {address} for 1 s: .*Check that"):
        hosts.join_hosts(address, 2, 1, timeout=1)


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"cannot take port {port}: .*Another run"):
            hosts.join_hosts(f"127.0.0.1:{port}", 2, 0)


JOIN = """
import os, sys
from ldm_jax import hosts
count, number = int(os.environ["NUM_PROCESSES"]), int(os.environ["PROCESS_ID"])
try:
    print(hosts.join_hosts(os.environ["COORDINATOR"], {count}, number, timeout={timeout}))
    {then}
except (ConnectionError, ValueError) as error:
    sys.exit(f"stopped: {{error}}")
"""


def join(processes=2, count="count", timeout=60, then="pass", devices=2):
    code = JOIN.format(count=count, timeout=timeout, then=then)
    return run_processes([[sys.executable, "-c", code]] * processes, devices)


@pytest.mark.slow
def test_processes_join_and_know_their_number():
    for number, (code, output) in enumerate(join()):
        assert code == 0, output
        assert f"process {number} of 2, 2 of 4 devices" in output


@pytest.mark.slow
def test_a_process_that_does_not_come_ends_the_wait_with_what_to_check():
    ((code, output),) = join(processes=1, count=2, timeout=3)
    assert code == 1
    assert "some did not come within 3 s. Check that all processes were started" in output


@pytest.mark.slow
def test_hosts_with_other_settings_stop_and_name_them():
    then = 'hosts.check_agreement(config={"seed": 0}, code="a" if number < 2 else "b", data=number)'
    for code, output in join(processes=3, then=then):
        assert code == 1
        assert "process 0's code (process 2), data (process 1, 2);" in output
    for code, output in join(then='hosts.check_agreement(config={"seed": 0}); print("agreed")'):
        assert code == 0 and "agreed" in output


def test_the_code_is_known_by_versions_and_source(tmp_path):
    about = hosts.describe_code()
    assert about["jax"] == jax.__version__ and len(about["source_sha256"]) == 64
    assert hosts.describe_code() == about
    door = tmp_path / "train.py"
    door.write_text("pass\n")
    assert hosts.describe_code(door)["source_sha256"] != about["source_sha256"]
    json.dumps(about)


@pytest.mark.slow
def test_processes_and_devices_do_not_change_what_is_learnt():
    # The short form of benchmarks/parallelism.py, which runs all layouts.
    rows = measure(["1x1", "2x2"], steps=6)
    assert [(r["processes"], r["devices"], r["way"]) for r in rows] == [
        (1, 1, "data"),
        (1, 1, "pmap"),
        *((2, 4, way) for way in ("data", "pmap", "fsdp", "both")),
    ]
    assert rows[0]["loss"] > 0.05
    assert all(row["losses"] < 2e-4 and row["weights"] < 5e-4 for row in rows)
    assert any(row["losses"] > 0 for row in rows)  # Another order of sums: they did run apart.
