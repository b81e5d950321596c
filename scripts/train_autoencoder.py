"""A folder of pictures => the small autoencoder that the package ships, with its figures.

    python scripts/train_autoencoder.py --pictures=FOLDER --out=FOLDER --minutes=6

trains a diffusers AutoencoderKL, 128x128x3 => 16x16x4, for six minutes by the clock, writes it as
diffusers does (config.json, diffusion_pytorch_model.safetensors in float16), and measures what was
written on the held-out pictures: metrics.json, reconstructions.png. Meant for one GPU; a CPU
serves for a trial with --block_out_channels=8,8,16,16 --norm_num_groups=4 --nocompile.

    python scripts/train_autoencoder.py --pictures=FOLDER --extra_styles --refine=AUTOENCODER \
        --latent_noise=0.15 --batch_size=64 --minutes=9 --out=FOLDER

trains the decoder alone on, from latents with noise. Latents stay what they are, to the bit, and
what was trained on them is drawn by the new decoder.
"""

import copy
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from absl import app, flags
from autoencoder_objective import (
    Objective,
    create_autoencoder,
    fold_statistics,
    steer_kl_weight,
)
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # The GPU's memory is torch's here.
from evaluate_autoencoder import (  # noqa: E402
    METRICS,
    Pictures,
    encode_pictures,
    evaluate_autoencoder,
    load_pictures,
    measure_latents,
)

FLAGS = flags.FLAGS
flags.DEFINE_string("pictures", None, "folder of pictures with splits (metadata.jsonl)")
flags.DEFINE_string("out", None, "folder to write")
flags.DEFINE_float("minutes", 6.0, "from the start of the command to the end of training")
flags.DEFINE_integer("steps", None, "stop after so many steps, if that comes first")
flags.DEFINE_integer("seed", 0, "of weights, batches and noise")
flags.DEFINE_string("refine", None, "autoencoder whose decoder is trained on, and nothing else")
flags.DEFINE_list("exclude_styles", [], "styles that are neither trained on nor measured")
flags.DEFINE_bool("extra_styles", False, "also train on the styles that serve training alone")
flags.DEFINE_list("block_out_channels", ["48", "96", "160", "192"], "widths, finest first")
flags.DEFINE_integer("layers_per_block", 1, "residual blocks a level (the decoder has one more)")
flags.DEFINE_integer("norm_num_groups", 16, "groups of the group norms")
flags.DEFINE_integer("batch_size", 128, "pictures a step")
flags.DEFINE_float("learning_rate", 1e-3, "peak of the warm-up and cosine")
flags.DEFINE_float("weight_decay", 1e-3, "of AdamW")
flags.DEFINE_float("ema_decay", 0.999, "of the averaged weights, the ones that are written")
flags.DEFINE_float("mse_weight", 4.0, "of the squared error; the absolute error has weight 1")
flags.DEFINE_float("gradient_weight", 0.5, "of the finite differences, at three scales")
flags.DEFINE_float("kl_weight", 1e-3, "of the KL divergence per latent element, at the start")
flags.DEFINE_float("posterior_std", 0.02, "in deviations of its channel; steers the KL weight")
flags.DEFINE_float("tail_weight", 0.3, "of latents beyond --tail_start deviations, squared")
flags.DEFINE_float("tail_start", 2.2, "deviations of its channel that a latent may lie off")
flags.DEFINE_float("latent_noise", 0.0, "most noise on latents, in deviations of their channel")
flags.DEFINE_bool("compile", True, "torch.compile the loss (about a minute, then faster)")
flags.DEFINE_float("report_every", 10.0, "seconds between progress lines")
flags.DEFINE_float("save_every", 60.0, "seconds between writing the averaged weights")


def draw_batches(
    images: Tensor, batch_size: int, generator: torch.Generator, max_shift: int = 8
) -> Iterator[Tensor]:
    """Batches without end, every picture once an epoch, augmented where the pictures lie.

    Half of the pictures are mirrored, half are shifted by up to `max_shift` pixels (white comes
    in), and one in ten has its colour channels permuted.

    Args:
        images: uint8 (n, h, w, 3) on the device that draws, n >= batch_size.
        batch_size: pictures a batch.
        generator: of the images' device.
        max_shift: in pixels.

    Yields:
        uint8 (batch_size, h, w, 3).
    """
    n, height, width, _ = images.shape
    if n < batch_size:
        raise ValueError(f"batch_size must be at most the {n} training pictures, got {batch_size}")
    orders = torch.tensor([[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0], [0, 1, 2]])
    orders = orders.to(images.device)

    def draw(*shape):
        return torch.rand(shape, generator=generator, device=images.device)

    while True:
        epoch = torch.randperm(n, generator=generator, device=images.device)
        for start in range(0, n - batch_size + 1, batch_size):
            picture = epoch[start : start + batch_size, None, None, None]
            shift = (draw(2, batch_size, 1) * (2 * max_shift + 1)).long() - max_shift
            shift = shift * (draw(batch_size, 1) < 0.5)
            y = torch.arange(height, device=images.device) + shift[0]
            x = torch.arange(width, device=images.device) + shift[1]
            x = torch.where(draw(batch_size, 1) < 0.5, width - 1 - x, x)
            order = (draw(batch_size) * 50).long().clamp(max=5)
            inside_y, inside_x = (y >= 0) & (y < height), (x >= 0) & (x < width)
            inside = inside_y[:, :, None, None] & inside_x[:, None, :, None]
            y = y.clamp(0, height - 1)[:, :, None, None]
            x = x.clamp(0, width - 1)[:, None, :, None]
            batch = images[picture, y, x, orders[order][:, None, None, :]]
            yield torch.where(inside, batch, 255)


def learning_rate_at(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up, then half a cosine down to 0, over progress in [0, 1]."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * peak * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


def load_for_refining(folder: str) -> AutoencoderKL:
    """An autoencoder of which only what follows the latents takes a gradient.

    Raises:
        ValueError: without the convolution before the latents, or if float16, in which autoencoders
            are written, would round the encoder, and so move the latents.
    """
    # Not the loaded one itself, whose config names the folder.
    model = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    model.load_state_dict(AutoencoderKL.from_pretrained(folder).state_dict())
    if model.quant_conv is None:
        raise ValueError(f"{folder} must have a convolution before its latents (quant_conv)")
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(False)
        if any(not torch.equal(p, p.half().float()) for p in part.parameters()):
            raise ValueError(f"the encoder of {folder} must fit into float16 without rounding")
    return model


def save_autoencoder(model: AutoencoderKL, images: np.ndarray, out: Path) -> None:
    """Writes the diffusers folder in float16; latents that were trained are normalised over the
    given images, others stay as they are."""
    model = copy.deepcopy(model)
    if not FLAGS.refine:
        latents = measure_latents(*encode_pictures(model, images))
        mean, std = (torch.tensor(latents[k]) for k in ("channel_mean", "channel_std"))
        fold_statistics(model, mean.to(model.device), std.to(model.device))
    model.half().to(memory_format=torch.contiguous_format).save_pretrained(out)


def train(pictures: Pictures, device: str, started: float) -> dict:
    """Trains by FLAGS until `minutes` after `started`, writing the averaged weights to --out.

    Returns:
        What the record says of the training: steps, pictures a second, seconds, weights.
    """
    out = Path(FLAGS.out)
    torch.manual_seed(FLAGS.seed)
    torch.backends.cudnn.benchmark = True
    train_images = pictures.images[pictures.splits == "train"]
    images = torch.from_numpy(train_images).to(device)
    generator = torch.Generator(device).manual_seed(FLAGS.seed)
    batches = draw_batches(images, FLAGS.batch_size, generator)

    if FLAGS.refine:
        model = load_for_refining(FLAGS.refine)
    else:
        widths = tuple(int(width) for width in FLAGS.block_out_channels)
        model = create_autoencoder(widths, FLAGS.layers_per_block, FLAGS.norm_num_groups)
    model = model.to(device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    pairs = zip(model.parameters(), average.parameters(), strict=True)
    params, averages = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
    optimizer = torch.optim.AdamW(
        params, betas=(0.9, 0.99), weight_decay=FLAGS.weight_decay, fused=device == "cuda"
    )
    # diffusers leaves channels_last before upsampling batches of 64 and more; nothing needs that.
    Upsample2D.forward = lambda self, x, output_size=None: self.conv(
        F.interpolate(x, scale_factor=2.0, mode="nearest")
    )
    names = ("mse_weight", "gradient_weight", "tail_weight", "tail_start", "latent_noise")
    objective = Objective(model, **{name: FLAGS[name].value for name in names})
    kl_weight = torch.tensor(FLAGS.kl_weight, device=device)

    def step(compute, learning_rate: float, decay: float) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        n, h, w, _ = batch.shape
        noise = torch.randn((n, 4, h // 8, w // 8), generator=generator, device=device)
        share = torch.rand((n, 1, 1, 1), generator=generator, device=device)
        loss, stats = compute(batch, noise, share, kl_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in params], 1.0 - decay)
        if not FLAGS.refine:
            steer_kl_weight(kl_weight, stats[3:], FLAGS.posterior_std)
        return loss.detach(), stats

    compute = torch.compile(objective, dynamic=False) if FLAGS.compile else objective
    try:
        step(compute, 0.0, 0.0)  # Compiles; with learning rate 0 the weights stay.
    except Exception as error:  # The compiler raises nearly anything, by what it lacks.
        if not FLAGS.compile:
            raise
        print(f"torch.compile failed, training goes on without it: {error}", flush=True)
        compute = objective
        step(compute, 0.0, 0.0)
    begin = last_report = last_save = time.monotonic()
    n_weights = sum(p.numel() for p in params)
    print(f"{n_weights / 1e6:.2f} M weights, {len(images)} training pictures, {device}; "
          f"ready after {begin - started:.0f} s", flush=True)  # fmt: skip
    budget = max(FLAGS.minutes * 60.0 - (begin - started), 1.0)
    n_steps, now, progress = 0, begin, 0.0
    while progress < 1.0:
        decay = min(FLAGS.ema_decay, (1.0 + n_steps) / (10.0 + n_steps))
        loss, stats = step(compute, learning_rate_at(progress, FLAGS.learning_rate), decay)
        n_steps += 1
        if n_steps % 10 == 0 and device == "cuda":
            torch.cuda.synchronize()  # The clock below is the schedule's: let it be the GPU's.
        now = time.monotonic()
        progress = (now - begin) / budget
        if FLAGS.steps:
            progress = max(progress, n_steps / FLAGS.steps)
        if now - last_report > FLAGS.report_every or progress >= 1.0:
            mse, kl, tails, *stds = stats.tolist()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {n_steps}")
            rate = n_steps * FLAGS.batch_size / (now - begin)
            print(f"{now - begin:5.0f} s  step {n_steps}  loss {loss.item():.4f}  "
                  f"PSNR of a batch {10 * math.log10(4 / mse):.2f} dB  KL {kl:.2f}  "
                  f"x {kl_weight.item():.1e}  tails {tails:.5f}  posterior stds "
                  f"{' '.join(f'{std:.3f}' for std in stds)}  {rate:.0f} img/s",
                  flush=True)  # fmt: skip
            last_report = now
        if now - last_save > FLAGS.save_every:
            save_autoencoder(average, train_images[:2048], out)
            last_save = now
    seconds = time.monotonic() - begin
    save_autoencoder(average, train_images, out)
    return {
        "refined": FLAGS.refine is not None,
        "steps": n_steps,
        "epochs": n_steps * FLAGS.batch_size / len(images),
        "seconds_of_training": seconds,
        "seconds_before_training": begin - started,
        "images_per_second": n_steps * FLAGS.batch_size / seconds,
        "n_weights_trained": n_weights,
        "compiled": compute is not objective,
        "kl_weight_at_the_end": kl_weight.item(),
    }


def main(argv: list[str]) -> None:
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    excluded = tuple(FLAGS.exclude_styles)
    pictures = load_pictures(Path(FLAGS.pictures), excluded, FLAGS.extra_styles)
    record = {"training": train(pictures, device, started)}
    flag_values = {f.name: f.value for f in FLAGS.get_key_flags_for_module(argv[0])}
    places = ("pictures", "out", "refine")
    record["flags"] = {k: v for k, v in flag_values.items() if k not in places}
    (Path(FLAGS.out) / METRICS).write_text(json.dumps(record))  # Kept should measuring fail.
    if FLAGS.extra_styles:
        pictures = load_pictures(Path(FLAGS.pictures), excluded)
    evaluate_autoencoder(Path(FLAGS.out), pictures, FLAGS.seed, device, record)
    print(f"done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["pictures", "out"])
    app.run(main)
