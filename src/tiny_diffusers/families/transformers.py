"""The transformer of the diffusion families: its options, and its defaults by resolution."""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

from ..flags import flag
from ..models.layers_tiny import height_and_width
from ..models.transformer_tiny import CHOICES, TinyTransformer2DModel
from ..training.arguments import NetworkArguments


logger = logging.getLogger(__name__)

_MIN_PATCHES = 49  # seven a side of a square: fewer and larger patches hold too much detail each


@dataclass(frozen=True)
class TransformerArguments(NetworkArguments):
    """
    Options of [`TinyTransformer2DModel`] alone, resolved by the resolution (or the preset) where they are not given. It
    shares others with [`UNetArguments`].
    """

    num_layers: int | None = flag(None, "Blocks of --network transformer.", within="[1, 64]")
    num_attention_heads: int | None = flag(
        None,
        "Heads of --network transformer; its width is this number times --attention_head_dim.",
        within="[1, 256]",
    )
    mlp_ratio: float | None = flag(
        None, "Width of the MLPs of --network transformer, as a multiple of its own.", within="(0, 64]"
    )
    position_embedding: Literal[CHOICES["position_embedding"]] | None = flag(
        None, "How --network transformer tells its patches' places apart; relative: rotary, by row and column."
    )
    long_skips: bool | None = flag(None, "Join the first blocks of --network transformer to its last ones.")


def default_transformer(height: int, width: int) -> dict[str, Any]:
    """
    Returns the transformer's defaults by resolution: the largest patches of which there are enough, and a width and depth
    with about as many multiplications as the default U-Net's.
    """
    area, divisor = height * width, math.gcd(height, width)
    patch_size = next(p for p in (4, 2, 1) if p == 1 or (divisor % p == 0 and area >= _MIN_PATCHES * p**2))
    heads, layers = (2, 3) if area < 16**2 else (3, 5) if area < 48**2 else (4, 5)
    return {
        "patch_size": patch_size,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "position_embedding": "sinusoidal",
    }


def warn_of_costly_tokens(transformer: TinyTransformer2DModel, costly: int) -> None:
    """Warns of so many tokens, `costly` or more, that attention over them is most of a CPU's work."""
    config = transformer.config
    rows, columns = (side // config.patch_size for side in height_and_width(config.sample_size))
    width = config.num_attention_heads * config.attention_head_dim
    if rows * columns >= costly:
        # two matrix products a layer, a multiplication and an addition each
        attention = 4 * (rows * columns) ** 2 * width * config.num_layers
        logger.warning(
            f"attention over {rows}x{columns} patches costs {attention / 1e9:.1f} GFLOP an image and pass: on a CPU give a "
            "larger --patch_size."
        )
