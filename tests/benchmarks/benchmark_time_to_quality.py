"""
Compares what ten minutes of training on a laptop give: this package's defaults and those of diffusers' own example.

    python tests/benchmarks/benchmark_time_to_quality.py [--minutes 10] [--dataset_name ylecun/mnist]

Both train for the same time on the same images. The Frechet distance of 2,000 samples of each to 5,000 test images is
measured with `efficientnet-lite0` features at 128 pixels, and that of 2,000 training images as the best possible one.
Diffusers' defaults are those of its `train_unconditional.py` with `--use_ema`: `UNet2DModel` (with the widths, levels
and attention of ours; its own would have 114 million parameters), float32, batches of 16, AdamW at 1e-4 after a
warm-up of 500 steps, linear betas, epsilon, `EMAModel`. Its 1,000 DDPM steps would take hours here, so both are
sampled with 50 DDIM steps.

Writes `table.md`, `table.json`, `ours.png` and `stock.png` into `--output_dir`. Existing models and samples are used
again; a folder that was made with other minutes, images or another seed is refused. Exits with 1 if the distance of
ours is over 150, or over a third of stock's.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import PartialState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from tiny_diffusers import TinyDDIMScheduler, TinyPipeline, plots
from tiny_diffusers.data import ImageData, load_images, normalize
from tiny_diffusers.evaluation import features, images, metrics
from tiny_diffusers.hardware import default_device, default_dtype, physical_cores
from tiny_diffusers.runs import read_log
from tiny_diffusers.train_scripts import train_unconditional


GRID_IMAGES = 100
STOCK_BATCH, STOCK_EPOCHS, STOCK_WARMUP = 16, 100, 500


def other_run(output_dir: Path, asked: dict) -> str | None:
    """Returns the settings of an existing run in `output_dir` that differ from those asked for, as flags, or None."""
    config, run = output_dir / "ours" / "config.yaml", output_dir / "stock" / "run.json"
    ours = yaml.safe_load(config.read_text()) if config.is_file() else {}
    ours["minutes"] = ours.get("max_train_minutes")
    stock = json.loads(run.read_text()).get("settings", {}) if run.is_file() else {}
    for made in (ours, stock):
        differing = [f"--{name} {made[name]}" for name in asked if made.get(name) not in (None, asked[name])]
        if differing:
            return " ".join(differing)
    return None


def train_ours(folder: Path, args: argparse.Namespace) -> None:
    size = ["--resolution", str(args.resolution)] if args.resolution else []
    minutes = ["--max_train_minutes", str(args.minutes), "--seed", str(args.seed)]
    train_unconditional.main(["--dataset_name", args.dataset_name, *size, *minutes, "--output_dir", str(folder)])


def stock_unet(ours: dict) -> UNet2DModel:
    """Builds stock diffusers' network with the sizes in our network's config."""
    attention = ours["attention"]
    if isinstance(attention, str):
        attention = [attention] * len(ours["block_out_channels"])
    attends = [kind != "none" for kind in attention]
    return UNet2DModel(
        sample_size=ours["sample_size"],
        in_channels=ours["in_channels"],
        out_channels=ours["in_channels"],
        block_out_channels=ours["block_out_channels"],
        layers_per_block=ours["layers_per_block"],
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
    )


def train_stock(folder: Path, data: ImageData, ours: dict, asked: dict, args: argparse.Namespace) -> None:
    """Trains as diffusers' example does, until the minutes are over."""
    device = default_device()
    torch.manual_seed(args.seed)
    unet = stock_unet(ours).to(device)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    steps = STOCK_EPOCHS * len(data) // STOCK_BATCH  # of which these minutes reach a part
    learning_rate = get_scheduler("cosine", optimizer, num_warmup_steps=STOCK_WARMUP, num_training_steps=steps)

    began, step = time.perf_counter(), 0
    with tqdm(total=round(60 * args.minutes), unit="s", desc="stock") as bar:
        while (seconds := time.perf_counter() - began) < 60 * args.minutes:
            sample = normalize(data.images[torch.randint(len(data), (STOCK_BATCH,))].to(device))
            noise = torch.randn_like(sample)
            timesteps = torch.randint(0, 1000, (STOCK_BATCH,), device=device)
            loss = F.mse_loss(unet(scheduler.add_noise(sample, noise, timesteps), timesteps).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            learning_rate.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            step += 1
            bar.update(int(seconds) - bar.n)

    ema.copy_to(unet.parameters())
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"steps": step, "global_batch": STOCK_BATCH, "settings": asked}))


def images_seen(folder: Path) -> int:
    run = json.loads((folder / "run.json").read_text())
    if "steps" not in run:
        run["steps"] = int(read_log(folder / "train_log.jsonl")["loss"][0][-1])
    return run["steps"] * run["global_batch"]


def draw(name: str, shape: tuple[int, int, int], args: argparse.Namespace) -> np.ndarray:
    """Draws samples of a trained model, uint8 (N, C, H, W)."""
    device = default_device()
    pipe = TinyPipeline.from_pretrained(args.output_dir / name).to(device, default_dtype(device))
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.scheduler = TinyDDIMScheduler.from_config(pipe.scheduler.config)
    return images.sample(
        pipe,
        shape,
        args.output_dir / f"{name}.npy",
        num_images=args.num_images,
        seed=args.seed,
        batch_size=100,
        options={"num_inference_steps": args.num_inference_steps},
        class_labels=None,
        state=PartialState(),
    )


def extract(extractor: features.Extractor, pixels: np.ndarray | torch.Tensor) -> np.ndarray:
    """Extracts the features of uint8 images: (N, C, H, W) -> (N, D)."""
    batches = torch.as_tensor(np.array(pixels)).split(100)
    return torch.cat([extractor(batch) for batch in tqdm(batches, desc="features", delay=2)]).numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--resolution", type=int, help="default: the images' own size")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--num_references", type=int, default=5000)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/time-to-quality"))
    args = parser.parse_args()
    torch.set_num_threads(physical_cores())
    extractor = features.load("efficientnet-lite0")  # before training, in case it is not installed
    train_data = load_images(args.dataset_name, resolution=args.resolution)
    test_data = load_images(
        args.dataset_name, split="test", resolution=args.resolution, max_samples=args.num_references
    )

    asked = {name: getattr(args, name) for name in ("dataset_name", "minutes", "seed")}
    asked["resolution"] = train_data.images.shape[-1]
    made_with = other_run(args.output_dir, asked)
    if made_with:
        print(
            f"error: {args.output_dir} holds a run of {made_with}: delete {args.output_dir}, or name another --output_dir.",
            file=sys.stderr,
        )
        return 2

    ours, stock = args.output_dir / "ours", args.output_dir / "stock"
    if not (ours / "model_index.json").is_file():
        train_ours(ours, args)
    if not (stock / "run.json").is_file():
        train_stock(stock, train_data, json.loads((ours / "unet" / "config.json").read_text()), asked, args)

    shape = tuple(train_data.images.shape[1:])
    reference = metrics.FrechetReference(extract(extractor, test_data.images))
    some = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(0))[: args.num_images]
    rows = [{"model": "training images", "frechet": reference.distance(extract(extractor, train_data.images[some]))}]
    for name in ("stock", "ours"):
        pixels = draw(name, shape, args)
        plots.image_grid(pixels[:GRID_IMAGES]).save(args.output_dir / f"{name}.png")
        seen = images_seen(args.output_dir / name)
        distance = reference.distance(extract(extractor, pixels))
        rows.append(
            {"model": name, "frechet": distance, "images_seen": seen, "images_per_second": seen / args.minutes / 60}
        )

    protocol = {
        "data": f"{args.dataset_name} at {shape[1]}x{shape[2]}",
        "minutes": args.minutes,
        "threads": torch.get_num_threads(),
        "num_images": args.num_images,
        "num_references": len(test_data),
        "sampler": f"DDIM, {args.num_inference_steps} steps, {default_dtype(default_device())}",
        "seed": args.seed,
        "features": extractor.preprocessing,
    }
    (args.output_dir / "table.json").write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=2))
    table = [
        f"{protocol['data']}, {args.minutes:g} minutes on {default_device()} with {protocol['threads']} threads; "
        f"{args.num_images:,} images against {len(test_data):,} test images, {extractor.name}, {protocol['sampler']}.",
        "",
        "| model | Frechet distance | images seen | images/s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        speed = [f"{row[key]:,.0f}" if key in row else "" for key in ("images_seen", "images_per_second")]
        table.append(f"| {row['model']} | {row['frechet']:.1f} | {speed[0]} | {speed[1]} |")
    (args.output_dir / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    frechet = {row["model"]: row["frechet"] for row in rows}
    return 0 if frechet["ours"] <= min(150, frechet["stock"] / 3) else 1


if __name__ == "__main__":
    sys.exit(main())
