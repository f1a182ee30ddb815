"""
Checks that images have the numbers and the class that they are asked to have.

    python tests/benchmarks/check_conditions.py blobs
    python tests/benchmarks/check_conditions.py mnist [--dataset_name ylecun/mnist]

`blobs`: Gaussian blobs at a position (x, y) and of a size given by three numbers, in a color given by a class. The model
is trained on five values of each number, and the blobs are measured at these values and halfway between them: prints the
correlations at guidance 1 and the share of the right colors, and exits with 1 if one is 0.95 or less.

`mnist`: digits with the slant and the stroke's thickness measured from their moments and edges as conditions, beside their
class. Prints the mean error and the correlation of both, and those of a model that would ignore what it is asked for.

Both train on an .npz file that the script writes, by `train_conditional.py` or the script of another `--family`, to which
further flags are handed on, and write `grid-NAME.png`, a row for each value of a condition. `--skip_training` measures the
model that is there.

    python tests/benchmarks/check_conditions.py blobs --family vae --max_train_minutes 2 --kl_weight 0.5
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


SIDE = 16
VALUES = {"x": np.linspace(5, 10, 5), "y": np.linspace(5, 10, 5), "size": np.linspace(1.0, 2.2, 5)}
COLORS = ("red", "green", "blue")


def draw_blobs(values: dict[str, np.ndarray], colors: np.ndarray) -> np.ndarray:
    """Draws blobs (N, SIDE, SIDE, 3) in a color channel (N,), at positions and of standard deviations in pixels."""
    x, y, size = (values[name][:, None, None] for name in VALUES)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    blobs = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * size**2))
    images = np.zeros((len(blobs), SIDE, SIDE, 3))
    images[np.arange(len(blobs)), :, :, colors] = blobs
    return (255 * images).round().astype(np.uint8)


def measure_blobs(images: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Measures the numbers and the colors (N,) of images (N, SIDE, SIDE, 3) in [0, 1]."""
    colors = images.sum(axis=(1, 2)).argmax(axis=1)
    blobs = images[np.arange(len(images)), :, :, colors]
    weights = blobs**2  # which the background's noise hardly moves
    weights = weights / weights.sum(axis=(1, 2), keepdims=True)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    x, y = (weights * columns).sum(axis=(1, 2)), (weights * rows).sum(axis=(1, 2))
    spread = (weights * ((columns - x[:, None, None]) ** 2 + (rows - y[:, None, None]) ** 2)).sum(axis=(1, 2))
    return {
        "x": x,
        "y": y,
        "size": spread**0.5,
    }, colors  # the square has half the variance, in each of two directions


def measure_digits(images: np.ndarray) -> dict[str, np.ndarray]:
    """Measures the slant and the thickness (N,) of digits (N, H, W) in [0, 1]."""
    rows, columns = np.mgrid[: images.shape[1], : images.shape[2]]
    area = images.sum(axis=(1, 2)).clip(1e-6)
    x, y = (((images * axis).sum(axis=(1, 2)) / area)[:, None, None] for axis in (columns, rows))
    moment = (images * (columns - x) * (rows - y)).sum(axis=(1, 2))
    slant = -moment / (images * (rows - y) ** 2).sum(axis=(1, 2)).clip(1e-6)  # pixels to the right for one up
    gradient = np.gradient(images, axis=(1, 2))
    perimeter = np.hypot(*gradient).sum(axis=(1, 2)).clip(1e-6)
    return {"slant": slant, "thickness": 2 * area / perimeter}


def train(file: Path, folder: Path, columns: str, label_column: str, args: argparse.Namespace) -> None:
    script = importlib.import_module(f"tiny_diffusers.train_scripts.train_{args.family}")
    length = ["--max_train_steps", str(args.max_train_steps)]
    if args.max_train_minutes is not None:
        length = ["--max_train_minutes", str(args.max_train_minutes)]
    classes = [] if args.family == "conditional" else ["--class_conditional"]
    data = ["--train_data_dir", str(file), "--condition_columns", columns, "--label_column", label_column]
    run = ["--overwrite_output_dir", "--output_dir", str(folder / "run")]
    script.main([*data, *classes, *length, *run, *args.further])


def sample(folder: Path, values: dict[str, np.ndarray], labels: list, seed: int = 0) -> np.ndarray:
    """Samples an image (H, W, C) in [0, 1] for each row of values and each label, at guidance 1."""
    from tiny_diffusers import TinyPipeline
    from tiny_diffusers.pipelines.pipeline_tiny import image_generators

    pipe = TinyPipeline.from_pretrained(folder / "run")
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(labels), 100):
        part = slice(start, start + 100)
        conditions = {name: column[part] for name, column in values.items()}
        generator = image_generators(seed, len(labels[part]), first=start)
        given = {"class_labels": labels[part], "conditions": conditions}
        images.append(pipe(**given, generator=generator, output_type="np").images)
    return np.concatenate(images)


def draw_grid(folder: Path, values: dict[str, float], name: str, column: np.ndarray, labels: list) -> None:
    """Draws a row for each value of a condition, with a label in each column and the others at the given values."""
    from tiny_diffusers.plots import image_grid

    count = len(column) * len(labels)
    rows = {key: np.full(count, value) for key, value in values.items()} | {name: column.repeat(len(labels))}
    images = sample(folder, rows, labels * len(column)).transpose(0, 3, 1, 2)
    texts = [f"{name} {value:.2f}" for value in column]
    grid = image_grid((255 * images).round().astype(np.uint8), columns=len(labels), row_labels=texts)
    grid.save(folder / f"grid-{name}.png")


def compare(measured: dict[str, np.ndarray], asked: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "correlation": round(float(np.corrcoef(measured[name], asked[name])[0, 1]), 4),
            "mean error": round(float(np.abs(measured[name] - asked[name]).mean()), 4),
            "mean error of a constant": round(float(np.abs(asked[name] - np.median(asked[name])).mean()), 4),
        }
        for name in asked
    }


def check_blobs(args: argparse.Namespace, folder: Path) -> bool:
    rng = np.random.default_rng(0)
    if not args.skip_training:
        values = {name: rng.choice(column, args.num_train) for name, column in VALUES.items()}
        colors = rng.integers(0, 3, args.num_train)
        file = folder / "blobs.npz"
        np.savez(file, image=draw_blobs(values, colors), color=np.array(COLORS)[colors], **values)
        train(file, folder, ",".join(VALUES), "color", args)
    passed = True
    between = {name: (column[1:] + column[:-1]) / 2 for name, column in VALUES.items()}
    for where, columns in (("at the values of training", VALUES), ("between them", between)):
        asked = {name: rng.choice(column, args.num_images) for name, column in columns.items()}
        colors = rng.integers(0, 3, args.num_images)
        measured, found = measure_blobs(sample(folder, asked, [COLORS[i] for i in colors]))
        figures = compare(measured, asked) | {"right colors": round(float((found == colors).mean()), 4)}
        print(json.dumps({where: figures}, indent=2))
        passed &= figures["right colors"] > 0.95 and all(figures[name]["correlation"] > 0.95 for name in asked)
    middle = {name: float(column.mean()) for name, column in VALUES.items()}
    for name, column in VALUES.items():
        draw_grid(folder, middle, name, np.linspace(column[0], column[-1], 5), list(COLORS))
    return passed


def check_mnist(args: argparse.Namespace, folder: Path) -> bool:
    from tiny_diffusers.data import load_images

    data = load_images(args.dataset_name, resolution=32, max_samples=args.num_train, require_labels=True)
    images = data.images[:, 0].numpy()
    values = measure_digits(images / 255)
    if not args.skip_training:
        np.savez(folder / "digits.npz", image=images, label=data.labels.numpy(), **values)
        train(folder / "digits.npz", folder, ",".join(values), "label", args)
    rng = np.random.default_rng(0)
    ranges = {name: np.quantile(column, (0.05, 0.95)) for name, column in values.items()}
    asked = {name: rng.uniform(low, high, args.num_images) for name, (low, high) in ranges.items()}
    labels = rng.integers(0, 10, args.num_images).tolist()
    measured = measure_digits(sample(folder, asked, labels)[..., 0])
    figures = compare(measured, asked)
    print(json.dumps(figures, indent=2))
    middle = {name: float(np.median(column)) for name, column in values.items()}
    for name, (low, high) in ranges.items():
        draw_grid(folder, middle, name, np.linspace(low, high, 5), list(range(10)))
    return all(each["mean error"] < each["mean error of a constant"] / 2 for each in figures.values())


CHECKS: dict[str, Callable[[argparse.Namespace, Path], bool]] = {"blobs": check_blobs, "mnist": check_mnist}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=[*CHECKS])
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="of mnist: a Hub id or a folder")
    parser.add_argument("--family", choices=["conditional", "pixelcnn", "vae", "dcgan"], default="conditional")
    parser.add_argument("--max_train_steps", type=int, default=1500, help="steps of 32 images")
    parser.add_argument("--max_train_minutes", type=float, help="instead of steps")
    parser.add_argument("--num_train", type=int, default=20_000, help="training images")
    parser.add_argument("--num_images", type=int, default=500, help="samples that are measured")
    parser.add_argument("--output", type=Path, default=Path("runs/check-conditions"))
    parser.add_argument("--skip_training", action="store_true")
    args, args.further = parser.parse_known_args()
    folder = args.output / (args.check if args.family == "conditional" else f"{args.check}-{args.family}")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    passed = CHECKS[args.check](args, folder)
    print("passed" if passed else "not passed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
