"""What crosses between eight virtual devices when they add up their gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import sharding
from ldm_jax.accumulation import get_value_and_grad
from ldm_jax.feed import shard_batch


def compiled_step(layout, reduce_dtype, dtype="bfloat16"):
    """The optimised program of a step on eight devices, as text."""
    mesh = sharding.get_mesh(layout)
    w = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    w = sharding.place_shapes(mesh, {"w": w})

    def loss_fn(params, batch_stats, rng, batch):
        y = batch["x"].astype(dtype) @ params["w"].astype(dtype)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), batch_stats

    def gradients(params, batch):
        run = sharding.get_gradients(get_value_and_grad(loss_fn), mesh, reduce_dtype=reduce_dtype)
        return run(params, {}, jax.random.key(0), batch)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding.batch_sharding(mesh))
    return jax.jit(gradients).lower(w, {"x": x}).as_text()


@pytest.mark.parametrize("layout, operation", [("data", "all_reduce"), ("fsdp", "reduce_scatter")])
@pytest.mark.parametrize("reduce_dtype, short", [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_are_added_up_in_the_dtype_that_was_chosen(
    layout, operation, reduce_dtype, short
):
    # The computation is bfloat16 either way.
    text = compiled_step(layout, reduce_dtype)
    assert "tensor<8x128xbf16>" in text
    bodies = text.split(f"stablehlo.{operation}")[1:]
    results = [body.split("->")[1].split("\n")[0] for body in bodies if "->" in body]
    shape = f"{128 * 128}" if layout == "data" else "128x16"  # In a bucket; or this device's part.
    [weights] = [result for result in results if f"<{shape}x" in result]
    assert f"x{short}>" in weights


@pytest.mark.parametrize(
    "sizes, most, buckets",
    [
        ([4, 3, 2, 1], 5, [[3, 2], [1], [0]]),
        ([4, 3, 2, 1], 10, [[3, 2, 1, 0]]),
        ([4, 30, 2], 5, [[2], [1], [0]]),
        ([4, 3], 0, [[1], [0]]),
        ([], 5, []),
    ],
)
def test_buckets_are_filled_from_the_last_gradient_on(sizes, most, buckets):
    assert sharding._fill_buckets(sizes, most) == buckets


@pytest.mark.parametrize("layout", ["data", "data=2,fsdp=4"])
def test_gradients_in_buckets_are_those_of_one_device(layout, monkeypatch):
    shapes = {"a": (128, 64), "b": (64,), "c": (3, 5), "d": ()}  # With FSDP, the first is split.
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    batch = {"x": rng.standard_normal((16, 128), np.float32)}

    def loss_fn(params, batch_stats, rng, batch):
        y = jnp.sin(batch["x"] @ params["a"]) * params["b"][None] + params["d"]
        return jnp.mean(jnp.square(y)) * jnp.sum(jnp.square(params["c"])), batch_stats

    expected = jax.grad(lambda params: loss_fn(params, {}, None, batch)[0])(params)
    mesh = sharding.get_mesh(layout)
    together = 1 if layout == "data" else 2  # What is split goes another way.
    for most, messages in ((0, 4), (400, 2), (10**6, together)):  # b, c and d are 320 bytes.
        monkeypatch.setattr(sharding, "BUCKET_BYTES", most)
        run = jax.jit(sharding.get_gradients(get_value_and_grad(loss_fn), mesh))
        text = run.lower(params, {}, jax.random.key(0), batch).as_text()
        assert text.count("stablehlo.all_reduce") == messages + 1  # The loss.
        _, grads = run(params, {}, jax.random.key(0), shard_batch(mesh, batch))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, expected)


def test_a_sum_in_bfloat16_is_rounded_and_one_in_float32_is_not():
    mesh = sharding.get_mesh("data")

    def loss_fn(params, batch_stats, rng, batch):
        return jnp.sum(params["w"] * batch["x"]), batch_stats

    x = np.full((8, 1), 1 / 3, np.float32)
    x[0] = 100.0
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = jax.jit(sharding.get_gradients(get_value_and_grad(loss_fn), mesh, reduce_dtype=dtype))
        batch = shard_batch(mesh, {"x": x})
        _, gradient = run({"w": jnp.zeros((1, 1))}, {}, jax.random.key(0), batch)
        found[dtype] = float(gradient["w"][0, 0])
    exact = (100 + 7 / 3) / 8
    assert abs(found["float32"] - exact) < 1e-5
    assert 1e-3 < abs(found["bfloat16"] - exact) < 0.1
