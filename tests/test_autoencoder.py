"""The autoencoder's trainer: its pieces against formulas, and the command at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
TINY = ["--block_out_channels=4,4,8,8", "--norm_num_groups=2"]


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_autoencoder

    return train_autoencoder


@pytest.fixture
def objective(trainer):
    import autoencoder_objective

    return autoencoder_objective


@pytest.fixture
def evaluator(trainer):
    import evaluate_autoencoder

    return evaluate_autoencoder


def write_pictures(folder, n=32):
    """Discs of random colours in two styles; every fourth is held out, of each split some."""
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    lines = []
    for i in range(n):
        image = np.full((128, 128, 3), 255, np.uint8)
        radius, cy, cx = rng.integers(20, 50), *rng.integers(40, 88, 2)
        image[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.integers(0, 256, 3)
        split = "train" if i % 4 else ("valid", "test", "cell", "test")[i // 4 % 4]
        Image.fromarray(image).save(folder / f"{i}.png")
        style = "flat" if i < n // 2 else "bold"
        line = {"file_name": f"{i}.png", "text": "a disc", "split": split, "style": style}
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def run_trainer(pictures, out, *flags):
    command = [sys.executable, SCRIPTS / "train_autoencoder.py", f"--pictures={pictures}",
               f"--out={out}", "--steps=2", "--batch_size=8", "--nocompile", *flags]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "step 2 " in done.stdout


def test_two_steps_write_a_folder_that_diffusers_loads_with_its_figures(tmp_path):
    from diffusers import AutoencoderKL

    pictures = write_pictures(tmp_path)
    out = tmp_path / "autoencoder"
    run_trainer(pictures, out, *TINY)
    model = AutoencoderKL.from_pretrained(out, torch_dtype=torch.float16)
    assert model.config.scaling_factor == 1.0 and model.config.latent_channels == 4
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    report = json.loads((out / "metrics.json").read_text())
    assert report["training"]["steps"] == 2 and report["n_training_pictures"] == 24
    assert report["held_out"]["n_pictures"] == 8
    assert {s: v["n_pictures"] for s, v in report["styles"].items()} == {"flat": 4, "bold": 4}
    assert {s: v["n_pictures"] for s, v in report["splits"].items()} == {
        "valid": 2, "test": 4, "cell": 2,
    }  # fmt: skip
    np.testing.assert_allclose(report["training_latents"]["channel_std"], np.ones(4), rtol=0.02)
    assert str(tmp_path) not in json.dumps(report)
    assert (out / "reconstructions.png").stat().st_size > 1000


def test_batches_show_every_picture_once_an_epoch(trainer):
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 64, 64, 3)
    batches = trainer.draw_batches(images, 4, torch.Generator().manual_seed(0))
    centres = torch.cat([next(batches)[:, 32, 32, 0] for _ in range(3)])
    assert sorted(centres.tolist()) == list(range(12))


def test_augmentation_mirrors_shifts_in_white_and_permutes_colours(trainer):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (16, 16, 3), np.uint8)
    images = torch.from_numpy(np.repeat(image[None], 64, 0))
    batches = trainer.draw_batches(images, 64, torch.Generator().manual_seed(0), max_shift=2)
    drawn = np.concatenate([next(batches).numpy() for _ in range(4)])
    # Independently: every variant that may appear, padded by hand.
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=255)
    variants, kinds = {}, {"plain": 0, "mirrored": 0, "shifted": 0, "permuted": 0}
    for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        for dy in range(5):
            for dx in range(5):
                crop = padded[dy : dy + 16, dx : dx + 16][:, :, list(order)]
                still = (dy, dx) == (2, 2)
                for mirrored, x in ((False, crop), (True, crop[:, ::-1])):
                    variants[x.tobytes()] = (mirrored, not still, order != (0, 1, 2))
    for picture in drawn:
        mirrored, shifted, permuted = variants[picture.tobytes()]
        kinds["mirrored"] += mirrored
        kinds["shifted"] += shifted
        kinds["permuted"] += permuted
    shares = {kind: count / len(drawn) for kind, count in kinds.items()}
    assert 0.4 < shares["mirrored"] < 0.6  # One half of 256, deviation 0.03.
    assert 0.35 < shares["shifted"] < 0.6  # 0.5 x 24 / 25.
    assert 0.04 < shares["permuted"] < 0.17  # One in ten.


def test_reconstruction_loss_follows_the_formula(objective):
    r = np.random.default_rng(0).standard_normal((2, 3, 16, 16))
    expected = np.abs(r).mean() + 2.0 * np.square(r).mean()
    for size in (16, 8, 4):
        x = r.reshape(2, 3, size, 16 // size, size, 16 // size).mean((3, 5))
        differences = np.abs(np.diff(x, axis=2)).mean() + np.abs(np.diff(x, axis=3)).mean()
        expected += 0.6 / 3 * differences
    loss = objective.reconstruction_loss(torch.from_numpy(r), mse_weight=2.0, gradient_weight=0.6)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-9)


def test_tail_loss_does_not_depend_on_the_scale_of_a_channel(objective):
    z = np.random.default_rng(0).standard_normal((64, 4, 16, 16)).astype(np.float32)
    scale = np.array([0.1, 1.0, 5.0, 30.0], np.float32)[:, None, None]
    standard = (z - z.mean((0, 2, 3), keepdims=True)) / z.std((0, 2, 3), keepdims=True)
    expected = np.square(np.maximum(np.abs(standard) - 2.0, 0.0)).mean()
    loss = objective.tail_loss(torch.from_numpy(z * scale + 3.0), start=2.0)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-3)
    assert objective.tail_loss(torch.from_numpy(z).sign(), start=2.0).item() == 0.0


def test_learning_rate_warms_up_and_ends_at_zero(trainer):
    rates = [trainer.learning_rate_at(p, 1e-3, warmup=0.1) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    np.testing.assert_allclose(rates, [9.9e-6, 5.05e-4, 1e-3, 5e-4, 0.0], rtol=1e-2, atol=1e-12)


def test_folding_the_statistics_rescales_latents_and_keeps_reconstructions(objective, evaluator):
    torch.manual_seed(0)
    model = objective.create_autoencoder((4, 4, 8, 8), 1, 2).eval()
    images = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
    before = evaluator.encode_pictures(model, images)
    with torch.no_grad():
        reconstructed = model.decode(torch.from_numpy(before[0])).sample
    latents = evaluator.measure_latents(*before)
    mean, std = (torch.tensor(latents[k]).float() for k in ("channel_mean", "channel_std"))
    objective.fold_statistics(model, mean, std)
    after = evaluator.encode_pictures(model, images)
    statistics = evaluator.measure_latents(*after)
    np.testing.assert_allclose(statistics["channel_mean"], np.zeros(4), atol=1e-5)
    np.testing.assert_allclose(statistics["channel_std"], np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(after[1], before[1] / std.numpy()[:, None, None], rtol=1e-4)
    with torch.no_grad():
        again = model.decode(torch.from_numpy(after[0])).sample
    np.testing.assert_allclose(again, reconstructed, atol=1e-4)


def test_loss_reaches_every_weight_and_reports_the_posterior(objective):
    torch.manual_seed(0)
    model = objective.create_autoencoder((4, 4, 8, 8), 1, 2)
    compute = objective.Objective(model, 1.0, 0.5, 0.3, 0.5)
    images = torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8)
    share = torch.ones(2, 1, 1, 1)
    loss, stats = compute(images, torch.randn(2, 4, 16, 16), share, torch.tensor(1e-3))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        posterior = model.encode(objective.to_signal(images)).latent_dist
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0, 1))
    np.testing.assert_allclose(stats[1], kl.mean(), rtol=1e-4)
    for i in range(4):
        relative = posterior.std[:, i].mean() / posterior.mean[:, i].std()
        np.testing.assert_allclose(stats[3 + i], relative, rtol=1e-4)


def test_latents_get_their_share_of_noise_beside_the_posteriors(objective):
    torch.manual_seed(0)
    model = objective.create_autoencoder((4, 4, 8, 8), 1, 2)
    images = torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8)
    noise, share = torch.randn(2, 4, 16, 16), torch.tensor([0.0, 0.5]).reshape(2, 1, 1, 1)
    decoded = []
    model.post_quant_conv.register_forward_pre_hook(lambda module, args: decoded.append(args[0]))
    compute = objective.Objective(model, 1.0, 0.5, 0.3, 0.5, latent_noise=0.3)
    with torch.no_grad():
        compute(images, noise, share, torch.tensor(1e-3))
        posterior = model.encode(objective.to_signal(images)).latent_dist
    deviation = posterior.mean.std((0, 2, 3), keepdim=True)
    std = torch.sqrt(posterior.var + (0.3 * share * deviation) ** 2)
    torch.testing.assert_close(decoded[0], posterior.mean + std * noise, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(std[1], posterior.std[1], rtol=0.1)


def test_refining_trains_the_decoder_and_leaves_the_latents(tmp_path, objective, evaluator):
    from diffusers import AutoencoderKL

    pictures = write_pictures(tmp_path)
    torch.manual_seed(0)
    first = objective.create_autoencoder((4, 4, 8, 8), 1, 2).half()
    first.save_pretrained(tmp_path / "first")
    run_trainer(pictures, tmp_path / "refined", f"--refine={tmp_path / 'first'}",
                "--latent_noise=0.2", "--extra_styles")  # fmt: skip
    refined = AutoencoderKL.from_pretrained(tmp_path / "refined", torch_dtype=torch.float16)
    assert str(tmp_path) not in (tmp_path / "refined/config.json").read_text()
    changed = {
        name.partition(".")[0]
        for (name, a), b in zip(first.named_parameters(), refined.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"decoder", "post_quant_conv"}
    written = (tmp_path / "refined/metrics.json").read_text()
    report = json.loads(written)
    assert report["flags"]["latent_noise"] == 0.2 and report["training"]["refined"]
    assert report["n_training_pictures"] == 24 and str(tmp_path) not in written
    kept = evaluator.read_training(tmp_path / "refined")
    assert kept == {key: report[key] for key in ("training", "flags")}
    assert evaluator.read_training(tmp_path) == {}


def test_an_encoder_that_float16_would_round_is_not_refined(tmp_path, objective, trainer):
    model = objective.create_autoencoder((4, 4, 8, 8), 1, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must fit into float16 without rounding"):
        trainer.load_for_refining(str(tmp_path))


def test_styles_that_serve_training_alone_are_read_where_asked_for(tmp_path, evaluator):
    write_pictures(tmp_path, n=8)
    table = tmp_path / "metadata.jsonl"
    table.write_text(table.read_text().replace('"split": "valid", "style": "flat"',
                                               '"split": "train", "style": "flat"'))  # fmt: skip
    assert set(evaluator.load_pictures(tmp_path).styles) == {"bold"}
    assert set(evaluator.load_pictures(tmp_path, extra_styles=True).styles) == {"bold", "flat"}


def test_kl_weight_rises_while_the_posterior_is_too_narrow_and_stays_in_its_limits(objective):
    weight = torch.tensor(1e-3)
    objective.steer_kl_weight(weight, torch.tensor([0.01, 0.02, 0.01, 0.0]), target=0.02)
    np.testing.assert_allclose(weight, 1e-3 * 2.0**0.003, rtol=1e-5)
    objective.steer_kl_weight(weight, torch.full((4,), 0.04), target=0.02)
    np.testing.assert_allclose(weight, 1e-3, rtol=1e-5)
    for std, limit in ((1e-9, 3e-3), (1e9, 1e-6)):
        for _ in range(1000):
            objective.steer_kl_weight(weight, torch.full((4,), std), target=0.02)
        np.testing.assert_allclose(weight, limit, rtol=1e-5)


def test_normalisations_clip_where_they_say(evaluator):
    latents = {"channel_mean": [1.0, 0.0], "channel_std": [1.0, 2.0], "std_of_all": 2.0}
    raw = np.array([-100.0, 0.0, 100.0], np.float32) * np.ones((1, 2, 1, 3), np.float32)
    clipped = {k: clip(raw)[0, :, 0] for k, clip in evaluator.get_normalisations(latents).items()}
    np.testing.assert_array_equal(clipped["none"], raw[0, :, 0])
    np.testing.assert_array_equal(clipped["global_2.5"], [[-5, 0, 5], [-5, 0, 5]])
    np.testing.assert_array_equal(clipped["channel_3.0"], [[-2, 0, 4], [-6, 0, 6]])


def test_too_few_pictures_for_a_batch_say_so(trainer):
    images = torch.zeros((3, 8, 8, 3), dtype=torch.uint8)
    with pytest.raises(ValueError, match="at most the 3 training pictures, got 4"):
        next(trainer.draw_batches(images, 4, torch.Generator()))
