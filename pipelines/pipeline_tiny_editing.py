"""`EditingMixin`: what pipelines that start from given images share: noise levels, strength, inversion and resampling."""

import math
from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor


Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor
Generators = torch.Generator | list[torch.Generator]

# With two passes of the network per step, 20 steps invert a model's samples as closely as 100 steps with one.
_INVERSION_ITERATIONS = 2


class EditingMixin:
    """
    Mixin for a [`DiffusionPipeline`] that starts from given images.

    A noisy image is x = a x_0 + s eps, with eps from N(0, I). State k of sampling, of N steps, is x at the timestep k of
    the scheduler, and state N is the image.
    """

    # 1. Input

    def _check_num_images(self, num_images: int):
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"`num_images` must be an integer of at least 1, got {num_images!r}.")

    @staticmethod
    def _repeat(num_images: int, *given: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Repeats what is given for each image for each of its `num_images` samples."""
        return [None if each is None else each.repeat_interleave(num_images, dim=0) for each in given]

    def _preprocess_mask(self, mask_image: Images, image: Images) -> torch.Tensor:
        """Converts masks to (B, 1, H, W), True where they are white, and checks them against the images."""
        _, height, width = self._image_shape
        sizes = {each.size for each in _as_list(image) if isinstance(each, PIL.Image.Image)}
        masks = []
        for mask in _as_list(mask_image):
            if isinstance(mask, PIL.Image.Image):
                if sizes - {mask.size}:
                    size = min(sizes - {mask.size})
                    raise ValueError(
                        f"`mask_image` must have the size of the image, {size}, got {mask.size} (width, height)."
                    )
                mask = np.asarray(mask.convert("L").resize((width, height), PIL.Image.Resampling.NEAREST)) / 255
            mask = torch.as_tensor(np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)).float()
            if mask.ndim == 4 and 1 in (mask.shape[-1], mask.shape[1]):  # (B, H, W, 1) or (B, 1, H, W)
                mask = mask[..., 0] if mask.shape[-1] == 1 != width else mask[:, 0]
            if mask.ndim not in (2, 3) or mask.shape[-2:] != (height, width):
                raise ValueError(
                    f"`mask_image` must have the size of the image, {(height, width)}, got {tuple(mask.shape)}."
                )
            if not ((mask >= 0) & (mask <= 1)).all():
                raise ValueError(f"`mask_image` must lie in [0, 1], got {mask.min():.3g} to {mask.max():.3g}.")
            masks.append(mask.reshape(-1, 1, height, width) >= 0.5)
        hidden = torch.cat(masks)
        num_white = hidden.flatten(1).sum(dim=1)
        if (num_white == 0).any():
            raise ValueError("`mask_image` is all black: nothing is to be painted. White is painted, black is kept.")
        if (num_white == height * width).any():
            raise ValueError("`mask_image` is all white, so nothing of the image is kept: sample without an image.")
        return hidden.to(self._execution_device)

    def _draw(self, shape: torch.Size, generator: Generators | None) -> torch.Tensor:
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._sample_dtype)

    # 2. Strength

    def _first_step(self, strength: float, scheduler: SchedulerMixin) -> int:
        """
        Returns the index of the first timestep to be run: the last `strength` of the steps are, so that all are at 1 and
        none is at 0. Multistep solvers are told.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"`strength` must be in [0, 1], where 0 keeps the image, got {strength}.")
        num_evaluations, order = len(scheduler.timesteps), scheduler.order
        num_steps = math.ceil(num_evaluations / order)  # a second-order scheduler has one evaluation in its last step
        if 0 < strength < 1 and num_steps == 1:
            raise ValueError("`strength` between 0 and 1 needs at least two steps, of which one is left out.")
        kept = num_steps if strength == 1 else min(round(strength * num_steps), num_steps - 1)
        kept = max(1, kept) if strength else 0
        begin = 0 if kept == num_steps else min((num_steps - kept) * order, num_evaluations)
        if begin and isinstance(scheduler, (LMSDiscreteScheduler, PNDMScheduler)):  # whose first steps are special
            raise ValueError(
                f"{type(scheduler).__name__} can't begin at a part of its steps: use `{self._own_scheduler}`."
            )
        if 0 < begin < num_evaluations and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return begin

    def _add_noise(
        self, image: torch.Tensor, noise: torch.Tensor, scheduler: SchedulerMixin, step: int
    ) -> torch.Tensor:
        """Adds noise to images up to a timestep of the scheduler, by its index, in the scheduler's own scale."""
        timestep = scheduler.timesteps[step].to(image.device)
        if self._objective == "flow":  # stock schedulers have several names for it, and some other levels
            level = timestep / scheduler.config.num_train_timesteps
            return (1 - level) * image + level * noise
        return scheduler.add_noise(image, noise, timestep.repeat(len(image)))

    def _single_step(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """
        Returns the scheduler, or for a multistep solver of flow and EDM a copy with Euler's steps: each depends on nothing
        but the state, so that it can be inverted, and taken again from another one.
        """
        if self._is_multistep(scheduler):
            return type(scheduler).from_config(scheduler.config, solver="euler")
        return scheduler

    # 3. Inversion

    def _invert(
        self,
        sample: torch.Tensor,
        predict: Callable[..., torch.Tensor],
        scheduler: SchedulerMixin,
        begin: int = 0,
    ) -> torch.Tensor:
        """Runs a deterministic scheduler backwards, from images (B, C, H, W) to the noise that `_denoise` starts from."""
        if self._objective != "betas":
            return self._invert_ode(sample, predict, scheduler, begin)
        if not isinstance(scheduler, DDIMScheduler):
            raise ValueError(
                f"Images can be inverted by DDIM, not by {type(scheduler).__name__}: set `pipe.scheduler = "
                "TinyDDIMScheduler.from_config(pipe.scheduler.config)`."
            )
        alpha_prod_prev = float(scheduler.final_alpha_cumprod)
        dtype = self.unet.dtype
        device_timesteps = scheduler.timesteps.to(sample.device)
        for step in self.progress_bar(range(len(device_timesteps) - 1, begin - 1, -1)):
            # DDIM's step, eq. 12 with σ = 0, solved for x_t. It needs eps at x_t, so x_t is found by fixed-point
            # iteration from x_t-1. The first iterate is the usual inversion, which takes eps at x_t-1 instead.
            timestep = scheduler.timesteps[step]
            alpha_prod = scheduler.alphas_cumprod[timestep].item()
            ratio = (alpha_prod / alpha_prod_prev) ** 0.5
            prev_sample = sample
            for _ in range(_INVERSION_ITERATIONS):
                model_output = predict(sample.to(dtype), device_timesteps[step], step)[:, : sample.shape[1]]
                pred_original_sample = scheduler.step(model_output, timestep, sample).pred_original_sample
                epsilon = (sample - alpha_prod**0.5 * pred_original_sample) / (1 - alpha_prod) ** 0.5
                direction = (1 - alpha_prod) ** 0.5 - ratio * (1 - alpha_prod_prev) ** 0.5
                sample = ratio * prev_sample + direction * epsilon
            alpha_prod_prev = alpha_prod
        return sample

    def _invert_ode(
        self, sample: torch.Tensor, predict: Callable[..., torch.Tensor], scheduler: SchedulerMixin, begin: int
    ) -> torch.Tensor:
        if scheduler.config.get("stochastic_sampling"):
            raise ValueError("Images can't be inverted by a consistency model: its steps draw all noise anew.")
        is_euler = isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, EDMEulerScheduler))
        if not is_euler or scheduler.config.get("solver", "euler") != "euler":
            raise ValueError(
                f"Images can be inverted by Euler's steps, not by those of this {type(scheduler).__name__}: set "
                f'`pipe.scheduler = {self._own_scheduler}.from_config(pipe.scheduler.config, solver="euler")`.'
            )
        dtype = self.unet.dtype
        device_timesteps, levels = scheduler.timesteps.to(sample.device), scheduler.sigmas.tolist()
        is_edm = isinstance(scheduler, EDMEulerScheduler)
        slope = torch.zeros_like(sample) if is_edm else -sample  # dx/ds of an image: its noise is 0 on average
        # Where the layers predict the image, the slope at little noise changes too fast with x for a second iteration.
        iterations = 1 if self.unet.config.get("x_prediction") else _INVERSION_ITERATIONS
        for step in self.progress_bar(range(len(device_timesteps) - 1, begin - 1, -1)):
            # Euler's step of dx/ds = (x - x_0) / s from level s, solved for x at s by fixed-point iteration: x_0 is
            # linear in x, with c_skip, and in the network's output, which is kept from the last iterate. The first
            # iterate follows the slope at the level before.
            timestep, level, prev_level = scheduler.timesteps[step], levels[step], levels[step + 1]
            c_skip = scheduler.config.sigma_data**2 / (level**2 + scheduler.config.sigma_data**2) if is_edm else 1.0
            ratio = (level - prev_level) / level
            prev_sample, sample = sample, sample + (level - prev_level) * slope
            for _ in range(iterations):
                scaled = scheduler.precondition_inputs(sample, level) if is_edm else sample
                model_output = predict(scaled.to(dtype), device_timesteps[step], step)[:, : sample.shape[1]]
                pred_original_sample = self._predict_x_0(scheduler, model_output, timestep, scaled)
                output_part = pred_original_sample - c_skip * sample
                sample = (prev_sample - ratio * output_part) / (1 - ratio * (1 - c_skip))
            slope = (sample - prev_sample) / (level - prev_level)
        return sample if begin else sample / self._init_noise_sigma(scheduler)

    # 4. Resampling

    def _noise_levels(self, scheduler: SchedulerMixin) -> tuple[list[float], list[float]]:
        """
        Returns a and s of each state. They are defined for schedulers whose step depends on nothing but the state: DDIM,
        DDPM, and Euler's steps for flow and EDM.
        """
        if isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
            alpha_prods = scheduler.alphas_cumprod[scheduler.timesteps.cpu()].double()
            signals, levels = alpha_prods.sqrt().tolist(), (1 - alpha_prods).sqrt().tolist()
            return [*signals, 1.0], [*levels, 0.0]
        is_own = getattr(scheduler, "_has_continuous_timesteps", False)
        if is_own and scheduler.config.solver == "euler":
            levels = scheduler.sigmas.double()
            return [float(scheduler._signal(level)) for level in levels], levels.tolist()
        options = ', solver="euler"' if self._objective != "betas" else ""
        raise ValueError(
            f"{type(self).__name__} steps back and forth, which {type(scheduler).__name__} can't: set `pipe.scheduler = "
            f"{self._own_scheduler}.from_config(pipe.scheduler.config{options})`."
        )

    def _resample(
        self,
        scheduler: SchedulerMixin,
        take_step: Callable[[torch.Tensor, int], torch.Tensor],
        jump_length: int,
        jump_n_sample: int,
        shape: torch.Size,
        generator: Generators | None,
        on_step_end: Callable[..., dict],
    ) -> torch.Tensor:
        """
        Samples by `take_step(latents, k)`, from state k to the next, with the schedule of
        [RePaint](https://huggingface.co/papers/2201.09865), section 4.2: after each `jump_length` steps, noise is added up
        to where they began, so that each step is taken `jump_n_sample` times.
        """
        for name, value in {"jump_length": jump_length, "jump_n_sample": jump_n_sample}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        signals, levels = self._noise_levels(scheduler)
        num_steps = len(scheduler.timesteps)
        blocks = [range(num_steps)[first : first + jump_length] for first in range(0, num_steps, jump_length)]
        steps = [step for block in blocks for _ in range(jump_n_sample) for step in block]
        self._num_timesteps, self._interrupt = len(steps), False
        latents = self._draw(shape, generator) * self._init_noise_sigma(scheduler)
        state = 0
        for evaluation, step in enumerate(self.progress_bar(steps)):
            if step < state:  # jump back: the forward process from x of one level to a higher one
                ratio = signals[step] / signals[state]
                added = max(0.0, levels[step] ** 2 - (ratio * levels[state]) ** 2) ** 0.5
                latents = ratio * latents + added * self._draw(shape, generator)
            latents = take_step(latents, step)
            state = step + 1
            latents = on_step_end(evaluation, scheduler.timesteps[step], {"latents": latents}).pop("latents", latents)
            if self.interrupt:
                break
        return latents


def _as_list(images: Images | PIL.Image.Image) -> list:
    return list(images) if isinstance(images, (list, tuple)) else [images]
