"""
Arguments of the train scripts: frozen dataclasses whose fields are the flags, and how they are read.

Flags are spelled as in diffusers' example scripts. A recipe (`--config FILE.yaml`) holds the same names, and may hold a
grid of experiments: a list `cells`, each with a `name` and what it changes, of which `--cell NAME` picks one. `--smoke`
shrinks any run to seconds. What is given on the command line wins.

`arguments` is what was asked for; `settings`, of the same class, is what a run uses: see `settings.py`.
"""

import dataclasses
import functools
import shlex
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from ..errors import UserError, unknown
from ..files import load_yaml
from ..flags import FlagParser, Flags, as_flags, default_of, flag
from ..paths import is_below_here, local_path, restore_paths
from ..resolution import Resolution
from ..runs import RunFolder
from .recipes import find_recipe, script_of


Optimizer = Literal["adamw", "muon", "adam", "sgd"]
LRScheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "warmup_stable_decay",
]

_NETWORK = "network"  # stands for all options of the network, in what a flag decides
_DATASET = ("resolution", "output_dir", _NETWORK)
# The number of steps follows from one of three flags: one on the command line replaces the others in a recipe.
LENGTHS = ("max_train_steps", "max_train_minutes", "num_epochs")
_LENGTH = {
    "changes_run": False,
    "replaces": LENGTHS,
    "decides": ("ema_start_step", "eval_batch_size", "max_validation_samples"),
}
_GRIDS = {"changes_run": False, "replaces": ("save_images_epochs", "save_images_steps")}


@dataclass(frozen=True)
class NetworkArguments(Flags):
    """
    Base of a network's options, each declared once: a field is a flag and, by the same name, an argument of the network.
    """

    TITLE: ClassVar[str] = "network"


@dataclass(frozen=True)
class DataArguments(Flags):
    """The training data."""

    TITLE: ClassVar[str] = "training data"

    dataset_name: str = flag(
        "digits",
        "Hub id, local folder of that layout or of images, or the embedded 'digits'.",
        replaces=("train_data_dir",),
        decides=_DATASET,
        changes_run=False,  # the images may have moved: a resume compares them
    )
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, if it has several.")
    train_data_dir: str | None = flag(
        None,
        "Image folder to train on, in place of --dataset_name.",
        replaces=("dataset_name",),
        decides=_DATASET,
        changes_run=False,
    )
    split: str = flag("train", "Split of the dataset to train on.")
    image_column: str | None = flag(None, "Column of the images; found by its type if not given.")
    label_column: str | None = flag(None, "Column of the labels, or none; found by its type if not given.")
    resolution: Resolution | None = flag(
        None,
        "Resize images to this many pixels a side, as 32, or to height x width, as 48x64, if given.",
        within="[1, 1024]",
        decides=(_NETWORK,),
    )
    center_crop: bool = flag(False, "Crop the center of images of another aspect ratio.")
    channels: int | None = flag(
        None,
        "1 (gray), 2 (gray and alpha), 3 (RGB), 4 (RGBA), or those that arrays and files of several pages have.",
        within="[1, 1024]",
        decides=(_NETWORK,),
    )
    value_range: list[str] | None = flag(
        None, "Train on values as they are, from LOW to HIGH or 'measured', not scaled to 8 bits."
    )
    show_channels: list[int] | None = flag(
        None, "One or three channels, from 0, that sample grids show.", within="[0, 1024)", changes_run=False
    )
    random_flip: bool = flag(False, "Flip half of the images left to right.")
    random_crop_padding: int = flag(0, "Shift images by up to this many pixels each way.", within="[0, inf)")
    color_jitter: float = flag(0.0, "Change brightness, contrast and saturation by up to this share.", within="[0, 1]")
    cutout: int = flag(0, "Side of a square that is cut out of each image.", within="[0, inf)")
    classes: str | None = flag(None, "Train on these classes only, by name or index: 'cat,frog'.")
    max_train_samples: int | None = flag(None, "Use at most this many images.", within="[1, inf)")
    validation_split: float = flag(
        0.05, "Share of the images held out for the validation loss; 0 for none.", within="[0, 1)"
    )
    max_validation_samples: int = flag(
        512,
        "Use at most this many held-out images; not given, fewer in a short --max_train_minutes.",
        within="[1, inf)",
    )
    cache_dir: str | None = flag(None, "Cache of datasets and models from the Hub.", changes_run=False)
    dataloader_num_workers: int = flag(
        0, "Accepted for compatibility: has no effect.", within="[0, inf)", changes_run=False
    )


@dataclass(frozen=True)
class TrainingArguments(DataArguments):
    """The training of any family."""

    TITLE: ClassVar[str] = "training"
    SCRIPT: ClassVar[str]  # as in `tiny-diffusers train SCRIPT` and train_scripts/train_SCRIPT.py
    FAMILY: ClassVar[str]  # as in a card and in the default --output_dir
    # What --smoke stands for; a family adds what makes its network tiny.
    SMOKE: ClassVar[dict[str, Any]] = {
        "max_train_steps": 20,
        "max_train_samples": 64,
        "train_batch_size": 8,
        "eval_batch_size": 4,
        "validation_steps": 10,
    }

    config: str | None = flag(
        None, "YAML file of arguments, or the name of a recipe of the package; flags win.", changes_run=False
    )
    cell: str | None = flag(None, "Experiment to run, if --config holds a grid of them.", changes_run=False)
    smoke: bool = flag(False, "End-to-end smoke test: 20 steps of a tiny network on 64 images.", changes_run=False)
    output_dir: str | None = flag(
        None, "Folder of the run; by default runs/RECIPE/CELL or runs/FAMILY-DATA.", changes_run=False
    )
    overwrite_output_dir: bool = flag(False, "Delete another run in --output_dir.", changes_run=False)
    seed: int = flag(0, "Seed of all random numbers.", within="[0, 9223372036854775807]")
    train_batch_size: int = flag(32, "Images a process and micro-batch.", within="[1, 65536]")
    gradient_accumulation_steps: int = flag(1, "Micro-batches a step.", within="[1, inf)")
    num_epochs: int = flag(
        30, "Epochs, unless steps or minutes are given.", "--num_train_epochs", within="[1, inf)", **_LENGTH
    )
    max_train_steps: int | None = flag(None, "Optimizer steps; overrides --num_epochs.", within="[1, inf)", **_LENGTH)
    max_train_minutes: float | None = flag(
        None,
        "Minutes from the start of the command (Python's imports aside) to the saved model: the steps that fit are "
        "measured.",
        within="(0, inf)",
        **_LENGTH,
    )
    pretrained_model_name_or_path: str | None = flag(None, "Checkpoint or Hub id to start from.", decides=(_NETWORK,))

    learning_rate: float = flag(1e-3, "Peak learning rate.", within="[0, inf)")
    scale_lr: bool = flag(False, "Multiply the learning rate by the number of images a step.")
    lr_scheduler: LRScheduler = flag("cosine", "Schedule of the learning rate.")
    lr_warmup_steps: int = flag(100, "Steps over which the learning rate rises.", within="[0, inf)")
    optimizer: Optimizer = flag("adamw", "Optimizer.")
    adam_beta1: float = flag(0.9, "Adam's beta1 (SGD's momentum).", within="[0, 1)")
    adam_beta2: float = flag(0.99, "Adam's beta2.", within="[0, 1)")
    adam_weight_decay: float = flag(0.01, "Weight decay.", within="[0, inf)")
    adam_epsilon: float = flag(1e-8, "Adam's epsilon.", within="[0, inf)")
    max_grad_norm: float = flag(1.0, "Clip gradients to this norm; 0 for no clipping.", within="[0, inf]")

    use_ema: bool = flag(True, "Save the EMA of the weights instead of the last weights.")
    ema_max_decay: float = flag(0.9999, "Highest decay of the EMA.", within="[0, 1]")
    ema_inv_gamma: float = flag(1.0, "Inverse gamma of the EMA's warm-up.", within="(0, inf)")
    ema_power: float = flag(0.75, "Power of the EMA's warm-up; 0 for a constant decay.", within="[0, inf)")
    ema_start_step: int | None = flag(0, "The EMA starts as a copy of the weights after this step.", within="[0, inf)")
    posthoc_ema: bool = flag(
        False, "Also save snapshots from which `tiny-diffusers ema` rebuilds averages of any length."
    )

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = flag(
        "auto", "auto: bf16 if the hardware has it; in a long run on a CPU, only if it is measured to be faster."
    )
    memory_format: Literal["channels_last", "contiguous_format"] = flag(
        "channels_last", "Memory format of weights and feature maps."
    )
    gradient_checkpointing: bool = flag(False, "Trade time for memory.")
    compile: bool = flag(False, "Compile the network's repeated blocks (not on a CPU).")
    num_threads: int | None = flag(
        None,
        "CPU threads; if not given, those of OMP_NUM_THREADS or the physical cores over the local processes.",
        within="[1, 1024]",
    )
    local_rank: int = flag(-1, "Accepted for compatibility: has no effect.", within="(-inf, inf)", changes_run=False)
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "Accepted for compatibility: has no effect.", changes_run=False
    )

    checkpointing_steps: int = flag(
        500, "Save a checkpoint every so many steps.", within="[1, inf)", changes_run=False
    )
    checkpoints_total_limit: int | None = flag(
        2, "Keep at most this many checkpoints.", within="[1, inf)", changes_run=False
    )
    resume_from_checkpoint: str | None = flag(None, "'latest', or a checkpoint's name or path.", changes_run=False)
    validation_steps: int | None = flag(
        None, "Measure the validation loss every so many steps; 20 times a run if not given.", within="[1, inf)"
    )
    early_stopping_patience: int | None = flag(
        None, "Stop after so many validations without a better loss; save the best weights.", within="[1, inf)"
    )
    save_images_epochs: int | None = flag(
        None, "Epochs between sample grids, 0 for none; if not given, about ten a run.", within="[0, inf)", **_GRIDS
    )
    save_images_steps: int | None = flag(
        None, "Steps between sample grids, 0 for none; if not given, about ten a run.", within="[0, inf)", **_GRIDS
    )
    save_model_epochs: int | None = flag(
        None, "Save the pipeline every so many epochs.", within="[1, inf)", changes_run=False
    )
    eval_batch_size: int = flag(
        64,
        "Images in the sample grids; not given, fewer in a short --max_train_minutes.",
        within="[1, 65536]",
        changes_run=False,
    )
    logging_steps: int = flag(10, "Log the mean loss every so many steps.", within="[1, inf)", changes_run=False)
    report_to: str = flag(
        "none", "tensorboard, wandb, trackio, several with commas, or none.", "--logger", changes_run=False
    )
    logging_dir: str = flag("logs", "Trackers' folder within --output_dir.", changes_run=False)

    license: str | None = flag(None, "License of the model for its card, such as apache-2.0.", changes_run=False)
    push_to_hub: bool = flag(False, "Push the folder to the Hub at the end.", changes_run=False)
    hub_model_id: str | None = flag(None, "Repository to push to; the folder's name if not given.", changes_run=False)
    hub_token: str | None = flag(None, "Token to push with.", changes_run=False)
    hub_private_repo: bool = flag(False, "Create the repository as private.", changes_run=False)

    # No flags: the names of settings that nobody asked for, of those that were given on the command line, and when the
    # command was started
    resolved: list[str] = dataclasses.field(default_factory=list)
    given: list[str] = dataclasses.field(default_factory=list, compare=False)
    started: float = dataclasses.field(default_factory=lambda: time.perf_counter(), compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.save_images_epochs is not None and self.save_images_steps is not None:
            raise UserError(
                f"--save_images_epochs {self.save_images_epochs} --save_images_steps {self.save_images_steps}: give one "
                "of them."
            )
        if self.posthoc_ema and not self.use_ema:
            raise UserError("--posthoc_ema --use_ema False: post-hoc EMA is beside the EMA; leave --use_ema on.")


Arguments = TypeVar("Arguments", bound=TrainingArguments)

# These delete or share files: they are asked for on the command line alone, as a recipe may be a stranger's.
_ASKED_FOR = ("overwrite_output_dir", "push_to_hub")

# Sections of a recipe that are for other commands, by their names
_SECTIONS = ("study", "search")

# These choose the values of others, or say how one command behaves: no part of a run's saved settings.
UNSAVED = (
    "config",
    "cell",
    "smoke",
    "budget",
    "hub_token",
    "resume_from_checkpoint",
    *_ASKED_FOR,
    "given",
    "started",
)


def network_options(arguments: TrainingArguments) -> dict[str, Any]:
    """Returns the options of the network: the fields of the arguments' [`NetworkArguments`], with their values."""
    return {name: getattr(arguments, name) for name in _network_names(type(arguments))}


def _network_names(arguments_class: type) -> list[str]:
    bases = [c for c in arguments_class.__mro__ if issubclass(c, NetworkArguments)]
    names = {f.name for c in bases if not issubclass(c, DataArguments) for f in dataclasses.fields(c)}
    return [f.name for f in dataclasses.fields(arguments_class) if f.name in names]


@functools.cache
def _script_parser(arguments_class: type[Arguments], doc: str | None = None) -> FlagParser:
    """Builds the parser of a script's flags, once: a search parses hundreds of command lines."""
    prog = f"tiny-diffusers train {arguments_class.SCRIPT}"
    description, _, examples = (doc or "").strip().partition("\n\n")
    parser = FlagParser(arguments_class, prog=prog, usage=f"{prog} [--FLAG VALUE ...]", description=description)
    parser.example = textwrap.dedent(examples)
    return parser


def parse_arguments(
    arguments_class: type[Arguments], argv: list[str] | None = None, doc: str | None = None
) -> Arguments:
    """
    Reads a script's arguments from the command line and the recipe that `--config` (and `--cell`) names.

    Args:
        arguments_class (`type`): A dataclass derived from [`TrainingArguments`].
        argv (`list[str]`, *optional*): The command line without the program's name; `sys.argv[1:]` by default.
        doc (`str`, *optional*): The script's docstring, for `--help`: what it does, an empty line, and examples.

    Raises:
        UserError: On an unknown flag, key or cell (naming the nearest known one), or a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _script_parser(arguments_class, doc)
    given = parser.given(argv)
    config, cell = given.get("config"), given.get("cell")
    if cell and not config:
        raise UserError(f"--cell {cell}: it picks an experiment of a recipe, so give the recipe with --config.")

    # A recipe goes through the same parser, so its values are checked alike.
    recipe, resolved = _read_recipe(find_recipe(config), cell, arguments_class) if config else ({}, [])
    smoke = arguments_class.SMOKE if given.get("smoke") else {}
    lower = parser.given(as_flags(recipe)) | parser.given(as_flags(smoke))
    kept = _without_decided(lower, {*resolved} - {*smoke}, given, arguments_class)
    values = kept | given
    values["resolved"] = [name for name in resolved if name in kept and name not in {*given, *smoke}]
    values["given"] = list(given)
    if values.get("output_dir") is None and (cell or given.get("smoke")):  # so that experiments stay apart
        parts = ["smoke"] if given.get("smoke") else []
        parts += [Path(config).stem] if config else []
        values["output_dir"] = str(Path("runs", *parts, cell or ""))
    return arguments_class(**values)


def _without_decided(
    lower: dict[str, Any], resolved: set[str], given: dict[str, Any], arguments_class: type[TrainingArguments]
) -> dict[str, Any]:
    """Drops values of a recipe, --smoke or an earlier run that a flag on the command line replaces or decides."""
    network = set(_network_names(arguments_class))
    dropped = set()
    for field in dataclasses.fields(arguments_class):
        if field.name in given:
            decided = {*field.metadata["decides"]}
            if _NETWORK in decided or field.name in network:
                decided |= network
            dropped |= {*field.metadata["replaces"]} | (decided & resolved)
    return {name: value for name, value in lower.items() if name not in dropped}


def is_open(settings: TrainingArguments, name: str) -> bool:
    """Checks that nobody has asked for a value of a setting: it has its default, and was not given."""
    field = next(field for field in dataclasses.fields(settings) if field.name == name)
    return name not in settings.given and getattr(settings, name) == default_of(field)


def _load_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = load_yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The recipe {path} is not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(recipe, dict):
        raise UserError(f"The recipe {path} must hold 'name: value' lines.")
    return recipe


def load_section(path: Path, name: str) -> dict[str, Any]:
    """
    Reads a section of a recipe for another command: `study` or `search`.

    Raises:
        UserError: If the file cannot be read, or has no such section.
    """
    section = _load_recipe(path).get(name)
    if not isinstance(section, dict) or not section:
        raise UserError(f"{path} has no section '{name}:' with 'name: value' lines.")
    return section


def load_cells(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """
    Reads a recipe: what all of its experiments share, and what each cell of its grid changes.

    Args:
        path (`Path`): The YAML file.

    Returns:
        `tuple[dict, dict]`: argument -> value, and cell's name -> argument -> value; no cells if there is no grid.

    Raises:
        UserError: If the file cannot be read or does not have this form.
    """
    recipe = {name: value for name, value in _load_recipe(path).items() if name not in _SECTIONS}
    cells = recipe.pop("cells", [])
    named = isinstance(cells, list) and all(isinstance(cell, dict) and "name" in cell for cell in cells)
    names = [str(cell["name"]) for cell in cells] if named else []
    if not named or len(set(names)) < len(names):
        raise UserError(
            f"The cells of the recipe {path} must be a list of 'name: value' lines, each with its own name."
        )
    for cell in cells:
        for key, value in cell.items():
            if value is None:
                raise UserError(
                    f"'{key}' has no value in the cell '{cell['name']}' of the recipe {path}: give it one, or leave it out."
                )
    changes = [{key: value for key, value in cell.items() if key != "name"} for cell in cells]
    return recipe, dict(zip(names, changes, strict=True))


def _read_recipe(
    path: Path, cell: str | None, arguments_class: type[TrainingArguments]
) -> tuple[dict[str, Any], list[str]]:
    """Reads a recipe's arguments, of the cell that was picked, and the names of those that an earlier run resolved."""
    recipe, cells = load_cells(path)
    if cells and cell is None:
        raise UserError(f"--config: {path} holds several experiments; pick one with --cell: {', '.join(cells)}.")
    if cell is not None and not cells:
        raise UserError(f"--cell {cell}: {path} has no cells, so leave it out.")
    if cell is not None and cell not in cells:
        raise unknown(f"cell of {path}", cell, cells)
    recipe |= cells.get(cell, {})
    script = script_of(path, recipe.pop("script", arguments_class.SCRIPT))
    if script != arguments_class.SCRIPT:
        asked = f"--cell {cell}" if cell else f"--config {path}"
        raise UserError(
            f"{asked}: it is for `tiny-diffusers train {script}`, not for {arguments_class.SCRIPT}: give it there."
        )

    recipe = restore_paths(path.parent, recipe)  # of a run's config.yaml
    resolved = recipe.pop("resolved", None) or []
    names = _recipe_names(arguments_class)
    for name, value in recipe.items():
        if name not in names:
            raise unknown(f"key in {path}", name, names)
        _check_value(name, value, path)
        if name in _ASKED_FOR and value:
            raise UserError(
                f"--config: {path} has '{name}', which a recipe cannot ask for, as it deletes or shares files: remove it "
                f"there, and give --{name}."
            )
    return recipe, [name for name in resolved if name in names] if isinstance(resolved, list) else []


def _recipe_names(arguments_class: type[TrainingArguments]) -> list[str]:
    """Lists the flags that a recipe may set."""
    flags = [f.name for f in dataclasses.fields(arguments_class) if "help" in f.metadata]
    return [name for name in flags if name not in ("config", "cell", "smoke", "budget")]


def _check_value(name: str, value: Any, path: Path) -> None:
    """Checks that a value read from YAML is a word, a number, or a list of these."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, (list, dict)):
            raise UserError(f"{path}: '{name}' must be a value, or a list of values.")


def read_settings(path: Path, arguments_class: type[TrainingArguments]) -> dict[str, Any]:
    """
    Reads the settings of an earlier run from its `config.yaml`: those that this version knows, checked as flags are.

    Args:
        path (`Path`): The file; without one there are no settings.
        arguments_class (`type`): A dataclass derived from [`TrainingArguments`].

    Raises:
        UserError: If the file is damaged, or a value has the wrong type.
    """
    names = _recipe_names(arguments_class)
    settings = {name: value for name, value in RunFolder(path.parent).read_config().items() if name in names}
    for name, value in settings.items():
        _check_value(name, value, path)
    try:
        given = _script_parser(arguments_class).given(as_flags(settings))
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return {name: given.get(name) for name in settings}


def split_paths(settings: Arguments) -> tuple[Arguments, dict[str, str]]:
    """
    Returns the settings with local paths shortened to last names, as they may be shared, and the paths themselves.

    A local dataset becomes a `train_data_dir`, so that its name is never taken for a Hub id. Where the run's outputs go
    is shortened only if it is not below the working directory.
    """
    if settings.train_data_dir is None and settings.dataset_name != "digits" and local_path(settings.dataset_name):
        default = type(settings).__dataclass_fields__["dataset_name"].default
        settings = dataclasses.replace(settings, dataset_name=default, train_data_dir=settings.dataset_name)
    paths = {}
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        if not name.endswith(("_dir", "_path", "vae")) or not isinstance(value, str):
            continue
        is_output = name in ("output_dir", "logging_dir")
        if not is_below_here(value) or (local_path(value) is not None and not is_output):
            paths[name] = str(Path(value).expanduser().resolve())
    return dataclasses.replace(settings, **{name: Path(path).name for name, path in paths.items()}), paths


def saved_settings(settings: TrainingArguments) -> dict[str, Any]:
    """
    Returns the settings that a run's `config.yaml` and card hold: no secrets, no local paths, nothing that is of one
    command only.
    """
    settings, _ = split_paths(settings)
    names = [f.name for f in dataclasses.fields(settings) if f.name not in (*UNSAVED, "resolved")]
    return {name: getattr(settings, name) for name in (*names, "resolved")}


def command_line(settings: TrainingArguments) -> str:
    """Returns the command that makes this run again, with the settings that are not at their default, without paths."""
    settings, _ = split_paths(settings)
    words = ["tiny-diffusers", "train", settings.SCRIPT]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "help" not in field.metadata or field.name in UNSAVED or value == default_of(field):
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{field.name}", *([] if value is True else (str(v) for v in values))]
    return shlex.join(words)
