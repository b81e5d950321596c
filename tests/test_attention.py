"""Attention against a literal softmax; its kernels, run by Pallas' interpreter, against XLA."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from stand_ins import as_on_a_gpu, count_lowered, needs_triton

from ldm_jax import attention, attention_kernels, group_kernels, tiles
from ldm_jax.attention import attend, attend_projected
from ldm_jax.latents import LatentScale
from ldm_jax.noising import ForwardProcess
from ldm_jax.sharding import AXES, get_mesh
from ldm_jax.training import get_loss
from ldm_jax.unet import get_network


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax_attention(q, k, v, heads=1, scaled=False, mask=None):
    """Each key's position looks at the queries' positions, by loops and in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros((len(k), k.shape[1], v.shape[2]))
    depth, width = k.shape[2] // heads, v.shape[2] // heads
    for i in range(len(k)):
        for h in range(heads):
            part, channels = slice(h * depth, (h + 1) * depth), slice(h * width, (h + 1) * width)
            logits = k[i][:, part] @ q[i][:, part].T / (np.sqrt(depth) if scaled else 1)
            weights = np.exp(logits) * (1 if mask is None else mask[i])
            out[i][:, channels] = weights / weights.sum(1, keepdims=True) @ v[i][:, channels]
    return out


@pytest.mark.parametrize("heads, scaled", [(1, False), (1, True), (4, False), (2, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_a_literal_softmax(heads, scaled, masked):
    q, k, v = draw(2, 5, 8), draw(2, 7, 8, seed=1), draw(2, 5, 12, seed=2)
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool) if masked else None
    expected = softmax_attention(q, k, v, heads, scaled, mask)
    result = jax.jit(attend, static_argnames=["heads", "scaled"])(
        q, k, v, heads=heads, scaled=scaled, mask=mask
    )
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(
        attend(q, k, v, heads=heads, scaled=scaled, mask=mask), expected, atol=1e-5
    )


@pytest.mark.parametrize("heads, scaled", [(1, False), (2, True)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_attend_s_gradient_is_that_of_the_softmax(heads, scaled, masked, dtype, tolerance):
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool) if masked else None
    drawn = draw(2, 5, 8), draw(2, 7, 8, seed=1), draw(2, 5, 12, seed=2)
    rounded = [jnp.asarray(x, dtype) for x in drawn]
    weights = draw(2, 7, 12, seed=3)

    def literal(q, k, v):
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
        logits = jnp.einsum("bphd,bnhd->bhpn", k, q) / (math.sqrt(q.shape[-1]) if scaled else 1)
        logits = logits if mask is None else jnp.where(mask[:, None, None], logits, -jnp.inf)
        y = jnp.einsum("bhpn,bnhc->bphc", jax.nn.softmax(logits), v)
        return jnp.sum(weights * y.reshape(weights.shape))

    def ours(q, k, v):
        return jnp.sum(weights * attend(q, k, v, heads=heads, scaled=scaled, mask=mask))

    expected = jax.grad(literal, (0, 1, 2))(*(jnp.float32(x) for x in rounded))
    for found, exact in zip(jax.grad(ours, (0, 1, 2))(*rounded), expected, strict=True):
        assert found.dtype == dtype
        scale = np.abs(exact).max()
        np.testing.assert_allclose(np.float32(found), exact, atol=tolerance * scale)


def test_attention_keeps_its_weights_for_the_gradient_and_no_logits():
    q, k, v = (jnp.bfloat16(draw(2, 5, 8, seed=seed)) for seed in range(3))
    _, pullback = jax.vjp(attend, q, k, v)
    kept = [x for x in jax.tree.leaves(pullback) if x.shape == (2, 1, 5, 5)]
    assert [x.dtype for x in kept] == [jnp.bfloat16]


def test_attention_computes_its_softmax_in_float32():
    q, k, v = draw(1, 64, 64), draw(1, 64, 64, seed=1), np.ones((1, 64, 2), np.float32)
    result = attend(*(jnp.bfloat16(x) for x in (q, k, v)))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(result), 1.0, atol=1e-2)  # The weights sum to one.


def test_masked_positions_get_no_gradient_and_no_nan():
    q, k, v = draw(1, 3, 4), draw(1, 2, 4, seed=1), draw(1, 3, 4, seed=2)
    mask = np.array([[True, True, False]])
    loss = lambda q, v: jnp.sum(attend(q, k, v, mask=mask) ** 2)  # noqa: E731
    for gradient in jax.grad(loss, argnums=(0, 1))(q, v):
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[0, 2], 0)


@pytest.mark.parametrize("heads, scaled", [(1, False), (1, True), (4, True)])
def test_what_is_projected_at_once_is_attended_to_as_its_parts_are(heads, scaled):
    projected, bias = draw(2, 6, 2 * 8 + 12), draw(16, seed=1)
    q, k, v = np.split(projected, [8, 16], axis=-1)
    expected = softmax_attention(q + bias[:8], k + bias[8:], v, heads, scaled)
    run = jax.jit(attend_projected, static_argnames=["heads", "scaled"])
    found = run(projected, bias, heads=heads, scaled=scaled)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = attend_projected(projected, bias, heads=heads, scaled=scaled)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture
def by_kernels(monkeypatch):
    """Runs the branch for a GPU of our kernels, of any dtype, in Pallas' interpreter."""
    monkeypatch.setattr(attention_kernels, "can_run", lambda projected, inner, heads: True)
    monkeypatch.setattr(group_kernels, "can_run", lambda x: x.ndim == 4 and x.shape[1] >= 8)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x))


def derive(attend, projected, bias, dy, scaled, heads=1):
    """The result of `attend_projected` or its like, and both gradients."""
    run = partial(attend, scaled=scaled, heads=heads)
    y, pullback = jax.vjp(jax.jit(run), projected, bias)
    return y, *pullback(dy.astype(y.dtype))


def attend_literally(projected, bias, scaled, heads=1):
    """As XLA does by default, in float32, and derived by JAX, head by head."""
    inner = len(bias) // 2
    q, k, v = jnp.split(jnp.float32(projected), [inner, 2 * inner], axis=-1)
    q = q + bias[None, None, :inner]
    k = (k + bias[None, None, inner:]).astype(projected.dtype).astype(jnp.float32)
    results = []
    for q, k, v in zip(*(jnp.split(x, heads, axis=-1) for x in (q, k, v))):
        logits = k @ q.swapaxes(1, 2) / (math.sqrt(inner // heads) if scaled else 1)
        results.append(jax.nn.softmax(logits) @ v)
    return jnp.concatenate(results, axis=-1)


SIZES = [
    # Samples, their positions, heads, channels of keys and of values.
    (21, 4, 1, 16, 128),  # Sixteen samples to a block, and a part of a block.
    (5, 16, 1, 32, 256),
    (1, 16, 1, 16, 128),
    (3, 64, 1, 64, 384),
    (2, 64, 1, 128, 128),
    (3, 128, 1, 16, 128),
    (2, 256, 1, 32, 256),
    (5, 16, 1, 24, 176),  # Filled up with zeros to powers of two.
    (9, 16, 4, 4 * 48, 4 * 96),  # The recipe's.
    (3, 64, 4, 4 * 40, 4 * 80),
    (2, 256, 4, 4 * 24, 4 * 48),
    (2, 128, 2, 2 * 16, 2 * 136),
]


@needs_triton
@pytest.mark.parametrize("samples, positions, heads, inner, channels", SIZES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_kernels_attend_as_xla_does_and_so_do_their_gradients(
    by_kernels, samples, positions, heads, inner, channels, scaled, dtype, tolerance
):
    assert attention_kernels.fits(positions, inner // heads, channels // heads)
    projected = jnp.asarray(0.5 * draw(samples, positions, 2 * inner + channels), dtype)
    bias, dy = 0.5 * draw(2 * inner, seed=1), draw(samples, positions, channels, seed=2)
    dy = jnp.asarray(dy, dtype)
    arguments = projected, bias, dy, scaled, heads
    found = derive(attend_projected, *arguments)
    expected = derive(attend_literally, *arguments)
    assert [x.dtype for x in found] == [dtype, dtype, np.float32]
    for mine, exact in zip(found, expected, strict=True):
        exact = np.float32(exact)
        np.testing.assert_allclose(np.float32(mine), exact, atol=tolerance * np.abs(exact).max())
    if dtype == "bfloat16":  # And they round no more than XLA's do.
        xla = derive(attention._attend_by_xla, *arguments)
        # The bias' gradient is nearly all rounding: it is zero for queries.
        bounds = 1.2, 1.2, 1.6 if heads == 1 else 1.8
        for mine, others, exact, most in zip(found, xla, expected, bounds, strict=True):
            mine, others = (np.linalg.norm(np.float32(x - exact)) for x in (mine, others))
            assert mine < most * others


@needs_triton
@pytest.mark.parametrize("samples, positions", [(21, 4), (2, 64), (2, 128)])
@pytest.mark.parametrize("heads", [1, 2])
def test_kernels_return_the_logarithms_of_the_softmaxes_sums(samples, positions, heads):
    projected, key_bias = draw(samples, positions, 2 * 32 + 128), draw(32, seed=1)
    _, log_sums = attention_kernels.attend(projected, key_bias, 4.0, heads)
    q, k = np.float64(projected[..., :32]), np.float64(projected[..., 32:64]) + key_bias
    parts = zip(np.split(q, heads, axis=-1), np.split(k, heads, axis=-1))
    expected = [np.log(np.exp(k @ q.swapaxes(1, 2) / 4).sum(-1)).ravel() for q, k in parts]
    np.testing.assert_allclose(log_sums, expected, atol=1e-5)


@needs_triton
def test_kernels_take_large_logits(by_kernels):
    projected, bias = 8 * draw(2, 64, 2 * 16 + 128), draw(32, seed=1)
    dy = draw(2, 64, 128, seed=2)
    found = derive(attend_projected, projected, bias, dy, False)
    expected = derive(attend_literally, projected, bias, dy, False)
    for mine, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, exact, atol=1e-3 * np.abs(exact).max())


@needs_triton
@pytest.mark.parametrize("positions", [16, 128])
def test_kernels_map_over_batches(by_kernels, positions):
    projected, bias = draw(3, 2, positions, 2 * 16 + 128), draw(3, 32, seed=1)
    dy = draw(3, 2, positions, 128, seed=2)
    run = partial(derive, attend_projected, scaled=True)
    found = jax.vmap(run)(projected, bias, dy)
    expected = [run(*arguments) for arguments in zip(projected, bias, dy)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "positions, keys, values, fit",
    [
        (4, 16, 128, True),
        (64, 80, 640, True),
        (256, 24, 48, True),
        (64, 128, 1024, True),
        (64, 129, 256, False),
        (12, 16, 128, False),
        (1, 16, 128, False),
        (2, 16, 128, False),
        (128, 32, 256, True),
        (128, 32, 257, False),
        (128, 64, 512, False),
        (256, 65, 256, False),
        (512, 16, 128, False),
    ],
)
def test_kernels_refuse_sizes_that_they_are_not_for(positions, keys, values, fit):
    assert attention_kernels.fits(positions, keys, values) == fit


def test_kernels_run_in_bfloat16_where_the_gpus_can(monkeypatch):
    can_run = lambda dtype, heads: attention_kernels.can_run(  # noqa: E731
        jax.ShapeDtypeStruct((2, 128, 2 * 192 + 512), dtype), 192, heads
    )
    assert not can_run(jnp.bfloat16, 2)
    monkeypatch.setattr(tiles, "are_possible", lambda: True)
    assert can_run(jnp.bfloat16, 4) and not can_run(jnp.float32, 4)
    assert not can_run(jnp.bfloat16, 1)  # A head is too wide.


def spread_over_devices(run):
    """`run`, of a projection in parts and a bias on all of eight devices, with its gradients."""

    def on_a_device(projected, bias, dy):
        y, pullback = jax.vjp(run, projected, jax.lax.pcast(bias, AXES, to="varying"))
        d_projected, d_bias = pullback(dy)
        return y, d_projected, jax.lax.psum(d_bias, AXES)

    part, whole = PartitionSpec(AXES), PartitionSpec()
    return jax.shard_map(
        on_a_device,
        mesh=get_mesh("data=2,fsdp=4"),
        in_specs=(part, whole, part),
        out_specs=(part, part, whole),
        check_vma=True,
    )


def test_spread_by_hand_they_are_those_of_one_device(monkeypatch):
    monkeypatch.setattr(attention_kernels, "can_run", lambda projected, inner, heads: True)
    projected, bias = draw(16, 16, 2 * 16 + 128), draw(32, seed=1)
    dy = draw(16, 16, 128, seed=2)
    found = jax.jit(spread_over_devices(attend_projected))(projected, bias, dy)
    expected = derive(attend_literally, projected, bias, dy, False)
    for mine, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, exact, atol=1e-5 * np.abs(exact).max())


@needs_triton
def test_spread_by_hand_they_lower_to_kernels_on_a_gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)
    shapes = [((16, 64, 160), "bfloat16"), ((32,), "float32"), ((16, 64, 128), "bfloat16")]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    assert count_lowered(spread_over_devices(attend_projected), arguments) == 2


def create_loss(latent_image_size, train=True, **fields):
    """A small network's loss, and its arguments; no weight is zero."""
    network = get_network(latent_image_size, 1, 6, **{"widths": (128, 128), **fields})
    size = latent_image_size
    inputs = draw(2, size, size, 4), np.float32([0.2, 0.7]), draw(2, 6, seed=1)
    variables = jax.jit(network.init)(jax.random.key(0), *inputs)
    scale = LatentScale(np.ones(4, np.float32), np.zeros(4, np.float32))
    loss = get_loss(network, scale, ForwardProcess(), label_dropout=0.1, train=train)
    batch = {"latents_mean": inputs[0], "text_embeddings": inputs[2]}
    rng = np.random.default_rng(3)
    variables["params"] = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), variables["params"]
    )
    return loss, (variables["params"], variables.get("batch_stats", {}), jax.random.key(0), batch)


RECIPE = {"norm": "group", "conditioning": "adaptive", "heads": 2, "dropout": 0.3}


@needs_triton
@pytest.mark.parametrize(
    "size, fields, kernels",
    [
        (8, {}, 4),
        (8, {"conditioning": "adaptive"}, 4),
        (16, RECIPE, 4 + 20),  # Ten norms.
        (16, RECIPE | {"remat": True}, 6 + 30),
    ],
)
def test_a_training_step_by_kernels_has_the_loss_and_gradients_of_one_by_xla(
    by_kernels, monkeypatch, size, fields, kernels
):
    def derive():
        loss, arguments = create_loss(size, scaled=True, **fields)
        step = jax.value_and_grad(loss, has_aux=True)
        calls = str(jax.make_jaxpr(step)(*arguments)).count("pallas_call[")
        return calls, jax.jit(step)(*arguments)

    calls, found = derive()
    monkeypatch.setattr(attention_kernels, "can_run", lambda projected, inner, heads: False)
    monkeypatch.setattr(group_kernels, "can_run", lambda x: False)
    none, expected = derive()
    assert (calls, none) == (kernels, 0)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5 if size == 8 else 1e-4)
    for mine, exact in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        # Some gradients, as of queries' biases, are zero but for rounding.
        assert np.linalg.norm(mine - exact) < 1e-4 * (1 + np.linalg.norm(exact))


@needs_triton
@pytest.mark.parametrize(
    "fields, kernels",
    [
        ({}, 4),  # Two attentions, of 8 x 8 and 16 x 16, forward and back.
        ({"norm": "group"}, 18),  # And seven norms.
        (RECIPE, 24),
        ({"remat": True}, 6),
        ({"heads": 2}, 4),
        ({"dtype": "float32"}, 0),
        ({"widths": (128, 160)}, 4),
    ],
)
def test_a_training_step_attends_by_kernels_on_a_gpu_alone(monkeypatch, fields, kernels):
    as_on_a_gpu(monkeypatch)
    loss, arguments = create_loss(16, **{"dtype": "bfloat16", **fields})
    step = jax.value_and_grad(loss, has_aux=True)
    assert count_lowered(step, arguments) == kernels
    assert count_lowered(step, arguments, "cpu") == 0
    held_out, _ = create_loss(16, train=False, **{"dtype": "bfloat16", **fields})
    assert count_lowered(held_out, arguments) == 0  # Its arrays may be split without shard_map.
