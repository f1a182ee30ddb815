"""
`TinyPixelCNNPipeline`: samples of a PixelCNN, one sub-pixel after the other, completions of images, and exact likelihoods.

This file travels with checkpoints: it imports nothing but numpy, PIL, torch, diffusers and its siblings.
"""

import math
from collections.abc import Callable
from typing import Optional

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor

from .pipeline_tiny import Images, TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels


class TinyPixelCNNPipeline(ClassConditioningMixin, TinyPipeline):
    r"""
    Generation of small images with an autoregressive network: pixels in raster order, the channels of each in theirs.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        pixelcnn ([`ModelMixin`]): The network, a `TinyPixelCNNModel`.
        id2label (`dict[int, str]`, *optional*): The names of the network's classes, by id.
        class_dropout_prob (`float`, *optional*):
            The share of labels that training replaced by the null class; at 0 nothing is known of images of no class.

    Example:

    ```py
    >>> import torch
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id-of-a-pixelcnn")
    >>> images = pipe(batch_size=16, output_type="pt").images

    >>> given = torch.zeros(images.shape[2:], dtype=torch.bool)
    >>> given[: len(given) // 2] = True
    >>> completed = pipe(batch_size=16, images=images, mask=given).images  # other lower halves
    ```
    """

    model_cpu_offload_seq = "pixelcnn"
    _network_name = "pixelcnn"
    _callback_tensor_inputs = ["images"]

    def __init__(
        self, pixelcnn: ModelMixin, id2label: Optional[dict] = None, class_dropout_prob: Optional[float] = None
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(pixelcnn=pixelcnn)
        self.register_to_config(class_dropout_prob=class_dropout_prob)
        self._register_names(id2label)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: ClassLabels | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        images: Images | None = None,
        mask: np.ndarray | torch.Tensor | PIL.Image.Image | None = None,
        use_cache: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("images",),
    ) -> TinyPipelineOutput | tuple:
        r"""
        Samples a batch of images, or completes given ones.

        Args:
            batch_size (`int`, *optional*):
                The number of images; when not given that of the labels or of the given images, or else 1.
            class_labels (`int`, `str`, a list of either, or `torch.Tensor`, *optional*):
                For a network with classes: ids or names, one for all images or one for each, or mixing weights of shape
                `(B, K + 1)` whose last row is no class.
            temperature (`float`, *optional*, defaults to 1.0):
                Above 0. Below 1 the likelier values are drawn more often than they should be: it divides the logits, of the
                levels or of the mixture, and multiplies the mixture's scales.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one for each image, which is then independent of its batch.
            images (`list[PIL.Image.Image]`, `np.ndarray` of shape `(B, H, W, C)` or `torch.Tensor` of shape `(B, C, H, W)`, *optional*):
                Images to complete, arrays and tensors in [0, 1], on the network's levels; one for all or one for each.
            mask (`np.ndarray`, `torch.Tensor` or `PIL.Image.Image`, *optional*):
                Which part of `images` is given: true (or not 0) there. Of shape `(H, W)`, or one that broadcasts to
                `(B, C, H, W)`. It must be causal: what is given comes before all else, in raster order and with the
                channels of a pixel in theirs.
            use_cache (`bool`, *optional*, defaults to `True`):
                Whether each step computes only what is new. False evaluates the whole network each time: the same
                images, hundreds of times more slowly.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`L` or `RGB`), `"np"` (`(B, H, W, C)` in [0, 1]) or `"pt"` (`(B, C, H, W)` in [0, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, row, row, callback_kwargs)` after each row of pixels, to look at
                the images so far; ends the sampling by setting `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("images",)`):
                The tensors that `callback_kwargs` holds: `images`, of shape `(B, C, H, W)` in [0, 1].

        Returns:
            [`TinyPipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: for an argument outside what is said above; for a temperature other than 1 with the baseline, which
            predicts values and no distribution.
        """
        self._check_options(temperature, output_type, callback_on_step_end_tensor_inputs)
        if (images is None) != (mask is None):
            raise ValueError("Give `images` and `mask` together: the mask says which part of the images is given.")
        given_images = None if images is None else self._to_levels(images)
        one_label = class_labels is None or isinstance(class_labels, int | str)
        if batch_size is None and one_label and images is not None:
            batch_size = len(given_images)
        labels, batch_size = self._encode_class_labels(class_labels, batch_size)
        self._check_output(batch_size, output_type)
        uniform = self._draw_uniform(batch_size, generator)  # (B, H, W, C, 2)

        device = self._execution_device
        sample = torch.zeros(batch_size, *self._image_shape, device=device)
        given = torch.zeros_like(sample, dtype=torch.bool)
        if images is not None:
            if len(given_images) not in (1, batch_size):
                raise ValueError(f"`images` must be one, or one for each of {batch_size}, got {len(given_images)}.")
            given = self._check_mask(mask, batch_size)
            sample = torch.where(given, given_images.to(sample), 0.0)

        self._interrupt = False
        _, C, H, W = sample.shape
        network = self._network
        finite = torch.ones((), dtype=torch.bool, device=device)
        with self.progress_bar(total=H * W) as bar:
            for (c, i, j), parameters in network.conditionals(sample, labels, use_cache):
                finite &= torch.isfinite(
                    parameters
                ).all()  # a level is drawn of no number as well, and looks like any other
                drawn = network.draw(parameters, uniform[:, i, j, c], temperature)
                sample[:, c, i, j] = torch.where(given[:, c, i, j], sample[:, c, i, j], drawn)
                if c < C - 1:
                    continue
                bar.update()
                if j == W - 1 and callback_on_step_end is not None:
                    tensors = {"images": sample}
                    callback_on_step_end(
                        self, i, i, {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    )
                if self.interrupt:
                    break
        return self._output(torch.where(finite, 2 * sample - 1, torch.nan), None, output_type, return_dict)

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: torch.Tensor,
        class_labels: ClassLabels | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        r"""
        The exact negative log-likelihood of images, -log2 p(x) / (C H W), of images first quantised to the network's levels
        where it has fewer than 256.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): uint8, 0 to 255.
            class_labels (as for sampling, *optional*): p(x | class); when not given p(x | no class).
            generator (*optional*): Not needed: nothing is drawn.

        Returns:
            `torch.Tensor` of shape `(B,)`: bits a dimension.

        Raises:
            `ValueError`: for images that are not uint8 or of another size; for the baseline, which has no likelihood; without
            labels for a network that never saw an image without.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"`images` must be uint8, 0 to 255, got {images.dtype}.")
        labels = None
        if class_labels is None and self._num_rows and self.config.class_dropout_prob == 0:
            raise ValueError(
                "p(x | no class) was not learned, as no label was dropped in training: give `class_labels`."
            )
        if class_labels is not None:
            labels, _ = self._encode_class_labels(class_labels, len(images))
        sample = images.to(self._execution_device, torch.float32) / 255
        bits = self._network.nll(self._network.quantize(sample), labels)
        self.maybe_free_model_hooks()
        return bits

    def _check_options(
        self, temperature: float, output_type: str, callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...]
    ):
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` must be one of 'pil', 'np', 'pt', got {output_type!r}.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be a finite number above 0, got {temperature}.")
        if temperature != 1 and self._network.config.variant == "baseline":
            raise ValueError(
                f"`temperature` must be left at 1 for the baseline, got {temperature}: it predicts intensities and has no "
                "distribution to make narrower or wider. Use a network of the variant 'gated' or 'plusplus'."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may name {self._callback_tensor_inputs}, got {unknown}."
            )

    def _draw_uniform(
        self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """What the sub-pixels are drawn with, (B, H, W, C, 2) in [0, 1), drawn at once so that it depends on no order."""
        C, H, W = self._image_shape
        generator = list(generator) if isinstance(generator, tuple) else generator
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"A list of generators needs one for each image: got {len(generator)} for a batch of {batch_size}."
            )
        generators = generator if isinstance(generator, list) else [generator]
        each = (batch_size if len(generators) == 1 else 1, H, W, C, 2)
        draws = [torch.rand(each, generator=g, device=g.device if g is not None else "cpu") for g in generators]
        return torch.cat([draw.to(self._execution_device) for draw in draws])

    def _to_levels(self, images: Images) -> torch.Tensor:
        """Images in any form to (B, C, H, W) in [0, 1], on the network's levels."""
        if isinstance(images, PIL.Image.Image):
            images = [images]
        if isinstance(images, (list, tuple)):
            C, H, W = self._image_shape
            for image in images:
                if not isinstance(image, PIL.Image.Image):
                    raise ValueError(f"A list of `images` must be of PIL images, got a {type(image).__name__} in it.")
                if image.size != (W, H):
                    raise ValueError(f"`images` must be {W} pixels wide and {H} high, got one of {image.size}.")
            if not images:
                raise ValueError("`images` is an empty list: give one image, or one for each.")
            images = VaeImageProcessor.pil_to_numpy([image.convert({1: "L", 3: "RGB"}.get(C)) for image in images])
        if isinstance(images, np.ndarray):
            if images.ndim != 4:
                raise ValueError(f"`images` as an array must have the shape (B, H, W, C), got {images.shape}.")
            images = VaeImageProcessor.numpy_to_pt(images)
        return self._network.to_levels(images)

    def _check_mask(self, mask: np.ndarray | torch.Tensor | PIL.Image.Image, batch_size: int) -> torch.Tensor:
        """The mask as bool (B, C, H, W), once it is known to be causal."""
        shape = (batch_size, *self._image_shape)
        if isinstance(mask, PIL.Image.Image):
            mask = np.array(mask.convert("L"))
        mask = torch.as_tensor(mask, device=self._execution_device) != 0
        try:
            given = mask.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"`mask` must have the shape (H, W) = {shape[2:]}, or one that broadcasts to (B, C, H, W) = {shape}, got "
                f"{tuple(mask.shape)}."
            ) from error
        in_order = given.permute(0, 2, 3, 1).flatten(1)  # (B, H W C)
        breaks = (in_order[:, 1:] & ~in_order[:, :-1]).nonzero()
        if len(breaks):
            image, position = breaks[0].tolist()
            _, C, _, W = shape
            (row, column), channel = divmod((position + 1) // C, W), (position + 1) % C
            raise ValueError(
                f"`mask` is not causal: it gives the pixel at row {row}, column {column} (channel {channel}) of image "
                f"{image}, but not the one before it. Only what comes first, from left to right and from top to bottom, can be "
                "given."
            )
        return given


# `custom_pipeline=` loads the one pipeline class that it finds in a file.
del TinyPipeline
