"""The recipe of the bundled weights: emoji of six styles, our own VAE, Universal Sentence Encoder.

    python encode.py --config=configs/emoji.py
    python train.py --config=configs/emoji.py --workdir=runs/emoji

7.9 M weights, as many as float16 leaves room for in 16 MiB. On one NVIDIA H200 (JAX 0.11.2):
36 200 img/s, 46 900 steps in 13 minutes, after 30 to 50 s of compilation. The training loss went
from 0.180 (mean of the first 100 steps) to 0.0450. The held-out loss, on concepts never seen, was
lowest at step 5 000, 0.0788, and 0.0976 at the end: 46 900 steps are 2 950 passes over 8 136
pictures, and the network comes to know them by heart. docs/emoji.md shows what it draws.
"""

from configs import seed


def get_config():
    config = seed.get_config()
    config.steps = 46_900
    config.batch_size = 512

    config.data.source = "emoji"
    config.encoders.vae = "bundled:emoji"
    config.encoders.text = "use"

    config.latents.normalisation = "channel"
    config.latents.deviations = 3.0

    config.network.block_depth = 2
    config.network.widths = (128, 192, 192)
    config.network.norm = "group"
    config.network.heads = 4
    config.network.scaled = True
    config.network.key_fraction = 2
    config.network.dropout = 0.1
    config.network.dtype = "bfloat16"

    # Over all the levels that the sampler visits.
    config.noising.max_angle = 1.57

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.decay = "cosine"
    config.optimizer.clip_norm = 1.0
    config.training.ema_decay = 0.9995

    config.sampling.class_guidance = 3.0
    config.sampling.mixture = "variance_preserving"
    config.sampling.schedule = "angle"
    config.sample_every = 10_000
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
