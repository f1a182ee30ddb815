"""`TinyEDMScheduler`: EDM (Karras et al. 2022, https://huggingface.co/papers/2206.00364)."""

from typing import Literal

import torch
from diffusers import EDMEulerScheduler, SchedulerMixin  # noqa: F401  (loaders look for SchedulerMixin)
from diffusers.configuration_utils import register_to_config

from .scheduling_tiny_common import TinyObjectiveMixin, check_known, mean_flat
from .scheduling_tiny_continuous import DEQUANTIZATION_STD, TinyContinuousMixin


class TinyEDMScheduler(TinyContinuousMixin, TinyObjectiveMixin, EDMEulerScheduler):
    r"""
    EDM ([Karras et al. 2022](https://huggingface.co/papers/2206.00364), equation 7 and table 1): x = x_0 + sigma eps,
    and the denoiser is D(x) = c_skip x + c_out F(c_in x, c_noise), with the network F and

    - c_skip = sigma_data^2 / (sigma^2 + sigma_data^2);
    - c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2);
    - c_in = 1 / sqrt(sigma^2 + sigma_data^2);
    - c_noise = ln(sigma) / 4, the network's timestep.

    Extends [`EDMEulerScheduler`] with the training loss (`training_loss`), noising at any timestep, Heun's solver,
    fresh noise (`eta`), clipping, and the likelihood (`ode_likelihood`). Its steps keep float32.

    Args:
        sigma_min (`float`, defaults to `0.002`): The lowest noise level of sampling, above 0.
        sigma_max (`float`, defaults to `80.0`): The highest noise level of sampling.
        sigma_data (`float`, defaults to `0.5`): The standard deviation of the images in [-1, 1].
        sigma_schedule (`str`, defaults to `"karras"`):
            The spacing of sampling: `karras` (equation 5) or `exponential`.
        num_train_timesteps (`int`, defaults to `1000`): The largest number of steps.
        prediction_type (`str`, defaults to `"epsilon"`): `epsilon`, or `v_prediction`, which negates c_out.
        rho (`float`, defaults to `7.0`): The exponent of `karras`.
        p_mean (`float`, defaults to `-1.2`): The mean of ln(sigma) in training.
        p_std (`float`, defaults to `1.2`): The standard deviation of ln(sigma) in training, above 0.
        solver (`str`, defaults to `"euler"`):
            `euler`; `multistep`, which extrapolates from the step before (DPM-Solver++) and needs fewer steps, as
            training saves it; or `heun`, of second order, with two evaluations per step but the last.
        clip_sample (`bool`, defaults to `False`): Whether to clip the predicted x_0.
        clip_sample_range (`float`, defaults to `1.0`): The magnitude at which x_0 is clipped.
        thresholding (`bool`, defaults to `False`):
            Whether to threshold the predicted x_0 dynamically (Saharia et al. 2022, section 2.3) instead of clipping.
        dynamic_thresholding_ratio (`float`, defaults to `0.995`): The percentile of dynamic thresholding, in (0, 1].
        sample_max_value (`float`, defaults to `1e6`): The maximum of the dynamic threshold.

    Raises:
        `ValueError`: If a name is unknown (the error suggests the nearest one) or a number is out of range.
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        rho: float = 7.0,
        *,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        solver: Literal["euler", "multistep", "heun"] = "euler",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1e6,
    ):
        check_known("sigma_schedule", sigma_schedule, ("karras", "exponential"))
        check_known("prediction_type", prediction_type, ("epsilon", "v_prediction"))
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min must be above 0 and below sigma_max, got {sigma_min} and {sigma_max}.")
        for name, value in {"sigma_data": sigma_data, "rho": rho, "p_std": p_std}.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}.")
        super().__init__(sigma_min, sigma_max, sigma_data, sigma_schedule, num_train_timesteps, prediction_type, rho)
        self._check_choices("solver")
        self._check_clipping()
        # no argument may be listed as a default, or the config of another class would not get it in the same process
        self.register_to_config(_use_default_values=[])
        self._start = None

    # 1. Preconditioning

    @property
    def _max_level(self) -> float:
        return self.config.sigma_max

    def _signal(self, level: float | torch.Tensor) -> float | torch.Tensor:
        return 1.0

    def _timestep(self, level: torch.Tensor) -> torch.Tensor:
        return level.log() / 4

    def _level(self, timestep: torch.Tensor) -> torch.Tensor:
        return (4 * timestep).exp()

    def _prior_std(self, level: float) -> float:
        return (level**2 + 1) ** 0.5  # as in the stock class: that of x for images of variance 1

    def _coefficients(self, level: float | torch.Tensor) -> tuple:
        """Returns c_skip, c_out and c_in (table 1)."""
        variance, sigma_data = level**2 + self.config.sigma_data**2, self.config.sigma_data
        sign = -1 if self.config.prediction_type == "v_prediction" else 1
        return sigma_data**2 / variance, sign * level * sigma_data / variance**0.5, variance**-0.5

    def _velocity(self, model_output: torch.Tensor, sample: torch.Tensor, level: float) -> torch.Tensor:
        """Computes (x - D(x)) / sigma, without the difference of near values that it has for a low sigma."""
        _, c_out, c_in = self._coefficients(level)
        return level * c_in**2 * sample - c_out / level * model_output

    def _spaced_levels(self, num_inference_steps: int) -> torch.Tensor:
        ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
        if self.config.sigma_schedule == "karras":
            return self._compute_karras_sigmas(ramp)
        return self.config.sigma_max * (self.config.sigma_min / self.config.sigma_max) ** ramp

    def _likelihood_levels(self, num_steps: int) -> list[float]:
        ramp = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return self._compute_karras_sigmas(ramp, sigma_min=DEQUANTIZATION_STD).tolist()

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """
        Computes the network's input c_in x.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x.
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): c_noise.

        Returns:
            `torch.Tensor` of the same shape: The input.
        """
        return sample * self._coefficients(self._levels_like(sample, timestep))[2]

    # 2. Training

    def sample_timesteps(self, draws: torch.Tensor) -> torch.Tensor:
        """
        Maps uniform random numbers to timesteps for training: ln(sigma) from N(`p_mean`, `p_std`^2).

        Args:
            draws (`torch.Tensor` of shape `(batch_size, 2)`): Uniform numbers in [0, 1), of which the first is used.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: The timesteps c_noise = ln(sigma) / 4.
        """
        normal = torch.special.ndtri(draws[:, 0].float().clamp(min=2**-25))  # torch.rand has multiples of 2^-24
        return (self.config.p_mean + self.config.p_std * normal) / 4

    def training_loss(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """
        Computes the loss of a batch of predictions at `add_noise(sample, noise, timesteps)`, scaled by
        `scale_model_input`, in float32: lambda (D(x) - x_0)^2 averaged over the pixels, with the weight lambda =
        (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (https://huggingface.co/papers/2206.00364, table 1). As lambda
        = 1 / c_out^2, it is the squared error of F itself (equation 8).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The network's output F.
            sample (`torch.Tensor` of the same shape): The images, in [-1, 1].
            noise (`torch.Tensor` of the same shape): The noise added to the images, from N(0, I).
            timesteps (`torch.Tensor` of shape `(batch_size,)`): The timestep of each image, ln(sigma) / 4.
            reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` or `"sum"` over the images, or `"none"`.

        Returns:
            `torch.Tensor`: The loss, a scalar, or of shape `(batch_size,)` with `reduction="none"`.

        Raises:
            `ValueError`: If shapes don't match or `reduction` is unknown.
        """
        self._check_batch(sample, noise, timesteps, reduction)
        self._check_output(model_output, sample)
        sample, noise = sample.float(), noise.float()
        c_skip, c_out, _ = self._coefficients(self._levels_like(sample, timesteps))
        target = (sample - c_skip * self.add_noise(sample, noise, timesteps)) / c_out
        return self._reduce(mean_flat((model_output.float() - target).square()), reduction)
