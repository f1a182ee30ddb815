"""
Measures the bias of the Frechet distance at each number of samples: real test images against real training images,
whose true distance is near 0.

    python tests/benchmarks/benchmark_sample_size.py cifar10 mnist [--output docs/sample_size.md]

A dataset is a Hub id or a folder. Features are kept in the package's cache, so an interrupted run resumes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from tiny_diffusers import hardware
from tiny_diffusers.data import ImageData, cache_root, load_images
from tiny_diffusers.evaluation import features, images, metrics


SIZES = (500, 1000, 2000, 5000, 10_000)
MAX_REPEATS = 3  # disjoint subsets of a size


def extract(data: ImageData, count: int, extractor: features.Extractor) -> np.ndarray:
    """Extracts the features of `count` images in the order of their hashes: always the same random choice."""
    pixels = data.images.numpy()
    order = images.order_of(pixels)[:count]
    path = (
        cache_root() / "sample_size" / f"{data.fingerprint[:16]}-{len(order)}-{extractor.preprocessing['dtype']}.npy"
    )

    def compute(start: int, stop: int) -> np.ndarray:
        return extractor(torch.from_numpy(pixels[order[start:stop]])).numpy()

    shape = (len(order), compute(0, 1).shape[1])
    desc = f"{data.name} {data.split}"
    return images.fill(path, shape, np.float32, compute, batch_size=64, state=PartialState(), desc=desc)


def rows(test: np.ndarray, train: np.ndarray) -> list[str]:
    """Returns a row of the table for each size: the mean over disjoint subsets, and their standard deviation."""
    reference = metrics.FrechetReference(train)
    lines = []
    for size in (size for size in SIZES if size <= len(test)):
        repeats = min(MAX_REPEATS, len(test) // size)
        subsets = [test[i * size : (i + 1) * size] for i in range(repeats)]
        columns = (
            [reference.distance(subset) for subset in subsets],
            [metrics.frechet_infinity(subset, reference) for subset in subsets],
            [1000 * metrics.kernel_distance(subset, train).value for subset in subsets],
        )
        cells = (f"{np.mean(c):.2f}" + (f" ± {np.std(c, ddof=1):.2f}" if repeats > 1 else "") for c in columns)
        lines.append(f"| {size:,} | {repeats} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--num_reference", type=int, default=10_000, help="training images (default: 10000)")
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    args = parser.parse_args()

    torch.set_num_threads(hardware.physical_cores())
    extractor = features.load("efficientnet-lite0")
    parts = []
    for name in args.datasets:
        train = extract(load_images(name, split="train"), args.num_reference, extractor)
        test = extract(load_images(name, split="test"), SIZES[-1], extractor)
        head = f"{name}: test images against {len(train):,} training images"
        print(head, flush=True)
        table = ["| test images | subsets | Frechet distance | at infinity | kernel distance x 1000 |"]
        table += ["| ---: | ---: | ---: | ---: | ---: |", *rows(test, train)]
        parts.append("\n".join([head, "", *table]))
    if args.output is not None:
        args.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
