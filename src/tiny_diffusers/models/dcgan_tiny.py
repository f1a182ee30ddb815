"""
The DCGAN generator and discriminator (Radford et al. 2015, arXiv 1511.06434) for small images.

Both can take classes and conditions: their embedding is tiled over a feature map and joins it as further channels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .layers_tiny import (
    ClassEmbedding,
    ConditionEmbedding,
    as_sample_size,
    check_levels,
    check_parameters,
    check_shape,
    check_sizes,
    concat_embedding,
    count_embedding,
    embed_both,
    height_and_width,
)


def _check_config(config: dict) -> tuple[int, int]:
    """Checks a config before anything is allocated. Returns the height and width of the coarsest feature map."""
    check_sizes(config)
    widths = config["block_out_channels"]
    check_levels(config, 2 ** len(widths))
    smallest = tuple(side // 2 ** len(widths) for side in height_and_width(config["sample_size"]))
    E, parameters = count_embedding(config)
    # one convolution covers the whole of the coarsest feature map
    parameters += sum(16 * (width + E) * width for width in widths)
    parameters += math.prod(smallest) * widths[-1] * (config.get("latent_dim", 1) + E)
    names = ["block_out_channels", "latent_dim", "sample_size", *(["class_embed_dim"] if E else [])]
    names = [name for name in names if name in config]
    check_parameters(parameters, config, names, "Make it narrower, or give more levels.")
    return smallest


def _init_weights(module: nn.Module) -> None:
    """Initializes as DCGAN does: convolutions from N(0, 0.02), the weights of batch norms from N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class UpBlock(nn.Module):
    """
    Transposed convolution, batch norm, ReLU. It doubles height and width, or maps 1x1 latents to the first feature
    map.

    Args:
        in_channels, out_channels (`int`): Input and output channels.
        kernel_size (`tuple[int, int]`, *optional*): Height and width of the first feature map. The block doubles if not
            given.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int] | None = None):
        super().__init__()
        size, stride, padding = (4, 2, 1) if kernel_size is None else (kernel_size, 1, 0)
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, size, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, 2 H, 2 W), or (B, C_out, *kernel_size)"""
        return torch.relu(self.norm(self.conv(x)))


class DownBlock(nn.Module):
    """
    Convolution, batch norm, leaky ReLU. It halves height and width.

    Args:
        in_channels, out_channels (`int`): Input and output channels.
        norm (`bool`): Whether to apply the batch norm, which DCGAN leaves out of its first block.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / 2, W / 2)"""
        return nn.functional.leaky_relu(self.norm(self.conv(x)), 0.2)


@dataclass
class TinyDCGANGeneratorOutput(BaseOutput):
    """
    Output of [`TinyDCGANGenerator`].

    Args:
        sample (`torch.Tensor` of shape `(B, out_channels, height, width)`): Images in [-1, 1].
    """

    sample: torch.Tensor


class TinyDCGANGenerator(ModelMixin, ConfigMixin):
    """
    DCGAN generator, which maps latents z ~ N(0, I) to images.

    A convolution turns z into the coarsest feature map, and each following one doubles height and width: with the
    defaults 4x4x512, 8x8x256, 16x16x128, 32x32x64 and the 64x64 image. In training mode batch norm makes an image
    depend on its batch; in evaluation mode it depends only on its latents.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 64):
            Side of square images, or height and width: multiples of `2 ** len(block_out_channels)`. DCGAN's is 4 times
            that.
        out_channels (`int`, *optional*, defaults to 3): Channels `C` of the images.
        latent_dim (`int`, *optional*, defaults to 100): Size of z.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 256, 512)`):
            Width of each level, finest first. They need not double: `(64, 256, 256)` is front-loaded.
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. The network then has `K + 1` rows, of which row `K` stands for no class.
        class_embed_dim (`int`, *optional*, defaults to 16):
            Channels `E` of the embedding of class and conditions, which joins the input of every convolution.
        num_conditions (`int`, *optional*): Number `D` of conditions, numbers that images are to have.

    Raises:
        ValueError: If a size is not possible, before anything is allocated.

    Example:

    ```py
    >>> import torch
    >>> from tiny_diffusers import TinyDCGANGenerator

    >>> generator = TinyDCGANGenerator(sample_size=32, block_out_channels=(64, 128, 256))
    >>> generator(torch.randn(4, 100)).sample.shape
    torch.Size([4, 3, 32, 32])
    ```
    """

    _repeated_blocks = ["UpBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        out_channels: int = 3,
        latent_dim: int = 100,
        block_out_channels: Sequence[int] = (64, 128, 256, 512),
        num_class_embeds: int | None = None,
        class_embed_dim: int = 16,
        num_conditions: int | None = None,
    ):
        super().__init__()
        # tuples, as JSON turns them into lists: the config is the same after saving and loading
        self.register_to_config(sample_size=as_sample_size(sample_size), block_out_channels=tuple(block_out_channels))
        smallest = _check_config(self.config)
        widths = list(reversed(block_out_channels))
        E = 0 if num_class_embeds is None and num_conditions is None else class_embed_dim

        self.blocks = nn.ModuleList([UpBlock(latent_dim + E, widths[0], smallest)])
        for width, narrower in itertools.pairwise(widths):
            self.blocks.append(UpBlock(width + E, narrower))
        self.conv_out = nn.ConvTranspose2d(widths[-1] + E, out_channels, 4, stride=2, padding=1, bias=False)
        self.apply(_init_weights)
        self.class_embed = ClassEmbedding(num_class_embeds, class_embed_dim) if num_class_embeds else None
        self.condition_embed = ConditionEmbedding(num_conditions, class_embed_dim) if num_conditions else None

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        conditions: torch.Tensor | None = None,
    ) -> TinyDCGANGeneratorOutput | tuple[torch.Tensor]:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, latent_dim)`): z.
            class_labels (`torch.Tensor`, *optional*):
                Integers of shape `(B,)` from 0 to `num_class_embeds`, or floats of shape `(B, num_class_embeds + 1)`
                that mix the rows. None stands for no class, row `num_class_embeds`, which `train_dcgan.py` never trains.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.
            conditions (`torch.Tensor` of shape `(B, num_conditions)`, *optional*):
                Standardized numbers. A row of NaN, or None for all images, stands for no conditions: a vector that
                `train_dcgan.py` never trains.

        Returns:
            [`TinyDCGANGeneratorOutput`] or `tuple`: With `sample` of shape `(B, C, height, width)`.

        Raises:
            ValueError: If the latents have another shape, if a label is out of range (on a CPU), or if labels or
                conditions are given to a network without them.
        """
        check_shape("latents", latents, self.config.latent_dim)
        embedding = embed_both(self.class_embed, self.condition_embed, class_labels, conditions, latents.shape[0])
        x = latents.to(self.dtype)[:, :, None, None]  # (B, latent_dim, 1, 1)
        for block in self.blocks:
            x = block(concat_embedding(x, embedding))
        x = torch.tanh(self.conv_out(concat_embedding(x, embedding))).to(latents.dtype)
        return TinyDCGANGeneratorOutput(sample=x) if return_dict else (x,)


@dataclass
class TinyDCGANDiscriminatorOutput(BaseOutput):
    """
    Output of [`TinyDCGANDiscriminator`].

    Args:
        logits (`torch.Tensor` of shape `(B,)`): Log-odds that each image is real: D(x) = sigmoid(logits).
    """

    logits: torch.Tensor


class TinyDCGANDiscriminator(ModelMixin, ConfigMixin):
    """
    DCGAN discriminator, the mirror of the generator. It maps images to the log-odds that they are real.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 64):
            Side of square images, or height and width: multiples of `2 ** len(block_out_channels)`.
        in_channels (`int`, *optional*, defaults to 3): Channels `C` of the images.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 256, 512)`):
            Width of each level, finest first.
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. The network then has `K + 1` rows, of which row `K` stands for no class.
        class_embed_dim (`int`, *optional*, defaults to 16):
            Channels `E` of the embedding of class and conditions, which joins the channels of the image.
        num_conditions (`int`, *optional*): Number `D` of conditions, numbers that images have.

    Raises:
        ValueError: If a size is not possible, before anything is allocated.

    Example:

    ```py
    >>> import torch
    >>> from tiny_diffusers import TinyDCGANDiscriminator

    >>> discriminator = TinyDCGANDiscriminator(sample_size=32, block_out_channels=(64, 128, 256))
    >>> discriminator(torch.randn(4, 3, 32, 32)).logits.shape
    torch.Size([4])
    ```
    """

    _repeated_blocks = ["DownBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        block_out_channels: Sequence[int] = (64, 128, 256, 512),
        num_class_embeds: int | None = None,
        class_embed_dim: int = 16,
        num_conditions: int | None = None,
    ):
        super().__init__()
        self.register_to_config(sample_size=as_sample_size(sample_size), block_out_channels=tuple(block_out_channels))
        smallest = _check_config(self.config)
        E = 0 if num_class_embeds is None and num_conditions is None else class_embed_dim
        widths = [in_channels + E, *block_out_channels]

        pairs = enumerate(itertools.pairwise(widths))
        self.blocks = nn.ModuleList(DownBlock(width, wider, norm=i > 0) for i, (width, wider) in pairs)
        self.conv_out = nn.Conv2d(widths[-1], 1, smallest, bias=False)
        self.apply(_init_weights)
        self.class_embed = ClassEmbedding(num_class_embeds, class_embed_dim) if num_class_embeds else None
        self.condition_embed = ConditionEmbedding(num_conditions, class_embed_dim) if num_conditions else None

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        conditions: torch.Tensor | None = None,
    ) -> TinyDCGANDiscriminatorOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(B, C, height, width)`): Images in [-1, 1].
            class_labels (`torch.Tensor`, *optional*): As for [`TinyDCGANGenerator`].
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.
            conditions (`torch.Tensor`, *optional*): As for [`TinyDCGANGenerator`].

        Returns:
            [`TinyDCGANDiscriminatorOutput`] or `tuple`: With `logits` of shape `(B,)`.

        Raises:
            ValueError: If the images have another shape, if a label is out of range (on a CPU), or if labels are given
                to a network without classes.
        """
        check_shape("sample", sample, self.config.in_channels, *height_and_width(self.config.sample_size))
        embedding = embed_both(self.class_embed, self.condition_embed, class_labels, conditions, sample.shape[0])
        x = concat_embedding(sample.to(self.dtype), embedding)
        for block in self.blocks:
            x = block(x)
        logits = self.conv_out(x).flatten().to(sample.dtype)  # (B, 1, 1, 1) -> (B,)
        return TinyDCGANDiscriminatorOutput(logits=logits) if return_dict else (logits,)
