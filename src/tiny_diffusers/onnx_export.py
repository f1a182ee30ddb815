"""Export of a pipeline's network to ONNX, to sample where there is no PyTorch."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from torch import nn

from .errors import UserError, not_installed
from .pipelines.pipeline_tiny import objective_of


class _Forward(nn.Module):
    """A network's function of its inputs alone, which returns a tensor."""

    def __init__(self, network: nn.Module, function: Callable, names: list[str]):
        super().__init__()
        self.network, self.function, self.names = network, function, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output = self.function(**dict(zip(self.names, inputs, strict=True)))
        return output if isinstance(output, torch.Tensor) else output.sample


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporter from warning of deprecated parts of torch that it uses, and of a missing torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def export_onnx(pipe: DiffusionPipeline, directory: str | Path) -> Path:
    """
    Saves the network that a pipeline samples with as `directory/NAME/model.onnx`, in float32 and for any batch size B. Its
    config and that of the scheduler lie beside it, as `pipe.save_pretrained` lays them.

    Inputs, as far as the network has them, and the output `out_sample`:
    - `sample`: float32 `(B, C, H, W)`; a U-Net's x_t, followed by the channels of a conditioning image if it takes one; a
      PixelCNN's image in [0, 1];
    - `timestep`: int64 `(B,)`, or float32 for rectified flow and EDM;
    - `latents`: float32 `(B, latent_dim)`, of a DCGAN or of a VAE, whose decoder it is that is saved;
    - `class_labels`: int64 `(B,)`, the null class included;
    - `conditions`: float32 `(B, D)`, standardized as the pipeline's `condition_statistics` says; a row of NaN for none.

    Args:
        pipe (`DiffusionPipeline`): A pipeline of this package, in float32.
        directory (`str` or `Path`): The folder to save it in; created if it doesn't exist.

    Returns:
        `Path`: The ONNX file.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If ONNX is not installed, or the pipeline has an `AutoencoderKL`.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise not_installed("ONNX", "onnx") from error

    if any(isinstance(component, AutoencoderKL) for component in pipe.components.values()):
        raise UserError(
            f"A {type(pipe).__name__} with an AutoencoderKL can't be saved as ONNX, which knows no latents here."
        )
    network = pipe._network
    function = getattr(network, "decode", network.forward)
    config = network.config
    num_classes = config.get("num_class_embeds")
    scheduler = getattr(pipe, "scheduler", None)
    is_continuous = scheduler is not None and objective_of(scheduler) != "betas"
    channels, *size = pipe._image_shape
    examples = {
        "sample": torch.zeros(2, config.get("in_channels", channels), *size) if "latent_dim" not in config else None,
        "timestep": torch.zeros(2, dtype=torch.float32 if is_continuous else torch.int64),
        "latents": torch.zeros(2, config.get("latent_dim", 0)),
        "class_labels": None if num_classes is None else torch.zeros(2, dtype=torch.int64),
        "conditions": torch.zeros(2, config.num_conditions) if config.get("num_conditions") else None,
    }
    names = [name for name in inspect.signature(function).parameters if examples.get(name) is not None]
    folder = Path(directory) / pipe._network_name
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        program = torch.onnx.export(
            _Forward(network.eval(), function, names),
            tuple(examples[name] for name in names),
            input_names=names,
            output_names=["out_sample"],
            dynamic_shapes=((({0: torch.export.Dim("batch")},) * len(names)),),  # of the one argument *inputs
            dynamo=True,
            verbose=False,
        )
    program.save(folder / "model.onnx")
    network.save_config(folder)
    for name, component in pipe.components.items():
        if isinstance(component, SchedulerMixin):
            component.save_pretrained(Path(directory) / name)
    return folder / "model.onnx"
