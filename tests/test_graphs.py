"""Options for CUDA graphs. Here there is no GPU: XLA's CPU compiler checks that it knows them."""

import jax
import pytest

from ldm_jax import graphs


@pytest.fixture
def on_gpu(monkeypatch):
    """JAX says that it runs on a GPU, and nothing has been tried on it yet."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    graphs._can_record_convolutions.cache_clear()
    yield
    graphs._can_record_convolutions.cache_clear()


def test_a_cpu_has_no_graphs():
    assert graphs.get_options(jax.devices()[0]) is None


def test_a_gpu_records_convolutions(on_gpu):
    options = graphs.get_options(jax.devices()[0])
    assert options == {graphs.FLAG: graphs.RECORDED} and "CONVOLUTION" in graphs.RECORDED
    # jit takes them, and XLA knows their names: of others it says so.
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_what_xla_flags_say_counts(on_gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{graphs.FLAG}=")
    assert graphs.get_options(jax.devices()[0]) is None


def test_devices_of_others_get_no_options(on_gpu):
    assert graphs.get_options("a chip of a topology") is None


def test_where_recording_fails_training_goes_on_without(on_gpu, monkeypatch):
    monkeypatch.setattr(graphs, "RECORDED", "FUSION,WISHES")
    with pytest.warns(UserWarning, match="without convolutions in CUDA graphs: .*WISHES"):
        assert graphs.get_options(jax.devices()[0]) is None
