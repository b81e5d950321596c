"""Kernels for an NVIDIA GPU, in Pallas: attention in training, one forward, one for the gradient.

Queries, keys and values side by side => what each position gets, and back. Weights never leave the
chip: the gradient's kernel computes them again (FlashAttention, Dao et al. 2022). XLA writes
logits and weights and reads them again, and copies queries, keys and values, and their gradients,
out of and into one array.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ldm_jax import tiles

ROWS = 64  # Positions, of one sample or several, that a block of threads works on.
CHUNK = 128  # Channels of values, at once, at most.
LOG2_E = math.log2(math.e)


class Sizes(NamedTuple):
    """Of what a block of threads works on: a head's part of some samples.

    Attributes:
        n: positions of a sample.
        keys: channels of a head's queries, and of its keys.
        values: channels of its values.
        heads: of the attention.
        scale: that logits are multiplied by.
    """

    n: int
    keys: int
    values: int
    heads: int
    scale: float

    @property
    def inner(self) -> int:
        """Channels of all queries, and of all keys."""
        return self.heads * self.keys

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(first channel, channels) of the parts that a head's values are worked on in."""
        return [(i, min(CHUNK, self.values - i)) for i in range(0, self.values, CHUNK)]


def fits(positions: int, keys: int, values: int) -> bool:
    """Whether there are kernels for maps of so many positions, and for heads of such widths."""
    keys, values = _pad(keys), _pad(values)
    most = 256 if values <= 256 and keys + values <= 320 else ROWS  # Of shared memory.
    return positions & (positions - 1) == 0 and 4 <= positions <= most and keys <= 128


def can_run(projected: Float[Array, "b n _"], inner: int, heads: int) -> bool:
    """Whether `attend` has kernels for a map's projections, and this process a GPU for them."""
    _, n, width = projected.shape
    fit = projected.dtype == jnp.bfloat16 and fits(n, inner // heads, (width - 2 * inner) // heads)
    return fit and tiles.are_possible()


def attend(
    projected: Float[Array, "b n _"], key_bias: Float[Array, " i"], divisor: float, heads: int = 1
) -> tuple[Float[Array, "b n c"], Float[Array, " heads b*n"]]:
    """softmax((k + key_bias) q^T / divisor) v, the softmax over all n places of q, in float32.

    Samples of fewer than ROWS places share blocks: a number that is not finite spoils its block's.

    Args:
        projected: queries (i channels), keys (i) and values (c) side by side, in each of which the
            channels of a head lie together; sizes that `fits`.
        key_bias: float32.
        divisor: of the logits.
        heads: attend each by itself.

    Returns:
        The attention's result, and for each head and place of k the logarithm of the sum under the
        softmax.
    """
    (b, n, width), inner = projected.shape, len(key_bias)
    channels = width - 2 * inner
    shapes = [((b * n, channels), projected.dtype), ((heads, b * n), jnp.float32)]
    sizes = Sizes(n, inner // heads, channels // heads, heads, 1 / divisor)
    kernel = _forward if n <= ROWS else _forward_by_windows
    y, log_sums = _call(kernel, projected, key_bias, shapes=shapes, sizes=sizes)
    return y.reshape(b, n, -1), log_sums


def get_gradient(
    projected: Float[Array, "b n _"],
    bias: Float[Array, " 2*i"],
    y: Float[Array, "b n c"],
    log_sums: Float[Array, " heads b*n"],
    dy: Float[Array, "b n c"],
    divisor: float,
) -> Float[Array, "b n _"]:
    """The gradient of `projected`, from what `attend` got and returned, and the gradient of y.

    Args:
        bias: of queries and keys. The queries' was none of `attend`'s, which it would not change.
    """
    (b, n, width), channels, heads = projected.shape, y.shape[-1], len(log_sums)
    query_bias, key_bias = jnp.split(bias, 2)
    arguments = [query_bias, dy.reshape(-1, channels)]
    arguments += [] if n <= ROWS else [y.reshape(-1, channels), log_sums]
    kernel = _backward if n <= ROWS else _backward_by_windows
    sizes = Sizes(n, len(key_bias) // heads, channels // heads, heads, 1 / divisor)
    shapes = [((b * n, width), projected.dtype)]
    gradient = _call(kernel, projected, key_bias, *arguments, shapes=shapes, sizes=sizes)[0]
    return gradient.reshape(projected.shape)


def _call(kernel, projected, key_bias, *more, shapes, sizes):
    total = projected.shape[0] * sizes.n
    stages = 3 if sizes.n > ROWS else 2
    return pl.pallas_call(
        partial(kernel, sizes=sizes),
        out_shape=[tiles.describe(*shape, projected) for shape in shapes],
        grid=(pl.cdiv(total, ROWS), sizes.heads),
        compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=stages),
        interpret=tiles.interpret(),
        name=f"{kernel.__name__}_{sizes.n}_{sizes.heads}_{projected.shape[-1]}",
    )(projected.reshape(total, -1), key_bias, *more)


def _forward(projected, key_bias, out, log_sums, *, sizes):
    """Of samples that a block holds as a whole."""
    mine, rows = _Head(sizes, projected, key_bias), _get_rows()
    weights, logs = _get_weights(mine.keys(rows), mine.queries(rows), rows, sizes)
    for i, values in enumerate(mine.values(rows)):
        mine.put(out, rows, i, tiles.dot(weights.astype(values.dtype), values))
    tiles.store(log_sums.at[mine.head, rows], logs, rows, out.shape[0])


def _forward_by_windows(projected, key_bias, out, log_sums, *, sizes):
    """Of a part of a sample, with a softmax from window to window (Milakov & Gimelshein 2018)."""
    mine, rows = _Head(sizes, projected, key_bias), _get_rows()
    keys, start = mine.keys(rows), _get_start(sizes.n)

    def look(step, carry):
        highest, total, ys = carry
        seen = start + step * ROWS + jnp.arange(ROWS)
        logits = tiles.dot(keys, mine.queries(seen).T) * (sizes.scale * LOG2_E)
        higher = jnp.maximum(highest, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(highest - higher)
        more = [tiles.dot(weights.astype(v.dtype), v) for v in mine.values(seen)]
        ys = tuple(y * shrink[:, None] + part for y, part in zip(ys, more))
        return higher, total * shrink + jnp.sum(weights, axis=1), ys

    carry = jnp.full(ROWS, -jnp.inf), jnp.zeros(ROWS), mine.zeros()
    highest, total, ys = jax.lax.fori_loop(0, jnp.int32(sizes.n // ROWS), look, carry)
    for i, y in enumerate(ys):
        mine.put(out, rows, i, y / total[:, None])
    logs = highest / LOG2_E + jnp.log(total)
    tiles.store(log_sums.at[mine.head, rows], logs, rows, out.shape[0])


def _backward(projected, key_bias, query_bias, dy, out, *, sizes):
    mine, dtype, rows = _Head(sizes, projected, key_bias), dy.dtype, _get_rows()
    keys, queries = mine.keys(rows), mine.queries(rows)
    weights, _ = _get_weights(keys, queries, rows, sizes)
    rounded = weights.astype(dtype).T
    d_weights = jnp.zeros((ROWS, ROWS), jnp.float32)
    for i, (part, values) in enumerate(zip(mine.parts(dy, rows), mine.values(rows))):
        d_weights += tiles.dot(part, values.T)
        mine.put(out, rows, i, tiles.dot(rounded, part), before=2 * sizes.inner)
    through_sum = jnp.sum(weights * d_weights, axis=1)
    d_logits = (weights * (d_weights - through_sum[:, None]) * sizes.scale).astype(dtype)
    d_keys = tiles.dot(d_logits, queries) + mine.spread(_sum(d_logits), query_bias)
    mine.put_keys(out, rows, d_keys, tiles.dot(d_logits.T, keys))


def _backward_by_windows(projected, key_bias, query_bias, dy, y, log_sums, out, *, sizes):
    """The gradients of a block's keys, then those of its queries and values."""
    mine, rows, start = _Head(sizes, projected, key_bias), _get_rows(), _get_start(sizes.n)

    def load(rows):
        """Keys, queries, values, dy, the sums over a row of y dy; logarithms of a row's sum."""
        d_y = mine.parts(dy, rows)
        both = zip(d_y, mine.parts(y, rows))
        products = [jnp.sum(d.astype(jnp.float32) * y.astype(jnp.float32), 1) for d, y in both]
        products = sum(products[1:], products[0])
        log_sum = log_sums[mine.head, rows] * LOG2_E
        return mine.keys(rows), mine.queries(rows), mine.values(rows), d_y, products, log_sum

    def differentiate(receiving, seen):
        """Weights and the gradient of logits, rounded."""
        keys, _, _, d_y, products, log_sum = receiving
        _, queries, values, _, _, _ = seen
        logits = tiles.dot(keys, queries.T) * (sizes.scale * LOG2_E)
        weights = jnp.exp2(logits - log_sum[:, None])
        d_weights = [tiles.dot(d, v.T) for d, v in zip(d_y, values)]
        d_weights = sum(d_weights[1:], d_weights[0])
        d_logits = weights * (d_weights - products[:, None]) * sizes.scale
        return weights.astype(dy.dtype), d_logits.astype(dy.dtype)

    here = load(rows)

    def look(step, carry):
        d_keys, sums = carry
        seen = load(start + step * ROWS + jnp.arange(ROWS))
        _, d_logits = differentiate(here, seen)
        return d_keys + tiles.dot(d_logits, seen[1]), sums + _sum(d_logits)

    def be_seen(step, carry):
        d_queries, d_values = carry
        receiving = load(start + step * ROWS + jnp.arange(ROWS))
        weights, d_logits = differentiate(receiving, here)
        d_values = tuple(v + tiles.dot(weights.T, d) for v, d in zip(d_values, receiving[3]))
        return d_queries + tiles.dot(d_logits.T, receiving[0]), d_values

    zeros, windows = jnp.zeros((ROWS, _pad(sizes.keys)), jnp.float32), jnp.int32(sizes.n // ROWS)
    d_keys, sums = jax.lax.fori_loop(0, windows, look, (zeros, jnp.zeros(ROWS)))
    d_keys += mine.spread(sums, query_bias)
    d_queries, d_values = jax.lax.fori_loop(0, windows, be_seen, (zeros, mine.zeros()))
    mine.put_keys(out, rows, d_keys, d_queries)
    for i, d in enumerate(d_values):
        mine.put(out, rows, i, d, before=2 * sizes.inner)


class _Head:
    """A block's head: where its channels are, in projections and in results.

    Tiles have powers of two channels, at least 16: a head's are filled up with zeros.
    """

    def __init__(self, sizes: Sizes, projected: Any, key_bias: Any):
        self.sizes, self.projected, self.key_bias = sizes, projected, key_bias
        # A constant for one head, whose kernels are then those of one head alone.
        self.head = pl.program_id(1) if sizes.heads > 1 else 0
        self._of_keys = self.head * sizes.keys

    def queries(self, rows):
        return _load(self.projected, rows, self._of_keys, self.sizes.keys)

    def keys(self, rows):
        """With their bias."""
        keys = _load(self.projected, rows, self.sizes.inner + self._of_keys, self.sizes.keys)
        return (keys.astype(jnp.float32) + self._load_bias(self.key_bias)[None]).astype(keys.dtype)

    def values(self, rows):
        return self.parts(self.projected, rows, before=2 * self.sizes.inner)

    def parts(self, ref, rows, before=0):
        """Of a map of values, a chunk each."""
        first = before + self.head * self.sizes.values
        return [_load(ref, rows, first + at, count) for at, count in self.sizes.chunks]

    def zeros(self):
        """A sum of values to be, a chunk each."""
        return tuple(jnp.zeros((ROWS, _pad(n)), jnp.float32) for _, n in self.sizes.chunks)

    def put(self, out, rows, chunk, x, before=0):
        """A chunk of values, behind `before` other channels."""
        at, count = self.sizes.chunks[chunk]
        _put(out, rows, before + self.head * self.sizes.values + at, count, x)

    def put_keys(self, out, rows, keys, queries):
        """And queries."""
        _put(out, rows, self.sizes.inner + self._of_keys, self.sizes.keys, keys)
        _put(out, rows, self._of_keys, self.sizes.keys, queries)

    def spread(self, sums, bias):
        """What a bias of all rows adds to a product, of the sums of the other factor."""
        return sums[:, None] * self._load_bias(bias)[None]

    def _load_bias(self, bias):
        columns, mask = _get_columns(self.sizes.keys)
        return _masked_load(bias, (self._of_keys + columns,), mask)


def _sum(x):
    return jnp.sum(x.astype(jnp.float32), 1)


def _get_rows():
    """Positions of this block."""
    return pl.program_id(0) * ROWS + jnp.arange(ROWS)


def _get_start(n):
    """The first position of this block's sample."""
    return tiles.div(pl.program_id(0) * ROWS, n) * n


def _get_weights(keys, queries, rows, sizes):
    """Of samples as a whole; and the logarithms of their sums."""
    logits = tiles.dot(keys, queries.T) * sizes.scale
    if sizes.n < ROWS:  # A block holds several samples.
        sample = tiles.div(rows, sizes.n)
        logits = jnp.where(sample[:, None] == sample[None], logits, -jnp.inf)
    highest = jnp.max(logits, axis=1)
    weights = jnp.exp(logits - highest[:, None])
    total = jnp.sum(weights, axis=1)
    return weights / total[:, None], highest + jnp.log(total)


def _pad(count):
    """Channels of the smallest tile that holds so many."""
    return max(16, 1 << (count - 1).bit_length())


def _get_columns(count):
    """Channels of a tile, and which of them are some of `count`; None for all."""
    columns = jnp.arange(_pad(count))
    return columns, None if _pad(count) == count else columns < count


def _masked_load(ref, places, mask):
    at = ref.at[places]
    return tiles.triton.load(at, mask=mask, other=None if mask is None else 0.0)


def _load(ref, rows, first, count):
    """Some columns, and zeros up to a tile's; a row after the last is the first one again."""
    columns, mask = _get_columns(count)
    if mask is not None:
        mask = jnp.broadcast_to(mask[None], (len(rows), len(columns)))
    rows = tiles.rem(rows, ref.shape[0])
    return _masked_load(ref, (rows[:, None], (first + columns)[None]), mask)


def _put(out, rows, first, count, x):
    """The first `count` columns of x."""
    columns, mask = _get_columns(count)
    at = out.at[rows[:, None], (first + columns)[None]]
    tiles.store(at, x.astype(out.dtype), rows, out.shape[0], mask)
