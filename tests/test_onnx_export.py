import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDCGANGenerator,
    TinyDCGANPipeline,
    TinyDDIMScheduler,
    TinyPixelCNNModel,
    TinyPixelCNNPipeline,
    TinyTransformer2DModel,
    TinyVAEModel,
    TinyVAEPipeline,
    cli,
)
from tiny_diffusers.onnx_export import export_onnx


LABELS = torch.tensor([0, 1, 2, 3, 1])  # of three classes and no class
SIZE = (8, 12)
IMAGES = torch.rand(5, 1, *SIZE, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
STATISTICS = {"names": ["a", "b"], "means": [0, 0], "deviations": [1, 1], "lows": [0, 0], "highs": [1, 1]}
VALUES = torch.linspace(-1, 1, 10).view(5, 2).index_fill(0, torch.tensor([1]), float("nan"))  # and none of an image


def diffusion(tiny_unet):
    pipe = TinyConditionalPipeline(tiny_unet(num_class_embeds=3, sample_size=SIZE), TinyDDIMScheduler())
    inputs = {"sample": IMAGES, "timestep": torch.tensor([0, 1, 10, 500, 999]), "class_labels": LABELS}
    return pipe, inputs, lambda *inputs: pipe.unet(*inputs).sample


def conditions(tiny_unet):
    unet = tiny_unet(num_conditions=2, sample_size=SIZE)
    pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(), condition_statistics=STATISTICS)
    inputs = {"sample": IMAGES, "timestep": torch.tensor([0, 1, 10, 500, 999]), "conditions": VALUES}
    return pipe, inputs, lambda sample, timestep, values: pipe.unet(sample, timestep, conditions=values).sample


def transformer(tiny_unet):
    sizes = {"sample_size": SIZE, "in_channels": 1, "out_channels": 1, "patch_size": 2, "num_class_embeds": 3}
    layers = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "position_embedding": "relative"}
    network = TinyTransformer2DModel(**sizes, **layers, long_skips=True)
    for parameter in network.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = TinyConditionalPipeline(network, TinyDDIMScheduler())
    _, inputs, _ = diffusion(tiny_unet)
    return pipe, inputs, lambda *inputs: pipe.unet(*inputs).sample


def vae(tiny_unet):
    options = {"block_out_channels": (8,), "latent_dim": 4, "num_class_embeds": 3, "num_conditions": 2}
    network = TinyVAEModel(sample_size=SIZE, in_channels=5, **options)
    pipe = TinyVAEPipeline(network, value_range={"low": -100, "high": 2000}, condition_statistics=STATISTICS)
    return pipe, {"latents": LATENTS, "class_labels": LABELS, "conditions": VALUES}, pipe.vae.decode


def dcgan(tiny_unet):
    options = {"sample_size": SIZE, "out_channels": 1, "block_out_channels": (8,), "latent_dim": 4}
    network = TinyDCGANGenerator(**options, num_class_embeds=3, num_conditions=2)
    pipe = TinyDCGANPipeline(network.eval(), condition_statistics=STATISTICS)
    inputs = {"latents": LATENTS, "class_labels": LABELS, "conditions": VALUES}
    return pipe, inputs, lambda x, labels, values: pipe.generator(x, labels, conditions=values).sample


def pixelcnn(variant):
    def build(tiny_unet):
        options = {"sample_size": SIZE, "in_channels": 1, "variant": variant, "hidden_channels": 8, "num_layers": 1}
        network = TinyPixelCNNModel(**options, num_class_embeds=3, num_conditions=2)
        pipe = TinyPixelCNNPipeline(network.eval(), condition_statistics=STATISTICS)
        inputs = {"sample": IMAGES, "class_labels": LABELS, "conditions": VALUES}
        return pipe, inputs, lambda x, labels, values: pipe.pixelcnn(x, labels, conditions=values).sample

    return build


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(diffusion, marks=slow),
        pytest.param(conditions, marks=slow),
        pytest.param(transformer, marks=pytest.mark.exhaustive),
        pytest.param(vae, marks=slow),
        pytest.param(dcgan, marks=slow),
        pytest.param(pixelcnn("gated"), marks=slow),
        pytest.param(pixelcnn("plusplus"), marks=pytest.mark.exhaustive),
        pytest.param(pixelcnn("row_lstm"), marks=pytest.mark.exhaustive),
    ],
)
def test_any_batch_gives_what_torch_gives(tiny_unet, tmp_path, build):
    pipe, inputs, function = build(tiny_unet)
    session = onnxruntime.InferenceSession(export_onnx(pipe, tmp_path))
    assert [each.name for each in session.get_inputs()] == [*inputs]
    for size in (1, 3, 5):
        batch = {name: value[:size] for name, value in inputs.items()}
        with torch.no_grad():
            expected = function(*batch.values()).numpy()
        (found,) = session.run(["out_sample"], {name: value.numpy() for name, value in batch.items()})
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        diffusion,
        conditions,
        *(pytest.param(each, marks=slow) for each in (transformer, dcgan, pixelcnn("gated"), pixelcnn("plusplus"))),
    ],
)
def test_torch_exports_a_network_with_any_batch_size(tiny_unet, build):
    pipe, inputs, function = build(tiny_unet)
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in inputs}
    program = torch.export.export(
        pipe._network, (), {name: v[:2] for name, v in inputs.items()}, dynamic_shapes=shapes
    )
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**inputs).sample, function(*inputs.values()), atol=1e-5, rtol=1e-4)


def test_what_torch_says_of_its_own_exporter_is_not_printed(tiny_unet, tmp_path, monkeypatch):
    logger, logged = logging.getLogger("torch.onnx._internal.exporter._registration"), []

    def export(*args, **kwargs):
        logger.warning("torchvision is not installed")
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        return SimpleNamespace(save=Path.touch)

    monkeypatch.setattr(logger, "handle", logged.append)
    monkeypatch.setattr(torch.onnx, "export", export)
    with warnings.catch_warnings(action="error"):
        assert export_onnx(diffusion(tiny_unet)[0], tmp_path).is_file()
    assert logged == []
    logger.warning("as before")
    assert [record.getMessage() for record in logged] == ["as before"]


@pytest.mark.slow
def test_the_command_lays_the_network_and_the_scheduler(tiny_unet, tmp_path, capsys):
    pipe, _, _ = dcgan(tiny_unet)
    pipe.save_pretrained(tmp_path / "model")
    assert cli.main(["export", f"{tmp_path}/model", f"{tmp_path}/onnx", "--format", "onnx"]) == 0
    files = {path.relative_to(tmp_path / "onnx").as_posix() for path in (tmp_path / "onnx").rglob("*.*")}
    assert files == {"generator/model.onnx", "generator/config.json"}
    assert cli.main(["export", f"{tmp_path}/model", f"{tmp_path}/onnx", "--format", "onnx", "--dtype", "float16"]) == 2
    assert "--format onnx is one network in float32, without code: leave out --dtype" in capsys.readouterr().err
