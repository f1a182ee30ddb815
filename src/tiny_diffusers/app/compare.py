"""The tab Compare: samples of several models from the same seeds, and their metrics."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import gradio as gr

from ..commands.plotting_samples import samples_parser, samples_strips
from ..errors import UserError
from .controls import code_box, picture_box, seed_box, seed_of
from .models import Model, ModelStore
from .requests import MAX_STEPS, Progress, Task, Tasks, streams, watch, whole
from .snippets import command_line


if TYPE_CHECKING:
    from PIL import Image


MAX_COLUMNS = 16
MAX_MODELS = 8


class CompareTab:
    """Controls, outputs and handler of the tab."""

    def __init__(self, store: ModelStore, tasks: Tasks):
        self.store, self.tasks = store, tasks
        first = store.models[0]
        alike = [index for index, model in enumerate(store.models) if model.size == first.size]
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                models = gr.CheckboxGroup(
                    [(model.title, index) for index, model in enumerate(store.models)],
                    value=alike[:MAX_MODELS],
                    label="Models",
                    info="of images of one size",
                )
                count = gr.Slider(1, MAX_COLUMNS, 8, step=1, label="Images of each")
                seed = seed_box(info="image i of each model has the seed plus i")
                steps = gr.Slider(1, MAX_STEPS, 50, step=1, label="Steps", info="of diffusion")
                with gr.Row():
                    start = gr.Button("Compare", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3, min_width=280):
                picture = picture_box("Samples")
                status = gr.Markdown(elem_classes="status")
                metrics = gr.Markdown(elem_classes="metrics")
                with gr.Accordion("The same picture without the app", open=False):
                    command = code_box("Command", "shell")
        start.click(
            self.compare,
            [models, count, seed, steps],
            [picture, status, metrics, command],
            api_name="compare",
            concurrency_id="model",
            show_progress_on=status,
        )
        stop.click(tasks.stop, queue=False, api_name=False)

    @streams
    def compare(
        self, request: gr.Request | None, indices: list[int], count: object, seed: object, steps: object
    ) -> Iterator[tuple]:
        """Draws a row of samples for each model; yields progress, and at last the outputs."""
        if not indices or len(indices) > MAX_MODELS:
            raise UserError(f"Models: choose from 1 to {MAX_MODELS}.")
        models = [self.store.model(index) for index in indices]
        for model in models:
            if model.needs_more:
                raise UserError(f"{model.title} needs an image or numbers as a condition: choose other models.")
        words = [model.checkpoint for model in models]
        words += ["--num_images", str(whole("Images of each", count, 1, MAX_COLUMNS)), "--seed", seed_of(seed)]
        words += ["--dtype", "float32"]
        if any(model.family == "diffusion" for model in models):
            words += ["--num_inference_steps", str(whole("Steps", steps, 1, MAX_STEPS))]
        for report in self.tasks.run(request, lambda task: self._draw(indices, words, task)):
            if isinstance(report, Progress):
                yield gr.skip(), f"Drawing: {report.text}", gr.skip(), gr.skip()
            else:
                yield report, "", metrics_of(models), command_line("plot samples", words)

    def _draw(self, indices: list[int], words: list[str], task: Task) -> "Image.Image":
        from ..plots import captioned_strips

        args = samples_parser().parse_args(words)
        task.report("loading the models ...")
        with self.store.use(*indices) as pipes:
            return captioned_strips(samples_strips(pipes, args, [watch(pipe, task) for pipe in pipes]))


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
