"""A tiny random checkpoint of each family, and the store that loads them."""

import pytest


NAMES = {0: "cat", 1: "dog", 2: "frog"}
FAMILIES = ("diffusion", "conditional", "flow", "pixelcnn", "vae", "dcgan", "rectangle", "channels", "conditions")
FAMILIES += ("enlarging",)  # takes an image as a condition
FAMILIES += ("vae_of_all", "pixelcnn_of_all")  # take a class and conditions
STATISTICS = {"names": ["age", "size"], "means": [40, 2], "deviations": [9, 1], "lows": [20, 0], "highs": [60, 5]}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tiny_unet):
    """Saves a pipeline of each family; returns name -> folder."""
    import torch

    from tiny_diffusers import (
        TinyConditionalPipeline,
        TinyDCGANGenerator,
        TinyDCGANPipeline,
        TinyDDIMScheduler,
        TinyFlowMatchScheduler,
        TinyPipeline,
        TinyPixelCNNModel,
        TinyPixelCNNPipeline,
        TinyVAEModel,
        TinyVAEPipeline,
    )

    torch.manual_seed(0)
    network = {"sample_size": 8, "in_channels": 1}
    pixelcnn = TinyPixelCNNModel(**network, variant="gated", hidden_channels=12, num_layers=3, num_class_embeds=3)
    vae = TinyVAEModel(**network, latent_dim=3, block_out_channels=(8, 8))
    given = {"num_class_embeds": 3, "num_conditions": 2}
    vae_of_all = TinyVAEModel(**network, latent_dim=3, block_out_channels=(8, 8), **given)
    pixelcnn_of_all = TinyPixelCNNModel(**network, variant="gated", hidden_channels=12, num_layers=3, **given)
    dcgan = TinyDCGANGenerator(sample_size=8, out_channels=1, latent_dim=6, block_out_channels=(8, 8))
    dcgan(torch.randn(32, 6))  # batch norm needs statistics
    for drawn in (pixelcnn, vae, vae_of_all, pixelcnn_of_all):
        for parameter in drawn.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    of_all = {"id2label": NAMES, "condition_statistics": STATISTICS}
    pipes = {
        "diffusion": TinyPipeline(tiny_unet(), TinyDDIMScheduler(beta_schedule="cosine")),
        "conditional": TinyConditionalPipeline(tiny_unet(num_class_embeds=3), TinyDDIMScheduler(), id2label=NAMES),
        "flow": TinyPipeline(tiny_unet(), TinyFlowMatchScheduler()),
        "pixelcnn": TinyPixelCNNPipeline(pixelcnn.eval(), id2label=NAMES),
        "vae": TinyVAEPipeline(vae.eval()),
        "dcgan": TinyDCGANPipeline(dcgan.eval()),
        "rectangle": TinyPipeline(
            tiny_unet(sample_size=(8, 12)), TinyFlowMatchScheduler(), guidance_model=tiny_unet(sample_size=(8, 12))
        ),
        "channels": TinyPipeline(tiny_unet(in_channels=2, out_channels=2), TinyFlowMatchScheduler()),
        "conditions": TinyConditionalPipeline(
            tiny_unet(num_conditions=2), TinyFlowMatchScheduler(), condition_statistics=STATISTICS
        ),
        "enlarging": TinyConditionalPipeline(
            tiny_unet(in_channels=2, out_channels=1), TinyFlowMatchScheduler(), conditioning="low_resolution:2"
        ),
        "vae_of_all": TinyVAEPipeline(vae_of_all.eval(), **of_all),
        "pixelcnn_of_all": TinyPixelCNNPipeline(pixelcnn_of_all.eval(), **of_all),
    }
    folders = {name: tmp_path_factory.mktemp("app") / name for name in FAMILIES}
    for name, folder in folders.items():
        pipes[name].save_pretrained(folder)
    return folders


@pytest.fixture(autouse=True)
def process_state(monkeypatch):
    """Leaves what the app sets for its whole process as it was for the tests that follow."""
    from diffusers.utils import logging

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # leaves torch's threads alone
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def store(checkpoints):
    from tiny_diffusers.app.models import ModelStore, list_models

    return ModelStore(list_models([str(folder) for folder in checkpoints.values()]), device="cpu")


@pytest.fixture
def index_of(store):
    return {model.name: index for index, model in enumerate(store.models)}


@pytest.fixture
def open_tab(store):
    """Builds a tab for the listed models; returns it with its values as the page has them for one of these."""
    import gradio as gr

    from tiny_diffusers.app.requests import Tasks

    def build(tab_class, model, **changes):
        with gr.Blocks(analytics_enabled=False):
            chosen = gr.Dropdown([(model.title, i) for i, model in enumerate(store.models)], value=0)
            tab = tab_class(store, Tasks(), chosen)
        settings = [{"label": control.label, "value": control.value} for control in tab.controls]
        settings = [own | changed for own, changed in zip(settings, tab.settings(model), strict=True)]
        assert set(changes) <= {setting["label"] for setting in settings}
        return tab, [changes.get(setting["label"], setting["value"]) for setting in settings]

    return build
