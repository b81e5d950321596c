"""Our network against the original's literal form (tests/keras_oracle.py), weight for weight.

In training mode some gradients are zero in exact arithmetic, and rounding noise in floating point:
those of constants that a BatchNorm subtracts again, and of the queries' bias, which shifts all
logits of a softmax row alike. No relative error can be asked of noise; `is_noise` names them, and
they have to be noise in both networks. With running statistics nothing is subtracted again, so that
the comparison in inference mode reaches every weight but the queries' bias.
"""

import jax
import jax.numpy as jnp
import keras_oracle as oracle
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.unet import get_network

TOLERANCE = 1e-4
NOISE = 1e-6  # of the norm of the whole gradient

SMALL = {"latent_image_size": 16, "block_depth": 1, "emb_size": 24, "latent_channels": 3}
SMALL_WIDTHS = (16, 24, 32, 40)
FULL = {"latent_image_size": 16}
FULL_WIDTHS = (128, 256, 512, 640)


def is_noise(path, train):
    """Whether the exact gradient of the weight at `path` is zero."""
    if path[-3:] == ("spatial", "query", "bias"):
        return True
    subtracted = [("spatial", "value"), ("spatial", "out"), ("cross", "value"), ("cross", "out")]
    subtracted += [("cross", "norm_cond"), ("text",)]
    return train and path[-1] == "bias" and any(path[-len(s) - 1 : -1] == s for s in subtracted)


def relative_error(value, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(value, np.float64) - expected) / np.linalg.norm(expected)


class Pair:
    """The literal model and ours with the same weights and inputs, and what both compute."""

    def __init__(self, fields, widths, batch_size):
        *widths, bottleneck = widths
        with jax.numpy_rank_promotion("allow"):  # Keras adds a bias to a map.
            self.literal = oracle.get_literal_network(
                **fields, widths=widths, bottleneck=bottleneck
            )
        self.network = get_network(**fields, widths=(*widths, bottleneck))
        oracle.draw_weights(self.literal, seed=0)
        self.live = [v for v in self.literal.trainable_variables if not oracle.is_dead(v)]
        rng = np.random.default_rng(1)
        shape = self.literal.input_shape[0][1:]
        self.x_t, self.target = rng.standard_normal((2, batch_size, *shape)).astype(np.float32)
        self.noise_levels = np.linspace(0.05, 0.8, batch_size, dtype=np.float32)
        text_shape = (batch_size, self.literal.input_shape[2][1])
        self.text = rng.standard_normal(text_shape).astype(np.float32)

    def ours(self, variables):
        """Values of the literal model's live variables => variables of ours."""
        collections = {"params": {}, "batch_stats": {}}
        for variable, value in variables:
            if not oracle.is_dead(variable):
                path = oracle.get_path(variable)
                collection = "params" if variable.trainable else "batch_stats"
                collections[collection][path] = oracle.convert(path, value)
        return {name: unflatten_dict(tree) for name, tree in collections.items()}

    def literal_loss(self, weights, statistics, train):
        inputs = [self.x_t, self.noise_levels[:, None, None, None], self.text]
        x_zero, statistics = self.literal.stateless_call(
            weights, statistics, inputs, training=train
        )
        return jnp.mean(jnp.abs(x_zero - self.target)), (x_zero, statistics)

    def our_loss(self, params, batch_stats, train):
        x_zero, updates = self.network.apply(
            {"params": params, "batch_stats": batch_stats},
            self.x_t,
            self.noise_levels,
            self.text,
            train=train,
            mutable=["batch_stats"],
        )
        return jnp.mean(jnp.abs(x_zero - self.target)), (x_zero, updates["batch_stats"])

    def run(self, train, gradients=True):
        """Outputs, new statistics and gradients: those of the literal model, then ours."""
        transform = lambda f: jax.value_and_grad(f, has_aux=True) if gradients else f  # noqa: E731
        weights = [v.value for v in self.literal.trainable_variables]
        statistics = [v.value for v in self.literal.non_trainable_variables]
        with jax.numpy_rank_promotion("allow"):
            literal = jax.jit(transform(self.literal_loss), static_argnums=2)(
                weights, statistics, train
            )
        variables = self.ours((v, v.value) for v in self.literal.variables)
        arguments = variables["params"], variables["batch_stats"], train
        ours = jax.jit(transform(self.our_loss), static_argnums=2)(*arguments)
        if not gradients:
            return literal[1], ours[1]
        return (*literal[0][1], literal[1]), (*ours[0][1], ours[1])

    def use_statistics_near(self, updated):
        """Sets the running statistics to within a fifth of the batch's own, as training would.

        With unrelated ones the activations grow over the layers without bound.
        """
        rng = np.random.default_rng(2)
        for variable, new in zip(self.literal.non_trainable_variables, updated):
            batch = (np.asarray(new) - 0.99 * np.asarray(variable.value)) / 0.01
            variable.assign(batch * rng.uniform(0.8, 1.2, batch.shape))


def get_results(fields, widths, batch_size, inference_gradients):
    pair = Pair(fields, widths, batch_size)
    trained = pair.run(train=True)
    pair.use_statistics_near(trained[0][1])
    return pair, trained, pair.run(train=False, gradients=inference_gradients)


@pytest.fixture(scope="module")
def small():
    return get_results(SMALL, SMALL_WIDTHS, batch_size=6, inference_gradients=True)


@pytest.fixture(scope="module")
def full():
    return get_results(FULL, FULL_WIDTHS, batch_size=4, inference_gradients=False)


@pytest.fixture(params=["small", pytest.param("full", marks=pytest.mark.slow)])
def results(request):
    return request.getfixturevalue(request.param)


def assert_gradients_agree(pair, literal, ours, train):
    expected = flatten_dict(pair.ours(zip(pair.literal.trainable_variables, literal))["params"])
    gradients = flatten_dict(ours)
    assert gradients.keys() == expected.keys()
    total = np.sqrt(sum(np.linalg.norm(g) ** 2 for g in expected.values()))
    for path, gradient in gradients.items():
        if is_noise(path, train):
            assert np.linalg.norm(gradient) < NOISE * total, path
            assert np.linalg.norm(expected[path]) < NOISE * total, path
        else:
            assert relative_error(gradient, expected[path]) < TOLERANCE, path


@pytest.mark.slow
def test_the_literal_form_has_the_originals_number_of_weights(full):
    pair = full[0]
    assert sum(v.value.size for v in pair.literal.trainable_variables) == 83_821_700


def test_one_token_spares_exactly_the_dead_weights(results):
    pair = results[0]
    variables = pair.ours((v, v.value) for v in pair.literal.variables)
    dead = [v for v in pair.literal.variables if v.trainable and oracle.is_dead(v)]
    # q and k with their biases, and the scale and offset of the norm that feeds the keys.
    attentions = sum("cross_q/kernel" in v.path for v in dead)
    assert len(dead) == 6 * attentions == 6 * 6 * pair.network.block_depth
    inputs = (pair.x_t, pair.noise_levels, pair.text)
    initial = jax.eval_shape(pair.network.init, jax.random.key(0), *inputs)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, variables)
    literal_size = sum(v.value.size for v in pair.literal.trainable_variables)
    size = sum(p.size for p in jax.tree.leaves(initial["params"]))
    assert size == literal_size - sum(v.value.size for v in dead)


@pytest.mark.slow
def test_the_default_network_has_83_151_812_weights(full):
    pair = full[0]
    assert sum(v.value.size for v in pair.live) == 83_151_812


def test_the_dead_weights_get_no_gradient_in_the_literal_form(results):
    pair, ((_, _, gradients), _), _ = results
    total = np.sqrt(sum(np.linalg.norm(g) ** 2 for g in gradients))
    for variable, gradient in zip(pair.literal.trainable_variables, gradients):
        if oracle.is_dead(variable):
            assert np.linalg.norm(gradient) < NOISE * total, variable.path


def test_outputs_in_training_mode_agree(results):
    _, ((expected, _, _), (x_zero, _, _)), _ = results
    assert np.std(expected) > 0.1
    assert relative_error(x_zero, expected) < TOLERANCE


def test_outputs_in_inference_mode_agree(results):
    _, (trained, _), (literal, ours) = results
    assert relative_error(literal[0], trained[0]) > 0.01  # The statistics matter.
    assert relative_error(ours[0], literal[0]) < TOLERANCE


def test_running_statistics_after_a_training_step_agree(results):
    pair, (literal, ours), _ = results
    updated = zip(pair.literal.non_trainable_variables, literal[1])
    expected = flatten_dict(pair.ours(updated)["batch_stats"])
    statistics = flatten_dict(ours[1])
    assert statistics.keys() == expected.keys()
    for path, value in statistics.items():
        assert relative_error(value, expected[path]) < TOLERANCE, path


def test_inference_leaves_the_running_statistics_alone(small):
    pair, _, (_, (_, statistics, _)) = small
    expected = pair.ours((v, v.value) for v in pair.literal.variables)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, statistics, expected)


def test_gradients_in_training_mode_agree(results):
    pair, (literal, ours), _ = results
    assert_gradients_agree(pair, literal[2], ours[2], train=True)


def test_gradients_in_inference_mode_agree(small):
    pair, _, (literal, ours) = small
    assert_gradients_agree(pair, literal[2], ours[2], train=False)
