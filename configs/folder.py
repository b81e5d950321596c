"""A folder of your own pictures, with the Stable Diffusion VAE and CLIP from the hub.

    python encode.py --config=configs/folder.py --config.data.path=photos
    python train.py --config=configs/folder.py --config.data.path=photos --workdir=runs/photos

A place to start from, not yet run on photographs: the emoji's network and noising, and the
optimizer of the training that did not break down (docs/quality-log.md), for one GPU. Steps do not
depend on the number of pictures: 50 000 of batch 256 see each of 100 000 pictures 128 times. For
pictures of 256 x 256: data.image_size = 256, network.latent_image_size = 32.
"""

from configs import emoji, seed


def get_config():
    config = emoji.get_config()
    config.steps = 50_000
    config.batch_size = 256
    config.data.source = "folder"
    config.encoders = seed.get_config().encoders
    config.network.emb_size = 512

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2_000
    config.optimizer.b2 = 0.99
    config.training.translation = 0.0  # Of sets so small that they are learnt by heart.

    config.sampling.style_guidance = 0.0  # CLIP does not keep a caption's style apart.
    config.sample_every = 5_000
    config.captions = seed.get_config().captions
    return config
