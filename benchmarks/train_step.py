"""The training step of configs/seed.py's network, beside its PyTorch peers => images a second.

    python -m benchmarks.train_step [--rows=ours,torch-one-compile] [--batch_sizes=1024,256]
    python -m benchmarks.train_step --recipe=emoji --batch_sizes=2048
    python -m benchmarks.train_step --demo --batch_sizes=32 --rows=ours,torch-one-eager
    python -m benchmarks.train_step --tiny

Ours computes in bfloat16 with float32 weights, on one GPU, or in float32 on a CPU, divided as
train.py divides it for --demo and --tiny (`ldm_jax.cores`, for the sizes' greatest common divisor);
PyTorch computes in the same. A row of ours may say more: ours-remat, ours-accumulate4, or both.
Those of PyTorch are torch-TOKENS-MODE, see torch_unet.py and torch_peer.py; each runs in a process
of its own. With --recipe=NAME, network, noise, loss and optimizer are those of configs/NAME.py,
which no row of PyTorch's has. All programs of ours are compiled side by side before anything is
measured. Prints a markdown table:

    size         images of a step
    ms           of a step, the median of --repeats rounds; lowest, highest of them
    of peak      3 x FLOPs of the forward pass x img/s, of a bfloat16 matrix product's FLOP/s,
                 measured in the same run; the same FLOPs for all rows
    kernels      of a step, and the ms that they are busy
    GB           memory: for ours, held since the process started, by all rows so far
    program GB   memory that the compiler plans for this row
    compile s    compilation; for PyTorch the first step
"""

import importlib
import math
import sys
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import rows, timing
from ldm_jax import feed, sharding, training
from ldm_jax.cores import divide_cpu
from ldm_jax.flops import STEP, count_flops
from ldm_jax.latents import LatentScale
from ldm_jax.noising import get_process
from ldm_jax.packing import pack_state
from ldm_jax.unet import get_network

CONFIGS = rows.ROOT / "configs"
ROWS = "ours,ours-remat,ours-accumulate4,torch-one-eager,torch-one-compile,torch-tiled-compile"


class Trainer:
    """Our train state and steps on a mesh, from shapes alone until they are asked for.

    Args:
        fields: of `get_network`.
        mesh: where all lives.
        recipe: a config whose noising, optimizer and training are taken; None for the defaults.
    """

    def __init__(self, fields: dict[str, Any], mesh: jax.sharding.Mesh, recipe: Any = None):
        self.network, self.mesh = get_network(**fields | {"dtype": rows.get_dtype()}), mesh
        size, channels = self.network.latent_image_size, self.network.latent_channels
        self.shapes = (size, size, channels), (self.network.emb_size,)
        self.optimizer, self.options = training.get_optimizer(steps=100_000), {}
        if recipe is not None:
            settings = recipe.to_dict()
            self.optimizer = training.get_optimizer(steps=recipe.steps, **settings["optimizer"])
            self.options = settings["training"] | {"process": get_process(**settings["noising"])}
        create = partial(
            training.create_train_state,
            network=self.network,
            optimizer=self.optimizer,
            latent_shape=self.shapes[0],
            embedding_shape=self.shapes[1],
        )
        self.state_shapes = sharding.place_shapes(mesh, jax.eval_shape(create, jax.random.key(0)))

    def create_state(self) -> training.TrainState:
        """A state with weights as `timing.draw_weights` makes them, and moments of zeros."""
        drawn = timing.draw_weights(self.state_shapes)
        return drawn.replace(opt_state=timing.draw_zeros(self.state_shapes.opt_state))

    def _get_batch_shapes(self, batch_size):
        names = "latents_mean", "text_embeddings"
        return {name: (batch_size, *shape) for name, shape in zip(names, self.shapes)}

    def create_batch(self, batch_size: int) -> dict[str, jax.Array]:
        """Noise in float16, as a cache stores latents and embeddings."""
        rng, held = np.random.default_rng(0), feed.local_rows(self.mesh, batch_size)
        part = {
            name: rng.standard_normal(shape, np.float32)[held].astype(np.float16)
            for name, shape in self._get_batch_shapes(batch_size).items()
        }
        return feed.shard_batch(self.mesh, part, batch_size)

    def get_step(self, *, remat: bool | None = None, **options: Any):
        """The step of training.py; options of `get_train_step`. None: as in the network."""
        network = self.network if remat is None else self.network.clone(remat=remat)
        options = self.options | options | {"mesh": self.mesh}
        return training.get_train_step(network, self.optimizer, LatentScale(2.5), **options)

    def lower(self, batch_size: int, **options: Any) -> Any:
        """The step, lowered for a batch of the size."""
        place = sharding.batch_sharding(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct(shape, np.float16, sharding=place)
            for name, shape in self._get_batch_shapes(batch_size).items()
        }
        packed = jax.eval_shape(pack_state, self.state_shapes)
        state = sharding.place_shapes(self.mesh, packed)
        return self.get_step(**options).lower(state, jax.random.key(0), batch)

    def get_call(self, step: Any, batch_size: int):
        """A call that takes one step further from a new state; returns its metrics."""
        state, batch = pack_state(self.create_state()), self.create_batch(batch_size)
        key = jax.random.key(1)

        def call():
            nonlocal state
            state, metrics = step(state, key, batch)
            return metrics

        return call


def parse_ours(work: str) -> dict[str, Any]:
    """Options of the step by the row's name, "ours-remat-accumulate4".

    Raises:
        ValueError: for other words.
    """
    options: dict[str, Any] = {}
    for word in work.split("-")[1:]:
        if word == "remat":
            options["remat"] = True
        elif word.startswith("accumulate") and word[10:].isdecimal():
            options["accumulate"] = int(word[10:])
        else:
            raise ValueError(f"a row of ours is ours[-remat][-accumulateN], got {work!r}")
    return options


def lower_ours(trainer: Trainer, work: str, batch_size: int) -> Any:
    """The program of a row of ours."""
    return trainer.lower(batch_size, **parse_ours(work))


def get_torch_call(fields: dict[str, Any], tokens: str, mode: str, batch_size: int) -> Any:
    """A step of PyTorch's."""
    from benchmarks.torch_peer import make_train_step

    return make_train_step(timing.create_torch_network(tokens, fields), batch_size, mode)


def main(arguments: list[str]) -> None:
    parser = rows.get_parser(__doc__, ROWS)
    parser.add_argument("--batch_sizes", default="1024,256", help="separated by commas")
    parser.add_argument("--recipe", default="", help="a file in configs/, without .py")
    options = parser.parse_args(arguments)
    fields, recipe = rows.get_fields(options), None
    if options.recipe:
        options.rows = "ours" if options.rows == ROWS else options.rows
        if "torch" in options.rows:
            parser.error(f"with --recipe all rows are ours, got {options.rows}")
        if options.recipe not in (known := sorted(path.stem for path in CONFIGS.glob("*.py"))):
            parser.error(f"--recipe must be one of {', '.join(known)}, got {options.recipe}")
        recipe = importlib.import_module(f"configs.{options.recipe}").get_config()
        fields = recipe.network.to_dict() | ({"widths": (16, 32)} if options.tiny else {})
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    ours = [row for row in options.rows.split(",") if row.startswith("ours")]
    parts = math.lcm(*(parse_ours(row).get("accumulate", 1) for row in ours))
    divide_cpu(math.gcd(*sizes) // parts, fields["widths"])
    devices = jax.devices()[: None if jax.default_backend() == "cpu" else 1]
    trainer = Trainer(fields, sharding.get_mesh("data", devices), recipe)
    work = rows.Work(
        "train_step",
        flops=STEP * count_flops(trainer.network, *trainer.shapes),
        calls=20,
        steps=1,
        lower=partial(lower_ours, trainer),
        get_call=lambda _, size, step: trainer.get_call(step, size),
        get_torch_call=partial(get_torch_call, fields),
    )
    rows.run(options, work, sizes)


if __name__ == "__main__":
    main(sys.argv[1:])
