"""A tree with many vectors => the same tree with all of them in one array, and back.

Of the default network's 474 weights 309 are vectors, which hold 0.1 % of its numbers. With them as
one array, and their moments, their averages and the batch norms' statistics likewise, a training
step takes and gives 669 arrays instead of 2 271. That is what keeps a host busy between two steps;
and each of these arrays is updated by one kernel.
"""

import itertools
import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float


@flax.struct.dataclass
class Packed:
    """A tree of arrays whose float32 vectors and scalars lie one after the other in one vector.

    To optax, averages and shardings it is a tree of fewer arrays. `unpack` gives the tree back.

    Attributes:
        arrays: all other leaves, in the tree's order.
        vector: (n), the vectors, in the tree's order.
        structure: of the tree.
        shapes: by leaf, that of a vector; None for the others.
    """

    arrays: tuple[Array, ...]
    vector: Float[Array, " n"]
    structure: Any = flax.struct.field(pytree_node=False)
    shapes: tuple[tuple[int, ...] | None, ...] = flax.struct.field(pytree_node=False)


def pack(tree: Any) -> Any:
    """A tree of arrays as `Packed`; one without two vectors to put together stays as it is."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = tuple(x.shape if _is_short(x) else None for x in leaves)
    vectors = [x.ravel() for x, shape in zip(leaves, shapes) if shape is not None]
    if len(vectors) < 2:
        return tree
    arrays = tuple(x for x, shape in zip(leaves, shapes) if shape is None)
    return Packed(arrays, jnp.concatenate(vectors), structure, shapes)


def unpack(tree: Any) -> Any:
    """The tree with each `Packed` in it as what it was made of; all other leaves are passed on."""
    return jax.tree.map(lambda x: _unpack(x) if _is_packed(x) else x, tree, is_leaf=_is_packed)


def pack_like(model: Any, tree: Any) -> Any:
    """`pack(tree)` if the model is `Packed`, else the tree."""
    return pack(tree) if _is_packed(model) else tree


def pack_state(state: Any) -> Any:
    """A TrainState with its weights, its statistics and all that is shaped like either `Packed`.

    That is averages and an optimizer's moments. The step of `training.get_train_step` takes a state
    as it comes, packed or not, and gives it back the same way and with the same numbers. What it
    does for speed is in docs/performance.md.
    """
    wanted = {jax.tree.structure(part) for part in (state.params, state.batch_stats)}
    is_part = lambda x: jax.tree.structure(x) in wanted  # noqa: E731
    return jax.tree.map(lambda x: pack(x) if is_part(x) else x, state, is_leaf=is_part)


def _is_short(x):
    return x.ndim < 2 and x.dtype == jnp.float32


def _is_packed(x):
    return isinstance(x, Packed)


def _unpack(packed):
    sizes = [math.prod(shape) for shape in packed.shapes if shape is not None]
    if isinstance(packed.vector, Tracer):
        cuts = jax.lax.split(packed.vector, sizes)
    else:  # One program of all cuts takes two CPU cores 3 s to compile, one for each size 0.1 s.
        starts = itertools.accumulate(sizes, initial=0)
        cuts = [_cut(packed.vector, start, size) for start, size in zip(starts, sizes)]
    vectors, arrays = iter(cuts), iter(packed.arrays)
    leaves = [next(arrays) if s is None else next(vectors).reshape(s) for s in packed.shapes]
    return packed.structure.unflatten(leaves)


@partial(jax.jit, static_argnums=2)
def _cut(vector, start, size):
    return jax.lax.dynamic_slice(vector, (start,), (size,))
