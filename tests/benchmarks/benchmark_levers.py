"""
Measures what a change of the training recipe does to the images, at equal minutes or steps.

    python tests/benchmarks/benchmark_levers.py --dataset_name ylecun/mnist --minutes 10 --seeds 0 1
    python tests/benchmarks/benchmark_levers.py --dataset_name ylecun/mnist --steps 1300 --levers "v, AdamW" "flow, Muon"

Each lever is a run of `train unconditional` (or `conditional`) with the flags in `LEVERS`, and the defaults otherwise.
They take turns: all with the first seed, then all with the next, as the speed of a machine changes. Each model is sampled
with several numbers of steps and amounts of new noise (eta), from the same noise. A cell is the Frechet distance of
`--num_images` samples to 5,000 test images with efficientnet-lite0 features: the mean over the seeds and its half range.
Writes `table.md` and a grid for each lever into `--output_dir`. What is trained and measured there already is not done
again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from tiny_diffusers import TinyPipeline, cli, hardware
from tiny_diffusers.data import load_images
from tiny_diffusers.evaluation import features, images, metrics
from tiny_diffusers.plots import image_grid


BATCH = 100
V = ["--prediction_type", "v_prediction", "--learning_rate", "1e-3"]
FLOW = ["--prediction_type", "flow", "--learning_rate", "1e-3"]
EDM = ["--prediction_type", "edm"]
ADAMW, MUON = ["--optimizer", "adamw"], ["--optimizer", "muon"]
WIDE = ["--block_out_channels", "64", "128", "128", "--attention", "none", "full", "none"]
PATCH_4 = ["--patch_size", "4", "--block_out_channels", "128", "128", "--attention", "full", "none"]
TRANSFORMER = ["--network", "transformer"]
LEVERS = {
    "the defaults": [],
    "v, AdamW": [*V, *ADAMW],
    "v, Muon": [*V, *MUON],
    "flow, AdamW": [*FLOW, *ADAMW],
    "flow, Muon": [*FLOW, *MUON],
    "EDM, Muon": [*EDM, *MUON],
    "the layers predict the velocity": ["--x_prediction", "False"],
    "lr 6e-3": ["--learning_rate", "6e-3"],
    "uniform timesteps": ["--timestep_distribution", "uniform"],
    "logit-normal timesteps": ["--timestep_distribution", "logit_normal"],
    "warm-up stable decay": ["--lr_scheduler", "warmup_stable_decay"],
    "batch 16": ["--train_batch_size", "16"],
    "batch 64": ["--train_batch_size", "64"],
    "widths 64, 128, 128": WIDE,
    "patch 4": PATCH_4,
    "transformer": TRANSFORMER,
    "transformer, rotary": [*TRANSFORMER, "--position_embedding", "relative"],
    "transformer, long skips": [*TRANSFORMER, "--long_skips", "True"],
    "transformer, patch 2": [*TRANSFORMER, "--patch_size", "2", "--num_attention_heads", "2", "--num_layers", "4"],
}


def measure(
    folder: Path, reference: metrics.FrechetReference, extractor, args: argparse.Namespace
) -> dict[str, float]:
    """Measures a model with each sampler: sampler -> distance."""
    file = folder / f"distances-{args.num_images}.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    pipe = TinyPipeline.from_pretrained(folder)
    pipe.unet.to(memory_format=torch.channels_last)
    ids = getattr(pipe, "_class_ids", None)
    for name, steps, eta in _samplers(args):
        if name in found:
            continue
        drawn = images.sample(
            pipe,
            pipe._image_shape,
            np.uint8,
            folder / f"samples-{args.num_images}-{steps}-{eta:g}.npy",
            num_images=args.num_images,
            seed=0,
            batch_size=BATCH,
            options={"num_inference_steps": steps, "eta": eta},
            class_labels=np.resize(ids, args.num_images) if ids else None,
            state=PartialState(),
        )
        drawn = torch.from_numpy(np.array(drawn))
        extracted = torch.cat([extractor(batch) for batch in drawn.split(BATCH)]).numpy()
        found[name] = reference.distance(extracted)
        image_grid(drawn[:64]).save(folder / f"samples-{steps}-{eta:g}.png")
        file.write_text(json.dumps(found))
    return found


def _samplers(args: argparse.Namespace) -> list[tuple[str, int, float]]:
    return [(f"{n} steps, eta {eta:g}", n, eta) for n in args.num_inference_steps for eta in args.eta]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=("unconditional", "conditional"), default="unconditional")
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="a Hub id or a folder")
    parser.add_argument("--resolution", type=int)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=10.0)
    budget.add_argument("--steps", type=int, help="the same number of steps instead, for a machine of changing speed")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs", "levers"))
    args = parser.parse_args()

    size = ["--resolution", str(args.resolution)] if args.resolution else []
    budget = (
        ["--max_train_minutes", str(args.minutes)] if args.steps is None else ["--max_train_steps", str(args.steps)]
    )
    runs = {}
    for seed in args.seeds:
        for lever in args.levers:
            runs[lever, seed] = folder = args.output_dir / f"{lever.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "model_index.json").is_file():
                flags = ["--dataset_name", args.dataset_name, *size, *budget, "--seed", str(seed)]
                flags += ["--output_dir", str(folder), "--resume_from_checkpoint", "latest", *LEVERS[lever]]
                if cli.main(["train", args.script, *flags]) != 0:
                    raise SystemExit(f"{lever} was stopped: the same command goes on from there.")

    torch.set_num_threads(hardware.physical_cores())
    pipe = TinyPipeline.from_pretrained(next(iter(runs.values())))
    channels, _, side = pipe._image_shape
    options = {"resolution": side, "channels": channels, "split": "test"}
    options["train_data_dir" if Path(args.dataset_name).exists() else "dataset_name"] = args.dataset_name
    extractor = features.load("efficientnet-lite0")
    test = load_images(**options).images[:5000]
    reference = metrics.FrechetReference(torch.cat([extractor(batch) for batch in test.split(BATCH)]).numpy())

    names = [name for name, *_ in _samplers(args)]
    lines = ["| lever | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for lever in args.levers:
        measured = [measure(runs[lever, seed], reference, extractor, args) for seed in args.seeds]
        cells = []
        for name in names:
            values = [found[name] for found in measured]
            cells.append(f"{np.mean(values):.1f} ± {np.ptp(values) / 2:.1f}")
        lines.append(f"| {lever} | " + " | ".join(cells) + " |")
        print("\n".join(lines[:2] + lines[-1:]), flush=True)
    (args.output_dir / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
