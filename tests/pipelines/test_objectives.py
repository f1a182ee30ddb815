"""Rectified flow and EDM in the pipelines: sampling, intermediates, inversion, exchange with stock diffusers."""

import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDPMPipeline, DiffusionPipeline

from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyInterpolationPipeline,
    TinyPipeline,
)
from tiny_diffusers.pipelines.pipeline_tiny import image_generators


OBJECTIVES = [TinyFlowMatchScheduler, TinyEDMScheduler]
STOCK = [
    (TinyFlowMatchScheduler, "FlowMatchEulerDiscreteScheduler", DDPMPipeline),
    (TinyEDMScheduler, "EDMEulerScheduler", ConsistencyModelPipeline),
]
STOCK_SOLVERS = [
    *((TinyFlowMatchScheduler, f"{name}Scheduler") for name in ("DPMSolverMultistep", "UniPCMultistep")),
    *((TinyFlowMatchScheduler, f"FlowMatch{name}DiscreteScheduler") for name in ("Euler", "Heun")),
    *((TinyEDMScheduler, f"EDM{name}Scheduler") for name in ("DPMSolverMultistep", "Euler")),
]
QUICK = {"num_inference_steps": 4, "output_type": "np"}


def draw(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, generator=image_generators(0, 2), **QUICK | arguments).images


@pytest.mark.parametrize("scheduler", OBJECTIVES)
@pytest.mark.parametrize("stock", [True, False])
def test_a_checkpoint_gives_the_same_images_again(make_unet, tmp_path, scheduler, stock):
    pipe = TinyPipeline(make_unet(stock=stock), scheduler(solver="heun", clip_sample=True))
    pipe.save_pretrained(tmp_path)
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert type(loaded) is TinyPipeline and type(loaded.scheduler) is scheduler
    assert loaded.scheduler.config.solver == "heun" and loaded.scheduler.config.clip_sample
    np.testing.assert_array_equal(draw(loaded), draw(pipe))
    assert pipe.num_timesteps == 7


@pytest.mark.parametrize("scheduler", OBJECTIVES)
def test_nothing_is_said_of_a_checkpoint_that_is_loaded(make_unet, tmp_path, caplog, scheduler):
    TinyPipeline(make_unet(stock=False), scheduler()).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        TinyPipeline.from_pretrained(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(("scheduler", "stock_scheduler", "stock_pipeline"), STOCK)
def test_stock_diffusers_draws_the_same_from_a_stock_network(
    make_unet, tmp_path, scheduler, stock_scheduler, stock_pipeline
):
    pipe = TinyPipeline(make_unet(), scheduler())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == stock_pipeline.__name__ and index["scheduler"] == ["diffusers", stock_scheduler]
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is stock_pipeline and type(stock.scheduler).__name__ == stock_scheduler
    images = draw(stock)
    timesteps = {"timesteps": stock.scheduler.timesteps.tolist()} if scheduler is TinyFlowMatchScheduler else {}
    np.testing.assert_allclose(draw(pipe, eta=0.0, **timesteps), images, atol=1e-5)  # flow: at equal noise levels


@pytest.mark.parametrize(("scheduler", "name"), STOCK_SOLVERS)
def test_a_stock_solver_draws_the_same_before_and_after_stock_saves_and_loads(make_unet, tmp_path, scheduler, name):
    pipe = TinyPipeline(make_unet(), scheduler())
    pipe.save_pretrained(tmp_path / "ours")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = draw(pipe)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    stock.scheduler = getattr(diffusers, name).from_config(stock.scheduler.config)
    stock.save_pretrained(tmp_path / "stock")
    again = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    assert type(again.scheduler).__name__ == name
    np.testing.assert_allclose(draw(TinyPipeline(again.unet, again.scheduler)), images, atol=1e-5)
    if name != "UniPCMultistepScheduler":  # whose step takes no generator, which the stock pipeline passes
        np.testing.assert_allclose(draw(again), images, atol=1e-5)


@pytest.mark.parametrize("scheduler", OBJECTIVES)
def test_a_conditional_checkpoint_keeps_its_class_and_is_guided(make_unet, quiet, tmp_path, scheduler):
    unet = make_unet(classes=2)
    pipe = quiet(TinyConditionalPipeline(unet, scheduler(), {0: "cat", 1: "dog"}))
    pipe.save_pretrained(tmp_path)
    loaded = quiet(TinyPipeline.from_pretrained(tmp_path))
    assert type(loaded) is TinyConditionalPipeline

    def sample(pipe, w, **arguments):
        generator = image_generators(0, 2)
        return pipe(["cat", "dog"], guidance_scale=w, generator=generator, **QUICK | arguments).images

    np.testing.assert_allclose(sample(loaded, 2.0), sample(pipe, 2.0), atol=1e-6)
    call = {"num_inference_steps": 1, "output_type": "latent"}
    one_step = [sample(pipe, w, clip_sample=False, **call) for w in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(one_step[2], 3 * one_step[1] - 2 * one_step[0], atol=1e-3, rtol=1e-4)
    limited = sample(pipe, 3.0, dynamic_thresholding=0.9, **call)
    assert limited.abs().max() <= 1


@pytest.mark.parametrize(("scheduler", "name"), [(OBJECTIVES[0], None), (OBJECTIVES[1], None), *STOCK_SOLVERS])
def test_intermediates_are_predictions_of_the_image(make_unet, quiet, scheduler, name):
    pipe = quiet(TinyPipeline(make_unet(), scheduler()))
    if name is not None:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    output = pipe(num_inference_steps=4, return_intermediates=1, output_type="latent")
    (last,) = output.intermediates
    torch.testing.assert_close(last.pred_original_sample, output.images, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("scheduler", OBJECTIVES)
def test_eta_draws_noise_for_each_image(make_unet, quiet, scheduler):
    pipe = quiet(TinyPipeline(make_unet(), scheduler()))
    assert not np.allclose(draw(pipe, eta=1.5), draw(pipe), atol=1e-3)
    one = pipe(1, generator=image_generators(0, 1), eta=1.5, **QUICK).images
    np.testing.assert_allclose(one, draw(pipe, eta=1.5)[:1], atol=1e-4)
    for eta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`eta` must be at least 0"):
            draw(pipe, eta=eta)


@pytest.mark.parametrize("scheduler", [*OBJECTIVES, *(getattr(diffusers, stock) for _, stock, _ in STOCK)])
def test_images_are_inverted_and_interpolated(make_unet, quiet, scheduler):
    unet = make_unet()
    with torch.no_grad():  # small outputs make the map from noise to image invertible
        unet.conv_out.weight.mul_(0.1)
        unet.conv_out.bias.zero_()
    pipe = quiet(TinyInterpolationPipeline(unet, scheduler()))
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    latents = pipe.invert(images, num_inference_steps=20)
    again = quiet(TinyPipeline(unet, pipe.scheduler))(
        2, latents=latents, num_inference_steps=20, eta=0.0, output_type="pt"
    ).images
    psnr = -10 * torch.log10((again - images).square().mean())
    assert latents.shape == (2, 1, 8, 8) and psnr > 30
    assert pipe(images=images, num_frames=3, **QUICK).images.shape == (3, 8, 8, 1)


@pytest.mark.parametrize("scheduler", OBJECTIVES)
def test_what_cannot_be_done_is_refused_in_one_line(make_unet, quiet, scheduler):
    pipe = quiet(TinyInterpolationPipeline(make_unet(), scheduler(solver="heun")))
    with pytest.raises(ValueError, match=f"inverted by Euler.*{scheduler.__name__}"):
        pipe.invert(torch.zeros(1, 1, 8, 8), num_inference_steps=2)
    with pytest.raises(ValueError, match="strictly decreasing"):
        pipe(seeds=(0, 1), timesteps=[0.1, 0.2], **QUICK)
    solver = dict(STOCK_SOLVERS[::-1])[scheduler]  # DPM-Solver++
    pipe.scheduler = getattr(diffusers, solver).from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="timesteps"):
        pipe(seeds=(0, 1), timesteps=[0.2, 0.1], **QUICK)


@pytest.mark.parametrize("scheduler", OBJECTIVES)
def test_a_wrong_value_in_the_config_is_refused_in_one_line(make_unet, tmp_path, scheduler):
    TinyPipeline(make_unet(), scheduler()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for changes in ({"solver": "rk4"}, {"solver": 3}, {"clip_sample_range": "a"}, {"num_train_timesteps": 0}):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError) as refusal:
            TinyPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value) and "scheduler" in str(refusal.value) + str(tmp_path / "scheduler")


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_what_a_solver_does_not_do_is_refused_though_its_config_has_the_key(make_unet, quiet, name):
    """`from_config` keeps the keys of the scheduler that a config comes from."""
    pipe = quiet(TinyPipeline(make_unet(), TinyDDIMScheduler()))
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert "clip_sample" in pipe.scheduler.config
    for clip_sample in (True, False):
        with pytest.raises(ValueError, match=f"`clip_sample` means nothing to {name}"):
            pipe(clip_sample=clip_sample, **QUICK)


@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, TinyFlowMatchScheduler])
def test_without_clipping_nothing_is_thresholded_either(make_unet, quiet, scheduler):
    pipe = quiet(TinyPipeline(make_unet(), scheduler(thresholding=True, dynamic_thresholding_ratio=0.5)))
    latents = 3 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"latents": latents, "num_inference_steps": 2, "output_type": "latent", "return_intermediates": 2}
    limited, free = (pipe(clip_sample=clip, **options).intermediates[0].pred_original_sample for clip in (None, False))
    assert limited.abs().max() <= 1 + 1e-5 < free.abs().max()
    with pytest.raises(ValueError, match="True, False or None, got 'False'"):
        pipe(clip_sample="False", **options)


@pytest.mark.parametrize("scheduler", OBJECTIVES)
def test_a_little_noise_changes_the_images_a_little(make_unet, quiet, scheduler):
    pipe = quiet(TinyPipeline(make_unet(), scheduler()))
    plain, noisy = (pipe(2, image_generators(0, 2), 5, eta=eta, output_type="latent").images for eta in (0.0, 1e-4))
    torch.testing.assert_close(noisy, plain, atol=1e-2, rtol=0)


def test_a_pipeline_made_of_another_keeps_what_the_network_was_trained_for(make_unet, quiet):
    pipe = quiet(TinyPipeline(make_unet(), TinyDDIMScheduler()))
    pipe.scheduler = TinyFlowMatchScheduler()
    with pytest.raises(ValueError, match="trained on a beta schedule"):
        TinyInterpolationPipeline.from_pipe(pipe)(seeds=(0, 1), num_frames=2, **QUICK)


@pytest.mark.parametrize(("name", "options"), [
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}),
])  # fmt: skip
def test_settings_that_only_the_stock_class_has_are_refused(name, options):
    ours = {"FlowMatchEulerDiscreteScheduler": TinyFlowMatchScheduler, "EDMEulerScheduler": TinyEDMScheduler}[name]
    with pytest.raises(ValueError, match=f"{ours.__name__} has no {next(iter(options))}"):
        ours.from_config(getattr(diffusers, name)(**options).config)


def test_shifted_stock_flow_takes_no_custom_timesteps(make_unet, quiet):
    pipe = quiet(TinyPipeline(make_unet(), TinyFlowMatchScheduler()))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="TinyFlowMatchScheduler"):
        pipe(timesteps=[1000.0, 500.0])
