"""Programs are kept, taken where nothing has changed, and made again where something has."""

import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax import programs, sharding
from ldm_jax.programs import KeptProgram

MESH = sharding.get_mesh("fsdp")


@pytest.fixture
def folder(tmp_path):
    """JAX's folder of compiled programs, for one test."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def get_step(traced):
    """A step that says when it is traced; its first argument is donated."""

    def step(state, x):
        traced.append(1)
        return jax.tree.map(lambda w: w * 2 + x, state), {"sum": jnp.sum(state["w"])}

    return jax.jit(step, donate_argnums=0)


def create_state(mesh=MESH, rows=8):
    tree = {"w": jnp.arange(rows * 1024.0).reshape(rows, 1024), "b": jnp.ones(3)}
    return jax.device_put(tree, sharding.get_shardings(mesh, tree))


def count_traces(mesh=MESH, identity="one", rows=8, x=1.0, spread=None):
    """Runs a program of its own, checks what comes, and says how often it was traced."""
    traced = []
    program = KeptProgram(get_step(traced), mesh, {"settings": identity})
    state = create_state(mesh, rows)
    if spread is not None:
        state["w"] = jax.device_put(state["w"], spread)
    expected = jax.device_get(state)
    for _ in range(2):
        state, metrics = program(state, jnp.float32(x))
        np.testing.assert_allclose(metrics["sum"], expected["w"].sum(), rtol=1e-6)
        expected = {name: w * 2 + np.float32(x) for name, w in expected.items()}
    for name in expected:
        np.testing.assert_array_equal(state[name], expected[name])
    return len(traced)


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_a_program_is_traced_once_for_all_that_is_the_same(folder, devices):
    mesh = sharding.get_mesh("fsdp", jax.devices()[-devices:])
    assert count_traces(mesh) == 1
    assert len(list(folder.iterdir())) == 1
    assert count_traces(mesh) == 0
    assert count_traces(mesh, x=3.0) == 0
    assert len(list(folder.iterdir())) == 1


def test_what_is_donated_is_donated_by_a_kept_program_too(folder):
    for _ in range(2):
        state = create_state()
        KeptProgram(get_step([]), MESH, "one")(state, jnp.float32(1))
        assert state["w"].is_deleted()


def test_axes_that_are_not_named_are_axes_that_are_not_split(folder):
    """A restored state may say of its weights what a fresh one leaves unsaid."""
    whole = [NamedSharding(MESH, PartitionSpec(*spec)) for spec in [(), (None,), (None, None)]]
    assert [count_traces(spread=spread) for spread in whole] == [1, 0, 0]
    halves = [NamedSharding(MESH, PartitionSpec(*spec)) for spec in [("fsdp",), (None, "fsdp")]]
    assert [count_traces(spread=spread) for spread in halves] == [1, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": "another"},
        {"rows": 16},
        {"mesh": sharding.get_mesh("data")},
        {"mesh": sharding.get_mesh("fsdp", jax.devices()[:4])},
    ],
)
def test_another_identity_argument_or_mesh_is_another_program(folder, changed):
    assert [count_traces(), count_traces(**changed), count_traces(**changed)] == [1, 1, 0]
    assert count_traces() == 0


def test_another_mesh_is_another_program_where_arguments_do_not_tell(folder):
    for layout in ("fsdp", "data", "data=2,fsdp=4", "fsdp"):
        mesh = sharding.get_mesh(layout)
        create = sharding.compile_creation(
            lambda key: {"w": jax.random.normal(key, (64, 64))}, mesh
        )
        state = KeptProgram(create, mesh, "one")(jax.random.key(0))
        expected = NamedSharding(mesh, sharding.get_spec(mesh, (64, 64)))
        assert state["w"].sharding.is_equivalent_to(expected, 2)
    assert len(list(folder.iterdir())) == 3


def test_what_jax_had_kept_is_not_kept_again(folder):
    """Two runs whose programs are the same and their identities not, each given twice.

    On a CPU, XLA writes down a program that it has not compiled itself without its functions.
    """

    def step(w):
        for k in range(4):
            w = jnp.sin(w @ w + k) / (1 + jnp.abs(w)).mean()
        return w

    mesh = sharding.get_mesh("data", jax.devices()[:1])
    before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        found = []
        for identity in ["one", "two"] * 2:
            jax.clear_caches()
            found.append(KeptProgram(jax.jit(step), mesh, identity)(jnp.ones((8, 8))))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    for x in found[1:]:
        np.testing.assert_array_equal(x, found[0])
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LDM_JAX_KERNELS"])
def test_another_environment_is_another_program(folder, monkeypatch, name):
    assert count_traces() == 1
    monkeypatch.setenv(name, os.environ.get(name, "") + " ")
    assert [count_traces(), count_traces()] == [1, 0]


def test_another_source_or_setting_of_jax_is_another_program(folder, monkeypatch):
    assert count_traces() == 1
    with jax.default_matmul_precision("highest"):
        assert [count_traces(), count_traces()] == [1, 0]
    monkeypatch.setattr(programs, "CODE", "one line is another")
    assert [count_traces(), count_traces()] == [1, 0]


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-1], lambda x: x[:99] + b"?" + x[100:], lambda x: b""]
)
def test_a_damaged_program_is_named_and_removed(folder, damage):
    assert count_traces() == 1
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    told = f"{path.name} does not load, and is removed: its digest is another"
    with pytest.warns(UserWarning, match=told):
        assert count_traces() == 1
    assert count_traces() == 0


def test_a_program_that_xla_does_not_take_is_named_and_removed(folder):
    assert count_traces() == 1
    (path,) = folder.iterdir()
    content = path.read_bytes()[programs.DIGEST_BYTES :].replace(b"exec", b"file")
    path.write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.warns(UserWarning, match=f"{path.name} does not load, and is removed"):
        assert count_traces() == 1
    assert count_traces() == 0


def test_a_folder_that_cannot_be_written_to_is_named_and_the_run_goes_on(folder):
    folder.touch()
    with pytest.warns(UserWarning, match="the program could not be kept as .*programs/"):
        assert count_traces() == 1
    assert folder.is_file()


def test_a_program_that_is_not_kept_whole_leaves_nothing(folder, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="could not be kept as .*: no space left"):
        assert count_traces() == 1
    assert not any(folder.iterdir())


def test_the_programs_used_longest_ago_go_beyond_the_limit(folder, monkeypatch):
    assert count_traces(identity="one") == 1
    (path,) = folder.iterdir()
    monkeypatch.setattr(programs, "MAX_BYTES", int(path.stat().st_size * 2.5))
    assert count_traces(identity="two") == 1
    for age, file in enumerate(sorted(folder.iterdir(), key=lambda file: file == path)):
        os.utime(file, (100 - age, 100 - age))  # "one" is the older one,
    assert count_traces(identity="one") == 0  # and is used,
    assert count_traces(identity="three") == 1  # so that "two" has to go.
    assert len(list(folder.iterdir())) == 2 and path.exists()
    assert [count_traces(identity=name) for name in ("one", "three", "two")] == [0, 0, 1]


def test_nothing_is_kept_where_jax_keeps_nothing_or_several_processes_run(folder, monkeypatch):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert [count_traces(), count_traces()] == [1, 1]
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [count_traces(), count_traces()] == [1, 1]
    assert not folder.exists()


@pytest.mark.parametrize("name", ["jax_debug_nans", "jax_disable_jit"])
def test_nothing_is_kept_where_jax_looks_for_errors(folder, name):
    jax.config.update(name, True)
    try:
        assert count_traces() >= 1
    finally:
        jax.config.update(name, False)
    assert not folder.exists()


def test_a_folder_that_can_only_be_read_serves_as_well(folder, monkeypatch):
    assert count_traces() == 1

    def fail(path):
        raise PermissionError(f"read-only: {path}")

    monkeypatch.setattr(os, "utime", fail)
    assert count_traces() == 0


def test_a_program_beyond_the_limit_is_not_written(folder, monkeypatch):
    monkeypatch.setattr(programs, "MAX_BYTES", 100)
    assert [count_traces(), count_traces()] == [1, 1]
    assert not folder.exists()


def test_a_function_that_is_no_jit_is_called_as_it_is(folder):
    assert KeptProgram(lambda x: x + 1, MESH, "one")(2) == 3
    assert not folder.exists()


def test_arguments_of_another_shape_are_refused(folder):
    program = KeptProgram(jax.jit(lambda x: x + 1), MESH, "one")
    program(jnp.ones(2))
    with pytest.raises(TypeError, match="float32"):
        program(jnp.ones(3))
