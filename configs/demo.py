"""A few minutes on two cores: a small network on one style, for `./run demo`."""

from configs import emoji


def get_config():
    config = emoji.get_config()
    config.steps = 450
    config.batch_size = 64
    config.data.styles = ("twemoji",)
    config.network.block_depth = 1
    config.network.widths = (32, 64, 96)
    config.network.dropout = 0.1
    config.network.dtype = "float32"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.training.translation = 0.0
    config.training.ema_decay = 0.99
    config.log_every = 50
    config.eval_every = 150
    config.sample_every = 450
    config.save_every = 225
    return config
