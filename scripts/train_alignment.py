"""Emoji of all styles => the alignment head: image features and captions in one space.

    python scripts/train_alignment.py --out=ldm_jax/weights/alignment

trains on the training pictures alone, so that concepts and cells that are held out stay unseen,
prints how well the head finds the caption of held-out pictures, and writes head.safetensors and
README.md. Half a minute on two cores once the features of the pictures are there.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from absl import app, flags
from tqdm import trange

from ldm_jax import alignment
from ldm_jax.cache import cache_home
from ldm_jax.emoji import draw_emoji
from ldm_jax.features import get_reference, load_extractor
from ldm_jax.metrics import get_ranks, share
from ldm_jax.pictures import Picture, read_measured
from ldm_jax.text import load_text_encoder

README = """# The alignment head

A picture's {features} features and a caption's Universal Sentence Encoder embedding, each
by one linear map to {width} numbers, where their cosine says how well they go together. Rounded to
float16; {size:.2f} MB.

    python scripts/train_alignment.py --out=ldm_jax/weights/alignment --seed={seed}

{steps} steps of batch {batch} on the {n} training pictures of {styles} emoji styles (credits:
../CREDITS.md), each with either of its captions; symmetric InfoNCE, rows of one concept not held
against each other; AdamW, learning rate {rate} with cosine decay, weight decay {decay}; {dropout}
of the features and half as much of the embeddings dropped. Decay and dropout were chosen on the
validation concepts.

How often a real held-out picture finds its own name among the distinct names of its split, with
Wilson's intervals at 95 %:

| concepts | pictures | names | R@1 | R@5 | chance R@1 |
| --- | --- | --- | --- | --- | --- |
{lines}
"""
STEPS, BATCH, RATE, DECAY, DROPOUT = 1500, 512, 1e-3, 0.3, 0.5


def train_head(
    features: np.ndarray, embeddings: np.ndarray, concepts: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """The head's weights, for features and embeddings as they come.

    Args:
        features: of the training pictures (n, d).
        embeddings: of their captions (k, n, e), k for each.
        concepts: a number for each picture (n).
        seed: of weights, batches and dropout.
    """
    mean, std = features.mean(0), features.std(0) + 1e-3
    x, rng = (features - mean) / std, np.random.default_rng(seed)
    params: dict[str, np.ndarray] = {"scale": np.array(2.5, np.float32)}
    for side, width in (("image", x.shape[1]), ("text", embeddings.shape[2])):
        kernel = rng.standard_normal((width, alignment.WIDTH)) / np.sqrt(width)
        params[f"{side}_kernel"] = kernel.astype(np.float32)
        params[f"{side}_bias"] = np.zeros(alignment.WIDTH, np.float32)
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, STEPS), weight_decay=DECAY)

    def drop(key, rate, x):
        return x * jax.random.bernoulli(key, 1 - rate, x.shape) / (1 - rate)

    @jax.jit
    def step(params, state, key, features, embeddings, same):
        image_key, text_key = jax.random.split(key)
        features = drop(image_key, DROPOUT, features)
        embeddings = drop(text_key, DROPOUT / 2, embeddings)
        grads = jax.grad(alignment.contrastive_loss)(params, features, embeddings, same)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, key = optimizer.init(params), jax.random.key(seed)
    for i in trange(STEPS, desc="training"):
        rows = rng.choice(len(x), BATCH, replace=False)
        either = embeddings[rng.integers(0, len(embeddings), BATCH), rows]
        same = (concepts[rows][:, None] == concepts[rows][None]).astype(np.float32)
        params, state = step(params, state, jax.random.fold_in(key, i), x[rows], either, same)
    params = {k: np.asarray(v, np.float64) for k, v in params.items() if k != "scale"}
    # The head takes raw features.
    params["image_kernel"] = params["image_kernel"] / std[:, None]
    params["image_bias"] = params["image_bias"] - mean @ params["image_kernel"]
    return params


def measure_head(
    head: alignment.Head, features: np.ndarray, pictures: list[Picture], encode
) -> tuple[int, np.ndarray]:
    """The number of distinct names of the pictures, and the rank of each picture's own."""
    own = np.array([picture.captions[-1] for picture in pictures])
    names = np.unique(own)
    likeness = head.embed_images(features) @ head.embed_captions(encode(list(names))).T
    return len(names), get_ranks(likeness, own[:, None] == names[None])


def main(argv):
    seed, out = flags.FLAGS.seed, Path(flags.FLAGS.out)
    pictures = read_measured(draw_emoji(cache_home() / "emoji"))
    extractor, encode = load_extractor("efflite0"), load_text_encoder("use")
    features = get_reference(pictures, extractor, 128, progress=True).features
    splits, concepts = (np.array([getattr(p, k) for p in pictures]) for k in ("split", "concept"))
    train = np.flatnonzero(splits == "train")
    captions = [[pictures[i].captions[k] for i in train] for k in (0, -1)]
    embeddings = np.stack([encode(texts) for texts in captions])
    numbers = np.unique(concepts[train], return_inverse=True)[1]
    params = train_head(features[train], embeddings, numbers, seed)
    path = alignment.save_head(out, alignment.Head(params, "efflite0", "use"))

    head = alignment.load_head(out)
    assert head is not None
    lines = []
    for split, title in (("valid", "validation"), ("test", "test")):
        rows = np.flatnonzero(splits == split)
        names, ranks = measure_head(head, features[rows], [pictures[i] for i in rows], encode)
        found = [share(ranks <= k) for k in (1, 5)]
        cells = [f"{s.value:.3f} [{s.low:.3f}, {s.high:.3f}]" for s in found]
        lines.append(f"| {title} | {len(rows)} | {names} | {' | '.join(cells)} | {1 / names:.3f} |")
    text = README.format(
        features=extractor.title,
        width=alignment.WIDTH,
        size=path.stat().st_size / 1e6,
        seed=seed,
        steps=STEPS,
        batch=BATCH,
        n=len(train),
        styles=len({p.style for p in pictures}),
        rate=RATE,
        decay=DECAY,
        dropout=DROPOUT,
        lines="\n".join(lines),
    )
    (out / "README.md").write_text(text)
    print("\n".join(lines))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder for head.safetensors and README.md")
    flags.DEFINE_integer("seed", 0, "of weights, batches and dropout", lower_bound=0)
    flags.mark_flag_as_required("out")
    app.run(main)
