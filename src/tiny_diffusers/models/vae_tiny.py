"""
A convolutional variational autoencoder (arXiv 1312.6114) of small images, with a vector for a latent.

Where the decoder gives every image a probability (discretised logistic or Gaussian on the grey levels, Bernoulli on
binary ones) the evidence lower bound is a bound on the likelihood, in bits a dimension. The file needs torch and
diffusers alone, so that it can be laid beside a checkpoint's weights.
"""

import difflib
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


# the cumulative distributions, in log, of what a pixel may follow around the decoder's output
LOG_CDFS = {"logistic": F.logsigmoid, "gaussian": torch.special.log_ndtr}
RECONSTRUCTIONS = ("logistic", "gaussian", "bernoulli", "mse")

# the sizes that an option may have, so that a config from elsewhere cannot ask for more memory than any small image needs
SIZES = {
    "sample_size": (1, 1024),
    "in_channels": (1, 1024),
    "latent_dim": (1, 65536),
    "block_out_channels": (1, 4096),
    "layers_per_block": (1, 32),
    "num_levels": (2, 65536),
}
MAX_LEVELS = 8
MAX_PARAMETERS = 4e9
MIN_LOG_SCALE = -7.0


def _check_config(config: dict) -> None:
    """Raises a ValueError for a config that cannot be built, before anything is allocated."""
    widths, reconstruction = config["block_out_channels"], config["reconstruction"]
    if not 1 <= len(widths) <= MAX_LEVELS:
        raise ValueError(f"block_out_channels has {len(widths)} levels: it must have 1 to {MAX_LEVELS}.")
    for name, (low, high) in SIZES.items():
        given = config[name]
        for value in given if isinstance(given, tuple) else (given,):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} {value!r} is not possible: it must be an integer from {low} to {high}.")
    if reconstruction not in RECONSTRUCTIONS:
        near = difflib.get_close_matches(str(reconstruction), RECONSTRUCTIONS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(
            f"Unknown reconstruction {reconstruction!r}: it must be one of {', '.join(RECONSTRUCTIONS)}.{hint}"
        )
    multiple = 2 ** len(widths)
    if config["sample_size"] % multiple:
        raise ValueError(
            f"sample_size {config['sample_size']} is not possible with {len(widths)} levels, each of which halves it: it "
            f"must be a multiple of {multiple}. Take another size, or fewer levels."
        )
    # both halves: convolutions, and the linear layer between the coarsest map and the latents
    parameters = sum(2 * width**2 * (18 * config["layers_per_block"] + 16) for width in widths)
    parameters += 3 * config["latent_dim"] * widths[-1] * (config["sample_size"] // multiple) ** 2
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"block_out_channels {widths} and latent_dim {config['latent_dim']} make about {parameters:.0e} parameters at "
            f"sample_size {config['sample_size']}: at most {MAX_PARAMETERS:.0e} are allowed. Make it narrower, or give more "
            "levels."
        )


def discretized_log_prob(
    sample: torch.Tensor,
    mean: torch.Tensor,
    log_scale: torch.Tensor,
    num_levels: int,
    log_cdf: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    Log-probability of each pixel's level under a symmetric continuous distribution, of which a level takes the part that
    is nearest to it, and the first and the last level the tails: log(F((x + h - mean) / s) - F((x - h - mean) / s)), with
    h = 1 / (L - 1) half the distance of two levels (PixelCNN++, arXiv 1701.05517, eq. 2; Ho et al. 2020, eq. 13).

    Args:
        sample (`torch.Tensor`): Pixels x in [-1, 1], on the levels 2 k / (L - 1) - 1.
        mean (`torch.Tensor`): Centre of the distribution, of any size.
        log_scale (`torch.Tensor`): Logarithm of its scale s.
        num_levels (`int`): Number L of levels.
        log_cdf (`Callable`): Logarithm of the cumulative distribution F at centre 0 and scale 1.

    Returns:
        `torch.Tensor`: In nats, of the shape that the arguments broadcast to. Exact in the tails too.
    """
    half = 1 / (num_levels - 1)
    inverse_scale = torch.exp(-log_scale)
    upper = ((sample + half - mean) * inverse_scale).masked_fill(sample > 1 - half, math.inf)
    lower = ((sample - half - mean) * inverse_scale).masked_fill(sample < half - 1, -math.inf)
    # F(u) - F(l) = F(-l) - F(-u): taken in the lower tail, where neither is near 1 and the logarithms are exact
    flipped = upper + lower > 0
    upper, lower = torch.where(flipped, -lower, upper), torch.where(flipped, -upper, lower)
    log_upper = log_cdf(upper)
    return log_upper + torch.log(-torch.expm1(log_cdf(lower) - log_upper))


class ResidualBlock(nn.Module):
    """
    `x + conv2(act(conv1(act(x))))`, which begins as the identity. There is no norm: none is needed at this depth
    (arXiv 2011.10650), and an image's bound must not depend on its batch.

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
        sample (`torch.Tensor` of shape `(B, C, H, W)`): The reconstructions, about [-1, 1].
        reconstruction_loss (`torch.Tensor` of shape `(B,)`): -log p(x | z) of each image, in nats, for one draw of z.
        kl (`torch.Tensor` of shape `(B,)`): KL(q(z | x) || N(0, I)) of each image, in nats.
    """

    sample: torch.Tensor
    reconstruction_loss: torch.Tensor = None  # only one field may lack a default: accelerate rebuilds what it casts
    kl: torch.Tensor = None


class TinyVAEModel(ModelMixin, ConfigMixin):
    r"""
    A convolutional variational autoencoder with a latent vector z of prior N(0, I).

    Each level of the encoder halves the image and has residual blocks; the decoder is its mirror.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int`, *optional*, defaults to 32):
            Height and width of the images, a multiple of `2 ** len(block_out_channels)`.
        in_channels (`int`, *optional*, defaults to 3): Channels `C` of the images.
        latent_dim (`int`, *optional*, defaults to 64): Size of z.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 256)`): Width of each level, finest first.
        layers_per_block (`int`, *optional*, defaults to 1): Residual blocks of a level.
        reconstruction (`str`, *optional*, defaults to `"logistic"`):
            What p(x | z) is around the decoder's output, of which `reconstruction_loss` is the negative logarithm:
            `"logistic"` or `"gaussian"`, discretised to the levels, with one scale learned for each channel (as in
            arXiv 1606.04934; why the scale is learned: arXiv 2006.13202); `"bernoulli"`, the cross-entropy; or `"mse"`,
            half the squared error of pixels in [-1, 1].
        num_levels (`int`, *optional*, defaults to 256):
            Levels of a pixel, to which images are rounded. With 2 they are binary, and `"bernoulli"` is a probability
            of them. On grey ones it is none, and nor is `"mse"`: neither sums to 1 over the levels.

    Raises:
        ValueError: If an option is unknown or a size is not possible; nothing has been allocated then.

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
        sample_size: int = 32,
        in_channels: int = 3,
        latent_dim: int = 64,
        block_out_channels: Sequence[int] = (64, 128, 256),
        layers_per_block: int = 1,
        reconstruction: str = "logistic",
        num_levels: int = 256,
    ):
        super().__init__()
        # JSON has lists where Python has tuples: the config is the same after a save and a load
        self.register_to_config(block_out_channels=tuple(block_out_channels))
        _check_config(self.config)
        self.gradient_checkpointing = False
        widths = [in_channels, *block_out_channels]
        smallest = (widths[-1], *[sample_size // 2 ** len(block_out_channels)] * 2)  # (C, H, W)

        encoder, decoder = [], []
        for wider, width in zip(widths[1:], widths, strict=False):
            encoder += [nn.Conv2d(width, wider, 4, stride=2, padding=1)]
            encoder += [ResidualBlock(wider) for _ in range(layers_per_block)]
            decoder += [nn.ConvTranspose2d(wider, width, 4, stride=2, padding=1)]
            decoder += [ResidualBlock(wider) for _ in range(layers_per_block)]
        features = math.prod(smallest)
        self.encoder = nn.Sequential(*encoder, nn.SiLU(), nn.Flatten(), nn.Linear(features, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, features), nn.Unflatten(1, smallest), *reversed(decoder))
        if reconstruction in LOG_CDFS:
            # about what a small network's errors come to, from where it is learned
            self.log_scale = nn.Parameter(torch.full((in_channels, 1, 1), -2.0))

    @property
    def has_likelihood(self) -> bool:
        """Whether p(x | z) is a probability of the images' levels, so that the bound is one on the likelihood."""
        return self.config.reconstruction in LOG_CDFS or (
            self.config.reconstruction == "bernoulli" and self.config.num_levels == 2
        )

    @apply_forward_hook
    def encode(self, sample: torch.Tensor) -> Normal:
        """
        The posterior q(z | x).

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1]; they are rounded to the levels.

        Returns:
            `torch.distributions.Normal`: Of shape `(B, latent_dim)`, in float32 at least.

        Raises:
            ValueError: If the images are not of the network's size.
        """
        size = self.config.sample_size
        if sample.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}: this network takes (batch, {self.config.in_channels}, {size}, "
                f"{size})."
            )
        x = self._run(self.encoder, self._round(sample).to(self.dtype))
        mean, log_variance = _at_least_float32(x).chunk(2, dim=1)
        return Normal(mean, torch.exp(0.5 * log_variance.clamp(-30, 20)), validate_args=False)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        The images that latents stand for: the centre of p(x | z), in which the pixels have no noise.

        Args:
            latents (`torch.Tensor` of shape `(B, latent_dim)`): z.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: Images, about [-1, 1], in float32 at least.

        Raises:
            ValueError: If the latents are not of the network's size.
        """
        return self._to_images(self._decode(latents))

    def forward(
        self, sample: torch.Tensor, noise: torch.Tensor | None = None, return_dict: bool = True
    ) -> TinyVAEOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The two terms of the evidence lower bound (arXiv 1312.6114, eq. 3), with one draw of z for each image.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1]; they are rounded to the levels.
            noise (`torch.Tensor` of shape `(B, latent_dim)`, *optional*):
                The standard normal numbers ε of z = μ + σ ε; drawn where they are not given.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.

        Returns:
            [`TinyVAEOutput`] or `tuple`: The reconstructions and both terms.

        Raises:
            ValueError: If images or noise are not of the network's size.
        """
        posterior = self.encode(sample)
        noise = torch.randn_like(posterior.mean) if noise is None else noise
        if noise.shape != posterior.mean.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}: for these images it must be {tuple(posterior.mean.shape)}."
            )
        output = self._decode(posterior.mean + posterior.stddev * noise)
        prior = Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean), validate_args=False)
        kl = kl_divergence(posterior, prior).sum(1)
        loss = self._pixel_losses(output, self._round(sample).to(output.dtype)).flatten(1).sum(1)
        output = TinyVAEOutput(sample=self._to_images(output), reconstruction_loss=loss, kl=kl)
        return output if return_dict else output.to_tuple()

    def _round(self, sample: torch.Tensor) -> torch.Tensor:
        """Images on the levels that they have: those in 8 bits stay as they are with 256 of them."""
        steps = self.config.num_levels - 1
        return (_at_least_float32(sample).clamp(-1, 1) / 2 + 0.5).mul(steps).round() / steps * 2 - 1

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, latent_dim) -> (B, C, H, W): logits for Bernoulli pixels, else their centres"""
        if latents.shape[1:] != (self.config.latent_dim,):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: this network takes (batch, {self.config.latent_dim})."
            )
        return _at_least_float32(self._run(self.decoder, latents.to(self.dtype)))

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
        """-log p(x | z) of each pixel, (B, C, H, W), in nats; up to a constant for `"mse"`"""
        reconstruction = self.config.reconstruction
        if reconstruction == "mse":
            return 0.5 * (sample - output).square()
        if reconstruction == "bernoulli":
            return F.binary_cross_entropy_with_logits(output, sample / 2 + 0.5, reduction="none")
        log_scale = self.log_scale.to(output.dtype).clamp(min=MIN_LOG_SCALE)
        return -discretized_log_prob(sample, output, log_scale, self.config.num_levels, LOG_CDFS[reconstruction])


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
