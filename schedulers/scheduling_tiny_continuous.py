"""`TinyContinuousMixin`: the solvers and the likelihood of rectified flow and EDM, whose timesteps are continuous."""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


Generators = torch.Generator | list[torch.Generator]

# The trace of the velocity's Jacobian is exact for images of up to so many values, and an estimate for larger ones.
MAX_EXACT_DIMENSIONS = 256
_COPIES = 512  # of images, that share a batch for the exact trace
# Standard deviation of the uniform dequantization of gray levels: a likelihood begins where the network expects such noise
DEQUANTIZATION_STD = 2 / 255 / math.sqrt(12)


# Settings of the stock classes that would change what is drawn, and their defaults.
_STOCK_ONLY = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}


@dataclass
class TinyStepOutput(BaseOutput):
    """
    Output class for a step.

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x at the next noise level.
        pred_original_sample (`torch.Tensor` of the same shape): The predicted x_0.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


@dataclass
class TinyLikelihoodOutput(BaseOutput):
    """
    Output class for the negative log-likelihood by the probability-flow ODE, in bits per dimension.

    Args:
        total (`torch.Tensor` of shape `(batch_size,)`): The negative log-likelihood.
        standard_error (`torch.Tensor` of shape `(batch_size,)`):
            The standard error of `total` from the estimate of the trace, 0 where the trace is exact.
    """

    total: torch.Tensor
    standard_error: torch.Tensor


class TinyContinuousMixin:
    """
    Mixin for a scheduler of continuous noise levels, x = a x_0 + s eps with s the level, beside `TinyObjectiveMixin`.

    Both objectives are the ODE dx/ds = (x - x_0(x, s)) / s of [EDM](https://huggingface.co/papers/2206.00364),
    equation 1: EDM has a = 1, and rectified flow has a = 1 - s, where it is the velocity eps - x_0. They differ by
    `_signal`, a as a function of s; `_timestep` and `_level`, between s and the network's timestep; and `_velocity`,
    dx/ds from the network's output.
    """

    _has_continuous_timesteps = True
    _threshold_sample = DDPMScheduler._threshold_sample

    @property
    def order(self) -> int:
        """Returns the order of the solver: 2 for Heun, which evaluates the network twice per step but the last."""
        return 2 if self.config.solver == "heun" else 1

    @property
    def init_noise_sigma(self) -> float:
        """Returns the standard deviation of the initial noise, at the highest noise level."""
        return self._prior_std(float(self.sigmas[0]))

    @staticmethod
    def _check_output(model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"The model output must be {tuple(sample.shape)}, as the sample, got {tuple(model_output.shape)}."
            )

    @classmethod
    def from_config(cls, config: dict[str, Any] = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """
        Instantiates a scheduler from a config, as in diffusers.

        Raises:
            `ValueError`: If the config has a setting of the stock class that this one does not have.
        """
        given = {**config, **kwargs} if isinstance(config, dict) else kwargs
        for name, default in _STOCK_ONLY.items():
            if given.get(name, default) not in (default, None):
                raise ValueError(f"{cls.__name__} has no {name}, which is {given[name]!r}: use the stock class.")
        if isinstance(config, dict):  # without what else only the stock class takes, which diffusers would warn of
            stock = next(parent for parent in cls.__mro__ if parent.__module__.partition(".")[0] == "diffusers")
            own, unused = (inspect.signature(c.__init__).parameters for c in (cls, stock))
            config = {name: value for name, value in config.items() if name in own or name not in unused}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # 1. Noising

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Computes x = a x_0 + s eps at any timesteps.

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_0, in [-1, 1].
            noise (`torch.Tensor` of the same shape): eps, from N(0, I).
            timesteps (`torch.Tensor` of shape `(batch_size,)`): The timestep of each image.

        Returns:
            `torch.Tensor` of the same shape: The noisy images.
        """
        level = self._levels_like(original_samples, timesteps)
        return self._signal(level) * original_samples + level * noise

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes [`~TinyContinuousMixin.add_noise`], in the order of the arguments of stock schedulers for flow."""
        return self.add_noise(sample, noise, timestep)

    def _levels_like(self, sample: torch.Tensor, timesteps: float | torch.Tensor) -> torch.Tensor:
        """Returns the noise levels of timesteps, to broadcast with a sample: (B,) or () -> (B or 1, 1, 1, 1)."""
        timesteps = torch.as_tensor(timesteps, dtype=torch.float32).to(sample.device)
        return self._level(timesteps).to(sample.dtype).reshape(-1, *[1] * (sample.ndim - 1))

    # 2. Sampling

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """
        Sets the timesteps for sampling, spaced as the class describes or custom ones, and the noise levels `sigmas`,
        which end with 0. With `solver="heun"`, every timestep but the first appears twice in `timesteps`.

        Args:
            num_inference_steps (`int`, *optional*): The number of steps, from 1 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): The device to move the timesteps to.
            timesteps (`list[float]`, *optional*): Custom timesteps of the network, strictly decreasing.

        Raises:
            `ValueError`: If both or neither are given, a value is out of range, or the list is not decreasing.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give exactly one of num_inference_steps and timesteps.")
        if timesteps is None:
            total = self.config.num_train_timesteps
            if not 1 <= num_inference_steps <= total or num_inference_steps != int(num_inference_steps):
                raise ValueError(
                    f"num_inference_steps must be an integer from 1 to {total}, got {num_inference_steps}."
                )
            levels = self._spaced_levels(int(num_inference_steps))
            values = self._timestep(levels)
        else:
            values = torch.as_tensor(timesteps, dtype=torch.float64)
            if values.ndim != 1 or len(values) == 0 or not bool((values[1:] < values[:-1]).all()):
                raise ValueError(f"timesteps must be at least one number, strictly decreasing, got {timesteps}.")
            levels = self._level(values)
            if not 0 < levels[-1] <= levels[0] <= self._max_level * (1 + 1e-6):
                high = float(self._timestep(torch.tensor(self._max_level)))
                raise ValueError(
                    f"timesteps must be at most {high:g} (noise level {self._max_level:g}) and of noise levels above 0, "
                    f"got {timesteps}."
                )

        self.num_inference_steps = len(levels)
        self.sigmas = torch.cat([levels, levels.new_zeros(1)]).float()
        self._step_timesteps = values.float()
        repeats = torch.full((len(values),), self.order)
        repeats[0] = 1
        self.timesteps = self._step_timesteps.repeat_interleave(repeats).to(device)
        self._start, self._last = None, (None, None)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> TinyStepOutput | tuple:
        """
        Takes one step to the next lower noise level: Euler's or, with `solver="heun"`, one of the two evaluations of
        Heun's (https://huggingface.co/papers/2206.00364, algorithm 1).

        With eta above 0, a share r^2 of the predicted noise is then replaced by fresh noise, eps' = sqrt(1 - r^2) eps
        + r z; with `stochastic_sampling` all of it is, whatever eta is. From a level s to s', with ratio = (s' a) / (s
        a'), r^2 = eta^2 (1 - ratio^2), as DDIM's (https://huggingface.co/papers/2010.02502, equation 16); eta = 1 is
        the reverse process of DDPM, and above it r^2 = 1 - ratio^(2 eta^2). With any eta the marginals stay right in the
        limit of many steps, as the share goes to 0 with the step, and fresh noise corrects the network's errors.

        With `solver="multistep"`, x_0 is first extrapolated to the middle of the step from the last two predictions, as a
        function of log(a / s). This is DPM-Solver++(2M) with eta = 0, and SDE-DPM-Solver++(2M) with eta = 1
        (https://huggingface.co/papers/2211.01095).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The network's output.
            timestep (`float` or 0-dimensional `torch.Tensor`): The current one of `timesteps`.
            sample (`torch.Tensor` of the same shape): x, before `scale_model_input`.
            eta (`float`, *optional*, defaults to 0.0):
                The amount of fresh noise per step, at least 0. 0 makes sampling deterministic, 1 matches DDPM.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One generator, or one per image.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `TinyStepOutput` or a tuple.

        Returns:
            [`TinyStepOutput`] or `tuple`: The previous sample and the predicted x_0, in the dtype of `sample`. They
            are computed in float32 at least.

        Raises:
            `ValueError`: If the timesteps are not set, `timestep` is not one of them, eta is below 0, or the shape of
                `model_output` doesn't match `sample`.
        """
        if self.num_inference_steps is None:
            raise ValueError("The timesteps are not set: call set_timesteps(num_inference_steps) before step.")
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta must be at least 0, where 0 adds no noise and 1 as much as DDPM, got {eta}.")
        self._check_output(model_output, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype)
        index = self._index_of(timestep)
        level, next_level = self.sigmas[index : index + 2].tolist()

        velocity = self._velocity(model_output.to(dtype), x, level)
        x_0 = x - level * velocity
        if self._clips:
            x_0 = self._clip(x_0)
            velocity = (x - x_0) / level
        target = x_0
        if self.config.solver == "multistep":
            target = self._extrapolate(x_0, index)
            velocity = (x - target) / level

        if self._start is not None:  # Heun's second evaluation, at the end of its step
            x, first_velocity, first_level = self._start
            self._start = None
            velocity, level, next_level = (first_velocity + velocity) / 2, first_level, level
        elif self.config.solver == "heun" and next_level > 0:
            self._start = (x, velocity, level)
        prev_sample = x + (next_level - level) * velocity

        is_all_fresh = self.config.get("stochastic_sampling", False)
        if (eta > 0 or is_all_fresh) and next_level > 0 and self._start is None:
            ratio = next_level * self._signal(level) / (level * self._signal(next_level))
            share = eta**2 * (1 - ratio**2) if eta <= 1 else 1 - ratio ** (2 * eta**2)  # r^2
            share = 1.0 if is_all_fresh else share
            kept = (1 - share) ** 0.5
            epsilon = (prev_sample - self._signal(next_level) * target) / next_level
            fresh = randn_tensor(x.shape, generator=generator, device=x.device, dtype=dtype)
            prev_sample = prev_sample + next_level * ((kept - 1) * epsilon + share**0.5 * fresh)

        prev_sample, x_0 = prev_sample.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_0
        return TinyStepOutput(prev_sample=prev_sample, pred_original_sample=x_0)

    def _extrapolate(self, x_0: torch.Tensor, index: int) -> torch.Tensor:
        """
        Extrapolates x_0 to the middle of a step, on a line through it and that of the step before: both are functions of
        log(a / s). Without a step before, at pure noise, and in the last step, which ends at the image, x_0 is returned.
        """
        (last_index, last_x_0), self._last = self._last, (index, x_0)
        levels = self.sigmas[max(index - 1, 0) : index + 2].tolist()
        if last_index != index - 1 or levels[-1] == 0 or self._signal(levels[0]) == 0:
            return x_0
        before, now, after = (math.log(self._signal(level) / level) for level in levels)
        return x_0 + (after - now) / (2 * (now - before)) * (x_0 - last_x_0)

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        """Returns the index of a timestep among the steps."""
        distances = (self._step_timesteps - float(timestep)).abs()
        index = int(distances.argmin())
        if not distances[index] <= 1e-4 * max(1.0, abs(float(timestep))):
            raise ValueError(f"timestep must be one of the scheduler's `timesteps`, got {float(timestep):g}.")
        return index

    # 3. Likelihood

    @torch.no_grad()
    def ode_likelihood(
        self,
        model: Callable,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        generator: Generators | None = None,
        num_steps: int = 25,
        num_probes: int = 2,
    ) -> TinyLikelihoodOutput:
        """
        Computes the negative log-likelihood of images with 256 gray levels by the probability-flow ODE, in bits per
        dimension (Song et al. 2021, https://huggingface.co/papers/2011.13456, section 4.3).

        The gray levels are dequantized uniformly, and taken for images at the noise level of that standard deviation, at
        which the model's density is evaluated: networks have learned to draw gray levels, and what lies between them
        is noise to them. The ODE is then integrated from there to pure noise by the classic Runge-Kutta method, with
        four evaluations per step. The trace of the velocity's Jacobian is exact for images of up to 256 values, at one
        backward pass per value, and otherwise Hutchinson's estimate (https://huggingface.co/papers/1810.01367), with
        Rademacher probes, drawn once per image and kept for all steps.

        This is an estimate, not a bound: it has the error of the steps and of the probes. Without these errors, its
        mean over the dequantization is an upper bound on the negative log-likelihood of the discrete images.

        Args:
            model (`Callable`): The network, called as `model(sample, timesteps).sample`.
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in [-1, 1], 2k/255 - 1.
            class_labels (`torch.Tensor`, *optional*): Passed to the network if given.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Makes the result deterministic.
            num_steps (`int`, *optional*, defaults to 25): The number of steps.
            num_probes (`int`, *optional*, defaults to 2): The number of Hutchinson's probes, at least 2.

        Returns:
            [`TinyLikelihoodOutput`]: The negative log-likelihood of each image and its standard error.

        Raises:
            `ValueError`: If `num_steps` is below 1, or `num_probes` below 2, or the network is a consistency model.
        """
        if self.config.get("stochastic_sampling"):
            raise ValueError(
                "A consistency model has no likelihood: its network does not predict the flow's velocity."
            )
        if num_steps < 1 or num_probes < 2:
            raise ValueError(f"num_steps must be at least 1 and num_probes 2, got {num_steps} and {num_probes}.")
        sample = sample.float()
        num_dimensions = sample[0].numel()

        def draw() -> torch.Tensor:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)

        levels = self._likelihood_levels(num_steps)
        signal = self._signal(levels[0])
        x = signal * (sample + (torch.special.ndtr(draw()) - 0.5) * 2 / 255)
        probes = None
        if num_dimensions > MAX_EXACT_DIMENSIONS:
            probes = [torch.where(draw() < 0, -1.0, 1.0) for _ in range(num_probes)]

        def velocity(x: torch.Tensor, level: float, labels: torch.Tensor | None) -> torch.Tensor:
            timesteps = self._timestep(torch.full((len(x),), level, device=x.device))
            condition = {} if labels is None else {"class_labels": labels}
            output = model(self.scale_model_input(x, timesteps), timesteps, **condition).sample
            return self._velocity(output.to(x.dtype), x, level)

        def slope(x: torch.Tensor, level: float) -> tuple[torch.Tensor, torch.Tensor]:
            """Computes the velocity and the trace of its Jacobian, by probes or exactly: (B, C, H, W), (P or 1, B)."""
            with torch.enable_grad():
                if probes is None:
                    return _exact_trace(lambda x, labels: velocity(x, level, labels), x, class_labels)
                x = x.detach().requires_grad_()
                v = velocity(x, level, class_labels)
                products = [torch.autograd.grad(v, x, probe, retain_graph=True)[0] * probe for probe in probes]
                return v.detach(), torch.stack([product.flatten(1).sum(dim=1) for product in products])

        traces = 0.0
        for start, end in itertools.pairwise(levels):
            h = end - start
            v_1, trace_1 = slope(x, start)
            v_2, trace_2 = slope(x + h / 2 * v_1, start + h / 2)
            v_3, trace_3 = slope(x + h / 2 * v_2, start + h / 2)
            v_4, trace_4 = slope(x + h * v_3, end)
            x = x + h / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
            traces = traces + h / 6 * (trace_1 + 2 * trace_2 + 2 * trace_3 + trace_4)  # (P, B)

        variance = self._prior_std(levels[-1]) ** 2
        log_prior = -0.5 * (
            x.square().flatten(1).sum(dim=1) / variance + num_dimensions * math.log(2 * math.pi * variance)
        )
        width = signal * 2 / 255  # of a gray level
        nats = -(log_prior + traces.mean(dim=0)) / num_dimensions - math.log(width)
        error = torch.zeros_like(nats)
        if probes is not None:
            error = traces.std(dim=0) / num_probes**0.5 / num_dimensions
        return TinyLikelihoodOutput(total=nats / math.log(2), standard_error=error / math.log(2))


def _exact_trace(
    velocity: Callable, x: torch.Tensor, class_labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes velocities and the traces of their Jacobians: (B, C, H, W) and (1, B). Each entry of the diagonal is the
    gradient of a copy of the image, and copies share a batch.
    """
    batch, num_dimensions = len(x), x[0].numel()
    trace = torch.zeros(batch, device=x.device)
    for dimensions in torch.arange(num_dimensions, device=x.device).split(max(1, _COPIES // batch)):
        count = len(dimensions)
        labels = None if class_labels is None else class_labels.repeat(count, *[1] * (class_labels.ndim - 1))
        copies = x.detach().repeat(count, 1, 1, 1).requires_grad_()  # (count * B, C, H, W)
        values = velocity(copies, labels)
        own = dimensions.repeat_interleave(batch)[:, None]
        (gradients,) = torch.autograd.grad(values.flatten(1).gather(1, own).sum(), copies)
        trace += gradients.flatten(1).gather(1, own).reshape(count, batch).sum(dim=0)
    return values[:batch].detach(), trace[None]
