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
# # First steps
#
# You train a diffusion model on 1,797 handwritten digits of 8x8 pixels, draw with it, and see what its sampler does. A GPU is
# used where there is one; on two cores the training takes some minutes.

# %%
import importlib.util
import subprocess
import sys


SOURCE = "tiny-diffusers"  # in Colab: "git+" and the address of your copy of the repository
if importlib.util.find_spec("tiny_diffusers") is None:  # as in Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import os


STEPS = int(os.environ.get("NOTEBOOK_STEPS", 1600))  # of training, with 32 images each: fewer are quicker and worse

# %% [markdown]
# ## Train
#
# This is the command `tiny-diffusers train unconditional`. It leaves a checkpoint, samples, loss curves and a model card in
# `runs/ddpm-digits`. Its last grid of samples takes 20 steps, or fewer where the training is as short.

# %%
# !tiny-diffusers train unconditional --max_train_steps {STEPS} --ddpm_num_inference_steps {min(20, STEPS)} --overwrite_output_dir

# %%
from IPython.display import Image, display


display(Image("runs/ddpm-digits/samples.png", width=400), Image("runs/ddpm-digits/loss_curves.png", width=600))

# %% [markdown]
# The samples are as they come, none is chosen. If the loss of the held-out images rises while that of the training images
# falls, the model has begun to learn its images by heart.
#
# ## Draw
#
# A checkpoint is a pipeline, as in diffusers. A generator makes its images repeatable.

# %%
import torch

from tiny_diffusers import TinyPipeline
from tiny_diffusers.plots import image_grid, strip


pipe = TinyPipeline.from_pretrained("runs/ddpm-digits").to("cuda" if torch.cuda.is_available() else "cpu")
pipe.set_progress_bar_config(disable=True)
seeds = [torch.Generator().manual_seed(i) for i in range(8)]
image_grid(pipe(batch_size=8, generator=seeds).images, columns=8, scale=8)

# %% [markdown]
# ## From noise to a digit
#
# The sampler starts from noise and removes it in 20 steps. Eight states of four images on the way:

# %%
seeds = [torch.Generator().manual_seed(i) for i in range(4)]
output = pipe(batch_size=4, generator=seeds, return_intermediates=8)
strip([*(state.sample for state in output.intermediates), output.images])

# %% [markdown]
# ## Fewer steps, other samplers
#
# The pipeline takes the solvers of diffusers that fit what the network was trained for. Each row is drawn from the same noise.

# %%
from diffusers import DPMSolverMultistepScheduler


own = pipe.scheduler
solvers = {"as saved": own, "DPM-Solver++": DPMSolverMultistepScheduler.from_config(own.config)}
rows, labels = [], []
for name, pipe.scheduler in solvers.items():
    for num_inference_steps in (5, 20):
        seeds = [torch.Generator().manual_seed(i) for i in range(8)]
        rows += pipe(batch_size=8, generator=seeds, num_inference_steps=num_inference_steps).images
        labels.append(f"{name}, {num_inference_steps} steps")
pipe.scheduler = own
image_grid(rows, columns=8, scale=6, row_labels=labels)

# %% [markdown]
# ## A walk
#
# Between two latents lie the latents of other digits. Without fresh noise in the steps (`eta=0`, the default here), neighbors
# on the way look alike.

# %%
from tiny_diffusers import TinyInterpolationPipeline


walk = TinyInterpolationPipeline.from_pipe(pipe)
walk.set_progress_bar_config(disable=True)
image_grid(walk(seeds=(0, 1), num_frames=12).images, columns=12, scale=5)

# %% [markdown]
# **Next:** `own_folder.ipynb` trains on your images, and `schedules.ipynb` looks at what the noise does.
