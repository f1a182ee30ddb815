"""`TinyVAEPipeline`: samples of a variational autoencoder, reconstructions, interpolations and the likelihood bound."""

import math
from typing import Any, Optional

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin

from .pipeline_tiny import Generators, Images, TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_autoencoder import decode_latents, encode_images, latent_shape, latent_statistics
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin


class TinyVAEPipeline(ClassConditioningMixin, ConditionsMixin, TinyPipeline):
    r"""
    Pipeline for the generation of small images with a variational autoencoder.

    The latents of a `TinyVAEModel` are vectors with the prior N(0, I), from which it samples. Those of an
    [`AutoencoderKL`] are maps, made for `TinyLatentPipeline`: they are standardized by its `latents_mean` and
    `latents_std`, and N(0, I) is but a crude model of them, so judge such a network by its reconstructions.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        vae ([`ModelMixin`]): A `TinyVAEModel`, or an [`AutoencoderKL`] of diffusers.
        value_range (`dict[str, float]`, *optional*):
            The `"low"` and `"high"` value of images that are not of 8 bits. Arrays are given and returned in it.
        id2label (`dict[int, str]`, *optional*):
            The class names by id.
        condition_statistics (`dict`, *optional*):
            The names, means, deviations, lows and highs of the conditions that the network takes, a list each. None for a
            network without conditions.

    Example:

    ```py
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-vae")
    >>> samples = pipe(batch_size=16).images
    >>> reconstructions = pipe.reconstruct(samples).images
    >>> frames = pipe.interpolate(samples[:2], num_frames=8).images
    ```
    """

    model_cpu_offload_seq = "vae"
    _network_name = "vae"

    def __init__(
        self,
        vae: ModelMixin,
        value_range: Optional[dict] = None,
        id2label: Optional[dict] = None,
        condition_statistics: Optional[dict] = None,
    ):
        DiffusionPipeline.__init__(self)
        self._register_value_range(value_range)
        self.register_modules(vae=vae)
        if self._has_maps:
            latent_statistics(vae)  # refuses those that are damaged
        self._register_names(id2label)
        self._register_conditions(condition_statistics)

    @property
    def _has_maps(self) -> bool:
        """Returns whether the latents are maps, those of an [`AutoencoderKL`]."""
        return isinstance(self._network, AutoencoderKL)

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        return latent_shape(self._network) if self._has_maps else super()._latent_shape

    def _encode(self, sample: torch.Tensor, labels: torch.Tensor | None, conditions: torch.Tensor | None) -> Any:
        """Encodes images in [-1, 1]: q(z | x), with a `mean` and a `stddev`."""
        return (
            encode_images(self._network, sample)
            if self._has_maps
            else self._network.encode(sample, labels, conditions)
        )

    def _decode(
        self, latents: torch.Tensor, labels: torch.Tensor | None, conditions: torch.Tensor | None
    ) -> torch.Tensor:
        """Decodes latents to images, about [-1, 1]."""
        if self._has_maps:
            return decode_latents(self._network, latents)
        return self._network.decode(latents, labels, conditions)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        truncation: float = 1.0,
        class_labels: ClassLabels | None = None,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples a batch of images by decoding z from the prior N(0, I). Each image is the center of p(x | z), without
        pixel noise.

        Args:
            batch_size (`int`, *optional*):
                The number of images. Defaults to the number of labels or of conditions, or 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per image, which makes each image independent of
                its batch.
            latents (`torch.Tensor` of shape `(batch_size, latent_dim)` or `(batch_size, C, h, w)`, *optional*):
                z, drawn from N(0, I) by default.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1] or the `value_range`), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (the decoder's output, about [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            truncation (`float`, *optional*, defaults to 1.0):
                Factor of z, in [0, 1]. Below 1, images are more typical and less varied.
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Floats `(B, num_class_embeds + 1)`
                are weights of the classes; the last, of the null class, must be 0, as it is never trained. Required for a
                network with classes.
            conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, such as `{"age": 30, "smiling": 1}`, with a value for
                all images or a list of one for each; or values of shape `(B, D)`, in the order of
                `condition_statistics`. Required for a network with conditions.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The images.

        Raises:
            `ValueError`: If an argument is not as described above, a class or a condition is unknown, or the samples are not
                finite.
        """
        self._check_output(1 if batch_size is None else batch_size, output_type)
        conditions = self._encode_conditions(conditions)
        if batch_size is None:
            batch_size = self._count_rows(conditions)
        labels, batch_size = self._encode_class_labels(class_labels, batch_size)
        conditions = self._expand_conditions(conditions, batch_size)
        latents = self._truncate(self._prepare_latents(batch_size, generator, latents), truncation)
        sample = self._decode(latents, labels, conditions)
        return self._postprocess(sample, None, output_type, return_dict)

    @torch.no_grad()
    def encode(
        self, images: Images, class_labels: ClassLabels | None = None, conditions: Conditions | None = None
    ) -> torch.Tensor:
        r"""
        Encodes images into latents, the means of q(z | x).

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
                The images. PIL images are resized to the network's size. Arrays `(B, H, W, C)` and tensors
                `(B, C, H, W)` must have its size and lie in [0, 1].
            class_labels, conditions (*optional*):
                The class and the conditions of the images, as for sampling. Required for a network that takes them.

        Returns:
            `torch.Tensor` of shape `(B, latent_dim)` or `(B, C, h, w)`: The latents.

        Raises:
            `ValueError`: If arrays or tensors have another shape, an integer dtype, or values outside [0, 1], or if a class
                or a condition is missing or unknown.
        """
        sample = self._preprocess(images, None, resize_arrays=False)
        labels, _ = self._encode_class_labels(class_labels, len(sample))
        conditions = self._encode_conditions(conditions, batch_size=len(sample))
        latents = self._encode(sample, labels, conditions).mean
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def reconstruct(
        self,
        images: Images,
        sample_posterior: bool = False,
        generator: Generators | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels | None = None,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Encodes images and decodes them again. The distance between images and their reconstructions measures how much
        the latents keep, not the quality of samples from the prior: the two can't be compared.

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
                The images. PIL images are resized to the network's size. Arrays `(B, H, W, C)` and tensors
                `(B, C, H, W)` must have its size and lie in [0, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether to sample z from q(z | x), as in training, instead of taking its mean.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling from q(z | x) deterministic. A list has one generator per image.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As for sampling.
            return_dict (`bool`, *optional*, defaults to `True`):
                As for sampling.
            class_labels, conditions (*optional*):
                The class and the conditions of the images, as for sampling. Required for a network that takes them.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The reconstructions, in the order of the images.

        Raises:
            `ValueError`: If an argument is not as described above.
        """
        self._check_output(1, output_type)
        sample = self._preprocess(images, None, resize_arrays=False)
        labels, _ = self._encode_class_labels(class_labels, len(sample))
        conditions = self._encode_conditions(conditions, batch_size=len(sample))
        posterior = self._encode(sample, labels, conditions)
        latents = posterior.mean
        if sample_posterior:
            latents = latents + posterior.stddev * self._prepare_latents(len(latents), generator, None)
        sample = self._decode(latents, labels, conditions)
        return self._postprocess(sample, None, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        images: Images | None = None,
        num_frames: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
        seeds: tuple[int, int] | None = None,
        class_labels: ClassLabels | None = None,
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Interpolates on the line between two latents. The ends are the reconstructions of two images, or two samples.

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, *optional*):
                The two images. PIL images are resized to the network's size. Arrays `(2, H, W, C)` and tensors
                `(2, C, H, W)` must have its size and lie in [0, 1]. Exactly one of `images` and `seeds` must be given.
            num_frames (`int`, *optional*, defaults to 16):
                The number of frames, both ends included: at least 2.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As for sampling.
            return_dict (`bool`, *optional*, defaults to `True`):
                As for sampling.
            seeds (`tuple[int, int]`, *optional*):
                The seeds of two samples, each used as `generator=[torch.Generator().manual_seed(seed)]`.
            class_labels (`int`, `str`, a list of two, `np.ndarray` or `torch.Tensor`, *optional*):
                One class, or two classes to interpolate between: ids, names or weights, as for sampling. Required
                for a network with classes.
            conditions (`dict[str, float]`, a list of two, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, with a value or a list of two to interpolate between; or
                values of shape `(1, D)` or `(2, D)`, in the order of `condition_statistics`. Required for a network with
                conditions.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The frames in order, ready for `diffusers.utils.export_to_gif`.

        Raises:
            `ValueError`: If an argument is not as described above.
        """
        self._check_output(2, output_type)
        self._check_num_frames(num_frames)
        if (images is None) == (seeds is None):
            raise ValueError("Give exactly one of `images` and `seeds`, for the two ends.")
        labels, _ = self._encode_class_labels(class_labels, 2)
        conditions = self._encode_conditions(conditions, batch_size=2)
        if seeds is not None:
            start, end = self._prepare_ends(seeds, None)
        else:
            start, end = self._encode(self._preprocess(images, 2, resize_arrays=False), labels, conditions).mean
        share = torch.linspace(0, 1, num_frames, dtype=start.dtype, device=start.device)
        latents = torch.lerp(start, end, share.view(-1, *[1] * start.ndim))
        labels = self._interpolate_labels(labels, share[:, None])
        conditions = self._interpolate_conditions(conditions, share[:, None])
        sample = self._decode(latents, labels, conditions)
        return self._postprocess(sample, None, output_type, return_dict)

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: torch.Tensor,
        class_labels: ClassLabels | None = None,
        generator: Generators | None = None,
        conditions: Conditions | None = None,
    ) -> torch.Tensor:
        r"""
        Estimates the evidence lower bound in bits per dimension, an upper bound on -log2 p(x) / (C H W), with one draw
        of z per image. The estimate is unbiased: one draw is enough for the mean over many images.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): uint8 images, 0 to 255.
            class_labels (as for sampling, *optional*): The classes, for p(x | class).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the estimate deterministic. A list has one generator per image.
            conditions (as for sampling, *optional*): The conditions, for p(x | conditions).

        Returns:
            `torch.Tensor` of shape `(B,)`: Bits per dimension.

        Raises:
            `ValueError`: If the network's reconstruction loss is not a likelihood, the images are not uint8 or have
                another size, or a class or a condition is missing or unknown.
        """
        vae = self._network
        if self._has_maps:
            raise ValueError("An AutoencoderKL has no likelihood, and so no bits per dimension.")
        if not vae.has_likelihood:
            raise ValueError(
                "This VAE has no likelihood, and so no bits per dimension: with reconstruction "
                f"{vae.config.reconstruction!r}, the probabilities of {vae.config.num_levels} gray levels don't sum "
                "to 1. Train one with 'logistic' or 'gaussian', or with 'bernoulli' on binary images (num_levels 2)."
            )
        sample = self._from_uint8(images) / 127.5 - 1
        labels, _ = self._encode_class_labels(class_labels, len(sample))
        conditions = self._encode_conditions(conditions, batch_size=len(sample))
        noise = self._prepare_latents(len(sample), generator, None)
        output = vae(sample, noise, class_labels=labels, conditions=conditions)
        self.maybe_free_model_hooks()
        return (output.reconstruction_loss + output.kl) / (math.prod(self._image_shape) * math.log(2))


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
