"""A training run that takes a second, for all tests: its flags, the run in this process, its log."""

import json
from pathlib import Path
from unittest import mock


TINY_NETWORK = [
    *("--block_out_channels", "8", "--norm_num_groups", "4", "--attention", "none", "--mid_attention", "none"),
    *("--layers_per_block", "1"),
]
TINY_RUN = [
    *("--max_train_samples", "64", "--train_batch_size", "8", "--eval_batch_size", "4", "--checkpointing_steps", "2"),
    *("--logging_steps", "2", "--mixed_precision", "no", "--num_threads", "1"),
]
TINY_DIFFUSION = [*TINY_NETWORK, *TINY_RUN, "--ddpm_num_inference_steps", "2"]


def train(folder: Path, *argv: str, steps: int | None = 6, script=None, flags=TINY_DIFFUSION, plots=False) -> Path:
    """
    Runs a script (the unconditional one by default) in this process; returns the run's folder. The loss curves are
    drawn only with `plots`: matplotlib takes a third of a tiny run.
    """
    from matplotlib.figure import Figure

    from tiny_diffusers.train_scripts import train_unconditional

    length = ["--max_train_steps", str(steps)] if steps else []
    draw = Figure.savefig if plots else lambda figure, path: Path(path).touch()
    with mock.patch.object(Figure, "savefig", draw):
        (script or train_unconditional).main([*flags, *length, "--output_dir", str(folder), *argv])
    return folder


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
