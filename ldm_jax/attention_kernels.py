"""Kernels for an NVIDIA GPU, in Pallas: attention in training, one forward, one for the gradient.

Queries, keys and values side by side => what each position gets, and back. Weights never leave the
chip: the gradient's kernel computes them again (FlashAttention, Dao et al. 2022). XLA writes
logits and weights and reads them again, and copies queries, keys and values, and their gradients,
out of and into one array.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ldm_jax import tiles

ROWS = 64  # Positions, of one sample or several, that a block of threads works on.
CHUNK = 128  # Channels of values, at once.
LOG2_E = math.log2(math.e)


def fits(positions: int, inner: int, channels: int) -> bool:
    """Whether there are kernels for maps of so many positions, and so wide keys and values."""
    powers = all(size & (size - 1) == 0 for size in (positions, inner))
    most = 256 if channels <= 256 and inner + channels <= 320 else ROWS  # Of shared memory.
    return powers and 4 <= positions <= most and 16 <= inner <= 128 and channels % CHUNK == 0


def can_run(projected: Float[Array, "b n _"], inner: int) -> bool:
    """Whether `attend` has kernels for a map's projections, and this process a GPU for them."""
    _, n, width = projected.shape
    fit = projected.dtype == jnp.bfloat16 and fits(n, inner, width - 2 * inner)
    return fit and tiles.are_possible()


def attend(
    projected: Float[Array, "b n _"], key_bias: Float[Array, " i"], divisor: float
) -> tuple[Float[Array, "b n c"], Float[Array, " b*n"]]:
    """softmax((k + key_bias) q^T / divisor) v, the softmax over all n places of q, in float32.

    Args:
        projected: queries (i channels), keys (i) and values (c) side by side; sizes that `fits`.
        key_bias: float32.
        divisor: of the logits.

    Returns:
        The attention's result, and for each place of k the logarithm of the sum under the softmax.
    """
    (b, n, width), inner = projected.shape, len(key_bias)
    shapes = [((b * n, width - 2 * inner), projected.dtype), ((b * n,), jnp.float32)]
    kernel = _forward if n <= ROWS else _forward_by_windows
    y, log_sums = _call(kernel, projected, key_bias, shapes=shapes, n=n, scale=1 / divisor)
    return y.reshape(b, n, -1), log_sums


def get_gradient(
    projected: Float[Array, "b n _"],
    bias: Float[Array, " 2*i"],
    y: Float[Array, "b n c"],
    log_sums: Float[Array, " b*n"],
    dy: Float[Array, "b n c"],
    divisor: float,
) -> Float[Array, "b n _"]:
    """The gradient of `projected`, from what `attend` got and returned, and the gradient of y.

    Args:
        bias: of queries and keys. The queries' was none of `attend`'s, which it would not change.
    """
    (b, n, width), channels = projected.shape, y.shape[-1]
    query_bias, key_bias = jnp.split(bias, 2)
    arguments = [query_bias, dy.reshape(-1, channels)]
    arguments += [] if n <= ROWS else [y.reshape(-1, channels), log_sums]
    kernel = _backward if n <= ROWS else _backward_by_windows
    shapes = [((b * n, width), projected.dtype)]
    options = {"shapes": shapes, "n": n, "scale": 1 / divisor}
    return _call(kernel, projected, key_bias, *arguments, **options)[0].reshape(projected.shape)


def _call(kernel, projected, key_bias, *more, shapes, n, scale):
    total = projected.shape[0] * n
    return pl.pallas_call(
        partial(kernel, n=n, scale=scale),
        out_shape=[tiles.describe(*shape, projected) for shape in shapes],
        grid=(pl.cdiv(total, ROWS),),
        compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=3 if n > ROWS else 2),
        interpret=tiles.interpret(),
        name=f"{kernel.__name__}_{n}_{projected.shape[-1]}",
    )(projected.reshape(total, -1), key_bias, *more)


def _forward(projected, key_bias, out, log_sums, *, n, scale):
    """Of samples that a block holds as a whole."""
    inner, rows = key_bias.shape[0], _get_rows()
    keys, queries = _load_keys(projected, rows, key_bias), _load(projected, rows, 0, inner)
    weights, logs = _get_weights(keys, queries, rows, n, scale)
    for first in range(0, out.shape[1], CHUNK):
        values = _load(projected, rows, 2 * inner + first, CHUNK)
        _put(out, rows, first, tiles.dot(weights.astype(values.dtype), values))
    tiles.store(log_sums.at[rows], logs, rows, out.shape[0])


def _forward_by_windows(projected, key_bias, out, log_sums, *, n, scale):
    """Of a part of a sample, with a softmax from window to window (Milakov & Gimelshein 2018)."""
    inner, rows, chunks = key_bias.shape[0], _get_rows(), range(0, out.shape[1], CHUNK)
    keys, start = _load_keys(projected, rows, key_bias), _get_start(n)

    def look(step, carry):
        highest, total, ys = carry
        seen = start + step * ROWS + jnp.arange(ROWS)
        logits = tiles.dot(keys, _load(projected, seen, 0, inner).T) * (scale * LOG2_E)
        higher = jnp.maximum(highest, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(highest - higher)
        values = [_load(projected, seen, 2 * inner + first, CHUNK) for first in chunks]
        more = [tiles.dot(weights.astype(v.dtype), v) for v in values]
        ys = tuple(y * shrink[:, None] + part for y, part in zip(ys, more))
        return higher, total * shrink + jnp.sum(weights, axis=1), ys

    zeros = tuple(jnp.zeros((ROWS, CHUNK), jnp.float32) for _ in chunks)
    carry = jnp.full(ROWS, -jnp.inf), jnp.zeros(ROWS), zeros
    highest, total, ys = jax.lax.fori_loop(0, jnp.int32(n // ROWS), look, carry)
    for first, y in zip(chunks, ys):
        _put(out, rows, first, y / total[:, None])
    tiles.store(log_sums.at[rows], highest / LOG2_E + jnp.log(total), rows, out.shape[0])


def _backward(projected, key_bias, query_bias, dy, out, *, n, scale):
    inner, dtype, rows = key_bias.shape[0], dy.dtype, _get_rows()
    keys, queries = _load_keys(projected, rows, key_bias), _load(projected, rows, 0, inner)
    weights, _ = _get_weights(keys, queries, rows, n, scale)
    rounded = weights.astype(dtype).T
    d_weights = jnp.zeros((ROWS, ROWS), jnp.float32)
    for first in range(0, dy.shape[1], CHUNK):
        part = _load(dy, rows, first, CHUNK)
        d_weights += tiles.dot(part, _load(projected, rows, 2 * inner + first, CHUNK).T)
        _put(out, rows, 2 * inner + first, tiles.dot(rounded, part))
    through_sum = jnp.sum(weights * d_weights, axis=1)
    d_logits = (weights * (d_weights - through_sum[:, None]) * scale).astype(dtype)
    d_keys = tiles.dot(d_logits, queries) + _spread(_sum(d_logits), query_bias)
    _put(out, rows, inner, d_keys)
    _put(out, rows, 0, tiles.dot(d_logits.T, keys))


def _backward_by_windows(projected, key_bias, query_bias, dy, y, log_sums, out, *, n, scale):
    """The gradients of a block's keys, then those of its queries and values."""
    inner, rows, chunks = key_bias.shape[0], _get_rows(), range(0, dy.shape[1], CHUNK)
    start = _get_start(n)

    def load(rows):
        """Keys, queries, values, dy, the sums over a row of y dy; logarithms of a row's sum."""
        keys, queries = _load_keys(projected, rows, key_bias), _load(projected, rows, 0, inner)
        values = [_load(projected, rows, 2 * inner + first, CHUNK) for first in chunks]
        d_y = [_load(dy, rows, first, CHUNK) for first in chunks]
        products = [
            jnp.sum(d.astype(jnp.float32) * _load(y, rows, first, CHUNK).astype(jnp.float32), 1)
            for d, first in zip(d_y, chunks)
        ]
        products = sum(products[1:], products[0])
        return keys, queries, values, d_y, products, log_sums[rows] * LOG2_E

    def differentiate(receiving, seen):
        """Weights and the gradient of logits, rounded."""
        keys, _, _, d_y, products, log_sum = receiving
        _, queries, values, _, _, _ = seen
        logits = tiles.dot(keys, queries.T) * (scale * LOG2_E)
        weights = jnp.exp2(logits - log_sum[:, None])
        d_weights = [tiles.dot(d, v.T) for d, v in zip(d_y, values)]
        d_weights = sum(d_weights[1:], d_weights[0])
        d_logits = weights * (d_weights - products[:, None]) * scale
        return weights.astype(dy.dtype), d_logits.astype(dy.dtype)

    mine = load(rows)

    def look(step, carry):
        d_keys, sums = carry
        seen = load(start + step * ROWS + jnp.arange(ROWS))
        _, d_logits = differentiate(mine, seen)
        return d_keys + tiles.dot(d_logits, seen[1]), sums + _sum(d_logits)

    def be_seen(step, carry):
        d_queries, d_values = carry
        receiving = load(start + step * ROWS + jnp.arange(ROWS))
        weights, d_logits = differentiate(receiving, mine)
        d_values = tuple(v + tiles.dot(weights.T, d) for v, d in zip(d_values, receiving[3]))
        return d_queries + tiles.dot(d_logits.T, receiving[0]), d_values

    zeros = partial(jnp.zeros, dtype=jnp.float32)
    carry = zeros((ROWS, inner)), zeros(ROWS)
    d_keys, sums = jax.lax.fori_loop(0, jnp.int32(n // ROWS), look, carry)
    _put(out, rows, inner, d_keys + _spread(sums, query_bias))
    carry = zeros((ROWS, inner)), tuple(zeros((ROWS, CHUNK)) for _ in chunks)
    d_queries, d_values = jax.lax.fori_loop(0, jnp.int32(n // ROWS), be_seen, carry)
    _put(out, rows, 0, d_queries)
    for first, d in zip(chunks, d_values):
        _put(out, rows, 2 * inner + first, d)


def _sum(x):
    return jnp.sum(x.astype(jnp.float32), 1)


def _spread(sums, bias):
    """What a bias of all rows adds to a product, of the sums of the other factor."""
    return sums[:, None] * bias[...][None]


def _get_rows():
    """Positions of this block."""
    return pl.program_id(0) * ROWS + jnp.arange(ROWS)


def _get_start(n):
    """The first position of this block's sample."""
    return tiles.div(pl.program_id(0) * ROWS, n) * n


def _get_weights(keys, queries, rows, n, scale):
    """Of samples as a whole; and the logarithms of their sums."""
    logits = tiles.dot(keys, queries.T) * scale
    if n < ROWS:  # A block holds several samples.
        sample = tiles.div(rows, n)
        logits = jnp.where(sample[:, None] == sample[None], logits, -jnp.inf)
    highest = jnp.max(logits, axis=1)
    weights = jnp.exp(logits - highest[:, None])
    total = jnp.sum(weights, axis=1)
    return weights / total[:, None], highest + jnp.log(total)


def _load(ref, rows, first, count):
    """Some columns; a row after the last is the first one again."""
    columns = first + jnp.arange(count)
    return ref[tiles.rem(rows, ref.shape[0])[:, None], columns[None]]


def _load_keys(projected, rows, bias):
    keys = _load(projected, rows, bias.shape[0], bias.shape[0])
    return (keys.astype(jnp.float32) + bias[...][None]).astype(keys.dtype)


def _put(out, rows, first, x):
    columns = first + jnp.arange(x.shape[1])
    tiles.store(out.at[rows[:, None], columns[None]], x.astype(out.dtype), rows, out.shape[0])
