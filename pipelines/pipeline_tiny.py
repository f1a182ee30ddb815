"""
`TinyPipeline`: unconditional sampling, the base class of every pipeline here, and the front door to every checkpoint.

This file travels with checkpoints: it imports nothing but numpy, PIL, torch and diffusers.
"""

import contextlib
import glob
import importlib
import inspect
import json
import numbers
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import snapshot_download
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor


Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor

# Stock classes whose checkpoints are loaded into ours, which do the same and more.
_OURS = {
    "DDIMPipeline": "TinyPipeline",
    "DDPMPipeline": "TinyPipeline",
    "PNDMPipeline": "TinyPipeline",
    "DDIMScheduler": "TinyDDIMScheduler",
    "DDPMScheduler": "TinyDDPMScheduler",
}


# Variance types of DDPM that a network predicts; others of diffusers' say None where there is nothing to predict.
_LEARNED = ("learned", "learned_range")

# What no config of a small image's model goes beyond: with more, a hostile one has layers built without end.
_MAX_LAYERS, _MAX_SIDE, _MAX_CHANNELS, _MAX_SIZE = 64, 4096, 4096, 2**20


class Intermediate(NamedTuple):
    """
    One moment of the way from noise to image, in the call's `output_type`, for the whole batch.

    Args:
        timestep (`float`): The timestep t that the network was given.
        sample (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The noisy state x_t that the network saw.
        pred_original_sample (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The x_0 predicted from it.
    """

    timestep: float
    sample: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    pred_original_sample: list[PIL.Image.Image] | np.ndarray | torch.Tensor


@dataclass
class TinyPipelineOutput(ImagePipelineOutput):
    """
    Output of the pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` of shape `(B, H, W, C)` or `torch.Tensor` of shape `(B, C, H, W)`):
            The images: PIL ones are `L` where the network has one channel and `RGB` where it has three, arrays and
            tensors lie in [0, 1].
        intermediates (`list[Intermediate]`, *optional*):
            The states and x_0 predictions on the way, in the order of sampling, where `return_intermediates` asked.
    """

    intermediates: list[Intermediate] | None = None


class TinyPipeline(DiffusionPipeline):
    r"""
    Unconditional generation of small images with any network that is called as [`UNet2DModel`] is and any diffusers
    scheduler, and the front door to every checkpoint: `TinyPipeline.from_pretrained` returns the pipeline class that
    the checkpoint names.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, called as `unet(sample, timestep).sample`: a `TinyUNet2DModel`, a stock [`UNet2DModel`], ...
            One with twice as many output channels as input channels also predicts the variance.
        scheduler ([`SchedulerMixin`]):
            The scheduler that denoises with it: a `TinyDDIMScheduler`, a `TinyDDPMScheduler` or any stock one.

    Example:

    ```py
    >>> from tiny_diffusers import TinyPipeline

    >>> pipe = TinyPipeline.from_pretrained("path/or/hub-id")
    >>> images = pipe(batch_size=16, num_inference_steps=50).images
    ```
    """

    model_cpu_offload_seq = "unet"
    _network_name = "unet"  # the component that makes the images
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: torch.nn.Module, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    # ------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | None = None,
        return_intermediates: int | None = None,
    ) -> TinyPipelineOutput | tuple:
        r"""
        Samples a batch of images.

        Args:
            batch_size (`int`, *optional*, defaults to 1):
                The number of images.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes sampling deterministic. A list has one for each image, which is then independent of its batch.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of denoising steps, from 1 to the scheduler's `num_train_timesteps`.
            eta (`float`, *optional*, defaults to 0.0):
                η of [DDIM](https://huggingface.co/papers/2010.02502), eq. 16, in [0, 1]. For schedulers that know it;
                ignored by others.
            latents (`torch.Tensor` of shape `(batch_size, C, H, W)`, *optional*):
                The noise to begin with, drawn from N(0, I) where it is not given. It is scaled by the scheduler's
                `init_noise_sigma`.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`L` or `RGB`), `"np"` (`(B, H, W, C)` in [0, 1]), `"pt"` (`(B, C, H, W)` in [0, 1]) or
                `"latent"` (the denoised latents as they are, about [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)` after each step; may change
                the tensors in the `callback_kwargs` that it returns.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                The tensors that `callback_kwargs` holds, from the pipeline's `_callback_tensor_inputs`.
            timesteps (`list[int]`, *optional*):
                The timesteps to visit, decreasing, in place of `num_inference_steps`.
            return_intermediates (`int`, *optional*):
                K evenly spaced states and x_0 predictions are returned too, the first step's and the last one's
                among them.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: the images, and the intermediates where they were asked for.

        Raises:
            `ValueError`: for an argument outside what is said above; for a network that needs class labels; for
            samples that are not finite.
        """
        self._check_inputs(
            batch_size,
            num_inference_steps,
            timesteps,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
            return_intermediates,
        )
        if isinstance(self._network, UNet2DModel) and self._network.class_embedding is not None:
            raise ValueError(
                "The network is conditioned on classes and has no unconditional mode of its own: sample with "
                "`TinyConditionalPipeline(**pipe.components)` and `class_labels`."
            )
        latents = self._prepare_latents(batch_size, generator, latents)
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps)
        latents, intermediates = self._denoise(
            latents,
            lambda sample, timestep, step: self._predict(sample, timestep),
            self.scheduler,
            eta=eta,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            return_intermediates=return_intermediates,
        )
        return self._output(latents, intermediates, output_type, return_dict)

    @property
    def num_timesteps(self) -> int:
        """The number of the network's evaluations in the last call: twice the steps for a second-order scheduler."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the sampling, by setting `pipeline._interrupt`."""
        return self._interrupt

    @property
    def _network(self) -> torch.nn.Module:
        """The network itself, out of what `torch.compile` wraps it in."""
        network = getattr(self, self._network_name)
        return network._orig_mod if is_compiled_module(network) else network

    def _check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        timesteps: list[int] | None,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...],
        return_intermediates: int | None,
    ):
        self._check_output(batch_size, output_type)
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        if timesteps is not None:
            timesteps = [int(t) for t in timesteps]
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"{type(self.scheduler).__name__} takes no list of `timesteps`: give `num_inference_steps`, or use "
                    "`TinyDDIMScheduler`."
                )
            decreasing = all(later < earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False))
            if not timesteps or not decreasing or timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
                raise ValueError(
                    f"`timesteps` must decrease strictly within {num_train_timesteps - 1} to 0, got {timesteps}."
                )
        elif not _is_count(num_inference_steps) or num_inference_steps > num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` must be an integer from 1 to {num_train_timesteps}, the number of steps that "
                f"the model was trained with, got {num_inference_steps}."
            )
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"`eta` must lie in [0, 1], from 0 (DDIM) to 1 (DDPM), got {eta}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may name {self._callback_tensor_inputs}, got {unknown}."
            )
        if return_intermediates is not None and not _is_count(return_intermediates):
            raise ValueError(f"`return_intermediates` must be a positive integer or None, got {return_intermediates}.")

    def _check_output(self, batch_size: int, output_type: str):
        if not _is_count(batch_size):
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be one of 'pil', 'np', 'pt', 'latent', got {output_type!r}.")

    def _prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """The noise to begin with, on the device, in float32 (or float64 for a network of that)."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"A list of generators needs one for each image: got {len(generator)} for a batch of {batch_size}."
            )

        shape = (batch_size, *self._latents_shape)
        dtype = torch.promote_types(self._network.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape (batch size first) {shape}, got {tuple(latents.shape)}.")
        return latents.to(self._execution_device, dtype)

    @property
    def _latents_shape(self) -> tuple[int, ...]:
        """What an image begins with."""
        return self._image_shape

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        size = self._network.config.sample_size
        if size is None:
            raise ValueError("The network's config has no `sample_size`: set it to the side of its images in pixels.")
        height, width = (size, size) if isinstance(size, int) else size
        return self._network.config.in_channels, height, width

    def _preprocess(self, images: Images, batch_size: int | None, resize_arrays: bool = True) -> torch.Tensor:
        """Images in any form to (B, C, H, W) in [-1, 1]; PIL images are resized, and arrays and tensors if asked for."""
        channels, height, width = self._image_shape
        pixels = [
            torch.as_tensor(image)
            for image in (images if isinstance(images, (list, tuple)) else [images])
            if isinstance(image, (np.ndarray, torch.Tensor))
        ]
        for values in pixels:
            if not values.is_floating_point():
                raise ValueError(f"`images` as arrays and tensors must be floats in [0, 1], got {values.dtype}.")
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(
                    f"`images` as arrays and tensors must lie in [0, 1], got {values.min():.3g} to {values.max():.3g}."
                )
        processor = VaeImageProcessor(
            do_resize=resize_arrays or not pixels,
            vae_scale_factor=1,
            vae_latent_channels=0,  # images of four channels are no latents
            do_convert_rgb=channels == 3,
            do_convert_grayscale=channels == 1,
        )
        sample = processor.preprocess(images, height, width)
        if sample.shape[1:] != self._image_shape or len(sample) != (batch_size or len(sample)):
            raise ValueError(
                f"`images` must be {batch_size or 'B'} images of the shape (C, H, W) = {self._image_shape}, got "
                f"{tuple(sample.shape)}."
            )
        return sample.to(self._execution_device, torch.promote_types(self._network.dtype, torch.float32))

    def _set_timesteps(self, scheduler: SchedulerMixin, num_inference_steps: int, timesteps: list[int] | None):
        # The scheduler's tables stay on the CPU: looking them up with a timestep on a GPU waits for it at each step.
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps)
        else:
            scheduler.set_timesteps(timesteps=[int(t) for t in timesteps])
        self._num_timesteps = len(scheduler.timesteps)

    def _predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One pass of the network, for a sample in its dtype; the prediction comes back in float32 at least."""
        labels = {} if class_labels is None else {"class_labels": class_labels}
        model_output = self.unet(sample, timestep, **labels).sample
        return model_output.to(torch.promote_types(model_output.dtype, torch.float32))

    def _is_guided(self, step: int) -> bool:
        """
        Whether guidance leads beyond what the network predicts. DDIM must then take the noise anew from the clipped x_0:
        that of a prediction far outside [-1, 1] would take out of x_t what the clipped x_0 doesn't put back, and leave an
        image of another class.
        """
        return False

    def _denoise(
        self,
        latents: torch.Tensor,
        predict: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
        scheduler: SchedulerMixin,
        *,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...],
        return_intermediates: int | None,
    ) -> tuple[torch.Tensor, list[tuple[float, torch.Tensor, torch.Tensor]] | None]:
        """
        The one denoising loop: from `latents` of N(0, I), (B, C, H, W), to images in [-1, 1], with
        `predict(sample, timestep, step)` as the network.
        """
        channels = latents.shape[1]
        timesteps = scheduler.timesteps
        self._interrupt = False
        keep = set()
        if return_intermediates is not None:
            if return_intermediates > len(timesteps):
                raise ValueError(
                    f"`return_intermediates` = {return_intermediates} is more than the {len(timesteps)} steps there are."
                )
            keep = set(np.linspace(len(timesteps) - 1, 0, return_intermediates).round().astype(int).tolist())
        intermediates = []
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        step_parameters = inspect.signature(scheduler.step).parameters
        step_kwargs = {
            name: value for name, value in {"eta": eta, "generator": generator}.items() if name in step_parameters
        }
        # Only DDPM makes something of a learned variance: other schedulers get the mean's channels.
        learns_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in _LEARNED

        latents = latents * scheduler.init_noise_sigma
        dtype = self.unet.dtype
        on_device = timesteps.to(latents.device)
        for step, timestep in enumerate(self.progress_bar(timesteps)):
            # 1. the network's prediction
            sample = scheduler.scale_model_input(latents, timestep)
            model_output = predict(sample.to(dtype), on_device[step], step)
            if not learns_variance:
                model_output = model_output[:, :channels]

            # 2. x_t -> x_t-1
            if "use_clipped_model_output" in step_parameters:
                step_kwargs["use_clipped_model_output"] = self._is_guided(step)
            output = scheduler.step(model_output, timestep, latents, **step_kwargs)
            latents = output.prev_sample

            if step in keep:
                pred_original_sample = getattr(output, "pred_original_sample", None)
                if pred_original_sample is None:
                    pred_original_sample = predict_original_sample(
                        scheduler, model_output[:, :channels], timestep, sample
                    )
                intermediates.append((float(timestep), sample, pred_original_sample))

            if callback_on_step_end is not None:
                tensors = {"latents": latents}
                callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, step, timestep, callback_kwargs).pop("latents", latents)
            if self.interrupt:
                break

        return latents, intermediates if keep else None

    def _output(
        self,
        latents: torch.Tensor,
        intermediates: list[tuple[float, torch.Tensor, torch.Tensor]] | None,
        output_type: str,
        return_dict: bool,
    ) -> TinyPipelineOutput | tuple:
        """Images from [-1, 1] to what was asked for; the network goes back to where offloading keeps it."""
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"The samples hold values that are not finite: in {self._network.dtype} the network overflows or its "
                "weights are damaged. Of the dtypes, float32 and bfloat16 have the range for any network, float16 has "
                "not."
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

    def _to_images(self, sample: torch.Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        if output_type == "latent":
            return sample
        images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()  # (B, C, H, W) -> (B, H, W, C)
        return self.numpy_to_pil(images) if output_type == "pil" else images

    # ------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "TinyPipeline":
        r"""
        Loads a pipeline from a folder or the Hub, in float32 unless `torch_dtype` says otherwise.

        `TinyPipeline.from_pretrained` returns the class that the checkpoint's `model_index.json` names, a subclass's
        returns that subclass. Checkpoints of stock `DDIMPipeline` and `DDPMPipeline` are loaded too, with our
        schedulers in place of the stock ones. No code of the checkpoint's is run unless `trust_remote_code=True`, which
        our own classes never need, and from the Hub only JSON and safetensors are fetched.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder made by `save_pretrained`, or the id of such a repository on the Hub.
            kwargs:
                As for [`DiffusionPipeline.from_pretrained`]: `torch_dtype`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`, `variant`, `trust_remote_code`, components by name, ...

        Returns:
            [`TinyPipeline`]: The pipeline.

        Raises:
            `ValueError`: where there is no such checkpoint, or it names a class that is neither ours nor diffusers'.
        """
        trust_remote_code = kwargs.get("trust_remote_code", False)
        hub_kwargs = {
            name: kwargs.pop(name)
            for name in ("cache_dir", "force_download", "local_files_only", "token", "revision")
            if name in kwargs
        }
        folder = _local_folder(pretrained_model_name_or_path, trust_remote_code, **hub_kwargs)
        with _refusing_damage(folder):
            index = cls.load_config(folder)
        if not trust_remote_code:
            _check_components(index, folder)

        named = index["_class_name"]
        has_code = isinstance(named, list) and trust_remote_code
        if cls is TinyPipeline and named != cls.__name__ and not has_code:
            pipeline_class = _public_class(named)
            if pipeline_class is None or not issubclass(pipeline_class, TinyPipeline):
                raise ValueError(
                    f"{folder} is a checkpoint of {named}, which is no pipeline of ours: load it with "
                    "`diffusers.DiffusionPipeline.from_pretrained`, or with `trust_remote_code=True` if its code is in "
                    "the folder and you trust it."
                )
            pipeline = pipeline_class.from_pretrained(folder, **kwargs)
        else:
            with _refusing_damage(folder):
                pipeline = super().from_pretrained(folder, **kwargs)
            if "device_map" not in kwargs:
                _check_weights(pipeline, folder)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "TinyPipeline":
        """
        Makes a pipeline of this class with another's components, as [`DiffusionPipeline.from_pipe`] does, whatever the
        class of the network.
        """
        names, _ = cls._get_signature_keys(cls)
        components = {name: pipeline.components[name] for name in names if name in pipeline.components}
        return super().from_pipe(pipeline, **(components | kwargs))

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs,
    ) -> dict[str, Any] | tuple:
        """
        Loads a checkpoint's `model_index.json`, with each class of ours that it names, by whatever module, looked up
        in the package that is installed, and each stock class that we have a subclass of replaced by that.
        """
        loaded = super().load_config(pretrained_model_name_or_path, return_unused_kwargs, return_commit_hash, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(index, dict) or not index.get("_class_name"):
            raise ValueError(
                f"The model_index.json of {pretrained_model_name_or_path} names no pipeline `_class_name`."
            )

        named = index.get("_tiny_class_name") or index["_class_name"]
        named = named[-1] if isinstance(named, list) else named
        named = _OURS.get(named, named)
        if _public_class(named) is not None or not isinstance(index["_class_name"], list):
            index["_class_name"] = named
        for name, entry in index.items():
            if isinstance(entry, list) and len(entry) == 2 and name != "_class_name":
                library, class_name = entry
                ours = _public_class(_OURS.get(class_name, class_name) if library == "diffusers" else class_name)
                if ours is not None:
                    index[name] = [ours.__module__, ours.__name__]
        return loaded

    def save_config(self, save_directory: str | os.PathLike, **kwargs):
        """
        Writes `model_index.json`. Around a stock network it is written so that stock diffusers loads it without this
        package: as a `DDIMPipeline` with the stock scheduler that ours is a subclass of. Our own keys stay, in it and
        in the scheduler's config, and bring back our classes in `from_pretrained`.
        """
        super().save_config(save_directory, **kwargs)
        if "unet" not in self.components or type(self._network).__module__.partition(".")[0] != "diffusers":
            return

        stock = next(c for c in type(self.scheduler).__mro__ if c.__module__.partition(".")[0] == "diffusers")
        index = {"_class_name": "DDIMPipeline", "scheduler": ["diffusers", stock.__name__]}
        if type(self).__name__ != "TinyPipeline":
            index["_tiny_class_name"] = type(self).__name__
        _update_json(os.path.join(save_directory, self.config_name), index)
        scheduler_config = os.path.join(save_directory, "scheduler", self.scheduler.config_name)
        if os.path.isfile(scheduler_config):
            _update_json(scheduler_config, {"_class_name": stock.__name__})


def image_generators(seed: int, num_images: int, first: int = 0) -> list[torch.Generator]:
    """
    Returns one CPU generator for each image, so that an image is independent of its batch.

    Args:
        seed (`int`): Image i has the seed `seed + i`.
        num_images (`int`): Number of generators.
        first (`int`, *optional*, defaults to 0): Index i of the first image.
    """
    return [torch.Generator().manual_seed(seed + i) for i in range(first, first + num_images)]


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


def predict_original_sample(
    scheduler: SchedulerMixin, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """
    The x_0 that a network's output stands for, whatever the scheduler: [DDIM](https://huggingface.co/papers/2010.02502),
    eq. 9; v as in [Salimans & Ho](https://huggingface.co/papers/2202.00512), appendix D.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler, for its `alphas_cumprod` and `prediction_type`.
        model_output (`torch.Tensor` of shape `(B, C, H, W)`): What the network predicts.
        timestep (`torch.Tensor`, 0-dimensional): t, which solvers also take between the trained timesteps.
        sample (`torch.Tensor` of shape `(B, C, H, W)`): x_t, as the network saw it.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: The predicted x_0, neither clipped nor thresholded.
    """
    # Between the trained timesteps solvers take the log-SNR to be linear.
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


def _public_class(name: Any) -> type | None:
    """The public class of that name in the package that this file is installed in: none, for a copy that travels."""
    package = importlib.import_module(__name__.partition(".")[0])
    return getattr(package, name) if isinstance(name, str) and name in getattr(package, "__all__", ()) else None


def _local_folder(name_or_path: str | os.PathLike, trust_remote_code: bool, **hub_kwargs) -> str:
    """The folder of a checkpoint, fetched from the Hub where there is no such folder."""
    folder = str(name_or_path)
    if not os.path.isdir(folder):
        patterns = ["*.json", "*.safetensors"] + (["*.py"] if trust_remote_code else [])
        try:
            folder = snapshot_download(
                folder, allow_patterns=patterns, ignore_patterns=["checkpoint-*/*"], **hub_kwargs
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"'{name_or_path}' is neither a folder nor a model that can be had from the Hub: {reason}"
            ) from error
    if not os.path.isfile(os.path.join(folder, TinyPipeline.config_name)):
        raise ValueError(
            f"'{name_or_path}' has no {TinyPipeline.config_name}: give the folder or Hub id that a pipeline's "
            "`save_pretrained` made."
        )
    return folder


@contextlib.contextmanager
def _refusing_damage(folder: str) -> Iterator[None]:
    """Makes one line of what classes end in when a config gives them values of types that they don't expect."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the config
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder} can't be loaded, one of its configs is damaged ({reason}).") from error


def _check_components(index: dict[str, Any], folder: str):
    """Refuses an index with any component but networks and schedulers of ours and of diffusers'."""
    for name, entry in index.items():
        if not isinstance(entry, list) or name == "_class_name":
            continue
        if not name.isidentifier() or len(entry) != 2:
            raise ValueError(f"The model_index.json of {folder} is damaged: its entry {name!r} is {entry}.")
        library, class_name = entry
        if library is None:
            continue
        known = getattr(diffusers, str(class_name), None) if library == "diffusers" else _public_class(class_name)
        if not isinstance(known, type) or not issubclass(known, (ModelMixin, SchedulerMixin)):
            raise ValueError(
                f"{folder} names the class {class_name} of the module {library} as its {name}: only networks and "
                "schedulers of this package and of diffusers are loaded, unless you trust the checkpoint's code and pass "
                "`trust_remote_code=True`."
            )
        # Older diffusers run such a file in place of the library, unasked.
        if os.path.isfile(os.path.join(folder, name, f"{library}.py")):
            raise ValueError(f"{folder} has a {library}.py in its {name}, which poses as the library of that name.")
        _check_sizes(os.path.join(folder, name, known.config_name))
        for parts in glob.glob(os.path.join(glob.escape(os.path.join(folder, name)), "*.safetensors.index.json")):
            for part in _read_json(parts).get("weight_map", {}).values():
                if os.path.basename(str(part)) != part:
                    raise ValueError(f"{parts} names {part!r}, which is not a file beside it.")


def _check_sizes(config_path: str):
    """Refuses a component's config with a size that would take all memory, or all time, to build."""
    config = _read_json(config_path) if os.path.isfile(config_path) else {}
    for name, value in config.items():
        limits = {"layers": _MAX_LAYERS, "sample_size": _MAX_SIDE, "channels": _MAX_CHANNELS}
        limit = next((limit for part, limit in limits.items() if part in name), _MAX_SIZE)
        values = value if isinstance(value, list) else [value]
        integers = [v for v in values if isinstance(v, int)]
        if len(integers) > _MAX_LAYERS or any(abs(v) > limit for v in integers):
            raise ValueError(
                f"{config_path} has a {name} that is too large: at most {_MAX_LAYERS} integers of at most {limit} are "
                "loaded."
            )


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no names and values.")
    return content


def _check_weights(pipeline: DiffusionPipeline, folder: str):
    """Refuses a network with weights that the checkpoint lacks, which diffusers leaves without any values."""
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            missing = [weight for weight, values in component.named_parameters() if values.is_meta]
            if missing:
                raise ValueError(
                    f"{folder} is damaged: its {name} lacks {len(missing)} weights, {missing[0]} the first of them."
                )


def _update_json(path: str, changes: dict[str, Any]):
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({**content, **changes}, indent=2, sort_keys=True) + "\n")
