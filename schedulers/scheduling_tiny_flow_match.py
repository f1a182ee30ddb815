"""`TinyFlowMatchScheduler`: rectified flow (Liu et al. 2022, https://huggingface.co/papers/2209.03003)."""

from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin  # noqa: F401  (loaders look for SchedulerMixin)
from diffusers.configuration_utils import register_to_config

from .scheduling_tiny_common import TinyObjectiveMixin, mean_flat
from .scheduling_tiny_continuous import DEQUANTIZATION_STD, TinyContinuousMixin


# The share of images of `mixed` whose timestep is logit-normal; it is uniform for the others.
_LOGIT_NORMAL_SHARE = 0.7

# What solvers for beta schedules, such as DPM-Solver++ and UniPC, need in the config to sample a flow.
_SOLVER_ARGUMENTS = ("prediction_type", "use_flow_sigmas", "flow_shift")


class TinyFlowMatchScheduler(TinyContinuousMixin, TinyObjectiveMixin, FlowMatchEulerDiscreteScheduler):
    r"""
    Rectified flow: x_s = (1 - s) x_0 + s eps, from the image at s = 0 to the noise at s = 1. The network takes the
    timestep t = s `num_train_timesteps` and predicts the velocity v = eps - x_0
    ([Liu et al. 2022](https://huggingface.co/papers/2209.03003), equation 1).

    Extends [`FlowMatchEulerDiscreteScheduler`] with the training loss (`training_loss`), noising at any timestep,
    Heun's solver, fresh noise (`eta`), clipping, and the likelihood (`ode_likelihood`). Its steps keep float32. n
    steps go from s = 1, 1 - 1/n, ... to 1/n and then to 0; the stock class ends with 0.001 and 0, which wastes an
    evaluation. The config fits the stock solvers with `use_flow_sigmas` as well, such as DPM-Solver++ and UniPC.

    Args:
        num_train_timesteps (`int`, defaults to `1000`): The timestep of pure noise, T.
        shift (`float`, defaults to `1.0`):
            Moves the steps of sampling toward the noise, s' = shift s / (1 + (shift - 1) s)
            (https://huggingface.co/papers/2403.03206, equation 23).
        timestep_distribution (`str`, defaults to `"mixed"`):
            The distribution of s in training: `uniform`; `logit_normal`, sigmoid(N(`logit_mean`, `logit_std`^2))
            (https://huggingface.co/papers/2403.03206, equation 19); or `mixed`, logit-normal for 70% of the images
            and uniform for 30%.
        logit_mean (`float`, defaults to `0.0`): The mean of logit(s).
        logit_std (`float`, defaults to `1.0`): The standard deviation of logit(s), above 0.
        solver (`str`, defaults to `"euler"`):
            `euler`; `multistep`, which extrapolates from the step before (DPM-Solver++) and needs fewer steps, as
            training saves it; or `heun`, of second order, with two evaluations per step but the last.
        stochastic_sampling (`bool`, defaults to `False`):
            Whether each step draws all of the noise anew, as consistency models are sampled
            (https://huggingface.co/papers/2303.01469, algorithm 1), whatever `eta` is.
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
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        *,
        timestep_distribution: Literal["uniform", "logit_normal", "mixed"] = "mixed",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        solver: Literal["euler", "multistep", "heun"] = "euler",
        stochastic_sampling: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1e6,
    ):
        if num_train_timesteps < 1 or not shift > 0:
            raise ValueError(
                f"num_train_timesteps must be at least 1 and shift above 0, got {num_train_timesteps} and {shift}."
            )
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift, stochastic_sampling=stochastic_sampling)
        self._check_choices("timestep_distribution", "solver")
        self._check_clipping()
        if stochastic_sampling and solver != "euler":
            raise ValueError(
                f"A consistency model (`stochastic_sampling`) is sampled by `solver='euler'`, got {solver!r}."
            )
        if not logit_std > 0:
            raise ValueError(f"logit_std must be above 0, got {logit_std}.")
        # no argument may be listed as a default, or the config of another class would not get it in the same process
        self.register_to_config(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, _use_default_values=[]
        )
        self.num_inference_steps = self._start = None

    @classmethod
    def from_config(cls, config: dict[str, Any] = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """Instantiates a scheduler from a config, as in diffusers, with what other solvers need from the arguments."""
        if isinstance(config, dict):
            config = {name: value for name, value in config.items() if name not in _SOLVER_ARGUMENTS}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # 1. The flow

    _max_level = 1.0

    def _signal(self, level: float | torch.Tensor) -> float | torch.Tensor:
        return 1 - level

    def _timestep(self, level: torch.Tensor) -> torch.Tensor:
        return level * self.config.num_train_timesteps

    def _level(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep / self.config.num_train_timesteps

    def _prior_std(self, level: float) -> float:
        return 1.0

    def _velocity(self, model_output: torch.Tensor, sample: torch.Tensor, level: float) -> torch.Tensor:
        return model_output

    def _spaced_levels(self, num_inference_steps: int) -> torch.Tensor:
        levels = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64)
        return self.shift * levels / (1 + (self.shift - 1) * levels)

    def _likelihood_levels(self, num_steps: int) -> list[float]:
        lowest = DEQUANTIZATION_STD / (1 + DEQUANTIZATION_STD)  # t / (1 - t) is the noise of an image
        ramp = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64).square()  # dense at the image
        return (lowest + (1 - lowest) * ramp).tolist()

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sample: the network takes x itself."""
        return sample

    # 2. Training

    def sample_timesteps(self, draws: torch.Tensor) -> torch.Tensor:
        """
        Maps uniform random numbers to timesteps for training, by the config's `timestep_distribution`.

        Args:
            draws (`torch.Tensor` of shape `(batch_size, 2)`):
                Uniform numbers in [0, 1): the first gives the timestep, the second the distribution of `mixed`.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: The timesteps t, continuous in [0, T].
        """
        uniform, choice = draws.float().unbind(dim=1)
        normal = torch.special.ndtri(uniform.clamp(min=2**-25))  # torch.rand has multiples of 2^-24
        logit_normal = torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal)
        share = {"uniform": 0.0, "logit_normal": 1.0, "mixed": _LOGIT_NORMAL_SHARE}[self.config.timestep_distribution]
        return self._timestep(torch.where(choice < share, logit_normal, uniform))

    def training_loss(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        reduction: str = "mean",
        min_level: float = 0.0,
    ) -> torch.Tensor:
        """
        Computes the loss of a batch of predictions at `add_noise(sample, noise, timesteps)`, in float32: the squared
        difference from eps - x_0 (https://huggingface.co/papers/2209.03003, equation 1), averaged over the pixels.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The network's output.
            sample (`torch.Tensor` of the same shape): The images, in [-1, 1].
            noise (`torch.Tensor` of the same shape): The noise added to the images, from N(0, I).
            timesteps (`torch.Tensor` of shape `(batch_size,)`): The timestep of each image, a float in [0, T].
            reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` or `"sum"` over the images, or `"none"`.
            min_level (`float`, *optional*, defaults to `0.0`):
                The level s = t / T below which the loss of the image, which is s^2 times that of the velocity, has no more
                weight than here: for networks that predict the image (https://huggingface.co/papers/2511.13720, where it
                is 0.05), whose small errors at little noise are large ones of the velocity.

        Returns:
            `torch.Tensor`: The loss, a scalar, or of shape `(batch_size,)` with `reduction="none"`.

        Raises:
            `ValueError`: If shapes don't match or `reduction` is unknown.
        """
        self._check_batch(sample, noise, timesteps, reduction)
        self._check_output(model_output, sample)
        loss = mean_flat((model_output.float() - (noise.float() - sample.float())).square())
        if min_level > 0:
            loss = loss * (self._level(timesteps.float()) / min_level).clamp(max=1).square()
        return self._reduce(loss, reduction)
