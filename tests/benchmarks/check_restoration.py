"""
Measures how far each method of editing is from the exact posterior, and prints the table of docs/editing.md.

    python tests/benchmarks/check_restoration.py [--num_images 4000]

The images are 8x8 and normally distributed, with neighboring pixels correlated, so that the ideal network and the
posterior of an observation are known in closed form. A cell is the error of the samples' mean, by the root of its mean
square over the pixels, and of their covariance, by its Frobenius norm: each as a share of the posterior's standard
deviation or of the norm of its covariance.
"""

import argparse

import torch
from check_schedulers import IdealNetwork

from tiny_diffusers import (
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyInpaintPipeline,
    TinyRestorationPipeline,
)


SIDE = 8
SCHEDULERS = {
    "betas": lambda: TinyDDIMScheduler(
        beta_schedule="cosine", prediction_type="v_prediction", clip_sample=False, timestep_spacing="linspace"
    ),
    "flow": TinyFlowMatchScheduler,
    "EDM": TinyEDMScheduler,
}
METHODS = {
    "RePaint": {"pipeline": "inpaint"},
    "RePaint, no jumps": {"pipeline": "inpaint", "jump_n_sample": 1},
    "RePaint, 10 jumps of 10": {"pipeline": "inpaint", "jump_length": 10, "jump_n_sample": 10},
    "RePaint, each step 5 times": {"pipeline": "inpaint", "jump_length": 1},
    "RePaint, each step 3 times": {"pipeline": "inpaint", "jump_length": 1, "jump_n_sample": 3},
    "DDNM": {"method": "ddnm"},
    "DDNM, 150 steps": {"method": "ddnm", "num_inference_steps": 150},
    "DDNM, eta 0.85": {"method": "ddnm", "eta": 0.85},
    "DDNM, each step 3 times": {"method": "ddnm", "jump_n_sample": 3},
    "DDNM, 5 jumps of 5": {"method": "ddnm", "jump_length": 5, "jump_n_sample": 5},
    "pseudo-inverse guidance": {"method": "pigdm"},
    "pseudo-inverse guidance, eta 0": {"method": "pigdm", "eta": 0.0},
    "pseudo-inverse guidance, 200 steps": {"method": "pigdm", "num_inference_steps": 200},
}


class GaussianNetwork(IdealNetwork):
    """Ideal network for normally distributed images of 8x8 pixels."""

    def __init__(self):
        super().__init__(sample_size=SIDE, in_channels=1)
        position = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
        self.covariance = 0.25 * torch.exp(-torch.cdist(position, position) / 3)  # (64, 64)
        self.mean = 0.3 * torch.sin(position[:, 0])

    def original(self, x_t, signal, level):
        x = x_t.double().flatten(1)
        total = signal**2 * self.covariance + level**2 * torch.eye(len(self.mean), dtype=torch.double)
        x_0 = self.mean + (x - signal * self.mean) @ torch.linalg.solve(total, signal * self.covariance)
        return x_0.reshape(x_t.shape)

    def posterior(self, matrix, y, noise_std):
        """Returns the mean (64,) and the covariance (64, 64) of the images given y = matrix x + noise."""
        total = matrix @ self.covariance @ matrix.T + noise_std**2 * torch.eye(len(matrix), dtype=torch.double)
        gain = torch.linalg.solve(total, matrix @ self.covariance).T
        return self.mean + gain @ (y - matrix @ self.mean), self.covariance - gain @ matrix @ self.covariance


def observations() -> dict[str, torch.Tensor]:
    """Returns the matrix of each observation."""
    pooled = torch.nn.functional.avg_pool2d(torch.eye(SIDE**2).view(-1, 1, SIDE, SIDE), 2)
    return {
        "half": torch.eye(SIDE**2, dtype=torch.double)[: SIDE**2 // 2],
        "super-resolution": pooled.flatten(1).T.double(),
        "random": torch.randn(16, SIDE**2, generator=torch.Generator().manual_seed(1), dtype=torch.double) / SIDE,
    }


def errors(
    objective: str, observation: str, noise_std: float, num_images: int, pipeline: str = "restoration", **options
) -> tuple[float, float] | None:
    """Returns the errors of the mean and of the covariance, or None where RePaint is not defined."""
    if pipeline == "inpaint" and (observation != "half" or noise_std):
        return None
    scheduler = SCHEDULERS[objective]()
    network = GaussianNetwork().at_levels_of(scheduler)
    matrix = observations()[observation]
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(SIDE**2 + len(matrix), generator=generator, dtype=torch.double)
    x = network.mean + torch.linalg.cholesky(network.covariance) @ noise[: SIDE**2]
    y = matrix @ x + noise_std * noise[SIDE**2 :]
    options |= {"num_images": num_images, "generator": generator, "output_type": "latent"}
    if pipeline == "inpaint":
        pipe = TinyInpaintPipeline(network, scheduler)
        pipe.set_progress_bar_config(disable=True)
        hidden = torch.ones(SIDE, SIDE)
        hidden[: SIDE // 2] = 0
        # images leave [0, 1] here, so they are given as they are
        pipe._preprocess = lambda images, batch_size: images
        samples = pipe(x.view(1, 1, SIDE, SIDE).float(), hidden, **options).images
    else:
        pipe = TinyRestorationPipeline(network, scheduler)
        pipe.set_progress_bar_config(disable=True)
        samples = pipe(
            y[None].float(), lambda images: images.flatten(1) @ matrix.T.float(), noise_std=noise_std, **options
        )
        samples = samples.images
    samples = samples.flatten(1).double()
    mean, covariance = network.posterior(matrix, y, noise_std)
    mean_error = ((samples.mean(dim=0) - mean).square().mean() / covariance.diagonal().mean()).sqrt()
    return float(mean_error), float((torch.cov(samples.T) - covariance).norm() / covariance.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=4000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--objectives", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    args = parser.parse_args()

    cases = [(name, noise_std) for name in observations() for noise_std in (0.0, 0.1)]
    names = [f"{name}, noise {noise_std:g}" if noise_std else name for name, noise_std in cases]
    print("| method | objective | " + " | ".join(names) + " |")
    print("| --- | --- |" + " ---: |" * len(names))
    for method in args.methods:
        for objective in args.objectives:
            cells = []
            for observation, noise_std in cases:
                found = errors(objective, observation, noise_std, args.num_images, **METHODS[method])
                cells.append("" if found is None else f"{found[0]:.0%}, {found[1]:.0%}")
            print(f"| {method} | {objective} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
