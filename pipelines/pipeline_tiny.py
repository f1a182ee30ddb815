"""`TinyPipeline`: unconditional sampling, the base class of every pipeline here, and the loader of every checkpoint."""

import contextlib
import copy
import difflib
import glob
import importlib
import inspect
import json
import math
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.pipelines.pipeline_utils import snapshot_download
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, logging
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor


if TYPE_CHECKING:
    from typing import Self  # new in Python 3.11

logger = logging.get_logger(__name__)

Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor
Generators = torch.Generator | list[torch.Generator]
StepCallback = Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks

# Stock classes, and the classes of this package that replace them on loading.
_REPLACEMENTS = {
    "DDIMPipeline": "TinyPipeline",
    "DDPMPipeline": "TinyPipeline",
    "PNDMPipeline": "TinyPipeline",
    "ConsistencyModelPipeline": "TinyPipeline",
    "DDIMScheduler": "TinyDDIMScheduler",
    "DDPMScheduler": "TinyDDPMScheduler",
    "FlowMatchEulerDiscreteScheduler": "TinyFlowMatchScheduler",
    "EDMEulerScheduler": "TinyEDMScheduler",
}


class _Objective(NamedTuple):
    """What a network is trained for, and what of stock diffusers fits it."""

    training: str  # in words
    arguments: list[tuple[set[str], set[str]]]  # of a scheduler's constructor: those that it has, and that it lacks
    solvers: tuple[str, ...]  # that a refusal suggests
    pipeline: str  # that loads a stock network with the scheduler as it is, and draws the same


_BETA_SOLVERS = tuple(solver.name for solver in KarrasDiffusionSchedulers)
_OBJECTIVES = {
    "betas": _Objective(
        "on a beta schedule",
        [({"trained_betas", "prediction_type"}, {"snr_shift_scale"})],
        ("DDIMScheduler", *_BETA_SOLVERS),
        "DDIMPipeline",
    ),
    "flow": _Objective(
        "for rectified flow",
        [({"use_flow_sigmas", "trained_betas"}, set()), ({"num_train_timesteps", "shift"}, {"stages", "n_grid"})],
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", *_BETA_SOLVERS),
        "DDPMPipeline",  # DDIMPipeline turns the scheduler into one of linear betas
    ),
    "edm": _Objective(
        "for EDM",
        [({"sigma_data", "sigma_schedule", "rho"}, set())],
        ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"),
        "ConsistencyModelPipeline",  # the only one that scales the network's input
    ),
}
_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

# Steps of sampling, if nobody says: of rectified flow by measurements, in docs/schedulers.md
CONSISTENCY_STEPS = 2
DEFAULT_STEPS = {"betas": 50, "flow": 20, "edm": 50}

# What a network's config must share with that of its guidance model: both are called with the same.
_NETWORK_CALL = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "num_conditions")

# The fresh noise of multistep solvers for flow and EDM, by measurements: docs/schedulers.md
_MULTISTEP_ETA = 1.5
# The highest noise level that a solver starts at, that of EDM (https://huggingface.co/papers/2206.00364, table 1). The
# cosine schedule ends at 20,291, from where no step of a second order leads to the image.
_SIGMA_MAX = 80.0

# The schedulers with custom timesteps for rectified flow and EDM.
_CONTINUOUS = (FlowMatchEulerDiscreteScheduler, EDMEulerScheduler)

# The variance types of DDPM that the network predicts.
_LEARNED = ("learned", "learned_range")

# Limits on integers in a component's config, by a part of the key. A malicious config could build layers without end.
_SIZE_LIMITS = {"layers": 64, "sample_size": 4096, "channels": 4096, "": 2**20}
_MAX_SIZES = 64  # integers in a list


class Intermediate(NamedTuple):
    """
    State of the whole batch at one denoising step, in the call's `output_type`.

    Args:
        timestep (`float`): The timestep t that was passed to the network.
        sample (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The noisy x_t that was passed to the network.
        pred_original_sample (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The x_0 predicted from it.
    """

    timestep: float
    sample: Images
    pred_original_sample: Images


@dataclass
class TinyPipelineOutput(ImagePipelineOutput):
    """
    Output class for the pipelines of this package.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images. PIL images have mode `L` for one channel, `RGB` for three and `RGBA` for four; of any other number
            they show the channels side by side. Tensors `(B, C, H, W)` lie in [0, 1], and arrays `(B, H, W, C)` as well,
            or in the pipeline's `value_range`.
        intermediates (`list[Intermediate]`, *optional*):
            The states and x_0 predictions in sampling order, if `return_intermediates` was given.
    """

    intermediates: list[Intermediate] | None = None


class TinyPipeline(DiffusionPipeline):
    r"""
    Pipeline for unconditional generation of small images, with any diffusers scheduler for what the network was
    trained for (a beta schedule, rectified flow or EDM), and any network that has [`UNet2DModel`]'s call. It also
    loads every checkpoint of this package: `TinyPipeline.from_pretrained` returns the pipeline class that the
    checkpoint names.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, called as `unet(sample, timestep).sample`, such as a `TinyUNet2DModel`, a
            `TinyTransformer2DModel` or a stock [`UNet2DModel`]. With twice as many output channels as input channels, it
            also predicts the variance.
        scheduler ([`SchedulerMixin`]):
            A scheduler to denoise the latents with `unet`: `TinyDDIMScheduler`, `TinyDDPMScheduler` or any stock one.
        value_range (`dict[str, float]`, *optional*):
            The `"low"` and `"high"` value of images that are not of 8 bits. Arrays are given and returned in it.
        guidance_model ([`ModelMixin`], *optional*):
            A weaker version of `unet`, to guide away from: a smaller network, or one that was trained for less long, on the
            same images, conditions and objective ([autoguidance](https://huggingface.co/papers/2406.02507)).

    `show_channels`, an attribute of every pipeline, is a list of the one or three channels that PIL images show.

    Example:

    ```py
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id")
    >>> images = pipe(batch_size=16, num_inference_steps=50).images
    ```
    """

    model_cpu_offload_seq = "unet"
    _network_name = "unet"  # the component that generates the images
    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _output_types = ("pil", "np", "pt", "latent")
    _optional_components = ["guidance_model"]

    show_channels: list[int] | None = None

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        value_range: Optional[dict] = None,
        guidance_model: Optional[torch.nn.Module] = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, guidance_model=guidance_model)
        self._register_value_range(value_range)
        self._objective = objective_of(scheduler)  # of the network, whatever scheduler is put in later

    # ------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
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
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> TinyPipelineOutput | Any:
        r"""
        Samples a batch of images.

        Args:
            batch_size (`int`, *optional*, defaults to 1):
                The number of images.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one generator per image, which makes each image independent of
                its batch.
            num_inference_steps (`int`, *optional*):
                The number of denoising steps, from 1 to the scheduler's `num_train_timesteps`. Defaults to 50, to
                20 for rectified flow, and to 2 for a consistency model, which draws all noise anew in each step; or to as
                many as there are.
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
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in w D(x) + (1 - w) D'(x), eq. 4 of [autoguidance](https://huggingface.co/papers/2406.02507), with the
                predictions D of `unet` and D' of `guidance_model`. 1 samples without guidance; values above 1 lead away
                from the errors of the weaker model, and need one.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The [share of the steps](https://huggingface.co/papers/2404.07724) that are guided, from 0 at the noise
                to 1 at the image. The other steps use w = 1.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: The images, and the intermediates if `return_intermediates` is given.

        Raises:
            `ValueError`: If an argument is not as described above, the scheduler is not for such a network, the network
                needs class labels, or the samples are not finite.
        """
        num_inference_steps = self._default_steps if num_inference_steps is None else num_inference_steps
        eta = self._default_eta if eta is None else eta
        self._check_output(batch_size, output_type, return_intermediates)
        self._check_steps(num_inference_steps, timesteps, eta)
        on_step_end = self._wrap_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if isinstance(self._network, UNet2DModel) and self._network.class_embedding is not None:
            raise ValueError(
                "The network is class-conditional and has no unconditional mode: sample with "
                "`TinyConditionalPipeline(**pipe.components)` and `class_labels`."
            )
        self._check_guidance(guidance_scale, guidance_interval)
        scheduler = self._clipping_scheduler(self._clips(clip_sample, guidance_scale, guidance_interval))
        latents = self._prepare_latents(batch_size, generator, latents)
        scheduler = self._set_timesteps(scheduler, num_inference_steps, timesteps)
        predict = self._guide((), None, guidance_scale, guidance_interval)
        latents, intermediates = self._denoise(
            latents, predict, scheduler, eta, generator, on_step_end, return_intermediates
        )
        return self._postprocess(latents, intermediates, output_type, return_dict)

    @property
    def components(self) -> dict[str, Any]:
        """Returns the components by name, as diffusers does, but no guidance model where there is none."""
        return {
            name: part for name, part in super().components.items() if name != "guidance_model" or part is not None
        }

    @property
    def num_timesteps(self) -> int:
        """Returns the number of network evaluations in the last call. A second-order scheduler takes two per step."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Returns the guidance scale w of the last call. A callback may change it by `pipeline._guidance_scale`."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Returns whether a callback has stopped sampling by setting `pipeline._interrupt`."""
        return self._interrupt

    @property
    def _network(self) -> torch.nn.Module:
        """Returns the network without the wrapper of `torch.compile`."""
        network = getattr(self, self._network_name)
        return network._orig_mod if is_compiled_module(network) else network

    @property
    def _sample_dtype(self) -> torch.dtype:
        """Returns the dtype of the samples: float32, or float64 for a float64 network."""
        return torch.promote_types(self._network.dtype, torch.float32)

    def _check_output(self, batch_size: int, output_type: str, return_intermediates: int | None = None):
        if not _is_positive_int(batch_size):
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size}.")
        if output_type not in self._output_types:
            allowed = ", ".join(map(repr, self._output_types))
            raise ValueError(f"`output_type` must be one of {allowed}, got {output_type!r}.")
        if return_intermediates is not None and not _is_positive_int(return_intermediates):
            raise ValueError(f"`return_intermediates` must be a positive integer or None, got {return_intermediates}.")

    def _register_value_range(self, value_range: dict[str, float] | None):
        """Saves the range of values in the pipeline's config, which of 8-bit images has none."""
        if value_range is None:
            return
        limits = {name: float(value_range.get(name, math.nan)) for name in ("low", "high")}
        if not -math.inf < limits["low"] < limits["high"] < math.inf:
            raise ValueError(f"`value_range` must be finite numbers, 'low' below 'high', got {value_range}.")
        self.register_to_config(value_range=limits)

    @property
    def _value_range(self) -> tuple[float, float] | None:
        """Returns the values that arrays have where tensors have 0 and 1, or None for 8-bit images: their arrays do, too."""
        limits = self.config.get("value_range")
        return None if limits is None else (limits["low"], limits["high"])

    @property
    def _default_steps(self) -> int:
        if self.scheduler.config.get("stochastic_sampling", False):
            return CONSISTENCY_STEPS
        return min(DEFAULT_STEPS[self._objective], self.scheduler.config.num_train_timesteps)

    @property
    def _default_eta(self) -> float:
        if getattr(self.scheduler, "order", 1) != 1:
            return 0.0
        return _MULTISTEP_ETA if self._is_multistep(self.scheduler) else 1.0

    @staticmethod
    def _is_multistep(scheduler: SchedulerMixin) -> bool:
        """Returns whether a scheduler is this package's multistep solver for flow or EDM."""
        return getattr(scheduler, "_has_continuous_timesteps", False) and scheduler.config.solver == "multistep"

    def _check_steps(self, num_inference_steps: int, timesteps: list[int] | list[float] | None, eta: float):
        check_scheduler(self.scheduler, self._objective)
        total = self.scheduler.config.num_train_timesteps
        if timesteps is not None:
            timesteps = self._as_timesteps(timesteps)
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"{type(self.scheduler).__name__} does not support custom `timesteps`: give `num_inference_steps` "
                    f"or use `{self._own_scheduler}`."
                )
            decreasing = timesteps == sorted(set(timesteps), reverse=True)
            if self._objective != "betas":
                if not timesteps or not decreasing or not isinstance(self.scheduler, _CONTINUOUS):
                    raise ValueError(
                        f"`timesteps` of a network that was trained {_OBJECTIVES[self._objective].training} must be "
                        f"strictly decreasing, with `{self._own_scheduler}`, got {timesteps} with "
                        f"{type(self.scheduler).__name__}."
                    )
                is_shifted = self.scheduler.config.get("shift", 1.0) != 1 or self.scheduler.config.get(
                    "use_dynamic_shifting"
                )
                if type(self.scheduler) is FlowMatchEulerDiscreteScheduler and is_shifted:
                    raise ValueError(
                        "FlowMatchEulerDiscreteScheduler shifts the noise levels of custom `timesteps`, and not what the "
                        f"network is told: use `{self._own_scheduler}`."
                    )
            elif not timesteps or not decreasing or timesteps[0] >= total or timesteps[-1] < 0:
                raise ValueError(f"`timesteps` must be strictly decreasing in [0, {total - 1}], got {timesteps}.")
        elif not _is_positive_int(num_inference_steps) or num_inference_steps > total:
            raise ValueError(
                f"`num_inference_steps` must be an integer from 1 to {total}, the number of training timesteps, got "
                f"{num_inference_steps}."
            )
        elif num_inference_steps < 2 * getattr(self.scheduler, "pndm_order", 0):  # its first steps are Runge-Kutta's
            raise ValueError(
                f"`num_inference_steps` must be at least {2 * self.scheduler.pndm_order} with "
                f"{type(self.scheduler).__name__}, got {num_inference_steps}: use `DPMSolverMultistepScheduler` for fewer."
            )
        if self._objective == "betas" and not 0.0 <= eta <= 1.0:
            raise ValueError(f"`eta` must be in [0, 1], where 0 is DDIM and 1 is DDPM, got {eta}.")
        if not 0.0 <= eta < math.inf:
            raise ValueError(f"`eta` must be at least 0, where 0 adds no noise and 1 as much as DDPM, got {eta}.")

    @property
    def _own_scheduler(self) -> str:
        """Returns the name of this package's first scheduler for the network."""
        return _REPLACEMENTS[_OBJECTIVES[self._objective].solvers[0]]

    def _as_timesteps(self, timesteps: Sequence) -> list[int] | list[float]:
        if self._objective != "betas":
            return [float(t) for t in timesteps]
        if any(int(t) != t for t in timesteps):
            raise ValueError(
                f"`timesteps` of a network that was trained on a beta schedule must be integers, got {timesteps}."
            )
        return [int(t) for t in timesteps]

    def _wrap_callback(self, callback: StepCallback | None, tensor_inputs: Sequence[str]) -> Callable[..., dict]:
        """Checks the tensor inputs and returns the callback, or none, as `on_step_end(step, timestep, tensors)`."""
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            allowed = self._callback_tensor_inputs
            raise ValueError(f"`callback_on_step_end_tensor_inputs` must be from {allowed}, got {unknown}.")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        self._callback_takes_x_0 = callback is not None and "pred_original_sample" in tensor_inputs

        def on_step_end(step: int, timestep: int | torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
            if callback is None:
                return tensors
            return callback(self, step, timestep, {name: tensors[name] for name in tensor_inputs})

        return on_step_end

    def _check_generator(self, generator: Generators | None, batch_size: int):
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"Give one generator or one per image: got {len(generator)} for a batch of {batch_size}.")

    def _check_num_frames(self, num_frames: int):
        if not isinstance(num_frames, numbers.Integral) or num_frames < 2:
            raise ValueError(f"`num_frames` must be an integer of at least 2, both ends included, got {num_frames}.")

    def _prepare_latents(
        self, batch_size: int, generator: Generators | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Draws the initial noise, or checks the given one, and returns it on the device in `_sample_dtype`."""
        self._check_generator(generator, batch_size)
        config = self._network.config
        shape = (batch_size, *self._latent_shape)
        if self._network_name == "unet" and "out_channels" in config and config.out_channels < shape[1]:
            raise ValueError(
                f"The network takes {shape[1]} channels and gives {config.out_channels}, so it needs an image as a "
                "condition: sample with `TinyConditionalPipeline` and its `conditioning`."
            )
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._sample_dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape (batch_size, ...) = {shape}, got {tuple(latents.shape)}.")
        return latents.to(self._execution_device, self._sample_dtype)

    @staticmethod
    def _truncate(latents: torch.Tensor, truncation: float) -> torch.Tensor:
        """Moves latents toward the mean of N(0, I), as [StyleGAN](https://huggingface.co/papers/1812.04948), appendix B."""
        if not 0 <= truncation <= 1:
            raise ValueError(
                f"`truncation` must be in [0, 1], where 1 leaves the latents as they are, got {truncation}."
            )
        return truncation * latents

    def _prepare_ends(self, seeds: tuple[int, int] | None, latents: torch.Tensor | None) -> torch.Tensor:
        """Draws the latents of two seeds, or checks the given ones, and returns them (2, ...) as `_prepare_latents`."""
        if seeds is None:
            return self._prepare_latents(2, None, latents)
        if len(seeds) != 2:
            raise ValueError(f"`seeds` must be two seeds, got {seeds}.")
        return self._prepare_latents(2, [torch.Generator().manual_seed(int(seed)) for seed in seeds], None)

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        """Returns the shape of the latents of one image: its own, or (D,) of a network whose latents are vectors."""
        latent_dim = self._network.config.get("latent_dim")
        return self._image_shape if latent_dim is None else (latent_dim,)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        """Returns the shape (C, H, W) of one image."""
        return self._shape_of(self._network.config)

    @staticmethod
    def _shape_of(config: Any) -> tuple[int, int, int]:
        """Returns the shape (C, H, W) of what a network with this config takes."""
        size = config.sample_size
        if size is None:
            raise ValueError("The network's config has no `sample_size`: set it to the side of its images in pixels.")
        height, width = _height_and_width(size)
        channels = config.in_channels if "in_channels" in config else config.out_channels  # of a GAN's generator
        return channels, height, width

    def _preprocess(
        self,
        images: Images,
        batch_size: int | None,
        resize_arrays: bool = True,
        image_shape: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        """
        Converts images to (B, C, H, W) in [-1, 1]. PIL images are resized, others if `resize_arrays`. With `image_shape`
        (C, H, W) instead of the network's, none are, and arrays lie in [0, 1].
        """
        resizes = image_shape is None
        if resizes:
            images = self._from_values(images)
        channels, height, width = image_shape = image_shape or self._image_shape
        given = images if isinstance(images, (list, tuple)) else [images]
        arrays = [torch.as_tensor(image) for image in given if isinstance(image, (np.ndarray, torch.Tensor))]
        for array in arrays:
            if not array.is_floating_point():
                raise ValueError(f"Array and tensor `images` must be floats in [0, 1], got {array.dtype}.")
            if not ((array >= 0) & (array <= 1)).all():
                raise ValueError(f"`images` must lie in [0, 1], got {array.min():.3g} to {array.max():.3g}.")
        if channels == 3 and any(getattr(image, "mode", "RGB") in ("1", "L", "LA", "I;16") for image in given):
            logger.warning("Gray images were converted to RGB, as the network has three channels.")
        sizes = {image.size for image in given if isinstance(image, PIL.Image.Image)}
        if not resizes and sizes - {(width, height)}:
            size = min(sizes - {(width, height)})
            raise ValueError(f"`image` must have the size {(width, height)}, got {size} (width, height).")
        processor = VaeImageProcessor(
            do_resize=resizes and (resize_arrays or not arrays),
            vae_scale_factor=1,
            vae_latent_channels=0,  # else images of four channels would be taken for latents
            do_convert_rgb=channels == 3,
            do_convert_grayscale=channels == 1,
        )
        sample = processor.preprocess(images, height, width)
        shape = tuple(sample.shape)
        if shape[1:] != image_shape or batch_size not in (None, len(sample)):
            raise ValueError(f"`images` must be {batch_size or 'B'} images of shape {image_shape}, got {shape}.")
        return sample.to(self._execution_device, self._sample_dtype)

    def _from_values(self, images: Images) -> Images:
        """Scales arrays in the value range to [0, 1], as tensors and PIL images are."""
        if self._value_range is None:
            return images
        low, high = np.float32(self._value_range).astype(np.float64)

        def scale(image: Any) -> Any:
            if not isinstance(image, np.ndarray):
                return image
            image = image.astype(np.float32).astype(np.float64)
            if not ((image >= low) & (image <= high)).all():
                raise ValueError(
                    f"Array `images` must lie in the value range [{low:g}, {high:g}], got {image.min():.3g} to "
                    f"{image.max():.3g}."
                )
            return ((image - low) / (high - low)).astype(np.float32)

        return [scale(image) for image in images] if isinstance(images, (list, tuple)) else scale(images)

    def _from_uint8(self, images: torch.Tensor) -> torch.Tensor:
        """Checks that images are uint8 and returns them on the device in float32, still from 0 to 255."""
        if self._value_range is not None:
            raise ValueError(f"Bits/dim are of 8-bit images, and this model's have values in {self._value_range}.")
        if images.dtype != torch.uint8:
            raise ValueError(f"`images` must be uint8, 0 to 255, got {images.dtype}.")
        return images.to(self._execution_device, torch.float32)

    @property
    def _can_clip(self) -> bool:
        return takes(self.scheduler, "clip_sample")

    def _clipping_scheduler(self, clip_sample: bool | None) -> SchedulerMixin:
        """Returns the pipeline's scheduler, or a copy that clips x_0, or does not, if that is given."""
        if clip_sample is None:
            return self.scheduler
        if not isinstance(clip_sample, bool):
            raise ValueError(f"`clip_sample` must be True, False or None, got {clip_sample!r}.")
        if not self._can_clip:
            raise ValueError(f"`clip_sample` means nothing to {type(self.scheduler).__name__}, which does not clip.")
        options = {"clip_sample": clip_sample}
        if not clip_sample and takes(self.scheduler, "thresholding"):
            options["thresholding"] = False
        return type(self.scheduler).from_config(self.scheduler.config, **options)

    def _set_timesteps(
        self, scheduler: SchedulerMixin, num_inference_steps: int, timesteps: list[int] | list[float] | None
    ) -> SchedulerMixin:
        """Sets the timesteps, and returns the scheduler to step with: the given one, or its copy of bounded noise."""
        # The scheduler's tensors stay on the CPU: indexing them with a timestep on the GPU would sync at each step.
        if timesteps is None:
            if self._objective == "betas":
                scheduler = _bound_noise(scheduler, num_inference_steps)
            num_inference_steps = min(num_inference_steps, scheduler.config.num_train_timesteps)
            scheduler.set_timesteps(num_inference_steps)
        else:
            scheduler.set_timesteps(timesteps=self._as_timesteps(timesteps))
        if scheduler.config.get("prediction_type") == "epsilon" and scheduler.config.get("rescale_betas_zero_snr"):
            last = len(scheduler.alphas_cumprod) - 1
            if scheduler.timesteps[0] == last and scheduler.alphas_cumprod[last] < 1e-7:
                raise ValueError(
                    f"Timestep {last} is pure noise (`rescale_betas_zero_snr`), from which `epsilon` predicts no image: "
                    'set `timestep_spacing="leading"`, or train with `v_prediction`.'
                )
        self._num_timesteps = len(scheduler.timesteps)
        return scheduler

    @property
    def _can_guide(self) -> bool:
        """Returns whether there is a weaker model to guide away from."""
        return self.guidance_model is not None

    def _check_guidance(self, guidance_scale: float, guidance_interval: tuple[float, float]):
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, got {guidance_scale}.")
        if guidance_scale != 1 and not self._can_guide:
            raise ValueError(
                f"`guidance_scale` must be 1 for a network without conditions, got {guidance_scale}: load the pipeline with "
                "a weaker network as its `guidance_model`."
            )
        start, end = guidance_interval
        if not 0 <= start <= end <= 1:
            raise ValueError(
                f"`guidance_interval` must be (start, end) with 0 <= start <= end <= 1, got {guidance_interval}."
            )
        for name in _NETWORK_CALL if self.guidance_model is not None else ():
            own, weaker = (network.config.get(name) for network in (self._network, self.guidance_model))
            if own != weaker:
                raise ValueError(f"The `guidance_model` has the {name} {weaker}, and the network {own}.")

    def _clips(
        self, clip_sample: bool | None, guidance_scale: float, guidance_interval: tuple[float, float]
    ) -> bool | None:
        """
        Returns whether x_0 is to be clipped if nobody says: under guidance, as samples that leave the range of images no
        longer converge to the class.
        """
        start, end = guidance_interval
        guided = self._can_guide and guidance_scale not in (0, 1) and start < end
        return True if clip_sample is None and guided and self._can_clip else clip_sample

    def _guide(
        self,
        condition: tuple[torch.Tensor | None, ...],
        null: tuple[torch.Tensor | None, ...] | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
    ) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
        """
        Returns the guided network as `predict(sample, timestep, step)`: w D(x, c) + (1 - w) D'(x). D'(x) is the guidance
        model's prediction by the same condition c, or, without a guidance model, the network's by the null condition. Outside
        the interval, and with neither of them, w = 1.
        """
        self._guidance_scale, (start, end) = guidance_scale, guidance_interval
        num_timesteps = self.num_timesteps  # of the whole schedule, whatever part of it is run
        guide = self.guidance_model
        if guide is None and null is None:
            start = end = 0.0

        def predict(sample: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
            w = self.guidance_scale if start <= step / num_timesteps < end else 1.0
            if w == 1:
                return self._predict(sample, timestep, *condition)
            if guide is not None:
                strong = self._predict(sample, timestep, *condition)
                weak = self._predict(sample.to(guide.dtype), timestep, *condition, network=guide)
            elif w == 0:
                return self._predict(sample, timestep, *null)
            else:
                both = (None if c is None else torch.cat([c, n]) for c, n in zip(condition, null, strict=True))
                strong, weak = self._predict(torch.cat([sample, sample]), timestep, *both).chunk(2)
            channels = sample.shape[1]
            mean = w * strong[:, :channels] + (1 - w) * weak[:, :channels]
            return torch.cat([mean, strong[:, channels:]], dim=1)

        return predict

    def _predict(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """Runs a network, `unet` by default, on a sample in its dtype. The prediction is in float32 at least."""
        given = {"class_labels": labels, "conditions": conditions}
        condition = {name: values for name, values in given.items() if values is not None}
        model_output = (self.unet if network is None else network)(x_t, timestep, **condition).sample
        return model_output.to(torch.promote_types(model_output.dtype, torch.float32))

    @staticmethod
    def _predict_x_0(
        scheduler: SchedulerMixin, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes [`predict_original_sample`], clipped or thresholded if the scheduler is one of ours and does that."""
        x_0 = predict_original_sample(scheduler, model_output, timestep, sample)
        return scheduler._clip(x_0) if getattr(scheduler, "_clips", False) else x_0

    # Stock schedulers for flow have neither, as their noise is N(0, I) and the network takes the sample itself.

    @staticmethod
    def _init_noise_sigma(scheduler: SchedulerMixin) -> float | torch.Tensor:
        return getattr(scheduler, "init_noise_sigma", 1.0)

    @staticmethod
    def _scale_model_input(scheduler: SchedulerMixin, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample

    def _denoise(
        self,
        latents: torch.Tensor,
        predict: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
        scheduler: SchedulerMixin,
        eta: float,
        generator: Generators | None,
        on_step_end: Callable[..., dict],
        return_intermediates: int | None,
        begin: int = 0,
    ) -> tuple[torch.Tensor, list[Intermediate] | None]:
        """
        Runs the denoising loop, from `latents` (B, C, H, W) of N(0, I) to images in [-1, 1]. The network is called as
        `predict(sample, timestep, step)`. With `begin`, the first timesteps are left out, and `latents` are the noisy
        images at the timestep of that index.
        """
        channels = latents.shape[1]
        self._num_timesteps = num_steps = len(scheduler.timesteps) - begin
        num_kept = return_intermediates or 0
        if num_kept > num_steps:
            raise ValueError(f"`return_intermediates` must be at most the {num_steps} steps, got {num_kept}.")
        kept_steps = set(np.linspace(num_steps - 1, 0, num_kept).round().astype(int).tolist())
        intermediates = []

        self._interrupt = False
        if begin == 0:
            latents = latents * self._init_noise_sigma(scheduler)
        take_step = self._step_function(scheduler, eta, generator, channels)
        dtype = self.unet.dtype
        device_timesteps = scheduler.timesteps.to(latents.device)
        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps[begin:])):
            sample = self._scale_model_input(scheduler, latents, timestep)
            model_output = predict(sample.to(dtype), device_timesteps[begin + step], begin + step)
            output = take_step(model_output, timestep, latents)
            latents = output.prev_sample  # x_t-1

            tensors = {"latents": latents}
            if step in kept_steps or self._callback_takes_x_0:
                x_0 = getattr(output, "pred_original_sample", None)
                if x_0 is None:
                    x_0 = predict_original_sample(scheduler, model_output[:, :channels], timestep, sample)
                tensors["pred_original_sample"] = x_0
            if step in kept_steps:
                intermediates.append(Intermediate(float(timestep), sample, x_0))

            latents = on_step_end(step, timestep, tensors).pop("latents", latents)
            if self.interrupt:
                break

        return latents, intermediates if kept_steps else None

    @staticmethod
    def _step_function(
        scheduler: SchedulerMixin, eta: float, generator: Generators | None, channels: int
    ) -> Callable[..., Any]:
        """Returns the scheduler's step as `step(model_output, timestep, latents)`, with the options that it has."""
        options = {"eta": eta, "generator": generator, "use_clipped_model_output": True}  # x_0 and eps belong to x_t
        step_parameters = inspect.signature(scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in step_parameters}
        # Only DDPM uses a learned variance. Other schedulers get the channels of the mean alone.
        learns_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in _LEARNED

        def take_step(model_output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor) -> Any:
            if not learns_variance:
                model_output = model_output[:, :channels]
            try:
                return scheduler.step(model_output, timestep, latents, **options)
            except NotImplementedError as error:
                raise ValueError(
                    f"{type(scheduler).__name__} can't use the network's `prediction_type` "
                    f"{scheduler.config.prediction_type!r}: use `DPMSolverMultistepScheduler`."
                ) from error

        return take_step

    def _postprocess(
        self, latents: torch.Tensor, intermediates: list[Intermediate] | None, output_type: str, return_dict: bool
    ) -> TinyPipelineOutput | Any:
        """Converts samples in [-1, 1] to the pipeline's output and offloads the network if offloading is enabled."""
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"The samples are not finite: the network overflows in {self._network.dtype}, or weights are damaged. "
                "The range of float32 and bfloat16 is enough for any network, that of float16 is not."
            )
        self.maybe_free_model_hooks()
        images = self._to_images(latents, output_type)
        if intermediates is not None:
            intermediates = [
                Intermediate(timestep, *(self._to_images(tensor, output_type) for tensor in tensors))
                for timestep, *tensors in intermediates
            ]
        output = TinyPipelineOutput(images=images, intermediates=intermediates)
        return output if return_dict else output.to_tuple()

    def _to_images(self, sample: torch.Tensor, output_type: str) -> Images:
        if output_type == "latent":
            return sample
        images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()  # (B, C, H, W) -> (B, H, W, C)
        if output_type == "np":
            low, high = np.float32(self._value_range or (0.0, 1.0))
            return (low + (high - low) * images).clip(low, high)  # rounding may leave the range
        return [to_picture(image, self.show_channels) for image in (images * 255).round().astype(np.uint8)]

    # ------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "Self":
        r"""
        Loads a pipeline from a folder or the Hub, in float32 unless `torch_dtype` is given.

        `TinyPipeline.from_pretrained` returns the class that the checkpoint's `model_index.json` names; a subclass
        returns itself. Stock `DDIMPipeline` and `DDPMPipeline` checkpoints are loaded with this package's schedulers.
        Of a `checkpoint-N` of a training run the averaged weights (EMA) are loaded.
        Code in the checkpoint runs only with `trust_remote_code=True`, which this package's classes never need.
        Without it, only JSON and safetensors files are downloaded from the Hub. Pickled weights are not read.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder written by `save_pretrained`, the id of such a repository on the Hub, or the name of a published
                model, such as `"mnist-32"`.
            kwargs:
                As for [`DiffusionPipeline.from_pretrained`]: `torch_dtype`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`, `variant`, `trust_remote_code`, components by name, ...

        Returns:
            [`TinyPipeline`]: The pipeline.

        Raises:
            `ValueError`: If there is no such checkpoint, or it is damaged or names a class of another package.
        """
        trust_remote_code = kwargs.get("trust_remote_code", False)
        hub_names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        hub_kwargs = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        kwargs.setdefault("use_safetensors", True)
        folder = _fetch_folder(pretrained_model_name_or_path, trust_remote_code, **hub_kwargs)
        with config_errors(folder):
            index = cls.load_config(folder)
        if not trust_remote_code:
            _check_components(index, folder, cls._get_signature_keys(cls)[0])

        class_name = index["_class_name"]
        has_code = isinstance(class_name, list) and trust_remote_code
        if (cls is TinyPipeline or isinstance(class_name, list)) and class_name != cls.__name__ and not has_code:
            pipeline_class = _public_class(class_name)
            if pipeline_class is None or not issubclass(pipeline_class, TinyPipeline):
                raise ValueError(
                    f"{folder} is a checkpoint of {class_name!r:.80}, which is not a pipeline of this package: load it "
                    "with `diffusers.DiffusionPipeline`, or with `trust_remote_code=True` if you trust the folder's code."
                )
            pipeline = pipeline_class.from_pretrained(folder, **kwargs)
        else:
            cls._refuse_latents(index)
            with config_errors(folder):
                pipeline = super().from_pretrained(folder, **kwargs)
            if "device_map" not in kwargs:
                _check_weights(pipeline, folder)
            for network in (getattr(pipeline, name, None) for name in ("unet", "guidance_model", "vae")):
                if isinstance(network, (UNet2DModel, AutoencoderKL)):
                    with config_errors(folder):
                        try_stock_network(network)
            for name in pipeline.components.keys() - kwargs.keys():
                ema = os.path.join(folder, f"{name}_ema", SAFETENSORS_WEIGHTS_NAME)
                if os.path.isfile(ema):
                    with config_errors(folder):
                        pipeline.components[name].load_state_dict(load_state_dict(ema))
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "Self":
        """
        Creates a pipeline from another's components, as [`DiffusionPipeline.from_pipe`], with any network class. It refuses
        a network that takes an image as a condition, or that denoises latents, unless this class takes it as well.
        """
        cls._refuse_latents(pipeline.components)
        if "unet" not in kwargs and "conditioning" not in inspect.signature(cls.__init__).parameters:
            cls._refuse_conditioning(pipeline.config.get("conditioning"))
        names, _ = cls._get_signature_keys(cls)
        components = {name: pipeline.components[name] for name in names if name in pipeline.components}
        new = super().from_pipe(pipeline, **(components | kwargs))
        new.show_channels = getattr(pipeline, "show_channels", None)
        if "unet" not in kwargs:  # the network was trained for the same, whatever the scheduler
            new._objective = getattr(pipeline, "_objective", new._objective)
        return new

    @classmethod
    def _refuse_latents(cls, components: dict[str, Any]):
        """Refuses the parts of a `TinyLatentPipeline`, unless this class takes them all."""
        if {"unet", "vae"} <= components.keys() and "vae" not in cls._get_signature_keys(cls)[0]:
            raise ValueError(
                f"The network denoises the latents of an autoencoder, and {cls.__name__} is for images: sample with "
                "`TinyLatentPipeline`."
            )

    @classmethod
    def _refuse_conditioning(cls, conditioning: str | None):
        if conditioning is not None:
            raise ValueError(
                f"The network takes an image as a condition ({conditioning}), which {cls.__name__} can't give: sample "
                "with `TinyConditionalPipeline`."
            )

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any] | tuple:
        """
        Loads a checkpoint's `model_index.json`. This package's classes are taken from the installed package, whatever
        module the index names, and replace the stock classes that they extend.
        """
        loaded = super().load_config(pretrained_model_name_or_path, return_unused_kwargs, return_commit_hash, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(index, dict) or not index.get("_class_name"):
            raise ValueError(f"The model_index.json of {pretrained_model_name_or_path} has no pipeline `_class_name`.")

        class_name = index.get("_tiny_class_name") or index["_class_name"]
        class_name = class_name[-1] if isinstance(class_name, list) else class_name
        class_name = _REPLACEMENTS.get(class_name, class_name)
        if _public_class(class_name) is not None or not isinstance(index["_class_name"], list):
            index["_class_name"] = class_name
        for name, entry in index.items():
            if isinstance(entry, list) and len(entry) == 2 and name != "_class_name":
                library, class_name = entry
                if library == "diffusers":
                    class_name = _REPLACEMENTS.get(class_name, class_name)
                ours = _public_class(class_name)
                if ours is not None:
                    index[name] = [ours.__module__, ours.__name__]
        return loaded

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any):
        """
        Writes `model_index.json`. With a stock network, it names `DDIMPipeline` (`DDPMPipeline` for rectified flow,
        `ConsistencyModelPipeline` for EDM) and the stock parent of the scheduler: diffusers then loads the checkpoint
        without this package. This package's own keys stay in both configs, and `from_pretrained` restores its classes.
        It names this package's classes for what no stock pipeline draws: images by an image as a condition, in a value
        range, or of other than 1, 3 or 4 channels, latents, and for EDM images that are not square.
        """
        super().save_config(save_directory, **kwargs)
        index_path = os.path.join(save_directory, self.config_name)
        if "guidance_model" not in self.components:  # stock pipelines warn of names that they don't know
            _write_json(index_path, {k: v for k, v in _read_json(index_path).items() if k != "guidance_model"})
        if "unet" not in self.components or type(self._network).__module__.partition(".")[0] != "diffusers":
            return
        is_rectangle = isinstance(self._network.config.sample_size, (list, tuple))
        draws_pictures = self._value_range is None and self._image_shape[0] in (1, 3, 4)
        if self.config.get("conditioning") is not None or "vae" in self.components or not draws_pictures:
            return
        if self._objective == "edm" and is_rectangle:  # `ConsistencyModelPipeline` draws squares alone
            return

        stock = next(c for c in type(self.scheduler).__mro__ if c.__module__.partition(".")[0] == "diffusers")
        index = {"_class_name": _OBJECTIVES[self._objective].pipeline, "scheduler": ["diffusers", stock.__name__]}
        if type(self).__name__ != "TinyPipeline":
            index["_tiny_class_name"] = type(self).__name__
        scheduler_path = os.path.join(save_directory, "scheduler", self.scheduler.config_name)
        for path, values in {index_path: index, scheduler_path: {"_class_name": stock.__name__}}.items():
            if os.path.isfile(path):
                _write_json(path, _read_json(path) | values)


def takes(scheduler: SchedulerMixin, name: str) -> bool:
    """Returns whether a scheduler has a setting: its config can also hold those of the one that it was made from."""
    return name in inspect.signature(type(scheduler).__init__).parameters


def objective_of(scheduler: SchedulerMixin) -> str:
    """
    Returns what a scheduler's config is for: `"flow"` (rectified flow), `"edm"` (EDM's preconditioning) or `"betas"`
    (the noise levels of a beta schedule). `from_config` keeps unknown keys, so the objective survives a change of
    scheduler.
    """
    config = scheduler.config
    if takes(scheduler, "sigma_data"):
        return "edm"
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    if "sigma_data" in config:
        return "edm"
    return "flow" if "shift" in config and "trained_betas" not in config else "betas"


def check_scheduler(scheduler: SchedulerMixin, objective: str = "betas"):
    """
    Checks that a scheduler fits a network.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        objective (`str`, *optional*, defaults to `"betas"`):
            What the network was trained for, from [`objective_of`] the scheduler that it was trained with.

    Raises:
        `ValueError`: If the scheduler is for other networks. The error names the nearest one that fits.
    """
    name, config, training = type(scheduler).__name__, scheduler.config, _OBJECTIVES[objective].training
    if config.get("stochastic_sampling") and not takes(scheduler, "stochastic_sampling"):
        raise ValueError(
            f"{name} solves an ODE, and the network is a consistency model: use `TinyFlowMatchScheduler`."
        )
    if not _is_for(type(scheduler), objective):
        known = _OBJECTIVES[objective].solvers
        fitting = [
            solver.removesuffix("Scheduler") for solver in known if _is_for(getattr(diffusers, solver), objective)
        ]
        nearest = difflib.get_close_matches(name.removesuffix("Scheduler"), fitting, n=1, cutoff=0.4) or fitting
        raise ValueError(
            f"{name} is not for a network that was trained {training}: use `{nearest[0]}Scheduler.from_config` with "
            "the config of the checkpoint's scheduler."
        )
    kinds = {"betas": _PREDICTION_TYPES, "flow": ("flow_prediction",)}.get(objective)
    if kinds and "trained_betas" in config and _is_for(type(scheduler), "betas"):
        needs_flow = objective == "flow"
        if config.prediction_type not in kinds or bool(config.get("use_flow_sigmas")) != needs_flow:
            raise ValueError(
                f"The network was trained {training}, but {name} is set to another kind: its `prediction_type` must "
                f"be one of {', '.join(kinds)}, got {config.prediction_type!r}, and `use_flow_sigmas` {needs_flow}."
            )


def _is_for(scheduler_class: type, objective: str) -> bool:
    """Returns whether a scheduler's class denoises, without further inputs, what such a network predicts."""
    arguments = inspect.signature(scheduler_class.__init__).parameters.keys()
    fits = any(present <= arguments and not absent & arguments for present, absent in _OBJECTIVES[objective].arguments)
    if not fits or "Inverse" in scheduler_class.__name__:
        return False
    step = inspect.signature(scheduler_class.step).parameters.values()
    return [p.name for p in step if p.default is p.empty] == ["self", "model_output", "timestep", "sample"]


def _bound_noise(scheduler: SchedulerMixin, num_inference_steps: int) -> SchedulerMixin:
    """
    Returns a copy of a solver that knows the noise levels up to `_SIGMA_MAX` alone, so that it starts there. DDIM and
    DDPM, and a solver without higher levels, are returned as they are.
    """
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5  # (T,)
    total = max(1, int((sigmas <= _SIGMA_MAX).sum()))
    # Stock solvers space `trailing` timesteps by arange, which by rounding can have one too many: then take fewer levels.
    while len(np.arange(total, 0, -total / num_inference_steps)) > num_inference_steps:
        total -= 1
    if total == len(sigmas) or isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
        return scheduler
    bounded = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.shape == sigmas.shape:
            setattr(bounded, name, value[:total])
    bounded.register_to_config(num_train_timesteps=total)
    return bounded


def image_generators(seed: int, num_images: int, first: int = 0) -> list[torch.Generator]:
    """
    Returns one CPU generator per image, which makes each image independent of its batch.

    Args:
        seed (`int`): Image i has the seed `seed + i`.
        num_images (`int`): Number of generators.
        first (`int`, *optional*, defaults to 0): Index i of the first image.
    """
    return [torch.Generator().manual_seed(seed + i) for i in range(first, first + num_images)]


def to_picture(pixels: np.ndarray, show_channels: Sequence[int] | None = None) -> PIL.Image.Image:
    """
    Converts an image of any number of channels to a picture.

    Args:
        pixels (`np.ndarray` of shape `(H, W, C)`): The image, uint8.
        show_channels (`list[int]`, *optional*): The one or three channels to show, in gray or as red, green and blue.

    Returns:
        `PIL.Image.Image`: `L` for one channel, `RGB` for three and `RGBA` for four; else the channels side by side, `L`.

    Raises:
        `ValueError`: If `show_channels` names other than one or three channels, or one that the image lacks.
    """
    channels = pixels.shape[-1]
    if show_channels is not None:
        check_shown_channels(show_channels, channels)
        pixels = pixels[..., list(show_channels)]
    elif channels not in (1, 3, 4):
        pixels = np.concatenate(np.split(pixels, channels, axis=-1), axis=1)  # (H, W, C) -> (H, C W, 1)
    # diffusers' `numpy_to_pil` squeezes gray images, and with them the sides of a single pixel.
    return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def check_shown_channels(show_channels: Sequence[int], channels: int):
    """Checks that `show_channels` names one or three of the channels of an image."""
    if len(show_channels) not in (1, 3) or not all(0 <= channel < channels for channel in show_channels):
        raise ValueError(
            f"`show_channels` must be one or three of the channels 0 to {channels - 1}, got {list(show_channels)}."
        )


def slerp(start: torch.Tensor, end: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """
    Computes the spherical linear interpolation (sin((1 - s) θ) x + sin(s θ) y) / sin θ, where θ is the angle between x
    and y ([DDIM](https://huggingface.co/papers/2010.02502), eq. 67; Shoemake, 1985).

    Args:
        start (`torch.Tensor` of shape `(1, ...)`): x.
        end (`torch.Tensor` of shape `(1, ...)`): y.
        share (`torch.Tensor` of shape `(N, 1, ...)`): s, from 0 at x to 1 at y.

    Returns:
        `torch.Tensor` of shape `(N, ...)`: The interpolated points, in order.
    """
    theta = torch.acos(torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1))
    if torch.sin(theta) < 1e-4:  # x and y are collinear: no arc between them is unique
        return torch.lerp(start, end, share)
    return (torch.sin((1 - share) * theta) * start + torch.sin(share * theta) * end) / torch.sin(theta)


def predict_original_sample(
    scheduler: SchedulerMixin, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """
    Computes the predicted x_0 from a network's output, for any scheduler: eq. 9 of
    [DDIM](https://huggingface.co/papers/2010.02502), appendix D of
    [Salimans & Ho](https://huggingface.co/papers/2202.00512) for v, eq. 1 of
    [rectified flow](https://huggingface.co/papers/2209.03003), or eq. 7 of
    [EDM](https://huggingface.co/papers/2206.00364).

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        model_output (`torch.Tensor` of shape `(B, C, H, W)`): The network's prediction.
        timestep (`torch.Tensor`, 0-dimensional): t. Solvers may use values between the training timesteps.
        sample (`torch.Tensor` of shape `(B, C, H, W)`): x_t, as it was passed to the network.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: The predicted x_0, neither clipped nor thresholded.
    """
    objective = objective_of(scheduler)
    if objective == "flow":
        return sample - float(timestep) / scheduler.config.num_train_timesteps * model_output
    if objective == "edm":
        sigma, sigma_data = math.exp(4 * float(timestep)), scheduler.config.sigma_data
        x_t = sample * (sigma**2 + sigma_data**2) ** 0.5
        return scheduler.precondition_outputs(x_t, model_output, sigma)

    # Solvers interpolate the log-SNR linearly between the training timesteps.
    log_snr = torch.logit(scheduler.alphas_cumprod.double())
    position = float(timestep)
    low = int(position)
    high = min(low + 1, len(log_snr) - 1)
    alpha_prod = torch.sigmoid(torch.lerp(log_snr[low], log_snr[high], position - low)).item()

    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return (sample - (1 - alpha_prod) ** 0.5 * model_output) / alpha_prod**0.5
    if prediction_type == "v_prediction":
        return alpha_prod**0.5 * sample - (1 - alpha_prod) ** 0.5 * model_output
    return model_output


def _height_and_width(size: int | Sequence[int]) -> Sequence[int]:
    """Returns the height and width of a network's `sample_size`, the side of squares or a pair."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(_is_positive_int, pair)):
        raise ValueError(
            f"`sample_size` must be the side of the images in pixels, or their height and width, got {size!r}."
        )
    return pair


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


def _public_class(name: Any) -> type | None:
    """Returns the public class of that name in the package of this file, or None. In a traveling copy it is None."""
    package = importlib.import_module(__name__.partition(".")[0])
    return getattr(package, name) if isinstance(name, str) and name in getattr(package, "__all__", ()) else None


def _fetch_folder(name_or_path: str | os.PathLike, trust_remote_code: bool, **hub_kwargs: Any) -> str:
    """Returns the folder of a checkpoint, a published one's by its name, or downloaded from the Hub if there is none."""
    published = ()
    if __package__ == "tiny_diffusers.pipelines":  # a copy travels without the rest of the package
        zoo = importlib.import_module("..zoo", __package__)
        name_or_path, published = zoo.find_published(name_or_path), zoo.NAMES
    folder = os.path.expanduser(name_or_path)
    if not os.path.isdir(folder):
        parent = os.path.dirname(folder)
        if os.path.isdir(parent):  # runs/mnist is no Hub id where there is a folder runs
            near = difflib.get_close_matches(os.path.basename(folder), os.listdir(parent), n=1)
            hint = f" Did you mean '{os.path.join(parent, near[0])}'?" if near else ""
            raise ValueError(f"There is no folder '{name_or_path}'.{hint}")
        files = ["*.json", "*.safetensors"] + (["*.py"] if trust_remote_code else [])
        try:
            folder = snapshot_download(folder, allow_patterns=files, ignore_patterns=["checkpoint-*/*"], **hub_kwargs)
        except (OSError, ValueError) as error:
            is_id = isinstance(error, OSError)  # of the network, or the Hub's answer
            reason = str(error).strip().partition("\n")[0] if is_id else "whose names are of the form owner/name"
            near = difflib.get_close_matches(folder, published, n=1)
            hint = f" Did you mean the published model '{near[0]}'?" if near else ""
            raise ValueError(
                f"There is no folder '{name_or_path}' here, and no model of that name that can be loaded from the Hub "
                f"({reason}).{hint}"
            ) from error
    config_name = TinyPipeline.config_name
    if not os.path.isfile(os.path.join(folder, config_name)):
        raise ValueError(f"'{name_or_path}' has no {config_name}: give a folder or Hub id of a saved pipeline.")
    return folder


@contextlib.contextmanager
def config_errors(source: str) -> Iterator[None]:
    """Turns the errors that wrong values in the configs of `source` cause into a `ValueError` of one line."""
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):  # RuntimeErrors that have nothing to do with the config
        raise
    except (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{source} can't be loaded: one of its configs is damaged ({reason}).") from error
    except ValueError as error:
        raise ValueError(f"{source} can't be loaded: {' '.join(str(error).split())}") from error


def try_stock_network(network: UNet2DModel | AutoencoderKL):
    """Passes an image without values through a stock network: it takes configs whose values do not go together."""
    config = network.config
    if config.sample_size is None:
        return
    height, width = _height_and_width(config.sample_size)
    with torch.device("meta"), torch.no_grad():
        trial = type(network).from_config(config)
        sample = torch.zeros(1, config.in_channels, height, width)
        if isinstance(network, AutoencoderKL):
            trial(sample)
            return
        first = torch.zeros(1, dtype=torch.long)
        trial(sample, first, class_labels=None if network.class_embedding is None else first)


def _check_components(index: dict[str, Any], folder: str, expected: set[str]):
    """
    Checks that all components are networks and schedulers that are loaded without trust, and of reasonable size. Those
    that the pipeline expects are pairs of a library and a class: older versions of diffusers unpack whatever has two
    parts.
    """
    if os.path.isfile(os.path.join(folder, "None.py")):  # which older versions of diffusers run as the pipeline's code
        raise ValueError(f"{folder} has a file None.py, which poses as a custom pipeline.")
    for name, entry in index.items():
        if name == "_class_name" or not (isinstance(entry, list) or name in expected):
            continue
        if not name.isidentifier() or not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"The model_index.json of {folder} is damaged: its entry {name!r} is {entry!r}.")
        library, class_name = entry
        absent = library is None and class_name is None
        if library == "diffusers":  # whose other networks have another call, and some take all memory to be built
            networks = AutoencoderKL if name == "vae" else UNet2DModel
            known, kinds = getattr(diffusers, str(class_name), None), (networks, SchedulerMixin)
        else:
            known, kinds = _public_class(class_name), (ModelMixin, SchedulerMixin)
        if not absent and not (isinstance(known, type) and issubclass(known, kinds)):
            raise ValueError(
                f"{folder} names the class {class_name!r:.80} of the module {library!r:.80} as its {name}, but only "
                "networks and schedulers of this package, and UNet2DModel, AutoencoderKL (as vae) and schedulers of "
                "diffusers, are loaded. If you trust the checkpoint's code, pass `trust_remote_code=True`."
            )
        # Older versions of diffusers run such a file instead of the library, without asking.
        if os.path.isfile(os.path.join(folder, name, f"{library}.py")):
            raise ValueError(f"{folder} has a file {name}/{library}.py, which poses as the library {library}.")
        if absent:
            continue
        path = os.path.join(folder, name, known.config_name)
        if os.path.isfile(path):
            check_config(_read_json(path), known, path)
        for path in glob.glob(os.path.join(glob.escape(folder), name, "*.safetensors.index.json")):
            for shard in _read_json(path).get("weight_map", {}).values():
                if os.path.basename(str(shard)) != shard:
                    raise ValueError(f"{path} names {shard!r}, which is not a file in the same folder.")


def check_config(config: dict[str, Any], component_class: type, path: str):
    """
    Checks the values in a component's config: that none is of another type than the constructor's default, which many
    would find in use alone, and that no size is so large that building it would take all memory or time.
    """
    parameters = inspect.signature(component_class.__init__).parameters
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        default = parameters[name].default if name in parameters else None
        if not all(_is_like(default, v) for v in ([value] if isinstance(default, float) else values)):
            raise ValueError(f"{path} is damaged: {name} is {value!r:.80}, but {default!r} by default.")
        limit = next(limit for part, limit in _SIZE_LIMITS.items() if part in name)
        sizes = [v for v in values if isinstance(v, int)]
        if len(sizes) > _MAX_SIZES or any(abs(size) > limit for size in sizes):
            raise ValueError(f"{path}: {name} is too large, at most {_MAX_SIZES} integers up to {limit} are allowed.")


def _is_like(default: Any, value: Any) -> bool:
    """Checks that a value is of the kind of a default: a finite number, a name, or None instead of an int or a name."""
    if isinstance(default, float):
        return isinstance(value, numbers.Real) and (abs(value) < math.inf or not abs(default) < math.inf)
    if isinstance(default, int) and not isinstance(default, bool):
        return value is None or (isinstance(value, numbers.Real) and abs(value) < math.inf)
    return value is None or isinstance(value, str) or not isinstance(default, str)


def _check_weights(pipeline: DiffusionPipeline, folder: str):
    """Checks that the checkpoint has all weights of the networks. diffusers leaves missing ones on the meta device."""
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            missing = [weight for weight, values in component.named_parameters() if values.is_meta]
            if missing:
                raise ValueError(f"{folder} is damaged: its {name} lacks {len(missing)} weights, first {missing[0]}.")


def _write_json(path: str, content: dict[str, Any]):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object.")
    return content
