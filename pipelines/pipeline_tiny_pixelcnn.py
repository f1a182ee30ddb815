"""`TinyPixelCNNPipeline`: autoregressive samples of a PixelCNN, completions of images, and exact likelihoods."""

import math
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor

from .pipeline_tiny import Generators, Images, TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin


class TinyPixelCNNPipeline(ClassConditioningMixin, ConditionsMixin, TinyPipeline):
    r"""
    Pipeline for the generation of small images with an autoregressive network. It samples the pixels in raster order
    and the channels of each pixel in their order.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        pixelcnn ([`ModelMixin`]): A `TinyPixelCNNModel`.
        id2label (`dict[int, str]`, *optional*): The class names by id.
        class_dropout_prob (`float`, *optional*):
            The share of labels that training replaced by the null class, and of conditions that it dropped with them, or
            None if unknown. With 0, the network without them was never trained, and they are always required.
        condition_statistics (`dict`, *optional*):
            The names, means, deviations, lows and highs of the conditions that the network takes, a list each. None for a
            network without conditions.

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
    _output_types = ("pil", "np", "pt")

    def __init__(
        self,
        pixelcnn: ModelMixin,
        id2label: Optional[dict] = None,
        class_dropout_prob: Optional[float] = None,
        condition_statistics: Optional[dict] = None,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(pixelcnn=pixelcnn)
        self.register_to_config(class_dropout_prob=class_dropout_prob)
        self._register_names(id2label)
        self._register_conditions(condition_statistics)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: ClassLabels | None = None,
        temperature: float = 1.0,
        generator: Generators | None = None,
        images: Images | None = None,
        mask: np.ndarray | torch.Tensor | PIL.Image.Image | None = None,
        use_cache: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("images",),
        conditions: Conditions | None = None,
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples a batch of images, or completes given images.

        Args:
            batch_size (`int`, *optional*):
                The number of images. Defaults to the number of labels, of conditions or of given images, or 1.
            class_labels (`int`, `str`, a list of either, or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each image, or one for all. Floats `(B, K + 1)` are mixing
                weights of the K classes and the null class, which must be 0 for the latter if the network takes
                conditions as well or no label was dropped. Required for a network with classes; with conditions as
                well, give both or neither.
            temperature (`float`, *optional*, defaults to 1.0):
                Divides the logits of the levels or of the mixture, and multiplies the scales of the mixture. Must be
                above 0. Below 1, likely values are sampled more often than under the model.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per image, which makes each image independent of
                its batch.
            images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, *optional*):
                The images to complete, one for each or one for all, on the network's levels. Arrays `(B, H, W, C)` and
                tensors `(B, C, H, W)` must lie in [0, 1].
            mask (`np.ndarray`, `torch.Tensor` or `PIL.Image.Image`, *optional*):
                The part of `images` that is given: True, or nonzero. Its shape is `(H, W)` or broadcasts to
                `(B, C, H, W)`. It must be causal: the given sub-pixels come before all others, in raster order and
                then channel order.
            use_cache (`bool`, *optional*, defaults to `True`):
                Whether to compute only what is new at each step. False evaluates the whole network at each step: the
                same images, hundreds of times slower.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1]) or `"pt"` (`(B, C, H, W)` in [0, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, row, row, callback_kwargs)` after each row of pixels. It can
                inspect the images so far, and stop sampling by setting `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("images",)`):
                The tensors in `callback_kwargs`: `images`, of shape `(B, C, H, W)` in [0, 1].
            conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, such as `{"age": 30, "smiling": 1}`, with a value for
                all images or a list of one for each; or values of shape `(B, D)`, in the order of
                `condition_statistics`. None draws images of any conditions, and of any class. Required if classes are
                given, or if training dropped no conditions.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The images.

        Raises:
            `ValueError`: If an argument is not as described above, the temperature is not 1 for the baseline, which
                predicts values instead of distributions, or the samples are not finite.
        """
        self._check_temperature(temperature)
        on_step_end = self._wrap_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if (images is None) != (mask is None):
            raise ValueError("Give `images` and `mask` together: the mask tells which part of the images is given.")
        given_images = None if images is None else self._to_levels(images)
        draws_any = self._condition_statistics is not None and self._are_dropped(class_labels, conditions)
        conditions = self._encode_conditions(conditions, optional=draws_any)
        if batch_size is None:
            batch_size = self._count_rows(conditions)
        one_label = class_labels is None or isinstance(class_labels, int | str)
        if batch_size is None and one_label and images is not None:
            batch_size = len(given_images)
        labels, batch_size = self._encode_class_labels(class_labels, batch_size, 0 if draws_any else None)
        conditions = self._expand_conditions(conditions, batch_size)
        self._check_output(batch_size, output_type)
        uniform = self._draw_uniform(batch_size, generator)  # (B, H, W, C, 2)

        device = self._execution_device
        sample = torch.zeros(batch_size, *self._image_shape, device=device)
        given = torch.zeros_like(sample, dtype=torch.bool)
        if images is not None:
            if len(given_images) not in (1, batch_size):
                raise ValueError(f"`images` must be one, or one for each of {batch_size}, got {len(given_images)}.")
            given = self._expand_mask(mask, batch_size)
            sample = torch.where(given, given_images.to(sample), 0.0)

        self._interrupt = False
        _, C, H, W = sample.shape
        network = self._network
        finite = torch.ones((), dtype=torch.bool, device=device)
        with self.progress_bar(total=H * W) as bar:
            for (c, i, j), parameters in network.conditionals(sample, labels, use_cache, conditions):
                finite &= torch.isfinite(parameters).all()  # NaN parameters give levels that look like any other
                drawn = network.draw(parameters, uniform[:, i, j, c], temperature)
                sample[:, c, i, j] = torch.where(given[:, c, i, j], sample[:, c, i, j], drawn)
                if c < C - 1:
                    continue
                bar.update()
                if j == W - 1:
                    on_step_end(i, i, {"images": sample})
                if self.interrupt:
                    break
        return self._postprocess(torch.where(finite, 2 * sample - 1, torch.nan), None, output_type, return_dict)

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: torch.Tensor,
        class_labels: ClassLabels | None = None,
        generator: Generators | None = None,
        conditions: Conditions | None = None,
    ) -> torch.Tensor:
        r"""
        Computes the exact negative log-likelihood of images, -log2 p(x) / (C H W). The images are first quantized to
        the network's levels if it has fewer than 256.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): uint8 images, 0 to 255.
            class_labels (as for sampling, *optional*): The classes for p(x | class).
            generator (*optional*): Not used: the likelihood is deterministic.
            conditions (as for sampling, *optional*):
                The conditions for p(x | conditions). Without them and `class_labels`, p(x) is that of images of any kind;
                a network that takes both is given both or neither.

        Returns:
            `torch.Tensor` of shape `(B,)`: Bits per dimension.

        Raises:
            `ValueError`: If the images are not uint8 or have another size, the network is the baseline, which has no
                likelihood, or labels or conditions are missing and the network without them was never trained.
        """
        images = self._from_uint8(images)
        if class_labels is None and self._num_rows and self.config.class_dropout_prob == 0:
            raise ValueError("p(x | null class) wasn't learned: no label was dropped in training. Use `class_labels`.")
        are_dropped = self._are_dropped(class_labels, conditions)
        labels, _ = self._encode_class_labels(class_labels, len(images), 0 if are_dropped else None)
        conditions = self._encode_conditions(conditions, batch_size=len(images), optional=are_dropped)
        bits = self._network.nll(self._network.quantize(images / 255), labels, conditions)
        self.maybe_free_model_hooks()
        return bits

    def _are_dropped(self, class_labels: ClassLabels | None, conditions: Conditions | None) -> bool:
        """Returns whether neither class nor conditions are given, and training dropped them, which it does together."""
        return class_labels is None and conditions is None and self.config.class_dropout_prob != 0

    def _check_temperature(self, temperature: float):
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be a finite number above 0, got {temperature}.")
        if temperature != 1 and self._network.config.variant == "baseline":
            raise ValueError(
                f"`temperature` must be 1 for the baseline, got {temperature}: it predicts intensities and has no "
                "distribution. Use a network of another variant."
            )

    def _draw_uniform(self, batch_size: int, generator: Generators | None) -> torch.Tensor:
        """Draws the random numbers of all sub-pixels at once, (B, H, W, C, 2) in [0, 1)."""
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._check_generator(generator, batch_size)
        C, H, W = self._image_shape
        generators = generator if isinstance(generator, list) else [generator]
        each = (batch_size if len(generators) == 1 else 1, H, W, C, 2)
        draws = [torch.rand(each, generator=g, device=g.device if g is not None else "cpu") for g in generators]
        return torch.cat([draw.to(self._execution_device) for draw in draws])

    def _to_levels(self, images: Images) -> torch.Tensor:
        """Converts images to (B, C, H, W) in [0, 1], on the network's levels."""
        if isinstance(images, PIL.Image.Image):
            images = [images]
        if isinstance(images, (list, tuple)):
            C, H, W = self._image_shape
            for image in images:
                if not isinstance(image, PIL.Image.Image):
                    raise ValueError(f"A list of `images` must contain PIL images, got a {type(image).__name__}.")
                if image.size != (W, H):
                    raise ValueError(f"`images` must be {W} pixels wide and {H} high, got an image of {image.size}.")
            if not images:
                raise ValueError("`images` is an empty list: give one image, or one for each.")
            images = VaeImageProcessor.pil_to_numpy([image.convert({1: "L", 3: "RGB"}.get(C)) for image in images])
            images = images.reshape(-1, H, W, C)  # gray ones have no axis of channels
        if isinstance(images, np.ndarray):
            if images.ndim != 4:
                raise ValueError(f"An array of `images` must have the shape (B, H, W, C), got {images.shape}.")
            images = VaeImageProcessor.numpy_to_pt(images)
        return self._network.to_levels(images)

    def _expand_mask(self, mask: np.ndarray | torch.Tensor | PIL.Image.Image, batch_size: int) -> torch.Tensor:
        """Checks that the mask is causal and returns it as bool (B, C, H, W)."""
        shape = (batch_size, *self._image_shape)
        if isinstance(mask, PIL.Image.Image):
            mask = np.array(mask.convert("L"))
        mask = torch.as_tensor(mask, device=self._execution_device) != 0
        try:
            given = mask.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"`mask` must have the shape (H, W) = {shape[2:]}, or broadcast to (B, C, H, W) = {shape}, got "
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
                f"{image}, but not the one before it. Given pixels must come first, from left to right and from top "
                "to bottom."
            )
        return given


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
