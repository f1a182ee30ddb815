"""The tab Walk: the images between two seeds or two classes, which a slider scrubs over."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ..commands.plotting_samples import interpolation_parser, interpolation_strips
from ..commands.sampling import save_animation
from ..commands.shared import choose_scheduler
from .controls import (
    class_settings,
    class_words,
    code_box,
    condition_boxes,
    condition_settings,
    condition_words,
    one_class,
    picture_box,
    sampling_controls,
    sampling_settings,
    sampling_words,
    seed_box,
    seed_of,
)
from .models import Model, ModelStore
from .requests import Progress, Task, Tasks, answers, progress_outputs, streams, watch, whole
from .snippets import command_line


if TYPE_CHECKING:
    from PIL import Image

    from ..plots import Strip


SAMPLING = ("steps", "sampler", "guidance")
MAX_FRAMES = 32  # which are drawn at a time
PATHS = ("slerp", "linear")
ENDS = ("First", "Second")


def walk_words(
    model: Model,
    first_seed: object,
    second_seed: object,
    first_class: object,
    second_class: object,
    num_frames: object,
    path: object,
    steps: object,
    sampler: object,
    guidance: object,
    *conditions: object,
) -> list[str]:
    """Returns the words of the commands `interpolate` and `plot interpolation` that a request stands for."""
    seeds = f"{seed_of(first_seed, 'First seed')},{seed_of(second_seed, 'Second seed')}"
    words = [model.checkpoint, "--seeds", seeds]
    words += ["--num_frames", str(whole("Frames", num_frames, 2, max_frames(model)))]
    words += class_words(model, [str(first_class), str(second_class)])
    if model.family == "diffusion" and path != PATHS[0]:
        words += ["--interpolation", str(path)]
    words += sampling_words(model, steps, sampler, guidance)
    half = len(conditions) // 2
    return words + condition_words(model, guidance, conditions[:half], conditions[half:])


def max_frames(model: Model) -> int:
    """Returns the most frames of a walk, fewer of large images."""
    return min(MAX_FRAMES, 2 * model.batch_size)


class WalkTab:
    """Controls, outputs and handlers of the tab."""

    def __init__(self, store: ModelStore, tasks: Tasks, chosen: gr.Dropdown):
        self.store, self.tasks = store, tasks
        model = store.models[0]
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    first_seed = seed_box("First seed", 0, "the sample at the start")
                    second_seed = seed_box("Second seed", 1, "the sample at the end")
                    first_class, second_class = one_class(model, "First class"), one_class(model, "Second class", 1)
                most = max_frames(model)
                count = gr.Slider(2, most, min(16, most), step=1, label="Frames", info="both ends included")
                path = gr.Dropdown(
                    PATHS,
                    value=PATHS[0],
                    label="Path",
                    info="slerp follows the sphere of the noise, linear cuts through it",
                    visible=model.family == "diffusion",
                )
                sampling = sampling_controls(model, SAMPLING)
                ends = [condition_boxes(model.conditions, store.num_conditions, end) for end in ENDS]
                with gr.Row():
                    start = gr.Button("Walk", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3, min_width=280):
                picture = picture_box("Frame")
                position = gr.Slider(1, 16, 1, step=1, label="Frame", interactive=False)
                status = gr.Markdown(elem_classes="status")
                download = gr.DownloadButton("Download the GIF", interactive=False)
                with gr.Accordion("The same frames without the app", open=False):
                    command = code_box("Commands: the GIF, and both rows in one picture", "shell")
        self.controls = [
            first_seed,
            second_seed,
            first_class,
            second_class,
            count,
            path,
            *sampling,
            *ends[0],
            *ends[1],
        ]
        frames = gr.State([], time_to_live=3600)
        started = start.click(
            self.walk,
            [chosen, *self.controls],
            [picture, position, status, download, command, frames],
            api_name="walk",
            concurrency_id="model",
            show_progress_on=status,
        )
        position.change(self.show, [frames, position], picture, queue=False, show_progress="hidden", api_name=False)
        tasks.stop_by(stop, [started], status)

    def settings(self, model: Model) -> list[dict]:
        """Returns what a model changes in each control, in their order."""
        most = max_frames(model)
        return [
            {},
            {},
            class_settings(model, 0),
            class_settings(model, 1),
            {"maximum": most, "value": min(16, most)},
            {"visible": model.family == "diffusion"},
            *sampling_settings(model, SAMPLING),
            *(each for end in ENDS for each in condition_settings(model.conditions, self.store.num_conditions, end)),
        ]

    @streams
    def walk(self, request: gr.Request | None, index: int, *values) -> Iterator[tuple]:
        """Draws the frames; yields progress, and at last the outputs, with the frames for the slider."""
        words = walk_words(self.store.model(index), *values) + self.store.device_words
        for report in self.tasks.run(request, lambda task: self._draw(index, words, task)):
            if isinstance(report, Progress):
                yield progress_outputs(report, "Walking", 6, status=2)
                continue
            with tempfile.TemporaryDirectory() as folder:
                gif = Path(folder) / "walk.gif"
                save_animation(report[0].images, gif)
                frames = frame_pictures(report)
                commands = [("interpolate", "walk.gif"), ("plot interpolation", "walk.png")]
                yield (
                    frames[0],
                    gr.update(maximum=len(frames), value=1, interactive=True),
                    f"{len(frames)} frames: move the slider",
                    gr.update(value=str(gif), interactive=True),
                    "\n".join(command_line(name, [*words, "--output", output]) for name, output in commands),
                    frames,
                )

    @answers
    def show(self, frames: "list[Image.Image]", position: int) -> "Image.Image | None":
        """Returns the frame at the slider's position."""
        return frames[min(max(1, int(position)), len(frames)) - 1] if frames else None

    def _draw(self, index: int, words: list[str], task: Task) -> "list[Strip]":
        args = interpolation_parser().parse_args(words)
        task.report("loading the model ...")
        with self.store.use(index) as (pipe,):
            choose_scheduler(pipe, args)
            return interpolation_strips(pipe, args, **watch(pipe, task))


def frame_pictures(strips: "list[Strip]") -> "list[Image.Image]":
    """Draws each frame of a walk: that of the path without noise and, for diffusion, that with it beside it."""
    from ..plots import image_grid

    labels = [strip.label for strip in strips] if len(strips) > 1 else None
    pairs = zip(*(strip.images for strip in strips), strict=True)
    return [image_grid(list(images), columns=len(images), column_labels=labels) for images in pairs]
