"""A study: what is asked, who works on what, what is told from the results, and what is left."""

import json
import threading

import filelock
import pytest

from tiny_diffusers.errors import UserError
from tiny_diffusers.studies import pictures
from tiny_diffusers.studies import study as studies
from tiny_diffusers.studies.cells import parse_flags, plan_study
from tiny_diffusers.studies.measure import samplers
from tiny_diffusers.studies.results import Sampler, Value, find_winner, group, value_of, why_not_compared
from tiny_diffusers.training.arguments import load_cells
from tiny_diffusers.training.recipes import find_recipe, shipped_recipes


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

    def settings_of(self, study):
        run = study.runs({})[0]
        return parse_flags(run.script, run.flags)

    def test_minutes_replace_the_recipes_steps_but_not_those_that_are_set(self, plan):
        study = plan({"max_train_minutes": 2.0})
        assert self.settings_of(study).max_train_steps is None
        section = {"max_train_minutes": 2.0}
        study = plan({}, ["--max_train_steps", "7"], study=section)
        assert self.settings_of(study).max_train_steps == 7
        assert study.asked["max_train_minutes"] is None
        with pytest.raises(UserError, match="max_train_steps=7 --max_train_minutes"):
            plan({"max_train_minutes": 2.0}, ["--max_train_steps", "7"])

    def test_runs_of_minutes_have_the_same_number_of_validation_images(self, plan):
        def number(given, train_flags=(), **changes):
            return plan(given, train_flags, **changes).runs({})[0].flags.get("max_validation_samples")

        assert number({}) is None  # steps: nothing is left to the run
        assert number({"max_train_minutes": 2.0}) == number({}, max_train_steps=None, max_train_minutes=2.0) == 128
        assert number({"max_train_minutes": 2.0}, ["--max_validation_samples", "9"]) == 9
        assert number({"max_train_minutes": 2.0}, max_validation_samples=9) is None  # the recipe's

    def test_neither_secrets_nor_paths_are_kept(self, plan, tmp_path):
        cells = [{"name": "a", "train_data_dir": str(tmp_path)}, {"name": "b"}]
        study = plan({}, ["--cache_dir", str(tmp_path)], hub_token="hf_secret", cells=cells)
        text = json.dumps(study.asked)
        assert str(tmp_path) not in text and "hf_secret" not in text
        assert study.asked["grid"]["a"] == {"train_data_dir": tmp_path.name}

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"cells": None}, ["no grid", "cells:"]),
            ({"study": None}, ["no section 'study:'"]),
            ({"study": {"num_image": 3}}, ["num_image", "num_images"]),
            ({"study": {"seeds": {"a": 1}}}, ["seeds", "list of values"]),
            ({"study": {"seeds": "many"}}, ["unconditional_x.yaml: study:", "seeds"]),
            ({"study": {"cells": ["cosin"]}}, ["cosin", "Did you mean 'cosine'"]),
            ({"study": {"metrics": ["fid"]}}, ["fid", "frechet_distance"]),
            ({"study": {"main_metric": "recall", "metrics": ["kernel_distance"]}}, ["recall", "--metrics"]),
            ({"study": {"guidance_scale": 2}}, ["guidance_scale", "train_unconditional.py"]),
            ({"study": {"main_metric": "class_agreement"}}, ["class_agreement", "no classes"]),
            ({"study": {"max_train_minutes": 1, "budget": 1}}, ["max_train_minutes", "budget"]),
            ({"cells": [{"name": "a/b"}]}, ["a/b", "folder"]),
            ({"study": {"schedulers": ["ddimm"]}}, ["ddimm", "Did you mean 'ddim'"]),
            ({"study": {"guidance_interval": [0, 1]}}, ["guidance_interval", "train_unconditional.py"]),
            (
                {"name": "conditional_x.yaml", "study": {"guidance_interval": [0.5]}},
                ["guidance_interval", "two numbers"],
            ),
            ({"name": "x.yaml"}, ["x.yaml", "which script"]),
            ({"name": "dcgan_x.yaml", "study": {"metrics": ["bits_per_dim"]}}, ["bits_per_dim", "train_dcgan.py"]),
            ({"name": "vae_x.yaml", "study": {"num_inference_steps": [2]}}, ["num_inference_steps", "train_vae.py"]),
            (
                {"study": {"metrics": ["kernel_distance", "condition_agreement"]}},
                ["condition_agreement", "no conditions"],
            ),
            (
                {"name": "conditional_x.yaml", "study": {"metrics": ["kernel_distance", "condition_agreement"]}},
                ["condition_agreement: the cell", "has no condition_columns"],
            ),
            ({"study": {"metrics": ["condition_agreement"]}}, ["--main_metric condition_correlation"]),
            ({"train_flags": ["--seed", "1"]}, ["--seed", "--set"]),
            ({"train_flags": ["--hub_token", "x"]}, ["--hub_token", "--set"]),
            ({"train_flags": ["--dataset_nam", "x"]}, ["--dataset_nam", "--dataset_name"]),
        ],
    )
    def test_mistakes_are_one_line(self, plan, changes, words):
        with pytest.raises(UserError) as error:
            plan(**changes)
        for word in words:
            assert word in str(error.value)

    def test_each_cell_may_be_of_another_script(self, plan, work, tmp_path):
        cells = [{"name": "a", "script": "vae", "latent_dim": 4}, {"name": "b", "script": "dcgan"}]
        options = {"features": "pixels", "metrics": ["kernel_distance", "bits_per_dim"], "likelihood_images": 4}

        def build(given=None, train_flags=(), study=options, cells=cells):
            return plan(given, train_flags, name="x.yaml", cells=cells, study=study)

        study = build()
        first, second = study.runs({})
        assert [(run.script, parse_flags(run.script, run.flags).SCRIPT) for run in (first, second)] == [
            ("vae", "vae"),
            ("dcgan", "dcgan"),
        ]
        text = (studies.run_study(study) / "README.md").read_text()
        assert "trained by `tiny-diffusers train vae`, `tiny-diffusers train dcgan`" in text
        with pytest.raises(UserError, match="--cell b: it is for `tiny-diffusers train dcgan`, not for vae"):
            parse_flags("vae", second.flags)
        with pytest.raises(UserError, match="num_inference_steps means nothing to the models of train_vae.py"):
            build({"num_inference_steps": [2]})
        with pytest.raises(UserError, match="bits_per_dim: the models of train_dcgan.py have no likelihood"):
            build({"main_metric": "bits_per_dim"})
        with pytest.raises(UserError, match="--kl_weight"):  # flags of --set are for all cells
            build({}, ["--kl_weight", "1"])
        chosen = build(
            {"cells": ["a"], "main_metric": "bits_per_dim"}, ["--kl_weight", "1"]
        )  # of which it is all true
        assert [run.flags["kl_weight"] for run in chosen.runs({})] == [1.0]
        build(study=options | {"metrics": ["all"]})
        with pytest.raises(UserError, match="script for .*x.yaml 'vaee': .*Did you mean 'vae'"):
            build(cells=[{"name": "a", "script": "vaee"}])
        with pytest.raises(UserError, match="--script vae: each cell of .* names its own script"):
            build({"script": "vae"})
        open_cells = [*cells, {"name": "c"}]  # no other family can go on with it
        asked = [build({"script": script}, cells=open_cells).asked for script in ("vae", "dcgan")]
        assert asked[0]["grid"]["c"] != asked[1]["grid"]["c"]

    def test_a_recipe_may_name_its_script(self, plan):
        assert (
            plan(name="x.yaml", script="vae", cells=[{"name": "a"}], study={"features": "pixels"}).runs({})[0].script
            == "vae"
        )

    @pytest.mark.parametrize("script", ["pixelcnn", "vae", "dcgan", "conditional"])
    def test_class_agreement_is_refused_for_a_cell_without_classes(self, plan, script):
        name, changes = f"{script}_x.yaml", {"study": {"main_metric": "class_agreement"}}
        on, off = ({"label_column": "kind"}, {"label_column": "none"})
        if script != "conditional":
            on, off = {"class_conditional": True}, {}
        with pytest.raises(UserError, match=f"class_agreement: the cell b has no classes.*{next(iter(on))}"):
            plan(name=name, cells=[{"name": "a", **on}, {"name": "b", **off}], **changes)
        assert plan(name=name, cells=[{"name": "a", **on}], **changes).main_metric == "class_agreement"

    def test_a_cell_that_its_script_does_not_take_is_refused_before_anything_is_trained(self, plan, work):
        with pytest.raises(UserError, match="ddpm_beta_schedul"):
            studies.run_study(plan(cells=[{"name": "a", "ddpm_beta_schedul": "linear"}]))
        assert not work["trained"]

    def test_samplers_without_a_form_for_the_objective_are_refused_before_anything_is_trained(self, plan, work):
        cells = [{"name": "a", "prediction_type": "flow"}, {"name": "b", "prediction_type": "epsilon"}]
        with pytest.raises(UserError, match="ddim: none has a form for the objective of a, flow: give one of euler"):
            studies.run_study(plan({"schedulers": ["ddim"]}, cells=cells))
        assert plan({"schedulers": ["ddim", "euler"]}, cells=cells).runs(
            {}
        )  # one is enough: the other is a row's error

    def test_a_recipe_that_is_not_there_is_named_as_it_is(self, tmp_path):
        with pytest.raises(UserError, match=r"^The recipe .*missing.yaml cannot be read"):
            plan_study(tmp_path / "missing.yaml", {}, [], None)


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
        def train(run):
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
        def train(run):
            raise studies._Failure("no such dataset")

        monkeypatch.setattr(studies, "_train", train)
        with pytest.raises(UserError, match="no such dataset"):
            studies.run_study(plan())

    def test_a_run_that_was_trained_before_a_kill_is_only_measured(self, plan, work):
        run = plan().runs({})[0]
        run.write({"cell": run.cell, "seed": run.seed, "data": run.data, "state": "trained"})
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

    def test_other_images_of_the_same_last_name_are_refused(self, plan, work, tmp_path):
        for parent in ("a", "b"):
            (tmp_path / parent / "images").mkdir(parents=True)
        studies.run_study(plan({}, ["--dataset_name", str(tmp_path / "a" / "images")]))
        with pytest.raises(UserError, match="digests of paths: dataset_name of --set"):
            studies.run_study(plan({}, ["--dataset_name", str(tmp_path / "b" / "images")]))

    def test_a_folder_of_another_recipe_is_refused(self, plan, work):
        studies.run_study(plan({"cells": ["linear"], "seeds": [0]}))
        with pytest.raises(UserError, match="recipe was 'unconditional_x' and is 'unconditional_y'"):
            studies.run_study(plan(name="unconditional_y.yaml"))


class TestWhatIsTold:
    def test_metrics_are_compared_among_runs_with_the_same_real_images(self):
        def row(cell, data, images=None):
            return {"cell": cell, "data": data} | ({"images": images} if images else {})

        rows = [
            row("a", "images", ["x", None]),
            row("b", "images", ["y", None]),  # another folder of that name
            row("c", "images, 32", ["x", None]),  # the same images, asked for in other words
            row("failed", "images"),
            row("other", "digits"),
        ]
        assert {name: list(cells) for name, cells in group(rows).items()} == {
            "images": ["a", "c", "failed"],
            "images (other images 1)": ["b"],
            "digits": ["other"],
        }

    def test_what_is_asked_for_twice_is_measured_once(self, plan):
        study = plan({"num_inference_steps": [2, 4, 2], "schedulers": ["ddim", "ddim"]})
        assert samplers(study) == [Sampler("ddim", 2), Sampler("ddim", 4)]

    def test_a_standard_deviation_is_no_error(self):
        entry = {"value": 2.0, "error": 0.5, "error_kind": "standard deviation over 10 parts"}
        rows = [{"measured": [{"scheduler": None, "num_inference_steps": 4, "figures": {"inception_score": entry}}]}]
        assert value_of(rows, Sampler(None, 4), "inception_score") == Value(2.0, None, 1)

    def test_several_seeds_have_a_standard_error_and_one_keeps_that_of_its_report(self, measured):
        rows = [measured(6, seed) for seed in (0, 1)]
        value = value_of(rows, Sampler(None, 4), "frechet_distance")
        assert value == Value(pytest.approx(6.05), pytest.approx(0.05), 2)  # |6.0 - 6.1| / 2
        assert value_of(rows[:1], Sampler(None, 4), "frechet_distance") == Value(6, 0.5, 1)
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
            ("frechet_distance", {"a": Value(10, 0.1, 3), "b": Value(99, 0.1, 1)}, None),  # errors of two kinds
            ("diversity", {"a": Value(10, 1, 1), "b": Value(99, 1, 1)}, None),  # neither is better
            ("bits_per_dim", {"a": Value(1, 0.1, 1, ("class",)), "b": Value(3, 0.1, 1, ("class",))}, "a"),
            ("bits_per_dim", {"a": Value(1, 0.1, 1, ("class",)), "b": Value(3, 0.1, 1)}, None),
        ],
    )
    def test_a_winner_is_clear_of_every_other(self, figure, values, winner):
        assert find_winner(values, figure) == winner

    def test_bits_of_a_row_are_with_what_they_are_given(self):
        entry = {"value": 2.0, "error": 0.5, "error_kind": "standard error over images"}
        figures = {"bits_per_dim": entry, "recall": entry}
        measured = [{"scheduler": None, "num_inference_steps": None, "figures": figures}]
        rows = [{"state": "failed"}, {"measured": measured, "likelihood_given": ["class", "age"]}]
        value = value_of(rows, Sampler(None, None), "bits_per_dim")
        assert value == Value(2.0, 0.5, 1, ("class", "age"))
        assert value_of(rows, Sampler(None, None), "recall").given == ()
        assert (
            why_not_compared([value, Value(2.0, 0.5, 1)]) == "some bits/dim are given class, age, and others are not"
        )

    def test_the_table_has_the_floor_the_error_and_the_verdict(self, plan, work):
        text = (studies.run_study(plan()) / "README.md").read_text()
        assert "| linear | 6,000 | 4 | 60 | 0.5 | 6.050 ± 0.050 | 6.050 ± 0.050 |" in text
        assert "| *real against real* | – | – | – | – | 1.5 | 1.5 |" in text
        assert "± is the standard error over the seeds." in text
        assert "no winner" in text  # both names have six letters

    def test_without_errors_there_is_no_winner_and_the_table_says_why(self, plan, work, measured, monkeypatch):
        def measure(run, study):
            row = measured(len(run.cell), run.seed)
            for entry in row["measured"]:
                entry["figures"] = {"frechet_distance": {"value": 1.0, "error": None, "error_kind": None}}
            return row

        monkeypatch.setattr(studies, "_measure", measure)
        text = (studies.run_study(plan({"seeds": [0]})) / "README.md").read_text()
        assert "no winner: not all values have an error." in text

    @pytest.mark.slow
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
        studies.show_again(again / "study.json", {})
        assert (again / "README.md").read_text() == text
        for path in folder.glob("*.png"):
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name

    def test_a_long_legend_lies_beside_the_lines(self, measured):
        cells = {f"cell {number}": [{"cell": f"cell {number}", **measured(1, 0)}] for number in range(6)}
        content = {"asked": {"script": "vae", "grid": dict.fromkeys(cells, {})}}
        _, axes = pictures._losses(cells, content)
        axes.figure.canvas.draw()
        assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1
        assert axes.get_yscale() == "linear"
        cells["cell 1"][0]["val_loss"] = [[2, 0.1], [4, 0.02]]
        assert pictures._losses(cells, content)[1].get_yscale() == "log"
        content["asked"]["grid"]["cell 1"] = {"script": "dcgan"}  # whose losses have nothing in common with the others
        assert pictures._losses(cells, content)[1] is None

    def test_other_metrics_of_one_cell_are_tabulated_by_sampler(self, plan, work):
        one = (studies.run_study(plan({"cells": ["linear"]})) / "README.md").read_text()
        assert "| linear | Recall" in one and "| 2 steps | 6.05" in one and "| 4 steps | 6.05" in one
        two = (studies.run_study(plan()) / "README.md").read_text()
        assert "| 4 steps | Recall" in two and "| linear | 6.05" in two and "| 2 steps |" not in two.split("Recall")[1]

    def test_an_error_of_several_samplers_is_one_line_and_other_metrics_are_of_one_that_measured_them(
        self, plan, work, monkeypatch, measured
    ):
        def measure(run, study):
            row = measured(6, run.seed)
            failed = row["measured"] if run.cell == "linear" else row["measured"][1:]
            for entry in failed:
                del entry["figures"]
                entry["error"] = "out of range"
            return row

        monkeypatch.setattr(studies, "_measure", measure)
        readme = (studies.run_study(plan()) / "README.md").read_text()
        assert "- linear, seed 0, not measured: out of range\n- linear, seed 1, not measured" in readme
        assert "- cosine, seed 0, 4 steps, not measured: out of range" in readme and readme.count("out of range") == 4
        assert "| 2 steps | Recall" in readme and "| cosine | 6.05" in readme.split("Recall")[1]

    def test_a_metric_is_drawn_over_what_the_samplers_differ_in(self, measured):
        rows = [measured(6, 0)]
        figures = [{"frechet_distance": {"value": value, "error": None, "error_kind": None}} for value in range(4)]
        sampled = [(10, 1.0), (20, 1.0), (10, 3.0), (20, 3.0)]
        rows[0]["measured"] = [
            {"scheduler": None, "num_inference_steps": steps, "guidance_scale": scale, "figures": each}
            for (steps, scale), each in zip(sampled, figures, strict=True)
        ]
        content = {"main_metric": "frechet_distance", "asked": {"protocol": {"features": "pixels"}}}
        lines = {}
        for plot in ("steps", "guidance"):
            name, axes = pictures._PLOTS[plot]({"a": rows}, content)
            assert name == f"frechet_distance_by_{plot}"
            drawn = [container.lines[0].get_data() for container in axes.containers]
            names = [text.get_text() for text in axes.get_legend().get_texts()]
            lines[plot] = {name: [*zip(*line, strict=True)] for name, line in zip(names[-2:], drawn, strict=True)}
        assert lines["guidance"] == {"a, 10 steps": [(1, 0), (3, 2)], "a, 20 steps": [(1, 1), (3, 3)]}
        assert lines["steps"] == {"a, guidance 1": [(10, 0), (20, 1)], "a, guidance 3": [(10, 2), (20, 3)]}

    def test_another_file_is_no_study(self, plan, work, tmp_path):
        study = studies.run_study(plan({"seeds": [0]})) / "study.json"
        content = json.loads(study.read_text())
        row = content["rows"][0]
        strangers = [
            *({}, [], {"format": 9}),
            *(content | {"plots": ["x"]}, content | {"main_metric": "x"}, content | {"rows": {}}),
            *(content | {"rows": [1]}, content | {"rows": [row | {"measured": 1}]}, content | {"asked": {}}),
        ]
        for stranger in strangers:
            study.write_text(json.dumps(stranger))
            with pytest.raises(UserError, match="not a study's file"):
                studies.show_again(study, {})

    def test_the_words_of_a_strangers_file_are_no_markdown(self, plan, work):
        study = studies.run_study(plan({"seeds": [0]})) / "study.json"
        for name in ("unconditional`", "linear", "20 images against", "few images"):
            study.write_text(study.read_text().replace(name.rstrip("`"), "<b>|x" if name != "linear" else "linear"))
        content = json.loads(study.read_text())
        content["asked"]["script"] = content["asked"]["recipe"] = "<b>`"
        content["asked"]["train flags"] = {"`<b>": "|"}
        content["asked"]["grid"]["linear"] = {"<b>": "`<b>"}
        for row in content["rows"]:
            row["measured"][0]["scheduler"] = "<b>|"
        study.write_text(json.dumps(content))
        studies.show_again(study, {})
        assert "<b>" not in (study.parent / "README.md").read_text()

    def test_the_table_is_made_again_with_another_metric_and_nothing_else(self, plan, work):
        study = studies.run_study(plan()) / "study.json"
        studies.show_again(study, {"main_metric": "recall"})
        assert "**Recall**" in (study.parent / "README.md").read_text()
        with pytest.raises(UserError, match="precision: it was not measured"):
            studies.show_again(study, {"main_metric": "precision"})
        with pytest.raises(UserError, match="--num_images.*--plots and --main_metric"):
            studies.show_again(study, {"num_images": 3})

    def test_the_readme_says_what_a_cell_changes(self, plan, work):
        text = (studies.run_study(plan()) / "README.md").read_text()
        assert "- linear: `ddpm_beta_schedule linear`" in text

    def test_a_damaged_result_is_named(self, plan, work):
        run = plan().runs({})[0]
        studies.run_study(plan())
        run.result.write_text("{")
        with pytest.raises(UserError, match="seed-0.json is damaged.*delete it"):
            studies.run_study(plan())


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
