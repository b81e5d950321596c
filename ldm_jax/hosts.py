"""Several hosts as one: flags, SLURM's or a TPU pod's environment => processes that agree.

The engine is JAX's own: jax.distributed lets the processes find each other, XLA's collectives let
their devices talk. What is here starts it, says what to check when it does not start, and stops a
run whose hosts were not given the same thing to do.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

CLUSTERS = ("auto", "slurm", "tpu", "none")
CHECK = (
    "Check that all processes were started, with the same coordinator and number of processes and "
    "each with a process_id of its own; that process 0 runs on the coordinator's host; and that "
    "its port can be reached from the others (nc -z HOST PORT), past firewalls and proxies"
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def join_hosts(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    cluster: str = "auto",
    timeout: int = 900,
) -> str:
    """Connects this process with those of the other hosts, before JAX's first computation.

    Args:
        coordinator: "host:port" of process 0; with `num_processes` and `process_id`, or none.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        cluster: where the three come from when they are not given: "slurm", "tpu", "none", or
            "auto", which looks for more than one task of SLURM or worker of a TPU.
        timeout: seconds to wait for the others; a cold pod takes minutes.

    Returns:
        What was done, in a line for the log.

    Raises:
        ValueError: for some of the three flags without the others, or values out of range.
        ConnectionError: when the others are not found; says what to check.
    """
    given = {"coordinator": coordinator or None, "num_processes": num_processes}
    given["process_id"] = process_id
    missing = [name for name, value in given.items() if value is None]
    if cluster not in CLUSTERS:
        raise ValueError(f"cluster must be one of {CLUSTERS}, got {cluster!r}")
    if 0 < len(missing) < 3:
        raise ValueError(
            f"coordinator, num_processes and process_id go together, got no {', '.join(missing)}"
        )
    if not missing:
        assert num_processes is not None and process_id is not None
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id must lie in [0, num_processes), got {process_id=} {num_processes=}"
            )
        _check_address(coordinator, process_id)
        _check_port(coordinator, process_id, timeout)
        options: dict[str, Any] = given | {"cluster_detection_method": "deactivate"}
        options |= {"coordinator_address": options.pop("coordinator")}
        how = f"as process {process_id} of {num_processes} with {coordinator}"
    else:
        found = detect_cluster(os.environ) if cluster == "auto" else cluster
        if found == "none":
            return "one process"
        # JAX reads the rest from the environment; for TPUs it has several sources of its own.
        options = {"cluster_detection_method": "slurm"} if found == "slurm" else {}
        how = f"as {found} describes it"
    # JAX's runtime ends the process itself, with a stack trace, when time is up or two processes
    # have the same number: so it gets more time, and what to check is said before and at the end.
    print(f"joining the other processes {how}, for up to {timeout} s", file=sys.stderr, flush=True)
    watch = threading.Timer(timeout, _give_up, [how, timeout])
    watch.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=60,  # Of one that ends with an error, while others go on.
        )
    except Exception as error:
        raise ConnectionError(
            f"could not join the other processes {how}: {error}. {CHECK}"
        ) from error
    finally:
        watch.cancel()
    return (
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices"
    )


def detect_cluster(environ: Mapping[str, str]) -> str:
    """ "slurm", "tpu" or "none", by what the environment says of more than one process."""
    if int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))) > 1:
        if "SLURM_PROCID" in environ:
            return "slurm"
    if len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return "tpu"
    return "none"


def check_agreement(**parts: Any) -> None:
    """Stops every host unless all were given the same.

    Args:
        parts: by name what must be the same everywhere, as JSON can hold it.

    Raises:
        ValueError: on all hosts alike, with the parts that differ and the processes that differ
            from process 0 in them.
    """
    if jax.process_count() == 1:
        return
    words = np.stack([np.frombuffer(digest_settings(x), np.uint32) for x in parts.values()])
    all_words = np.asarray(multihost_utils.process_allgather(words))  # (process, part, word)
    differs = np.any(all_words != all_words[0], axis=-1)
    if differs.any():
        found = [
            f"{name} (process {', '.join(map(str, np.flatnonzero(differs[:, i])))})"
            for i, name in enumerate(parts)
            if differs[:, i].any()
        ]
        raise ValueError(
            f"the hosts must have been given the same, but not all have process 0's "
            f"{', '.join(found)}; start them with the same command from the same files"
        )


def agree_on_fault(fault: str | None) -> str | None:
    """The fault of the first process that has one, on all of them; every process must call it."""
    if jax.process_count() == 1:
        return fault
    sent = np.zeros(400, np.uint8)
    text = (fault or "").encode()[: sent.size]
    sent[: len(text)] = np.frombuffer(text, np.uint8)
    for received in multihost_utils.process_allgather(sent):
        if received.any():
            return bytes(received).rstrip(b"\0").decode(errors="replace")
    return None


def describe_code(*doors: Path) -> dict[str, str]:
    """Versions of what the numbers depend on, and a digest of this package's source."""
    sources = sorted(Path(__file__).parent.glob("*.py")) + sorted(doors)
    files = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sources]
    versions = {name: metadata.version(name) for name in PACKAGES}
    return versions | {"source_sha256": digest_settings(files).hex()}


def digest_settings(settings: Any) -> bytes:
    """SHA-256 of what JSON can hold, whatever the order of its keys; of all else, of its text."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()


def is_leader() -> bool:
    """Whether this process writes the logs and pictures."""
    return jax.process_index() == 0


def _check_address(coordinator: str, process_id: int) -> None:
    """Finds what otherwise looks like a hang: a name that is unknown, or that means oneself."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator must look like host:port, got {coordinator!r}")
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host.strip("[]"), int(port))}
    except OSError as error:
        raise ConnectionError(
            f"the coordinator's name {host!r} is unknown on {socket.gethostname()}: {error}. "
            "Check the spelling, or give its address in numbers"
        ) from error
    loopback = all(str(a).startswith("127.") or a == "::1" for a in addresses)
    itself = (socket.gethostname(), socket.getfqdn(), "localhost", "[::1]")
    if loopback and process_id != 0 and host not in itself and not host.startswith("127."):
        raise ConnectionError(
            f"the coordinator's name {host!r} leads to {', '.join(map(str, sorted(addresses)))} on "
            f"{socket.gethostname()}, that is to this machine itself. Give its address in numbers, "
            "or mend /etc/hosts"
        )


def _check_port(coordinator: str, process_id: int, timeout: int) -> None:
    """Process 0 must be able to take the port; the others wait until it has."""
    host, _, port = coordinator.rpartition(":")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ConnectionError(
                f"process 0 cannot take port {port}: {error}. Another run may hold it: "
                "wait for its end, or give another port to all processes"
            ) from error
        return
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(
                    f"process {process_id} on {socket.gethostname()} found nobody at {coordinator} "
                    f"for {timeout} s: {error}. {CHECK}"
                ) from error
        time.sleep(0.2)


def _give_up(how: str, timeout: int) -> None:
    """Ends the process from another thread, since the runtime cannot be interrupted."""
    print(
        f"could not join the other processes {how}: some did not come within {timeout} s. {CHECK}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
