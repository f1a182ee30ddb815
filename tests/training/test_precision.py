"""What `--mixed_precision auto` takes on a CPU, by measurements of the tests' own."""

import importlib
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training.test_reliability import _FAMILIES, _data, _output, _torchrun

from tiny import TINY_DIFFUSION
from tiny_diffusers import TinyUNet2DModel, hardware
from tiny_diffusers.families.diffusion import DiffusionArguments
from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training import precision
from tiny_diffusers.training.trainer import Trainer


AUTO = ("--mixed_precision", "auto", "--save_images_epochs", "0")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FAST, SLOW = {"bfloat16": 40.0, "float32": 10.0}, {"bfloat16": 9.0, "float32": 10.0}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """
    A CPU with bfloat16 on which six steps are a long run: a list of the measurements, each of which takes a pass of either
    dtype and returns `measured.speeds`.
    """

    if hardware.default_device().type != "cpu":
        pytest.skip("speeds are measured on CPUs alone")

    class Measured(list):
        speeds = SLOW

    def measure_speeds(take_pass, batch_size):
        for dtype in ("float32", "bfloat16"):
            take_pass(dtype, 1)
        measured.append(batch_size)
        return measured.speeds

    measured = Measured()
    monkeypatch.setattr(hardware, "default_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(precision, "measure_speeds", measure_speeds)
    monkeypatch.setattr(precision, "MIN_STEPS", 6)
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)  # which has the precision of the tests before
    yield measured
    AcceleratorState._reset_state(reset_partial_state=True)


def config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text().replace(": no\n", ": 'no'\n"))


def assert_equal(one, other):
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestMeasurement:
    @pytest.fixture
    def passes(self, monkeypatch):
        """Makes passes of an exactly linear time on a clock of its own; they are recorded."""
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

        def make(**seconds):
            def take_pass(dtype, count):
                constant, each = seconds[dtype]
                cold = 0.05 if (dtype, count) not in taken else 0.0
                taken.append((dtype, count))
                clock.now += constant + each * count + cold

            taken = []
            return take_pass, taken, clock

        return make

    @pytest.mark.parametrize(
        ("float32", "bfloat16"),
        [((0.02, 0.001), (0.03, 0.0005)), ((0.09, 0.04), (0.17, 0.02)), ((0.2, 0.3), (0.3, 0.1))],
    )
    def test_speeds_are_those_of_a_batch_where_fewer_images_are_timed(self, passes, float32, bfloat16):
        take_pass, taken, clock = passes(float32=float32, bfloat16=bfloat16)
        speeds = precision.measure_speeds(take_pass, 32)
        # A first pass of each kind takes longer by the same, which their difference leaves out
        expected = {"float32": 32 / (float32[0] + 32 * float32[1]), "bfloat16": 32 / (bfloat16[0] + 32 * bfloat16[1])}
        assert speeds == pytest.approx(expected, rel=0.02)
        assert clock.now < 4
        assert {count for _, count in taken} <= {1, 4, 16, 32}

    def test_the_dtypes_take_turns(self, passes):
        take_pass, taken, clock = passes(float32=(0.05, 0.01), bfloat16=(0.05, 0.01))
        precision.measure_speeds(take_pass, 4)
        assert taken[4:8] == [("bfloat16", 1), ("float32", 1), ("bfloat16", 4), ("float32", 4)]
        assert 1.5 <= clock.now < 2

    def test_a_batch_of_one_image_is_timed_as_it_is(self, passes):
        take_pass, taken, _ = passes(float32=(0.05, 0.05), bfloat16=(0.1, 0.1))
        assert precision.measure_speeds(take_pass, 1) == pytest.approx({"float32": 10, "bfloat16": 5})

    @pytest.mark.parametrize(("bfloat16", "expected"), [(10.0, "no"), (10.9, "no"), (11.1, "bf16"), (40.0, "bf16")])
    def test_bfloat16_must_gain_a_tenth(self, bfloat16, expected):
        assert precision.faster_precision({"bfloat16": bfloat16, "float32": 10.0}) == expected

    @pytest.mark.parametrize(
        ("length", "expected"),
        [
            ({"max_train_steps": 200}, True),
            ({"max_train_steps": 199}, False),
            ({"max_train_steps": 199, "max_train_minutes": 60.0}, False),  # steps win
            ({"max_train_minutes": 1.0}, True),
            ({"max_train_minutes": 0.9}, False),
            ({"num_epochs": 10}, True),
            ({"num_epochs": 9}, False),
        ],
    )
    def test_only_a_long_run_is_worth_it(self, length, expected):
        assert precision.is_worth_measuring(DiffusionArguments(**length), steps_per_epoch=20.0) == expected


class TestCache:
    def file(self, folder, batch=4, **options):
        unet = TinyUNet2DModel(
            sample_size=8, block_out_channels=(8,), norm_num_groups=4, attention=("none",), **options
        )
        return precision.cache_file(folder, {"unet": unet}, batch=[batch, 3, 8, 8])

    def test_what_was_written_is_read(self, tmp_path):
        file = self.file(tmp_path)
        assert precision.read_speeds(file) is None
        precision.write_speeds(file, FAST)
        assert precision.read_speeds(file) == FAST and file.is_relative_to(tmp_path)

    def test_processor_threads_torch_network_and_batch_count(self, tmp_path, monkeypatch):
        file = self.file(tmp_path)
        assert file == self.file(tmp_path)
        others = [self.file(tmp_path, batch=8), self.file(tmp_path, layers_per_block=1)]
        for owner, name, value in (
            (precision, "processor_name", lambda: "another"),
            (torch, "get_num_threads", lambda: 77),
            (torch, "__version__", "99"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, value)
                others.append(self.file(tmp_path))
        assert len({file, *others}) == 6

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "3", '{"float32": 1}', '{"float32": 1, "bfloat16": "x"}', '{"float32": 1, "bfloat16": NaN}']
        + ['{"float32": 0, "bfloat16": 1}', '{"float32": 1, "bfloat16": 1' + "0" * 400 + "}", "\x00\ud7ff"],
    )
    def test_a_damaged_file_is_no_measurement(self, tmp_path, text):
        (tmp_path / "speeds.json").write_bytes(text.encode("utf-16"))
        assert precision.read_speeds(tmp_path / "speeds.json") is None
        (tmp_path / "speeds.json").write_text(text, encoding="utf-8")
        assert precision.read_speeds(tmp_path / "speeds.json") is None

    def test_a_cache_that_cannot_be_written_is_left_alone(self, tmp_path):
        (tmp_path / "cache").write_text("a file")
        precision.write_speeds(tmp_path / "cache" / "speeds" / "a.json", FAST)
        assert (tmp_path / "cache").read_text() == "a file"


class TestRun:
    def test_it_takes_the_faster_and_leaves_no_trace_of_the_measurement(self, train, measured, tmp_path, capsys):
        folder = train(*AUTO, "--dropout", "0.1")
        assert measured == [8] and config(folder)["mixed_precision"] == "no"
        assert "mixed_precision" in config(folder)["resolved"]
        out = capsys.readouterr().out
        assert "--mixed_precision auto takes no: about 9 images/s in bfloat16 and 10 in float32 (measured in" in out
        assert "mixed precision no" in out
        assert_equal(folder, train(*AUTO, "--dropout", "0.1", name="cached"))
        assert measured == [8] and "float32 (read from" in capsys.readouterr().out  # the cache was read
        AcceleratorState._reset_state(reset_partial_state=True)
        assert_equal(folder, train(*AUTO, "--mixed_precision", "no", "--dropout", "0.1", name="float32"))

    def test_a_faster_bfloat16_is_taken(self, train, measured):
        measured.speeds = FAST
        folder = train(*AUTO)
        assert config(folder)["mixed_precision"] == "bf16"
        assert_equal(folder, train(*AUTO, "--mixed_precision", "bf16", name="given"))
        assert measured == [8]

    def test_a_damaged_cache_is_measured_again_and_one_that_cannot_be_written_stops_nothing(
        self, train, measured, tmp_path
    ):
        train(*AUTO)
        (file,) = (tmp_path / "cache" / "speeds").iterdir()
        file.write_text("{")
        train(*AUTO, name="again")
        assert measured == [8, 8] and json.loads(file.read_text()) == SLOW
        os.rename(tmp_path / "cache", tmp_path / "old")
        (tmp_path / "cache").write_text("a file")
        assert config(train(*AUTO, name="third"))["mixed_precision"] == "no" and len(measured) == 3

    def test_a_resumed_run_takes_what_it_took(self, train, train_in_two, measured, tmp_path):
        step = Trainer.train_step
        whole = train(*AUTO, name="whole")
        for file in (tmp_path / "cache" / "speeds").iterdir():
            file.unlink()
        taken = []

        def recorded(trainer):
            taken.append(trainer.settings.mixed_precision)
            if len(taken) == 3:
                measured.speeds = FAST  # which a measurement after the stop would return
                for file in (tmp_path / "cache" / "speeds").iterdir():
                    file.unlink()
            step(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", recorded)
            resumed = train_in_two(*AUTO, stopped_at=3)
        assert taken == ["no"] * 6 and measured == [8, 8]
        assert_equal(whole, resumed)
        assert (whole / "train_log.jsonl").read_bytes() == (resumed / "train_log.jsonl").read_bytes()

    def test_a_run_from_its_config_takes_what_it_took(self, train, measured):
        folder = train(*AUTO)
        flags = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder.parent / "again")]
        measured.speeds = FAST
        (file,) = (folder.parent / "cache" / "speeds").iterdir()
        file.unlink()
        AcceleratorState._reset_state(reset_partial_state=True)
        train_unconditional.main(flags)
        assert measured == [8] and config(folder.parent / "again")["mixed_precision"] == "no"

    @pytest.mark.parametrize(
        ("argv", "dtype", "expected"),
        [
            (("--max_train_steps", "5"), torch.bfloat16, "bf16"),  # a short run
            (("--mixed_precision", "bf16"), torch.bfloat16, "bf16"),
            (("--mixed_precision", "no"), torch.float32, "no"),
            ((), torch.float32, "no"),  # a processor without bfloat16
        ],
    )
    def test_nothing_else_is_measured(self, train, measured, monkeypatch, argv, dtype, expected):
        monkeypatch.setattr(hardware, "default_dtype", lambda device: dtype)
        trainers = []
        monkeypatch.setattr(Trainer, "run", lambda trainer: trainers.append(trainer))
        train(*AUTO, *argv)
        assert trainers[0].settings.mixed_precision == expected and not measured

    @pytest.mark.parametrize("device", ["cuda", "xpu"])
    def test_nothing_is_measured_on_an_accelerator(self, device, measured):
        settings = DiffusionArguments(max_train_steps=1000)
        accelerator = SimpleNamespace(mixed_precision="bf16")
        trainer = SimpleNamespace(settings=settings, accelerator=accelerator, device=torch.device(device))
        assert Trainer._choose_precision(trainer, sharded=False) == "bf16" and not measured

    @pytest.mark.parametrize("name", [name for name in _FAMILIES if name != "latents"])  # whose network is no other
    def test_every_family_is_measured_and_left_as_it_was(self, name, measured, tmp_path, monkeypatch):
        """The networks' weights and buffers, and that no gradient stays."""
        trainers, measure = [], Trainer._measure_speeds

        def checked(trainer):
            modules = trainer.family.modules.values()
            before = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
            speeds = measure(trainer)
            for module, state in zip(modules, before, strict=True):
                assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
                assert all(p.grad is None and p.requires_grad for p in module.parameters())
            return speeds

        monkeypatch.setattr(Trainer, "_measure_speeds", checked)
        monkeypatch.setattr(Trainer, "run", lambda trainer: trainers.append(trainer))
        flags = (*_FAMILIES[name], *_data(name, tmp_path), "--max_train_samples", "64", "--max_train_steps", "6")
        module = importlib.import_module(f"tiny_diffusers.train_scripts.{name}")
        module.main([*flags, "--num_threads", "1", "--train_batch_size", "4", "--output_dir", str(tmp_path / "run")])
        assert measured == [4] and trainers[0].settings.mixed_precision == "no"


_APART = """
import os, sys
import torch
from tiny_diffusers import hardware
from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training import precision
from tiny_diffusers.training.trainer import Trainer

rank = int(os.environ["RANK"])
os.environ["TINY_DIFFUSERS_CACHE"] = f"{sys.argv[1]}/cache-{rank}"  # as on two machines
hardware.default_dtype = lambda device: torch.bfloat16
precision.MIN_STEPS = 6
measured = []

def measure_speeds(take_pass, batch_size):
    measured.append(batch_size)
    take_pass("bfloat16", 1)
    return {"bfloat16": 9.0 if rank == 0 else 90.0, "float32": 10.0}

def run(trainer):
    Trainer.prepare(trainer)
    trainer.train_step()
    with open(f"{sys.argv[1]}/{trainer.settings.mixed_precision}-{len(measured)}-{rank}", "w"):
        pass
    trainer.accelerator.wait_for_everyone()

torch.distributed.destroy_process_group = lambda group=None: None  # the second run takes it over
precision.measure_speeds, Trainer.run = measure_speeds, run
train_unconditional.main(sys.argv[2:])
train_unconditional.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows has no gloo of its own")
def test_two_processes_take_what_the_first_measures_and_caches(tmp_path):
    (tmp_path / "apart.py").write_text(_APART)
    flags = [*TINY_DIFFUSION, *AUTO, "--max_train_steps", "6", "--output_dir", str(tmp_path / "run")]
    process = _torchrun(tmp_path / "apart.py", str(tmp_path), *flags)
    output = _output(process)
    assert process.returncode == 0, output
    assert {path.name for path in tmp_path.glob("no-*")} == {"no-1-0", "no-1-1"}, output
    assert not list(tmp_path.glob("bf16-*")) and len(list(tmp_path.glob("cache-*/speeds/*"))) == 1
    assert output.count("--mixed_precision auto takes no") == 2 and output.count("(read from") == 1
