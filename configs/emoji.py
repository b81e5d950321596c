"""The recipe of the bundled weights: emoji of nine styles, our own VAE, name and style apart.

    python encode.py --config=configs/emoji.py
    python train.py --config=configs/emoji.py --workdir=runs/emoji
    python train.py --config=configs/guide.py --workdir=runs/guide
    python scripts/export_model.py runs/guide runs/emoji/guide

27.7 M weights, and 8.2 M of a guide; 17 300 steps take six minutes on four NVIDIA H200s (JAX
0.11.2, 102 600 img/s; the bundled weights were trained at 84 500, in seven). docs/quality.md has
the figures by which it was chosen, docs/emoji.md what the weights draw.
"""

from configs import seed


def get_config():
    config = seed.get_config()
    config.steps = 17_300
    config.batch_size = 2_048

    config.data.source = "emoji"
    config.encoders.vae = "bundled:emoji"
    config.encoders.text = "use-parts"

    config.latents.normalisation = "channel"
    config.latents.deviations = 3.0

    config.network.block_depth = 2
    config.network.widths = (192, 320, 384)
    config.network.emb_size = 1024
    config.network.conditioning = "adaptive"
    config.network.norm = "group"
    config.network.heads = 4
    config.network.scaled = True
    config.network.key_fraction = 2
    config.network.dropout = 0.15
    config.network.dtype = "bfloat16"

    # Centred where noise is as strong as the latents, whose standard deviation is 1/3.
    config.noising.noise_law = "log_normal"
    config.noising.p_mean = -1.0
    config.noising.p_std = 1.4
    config.noising.target = "velocity"
    config.training.loss = "mse"

    config.optimizer.learning_rate = 1.3e-3
    config.optimizer.warmup_steps = 1_000
    config.optimizer.decay = "cosine"
    config.optimizer.clip_norm = 1.0
    config.training.translation = 0.5
    config.training.ema_decay = 0.9995

    config.sampling.class_guidance = 3.0
    config.sampling.style_guidance = 3.5
    config.sampling.mixture = "variance_preserving"
    config.sampling.method = "dpm_solver_pp_2m"
    config.sampling.schedule = "log_snr"
    config.sampling.diffusion_steps = 13
    config.sample_every = 7_500
    config.captions = (
        "red apple, Fluent 3D",
        "grinning face, Twemoji",
        "cat face, Noto",
        "house with garden, Fluent flat",
        "evergreen tree, EmojiOne",
        "taxi, blob",
        "crescent moon",
        "hot beverage",
    )
    return config
