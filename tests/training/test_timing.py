"""What fits into --max_train_minutes, by a clock of the tests' own; and the sample grids on the way."""

import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from tiny_diffusers.errors import UserError
from tiny_diffusers.families.diffusion import Diffusion
from tiny_diffusers.training import outputs
from tiny_diffusers.training.timing import TimePlan, spell_minutes, typical_seconds
from tiny_diffusers.training.trainer import Trainer


QUICK = ("--checkpointing_steps", "1000", "--logging_steps", "1000", "--validation_split", "0")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for the seconds that a test gives to a step or to an image of a sample grid."""

    class Clock:
        now, step, image = 0.0, 0.0, 0.0
        steps = grids = 0

    clock, optimize, draw_grid = Clock(), Trainer._optimize, outputs.draw_grid

    def slow_step(trainer, step):
        clock.now += clock.step
        clock.steps += 1
        return optimize(trainer, step)

    def slow_grid(trainer, draw, num_images):
        share = 1 if draw == trainer.family.sample else trainer.family.preview_share
        clock.now += clock.image * num_images * share
        clock.grids += 1
        return draw_grid(trainer, draw, num_images)

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(Trainer, "_optimize", slow_step)
    monkeypatch.setattr(outputs, "draw_grid", slow_grid)
    return clock


def grids(folder):
    return [int(path.stem.removeprefix("step-")) for path in sorted((folder / "samples").glob("*.png"))]


def config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


class TestTimePlan:
    def test_steps_validations_and_grids_fill_what_is_left(self):
        plan = TimePlan(total=1000, step=1.0, validation=2.0, grid=3.0, last_grid=7.0)
        steps = plan.num_steps(elapsed=100, extra=lambda steps: 20 * 2 + 10 * 3)
        left = 1000 * 0.97 - 100 - 7 - 3  # a share to spare, the time until now, the last grid, saving
        assert 0 <= left - (steps + 20 * 2 + 10 * 3) < 0.02 * left

    def test_there_is_a_step_at_least(self):
        assert TimePlan(60, 1000.0, 0, 0, 0).num_steps(0, lambda steps: 0) == 1

    def test_a_few_seconds_that_are_left_over_are_not_worth_a_word(self):
        plan = TimePlan(total=100, step=1.0, validation=0, grid=0, last_grid=7.0)
        assert plan.unused(elapsed=40) == 100 - 40 - 7 - 3  # the last grid, and saving
        assert plan.unused(elapsed=75) == plan.unused(elapsed=200) == 0

    def test_one_step_that_another_process_slowed_down_says_nothing_about_the_others(self):
        for trial in ([3, 1], [3, 9], [3, 1, 9], [3, 9, 1], [3, 1, 9, 1], [3, 2, 1, 1, 9, 1], [3, 1, 1, 1, 1, 9]):
            assert typical_seconds(trial) == (3 if trial == [3, 9] else 1)
        assert typical_seconds([5]) == 5
        assert typical_seconds([4, 1, 2, 2, 2, 1]) == 2  # most steps

    def test_minutes_are_spelled_in_words(self):
        assert [spell_minutes(minutes) for minutes in (1.0, 0.5, 30)] == ["1 minute", "0.5 minutes", "30 minutes"]


class TestMinutes:
    def test_a_slow_step_is_tried_once_and_the_minutes_are_kept(self, train, clock, capsys):
        clock.step = 19.0
        folder = train("--max_train_minutes", "1", steps=None)
        assert clock.steps == 2 and clock.now <= 60  # one to measure, and one: two would leave no time to save
        out = capsys.readouterr().out
        assert out.index("measuring how many steps fit into 1 minute ...") < out.index("1 steps of 8")
        assert "1 minute from the start of the command to the saved model: 19 s until now, 19 s a step" in out
        assert config(folder)["max_train_steps"] == 1

    def test_faster_steps_fill_the_minutes(self, train, clock):
        clock.step = 3.0
        train(*QUICK, "--max_train_minutes", "1", steps=None)
        assert 0.9 * 60 <= clock.now <= 60

    def test_a_run_that_becomes_faster_says_what_is_left_of_its_minutes(self, train, clock, capsys):
        clock.step, train_step = 5.0, Trainer.train_step

        def faster(trainer):
            clock.step = 1.0
            train_step(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", faster)
            folder = train(*QUICK, "--max_train_minutes", "1", steps=None)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "less time than measured" in line)
        planned, left = config(folder)["max_train_steps"], (60 - clock.now - 3) / 60
        assert f"the {planned} planned steps ended after {clock.now / 60:.2g} of the 1 minute" in line
        assert f"--resume_from_checkpoint latest with another --max_train_minutes, such as {left:.2g}" in line

    @pytest.mark.parametrize(
        ("length", "remedy"),
        [
            (("--max_train_minutes", "1"), "--max_train_minutes 1 is used up, and other minutes add"),
            pytest.param(("--max_train_steps", "2"), "more --max_train_steps add some", marks=pytest.mark.slow),
            pytest.param(
                ("--num_epochs", "1", "--max_train_samples", "16"),
                "more --num_epochs add some",
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_a_resume_that_has_nothing_to_train_says_so(self, train, clock, capsys, length, remedy):
        clock.step = 19.0
        folder = train(*QUICK, *length, steps=None)
        assert "nothing is left" not in capsys.readouterr().out
        clock.steps = 0
        train(*QUICK, *length, "--resume_from_checkpoint", "latest", steps=None)
        steps = config(folder)["max_train_steps"]
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "nothing is left" in line)
        assert f"all of its {steps} steps: {remedy}" in line and clock.steps == 0

    def test_what_the_data_took_counts(self, train, clock, monkeypatch):
        from tiny_diffusers.train_scripts import train_unconditional

        load = train_unconditional.load_data

        def slow_load(*args):
            clock.now += 40
            return load(*args)

        monkeypatch.setattr(train_unconditional, "load_data", slow_load)
        clock.step = 1.0
        train(*QUICK, "--max_train_minutes", "1", steps=None)
        assert 50 <= clock.now <= 60

    def test_what_is_measured_before_a_save_counts(self, train, clock, monkeypatch):
        def slow_measure(family, networks, batches):
            measured.append(networks["unet"])
            clock.now += 2.0 * len(list(batches))

        measured: list[torch.nn.Module] = []
        monkeypatch.setattr(Diffusion, "measure", slow_measure)
        clock.step = 4.0
        train(*QUICK, "--max_train_minutes", "1", steps=None)  # 64 images, in 8 batches
        assert 50 <= clock.now <= 60
        *trials, saved = measured
        assert len(trials) == 2 and saved not in trials  # the trials are of copies
        clock.now = 0.0
        saving = train(*QUICK, "--max_train_minutes", "3", "--save_model_epochs", "1", steps=None, name="saving")
        assert clock.now <= 180 and config(saving)["max_train_steps"] >= 16  # saved twice, and at the end

    @pytest.mark.slow
    def test_grids_count_and_have_as_many_images_as_fit(self, clock, tmp_path):
        clock.step, clock.image = 5.0, 2.0
        flags = [flag for flag in tiny.TINY_RUN if flag not in ("--eval_batch_size", "4")]
        flags += [*tiny.TINY_NETWORK, "--train_batch_size", "4", "--ddpm_num_inference_steps", "2"]
        asked = tiny.train(
            tmp_path / "asked", "--max_train_minutes", "1", "--eval_batch_size", "2", steps=None, flags=flags
        )
        assert clock.now <= 60 and config(asked)["eval_batch_size"] == 2
        clock.now = 0.0
        fitting = tiny.train(tmp_path / "fitting", "--max_train_minutes", "1", steps=None, flags=flags)
        saved = config(fitting)
        assert clock.now <= 60 and saved["eval_batch_size"] == 1 and "eval_batch_size" in saved["resolved"]
        resume = ("--resume_from_checkpoint", "latest", "--max_train_minutes", "1")
        assert config(tiny.train(fitting, *resume, steps=None, flags=flags))["eval_batch_size"] == 1
        clock.now, clock.step, clock.image = 0.0, 20.0, 0.0
        fast = tiny.train(tmp_path / "fast", "--max_train_minutes", "1", steps=None, flags=flags)
        assert config(fast)["eval_batch_size"] == 64

    def test_a_run_that_becomes_slower_ends_soon_after_its_minutes_and_can_be_resumed(self, train, clock, capsys):
        clock.step = 5.0
        silent = ("--checkpointing_steps", "1000", "--logging_steps", "1000", "--validation_split", "0")
        train_step = Trainer.train_step

        def slower(trainer):
            clock.step = 15.0
            train_step(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", slower)
            folder = train(*silent, "--max_train_minutes", "1", steps=None)
        planned = config(folder)["max_train_steps"]
        assert 60 < clock.now <= 1.05 * 60 + 10 + 15
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "longer than measured" in line)
        assert (
            f"1 minute was too short for the {planned} planned steps" in line
            and "--resume_from_checkpoint latest" in line
        )
        assert (folder / WEIGHTS).is_file() and not (folder / f"checkpoint-{planned}").exists()
        assert (folder / "README.md").is_file() and not (folder / "loss_curves.png").exists()  # it has logged no loss

        train(*silent, "--resume_from_checkpoint", "latest", "--max_train_minutes", "1", steps=None)
        whole = train(*silent, steps=planned, name="whole")
        ours, theirs = load_file(folder / WEIGHTS), load_file(whole / WEIGHTS)
        assert all((ours[name] == theirs[name]).all() for name in theirs)

    def test_a_resume_with_other_minutes_adds_what_fits_into_them(self, train, clock):
        clock.step = 5.0
        folder = train(*QUICK, steps=4)
        clock.now = 0.0
        train(*QUICK, "--max_train_minutes", "1", "--resume_from_checkpoint", "latest", steps=None)
        assert clock.now <= 60 and config(folder)["max_train_steps"] > 8

    def test_other_minutes_measure_the_validation_anew_without_a_warning(self, train, clock, capsys, monkeypatch):
        clock.step, validate = 5.0, Trainer._validate

        def slow_validate(trainer, *args):
            clock.now += 2.0
            return validate(trainer, *args)

        minutes = ("--validation_split", "0.5", "--validation_steps", "1000", "--max_train_minutes")
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_validate", slow_validate)
            folder = train(*minutes, "1", steps=None)
        assert "max_validation_samples" in config(folder)["resolved"]
        resume = ("--resume_from_checkpoint", "latest")
        clock.now = 0.0
        train(*minutes, "1.5", *resume, steps=None)
        assert "warning" not in capsys.readouterr().err
        clock.now = 0.0
        train(*minutes, "2", *resume, "--max_validation_samples", "3", steps=None)
        assert "--max_validation_samples is 3" in capsys.readouterr().err


class TestGrids:
    def test_a_run_has_about_ten_the_first_of_them_early(self, train, clock, capsys):
        clock.step = 1.0
        folder = train(*QUICK, steps=50)
        assert grids(folder) == [1, 2, 5, 8, 13, 18, 25, 32, 41]  # the squares' shares, and the last in samples.png
        assert (folder / "training.gif").is_file()
        out = capsys.readouterr().out
        assert f"step 1: drawing the first samples, {folder / 'samples' / 'step-0000001.png'} ..." in out
        assert f"drawing the samples, {folder / 'samples.png'} ..." in out
        assert grids(train(*QUICK, steps=6, name="short")) == [2]

    @pytest.mark.parametrize(("steps", "expected"), [("4", [4, 8]), ("0", []), ("20", [])])
    def test_they_come_every_so_many_steps_if_asked_for(self, train, steps, expected):
        assert grids(train(*QUICK, "--save_images_steps", steps, steps=10)) == expected

    def test_steps_and_epochs_are_refused_together_and_replace_each_other_in_a_recipe(self, train, tmp_path):
        with pytest.raises(UserError, match="--save_images_epochs 1 --save_images_steps 2: give one"):
            train("--save_images_epochs", "1", "--save_images_steps", "2")
        (tmp_path / "recipe.yaml").write_text("save_images_epochs: 1\n")
        recipe = ("--config", str(tmp_path / "recipe.yaml"))
        assert grids(train(*QUICK, *recipe, "--save_images_steps", "5", steps=9)) == [5]

    @pytest.mark.slow
    def test_costly_grids_that_nobody_asked_for_take_a_small_share(self, train, clock):
        clock.step, clock.image = 2.0, 0.6  # 2.4 seconds a grid
        assert grids(train(*QUICK, steps=50)) == [1, 2, 41]  # five seconds, then a tenth of the time so far
        asked = train(*QUICK, "--save_images_steps", "2", steps=10, name="asked")
        assert grids(asked) == [2, 4, 6, 8]

    def test_those_on_the_way_take_fewer_sampling_steps_unless_steps_are_given(self):
        from tiny_diffusers.families.diffusion import DiffusionArguments
        from tiny_diffusers.training.arguments import parse_arguments

        def steps(*argv):
            arguments = parse_arguments(DiffusionArguments, list(argv))
            family = Diffusion(None, None, arguments.num_inference_steps, arguments.num_preview_steps)
            seen = []

            def pipeline(**options):
                seen.append(options["num_inference_steps"])
                return type("Output", (), {"images": []})

            family.preview(pipeline, 1, 0), family.sample(pipeline, 1, 0)
            return seen

        assert steps() == [10, 50]
        assert steps("--ddpm_num_inference_steps", "20") == [20, 20]
        assert steps("--ddpm_num_steps", "5") == [5, 5]
