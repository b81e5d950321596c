"""The alignment head against formulas, and the CLIP score against the model it is read from."""

from pathlib import Path

import numpy as np
import pytest
from stand_ins import create_clip

from ldm_jax.alignment import (
    BUNDLED,
    HEAD_FILE,
    Head,
    contrastive_loss,
    load_alignment_score,
    load_clip_score,
    load_head,
    save_head,
)
from ldm_jax.metrics import get_ranks


def create_head(d=6, e=5, seed=0):
    rng = np.random.default_rng(seed)
    shapes = dict(image_kernel=(d, 256), image_bias=256, text_kernel=(e, 256), text_bias=256)
    params = {k: rng.standard_normal(s).astype(np.float16) for k, s in shapes.items()}
    return Head({k: v.astype(np.float32) for k, v in params.items()}, "efflite0", "use")


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_head_projects_both_sides_to_length_one(tmp_path):
    head = create_head()
    save_head(tmp_path, head)
    loaded = load_head(tmp_path)
    assert loaded is not None and loaded[1:] == head[1:]
    x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    expected = unit(x @ head.params["image_kernel"] + head.params["image_bias"])
    np.testing.assert_allclose(loaded.embed_images(x), expected, atol=1e-5)
    y = x[:, :5]
    expected = unit(y @ head.params["text_kernel"] + head.params["text_bias"])
    np.testing.assert_allclose(loaded.embed_captions(y), expected, atol=1e-5)


def test_the_contrastive_loss_is_the_mean_over_rows_and_columns_without_those_of_one_concept():
    head, rng = create_head(), np.random.default_rng(2)
    x, y = (rng.standard_normal((4, d)).astype(np.float32) for d in (6, 5))
    same = np.eye(4, dtype=np.float32)
    same[0, 2] = same[2, 0] = 1
    logits = np.exp(1.5) * head.embed_images(x) @ head.embed_captions(y).T
    terms = []
    for table in (logits, logits.T):
        for i in range(4):
            kept = [j for j in range(4) if i == j or not same[i, j]]
            terms.append(-table[i, i] + np.log(sum(np.exp(table[i, j]) for j in kept)))
    loss = contrastive_loss({**head.params, "scale": np.float32(1.5)}, x, y, same)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


def test_the_bundled_head_is_small_and_says_what_it_needs():
    head = load_head()
    assert head is not None and head[1:] == ("efflite0", "use")
    assert {k: v.shape for k, v in head.params.items()} == {
        "image_kernel": (1280, 256),
        "image_bias": (256,),
        "text_kernel": (512, 256),
        "text_bias": (256,),
    }
    assert (BUNDLED / HEAD_FILE).stat().st_size < 2_000_000


def test_the_script_trains_a_head_that_finds_captions_it_never_saw(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import train_alignment

    # Both sides see eight hidden numbers, each through a map of its own.
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((300, 8))
    x = (hidden @ rng.standard_normal((8, 40)) + 3).astype(np.float32)
    y = (hidden @ rng.standard_normal((8, 20))).astype(np.float32)
    monkeypatch.setattr(train_alignment, "STEPS", 150)
    monkeypatch.setattr(train_alignment, "BATCH", 64)
    params = train_alignment.train_head(x[:250], y[None, :250], np.arange(250), seed=0)
    head = Head({k: v.astype(np.float32) for k, v in params.items()}, "efflite0", "use")
    likeness = head.embed_images(x[250:]) @ head.embed_captions(y[250:]).T
    assert np.mean(get_ranks(likeness, np.eye(50, dtype=bool)) == 1) > 0.7  # chance: 0.02


def test_no_head_is_none(tmp_path):
    assert load_head(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no alignment head .head.safetensors. in"):
        load_alignment_score(tmp_path)


def test_the_clip_score_is_the_models_cosine(tmp_path):
    import torch
    import transformers

    model, _ = create_clip(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    captions = ["a cat", "bed", "red"] * 13 + ["dart"]
    expected = []
    for image, caption in zip(images, captions):
        x = (image / 255 - [0.48145466, 0.4578275, 0.40821073]) / [
            0.26862954,
            0.26130258,
            0.27577711,
        ]
        tokens = tokenizer(caption, return_tensors="pt")["input_ids"]
        pixels = torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.inference_mode():
            found = model(tokens, pixels)
        cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        expected.append(100 * max(float(cosine), 0.0))
    scores = load_clip_score(tmp_path, "cpu")(images, captions)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    assert scores.max() > 0


def test_a_folder_without_a_clip_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of a CLIP: .*gone"):
        load_clip_score(tmp_path / "gone")
    with pytest.raises(OSError, match="cannot load a CLIP from"):
        load_clip_score(tmp_path)
