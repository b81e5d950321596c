"""Seconds on two cores: for tests, and to see that an installation works. It draws only noise."""

from configs import emoji


def get_config():
    config = emoji.get_config()
    config.steps = 20
    config.batch_size = 16
    config.data.styles = ("twemoji",)
    config.encoders.text = "use"
    config.network.emb_size = 512
    config.network.block_depth = 1
    config.network.widths = (16, 32, 32)
    config.network.heads = 2
    config.network.dtype = "float32"
    config.optimizer.warmup_steps = 2
    config.sampling.diffusion_steps = 5
    config.sampling.style_guidance = 0.0  # "use" does not keep the style apart.
    config.captions = ("red apple", "grinning face")
    config.log_every = 5
    config.eval_every = 10
    config.sample_every = 20
    config.save_every = 10
    return config
