"""70 guided steps of configs/seed.py's network, beside its PyTorch peers => pictures a second.

    python -m benchmarks.sampling [--rows=ours,torch-one-compile] [--nums=64,1]
    python -m benchmarks.sampling --demo --nums=8 --steps=10 --rows=ours,torch-one-eager
    python -m benchmarks.sampling --tiny

Latents alone, from noise and text embeddings on the device; all in bfloat16, on a CPU in float32.
"ours-by-xla" leaves out the kernels of `ldm_jax.kernels`; "ours-unfolded" calls the network at each
step instead of what `Denoiser.prepare` makes of it. The columns are those of
benchmarks/train_step.py, with these differences:

    size         latents of a call
    ms           of a call: all steps of all latents
    of peak      2 x 69 x FLOPs of the forward pass x img/s, of the matrix product's FLOP/s
    kernels      of one step of 69, as are the ms that they are busy
"""

import sys
from functools import cached_property, partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import rows, timing
from ldm_jax import kernels
from ldm_jax.flops import count_flops
from ldm_jax.sampler import Denoiser, Diffuser, get_diffuser, sample_seeds
from ldm_jax.unet import get_network

ROWS = "ours,ours-by-xla,ours-unfolded,torch-one-eager,torch-one-compile,torch-tiled-compile"
OURS = "ours", "ours-by-xla", "ours-unfolded"


class Sampler:
    """Our diffusers over a network with random weights.

    Args:
        fields: of `get_network`.
        steps: noise levels.
    """

    def __init__(self, fields: dict[str, Any], steps: int):
        self.network, self.steps = get_network(**fields, dtype=rows.get_dtype()), steps
        size, channels = self.network.latent_image_size, self.network.latent_channels
        self.shapes = (size, size, channels), (self.network.emb_size,)

    def create_diffuser(self, work: str = "ours") -> Diffuser:
        """The diffuser of a row of ours.

        Raises:
            ValueError: for another row.
        """
        if work not in OURS:
            raise ValueError(f"a row of ours is one of {OURS}, got {work!r}")
        denoiser = Denoiser(self.network, self.variables)
        if work == "ours-unfolded":
            denoiser = jax.tree_util.Partial(Denoiser.__call__, denoiser)
        return get_diffuser(denoiser, diffusion_steps=self.steps)

    @cached_property
    def variables(self) -> dict:
        """Random ones, made once; the last kernel is not zero, or all latents would be."""
        x_t, labels = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in self.shapes)
        levels = jax.ShapeDtypeStruct((1,), jnp.float32)
        key = jax.random.key(0)
        return timing.draw_weights(jax.eval_shape(self.network.init, key, x_t, levels, labels))

    def draw_inputs(self, num: int) -> tuple[jax.Array, jax.Array]:
        """Noise to start from, and text embeddings."""
        latent_shape, embedding_shape = self.shapes
        labels = jax.random.normal(jax.random.key(1), (num, *embedding_shape))
        return sample_seeds(range(num), latent_shape), labels

    def lower(self, work: str, num: int) -> Any:
        """The whole loop for so many latents, lowered."""
        inputs = self.draw_inputs(num)
        jax.clear_caches()  # Or a program traced before is taken, whichever kernels it has.
        can_run = kernels.can_run if work == "ours" else lambda network: False
        with mock.patch.object(kernels, "can_run", can_run):
            return Diffuser.reverse_diffusion.lower(self.create_diffuser(work), *inputs)

    def get_call(self, work: str, num: int, program: Any) -> Any:
        """A call of the compiled loop."""
        return partial(program, self.create_diffuser(work), *self.draw_inputs(num))


def get_torch_call(fields: dict[str, Any], steps: int, tokens: str, mode: str, num: int) -> Any:
    """A call of PyTorch's sampler."""
    from benchmarks.torch_peer import make_sampler

    return make_sampler(timing.create_torch_network(tokens, fields), num, mode, steps)


def main(arguments: list[str]) -> None:
    parser = rows.get_parser(__doc__, ROWS)
    parser.add_argument("--nums", default="64,1", help="latents of a call, separated by commas")
    parser.add_argument("--steps", type=int, default=70, help="noise levels")
    options = parser.parse_args(arguments)
    fields = rows.get_fields(options)
    sampler = Sampler(fields, options.steps)
    network_calls = options.steps - 1
    work = rows.Work(
        "sampling",
        flops=2 * network_calls * count_flops(sampler.network, *sampler.shapes),
        calls=3,
        steps=network_calls,
        lower=sampler.lower,
        get_call=sampler.get_call,
        get_torch_call=partial(get_torch_call, fields, options.steps),
    )
    rows.run(options, work, [int(num) for num in options.nums.split(",")])


if __name__ == "__main__":
    main(sys.argv[1:])
