"""The tab Look inside: how noise turns to an image and back, the noise schedule, and the nearest training images."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ..commands.plotting_images import denoising_parser, denoising_strips, forward_strips
from ..commands.plotting_nearest import NUM_IMAGES, load_training_images, nearest_parser, nearest_strips
from ..commands.sampling import draw_plan, plan_samples, sample_parser
from ..commands.shared import choose_scheduler
from ..errors import UserError
from .controls import (
    batch_words,
    class_settings,
    class_words,
    code_box,
    condition_boxes,
    condition_settings,
    condition_words,
    of_any_model,
    one_class,
    picture_box,
    sampling_controls,
    sampling_settings,
    sampling_words,
    seed_box,
    seed_of,
)
from .models import Model, ModelStore
from .requests import Progress, Task, Tasks, progress_outputs, streams, watch, whole
from .snippets import command_line


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from ..data import ImageData


SAMPLING = ("steps", "sampler", "guidance")
DENOISING, PREDICTIONS, FORWARD = "Denoising: x_t", "Denoising: predicted x_0", "Noising of a sample"
SCHEDULE, NEAREST = "Noise schedule", "Nearest training images"
MAX_STATES = 16


def views_of(model: Model, dataset_name: str | None = None) -> list[str]:
    """Returns what can be shown of a model, whose user has named training images or not."""
    views, draws_pictures = [], model.conditioning is None and model.num_channels in (1, 3)
    if model.family == "diffusion":
        views += [DENOISING, PREDICTIONS] if model.conditioning is None else []
        views += [FORWARD] if draws_pictures and not model.has_latents else []  # which it noises
        views.append(SCHEDULE)
    if draws_pictures and training_words(model, dataset_name) is not None:
        views.append(NEAREST)
    return views


def training_words(model: Model, dataset_name: str | None) -> list[str] | None:
    """
    Returns the flag that names a model's training images, or none where its run does. None if there are no images that the
    user has meant: a checkpoint's config can name any folder of this machine, which whoever opens the page would then see.
    So they are those named by `--dataset_name`, the embedded digits, or a folder whose path a training here has kept.
    """
    from ..evaluation.references import flags_of_run, is_same_dataset
    from ..paths import kept_paths, local_path
    from ..runs import RunFolder

    given = {} if dataset_name is None else {"dataset_name": dataset_name}
    try:
        flags = flags_of_run(RunFolder(model.folder), given)
    except UserError:  # it names a folder that is not here
        return None
    named = flags.get("dataset_name")
    if flags.get("value_range") is not None:
        return None
    if dataset_name is not None and (named is None or is_same_dataset(dataset_name, named)):
        return ["--dataset_name", dataset_name]
    if named == "digits":
        return []
    is_kept = named is not None and named in kept_paths(model.folder).values() and local_path(named) is not None
    return [] if is_kept else None


class LookTab:
    """Controls, outputs and handler of the tab."""

    def __init__(self, store: ModelStore, tasks: Tasks, chosen: gr.Dropdown):
        self.store, self.tasks = store, tasks
        self._training: tuple[int, ImageData] | None = None  # the images of the model that was last asked for
        model = store.models[0]
        of_view, _, _, of_states, *_ = self.settings(model)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                view = of_any_model(gr.Radio(label="Show", **of_view))
                seed = seed_box()
                label = one_class(model, "Class")
                states = gr.Slider(
                    2, MAX_STATES, 8, step=1, label="States", info="between noise and image", **of_states
                )
                sampling = sampling_controls(model, SAMPLING)
                conditions = condition_boxes(model.conditions, store.num_conditions)
                with gr.Row():
                    start = gr.Button("Show", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3, min_width=280):
                picture = picture_box("Picture")
                status = gr.Markdown(elem_classes="status")
                with gr.Accordion("The same picture without the app", open=False):
                    command = code_box("Command", "shell")
        self.controls = [view, seed, label, states, *sampling, *conditions]
        started = start.click(
            self.look,
            [chosen, *self.controls],
            [picture, status, command],
            api_name="look",
            concurrency_id="model",
            show_progress_on=status,
        )
        tasks.stop_by(stop, [started], status)

    def settings(self, model: Model) -> list[dict]:
        """Returns what a model changes in each control, in their order."""
        views = views_of(model, self.store.dataset_name)
        return [
            {"choices": views, "value": views[0] if views else None},
            {},
            class_settings(model),
            {"visible": model.family == "diffusion"},
            *sampling_settings(model, SAMPLING),
            *condition_settings(model.conditions, self.store.num_conditions),
        ]

    @streams
    def look(self, request: gr.Request | None, index: int, view: str, *values) -> Iterator[tuple]:
        """Draws the view; yields progress, and at last the outputs."""
        model = self.store.model(index)
        views = views_of(model, self.store.dataset_name)
        if view not in views:
            raise UserError(f"Show: {model.title} has no {view!r:.40}, but {', '.join(views) or 'nothing'}.")
        for report in self.tasks.run(request, lambda task: self._draw(index, view, values, task)):
            yield progress_outputs(report, "Drawing", 3) if isinstance(report, Progress) else report

    def _draw(self, index: int, view: str, values: tuple, task: Task) -> tuple:
        """Draws a view; returns its picture, what is said of it, and its command."""
        from ..plots import captioned_strips

        seed, label, states, steps, sampler, guidance, *conditions = values
        model = self.store.model(index)
        states = ["--num_states", str(whole("States", states, 2, MAX_STATES))]
        words = [model.checkpoint, "--seed", seed_of(seed), *class_words(model, label)]
        words += sampling_words(model, steps, sampler, guidance) + condition_words(model, guidance, conditions)
        words += self.store.device_words
        task.report("loading the model ...")
        with self.store.use(index) as (pipe,):
            if view == SCHEDULE:
                return schedule_picture(model, pipe), "", command_line("plot schedules", [model.checkpoint])
            if view == FORWARD:
                return forward_picture(model, pipe, words, int(states[1]), task)
            if view == NEAREST:
                words += ["--num_images", str(NUM_IMAGES), *batch_words(model, NUM_IMAGES)]
                words += training_words(model, self.store.dataset_name)
                args = nearest_parser().parse_args(words)
                choose_scheduler(pipe, args)
                training = self._load_training(index, pipe)
                strips = nearest_strips(pipe, args, training, **watch(pipe, task))
                text = f"Euclidean distance to the nearest of {len(training):,} images, pixels in [0, 1]"
                return captioned_strips(strips), text, command_line("plot nearest", words)
            words += [*states, *(["--what", "x0"] if view == PREDICTIONS else [])]
            args = denoising_parser().parse_args(words)
            choose_scheduler(pipe, args)
            strips = denoising_strips(pipe, args, **watch(pipe, task))
            return captioned_strips(strips), "from noise to the image", command_line("plot denoising", words)

    def _load_training(self, index: int, pipe: "DiffusionPipeline") -> "ImageData":
        """Loads a model's training images, if the last request had those of another one."""
        from ..evaluation.references import find_mismatches
        from ..runs import RunFolder

        if self._training is None or self._training[0] != index:
            model = self.store.model(index)
            run = RunFolder(model.folder)
            named = training_words(model, self.store.dataset_name)
            training = load_training_images(pipe, run.path, self.store.dataset_name if named else None)
            mismatches = [] if named else find_mismatches(run, training, training)
            if mismatches:  # a list of paths could be forged, and a fingerprint of images not known could not
                raise UserError(f"{mismatches[0]} `--dataset_name` of the app names others.")
            self._training = index, training
        return self._training[1]


def schedule_picture(model: Model, pipe: "DiffusionPipeline") -> "Image.Image":
    """Draws the betas, alphas_cumprod and log-SNR of a model's schedule."""
    from PIL import Image

    from ..noising import noise_levels
    from ..plots import schedule_curves

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "schedule.png"
        schedule_curves({model.name: noise_levels(pipe.scheduler)._asdict()}).draw(file)
        with Image.open(file) as picture:
            return picture.convert("RGB")


def forward_picture(model: Model, pipe: "DiffusionPipeline", words: list[str], states: int, task: Task) -> tuple:
    """Draws a sample of a command, with more and more noise on the model's own schedule; returns it as a view."""
    import numpy as np
    import torch

    from ..data.images import normalize
    from ..plots import captioned_strips

    words = [*words, "--num_images", "1"]
    args = sample_parser().parse_args(words)
    last = pipe.scheduler.config.num_train_timesteps - 1
    timesteps = np.unique(np.linspace(0, last, states).round().astype(int)).tolist()
    saved = pipe.scheduler  # whose schedule it is, whatever draws the sample
    choose_scheduler(pipe, args)
    (image,), _ = draw_plan(pipe, plan_samples(pipe, args), args, **watch(pipe, task))
    pixels = torch.from_numpy(np.atleast_3d(image).transpose(2, 0, 1)[None].copy())  # (1, C, H, W)
    strips = forward_strips(normalize(pixels), {Path(model.checkpoint).name: saved}, timesteps, args.seed)
    width, height = model.size
    shown = ["sample/00000.png", "--checkpoint", model.checkpoint, "--resolution", f"{height}x{width}"]
    shown += ["--timesteps", ",".join(map(str, timesteps)), "--seed", str(args.seed)]
    commands = [("sample", [*words, "--output", "sample/"]), ("plot forward", shown)]
    text = f"from the image to noise, t of {last + 1:,}"
    return captioned_strips(strips), text, "\n".join(command_line(*command) for command in commands)
