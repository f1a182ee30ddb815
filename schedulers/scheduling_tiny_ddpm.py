"""`TinyDDPMScheduler`: DDPM (Ho et al. 2020, https://huggingface.co/papers/2006.11239), with training losses."""

import math
from typing import Literal

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin  # noqa: F401  (loaders look for SchedulerMixin beside the class)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from .scheduling_tiny_common import Generators, TinySchedulerMixin


class TinyDDPMScheduler(TinySchedulerMixin, DDPMScheduler):
    """
    Extends [`DDPMScheduler`] with four noise schedules that every stock solver reads, custom timesteps, dynamic
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
        variance_type (`str`, defaults to `"fixed_small"`):
            The variance of a reverse step: `fixed_small` (tilde beta), `fixed_large` (beta), `learned_range` (between
            the two, predicted by a network with twice the channels), or the stock `learned`, `fixed_small_log` and
            `fixed_large_log`.
        clip_sample (`bool`, defaults to `True`): Whether to clip the predicted x_0.
        prediction_type (`str`, defaults to `"epsilon"`):
            The network's prediction: `epsilon` (noise), `sample` (x_0) or `v_prediction` (velocity).
        thresholding (`bool`, defaults to `False`):
            Whether to threshold the predicted x_0 dynamically (Saharia et al. 2022, section 2.3) instead of clipping.
        dynamic_thresholding_ratio (`float`, defaults to `0.995`): The percentile of dynamic thresholding, in (0, 1].
        clip_sample_range (`float`, defaults to `1.0`): The magnitude at which x_0 is clipped.
        sample_max_value (`float`, defaults to `1e6`):
            The maximum of the dynamic threshold. The stock default of 1 makes thresholding plain clipping.
        timestep_spacing (`str`, defaults to `"leading"`): `leading`, `trailing` or `linspace`.
        steps_offset (`int`, defaults to `0`): Added to the timesteps of `leading`.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Whether to rescale the betas to a terminal SNR of 0. The config then has them as `trained_betas`, as many stock
            solvers do not rescale.
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
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1e6,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        *,
        loss_type: Literal["l2", "l1", "huber", "pseudo_huber", "vlb"] = "l2",
        huber_delta: float | None = None,
        huber_schedule: Literal["constant", "exponential", "snr"] = "constant",
        snr_gamma: float | None = None,
    ):
        super().__init__(**self._stock_arguments(DDPMScheduler))
        self._resolve_training()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple:
        """
        Takes one reverse step, from x_t to x at the next of the `timesteps` (Ho et al. 2020, equations 6, 7 and 11).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                The network's output, with twice the channels for a learned variance.
            timestep (`int` or 0-dimensional `torch.Tensor`): The current timestep t.
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One generator, or one per image.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `DDPMSchedulerOutput` or a tuple.

        Returns:
            [`~schedulers.scheduling_ddpm.DDPMSchedulerOutput`] or `tuple`: The previous sample and the predicted
            x_0, in the dtype of `sample`. They are computed in float32 at least.

        Raises:
            `ValueError`: If the shape of `model_output` doesn't match `sample` and the `variance_type`.
        """
        self._check_output(model_output, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        step = super().step(model_output.to(dtype), timestep, sample.to(dtype), generator)

        prev_sample, pred_original_sample = (x.to(sample.dtype) for x in step.values())
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _get_variance(
        self, t: int, predicted_variance: torch.Tensor | None = None, variance_type: str | None = None
    ) -> torch.Tensor:
        variance_type = variance_type or self.config.variance_type
        self._check_variance(predicted_variance)
        # The last step adds no noise, whatever its timestep. Stock DDPM omits the noise only at timestep 0.
        if self.previous_timestep(t) < 0:
            return torch.tensor(-math.inf if variance_type == "learned_range" else 0.0)  # a log in learned_range
        if variance_type == "fixed_large_log":
            variance_type = "fixed_large"  # stock DDPM returns the log and uses it as the variance
        return super()._get_variance(t, predicted_variance, variance_type)
