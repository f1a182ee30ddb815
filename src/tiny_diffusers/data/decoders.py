"""Decodes one image, a picture, several pages or an array, to uint8 or to float32 with the values of the file."""

import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from ..errors import UserError
from .sources import RefusedImageError, open_image


_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_COLOR_TO_GRAY = "were in color, converted to gray"
_LUMA = np.float32([0.299, 0.587, 0.114])  # of RGB, as Pillow weights them
_MIXED = "integers among floating-point values: set value_range"
_BITS = (8, 10, 12, 14, 16)  # of cameras and scanners, whose values are stored in 16 bits


@dataclass(frozen=True)
class DecodingOptions:
    """
    How each image is decoded: as in [`load_images`], with the height and width as `resolution`.

    Args:
        keeps_values (`bool`): Decode to float32 with the values of the file, instead of to uint8.
        bits (`int`): Scale values of more than 8 bits by this many, or by those that they need if they are more.
        needs_floats (`bool`): Refuse integers, as nothing says how they compare with the floating-point values of the others.
    """

    resolution: tuple[int, int] | None
    center_crop: bool
    channels: int | None
    keeps_values: bool = False
    bits: int = 8
    needs_floats: bool = False


def decode_image(encoded: dict, options: DecodingOptions) -> tuple[np.ndarray, list[str | int]]:
    """
    Decodes an image to (C, H, W), uint8 or, if `options.keeps_values`, float32. Also returns what was changed: for values of
    more than 8 bits that are scaled, or in wider pixels, the number of bits that they need.
    """
    array = read_array(encoded)
    if array is not None:
        content = array.tobytes()
        images, changes = _split_channels(channels_first(array, options.channels), options)
    else:
        content = read_content(encoded)
        images, changes = _decode_content(content, options)
    if options.resolution is not None:
        # The position is pseudo-random, but depends only on this file's bytes.
        position = None if options.center_crop else zlib.crc32(content) / 2**32
        images, said = zip(*(_crop_and_resize(image, *options.resolution, position) for image in images), strict=True)
        changes += said[0]
    planes = np.dstack([np.asarray(image) for image in images]).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
    return planes, [*changes, "gray"] if len(planes) == 1 else changes


def read_array(encoded: dict) -> np.ndarray | None:
    """Returns an image that comes as an array, as nested lists or as a .npy file; None for a picture."""
    if "array" in encoded:
        array = np.asarray(encoded["array"], encoded.get("dtype"))
    elif str(encoded["path"]).lower().endswith(".npy"):
        array = np.load(io.BytesIO(read_content(encoded)), allow_pickle=False)
    else:
        return None
    if array.ndim not in (2, 3):
        raise RefusedImageError(f"an array of shape {array.shape} is no image")
    return array


def read_content(encoded: dict) -> bytes:
    content, path = encoded["bytes"], encoded["path"]
    return (Path(path) if isinstance(path, str) else path).read_bytes() if content is None else content


def _decode_content(content: bytes, options: DecodingOptions) -> tuple[list[Image.Image], list[str | int]]:
    """Decodes a file to one or several images of one size, whose bands are the channels. Also returns what was changed."""
    image = open_image(io.BytesIO(content))
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception:  # a frame beyond the first is damaged
        image, frames = open_image(io.BytesIO(content)), 2
    if frames == options.channels > 1:
        pages = [np.asarray(page) for page in ImageSequence.Iterator(image)]
        if all(page.ndim == 2 for page in pages) and image.mode != "P":
            return _split_channels(np.stack(pages), options)
        image.seek(0)
    if options.keeps_values and _has_deep_channels(image):
        raise RefusedImageError("16 bits a channel, of which Pillow reads 8: save it as .npy")
    if options.needs_floats and image.mode != "F":
        raise RefusedImageError(_MIXED)
    image = ImageOps.exif_transpose(image)
    said = ["have several frames or pages: the first was taken"] if frames > 1 else []
    if options.keeps_values and image.mode.startswith(("I", "F")):
        images, changes = _split_channels(np.asarray(image)[None], options)
        return images, changes + said
    image, changes = _to_channels(image, options)
    return [band.convert("F") for band in image.split()] if options.keeps_values else [image], changes + said


def _has_deep_channels(image: Image.Image) -> bool:
    """Checks for an image of several channels, of which each has 16 bits, by the mode that Pillow decodes it from."""
    return len(image.getbands()) > 1 and any(";16" in str(tile[3]) for tile in image.tile)


def channels_first(array: np.ndarray, channels: int | None) -> np.ndarray:
    """
    Returns an image (H, W), (H, W, C) or (C, H, W) as (C, H, W).

    The axis of channels has the length `channels`. If that is None, 1 or 3, it has the length 1 or 3, the last axis coming
    before the first; else it is shorter than both others, and these are equal or at least twice as long.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If neither the first nor the last axis is that of channels, or both are.
    """
    if array.ndim == 2:
        return array[None]
    if channels in (None, 1, 3) and has_gray_or_rgb(array):
        return np.moveaxis(array, -1 if array.shape[-1] in (1, 3) else 0, 0)
    first, middle, last = array.shape
    if channels is not None:
        axes = [axis for axis, length in ((0, first), (-1, last)) if length == channels]
    else:
        candidates = ((0, first, sorted((middle, last))), (-1, last, sorted((first, middle))))
        axes = [axis for axis, length, (a, b) in candidates if length < a and (a == b or 2 * length <= a)]
    if len(axes) != 1:
        is_asked = f"are {channels} long" if channels is not None else "look like it"
        raise UserError(
            f"The axis of channels is unclear in images of shape {array.shape}: {'both' if axes else 'none'} of the first and "
            f"the last {is_asked}. Set `channels` to the length of one of them alone."
        )
    return np.moveaxis(array, axes[0], 0)


def has_gray_or_rgb(array: np.ndarray) -> bool:
    """Checks that the first or the last axis of an image has the length 1 or 3."""
    return array.shape[0] in (1, 3) or array.shape[-1] in (1, 3)


def _split_channels(array: np.ndarray, options: DecodingOptions) -> tuple[list[Image.Image], list[str | int]]:
    """Converts an array (C, H, W) to C images of one band. Also returns what was changed, as [`decode_image`] does."""
    changes = []
    if array.dtype == bool:
        array = array * np.uint8(255)
    if options.needs_floats and array.dtype.kind != "f":
        raise RefusedImageError(_MIXED)
    if options.keeps_values:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise RefusedImageError("NaN or infinite values")
        if options.channels == 1 and len(array) == 3:
            array = np.tensordot(_LUMA, array, axes=1)[None]
            changes.append(_COLOR_TO_GRAY)
    elif array.dtype != np.uint8:
        array, needed = _to_levels(array, options.bits)
        changes.append(needed)
    images = [Image.fromarray(np.ascontiguousarray(plane)) for plane in array]
    if options.channels == 1 and len(images) == 3:
        images = [Image.merge("RGB", images).convert("L")]
        changes.append(_COLOR_TO_GRAY)
    return images, changes


def _to_levels(values: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """Scales integers of up to 16 bits to uint8, by `bits` or by those that they need. Also returns the latter."""
    if values.dtype.kind == "f":
        raise RefusedImageError("floating-point values have no fixed range")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise RefusedImageError(
            f"holds values from {low} to {high}: they must be from 0 to 65535, or value_range must be set"
        )
    needed = next(each for each in _BITS if high < 2**each)
    return np.rint(values.astype(np.int64) * 255 / (2 ** max(bits, needed) - 1)).astype(np.uint8), needed


def _crop_and_resize(
    image: Image.Image, height: int, width: int, position: float | None
) -> tuple[Image.Image, list[str]]:
    """
    Resizes the largest crop with the aspect ratio of `height` x `width`, at a position in [0, 1) or at the center (None).
    Also returns what was changed.
    """
    changes = []
    crop_width = max(1, min(image.width, round(image.height * width / height)))
    crop_height = max(1, min(image.height, round(image.width * height / width)))
    left, top = (image.width - crop_width) // 2, (image.height - crop_height) // 2
    if (crop_width, crop_height) != image.size:
        shape, crop = ("were not square", "square") if height == width else ("had another aspect ratio", "crop")
        if position is None:
            changes.append(f"{shape}: their center was taken")
        else:
            left = int(position * (image.width - crop_width + 1))
            top = int(position * (image.height - crop_height + 1))
            changes.append(f"{shape}: a {crop} at a random position was taken (center_crop takes the center)")
    if (crop_width, crop_height) != (width, height):
        is_smaller = crop_width * crop_height < width * height
        changes.append(f"were {'enlarged' if is_smaller else 'reduced'} to {height}x{width}")
    box = (left, top, left + crop_width, top + crop_height)
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if image.mode == "F":  # has no limits that end what the cubic filter adds beyond the values
        resized = Image.fromarray(np.asarray(resized).clip(*image.getextrema()))
    return resized, changes


def read_picture(
    path: Path,
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
    resolution: tuple[int, int] | None = None,
) -> Image.Image | np.ndarray:
    """
    Reads an image as training images are read: a picture, upright and of 8 bits, or an array.

    Args:
        path (`Path`): The picture, or a .npy file of shape (H, W), (H, W, C) or (C, H, W).
        channels (`int`, *optional*): Channels of the model's images, as in [`load_images`].
        value_range (`tuple[float, float]`, *optional*): Values of the model's images, if they are not of 8 bits.
        resolution (`tuple[int, int]`, *optional*): Height and width of the center to take; by default all of it.

    Returns:
        `PIL.Image.Image`: "L", "LA", "RGB" or "RGBA" of up to four channels of 8 bits; else
        `np.ndarray` of shape `(H, W, C)`: float32, with the values of the file where there is a `value_range`, else in
            [0, 1].
    """
    encoded = {"bytes": None, "path": path}
    array = read_array(encoded)
    if array is not None and array.dtype.kind == "f" and value_range is None:
        value_range = (0.0, 1.0)  # as pipelines give arrays of images of 8 bits
    options = DecodingOptions(resolution, True, channels, keeps_values=value_range is not None)
    pixels = decode_image(encoded, options)[0].transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if channels == 3 and pixels.dtype == np.float32:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))  # repeats gray
    if value_range is not None:
        return pixels
    if pixels.shape[-1] > 4:
        return pixels / np.float32(255)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _to_channels(image: Image.Image, options: DecodingOptions) -> tuple[Image.Image, list[str | int]]:
    """Converts an image of any mode to "L" or "RGB", or to "LA" or "RGBA" if two or four channels are asked for."""
    if options.channels in (2, 4) and (image.mode in _WITH_ALPHA or "transparency" in image.info):
        rgba, changes = image.convert("RGBA"), []
        is_gray = image.mode in ("LA", "La", "L", "1")
    else:
        rgba, changes = _to_gray_or_rgb(image, options.bits)
        is_gray = rgba.mode == "L"
        if options.channels in (2, 4):
            changes.append("had no alpha channel, an opaque one was added")
    if options.channels in (1, 2) and not is_gray:
        changes.append(_COLOR_TO_GRAY)
    mode = {1: "L", 2: "LA", 4: "RGBA"}.get(options.channels, rgba.mode)
    return rgba if rgba.mode == mode else rgba.convert(mode), changes


def _to_gray_or_rgb(image: Image.Image, bits: int) -> tuple[Image.Image, list[str | int]]:
    """Converts an image of any mode to "L" or "RGB". Also returns what was changed, as [`decode_image`] does."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image, []
    if image.mode.startswith(("I", "F")):
        levels, needed = _to_levels(np.asarray(image), bits)
        return Image.fromarray(levels), [needed]

    gray = image.mode in ("1", "L", "LA", "La")
    changes = []
    if image.mode == "P":
        changes.append("had a palette, converted to RGB")
    elif not gray and image.mode not in ("RGB", "RGBA", "RGBa"):
        changes.append(f"were {image.mode}, converted to RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)  # equals `alpha_composite`, in a third of its memory
        image = white
        changes.append("had an alpha channel, laid on white")
    return image.convert("L" if gray else "RGB"), changes
