"""The launch script, two processes of train.py, preemption, and going on with another number."""

import json
import os
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

import sample
from benchmarks.damage import prepare, read_newest
from benchmarks.processes import FAST_COMPILATION, ROOT, find_free_port, run_processes
from ldm_jax import exports, models

SSH = """#!/usr/bin/env bash
# Stands for ssh: runs the command here, whatever the host.
shift
exec bash -c "$*"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair of .npy files, their cache and a config of 60 steps."""
    folder = tmp_path_factory.mktemp("pods")
    prepare(folder)
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    return folder


def get_flags(folder, workdir, mesh):
    return [
        f"--config={folder / 'config.py'}",
        f"--workdir={folder / workdir}",
        f"--config.sharding.mesh={mesh}",
    ]


def launch(folder, *flags, hosts=2, devices=2):
    """launch/ssh.sh on so many hosts, all of them this machine."""
    environment = os.environ | {
        "HOSTS": " ".join(["127.0.0.1"] * hosts),
        "PORT": str(find_free_port()),
        "SSH": str(folder / "ssh"),
        "DIR": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [str(ROOT / "launch" / "ssh.sh"), *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_log(workdir):
    path = workdir / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_preempted_run_of_two_hosts_goes_on_on_one(folder):
    workdir = folder / "moved"
    process = launch(folder, *get_flags(folder, "moved", "data=2,fsdp=2"))
    deadline = time.monotonic() + 300
    while len(read_log(workdir)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # To the script; it passes it on.
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "[0] process 0 of 2, 2 of 4 devices" in output
    assert "[1] process 1 of 2, 2 of 4 devices" in output
    assert "fsdp, axis" in output  # The table of shardings.
    assert output.count("SIGTERM: stopped after step") == 1
    stopped = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 4 <= stopped < 60

    # On one host with another number of devices and another mesh.
    command = [sys.executable, "train.py"]
    ((code, output),) = run_processes([[*command, *get_flags(folder, "moved", "data")]], devices=4)
    assert code == 0 and f"going on from step {stopped}" in output, output
    ((code, output),) = run_processes([[*command, *get_flags(folder, "whole", "data")]], devices=1)
    assert code == 0, output

    # The same batches, noise and dropped labels: the losses are those of the run that stayed.
    moved, whole = read_log(workdir), read_log(folder / "whole")
    assert [line["step"] for line in moved] == [line["step"] for line in whole]
    losses = np.array([[line["loss"] for line in log] for log in (moved, whole)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2)
    assert np.std(losses[1]) > 0.01
    states = [read_newest(folder / name) for name in ("moved", "whole")]
    norms = [
        np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(state.ema_params)))
        for state in states
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-2)

    # Sampling needs neither the mesh nor the other host.
    model = models.load_model(workdir)
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(model.denoiser.variables))
    paths = sample.sample(["a"], folder / "pictures", checkpoint_folder=workdir)
    assert paths[0].exists()

    # Two hosts start from its weights, and stop if one of them finds others.
    for home, source in (("one", "moved"), ("other", "whole")):
        exports.export_model(models.load_model(folder / source), folder / home / "model", "float32")
    changes = ["--config.start_from=~/model", "--config.optimizer.learning_rate=0.0"]
    for homes in (("one", "one"), ("one", "other")):
        flags = [*get_flags(folder, f"from-{homes[1]}", "data=2,fsdp=2"), *changes]
        job = ["--num_processes=2", f"--coordinator=127.0.0.1:{find_free_port()}"]
        commands = [
            ["env", f"HOME={folder / home}", *command, *flags, *job, f"--process_id={number}"]
            for number, home in enumerate(homes)
        ]
        results = run_processes(commands, devices=2)
        if homes[1] == "one":
            assert [code for code, _ in results] == [0, 0], results
            started = read_newest(folder / "from-one").params
            expected = models.load_model(folder / "one" / "model").denoiser.variables["params"]
            chex.assert_trees_all_equal(jax.device_get(started), jax.device_get(expected))
        else:
            assert [code for code, _ in results] == [1, 1], results
            wanted = "not all have process 0's weights (process 1)"
            assert all(wanted in output for _, output in results), results


@pytest.mark.slow
def test_hosts_with_different_commands_stop(folder):
    flags = get_flags(folder, "differ", "data")
    commands = [
        [sys.executable, "train.py", *flags, f"--config.seed={seed}", "--num_processes=2"]
        for seed in (0, 1)
    ]
    port = find_free_port()
    for number, command in enumerate(commands):
        command += [f"--coordinator=127.0.0.1:{port}", f"--process_id={number}"]
    for code, output in run_processes(commands, devices=1):
        assert code == 1
        assert "not all have process 0's config (process 1)" in output
    assert not (folder / "differ" / "checkpoints").exists()


def run_script(tmp_path, script, programs, *arguments, **variables):
    """A launch script with stand-ins for the cluster's programs; its output."""
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
    result = subprocess.run(
        [str(ROOT / "launch" / script), *arguments], env=environment, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("ending", ["", "SIGTERM: stopped after step 5, which is saved"])
def test_a_slurm_job_is_queued_again_when_its_time_was_up(tmp_path, ending):
    programs = {"srun": f'echo "srun $*"; echo "{ending}"', "scontrol": 'echo "scontrol $*"'}
    code, output = run_script(
        tmp_path, "slurm.sh", programs, "--config=a.py", "--workdir=b c", SLURM_JOB_ID="42"
    )
    assert code == 0
    assert "train.py --cluster=slurm --config=a.py --workdir=b c" in output
    assert ("scontrol requeue 42" in output) == bool(ending)


def test_a_slurm_job_that_fails_is_not_queued_again(tmp_path):
    programs = {"srun": "echo broken; exit 3", "scontrol": 'echo "scontrol $*"'}
    code, output = run_script(tmp_path, "slurm.sh", programs, SLURM_JOB_ID="42")
    assert code == 3 and "scontrol" not in output


def test_every_gpu_of_a_machine_gets_a_process_and_a_failure_is_that_of_the_script(tmp_path):
    body = 'echo "GPU $CUDA_VISIBLE_DEVICES: $*"; [ "$CUDA_VISIBLE_DEVICES" != 5 ] || exit 3'
    where = {"GPUS": "2 5", "PORT": "7", "PYTHON": str(tmp_path / "python")}
    code, output = run_script(tmp_path, "local.sh", {"python": body}, "--workdir=b c", **where)
    assert code == 3
    said = "train.py --coordinator=127.0.0.1:7 --num_processes=2 --process_id={} --workdir=b c"
    expected = {f"[{i}] GPU {gpu}: {said.format(i)}" for i, gpu in enumerate((2, 5))}
    assert set(output.splitlines()) == expected
    code, output = run_script(tmp_path, "local.sh", {}, GPUS="")
    assert code != 0 and "numbers of the GPUs" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_first_of_a_machines_processes_alone(tmp_path, number):
    """As by Ctrl-C, to the script's whole process group: no. 1 ends by itself, not by it."""
    ended = f"echo $CUDA_VISIBLE_DEVICES saved >> {tmp_path / 'saved'}; echo saved; exit 0"
    waits = f"until [ -e {tmp_path / 'saved'} ]; do sleep 0.1; done; echo agreed"
    body = f"trap '{ended}' TERM INT\necho begun\n{waits}"
    (tmp_path / "python").write_text(f"#!/usr/bin/env bash\n{body}\n")
    (tmp_path / "python").chmod(0o755)
    process = subprocess.Popen(
        [str(ROOT / "launch" / "local.sh")],
        env=os.environ | {"GPUS": "0 1", "PYTHON": str(tmp_path / "python")},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell in the background hands on a SIGINT that is ignored, and cannot be trapped.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout
    begun = {process.stdout.readline() for _ in range(2)}
    assert begun == {"[0] begun\n", "[1] begun\n"}
    os.killpg(process.pid, number)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        (tmp_path / "saved").touch()  # Ends those that no signal has reached.
    assert process.returncode == 0
    assert set(output.splitlines()) == {"[0] saved", "[1] agreed"}
    assert (tmp_path / "saved").read_text() == "0 saved\n"


def test_every_host_of_a_tpu_gets_the_same_command(tmp_path):
    programs = {"gcloud": 'printf "%s\\n" "$@"'}
    where = {"TPU": "pod", "ZONE": "here", "REPO": "https://example.org/r.git"}
    code, output = run_script(tmp_path, "tpu_pod.sh", programs, "--workdir=b c", **where)
    assert code == 0
    assert "--worker=all" in output.splitlines()
    assert "git clone --depth=1 https://example.org/r.git" in output
    assert r"train.py --cluster=tpu --workdir=b\ c" in output
    code, output = run_script(tmp_path, "tpu_pod.sh", programs, TPU="", ZONE="", REPO="")
    assert code != 0 and "name of the TPU" in output
