"""Outputs of a run beside its checkpoints: settings and facts, sample grids, the pipeline, the card."""

import contextlib
import copy
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from .. import __version__, cards, hub, plots
from ..data.folders import abbreviate
from ..errors import UserError, say
from ..hardware import default_dtype, machine_name
from ..progress import bar_options
from .arguments import TrainingArguments, command_line, saved_settings, split_paths


if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)

Draw = Callable[[Any, int, int], tuple[list, dict]]  # of a family: pipeline, number of images, seed -> a grid's images


def write_run_files(trainer: "Trainer") -> None:
    """Writes `config.yaml`, the settings as a recipe that makes the run again, and `run.json`, facts of this machine."""
    trainer.folder.write_config(saved_settings(trainer.settings))
    trainer.folder.keep_paths(split_paths(trainer.settings)[1])
    trainer.folder.write_facts(
        {
            "command": command_line(trainer.settings),
            "data": data_facts(trainer),
            "vae_sha256": trainer.data.vae_sha256,
            "parameters": {name: count_parameters(module) for name, module in trainer.family.modules.items()},
            "device": str(trainer.device),
            "machine": machine_name(trainer.device),
            "processes": trainer.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "global_batch": trainer.batches.global_batch,
            "versions": {
                "tiny-diffusers": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
    )


def write_effort(trainer: "Trainer") -> None:
    """Adds to `run.json` the steps taken and the seconds of the loop, unless a kill has lost some of them."""
    if not trainer.accelerator.is_main_process:
        return
    effort = {"steps": trainer.step}
    if trainer.earlier_seconds is not None:
        effort["seconds"] = round(trainer.earlier_seconds + trainer.seconds, 1)
    trainer.folder.write_facts(trainer.folder.read_facts() | effort)


def data_facts(trainer: "Trainer") -> dict[str, Any]:
    """Describes the training data for `run.json` and the card."""
    data, statistics = trainer.data, trainer.family.condition_statistics
    return {
        "name": data.name,
        "split": data.split,
        "images": len(data),
        "held_out": trainer.batches.num_held_out,
        "shape": list(data.images.shape[1:]),
        "classes": list(data.id2label.values()) if data.id2label else None,
        **({} if statistics is None else {"conditions": statistics.ranges}),
        "fingerprint": data.fingerprint,
        "notes": data.public_notes,
        **({} if data.value_range is None else {"value_range": list(data.value_range)}),
    }


def describe_data(facts: dict[str, Any]) -> str:
    """Returns the number, shape, name and split of the images that [`data_facts`] describe, as far as they are known."""
    return f"{facts.get('images')} images {facts.get('shape')} of {facts.get('name')} ({facts.get('split')})"


def print_summary(trainer: "Trainer") -> None:
    """Prints what is trained, on what, and how."""
    data, settings = trainer.data, trainer.settings
    for note in data.notes:
        say(f"data: {note}")
    statistics = trainer.family.condition_statistics
    if statistics is not None:
        say(f"conditions: {abbreviate([f'{name} {values}' for name, values in statistics.ranges.items()])}")
    modules = trainer.family.modules.items()
    parameters = ", ".join(f"{name} {count_parameters(module) / 1e6:.2f} M" for name, module in modules)
    say(
        f"{settings.FAMILY}: {len(trainer.batches.train_indices):,} images {tuple(data.images.shape[1:])} of {data.name}, "
        f"{trainer.max_steps:,} steps of {trainer.batches.global_batch}; {parameters} parameters"
    )
    if trainer.batches.num_held_out:
        say(
            f"held out for the validation loss: {trainer.batches.num_held_out:,} further images "
            f"(--validation_split {settings.validation_split:g})"
        )
    say(
        f"on {trainer.device} x {trainer.accelerator.num_processes}, {torch.get_num_threads()} threads, "
        f"mixed precision {settings.mixed_precision}, {str(trainer.memory_format).removeprefix('torch.')}, "
        f"{'fused ' if trainer.fuses else ''}{settings.optimizer}, "
        f"{'foreach' if settings.use_ema else 'no'} EMA, into {trainer.folder.path}"
    )
    if trainer.time_plan is not None:
        say(trainer.time_plan.describe(trainer.elapsed))


def build_pipeline(trainer: "Trainer", networks: dict[str, nn.Module]) -> Any:
    """Builds the family's pipeline around networks, for the values of the training data."""
    pipeline = trainer.family.pipeline(networks)
    if trainer.data.value_range is not None:
        pipeline.register_to_config(value_range=dict(zip(("low", "high"), trainer.data.value_range, strict=True)))
    pipeline.show_channels = trainer.settings.show_channels
    return pipeline


def save_pipeline(trainer: "Trainer") -> None:
    """Saves the pipeline around the EMA networks, with the code that it needs."""
    networks = trainer.networks()
    trainer.family.measure(networks, trainer.batches.measured())
    hub.export(build_pipeline(trainer, networks), trainer.folder.path)


def save_pipeline_config(trainer: "Trainer", folder: Path) -> None:
    """Saves all of the pipeline but the trained networks: with these it is `TinyPipeline.from_pretrained(folder)`."""
    pipeline = build_pipeline(trainer, trainer.networks())
    for name, component in pipeline.components.items():
        if name not in trainer.family.modules:
            component.save_pretrained(folder / name)
    pipeline.save_config(folder)


def draw_grid(trainer: "Trainer", draw: Draw, num_images: int) -> Image.Image | None:
    """
    Draws a sample grid with copies of the networks, cast to the dtype that the hardware multiplies fastest.

    Args:
        trainer (`Trainer`): The run.
        draw (`Callable`): The family's `sample` or `preview`.
        num_images (`int`): Number of images.

    Returns:
        `PIL.Image.Image` or None: None, with a warning, if samples are not finite: no reason to lose the run.
    """
    dtype = default_dtype(trainer.device)
    # nn.Module's own `to`: that of diffusers warns at every cast
    copies = {name: nn.Module.to(copy.deepcopy(module).eval(), dtype) for name, module in trainer.networks().items()}
    pipeline = build_pipeline(trainer, copies)
    pipeline.set_progress_bar_config(desc="samples", leave=False, delay=2, **bar_options())
    try:
        images, options = draw(pipeline, num_images, trainer.settings.seed)
    except ValueError as error:
        logger.warning(f"no samples at step {trainer.step}: {error}")
        return None
    return plots.image_grid(images, **options)


def save_grid(trainer: "Trainer", path: Path, draw: Draw) -> None:
    """Saves a sample grid."""
    grid = draw_grid(trainer, draw, trainer.settings.eval_batch_size)
    if grid is None:
        return
    trainer.folder.record(path)
    path.parent.mkdir(exist_ok=True)
    grid.save(path)


def save_results(trainer: "Trainer") -> None:
    """Saves the pipeline, the pictures and the card, and pushes them if asked to."""
    folder, settings = trainer.folder, trainer.settings
    with folder.writing(lambda: trainer.step):
        save_pipeline(trainer)
        say(f"drawing the samples, {folder.samples} ...")
        save_grid(trainer, folder.samples, trainer.family.sample)
        folder.record(folder.animation, folder.loss_curves)
        grids = folder.list_grids()
        if grids:  # all from the same latents
            plots.animation([*grids, folder.samples], folder.animation)
        with contextlib.suppress(UserError):  # a run that is cut short may have logged no loss yet
            plots.loss_curves(folder.log, folder.loss_curves)
        cards.write_card(
            folder.path,
            model_name=settings.hub_model_id or folder.path.name,
            command=command_line(settings),
            settings=scalar_settings(settings),
            data=data_facts(trainer),
            hub_model_id=settings.hub_model_id,
            license=settings.license,
            base_model=settings.pretrained_model_name_or_path,
        )
    say(f"saved to {folder.path}: look at {folder.samples}")
    if settings.push_to_hub:
        hub.push(folder.path, _repo_id(settings), token=settings.hub_token, private=settings.hub_private_repo)


def check_can_push(settings: TrainingArguments) -> None:
    """Checks that the push to come can succeed."""
    if settings.push_to_hub:
        hub.check_can_push(_repo_id(settings), settings.hub_token)


def _repo_id(settings: TrainingArguments) -> str:
    return settings.hub_model_id or Path(settings.output_dir).name


def scalar_settings(settings: TrainingArguments) -> dict[str, Any]:
    """Returns the settings as trackers and cards take them: numbers and words, no secrets."""
    return {
        key: value if isinstance(value, (int, float, str, bool)) or value is None else str(value)
        for key, value in saved_settings(settings).items()
    }


def count_parameters(module: nn.Module) -> int:
    """Counts the parameters of a network."""
    return sum(parameter.numel() for parameter in module.parameters())
