"""The tab Look inside: how noise turns to an image and back, the noise schedule, and the nearest training images."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ..commands.plotting_images import denoising_parser, denoising_strips, forward_strips
from ..commands.sampling import draw_plan, plan_samples, sample_parser
from ..commands.shared import choose_scheduler
from ..errors import UserError
from .controls import (
    class_settings,
    class_words,
    code_box,
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
from .requests import Progress, Task, Tasks, streams, watch, whole
from .snippets import command_line


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image


SAMPLING = ("steps", "sampler", "guidance")
DENOISING, PREDICTIONS, FORWARD = "Denoising: x_t", "Denoising: predicted x_0", "Noising of a sample"
SCHEDULE, NEAREST = "Noise schedule", "Nearest training images"
NUM_NEIGHBOURS = 8  # samples that are compared with the training set
MAX_STATES = 16


def views_of(model: Model) -> list[str]:
    """Returns what can be shown of a model."""
    views = []
    if model.family == "diffusion":
        views += [SCHEDULE] if model.needs_more else [DENOISING, PREDICTIONS, FORWARD, SCHEDULE]
    if not model.needs_more and model.num_channels in (1, 3) and training_images(model) is not None:
        views.append(NEAREST)
    return views


def training_images(model: Model) -> dict | None:
    """Returns the flags of a model's training images, if they are at hand: the embedded set, or a folder that is here."""
    from ..evaluation.references import flags_of_run
    from ..paths import local_path
    from ..runs import RunFolder

    try:
        flags = flags_of_run(RunFolder(model.folder), {})
    except UserError:  # it names a folder that is not here
        return None
    name = flags.get("dataset_name")
    return flags if name is not None and (name == "digits" or local_path(name) is not None) else None


def settings(model: Model) -> list[dict]:
    """Returns what a model changes in each control of the tab, in their order."""
    views = views_of(model)
    is_diffusion = model.family == "diffusion"
    return [
        {"choices": views, "value": views[0] if views else None},
        {},
        class_settings(model),
        {"visible": is_diffusion},
        *sampling_settings(model, SAMPLING),
    ]


class LookTab:
    """Controls, outputs and handler of the tab."""

    def __init__(self, store: ModelStore, tasks: Tasks, chosen: gr.Dropdown):
        self.store, self.tasks, self.settings = store, tasks, settings
        model = store.models[0]
        of_view, _, _, of_states, *_ = settings(model)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                view = of_any_model(gr.Radio(label="Show", **of_view))
                seed = seed_box()
                label = one_class(model, "Class")
                states = gr.Slider(
                    2, MAX_STATES, 8, step=1, label="States", info="between noise and image", **of_states
                )
                sampling = sampling_controls(model, SAMPLING)
                with gr.Row():
                    start = gr.Button("Show", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3, min_width=280):
                picture = picture_box("Picture")
                status = gr.Markdown(elem_classes="status")
                with gr.Accordion("The same picture without the app", open=False):
                    command = code_box("Command", "shell")
        self.controls = [view, seed, label, states, *sampling]
        start.click(
            self.look,
            [chosen, *self.controls],
            [picture, status, command],
            api_name="look",
            concurrency_id="model",
            show_progress_on=status,
        )
        stop.click(tasks.stop, queue=False, api_name=False)

    @streams
    def look(self, request: gr.Request | None, index: int, view: str, *values) -> Iterator[tuple]:
        """Draws the view; yields progress, and at last the outputs."""
        model = self.store.model(index)
        if view not in views_of(model):
            raise UserError(f"Show: {model.title} has no {view!r:.40}, but {', '.join(views_of(model)) or 'nothing'}.")
        for report in self.tasks.run(request, lambda task: self._draw(index, view, values, task)):
            if isinstance(report, Progress):
                yield gr.skip(), f"Drawing: {report.text}", gr.skip()
            else:
                yield report

    def _draw(self, index: int, view: str, values: tuple, task: Task) -> tuple:
        from ..plots import captioned_strips

        seed, label, states, *sampling = values
        model = self.store.model(index)
        words = ["--seed", seed_of(seed), *class_words(model, label), *sampling_words(model, *sampling)]
        task.report("loading the model ...")
        with self.store.use(index) as (pipe,):
            if view == SCHEDULE:
                return schedule_picture(model, pipe), "", command_line("plot schedules", [model.checkpoint])
            if view in (DENOISING, PREDICTIONS):
                words = [model.checkpoint, "--num_states", str(whole("States", states, 2, MAX_STATES)), *words]
                words += ["--what", "x0"] if view == PREDICTIONS else []
                args = denoising_parser().parse_args(words)
                choose_scheduler(pipe, args)
                strips = denoising_strips(pipe, args, **watch(pipe, task))
                return captioned_strips(strips), "from noise to the image", command_line("plot denoising", words)
            words = [model.checkpoint, *words, "--num_images", str(1 if view == FORWARD else NUM_NEIGHBOURS)]
            images = self._sample(pipe, words, task)
            if view == FORWARD:
                return forward_picture(model, pipe, images[0], int(seed), whole("States", states, 2, MAX_STATES))
            return nearest_picture(model, images)

    def _sample(self, pipe: "DiffusionPipeline", words: list[str], task: Task) -> "list[Image.Image]":
        args = sample_parser().parse_args(words)
        choose_scheduler(pipe, args)
        return draw_plan(pipe, plan_samples(pipe, args), args, **watch(pipe, task))[0]


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


def forward_picture(model: Model, pipe: "DiffusionPipeline", image: "Image.Image", seed: int, states: int) -> tuple:
    """Draws a sample with more and more noise, on the model's own schedule."""
    import numpy as np

    from ..data.images import normalize
    from ..plots import captioned_strips

    last = pipe.scheduler.config.num_train_timesteps - 1
    timesteps = np.unique(np.linspace(0, last, states).round().astype(int)).tolist()
    strips = forward_strips(normalize(_stack([image])), {"x_t": pipe.scheduler}, timesteps, seed)
    return captioned_strips(strips), f"from the image to noise, t of {last + 1:,}", ""


def nearest_picture(model: Model, images: "list[Image.Image]") -> tuple:
    """Draws samples, and below each the training image that is nearest to it in the pixels."""
    from ..evaluation.metrics import nearest_neighbours
    from ..evaluation.references import choose, load_reference
    from ..plots import Strip, captioned_strips, to_pil

    flags = training_images(model)
    real = choose({"split": flags.get("train_split")}, flags)
    samples = _stack(images)
    training = load_reference(real, tuple(samples.shape[1:]))[0].images
    features, references = (x.flatten(1).float().numpy() / 255 for x in (samples, training))
    distances, nearest = nearest_neighbours(features, references)
    strips = [
        Strip(images, label="sample"),
        Strip(to_pil(training[nearest]), [f"{distance:.2f}" for distance in distances], label="nearest"),
    ]
    return (
        captioned_strips(strips),
        f"Euclidean distance to the nearest of {len(training):,} images, pixels in [0, 1]",
        "",
    )


def _stack(images: "list[Image.Image]") -> "torch.Tensor":
    """Converts images to uint8 (N, C, H, W)."""
    import numpy as np
    import torch

    pixels = np.stack([np.asarray(image) for image in images])
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
