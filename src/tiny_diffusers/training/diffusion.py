"""The diffusion families: their arguments, their network and scheduler, their loss. Both diffusion scripts share it."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import nn

from ..data import ImageData
from ..errors import UserError, unknown
from ..hardware import default_device
from ..schedulers.scheduling_tiny_common import BETA_SCHEDULE_ALIASES
from ..schedulers.scheduling_tiny_ddim import TinyDDIMScheduler
from ..schedulers.scheduling_tiny_ddpm import TinyDDPMScheduler
from .arguments import TrainingArguments, flag
from .trainer import Batch, Family


@dataclass
class DiffusionArguments(TrainingArguments):
    """The forward process, the loss and the network."""

    SMOKE: ClassVar[dict[str, Any]] = {
        **TrainingArguments.SMOKE,
        "ddpm_num_inference_steps": 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention": ["linear"],
        "mid_attention": "linear",
    }

    ddpm_num_steps: int = flag(1000, "Timesteps T of the forward process.")
    ddpm_num_inference_steps: int = flag(50, "Steps that the sample grids take.")
    ddpm_beta_schedule: str = flag("cosine", "linear, cosine, sigmoid or quadratic.")
    beta_start: float = flag(1e-4, "First beta (not of cosine).")
    beta_end: float = flag(0.02, "Last beta (not of cosine).")
    prediction_type: str = flag("v_prediction", "epsilon, sample or v_prediction.")
    variance_type: str = flag("fixed_small", "The reverse variance: fixed_small, fixed_large, or learned_range.")
    loss_type: str = flag("l2", "l2, l1, huber or pseudo_huber.")
    huber_delta: float | None = flag(None, "Delta of the Huber losses.")
    huber_schedule: str = flag("constant", "Delta over the timesteps: constant, exponential or snr.")
    snr_gamma: float | None = flag(None, "Min-SNR weighting with this gamma; 5 is usual.")
    dynamic_thresholding: float | None = flag(
        None, "Percentile in (0, 1] of dynamic thresholding, such as 0.995, for sampling; saved with the model."
    )

    model_config_name_or_path: str | None = flag(
        None, "JSON file or folder of a network's configuration, with its class in it."
    )
    preset: str | None = flag(None, "One of the reports' networks by its name, such as self-attention-2-levels.")
    block_out_channels: list[int] | None = flag(None, "Widths of the levels; by resolution when not given.")
    layers_per_block: int | None = flag(None, "Residual blocks a level.")
    norm_num_groups: int | None = flag(None, "Groups of the group norms.")
    attention: list[str] | None = flag(None, "none, linear or full for each level, or one for all.")
    mid_attention: str | None = flag(None, "none, linear or full in the middle.")
    attention_head_dim: int | None = flag(None, "Width of an attention head.")
    patch_size: int | None = flag(None, "1, 2 or 4: the network works on patches of so many pixels a side.")
    dropout: float | None = flag(None, "Dropout in the residual blocks.")
    weight_standardization: bool | None = flag(None, "Standardise the convolutions' weights.")
    skip_rescale: bool | None = flag(None, "Divide the residual sums by sqrt 2.")
    time_embedding: str | None = flag(None, "sinusoidal, fourier or learned.")
    time_embedding_dim: int | None = flag(None, "Width of the time embedding.")
    act_fn: str | None = flag(None, "silu or gelu.")
    downsample: str | None = flag(None, "conv or maxpool.")
    upsample: str | None = flag(None, "nearest, bilinear or transposed.")
    resnet_time_scale_shift: str | None = flag(
        None,
        "default: blocks add the time embedding; scale_shift: it scales and shifts what they have normalised. The "
        "scripts' own network has scale_shift, presets have default.",
    )


@dataclass
class ConditionalArguments(DiffusionArguments):
    """The classes, and how they guide."""

    class_dropout_prob: float = flag(0.1, "Share of the labels that are dropped, without which guidance can't work.")
    class_conditioning: str | None = flag(
        None, "add: to the time embedding, or scale: the feature maps (with scale_shift, the time's scale of them)."
    )
    guidance_scales: list[float] | None = flag(None, "Guidance scales of the sample grids; 1 and 3 when not given.")
    ema_start_step: int | None = flag(
        None,
        "The average starts as a copy of the weights after this step; a tenth of the run, 2,000 at most, if not given.",
    )

    def __post_init__(self):
        if not 0 <= self.class_dropout_prob < 1:
            raise UserError(f"--class_dropout_prob {self.class_dropout_prob}: it must be in [0, 1); 0.1 is usual.")
        for scale in self.guidance_scales or ():
            if not math.isfinite(scale):
                raise UserError(f"--guidance_scales {scale}: each must be a finite number, such as 3.")


# Arguments that are the network's own, handed over where they are given.
_NETWORK_ARGUMENTS = (
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "attention",
    "mid_attention",
    "attention_head_dim",
    "patch_size",
    "dropout",
    "weight_standardization",
    "skip_rescale",
    "time_embedding",
    "time_embedding_dim",
    "act_fn",
    "downsample",
    "upsample",
    "class_conditioning",
    "resnet_time_scale_shift",
)
_COSTLY_PLACES = 64 * 64  # from which on full attention is warned of on a CPU
_MAX_GRID_CLASSES = 10


def default_network(resolution: int) -> dict[str, Any]:
    """
    The network's defaults by resolution, chosen for what a few minutes on a laptop buy: few blocks, so that there are
    many steps, and from 24 pixels on patches, so that the costly first level runs on a quarter of the places.
    """
    network = {"patch_size": 1, "layers_per_block": 1, "resnet_time_scale_shift": "scale_shift"}
    if resolution < 24:
        return network | {"block_out_channels": [64, 64], "attention": ["none", "full"]}
    if resolution % 4 == 0:  # there are levels enough beside the patches
        network["patch_size"] = 2
    if resolution % 8:  # such as 28 or 30, which can't be halved once more
        return network | {"block_out_channels": [64, 128], "attention": ["none", "full"]}
    attention = ["none", "none", "full"] if resolution >= 48 else ["none", "full", "none"]
    return network | {"block_out_channels": [64, 128, 128], "attention": attention}


def build_scheduler(arguments: DiffusionArguments) -> TinyDDIMScheduler:
    """
    The scheduler that training computes its loss with and that is saved with the network.

    Raises:
        UserError: On an unknown name, or values that do not go together.
    """
    thresholding = {}
    if arguments.dynamic_thresholding is not None:
        thresholding = {"thresholding": True, "dynamic_thresholding_ratio": arguments.dynamic_thresholding}
    try:
        scheduler = TinyDDIMScheduler(
            num_train_timesteps=arguments.ddpm_num_steps,
            beta_schedule=arguments.ddpm_beta_schedule,
            beta_start=arguments.beta_start,
            beta_end=arguments.beta_end,
            prediction_type=arguments.prediction_type,
            variance_type=arguments.variance_type,
            loss_type=arguments.loss_type,
            huber_delta=arguments.huber_delta,
            huber_schedule=arguments.huber_schedule,
            snr_gamma=arguments.snr_gamma,
            timestep_spacing="trailing",
            **thresholding,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    last_signal = float(scheduler.alphas_cumprod[-1].sqrt())
    if last_signal > 0.05:
        advice = "--ddpm_beta_schedule cosine"
        start, end = (min(beta * 1000 / arguments.ddpm_num_steps, 0.999) for beta in (1e-4, 0.02))
        scaled = TinyDDIMScheduler.from_config(scheduler.config, beta_start=start, beta_end=end)
        if float(scaled.alphas_cumprod[-1].sqrt()) <= 0.05:
            advice = f"--beta_start {start:.2g} --beta_end {end:.2g}, or {advice}"
        _warn(
            f"the last timestep keeps {last_signal:.2f} of the image (sqrt of its alpha_cumprod), but sampling "
            f"starts from pure noise; use {advice}."
        )
    return scheduler


def build_unet(arguments: DiffusionArguments, data: ImageData, num_class_embeds: int | None = None) -> nn.Module:
    """
    The network: a checkpoint's, a configuration's, or [`TinyUNet2DModel`] by the arguments. Where these leave it to the
    resolution, they are given the values that are settled, for the run's files.

    Raises:
        UserError: If it does not fit the data or the arguments, or cannot be built.
    """
    sources = ("pretrained_model_name_or_path", "model_config_name_or_path", "preset")
    sources = [f"--{name}" for name in sources if getattr(arguments, name)]
    if len(sources) > 1:
        raise UserError(f"{' and '.join(sources)}: each stands for a network of its own, so give one of them.")
    channels, resolution = data.images.shape[1], data.images.shape[-1]
    try:
        if arguments.pretrained_model_name_or_path:
            unet = _pretrained_unet(arguments, resolution, data.id2label if num_class_embeds else None)
            unet = _follow_arguments(unet, arguments)
        elif arguments.model_config_name_or_path:
            unet = _configured_unet(arguments, channels, resolution, num_class_embeds)
            unet = _follow_arguments(unet, arguments)
        else:
            from ..models.unet_tiny import PRESETS, TinyUNet2DModel

            if arguments.preset is not None and arguments.preset not in PRESETS:
                raise unknown("--preset", arguments.preset, PRESETS)
            base = PRESETS[arguments.preset] if arguments.preset else default_network(resolution)
            given = {name: getattr(arguments, name, None) for name in _NETWORK_ARGUMENTS}
            given = {name: value for name, value in given.items() if value is not None}
            if "attention" in given and len(given["attention"]) == 1:
                given["attention"] = given["attention"][0]  # one name for all levels
            elif "block_out_channels" in given and "attention" not in given and not arguments.preset:
                given["attention"] = ["none"] * (len(given["block_out_channels"]) - 1) + ["full"]
            if not arguments.preset:  # for the run's files, which must make it again when defaults have changed
                for name, value in {**base, **given}.items():
                    if getattr(arguments, name) is None:
                        setattr(arguments, name, value)
            torch.manual_seed(arguments.seed)  # the initial weights are the seed's alone
            settled = {
                "sample_size": resolution,
                "in_channels": channels,
                "out_channels": channels * (2 if arguments.variance_type == "learned_range" else 1),
                "num_class_embeds": num_class_embeds,
                "num_train_timesteps": arguments.ddpm_num_steps,
            }
            unet = TinyUNet2DModel(**{**base, **given, **settled})
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    expected = unet.config.in_channels
    if expected != channels:
        raise UserError(f"the network takes images of {expected} channels, but those of {data.name} have {channels}.")
    if default_device().type == "cpu":
        _warn_of_costly_attention(unet)
    return unet


def _follow_arguments(unet: nn.Module, arguments: DiffusionArguments) -> nn.Module:
    """A loaded network, with the dropout that is given: it has no weights. What else differs from it is refused."""
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in unet.config.items()}
    levels, ours = len(config["block_out_channels"]), "patch_size" in config  # a stock network has none
    if ours:
        if isinstance(config["attention"], str):
            config["attention"] = [config["attention"]] * levels
        config["time_embedding_dim"] = config["time_embedding_dim"] or 4 * config["block_out_channels"][0]

    refused = []
    for name in _NETWORK_ARGUMENTS:
        given = getattr(arguments, name, None)
        if arguments.smoke and given == arguments.SMOKE.get(name):  # --smoke's, not the user's
            setattr(arguments, name, None)
            continue
        if name == "attention" and given is not None and len(given) == 1:
            given = given * levels
        if given is None or given == config.get(name):
            continue
        if name == "dropout" and ours:
            dropping = type(unet).from_config(unet.config, dropout=given)
            dropping.load_state_dict(unet.state_dict())
            unet = dropping
            continue
        has = f"it has {_spelled(config[name])}" if name in config else "it knows no such option"
        refused.append(f"--{name} {_spelled(given)} ({has})")
    if refused:
        source = arguments.pretrained_model_name_or_path or arguments.model_config_name_or_path
        raise UserError(f"{', '.join(refused)}: {source} settles the network, so leave such flags out.")
    return unet


def _spelled(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pretrained_unet(arguments: DiffusionArguments, resolution: int, id2label: dict[int, str] | None) -> nn.Module:
    from ..pipelines.pipeline_tiny import TinyPipeline

    name = arguments.pretrained_model_name_or_path
    pipeline = TinyPipeline.from_pretrained(name, cache_dir=arguments.cache_dir)
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise UserError(
            f"--pretrained_model_name_or_path: {name} is a {type(pipeline).__name__}, which has no unet to start from."
        )
    _check_checkpoint(pipeline, arguments, resolution)
    if id2label is not None:
        unet = _with_classes(pipeline, id2label, arguments.seed)
    elif unet.config.get("num_class_embeds") is not None:
        raise UserError(f"--pretrained_model_name_or_path: {name} has classes: go on with train_conditional.py.")
    return unet.float()


def _check_checkpoint(pipeline: Any, arguments: DiffusionArguments, resolution: int) -> None:
    """Refuses what the checkpoint's network can't do, and warns of what it would have to learn anew."""
    name, config = arguments.pretrained_model_name_or_path, pipeline.unet.config
    size = config.get("sample_size") or resolution
    height, width = (size, size) if isinstance(size, int) else size
    if (height, width) != (resolution, resolution):
        raise UserError(
            f"--pretrained_model_name_or_path: {name} makes images of {height}x{width}, but those of the data are "
            f"{resolution}x{resolution}: give --resolution {height}."
        )
    if config.out_channels != config.in_channels * (2 if arguments.variance_type == "learned_range" else 1):
        fitting = "learned_range" if config.out_channels > config.in_channels else "fixed_small"
        raise UserError(
            f"--variance_type {arguments.variance_type}: the network of {name} has {config.out_channels} channels of "
            f"output for images of {config.in_channels}: give --variance_type {fitting}."
        )
    depends = config.get("time_embedding", config.get("time_embedding_type")) in ("learned", "fourier")
    steps = config.get("num_train_timesteps")
    if depends and steps not in (None, arguments.ddpm_num_steps):
        raise UserError(
            f"--ddpm_num_steps {arguments.ddpm_num_steps}: the time embedding of {name} is made for {steps} timesteps: "
            f"give --ddpm_num_steps {steps}."
        )

    papers = {theirs: ours for ours, theirs in BETA_SCHEDULE_ALIASES.items()}
    learned = {"prediction_type": "epsilon", **pipeline.scheduler.config}
    for flag_name, key in (
        ("prediction_type", "prediction_type"),
        ("ddpm_beta_schedule", "beta_schedule"),
        ("ddpm_num_steps", "num_train_timesteps"),
    ):
        own, asked = (papers.get(value, value) for value in (learned.get(key), getattr(arguments, flag_name)))
        if own not in (None, asked):
            _warn(
                f"{name} has learned with --{flag_name} {own}, and would have to learn {asked} anew; --{flag_name} "
                f"{own} goes on from what it knows."
            )


def _with_classes(pipeline: Any, id2label: dict[int, str], seed: int) -> nn.Module:
    """
    The pipeline's network for other classes: those that the checkpoint knows by name keep their embeddings, as does the
    null class, and the others are drawn anew.
    """
    from diffusers import UNet2DModel

    stock = isinstance(pipeline.unet, UNet2DModel)
    torch.manual_seed(seed)
    unet = type(pipeline.unet).from_config(pipeline.unet.config, num_class_embeds=len(id2label) + stock)
    weights, trained = unet.state_dict(), pipeline.unet.state_dict()

    key = "class_embedding.weight" if stock else "class_embed.table.weight"
    table, trained_table = weights[key], trained.pop(key, None)
    if not stock:  # a linear layer of one-hot classes: its columns are the rows
        table, trained_table = table.T, None if trained_table is None else trained_table.T
    class_ids = {name: class_id for class_id, name in (pipeline.config.get("id2label") or {}).items()}
    kept = 0
    if trained_table is not None:
        kept = sum(name in class_ids for name in id2label.values())
        trained_ids = [*(class_ids.get(name) for name in id2label.values()), pipeline.config.get("null_class_id")]
        for row, trained_row in enumerate(trained_ids):
            if trained_row is not None:
                table[row] = trained_table[trained_row]
    if kept < len(id2label):
        _warn(
            f"{len(id2label) - kept} of the {len(id2label)} classes are new to the checkpoint: their embeddings are too."
        )
    unet.load_state_dict(weights | trained)
    return unet


def _configured_unet(
    arguments: DiffusionArguments, channels: int, resolution: int, num_class_embeds: int | None
) -> nn.Module:
    path = Path(arguments.model_config_name_or_path)
    if path.is_dir():
        path = next((p for p in (path / "config.json", path / "unet" / "config.json") if p.is_file()), path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--model_config_name_or_path: {path} is not a network's config.json ({error}).") from error
    class_name = config.get("_class_name")
    if class_name == "TinyUNet2DModel":
        from ..models.unet_tiny import TinyUNet2DModel as unet_class
    elif class_name == "UNet2DModel":
        from diffusers import UNet2DModel as unet_class
    else:
        raise unknown(f"_class_name in {path}", class_name, ["TinyUNet2DModel", "UNet2DModel"])
    # The file describes the architecture; what the data and the flags settle is settled here.
    config |= {"sample_size": resolution, "in_channels": channels, "num_train_timesteps": arguments.ddpm_num_steps}
    config["out_channels"] = channels * (2 if arguments.variance_type == "learned_range" else 1)
    config["num_class_embeds"] = num_class_embeds
    if class_name == "UNet2DModel":
        config["class_embed_type"] = None  # a table
        if num_class_embeds is not None:  # it has no null class of its own
            config["num_class_embeds"] += 1
    torch.manual_seed(arguments.seed)
    return unet_class.from_config(config)


def _warn_of_costly_attention(unet: nn.Module) -> None:
    """Says what full attention costs where there are so many places that a CPU does little else."""
    config = unet.config
    if "patch_size" not in config:  # a stock network
        return
    widths, kinds = config.block_out_channels, config.attention
    kinds = [kinds] * len(widths) if isinstance(kinds, str) else kinds
    blocks = 2 * config.layers_per_block + 1
    layers = [
        (level, width, kind, blocks, f"level {level + 1} of --attention")
        for level, (width, kind) in enumerate(zip(widths, kinds, strict=True))
    ]
    layers.append((len(widths) - 1, widths[-1], config.mid_attention, 1, "--mid_attention"))
    for level, width, kind, count, where in layers:
        side = config.sample_size // config.patch_size >> level
        places = side**2
        if kind == "full" and places >= _COSTLY_PLACES:
            attention = 4 * places**2 * width  # two products of matrices, a multiplication and an addition each
            convolutions = 2 * 2 * 9 * places * width**2  # two of 3x3 a block
            _warn(
                f"full attention over {side}x{side} places costs {count * attention / 1e9:.1f} GFLOP an image and pass, "
                f"{attention / convolutions:.0f} times the convolutions beside it: on a CPU give 'linear' or 'none' for "
                f"{where}, or a larger --patch_size."
            )


def _warn(message: str) -> None:
    PartialState().print(f"warning: {message}", file=sys.stderr)


class Diffusion(Family):
    """
    Denoising diffusion: a U-Net and a scheduler.

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels=None).sample`.
        scheduler ([`TinyDDIMScheduler`] or [`TinyDDPMScheduler`]): Its `training_loss` is minimised.
        num_inference_steps (`int`): Steps that the sample grids take.
    """

    name = "ddpm"

    def __init__(
        self, unet: nn.Module, scheduler: TinyDDIMScheduler | TinyDDPMScheduler, num_inference_steps: int = 50
    ):
        self.modules = {"unet": unet}
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
        yield "unet", self._image_losses(modules["unet"], batch).mean()

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        return self._image_losses(modules["unet"], batch)

    def _image_losses(self, unet: nn.Module, batch: Batch) -> torch.Tensor:
        noise = batch.draws.normal("noise", *batch.images.shape[1:])
        timesteps = batch.draws.integers("timesteps", self.scheduler.config.num_train_timesteps)  # one for each image
        noisy = self.scheduler.add_noise(batch.images, noise, timesteps)
        labels = {} if batch.labels is None else {"class_labels": batch.labels}
        output = unet(noisy, timesteps, **labels).sample
        return self.scheduler.training_loss(output, batch.images, noise, timesteps, reduction="none")

    def pipeline(self, modules: dict[str, nn.Module]) -> Any:
        from ..pipelines.pipeline_tiny import TinyPipeline

        return TinyPipeline(unet=modules["unet"], scheduler=self.scheduler)

    def sample(self, pipeline: Any, num_images: int, seed: int) -> tuple[list, dict]:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        images = pipeline(
            batch_size=num_images, generator=generators, num_inference_steps=self.num_inference_steps
        ).images
        return images, {}


class ConditionalDiffusion(Diffusion):
    """
    Denoising diffusion of classes, which may be guided where labels are dropped: Ho & Salimans 2022 (arXiv 2207.12598).

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels).sample`, with a row for each of K classes and
            row K for none.
        scheduler ([`TinyDDIMScheduler`] or [`TinyDDPMScheduler`]): Its `training_loss` is minimised.
        id2label (`dict[int, str]`): The names of the classes 0 to K - 1.
        class_dropout_prob (`float`): Share of the labels that are replaced by the null class.
        guidance_scales (`list[float]`): Guidance scales of the sample grids.
        num_inference_steps (`int`): Steps that the sample grids take.
    """

    name = "conditional-ddpm"

    def __init__(
        self,
        unet: nn.Module,
        scheduler: TinyDDIMScheduler | TinyDDPMScheduler,
        id2label: dict[int, str],
        class_dropout_prob: float = 0.1,
        guidance_scales: list[float] | None = None,
        num_inference_steps: int = 50,
    ):
        super().__init__(unet, scheduler, num_inference_steps)
        self.id2label = id2label
        self.null_label, self.label_dropout = len(id2label), class_dropout_prob
        self.guidance_scales = guidance_scales or ([1.0, 3.0] if class_dropout_prob else [1.0])
        if class_dropout_prob == 0 and self.guidance_scales != [1.0]:
            _warn(
                "guidance won't help where no label is dropped: the null class stays as it was initialised, and guidance "
                "leads away from nothing; use --class_dropout_prob 0.1, or --guidance_scales 1."
            )

    def pipeline(self, modules: dict[str, nn.Module]) -> Any:
        from ..pipelines.pipeline_tiny_conditional import TinyConditionalPipeline

        return TinyConditionalPipeline(
            unet=modules["unet"],
            scheduler=self.scheduler,
            id2label=self.id2label,
            class_dropout_prob=self.label_dropout,
        )

    def sample(self, pipeline: Any, num_images: int, seed: int) -> tuple[list, dict]:
        """A row for each class, and in it one guidance scale after another, each from the same noise."""
        classes, scales = list(self.id2label)[:_MAX_GRID_CLASSES], self.guidance_scales
        each = max(1, num_images // (len(classes) * len(scales)))  # images of a class at one scale
        labels = [class_id for class_id in classes for _ in range(each)]
        batches = [
            pipeline(
                class_labels=labels,
                guidance_scale=scale,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(labels))],
                num_inference_steps=self.num_inference_steps,
            ).images
            for scale in scales
        ]
        starts = range(0, len(labels), each)
        images = [image for start in starts for batch in batches for image in batch[start : start + each]]
        return images, {
            "columns": each * len(scales),
            "row_labels": [self.id2label[class_id] for class_id in classes],
            "column_labels": [text for scale in scales for text in [f"w = {scale:g}", *[""] * (each - 1)]],
        }
