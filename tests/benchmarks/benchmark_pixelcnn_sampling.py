"""
Measures how much faster a PixelCNN samples with cached rows of activations than by evaluating the whole network each
time.

    python tests/benchmarks/benchmark_pixelcnn_sampling.py [--threads 2] [--variant gated] [--batch_size 16] [--naive_steps 6]

Prints three things, in float32 with random weights (speed does not depend on them):

1. 32x32 color images with the network of the CIFAR-10 recipe: cached against naive. Naive sampling takes one forward
   pass per sub-pixel (`plusplus`: per pixel), all with the same cost: the first `--naive_steps` of the 3072 (1024) are
   timed, and the total is extrapolated; `--naive_steps 0` times all of them, which takes hours. Both are timed with
   each number of threads up to `--threads`, and the best time counts for each.
2. The cost at 8, 16, 32 and 64 pixels per side: linear in the number of pixels if a pixel costs the same at each.
3. 64 MNIST digits with the network of the MNIST recipe.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch

from tiny_diffusers import TinyPixelCNNModel, TinyPixelCNNPipeline, train_scripts
from tiny_diffusers.families.pixelcnn import PixelCNNArguments
from tiny_diffusers.hardware import physical_cores
from tiny_diffusers.training.arguments import network_options, parse_arguments


def recipe_network(recipe: str, **config) -> TinyPixelCNNModel:
    """Builds the network of a recipe, with random weights."""
    path = Path(train_scripts.__file__).parent / "recipes" / f"{recipe}.yaml"
    options = network_options(parse_arguments(PixelCNNArguments, ["--config", str(path)]))
    torch.manual_seed(0)
    return TinyPixelCNNModel(**{name: value for name, value in options.items() if value is not None}, **config).eval()


def cached_seconds(model: TinyPixelCNNModel, batch_size: int) -> float:
    """Measures the seconds in which the pipeline draws a batch of images."""
    pipe = TinyPixelCNNPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    began = time.perf_counter()
    pipe(batch_size, generator=torch.Generator().manual_seed(0), output_type="pt")
    return time.perf_counter() - began


@torch.no_grad()
def naive_seconds(model: TinyPixelCNNModel, batch_size: int, num_steps: int) -> float:
    """Measures the seconds of naive sampling, from `num_steps` of its forward passes (0: all)."""
    C, size = model.config.in_channels, model.config.sample_size
    total = size * size * model.network.groups
    num_steps = min(num_steps, total) or total
    sample = torch.rand(batch_size, C, size, size)
    steps = model.conditionals(sample, use_cache=False)
    next(steps)  # warms up
    began, passes = time.perf_counter(), 0
    for (c, _, _), _ in itertools.islice(steps, num_steps * C // model.network.groups):
        passes += c < model.network.groups
    return (time.perf_counter() - began) / passes * total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--variant", choices=("gated", "plusplus"), default="gated")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--naive_steps", type=int, default=6)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, float32, batch {args.batch_size}")

    recipe = f"pixelcnn_cifar10_{args.variant}"
    model = recipe_network(recipe, sample_size=32, in_channels=3)
    cached, naive = {}, {}
    for threads in range(1, args.threads + 1):
        torch.set_num_threads(threads)
        cached[threads] = cached_seconds(model, args.batch_size)
        naive[threads] = naive_seconds(model, args.batch_size, args.naive_steps)
    best = {name: min(times, key=times.get) for name, times in (("cached", cached), ("naive", naive))}
    for name, times in (("cached", cached), ("naive", naive)):
        by_threads = ", ".join(f"{seconds:.1f} s with {threads} threads" for threads, seconds in times.items())
        print(f"32x32 color, {recipe}, {name}: {by_threads}")
    ratio = naive[best["naive"]] / cached[best["cached"]]
    print(f"cached is {ratio:.0f} times as fast as naive ({args.naive_steps or 'all'} naive steps timed)")

    torch.set_num_threads(best["cached"])
    print("\nside   pixels   seconds   ms per pixel")
    for size in (8, 16, 32, 64):
        seconds = cached_seconds(recipe_network(recipe, sample_size=size, in_channels=3), args.batch_size)
        print(f"{size:4d}   {size * size:6d}   {seconds:7.2f}   {1e3 * seconds / size**2:12.3f}")

    seconds = cached_seconds(recipe_network("pixelcnn_mnist", sample_size=28, in_channels=1), 64)
    print(f"\n64 MNIST digits, pixelcnn_mnist: {seconds:.1f} s")


if __name__ == "__main__":
    main()
