"""
Measures how well a trained model restores test images, beside what needs no model.

    python tests/benchmarks/benchmark_editing.py model_cards/mnist-32 --dataset_name ylecun/mnist --digits
    python tests/benchmarks/benchmark_editing.py runs/conditional-ddpm-cifar10 --dataset_name uoft-cs/cifar10

Each task restores `--num_images` test images: the lower half is filled in, half and quarter sizes are enlarged, and
color images are colored. A row has the PSNR and the SSIM (https://doi.org/10.1109/TIP.2003.819861) of the results to the
images, and the kernel distance of their pixels to those of as many other test images (times 1,000). One result of a task
with many answers is farther from the image than their mean, so PSNR and SSIM favor what is blurred. `--digits` also says
how often a classifier sees the true digit in a completed half, beside a classifier that was trained on halves, which is
the bound of what the half tells, and the one of whole images on the half with the mean image below it. Writes a grid of
each task (the images, what is observed, the results) and prints a table.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from check_classes import build_classifier, load_classifier, predict, train_classifier
from tqdm.auto import tqdm

from tiny_diffusers import TinyInpaintPipeline, TinyPipeline, TinyRestorationPipeline
from tiny_diffusers.data import load_images, normalize
from tiny_diffusers.evaluation.metrics import kernel_distance
from tiny_diffusers.hardware import default_device, default_dtype, physical_cores
from tiny_diffusers.pipelines.pipeline_tiny import image_generators
from tiny_diffusers.plots import image_grid


METHODS = {
    "DDNM": {"method": "ddnm"},
    "DDNM, each step 3 times": {"method": "ddnm", "jump_n_sample": 3},
    "DDNM, each step 5 times": {"method": "ddnm", "jump_n_sample": 5},
    "pseudo-inverse guidance": {"method": "pigdm"},
}


def psnr(images: torch.Tensor, originals: torch.Tensor) -> float:
    """Computes the peak signal-to-noise ratio in dB of images (N, C, H, W) in [0, 1], as the mean over them."""
    return float((-10 * (images - originals).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()).mean())


def ssim(images: torch.Tensor, originals: torch.Tensor) -> float:
    """Computes the structural similarity of images (N, C, H, W) in [0, 1], with a Gaussian window of 11 pixels."""
    line = torch.exp(-torch.arange(-5, 6).square() / (2 * 1.5**2))
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]

    def local_mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], window)

    mean_x, mean_y = local_mean(images), local_mean(originals)
    variance_x = local_mean(images.square()) - mean_x**2
    variance_y = local_mean(originals.square()) - mean_y**2
    covariance = local_mean(images * originals) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    return float((numerator / ((mean_x**2 + mean_y**2 + 0.01**2) * (variance_x + variance_y + 0.03**2))).mean())


def in_batches(restore: Callable[[torch.Tensor, int], torch.Tensor], images: torch.Tensor, name: str) -> torch.Tensor:
    """Restores images 100 at a time; `restore` also gets the index of the first one."""
    starts = tqdm(range(0, len(images), 100), desc=name)
    return torch.cat([restore(images[start : start + 100], start).cpu().float() for start in starts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=["half", "x2", "x4", "colorize"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--repaint", action="store_true", help="also fill the half by RePaint (250 passes)")
    parser.add_argument("--digits", action="store_true", help="judge the completed halves by a classifier of MNIST")
    parser.add_argument("--output_dir", type=Path, default=Path("runs", "editing"))
    args = parser.parse_args()
    torch.set_num_threads(physical_cores())
    args.output_dir.mkdir(parents=True, exist_ok=True)

    device = default_device()
    loaded = TinyPipeline.from_pretrained(args.checkpoint).to(device, default_dtype(device))
    loaded.unet.to(memory_format=torch.channels_last)
    restoration, inpainting = TinyRestorationPipeline.from_pipe(loaded), TinyInpaintPipeline.from_pipe(loaded)
    for pipe in (restoration, inpainting):
        pipe.set_progress_bar_config(disable=True)
    channels, side, _ = restoration._image_shape
    test = load_images(args.dataset_name, split="test", resolution=side, require_labels=args.digits)
    order = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(0))
    rows, others = order[: args.num_images], order[args.num_images : 2 * args.num_images]
    originals, reference = (test.images[part].float() / 255 for part in (rows, others))
    mean_image = test.images[order[args.num_images :]].float().mean(dim=0, keepdim=True) / 255
    labels = {} if not restoration._num_rows else {"guidance_scale": 0.0}  # unconditional

    hidden = torch.zeros(side, side)
    hidden[side // 2 :] = 1
    tasks = {
        "half": {"operator": "inpaint", "mask_image": hidden},
        "x2": {"operator": "super_resolution", "factor": 2},
        "x4": {"operator": "super_resolution", "factor": 4},
        "colorize": {"operator": "colorize"},
    }
    print("| task | method | PSNR | SSIM | kernel distance |\n| --- | --- | ---: | ---: | ---: |")
    halves = {}
    for name in args.tasks:
        if name == "colorize" and channels == 1:
            continue
        task = tasks[name]
        observed = restoration.observe(originals, **task).cpu().float()
        if name == "half":
            results = {"mean image": torch.where(hidden > 0, mean_image, originals)}
        elif name == "colorize":
            results = {"gray": observed.expand(-1, 3, -1, -1)}
        else:
            enlarged = F.interpolate(observed, (side, side), mode="bicubic", antialias=False).clamp(0, 1)
            results = {"bicubic": enlarged}

        for method in args.methods:

            def restore(part: torch.Tensor, start: int, method: str = method, task: dict = task) -> torch.Tensor:
                generator = image_generators(0, len(part), first=start)
                options = {**task, **METHODS[method], **labels, "output_type": "pt"}
                return restoration(part, generator=generator, **options).images

            results[method] = in_batches(restore, observed, f"{name}, {method}")
        if name == "half" and args.repaint:

            def repaint(part: torch.Tensor, start: int) -> torch.Tensor:
                generator = image_generators(0, len(part), first=start)
                return inpainting(part, hidden, generator=generator, output_type="pt", **labels).images

            results["RePaint"] = in_batches(repaint, originals, "half, RePaint")
        if name == "half":
            halves = results
        pixels = (reference.flatten(1) * 2 - 1).numpy().astype(np.float64)
        for method, images in results.items():
            distance = kernel_distance((images.flatten(1) * 2 - 1).numpy().astype(np.float64), pixels)
            figures = f"{psnr(images, originals):.2f} | {ssim(images, originals):.3f} | {1000 * distance.value:.2f}"
            print(f"| {name} | {method} | {figures} |", flush=True)
        shown = observed if name in ("half", "colorize") else F.interpolate(observed, (side, side))
        strips = [originals[:12], shown[:12].expand(-1, channels, -1, -1), *(r[:12] for r in results.values())]
        picture = image_grid(torch.cat(strips), columns=12, row_labels=["image", "observed", *results])
        picture.save(args.output_dir / f"{name}.png")

    if args.digits:
        truth = test.labels[rows]
        classifier, accuracy = load_classifier(args.dataset_name, side)
        print(f"\n| whole images: {accuracy:.1%} | true digit seen |\n| --- | ---: |")
        for method, images in halves.items():
            print(f"| {method} | {(predict(classifier, 2 * images - 1) == truth).double().mean():.1%} |")
        train = load_images(args.dataset_name, resolution=side, require_labels=True)
        train = replace(train, images=torch.where(hidden > 0, 0, train.images))
        torch.manual_seed(0)
        of_halves = build_classifier(10)
        of_halves(normalize(train.images[:1]))
        train_classifier(of_halves.to(memory_format=torch.channels_last), train)
        seen = torch.where(hidden > 0, 0.0, originals)
        share = (predict(of_halves.eval(), 2 * seen - 1) == truth).double().mean()
        print(f"| a classifier that was trained on halves | {share:.1%} |")


if __name__ == "__main__":
    main()
