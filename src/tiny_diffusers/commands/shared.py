"""What several commands share: arguments, the loading of a checkpoint, the places of outputs."""

import argparse
import contextlib
import inspect
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError, first_line, refusals, say, unknown
from ..samplers import SCHEDULER_NAMES, SCHEDULERS, check_scheduler_name, use_scheduler


if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    from ..flags import OneLineParser


DTYPES = ("auto", "float32", "bfloat16", "float16")
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")  # of curves and diagrams
PICTURE_SUFFIXES = (".png", ".gif", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CHECKPOINT_HELP = "a folder, owner/name on the Hub, or a published model, such as mnist-32"
MAX_SEED = 2**63 - 1
MAX_ROW = 16  # images of one class beside each other in a grid

# The settings that a guidance model shares with the model: of its scheduler and of its pipeline
_OBJECTIVE = ("prediction_type", "num_train_timesteps", "sigma_data", "stochastic_sampling", "rescale_betas_zero_snr")
_OBJECTIVE += ("beta_schedule", "beta_start", "beta_end", "trained_betas")
_INPUTS = ("id2label", "null_class_id", "conditioning", "condition_statistics", "value_range")


class Command(NamedTuple):
    """Command, or a kind of one: its line of help, its parser, what runs it, and the arguments of an example."""

    help: str
    parser: Callable[[], "OneLineParser"]
    run: Callable[[argparse.Namespace], int | None]
    example: str


def build_parser(name: str, command: Command) -> "OneLineParser":
    """Builds the parser of a command, whose --help ends with its example."""
    parser = command.parser()
    parser.description = parser.description or command.help
    parser.example = f"tiny-diffusers {name} {command.example}".rstrip()
    return parser


def make_parser(command: str, description: str | None = None) -> "OneLineParser":
    """Returns the parser of a command; without a description, it is what the list of commands says of it."""
    from ..flags import OneLineParser

    return OneLineParser(prog=f"tiny-diffusers {command}", description=description, allow_abbrev=False)


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=checkpoint_name, help=CHECKPOINT_HELP)
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the checkpoint's own code; read it first"
    )


def checkpoint_name(name: str) -> str:
    """Returns a CHECKPOINT as it was given, or the folder of the published model whose name it is."""
    from .. import zoo

    try:
        return str(zoo.find_published(name))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    add_solver_arguments(parser)


def add_show_channels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show_channels",
        type=int,
        nargs="+",
        metavar="N",
        help="one channel of the images to show in gray, or three as red, green and blue, numbered from 0 (default: all)",
    )


def add_solver_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of sampling but the number of steps."""
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help=f"one of {', '.join(SCHEDULER_NAMES)} (default: the one saved with the checkpoint); of them, for "
        f"rectified flow {', '.join(SCHEDULERS['flow'])}, and for EDM {', '.join(SCHEDULERS['edm'])}",
    )
    parser.add_argument(
        "--eta",
        type=float,
        help="fresh noise in each step: 0 is none, 1 as much as DDPM; more for flow and EDM only (default: 1; 1.5 with "
        "multistep; 0 with heun, for interpolation and with --inversion)",
    )
    parser.add_argument(
        "--timestep_spacing",
        choices=("leading", "trailing", "linspace"),
        help="where the steps are (default: as saved with the checkpoint)",
    )
    parser.add_argument(
        "--clip_sample",
        type=true_or_false,
        metavar="True|False",
        help="clip the predicted image at each step, where the sampler can (default: as saved; under guidance, True)",
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="1: the conditional model itself, above 1: more like the class, 0: no class",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 if the hardware has it, else float32"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator, if there is one)")


def add_guidance_interval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="share of the steps that are guided, from 0 at the noise to 1 at the image (default: 0 1)",
    )


def add_dynamic_thresholding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dynamic_thresholding",
        type=float,
        metavar="P",
        help="percentile, such as 0.995, that keeps high guidance from saturating (default: the scheduler's setting)",
    )


def add_temperature(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature", type=float, help="temperature of a PixelCNN; below 1 likely values are drawn more often"
    )


def add_truncation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--truncation",
        type=float,
        help="of a VAE or DCGAN, factor of the latents z, from 0 to 1; below 1 images are more typical and less varied",
    )


def add_output_argument(parser: argparse.ArgumentParser, default: str, help: str) -> None:
    parser.add_argument("--output", default=default, help=f"{help}: NAME.png, DIR/ (default: {default})")


def add_picture_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path(default), metavar="FILE", help=f"the picture (default: {default})"
    )


def positive_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return text.lower() == "true"


def seed_number(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {MAX_SEED}")
    return int(text)


def comma_separated(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(item) for item in comma_separated(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers, such as 0,250,500") from None


def finite_numbers(text: str) -> list[float]:
    with contextlib.suppress(ValueError):
        numbers = [float(item) for item in comma_separated(text)]
        if all(map(math.isfinite, numbers)):
            return numbers
    raise argparse.ArgumentTypeError(f"'{text}' is not a list of finite numbers, such as 0,1,3")


def positive_numbers(text: str) -> list[int]:
    return [positive_number(item) for item in comma_separated(text)]


def two_seeds(text: str) -> tuple[int, int]:
    try:
        first, second = map(seed_number, text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not two whole numbers from 0 to {MAX_SEED}, such as 0,1"
        ) from None
    return first, second


def find_pictures(path: Path) -> dict[str, Path]:
    """Finds a picture, or those of a folder: name without suffix -> file."""
    if path.is_dir():
        suffixes = (*PICTURE_SUFFIXES, ".npy")
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file())
        if not files:
            raise UserError(f"--image '{path}' has no pictures: {', '.join(suffixes)}.")
    else:
        files = [path]
    pictures = {}
    for file in files:
        if file.stem in pictures:
            raise UserError(f"--image '{path}' has two pictures of the name {file.stem}: rename one.")
        pictures[file.stem] = file
    return pictures


def read_picture(
    flag: str,
    path: Path,
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
    resolution: tuple[int, int] | None = None,
) -> "Image.Image | np.ndarray":
    """
    Reads a picture or a .npy file that was given by a flag, as [`~tiny_diffusers.data.decoders.read_picture`] does, and
    clips an array to the values of the model.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from ..data import decoders

    try:
        picture = decoders.read_picture(path, channels, value_range, resolution)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, UnidentifiedImageError):  # whose message is an address in memory
            reason = "of no format that Pillow knows"
        raise UserError(f"{flag}: '{path}' can't be read as a picture ({reason}).") from None
    found = picture.shape[-1] if isinstance(picture, np.ndarray) else len(picture.getbands())
    if channels not in (None, 1, 3, found):
        raise UserError(
            f"{flag}: '{path}' has {found} channels, and {channels} are needed: give a .npy file of shape "
            f"(H, W, {channels}), or a file of {channels} gray pages."
        )
    if isinstance(picture, np.ndarray):
        low, high = value_range or (0.0, 1.0)
        if picture.min() < low or picture.max() > high:
            given = f"{picture.min():g} to {picture.max():g}"
            say(f"{flag}: '{path}' has values from {given}, clipped to {low:g} to {high:g}", sys.stderr)
        picture = picture.clip(low, high)
    return picture


def read_image_for(pipe: "DiffusionPipeline", flag: str, path: Path) -> "Image.Image | np.ndarray":
    """
    Reads a picture or a .npy file as a pipeline takes its images: a picture of any size where one holds them, else an
    array of their size.
    """
    channels, *size = pipe._image_shape
    is_array = pipe._value_range is not None or channels > 4
    return read_picture(flag, path, channels, pipe._value_range, tuple(size) if is_array else None)


def show_image(pipe: "DiffusionPipeline", image: "Image.Image | np.ndarray") -> "Image.Image":
    """Draws a given image as the pipeline draws its own; one of other channels, such as a mask, by these."""
    import numpy as np

    from ..pipelines.pipeline_tiny import to_picture

    pixels = np.atleast_3d(image)
    if isinstance(image, np.ndarray):
        conditioning = getattr(pipe, "_conditioning", None)
        is_other = conditioning is not None and not conditioning.is_made  # lies in [0, 1] whatever the value range
        pixels = ((image if is_other else pipe._from_values(image)) * 255).round().astype(np.uint8)
    return to_picture(pixels, pipe.show_channels if pixels.shape[-1] == pipe._image_shape[0] else None)


def load_pipeline(args: argparse.Namespace) -> "DiffusionPipeline":
    """Loads the pipeline on its device, in its dtype, with the scheduler that was asked for."""
    if args.scheduler is not None:
        check_scheduler_name(args.scheduler)

    from .. import hardware

    device = find_device(args.device)
    dtype = hardware.resolve_dtype(args.dtype, device)
    if args.dtype == "auto" and dtype.itemsize < 4:
        say(f"computing in {dtype} on {device}; --dtype float32 is slower and more exact", sys.stderr)
    pipe = place(load_checkpoint(args), device, dtype)
    choose_scheduler(pipe, args)
    return pipe


def find_device(name: str | None) -> "torch.device":
    """Sets up torch, and returns the device that was asked for."""
    from .. import hardware

    try:
        return hardware.setup_torch(device=name)
    except UserError as error:
        raise UserError(f"--device: {error}" if name else str(error)) from error


def place(pipe: "DiffusionPipeline", device: "torch.device", dtype: "torch.dtype") -> "DiffusionPipeline":
    """Moves a pipeline to a device and a dtype, and its networks to the memory format of convolutions."""
    import torch

    pipe.to(device, dtype)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(memory_format=torch.channels_last)  # so that no convolution converts
    return pipe


def choose_scheduler(pipe: "DiffusionPipeline", args: argparse.Namespace) -> None:
    """Puts the scheduler into a pipeline that --scheduler and --timestep_spacing ask for."""
    from ..pipelines.pipeline_tiny import objective_of, takes

    if args.scheduler is not None:
        use_scheduler(pipe, args.scheduler, args.checkpoint)
    if args.timestep_spacing is not None:
        scheduler = getattr(pipe, "scheduler", pipe)
        if not takes(scheduler, "timestep_spacing") or objective_of(scheduler) != "betas":
            raise UserError(
                f"--timestep_spacing means nothing to the {type(scheduler).__name__} of '{args.checkpoint}': leave it out."
            )
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, timestep_spacing=args.timestep_spacing
        )


def load_checkpoint(args: argparse.Namespace) -> "DiffusionPipeline":
    from diffusers.utils import logging

    from .. import TinyPipeline
    from ..pipelines.pipeline_tiny import check_shown_channels

    logging.disable_progress_bar()  # of the loading, which is short
    logging.set_verbosity_error()  # no warnings about keys of our schedulers that another one ignores
    try:
        with refusals():
            pipe = TinyPipeline.from_pretrained(args.checkpoint, trust_remote_code=args.trust_remote_code)
            pipe.show_channels = getattr(args, "show_channels", None)
            if pipe.show_channels is not None:
                check_shown_channels(pipe.show_channels, pipe._image_shape[0])
    except OSError as error:
        raise UserError(
            f"'{args.checkpoint}' can't be loaded: give a folder with a model_index.json, or the owner/name of a model "
            f"on the Hub ({first_line(error)})."
        ) from error
    output = getattr(args, "output", None)
    if (
        Path(output or "").suffix.lower() in (".jpg", ".jpeg")
        and pipe.show_channels is None
        and pipe._image_shape[0] == 4
    ):
        raise UserError(f"--output {output}: JPEG has no alpha channel: give a .png, or --show_channels 0 1 2.")
    return pipe


def add_guidance_model(pipe: "DiffusionPipeline", args: argparse.Namespace) -> None:
    """Gives a pipeline the network of --guidance_model, which must have been trained for the same as its own."""
    source = argparse.Namespace(checkpoint=args.guidance_model, trust_remote_code=args.trust_remote_code)
    other = load_checkpoint(source)
    for each, checkpoint in ((pipe, args.checkpoint), (other, args.guidance_model)):
        check_diffusion(each, checkpoint, "be guided by another model")
    configs = [(each.scheduler.config, each.config) for each in (other, pipe)]
    for names, theirs, ours in zip((_OBJECTIVE, _INPUTS), *configs, strict=True):
        for name in names:
            if theirs.get(name) != ours.get(name):
                raise UserError(
                    f"--guidance_model '{args.guidance_model}' was trained for another task: its {name} is "
                    f"{theirs.get(name)}, and that of '{args.checkpoint}' {ours.get(name)}."
                )
    with refusals("--guidance_model: "):
        pipe.register_modules(guidance_model=other.unet)
        pipe._check_guidance(1.0, (0.0, 1.0))


def check_diffusion(pipe: "DiffusionPipeline", checkpoint: str, purpose: str) -> None:
    """Refuses a pipeline that does not denoise."""
    if "unet" not in pipe.components:
        raise UserError(
            f"'{checkpoint}' is a {type(pipe).__name__}, which can't {purpose}: give a checkpoint of diffusion."
        )


def call_options(call: Callable, pipe: "DiffusionPipeline", args: argparse.Namespace, *names: str) -> dict:
    """Returns the named arguments that were given; `call`, the pipeline's own or its interpolation, must know them all."""
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    known = inspect.signature(call).parameters
    for name in options:
        if name not in known:
            raise UserError(f"--{name} means nothing to '{args.checkpoint}', a {type(pipe).__name__}: leave it out.")
    return options


def names_that_differ(paths: Sequence[str]) -> list[str]:
    """
    Returns short names of runs or checkpoints for a picture: their last names, before those that all share, as `seed-0` of the
    runs of a study. Where two have the same, the folders before are kept that tell them apart.
    """
    parts = [Path(path).parts for path in paths]
    shortest = min(map(len, parts))
    shared = next((n for n in range(shortest) if len({each[len(each) - n - 1] for each in parts}) > 1), 0)
    parts = [each[: len(each) - shared] for each in parts]
    last = [each[-1] if each else path for each, path in zip(parts, paths, strict=True)]
    if len(set(last)) == len(last):
        return last
    first = next((n for n in range(shortest - shared) if len({each[n] for each in parts}) > 1), 0)
    return [str(Path(*each[first:])) for each in parts]


def prepare_output(text: str) -> Path:
    """
    Creates the output's folder (`text` itself if it ends in a slash, has no suffix or is a folder already), and refuses
    now what could not be written after the work is done.
    """
    path = Path(text)
    is_folder = text.endswith(("/", os.sep)) or not path.suffix or path.is_dir()
    if not is_folder and path.suffix.lower() not in PICTURE_SUFFIXES:
        raise unknown("picture format", path.suffix, PICTURE_SUFFIXES)
    _check_writable(path if is_folder else path.parent)
    return path


def prepare_picture(output: Path, suffixes: tuple[str, ...] = PICTURE_SUFFIXES, given: Path | None = None) -> None:
    """
    Creates the folder of a picture, and refuses now what could not be written after the work is done, or would replace
    the picture that was given.
    """
    if output.suffix.lower() not in suffixes or output.is_dir():
        raise UserError(
            f"--output {output}: it must be a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}."
        )
    if given is not None and given.exists() and output.exists() and output.samefile(given):
        raise UserError(f"--output: '{output}' is the given picture: give another place.")
    _check_writable(output.parent)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"'{folder}' can't be written to ({error.strerror}): give another place.") from error


def make_parent(path: Path) -> None:
    """Creates the folder that a file goes to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{path.parent}' can't be created ({error.strerror}): give another --output.") from error


def _numbered(folder: Path, count: int, suffix: str = ".png") -> list[Path]:
    """Lists the files of `count` images in a folder: 00000.png, 00001.png, ..."""
    digits = max(5, len(str(count - 1)))
    return [folder / f"{i:0{digits}}{suffix}" for i in range(count)]


def check_numbered(output: Path, count: int) -> None:
    """Refuses a folder in which numbered images of an earlier call would be left among the `count` new ones."""
    if output.is_dir():
        named = {path for suffix in (".png", ".npy") for path in _numbered(output, count, suffix)}
        found = {path for path in output.iterdir() if path.suffix in (".png", ".npy") and path.stem.isdecimal()}
        if found - named:
            raise UserError(
                f"'{output}' holds more numbered images than the {count} to be saved, such as {min(found - named).name}, and "
                "they would be mixed: remove them, or name another folder."
            )


def are_pictures(pipe: "DiffusionPipeline") -> bool:
    """Checks that PIL images hold all of a pipeline's images, or what is to be shown of them."""
    is_whole = pipe._image_shape[0] in (1, 3, 4) and pipe.config.get("value_range") is None
    return is_whole or pipe.show_channels is not None


def save_numbered(images: "list[Image.Image] | list[np.ndarray]", folder: Path) -> None:
    """Saves PIL images as numbered .png files and arrays as .npy."""
    suffix = ".png" if hasattr(images[0], "save") else ".npy"
    save_images(images, _numbered(folder, len(images), suffix))


def save_images(images: "list[Image.Image] | list[np.ndarray]", paths: list[Path]) -> None:
    """Saves PIL images and arrays, each to its path."""
    import numpy as np

    for image, path in zip(images, paths, strict=True):
        if path.suffix == ".npy":
            np.save(path, image)
        else:
            image.save(path)
