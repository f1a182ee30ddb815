"""`TinyInpaintPipeline`: fills a hole in given images."""

from typing import Any

import torch

from .pipeline_tiny import Generators, Images, StepCallback, TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin
from .pipeline_tiny_editing import EditingMixin


class TinyInpaintPipeline(ClassConditioningMixin, ConditionsMixin, EditingMixin, TinyPipeline):
    r"""
    Pipeline for inpainting with a diffusion model of small images that was not trained for it, by
    [RePaint](https://huggingface.co/papers/2201.09865): at each noise level the known pixels are replaced by noisy ones
    of the given image, and jumping back to higher levels brings the two parts into harmony.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, with the call of [`UNet2DModel`].
        scheduler ([`SchedulerMixin`]):
            A scheduler that can step back and forth: DDIM, DDPM, `TinyFlowMatchScheduler` or `TinyEDMScheduler`, the
            last two with Euler's steps.
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
    >>> from diffusers.utils import load_image
    >>> from tiny_diffusers import TinyInpaintPipeline

    >>> pipe = TinyInpaintPipeline.from_pretrained("path/or/hub-id")
    >>> images = pipe(load_image("digit.png"), load_image("mask.png"), num_images=8).images
    ```
    """

    _callback_tensor_inputs = ["latents"]

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        mask_image: Images,
        num_images: int = 1,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        jump_length: int = 5,
        jump_n_sample: int = 5,
        generator: Generators | None = None,
        num_inference_steps: int = 50,
        eta: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | list[float] | None = None,
        clip_sample: bool | None = None,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples what a mask hides of images.

        Args:
            image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`):
                The images, B of them. PIL images are converted and resized as the network needs them. Arrays
                `(B, H, W, C)` and tensors `(B, C, H, W)` must lie in [0, 1].
            mask_image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`):
                The masks, of the size of the images, one for all or one for each: white (from 0.5 on) is painted, black
                is kept. Arrays `(H, W)` or `(B, H, W)` and tensors `(H, W)` or `(B, 1, H, W)` must lie in [0, 1].
            num_images (`int`, *optional*, defaults to 1):
                The number of samples for each image.
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Required for a network with classes
                unless `guidance_scale` is 0.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in eps = w eps(x, c) + (1 - w) eps(x, null).
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The share of the steps that are guided, from 0 at the noise to 1 at the image.
            jump_length (`int`, *optional*, defaults to 5):
                The number of steps after which sampling jumps back to where they began.
            jump_n_sample (`int`, *optional*, defaults to 5):
                How often each step is taken. 1 never jumps. The network is evaluated `num_inference_steps` times
                `jump_n_sample` times.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per sample.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of noise levels.
            eta (`float`, *optional*, defaults to 1.0):
                η of DDIM, in [0, 1], or of flow and EDM, at least 0. DDPM ignores it.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1] or the `value_range`), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (unclipped, about [-1, 1]).
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
                Whether to clip the predicted x_0 to the range of images. Defaults to the scheduler's setting, and to True
                under guidance.
            conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, such as `{"age": 30, "smiling": 1}`, with a value for
                all images or a list of one for each; or values of shape `(B, D)`, in the order of
                `condition_statistics`. Required for a network with conditions unless `guidance_scale` is 0.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The samples, `num_images` of the first image, then of the second, .... The
            pixels that the mask keeps are those of the given image.

        Raises:
            `ValueError`: If an argument is not as described above, the scheduler can't step back and forth, or the
                samples are not finite.
        """
        self._check_output(1, output_type)
        self._check_num_images(num_images)
        self._check_steps(num_inference_steps, timesteps, eta)
        on_step_end = self._wrap_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_guidance(guidance_scale, guidance_interval)
        hidden = self._preprocess_mask(mask_image, image)
        image = self._preprocess(image, None)
        if len(hidden) not in (1, len(image)):
            raise ValueError(f"Give one `mask_image`, or one for each of {len(image)} images, got {len(hidden)}.")
        self._check_generator(generator, len(image) * num_images)
        labels, _ = self._encode_class_labels(class_labels, len(image), guidance_scale)
        conditions = self._encode_conditions(conditions, guidance_scale, len(image))
        scheduler = self._clipping_scheduler(self._clips(clip_sample, guidance_scale, guidance_interval))
        scheduler = self._set_timesteps(self._single_step(scheduler), num_inference_steps, timesteps)
        signals, levels = self._noise_levels(scheduler)

        image = image.repeat_interleave(num_images, dim=0)
        hidden = hidden.expand(len(image) // num_images, -1, -1, -1).repeat_interleave(num_images, dim=0)
        labels, conditions = self._repeat(num_images, labels, conditions)
        predict = self._guided_predict(labels, guidance_scale, guidance_interval, conditions=conditions)
        scheduler_step = self._step_function(scheduler, eta, generator, image.shape[1])
        device_timesteps = scheduler.timesteps.to(image.device)

        def take_step(latents: torch.Tensor, step: int) -> torch.Tensor:
            timestep = scheduler.timesteps[step]
            sample = self._scale_model_input(scheduler, latents, timestep)
            model_output = predict(sample.to(self.unet.dtype), device_timesteps[step], step)
            painted = scheduler_step(model_output, timestep, latents).prev_sample
            known = signals[step + 1] * image
            if levels[step + 1] > 0:
                known = known + levels[step + 1] * self._draw(image.shape, generator)
            return torch.where(hidden, painted, known)  # RePaint, eq. 8

        latents = self._resample(scheduler, take_step, jump_length, jump_n_sample, image.shape, generator, on_step_end)
        return self._postprocess(torch.where(hidden, latents, image), None, output_type, return_dict)


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
