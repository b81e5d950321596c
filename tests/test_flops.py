"""Arithmetic against the formulas of the layers, the original's figure and XLA's own count."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import pytest

from ldm_jax.chips import get_peak
from ldm_jax.flops import count_flops, get_images_at_peak
from ldm_jax.unet import get_network


class Layers(nn.Module):
    """A 3x3 convolution in two groups, a product of the text, and a loop of five products."""

    @nn.compact
    def __call__(self, x_t, noise_levels, text):
        x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2)(x_t)
        w = self.param("w", nn.initializers.zeros, (7, 7))
        text, _ = jax.lax.scan(lambda t, _: (t @ w, None), text, length=5)
        merged = nn.initializers.ones(jax.random.key(0), (13, 7)) @ w  # Not of one image.
        return nn.Dense(11)(text), x, merged


def test_layers_count_as_their_formulas():
    convolution = 2 * (4 * 4 * 6) * (3 * 3 * 2)
    assert count_flops(Layers(), (8, 8, 4), (7,)) == convolution + 5 * 2 * 7 * 7 + 2 * 7 * 11


def test_the_originals_network_has_its_figure_less_its_dead_attention():
    # Over a map of p equal tokens instead of one: queries, keys, values, softmax(k q^T) v, out. Of
    # a spatial attention, values and out are one product.
    dead = 0
    for c, p in [(256, 64), (512, 16), (640, 4), (512, 16), (256, 64), (128, 256)]:
        attention = p * 288 * c / 8 + p * c * c / 8 + p * p * c / 8 + p * p * c
        dead += 3 * 2 * (attention + (p - 1) * (288 * c + c * c) + p * c * c)
    forward = count_flops(get_network(16), (16, 16, 4), (512,))
    assert abs(forward + dead - 4.61e9) < 0.005e9


@pytest.mark.parametrize("embedding_shape", [(6,), (3, 6)])
def test_xla_counts_about_as_many(embedding_shape):
    # It leaves out the padding of convolutions, little on a large map.
    network = get_network(32, 1, 6, widths=(32, 64), norm="group", text_features=32, remat=True)
    inputs = [
        jax.ShapeDtypeStruct((1, *shape), "float32") for shape in [(32, 32, 4), (), embedding_shape]
    ]
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    compiled = jax.jit(network.apply).lower(variables, *inputs).compile()
    expected = compiled.cost_analysis()["flops"]
    assert 0.9 < count_flops(network, (32, 32, 4), embedding_shape) / expected < 1.05


def test_peaks_go_by_the_names_of_devices():
    assert get_peak("NVIDIA H200") == get_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert (get_peak("TPU v5 lite"), get_peak("TPU v5p")) == (197e12, 459e12)
    assert get_peak("NVIDIA H100 PCIe") is None and get_peak("cpu") is None
    pod = [SimpleNamespace(device_kind="TPU v4")] * 4
    assert get_images_at_peak(lambda: 1e9, pod) == 4 * 275e12 / 3e9
    assert get_images_at_peak(lambda: 1e9, jax.devices()) is None
