"""
A convolutional variational autoencoder (arXiv 1312.6114) for small images, with a latent vector. Encoder and decoder can
be given classes and conditions (Sohn et al. 2015, "Learning Structured Output Representation").

Where the decoder gives each image a probability (discretized logistic or Gaussian for gray levels, Bernoulli for
binary images), the evidence lower bound bounds the likelihood, in bits per dimension.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.distributions import Normal, kl_divergence

from .layers_tiny import (
    ClassEmbedding,
    ConditionEmbedding,
    as_sample_size,
    check_choice,
    check_levels,
    check_parameters,
    check_shape,
    check_sizes,
    concat_embedding,
    count_embedding,
    embed_both,
    height_and_width,
)


# log of the cumulative distribution function at location 0 and scale 1, for each distribution of a pixel
LOG_CDFS = {"logistic": F.logsigmoid, "gaussian": torch.special.log_ndtr}
RECONSTRUCTIONS = ("logistic", "gaussian", "bernoulli", "mse")
MIN_LOG_SCALE = -7.0


def _check_config(config: dict) -> tuple[int, int]:
    """Checks a config before anything is allocated. Returns the height and width of the coarsest feature map."""
    check_sizes(config)
    check_choice("reconstruction", config["reconstruction"], RECONSTRUCTIONS)
    widths = config["block_out_channels"]
    check_levels(config, 2 ** len(widths))
    E, parameters = count_embedding(config)
    # encoder and decoder: convolutions, and a linear layer between the coarsest feature map and the latents
    parameters += sum(2 * width**2 * (18 * config["layers_per_block"] + 16) for width in widths)
    height, width = (side // 2 ** len(widths) for side in height_and_width(config["sample_size"]))
    parameters += (3 * config["latent_dim"] + E) * widths[-1] * height * width
    names = ["block_out_channels", "latent_dim", "sample_size", *(["class_embed_dim"] if E else [])]
    check_parameters(parameters, config, names, "Make it narrower, or give more levels.")
    return height, width


def discretized_log_prob(
    sample: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, num_levels: int, log_cdf: Callable
) -> torch.Tensor:
    """
    Computes the log-probability of each pixel's level under a symmetric continuous distribution.

    A level has the probability of its bin, the values nearest to it, and the first and the last bin extend to
    infinity: log(F((x + h - mean) / s) - F((x - h - mean) / s)), where h = 1 / (L - 1) is half the distance between
    two levels (PixelCNN++, arXiv 1701.05517, eq. 2; Ho et al. 2020, eq. 13).

    Args:
        sample (`torch.Tensor`): Pixels x in [-1, 1], at the levels 2 k / (L - 1) - 1.
        mean (`torch.Tensor`): Center of the distribution, which may lie anywhere.
        log_scale (`torch.Tensor`): Logarithm of its scale s.
        num_levels (`int`): Number L of levels.
        log_cdf (`Callable`): Logarithm of the cumulative distribution function F at center 0 and scale 1.

    Returns:
        `torch.Tensor`: Nats, in the shape that the arguments broadcast to. Exact in the tails too.
    """
    half = 1 / (num_levels - 1)
    inverse_scale = torch.exp(-log_scale)
    upper = ((sample + half - mean) * inverse_scale).masked_fill(sample > 1 - half, math.inf)
    lower = ((sample - half - mean) * inverse_scale).masked_fill(sample < half - 1, -math.inf)
    # F(u) - F(l) = F(-l) - F(-u): use the lower tail, where neither is near 1 and the logarithms are exact
    flipped = upper + lower > 0
    upper, lower = torch.where(flipped, -lower, upper), torch.where(flipped, -upper, lower)
    log_upper = log_cdf(upper)
    return log_upper + torch.log(-torch.expm1(log_cdf(lower) - log_upper))


class ResidualBlock(nn.Module):
    """
    Residual block, `x + conv2(act(conv1(act(x))))`, which starts as the identity. It has no norm: networks of this
    depth need none (arXiv 2011.10650), and an image's bound must not depend on its batch.

    Args:
        channels (`int`): Width `C`.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


@dataclass
class TinyVAEOutput(BaseOutput):
    """
    Output of [`TinyVAEModel`]. The negative evidence lower bound of an image is `reconstruction_loss + kl`.

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`): Reconstructions, about [-1, 1].
        reconstruction_loss (`torch.Tensor` of shape `(B,)`): -log p(x | z) of each image in nats, for one draw of z.
        kl (`torch.Tensor` of shape `(B,)`): KL(q(z | x) || N(0, I)) of each image in nats.
    """

    # accelerate rebuilds an output that it has cast from a single dict, so all fields but the first need defaults
    sample: torch.Tensor
    reconstruction_loss: torch.Tensor = None
    kl: torch.Tensor = None


class TinyVAEModel(ModelMixin, ConfigMixin):
    r"""
    A convolutional variational autoencoder with a latent vector z, whose prior is N(0, I).

    Each encoder level halves height and width and has residual blocks. The decoder is its mirror. With classes or
    conditions c, they are q(z | x, c) and p(x | z, c), and the prior of z stays N(0, I).

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 32):
            Side of square images, or height and width: multiples of `2 ** len(block_out_channels)`.
        in_channels (`int`, *optional*, defaults to 3): Channels `C` of the images.
        latent_dim (`int`, *optional*, defaults to 64): Size of z.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 256)`): Width of each level, finest first.
        layers_per_block (`int`, *optional*, defaults to 1): Residual blocks of each level.
        reconstruction (`str`, *optional*, defaults to `"logistic"`):
            Distribution p(x | z) around the decoder's output; `reconstruction_loss` is its negative logarithm.
            `"logistic"` and `"gaussian"` are discretized to the levels, with one learned scale for each channel (as in
            arXiv 1606.04934; for why to learn it see arXiv 2006.13202). `"bernoulli"` is the cross-entropy, and
            `"mse"` half the squared error of pixels in [-1, 1].
        num_levels (`int`, *optional*, defaults to 256):
            Levels of a pixel, to which images are rounded. `"bernoulli"` is a probability only for 2 levels, that is
            for binary images, and `"mse"` never is one: otherwise neither sums to 1 over the levels.
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. The network then has `K + 1` rows, of which row `K` stands for no class.
        class_embed_dim (`int`, *optional*, defaults to 32):
            Size `E` of the embedding of class and conditions, which joins the channels of the image and the latents.
        num_conditions (`int`, *optional*): Number `D` of conditions, numbers that images have.

    Raises:
        ValueError: If an option is unknown or a size is not possible, before anything is allocated.

    Example:

    ```py
    >>> import torch
    >>> from tiny_diffusers import TinyVAEModel

    >>> vae = TinyVAEModel(sample_size=32, in_channels=3)
    >>> images = torch.rand(4, 3, 32, 32) * 2 - 1
    >>> output = vae(images)
    >>> output.sample.shape, output.kl.shape
    (torch.Size([4, 3, 32, 32]), torch.Size([4]))
    >>> vae.decode(torch.randn(4, 64)).shape
    torch.Size([4, 3, 32, 32])
    ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]
    _repeated_blocks = ["ResidualBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        latent_dim: int = 64,
        block_out_channels: Sequence[int] = (64, 128, 256),
        layers_per_block: int = 1,
        reconstruction: str = "logistic",
        num_levels: int = 256,
        num_class_embeds: int | None = None,
        class_embed_dim: int = 32,
        num_conditions: int | None = None,
    ):
        super().__init__()
        # tuples, as JSON turns them into lists: the config is the same after saving and loading
        self.register_to_config(sample_size=as_sample_size(sample_size), block_out_channels=tuple(block_out_channels))
        size = _check_config(self.config)
        self.gradient_checkpointing = False
        widths = [in_channels, *block_out_channels]
        smallest = (widths[-1], *size)  # (C, H, W)
        E = 0 if num_class_embeds is None and num_conditions is None else class_embed_dim

        encoder, decoder = [], []
        for wider, width in zip(widths[1:], widths, strict=False):
            encoder += [nn.Conv2d(width if encoder else width + E, wider, 4, stride=2, padding=1)]
            encoder += [ResidualBlock(wider) for _ in range(layers_per_block)]
            decoder += [nn.ConvTranspose2d(wider, width, 4, stride=2, padding=1)]
            decoder += [ResidualBlock(wider) for _ in range(layers_per_block)]
        features = math.prod(smallest)
        self.encoder = nn.Sequential(*encoder, nn.SiLU(), nn.Flatten(), nn.Linear(features, 2 * latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim + E, features), nn.Unflatten(1, smallest), *reversed(decoder)
        )
        if reconstruction in LOG_CDFS:
            # start near the errors of a trained small network
            self.log_scale = nn.Parameter(torch.full((in_channels, 1, 1), -2.0))
        self.class_embed = ClassEmbedding(num_class_embeds, class_embed_dim) if num_class_embeds else None
        self.condition_embed = ConditionEmbedding(num_conditions, class_embed_dim) if num_conditions else None

    @property
    def has_likelihood(self) -> bool:
        """`bool`: True if p(x | z) is a probability of the levels, so the bound is a bound on the likelihood."""
        reconstruction, num_levels = self.config.reconstruction, self.config.num_levels
        return reconstruction in LOG_CDFS or (reconstruction == "bernoulli" and num_levels == 2)

    @apply_forward_hook
    def encode(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> Normal:
        """
        Encodes images to the posterior q(z | x).

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1]; they are rounded to the levels.
            class_labels, conditions (`torch.Tensor`, *optional*): As for a forward pass.

        Returns:
            `torch.distributions.Normal`: Shape `(B, latent_dim)`, in float32 or wider.

        Raises:
            ValueError: If the images have another shape, or as for a forward pass.
        """
        return self._encode(sample, self._embed(class_labels, conditions, sample.shape[0]))

    @apply_forward_hook
    def decode(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Decodes latents to images without pixel noise, the center of p(x | z).

        Args:
            latents (`torch.Tensor` of shape `(B, latent_dim)`): z.
            class_labels, conditions (`torch.Tensor`, *optional*): As for a forward pass.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: Images, about [-1, 1], in float32 or wider.

        Raises:
            ValueError: If the latents have another shape, or as for a forward pass.
        """
        return self._to_images(self._decode(latents, self._embed(class_labels, conditions, latents.shape[0])))

    def forward(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
        class_labels: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> TinyVAEOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Computes both terms of the evidence lower bound (arXiv 1312.6114, eq. 3), with one draw of z for each image.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1]; they are rounded to the levels.
            noise (`torch.Tensor` of shape `(B, latent_dim)`, *optional*):
                Standard normal noise ε of z = μ + σ ε, drawn if not given.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.
            class_labels (`torch.Tensor`, *optional*):
                Integers of shape `(B,)` from 0 to `num_class_embeds`, or floats of shape `(B, num_class_embeds + 1)`
                that mix the rows. None stands for no class, row `num_class_embeds`, which `train_vae.py` never trains.
            conditions (`torch.Tensor` of shape `(B, num_conditions)`, *optional*):
                Standardized numbers. A row of NaN, or None for all images, stands for no conditions: a vector that
                `train_vae.py` never trains.

        Returns:
            [`TinyVAEOutput`] or `tuple`: Reconstructions and both terms.

        Raises:
            ValueError: If images or noise have another shape, if a label is out of range (on a CPU), or if labels or
                conditions are given to a network without them.
        """
        embedding = self._embed(class_labels, conditions, sample.shape[0])
        posterior = self._encode(sample, embedding)
        noise = torch.randn_like(posterior.mean) if noise is None else noise
        if noise.shape != posterior.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}: it must be {tuple(posterior.mean.shape)}.")
        output = self._decode(posterior.mean + posterior.stddev * noise, embedding)
        prior = Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean), validate_args=False)
        kl = kl_divergence(posterior, prior).sum(1)
        loss = self._pixel_losses(output, self._round(sample).to(output.dtype)).flatten(1).sum(1)
        output = TinyVAEOutput(sample=self._to_images(output), reconstruction_loss=loss, kl=kl)
        return output if return_dict else output.to_tuple()

    def _embed(
        self, class_labels: torch.Tensor | None, conditions: torch.Tensor | None, B: int
    ) -> torch.Tensor | None:
        return embed_both(self.class_embed, self.condition_embed, class_labels, conditions, B)

    def _round(self, sample: torch.Tensor) -> torch.Tensor:
        """Rounds images to the levels, in float32 or wider. 8-bit images keep their values with 256 levels."""
        steps = self.config.num_levels - 1
        return (_at_least_float32(sample).clamp(-1, 1) / 2 + 0.5).mul(steps).round() / steps * 2 - 1

    def _encode(self, sample: torch.Tensor, embedding: torch.Tensor | None) -> Normal:
        check_shape("sample", sample, self.config.in_channels, *height_and_width(self.config.sample_size))
        x = self._run(self.encoder, concat_embedding(self._round(sample).to(self.dtype), embedding))
        mean, log_variance = _at_least_float32(x).chunk(2, dim=1)
        return Normal(mean, torch.exp(0.5 * log_variance.clamp(-30, 20)), validate_args=False)

    def _decode(self, latents: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
        """Returns the logits of Bernoulli pixels, or the centers of others: (B, latent_dim) -> (B, C, H, W)"""
        check_shape("latents", latents, self.config.latent_dim)
        return _at_least_float32(self._run(self.decoder, concat_embedding(latents.to(self.dtype), embedding)))

    def _run(self, layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            if self.gradient_checkpointing and torch.is_grad_enabled() and isinstance(layer, ResidualBlock):
                x = self._gradient_checkpointing_func(layer, x)
            else:
                x = layer(x)
        return x

    def _to_images(self, output: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sigmoid(output) - 1 if self.config.reconstruction == "bernoulli" else output

    def _pixel_losses(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Computes -log p(x | z) of each pixel in nats, up to a constant for `"mse"`: (B, C, H, W)"""
        reconstruction = self.config.reconstruction
        if reconstruction == "mse":
            return 0.5 * (sample - output).square()
        if reconstruction == "bernoulli":
            return F.binary_cross_entropy_with_logits(output, sample / 2 + 0.5, reduction="none")
        log_scale = self.log_scale.to(output.dtype).clamp(min=MIN_LOG_SCALE)
        return -discretized_log_prob(sample, output, log_scale, self.config.num_levels, LOG_CDFS[reconstruction])


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
