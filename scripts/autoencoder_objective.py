"""An autoencoder and a batch of pictures => the loss that trains it."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn


def create_autoencoder(
    block_out_channels: tuple[int, ...], layers_per_block: int, norm_num_groups: int
) -> AutoencoderKL:
    """A fresh network whose posterior starts narrow, exp(-4) wide, instead of one deviation.

    A channel that starts under unit noise may be ignored by the decoder before it learns to carry
    anything, and the KL term then keeps it there: it is dead. One that starts clean is used.
    """
    n_levels = len(block_out_channels)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n_levels,
        up_block_types=("UpDecoderBlock2D",) * n_levels,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        latent_channels=4,
        norm_num_groups=norm_num_groups,
        sample_size=128,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        model.quant_conv.weight[4:] *= 0.1
        model.quant_conv.bias[4:] = -8.0
    return model


def to_signal(images: Tensor) -> Tensor:
    """uint8 (b, h, w, 3) => float32 (b, 3, h, w) in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def reconstruction_loss(residual: Tensor, mse_weight: float, gradient_weight: float) -> Tensor:
    """mean |r| + mse_weight mean r^2 + gradient_weight mean over scales of mean |differences of r|.

    Args:
        residual: reconstruction minus picture (b, 3, h, w), both in [-1, 1].
        mse_weight: weight of the squared error.
        gradient_weight: weight of the finite differences at full, half and quarter size.
    """
    loss = residual.abs().mean() + mse_weight * residual.square().mean()
    for _ in range(3):
        vertical = residual[:, :, 1:] - residual[:, :, :-1]
        horizontal = residual[:, :, :, 1:] - residual[:, :, :, :-1]
        loss += gradient_weight / 3.0 * (vertical.abs().mean() + horizontal.abs().mean())
        residual = F.avg_pool2d(residual, 2)
    return loss


def tail_loss(mean: Tensor, start: float) -> Tensor:
    """Mean of max(|z| - start, 0)^2, z a channel's latents less their mean over their deviation.

    The diffusion model clips latents at 2.5 deviations; short tails make that clip cheap.
    """
    var, centre = torch.var_mean(mean, (0, 2, 3), keepdim=True)
    z = (mean - centre) * torch.rsqrt(var + 1e-6)
    return F.relu(z.abs() - start).square().mean()


class Objective(nn.Module):
    """Pictures => the loss: reconstruction from a drawn latent, KL to N(0, 1), tails.

    Args:
        model: the autoencoder; parts of it that take no gradient are left as they are.
        mse_weight, gradient_weight: as in `reconstruction_loss`.
        tail_weight: weight of `tail_loss`.
        tail_start: its `start`.
        latent_noise: the most noise that a picture's latents get beside the posterior's, in
            deviations of the channel. A denoiser's latents are a little off those of pictures; a
            decoder that has seen noise forgives that (Zheng et al. 2025, arXiv 2510.11690, whose
            decoders are trained so).
    """

    def __init__(
        self,
        model: AutoencoderKL,
        mse_weight: float,
        gradient_weight: float,
        tail_weight: float,
        tail_start: float,
        latent_noise: float = 0.0,
    ):
        super().__init__()
        self.model, self.latent_noise = model, latent_noise
        self.mse_weight, self.gradient_weight = mse_weight, gradient_weight
        self.tail_weight, self.tail_start = tail_weight, tail_start

    def forward(
        self, images: Tensor, noise: Tensor, share: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss of a batch.

        Args:
            images: uint8 (b, h, w, 3).
            noise: standard normal (b, 4, h/8, w/8).
            share: how much of `latent_noise` each picture gets, in [0, 1] (b, 1, 1, 1).
            kl_weight: a number.

        Returns:
            The loss, and without gradient [squared error, KL, tails, then for each channel the
            posterior's deviation in deviations of the channel].
        """
        x = to_signal(images)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            moments = self.model.quant_conv(self.model.encoder(x))
            mean, log_var = moments.float().chunk(2, dim=1)
            log_var = log_var.clamp(-30.0, 20.0)
            std = torch.exp(0.5 * log_var)
            extra = self.latent_noise * share * mean.detach().std((0, 2, 3), keepdim=True)
            latents = mean + torch.hypot(std, extra) * noise
            y = self.model.decoder(self.model.post_quant_conv(latents))
        residual = y.float() - x
        kl = 0.5 * (mean.square() + std.square() - 1.0 - log_var).mean()
        tails = tail_loss(mean, self.tail_start)
        loss = reconstruction_loss(residual, self.mse_weight, self.gradient_weight)
        loss = loss + kl_weight * kl + self.tail_weight * tails
        relative_std = std.mean((0, 2, 3)) / mean.std((0, 2, 3))
        totals = torch.stack([residual.square().mean(), kl, tails])
        return loss, torch.cat([totals, relative_std]).detach()


def steer_kl_weight(kl_weight: Tensor, relative_std: Tensor, target: float) -> None:
    """Moves the KL weight, in place, until the mean posterior deviation is the target.

    More weight means more noise. The upper limit keeps the KL term from paying for a channel's
    death, which would save about kl_weight x log(1 / relative_std) a channel.

    Args:
        kl_weight: a number.
        relative_std: the posterior's deviation in deviations of the channel (c,).
        target: the wanted mean of them.
    """
    kl_weight.mul_((target / relative_std.mean()) ** 0.003).clamp_(1e-6, 3e-3)


def fold_statistics(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Rescales the latents, in place, so that every channel has mean 0 and deviation 1.

    The 1x1 convolutions on both sides of the latents take up the change: reconstructions stay
    what they were, and one number normalises all channels as well as one for each.

    Args:
        model: an autoencoder with quant_conv and post_quant_conv.
        mean: the mean of each channel of its latents (c,).
        std: their standard deviation (c,).
    """
    c = len(mean)
    with torch.no_grad():
        encode, decode = model.quant_conv, model.post_quant_conv
        decode.bias += decode.weight[:, :, 0, 0] @ mean
        decode.weight *= std[None, :, None, None]
        encode.bias[:c] = (encode.bias[:c] - mean) / std
        encode.weight[:c] /= std[:, None, None, None]
        encode.bias[c:] -= 2.0 * std.log()
