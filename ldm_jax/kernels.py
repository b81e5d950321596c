"""Kernels for an NVIDIA GPU, in Pallas: a folded network's convolutions and attention.

cuDNN leaves a convolution's map in memory, from where XLA reads it again for bias, swish and
residual; and the maps of few pictures are too small to keep it busy. Here a convolution adds up
several maps' and ends with all of that, and of small maps it is split among more blocks of threads.
Attention is one kernel, and no logits leave the chip. `ldm_jax.estimating` does the same by XLA for
every other device; docs/performance.md has what the kernels gain.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ldm_jax import tiles

TAPS = 9  # Places of a 3 x 3 kernel.
ROWS = 16  # And columns and channels that a product of Triton's has at least.
SMS = 132  # Streaming multiprocessors (SMs) of an H100 or H200.
BLOCKS = 96  # Of threads, enough to keep these busy.
WINDOW = 256  # Positions that attention looks at, at once,
WINDOW_CHANNELS = 144  # for as many channels of queries and values; for more, half of them.


def can_run(network: Any) -> bool:
    """Whether these kernels can run a folded `network` on this process's GPUs.

    They are tuned and measured on an H200 with the network of configs/seed.py in bfloat16, and left
    out for what is far from it: widths that 128 does not divide, latents larger than 16 x 16,
    bottlenecks smaller than 2 x 2, wide keys, and see `tiles.are_possible`. Over arrays that are
    split without shard_map XLA gathers.
    """
    size, widths = network.latent_image_size, network.widths
    fits = size == _power_of_two(size) <= 16 and size >> (len(widths) - 1) >= 2
    fits &= all(width % 128 == 0 for width in widths)
    fits &= network.key_fraction >= 8 and max(widths) // network.key_fraction <= 128
    return fits and network.dtype == jnp.bfloat16 and tiles.are_possible()


def pad_keys(inner: int) -> int:
    """How many channels `attend` wants queries and keys to have, zeros after the first `inner`."""
    return max(16, 1 << (inner - 1).bit_length())


def convolve(
    maps: Sequence[Float[Array, "_ h w _"]],
    kernels: Sequence[Array],
    bias: Float[Array, "*_ d"],
    *,
    residual: Float[Array, "b h w d"] | None = None,
    swish: bool = False,
) -> Float[Array, "b h w d"]:
    """f(all maps' convolutions, bias and residual added up), in float32, then in the maps' dtype.

    Args:
        maps: each with channels of its own. One with fewer samples, whose number divides the
            largest, is repeated as a whole: 0, 1, 0, 1.
        kernels: for each map (3, 3, c, d), with zeros around the map, or (c, d), of size 1.
        bias: for each channel, or (h, w, d); float32.
        residual: is added.
        swish: f is x sigmoid(x), and the identity otherwise.

    Raises:
        ValueError: for numbers of samples that do not divide the largest, or of channels that 16
            does not divide.
    """
    numbers = [len(x) for x in maps]
    if any(max(numbers) % number for number in numbers):
        raise ValueError(f"numbers of samples must divide the largest, got {numbers}")
    _, height, width, _ = maps[0].shape
    samples, channels, dtype = max(numbers), kernels[0].shape[-1], maps[0].dtype
    widths = [x.shape[-1] for x in maps] + [channels]
    if any(width % ROWS for width in widths):
        raise ValueError(f"numbers of channels must be divisible by {ROWS}, got {widths}")
    rows = samples * height * width
    tile, taps = _choose_tile(rows, channels, len(maps))
    maps = [x.reshape(-1, x.shape[-1]) for x in maps]
    kernels = [kernel.reshape(-1, channels) for kernel in kernels]
    ends = [bias.reshape(-1, channels)]
    ends += [] if residual is None else [residual.reshape(rows, channels)]
    grid = tile.count(rows, channels)
    options = {
        "compiler_params": tiles.triton.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages
        ),
        "interpret": tiles.interpret(),
        "name": f"convolve_{rows}_{channels}",
    }
    if taps == TAPS:
        y = pl.pallas_call(
            partial(_convolve, count=len(maps), size=(height, width), tile=tile, swish=swish),
            out_shape=tiles.describe((rows, channels), dtype, *maps, *kernels, *ends),
            grid=grid,
            **options,
        )(*maps, *kernels, *ends)
    else:
        parts = [max(len(k) // x.shape[1] // taps, 1) for x, k in zip(maps, kernels)]
        sums = pl.pallas_call(
            partial(_convolve_part, count=len(maps), size=(height, width), tile=tile, parts=parts),
            out_shape=tiles.describe((sum(parts), rows, channels), jnp.float32, *maps, *kernels),
            grid=(*grid, sum(parts)),
            **options,
        )(*maps, *kernels)
        y = _end(sums.sum(0).reshape(samples, -1, channels), ends[0][None], *ends[1:], swish=swish)
    return y.astype(dtype).reshape(samples, height, width, channels)


class _Tile(NamedTuple):
    """What a block of threads works out: rows x columns, by products of this depth."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3

    def count(self, rows: int, channels: int) -> tuple[int, int]:
        """How many tiles a map has."""
        return pl.cdiv(rows, self.rows), channels // self.columns


def _choose_tile(rows: int, channels: int, maps: int) -> tuple[_Tile, int]:
    """The largest tile of which there are enough, and how many of a kernel's taps a block adds up.

    As was fastest on an H200. With no more blocks than SMs each has one to itself, and more under
    way. Where maps are too small for any tile, blocks share the taps: three each, if that makes
    half of enough blocks.
    """
    columns = min(128, _power_of_two(channels))
    small = _Tile(64 if rows > 32 else 32, min(64, columns), 128)
    for tile in (
        _Tile(128, columns, 64, warps=8, stages=4),
        _Tile(64, columns, 128, stages=4) if maps == 1 else _Tile(64, columns, 64, stages=5),
        small,
    ):
        count = math.prod(tile.count(rows, channels))
        if count > SMS:  # They share SMs, and their memory.
            return _Tile(tile.rows, tile.columns, 64), TAPS
        if count >= BLOCKS:
            return tile, TAPS
    three_each = 3 * math.prod(small.count(rows, channels))
    return small, 3 if three_each >= BLOCKS // 2 else 1


def _convolve(*refs, count, size, tile, swish):
    """A tile of `convolve`, whole."""
    maps, kernels, ends, out = refs[:count], refs[count : 2 * count], refs[2 * count : -1], refs[-1]
    place = _Place(size, tile, out.shape[0])
    sums = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    for x, kernel in zip(maps, kernels):
        sums = place.add(sums, x, kernel, 0, place.count_steps(x, kernel))
    loaded = [place.load(x, tiles.rem(place.rows, x.shape[0])) for x in ends]
    place.store(out, _end(sums, *loaded, swish=swish))


def _convolve_part(*refs, count, size, tile, parts):
    """A tile of one of the sums that `convolve` adds up: some taps of one of the maps."""
    maps, kernels, out = refs[:count], refs[count : 2 * count], refs[-1]
    place, part, first = _Place(size, tile, out.shape[1]), pl.program_id(2), 0
    sums = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    for x, kernel, mine in zip(maps, kernels, parts):
        steps = place.count_steps(x, kernel) // mine
        here = (part >= first) & (part < first + mine)
        # A loop with no steps where the part is another map's. Triton takes plain numbers for bits.
        todo = steps if len(parts) == 1 else jnp.where(here, jnp.int32(steps), jnp.int32(0))
        sums = place.add(sums, x, kernel, (part - first) * steps, todo)
        first += mine
    place.store(out, sums, part)


def _end(sums, bias, residual=None, *, swish):
    sums = sums + bias
    if residual is not None:
        sums = sums + residual.reshape(sums.shape).astype(jnp.float32)
    return sums * jax.nn.sigmoid(sums) if swish else sums


class _Place:
    """Where a block of threads of `convolve` works: `rows`, positions of maps, and `columns`."""

    def __init__(self, size, tile, total):
        height, width = size
        self.size, self.tile, self.total = size, tile, total
        self.column = pl.program_id(1) * tile.columns
        self.columns = self.column + jnp.arange(tile.columns)
        self.rows = pl.program_id(0) * tile.rows + jnp.arange(tile.rows)
        place = tiles.rem(self.rows, height * width)
        self.y, self.x = tiles.div(place, width), tiles.rem(place, width)

    def count_steps(self, x, kernel):
        """Of the loop over a kernel's rows."""
        return kernel.shape[0] // self._depth(x)

    def add(self, sums, x, kernel, first, count):
        """sums + the products of `count` steps from the step `first` on."""
        (height, width), depth = self.size, self._depth(x)
        chunks, near = x.shape[1] // depth, tiles.rem(self.rows, x.shape[0])

        def step(k, sums):
            k += first
            columns = tiles.rem(k, chunks) * depth + jnp.arange(depth)
            if kernel.shape[0] == x.shape[1]:
                block = x[near[:, None], columns[None]]
            else:
                tap = tiles.div(k, chunks)
                i, j = tiles.div(tap, 3) - 1, tiles.rem(tap, 3) - 1
                down, right = self.y + i, self.x + j
                inside = (down >= 0) & (down < height) & (right >= 0) & (right < width)
                mask = jnp.broadcast_to(inside[:, None], (len(inside), depth))
                at = x.at[(near + i * width + j)[:, None], columns[None]]
                block = tiles.triton.load(at, mask=mask, other=0)
            row = pl.multiple_of(k * depth, depth)
            weights = kernel[pl.ds(row, depth), pl.ds(self.column, self.tile.columns)]
            return sums + tiles.dot(block, weights)

        return jax.lax.fori_loop(0, count, step, sums)

    def load(self, x, rows):
        """The columns of this place, of some rows."""
        return x[rows[:, None], self.columns[None]].astype(jnp.float32)

    def store(self, out, y, *part):
        at = out.at[*part, self.rows[:, None], self.columns[None]]
        tiles.store(at, y.astype(out.dtype), self.rows, self.total)

    def _depth(self, x):
        return min(self.tile.depth, _power_of_two(x.shape[1]))


def attend(
    projected: Float[Array, "b n _"],
    key_bias: Float[Array, " i"],
    x: Float[Array, "b n c"],
    vectors: Float[Array, "b c"] | None = None,
) -> Float[Array, "b n c"]:
    """x + softmax((k + key_bias) q^T) v + vectors, the softmax over all n places of q, in float32.

    Args:
        projected: queries (i channels), keys (i) and values (c) side by side. A power of two of
            places, and `pad_keys` channels of queries and keys.
        key_bias: float32.
        x: what is added to.
        vectors: added to all places of a sample; float32.

    Raises:
        ValueError: for other numbers of places, of queries' and keys' channels, or for values'
            channels that 16 does not divide.
    """
    (b, n, c), inner = x.shape, len(key_bias)
    if n != _power_of_two(n):
        raise ValueError(f"the number of places must be a power of two, got {n}")
    if inner != (wanted := pad_keys(inner)):
        raise ValueError(f"queries and keys must have {wanted} channels each, got {inner}")
    if c % ROWS:
        raise ValueError(f"values must have a multiple of {ROWS} channels, got {c}")
    total, group = b * n, max(n, ROWS)
    places, columns = min(group, 128), min(128, _power_of_two(c))
    if pl.cdiv(total, places) * (c // columns) < BLOCKS:
        places, columns = ROWS, min(32, columns)
    wide = inner + columns > WINDOW_CHANNELS
    window = min(group, WINDOW // 2 if wide else WINDOW)
    added = [x.reshape(total, c)] + ([] if vectors is None else [vectors])
    y = pl.pallas_call(
        partial(_attend, n=n, group=group, window=window, places=places, columns=columns),
        out_shape=tiles.describe((total, c), x.dtype, projected, key_bias, *added),
        grid=(pl.cdiv(total, group), group // places, c // columns),
        compiler_params=tiles.triton.CompilerParams(
            num_warps=8 if places == 128 else 4, num_stages=2
        ),
        interpret=tiles.interpret(),
        name=f"attend_{total}_{c}",
    )(projected.reshape(total, -1), key_bias, *added)
    return y.reshape(b, n, c)


def _attend(projected, key_bias, *refs, n, group, window, places, columns):
    """A tile of `attend`, with a softmax from window to window (Milakov & Gimelshein 2018).

    The logits stay on the chip, as in FlashAttention (Dao et al. 2022).
    """
    x, vectors, out = refs[0], refs[1:-1], refs[-1]
    total, inner = out.shape[0], key_bias.shape[0]
    first = pl.program_id(0) * group
    rows = first + pl.program_id(1) * places + jnp.arange(places)
    channels = pl.program_id(2) * columns + jnp.arange(columns)

    def load(ref, rows, columns):  # A place after the last is the first one again.
        return ref[tiles.rem(rows, ref.shape[0])[:, None], columns[None]]

    keys = load(projected, rows, inner + jnp.arange(inner))
    keys = (keys.astype(jnp.float32) + key_bias[...][None]).astype(keys.dtype)

    def look(step, carry):
        highest, weight, y = carry
        others = first + step * window + jnp.arange(window)
        queries = load(projected, others, jnp.arange(inner))
        logits = tiles.dot(keys, queries.T)
        if n < group:  # A group holds several samples.
            same = tiles.div(rows, n)[:, None] == tiles.div(others, n)[None]
            logits = jnp.where(same, logits, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp(logits - higher[:, None]), jnp.exp(highest - higher)
        values = load(projected, others, 2 * inner + channels)
        y = y * shrink[:, None] + tiles.dot(weights.astype(values.dtype), values)
        return higher, weight * shrink + jnp.sum(weights, axis=1), y

    start = jnp.full(places, -jnp.inf), jnp.zeros(places), jnp.zeros((places, columns))
    _, weight, y = jax.lax.fori_loop(0, group // window, look, start)
    y = y / weight[:, None] + load(x, rows, channels).astype(jnp.float32)
    for ref in vectors:
        y += load(ref, tiles.div(rows, n), channels)
    tiles.store(out.at[rows[:, None], channels[None]], y.astype(out.dtype), rows, total)


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """As `ldm_jax.blocks.upsample`; XLA's kernel, by itself, takes twice as long.

    Raises:
        ValueError: for numbers of positions that 4 does not divide.
    """
    b, height, width, channels = x.shape
    rows, columns = 16, min(128, _power_of_two(channels))
    total = 4 * b * height * width
    if total % rows:
        raise ValueError(f"all positions, b h w, must be divisible by 4, got {b * height * width}")
    y = pl.pallas_call(
        partial(_upsample, size=(height, width), rows=rows, columns=columns),
        out_shape=tiles.describe((total, channels), x.dtype, x),
        grid=(total // rows, channels // columns),
        compiler_params=tiles.triton.CompilerParams(num_warps=4),
        interpret=tiles.interpret(),
        name=f"upsample_{total}_{channels}",
    )(x.reshape(-1, channels))
    return y.reshape(b, 2 * height, 2 * width, channels)


def _upsample(x, out, *, size, rows, columns):
    """Some rows of `upsample`."""
    height, width = size
    places = pl.program_id(0) * rows + jnp.arange(rows)
    channels = pl.program_id(1) * columns + jnp.arange(columns)
    samples, place = tiles.div(places, 4 * height * width), tiles.rem(places, 4 * height * width)
    near, far = zip(
        *map(_neighbours, (tiles.div(place, 2 * width), tiles.rem(place, 2 * width)), size)
    )

    def load(i, j):
        row = (samples * height + i) * width + j
        return x[row[:, None], channels[None]].astype(jnp.float32)

    above = 0.75 * load(near[0], near[1]) + 0.25 * load(near[0], far[1])
    below = 0.75 * load(far[0], near[1]) + 0.25 * load(far[0], far[1])
    out[places[:, None], channels[None]] = (0.75 * above + 0.25 * below).astype(out.dtype)


def _neighbours(place, size):
    """Of a place in a line twice as long: the place that it lies in, and the next one."""
    near = tiles.div(place, 2)
    return near, jnp.clip(near + 2 * tiles.rem(place, 2) - 1, 0, size - 1)


def _power_of_two(number: int) -> int:
    """The largest that divides it."""
    return number & -number
