"""A network => its arithmetic for one image, and how many images a second the devices' peak is."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ldm_jax.chips import get_peak

STEP = 3  # Of a forward pass: itself, and twice as much for the gradients of weights and inputs.


def count_flops(
    network: Any, latent_shape: tuple[int, ...], embedding_shape: tuple[int, ...]
) -> float:
    """FLOPs of the forward pass for one image: products and convolutions alone.

    A multiply-add counts as two. Convolutions count as if their padding were data. What a compiler
    makes of them does not matter, nor do products of weights with weights, once for all images. Of
    a kernel in Pallas, what stands in for it on other devices counts.

    Args:
        network: called with (x_t, noise_levels, text_embeddings).
        latent_shape: (h, w, c).
        embedding_shape: (e,) or (n, e).
    """

    def count(images):
        shapes = (images, *latent_shape), (images,), (images, *embedding_shape)
        inputs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
        variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
        return _count(jax.make_jaxpr(network.apply)(variables, *inputs).jaxpr)

    return count(2) - count(1)


def get_images_at_peak(count_forward: Callable[[], float], devices: Sequence[Any]) -> float | None:
    """Images a second that a training step would take if the devices did nothing but multiply.

    Args:
        count_forward: gives the FLOPs of `count_flops`; a step has STEP times as many. Counting
            takes a second, and is asked for where the peak is known alone.
        devices: of one kind.

    Returns:
        The images of all devices; None where the kind's peak is not known.
    """
    peak = get_peak(devices[0].device_kind)
    return None if peak is None else len(devices) * peak / (STEP * count_forward())


def _count(jaxpr: Any) -> float:
    """FLOPs of a program and of the programs in it: a loop's as often as it runs, of branches the
    largest.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [_count(program) for value in params.values() for program in _programs(value)]
        shapes = [var.aval.shape for var in (*equation.invars, *equation.outvars)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in contracted)
        elif name == "conv_general_dilated":
            out_features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[1]) / out_features
        elif name == "cond":
            total += max(inner)
        elif name == "pallas_call":
            pass
        else:
            total += sum(inner) * params.get("length", 1)
    return total


def _programs(value: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = value if isinstance(value, tuple | list) else [value]
    return [p for p in (getattr(v, "jaxpr", v) for v in values) if hasattr(p, "eqns")]
