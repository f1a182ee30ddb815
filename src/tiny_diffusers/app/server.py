"""The app's page and its server."""

import logging
import threading
from collections.abc import Sequence

import gradio as gr

from ..errors import UserError, first_line
from .about import AboutTab
from .compare import CompareTab
from .edit import EditTab
from .generate import GenerateTab
from .look import LookTab, views_of
from .models import Model, ModelStore
from .requests import Tasks, answers
from .uploads import MAX_UPLOAD_BYTES, Page
from .walk import WalkTab


logger = logging.getLogger(__name__)

GENERATE = "generate"  # id of the first tab
CACHE_SECONDS = 3600  # that files of requests are kept
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # none from another server
MONO_FONTS = ("ui-monospace", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: auto; }
.picture { padding-top: 36px; }  /* of its buttons, which would cover it */
.picture .image-container, .picture .image-frame { position: static; }
.status { min-height: 1.6em; }
footer { display: none !important; }
"""


def build(store: ModelStore) -> gr.Blocks:
    """Builds the page for the listed models."""
    shown = shown_tabs(store.models[0], store.dataset_name)
    with Page(
        title="tiny-diffusers", analytics_enabled=False, fill_width=True, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as page:
        chosen = gr.Dropdown(
            [(model.title, index) for index, model in enumerate(store.models)],
            value=0,
            label="Model",
            interactive=len(store.models) > 1,
        )
        with gr.Tabs() as all_tabs:
            with gr.Tab("Generate", id=GENERATE):
                generate = GenerateTab(store, Tasks(), chosen)
            with gr.Tab("Walk", visible=shown[0]) as walk_tab:
                walk = WalkTab(store, Tasks(), chosen)
            with gr.Tab("Edit", visible=shown[1]) as edit_tab:
                edit = EditTab(store, Tasks(), chosen)
            with gr.Tab("Look inside", visible=shown[2]) as look_tab:
                look = LookTab(store, Tasks(), chosen)
            with gr.Tab("Compare", visible=len(store.models) > 1):
                compare = CompareTab(store, Tasks())
            with gr.Tab("About"):
                AboutTab(store, chosen, page)
        tabs = [generate, walk, edit, look]
        not_of_every_model = [walk_tab, edit_tab, look_tab]
        opened = gr.Textbox(visible=False)  # name of the open tab, which the page itself notes
        for tab in all_tabs.children:
            tab.select(None, None, opened, js=f"() => {tab.label!r}", show_progress="hidden", api_name=False)

        @answers
        def choose(index: int, opened: str) -> list:
            model = store.model(index)
            visible = shown_tabs(model, store.dataset_name)
            hidden = [tab.label for tab, each in zip(not_of_every_model, visible, strict=True) if each == "hidden"]
            selected = gr.update(selected=GENERATE) if opened in hidden else gr.skip()
            updates = [gr.update(visible=each) for each in visible]
            return [selected, *updates, *(gr.update(**changes) for tab in tabs for changes in tab.settings(model))]

        controls = [control for tab in tabs for control in tab.controls]
        chosen.change(
            choose,
            [chosen, opened],
            [all_tabs, *not_of_every_model, *controls],
            queue=False,
            api_name=False,
            show_progress="hidden",
        )
        for tab in [*tabs, compare]:
            page.unload(tab.tasks.stop)
    return page


def shown_tabs(model: Model, dataset_name: str | None = None) -> list[bool | str]:
    """Returns the `visible` of Walk, Edit and Look inside. `"hidden"` keeps a tab in the page, where an update finds it."""
    return [can or "hidden" for can in (model.can_walk, model.can_edit, bool(views_of(model, dataset_name)))]


def launch(
    models: Sequence[Model],
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    queue_size: int = 20,
    device: str | None = None,
    dataset_name: str | None = None,
    block: bool = True,
) -> gr.Blocks:
    """
    Serves the app.

    Args:
        models (`list[Model]`): The models that can be chosen.
        host (`str`): The address to listen on; the default can be reached from this machine only.
        port (`int`, *optional*): The port. Defaults to the first free one from 7860 on.
        share (`bool`): Whether to open a public link through Gradio's servers.
        auth (`tuple[str, str]`, *optional*): User name and password that the page asks for.
        queue_size (`int`): Requests that may wait; further ones are refused.
        device (`str`, *optional*): As for [`~tiny_diffusers.hardware.setup_torch`].
        dataset_name (`str`, *optional*): As for [`ModelStore`].
        block (`bool`): Whether to serve until the process is interrupted.

    Returns:
        `gr.Blocks`: The page that is served; its `close` ends that.
    """
    store = ModelStore(models, device=device, dataset_name=dataset_name)
    page = build(store)
    page.queue(max_size=queue_size, default_concurrency_limit=1, api_open=False)  # no request passes the queue
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            max_file_size=MAX_UPLOAD_BYTES,
            prevent_thread_lock=True,
            show_error=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=SYSTEM_FONTS, font_mono=MONO_FONTS),
            css=CSS,
        )
    except OSError as error:
        raise UserError(
            f"--port {port}: nothing can be served at {host} there ({error}): give another port."
        ) from error
    threading.Thread(target=_warm_up, args=(store,), daemon=True).start()
    if block:
        page.block_thread()
    return page


def _warm_up(store: ModelStore) -> None:
    """Imports torch and loads the first model, once the page is up."""
    try:
        with store.use(0):
            pass
    except Exception as error:  # a request says it again, and others may choose another model
        logger.warning("%s can't be loaded: %s", store.models[0].title, first_line(error))
