"""Models: a run's checkpoint, or exported weights => a denoiser with all that sampling needs.

A model's `meta` holds the network's fields, the encoders' identities, the scale of the latents and
the sampler's settings, so that a checkpoint needs no other file and no flag to draw pictures. Of a
run's checkpoint the averaged weights alone are read; `ldm_jax.exports` writes them as safetensors
beside a JSON file.
"""

import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from ldm_jax import exports, records, sampler, snapshots
from ldm_jax.cache import check_local
from ldm_jax.exports import GUIDE, META_FILE, WEIGHTS_FILE
from ldm_jax.latents import LatentScale
from ldm_jax.meta import ENCODERS, SCALE, check_version, same_encoder
from ldm_jax.noising import get_process
from ldm_jax.sampler import Denoiser
from ldm_jax.unet import get_network

BUNDLED = Path(__file__).parent / "weights" / "emoji"


class Model(NamedTuple):
    """A trained denoiser and what it was trained with.

    Attributes:
        denoiser: the network with its averaged weights.
        scale: of its latents.
        meta: the JSON object of `meta.create_meta`.
        guide: a weaker model of the same latents and texts, which its guidance leads away from;
            None: that leads away from no text.
        step: of the run's checkpoint or snapshot that it comes from; None: it was exported.
    """

    denoiser: Denoiser
    scale: LatentScale
    meta: dict
    guide: "Model | None" = None
    step: int | None = None

    def get_diffuser(self, **settings: Any) -> sampler.Diffuser:
        """A Diffuser with the settings of the model, `settings` in their place, and its guide."""
        guide = self.guide and self.guide.denoiser
        options = {"guide": guide} | self.meta["sampling"] | settings
        return sampler.get_diffuser(self.denoiser, **options)

    def convert(self, change: Callable[[Denoiser], Denoiser]) -> "Model":
        """The model with its denoiser changed, and its guide's likewise."""
        guide = self.guide and self.guide.convert(change)
        return self._replace(denoiser=change(self.denoiser), guide=guide)

    def guided_by(self, guide: "Model | None") -> "Model":
        """The model with another guide, or none.

        Raises:
            ValueError: if the guide is of other latents or texts.
        """
        if guide is None:
            return self._replace(guide=None)
        for part in (*ENCODERS, *SCALE, "latent_shape", "embedding_shape"):
            same = same_encoder if part in ENCODERS else operator.eq
            if not same(guide.meta[part], self.meta[part]):
                raise ValueError(
                    f"the guide belongs to other data: its {part} is {guide.meta[part]}, the "
                    f"model's is {self.meta[part]}"
                )
        return self._replace(guide=guide)


def load_model(
    folder: str | os.PathLike | None = None, step: str | int = "last", ema: float | None = None
) -> Model:
    """The averaged weights of a run's checkpoint, of an exported model, or the bundled ones.

    An exported model in GUIDE, in the model's folder or the run's workdir, comes with it as its
    guide.

    Args:
        folder: a run's workdir, its "checkpoints" folder, or what `export_model` wrote; None for
            the weights that come with the package.
        step: which checkpoint of a run: "last", "best" by held-out loss, or its number.
        ema: sigma_rel of an average that is made of the run's snapshots, see `power_ema`; `step` is
            then that of a snapshot.

    Raises:
        FileNotFoundError: if there is neither in the folder, or no such step.
        DamagedError: if the checkpoint is not what was saved; the other steps are named.
        UnreadableError: if it could not be read for another reason, such as a lack of memory.
        ValueError: for an address instead of a folder, a checkpoint of a newer format, weights that
            do not fit the network, or an `ema` that the snapshots do not reach.
    """
    if folder is not None:
        check_local(folder)
    path = BUNDLED if folder is None else Path(folder).expanduser().resolve()
    taken = None
    if ema is not None:
        meta, variables = _make_average(path, step, ema)
        taken = meta["ema"]["step"]
    elif (path / META_FILE).is_file():
        if step != "last":
            raise ValueError(f"step must be 'last' for an exported model, got {step!r}")
        meta = exports.read_meta(path)
        variables = exports.read_weights(path, meta.pop("weights_sha256", None))
    else:
        path = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        taken = step = _choose_step(path, step)
        try:
            meta, variables = _read_averages(path, step)
        except Exception as error:
            if records.is_passing(error):
                raise records.UnreadableError(
                    f"the checkpoint of step {step} in {path} could not be read, and may be whole: "
                    f"{records.describe(error)}"
                ) from error
            others = ", ".join(str(s) for s in _list_checkpoints(path) if s != step)
            raise records.DamagedError(
                f"the checkpoint of step {step} in {path} is damaged: {records.describe(error)}. "
                + (f"Choose another by its step: {others}" if others else "There is no other")
            ) from error
    check_version(meta, path)
    try:
        network = get_network(**meta["network"])
    except TypeError as error:
        raise ValueError(
            f"the network described in {path} is not one of this release: {error}"
        ) from error
    _check_variables(network, variables, meta, path)
    scale = LatentScale(
        np.asarray(meta["std_latent"], np.float32), np.asarray(meta["mean_latent"], np.float32)
    )
    process = get_process(**meta["noising"])
    model = Model(Denoiser(network, variables, process), scale, meta, step=taken)
    folder = (path.parent if path.name == "checkpoints" else path) / GUIDE
    return model.guided_by(load_model(folder)) if folder.is_dir() else model


def load_encoder(load: Callable, identity: Mapping, name: str | None = None, **options: Any) -> Any:
    """Loads an encoder by its name and makes sure that it is the one of the training.

    Of an autoencoder that says nothing of the decoder. One whose digest the training did not know
    is taken as it is.

    Args:
        load: `load_vae` or `load_text_encoder`.
        identity: "vae" or "text_encoder" of a model's meta.
        name: of one to load instead: an autoencoder that differs in its decoder alone, or where the
            training's encoder lies now.
        options: of `load`.

    Raises:
        ValueError: if the weights found have another digest.
    """
    encoder = load(name or identity["name"], **options)
    if identity.get("sha256") not in (None, encoder.identity["sha256"]):
        raise ValueError(
            f"the checkpoint was trained with {identity['name']} of digest {identity['sha256']}, "
            f"{encoder.identity['name']} found here has {encoder.identity['sha256']} (of an "
            "autoencoder that of its encoder alone; in older checkpoints that of all of it)"
        )
    return encoder


def _choose_step(folder: Path, step: str | int) -> int:
    """The number of the checkpoint that "last", "best" or a number means."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such checkpoint folder: {folder}")
    steps = _list_checkpoints(folder)
    if not steps:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint: a workdir of train.py or an exported model "
            f"({META_FILE} and {WEIGHTS_FILE}) is needed"
        )
    if step == "last":
        return steps[-1]
    if step == "best":
        return _find_best_step(folder, steps)
    if isinstance(step, str) and not step.isdecimal():
        raise ValueError(f"step must be 'last', 'best' or a number, got {step!r}")
    if int(step) not in steps:
        raise FileNotFoundError(f"{folder} holds the steps {steps}, got step {step}")
    return int(step)


def _list_checkpoints(folder: Path) -> list[int]:
    return [step for step in records.list_steps(folder) if not records.is_empty(folder, step)]


def _find_best_step(folder: Path, steps: list[int]) -> int:
    losses = {}
    for step in steps:
        try:
            losses[step] = records.read_record(folder, step)["held_out_loss"]
        except Exception as error:
            if records.is_passing(error):
                raise records.UnreadableError(
                    f"the checkpoint of step {step} in {folder} could not be read, and may be the "
                    f"best: {records.describe(error)}"
                ) from error
            logging.warning(
                "the checkpoint of step %d in %s is damaged and not considered: %s",
                *(step, folder, records.describe(error)),
            )
    known = {step: loss for step, loss in losses.items() if loss is not None}
    if not known:
        raise ValueError(f"no checkpoint in {folder} has a held-out loss: choose one of {steps}")
    return min(known, key=lambda step: (known[step], -step))


def _read_averages(folder: Path, step: int) -> tuple[dict, dict]:
    """Meta and averaged weights of a step, on one device; nothing else of the state is read."""
    record = records.read_record(folder, step)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    saved = records.read_structure(folder, step)
    wanted = {
        key: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            saved[key],
        )
        for key in ("ema_params", "ema_batch_stats")
        if saved.get(key)
    }
    tensors = records.read_tensors(folder, step, wanted, partial=True)
    if record["digests"] is not None:
        digests = {k: v for k, v in record["digests"].items() if k.split("/")[0].startswith("ema_")}
        records.check_tensors(tensors, digests)
    variables = {"params": tensors["ema_params"]}
    variables["batch_stats"] = tensors.get("ema_batch_stats", {})
    return record["model"], variables


def _make_average(path: Path, step: str | int, ema: float) -> tuple[dict, dict]:
    """Meta and weights of an average of length `ema`."""
    if (path / META_FILE).is_file():
        raise ValueError(
            f"an average of another length (ema {ema}) needs the workdir of a run, {path} is an "
            "exported model"
        )
    workdir = path.parent if path.name == "checkpoints" else path
    if step == "best":
        step = _choose_step(workdir / "checkpoints", step)
    elif step != "last" and not str(step).isdecimal():
        raise ValueError(f"step must be 'last', 'best' or a number, got {step!r}")
    number = None if step == "last" else int(step)
    meta, variables = snapshots.reconstruct(workdir, ema, number)
    return meta, jax.tree.map(jax.numpy.asarray, variables)


def _check_variables(network: Any, variables: dict, meta: dict, path: Path) -> None:
    """Raises ValueError unless the weights are those of the network that `meta` describes."""
    shapes = jax.eval_shape(
        network.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *meta["latent_shape"]), "float32"),
        jax.ShapeDtypeStruct((1,), "float32"),
        jax.ShapeDtypeStruct((1, *meta["embedding_shape"]), "float32"),
    )

    def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
        flat: dict[str, Any] = flatten_dict(tree, sep="/")
        return {name: leaf.shape for name, leaf in flat.items()}

    wanted, found = shapes_of(dict(shapes)), shapes_of(variables)
    wrong = [k for k in sorted({*wanted, *found}) if wanted.get(k) != found.get(k)]
    if wrong:
        raise ValueError(
            f"the weights in {path} do not fit the network described beside them, first at "
            f"{wrong[0]}: needed {wanted.get(wrong[0])}, got {found.get(wrong[0])} "
            f"({len(wrong)} tensors differ)"
        )
