"""
A U-Net for small images (8x8 to 64x64) that is fast on CPUs as well as on GPUs.

It follows Ho et al. 2020 (arXiv 2006.11239) and diffusers' `UNet2DModel`: residual blocks with a time embedding,
optional attention, and skip connections.

Four choices make it fast on a CPU. Convolutions run channels-last. Each group of a group norm has a multiple of 16
channels, the width of the vector path of torch's kernel. Attention heads have 64 features, and batched matrix products
compute their gradient two to five times faster than torch does. Additions are in place where autograd allows it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .layers_tiny import (
    ACTIVATIONS,
    ClassEmbedding,
    ConditionEmbedding,
    TimeEmbedding,
    as_sample_size,
    check_choice,
    check_dropout,
    check_levels,
    check_parameters,
    check_shape,
    check_sizes,
    check_x_prediction,
    embed_augmentation,
    embed_classes,
    embed_conditions,
    self_attention,
    velocity_of_x0,
)


CHOICES = {
    "attention": ("none", "linear", "full"),
    "mid_attention": ("none", "linear", "full"),
    "time_embedding": ("sinusoidal", "fourier", "learned"),
    "act_fn": tuple(ACTIVATIONS),
    "downsample": ("conv", "maxpool"),
    "upsample": ("nearest", "bilinear", "transposed"),
    "class_conditioning": ("add", "scale"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "patch_size": (1, 2, 4),
}

_WEIGHT_STANDARDIZED = {
    "block_out_channels": (128, 256, 512, 768),
    "norm_num_groups": 8,
    "attention": "linear",
    "mid_attention": "full",
    "weight_standardization": True,
    "act_fn": "gelu",
}
_SELF_ATTENTION = {
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "attention": "full",
    "mid_attention": "none",
    "attention_head_dim": 512,  # one head
    "time_embedding_dim": 256,
    "act_fn": "gelu",
    "downsample": "maxpool",
    "upsample": "bilinear",
}
_PLAIN = {
    "sample_size": 64,
    "block_out_channels": (64, 128, 256, 512),
    "layers_per_block": 1,
    "attention": "none",
    "mid_attention": "none",
}

# Networks like those that student reports trained. Where a report states the number of parameters, the widths are
# chosen to match it within 2%. `TinyUNet2DModel(**PRESETS["self-attention-3-levels"])` builds one.
PRESETS = {
    "weight-standardized-32": {**_WEIGHT_STANDARDIZED, "sample_size": 32},  # 171.39 M
    "weight-standardized-64": {**_WEIGHT_STANDARDIZED, "sample_size": 64},  # 171.39 M
    "self-attention-3-levels": {**_SELF_ATTENTION, "block_out_channels": (208, 240, 336)},  # 23.33 M
    "self-attention-2-levels": {**_SELF_ATTENTION, "block_out_channels": (208, 240)},
    "self-attention-2-levels-half": {**_SELF_ATTENTION, "block_out_channels": (104, 120)},  # 3.06 M
    "plain-128": {**_PLAIN, "time_embedding_dim": 128},
    "plain-256": {**_PLAIN, "time_embedding_dim": 256},
    "plain-512": {**_PLAIN, "time_embedding_dim": 512},
}


def _resolve_config(config: dict) -> tuple[dict, Sequence[str]]:
    """Checks a config before anything is allocated. Returns resolved entries and each level's kind of attention."""
    widths, attention = tuple(config["block_out_channels"]), config["attention"]
    if attention is None:
        attention = ["full" if level == 1 else "none" for level in range(len(widths))]
    attention = attention if isinstance(attention, str) else tuple(attention)  # tuples, as JSON turns them into lists
    kinds = (attention,) * len(widths) if isinstance(attention, str) else attention
    size = as_sample_size(config["sample_size"])
    resolved = {"sample_size": size, "block_out_channels": widths, "attention": attention}
    _check_options({**config, **resolved}, kinds)

    groups, head_dim = config["norm_num_groups"], config["attention_head_dim"]
    if groups is None:
        groups = next(n for n in (4, 3, 2, 1) if not any(width % n for width in widths))
    for width in widths:
        if width % groups:
            raise ValueError(
                f"norm_num_groups {groups} does not divide the width {width} of block_out_channels {widths}: it must "
                f"divide each, as {math.gcd(*widths)} does."
            )

    levels = zip((*widths, widths[-1]), (*kinds, config["mid_attention"]), strict=True)
    attended = [width for width, kind in levels if kind != "none"]
    if head_dim is None:
        head_dim = next(n for n in range(64, 0, -1) if not any(width % min(width, n) for width in attended))
    for width in attended:
        if width % min(width, head_dim):
            raise ValueError(
                f"attention_head_dim {head_dim} does not divide the width {width} of a level with attention: it must "
                f"divide it or be larger, as {math.gcd(width, head_dim)} does."
            )
    return {**resolved, "norm_num_groups": groups, "attention_head_dim": head_dim}, kinds


def _check_options(config: dict, kinds: Sequence[str]) -> None:
    """Raises a ValueError for an unknown name, a size outside its limits, or levels that do not fit the images."""
    widths, patch_size = config["block_out_channels"], config["patch_size"]
    if len(kinds) != len(widths):
        raise ValueError(
            f"attention has {len(kinds)} entries for {len(widths)} levels: give one for each, or a string for all."
        )
    for name, allowed in CHOICES.items():
        for value in kinds if name == "attention" else (config[name],):
            check_choice(name, value, allowed)
    check_sizes(config)
    check_dropout(config["dropout"])
    check_x_prediction(config)
    eps = config["weight_standardization_eps"]
    if not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise ValueError(f"weight_standardization_eps {eps!r} is not possible: it must be a number in (0, 1).")
    advice = f"a smaller patch_size than {patch_size}, " if patch_size > 1 else ""
    check_levels(config, patch_size * 2 ** (len(widths) - 1), advice)
    # nearly all are in 3x3 convolutions: two in each block, the first of which is twice as wide in the decoder
    parameters = sum(9 * width**2 * (5 * config["layers_per_block"] + 3) for width in widths)
    check_parameters(parameters, config, ("block_out_channels", "layers_per_block"), "Make it narrower.")


class GroupNormAct(nn.GroupNorm):
    """
    Group normalization (arXiv 1803.08494) followed by an activation. Statistics are computed in float32 or wider.

    Args:
        num_groups, num_channels (`int`): Number of groups, and of channels `C`, a multiple of it.
        act_fn (`str`, *optional*): `"silu"`, `"gelu"`, or None for no activation.
    """

    def __init__(self, num_groups: int, num_channels: int, act_fn: str | None = None):
        super().__init__(num_groups, num_channels)
        self.act = ACTIVATIONS[act_fn]() if act_fn else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        # torch's channels-last CPU kernel for 16-bit dtypes works on one channel at a time, two to five times slower
        # than in float32, unless each group fills whole vectors
        if x.device.type == "cpu" and x.element_size() == 2 and self.num_channels // self.num_groups % 16:
            h = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
            return self.act(h).to(x.dtype)
        return self.act(super().forward(x))


class StandardizedConv2d(nn.Conv2d):
    """
    Convolution with weight standardization: the weights of each output channel have mean 0 and variance 1 / fan_in
    (arXiv 1903.10520), times a learned gain (arXiv 2101.08692), which allows the convolution to start at zero.

    Args:
        eps (`float`, defaults to 1e-10): Is added to the variance of the weights, which starts at
            1 / (3 fan_in): it must be far below.
    """

    def __init__(self, *args: Any, eps: float = 1e-10, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)"""
        weight = self.weight.flatten(1)
        weight = F.layer_norm(weight.float(), weight.shape[1:], eps=self.eps) / math.sqrt(weight.shape[1])
        weight = (self.gain[:, None] * weight).view_as(self.weight)
        return self._conv_forward(x, weight.to(self.weight.dtype), self.bias)


class ResidualBlock(nn.Module):
    """
    Residual block with a time embedding and, where the class conditioning is `"scale"`, a class embedding.

    It computes `x + conv2(act(norm2(c * conv1(act(norm1(x))) + t)))`, with `t` from the time and `c` from the class (1
    without it). With scale and shift it computes `x + conv2(act(c * (1 + s) * norm2(conv1(act(norm1(x)))) + t))`, with
    `s` and `t` from the time. It starts as the identity, or as a 1x1 convolution where the width changes.

    Args:
        in_channels, out_channels (`int`): Input and output channels.
        config (`dict`): Config of the [`TinyUNet2DModel`], with a number `D` for `time_embedding_dim`.
    """

    def __init__(self, in_channels: int, out_channels: int, config: dict):
        super().__init__()
        D, groups, act_fn = config["time_embedding_dim"], config["norm_num_groups"], config["act_fn"]
        scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
        class_scale = config["num_class_embeds"] is not None and config["class_conditioning"] == "scale"
        standardized = config["weight_standardization"]
        conv = partial(StandardizedConv2d, eps=config["weight_standardization_eps"]) if standardized else nn.Conv2d

        self.norm1 = GroupNormAct(groups, in_channels, act_fn)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(D, out_channels * (2 if scale_shift else 1))
        self.class_proj = nn.Linear(D, out_channels) if class_scale else None
        self.norm2 = GroupNormAct(groups, out_channels, None if scale_shift else act_fn)
        self.act = ACTIVATIONS[act_fn]() if scale_shift else None
        self.dropout = nn.Dropout(config["dropout"])
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.skip_rescale = config["skip_rescale"]

        nn.init.zeros_(self.conv2.gain if standardized else self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        if class_scale:
            nn.init.ones_(self.class_proj.bias)

    def forward(self, x: torch.Tensor, temb: torch.Tensor, cemb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C_in, H, W), (B, D), (B, D) -> (B, C_out, H, W)"""
        h = self.conv1(self.norm1(x))
        t = self.time_proj(temb)[:, :, None, None]  # (B, C_out, 1, 1), or (B, 2 C_out, 1, 1) for scale and shift
        c = None if self.class_proj is None else self.class_proj(cemb)[:, :, None, None]
        if self.act is not None:
            s, t = t.chunk(2, dim=1)
            s = 1 + s if c is None else c * (1 + s)
            h = self.act(torch.addcmul(t, s, self.norm2(h)))
        else:
            # in place, as a convolution's gradient does not need its output
            h = self.norm2(h.add_(t) if c is None else torch.addcmul(t, c, h))
        h = self.conv2(self.dropout(h)).add_(self.shortcut(x))
        return h.mul_(math.sqrt(0.5)) if self.skip_rescale else h


class AttentionBlock(nn.Module):
    """
    Self-attention over the positions of the feature map, with a residual connection. It starts as the identity.

    Args:
        channels (`int`): Width `C`.
        kind (`str`):
            `"full"` (arXiv 1706.03762), or `"linear"` (arXiv 1812.01243), which takes the softmax of q over the
            features and of k over the positions, so its cost is linear in the number of positions, not quadratic.
        config (`dict`): Config of the [`TinyUNet2DModel`].
    """

    def __init__(self, channels: int, kind: str, config: dict):
        super().__init__()
        self.kind = kind
        self.head_dim = min(channels, config["attention_head_dim"])  # d
        self.norm = GroupNormAct(config["norm_num_groups"], channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.skip_rescale = config["skip_rescale"]
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view where x is channels-last
        qkv = self.to_qkv(h).view(B, H * W, 3, -1, self.head_dim)
        h = self.attend(qkv).reshape(B, H * W, C)
        h = x + self.to_out(h).view(B, H, W, C).permute(0, 3, 1, 2)
        return h.mul_(math.sqrt(0.5)) if self.skip_rescale else h

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """(B, L, 3, heads, d) -> (B, L, heads, d)"""
        if self.kind == "full":
            return self_attention(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d) each
        h = q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v)
        return h.transpose(1, 2)


class Layer(nn.Module):
    """[`ResidualBlock`] and, unless `kind` is `"none"`, an [`AttentionBlock`] after it."""

    def __init__(self, in_channels: int, out_channels: int, kind: str, config: dict):
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, config)
        self.attention = None if kind == "none" else AttentionBlock(out_channels, kind, config)

    def forward(self, x: torch.Tensor, temb: torch.Tensor, cemb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C_in, H, W), (B, D), (B, D) -> (B, C_out, H, W)"""
        x = self.residual(x, temb, cemb)
        return x if self.attention is None else self.attention(x)


class Level(nn.Module):
    """Layers of one resolution, and the module that resamples to the next resolution (None after the last)."""

    def __init__(self, layers: list[Layer], resample: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample


def _downsample(channels: int, kind: str) -> nn.Module:
    """Halves height and width with a 3x3 convolution of stride 2 or a 2x2 max pool."""
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1) if kind == "conv" else nn.MaxPool2d(2)


def _upsample(channels: int, kind: str) -> nn.Module:
    """Doubles height and width: nearest neighbor and a 3x3 convolution, bilinear, or a transposed convolution."""
    if kind == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1))
    if kind == "bilinear":
        return nn.Upsample(scale_factor=2.0, mode="bilinear")
    return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)


@dataclass
class TinyUNet2DOutput(BaseOutput):
    """
    Output of [`TinyUNet2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, out_channels, height, width)`):
            The prediction, in the dtype and the memory format of the input.
    """

    sample: torch.Tensor


class TinyUNet2DModel(ModelMixin, ConfigMixin):
    """
    A U-Net that takes noisy small images and their timesteps and returns a prediction of the same height and width.
    It is called like [`UNet2DModel`], and with the same widths, blocks and attention it has as many parameters.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 32):
            Side of square images, or height and width: multiples of `patch_size * 2 ** (len(block_out_channels) - 1)`.
            The network also takes images of other such sizes.
        in_channels (`int`, *optional*, defaults to 3): Input channels.
        out_channels (`int`, *optional*, defaults to 3): Output channels, twice `in_channels` for a learned variance.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 128)`):
            Width of each level, finest first. Each level has half the height and width of the one before.
        layers_per_block (`int`, *optional*, defaults to 2): Blocks per encoder level. Decoder levels have one more.
        norm_num_groups (`int`, *optional*):
            Groups of each group norm, a divisor of every width. Defaults to the largest such divisor up to 4. In
            bfloat16 a CPU is fastest where each group has a multiple of 16 channels.
        attention (`str` or `tuple[str]`, *optional*):
            `"none"`, `"linear"` (arXiv 1812.01243) or `"full"` self-attention after every residual block: one entry
            for each level, or a string for all. Defaults to `"full"` at the second level and `"none"` elsewhere.
        mid_attention (`str`, *optional*, defaults to `"full"`): The same, for the middle block.
        attention_head_dim (`int`, *optional*):
            Features of a head, or the width where that is smaller. Defaults to the largest number up to 64 that fits
            all widths with attention. diffusers' default of 8 is several times slower.
        dropout (`float`, *optional*, defaults to 0.0): Dropout before the second convolution of each residual block.
        patch_size (`int`, *optional*, defaults to 1):
            1, 2 or 4. The network works on patches of this size, folded into channels (pixel unshuffle): the first
            level, the most expensive one, has a quarter or a sixteenth of the positions.
        weight_standardization (`bool`, *optional*, defaults to `False`):
            Whether to standardize the weights of the residual blocks' 3x3 convolutions (arXiv 1903.10520).
        weight_standardization_eps (`float`, *optional*, defaults to 1e-10):
            Is added to the variance of these weights, about 1 / fan_in. Networks saved before it was an option have
            1e-5, which makes the outputs of wide layers smaller.
        skip_rescale (`bool`, *optional*, defaults to `False`):
            Whether to multiply each residual sum by 1 / sqrt(2) (arXiv 2011.13456).
        time_embedding (`str`, *optional*, defaults to `"sinusoidal"`):
            `"sinusoidal"` (arXiv 1706.03762), `"fourier"` (Gaussian Fourier features, arXiv 2006.10739) or `"learned"`
            (a vector for each of `num_train_timesteps`, which raises an error for any other timestep).
        time_embedding_dim (`int`, *optional*): Size of the time embedding. Defaults to four times the first width.
        act_fn (`str`, *optional*, defaults to `"silu"`): `"silu"` or `"gelu"`.
        downsample (`str`, *optional*, defaults to `"conv"`): `"conv"` (3x3, stride 2) or `"maxpool"`.
        upsample (`str`, *optional*, defaults to `"nearest"`):
            `"nearest"` (and a 3x3 convolution), `"bilinear"` or `"transposed"` (4x4 transposed convolution, stride 2).
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. The network then has `K + 1` rows, of which row `K` stands for no class.
        class_conditioning (`str`, *optional*, defaults to `"add"`):
            `"add"`: the class embedding is added to the time embedding. `"scale"`: it scales the feature map of each
            residual block, a' = c * a + t, with c from one-hot labels through linear, activation, linear. With
            `"scale_shift"` it multiplies the time's scale, a' = c * (1 + s) * norm(a) + t.
        resnet_time_scale_shift (`str`, *optional*, defaults to `"default"`):
            `"default"`: each residual block adds the embedding. `"scale_shift"`: the embedding scales and shifts the
            normalized feature map (adaptive group norm, arXiv 2105.05233).
        num_train_timesteps (`int`, *optional*, defaults to 1000):
            Timesteps `T`: of Fourier and learned embeddings, and of a flow whose network predicts the image.
        num_conditions (`int`, *optional*):
            Number `D` of conditions: standardized numbers, whose embedding is added to the time embedding.
        num_augment_labels (`int`, *optional*):
            Number `A` of labels of augmentation, a linear map of which is added to the time embedding.
        x_prediction (`bool`, *optional*, defaults to `False`):
            Whether the layers predict the image x_0, of which the output is computed: the velocity (x_t - x_0) / s of a
            rectified flow at s = t / T (arXiv 2511.13720).

    Raises:
        ValueError: If an option is unknown or a size is not possible, before anything is allocated.

    Example:

    ```py
    >>> import torch
    >>> from tiny_diffusers import TinyUNet2DModel

    >>> unet = TinyUNet2DModel(sample_size=32, num_class_embeds=10).to(memory_format=torch.channels_last)
    >>> sample = torch.randn(4, 3, 32, 32)
    >>> unet(sample, timestep=999, class_labels=torch.tensor([0, 1, 2, 10])).sample.shape
    torch.Size([4, 3, 32, 32])
    ```
    """

    memory_format = torch.channels_last  # of the feature maps

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "AttentionBlock"]
    _repeated_blocks = ["ResidualBlock", "AttentionBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64, 128, 128),
        layers_per_block: int = 2,
        norm_num_groups: int | None = None,
        attention: str | Sequence[str] | None = None,
        mid_attention: str = "full",
        attention_head_dim: int | None = None,
        dropout: float = 0.0,
        patch_size: int = 1,
        weight_standardization: bool = False,
        weight_standardization_eps: float = 1e-10,
        skip_rescale: bool = False,
        time_embedding: str = "sinusoidal",
        time_embedding_dim: int | None = None,
        act_fn: str = "silu",
        downsample: str = "conv",
        upsample: str = "nearest",
        num_class_embeds: int | None = None,
        class_conditioning: str = "add",
        resnet_time_scale_shift: str = "default",
        num_train_timesteps: int = 1000,
        num_conditions: int | None = None,
        num_augment_labels: int | None = None,
        x_prediction: bool = False,
    ):
        super().__init__()
        resolved, kinds = _resolve_config(self.config)
        self.register_to_config(**resolved)
        widths = self.config.block_out_channels
        levels = list(enumerate(zip(widths, kinds, strict=True)))
        time_embedding_dim = time_embedding_dim or 4 * widths[0]
        config = {**self.config, "time_embedding_dim": time_embedding_dim}
        self.gradient_checkpointing = False

        # embeddings
        num_features = 2 * math.ceil(widths[0] / 2)
        self.time_embed = TimeEmbedding(time_embedding, num_features, time_embedding_dim, act_fn, num_train_timesteps)
        self.class_embed = None
        if num_class_embeds is not None:
            self.class_embed = ClassEmbedding(num_class_embeds, time_embedding_dim, class_conditioning, act_fn)
        self.condition_embed = None
        if num_conditions is not None:
            self.condition_embed = ConditionEmbedding(num_conditions, time_embedding_dim, act_fn)
        self.augment_embed = None
        if num_augment_labels is not None:
            self.augment_embed = nn.Linear(num_augment_labels, time_embedding_dim, bias=False)
        self.act = ACTIVATIONS[act_fn]()
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)

        # encoder: every output is a skip connection to the decoder
        channels, skips = widths[0], [widths[0]]
        self.down = nn.ModuleList()
        for i, (width, kind) in levels:
            layers = [Layer(channels if j == 0 else width, width, kind, config) for j in range(layers_per_block)]
            last = i == len(widths) - 1
            self.down.append(Level(layers, None if last else _downsample(width, downsample)))
            skips += [width] * (layers_per_block if last else layers_per_block + 1)
            channels = width

        # middle and decoder
        self.mid = nn.ModuleList(Layer(channels, channels, kind, config) for kind in (mid_attention, "none"))
        self.up = nn.ModuleList()
        for i, (width, kind) in reversed(levels):
            layers = []
            for _ in range(layers_per_block + 1):
                layers.append(Layer(channels + skips.pop(), width, kind, config))
                channels = width
            self.up.append(Level(layers, None if i == 0 else _upsample(channels, upsample)))

        self.norm_out = GroupNormAct(self.config.norm_num_groups, channels, act_fn)
        self.conv_out = nn.Conv2d(channels, out_channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    @classmethod
    def from_config(cls, config: Mapping, return_unused_kwargs: bool = False, **kwargs: Any):
        """Builds a network by a saved config. One without `weight_standardization_eps` is older than it: 1e-5."""
        config = {"weight_standardization_eps": 1e-5, **config}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        conditions: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> TinyUNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, height, width)`): Noisy images.
            timestep (`torch.Tensor`, `float` or `int`): One for all images, or one for each: shape `(B,)`.
            class_labels (`torch.Tensor`, *optional*):
                Integers of shape `(B,)` from 0 to `num_class_embeds`, or floats of shape `(B, num_class_embeds + 1)`
                that mix the rows. None stands for no class, row `num_class_embeds`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.
            conditions (`torch.Tensor` of shape `(B, num_conditions)`, *optional*):
                Standardized numbers. A row of NaN, or None for all images, stands for no conditions: a learned vector.
            augment_labels (`torch.Tensor` of shape `(B, num_augment_labels)`, *optional*):
                What was done to the images; zeros or None for nothing.

        Returns:
            [`TinyUNet2DOutput`] or `tuple`: With `sample` of shape `(B, out_channels, height, width)`.

        Raises:
            ValueError: If a shape does not fit the network, if a label or a learned timestep is out of range (on a
                CPU), or if labels, conditions or labels of augmentation are given to a network without them.
        """
        check_shape("sample", sample, self.config.in_channels, "height", "width")
        B, _, H, W = sample.shape
        multiple = self.config.patch_size * 2 ** (len(self.down) - 1)
        if H % multiple or W % multiple:
            raise ValueError(f"sample has height {H} and width {W}: this network takes multiples of {multiple}.")
        timesteps = torch.as_tensor(timestep, device=sample.device)
        if timesteps.numel() not in (1, B):
            raise ValueError(f"timestep has shape {tuple(timesteps.shape)}: give one, or one for each of {B} images.")
        timesteps = timesteps.reshape(-1).expand(B)

        # 1. embeddings
        cemb = embed_classes(self.class_embed, class_labels, B)  # (B, D)
        temb = self.time_embed(timesteps)  # (B, D)
        if cemb is not None and self.config.class_conditioning == "add":
            temb, cemb = temb + cemb, None
        for other in (
            embed_conditions(self.condition_embed, conditions, B),
            embed_augmentation(self.augment_embed, augment_labels, B),
        ):
            temb = temb if other is None else temb + other
        temb = self.act(temb)  # once, for all blocks

        # 2. patches; channels-last is several times faster on CPUs and on GPUs in 16 bits, but unreliable on MPS
        x = F.pixel_unshuffle(sample.to(self.conv_in.weight.dtype), self.config.patch_size)
        if x.device.type != "mps":
            x = x.contiguous(memory_format=self.memory_format)

        # 3. encoder, middle and decoder
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            for layer in level.layers:
                x = self._run(layer, x, temb, cemb)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        for layer in self.mid:
            x = self._run(layer, x, temb, cemb)
        for level in self.up:
            for layer in level.layers:
                x = self._run(layer, torch.cat([x, skips.pop()], dim=1), temb, cemb)
            if level.resample is not None:
                x = level.resample(x)

        # 4. images, in the dtype and the memory format of the input
        x = F.pixel_shuffle(self.conv_out(self.norm_out(x)), self.config.patch_size)
        if self.config.x_prediction:
            x = velocity_of_x0(x, sample, timesteps, self.config.num_train_timesteps)
        channels_last = not sample.is_contiguous() and sample.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = x.to(sample.dtype).contiguous(memory_format=memory_format)
        return TinyUNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, layer: Layer, *args: torch.Tensor | None) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *args)
        return layer(*args)
