"""The tab Compare: samples of several models from the same seeds, and their metrics."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import gradio as gr

from ..commands.plotting_samples import samples_parser, samples_strips
from ..errors import UserError
from .controls import batch_words, code_box, condition_boxes, condition_words, picture_box, seed_box, seed_of
from .models import Condition, Model, ModelStore
from .requests import MAX_STEPS, Progress, Task, Tasks, progress_outputs, streams, watch, whole
from .snippets import command_line


if TYPE_CHECKING:
    from PIL import Image


MAX_COLUMNS = 16
MAX_MODELS = 8


class CompareTab:
    """Controls, outputs and handler of the tab."""

    def __init__(self, store: ModelStore, tasks: Tasks):
        self.store, self.tasks = store, tasks
        listed = [(index, model) for index, model in enumerate(store.models) if model.conditioning is None]
        alike = [index for index, model in listed if model.size == listed[0][1].size]
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                models = gr.CheckboxGroup(
                    [(model.title, index) for index, model in listed],
                    value=alike[:MAX_MODELS],
                    label="Models",
                    info="of images of one size",
                )
                count = gr.Slider(1, MAX_COLUMNS, 8, step=1, label="Images of each")
                seed = seed_box(info="image i of each model has the seed plus i")
                most = max(model.default_steps for _, model in listed)
                steps = gr.Slider(1, MAX_STEPS, most, step=1, label="Steps", info="of diffusion")
                self.conditions = conditions_of(store.models)
                boxes = condition_boxes(self.conditions, len(self.conditions))
                with gr.Row():
                    start = gr.Button("Compare", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3, min_width=280):
                picture = picture_box("Samples")
                status = gr.Markdown(elem_classes="status")
                metrics = gr.Markdown(elem_classes="metrics")
                with gr.Accordion("The same picture without the app", open=False):
                    command = code_box("Command", "shell")
        started = start.click(
            self.compare,
            [models, count, seed, steps, *boxes],
            [picture, status, metrics, command],
            api_name="compare",
            concurrency_id="model",
            show_progress_on=status,
        )
        tasks.stop_by(stop, [started], status)

    @streams
    def compare(
        self,
        request: gr.Request | None,
        indices: list[int],
        count: object,
        seed: object,
        steps: object,
        *conditions: object,
    ) -> Iterator[tuple]:
        """Draws a row of samples for each model; yields progress, and at last the outputs."""
        if not indices or len(indices) > MAX_MODELS:
            raise UserError(f"Models: choose from 1 to {MAX_MODELS}.")
        models = [self.store.model(index) for index in indices]
        for model in models:
            if model.conditioning is not None:
                raise UserError(f"{model.title} needs an image as a condition: choose other models.")
        count = whole("Images of each", count, 1, MAX_COLUMNS)
        words = [model.checkpoint for model in models]
        words += ["--num_images", str(count), "--seed", seed_of(seed), "--dtype", "float32"]
        words += batch_words(min(models, key=lambda model: model.batch_size), count)
        if any(model.family == "diffusion" for model in models):
            words += ["--num_inference_steps", str(whole("Steps", steps, 1, MAX_STEPS))]
        words += self._condition_words(models, conditions) + self.store.device_words
        for report in self.tasks.run(request, lambda task: self._draw(indices, words, task)):
            if isinstance(report, Progress):
                yield progress_outputs(report, "Drawing", 4)
            else:
                yield report, "", metrics_of(models), command_line("plot samples", words)

    def _condition_words(self, models: list[Model], values: tuple) -> list[str]:
        """Returns the flags of the conditions that the models take, which must be the same ones."""
        taking = [model for model in models if model.conditions]
        if not taking:
            return []
        names = {model: {condition.name for condition in model.conditions} for model in taking}
        first, *others = taking
        for other in others:
            if names[other] != names[first]:
                raise UserError(
                    f"{first.title} and {other.title} take other conditions: choose models of the same ones."
                )
        given = {condition.name: value for condition, value in zip(self.conditions, values, strict=True)}
        return condition_words(first, None, [given[condition.name] for condition in first.conditions])

    def _draw(self, indices: list[int], words: list[str], task: Task) -> "Image.Image":
        from ..plots import captioned_strips

        args = samples_parser().parse_args(words)
        task.report("loading the models ...")
        with self.store.use(*indices) as pipes:
            return captioned_strips(samples_strips(pipes, args, [watch(pipe, task) for pipe in pipes]))


def conditions_of(models: Sequence[Model]) -> list[Condition]:
    """Returns the conditions that any of the models takes, each name once."""
    return list({condition.name: condition for model in models for condition in model.conditions}.values())


def metrics_of(models: list[Model]) -> str:
    """Returns a table of the metrics of models in Markdown, or the reason why there is none."""
    from ..evaluation.comparison import compare
    from ..evaluation.report import Report
    from ..runs import RunFolder

    try:
        files = {model.name: RunFolder(model.folder).find_report() for model in models}
        reports = {name: Report.load(file) for name, file in files.items() if file.is_file()}
        if not reports:
            return "No model has a report: `tiny-diffusers evaluate` measures one."
        return compare(reports)
    except UserError as error:
        return f"No table of metrics: {error}"
