"""
Compares what some minutes of training give: this package's bare command, and other packages as their READMEs use them.

    python tests/benchmarks/benchmark_time_to_quality.py --dataset_name ylecun/mnist --resolution 32
    python tests/benchmarks/benchmark_time_to_quality.py --minutes 1 3 10 --seeds 0 1 --contenders ours torchcfm

All train for the same time on the same images, from the first step on, in turns: all contenders with one seed, then with
the next. Samples of each are measured against test images by one protocol, with `efficientnet-lite0` features.

| contender | its example | changed here |
| --- | --- | --- |
| `ours` | `tiny-diffusers train unconditional` | |
| `diffusers` | `train_unconditional.py --use_ema` | the widths, levels and attention of ours (its own network has 114 million parameters), 50 DDIM steps in place of 1,000 of DDPM |
| `denoising-diffusion-pytorch` | README, `Trainer` | float32, 50 DDIM steps in place of 250 |
| `smalldiffusion-unet` | `examples/fashion_mnist_unet.py` | no flips; batches of 256, as 1,024 take over 20 GB at 32x32 |
| `smalldiffusion-dit` | `examples/fashion_mnist_dit.py` | the same |
| `torchcfm` | `examples/images/mnist_example.ipynb` | `torchdiffeq` solves the ODE, by the same method and tolerances |

What the others need beside this package: `pip install --no-deps denoising-diffusion-pytorch smalldiffusion torchcfm
torchdiffeq torch-ema ema-pytorch POT einops`, in an environment of its own. Two of them import torchvision, of which
nothing is used here: any module of that name with `transforms` and `utils` serves where it can't be installed.

Writes `table.md`, `table.json` and `samples.png` (a row for each contender) into `--output_dir`. What was trained, drawn or
measured there before is used again.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from tiny_diffusers import TinyPipeline, plots, train_scripts
from tiny_diffusers.data import ImageData, load_images
from tiny_diffusers.evaluation import Protocol, Report, evaluate
from tiny_diffusers.evaluation.images import to_uint8
from tiny_diffusers.hardware import default_device, default_dtype, physical_cores, processor_name
from tiny_diffusers.runs import read_log


DEVICE = default_device()
BATCH = 100  # of samples
ROW = 16  # samples of each contender in the picture
# contender -> the packages that it needs
PACKAGES = {
    "ours": [],
    "diffusers": [],
    "denoising-diffusion-pytorch": ["denoising_diffusion_pytorch", "ema_pytorch"],
    "smalldiffusion-unet": ["smalldiffusion", "torch_ema"],
    "smalldiffusion-dit": ["smalldiffusion", "torch_ema"],
    "torchcfm": ["torchcfm", "torchdiffeq"],
}


class Diffusers:
    """Stock diffusers' example, with a network of the sizes in our network's config."""

    batch_size = 16

    def __init__(self, shape: tuple[int, int, int], num_images: int, ours: dict):
        attention = ours["attention"]
        if isinstance(attention, str):
            attention = [attention] * len(ours["block_out_channels"])
        attends = [kind != "none" for kind in attention]
        self.network = UNet2DModel(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=ours["block_out_channels"],
            layers_per_block=ours["layers_per_block"],
            down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
            up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        ).to(DEVICE)
        self.scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
        self.num_steps = 100 * num_images // self.batch_size  # of 100 epochs, of which the minutes reach a part

    def train(self, batches: Iterator[torch.Tensor]) -> Iterator[None]:
        parameters = list(self.network.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        self.ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        learning_rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=self.num_steps)
        for images in batches:
            noise = torch.randn_like(images)
            timesteps = torch.randint(0, 1000, (len(images),), device=DEVICE)
            noisy = self.scheduler.add_noise(2 * images - 1, noise, timesteps)
            F.mse_loss(self.network(noisy, timesteps).sample, noise).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            learning_rate.step()
            optimizer.zero_grad()
            self.ema.step(parameters)
            yield

    def average(self) -> None:
        self.ema.copy_to(self.network.parameters())

    def sample(self, count: int) -> torch.Tensor:
        pipe = DDIMPipeline(self.network, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(batch_size=count, num_inference_steps=50, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)


class DenoisingDiffusion:
    """denoising-diffusion-pytorch, by the loop of its `Trainer` without the reading of files."""

    batch_size = 64  # two times 32: gradients are accumulated

    def __init__(self, shape: tuple[int, int, int], num_images: int, ours: dict):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        unet = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=shape[0], flash_attn=True)
        self.network = GaussianDiffusion(unet, image_size=shape[1], timesteps=1000, sampling_timesteps=50).to(DEVICE)

    def train(self, batches: Iterator[torch.Tensor]) -> Iterator[None]:
        from ema_pytorch import EMA

        optimizer = torch.optim.Adam(self.network.parameters(), lr=8e-5, betas=(0.9, 0.99))
        self.ema = EMA(self.network, beta=0.995, update_every=10)
        for images in batches:
            for part in images.chunk(2):
                (self.network(part) / 2).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.ema.update()
            yield

    def average(self) -> None:
        self.network.load_state_dict(self.ema.ema_model.state_dict())

    def sample(self, count: int) -> torch.Tensor:
        return self.network.sample(batch_size=count)


class SmallDiffusion:
    """smalldiffusion's U-Net for Fashion-MNIST."""

    batch_size, learning_rate, decay = 256, 7e-4, 0.999

    def __init__(self, shape: tuple[int, int, int], num_images: int, ours: dict):
        from smalldiffusion import ScheduleLogLinear

        self.schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
        self.network = self.build(shape).to(DEVICE)

    def build(self, shape: tuple[int, int, int]) -> nn.Module:
        from smalldiffusion import Scaled, Unet

        return Scaled(Unet)(shape[1], shape[0], shape[0], ch=64, ch_mult=(1, 1, 2), attn_resolutions=(shape[1] // 2,))

    def train(self, batches: Iterator[torch.Tensor]) -> Iterator[None]:
        from smalldiffusion import training_loop
        from torch_ema import ExponentialMovingAverage

        self.ema = ExponentialMovingAverage(self.network.parameters(), decay=self.decay)
        scaled = (2 * images - 1 for images in batches)
        steps = training_loop(Epoch(scaled), self.network, self.schedule, epochs=1, lr=self.learning_rate)
        for step, _ in enumerate(steps):
            if step:  # the loop yields in the middle of a step
                self.ema.update()
            yield

    def average(self) -> None:
        self.ema.copy_to(self.network.parameters())

    def sample(self, count: int) -> torch.Tensor:
        from smalldiffusion import samples

        *_, x_0 = samples(self.network, self.schedule.sample_sigmas(20), gam=1.6, batchsize=count)
        return (x_0 + 1) / 2


class SmallDiffusionDiT(SmallDiffusion):
    """smalldiffusion's transformer for Fashion-MNIST."""

    learning_rate, decay = 1e-3, 0.99

    def build(self, shape: tuple[int, int, int]) -> nn.Module:
        from smalldiffusion import DiT, ScheduleDDPM

        self.schedule = ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
        return DiT(in_dim=shape[1], channels=shape[0], patch_size=2, depth=6, head_dim=32, num_heads=6, mlp_ratio=4.0)


class Epoch(torch.utils.data.IterableDataset):
    """Batches as an epoch without end, for a loop that wants a data loader."""

    def __init__(self, batches: Iterator[torch.Tensor]):
        self.batches = batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.batches


class TorchCFM:
    """torchcfm's optimal-transport flow for MNIST."""

    batch_size = 128

    def __init__(self, shape: tuple[int, int, int], num_images: int, ours: dict):
        from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
        from torchcfm.models.unet import UNetModel

        self.shape = shape
        self.network = UNetModel(dim=shape, num_channels=32, num_res_blocks=1).to(DEVICE)
        self.matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)

    def train(self, batches: Iterator[torch.Tensor]) -> Iterator[None]:
        optimizer = torch.optim.Adam(self.network.parameters())
        for images in batches:
            x_1 = 2 * images - 1
            t, x_t, u_t = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x_1), x_1)
            (self.network(t, x_t) - u_t).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    def average(self) -> None:
        """Does nothing: the example keeps no average."""

    def sample(self, count: int) -> torch.Tensor:
        from torchdiffeq import odeint

        noise, times = torch.randn(count, *self.shape, device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
        path = odeint(lambda t, x: self.network(t, x), noise, times, atol=1e-4, rtol=1e-4, method="dopri5")
        return (path[-1] + 1) / 2


PEERS = {
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": DenoisingDiffusion,
    "smalldiffusion-unet": SmallDiffusion,
    "smalldiffusion-dit": SmallDiffusionDiT,
    "torchcfm": TorchCFM,
}


def folder_of(name: str, minutes: float, seed: int, args: argparse.Namespace) -> Path:
    return args.output_dir / f"{minutes:g}-minutes" / name / f"seed-{seed}"


def batches_of(data: ImageData, size: int) -> Iterator[torch.Tensor]:
    """Yields batches in [0, 1], without end."""
    while True:
        yield data.images[torch.randint(len(data), (size,))].to(DEVICE).float() / 255


def train_ours(folder: Path, minutes: float, seed: int, args: argparse.Namespace) -> dict:
    size = ["--resolution", str(args.resolution)] if args.resolution else []
    command = [
        *(sys.executable, str(Path(train_scripts.__file__).parent / "train_unconditional.py")),
        *("--dataset_name", args.dataset_name, *size, "--seed", str(seed)),
        *("--max_train_minutes", str(minutes), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"),
    ]
    subprocess.run(command, check=True)  # in its own process: none inherits another's memory or threads
    run = json.loads((folder / "run.json").read_text())
    steps = int(read_log(folder / "train_log.jsonl")["loss"][0][-1])
    return {"images_seen": steps * run["global_batch"], "parameters": sum(run["parameters"].values())}


def build_peer(
    name: str, folder: Path, data: ImageData
) -> "Diffusers | DenoisingDiffusion | SmallDiffusion | TorchCFM":
    """Builds a contender; that of diffusers has the sizes of our network of the same minutes and seed."""
    config = folder.parents[1] / "ours" / folder.name / "unet" / "config.json"
    return PEERS[name](tuple(data.images.shape[1:]), len(data), json.loads(config.read_text()))


def train_peer(name: str, folder: Path, minutes: float, seed: int, data: ImageData) -> dict:
    torch.manual_seed(seed)
    peer = build_peer(name, folder, data)
    steps, deadline = 0, time.perf_counter() + 60 * minutes
    with tqdm(unit="step", desc=name) as bar:
        for _ in peer.train(batches_of(data, peer.batch_size)):
            steps += 1
            bar.update()
            if time.perf_counter() > deadline:
                break
    peer.average()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(peer.network.state_dict(), folder / "network.pt")
    parameters = sum(parameter.numel() for parameter in peer.network.parameters())
    return {"images_seen": steps * peer.batch_size, "parameters": parameters}


@torch.no_grad()
def draw_peer(name: str, folder: Path, seed: int, data: ImageData, num_images: int) -> np.ndarray:
    """Draws uint8 images (N, C, H, W)."""
    peer = build_peer(name, folder, data)
    peer.network.load_state_dict(torch.load(folder / "network.pt", map_location=DEVICE, weights_only=True))
    peer.network.eval()
    torch.manual_seed(seed)
    counts = [min(BATCH, num_images - start) for start in range(0, num_images, BATCH)]
    drawn = [peer.sample(count).clamp(0, 1).cpu() for count in tqdm(counts, desc=f"samples of {name}")]
    return (torch.cat(drawn) * 255).round().to(torch.uint8).numpy()


def measure(name: str, folder: Path, seed: int, data: ImageData, test: ImageData, args: argparse.Namespace) -> Report:
    sampling = {"num_inference_steps": args.num_inference_steps} if name == "ours" else {}
    protocol = Protocol(
        sampling=sampling, seed=seed, num_images=args.num_images, metrics=["frechet_distance", "kernel_distance"]
    )
    if name != "ours":
        drawn = draw_peer(name, folder, seed, data, args.num_images)
        np.save(folder / "samples.npy", drawn[:ROW])
        return evaluate(drawn, test, protocol, output_dir=folder, name=name)
    pipe = TinyPipeline.from_pretrained(folder).to(DEVICE, default_dtype(DEVICE))
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(ROW)]
    row = pipe(batch_size=ROW, generator=generators, num_inference_steps=args.num_inference_steps).images
    np.save(folder / "samples.npy", to_uint8(row))
    return evaluate(pipe, test, protocol, output_dir=folder, name=name)


def spread(values: list[float]) -> str:
    """Spells the mean of the seeds, and half their range."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--resolution", type=int, help="default: the images' own size")
    parser.add_argument("--minutes", type=float, nargs="+", default=[10.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--contenders", nargs="+", choices=PACKAGES, default=["ours", "diffusers"], metavar="NAME")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--num_references", type=int, default=5000)
    parser.add_argument("--num_inference_steps", type=int, default=50, help="of ours")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/time-to-quality"))
    args = parser.parse_args()
    missing = {p for name in args.contenders for p in PACKAGES[name] if importlib.util.find_spec(p) is None}
    if missing:
        parser.error(f"not installed: {', '.join(sorted(missing))} (see --help)")
    torch.set_num_threads(physical_cores())
    data = load_images(args.dataset_name, resolution=args.resolution)
    test = load_images(args.dataset_name, split="test", resolution=args.resolution, max_samples=args.num_references)
    settings = {"dataset_name": args.dataset_name, "shape": list(data.images.shape[1:])}

    table = [
        f"{args.dataset_name} at {data.images.shape[2]}x{data.images.shape[3]}, {torch.get_num_threads()} threads of "
        f"{processor_name()}; {args.num_images:,} images against {len(test):,} test images, efficientnet-lite0; seeds "
        f"{', '.join(map(str, args.seeds))}, ± half their range.",
        "",
        "| minutes | contender | parameters | images seen | Frechet distance | kernel distance x 1,000 |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    rows, found = [], []
    for minutes in args.minutes:
        results: dict[str, list[dict]] = {name: [] for name in args.contenders}
        for seed in args.seeds:
            for name in ["ours", *(name for name in args.contenders if name != "ours")]:
                folder = folder_of(name, minutes, seed, args)
                trained, asked = folder / "trained.json", settings | {"minutes": minutes, "seed": seed}
                if not trained.is_file():
                    run = train_ours(folder, minutes, seed, args) if name == "ours" else None
                    run = run or train_peer(name, folder, minutes, seed, data)
                    trained.write_text(json.dumps(asked | run, indent=2))
                run = json.loads(trained.read_text())
                if not asked.items() <= run.items():
                    parser.error(f"{folder} was trained on other images: name another --output_dir")
                if name not in args.contenders:  # diffusers' network has the sizes of ours
                    continue
                done = (folder / "report.json").is_file()
                report = Report.load(folder) if done else measure(name, folder, seed, data, test, args)
                run |= {kind: report.figures[f"{kind}_distance"]["value"] for kind in ("frechet", "kernel")}
                results[name].append(run)
                found.append({"contender": name, **run})
        for name, runs in results.items():
            rows += list(np.load(folder_of(name, minutes, args.seeds[-1], args) / "samples.npy"))
            seen = round(statistics.mean(run["images_seen"] for run in runs))
            table.append(
                f"| {minutes:g} | {name} | {runs[0]['parameters']:,} | {seen:,} | {spread([r['frechet'] for r in runs])} "
                f"| {spread([1000 * r['kernel'] for r in runs])} |"
            )
    (args.output_dir / "table.json").write_text(json.dumps(found, indent=2))
    (args.output_dir / "table.md").write_text("\n".join(table) + "\n")
    labels = [f"{name}, {minutes:g}" for minutes in args.minutes for name in args.contenders]
    plots.image_grid(rows, columns=ROW, row_labels=labels).save(args.output_dir / "samples.png")
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
