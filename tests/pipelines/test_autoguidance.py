"""Guidance away from a weaker model, the pipelines' `guidance_model`."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tiny_diffusers import TinyConditionalPipeline, TinyFlowMatchScheduler, TinyImg2ImgPipeline, TinyPipeline, cli, hub


CALL = {"num_inference_steps": 2, "eta": 0.0, "output_type": "latent", "return_dict": False, "clip_sample": False}


@pytest.fixture
def weaker(make_unet):
    """Returns a factory of networks that are smaller than those of `make_unet`, with other weights."""

    def make(stock: bool, **options):
        heads = {"attention_head_dim": 4} if stock else {}
        return make_unet(stock, block_out_channels=(4, 4), **heads, **options)

    return make


@pytest.mark.parametrize("stock", [True, False])
def test_each_step_follows_the_difference_from_the_weaker_model(make_unet, weaker, quiet, stock):
    unet, guide = make_unet(stock=stock), weaker(stock=stock)
    pipe = quiet(TinyPipeline(unet, TinyFlowMatchScheduler(), guidance_model=guide))
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (images,) = pipe(2, latents=latents, guidance_scale=3.0, **CALL)

    x, times = latents, [1.0, 0.5, 0.0]
    for t, end in zip(times, times[1:], strict=False):
        with torch.no_grad():
            velocity, weak = (network(x, torch.tensor(1000 * t)).sample for network in (unet, guide))
        x = x + (end - t) * (weak + 3 * (velocity - weak))
    torch.testing.assert_close(images, x)
    (interval,) = pipe(2, latents=latents, guidance_scale=3.0, guidance_interval=(0.0, 0.0), **CALL)
    (plain,) = quiet(TinyPipeline(unet, TinyFlowMatchScheduler()))(2, latents=latents, **CALL)
    assert torch.equal(interval, plain) and not torch.allclose(images, plain)


def test_the_weaker_model_sees_the_same_class(make_unet, weaker, quiet):
    unet, guide = make_unet(stock=False, classes=3), weaker(stock=False, classes=3)
    pipe = quiet(TinyConditionalPipeline(unet, TinyFlowMatchScheduler(), guidance_model=guide))
    latents = torch.randn(2, 1, 8, 8)
    one_step = CALL | {"num_inference_steps": 1}
    (images,) = pipe([0, 2], latents=latents, guidance_scale=2.0, **one_step)
    with torch.no_grad():
        strong, weak = (net(latents, torch.tensor(1000.0), torch.tensor([0, 2])).sample for net in (unet, guide))
    torch.testing.assert_close(images, latents - (2 * strong - weak))


@pytest.mark.parametrize("stock", [True, False])
def test_it_is_saved_and_travels_with_the_checkpoint(make_unet, weaker, quiet, tmp_path, stock):
    options = {"stock": stock, "classes": 3}
    pipe = quiet(
        TinyConditionalPipeline(make_unet(**options), TinyFlowMatchScheduler(), guidance_model=weaker(**options))
    )
    call = CALL | {"class_labels": [0, 1], "guidance_scale": 2.0, "latents": torch.randn(2, 1, 8, 8)}
    hub.export(pipe, tmp_path)
    loaded = [TinyPipeline.from_pretrained(tmp_path)]
    if not stock:  # a stock pipeline ignores it
        loaded.append(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True))
    for each in loaded:
        assert torch.equal(quiet(each)(**call)[0], pipe(**call)[0])
    edit = quiet(TinyImg2ImgPipeline.from_pipe(pipe))
    assert edit.guidance_model is pipe.guidance_model


def test_a_checkpoint_without_one_is_saved_as_before(make_unet, tmp_path):
    TinyPipeline(make_unet(), TinyFlowMatchScheduler()).save_pretrained(tmp_path)
    assert "guidance_model" not in json.loads((tmp_path / "model_index.json").read_text())
    pipe = TinyPipeline.from_pretrained(tmp_path)
    assert pipe.guidance_model is None and "guidance_model" not in pipe.components


def test_what_cannot_guide_is_refused(make_unet):
    unet = make_unet(stock=False)
    with pytest.raises(ValueError, match="must be 1 for a network without conditions, got 2.*`guidance_model`"):
        TinyPipeline(unet, TinyFlowMatchScheduler())(guidance_scale=2)
    other = make_unet(stock=False, sample_size=16)
    with pytest.raises(ValueError, match="The `guidance_model` has the sample_size 16, and the network 8"):
        TinyPipeline(unet, TinyFlowMatchScheduler(), guidance_model=other)(guidance_scale=2)
    classes = make_unet(stock=False, classes=2)
    with pytest.raises(ValueError, match="The `guidance_model` has the num_class_embeds None, and the network 2"):
        TinyConditionalPipeline(classes, TinyFlowMatchScheduler(), guidance_model=unet)(0, guidance_scale=2)
    pipe = TinyConditionalPipeline(classes, TinyFlowMatchScheduler(), null_class_id=None, guidance_model=classes)
    with pytest.raises(ValueError, match="The network needs `class_labels`: give classes of 0 to 2."):
        pipe(guidance_scale=0)


def test_export_joins_two_checkpoints(make_unet, weaker, tmp_path, capsys):
    for name, network in {"strong": make_unet(stock=False), "weak": weaker(stock=False)}.items():
        TinyPipeline(network, TinyFlowMatchScheduler()).save_pretrained(tmp_path / name)
    TinyPipeline(weaker(stock=False), TinyFlowMatchScheduler(num_train_timesteps=10)).save_pretrained(
        tmp_path / "other"
    )
    strong, weak, other, joined = (str(tmp_path / name) for name in ("strong", "weak", "other", "joined"))

    assert cli.main(["export", strong, joined, "--guidance_model", weak]) == 0
    pipe = TinyPipeline.from_pretrained(joined)
    assert np.array_equal(
        *(network.conv_in.weight.detach().numpy() for network in (pipe.guidance_model, weaker(stock=False)))
    )
    capsys.readouterr()
    assert cli.main(["export", strong, f"{joined}2", "--guidance_model", other]) == 2
    assert "was trained for another task: its num_train_timesteps is 10" in capsys.readouterr().err
