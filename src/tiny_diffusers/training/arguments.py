"""
The arguments of the train scripts: dataclasses whose fields are the flags, and the parser that reads them.

Flags are spelled as in diffusers' own example scripts. A recipe (`--config FILE.yaml`) holds the same names, and may
hold a grid of experiments: a list `cells`, each with a `name` and what it changes, of which `--cell NAME` picks one.
`--smoke` shrinks any run to seconds. What is given on the command line wins over all of it.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from ..errors import UserError, unknown


def flag(default: Any, help: str, *aliases: str) -> Any:
    """A dataclass field that becomes the flag of its name."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class DataArguments:
    """What is trained on."""

    dataset_name: str = flag("digits", "Hub id, local folder of that layout or of images, or the embedded 'digits'.")
    dataset_config_name: str | None = flag(None, "Configuration of the data set, if it has several.")
    train_data_dir: str | None = flag(None, "Image folder to train on; takes the place of --dataset_name.")
    split: str = flag("train", "Split of the data set to train on.")
    image_column: str | None = flag(None, "Column of the images; found by its type when not given.")
    label_column: str | None = flag(None, "Column of the labels; found by its type when not given.")
    resolution: int | None = flag(
        None, "Images are resized to this many pixels a side; their own size when not given."
    )
    center_crop: bool = flag(False, "Crop the centre of images that are not square.")
    random_flip: bool = flag(False, "Mirror half of the images left to right.")
    random_crop_padding: int = flag(0, "Shift the images by up to so many pixels each way.")
    color_jitter: float = flag(0.0, "Change brightness, contrast and saturation by up to this share.")
    cutout: int = flag(0, "Side of a square that is cut out of each image.")
    classes: str | None = flag(None, "Only these classes, by name or index: 'cat,frog'.")
    max_train_samples: int | None = flag(None, "Use only so many images.")
    validation_split: float = flag(0.05, "Share of the images held out for the validation loss; 0 for none.")
    max_validation_samples: int = flag(512, "Use at most so many held-out images.")
    cache_dir: str | None = flag(None, "Where data sets and models from the Hub are kept.")
    dataloader_num_workers: int = flag(0, "Accepted for compatibility: images lie decoded in memory, none are needed.")


@dataclass
class TrainingArguments(DataArguments):
    """How any family is trained."""

    # What --smoke stands for; a family adds what makes its network tiny.
    SMOKE: ClassVar[dict[str, Any]] = {
        "max_train_steps": 20,
        "max_train_samples": 64,
        "train_batch_size": 8,
        "eval_batch_size": 4,
        "validation_steps": 10,
    }

    config: str | None = flag(None, "YAML file of arguments; flags on the command line win over it.")
    cell: str | None = flag(None, "The experiment to run, where --config holds a grid of them.")
    smoke: bool = flag(False, "Try the whole way out: 20 steps of a tiny network on 64 images.")
    output_dir: str | None = flag(
        None, "Where the model and everything about the run goes; runs/RECIPE/CELL or runs/FAMILY-DATA if not given."
    )
    overwrite_output_dir: bool = flag(False, "Delete another run that --output_dir holds.")
    seed: int = flag(0, "Everything random follows from it.")
    train_batch_size: int = flag(32, "Images a process and micro-batch.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches a step.")
    num_epochs: int = flag(30, "Passes over the data, unless steps or minutes are given.", "--num_train_epochs")
    max_train_steps: int | None = flag(None, "Optimiser steps; takes the place of --num_epochs.")
    max_train_minutes: float | None = flag(
        None, "Train for so long: the steps that fit are settled from the first ones' speed."
    )
    pretrained_model_name_or_path: str | None = flag(None, "Checkpoint or Hub id to start from.")

    learning_rate: float = flag(1e-3, "Highest learning rate.")
    scale_lr: bool = flag(False, "Multiply the learning rate by the images a step.")
    lr_scheduler: str = flag(
        "cosine", "linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup."
    )
    lr_warmup_steps: int = flag(100, "Steps over which the learning rate rises.")
    optimizer: str = flag("adamw", "adamw, adam or sgd.")
    adam_beta1: float = flag(0.9, "Adam's beta1 (SGD's momentum).")
    adam_beta2: float = flag(0.99, "Adam's beta2.")
    adam_weight_decay: float = flag(0.01, "Weight decay.")
    adam_epsilon: float = flag(1e-8, "Adam's epsilon.")
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.")

    use_ema: bool = flag(True, "Save an average of the weights rather than the last ones.")
    ema_max_decay: float = flag(0.9999, "Highest decay of the average.")
    ema_inv_gamma: float = flag(1.0, "Inverse gamma of the average's warm-up.")
    ema_power: float = flag(0.75, "Power of the average's warm-up; 0 for a constant decay.")
    ema_start_step: int | None = flag(0, "The average starts as a copy of the weights after this step.")

    mixed_precision: str = flag("auto", "no, fp16, bf16, or auto: bf16 where the hardware has it.")
    memory_format: str = flag("channels_last", "channels_last or contiguous_format: how weights and feature maps lie.")
    gradient_checkpointing: bool = flag(False, "Trade time for memory.")
    compile: bool = flag(False, "Compile the network's repeated blocks.")
    num_threads: int | None = flag(None, "CPU threads; the physical cores over the local processes when not given.")
    local_rank: int = flag(-1, "Accepted for compatibility: accelerate reads it from the environment.")
    enable_xformers_memory_efficient_attention: bool = flag(False, "Accepted for compatibility: torch's own is used.")

    checkpointing_steps: int = flag(500, "Save a checkpoint to resume from every so many steps.")
    checkpoints_total_limit: int | None = flag(2, "Keep so many checkpoints.")
    resume_from_checkpoint: str | None = flag(None, "'latest', or a checkpoint's name or path.")
    validation_steps: int | None = flag(
        None, "Measure the validation loss every so many steps; 20 times a run if not given."
    )
    early_stopping_patience: int | None = flag(
        None, "Stop after so many validations in a row without a better loss; the best weights are saved."
    )
    save_images_epochs: int | None = flag(
        None,
        "Save a grid of samples every so many epochs, 0 for none on the way; every 10, ten a run at most, if not given.",
    )
    save_model_epochs: int | None = flag(None, "Save the pipeline itself, too, every so many epochs.")
    eval_batch_size: int = flag(64, "Images in the sample grids.")
    logging_steps: int = flag(10, "Write the mean loss to the log every so many steps.")
    report_to: str = flag("none", "tensorboard, wandb, trackio, several with commas, or none.", "--logger")
    logging_dir: str = flag("logs", "Trackers' folder within --output_dir.")

    license: str | None = flag(None, "Licence of the model, for its card, such as apache-2.0.")
    push_to_hub: bool = flag(False, "Push the folder to the Hub at the end.")
    hub_model_id: str | None = flag(None, "Repository to push to; the folder's name when not given.")
    hub_token: str | None = flag(None, "Token to push with.")
    hub_private_repo: bool = flag(False, "Make the repository private.")


Arguments = TypeVar("Arguments", bound=TrainingArguments)

# They choose the values of the others, and are spent once these are settled.
_CHOOSERS = ("config", "cell", "smoke")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}. --help lists the flags.")


def parse_arguments(arguments_class: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """
    Reads a script's arguments from the command line and the recipe that `--config` (and `--cell`) names.

    Args:
        arguments_class (`type`): A dataclass derived from [`TrainingArguments`].
        argv (`list[str]`, *optional*): The command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        UserError: On an unknown flag, key or cell (naming the nearest known one), or a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(arguments_class, allow_abbrev=False, description=sys.modules[arguments_class.__module__].__doc__)
    chosen = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
    if chosen.cell and not chosen.config:
        raise UserError(f"--cell {chosen.cell}: it picks an experiment of a recipe, so give the recipe with --config.")
    # The recipe goes before the command line, through the same parser: so its values are checked alike, and lose.
    recipe = _as_flags(_read_recipe(Path(chosen.config), chosen.cell, arguments_class)) if chosen.config else []
    smoke = _as_flags(arguments_class.SMOKE) if chosen.smoke else []
    namespace, rest = parser.parse_known_args([*recipe, *smoke, *argv])
    if rest:
        flags = [option for option in parser._option_string_actions if option.startswith("--")]
        raise (
            unknown("argument", rest[0], flags)
            if rest[0].startswith("-")
            else UserError(f"'{rest[0]}' stands alone on the command line: every argument is a --flag and its value.")
        )
    arguments = arguments_class(**vars(namespace))
    if arguments.output_dir is None and (arguments.cell or arguments.smoke):  # so that no experiment meets another's
        parts = ["smoke"] if arguments.smoke else []
        parts += [Path(arguments.config).stem] if arguments.config else []
        arguments.output_dir = str(Path("runs", *parts, arguments.cell or ""))
    return arguments


def load_cells(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """
    Reads a recipe: what all of its experiments share, and what each cell of its grid changes.

    Args:
        path (`Path`): The YAML file.

    Returns:
        `tuple[dict, dict]`: argument -> value, and cell's name -> argument -> value; no cells where there is no grid.

    Raises:
        UserError: If the file cannot be read or does not have this form.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config: {path} cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config: {path} is not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config: {path} must hold 'name: value' lines.")

    cells = recipe.pop("cells", [])
    named = isinstance(cells, list) and all(isinstance(cell, dict) and "name" in cell for cell in cells)
    names = [str(cell["name"]) for cell in cells] if named else []
    if not named or len(set(names)) < len(names):
        raise UserError(
            f"--config: the cells of {path} must be a list of 'name: value' lines, each with its own name."
        )
    for cell in cells:
        for key, value in cell.items():
            if value is None:
                raise UserError(
                    f"--config: '{key}' has no value in the cell '{cell['name']}' of {path}: give it one, or leave it out."
                )
    changes = [{key: value for key, value in cell.items() if key != "name"} for cell in cells]
    return recipe, dict(zip(names, changes, strict=True))


def _read_recipe(path: Path, cell: str | None, arguments_class: type[TrainingArguments]) -> dict[str, Any]:
    """The arguments that a recipe stands for, in the cell that was picked."""
    recipe, cells = load_cells(path)
    if cells and cell is None:
        raise UserError(f"--config: {path} holds several experiments; pick one with --cell: {', '.join(cells)}.")
    if cell is not None and not cells:
        raise UserError(f"--cell {cell}: {path} has no cells, so leave it out.")
    if cell is not None and cell not in cells:
        raise unknown(f"cell of {path}", cell, cells)
    recipe |= cells.get(cell, {})

    names = [f.name for f in dataclasses.fields(arguments_class) if f.name not in _CHOOSERS]
    for name in recipe:
        if name not in names:
            raise unknown(f"key in {path}", name, names)
    return recipe


def _as_flags(values: dict[str, Any]) -> list[str]:
    """What would be typed on the command line for these values."""
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


def save_arguments(arguments: TrainingArguments, path: Path, skip: tuple[str, ...] = ()) -> None:
    """Writes arguments as a recipe that `--config` reads back."""
    values = {
        f.name: getattr(arguments, f.name)
        for f in dataclasses.fields(arguments)
        if f.name not in ("hub_token", *_CHOOSERS, *skip)
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def command_line(arguments: TrainingArguments) -> str:
    """The command that makes this run again, with the arguments that are not at their default."""
    words = ["accelerate", "launch", "train_scripts/" + Path(sys.argv[0]).name]
    for f in dataclasses.fields(arguments):
        value = getattr(arguments, f.name)
        if value == f.default or f.name in ("hub_token", "overwrite_output_dir", "resume_from_checkpoint", *_CHOOSERS):
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{f.name}", *([] if value is True else (str(v) for v in values))]
    return " ".join(f'"{word}"' if " " in word else word for word in words)


def fail(error: Exception) -> int:
    """Prints a user's mistake as one line and returns the exit status that goes with it."""
    print(f"error: {error}", file=sys.stderr)
    return 2
