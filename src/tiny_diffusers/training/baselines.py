"""What the scripts of the two baselines, VAE and DCGAN, share."""

from typing import TypeVar

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
