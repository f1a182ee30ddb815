"""Surroundings of a train script: its exit status, the set-up of its processes, the loading of its data."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate import __version__ as accelerate_version
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin

from .. import hardware
from ..data import ImageData, load_images
from ..errors import UserError, exit_status, refusals, unknown
from ..pipelines.pipeline_tiny import TinyPipeline, check_shown_channels
from ..resolution import to_size
from .arguments import TrainingArguments
from .family import load_pretrained


logger = logging.getLogger(__name__)

# dtype -> accelerate's name for training in it
MIXED_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
_TRACKERS = ("tensorboard", "wandb", "trackio")


def launch(main: Callable[[], None]) -> int:
    """Runs a script's `main` and returns its exit status, as [`~tiny_diffusers.errors.exit_status`] does."""
    try:
        return exit_status(
            main, "error"
        )  # Ctrl-C before the first step or after the last: in between, the trainer has it
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def setup_process(arguments: TrainingArguments) -> Accelerator:
    """
    Sets up this process: torch's threads and memory, the device, mixed precision, the trackers.

    Raises:
        UserError: If a tracker is unknown or not installed, or if the hardware lacks the precision.
    """
    device = hardware.setup_torch(arguments.num_threads)
    trackers = [name for name in arguments.report_to.replace(" ", "").split(",") if name not in ("", "none")]
    for name in trackers:
        if name not in _TRACKERS:
            raise unknown("--report_to", name, [*_TRACKERS, "none"])
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(f"--report_to {name}: it is not installed; pip install {name}.") from error

    mixed_precision = arguments.mixed_precision
    if mixed_precision == "auto":  # the trainer may still take float32
        mixed_precision = MIXED_PRECISION[hardware.default_dtype(device)]
    _check_sharding(arguments)
    # On CPUs accelerate's launcher starts one process without MPI, however many were asked for; MASTER_PORT tells.
    asked = os.environ.get("WORLD_SIZE", "several" if "MASTER_PORT" in os.environ else "1")
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",  # otherwise accelerate takes each of torchrun's CPU processes for a single one
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            log_with=trackers or None,
            project_dir=Path(arguments.output_dir or "runs") / arguments.logging_dir,
            # DDP overwrites batch norm's statistics before each forward pass; torch then refuses the backward pass of
            # an earlier one. They play no part in training.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:  # such as fp16 without a GPU
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from error
    if asked != str(accelerator.num_processes):
        logger.warning(
            f"{asked} processes were asked for, but {accelerator.num_processes} runs; on CPUs start them with "
            f"torchrun --nproc_per_node N -m tiny_diffusers.train_scripts.train_{arguments.SCRIPT}, as accelerate launch "
            "does not."
        )
    return accelerator


def _check_sharding(arguments: TrainingArguments) -> None:
    """Refuses what accelerate can be configured for, but the training loop does not support."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UserError(
            "DeepSpeed steps its optimizer inside backward and resumes from pickles only: take FSDP, which shards a model "
            "over the processes too (docs/accelerate/fsdp.yaml), or plain data parallelism."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(
                "FSDP version 1 flattens the weights, which the EMA needs as they are: set fsdp_version: 2."
            )
        if not arguments.use_ema:
            raise UserError("--use_ema False: with FSDP the EMA is the one full copy of the network; leave it on.")
        if not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"):
            raise UserError(f"accelerate {accelerate_version} has FSDP version 1 only: install a later one.")


def load_data(arguments: TrainingArguments, accelerator: Accelerator, require_labels: bool = False) -> ImageData:
    """Loads the training images; one local process decodes them, the others read its cache."""
    conditioning_column, conditioning = getattr(arguments, "conditioning_column", None), None
    with accelerator.local_main_process_first():
        if conditioning_column is not None and arguments.pretrained_model_name_or_path:
            conditioning = getattr(load_pretrained(arguments, TinyPipeline), "_conditioning", None)
        data = load_images(
            arguments.dataset_name,
            dataset_config_name=arguments.dataset_config_name,
            train_data_dir=arguments.train_data_dir,
            split=arguments.split,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
            conditioning_column=conditioning_column,
            condition_columns=getattr(arguments, "condition_columns", None),
            drop_missing=getattr(arguments, "drop_missing", False),
            conditioning_channels=None if conditioning is None else conditioning.shape[0],
            channels=arguments.channels,
            value_range=arguments.value_range,
            resolution=to_size(arguments.resolution),
            center_crop=arguments.center_crop,
            classes=arguments.classes,
            max_samples=arguments.max_train_samples,
            cache_dir=arguments.cache_dir,
            require_labels=require_labels,
        )
    if arguments.show_channels is not None:
        with refusals():
            check_shown_channels(arguments.show_channels, data.images.shape[1])
    return data
