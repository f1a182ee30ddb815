"""`TinyConditionalPipeline`: sampling by a class, conditions, an image or several of them, with classifier-free guidance."""

from typing import Any

import PIL.Image
import torch
from diffusers import SchedulerMixin

from .pipeline_tiny import Generators, Images, StepCallback, TinyPipeline, TinyPipelineOutput, takes
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin
from .pipeline_tiny_operators import Conditioning


class TinyConditionalPipeline(ClassConditioningMixin, ConditionsMixin, TinyPipeline):
    r"""
    Pipeline for generation of small images by their class, by conditions (numbers and labels by name), by an image as a
    condition, or by several of them, with [classifier-free guidance](https://huggingface.co/papers/2207.12598).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, called as `unet(sample, timestep, class_labels=labels).sample`: a `TinyUNet2DModel` or
            `TinyTransformer2DModel` with `num_class_embeds` = K, or a stock [`UNet2DModel`] with K + 1. With an image as a
            condition it takes `sample` and that image, concatenated, and with `num_conditions` = D it takes standardized
            `conditions` `(B, D)`; it may then have no classes.
        scheduler ([`SchedulerMixin`]):
            A scheduler to denoise the latents with `unet`: `TinyDDIMScheduler`, `TinyDDPMScheduler` or any stock one.
        id2label (`dict[int, str]`, *optional*):
            The class names by id.
        null_class_id (`int`, *optional*, defaults to -1):
            The row of the network's null class, by default the last one. None if the network has no null class: only
            `guidance_scale=1` is possible then.
        class_dropout_prob (`float`, *optional*):
            The share of labels that training replaced by the null class, and of images that it dropped with them, or
            None if unknown. With 0, the network without its condition was never trained, and guidance warns.
        conditioning (`str`, *optional*):
            The image that the network takes as a condition: `"grayscale"`, the gray image; `"low_resolution:F"`, an
            image F times smaller; `"image:K"`, another image with K channels. None for a network that takes none.
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
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-conditional-checkpoint")
    >>> images = pipe(["cat", "frog"], guidance_scale=3.0).images

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-checkpoint-with-a-conditioning-image")
    >>> images = pipe(image=PIL.Image.open("picture.png"), batch_size=4).images

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-checkpoint-with-conditions")
    >>> images = pipe(conditions={"age": [20, 40, 60], "smiling": 1}).images
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        dynamic_thresholding: float | None = None,
        generator: Generators | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | list[float] | None = None,
        clip_sample: bool | None = None,
        return_intermediates: int | None = None,
        image: Images | PIL.Image.Image | None = None,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples one image for each label, for each row of conditions, or for each conditioning image.

        Args:
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Floats `(B, rows)` are weights of the
                rows of the network's class embedding, null class included: they can interpolate between classes. The
                null class must have the weight 0 if the network takes an image or conditions as well, or no label was
                dropped in training. Required for a network with classes unless `guidance_scale` is 0.
            batch_size (`int`, *optional*):
                The number of images. Defaults to the number of labels, of conditions or of conditioning images.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in eps = w eps(x, c) + (1 - w) eps(x, null). 1 is plain conditional sampling and 0 unconditional
                sampling, each with one pass of the network per step. Values above 1 exaggerate the class.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The [share of the steps](https://huggingface.co/papers/2404.07724) that are guided, from 0 at the noise
                to 1 at the image. The other steps use w = 1.
            dynamic_thresholding (`float`, *optional*):
                The percentile p in (0, 1], such as 0.995, of dynamic thresholding, section 2.3 of
                [Imagen](https://huggingface.co/papers/2205.11487). It replaces the scheduler's thresholding and keeps
                high guidance from saturating.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per image, which makes each image independent of
                its batch.
            num_inference_steps (`int`, *optional*):
                The number of denoising steps, from 1 to the scheduler's `num_train_timesteps`. Defaults to 50, to 20
                for rectified flow, and to 2 for a consistency model.
            eta (`float`, *optional*):
                The fresh noise in each step, which corrects errors of the network: η of
                [DDIM](https://huggingface.co/papers/2010.02502), eq. 16, in [0, 1], and at least 0 for
                `TinyFlowMatchScheduler` and `TinyEDMScheduler`. 0 is deterministic, and 1 is DDPM. Defaults to 1, to 1.5
                with `multistep`, and to 0 with `heun`. Other schedulers ignore it.
            latents (`torch.Tensor` of shape `(batch_size, C, H, W)`, *optional*):
                The initial noise, drawn from N(0, I) by default. It is scaled by the scheduler's `init_noise_sigma`.
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
                The number K of evenly spaced states and x_0 predictions to return as well. They include the last step
                and, if K > 1, the first.
            image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditioning images, one for each sample, or one for all. They have the size and channels that
                `conditioning` says; [`~TinyConditionalPipeline.observe`] makes them from whole images. Arrays
                `(B, h, w, K)` and tensors `(B, K, h, w)` must lie in [0, 1], and arrays of a condition that is made from
                the image in the `value_range`, if there is one. Required for a network with a conditioning
                image unless `guidance_scale` is 0.
            conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, such as `{"age": 30, "smiling": 1}`, with a value for
                all images or a list of one for each; or values of shape `(B, D)`, in the order of
                `condition_statistics`. Required for a network with conditions unless `guidance_scale` is 0.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The images, and the intermediates if `return_intermediates` is given.

        Raises:
            `ValueError`: If an argument is not as described above, a class or a condition is unknown, or the samples are not finite.
        """
        num_inference_steps = self._default_steps if num_inference_steps is None else num_inference_steps
        eta = self._default_eta if eta is None else eta
        self._check_output(1 if batch_size is None else batch_size, output_type, return_intermediates)
        self._check_steps(num_inference_steps, timesteps, eta)
        on_step_end = self._wrap_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_guidance(guidance_scale, guidance_interval)
        scheduler = self._clipping_scheduler(self._clips(clip_sample, guidance_scale, guidance_interval))
        if dynamic_thresholding is not None:
            scheduler = _thresholding(scheduler, dynamic_thresholding)
        image = self._encode_image(image, guidance_scale)
        conditions = self._encode_conditions(conditions, guidance_scale)
        if batch_size is None:
            batch_size = self._count_rows(image, conditions)
        labels, batch_size = self._encode_class_labels(class_labels, batch_size, guidance_scale)
        if image is not None:
            if len(image) not in (1, batch_size):
                raise ValueError(f"`image` must be one, or one for each of {batch_size} samples, got {len(image)}.")
            image = image.expand(batch_size, -1, -1, -1)
        conditions = self._expand_conditions(conditions, batch_size)
        latents = self._prepare_latents(batch_size, generator, latents)
        scheduler = self._set_timesteps(scheduler, num_inference_steps, timesteps)
        predict = self._guided_predict(labels, guidance_scale, guidance_interval, image, conditions)
        latents, intermediates = self._denoise(
            latents, predict, scheduler, eta, generator, on_step_end, return_intermediates
        )
        return self._postprocess(latents, intermediates, output_type, return_dict)

    @torch.no_grad()
    def observe(self, image: Images | PIL.Image.Image) -> torch.Tensor:
        """
        Makes the conditioning images of whole images.

        Args:
            image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`):
                The images. PIL images are converted and resized as the network needs them. Arrays `(B, H, W, C)` and
                tensors `(B, C, H, W)` must lie in [0, 1], arrays in the `value_range` if there is one.

        Returns:
            `torch.Tensor` of shape `(B, K, h, w)`: The conditioning images in [0, 1], for `image` of the call.

        Raises:
            `ValueError`: If the network takes no image as a condition, or one that no other image shows.
        """
        if self._conditioning is None:
            raise ValueError("The network takes no image as a condition.")
        return (self._conditioning.observe(self._preprocess(image, None)) / 2 + 0.5).clamp(0, 1)

    def _register_conditioning(self, conditioning: str | None):
        self._conditioning = None
        if conditioning is not None:
            in_channels, *size = self._image_shape
            self._conditioning = Conditioning.of_network(conditioning, in_channels, *size)
        self.register_to_config(conditioning=conditioning)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return super()._image_shape if self._conditioning is None else self._conditioning.image_shape

    def _encode_image(self, image: Images | PIL.Image.Image | None, guidance_scale: float) -> torch.Tensor | None:
        """Converts conditioning images to the network's further channels (B, K, H, W), or None if it has none."""
        conditioning = self._conditioning
        if conditioning is None:
            if image is not None:
                raise ValueError(
                    "The network takes no image as a condition: leave out `image`. `TinyImg2ImgPipeline`, "
                    "`TinyInpaintPipeline` and `TinyRestorationPipeline` edit images with such a network."
                )
            return None
        if image is None:
            if guidance_scale == 0:
                return conditioning.enlarge(torch.zeros(1, *conditioning.shape, device=self._execution_device))
            raise ValueError(
                f"The network needs `image`: give {conditioning.description}, or `guidance_scale=0` for unconditional "
                "samples."
            )
        needed = f"`image` must be {conditioning.description}"
        if conditioning.is_made:
            needed += ", which `pipe.observe(image)` (`--degrade`) makes from a whole one"
        given = image if isinstance(image, (list, tuple)) else [image]
        modes = {each.mode for each in given if isinstance(each, PIL.Image.Image)}
        if conditioning.shape[0] == 1 and modes - {"1", "L"}:
            raise ValueError(f"{needed}, got one of mode {max(modes)}.")
        if conditioning.is_made:  # its arrays are in the value range, as those of the images
            image = self._from_values(image)
        try:
            return conditioning.enlarge(self._preprocess(image, None, image_shape=conditioning.shape))
        except ValueError as error:
            raise ValueError(f"{needed}: {error}") from error


def _thresholding(scheduler: SchedulerMixin, ratio: float) -> SchedulerMixin:
    """Returns a copy of a scheduler with dynamic thresholding at a percentile."""
    if not 0 < ratio <= 1:
        raise ValueError(f"`dynamic_thresholding` must be in (0, 1], such as 0.995, got {ratio}.")
    config = scheduler.config
    if not takes(scheduler, "thresholding"):
        raise ValueError(
            f"{type(scheduler).__name__} has no dynamic thresholding: use `TinyDDIMScheduler`, `TinyDDPMScheduler` or "
            "`DPMSolverMultistepScheduler`."
        )
    # Stock schedulers bound the threshold by 1 by default, which makes thresholding plain clipping.
    bound = {"sample_max_value": 1e6} if config.sample_max_value == 1 else {}
    return type(scheduler).from_config(config, thresholding=True, dynamic_thresholding_ratio=ratio, **bound)


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
