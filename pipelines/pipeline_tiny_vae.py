"""
`TinyVAEPipeline`: samples of a variational autoencoder, reconstructions of images, walks between two, and their bound.

This file travels with checkpoints: it imports nothing but torch, diffusers and its siblings.
"""

import math
import numbers

import torch
from diffusers import DiffusionPipeline, ModelMixin

from .pipeline_tiny import Images, TinyPipeline, TinyPipelineOutput


class TinyVAEPipeline(TinyPipeline):
    r"""
    Generation of small images with a variational autoencoder whose latent is a vector.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        vae ([`ModelMixin`]): The network, a `TinyVAEModel`.

    Example:

    ```py
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-vae")
    >>> samples = pipe(batch_size=16).images
    >>> again = pipe.reconstruct(samples).images
    >>> walk = pipe.interpolate(samples[:2], num_frames=8).images
    ```
    """

    model_cpu_offload_seq = "vae"
    _network_name = "vae"

    def __init__(self, vae: ModelMixin):
        DiffusionPipeline.__init__(self)
        self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> TinyPipelineOutput | tuple:
        r"""
        Samples a batch of images: z of the prior N(0, I), decoded. An image is the centre of p(x | z), to which no noise
        of the pixels is added.

        Args:
            batch_size (`int`, *optional*, defaults to 1):
                The number of images.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one for each image, which is then independent of its batch.
            latents (`torch.Tensor` of shape `(batch_size, latent_dim)`, *optional*):
                z, drawn from N(0, I) where it is not given.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`L` or `RGB`), `"np"` (`(B, H, W, C)` in [0, 1]), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (the images as they are decoded, about [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: for an argument outside what is said above; for samples that are not finite.
        """
        self._check_output(batch_size, output_type)
        latents = self._prepare_latents(batch_size, generator, latents)
        return self._decode(latents, output_type, return_dict)

    @torch.no_grad()
    def encode(self, images: Images) -> torch.Tensor:
        r"""
        Finds the latents of images: the means of q(z | x).

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` of shape `(B, H, W, C)` or `torch.Tensor` of shape `(B, C, H, W)`):
                The images, arrays and tensors in [0, 1]. PIL images are resized to the network's size.

        Returns:
            `torch.Tensor` of shape `(B, latent_dim)`: the latents.

        Raises:
            `ValueError`: for arrays and tensors of another shape, of integers, or outside [0, 1].
        """
        latents = self._network.encode(self._preprocess(images, None, resize_arrays=False)).mean
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def reconstruct(
        self,
        images: Images,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> TinyPipelineOutput | tuple:
        r"""
        Encodes images and decodes them again. A distance between images and their reconstructions says how much the
        latents keep, and nothing of samples of the prior: the two must not be compared.

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` of shape `(B, H, W, C)` or `torch.Tensor` of shape `(B, C, H, W)`):
                The images, arrays and tensors in [0, 1]. PIL images are resized to the network's size.
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether z is drawn from q(z | x), as in training, in place of its mean.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes that draw deterministic; a list has one for each image.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As for sampling.
            return_dict (`bool`, *optional*, defaults to `True`):
                As for sampling.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: the reconstructions, in the order of the images.

        Raises:
            `ValueError`: for an argument outside what is said above.
        """
        self._check_output(1, output_type)
        posterior = self._network.encode(self._preprocess(images, None, resize_arrays=False))
        latents = posterior.mean
        if sample_posterior:
            latents = latents + posterior.stddev * self._prepare_latents(len(latents), generator, None)
        return self._decode(latents, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self, images: Images, num_frames: int = 16, output_type: str = "pil", return_dict: bool = True
    ) -> TinyPipelineOutput | tuple:
        r"""
        Walks from one image to another, along the line between their latents. The ends are the two reconstructions.

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` of shape `(2, H, W, C)` or `torch.Tensor` of shape `(2, C, H, W)`):
                The two images, arrays and tensors in [0, 1]. PIL images are resized to the network's size.
            num_frames (`int`, *optional*, defaults to 16):
                The number of frames, both ends included: at least 2.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As for sampling.
            return_dict (`bool`, *optional*, defaults to `True`):
                As for sampling.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: the frames, in order, ready for `diffusers.utils.export_to_gif`.

        Raises:
            `ValueError`: for an argument outside what is said above.
        """
        self._check_output(2, output_type)
        if not isinstance(num_frames, numbers.Integral) or num_frames < 2:
            raise ValueError(f"`num_frames` must be an integer of at least 2, the two ends, got {num_frames}.")
        start, end = self._network.encode(self._preprocess(images, 2, resize_arrays=False)).mean
        share = torch.linspace(0, 1, num_frames, dtype=start.dtype, device=start.device)
        return self._decode(torch.lerp(start, end, share[:, None]), output_type, return_dict)

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: torch.Tensor,
        class_labels: None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        r"""
        The evidence lower bound, as bits a dimension: an upper bound on -log2 p(x) / (C H W), with one draw of z for
        each image. It is unbiased, so that its mean over many images needs no more draws.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): uint8, 0 to 255.
            class_labels (`None`): The network has no classes.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the draw deterministic; a list has one for each image.

        Returns:
            `torch.Tensor` of shape `(B,)`: bits a dimension.

        Raises:
            `ValueError`: for a network whose reconstruction loss is no likelihood; for images that are not uint8 or of
            another size; for class labels.
        """
        vae = self._network
        if not vae.has_likelihood:
            raise ValueError(
                f"This VAE has no likelihood, and so no bits a dimension: reconstruction {vae.config.reconstruction!r} on "
                f"{vae.config.num_levels} grey levels gives them no probabilities that sum to 1. Train one with 'logistic' "
                "or 'gaussian', or with 'bernoulli' on binary images (num_levels 2)."
            )
        if class_labels is not None:
            raise ValueError("The network has no classes: leave out `class_labels`.")
        if images.dtype != torch.uint8:
            raise ValueError(f"`images` must be uint8, 0 to 255, got {images.dtype}.")
        sample = images.to(self._execution_device, torch.float32) / 127.5 - 1
        noise = self._prepare_latents(len(sample), generator, None)
        output = vae(sample, noise)
        self.maybe_free_model_hooks()
        return (output.reconstruction_loss + output.kl) / (math.prod(self._image_shape) * math.log(2))

    def _decode(self, latents: torch.Tensor, output_type: str, return_dict: bool) -> TinyPipelineOutput | tuple:
        return self._output(self._network.decode(latents), None, output_type, return_dict)

    @property
    def _latents_shape(self) -> tuple[int]:
        return (self._network.config.latent_dim,)


# `custom_pipeline=` loads the one pipeline class that it finds in a file.
del TinyPipeline
