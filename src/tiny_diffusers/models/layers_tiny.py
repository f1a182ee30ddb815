"""
The embeddings of time, class and conditions, the attention and the argument checks that the networks share.

The file travels with checkpoints as part of a network's code, so it imports none of its siblings, and the networks
reuse none of its names.
"""

import difflib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU}

# Limits that keep a config from elsewhere from allocating more memory than a network for small images needs
OPTIONAL_SIZES = {
    "hidden_channels": (1, 4096),
    "num_layers": (1, 64),
    "norm_num_groups": (1, 4096),
    "attention_head_dim": (1, 4096),
    "time_embedding_dim": (1, 16384),
    "num_class_embeds": (1, 100_000),
    "num_conditions": (1, 4096),
    "num_augment_labels": (1, 4096),
}
SIZES = {
    **OPTIONAL_SIZES,
    "sample_size": (1, 1024),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "latent_dim": (1, 65536),
    "block_out_channels": (1, 4096),
    "layers_per_block": (1, 32),
    "num_attention_heads": (1, 256),
    "num_train_timesteps": (1, 100_000),
    "class_embed_dim": (1, 1024),
    "num_levels": (2, 65536),
    "num_mixtures": (1, 1024),
    "num_frequencies": (0, 16),
    "dilations": (1, 256),
}
MIN_LEVEL = 1e-3  # of the noise: a predicted image is divided by no less
MAX_LEVELS = 8
MAX_PARAMETERS = 4e9


class ClassEmbedding(nn.Module):
    """
    Embedding of K classes, and of no class in row K.

    Args:
        num_class_embeds (`int`): Number `K` of classes.
        embedding_dim (`int`): Size `D` of the embedding.
        conditioning (`str`): `"add"` (a table of K + 1 rows) or `"scale"` (one-hot, linear, activation, linear).
        act_fn (`str`): `"silu"` or `"gelu"`.
    """

    def __init__(self, num_class_embeds: int, embedding_dim: int, conditioning: str = "add", act_fn: str = "silu"):
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
        return self.mlp(self.table(class_weights(class_labels, batch_size, self.num_class_embeds, self.table.weight)))


def embed_classes(class_embed: ClassEmbedding | None, labels: torch.Tensor | None, B: int) -> torch.Tensor | None:
    """Applies `class_embed`, or returns None for a network without classes."""
    if class_embed is not None:
        return class_embed(labels, B)
    refuse_labels(labels)
    return None


def class_weights(labels: torch.Tensor | None, B: int, K: int, table: torch.Tensor) -> torch.Tensor:
    """
    Converts labels (B,), mixing weights (B, K + 1), or None for no class (row K) to weights of a class table's rows,
    (B, K + 1), in the table's dtype. Raises a ValueError for another shape or, on a CPU, a label out of range.
    """
    if labels is None:
        labels = torch.full((B,), K, device=table.device)
    mixes = labels.is_floating_point()
    if labels.shape != ((B, K + 1) if mixes else (B,)):
        raise ValueError(
            f"class_labels has shape {tuple(labels.shape)} and {labels.dtype}: for {B} images of {K} classes it must "
            f"be integers of shape ({B},), or floats of shape ({B}, {K + 1}) that mix the classes, the last being no "
            "class."
        )
    if not mixes:
        check_range("class label", labels, K + 1)
        labels = F.one_hot(labels.long(), K + 1)
    return labels.to(table.dtype)


def refuse_labels(class_labels: torch.Tensor | None) -> None:
    """Raises a ValueError if labels are given to a network without classes."""
    if class_labels is not None:
        raise ValueError(
            "class_labels were given to a network without classes: leave them out, or build it with num_class_embeds."
        )


class ConditionEmbedding(nn.Module):
    """
    Embedding of standardized numbers by an MLP: linear, activation, linear; and a learned vector for no conditions.

    Args:
        num_conditions (`int`): Number `D` of conditions.
        embedding_dim (`int`): Size `E` of the embedding.
        act_fn (`str`): `"silu"` or `"gelu"`.
    """

    def __init__(self, num_conditions: int, embedding_dim: int, act_fn: str = "silu"):
        super().__init__()
        self.num_conditions = num_conditions
        self.linear1 = nn.Linear(num_conditions, embedding_dim)
        self.act = ACTIVATIONS[act_fn]()
        self.linear2 = nn.Linear(embedding_dim, embedding_dim)
        self.null = nn.Parameter(torch.randn(embedding_dim))

    def forward(self, conditions: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """Conditions (B, D), NaN in a row for none of this image, or None for none at all -> (B, E)"""
        shape = (batch_size, self.num_conditions)
        if conditions is None:
            conditions = self.null.new_full(shape, math.nan)
        if conditions.shape != shape or not conditions.is_floating_point():
            raise ValueError(
                f"conditions has shape {tuple(conditions.shape)} and {conditions.dtype}: for {batch_size} images of this "
                f"network it must be floats of shape {shape}, standardized; a row of NaN stands for no conditions."
            )
        is_null = conditions.isnan().any(dim=1, keepdim=True)  # (B, 1)
        values = conditions.masked_fill(is_null, 0).to(self.linear1.weight.dtype)
        embedding = self.linear2(self.act(self.linear1(values)))
        return torch.where(is_null, self.null.to(embedding.dtype), embedding)


def embed_conditions(
    condition_embed: ConditionEmbedding | None, conditions: torch.Tensor | None, B: int
) -> torch.Tensor | None:
    """Applies `condition_embed`, or returns None for a network without conditions."""
    if condition_embed is not None:
        return condition_embed(conditions, B)
    if conditions is not None:
        raise ValueError(
            "conditions were given to a network without them: leave them out, or build it with num_conditions."
        )
    return None


def embed_augmentation(augment_embed: nn.Linear | None, labels: torch.Tensor | None, B: int) -> torch.Tensor | None:
    """Returns the embedding of what was done to the images, (B, E), or None if nothing was."""
    if labels is None:
        return None
    if augment_embed is None:
        raise ValueError("The network takes no labels of augmentation: leave out `augment_labels`.")
    check_shape("augment_labels", labels, augment_embed.in_features)
    if len(labels) != B:
        raise ValueError(f"`augment_labels` must be a row for each of {B} images, got {len(labels)}.")
    return augment_embed(labels.to(augment_embed.weight.dtype))


def embed_both(
    class_embed: ClassEmbedding | None,
    condition_embed: ConditionEmbedding | None,
    labels: torch.Tensor | None,
    conditions: torch.Tensor | None,
    B: int,
) -> torch.Tensor | None:
    """Returns the sum of the embeddings of classes and conditions, (B, E), or None for a network without either."""
    of_class, of_conditions = embed_classes(class_embed, labels, B), embed_conditions(condition_embed, conditions, B)
    if of_class is None or of_conditions is None:
        return of_conditions if of_class is None else of_class
    return of_class + of_conditions


def concat_embedding(x: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
    """Tiles an embedding, if there is one, over a feature map as further channels: (B, C, ...), (B, E) -> (B, C + E, ...)"""
    if embedding is None:
        return x
    tiled = embedding.view(*embedding.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return torch.cat([x, tiled.to(x.dtype)], dim=1)


class TimeEmbedding(nn.Module):
    """
    Embedding of the timestep: features, linear, activation, linear.

    Args:
        kind (`str`):
            `"sinusoidal"` (arXiv 1706.03762), `"fourier"` (Gaussian Fourier features of t / T, arXiv 2006.10739), or
            `"learned"` (a vector for each timestep, which is rounded to an integer).
        num_features (`int`): Number of features, even.
        embedding_dim (`int`): Size `D` of the embedding.
        act_fn (`str`): `"silu"` or `"gelu"`.
        num_train_timesteps (`int`): Number `T` of timesteps.
    """

    FOURIER_SCALE = 16.0  # standard deviation of the frequencies, as in arXiv 2011.13456

    def __init__(self, kind: str, num_features: int, embedding_dim: int, act_fn: str, num_train_timesteps: int):
        super().__init__()
        self.kind = kind
        self.num_train_timesteps = num_train_timesteps
        self.table = nn.Embedding(num_train_timesteps, num_features) if kind == "learned" else None
        self.linear1 = nn.Linear(num_features, embedding_dim)
        self.act = ACTIVATIONS[act_fn]()
        self.linear2 = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, D)"""
        if self.table is not None:
            index = timesteps.round().long()
            check_range("timestep", index, self.num_train_timesteps)
            features = self.table(index)
        else:
            features = self.features(timesteps.float()).to(self.linear1.weight.dtype)
        return self.linear2(self.act(self.linear1(features)))

    def features(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Computes cosines and sines in float32, whatever the dtype of the weights: (B,) -> (B, num_features)"""
        half = self.linear1.in_features // 2
        i = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        if self.kind == "sinusoidal":
            frequencies = torch.exp(-math.log(10000) / half * i)
        else:
            # quantiles of |N(0, scale^2)| instead of random draws, which would have to be stored and could be rounded
            quantiles = torch.tensor(_half_normal_quantiles(half), device=timesteps.device)
            frequencies = 2 * math.pi * self.FOURIER_SCALE * quantiles / self.num_train_timesteps
        angles = timesteps[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


@cache
def _half_normal_quantiles(count: int) -> list[float]:
    """Returns the quantiles (i + 1/2) / count of |N(0, 1)|."""
    return [statistics.NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)]


def velocity_of_x0(x_0: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor, T: int) -> torch.Tensor:
    """
    Returns the velocity of a rectified flow from a prediction of the image, (x_t - x_0) / s with s = t / T (arXiv
    2511.13720), in float32: (B, C, H, W), (B, C + K, H, W), (B,) -> (B, C, H, W)
    """
    level = (timesteps.float() / T).clamp(min=MIN_LEVEL)[:, None, None, None]
    return (x_t[:, : x_0.shape[1]].float() - x_0.float()) / level  # after the image come the channels of a condition


def self_attention(qkv: torch.Tensor) -> torch.Tensor:
    """Computes `softmax(q k^T / sqrt(d)) v` by the fastest function of the device: (B, L, 3, heads, d) -> (B, L, heads, d)"""
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        return _CPUAttention.apply(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _CPUAttention(torch.autograd.Function):
    """
    Computes `softmax(q k^T / sqrt(d)) v` on a CPU. Its gradient takes a fifth to a half of the time of
    `scaled_dot_product_attention`'s: it recomputes the probabilities, a few images at a time to fit the cache.
    """

    ELEMENTS_AT_ONCE = 2**20  # elements of the probabilities that are held at a time

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor) -> torch.Tensor:
        """(B, L, 3, heads, d) -> (B, L, heads, d)"""
        ctx.save_for_backward(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
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


def check_range(name: str, index: torch.Tensor, size: int) -> None:
    """Raises a ValueError if `index` leaves [0, size). Checks on a CPU only: a GPU would have to synchronize."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return
    low, high = index.aminmax()
    if low < 0 or high >= size:
        wrong = int(low if low < 0 else high)
        raise ValueError(f"{name} {wrong} is not known to this network: it must be from 0 to {size - 1}.")


def check_shape(name: str, tensor: torch.Tensor, *sizes: int | str) -> None:
    """Raises a ValueError unless `tensor` has shape (batch, *sizes). A string names a dimension of any size."""
    given = tensor.shape[1:]
    if len(given) != len(sizes) or any(a != b for a, b in zip(given, sizes, strict=True) if isinstance(b, int)):
        expected = ", ".join(map(str, sizes))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: this network takes (batch, {expected}).")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises a ValueError, with the closest match, unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"Unknown {name} {value!r}: it must be one of {', '.join(map(str, allowed))}.{hint}")


def as_sample_size(size: int | Sequence[int]) -> int | tuple[int, int]:
    """Returns a height and width as a config has them: the side of a square, or else a tuple. [12, 16] -> (12, 16)"""
    if not isinstance(size, (list, tuple)):
        return size
    return size[0] if len(size) == 2 and size[0] == size[1] else tuple(size)


def height_and_width(sample_size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns the height and the width of images: 32 -> (32, 32)"""
    return (sample_size, sample_size) if isinstance(sample_size, int) else sample_size


def check_sizes(config: Mapping, **limits: tuple[int, int]) -> None:
    """
    Raises a ValueError unless the sizes in a config are integers within `SIZES`, or within `limits`. Those of
    `OPTIONAL_SIZES` may be None, unless they are in `limits`. `sample_size` may be a pair.
    """
    for name, (low, high) in {**SIZES, **limits}.items():
        if name not in config or (config[name] is None and name in OPTIONAL_SIZES and name not in limits):
            continue
        given = config[name]
        is_pair = name == "sample_size" and isinstance(given, tuple) and len(given) == 2
        for value in given if is_pair or name in ("block_out_channels", "dilations") else (given,):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                pair = ", or a height and a width" if name == "sample_size" else ""
                raise ValueError(
                    f"{name} {value!r} is not possible: it must be an integer from {low} to {high}{pair}."
                )


def check_dropout(dropout: float) -> None:
    """Raises a ValueError unless `dropout` is in [0, 1)."""
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout!r} is not possible: it must be a number in [0, 1).")


def check_x_prediction(config: Mapping) -> None:
    """Raises a ValueError if a network is to predict the image and more, such as a variance."""
    given, own = config["in_channels"], config["out_channels"]
    if config["x_prediction"] and own > given:
        raise ValueError(
            f"x_prediction is not possible with out_channels {own} and in_channels {given}: the output is the velocity of "
            "the image, which has no further channels."
        )


def check_levels(config: Mapping, multiple: int, advice: str = "") -> None:
    """
    Raises a ValueError unless there are 1 to `MAX_LEVELS` levels and `multiple` divides the height and the width.
    `advice` says what else to change.
    """
    levels = len(config["block_out_channels"])
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"block_out_channels has {levels} levels: it must have 1 to {MAX_LEVELS}.")
    check_multiple(config, multiple, f"{levels} levels", f"{advice}or fewer levels in block_out_channels")


def check_multiple(config: Mapping, multiple: int, reason: str, advice: str) -> None:
    """Raises a ValueError, with the nearest size that is possible, unless `multiple` divides the height and the width."""
    size = height_and_width(config["sample_size"])
    if any(side % multiple for side in size):
        nearest = as_sample_size([max(multiple, multiple * round(side / multiple)) for side in size])
        given, nearest = (
            f"{value[0]}x{value[1]}" if isinstance(value, tuple) else value
            for value in (config["sample_size"], nearest)
        )
        raise ValueError(
            f"sample_size {given} is not possible with {reason}: each side must be a multiple of {multiple}. "
            f"Take another size, {advice}; the nearest size is {nearest}."
        )


def count_embedding(config: Mapping) -> tuple[int, int]:
    """Returns the size E of a config's embedding of class and conditions, 0 without either, and its parameters."""
    classes, conditions, E = config["num_class_embeds"], config["num_conditions"], config["class_embed_dim"]
    of_classes = 0 if classes is None else (classes + 1) * E
    of_conditions = 0 if conditions is None else (conditions + E + 3) * E
    return E if of_classes or of_conditions else 0, of_classes + of_conditions


def check_parameters(count: float, config: Mapping, names: Iterable[str], advice: str) -> None:
    """Raises a ValueError if the config entries in `names` make `count` parameters, more than `MAX_PARAMETERS`."""
    if count > MAX_PARAMETERS:
        given = ", ".join(f"{name} {config[name]}" for name in names)
        raise ValueError(
            f"A network with {given} has about {count:.0e} parameters: at most {MAX_PARAMETERS:.0e} are allowed. "
            f"{advice}"
        )
