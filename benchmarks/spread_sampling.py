"""Pictures spread over several devices => how fast they are drawn, and whether they stay the same.

The part `sample` of benchmarks/scaling.py. Noise and labels are split over the devices, weights
replicated. The way "jit" leaves the rest to XLA, which may gather what it need not; under
"shard_map" each device draws its own pictures alone, as the doors do (ldm_jax/spreading.py).
"""

import argparse
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import timing
from benchmarks.sampling import Sampler
from ldm_jax import sharding
from ldm_jax.sampler import Diffuser, sample_seeds
from ldm_jax.spreading import get_loop


def spread_noise(mesh: Mesh, num: int, latent_shape: tuple[int, ...]) -> jax.Array:
    """The noise of pictures 0, 1, ..., each drawn on the device that holds it."""
    place, shape = sharding.batch_sharding(mesh), (num, *latent_shape)
    parts = []
    for device, index in place.addressable_devices_indices_map(shape).items():
        with jax.default_device(device):
            parts.append(sample_seeds(range(num)[index[0]], latent_shape))
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def sample(table: timing.Table, options: argparse.Namespace, fields: dict) -> None:
    """A row for each number of devices and way; the others are compared with the first."""
    sampler, num = Sampler(fields, options.steps), options.pictures
    noise, labels = sampler.draw_inputs(num)
    inputs, programs = {}, {}
    for devices in options.counts:
        mesh = sharding.get_mesh("data", jax.devices()[:devices])
        inputs[devices] = (
            jax.device_put(sampler.create_diffuser(), sharding.replicated(mesh)),
            spread_noise(mesh, num, sampler.shapes[0]),
            jax.device_put(labels, sharding.batch_sharding(mesh)),
            None,  # No negative prompt and no noise on the way.
            None,
        )
        loops = {"jit": Diffuser.reverse_diffusion}
        if devices > 1:
            loops["shard_map"] = get_loop(mesh)
        for way, loop in loops.items():
            programs[devices, way] = partial(loop.lower, *inputs[devices])
    compiled = timing.compile_all(programs)
    efficiency, reference = timing.Efficiency(), None

    def work(devices, way):
        nonlocal reference
        program, seconds = compiled[devices, way].result()
        call = partial(program, *inputs[devices])
        row = timing.measure(call, num, options.repeats, 1) | {"compile s": seconds}
        latents = np.asarray(call())
        reference = latents if reference is None else reference
        row["same noise"] = bool(np.array_equal(inputs[devices][1], noise))
        row["difference"] = float(np.abs(latents - reference).max())
        row |= {"messages MB": timing.count_megabytes(program)} | timing.program_memory(program)
        return efficiency(row | timing.peak_memory(), devices, num)

    for devices, way in programs:
        about = {"work": "sample", "devices": devices, "way": way, "size": num}
        table.attempt(about, work, devices, way)
