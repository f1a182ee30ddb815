"""`TinyDDIMScheduler`: DDIM (Song et al. 2021, https://huggingface.co/papers/2010.02502), with training losses."""

from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin  # noqa: F401  (loaders look for SchedulerMixin beside the class)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_tiny_common import Generators, TinySchedulerMixin


class TinyDDIMScheduler(TinySchedulerMixin, DDIMScheduler):
    """
    Extends [`DDIMScheduler`] with four noise schedules that every stock solver reads, custom timesteps, dynamic
    thresholding as published, the training loss (`training_loss`) and the variational bound (`variational_bound`).

    Args:
        num_train_timesteps (`int`, defaults to `1000`): The number of diffusion steps, T.
        beta_start (`float`, defaults to `0.0001`): The first beta, b0. Not used by `cosine`.
        beta_end (`float`, defaults to `0.02`): The last beta, b1. Not used by `cosine`.
        beta_schedule (`str`, defaults to `"linear"`):
            - `linear`: linspace(b0, b1, T);
            - `cosine` or `squaredcos_cap_v2`: Nichol & Dhariwal 2021, with s = 0.008 and betas of at most 0.999;
            - `sigmoid`: sigmoid(linspace(-6, 6, T)) (b1 - b0) + b0;
            - `quadratic` or `scaled_linear`: linspace(sqrt b0, sqrt b1, T)^2;
            - `laplace`: as in diffusers.

            Of two names, the config has the second, which is diffusers'.
        trained_betas (`list[float]` or `np.ndarray`, *optional*): The betas themselves. T is then their number.
        clip_sample (`bool`, defaults to `True`): Whether to clip the predicted x_0.
        set_alpha_to_one (`bool`, defaults to `True`):
            Whether the last step goes to the image itself, or to the noise level of timestep 0.
        steps_offset (`int`, defaults to `0`): Added to the timesteps of `leading`.
        prediction_type (`str`, defaults to `"epsilon"`):
            The network's prediction: `epsilon` (noise), `sample` (x_0) or `v_prediction` (velocity).
        thresholding (`bool`, defaults to `False`):
            Whether to threshold the predicted x_0 dynamically (Saharia et al. 2022, section 2.3) instead of clipping.
        dynamic_thresholding_ratio (`float`, defaults to `0.995`): The percentile of dynamic thresholding, in (0, 1].
        clip_sample_range (`float`, defaults to `1.0`): The magnitude at which x_0 is clipped.
        sample_max_value (`float`, defaults to `1e6`):
            The maximum of the dynamic threshold. The stock default of 1 makes thresholding plain clipping.
        timestep_spacing (`str`, defaults to `"leading"`): `leading`, `trailing` or `linspace`.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Whether to rescale the betas to a terminal SNR of 0. The config then has them as `trained_betas`, as many stock
            solvers do not rescale.
        variance_type (`str`, defaults to `"fixed_small"`):
            As in [`TinyDDPMScheduler`], for training and the bound. `step` drops a predicted variance, as eta
            determines the variance of DDIM.
        loss_type (`str`, defaults to `"l2"`):
            `l2`, `l1`, `huber`, `pseudo_huber`, or `vlb`, the variational bound (Ho et al. 2020, equation 5).
        huber_delta (`float`, *optional*):
            delta of the Huber losses. Defaults to 1.0, or to 0.1 if `huber_schedule` is not `constant`.
        huber_schedule (`str`, defaults to `"constant"`):
            The schedule of delta over the timesteps (https://huggingface.co/papers/2403.16728): `constant`,
            `exponential` (delta^(t / T)) or `snr` ((1 - delta) / (1 + sigma_t)^2 + delta). The last two go from 1 to
            delta and require 0 < `huber_delta` < 1.
        snr_gamma (`float`, *optional*): gamma of the min-SNR weighting, such as 5.0. None disables it.

    Raises:
        `ValueError`: If a name is unknown (the error suggests the nearest one) or a number is out of range.
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
        loss_type: Literal["l2", "l1", "huber", "pseudo_huber", "vlb"] = "l2",
        huber_delta: float | None = None,
        huber_schedule: Literal["constant", "exponential", "snr"] = "constant",
        snr_gamma: float | None = None,
    ):
        super().__init__(**self._stock_arguments(DDIMScheduler))
        self._resolve_training()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Generators | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """
        Takes one reverse step, from x_t to x at the next of the `timesteps` (Song et al. 2021, equations 12 and 16).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                The network's output, with twice the channels for a learned variance.
            timestep (`int` or 0-dimensional `torch.Tensor`): The current timestep t.
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t.
            eta (`float`, *optional*, defaults to 0.0):
                The scale of the noise, from 0 (none) to 1 (the variance of DDPM's `fixed_small`).
            use_clipped_model_output (`bool`, *optional*):
                Whether to compute the noise anew where x_0 is clipped or thresholded, so that both belong to x_t. It is
                computed anew by default, as in Dhariwal & Nichol's code. Stock DDIM keeps it: each step then leaves a
                part of what was clipped in the image, as a gray veil.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One generator, or one per image.
            variance_noise (`torch.Tensor`, *optional*): The noise itself, instead of a `generator`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `DDIMSchedulerOutput` or a tuple.

        Returns:
            [`~schedulers.scheduling_ddim.DDIMSchedulerOutput`] or `tuple`: The previous sample and the predicted
            x_0, in the dtype of `sample`. They are computed in float32 at least.

        Raises:
            `ValueError`: If the timesteps are not set, eta is not in [0, 1], both `generator` and `variance_noise` are
                given, or the shape of `model_output` doesn't match `sample` and the `variance_type`.
        """
        if self.num_inference_steps is None:
            raise ValueError("The timesteps are not set: call set_timesteps(num_inference_steps) before step.")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], where 0 is DDIM and 1 is DDPM, got {eta}.")
        if generator is not None and variance_noise is not None:
            raise ValueError("Give either generator or variance_noise, not both.")

        prediction, _ = self._split_variance(model_output, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        prediction, x_t = prediction.to(dtype), sample.to(dtype)

        timestep, prev_timestep = int(timestep), int(self.previous_timestep(timestep))
        alpha_bar = self.alphas_cumprod[timestep]
        alpha_bar_prev = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod

        x_0, epsilon = self._predict(prediction, x_t, alpha_bar)
        if self._clips:
            x_0 = self._clip(x_0)
        if self._clips and use_clipped_model_output in (None, True):
            epsilon = (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5

        sigma = eta * self._get_variance(timestep, prev_timestep) ** 0.5  # equation 16
        direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0) ** 0.5 * epsilon  # negative only by rounding
        prev_sample = alpha_bar_prev**0.5 * x_0 + direction  # equation 12
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
            prev_sample = prev_sample + sigma * variance_noise

        prev_sample, x_0 = prev_sample.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_0
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)
