"""A training that starts from the weights of another one, with the scale that belongs to them."""

import json
import shutil
from functools import partial

import chex
import jax
import numpy as np
import optax
import pytest
from test_doors import draw_pictures, get_config

import encode
import train
from ldm_jax import checkpoint, exports, models, training
from ldm_jax.meta import SCALE, check_start
from ldm_jax.unet import get_network


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, their cache, a run of 20 steps and what it was exported to."""
    root = tmp_path_factory.mktemp("start")
    draw_pictures(root / "pictures")
    config = get_config(root, sample_every=0)
    encode.encode(config, progress=False)
    train.train(config, root / "run")
    for dtype in ("float16", "int8"):
        exports.export_model(models.load_model(root / "run"), root / dtype, dtype)
    return root


def get_next(root, **changes):
    """The config of a training on other pictures, whose latents have other statistics."""
    config = get_config(root, sample_every=0, steps=10, **changes)
    config.data.path, config.data.cache = str(root / "other"), str(root / "other_cache")
    config.latents.deviations = 2.0
    return config


@pytest.fixture(scope="module")
def other(root):
    draw_pictures(root / "other", n=30)
    encode.encode(get_next(root), progress=False)


@pytest.mark.parametrize(
    "source, mesh, parallelism",
    [("run", "data", "jit"), ("float16", "fsdp", "jit"), ("int8", "data", "pmap")],
)
def test_the_weights_and_the_scale_are_the_models(
    root, other, source, mesh, parallelism, tmp_path, capsys
):
    config = get_next(root, start_from=str(root / source))
    config.optimizer.learning_rate = 0.0
    config.sharding.mesh, config.sharding.parallelism = mesh, parallelism
    state = train.train(config, tmp_path)
    told = f"starting from {root / source}" + (", step 20" if source == "run" else "")
    assert told + "\n" in capsys.readouterr().out
    start, after = models.load_model(root / source), models.load_model(tmp_path)
    expected = jax.tree.map(partial(np.asarray, dtype=np.float32), start.denoiser.variables)
    chex.assert_trees_all_equal(jax.device_get(state.params), expected["params"])
    chex.assert_trees_all_close(jax.device_get(state.ema_params), expected["params"], rtol=1e-5)
    chex.assert_trees_all_equal(after.scale, start.scale)
    assert [after.meta[key] for key in SCALE] == [start.meta[key] for key in SCALE]


def test_batch_norms_start_with_their_statistics_and_all_latents_with_one_scale(root, tmp_path):
    def get_batch_norms(**changes):
        config = get_config(root, sample_every=0, steps=2, eval_every=1, **changes)
        config.network.norm, config.optimizer.warmup_steps = "batch", 0
        config.latents.normalisation = "global"  # Its scale is a number of more digits.
        config.power_ema.sigma_rels = (0.1,)
        return config

    train.train(get_batch_norms(), tmp_path / "first")
    config = get_batch_norms(start_from=str(tmp_path / "first"))
    config.optimizer.learning_rate = 0.0
    train.train(config, tmp_path / "second")
    config.steps = 3
    state = train.train(config, tmp_path / "second")  # Goes on from step 2.
    first, second = (models.load_model(tmp_path / name) for name in ("first", "second"))
    assert first.denoiser.variables["batch_stats"] and int(state.step) == 3
    chex.assert_trees_all_close(
        first.denoiser.variables["params"], second.denoiser.variables["params"], rtol=1e-5
    )
    assert second.meta["std_latent"] == first.meta["std_latent"]
    second.guided_by(first)  # Raises where the scale is another.


def test_the_copies_are_the_states_own():
    network = get_network(latent_image_size=8, widths=(16, 32), block_depth=1, emb_size=4)
    create = partial(training.create_train_state, jax.random.key(0), network, optax.sgd(0.0))
    variables = network.init(jax.random.key(1), np.ones((1, 8, 8, 4)), np.ones(1), np.ones((1, 4)))
    state = create((8, 8, 4), (4,), variables)
    chex.assert_trees_all_equal(state.params, variables["params"])
    chex.assert_trees_all_equal(state.ema_batch_stats, variables["batch_stats"])
    jax.tree.map(lambda x: x.delete(), state.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))


def test_the_loss_begins_where_the_model_ended(root, tmp_path):
    def read_losses(workdir):
        lines = (workdir / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    config = get_config(root, sample_every=0, steps=5, start_from=str(root / "run"))
    config.optimizer.learning_rate = 0.0
    train.train(config, tmp_path)
    first, *_, last = read_losses(root / "run")
    (started,) = read_losses(tmp_path)
    assert abs(started - last) < 0.3 * (first - last)


def test_it_is_resumed_bit_for_bit(root, other, tmp_path):
    config = get_next(root, start_from=str(root / "float16"), save_every=5)
    whole = train.train(config, tmp_path / "whole")
    train.train(config, tmp_path / "half")
    last = checkpoint.open_checkpoints(tmp_path / "half" / "checkpoints").latest_step()
    assert last == 10
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "10")
    resumed = train.train(config, tmp_path / "half")
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(whole))


def test_models_of_another_kind_are_refused_with_what_differs(root, other, tmp_path):
    config = get_next(root, start_from=str(root / "run"))
    config.network.widths = (16, 48)
    with pytest.raises(ValueError, match=r"network.widths is \[16, 32\] there, \[16, 48\] here"):
        train.train(config, tmp_path)
    with pytest.raises(ValueError, match="config.start_from is .*gone': no such checkpoint folder"):
        train.train(get_next(root, start_from=str(root / "gone")), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_dropout_may_differ_and_the_target_not(root):
    meta = models.load_model(root / "run").meta
    check_start(meta, meta | {"network": meta["network"] | {"dropout": 0.3}}, "there")
    with pytest.raises(
        ValueError, match="there is a model of another kind.*target is x_zero there"
    ):
        check_start(meta, meta | {"noising": meta["noising"] | {"target": "velocity"}}, "there")
