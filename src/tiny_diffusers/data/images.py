"""Decoded images: their container, the held-out split and the conversion between uint8 and [-1, 1]."""

import hashlib
from dataclasses import dataclass, field, replace

import torch

from ..errors import UserError


@dataclass
class ImageData:
    """
    Decoded images, with labels if the dataset has them, and with conditioning images if they were asked for.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): uint8, C = 1 (grey) or 3 (RGB). Images read from the cache are
            memory-mapped, so a dataset may be larger than memory.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): int64, from 0 to K - 1.
        id2label (`dict[int, str]`, *optional*): Name of each of the K classes.
        name (`str`): The Hub id, the folder's name, or `"digits"`.
        split (`str`): The split that was read.
        fingerprint (`str`): sha256 of all of these. It depends only on their values, not on where they were read.
        notes (`list[str]`): Messages to the user: what was converted, resized or skipped.
        conditioning_images (`torch.Tensor` of shape `(N, K, H, W)`, *optional*): uint8, K = 1 or 3: of each image, the
            one that a model is given to generate it from.
        conditions (`torch.Tensor` of shape `(N, D)`, *optional*): float32: the numbers and labels of each image, in the
            data's units, without missing values.
        condition_names (`list[str]`, *optional*): Name of each of the D conditions.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    id2label: dict[int, str] | None
    name: str
    split: str
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    conditioning_images: torch.Tensor | None = None
    conditions: torch.Tensor | None = None
    condition_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: torch.Tensor) -> "ImageData":
        """Returns the images of these rows, with what belongs to them and their fingerprint."""
        names = ("images", "labels", "conditioning_images", "conditions")
        arrays = {name: getattr(self, name) for name in names}
        taken = replace(self, **{name: None if array is None else array[rows] for name, array in arrays.items()})
        return replace(taken, fingerprint=fingerprint_of(taken))


def fingerprint_of(data: ImageData) -> str:
    """Computes the fingerprint that these data have."""
    return compute_fingerprint(
        data.images, data.labels, data.conditioning_images, data.conditions, data.condition_names
    )


def compute_fingerprint(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    conditioning_images: torch.Tensor | None = None,
    conditions: torch.Tensor | None = None,
    condition_names: list[str] | None = None,
) -> str:
    """Computes the sha256 of images, labels, conditioning images and conditions, as hexadecimal digits."""
    digest = hashlib.sha256(repr((tuple(images.shape), labels is not None)).encode())
    digest.update(images.numpy())
    if labels is not None:
        digest.update(labels.numpy())
    if conditioning_images is not None:
        digest.update(conditioning_images.numpy())
    if conditions is not None:
        digest.update(repr(condition_names).encode())
        digest.update(conditions.numpy())
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


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Converts uint8 images in [0, 255], of any shape, to float32 in [-1, 1] on the same device: x / 127.5 - 1."""
    return images.float().div(127.5).sub_(1)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """
    Converts floating-point images in [-1, 1], of any shape, to uint8 in [0, 255] on the same device, rounded and
    clamped: `denormalize(normalize(x))` equals `x`.
    """
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
