"""A tiny random checkpoint of each family, and the store that loads them."""

import pytest


NAMES = {0: "cat", 1: "dog", 2: "frog"}
FAMILIES = ("diffusion", "conditional", "flow", "pixelcnn", "vae", "dcgan")


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
    dcgan = TinyDCGANGenerator(sample_size=8, out_channels=1, latent_dim=6, block_out_channels=(8, 8))
    dcgan(torch.randn(32, 6))  # batch norm needs statistics
    for parameter in (*pixelcnn.parameters(), *vae.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    pipes = {
        "diffusion": TinyPipeline(tiny_unet(), TinyDDIMScheduler(beta_schedule="cosine")),
        "conditional": TinyConditionalPipeline(tiny_unet(num_class_embeds=3), TinyDDIMScheduler(), id2label=NAMES),
        "flow": TinyPipeline(tiny_unet(), TinyFlowMatchScheduler()),
        "pixelcnn": TinyPixelCNNPipeline(pixelcnn.eval(), id2label=NAMES),
        "vae": TinyVAEPipeline(vae.eval()),
        "dcgan": TinyDCGANPipeline(dcgan.eval()),
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


@pytest.fixture(scope="session")
def models(checkpoints):
    from tiny_diffusers.app.models import list_models

    return list_models([str(folder) for folder in checkpoints.values()])


@pytest.fixture(scope="module")
def store(models):
    """The store that a module's tests share; each model is loaded once."""
    from tiny_diffusers.app.models import ModelStore

    return ModelStore(models, device="cpu")


@pytest.fixture
def index_of(models):
    return {model.name: index for index, model in enumerate(models)}
