"""Captioned pictures => a latent cache, once for all training runs.

    python encode.py --config=configs/emoji.py
    python encode.py --config=configs/seed.py --config.data.path=FOLDER
    python encode.py --config=configs/seed.py --config.data.source=npy \
        --config.data.path=latents.npy,text_embeddings.npy

The same command again goes on where an interrupted run was.
"""

import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from ldm_jax.cache import cache_home
from ldm_jax.data import MANIFEST, LatentCache, default_cache, open_cache
from ldm_jax.emoji import draw_emoji
from ldm_jax.emoji_styles import DEFAULT_STYLES
from ldm_jax.encoders import load_vae
from ldm_jax.encoding import encode_pictures, from_npy_pair
from ldm_jax.pictures import read_folder
from ldm_jax.text import load_text_encoder


def encode(config: Any, progress: bool = True) -> Path:
    """Encodes the source that a config names, unless that is done already.

    Args:
        config: `data` and `encoders` are read, see configs/seed.py.
        progress: whether to show progress bars.

    Returns:
        The latent cache folder.
    """
    cache, data, encoders = default_cache(config), config.data, config.encoders
    if data.source == "npy":
        paths = [Path(path.strip()).expanduser() for path in data.path.split(",")]
        if len(paths) != 2:
            needed = "latents.npy,text_embeddings.npy"
            raise ValueError(f"data.path must be {needed} for the source npy, got {data.path!r}")
        vae = Path(encoders.vae).expanduser()
        # A folder's name is its full path, as load_vae has it.
        vae_name = str(vae.resolve()) if vae.is_dir() else encoders.vae
        return from_npy_pair(paths[0], paths[1], cache, vae_name, encoders.text, progress=progress)

    # What is wrong with the pictures is said before the encoders are loaded.
    folder = get_pictures(config, progress)
    pictures = read_folder(folder)
    vae, text_encoder = load_vae(encoders.vae), load_text_encoder(encoders.text)
    return encode_pictures(
        pictures, cache, vae, text_encoder, folder, data.image_size, progress=progress
    )


def get_pictures(config: Any, progress: bool = True) -> Path:
    """The folder of pictures that a config names; emoji are drawn into it first."""
    data, path = config.data, config.data.path
    if data.source == "emoji":
        skin_tones = data.get("skin_tones", False)  # Configs of older runs do not say.
        default = cache_home() / ("emoji-tones" if skin_tones else "emoji")
        folder = Path(path).expanduser() if path else default
        return draw_emoji(folder, data.styles or DEFAULT_STYLES, progress, skin_tones)
    if not path:
        raise ValueError("data.path must name the folder of pictures, got nothing")
    return Path(path).expanduser()


def summarise(cache: LatentCache) -> str:
    """What a cache holds, in a few lines."""
    manifest = cache.manifest
    counts = ", ".join(f"{split} {count}" for split, count in manifest["counts"].items())
    return (
        f"{cache.folder}\n"
        f"  pictures    {manifest['pictures']}, skipped {len(manifest['skipped'])}, "
        f"in {len(manifest['shards'])} shards\n"
        f"  examples    {counts}\n"
        f"  latents     {cache.latent_shape}, std_latent {cache.std_latent:.4f}, "
        f"by {manifest['vae']['name']}\n"
        f"  embeddings  {cache.embedding_shape}, by {manifest['text_encoder']['name']}"
    )


def main(argv: list[str]):
    if len(argv) > 1:
        raise app.UsageError(f"flags must look like --config.data.path=..., got {argv[1:]}")
    config = flags.FLAGS.config
    start = time.perf_counter()
    try:
        was_there = (default_cache(config) / MANIFEST).exists()
        cache = open_cache(encode(config))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        logging.debug("Raised here:", exc_info=True)  # Shown by --verbosity=1.
        raise SystemExit(f"encode.py: {error}") from error
    print(summarise(cache))
    if was_there:
        print("This cache was complete already; nothing was encoded.")
    else:
        seconds = time.perf_counter() - start
        print(f"{seconds:.1f} s, {cache.manifest['pictures'] / seconds:.1f} pictures/s")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a config, e.g. configs/emoji.py")
    flags.mark_flag_as_required("config")
    app.run(main)
