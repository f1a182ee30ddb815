"""
A small classifier of a dataset's own classes, trained on the dataset in about a minute.

    classifier = load_classifier(load_images("ylecun/mnist"), load_images("ylecun/mnist", split="test"))
    classifier.predict(images)         # uint8 (N, C, H, W) -> classes (N,)
    classifier.accuracy                # on the second set
    classifier.extractor               # its features, as any other extractor

It gives the Inception Score of small sets a scale of their own: digits and clothes are none of ImageNet's classes.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

from ..data import ImageData, cache_root, held_out, normalize
from ..files import find_damage, publish
from ..progress import progress_bar
from . import features, images


WIDTHS = (32, 64, 128)
BATCH_SIZE = 128
MAX_STEPS, MAX_EPOCHS = 1000, 50  # whichever is less
LEARNING_RATE = 5e-3
SEED = 0
HELD_OUT = 0.2  # share of the real images, where there is no other set to test the classifier on

MAX_SIDE = 32  # larger images are reduced to this, so that training takes a minute
PREDICTED = 500  # images at a time
_FACTS = "facts.json"


class SmallNetwork(nn.Module):
    """
    Three blocks of 3x3 convolution, batch norm, ReLU and max pooling, for the networks that are trained here.

    Args:
        in_channels (`int`): Channels of the images.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            )
            for inputs, outputs in zip((in_channels, *WIDTHS), WIDTHS, strict=False)
        )

    def layers(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Returns the output of each block for uint8 images (B, C, H, W): (B, width, height, width) each."""
        hidden = normalize(images)
        longer = max(images.shape[-2:])
        if longer > MAX_SIDE:  # the aspect ratio is kept
            size = [max(1, side * MAX_SIDE // longer) for side in images.shape[-2:]]
            hidden = F.interpolate(hidden, size=size, mode="area")
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        outputs = []
        for block in self.blocks:
            hidden = block(hidden)
            outputs.append(hidden)
        return outputs


class SmallClassifier(SmallNetwork):
    """
    The blocks of [`SmallNetwork`] and a linear layer on the means over positions.

    Args:
        in_channels (`int`): Channels of the images.
        num_classes (`int`): Number K of classes.
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels)
        self.head = nn.Linear(WIDTHS[-1], num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the means of the last block over positions: (B, 128)."""
        return self.layers(images)[-1].mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, K) of uint8 images (B, C, H, W)."""
        return self.head(self.features(images))


@dataclass
class Classifier:
    """
    A trained classifier, on the CPU.

    Args:
        network ([`SmallClassifier`]): The network.
        training ([`~tiny_diffusers.data.ImageData`]): The images that it was trained on.
        held_out ([`~tiny_diffusers.data.ImageData`]): The labeled images that it was tested on.
        accuracy (`float`): The share of them whose class it finds.
    """

    network: SmallClassifier
    training: ImageData
    held_out: ImageData
    accuracy: float

    @property
    def extractor(self) -> features.Extractor:
        """The features, the layers, and the linear layer that maps features to logits."""
        network = self.network
        preprocessing = {"network": "SmallClassifier", "weights_sha256": features.digest(network)}
        device = torch.device("cpu")
        return features.Extractor("classifier", network.features, preprocessing, device, network.head, network.layers)

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Predicts the classes (N,) of uint8 images (N, C, H, W)."""
        return predict(self.network, images)

    def describe(self) -> dict[str, Any]:
        """Returns what a report records: how it was trained, on what, and its accuracy."""
        return {**_describe(self.training, self.held_out), "accuracy": self.accuracy}

    def summary(self) -> str:
        """Returns the same in one sentence."""
        return (
            f"The classifier of the data's classes was trained on {len(self.training):,} images of {self.training.name} "
            f"({self.training.split}), and finds the class of {100 * self.accuracy:.1f}% of {len(self.held_out):,} "
            f"held-out images ({self.held_out.split})."
        )


def why_impossible(reference: ImageData) -> str | None:
    """Returns why there can be no classifier of the reference's classes, or None."""
    if reference.labels is None:
        return "the reference images have no labels"
    if len(reference.labels.unique()) < 2:
        return "all reference images have the same class"
    return None


def load_classifier(training: ImageData, held_out: ImageData) -> Classifier:
    """
    Loads the classifier of a dataset from the package's cache, or trains it and keeps it there.

    It is trained on the CPU in float32 from a fixed seed. With another number of threads or another version of torch
    the rounding differs, and with it a few predictions.

    Args:
        training ([`~tiny_diffusers.data.ImageData`]): Images with labels, to train on.
        held_out ([`~tiny_diffusers.data.ImageData`]): Other images with labels, for the accuracy.

    Returns:
        [`Classifier`]: The classifier.
    """
    num_classes = 1 + max(int(data.labels.max()) for data in (training, held_out))
    network = build_classifier(training.images.shape[1], num_classes)

    def train() -> dict[str, Any]:
        train_classifier(network, training)
        correct = predict(network, held_out.images) == held_out.labels
        return {"accuracy": float(correct.double().mean())}

    facts = load_or_train(network, "classifier", _describe(training, held_out), train)
    return Classifier(network, training, held_out, facts["accuracy"])


def load_or_train(
    network: nn.Module, kind: str, description: dict[str, Any], train: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """
    Loads a network's weights from the package's cache, or trains it and keeps them there, and freezes it.

    Args:
        network (`nn.Module`): The network.
        kind (`str`): Name of its folder and file in the cache, in the singular.
        description (`dict`): Everything that decides the weights, in JSON values.
        train (`Callable`): Trains the network and returns what was measured.

    Returns:
        `dict`: The description with what was measured.
    """
    entry = cache_root() / f"{kind}s" / images.digest(description, torch.__version__)
    entry.parent.mkdir(parents=True, exist_ok=True)
    weights_name = f"{kind}.safetensors"
    with FileLock(entry.with_suffix(".lock")):  # another evaluation may train the same
        if find_damage(entry) is not None:
            facts = {**description, **train()}

            def write(staging: Path) -> None:
                weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
                save_file(weights, staging / weights_name)
                (staging / _FACTS).write_text(json.dumps(facts, indent=2))

            publish(entry, write)
    network.load_state_dict(load_file(entry / weights_name))
    network.eval().requires_grad_(False)
    return json.loads((entry / _FACTS).read_text())


def build_classifier(in_channels: int, num_classes: int, seed: int = SEED) -> SmallClassifier:
    """Builds a network with weights from a seed; torch's global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallClassifier(in_channels, num_classes).to(memory_format=torch.channels_last)


def train_classifier(network: SmallClassifier, data: ImageData, seed: int = SEED) -> None:
    """Trains a network on labeled images, whose order comes from the seed."""
    train_network(network, data.images, lambda logits, rows: F.cross_entropy(logits, data.labels[rows]), seed)


def train_network(
    network: nn.Module,
    images: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int = SEED,
) -> None:
    """Trains a network on uint8 images, whose order comes from the seed, by `loss(its outputs, rows of the images)`."""
    steps = min(MAX_STEPS, math.ceil(MAX_EPOCHS * len(images) / BATCH_SIZE))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    network.train()
    for _ in progress_bar(range(steps), desc=type(network).__name__.removeprefix("Small"), unit=" steps", delay=2):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        loss(network(images[rows]), rows).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def predict(network: SmallClassifier, images: torch.Tensor) -> torch.Tensor:
    """Predicts the classes (N,) of uint8 images (N, C, H, W)."""
    network.eval()
    return torch.cat([network(batch).argmax(1) for batch in images.split(PREDICTED)])


def split_real_images(reference: ImageData, others: ImageData | None) -> tuple[ImageData, ImageData]:
    """
    Returns the images to train a classifier on and those to test it on: other real images and the reference, or else
    two parts of the reference.

    Args:
        reference ([`~tiny_diffusers.data.ImageData`]): The reference, with labels.
        others ([`~tiny_diffusers.data.ImageData`], *optional*): Real images that are not the reference's.
    """
    if others is not None and others.labels is not None:
        return others, reference
    return tuple(reference.take(rows) for rows in held_out(len(reference), HELD_OUT, SEED))


def _describe(training: ImageData, held_out: ImageData) -> dict[str, Any]:
    """Returns everything that decides a classifier, in JSON values."""
    return describe_training("mean over positions; linear", "cross-entropy", training, held_out)


def describe_training(head: str, loss: str, training: ImageData, held_out: ImageData) -> dict[str, Any]:
    """Returns how a [`SmallNetwork`] with a head is trained by a loss, and on what, in JSON values."""
    return {
        "network": f"3 blocks of 3x3 convolution ({', '.join(map(str, WIDTHS))}), batch norm, ReLU and max pooling; "
        f"{head}; images above {MAX_SIDE} pixels reduced by the mean over areas",
        "training": f"AdamW, one cycle up to {LEARNING_RATE:g}, {MAX_STEPS:,} steps or {MAX_EPOCHS} epochs of batches of "
        f"{BATCH_SIZE}, {loss}, float32",
        "seed": SEED,
        "images": len(training),
        "fingerprint": training.fingerprint,
        "held_out_images": len(held_out),
        "held_out_fingerprint": held_out.fingerprint,
    }
