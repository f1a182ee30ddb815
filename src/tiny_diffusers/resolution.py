"""
Resolutions as flags, recipes and reports have them: the side of square images, `32`, or height x width, `"48x64"`.

A square has one spelling: 32x32 is read as 32.
"""

import argparse
import re


Resolution = int | str


def parse_resolution(text: str) -> Resolution:
    """
    Parses the text of a flag.

    Raises:
        `argparse.ArgumentTypeError`: If it is neither a number nor height x width.
    """
    match = re.fullmatch(r"([+-]?\d{1,30})(?:x([+-]?\d{1,30}))?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' must be a side in pixels, as 32, or height x width, as 48x64")
    height, width = match.groups()
    return spell_resolution(int(height), int(width or height))


def spell_resolution(height: int, width: int) -> Resolution:
    """Returns a height and width in pixels as a resolution."""
    return height if height == width else f"{height}x{width}"


def to_size(resolution: Resolution | None) -> int | tuple[int, int] | None:
    """Returns a resolution as data and networks take it: 32 -> 32, "48x64" -> (48, 64)."""
    if not isinstance(resolution, str):
        return resolution
    height, width = map(int, resolution.split("x"))
    return height, width
