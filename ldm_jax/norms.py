"""Layers that look at more than one sample, or draw for each: maps => normalised or masked maps.

Where a batch is spread over devices by hand (shard_map, pmap), `axis_name` names the mesh axes that
it is spread over: a batch norm's statistics are then those of the whole batch, and a sample's
dropout is the same on any number of devices.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

NORMS = ("batch", "group")
GROUP_SIZE = 16


def get_norm(
    norm: str, *, train: bool, dtype: Any, per_token: bool = False, axis_name: Any = None
) -> Any:
    """The layer that `norm` names, its habits set: partial of BatchNorm or nn.GroupNorm.

    `per_token` keeps a group norm from mixing the tokens of a sequence.

    Raises:
        ValueError: for a norm of another name.
    """
    if norm == "batch":
        return partial(
            BatchNorm,
            use_running_average=not train,
            momentum=0.99,
            epsilon=1e-3,
            dtype=dtype,
            axis_name=axis_name,
        )
    if norm == "group":
        axes = (-1,) if per_token else None
        return partial(
            nn.GroupNorm,
            num_groups=None,
            group_size=GROUP_SIZE,
            epsilon=1e-5,
            dtype=dtype,
            reduction_axes=axes,
        )
    raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) scale + bias, by the statistics of the whole batch.

    Ioffe & Szegedy 2015, algorithm 1. linen's layer averages the means of the devices, which is
    wrong where a mask leaves each another number of positions; this one adds sums and counts. The
    statistics take two passes, as the literal form has them: E[x^2] - E[x]^2 loses digits in
    float32.
    """

    use_running_average: bool = True
    momentum: float = 0.99
    epsilon: float = 1e-3
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = jnp.float32
    axis_name: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *n c"], mask: Bool[Array, "b *n 1"] | None = None
    ) -> Float[Array, "b *n c"]:
        """Positions where `mask` is False are normalised and left out of the statistics."""
        shape = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = self._statistics(x.astype(jnp.float32), mask)
            if not self.is_initializing():
                for running, new in ((running_mean, mean), (running_var, var)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new

        def per_channel(v):
            return v.reshape((1,) * (x.ndim - 1) + shape)

        factor = jax.lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            factor = factor * self.param("scale", nn.initializers.ones, shape)
        y = (x - per_channel(mean)) * per_channel(factor)
        if self.use_bias:
            y = y + per_channel(self.param("bias", nn.initializers.zeros, shape))
        return y.astype(self.dtype)

    def _statistics(self, x, mask):
        """Mean and variance (c,) over all samples and positions that count, on all devices."""
        axes = tuple(range(x.ndim - 1))
        spread = self.axis_name is not None and not self.is_initializing()

        def total(values):
            sums = jnp.sum(values, axes)
            return jax.lax.psum(sums, self.axis_name) if spread else sums

        if mask is None:
            mask, count = True, x.size // x.shape[-1]
            count = count * jax.lax.axis_size(self.axis_name) if spread else count
        else:
            count = total(jnp.broadcast_to(mask, (*x.shape[:-1], 1)).astype(jnp.float32))
        mean = total(jnp.where(mask, x, 0)) / count
        centred = jnp.where(mask, x - mean.reshape((1,) * len(axes) + (-1,)), 0)
        return mean, total(jnp.square(centred)) / count


class Dropout(nn.Module):
    """Zeroes activations with probability `rate` and divides the others by 1 - rate.

    Srivastava et al. 2014. Each sample has a key of its own, by its place in the whole batch.
    """

    rate: float
    axis_name: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], *, train: bool = False) -> Float[Array, "b ..."]:
        if not train or self.rate == 0:
            return x
        keys = sample_keys(self.make_rng("dropout"), x.shape[0], self.axis_name)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)


def sample_keys(rng: PRNGKeyArray, samples: int, axis_name: Any = None) -> PRNGKeyArray:
    """A key for each sample of this device, by folding its place in the whole batch into `rng`.

    What is drawn with them does not depend on how the batch is spread over devices.
    """
    return jax.vmap(partial(jax.random.fold_in, rng))(batch_places(samples, axis_name))


def batch_places(samples: int, axis_name: Any = None) -> Int[Array, " b"]:
    """Places in the whole batch of the `samples` that this device holds, or works on just now."""
    first, held = _microbatch.get() or (0, samples)
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    return device * held + first + jnp.arange(samples)


@contextmanager
def microbatch(first: Int[Array, ""], held: int):
    """While tracing: the samples are those from `first` on, of the `held` of this device."""
    token = _microbatch.set((first, held))
    try:
        yield
    finally:
        _microbatch.reset(token)


_microbatch: ContextVar = ContextVar("microbatch", default=None)
