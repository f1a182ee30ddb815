# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which noise schedule?
#
# Five student reports trained diffusion models of small images, and disagreed about the noise schedule: one found cosine betas
# best, another the worst. Here the question is asked once more, in plain PyTorch: the four schedules, one small network for
# each, and the same digits, seeds and steps.

# %%
import importlib.util
import subprocess
import sys


SOURCE = "tiny-diffusers"  # in Colab: "git+" and the address of your copy of the repository
if importlib.util.find_spec("tiny_diffusers") is None:  # as in Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import os


STEPS = int(os.environ.get("NOTEBOOK_STEPS", 300))  # of training each network

# %% [markdown]
# ## What a schedule does
#
# It says how much of the image is left at timestep t: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

# %%
import matplotlib.pyplot as plt
import torch

from tiny_diffusers import TinyDDIMScheduler, TinyInterpolationPipeline, TinyPipeline, TinyUNet2DModel
from tiny_diffusers.data import load_images, normalize
from tiny_diffusers.plots import image_grid


device = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("linear", "cosine", "sigmoid", "quadratic")
schedulers = {name: TinyDDIMScheduler(beta_schedule=name) for name in NAMES}
for name, scheduler in schedulers.items():
    plt.plot(scheduler.alphas_cumprod, label=name)
plt.xlabel("t")
plt.ylabel("abar, the share of the image")
plt.legend()
plt.show()
print(
    "abar in the middle:",
    {name: round(scheduler.alphas_cumprod[500].item(), 2) for name, scheduler in schedulers.items()},
)

# %%
digits = normalize(load_images("digits").images)  # (1797, 1, 8, 8) in [-1, 1]
noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
timesteps = torch.arange(0, 1000, 111)  # 0, 111, ... 999
rows = [
    scheduler.add_noise(digits[:1].expand(10, -1, -1, -1), noise.expand(10, -1, -1, -1), timesteps)
    for scheduler in schedulers.values()
]  # (10, 1, 8, 8) each
image_grid((torch.cat(rows) / 2 + 0.5).clip(0, 1), columns=10, scale=6, row_labels=NAMES)

# %% [markdown]
# In the middle, linear betas have left 8% of the image's variance, and spend the other half of the timesteps on little but
# noise. Cosine betas have left 49%.
#
# ## Train one network for each
#
# The scheduler computes the loss of what it is for: here the network predicts the noise.

# %%
def train(scheduler, steps=STEPS, batch_size=32):
    """Trains a network on the digits; returns it with the losses of its steps."""
    torch.manual_seed(0)
    unet = TinyUNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), attention=("none", "full")
    ).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        images = digits[torch.randint(len(digits), (batch_size,), generator=generator)]
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(len(scheduler.betas), (batch_size,), generator=generator)
        noisy = scheduler.add_noise(images, noise, timesteps)
        prediction = unet(noisy.to(device), timesteps.to(device)).sample
        loss = scheduler.training_loss(prediction, images.to(device), noise.to(device), timesteps.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return unet.eval(), losses


pipes = {}
for name, scheduler in schedulers.items():
    unet, losses = train(scheduler)
    pipes[name] = TinyPipeline(unet, scheduler)
    pipes[name].set_progress_bar_config(disable=True)
    print(f"{name:10} mean loss of the last 50 steps: {torch.tensor(losses[-50:]).mean():.3f}")

# %% [markdown]
# **These losses can't be compared.** Each schedule spends its timesteps on other amounts of noise, and a lot of noise is easy
# to recognize as noise. So linear betas have the lowest loss, which says nothing about their images.
#
# ## Look, then measure
#
# A row for each schedule, from the same noise, first with 5 steps and then with 20.

# %%
def draw(pipe, num_inference_steps, count=12):
    seeds = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(batch_size=count, generator=seeds, num_inference_steps=num_inference_steps).images


grids = [draw(pipe, num_inference_steps) for num_inference_steps in (5, 20) for pipe in pipes.values()]
labels = [f"{name}, {num_inference_steps} steps" for num_inference_steps in (5, 20) for name in pipes]
image_grid(sum(grids, []), columns=12, scale=5, row_labels=labels)

# %%
from IPython.display import Markdown

from tiny_diffusers.evaluation import Protocol, compare, evaluate


reference = load_images("digits")
protocol = Protocol(num_images=min(300, 10 * STEPS), features="pixels", metrics=["frechet_distance"], num_jackknife=5)
reports = {name: evaluate(pipe, reference, protocol, output_dir=f"schedules/{name}") for name, pipe in pipes.items()}
Markdown(compare(reports))

# %% [markdown]
# The distances, unlike the losses, are those of one protocol: the same number of images, the same features, the same reference.
# ± is the error over the images drawn. One training each is weak evidence about schedules; `tiny-diffusers study
# unconditional_digits_betas --seeds 0,1,2` repeats this with three seeds and names a winner only if the errors allow it.
#
# ## Interpolation
#
# The reports walk from one digit to another. Along DDIM's deterministic path the latents decide the image, so a walk in them is
# smooth. With fresh noise in each step (`eta=1`, DDPM) it is not.

# %%
walk = TinyInterpolationPipeline.from_pipe(pipes["cosine"])
walk.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
frames = [walk(seeds=(0, 1), num_frames=12, eta=eta, generator=generator).images for eta in (0.0, 1.0)]
image_grid(sum(frames, []), columns=12, scale=5, row_labels=["DDIM", "DDPM"])
