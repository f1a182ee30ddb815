"""What the scripts of VAE, DCGAN and PixelCNN share."""

import dataclasses
from typing import Any, TypeVar

from ..errors import UserError
from .arguments import TrainingArguments


Pipeline = TypeVar("Pipeline")


def halving_widths(resolution: int) -> list[int]:
    """
    Widths of the levels, finest first: 64, 128, ... for as many halvings as bring the images to 4 pixels a side or to
    an odd number, five at most. At 64 pixels these are DCGAN's.
    """
    widths = [64]
    resolution //= 2
    while resolution > 4 and resolution % 2 == 0 and len(widths) < 5:
        widths.append(2 * widths[-1])
        resolution //= 2
    return widths


def load_pretrained(arguments: TrainingArguments, pipeline_class: type[Pipeline]) -> Pipeline:
    """
    The pipeline that `--pretrained_model_name_or_path` names, in float32.

    Raises:
        UserError: If there is none, or it is one of another family.
    """
    from ..pipelines.pipeline_tiny import TinyPipeline

    name = arguments.pretrained_model_name_or_path
    try:
        pipeline = TinyPipeline.from_pretrained(name, cache_dir=arguments.cache_dir)
    except (ValueError, OSError) as error:
        raise UserError(f"--pretrained_model_name_or_path: {error}") from error
    if not isinstance(pipeline, pipeline_class):
        raise UserError(
            f"--pretrained_model_name_or_path: {name} is a {type(pipeline).__name__}, not a {pipeline_class.__name__}."
        )
    return pipeline


def check_given(arguments: TrainingArguments, config: dict[str, Any]) -> None:
    """
    Sees to it that what is asked of the network is what a checkpoint's network is.

    Args:
        arguments ([`TrainingArguments`]): The run's settings; those at their default, or that `--smoke` sets, ask nothing.
        config (`dict[str, Any]`): flag -> what the checkpoint has there.

    Raises:
        UserError: If they differ; it names the flags.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(arguments)}
    defaults |= arguments.SMOKE if arguments.smoke else {}
    differing = []
    for name, value in config.items():
        given, value = getattr(arguments, name), list(value) if isinstance(value, tuple) else value
        if given not in (defaults[name], value):
            differing.append(f"--{name} {given} (it has {value})")
    if differing:
        raise UserError(
            f"--pretrained_model_name_or_path: its network is another than {', '.join(differing)}; leave the flags out."
        )
