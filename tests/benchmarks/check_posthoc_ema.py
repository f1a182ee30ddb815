r"""
Measures the error of post-hoc EMA: averages rebuilt from the snapshots of a run, against those kept directly in the same
run, as a share of their distance from the last weights; also of snapshots rounded to half precision.

    python tests/benchmarks/check_posthoc_ema.py --max_train_steps 160 --block_out_channels 8 8 --norm_num_groups 4 \
        --attention none none --mid_attention none --layers_per_block 1 --max_train_samples 64 --train_batch_size 8 \
        --mixed_precision no --num_threads 1 --validation_split 0 --save_images_steps 0

Flags are those of `train_unconditional.py`.
"""

import copy
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

from tiny_diffusers.runs import RunFolder
from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training import posthoc_ema
from tiny_diffusers.training.ema import PowerEMA
from tiny_diffusers.training.trainer import Trainer


LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.28)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def distance(module: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(module.parameters(), other.parameters(), strict=True)
    return float(sum((p.double() - q.double()).square().sum() for p, q in pairs).sqrt())


def rounded(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: value.to(dtype).float() if value.is_floating_point() else value for key, value in tensors.items()}


def train(argv: list[str], folder: Path) -> tuple[dict[float, torch.nn.Module], torch.nn.Module]:
    """Trains with snapshots; returns averages that are kept directly, by length, and the last weights."""
    averages, last, update = {}, [], Trainer._update_emas

    def updating(trainer: Trainer, step: int) -> None:
        update(trainer, step)
        module = trainer.accelerator.unwrap_model(trainer.modules["unet"])
        for sigma_rel in LENGTHS:
            averages.setdefault(sigma_rel, PowerEMA(module, sigma_rel)).update(module, step)
        last[:] = [module]

    with mock.patch.object(Trainer, "_update_emas", updating):
        train_unconditional.main([*argv, "--posthoc_ema", "--output_dir", str(folder)])
    return {sigma_rel: average.module for sigma_rel, average in averages.items()}, last[0]


def main(argv: list[str]) -> None:
    columns = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    with tempfile.TemporaryDirectory() as directory:
        averages, last = train(argv, Path(directory))
        folder, rebuilt, errors = RunFolder(directory), copy.deepcopy(last), {sigma_rel: [] for sigma_rel in LENGTHS}
        for dtype in DTYPES:
            with mock.patch.object(posthoc_ema, "load_file", lambda path, d=dtype: rounded(load_file(path), d)):
                snapshots = posthoc_ema.find_snapshots(folder)
                for sigma_rel, _ in posthoc_ema.rebuild({"unet": rebuilt}, folder, snapshots, list(LENGTHS)):
                    error = distance(rebuilt, averages[sigma_rel]) / distance(averages[sigma_rel], last)
                    errors[sigma_rel].append(f"{error:.2%}")
    norm = sum(p.double().square().sum() for p in last.parameters()).sqrt()
    print(f"| sigma_rel | distance from the last weights, over their norm | {' | '.join(columns)} |")
    print("| ---: " * (2 + len(DTYPES)) + "|")
    for sigma_rel in LENGTHS:
        print(f"| {sigma_rel} | {distance(averages[sigma_rel], last) / norm:.2%} | {' | '.join(errors[sigma_rel])} |")


if __name__ == "__main__":
    main(sys.argv[1:])
