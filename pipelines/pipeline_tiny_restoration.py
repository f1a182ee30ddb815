"""`TinyRestorationPipeline`: samples of the images that a linear observation can have come from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler

from .pipeline_tiny import Generators, Images, StepCallback, TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels
from .pipeline_tiny_conditions import Conditions, ConditionsMixin
from .pipeline_tiny_editing import EditingMixin
from .pipeline_tiny_operators import LinearOperator


TASKS = ("inpaint", "super_resolution", "colorize", "deblur")
METHODS = ("ddnm", "pigdm")

# The variance of the images' values in [-1, 1] that pseudo-inverse guidance supposes.
_DATA_VARIANCE = 0.25

# Tensors of observed images lie in [0, 1] up to their noise, which is not expected to leave this distance from 0.5.
_MAX_OBSERVED = 5.0

# Pseudo-inverse guidance does nothing where x_t is nearly pure noise: its weight, s^2 / a, grows without bound there.
_MIN_SIGNAL = 1e-2


class _Step(NamedTuple):
    """Step from a noise level to the next, with x = a x_0 + s eps."""

    signal: float  # a
    next_signal: float
    level: float  # s
    next_level: float
    eta: float

    def mix(self, epsilon: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Replaces a share of the predicted noise by fresh noise, as much as DDIM (eq. 16) does."""
        ratio = self.next_level * self.signal / (self.level * self.next_signal)
        share = self.eta**2 * (1 - ratio**2)
        return (1 - share) ** 0.5 * epsilon + share**0.5 * fresh


class _Observation(NamedTuple):
    """What is observed of images, in coordinates of the operator: z = V^T x + noise."""

    operator: LinearOperator
    coordinates: torch.Tensor  # z, (B, *singular_values.shape)
    deviation: torch.Tensor  # of the noise, (*singular_values.shape)

    @property
    def is_noisy(self) -> bool:
        return bool(self.deviation.any())

    def missing(self, x_0: torch.Tensor) -> torch.Tensor:
        """Computes z - V^T x_0."""
        return self.coordinates - self.operator.coordinates(x_0)


@dataclass
class TinyRestorationPipelineOutput(TinyPipelineOutput):
    """
    Output class for restoration.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The samples, `num_images` of the first observation, then of the second, ....
        mean, std (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, *optional*):
            The mean and the standard deviation of each observation's samples, pixel by pixel, if
            `return_statistics=True`. The deviation is of values in [0, 1], and is not scaled to be seen.
    """

    mean: Images | None = None
    std: Images | None = None


class TinyRestorationPipeline(ClassConditioningMixin, ConditionsMixin, EditingMixin, TinyPipeline):
    r"""
    Pipeline for the restoration of images from y = A x + noise with a diffusion model that was not trained for it.
    A is a task by name (`inpaint`, `super_resolution`, `colorize`, `deblur`) or any linear function. Several samples
    for one observation show how ambiguous the answer is.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, with the call of [`UNet2DModel`].
        scheduler ([`SchedulerMixin`]):
            A scheduler whose noise levels and x_0 are used: DDIM, DDPM, `TinyFlowMatchScheduler` or
            `TinyEDMScheduler`, the last two with Euler's steps.
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
    >>> from tiny_diffusers import TinyRestorationPipeline

    >>> pipe = TinyRestorationPipeline.from_pretrained("path/or/hub-id")
    >>> images = pipe(load_image("16x16.png"), "super_resolution", factor=2, num_images=8).images
    ```
    """

    _callback_tensor_inputs = ["latents"]

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        operator: str | Callable[[torch.Tensor], torch.Tensor],
        mask_image: Images | None = None,
        factor: int | None = None,
        kernel: torch.Tensor | None = None,
        noise_std: float = 0.0,
        method: str = "ddnm",
        num_images: int = 1,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        jump_length: int = 1,
        jump_n_sample: int = 1,
        generator: Generators | None = None,
        num_inference_steps: int = 50,
        eta: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | list[float] | None = None,
        clip_sample: bool | None = None,
        return_statistics: bool = False,
        conditions: Conditions | None = None,
    ) -> TinyRestorationPipelineOutput | Any:
        r"""
        Samples images that explain observations.

        Args:
            image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`):
                The observations y, B of them. Of a task by name they are images, on the scale of images: all pixels for
                `inpaint` (those under the mask are not looked at), H / `factor` for `super_resolution`, gray ones for
                `colorize`, blurred ones for `deblur`. PIL images are converted but not resized. Arrays `(B, h, w, c)`
                and tensors `(B, c, h, w)` must lie in [0, 1]. Of a function they are its values, a tensor `(B, ...)`.
            operator (`str` or `Callable`):
                A: `"inpaint"`, `"super_resolution"`, `"colorize"`, `"deblur"`, or a linear function of images in [-1, 1],
                `(B, C, H, W)` -> `(B, ...)`. The function's matrix is built and decomposed once, and kept until another
                function is given or its values change: it gets float32 on the CPU. For 32x32x3 values this takes seconds,
                for 64x64x3 minutes and 5 GB.
            mask_image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*):
                The mask of `inpaint`, of the size of the images: white (from 0.5 on) is painted, black is kept.
            factor (`int`, *optional*):
                The factor of `super_resolution`, which divides the height and the width.
            kernel (`torch.Tensor` of shape `(h, w)`, *optional*):
                The kernel of `deblur`, with odd sides and the sum 1. The images are mirrored at their border.
            noise_std (`float`, *optional*, defaults to 0.0):
                The standard deviation of the observation's noise, on the scale of images in [-1, 1]: 2 / 255 is one gray
                level. With 0 the observation is matched exactly, and its errors are amplified where A hides much.
            method (`str`, *optional*, defaults to `"ddnm"`):
                `"ddnm"` puts what is observed into the predicted x_0
                ([DDNM](https://huggingface.co/papers/2212.00490), algorithm 1, and its noisy form, section 3.3), one
                pass of the network per step. `"pigdm"`
                ([pseudo-inverse guidance](https://openreview.net/forum?id=9_gsMA8MRKQ), eq. 7) pulls the sample
                toward what explains the observation, by the gradient of the network: about three times as slow.
            num_images (`int`, *optional*, defaults to 1):
                The number of samples for each observation.
            class_labels (`int`, `str`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The classes, as ids or names: one for each observation, or one for all. Required for a network with
                classes unless `guidance_scale` is 0.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in eps = w eps(x, c) + (1 - w) eps(x, null).
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The share of the steps that are guided, from 0 at the noise to 1 at the image.
            jump_length (`int`, *optional*, defaults to 1):
                The number of steps after which sampling jumps back to where they began.
            jump_n_sample (`int`, *optional*, defaults to 1):
                How often each step is taken, as in [RePaint](https://huggingface.co/papers/2201.09865). 1 never jumps.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per sample.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of noise levels.
            eta (`float`, *optional*, defaults to 1.0):
                The amount of fresh noise per step, in [0, 1]: 0 is DDIM, 1 is DDPM, whose scheduler always has 1.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1] or the `value_range`), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (unclipped, about [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyRestorationPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)` after each step. It returns
                `callback_kwargs`, whose tensors it may change.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                The tensors in `callback_kwargs`, from the pipeline's `_callback_tensor_inputs`.
            timesteps (`list[int]` or `list[float]`, *optional*):
                Custom timesteps in strictly decreasing order, instead of `num_inference_steps`: integers for a beta
                schedule, and floats for rectified flow and EDM.
            clip_sample (`bool`, *optional*):
                Whether to clip the predicted x_0 to the range of images, before what is observed is put in. Defaults to
                the scheduler's setting, and to True under guidance.
            return_statistics (`bool`, *optional*, defaults to `False`):
                Whether to return the mean and the standard deviation of each observation's samples as well.
            conditions (`dict[str, float]`, a list of them, `np.ndarray` or `torch.Tensor`, *optional*):
                The conditions by name in the units of the data, such as `{"age": 30, "smiling": 1}`, with a value for
                all images or a list of one for each; or values of shape `(B, D)`, in the order of
                `condition_statistics`. Required for a network with conditions unless `guidance_scale` is 0.

        Returns:
            [`TinyRestorationPipelineOutput`] or `tuple`: The samples, and their statistics.

        Raises:
            `ValueError`: If an argument is not as described above, the operator is not linear or not finite, the
                scheduler's levels are not known, or the samples are not finite.
        """
        self._check_output(1, output_type)
        self._check_num_images(num_images)
        self._check_steps(num_inference_steps, timesteps, eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must be in [0, 1], where 0 is DDIM and 1 is DDPM, got {eta}.")
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
        _check_noise(noise_std)
        on_step_end = self._wrap_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_guidance(guidance_scale, guidance_interval)
        built = self._prepare_operator(operator, mask_image, factor, kernel)
        observed = self._observed_coordinates(image, operator, built)
        num_given, batch_size = len(observed), len(observed) * num_images
        self._check_generator(generator, batch_size)
        labels, _ = self._encode_class_labels(class_labels, num_given, guidance_scale)
        conditions = self._encode_conditions(conditions, guidance_scale, num_given)
        scheduler = self._clipping_scheduler(self._clips(clip_sample, guidance_scale, guidance_interval))
        scheduler = self._set_timesteps(self._single_step(scheduler), num_inference_steps, timesteps)
        signals, levels = self._noise_levels(scheduler)
        if isinstance(scheduler, DDPMScheduler):
            eta = 1.0

        observed = observed.repeat_interleave(num_images, dim=0)
        observation = _Observation(built, observed, noise_std / built.singular_values)
        labels, conditions = self._repeat(num_images, labels, conditions)
        predict = self._guided_predict(labels, guidance_scale, guidance_interval, conditions=conditions)
        device_timesteps = scheduler.timesteps.to(observed.device)
        shape = torch.Size((batch_size, *self._image_shape))

        def take_step(latents: torch.Tensor, step: int) -> torch.Tensor:
            timestep = scheduler.timesteps[step]

            def predict_x_0(latents: torch.Tensor) -> torch.Tensor:
                sample = self._scale_model_input(scheduler, latents, timestep)
                model_output = predict(sample.to(self.unet.dtype), device_timesteps[step], step)[:, : shape[1]]
                return self._predict_x_0(scheduler, model_output, timestep, sample)

            method_step = _ddnm_step if method == "ddnm" else _pigdm_step
            levels_of_step = _Step(*signals[step : step + 2], *levels[step : step + 2], eta)
            return method_step(latents, predict_x_0, levels_of_step, observation, self._draw(shape, generator))

        latents = self._resample(scheduler, take_step, jump_length, jump_n_sample, shape, generator, on_step_end)
        output = self._postprocess(latents, None, output_type, True)
        mean = std = None
        if return_statistics:
            samples = self._to_images(latents, "pt").unflatten(0, (num_given, num_images))
            mean, std = samples.mean(dim=1), samples.std(dim=1, correction=0)
            if output_type != "latent":  # whose values are about [-1, 1]
                mean, std = (self._to_images(2 * part - 1, output_type) for part in (mean, std))
            if output_type == "np" and self._value_range is not None:
                std = std - self._value_range[0]
        output = TinyRestorationPipelineOutput(images=output.images, mean=mean, std=std)
        return output if return_dict else output.to_tuple()

    def _prepare_operator(
        self,
        operator: str | Callable,
        mask_image: Images | None,
        factor: int | None,
        kernel: torch.Tensor | None,
    ) -> LinearOperator:
        """Builds the operator, or takes the last one if it is of the same function."""
        options = {"mask_image": mask_image, "factor": factor, "kernel": kernel}
        needed = {"inpaint": "mask_image", "super_resolution": "factor", "deblur": "kernel"}
        if not callable(operator) and operator not in TASKS:
            raise ValueError(f"`operator` must be one of {', '.join(TASKS)}, or a linear function, got {operator!r}.")
        for name, value in options.items():
            if (value is not None) != (not callable(operator) and needed.get(operator) == name):
                takes = [task for task, option in needed.items() if option == name][0]
                raise ValueError(f"`{name}` is needed by the operator '{takes}', and by no other, got {operator!r}.")
        shape = self._image_shape
        if callable(operator):
            function, built = getattr(self, "_last_operator", (None, None))
            if function is not operator or built.image_shape != shape or not built.is_of(operator):
                built = LinearOperator.from_callable(operator, shape)
                self._last_operator = (operator, built)
        elif operator == "inpaint":
            hidden = self._preprocess_mask(mask_image, [])
            if len(hidden) != 1:
                raise ValueError(f"Give one `mask_image` for all observations, got {len(hidden)}.")
            built = LinearOperator.inpaint(shape, hidden[0, 0])
        elif operator == "super_resolution":
            built = LinearOperator.super_resolution(shape, factor)
        elif operator == "colorize":
            built = LinearOperator.colorize(shape)
        else:
            built = LinearOperator.deblur(shape, kernel)
        return built.to(self._execution_device, self._sample_dtype)

    def _observed_coordinates(self, image: Images, operator: str | Callable, built: LinearOperator) -> torch.Tensor:
        """Converts observations to the observed coordinates of the images, (B, *singular_values.shape)."""
        shape = built.image_shape if operator == "inpaint" else built.output_shape
        if callable(operator) and not isinstance(image, (np.ndarray, torch.Tensor)):
            raise ValueError(f"`image` must be the function's values, a tensor of shape {('B', *shape)}.")
        if callable(operator) or isinstance(image, torch.Tensor):  # noise may leave the range of images
            y = torch.as_tensor(image)
            if not callable(operator) and (not y.is_floating_point() or (y - 0.5).abs().max() > _MAX_OBSERVED):
                raise ValueError("Tensor `image` must be floats in [0, 1], up to their noise.")
            y = y.to(self._execution_device, self._sample_dtype)
            if y.shape[1:] != shape or not torch.isfinite(y).all():
                raise ValueError(
                    f"`image` must be observations of shape {('B', *shape)}, finite, got {tuple(y.shape)}."
                )
            y = y if callable(operator) else 2 * y - 1
        else:
            y = self._preprocess(self._from_values(image), None, image_shape=shape)
        return built.coordinates(y) if operator == "inpaint" else built.observed_coordinates(y)

    @torch.no_grad()
    def observe(
        self,
        image: Images,
        operator: str | Callable[[torch.Tensor], torch.Tensor],
        mask_image: Images | None = None,
        factor: int | None = None,
        kernel: torch.Tensor | None = None,
        noise_std: float = 0.0,
        generator: Generators | None = None,
    ) -> torch.Tensor:
        r"""
        Computes the observation y = A x + noise of whole images, to try a restoration out.

        Args:
            image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`):
                The images x, B of them.
            operator, mask_image, factor, kernel, noise_std:
                As for the restoration.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the noise deterministic.

        Returns:
            `torch.Tensor` of shape `(B, ...)`: The observations, as the call takes them: images in [0, 1] up to the noise
            for a task by name, with the hidden pixels gray for `inpaint`, and the function's values otherwise.
        """
        _check_noise(noise_std)
        built = self._prepare_operator(operator, mask_image, factor, kernel)
        x = self._preprocess(image, None)
        self._check_generator(generator, len(x))
        y = built(x)
        if noise_std:
            y = y + noise_std * self._draw(y.shape, generator)
        if operator == "inpaint":
            y = built.from_coordinates(built.observed_coordinates(y))
        return y if callable(operator) else y / 2 + 0.5


def _check_noise(noise_std: float):
    if not 0 <= noise_std < float("inf"):
        raise ValueError(f"`noise_std` must be at least 0 and finite, got {noise_std}.")


def _ddnm_step(
    latents: torch.Tensor,
    predict_x_0: Callable[[torch.Tensor], torch.Tensor],
    step: _Step,
    observation: _Observation,
    fresh: torch.Tensor,
) -> torch.Tensor:
    """
    Puts the observed coordinates into x_0, as far as their noise is below that of the next state: it then counts as a part
    of the next state's noise (DDNM, eq. 17 to 19, for each singular direction). The step's noise is that of x_0 before it, as
    in the authors' code.
    """
    operator, deviation = observation.operator, observation.deviation
    x_0 = predict_x_0(latents)
    noise = step.mix((latents - step.signal * x_0) / step.level, fresh)
    share = (step.next_level / (step.next_signal * deviation)).clamp(max=1) if observation.is_noisy else 1.0
    x_0 = x_0 + operator.from_coordinates(share * observation.missing(x_0))
    if step.next_level == 0:
        return x_0
    taken = step.next_signal * share * deviation / step.next_level  # of the noise, by the observation
    left = (1 - taken**2).clamp(min=0).sqrt()
    noise = noise + operator.from_coordinates((left - 1) * operator.coordinates(noise))
    return step.next_signal * x_0 + step.next_level * noise


def _pigdm_step(
    latents: torch.Tensor,
    predict_x_0: Callable[[torch.Tensor], torch.Tensor],
    step: _Step,
    observation: _Observation,
    fresh: torch.Tensor,
) -> torch.Tensor:
    """
    Replaces x_0 by its mean under the observation, with x_0 given x_t supposed to be normal, of a variance r^2 that is the
    same for all values: x_0 + (s^2 / a) (dx_0 / dx_t)^T A^T (r^2 A A^T + noise_std^2)^-1 (y - A x_0), which is shortened
    where it leads beyond the observation.
    """
    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        x_0 = predict_x_0(latents)
    variance = _DATA_VARIANCE * step.level**2 / (_DATA_VARIANCE * step.signal**2 + step.level**2)  # r^2
    missing = observation.missing(x_0.detach())
    pull = missing / (variance + observation.deviation**2)
    (gradient,) = torch.autograd.grad(x_0, latents, observation.operator.from_coordinates(pull))
    latents, x_0 = latents.detach(), x_0.detach()
    if step.signal > _MIN_SIGNAL:  # else x_t has nothing of the image
        correction = step.level**2 / step.signal * gradient
        x_0 = x_0 + _step_length(correction, pull, observation, missing) * correction
    if step.next_level == 0:
        if not observation.is_noisy:  # a last projection
            x_0 = x_0 + observation.operator.from_coordinates(observation.missing(x_0))
        return x_0
    noise = step.mix((latents - step.signal * x_0) / step.level, fresh)
    return step.next_signal * x_0 + step.next_level * noise


def _step_length(
    correction: torch.Tensor, pull: torch.Tensor, observation: _Observation, missing: torch.Tensor
) -> torch.Tensor:
    """
    Returns the share of each image's correction, (B, 1, 1, 1), that leads as far as the observation and no farther: the
    first step of conjugate gradients (https://huggingface.co/papers/2405.13712), at most 1. What is observed, such as
    the mean of many pixels, can vary by far more than r^2.
    """
    reached = observation.operator.coordinates(correction) + observation.deviation**2 * pull
    asked, reached = ((pull * part).flatten(1).sum(dim=1) for part in (missing, reached))
    return (asked / reached).nan_to_num(0.0).clamp(0, 1)[:, None, None, None]


# `custom_pipeline=` expects exactly one pipeline class in a file.
del TinyPipeline
