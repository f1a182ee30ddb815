"""What the app draws, what it refuses, and which work it stops."""

import io
import queue
import re
import shlex
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from tiny_diffusers import TinyPipeline, cli
from tiny_diffusers.app import about, compare, controls, edit, generate, look, requests, walk
from tiny_diffusers.app.models import ModelStore, list_models, published_checkpoints, read_model
from tiny_diffusers.app.requests import Stopped, Task, Tasks
from tiny_diffusers.commands.app import app_parser
from tiny_diffusers.errors import UserError
from tiny_diffusers.plots import Strip


FAMILIES = ("diffusion", "conditional", "flow", "pixelcnn", "vae", "dcgan")
CONDITIONAL = FAMILIES.index("conditional")
SAMPLING = (3, "", 1, 1, "")  # steps, sampler, guidance, eta, thresholding


@pytest.fixture
def tab(store):
    """Builds a tab of a page."""

    def build(kind):
        with gr.Blocks(analytics_enabled=False):
            return kind(store, Tasks(), gr.Dropdown([0]))

    return build


def last(outputs):
    return list(outputs)[-1]


def same(images, others):
    return len(images) == len(others) and all(
        np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(images, others, strict=True)
    )


def run_command(command: str, output: Path) -> None:
    """Runs a command that the app shows, with another output."""
    words = shlex.split(command)[1:]
    words = words[:-2] if "--output" in words else words
    assert cli.main([*words, "--device", "cpu", "--output", str(output)]) == 0


# --------------------------------------------------------------------------------------------------------- the models


def test_configs_tell_the_family_the_size_and_the_classes(store):
    facts = {model.name: (model.family, model.objective, model.size, model.classes) for model in store.models}
    names = ("cat", "dog", "frog")
    assert facts == {
        "diffusion": ("diffusion", "betas", (8, 8), ()),
        "conditional": ("diffusion", "betas", (8, 8), names),
        "flow": ("diffusion", "flow", (8, 8), ()),
        "pixelcnn": ("pixelcnn", "betas", (8, 8), names),
        "vae": ("vae", "betas", (8, 8), ()),
        "dcgan": ("dcgan", "betas", (8, 8), ()),
    }
    assert [model.can_walk for model in store.models] == [True, True, True, False, True, True]
    assert [model.can_edit for model in store.models] == [True, True, True, True, True, False]


def test_the_published_models_are_listed_without_a_checkpoint():
    assert [model.name for model in list_models(published_checkpoints())] == ["mnist-32", "digits-8"]


def test_models_of_one_last_name_are_told_apart(checkpoints, tmp_path):
    other = tmp_path / "diffusion"
    other.symlink_to(checkpoints["diffusion"])
    names = [model.name for model in list_models([str(checkpoints["diffusion"]), str(other)])]
    assert names == [str(checkpoints["diffusion"]), str(other)]


@pytest.mark.parametrize(
    ("file", "content"),
    [("model_index.json", "{}"), ("model_index.json", "["), ("unet/config.json", '{"sample_size": []}')],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoints, tmp_path, file, content):
    import shutil

    folder = shutil.copytree(checkpoints["diffusion"], tmp_path / "damaged")
    (folder / file).write_text(content)
    with pytest.raises(UserError) as error:
        read_model(str(folder), "damaged")
    assert "\n" not in str(error.value)


def test_a_model_is_loaded_once_and_keeps_its_scheduler(store):
    with store.use(0) as (pipe,):
        saved = pipe.scheduler
        pipe.scheduler = type(saved).from_config(saved.config, timestep_spacing="trailing")
    with store.use(0) as (again,):
        assert again is pipe and again.scheduler is saved


def test_the_least_recently_used_model_is_dropped_over_the_limit(checkpoints):
    listed = list_models([str(checkpoints[name]) for name in ("diffusion", "vae", "dcgan")])
    sizes = []
    for index in range(3):
        single = ModelStore(listed, device="cpu")
        with single.use(index):
            sizes.append(next(iter(single._loaded.values()))[1])
    store = ModelStore(listed, max_bytes=sum(sizes) - 1, device="cpu")
    for index in (0, 1, 0, 2):
        with store.use(index):
            pass
    assert store.loaded == [0, 2]
    tight = ModelStore(listed, max_bytes=0, device="cpu")
    for index in range(3):
        with tight.use(index):
            pass
    assert tight.loaded == [2]


@pytest.mark.parametrize("index", ["../secret", "owner/name", -1, 6, 0.0, True, None, [0]])
def test_only_listed_models_can_be_loaded(store, tab, index):
    loaded = store.loaded
    with pytest.raises(gr.Error, match="There is no model number"):
        last(tab(generate.GenerateTab).generate(None, index, 1, 0, [], *SAMPLING, 1, 1))
    assert store.loaded == loaded


# ----------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("index", range(len(FAMILIES)), ids=FAMILIES)
def test_the_shown_command_and_lines_draw_the_same_pixels(store, tab, tmp_path, index):
    sampler = "euler_ancestral" if FAMILIES[index] == "diffusion" else ""
    classes = list(store.models[index].classes[:2])
    values = (4, 3, classes, 3, sampler, 2.0, 0.5, "0.995", 0.9, 0.7)
    outputs = last(tab(generate.GenerateTab).generate(None, index, *values))
    picture, text, images, _, command, python = outputs
    assert len(images) == 4 and text.startswith("4 images in ") and picture.width > 4 * 8
    run_command(command, tmp_path / "images")
    assert same(images, [Image.open(file) for file in sorted((tmp_path / "images").iterdir())])
    lines = {}
    exec(python, lines)
    assert same(images, lines["images"])


def test_the_archive_holds_the_images(tab):
    for outputs in tab(generate.GenerateTab).generate(None, 0, 2, 0, [], *SAMPLING, 1, 1):
        if isinstance(outputs[2], list):  # its file is there until the next one is asked for
            with zipfile.ZipFile(outputs[3]["value"]) as archive:
                names = archive.namelist()
                saved = [Image.open(io.BytesIO(archive.read(name))) for name in names]
    assert names == ["00000.png", "00001.png"] and same(outputs[2], saved)


def test_each_step_reports_and_previews_the_predicted_image(store):
    task, reports = Task(), []
    args = generate.sample_parser().parse_args(["x", "--num_images", "2", "--num_inference_steps", "3"])
    with store.use(0) as (pipe,):
        plan = generate.plan_samples(pipe, args)
        task.report = lambda text, draw: reports.append((text, draw()))
        images, _ = generate.draw_plan(pipe, plan, args, **requests.watch(pipe, task, plan.picture))
    assert [text for text, _ in reports] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert same([reports[-1][1]], [plan.picture(images)])  # the last prediction is the image
    assert not same([reports[0][1]], [plan.picture(images)])


def test_the_rows_of_a_pixelcnn_appear_one_by_one(store, index_of):
    task, reports = Task(), []
    words = ["x", "--num_images", "1", "--class_labels", "cat"]
    with store.use(index_of["pixelcnn"]) as (pipe,):
        plan = generate.plan_samples(pipe, args := generate.sample_parser().parse_args(words))
        task.report = lambda text, draw: reports.append((text, np.asarray(draw())))
        (image,), _ = generate.draw_plan(pipe, plan, args, **requests.watch(pipe, task, lambda images: images[0]))
    assert [text for text, _ in reports] == [f"row {i} of 8" for i in range(1, 9)]
    for i, (_, picture) in enumerate(reports):
        assert np.array_equal(picture[: i + 1], np.asarray(image)[: i + 1])
        assert not picture[i + 1 :].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: 65}, "Number of images: 65 is not from 1 to 64"),
        ({0: 10**12}, "is not from 1 to 64"),
        ({0: float("nan")}, "nan is not a whole number"),
        ({0: "4; rm"}, "is not a whole number"),
        ({1: -1}, "Seed: -1 is not from 0"),
        ({3: 10_000}, "Steps: 10000 is not from 1 to 250"),
        ({3: 2.5}, "Steps: 2.5 is not a whole number"),
        ({4: "../../etc/passwd"}, "Unknown --scheduler"),
        ({4: "--output=x"}, "expected one argument"),
        ({5: float("inf")}, "Guidance scale: inf is not a number"),
        ({6: float("nan")}, "Eta: nan is not a number"),
        ({6: 3}, "`eta` must be in"),
        ({2: ["unicorn"]}, "Unknown class 'unicorn'"),
        ({7: "1 2"}, "dynamic_thresholding"),
    ],
)
def test_mistakes_are_one_clear_line(tab, changes, words):
    values = [4, 0, [], *SAMPLING, 1, 1]
    for position, value in changes.items():
        values[position] = value
    with pytest.raises(gr.Error) as error:
        last(tab(generate.GenerateTab).generate(None, CONDITIONAL, *values))
    assert words in error.value.message and "\n" not in error.value.message


# ---------------------------------------------------------------------------------------------- walk, edit, look inside


@pytest.mark.parametrize("name", ["conditional", "vae", "dcgan"])
def test_the_shown_commands_walk_the_same_frames(store, tab, index_of, tmp_path, name):
    model = store.models[index_of[name]]
    ends = model.classes[:2] or (None, None)
    page = tab(walk.WalkTab)
    outputs = last(page.walk(None, index_of[name], 0, 1, *ends, 4, "slerp", 3, "", 1))
    first, frames = outputs[0], outputs[-1]
    gif_command, picture_command = outputs[4].splitlines()
    run_command(gif_command, tmp_path / "frames")
    images = [Image.open(file) for file in sorted((tmp_path / "frames").iterdir())]
    rows = (
        [Strip(images, label="DDIM"), Strip(images, label="DDPM")] if model.family == "diffusion" else [Strip(images)]
    )
    assert same([first], frames[:1])
    for frame, expected in zip(frames, walk.frame_pictures(rows), strict=True):
        width = frame.width // len(rows)  # of the path without noise
        assert np.array_equal(np.asarray(frame)[:, :width], np.asarray(expected)[:, :width])
    run_command(picture_command, tmp_path / "walk.png")
    assert same([page.show(frames, 3), page.show(frames, 99)], [frames[2], frames[3]])


def _drawing(side=64):
    """Draws a white stroke on black, and paints a corner in red."""
    picture = Image.new("RGBA", (side, side), "black")
    picture.paste("white", (side // 4, 0, side // 2, side))
    layer = Image.new("RGBA", (side, side))
    layer.paste((255, 0, 0, 255), (side // 2, side // 2, side, side))
    return {"background": picture, "layers": [layer], "composite": Image.alpha_composite(picture, layer)}


@pytest.mark.parametrize(
    ("task", "area"),
    [
        (edit.VARY, ""),
        (edit.INPAINT, "painted in red"),
        (edit.INPAINT, "left half"),
        (edit.ENLARGE, ""),
        (edit.DEBLUR, ""),
    ],
)
def test_the_shown_command_edits_to_the_same_picture(tab, tmp_path, monkeypatch, task, area):
    for outputs in tab(edit.EditTab).edit(
        None, 0, _drawing(), task, 0.5, area, 2, 1.0, True, 0.5, None, 2, 0, 3, "", 1, 1
    ):
        if isinstance(outputs[2], list):  # its file is there until the next one is asked for
            with zipfile.ZipFile(outputs[3]["value"]) as file:
                file.extractall(tmp_path)
    picture, _, results, _, command = outputs
    monkeypatch.chdir(tmp_path)
    run_command(command, tmp_path / "edited.png")
    assert same([picture], [Image.open("edited.png")])
    assert same(results, [Image.open("result-00.png"), Image.open("result-01.png")])


def test_what_is_painted_in_red_is_hidden():
    mask = np.asarray(edit.find_mask(_drawing(), "painted in red", (8, 8)))
    assert (mask[4:, 4:] == 255).all() and mask.sum() == 16 * 255
    lower = np.asarray(edit.find_mask(_drawing(), "lower half", (8, 8)))
    assert (lower[4:] == 255).all() and not lower[:4].any()
    with pytest.raises(UserError, match="Nothing is painted in red"):
        edit.find_mask(_drawing() | {"layers": []}, "painted in red", (8, 8))


def test_a_pixelcnn_completes_below_the_rows_that_are_kept(tab, index_of):
    values = (0.5, "", 2, 1.0, True, 0.5, "cat", 3, 0, 3, "", 1, 1)
    _, _, results, _, python = last(
        tab(edit.EditTab).edit(None, index_of["pixelcnn"], _drawing(), edit.COMPLETE, *values)
    )
    given = np.asarray(edit.fit_picture(_drawing()["composite"], (8, 8), 1))
    assert len(results) == 3 and "mask=mask" in python
    for image in map(np.asarray, results):
        assert np.array_equal(image[:4], given[:4])
    assert not same(results[:1], results[1:2])


def test_a_vae_reconstructs(tab, checkpoints, index_of):
    values = (0.5, "", 2, 1.0, True, 0.5, None, 1, 0, 3, "", 1, 1)
    _, _, results, *_ = last(tab(edit.EditTab).edit(None, index_of["vae"], _drawing(), edit.RECONSTRUCT, *values))
    pipe = TinyPipeline.from_pretrained(checkpoints["vae"])
    given = edit.fit_picture(_drawing()["composite"], (8, 8), 1)
    difference = np.asarray(results[0]).astype(int) - np.asarray(pipe.reconstruct([given]).images[0])
    assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("drawing", "task", "words"),
    [
        (None, edit.VARY, "There is no picture"),
        ({"composite": None}, edit.VARY, "There is no picture"),
        ("drawing", edit.COMPLETE, "has no 'Complete', but Variations, Inpaint"),
        ("drawing", "/etc/passwd", "has no '/etc/passwd'"),
    ],
)
def test_an_edit_without_picture_or_task_is_refused(tab, drawing, task, words):
    drawing = _drawing() if drawing == "drawing" else drawing
    with pytest.raises(gr.Error, match=re.escape(words)):
        last(tab(edit.EditTab).edit(None, 0, drawing, task, 0.5, "", 2, 1.0, True, 0.5, None, 2, 0, 3, "", 1, 1))


@pytest.mark.parametrize("view", [look.PREDICTIONS, look.FORWARD, look.SCHEDULE])
def test_a_look_inside_is_the_picture_of_the_shown_command(tab, tmp_path, view):
    picture, _, command = last(tab(look.LookTab).look(None, CONDITIONAL, view, 1, "dog", 3, 4, "", 1))
    assert picture.width > 100
    if view == look.PREDICTIONS:
        run_command(command, tmp_path / "picture.png")
        assert same([picture], [Image.open(tmp_path / "picture.png")])
    assert bool(command) == (view != look.FORWARD)


def test_the_nearest_training_image_of_a_training_image_is_itself(monkeypatch):
    (model,) = list_models([path for path in published_checkpoints() if path.endswith("digits-8")])
    assert look.NEAREST in look.views_of(model)
    from sklearn.datasets import load_digits

    image = Image.fromarray(np.uint8(load_digits().images[5] * 255 / 16))
    drawn = []
    monkeypatch.setattr("tiny_diffusers.plots.captioned_strips", lambda strips: drawn.extend(strips))
    look.nearest_picture(model, [image])
    sample, nearest = drawn
    assert len(nearest.captions) == 1 and float(nearest.captions[0]) < 0.5
    assert sample.images == [image]


def test_models_are_compared_from_the_same_seeds(store, tmp_path):
    with gr.Blocks(analytics_enabled=False):
        tab = compare.CompareTab(store, Tasks())
    picture, _, metrics, command = last(tab.compare(None, [0, 1, 4], 3, 0, 3))
    run_command(command, tmp_path / "samples.png")
    assert same([picture], [Image.open(tmp_path / "samples.png")])
    assert "No model has a report" in metrics
    with pytest.raises(gr.Error, match="choose from 1 to"):
        last(tab.compare(None, [], 3, 0, 3))


def test_metrics_of_a_report_are_tabulated():
    (model,) = list_models([path for path in published_checkpoints() if path.endswith("mnist-32")])
    table = compare.metrics_of([model])
    assert "mnist-32" in table and "|" in table


# ------------------------------------------------------------------------------------------------------ what is shown


def test_a_change_of_the_model_shows_what_it_has_a_use_for(store):
    for model in store.models:
        for module in (generate, walk, edit, look):
            assert all(isinstance(changes, dict) for changes in module.settings(model))
        steps, _, guidance, _, _ = controls.sampling_settings(model)
        assert steps["visible"] == (model.family == "diffusion")
        assert guidance["visible"] == (model.name == "conditional")
    kinds = {model.name: edit.tasks_of(model) for model in store.models}
    assert kinds["pixelcnn"] == [edit.COMPLETE] and kinds["vae"] == [edit.RECONSTRUCT] and kinds["dcgan"] == []


def test_a_card_and_the_names_of_classes_are_no_html(checkpoints, tmp_path):
    import dataclasses

    model = read_model(str(checkpoints["conditional"]), "<script>alert(1)</script>")
    model = dataclasses.replace(model, classes=("<img src=x onerror=alert(1)>",), folder=tmp_path)
    (tmp_path / "README.md").write_text("<script>alert(2)</script>")
    assert "<" not in about.facts_of(model)
    assert about.card_of(model) == "<script>alert(2)</script>"
    with gr.Blocks(analytics_enabled=False) as page:
        about.AboutTab(ModelStore([model]), gr.Dropdown([0]), page)
    assert [type(block) for block in page.blocks.values() if getattr(block, "label", "") == "Model card"] == [gr.Code]


# ------------------------------------------------------------------------------------------------- tasks and uploads


def test_a_stopped_task_ends_at_its_next_report():
    task, reached = Task(), queue.SimpleQueue()

    def work(task):
        while True:
            reached.put(None)
            task.report("working")

    stream = task.run(work)
    assert next(stream).text == "working"
    task.stop()
    with pytest.raises(Stopped):
        list(stream)


def test_a_request_that_is_given_up_ends_its_work():
    ended = threading.Event()

    def work(task):
        try:
            while True:
                task.report("working")
        except Stopped:
            ended.set()
            raise

    stream = Task().run(work)
    next(stream)
    stream.close()
    assert ended.wait(10)


def test_a_stop_is_for_the_tasks_of_its_own_session():
    tasks = Tasks()
    first, second = SimpleNamespace(session_hash="a"), SimpleNamespace(session_hash="b")
    going_on = threading.Event()

    def work(task):
        while not going_on.is_set():
            task.report("working")
        return "done"

    streams = tasks.run(first, work), tasks.run(second, work)
    for stream in streams:
        next(stream)
    tasks.stop(first)
    with pytest.raises(Stopped):
        list(streams[0])
    going_on.set()
    assert last(streams[1]) == "done"
    assert not tasks._tasks


@pytest.mark.parametrize("kind", [generate.GenerateTab, walk.WalkTab, edit.EditTab, look.LookTab])
def test_gradio_tells_a_handler_its_session(tab, kind):
    """It does for positional parameters alone."""
    page = tab(kind)
    handler = getattr(page, kind.__name__.removesuffix("Tab").lower())
    inputs, *_ = gr.helpers.special_args(handler, [0], request="of the session")
    assert inputs[:2] == ["of the session", 0]


def test_an_error_of_the_work_is_the_requests():
    def work(task):
        raise UserError("of the work")

    with pytest.raises(UserError, match="of the work"):
        list(Task().run(work))


def test_what_nobody_foresaw_is_logged_and_told_in_a_line(caplog, monkeypatch):
    monkeypatch.setattr(requests.logger.parent.parent, "propagate", True)

    @requests.answers
    def handler():
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(gr.Error) as error:
        handler()
    assert "first line" in error.value.message and "second" not in error.value.message
    assert "RuntimeError" in caplog.text


def _png(width, height):
    """Returns a PNG that says it has this size, and holds hardly a pixel."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", "can't be read as a picture"),
        (b"", "can't be read as a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "can't be read as a picture"),
        (_png(100_000, 100_000), "can't be read as a picture"),
        (_png(5000, 5000), "5000 x 5000 pixels: give one of at most"),
        (b"\0" * (requests.MAX_UPLOAD_BYTES + 1), "give one of at most 8 MB"),
    ],
)
def test_uploads_are_checked_before_they_are_decoded(content, words):
    with pytest.raises(UserError, match=re.escape(words)):
        requests.check_upload(content)
    editor = requests.checked(gr.ImageEditor(type="pil"))
    with pytest.raises(gr.Error, match=re.escape(words)):
        editor.convert_and_format_image(content)


def test_a_cut_off_upload_is_refused_in_one_line():
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(stream, "PNG")
    editor = requests.checked(gr.ImageEditor(type="pil"))
    with pytest.raises(gr.Error, match="can't be read as a picture"):
        editor.convert_and_format_image(stream.getvalue()[:-3000])


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_app_is_served_at_this_machine_alone_by_default():
    args = app_parser().parse_args([])
    assert args.host == "127.0.0.1" and not args.share and args.auth is None
    assert app_parser().parse_args(["--queue-size", "3", "--auth", "me:a:b"]).auth == ("me", "a:b")


@pytest.mark.parametrize("words", [["--port", "0"], ["--port", "65536"], ["--auth", "me"], ["--queue_size", "0"]])
def test_mistakes_of_the_command_are_one_line(words, capsys):
    assert cli.main(["app", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("tiny_diffusers.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("tiny_diffusers.app", raising=False)
    assert cli.main(["app"]) == 2
    assert "pip install tiny-diffusers[app]" in capsys.readouterr().err


def test_no_module_of_the_app_holds_a_leftover_of_gradio():
    assert not list(Path(walk.__file__).parent.glob("*.pyi"))
