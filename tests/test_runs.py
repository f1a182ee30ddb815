"""A checkpoint is complete or it is skipped; a log, settings and a lock are one run's."""

import contextlib
import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from tiny_diffusers import files
from tiny_diffusers.errors import UserError, exit_status
from tiny_diffusers.runs import RunFolder, read_log


def write(folder):
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").write_bytes(bytes(range(256)))
    (folder / "state.json").write_text('{"step": 1}')


def publish(output_dir, *steps):
    for step in steps:
        RunFolder(output_dir).publish_checkpoint(step, write)


def test_latest_is_the_highest_step_not_the_last_name(tmp_path):
    publish(tmp_path, 900, 1000, 50)
    assert RunFolder(tmp_path).find_checkpoint("latest").name == "checkpoint-1000"


def test_none_yet(tmp_path):
    assert RunFolder(tmp_path).find_checkpoint("latest") is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["unet/weights", "state.json", files.MANIFEST]),
    kind=st.sampled_from(["delete", "truncate", "flip", "empty"]),
    position=st.integers(0, 10),
)
def test_every_kind_of_damage_to_every_file_is_seen(tmp_path_factory, capsys, name, kind, position):
    output_dir = tmp_path_factory.mktemp("run")
    publish(output_dir, 1, 2)
    path = output_dir / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        content[position] ^= 0x10
        path.write_bytes(content)
    capsys.readouterr()
    assert RunFolder(output_dir).find_checkpoint("latest").name == "checkpoint-1"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "checkpoint-2" in said[0]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    publish(tmp_path, 1)

    def fails(folder):
        (folder / "half").write_text("...")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        RunFolder(tmp_path).publish_checkpoint(2, fails)
    assert [path.name for path in RunFolder(tmp_path).list_checkpoints()] == ["checkpoint-1"]
    publish(tmp_path, 3)
    RunFolder(tmp_path).prune(tmp_path / "checkpoint-3", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".files.json", "checkpoint-1", "checkpoint-3"]


def test_weights_that_do_not_fit_on_the_disk_are_an_error_of_one_line(tmp_path, capsys):
    def fails(folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    assert exit_status(lambda: RunFolder(tmp_path).place(fails), "error") == 2
    assert capsys.readouterr().err == f"error: I/O error: No space left on device (os error 28): '{tmp_path}'\n"
    assert not any(tmp_path.iterdir())


def test_what_a_kill_between_the_two_renames_left_is_no_obstacle(tmp_path):
    publish(tmp_path, 1)
    old = tmp_path / ".staging-old-checkpoint-1"
    write(old.mkdir() or old)
    publish(tmp_path, 1)  # over the one that is there
    assert files.find_damage(tmp_path / "checkpoint-1") is None


def test_a_named_one_that_is_damaged_or_missing_is_refused(tmp_path):
    publish(tmp_path, 1)
    with pytest.raises(UserError, match="checkpoint-1"):
        RunFolder(tmp_path).find_checkpoint("checkpoint-7")
    (tmp_path / "checkpoint-1" / "state.json").unlink()
    with pytest.raises(UserError, match="state.json is missing"):
        RunFolder(tmp_path).find_checkpoint("checkpoint-1")
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        RunFolder(tmp_path).find_checkpoint("latest")


def test_a_manifest_cannot_point_outside(tmp_path):
    publish(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    manifest = tmp_path / "checkpoint-1" / files.MANIFEST
    manifest.write_text(json.dumps({"../secret": {"size": 1, "sha256": "0"}}))
    assert "outside" in files.find_damage(tmp_path / "checkpoint-1")


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    publish(tmp_path, 1, 2, 3, 4)
    RunFolder(tmp_path).prune(tmp_path / "checkpoint-4", 2, keep=tmp_path / "checkpoint-1")
    assert [p.name for p in RunFolder(tmp_path).list_checkpoints()] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_constructing_a_folder_touches_nothing_and_claiming_it_is_exclusive(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.path.exists()
    with folder.claim(resume=False, overwrite=False):
        with pytest.raises(UserError, match="another process"), folder.claim(resume=False, overwrite=False):
            pass
    with folder.claim(resume=False, overwrite=False):  # the lock is free again
        folder.write_config({"seed": 1})
        folder.confirm()
    assert folder.read_config() == {"seed": 1}
    with pytest.raises(UserError, match="holds another run"), folder.claim(resume=False, overwrite=False):
        pass
    with folder.claim(resume=True, overwrite=True):  # a resume never deletes
        assert folder.read_config() == {"seed": 1}
    with folder.claim(resume=False, overwrite=True):
        assert folder.read_config() == {}


def files_of(folder):
    """Returns the content of each file, but of locks and lists."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".files.json"))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def start_run(folder, seed=0, confirm=True, **options):
    """Writes what a run writes: settings, a grid, a model and a checkpoint."""
    with folder.claim(**{"resume": False, "overwrite": False} | options):
        folder.write_config({"seed": seed})
        folder.record(folder.grid(1))
        folder.grid(1).parent.mkdir(exist_ok=True)
        folder.grid(1).write_text(f"grid {seed}")
        folder.place(lambda staging: (staging / "model_index.json").write_text(f"{seed}"))
        if not confirm:
            raise KeyboardInterrupt
        folder.confirm()
        folder.publish_checkpoint(seed + 1, lambda staging: (staging / "state.json").write_text("{}"))


OWN_FILES = {
    "mine.py": "print()",
    "photo.png": "p",
    "samples/step-mine.txt": "t",
    "unet/notes.txt": "n",
    "data/a.png": "a",
}


def put_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_overwriting_replaces_what_the_run_wrote_and_nothing_else(tmp_path):
    start_run(RunFolder(tmp_path))
    put_files(tmp_path, OWN_FILES)
    start_run(RunFolder(tmp_path), seed=5, overwrite=True)
    found = files_of(tmp_path)
    assert found.items() >= OWN_FILES.items()
    assert (found["config.yaml"], found["samples/step-0000001.png"]) == ("seed: 5\n", "grid 5")
    assert [path.name for path in RunFolder(tmp_path).list_checkpoints()] == ["checkpoint-6"]
    assert not list(tmp_path.glob(".replaced")) and not list(tmp_path.glob(files.STAGING + "*"))


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_takes_no_step_replaces_none(tmp_path, killed, monkeypatch):
    start_run(RunFolder(tmp_path))
    put_files(tmp_path, OWN_FILES)
    before = files_of(tmp_path)
    if killed:  # nothing is undone then
        monkeypatch.setattr(RunFolder, "_undo", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        start_run(RunFolder(tmp_path), seed=5, overwrite=True, confirm=False)
    if killed:
        assert files_of(tmp_path) != before
        monkeypatch.undo()
        with pytest.raises(UserError, match="holds another run"):
            start_run(RunFolder(tmp_path), seed=6)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("step", range(12))
def test_a_kill_at_any_moment_of_putting_aside_and_back_loses_nothing(tmp_path, step, monkeypatch):
    start_run(RunFolder(tmp_path))
    before = files_of(tmp_path)

    def killed_after(count):
        left = iter(range(count))

        def replace(source, target, replace=os.replace):
            if next(left, None) is None:
                raise SystemExit
            replace(source, target)

        return replace

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_undo", lambda self: None)
        patch.setattr("tiny_diffusers.runs.os.replace", killed_after(step))
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            start_run(RunFolder(tmp_path), seed=5, overwrite=True, confirm=False)
    with monkeypatch.context() as patch:
        patch.setattr("tiny_diffusers.runs.os.replace", killed_after(step % 4))
        with pytest.raises((SystemExit, UserError)):
            start_run(RunFolder(tmp_path), seed=6)
    with pytest.raises(UserError, match="holds another run"):
        start_run(RunFolder(tmp_path), seed=7)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["README.md", "run.json", "samples.png", "checkpoint-5000/weights", "unet/config.json", "pipeline_tiny.py"]
)
def test_files_of_another_origin_are_not_replaced(tmp_path, name):
    put_files(tmp_path, {name: "x"})
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"that no run has written .{name.partition('/')[0]}"):
            start_run(RunFolder(tmp_path), overwrite=overwrite)
    assert files_of(tmp_path) == {name: "x"}


def test_a_cloned_repository_can_be_trained_into_and_keeps_its_card(tmp_path):
    put_files(tmp_path, {"README.md": "about tiny-diffusers", ".gitattributes": ""})
    folder = RunFolder(tmp_path)
    start_run(folder)
    folder.keep_foreign_card()
    folder.record(folder.card)
    folder.card.write_text("the card")
    folder.keep_foreign_card()
    assert (tmp_path / "README.original.md").read_text() == "about tiny-diffusers"
    start_run(folder, seed=1, overwrite=True)
    assert not folder.card.exists() and (tmp_path / "README.original.md").exists()


def test_a_run_of_an_earlier_version_owns_what_such_a_run_wrote(tmp_path):
    start_run(RunFolder(tmp_path))
    put_files(tmp_path, OWN_FILES | {"README.md": "my own", "reports/ddim-50/report.json": "{}"})
    (tmp_path / ".files.json").unlink()
    start_run(RunFolder(tmp_path), resume=True, seed=3)
    assert (tmp_path / ".files.json").is_file()
    (tmp_path / ".files.json").unlink()
    with pytest.raises(UserError, match="that no run has written .README.md"):
        start_run(RunFolder(tmp_path), seed=5, overwrite=True)
    (tmp_path / "README.md").unlink()
    start_run(RunFolder(tmp_path), seed=5, overwrite=True)
    assert files_of(tmp_path).items() >= OWN_FILES.items()
    assert [path.name for path in RunFolder(tmp_path).list_checkpoints()] == ["checkpoint-6"]
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize("name", ["config.yaml", "samples"])
def test_no_link_leads_a_run_out_of_its_folder(tmp_path, name):
    outside = tmp_path / "outside"
    put_files(outside, {"config.yaml": "a", "samples/step-0000001.png": "b"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(outside / name)
    before = files_of(outside)
    with pytest.raises(UserError, match="is a link, or lies behind one"):
        start_run(RunFolder(tmp_path / "run"), overwrite=True)
    assert files_of(outside) == before


@pytest.mark.parametrize("names", ['["../outside", "/etc/passwd", "a/../../outside", 3, ""]', "{}", "[[", "3"])
def test_a_hostile_list_deletes_nothing_elsewhere(tmp_path, names):
    put_files(tmp_path, {"outside": "x", "run/config.yaml": "seed: 1", "run/.files.json": names})
    with contextlib.suppress(UserError):
        start_run(RunFolder(tmp_path / "run"), overwrite=True)
    assert (tmp_path / "outside").read_text() == "x"


def test_the_report_of_a_folder_is_the_published_one_or_the_only_one(tmp_path):
    run = RunFolder(tmp_path)
    assert run.find_report() == tmp_path / "report.json"  # which is missing
    reports = [run.reports / name / "report.json" for name in ("a", "b")]
    for report in reports:
        report.parent.mkdir(parents=True)
    reports[0].touch()
    assert run.find_report() == reports[0]
    reports[1].touch()
    with pytest.raises(UserError, match=r"2 reports \(a, b\) and none is published"):
        run.find_report()
    run.publish_report("b")
    assert run.find_report() == reports[1]
    run.published.unlink()
    run.report.touch()  # of an earlier version, which wrote the card's report there
    assert run.find_report() == run.report


def test_too_full_a_disk_is_refused_before_training(tmp_path):
    with (
        pytest.raises(UserError, match="MB free"),
        RunFolder(tmp_path).claim(resume=False, overwrite=False, needed_bytes=10**18),
    ):
        pass


@pytest.mark.parametrize("names", [["."], ["..", "../victim.txt"], ["/victim.txt"], ["data/a.png"], ["unet/\0x.py"]])
@pytest.mark.parametrize("aside", [True, False])
def test_a_list_of_files_names_those_of_a_run_alone(tmp_path, names, aside):
    folder = RunFolder(tmp_path / "run")
    start_run(folder)
    victim = tmp_path / "victim.txt"
    put_files(tmp_path, {"victim.txt": "precious"})
    put_files(folder.path, OWN_FILES)
    names = [name.replace("/victim", f"{tmp_path}/victim") if name.startswith("/") else name for name in names]
    (folder.path / ".files.json").write_text(json.dumps(names))
    if aside:  # as after a kill, so that a restore begins
        put_files(folder.path / ".replaced", {".files.json": "[]"})
    before = files_of(folder.path)
    with pytest.raises(UserError), folder.claim(resume=False, overwrite=False):
        pass
    assert folder.list_shared() is not None and victim.read_text() == "precious"
    assert files_of(folder.path).items() >= {name: before[name] for name in [*OWN_FILES, "config.yaml"]}.items()


def test_a_refusal_deletes_nothing(tmp_path):
    theirs = {".staging-area/a.txt": "a", ".replaced/k": "k", "README.md": "mine"}
    put_files(tmp_path, theirs)
    with pytest.raises(UserError, match="README.md"), RunFolder(tmp_path).claim(resume=False, overwrite=False):
        pass
    assert files_of(tmp_path) == theirs


def test_a_link_in_place_of_the_run_that_is_replaced_is_not_followed(tmp_path):
    mine, evil = RunFolder(tmp_path / "mine"), RunFolder(tmp_path / "evil")
    for folder in (mine, evil):
        start_run(folder)
    (evil.path / ".replaced").symlink_to(mine.path)
    before = files_of(mine.path)
    with pytest.raises(UserError), evil.claim(resume=False, overwrite=False):
        pass
    assert files_of(mine.path) == before


def test_links_on_the_list_are_neither_shared_nor_written_through(tmp_path):
    folder = RunFolder(tmp_path / "run")
    start_run(folder)
    put_files(tmp_path, {"id_rsa": "SECRET"})
    folder.record(folder.samples)
    folder.samples.symlink_to(tmp_path / "id_rsa")
    assert "samples.png" not in folder.list_shared()
    with pytest.raises(UserError, match="is a link"):
        folder.record(folder.samples)
    files.replace_file(folder.samples, "new")
    assert (tmp_path / "id_rsa").read_text() == "SECRET" and folder.samples.read_text() == "new"


def test_placing_files_replaces_none_that_no_run_has_written(tmp_path):
    mine = {"README.md": "mine", "samples.png": "s", "unet/config.json": "c"}
    put_files(tmp_path, mine)

    def write(staging):
        put_files(staging, {"model_index.json": "{}", "unet/config.json": "{}"})

    with pytest.raises(UserError, match="no run has written .unet/config.json"):
        RunFolder(tmp_path).place(write)
    assert files_of(tmp_path) == mine


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [".files.json", "run.json", "config.yaml", "README.md", "reports/published"])
def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path, name):
    folder = RunFolder(tmp_path)
    folder.reports.mkdir()
    os.mkfifo(tmp_path / name)
    for read in (folder.list_files, folder.list_shared, folder.find_report):
        read()
    for read in (folder.read_facts, folder.read_config):
        with contextlib.suppress(UserError):
            read()


def test_lines_of_a_log_that_are_no_steps_and_losses_are_skipped(tmp_path):
    lines = ["[" * 100_000, "{", "7", '{"step": Infinity, "loss": 1}', '{"step": -1, "loss": 1}', '{"loss": 1}']
    lines += ['{"step": 1e300, "loss": 1}', f'{{"step": 1, "loss": 1{"0" * 400}}}', '{"step": 2, "loss": NaN}']
    (tmp_path / "train_log.jsonl").write_text("\n".join([*lines, '{"step": 3, "loss": 0.5}']))
    (steps, losses) = read_log(tmp_path / "train_log.jsonl")["loss"]
    assert (steps.tolist(), losses.tolist()) == ([3], [0.5])


def test_what_a_killed_run_logged_after_its_checkpoint_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append_log({"step": step, "loss": 0.5})
    with folder.log.open("a") as log:
        log.write('{"step": 4, "lo')
    folder.trim_log(2)
    assert [json.loads(line)["step"] for line in folder.log.read_text().splitlines()] == [1, 2]


def test_yaml_that_expands_without_bounds_is_refused():
    levels = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    merges = "".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdef", "bcdefg", strict=True)
    )
    for text in (f"a: &a [x]\n{levels}", f"a: &a {{x: 1}}\n{merges}", "a: &a [*a]", "[" * 5000):
        with pytest.raises(yaml.YAMLError, match="expands to more|nested too deeply"):
            files.load_yaml(text)
    shared = {"generator_channels": [8, 16]}
    shared["discriminator_channels"] = shared["generator_channels"]  # which PyYAML writes as an alias
    assert files.load_yaml(yaml.safe_dump(shared)) == shared


def test_no_is_a_word_in_yaml():
    text = "mixed_precision: no\nuse_ema: false\nrandom_flip: True\nsplit: on\nsteps: 3\nempty:"
    expected = {
        "mixed_precision": "no",
        "use_ema": False,
        "random_flip": True,
        "split": "on",
        "steps": 3,
        "empty": None,
    }
    assert files.load_yaml(text) == expected


@pytest.mark.parametrize("facts", [{"seconds": "x"}, {"data": [1]}, {"global_batch": None}, {"global_batch": 1.5}])
def test_facts_of_another_type_are_named(tmp_path, facts):
    (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=f"run.json is damaged .{next(iter(facts))} is "):
        RunFolder(tmp_path).read_facts()


def test_what_killed_writers_leave_is_deleted_by_those_that_follow(tmp_path):
    publish(tmp_path, 1)
    left, live = (
        tmp_path / f"{files.STAGING}checkpoint-2-{'a' * 8}",
        tmp_path / f"{files.STAGING}checkpoint-3-{'b' * 8}",
    )
    for folder in (left, live):
        folder.mkdir()
    os.utime(left, (0, 0))
    publish(tmp_path, 4)  # another process may be writing the younger one
    assert not left.exists() and live.exists()
    with RunFolder(tmp_path).claim(resume=True, overwrite=False):
        assert not live.exists()


def test_the_checkpoints_after_one_are_those_of_later_steps_in_the_same_folder(tmp_path):
    publish(tmp_path, 9, 10, 100)
    (tmp_path / "copy").mkdir()
    run = RunFolder(tmp_path)
    assert run.list_checkpoints_after(run.checkpoint(9)) == [run.checkpoint(10), run.checkpoint(100)]
    for checkpoint in (run.checkpoint(100), tmp_path / "copy", tmp_path / "elsewhere" / "checkpoint-9", None):
        assert run.list_checkpoints_after(checkpoint) == []


def test_a_checkpoint_that_is_being_deleted_is_none_any_more(tmp_path, monkeypatch):
    publish(tmp_path, 1, 2, 3)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed at its first file
    run = RunFolder(tmp_path)
    run.prune(run.checkpoint(3), limit=1)
    assert [path.name for path in run.list_checkpoints()] == ["checkpoint-3"]
