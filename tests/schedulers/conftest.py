"""Gaussian data. Its ideal network is known in closed form, so whole sampling chains can be checked exactly."""

import math
from types import SimpleNamespace

import pytest
import torch


class GaussianData:
    """Data of independent pixels from N(mean, std^2)."""

    def __init__(self, mean: float, std: float):
        self.mean, self.std = mean, std

    def posterior_of_original(self, x_t, alpha_bar):
        """Returns the mean and variance of x_0 given x_t."""
        x_t_variance = alpha_bar * self.std**2 + 1 - alpha_bar
        gain = alpha_bar**0.5 * self.std**2 / x_t_variance
        return self.mean + gain * (x_t - alpha_bar**0.5 * self.mean), self.std**2 * (1 - alpha_bar) / x_t_variance

    def predict(self, x_t, alpha_bar, prediction_type):
        x_0, _ = self.posterior_of_original(x_t, alpha_bar)
        epsilon = (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
        return {
            "epsilon": epsilon,
            "sample": x_0,
            "v_prediction": alpha_bar**0.5 * epsilon - (1 - alpha_bar) ** 0.5 * x_0,
        }[prediction_type]

    def ideal_variances(self, scheduler):
        """Returns Var(x_{t-1} | x_t) for all t, (T,)."""
        chain = Chain(scheduler)
        _, x_0_variance = self.posterior_of_original(0.0, chain.alpha_bar)
        return chain.posterior_variance + chain.original_coeff**2 * x_0_variance

    def network(self, scheduler):
        """Returns the ideal network, with the ideal variance for `learned_range`."""
        chain, ideal = Chain(scheduler), self.ideal_variances(scheduler)
        low, high = chain.decoder_posterior_variance.log(), chain.beta.log()
        share = 2 * (ideal.log() - low) / (high - low) - 1  # the network's output for `learned_range`

        def unet(sample, timesteps, class_labels=None):
            t = torch.as_tensor(timesteps).expand(len(sample)).reshape(-1, 1, 1, 1)
            output = self.predict(sample.double(), chain.alpha_bar[t], scheduler.config.prediction_type)
            if scheduler.config.variance_type == "learned_range":
                output = torch.cat([output, share[t].expand_as(output)], dim=1)
            return SimpleNamespace(sample=output.float())

        return unet


class GaussianFlow:
    """The ideal network of rectified flow or EDM for images from N(mean, cov), flattened to D values."""

    def __init__(self, scheduler, mean, cov):
        self.scheduler = scheduler
        self.mean, (self.variances, self.basis) = torch.as_tensor(mean).double(), torch.linalg.eigh(cov.double())

    def original(self, x, signal, level):
        """Returns E[x_0 | x] of x = signal x_0 + level eps, with a signal and a level (B, 1) for x (B, D)."""
        gain = signal * self.variances / (signal**2 * self.variances + level**2)  # (B, D), in the eigenbasis
        return self.mean + (gain * ((x - signal * self.mean) @ self.basis)) @ self.basis.T

    def __call__(self, sample, timesteps, class_labels=None):
        t = torch.as_tensor(timesteps).double().reshape(-1, 1)
        x = sample.double().flatten(1)
        if "sigma_data" not in self.scheduler.config:
            s = t / self.scheduler.config.num_train_timesteps
            output = (x - self.original(x, 1 - s, s)) / s.clamp(min=1e-9)
            output = torch.where(s > 0, output, -x)  # E[eps] - x_0
        else:
            sigma, sigma_data = (4 * t).exp(), self.scheduler.config.sigma_data
            x = x * (sigma**2 + sigma_data**2) ** 0.5
            skipped = sigma_data**2 / (sigma**2 + sigma_data**2) * x
            output = (
                (self.original(x, 1.0, sigma) - skipped) * (sigma**2 + sigma_data**2) ** 0.5 / (sigma * sigma_data)
            )
        return SimpleNamespace(sample=output.reshape(sample.shape).float())


class Chain:
    """Quantities of the papers for all timesteps in float64, from the betas (Ho et al. 2020, equations 6 and 7)."""

    def __init__(self, scheduler):
        self.beta = scheduler.betas.double()
        self.alpha_bar = torch.cumprod(1 - self.beta, dim=0)
        self.alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self.posterior_variance = (1 - self.alpha_bar_prev) / (1 - self.alpha_bar) * self.beta
        self.original_coeff = self.alpha_bar_prev.sqrt() * self.beta / (1 - self.alpha_bar)
        self.current_coeff = (1 - self.beta).sqrt() * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.decoder_posterior_variance = self.posterior_variance.clone()
        self.decoder_posterior_variance[0] = self.posterior_variance[1]


@pytest.fixture
def chain():
    return Chain


@pytest.fixture
def gaussian():
    return GaussianData


@pytest.fixture
def gaussian_flow():
    return GaussianFlow


@pytest.fixture
def bits_of_levels():
    """Returns a function for the bits of 256 levels on [-1, 1] under a Gaussian with its tails in the end levels."""

    def bits(sample, mean, std):
        normal = torch.distributions.Normal(mean, std)
        upper = torch.where(sample > 0.999, 1.0, normal.cdf(sample.double() + 1 / 255))
        lower = torch.where(sample < -0.999, 0.0, normal.cdf(sample.double() - 1 / 255))
        return -torch.log(upper - lower) / math.log(2)

    return bits
