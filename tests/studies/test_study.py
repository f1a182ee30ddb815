"""A study: what is asked, who works on what, what is told from the results, and what is left."""

import base64
import io
import json
import threading

import filelock
import pytest
import yaml
from PIL import Image

from tiny_diffusers.errors import UserError
from tiny_diffusers.studies import budget, pictures
from tiny_diffusers.studies import study as studies
from tiny_diffusers.studies.cells import plan_study
from tiny_diffusers.studies.results import Sampler, Value, find_winner, value_of
from tiny_diffusers.training.arguments import load_cells
from tiny_diffusers.training.recipes import find_recipe, shipped_recipes


RECIPE = {
    "dataset_name": "digits",
    "max_train_steps": 4,
    "cells": [
        {"name": "linear", "ddpm_beta_schedule": "linear"},
        {"name": "cosine", "ddpm_beta_schedule": "cosine"},
    ],
    "study": {"seeds": [0, 1], "num_inference_steps": [2, 4], "features": "pixels", "num_images": 20},
}


@pytest.fixture
def plan(tmp_path):
    """Plans a study of RECIPE with changes; a value of None removes a key."""

    def build(given=None, train_flags=(), name="unconditional_x.yaml", **changes):
        recipe = {key: value for key, value in (RECIPE | changes).items() if value is not None}
        (tmp_path / name).write_text(yaml.safe_dump(recipe))
        return plan_study(tmp_path / name, given or {}, list(train_flags), str(tmp_path / "study"))

    return build


@pytest.fixture
def work(monkeypatch):
    """Replaces training and measuring; returns the list of the runs that were trained and of those measured."""
    done = {"trained": [], "measured": []}

    def train(run, script):
        done["trained"].append(run.name)

    def measure(run, study):
        done["measured"].append(run.name)
        return measured(len(run.cell), run.seed)

    monkeypatch.setattr(studies, "_train", train)
    monkeypatch.setattr(studies, "_measure", measure)
    monkeypatch.setattr(studies, "draw", lambda content, folder: {})  # which takes most of the time
    return done


def measured(value, seed):
    """Returns what is measured of a run whose metric is `value`, and a tenth more for the next seed."""
    figure = {"value": value + seed / 10, "error": 0.5, "error_kind": "standard error over images"}
    figures, file = {"frechet_distance": figure, "recall": figure}, io.BytesIO()
    Image.new("L", (9, 9)).save(file, format="PNG")
    return {
        "parameters": 1000 * value,
        "seconds": 10.0 * value,
        "steps": 4,
        "val_loss": [[2, 1.0], [4, 0.5]],
        "measured": [
            {"scheduler": None, "num_inference_steps": steps, "sampling": "", "figures": figures} for steps in (2, 4)
        ],
        "baselines": {"real": {"frechet_distance": figure | {"value": 1.5, "error": None}}},
        "against": "20 images against 100 of digits",
        "warnings": ["few images"],
        "samples": base64.b64encode(file.getvalue()).decode(),
    }


class TestWhatIsAsked:
    def test_all_cells_with_the_first_seed_then_with_the_next(self, plan):
        runs = plan().runs({})
        assert [(run.cell, run.seed) for run in runs] == [(c, s) for s in (0, 1) for c in ("linear", "cosine")]
        assert runs[1].flags["cell"] == "cosine"
        assert runs[0].folder.path.parts[-2:] == ("linear", "seed-0")

    def test_flags_win_over_the_section_and_the_protocol_is_in_it(self, plan):
        study = plan({"seeds": [3], "cells": ["cosine"], "num_images": 30})
        assert [(run.cell, run.seed) for run in study.runs({})] == [("cosine", 3)]
        assert (study.protocol.num_images, study.protocol.features) == (30, "pixels")

    def test_minutes_replace_the_recipes_steps_but_not_those_that_are_set(self, plan):
        study = plan({"max_train_minutes": 2.0})
        assert study.parse(study.runs({})[0].flags).max_train_steps is None
        study = plan({"max_train_minutes": 2.0}, ["--max_train_steps", "7"])
        assert study.parse(study.runs({})[0].flags).max_train_steps == 7

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"cells": None}, ["no grid", "cells:"]),
            ({"study": None}, ["no section 'study:'"]),
            ({"study": {"num_image": 3}}, ["num_image", "num_images"]),
            ({"study": {"seeds": {"a": 1}}}, ["seeds", "list of values"]),
            ({"study": {"seeds": "many"}}, ["seeds"]),
            ({"study": {"cells": ["cosin"]}}, ["cosin", "Did you mean 'cosine'"]),
            ({"study": {"metrics": ["fid"]}}, ["fid", "frechet_distance"]),
            ({"study": {"main_metric": "recall", "metrics": ["kernel_distance"]}}, ["recall", "--metrics"]),
            ({"study": {"guidance_scale": 2}}, ["guidance_scale", "train_unconditional.py"]),
            ({"study": {"main_metric": "class_agreement"}}, ["class_agreement", "no classes"]),
            ({"study": {"max_train_minutes": 1, "budget": 1}}, ["max_train_minutes", "budget"]),
            ({"cells": [{"name": "a/b"}]}, ["a/b", "folder"]),
            ({"name": "x.yaml"}, ["x.yaml", "which script"]),
            ({"name": "dcgan_x.yaml", "study": {"metrics": ["bits_per_dim"]}}, ["bits_per_dim", "DCGAN"]),
            ({"name": "vae_x.yaml", "study": {"num_inference_steps": [2]}}, ["num_inference_steps", "train_vae.py"]),
            ({"train_flags": ["--seed", "1"]}, ["--seed", "--set"]),
            ({"train_flags": ["--dataset_nam", "x"]}, ["--dataset_nam", "--dataset_name"]),
        ],
    )
    def test_mistakes_are_one_line(self, plan, changes, words):
        with pytest.raises(UserError) as error:
            plan(**changes)
        for word in words:
            assert word in str(error.value)

    def test_a_cell_that_its_script_does_not_take_is_refused_before_anything_is_trained(self, plan, work):
        with pytest.raises(UserError, match="ddpm_beta_schedul"):
            studies.run_study(plan(cells=[{"name": "a", "ddpm_beta_schedul": "linear"}]))
        assert not work["trained"]


class TestTheWork:
    def test_each_run_is_trained_and_measured_once(self, plan, work):
        for _ in range(2):
            studies.run_study(plan())
        assert work["trained"] == work["measured"] and len(set(work["trained"])) == len(work["trained"]) == 4

    def test_more_cells_and_seeds_join_the_study(self, plan, work):
        studies.run_study(plan({"cells": ["linear"], "seeds": [0]}))
        folder = studies.run_study(plan())
        assert len(work["trained"]) == 4
        rows = json.loads((folder / "study.json").read_text())["rows"]
        assert [(row["cell"], row["seed"]) for row in rows] == [(c, s) for c in ("linear", "cosine") for s in (0, 1)]

    def test_a_run_that_fails_is_a_row_and_the_study_goes_on(self, plan, work, monkeypatch):
        def train(run, script):
            if run.cell == "linear":
                raise studies._Failure("the loss was not finite")

        monkeypatch.setattr(studies, "_train", train)
        folder = studies.run_study(plan())
        assert [row["state"] for row in json.loads((folder / "study.json").read_text())["rows"]] == [
            *("failed", "failed"),
            *("measured", "measured"),
        ]
        assert "linear, seed 0, **failed**: the loss was not finite" in (folder / "README.md").read_text()

    def test_if_all_fail_the_command_fails(self, plan, work, monkeypatch):
        def train(run, script):
            raise studies._Failure("no such dataset")

        monkeypatch.setattr(studies, "_train", train)
        with pytest.raises(UserError, match="no such dataset"):
            studies.run_study(plan())

    def test_a_run_that_was_trained_before_a_kill_is_only_measured(self, plan, work):
        run = plan().runs({})[0]
        run.write({"cell": run.cell, "seed": run.seed, "data": run.data, "changes": {}, "state": "trained"})
        studies.run_study(plan())
        assert run.name not in work["trained"] and run.name in work["measured"]

    def test_a_run_of_another_process_is_left_to_it_and_waited_for(self, plan, work, monkeypatch):
        monkeypatch.setattr(studies, "_POLL_SECONDS", 0.01)
        run = plan().runs({})[0]
        run.lock.parent.mkdir(parents=True)
        other = filelock.FileLock(run.lock, thread_local=False)
        other.acquire()
        monkeypatch.setattr(studies.time, "sleep", lambda seconds: other.release())  # it is killed while we wait
        studies.run_study(plan())
        assert work["trained"][-1] == run.name and len(work["trained"]) == 4

    def test_two_at_once_share_the_runs(self, plan, work, monkeypatch):
        monkeypatch.setattr(studies, "_POLL_SECONDS", 0.01)
        threads = [threading.Thread(target=studies.run_study, args=(plan(),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(work["trained"]) == sorted(run.name for run in plan().runs({}))

    @pytest.mark.parametrize(
        ("given", "train_flags", "words"),
        [
            ({"num_images": 10}, [], ["another study", "num_images was 20 and is 10"]),
            ({"num_inference_steps": [2]}, [], ["num_inference_steps was [2, 4] and is [2]"]),
            ({}, ["--train_batch_size", "2"], ["train_batch_size was None and is 2"]),
        ],
    )
    def test_a_folder_of_another_protocol_is_refused(self, plan, work, given, train_flags, words):
        studies.run_study(plan({"cells": ["linear"], "seeds": [0]}))
        with pytest.raises(UserError) as error:
            studies.run_study(plan(given, train_flags))
        for word in words:
            assert word in str(error.value)

    def test_a_folder_of_another_recipe_is_refused(self, plan, work):
        studies.run_study(plan({"cells": ["linear"], "seeds": [0]}))
        with pytest.raises(UserError, match="recipe was 'unconditional_x' and is 'unconditional_y'"):
            studies.run_study(plan(name="unconditional_y.yaml"))


class TestWhatIsTold:
    def test_several_seeds_have_a_standard_error_and_one_keeps_that_of_its_report(self):
        rows = [measured(6, seed) for seed in (0, 1)]
        value = value_of(rows, Sampler(None, 4), "frechet_distance")
        assert value == (pytest.approx(6.05), pytest.approx(0.05), 2)  # |6.0 - 6.1| / 2
        assert value_of(rows[:1], Sampler(None, 4), "frechet_distance") == (6, 0.5, 1)
        assert value_of(rows, Sampler("dpm", 4), "frechet_distance") is None

    @pytest.mark.parametrize(
        ("figure", "values", "winner"),
        [
            ("frechet_distance", {"a": Value(10, 1, 1), "b": Value(13, 1, 1)}, "a"),  # 3 > 1.96 sqrt 2
            ("frechet_distance", {"a": Value(10, 1, 1), "b": Value(12, 1, 1)}, None),
            ("recall", {"a": Value(10, 1, 1), "b": Value(13, 1, 1)}, "b"),  # higher is better
            ("frechet_distance", {"a": Value(10, 1, 2), "b": Value(13, 1, 2)}, None),  # t = 4.3 with two seeds each
            ("frechet_distance", {"a": Value(10, 1, 1), "b": Value(13, 1, 1), "c": Value(10.1, 1, 1)}, None),
            ("frechet_distance", {"a": Value(10, 1, 1), "b": Value(99, None, 1)}, None),
            ("frechet_distance", {"a": Value(10, 1, 1), "b": None}, None),
            ("diversity", {"a": Value(10, 1, 1), "b": Value(99, 1, 1)}, None),  # neither is better
        ],
    )
    def test_a_winner_is_clear_of_every_other(self, figure, values, winner):
        assert find_winner(values, figure) == winner

    def test_the_table_has_the_floor_the_error_and_the_verdict(self, plan, work):
        text = (studies.run_study(plan()) / "README.md").read_text()
        assert "| linear | 6,000 | 4 | 60 | 0.5 | 6.050 ± 0.050 | 6.050 ± 0.050 |" in text
        assert "| *real against real* | – | – | – | – | 1.5 | 1.5 |" in text
        assert "± is the standard error over the seeds." in text
        assert "no winner" in text  # both names have six letters

    def test_table_and_pictures_are_made_again_from_the_json_alone(self, plan, work, tmp_path, monkeypatch):
        monkeypatch.setattr(studies, "draw", pictures.draw)
        cells = [{"name": "a", "ddpm_beta_schedule": "linear"}, {"name": "bbbb", "ddpm_beta_schedule": "cosine"}]
        folder = studies.run_study(plan(cells=cells))
        names = [
            "validation_losses",
            "samples",
            *(f"frechet_distance_by_{x}" for x in ("steps", "parameters", "seconds")),
        ]
        assert sorted(path.stem for path in folder.glob("*.png")) == sorted(names)
        text = (folder / "README.md").read_text()
        assert "**a** is best" in text
        again = tmp_path / "again"
        again.mkdir()
        (again / "study.json").write_bytes((folder / "study.json").read_bytes())
        studies.show_again(again / "study.json")
        assert (again / "README.md").read_text() == text
        for path in folder.glob("*.png"):
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name

    def test_another_file_is_no_study(self, tmp_path):
        for content in ("{}", "[]", "no", '{"format": 9}'):
            (tmp_path / "study.json").write_text(content)
            with pytest.raises(UserError, match="not a study's file"):
                studies.show_again(tmp_path / "study.json")


class TestRecipes:
    def test_a_recipe_is_found_by_its_name(self, tmp_path):
        assert find_recipe("conditional_guidance") == shipped_recipes()["conditional_guidance"]
        assert find_recipe(str(tmp_path / "x.yaml")) == tmp_path / "x.yaml"  # whoever reads it says that there is none
        with pytest.raises(UserError, match="Did you mean 'conditional_guidance'"):
            find_recipe("conditional_guidence")

    def test_the_train_scripts_ignore_the_section(self, plan, tmp_path):
        plan()
        shared, cells = load_cells(tmp_path / "unconditional_x.yaml")
        assert "study" not in shared and list(cells) == ["linear", "cosine"]

    def test_each_grid_of_the_package_says_how_it_is_studied_and_each_recipe_its_time(self):
        for name, path in shipped_recipes().items():
            assert "# Time" in path.read_text(encoding="utf-8"), name
            if load_cells(path)[1]:
                assert plan_study(path, {}, [], None).runs({}), name


class TestBudget:
    CELLS = [
        {"name": "wide", "block_out_channels": [64, 128]},
        {"name": "half", "block_out_channels": [32, 64]},
    ]

    @pytest.fixture(autouse=True)
    def seconds(self, monkeypatch):
        """A step takes 10 ms for each channel."""
        monkeypatch.setattr(budget, "seconds_a_step", lambda arguments, *_: sum(arguments.block_out_channels) / 100)

    def test_all_widths_are_divided_by_one_factor(self, plan, capsys):
        # 500 steps in 80 % of 10 minutes are 0.96 s each
        networks = budget.fit_networks(plan({"budget": 10.0}, cells=self.CELLS))
        assert networks == {"wide": {"block_out_channels": [32, 64]}, "half": {"block_out_channels": [16, 32]}}
        assert "2 times narrower" in capsys.readouterr().out

    def test_what_fits_stays(self, plan):
        assert budget.fit_networks(plan({"budget": 100.0}, cells=self.CELLS)) == {}

    def test_the_runs_have_the_networks_and_the_minutes(self, plan, work):
        study = plan({"budget": 10.0}, cells=self.CELLS)
        text = (studies.run_study(study) / "README.md").read_text()
        assert "Narrower networks" in text and "10 minutes each" in text
        networks = json.loads((study.folder / "study.json").read_text())["networks"]
        arguments = study.parse(study.runs(networks)[0].flags)
        assert (arguments.block_out_channels, arguments.max_train_minutes) == ([32, 64], 10.0)
