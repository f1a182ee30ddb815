"""
Measures the cost of an evaluation: the time to extract features, memory, and the difference between one process and
two.

    python tests/benchmarks/benchmark_evaluation.py [--dataset_name uoft-cs/cifar10]

1. Seconds that `efficientnet-lite0` takes for 10,000 images, in float32 and bfloat16.
2. Peak memory of `tiny-diffusers evaluate --images` at 2,500, 10,000 and 40,000 images (features `pixels`, the metrics
   that compare sets), each in its own process. On Linux this is the memory of the process alone, without memory-mapped
   files; elsewhere it is all of its memory.
3. The largest relative difference between the metrics of one process and of two, `efficientnet-lite0`, 2,000 images.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from tiny_diffusers import hardware, plots
from tiny_diffusers.data import load_images
from tiny_diffusers.evaluation import Report, features


SIZES = (2_500, 10_000, 40_000)


def seconds_for(images: torch.Tensor, dtype: str) -> float:
    extractor = features.load("efficientnet-lite0", dtype=dtype)
    extractor(images[:64])
    began = time.perf_counter()
    for batch in images.split(64):
        extractor(batch)
    return time.perf_counter() - began


def evaluate(folder: Path, output: Path, dataset_name: str, *options: str, processes: int = 1) -> float:
    """Runs `tiny-diffusers evaluate` and returns its peak memory, in MB."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, "-m", "tiny_diffusers.cli", "evaluate", "--images", str(folder), "--output", str(output)]
    command += ["--dataset_name", dataset_name, "--train_split", "none", "--baselines", "none", *options]
    command += ["--metrics", "frechet_distance,kernel_distance,precision_recall,density_coverage"]
    environment = {**os.environ, "TINY_DIFFUSERS_CACHE": str(output / "cache")}
    process, peak = psutil.Popen(command, env=environment, stderr=subprocess.DEVNULL), 0
    while process.poll() is None:
        try:
            memory = process.memory_info()
            peak = max(peak, memory.rss - getattr(memory, "shared", 0))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    args = parser.parse_args()
    torch.set_num_threads(hardware.physical_cores())
    images = load_images(args.dataset_name).images[: SIZES[-1]]

    for dtype in ("float32", "bfloat16"):
        print(f"efficientnet-lite0, 10,000 images, {dtype}: {seconds_for(images[:10_000], dtype):.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        written = 0
        for size in SIZES:
            for i in range(written, size):
                plots.to_pil(images[i : i + 1])[0].save(folder / f"{i:06d}.png")
            written = size
            options = ("--features", "pixels", "--num_images", str(size), "--num_jackknife", "5")
            peak = evaluate(folder, Path(temporary) / f"{size}", args.dataset_name, *options)
            print(f"{size:,} images: {peak:,.0f} MB at the peak", flush=True)
        reports = []
        for processes in (1, 2):
            output = Path(temporary) / f"processes-{processes}"
            evaluate(folder, output, args.dataset_name, "--num_images", "2000", processes=processes)
            reports.append({name: entry["value"] for name, entry in Report.load(output).figures.items()})
        one, two = reports
        differences = [abs(two[name] - one[name]) / max(abs(one[name]), 1e-12) for name in one]
        print(f"one process and two: {len(differences)} metrics differ by at most {max(differences):.1e} (relative)")


if __name__ == "__main__":
    main()
