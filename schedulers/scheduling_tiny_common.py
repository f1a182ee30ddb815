"""`TinySchedulerMixin`: noise schedules, configs for stock solvers, training losses and the variational bound."""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


Generators = torch.Generator | list[torch.Generator]

# The papers' names, and diffusers' names for them, which every stock solver knows.
BETA_SCHEDULE_ALIASES = {"cosine": "squaredcos_cap_v2", "quadratic": "scaled_linear"}
# Only stock DDPM knows these. Their betas are saved in the config, where every stock solver looks first.
WRITTEN_OUT_SCHEDULES = ("sigmoid", "laplace")
LEARNED_VARIANCES = ("learned", "learned_range")

# The config's arguments that take one of several names.
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", *WRITTEN_OUT_SCHEDULES, *BETA_SCHEDULE_ALIASES),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCES),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "loss_type": ("l2", "l1", "huber", "pseudo_huber", "vlb"),
    "huber_schedule": ("constant", "exponential", "snr"),
    "timestep_distribution": ("uniform", "logit_normal", "mixed"),
    "solver": ("euler", "multistep", "heun"),
}
TERMINAL_SIGNAL = 2.0**-12  # sqrt of the last alpha_cumprod, at a terminal SNR of 0
# The arguments that determine the betas if `trained_betas` is not given.
SCHEDULE_ARGUMENTS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
# The arguments that no stock scheduler takes.
TRAINING_ARGUMENTS = ("loss_type", "huber_delta", "huber_schedule", "snr_gamma")
# Those that weight or shape other losses than the variational bound, with the values that leave it as it is.
_UNUSED_BY_BOUND = {"huber_delta": (None, 1.0), "huber_schedule": ("constant",), "snr_gamma": (None,)}

# The half-log-SNR at which DPM-Solver's authors start on the cosine schedule. Its own first value, -9.9, is too low.
COSINE_LAMBDA_MIN = -5.1
# The highest noise level of EDM (https://huggingface.co/papers/2206.00364, table 1).
SIGMA_MAX = 80.0


def check_known(name: str, given: Any, allowed: Sequence[str]) -> None:
    """Raises `ValueError` with the nearest of the `allowed` values if `given` is not one of them."""
    if given not in allowed:
        nearest = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.0)[0]
        raise ValueError(f"Unknown {name} {given!r}: must be one of {', '.join(allowed)}. Did you mean {nearest!r}?")


def discretized_gaussian_nll(sample: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """
    Computes the negative log-likelihood, in nats, of 256 gray levels on [-1, 1] under a discretized Gaussian whose
    tails belong to the two end levels (Ho et al. 2020, equation 13). The result has the shape of `sample`.
    """
    scale = torch.exp(-0.5 * log_variance) / math.sqrt(2)
    upper = torch.erf((sample + 1 / 255 - mean) * scale)
    lower = torch.erf((sample - 1 / 255 - mean) * scale)
    upper = torch.where(sample > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(sample < -0.999, -torch.ones_like(lower), lower)
    return -torch.log((0.5 * (upper - lower)).clamp(min=1e-12))


def mean_flat(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).mean(dim=1)  # (B, ...) -> (B,)


@dataclass
class TinyVariationalBoundOutput(BaseOutput):
    """
    Output class for the variational bound on the negative log-likelihood (Ho et al. 2020, equation 5), in bits per
    dimension.

    Args:
        total (`torch.Tensor` of shape `(batch_size,)`): The bound: `prior` plus the sum of `terms`.
        prior (`torch.Tensor` of shape `(batch_size,)`): L_T, KL(q(x_T | x_0) || N(0, I)).
        terms (`torch.Tensor` of shape `(batch_size, num_train_timesteps)`):
            The term L_t of each timestep t. Column 0 is the discretized decoder, -log p(x_0 | x_1) in the paper, which
            counts from 1. The other columns are KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).
    """

    total: torch.Tensor
    prior: torch.Tensor
    terms: torch.Tensor


def _rescale_to_zero_snr(betas: torch.Tensor) -> torch.Tensor:
    """
    Rescales betas (Lin et al. 2023, https://huggingface.co/papers/2305.08891, algorithm 1) to a last alpha_cumprod of at
    most 2^-24, that of stock solvers: at exactly 0 their sigma would be infinite.
    """
    signals = torch.cumprod(1 - betas.double(), dim=0).sqrt()
    if signals[-1] < 1.1 * TERMINAL_SIGNAL:  # they are rescaled already
        return betas
    signals = (signals - signals[-1]) * signals[0] / (signals[0] - signals[-1])
    signals[-1] = (signals[-2] / 2).clamp(max=TERMINAL_SIGNAL)
    alpha_bars = signals.square()
    return 1 - alpha_bars / torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])


class TinyObjectiveMixin:
    """Mixin for a stock scheduler of any objective: checks of the config and of a training batch, and clipping."""

    _has_continuous_timesteps = False

    def _check_choices(self, *names: str) -> None:
        for name in names:
            check_known(name, self.config[name], CHOICES[name])

    def _check_clipping(self) -> None:
        config = self.config
        if not 0 < config.dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must be in (0, 1], got {config.dynamic_thresholding_ratio}.")
        if not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be above 0, got {config.clip_sample_range}.")

    @property
    def _clips(self) -> bool:
        """Returns whether [`~TinyObjectiveMixin._clip`] may change the predicted x_0."""
        return self.config.thresholding or self.config.clip_sample

    def _clip(self, pred_original_sample: torch.Tensor) -> torch.Tensor:
        """Applies dynamic thresholding, clipping or neither, by the config."""
        if self.config.thresholding:
            return self._threshold_sample(pred_original_sample)
        if self.config.clip_sample:
            return pred_original_sample.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return pred_original_sample

    def _check_batch(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, reduction: str) -> None:
        """Checks what every training loss takes beside the network's output."""
        check_known("reduction", reduction, ("mean", "sum", "none"))
        if noise.shape != sample.shape:
            raise ValueError(f"noise must have the shape of sample, {tuple(sample.shape)}, got {tuple(noise.shape)}.")
        if timesteps.shape != sample.shape[:1] or timesteps.is_floating_point() != self._has_continuous_timesteps:
            kind = "floats" if self._has_continuous_timesteps else "integers"
            raise ValueError(
                f"timesteps must be {len(sample)} {kind}, one for each image, got {timesteps.dtype} of shape "
                f"{tuple(timesteps.shape)}."
            )

    @staticmethod
    def _reduce(loss: torch.Tensor, reduction: str) -> torch.Tensor:
        """Reduces the losses of the images, (B,)."""
        if reduction == "none":
            return loss
        return loss.mean() if reduction == "mean" else loss.sum()


class TinySchedulerMixin(TinyObjectiveMixin):
    """
    Mixin for a stock scheduler. It adds four noise schedules under both their names, a config that any stock solver
    reads, custom timesteps, training losses and the variational bound.
    """

    # 1. Config

    def _stock_arguments(self, cls: type) -> dict[str, Any]:
        """Returns the stock class's arguments from the config, with the noise schedule checked and by its stock name."""
        self._check_choices("beta_schedule")
        arguments = {name: self.config[name] for name in inspect.signature(cls).parameters if name in self.config}
        beta_schedule, trained_betas = arguments["beta_schedule"], arguments["trained_betas"]
        arguments["beta_schedule"] = BETA_SCHEDULE_ALIASES.get(beta_schedule, beta_schedule)

        if trained_betas is not None:
            trained_betas = np.asarray(trained_betas, dtype=np.float64)
            if trained_betas.ndim != 1 or not np.all((trained_betas > 0) & (trained_betas <= 1)):
                raise ValueError("trained_betas must be a flat list of numbers in (0, 1], one for each timestep.")
            arguments |= {"trained_betas": trained_betas.tolist(), "num_train_timesteps": len(trained_betas)}
        if arguments["num_train_timesteps"] < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {arguments['num_train_timesteps']}.")

        self._has_zero_snr = rescale = arguments["rescale_betas_zero_snr"]
        if rescale or (trained_betas is None and beta_schedule in WRITTEN_OUT_SCHEDULES):
            stock = DDPMScheduler(**{name: arguments[name] for name in (*SCHEDULE_ARGUMENTS, "trained_betas")})
            betas = _rescale_to_zero_snr(stock.betas) if rescale else stock.betas
            arguments |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
        return arguments

    def _resolve_training(self) -> None:
        """Checks the other arguments and completes the config. Must be called last in `__init__`."""
        config = self.config
        self._check_choices("prediction_type", "timestep_spacing", "loss_type", "huber_schedule")
        self._check_clipping()
        if config.snr_gamma is not None and not config.snr_gamma > 0:
            raise ValueError(f"snr_gamma must be above 0, such as 5.0, or None, got {config.snr_gamma}.")
        for name, unused in _UNUSED_BY_BOUND.items():
            if config.loss_type == "vlb" and config[name] not in unused:
                raise ValueError(
                    f"{name}={config[name]!r} means nothing to loss_type='vlb', whose weights are those of the variational "
                    "bound: leave it out."
                )

        scheduled = config.huber_schedule != "constant"
        huber_delta = config.huber_delta if config.huber_delta is not None else (0.1 if scheduled else 1.0)
        if not 0 < huber_delta < math.inf:
            raise ValueError(f"huber_delta must be above 0 and finite, got {huber_delta}.")
        if scheduled and huber_delta >= 1:
            raise ValueError(
                f"huber_delta must be below 1 with huber_schedule={config.huber_schedule!r}, which goes from 1 to "
                f"huber_delta, got {huber_delta}."
            )
        self.register_to_config(rescale_betas_zero_snr=self._has_zero_snr)
        # Stock solvers have None for a fixed variance.
        self.register_to_config(huber_delta=huber_delta, variance_type=config.variance_type or "fixed_small")

        if config.beta_schedule == "squaredcos_cap_v2" and config.trained_betas is None:
            self.register_to_config(lambda_min_clipped=COSINE_LAMBDA_MIN)
        # Stock solvers space `use_karras_sigmas` between these, or else from the last sigma: 20,291 on cosine.
        sigmas = ((1 - self._alpha_bars) / self._alpha_bars).sqrt()
        self.register_to_config(sigma_min=sigmas[0].item(), sigma_max=min(sigmas[-1].item(), SIGMA_MAX))

        # In the same process, `from_config` of another class drops the arguments listed here. A solver would then use
        # its own default for, say, beta_end, so only arguments that no stock class takes may be listed.
        if "_use_default_values" in config:
            unused = [name for name in TRAINING_ARGUMENTS if name in config["_use_default_values"]]
            self.register_to_config(_use_default_values=unused)

    @classmethod
    def from_config(cls, config: dict[str, Any] = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """
        Instantiates a scheduler from a config, as in diffusers. Arguments also override the stored values that depend
        on them: `beta_schedule`, `beta_start`, `beta_end` and `num_train_timesteps` override `trained_betas`, and
        `huber_schedule` overrides `huber_delta`.

        Args:
            config (`dict`): The config of any scheduler of diffusers or of this package.
            return_unused_kwargs (`bool`, *optional*, defaults to `False`): Whether to return unused arguments as well.
            kwargs (*optional*): Arguments of `__init__` that override those of `config`.

        Returns:
            A scheduler of this class, or a tuple of it and the unused arguments.
        """
        if isinstance(config, dict):
            stale = set()
            if kwargs.keys() & set(SCHEDULE_ARGUMENTS) and "trained_betas" not in kwargs:
                stale.add("trained_betas")
            if kwargs.keys() & {"beta_schedule", "trained_betas"}:
                stale.add("lambda_min_clipped")
            if kwargs.keys() & {*SCHEDULE_ARGUMENTS, "trained_betas", "rescale_betas_zero_snr"}:
                stale |= {"sigma_min", "sigma_max"}
            if "huber_schedule" in kwargs:
                stale.add("huber_delta")
            config = {name: value for name, value in config.items() if name not in stale}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # 2. Sampling

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """
        Sets the timesteps for sampling: `num_inference_steps` of them, spaced by the config's `timestep_spacing` (Lin
        et al. 2023, https://huggingface.co/papers/2305.08891, table 2), or custom ones.

        Args:
            num_inference_steps (`int`, *optional*): The number of timesteps, from 1 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): The device to move the timesteps to.
            timesteps (`list[int]`, *optional*):
                Custom timesteps, strictly decreasing, from at most `num_train_timesteps - 1` to at least 0.

        Raises:
            `ValueError`: If both or neither are given, a value is out of range, or the list is not decreasing.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give exactly one of num_inference_steps and timesteps.")
        self._check_choices("variance_type")

        self.custom_timesteps = timesteps is not None
        values = np.asarray(timesteps) if self.custom_timesteps else self._spaced_timesteps(num_inference_steps)
        if values.ndim != 1 or values.size == 0 or not np.issubdtype(values.dtype, np.integer):
            raise ValueError("timesteps must be a list of at least one integer.")
        if np.any(values[1:] >= values[:-1]):
            raise ValueError(f"timesteps must be strictly decreasing, got {values.tolist()}.")
        high, low, last = values[0], values[-1], self.config.num_train_timesteps - 1
        if high > last or low < 0:
            offset = self.config.steps_offset
            raise ValueError(f"timesteps must be in [0, {last}], got {high} to {low} (steps_offset {offset}).")

        self.num_inference_steps = len(values)
        self.timesteps = torch.from_numpy(values.astype(np.int64)).to(device)

    def _spaced_timesteps(self, num_inference_steps: int) -> np.ndarray:
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total or num_inference_steps != int(num_inference_steps):
            raise ValueError(f"num_inference_steps must be an integer from 1 to {total}, got {num_inference_steps}.")
        if self.config.timestep_spacing == "leading":
            step_ratio = total // num_inference_steps
            return np.arange(num_inference_steps)[::-1] * step_ratio + self.config.steps_offset
        if self.config.timestep_spacing == "trailing":
            # by rounding, arange can have one value too many
            spaced = np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]
            return spaced.round().astype(np.int64) - 1
        first = 0 if num_inference_steps > 1 else total - 1  # a single step starts at the noise, not at timestep 0
        return np.linspace(first, total - 1, num_inference_steps).round()[::-1].astype(np.int64)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """
        Returns the timestep that a step from `timestep` (`int` or 0-dimensional `torch.Tensor`) leads to: the next
        lower entry of `timesteps`, or -1 (the image itself) after the last. Before `set_timesteps`: `timestep - 1`.
        """
        if self.num_inference_steps is None:
            return timestep - 1
        lower = self.timesteps[self.timesteps < timestep]
        return lower[0] if len(lower) else torch.tensor(-1)

    def _check_output(self, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        batch, channels, *rest = sample.shape
        allowed = [sample.shape]
        if self.config.variance_type in LEARNED_VARIANCES:
            allowed.append((batch, 2 * channels, *rest))
        if model_output.shape not in allowed:
            shapes = " or ".join(str(tuple(shape)) for shape in allowed)
            raise ValueError(
                f"The model output for variance_type {self.config.variance_type!r} must be {shapes}, got "
                f"{tuple(model_output.shape)}."
            )

    def _split_variance(self, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Splits the model output into the prediction and the predicted variance (None without one)."""
        self._check_output(output, sample)
        if output.shape == sample.shape:
            return output, None
        return output.chunk(2, dim=1)

    def _check_variance(self, predicted_variance: torch.Tensor | None) -> None:
        self._check_choices("variance_type")
        variance_type = self.config.variance_type
        if variance_type in LEARNED_VARIANCES and predicted_variance is None:
            raise ValueError(f"variance_type {variance_type!r} needs a network with twice the channels of its sample.")

    def _predict(
        self, prediction: torch.Tensor, sample: torch.Tensor, alpha_bar: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the predicted x_0 and the predicted noise from the network's prediction, at a noise level."""
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * prediction) / signal, prediction
        if self.config.prediction_type == "sample":
            return prediction, (sample - signal * prediction) / sigma
        # Salimans & Ho 2022, appendix D: (x_t, v) rotated by the angle whose cosine is sqrt(alpha_bar).
        return signal * sample - sigma * prediction, sigma * sample + signal * prediction

    # 3. Training

    def training_loss(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """
        Computes the loss of a batch of predictions at `add_noise(sample, noise, timesteps)`, in float32.

        The network's target is the noise, the image or the velocity, by the config's `prediction_type`. With d the
        difference from it and delta the config's `huber_delta` under its `huber_schedule`, the loss of a pixel is

        - `l2`: d^2;
        - `l1`: |d|;
        - `huber`: 0.5 d^2 where |d| < delta, delta (|d| - 0.5 delta) elsewhere (Huber 1964);
        - `pseudo_huber`: delta^2 (sqrt(1 + (d / delta)^2) - 1) (https://huggingface.co/papers/2403.16728).

        The loss of an image is the mean over its pixels, times the min-SNR weight if `snr_gamma` is set
        (https://huggingface.co/papers/2303.09556). With `variance_type="learned_range"`, 0.001 T L_t is added, which
        trains the variance: L_t is the term of the variational bound in bits per dimension, with the predicted mean
        detached (Nichol & Dhariwal 2021, https://huggingface.co/papers/2102.09672, equation 16).

        `loss_type="vlb"` is the bound itself, T L_t (Ho et al. 2020, equation 5): its mean over uniform timesteps is the
        bound in bits per dimension, without the constant L_T. x_0 is not clipped, as that would stop the gradient, so
        with `clip_sample` or `thresholding` [`~TinySchedulerMixin.variational_bound`] is of another x_0.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                The network's output, with twice the channels for `variance_type="learned_range"`.
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The images, in [-1, 1].
            noise (`torch.Tensor` of the same shape): The noise added to the images, from N(0, I).
            timesteps (`torch.Tensor` of shape `(batch_size,)`): The timestep of each image, an integer in [0, T).
            reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` or `"sum"` over the images, or `"none"`.

        Returns:
            `torch.Tensor`: The loss, a scalar, or of shape `(batch_size,)` with `reduction="none"`.

        Raises:
            `ValueError`: If shapes don't match, `reduction` or `variance_type` is unknown, or `variance_type` is
                `learned`, which can't be trained.
        """
        self._check_choices("variance_type")
        if self.config.variance_type == "learned":
            raise ValueError("variance_type 'learned' can't be trained: use 'learned_range'.")
        self._check_batch(sample, noise, timesteps, reduction)
        sample, noise, timesteps = sample.float(), noise.float(), timesteps.to(sample.device)
        prediction, predicted_variance = self._split_variance(model_output.float(), sample)

        if self.config.loss_type == "vlb":
            return self._reduce(self._bound_loss(prediction, predicted_variance, sample, noise, timesteps), reduction)

        target = {"epsilon": noise, "sample": sample}.get(self.config.prediction_type)
        if target is None:
            target = self.get_velocity(sample, noise, timesteps)
        loss = mean_flat(self._pixel_loss(prediction - target, timesteps))  # (B,)

        if self.config.snr_gamma is not None:
            loss = loss * self._gather(self._min_snr_weights, timesteps, like=loss)

        if self.config.variance_type == "learned_range":
            bound = self._bound_loss(prediction.detach(), predicted_variance, sample, noise, timesteps)
            loss = loss + 0.001 * bound
        return self._reduce(loss, reduction)

    @property
    def _alpha_bars(self) -> torch.Tensor:
        """Returns `alphas_cumprod` in float64. In float32, 1 - alphas_cumprod has an error of 1e-4 near t = 0."""
        return torch.cumprod(1 - self.betas.double(), dim=0)  # (T,)

    @staticmethod
    def _gather(table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Gathers each image's value from a table over all timesteps, shaped to broadcast with `like`."""
        values = table.to(like.dtype).to(like.device)[timesteps]  # dtype first: not all devices support float64
        return values.reshape(-1, *[1] * (like.ndim - 1))  # (B,) -> (B, 1, 1, 1)

    def _pixel_loss(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.config.loss_type == "l2":
            return error.square()
        if self.config.loss_type == "l1":
            return error.abs()
        delta = self._gather(self._huber_deltas, timesteps, like=error)
        if self.config.loss_type == "huber":
            return torch.where(error.abs() < delta, 0.5 * error.square(), delta * (error.abs() - 0.5 * delta))
        # Equal to the docstring's formula, without its cancellation for |d| far below delta.
        return error.square() / (1 + torch.sqrt(1 + (error / delta).square()))

    @property
    def _huber_deltas(self) -> torch.Tensor:
        """Returns delta_t for all t (https://huggingface.co/papers/2403.16728)."""
        delta, total = self.config.huber_delta, self.config.num_train_timesteps
        if self.config.huber_schedule == "exponential":
            return delta ** (torch.arange(total) / total)
        if self.config.huber_schedule == "snr":
            sigmas = ((1 - self._alpha_bars) / self._alpha_bars).sqrt()
            return (1 - delta) / (1 + sigmas).square() + delta
        return torch.full((total,), delta)

    @property
    def _min_snr_weights(self) -> torch.Tensor:
        """Returns min(SNR, gamma), the weight of a loss in x_0, as a weight of the prediction's loss, for all t."""
        alpha_bars, gamma = self._alpha_bars, self.config.snr_gamma
        snr = alpha_bars / (1 - alpha_bars)
        if self.config.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, which is 1 in the limit of snr = 0
        if self.config.prediction_type == "sample":
            return snr.clamp(max=gamma)
        return snr.clamp(max=gamma) / (snr + 1)

    # 4. Variational bound

    def _bound_loss(
        self,
        prediction: torch.Tensor,
        pred_variance: torch.Tensor | None,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Computes T L_t of each image in bits per dimension, an estimate of the sum of all L_t from one of them."""
        alpha_bar = self._gather(self._alpha_bars, timesteps, like=sample)
        pred_x_0, _ = self._predict(prediction, self.add_noise(sample, noise, timesteps), alpha_bar)
        return self.config.num_train_timesteps * self._bound_terms(sample, pred_x_0, pred_variance, timesteps)

    def _bound_terms(
        self, x_0: torch.Tensor, pred_x_0: torch.Tensor, pred_variance: torch.Tensor | None, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Computes L_t of each image at its timestep, in bits per dimension, from the predicted x_0 and variance."""
        self._check_variance(pred_variance)
        # q(x_{t-1} | x_t, x_0) for all t: its mean's coefficient of x_0, its variance (Ho et al. 2020, equations 6, 7)
        alpha_bars, betas = self._alpha_bars, self.betas.double()
        alpha_bars_prev = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
        original_coeffs = alpha_bars_prev.sqrt() * betas / (1 - alpha_bars)
        variances = (1 - alpha_bars_prev) / (1 - alpha_bars) * betas
        # At t = 0 the variance is 0, which gives no decoder. Like Nichol & Dhariwal, use the variance of t = 1.
        variances[0] = variances[1] if len(variances) > 1 else betas[0]

        posterior_log = self._gather(variances.log(), timesteps, like=x_0)
        if self.config.variance_type == "learned":
            model_log = pred_variance.log()
        elif self.config.variance_type == "learned_range":  # Nichol & Dhariwal 2021, equation 15
            share = (pred_variance + 1) / 2
            model_log = share * self._gather(betas.log(), timesteps, like=x_0) + (1 - share) * posterior_log
        elif self.config.variance_type in ("fixed_large", "fixed_large_log"):
            model_log = self._gather(torch.cat([variances[:1], betas[1:]]).log(), timesteps, like=x_0)
        else:
            model_log = posterior_log

        decoder_nll = discretized_gaussian_nll(x_0, pred_x_0, model_log)
        # Both means have the same coefficient of x_t, so they differ only by that of x_0.
        error = self._gather(original_coeffs, timesteps, like=x_0) * (x_0 - pred_x_0)
        log_ratio = posterior_log - model_log
        kl = 0.5 * (torch.exp(log_ratio) - 1 - log_ratio + error.square() * torch.exp(-model_log))
        return torch.where(timesteps == 0, mean_flat(decoder_nll), mean_flat(kl)) / math.log(2)

    @torch.no_grad()
    def variational_bound(
        self,
        model: Callable,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        generator: Generators | None = None,
    ) -> TinyVariationalBoundOutput:
        """
        Computes the variational bound on the negative log-likelihood of images with 256 gray levels, in bits per
        dimension (Ho et al. 2020, https://huggingface.co/papers/2006.11239, equation 5, with Nichol & Dhariwal's
        variances). Each of the T terms takes one noise sample and one pass of the network. x_0 is clipped or
        thresholded as in `step`, and the variance is that of `variance_type`.

        Args:
            model (`Callable`): The network, called as `model(sample, timesteps).sample`.
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in [-1, 1], 2k/255 - 1.
            class_labels (`torch.Tensor`, *optional*): Passed to the network if given.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Makes the result deterministic.

        Returns:
            [`TinyVariationalBoundOutput`]: The bound and its terms, for each image.
        """
        sample = sample.float()
        condition = {} if class_labels is None else {"class_labels": class_labels}
        total = self.config.num_train_timesteps

        alpha_bars = self._alpha_bars.tolist()
        terms = torch.empty(len(sample), total, device=sample.device)
        for t in range(total):
            timesteps = torch.full((len(sample),), t, device=sample.device)
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            noisy_sample = self.add_noise(sample, noise, timesteps)
            output = model(noisy_sample, timesteps, **condition).sample
            prediction, predicted_variance = self._split_variance(output.float(), sample)
            pred_original_sample, _ = self._predict(prediction, noisy_sample, alpha_bars[t])
            terms[:, t] = self._bound_terms(sample, self._clip(pred_original_sample), predicted_variance, timesteps)

        last = alpha_bars[-1]
        prior = 0.5 * (last * mean_flat(sample.square()) - last - math.log1p(-last)) / math.log(2)
        return TinyVariationalBoundOutput(total=prior + terms.sum(dim=1), prior=prior, terms=terms)
