"""What the scripts' tests share: a run that takes a second."""

import json

import pytest

from tiny_diffusers.errors import UserError
from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training.trainer import Trainer


TINY_NETWORK = [
    *("--block_out_channels", "8", "8", "--norm_num_groups", "4", "--attention", "none", "--mid_attention", "none"),
    *("--layers_per_block", "1"),
]
TINY = [
    *("--max_train_samples", "64", "--train_batch_size", "8", "--eval_batch_size", "4"),
    *("--checkpointing_steps", "2", "--ddpm_num_inference_steps", "2"),
    *("--logging_steps", "2", "--mixed_precision", "no", "--num_threads", "1"),
]


@pytest.fixture
def train(tmp_path, request):
    """
    Runs a script in this process; returns the run's folder. A test's module names its own script and arguments as
    SCRIPT and TINY. With `network=False` the network is left to what the other arguments say of it.
    """
    of_module = getattr(request.module, "SCRIPT", train_unconditional)
    tiny = getattr(request.module, "TINY", None)

    def run(*argv, name="run", steps=6, script=of_module, network=True):
        length = ["--max_train_steps", str(steps)] if steps else []
        small = tiny or (TINY_NETWORK + TINY if network else TINY)
        script.main([*small, *length, "--output_dir", str(tmp_path / name), *argv])
        return tmp_path / name

    return run


@pytest.fixture
def train_in_two(train, monkeypatch):
    """A run that is told to stop after a step, and resumed."""

    def run(*argv, stopped_at, name="resumed", **options):
        step = Trainer.train_step

        def stopping(self):
            step(self)
            if self.step == stopped_at:
                self.received_signal = 15

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", stopping)
            with pytest.raises(SystemExit):
                train(*argv, name=name, **options)
        return train(*argv, "--resume_from_checkpoint", "latest", name=name, **options)

    return run


@pytest.fixture
def check_mistake(train):
    """That a mistake is one line, with these words in it."""

    def check(argv, words, **options):
        with pytest.raises(UserError) as error:
            train(*argv, **options)
        assert "\n" not in str(error.value).strip()
        for word in words:
            assert word in str(error.value)

    return check


@pytest.fixture
def read_log():
    return lambda folder: [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
