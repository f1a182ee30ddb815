"""
The training loop, on accelerate, that all families share.

A run depends on its settings and seed alone: every random draw is a function of (seed, step, image), so a resumed run
equals an uninterrupted one, and several processes compute what one would.
"""

import contextlib
import copy
import itertools
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from ..data import ImageData, cache_root
from ..errors import UserError, say
from ..files import find_damage, load_json, read_text
from ..hardware import compile_failure, last_barrier
from ..progress import progress_bar
from ..runs import RunFolder
from . import checkpoints, outputs, posthoc_ema, precision
from .arguments import TrainingArguments, is_open, read_settings
from .batches import Batches
from .checkpoints import RunState
from .draws import make_generator
from .ema import EMA, PowerEMA
from .family import MAX_EXAMPLES, Family, measured_rows
from .lr_schedule import build_lr_scheduler
from .muon import Muon, split_parameters
from .settings import resolve, resolve_num_steps, warn_of_changes
from .timing import (
    FIRST_STEP_SHARE,
    GRID_SHARE,
    MAX_TRIAL_SECONDS,
    TRIAL_SHARE,
    VALIDATION_SHARE,
    TimePlan,
    spell_minutes,
    typical_seconds,
)


logger = logging.getLogger(__name__)

_MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous_format": torch.contiguous_format}
# Of sample grids that nobody asked for
_MAX_GRIDS, _STEPS_PER_GRID = 10, 5  # fewer in a run of few steps
_GRID_SHARE, _FREE_GRID_SECONDS = 0.1, 5.0  # of the time so far that they may take, and what they always may
_MAX_BAD_STEPS = 10  # steps in a row whose loss or gradient is not finite, after which the run stops


class Trainer:
    """
    Trains one family with one set of settings. Constructing one touches no file of the run; [`Trainer.run`] claims the
    folder.

    Args:
        settings ([`TrainingArguments`]): From [`~tiny_diffusers.training.settings.resolve_settings`].
        accelerator (`Accelerator`): From [`~tiny_diffusers.training.process.setup_process`].
        data ([`ImageData`]): From [`~tiny_diffusers.training.process.load_data`].
        family ([`Family`]): What is trained.
    """

    def __init__(self, settings: TrainingArguments, accelerator: Accelerator, data: ImageData, family: Family):
        self.settings, self.accelerator, self.data, self.family = settings, accelerator, data, family
        self.device = accelerator.device
        self.folder = RunFolder(settings.output_dir)
        self.state = RunState()
        self.batches = Batches(settings, accelerator, data, family)
        self.received_signal = 0  # by this process, at any moment
        self.stop_signal = 0  # by any process, agreed on once a step
        self.is_late = False  # `--max_train_minutes` are over
        self.max_steps: int | None = None  # until they are measured
        self.grid_seconds: list[float] = []  # of each sample grid that this process has saved
        if family.shows_examples:
            family.examples = self.batches.examples(MAX_EXAMPLES)
        self._build()

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return self.state.step

    @property
    def elapsed(self) -> float:
        """Seconds since the start of the command."""
        return time.perf_counter() - self.settings.started

    # -------------------------------------------------------------------------------------------------- set-up

    def _build(self) -> None:
        """Builds the averages and the optimizer of each network, and prepares both for this machine."""
        settings, accelerator, modules = self.settings, self.accelerator, self.family.modules
        if settings.mixed_precision == "fp16" and settings.gradient_accumulation_steps > 1 and len(modules) > 1:
            # accelerate unscales the gradients of all optimizers when it clips those of one
            raise UserError(
                f"--mixed_precision fp16 --gradient_accumulation_steps {settings.gradient_accumulation_steps}: the "
                f"{' and the '.join(modules)} share one gradient scaler, which cannot accumulate; take bf16 or no, or a "
                "larger --train_batch_size."
            )
        memory_format = _MEMORY_FORMATS[settings.memory_format]
        sharded = accelerator.distributed_type == DistributedType.FSDP  # which takes contiguous weights only
        self.memory_format = torch.contiguous_format if sharded else memory_format
        for module in modules.values():
            module.train().to(self.device, memory_format=self.memory_format)  # a loaded one is in evaluation mode
            if hasattr(module, "memory_format"):
                module.memory_format = memory_format
            if settings.gradient_checkpointing:
                if not getattr(module, "_supports_gradient_checkpointing", False):
                    raise UserError(
                        f"--gradient_checkpointing: {type(module).__name__} does not support it; leave it out."
                    )
                module.enable_gradient_checkpointing()
        if settings.mixed_precision == "auto":
            self.settings = settings = resolve(settings, mixed_precision=self._choose_precision(sharded))
        if settings.mixed_precision == "no":
            accelerator.autocast_handler = AutocastKwargs(enabled=False)  # it was set up for what the hardware has

        compiles = settings.compile and self._can_compile()
        self.modules, self.optimizers, self.emas, self.power_emas = {}, {}, {}, {}
        for name, module in modules.items():
            if settings.use_ema:
                self.emas[name] = EMA(module, settings.ema_max_decay, settings.ema_inv_gamma, settings.ema_power)
            if settings.posthoc_ema:
                self.power_emas[name] = {
                    sigma_rel: PowerEMA(module, sigma_rel) for sigma_rel in posthoc_ema.SIGMA_RELS
                }
            norms = {type(part) for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
            # PixelCNN's baseline has a batch norm of its own class, which torch would replace by one that it can't call
            if self.device.type == "cuda" and accelerator.num_processes > 1 and norms == {nn.BatchNorm2d}:
                module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # in place, with the same weights
            if compiles:
                module.compile_repeated_blocks(dynamic=False)  # in place: names and weights stay
            self.modules[name], self.optimizers[name] = accelerator.prepare(module, self._optimizer(module))
        networks = [module for module in self.modules.values() if any(b.is_floating_point() for b in module.buffers())]
        self.buffers = [buffer for network in networks for buffer in network.buffers()]  # batch norm's statistics

    def _choose_precision(self, sharded: bool) -> str:
        """
        Returns what `--mixed_precision auto` stands for: bf16 where the hardware has it. On a CPU that has it, a long run
        takes what is faster for its network, by a measurement that is cached; a resumed run takes what it took before.
        """
        settings, in_hardware = self.settings, self.accelerator.mixed_precision
        if in_hardware != "bf16" or sharded:  # FSDP has been set up for the precision
            return in_hardware
        earlier = read_settings(self.folder.config, type(settings)) if settings.resume_from_checkpoint else {}
        if earlier.get("mixed_precision") in ("bf16", "no"):
            return earlier["mixed_precision"]
        if self.device.type != "cpu" or not precision.is_worth_measuring(settings, self.batches.steps_per_epoch):
            return in_hardware

        file = precision.cache_file(
            cache_root(settings.cache_dir),
            self.family.modules,
            script=settings.SCRIPT,
            batch=[settings.train_batch_size, *self.data.input_shape],
            processes=self.accelerator.num_processes,
            memory_format=settings.memory_format,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        is_main_process = self.accelerator.is_main_process
        source = f"read from {file}"
        speeds = self._broadcast(precision.read_speeds(file) if is_main_process else None)
        if speeds is None:  # all processes measure at once, as they train
            began = time.perf_counter()
            speeds = self._broadcast(self._measure_speeds())
            source = f"measured in {time.perf_counter() - began:.1f} s"
            if is_main_process:
                precision.write_speeds(file, speeds)
        chosen = precision.faster_precision(speeds)
        self._print(
            f"--mixed_precision auto takes {chosen}: about {speeds['bfloat16']:.3g} images/s in bfloat16 and "
            f"{speeds['float32']:.3g} in float32 ({source})"
        )
        return chosen

    def _measure_speeds(self) -> dict[str, float]:
        """Measures the images/s of forward and backward passes by dtype, with copies of the networks."""
        copies = {dtype: copy.deepcopy(self.family.modules) for dtype in ("float32", "bfloat16")}
        for module in copies["bfloat16"].values():
            module.forward = torch.autocast(self.device.type, torch.bfloat16)(module.forward)  # as accelerate does

        def take_pass(dtype: str, count: int) -> None:
            batch = self.batches.trial(count)
            for _, loss, *_ in self.family.losses(copies[dtype], batch):
                loss.backward()
            for module in copies[dtype].values():
                module.zero_grad()

        with torch.random.fork_rng(devices=[]):  # layer dropout draws from it
            return precision.measure_speeds(take_pass, self.settings.train_batch_size)

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings
        options = {
            "lr": settings.learning_rate * (self.batches.global_batch if settings.scale_lr else 1),
            "weight_decay": settings.adam_weight_decay,
            "fused": self.fuses,
        }
        if settings.optimizer == "sgd":
            return torch.optim.SGD(module.parameters(), momentum=settings.adam_beta1, **options)
        options |= {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
        if settings.optimizer == "muon":
            if self.accelerator.distributed_type == DistributedType.FSDP:
                raise UserError("--optimizer muon: it needs whole matrices, and FSDP shards them; take adamw.")
            return Muon(*split_parameters(module), **options)
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
        return kind(module.parameters(), **options)

    @property
    def fuses(self) -> bool:
        """Checks that torch's optimizers have one kernel for all weights on this device."""
        return self.device.type in ("cpu", "cuda")

    def _can_compile(self) -> bool:
        """Checks that the networks' blocks can be compiled here; warns if they cannot."""
        modules = self.family.modules.values()
        unnamed = [type(module).__name__ for module in modules if not getattr(module, "_repeated_blocks", None)]
        failure = f"{unnamed[0]} names no repeated blocks" if unnamed else compile_failure(self.device)
        if failure:
            logger.warning(f"--compile: the networks run uncompiled ({failure}).")
            return False
        # Blocks of one class share their code, and torch gives up on a code after 8 shapes: each block may have some.
        blocks = sum(1 for module in modules for _ in module.modules())
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6's name
        setattr(config, limit, max(getattr(config, limit), blocks))
        return True

    def prepare(self) -> None:
        """Resolves steps, builds LR schedulers, loads the checkpoint."""
        checkpoint = self._find_checkpoint()
        self.time_plan, measured = None, None
        if self.settings.max_train_steps is None and self.settings.max_train_minutes is not None:
            measured = self._measure(checkpoints.read_step(checkpoint) if checkpoint is not None else 0)
        self.settings = settings = resolve_num_steps(self.settings, self.batches.steps_per_epoch, measured)
        self.max_steps = settings.max_train_steps
        self.validation_steps = self._validation_steps(self.max_steps)
        for ema in self.emas.values():
            ema.start_step = settings.ema_start_step
        for name, steps in self.family.phases.items():
            if steps > self.max_steps:
                logger.warning(f"--{name} {steps}: the run ends before, after {self.max_steps:,} steps; give fewer.")

        self.lr_schedulers = {
            name: build_lr_scheduler(
                settings.lr_scheduler,
                optimizer.optimizer,
                warmup_steps=min(settings.lr_warmup_steps, self.max_steps // 10),
                num_steps=self.max_steps,
            )
            for name, optimizer in self.optimizers.items()
        }
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        if self.step > self.max_steps:
            raise UserError(
                f"--resume_from_checkpoint: {checkpoint} is past the {self.max_steps:,} steps of this run: give more "
                "--max_train_steps or --num_epochs, or an earlier checkpoint."
            )
        if checkpoint is not None and self.step == self.max_steps:
            self._say_nothing_is_left()

    def _say_nothing_is_left(self) -> None:
        """Says that the checkpoint is the last one of its run, and what would add steps."""
        settings = self.settings
        minutes = settings.max_train_minutes
        if "max_train_steps" not in settings.resolved:
            remedy = "more --max_train_steps add some"
        elif minutes is None:
            remedy = "more --num_epochs add some"
        else:
            remedy = (
                f"--max_train_minutes {minutes:g} is used up, and other minutes add as many steps as fit into them"
            )
        self._print(f"nothing is left to train, as the run has taken all of its {self.max_steps:,} steps: {remedy}.")

    def _validation_steps(self, max_steps: int) -> int:
        """Returns the steps between validations."""
        return self.settings.validation_steps or max(1, max_steps // 20)

    def _measure(self, first: int) -> dict[str, int]:
        """
        Measures what fits into `--max_train_minutes`, by trials that are undone: the last step of a run that begins at
        step `first`, with the family's measurement, and the images of a validation and a sample grid where nobody asked for
        a number.
        """
        settings, total = self.settings, 60 * self.settings.max_train_minutes
        self._print(f"measuring how many steps fit into {spell_minutes(settings.max_train_minutes)} ...")
        with self._undone():
            step = self._time_steps(total)
            num_images, validation = self._time_validation(total)
            num_samples, grid = self._time_grid(total)
            measurement = self._time_measurement()
        self.time_plan = TimePlan(total, step, validation, grid, grid / self.family.preview_share, measurement)

        def extra(steps: int) -> float:
            num_validations = steps / self._validation_steps(first + steps)
            num_saves = steps / self._in_steps(settings.save_model_epochs)
            return num_validations * validation + num_saves * measurement + self._grid_seconds(steps, grid, total)

        steps = self.time_plan.num_steps(self.elapsed, extra)
        measured = {"max_train_steps": first + steps}
        if is_open(self.settings, "max_validation_samples"):
            measured["max_validation_samples"] = num_images
        if is_open(self.settings, "eval_batch_size"):
            measured["eval_batch_size"] = num_samples
        return {name: self._broadcast(value) for name, value in measured.items()}

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Undoes the steps that are taken within."""
        tensors = [tensor for module in self._all_networks() for tensor in module.state_dict().values()]
        before = [tensor.clone() for tensor in tensors]
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        yield
        for tensor, saved in zip(tensors, before, strict=True):
            tensor.copy_(saved)
        for optimizer in self.optimizers.values():
            optimizer.optimizer.state.clear()
        if scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self.state.sums.clear()

    def _time_steps(self, total: float) -> float:
        """Times some steps; all processes take as many, as each step waits for all."""
        began, times = time.perf_counter(), []

        def go_on() -> bool:
            elapsed = time.perf_counter() - began
            second = len(times) == 1 and elapsed < FIRST_STEP_SHARE * total
            return second or elapsed < min(MAX_TRIAL_SECONDS, TRIAL_SHARE * total)

        while not times or self._everywhere(go_on()):
            step_began = time.perf_counter()
            self._optimize(len(times))
            self._update_emas(len(times))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - step_began)
        return typical_seconds(times)

    def _time_validation(self, total: float) -> tuple[int, float]:
        """Times one batch of a validation; returns the number of its images that is worth its time, and the time."""
        most, num_images = self.settings.max_validation_samples, self._num_validation_images
        limit = VALIDATION_SHARE * total
        batch = min(num_images, self.settings.train_batch_size * self.accelerator.num_processes)
        if batch == 0:
            return most, 0.0
        for _ in range(2):  # the first fills caches
            began = time.perf_counter()
            self._validate(batch)
            seconds = (time.perf_counter() - began) / batch
            is_short = self._everywhere(seconds * num_images < limit)
            if not is_short:
                break
        if not is_short and is_open(self.settings, "max_validation_samples"):
            most = max(1, int(limit / seconds))
        return most, seconds * min(num_images, most)

    def _time_grid(self, total: float) -> tuple[int, float]:
        """Times a sample grid; returns the number of its images that is worth its time, and the time."""
        most = self.settings.eval_batch_size
        if not self.accelerator.is_main_process:
            return most, 0.0
        num_images = 1 if is_open(self.settings, "eval_batch_size") else most

        def draw() -> float:
            began = time.perf_counter()
            outputs.draw_grid(self, self.family.preview, num_images)
            return time.perf_counter() - began

        seconds = min(draw(), draw()) if num_images < most else draw()  # the first fills caches
        while num_images < most and 2 * seconds < GRID_SHARE * total:
            num_images = min(2 * num_images, most)
            seconds = draw()
        return num_images, seconds

    def _time_measurement(self) -> float:
        """Times the family's measurement of a batch, with copies of the networks; returns the time of all batches."""
        if not self.accelerator.is_main_process:
            return 0.0
        networks = copy.deepcopy(self.networks())

        def measure() -> float:
            began = time.perf_counter()
            self.family.measure(networks, itertools.islice(self.batches.measured(), 1))
            return time.perf_counter() - began

        num_images = len(measured_rows(len(self.batches.train_indices)))
        return min(measure(), measure()) * math.ceil(
            num_images / self.settings.train_batch_size
        )  # the first fills caches

    # ------------------------------------------------------------------------------------------------- the run

    def run(self) -> None:
        """Trains to the end, or until a signal, an early stop, or losses that are not finite; then saves."""
        if self.accelerator.is_main_process:
            outputs.check_can_push(self.settings)
        with self._claimed_folder():
            self.prepare()
            self._start_outputs()
            handlers = self._handle_signals()
            try:
                with self.folder.writing(lambda: self.step), self._progress_bar() as bar:
                    self._loop(bar)
                    outputs.write_effort(self)
                if self.stop_signal:
                    self._print(f"stopped at step {self.step}: --resume_from_checkpoint latest continues from here.")
                    last_barrier()
                    self.accelerator.end_training()
                elif self.time_plan is not None:
                    self._compare_with_plan(self.time_plan)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            if self.stop_signal:
                raise SystemExit(128 + self.stop_signal)
            self._finish()

    def _compare_with_plan(self, plan: TimePlan) -> None:
        """Says how the training ended if the minutes were too few for the planned steps, or far too many."""
        minutes = spell_minutes(self.settings.max_train_minutes)
        if self.is_late:
            self._print(
                f"{minutes} was too short for the {self.max_steps:,} planned steps, as these took longer than measured: the "
                f"run ends at step {self.step:,}, and the learning rate has not reached its end. --resume_from_checkpoint "
                "latest takes the other steps."
            )
        elif plan.unused(self.elapsed) and not self._stopped_early():
            self._print(
                f"the {self.max_steps:,} planned steps ended after {self.elapsed / 60:.2g} of the {minutes}, as they took less "
                "time than measured. --resume_from_checkpoint latest with another --max_train_minutes, such as "
                f"{plan.unused(self.elapsed) / 60:.2g}, adds steps."
            )

    def _claimed_folder(self) -> contextlib.AbstractContextManager:
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        settings = self.settings
        return self.folder.claim(
            resume=bool(settings.resume_from_checkpoint),
            overwrite=settings.overwrite_output_dir,
            needed_bytes=self._needed_bytes(),
        )

    def _needed_bytes(self) -> int:
        """Returns the disk space of the checkpoints, with the one that is being written, and of the snapshots."""
        weights = sum(p.numel() * 4 for module in self.family.modules.values() for p in module.parameters())
        num_averages = len(posthoc_ema.SIGMA_RELS) if self.power_emas else 0
        num_checkpoints = (self.settings.checkpoints_total_limit or 10) + 1
        num_networks = (4 + num_averages) * num_checkpoints  # weights, EMA, two moments
        return weights * (num_networks + num_averages * posthoc_ema.NUM_SNAPSHOTS)

    def _start_outputs(self) -> None:
        """Writes the run's settings and facts, prints the summary, starts the trackers."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.earlier_seconds = self.folder.read_facts().get("seconds") if self.step else 0.0
            outputs.write_run_files(self)
            self.folder.trim_log(self.step)
            self.folder.trim_snapshots(self.step)
            outputs.print_summary(self)
        if accelerator.trackers or accelerator.log_with:
            accelerator.init_trackers("tiny-diffusers", config=outputs.scalar_settings(self.settings))

    def _progress_bar(self) -> tqdm:
        is_main_process = self.accelerator.is_main_process
        return progress_bar(initial=self.step, total=self.max_steps, unit="step", disable=not is_main_process)

    def _loop(self, bar: tqdm) -> None:
        settings, is_main_process = self.settings, self.accelerator.is_main_process
        began, first = time.perf_counter(), self.step
        while self.step < self.max_steps and not self._stopped_early():
            # 1. the step
            self.train_step()
            if is_main_process:
                self.folder.confirm()
            bar.update()

            # 2. the log
            if self._is_due(settings.logging_steps):
                losses = self._log_training()
                rate = (self.step - first) * self.batches.global_batch / (time.perf_counter() - began)
                bar.set_postfix_str(", ".join([*losses, f"{rate:.0f} images/s"]), refresh=False)
                self.accelerator.log({"images_per_second": rate}, step=self.step)

            # 3. the validation loss, a sample grid, the pipeline
            improved = False
            if self.batches.num_held_out and self._is_due(self.validation_steps):
                improved = self._log_validation()
            if self._is_grid_due() and is_main_process:
                self._save_grid()
            if _passed(self.step, self._in_steps(settings.save_model_epochs)) and is_main_process:
                outputs.save_pipeline(self)

            # 4. a snapshot of the averages: before the checkpoint, so that a run that resumes there has it
            self._agree_on_signals()
            self.is_late = self._is_late()
            if self.power_emas and is_main_process and self._is_snapshot_due():
                self._save_snapshot()

            # 5. a checkpoint: one is due, this is the best or the last one, or the run is told to stop
            keep_best = improved and settings.early_stopping_patience is not None
            due = self._is_due(settings.checkpointing_steps) or self._stopped_early() or self.is_late
            if keep_best or (due and not self.state.bad_steps) or self.stop_signal:
                self._save_checkpoint()
            if self.stop_signal or self.is_late:
                break
        self.seconds = time.perf_counter() - began

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.max_steps

    def _is_snapshot_due(self) -> bool:
        """Checks that a snapshot comes after this step, the last one in any case."""
        return posthoc_ema.is_snapshot_due(self.step, self.max_steps) or self._stopped_early() or self.is_late

    def _in_steps(self, epochs: int | None) -> float:
        """Returns the steps of so many epochs; infinite for none."""
        return (epochs or math.inf) * self.batches.steps_per_epoch

    @property
    def _grid_steps(self) -> float | None:
        """Steps between sample grids as asked for, infinite for none; None if nobody asked."""
        settings = self.settings
        if settings.save_images_steps is not None:
            return settings.save_images_steps or math.inf
        return None if settings.save_images_epochs is None else self._in_steps(settings.save_images_epochs)

    def _is_grid_due(self) -> bool:
        """
        Checks that a sample grid comes after this step, of N in the run by default: at the shares 1/N^2, 4/N^2, 9/N^2,
        ..., as a network changes most at the start. The last one is drawn at the end.
        """
        if self.step == self.max_steps:
            return False
        if self._grid_steps is not None:
            return _passed(self.step, self._grid_steps)
        squares = [_num_grids(self.max_steps) ** 2 * step // self.max_steps for step in (self.step - 1, self.step)]
        return math.isqrt(squares[0]) < math.isqrt(squares[1])

    def _grid_seconds(self, steps: int, seconds: float, total: float) -> float:
        """Returns the time of the sample grids in so many steps of a run of `total` seconds, if one takes `seconds`."""
        if self._grid_steps is not None:
            return seconds * steps / self._grid_steps
        return seconds * min(_num_grids(steps), max(1, _GRID_SHARE * total / seconds)) if seconds else 0.0

    def _save_grid(self) -> None:
        """Saves a sample grid, unless nobody asked for it and grids take too large a share of the time."""
        path, spent = self.folder.grid(self.step), self.grid_seconds
        if not spent:
            self._print(f"step {self.step:,}: drawing the first samples, {path} ...")
        elif sum(spent) + spent[-1] > max(_FREE_GRID_SECONDS, _GRID_SHARE * self.elapsed) and self._grid_steps is None:
            return
        began = time.perf_counter()
        outputs.save_grid(self, path, self.family.preview)
        self.grid_seconds.append(time.perf_counter() - began)

    def _is_late(self) -> bool:
        """Checks that `--max_train_minutes` are over before the last step, on any process."""
        if self.time_plan is None or self.step == self.max_steps:
            return False
        return not self._everywhere(self.elapsed < self.time_plan.deadline)

    def _stopped_early(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.bad_validations >= patience

    # ------------------------------------------------------------------------------------------------ one step

    def train_step(self) -> None:
        """Takes one step: updates every network, its averages, its learning rate."""
        state = self.state
        before = [buffer.clone() for buffer in self.buffers]
        self.learning_rate = next(iter(self.lr_schedulers.values())).get_last_lr()[0]
        finite = self._optimize(state.step)
        state.step += 1
        for lr_scheduler in self.lr_schedulers.values():
            lr_scheduler.step()
        if finite:
            state.bad_steps = 0
            self._update_emas(state.step)
            return
        for buffer, saved in zip(self.buffers, before, strict=True):  # the forward passes have changed them
            buffer.copy_(saved)
        state.skipped += 1
        state.bad_steps += 1
        state.sums.clear()
        if self.accelerator.is_main_process:
            self.folder.append_log({"step": state.step, "skipped": "the loss or a gradient is not finite"})
        if state.bad_steps >= _MAX_BAD_STEPS:
            raise UserError(
                f"the loss or its gradient was not finite in {_MAX_BAD_STEPS} steps in a row, up to step {state.step}; "
                f"lower --learning_rate, or use --mixed_precision no. The last good checkpoint: "
                f"{self.folder.last_checkpoint_name()}."
            )

    def _optimize(self, step: int) -> bool:
        """Steps every optimizer whose loss and gradient are finite on the batch of `step`; returns whether all were."""
        settings, accelerator = self.settings, self.accelerator
        # Layer dropout alone uses torch's own generators: it is a function of (seed, step, rank).
        torch.manual_seed(make_generator(settings.seed, step, "dropout", accelerator.process_index).initial_seed())
        prefix = {name: "" if len(self.modules) == 1 else f"{name}_" for name in self.modules}
        all_finite, totals = True, dict.fromkeys(self.modules, 0.0)
        for micro_batch in range(settings.gradient_accumulation_steps):
            with accelerator.accumulate(*self.modules.values()):
                batch = self.batches.training(step, micro_batch, self.max_steps)
                for name, loss, *scalars in self.family.losses(self.modules, batch):
                    accelerator.backward(loss)
                    self.state.add(f"{prefix[name]}loss", loss.detach())
                    for key, value in (scalars[0] if scalars else {}).items():
                        self.state.add(key, value.detach())
                    totals[name] += loss.detach()
                    if accelerator.sync_gradients:
                        max_norm = settings.max_grad_norm or math.inf
                        norm = accelerator.clip_grad_norm_(self.modules[name].parameters(), max_norm)
                        norm = checkpoints.gather_full(norm)
                        self.state.add(f"{prefix[name]}grad_norm", norm)
                        finite = self._everywhere(torch.isfinite(norm + totals[name]))
                        all_finite &= finite
                        # float16's gradient scaler checks by itself, and must step to lower its scale
                        if finite or accelerator.scaler is not None:
                            self.optimizers[name].step()
                    self.optimizers[name].zero_grad()
        return all_finite

    def _update_emas(self, step: int) -> None:
        for name, ema in self.emas.items():
            for average in (ema, *self.power_emas.get(name, {}).values()):
                average.update(self.accelerator.unwrap_model(self.modules[name]), step)

    # --------------------------------------------------------------------------------------------- measurements

    def _log_training(self) -> list[str]:
        """Logs the means since the last log line; returns the losses for the progress bar."""
        sums = self.state.sums
        means = {key: (total / count).float().to(self.device) for key, (total, count) in sums.items()}
        values = {key: float(self.accelerator.reduce(mean, "mean")) for key, mean in means.items()}
        sums.clear()
        epoch = round(self.step / self.batches.steps_per_epoch, 4)
        line = {"step": self.step, "epoch": epoch, **values, "lr": self.learning_rate}
        if self.accelerator.is_main_process:
            self.folder.append_log(line)
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=self.step)
        return [f"{key} {value:.4f}" for key, value in values.items() if key.endswith("loss")]

    @property
    def _num_validation_images(self) -> int:
        return min(self.batches.num_held_out, self.settings.max_validation_samples)

    @torch.no_grad()
    def _validate(self, count: int | None = None) -> float:
        """
        Computes the mean loss of the EMA networks on the held-out images, the first `count` of them if given, always with
        the same noise and timesteps.
        """
        count = self._num_validation_images if count is None else count
        networks, total = self.networks(), torch.zeros((), dtype=torch.float64)
        with self.accelerator.autocast():
            for batch in self.batches.validation(count):
                total += self.family.validation_loss(networks, batch).cpu().double().sum()
        total = self.accelerator.reduce(total.float().to(self.device), "sum")
        return float(total) / max(1, count)

    def _log_validation(self) -> bool:
        """Measures and logs the validation loss; returns whether it is the best so far."""
        state, loss = self.state, self._validate()
        improved = math.isfinite(loss) and (state.best is None or loss < state.best["val_loss"])
        if improved:
            state.best = {"step": self.step, "val_loss": loss}
        state.bad_validations = 0 if improved else state.bad_validations + 1
        if self.accelerator.is_main_process:
            self.folder.append_log({"step": self.step, "val_loss": loss})
        self.accelerator.log({"val_loss": loss}, step=self.step)
        return improved

    # ------------------------------------------------------------------------------------------ stop and resume

    def _find_checkpoint(self) -> Path | None:
        """Finds the checkpoint to resume from, and warns of what makes the resumed run another run."""
        settings, folder = self.settings, self.folder
        if not settings.resume_from_checkpoint:
            return None
        is_main_process = self.accelerator.is_main_process
        checkpoint = folder.find_checkpoint(settings.resume_from_checkpoint) if is_main_process else None
        checkpoint = self._broadcast(checkpoint)
        if checkpoint is not None and not checkpoint.is_dir():
            raise UserError(
                f"--output_dir: {checkpoint} is not on this machine; all must see one and the same folder."
            )

        facts = folder.read_facts()
        if checkpoint is not None:
            self._check_same_images(facts.get("data", {}), checkpoint)
            self._check_same_vae(facts, checkpoint)
        resolved = folder.read_config().get("resolved")
        warn_of_changes(
            settings, read_settings(folder.config, type(settings)), resolved if isinstance(resolved, list) else []
        )
        if facts.get("global_batch", self.batches.global_batch) != self.batches.global_batch:
            logger.warning(
                f"a step is {self.batches.global_batch} images, but was {facts['global_batch']} in the run that is resumed: "
                "--train_batch_size is for each process."
            )
        if checkpoint is None:
            logger.warning(f"there is no checkpoint in {folder.path} yet: the run starts at step 0.")
        later = [path.name for path in folder.list_checkpoints_after(checkpoint)]
        if later:
            logger.warning(f"the run goes on from {checkpoint.name}: its next checkpoint replaces {', '.join(later)}.")
        return checkpoint

    def _check_same_images(self, facts: dict[str, Any], checkpoint: Path) -> None:
        """Refuses other images than those of the run that is resumed, wherever they lie: `facts` describe the latter."""
        if facts.get("fingerprint", self.data.fingerprint) == self.data.fingerprint:
            return
        start = self.folder.path if self.folder.model_index.is_file() else checkpoint
        theirs, ours = (outputs.describe_data(each) for each in (facts, outputs.data_facts(self)))
        same = ", with other pixels, labels or conditions" if theirs == ours else ""
        raise UserError(
            f"--resume_from_checkpoint: the run was trained on {theirs}, and these are {ours}{same}. Give the run's own "
            f"images, or a new run that starts from its weights: --pretrained_model_name_or_path {start} with another "
            "--output_dir, without --resume_from_checkpoint."
        )

    def _check_same_vae(self, facts: dict[str, Any], checkpoint: Path) -> None:
        """Refuses latents of another autoencoder than that of the run that is resumed, wherever it lies."""
        theirs, ours = facts.get("vae_sha256", self.data.vae_sha256), self.data.vae_sha256
        if theirs == ours:
            return
        if theirs is None:
            was, remedy = "pixels", "Leave --vae out"
        else:
            was = "latents" if ours is None else "the latents of another autoencoder"
            remedy = f"Give the run's own autoencoder, which its checkpoints have in them: --vae {checkpoint}"
        raise UserError(f"--resume_from_checkpoint: the run was trained on {was}. {remedy}.")

    def _save_snapshot(self) -> None:
        """Publishes a snapshot of the averages, for `tiny-diffusers ema`."""
        self.folder.publish_snapshot(self.step, lambda folder: posthoc_ema.save_snapshot(self.power_emas, folder))

    def _save_checkpoint(self) -> None:
        """Publishes `checkpoint-N`: networks, EMAs, optimizers, learning rates, and where the run stands."""
        accelerator, folder = self.accelerator, self.folder
        accelerator.wait_for_everyone()
        self._check_weights()
        state = {
            **self.state.state_dict(accelerator),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        collected = {
            name: checkpoints.collect(accelerator.unwrap_model(module), self.optimizers[name].optimizer)
            for name, module in self.modules.items()
        }
        if not accelerator.is_main_process:
            return

        def write(checkpoint: Path) -> None:
            for name, network in self.networks().items():
                checkpoints.save(collected[name], checkpoint / name, checkpoint / f"{name}_optimizer")
                network.save_config(checkpoint / name)
                if name in self.emas:
                    network.save_pretrained(checkpoint / f"{name}_ema")
                for sigma_rel, average in self.power_emas.get(name, {}).items():
                    average.module.save_pretrained(checkpoint / f"{name}_sigma_rel-{sigma_rel:g}")
            outputs.save_pipeline_config(self, checkpoint)
            (checkpoint / "state.json").write_text(json.dumps(state, indent=2))

        newest = folder.publish_checkpoint(self.step, write)
        best = self.state.best
        folder.prune(newest, self.settings.checkpoints_total_limit, best and folder.checkpoint(best["step"]))

    def _check_weights(self) -> None:
        """Checks that what is about to be saved is finite."""
        weights = [parameter for network in self._all_networks() for parameter in network.parameters()]
        if not self._everywhere(all(checkpoints.gather_full(p).isfinite().all() for p in weights)):
            raise UserError(
                f"The weights are not finite after step {self.step}, and are not saved: lower --learning_rate, or use "
                f"--mixed_precision no. The last good checkpoint: {self.folder.last_checkpoint_name()}."
            )

    def _load_checkpoint(self, folder: Path) -> None:
        try:
            for name, network in self.networks().items():
                checkpoints.check_config(network, folder / name, self.family.measured_options)
            for name, module in self.modules.items():
                checkpoints.load_weights(self.accelerator.unwrap_model(module), folder / name)
                if name in self.emas:
                    checkpoints.load_weights(self.emas[name].module, folder / f"{name}_ema")
                for sigma_rel, average in self.power_emas.get(name, {}).items():
                    checkpoints.load_weights(average.module, folder / f"{name}_sigma_rel-{sigma_rel:g}")
                checkpoints.load_optimizer(self.optimizers[name].optimizer, folder / f"{name}_optimizer")
            state = load_json(read_text(folder / "state.json"))
            if state["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.state.load_state_dict(state, self.accelerator)
            for lr_scheduler in self.lr_schedulers.values():
                checkpoints.set_lr_step(lr_scheduler, self.state.step)
        except (OSError, RuntimeError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise UserError(
                f"--resume_from_checkpoint: {folder} does not fit these settings ({reason}); the run's own are in "
                f"{self.folder.config}, for --config."
            ) from error

    def _handle_signals(self) -> dict[int, Any]:
        """Makes signals that end a process end the run after the step; returns the handlers before, by signal."""
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # the last is what clusters send before the time is over
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]  # as nohup does
        return {number: signal.signal(number, self._on_signal) for number in numbers if number not in ignored}

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received_signal = number

    def _agree_on_signals(self) -> None:
        """
        Stops all processes if any was told to stop; else one would wait for the others forever. A signal that comes
        later counts at the next step, on all of them.
        """
        self.stop_signal = self.received_signal
        if self.accelerator.num_processes > 1:
            signals = self.accelerator.gather(torch.tensor([self.stop_signal], device=self.device))
            self.stop_signal = int(signals.max())

    def _everywhere(self, condition: torch.Tensor | bool) -> bool:
        """Checks that a condition holds on every process."""
        held = self.accelerator.reduce(torch.as_tensor(condition, device=self.device).float(), "sum")
        return float(held) == self.accelerator.num_processes

    def _broadcast(self, value: Any) -> Any:
        """Returns the main process's value on every process."""
        return broadcast_object_list([value])[0]

    # ------------------------------------------------------------------------------------------------- the end

    def networks(self) -> dict[str, nn.Module]:
        """Returns the networks that are saved: the EMAs, or the trained ones without EMA."""
        return {
            name: self.emas[name].module if name in self.emas else self.accelerator.unwrap_model(module)
            for name, module in self.modules.items()
        }

    def _all_networks(self) -> list[nn.Module]:
        """Returns the trained networks and all of their averages."""
        averages = [average.module for by_length in self.power_emas.values() for average in by_length.values()]
        return [*self.modules.values(), *self.networks().values(), *averages]

    def _finish(self) -> None:
        """Saves the pipeline, the pictures and the card, and pushes them if asked to."""
        accelerator, best = self.accelerator, self.state.best
        accelerator.wait_for_everyone()
        if self.settings.early_stopping_patience is not None and best and best["step"] < self.step:
            self._restore_best(self.folder.checkpoint(best["step"]))
        self._check_weights()
        if accelerator.is_main_process:
            outputs.save_results(self)
        accelerator.wait_for_everyone()
        last_barrier()
        accelerator.end_training()

    def _restore_best(self, checkpoint: Path) -> None:
        stop = "early stop" if self._stopped_early() else "the end"
        self._print(f"{stop} at step {self.step}: the best validation loss was at step {self.state.best['step']}.")
        reason = find_damage(checkpoint)
        if reason is None:
            self._load_checkpoint(checkpoint)
        else:
            logger.warning(f"{checkpoint.name} cannot be read ({reason}): the last weights are saved, not the best.")

    def _print(self, message: str) -> None:
        if self.accelerator.is_main_process:
            with tqdm.external_write_mode():  # above the progress bar, if there is one
                say(message)


def _num_grids(steps: int) -> int:
    """Returns the number of sample grids in so many steps, with the last one, which is drawn at the end."""
    return max(2, min(_MAX_GRIDS, steps // _STEPS_PER_GRID))


def _passed(step: int, every: float) -> bool:
    """Checks that `step` is the first after another `every` steps."""
    return step // every > (step - 1) // every
