"""The original's recipe, and the one place where every key of a config is declared.

83.2 M weights (the original's 83.8 M less its dead queries and keys), Adam at 3e-4, batch 256,
130 epochs of 100 000 pairs, mean absolute error on x_0, text dropped with probability 0.15; 70
steps of update A with guidance 4. The encoders are those of real use: the Stable Diffusion VAE and
CLIP ViT-B/32, from the hub or from a local folder.

Other configs start from this one and say what they change.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.steps = 50_800
    config.batch_size = 256
    # Weights to start from, with the scale of the latents that belongs to them: a run's workdir
    # (the averages of its last checkpoint), an exported model, or "bundled"; empty: random ones.
    config.start_from = ""

    # What is encoded, once, by encode.py. `cache` is where; empty: a name in the user's cache.
    config.data = ConfigDict()
    config.data.source = "folder"  # emoji, folder or npy
    config.data.path = ""
    config.data.cache = ""
    config.data.styles = ()  # of the emoji source; empty: all but openmoji
    config.data.skin_tones = False  # of the emoji source: train on toned pictures too
    config.data.image_size = 128
    config.encoders = ConfigDict()
    config.encoders.vae = "stabilityai/sd-vae-ft-ema"
    config.encoders.text = "clip"

    # Latents are clipped at this many standard deviations, of all ("global") or of each "channel".
    config.latents = ConfigDict()
    config.latents.normalisation = "global"
    config.latents.deviations = 2.5

    config.network = ConfigDict()
    config.network.latent_image_size = 16
    config.network.block_depth = 3
    config.network.emb_size = 512
    config.network.latent_channels = 4
    config.network.widths = (128, 256, 512, 640)
    config.network.conditioning = "token"  # or adaptive, beside the token
    config.network.norm = "batch"  # group or rms
    config.network.heads = 1
    config.network.scaled = False
    config.network.key_fraction = 8
    config.network.dropout = 0.0
    config.network.noise_emb_dim = 32
    config.network.text_features = 256
    config.network.dtype = "float32"
    config.network.remat = False  # less memory for more arithmetic

    config.noising = ConfigDict()
    config.noising.mixture = "variance_preserving"
    config.noising.noise_law = "half_normal"  # uniform or log_normal
    config.noising.max_angle = 1.0  # of half_normal and uniform
    config.noising.p_mean = -1.2  # of log_normal
    config.noising.p_std = 1.2
    config.noising.target = "x_zero"  # what the network puts out, or velocity

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 0
    config.optimizer.decay = "constant"
    config.optimizer.b2 = 0.999
    config.optimizer.clip_norm = 0.0  # 0: no clipping
    config.training = ConfigDict()
    config.training.label_dropout = 0.15
    config.training.translation = 0.0  # probability of moving a picture by up to two cells
    config.training.ema_decay = 0.999
    config.training.accumulate = 1  # parts of a device's batch, one after the other
    config.training.loss = "mae"  # mse or huber
    config.training.loss_weighting = "none"  # min_snr
    config.training.huber_delta = 0.1  # of huber
    config.training.min_snr_gamma = 5.0  # of min_snr

    # More averages, of which one of any length can be made afterwards, see docs/checkpoints.md.
    config.power_ema = ConfigDict()
    config.power_ema.sigma_rels = ()  # lengths, as (0.05, 0.1); empty: none
    config.power_ema.snapshot_every = 1_000  # steps; every checkpoint comes with a snapshot too

    config.sampling = ConfigDict()
    config.sampling.class_guidance = 4.0
    config.sampling.diffusion_steps = 70
    config.sampling.mixture = "convex"
    config.sampling.schedule = "cube_root"
    config.sampling.perc = 99.5
    config.sampling.method = "ddim"  # euler_ancestral, heun or dpm_solver_pp_2m
    config.sampling.eta = 0.0  # fresh noise of ddim
    config.sampling.guidance_interval = (0.0, 1.0)  # noise levels at which guidance counts
    config.sampling.guidance_rescale = 0.0
    config.sampling.style_guidance = 0.0  # of the style alone; 0: class_guidance for all
    # Drawn while training, always from the same seeds.
    config.captions = (
        "a red apple",
        "a smiling face",
        "a cat",
        "a house with a garden",
        "a green tree",
        "a yellow car",
        "the moon at night",
        "a cup of coffee",
    )

    # Quality of pictures of the averaged weights, as evaluate.py measures it.
    config.evaluate_every = 0  # 0: never
    config.evaluation = ConfigDict()
    config.evaluation.captions_per_group = 64
    config.evaluation.features = "efflite0"
    config.evaluation.batch_size = 64  # pictures drawn at once

    # Devices. `mesh`: "data", "fsdp", or both, as "data,fsdp=8". `parallelism`: "jit" or "pmap".
    config.sharding = ConfigDict()
    config.sharding.mesh = "data"
    config.sharding.parallelism = "jit"
    config.sharding.reduce_dtype = "float32"  # in which gradients are added up, or "bfloat16"

    config.log_every = 100
    config.eval_every = 1_000
    config.sample_every = 5_000  # 0: never
    config.save_every = 5_000
    config.keep_checkpoints = 2
    return config.lock()
