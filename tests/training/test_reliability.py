"""A run can be killed, stopped, starved of disk, damaged and multiplied, and computes what it would have computed."""

import contextlib
import importlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from tiny import TINY_DIFFUSION, TINY_NETWORK, read_log, train
from tiny_diffusers import TinyDDIMScheduler, TinyPipeline, TinyUNet2DModel, hardware
from tiny_diffusers.errors import UserError
from tiny_diffusers.families.diffusion import Diffusion, DiffusionArguments
from tiny_diffusers.files import MANIFEST, find_damage, seal
from tiny_diffusers.runs import RunFolder
from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training.process import launch, setup_process
from tiny_diffusers.training.trainer import Trainer


WEIGHTS = "diffusion_pytorch_model.safetensors"
HARNESS = Path(__file__).parents[1] / "benchmarks" / "kill_harness.py"
ACCELERATE = Path(__file__).parents[2] / "docs" / "accelerate"
TINY = [*TINY_DIFFUSION, "--random_flip", "--logging_steps", "3", "--save_images_epochs", "0"]
RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing has happened to."""
    return _train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run as a kill after its fifth step would have left it: checkpoint-4 and what was logged since."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-6")
    return folder


def _train(folder, *argv, steps=6, batch=8):
    return train(folder, "--train_batch_size", str(batch), *argv, steps=steps, flags=TINY)


def _assert_equal(one, other):
    """To the bit: log, samples, saved weights, and the last checkpoint with averages and optimizer."""
    for name in ("train_log.jsonl", "samples.png", f"unet/{WEIGHTS}"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    last = RunFolder(one).list_checkpoints()[-1].name
    for path in (one / last).rglob("*.*"):
        if path.name not in (MANIFEST, "config.json"):
            assert path.read_bytes() == (other / last / path.relative_to(one / last)).read_bytes(), path


# ------------------------------------------------------------------------------------------------- kills and signals


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_one_left_alone():
    command = [sys.executable, str(HARNESS), "--work", "training", "--kills", "3", "--inside", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    kills = re.search(r"(\d+) kills: (\d+) inside a write", result.stdout)  # one that missed its write comes again
    assert kills and int(kills[1]) >= 3 and int(kills[2]) >= 1, result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys, number):
    step = Trainer.train_step

    def told_to_stop(self):
        if self.step == 2:
            signal.raise_signal(number)
        step(self)

    monkeypatch.setattr(Trainer, "train_step", told_to_stop)
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP is ignored, and stays so
    try:
        assert launch(lambda: _train(tmp_path / "run")) == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert "stopped at step 3: --resume_from_checkpoint latest" in capsys.readouterr().out
    assert find_damage(tmp_path / "run" / "checkpoint-3") is None

    monkeypatch.undo()
    _assert_equal(whole, _train(tmp_path / "run", *RESUME))


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    """As under nohup, when the terminal is closed."""
    step = Trainer.train_step

    def hang_up(self):
        signal.raise_signal(signal.SIGHUP)
        step(self)

    monkeypatch.setattr(Trainer, "train_step", hang_up)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _train(tmp_path / "run", steps=2)
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_signal_while_a_checkpoint_is_written_counts_at_the_next_step(whole, tmp_path, monkeypatch):
    save = Trainer._save_checkpoint

    def told_to_stop(self):
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        save(self)

    monkeypatch.setattr(Trainer, "_save_checkpoint", told_to_stop)
    assert launch(lambda: _train(tmp_path / "run")) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert RunFolder(tmp_path / "run").list_checkpoints()[-1].name == "checkpoint-3"
    _assert_equal(whole, _train(tmp_path / "run", *RESUME))


def test_grids_come_at_the_same_steps_after_a_resume(tmp_path, monkeypatch):
    grids = ("--save_images_epochs", "1", "--validation_split", "0")
    options = {"batch": 32, "steps": 7}  # two steps an epoch
    once = _train(tmp_path / "once", *grids, **options)
    step = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self: step(self) or setattr(self, "received_signal", self.step == 3)
    )
    with pytest.raises(SystemExit):
        _train(tmp_path / "twice", *grids, **options)
    monkeypatch.undo()
    twice = _train(tmp_path / "twice", *grids, *RESUME, **options)
    for folder in (once, twice):
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["step-0000002.png", "step-0000004.png", "step-0000006.png"]
    if hardware.default_device().type == "cpu":  # where kernels add in one order
        _assert_equal(once, twice)


def test_ctrl_c_before_the_first_step_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert launch(interrupted) == 130
    assert capsys.readouterr().err == "stopped.\n"


# ---------------------------------------------------------------------------------------------------------- the disk


def test_a_full_disk_stops_the_run_with_the_earlier_checkpoints_intact(whole, tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    step, limits = Trainer.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_the_disk(self):
        step(self)
        if self.step == 3:  # no file may grow beyond this: the weights cannot be written any more
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))

    monkeypatch.setattr(Trainer, "train_step", fills_the_disk)
    try:
        status = launch(lambda: _train(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and error.startswith("error:") and "checkpoint-2" in error and "Make room" in error
    assert not list((tmp_path / "run").glob(".staging-*"))
    assert find_damage(tmp_path / "run" / "checkpoint-2") is None

    monkeypatch.undo()
    _assert_equal(whole, _train(tmp_path / "run", *RESUME))


@pytest.mark.parametrize("kind", ["delete", "truncate", "empty", "flip", "folder"])
def test_any_damage_to_any_file_of_a_checkpoint_is_seen_and_named(whole, tmp_path, kind):
    files = sorted(path.relative_to(whole / "checkpoint-6") for path in (whole / "checkpoint-6").rglob("*.*"))
    assert len(files) >= 7
    for name in files:
        shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6", dirs_exist_ok=True)
        path = tmp_path / "checkpoint-6" / name
        content = bytearray(path.read_bytes())
        content[random.Random(0).randrange(len(content))] ^= 0x01
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "delete":
            path.write_bytes({"truncate": content[:-1], "empty": b"", "flip": content}[kind])
        reason = find_damage(tmp_path / "checkpoint-6")
        assert reason and (path.name in reason or path.name == MANIFEST), (name, reason)
        shutil.rmtree(tmp_path / "checkpoint-6")


def test_a_damaged_checkpoint_is_passed_over_and_later_replaced(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "checkpoint-6" / "unet_optimizer" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    _train(folder, *RESUME)
    assert "checkpoint-6 is damaged (unet_optimizer/optimizer.safetensors has" in capsys.readouterr().err
    _assert_equal(whole, folder)


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_earlier_one(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoint-6" / "state.json").unlink()
    _train(folder, *RESUME, "--checkpointing_steps", "5", "--checkpoints_total_limit", "1")
    assert [path.name for path in RunFolder(folder).list_checkpoints()] == ["checkpoint-6"]  # the end's
    assert find_damage(folder / "checkpoint-6") is None


def test_half_written_files_of_a_kill_are_no_obstacle(whole, run):
    for name in (
        ".staging-checkpoint-6-0123abcd/unet/half",
        ".staging-checkpoint-4-0123abcd/half",
        ".staging-config.yaml-0123abcd",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    (run / "unet" / WEIGHTS).write_bytes(b"half")
    (run / "model_index.json").unlink()
    with (run / "train_log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    _assert_equal(whole, _train(run, *RESUME))
    assert not list(run.glob(".staging-*"))


# -------------------------------------------------------------------------------------------------- going on elsewhere


def test_nothing_that_is_read_back_can_run_code(whole, run, monkeypatch):
    suffixes = {path.suffix for path in (whole / "checkpoint-6").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}

    def refused(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refused)
    _assert_equal(whole, _train(run, *RESUME))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--block_out_channels", "8", "16"], ["checkpoint-4", "its unet has", "block_out_channels [8], not [8, 16]"]),
        (["--optimizer", "sgd"], ["checkpoint-4", "another optimizer than SGD"]),
        (["--optimizer", "adamw"], ["checkpoint-4", "another optimizer than AdamW"]),
    ],
)
def test_settings_that_a_checkpoint_does_not_fit_are_refused_in_one_line(run, argv, words):
    with pytest.raises(UserError, match="config.yaml") as error:
        _train(run, *RESUME, *argv)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"step": 4}', '{"step": true}', '{"step": -1}'])
def test_a_state_of_another_form_is_refused_in_one_line(run, content):
    """As a later version may write, or someone hostile: its checksum is right."""
    checkpoint = run / "checkpoint-4"
    (checkpoint / "state.json").write_text(content)
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)
    with pytest.raises(UserError, match="checkpoint-4 does not fit") as error:
        _train(run, *RESUME)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["order", "negative", "step", "some", "weights", "ema", "huge"])
def test_a_foreign_checkpoint_never_leads_to_weights_that_are_not_finite(run, change):
    """Each of these is of the right form, and its checksum is right."""
    checkpoint = run / "checkpoint-4"
    file = checkpoint / "unet_optimizer" / "optimizer.safetensors"
    if change == "order":  # in which torch's fused optimizers read beyond the end of a moment
        file = checkpoint / "unet_optimizer" / "optimizer.json"
        optimizer = json.loads(file.read_text())
        optimizer["param_groups"][0]["params"].reverse()
        file.write_text(json.dumps(optimizer))
    else:
        if change in ("weights", "ema"):
            file = checkpoint / {"weights": "unet", "ema": "unet_ema"}[change] / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        if change == "some":
            tensors = {name: value for name, value in tensors.items() if not name.startswith("0.")}
        for name, value in tensors.items():
            if change == "negative" and name.endswith("exp_avg_sq"):
                value.sub_(1.0)
            elif change == "step" and name.endswith("step"):
                value.fill_(-1.0)
            elif change == "huge" and name.endswith("exp_avg"):
                value.fill_(3e38)
            elif change in ("weights", "ema"):
                value.fill_(math.nan)
        save_file(tensors, file, metadata={"format": "pt"})
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)
    with pytest.raises(UserError, match="checkpoint-4 does not fit|not finite") as error:
        _train(run, *RESUME)
    assert "\n" not in str(error.value)


def test_what_makes_a_resumed_run_another_run_is_said(run, capsys):
    _train(run, *RESUME, "--seed", "1", batch=4)
    said = capsys.readouterr().err
    for words in ("--seed is 1, but was 0", "a step is 4 images, but was 8"):
        assert words in said


def test_other_images_are_refused_at_a_resume_and_the_same_ones_are_not_wherever_they_lie(tmp_path, capsys):
    photos, moved, run = tmp_path / "photos", tmp_path / "elsewhere" / "moved", tmp_path / "run"
    for i in range(6):
        (photos / f"kind{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"kind{i % 2}" / f"{i}.png")
    flags = ("--cache_dir", str(tmp_path / "cache"), "--train_data_dir")
    _train(run, *flags, str(photos), steps=2)
    shutil.copytree(photos, moved)
    _train(run, *RESUME, *flags, str(moved), steps=3)
    assert (run / "checkpoint-3").is_dir() and "warning:" not in capsys.readouterr().err

    (moved / "kind0" / "2.png").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError) as error:
        _train(run, *RESUME, *flags, str(moved), steps=4)
    words = r"was trained on 6 images \[1, 8, 8\] of moved \(train\), and these are 5 images \[1, 8, 8\] of moved .*"
    assert re.search(words + f"--pretrained_model_name_or_path {run} with another --output_dir", str(error.value))
    shutil.copyfile(photos / "kind0" / "0.png", moved / "kind0" / "2.png")
    with pytest.raises(UserError, match=r"6 images .* of moved \(train\), with other pixels, labels or conditions"):
        _train(run, *RESUME, *flags, str(moved), steps=4)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert capsys.readouterr().err == ""  # no warning beside the refusal


def test_going_back_to_an_earlier_checkpoint_says_which_ones_it_replaces(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    _train(tmp_path / "run", "--resume_from_checkpoint", "checkpoint-4", "--checkpoints_total_limit", "9")
    assert "goes on from checkpoint-4: its next checkpoint replaces checkpoint-6." in capsys.readouterr().err


def test_the_seconds_of_a_run_are_added_up_unless_a_kill_has_lost_some(whole, run):
    facts = json.loads((whole / "run.json").read_text())
    assert 0 < facts.pop("seconds") < 100
    (run / "run.json").write_text(json.dumps(facts | {"seconds": 1000}))
    _train(run, *RESUME)
    assert 1000 <= json.loads((run / "run.json").read_text())["seconds"] < 1100
    (run / "run.json").write_text(json.dumps(facts))
    _train(run, *RESUME)
    assert "seconds" not in json.loads((run / "run.json").read_text())


def test_a_damaged_settings_file_is_named(run):
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="config.yaml is damaged"):
        _train(run, *RESUME)


# ------------------------------------------------------------------------------------------------------ many processes


# accelerate takes FSDP for a matter of GPUs, and says nothing: this switches it on where there are none.
SHARDED = """
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training import checkpoints, process


class Sharded(Accelerator):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def gather_full(tensor):
    sharded.add(hasattr(tensor, "full_tensor") and tensor.to_local().numel() < tensor.numel())
    return gather(tensor)


sharded, gather = set(), checkpoints.gather_full
checkpoints.gather_full, process.Accelerator = gather_full, Sharded
train_unconditional.main()
assert True in sharded
"""


def _torchrun(script, *argv, environment=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # On CPUs: a machine may have one GPU alone.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (environment or {})
    environment["PYTHONFAULTHANDLER"] = "1"  # for _output
    command += [str(script), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _output(process):
    """Returns what was printed until the end. Where there is none, the test fails with the stacks of all processes."""
    try:
        return process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)
        for hung in (*launcher.children(recursive=True), launcher):
            with contextlib.suppress(psutil.NoSuchProcess):
                hung.send_signal(signal.SIGABRT)
    try:
        output = process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired as error:  # a process that has lost its launcher holds it
        output = (error.output or b"").decode(errors="replace")
    pytest.fail(f"hung: {output}")


def _halves(folder, *argv):
    """The unconditional script's arguments for two processes of four images each, with what FSDP can shard."""
    length = ("--max_train_steps", "50", "--train_batch_size", "4", "--checkpointing_steps", "25")
    length += ("--optimizer", "adamw")
    return [*TINY, *length, "--output_dir", str(folder), *argv]


# In this order, as the last one trains on the latents of the autoencoder
_FAMILIES = {
    "train_conditional": (*TINY_NETWORK, "--eval_batch_size", "4", "--random_flip", "--optimizer", "muon"),
    "train_pixelcnn": ("--hidden_channels", "8", "--num_layers", "3", "--num_levels", "17", "--optimizer", "muon"),
    "train_vae": ("--block_out_channels", "8", "--latent_dim", "4"),
    "train_dcgan": (
        *("--generator_channels", "8", "8", "--discriminator_channels", "8", "8", "--latent_dim", "4"),
        *("--gradient_accumulation_steps", "2"),
    ),
    "train_autoencoder": ("--block_out_channels", "8", "8"),
    "latents": (*TINY_NETWORK, "--eval_batch_size", "4", "--random_flip"),
}
_IN_ONE_GROUP = """
import importlib, json, sys
import torch.distributed

torch.distributed.destroy_process_group = lambda group=None: None  # the next run takes it over
for script, argv in json.loads(sys.argv[1]):
    importlib.import_module(f"tiny_diffusers.train_scripts.{script}").main(argv)
"""


def _script(name):
    return "train_unconditional" if name == "latents" else name


def _data(name, folder):
    """Flags of the digits, and for the conditional script of an .npz of them with their mean as a condition."""
    if name != "train_conditional":
        return ()
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)
    np.savez(folder / "digits.npz", image=images, label=digits.target, ink=images.mean(axis=(1, 2)))
    return ("--train_data_dir", str(folder / "digits.npz"), "--condition_columns", "ink")


def _settings(name, folder, batch, two):
    vae = ("--vae", str(two / "train_autoencoder"), "--cache_dir", str(folder / "cache")) if name == "latents" else ()
    return [
        *(*_FAMILIES[name], *vae, "--max_train_steps", "50", "--logging_steps", "10", "--save_images_epochs", "0"),
        *(*_data(name, folder), "--max_train_samples", "64", "--validation_split", "0", "--checkpointing_steps", "50"),
        *("--mixed_precision", "no", "--num_threads", "1", "--train_batch_size", str(batch)),
        *("--output_dir", str(folder / name)),
    ]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with a run of each script, all in one launch, as most of a launch is imports."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "runs.py").write_text(_IN_ONE_GROUP)
    argv = [("train_unconditional", _halves(folder / "train_unconditional"))]
    argv += [(_script(name), _settings(name, folder, 4, folder)) for name in _FAMILIES]
    process = _torchrun(folder / "runs.py", json.dumps(argv))
    output = _output(process)
    assert process.returncode == 0, output
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows has no gloo of its own")
def test_two_processes_compute_what_one_does(two_processes, tmp_path):
    threads = torch.get_num_threads()
    flags = ("--num_threads", "2", "--checkpointing_steps", "50", "--optimizer", "adamw")
    one = _train(tmp_path / "one", *flags, steps=50)
    torch.set_num_threads(threads)
    two = two_processes / "train_unconditional"
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    # Of 64 images 3 are held out: one process measures all, of two one has none.
    for ours, theirs in zip(read_log(one), read_log(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"grad_norm"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), (ours["step"], name)
    ours, theirs = (load_file(folder / "unet" / WEIGHTS) for folder in (one, two))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows has no gloo of its own")
@pytest.mark.parametrize("name", _FAMILIES)
def test_two_processes_train_the_other_families_as_one_does(name, two_processes, tmp_path):
    """But for the DCGAN's figures: it has batch norm, whose statistics are of each process's own images."""
    two = two_processes / name
    settings = _settings(name, tmp_path, 8, two_processes)
    importlib.import_module(f"tiny_diffusers.train_scripts.{_script(name)}").main(settings)
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    for ours, theirs in zip(read_log(tmp_path / name), read_log(two), strict=True):
        assert ours.keys() == theirs.keys()
        if name != "train_dcgan":
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows has no gloo of its own")
def test_torchrun_hands_a_signal_on_and_two_processes_go_on_to_the_bit(two_processes, tmp_path):
    folder = tmp_path / "run"
    process = _torchrun(
        train_unconditional.__file__, *_halves(folder, "--checkpointing_steps", "1")
    )  # slow enough to be met in the middle
    while not (folder / "train_log.jsonl").exists() or not read_log(folder):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.terminate()
    output = _output(process)
    stopped = RunFolder(folder).list_checkpoints()[-1]
    assert f"stopped at step {stopped.name.partition('-')[2]}: --resume_from_checkpoint latest" in output
    assert find_damage(stopped) is None and stopped.name != "checkpoint-50"

    process = _torchrun(train_unconditional.__file__, *_halves(folder, *RESUME))
    output = _output(process)
    assert process.returncode == 0, output
    _assert_equal(two_processes / "train_unconditional", folder)


_LAST_BARRIERS = """
import sys, time
import torch
from torch.nn.parallel import DistributedDataParallel

from tiny_diffusers.hardware import last_barrier

sys.setswitchinterval(100)  # a thread that waits for the GIL isn't given it for a while
torch.distributed.init_process_group("gloo")


def train():
    group = torch.distributed.new_group()
    network = DistributedDataParallel(torch.nn.Linear(4, 4), process_group=group)
    network(torch.zeros(2, 4)).sum().backward()
    time.sleep(0.005 * (torch.distributed.get_rank() == 0))  # the last one finds the work done at once
    last_barrier(group)
    torch.distributed.destroy_process_group(group)


for _ in range(200):
    train()
print("ended")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows has no gloo of its own")
def test_a_group_is_freed_without_a_deadlock(tmp_path):
    """With a plain barrier, gloo's threads and whoever frees the group wait for each other within 50 times."""
    (tmp_path / "barriers.py").write_text(_LAST_BARRIERS)
    process = _torchrun(tmp_path / "barriers.py")
    output = _output(process)
    assert process.returncode == 0 and output.count("ended") == 2, output


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows has no gloo of its own")
@pytest.mark.skipif(
    not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"), reason="accelerate is too old for FSDP 2"
)
def test_fsdp_goes_on_from_plain_data_parallelism_and_computes_the_same(two_processes, tmp_path):
    two, folder, script = two_processes / "train_unconditional", tmp_path / "run", tmp_path / "sharded.py"
    shutil.copytree(two, folder)
    shutil.rmtree(folder / "checkpoint-50")
    script.write_text(SHARDED)
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    process = _torchrun(script, *_halves(folder, *RESUME, "--optimizer", "muon"), environment=sharded)
    assert "it needs whole matrices, and FSDP shards them" in _output(process)
    process = _torchrun(script, *_halves(folder, *RESUME), environment=sharded)
    output = _output(process)
    assert process.returncode == 0, output
    for ours, theirs in zip(read_log(folder), read_log(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name in (
        f"unet/{WEIGHTS}",
        f"checkpoint-50/unet/{WEIGHTS}",
        "checkpoint-50/unet_optimizer/optimizer.safetensors",
    ):
        ours, theirs = load_file(folder / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)


def test_fewer_processes_than_asked_for_are_said(tmp_path, monkeypatch, capsys):
    """What accelerate's launcher leaves of `--cpu --num_processes 2` without MPI."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    def environment(*argv):
        args = launch_command_parser().parse_args([*argv, "--mixed_precision", "no", "script.py"])
        args.dynamo_backend, args.num_machines, args.num_cpu_threads_per_process = "no", 1, 1
        return prepare_simple_launcher_cmd_env(args)[1]

    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for count, said in (("1", False), ("2", True)):
        launched = environment("--cpu", "--num_processes", count)
        assert "WORLD_SIZE" not in launched and ("MASTER_PORT" in launched) == said
        if said:
            monkeypatch.setenv("MASTER_PORT", launched["MASTER_PORT"])
        setup_process(DiffusionArguments(output_dir=str(tmp_path), mixed_precision="no", num_threads=1))
        assert ("several processes were asked for, but 1 runs" in capsys.readouterr().err) == said


def test_threads_are_those_that_the_user_asked_for_and_not_the_one_of_a_launcher(monkeypatch):
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    args = launch_command_parser().parse_args(
        ["--cpu", "--num_processes", "1", "--mixed_precision", "no", "script.py"]
    )
    args.dynamo_backend, args.num_machines = "no", 1
    launcher, elastic = {}, {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "3"}
    for count in (1, 4):
        args.num_cpu_threads_per_process = count
        launcher[count] = prepare_simple_launcher_cmd_env(args)[1]
    monkeypatch.setattr(hardware, "physical_cores", lambda: 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: "torch's")  # which reads the variable when it is imported
    for environment, expected in (
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "3"}, 4),
        ({"OMP_NUM_THREADS": ""}, 12),
        ({"OMP_NUM_THREADS": "1"}, "torch's"),
        ({"OMP_NUM_THREADS": "8"}, "torch's"),
        (launcher[1], 12),
        (launcher[4], "torch's"),
        ({"OMP_NUM_THREADS": "1", **elastic}, 4),
        ({"OMP_NUM_THREADS": "8", **elastic}, "torch's"),
    ):
        monkeypatch.setattr(os, "environ", environment)
        assert hardware.default_num_threads() == expected, environment


def test_more_processes_than_gpus_are_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(hardware, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert hardware.setup_torch(1).type == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started on this machine, which has 1 of the device cuda"):
        hardware.setup_torch(1)


@pytest.mark.parametrize(
    ("environment", "argv", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "take FSDP"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"use_ema": False}, "--use_ema"),
    ],
)
def test_ways_of_sharding_that_do_not_work_are_refused(monkeypatch, environment, argv, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        setup_process(DiffusionArguments(mixed_precision="no", num_threads=1, **argv))


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configuration_files_of_the_docs_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 8 and config.mixed_precision == "bf16"


# -------------------------------------------------------------------------------------------------------- hostile input


def test_hostile_images_do_not_touch_the_result(tmp_path, whole, monkeypatch):
    from tiny_diffusers import data
    from tiny_diffusers.data import decoding

    monkeypatch.setattr(decoding, "_MAX_BROKEN_SHARE", 0.5)
    clean, hostile = tmp_path / "clean", tmp_path / "hostile"
    clean.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(clean / f"{i}.png")
    shutil.copytree(clean, hostile)
    (hostile / "0-empty.png").touch()
    (hostile / "0-truncated.png").write_bytes((clean / "0.png").read_bytes()[:60])
    (hostile / "0-postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    (hostile / "0-gone.png").symlink_to(tmp_path / "nowhere.png")

    loads = [
        data.load_images(train_data_dir=folder, cache_dir=tmp_path / "cache", resolution=8)
        for folder in (clean, hostile)
    ]
    assert loads[0].fingerprint == loads[1].fingerprint
    said = " ".join(loads[1].notes)
    assert all(name in said for name in ("0-empty.png", "0-truncated.png", "0-postscript.png"))


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("unet", {"block_out_channels": [8, 10**12]}),
        ("unet", {"block_out_channels": [2**16, 2**16]}),
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"sample_size": 10**8}),
        ("unet", {"in_channels": 10**10}),
        ("unet", {"block_out_channels": [8] * 10**5}),
        ("scheduler", {"num_train_timesteps": 10**13}),
    ],
)
@pytest.mark.parametrize("stock", [True, False])
def test_gigantic_sizes_in_a_config_are_refused_before_anything_is_allocated(tmp_path, component, changes, stock):
    _save_pipeline(tmp_path, stock)
    path = tmp_path / component / ("config.json" if component == "unet" else "scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError) as error:
        TinyPipeline.from_pretrained(tmp_path)
    assert next(iter(changes)) in str(error.value)


def test_the_parts_of_split_weights_cannot_lie_outside_the_folder(tmp_path):
    _save_pipeline(tmp_path / "model", stock=False)
    folder = tmp_path / "model" / "unet"
    shutil.move(folder / WEIGHTS, tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../outside.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside.safetensors"):
        TinyPipeline.from_pretrained(tmp_path / "model")


def _save_pipeline(folder, stock):
    from diffusers import UNet2DModel

    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    if stock:
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(**sizes, **blocks)
    else:
        unet = TinyUNet2DModel(**sizes, attention="none", mid_attention="none")
    TinyPipeline(unet, TinyDDIMScheduler()).save_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    ['{"a\\u0000b": {"size": 1, "sha256": ""}}', '{"/etc/passwd": {"size": 1, "sha256": ""}}', "[" * 100_000],
)
def test_a_hostile_manifest_is_damage(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    assert find_damage(tmp_path)


# -------------------------------------------------------------------------------------------------------------- numbers


def test_an_infinite_loss_is_skipped_though_its_gradient_is_finite(tmp_path, monkeypatch):
    losses = Diffusion.losses

    def infinite_once(self, modules, batch):
        for name, loss in losses(self, modules, batch):
            yield name, loss + (torch.inf if batch.draws.step == 3 else 0)

    monkeypatch.setattr(Diffusion, "losses", infinite_once)
    folder = _train(tmp_path / "run", "--logging_steps", "1")
    assert [line["step"] for line in read_log(folder) if "skipped" in line] == [4]
    assert all(np.isfinite(line["loss"]) for line in read_log(folder) if "loss" in line)


def test_a_validation_loss_that_is_no_number_is_never_the_best(tmp_path, monkeypatch):
    losses = iter([float("nan"), 2.0, float("inf"), 1.0])
    monkeypatch.setattr(Trainer, "_validate", lambda self: next(losses))
    folder = train(tmp_path / "run", "--validation_steps", "1", steps=4, flags=TINY, plots=True)
    assert json.loads((folder / "checkpoint-4" / "state.json").read_text())["best"] == {"step": 4, "val_loss": 1.0}


def test_samples_that_overflow_in_training_cost_no_run(tmp_path, monkeypatch, capsys):
    def overflows(self, pipeline, num_images, seed):
        raise ValueError("not finite")

    monkeypatch.setattr(Diffusion, "sample", overflows)
    folder = _train(tmp_path / "run", steps=1)
    assert (folder / "model_index.json").exists() and "no samples at step 1: not finite" in capsys.readouterr().err


def test_float16_that_overflows_in_sampling_is_caught_with_advice(tmp_path):
    unet = TinyUNet2DModel(
        8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention="none", mid_attention="none"
    )
    with torch.no_grad():
        unet.conv_out.weight.normal_().mul_(3e4)
    pipe = TinyPipeline(unet, TinyDDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pipe(num_inference_steps=2, generator=generator)
    with pytest.raises(ValueError, match="torch.float16.*float32 and bfloat16"):
        pipe.to(torch.float16)(num_inference_steps=2, generator=generator)


def test_a_finished_run_is_continued_from_its_end(tmp_path, capsys):
    _train(tmp_path / "run", "--checkpointing_steps", "100")
    assert [path.name for path in RunFolder(tmp_path / "run").list_checkpoints()] == ["checkpoint-6"]
    _train(tmp_path / "run", *RESUME, "--checkpointing_steps", "100", steps=8)
    assert "starts at step 0" not in capsys.readouterr().err
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" in line] == [3, 6, 8]


def test_a_run_is_not_resumed_past_its_end(run, capsys):
    before = {path: path.read_bytes() for path in run.glob("*.*") if path.is_file()}
    with pytest.raises(UserError, match="checkpoint-[46] is past the 2 steps of this run"):
        _train(run, *RESUME, steps=2)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_logged_learning_rate_is_that_of_the_step(whole):
    rates = [line["lr"] for line in read_log(whole) if "lr" in line]
    assert rates == pytest.approx([3e-3 * (1 + math.cos(math.pi * step / 7)) / 2 for step in (3, 6)])


@pytest.mark.parametrize(
    ("flag", "value", "key"), [("learning_rate", "1e-5", "lr"), ("adam_weight_decay", "0.5", "weight_decay")]
)
def test_a_resumed_run_uses_its_own_hyperparameters_and_says_so(run, capsys, flag, value, key):
    _train(run, *RESUME, f"--{flag}", value, "--lr_scheduler", "constant", steps=8)
    assert f"--{flag} is {float(value)}, but was" in capsys.readouterr().err
    groups = json.loads((run / "checkpoint-8" / "unet_optimizer" / "optimizer.json").read_text())["param_groups"]
    assert groups[0][key] == float(value)
    assert yaml.safe_load((run / "config.yaml").read_text())[flag] == float(value)
    if key == "lr":
        rates = {line["lr"] for line in read_log(run) if line["step"] > 4 and "lr" in line}
        assert rates == {float(value)}
