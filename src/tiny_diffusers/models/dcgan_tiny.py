"""
The networks of DCGAN (Radford et al. 2015, arXiv 1511.06434) for small images: a generator and a discriminator.

Both may know the class: an embedding of it is tiled to the size of the feature map that it joins, as further channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .unet_tiny import ClassEmbedding


# the sizes that an option may have, so that a config from elsewhere cannot ask for more memory than any small image needs
SIZES = {
    "sample_size": (1, 1024),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "latent_dim": (1, 65536),
    "block_out_channels": (1, 4096),
    "num_class_embeds": (1, 100_000),
    "class_embed_dim": (1, 1024),
}
MAX_LEVELS = 8
MAX_PARAMETERS = 4e9


def _check_config(config: dict) -> int:
    """The side of the coarsest map. Raises a ValueError for a config that cannot be built, before anything is allocated."""
    for name, (low, high) in SIZES.items():
        if name not in config or (name == "num_class_embeds" and config[name] is None):
            continue
        given = config[name]
        for value in given if isinstance(given, tuple) else (given,):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} {value!r} is not possible: it must be an integer from {low} to {high}.")
    widths = config["block_out_channels"]
    levels = len(widths)
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"block_out_channels has {levels} levels: it must have 1 to {MAX_LEVELS}.")
    smallest, rest = divmod(config["sample_size"], 2**levels)
    if rest:
        raise ValueError(
            f"sample_size {config['sample_size']} is not possible with {levels} levels, each of which halves it: it must "
            f"be a multiple of {2**levels}. Take another size, or fewer levels of block_out_channels."
        )
    # one convolution covers the whole of the coarsest map
    parameters = sum(16 * width**2 for width in widths) + smallest**2 * widths[-1] * config.get("latent_dim", 1)
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"block_out_channels {widths} makes about {parameters:.0e} parameters at sample_size {config['sample_size']}: "
            f"at most {MAX_PARAMETERS:.0e} are allowed. Make it narrower, or give more levels."
        )
    return smallest


def _init_weights(module: nn.Module) -> None:
    """DCGAN's initialisation: N(0, 0.02) for convolutions, N(1, 0.02) for the gains of batch norms."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _join(x: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
    """(B, C, H, W), (B, E) -> (B, C + E, H, W)"""
    if embedding is None:
        return x
    return torch.cat([x, embedding[:, :, None, None].expand(-1, -1, *x.shape[2:]).to(x.dtype)], dim=1)


class UpBlock(nn.Module):
    """
    Transposed convolution, batch norm, ReLU: doubles height and width, or makes the first map of 1x1 latents.

    Args:
        in_channels, out_channels (`int`): Widths before and after.
        kernel_size (`int`, *optional*): Side of the first map; for a doubling when not given.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | None = None):
        super().__init__()
        if kernel_size is None:
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
        else:
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, 2 H, 2 W), or (B, C_out, kernel_size, kernel_size)"""
        return torch.relu(self.norm(self.conv(x)))


class DownBlock(nn.Module):
    """
    Convolution, batch norm, leaky ReLU: halves height and width.

    Args:
        in_channels, out_channels (`int`): Widths before and after.
        norm (`bool`): Whether there is the batch norm: DCGAN has none on the images.
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
        sample (`torch.Tensor` of shape `(B, out_channels, sample_size, sample_size)`): Images in [-1, 1].
    """

    sample: torch.Tensor


class TinyDCGANGenerator(ModelMixin, ConfigMixin):
    """
    DCGAN's generator: from latents z of N(0, I) to images.

    A convolution makes the coarsest map of z, and each one after it doubles height and width: at 64 pixels a side and
    with the defaults, 4x4x512, 8x8x256, 16x16x128, 32x32x64 and the image. Batch norm depends on the batch in training
    mode; in evaluation mode an image depends on its latents alone.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int`, *optional*, defaults to 64):
            Height and width of the images, a multiple of `2 ** len(block_out_channels)`: 4 times that is DCGAN's.
        out_channels (`int`, *optional*, defaults to 3): Channels `C` of the images.
        latent_dim (`int`, *optional*, defaults to 100): Size of z.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 256, 512)`):
            Width of each level, finest first. They need not double: `(64, 256, 256)` is front-loaded.
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. There are then `K + 1` rows, of which row `K` stands for no class.
        class_embed_dim (`int`, *optional*, defaults to 16):
            Channels `E` of the class's embedding, which joins the input of every convolution.

    Raises:
        ValueError: If a size is not possible; nothing has been allocated then.

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
        sample_size: int = 64,
        out_channels: int = 3,
        latent_dim: int = 100,
        block_out_channels: Sequence[int] = (64, 128, 256, 512),
        num_class_embeds: int | None = None,
        class_embed_dim: int = 16,
    ):
        super().__init__()
        # JSON has lists where Python has tuples: the config is the same after a save and a load
        self.register_to_config(block_out_channels=tuple(block_out_channels))
        smallest = _check_config(self.config)
        widths = list(reversed(block_out_channels))
        E = 0 if num_class_embeds is None else class_embed_dim

        self.blocks = nn.ModuleList([UpBlock(latent_dim + E, widths[0], smallest)])
        for width, narrower in zip(widths, widths[1:], strict=False):
            self.blocks.append(UpBlock(width + E, narrower))
        self.conv_out = nn.ConvTranspose2d(widths[-1] + E, out_channels, 4, stride=2, padding=1, bias=False)
        self.apply(_init_weights)
        self.class_embed = None
        if num_class_embeds is not None:
            self.class_embed = ClassEmbedding(num_class_embeds, class_embed_dim, "add", "silu")

    def forward(
        self, latents: torch.Tensor, class_labels: torch.Tensor | None = None, return_dict: bool = True
    ) -> TinyDCGANGeneratorOutput | tuple[torch.Tensor]:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, latent_dim)`): z.
            class_labels (`torch.Tensor`, *optional*):
                Integers of shape `(B,)` from 0 to `num_class_embeds`, or floats of shape `(B, num_class_embeds + 1)` that
                mix the rows. None stands for no class, row `num_class_embeds`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.

        Returns:
            [`TinyDCGANGeneratorOutput`] or `tuple`: With `sample` of shape `(B, C, sample_size, sample_size)`.

        Raises:
            ValueError: If the latents are of another size, a label is out of range (on a CPU), or labels are given to a
                network without classes.
        """
        if latents.shape[1:] != (self.config.latent_dim,):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: this network takes (batch, {self.config.latent_dim})."
            )
        embedding = _embed(self.class_embed, class_labels, len(latents))
        x = latents.to(self.dtype)[:, :, None, None]  # (B, latent_dim, 1, 1)
        for block in self.blocks:
            x = block(_join(x, embedding))
        x = torch.tanh(self.conv_out(_join(x, embedding))).to(latents.dtype)
        return TinyDCGANGeneratorOutput(sample=x) if return_dict else (x,)


@dataclass
class TinyDCGANDiscriminatorOutput(BaseOutput):
    """
    Output of [`TinyDCGANDiscriminator`].

    Args:
        logits (`torch.Tensor` of shape `(B,)`): The log-odds that an image is real: D(x) = sigmoid(logits).
    """

    logits: torch.Tensor


class TinyDCGANDiscriminator(ModelMixin, ConfigMixin):
    """
    DCGAN's discriminator: the mirror of the generator, from images to the log-odds that they are real.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int`, *optional*, defaults to 64):
            Height and width of the images, a multiple of `2 ** len(block_out_channels)`.
        in_channels (`int`, *optional*, defaults to 3): Channels `C` of the images.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 256, 512)`):
            Width of each level, finest first.
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. There are then `K + 1` rows, of which row `K` stands for no class.
        class_embed_dim (`int`, *optional*, defaults to 16):
            Channels `E` of the class's embedding, which joins those of the image.

    Raises:
        ValueError: If a size is not possible; nothing has been allocated then.

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
        sample_size: int = 64,
        in_channels: int = 3,
        block_out_channels: Sequence[int] = (64, 128, 256, 512),
        num_class_embeds: int | None = None,
        class_embed_dim: int = 16,
    ):
        super().__init__()
        self.register_to_config(block_out_channels=tuple(block_out_channels))
        smallest = _check_config(self.config)
        widths = [in_channels if num_class_embeds is None else in_channels + class_embed_dim, *block_out_channels]

        self.blocks = nn.ModuleList(
            DownBlock(width, wider, norm=i > 0)
            for i, (width, wider) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.conv_out = nn.Conv2d(widths[-1], 1, smallest, bias=False)
        self.apply(_init_weights)
        self.class_embed = None
        if num_class_embeds is not None:
            self.class_embed = ClassEmbedding(num_class_embeds, class_embed_dim, "add", "silu")

    def forward(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None = None, return_dict: bool = True
    ) -> TinyDCGANDiscriminatorOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(B, C, sample_size, sample_size)`): Images in [-1, 1].
            class_labels (`torch.Tensor`, *optional*): As for [`TinyDCGANGenerator`].
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.

        Returns:
            [`TinyDCGANDiscriminatorOutput`] or `tuple`: With `logits` of shape `(B,)`.

        Raises:
            ValueError: If the images are of another size, a label is out of range (on a CPU), or labels are given to a
                network without classes.
        """
        size = self.config.sample_size
        if sample.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}: this network takes (batch, {self.config.in_channels}, {size}, "
                f"{size})."
            )
        x = _join(sample.to(self.dtype), _embed(self.class_embed, class_labels, len(sample)))
        for block in self.blocks:
            x = block(x)
        logits = self.conv_out(x).flatten().to(sample.dtype)  # (B, 1, 1, 1) -> (B,)
        return TinyDCGANDiscriminatorOutput(logits=logits) if return_dict else (logits,)


def _embed(
    class_embed: ClassEmbedding | None, class_labels: torch.Tensor | None, batch_size: int
) -> torch.Tensor | None:
    """Labels (B,), weights (B, K + 1) or None -> (B, E), or None for a network without classes"""
    if class_embed is not None:
        return class_embed(class_labels, batch_size)
    if class_labels is not None:
        raise ValueError(
            "class_labels were given to a network without classes: leave them out, or build it with num_class_embeds."
        )
    return None
