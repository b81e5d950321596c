"""A folded network estimates what the network itself does."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from stand_ins import count_triton_calls, lower_for

from ldm_jax import estimating, folding, kernels, sampler, tiles
from ldm_jax.noising import TARGETS, ForwardProcess
from ldm_jax.unet import get_network

FIELDS = {
    "latent_image_size": 16,
    "widths": (16, 24, 32, 40),
    "block_depth": 2,
    "emb_size": 12,
}

FIELDS_BY_KERNELS = FIELDS | {"widths": (16, 32, 48, 64), "block_depth": 1}


def create_variables(network, tokens=(), seed=0):
    """Variables as training leaves them: no statistic, scale, bias or last kernel is trivial."""
    inputs = jnp.zeros((1, 16, 16, 4)), jnp.zeros(1), jnp.ones((1, *tokens, 12))
    shapes = jax.eval_shape(network.init, jax.random.key(seed), *inputs)
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        name, noise = path[-1].key, rng.normal(size=shape.shape).astype(np.float32)
        if name in ("var", "scale"):  # Small scales: unscaled attention soon turns chaotic.
            return jnp.exp(0.3 * noise) * (0.5 if name == "scale" else 1.0)
        if name in ("mean", "bias"):
            return jnp.asarray(0.3 * noise)
        of_inputs = np.sqrt(np.prod(shape.shape[:-1]))
        return jnp.asarray(0.1 * noise if path[1].key == "conv_out" else noise / of_inputs)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_inputs(samples=3, tokens=()):
    rng = np.random.default_rng(1)
    x_t = jnp.asarray(rng.normal(size=(samples, 16, 16, 4)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(samples, *tokens, 12)), jnp.float32)
    return x_t, jnp.stack([text, jnp.zeros_like(text)])


def estimate_plainly(network, variables, x_t, labels, level):
    """Of each set of labels, by the network as it is."""
    levels, apply = jnp.full(len(x_t), level), jax.jit(network.apply)
    return jnp.stack([apply(variables, x_t, levels, text) for text in labels])


def estimate_folded(network, variables, x_t, labels, level=0.4):
    """Of each set of labels, by the network folded."""

    @jax.jit
    def estimate(variables, x_t, labels, level):
        return estimating.get_estimator(network, variables, labels)(x_t, level)

    return estimate(variables, x_t, labels, level)


def distance(found, expected):
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


@pytest.mark.parametrize("rows", [0, 10**6])
@pytest.mark.parametrize("tokens", [(), (1,)])
def test_folded_network_equals_the_network(monkeypatch, rows, tokens):
    monkeypatch.setitem(estimating.MATRIX_ROWS, "cpu", rows)  # Convolutions, then products.
    network = get_network(**FIELDS)
    variables = create_variables(network)
    x_t, labels = draw_inputs(tokens=tokens)
    assert folding.can_fold(network, labels)
    found = estimate_folded(network, variables, x_t, labels)
    chex.assert_shape(found, (2, 3, 16, 16, 4))
    assert distance(found, estimate_plainly(network, variables, x_t, labels, 0.4)) < 1e-5


@pytest.mark.parametrize("enough, sets", [(1, 1), (1, 2), (10**6, 2), (10**6, 3)])
def test_by_kernels_it_is_the_same_network(monkeypatch, enough, sets):
    network = get_network(**FIELDS_BY_KERNELS)
    variables, (x_t, labels) = create_variables(network), draw_inputs()
    labels = jnp.concatenate([labels, 2 * labels])[:sets]
    calls = count_kernels(monkeypatch, enough)
    found = estimate_folded(network, variables, x_t, labels)
    assert distance(found, estimate_plainly(network, variables, x_t, labels, 0.4)) < 1e-5
    # Two convolutions for each unit but that of 2 x 2; attention for all but the first level's.
    assert calls == {"convolve": 2 * 6, "attend": 6, "upsample": 3}


def test_by_kernels_its_gradient_is_the_same(monkeypatch):
    network = get_network(**FIELDS_BY_KERNELS)
    variables, (x_t, labels) = create_variables(network), draw_inputs()

    def differentiate():
        def loss(variables, x_t, labels):
            return jnp.mean(estimating.get_estimator(network, variables, labels)(x_t, 0.4) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(variables, x_t, labels)

    expected = differentiate()
    count_kernels(monkeypatch)
    chex.assert_trees_all_close(differentiate(), expected, rtol=1e-4, atol=1e-5)


def test_by_kernels_it_maps_over_batches(monkeypatch):
    network = get_network(**FIELDS_BY_KERNELS)
    variables, (x_t, labels) = create_variables(network), draw_inputs()
    count_kernels(monkeypatch)
    batches, levels = jnp.stack([x_t, 0.5 * x_t]), jnp.array([0.4, 0.8])
    run = lambda x_t, level: estimate_folded(network, variables, x_t, labels, level)  # noqa: E731
    found = jax.vmap(run)(batches, levels)
    for i, level in enumerate(levels):
        expected = estimate_plainly(network, variables, batches[i], labels, level)
        assert distance(found[i], expected) < 1e-5


def count_kernels(monkeypatch, enough=kernels.BLOCKS):
    """Runs by kernels from here on, and counts them by name as they are traced."""
    calls = dict.fromkeys(("convolve", "attend", "upsample"), 0)

    def count(name, function, *args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    for name in calls:
        monkeypatch.setattr(kernels, name, partial(count, name, getattr(kernels, name)))
    monkeypatch.setattr(kernels, "BLOCKS", enough)
    monkeypatch.setattr(kernels, "can_run", lambda network: True)
    operations = estimating.BY_KERNELS._replace(upsample=kernels.upsample)
    ways = (partial(estimating._run, way) for way in (operations, estimating.BY_XLA))
    monkeypatch.setattr(estimating, "_run_by_either", tiles.choose(*ways))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x))
    return calls


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A process with a GPU, as far as it can be told before anything is compiled."""
    monkeypatch.setattr(kernels, "can_run", lambda network: True)
    monkeypatch.setattr(tiles, "interpret", lambda: False)


def count_operations(function, arguments, platform):
    """Of convolutions by XLA, and of kernels by Triton, in a program for this platform."""
    program = lower_for(function, arguments, platform)
    return [program.count("stablehlo.convolution("), count_triton_calls(program)]


def test_the_platform_of_a_program_decides_between_xla_and_kernels(as_on_a_gpu):
    network = get_network(**FIELDS_BY_KERNELS)
    variables, (x_t, labels) = create_variables(network), draw_inputs()
    estimate = estimating.get_estimator(network, variables, labels)
    by_xla, by_kernels = [2 * 6, 0], [0, 2 * 6 + 6 + 3]  # Convolutions, attentions, upsamplings.
    assert count_operations(estimate, (x_t, 0.4), "cpu") == by_xla
    assert count_operations(estimate, (x_t, 0.4), "cuda") == by_kernels
    differentiate = jax.grad(lambda x: jnp.sum(estimate(x, 0.4)))
    assert count_operations(differentiate, (x_t,), "cuda")[1] == 0


@pytest.mark.parametrize("transform", [jax.jit, lambda estimate: estimate])
def test_beside_a_gpu_a_cpu_estimates_by_xla(as_on_a_gpu, transform):
    network = get_network(**FIELDS_BY_KERNELS)
    variables, (x_t, labels) = create_variables(network), draw_inputs()
    found = transform(estimating.get_estimator(network, variables, labels))(x_t, 0.4)
    assert distance(found, estimate_plainly(network, variables, x_t, labels, 0.4)) < 1e-5


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_of_a_mesh_estimate_for_their_own_pictures(as_on_a_gpu, check_vma):
    network = get_network(**FIELDS_BY_KERNELS)
    variables, (x_t, labels) = create_variables(network), draw_inputs(4)
    parts = PartitionSpec("data"), PartitionSpec(None, "data")

    @partial(
        jax.shard_map,
        mesh=jax.make_mesh((2,), ("data",), (AxisType.Auto,)),
        in_specs=(PartitionSpec(), *parts),
        out_specs=parts[1],
        check_vma=check_vma,
    )
    def estimate(variables, x_t, labels):
        return estimating.get_estimator(network, variables, labels)(x_t, 0.4)

    found = jax.jit(estimate)(variables, x_t, labels)
    assert distance(found, estimate_plainly(network, variables, x_t, labels, 0.4)) < 1e-5


def test_folding_in_bfloat16_is_as_close_to_float32_as_the_network_in_bfloat16():
    network, exact = get_network(**FIELDS, dtype="bfloat16"), get_network(**FIELDS)
    variables = create_variables(exact)
    x_t, labels = draw_inputs()
    expected = estimate_plainly(exact, variables, x_t, labels, 0.4)
    folded = estimate_folded(network, variables, x_t, labels)
    plain = estimate_plainly(network, variables, x_t, labels, 0.4)
    assert distance(folded, expected) < 1.2 * distance(plain, expected) < 0.03


@pytest.mark.parametrize("target", TARGETS)
def test_pictures_are_those_of_the_network_that_is_not_folded(target):
    network = get_network(**FIELDS)
    process = ForwardProcess(target=target)
    denoiser = sampler.Denoiser(network, create_variables(network), process)
    x_t, labels = draw_inputs()
    folded = sampler.get_diffuser(denoiser, diffusion_steps=6)
    unfolded = jax.tree_util.Partial(sampler.Denoiser.__call__, denoiser)
    plain = sampler.get_diffuser(unfolded, diffusion_steps=6)
    found = folded.reverse_diffusion(x_t, labels[0])
    assert distance(found, plain.reverse_diffusion(x_t, labels[0])) < 1e-4


@pytest.mark.parametrize("scaled", [False, True])
def test_a_velocity_becomes_the_estimate_of_x_zero_folded_or_not(scaled):
    network = get_network(**FIELDS, scaled=scaled)
    variables, (x_t, labels) = create_variables(network), draw_inputs()
    assert folding.can_fold(network, labels) != scaled
    velocity = estimate_plainly(network, variables, x_t, labels, 0.4)
    expected = np.sqrt(1 - 0.4**2) * x_t[None] - 0.4 * velocity
    denoiser = sampler.Denoiser(network, variables, ForwardProcess(target="velocity"))
    prepared = jax.jit(lambda x_t, labels: denoiser.prepare(labels)(x_t, 0.4))
    assert distance(prepared(x_t, labels), expected) < 1e-5
    unprepared = jax.jit(lambda x_t, text: denoiser(x_t, jnp.full(3, 0.4), text))
    assert distance(unprepared(x_t, labels[0]), expected[0]) < 1e-5


@pytest.mark.parametrize(
    "fields, tokens",
    [
        ({"norm": "group"}, ()),
        ({"norm": "rms"}, ()),
        ({"heads": 2}, ()),
        ({"scaled": True}, ()),
        ({"conditioning": "adaptive"}, ()),
        ({}, (2,)),
    ],
)
def test_other_networks_are_run_as_they_are(fields, tokens):
    widths = (16, 32) if "norm" in fields else (16, 24, 32, 40)
    fields = FIELDS | {"widths": widths, "noise_emb_dim": 16, "text_features": 16} | fields
    fields |= {"key_fraction": 4}
    network = get_network(**fields)
    variables = create_variables(network, tokens)
    x_t, labels = draw_inputs(tokens=tokens)
    assert not folding.can_fold(network, labels)
    denoiser = sampler.Denoiser(network, variables)
    found = jax.jit(lambda x_t, labels: denoiser.prepare(labels)(x_t, 0.4))(x_t, labels)
    expected = estimate_plainly(network, variables, x_t, labels, 0.4)
    assert distance(found, expected) < 1e-5
