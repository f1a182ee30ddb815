"""The network of the diffusion families: its options, its defaults by resolution, and where it comes from."""

import dataclasses
import inspect
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from torch import nn

from ..data import ImageData
from ..data.labeled_augmentation import NUM_LABELS
from ..errors import UserError, refusals, unknown
from ..files import load_json
from ..flags import flag
from ..hardware import default_device
from ..models import transformer_tiny, unet_tiny
from ..models.layers_tiny import height_and_width
from ..models.transformer_tiny import TinyTransformer2DModel
from ..models.unet_tiny import CHOICES, TinyUNet2DModel
from ..pipelines.pipeline_tiny import TinyPipeline, check_config, config_errors, objective_of, try_stock_network
from ..pipelines.pipeline_tiny_operators import Conditioning
from ..schedulers.scheduling_tiny_common import BETA_SCHEDULE_ALIASES
from ..training.arguments import NetworkArguments, TrainingArguments, network_options
from ..training.family import (
    asked_options,
    check_images,
    check_network_flags,
    load_pretrained,
    network_refusals,
    sample_size,
)
from ..training.settings import earlier_settings
from .transformers import TransformerArguments, default_transformer, warn_of_costly_tokens


logger = logging.getLogger(__name__)

# The inputs that stock networks lack, by the option of a network: the flag that asks for them, and what they are
_FURTHER_INPUTS = {
    "num_conditions": ("condition_columns", "conditions"),
    "num_augment_labels": ("augment_prob", "labels of augmentation"),
}
_COSTLY_POSITIONS = 64 * 64  # full attention over this many or more is warned of on a CPU


@dataclass(frozen=True)
class UNetArguments(NetworkArguments):
    """Options of [`TinyUNet2DModel`], resolved by the resolution (or the preset) where they are not given."""

    block_out_channels: list[int] | None = flag(
        None, "Widths of the levels; by resolution if not given.", within="[1, 4096]"
    )
    layers_per_block: int | None = flag(None, "Residual blocks a level.", within="[1, 32]")
    norm_num_groups: int | None = flag(None, "Groups of the group norms.", within="[1, 4096]")
    attention: list[Literal[CHOICES["attention"]]] | None = flag(
        None, "none, linear or full for each level, or one for all."
    )
    mid_attention: Literal[CHOICES["mid_attention"]] | None = flag(None, "Attention in the middle.")
    attention_head_dim: int | None = flag(None, "Width of an attention head.", within="[1, 4096]")
    patch_size: Literal[CHOICES["patch_size"]] | None = flag(
        None, "Side of the patches that the network works on, in pixels."
    )
    dropout: float | None = flag(None, "Dropout in the residual blocks.", within="[0, 1)")
    weight_standardization: bool | None = flag(None, "Standardize the weights of the convolutions.")
    skip_rescale: bool | None = flag(None, "Divide the residual sums by sqrt 2.")
    time_embedding: Literal[CHOICES["time_embedding"]] | None = flag(None, "Features of the timestep.")
    time_embedding_dim: int | None = flag(None, "Width of the time embedding.", within="[1, 16384]")
    act_fn: Literal[CHOICES["act_fn"]] | None = flag(None, "Activation.")
    downsample: Literal[CHOICES["downsample"]] | None = flag(None, "Downsampling between levels.")
    upsample: Literal[CHOICES["upsample"]] | None = flag(None, "Upsampling between levels.")
    resnet_time_scale_shift: Literal[CHOICES["resnet_time_scale_shift"]] | None = flag(
        None,
        "default: blocks add the time embedding; scale_shift: it scales and shifts their normalized features. The "
        "scripts' own network has scale_shift, presets have default.",
    )
    x_prediction: bool | None = flag(
        None,
        "The layers predict the image, of which the velocity is computed. Only for --prediction_type flow, of whose new "
        "networks it is the default.",
    )


@dataclass(frozen=True)
class ConditionalUNetArguments(UNetArguments):
    """Options of a [`TinyUNet2DModel`] with classes."""

    class_conditioning: Literal[CHOICES["class_conditioning"]] | None = flag(
        None, "add: to the time embedding; scale: the feature maps (with scale_shift, the time's scale of them)."
    )


def default_network(height: int, width: int, is_latent: bool = False) -> dict[str, Any]:
    """
    Returns the network's defaults by resolution, chosen for what a few minutes on a laptop buy: few blocks, so that
    there are many steps, and from 24x24 pixels on patches, so that the costly first level has a quarter of the positions.
    On latents the network is twice as wide as on as many pixels, for they stand for larger images.
    """
    area, divisor = height * width, math.gcd(height, width)
    network = {"patch_size": 1, "layers_per_block": 1, "resnet_time_scale_shift": "scale_shift"}
    if area < 24**2:
        return network | {"block_out_channels": [128 if is_latent else 64] * 2, "attention": ["none", "full"]}
    if divisor % 4 == 0:  # enough halvings are left for the levels
        network["patch_size"] = 2
    if divisor % 8:  # such as 28 or 30, which cannot be halved once more
        return network | {"block_out_channels": [64, 128], "attention": ["none", "full"]}
    if area < 48**2:
        return network | {"block_out_channels": [64, 64, 128], "attention": ["none", "full", "none"]}
    return network | {"block_out_channels": [64, 128, 128], "attention": ["none", "none", "full"]}


def resolve_unet(arguments: UNetArguments, data: ImageData) -> dict[str, Any]:
    """
    Resolves which network it is (of a resumed run its own, if the arguments don't say), and the options that the
    arguments leave open. A preset and a loaded network have theirs: there only what was asked for stays.

    Args:
        arguments ([`UNetArguments`]): The settings, with the objective resolved by
            [`~tiny_diffusers.families.diffusion.resolve_diffusion`].
        data ([`ImageData`]): The images.

    Raises:
        UserError: If an option of the other network is asked for.
    """
    nothing = dict.fromkeys(network_options(arguments))
    if arguments.pretrained_model_name_or_path or arguments.model_config_name_or_path:
        return nothing | asked_options(arguments)
    earlier = earlier_settings(arguments, data)
    network = _network_name(arguments) or earlier.get("network") or "unet"
    given = {name: value for name, value in network_options(arguments).items() if value is not None}
    foreign = _foreign_options(arguments, network)
    for name in [name for name in given if name in foreign]:
        del given[name]
        if name in asked_options(arguments):  # --smoke has options of both
            other = "transformer" if network == "unet" else "unet"
            raise UserError(
                f"--{name}: the network is a {network}, which has no such option: leave it out, or give --network {other}."
            )
    if arguments.preset:
        defaults = {}
    elif network == "transformer":
        defaults = default_transformer(*data.input_shape[1:])
    else:
        defaults = default_network(*data.input_shape[1:], is_latent=data.latents is not None)
        if "block_out_channels" in given:
            defaults["attention"] = ["none"] * (len(given["block_out_channels"]) - 1) + ["full"]
    if arguments.prediction_type == "flow" and data.latents is None:
        defaults["x_prediction"] = earlier.get("x_prediction") if earlier else True  # older runs have none
    return {"network": network} | nothing | defaults | given


def _network_name(arguments: UNetArguments) -> str | None:
    """Returns the network that is asked for: by its name, or by a preset of it; None if nothing says it."""
    if arguments.network or not arguments.preset:
        return arguments.network
    return "transformer" if arguments.preset in transformer_tiny.PRESETS else "unet"


def _foreign_options(arguments: UNetArguments, network: str) -> set[str]:
    """Returns the names of the options that belong to the other network alone."""
    if network == "unet":
        return {field.name for field in dataclasses.fields(TransformerArguments)}
    return network_options(arguments).keys() - inspect.signature(TinyTransformer2DModel).parameters.keys()


def build_unet(
    settings: TrainingArguments,
    data: ImageData,
    num_class_embeds: int | None = None,
    conditioning: Conditioning | None = None,
    num_conditions: int | None = None,
) -> nn.Module:
    """
    Builds the network: a checkpoint's, a configuration's, or a [`TinyUNet2DModel`] or [`TinyTransformer2DModel`] by its
    options.

    Args:
        settings ([`TrainingArguments`]): With the fields of [`UNetArguments`] and [`TransformerArguments`].
        data ([`ImageData`]): The images, for their size and channels and, with classes, their names.
        num_class_embeds (`int`, *optional*): Number of classes.
        conditioning ([`Conditioning`], *optional*): The conditioning image, whose channels the network takes as well.
        num_conditions (`int`, *optional*): Number of conditions.

    Raises:
        UserError: If it does not fit the data or the settings, or cannot be built.
    """
    sources = ("pretrained_model_name_or_path", "model_config_name_or_path", "preset")
    sources = [f"--{name}" for name in sources if getattr(settings, name)]
    if len(sources) > 1:
        raise UserError(f"{' and '.join(sources)}: each stands for a network of its own, so give one of them.")
    channels = data.input_shape[0]
    fixed = {
        "sample_size": sample_size(data),
        "in_channels": channels if conditioning is None else channels + conditioning.shape[0],
        "out_channels": channels * (2 if settings.variance_type == "learned_range" else 1),
        "num_class_embeds": num_class_embeds,
        "num_conditions": num_conditions,
        "num_augment_labels": NUM_LABELS if settings.augment_prob > 0 else None,
        # of Fourier and learned embeddings; EDM's ln(sigma) / 4 is embedded as it is
        "num_train_timesteps": 1 if settings.prediction_type == "edm" else settings.ddpm_num_steps,
    }
    with refusals():
        if settings.pretrained_model_name_or_path:
            id2label = data.id2label if num_class_embeds else None
            unet = _pretrained_unet(settings, data, id2label, conditioning, num_conditions)
            unet = _apply_flags(unet, settings)
        elif settings.model_config_name_or_path:
            unet = _apply_flags(_configured_unet(settings, fixed), settings)
        else:
            torch.manual_seed(settings.seed)  # the initial weights depend on the seed alone
            network_class = TinyTransformer2DModel if _network_name(settings) == "transformer" else TinyUNet2DModel
            with network_refusals(settings):
                unet = network_class(**{**_unet_options(settings, data), **fixed})
    _check_time_embedding(unet, settings)
    if unet.config.get("x_prediction") and settings.prediction_type not in (None, "flow"):
        raise UserError(
            f"--prediction_type {settings.prediction_type}: the loaded network has the output of flow (x_prediction): give "
            "--prediction_type flow, or train a new network."
        )
    if default_device().type == "cpu":
        if isinstance(unet, TinyUNet2DModel):
            _warn_of_costly_attention(unet)
        elif isinstance(unet, TinyTransformer2DModel):
            warn_of_costly_tokens(unet, _COSTLY_POSITIONS)
    return unet


def _check_time_embedding(unet: nn.Module, settings: TrainingArguments) -> None:
    """Refuses an embedding that can't take the continuous timesteps of flow and EDM."""
    if settings.prediction_type not in ("flow", "edm"):
        return
    is_stock = isinstance(unet, UNet2DModel)
    kind = unet.config.time_embedding_type if is_stock else unet.config.time_embedding
    if kind == "learned" or (is_stock and kind == "fourier"):  # the stock one takes the logarithm and divides by t
        raise UserError(
            f"--prediction_type {settings.prediction_type} has continuous timesteps, which the {kind!r} time embedding "
            f"of a {type(unet).__name__} can't take: give {'positional' if is_stock else 'sinusoidal'!r}, or --prediction_type "
            "v_prediction."
        )


def _unet_options(settings: UNetArguments, data: ImageData) -> dict[str, Any]:
    """Returns the options of a new network: a preset's, or the resolved ones, and over them what was given."""
    options = {name: value for name, value in resolve_unet(settings, data).items() if value is not None}
    presets = (transformer_tiny if options.pop("network") == "transformer" else unet_tiny).PRESETS
    if settings.preset is not None and settings.preset not in presets:
        raise unknown("--preset", settings.preset, presets)
    if len(options.get("attention", ())) == 1:
        options["attention"] = options["attention"][0]  # one name for all levels
    return {**presets[settings.preset], **options} if settings.preset else options


def _apply_flags(unet: nn.Module, settings: UNetArguments) -> nn.Module:
    """Applies `--dropout` to a loaded network of ours, as it has no weights; any other flag must fit the network."""
    network_class = {"unet": TinyUNet2DModel, "transformer": TinyTransformer2DModel}.get(settings.network)
    if network_class is not None and not isinstance(unet, network_class):
        source = settings.pretrained_model_name_or_path or settings.model_config_name_or_path
        raise UserError(
            f"--network {settings.network}: the network of {source} is a {type(unet).__name__}: leave it out."
        )
    config = dict(unet.config)
    if isinstance(unet, TinyUNet2DModel):
        levels = len(config["block_out_channels"])
        kinds = config["attention"]
        config["attention"] = [kinds] * levels if isinstance(kinds, str) else kinds
        if settings.attention is not None and len(settings.attention) == 1:
            settings = dataclasses.replace(settings, attention=settings.attention * levels)
        config["time_embedding_dim"] = config["time_embedding_dim"] or 4 * config["block_out_channels"][0]
    is_stock = isinstance(unet, UNet2DModel)
    if not is_stock and settings.dropout is not None and settings.dropout != config["dropout"]:
        dropping = type(unet).from_config(unet.config, dropout=settings.dropout)
        dropping.load_state_dict(unet.state_dict())
        unet, config["dropout"] = dropping, settings.dropout
    check_network_flags(settings, config)
    return unet


def _pretrained_unet(
    settings: TrainingArguments,
    data: ImageData,
    id2label: dict[int, str] | None,
    conditioning: Conditioning | None,
    num_conditions: int | None,
) -> nn.Module:
    name = settings.pretrained_model_name_or_path
    pipeline = load_pretrained(settings, TinyPipeline)
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise UserError(
            f"--pretrained_model_name_or_path: {name} is a {type(pipeline).__name__}, which has no unet to start from."
        )
    if data.latents is not None and "vae" not in pipeline.components:
        raise UserError(
            f"--pretrained_model_name_or_path: the network of {name} denoises pixels, not latents: leave --vae out."
        )
    kind, kind_asked = pipeline.config.get("conditioning"), conditioning and conditioning.kind
    if kind != kind_asked:
        raise UserError(
            f"--pretrained_model_name_or_path: {name} takes {_describe_condition(kind)}, and this run is to take "
            f"{_describe_condition(kind_asked)}: start from a checkpoint of the same conditioning, or leave the flag out."
        )
    channels = unet.config.in_channels - (conditioning.shape[0] if conditioning is not None else 0)
    check_images(
        settings,
        data,
        channels,
        unet.config.get("sample_size") or sample_size(data),
        pipeline._value_range,
    )
    _check_checkpoint(pipeline, settings, channels)
    if num_conditions is not None:
        unet = _with_inputs(unet, "num_conditions", num_conditions, settings)
    elif unet.config.get("num_conditions") is not None:
        raise UserError(
            f"--pretrained_model_name_or_path: {name} has conditions: continue with `tiny-diffusers train conditional "
            "--condition_columns`, on images that have them."
        )
    if settings.augment_prob > 0:
        unet = _with_inputs(unet, "num_augment_labels", NUM_LABELS, settings)
    pipeline.register_modules(unet=unet)
    if id2label is not None:
        unet = _with_classes(pipeline, id2label, settings.seed)
    elif unet.config.get("num_class_embeds") is not None:
        raise UserError(
            f"--pretrained_model_name_or_path: {name} has classes: continue with `tiny-diffusers train conditional` "
            "(train_conditional.py), on images with labels."
        )
    return unet.float()


def _describe_condition(kind: str | None) -> str:
    return "no conditioning image" if kind is None else f"a conditioning image ({kind})"


def _check_checkpoint(pipeline: Any, settings: TrainingArguments, channels: int) -> None:
    """Refuses what the checkpoint's network cannot do, and warns of what it would have to learn again."""
    name, config = settings.pretrained_model_name_or_path, pipeline.unet.config
    if config.out_channels != channels * (2 if settings.variance_type == "learned_range" else 1):
        fitting = "learned_range" if config.out_channels > channels else "fixed_small"
        raise UserError(
            f"--variance_type {settings.variance_type}: the network of {name} has {config.out_channels} channels of "
            f"output for images of {channels}: give --variance_type {fitting}."
        )
    time_embedding = config.get("time_embedding", config.get("time_embedding_type"))
    has_fixed_steps = time_embedding in ("learned", "fourier") or config.get("x_prediction")
    steps = config.get("num_train_timesteps")
    if settings.prediction_type == "edm":
        if has_fixed_steps and steps != 1:
            raise UserError(f"--prediction_type edm: the time embedding of {name} is made for {steps} timesteps.")
    elif has_fixed_steps and steps not in (None, settings.ddpm_num_steps):
        raise UserError(
            f"--ddpm_num_steps {settings.ddpm_num_steps}: the network of {name} is made for {steps} timesteps: give "
            f"--ddpm_num_steps {steps}."
        )

    papers = {theirs: ours for ours, theirs in BETA_SCHEDULE_ALIASES.items()}
    learned = {"prediction_type": "epsilon", **pipeline.scheduler.config}
    objective = objective_of(pipeline.scheduler)
    if objective != "betas":
        learned["prediction_type"] = objective
    compared = {"prediction_type": "prediction_type"}
    if objective == "betas" and settings.prediction_type not in ("flow", "edm"):
        compared |= {"ddpm_beta_schedule": "beta_schedule", "ddpm_num_steps": "num_train_timesteps"}
    elif objective == settings.prediction_type == "flow":
        compared |= {"ddpm_num_steps": "num_train_timesteps"}
    for flag_name, key in compared.items():
        own, asked = (papers.get(value, value) for value in (learned.get(key), getattr(settings, flag_name)))
        if own not in (None, asked):
            logger.warning(
                f"{name} was trained with --{flag_name} {own} and would have to learn {asked} from scratch; --{flag_name} "
                f"{own} continues from what it knows."
            )


def _with_classes(pipeline: Any, id2label: dict[int, str], seed: int) -> nn.Module:
    """
    Rebuilds the pipeline's network for other classes: those that the checkpoint knows by name keep their embeddings, as
    does the null class, and the others are drawn.
    """
    is_stock = isinstance(pipeline.unet, UNet2DModel)
    num_rows = len(id2label) + 1  # of which a stock network counts the null class itself
    torch.manual_seed(seed)
    unet = type(pipeline.unet).from_config(
        pipeline.unet.config, num_class_embeds=num_rows if is_stock else len(id2label)
    )
    weights, trained = unet.state_dict(), pipeline.unet.state_dict()

    key = "class_embedding.weight" if is_stock else "class_embed.table.weight"
    table, trained_table = weights[key], trained.pop(key, None)
    if not is_stock:  # a linear layer of one-hot classes: its columns are the rows
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
        logger.warning(
            f"{len(id2label) - kept} of the {len(id2label)} classes are new to the checkpoint: their embeddings start "
            "at random."
        )
    unet.load_state_dict(weights | trained)
    return unet


def _with_inputs(unet: nn.Module, option: str, count: int, settings: TrainingArguments) -> nn.Module:
    """Rebuilds a network without such inputs for some, whose embedding is drawn; one that has them stays as it is."""
    if unet.config.get(option) is not None:
        return unet
    _refuse_stock_inputs(type(unet).__name__, option, settings.pretrained_model_name_or_path)
    torch.manual_seed(settings.seed)
    extended = type(unet).from_config(unet.config, **{option: count})
    extended.load_state_dict(extended.state_dict() | unet.state_dict())
    return extended


def _refuse_stock_inputs(class_name: str, option: str, source: str) -> None:
    if class_name == "UNet2DModel":
        flag_name, inputs = _FURTHER_INPUTS[option]
        raise UserError(
            f"--{flag_name}: the network of {source} is a stock UNet2DModel, which takes no {inputs}: train a "
            "TinyUNet2DModel or TinyTransformer2DModel, or leave the flag out."
        )


def _configured_unet(settings: TrainingArguments, fixed: dict[str, Any]) -> nn.Module:
    """Builds the network that `--model_config_name_or_path` describes, with what the data and the flags fix."""
    path = Path(settings.model_config_name_or_path)
    if path.is_dir():
        path = next((p for p in (path / "config.json", path / "unet" / "config.json") if p.is_file()), path)
    try:
        config = load_json(path.read_text(encoding="utf-8"))
        class_name = str(config.get("_class_name"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--model_config_name_or_path: {path} is not a network's config.json ({error}).") from error
    classes = {each.__name__: each for each in (TinyUNet2DModel, TinyTransformer2DModel, UNet2DModel)}
    if class_name not in classes:
        raise unknown(f"_class_name in {path}", class_name, classes)
    config |= fixed
    for option in _FURTHER_INPUTS:
        if fixed[option] is not None:
            _refuse_stock_inputs(class_name, option, str(path))
    if class_name == "UNet2DModel":
        for option in _FURTHER_INPUTS:
            del config[option]
        config["class_embed_type"] = None  # a table
        if fixed["num_class_embeds"] is not None:  # it has no null class of its own
            config["num_class_embeds"] += 1
    check_config(config, classes[class_name], str(path))
    torch.manual_seed(settings.seed)
    with config_errors(f"--model_config_name_or_path: {path}"):
        unet = classes[class_name].from_config(config)
        if class_name == "UNet2DModel":
            try_stock_network(unet)
    return unet


def _warn_of_costly_attention(unet: TinyUNet2DModel) -> None:
    """Warns of full attention over so many positions that a CPU does little else."""
    config = unet.config
    widths, kinds = config.block_out_channels, config.attention
    kinds = [kinds] * len(widths) if isinstance(kinds, str) else kinds
    blocks = 2 * config.layers_per_block + 1
    layers = [
        (level, width, kind, blocks, f"level {level + 1} of --attention")
        for level, (width, kind) in enumerate(zip(widths, kinds, strict=True))
    ]
    layers.append((len(widths) - 1, widths[-1], config.mid_attention, 1, "--mid_attention"))
    for level, width, kind, count, where in layers:
        rows, columns = (side // config.patch_size >> level for side in height_and_width(config.sample_size))
        positions = rows * columns
        if kind == "full" and positions >= _COSTLY_POSITIONS:
            attention = 4 * positions**2 * width  # two matrix products, a multiplication and an addition each
            convolutions = 2 * 2 * 9 * positions * width**2  # two of 3x3 a block
            logger.warning(
                f"full attention over {rows}x{columns} positions costs {count * attention / 1e9:.1f} GFLOP an image and "
                f"pass, {attention / convolutions:.0f} times the convolutions beside it: on a CPU give 'linear' or "
                f"'none' for {where}, or a larger --patch_size."
            )
