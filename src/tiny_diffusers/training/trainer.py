"""
The one training loop, on accelerate, that all families share.

What a run computes depends on its configuration and seed alone: every random draw is a function of (seed, step, image),
so a stopped run goes on as if nothing had happened, and several processes compute what one would.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml
from accelerate import Accelerator
from accelerate import __version__ as accelerate_version
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
)
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from .. import __version__
from ..data import AUGMENT_DRAWS, ImageData, augment, held_out, load_images, normalize
from ..errors import UserError, unknown
from ..hardware import compile_failure, default_device, default_dtype, keep_freed_memory, physical_cores
from . import checkpoints
from .arguments import TrainingArguments, command_line, save_arguments
from .draws import DataOrder, Draws, make_generator
from .ema import EMA


# Number format -> accelerate's name for training in it.
MIXED_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
_MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous_format": torch.contiguous_format}
# What a run leaves in its folder, beside its components' folders; --overwrite_output_dir deletes these and no more.
_RUN_FILES = (
    *("config.yaml", "run.json", "train_log.jsonl", "model_index.json", "README.md"),
    *("*.png", "samples/step-*.png", "*.gif", "*.py"),
)
_AUGMENTATIONS = ("random_flip", "random_crop_padding", "color_jitter", "cutout")
_MAX_BAD_STEPS = 10  # steps in a row whose loss or gradient is not finite, after which the run stops


@dataclass
class Batch:
    """
    What a family's loss is computed from.

    Attributes:
        images (`torch.Tensor` of shape `(B, C, H, W)`): float32 in [-1, 1], augmented.
        labels (`torch.Tensor` of shape `(B,)`, *optional*): int64; the null class where the label was dropped.
        draws ([`Draws`]): The random numbers of these images in this step.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    draws: Draws


class Family:
    """
    What a family of models adds to the loop. A train script defines one.

    Attributes:
        name (`str`): The family's name, as it stands in a card and in the default output folder.
        modules (`dict[str, nn.Module]`): The networks that are trained, each with an optimiser of its own, by the
            names that the pipeline gives them.
        null_label (`int`, *optional*): The label that stands for no label.
        label_dropout (`float`): Share of the labels that the loop replaces by `null_label`.
        phases (`dict[str, int]`): Flags that count the steps of a phase: the loop warns where the run ends within it.
    """

    name: str
    modules: dict[str, nn.Module]
    null_label: int | None = None
    label_dropout: float = 0.0
    phases: dict[str, int] = {}

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple]:
        """
        Yields (name of a module, its scalar loss) in the order in which the modules are stepped, or (name, loss, scalars
        to log by their names). The loop back-propagates and steps before it asks for the next.
        """
        raise NotImplementedError

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        """The loss of each image, `(B,)`."""
        raise NotImplementedError

    def pipeline(self, modules: dict[str, nn.Module]) -> Any:
        """The pipeline around (averaged) networks, which is what is saved."""
        raise NotImplementedError

    def sample(self, pipeline: Any, num_images: int, seed: int) -> tuple[list, dict]:
        """Sample images for a grid: (PIL images, keyword arguments for [`plots.image_grid`])."""
        raise NotImplementedError


def launch(main: Callable[[], None]) -> int:
    """Runs a script's `main` and returns the exit status: a user's mistake is one line and 2, with no traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step or after the last: in between, the trainer sees to it
        print("stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def start(arguments: TrainingArguments) -> Accelerator:
    """
    Sets up this process: its threads, its memory, its device, its number format, its trackers.

    Raises:
        UserError: If a tracker or a number format is not known or not to be had here.
    """
    # accelerate's launcher leaves OMP_NUM_THREADS=1, which idles all cores but one.
    threads = arguments.num_threads or max(1, physical_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(threads)
    arguments.num_threads = threads
    if default_device().type == "cpu":
        keep_freed_memory()

    trackers = [name for name in arguments.report_to.replace(" ", "").split(",") if name not in ("", "none")]
    for name in trackers:
        if name not in ("tensorboard", "wandb", "trackio"):
            raise unknown("--report_to", name, ["tensorboard", "wandb", "trackio", "none"])
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(f"--report_to {name}: it is not installed; pip install {name}.") from error

    if arguments.mixed_precision == "auto":
        arguments.mixed_precision = MIXED_PRECISION[default_dtype(default_device())]
    if arguments.mixed_precision not in MIXED_PRECISION.values():
        raise unknown("--mixed_precision", arguments.mixed_precision, ["auto", *MIXED_PRECISION.values()])
    if arguments.memory_format not in _MEMORY_FORMATS:
        raise unknown("--memory_format", arguments.memory_format, _MEMORY_FORMATS)
    _check_sharding(arguments)
    # accelerate's launcher starts one process on CPUs without MPI, whatever it was asked for; this is what is left of that.
    asked = os.environ.get("WORLD_SIZE", "several" if "MASTER_PORT" in os.environ else "1")
    try:
        accelerator = Accelerator(
            # Unasked, accelerate takes each of torchrun's processes on CPUs for a single one.
            cpu=default_device().type == "cpu",
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            log_with=trackers or None,
            project_dir=Path(arguments.output_dir or "runs") / arguments.logging_dir,
            # Batch norm's statistics play no part in training, and to overwrite them in a second forward pass, as DDP
            # does before each, makes torch refuse the backward pass of the first.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:  # such as fp16 without a GPU
        raise UserError(f"--mixed_precision {arguments.mixed_precision}: {error}") from error
    if asked != str(accelerator.num_processes) and accelerator.is_main_process:
        print(
            f"warning: {asked} processes were asked for, but {accelerator.num_processes} runs; on CPUs start them with "
            "torchrun --nproc_per_node N train_scripts/....py, as accelerate launch does not.",
            file=sys.stderr,
        )
    return accelerator


def _check_sharding(arguments: TrainingArguments) -> None:
    """Refuses what accelerate can be configured for, but the loop is not made for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UserError(
            "DeepSpeed steps its optimiser unasked and resumes from pickles only: take FSDP, which spreads a model over "
            "the processes too (docs/accelerate/fsdp.yaml), or plain data parallelism."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("FSDP of version 1 merges the weights that are averaged: set fsdp_version: 2.")
        if not arguments.use_ema:
            raise UserError(
                "--use_ema False: with FSDP the average is the one whole copy of the network; leave it on."
            )
        if not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"):
            raise UserError(f"accelerate {accelerate_version} knows FSDP of version 1 only: install a later one.")


def load_data(arguments: TrainingArguments, accelerator: Accelerator, require_labels: bool = False) -> ImageData:
    """The images that the arguments name; decoded by one process, read from its cache by the others."""
    with accelerator.local_main_process_first():
        data = load_images(
            arguments.dataset_name,
            dataset_config_name=arguments.dataset_config_name,
            train_data_dir=arguments.train_data_dir,
            split=arguments.split,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
            resolution=arguments.resolution,
            center_crop=arguments.center_crop,
            classes=arguments.classes,
            max_samples=arguments.max_train_samples,
            cache_dir=arguments.cache_dir,
            require_labels=require_labels,
        )
    arguments.resolution = data.images.shape[-1]
    return data


class Trainer:
    """
    One run.

    Args:
        arguments ([`TrainingArguments`]): The run's settings.
        accelerator (`Accelerator`): From [`start`].
        data ([`ImageData`]): From [`load_data`].
        family ([`Family`]): What is trained.
    """

    def __init__(self, arguments: TrainingArguments, accelerator: Accelerator, data: ImageData, family: Family):
        self.arguments, self.accelerator, self.data, self.family = arguments, accelerator, data, family
        self.device = accelerator.device
        micro_batches = arguments.gradient_accumulation_steps
        if arguments.mixed_precision == "fp16" and micro_batches > 1 and len(family.modules) > 1:
            # accelerate unscales the gradients of all optimisers when it clips those of one
            raise UserError(
                f"--mixed_precision fp16 --gradient_accumulation_steps {micro_batches}: the {' and the '.join(family.modules)} "
                "share one gradient scaler, which cannot accumulate; take bf16 or no, or a larger --train_batch_size."
            )
        sharded = accelerator.distributed_type == DistributedType.FSDP  # which takes weights in the plain layout alone
        self.memory_format = torch.contiguous_format if sharded else _MEMORY_FORMATS[arguments.memory_format]
        name = Path(arguments.train_data_dir or data.name).name
        self.output_dir = Path(arguments.output_dir or f"runs/{family.name}-{name}")
        arguments.output_dir = str(self.output_dir)

        self.train_data, self.validation_data = data, None
        if arguments.validation_split > 0:
            self.train_data, self.validation_data = held_out(data, arguments.validation_split, arguments.seed)
        self.order = DataOrder(arguments.seed, len(self.train_data))
        settings = {name: getattr(arguments, name) for name in _AUGMENTATIONS}
        self.augmentation = {name: value for name, value in settings.items() if value}

        self.global_batch = (
            arguments.train_batch_size * accelerator.num_processes * arguments.gradient_accumulation_steps
        )
        self.steps_per_epoch = len(self.train_data) / self.global_batch
        self.step, self.max_steps = 0, arguments.max_train_steps
        self.sums: dict[str, torch.Tensor] = {}  # running sums of what the next log line averages
        self.skipped, self.bad_steps = 0, 0
        self.best: dict[str, float] | None = None
        self.bad_validations = 0
        self.received_signal = 0  # by this process, at any moment
        self.stop_signal = 0  # by any process, agreed on once a step

        self._claim_output_dir()
        self._build()

    # ---------------------------------------------------------------------------------------------- setting up

    def _claim_output_dir(self) -> None:
        """Makes the folder, takes its lock, and refuses one that holds another run."""
        if not self.accelerator.is_main_process:
            return
        arguments, output_dir = self.arguments, self.output_dir
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            # The operating system drops the lock with the process, so that a killed run leaves none behind.
            self.lock = filelock.FileLock(output_dir / ".lock")
            self.lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(f"--output_dir: another process is training into {output_dir}.") from error
        except OSError as error:
            raise UserError(f"--output_dir: cannot write to {output_dir} ({error.strerror}).") from error

        holds_run = any((output_dir / name).exists() for name in ("config.yaml", "model_index.json"))
        if holds_run and arguments.overwrite_output_dir and not arguments.resume_from_checkpoint:
            leftovers = [path for pattern in _RUN_FILES for path in output_dir.glob(pattern)]
            for path in [*leftovers, *checkpoints.list_checkpoints(output_dir)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif holds_run and not arguments.resume_from_checkpoint:
            raise UserError(
                f"--output_dir: {output_dir} holds another run; continue it with --resume_from_checkpoint latest, "
                "replace it with --overwrite_output_dir, or name another folder."
            )

        weights = sum(p.numel() * 4 for module in self.family.modules.values() for p in module.parameters())
        needed = 4 * weights * ((arguments.checkpoints_total_limit or 10) + 1)  # weights, average, two moments
        free = shutil.disk_usage(output_dir).free
        if free < needed:
            raise UserError(
                f"--output_dir: {output_dir} has {free / 1e6:,.0f} MB free and the checkpoints need up to "
                f"{needed / 1e6:,.0f} MB; free some, or lower --checkpoints_total_limit."
            )

    def _build(self) -> None:
        """The optimisers, averages and learning rates around the family's networks."""
        arguments, accelerator = self.arguments, self.accelerator
        learning_rate = arguments.learning_rate * (self.global_batch if arguments.scale_lr else 1)
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        fused = self._fuses()
        makers = {
            "adamw": lambda p: torch.optim.AdamW(
                p, learning_rate, betas, arguments.adam_epsilon, arguments.adam_weight_decay, fused=fused
            ),
            "adam": lambda p: torch.optim.Adam(
                p, learning_rate, betas, arguments.adam_epsilon, arguments.adam_weight_decay, fused=fused
            ),
            "sgd": lambda p: torch.optim.SGD(
                p, learning_rate, betas[0], weight_decay=arguments.adam_weight_decay, fused=fused
            ),
        }
        if arguments.optimizer not in makers:
            raise unknown("--optimizer", arguments.optimizer, makers)

        compiles = arguments.compile and self._can_compile()
        self.modules, self.optimizers, self.averages = {}, {}, {}
        for name, module in self.family.modules.items():
            module.train().to(self.device, memory_format=self.memory_format)  # a loaded one is in evaluation mode
            if hasattr(module, "memory_format"):
                module.memory_format = _MEMORY_FORMATS[arguments.memory_format]
            if arguments.gradient_checkpointing:
                if not getattr(module, "_supports_gradient_checkpointing", False):
                    raise UserError(
                        f"--gradient_checkpointing: {type(module).__name__} does not know it; leave it out."
                    )
                module.enable_gradient_checkpointing()
            if arguments.use_ema:
                self.averages[name] = EMA(
                    module, arguments.ema_max_decay, arguments.ema_inv_gamma, arguments.ema_power
                )
            norms = {type(part) for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
            # PixelCNN's baseline has a batch norm of its own kind, which torch would replace by one that it can't call
            if self.device.type == "cuda" and accelerator.num_processes > 1 and norms == {nn.BatchNorm2d}:
                module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # in place, with the same weights
            if compiles:
                module.compile_repeated_blocks(dynamic=False)  # in place: names, weights and averages stay as they are
            optimizer = makers[arguments.optimizer](module.parameters())
            self.modules[name], self.optimizers[name] = accelerator.prepare(module, optimizer)
        networks = [module for module in self.modules.values() if any(b.is_floating_point() for b in module.buffers())]
        self.buffers = [buffer for network in networks for buffer in network.buffers()]  # batch norm's statistics

    def _fuses(self) -> bool:
        """Whether torch's optimisers have one kernel for all weights here."""
        return self.device.type in ("cpu", "cuda")

    def _can_compile(self) -> bool:
        """Whether the networks' blocks can be compiled here; says why where they can't."""
        modules = self.family.modules.values()
        unnamed = [type(module).__name__ for module in modules if not getattr(module, "_repeated_blocks", None)]
        failure = f"{unnamed[0]} names no repeated blocks" if unnamed else compile_failure(self.device)
        if failure:
            self._warn(f"--compile: the networks run as they are, as nothing can be compiled here ({failure}).")
            return False
        # Blocks of one class share their code, and torch gives up on a code after 8 shapes: each block may have some.
        blocks = sum(1 for module in modules for _ in module.modules())
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6's name
        setattr(config, limit, max(getattr(config, limit), blocks))
        return True

    def _build_lr_schedulers(self) -> None:
        from diffusers.optimization import SchedulerType, get_scheduler

        arguments = self.arguments
        if arguments.lr_scheduler not in [kind.value for kind in SchedulerType]:
            raise unknown("--lr_scheduler", arguments.lr_scheduler, [kind.value for kind in SchedulerType])
        self.lr_schedulers = {
            name: get_scheduler(
                arguments.lr_scheduler,
                optimizer.optimizer,
                num_warmup_steps=min(arguments.lr_warmup_steps, self.max_steps // 10),
                num_training_steps=self.max_steps,
            )
            for name, optimizer in self.optimizers.items()
        }

    def _settle_steps(self) -> None:
        """The number of steps of this run, and what follows from it, fixed before the first of them is taken."""
        arguments = self.arguments
        if self.max_steps is None and arguments.max_train_minutes is not None:
            self.max_steps = self._steps_in(60 * arguments.max_train_minutes)
        if self.max_steps is None:
            self.max_steps = math.ceil(arguments.num_epochs * self.steps_per_epoch)
        arguments.max_train_steps = self.max_steps
        self.validation_steps = arguments.validation_steps or max(1, self.max_steps // 20)
        # Of a few images an epoch is a step or two, and a grid costs more than that.
        self.grid_epochs = arguments.save_images_epochs
        if self.grid_epochs is None:
            self.grid_epochs = max(10, self.max_steps / self.steps_per_epoch / 10)
        if arguments.ema_start_step is None:
            arguments.ema_start_step = min(2000, self.max_steps // 10)
        for average in self.averages.values():
            average.start_step = arguments.ema_start_step
        for name, steps in self.family.phases.items():
            if steps > self.max_steps:
                self._warn(f"--{name} {steps}: the run ends before, after {self.max_steps:,} steps; give fewer.")

    def _steps_in(self, seconds: float) -> int:
        """How many steps fit into `seconds`, by the speed of some trial steps, whose effect is undone."""
        trial_seconds = min(30.0, 0.05 * seconds)
        tensors = [t for m in [*self.modules.values(), *self._networks().values()] for t in m.state_dict().values()]
        before = [tensor.clone() for tensor in tensors]
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None

        began, times = time.perf_counter(), []
        # Each step waits for all processes, so all must take as many.
        while len(times) < 8 or self._everywhere(time.perf_counter() - began < trial_seconds):
            step_began = time.perf_counter()
            self._optimize(len(times))
            self._update_averages(len(times))
            self._synchronize()
            times.append(time.perf_counter() - step_began)
        self._validate()
        validation_began = time.perf_counter()
        self._validate()
        validation = time.perf_counter() - validation_began

        for tensor, saved in zip(tensors, before, strict=True):
            tensor.copy_(saved)
        for optimizer in self.optimizers.values():
            optimizer.optimizer.state.clear()
        if scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self.sums.clear()

        # The first ones warm the caches up, and one that something else held up says nothing of those to come.
        usual = statistics.median(times[len(times) // 2 :])
        seconds_left = seconds - (time.perf_counter() - began) - 20 * validation
        steps = max(1, int(seconds_left / usual))
        return int(self._broadcast(steps))

    # ------------------------------------------------------------------------------------------------- the run

    def prepare(self) -> None:
        """What has to stand before the first step: the number of steps, the learning rates, the checkpoint to go on from."""
        resumed = self._find_resume()
        self._settle_steps()
        self._build_lr_schedulers()
        if resumed:
            self._load_checkpoint(resumed)

    def run(self) -> None:
        """Trains to the end, or until a signal, an early stop, or losses that are not finite; then saves."""
        arguments, accelerator = self.arguments, self.accelerator
        self.prepare()
        if accelerator.is_main_process:
            self.earlier_seconds = _read(self.output_dir / "run.json", json.loads).get("seconds") if self.step else 0.0
            self._write_run_files()
            self._trim_log()
        self._say_what_runs()
        if accelerator.trackers or accelerator.log_with:
            accelerator.init_trackers("tiny-diffusers", config=_scalars(vars(arguments)))

        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._writing(), self._progress_bar() as bar:
                self._loop(bar)
                if accelerator.is_main_process:
                    self._write_seconds()
            if self.stop_signal:
                if accelerator.is_main_process:
                    print(
                        f"stopped at step {self.step}: --resume_from_checkpoint latest goes on from here.", flush=True
                    )
                accelerator.end_training()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stop_signal:
            raise SystemExit(128 + self.stop_signal)
        self._finish()

    def _progress_bar(self) -> tqdm:
        return tqdm(
            initial=self.step,
            total=self.max_steps,
            unit="step",
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )

    def _loop(self, bar: tqdm) -> None:
        arguments, accelerator = self.arguments, self.accelerator
        began, first = time.perf_counter(), self.step
        while self.step < self.max_steps and not self._stopped_early():
            self.train_step()
            bar.update()
            if self.step % arguments.logging_steps == 0 or self.step == self.max_steps:
                values = self._log_training()
                rate = (self.step - first) * self.global_batch / (time.perf_counter() - began)
                losses = [f"{key} {value:.4f}" for key, value in values.items() if key.endswith("loss")]
                bar.set_postfix_str(", ".join([*losses, f"{rate:.0f} images/s"]), refresh=False)
                accelerator.log({"images_per_second": rate}, step=self.step)

            improved = False
            if self.validation_data is not None and (
                self.step % self.validation_steps == 0 or self.step == self.max_steps
            ):
                improved = self._log_validation()
            if self._epochs_passed(self.grid_epochs) and self.step < self.max_steps:
                if accelerator.is_main_process:
                    self._save_grid(self.output_dir / "samples" / f"step-{self.step:07d}.png")
            if self._epochs_passed(arguments.save_model_epochs) and accelerator.is_main_process:
                self._save_pipeline()

            self._agree_on_signals()
            keep_best = improved and arguments.early_stopping_patience is not None
            due = self.step % arguments.checkpointing_steps == 0 and not self.bad_steps
            if keep_best or due or self.stop_signal:
                self._save_checkpoint()
            if self.stop_signal:
                break
        self.seconds = time.perf_counter() - began

    def _epochs_passed(self, every: float | None) -> bool:
        """Whether the last step was the first after another `every` epochs."""
        steps = (every or math.inf) * self.steps_per_epoch
        return self.step // steps > (self.step - 1) // steps

    def train_step(self) -> None:
        """One step of the run: every network's update, its average, its learning rate."""
        before = [buffer.clone() for buffer in self.buffers]
        finite = self._optimize(self.step)
        self.step += 1
        for lr_scheduler in self.lr_schedulers.values():
            lr_scheduler.step()
        if finite:
            self.bad_steps = 0
            self._update_averages(self.step)
            return
        for buffer, saved in zip(self.buffers, before, strict=True):  # the forward passes have moved them
            buffer.copy_(saved)
        self.skipped += 1
        self.bad_steps += 1
        self.sums.clear()
        if self.accelerator.is_main_process:
            self._append_log({"step": self.step, "skipped": "the loss or a gradient is not finite"})
        if self.bad_steps >= _MAX_BAD_STEPS:
            raise UserError(
                f"the loss or its gradient was not finite in {_MAX_BAD_STEPS} steps in a row, up to step {self.step}; "
                f"lower --learning_rate, or use --mixed_precision no. The last good checkpoint: "
                f"{self._last_checkpoint()}."
            )

    def _optimize(self, step: int) -> bool:
        """Steps every optimiser on the batch of `step`; one whose gradient is not finite is left out. Were all finite?"""
        arguments, accelerator = self.arguments, self.accelerator
        # Layer dropout is the one draw left to torch's own generators: a function of (seed, step, rank).
        torch.manual_seed(make_generator(arguments.seed, step, "dropout", accelerator.process_index).initial_seed())
        prefix = {name: "" if len(self.modules) == 1 else f"{name}_" for name in self.modules}
        all_finite, totals = True, dict.fromkeys(self.modules, 0.0)
        for micro_batch in range(arguments.gradient_accumulation_steps):
            with accelerator.accumulate(*self.modules.values()):
                batch = self.batch(step, micro_batch)
                for name, loss, *scalars in self.family.losses(self.modules, batch):
                    accelerator.backward(loss)
                    self._add(f"{prefix[name]}loss", loss.detach())
                    for key, value in (scalars[0] if scalars else {}).items():
                        self._add(key, value.detach())
                    totals[name] += loss.detach()
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(self.modules[name].parameters(), arguments.max_grad_norm)
                        norm = checkpoints.whole(norm)
                        self._add(f"{prefix[name]}grad_norm", norm)
                        finite = self._everywhere(torch.isfinite(norm + totals[name]))
                        all_finite &= finite
                        # A gradient scaler (float16) sees that by itself, and must, to lower its scale.
                        if finite or accelerator.scaler is not None:
                            self.optimizers[name].step()
                    self.optimizers[name].zero_grad()
        return all_finite

    def _update_averages(self, step: int) -> None:
        for name, average in self.averages.items():
            average.update(self.accelerator.unwrap_model(self.modules[name]), step)

    def batch(self, step: int, micro_batch: int) -> Batch:
        """This process's images of a micro-batch, drawn, normalised and augmented."""
        accelerator, size = self.accelerator, self.arguments.train_batch_size
        first = (micro_batch * accelerator.num_processes + accelerator.process_index) * size
        rows = range(first, first + size)
        offset = step * self.global_batch
        indices = self.order(range(offset + rows.start, offset + rows.stop))
        return self._assemble(self.train_data, indices, Draws(self.arguments.seed, step, rows, self.device), True)

    def _assemble(self, data: ImageData, indices: torch.Tensor, draws: Draws, training: bool) -> Batch:
        images = normalize(data.images[indices].to(self.device, non_blocking=True))
        if training and self.augmentation:
            images = augment(images, draws.uniform("augment", AUGMENT_DRAWS), **self.augmentation)
        labels = None
        if data.labels is not None and self.family.null_label is not None:
            labels = data.labels[indices].to(self.device, non_blocking=True)
            if training and self.family.label_dropout > 0:
                dropped = draws.uniform("label_dropout") < self.family.label_dropout
                labels = labels.masked_fill(dropped, self.family.null_label)
        return Batch(images, labels, draws)

    # ---------------------------------------------------------------------------------------------- measuring

    def _add(self, key: str, value: torch.Tensor) -> None:
        total, count = self.sums.get(key, (0.0, 0))
        self.sums[key] = (total + value.float(), count + 1)

    def _log_training(self) -> dict[str, float]:
        """Writes the means since the last line; returns them."""
        means = {key: (total / count).float().to(self.device) for key, (total, count) in self.sums.items()}
        values = {key: float(self.accelerator.reduce(mean, "mean")) for key, mean in means.items()}
        self.sums.clear()
        learning_rate = next(iter(self.lr_schedulers.values())).get_last_lr()[0]
        line = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4), **values, "lr": learning_rate}
        if self.accelerator.is_main_process:
            self._append_log(line)
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=self.step)
        return values

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss of the averaged networks on the held-out images, always with the same noise and timesteps."""
        networks = self._networks()
        data, size = self.validation_data, self.arguments.train_batch_size
        total = torch.zeros((), dtype=torch.float64)
        count = min(len(data), self.arguments.max_validation_samples) if data is not None else 0
        for start in range(self.accelerator.process_index * size, count, size * self.accelerator.num_processes):
            rows = range(start, min(start + size, count))
            draws = Draws(self.arguments.seed, "validation", rows, self.device)
            with self.accelerator.autocast():
                batch = self._assemble(data, torch.arange(rows.start, rows.stop), draws, False)
                total += self.family.validation_loss(networks, batch).cpu().double().sum()
        total = self.accelerator.reduce(total.float().to(self.device), "sum")
        return float(total) / max(1, count)

    def _log_validation(self) -> bool:
        """Measures and logs the validation loss; whether it is the best so far."""
        loss = self._validate()
        improved = math.isfinite(loss) and (self.best is None or loss < self.best["val_loss"])
        if improved:
            self.best = {"step": self.step, "val_loss": loss}
        self.bad_validations = 0 if improved else self.bad_validations + 1
        if self.accelerator.is_main_process:
            self._append_log({"step": self.step, "val_loss": loss})
        self.accelerator.log({"val_loss": loss}, step=self.step)
        return improved

    def _stopped_early(self) -> bool:
        patience = self.arguments.early_stopping_patience
        return patience is not None and self.bad_validations >= patience

    def _append_log(self, line: dict[str, Any]) -> None:
        with (self.output_dir / "train_log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def _trim_log(self) -> None:
        """Drops what a killed run wrote after the checkpoint that is resumed, so that no step is logged twice."""
        path = self.output_dir / "train_log.jsonl"
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] > self.step:
                    break
            except (ValueError, KeyError, TypeError):  # the half line of a kill
                break
            kept.append(line + "\n")
        checkpoints.replace_file(path, lambda staging: staging.write_text("".join(kept), encoding="utf-8"))

    # ------------------------------------------------------------------------------------------- stop and go on

    def _find_resume(self) -> Path | None:
        arguments = self.arguments
        if not arguments.resume_from_checkpoint:
            return None
        found = [None]
        if self.accelerator.is_main_process:
            found = [checkpoints.find_checkpoint(self.output_dir, arguments.resume_from_checkpoint, self._warn)]
        checkpoint = broadcast_object_list(found)[0]
        if checkpoint is not None and not checkpoint.is_dir():
            raise UserError(
                f"--output_dir: {checkpoint} is not on this machine; all must see one and the same folder."
            )

        earlier = _read(self.output_dir / "config.yaml", yaml.safe_load)
        if self.max_steps is None and arguments.max_train_minutes == earlier.get("max_train_minutes"):
            self.max_steps = earlier.get("max_train_steps") if arguments.max_train_minutes else None
        if arguments.ema_start_step is None:
            arguments.ema_start_step = earlier.get("ema_start_step")
        # What may differ without a word: where things go and how often they are looked at.
        free = (
            "resume",
            "output",
            "overwrite",
            "checkpoint",
            "save_",
            "log",
            "report",
            "hub",
            "push",
            "max_train",
            "config",
        )
        for name, value in vars(arguments).items():
            if name in earlier and earlier[name] != value and not name.startswith(free):
                self._warn(f"--{name} is {value}, but was {earlier[name]} in the run that is resumed.")
        facts = _read(self.output_dir / "run.json", json.loads)
        if facts.get("global_batch", self.global_batch) != self.global_batch:
            self._warn(
                f"a step is {self.global_batch} images, but was {facts['global_batch']} in the run that is resumed: "
                "--train_batch_size is for each process."
            )
        if facts.get("data", {}).get("fingerprint", self.data.fingerprint) != self.data.fingerprint:
            self._warn(f"the images of {self.data.name} are not those of the run that is resumed.")
        if checkpoint is None:
            self._warn(f"there is no checkpoint in {self.output_dir} yet: the run starts at step 0.")
        return checkpoint

    def _save_checkpoint(self) -> None:
        """Publishes `checkpoint-N`: networks, averages, optimisers, and where the run stands."""
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        # Each process logs the mean over its own images, so each has sums of its own to go on with.
        sums = {key: (accelerator.gather(total.reshape(1)), count) for key, (total, count) in self.sums.items()}
        collected = {
            name: checkpoints.collect(accelerator.unwrap_model(module), self.optimizers[name].optimizer)
            for name, module in self.modules.items()
        }
        if not accelerator.is_main_process:
            return

        def write(folder: Path) -> None:
            for name, network in self._networks().items():
                checkpoints.save(collected[name], folder / name, folder / f"{name}_optimizer")
                network.save_config(folder / name)
                if name in self.averages:
                    network.save_pretrained(folder / f"{name}_ema")
            state = {
                "step": self.step,
                "sums": {key: [totals.tolist(), count] for key, (totals, count) in sums.items()},
                "skipped": self.skipped,
                "bad_steps": self.bad_steps,
                "best": self.best,
                "bad_validations": self.bad_validations,
                "lr_schedulers": {name: s.state_dict() for name, s in self.lr_schedulers.items()},
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            }
            (folder / "state.json").write_text(json.dumps(state, indent=2))

        checkpoints.flush(self.output_dir / "train_log.jsonl")  # a checkpoint must not outlive the lines before it
        newest = self.output_dir / f"checkpoint-{self.step}"
        checkpoints.publish(newest, write)
        keep = self.output_dir / f"checkpoint-{self.best['step']}" if self.best else None
        checkpoints.prune(newest, self.arguments.checkpoints_total_limit, keep)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes one line of a disk that is full, or gone."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.output_dir} could not be written to at step {self.step} ({error}); its checkpoints are intact, "
                f"the last is {self._last_checkpoint()}. Make room and go on with --resume_from_checkpoint latest."
            ) from error

    def _last_checkpoint(self) -> str:
        return next((path.name for path in reversed(checkpoints.list_checkpoints(self.output_dir))), "none")

    def _load_checkpoint(self, folder: Path) -> None:
        try:
            self._load(folder)
        except (OSError, RuntimeError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise UserError(
                f"--resume_from_checkpoint: {folder} does not fit these settings ({reason}); the run's own stand in "
                f"{self.output_dir / 'config.yaml'}, for --config."
            ) from error

    def _load(self, folder: Path) -> None:
        for name, module in self.modules.items():
            checkpoints.load_weights(self.accelerator.unwrap_model(module), folder / name)
            if name in self.averages:
                checkpoints.load_weights(self.averages[name].module, folder / f"{name}_ema")
            checkpoints.load_optimizer(self.optimizers[name].optimizer, folder / f"{name}_optimizer")
        state = json.loads((folder / "state.json").read_text())
        for name, lr_scheduler in self.lr_schedulers.items():
            lr_scheduler.load_state_dict(state["lr_schedulers"][name])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped, self.bad_steps = state["step"], state["skipped"], state["bad_steps"]
        self.best, self.bad_validations = state["best"], state["bad_validations"]
        self.sums = {}
        for key, (totals, count) in state["sums"].items():
            totals = torch.tensor(totals, device=self.device)  # one for each process
            same = len(totals) == self.accelerator.num_processes
            self.sums[key] = (totals[self.accelerator.process_index] if same else totals.mean(), count)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received_signal = number

    def _everywhere(self, condition: torch.Tensor | bool) -> bool:
        """Whether a condition holds on every process."""
        held = self.accelerator.reduce(torch.as_tensor(condition, device=self.device).float(), "sum")
        return float(held) == self.accelerator.num_processes

    def _agree_on_signals(self) -> None:
        """
        If any process was told to stop by now, all are; else one would wait for the others for ever. A signal that comes
        later counts at the next step, on all of them.
        """
        self.stop_signal = self.received_signal
        if self.accelerator.num_processes > 1:
            signals = self.accelerator.gather(torch.tensor([self.stop_signal], device=self.device))
            self.stop_signal = int(signals.max())

    # ------------------------------------------------------------------------------------------- what it leaves

    def _networks(self) -> dict[str, nn.Module]:
        """The networks as they are saved: averaged, or as they are where no average is kept."""
        return {
            name: self.averages[name].module if name in self.averages else self.accelerator.unwrap_model(module)
            for name, module in self.modules.items()
        }

    def _finish(self) -> None:
        """Saves the pipeline, the pictures and the card, and pushes them if asked to."""
        accelerator, arguments = self.accelerator, self.arguments
        accelerator.wait_for_everyone()
        if arguments.early_stopping_patience is not None and self.best and self.best["step"] < self.step:
            self._go_back_to_best()
        if accelerator.is_main_process:
            from .. import hub, plots

            with self._writing():
                self._save_pipeline()
                self._save_grid(self.output_dir / "samples.png")
                grids = sorted((self.output_dir / "samples").glob("step-*.png"))
                if grids:  # all from the same latents
                    plots.animation([*grids, self.output_dir / "samples.png"], self.output_dir / "training.gif")
                plots.loss_curves(self.output_dir / "train_log.jsonl", self.output_dir / "loss_curves.png")
                hub.write_card(
                    self.output_dir,
                    model_name=arguments.hub_model_id or self.output_dir.name,
                    command=command_line(arguments),
                    settings=_scalars(vars(arguments)),
                    data=self._data_facts(),
                    hub_model_id=arguments.hub_model_id,
                    license=arguments.license,
                    base_model=arguments.pretrained_model_name_or_path,
                )
            print(f"saved to {self.output_dir}: look at {self.output_dir / 'samples.png'}", flush=True)
            if arguments.push_to_hub:
                repo_id = arguments.hub_model_id or self.output_dir.name
                hub.push(self.output_dir, repo_id, token=arguments.hub_token, private=arguments.hub_private_repo)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if accelerator.is_main_process:
            self.lock.release()

    def _go_back_to_best(self) -> None:
        best = self.output_dir / f"checkpoint-{self.best['step']}"
        if self.accelerator.is_main_process:
            stop = "early stop" if self._stopped_early() else "the end"
            print(f"{stop} at step {self.step}: the best validation loss was at step {self.best['step']}.")
        reason = checkpoints.damage(best)
        if reason is None:
            self._load_checkpoint(best)
        else:
            self._warn(f"{best.name} cannot be read ({reason}): the last weights are saved, not the best.")

    def _save_pipeline(self) -> None:
        from .. import hub

        hub.export(self.family.pipeline(self._networks()), self.output_dir)

    def _save_grid(self, path: Path) -> None:
        """Samples from a copy of the networks, cast once to the format that the hardware multiplies fastest."""
        import copy

        from .. import plots

        dtype = default_dtype(self.device)
        # nn.Module's own `to`: that of diffusers warns at every cast
        copies = {name: copy.deepcopy(module).eval() for name, module in self._networks().items()}
        pipeline = self.family.pipeline({name: nn.Module.to(module, dtype) for name, module in copies.items()})
        pipeline.set_progress_bar_config(desc="samples", leave=False, disable=not sys.stderr.isatty())
        try:
            images, options = self.family.sample(pipeline, self.arguments.eval_batch_size, self.arguments.seed)
        except ValueError as error:  # samples that are not finite: no reason to lose the run
            self._warn(f"no samples at step {self.step}: {error}")
            return
        path.parent.mkdir(exist_ok=True)
        plots.image_grid(images, **options).save(path)

    def _write_run_files(self) -> None:
        """The run's settings, as a recipe that makes it again, and what they met on this machine."""
        checkpoints.replace_file(
            self.output_dir / "config.yaml",
            lambda path: save_arguments(self.arguments, path, ("resume_from_checkpoint", "overwrite_output_dir")),
        )
        facts = {
            "command": command_line(self.arguments),
            "data": self._data_facts(),
            "parameters": {name: _count(module) for name, module in self.family.modules.items()},
            "device": str(self.device),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "global_batch": self.global_batch,
            "versions": {
                "tiny-diffusers": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        checkpoints.replace_file(
            self.output_dir / "run.json", lambda path: path.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        )

    def _write_seconds(self) -> None:
        """Adds what the loop has taken to `run.json`; nothing where a killed run's share of it is not known."""
        path = self.output_dir / "run.json"
        if self.earlier_seconds is not None:
            facts = _read(path, json.loads) | {"seconds": round(self.earlier_seconds + self.seconds, 1)}
            checkpoints.replace_file(path, lambda staging: staging.write_text(json.dumps(facts, indent=2), "utf-8"))

    def _data_facts(self) -> dict[str, Any]:
        data = self.data
        return {
            "name": data.name,
            "split": data.split,
            "images": len(data),
            "held_out": len(self.validation_data) if self.validation_data is not None else 0,
            "shape": list(data.images.shape[1:]),
            "classes": list(data.id2label.values()) if data.id2label else None,
            "fingerprint": data.fingerprint,
            "notes": data.notes,
        }

    def _say_what_runs(self) -> None:
        if not self.accelerator.is_main_process:
            return
        data, arguments = self.data, self.arguments
        for note in data.notes:
            print(f"data: {note}")
        parameters = ", ".join(f"{name} {_count(module) / 1e6:.2f} M" for name, module in self.family.modules.items())
        print(
            f"{self.family.name}: {len(self.train_data):,} images {tuple(data.images.shape[1:])} of {data.name}, "
            f"{self.max_steps:,} steps of {self.global_batch}; {parameters} parameters"
        )
        print(
            f"on {self.device} x {self.accelerator.num_processes}, {torch.get_num_threads()} threads, "
            f"mixed precision {arguments.mixed_precision}, {str(self.memory_format).removeprefix('torch.')}, "
            f"{'fused ' if self._fuses() else ''}{arguments.optimizer}, "
            f"{'foreach' if arguments.use_ema else 'no'} average, into {self.output_dir}",
            flush=True,
        )

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            print(f"warning: {message}", file=sys.stderr, flush=True)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _broadcast(self, value: float) -> float:
        """The main process's value, on every process."""
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(float(value), device=self.device)))


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file that a run has left in its folder: nothing where there is none."""
    try:
        return dict(parse(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): delete it, and go on.") from error


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers and cards take them: numbers and words, no secrets."""
    return {
        key: value if isinstance(value, (int, float, str, bool)) or value is None else str(value)
        for key, value in values.items()
        if key != "hub_token"
    }
