"""
A U-Net for small images (8x8 to 64x64) that is fast on a CPU as well as on a GPU.

The layout is that of Ho et al. 2020 (arXiv 2006.11239), as in diffusers' `UNet2DModel`: residual blocks that know the
time, attention where it is asked for, and skips from the way down to the way up. The file needs torch and diffusers
alone, so that it can be laid beside a checkpoint's weights.

What makes it fast on a CPU: convolutions run channels-last; a group of the norm holds a multiple of 16 channels, the
width of the vector path of torch's kernel; heads of attention have 64 features, and their gradient is computed by
batched matrix products, two to five times faster than torch's own; what may be added in place is.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.autograd.function import once_differentiable


ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU}

# the names that an option of the constructor may have
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

# the sizes that it may have, so that a config from elsewhere cannot ask for more memory than any small image needs
SIZES = {
    "sample_size": (1, 1024),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "block_out_channels": (1, 4096),
    "layers_per_block": (1, 32),
    "norm_num_groups": (1, 4096),
    "attention_head_dim": (1, 4096),
    "time_embedding_dim": (1, 16384),
    "num_class_embeds": (1, 100_000),
    "num_train_timesteps": (1, 100_000),
}
MAX_LEVELS = 8
MAX_PARAMETERS = 4e9


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

# Networks of the kinds and, where they are known, the sizes (within 2 %) that student reports trained. The widths are
# fitted to the size. `TinyUNet2DModel(**PRESETS["self-attention-3-levels"])` builds one.
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


def _check_config(config: dict) -> None:
    """Raises a ValueError for a config that cannot be built, before anything is allocated."""
    widths, attention = config["block_out_channels"], config["attention"]
    levels = len(widths)
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"block_out_channels has {levels} levels: it must have 1 to {MAX_LEVELS}.")
    if not isinstance(attention, str) and len(attention) != levels:
        raise ValueError(
            f"attention has {len(attention)} entries for {levels} levels: give one for each of block_out_channels, "
            "or a single string for all."
        )

    for name, allowed in CHOICES.items():
        given = config[name]
        for value in given if name == "attention" and isinstance(given, tuple) else (given,):
            if value not in allowed:
                near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"Unknown {name} {value!r}: it must be one of {', '.join(map(str, allowed))}.{hint}")

    for name, (low, high) in SIZES.items():
        given = config[name]
        if given is None and name in ("time_embedding_dim", "num_class_embeds"):
            continue
        for value in given if name == "block_out_channels" else (given,):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} {value!r} is not possible: it must be an integer from {low} to {high}.")
    if not isinstance(config["dropout"], (int, float)) or not 0 <= config["dropout"] < 1:
        raise ValueError(f"dropout {config['dropout']!r} is not possible: it must be a number in [0, 1).")

    # 3x3 convolutions are nearly all: two to a block on the way down, and two, the first twice as wide, on the way up
    parameters = sum(9 * width**2 * (5 * config["layers_per_block"] + 3) for width in widths)
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"block_out_channels {widths} with layers_per_block {config['layers_per_block']} makes about "
            f"{parameters:.0e} parameters: at most {MAX_PARAMETERS:.0e} are allowed. Make it narrower."
        )

    multiple = config["patch_size"] * 2 ** (levels - 1)
    if config["sample_size"] % multiple:
        raise ValueError(
            f"sample_size {config['sample_size']} is not possible with {levels} levels and patch_size "
            f"{config['patch_size']}: it must be a multiple of {multiple}. Take another size, a smaller patch_size, or "
            "fewer levels in block_out_channels."
        )
    for width in widths:
        if width % config["norm_num_groups"]:
            raise ValueError(
                f"norm_num_groups {config['norm_num_groups']} does not divide the width {width} of "
                f"block_out_channels {widths}: it must divide each, as {math.gcd(*widths)} does."
            )
    kinds = (attention,) * levels if isinstance(attention, str) else attention
    for width, kind in [*zip(widths, kinds, strict=True), (widths[-1], config["mid_attention"])]:
        if kind != "none" and width % min(width, config["attention_head_dim"]):
            raise ValueError(
                f"attention_head_dim {config['attention_head_dim']} does not divide the width {width} of a level with "
                f"attention: it must divide it or be larger, as {math.gcd(width, config['attention_head_dim'])} does."
            )


class GroupNormAct(nn.GroupNorm):
    """
    Group normalisation (arXiv 1803.08494), and an activation after it. Statistics are in float32 at least.

    Args:
        num_groups (`int`): Number of groups, which divides `num_channels`.
        num_channels (`int`): Channels `C` of the feature map.
        act_fn (`str`, *optional*): `"silu"`, `"gelu"`, or None for no activation.
    """

    compiles = True  # as part of a block that is compiled

    def __init__(self, num_groups: int, num_channels: int, act_fn: str | None = None):
        super().__init__(num_groups, num_channels)
        self.act = ACTIVATIONS[act_fn]() if act_fn else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        return self._normalize(x) if self.compiles else self._normalize_uncompiled(x)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        # in 16 bits and channels-last, torch's CPU kernel works a channel at a time, two to five times slower than in
        # float32, unless each group fills whole vectors
        if x.device.type == "cpu" and x.element_size() == 2 and self.num_channels // self.num_groups % 16:
            h = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
            return self.act(h).to(x.dtype)
        return self.act(super().forward(x))

    _normalize_uncompiled = torch.compiler.disable(_normalize)


class StandardizedConv2d(nn.Conv2d):
    """
    Convolution whose weights have mean 0 and variance 1 / fan_in for each output channel (arXiv 1903.10520), times a
    learned gain (arXiv 2101.08692), so that it may also begin as zero.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)"""
        weight = self.weight.flatten(1)
        weight = F.layer_norm(weight.float(), weight.shape[1:]) / math.sqrt(weight.shape[1])
        weight = (self.gain[:, None] * weight).view_as(self.weight)
        return self._conv_forward(x, weight.to(self.weight.dtype), self.bias)


class ResidualBlock(nn.Module):
    """
    `x + conv2(act(norm2(c * conv1(act(norm1(x))) + t)))`, with `t` from the time and, where the class scales, `c` from
    the class (else 1). With scale and shift it is `x + conv2(act(c * (1 + s) * norm2(conv1(act(norm1(x)))) + t))`, with
    `s` and `t` from the time. It begins as the identity, or as the 1x1 convolution in its place where the width changes.

    Args:
        in_channels, out_channels (`int`): Widths before and after.
        time_embedding_dim (`int`): Size `D` of the embeddings.
        norm_num_groups, act_fn, dropout, weight_standardization, skip_rescale: As in [`TinyUNet2DModel`].
        class_scale (`bool`): Whether the class scales the feature map.
        scale_shift (`bool`): Whether the time scales and shifts the normalised feature map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_embedding_dim: int,
        norm_num_groups: int,
        act_fn: str,
        dropout: float,
        weight_standardization: bool,
        skip_rescale: bool,
        class_scale: bool,
        scale_shift: bool,
    ):
        super().__init__()
        conv = StandardizedConv2d if weight_standardization else nn.Conv2d
        self.norm1 = GroupNormAct(norm_num_groups, in_channels, act_fn)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_embedding_dim, out_channels * (2 if scale_shift else 1))
        self.class_proj = nn.Linear(time_embedding_dim, out_channels) if class_scale else None
        self.norm2 = GroupNormAct(norm_num_groups, out_channels, None if scale_shift else act_fn)
        self.act = ACTIVATIONS[act_fn]() if scale_shift else None
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.skip_rescale = skip_rescale

        nn.init.zeros_(self.conv2.gain if weight_standardization else self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        if class_scale:
            nn.init.ones_(self.class_proj.bias)

    def forward(self, x: torch.Tensor, temb: torch.Tensor, cemb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C_in, H, W), (B, D), (B, D) -> (B, C_out, H, W)"""
        h = self.conv1(self.norm1(x))
        t = self.time_proj(temb)[:, :, None, None]  # (B, C_out, 1, 1), or twice as many channels
        c = None if self.class_proj is None else self.class_proj(cemb)[:, :, None, None]
        if self.act is not None:
            s, t = t.chunk(2, dim=1)
            s = 1 + s if c is None else c * (1 + s)
            h = self.act(torch.addcmul(t, s, self.norm2(h)))
        else:
            # in place: a convolution's gradient does not need its output
            h = self.norm2(h.add_(t) if c is None else torch.addcmul(t, c, h))
        h = self.conv2(self.dropout(h)).add_(self.shortcut(x))
        return h.mul_(math.sqrt(0.5)) if self.skip_rescale else h


class _CPUAttention(torch.autograd.Function):
    """
    `softmax(q k^T / sqrt(d)) v`, whose gradient on a CPU takes a fifth to a half of the time that
    `scaled_dot_product_attention`'s does.

    The gradient computes the probabilities again, a few images at a time so that they stay in the cache.
    """

    ELEMENTS_AT_ONCE = 2**20  # of the probabilities

    @staticmethod
    def forward(ctx, qkv: torch.Tensor) -> torch.Tensor:
        """(B, L, 3, heads, d) -> (B, L, heads, d)"""
        ctx.save_for_backward(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (qkv,) = ctx.saved_tensors
        B, L, _, heads, d = qkv.shape
        images = max(1, _CPUAttention.ELEMENTS_AT_ONCE // (heads * L * L))
        grads = torch.empty_like(qkv)
        for qkv_part, grad_part, out in zip(*(t.split(images) for t in (qkv, grad, grads)), strict=True):
            q, k, v = qkv_part.permute(2, 0, 3, 1, 4).reshape(3, -1, L, d)  # (images * heads, L, d) each
            do = grad_part.transpose(1, 2).reshape(-1, L, d)
            q = q * d**-0.5
            p = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)  # (images * heads, L, L)
            dp = torch.bmm(do, v.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dv = torch.bmm(p.transpose(1, 2), do)
            dq = torch.bmm(ds, k) * d**-0.5
            dk = torch.bmm(ds.transpose(1, 2), q)
            for i, g in enumerate((dq, dk, dv)):
                out[:, :, i] = g.view(-1, heads, L, d).transpose(1, 2)
        return grads


class AttentionBlock(nn.Module):
    """
    Self-attention over the places of the feature map, with a skip around it. It begins as the identity.

    Args:
        channels (`int`): Width `C`.
        kind (`str`): `"full"` (arXiv 1706.03762) or `"linear"` (arXiv 1812.01243: softmax of q over the features and
            of k over the places, so that the cost grows with the number of places and not with its square).
        head_dim (`int`): Features `d` of a head, which divides `channels`.
        norm_num_groups, skip_rescale: As in [`TinyUNet2DModel`].
    """

    compiles = True  # as a block of its own

    def __init__(self, channels: int, kind: str, head_dim: int, norm_num_groups: int, skip_rescale: bool):
        super().__init__()
        self.kind = kind
        self.head_dim = head_dim
        self.norm = GroupNormAct(norm_num_groups, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.skip_rescale = skip_rescale
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        return self._attention(x) if self.compiles else self._attention_uncompiled(x)

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view where x is channels-last
        qkv = self.to_qkv(h).view(B, H * W, 3, -1, self.head_dim)
        h = self.attend(qkv).reshape(B, H * W, C)
        h = x + self.to_out(h).view(B, H, W, C).permute(0, 3, 1, 2)
        return h.mul_(math.sqrt(0.5)) if self.skip_rescale else h

    _attention_uncompiled = torch.compiler.disable(_attention)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """(B, L, 3, heads, d) -> (B, L, heads, d)"""
        if self.kind == "full" and qkv.device.type == "cpu" and not torch.compiler.is_compiling():
            return _CPUAttention.apply(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d) each
        if self.kind == "full":
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            h = q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v)
        return h.transpose(1, 2)


class Layer(nn.Module):
    """A [`ResidualBlock`], and where there is attention an [`AttentionBlock`] after it."""

    def __init__(self, residual: ResidualBlock, attention: AttentionBlock | None):
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, x: torch.Tensor, temb: torch.Tensor, cemb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C_in, H, W), (B, D), (B, D) -> (B, C_out, H, W)"""
        x = self.residual(x, temb, cemb)
        return x if self.attention is None else self.attention(x)


class Level(nn.Module):
    """The layers of one resolution, and after them the way to the next one, or None at the last."""

    def __init__(self, layers: list[Layer], resample: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample


def _downsample(channels: int, kind: str) -> nn.Module:
    """Halves height and width: a 3x3 convolution of stride 2, or the largest of each 2x2 places."""
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1) if kind == "conv" else nn.MaxPool2d(2)


def _upsample(channels: int, kind: str) -> nn.Module:
    """Doubles height and width: by repetition and a 3x3 convolution, interpolation, or a transposed convolution."""
    if kind == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1))
    if kind == "bilinear":
        return nn.Upsample(scale_factor=2.0, mode="bilinear")
    return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)


class TimeEmbedding(nn.Module):
    """
    Features of the timestep, through linear, activation, linear.

    Args:
        kind (`str`): `"sinusoidal"` (arXiv 1706.03762), `"fourier"` (Gaussian Fourier features of t / T, arXiv
            2006.10739), or `"learned"` (a vector for each timestep, which is rounded).
        num_features (`int`): Features of the timestep, even.
        embedding_dim (`int`): Size `D` of the embedding.
        act_fn (`str`): `"silu"` or `"gelu"`.
        num_train_timesteps (`int`): `T`.
    """

    FOURIER_SCALE = 16.0  # standard deviation of the frequencies, as in arXiv 2011.13456

    def __init__(self, kind: str, num_features: int, embedding_dim: int, act_fn: str, num_train_timesteps: int):
        super().__init__()
        self.kind = kind
        self.num_features = num_features
        self.num_train_timesteps = num_train_timesteps
        self.table = nn.Embedding(num_train_timesteps, num_features) if kind == "learned" else None
        self.linear1 = nn.Linear(num_features, embedding_dim)
        self.act = ACTIVATIONS[act_fn]()
        self.linear2 = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, D)"""
        if self.table is not None:
            index = timesteps.round().long()
            _check_range("timestep", index, self.num_train_timesteps)
            features = self.table(index)
        else:
            features = self.features(timesteps.float()).to(self.linear1.weight.dtype)
        return self.linear2(self.act(self.linear1(features)))

    def features(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Cosines and sines, in float32 whatever the weights are in: (B,) -> (B, num_features)"""
        half = self.num_features // 2
        i = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        if self.kind == "sinusoidal":
            frequencies = torch.exp(-math.log(10000) / half * i)
        else:
            # the quantiles of |N(0, scale^2)| in place of draws from it: nothing to store, or to lose in a cast
            quantiles = math.sqrt(2) * torch.erfinv((i + 0.5) / half)
            frequencies = 2 * math.pi * self.FOURIER_SCALE * quantiles / self.num_train_timesteps
        angles = timesteps[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ClassEmbedding(nn.Module):
    """
    Embedding of K classes and, in row K, of no class.

    Args:
        num_class_embeds (`int`): `K`.
        embedding_dim (`int`): Size `D` of the embedding.
        conditioning (`str`): `"add"` (a table of K + 1 rows) or `"scale"` (one-hot through linear, activation,
            linear).
        act_fn (`str`): `"silu"` or `"gelu"`.
    """

    def __init__(self, num_class_embeds: int, embedding_dim: int, conditioning: str, act_fn: str):
        super().__init__()
        self.num_class_embeds = num_class_embeds
        self.table = nn.Linear(num_class_embeds + 1, embedding_dim, bias=conditioning == "scale")
        self.mlp = nn.Identity()
        if conditioning == "scale":
            self.mlp = nn.Sequential(ACTIVATIONS[act_fn](), nn.Linear(embedding_dim, embedding_dim))
        else:
            nn.init.normal_(self.table.weight)

    def forward(self, class_labels: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """Labels (B,), mixing weights (B, K + 1), or None for no class -> (B, D)"""
        weight = self.table.weight
        K = self.num_class_embeds
        if class_labels is None:
            class_labels = torch.full((batch_size,), K, device=weight.device)
        mixes = class_labels.is_floating_point()
        if class_labels.shape != ((batch_size, K + 1) if mixes else (batch_size,)):
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)} and {class_labels.dtype}: for {batch_size} "
                f"images of {K} classes it must be integers of shape ({batch_size},), or floats of shape "
                f"({batch_size}, {K + 1}) that mix the classes, the last being no class."
            )
        if not mixes:
            _check_range("class label", class_labels, K + 1)
            class_labels = F.one_hot(class_labels.long(), K + 1)
        return self.mlp(self.table(class_labels.to(weight.dtype)))


def _check_range(name: str, index: torch.Tensor, size: int) -> None:
    """Raises a ValueError if `index` leaves [0, size): on a CPU alone, as elsewhere the answer must be waited for."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return
    low, high = index.aminmax()
    if low < 0 or high >= size:
        wrong = int(low if low < 0 else high)
        raise ValueError(f"{name} {wrong} is not known to this network: it must be from 0 to {size - 1}.")


@dataclass
class TinyUNet2DOutput(BaseOutput):
    """
    Output of [`TinyUNet2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, out_channels, height, width)`):
            The prediction, in the type and the memory format of the input.
    """

    sample: torch.Tensor


class TinyUNet2DModel(ModelMixin, ConfigMixin):
    """
    A U-Net that takes noisy small images and their timesteps and returns a prediction of the same height and width.
    It is called as [`UNet2DModel`] is, and of the same widths, blocks and attention it has as many parameters.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int`, *optional*, defaults to 32):
            Height and width of the images. A multiple of `patch_size * 2 ** (len(block_out_channels) - 1)`. Images of
            other such sizes can be given too.
        in_channels (`int`, *optional*, defaults to 3): Channels of the input.
        out_channels (`int`, *optional*, defaults to 3):
            Channels of the output; twice `in_channels` for a learned variance.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 128)`):
            Width of each level, finest first. Each level has half the height and width of the one before.
        layers_per_block (`int`, *optional*, defaults to 2):
            Residual blocks of a level on the way down; there is one more on the way up.
        norm_num_groups (`int`, *optional*, defaults to 4):
            Groups of the group norm, which divides every width. A CPU is fastest in bfloat16 where a group has a
            multiple of 16 channels.
        attention (`str` or `tuple[str]`, *optional*, defaults to `("none", "full", "none")`):
            `"none"`, `"linear"` (arXiv 1812.01243) or `"full"` self-attention after every residual block of a level:
            one for each level, or one for all.
        mid_attention (`str`, *optional*, defaults to `"full"`): The same, for the middle.
        attention_head_dim (`int`, *optional*, defaults to 64):
            Features of a head, or the width where that is smaller. 8, diffusers' default, is several times slower.
        dropout (`float`, *optional*, defaults to 0.0): Dropout before the second convolution of a residual block.
        patch_size (`int`, *optional*, defaults to 1):
            1, 2 or 4. The network works on patches of this size, folded into channels (pixel unshuffle), so that its
            costly first level has a quarter or a sixteenth of the places.
        weight_standardization (`bool`, *optional*, defaults to `False`):
            Whether the residual blocks' 3x3 convolutions standardise their weights (arXiv 1903.10520).
        skip_rescale (`bool`, *optional*, defaults to `False`):
            Whether the sum of a block and its skip is multiplied by 1 / sqrt(2) (arXiv 2011.13456).
        time_embedding (`str`, *optional*, defaults to `"sinusoidal"`):
            `"sinusoidal"` (arXiv 1706.03762), `"fourier"` (Gaussian Fourier features, arXiv 2006.10739) or `"learned"`
            (a vector for each of `num_train_timesteps`, so that other timesteps are refused).
        time_embedding_dim (`int`, *optional*): Size of the time embedding. Four times the first width if not given.
        act_fn (`str`, *optional*, defaults to `"silu"`): `"silu"` or `"gelu"`.
        downsample (`str`, *optional*, defaults to `"conv"`): `"conv"` (3x3, stride 2) or `"maxpool"`.
        upsample (`str`, *optional*, defaults to `"nearest"`):
            `"nearest"` (and a 3x3 convolution), `"bilinear"` or `"transposed"` (4x4 transposed convolution, stride 2).
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. The network then has `K + 1` rows, of which row `K` stands for no class.
        class_conditioning (`str`, *optional*, defaults to `"add"`):
            `"add"`: the class's embedding is added to the time's. `"scale"`: it scales each residual block's feature
            map, a' = c * a + t, with c from one-hot through two linear layers with an activation between; with
            `"scale_shift"` it multiplies the time's scale, a' = c * (1 + s) * norm(a) + t.
        resnet_time_scale_shift (`str`, *optional*, defaults to `"default"`):
            `"default"`: the embedding is added in each residual block. `"scale_shift"`: it scales and shifts what the
            block has normalised (adaptive group norm, arXiv 2105.05233).
        num_train_timesteps (`int`, *optional*, defaults to 1000):
            Number of timesteps `T`, for the Fourier and the learned time embedding.

    Raises:
        ValueError: If an option is unknown or a size is not possible; nothing has been allocated then.

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
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64, 128, 128),
        layers_per_block: int = 2,
        norm_num_groups: int = 4,
        attention: str | Sequence[str] = ("none", "full", "none"),
        mid_attention: str = "full",
        attention_head_dim: int = 64,
        dropout: float = 0.0,
        patch_size: int = 1,
        weight_standardization: bool = False,
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
    ):
        super().__init__()

        # JSON has lists where Python has tuples: the config is the same after a save and a load
        self.register_to_config(
            block_out_channels=tuple(block_out_channels),
            attention=attention if isinstance(attention, str) else tuple(attention),
        )
        _check_config(self.config)
        widths = self.config.block_out_channels
        kinds = (attention,) * len(widths) if isinstance(attention, str) else attention
        time_embedding_dim = time_embedding_dim or 4 * widths[0]
        self.class_scale = num_class_embeds is not None and class_conditioning == "scale"
        self.gradient_checkpointing = False

        def layer(in_channels: int, out_channels: int, kind: str) -> Layer:
            residual = ResidualBlock(
                in_channels,
                out_channels,
                time_embedding_dim,
                norm_num_groups,
                act_fn,
                dropout,
                weight_standardization,
                skip_rescale,
                self.class_scale,
                resnet_time_scale_shift == "scale_shift",
            )
            if kind == "none":
                return Layer(residual, None)
            head_dim = min(attention_head_dim, out_channels)
            return Layer(residual, AttentionBlock(out_channels, kind, head_dim, norm_num_groups, skip_rescale))

        # what the images are of
        num_features = 2 * math.ceil(widths[0] / 2)
        self.time_embed = TimeEmbedding(time_embedding, num_features, time_embedding_dim, act_fn, num_train_timesteps)
        self.class_embed = None
        if num_class_embeds is not None:
            self.class_embed = ClassEmbedding(num_class_embeds, time_embedding_dim, class_conditioning, act_fn)
        self.act = ACTIVATIONS[act_fn]()
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)

        # the way down: what each step leaves is kept for the way up
        channels = widths[0]
        skips = [channels]
        self.down = nn.ModuleList()
        for i, (width, kind) in enumerate(zip(widths, kinds, strict=True)):
            layers = [layer(channels if j == 0 else width, width, kind) for j in range(layers_per_block)]
            skips += [width] * layers_per_block
            channels = width
            last = i == len(widths) - 1
            self.down.append(Level(layers, None if last else _downsample(channels, downsample)))
            if not last:
                skips.append(channels)

        self.mid = nn.ModuleList([layer(channels, channels, mid_attention), layer(channels, channels, "none")])

        # the way up
        self.up = nn.ModuleList()
        for i, (width, kind) in reversed(list(enumerate(zip(widths, kinds, strict=True)))):
            layers = []
            for _ in range(layers_per_block + 1):
                layers.append(layer(channels + skips.pop(), width, kind))
                channels = width
            self.up.append(Level(layers, None if i == 0 else _upsample(channels, upsample)))

        self.norm_out = GroupNormAct(norm_num_groups, channels, act_fn)
        self.conv_out = nn.Conv2d(channels, out_channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> TinyUNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, height, width)`): Noisy images.
            timestep (`torch.Tensor`, `float` or `int`): One for all images, or one for each: shape `(B,)`.
            class_labels (`torch.Tensor`, *optional*):
                Integers of shape `(B,)` from 0 to `num_class_embeds`, or floats of shape `(B, num_class_embeds + 1)`
                that mix the rows. None stands for no class, row `num_class_embeds`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.

        Returns:
            [`TinyUNet2DOutput`] or `tuple`: With `sample` of shape `(B, out_channels, height, width)`.

        Raises:
            ValueError: If a shape does not fit the network, a label or a learned timestep is out of range (on a CPU),
                or labels are given to a network without classes.
        """
        self._check_inputs(sample, class_labels)
        B = len(sample)

        # 1. what the images are of
        timesteps = torch.as_tensor(timestep, device=sample.device)
        if timesteps.numel() not in (1, B):
            raise ValueError(
                f"timestep has shape {tuple(timesteps.shape)}: it must be one, or one for each of {B} images."
            )
        temb = self.time_embed(timesteps.reshape(-1).expand(B))  # (B, D)
        cemb = None if self.class_embed is None else self.class_embed(class_labels, B)
        if cemb is not None and not self.class_scale:
            temb, cemb = temb + cemb, None
        temb = self.act(temb)  # once, for all blocks

        # 2. patches; channels-last is several times faster on CPUs and on GPUs in 16 bits, and unreliable on MPS
        x = F.pixel_unshuffle(sample.to(self.conv_in.weight.dtype), self.config.patch_size)
        if x.device.type != "mps":
            x = x.contiguous(memory_format=self.memory_format)

        # 3. down, through the middle, and up
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

        # 4. back to images, as they came
        x = F.pixel_shuffle(self.conv_out(self.norm_out(x)), self.config.patch_size)
        memory_format = torch.contiguous_format
        if not sample.is_contiguous() and sample.is_contiguous(memory_format=torch.channels_last):
            memory_format = torch.channels_last
        x = x.to(sample.dtype).contiguous(memory_format=memory_format)
        return TinyUNet2DOutput(sample=x) if return_dict else (x,)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """
        Compiles each block in place; the arguments are those of `torch.compile`. On a CPU norms and attention are left as
        they are: torch's own kernels are faster than what the compiler makes of them.
        """
        for part in self.modules():
            if isinstance(part, (GroupNormAct, AttentionBlock)):
                part.compiles = self.device.type != "cpu"
        super().compile_repeated_blocks(*args, **kwargs)

    def _run(self, layer: Layer, *args: torch.Tensor | None) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *args)
        return layer(*args)

    def _check_inputs(self, sample: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        multiple = self.config.patch_size * 2 ** (len(self.down) - 1)
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}: this network takes "
                f"(batch, {self.config.in_channels}, height, width)."
            )
        if sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise ValueError(
                f"sample has height and width {tuple(sample.shape[2:])}: this network takes multiples of {multiple}."
            )
        if class_labels is not None and self.class_embed is None:
            raise ValueError(
                "class_labels were given to a network without classes: leave them out, or build it with "
                "num_class_embeds."
            )
