"""The guide of the bundled weights: the recipe's small beginning, which guidance leads away from.

    python train.py --config=configs/guide.py --workdir=runs/guide
    python scripts/export_model.py runs/guide runs/emoji/guide

Autoguidance (Karras et al. 2024) wants a network that errs as the one it guides does, only more:
one with less room, stopped long before it is done.
"""

from configs import emoji


def get_config():
    config = emoji.get_config()
    config.steps = 1_200
    config.network.widths = (128, 160, 160)
    config.optimizer.decay = "constant"
    return config
