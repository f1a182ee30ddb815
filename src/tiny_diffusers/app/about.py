"""The tab About: facts of a model, its training curves and its card, as text."""

import functools
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from ..errors import markdown
from ..files import read_text
from ..runs import RunFolder
from .controls import picture_box
from .models import TITLES, Model, ModelStore
from .requests import answers


if TYPE_CHECKING:
    from PIL import Image


MAX_CARD = 100_000  # characters


class AboutTab:
    """Outputs of the tab, which a choice of the model fills."""

    def __init__(self, store: ModelStore, chosen: gr.Dropdown, page: gr.Blocks):
        self.store = store
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                facts = gr.Markdown()
                curves = picture_box("Training curves")
            with gr.Column(scale=3, min_width=280):
                card = gr.Code(label="Model card", language=None, interactive=False, wrap_lines=True, max_lines=40)
        gr.on(
            [page.load, chosen.change],
            self.describe,
            chosen,
            [facts, curves, card],
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",  # a choice while the page loads counts
            api_name="about",
        )

    @answers
    def describe(self, index: int) -> tuple:
        """Returns the facts of a model in Markdown, its training curves, and its card as plain text."""
        model = self.store.model(index)
        log = RunFolder(model.folder).log
        curves = curves_of(log, model.name, log.stat().st_mtime_ns) if log.is_file() else None
        return facts_of(model), gr.update(value=curves, visible=curves is not None), card_of(model)


def facts_of(model: Model) -> str:
    """Returns a list of what a model is, in Markdown."""
    width, height = model.size
    channels = {1: "gray", 3: "color"}.get(model.num_channels, f"{model.num_channels} channels")
    facts = RunFolder(model.folder).read_facts()
    parameters = facts.get("parameters")
    count = sum(parameters.values()) if isinstance(parameters, dict) else None
    rows = {
        "Family": TITLES[model.family],
        "Images": f"{width} x {height}, {channels}",
        "Classes": ", ".join(model.classes) or "none",
        "Conditions": ", ".join(condition.name for condition in model.conditions) or "none",
        "Parameters": f"{count:,}" if isinstance(count, int) else "unknown",
    }
    lines = [f"- **{name}**: {markdown(value)}" for name, value in rows.items()]
    return "\n".join([f"### {markdown(model.name)}", *lines])


@functools.lru_cache(maxsize=16)
def curves_of(log: Path, name: str, written: int) -> "Image.Image":
    """Draws the losses of a model's training, once for what its log, which was `written` at a time, holds."""
    from PIL import Image

    from ..plots import loss_curves_of_run

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curves.png"
        loss_curves_of_run(log, title=name).draw(file)
        with Image.open(file) as picture:
            return picture.convert("RGB")


def card_of(model: Model) -> str:
    """Returns the text of a model's card, without the front matter that the Hub reads."""
    try:
        text = read_text(RunFolder(model.folder).card)[:MAX_CARD]
    except (OSError, ValueError):
        return "This model has no card."
    return re.sub(r"\A---\n.*?\n---\n+", "", text, flags=re.DOTALL)
