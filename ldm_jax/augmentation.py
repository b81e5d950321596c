"""Latents moved by whole cells, and embeddings that say so: more pictures out of a small set."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

MOST_CELLS = 2  # 16 pixels of 128, for a VAE that makes a cell of 8 x 8.
# What a cell adds to numbers that differ by 0.9 from name to name (deviation), and reach 3.6 among
# the emoji's by `use`: with 0.25, networks took those of names they did not know for moves.
TOLD = 6.0


def translate(
    rng: PRNGKeyArray,
    latents: Float[Array, "h w c"],
    labels: Float[Array, "*n e"],
    share: float,
) -> tuple[Float[Array, "h w c"], Float[Array, "*n e"]]:
    """Moves one picture's latents by up to two cells each way, with probability `share`.

    The cells at the edge are repeated into the room that is left. How far it went down and to the
    right is added to the first two numbers of the text embedding, of each token, "no text" as well:
    the network learns where a moved picture is, and what is drawn without being told so is not
    moved (non-leaking augmentation, Karras et al. 2022, appendix F.2). A VAE's encoder is a
    convolution, but for its attention and norms: moved latents are nearly those of a moved picture.

    Args:
        rng: key of this picture, consumed.
        latents: of one picture.
        labels: its text embedding, after the text's dropout.
        share: in [0, 1].
    """
    whether_key, where_key = jax.random.split(rng)
    offset = jax.random.randint(where_key, (2,), -MOST_CELLS, MOST_CELLS + 1)
    offset = jnp.where(jax.random.bernoulli(whether_key, share), offset, 0)
    room = (MOST_CELLS, MOST_CELLS)
    padded = jnp.pad(latents, (room, room, (0, 0)), mode="edge")
    start = MOST_CELLS - offset
    moved = jax.lax.dynamic_slice(padded, (start[0], start[1], 0), latents.shape)
    return moved, labels.at[..., :2].add(TOLD * offset)
