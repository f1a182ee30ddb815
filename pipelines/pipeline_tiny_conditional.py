"""
`TinyConditionalPipeline`: class-conditional sampling with classifier-free guidance.

This file travels with checkpoints: it imports nothing but torch, diffusers and its siblings.
"""

from collections.abc import Callable
from typing import Optional

import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .pipeline_tiny import TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels


class TinyConditionalPipeline(ClassConditioningMixin, TinyPipeline):
    r"""
    Class-conditional generation of small images with
    [classifier-free guidance](https://huggingface.co/papers/2207.12598).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, called as `unet(sample, timestep, class_labels=labels).sample`: a `TinyUNet2DModel` with
            `num_class_embeds` = K, or a stock [`UNet2DModel`] with K + 1.
        scheduler ([`SchedulerMixin`]):
            The scheduler that denoises with it: a `TinyDDIMScheduler`, a `TinyDDPMScheduler` or any stock one.
        id2label (`dict[int, str]`, *optional*):
            The names of the classes, by id.
        null_class_id (`int`, *optional*, defaults to -1):
            The network's null class, by default the last row of its table; None where it was trained without one, so
            that only `guidance_scale=1` is possible.
        class_dropout_prob (`float`, *optional*):
            The share of the labels that the network was trained without, for its null class to learn from; with 0
            guidance warns, as that class was never trained. None where it is not known.

    Example:

    ```py
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-conditional-checkpoint")
    >>> images = pipe(["cat", "frog"], guidance_scale=3.0).images
    ```
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        id2label: Optional[dict] = None,
        null_class_id: Optional[int] = -1,
        class_dropout_prob: Optional[float] = None,
    ):
        super().__init__(unet, scheduler)
        self._register_classes(id2label, null_class_id, class_dropout_prob)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        dynamic_thresholding: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | None = None,
        return_intermediates: int | None = None,
    ) -> TinyPipelineOutput | tuple:
        r"""
        Samples an image of each class that is given.

        Args:
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Floats, `(B, rows)`, are weights of
                the rows of the network's table of classes, null class included: a walk between classes is a line
                between two such rows of weights. Needed unless `guidance_scale` is 0.
            batch_size (`int`, *optional*):
                The number of images: by default one for each label.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in eps = w eps(x, c) + (1 - w) eps(x, null): 1 is plain conditional sampling and 0 unconditional,
                both in one pass of the network a step; above 1, classes are exaggerated.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The [share of the steps](https://huggingface.co/papers/2404.07724) that are guided, from the noise's end
                at 0 to the image's at 1; the others are sampled with w = 1.
            dynamic_thresholding (`float`, *optional*):
                The percentile p in (0, 1], such as 0.995, of [dynamic thresholding](
                https://huggingface.co/papers/2205.11487), section 2.3, in place of what the scheduler does. It keeps
                high guidance from saturating.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one for each image, which is then independent of its batch.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of denoising steps, from 1 to the scheduler's `num_train_timesteps`.
            eta (`float`, *optional*, defaults to 0.0):
                η of [DDIM](https://huggingface.co/papers/2010.02502), eq. 16, in [0, 1]. For schedulers that know it;
                ignored by others.
            latents (`torch.Tensor` of shape `(batch_size, C, H, W)`, *optional*):
                The noise to begin with, drawn from N(0, I) where it is not given.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`L` or `RGB`), `"np"` (`(B, H, W, C)` in [0, 1]), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (the denoised latents as they are, about [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)` after each step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                The tensors that `callback_kwargs` holds.
            timesteps (`list[int]`, *optional*):
                The timesteps to visit, decreasing, in place of `num_inference_steps`.
            return_intermediates (`int`, *optional*):
                K evenly spaced states and x_0 predictions are returned too.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: the images, and the intermediates where they were asked for.

        Raises:
            `ValueError`: for an argument outside what is said above, an unknown class among them; for samples that are
            not finite.
        """
        self._check_inputs(
            1 if batch_size is None else batch_size,
            num_inference_steps,
            timesteps,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
            return_intermediates,
        )
        self._check_guidance(guidance_scale, guidance_interval)
        scheduler = self._thresholding_scheduler(dynamic_thresholding)
        labels, batch_size = self._encode_class_labels(class_labels, batch_size, guidance_scale)
        latents = self._prepare_latents(batch_size, generator, latents)
        self._set_timesteps(scheduler, num_inference_steps, timesteps)
        latents, intermediates = self._denoise(
            latents,
            self._guided(labels, guidance_scale, guidance_interval),
            scheduler,
            eta=eta,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            return_intermediates=return_intermediates,
        )
        return self._output(latents, intermediates, output_type, return_dict)

    def _thresholding_scheduler(self, percentile: float | None) -> SchedulerMixin:
        """The pipeline's scheduler, or one like it that thresholds at the percentile."""
        if percentile is None:
            return self.scheduler
        if not 0 < percentile <= 1:
            raise ValueError(f"`dynamic_thresholding` is a percentile in (0, 1], such as 0.995, got {percentile}.")
        config = self.scheduler.config
        if "thresholding" not in config:
            raise ValueError(
                f"{type(self.scheduler).__name__} has no dynamic thresholding: use `TinyDDIMScheduler`, "
                "`TinyDDPMScheduler` or `DPMSolverMultistepScheduler`."
            )
        # Stock schedulers bound the threshold by 1 unless told otherwise, which leaves nothing but clipping.
        bound = {"sample_max_value": 1e6} if config.sample_max_value == 1 else {}
        return type(self.scheduler).from_config(
            config, thresholding=True, dynamic_thresholding_ratio=percentile, **bound
        )


# `custom_pipeline=` loads the one pipeline class that it finds in a file.
del TinyPipeline
