"""The network: sizes, conditioning, norms, dtypes, refusals; its values are in test_oracle.py."""

import zlib
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ldm_jax.unet import CONDITIONINGS, get_network

SMALL = {"latent_image_size": 8, "block_depth": 1, "emb_size": 12, "widths": (16, 32)}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Case:
    """A small network, its weights random and its statistics a batch's, and four inputs."""

    def __init__(self, norm, text_shape=(12,), **fields):
        self.network = get_network(**SMALL, norm=norm, **fields)
        self.inputs = {
            "x_t": draw(4, 8, 8, 4),
            "noise_levels": np.array([0.1, 0.3, 0.6, 0.8], np.float32),
            "text": draw(4, *text_shape, seed=1),
        }
        inputs = self.inputs.values()
        self.shapes = jax.eval_shape(self.network.init, jax.random.key(0), *inputs)
        self.params = self.draw_params(self.shapes["params"])
        self.apply = jax.jit(self.network.apply)
        self.train = jax.jit(partial(self.network.apply, train=True, mutable=["batch_stats"]))
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes)
        self.variables = {"params": self.params}
        if norm == "batch":
            self.variables["batch_stats"] = zeros["batch_stats"]
            _, updates = self.train(self.variables, *inputs)
            statistics = jax.tree.map(lambda x: x / 0.01, updates["batch_stats"])
            self.variables["batch_stats"] = statistics

    def draw_params(self, shapes):
        return jax.tree_util.tree_map_with_path(self.draw_leaf, shapes)

    def draw_leaf(self, path, x):
        rng = np.random.default_rng(zlib.crc32(str(path).encode()))
        value = rng.standard_normal(x.shape) / max(1, np.sqrt(np.prod(x.shape[:-1])))
        return np.float32(1 + 0.2 * value if path[-1].key == "scale" else value)

    def __call__(self, train=False, **inputs):
        inputs = (self.inputs | inputs).values()
        if train:
            return np.asarray(self.train(self.variables, *inputs)[0])
        return np.asarray(self.apply(self.variables, *inputs))


get_case = cache(Case)
get_token_case = partial(get_case, text_shape=(3, 12), heads=2, scaled=True, key_fraction=4)


CHOICES = [("batch", "token"), ("group", "token"), ("batch", "adaptive"), ("rms", "adaptive")]


@pytest.fixture(params=CHOICES, ids=" ".join)
def case(request):
    norm, conditioning = request.param
    return get_case(norm, conditioning=conditioning)


@pytest.fixture(params=CHOICES, ids=" ".join)
def token_case(request):
    norm, conditioning = request.param
    return get_token_case(norm, conditioning=conditioning)


def test_the_default_network_has_the_originals_weights_less_the_dead_ones():
    network = get_network(16)
    inputs = jnp.zeros((1, 16, 16, 4)), jnp.zeros(1), jnp.zeros((1, 512))
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    sizes = {path: x.size for path, x in flatten_dict(variables["params"]).items()}
    # Of each cross-attention on c channels: q from 288 and k from c to c/8, a norm of c.
    dead = sum(289 * c // 8 + (c + 1) * c // 8 + 2 * c for c in (256, 512, 640, 512, 256, 128))
    assert sum(sizes.values()) == 83_821_700 - 3 * dead == 83_151_812
    outside = {path[0] for path in sizes if path[0].startswith(("conv", "text"))}
    assert outside == {"conv_in", "conv_out", "text"}
    assert not any("spatial" in path or "cross" in path for path in sizes if path[0] == "down_0")
    cross = {path[:2] for path in sizes if "cross" in path}
    assert len(cross) == 3 * 5 + 3  # Three units in two down and three up stages; bottleneck.


def test_each_input_changes_the_estimate(case):
    x_zero = case()
    assert x_zero.shape == (4, 8, 8, 4) and np.std(x_zero) > 0.1
    for name, value in case.inputs.items():
        assert np.abs(case(**{name: 0.9 * value}) - x_zero).max() > 1e-2, name


def test_jit_changes_nothing():
    case = get_case("batch")
    expected = case.network.apply(case.variables, *case.inputs.values())
    np.testing.assert_allclose(case(), expected, atol=1e-4)


def test_a_vector_of_text_is_a_sequence_of_one(case):
    np.testing.assert_allclose(case(text=case.inputs["text"][:, None]), case(), atol=1e-6)


def test_in_use_pictures_do_not_interact(case):
    x_t = draw(4, 8, 8, 4, seed=9)
    x_t[0] = case.inputs["x_t"][0]
    np.testing.assert_allclose(case(x_t=x_t)[0], case()[0], atol=1e-5)


@pytest.mark.parametrize("norm, interact", [("batch", True), ("group", False), ("rms", False)])
def test_in_training_pictures_interact_through_batch_norm_alone(norm, interact):
    case = get_case(norm)
    x_t = draw(4, 8, 8, 4, seed=9)
    x_t[0] = case.inputs["x_t"][0]
    change = np.abs(case(x_t=x_t, train=True)[0] - case(train=True)[0]).max()
    assert change > 1e-2 if interact else change < 1e-5
    assert ("batch_stats" in case.shapes) == interact


@pytest.mark.parametrize("train", [False, True])
def test_padding_changes_nothing(token_case, train):
    text = token_case.inputs["text"]
    padded = np.concatenate([text, np.zeros((4, 2, 12), np.float32)], axis=1)
    x_zero = token_case(text=padded, train=train)
    np.testing.assert_allclose(x_zero, token_case(train=train), atol=1e-4)


def test_every_token_counts_and_their_order_does_not(token_case):
    x_zero, text = token_case(), token_case.inputs["text"]
    for i in range(3):
        other = text.copy()
        other[0, i] *= 0.5
        change = np.abs(token_case(text=other) - x_zero).max((1, 2, 3))
        assert change[0] > 1e-3 and change[1:].max() < 1e-5
    np.testing.assert_allclose(token_case(text=text[:, ::-1]), x_zero, atol=1e-4)


def test_no_text_is_zeros_whatever_the_length_of_the_sequence(token_case):
    none = token_case(text=np.zeros((4, 3, 12), np.float32))
    assert np.abs(none - token_case()).max() > 1e-2
    for shape in [(4, 5, 12), (4, 12)]:
        other = token_case(text=np.zeros(shape, np.float32))
        np.testing.assert_allclose(other, none, atol=1e-4)


@pytest.mark.parametrize("norm, conditioning", [("group", "token"), ("rms", "adaptive")])
def test_with_tokens_all_weights_get_a_gradient(norm, conditioning):
    case = get_token_case(norm, conditioning=conditioning)

    @jax.jit
    @jax.grad
    def get_gradient(params):
        return jnp.mean(case.network.apply({"params": params}, *case.inputs.values()) ** 2)

    gradients = flatten_dict(get_gradient(case.params))
    largest = {path: np.abs(gradient).max() for path, gradient in gradients.items()}
    assert {path for path, size in largest.items() if size < 1e-6} == {
        # A bias shared by all that a softmax looks at shifts its logits alike.
        path
        for path in largest
        if path[-2:] == ("query", "bias")
    }


@pytest.mark.parametrize(
    "norm, train, fields",
    [("batch", True, {}), ("group", False, {}), ("rms", True, {"conditioning": "adaptive"})],
)
def test_bfloat16_is_close_to_float32(norm, train, fields):
    case, half = get_case(norm, **fields), get_case(norm, **fields, dtype="bfloat16")
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half.shapes))
    expected, x_zero = case(train=train), half(train=train)
    assert x_zero.dtype == np.float32
    assert 0 < np.linalg.norm(x_zero - expected) / np.linalg.norm(expected) < 0.03


def test_adaptive_conditioning_adds_weights_and_changes_no_other():
    token, adaptive = (get_case("rms", conditioning=name).params for name in CONDITIONINGS)
    token, adaptive = (set(flatten_dict(params)) for params in (token, adaptive))
    added = {path[-2] for path in adaptive - token}
    assert token < adaptive and added == {"film", "embedding_0", "embedding_1"}


def test_networks_of_equal_fields_are_equal():
    assert get_network(**SMALL, dtype="float32") == get_network(**SMALL, dtype=jnp.float32)
    assert hash(get_network(**SMALL)) == hash(get_network(**SMALL | {"widths": [16, 32]}))
    assert get_network(**SMALL) != get_network(**SMALL, scaled=True)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"latent_image_size": 20}, r"latent_image_size must be divisible by 8 \(3.*got 20"),
        ({"latent_image_size": 0}, "latent_image_size must be divisible by 8 .*got 0"),
        ({"block_depth": 0}, "block_depth must be at least 1, got 0"),
        ({"norm": "layer"}, "norm must be one of .*got 'layer'"),
        ({"conditioning": "film"}, "conditioning must be one of .*got 'film'"),
        ({"widths": (16,)}, r"widths must name a resolution and the bottleneck, got \(16,\)"),
        ({"widths": (16, 0, 16, 16)}, "widths must name"),
        ({"widths": (16, 24, 32, 40), "norm": "group"}, "divisible by 16, got"),
        ({"text_features": 100, "norm": "group"}, "divisible by 16, got"),
        ({"heads": 3}, "divisible by key_fraction . heads = 24, got"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got float16"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        get_network(**{"latent_image_size": 16, **fields})


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"x_t": draw(4, 16, 16, 4)}, r"x_t must have shape \(b, 8, 8, 4\), got \(4, 16, 16, 4\)"),
        ({"x_t": draw(4, 8, 8, 3)}, r"x_t must have shape \(b, 8, 8, 4\), got \(4, 8, 8, 3\)"),
        ({"x_t": draw(8, 8, 4)}, r"x_t must have shape .* got \(8, 8, 4\)"),
        ({"x_t": np.zeros((4, 8, 8, 4), np.int32)}, "floating-point numbers, got int32"),
        ({"noise_levels": np.float32(0.5)}, r"noise_levels must have shape \(4,\), got \(\)"),
        ({"noise_levels": draw(3)}, r"noise_levels must have shape \(4,\), got \(3,\)"),
        ({"text": draw(4, 13)}, r"text_embeddings must have shape \(4, 12\).*got \(4, 13\)"),
        ({"text": draw(3, 12)}, r"text_embeddings must have shape .* got \(3, 12\)"),
        ({"text": draw(4, 2, 2, 12)}, r"text_embeddings must have shape .* got \(4, 2, 2, 12\)"),
    ],
)
def test_inputs_of_another_shape_or_dtype_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        case = get_case("batch")
        case.network.apply(case.variables, *(case.inputs | inputs).values())


@pytest.mark.parametrize(
    "norm, conditioning, text_shape",
    [("batch", "token", (12,)), ("group", "token", (3, 12)), ("rms", "adaptive", (3, 12))],
)
def test_remat_changes_neither_names_nor_values(norm, conditioning, text_shape):
    fields = {"norm": norm, "conditioning": conditioning, "heads": 2, "dropout": 0.2}
    fields |= SMALL | {"text_features": 32}
    case = get_case("batch")
    inputs = *list(case.inputs.values())[:2], draw(4, *text_shape, seed=1)

    def derive(network):
        variables = jax.jit(network.init)(jax.random.key(0), *inputs)
        params = case.draw_params(variables["params"])

        def loss(params):
            x_zero, updates = network.apply(
                {**variables, "params": params},
                *inputs,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
            return jnp.mean(jnp.square(x_zero)), updates

        found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return found, str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params)).count("remat")

    (expected, without), (found, units) = (
        derive(get_network(**fields, remat=remat)) for remat in (False, True)
    )
    assert (without, units) == (0, 3)
    # Running statistics move by one batch, not by two.
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=5e-6)
