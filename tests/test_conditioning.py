"""Cross-attentions to one token all at once against the same ones unit by unit."""

from functools import reduce
from operator import getitem

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_unet import draw

from ldm_jax import unet
from ldm_jax.blocks import CrossAttention
from ldm_jax.conditioning import Condition, attend_to_token
from ldm_jax.unet import get_network

FIELDS = {
    "latent_image_size": 8,
    "block_depth": 1,
    "emb_size": 6,
    "widths": (16, 16, 32),  # Three cross-attentions of width 16, one of 32.
    "text_features": 16,
}
INPUTS = draw(3, 8, 8, 4), np.float32([0.2, 0.5, 0.9]), draw(3, 6, seed=1)


def draw_variables(network, seed=0):
    """Weights and statistics of which none is trivial."""
    variables = jax.eval_shape(network.init, jax.random.key(0), *INPUTS)
    rng = np.random.default_rng(seed)

    def draw_leaf(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        if path[-1].key in ("var", "scale"):
            return np.exp(0.3 * noise)
        return noise / np.sqrt(np.float32(np.prod(x.shape[:-1]))) if x.ndim > 1 else 0.3 * noise

    return jax.tree_util.tree_map_with_path(draw_leaf, variables)


def derive(network, variables, train):
    """The estimate, the new statistics and the gradients of weights and inputs."""
    statistics = {name: x for name, x in variables.items() if name != "params"}

    @jax.jit
    def run(params, *inputs):
        def loss(params, *inputs):
            variables = {"params": params, **statistics}
            x_zero, updates = network.apply(
                variables, *inputs, train=train, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.sin(x_zero)), (x_zero, updates)

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(params, *inputs)

    return run(variables["params"], *INPUTS)


@pytest.mark.parametrize("norm", ["batch", "group", "rms"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("conditioning, remat", [("token", False), ("adaptive", True)])
def test_all_at_once_they_are_those_of_unit_by_unit(monkeypatch, norm, train, conditioning, remat):
    network = get_network(**FIELDS, norm=norm, conditioning=conditioning, remat=remat)
    variables = draw_variables(network)
    calls = []

    def count(*arguments, **options):
        calls.append(arguments)
        return attend_to_token(*arguments, **options)

    monkeypatch.setattr(unet, "attend_to_token", count)
    gradients, (found, updates) = derive(network, variables, train)
    assert len(calls) == 1
    monkeypatch.setattr(unet, "attend_to_token", lambda *arguments, **options: None)
    expected = derive(network, variables, train)
    chex.assert_trees_all_equal_structs((gradients, (found, updates)), expected)
    np.testing.assert_allclose(found, expected[1][0], atol=2e-5)
    chex.assert_trees_all_close(updates, expected[1][1], rtol=1e-4, atol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected[0]))
    chex.assert_trees_all_close(gradients, expected[0], rtol=1e-3, atol=1e-5 * largest)
    if norm == "batch":  # In training the statistics of the cross-attentions move, otherwise not.
        cross = [tree["batch_stats"]["bottleneck_0"]["cross"] for tree in (updates, variables)]
        moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, cross), strict=True)]
        assert len(moved) == 4 and all((x > 1e-4) == train for x in moved)


def test_statistics_that_are_not_kept_do_not_stop_a_network_in_use():
    network = get_network(**FIELDS)
    variables = draw_variables(network)
    found = jax.jit(network.apply)(variables, *INPUTS)
    _, (expected, _) = derive(network, variables, train=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_each_unit_with_attention_gets_its_own_and_each_width_is_worked_out_once():
    network = get_network(**FIELDS)
    variables, token = draw_variables(network), draw(3, 1, 48, seed=2)
    layer = CrossAttention(parent=None)
    added = attend_to_token(layer, variables, token)
    paths = [("down_1", "unit_0"), ("bottleneck_0",), ("up_0", "unit_0"), ("up_1", "unit_0")]
    found = flatten_dict(added, is_leaf=lambda path, x: path in paths)
    assert set(found) == set(paths)
    for path, (result, _) in found.items():
        own = {kind: reduce(getitem, (*path, "cross"), tree) for kind, tree in variables.items()}
        image = np.zeros((3, 1, 1, own["params"]["out"]["bias"].size), np.float32)
        np.testing.assert_allclose(result, layer.apply(own, image, token), atol=1e-5)
    program = jax.make_jaxpr(lambda variables: attend_to_token(layer, variables, token))(variables)
    # Values and out, of widths 16 and 32.
    assert str(program).count("dot_general") == 2 * 2


def test_a_network_without_attention_or_statistics_gets_nothing():
    assert attend_to_token(CrossAttention(), {"params": {"conv": {"bias": 0}}}, draw(2, 1, 3)) == {}


def test_a_condition_hands_each_part_its_own():
    whole = Condition(draw(1, 1, 2), added={"down_1": {"unit_0": "what is added"}})
    assert whole.of("down_1").of("unit_0").added == "what is added"
    assert whole.of("down_0").of("unit_0").added is None
    assert Condition(draw(1, 1, 2)).of("down_1").added is None
    assert whole.of("down_1").tokens is whole.tokens
