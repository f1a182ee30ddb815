"""Layers of a network: their names, types, output shapes and parameters, and the resolutions of a diagram."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import nn

from .models.layers_tiny import height_and_width
from .models.pixelcnn_tiny import TinyPixelCNNModel
from .models.transformer_tiny import TransformerBlock
from .models.unet_tiny import TinyUNet2DModel
from .plots import Stage


class LayerRow(NamedTuple):
    """Row of a layer table. `shape` is that of the output for one image, None for a layer that did not run."""

    name: str
    type: str
    shape: tuple[int, ...] | None
    parameters: int
    has_attention: bool


def summarize(network: nn.Module, leaves: bool = False) -> list[LayerRow]:
    """
    Lists the layers of a network in the order in which they run, each with its own parameters: the sum is the network's.

    Args:
        network (`nn.Module`): A network of this package, or a stock [`UNet2DModel`].
        leaves (`bool`): List each convolution, norm and linear layer, instead of the blocks that hold them.
    """
    shapes, order = _run(network)
    counted: set[nn.Parameter] = set()

    def count(parameters: Iterator[nn.Parameter]) -> int:
        new = set(parameters) - counted  # weights that two layers share are counted once
        counted.update(new)
        return sum(parameter.numel() for parameter in new)

    def rows(module: nn.Module, name: str) -> Iterator[tuple[int, LayerRow]]:
        children = dict(module.named_children())
        has_lists = bool(children) and all(isinstance(child, nn.ModuleList) for child in children.values())
        is_block = bool(name) and module in shapes and not leaves and not has_lists
        own = dict(module.named_parameters(recurse=False))
        if is_block or not children or (name and own and module in shapes):
            has_attention = any(_is_attention(part) for part in module.modules())
            parameters = module.parameters() if is_block else iter(own.values())
            row = LayerRow(name, type(module).__name__, shapes.get(module), count(parameters), has_attention)
            if row.shape is not None or row.parameters:
                yield order.get(module, len(order)), row
        else:
            for own_name, parameter in own.items():
                full_name = f"{name}.{own_name}" if name else own_name
                shape = tuple(parameter.shape)
                yield len(order), LayerRow(full_name, "Parameter", shape, count(iter([parameter])), False)
        if is_block:
            return
        for child_name, child in children.items():
            yield from rows(child, f"{name}.{child_name}" if name else child_name)

    return [row for _, row in sorted(rows(network, ""), key=lambda pair: pair[0])]


def _is_attention(part: nn.Module) -> bool:
    return isinstance(part, TransformerBlock) or "attention" in type(part).__name__.lower()


def stages(network: nn.Module) -> list[Stage]:
    """
    Returns the parts of a network's diagram: consecutive layers of one resolution together, vectors and embeddings.

    Args:
        network (`nn.Module`): A network of this package, or a stock [`UNet2DModel`].
    """
    shapes, _ = _run(network)
    inputs = next(iter(_example_inputs(network).values()))
    channels_last = isinstance(network, TinyPixelCNNModel)
    embeddings, flow = [], []  # of the flow: (size, rows, widths)
    for row in summarize(network):
        # in a transformer, patches are embedded as well, and modulation_out is of the time alone
        is_embedding = "embed" in row.name and row.name not in ("patch_embed", "pos_embed")
        if is_embedding or row.name == "modulation_out" or row.type == "Timesteps":
            if row.parameters:
                embeddings.append(Stage(row.name, [_shape(row.shape)], 0, "embedding"))
            continue
        if row.shape is None or row.type == "Parameter" or len(row.shape) not in (1, 2, 3):
            continue
        if len(row.shape) == 1 and (channels_last or not row.parameters):  # of the classes; of no weights
            continue
        if len(row.shape) == 3:
            size, width = (row.shape[:2], row.shape[2]) if channels_last else (row.shape[1:], row.shape[0])
            if flow and row.type == "CausalConv2d" and size == (1, flow[-1][0][1]):
                size = flow[-1][0]  # of a row LSTM, which runs row by row
        elif len(row.shape) == 2:  # tokens of a transformer
            size, width = tuple(side // network.config.patch_size for side in inputs.shape[2:]), row.shape[1]
        else:
            size, width = (), row.shape[0]
        if not flow or flow[-1][0] != size:
            flow.append((size, [], []))
        flow[-1][1].append(row)
        flow[-1][2].append(width)

    middle = []
    for size, rows, widths in flow:
        distinct = [str(width) for width, _ in itertools.groupby(widths)]
        shown = distinct if len(distinct) <= 3 else [distinct[0], "...", distinct[-1]]
        layers = f"{len(rows)} layer{'s' if len(rows) > 1 else ''}"
        count = f"{sum(row.parameters for row in rows):,} weights"
        title = _shape(size) if size else "vector"
        has_attention = any(row.has_attention for row in rows)
        lines = [" → ".join(shown) + (" channels" if size else ""), layers, count]
        middle.append(Stage(title, lines, max(size, default=0), "maps" if size else "vector", has_attention))
    first, last = tuple(inputs.shape[1:]), shapes[network]
    ends = [
        Stage(name, [_shape(shape)], max(shape[-2:]) if len(shape) > 1 else 0, "end")
        for name, shape in (("input", first), ("output", last))
    ]
    if isinstance(network, (TinyUNet2DModel, UNet2DModel)) or network.config.get("variant") == "plusplus":
        _add_skips(middle, offset=1)
    return [ends[0], *middle, ends[1], *embeddings]


def _add_skips(middle: list[Stage], offset: int) -> None:
    """Connects each stage with the next one of its resolution, where all between are coarser."""
    for i, stage in enumerate(middle):
        same = next((j for j in range(i + 2, len(middle)) if middle[j].side == stage.side), None)
        if same is not None and all(between.side < stage.side for between in middle[i + 1 : same]):
            stage.skips_to = same + offset


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _example_inputs(network: nn.Module) -> dict[str, Any]:
    """Returns inputs for one image."""
    config, names = network.config, inspect.signature(network.forward).parameters
    if "latents" in names:
        inputs: dict[str, Any] = {"latents": torch.zeros(1, config.latent_dim)}
    else:
        if config.get("sample_size") is None:
            raise ValueError("The network's config has no `sample_size`: set it to the side of its images in pixels.")
        inputs = {"sample": torch.zeros(1, config.in_channels, *height_and_width(config.sample_size))}
    if "timestep" in names:
        inputs["timestep"] = 0
    if "class_labels" in names and config.get("num_class_embeds"):
        inputs["class_labels"] = torch.zeros(1, dtype=torch.long)
    if "conditions" in names and config.get("num_conditions"):
        inputs["conditions"] = torch.zeros(1, config.num_conditions)
    return {name: value.to(network.device) if hasattr(value, "to") else value for name, value in inputs.items()}


@torch.no_grad()
def _run(network: nn.Module) -> tuple[dict[nn.Module, tuple[int, ...]], dict[nn.Module, int]]:
    """Runs a network on one image; returns the output shape of each module that ran, without the batch, and the order."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    order: dict[nn.Module, int] = {}

    def before(module: nn.Module, args: tuple) -> None:
        order.setdefault(module, len(order))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        while not isinstance(output, torch.Tensor):
            output = next(iter(output.values() if isinstance(output, dict) else output), None)
            if output is None:
                return
        shapes.setdefault(module, tuple(output.shape[1:]))

    hooks = [module.register_forward_pre_hook(before) for module in network.modules()]
    hooks += [module.register_forward_hook(after) for module in network.modules()]
    try:
        network.eval()(**_example_inputs(network))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes, order
