"""One process of a job: worker.py save|restore|preempt FOLDER, see benchmarks/processes.py."""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from states import at_step, create_meta, create_small_state, target_of

from ldm_jax import checkpoint, digest
from ldm_jax.preemption import watch_preemption


def place(state):
    """The state on a mesh of all processes' devices, its large tensors split over both axes."""
    devices = np.asarray(jax.devices()).reshape(2, -1)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def place_leaf(x):
        split = x.ndim and x.shape[-1] % mesh.size == 0
        spec = PartitionSpec(*[None] * (x.ndim - 1), ("data", "fsdp")) if split else PartitionSpec()
        whole = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), whole.__getitem__)

    return jax.tree.map(place_leaf, state)


def save(manager, state):
    for step in (5, 7):
        checkpoint.save_checkpoint(manager, place(at_step(state, step)), create_meta(), 0.5)
    manager.wait_until_finished()


def restore(manager, state):
    placed = place(state)
    restored = checkpoint.restore_checkpoint(manager, target_of(placed), create_meta())
    step = int(restored.step)
    expected = at_step(state, step)
    same = jax.tree.map(
        lambda x, y: all(
            np.array_equal(shard.data, np.asarray(y)[shard.index]) for shard in x.addressable_shards
        ),
        restored,
        expected,
    )
    assert all(jax.tree.leaves(same))
    assert digest.get_digests(restored) == digest.get_digests(expected)
    print(f"restored step {step}")


def preempt(manager, state):
    """Counts steps until it is preempted, as train.py does."""
    step_of = jax.jit(lambda step: step + 1)
    restored = checkpoint.restore_checkpoint(manager, target_of(place(state)), create_meta())
    state = place(state.replace(step=jnp.int32(0))) if restored is None else restored
    start = int(state.step)
    print(f"start at {start}", flush=True)
    with watch_preemption() as preempted:
        for step in range(start + 1, 10_000):
            state = state.replace(step=step_of(state.step))
            time.sleep(0.02)
            if preempted(step):
                checkpoint.save_checkpoint(manager, state, create_meta())
                manager.wait_until_finished()
                print(f"saved step {int(state.step)}", flush=True)
                return


if __name__ == "__main__":
    mode, folder = sys.argv[1:]
    if int(os.environ["NUM_PROCESSES"]) > 1:
        jax.distributed.initialize(
            os.environ["COORDINATOR"],
            int(os.environ["NUM_PROCESSES"]),
            int(os.environ["PROCESS_ID"]),
            heartbeat_timeout_seconds=10,
        )
    fresh = create_small_state()
    with checkpoint.open_checkpoints(f"{folder}/checkpoints") as checkpoints:
        {"save": save, "restore": restore, "preempt": preempt}[mode](checkpoints, fresh)
