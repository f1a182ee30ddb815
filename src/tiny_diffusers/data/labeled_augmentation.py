"""Augmentation that the network is told of, so that none of it leaks into the samples."""

import math

import torch
import torch.nn.functional as F


# Random numbers that `augment_labeled` uses per image: eight that decide, and eight that say by how much.
LABELED_DRAWS = 16

# The labels of an image: mirrored, upside down, scale, cosine and sine of the rotation, two of the stretching, shift in x, y.
NUM_LABELS = 9

# Standard deviations, as in EDM, table 6
_SCALE_STD, _STRETCH_STD, _SHIFT_STD = 0.2, 0.2, 0.125


def augment_labeled(
    images: torch.Tensor, uniform: torch.Tensor, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mirrors, scales, rotates, stretches and shifts images, each with a probability, and says what was done to each: the
    geometric augmentation of [EDM](https://huggingface.co/papers/2206.00364), appendix F.2. All of it is one resampling
    by bicubic interpolation, with the border reflected.

    Each image depends only on its own row of `uniform`, not on the rest of the batch.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Floating point in [-1, 1].
        uniform (`torch.Tensor` of shape `(B, LABELED_DRAWS)`): Random numbers in [0, 1), on the images' device.
        probability (`float`): That of each kind of augmentation, in [0, 1].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The images, in [-1, 1], and their labels `(B, NUM_LABELS)`, zeros where
        nothing was done.
    """
    decides, amount = uniform.float().chunk(2, dim=1)
    is_done = decides < probability  # (B, 8)
    normal = torch.special.ndtri(amount.clamp(min=2**-25))  # torch.rand has multiples of 2^-24
    batch = len(images)

    mirror = (amount[:, 0] < 0.5) & is_done[:, 0]
    flip = (amount[:, 1] < 0.5) & is_done[:, 1]
    scale = (normal[:, 2] * _SCALE_STD * is_done[:, 2]).exp2()
    angle = (2 * amount[:, 3] - 1) * math.pi * is_done[:, 3]
    stretch = (normal[:, 4] * _STRETCH_STD * is_done[:, 4]).exp2()
    direction = (2 * amount[:, 5] - 1) * math.pi * (decides[:, 5] < 0.5)  # half are stretched along an axis
    shift = normal[:, 6:8] * _SHIFT_STD * is_done[:, 6:7]  # of the image's side

    signs = torch.stack([1 - 2.0 * mirror, 1 - 2.0 * flip], dim=1)
    stretching = (
        _rotation(direction) @ torch.diag_embed(torch.stack([stretch, 1 / stretch], dim=1)) @ _rotation(-direction)
    )
    matrix = (
        _rotation(angle) @ stretching @ torch.diag_embed(scale[:, None] * signs)
    )  # of the image, in units of pixels

    height, width = images.shape[2:]
    # `affine_grid` wants where each pixel comes from, in units of half a side.
    sides = torch.tensor([width, height], dtype=torch.float32, device=images.device)
    inverse = torch.linalg.inv(matrix) * sides / sides[:, None]
    moved = torch.cat([inverse, -inverse @ (2 * shift)[:, :, None]], dim=2)
    grid = F.affine_grid(moved, [batch, 1, height, width], align_corners=False)
    resampled = F.grid_sample(
        images.float(), grid, mode="bicubic", padding_mode="reflection", align_corners=False
    ).clamp(-1, 1)

    labels = torch.stack(
        [
            *(mirror.float(), flip.float(), scale.log2() / _SCALE_STD, angle.cos() - 1, angle.sin()),
            *(
                (stretch.log2() / _STRETCH_STD)[:, None] * torch.stack([direction.cos(), direction.sin()], dim=1)
            ).unbind(1),
            *(shift / _SHIFT_STD).unbind(1),
        ],
        dim=1,
    )
    untouched = (labels == 0).all(dim=1)[:, None, None, None]
    return torch.where(untouched, images, resampled.to(images.dtype)), labels


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """Returns the matrices that rotate by angles: (B,) -> (B, 2, 2)"""
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cosine, -sine], dim=1), torch.stack([sine, cosine], dim=1)], dim=1)
