"""Preemption: SIGTERM to one process or to one of several => a step at which all save and end."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def watch_preemption() -> Iterator[Callable[[int], bool]]:
    """Gives preempted(step), to be asked once at each step: whether to save now and end.

    A single process only notes the signal, however often it comes, and the handler that was there
    before is put back at the end. With jax.distributed its own service catches the signal and
    chooses a step that no process has passed; each of them must ask at every step. Needs the main
    thread.
    """
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
        return
    received = False

    def note(signum, frame):
        nonlocal received
        received = True

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: received
    finally:
        signal.signal(signal.SIGTERM, previous)
