"""Fresh processes => seconds until a first training step is done, with a cold and a warm cache.

    python -m benchmarks.compile_time --config=configs/seed.py [--batch_size=256] [--repeats=3]
    python -m benchmarks.compile_time --tiny

Each process imports the library, builds the network of the config, and trains as train.py does, on
a synthetic batch. The first one finds JAX's persistent compilation cache empty and fills it
(JAX_COMPILATION_CACHE_DIR); the others find what they need in there, whole programs included
(ldm_jax/programs.py). Prints a markdown table:

    import       JAX and the library
    set-up       the devices' start, network, batch
    init         compilation of the initial state, and its computation
    first step   compilation of the step, and the step
    total        the sum of all this
    next step    one more, for comparison; not part of the total
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

PHASES = ("import", "set-up", "init", "first step", "total", "next step")
ROOT = Path(__file__).parent.parent


def measure(config: Any, batch_size: int) -> dict[str, float]:
    """Seconds of each phase in this process, which must not have imported JAX before."""
    marks = [time.perf_counter()]
    import jax
    import numpy as np

    from ldm_jax import feed, noising, sharding, training
    from ldm_jax.latents import LatentScale
    from ldm_jax.packing import pack_state
    from ldm_jax.programs import KeptProgram
    from ldm_jax.unet import get_network

    def mark(done=None):
        jax.block_until_ready(done)
        marks.append(time.perf_counter())

    mark()
    settings = config.to_dict()
    network = get_network(**settings["network"])
    mesh = sharding.get_mesh(config.sharding.mesh)
    size, channels = config.network.latent_image_size, config.network.latent_channels
    shapes = (size, size, channels), (config.network.emb_size,)
    optimizer = training.get_optimizer(steps=config.steps, **settings["optimizer"])
    train_step = training.get_train_step(
        network,
        optimizer,
        LatentScale(2.5),
        noising.get_process(**settings["noising"]),
        **settings["training"],
        mesh=mesh,
        parallelism=config.sharding.parallelism,
        reduce_dtype=config.sharding.reduce_dtype,
    )
    rng = np.random.default_rng(0)
    names = "latents_mean", "text_embeddings"
    rows = {
        name: rng.standard_normal((batch_size, *shape), np.float32)
        for name, shape in zip(names, shapes)
    }
    batch = feed.shard_batch(mesh, rows)
    mark(batch)

    def create_state(key):
        return pack_state(training.create_train_state(key, network, optimizer, *shapes))

    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    keep = partial(KeptProgram, mesh=mesh, identity=[settings, Path(__file__).read_text()])
    train_step = keep(train_step)
    state = keep(sharding.compile_creation(create_state, mesh))(init_key)
    mark(state)
    for _ in range(2):
        state, metrics = train_step(state, step_key, batch)
        mark((state, metrics))
    seconds = [end - start for start, end in zip(marks, marks[1:])]
    seconds.insert(-1, marks[-2] - marks[0])
    return dict(zip(PHASES, seconds, strict=True))


def measure_fresh(arguments: list[str], cache: Path) -> dict[str, float]:
    """What `measure` finds in a new process that keeps its compilations in `cache`.

    Raises:
        subprocess.CalledProcessError: if the process fails; its output is printed.
    """
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "benchmarks.compile_time", *arguments, "--here"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: list[str], cache: Path, repeats: int = 1) -> dict[str, dict[str, float]]:
    """Measures one cold process and `repeats` warm ones (medians), and prints the table."""
    cold = measure_fresh(arguments, cache)
    entries = sum(path.is_file() for path in cache.rglob("*"))
    warm = [measure_fresh(arguments, cache) for _ in range(repeats)]
    medians = {phase: statistics.median(found[phase] for found in warm) for phase in PHASES}
    print(f"| cache | {' | '.join(PHASES)} |\n|---|{'---:|' * len(PHASES)}")
    rows = {"cold": cold, "warm": medians}
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(f'{found[phase]:.2f}' for phase in PHASES)} |")
    print(f"\nSeconds. The cold process left {entries} entries in the cache.")
    return rows


def main(argv):
    f = flags.FLAGS
    if f.here:
        print(json.dumps(measure(f.config, f.batch_size or f.config.batch_size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(f.cache or folder).expanduser().resolve()
        cache.mkdir(parents=True, exist_ok=True)
        if any(cache.iterdir()):
            raise SystemExit(f"compile_time.py: the cache must be empty at first, got {cache}")
        run(sys.argv[1:], cache, f.repeats)


if __name__ == "__main__":
    if "--tiny" in sys.argv:
        sys.argv[sys.argv.index("--tiny")] = f"--config={ROOT}/configs/tiny.py"
    default = str(ROOT / "configs" / "seed.py")
    config_flags.DEFINE_config_file("config", default, "config file; --tiny is configs/tiny.py")
    flags.DEFINE_integer("batch_size", None, "default: the config's", lower_bound=1)
    flags.DEFINE_integer("repeats", 1, "processes with a warm cache", lower_bound=1)
    flags.DEFINE_string("cache", "", "folder of the cache, kept; default: a temporary one")
    flags.DEFINE_bool("here", False, "measure in this process, and print JSON")
    app.run(main)
