"""Training: state, key, batch => state, metrics, in one jitted step whose state is donated."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from ldm_jax import sharding
from ldm_jax.accumulation import get_value_and_grad
from ldm_jax.corruption import corrupt
from ldm_jax.initial import init_network
from ldm_jax.latents import LatentScale
from ldm_jax.noising import ForwardProcess
from ldm_jax.objectives import Objective
from ldm_jax.packing import pack_like, unpack

DECAYS = ("constant", "cosine")


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step, as trees or as `packing.pack_state` packs them.

    Attributes:
        step: number of steps taken, int32.
        params: weights, float32.
        batch_stats: running statistics of the batch norms; empty without them.
        ema_params: exponential moving average of `params`.
        ema_batch_stats: that of `batch_stats`, the statistics that belong to `ema_params`.
        opt_state: the optimizer's.
    """

    step: Array
    params: Any
    batch_stats: Any
    ema_params: Any
    ema_batch_stats: Any
    opt_state: Any

    @property
    def ema_variables(self) -> dict:
        """The averaged weights with their statistics, as a network's variables."""
        return unpack({"params": self.ema_params, "batch_stats": self.ema_batch_stats})

    def update_more(self) -> "TrainState":
        """The end of a step, for states that carry more than this one."""
        return self


def get_optimizer(
    learning_rate: float = 3e-4,
    *,
    steps: int,
    warmup_steps: int = 0,
    decay: str = "constant",
    b2: float = 0.999,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Adam, with a linear warm-up, a constant or cosine-decayed rate, and clipping by global norm.

    Args:
        learning_rate: the highest rate.
        steps: length of the run, where the cosine reaches zero.
        warmup_steps: steps over which the rate rises from zero.
        decay: "constant" or "cosine".
        b2: decay of Adam's second moment.
        clip_norm: largest global norm of a gradient; 0 for no clipping.

    Raises:
        ValueError: for another decay, a warm-up longer than the run, or numbers out of range.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {DECAYS}, got {decay!r}")
    for name, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} must lie in [0, inf), got {value}")
    if not 0 <= b2 < 1:
        raise ValueError(f"b2 must lie in [0, 1), got {b2}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps must lie in [0, steps={steps}), got {warmup_steps}")
    if decay == "cosine":
        rate = optax.cosine_decay_schedule(learning_rate, steps - warmup_steps)
    else:
        rate = optax.constant_schedule(learning_rate)
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        rate = optax.join_schedules([warmup, rate], [warmup_steps])
    adam = optax.adam(rate, b2=b2)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam) if clip_norm else adam


def create_train_state(
    rng: PRNGKeyArray,
    network: Any,
    optimizer: optax.GradientTransformation,
    latent_shape: tuple[int, ...],
    embedding_shape: tuple[int, ...],
    variables: Any = None,
) -> TrainState:
    """Initial weights and optimizer state. Run it under jit to place it on a mesh.

    Args:
        rng: key, consumed.
        network: called with (x_t, noise_levels, text_embeddings).
        optimizer: see `get_optimizer`.
        latent_shape: (h, w, c).
        embedding_shape: (e,) or (n, e).
        variables: params and batch_stats to start from, copied; None: fresh ones.
    """
    if variables is None:
        variables = init_network(network, rng, latent_shape, embedding_shape)
    else:
        variables = jax.tree.map(lambda x: jnp.array(x, jnp.float32), variables)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        ema_params=jax.tree.map(jnp.copy, params),
        ema_batch_stats=jax.tree.map(jnp.copy, batch_stats),
        opt_state=optimizer.init(params),
    )


def get_loss(
    network: Any,
    scale: LatentScale,
    process: ForwardProcess,
    label_dropout: float = 0.0,
    *,
    objective: Objective | None = None,
    train: bool = False,
    axis_name: Any = None,
    translation: float = 0.0,
) -> Callable:
    """The loss of what the network puts out by an objective.

    Without one it is the mean absolute error of the estimate of x_0, whatever the network's target:
    the original's loss, and the one by which trainings with other choices can be compared.

    Returns loss(params, batch_stats, rng, batch) -> (loss, batch_stats). Either tree may be
    `Packed`; the statistics come back as they came. A batch holds "latents_mean" (b, h, w, c), raw;
    "latents_std", likewise, if the VAE's moments are known; and "text_embeddings" (b, e) or
    (b, n, e); float32, or float16 as a cache stores them.
    """

    def loss_fn(params, batch_stats, rng, batch):
        sample_key, dropout_key = jax.random.split(rng)
        drawn = corrupt(sample_key, batch, scale, process, label_dropout, axis_name, translation)
        variables = unpack({"params": params, "batch_stats": batch_stats})
        output, updates = network.apply(
            variables,
            drawn.x_t,
            drawn.noise_levels,
            drawn.labels,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        if objective is None:
            x_zero = process.get_x_zero(drawn.x_t, output, drawn.noise_levels)
            loss = jnp.mean(jnp.abs(x_zero - drawn.latents))
        else:
            loss = objective(output, drawn.target, drawn.noise_levels, process)
        if not train:
            return loss, batch_stats
        return loss, pack_like(batch_stats, updates.get("batch_stats", {}))

    return loss_fn


def get_train_step(
    network: Any,
    optimizer: optax.GradientTransformation,
    scale: LatentScale,
    process: ForwardProcess = ForwardProcess(),
    *,
    label_dropout: float = 0.15,
    translation: float = 0.0,
    ema_decay: float = 0.999,
    accumulate: int = 1,
    loss: str = "mae",
    loss_weighting: str = "none",
    huber_delta: float = 0.1,
    min_snr_gamma: float = 5.0,
    mesh: Mesh | None = None,
    parallelism: str = "jit",
    reduce_dtype: str = "float32",
    unroll: bool | None = None,
) -> Callable[[TrainState, PRNGKeyArray, Mapping], tuple[TrainState, dict]]:
    """The jitted step: state, metrics = train_step(state, rng, batch).

    `rng` is the run's key, the same at each step; the step folds its own number in. The state is
    donated. Metrics, "loss", which is what is minimised, and "grad_norm", stay on the device. The
    average's decay warms up as min(ema_decay, (1 + step) / (10 + step)), so that it forgets the
    initial weights.

    Args:
        network: called with (x_t, noise_levels, text_embeddings). With FSDP its large weights
            travel in its `dtype`, if it has one, to which its layers must round them.
        optimizer: see `get_optimizer`.
        scale: of the latents.
        process: forward process.
        label_dropout: probability of a text being replaced by zeros, "no text".
        translation: probability of a picture being moved and told so, see augmentation.py.
        ema_decay: of the averaged weights.
        accumulate: parts that a device's batch is worked through in, see accumulation.py.
        loss, loss_weighting, huber_delta, min_snr_gamma: see `Objective`.
        mesh: over which state and batch are spread, see sharding.py; None for one device.
        parallelism: "jit", or "pmap" (data parallel alone), which gives the same numbers.
        reduce_dtype: in which the devices add up gradients.
        unroll: parts of a batch written out, not as a loop, see accumulation.py; None: if the mesh,
            or without one JAX's first device, is a CPU.

    Raises:
        ValueError: for a label_dropout or an ema_decay outside [0, 1), a translation outside
            [0, 1], an accumulate below 1, fields that `Objective` refuses, and for a kind of
            parallelism that does not exist or does not go with the mesh.
    """
    for name, value in [("label_dropout", label_dropout), ("ema_decay", ema_decay)]:
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if not 0 <= translation <= 1:
        raise ValueError(f"translation must lie in [0, 1], got {translation}")
    objective = Objective(loss, loss_weighting, huber_delta, min_snr_gamma)
    loss_options = {"label_dropout": label_dropout, "objective": objective, "train": True}
    loss_options["translation"] = translation
    if mesh is not None:
        loss_options["axis_name"] = sharding.batch_axes(parallelism)
        network = network.clone(axis_name=loss_options["axis_name"])
    loss_fn = get_loss(network, scale, process, **loss_options)
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    written_out = device.platform == "cpu" if unroll is None else unroll
    get_gradients = _keep_order(get_value_and_grad(loss_fn, accumulate, written_out))
    if mesh is not None:
        dtypes = {"reduce_dtype": reduce_dtype, "gather_dtype": getattr(network, "dtype", None)}
        get_gradients = sharding.get_gradients(get_gradients, mesh, parallelism, **dtypes)

    def train_step(state: TrainState, rng: PRNGKeyArray, batch: Mapping):
        step_key = jax.random.fold_in(rng, state.step)
        (loss, batch_stats), grads = get_gradients(state.params, state.batch_stats, step_key, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        average = lambda new, old: optax.incremental_update(new, old, 1 - decay)  # noqa: E731
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            ema_params=average(params, state.ema_params),
            ema_batch_stats=average(batch_stats, state.ema_batch_stats),
            opt_state=opt_state,
        ).update_more()
        squares = sharding.add_up(_add_squares, grads, mesh)
        return state, {"loss": loss, "grad_norm": jnp.sqrt(squares)}

    return sharding.compile_step(train_step, mesh, parallelism)


def _keep_order(value_and_grad):
    """`value_and_grad` with gradients in the memory order of their weights.

    On GPUs a convolution's gradient comes in another order. Left to itself, XLA turns the weight,
    its moments and its average to that order and back, which takes as long as all of Adam. A device
    says so of its own gradients, before they are added up: of arrays that are split over devices,
    XLA would gather the whole to put it into order. The barrier keeps XLA from merging Adam with
    the kernels that these gradients come from, which would turn it to their order all the same.
    """

    def keep(g):
        order = Layout(major_to_minor=tuple(range(g.ndim)))
        return with_layout_constraint(g, order) if g.ndim > 2 else g

    def in_order(*arguments):
        value, grads = value_and_grad(*arguments)
        return value, jax.lax.optimization_barrier(jax.tree.map(keep, grads))

    return in_order


def _add_squares(grads):
    """The sum of all squares, from one vector of the sums of all rows and the squares of vectors.

    On a GPU, Adam's kernels add up the rows as they read them, and few kernels do the rest.
    """
    squares = [jnp.square(g) for g in grads]
    rows = [s if s.ndim < 2 else jnp.sum(s, axis=-1) for s in squares]
    together = jnp.concatenate([jnp.zeros(0), *(row.ravel() for row in rows)])
    return jnp.sum(jax.lax.optimization_barrier(together))


def get_eval_step(
    network: Any,
    scale: LatentScale,
    process: ForwardProcess = ForwardProcess(),
    *,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, PRNGKeyArray, Mapping], Array]:
    """The jitted held-out loss of the averaged weights: loss = eval_step(state, rng, batch).

    It is the mean absolute error of x_0, whatever was minimised in training. The same key gives the
    same noise, so that the losses of two checkpoints can be compared.
    """
    loss_fn = get_loss(network, scale, process)

    @jax.jit
    def eval_step(state, rng, batch):
        variables = sharding.gather(mesh, (state.ema_params, state.ema_batch_stats))
        loss, _ = loss_fn(*variables, rng, batch)
        return loss

    return eval_step


def check_losses(losses: Float[np.ndarray, " n"], last_step: int, name: str = "loss") -> None:
    """Stops a run whose loss is no longer a number.

    Args:
        losses: of the latest n steps, the last of which is `last_step`.
        name: what they are called, where they are something else that must be a number.

    Raises:
        FloatingPointError: names the first such step and the window that was looked at.
    """
    broken = np.flatnonzero(~np.isfinite(losses))
    if broken.size:
        first = last_step - len(losses) + 1
        raise FloatingPointError(
            f"the {name} became {losses[broken[0]]} at step {first + broken[0]} "
            f"(steps {first} to {last_step} were looked at); no checkpoint was written since. "
            "Try a lower learning rate, warm-up steps or clip_norm"
        )
