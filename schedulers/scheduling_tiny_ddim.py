"""DDIM: sampling in few steps, deterministic or not (Song et al. 2021, https://huggingface.co/papers/2010.02502)."""

from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin  # noqa: F401  (loaders look for SchedulerMixin beside the class)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_tiny_common import TinySchedulerMixin


class TinyDDIMScheduler(TinySchedulerMixin, DDIMScheduler):
    """
    Stock [`DDIMScheduler`] with four noise schedules that every stock solver reads, any decreasing sequence of timesteps,
    thresholding as published, and what training needs: see `training_loss` and `variational_bound`.

    Args:
        num_train_timesteps (`int`, defaults to `1000`): The number of diffusion steps, T.
        beta_start (`float`, defaults to `0.0001`): The first beta, b0. Not used by `cosine`.
        beta_end (`float`, defaults to `0.02`): The last beta, b1. Not used by `cosine`.
        beta_schedule (`str`, defaults to `"linear"`):
            `linear`; `cosine`, or `squaredcos_cap_v2` (Nichol & Dhariwal 2021, s = 0.008, betas up to 0.999); `sigmoid`,
            sigmoid(linspace(-6, 6, T)) (b1 - b0) + b0; `quadratic`, or `scaled_linear`, linspace(sqrt b0, sqrt b1, T)^2;
            or `laplace`. The config keeps the second names, diffusers' own.
        trained_betas (`list[float]` or `np.ndarray`, *optional*): The betas themselves; they settle T as well.
        clip_sample (`bool`, defaults to `True`): Whether to clip the predicted x_0.
        set_alpha_to_one (`bool`, defaults to `True`):
            Whether the last step leads to the image itself, or else to the noise level of timestep 0.
        steps_offset (`int`, defaults to `0`): Added to the timesteps of `leading`.
        prediction_type (`str`, defaults to `"epsilon"`): What the network predicts: `epsilon`, `sample` or `v_prediction`.
        thresholding (`bool`, defaults to `False`):
            Whether to threshold the predicted x_0 dynamically (Saharia et al. 2022, section 2.3), in place of clipping.
        dynamic_thresholding_ratio (`float`, defaults to `0.995`): The percentile of dynamic thresholding, in (0, 1].
        clip_sample_range (`float`, defaults to `1.0`): Where to clip.
        sample_max_value (`float`, defaults to `1e6`):
            An upper limit of the dynamic threshold. Stock's is 1, with which thresholding is plain clipping.
        timestep_spacing (`str`, defaults to `"leading"`): `leading`, `trailing` or `linspace`.
        rescale_betas_zero_snr (`bool`, defaults to `False`): Whether to rescale the betas to end without any signal.
        variance_type (`str`, defaults to `"fixed_small"`):
            As in [`TinyDDPMScheduler`], for training and the bound. DDIM's own variance is settled by eta: what a network
            says of the variance is dropped in `step`.
        loss_type (`str`, defaults to `"l2"`): `l2`, `l1`, `huber` or `pseudo_huber`.
        huber_delta (`float`, *optional*): Of the Huber losses. Defaults to 1.0, or 0.1 with a `huber_schedule`.
        huber_schedule (`str`, defaults to `"constant"`):
            How delta goes over the timesteps from 1 to `huber_delta` (https://huggingface.co/papers/2403.16728):
            `constant`, `exponential` (delta^(t / T)) or `snr` ((1 - delta) / (1 + sigma_t)^2 + delta). The last two need
            0 < `huber_delta` < 1.
        snr_gamma (`float`, *optional*): Of the min-SNR weighting; 5.0 is usual.

    Raises:
        `ValueError`: If a name is not known (it names the nearest) or a number out of range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1e6,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        rescale_betas_zero_snr: bool = False,
        *,
        variance_type: str = "fixed_small",
        loss_type: Literal["l2", "l1", "huber", "pseudo_huber"] = "l2",
        huber_delta: float | None = None,
        huber_schedule: Literal["constant", "exponential", "snr"] = "constant",
        snr_gamma: float | None = None,
    ):
        super().__init__(
            **self._resolve_schedule(),
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._resolve_training()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """
        One reverse step, from x_t to x at the next timestep of `timesteps` (Song et al. 2021, equations 12 and 16).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                The network's output; with a learned variance, of twice the channels.
            timestep (`int` or 0-dimensional `torch.Tensor`): The current timestep t.
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t.
            eta (`float`, *optional*, defaults to 0.0): From 0, no noise, to 1, the variance of DDPM's `fixed_small`.
            use_clipped_model_output (`bool`, *optional*, defaults to `False`):
                Whether to derive the noise anew from the predicted x_0 when that has been clipped.
            generator (`torch.Generator` or a list of them, *optional*): One, or one for each image.
            variance_noise (`torch.Tensor`, *optional*): The noise itself, in place of a `generator`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `DDIMSchedulerOutput` or a tuple.

        Returns:
            [`~schedulers.scheduling_ddim.DDIMSchedulerOutput`] or `tuple`: The earlier sample and the predicted x_0, in
            the dtype of `sample`; the arithmetic is in float32 at least.

        Raises:
            `ValueError`: If the timesteps are not set, eta is not in [0, 1], both `generator` and `variance_noise` are
                given, or the network's output doesn't fit the sample and the `variance_type`.
        """
        if self.num_inference_steps is None:
            raise ValueError("The timesteps are not set: call set_timesteps(num_inference_steps) before step.")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], from DDIM to DDPM, not {eta}.")
        if generator is not None and variance_noise is not None:
            raise ValueError("Give either generator or variance_noise, not both.")

        prediction, _ = self._split_variance(model_output, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        prediction, x_t = prediction.to(dtype), sample.to(dtype)

        timestep, prev_timestep = int(timestep), int(self.previous_timestep(timestep))
        alpha_bar = self.alphas_cumprod[timestep]
        alpha_bar_prev = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod

        x_0, epsilon = self._predict(prediction, x_t, alpha_bar)
        x_0 = self._clip(x_0)
        if use_clipped_model_output:
            epsilon = (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5

        sigma = eta * self._get_variance(timestep, prev_timestep) ** 0.5  # equation 16
        direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0) ** 0.5 * epsilon  # below 0 by rounding alone
        prev_sample = alpha_bar_prev**0.5 * x_0 + direction  # equation 12
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
            prev_sample = prev_sample + sigma * variance_noise

        prev_sample, x_0 = prev_sample.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_0
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)
