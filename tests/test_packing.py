from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import create_meta, create_small_state, target_of

from ldm_jax import checkpoint, sharding
from ldm_jax.feed import shard_batch
from ldm_jax.latents import LatentScale
from ldm_jax.packing import Packed, pack, pack_like, pack_state, unpack
from ldm_jax.power_ema import add_averages
from ldm_jax.training import create_train_state, get_eval_step, get_optimizer, get_train_step
from ldm_jax.unet import get_network

FIELDS = {"widths": (8, 16), "text_features": 32}


def create_tree():
    return {
        "bias": jnp.arange(3.0),
        "kernel": jnp.ones((2, 4)),
        "half": jnp.ones(5, jnp.bfloat16),
        "layer": {"scale": jnp.float32(7), "count": jnp.int32(2)},
        "variance": jnp.arange(2.0) + 10,
    }


def create_state(key, network=None, optimizer=None, sigma_rels=()):
    network = network or get_network(8, 1, 6, **FIELDS)
    optimizer = optimizer or get_optimizer(steps=10)
    state = create_train_state(key, network, optimizer, (8, 8, 4), (6,))
    # The last layer starts at zero, which would keep all others still.
    state.params["conv_out"]["kernel"] += 0.1
    return add_averages(state, sigma_rels)


def count_leaves(tree):
    return len(jax.tree.leaves(tree))


def test_vectors_and_scalars_lie_in_one_array_in_the_order_of_the_tree():
    packed = pack(create_tree())
    np.testing.assert_array_equal(packed.vector, [0, 1, 2, 7, 10, 11])
    assert [x.shape for x in packed.arrays] == [(5,), (2, 4), ()]
    assert [x.dtype for x in packed.arrays] == [jnp.bfloat16, jnp.float32, jnp.int32]


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_unpacking_gives_back_the_tree(transform):
    tree = create_tree()
    chex.assert_trees_all_equal_shapes_and_dtypes(transform(lambda x: unpack(pack(x)))(tree), tree)
    chex.assert_trees_all_equal(transform(unpack)({"a": pack(tree), "b": jnp.ones(2)})["a"], tree)


def test_a_tree_without_two_vectors_stays_as_it_is():
    for tree in ({}, {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, pack(create_tree())):
        assert pack(tree) is tree


def test_a_tree_is_packed_like_another():
    tree = create_tree()
    assert pack_like(tree, tree) is tree
    assert isinstance(pack_like(pack(tree), tree), Packed)


def test_numpys_arrays_stay_numpys_and_shapes_keep_their_shardings():
    tree, packed = create_tree(), pack(create_tree())
    found = unpack(jax.device_get(packed))
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(found))
    chex.assert_trees_all_equal(found, jax.device_get(tree))
    mesh = sharding.get_mesh("fsdp")
    tree, packed = ({"large": jnp.ones((64, 128)), "rest": x} for x in (tree, packed))
    expected = jax.tree.leaves(sharding.place_shapes(mesh, tree))
    assert any(x.sharding.spec for x in expected)
    found = jax.tree.leaves(unpack(sharding.place_shapes(mesh, packed)))
    assert [(x.shape, x.dtype, x.sharding) for x in found] == [
        (x.shape, x.dtype, x.sharding) for x in expected
    ]


def test_gradients_with_respect_to_a_packed_tree_are_those_of_the_tree():
    def loss(tree):
        tree = unpack(tree)
        return jnp.sum(tree["bias"] ** 2) * tree["layer"]["scale"] + jnp.sum(tree["kernel"] ** 3)

    tree = {"bias": jnp.arange(3.0), "kernel": jnp.ones((2, 4)), "layer": {"scale": jnp.ones(())}}
    chex.assert_trees_all_equal(unpack(jax.grad(loss)(pack(tree))), jax.grad(loss)(tree))


def test_a_state_is_packed_with_moments_averages_and_statistics():
    state = jax.jit(partial(create_state, sigma_rels=(0.05, 0.1)))(jax.random.key(0))
    packed = pack_state(state)
    shape = jax.tree.structure(packed.params)
    adam = packed.opt_state[0]
    for part in (packed.ema_params, adam.mu, adam.nu, packed.power_emas["0.05"]["params"]):
        assert isinstance(part, Packed) and jax.tree.structure(part) == shape
    for part in (packed.batch_stats, packed.ema_batch_stats, packed.power_emas["0.1"]["params"]):
        assert isinstance(part, Packed)
    assert not packed.batch_stats.arrays
    chex.assert_trees_all_equal(unpack(packed), state)
    chex.assert_trees_all_equal(packed.ema_variables, state.ema_variables)


def test_moments_of_another_dtype_are_packed_as_the_weights_are():
    optimizer = optax.adam(1e-3, mu_dtype=jnp.bfloat16)
    state = jax.jit(partial(create_state, optimizer=optimizer))(jax.random.key(0))
    packed = pack_state(state)
    assert packed.opt_state[0].mu.vector.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(unpack(packed), state)
    updates, _ = optimizer.update(packed.params, packed.opt_state, packed.params)
    expected, _ = optimizer.update(state.params, state.opt_state, state.params)
    chex.assert_trees_all_close(unpack(updates), expected, rtol=1e-6)


def test_an_optimizer_with_moments_of_other_shapes_is_refused():
    def create(key):
        return pack_state(create_state(key, optimizer=optax.adafactor(1e-3)))

    with pytest.raises(ValueError, match=r"the shapes of the weights, got \(1,\) where \(.*\) was"):
        jax.eval_shape(create, jax.random.key(0))


def test_vectors_of_several_dtypes_are_refused():
    model = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"one dtype, got \['bfloat16', 'float32'\]"):
        pack(model | {"a": jnp.ones(2, jnp.bfloat16)}, model)


def test_the_default_networks_state_has_669_arrays_in_place_of_2271():
    network, optimizer = get_network(16), get_optimizer(steps=10)
    create = lambda key: create_train_state(key, network, optimizer, (16, 16, 4), (512,))  # noqa: E731
    state = jax.eval_shape(create, jax.random.key(0))
    assert count_leaves(state) == 2271
    assert count_leaves(jax.eval_shape(pack_state, state)) == 669


def draw_batch(k, size=8):
    rng = np.random.default_rng(k)
    return {
        "latents_mean": rng.standard_normal((size, 8, 8, 4)).astype(np.float32),
        "text_embeddings": rng.standard_normal((size, 6)).astype(np.float32),
    }


def train(prepare, mesh, fields, optimizer, **options):
    """Three steps from prepare(state): metrics and held-out loss of each, and the last state."""
    network = get_network(8, 1, 6, **FIELDS, **fields)

    def create(key):
        return prepare(create_state(key, network, optimizer, (0.1,)))

    state = sharding.compile_creation(create, mesh)(jax.random.key(0))
    step = get_train_step(network, optimizer, LatentScale(2.0), mesh=mesh, **options)
    evaluate = get_eval_step(network, LatentScale(2.0), mesh=mesh)
    found = []
    for k in range(3):
        batch = shard_batch(mesh, draw_batch(k))
        state, metrics = step(state, jax.random.key(1), batch)
        found.append((metrics, evaluate(state, jax.random.key(2), batch)))
    return jax.device_get(found), state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fields", "options"),
    [
        ("data=1", {}, {}),
        ("data=1", {}, {"accumulate": 2}),
        ("data=1", {"norm": "rms"}, {}),
        ("data=2,fsdp=2", {}, {}),
        ("data=4", {}, {"parallelism": "pmap"}),
    ],
    ids=["one device", "accumulate", "without statistics", "both", "pmap"],
)
def test_a_packed_state_trains_as_its_trees_do(layout, fields, options):
    devices = 1 if layout == "data=1" else 4
    mesh = sharding.get_mesh(layout, jax.devices()[:devices])
    # SGD, since Adam would divide the gradients that are rounding noise by themselves.
    arguments = mesh, fields, optax.sgd(0.05, momentum=0.9)
    expected, trees = train(lambda state: state, *arguments, **options)
    found, packed = train(pack_state, *arguments, **options)
    assert isinstance(packed.params, Packed) and count_leaves(packed) < count_leaves(trees) / 2
    chex.assert_trees_all_close(found, expected, rtol=1e-4)
    values = jax.device_get(unpack(packed))
    chex.assert_trees_all_close(values, jax.device_get(trees), rtol=1e-3, atol=1e-5)
    assert expected[2][0]["loss"] != expected[0][0]["loss"]
    for leaf in jax.tree.leaves(packed):
        place = jax.sharding.NamedSharding(mesh, sharding.get_spec(mesh, leaf.shape))
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_clipped_adam_updates_a_packed_tree_as_the_tree():
    optimizer = get_optimizer(0.1, steps=10, clip_norm=0.5)
    state = jax.jit(partial(create_state, optimizer=optimizer))(jax.random.key(0))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), state.params)

    def update(state, grads):
        for _ in range(3):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            state = state.replace(params=params, opt_state=opt_state)
        return state

    found = unpack(jax.jit(update)(pack_state(state), pack(grads)))
    expected = jax.jit(update)(state, grads)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), expected.params, state.params)
    assert min(jax.tree.leaves(moved)) > 0.1


@pytest.mark.slow
def test_a_restored_packed_state_lies_where_a_fresh_one_does_and_compiles_nothing_again(tmp_path):
    mesh = sharding.get_mesh("data=2,fsdp=2", jax.devices()[:4])
    network, optimizer = get_network(8, 1, 6, widths=(16, 32)), get_optimizer(steps=10)

    def create(key):
        return pack_state(create_state(key, network, optimizer, (0.1,)))

    fresh = sharding.compile_creation(create, mesh)(jax.random.key(0))
    places = sharding.get_shardings(mesh, fresh)
    assert any("fsdp" in place.spec for place in jax.tree.leaves(places))
    step = get_train_step(network, optimizer, LatentScale(2.0), mesh=mesh)
    batch = shard_batch(mesh, draw_batch(0))
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_checkpoint(manager, fresh, create_meta())
        manager.wait_until_finished()
        target = sharding.place_shapes(mesh, jax.eval_shape(create, jax.random.key(0)))
        restored = checkpoint.restore_checkpoint(manager, target, create_meta())
    chex.assert_trees_all_equal(restored, fresh)
    for state in (fresh, restored):
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        step(state, jax.random.key(1), batch)
    assert step._cache_size() == 1


def test_a_packed_state_is_saved_as_its_trees(tmp_path):
    state = create_small_state()
    state = state.replace(params=state.params | {"shift": jnp.arange(4.0)})
    packed = pack_state(state)
    assert isinstance(packed.params, Packed)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_checkpoint(manager, packed, create_meta())
        manager.wait_until_finished()
        restored = checkpoint.restore_checkpoint(manager, target_of(state), create_meta())
    chex.assert_trees_all_equal(restored, state)
