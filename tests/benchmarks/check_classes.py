r"""
Checks with a classifier that a model draws what its dataset shows, and a conditional one what is asked for.

    python tests/benchmarks/check_classes.py model_cards/mnist-32
    python tests/benchmarks/check_classes.py model_cards/mnist-32-conditional
    python tests/benchmarks/check_classes.py model_cards/cifar10-32-conditional --dataset_name uoft-cs/cifar10 \
        --epochs 20 --random_flip --min_accuracy 0.8 --min_agreement 0.6

A small classifier, trained on the real images once and then saved, must exceed `--min_accuracy` on the test images. Of
1,000 samples, as many of each class, it says the share to which it gives no class a probability of 0.9, beside that of the
test images; with classes, it must see the requested one in at least `--min_agreement` of them. Prints the results as JSON
and exits with 1 if they fall short.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from tiny_diffusers import TinyConditionalPipeline, TinyPipeline
from tiny_diffusers.commands.shared import place
from tiny_diffusers.data import ImageData, load_images, normalize
from tiny_diffusers.hardware import default_device, default_dtype, physical_cores


SURE = 0.9  # the probability of a class, below which an image is undecided


def build_classifier(num_classes: int) -> nn.Module:
    """Builds a classifier of images of any size: (B, C, H, W) in [-1, 1] -> logits (B, num_classes)."""

    def convolve(width: int) -> list[nn.Module]:
        return [nn.LazyConv2d(width, 3, padding=1, bias=False), nn.LazyBatchNorm2d(), nn.ReLU()]

    return nn.Sequential(
        *(*convolve(32), *convolve(32), nn.MaxPool2d(2)),
        *(*convolve(64), *convolve(64), nn.MaxPool2d(2)),
        *(*convolve(128), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(num_classes)),
    )


def train_classifier(
    classifier: nn.Module, data: ImageData, epochs: int = 3, random_flip: bool = False, batch_size: int = 128
) -> None:
    """Trains it on batches that are shifted by up to two pixels each way and, with `random_flip`, mirrored one time in two."""
    dtype = default_dtype(torch.device("cpu"))
    steps = epochs * len(data) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    classifier.train()
    for _ in tqdm(range(steps), desc="classifier"):
        rows = torch.randint(len(data), (batch_size,))
        images = normalize(data.images[rows]).roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        if random_flip and torch.rand(()) < 0.5:
            images = images.flip(3)
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = classifier(images)
        F.cross_entropy(logits.float(), data.labels[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def probabilities(classifier: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Predicts the probability of each class: images (N, C, H, W) in [-1, 1] -> (N, K)."""
    return torch.cat([classifier(batch).softmax(1) for batch in images.split(500)])


def predict(classifier: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Predicts the classes of images in [-1, 1]: (N, C, H, W) -> (N,)."""
    return probabilities(classifier, images).argmax(1)


def undecided(classifier: nn.Module, images: torch.Tensor) -> float:
    """Returns the share of images in [-1, 1], (N, C, H, W), whose most probable class is not a sure one."""
    return round(float((probabilities(classifier, images).amax(1) < SURE).double().mean()), 4)


def load_classifier(
    dataset_name: str, resolution: int, epochs: int = 3, random_flip: bool = False, path: Path | None = None
) -> tuple[nn.Module, float]:
    """Loads the classifier, or trains and saves it; returns it with its accuracy on the test images."""
    kind = f"{Path(dataset_name).name}-{resolution}-{epochs}-epochs{'-flipped' if random_flip else ''}"
    path = path or Path(f"runs/classifier-{kind}.safetensors")
    torch.manual_seed(0)
    test_data = load_images(dataset_name, split="test", resolution=resolution, require_labels=True)
    classifier = build_classifier(len(test_data.id2label))
    classifier(normalize(test_data.images[:1]))  # sets the sizes of the lazy layers
    classifier.to(memory_format=torch.channels_last)
    if path.is_file():
        classifier.load_state_dict(load_file(path))
    else:
        data = load_images(dataset_name, resolution=resolution, require_labels=True)
        train_classifier(classifier, data, epochs, random_flip)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, path)
    predicted = predict(classifier.eval(), normalize(test_data.images))
    return classifier, float((predicted == test_data.labels).double().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 3.0], help="of a conditional model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--classifier", type=Path, help="file of a trained one (default: one in runs/ for these settings)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="that the classifier is trained for")
    parser.add_argument("--random_flip", action="store_true", help="train it on mirrored images as well")
    parser.add_argument("--min_accuracy", type=float, default=0.99, help="of the classifier, on the test images")
    parser.add_argument("--min_agreement", type=float, default=0.98, help="of the samples with the class")
    args = parser.parse_args()
    torch.set_num_threads(physical_cores())

    device = default_device()
    pipe = place(TinyPipeline.from_pretrained(args.checkpoint), device, default_dtype(device))
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size
    real = load_images(args.dataset_name, split="test", resolution=size)
    is_conditional = isinstance(pipe, TinyConditionalPipeline)
    if is_conditional and pipe.config.id2label != real.id2label:
        parser.error(f"the model's classes are {pipe.config.id2label}, and those of the data {real.id2label}")

    classifier, accuracy = load_classifier(args.dataset_name, size, args.epochs, args.random_flip, args.classifier)
    figures = {
        "accuracy on test images": round(accuracy, 4),
        "undecided test images": undecided(classifier, normalize(real.images)),
        "num_images": args.num_images,
    }
    passed = accuracy > args.min_accuracy
    labels = torch.arange(args.num_images) % len(real.id2label)
    for guidance_scale in args.guidance_scale if is_conditional else [1.0]:
        batches = []
        for rows in tqdm(torch.arange(args.num_images).split(100), desc=f"samples, w = {guidance_scale:g}"):
            generator = [torch.Generator().manual_seed(args.seed + int(i)) for i in rows]
            options = {"num_inference_steps": args.num_inference_steps, "output_type": "pt", "generator": generator}
            given = {"class_labels": labels[rows]} if is_conditional else {"batch_size": len(rows)}
            output = pipe(**given, guidance_scale=guidance_scale, **options)
            batches.append(output.images.float().cpu() * 2 - 1)
        samples = torch.cat(batches)
        figures[f"undecided at w = {guidance_scale:g}"] = undecided(classifier, samples)
        if is_conditional:
            agrees = (predict(classifier, samples) == labels).double()
            agreement = float(agrees.mean())
            figures[f"agreement at w = {guidance_scale:g}"] = {
                "all": round(agreement, 4),
                "standard error": round((agreement * (1 - agreement) / len(agrees)) ** 0.5, 4),
                **{
                    pipe.config.id2label[k]: round(float(agrees[labels == k].mean()), 3)
                    for k in labels.unique().tolist()
                },
            }
            passed &= agreement >= args.min_agreement
    print(json.dumps(figures, indent=2))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
