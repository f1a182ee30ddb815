import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from tiny_diffusers import TinyConditionalPipeline, TinyDDIMScheduler, TinyDDPMScheduler
from tiny_diffusers.pipelines.pipeline_tiny import image_generators


NAMES = {0: "cat", 1: "dog", 2: "frog"}


@pytest.fixture(params=["stock", "tiny"])
def pipe(request, make_unet, quiet):
    unet = make_unet(stock=request.param == "stock", classes=3)
    return quiet(TinyConditionalPipeline(unet, TinyDDIMScheduler(clip_sample=False), id2label=NAMES))


@pytest.fixture
def sample(pipe):
    """Returns a function that samples two images as a tensor, always from the same noise."""

    def call(class_labels=None, pipe=pipe, batch_size=2, **arguments):
        defaults = {"num_inference_steps": 4, "output_type": "pt", "generator": image_generators(0, batch_size)}
        return pipe(class_labels, batch_size, **(defaults | arguments)).images

    return call


def count_passes(pipe, **arguments) -> list[int]:
    """Returns the batch size of each pass of the network."""
    sizes = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    pipe(**arguments)
    handle.remove()
    return sizes


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "labels",
    [
        [2, 0],
        (2, 0),
        ["frog", "cat"],
        ["frog", 0],
        ["2", "0"],
        torch.tensor([2, 0]),
        np.array([2, 0]),
        np.array(["frog", "cat"]),
        np.array(["frog", "cat"], dtype=object),
        [[2], [0]],
        torch.tensor([[0, 0, 1], [1, 0, 0]]),  # one-hot rows of the three classes
        np.array([[0, 0, 1, 0], [1, 0, 0, 0]], dtype=np.uint8),  # and with the null class
        torch.tensor([[False, False, True], [True, False, False]]),
        torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0]]),
        np.array([[0.0, 0, 1, 0], [1, 0, 0, 0]]),
        [[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_class_is_an_id_a_name_or_a_row_of_weights(sample, labels, guidance_scale):
    assert same(sample(labels, guidance_scale=guidance_scale), sample([2, 0], guidance_scale=guidance_scale))


def test_one_label_applies_to_all_images(sample):
    assert same(sample("dog"), sample(["dog", "dog"]))
    assert same(sample(1), sample([1, 1]))
    assert same(sample(torch.tensor(1)), sample([1, 1]))
    assert same(sample(torch.tensor([0.0, 1, 0, 0])), sample([1, 1]))


def test_labels_determine_the_batch_size(pipe):
    assert len(pipe(["cat", "dog", "frog"], num_inference_steps=1).images) == 3
    assert len(pipe("cat", num_inference_steps=1).images) == 1
    assert len(pipe("cat", 2, num_inference_steps=1).images) == 2


def test_classes_differ(sample):
    images = sample(["cat", "dog"], generator=image_generators(0, 1) + image_generators(0, 1))
    assert not same(images[0], images[1])


def test_a_list_of_generators_makes_an_image_independent_of_its_batch(pipe):
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "pt"}
    batch = pipe([i % 3 for i in range(16)], generator=image_generators(0, 16), **arguments).images
    for i in (0, 5, 15):
        alone = pipe(i % 3, generator=image_generators(0, 1, first=i), **arguments).images
        torch.testing.assert_close(alone[0], batch[i], atol=1e-4, rtol=0)


def test_mixing_weights_interpolate_between_classes(pipe):
    x_t, timestep = torch.randn(1, 1, 8, 8), torch.tensor(500)
    half = pipe._predict(x_t, timestep, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    ends = [pipe._predict(x_t, timestep, torch.tensor([label])) for label in (0, 1)]
    assert not same(half, ends[0]) and not same(half, ends[1])
    assert not any(hooks for hooks in (m._forward_hooks for m in pipe.unet.modules()))


# -------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 1.0, 4.0])
def test_guidance_is_linear_in_both_predictions(pipe, w):
    x_t, timestep = torch.randn(2, 1, 8, 8), torch.tensor(500)
    labels, null = torch.tensor([0, 2]), torch.tensor([3, 3])
    pipe._num_timesteps = 1
    guided = pipe._guided_predict(labels, w, (0.0, 1.0))(x_t, timestep, 0)
    eps_c, eps_null = (pipe.unet(x_t, timestep, class_labels=rows).sample for rows in (labels, null))
    torch.testing.assert_close(guided, w * eps_c + (1 - w) * eps_null, atol=1e-5, rtol=0)


def test_guidance_doubles_the_batch_and_no_guidance_does_not(pipe):
    arguments = {"num_inference_steps": 2, "batch_size": 3}
    assert count_passes(pipe, class_labels="cat", guidance_scale=1.0, **arguments) == [3, 3]
    assert count_passes(pipe, class_labels="cat", guidance_scale=0.0, **arguments) == [3, 3]
    assert count_passes(pipe, class_labels="cat", guidance_scale=2.0, **arguments) == [6, 6]


def test_a_guidance_scale_of_0_is_unconditional(sample):
    assert same(sample(guidance_scale=0.0), sample("dog", guidance_scale=0.0))
    assert same(sample(guidance_scale=0.0), sample(torch.tensor([0.0, 0, 0, 1])))


def test_steps_outside_the_interval_are_not_guided(pipe, sample):
    plain, guided = sample("cat"), sample("cat", guidance_scale=3.0)
    assert same(sample("cat", guidance_scale=3.0, guidance_interval=(0.0, 1.0)), guided)
    assert same(sample("cat", guidance_scale=3.0, guidance_interval=(0.5, 0.5)), plain)
    arguments = {"class_labels": "cat", "guidance_scale": 3.0, "num_inference_steps": 10}
    assert count_passes(pipe, guidance_interval=(0.2, 0.5), **arguments) == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("arguments", [{}, {"dynamic_thresholding": 0.9}], ids=["clipped", "thresholded"])
def test_the_noise_is_recomputed_from_the_clipped_x_0(pipe, arguments):
    """As in Dhariwal & Nichol's and Imagen's samplers."""
    pipe.scheduler = TinyDDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True, sample_max_value=2.0)
    latents = 5 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"latents": latents, "eta": 0.0, "output_type": "latent", "num_inference_steps": 5}
    options["return_intermediates"] = 5
    for w in (8.0, 1.0):
        _, step, following, *_ = pipe(["cat", "frog"], guidance_scale=w, **options, **arguments).intermediates
        x_0 = step.pred_original_sample
        signal, signal_prev = (pipe.scheduler.alphas_cumprod[int(s.timestep)] for s in (step, following))
        noise = (step.sample - signal.sqrt() * x_0) / (1 - signal).sqrt()
        expected = signal_prev.sqrt() * x_0 + (1 - signal_prev).sqrt() * noise
        torch.testing.assert_close(following.sample, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("saved", [True, False])
def test_x_0_is_clipped_under_guidance_unless_the_call_says_otherwise(pipe, saved):
    pipe.scheduler = TinyDDIMScheduler.from_config(pipe.scheduler.config, clip_sample=saved)
    options = {"output_type": "latent", "num_inference_steps": 3, "return_intermediates": 3}
    latents = 5 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for w, clip_sample, clipped in ((1.0, None, saved), (9.0, None, True), (9.0, False, False), (1.0, True, True)):
        call = {"guidance_scale": w, "latents": latents, "clip_sample": clip_sample}
        x_0 = pipe(["cat", "frog"], **call, **options).intermediates[0].pred_original_sample
        assert (x_0.abs().max() <= 1) == clipped
    assert pipe.scheduler.config.clip_sample == saved


def test_a_callback_can_change_the_guidance_scale(pipe):
    def increase(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    pipe("cat", guidance_scale=2.0, num_inference_steps=3, callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_under_guidance_a_learned_variance_is_conditional(make_unet, quiet):
    unet, scheduler = make_unet(classes=3, learned=True), TinyDDPMScheduler(variance_type="learned_range")
    pipe = quiet(TinyConditionalPipeline(unet, scheduler, id2label=NAMES))
    x_t, timestep = torch.randn(2, 1, 8, 8), torch.tensor(500)
    pipe._num_timesteps = 1
    guided = pipe._guided_predict(torch.tensor([0, 1]), 3.0, (0.0, 1.0))(x_t, timestep, 0)
    conditional, null = (pipe._predict(x_t, timestep, torch.tensor(rows)) for rows in ([0, 1], [3, 3]))
    torch.testing.assert_close(guided[:, :1], 3 * conditional[:, :1] - 2 * null[:, :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(guided[:, 1:], conditional[:, 1:], atol=1e-5, rtol=0)
    assert len(pipe("cat", guidance_scale=3.0, num_inference_steps=2).images) == 1


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_stock_solvers_can_be_guided(pipe, sample, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert not same(sample("cat", guidance_scale=4.0), sample("cat"))


# ---------------------------------------------------------------------------------------------------- thresholding


@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, TinyDDPMScheduler, DPMSolverMultistepScheduler])
def test_thresholding_by_argument_is_the_schedulers_own(pipe, sample, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    by_argument = sample("cat", guidance_scale=5.0, dynamic_thresholding=0.9)
    assert not pipe.scheduler.config.thresholding
    pipe.scheduler = scheduler.from_config(
        pipe.scheduler.config, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e6
    )
    assert same(by_argument, sample("cat", guidance_scale=5.0))


def test_thresholding_with_a_stock_scheduler_is_more_than_clipping(pipe, sample):
    clipped = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True, sample_max_value=1.0)
    pipe.scheduler = clipped
    arguments = {"guidance_scale": 9.0, "num_inference_steps": 2}
    assert not same(sample("cat", dynamic_thresholding=0.5, **arguments), sample("cat", **arguments))


def test_thresholding_keeps_high_guidance_finite(pipe):
    options = {"num_inference_steps": 3, "output_type": "pt", "return_intermediates": 3}
    output = pipe("cat", 2, guidance_scale=20.0, dynamic_thresholding=0.9, **options)
    assert all(torch.isfinite(i.pred_original_sample).all() for i in output.intermediates)
    assert output.intermediates[-1].pred_original_sample.shape == (2, 1, 8, 8)


# ------------------------------------------------------------------------------------- class names and the null class


def test_the_null_class_is_the_last_row_by_default(make_unet):
    stock, ours = make_unet(classes=3), make_unet(stock=False, classes=3)
    for unet in (stock, ours):
        assert TinyConditionalPipeline(unet, TinyDDIMScheduler()).config.null_class_id == 3
    assert TinyConditionalPipeline(stock, TinyDDIMScheduler(), null_class_id=0).config.null_class_id == 0
    assert TinyConditionalPipeline(stock, TinyDDIMScheduler(), null_class_id=None).config.null_class_id is None
    assert TinyConditionalPipeline(make_unet(), TinyDDIMScheduler()).config.null_class_id is None


def test_without_a_null_class_every_row_is_a_class(make_unet, quiet):
    pipe = quiet(TinyConditionalPipeline(make_unet(classes=3), TinyDDIMScheduler(), null_class_id=None))
    assert len(pipe([0, 3], num_inference_steps=1).images) == 2
    for w in (0.0, 2.0):
        with pytest.raises(ValueError, match="guidance_scale.*must be 1.*without a null class"):
            pipe([0, 3], guidance_scale=w)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"null_class_id": 4}, "null_class_id.*4 rows, 0 to 3.*got 4"),
        ({"id2label": {3: "cat"}}, "id2label.*3.*null class is 3"),
        ({"id2label": {0: "cat", 1: "cat"}}, "one name"),
    ],
)
def test_class_names_that_do_not_match_the_network_are_refused(make_unet, arguments, message):
    with pytest.raises(ValueError, match=message):
        TinyConditionalPipeline(make_unet(classes=3), TinyDDIMScheduler(), **arguments)


# --------------------------------------------------------------------------------------------------- invalid input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs `class_labels`.*cat.*dog.*frog.*guidance_scale=0"),
        ({"class_labels": "dgo"}, "Unknown class 'dgo'.*0: cat, 1: dog, 2: frog.*Did you mean 'dog'"),
        ({"class_labels": 7}, r"Unknown class id \[7\].*0: cat, 1: dog, 2: frog"),
        ({"class_labels": 3}, r"Unknown class id \[3\]"),
        ({"class_labels": -1}, r"Unknown class id \[-1\]"),
        ({"class_labels": []}, "class_labels.*is empty"),
        ({"class_labels": torch.tensor([[0, 1, 1], [1, 0, 0]])}, r"one-hot rows of shape \(B, 3\), got \(2, 3\)"),
        ({"class_labels": torch.tensor([[0, 1], [1, 0]])}, r"one-hot rows of shape \(B, 3\), got \(2, 2\)"),
        ({"class_labels": [0, 1, 2], "batch_size": 2}, "each of 2 images, got 3"),
        ({"class_labels": 0, "batch_size": -1}, "batch_size.*got -1"),
        ({"class_labels": torch.ones(2, 3)}, r"weights.*\(B, 4\), got \(2, 3\)"),
        ({"class_labels": torch.tensor([0.0, 1, float("nan"), 0])}, "finite"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "guidance_scale.*nan"),
        ({"class_labels": 0, "guidance_scale": float("inf")}, "guidance_scale.*inf"),
        ({"class_labels": 0, "guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"class_labels": 0, "guidance_interval": (0.0, 1.5)}, "guidance_interval"),
        ({"class_labels": 0, "dynamic_thresholding": 0.0}, r"\(0, 1\].*got 0.0"),
        ({"class_labels": 0, "dynamic_thresholding": 1.1}, r"\(0, 1\].*got 1.1"),
        ({"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps"),
        ({"class_labels": [0, 1], "generator": image_generators(0, 3)}, "got 3 for a batch of 2"),
        ({"class_labels": [0, 1], "latents": torch.zeros(1, 1, 8, 8)}, "latents"),
    ],
)
def test_invalid_input_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**arguments)
    assert "\n" not in str(error.value)


def test_a_network_without_classes_takes_no_labels(make_unet, quiet):
    pipe = quiet(TinyConditionalPipeline(make_unet(), TinyDDIMScheduler()))
    with pytest.raises(ValueError, match="no classes"):
        pipe(0)
    assert len(pipe(num_inference_steps=1).images) == 1


def test_a_scheduler_without_thresholding_is_named(pipe):
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no dynamic thresholding"):
        pipe(0, dynamic_thresholding=0.9)
