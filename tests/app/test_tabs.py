"""Each tab on a tiny model of each family, by the functions that the page calls."""

import io
import json
import shlex
import shutil
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from tiny_diffusers import TinyPipeline
from tiny_diffusers.app.about import card_of, curves_of, facts_of
from tiny_diffusers.app.compare import CompareTab, metrics_of
from tiny_diffusers.app.controls import class_words
from tiny_diffusers.app.edit import EditTab, find_mask, tasks_of
from tiny_diffusers.app.generate import GenerateTab
from tiny_diffusers.app.look import LookTab, training_words, views_of
from tiny_diffusers.app.models import ModelStore, list_models, published_checkpoints
from tiny_diffusers.app.requests import Tasks
from tiny_diffusers.app.server import build, shown_tabs
from tiny_diffusers.app.snippets import python_of_completion
from tiny_diffusers.app.uploads import fit_picture
from tiny_diffusers.app.walk import WalkTab
from tiny_diffusers.cli import main


FAMILIES = ("diffusion", "conditional", "flow", "pixelcnn", "vae", "dcgan", "rectangle", "channels", "conditions")
FAMILIES += ("vae_of_all", "pixelcnn_of_all")
PICTURE = Image.linear_gradient("L").convert("RGB")
TABS = ("generate", "walk", "edit", "look", "compare")
FEW = {"Number of images": 4, "Steps": 3}


def last(outputs):
    *_, final = outputs
    return final


def pixels(images):
    return [np.asarray(image) for image in images]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def run_command(tmp_path, monkeypatch):
    """Runs a command of the page; returns the pictures that it writes."""

    def run(line, output):
        program, *words = shlex.split(line)
        assert program == "tiny-diffusers"
        words[words.index("--output") + 1] = str(tmp_path / output)
        (tmp_path / output).mkdir() if not Path(output).suffix else None
        assert main(words) == 0
        return sorted((tmp_path / output).iterdir()) if not Path(output).suffix else [tmp_path / output]

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_images_are_those_of_the_command_and_of_the_python_lines(
    store, index_of, open_tab, run_command, family
):
    model = store.models[index_of[family]]
    few = FEW if model.family == "diffusion" else {"Number of images": 4}
    few = few | {"Guidance scale": 1.5} if family == "rectangle" else few  # which has a weaker model
    tab, values = open_tab(GenerateTab, model, **few)
    first, *_, (picture, status, images, archive, command, python) = tab.generate(None, index_of[family], *values)
    assert first[1] == "Drawing: loading the model ..." and status.startswith("4 images in ")
    if model.conditions:
        assert "--condition=age=40 --condition=size=2" in command
    width, height = model.size
    assert images[0].size == (width * (2 if family == "channels" else 1), height)

    if family != "channels":  # whose command writes arrays
        assert_same(pixels(images), pixels(map(Image.open, run_command(command, "samples"))))
    names = {}
    exec(python, names)
    assert_same(pixels(images), pixels(names["images"]))


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_model_with_an_image_as_its_condition_draws_from_an_uploaded_picture(
    store, index_of, open_tab, run_command, tmp_path, monkeypatch, is_whole
):
    model = store.models[index_of["enlarging"]]
    given = {"Picture that is its condition": PICTURE, "The picture is whole": is_whole}
    tab, values = open_tab(GenerateTab, model, **FEW, **given)
    *_, (_, _, images, archive, command, python) = keep_archive(tab.generate(None, index_of["enlarging"], *values), 3)
    assert ("--degrade" in command) == is_whole and " --image picture.png" in command
    (tmp_path / "picture.png").write_bytes(archive["picture.png"])
    assert Image.open(tmp_path / "picture.png").size == ((8, 8) if is_whole else (4, 4))
    monkeypatch.chdir(tmp_path)
    assert_same(pixels(images), pixels(map(Image.open, run_command(command, "samples"))))
    names = {}
    exec(python, names)
    assert_same(pixels(images), pixels(names["images"]))

    tab, values = open_tab(GenerateTab, model, **FEW)
    with pytest.raises(gr.Error, match="draws from a picture: give one, or choose a guidance scale of 0"):
        last(tab.generate(None, index_of["enlarging"], *values))


def keep_archive(outputs, position):
    """Reads the files of an archive, which is deleted when a handler ends, in place of it."""
    for each in outputs:
        if isinstance(each[position], dict) and "value" in each[position]:
            with zipfile.ZipFile(each[position]["value"]) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
            each = (*each[:position], files, *each[position + 1 :])
        yield each


def test_large_images_are_drawn_a_few_at_a_time_by_the_page_the_command_and_the_lines(
    store, index_of, open_tab, run_command, monkeypatch
):
    model = store.models[index_of["conditional"]]
    assert model.batch_size == 64 and replace(model, size=(64, 64)).batch_size == 16
    monkeypatch.setattr("tiny_diffusers.app.models.BATCH_PIXELS", 3 * 8 * 8)
    tab, values = open_tab(GenerateTab, model, **FEW, **{"Guidance scale": 1.23456789, "Classes": ["dog", "cat"]})
    *_, images, _, command, python = last(tab.generate(None, index_of["conditional"], *values))
    assert "--batch_size 3 " in command and "--guidance_scale 1.23456789 " in command and "range(0, 4, 3)" in python
    assert_same(pixels(images), pixels(map(Image.open, run_command(command, "samples"))))
    names = {}
    exec(python, names)
    assert_same(pixels(images), pixels(names["images"]))


def test_classes_that_a_list_would_take_apart_are_named_by_their_ids(store, index_of):
    model = replace(store.models[index_of["conditional"]], classes=("a, b", "dog", " c"), class_ids=(0, 1, 4))
    assert class_words(model, ["dog", "a, b", " c"]) == ["--class_labels=dog,0,4"]


def test_lines_of_python_name_the_device_by_its_index(store, index_of):
    pipe = types.SimpleNamespace(device=torch.device("cuda:1"), _network_name="pixelcnn")
    lines = python_of_completion(store.models[index_of["pixelcnn"]], pipe, 4, 2, 0, {"class_labels": "dog"})
    assert '.to("cuda:1")' in lines and "class_labels='dog'" in lines


def test_the_pngs_are_downloaded_as_they_were_drawn(store, index_of, open_tab):
    tab, values = open_tab(GenerateTab, store.models[index_of["vae"]], **{"Number of images": 3})
    *_, images, files, _, _ = last(keep_archive(tab.generate(None, index_of["vae"], *values), 3))
    assert list(files) == ["00000.png", "00001.png", "00002.png"]
    assert_same(pixels(images), [np.asarray(Image.open(io.BytesIO(content))) for content in files.values()])


@pytest.mark.parametrize("family, label", [("diffusion", "step"), ("pixelcnn", "row")])
def test_a_preview_shows_the_images_so_far(store, index_of, open_tab, monkeypatch, family, label):
    monkeypatch.setattr("tiny_diffusers.app.requests.REPORT_SECONDS", 0)
    model = store.models[index_of[family]]
    few = FEW if family == "diffusion" else {"Number of images": 4}
    tab, values = open_tab(GenerateTab, model, **few)
    *steps, final = tab.generate(None, index_of[family], *values)
    count = 3 if family == "diffusion" else 8
    assert [step[1] for step in steps[1:]] == [f"Drawing: {label} {i + 1} of {count}" for i in range(count)]
    assert all(step[0].size == final[0].size for step in steps[1:])
    assert not np.array_equal(np.asarray(steps[1][0]), np.asarray(final[0]))
    if family == "pixelcnn":  # whose last row completes the images
        np.testing.assert_array_equal(np.asarray(steps[-1][0]), np.asarray(final[0]))


def test_flags_are_in_the_command_if_they_are_not_the_defaults(store, index_of, open_tab):
    model = store.models[index_of["conditional"]]
    changes = {"Sampler": "dpm", "Guidance scale": 2, "Dynamic thresholding": "0.995", "Classes": ["dog"]}
    tab, values = open_tab(GenerateTab, model, **FEW, **changes)
    command = last(tab.generate(None, index_of["conditional"], *values))[4]
    assert "--class_labels=dog --dtype float32 --num_inference_steps 3 --scheduler dpm --guidance_scale 2" in command
    assert "--dynamic_thresholding 0.995" in command and "--eta" not in command

    tab, values = open_tab(GenerateTab, store.models[index_of["vae"]], Truncation=0.5)
    assert "--truncation 0.5" in last(tab.generate(None, index_of["vae"], *values))[4]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"Steps": 10_000}, "Steps: 10000 is not from 1 to 250"),
        ({"Steps": float("nan")}, "Steps: nan is not a whole number"),
        ({"Number of images": 65}, "Number of images: 65 is not from 1 to 64"),
        ({"Seed": -1}, "Seed: -1 is not from 0"),
        ({"Sampler": "../../etc"}, "--scheduler"),
        ({"Eta": "much"}, "Eta: 'much' is not a number"),
        ({"Classes": ["cow"]}, "cow"),
        ({"Classes": ["cat", "--output=/tmp/x"]}, "--output=/tmp/x"),
    ],
)
def test_a_wrong_value_is_one_clear_line(store, index_of, open_tab, changes, message):
    tab, values = open_tab(GenerateTab, store.models[index_of["conditional"]], **(FEW | changes))
    with pytest.raises(gr.Error) as error:
        last(tab.generate(None, index_of["conditional"], *values))
    assert message in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize(
    "family", ["diffusion", "conditional", "flow", "vae", "dcgan", "rectangle", "channels", "conditions", "vae_of_all"]
)
def test_a_walk_has_frames_for_its_slider_and_its_gif(store, index_of, open_tab, run_command, family):
    model = store.models[index_of[family]]
    few = {"Frames": 3} | ({"Steps": 3} if model.family == "diffusion" else {})
    if model.conditions:
        few |= {"First age": 20.5, "Second age": 60}
    tab, values = open_tab(WalkTab, model, **few)
    for outputs in tab.walk(None, index_of[family], *values):
        if isinstance(outputs[3], dict) and "value" in outputs[3]:
            content = Path(outputs[3]["value"]).read_bytes()
    frame, slider, status, _, commands, frames = outputs
    assert len(frames) == slider["maximum"] == 3 and status == "3 frames: move the slider"
    assert ("--condition=age=20.5,60 --condition=size=2,2" in commands) == bool(model.conditions)
    assert tab.show(frames, 3) is frames[2] and tab.show(frames, 99) is frames[2] and tab.show([], 1) is None
    assert run_command(commands.splitlines()[0], "walk.gif")[0].read_bytes() == content
    with pytest.raises(gr.Error, match="This failed in the server"):
        tab.show(frames, "a")


def drawing(picture, layers=()):
    return {"background": picture, "layers": list(layers), "composite": picture}


EDITS = [
    *((family, task) for family in ("diffusion", "flow") for task in ("Variations", "Inpaint", "Super-resolution")),
    *(("rectangle", "Variations"), ("conditional", "Deblur"), ("pixelcnn", "Complete"), ("vae", "Reconstruct")),
    *(("conditions", "Inpaint"), ("vae_of_all", "Reconstruct"), ("pixelcnn_of_all", "Complete")),
]


@pytest.mark.parametrize("family, task", EDITS)
def test_pictures_are_edited(store, index_of, open_tab, tmp_path, monkeypatch, family, task):
    model = store.models[index_of[family]]
    few = {"Results": 2} | ({"Steps": 2} if model.family == "diffusion" else {})
    tab, values = open_tab(EditTab, model, **(few | {"Task": task}))
    *_, (_, status, results, files, command) = keep_archive(
        tab.edit(None, index_of[family], drawing(PICTURE), *values[1:]), 3
    )
    count = 1 if task == "Reconstruct" else 2
    of_age = "'age': 40" if task == "Complete" else "--condition=age=40"  # lines of Python, or of a command
    assert status == f"{count} results" and [result.size for result in results] == [model.size] * count
    assert {"picture.png", "00000.png"} <= set(files) and ("mask.png" in files) == (task == "Inpaint")
    assert "picture.png" in command and (of_age in command) == bool(model.conditions)
    if task == "Complete":  # the upper half is kept
        given = np.asarray(fit_picture(PICTURE, model.size, 1))
        for result in results:
            np.testing.assert_array_equal(np.asarray(result)[:4], given[:4])
        monkeypatch.chdir(tmp_path)
        Path("picture.png").write_bytes(files["picture.png"])
        names = {}
        exec(command, names)
        assert_same(pixels(results), pixels(names["images"]))


def test_a_sample_is_taken_as_the_picture_with_the_chosen_steps(store, index_of, open_tab, monkeypatch):
    monkeypatch.setattr("tiny_diffusers.app.requests.REPORT_SECONDS", 0)
    tab, values = open_tab(EditTab, store.models[index_of["rectangle"]], Steps=2)
    label, _, seed, *sampling = values[8:]
    *steps, (taken, status) = tab.take_sample(None, index_of["rectangle"], label, seed, *sampling)
    assert [step[1] for step in steps[1:]] == ["Drawing: step 1 of 2", "Drawing: step 2 of 2"] and status == ""
    width, height = taken["background"].size
    assert width / height == 12 / 8 and width % 12 == 0
    assert tasks_of(store.models[index_of["dcgan"]]) == []


def test_the_mask_is_a_named_part_or_what_is_painted_in_red():
    half = np.asarray(find_mask({}, "left half", (8, 4)))
    assert (half[:, :4] == 255).all() and (half[:, 4:] == 0).all()

    blank, layer = Image.new("RGBA", (80, 80)), Image.new("RGBA", (80, 80))
    layer.paste((255, 0, 0, 255), (0, 0, 40, 40))
    layer.paste((255, 255, 255, 255), (40, 40, 80, 80))  # of the picture, not the mask
    painted = np.asarray(find_mask(drawing(blank, [layer]), "painted in red", (8, 8)))
    assert (painted[:4, :4] == 255).all() and painted.sum() == 16 * 255
    with pytest.raises(ValueError, match="Nothing is painted in red"):
        find_mask(drawing(blank), "painted in red", (8, 8))
    with pytest.raises(ValueError, match="Hidden part: 'all'"):
        find_mask({}, "all", (8, 8))


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("conditional", "rectangle")]


@pytest.mark.parametrize("family", ["channels", "conditions", *SLOW])
def test_each_view_of_a_model_is_drawn_as_its_command_draws_it(
    store, index_of, open_tab, run_command, tmp_path, monkeypatch, family
):
    monkeypatch.chdir(tmp_path)
    model = store.models[index_of[family]]
    for view in [view for view in views_of(model) if view != "Noise schedule" or family == "channels"]:
        tab, values = open_tab(LookTab, model, Show=view, Steps=3, States=2)
        picture, _, command = last(tab.look(None, index_of[family], *values))
        *before, shown = command.splitlines()
        for line in before:
            run_command(line, "sample/")
        if view == "Noise schedule":
            assert shown == f"tiny-diffusers plot schedules {model.checkpoint}"  # which draws larger
            continue
        (file,) = run_command(f"{shown} --output view.png", "view.png")
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(file)))
    tab, values = open_tab(LookTab, model, Show="Weights")
    with pytest.raises(gr.Error, match="has no 'Weights'"):
        last(tab.look(None, index_of[family], *values))


def test_training_images_are_shown_if_the_user_has_meant_them_alone(tmp_path, store):
    folder, run = tmp_path / "photos", tmp_path / "run"
    folder.mkdir(), run.mkdir()
    model = replace(store.models[0], folder=run)

    def named(config, paths=None, dataset_name=None):
        (run / "config.yaml").write_text(config)
        (run / ".paths.json").write_text(json.dumps(paths or {}))
        return training_words(model, dataset_name)

    assert named("dataset_name: digits") == []
    assert named(f"train_data_dir: {folder}") is None, "a stranger's checkpoint names a folder of this machine"
    assert named("train_data_dir: photos", {"train_data_dir": str(folder)}) == []
    assert named("train_data_dir: photos", {"train_data_dir": str(tmp_path / "gone")}) is None
    assert named("train_data_dir: photos", dataset_name=str(folder)) == ["--dataset_name", str(folder)]
    assert named("dataset_name: ylecun/mnist") is None
    assert named("dataset_name: ylecun/mnist", dataset_name="ylecun/mnist") == ["--dataset_name", "ylecun/mnist"]
    assert named("dataset_name: ylecun/mnist", dataset_name=str(folder)) is None, "it was trained on others"


def test_the_nearest_training_images_are_loaded_once(tmp_path, open_tab, run_command, monkeypatch, checkpoints):
    shutil.copytree(checkpoints["diffusion"], tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("dataset_name: digits\nresolution: 8\n")
    store = ModelStore(list_models([str(tmp_path / "run")]), device="cpu")
    with gr.Blocks(analytics_enabled=False):
        tab = LookTab(store, Tasks(), gr.Dropdown([0]))
    values = [3 if control.label == "Steps" else control.value for control in tab.controls]
    values[0] = "Nearest training images"
    picture, text, command = last(tab.look(None, 0, *values))
    assert "images, pixels in [0, 1]" in text
    (file,) = run_command(f"{command} --output nearest.png", "nearest.png")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(file)))
    with monkeypatch.context() as patch:
        patch.setattr("tiny_diffusers.app.look.load_training_images", None)
        last(tab.look(None, 0, *values))

    (tmp_path / "run" / "run.json").write_text('{"data": {"name": "digits", "fingerprint": "of others"}}')
    tab._training = None
    with pytest.raises(gr.Error, match="are not those that the model was trained on"):
        last(tab.look(None, 0, *values))


def test_models_of_one_size_are_compared_from_the_same_seeds(store, index_of):
    with gr.Blocks(analytics_enabled=False) as page:
        tab = CompareTab(store, Tasks())
    (box,) = (block for block in page.blocks.values() if isinstance(block, gr.CheckboxGroup))
    assert index_of["enlarging"] not in [index for _, index in box.choices], "it needs an image as a condition"
    indices = [index_of[name] for name in ("diffusion", "vae", "pixelcnn")]
    picture, _, metrics, command = last(tab.compare(None, indices, 2, 0, 3))
    assert isinstance(picture, Image.Image) and command.startswith("tiny-diffusers plot samples ")
    assert "No model has a report" in metrics
    for wrong, message in (([], "choose from 1 to 8"), ([99], "no model number"), ([9], "an image as a condition")):
        with pytest.raises(gr.Error, match=message):
            last(tab.compare(None, wrong, 2, 0, 3))
    indices = [index_of[name] for name in ("conditions", "vae", "vae_of_all", "pixelcnn_of_all")]
    assert "--condition=age=30 --condition=size=1" in last(tab.compare(None, indices, 2, 0, 3, 30, 1))[3]


def test_the_metrics_and_the_curves_of_published_models_are_shown():
    model = list_models(published_checkpoints())[0]
    log = model.folder / "train_log.jsonl"
    curves = curves_of(log, model.name, 0)
    assert model.name in metrics_of([model]) and curves.mode == "RGB" and curves_of(log, model.name, 0) is curves
    assert "3,347,332" in facts_of(model) and card_of(model).startswith("# ")


def test_nothing_of_a_card_or_a_class_is_live(tmp_path, checkpoints, store):
    (tmp_path / "README.md").write_text("<script>alert(1)</script>")
    model = replace(store.models[0], folder=tmp_path, classes=("<img src=x onerror=alert(1)>",), name="<b>x</b>")
    assert "<" not in facts_of(model) and card_of(model) == "<script>alert(1)</script>"  # shown as code
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n---\nof digits")
    assert card_of(model) == "# A model\n---\nof digits"


def test_the_page_has_all_tabs_and_hides_what_a_model_can_not_do(store, index_of):
    page = build(store)
    tabs = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert tabs == ["Generate", "Walk", "Edit", "Look inside", "Compare", "About"]
    shown = {name: shown_tabs(store.models[index]) for name, index in index_of.items()}
    assert shown["flow"] == shown["rectangle"] == [True, True, True]
    assert shown["pixelcnn"] == ["hidden", True, "hidden"] and shown["dcgan"] == [True, "hidden", "hidden"]
    assert shown["conditions"] == [True, True, True] and shown["channels"] == [True, "hidden", True]
    assert shown["enlarging"] == ["hidden", "hidden", True]
    named = {function.api_name for function in page.fns.values() if isinstance(function.api_name, str)}
    assert {*TABS, "about"} <= named
    canceled = {index for function in page.fns.values() for index in function.cancels}
    assert {page.fns[index].name for index in canceled} == {*TABS, "take_sample"}  # by Stop, if they wait
    for tab, endpoint in page.get_api_info()["named_endpoints"].items():
        needed = {each["label"] for each in endpoint["parameters"] if not each["parameter_has_default"]}
        assert not needed, f"{tab} has no value of the page for a client that gives none"


def test_a_pipeline_draws_in_python_what_the_page_draws(store, index_of, open_tab, checkpoints):
    tab, values = open_tab(GenerateTab, store.models[index_of["flow"]], Seed=5, **FEW)
    images = last(tab.generate(None, index_of["flow"], *values))[2]
    pipe = TinyPipeline.from_pretrained(checkpoints["flow"])
    pipe.unet.to(memory_format=torch.channels_last)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(4)]
    assert_same(pixels(images), pixels(pipe(batch_size=4, generator=generators, num_inference_steps=3).images))


@pytest.mark.parametrize("kind", [CompareTab, EditTab, GenerateTab, LookTab, WalkTab])
def test_gradio_tells_a_handler_its_session(store, kind):
    """It does for positional parameters alone; without its session no request could be stopped."""
    with gr.Blocks(analytics_enabled=False):
        chosen = [] if kind is CompareTab else [gr.Dropdown([0])]
        tab = kind(store, Tasks(), *chosen)
    handler = getattr(tab, kind.__name__.removesuffix("Tab").lower())
    inputs, *_ = gr.helpers.special_args(handler, [0], request="of the session")
    assert inputs[:2] == ["of the session", 0]
