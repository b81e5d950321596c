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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt16

from ldm_jax.group_norms import GroupNorm, drop
from ldm_jax.sums import column_sums

NORMS = ("batch", "group", "rms")
EPSILON = 1e-3  # Of batch norms.


def get_norm(
    norm: str,
    *,
    train: bool,
    dtype: Any,
    affine: bool = True,
    per_token: bool = False,
    apart: bool = False,
    axis_name: Any = None,
) -> Any:
    """The layer that `norm` names, its habits set: partial of BatchNorm, GroupNorm, nn.RMSNorm.

    "rms" divides each position's channels by their root mean square and multiplies by a scale for
    each channel; it subtracts no mean and adds no bias (Zhang & Sennrich 2019, eq. 4).

    Args:
        norm: one of NORMS.
        train: a batch norm takes the batch's statistics.
        dtype: of what comes out.
        affine: whether the norm has weights.
        per_token: keeps a group norm from mixing the tokens of a sequence.
        apart: of a batch norm, gives `BatchNormApart`.
        axis_name: see above.

    Raises:
        ValueError: for a norm of another name.
    """
    if norm == "batch":
        return partial(
            BatchNormApart if apart else BatchNorm,
            use_running_average=not train,
            momentum=0.99,
            epsilon=EPSILON,
            use_scale=affine,
            use_bias=affine,
            dtype=dtype,
            axis_name=axis_name,
        )
    if norm == "group":
        return partial(GroupNorm, affine=affine, dtype=dtype, per_token=per_token, by_kernels=train)
    if norm == "rms":
        return partial(nn.RMSNorm, epsilon=1e-5, use_scale=affine, dtype=dtype)
    raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) scale + bias, by the statistics of the whole batch.

    Ioffe & Szegedy 2015, algorithm 1. linen's layer averages the means of the devices, which is
    wrong where a mask leaves each another number of positions; this one adds sums and counts.
    """

    use_running_average: bool = True
    momentum: float = 0.99
    epsilon: float = EPSILON
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = jnp.float32
    axis_name: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *n c"], mask: Bool[Array, "b *n 1"] | None = None
    ) -> Float[Array, "b *n c"]:
        """Positions where `mask` is False are normalised and left out of the statistics."""
        running, scale, bias = self._get_variables(x.shape[-1])
        near, var = (variable.value for variable in running)
        if self.use_running_average:
            return _affine(x, near, jax.lax.rsqrt(var + self.epsilon), scale, bias).astype(
                self.dtype
            )
        results: Any = normalise(x, scale, bias, mask, near, self.epsilon, self._get_axis_name())
        y, mean, var = results
        self._update(running, mean, var)
        return y.astype(self.dtype)

    def _get_variables(self, channels):
        """The running mean and variance; scale and bias, or None."""
        shape = (channels,)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape) if self.use_scale else None
        bias = self.param("bias", nn.initializers.zeros, shape) if self.use_bias else None
        return (mean, var), scale, bias

    def _get_axis_name(self):
        return None if self.is_initializing() else self.axis_name

    def _update(self, running, *batch):
        if not self.is_initializing():
            for variable, new in zip(running, batch, strict=True):
                new = jax.lax.stop_gradient(new)
                variable.value = self.momentum * variable.value + (1 - self.momentum) * new


class BatchNormApart(BatchNorm):
    """The same layer for a linear one that comes right after it and takes the norm into its kernel.

    (x - mean) factor + bias is left to that layer, see `ldm_jax.normed`.
    """

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "b *n c"]
    ) -> tuple[Float[Array, " c"], Float[Array, " c"], Float[Array, " c"] | None]:
        """mean, factor, bias; in training, gradients flow to x through mean and factor."""
        running, scale, bias = self._get_variables(x.shape[-1])
        mean, var = (variable.value for variable in running)
        if not self.use_running_average:
            results: Any = batch_moments(x, mean, self._get_axis_name())
            (mean, var), batch = results
            self._update(running, *batch)
        factor = jax.lax.rsqrt(var + self.epsilon)
        return mean, factor if scale is None else factor * scale, bias


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def normalise(
    x: Float[Array, "b *n c"],
    scale: Float[Array, " c"] | None,
    bias: Float[Array, " c"] | None,
    mask: Bool[Array, "b *n 1"] | None,
    near: Float[Array, " c"],
    epsilon: float,
    axis_name: Any,
) -> tuple[Float[Array, "b *n c"], Float[Array, " c"], Float[Array, " c"]]:
    """y, mean and variance of a batch norm; gradients flow through y alone.

    The gradient is written out, with v = x normalised, N positions, and sums over all devices:

        dL/dx = scale / sqrt(var + epsilon) (dL/dy - (sum dL/dy + v sum v dL/dy) / N)

    Forward and backward each read the map twice, once for two sums and once for the result, and
    keep nothing but x. Derived by JAX, the float32 intermediates are written and read as well; that
    costs a tenth of a training step. The devices wait for each other once in either direction.

    Args:
        x: the map, of which each device holds a part of the batch.
        scale, bias: weights, or None.
        mask: positions that count; None for all.
        near: numbers near the means, the same on all devices, such as the running means.
        epsilon: added to the variance.
        axis_name: of the mesh axes that the batch is spread over; None for none.
    """
    results, _ = _normalise(x, scale, bias, mask, near, epsilon, axis_name)
    return results


def _normalise(x, scale, bias, mask, near, epsilon, axis_name) -> tuple[Any, Any]:
    mean, var, count = _statistics(x, mask, near, axis_name)
    factor = jax.lax.rsqrt(var + epsilon)
    y = _affine(x, mean, factor, scale, bias).astype(x.dtype)
    return (y, mean, var), (x, scale, bias, mask, mean, factor, count)


def _normalise_backward(epsilon, axis_name, saved, cotangents):
    x, scale, bias, mask, mean, factor, count = saved
    dy = cotangents[0].astype(jnp.float32)
    normalised = _affine(x, mean, factor)
    sum_dy, sum_v_dy = column_sums(dy, normalised * dy)
    d_scale = None if scale is None else sum_v_dy
    d_bias = None if bias is None else sum_dy
    if axis_name is not None:
        sum_dy, sum_v_dy = jax.lax.psum(jnp.stack([sum_dy, sum_v_dy]), axis_name)
    through_statistics = _affine(normalised, 0.0, sum_v_dy / count, None, sum_dy / count)
    if mask is not None:
        through_statistics = jnp.where(mask, through_statistics, 0)
    dx = (dy - through_statistics) * _last_axis(x, factor if scale is None else factor * scale)
    return dx.astype(x.dtype), d_scale, d_bias, None, None


normalise.defvjp(_normalise, _normalise_backward)


def _affine(x, mean, factor, scale=None, bias=None):
    """(x - mean) factor scale + bias, in float32."""
    factor = factor if scale is None else factor * scale
    y = (x.astype(jnp.float32) - _last_axis(x, mean)) * _last_axis(x, factor)
    return y if bias is None else y + _last_axis(x, bias)


def _last_axis(x, v):
    """A number for each channel of x."""
    return jnp.reshape(v, (1,) * (x.ndim - 1) + (-1,))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def batch_moments(x: Float[Array, "b *n c"], near: Float[Array, " c"], axis_name: Any) -> Any:
    """(mean, variance), twice: with gradients to x, varying over the devices as x does; without.

    dL/dx = (dL/dmean + 2 (x - mean) dL/dvar) / N, of N positions on all devices, whose parts of
    dL/dmean and dL/dvar are added up in one message. `near` and `axis_name` as in `normalise`.
    """
    return _batch_moments(x, near, axis_name)[0]


def _batch_moments(x, near, axis_name) -> tuple[Any, Any]:
    mean, var, count = _statistics(x, None, near, axis_name)
    manual = jax.typeof(x).manual_axis_type
    varying = tuple(manual.varying - jax.typeof(mean).manual_axis_type.varying) if manual else ()
    here = (
        [jax.lax.pcast(v, varying, to="varying") for v in (mean, var)] if varying else [mean, var]
    )
    return (tuple(here), (mean, var)), (x, mean, count)


def _batch_moments_backward(axis_name, saved, cotangents):
    x, mean, count = saved
    d_mean, d_var = cotangents[0]
    if axis_name is not None:
        d_mean, d_var = jax.lax.psum(jnp.stack([d_mean, d_var]), axis_name)
    dx = _affine(x, mean, 2 * d_var / count, None, d_mean / count)
    return dx.astype(x.dtype), None


batch_moments.defvjp(_batch_moments, _batch_moments_backward)


def _statistics(x, mask, near, axis_name):
    """Mean and variance (c,), and the number of positions that count, on all devices.

    In one pass: the sums are those of the distances from `near`, since E[x^2] - E[x]^2 itself loses
    digits where the mean is large. They are lost as the square of the mean's distance from `near`
    over the variance grows: of a new layer, whose running means are zero, 3e-5 of the variance
    where the mean is ten deviations, 3e-3 where it is a hundred. (Distances from one of the
    positions would lose none on one device, and keep XLA from adding up a map as it makes it.)
    """
    distance = x.astype(jnp.float32) - _last_axis(x, near)
    count = x.size // x.shape[-1]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*x.shape[:-1], 1))
        distance, count = jnp.where(mask, distance, 0), jnp.sum(mask).astype(jnp.float32)
    total, squares = column_sums(distance, jnp.square(distance))
    if axis_name is not None:
        total, squares = jax.lax.psum(jnp.stack([total, squares]), axis_name)
        count = jax.lax.psum(count, axis_name)
    deviations = squares - total * (total / count)
    return near + total / count, jnp.maximum(deviations, 0) / count, count


class Dropout(nn.Module):
    """Zeroes activations with probability `rate` and divides the others by 1 - rate.

    Srivastava et al. 2014. Each sample has a key of its own, by its place in the whole batch.
    """

    rate: float
    axis_name: Any = None

    def __call__(self, x: Float[Array, "b ..."], *, train: bool = False) -> Float[Array, "b ..."]:
        keep = self.draw_keep(x.shape, train=train)
        return x if keep is None else drop(x, keep, self.gain)

    def draw_keep(self, shape: tuple[int, ...], *, train: bool) -> Bool[Array, "b ..."] | None:
        """What is kept of maps of a shape (b, ...), to be multiplied by `gain`; None for all."""
        if not train or self.rate == 0:
            return None
        keys = sample_keys(self.make_rng("dropout"), shape[0], self.axis_name)
        return jax.vmap(lambda key: draw_halves(key, shape[1:]) >= self._dropped)(keys)

    @property
    def gain(self) -> float:
        return 2**16 / (2**16 - self._dropped)

    @property
    def _dropped(self):
        """Of 2^16 random numbers."""
        return min(round(self.rate * 2**16), 2**16 - 1)


def draw_halves(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt16[Array, "..."]:
    """Random numbers of 16 bits, two from each word of 32: JAX makes a word for each.

    The words take longer to make than a map to read and write.
    """
    *most, last = shape
    words = jax.random.bits(key, (*most, -(-last // 2)), "uint32")
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    return halves.reshape(*most, -1)[..., :last]


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
