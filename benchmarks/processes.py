"""Commands => their exit codes and outputs, run side by side as the processes of one job."""

import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
# XLA compiles small networks five times as fast so. jaxlib 0.11 no longer knows the second flag. At
# level 0 jaxlib 0.10's scheduler for concurrency lets a step read numbers of a donated state that
# are written over already: a loss was 2e-5 off, of the same step without donation it was not.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
    FAST_COMPILATION += " --xla_cpu_enable_concurrency_optimized_scheduler=false"


def start_processes(commands, devices=8, **variables):
    """Starts commands on `devices` virtual devices each.

    The environment tells each of several the address of the first, its number and how many they
    are: COORDINATOR, PROCESS_ID and NUM_PROCESSES.
    """
    job = {"COORDINATOR": f"127.0.0.1:{find_free_port()}", "NUM_PROCESSES": str(len(commands))}
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | job | {"PROCESS_ID": str(k)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k, command in enumerate(commands)
    ]


def run_processes(commands, devices=8, timeout=300, **variables):
    """Exit code and output of each command; see `start_processes`."""
    return finish_processes(start_processes(commands, devices, **variables), timeout)


def finish_processes(processes, timeout=300):
    """Exit code and output of each process. None is left running, whatever happens."""
    try:
        # All are read at once: one whose pipe is full would stop, and the others wait for it.
        with ThreadPoolExecutor(len(processes)) as pool:
            outputs = list(pool.map(lambda p: p.communicate(timeout=timeout)[0], processes))
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def find_free_port():
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
