"""`TinyDCGANPipeline`: samples of a DCGAN, unconditional or by classes and conditions."""

from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline, ModelMixin

from .pipeline_tiny import Generators, TinyPipeline, TinyPipelineOutput, slerp
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin


class TinyDCGANPipeline(ClassConditioningMixin, ConditionsMixin, TinyPipeline):
    r"""
    Pipeline for the generation of small images with the generator of a GAN, in one pass.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        generator ([`ModelMixin`]):
            A `TinyDCGANGenerator` in evaluation mode.
        discriminator ([`ModelMixin`], *optional*):
            A `TinyDCGANDiscriminator`. Sampling doesn't use it; it is saved for further training.
        id2label (`dict[int, str]`, *optional*):
            The class names by id.
        value_range (`dict[str, float]`, *optional*):
            The `"low"` and `"high"` value of images that are not of 8 bits. Arrays are returned in it.
        condition_statistics (`dict`, *optional*):
            The names, means, deviations, lows and highs of the conditions that the network takes, a list each. None for a
            network without conditions.

    Example:

    ```py
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-dcgan")
    >>> images = pipe(batch_size=16).images
    ```
    """

    model_cpu_offload_seq = "generator"
    _network_name = "generator"
    _optional_components = ["discriminator"]

    def __init__(
        self,
        generator: ModelMixin,
        discriminator: Optional[ModelMixin] = None,
        id2label: Optional[dict] = None,
        value_range: Optional[dict] = None,
        condition_statistics: Optional[dict] = None,
    ):
        DiffusionPipeline.__init__(self)
        self._register_value_range(value_range)
        self.register_modules(generator=generator, discriminator=discriminator)
        self._register_names(id2label)
        self._register_conditions(condition_statistics)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        batch_size: int | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        truncation: float = 1.0,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples a batch of images by passing z from N(0, I) through the generator.

        Args:
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Floats `(B, num_class_embeds + 1)`
                are weights of the classes; the last, of the null class, must be 0, as it is never trained. Required for a
                generator with classes.
            batch_size (`int`, *optional*):
                The number of images. Defaults to the number of labels or of conditions, or 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per image, which makes each image independent of
                its batch.
            latents (`torch.Tensor` of shape `(batch_size, latent_dim)`, *optional*):
                z, drawn from N(0, I) by default.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1] or the `value_range`), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (the generator's output, in [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            truncation (`float`, *optional*, defaults to 1.0):
                Factor of z, in [0, 1]. Below 1, images are more typical and less varied.
            conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, such as `{"age": 30, "smiling": 1}`, with a value for
                all images or a list of one for each; or values of shape `(B, D)`, in the order of
                `condition_statistics`. Required for a network with conditions.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The images.

        Raises:
            `ValueError`: If an argument is not as described above, a class or a condition is unknown, or the samples are not finite.
        """
        self._check_output(1 if batch_size is None else batch_size, output_type)
        conditions = self._encode_conditions(conditions)
        if batch_size is None:
            batch_size = self._count_rows(conditions)
        labels, batch_size = self._encode_class_labels(class_labels, batch_size)
        conditions = self._expand_conditions(conditions, batch_size)
        latents = self._truncate(self._prepare_latents(batch_size, generator, latents), truncation)
        sample = self.generator(latents, labels, conditions=conditions).sample
        return self._postprocess(sample, None, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        seeds: tuple[int, int],
        class_labels: ClassLabels | None = None,
        num_frames: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Interpolates between two samples, on the sphere near which their latents lie. The ends are the samples.

        Args:
            seeds (`tuple[int, int]`):
                The two seeds, each used as `generator=[torch.Generator().manual_seed(seed)]`.
            class_labels (`int`, `str`, a list of two, `np.ndarray` or `torch.Tensor`, *optional*):
                One class, or two classes to interpolate between: ids, names or weights, as for sampling. Required
                for a generator with classes.
            num_frames (`int`, *optional*, defaults to 16):
                The number of frames, both ends included: at least 2.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As for sampling.
            return_dict (`bool`, *optional*, defaults to `True`):
                As for sampling.
            conditions (`dict[str, float]`, a list of two, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, with a value or a list of two to interpolate between; or
                values of shape `(1, D)` or `(2, D)`, in the order of `condition_statistics`. Required for a network with
                conditions.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The frames in order, ready for `diffusers.utils.export_to_gif`.

        Raises:
            `ValueError`: If an argument is not as described above, a class or a condition is unknown, or the samples are not finite.
        """
        self._check_output(2, output_type)
        self._check_num_frames(num_frames)
        labels, _ = self._encode_class_labels(class_labels, 2)
        conditions = self._encode_conditions(conditions, batch_size=2)
        latents = self._prepare_ends(seeds, None)
        share = torch.linspace(0, 1, num_frames, dtype=latents.dtype, device=latents.device)[:, None]
        latents = slerp(latents[:1], latents[1:], share)
        labels, conditions = self._interpolate_labels(labels, share), self._interpolate_conditions(conditions, share)
        sample = self.generator(latents, labels, conditions=conditions).sample
        return self._postprocess(sample, None, output_type, return_dict)


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
