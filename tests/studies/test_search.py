"""
A search: what it suggests, prunes, keeps and draws, whole, killed and resumed, and what its mistakes are answered with.

Training is replaced by a process that logs validation losses as a run does; the slow test trains for real.
"""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from tiny_diffusers.cli import main
from tiny_diffusers.errors import UserError
from tiny_diffusers.families.diffusion import DiffusionArguments
from tiny_diffusers.studies import search, search_plan
from tiny_diffusers.studies.search_report import outcome_of, write_pictures
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.recipes import shipped_recipes


optuna = pytest.importorskip("optuna")

RECIPES = list(shipped_recipes().values())

RECIPE = """
dataset_name: digits
search:
  trials: 3
  max_train_steps: 40
  n_startup_trials: 1
  ranges:
    learning_rate: {low: 1e-4, high: 1e-1, log: true}
    block_out_channels: [[8, 8], [16, 32]]
    optimizer: [adamw, sgd]
"""

# A run of ten validations: the loss falls to |log10(learning rate) + 2| + 1. A learning rate above 0.09 diverges.
RUN = """
import json, math, sys, time
from pathlib import Path
rate, folder, seconds = float(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "train_log.jsonl").open("w") as log:
    for step in range(4, 44, 4):
        print(json.dumps({"step": step, "val_loss": abs(math.log10(rate) + 2) + 1 + 1 / step}), file=log, flush=True)
        time.sleep(seconds)
        if rate > 0.09:
            sys.exit("error: the loss was not finite; lower --learning_rate.")
(folder / "run.json").write_text('{"seconds": 1.5}')
"""


@pytest.fixture
def started(monkeypatch):
    """Replaces training, and leaves out the pictures; lists what was started."""
    runs = []

    def start(script, flags, output_dir, log):
        runs.append((script, flags, output_dir))
        log.parent.mkdir(parents=True, exist_ok=True)
        rate = str(flags.get("learning_rate", 0.01))
        with log.open("a") as file:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", RUN, rate, output_dir, str(start.seconds)], stdout=file, stderr=file
            )

    start.seconds, start.runs = 0.0, runs
    monkeypatch.setattr(search, "start_training", start)
    monkeypatch.setattr(search, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(search, "write_pictures", lambda results, folder: None)
    return start


@pytest.fixture
def recipe(tmp_path):
    def write(content=RECIPE, name="unconditional_tiny.yaml"):
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return write


def results_of(folder):
    return json.loads((Path(folder) / "search.json").read_text())


def trials_of(folder):
    return [{**trial, "seconds": None} for trial in results_of(folder)["trials"]]


def test_a_search_leaves_its_table_its_pictures_and_its_best(started, recipe, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr(search, "write_pictures", write_pictures)
    assert main(["search", recipe(), "--output_dir", str(folder), "--trials", "6"]) == 0
    results = results_of(folder)
    assert [trial["trial"] for trial in results["trials"]] == list(range(6))
    finished = [trial for trial in results["trials"] if trial["outcome"] == "finished"]
    best = results["trials"][results["best"]]
    assert best["value"] == min(trial["value"] for trial in finished) == min(best["val_losses"])
    table = (folder / "README.md").read_text()
    assert all(name in table for name in ("learning_rate", "block_out_channels", "8 8", "finished", "seconds"))
    pictures = ("parallel_coordinates.png", "history.png", "importances.png")
    for name in pictures:
        assert (folder / name).stat().st_size > 5000
    again = tmp_path / "again"
    again.mkdir()
    (again / "search.json").write_bytes((folder / "search.json").read_bytes())
    assert main(["search", str(again / "search.json")]) in (0, None)
    for name in ("README.md", *pictures):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name

    # Each trial is a run of the recipe with the flags of the trial, and the best is a recipe.
    script, flags, output_dir = started.runs[best["trial"]]
    assert (script, output_dir) == ("unconditional", folder / "trials" / f"{best['trial']:03}")
    assert flags == flags | best["flags"] | {"max_train_steps": 40, "save_images_steps": 0}
    arguments = parse_arguments(DiffusionArguments, ["--config", str(folder / "best.yaml")])
    assert {name: getattr(arguments, name) for name in best["flags"]} == best["flags"]
    assert arguments.max_train_steps is None and arguments.dataset_name == "digits"


TRIAL = {"trial": 0, "outcome": "finished", "value": 0.5, "val_loss": 0.5, "flags": {"learning_rate": 0.1}}
TRIAL |= {"steps": 4, "seconds": 1.0, "note": None}
RESULTS = {
    **{"recipe": "a.yaml", "script": "unconditional", "command": "search", "objective": "val_loss"},
    **{
        "lower_is_better": True,
        "ranges": {"learning_rate": {"low": 0.01, "high": 1.0, "log": True}},
        "trials": [TRIAL],
    },
    **{"best": 0, "importances": {}},
}


def test_a_file_alone_is_a_search(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULTS))
    assert main(["search", str(tmp_path / "a.json")]) in (0, None)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "content",
    [
        *(
            [],
            {},
            {"trials": []},
            RESULTS | {"best": 1},
            RESULTS | {"best": None},
            RESULTS | {"lower_is_better": "no"},
        ),
        *(RESULTS | {"trials": [TRIAL | {"value": value}]} for value in (math.nan, "a", None)),
        RESULTS | {"ranges": {"learning_rate": {"choices": [1, 2]}}},  # without what was tried
        *(RESULTS | {"ranges": {"learning_rate": {"low": 0, "high": 1, "log": True}}}, RESULTS | {"importances": "a"}),
        RESULTS | {"ranges": {str(number): {"low": 0, "high": 1, "log": False} for number in range(2000)}},
    ],
)
def test_another_file_is_no_search(tmp_path, capsys, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert main(["search", str(tmp_path / "a.json")]) == 2
    assert "a.json' is not a search's file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.slow
def test_trials_depend_on_the_seed_and_the_trials_before(started, recipe, tmp_path):
    for name, flags in (("a", []), ("b", []), ("c", ["--sampler_seed", "1"])):
        assert main(["search", recipe(), "--output_dir", str(tmp_path / name), *flags]) == 0
    assert trials_of(tmp_path / "a") == trials_of(tmp_path / "b")
    assert [t["flags"] for t in trials_of(tmp_path / "a")] != [t["flags"] for t in trials_of(tmp_path / "c")]
    # More trials continue the search, as if they had been asked for at once.
    main(["search", recipe(), "--output_dir", str(tmp_path / "a"), "--trials", "5"])
    main(["search", recipe(), "--output_dir", str(tmp_path / "d"), "--trials", "5"])
    assert trials_of(tmp_path / "a") == trials_of(tmp_path / "d")


def test_a_search_that_ends_in_the_middle_resumes_and_equals_an_uninterrupted_one(
    started, recipe, tmp_path, monkeypatch
):
    argv = ["search", recipe(), "--trials", "4", "--output_dir"]
    assert main([*argv, str(tmp_path / "whole")]) == 0

    # 1. An error in the second trial, after its third validation
    is_bad = search.Search._is_bad

    def fail(self, trial, run):
        pruned = is_bad(self, trial, run)
        if trial.number == 1 and self.study.trials[1].last_step == 10:
            raise RuntimeError
        return pruned

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(search.Search, "_is_bad", fail)
        main([*argv, str(tmp_path / "resumed")])

    # 2. A signal in the same trial, when it is taken up again
    with monkeypatch.context() as patch:
        patch.setattr(search.Search, "_is_bad", lambda self, trial, run: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(started, "seconds", 0.1)
        assert main([*argv, str(tmp_path / "resumed")]) == 128 + signal.SIGTERM

    # 3. The rest
    assert main([*argv, str(tmp_path / "resumed")]) == 0
    assert trials_of(tmp_path / "resumed") == trials_of(tmp_path / "whole")
    assert [output_dir.name for *_, output_dir in started.runs[4:]] == ["000", "001", "001", "001", "002", "003"]
    assert started.runs[5][1] == started.runs[6][1] == started.runs[7][1]


@pytest.mark.slow
def test_a_kill_between_two_suggestions_changes_neither(started, recipe, tmp_path, monkeypatch):
    argv = ["search", recipe(), "--trials", "2", "--output_dir"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    suggest = search_plan.Range.suggest

    def fail(self, trial):
        if trial.number == 1 and self.name == "optimizer":
            raise RuntimeError
        return suggest(self, trial)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(search_plan.Range, "suggest", fail)
        main([*argv, str(tmp_path / "killed")])
    assert main([*argv, str(tmp_path / "killed")]) == 0
    assert trials_of(tmp_path / "killed") == trials_of(tmp_path / "whole")


def ending(status):
    """Starts a training that ends with a status at once."""

    def start(script, flags, output_dir, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", f"import sys; print('no data'); sys.exit({status})"], stdout=file
            )

    return start


def test_if_the_first_trials_fail_the_search_ends_and_they_are_tried_again(
    started, recipe, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(search, "start_training", ending(2))
        assert main(["search", recipe(), "--output_dir", str(folder), "--trials", "5"]) == 2
    assert "the first 3 trials have failed" in capsys.readouterr().err
    failed = trials_of(folder)
    assert [trial["outcome"] for trial in failed] == 3 * ["failed"]
    other = recipe(RECIPE.replace("digits\n", "other/images\n"))
    assert main(["search", other, "--output_dir", str(folder)]) == 2 and trials_of(folder) == failed
    assert main(["search", recipe(), "--output_dir", str(folder), "--trials", "1"]) == 0
    (trial,) = trials_of(folder)
    assert trial["outcome"] == "finished" and trial["flags"] == failed[0]["flags"]


def test_a_trial_that_is_stopped_from_outside_is_taken_up_again(started, recipe, tmp_path, monkeypatch, capsys):
    argv = ["search", recipe(), "--trials", "1", "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(search, "start_training", ending(128 + signal.SIGTERM))
        assert main(argv) == 2
    assert "trial 000 was stopped: the same command goes on" in capsys.readouterr().err
    assert main(argv) == 0 and [trial["outcome"] for trial in trials_of(tmp_path / "out")] == ["finished"]


def test_a_trial_whose_end_was_not_written_down_is_still_running():
    entry = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, user_attrs={"outcome": "finished"})
    assert outcome_of(entry) == "running"


def test_the_best_recipe_has_neither_smoke_nor_the_length_of_the_trials(recipe, tmp_path):
    plan = search_plan.read_plan(Path(recipe()), {}, ["--smoke", "--num_epochs", "3", "--train_batch_size", "8"])
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(plan.best_recipe({"learning_rate": 0.01})))
    arguments = parse_arguments(DiffusionArguments, ["--config", str(tmp_path / "best.yaml")])
    assert (arguments.smoke, arguments.num_epochs, arguments.max_train_steps) == (False, 30, None)
    assert (arguments.learning_rate, arguments.train_batch_size) == (0.01, 8)


def test_an_infinite_choice_is_a_word_in_the_results(started, recipe, tmp_path):
    content = RECIPE.replace("optimizer: [adamw, sgd]", "max_grad_norm: [.inf]")
    assert main(["search", recipe(content), "--output_dir", str(tmp_path / "out"), "--trials", "1"]) == 0
    assert trials_of(tmp_path / "out")[0]["flags"]["max_grad_norm"] == "inf"
    assert started.runs[0][1]["max_grad_norm"] == float("inf")


def test_trials_of_minutes_have_the_same_number_of_validation_images(recipe):
    plan = search_plan.read_plan(Path(recipe()), {"max_train_minutes": 2.0}, [])
    assert plan.train_flags({})["max_validation_samples"] == 128
    assert "max_validation_samples" not in search_plan.read_plan(Path(recipe()), {}, []).train_flags({})


def test_a_bad_trial_is_pruned_and_one_that_diverges_says_so(started, recipe, tmp_path):
    rates = "learning_rate: [0.095, 0.01, 1e-6]"
    content = RECIPE.replace("learning_rate: {low: 1e-4, high: 1e-1, log: true}", rates).replace(
        "trials: 3", "trials: 8"
    )
    assert main(["search", recipe(content), "--output_dir", str(tmp_path / "out"), "--sampler_seed", "1"]) == 0
    trials = trials_of(tmp_path / "out")
    outcomes = {trial["outcome"]: trial for trial in trials}
    assert outcomes.keys() == {"finished", "pruned", "failed"}
    assert "failed: error: the loss was not finite" in (tmp_path / "out" / "README.md").read_text()
    assert len(outcomes["pruned"]["val_losses"]) == 5 and outcomes["pruned"]["flags"]["learning_rate"] == 1e-6
    assert all(trial["value"] is None for trial in trials if trial["outcome"] != "finished")


@pytest.mark.slow
def test_nothing_is_pruned_if_it_is_not_to_be(started, recipe, tmp_path):
    content = RECIPE.replace("low: 1e-4", "low: 1e-6").replace("trials: 3", "trials: 8")
    for name, flags in (("pruned", []), ("all", ["--prune", "False"])):
        assert main(["search", recipe(content), "--output_dir", str(tmp_path / name), *flags]) == 0
    assert "pruned" in {trial["outcome"] for trial in trials_of(tmp_path / "pruned")}
    assert {trial["outcome"] for trial in trials_of(tmp_path / "all")} == {"finished"}


@pytest.mark.slow
def test_workers_share_the_trials(started, recipe, tmp_path):
    started.seconds = 0.02
    assert (
        main(["search", recipe(), "--output_dir", str(tmp_path), "--workers", "2", "--trials", "5"]) == 2
    )  # not its own
    assert main(["search", recipe(), "--output_dir", str(tmp_path / "out"), "--workers", "2", "--trials", "5"]) == 0
    assert sorted(output_dir.name for *_, output_dir in started.runs) == ["000", "001", "002", "003", "004"]
    assert all("num_threads" in flags for _, flags, _ in started.runs)
    assert {trial["outcome"] for trial in trials_of(tmp_path / "out")} <= {"finished", "pruned"}


def section(text):
    return f"search:\n{textwrap.indent(text, '  ')}"


@pytest.mark.parametrize(
    ("content", "argv", "words"),
    [
        ("learning_rate: 1e-3", [], ["no section 'search:'"]),
        (section("ranges: {learning_rate: []}"), [], ["'learning_rate'", "no values"]),
        (section("ranges: {learning_rate: {low: 1e-2, high: 1e-3}}"), [], ["'learning_rate'", "empty range", "0.01"]),
        (section("ranges: {learning_rate: {low: 0, high: 1, log: true}}"), [], ["'learning_rate'", "low above 0"]),
        (section("ranges: {learning_rate: {low: 0, high: 1, step: 2}}"), [], ["'learning_rate'", "step"]),
        (section("ranges: {learning_rate: {low: 0}}"), [], ["'learning_rate'", "list of values"]),
        (section("ranges: {train_batch_size: {low: 0.5, high: 8}}"), [], ["'train_batch_size'", "0.5"]),
        (section("ranges: {train_batch_size: [0]}"), [], ["'train_batch_size'", "[1, 65536]"]),
        (section("ranges: {optimizer: [adam, adamW]}"), [], ["'optimizer'", "adamW", "adamw, muon, adam"]),
        (section("ranges: {optimizer: {low: 1, high: 2}}"), [], ["'optimizer'", "no number"]),
        (section("ranges: {learning_rat: [1]}"), [], ["'learning_rat'", "Did you mean 'learning_rate'?"]),
        (section("ranges: {output_dir: [a, b]}"), [], ["'output_dir'"]),
        (section("ranges: {num_epochs: [1, 2]}\nmax_train_steps: 5"), [], ["num_epochs", "max_train_steps"]),
        (section("trials: 3"), [], ["'ranges'"]),
        (section("trials: many\nranges: {num_epochs: [1]}"), [], ["trials", "many"]),
        (section("trial: 3\nranges: {num_epochs: [1]}"), [], ["'trial'", "Did you mean 'trials'?"]),
        (section("objective: fid\nranges: {num_epochs: [1]}"), [], ["objective 'fid'", "frechet_distance"]),
        (section("protocol: {num_image: 5}\nranges: {num_epochs: [1]}"), [], ["protocol", "--num_image"]),
        (section("ranges: {num_epochs: [1]}"), ["--num_epoch", "3"], ["--num_epoch", "--num_epochs"]),
        (section("ranges: {num_epochs: [1]}"), ["--num_epochs", "3"], ["--num_epochs", "leave it out"]),
        (section("ranges: {num_epochs: [1]}"), ["--validation_split", "0"], ["val_loss", "no images are held out"]),
        ("cells: [{name: a}, {name: b}]\n" + section("ranges: {num_epochs: [1]}"), [], ["--cell", "a, b"]),
        (section("cell: c\nranges: {num_epochs: [1]}"), [], ["cell", "'c'"]),
        (section("ranges: {max_grad_norm: {low: 1, high: .inf}}"), [], ["'max_grad_norm'", "finite"]),
        *(
            (section(f"objective: {objective}\nprotocol: {{{protocol}}}\nranges: {{num_epochs: [1]}}"), [], words)
            for objective, protocol, words in (
                ("inception_score", "features: pixels", ["inception_score", "no classifier"]),
                ("class_agreement", "features: pixels", ["class_agreement", "no classes"]),
                ("frechet_distance", "num_images: 1", ["num_images"]),
                ("recall", "features: pixels, metrics: kernel_distance", ["add precision_recall to its metrics"]),
                ("recall", "features: inception, feature_weights: nowhere.pt", ["nowhere.pt"]),
                ("recall", "scheduler: ddimm", ["ddimm", "ddim"]),
                ("recall", "guidance_scale: 2", ["guidance_scale", "train_unconditional.py"]),
                ("recall", "name: x", ["protocol", "'name'", "leave it out"]),
                ("recall", "publish: true", ["protocol"]),
            )
        ),
    ],
)
def test_mistakes_are_one_line(content, argv, words, started, recipe, tmp_path, capsys):
    assert main(["search", recipe(content), *argv, "--output_dir", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line
    assert not started.runs and not (tmp_path / "out").exists()


def test_a_recipe_whose_name_has_no_script_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="which script it is for.*unconditional_mine"):
        search_plan.read_plan(Path(recipe(name="mine.yaml")), {}, [])
    assert (
        search_plan.read_plan(Path(recipe(name="mine.yaml")), {"script": "unconditional"}, []).script
        == "unconditional"
    )


def test_a_folder_of_another_search_is_refused(started, recipe, tmp_path, capsys):
    argv = ["--output_dir", str(tmp_path / "out"), "--trials", "1"]
    assert main(["search", recipe(), *argv]) == 0
    for change in (("1e-4", "1e-3"), ("max_train_steps: 40", "max_train_steps: 80"), ("digits\n", "other/images\n")):
        assert main(["search", recipe(RECIPE.replace(*change)), *argv]) == 2
        assert "holds another search" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", recipe(), "--output_dir", str(tmp_path / "out")]) == 2
    assert "pip install 'tiny-diffusers[search]'" in capsys.readouterr().err


def test_train_scripts_set_the_section_aside(recipe):
    arguments = parse_arguments(DiffusionArguments, ["--config", recipe()])
    assert arguments.dataset_name == "digits" and arguments.max_train_steps is None


def test_a_loss_that_a_range_changes_is_warned_of(recipe, caplog, capsys):
    content = yaml.safe_dump({"search": {"ranges": {"ddpm_num_steps": [100, 1000]}}})
    search_plan.read_plan(Path(recipe(content)), {}, [])
    assert "ddpm_num_steps changes what the validation loss measures" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [p for p in RECIPES if "\nsearch:" in p.read_text()], ids=lambda path: path.stem)
def test_a_recipe_with_a_search_is_a_plan(recipe):
    plan = search_plan.read_plan(recipe, {}, [])
    assert len(plan.ranges) >= 2


@pytest.mark.exhaustive
def test_a_search_of_real_runs_killed_in_the_middle_equals_an_uninterrupted_one(recipe, tmp_path):
    content = RECIPE.replace("[[8, 8], [16, 32]]", "[[8, 8], [8, 16]]").replace(
        "max_train_steps: 40", "max_train_steps: 20"
    )
    flags = ["--smoke", "--max_train_samples", "64", "--mixed_precision", "no", "--num_threads", "1"]
    command = [sys.executable, "-m", "tiny_diffusers.cli", "search", recipe(content), *flags]
    subprocess.run([*command, "--output_dir", tmp_path / "whole"], check=True)

    killed = subprocess.Popen([*command, "--output_dir", tmp_path / "killed"])
    log = tmp_path / "killed" / "trials" / "001" / "train_log.jsonl"
    while not log.exists():
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    subprocess.run([*command, "--output_dir", tmp_path / "killed"], check=True)
    assert trials_of(tmp_path / "killed") == trials_of(tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "killed/best.yaml").read_text()) == yaml.safe_load(
        (tmp_path / "whole/best.yaml").read_text()
    )
