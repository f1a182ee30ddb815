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
# # From a folder of images to a shared model
#
# You train on your own images, measure the model, and push it to the Hub. Set `FOLDER` to a folder of images: subfolders are
# read as classes. Without one, a small set of drawn shapes takes its place.

# %%
import importlib.util
import subprocess
import sys


SOURCE = "tiny-diffusers"  # in Colab: "git+" and the address of your copy of the repository
if importlib.util.find_spec("tiny_diffusers") is None:  # as in Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import os


FOLDER = "shapes"  # yours
REPOSITORY = "me/my-shapes"  # on the Hub
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 1000))  # of training, with 32 images each

# %%
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


if FOLDER == "shapes":
    rng = np.random.default_rng(0)
    for i in range(400):
        image = Image.new("RGB", (48, 48), tuple(rng.integers(0, 80, 3)))
        (x, y), size = rng.integers(2, 20, 2), rng.integers(12, 26)
        shape = ("circle", "square")[i % 2]
        draw = ImageDraw.Draw(image).ellipse if shape == "circle" else ImageDraw.Draw(image).rectangle
        draw((x, y, x + size, y + size), fill=tuple(rng.integers(120, 256, 3)))
        Path(FOLDER, shape).mkdir(parents=True, exist_ok=True)
        image.save(Path(FOLDER, shape, f"{i}.png"))

# %% [markdown]
# ## How is it read?
#
# Look at this before you train for an hour.

# %%
from tiny_diffusers.data import load_images
from tiny_diffusers.plots import image_grid


RESOLUTION = 16  # pixels; 32 shows more, and each step takes about three times as long
data = load_images(FOLDER, resolution=RESOLUTION)
print(f"{len(data.images)} images {tuple(data.images.shape[1:])}, classes: {data.id2label}", *data.notes, sep="\n")
image_grid(data.images[:: max(1, len(data.images) // 16)][:16], columns=8)

# %% [markdown]
# ## Train
#
# With classes the model is `conditional`, else `unconditional`. Give `--max_train_minutes 30` in place of the steps to say how
# long you want to wait.

# %%
SCRIPT = "conditional" if data.id2label else "unconditional"
RUN = "runs/mine"
FLAGS = f"--max_train_steps {STEPS} --ddpm_num_inference_steps {min(20, STEPS)} --overwrite_output_dir"
# !tiny-diffusers train {SCRIPT} --dataset_name {FOLDER} --resolution {RESOLUTION} --output_dir {RUN} {FLAGS}

# %%
from IPython.display import Image as Picture
from IPython.display import display


display(Picture(f"{RUN}/samples.png", width=500), Picture(f"{RUN}/loss_curves.png", width=600))

# %% [markdown]
# ## Measure
#
# Images in the features of pixels, which needs no further package; `tiny-diffusers[eval]` brings features of a network. The
# row *real against real* is the floor: no model can be told from the data below it. Read the notes below the table as well.

# %%
import torch
from IPython.display import Markdown

from tiny_diffusers import TinyPipeline
from tiny_diffusers.evaluation import Protocol, evaluate


pipe = TinyPipeline.from_pretrained(RUN).to("cuda" if torch.cuda.is_available() else "cpu")
pipe.set_progress_bar_config(disable=True)
protocol = Protocol(
    num_images=min(200, 10 * STEPS),
    features="pixels",
    metrics=["frechet_distance", "kernel_distance", "nearest_neighbor"],
    num_jackknife=5,
    sampling={"num_inference_steps": min(20, STEPS)},
)
report = evaluate(pipe, data, protocol, training=data, output_dir=f"{RUN}/reports/pixels")
Markdown(report.markdown())

# %% [markdown]
# *Median distance to the training set* shows copies: with few images, a network soon learns them by heart. `report.png` has the
# closest pairs.

# %%
display(Picture(f"{RUN}/reports/pixels/report.png", width=700))

# %% [markdown]
# ## Share
#
# `--dry_run` lists what would be pushed. Log in (`hf auth login`) and leave it out to push. The code that the model needs goes
# along, so others load it in plain diffusers, with `trust_remote_code=True`.

# %%
# !tiny-diffusers push {RUN} {REPOSITORY} --dry_run

# %%
from diffusers import DiffusionPipeline


shared = DiffusionPipeline.from_pretrained(RUN, trust_remote_code=True)
type(shared).__name__
