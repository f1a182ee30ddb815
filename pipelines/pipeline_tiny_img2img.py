"""`TinyImg2ImgPipeline`: variations of given images, and edits that keep their layout."""

from typing import Any

import torch

from .pipeline_tiny import Generators, Images, StepCallback, TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin
from .pipeline_tiny_editing import EditingMixin


class TinyImg2ImgPipeline(ClassConditioningMixin, ConditionsMixin, EditingMixin, TinyPipeline):
    r"""
    Pipeline for image-to-image generation with a diffusion model of small images
    ([SDEdit](https://huggingface.co/papers/2108.01073)): noise is added to an image and removed again. It can also
    invert an image and denoise it under another class or guidance, which keeps the layout.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, with the call of [`UNet2DModel`].
        scheduler ([`SchedulerMixin`]):
            A scheduler to denoise the latents with `unet`: `TinyDDIMScheduler`, `TinyDDPMScheduler` or any stock one
            except [`PNDMScheduler`]. Inversion takes a [`DDIMScheduler`], or Euler's steps of a
            [`FlowMatchEulerDiscreteScheduler`] or [`EDMEulerScheduler`].
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
    >>> from tiny_diffusers import TinyImg2ImgPipeline

    >>> pipe = TinyImg2ImgPipeline.from_pretrained("path/or/hub-id")
    >>> variations = pipe(load_image("digit.png"), strength=0.6, num_images=8).images
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        strength: float = 0.6,
        num_images: int = 1,
        inversion: bool = False,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        source_class_labels: ClassLabels | None = None,
        generator: Generators | None = None,
        num_inference_steps: int = 50,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | list[float] | None = None,
        clip_sample: bool | None = None,
        return_intermediates: int | None = None,
        conditions: Conditions | None = None,
        source_conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples images that resemble given ones.

        Args:
            image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`):
                The images, B of them. PIL images are converted and resized as the network needs them. Arrays
                `(B, H, W, C)` and tensors `(B, C, H, W)` must lie in [0, 1].
            strength (`float`, *optional*, defaults to 0.6):
                How much of the image is given up, in [0, 1]: the share of the steps that are run, the last ones. At 0
                the image itself is returned, at 1 nothing of it is left: the samples start from pure noise.
            num_images (`int`, *optional*, defaults to 1):
                The number of samples for each image.
            inversion (`bool`, *optional*, defaults to `False`):
                Whether to find the noise that the image comes from, by running a deterministic scheduler backwards,
                instead of drawing it. Without another class or guidance this reproduces the image.
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Required for a network with classes
                unless `guidance_scale` is 0.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in eps = w eps(x, c) + (1 - w) eps(x, null).
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The share of the whole schedule's steps that are guided, from 0 at the noise to 1 at the image.
            source_class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes of the given images, for the inversion, which is not guided. By default it is
                unconditional.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per sample.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of steps from pure noise, of which `strength` are run, and as many for the inversion.
            eta (`float`, *optional*):
                The fresh noise in each step: η of DDIM, in [0, 1], or of flow and EDM, at least 0. Defaults to 1, to 1.5
                with `multistep`, and to 0 with `inversion` or `heun`. Other schedulers ignore it.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1] or the `value_range`), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (the denoised latents, unclipped, about [-1, 1]).
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
                The number K of evenly spaced states and x_0 predictions to return as well.
            conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, such as `{"age": 30, "smiling": 1}`, with a value for
                all images or a list of one for each; or values of shape `(B, D)`, in the order of
                `condition_statistics`. Required for a network with conditions unless `guidance_scale` is 0.
            source_conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions of the given images, for the inversion.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The samples, `num_images` of the first image, then of the second, ..., and
            the intermediates if `return_intermediates` is given.

        Raises:
            `ValueError`: If an argument is not as described above, or the samples are not finite.
        """
        if eta is None:
            eta = 0.0 if inversion else self._default_eta
        self._check_output(1, output_type, return_intermediates)
        self._check_num_images(num_images)
        self._check_steps(num_inference_steps, timesteps, eta)
        on_step_end = self._wrap_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_guidance(guidance_scale, guidance_interval)
        image = self._preprocess(image, None)
        num_given, batch_size = len(image), len(image) * num_images
        self._check_generator(generator, batch_size)
        labels, _ = self._encode_class_labels(class_labels, num_given, guidance_scale)
        conditions = self._encode_conditions(conditions, guidance_scale, num_given)
        source = self._encode_source(source_class_labels, source_conditions, num_given, inversion)
        scheduler = self._clipping_scheduler(self._clips(clip_sample, guidance_scale, guidance_interval))
        if inversion:
            scheduler = self._single_step(scheduler)
        scheduler = self._set_timesteps(scheduler, num_inference_steps, timesteps)
        begin = self._first_step(strength, scheduler)

        # 1. get the noisy images that denoising starts from
        if begin == len(scheduler.timesteps):
            latents = image.repeat_interleave(num_images, dim=0)
        elif inversion:
            inverted = self._clipping_scheduler(clip_sample)  # guidance clips, and the inversion has none
            inverted = self._set_timesteps(self._single_step(inverted), num_inference_steps, timesteps)
            labels_of_source, conditions_of_source = source
            predict = self._guided_predict(labels_of_source, 1.0, (0.0, 1.0), conditions=conditions_of_source)
            latents = self._invert(image, predict, inverted, begin)
            latents = latents.repeat_interleave(num_images, dim=0)
        else:
            latents = self._draw((batch_size, *image.shape[1:]), generator)
            if begin:
                image = image.repeat_interleave(num_images, dim=0)
                latents = self._add_noise(image, latents, scheduler, begin)

        # 2. denoise them
        labels, conditions = self._repeat(num_images, labels, conditions)
        predict = self._guided_predict(labels, guidance_scale, guidance_interval, conditions=conditions)
        latents, intermediates = self._denoise(
            latents, predict, scheduler, eta, generator, on_step_end, return_intermediates, begin
        )
        return self._postprocess(latents, intermediates, output_type, return_dict)

    def _encode_source(
        self,
        source_class_labels: ClassLabels | None,
        source_conditions: Conditions | None,
        num_given: int,
        inversion: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the labels and conditions that the given images are inverted by: null ones if neither is given."""
        given = {"source_class_labels": source_class_labels, "source_conditions": source_conditions}
        given = [name for name, values in given.items() if values is not None]
        if not inversion:
            if given:
                raise ValueError(f"`{given[0]}` are for the inversion: give `inversion=True`, or leave them out.")
            return None, None
        taken = {"source_class_labels": self._num_rows, "source_conditions": self._condition_statistics}
        missing = [name for name, is_taken in taken.items() if is_taken and name not in given]
        if given and missing:
            raise ValueError(
                f"The inversion needs `{missing[0]}` beside `{given[0]}`: give both, or neither to invert without them."
            )
        guidance_scale = None if given or not self._has_condition else 0.0
        lacks_null = self._num_rows and self._null_class_id is None
        if guidance_scale == 0 and (lacks_null or self.config.class_dropout_prob == 0):
            raise ValueError(
                "The network has no trained null class to invert images with: give their classes as "
                "`source_class_labels`, and their conditions as `source_conditions`."
            )
        labels, _ = self._encode_class_labels(source_class_labels, num_given, guidance_scale)
        conditions = self._encode_conditions(source_conditions, guidance_scale, num_given)
        return labels, conditions


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
