"""Reverse diffusion: noise to start from, text embeddings => clean latents, in one `lax.scan`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax import folding
from ldm_jax.noising import SignalRule

SCHEDULES = ("cube_root", "angle")


def get_noise_levels(diffusion_steps: int, schedule: str = "cube_root") -> np.ndarray:
    """The decreasing noise levels that reverse diffusion visits, float32.

    "cube_root", the original's: 1 - t^(1/3) for t in arange(1e-4, 0.99, 1 / steps), the last level
    set to 0.01. "angle": sin of `diffusion_steps` angles, equally spaced, from level 0.999 to 0.01.
    The network sees all levels but the last.

    Raises:
        ValueError: for fewer than 2 steps, or another schedule.
    """
    if diffusion_steps < 2:
        raise ValueError(f"diffusion_steps must be at least 2, got {diffusion_steps}")
    if schedule == "cube_root":
        levels = 1 - np.arange(1e-4, 0.99, 1 / diffusion_steps) ** (1 / 3)
        levels[-1] = 0.01
    elif schedule == "angle":
        levels = np.sin(np.linspace(np.arcsin(0.999), np.arcsin(0.01), diffusion_steps))
    else:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    return levels.astype(np.float32)


def dynamic_thresholding(
    img: Float[Array, "b h w c"], perc: float = 99.5
) -> Float[Array, "b h w c"]:
    """Clips each sample to +-s and divides by s, s = max(percentile(|x|, perc), 1).

    Saharia et al. 2022, section 2.3. s belongs to each sample, so that a picture does not depend on
    its neighbours in the batch.

    Args:
        img: estimates of clean latents, any number of axes after the first.
        perc: in [0, 100].
    """
    s = jnp.maximum(_percentile(jnp.abs(img).reshape(len(img), -1), perc), 1.0)
    s = s.reshape((-1,) + (1,) * (img.ndim - 1))
    return jnp.clip(img, -s, s) / s


def _percentile(x: Float[Array, "b n"], perc: float) -> Float[Array, " b"]:
    """jnp.percentile of each row, from its few largest numbers alone: no row is sorted."""
    place = perc / 100 * (x.shape[1] - 1)
    below = math.floor(place)
    largest, _ = jax.lax.top_k(x, x.shape[1] - below)
    low, high = largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)]
    return low + (place - below) * (high - low)


def sample_seeds(
    picture_seeds: Sequence[int] | np.ndarray, latent_shape: tuple[int, ...]
) -> Float[Array, "n h w c"]:
    """Noise to start from, N(0, I), that of picture i a function of picture_seeds[i] alone.

    Args:
        picture_seeds: an integer in [0, 2^32) for each picture.
        latent_shape: (h, w, c).

    Raises:
        ValueError: for seeds outside that range, or none.
    """
    numbers = np.asarray(picture_seeds)
    if numbers.ndim != 1 or not numbers.size or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"picture_seeds must be a sequence of integers, got {picture_seeds!r}")
    if numbers.min() < 0 or numbers.max() >= 2**32:
        raise ValueError(f"a picture's seed must lie in [0, 2^32), got {picture_seeds!r}")
    return _draw_noise(jnp.asarray(numbers.astype(np.uint32)), tuple(latent_shape))


@partial(jax.jit, static_argnums=1)
def _draw_noise(picture_seeds, latent_shape):
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), latent_shape))(
        picture_seeds
    )


@partial(jax.tree_util.register_dataclass, data_fields=["variables"], meta_fields=["network"])
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network with its weights: a callable pytree, (x_t, noise_levels, labels) => x_0.

    Attributes:
        network: a linen module, compared by its fields; the same fields never retrace.
        variables: its params and batch_stats.
    """

    network: Any
    variables: Any

    def __call__(self, x_t, noise_levels, labels):
        return self.network.apply(self.variables, x_t, noise_levels, labels)

    def prepare(self, labels: Float[Array, "k n *t e"]) -> Callable:
        """What `get_estimator` returns, with all that a loop over noise levels can share done."""
        if folding.can_fold(self.network, labels):
            return folding.get_estimator(self.network, self.variables, labels)
        return _batch(Denoiser(self.network, self._in_compute_dtype()), labels)

    def _in_compute_dtype(self):
        """Kernels in the dtype that they are used in: they are rounded once, not at each step."""
        dtype = self.network.dtype

        def convert(path, x):
            used = x.ndim > 1 and path[1].key != "conv_out"
            return x.astype(dtype) if used else x

        return jax.tree_util.tree_map_with_path(convert, self.variables)


def get_estimator(denoiser: Callable, labels: Float[Array, "k n *t e"]) -> Callable:
    """estimate(x_t (n, h, w, c), noise_level ()) -> estimates of x_0 (k, n, h, w, c).

    One for each of k sets of labels, by the denoiser's own `prepare` if it has one.
    """
    return denoiser.prepare(labels) if hasattr(denoiser, "prepare") else _batch(denoiser, labels)


def _batch(denoiser, labels):
    """All sets of labels go through the network as one batch of k n."""
    k, n = labels.shape[:2]

    def estimate(x_t, noise_level):
        noise_levels = jnp.full((k * n,), noise_level, x_t.dtype)
        x_zero = denoiser(
            jnp.concatenate([x_t] * k), noise_levels, labels.reshape(-1, *labels.shape[2:])
        )
        return x_zero.reshape(k, *x_t.shape)

    return estimate


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["denoiser", "class_guidance"],
    meta_fields=["diffusion_steps", "rule", "schedule", "perc"],
)
@dataclasses.dataclass(frozen=True)
class Diffuser:
    """Draws latents by reverse diffusion with classifier-free guidance. A pytree.

    New weights, another guidance weight or other prompts of the same number never retrace.

    Attributes:
        denoiser: a pytree that is called with (x_t, noise_levels, labels) and estimates x_0:
            a `Denoiser`, or any function wrapped in `jax.tree_util.Partial`.
        class_guidance: weight w of the text; 1 is no guidance, 0 ignores the text.
        diffusion_steps: number of noise levels; the network runs once less.
        rule: the signal rule of the update. The convex one is the original's, also for networks
            that were trained on the variance-preserving mixture.
        schedule: of `get_noise_levels`.
        perc: percentile of the dynamic thresholding.
    """

    denoiser: Callable
    class_guidance: Float[Array, ""] | float = 4.0
    diffusion_steps: int = 70
    rule: SignalRule = SignalRule("convex")
    schedule: str = "cube_root"
    perc: float = 99.5

    def predict_x_zero(
        self,
        x_t: Float[Array, "n h w c"],
        labels: Float[Array, "n *t e"],
        noise_level: Float[Array, ""] | float,
    ) -> Float[Array, "n h w c"]:
        """The guided, thresholded estimate of the clean latents, w text + (1 - w) none.

        Args:
            x_t: noisy latents.
            labels: text embeddings.
            noise_level: a, the same for all samples.
        """
        return self._guide(self._get_estimator(labels), x_t, noise_level)

    def _get_estimator(self, labels):
        """Estimates with the text and without it."""
        return get_estimator(self.denoiser, jnp.stack([labels, jnp.zeros_like(labels)]))

    def _guide(self, estimate, x_t, noise_level):
        with_text, without = estimate(x_t, noise_level)
        w = self.class_guidance
        return dynamic_thresholding(w * with_text + (1 - w) * without, self.perc)

    @jax.jit
    def reverse_diffusion(
        self, seeds: Float[Array, "n h w c"], labels: Float[Array, "n *t e"]
    ) -> Float[Array, "n h w c"]:
        """Walks noise back to latents in [-1, 1]; the last estimate of x_0 is the result.

        Args:
            seeds: noise to start from, N(0, I), as `sample_seeds` draws it.
            labels: text embeddings, one for each seed; zeros for no text.

        Raises:
            ValueError: if the numbers of seeds and labels differ.
        """
        if seeds.shape[0] != labels.shape[0]:
            raise ValueError(f"got {seeds.shape[0]} seeds for {labels.shape[0]} labels")
        levels = jnp.asarray(get_noise_levels(self.diffusion_steps, self.schedule))
        estimate = self._get_estimator(labels)

        def step(carry, pair):
            x_t, _ = carry  # noisy latents at the level, the latest estimate of x_0
            level, next_level = pair
            x_zero = self._guide(estimate, x_t, level)
            return (self.rule.update(x_t, x_zero, level, next_level), x_zero), None

        start = (seeds, jnp.zeros_like(seeds))
        (_, x_zero), _ = jax.lax.scan(step, start, (levels[:-1], levels[1:]))
        return x_zero


def get_diffuser(
    denoiser: Callable,
    *,
    class_guidance: float = 4.0,
    diffusion_steps: int = 70,
    mixture: str = "convex",
    schedule: str = "cube_root",
    perc: float = 99.5,
) -> Diffuser:
    """A Diffuser from plain settings, as configs and checkpoints hold them.

    `mixture` names the signal rule of the update: "convex" is update A, which the original runs,
    "variance_preserving" update B. See `Diffuser` for the rest.

    Raises:
        ValueError: for a guidance weight that is not finite, too few steps, or unknown names.
    """
    if not np.isfinite(class_guidance):
        raise ValueError(f"class_guidance must be a finite number, got {class_guidance}")
    if not 0 <= perc <= 100:
        raise ValueError(f"perc must lie in [0, 100], got {perc}")
    get_noise_levels(diffusion_steps, schedule)  # Raises for steps or schedules that do not exist.
    rule = SignalRule(mixture)
    return Diffuser(denoiser, class_guidance, diffusion_steps, rule, schedule, perc)
