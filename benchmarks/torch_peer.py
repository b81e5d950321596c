"""The PyTorch peers of our benchmarks: a TorchUNet => callables that train and sample.

On CUDA they do what a good user of PyTorch does: channels_last maps, float32 weights under bfloat16
autocast, fused attention and Adam, torch.compile, CUDA graphs. No callable waits for the device;
time them between two calls of torch.cuda.synchronize().
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.torch_unet import TorchUNet
from ldm_jax.sampler import get_noise_levels

MODES = ("eager", "compile")
LABEL_DROPOUT, EMA_DECAY, LEARNING_RATE = 0.15, 0.999, 3e-4


def draw_noise_levels(n: int, device: torch.device) -> Tensor:
    """a = sin(|z| / 3), z from N(0, 1) truncated to (-3, 3), by the inverse of its distribution."""
    u = torch.rand(n, device=device) * math.erf(3 / math.sqrt(2))
    return torch.sin(math.sqrt(2) / 3 * torch.erfinv(u))


def get_loss(model: nn.Module, latents: Tensor, text: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """Mean absolute error of x_0 at x_t = sqrt(1 - a^2) x_0 + a eps."""
    level = a[:, None, None, None]
    x_t = torch.sqrt(1 - level**2) * latents + level * noise
    with autocast(latents.device):
        x_zero = model(x_t, a, text)
    return F.l1_loss(x_zero, latents)


def make_train_step(
    model: TorchUNet,
    batch_size: int,
    mode: str = "eager",
) -> Callable[[], Tensor]:
    """step() trains `model` on one fixed synthetic batch and returns the loss, on the device.

    Noise, noise levels and label dropout, forward, backward, Adam, and the moving average of
    weights and running statistics.

    Args:
        model: on its device; it is left in training mode.
        batch_size: pictures of a step.
        mode: "eager", or "compile": the loss with all that it draws, and its gradient, are CUDA
            graphs (mode="reduce-overhead").
    """
    device = prepare(model.train(), mode)
    latents, text = draw_batch(model, batch_size, device)
    latents = latents.clamp(-2.5, 2.5) / 2.5
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=device.type == "cuda")
    current = list(model.state_dict().values())
    average = [x.clone() for x in current]

    def draw_loss() -> Tensor:
        keep = torch.rand(batch_size, 1, device=device) >= LABEL_DROPOUT
        levels = draw_noise_levels(batch_size, device)
        return get_loss(model, latents, text * keep, torch.randn_like(latents), levels)

    if mode == "compile":
        draw_loss = torch.compile(draw_loss, mode="reduce-overhead")

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        loss = draw_loss()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, current, 1 - EMA_DECAY)
        return loss.detach().clone()  # Out of a CUDA graph's memory, which the next step writes.

    return step


def dynamic_thresholding(x: Tensor, perc: float = 99.5) -> Tensor:
    """Clips each sample to +-s and divides by s, s = max(percentile(|x|, perc), 1), by topk."""
    magnitudes = x.flatten(1).abs()
    lower, upper_share = divmod(perc / 100 * (magnitudes.shape[1] - 1), 1)
    top = magnitudes.topk(magnitudes.shape[1] - int(lower)).values
    s = top[:, -1].lerp(top[:, max(top.shape[1] - 2, 0)], upper_share)
    s = s.clamp(min=1)[:, None, None, None]
    return x.clamp(-s, s) / s


def make_sampler(
    model: TorchUNet,
    num: int,
    mode: str = "eager",
    steps: int = 70,
    guidance: float = 4.0,
    perc: float = 99.5,
) -> Callable[..., Tensor]:
    """sample(seeds=..., text=...) draws `num` latents as `ldm_jax.sampler.Diffuser` does, update A.

    Both arguments, (num, c, h, w) and (num, e), are fixed synthetic ones unless given.

    Args:
        model: on its device. A copy of it samples, its convolutions' and linear layers' weights
            cast to bfloat16 on CUDA once, which autocast would do at every step.
        num: latents of a call.
        mode: "eager", or "compile": each step is a CUDA graph (mode="reduce-overhead").
        steps: number of noise levels; the network runs once less.
        guidance: weight w of the text.
        perc: percentile of the dynamic thresholding.
    """
    device = prepare(model, mode)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if device.type == "cuda" and isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    levels = torch.tensor(get_noise_levels(steps), device=device)
    pairs = [pair.clone() for pair in levels.unfold(0, 2, 1)]
    fixed_seeds, fixed_text = draw_batch(model, num, device)

    def step(x: Tensor, text: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        level, next_level = pair[0], pair[1]
        with autocast(device):
            x_zero = model(torch.cat([x, x]), level.expand(2 * num), text)
        with_text, without = x_zero.chunk(2)
        x_zero = dynamic_thresholding(guidance * with_text + (1 - guidance) * without, perc)
        return ((level - next_level) * x_zero + next_level * x) / level, x_zero

    if mode == "compile":
        step = torch.compile(step, mode="reduce-overhead")

    @torch.no_grad()
    def sample(seeds: Tensor = fixed_seeds, text: Tensor = fixed_text) -> Tensor:
        text = torch.cat([text, torch.zeros_like(text)])
        x = seeds.contiguous(memory_format=torch.channels_last)
        for pair in pairs:
            torch.compiler.cudagraph_mark_step_begin()
            x, x_zero = step(x, text, pair)
            x = x.clone()  # As above.
        return x_zero.clone()

    return sample


def prepare(model: nn.Module, mode: str) -> torch.device:
    """Sets cuDNN to the fastest of its algorithms; the device of the model."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    torch.backends.cudnn.benchmark = True
    return next(model.parameters()).device


def draw_batch(model: TorchUNet, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """n x N(0, I) of the latents' and of the text embeddings' shape."""
    latents = torch.randn(n, *model.latent_shape, device=device)
    text = torch.randn(n, model.emb_size, device=device)
    return latents.contiguous(memory_format=torch.channels_last), text


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
