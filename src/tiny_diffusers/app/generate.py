"""The tab Generate: samples of any family, with a live preview, and the command that draws the same."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ..commands.sampling import MAX_CLASSES, draw_plan, plan_samples, sample_parser
from ..commands.shared import choose_scheduler
from ..errors import UserError
from .controls import (
    SAMPLING,
    batch_words,
    class_words,
    code_box,
    condition_boxes,
    condition_settings,
    condition_words,
    of_any_model,
    picture_box,
    sampling_controls,
    sampling_settings,
    sampling_words,
    seed_box,
    seed_of,
    single_images,
)
from .models import Model, ModelStore
from .requests import MAX_IMAGES, Progress, Task, Tasks, number, progress_outputs, spell, streams, watch, whole
from .snippets import command_line, python_of_samples
from .uploads import checked_image, fit_picture, save_archive


if TYPE_CHECKING:
    from PIL import Image


def sample_words(
    model: Model,
    num_images: object,
    seed: object,
    classes: object,
    sampling: Sequence[object],
    temperature: object,
    truncation: object,
    conditions: Sequence[object],
) -> list[str]:
    """Returns the words of the command `sample` that a request stands for."""
    count = whole("Number of images", num_images, 1, MAX_IMAGES)
    words = [model.checkpoint, "--num_images", str(count), *batch_words(model, count)]
    words += ["--seed", seed_of(seed), *class_words(model, classes), *sampling_words(model, *sampling)]
    temperature, truncation = number("Temperature", temperature, 0.01, 10), number("Truncation", truncation, 0, 1)
    if model.has_temperature and temperature != 1:
        words += ["--temperature", spell(temperature)]
    if model.family in ("vae", "dcgan") and truncation != 1:
        words += ["--truncation", spell(truncation)]
    return words + condition_words(model, sampling[SAMPLING.index("guidance")], conditions)


def picture_words(
    model: Model, picture: "Image.Image | None", is_whole: object, guidance: object, folder: Path
) -> list[str]:
    """Returns the flags of the picture that is a model's condition, and saves it in a folder; none without a condition."""
    if not model.takes_picture or (model.can_be_guided and guidance == 0):
        return []
    if picture is None:
        free = ", or choose a guidance scale of 0 for samples without one" if model.can_be_guided else ""
        raise UserError(f"{model.title} draws from a picture: give one{free}.")
    is_whole = bool(is_whole) and model.is_picture_made
    fit_picture(picture, *model.given_picture(is_whole)).save(folder / "picture.png")
    return ["--image", str(folder / "picture.png"), *(["--degrade"] if is_whole else [])]


class GenerateTab:
    """Controls, outputs and handler of the tab."""

    def __init__(self, store: ModelStore, tasks: Tasks, chosen: gr.Dropdown):
        self.store, self.tasks = store, tasks
        model = store.models[0]
        _, _, of_classes, *of_others = self.settings(model)
        of_temperature, of_truncation, of_picture, of_whole, *_ = of_others[len(sampling_settings(model)) :]
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
                picture = checked_image(
                    gr.Image(
                        label="Picture that is its condition",
                        type="pil",
                        image_mode="RGB",
                        sources=["upload", "clipboard"],
                        height=240,
                        **of_picture,
                    )
                )
                is_whole = gr.Checkbox(
                    label="The picture is whole", info="make the condition from it, as in training", **of_whole
                )
                conditions = condition_boxes(model.conditions, store.num_conditions)
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
        self.controls = [count, seed, classes, *sampling, temperature, truncation, picture, is_whole, *conditions]
        outputs = [grid, status, images, archive, command, python]
        started = gr.on(
            [start.click, seed.submit],
            self.generate,
            [chosen, *self.controls],
            outputs,
            api_name="generate",
            concurrency_id="model",
            show_progress_on=status,
        )
        tasks.stop_by(stop, [started], status)

    def settings(self, model: Model) -> list[dict]:
        """Returns what a model changes in each control, in their order."""
        return [
            {},
            {},
            {"visible": bool(model.classes), "choices": list(model.classes), "value": []},
            *sampling_settings(model),
            {"visible": model.has_temperature},
            {"visible": model.family in ("vae", "dcgan")},
            {"visible": model.takes_picture, "value": None},
            {"visible": model.is_picture_made, "value": model.is_picture_made},
            *condition_settings(model.conditions, self.store.num_conditions),
        ]

    @streams
    def generate(
        self,
        request: gr.Request | None,
        index: int,
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
        picture: object = None,  # which a client of the API may leave out, as it has a default here
        is_whole: object = True,
        *conditions: object,
    ) -> Iterator[tuple]:
        """Draws images; yields a preview of them with the progress, and at last all outputs."""
        model = self.store.model(index)
        sampling = (steps, sampler, guidance, eta, threshold)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            words = sample_words(model, num_images, seed, classes, sampling, temperature, truncation, conditions)
            words += picture_words(model, picture, is_whole, guidance, folder) + self.store.device_words
            for report in self.tasks.run(request, lambda task: self._draw(index, words, task)):
                if isinstance(report, Progress):
                    yield progress_outputs(report, "Drawing", 6)
                    continue
                images, picture, seconds, python = report
                archive = save_archive(images, folder)
                text = f"{len(images)} images in {seconds:.1f} s"
                shown = [word.removeprefix(f"{folder}/") for word in words]
                command = command_line("sample", [*shown, "--output", "samples/"])
                yield picture, text, images, gr.update(value=str(archive), interactive=True), command, python

    def _draw(self, index: int, words: list[str], task: Task) -> tuple:
        """Draws the images of a command; returns them, their picture, the seconds and the lines of Python."""
        import time

        from ..plots import image_grid

        model, args = self.store.model(index), sample_parser().parse_args(words)
        task.report("loading the model ...")
        with self.store.use(index) as (pipe,):
            choose_scheduler(pipe, args)
            plan = plan_samples(pipe, args)
            num_batches = math.ceil(plan.num_images / args.batch_size)
            arrange = plan.picture if num_batches == 1 else image_grid
            began = time.perf_counter()
            images, _ = draw_plan(pipe, plan, args, **watch(pipe, task, arrange, num_batches))
            seconds = time.perf_counter() - began
            return images, plan.picture(images), seconds, python_of_samples(model, pipe, plan, args)
