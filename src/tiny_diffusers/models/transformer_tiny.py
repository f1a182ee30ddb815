"""
A diffusion transformer for small images (8x8 to 64x64).

It follows Peebles & Xie 2022 (DiT, arXiv 2212.09748): patches become tokens, and time and class scale, shift and gate the
layers of each block. U-ViT's long skip connections (arXiv 2209.12152) are an option. Nearly all of its work is in matrix
products, which suit AMX and GPUs.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .layers_tiny import (
    ACTIVATIONS,
    ClassEmbedding,
    ConditionEmbedding,
    TimeEmbedding,
    as_sample_size,
    check_choice,
    check_dropout,
    check_multiple,
    check_parameters,
    check_shape,
    check_sizes,
    check_x_prediction,
    embed_augmentation,
    embed_classes,
    embed_conditions,
    height_and_width,
    self_attention,
    velocity_of_x0,
)


CHOICES = {
    "patch_size": (1, 2, 4),
    "position_embedding": ("none", "sinusoidal", "fourier", "learned", "relative"),
    "time_embedding": ("sinusoidal", "fourier", "learned"),
    "act_fn": tuple(ACTIVATIONS),
}

# DiT's networks by the names and sizes of its table 1, and a smaller one with the width and depth of ViT's "tiny".
# `TinyTransformer2DModel(**PRESETS["dit-s-2"])` builds one.
PRESETS = {
    "dit-ti-2": {"num_layers": 12, "num_attention_heads": 3, "attention_head_dim": 64, "patch_size": 2},  # 8.3 M
    "dit-s-2": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "patch_size": 2},  # 33 M
    "dit-b-2": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "patch_size": 2},  # 130 M
}

NUM_TIME_FEATURES = 256
EPS = 1e-6  # of the layer norms


def _check_config(config: dict) -> None:
    """Raises a ValueError for an unknown name or a size that is not possible, before anything is allocated."""
    for name, allowed in CHOICES.items():
        check_choice(name, config[name], allowed)
    check_sizes(config, num_layers=(1, 64), attention_head_dim=(1, 4096))
    check_dropout(config["dropout"])
    check_x_prediction(config)
    ratio, patch_size = config["mlp_ratio"], config["patch_size"]
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 64:
        raise ValueError(f"mlp_ratio {ratio!r} is not possible: it must be a number in (0, 64].")
    check_multiple(config, patch_size, f"patches of {patch_size} pixels", "or a smaller patch_size")
    kind, heads, head_dim = (config[k] for k in ("position_embedding", "num_attention_heads", "attention_head_dim"))
    name, features = ("attention_head_dim", head_dim) if kind == "relative" else ("the width", heads * head_dim)
    multiple = {"sinusoidal": 4, "fourier": 2, "relative": 4}.get(kind, 1)
    if features % multiple:
        raise ValueError(
            f"position_embedding {kind!r} is not possible with {heads} heads of {head_dim} features: {name}, {features}, "
            f"must be a multiple of {multiple}."
        )
    width = heads * head_dim
    block = 4 * width**2 + 2 * ratio * width**2 + 6 * width * (config["time_embedding_dim"] or width)
    positions = _count_tokens(config) * width if kind == "learned" else 0
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio", "sample_size")
    check_parameters(config["num_layers"] * block + positions, config, names, "Make it narrower.")


def _count_tokens(config: dict) -> int:
    """Returns the number L of patches of an image."""
    return math.prod(side // config["patch_size"] for side in height_and_width(config["sample_size"]))


def grid_positions(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Returns the row and the column of each token, (height * width, 2)."""
    rows, columns = (torch.arange(size, dtype=torch.float32, device=device) for size in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def position_angles(positions: torch.Tensor, kind: str, num_angles: int) -> torch.Tensor:
    """
    Computes angles whose cosines and sines tell positions apart, in float32: (L, 2) -> (L, num_angles).

    Args:
        positions (`torch.Tensor`): The row and the column of each token.
        kind (`str`):
            `"sinusoidal"`: half of the angles are of the row and half of the column, at frequencies from 1 down to
            1 / 10,000 (DiT). `"relative"`: the same down to 1 / 100, as rotary embeddings of small grids have it (arXiv
            2403.13298). `"fourier"`: Gaussian Fourier features (arXiv 2006.10739).
        num_angles (`int`): Number of angles, even unless `kind` is `"fourier"`.
    """
    if kind == "fourier":
        # evenly spread quantiles of a Gaussian in polar coordinates instead of random draws, which would have to be
        # stored; half the directions will do, as a frequency and its opposite have the same features
        i = torch.arange(num_angles, dtype=torch.float32, device=positions.device)
        radius = math.pi / 8 * (-2 * torch.log1p(-(i + 0.5) / num_angles)).sqrt()  # pi / 8: half a turn in 8 tokens
        direction = math.pi * (i * (math.sqrt(5) - 1) / 2).frac()
        frequencies = radius * torch.stack([direction.cos(), direction.sin()])
    else:
        half = num_angles // 2
        i = torch.arange(half, dtype=torch.float32, device=positions.device)
        axis = torch.exp(-math.log(100 if kind == "relative" else 10_000) / half * i)
        frequencies = torch.stack([torch.cat([axis, 0 * axis]), torch.cat([0 * axis, axis])])  # (2, num_angles)
    return positions[:, :1] * frequencies[0] + positions[:, 1:] * frequencies[1]


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """
    Rotates the features of each token, in pairs, by the token's angles (rotary position embedding, arXiv 2104.09864): the
    product of two rotated tokens depends on the difference of their angles.

    Args:
        x (`torch.Tensor` of shape `(B, L, ..., d)`): The features; the first half is paired with the second.
        angles (`torch.Tensor` of shape `(L, d / 2)`): The angles.
    """
    angles = angles.view(len(angles), *[1] * (x.ndim - 3), -1)  # (L, ..., d / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class TransformerBlock(nn.Module):
    """
    Self-attention and an MLP, each scaled, shifted and gated by the embedding of time and class (adaLN-zero):

        x = x + gate1 * attention((1 + scale1) * norm(x) + shift1)
        x = x + gate2 * mlp((1 + scale2) * norm(x) + shift2)

    It starts as the identity. With a long skip, `x` is first a linear function of `x` and an earlier block's output.

    Args:
        config (`dict`): Config of the [`TinyTransformer2DModel`], with a number `E` for `time_embedding_dim`.
        has_skip (`bool`): Whether it ends a long skip.
    """

    def __init__(self, config: dict, has_skip: bool = False):
        super().__init__()
        self.head_dim = config["attention_head_dim"]  # d
        width = config["num_attention_heads"] * self.head_dim  # D
        hidden = max(1, int(config["mlp_ratio"] * width))
        self.skip_proj = nn.Linear(2 * width, width) if has_skip else None
        self.modulation = nn.Linear(config["time_embedding_dim"], 6 * width)
        self.norm1 = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), ACTIVATIONS[config["act_fn"]](), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config["dropout"])

        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        if has_skip:
            nn.init.eye_(self.skip_proj.weight)
            nn.init.zeros_(self.skip_proj.bias)

    def forward(
        self,
        x: torch.Tensor,
        emb: torch.Tensor,
        angles: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, D), (B, E), (L, d / 2), (B, L, D) -> (B, L, D)"""
        if skip is not None:
            x = self.skip_proj(torch.cat([x, skip], dim=-1))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        h = self.attend(torch.addcmul(shift1, 1 + scale1, self.norm1(x)), angles)
        x = torch.addcmul(x, gate1, self.dropout(h))
        h = self.mlp(torch.addcmul(shift2, 1 + scale2, self.norm2(x)))
        return torch.addcmul(x, gate2, self.dropout(h))

    def attend(self, x: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
        """(B, L, D), (L, d / 2) -> (B, L, D)"""
        qkv = self.to_qkv(x).unflatten(-1, (3, -1, self.head_dim))  # (B, L, 3, heads, d)
        if angles is not None:
            qkv = torch.cat([rotate(qkv[:, :, :2], angles), qkv[:, :, 2:]], dim=2)
        return self.to_out(self_attention(qkv).flatten(2))


class TinyTransformer2DModel(ModelMixin, ConfigMixin):
    """
    A transformer that takes noisy small images and their timesteps and returns a prediction of the same height and width.
    It is called like [`UNet2DModel`] and takes its place in every pipeline.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 32):
            Side of square images, or height and width: multiples of `patch_size`. Unless its position embedding is
            learned, the network also takes images of other such sizes.
        in_channels (`int`, *optional*, defaults to 3): Input channels.
        out_channels (`int`, *optional*, defaults to 3): Output channels, twice `in_channels` for a learned variance.
        patch_size (`int`, *optional*, defaults to 4):
            1, 2 or 4. Each patch of this size is a token: halving it costs four times as much, and more in attention.
        num_layers (`int`, *optional*, defaults to 6): Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 4): Number of heads. The width is this number times
            `attention_head_dim`.
        attention_head_dim (`int`, *optional*, defaults to 64): Features of a head.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Width of the MLPs' hidden layers, as a multiple of the width.
        position_embedding (`str`, *optional*, defaults to `"sinusoidal"`):
            `"none"` (the network then can't tell its tokens' places apart), `"sinusoidal"` (of the row and the column, as
            in DiT), `"fourier"` (Gaussian Fourier features of both, arXiv 2006.10739), `"learned"` (a vector for each
            token) or `"relative"` (rotary embedding of queries and keys by row and column, arXiv 2104.09864).
        long_skips (`bool`, *optional*, defaults to `False`):
            Whether the first blocks' outputs are joined to the inputs of the last, as in a U-Net (arXiv 2209.12152).
        dropout (`float`, *optional*, defaults to 0.0): Dropout after attention and after the MLPs.
        time_embedding (`str`, *optional*, defaults to `"sinusoidal"`):
            `"sinusoidal"` (arXiv 1706.03762), `"fourier"` (Gaussian Fourier features, arXiv 2006.10739) or `"learned"`
            (a vector for each of `num_train_timesteps`, which raises an error for any other timestep).
        time_embedding_dim (`int`, *optional*):
            Size of the embedding of time and class. Defaults to the width. Each block has `6 * width` rows of it.
        act_fn (`str`, *optional*, defaults to `"gelu"`): Activation of the MLPs, `"silu"` or `"gelu"`.
        num_class_embeds (`int`, *optional*):
            Number `K` of classes. The network then has `K + 1` rows, of which row `K` stands for no class.
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
    >>> from tiny_diffusers import TinyTransformer2DModel

    >>> transformer = TinyTransformer2DModel(sample_size=32, num_class_embeds=10)
    >>> sample = torch.randn(4, 3, 32, 32)
    >>> transformer(sample, timestep=999, class_labels=torch.tensor([0, 1, 2, 10])).sample.shape
    torch.Size([4, 3, 32, 32])
    ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 4,
        num_layers: int = 6,
        num_attention_heads: int = 4,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        position_embedding: str = "sinusoidal",
        long_skips: bool = False,
        dropout: float = 0.0,
        time_embedding: str = "sinusoidal",
        time_embedding_dim: int | None = None,
        act_fn: str = "gelu",
        num_class_embeds: int | None = None,
        num_train_timesteps: int = 1000,
        num_conditions: int | None = None,
        num_augment_labels: int | None = None,
        x_prediction: bool = False,
    ):
        super().__init__()
        self.register_to_config(sample_size=as_sample_size(sample_size))
        _check_config(self.config)
        width = num_attention_heads * attention_head_dim
        time_embedding_dim = time_embedding_dim or width
        self.register_to_config(time_embedding_dim=time_embedding_dim)
        self.gradient_checkpointing = False

        # embeddings; blocks and output have DiT's activation of them, whatever that of the MLPs is
        self.time_embed = TimeEmbedding(
            time_embedding, NUM_TIME_FEATURES, time_embedding_dim, "silu", num_train_timesteps
        )
        self.class_embed = None if num_class_embeds is None else ClassEmbedding(num_class_embeds, time_embedding_dim)
        self.condition_embed = None
        if num_conditions is not None:
            self.condition_embed = ConditionEmbedding(num_conditions, time_embedding_dim)
        self.augment_embed = None
        if num_augment_labels is not None:
            self.augment_embed = nn.Linear(num_augment_labels, time_embedding_dim, bias=False)
        self.act = nn.SiLU()
        self.patch_embed = nn.Linear(in_channels * patch_size**2, width)
        self.pos_embed = None
        if position_embedding == "learned":
            self.pos_embed = nn.Parameter(0.02 * torch.randn(_count_tokens(self.config), width))

        # blocks: with long skips, the second half ends those that the first begins
        self.num_skips = num_layers // 2 if long_skips else 0
        first_end = num_layers - self.num_skips
        self.blocks = nn.ModuleList(TransformerBlock(self.config, i >= first_end) for i in range(num_layers))

        self.norm_out = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation_out = nn.Linear(time_embedding_dim, 2 * width)
        self.proj_out = nn.Linear(width, out_channels * patch_size**2)
        for layer in (self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        conditions: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
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
            [`~models.modeling_outputs.Transformer2DModelOutput`] or `tuple`: With `sample` of shape
            `(B, out_channels, height, width)`, in the dtype of the input.

        Raises:
            ValueError: If a shape does not fit the network, if a label or a learned timestep is out of range (on a
                CPU), or if labels, conditions or labels of augmentation are given to a network without them.
        """
        check_shape("sample", sample, self.config.in_channels, "height", "width")
        B, _, H, W = sample.shape
        patch_size, size = self.config.patch_size, height_and_width(self.config.sample_size)
        if self.pos_embed is not None and (H, W) != size:
            raise ValueError(
                f"sample has height {H} and width {W}: this network has learned positions and takes {size[0]} and "
                f"{size[1]}."
            )
        if H % patch_size or W % patch_size:
            raise ValueError(f"sample has height {H} and width {W}: this network takes multiples of {patch_size}.")
        timesteps = torch.as_tensor(timestep, device=sample.device)
        if timesteps.numel() not in (1, B):
            raise ValueError(f"timestep has shape {tuple(timesteps.shape)}: give one, or one for each of {B} images.")
        timesteps = timesteps.reshape(-1).expand(B)

        # 1. embeddings of time, class and conditions
        emb = self.time_embed(timesteps)  # (B, E)
        for other in (
            embed_classes(self.class_embed, class_labels, B),
            embed_conditions(self.condition_embed, conditions, B),
            embed_augmentation(self.augment_embed, augment_labels, B),
        ):
            emb = emb if other is None else emb + other
        emb = self.act(emb)  # once, for all blocks

        # 2. patches as tokens, with their positions
        x = F.pixel_unshuffle(sample.to(self.patch_embed.weight.dtype), patch_size)  # (B, C p^2, H / p, W / p)
        h, w = x.shape[-2:]
        x = self.patch_embed(x.flatten(2).transpose(1, 2))  # (B, L, D)
        table, angles = self._embed_positions(h, w, sample.device)
        if table is not None:
            x = x + table.to(x.dtype)

        # 3. blocks
        skips = []
        for i, block in enumerate(self.blocks):
            skip = skips.pop() if block.skip_proj is not None else None
            x = self._run(block, x, emb, angles, skip)
            if i < self.num_skips:
                skips.append(x)

        # 4. images
        shift, scale = self.modulation_out(emb)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        x = self.proj_out(torch.addcmul(shift, 1 + scale, self.norm_out(x)))
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(-1, (h, w)), patch_size)
        if self.config.x_prediction:
            x = velocity_of_x0(x, sample, timesteps, self.config.num_train_timesteps)
        x = x.to(sample.dtype)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def _embed_positions(
        self, h: int, w: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns what is added to the tokens, (L, D), and the angles of queries and keys, (L, d / 2), as there are any."""
        kind = self.config.position_embedding
        if kind in ("none", "learned"):
            return self.pos_embed, None
        positions = grid_positions(h, w, device)
        if kind == "relative":
            return None, position_angles(positions, kind, self.config.attention_head_dim // 2)
        angles = position_angles(positions, kind, self.patch_embed.out_features // 2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1), None

    def _run(self, block: TransformerBlock, *args: torch.Tensor | None) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
