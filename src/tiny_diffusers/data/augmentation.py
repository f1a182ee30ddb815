"""Augmentation of image batches, with random numbers drawn by the caller."""

import torch

from ..errors import UserError


# Names of the flags
GEOMETRIC = ("random_flip", "random_crop_padding")  # of an image and of its conditioning image alike
AUGMENTATIONS = (*GEOMETRIC, "color_jitter", "cutout")
# Random numbers that `augment` uses per image: flip, crop (y, x), brightness, contrast, saturation, cutout (y, x).
AUGMENT_DRAWS = 8


def augment(
    images: torch.Tensor,
    uniform: torch.Tensor,
    *,
    random_flip: bool = False,
    random_crop_padding: int = 0,
    color_jitter: float = 0.0,
    cutout: int = 0,
) -> torch.Tensor:
    """
    Augments a batch by flip, crop with padding, color jitter and cutout, in this order.

    Each image depends only on its own row of `uniform`, not on the rest of the batch.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Floating point in [-1, 1], as returned by [`normalize`].
        uniform (`torch.Tensor` of shape `(B, AUGMENT_DRAWS)`): Random numbers in [0, 1), on the images' device.
        random_flip (`bool`, defaults to `False`): Flip half of the images horizontally.
        random_crop_padding (`int`, defaults to 0): Shift each image by up to this many pixels in each direction. The
            border is reflected: a generative model would learn to paint a black one.
        color_jitter (`float`, defaults to 0.0): In [0, 1], for gray or RGB images. Brightness, contrast and (for RGB)
            saturation are each multiplied by a factor in [1 - color_jitter, 1 + color_jitter].
        cutout (`int`, defaults to 0): Side in pixels of a square that is filled with mid-gray (0). Its center is
            anywhere in the image (arXiv 1708.04552).

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: The augmented images, of the same dtype, in [-1, 1].

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a setting is out of range, or if `uniform` has another shape.
    """
    batch, channels, height, width = images.shape
    if uniform.shape != (batch, AUGMENT_DRAWS):
        raise UserError(f"uniform has shape {tuple(uniform.shape)}: it must be {(batch, AUGMENT_DRAWS)}.")
    if not 0 <= random_crop_padding < min(height, width):
        raise UserError(
            f"random_crop_padding must be from 0 to {min(height, width) - 1} for images of {height}x{width} pixels, "
            f"not {random_crop_padding}."
        )
    if not 0 <= color_jitter <= 1:
        raise UserError(f"color_jitter must be from 0 to 1, not {color_jitter}.")
    if color_jitter and channels not in (1, 3):
        raise UserError(f"color_jitter is for images of 1 or 3 channels (gray or RGB), not {channels}: leave it out.")
    if cutout < 0:
        raise UserError(f"cutout must be 0 or more pixels, not {cutout}.")
    flip, crop, jitter, hole = uniform.split((1, 2, 3, 2), dim=1)
    rows = torch.arange(height, device=images.device).expand(batch, -1)  # (B, H)
    columns = torch.arange(width, device=images.device).expand(batch, -1)  # (B, W)

    # Flip and crop only choose the source row and column of each pixel, so one gather does both.
    if random_flip or random_crop_padding:
        offset = (crop * (2 * random_crop_padding + 1)).long() - random_crop_padding  # (B, 2)
        source_rows = _reflect(rows + offset[:, :1], height)
        source_columns = _reflect(columns + offset[:, 1:], width)
        if random_flip:
            source_columns = torch.where(flip < 0.5, width - 1 - source_columns, source_columns)
        each = torch.arange(batch, device=images.device)[:, None, None]
        images = images[each, :, source_rows[:, :, None], source_columns[:, None, :]]  # (B, H, W, C)
        images = images.permute(0, 3, 1, 2).contiguous()

    if color_jitter:
        brightness, contrast, saturation = (1 + color_jitter * (2 * jitter - 1)).to(images.dtype).unbind(1)
        images = (images + 1) * brightness.view(-1, 1, 1, 1)  # in [0, 2]: 0 is black
        mean = _luma(images).mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * contrast.view(-1, 1, 1, 1)
        if channels == 3:
            gray = _luma(images)
            images = gray + (images - gray) * saturation.view(-1, 1, 1, 1)
        images = (images - 1).clamp(-1, 1)

    if cutout:
        top = (hole[:, :1] * height).long() - cutout // 2  # (B, 1)
        left = (hole[:, 1:] * width).long() - cutout // 2
        in_rows = (rows >= top) & (rows < top + cutout)  # (B, H)
        in_columns = (columns >= left) & (columns < left + cutout)  # (B, W)
        images = images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)
    return images


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Reflects indices outside [0, size) at the edge pixels, as `torch.nn.functional.pad(mode="reflect")` does."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _luma(images: torch.Tensor) -> torch.Tensor:
    """Computes the gray of RGB images (ITU-R 601-2, as Pillow): (B, C, H, W) -> (B, 1, H, W). Gray images are kept."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
