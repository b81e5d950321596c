"""Options for CUDA graphs. Here there is no GPU: XLA's CPU compiler checks that it knows them."""

from functools import update_wrapper

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ldm_jax import graphs, sharding


@pytest.fixture
def on_gpu(monkeypatch):
    """JAX says that it runs on a GPU, and nothing has been tried on it yet."""
    jax.devices()  # They start with the flags of conftest.py, which go next.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    graphs._can_record_convolutions.cache_clear()
    yield
    graphs._can_record_convolutions.cache_clear()


def test_a_cpu_has_no_graphs():
    assert graphs.get_options(jax.devices()[:1]) is None


def test_a_gpu_records_convolutions(on_gpu):
    options = graphs.get_options(jax.devices()[:1])
    assert options == {graphs.FLAG: graphs.RECORDED} and "CONVOLUTION" in graphs.RECORDED
    # jit takes them, and XLA knows their names: of others it says so.
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_a_training_step_is_compiled_with_quick_trials(on_gpu, monkeypatch):
    options = graphs.get_options(jax.devices()[:1], quick=True)
    assert options == {graphs.FLAG: graphs.RECORDED} | graphs.QUICK_TRIALS
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    options = graphs.get_options(jax.devices()[:1], quick=True)
    expected = {graphs.FLAG: graphs.RECORDED} | graphs.QUICK_TRIALS
    assert options == {k: v for k, v in expected.items() if k != "xla_gpu_autotune_level"}
    for mesh in (None, sharding.get_mesh()):
        monkeypatch.setattr(graphs, "get_options", lambda _, quick: {"xla_wish": quick})
        step = sharding.compile_step(lambda state, rng, batch: (state, {}), mesh)
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_wish"):
            step({}, jax.random.key(0), jnp.ones(8))


def test_an_xla_without_quick_trials_still_records(on_gpu, monkeypatch):
    monkeypatch.setattr(graphs, "QUICK_TRIALS", {"xla_gpu_wishes": 1})
    graphs._knows_quick_trials.cache_clear()
    with pytest.warns(UserWarning, match="all trials: .*xla_gpu_wishes"):
        options = graphs.get_options(jax.devices()[:1], quick=True)
    assert options == {graphs.FLAG: graphs.RECORDED}
    graphs._knows_quick_trials.cache_clear()


def test_what_xla_flags_say_counts(on_gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{graphs.FLAG}=")
    assert graphs.get_options(jax.devices()[:1]) is None


def test_devices_of_others_get_no_options(on_gpu):
    assert graphs.get_options(["a chip of a topology"]) is None


def test_where_recording_fails_training_goes_on_without(on_gpu, monkeypatch):
    monkeypatch.setattr(graphs, "RECORDED", "FUSION,WISHES")
    with pytest.warns(UserWarning, match="without convolutions in CUDA graphs: .*WISHES"):
        assert graphs.get_options(jax.devices()[:1]) is None


def test_each_device_of_the_program_is_tried_and_no_other(on_gpu, monkeypatch):
    tried, convolve = [], graphs._convolve

    def spy(devices, options):
        assert options["xla_gpu_autotune_level"] == 0
        gradients = convolve(devices, options)
        tried.append(gradients[0].sharding.device_set)
        for gradient in gradients:
            first, *others = np.asarray(gradient, np.float32)
            assert first.any() and len(others) == len(devices) - 1
            assert all(np.array_equal(first, other) for other in others)
        return gradients

    monkeypatch.setattr(graphs, "_convolve", spy)
    some = jax.devices()[2:5]
    for _ in range(2):
        assert graphs.get_options([*reversed(some), "of another process"])
    assert tried == 3 * [set(some)]
    assert graphs.get_options(sharding.get_mesh().devices.flat)
    assert tried[3:] == 3 * [set(jax.devices())]


# A function's jit.


@pytest.fixture
def asked(monkeypatch):
    """The devices that options were asked for; a CPU's compiler knows those of the answers."""
    devices = []

    def get_options(found):
        devices.extend(found)
        return {graphs.FLAG: graphs.RECORDED}

    monkeypatch.setattr(graphs, "get_options", get_options)
    return devices


def test_the_compiler_gets_the_options_of_a_call_and_of_lower(monkeypatch):
    double = graphs.RecordedJit(lambda x: 2 * x)
    assert double(3) == 6 and double.lower(3).compile()(4) == 8
    monkeypatch.setattr(graphs, "get_options", lambda devices: {"xla_wish": True})
    for run in (double, lambda x: double.lower(x).compile()):
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_wish"):
            run(3)


def test_options_are_for_the_device_that_will_run(asked):
    add = graphs.RecordedJit(lambda x, tree: x + tree["y"])
    devices = jax.devices()
    on_fourth = jax.device_put(1.0, devices[3])
    add(np.float32(1), {"y": jnp.float32(1)})
    add(jnp.float32(1), tree={"y": on_fourth})
    with jax.default_device(devices[2]):
        add(1.0, {"y": 1.0})
    assert asked == [devices[0], devices[3], devices[2]]


def test_equal_options_never_trace_again(asked, monkeypatch):
    traced = []

    @graphs.RecordedJit
    def double(x):
        traced.append(x.shape)
        return 2 * x

    for x in (1.0, 2.0, 3.0):
        assert double(np.full(2, x)).sum() == 4 * x
    assert len(asked) == 3 and traced == [(2,)]
    double(np.ones(3))
    assert traced == [(2,), (3,)]


def on_a_mesh(f, x):
    split = PartitionSpec(sharding.AXES)
    return jax.shard_map(f, mesh=sharding.get_mesh(), in_specs=split, out_specs=split)(x)


TRANSFORMS = {
    "jit": lambda f, x: jax.jit(f)(x),
    "jit around constants": lambda f, x: jax.jit(lambda: f(x))(),  # No argument is a tracer.
    "vmap": lambda f, x: jax.vmap(f)(x),
    "jit of vmap": lambda f, x: jax.jit(jax.vmap(f))(x),
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x) * x / 2,
    "map": lambda f, x: jax.lax.map(f, x),
    "shard_map": lambda f, x: on_a_mesh(f, x),
    "jit of shard_map": lambda f, x: jax.jit(lambda x: on_a_mesh(f, x))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inside_another_transformation_there_are_no_options(asked, name):
    square = graphs.RecordedJit(lambda x: x * x)
    x = np.arange(8, dtype=np.float32)
    np.testing.assert_allclose(TRANSFORMS[name](square, x), x * x)
    assert not asked
    np.testing.assert_allclose(square(x), x * x)
    assert asked == [jax.devices()[0]]


def test_what_wraps_a_recorded_jit_lowers_itself():
    square = graphs.RecordedJit(lambda x: x * x)
    x = np.full(8, 3, np.float32)
    for wrap in (jax.jit, graphs.RecordedJit):
        outer = wrap(update_wrapper(lambda x: square(x) + 1, square))  # As jax.vmap and others.
        np.testing.assert_array_equal(outer.lower(x).compile()(x), np.full(8, 10))
