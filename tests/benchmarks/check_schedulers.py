"""
Checks which of diffusers' schedulers fit, and prints the table of docs/schedulers.md.

    python tests/benchmarks/check_schedulers.py [--checkpoint model_cards/digits-8]

Every scheduler class of the installed diffusers samples a mixture of three Gaussians, whose ideal network is known in
closed form for each beta schedule and prediction type, and a trained checkpoint, with 5, 10, 20 and 50 steps. A
deterministic solver must stay as near to DDIM with many steps as DDIM with the same number does, or nearly so; one that
draws noise must give each mode its share and width. What does not fit must be refused in one sentence. Exits with 1 if
one does neither.
"""

import argparse
import inspect
import itertools
import math
import sys
from pathlib import Path

import diffusers
import diffusers.schedulers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from tiny_diffusers import TinyDDIMScheduler, TinyPipeline
from tiny_diffusers.pipelines.pipeline_tiny import objective_of


STEPS, FINE = (5, 10, 20, 50), 200
SCHEDULES = ("linear", "cosine", "sigmoid", "quadratic")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULERS = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))

# They draw noise in each step: their samples are compared as a set.
STOCHASTIC = ("DDPM", "DDPMParallel", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "LCM", "SASolver")
STOCHASTIC += ("FlowMatchLCM",)


class IdealNetwork(ModelMixin, ConfigMixin):
    """Network that predicts E[x_0 | x_t], as a subclass defines it, for the objective and noise levels of a scheduler."""

    @register_to_config
    def __init__(self, sample_size=(1, 2), in_channels=1):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # a pipeline asks for its dtype and device

    def at_levels_of(self, scheduler):
        self.objective, self.config_of_levels = objective_of(scheduler), scheduler.config
        if self.objective == "betas":
            self.log_snr = torch.logit(scheduler.alphas_cumprod.double())
        return self

    def original(self, x_t, signal, level):
        """Returns E[x_0 | x_t] of x_t = signal x_0 + level eps, in float64."""
        raise NotImplementedError

    def forward(self, sample, timestep):
        t = float(timestep)
        if self.objective == "flow":
            level = t / self.config_of_levels.num_train_timesteps
            return UNet2DOutput(sample=((sample - self.original(sample, 1 - level, level)) / level).float())
        if self.objective == "edm":
            sigma, sigma_data = math.exp(4 * t), self.config_of_levels.sigma_data
            total = (sigma**2 + sigma_data**2) ** 0.5
            x = sample.double() * total  # the scheduler scaled it
            skipped = sigma_data**2 / total**2 * x
            return UNet2DOutput(
                sample=((self.original(x, 1.0, sigma) - skipped) * total / (sigma * sigma_data)).float()
            )

        # Solvers also use values between the training timesteps, where they interpolate the log-SNR linearly.
        low = int(t)
        high = min(low + 1, len(self.log_snr) - 1)
        abar = torch.sigmoid(torch.lerp(self.log_snr[low], self.log_snr[high], t - low))
        x_0 = self.original(sample, abar**0.5, (1 - abar) ** 0.5)
        epsilon = (sample - abar**0.5 * x_0) / (1 - abar) ** 0.5
        v = abar**0.5 * epsilon - (1 - abar) ** 0.5 * x_0
        outputs = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}
        return UNet2DOutput(sample=outputs[self.config_of_levels.prediction_type].float())


class MixtureNetwork(IdealNetwork):
    """Ideal network for images of two pixels from a mixture of Gaussians."""

    means = torch.tensor([[-0.7, -0.7], [0.6, -0.2], [0.0, 0.7]], dtype=torch.float64)  # (K, 2)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    std = 0.1

    def original(self, x_t, signal, level):
        x = x_t.double().flatten(1)[:, None]  # (B, 1, 2)
        variance = signal**2 * self.std**2 + level**2
        distance = x - signal * self.means  # (B, K, 2)
        share = torch.softmax(self.weights.log() - distance.square().sum(-1) / (2 * variance), dim=1)  # p(k | x_t)
        x_0 = (share[..., None] * (self.means + signal * self.std**2 / variance * distance)).sum(1)
        return x_0.reshape(x_t.shape)


def mixture_pipeline(schedule: str, prediction_type: str = "epsilon", **options) -> TinyPipeline:
    scheduler = TinyDDIMScheduler(
        beta_schedule=schedule,
        prediction_type=prediction_type,
        **{"clip_sample": False, "timestep_spacing": "trailing", **options},
    )
    return pipeline_of_levels(scheduler)


def pipeline_of_levels(scheduler) -> TinyPipeline:
    """Returns the pipeline that samples the mixture with its ideal network for a scheduler's objective."""
    pipe = TinyPipeline(MixtureNetwork().at_levels_of(scheduler), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mixture_statistics(samples: torch.Tensor) -> tuple[float, float]:
    """Computes the largest error of a mode's share, and the standard deviation of samples `(N, 1, 1, 2)` in a mode."""
    distances = (samples.double().flatten(1)[:, None] - MixtureNetwork.means).square().sum(-1)  # (N, K)
    nearest = distances.min(dim=1)
    shares = torch.bincount(nearest.indices, minlength=3) / len(samples)
    return (shares - MixtureNetwork.weights).abs().max().item(), (nearest.values.mean() / 2).sqrt().item()


def build(name: str, config: dict, **options):
    """Builds a scheduler of diffusers from the config, or by default; arguments that it requires are 1."""
    cls = getattr(diffusers.schedulers, name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = dict.fromkeys(required[1:], 1)
    try:
        return cls.from_config(config, **options, **arguments)
    except TypeError:  # RePaint takes betas as an array alone
        return cls(**options, **arguments)


def draw(pipe: TinyPipeline, scheduler, num_inference_steps: int, num_images: int) -> torch.Tensor:
    """Draws images with a scheduler put into the pipeline, always from the same noise."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": num_inference_steps, "eta": 0.0, "output_type": "latent"}
        return pipe(num_images, generator=generator, **options).images
    finally:
        pipe.scheduler = own


def is_stochastic(name: str) -> bool:
    return name.removesuffix("Scheduler") in STOCHASTIC


def fits_mixture(name: str, samples: torch.Tensor, ddim: torch.Tensor, fine: torch.Tensor) -> bool:
    """Returns whether samples are as good as those of DDIM with as many steps, measured by DDIM with many."""
    share_error, std = mixture_statistics(samples)
    _, ddim_std = mixture_statistics(ddim)
    if share_error > 0.1 or not 0.5 * MixtureNetwork.std < std < 1.25 * ddim_std + 0.05:
        return False
    return is_stochastic(name) or (samples - fine).abs().mean() < 2 * (ddim - fine).abs().mean() + 0.02


def fits_checkpoint(name: str, images: torch.Tensor, ddim: torch.Tensor, fine: torch.Tensor) -> bool:
    """Returns whether images in [-1, 1] have the mean and deviation of DDIM's, and if there is no noise its pixels."""
    if (images.mean() - fine.mean()).abs() > 0.1 or not 0.8 < images.std() / fine.std() < 1.2:
        return False
    return is_stochastic(name) or (images - fine).abs().mean() < 2 * (ddim - fine).abs().mean() + 0.02


def verdict(name: str, pipe: TinyPipeline, steps: int, ddim: torch.Tensor, fine: torch.Tensor, fits) -> str:
    """
    Returns "fits" or "FAILS", with the mean difference to `fine` in [0, 1] if there is no noise; "refused", in one
    sentence; or "uninstalled", if it needs a package.
    """
    try:
        images = draw(pipe, build(name, pipe.scheduler.config), steps, len(fine))
    except ImportError:
        return "uninstalled"
    except ValueError as error:
        return "refused" if "\n" not in str(error).strip() else "FAILS"
    difference = "" if is_stochastic(name) else f" {(images - fine).abs().mean() / 2:.3f}"
    return ("fits" if fits(name, images, ddim, fine) else "FAILS") + difference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="model_cards/digits-8")
    parser.add_argument("--num_images", type=int, default=16, help="images of the checkpoint; of a mixture, 2,000")
    args = parser.parse_args()

    trained = TinyPipeline.from_pretrained(args.checkpoint)
    trained.set_progress_bar_config(disable=True)
    mixtures = [mixture_pipeline(*kind) for kind in itertools.product(SCHEDULES, PREDICTION_TYPES)]
    # By DDIM, with each number of steps and with many.
    own = {steps: draw(trained, trained.scheduler, steps, args.num_images) for steps in (*STEPS, FINE)}
    mixed = [{steps: draw(pipe, pipe.scheduler, steps, 2000) for steps in (*STEPS, FINE)} for pipe in mixtures]

    failed = False
    print(
        "| scheduler | mixtures | "
        + " | ".join(f"{Path(args.checkpoint).name}, {steps} steps" for steps in STEPS)
        + " |"
    )
    print("| --- | --- |" + " ---: |" * len(STEPS))
    for name in SCHEDULERS:
        cells = [verdict(name, trained, steps, own[steps], own[FINE], fits_checkpoint) for steps in STEPS]
        verdicts = [
            verdict(name, pipe, steps, ddim[steps], ddim[FINE], fits_mixture).partition(" ")[0]
            for pipe, ddim in zip(mixtures, mixed, strict=True)
            for steps in STEPS
        ]
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts))
        print(f"| `{name}` | {counts} | " + " | ".join(cells) + " |", flush=True)
        failed |= any("FAILS" in cell for cell in [*cells, *verdicts])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
