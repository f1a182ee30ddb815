"""
Checks that a model of the digits draws digits, and does not copy its training images.

    python tests/benchmarks/check_digits.py runs/ddpm-digits [--num_images 500] [--num_inference_steps 20]

A calibrated support vector classifier, fitted on 70% of the real digits, judges the samples: the share that it
accepts as some digit with a probability over 0.8, and the share of each class. Also measured is the share of samples
whose mean absolute difference to a training image is below 0.3 gray levels of 16 (no held-out real digit is below
0.42). Prints the results as JSON, adds them to the model's card with `--write_card`, and exits with 1 if they fall
short.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


def nearest(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Computes the mean absolute difference of images `(N, D)` to the nearest of the references `(M, D)`: `(N,)`."""
    return np.array([np.abs(references - image).mean(1).min() for image in images])


def judge(samples: np.ndarray) -> dict:
    """Computes the results for samples `(N, 64)` in gray levels 0 to 16."""
    digits = load_digits()
    train, held_out, train_labels, _ = train_test_split(digits.data, digits.target, train_size=0.7, random_state=0)
    classifier = CalibratedClassifierCV(SVC(gamma=0.001), ensemble=False).fit(train, train_labels)
    probabilities = classifier.predict_proba(samples)
    classes = np.bincount(probabilities.argmax(1), minlength=10) / len(samples)
    distances = nearest(samples, digits.data)
    return {
        "num_images": len(samples),
        "accepted as digits": round(float((probabilities.max(1) > 0.8).mean()), 4),
        "real held-out digits accepted": round(float((classifier.predict_proba(held_out).max(1) > 0.8).mean()), 4),
        "smallest share of a class": round(float(classes.min()), 4),
        "classes": [round(float(share), 4) for share in classes],
        "closer than 0.3 to a training image": round(float((distances < 0.3).mean()), 4),
        "smallest distance to a training image": round(float(distances.min()), 3),
        "smallest distance of a held-out digit to the others": round(float(nearest(held_out, train).min()), 3),
    }


def write_card(folder: Path, args: argparse.Namespace, figures: dict) -> None:
    """Rewrites the card of the run with the results and the command that measured them."""
    import yaml

    from tiny_diffusers import cards

    facts = json.loads((folder / "run.json").read_text())
    command = f"python tests/benchmarks/check_digits.py {folder.as_posix()} --seed {args.seed}"
    if args.scheduler:
        command += f" --scheduler {args.scheduler}"
    cards.write_card(
        folder,
        model_name=folder.name,
        command=facts["command"],
        settings=yaml.safe_load((folder / "config.yaml").read_text()),
        data=facts["data"],
        license=yaml.safe_load((folder / "config.yaml").read_text())["license"],
        results={"measured by": command, "inference steps": args.num_inference_steps, **figures},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument(
        "--scheduler", help="Scheduler class of diffusers to sample with, such as DPMSolverMultistepScheduler."
    )
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--write_card", action="store_true", help="Add the results to the checkpoint's card.")
    args = parser.parse_args()

    from tiny_diffusers import TinyPipeline

    pipe = TinyPipeline.from_pretrained(args.checkpoint)
    args.num_inference_steps = args.num_inference_steps or pipe._default_steps
    if args.scheduler:
        import diffusers

        pipe.scheduler = getattr(diffusers, args.scheduler).from_config(pipe.scheduler.config)
    images = pipe(
        batch_size=args.num_images,
        generator=torch.Generator().manual_seed(args.seed),
        num_inference_steps=args.num_inference_steps,
        output_type="np",
    ).images  # (N, 8, 8, 1) in [0, 1]
    figures = judge(images.reshape(len(images), -1) * 16)
    print(json.dumps(figures, indent=2))
    if args.write_card:
        write_card(args.checkpoint, args, figures)

    passed = (
        figures["accepted as digits"] >= 0.75
        and figures["smallest share of a class"] >= 0.04
        and figures["closer than 0.3 to a training image"] <= 0.01
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
