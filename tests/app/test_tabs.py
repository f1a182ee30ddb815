"""Each tab on a tiny model of each family, by the functions that the page calls."""

import shlex
import zipfile
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from tiny_diffusers import TinyPipeline
from tiny_diffusers.app.about import card_of, curves_of, facts_of
from tiny_diffusers.app.compare import CompareTab, metrics_of
from tiny_diffusers.app.edit import EditTab, find_mask, fit_picture, tasks_of
from tiny_diffusers.app.generate import GenerateTab
from tiny_diffusers.app.look import LookTab, views_of
from tiny_diffusers.app.requests import Tasks
from tiny_diffusers.app.server import build, shown_tabs
from tiny_diffusers.app.walk import WalkTab
from tiny_diffusers.cli import main


FAMILIES = ("diffusion", "conditional", "flow", "pixelcnn", "vae", "dcgan", "rectangle", "channels", "conditions")
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
    tab, values = open_tab(GenerateTab, model, **few)
    first, *_, (picture, status, images, archive, command, python) = tab.generate(None, index_of[family], *values)
    assert first[1] == "Drawing: loading the model ..." and status.startswith("4 images in ")
    if model.conditions:
        assert "--condition age=40 --condition size=2" in command
    width, height = model.size
    assert images[0].size == (width * (2 if family == "channels" else 1), height)

    if family != "channels":  # whose command writes arrays
        assert_same(pixels(images), pixels(map(Image.open, run_command(command, "samples"))))
    names = {}
    exec(python, names)
    assert_same(pixels(images), pixels(names["images"]))


def test_the_pngs_are_downloaded_as_they_were_drawn(store, index_of, open_tab):
    tab, values = open_tab(GenerateTab, store.models[index_of["vae"]], **{"Number of images": 3})
    for outputs in tab.generate(None, index_of["vae"], *values):
        if not isinstance(outputs[3], dict) or "value" not in outputs[3]:
            continue
        with zipfile.ZipFile(outputs[3]["value"]) as archive:
            assert_same(pixels(outputs[2]), [np.asarray(Image.open(archive.open(n))) for n in archive.namelist()])


@pytest.mark.parametrize("family, label", [("diffusion", "step"), ("pixelcnn", "row")])
def test_a_preview_shows_the_images_so_far(store, index_of, open_tab, monkeypatch, family, label):
    monkeypatch.setattr("tiny_diffusers.app.requests.PREVIEW_SECONDS", 0)
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


@pytest.mark.parametrize("family", ["diffusion", "conditional", "flow", "vae", "dcgan", "rectangle", "channels"])
def test_a_walk_has_frames_for_its_slider_and_its_gif(store, index_of, open_tab, run_command, family):
    model = store.models[index_of[family]]
    few = {"Frames": 3} | ({"Steps": 3} if model.family == "diffusion" else {})
    tab, values = open_tab(WalkTab, model, **few)
    for outputs in tab.walk(None, index_of[family], *values):
        if isinstance(outputs[3], dict) and "value" in outputs[3]:
            content = Path(outputs[3]["value"]).read_bytes()
    frame, slider, status, _, commands, frames = outputs
    assert len(frames) == slider["maximum"] == 3 and status == "3 frames: move the slider"
    assert tab.show(frames, 3) is frames[2] and tab.show(frames, 99) is frames[2] and tab.show([], 1) is None
    assert run_command(commands.splitlines()[0], "walk.gif")[0].read_bytes() == content


def drawing(picture, layers=()):
    return {"background": picture, "layers": list(layers), "composite": picture}


EDITS = [
    *((family, task) for family in ("diffusion", "flow") for task in ("Variations", "Inpaint", "Super-resolution")),
    *(("rectangle", "Variations"), ("conditional", "Deblur"), ("pixelcnn", "Complete"), ("vae", "Reconstruct")),
]


@pytest.mark.parametrize("family, task", EDITS)
def test_pictures_are_edited(store, index_of, open_tab, family, task):
    model = store.models[index_of[family]]
    few = {"Results": 2} | ({"Steps": 2} if model.family == "diffusion" else {})
    tab, values = open_tab(EditTab, model, **(few | {"Task": task}))
    picture = Image.linear_gradient("L").convert("RGB")
    for outputs in tab.edit(None, index_of[family], drawing(picture), *values[1:]):
        if isinstance(outputs[3], dict) and "value" in outputs[3]:
            with zipfile.ZipFile(outputs[3]["value"]) as archive:
                names = archive.namelist()
    _, status, results, _, command = outputs
    count = 1 if task == "Reconstruct" else 2
    assert status == f"{count} results" and [result.size for result in results] == [model.size] * count
    assert {"picture.png", "result-00.png"} <= set(names) and ("mask.png" in names) == (task == "Inpaint")
    assert "picture.png" in command
    if task == "Complete":  # the upper half is kept
        given = np.asarray(fit_picture(picture, model.size, 1))
        for result in results:
            np.testing.assert_array_equal(np.asarray(result)[:4], given[:4])


def test_a_sample_is_taken_as_the_picture(store, index_of, open_tab):
    tab, _ = open_tab(EditTab, store.models[index_of["rectangle"]])
    taken = tab.take_sample(index_of["rectangle"], 0, None)
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


@pytest.mark.parametrize("family", ["conditional", "channels", "conditions"])
def test_each_view_of_a_model_is_drawn(store, index_of, open_tab, family):
    model = store.models[index_of[family]]
    for view in views_of(model):
        tab, values = open_tab(LookTab, model, Show=view, Steps=3, States=2)
        picture, _, _ = last(tab.look(None, index_of[family], *values))
        assert isinstance(picture, Image.Image)
    tab, values = open_tab(LookTab, model, Show="Weights")
    with pytest.raises(gr.Error, match="has no 'Weights'"):
        last(tab.look(None, index_of[family], *values))


def test_models_of_one_size_are_compared_from_the_same_seeds(store, index_of):
    with gr.Blocks(analytics_enabled=False):
        tab = CompareTab(store, Tasks())
    indices = [index_of[name] for name in ("diffusion", "vae", "pixelcnn")]
    picture, _, metrics, command = last(tab.compare(None, indices, 2, 0, 3))
    assert isinstance(picture, Image.Image) and command.startswith("tiny-diffusers plot samples ")
    assert "No model has a report" in metrics
    for wrong, message in (([], "choose from 1 to 8"), ([99], "no model number"), ([8], "numbers as a condition")):
        with pytest.raises(gr.Error, match=message):
            last(tab.compare(None, wrong, 2, 0, 3))


def test_the_metrics_and_the_curves_of_published_models_are_shown():
    from tiny_diffusers.app.models import list_models, published_checkpoints

    model = list_models(published_checkpoints())[0]
    assert model.name in metrics_of([model]) and curves_of(model).mode == "RGB"
    assert "3,347,332" in facts_of(model) and card_of(model).startswith("---\n")


def test_nothing_of_a_card_or_a_class_is_live(tmp_path, checkpoints, store):
    from dataclasses import replace

    (tmp_path / "README.md").write_text("<script>alert(1)</script>")
    model = replace(store.models[0], folder=tmp_path, classes=("<img src=x onerror=alert(1)>",), name="<b>x</b>")
    assert "<" not in facts_of(model) and card_of(model) == "<script>alert(1)</script>"  # shown as code


def test_the_page_has_all_tabs_and_hides_what_a_model_can_not_do(store, index_of):
    page = build(store)
    tabs = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert tabs == ["Generate", "Walk", "Edit", "Look inside", "Compare", "About"]
    shown = {name: shown_tabs(store.models[index]) for name, index in index_of.items()}
    assert shown["flow"] == shown["rectangle"] == [True, True, True]
    assert shown["pixelcnn"] == ["hidden", True, "hidden"] and shown["dcgan"] == [True, "hidden", "hidden"]
    assert shown["conditions"] == ["hidden", "hidden", True] and shown["channels"] == [True, "hidden", True]
    named = {function.api_name for function in page.fns.values() if isinstance(function.api_name, str)}
    assert {"generate", "walk", "edit", "look", "compare", "about"} <= named


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
