"""Eight virtual devices give the numbers of one, however the state is spread over them."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax import sharding
from ldm_jax.feed import shard_batch
from ldm_jax.latents import LatentScale
from ldm_jax.sampler import Denoiser, get_diffuser, sample_seeds
from ldm_jax.training import create_train_state, get_eval_step, get_train_step
from ldm_jax.unet import get_network

SPREADS = {
    "one device": ("data", "jit", 1),
    "data": ("data", "jit", 8),
    "pmap": ("data", "pmap", 8),
    "fsdp": ("fsdp", "jit", 8),
    "both": ("data=2,fsdp=4", "jit", 8),
}


FIELDS = {"widths": (32, 64), "text_features": 32, "dropout": 0.2}


def draw_batch(k=0, size=16):
    rng = np.random.default_rng(k)
    # The further down the batch, the brighter: no shard has the statistics of the whole.
    brightness = np.linspace(-1, 1, size)[:, None, None, None]
    return {
        "latents_mean": np.float32(brightness + 0.2 * rng.standard_normal((size, 8, 8, 4))),
        "latents_std": np.full((size, 8, 8, 4), 0.1, np.float32),
        "text_embeddings": rng.standard_normal((size, 6)).astype(np.float32),
    }


class Run:
    """Three steps of a network, and the held-out loss after them.

    SGD, since Adam would divide the gradients that are rounding noise by themselves.
    """

    def __init__(self, mesh, parallelism="jit"):
        network = get_network(8, 1, 6, **FIELDS)
        optimizer = optax.sgd(0.05, momentum=0.9)

        def create(key):
            return create_train_state(key, network, optimizer, (8, 8, 4), (6,))

        state = sharding.compile_creation(create, mesh)(jax.random.key(0))
        # The last layer starts at zero, which would keep all others still.
        state.params["conv_out"]["kernel"] += 0.1
        self.start = jax.device_get(state.params)
        self.train_step = get_train_step(
            network,
            optimizer,
            LatentScale(2.0),
            mesh=mesh,
            parallelism=parallelism,
        )
        self.losses = []
        for k in range(3):
            batch = draw_batch(k) if mesh is None else shard_batch(mesh, draw_batch(k))
            state, metrics = self.train_step(state, jax.random.key(0), batch)
            self.losses.append(jax.device_get(metrics))
        eval_step = get_eval_step(network, LatentScale(2.0), mesh=mesh)
        self.losses.append(jax.device_get(eval_step(state, jax.random.key(1), batch)))
        self.state, self.values = state, jax.device_get(state)


@pytest.fixture(scope="module")
def runs():
    """By the way that a step is spread; "XLA's own" is the step without a mesh."""
    found = {"XLA's own": Run(None)}
    for way, (layout, parallelism, devices) in SPREADS.items():
        found[way] = Run(sharding.get_mesh(layout, jax.devices()[:devices]), parallelism)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", SPREADS)
def test_every_way_to_spread_a_step_gives_the_numbers_of_one_device(runs, way):
    expected, found = runs["XLA's own"], runs[way]
    assert found.values.step == 3
    assert 0.1 < expected.losses[0]["loss"] < 1.5 and expected.losses[0]["grad_norm"] > 0.1
    chex.assert_trees_all_close(found.losses, expected.losses, rtol=5e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected.values.params, expected.start)
    # So that agreement to a hundredth of it says something.
    assert max(jax.tree.leaves(moved)) > 0.01
    for name in ("params", "ema_params"):
        chex.assert_trees_all_close(
            getattr(found.values, name), getattr(expected.values, name), atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("way", SPREADS)
def test_batch_norms_have_the_statistics_of_the_whole_batch(runs, way):
    expected, found = runs["XLA's own"].values, runs[way].values
    for name in ("batch_stats", "ema_batch_stats"):
        chex.assert_trees_all_close(
            getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-5
        )


@pytest.mark.slow
def test_pmap_gives_what_jit_with_shardings_gives(runs):
    chex.assert_trees_all_close(runs["pmap"].values, runs["data"].values, atol=1e-4)
    chex.assert_trees_all_close(runs["pmap"].losses, runs["data"].losses, rtol=1e-4)


@pytest.mark.slow
def test_the_state_stays_where_it_is_and_the_step_compiles_once(runs):
    for way, (layout, parallelism, devices) in SPREADS.items():
        mesh = sharding.get_mesh(layout, jax.devices()[:devices])
        for leaf in jax.tree.leaves(runs[way].state):
            expected = NamedSharding(mesh, sharding.get_spec(mesh, leaf.shape))
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
        if parallelism == "jit":
            assert runs[way].train_step._cache_size() == 1


@pytest.mark.slow
def test_a_picture_does_not_depend_on_the_number_of_devices(runs):
    denoiser = Denoiser(get_network(8, 1, 6, **FIELDS), runs["one device"].values.ema_variables)
    diffuser = get_diffuser(denoiser, diffusion_steps=8)
    seeds, labels = sample_seeds(range(8), (8, 8, 4)), draw_batch(size=8)["text_embeddings"]
    expected = diffuser.reverse_diffusion(seeds, labels)
    spread = jax.device_put((seeds, labels), sharding.batch_sharding(sharding.get_mesh()))
    latents = diffuser.reverse_diffusion(*spread)
    assert np.std(latents) > 0.05
    np.testing.assert_allclose(latents, expected, atol=1e-4)


# Meshes and what a device holds.


@pytest.mark.parametrize(
    "layout, sizes",
    [
        ("data", (8, 1)),
        ("fsdp", (1, 8)),
        ("data,fsdp=4", (2, 4)),
        ("data=4, fsdp", (4, 2)),
        ("fsdp=2,data=4", (4, 2)),
        ("data=8", (8, 1)),
    ],
)
def test_one_line_says_the_mesh(layout, sizes):
    assert sharding.parse_layout(layout, 8) == sizes
    mesh = sharding.get_mesh(layout)
    assert dict(mesh.shape) == {"data": sizes[0], "fsdp": sizes[1]}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_a_mesh_has_all_devices_or_those_given():
    assert sharding.get_mesh().devices.ravel().tolist() == jax.devices()
    mesh = sharding.get_mesh("data", jax.devices()[2:4])
    assert mesh.devices.ravel().tolist() == jax.devices()[2:4]


@pytest.mark.parametrize("layout", ["", "model", "data,fsdp", "data=x", "data=0", "data,data=2"])
def test_lines_that_say_no_mesh_are_refused(layout):
    with pytest.raises(ValueError, match="a mesh must look like .* got"):
        sharding.parse_layout(layout, 8)


def test_a_mesh_of_another_number_of_devices_is_refused():
    with pytest.raises(ValueError, match="the mesh 'data=3' needs 3 devices, got 8"):
        sharding.get_mesh("data=3")
    with pytest.raises(ValueError, match="'data,fsdp=16' needs 16 devices, got 8"):
        sharding.get_mesh("data,fsdp=16")


class SliceDevice(types.SimpleNamespace):
    """Stands for a device of one of several slices."""

    def __hash__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, SliceDevice) and self.id == other.id


def get_slices(platform):
    """Two slices of four."""
    return [
        SliceDevice(
            id=i,
            slice_index=i // 4,
            process_index=i // 4,
            platform=platform,
            device_kind="a chip",
            coords=(i % 4 // 2, i % 2, 0),
            core_on_chip=0,
        )
        for i in range(8)
    ]


def test_only_the_data_axis_crosses_slices(monkeypatch):
    monkeypatch.setattr(sharding, "Mesh", lambda grid, names, axis_types: grid)
    grid = sharding.get_mesh("data=4,fsdp=2", get_slices("tpu"))
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert slices.shape == (4, 2)
    assert np.all(slices[:, 0] == slices[:, 1]) and set(slices[:, 0]) == {0, 1}
    assert sorted(device.id for device in grid.flat) == list(range(8))
    with pytest.raises(ValueError, match="has 1 parts of the data for 2 slices"):
        sharding.get_mesh("fsdp", get_slices("tpu"))


def test_on_gpus_fsdp_crosses_hosts_which_jax_calls_slices(monkeypatch):
    monkeypatch.setattr(sharding, "Mesh", lambda grid, names, axis_types: grid)
    for layout, shape in {"fsdp": (1, 8), "data,fsdp=4": (2, 4), "data=4,fsdp=2": (4, 2)}.items():
        grid = sharding.get_mesh(layout, get_slices("gpu"))
        assert grid.shape == shape and [device.id for device in grid.flat] == list(range(8))


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((3, 3, 64, 128), (None, None, None, "fsdp")),
        ((3, 3, 256, 128), (None, None, "fsdp")),
        ((64, 64), (None, "fsdp")),
        ((1, 1, 4, 128), ()),  # Small.
        ((8192,), ()),  # A vector.
        ((63, 513), ()),  # Nothing divides.
        ((64, 513), ("fsdp",)),
        ((), ()),
    ],
)
def test_the_longest_axis_that_divides_is_split(shape, spec):
    assert sharding.get_spec(sharding.get_mesh("data=2,fsdp=4"), shape) == PartitionSpec(*spec)
    assert sharding.get_spec(sharding.get_mesh("data"), shape) == PartitionSpec()


@pytest.mark.parametrize("layout", ["data", "fsdp", "data=2,fsdp=4"])
def test_numbers_are_added_up_once_wherever_they_lie(layout):
    mesh = sharding.get_mesh(layout)
    rng = np.random.default_rng(0)
    shapes = (64, 128), (3, 3, 16, 64), (100,), (7, 5), ()
    tree = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    placed = jax.device_put(tree, sharding.get_shardings(mesh, tree))

    def add(arrays):
        rows = [x**2 if x.ndim < 2 else jnp.sum(x**2, axis=-1) for x in arrays]
        return jnp.sum(jnp.concatenate([jnp.zeros(0), *(row.ravel() for row in rows)]))

    add_up = jax.jit(lambda tree: sharding.add_up(add, tree, mesh))
    # Left to itself, XLA gathers the sums of rows.
    text = add_up.lower(placed).compile().as_text()
    assert "all-gather" not in text and "collective-permute" not in text
    # All; the first two, which can be split; the others, which cannot; none.
    for part in (slice(None), slice(0, 2), slice(2, None), slice(0, 0)):
        expected = sum(np.sum(np.float64(x) ** 2) for x in tree[part])
        np.testing.assert_allclose(add_up(placed[part]), expected, rtol=1e-5)


def test_the_table_says_what_a_device_holds():
    mesh = sharding.get_mesh("data=2,fsdp=4")
    shapes = {"a": {"kernel": (3, 3, 16, 64)}, "b": {"bias": (64,)}}
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    lines = sharding.describe_shardings(sharding.place_shapes(mesh, tree)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["a/kernel", "3x3x16x64", "fsdp,", "axis", "3", "9,216"],
        ["b/bias", "64", "-", "256"],
        ["all", "of", "37,120", "9,472"],
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parallelism": "pjit"}, "parallelism must be one of .* got 'pjit'"),
        ({"reduce_dtype": "float16"}, "reduce_dtype must be one of .* got 'float16'"),
    ],
)
def test_settings_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sharding.get_gradients(None, sharding.get_mesh(), **options)


def test_pmap_is_data_parallel_alone():
    with pytest.raises(ValueError, match="pmap is data parallel alone, got .*'fsdp': 8"):
        sharding.get_gradients(None, sharding.get_mesh("fsdp"), "pmap")
