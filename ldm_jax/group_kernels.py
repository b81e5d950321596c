"""Kernels for an NVIDIA GPU, in Pallas: a group norm with what comes right before and after it.

A block of threads works on some groups of a sample, and so reads a map from memory once, forward
and back. XLA reads it for the statistics and again for the result, and writes bias, norm,
activation and dropout apart. Gradients are worked out from the map, the terms and two numbers of
each group.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from ldm_jax import tiles

GROUP_SIZE = 16
EPSILON = 1e-5
# Positions of a map: 8 x 8 and 16 x 16 are measured to gain, 4 x 4 to lose, others not measured.
FEWEST, MOST = 64, 256
ROWS = 64  # Positions that a block of threads works on at once.
CHANNELS = 64  # Of a block, at most.


class Terms(NamedTuple):
    """What a norm is surrounded by: keep gain swish(scale v + shift), v the norm of x + bias.

    Attributes:
        bias: None for 0.
        scale, shift: for each sample; None for 1 and 0, both or none.
        keep: where False, the result is 0; None for everywhere.
    """

    bias: Float[Array, " c"] | None = None
    scale: Float[Array, "b c"] | None = None
    shift: Float[Array, "b c"] | None = None
    keep: Bool[Array, "b h w c"] | None = None


class Settings(NamedTuple):
    """The rest of it.

    Attributes:
        swish: x sigmoid(x); False for x.
        gain: see `Terms`.
    """

    swish: bool = False
    gain: float = 1.0


def can_run(x: Float[Array, "b *n c"]) -> bool:
    """Whether there are kernels for such a map, and this process has a GPU for them."""
    _, n, _ = _get_shape(x)
    fit = n & (n - 1) == 0 and FEWEST <= n <= MOST
    return fit and x.dtype == jnp.bfloat16 and tiles.are_possible()


def normalise(
    x: Float[Array, "b h w c"], terms: Terms, settings: Settings
) -> tuple[Array, Float[Array, "b g"], Float[Array, "b g"]]:
    """Of a map that `can_run`, what `Terms` says, in float32 and then in the dtype of x.

    Returns:
        The result; each group's mean, of x + bias, and 1 / sqrt(variance + EPSILON).
    """
    b, _, c = shape = _get_shape(x)
    groups = (b, c // GROUP_SIZE), jnp.float32
    shapes = [(shape, x.dtype), groups, groups]
    y, mean, rstd = _call(_forward, shapes, x, terms, settings=settings)
    return y.reshape(x.shape), mean, rstd


def get_gradient(
    x: Float[Array, "b h w c"],
    terms: Terms,
    mean: Float[Array, "b g"],
    rstd: Float[Array, "b g"],
    dy: Float[Array, "b h w c"],
    settings: Settings,
) -> tuple[Array, Terms]:
    """The gradients of x and of the terms, from that of the result; None for `keep`.

    Args:
        mean, rstd: that `normalise` returned.
    """
    b, _, c = shape = _get_shape(x)
    names = [name for name in ("bias", "scale", "shift") if getattr(terms, name) is not None]
    shapes = [(shape, x.dtype), *(((b, c), jnp.float32) for _ in names)]
    arguments = mean, rstd, dy.reshape(shape)
    d_x, *sums = _call(_backward, shapes, x, terms, *arguments, settings=settings)
    d_terms = dict(zip(names, sums, strict=True))
    if "bias" in d_terms:
        d_terms["bias"] = jnp.sum(d_terms["bias"], axis=0)
    return d_x.reshape(x.shape), Terms(**d_terms)


def _get_shape(x):
    """Samples, positions, channels."""
    return len(x), x.size // (len(x) * x.shape[-1]), x.shape[-1]


def _call(kernel, shapes, x, terms, *more, settings):
    b, n, c = shape = _get_shape(x)
    channels = min(c & -c, CHANNELS)  # A power of two that divides c.
    given = {name: term for name, term in terms._asdict().items() if term is not None}
    if "keep" in given:
        given["keep"] = given["keep"].reshape(shape)
    return pl.pallas_call(
        partial(kernel, names=tuple(given), size=(n, channels), settings=settings),
        out_shape=[tiles.describe(*out, x) for out in shapes],
        grid=(b, c // channels),
        compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=tiles.interpret(),
        name=f"{kernel.__name__}_norm_{n}_{c}",
    )(x.reshape(shape), *more, *given.values())


def _forward(x, *refs, names, size, settings):
    *terms, out, means, rstds = refs
    part = _Part(size, dict(zip(names, terms, strict=True)), settings)
    near = part.load_first(x)  # Sums of distances from some position keep their digits.

    def add_up(step):
        distance = part.load(x, step) - near
        return distance, jnp.square(distance)

    total, squares = part.average_positions(add_up, 2)
    near += part.bias
    mean = part.average_channels(near + total)
    away = near - part.spread(mean)
    variance = part.average_channels(squares + 2 * away * total + jnp.square(away))
    rstd = jax.lax.rsqrt(jnp.maximum(variance, 0) + EPSILON)
    means[part.groups], rstds[part.groups] = mean, rstd
    center, rstd = part.bias - part.spread(mean), part.spread(rstd)

    def finish(step):
        y = part.modulate((part.load(x, step) + center) * rstd)
        part.store(out, step, part.drop(y * jax.nn.sigmoid(y) if settings.swish else y, step))

    part.for_all_positions(finish)


def _backward(x, means, rstds, dy, *refs, names, size, settings):
    terms, (d_x, *sums) = refs[: len(names)], refs[len(names) :]
    part = _Part(size, dict(zip(names, terms, strict=True)), settings)
    center = part.bias - part.spread(means[part.groups])
    rstd, with_bias = part.spread(rstds[part.groups]), "bias" in names

    def differentiate(step):
        """The norm, and the gradient of what it is turned to before the swish."""
        v, d_y = (part.load(x, step) + center) * rstd, part.drop(part.load(dy, step), step)
        if settings.swish:
            y = part.modulate(v)
            s = jax.nn.sigmoid(y)
            d_y *= s * (1 + y * (1 - s))
        return v, d_y

    def add_up(step):
        v, d_y = differentiate(step)
        return (d_y, d_y * v, v) if with_bias else (d_y, d_y * v)

    d_shift, d_scale, *v_mean = part.average_positions(add_up, 3 if with_bias else 2)
    mean = part.spread(part.average_channels(part.scale * d_shift))
    slope = part.spread(part.average_channels(part.scale * d_scale))

    def finish(step):
        v, d_y = differentiate(step)
        part.store(d_x, step, rstd * (part.scale * d_y - mean - v * slope))

    part.for_all_positions(finish)
    gradients = [d_scale, d_shift] if "scale" in names else []
    if with_bias:
        d_bias = rstd * (part.scale * d_shift - mean - v_mean[0] * slope)
        gradients.insert(0, d_bias)
    for ref, gradient in zip(sums, gradients, strict=True):
        ref[part.channels] = gradient[0] * size[0]


class _Part:
    """What a block of threads works on: all positions of some channels of a sample.

    It goes through a large map step by step, and again: the second time from the GPU's cache. A
    small one it keeps.

    Attributes:
        channels, groups: where arrays of a number for each channel or group have this part's.
        bias, scale, shift: the terms' numbers for each channel, in a row.
    """

    def __init__(self, size: tuple[int, int], terms: dict[str, Any], settings: Settings):
        self.positions, channels = size
        self.rows = min(self.positions, ROWS)
        self.steps, self.size = self.positions // self.rows, (self.rows, channels)
        self.sample, part = pl.program_id(0), pl.program_id(1)
        groups = channels // GROUP_SIZE
        self.channels = self.sample, part * channels + jnp.arange(channels)
        self.groups = self.sample, part * groups + jnp.arange(groups)
        self.settings, self.keep = settings, terms.get("keep")
        self.bias = terms["bias"][self.channels[1]][None] if "bias" in terms else 0.0
        self.scale, self.shift = 1.0, 0.0
        if "scale" in terms:
            both = (terms[name][self.channels][None] for name in ("scale", "shift"))
            self.scale, self.shift = (x.astype(jnp.float32) for x in both)
        self._kept: dict[int, Array] = {}

    def _at(self, step):
        rows = step * self.rows + jnp.arange(self.rows)
        return self.sample, rows[:, None], self.channels[1][None]

    def load(self, ref, step):
        if id(ref) in self._kept:
            return self._kept[id(ref)]
        x = ref[self._at(step)].astype(jnp.float32)
        if self.steps == 1:
            self._kept[id(ref)] = x
        return x

    def load_first(self, ref):
        """The first position."""
        return ref[self.sample, 0, self.channels[1]][None].astype(jnp.float32)

    def store(self, ref, step, x):
        ref[self._at(step)] = x.astype(ref.dtype)

    def average_channels(self, x):
        """A row of a number for each channel => their mean over each group."""
        return jnp.sum(x.reshape(-1, GROUP_SIZE), axis=1) / GROUP_SIZE

    def spread(self, groups):
        """A number for each group => a row of that of each channel's."""
        return jnp.broadcast_to(groups[:, None], (len(groups), GROUP_SIZE)).reshape(1, -1)

    def average_positions(self, get, count):
        """Means over all positions, in rows, of the `count` maps that `get` makes of a step's."""
        if self.steps == 1:
            totals = get(0)
        else:
            add = lambda step, sums: tuple(a + b for a, b in zip(sums, get(step)))  # noqa: E731
            zeros = tuple(jnp.zeros(self.size, jnp.float32) for _ in range(count))
            totals = jax.lax.fori_loop(0, jnp.int32(self.steps), add, zeros)
        return [jnp.sum(x, axis=0)[None] / self.positions for x in totals]

    def for_all_positions(self, do):
        if self.steps == 1:
            do(0)
        else:
            jax.lax.fori_loop(0, jnp.int32(self.steps), lambda step, _: do(step), None)

    def modulate(self, v):
        return v * self.scale + self.shift

    def drop(self, x, step):
        """What is kept, times the gain."""
        if self.keep is None:
            return x
        return jnp.where(self.keep[self._at(step)], x * self.settings.gain, 0.0)
