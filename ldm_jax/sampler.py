"""Reverse diffusion: noise to start from, text embeddings => clean latents, in one `lax.scan`."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ldm_jax import estimating, folding, graphs, ranks, solvers
from ldm_jax.guidance import drop_style, guide, guide_apart, guide_by_weaker
from ldm_jax.noising import ForwardProcess, SignalRule
from ldm_jax.schedules import get_noise_levels


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
    s = jnp.maximum(ranks.percentile(jnp.abs(img).reshape(len(img), -1), perc), 1.0)
    s = s.reshape((-1,) + (1,) * (img.ndim - 1))
    return jnp.clip(img, -s, s) / s


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
    return _draw_noise(_check_seeds(picture_seeds), tuple(latent_shape))


def get_picture_keys(picture_seeds: Sequence[int] | np.ndarray) -> PRNGKeyArray:
    """A key for each picture, for noise on the way; not the one that `sample_seeds` spends."""
    return _derive_keys(_check_seeds(picture_seeds))


def _check_seeds(picture_seeds):
    numbers = np.asarray(picture_seeds)
    if numbers.ndim != 1 or not numbers.size or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"picture_seeds must be a sequence of integers, got {picture_seeds!r}")
    if numbers.min() < 0 or numbers.max() >= 2**32:
        raise ValueError(f"a picture's seed must lie in [0, 2^32), got {picture_seeds!r}")
    return jnp.asarray(numbers.astype(np.uint32))


@partial(jax.jit, static_argnums=1)
def _draw_noise(picture_seeds, latent_shape):
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), latent_shape))(
        picture_seeds
    )


@jax.jit
def _derive_keys(picture_seeds):
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(picture_seeds)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables"],
    meta_fields=["network", "process"],
)
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network with its weights: a callable pytree, (x_t, noise_levels, labels) => x_0.

    Attributes:
        network: a linen module, compared by its fields; the same fields never retrace.
        variables: its params and batch_stats.
        process: of its training, which says what the network's output means, also to a sampler that
            updates by another rule.
    """

    network: Any
    variables: Any
    process: ForwardProcess = ForwardProcess()

    def __call__(self, x_t, noise_levels, labels):
        output = self.network.apply(self.variables, x_t, noise_levels, labels)
        return self.process.get_x_zero(x_t, output, noise_levels)

    def prepare(self, labels: Float[Array, "k n *t e"]) -> Callable:
        """What `get_estimator` returns, with all that a loop over noise levels can share done."""
        if not folding.can_fold(self.network, labels):
            return _batch(dataclasses.replace(self, variables=self._in_compute_dtype()), labels)
        run = estimating.get_estimator(self.network, self.variables, labels)

        def estimate(x_t, noise_level):
            get_x_zero = lambda output: self.process.get_x_zero(x_t, output, noise_level)  # noqa: E731
            return jax.vmap(get_x_zero)(run(x_t, noise_level))

        return estimate

    def _in_compute_dtype(self):
        """Kernels in the dtype that they are used in: they are rounded once, not at each step."""
        dtype = self.network.dtype

        def convert(path, x):
            used = x.ndim > 1 and path[1].key != "conv_out"
            return x.astype(dtype) if used else x

        return jax.tree_util.tree_map_with_path(convert, self.variables)


def in_float32_on_cpu(denoiser: Denoiser) -> Denoiser:
    """On a CPU the network in float32, whatever its dtype: it has no fast bfloat16."""
    if jax.default_backend() != "cpu":
        return denoiser
    return dataclasses.replace(denoiser, network=denoiser.network.clone(dtype="float32"))


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
    data_fields=[
        "denoiser",
        "class_guidance",
        "style_guidance",
        "guidance_interval",
        "guidance_rescale",
        "guide",
    ],
    meta_fields=["diffusion_steps", "rule", "schedule", "perc", "method", "eta"],
)
@dataclasses.dataclass(frozen=True)
class Diffuser:
    """Draws latents by reverse diffusion with guidance. A pytree.

    New weights, guidance weights, intervals or other prompts of the same number never retrace.

    Attributes:
        denoiser: a pytree that is called with (x_t, noise_levels, labels) and estimates x_0:
            a `Denoiser`, or any function wrapped in `jax.tree_util.Partial`.
        class_guidance: weight w of the text; 1 is no guidance, 0 ignores the text.
        diffusion_steps: number of noise levels; the network runs once less (Heun: twice as often).
        rule: the signal rule of the update. The convex one is the original's, also for networks
            that were trained on the variance-preserving mixture.
        schedule: of `get_noise_levels`.
        perc: percentile of the dynamic thresholding.
        method: how to walk, one of `solvers.METHODS`.
        eta: share of fresh noise in the method "ddim", in [0, 1].
        guidance_interval: lowest and highest noise level at which w counts; it is 1 elsewhere
            (Kynkaanniemi et al. 2024).
        guidance_rescale: phi of `guide`, in [0, 1].
        style_guidance: weight of the text's style, and w that of the rest; see `guide_apart`. For
            text embeddings of two parts side by side, as "use-parts" gives them; the network then
            runs on three texts a level instead of two. None: w for both.
        guide: a weaker denoiser, an earlier or smaller checkpoint, which estimates with the text
            what the denoiser is led away from (autoguidance, Karras et al. 2024). Without one it is
            the denoiser itself without the text.
    """

    denoiser: Callable
    class_guidance: Float[Array, ""] | float = 4.0
    diffusion_steps: int = 70
    rule: SignalRule = SignalRule("convex")
    schedule: str = "cube_root"
    perc: float = 99.5
    method: str = "ddim"
    eta: float = 0.0
    guidance_interval: tuple[Any, Any] = (0.0, 1.0)
    guidance_rescale: Float[Array, ""] | float = 0.0
    style_guidance: Float[Array, ""] | float | None = None
    guide: Callable | None = None

    def predict_x_zero(
        self,
        x_t: Float[Array, "n h w c"],
        labels: Float[Array, "n *t e"],
        noise_level: Float[Array, ""] | float,
        negative_labels: Float[Array, "n *t e"] | None = None,
    ) -> Float[Array, "n h w c"]:
        """The guided, thresholded estimate of the clean latents, w text + (1 - w) none.

        Args:
            x_t: noisy latents.
            labels: text embeddings.
            noise_level: a, the same for all samples.
            negative_labels: embeddings of what to be led away from, in the place of no text.
        """
        return self._get_estimate(labels, negative_labels)(x_t, noise_level)

    def _get_estimate(self, labels, negative_labels):
        """estimate(x_t, noise_level), guided and thresholded."""
        other_labels = jnp.zeros_like(labels) if negative_labels is None else negative_labels
        apart = self.style_guidance is not None
        styleless = [drop_style(labels)] if apart else []
        if self.guide is None:
            guide_styled = guide_apart
            estimate_all = get_estimator(
                self.denoiser, jnp.stack([labels, other_labels, *styleless])
            )
        elif negative_labels is not None:
            raise ValueError("negative labels do not go with a guide, which sees the text")
        else:
            guide_styled = guide_by_weaker
            estimate_own = get_estimator(self.denoiser, jnp.stack([labels, *styleless]))
            estimate_other = get_estimator(self.guide, labels[None])

            def estimate_all(x_t, level):
                preferred, *styleless = estimate_own(x_t, level)
                return preferred, *estimate_other(x_t, level), *styleless

        def estimate(x_t, level):
            low, high = self.guidance_interval
            inside = (low <= level) & (level <= high)
            weight = jnp.where(inside, self.class_guidance, 1.0)
            preferred, other, *styleless = estimate_all(x_t, level)
            if self.style_guidance is None:
                guided = guide(preferred, other, weight, self.guidance_rescale)
            else:
                weights = weight, jnp.where(inside, self.style_guidance, 1.0)
                guided = guide_styled(
                    preferred, other, styleless[0], *weights, rescale=self.guidance_rescale
                )
            return dynamic_thresholding(guided, self.perc)

        return estimate

    @graphs.RecordedJit
    def reverse_diffusion(
        self,
        seeds: Float[Array, "n h w c"],
        labels: Float[Array, "n *t e"],
        negative_labels: Float[Array, "n *t e"] | None = None,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "n h w c"]:
        """Walks noise back to latents in [-1, 1]; the last estimate of x_0 is the result.

        Args:
            seeds: noise to start from, N(0, I), as `sample_seeds` draws it.
            labels: text embeddings, one for each seed; zeros for no text.
            negative_labels: see `predict_x_zero`.
            keys: of `get_picture_keys`, for methods that draw noise on the way.

        Raises:
            ValueError: if the numbers of seeds and labels differ, or keys are missing.
        """
        if seeds.shape[0] != labels.shape[0]:
            raise ValueError(f"got {seeds.shape[0]} seeds for {labels.shape[0]} labels")
        levels = jnp.asarray(get_noise_levels(self.diffusion_steps, self.schedule))
        estimate = self._get_estimate(labels, negative_labels)
        return solvers.walk(
            self.method, estimate, self.rule, seeds, levels, eta=self.eta, keys=keys
        )


def get_diffuser(
    denoiser: Callable,
    *,
    class_guidance: float = 4.0,
    diffusion_steps: int = 70,
    mixture: str = "convex",
    schedule: str = "cube_root",
    perc: float = 99.5,
    method: str = "ddim",
    eta: float = 0.0,
    guidance_interval: Sequence[float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    style_guidance: float = 0.0,
    guide: Callable | None = None,
) -> Diffuser:
    """A Diffuser from plain settings, as configs and checkpoints hold them.

    `mixture` names the signal rule of the update: "convex" is update A, which the original runs,
    "variance_preserving" update B. A style_guidance of 0 is none: class_guidance counts for all of
    the text. See `Diffuser` for the rest.

    Raises:
        ValueError: for a guidance weight that is not finite, too few steps, numbers outside their
            ranges, or unknown names.
    """
    for name, value in (("class_guidance", class_guidance), ("style_guidance", style_guidance)):
        if not np.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
    if not 0 <= perc <= 100:
        raise ValueError(f"perc must lie in [0, 100], got {perc}")
    for name, value in (("eta", eta), ("guidance_rescale", guidance_rescale)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    interval = tuple(float(level) for level in guidance_interval)
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"guidance_interval must be two levels, 0 <= low <= high <= 1, got {guidance_interval}"
        )
    solvers.check_method(method, eta)
    get_noise_levels(diffusion_steps, schedule)  # Raises for steps or schedules that do not exist.
    return Diffuser(
        denoiser,
        class_guidance,
        diffusion_steps,
        SignalRule(mixture),
        schedule,
        perc,
        method,
        eta,
        interval,
        guidance_rescale,
        style_guidance or None,
        guide,
    )
