"""Decoded images: their container, the held-out split and the conversion between their values and [-1, 1]."""

import hashlib
import re
from dataclasses import dataclass, field, replace

import torch

from ..errors import UserError


# In a note: "hidden images, left out, 2: a.png, b.png"
_NAMES_OF_FILES = re.compile(r"^(.*?(?:left out|skipped|not entered \(.*?\))(?:, [\d,]+)?): .*", re.DOTALL)


@dataclass
class ImageData:
    """
    Decoded images, with labels if the dataset has them, and with conditioning images if they were asked for.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): uint8, or float32 with a `value_range`. C is 1 (gray), 3 (RGB) or
            any other number. Images read from the cache are memory-mapped, so a dataset may be larger than memory.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): int64, from 0 to K - 1.
        id2label (`dict[int, str]`, *optional*): Name of each of the K classes.
        name (`str`): The Hub id, the folder's name, or `"digits"`.
        split (`str`): The split that was read.
        fingerprint (`str`): sha256 of all of these. It depends only on their values, not on where they were read.
        notes (`list[str]`): Messages to the user: what was converted, resized or skipped, with the names of files.
        conditioning_images (`torch.Tensor` of shape `(N, K, H, W)`, *optional*): uint8, K = 1 or 3: of each image, the
            one that a model is given to generate it from.
        value_range (`tuple[float, float]`, *optional*): The values of images that are not of 8 bits: those that a model
            takes as -1 and 1. The images are float32 and lie between them.
        conditions (`torch.Tensor` of shape `(N, D)`, *optional*): float32: the numbers and labels of each image, in the
            data's units, without missing values.
        condition_names (`list[str]`, *optional*): Name of each of the D conditions.
        latents (`torch.Tensor` of shape `(N, V, C, h, w)`, *optional*): float32: what a network is trained on in place of
            the images, their latents, and with V = 2 those of their mirror images as well.
        vae_sha256 (`str`, *optional*): Digest of the weights of the autoencoder that encoded them.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    id2label: dict[int, str] | None
    name: str
    split: str
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    conditioning_images: torch.Tensor | None = None
    value_range: tuple[float, float] | None = None
    conditions: torch.Tensor | None = None
    condition_names: list[str] | None = None
    latents: torch.Tensor | None = None
    vae_sha256: str | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Returns the shape (C, H, W) of what a network is trained on: an image, or its latents."""
        channels, height, width = (self.images if self.latents is None else self.latents).shape[-3:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    @property
    def public_notes(self) -> list[str]:
        """The notes without the names of skipped files, which may be private: for what is shared with a model."""
        return [_NAMES_OF_FILES.sub(r"\1", note) for note in self.notes]

    def take(self, rows: torch.Tensor) -> "ImageData":
        """Returns the images of these rows, with what belongs to them and their fingerprint."""
        names = ("images", "labels", "conditioning_images", "conditions", "latents")
        arrays = {name: getattr(self, name) for name in names}
        taken = replace(self, **{name: None if array is None else array[rows] for name, array in arrays.items()})
        return replace(taken, fingerprint=compute_fingerprint(taken))


def compute_fingerprint(data: ImageData) -> str:
    """Computes the sha256 of images, labels, conditioning images, value range and conditions, as hexadecimal digits."""
    digest = hashlib.sha256(repr((tuple(data.images.shape), data.labels is not None)).encode())
    digest.update(data.images.numpy())
    if data.labels is not None:
        digest.update(data.labels.numpy())
    if data.conditioning_images is not None:
        digest.update(data.conditioning_images.numpy())
    if data.value_range is not None:
        digest.update(repr(tuple(data.value_range)).encode())
    if data.conditions is not None:
        digest.update(repr(data.condition_names).encode())
        digest.update(data.conditions.numpy())
    return digest.hexdigest()


def held_out(num_images: int, share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Splits the indices of a dataset at random into training and validation (held-out) indices.

    The split depends only on the three arguments. Each part has at least one index.

    Args:
        num_images (`int`): Number N of images, at least 2.
        share (`float`): Share of the images to hold out, in (0, 1).
        seed (`int`, defaults to 0): Seed of the split.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The training indices, sorted, and the validation indices, in random order:
        the first few are a random subset of a dataset that is sorted by class. Both are int64; together they are 0 to N - 1.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If `share` is out of range, or if there are fewer than two images.
    """
    if not 0 < share < 1:
        raise UserError(f"The share of held-out images must be between 0 and 1 (both excluded), not {share}.")
    if num_images < 2:
        raise UserError(f"Holding out images takes at least 2 images, not {num_images}: give more, or hold none out.")
    count = min(max(round(num_images * share), 1), num_images - 1)
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count]


def spell_values(value_range: tuple[float, float] | None) -> str:
    """Returns a value range in words; None is that of 8-bit images."""
    return "8 bits" if value_range is None else f"values from {value_range[0]:g} to {value_range[1]:g}"


def normalize(images: torch.Tensor, value_range: tuple[float, float] | None = None) -> torch.Tensor:
    """
    Converts images of any shape to float32 in [-1, 1] on the same device: uint8 by x / 127.5 - 1, and values between the
    limits of a `value_range` by 2 (x - low) / (high - low) - 1.
    """
    if value_range is None:
        return images.float().div(127.5).sub_(1)
    low, high = value_range
    return images.float().sub(low).mul_(2 / (high - low)).sub_(1)


def denormalize(images: torch.Tensor, value_range: tuple[float, float] | None = None) -> torch.Tensor:
    """
    Converts floating-point images in [-1, 1], of any shape, back on the same device, clamped: to uint8, rounded, or to
    float32 in `value_range`. `denormalize(normalize(x))` equals `x`.
    """
    if value_range is None:
        return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    low, high = value_range
    return images.float().add(1).mul_((high - low) / 2).add_(low).clamp_(low, high)
