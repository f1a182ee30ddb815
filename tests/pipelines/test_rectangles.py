"""Each pipeline draws and takes images that are not square, around stock networks and this package's."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline

from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyImg2ImgPipeline,
    TinyInpaintPipeline,
    TinyInterpolationPipeline,
    TinyPipeline,
    TinyRestorationPipeline,
)


HEIGHT, WIDTH = SIZE = (12, 16)
IMAGE = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(1, HEIGHT, WIDTH, 1)
MASK = np.float32(np.arange(WIDTH) >= 8)[None].repeat(HEIGHT, axis=0)
RESTORED = {
    "inpaint": ({"mask_image": MASK}, IMAGE),
    "super_resolution": ({"factor": 4}, IMAGE[:, ::4, ::4]),
    "deblur": ({"kernel": torch.ones(3, 3) / 9}, IMAGE),
}
CALLS = {
    "unconditional": (TinyPipeline, {"batch_size": 1}),
    "walk": (TinyInterpolationPipeline, {"seeds": [0, 1], "num_frames": 3}),
    "img2img": (TinyImg2ImgPipeline, {"image": IMAGE}),
    "inpaint": (TinyInpaintPipeline, {"image": IMAGE, "mask_image": MASK}),
    **{
        f"restore_{name}": (TinyRestorationPipeline, {"image": image, "operator": name, **options})
        for name, (options, image) in RESTORED.items()
    },
}


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "tiny"])
@pytest.mark.parametrize("name", CALLS)
def test_images_have_the_height_and_width_of_the_network(name, stock, make_unet, quiet):
    pipeline_class, call = CALLS[name]
    pipe = quiet(pipeline_class(make_unet(stock, sample_size=SIZE), TinyDDIMScheduler()))
    images = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np", **call).images
    assert images.shape[1:] == (HEIGHT, WIDTH, 1)
    if name == "inpaint":  # what is not painted stays
        np.testing.assert_allclose(images[:, :, :8], IMAGE[:, :, :8], atol=1e-5)


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "tiny"])
def test_a_condition_has_the_aspect_ratio_of_the_images(stock, make_unet, quiet):
    unet = make_unet(stock, classes=2, in_channels=2, sample_size=SIZE)
    pipe = quiet(
        TinyConditionalPipeline(unet, TinyDDIMScheduler(), {0: "cat", 1: "dog"}, conditioning="low_resolution:4")
    )
    call = {"image": IMAGE[:, ::4, ::4], "class_labels": "dog", "guidance_scale": 2.0, "num_inference_steps": 2}
    assert pipe(**call).images[0].size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("scheduler", "stock_class"),
    [(TinyDDIMScheduler, DDIMPipeline), (TinyFlowMatchScheduler, DDPMPipeline), (TinyEDMScheduler, None)],
)
def test_stock_diffusers_loads_a_stock_network_wherever_it_draws_rectangles(
    scheduler, stock_class, make_unet, quiet, tmp_path
):
    TinyPipeline(make_unet(sample_size=SIZE), scheduler()).save_pretrained(tmp_path)
    call = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    pipes = [TinyPipeline.from_pretrained(tmp_path)]
    if stock_class is None:  # ConsistencyModelPipeline draws squares alone
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "TinyPipeline"
    else:
        pipes.append(DiffusionPipeline.from_pretrained(tmp_path))
        assert type(pipes[1]) is stock_class
    for pipe in pipes:
        assert quiet(pipe)(**call).images.shape == (2, HEIGHT, WIDTH, 1)


@pytest.mark.parametrize("size", [[8, 8, 8], [8], [0, 8], [8, -8], [8, 8.5], 0])
def test_a_size_that_is_no_height_and_width_is_refused_in_a_line(size, make_unet, tmp_path):
    TinyPipeline(make_unet(), TinyDDIMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    with pytest.raises(
        ValueError, match="`sample_size` must be the side of the images in pixels, or their height"
    ) as error:
        TinyPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
