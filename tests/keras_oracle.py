"""The original's network a second time, literally, in Keras 3; weights => those of `ldm_jax.unet`.

Nothing is simplified: the conditioning is a map, tiled over the latents' positions, average-pooled
with each down stage and upsampled with the up stages, and cross-attention is a softmax over all
positions of that map. Only the tests import this file.
"""

import math

import keras
import numpy as np
from keras import layers, ops

TEXT_FEATURES = 256
NOISE_FEATURES = 32

# How this file names a layer => where ldm_jax.unet keeps it within a unit.
LAYERS = {
    "res_norm": ("residual", "norm"),
    "res_conv3x3a": ("residual", "conv_0"),
    "res_conv3x3b": ("residual", "conv_1"),
    "res_conv1x1": ("residual", "residual"),
    "self_norm": ("spatial", "norm_in"),
    "self_q": ("spatial", "query"),
    "self_k": ("spatial", "key"),
    "self_v": ("spatial", "value"),
    "self_o": ("spatial", "out"),
    "self_norm_o": ("spatial", "norm_out"),
    "cross_norm_cond": ("cross", "norm_cond"),
    "cross_norm_image": ("cross", "norm_image"),
    "cross_q": ("cross", "query"),
    "cross_k": ("cross", "key"),
    "cross_v": ("cross", "value"),
    "cross_o": ("cross", "out"),
    "cross_norm_o": ("cross", "norm_out"),
}
WEIGHTS = {
    "kernel": "kernel",
    "bias": "bias",
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}
DEAD_LAYERS = ("cross_q", "cross_k", "cross_norm_image")


class SinusoidalEmbedding(layers.Layer):
    """(b, 1, 1, 1) => (b, 1, 1, 32), sines then cosines."""

    def call(self, noise_levels):
        frequencies = np.exp(np.linspace(math.log(1.0), math.log(1000.0), NOISE_FEATURES // 2))
        angles = 2.0 * math.pi * noise_levels * frequencies.astype(np.float32)
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=3)


class PositionAttention(layers.Layer):
    """softmax(k q^T) v: each position of k's map looks at all positions of q's map."""

    def call(self, q, k, v):
        height, width = k.shape[1:3]
        q, k, v = (ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3])) for x in (q, k, v))
        weights = ops.softmax(ops.matmul(k, ops.transpose(q, (0, 2, 1))), axis=-1)
        return ops.reshape(ops.matmul(weights, v), (-1, height, width, v.shape[-1]))


def zeros(shape, dtype=None):
    """Initialiser of all weights, since `draw_weights` sets them: spares compiling random ones."""
    return np.zeros(shape, np.float32)


def conv(width, size, name, **options):
    options = {"padding": "same", "kernel_initializer": zeros, **options}
    return layers.Conv2D(width, size, name=name, **options)


def batch_norm(name, **options):
    return layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=name, **options)


def residual_block(x, width, name):
    residual = x
    if x.shape[-1] != width:
        residual = conv(width, 1, f"{name}.res_conv1x1")(x)
    x = batch_norm(f"{name}.res_norm", center=False, scale=False)(x)
    x = conv(width, 3, f"{name}.res_conv3x3a", activation="swish")(x)
    x = conv(width, 3, f"{name}.res_conv3x3b")(x)
    return layers.Add()([x, residual])


def spatial_attention(x, name):
    width = x.shape[-1]
    h = batch_norm(f"{name}.self_norm")(x)
    q = conv(width // 8, 1, f"{name}.self_q")(h)
    k = conv(width // 8, 1, f"{name}.self_k")(h)
    v = conv(width, 1, f"{name}.self_v")(h)
    h = conv(width, 1, f"{name}.self_o")(PositionAttention()(q, k, v))
    return batch_norm(f"{name}.self_norm_o")(h)


def cross_attention(image, cond, name):
    width = image.shape[-1]
    cond = batch_norm(f"{name}.cross_norm_cond")(cond)
    image = batch_norm(f"{name}.cross_norm_image")(image)
    q = conv(width // 8, 1, f"{name}.cross_q")(cond)
    k = conv(width // 8, 1, f"{name}.cross_k")(image)
    v = conv(width, 1, f"{name}.cross_v")(cond)
    h = conv(width, 1, f"{name}.cross_o")(PositionAttention()(q, k, v))
    return batch_norm(f"{name}.cross_norm_o")(h)


def unit(x, cond, width, name, attention=True):
    x = residual_block(x, width, name)
    if attention:
        x = layers.Add()([x, spatial_attention(x, name)])
        x = layers.Add()([x, cross_attention(x, cond, name)])
    return x


def get_literal_network(
    latent_image_size,
    block_depth=3,
    emb_size=512,
    latent_channels=4,
    widths=(128, 256, 512),
    bottleneck=640,
):
    """Keras model of [x_t (b, h, w, c), noise_levels (b, 1, 1, 1), text (b, e)] => x_0."""
    size = latent_image_size
    x_t = keras.Input((size, size, latent_channels), name="x_t")
    noise_levels = keras.Input((1, 1, 1), name="noise_levels")
    text_embeddings = keras.Input((emb_size,), name="text_embeddings")

    # The conditioning, one vector a picture, tiled over the positions.
    text = layers.Dense(TEXT_FEATURES, kernel_initializer=zeros, name="text")(text_embeddings)
    text = layers.Reshape((1, 1, TEXT_FEATURES))(text)
    cond = layers.Concatenate()([SinusoidalEmbedding()(noise_levels), text])
    cond = layers.UpSampling2D(size, interpolation="nearest")(cond)

    x = conv(widths[0], 1, "conv_in")(x_t)
    skips = []
    for stage, width in enumerate(widths):
        for i in range(block_depth):
            x = unit(x, cond, width, f"down_{stage}.unit_{i}", attention=stage > 0)
            skips.append(x)
        x = layers.AveragePooling2D(2)(x)
        cond = layers.AveragePooling2D(2)(cond)

    for i in range(block_depth):
        x = unit(x, cond, bottleneck, f"bottleneck_{i}")

    for stage, width in enumerate(reversed(widths)):
        x = layers.UpSampling2D(2, interpolation="bilinear")(x)
        for i in range(block_depth):
            x = layers.Concatenate()([x, skips.pop()])
            x = unit(x, cond, width, f"up_{stage}.unit_{i}")
        if stage < 2:
            cond = layers.UpSampling2D(2, interpolation="nearest")(cond)

    x_zero = conv(latent_channels, 1, "conv_out")(x)
    return keras.Model([x_t, noise_levels, text_embeddings], x_zero)


def draw_weights(model, seed):
    """Random values for all weights and running statistics, none of them zero or one.

    Queries and keys are drawn at half the size of the rest: the original's softmax is not scaled,
    and a saturated one magnifies rounding.
    """
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        kind, shape = weight.path.split("/")[-1], weight.shape
        value = rng.standard_normal(shape)
        if kind == "kernel":
            value = value / math.sqrt(np.prod(shape[:-1]))
            if weight.path.endswith(("_q/kernel", "_k/kernel")):
                value = value / 2
        elif kind == "gamma":
            value = 1 + 0.2 * value
        elif kind == "moving_variance":
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.2 * value
        weight.assign(value.astype(np.float32))


def get_path(weight):
    """Path of one of the literal model's weights in ldm_jax.unet's variables, without collection.

    "up_0.unit_1.cross_v/kernel" => ("up_0", "unit_1", "cross", "value", "kernel").
    """
    *layer, kind = weight.path.split("/")
    *stage, layer = layer[-1].split(".")
    return (*stage, *LAYERS.get(layer, (layer,)), WEIGHTS[kind])


def is_dead(weight):
    """Whether the weight acts through the queries and keys of cross-attention alone."""
    return weight.path.split("/")[-2].split(".")[-1] in DEAD_LAYERS


def convert(path, value):
    """A literal weight (or its gradient) in the shape in which ldm_jax.unet holds it.

    Attention's convolutions of size 1 are Dense layers there: (1, 1, c, d) => (c, d).
    """
    value = np.asarray(value)
    if value.ndim == 4 and {"spatial", "cross"} & set(path):
        return value.reshape(value.shape[2:])
    return value
