"""
Measures the samplers of a checkpoint, each from the same noise: the Frechet distance of its samples to test images.

    python tests/benchmarks/benchmark_samplers.py model_cards/mnist-32 --dataset_name ylecun/mnist

Prints a table: a row for each sampler, a column for each number of steps, with the distance and the share of faint
pixels (1 to 40 of 255), which a veil over a dark background raises. The last row is that of as many training images.
A model with classes draws them in turns, at each `--guidance_scale`.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from tiny_diffusers import TinyPipeline, hardware
from tiny_diffusers.data import load_images
from tiny_diffusers.evaluation import features, images, metrics
from tiny_diffusers.pipelines.pipeline_tiny import objective_of
from tiny_diffusers.samplers import SCHEDULERS


BATCH = 100
SOLVERS = ("dpm", "sde_dpm", "unipc", "heun")


def samplers(pipe: TinyPipeline) -> dict[str, tuple[str | None, dict, dict]]:
    """Lists the samplers: name -> a solver of `--scheduler`, options of its config, options of the call."""
    if objective_of(pipe.scheduler) != "betas":
        etas = {"euler": (0.0, 0.5, 1.0, 1.5, 2.0), "multistep": (0.5, 1.0, 1.5)}
        own = {f"{name}, eta {eta:g}": (name, {}, {"eta": eta}) for name in etas for eta in etas[name]}
        return own | {name: (name, {}, {}) for name in ("heun", "dpm", "sde_dpm")}
    combinations = itertools.product(("trailing", "linspace"), (0.0, 1.0), (True, False))
    found = {
        f"DDIM, {spacing}, eta {eta:g}, {'clipped' if clip else 'not clipped'}": (
            "ddim",
            {"timestep_spacing": spacing},
            {"eta": eta, "clip_sample": clip},
        )
        for spacing, eta, clip in combinations
    }
    return found | {name: (name, {}, {}) for name in SOLVERS}


def draw(pipe: TinyPipeline, shape: tuple, args: argparse.Namespace, **options) -> np.ndarray:
    """Draws uint8 images (N, C, H, W), image i from its own seed."""
    ids = getattr(pipe, "_class_ids", None)
    with tempfile.TemporaryDirectory() as folder:
        return np.array(
            images.sample(
                pipe,
                shape,
                np.uint8,
                Path(folder, "images"),
                num_images=args.num_images,
                seed=args.seed,
                batch_size=BATCH,
                options=options,
                class_labels=np.resize(ids, args.num_images) if ids else None,
                state=PartialState(),
            )
        )


def faint(pixels: np.ndarray) -> float:
    return float(((pixels >= 1) & (pixels <= 40)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dataset_name", required=True, help="a Hub id or a folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of samplers to measure")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--num_reference", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import diffusers

    import tiny_diffusers

    torch.set_num_threads(hardware.physical_cores())
    pipe = TinyPipeline.from_pretrained(args.checkpoint)
    pipe.unet.to(memory_format=torch.channels_last)
    channels, _, side = pipe._image_shape
    options = {"resolution": side, "channels": channels}
    options["train_data_dir" if Path(args.dataset_name).exists() else "dataset_name"] = args.dataset_name
    real = {split: load_images(split=split, **options).images for split in ("test", "train")}

    extractor = features.load("efficientnet-lite0")

    def extract(pixels: np.ndarray | torch.Tensor) -> np.ndarray:
        return torch.cat([extractor(batch) for batch in torch.as_tensor(pixels).split(BATCH)]).numpy()

    reference = metrics.FrechetReference(extract(real["test"][: args.num_reference]))
    saved, has_classes = pipe.scheduler, bool(getattr(pipe, "_class_ids", None))
    rows = [
        (name, w)
        for name, w in itertools.product(samplers(pipe), args.guidance_scale)
        if any(part in name for part in args.only)
    ]
    print("| sampler | " + " | ".join(f"{steps} steps" for steps in args.steps) + " |")
    print("| --- |" + " ---: |" * len(args.steps), flush=True)
    for name, w in tqdm(rows, desc="samplers"):
        solver, config, call = samplers(pipe)[name]
        cells = []
        for steps in args.steps:
            pipe.scheduler = saved
            if solver is not None:
                class_name, own = SCHEDULERS[objective_of(saved)][solver]
                cls = getattr(tiny_diffusers if class_name.startswith("Tiny") else diffusers, class_name)
                pipe.scheduler = cls.from_config(saved.config, **own, **config)
            guidance = {"guidance_scale": w} if has_classes else {}
            drawn = draw(pipe, real["test"].shape[1:], args, num_inference_steps=steps, **call, **guidance)
            cells.append(f"{reference.distance(extract(drawn)):.1f} ({100 * faint(drawn):.1f}%)")
        pipe.scheduler = saved
        print(f"| {name}{f', w = {w:g}' if has_classes else ''} | " + " | ".join(cells) + " |", flush=True)
    train = real["train"][torch.randperm(len(real["train"]))[: args.num_images]]
    print(f"| training images | {reference.distance(extract(train)):.1f} ({100 * faint(train.numpy()):.1f}%) |")


if __name__ == "__main__":
    main()
