"""A bfloat16 map times a float32 matrix => their product in float32, by bfloat16 parts.

What multiplies matrices cuts float32 numbers down to 11 bits (TF32) or 8 (a TPU's single pass), and
wants both factors in float32 to begin with: a copy of the map. A sum of two bfloat16 numbers has 16
bits, and is multiplied as both side by side, at the map's own width. (In sampling it gains nothing:
there the copy is small.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from ldm_jax.normed import round_to


def matmul(x: Float[Array, "*n c"], kernel: Float[Array, "c d"]) -> Float[Array, "*n d"]:
    """x kernel in float32. A bfloat16 x meets both parts of the kernel, its gradient both parts of
    that of the product; a float32 x is multiplied as JAX does.
    """
    return _by_parts(x, kernel) if x.dtype == jnp.bfloat16 else x @ kernel


@jax.custom_vjp
def _by_parts(x, kernel):
    return _add(jnp.matmul(x, split(kernel), preferred_element_type=jnp.float32))


def _forward(x, kernel) -> tuple[Array, Any]:
    return _by_parts(x, kernel), (x, kernel)


def _backward(saved, dy):
    x, kernel = saved
    high, low = jnp.split(split(kernel), 2, axis=-1)
    both = split(dy)
    # All four products of a part and a part at once.
    d_x = jnp.concatenate([both, both], -1) @ jnp.concatenate([high, high, low, low], -1).T
    rows, columns = x.reshape(-1, x.shape[-1]), both.reshape(-1, both.shape[-1])
    d_kernel = jnp.matmul(rows.T, columns, preferred_element_type=jnp.float32)
    return d_x, _add(d_kernel)


_by_parts.defvjp(_forward, _backward)


def split(x: Float[Array, "*n d"]) -> BFloat16[Array, "*n 2*d"]:
    """x as a sum of two, side by side: x rounded, and what that leaves, rounded."""
    high = round_to(x, jnp.bfloat16)
    return jnp.concatenate([high, x - high], axis=-1).astype(jnp.bfloat16)


def _add(products):
    """Those of both parts, side by side, added up."""
    high, low = jnp.split(products, 2, axis=-1)
    return high + low
