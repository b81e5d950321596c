"""A batch in parts, one after the other => the loss and the gradient of the whole."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ldm_jax.norms import microbatch


def get_value_and_grad(loss_fn: Callable, parts: int = 1, unroll: bool = False) -> Callable:
    """What jax.value_and_grad gives for a batch, with the activations of one part at a time.

    g = 1/k sum_i grad L(batch_i), added up in float32. Each sample keeps the keys of its place in
    the whole batch. So the result is that of the whole batch, but for batch norms: these see the
    statistics of a part (ghost batches, Hoffer et al. 2017), those of its samples on all devices,
    and the running ones move by the mean over the parts.

    Args:
        loss_fn: (params, batch_stats, rng, batch) -> (loss, batch_stats), means over the batch.
        parts: how many, each of as many samples.
        unroll: write the parts out one after the other, not as a loop. XLA takes 60 times as long
            for the gradient of a convolution's kernel in a loop on a CPU as outside of one; but it
            may hold the activations of all parts then.

    Returns:
        (params, batch_stats, rng, batch) -> ((loss, batch_stats), gradients).

    Raises:
        ValueError: for fewer parts than one; when called, for a batch that does not divide.
    """
    if parts < 1:
        raise ValueError(f"accumulate must be at least 1, got {parts}")
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        return value_and_grad

    def accumulate(params, batch_stats, rng, batch):
        held = len(next(iter(batch.values())))
        if held % parts:
            raise ValueError(
                f"the batch of a device must be divisible by accumulate={parts}, got {held} samples"
            )
        size = held // parts

        def derive(part):
            first, samples = part
            # The same key for each part, on purpose: samples fold their places in.
            with microbatch(first, held):
                return value_and_grad(params, batch_stats, jax.random.clone(rng), samples)

        def add_part(totals, part):
            return jax.tree.map(lambda total, x: total + x, totals, derive(part)), None

        split = {name: x.reshape(parts, size, *x.shape[1:]) for name, x in batch.items()}
        firsts = size * jnp.arange(parts)
        found = jax.eval_shape(derive, jax.tree.map(lambda x: x[0], (firsts, split)))
        # Carry: sums of the losses, the statistics and the gradients.
        zeros = jax.tree.map(_zeros, found)
        totals, _ = jax.lax.scan(add_part, zeros, (firsts, split), unroll=unroll)
        return jax.tree.map(lambda total, x: (total / parts).astype(x.dtype), totals, found)

    return accumulate


def _zeros(x):
    """Float32 zeros that vary over the devices of a shard_map as `x` does."""
    zeros = jnp.zeros(x.shape, jnp.float32)
    manual = x.manual_axis_type
    return jax.lax.pcast(zeros, tuple(manual.varying), to="varying") if manual else zeros
