"""A training that starts from the weights of another one, with the scale that belongs to them."""

import json
import shutil
from functools import partial

import chex
import jax
import numpy as np
import pytest
from test_doors import draw_pictures, get_config

import encode
import train
from ldm_jax import checkpoint, exports, models
from ldm_jax.meta import check_start


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, their cache, a run of 20 steps and what it was exported to."""
    root = tmp_path_factory.mktemp("start")
    draw_pictures(root / "pictures")
    config = get_config(root, sample_every=0)
    encode.encode(config, progress=False)
    train.train(config, root / "run")
    exports.export_model(models.load_model(root / "run"), root / "exported", "float16")
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


@pytest.mark.parametrize("source, mesh", [("run", "data"), ("exported", "fsdp")])
def test_the_weights_and_the_scale_are_the_models(root, other, source, mesh, tmp_path):
    config = get_next(root, start_from=str(root / source))
    config.optimizer.learning_rate = 0.0
    config.sharding.mesh = mesh
    state = train.train(config, tmp_path)
    start, after = models.load_model(root / source), models.load_model(tmp_path)
    expected = jax.tree.map(partial(np.asarray, dtype=np.float32), start.denoiser.variables)
    chex.assert_trees_all_equal(jax.device_get(state.params), expected["params"])
    chex.assert_trees_all_close(jax.device_get(state.ema_params), expected["params"], rtol=1e-5)
    chex.assert_trees_all_equal(after.scale, start.scale)
    assert after.meta["std_latent"] == start.meta["std_latent"]


def test_the_loss_begins_where_the_model_ended(root, tmp_path):
    def first_loss(workdir, **changes):
        config = get_config(root, sample_every=0, steps=5, **changes)
        train.train(config, workdir)
        return json.loads((workdir / "log.jsonl").read_text().splitlines()[0])["loss"]

    started = first_loss(tmp_path / "started", start_from=str(root / "run"))
    assert started < 0.9 * first_loss(tmp_path / "fresh")


def test_it_is_resumed_bit_for_bit(root, other, tmp_path):
    config = get_next(root, start_from=str(root / "exported"), save_every=5)
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
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        train.train(get_next(root, start_from=str(root / "gone")), tmp_path)
    assert not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").iterdir())


def test_dropout_may_differ_and_the_target_not(root):
    meta = models.load_model(root / "run").meta
    check_start(meta, meta | {"network": meta["network"] | {"dropout": 0.3}}, "there")
    with pytest.raises(ValueError, match="cannot start from there.*target is x_zero there"):
        check_start(meta, meta | {"noising": meta["noising"] | {"target": "velocity"}}, "there")
