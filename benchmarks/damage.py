"""Kills train.py and damages its checkpoints at random => a table of what came of it.

    python -m benchmarks.damage --kills=50 --damages=60

Kills: train.py runs in a process of its own, is ended by SIGKILL at a random moment and started
again, until the run is complete; then the next run begins. Damages: one file of the newest of two
checkpoints gets a flipped bit, is truncated or deleted. Ends with 1 if anything was lost or wrong
without a word.
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

import encode
from benchmarks.processes import FAST_COMPILATION
from configs import tiny
from ldm_jax import checkpoint, models, records, training
from ldm_jax.unet import get_network

ROOT = Path(__file__).parent.parent
CONFIG = """
from benchmarks.damage import get_config as get


def get_config():
    return get({folder!r})
"""
KINDS = ("bit flipped", "truncated", "deleted")


def get_config(folder):
    """A run of 60 steps that saves every third, on a pair of .npy files in `folder`."""
    config = tiny.get_config()
    config.steps = 60
    config.log_every = 1
    config.save_every = config.eval_every = 3
    config.sample_every = 60
    config.network.latent_image_size = 8
    config.network.widths = (16, 32)
    config.sampling.diffusion_steps = 2
    config.data.source = "npy"
    config.data.path = f"{folder}/latents.npy,{folder}/text.npy"
    config.data.cache = f"{folder}/cache"
    return config


def prepare(folder: Path) -> None:
    """Writes examples, their cache, and the config file for train.py."""
    rng = np.random.default_rng(0)
    np.save(folder / "latents.npy", rng.normal(size=(64, 8, 8, 4)).astype(np.float32))
    np.save(folder / "text.npy", rng.normal(size=(64, 512)).astype(np.float32))
    encode.encode(get_config(folder), progress=False)
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))


def start(folder: Path, workdir: Path) -> subprocess.Popen:
    """train.py in a process of its own, with one device and compiled programs kept between runs."""
    workdir.mkdir(exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILATION,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    flags = [f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
    command = [sys.executable, "train.py", *flags]
    with open(workdir / "output.txt", "w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def finish(folder: Path, workdir: Path) -> float:
    """Runs train.py to its end; the seconds that it took."""
    began = time.monotonic()
    if start(folder, workdir).wait():
        raise RuntimeError(f"train.py failed:\n{(workdir / 'output.txt').read_text()}")
    return time.monotonic() - began


def get_last_step(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return max(records.list_steps(folder), default=0) if folder.is_dir() else 0


def get_logged_step(workdir: Path) -> int:
    """The step of the last whole line of the log."""
    path = workdir / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(x)["step"] for x in lines if x.endswith(b"\n")), default=0)


def kill_at_random(folder: Path, reference: Path, kills: int, rng: random.Random, seconds: float):
    """Kills `kills` times and finishes the last run; counts of what happened.

    Args:
        folder: see `prepare`.
        reference: workdir of a run that was not interrupted.
        kills: how many.
        rng: gives the moments.
        seconds: the time within which a process is killed, if it does not end by itself.
    """
    counts, runs = Counter(), 0
    wanted = read_newest(reference)
    while counts["kills"] < kills:
        runs += 1
        workdir = folder / f"run{runs}"
        complete = False
        while not complete:
            whole, logged = get_last_step(workdir), get_logged_step(workdir)
            process = start(folder, workdir)
            try:
                limit = rng.uniform(0, seconds) if counts["kills"] < kills else None
                complete = process.wait(limit) == 0
                if not complete:
                    raise RuntimeError((workdir / "output.txt").read_text())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                counts["kills"] += 1
                counts["while saving"] += any((workdir / "checkpoints").glob("*tmp*"))
                before = get_logged_step(workdir) == 0
                counts["before the first step"] += before
            began = re.search(
                r"(?:going on from step (\d+)|starting)\n", (workdir / "output.txt").read_text()
            )
            if began:
                resumed = int(began[1] or 0)
                counts["starts"] += 1
                counts["starts from the last whole checkpoint"] += resumed == whole
                counts["lost"] += resumed < whole
                counts["most steps taken again"] = max(
                    counts["most steps taken again"], logged - resumed
                )
            counts["damaged by a kill"] += (workdir / "damaged").exists()
        steps = [json.loads(x)["step"] for x in (workdir / "log.jsonl").read_text().splitlines()]
        counts["complete runs"] += 1
        counts["logs with each step once"] += steps == list(range(1, get_last_step(workdir) + 1))
        counts["final states equal bit for bit"] += is_equal(read_newest(workdir), wanted)
    return counts


def read_newest(workdir: Path):
    with checkpoint.open_checkpoints(workdir / "checkpoints") as manager:
        return checkpoint.restore_checkpoint(manager, *get_target(workdir))


def get_target(workdir: Path):
    """What restoring needs: shapes with shardings, and the meta of the newest checkpoint."""
    config = json.loads((workdir / "config.json").read_text())
    network = get_network(**config["network"])
    optimizer = training.get_optimizer(steps=config["steps"], **config["optimizer"])
    shapes = jax.eval_shape(
        lambda key: training.create_train_state(key, network, optimizer, (8, 8, 4), (512,)),
        jax.random.key(0),
    )
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    record = records.read_record(workdir / "checkpoints", get_last_step(workdir))
    return target, record["model"]


def is_equal(tree, other) -> bool:
    """Whether two trees have the same bits."""
    same = jax.tree.map(
        lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), tree, other
    )
    return all(jax.tree.leaves(same))


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Does to a file what `kind` says."""
    content = bytearray(path.read_bytes())
    if kind == "bit flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "truncated":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.unlink()


class Warnings(logging.Handler):
    """Collects what is logged as a warning."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def damage_at_random(folder: Path, workdir: Path, damages: int, rng: random.Random):
    """Damages copies of the two newest checkpoints; the outcomes for each kind."""
    old, new = records.list_steps(workdir / "checkpoints")[-2:]
    target, meta = get_target(workdir)
    original = folder / "original"
    for step in (old, new):
        source = workdir / "checkpoints" / str(step)
        shutil.copytree(source, original / "checkpoints" / str(step))
    files = sorted(p.relative_to(original) for p in original.glob(f"checkpoints/{new}/**/*"))
    files = [p for p in files if (original / p).is_file() and (original / p).stat().st_size]
    states = {s: records.read_tensors(original / "checkpoints", s, target) for s in (old, new)}
    order = {kind: rng.sample(files, len(files)) for kind in KINDS}
    outcomes = {kind: Counter() for kind in KINDS}
    for i in range(damages):
        kind = KINDS[i % len(KINDS)]
        # In turn any file, and one chosen by its size.
        path = order[kind][i // len(KINDS) % len(files)]
        if i // len(KINDS) % 2:
            path = rng.choices(files, [(original / p).stat().st_size for p in files])[0]
        copy = folder / "copy"
        shutil.copytree(original, copy)
        damage(copy / path, kind, rng)
        sampled = sample_damaged(copy, new, states[new])
        trained = restore_damaged(copy, old, new, states, target, meta)
        outcomes[kind].update([f"training: {trained}", f"sampling: {sampled}"])
        if "SILENT" in (trained, sampled) or trained == "LOST":
            print(f"{kind} {path}: training {trained}, sampling {sampled}", file=sys.stderr)
        shutil.rmtree(copy)
    return outcomes


def restore_damaged(copy: Path, old: int, new: int, states: dict, target, meta) -> str:
    """What becomes of a run that goes on from damaged checkpoints."""
    warnings, logger = Warnings(), logging.getLogger("absl")
    logger.addHandler(warnings)
    try:
        with checkpoint.open_checkpoints(copy / "checkpoints") as manager:
            restored = checkpoint.restore_checkpoint(manager, target, meta)
    except records.DamagedError:
        return "refused"
    finally:
        logger.removeHandler(warnings)
    if restored is not None and is_equal(restored, states[new]):
        return "harmless"
    named = [t for t in warnings.texts if f"of step {new} " in t and f"back to step {old}" in t]
    if restored is None or not is_equal(restored, states[old]) or not named:
        return "SILENT"
    moved = (copy / "damaged" / str(new)).is_dir() and get_last_step(copy) == old
    return "noticed, went back" if moved else "LOST"


def sample_damaged(copy: Path, new: int, state) -> str:
    """What becomes of sampling from the newest checkpoint."""
    try:
        model = models.load_model(copy)
    except records.DamagedError as error:
        return "refused" if f"step {new} " in str(error) else "SILENT"
    equal = is_equal(model.denoiser.variables["params"], state.ema_params)
    return "harmless" if equal and model.scale.std_latent.size else "SILENT"


def run(folder: Path, kills: int, damages: int, seed: int) -> tuple[Counter, dict[str, Counter]]:
    """Both parts, in a folder that was prepared."""
    rng = random.Random(seed)
    reference = folder / "reference"
    seconds = finish(folder, reference) / 2  # It compiles, which later ones need not.
    outcomes = damage_at_random(folder, reference, damages, rng)
    return kill_at_random(folder, reference, kills, rng, seconds), outcomes


def is_good(kills: Counter, outcomes: dict[str, Counter]) -> bool:
    """Nothing silent, nothing lost, every run complete and equal to the one left alone."""
    words = Counter(word.split(": ")[1] for counts in outcomes.values() for word in counts)
    runs = kills["complete runs"]
    return (
        not (words["SILENT"] or words["LOST"] or kills["lost"] or kills["damaged by a kill"])
        and kills["starts from the last whole checkpoint"] == kills["starts"]
        and kills["final states equal bit for bit"] == runs == kills["logs with each step once"]
    )


def print_tables(kills: Counter, outcomes: dict[str, Counter]) -> None:
    """Markdown."""
    keys = (
        "kills",
        "before the first step",
        "while saving",
        "starts",
        "starts from the last whole checkpoint",
        "most steps taken again",
        "damaged by a kill",
        "lost",
        "complete runs",
        "logs with each step once",
        "final states equal bit for bit",
    )
    print("\n| kill -9 | number |\n|---|---|")
    print("\n".join(f"| {key} | {kills[key]} |" for key in keys))
    columns = [
        *(
            f"training: {x}"
            for x in ("noticed, went back", "refused", "harmless", "SILENT", "LOST")
        ),
        *(f"sampling: {x}" for x in ("refused", "harmless", "SILENT")),
    ]
    print(f"\n| a file of the newest checkpoint | number | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    for kind, counts in outcomes.items():
        cells = [str(counts[column]) for column in columns]
        print(f"| {kind} | {counts.total() // 2} | {' | '.join(cells)} |")


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = FAST_COMPILATION
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        results = run(Path(name), arguments.kills, arguments.damages, arguments.seed)
    print_tables(*results)
    sys.exit(not is_good(*results))
