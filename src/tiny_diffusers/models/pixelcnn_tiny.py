"""
PixelCNNs and a PixelRNN for small images: p(x) is a product of one distribution for each sub-pixel, given those before it
in raster order, with channels R, G, B within a pixel.

There are four variants: a `baseline` of four convolutions that predicts intensities, the `gated` PixelCNN
(arXiv 1606.05328), PixelCNN++ (`plusplus`, arXiv 1701.05517), and the PixelRNN of row LSTMs (`row_lstm`, arXiv 1601.06759).

Channels come last everywhere, so the same code runs on an image (B, H, W, C), a row (B, W, C) and a pixel (B, C). Only
the convolutions look at neighbors, and they have a method for each of the three cases: incremental sampling needs
nothing else. Each network has a vertical part, which sees only the rows above and runs once per row, and a horizontal
part, which runs once per pixel (`gated`, `row_lstm`: once per sub-pixel, on the features of that channel).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.autograd.function import once_differentiable

from .layers_tiny import (
    ConditionEmbedding,
    as_sample_size,
    check_choice,
    check_dropout,
    check_shape,
    check_sizes,
    class_weights,
    embed_conditions,
    height_and_width,
    refuse_labels,
)


# Values of the arguments that are None, for each variant
DEFAULTS = {
    "baseline": {"hidden_channels": 210, "num_layers": 4, "dropout": 0.0},
    "gated": {"hidden_channels": 192, "num_layers": 15, "dropout": 0.0},
    "plusplus": {"hidden_channels": 160, "num_layers": 5, "dropout": 0.5},
    "row_lstm": {"hidden_channels": 252, "num_layers": 12, "dropout": 0.0},
}

# Resolutions of PixelCNN++, each with half the height and width of the one before
NUM_RESOLUTIONS = 3
# Sub-pixels whose logits the loss holds at a time, about what fits in the cache of a CPU core
_CHUNK = 4096
# Data-dependent initialization keeps the scale of an output of PixelCNN++ (of a gate: a tenth of it) whose standard
# deviation on the first images is below this. Random weights of length 1 on inputs of variance 1 give about 0.7. Far
# less means inputs that hardly vary, as in the corner of an image, where almost nothing is seen. Scaled up to a
# variance of 1, such outputs would dominate on the next images or after the next step.
_MIN_STD = 0.3


def _check_config(config: dict) -> None:
    """Raises a ValueError for a config that cannot be built, before anything is allocated."""
    variant, width, channels = config["variant"], config["hidden_channels"], config["in_channels"]
    check_choice("variant", variant, DEFAULTS)
    if not config["dilations"]:
        raise ValueError("dilations () are not possible: give one or more.")
    check_sizes(config, in_channels=(1, 16))
    if config["dropout"] is not None:
        check_dropout(config["dropout"])

    def refuse(name: str, reason: str) -> None:
        raise ValueError(f"{name} {config[name]} is not possible with variant {variant!r}: {reason}")

    divisor = _width_divisor(variant, channels)
    if width is not None and width % divisor:
        of = "in_channels" if variant != "row_lstm" else "twice in_channels"
        refuse("hidden_channels", f"it must be a multiple of {of} {channels}, as each channel has its own features.")
    if variant != "plusplus" and config["dropout"]:
        refuse("dropout", "only 'plusplus' has dropout.")
    if variant != "gated" and config["num_frequencies"]:
        refuse("num_frequencies", "only 'gated' takes frequencies as input.")
    if variant != "gated" and set(config["dilations"]) != {1}:
        refuse("dilations", "only the layers of 'gated' have them.")
    if variant == "baseline" and config["num_layers"] in (1, 2):
        refuse("num_layers", "it has two masked convolutions and one or more of 1x1, so give 3 or more.")
    for name in ("num_class_embeds", "num_conditions"):
        if variant == "baseline" and config[name] is not None:
            refuse(name, "it has no gates that they could enter. Use another variant.")


def _width_divisor(variant: str, in_channels: int) -> int:
    """Returns what `hidden_channels` must be a multiple of: each channel has as many features, and of states half as many."""
    return {"plusplus": 1, "row_lstm": 2 * in_channels}.get(variant, in_channels)


def _given_dim(config: dict) -> int:
    """Returns the size N of what the gates are given: a weight for each class row, and the embedding of the conditions."""
    classes = 0 if config["num_class_embeds"] is None else config["num_class_embeds"] + 1
    return classes + (0 if config["num_conditions"] is None else config["hidden_channels"])


# ------------------------------------------------------------------------------------------- causal convolutions


class RowCache:
    """
    State of incremental sampling: the current sub-pixel, the image so far, and the last input rows of each
    convolution.

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`): The image so far, in [0, 1].
        network (`nn.Module`): The network, whose dtype the cache has.

    Attributes:
        row (`int`), column (`int`, *optional*), group (`int`):
            The current sub-pixel. `column` is None while a whole row is computed at once.
        canvas (`torch.Tensor` of shape `(B, H + m, W + 2 m, C E)`): The network's input: E features of each value in
            [-1, 1], within a margin of zeros.
    """

    margin = 4  # upper limit of how far the first convolutions reach

    def __init__(self, sample: torch.Tensor, network: nn.Module):
        B, C, H, W = sample.shape
        m = self.margin
        self.row, self.column, self.group = 0, None, 0
        self.width = W
        self.encoding = getattr(network, "encoding", None)
        self.num_features = 1 if self.encoding is None else self.encoding.num_features  # E
        dtype = network.out.weight.dtype
        self.canvas = torch.zeros(B, H + m, W + 2 * m, C * self.num_features, dtype=dtype, device=sample.device)
        self.buffers: dict[nn.Module, torch.Tensor | tuple[torch.Tensor, ...]] = {}
        self.weights: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def write(self, values: torch.Tensor) -> None:
        """Writes x_cij in [0, 1], (B,), to the current sub-pixel."""
        x = 2 * values[:, None] - 1
        features = slice(self.group * self.num_features, (self.group + 1) * self.num_features)
        pixel = self.canvas[:, self.row + self.margin, self.column + self.margin, features]
        pixel.copy_(x if self.encoding is None else self.encoding(x))

    def select(self, context: torch.Tensor, resolution: int, groups: int) -> torch.Tensor:
        """Selects the features of the current pixel and group from those of a row: (B, W, G D) -> (B, D)"""
        D = context.shape[-1] // groups
        return context[:, self.column >> resolution, self.group * D : (self.group + 1) * D]

    def starts(self, resolution: int) -> bool:
        """Returns True if the current row or pixel is the first one of a position of this coarser resolution."""
        step = 1 << resolution
        return self.row % step == 0 and (self.column is None or self.column % step == 0)


class CausalConv2d(nn.Module):
    """
    Causal convolution of channels-last tensors: an image (B, H, W, C), or with a [`RowCache`] one row (B, W, C) or
    pixel (B, C) of it.

    Its window ends with the row of the current position, or with the row above. With a mask, the features are divided
    evenly between the groups (the image's channels), and group c sees, in raster order, what precedes its own values
    (`"A"`, for images) or also these (`"B"`, for features). In this order the visible part of a window is a prefix,
    whose length gives both the mask and the weights of incremental sampling.

    Args:
        in_channels (`int`), out_channels (`int`): Input and output features.
        kernel_size (`tuple[int, int]`): Height and width of the window.
        dilation (`int`): Distance between the window's rows and columns.
        left (`int`, *optional*): Columns of the window left of the current one. Defaults to all but the last.
        above (`bool`): Whether the window ends with the row above.
        mask (`str`, *optional*): `"A"`, `"B"`, or None for the whole window.
        groups (`int`): Groups G of the output features and, with a mask, of the input features.
        stride (`int`): 1, or 2 for the next coarser resolution.
        resolution (`int`): Resolution of the input: 0 for the image's; each next one has half the height and width.
        weight_norm (`bool`): Whether the weight is g v / |v| (arXiv 1602.07868).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int] = (1, 1),
        dilation: int = 1,
        left: int | None = None,
        above: bool = False,
        mask: str | None = None,
        groups: int = 1,
        stride: int = 1,
        resolution: int = 0,
        weight_norm: bool = False,
    ):
        super().__init__()
        kh, kw = self.kernel_size = kernel_size
        self.left = kw - 1 if left is None else left
        self.dilation = dilation
        self.above, self.groups, self.stride, self.resolution = above, groups, stride, resolution
        self.reads_canvas = above or mask == "A"
        self.is_pointwise = kernel_size == (1, 1) and groups == 1

        window = kh * kw * in_channels
        self.visible = [window] * groups  # length of the window's prefix that group c sees
        if mask is not None:
            before = ((kh - 1) * kw + self.left) * in_channels
            own = in_channels // groups
            self.visible = [before + own * (c + (mask == "B")) for c in range(groups)]

        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kh, kw))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        fan_in = max(1, sum(self.visible) // groups)
        nn.init.normal_(self.weight, std=fan_in**-0.5)
        self.gain = nn.Parameter(torch.ones(out_channels)) if weight_norm else None

        visible = None
        if min(self.visible) < window:
            rows = torch.tensor([[1.0] * n + [0.0] * (window - n) for n in self.visible])
            rows = rows.repeat_interleave(out_channels // groups, dim=0)
            # flat, as torch's data parallelism fails on a buffer of four dimensions that is channels-last
            visible = rows.view(out_channels, kh, kw, in_channels).permute(0, 3, 1, 2).reshape(out_channels, -1)
        self.register_buffer("mask", visible, persistent=False)

    @property
    def kernel(self) -> torch.Tensor:
        """`torch.Tensor`: Weight with its mask and weight norm applied, (out, in, kh, kw)."""
        weight = self.weight if self.mask is None else self.weight * self.mask.view_as(self.weight)
        if self.gain is None:
            return weight
        norm = weight.flatten(1).norm(dim=1)
        return weight * (self.gain / norm)[:, None, None, None]

    def forward(self, x: torch.Tensor | None, cache: RowCache | None = None) -> torch.Tensor | None:
        """(…, in_channels) -> (…, out_channels), or None where no position of the next coarser resolution starts"""
        if cache is None:
            return self._forward_image(x)
        if self.is_pointwise:
            return F.linear(x, *self._cached_weights(cache)[0])
        return self._forward_row(x, cache) if cache.column is None else self._forward_pixel(x, cache)

    def _forward_image(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel
        if self.kernel_size == (1, 1):
            return F.linear(x, kernel.flatten(1), self.bias)
        kh, kw = self.kernel_size
        d = self.dilation
        padding = (d * self.left, d * (kw - 1 - self.left), d * (kh - 1) + self.above, -int(self.above))
        x = F.pad(x.permute(0, 3, 1, 2), padding)  # (B, H, W, C) -> (B, C, H', W'), channels-last in memory
        return F.conv2d(x, kernel, self.bias, self.stride, dilation=d).permute(0, 2, 3, 1)

    def _forward_row(self, x: torch.Tensor | None, cache: RowCache) -> torch.Tensor | None:
        (kh, kw), d = self.kernel_size, self.dilation
        if self.reads_canvas:
            bottom = cache.row + cache.margin + (not self.above)
            start = cache.margin - self.left
            window = cache.canvas[:, bottom - kh : bottom, start : start + cache.width + kw - 1]
        else:
            window = self._cached_rows(x, cache)
            window[:, :-1] = window[:, 1:].clone()
            window[:, -1, d * self.left : d * self.left + x.shape[1]] = x
            window = window[:, ::d]
        if self.stride == 2 and not cache.starts(self.resolution + 1):
            return None
        weight, bias = self._cached_weights(cache, as_image=True)[0]
        y = F.conv2d(window.permute(0, 3, 1, 2), weight, bias, self.stride, dilation=(1, d))  # (B, out, 1, W)
        return y[:, :, 0].transpose(1, 2)

    def _forward_pixel(self, x: torch.Tensor | None, cache: RowCache) -> torch.Tensor | None:
        (kh, kw), d = self.kernel_size, self.dilation
        column, group = cache.column >> self.resolution, cache.group
        if self.reads_canvas:
            bottom, start = cache.row + cache.margin + 1, column + cache.margin - self.left
            window = cache.canvas[:, bottom - kh : bottom, start : start + kw]
        else:
            rows = self._cached_rows(x, cache)
            if kh > 1 and column == group == 0:
                rows[:, :-1] = rows[:, 1:].clone()
            D = x.shape[-1]
            rows[:, -1, d * self.left + column, group * D : (group + 1) * D] = x
            window = rows[:, ::d, column : column + d * (kw - 1) + 1 : d]
        if self.stride == 2 and not cache.starts(self.resolution + 1):
            return None
        weight, bias = self._cached_weights(cache)[group]
        return F.linear(window.flatten(1)[:, : self.visible[group]], weight, bias)

    def _cached_rows(self, x: torch.Tensor, cache: RowCache) -> torch.Tensor:
        """Returns the last rows of the input, (B, d (kh - 1) + 1, W + d (kw - 1), in_channels)."""
        if self not in cache.buffers:
            kh, kw = (self.dilation * (n - 1) + 1 for n in self.kernel_size)
            width = -(-cache.width >> self.resolution)  # rounded up
            cache.buffers[self] = x.new_zeros(x.shape[0], kh, width + kw - 1, self.weight.shape[1])
        return cache.buffers[self]

    def _cached_weights(self, cache: RowCache, as_image: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns weight and bias of the convolution, or those of each group's visible prefix, (out / G, visible)."""
        if self not in cache.weights:
            kernel = self.kernel
            if as_image:
                cache.weights[self] = [(kernel.contiguous(memory_format=torch.channels_last), self.bias)]
            else:
                flat = kernel.permute(0, 2, 3, 1).flatten(1)  # (out, in, kh, kw) -> (out, kh * kw * in)
                parts = zip(flat.chunk(self.groups), self.bias.chunk(self.groups), self.visible, strict=True)
                cache.weights[self] = [(weight[:, :n].contiguous(), bias) for weight, bias, n in parts]
        return cache.weights[self]


class Upsample(nn.Module):
    """Transposed 2x2 convolution of stride 2 to the next finer resolution, which turns each position into 2x2."""

    def __init__(self, channels: int, resolution: int):
        super().__init__()
        self.conv = CausalConv2d(channels, 4 * channels, weight_norm=True)
        self.resolution = resolution  # the output's

    def forward(self, x: torch.Tensor | None, size: tuple[int, int], cache: RowCache | None = None) -> torch.Tensor:
        """(B, H, W, D) -> (B, *size, D). With a cache, x is None where the last position still applies."""
        if x is not None:
            y = self.conv(x, cache).unflatten(-1, (2, 2, -1))  # (…, 2, 2, D)
        if cache is None:
            H, W = size
            return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]  # (B, H, W, 2, 2, D) -> (B, 2 H, 2 W, D)

        W = -(-cache.width >> self.resolution)
        row, column = (cache.row >> self.resolution) % 2, cache.column
        if column is None:
            if x is not None:
                cache.buffers[self] = y.transpose(1, 2).flatten(2, 3)  # (B, W, 2, 2, D) -> (B, 2, 2 W, D)
            return cache.buffers[self][:, row, :W]
        column >>= self.resolution
        if x is not None:
            if self not in cache.buffers:
                cache.buffers[self] = x.new_empty(x.shape[0], 2, W + W % 2, y.shape[-1])
            cache.buffers[self][:, :, column : column + 2] = y
        return cache.buffers[self][:, row, column]


# -------------------------------------------------------------------------------------------------- the variants


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of channels-last tensors, or of one group's features of a pixel."""

    def forward(self, x: torch.Tensor, cache: RowCache | None = None) -> torch.Tensor:
        if cache is None:
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        D = x.shape[-1]
        group = slice(cache.group * D, (cache.group + 1) * D)
        statistics = self.running_mean[group], self.running_var[group]
        return F.batch_norm(x, *statistics, self.weight[group], self.bias[group], eps=self.eps)


class BaselinePixelCNN(nn.Module):
    """
    Network of a student report that predicts intensities: four convolutions, the first two with 4x7 windows (the
    causal half of 7x7), each followed by batch norm and ReLU, and a residual connection around the second.
    """

    def __init__(self, config: dict):
        super().__init__()
        C, width = config["in_channels"], config["hidden_channels"]
        self.groups = C
        self.conv_a = CausalConv2d(C, width, (4, 7), left=3, mask="A", groups=C)
        self.conv_b = CausalConv2d(width, width, (4, 7), left=3, mask="B", groups=C)
        pointwise = range(config["num_layers"] - 3)
        self.convs = nn.ModuleList([CausalConv2d(width, width, mask="B", groups=C) for _ in pointwise])
        self.out = CausalConv2d(width, C, mask="B", groups=C)
        self.norm_a, self.norm_b, self.norm_out = BatchNorm(width), BatchNorm(width), BatchNorm(C)
        self.norms = nn.ModuleList([BatchNorm(width) for _ in pointwise])

    def vertical(self, x: torch.Tensor | None, given: None = None, cache: RowCache | None = None) -> None:
        """Does nothing: the windows are small enough to be evaluated again for each pixel."""

    def horizontal(
        self, x: torch.Tensor | None, contexts: None, given: None = None, cache: RowCache | None = None
    ) -> torch.Tensor:
        h = F.relu(self.norm_a(self.conv_a(x, cache), cache))
        h = h + F.relu(self.norm_b(self.conv_b(h, cache), cache))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.relu(norm(conv(h, cache), cache))
        return h

    def output(self, features: torch.Tensor, cache: RowCache | None = None) -> torch.Tensor:
        return F.relu(self.norm_out(self.out(features, cache), cache))


class Gate(torch.autograd.Function):
    """
    Computes tanh(f) . sigmoid(g) for whole images on CPUs. It copies to dense tensors in float32 or wider first:
    torch's own functions take several times as long on halves of one tensor and in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(f.dtype, torch.float32)
        t = torch.empty(f.shape, dtype=dtype).copy_(f).tanh_()
        s = torch.empty(g.shape, dtype=dtype).copy_(g).sigmoid_()
        ctx.save_for_backward(t, s)
        return (t * s).to(f.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t, s = ctx.saved_tensors
        wide = grad.to(t.dtype)
        grad_f = torch.ops.aten.tanh_backward(wide * s, t)
        grad_g = torch.ops.aten.sigmoid_backward(wide * t, s)
        return grad_f.to(grad.dtype), grad_g.to(grad.dtype)


class GatedLayer(nn.Module):
    """
    Layer of the gated PixelCNN (fig. 2): y = tanh(W_f * x + V_f c) . sigmoid(W_g * x + V_g c), eq. 4, where c is what the
    network is given: class and conditions.

    The vertical stack sees all of the rows above. The horizontal stack sees the vertical stack and what is left of the
    current position, and has a residual connection. Each group's features are adjacent, as are the halves of its gate.
    """

    def __init__(self, channels: int, groups: int, dilation: int, given_dim: int):
        super().__init__()
        self.group_channels = channels // groups
        self.conv_v = CausalConv2d(channels, 2 * channels, (2, 3), dilation, left=1)
        self.conv_h = CausalConv2d(channels, 2 * channels, (1, 2), dilation, mask="B", groups=groups)
        self.v_to_h = CausalConv2d(channels, 2 * channels)
        self.conv_out = CausalConv2d(channels, channels, mask="B", groups=groups)
        self.classes = nn.Linear(given_dim, 4 * channels, bias=False) if given_dim else None

    def vertical(
        self, v: torch.Tensor, given: torch.Tensor | None, cache: RowCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the features of the vertical stack, and what they and c add to the horizontal gate."""
        y = self.conv_v(v, cache)
        if self.classes is None:
            v = self.gate(y)
            return v, self.v_to_h(v, cache)
        bias_v, bias_h = _broadcast(self.classes(given), y).chunk(2, dim=-1)
        v = self.gate(y + bias_v)
        return v, self.v_to_h(v, cache) + bias_h

    def horizontal(self, h: torch.Tensor, context: torch.Tensor, cache: RowCache | None) -> torch.Tensor:
        y = self.gate(self.conv_h(h, cache) + context)
        return h + self.conv_out(y, cache)

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        """Applies the gate to all groups or to one: (…, g * 2 * group_channels) -> (…, g * group_channels)"""
        f, g = y.unflatten(-1, (-1, 2, self.group_channels)).unbind(-2)
        if y.ndim == 4 and y.device.type == "cpu":  # its copies do not pay for one row or pixel
            return Gate.apply(f, g).flatten(-2)
        return (torch.tanh(f) * torch.sigmoid(g)).flatten(-2)


class Frequencies(nn.Module):
    """
    Fourier features (arXiv 2107.00630), which make neighboring levels look different: x in [-1, 1] becomes x and the
    sines and cosines of waves of 2, 4, ... 2^n levels. Without them a network's first weights can hardly tell level
    253 from 254, though different values follow these two in an image.

    Args:
        num_frequencies (`int`): Number n of waves.
        num_levels (`int`): Levels L of x.
    """

    def __init__(self, num_frequencies: int, num_levels: int):
        super().__init__()
        self.num_features = 1 + 2 * num_frequencies
        self.waves = [math.pi / 2**k for k in range(num_frequencies)]  # in radians per level
        self.top = num_levels - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) -> (…, C * num_features), with the features of each value adjacent"""
        level = (x + 1) * (self.top / 2)
        features = [x, *(wave(level * w) for w in self.waves for wave in (torch.sin, torch.cos))]
        return torch.stack(features, dim=-1).flatten(-2)


class GatedPixelCNN(nn.Module):
    """Gated PixelCNN (arXiv 1606.05328) with a softmax over the levels of each sub-pixel."""

    def __init__(self, config: dict):
        super().__init__()
        C, width, L = config["in_channels"], config["hidden_channels"], config["num_levels"]
        self.groups = C
        self.encoding = Frequencies(config["num_frequencies"], L) if config["num_frequencies"] else None
        inputs = C if self.encoding is None else C * self.encoding.num_features
        self.in_v = CausalConv2d(inputs, width, (3, 7), left=3, above=True)
        self.in_h = CausalConv2d(inputs, width, (1, 4), mask="A", groups=C)
        dilations = itertools.islice(itertools.cycle(config["dilations"]), config["num_layers"])
        given_dim = _given_dim(config)
        self.layers = nn.ModuleList([GatedLayer(width, C, dilation, given_dim) for dilation in dilations])
        self.head = CausalConv2d(width, width, mask="B", groups=C)
        self.out = CausalConv2d(width, C * L, mask="B", groups=C)

    def vertical(
        self, x: torch.Tensor | None, given: torch.Tensor | None = None, cache: RowCache | None = None
    ) -> list[torch.Tensor]:
        v = self.in_v(x, cache)
        contexts = []
        for layer in self.layers:
            v, context = layer.vertical(v, given, cache)
            contexts.append(context)
        return contexts

    def horizontal(
        self,
        x: torch.Tensor | None,
        contexts: list[torch.Tensor],
        given: torch.Tensor | None = None,
        cache: RowCache | None = None,
    ) -> torch.Tensor:
        h = self.in_h(x, cache)
        for layer, context in zip(self.layers, contexts, strict=True):
            h = layer.horizontal(h, context if cache is None else cache.select(context, 0, self.groups), cache)
        return F.relu(self.head(F.relu(h), cache))

    def output(self, features: torch.Tensor, cache: RowCache | None = None) -> torch.Tensor:
        return self.out(features, cache)


class RowLSTM(nn.Module):
    """
    Row LSTM (arXiv 1601.06759, section 3.1 and eq. 3): the states of a row follow from those of the row above,

        o, f, i, g = sigmoid, sigmoid, sigmoid, tanh (K_ss * h_above + K_is * x + V c),
        c_row = f . c_above + i . g and h_row = o . tanh(c_row),

    with 1x3 convolutions of states, and of the inputs up to the current one; the last term is what the network is given,
    class and conditions, as in the gated PixelCNN. The states have half the features of the input, to which h is added by
    a 1x1 convolution. Each group's features are adjacent, as are the parts of its gates.
    """

    def __init__(self, channels: int, groups: int, given_dim: int):
        super().__init__()
        self.groups, self.state_channels = groups, channels // 2
        self.input_to_state = CausalConv2d(channels, 2 * channels, (1, 2), mask="B", groups=groups)
        self.state_to_state = CausalConv2d(self.state_channels, 2 * channels, (1, 3), left=1)
        self.conv_out = CausalConv2d(self.state_channels, channels, mask="B", groups=groups)
        self.classes = nn.Linear(given_dim, 2 * channels, bias=False) if given_dim else None

    def forward(self, x: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """Runs through the rows of an image: (B, H, W, D) -> (B, H, W, D)"""
        inputs = self.input_to_state(x)
        if self.classes is not None:
            inputs = inputs + _broadcast(self.classes(given), inputs)
        hidden = x.new_zeros(x.shape[0], 1, x.shape[2], self.state_channels)
        cell = hidden.to(_cell_dtype(x))
        rows = []
        for row in inputs.split(1, dim=1):
            hidden, cell = self.update(row + self.state_to_state(hidden), cell)
            rows.append(hidden)
        return x + self.conv_out(torch.cat(rows, dim=1))

    def begin_row(self, given: torch.Tensor | None, cache: RowCache) -> torch.Tensor:
        """Returns what the states of the row above and c add to the gates of a row, (B, W, 4 state_channels)."""
        if self not in cache.buffers:  # h and c of the row above, which those of the row replace pixel by pixel
            hidden = cache.canvas.new_zeros(cache.canvas.shape[0], cache.width, self.state_channels)
            cache.buffers[self] = hidden, torch.zeros_like(hidden, dtype=_cell_dtype(hidden))
        y = self.state_to_state(cache.buffers[self][0], cache)
        return y if self.classes is None else y + _broadcast(self.classes(given), y)

    def step(self, x: torch.Tensor, context: torch.Tensor, cache: RowCache) -> torch.Tensor:
        """Computes a pixel, or a group's features of it: (B, g) -> (B, g)"""
        gates = self.input_to_state(x, cache) + cache.select(context, 0, self.groups)
        h_above, c_above = (
            states[:, cache.column].chunk(self.groups, -1)[cache.group] for states in cache.buffers[self]
        )
        hidden, cell = self.update(gates, c_above)
        h_above.copy_(hidden)  # in the cache, of which both are views
        c_above.copy_(cell)
        return x + self.conv_out(hidden, cache)

    def update(self, gates: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns h and c of all groups or of one from their gates and the c above: (…, 4 S), (…, S) -> (…, S), (…, S)"""
        size = self.state_channels // self.groups
        o, f, i, g = (part.flatten(-2) for part in gates.unflatten(-1, (-1, 4, size)).unbind(-2))
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell).to(o.dtype), cell


def _cell_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype of c, which sums over the rows: bfloat16 would round it."""
    return torch.promote_types(x.dtype, torch.float32)


class PixelRNN(nn.Module):
    """PixelRNN of row LSTMs (arXiv 1601.06759, table 1) with a softmax over the levels of each sub-pixel."""

    def __init__(self, config: dict):
        super().__init__()
        C, width = config["in_channels"], config["hidden_channels"]
        self.groups = C
        self.conv_in = CausalConv2d(C, width, (4, 7), left=3, mask="A", groups=C)
        given_dim = _given_dim(config)
        self.layers = nn.ModuleList([RowLSTM(width, C, given_dim) for _ in range(config["num_layers"])])
        self.head = CausalConv2d(width, width, mask="B", groups=C)
        self.out = CausalConv2d(width, C * config["num_levels"], mask="B", groups=C)

    def vertical(
        self, x: torch.Tensor | None, given: torch.Tensor | None = None, cache: RowCache | None = None
    ) -> list[torch.Tensor] | None:
        """Begins a row. Of a whole image there is nothing to do before the layers, each of which runs through all rows."""
        return None if cache is None else [layer.begin_row(given, cache) for layer in self.layers]

    def horizontal(
        self,
        x: torch.Tensor | None,
        contexts: list[torch.Tensor] | None,
        given: torch.Tensor | None = None,
        cache: RowCache | None = None,
    ) -> torch.Tensor:
        h = self.conv_in(x, cache)
        for index, layer in enumerate(self.layers):
            h = layer(h, given) if cache is None else layer.step(h, contexts[index], cache)
        return F.relu(self.head(F.relu(h), cache))

    def output(self, features: torch.Tensor, cache: RowCache | None = None) -> torch.Tensor:
        return self.out(features, cache)


def _concat_elu(x: torch.Tensor) -> torch.Tensor:
    """Applies the concatenated ELU of PixelCNN++: (…, D) -> (…, 2 D)"""
    return F.elu(torch.cat([x, -x], dim=-1))


class GatedResnet(nn.Module):
    """
    Block of PixelCNN++: two convolutions with concatenated ELUs, dropout between them, a gate and a residual.

    Args:
        channels (`int`): Features D.
        window (`dict`): `kernel_size` and `left` of the convolutions.
        resolution (`int`): Resolution of the block.
        has_skip (`bool`): Whether the block takes a skip connection.
        dropout (`float`): Dropout before the second convolution.
        given_dim (`int`): Size of what the gate is given, 0 for nothing.
    """

    def __init__(self, channels: int, window: dict, resolution: int, has_skip: bool, dropout: float, given_dim: int):
        super().__init__()
        options = {**window, "resolution": resolution, "weight_norm": True}
        self.resolution = resolution
        self.conv_in = CausalConv2d(2 * channels, channels, **options)
        self.conv_out = CausalConv2d(2 * channels, 2 * channels, **options)
        self.skip = CausalConv2d(2 * channels, channels, weight_norm=True) if has_skip else None
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(given_dim, 2 * channels, bias=False) if given_dim else None

    def forward(
        self,
        x: torch.Tensor,
        skip: torch.Tensor | None,
        context: torch.Tensor | None,
        given: torch.Tensor | None,
        cache: RowCache | None,
    ) -> torch.Tensor:
        y = self.conv_in(_concat_elu(x), cache)
        if skip is not None:
            y = y + self.skip(_concat_elu(skip), cache)
        if context is not None:
            y = y + context
        y = self.conv_out(self.dropout(_concat_elu(y)), cache)
        if self.classes is not None:
            y = y + _broadcast(self.classes(given), y)
        return x + F.glu(y, dim=-1)


class Stream(nn.Module):
    """
    One of the two streams of PixelCNN++: encoder blocks at each resolution, as many decoder blocks and one more, and
    skip connections between them.
    """

    def __init__(self, config: dict, first: CausalConv2d, window: dict):
        super().__init__()
        width, num_layers, dropout = config["hidden_channels"], config["num_layers"], config["dropout"]
        given_dim = _given_dim(config)
        self.first = first

        def blocks(resolution: int, count: int, has_skip: bool) -> nn.ModuleList:
            options = (width, window, resolution, has_skip, dropout, given_dim)
            return nn.ModuleList([GatedResnet(*options) for _ in range(count)])

        coarsest = NUM_RESOLUTIONS - 1
        self.encoder = nn.ModuleList([blocks(r, num_layers, False) for r in range(NUM_RESOLUTIONS)])
        self.decoder = nn.ModuleList([blocks(r, num_layers + (r < coarsest), True) for r in range(NUM_RESOLUTIONS)])
        options = {**window, "stride": 2, "weight_norm": True}
        self.down = nn.ModuleList([CausalConv2d(width, width, **options, resolution=r) for r in range(coarsest)])
        self.up = nn.ModuleList([Upsample(width, r) for r in range(coarsest)])


class PixelCNNPlusPlus(nn.Module):
    """
    PixelCNN++ (arXiv 1701.05517). Its vertical stream sees the rows above, and its horizontal stream also what is left
    of the current position: each block of the horizontal stream takes the output of its counterpart.
    """

    groups = 1  # a pixel's channels are coupled in the mixture, not in the network

    def __init__(self, config: dict):
        super().__init__()
        C, width, K = config["in_channels"], config["hidden_channels"], config["num_mixtures"]
        first_v = CausalConv2d(C, width, (2, 3), left=1, above=True, weight_norm=True)
        first_h = CausalConv2d(C, width, (2, 3), left=1, mask="A", weight_norm=True)
        self.vertical_stream = Stream(config, first_v, {"kernel_size": (2, 3), "left": 1})
        self.horizontal_stream = Stream(config, first_h, {"kernel_size": (2, 2)})
        # one for each block of the horizontal stream, under the block's name there
        self.v_to_h = nn.ModuleDict()
        for name, block in self.horizontal_stream.named_modules():
            if isinstance(block, GatedResnet):
                self.v_to_h[name.replace(".", "_")] = CausalConv2d(2 * width, width, weight_norm=True)
        self.out = CausalConv2d(width, K * (1 + 2 * C + C * (C - 1) // 2), weight_norm=True)

    def vertical(
        self, x: torch.Tensor | None, given: torch.Tensor | None = None, cache: RowCache | None = None
    ) -> dict[str, torch.Tensor]:
        contexts = {}
        self._stream(self.vertical_stream, self.vertical_stream.first(x, cache), 0, contexts, given, cache)
        return contexts

    def horizontal(
        self,
        x: torch.Tensor | None,
        contexts: dict[str, torch.Tensor],
        given: torch.Tensor | None = None,
        cache: RowCache | None = None,
    ) -> torch.Tensor:
        stream = self.horizontal_stream
        return F.elu(self._stream(stream, stream.first(x, cache), 0, contexts, given, cache))

    def output(self, features: torch.Tensor, cache: RowCache | None = None) -> torch.Tensor:
        # autocast would round the means to bfloat16, which costs narrow logistics hundredths of a bit
        with torch.autocast(features.device.type, enabled=False):
            return self.out(features.to(self.out.weight.dtype), cache)

    def _stream(
        self,
        stream: Stream,
        h: torch.Tensor,
        resolution: int,
        contexts: dict[str, torch.Tensor],
        given: torch.Tensor | None,
        cache: RowCache | None,
    ) -> torch.Tensor:
        """
        Runs a stream from this resolution to the coarsest and back. The vertical stream writes `contexts`, the
        horizontal stream reads them.
        """

        def run(blocks: str, index: int, h: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
            name, context = f"{blocks}_{resolution}_{index}", None
            if stream is self.horizontal_stream:
                context = contexts[name] if cache is None else cache.select(contexts[name], resolution, 1)
            h = getattr(stream, blocks)[resolution][index](h, skip, context, given, cache)
            if stream is self.vertical_stream:
                contexts[name] = self.v_to_h[name](_concat_elu(h), cache)
            return h

        skips = [h]
        for i in range(len(stream.encoder[resolution])):
            h = run("encoder", i, h, None)
            skips.append(h)
        if resolution + 1 < NUM_RESOLUTIONS:
            coarse = stream.down[resolution](h, cache)
            if coarse is not None:
                coarse = self._stream(stream, coarse, resolution + 1, contexts, given, cache)
            h = stream.up[resolution](coarse, h.shape[1:3], cache)
        else:
            skips.pop()
        for i in range(len(stream.decoder[resolution])):
            h = run("decoder", i, h, skips.pop())
        return h


def _broadcast(bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshapes a bias to be added at every position: (B, D) -> (B, 1, ..., D)"""
    return bias.view(bias.shape[0], *[1] * (like.ndim - 2), -1)


# ------------------------------------------------------------------------------------------------ distributions


class LinearCrossEntropy(torch.autograd.Function):
    """
    Computes -log softmax(x W^T + b)[target] in nats without holding all logits, which for 256 levels would take most
    of the memory. The logits are computed a chunk at a time, and again for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """x (N, D), weight (C L, D), bias (C L,), target (N, C) -> (N, C) float32"""
        N, C = target.shape
        nll = torch.empty(N, C, device=x.device)
        wide = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, N, _CHUNK // C):
            rows = slice(start, start + _CHUNK // C)
            logits = F.linear(x[rows], weight, bias).unflatten(-1, (C, -1))
            log_prob = logits.log_softmax(-1, dtype=wide)
            nll[rows] = -log_prob.gather(-1, target[rows, :, None])[..., 0]
        ctx.save_for_backward(x, weight, bias, target)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight, bias, target = ctx.saved_tensors
        N, C = target.shape
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, device=x.device)
        grad_bias = torch.zeros(bias.shape, device=x.device)
        wide = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, N, _CHUNK // C):
            rows = slice(start, start + _CHUNK // C)
            logits = F.linear(x[rows], weight, bias).unflatten(-1, (C, -1))
            grad_logits = logits.softmax(-1, dtype=wide)  # bfloat16 could not tell probabilities near 1 apart
            grad_logits.scatter_add_(-1, target[rows, :, None], -torch.ones_like(grad_logits[..., :1]))
            grad_logits = grad_logits.mul_(grad[rows, :, None]).flatten(1)  # (n, C, L) -> (n, C L)
            grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(x.dtype)
            grad_x[rows] = grad_logits @ weight
            grad_weight += grad_logits.t() @ x[rows]
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


def _split_mixture(raw: torch.Tensor, x: torch.Tensor, num_mixtures: int) -> tuple[torch.Tensor, ...]:
    """
    Returns the parameters of the mixture after the linear coupling of the channels (PixelCNN++ eq. 3), in which the
    channels before a channel shift its mean.

    Args:
        raw (`torch.Tensor` of shape `(…, P)`): Output of the network.
        x (`torch.Tensor` of shape `(…, C)`): Channels of the pixel itself, in [-1, 1].

    Returns:
        `tuple` of log-weights (…, K), means (…, C, K) and log-scales (…, C, K).
    """
    K, C = num_mixtures, x.shape[-1]
    raw = raw.float()
    log_weights = raw[..., :K].log_softmax(-1)
    means, log_scales, coefficients = [], [], raw[..., K:]
    for c in range(C):  # the 2 + c parameters of a channel are adjacent
        own, coefficients = coefficients.split([(2 + c) * K, coefficients.shape[-1] - (2 + c) * K], dim=-1)
        mean, log_scale, *couplings = own.split(K, dim=-1)
        for d, coupling in enumerate(couplings):
            mean = mean + torch.tanh(coupling) * x[..., d, None]
        means.append(mean)
        log_scales.append(log_scale.clamp(-7.0, 7.0))  # beyond, every bin is empty and its logarithm has no gradient
    return log_weights, torch.stack(means, -2), torch.stack(log_scales, -2)


def _logistic_log_prob(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, num_levels: int) -> torch.Tensor:
    """
    Computes the log-probability of the bin around x (…, 1) in [-1, 1] under a logistic (PixelCNN++ eq. 2). The first
    and the last bin extend to infinity. With s the sigmoid and (a, b) the bin, log(s(b) - s(a)) = log s(b) + log s(-a)
    + log(1 - exp(a - b)), which is exact wherever the bin lies.
    """
    half = 1 / (num_levels - 1)  # half the width of a bin
    inverse_scale = torch.exp(-log_scale)
    upper = F.logsigmoid((x - mean + half) * inverse_scale)
    lower = F.logsigmoid(-(x - mean - half) * inverse_scale)
    log_prob = upper + lower + torch.log(-torch.expm1(-2 * half * inverse_scale))
    return torch.where(x < half - 1, upper, torch.where(x > 1 - half, lower, log_prob))


@dataclass
class TinyPixelCNNOutput(BaseOutput):
    """
    Output of [`TinyPixelCNNModel`].

    Args:
        sample (`torch.Tensor`, *optional*):
            Parameters of p(x_cij | the sub-pixels before it) at (b, c, ..., i, j). `gated`, `row_lstm`: logits of the L
            levels, `(B, C, L, H, W)`. `plusplus`: log-weights, means and log-scales of K logistics on [-1, 1] after the
            coupling of the channels, `(B, C, 3, K, H, W)`. `baseline`: the predicted intensities, `(B, C, H, W)`.
        loss (`torch.Tensor` of shape `(B,)`, *optional*):
            Negative log-likelihood of each image in bits per dimension. `baseline`: mean absolute error in [0, 1].
    """

    sample: torch.Tensor | None = None
    loss: torch.Tensor | None = None


class TinyPixelCNNModel(ModelMixin, ConfigMixin):
    r"""
    Autoregressive model of small images in one of four variants. The defaults are the gated CIFAR-10 network.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 32):
            Side of square images, or height and width.
        in_channels (`int`, *optional*, defaults to 3): Channels C, in the order in which they are generated.
        num_levels (`int`, *optional*, defaults to 256):
            Levels L of a sub-pixel, evenly spaced on [0, 1]: level l is l / (L - 1).
        variant (`str`, *optional*, defaults to `"gated"`):
            `"gated"`: the gated PixelCNN (arXiv 1606.05328), a softmax over the levels. `"plusplus"`: PixelCNN++
            (arXiv 1701.05517), a mixture of discretized logistics. `"baseline"`: four convolutions that predict
            intensities, trained with an L1 loss; it has no likelihood and always predicts the same image. `"row_lstm"`:
            the PixelRNN of row LSTMs (arXiv 1601.06759), a softmax over the levels.
        hidden_channels (`int`, *optional*):
            Features of a layer (of each stack). Defaults to 192 for `gated`, 160 for `plusplus`, 210 for `baseline` and
            252 for `row_lstm`, whose states have half as many. A multiple of `in_channels` except for `plusplus`, and of
            twice as much for `row_lstm` (the defaults are rounded down to one).
        num_layers (`int`, *optional*):
            `gated`: layers, 15 by default. The first convolution sees 3 rows and columns, and each layer as many more
            as its dilation. `plusplus`: blocks of each of the three resolutions, 5 by default. `baseline`:
            convolutions, 4 by default, of which two are masked and the others are 1x1. `row_lstm`: LSTMs, 12 by default.
        num_mixtures (`int`, *optional*, defaults to 10): Logistics K in the mixture of `plusplus`.
        num_frequencies (`int`, *optional*, defaults to 0):
            Fourier features of the input of `gated`: waves of 2, 4, ... levels. 8 tell all of 256 levels apart.
        dilations (`tuple[int]`, *optional*, defaults to `(1,)`):
            Dilations of the layers of `gated`, repeated from the first where there are more layers (arXiv 1511.07122).
            With `(1, 2, 4, 8)` a few layers see far.
        dropout (`float`, *optional*): Dropout of `plusplus`. Defaults to 0.5.
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. The network then has `K + 1` rows, of which row `K` stands for no class. Not
            possible for `baseline`.
        num_conditions (`int`, *optional*):
            Number `D` of conditions, numbers that images are to have. Not possible for `baseline`.

    Raises:
        ValueError: If an option is unknown or a size is not possible, before anything is allocated.

    Example:

    ```py
    >>> import torch
    >>> from tiny_diffusers import TinyPixelCNNModel

    >>> model = TinyPixelCNNModel(sample_size=8, in_channels=1, num_levels=17, hidden_channels=32, num_layers=4)
    >>> images = torch.randint(17, (2, 1, 8, 8)) / 16
    >>> model(images).sample.shape
    torch.Size([2, 1, 17, 8, 8])
    >>> model.nll(images).shape
    torch.Size([2])
    ```
    """

    _no_split_modules = ["BaselinePixelCNN", "GatedPixelCNN", "PixelCNNPlusPlus", "PixelRNN"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        num_levels: int = 256,
        variant: str = "gated",
        hidden_channels: int | None = None,
        num_layers: int | None = None,
        num_mixtures: int = 10,
        dropout: float | None = None,
        num_class_embeds: int | None = None,
        num_frequencies: int = 0,
        dilations: Sequence[int] = (1,),
        num_conditions: int | None = None,
    ):
        super().__init__()
        # a tuple, as JSON turns it into a list: the config is the same after saving and loading
        self.register_to_config(sample_size=as_sample_size(sample_size), dilations=tuple(dilations))
        given = dict(self.config)
        _check_config(given)
        config = {**given, **{k: v for k, v in DEFAULTS[variant].items() if given[k] is None}}
        if hidden_channels is None:
            config["hidden_channels"] -= config["hidden_channels"] % _width_divisor(variant, in_channels)
        # for `compile_repeated_blocks`; the layers of `gated` are not called as modules
        self._repeated_blocks = ["GatedResnet"] if variant == "plusplus" else []
        networks = {
            "baseline": BaselinePixelCNN,
            "gated": GatedPixelCNN,
            "plusplus": PixelCNNPlusPlus,
            "row_lstm": PixelRNN,
        }
        self.network = networks[variant](config)
        self.condition_embed = (
            ConditionEmbedding(num_conditions, config["hidden_channels"]) if num_conditions else None
        )

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_loss: bool = False,
        return_dict: bool = True,
        conditions: torch.Tensor | None = None,
    ) -> TinyPixelCNNOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [0, 1].
            class_labels (`torch.Tensor`, *optional*):
                Integers of shape `(B,)` from 0 to `num_class_embeds`, or floats of shape `(B, num_class_embeds + 1)`
                that mix the rows. None stands for no class, row `num_class_embeds`.
            return_loss (`bool`, *optional*, defaults to `False`):
                Whether to return the loss of each image instead of the distributions, which takes less memory.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a plain tuple.
            conditions (`torch.Tensor` of shape `(B, num_conditions)`, *optional*):
                Standardized numbers. A row of NaN, or None for all images, stands for no conditions: a learned vector.

        Returns:
            [`TinyPixelCNNOutput`] or `tuple`.

        Raises:
            ValueError: If a shape does not fit the network, if a label is out of range (on a CPU), or if labels or
                conditions are given to a network without them.
        """
        check_shape("sample", sample, self.config.in_channels, "height", "width")
        given = self._given(class_labels, conditions, sample.shape[0])
        network = self.network
        x = self._input(sample)
        features = network.horizontal(x, network.vertical(x, given), given)
        if return_loss:
            loss = self._loss(features, sample)
            return TinyPixelCNNOutput(loss=loss) if return_dict else (loss,)
        values = 2 * sample.permute(0, 2, 3, 1) - 1
        parameters = self._distributions(network.output(features), values)  # (B, H, W, C, …)
        parameters = parameters.permute(0, 3, *range(4, parameters.ndim), 1, 2)  # (B, C, …, H, W)
        return TinyPixelCNNOutput(sample=parameters) if return_dict else (parameters,)

    def nll(
        self,
        images: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Computes the exact negative log-likelihood of images in bits per dimension, -log2 p(x) / (C H W).

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): Images in [0, 1], at the network's levels l / (L - 1).
            class_labels, conditions (`torch.Tensor`, *optional*): As in `forward`; None for p(x | no class).

        Returns:
            `torch.Tensor` of shape `(B,)`, float32.

        Raises:
            ValueError: If images have another shape, leave [0, 1] or lie between the levels; for `baseline`; for
                `plusplus` in training mode, as its dropout changes the likelihood.
        """
        if self.config.variant == "baseline":
            raise ValueError("The baseline predicts intensities and has no likelihood: use another variant.")
        self._check_mode()
        return self(self.to_levels(images), class_labels, return_loss=True, conditions=conditions).loss

    def quantize(self, images: torch.Tensor) -> torch.Tensor:
        """
        Quantizes 8-bit images to the network's levels: the 256 values fall into L bins of the same width.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): Images in [0, 1], with value v of 255 as v / 255.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: Levels l / (L - 1).

        Raises:
            ValueError: If the network has more levels than 8-bit images.
        """
        L = self.config.num_levels
        if L > 256:
            raise ValueError(f"The network has {L} levels, but 8-bit images have only 256: others would be unused.")
        return ((images * 255).round() * (L / 256)).floor() / (L - 1)

    def to_levels(self, images: torch.Tensor) -> torch.Tensor:
        """
        Rounds images to the network's levels, exactly.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`):
                Images in [0, 1]. Each value is a level l / (L - 1), or that level rounded to 8 bits or to the dtype.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: Levels, in float32 or wider.

        Raises:
            ValueError: If images have another shape, leave [0, 1] or lie between the levels.
        """
        check_shape("images", images, self.config.in_channels, *height_and_width(self.config.sample_size))
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: they must be floats in [0, 1]; divide uint8 ones by 255.")
        if not ((images >= 0) & (images <= 1)).all():
            low, high = images.aminmax()
            raise ValueError(f"images lie in [{float(low):.4g}, {float(high):.4g}]: they must lie in [0, 1].")
        top, rounding = self.config.num_levels - 1, torch.finfo(images.dtype).eps
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        levels = (images * top).round() / top
        off = torch.minimum((images - levels).abs(), (images - (levels * 255).round() / 255).abs())
        if (off > 0.05 / max(top, 255) + rounding).any():
            raise ValueError(
                f"images hold values between the network's {top + 1} levels, the multiples of 1 / {top}: convert "
                "8-bit images with `quantize`."
            )
        return levels

    # --------------------------------------------------------------------------------------- incremental sampling

    @apply_forward_hook  # loads an offloaded network, as this method does not call `forward`
    @torch.no_grad()
    def conditionals(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        use_cache: bool = True,
        conditions: torch.Tensor | None = None,
    ) -> Iterator[tuple[tuple[int, int, int], torch.Tensor]]:
        """
        Visits the sub-pixels in order and yields ((c, i, j), the parameters of p(x_cij | those before it)).

        The caller writes x_cij to `sample[:, c, i, j]` before the next step. Each step computes only what is new.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [0, 1], which the caller fills in.
            class_labels (`torch.Tensor`, *optional*): As in `forward`.
            use_cache (`bool`, *optional*, defaults to `True`):
                Whether to keep intermediate results. Without a cache the whole network runs again for each sub-pixel
                (`plusplus`: each pixel).
            conditions (`torch.Tensor`, *optional*): As in `forward`.

        Yields:
            `tuple` of a sub-pixel and what `forward` returns for it: `(B, L)`, `(B, 3, K)` or `(B,)`.

        Raises:
            ValueError: As in `forward`; in training mode, where dropout and batch norm differ.
        """
        self._check_mode()
        check_shape("sample", sample, self.config.in_channels, "height", "width")
        network = self.network
        _, C, H, W = sample.shape
        given = self._given(class_labels, conditions, sample.shape[0])
        cache = RowCache(sample, network) if use_cache else None
        for i in range(H):
            if use_cache:
                cache.row, cache.column = i, None
                contexts = network.vertical(None, given, cache)
            for j in range(W):
                for c in range(C):
                    if use_cache:
                        cache.column, cache.group = j, c % network.groups
                    if c < network.groups:  # otherwise the output of this pixel is known
                        if use_cache:
                            raw = network.output(network.horizontal(None, contexts, given, cache), cache)
                        else:
                            x = self._input(sample)
                            raw = network.output(network.horizontal(x, network.vertical(x, given), given))[:, i, j]
                            raw = raw.chunk(network.groups, dim=-1)[c]
                    yield (c, i, j), self._distributions(raw, 2 * sample[:, : c + 1, i, j] - 1, only=c)
                    if use_cache:
                        cache.group = c
                        cache.write(sample[:, c, i, j])

    def draw(self, parameters: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """
        Draws x_cij by inverting its cumulative distribution function.

        Args:
            parameters (`torch.Tensor`): Parameters from `conditionals`.
            uniform (`torch.Tensor` of shape `(B, 2)`): Uniform numbers in [0, 1).
            temperature (`float`, *optional*, defaults to 1.0):
                Divides the logits (of the levels or of the logistics) and multiplies the scales of the logistics.

        Returns:
            `torch.Tensor` of shape `(B,)`: Levels in [0, 1].
        """
        top = self.config.num_levels - 1
        variant = self.config.variant
        if variant == "baseline":
            return (parameters.float().clamp(0, 1) * top).round() / top
        if variant != "plusplus":
            return _categorical(parameters.float(), uniform[:, 0], temperature) / top
        log_weights, means, log_scales = parameters.unbind(1)  # (B, K)
        k = _categorical(log_weights, uniform[:, 0], temperature)[:, None]
        x = means.gather(1, k)[:, 0]
        x = x + temperature * log_scales.gather(1, k)[:, 0].exp() * torch.logit(uniform[:, 1], eps=1e-7)
        return ((x + 1) / 2 * top).round().clamp(0, top) / top  # clamped, as the outer bins extend to infinity

    # ------------------------------------------------------------------------------------------------ parameters

    @torch.no_grad()
    def initialize(self, images: torch.Tensor, class_labels: torch.Tensor | None = None) -> None:
        """
        Initializes the weight norms of `plusplus` from data (arXiv 1602.07868, section 3) and does nothing for the
        others.

        The output of every convolution on `images` gets mean 0 and variance 1, or for gates a standard deviation of
        0.1. Outputs that hardly vary keep their scale, as they say nothing about it.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): A typical batch in [0, 1].
            class_labels (`torch.Tensor`, *optional*): As in `forward`.
        """

        def normalize(conv: CausalConv2d, args: tuple, y: torch.Tensor) -> torch.Tensor:
            mean, std = y.flatten(0, -2).mean(0), y.flatten(0, -2).std(0)
            scale = (0.1 if conv in gates else 1.0) / torch.where(std > _MIN_STD, std, 1.0)
            conv.gain.mul_(scale)
            conv.bias.sub_(mean).mul_(scale)
            return (y - mean) * scale

        gates = {block.conv_out for block in self.modules() if isinstance(block, GatedResnet)}
        normed = [m for m in self.modules() if isinstance(m, CausalConv2d) and m.gain is not None]
        if not normed:
            return
        handles = [conv.register_forward_hook(normalize) for conv in normed]
        try:
            self(images, class_labels)
        finally:
            for handle in handles:
                handle.remove()

    def _input(self, sample: torch.Tensor) -> torch.Tensor:
        """Converts images in [0, 1] to the network's input: (B, C, H, W) -> (B, H, W, C E)"""
        x = (2 * sample.to(torch.promote_types(sample.dtype, torch.float32)) - 1).permute(0, 2, 3, 1).contiguous()
        encoding = getattr(self.network, "encoding", None)
        x = x if encoding is None else encoding(x)
        return x.to(self.network.out.weight.dtype)

    def _distributions(self, raw: torch.Tensor, x: torch.Tensor, only: int | None = None) -> torch.Tensor:
        """
        Returns the parameters of each channel's distribution, or only of channel `only`, from the network's output and
        the pixel's channels x (…, C) in [-1, 1]: (…, P) -> (…, C, …)
        """
        if self.config.variant == "baseline":
            return raw if only is None else raw[..., 0]
        if self.config.variant != "plusplus":
            return raw.unflatten(-1, (x.shape[-1], -1)) if only is None else raw
        # Bayes' rule: each logistic's weight is multiplied by the likelihood of the channels before under it.
        log_weights, means, log_scales = _split_mixture(raw, x, self.config.num_mixtures)
        channels = []
        for c in range(x.shape[-1]):
            channels.append(torch.stack([log_weights, means[..., c, :], log_scales[..., c, :]], dim=-2))
            if c + 1 < x.shape[-1]:
                here = (x[..., c, None], means[..., c, :], log_scales[..., c, :])
                log_weights = (log_weights + _logistic_log_prob(*here, self.config.num_levels)).log_softmax(-1)
        return torch.stack(channels, dim=-3) if only is None else channels[only]

    def _loss(self, features: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Computes the bits per dimension, or the L1 loss of the baseline, of each image: (B,)"""
        network, top = self.network, self.config.num_levels - 1
        target = sample.permute(0, 2, 3, 1).float()  # (B, H, W, C)
        if self.config.variant == "baseline":
            return (network.output(features).float() - target).abs().flatten(1).mean(1)
        if self.config.variant != "plusplus":
            levels = (target * top).round().long().flatten(0, 2)  # (B H W, C)
            weight = network.out.kernel.flatten(1)
            nll = LinearCrossEntropy.apply(
                features.flatten(0, 2), weight.to(features.dtype), network.out.bias.to(features.dtype), levels
            )
        else:
            x = 2 * target - 1
            log_weights, means, log_scales = _split_mixture(network.output(features), x, self.config.num_mixtures)
            log_prob = _logistic_log_prob(x[..., None], means, log_scales, self.config.num_levels)  # (B, H, W, C, K)
            nll = -(log_weights + log_prob.sum(-2)).logsumexp(-1)
        return nll.view(len(sample), -1).sum(1) / (math.log(2) * target[0].numel())

    def _given(
        self, class_labels: torch.Tensor | None, conditions: torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        """Returns the weights of the class rows and the embedding of the conditions, (B, N), or None without either."""
        table, given = self.network.out.weight, []
        if self.config.num_class_embeds is None:
            refuse_labels(class_labels)
        else:
            weights = class_weights(class_labels, batch_size, self.config.num_class_embeds, table)
            given.append(weights.to(table.device))
        embedding = embed_conditions(self.condition_embed, conditions, batch_size)
        if embedding is not None:
            given.append(embedding)
        return torch.cat(given, dim=1) if given else None

    def _check_mode(self) -> None:
        variant, dropout = self.config.variant, self.config.dropout
        if self.training and (variant == "baseline" or (variant == "plusplus" and dropout != 0)):
            raise ValueError(f"In training mode, {variant!r} gives different results: call `eval()` first.")


def _categorical(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draws the level at which the cumulative distribution of (B, L) exceeds `uniform` (B,): int64 (B,)"""
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # the largest is 0 at any temperature
    cumulative = logits.softmax(-1).cumsum(-1)
    passed = cumulative <= uniform[:, None] * cumulative[:, -1:]
    return passed.sum(-1).clamp(max=logits.shape[-1] - 1)
