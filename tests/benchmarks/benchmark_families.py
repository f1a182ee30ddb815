"""
Trains the five families on the same images, for the same minutes, and measures them by one protocol.

    python tests/benchmarks/benchmark_families.py [--minutes 10] [--dataset_name ylecun/mnist] [--resolution 32]

Each family is trained with its script's defaults (PixelCNN with its MNIST recipe, the VAE with 16 latents: with its
default of 64 the samples are scrambled strokes after ten minutes). `tiny_diffusers.evaluation` measures samples
against the test split, and the likelihood of the first test images: a bound for diffusion and the VAE, exact for
PixelCNN, none for a GAN. Writes `table.md`, `samples.png` (a row of samples for each family) and the families' reports
into `--output_dir`. A model or report that exists already is kept if it was made with the same settings; otherwise the
benchmark stops before it begins.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from tiny_diffusers import TinyPipeline, plots, train_scripts
from tiny_diffusers.data import ImageData, load_images
from tiny_diffusers.evaluation import Protocol, Report, compare, evaluate
from tiny_diffusers.hardware import default_device, default_dtype, physical_cores
from tiny_diffusers.paths import public_name
from tiny_diffusers.runs import read_log


SCRIPTS = Path(train_scripts.__file__).parent

# name in the table -> script, further arguments of the script, arguments of the pipeline's call
FAMILIES = {
    "diffusion": ("train_unconditional", [], {"num_inference_steps": 50}),
    "conditional diffusion": ("train_conditional", [], {"num_inference_steps": 50, "guidance_scale": 1.0}),
    "PixelCNN": ("train_pixelcnn", ["--config", str(SCRIPTS / "recipes" / "pixelcnn_mnist.yaml")], {}),
    "VAE": ("train_vae", ["--latent_dim", "16"], {}),
    "DCGAN": ("train_dcgan", [], {}),
}
METRICS = ["frechet_distance", "kernel_distance", "precision_recall"]


def folder_of(name: str, args: argparse.Namespace) -> Path:
    return args.output_dir / name.replace(" ", "-")


def check(name: str, args: argparse.Namespace) -> None:
    """Refuses an existing model or report that was made with other settings."""
    folder = folder_of(name, args)
    if not (folder / "model_index.json").is_file():
        return
    made = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    made["dataset_name"] = made.get("train_data_dir") or made["dataset_name"]
    asked = {"max_train_minutes": args.minutes, "seed": args.seed}
    asked |= {"dataset_name": public_name(args.dataset_name), "resolution": args.resolution}
    if (folder / "report.json").is_file():
        made = Report.load(folder).protocol | made
        asked = dataclasses.asdict(protocol_of(name, args)) | asked
    for setting, value in asked.items():
        if made.get(setting, value) != value:
            raise SystemExit(
                f"{folder} was made with {setting} {made[setting]}, not {value}: delete it, and run again."
            )


def train(name: str, args: argparse.Namespace) -> None:
    (folder_of(name, args) / "report.json").unlink(missing_ok=True)  # it belongs to another model
    script, arguments, _ = FAMILIES[name]
    command = [
        *(sys.executable, str(SCRIPTS / f"{script}.py"), *arguments),
        *("--dataset_name", args.dataset_name, "--resolution", str(args.resolution)),
        *("--max_train_minutes", str(args.minutes), "--seed", str(args.seed)),
        *("--output_dir", str(folder_of(name, args)), "--overwrite_output_dir"),
    ]
    subprocess.run(command, check=True)  # in its own process: none inherits another's memory or threads


def load(name: str, args: argparse.Namespace) -> TinyPipeline:
    device = default_device()
    pipe = TinyPipeline.from_pretrained(folder_of(name, args)).to(device, default_dtype(device))
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(memory_format=torch.channels_last)
    return pipe


def protocol_of(name: str, args: argparse.Namespace) -> Protocol:
    has_likelihood = name != "DCGAN"
    return Protocol(
        sampling=FAMILIES[name][2],
        seed=args.seed,
        num_images=args.num_images,
        metrics=METRICS + ["bits_per_dim"] * has_likelihood,
        likelihood_images=args.likelihood_images,
    )


def measure(name: str, reference: ImageData, training: ImageData, args: argparse.Namespace) -> Report:
    pipe, protocol, folder = load(name, args), protocol_of(name, args), folder_of(name, args)
    return evaluate(pipe, reference, protocol, training=training, output_dir=folder, name=name)


def draw_row(name: str, count: int, args: argparse.Namespace) -> list:
    pipe, options = load(name, args), dict(FAMILIES[name][2])
    classes = getattr(pipe, "_class_ids", [])
    if classes:
        options["class_labels"] = [classes[i % len(classes)] for i in range(count)]
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(count)]
    return pipe(batch_size=count, generator=generators, **options).images


def describe(name: str, args: argparse.Namespace) -> str:
    """Describes in one line how a family was trained, from the files of its run."""
    run = json.loads((folder_of(name, args) / "run.json").read_text())
    steps = max(int(steps[-1]) for steps, _ in read_log(folder_of(name, args) / "train_log.jsonl").values())
    parameters = sum(run["parameters"].values()) / 1e6
    took = f" in {run['seconds']:,.0f} s" if "seconds" in run else ""  # unknown for earlier runs
    return f"{name}: {parameters:.2f} M parameters, {steps:,} steps of {run['global_batch']} images{took}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of training for each family")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--likelihood_images", type=int, default=64)
    parser.add_argument("--row", type=int, default=16, help="samples of each family in the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/families"))
    args = parser.parse_args()
    for name in args.families:
        check(name, args)
    torch.set_num_threads(physical_cores())
    training = load_images(args.dataset_name, resolution=args.resolution)
    reference = load_images(args.dataset_name, split="test", resolution=args.resolution)

    reports, rows = {}, []
    for name in args.families:
        folder = folder_of(name, args)
        if not (folder / "model_index.json").is_file():
            train(name, args)
        done = (folder / "report.json").is_file()
        reports[name] = Report.load(folder) if done else measure(name, reference, training, args)
        rows += draw_row(name, args.row, args)

    lines = [
        f"{args.dataset_name} at {args.resolution}x{args.resolution}, {args.minutes:g} minutes each on {default_device()} "
        f"with {torch.get_num_threads()} threads; sampled in {default_dtype(default_device())}.",
        "",
        *(f"- {describe(name, args)}" for name in args.families),
        "",
        compare(reports),
    ]
    (args.output_dir / "table.md").write_text("\n".join(lines), encoding="utf-8")
    plots.image_grid(rows, columns=args.row, row_labels=args.families).save(args.output_dir / "samples.png")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
