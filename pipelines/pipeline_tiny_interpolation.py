"""`TinyInterpolationPipeline`: interpolation between two seeds, latents, images, classes or conditions."""

import inspect
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.utils import logging

from .pipeline_tiny import Generators, Images, StepCallback, TinyPipeline, TinyPipelineOutput, slerp
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin
from .pipeline_tiny_editing import EditingMixin


logger = logging.get_logger(__name__)


class TinyInterpolationPipeline(ClassConditioningMixin, ConditionsMixin, EditingMixin, TinyPipeline):
    r"""
    Pipeline for the interpolation between two samples of a diffusion model. Its ends are two seeds, two latents or two
    images, and it can interpolate between two classes, or two values of conditions, at the same time.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, with the call of [`UNet2DModel`].
        scheduler ([`SchedulerMixin`]):
            A scheduler to denoise the latents with `unet`. The path is smooth only if the scheduler is deterministic,
            such as `TinyDDIMScheduler` with `eta=0`. Images are inverted only by a [`DDIMScheduler`], or by Euler's
            steps of a [`FlowMatchEulerDiscreteScheduler`] or [`EDMEulerScheduler`], stock or not.
        id2label (`dict[int, str]`, *optional*):
            The class names by id.
        null_class_id (`int`, *optional*, defaults to -1):
            The row of the network's null class, by default the last one, or None without a null class.
        class_dropout_prob (`float`, *optional*):
            The share of labels that training replaced by the null class, or None if unknown. With 0, guidance warns.
        value_range (`dict[str, float]`, *optional*):
            The `"low"` and `"high"` value of images that are not of 8 bits. Arrays are given and returned in it.
        condition_statistics (`dict`, *optional*):
            The names, means, deviations, lows and highs of the conditions that the network takes, a list each. None for a
            network without conditions.
        guidance_model ([`ModelMixin`], *optional*):
            A weaker version of `unet` that `guidance_scale` then leads away from, instead of the network without its
            condition. See [`TinyPipeline`].

    Example:

    ```py
    >>> from diffusers.utils import export_to_gif
    >>> from tiny_diffusers import TinyInterpolationPipeline

    >>> pipe = TinyInterpolationPipeline.from_pretrained("path/or/hub-id")
    >>> frames = pipe(seeds=(0, 1), num_frames=24).images
    >>> export_to_gif(frames, "walk.gif")
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        seeds: tuple[int, int] | None = None,
        latents: torch.Tensor | None = None,
        images: Images | None = None,
        num_frames: int = 16,
        interpolation: str = "slerp",
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generators | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | list[float] | None = None,
        clip_sample: bool | None = None,
        return_intermediates: int | None = None,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples the frames of an interpolation, in order. The first and the last frame are the two samples themselves.

        Args:
            seeds (`tuple[int, int]`, *optional*):
                The two seeds, each used as `generator=[torch.Generator().manual_seed(seed)]`. Exactly one of `seeds`,
                `latents` and `images` must be given.
            latents (`torch.Tensor` of shape `(2, C, H, W)`, *optional*):
                The two latents.
            images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, *optional*):
                The two images, which are inverted by [`~TinyInterpolationPipeline.invert`]. Arrays `(2, H, W, C)` and
                tensors `(2, C, H, W)` must lie in [0, 1].
            num_frames (`int`, *optional*, defaults to 16):
                The number of frames, both ends included: at least 2.
            interpolation (`str`, *optional*, defaults to `"slerp"`):
                `"slerp"` follows the sphere near which Gaussian noise lies, as in eq. 67 of
                [DDIM](https://huggingface.co/papers/2010.02502). `"linear"` cuts through it, which makes the frames in
                between smoother than the model's samples.
            class_labels (`int`, `str`, a list of two, `np.ndarray` or `torch.Tensor`, *optional*):
                One class, or two classes to interpolate between: ids, names or weights of the rows of the network's
                class embedding. Required for a network with classes unless `guidance_scale` is 0.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in eps = w eps(x, c) + (1 - w) eps(x, null).
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The share of the steps that are guided, from 0 at the noise to 1 at the image.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes a scheduler that adds noise deterministic. A list has one generator per frame.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of denoising steps, and of inversion steps.
            eta (`float`, *optional*, defaults to 0.0):
                η of DDIM, in [0, 1], or of flow and EDM, at least 0. Above 0, the path is not smooth.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(num_frames, H, W, C)` in [0, 1] or the `value_range`), `"pt"` (`(num_frames, C, H, W)`
                in [0, 1]) or `"latent"` (the denoised latents, unclipped, about [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)` after each step. It returns
                `callback_kwargs`, whose tensors it may change.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                The tensors in `callback_kwargs`, from the pipeline's `_callback_tensor_inputs`.
            timesteps (`list[int]` or `list[float]`, *optional*):
                Custom timesteps in strictly decreasing order, instead of `num_inference_steps`: integers for a beta
                schedule, and floats for rectified flow and EDM.
            clip_sample (`bool`, *optional*):
                Whether to clip the predicted x_0 to the range of images. Not all schedulers support this. Defaults to the
                scheduler's setting, and to True under guidance.
            return_intermediates (`int`, *optional*):
                The number K of evenly spaced states and x_0 predictions to return as well. They include the last step
                and, if K > 1, the first.
            conditions (`dict[str, float]`, a list of two, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, with a value or a list of two to interpolate between; or
                values of shape `(1, D)` or `(2, D)`, in the order of `condition_statistics`. Required for a network with
                conditions unless `guidance_scale` is 0.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The frames as `images`, ready for `diffusers.utils.export_to_gif`, and
            the intermediates if `return_intermediates` is given.

        Raises:
            `ValueError`: If an argument is not as described above, `images` are given with a scheduler that can't
                invert them, or the samples are not finite.
        """
        self._check_output(2, output_type, return_intermediates)
        self._check_steps(num_inference_steps, timesteps, eta)
        on_step_end = self._wrap_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_guidance(guidance_scale, guidance_interval)
        self._check_num_frames(num_frames)
        self._check_generator(generator, num_frames)
        if interpolation not in ("slerp", "linear"):
            raise ValueError(f"`interpolation` must be 'slerp' or 'linear', got {interpolation!r}.")
        if sum(given is not None for given in (seeds, latents, images)) != 1:
            raise ValueError("Give exactly one of `seeds`, `latents` and `images`, for the two ends.")
        labels, _ = self._encode_class_labels(class_labels, 2, guidance_scale)
        conditions = self._encode_conditions(conditions, guidance_scale, 2)
        scheduler = self._clipping_scheduler(self._clips(clip_sample, guidance_scale, guidance_interval))
        if images is not None:
            scheduler = self._single_step(scheduler)
        scheduler = self._set_timesteps(scheduler, num_inference_steps, timesteps)

        # 1. get the latents of the two ends, (2, C, H, W)
        if images is not None:
            predict = self._guided_predict(labels, guidance_scale, guidance_interval, conditions=conditions)
            latents = self._invert(self._preprocess(images, 2), predict, scheduler)
        else:
            latents = self._prepare_ends(seeds, latents)

        # 2. interpolate between them
        share = torch.linspace(0, 1, num_frames, dtype=latents.dtype, device=latents.device)
        frames = (slerp if interpolation == "slerp" else torch.lerp)(latents[:1], latents[1:], share.view(-1, 1, 1, 1))
        labels = self._interpolate_labels(labels, share[:, None])
        conditions = self._interpolate_conditions(conditions, share[:, None])

        # 3. denoise the frames
        if _adds_noise(self.scheduler, eta):
            logger.warning(
                f"{type(self.scheduler).__name__} with eta={eta} adds noise at each step: the path won't be smooth. "
                f"Use `{self._own_scheduler}` with `eta=0`."
            )
        predict = self._guided_predict(labels, guidance_scale, guidance_interval, conditions=conditions)
        frames, intermediates = self._denoise(
            frames, predict, scheduler, eta, generator, on_step_end, return_intermediates
        )
        return self._postprocess(frames, intermediates, output_type, return_dict)

    @torch.no_grad()
    def invert(
        self,
        images: Images,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        timesteps: list[int] | list[float] | None = None,
        clip_sample: bool | None = None,
        conditions: Conditions | None = None,
    ) -> torch.Tensor:
        r"""
        Finds the latents of images by running DDIM, or the ODE of flow or EDM, backwards, with two passes of the network
        per step. Sampling from them with the same arguments and `eta=0` reproduces the images: the more steps, the more
        closely.

        A scheduler with `clip_sample` or `thresholding` discards a part of x_0, which can be recovered only as far as
        the image shows it. Under guidance above 1 this part is large: give `clip_sample=False`.

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
                The images, resized to the network's size. Arrays `(B, H, W, C)` and tensors `(B, C, H, W)` must lie in
                [0, 1].
            class_labels, guidance_scale, guidance_interval, num_inference_steps, timesteps, clip_sample, conditions:
                As for sampling.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: The latents, near N(0, I) for images like the model's samples.

        Raises:
            `ValueError`: If the scheduler can't invert images, or an argument is not as described above.
        """
        self._check_steps(num_inference_steps, timesteps, 0.0)
        self._check_guidance(guidance_scale, guidance_interval)
        sample = self._preprocess(images, None)
        labels, _ = self._encode_class_labels(class_labels, len(sample), guidance_scale)
        conditions = self._encode_conditions(conditions, guidance_scale, len(sample))
        scheduler = self._clipping_scheduler(self._clips(clip_sample, guidance_scale, guidance_interval))
        scheduler = self._set_timesteps(self._single_step(scheduler), num_inference_steps, timesteps)
        predict = self._guided_predict(labels, guidance_scale, guidance_interval, conditions=conditions)
        latents = self._invert(sample, predict, scheduler)
        self.maybe_free_model_hooks()
        return latents


def _adds_noise(scheduler: SchedulerMixin, eta: float) -> bool:
    name = type(scheduler).__name__
    return (
        isinstance(scheduler, DDPMScheduler)
        or "Ancestral" in name
        or "SDE" in name
        or scheduler.config.get("algorithm_type", "").startswith("sde-")
        or scheduler.config.get("stochastic_sampling", False)
        or (eta > 0 and "eta" in inspect.signature(scheduler.step).parameters)
    )


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
