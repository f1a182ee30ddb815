"""The transformer of the diffusion families: its options, and its defaults by resolution."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

from ..flags import flag
from ..models.transformer_tiny import CHOICES, TinyTransformer2DModel
from ..training.arguments import NetworkArguments


logger = logging.getLogger(__name__)

_PATCHES_PER_SIDE = 7  # at least: fewer and larger patches hold too much detail each


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


def default_transformer(resolution: int) -> dict[str, Any]:
    """
    Returns the transformer's defaults by resolution: the largest patches that leave seven a side, and a width and depth
    with about as many multiplications as the default U-Net's.
    """
    patch_size = next(p for p in (4, 2, 1) if p == 1 or (resolution % p == 0 and resolution // p >= _PATCHES_PER_SIDE))
    heads, layers = (2, 3) if resolution < 16 else (3, 5) if resolution < 48 else (4, 5)
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
    side, width = config.sample_size // config.patch_size, config.num_attention_heads * config.attention_head_dim
    if side**2 >= costly:
        # two matrix products a layer, a multiplication and an addition each
        attention = 4 * side**4 * width * config.num_layers
        logger.warning(
            f"attention over {side}x{side} patches costs {attention / 1e9:.1f} GFLOP an image and pass: on a CPU give a "
            "larger --patch_size."
        )
