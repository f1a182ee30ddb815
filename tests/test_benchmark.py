"""The benchmark measures what it says: the rows, the ratios and the contenders are facts, the figures are the machine's."""

import functools
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tiny_diffusers import TinyDDIMScheduler, TinyPipeline, benchmark, cli, hardware
from tiny_diffusers.benchmark import Row, Settings, in_turns, measure
from tiny_diffusers.data import ImageData, load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.training import trainer


path = Path(__file__).parent / "benchmarks" / "benchmark_details.py"
spec = importlib.util.spec_from_file_location(path.stem, path)
details = importlib.util.module_from_spec(spec)
sys.modules[path.stem] = details  # where dataclasses look for it
spec.loader.exec_module(details)

TINY = details.DetailSettings(
    resolution=8,
    block_out_channels=[32, 32],  # stock norms have 32 groups
    layers_per_block=1,
    batch_size=2,
    sampling_steps=2,
    rounds=1,
    num_threads=1,
)


@pytest.fixture(autouse=True)
def short_and_alone(monkeypatch):
    """Rounds of one step in this very process, and no state of accelerate's from or for other tests."""
    monkeypatch.setattr(benchmark, "_MEASURED_SECONDS", 0)
    monkeypatch.setattr(details, "_BATCHES_DRAWN", 1)
    monkeypatch.setattr(benchmark, "process", lambda: ThreadPoolExecutor(1))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_images_and_both_networks_may_be_rectangles():
    settings = replace(TINY, resolution="8x12")
    assert benchmark.noise_images(settings, 2, channels=3).images.shape == (2, 3, 8, 12)
    assert benchmark.stock_unet(settings).config.sample_size == (8, 12)


class TestRow:
    row = Row(
        "speed", "images/s", {"ours": [8.0, 9.0, 40.0], "theirs": [2.0, 3.0, 5.0]}, [("ours", "theirs")], ["a note"]
    )

    def test_a_ratio_is_that_of_each_round_and_their_median_is_given(self):
        assert self.row.ratios() == {"ours / theirs": [4.0, 3.0, 8.0]}
        summary = self.row.as_dict()["ratios"]["ours / theirs"]
        assert summary == {"median": 4.0, "lowest": 3.0, "highest": 8.0, "values": [4.0, 3.0, 8.0]}

    def test_table(self):
        assert self.row.markdown().splitlines() == [
            "| speed, images/s | ours | 9.00 | 8.00 | 40.0 |",
            "| speed, images/s | theirs | 3.00 | 2.00 | 5.00 |",
            "| speed, images/s | ours / theirs | 4.00x | 3.00x | 8.00x |",
            "| speed, images/s | a note |  |  |  |",
        ]

    @pytest.mark.parametrize(
        ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (56.78, "56.8"), (4321.0, "4321")]
    )
    def test_three_digits(self, value, text):
        assert benchmark._round(value) == text


def test_contenders_take_turns():
    order = []
    figures = in_turns({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, rounds=3)
    assert order == ["a", "b"] * 3
    assert figures == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_a_contender_ends_with_its_stack():
    with ExitStack() as stack:
        contender = benchmark.Contender(stack, benchmark._stock_steps, TINY, "float32")
        assert contender.facts["parameters"] > 0
        assert contender.seconds() > 0
        assert len(benchmark._prepared) == 1
    assert not benchmark._prepared


def test_unknown_row():
    with pytest.raises(UserError, match="Unknown row 'smapling'.*Did you mean 'sampling'"):
        next(measure(TINY, ["training", "smapling"]))


def test_one_level_cannot_be_compared():
    with pytest.raises(UserError, match="two levels or more"):
        Settings(block_out_channels=(32,))


def test_contenders_have_as_many_parameters():
    settings = Settings(batch_size=1, num_threads=1)
    stock = sum(parameter.numel() for parameter in benchmark.stock_unet(settings).parameters())
    with benchmark.tiny_trainer(settings, **benchmark.compared_settings(settings)) as trainer:
        tiny = sum(parameter.numel() for parameter in trainer.family.modules["unet"].parameters())
    assert abs(tiny / stock - 1) < 0.05


def test_training_steps_the_trainer():
    with benchmark.tiny_trainer(TINY, **benchmark.compared_settings(TINY)) as trainer:
        before = [parameter.clone() for parameter in trainer.modules["unet"].parameters()]
        trainer.train_step()
        trainer.train_step()  # the learning rate of the first is 0
        assert trainer.step == 2
        assert any((a != b).any() for a, b in zip(before, trainer.modules["unet"].parameters(), strict=True))


def test_ours_computes_in_the_format_that_is_asked_for():
    settings = replace(TINY, dtype="float32")
    with benchmark.tiny_trainer(settings, **benchmark.compared_settings(settings)) as trainer:
        assert trainer.accelerator.mixed_precision == "no"
    training, _ = measure(settings, ["training"])
    assert list(training.figures) == ["TinyUNet2DModel, float32", "UNet2DModel, float32"]


def test_stock_training_steps():
    stock = benchmark.StockTraining(TINY, torch.float32)
    before = [parameter.clone() for parameter in stock.unet.parameters()]
    stock()
    assert any((a != b).any() for a, b in zip(before, stock.unet.parameters(), strict=True))
    assert stock.ema.optimization_step == 1


def test_peak_memory_is_at_least_what_was_held():
    before = benchmark.peak_resident_bytes()
    held = torch.ones(before // 4)  # as much as the peak before, and so more than it with what else is held
    most = benchmark.peak_resident_bytes()
    assert most > max(before, held.nbytes)
    del held
    assert benchmark.peak_resident_bytes() >= most


def test_evaluation_compares_one_network():
    pytest.importorskip("efficientnet_lite_pytorch")
    from tiny_diffusers.evaluation import features

    images = benchmark.noise_images(TINY, 2, channels=3).images
    ours = features.load("efficientnet-lite0")
    stock = details.stock_feature_network(ours.device)
    torch.testing.assert_close(ours(images), stock(images), atol=1e-4, rtol=1e-3)


def run(tmp_path, *arguments, main=cli.main, command=("benchmark",)):
    output = tmp_path / "benchmark.json"
    size = ["--resolution", 8, "--block_out_channels", 32, 32, "--layers_per_block", 1, "--batch_size", 2]
    arguments = [*command, *arguments, *size, "--sampling_steps", 2, "--rounds", 1, "--num_threads", 1]
    assert not main([str(argument) for argument in [*arguments, "--output", output]])
    return json.loads(output.read_text())


def run_details(tmp_path, *arguments):
    return run(tmp_path, *arguments, main=details.main, command=())


def check_figures(rows):
    for row in rows:
        assert row.get("skipped") or all(
            len(figure["values"]) == 1 and figure["lowest"] == figure["median"] == figure["highest"] > 0
            for figure in [*row["figures"].values(), *row["ratios"].values()]
        )


def kinds(rows):
    return [row["what"].split(",")[0].split(":")[0] for row in rows]


def test_command(tmp_path, capsys):
    result = run(tmp_path, "--rows", "training", "sampling")
    facts = {"processor", "physical_cores", "threads", "device", "dtype", "torch", "diffusers"}
    assert result["machine"].keys() >= facts
    assert result["settings"]["block_out_channels"] == [32, 32]
    rows = result["rows"]
    assert kinds(rows) == ["training", "a convolution of it alone", "sampling"]
    check_figures(rows)
    training = rows[0]
    assert all(name.startswith("TinyUNet2DModel") and "/ UNet2DModel" in name for name in training["ratios"])
    table = capsys.readouterr().out
    assert benchmark.HEADER in table
    assert all(row["what"] in table for row in rows)


def test_command_of_the_details(tmp_path, monkeypatch):
    monkeypatch.setattr(details, "DATA_SHAPES", {"a shape": (4, 1, 8)})
    rows = run_details(tmp_path, "--rows", "data", "evaluation")["rows"]
    assert kinds(rows) == ["waiting for images", "evaluation"]
    check_figures(rows)


def test_a_missing_extra_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    (row,) = run_details(tmp_path, "--rows", "evaluation")["rows"]
    assert row["what"] == "evaluation"
    assert "pip install 'tiny-diffusers[eval]'" in row["skipped"]
    assert "| evaluation | skipped: " in capsys.readouterr().out


@pytest.mark.slow
def test_quality_compares_few_evaluations_with_all_steps(tmp_path, monkeypatch, tiny_unet):
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(details, "_FEW_STEPS", 2)
    monkeypatch.setattr(details, "_MANY_STEPS", 4)
    monkeypatch.setattr(details, "_QUALITY_IMAGES", 8)
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    TinyPipeline(tiny_unet("none"), TinyDDIMScheduler()).save_pretrained(tmp_path / "model")
    digits = load_images("digits")
    reference = ImageData(digits.images[:16], None, None, "digits", "test", "")
    monkeypatch.setattr(details, "load_images", lambda *args, **kwargs: reference)
    settings = replace(TINY, checkpoint=str(tmp_path / "model"), dataset_name="digits")
    (row,) = measure(settings, ["quality"], details.ROWS)
    assert list(row.figures) == [
        "DPMSolverMultistepScheduler, sde-dpmsolver++, 2 steps",
        "DPMSolverMultistepScheduler, 2 steps",
        "TinyDDPMScheduler, 4 steps",
    ]
    assert [ratio > 0 for (ratio,) in row.ratios().values()] == [True, True]
    assert all("jackknife" in note for note in row.notes)


def test_quality_needs_a_model_and_its_images(tmp_path):
    (row,) = run_details(tmp_path, "--rows", "quality")["rows"]
    assert "--checkpoint" in row["skipped"] and "--dataset_name" in row["skipped"]


def test_no_compiler_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "compile_failure", lambda device: "no g++")
    (row,) = run_details(tmp_path, "--rows", "compile")["rows"]
    assert row == {"what": "compile", "skipped": "nothing can be compiled here (no g++)"}


@pytest.mark.slow
def test_the_compiled_row_has_the_first_steps_time(monkeypatch, tmp_path):
    compile_ = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, **kwargs))
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # the row sets it: as it was for the tests that follow
    monkeypatch.setattr(hardware, "compile_failure", lambda device: None)
    monkeypatch.setattr(trainer, "compile_failure", lambda device: None)
    (row,) = measure(TINY, ["compile"], details.ROWS)
    assert list(row.ratios()) == ["TinyUNet2DModel, blocks compiled / TinyUNet2DModel"]
    assert row.notes[0].startswith("first step, compiling included: ")
    torch._dynamo.reset()


def test_optimizer():
    rows = list(measure(TINY, ["optimizer"], details.ROWS))
    assert [list(row.figures) for row in rows] == [["muon", "adamw"]] * 2
    assert all(part[0] > 0 for row in rows for part in row.figures.values())


def test_networks():
    (row,) = measure(TINY, ["networks"], details.ROWS)
    assert list(row.figures) == ["transformer", "unet"] and list(row.ratios()) == ["transformer / unet"]
    assert "parameters: transformer " in row.notes[0]


@pytest.mark.slow
def test_scaling(monkeypatch):
    monkeypatch.setattr(details, "_SIDES", (8, 16))
    monkeypatch.setattr(details, "_BATCH_SIZES", (1, 2))
    rows = list(measure(TINY, ["scaling"], details.ROWS))
    assert [list(row.figures) for row in rows[::2]] == [
        ["8x8", "16x16"],
        ["batch 1", "batch 2"],
        ["widths 16, 16", "widths 32, 32", "widths 64, 64"],
    ]
    assert [row.figures.keys() for row in rows[::2]] == [row.figures.keys() for row in rows[1::2]]


def test_a_size_that_no_network_can_have_is_an_error(tmp_path, capsys):
    arguments = ["benchmark", "--rows", "memory", "--resolution", "9", "--rounds", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path / "benchmark.json")]) == 2
    assert "--resolution 9 is not possible with 3 levels" in capsys.readouterr().err


def test_help_names_the_rows(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["benchmark", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(benchmark.ROWS) in text
    assert all(name in details.ROWS for name in details.DEFAULT_ROWS)
