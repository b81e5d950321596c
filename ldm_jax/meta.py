"""What travels with weights: network, noising, sampling, scale and encoders, as a JSON object."""

import inspect
import json
from collections.abc import Mapping, Sequence

import numpy as np

from ldm_jax.latents import LatentScale
from ldm_jax.noising import get_process
from ldm_jax.unet import get_network

FORMAT_VERSION = 2
# How the network is computed, not what it computes: a run may go on with others.
COMPUTE_FIELDS = ("dtype", "remat")
ENCODERS = ("vae", "text_encoder")
SCALE = ("std_latent", "mean_latent")
CONTRACT = ("network", "noising", *ENCODERS, *SCALE)  # What a checkpoint's model must share.


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
        noising: arguments of `get_process` in the training.
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


def same_encoder(one: Mapping, other: Mapping) -> bool:
    """Compares encoders by their digests if both are known, else by name."""
    if one.get("sha256") and other.get("sha256"):
        return one["sha256"] == other["sha256"]
    return one["name"] == other["name"]


def check_meta(saved: dict, wanted: dict, where: str) -> None:
    """Compares the architecture and the data's contract of two models, COMPUTE_FIELDS aside.

    A field that is missing, as in what an older release saved, has its default. Of the noising that
    counts which decides what the network puts out.

    Raises:
        ValueError: names each field that differs, with both values; or for a newer format.
    """
    check_version(saved, where)
    differences = _find_differences(saved, wanted)
    if differences:
        raise ValueError(
            f"the checkpoint in {where} belongs to another model: {'; '.join(differences)}. "
            "Use another workdir, or the config that it was trained with"
        )


def check_start(model: dict, wanted: dict, where: str) -> None:
    """As `check_meta`, of a model whose weights a training is to start from.

    Its dropout may differ, and the scale is the model's, whatever `wanted` has.

    Raises:
        ValueError: names each field that differs, with both values; or for a newer format.
    """
    check_version(model, where)
    differences = _find_differences(
        model, wanted, ("network", "noising", *ENCODERS), (*COMPUTE_FIELDS, "dropout")
    )
    if differences:
        raise ValueError(
            f"{where} is a model of another kind: {'; '.join(differences)}. A training that starts "
            "from it needs the same"
        )


def _find_differences(saved, wanted, parts=CONTRACT, ignored=COMPUTE_FIELDS):
    differences = []
    for part in parts:
        old, new = saved[part], wanted[part]
        if part in ENCODERS and same_encoder(old, new):
            continue  # By another name, as of a folder that was moved.
        if part == "network":
            old, new = _get_network_fields(old, ignored), _get_network_fields(new, ignored)
        if part == "noising":
            old, new = _get_output_fields(old), _get_output_fields(new)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
            differences += [f"{part}.{k} is {old.get(k)} there, {new.get(k)} here" for k in keys]
        elif old != new:
            differences.append(f"{part} is {old} there, {new} here")
    return differences


def _get_network_fields(given: dict, ignored: Sequence[str]) -> dict:
    """What `get_network` takes the given fields for, as a JSON object, without those ignored."""
    bound = inspect.signature(get_network).bind(**given)
    bound.apply_defaults()
    fields = {k: v for k, v in bound.arguments.items() if k not in ignored}
    return json.loads(json.dumps(fields))


def _get_output_fields(noising: dict) -> dict:
    """The target, and the mixture where the target depends on it."""
    target = get_process(**noising).target
    return {"target": target} | ({} if target == "x_zero" else {"mixture": noising["mixture"]})


def check_version(meta: dict, where: object) -> None:
    """Raises ValueError for what a newer release wrote."""
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {meta['format_version']}, this release reads up to "
            f"{FORMAT_VERSION}: install a newer ldm_jax"
        )
