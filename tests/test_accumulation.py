"""A batch in parts gives the numbers of the whole batch, on one device and on eight."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from ldm_jax import sharding
from ldm_jax.accumulation import get_value_and_grad
from ldm_jax.feed import shard_batch
from ldm_jax.latents import LatentScale
from ldm_jax.noising import ForwardProcess
from ldm_jax.norms import batch_places, microbatch
from ldm_jax.training import create_train_state, get_train_step
from ldm_jax.unet import get_network

SAMPLES = 32
RNG = np.random.default_rng(0)
BATCH = {
    "latents_mean": RNG.standard_normal((SAMPLES, 4, 4, 4)).astype(np.float32),
    "latents_std": np.full((SAMPLES, 4, 4, 4), 0.1, np.float32),
    "text_embeddings": RNG.standard_normal((SAMPLES, 6)).astype(np.float32),
}


CHOICES = {  # Fields of the network; the process; what is minimised.
    "default": ({}, ForwardProcess(), {}),
    "other": (
        {"conditioning": "adaptive", "norm": "rms"},
        ForwardProcess(noise_law="log_normal", target="velocity"),
        {"loss": "mse", "loss_weighting": "min_snr"},
    ),
}


def step_once(
    accumulate, layout=None, parallelism="jit", choices="default", norm="group", **fields
):
    """State and metrics after a step from the same weights: dropout, noise and texts are drawn."""
    chosen, process, objective = CHOICES[choices]
    options = {"norm": norm, "text_features": 32, "dropout": 0.3} | chosen | fields
    network = get_network(4, 1, 6, widths=(16, 32), heads=2, **options)
    optimizer = optax.sgd(0.5)
    mesh = sharding.get_mesh(layout) if layout else None

    def create(key):
        state = create_train_state(key, network, optimizer, (4, 4, 4), (6,))
        # The last layer starts at zero, which would keep all others still.
        state.params["conv_out"]["kernel"] += 0.1
        return state

    state = sharding.compile_creation(create, mesh)(jax.random.key(0))
    step = get_train_step(
        network,
        optimizer,
        LatentScale(2.0),
        process,
        label_dropout=0.3,
        **objective,
        accumulate=accumulate,
        mesh=mesh,
        parallelism=parallelism,
    )
    batch = shard_batch(mesh, BATCH) if mesh else BATCH
    return jax.device_get(step(state, jax.random.key(1), batch))


@pytest.fixture(scope="module")
def whole():
    return {choices: step_once(1, choices=choices) for choices in CHOICES}


@pytest.mark.slow
@pytest.mark.parametrize(
    "accumulate, layout, parallelism, choices, fields",
    [
        (4, None, "jit", "default", {}),
        (2, "data", "jit", "default", {"remat": True}),
        (4, "fsdp", "jit", "default", {}),
        (2, "data=4,fsdp=2", "jit", "default", {}),
        (4, "data", "pmap", "default", {}),
        (2, "data=4,fsdp=2", "jit", "other", {"remat": True}),
        (2, "data", "pmap", "other", {"remat": True, "dtype": "bfloat16"}),
    ],
)
def test_parts_give_the_numbers_of_the_whole_batch(
    whole, accumulate, layout, parallelism, choices, fields
):
    expected_state, expected = whole[choices]
    state, metrics = step_once(accumulate, layout, parallelism, choices, **fields)
    assert expected["grad_norm"] > 0.1
    # Another dropout mask, noise or text would show in the second digit.
    if "dtype" in fields:
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=5e-3)
        np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-2)
        chex.assert_trees_all_close(state, expected_state, atol=2e-2)
    else:
        chex.assert_trees_all_close(metrics, expected, rtol=1e-5)
        chex.assert_trees_all_close(state, expected_state, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_batch_norms_see_a_part_and_their_running_statistics_the_mean_of_all():
    # Without dropout or noise in what the first norm sees, its mean is that of the whole batch.
    (state, metrics), (whole, expected) = (
        step_once(parts, norm="batch", dropout=0.0) for parts in (2, 1)
    )
    assert metrics["loss"] != expected["loss"]
    first, reference = (
        s.batch_stats["down_0"]["unit_0"]["residual"]["norm"] for s in (state, whole)
    )
    chex.assert_trees_all_close(first["mean"], reference["mean"], rtol=1e-4, atol=1e-7)
    # The variance of the whole is the mean of the parts' and that between the parts.
    missing = reference["var"] - first["var"]
    assert -1e-7 < missing.min() and 1e-7 < missing.max() < 1e-3


def mean_square(params, batch_stats, rng, batch):
    return jnp.mean(jnp.square(batch["x"] @ params["w"])), {"mean": jnp.mean(batch["x"])}


def test_gradients_of_reduced_precision_are_added_up_in_float32():
    # In bfloat16, 256 + 1 is 256 again: ones added to it one by one would be lost.
    x = jnp.ones((257, 1), jnp.bfloat16).at[0].set(256.0)
    params = {"w": jnp.ones((1,), jnp.bfloat16)}

    def mean(params, batch_stats, rng, batch):
        return jnp.mean(batch["x"] @ params["w"]), {}

    _, gradient = get_value_and_grad(mean, 257)(params, {}, jax.random.key(0), {"x": x})
    assert gradient["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(float(gradient["w"][0]), 512 / 257, rtol=2**-8)


@pytest.mark.parametrize("unroll", [False, True])
def test_loss_statistics_and_gradient_are_those_of_numpy(unroll):
    x = np.float32(RNG.standard_normal((12, 3)))
    w = np.float32([1, -2, 3])
    run = jax.jit(get_value_and_grad(mean_square, 4, unroll))
    (loss, statistics), gradient = run({"w": w}, {"mean": 0.0}, jax.random.key(0), {"x": x})
    np.testing.assert_allclose(loss, np.mean((x @ w) ** 2), rtol=1e-6)
    np.testing.assert_allclose(statistics["mean"], x.mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], 2 * x.T @ (x @ w) / 12, rtol=1e-5)


def test_a_step_on_a_cpu_writes_its_parts_out():
    # XLA runs gradients of convolutions 60 times slower in a CPU's loops.
    network = get_network(4, 1, 6, widths=(16, 32))
    optimizer = optax.sgd(0.5)
    state = create_train_state(jax.random.key(0), network, optimizer, (4, 4, 4), (6,))
    written_out = []
    for unroll in (None, False):
        step = get_train_step(network, optimizer, LatentScale(2.0), accumulate=4, unroll=unroll)
        program = jax.make_jaxpr(step)(state, jax.random.key(1), BATCH)
        (loop,) = [e for e in find_scans(program.jaxpr) if "conv_general_dilated" in str(e)]
        written_out.append(loop.params["unroll"])
    assert written_out == [4, 1]


def find_scans(jaxpr):
    """All loops of a program, with those inside of others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from find_scans(inner)


def test_places_of_a_part_are_those_in_the_whole_batch():
    with microbatch(jnp.int32(4), 8):
        assert batch_places(2).tolist() == [4, 5]
    assert batch_places(2).tolist() == [0, 1]


def test_devices_exchange_gradients_once_a_step():
    mesh = sharding.get_mesh("data")
    counts = []
    for parts in (1, 2):
        run = sharding.get_gradients(get_value_and_grad(mean_square_alone, parts), mesh)
        batch = shard_batch(mesh, {"x": np.ones((16, 128), np.float32)})
        text = jax.jit(run).lower({"w": np.ones(128, "f")}, {}, jax.random.key(0), batch).as_text()
        counts.append(text.count("stablehlo.all_reduce"))
    assert counts[0] == counts[1] > 0


def mean_square_alone(params, batch_stats, rng, batch):
    return mean_square(params, batch_stats, rng, batch)[0], batch_stats


def test_parts_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        get_value_and_grad(mean_square, 0)
    run = get_value_and_grad(mean_square, 3)
    with pytest.raises(ValueError, match="divisible by accumulate=3, got 8 samples"):
        run({"w": jnp.ones(2)}, {}, jax.random.key(0), {"x": jnp.ones((8, 2))})
