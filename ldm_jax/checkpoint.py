"""Checkpoints: a train state with all that sampling needs to know => a folder, and back.

A run's folder holds orbax checkpoints of the whole state. `export_model` writes the averaged
weights alone, as safetensors beside a JSON file; `load_model` reads either. Both carry the model's
`meta`: the network's fields, the encoders' identities, the scale of the latents and the sampler's
settings, so that a checkpoint needs no other file and no flag to draw pictures.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.latents import LatentScale
from ldm_jax.sampler import Denoiser
from ldm_jax.training import TrainState
from ldm_jax.unet import get_network

FORMAT_VERSION = 1
WEIGHTS_FILE, META_FILE = "denoiser.safetensors", "meta.json"
BUNDLED = Path(__file__).parent / "weights" / "emoji"


class Model(NamedTuple):
    """A trained denoiser and what it was trained with.

    Attributes:
        denoiser: the network with its averaged weights.
        scale: of its latents.
        meta: the JSON object described in `create_meta`.
    """

    denoiser: Denoiser
    scale: LatentScale
    meta: dict


def create_meta(
    *,
    network: dict,
    noising: dict,
    sampling: dict,
    scale: LatentScale,
    vae: dict,
    text_encoder: dict,
    latent_shape: tuple[int, ...],
    embedding_shape: tuple[int, ...],
) -> dict:
    """What travels with the weights, as a JSON object.

    Args:
        network: arguments of `get_network`.
        noising: mixture, noise law and largest angle of the training.
        sampling: arguments of `get_diffuser`, the defaults when pictures are drawn.
        scale: of the latents.
        vae: identity of the VAE, {"name", "sha256"}.
        text_encoder: identity of the text encoder, likewise.
        latent_shape: (h, w, c).
        embedding_shape: (e,) or (n, e).
    """
    meta = {
        "format_version": FORMAT_VERSION,
        "network": network,
        "noising": noising,
        "sampling": sampling,
        "std_latent": np.asarray(scale.std_latent, np.float64).tolist(),
        "mean_latent": np.asarray(scale.mean_latent, np.float64).tolist(),
        "vae": vae,
        "text_encoder": text_encoder,
        "latent_shape": latent_shape,
        "embedding_shape": embedding_shape,
    }
    return json.loads(json.dumps(meta))


def open_checkpoints(folder: str | os.PathLike, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints of a run, the newest `keep` of which stay. Close it, or use it in `with`.

    Raises:
        OSError: if the folder cannot be made.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    path = Path(folder).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(path, options=options, item_names=("state", "meta"))


def save_checkpoint(manager: ocp.CheckpointManager, state: TrainState, meta: dict) -> None:
    """Saves the state under its step, in the background. Copies it first, so it may be donated."""
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    manager.save(int(state.step), args=args)


def restore_checkpoint(
    manager: ocp.CheckpointManager, target: TrainState, meta: dict
) -> TrainState | None:
    """The newest state, or None where nothing has been saved yet.

    Args:
        manager: see `open_checkpoints`.
        target: a state of ShapeDtypeStructs with shardings, where the result will live.
        meta: of the run that goes on.

    Raises:
        ValueError: if the checkpoint belongs to another model; the fields that differ are named.
    """
    step = manager.latest_step()
    if step is None:
        return None
    where = f"{manager.directory}, step {step}"
    check_meta(_restore_meta(manager, step), meta, where)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    try:
        return manager.restore(step, args=args)["state"]
    except Exception as error:
        error.add_note(f"while restoring the checkpoint in {where}")
        raise


def check_meta(saved: dict, wanted: dict, where: str) -> None:
    """Compares the architecture and the data's contract of two models.

    Raises:
        ValueError: names each field that differs, with both values.
    """
    differences = []
    for part in ("network", "vae", "text_encoder", "std_latent", "mean_latent"):
        old, new = saved[part], wanted[part]
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
            differences += [f"{part}.{k} is {old.get(k)} there, {new.get(k)} here" for k in keys]
        elif old != new:
            differences.append(f"{part} is {old} there, {new} here")
    if differences:
        raise ValueError(
            f"the checkpoint in {where} belongs to another model: {'; '.join(differences)}. "
            "Use another workdir, or the config that it was trained with"
        )


def load_model(folder: str | os.PathLike | None = None) -> Model:
    """The averaged weights of a run's newest checkpoint, of an exported model, or the bundled ones.

    Args:
        folder: a run's workdir, its "checkpoints" folder, or what `export_model` wrote; None for
            the weights that come with the package.

    Raises:
        FileNotFoundError: if there is neither in the folder.
        ValueError: for a checkpoint of a newer format, or weights that do not fit the network.
    """
    path = BUNDLED if folder is None else Path(folder).expanduser().resolve()
    if (path / META_FILE).is_file():
        meta = json.loads((path / META_FILE).read_text())
        variables = _read_weights(path / WEIGHTS_FILE)
    else:
        meta, variables = _restore_variables(path)
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {meta['format_version']}, this release reads up to "
            f"{FORMAT_VERSION}: install a newer ldm_jax"
        )
    network = get_network(**meta["network"])
    _check_variables(network, variables, meta, path)
    scale = LatentScale(
        np.asarray(meta["std_latent"], np.float32), np.asarray(meta["mean_latent"], np.float32)
    )
    return Model(Denoiser(network, variables), scale, meta)


def export_model(model: Model, folder: str | os.PathLike, dtype: str = "float16") -> Path:
    """Writes a model as WEIGHTS_FILE and META_FILE; the weights rounded to `dtype`.

    Running statistics stay float32, since their range is not bounded.

    Raises:
        ValueError: if a weight is beyond the range of `dtype`.
        FileExistsError: if the folder holds a model already.
    """
    from safetensors.numpy import save_file

    folder = Path(folder).expanduser()
    if (folder / META_FILE).exists():
        raise FileExistsError(f"{folder} already holds a model")
    tensors = {}
    for name, value in flatten_dict(model.denoiser.variables, sep="/").items():
        value = np.asarray(value)
        with np.errstate(over="ignore"):  # Looked for below, with a better message.
            rounded = value.astype(dtype) if name.startswith("params/") else value
        if not np.isfinite(rounded).all():
            raise ValueError(
                f"{name} has values beyond the range of {dtype}: {np.abs(value).max()}"
            )
        tensors[name] = np.ascontiguousarray(rounded)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (WEIGHTS_FILE + ".partial")
    save_file(tensors, partial)
    partial.replace(folder / WEIGHTS_FILE)
    # The meta file comes last: a folder that has one is whole.
    (folder / META_FILE).write_text(json.dumps(model.meta, indent=2) + "\n")
    return folder


def _read_weights(path: Path) -> dict:
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except Exception as error:
        error.add_note(f"while reading {path}")
        raise
    variables = unflatten_dict(tensors, sep="/")
    variables.setdefault("batch_stats", {})
    return jax.tree.map(lambda x: jax.numpy.asarray(x, "float32"), variables)


def _restore_meta(manager: ocp.CheckpointManager, step: int) -> dict:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _restore_variables(path: Path) -> tuple[dict, dict]:
    """Meta and averaged weights of the newest orbax checkpoint, without the optimizer's state."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"no such checkpoint folder: {folder}")
    with ocp.CheckpointManager(folder, item_handlers=_get_readers()) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"{folder} holds no checkpoint: a workdir of train.py or an exported model "
                f"({META_FILE} and {WEIGHTS_FILE}) is needed"
            )
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saved = manager.item_metadata(step)["state"].tree
        wanted = {
            key: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                saved[key],
            )
            for key in ("ema_params", "ema_batch_stats")
            if saved.get(key)
        }
        state = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        args = ocp.args.Composite(state=state, meta=ocp.args.JsonRestore())
        restored = manager.restore(step, args=args)
    variables = {"params": restored["state"]["ema_params"]}
    variables["batch_stats"] = restored["state"].get("ema_batch_stats", {})
    return restored["meta"], variables


def _get_readers() -> dict[str, Any]:
    """What reads the two items of a checkpoint when only a part of the state is wanted."""
    return {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}


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
