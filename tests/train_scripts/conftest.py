"""What the scripts' tests share: a run that takes a second."""

import json

import pytest

from tiny_diffusers.train_scripts import train_unconditional


TINY = [
    *("--block_out_channels", "8", "8", "--norm_num_groups", "4", "--attention", "none", "--mid_attention", "none"),
    *("--layers_per_block", "1", "--max_train_samples", "64", "--train_batch_size", "8", "--eval_batch_size", "4"),
    *("--checkpointing_steps", "2", "--ddpm_num_inference_steps", "2"),
    *("--logging_steps", "2", "--mixed_precision", "no", "--num_threads", "1"),
]


@pytest.fixture
def train(tmp_path):
    """Runs the unconditional script in this process; returns the run's folder."""

    def run(*argv, name="run", steps=6, script=train_unconditional):
        length = ["--max_train_steps", str(steps)] if steps else []
        script.main([*TINY, *length, "--output_dir", str(tmp_path / name), *argv])
        return tmp_path / name

    return run


@pytest.fixture
def read_log():
    return lambda folder: [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
