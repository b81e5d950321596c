"""What crosses between eight virtual devices when they add up their gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import messages, sharding, training
from ldm_jax.accumulation import get_value_and_grad
from ldm_jax.feed import shard_batch
from ldm_jax.latents import LatentScale
from ldm_jax.unet import get_network


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
    assert messages._fill_buckets(sizes, most) == buckets


@pytest.mark.parametrize("dtype, short", [(None, "f32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("most", [0, 10**6])
def test_split_weights_travel_in_the_dtype_that_was_chosen(dtype, short, most, monkeypatch):
    monkeypatch.setattr(messages, "BUCKET_BYTES", most)
    mesh = sharding.get_mesh("fsdp")
    params = {name: jnp.ones((64, 128)) for name in "ab"} | {"small": jnp.ones((8,))}
    batch = {"x": np.ones((8, 64), np.float32)}

    def loss_fn(params, batch_stats, rng, batch):
        assert all(weight.dtype == jnp.float32 for weight in params.values())
        y = batch["x"] @ (params["a"] + params["b"])
        return jnp.mean(y) + jnp.sum(params["small"]), batch_stats

    gradients = sharding.get_gradients(get_value_and_grad(loss_fn), mesh, gather_dtype=dtype)
    text = jax.jit(gradients).lower(params, {}, jax.random.key(0), batch).as_text()
    bodies = text.split("stablehlo.all_gather")[1:]
    results = [body.split("->")[1].split("\n")[0] for body in bodies]
    assert len(results) == (1 if most else 2) and all(f"x{short}>" in result for result in results)
    assert text.count("stablehlo.reduce_scatter") == len(results)


def test_weights_sent_in_the_dtype_of_the_layers_change_no_number():
    mesh, rng = sharding.get_mesh("data=2,fsdp=4"), np.random.default_rng(0)
    params = {"a": rng.standard_normal((64, 128), np.float32)}
    batch = shard_batch(mesh, {"x": rng.standard_normal((16, 64), np.float32)})

    def loss_fn(params, batch_stats, rng, batch):
        y = batch["x"].astype("bfloat16") @ params["a"].astype("bfloat16")
        return jnp.mean(jnp.sin(y.astype("float32"))), batch_stats

    found = []
    for dtype in (None, "bfloat16"):
        gradients = sharding.get_gradients(get_value_and_grad(loss_fn), mesh, gather_dtype=dtype)
        (loss, _), grads = jax.jit(gradients)(params, {}, jax.random.key(0), batch)
        found.append((float(loss), np.asarray(grads["a"])))
    assert found[0][0] == found[1][0] and np.any(found[0][1])
    np.testing.assert_array_equal(*(grads for _, grads in found))


def test_a_network_in_bfloat16_gathers_its_weights_so():
    mesh = sharding.get_mesh("fsdp")
    network = get_network(4, 1, 8, widths=(32, 64), dtype="bfloat16")
    optimizer = training.get_optimizer(steps=10)
    create = partial(
        training.create_train_state,
        network=network,
        optimizer=optimizer,
        latent_shape=(4, 4, 4),
        embedding_shape=(8,),
    )
    state = sharding.place_shapes(mesh, jax.eval_shape(create, jax.random.key(0)))
    split = [x for x in jax.tree.leaves(state.params) if any(x.sharding.spec)]
    step = training.get_train_step(network, optimizer, LatentScale(1.0), mesh=mesh)
    batch = {"latents_mean": jnp.ones((8, 4, 4, 4)), "text_embeddings": jnp.ones((8, 8))}
    text = step.lower(state, jax.random.key(0), batch).as_text()
    [gathered] = text.split("stablehlo.all_gather")[1:]
    total = sum(x.size for x in split)
    assert f"-> tensor<8x{total // 8}xbf16>" in gathered.split("\n")[0] and len(split) > 3


def test_what_is_cut_for_a_device_is_what_the_mesh_gives_it():
    mesh, x = sharding.get_mesh("data=2,fsdp=4"), np.arange(6 * 64 * 128.0).reshape(6, 64, 128)
    for whole in (x, x.transpose(0, 2, 1), x.transpose(1, 0, 2)):  # Split along 2, 1 and 2.
        spec = sharding.get_spec(mesh, whole.shape)
        axis = len(spec) - 1
        cut = messages._cut(whole, axis, 4)
        placed = jax.device_put(whole, jax.NamedSharding(mesh, spec))
        for shard in placed.addressable_shards:
            place = np.argwhere(mesh.devices == shard.device)[0][1]
            np.testing.assert_array_equal(cut[place], shard.data)
        np.testing.assert_array_equal(
            messages._join(cut.reshape(4, -1), cut.shape[1:], axis), whole
        )


@pytest.mark.parametrize("layout", ["data", "data=2,fsdp=4"])
def test_gradients_in_buckets_are_those_of_one_device(layout, monkeypatch):
    # With FSDP, the first and the last are split.
    shapes = {"a": (128, 64), "b": (64,), "c": (3, 5), "d": (), "e": (64, 128)}
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    batch = {"x": rng.standard_normal((16, 128), np.float32)}

    def loss_fn(params, batch_stats, rng, batch):
        y = jnp.sin(batch["x"] @ params["a"]) * params["b"][None] + params["d"]
        y = jnp.sin(y @ params["e"])
        return jnp.mean(jnp.square(y)) * jnp.sum(jnp.square(params["c"])), batch_stats

    expected = jax.grad(lambda params: loss_fn(params, {}, None, batch)[0])(params)
    mesh = sharding.get_mesh(layout)
    together = 1 if layout == "data" else 2  # What is split goes another way.
    for most, number in ((0, 5), (400, 3), (10**6, together)):  # b, c and d are 320 bytes.
        monkeypatch.setattr(messages, "BUCKET_BYTES", most)
        run = jax.jit(sharding.get_gradients(get_value_and_grad(loss_fn), mesh))
        text = run.lower(params, {}, jax.random.key(0), batch).as_text()
        assert text.count("stablehlo.all_reduce") == number + 1  # The loss.
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
