"""What `TinyDDPMScheduler` and `TinyDDIMScheduler` share: noise schedules, interchange of configs, losses, the bound."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


# the papers' names -> diffusers' names, which every stock solver knows
BETA_SCHEDULE_ALIASES = {"cosine": "squaredcos_cap_v2", "quadratic": "scaled_linear"}
# stock DDPM alone knows these, so their betas are written into the config, where every stock solver looks first
WRITTEN_OUT_SCHEDULES = ("sigmoid", "laplace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", *WRITTEN_OUT_SCHEDULES, *BETA_SCHEDULE_ALIASES)

LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCES)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
LOSS_TYPES = ("l2", "l1", "huber", "pseudo_huber")
HUBER_SCHEDULES = ("constant", "exponential", "snr")

# what settles the betas where they are not given
SCHEDULE_ARGUMENTS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
# what no stock scheduler takes
TRAINING_ARGUMENTS = ("loss_type", "huber_delta", "huber_schedule", "snr_gamma")

# the half-log-SNR from which DPM-Solver's authors start on the cosine schedule: its own first, -9.9, is too low for them
COSINE_LAMBDA_MIN = -5.1


def check_known(name: str, given: Any, allowed: Sequence[str]) -> None:
    """Raises `ValueError`, naming the nearest of the `allowed` values, if `given` is none of them."""
    if given not in allowed:
        nearest = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"Unknown {name} {given!r}: it must be one of {', '.join(allowed)}. Did you mean {nearest!r}?"
        )


def discretized_gaussian_nll(sample: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """
    Negative log-likelihood in nats of 256 grey levels on [-1, 1] under a Gaussian whose tails fall to the two end levels
    (Ho et al. 2020, equation 13). Same shape as `sample`.
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
    The variational bound on the negative log-likelihood, in bits per dimension (Ho et al. 2020, equation 5).

    Args:
        total (`torch.Tensor` of shape `(batch_size,)`): The bound: `prior` plus all `terms`.
        prior (`torch.Tensor` of shape `(batch_size,)`): L_T, KL(q(x_T | x_0) || N(0, I)).
        terms (`torch.Tensor` of shape `(batch_size, num_train_timesteps)`):
            Column t is L_t of timestep t: column 0 the discretised decoder, -log p(x_0 | x_1) in the paper's counting
            from one; the others KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).
    """

    total: torch.Tensor
    prior: torch.Tensor
    terms: torch.Tensor


class TinySchedulerMixin:
    """
    What a tiny scheduler adds to the stock scheduler that it stands before: the four noise schedules under both their
    names, a config that any stock solver reads, any decreasing sequence of timesteps, losses and the bound.
    """

    # 1. The config

    def _resolve_schedule(self) -> dict[str, Any]:
        """The arguments that settle the betas, checked, in the spelling of stock schedulers."""
        config = self.config
        check_known("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
        beta_schedule = BETA_SCHEDULE_ALIASES.get(config.beta_schedule, config.beta_schedule)
        num_train_timesteps, trained_betas = config.num_train_timesteps, config.trained_betas

        if trained_betas is not None:
            trained_betas = np.asarray(trained_betas, dtype=np.float64)
            if trained_betas.ndim != 1 or not np.all((trained_betas > 0) & (trained_betas <= 1)):
                raise ValueError("trained_betas must be one list of numbers in (0, 1], one for each timestep.")
            trained_betas = trained_betas.tolist()
            num_train_timesteps = len(trained_betas)

        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, not {num_train_timesteps}.")

        if trained_betas is None and beta_schedule in WRITTEN_OUT_SCHEDULES:
            stock = DDPMScheduler(num_train_timesteps, config.beta_start, config.beta_end, beta_schedule)
            trained_betas = stock.betas.tolist()

        return {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
            "beta_schedule": beta_schedule,
            "trained_betas": trained_betas,
        }

    def _resolve_training(self) -> None:
        """Settles what is not given and checks the rest. Called last in `__init__`: the config is complete after it."""
        config = self.config
        check_known("prediction_type", config.prediction_type, PREDICTION_TYPES)
        check_known("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        check_known("loss_type", config.loss_type, LOSS_TYPES)
        check_known("huber_schedule", config.huber_schedule, HUBER_SCHEDULES)
        if not 0 < config.dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must be in (0, 1], not {config.dynamic_thresholding_ratio}.")
        if config.snr_gamma is not None and not config.snr_gamma > 0:
            raise ValueError(
                f"snr_gamma must be above 0 (5.0 is usual), or None for no weighting, not {config.snr_gamma}."
            )

        scheduled = config.huber_schedule != "constant"
        huber_delta = config.huber_delta if config.huber_delta is not None else (0.1 if scheduled else 1.0)
        if not 0 < huber_delta < math.inf:
            raise ValueError(f"huber_delta must be above 0, not {huber_delta}.")
        if scheduled and huber_delta >= 1:
            raise ValueError(
                f"huber_delta must be below 1 with huber_schedule={config.huber_schedule!r}, which goes from 1 to it, not "
                f"{huber_delta}."
            )
        # solvers of diffusers say None where the variance is fixed
        self.register_to_config(huber_delta=huber_delta, variance_type=config.variance_type or "fixed_small")

        if config.beta_schedule == "squaredcos_cap_v2" and config.trained_betas is None:
            self.register_to_config(lambda_min_clipped=COSINE_LAMBDA_MIN)

        # diffusers leaves out what is named here when another class is made from this config in the same process, which
        # would give a solver its own default for, say, beta_end. Only what no stock class takes may be left out.
        if "_use_default_values" in config:
            unused = [name for name in TRAINING_ARGUMENTS if name in config["_use_default_values"]]
            self.register_to_config(_use_default_values=unused)

    @classmethod
    def from_config(cls, config: dict[str, Any] = None, return_unused_kwargs: bool = False, **kwargs):
        """
        As in diffusers, but what is asked for wins over what is stored: a `beta_schedule`, `beta_start`, `beta_end` or
        `num_train_timesteps` over stored `trained_betas`, and a `huber_schedule` over the delta of another one.

        Args:
            config (`dict`): The config of any scheduler of diffusers or of this package.
            return_unused_kwargs (`bool`, *optional*, defaults to `False`): Whether to return unused arguments as well.
            kwargs (*optional*): Arguments of `__init__` that replace those of `config`.

        Returns:
            A scheduler of this class, or a tuple of it and the unused arguments.
        """
        if isinstance(config, dict):
            stale = set()
            if kwargs.keys() & set(SCHEDULE_ARGUMENTS) and "trained_betas" not in kwargs:
                stale.add("trained_betas")
            if kwargs.keys() & {"beta_schedule", "trained_betas"}:
                stale.add("lambda_min_clipped")
            if "huber_schedule" in kwargs:
                stale.add("huber_delta")
            config = {name: value for name, value in config.items() if name not in stale}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # 2. The steps of sampling

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """
        Sets the timesteps to sample with: `num_inference_steps` of them, spaced by the config's `timestep_spacing` (Lin et
        al. 2023, https://huggingface.co/papers/2305.08891, table 2), or a given list.

        Args:
            num_inference_steps (`int`, *optional*): How many, from 1 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): The device to put them on.
            timesteps (`list[int]`, *optional*):
                The timesteps themselves, strictly decreasing, from `num_train_timesteps - 1` to 0 at most.

        Raises:
            `ValueError`: If both or neither are given, or one is out of range, or the list is not decreasing.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give either num_inference_steps or timesteps, not both and not neither.")
        check_known("variance_type", self.config.variance_type, VARIANCE_TYPES)

        self.custom_timesteps = timesteps is not None
        values = np.asarray(timesteps) if self.custom_timesteps else self._spaced_timesteps(num_inference_steps)
        if values.ndim != 1 or values.size == 0 or not np.issubdtype(values.dtype, np.integer):
            raise ValueError("timesteps must be a list of integers, one at least.")
        if np.any(values[1:] >= values[:-1]):
            raise ValueError(f"timesteps must be strictly decreasing, not {values.tolist()}.")
        last = self.config.num_train_timesteps - 1
        if values[0] > last or values[-1] < 0:
            raise ValueError(
                f"timesteps go from {values[0]} to {values[-1]}, but must lie between {last} and 0 (steps_offset is "
                f"{self.config.steps_offset})."
            )

        self.num_inference_steps = len(values)
        self.timesteps = torch.from_numpy(values.astype(np.int64)).to(device)

    def _spaced_timesteps(self, num_inference_steps: int) -> np.ndarray:
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total or num_inference_steps != int(num_inference_steps):
            raise ValueError(
                f"num_inference_steps must be an integer from 1 to {total}, the number of steps trained with, not "
                f"{num_inference_steps}."
            )
        if self.config.timestep_spacing == "leading":
            step_ratio = total // num_inference_steps
            return np.arange(num_inference_steps)[::-1] * step_ratio + self.config.steps_offset
        if self.config.timestep_spacing == "trailing":
            # rounding may make arange one longer than asked for
            spaced = np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]
            return spaced.round().astype(np.int64) - 1
        first = 0 if num_inference_steps > 1 else total - 1  # a single step is from the noise, not from timestep 0
        return np.linspace(first, total - 1, num_inference_steps).round()[::-1].astype(np.int64)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """
        The timestep that a step from `timestep` leads to: the next lower entry of `timesteps`, or -1 (the image itself)
        below the last. Before `set_timesteps`, `timestep - 1`.

        Args:
            timestep (`int` or 0-dimensional `torch.Tensor`): The current timestep.

        Returns:
            `int` or `torch.Tensor`: The timestep before it in the diffusion process.
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
            raise ValueError(
                f"The network's output is {tuple(model_output.shape)}, but for a sample of {tuple(sample.shape)} and "
                f"variance_type {self.config.variance_type!r} it must be {' or '.join(str(tuple(x)) for x in allowed)}."
            )

    def _split_variance(
        self, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction and, from a network with twice the channels, what it says of the variance."""
        self._check_output(model_output, sample)
        if model_output.shape == sample.shape:
            return model_output, None
        return model_output.chunk(2, dim=1)

    def _check_variance(self, predicted_variance: torch.Tensor | None) -> None:
        variance_type = self.config.variance_type
        check_known("variance_type", variance_type, VARIANCE_TYPES)
        if variance_type in LEARNED_VARIANCES and predicted_variance is None:
            raise ValueError(f"variance_type {variance_type!r} needs a network with twice the channels of its sample.")

    def _predict(
        self, prediction: torch.Tensor, sample: torch.Tensor, alpha_bar: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0 and the noise that the network's prediction stands for, at a noise level."""
        if self.config.prediction_type == "epsilon":
            return (sample - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5, prediction
        if self.config.prediction_type == "sample":
            return prediction, (sample - alpha_bar**0.5 * prediction) / (1 - alpha_bar) ** 0.5
        # x_0 and noise are x_t and v turned by the angle whose cosine is sqrt(alpha_bar) (Salimans & Ho 2022, appendix D)
        pred_original_sample = alpha_bar**0.5 * sample - (1 - alpha_bar) ** 0.5 * prediction
        pred_epsilon = (1 - alpha_bar) ** 0.5 * sample + alpha_bar**0.5 * prediction
        return pred_original_sample, pred_epsilon

    def _clip(self, pred_original_sample: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding, static clipping or neither, as the config says."""
        if self.config.thresholding:
            return self._threshold_sample(pred_original_sample)
        if self.config.clip_sample:
            return pred_original_sample.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return pred_original_sample

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
        The loss of a batch of predictions made at `add_noise(sample, noise, timesteps)`, in float32.

        The network's target is the noise, the image or the velocity, as the config's `prediction_type` says. With d the
        difference from it and delta the config's `huber_delta` under its `huber_schedule`, the loss of a pixel is

        - `l2`: d^2;
        - `l1`: |d|;
        - `huber`: 0.5 d^2 where |d| < delta, delta (|d| - 0.5 delta) elsewhere (Huber 1964);
        - `pseudo_huber`: delta^2 (sqrt(1 + (d / delta)^2) - 1) (https://huggingface.co/papers/2403.16728).

        An image's loss is the mean of its pixels', times the min-SNR weight where `snr_gamma` is set
        (https://huggingface.co/papers/2303.09556). With `variance_type="learned_range"` 0.001 T L_t is added, the
        variational bound's term in bits per dimension with the predicted mean detached, for the variance to learn from
        (Nichol & Dhariwal 2021, https://huggingface.co/papers/2102.09672, equation 16).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                The network's output; with `variance_type="learned_range"`, of twice the channels.
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The images, in [-1, 1].
            noise (`torch.Tensor` of the same shape): The noise that was added to them, from N(0, I).
            timesteps (`torch.Tensor` of shape `(batch_size,)`): Each image's timestep, integers in [0, T).
            reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` or `"sum"` over the images, or `"none"`.

        Returns:
            `torch.Tensor`: A scalar, or of shape `(batch_size,)` with `reduction="none"`.

        Raises:
            `ValueError`: If the shapes don't fit, or `reduction` or `variance_type` is not known or can't be trained.
        """
        check_known("reduction", reduction, ("mean", "sum", "none"))
        check_known("variance_type", self.config.variance_type, VARIANCE_TYPES)
        if self.config.variance_type == "learned":
            raise ValueError("variance_type 'learned' can't be trained: use 'learned_range'.")
        if noise.shape != sample.shape:
            raise ValueError(f"noise must have the shape of sample, {tuple(sample.shape)}, not {tuple(noise.shape)}.")
        if timesteps.shape != sample.shape[:1] or timesteps.is_floating_point():
            raise ValueError(
                f"timesteps must be {len(sample)} integers, one for each image, not {timesteps.dtype} of shape "
                f"{tuple(timesteps.shape)}."
            )
        sample, noise, timesteps = sample.float(), noise.float(), timesteps.to(sample.device)
        prediction, predicted_variance = self._split_variance(model_output.float(), sample)

        if self.config.prediction_type == "epsilon":
            target = noise
        elif self.config.prediction_type == "sample":
            target = sample
        else:
            target = self.get_velocity(sample, noise, timesteps)
        loss = mean_flat(self._pixel_loss(prediction - target, timesteps))  # (B,)

        if self.config.snr_gamma is not None:
            loss = loss * self._min_snr_weight(timesteps)

        if self.config.variance_type == "learned_range":
            noisy_sample = self.add_noise(sample, noise, timesteps)
            alpha_bar = self._at(self._alpha_bars, timesteps, like=sample)
            pred_original_sample, _ = self._predict(prediction.detach(), noisy_sample, alpha_bar)
            bound = self._bound_terms(sample, pred_original_sample, predicted_variance, timesteps)
            loss = loss + 0.001 * self.config.num_train_timesteps * bound

        if reduction == "none":
            return loss
        return loss.mean() if reduction == "mean" else loss.sum()

    @property
    def _alpha_bars(self) -> torch.Tensor:
        """`alphas_cumprod` in float64: in float32, 1 - alphas_cumprod and what is made of it is off by 1e-4 near t = 0."""
        return torch.cumprod(1 - self.betas.double(), dim=0)  # (T,)

    @staticmethod
    def _at(table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Each image's entry of a table over all timesteps, ready to broadcast over the images."""
        values = table.to(like.dtype).to(like.device)[timesteps]  # the dtype first: not every device has float64
        return values.reshape(-1, *[1] * (like.ndim - 1))  # (B,) -> (B, 1, 1, 1)

    def _pixel_loss(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.config.loss_type == "l2":
            return error.square()
        if self.config.loss_type == "l1":
            return error.abs()
        delta = self._huber_delta(timesteps, like=error)
        if self.config.loss_type == "huber":
            return torch.where(error.abs() < delta, 0.5 * error.square(), delta * (error.abs() - 0.5 * delta))
        # the same as in the docstring, without its cancellation where |d| is far below delta
        return error.square() / (1 + torch.sqrt(1 + (error / delta).square()))

    def _huber_delta(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """delta_t of each image (https://huggingface.co/papers/2403.16728)."""
        delta, total = self.config.huber_delta, self.config.num_train_timesteps
        if self.config.huber_schedule == "exponential":
            deltas = delta ** (torch.arange(total) / total)
        elif self.config.huber_schedule == "snr":
            sigmas = ((1 - self._alpha_bars) / self._alpha_bars).sqrt()
            deltas = (1 - delta) / (1 + sigmas).square() + delta
        else:
            deltas = torch.full((total,), delta)
        return self._at(deltas, timesteps, like)

    def _min_snr_weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """min(SNR, gamma), the weight of a loss in x_0, in the units of the prediction."""
        alpha_bars, gamma = self._alpha_bars, self.config.snr_gamma
        snr = alpha_bars / (1 - alpha_bars)
        if self.config.prediction_type == "epsilon":
            weights = (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, and its limit 1 where snr is 0
        elif self.config.prediction_type == "sample":
            weights = snr.clamp(max=gamma)
        else:
            weights = snr.clamp(max=gamma) / (snr + 1)
        return weights.float().to(timesteps.device)[timesteps]

    # 4. The variational bound

    def _bound_terms(
        self,
        sample: torch.Tensor,
        pred_original_sample: torch.Tensor,
        predicted_variance: torch.Tensor | None,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """L_t of each image at its timestep, in bits per dimension, given what is predicted for x_0."""
        self._check_variance(predicted_variance)
        # q(x_{t-1} | x_t, x_0) for all t (Ho et al. 2020, equations 6 and 7): its mean's share of x_0, and its variance
        alpha_bars, betas = self._alpha_bars, self.betas.double()
        alpha_bars_prev = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
        original_coeffs = alpha_bars_prev.sqrt() * betas / (1 - alpha_bars)
        variances = (1 - alpha_bars_prev) / (1 - alpha_bars) * betas
        # the last variance is 0, with which no decoder could be: it takes the one before, as Nichol & Dhariwal's does
        variances[0] = variances[1] if len(variances) > 1 else betas[0]

        posterior_log = self._at(variances.log(), timesteps, like=sample)
        if self.config.variance_type == "learned":
            model_log = predicted_variance.log()
        elif self.config.variance_type == "learned_range":  # Nichol & Dhariwal 2021, equation 15
            share = (predicted_variance + 1) / 2
            model_log = share * self._at(betas.log(), timesteps, like=sample) + (1 - share) * posterior_log
        elif self.config.variance_type in ("fixed_large", "fixed_large_log"):
            large = torch.cat([variances[:1], betas[1:]])
            model_log = self._at(large.log(), timesteps, like=sample)
        else:
            model_log = posterior_log

        decoder_nll = discretized_gaussian_nll(sample, pred_original_sample, model_log)
        # both means have the same share of x_t, so they differ in that of x_0 alone
        error = self._at(original_coeffs, timesteps, like=sample) * (sample - pred_original_sample)
        log_ratio = posterior_log - model_log
        kl = 0.5 * (torch.exp(log_ratio) - 1 - log_ratio + error.square() * torch.exp(-model_log))
        terms = torch.where(timesteps == 0, mean_flat(decoder_nll), mean_flat(kl))
        return terms / math.log(2)

    @torch.no_grad()
    def variational_bound(
        self,
        model: Callable,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> TinyVariationalBoundOutput:
        """
        The variational bound on the negative log-likelihood of images of 256 grey levels, in bits per dimension, term by
        term (Ho et al. 2020, https://huggingface.co/papers/2006.11239, equation 5, with Nichol & Dhariwal's variances). One
        noise sample a term, all T terms: T passes of the network. Predictions of x_0 are clipped or thresholded as in
        `step`; the variance is the config's `variance_type`.

        Args:
            model (`Callable`): The network, called as `model(sample, timesteps).sample`.
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in [-1, 1], 2k/255 - 1.
            class_labels (`torch.Tensor`, *optional*): Handed to the network if given.
            generator (`torch.Generator` or a list of them, *optional*): Makes the noise, and so the result, repeatable.

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
