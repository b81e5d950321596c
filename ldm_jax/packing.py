"""A tree with many vectors => the same tree with all of them in one array, and back.

Of the default network's 474 weights 309 are vectors, which hold 0.1 % of its numbers. With them as
one array, and their moments, their averages and the batch norms' statistics likewise, a train state
is 669 arrays instead of 2 271. Between two steps a host looks after each of them; at a batch of 256
that took it longer than the GPU needs for the step.
"""

import itertools
import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float


@flax.struct.dataclass
class Packed:
    """A tree of arrays, most of whose vectors and scalars lie one after the other in one vector.

    It shares all other arrays with the tree that it was made of. To optax, averages and shardings
    it is a tree of fewer arrays; `unpack` gives the tree back.

    Attributes:
        arrays: all other leaves, in the tree's order.
        vector: (n), the vectors that `pack` put together, in the tree's order.
        structure: of the tree.
        shapes: by leaf, that of a vector; None for the others.
    """

    arrays: tuple[Array, ...]
    vector: Float[Array, " n"]
    structure: Any = flax.struct.field(pytree_node=False)
    shapes: tuple[tuple[int, ...] | None, ...] = flax.struct.field(pytree_node=False)


def pack(tree: Any, model: Any = None) -> Any:
    """A tree of arrays as `Packed`; one with fewer than two vectors stays as it is.

    Args:
        tree: of arrays.
        model: a tree of the same shapes, whose float32 vectors and scalars say which leaves are put
            together, whatever their dtype in `tree`; None for the tree itself.

    Raises:
        ValueError: if these leaves have several dtypes.
    """
    leaves, structure = jax.tree.flatten(tree)
    models = leaves if model is None else structure.flatten_up_to(model)
    shapes = tuple(x.shape if _is_vector(x) else None for x in models)
    vectors = [x.ravel() for x, shape in zip(leaves, shapes, strict=True) if shape is not None]
    if len(vectors) < 2:
        return tree
    dtypes = {str(x.dtype) for x in vectors}
    if len(dtypes) > 1:
        raise ValueError(f"vectors to be packed must have one dtype, got {sorted(dtypes)}")
    arrays = tuple(x for x, shape in zip(leaves, shapes, strict=True) if shape is None)
    return Packed(arrays, jnp.concatenate(vectors), structure, shapes)


def pack_like(model: Any, tree: Any) -> Any:
    """`pack(tree)` if the model is `Packed`, else the tree."""
    return pack(tree) if _is_packed(model) else tree


def pack_state(state: Any) -> Any:
    """A TrainState with its weights, its statistics and all that is shaped like either `Packed`.

    That is averages and an optimizer's moments. The step of `training.get_train_step` takes a state
    as it comes, packed or not, and gives it back the same way. Its numbers are the same but for the
    order in which the gradient's norm is added up, if the optimizer treats each number alike, or by
    the norm of all, as those of `training.get_optimizer` do. One that looks at each array by
    itself, such as LAMB, would take all vectors for one; one that holds moments of some weights
    alone (`optax.masked`) does not fit a packed tree. Figures are in docs/performance-log.md.

    Raises:
        ValueError: for moments in the structure of the weights, but in other shapes (Adafactor), or
            of several dtypes.
    """
    models = [tree for tree in (state.params, state.batch_stats) if _count_vectors(tree) > 1]

    def find_models(tree):
        structure = jax.tree.structure(tree)
        return [model for model in models if jax.tree.structure(model) == structure]

    def pack_part(tree):
        found = find_models(tree)
        if not found:
            return tree
        shapes = [x.shape for x in jax.tree.leaves(tree)]
        for model in found:
            wanted = [x.shape for x in jax.tree.leaves(model)]
            if wanted == shapes:
                return pack(tree, model)
        need, came = next((a, b) for a, b in zip(wanted, shapes) if a != b)
        raise ValueError(
            "pack_state requires an optimizer whose moments have the shapes of the weights, got "
            f"{came} where {need} was needed"
        )

    return jax.tree.map(pack_part, state, is_leaf=lambda x: bool(find_models(x)))


def unpack(tree: Any) -> Any:
    """The tree with each `Packed` in it as what it was made of; all other leaves are passed on.

    Of arrays, of numpy's, which stay numpy's, or of ShapeDtypeStructs, whose shardings are kept.
    """
    return jax.tree.map(lambda x: _unpack(x) if _is_packed(x) else x, tree, is_leaf=_is_packed)


def _unpack(packed):
    vectors = iter(_split(packed.vector, [shape for shape in packed.shapes if shape is not None]))
    arrays = iter(packed.arrays)
    leaves = [next(arrays) if shape is None else next(vectors) for shape in packed.shapes]
    return packed.structure.unflatten(leaves)


def _split(vector, shapes):
    """Arrays of these shapes, which follow one another in the vector."""
    if isinstance(vector, jax.ShapeDtypeStruct):
        dtype, place = vector.dtype, vector.sharding
        return [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    ends = list(itertools.accumulate(sizes))
    if isinstance(vector, np.ndarray):
        parts = np.split(vector, ends[:-1])
    elif isinstance(vector, Tracer):
        parts = jax.lax.split(vector, sizes)
    else:  # 309 slices in one program compile for 3 s on two CPU cores, a program a size for 0.2 s.
        parts = [_slice(vector, end - size, size) for end, size in zip(ends, sizes)]
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


@partial(jax.jit, static_argnums=2)
def _slice(vector, start, size):
    return jax.lax.dynamic_slice(vector, (start,), (size,))


def _count_vectors(tree):
    return sum(map(_is_vector, jax.tree.leaves(tree)))


def _is_vector(x):
    return x.ndim < 2 and x.dtype == jnp.float32


def _is_packed(x):
    return isinstance(x, Packed)
