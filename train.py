"""Trains a denoiser: latent cache, config => checkpoints, logs and sample grids in a workdir.

    python train.py --config=configs/emoji.py --workdir=runs/emoji [--config.batch_size=256 ...]

The same command again goes on from the newest whole checkpoint. SIGTERM saves, and ends with 0. On
several hosts the same command runs on each, see docs/pods.md. With --compile_for=v5e:16x16 it only
compiles the step for a pod that is not there, and says what it would need.
"""

import time
from contextlib import ExitStack, closing
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from ldm_jax import (
    checkpoint,
    data,
    feed,
    forecast,
    hosts,
    models,
    power_ema,
    records,
    sampler,
    sharding,
    snapshots,
    training,
)
from ldm_jax.cache import check_local
from ldm_jax.chips import parse_target
from ldm_jax.compiled import keep_compiled
from ldm_jax.cores import divide_cpu
from ldm_jax.digest import get_digests
from ldm_jax.encoders import load_vae
from ldm_jax.examiner import get_examiner
from ldm_jax.flops import count_flops, get_images_at_peak
from ldm_jax.latents import LatentScale, get_latent_scale
from ldm_jax.meta import SCALE, check_start, create_meta
from ldm_jax.noising import get_process
from ldm_jax.packing import pack_state, unpack
from ldm_jax.plotting import save_grid
from ldm_jax.preemption import watch_preemption
from ldm_jax.profiling import StepWindow
from ldm_jax.programs import KeptProgram
from ldm_jax.runlog import RunLog
from ldm_jax.spreading import spread
from ldm_jax.text import check_parts, load_text_encoder
from ldm_jax.unet import get_network

CODE = hosts.describe_code(Path(__file__))  # As it was imported.
# Parts of a config that the initial state and the training step depend on.
IN_PROGRAMS = "network", "noising", "optimizer", "training", "sharding", "power_ema", "steps"


def train(config: Any, workdir: str | Path, profile: str = "") -> training.TrainState:
    """Runs `config` up to its last step, from the newest checkpoint in `workdir` if there is one.

    SIGTERM makes it save at the next step and return.

    Args:
        config: with the keys that configs/seed.py declares.
        workdir: gets config.json, log.jsonl, checkpoints/, samples/, tensorboard/ and snapshots/.
        profile: steps to trace into workdir/profile, "20:5" for five from the 20th on.

    Raises:
        FloatingPointError: when a loss or a gradient is no longer a number.
        ValueError: for settings that do not fit together, a checkpoint of another model, or a model
            to start from that is not there or of another kind.
        OSError: if a checkpoint cannot be written, or none of those there is whole.
    """
    _check_numbers(config)
    check_local(workdir)
    with watch_preemption() as preempted, ExitStack() as stack:
        return _train(config, Path(workdir).expanduser(), profile, preempted, stack)


class _Origin(NamedTuple):
    """What is kept of the model whose weights a training starts from; arrays of the host's."""

    title: str
    scale: LatentScale
    meta: dict
    variables: Any
    digests: dict | None  # of the weights, where several processes have to agree on them


def _load_origin(name):
    """Raises ValueError, which names the setting, if there is no whole model."""
    try:
        model = models.load_model(None if name == "bundled" else name)
    except (OSError, ValueError) as error:
        raise ValueError(f"config.start_from is {name!r}: {error}") from error
    title = name if model.step is None else f"{name}, step {model.step}"
    variables = model.denoiser.variables
    digests = get_digests(variables) if jax.process_count() > 1 else None
    return _Origin(title, model.scale, model.meta, jax.device_get(variables), digests)


def _train(config, workdir, profile, preempted, stack):
    leader, settings = hosts.is_leader(), config.to_dict()
    window = StepWindow(profile if leader else "", workdir / "profile")

    # Encoders and data.
    vae, text_encoder = load_vae(config.encoders.vae), load_text_encoder(config.encoders.text)
    cache = data.open_cache(data.default_cache(config), vae.identity, text_encoder.identity)
    _check_shapes(config.network, cache)
    check_parts(text_encoder.name, settings["sampling"])
    origin = _load_origin(config.start_from) if config.start_from else None
    weights = origin and origin.digests
    hosts.check_agreement(config=settings, code=CODE, data=dict(cache.manifest), weights=weights)
    # The weights of a model belong to its scale.
    scale = origin.scale if origin else get_latent_scale(cache.manifest, **settings["latents"])
    mesh = sharding.get_mesh(config.sharding.mesh)

    # Network, optimizer, steps.
    network = get_network(**settings["network"])
    process = get_process(**settings["noising"])
    optimizer = training.get_optimizer(steps=config.steps, **settings["optimizer"])
    layout = {
        "parallelism": config.sharding.parallelism,
        "reduce_dtype": config.sharding.reduce_dtype,
    }
    train_step = training.get_train_step(
        network, optimizer, scale, process, **settings["training"], mesh=mesh, **layout
    )
    eval_step = training.get_eval_step(network, scale, process, mesh=mesh)
    init_key, step_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    meta = create_meta(
        network=settings["network"],
        noising=settings["noising"],
        sampling=settings["sampling"],
        scale=scale,
        vae=vae.identity,
        text_encoder=text_encoder.identity,
        latent_shape=cache.latent_shape,
        embedding_shape=cache.embedding_shape,
    )
    if origin:
        check_start(origin.meta, meta, f"config.start_from, {config.start_from},")
        meta |= {name: origin.meta[name] for name in SCALE}  # To the last digit.

    # State: the newest checkpoint's, or a fresh one, of random weights or those of a model; packed
    # everywhere but on the disk.
    manager = checkpoint.open_checkpoints(workdir / "checkpoints", config.keep_checkpoints)
    stack.enter_context(manager)

    def create_state(key, variables=None):
        shapes = cache.latent_shape, cache.embedding_shape
        state = training.create_train_state(key, network, optimizer, *shapes, variables)
        return pack_state(power_ema.add_averages(state, config.power_ema.sigma_rels))

    # Programs that were compiled before, by the same code for the same settings, are taken again.
    made_from = {name: settings[name] for name in IN_PROGRAMS}
    made_from |= {"scale": [meta["std_latent"], meta["mean_latent"]], "code": CODE}
    made_from |= {"shapes": [cache.latent_shape, cache.embedding_shape]}
    keep = partial(KeptProgram, mesh=mesh, identity=made_from)
    train_step = keep(train_step)
    state = None
    if records.list_steps(manager.directory):
        placed = sharding.place_shapes(mesh, jax.eval_shape(create_state, init_key))
        state = checkpoint.restore_checkpoint(manager, placed, meta)
    if state is None:
        given = [origin.variables] if origin else []
        state = keep(sharding.compile_creation(create_state, mesh))(init_key, *given)
        del given
    begun = f"starting from {origin.title}" if origin else "starting"
    origin, start = None, int(state.step)  # Nothing of the model is needed any more.
    if leader:
        records.write_json(workdir / "config.json", settings)
        if mesh.shape["fsdp"] > 1:
            shapes = unpack(sharding.place_shapes(mesh, state.params))
            print(sharding.describe_shardings(shapes))
        print(
            f"{sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.2f} M weights, "
            f"{cache.num_examples('train')} training examples, "
            f"{mesh.size} x {mesh.devices.flat[0].device_kind}, "
            + (f"going on from step {start}" if start else begun),
            flush=True,
        )

    gather = jax.jit(partial(sharding.gather, mesh))

    def due(step, every):
        return step == config.steps or step % every == 0

    # Snapshots of the averages from which one of any length is made.
    profiled = isinstance(state, power_ema.ProfiledState)

    def due_snapshot(step):
        every = config.power_ema.snapshot_every, config.save_every
        return profiled and any(due(step, k) for k in every)

    def write_snapshot(step, state):
        """Every host takes part in gathering, one writes."""
        averages = gather(state.power_emas)
        if leader:
            snapshots.save_snapshot(workdir, step, unpack(jax.device_get(averages)), meta)

    if profiled and leader:
        snapshots.drop_later(workdir, start)
        number = sum(due_snapshot(step) for step in range(1, config.steps + 1))
        print(snapshots.describe_cost(state, number), flush=True)

    # Pictures and held-out loss: always the same captions, seeds and noise.
    captions = list(config.captions) if config.sample_every else []
    labels = seeds = picture_keys = None
    if captions:
        labels = text_encoder(captions)
        seeds = np.asarray(sampler.sample_seeds(range(len(captions)), cache.latent_shape))
        picture_keys = sampler.get_picture_keys(range(len(captions)))

    def get_denoiser(state):
        return sampler.Denoiser(network, gather(state.ema_variables), process)

    def write_samples(step, state, log):
        """Every host takes part in drawing, one writes."""
        denoiser = sampler.in_float32_on_cpu(get_denoiser(state))
        diffuser = sampler.get_diffuser(denoiser, **settings["sampling"])
        latents = spread(diffuser)(seeds, labels, keys=picture_keys)
        latents = jax.jit(scale.restore)(latents)
        if leader:
            images = vae.decode(jax.device_get(latents))
            save_grid(workdir / "samples" / f"{step:07d}.png", images, captions, columns=4)
            log.write_images(step, images, captions)

    examine = None
    if config.evaluate_every:
        examine = get_examiner(
            workdir / "quality",
            cache,
            vae,
            text_encoder,
            scale,
            settings["sampling"],
            config.seed,
            **settings["evaluation"],
        )

    def read_rows(seed, split):
        return lambda k, rows: cache.batch(
            seed, k, config.batch_size, split, dtype=np.float16, rows=rows
        )

    def held_out_loss(state):
        steps = range(-(-cache.num_examples("valid") // config.batch_size))
        batches = feed.feed_batches(mesh, read_rows(0, "valid"), steps, config.batch_size)
        keys = [jax.random.fold_in(eval_key, k) for k in steps]
        losses = [eval_step(state, key, batch) for key, batch in zip(keys, batches)]
        loss = np.mean(jax.device_get(losses))
        training.check_losses(np.asarray([loss]), int(state.step), "held-out loss")
        return float(loss)

    # The loop.
    batches = feed.feed_batches(
        mesh, read_rows(config.seed, "train"), range(start, config.steps), config.batch_size
    )
    stack.enter_context(closing(batches))
    stop = preempted(start)
    count_forward = partial(count_flops, network, cache.latent_shape, cache.embedding_shape)
    at_peak = get_images_at_peak(count_forward, list(mesh.devices.flat))
    log = RunLog(workdir, config.steps, start, config.batch_size, leader, at_peak)
    with log, window:
        for step in range(start + 1, config.steps + 1):
            if stop:
                break
            window.before(step, state)
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            state, metrics = train_step(state, step_key, batch)
            window.after(state)
            log.add_step(metrics, waited)

            stop = preempted(step) and step < config.steps
            save = stop or due(step, config.save_every)
            snapshot = due_snapshot(step)
            # What a preempted run has no time for: held-out loss, pictures and their quality.
            evaluate = not stop and (save or due(step, config.eval_every))
            evaluate = evaluate and cache.num_examples("valid")
            draw = not stop and captions and due(step, config.sample_every)
            quality = not stop and examine and due(step, config.evaluate_every)
            if not (save or snapshot or evaluate or draw or quality or due(step, config.log_every)):
                continue
            values = log.close_window(step)  # First of all: it stops where there are no numbers.
            if evaluate:
                values["held_out_loss"] = held_out_loss(state)
            if draw:
                write_samples(step, state, log)
            if examine and quality:
                values |= examine(step, get_denoiser(state))
            if snapshot:
                write_snapshot(step, state)
            if save:
                checkpoint.save_checkpoint(manager, state, meta, values.get("held_out_loss"))
            log.write(step, values)
            log.restart_clock()
            manager.check_last_save()
        manager.wait_until_finished()
    if stop and leader:
        taken = int(state.step)
        saved = "which is saved" if taken > start else "before another was taken"
        print(
            f"SIGTERM: stopped after step {taken}, {saved}; the same command goes on from there",
            flush=True,
        )
    return unpack(state)


def compile_for(config: Any, pod: str) -> bool:
    """Prints what the training step of `config` needs on a pod; whether it fits there.

    Needs no data: a cache that is there tells the shape of the text embeddings, else they are taken
    to be vectors.
    """
    target = parse_target(pod)
    forecast.prepare(target)
    try:
        embedding_shape = data.open_cache(data.default_cache(config)).embedding_shape
    except (FileNotFoundError, ValueError):
        embedding_shape = (config.network.emb_size,)
    found = forecast.forecast_step(config, target, embedding_shape)
    print(forecast.describe(found, target))
    return found.fits


def _check_numbers(config):
    """Of steps and pictures; 0 is "never" for what a run can do without."""
    least = dict.fromkeys(("steps", "batch_size", "log_every", "eval_every", "save_every"), 1)
    least |= {"power_ema.snapshot_every": 1, "sample_every": 0, "evaluate_every": 0}
    for name, smallest in least.items():
        value = attrgetter(name)(config)
        if value < smallest:
            raise ValueError(f"config.{name} must be at least {smallest}, got {value}")


def _check_shapes(network, cache):
    """The network must have been sized for what the cache holds."""
    wanted = (network.latent_image_size, network.latent_image_size, network.latent_channels)
    if wanted != cache.latent_shape:
        raise ValueError(
            f"config.network is built for latents of shape {wanted}, "
            f"the cache {cache.folder} holds {cache.latent_shape}"
        )
    if network.emb_size != cache.embedding_shape[-1]:
        raise ValueError(
            f"config.network.emb_size is {network.emb_size}, the cache {cache.folder} holds text "
            f"embeddings of width {cache.embedding_shape[-1]}"
        )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if flags.FLAGS.verbosity <= 0:
        logging.set_verbosity(logging.WARNING)  # Orbax tells each of its steps as "info".
    f = flags.FLAGS
    try:
        if f.compile_for:
            raise SystemExit(0 if compile_for(f.config, f.compile_for) else 1)
        if not f.workdir:
            raise app.UsageError("--workdir must name the folder of the run")
        print(hosts.join_hosts(f.coordinator, f.num_processes, f.process_id, f.cluster), flush=True)
        if f.config.sharding.mesh == "data" and f.config.sharding.parallelism == "jit":
            samples = f.config.batch_size // max(f.config.training.accumulate, 1)
            divide_cpu(samples, f.config.network.widths)
        print(keep_compiled(), flush=True)
        train(f.config, f.workdir, f.profile)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        logging.debug("Raised here:", exc_info=True)  # Shown by --verbosity=1.
        raise SystemExit(f"train.py: {error}") from error


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "config file", lock_config=True)
    flags.DEFINE_string("workdir", None, "folder of the run")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, where several hosts train")
    flags.DEFINE_integer("num_processes", None, "number of processes on all hosts")
    flags.DEFINE_integer("process_id", None, "number of this process, from 0")
    flags.DEFINE_enum("cluster", "auto", hosts.CLUSTERS, "what tells the three flags above")
    flags.DEFINE_string("profile", "", "START:COUNT, steps to trace into workdir/profile")
    flags.DEFINE_string(
        "compile_for", "", "only say what a pod would need, e.g. v5e:16x16 or 8*h100"
    )
    flags.mark_flag_as_required("config")
    app.run(main)
