"""
Measures how much a high guidance scale saturates a conditional model's colors, with and without dynamic thresholding.

    python tests/benchmarks/check_guidance_saturation.py runs/conditional-ddpm-cifar10 [--dataset_name uoft-cs/cifar10]

Saturation is the share of values at 0 or 255. It is measured in real images and in two sets of samples from the same
noise: with predictions of x_0 clipped to [-1, 1] (static), or thresholded at the 99.5th percentile (dynamic). Prints
the results as JSON, writes a grid with a row of each to the checkpoint's folder, and exits with 1 unless static
clipping exceeds the real share and dynamic thresholding at least halves the excess.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from tiny_diffusers import TinyPipeline, plots
from tiny_diffusers.commands.shared import place
from tiny_diffusers.data import load_images
from tiny_diffusers.hardware import default_device, default_dtype, physical_cores


MODES = {"static": None, "dynamic": 0.995}


def share_at_the_ends(images: torch.Tensor) -> float:
    """Computes the share of values at 0 or 255 in uint8 images."""
    return float(((images == 0) | (images == 255)).double().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--guidance_scale", type=float, default=8.0)
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(physical_cores())

    device = default_device()
    pipe = place(TinyPipeline.from_pretrained(args.checkpoint), device, default_dtype(device))
    pipe.set_progress_bar_config(disable=True)
    # a checkpoint may have been saved with thresholding, which would make the static mode dynamic
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, thresholding=False)
    classes = torch.arange(args.num_images) % len(pipe.config.id2label)
    real = load_images(args.dataset_name, split="test", resolution=pipe.unet.config.sample_size).images
    shares, rows = {"real": share_at_the_ends(real)}, []
    for mode, percentile in MODES.items():
        batches = []
        for chosen in tqdm(torch.arange(args.num_images).split(100), desc=mode):
            output = pipe(
                classes[chosen],
                guidance_scale=args.guidance_scale,
                dynamic_thresholding=percentile,
                generator=[torch.Generator().manual_seed(args.seed + int(i)) for i in chosen],
                num_inference_steps=args.num_inference_steps,
                output_type="np",
            )
            batches.append((output.images * 255).round().astype(np.uint8))
        images = torch.from_numpy(np.concatenate(batches)).permute(0, 3, 1, 2)
        shares[mode] = share_at_the_ends(images)
        rows += list(images[: len(pipe.config.id2label)])
    picture = args.checkpoint / f"guidance-{args.guidance_scale:g}.png"
    plots.image_grid(torch.stack(rows).numpy(), columns=len(pipe.config.id2label), row_labels=list(MODES)).save(
        picture
    )

    excess = {mode: shares[mode] - shares["real"] for mode in MODES}
    print(json.dumps({"share at 0 or 255": shares, "excess over real": excess, "picture": str(picture)}, indent=2))
    return 0 if 0 < excess["static"] and excess["dynamic"] <= excess["static"] / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
