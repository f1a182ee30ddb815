"""The commands on a checkpoint that takes an image as a condition."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import TINY_DIFFUSION
from tiny_diffusers import TinyConditionalPipeline, TinyDDIMScheduler, TinyPipeline, cli
from tiny_diffusers.commands import sampling
from tiny_diffusers.data import ImageData, load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import Protocol, evaluate
from tiny_diffusers.evaluation import images as image_sets
from tiny_diffusers.train_scripts import train_conditional


FAST = {"num_inference_steps": 2, "dtype": "float32", "device": "cpu"}
MEASURED = {"features": "pixels", "num_images": 64, "num_jackknife": 0, "baselines": [], "batch_size": 64}


@pytest.fixture(autouse=True)
def process_state(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_pipe(tiny_unet):
    def make(kind="low_resolution:2", classes=None):
        unet = tiny_unet("none", in_channels=2, num_class_embeds=classes)
        pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(num_train_timesteps=10), conditioning=kind)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def checkpoint(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path):
    """A folder of two whole pictures, and one of what the network takes of them."""
    for i, image in enumerate(load_images("digits").images[:2, 0].numpy()):
        for name, picture in (("whole", Image.fromarray(image)), ("small", Image.fromarray(image).reduce(2))):
            (tmp_path / name).mkdir(exist_ok=True)
            picture.save(tmp_path / name / f"{i}.png")
    return tmp_path


def run(*arguments, **options):
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    return cli.main([str(word) for word in (*arguments, *flags)])


def error_line(capsys, *arguments, **options):
    assert run(*arguments, **options) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("folder", "flags"), [("small", ()), ("whole", ("--degrade",))])
def test_sample_draws_from_each_picture(checkpoint, pictures, folder, flags):
    output = pictures / "out"
    assert run("sample", checkpoint, *flags, **FAST, image=pictures / folder, output=f"{output}/", num_images=4) == 0
    pipe = TinyPipeline.from_pretrained(checkpoint)
    small = [Image.open(pictures / "small" / f"{i // 2}.png") for i in range(4)]
    generator = [torch.Generator().manual_seed(i) for i in range(4)]
    expected = pipe(image=small, generator=generator, num_inference_steps=2).images
    for i in range(4):
        np.testing.assert_allclose(np.asarray(Image.open(output / f"{i:05}.png")), np.asarray(expected[i]), atol=2)


def test_a_picture_has_a_row_for_each_given_one(checkpoint, pictures):
    output = pictures / "samples.png"
    assert run("sample", checkpoint, "--degrade", **FAST, image=pictures / "whole", output=output) == 0
    with Image.open(output) as picture:  # the given one and four samples of it, and two rows
        assert picture.width / picture.height == pytest.approx(5 / 2, abs=0.3)


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [(None, ["1", "1", "2", "2"] * 2), (4, ["1", "2"] * 2), (8, ["1", "1", "2", "2"] * 2)],
)
def test_classes_have_equal_shares_of_each_picture(make_pipe, pictures, tmp_path, monkeypatch, num_images, expected):
    make_pipe(classes=3).save_pretrained(tmp_path / "classes")
    drawn = {}

    def record(pipe, num_images, seed, batch_size, labels, pictures, **options):
        drawn.update(labels=labels, pictures=[picture.tobytes() for picture in pictures])
        return [Image.new("L", (8, 8))] * num_images, []

    monkeypatch.setattr(sampling, "draw_images", record)
    given = {} if num_images is None else {"num_images": num_images}
    options = {**FAST, "image": pictures / "small", "output": f"{tmp_path}/out/", "class_labels": "1,2", **given}
    assert run("sample", tmp_path / "classes", **options) == 0
    assert drawn["labels"] == expected
    first, second = (Image.open(pictures / "small" / f"{i}.png").tobytes() for i in range(2))
    assert drawn["pictures"] == [first] * (len(expected) // 2) + [second] * (len(expected) // 2)


def test_a_class_is_for_all_pictures(make_pipe, pictures, tmp_path, capsys):
    make_pipe(classes=3).save_pretrained(tmp_path / "classes")
    options = {**FAST, "image": pictures / "small", "output": f"{tmp_path}/out/"}
    assert run("sample", tmp_path / "classes", **options, class_labels=1) == 0
    assert "needs `class_labels`" in error_line(capsys, "sample", tmp_path / "classes", **options)


def test_without_its_condition_it_samples_by_guidance_of_0(checkpoint, tmp_path):
    for command in (("sample",), ("plot", "samples"), ("plot", "denoising")):
        output = tmp_path / f"{command[-1]}.png"
        assert run(*command, checkpoint, **FAST, guidance_scale=0, output=output) == 0
        assert output.is_file()


def test_each_mistake_is_one_line(checkpoint, make_pipe, tiny_unet, pictures, capsys):
    plain = pictures / "plain"
    TinyPipeline(tiny_unet(), TinyDDIMScheduler()).save_pretrained(plain)
    small, whole = pictures / "small", pictures / "whole"
    given = "needs an image as a condition: give --image, or --guidance_scale 0"
    assert given in error_line(capsys, "sample", checkpoint, **FAST)
    for kind in ("samples", "denoising"):
        line = error_line(capsys, "plot", kind, checkpoint, **FAST)
        assert "needs an image as a condition: use `tiny-diffusers sample --image`, or give --guidance_scale 0" in line
    assert "use `tiny-diffusers sample --image`" in error_line(capsys, "plot", "guidance", checkpoint, **FAST)
    assert "(`--degrade`)" in error_line(capsys, "sample", checkpoint, **FAST, image=whole)
    assert "no multiple of the 2 pictures" in error_line(capsys, "sample", checkpoint, image=small, num_images=3)
    make_pipe(classes=3).save_pretrained(pictures / "classes")
    shares = {"image": small, "class_labels": "0,1,2", "num_images": 8}
    line = error_line(capsys, "sample", pictures / "classes", **shares)
    assert "each of the 2 pictures of --image has 4 images, which is no multiple of the 3 of --class_labels" in line
    assert "--degrade is for the picture of --image" in error_line(capsys, "sample", checkpoint, "--degrade")
    assert "takes no image as a condition" in error_line(capsys, "sample", plain, image=small)
    assert "TinyInterpolationPipeline can't give" in error_line(capsys, "interpolate", checkpoint)
    for flags in ((), ("--task", "super_resolution:2")):
        assert "Pipeline can't give" in error_line(capsys, "edit", checkpoint, *flags, image=whole)


@pytest.mark.parametrize("kind", ["low_resolution:2", "image:1"])
@pytest.mark.parametrize("classes", [None, 10])
def test_evaluate_draws_from_what_the_references_images_show(make_pipe, monkeypatch, kind, classes):
    data = load_images("digits", max_samples=60)
    data.conditioning_images = 255 - data.images
    drawn = {}
    sample = image_sets.sample

    def spy(pipe, *args, **kwargs):
        drawn.update(kwargs)
        return sample(pipe, *args, **kwargs)

    monkeypatch.setattr(image_sets, "sample", spy)
    pipe = make_pipe(kind, classes)
    report = evaluate(pipe, data, Protocol(**MEASURED, sampling={"num_inference_steps": 2}))
    assert report.source["conditioning"] == kind
    assert any(f"({kind})" in warning for warning in report.warnings)
    rows = np.resize(image_sets.order_of(data.images.numpy()), 64)  # of 60 images, and again
    expected = data.conditioning_images[rows] / 255 if kind == "image:1" else pipe.observe(data.images[rows] / 255)
    torch.testing.assert_close(drawn["conditioning_images"](5, 64), expected[5:])
    if classes:
        assert (drawn["class_labels"] == data.labels[rows].numpy()).all()


def test_evaluate_names_what_the_reference_lacks(make_pipe):
    data = load_images("digits", max_samples=60)
    unlabeled = ImageData(data.images, None, None, "digits", "test", "")
    protocol = Protocol(**MEASURED, sampling={"num_inference_steps": 2})
    with pytest.raises(UserError, match="--conditioning_column"):
        evaluate(make_pipe("image:1"), data, protocol)
    with pytest.raises(UserError, match="the reference has no labels"):
        evaluate(make_pipe(classes=10), unlabeled, protocol)
    with pytest.raises(UserError, match="bits_per_dim: they depend on the conditioning image"):
        evaluate(make_pipe(), data, Protocol(**{**MEASURED, "metrics": ["bits_per_dim"]}))


def test_evaluate_finds_the_column_of_the_run(tmp_path):
    images = load_images("digits").images[:64, 0].numpy()
    colors = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    splits = {"image_test": images, "edges_test": 255 - images}  # of the same names, and all gray
    np.savez(tmp_path / "pairs.npz", image_train=images, edges_train=colors, **splits)
    folder = tmp_path / "run"
    data = ("--train_data_dir", str(tmp_path / "pairs.npz"), "--conditioning_column", "edges_train")
    train_conditional.main([*TINY_DIFFUSION, *data, "--max_train_steps", "1", "--output_dir", str(folder)])
    measured = ("--features", "pixels", "--num_images", "20", "--num_jackknife", "0", "--baselines", "none")
    assert run("evaluate", folder, *measured, **FAST) == 0
    (report,) = (folder / "reports").rglob("report.json")
    report = json.loads(report.read_text())
    assert report["source"]["conditioning"] == "image:3" and report["measured_by"]["reference"]["split"] == "test"
