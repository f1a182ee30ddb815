"""The tab Generate: samples of any family, with a live preview, and the command that draws the same."""

import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ..commands.sampling import MAX_CLASSES, draw_plan, plan_samples, sample_parser
from ..commands.shared import choose_scheduler, save_numbered
from .controls import (
    class_words,
    code_box,
    of_any_model,
    picture_box,
    sampling_controls,
    sampling_settings,
    sampling_words,
    seed_box,
    seed_of,
    single_images,
)
from .models import MAX_CONDITIONS, Condition, Model, ModelStore
from .requests import MAX_IMAGES, Progress, Task, Tasks, number, streams, watch, whole
from .snippets import command_line, python_of_samples


if TYPE_CHECKING:
    from PIL import Image


MAX_NUMBER = 1e12  # of a condition


def sample_words(
    model: Model,
    num_images: object,
    seed: object,
    classes: object,
    steps: object,
    sampler: object,
    guidance: object,
    eta: object,
    threshold: object,
    temperature: object,
    truncation: object,
    *conditions: object,
) -> list[str]:
    """Returns the words of the command `sample` that a request stands for."""
    words = [model.checkpoint, "--num_images", str(whole("Number of images", num_images, 1, MAX_IMAGES))]
    words += ["--seed", seed_of(seed), *class_words(model, classes)]
    words += sampling_words(model, steps, sampler, guidance, eta, threshold)
    if model.has_temperature and number("Temperature", temperature, 0.01, 10) != 1:
        words += ["--temperature", f"{temperature:g}"]
    if model.family in ("vae", "dcgan") and number("Truncation", truncation, 0, 1) != 1:
        words += ["--truncation", f"{truncation:g}"]
    drops = model.can_be_guided and guidance == 0  # which draws samples without conditions
    taken = () if drops else model.conditions
    for condition, value in zip(taken, conditions, strict=False):  # the boxes beyond are hidden
        words += ["--condition", f"{condition.name}={number(condition.name, value, -MAX_NUMBER, MAX_NUMBER):.12g}"]
    return words


def settings(model: Model) -> list[dict]:
    """Returns what a model changes in each control of the tab, in their order."""
    return [
        {},
        {},
        {"visible": bool(model.classes), "choices": list(model.classes), "value": []},
        *sampling_settings(model),
        {"visible": model.has_temperature},
        {"visible": model.family in ("vae", "dcgan")},
        *map(condition_settings, [*model.conditions, *[None] * (MAX_CONDITIONS - len(model.conditions))]),
    ]


def condition_settings(condition: Condition | None) -> dict:
    """Returns what a model changes in the box of a condition, or of none."""
    if condition is None:
        return {"visible": False, "value": 0}
    name, low, high, mean = condition
    info = f"{low:g} to {high:g} in training"
    return {"visible": True, "label": name, "info": info, "value": float(f"{mean:.3g}")}


class GenerateTab:
    """Controls, outputs and handler of the tab."""

    def __init__(self, store: ModelStore, tasks: Tasks, chosen: gr.Dropdown):
        self.store, self.tasks = store, tasks
        model = store.models[0]
        _, _, of_classes, *of_others = settings(model)
        of_temperature, of_truncation, *of_conditions = of_others[len(sampling_settings(model)) :]
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                count = gr.Slider(1, MAX_IMAGES, 16, step=1, label="Number of images")
                seed = seed_box(info="image i has the seed plus i")
                classes = of_any_model(
                    gr.Dropdown(
                        label="Classes",
                        info=f"each has an equal share of the images; none: the first {MAX_CLASSES}",
                        multiselect=True,
                        **of_classes,
                    )
                )
                sampling = sampling_controls(model)
                temperature = gr.Slider(
                    *(0.1, 2, 1),
                    step=0.05,
                    label="Temperature",
                    info="below 1, likely values are drawn more often",
                    **of_temperature,
                )
                truncation = gr.Slider(
                    *(0, 1, 1),
                    step=0.05,
                    label="Truncation",
                    info="below 1, images are more typical and less varied",
                    **of_truncation,
                )
                conditions = [gr.Number(**changes) for changes in of_conditions]
                with gr.Row():
                    start = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3, min_width=280):
                grid = picture_box("Images")
                status = gr.Markdown(elem_classes="status")
                archive = gr.DownloadButton("Download the PNGs", interactive=False)
                with gr.Accordion("The same images without the app", open=False):
                    command = code_box("Command", "shell")
                    python = code_box("Python", "python")
                images = single_images("Single images")
        self.controls = [count, seed, classes, *sampling, temperature, truncation, *conditions]
        self.settings = settings
        outputs = [grid, status, images, archive, command, python]
        gr.on(
            [start.click, seed.submit],
            self.generate,
            [chosen, *self.controls],
            outputs,
            api_name="generate",
            concurrency_id="model",
            show_progress_on=status,
        )
        stop.click(tasks.stop, queue=False, api_name=False)

    @streams
    def generate(self, request: gr.Request | None, index: int, *values) -> Iterator[tuple]:
        """Draws images; yields a preview of them with the progress, and at last all outputs."""
        model = self.store.model(index)
        words = sample_words(model, *values)
        for report in self.tasks.run(request, lambda task: self._draw(index, words, task)):
            if isinstance(report, Progress):
                picture = gr.skip() if report.picture is None else report.picture
                yield (picture, f"Drawing: {report.text}", *[gr.skip()] * 4)
                continue
            images, picture, seconds, python = report
            with tempfile.TemporaryDirectory() as folder:
                archive = save_archive(images, Path(folder) / "images.zip")
                text = f"{len(images)} images in {seconds:.1f} s"
                command = command_line("sample", [*words, "--output", "samples/"])
                yield picture, text, images, gr.update(value=str(archive), interactive=True), command, python

    def _draw(self, index: int, words: list[str], task: Task) -> tuple:
        """Draws the images of a command; returns them, their picture, the seconds and the lines of Python."""
        import time

        model, args = self.store.model(index), sample_parser().parse_args(words)
        task.report("loading the model ...")
        with self.store.use(index) as (pipe,):
            choose_scheduler(pipe, args)
            plan = plan_samples(pipe, args)
            began = time.perf_counter()
            images, _ = draw_plan(pipe, plan, args, **watch(pipe, task, plan.picture))
            seconds = time.perf_counter() - began
            return images, plan.picture(images), seconds, python_of_samples(model, pipe, plan, args)


def save_archive(images: "list[Image.Image]", path: Path) -> Path:
    """Saves images as numbered PNGs in a zip file."""
    with tempfile.TemporaryDirectory() as folder:
        save_numbered(images, Path(folder))
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(Path(folder).iterdir()):
                archive.write(file, file.name)
    return path
