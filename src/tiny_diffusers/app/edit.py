"""The tab Edit: a picture, drawn or uploaded, that a model varies, inpaints, restores, completes or reconstructs."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..commands.editing import edit_options, edit_parser, edit_pictures, edited_picture, editing_pipeline
from ..commands.sampling import draw_plan, plan_samples, sample_parser
from ..commands.shared import choose_scheduler
from ..errors import UserError
from .controls import (
    MAX_NUMBER,
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
    single_images,
)
from .models import Model, ModelStore
from .requests import Progress, Task, Tasks, answers, number, progress_outputs, spell, streams, watch, whole
from .snippets import command_line, python_of_completion
from .uploads import checked, fit_picture, save_archive


if TYPE_CHECKING:
    from PIL import Image


SAMPLING = ("steps", "sampler", "guidance", "eta")
MAX_RESULTS = 16
CANVAS = 320  # pixels of the side of the place to draw
MASK_COLOR = "#ff0000"

VARY, INPAINT, ENLARGE, DEBLUR, COLORIZE = "Variations", "Inpaint", "Super-resolution", "Deblur", "Colorize"
COMPLETE, RECONSTRUCT = "Complete", "Reconstruct"
RESTORATIONS = (ENLARGE, DEBLUR, COLORIZE)

# The hidden part of a picture: (left, upper, right, lower) as shares of its sides
AREAS = {
    "painted in red": None,
    "upper half": (0, 0, 1, 0.5),
    "lower half": (0, 0.5, 1, 1),
    "left half": (0, 0, 0.5, 1),
    "right half": (0.5, 0, 1, 1),
    "middle": (0.25, 0.25, 0.75, 0.75),
}


def tasks_of(model: Model) -> list[str]:
    """Returns what a model can do with a picture."""
    if model.family == "diffusion":
        return [VARY, INPAINT, ENLARGE, DEBLUR, *([COLORIZE] if model.num_channels == 3 else [])]
    return {"pixelcnn": [COMPLETE], "vae": [RECONSTRUCT]}.get(model.family, [])


def shown_controls(task: str) -> list[dict]:
    """Returns which of the controls of one task alone are shown."""
    shown = (task == VARY, task == INPAINT, task == ENLARGE, task == DEBLUR, task in RESTORATIONS, task == COMPLETE)
    return [{"visible": visible} for visible in shown]


def sample_words(model: Model, label: object, seed: object, sampling: tuple) -> list[str]:
    """Returns the words of a command that the controls of any sampling stand for: steps and so on, and conditions."""
    steps, sampler, guidance, eta, *conditions = sampling
    words = ["--seed", seed_of(seed), *class_words(model, label)]
    words += sampling_words(model, steps, sampler, guidance, eta)
    return words + condition_words(model, guidance, conditions)


def edit_words(
    model: Model,
    task: str,
    strength: object,
    factor: object,
    sigma: object,
    degrade: object,
    label: object,
    count: object,
    seed: object,
    *sampling: object,
    folder: Path,
) -> list[str]:
    """Returns the words of the command `edit` that a request stands for, on the pictures in a folder."""
    words = [model.checkpoint, "--image", str(folder / "picture.png")]
    if task == VARY:
        words += ["--strength", spell(number("Strength", strength, 0, 1))]
    if task == INPAINT:
        words += ["--mask", str(folder / "mask.png")]
    if task == ENLARGE:
        words += ["--task", f"super_resolution:{whole('Factor', factor, 2, 8)}"]
    if task == DEBLUR:
        words += ["--task", f"deblur:{spell(number('Blur', sigma, 0.1, 10))}"]
    if task == COLORIZE:
        words += ["--task", "colorize"]
    if task in RESTORATIONS and degrade:
        words += ["--degrade"]
    words += ["--num_images", str(whole("Results", count, 1, max_results(model)))]
    return words + sample_words(model, label, seed, sampling)


def max_results(model: Model) -> int:
    """Returns the most results of a request, fewer of large images: all are drawn at a time."""
    return min(MAX_RESULTS, model.batch_size)


def call_options(model: Model, label: object, conditions: Sequence[object]) -> dict:
    """Returns the class and the conditions of all images as options of a pipeline's call."""
    taken = zip(model.conditions, conditions, strict=False)
    values = {condition.name: number(condition.name, value, -MAX_NUMBER, MAX_NUMBER) for condition, value in taken}
    options = {"class_labels": label} if model.classes else {}
    return options | ({"conditions": values} if values else {})


def find_mask(drawing: dict[str, Any], area: str, size: tuple[int, int]) -> "Image.Image":
    """Draws the hidden part of a picture in white: a part by its name, or what is painted in red."""
    import numpy as np
    from PIL import Image, ImageOps

    if area not in AREAS:
        raise UserError(f"Hidden part: {area!r:.40} is none of {', '.join(AREAS)}.")
    width, height = size
    if AREAS[area] is not None:
        left, upper, right, lower = AREAS[area]
        box = (round(left * width), round(upper * height), round(right * width), round(lower * height))
        mask = Image.new("L", size)
        mask.paste(255, box)
        return mask
    red = np.zeros(drawing["composite"].size[::-1], bool)
    for layer in drawing["layers"]:
        pixels = np.asarray(layer.convert("RGBA")).astype(int)
        if pixels.shape[:2] == red.shape:
            red |= (pixels[..., 3] > 127) & (pixels[..., 0] > 180) & (pixels[..., 1:3].max(axis=-1) < 80)
    if not red.any():
        raise UserError("Nothing is painted in red: paint what is to be drawn anew, or choose another hidden part.")
    mask = ImageOps.fit(Image.fromarray(red.astype(np.uint8) * 255), size, Image.Resampling.BOX)
    return mask.point(lambda value: 255 if value > 63 else 0)


class EditTab:
    """Controls, outputs and handlers of the tab."""

    def __init__(self, store: ModelStore, tasks: Tasks, chosen: gr.Dropdown):
        from PIL import Image

        self.store, self.tasks = store, tasks
        model = store.models[0]
        _, of_task, *of_one_task = self.settings(model)
        of_strength, of_area, of_factor, of_sigma, of_degrade, of_rows, *_ = of_one_task
        blank = Image.new("RGB", (CANVAS, CANVAS))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                drawing = checked(
                    gr.ImageEditor(
                        {"background": blank, "layers": [], "composite": blank},
                        label="Picture: draw, upload or paste",
                        image_mode="RGBA",
                        type="pil",
                        format="png",
                        sources=("upload", "clipboard"),
                        brush=gr.Brush(
                            default_size=24,
                            colors=["#ffffff", "#000000", "#808080", MASK_COLOR],
                            default_color="#ffffff",
                        ),
                        layers=False,
                        transforms=(),
                        canvas_size=(CANVAS, CANVAS),
                        height=460,
                        buttons=["fullscreen"],
                    )
                )
                take = gr.Button("Take a sample of the model", size="sm")
                task = of_any_model(gr.Radio(label="Task", **of_task))
                strength = gr.Slider(
                    *(0.05, 1, 0.6), step=0.05, label="Strength", info="share of the picture given up", **of_strength
                )
                area = gr.Dropdown(list(AREAS), value="lower half", label="Hidden part", **of_area)
                factor = gr.Dropdown(
                    [2, 4], value=2, label="Factor", info="of the sides, which it must divide", **of_factor
                )
                sigma = gr.Slider(0.5, step=0.1, label="Blur", info="sigma in pixels", **of_sigma)
                degrade = gr.Checkbox(value=True, label="The picture is intact", info="degrade it first", **of_degrade)
                rows = gr.Slider(0.1, 0.9, 0.5, step=0.05, label="Rows kept", info="share of the rows", **of_rows)
                label = one_class(model, "Class")
                most = max_results(model)
                count = gr.Slider(1, most, min(4, most), step=1, label="Results")
                seed = seed_box(info="result i has the seed plus i")
                sampling = sampling_controls(model, SAMPLING)
                conditions = condition_boxes(model.conditions, store.num_conditions)
                with gr.Row():
                    start = gr.Button("Edit", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3, min_width=280):
                picture = picture_box("Results")
                status = gr.Markdown(elem_classes="status")
                archive = gr.DownloadButton("Download the PNGs", interactive=False)
                with gr.Accordion("The same results without the app", open=False):
                    command = code_box("With the downloaded picture.png and mask.png", "shell")
                images = single_images("Single results")
        of_one_task = [strength, area, factor, sigma, degrade, rows]
        self.controls = [drawing, task, *of_one_task, label, count, seed, *sampling, *conditions]
        task.input(
            answers(lambda name: [gr.update(**changes) for changes in shown_controls(name)]),
            task,
            of_one_task,
            queue=False,
            show_progress="hidden",
            api_name=False,
        )
        taken = take.click(
            self.take_sample,
            [chosen, label, seed, *sampling, *conditions],
            [drawing, status],
            api_name=False,
            concurrency_id="model",
            show_progress_on=status,
        )
        started = start.click(
            self.edit,
            [chosen, *self.controls],
            [picture, status, images, archive, command],
            api_name="edit",
            concurrency_id="model",
            show_progress_on=status,
        )
        tasks.stop_by(stop, [taken, started], status)

    def settings(self, model: Model) -> list[dict]:
        """Returns what a model changes in each control, in their order."""
        kinds = tasks_of(model) or [VARY]
        strength, area, factor, sigma, *others = shown_controls(kinds[0])
        widest = max(0.5, round((min(model.size) - 1) // 2 / 3, 1))  # the kernel is no larger than the picture
        sigma |= {"maximum": widest, "value": min(1.5, widest)}
        most = max_results(model)
        return [
            {},
            {"choices": kinds, "value": kinds[0]},
            *(strength, area, factor, sigma, *others),
            class_settings(model),
            {"maximum": most, "value": min(4, most)},
            {},
            *sampling_settings(model, SAMPLING),
            *condition_settings(model.conditions, self.store.num_conditions),
        ]

    @streams
    def take_sample(
        self, request: gr.Request | None, index: int, label: object, seed: object, *sampling
    ) -> Iterator[tuple]:
        """Draws a sample of the model, enlarged, as the picture to edit; yields progress, and at last the outputs."""
        from PIL import Image

        model = self.store.model(index)
        words = [model.checkpoint, "--num_images", "1", *sample_words(model, label, seed, sampling)]
        for report in self.tasks.run(request, lambda task: self._sample(index, words, task)):
            if isinstance(report, Progress):
                yield progress_outputs(report, "Drawing", 2)
                continue
            scale = max(1, CANVAS // report.width)
            size = (report.width * scale, report.height * scale)
            image = report.convert("RGB").resize(size, Image.Resampling.NEAREST)
            yield {"background": image, "layers": [], "composite": image}, ""

    def _sample(self, index: int, words: list[str], task: Task) -> "Image.Image":
        args = sample_parser().parse_args(words)
        task.report("loading the model ...")
        with self.store.use(index) as (pipe,):
            choose_scheduler(pipe, args)
            return draw_plan(pipe, plan_samples(pipe, args), args, **watch(pipe, task))[0][0]

    @streams
    def edit(
        self, request: gr.Request | None, index: int, drawing: dict | None, task: str, *values
    ) -> Iterator[tuple]:
        """Edits the picture; yields progress, and at last the outputs."""
        model = self.store.model(index)
        if task not in tasks_of(model):
            raise UserError(f"Task: {model.title} has no {task!r:.40}, but {', '.join(tasks_of(model)) or 'none'}.")
        if not drawing or drawing.get("composite") is None:
            raise UserError("There is no picture: draw or upload one, or take a sample.")
        with tempfile.TemporaryDirectory() as folder:
            work = self._editor(model, index, drawing, task, values, Path(folder))
            for report in self.tasks.run(request, work):
                if isinstance(report, Progress):
                    yield progress_outputs(report, "Editing", 5)
                    continue
                picture, results, command = report
                update = gr.update(value=str(save_archive(results, Path(folder))), interactive=True)
                yield picture, f"{len(results)} results", results, update, command

    def _editor(self, model: Model, index: int, drawing: dict, task: str, values: tuple, folder: Path):
        """Saves the picture and its mask in a folder, and returns the work of the request."""
        strength, area, factor, sigma, degrade, rows, label, count, seed, *sampling = values
        conditions = sampling[len(SAMPLING) :]
        options = call_options(model, label, conditions)
        size = model.size
        if task == ENLARGE and not degrade:
            size = tuple(side // whole("Factor", factor, 2, 8) for side in size)
        given = fit_picture(drawing["composite"], size, 1 if task == COLORIZE and not degrade else model.num_channels)
        given.save(folder / "picture.png")
        if task == COMPLETE:
            kept = round(number("Rows kept", rows, 0, 1) * model.size[1])
            count, seed = whole("Results", count, 1, max_results(model)), int(seed_of(seed))
            return lambda job: self._complete(index, given, kept, count, seed, options, job)
        if task == RECONSTRUCT:
            words = [*class_words(model, label), *condition_words(model, None, conditions)]
            return lambda job: self._reconstruct(index, given, options, words, job)
        if task == INPAINT:
            find_mask(drawing, area, model.size).save(folder / "mask.png")
        words = edit_words(model, task, strength, factor, sigma, degrade, label, count, seed, *sampling, folder=folder)
        return lambda job: self._edit(index, words + self.store.device_words, folder, job)

    def _edit(self, index: int, words: list[str], folder: Path, job: Task) -> tuple:
        from PIL import Image

        args = edit_parser().parse_args(words)
        job.report("loading the model ...")
        with self.store.use(index) as (pipe,), Image.open(args.image) as picture:
            choose_scheduler(pipe, args)
            pipe = editing_pipeline(pipe, args)
            rows = edit_pictures(pipe, [picture.copy()], args, **edit_options(pipe, args), **watch(pipe, job))
        shown = [word.removeprefix(f"{folder}/") for word in words]
        return edited_picture(rows), rows[0]["results"], command_line("edit", [*shown, "--output", "edited.png"])

    def _complete(
        self, index: int, given: "Image.Image", kept: int, count: int, seed: int, options: dict, job: Task
    ) -> tuple:
        """Completes the rows below those that are kept, by a PixelCNN."""
        import torch

        from ..errors import refusals
        from ..pipelines.pipeline_tiny import image_generators
        from ..plots import image_grid

        model = self.store.model(index)
        job.report("loading the model ...")
        with self.store.use(index) as (pipe,), refusals():
            mask = torch.arange(model.size[1])[:, None].expand(-1, model.size[0]) < kept
            images = pipe(
                batch_size=count,
                images=[given] * count,
                mask=mask,
                generator=image_generators(seed, count),
                **options,
                **watch(pipe, job),
            ).images
            python = python_of_completion(model, pipe, kept, count, seed, options)
        labels = ["given", *map(str, range(1, count + 1))]
        return image_grid([given, *images], columns=count + 1, column_labels=labels), images, python

    def _reconstruct(self, index: int, given: "Image.Image", options: dict, words: list[str], job: Task) -> tuple:
        """Encodes and decodes the picture, by a VAE."""
        from ..errors import refusals
        from ..plots import image_grid

        model = self.store.model(index)
        job.report("loading the model ...")
        with self.store.use(index) as (pipe,), refusals():
            images = pipe.reconstruct([given], **options).images
        words = [model.checkpoint, "--image", "picture.png", *words]
        picture = image_grid([given, *images], columns=2, column_labels=["given", "rebuilt"])
        return picture, images, command_line("plot reconstructions", words)
