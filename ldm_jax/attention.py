"""Attention: queries, keys, values => a weighted mean of the values for each place."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ldm_jax import attention_kernels
from ldm_jax.sums import add_bias, column_sums


def attend(
    queries: Float[Array, "b n d"],
    keys: Float[Array, "b p d"],
    values: Float[Array, "b n c"],
    *,
    heads: int = 1,
    scaled: bool = False,
    mask: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b p c"]:
    """softmax(k q^T) v, the softmax over the n query positions, in float32.

    The original's roles are kept: what it calls keys are the p places that receive, what it calls
    queries the n places that are looked at. `scaled` divides by sqrt(d / heads); positions where
    `mask` is False are not looked at.
    """

    def split(x):
        return x.reshape(*x.shape[:-1], heads, -1)

    q, k, v = split(queries), split(keys), split(values)
    divisor = math.sqrt(q.shape[-1]) if scaled else 1.0
    return jnp.reshape(_attend(q, k, v, mask, divisor), (*keys.shape[:2], -1))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask, divisor) -> Array:
    """`attend` with heads apart, (b, n, heads, d); its gradient is written out.

    Derived by JAX, it keeps the logits in float32, reads them again, and hands on their gradient in
    float32. Here the weights are kept instead of the logits, and the gradient of the logits is
    rounded to the values' dtype, as the weights are. There is no forward-mode derivative.
    """
    return _attend_forward(q, k, v, mask, divisor)[0]


def _attend_forward(q, k, v, mask, divisor) -> tuple[Array, tuple]:
    logits = jnp.einsum("bphd,bnhd->bhpn", k, q, preferred_element_type=jnp.float32) / divisor
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhpn,bnhc->bphc", weights, v), (q, k, v, weights)


def _attend_backward(divisor, saved, dy):
    q, k, v, weights = saved
    d_weights = jnp.einsum("bphc,bnhc->bhpn", dy, v).astype(jnp.float32)
    through_sum = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_logits = (weights * (d_weights - through_sum) / divisor).astype(v.dtype)
    d_q = jnp.einsum("bhpn,bphd->bnhd", d_logits, k)
    d_k = jnp.einsum("bhpn,bnhd->bphd", d_logits, q)
    d_v = jnp.einsum("bhpn,bphc->bnhc", weights, dy)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_projected(
    projected: Float[Array, "b n _"],
    bias: Float[Array, " 2*i"],
    *,
    heads: int = 1,
    scaled: bool = False,
    by_kernels: bool = True,
) -> Float[Array, "b n c"]:
    """`attend` among the positions of a map; on some GPUs by kernels of our own, see `can_run`.

    Args:
        projected: queries (i channels), keys (i) and values (c) side by side.
        bias: is added to queries and keys; float32. The queries' changes no result, since all
            places that are looked at have it. Gradients are rounded, and lose digits without it.
        heads, scaled: as in `attend`.
        by_kernels: False leaves it to XLA, which alone splits arrays over devices by itself.
    """
    inner = len(bias) // 2
    if by_kernels and attention_kernels.can_run(projected, inner, heads):
        divisor = math.sqrt(inner // heads) if scaled else 1.0
        return _attend_by_kernels(projected, bias, heads, divisor)
    return _attend_by_xla(projected, bias, heads=heads, scaled=scaled)


def _attend_by_xla(projected, bias, **options):
    both, values = jnp.split(projected, [len(bias)], axis=-1)
    queries, keys = jnp.split(add_bias(both, bias), 2, axis=-1)
    return attend(queries, keys, values, **options)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend_by_kernels(projected, bias, heads, divisor) -> Array:
    """By kernels where the program is compiled for an NVIDIA GPU."""
    return _attend_by_kernels_forward(projected, bias, heads, divisor)[0]


def _attend_by_kernels_forward(projected, bias, heads, divisor) -> tuple[Array, tuple]:
    def by_xla(projected, bias):
        y = _attend_by_xla(projected, bias, heads=heads, scaled=divisor != 1.0)
        unused = jnp.zeros_like(projected, jnp.float32)[..., 0].reshape(-1)
        return y, jnp.broadcast_to(unused, (heads, len(unused)))

    def by_kernels(projected, bias):
        return attention_kernels.attend(projected, jnp.split(bias, 2)[1], divisor, heads)

    y, log_sums = jax.lax.platform_dependent(projected, bias, cuda=by_kernels, default=by_xla)
    return y, (projected, bias, y, log_sums)


def _attend_by_kernels_backward(heads, divisor, saved, dy):
    def by_kernels(projected, bias, y, log_sums, dy):
        gradient = attention_kernels.get_gradient(projected, bias, y, log_sums, dy, divisor)
        return gradient, column_sums(gradient[..., : len(bias)].astype(jnp.float32))[0]

    def by_xla(projected, bias, y, log_sums, dy):
        attend = partial(_attend_by_xla, heads=heads, scaled=divisor != 1.0)
        return jax.vjp(attend, projected, bias)[1](dy)

    return jax.lax.platform_dependent(*saved, dy, cuda=by_kernels, default=by_xla)


_attend_by_kernels.defvjp(_attend_by_kernels_forward, _attend_by_kernels_backward)
