"""`TinyLatentPipeline`: diffusion in the latents of an autoencoder."""

from typing import Any, Optional

import torch
from diffusers import AutoencoderKL, SchedulerMixin

from .pipeline_tiny import Generators, Images, StepCallback, TinyPipeline, TinyPipelineOutput, slerp
from .pipeline_tiny_autoencoder import decode_latents, encode_images, latent_shape, latent_statistics
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin


class TinyLatentPipeline(ClassConditioningMixin, ConditionsMixin, TinyPipeline):
    r"""
    Pipeline for the generation of small images by [latent diffusion](https://huggingface.co/papers/2112.10752), with or
    without classes and conditions: the network denoises the latents of an autoencoder, standardized channel by channel,
    and the autoencoder decodes them.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        vae ([`AutoencoderKL`]):
            The autoencoder. Its config's `latents_mean` and `latents_std` are those of the network's training images.
        unet ([`ModelMixin`]):
            The network, called as `unet(sample, timestep).sample` with latents `(B, C, h, w)`, and with `class_labels` and
            `conditions` if it takes some. See `TinyConditionalPipeline`.
        scheduler ([`SchedulerMixin`]):
            A scheduler to denoise the latents with `unet`. It clips nothing here, as latents have no range.
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
            A weaker version of `unet` that `guidance_scale` then leads away from. See [`TinyPipeline`].

    Example:

    ```py
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-latent-checkpoint")
    >>> images = pipe(batch_size=16).images
    >>> latents = pipe(batch_size=16, output_type="latent").images
    ```
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        id2label: Optional[dict] = None,
        null_class_id: Optional[int] = -1,
        class_dropout_prob: Optional[float] = None,
        value_range: Optional[dict] = None,
        condition_statistics: Optional[dict] = None,
        guidance_model: Optional[torch.nn.Module] = None,
    ):
        super().__init__(
            unet,
            scheduler,
            id2label,
            null_class_id,
            class_dropout_prob,
            value_range=value_range,
            condition_statistics=condition_statistics,
            guidance_model=guidance_model,
        )
        self.register_modules(vae=vae)
        if self._latent_shape != latent_shape(vae):
            raise ValueError(
                f"The network denoises latents of shape {self._latent_shape}, but those of the autoencoder have "
                f"{latent_shape(vae)}: they belong to different models."
            )
        latent_statistics(vae)  # refuses those that are damaged

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generators | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | list[float] | None = None,
        return_intermediates: int | None = None,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples a batch of images.

        Args:
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Floats `(B, rows)` are weights of the
                rows of the network's class embedding. Required for a network with classes unless `guidance_scale` is 0.
            batch_size (`int`, *optional*):
                The number of images. Defaults to the number of labels or of conditions, or 1.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in eps = w eps(x, c) + (1 - w) eps(x, null). 1 samples without guidance.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The share of the steps that are guided, from 0 at the noise to 1 at the image.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per image, which makes each image independent of
                its batch.
            num_inference_steps (`int`, *optional*):
                The number of denoising steps, from 1 to the scheduler's `num_train_timesteps`. Defaults to 50, to 20
                for rectified flow, and to 2 for a consistency model.
            eta (`float`, *optional*):
                The fresh noise in each step, as in [`TinyPipeline`].
            latents (`torch.Tensor` of shape `(batch_size, C, h, w)`, *optional*):
                The initial noise, drawn from N(0, I) by default. It is scaled by the scheduler's `init_noise_sigma`.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1] or the `value_range`), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (the denoised latents `(B, C, h, w)`, standardized, which are not decoded).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)` after each step. It returns
                `callback_kwargs`, whose tensors it may change.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                The tensors in `callback_kwargs`, from the pipeline's `_callback_tensor_inputs`.
            timesteps (`list[int]` or `list[float]`, *optional*):
                Custom timesteps in strictly decreasing order, instead of `num_inference_steps`.
            return_intermediates (`int`, *optional*):
                The number K of evenly spaced states and x_0 predictions to return as well, decoded.
            conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, with a value for all images or a list of one for each; or
                values of shape `(B, D)`. Required for a network with conditions unless `guidance_scale` is 0.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The images, and the intermediates if `return_intermediates` is given.

        Raises:
            `ValueError`: If an argument is not as described above, a class or a condition is unknown, or the samples are
                not finite.
        """
        num_inference_steps = self._default_steps if num_inference_steps is None else num_inference_steps
        eta = self._default_eta if eta is None else eta
        self._check_output(1 if batch_size is None else batch_size, output_type, return_intermediates)
        self._check_steps(num_inference_steps, timesteps, eta)
        on_step_end = self._wrap_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_guidance(guidance_scale, guidance_interval)
        scheduler = self._clipping_scheduler(False if self._can_clip else None)
        conditions = self._encode_conditions(conditions, guidance_scale)
        if batch_size is None:
            batch_size = self._count_rows(conditions)
        labels, batch_size = self._encode_class_labels(class_labels, batch_size, guidance_scale)
        conditions = self._expand_conditions(conditions, batch_size)
        latents = self._prepare_latents(batch_size, generator, latents)
        scheduler = self._set_timesteps(scheduler, num_inference_steps, timesteps)
        predict = self._guided_predict(labels, guidance_scale, guidance_interval, conditions=conditions)
        latents, intermediates = self._denoise(
            latents, predict, scheduler, eta, generator, on_step_end, return_intermediates
        )
        return self._postprocess(latents, intermediates, output_type, return_dict)

    @torch.no_grad()
    def encode(self, images: Images) -> torch.Tensor:
        r"""
        Encodes images into standardized latents, those that the network is trained on.

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
                The images. PIL images are resized to the autoencoder's size. Arrays `(B, H, W, C)` and tensors
                `(B, C, H, W)` must have its size and lie in [0, 1].

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: The latents, the means of q(z | x).

        Raises:
            `ValueError`: If arrays or tensors have another shape, an integer dtype, or values outside [0, 1].
        """
        latents = encode_images(self.vae, self._preprocess(images, None, resize_arrays=False)).mean
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def interpolate(
        self,
        seeds: tuple[int, int] = (0, 1),
        num_frames: int = 16,
        interpolation: str = "slerp",
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        conditions: Conditions | None = None,
        eta: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generators | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples the frames of an interpolation between the initial noise of two samples.

        Args:
            seeds (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
                The seeds of the two samples, each used as `generator=[torch.Generator().manual_seed(seed)]`.
            num_frames (`int`, *optional*, defaults to 16):
                The number of frames, both ends included: at least 2.
            interpolation (`str`, *optional*, defaults to `"slerp"`):
                `"slerp"` follows the sphere near which Gaussian noise lies, and `"linear"` cuts through it.
            class_labels, conditions (*optional*):
                One class or two, and one value of each condition or two, to interpolate between.
            eta (`float`, *optional*, defaults to 0.0):
                The fresh noise in each step. Above 0, the path is not smooth.
            guidance_scale, guidance_interval, generator, num_inference_steps (*optional*):
                As for sampling.
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs (*optional*):
                As for sampling.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The frames in order, ready for `diffusers.utils.export_to_gif`.

        Raises:
            `ValueError`: If an argument is not as described above.
        """
        self._check_num_frames(num_frames)
        if interpolation not in ("slerp", "linear"):
            raise ValueError(f"`interpolation` must be 'slerp' or 'linear', got {interpolation!r}.")
        ends = self._prepare_ends(seeds, None)
        share = torch.linspace(0, 1, num_frames, dtype=ends.dtype, device=ends.device)
        if class_labels is not None:
            labels, _ = self._encode_class_labels(class_labels, 2)
            class_labels = self._interpolate_labels(labels, share[:, None])
        if conditions is not None:
            encoded = self._encode_conditions(conditions, guidance_scale, 2)
            conditions = self._condition_statistics.restore(self._interpolate_conditions(encoded, share[:, None]))
        mix = slerp if interpolation == "slerp" else torch.lerp
        return self(
            class_labels,
            num_frames,
            guidance_scale,
            guidance_interval,
            generator,
            num_inference_steps,
            eta,
            mix(ends[:1], ends[1:], share.view(-1, 1, 1, 1)),
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            conditions=conditions,
        )

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        return super()._image_shape

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        """Returns the shape (C, H, W) of one decoded image."""
        return self._shape_of(self.vae.config)

    def _clips(
        self, clip_sample: bool | None, guidance_scale: float, guidance_interval: tuple[float, float]
    ) -> bool | None:
        """Returns None: latents have no range to clip x_0 to."""
        return None

    @torch.no_grad()
    def _to_images(self, sample: torch.Tensor, output_type: str) -> Images:
        """Decodes latents, unless they are asked for, and converts the images to the pipeline's output."""
        return super()._to_images(sample if output_type == "latent" else decode_latents(self.vae, sample), output_type)


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
