"""
`TinyDCGANPipeline`: samples of a DCGAN, of a class where its generator knows classes.

This file travels with checkpoints: it imports nothing but torch, diffusers and its siblings.
"""

from typing import Optional

import torch
from diffusers import DiffusionPipeline, ModelMixin

from .pipeline_tiny import TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels


class TinyDCGANPipeline(ClassConditioningMixin, TinyPipeline):
    r"""
    Generation of small images with the generator of a GAN, in one pass.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        generator ([`ModelMixin`]):
            The network, a `TinyDCGANGenerator`, in evaluation mode.
        discriminator ([`ModelMixin`], *optional*):
            A `TinyDCGANDiscriminator`. Sampling needs none; it is kept for training on from here.
        id2label (`dict[int, str]`, *optional*):
            The names of the classes, by id.

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
        self, generator: ModelMixin, discriminator: Optional[ModelMixin] = None, id2label: Optional[dict] = None
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(generator=generator, discriminator=discriminator)
        self._register_names(id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> TinyPipelineOutput | tuple:
        r"""
        Samples a batch of images: z of N(0, I), through the generator.

        Args:
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Floats, `(B, num_class_embeds + 1)`, are
                weights of the rows of the network's table of classes. Needed for a generator with classes.
            batch_size (`int`, *optional*):
                The number of images: by default one for each label, or one.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one for each image, which is then independent of its batch.
            latents (`torch.Tensor` of shape `(batch_size, latent_dim)`, *optional*):
                z, drawn from N(0, I) where it is not given.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`L` or `RGB`), `"np"` (`(B, H, W, C)` in [0, 1]), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (the images as they are generated, in [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: for an argument outside what is said above, an unknown class among them; for samples that are
            not finite.
        """
        self._check_output(1 if batch_size is None else batch_size, output_type)
        labels, batch_size = self._encode_class_labels(class_labels, batch_size)
        latents = self._prepare_latents(batch_size, generator, latents)
        sample = self.generator(latents, labels).sample
        return self._output(sample, None, output_type, return_dict)

    @property
    def _latents_shape(self) -> tuple[int]:
        return (self._network.config.latent_dim,)


# `custom_pipeline=` loads the one pipeline class that it finds in a file.
del TinyPipeline
