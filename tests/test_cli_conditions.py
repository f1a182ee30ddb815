"""`--condition NAME=VALUE` on the command line, and the evaluation of images that are drawn by conditions."""

import functools
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tiny import TINY_DIFFUSION, conditional_pipeline
from tiny_diffusers import TinyConditionalPipeline, TinyDDIMScheduler, TinyPipeline, TinyVAEPipeline, cli
from tiny_diffusers.commands import sampling
from tiny_diffusers.data import ImageData
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import Protocol, Report, evaluate, regressor
from tiny_diffusers.evaluation import images as image_sets
from tiny_diffusers.train_scripts import train_conditional


PLAIN = {"dtype": "float32", "device": "cpu"}
FAST = {"num_inference_steps": 2, **PLAIN}
MEASURED = {"features": "pixels", "num_images": 64, "num_jackknife": 0, "baselines": ["real"], "batch_size": 64}
STATISTICS = {
    "names": ["age", "hat"],
    "means": [40.0, 0.5],
    "deviations": [10.0, 0.5],
    "lows": [20.0, 0.0],
    "highs": [60.0, 1.0],
}


@pytest.fixture(autouse=True)
def process_state(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_pipe(tiny_unet):
    def make(classes=None):
        unet = tiny_unet("none", num_class_embeds=classes, num_conditions=2)
        scheduler = TinyDDIMScheduler(num_train_timesteps=10)
        names = None if classes is None else {i: f"kind {i}" for i in range(classes)}
        pipe = TinyConditionalPipeline(unet, scheduler, id2label=names, condition_statistics=STATISTICS)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def checkpoint(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments, **options):
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    return cli.main([str(word) for word in (*arguments, *flags)])


def error_line(capsys, *arguments, **options):
    assert run(*arguments, **options) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_sample_draws_each_combination(checkpoint, tmp_path):
    given = ("--condition", "age=20,60", "--condition", "hat=0,1")
    assert run("sample", checkpoint, *given, **FAST, num_images=8, output=f"{tmp_path}/out/") == 0
    rows = [{"age": age, "hat": hat} for age in (20, 60) for hat in (0, 1) for _ in range(2)]
    generator = [torch.Generator().manual_seed(i) for i in range(8)]
    expected = TinyPipeline.from_pretrained(checkpoint)(conditions=rows, generator=generator, num_inference_steps=2)
    for i, image in enumerate(expected.images):
        np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "out" / f"{i:05}.png")), np.asarray(image), atol=2)


@pytest.mark.parametrize(
    ("flags", "classes", "rows"),
    [
        ((), None, ["age 20", "age 40", "age 60"]),
        (("--condition", "age=30", "--condition", "hat=0,1"), None, ["hat 0", "hat 1"]),
        (("--condition", "age=30", "--condition", "hat=1"), None, ["age 30, hat 1"]),
        (
            ("--condition", "age=20,60", "--condition", "hat=1"),
            2,
            [f"age {a}, kind {k}" for a in (20, 60) for k in (0, 1)],
        ),
        (("--condition", "age=2e7,20000001", "--condition", "hat=1"), None, ["age 20000000", "age 20000001"]),
    ],
)
@pytest.mark.filterwarnings("ignore::tiny_diffusers.pipelines.pipeline_tiny_conditions.FarValueWarning")
def test_a_grid_has_a_labeled_row_for_each_combination(make_pipe, tmp_path, monkeypatch, flags, classes, rows):
    from tiny_diffusers import plots

    make_pipe(classes).save_pretrained(tmp_path / "model")
    drawn, grids = [], []
    monkeypatch.setattr(
        sampling,
        "draw_images",
        lambda pipe, count, *a, **options: drawn.append(options) or ([Image.new("L", (8, 8))] * count, []),
    )
    monkeypatch.setattr(plots, "image_grid", lambda images, **grid: grids.append(grid) or Image.new("L", (8, 8)))
    assert run("sample", tmp_path / "model", *flags, **FAST, output=f"{tmp_path}/s.png") == 0
    assert list(dict.fromkeys(grids[0]["row_labels"])) == rows
    assert all(set(row) == {"age", "hat"} for row in drawn[0]["conditions"])


@pytest.mark.parametrize(
    ("flags", "ages", "labels"),
    [
        (("--num_images", "1"), [20], ["kind 0"]),
        (("--num_images", "6"), [20, 20, 40, 40, 60, 60], 3 * ["kind 0", "kind 1"]),
        (("--num_images", "4", "--class_labels", "0,1"), [20, 20, 40, 40], ["0", "1", "0", "1"]),
    ],
)
def test_the_defaults_make_way_for_fewer_images(make_pipe, tmp_path, monkeypatch, flags, ages, labels):
    make_pipe(2).save_pretrained(tmp_path / "model")

    def draw_images(pipe, count, seed, batch_size, drawn, pictures, conditions, **options):
        assert ([row["age"] for row in conditions], drawn) == (ages, labels)
        return [Image.new("L", (8, 8))] * count, []

    monkeypatch.setattr(sampling, "draw_images", draw_images)
    assert run("sample", tmp_path / "model", *flags, **FAST, output=f"{tmp_path}/s.png") == 0


@pytest.mark.parametrize("kind", ["samples", "denoising", "interpolation", "guidance"])
def test_pictures_take_them(make_pipe, tmp_path, capsys, kind):
    make_pipe(2).save_pretrained(tmp_path / "model")
    flags = {"guidance": ("--guidance_scales", "0,2", "--num_walks", "0"), "interpolation": ("--num_frames", "2")}
    flags = (*flags.get(kind, ()), "--output", tmp_path / "a.png")
    given = ("--condition", "age=30", "--condition", "hat=1")
    assert run("plot", kind, tmp_path / "model", *given, *flags, **FAST) == 0
    words = "draws by conditions: give --condition NAME=VALUE for each of age (20 to 60), hat (0 or 1)"
    assert words in error_line(capsys, "plot", kind, tmp_path / "model", *flags, **FAST)


def test_an_inversion_takes_those_of_the_pictures(make_pipe, tmp_path, capsys):
    make_pipe(2).save_pretrained(tmp_path / "model")
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    asked = {**FAST, "image": tmp_path / "a.png", "output": f"{tmp_path}/edit/", "class_labels": 0}
    asked = ["edit", tmp_path / "model", *[word for name, value in asked.items() for word in (f"--{name}", value)]]
    asked += ["--condition", "age=60", "--condition", "hat=1"]
    source = ("--source_condition", "age=20", "--source_condition", "hat=1")
    assert run(*asked, "--inversion", *source, "--source_class_labels", "1") == 0
    assert "needs `source_class_labels` beside `source_conditions`" in error_line(
        capsys, *asked, "--inversion", *source
    )
    lacks = error_line(capsys, *asked, "--inversion", "--source_class_labels", "1")
    assert "needs `source_conditions` beside `source_class_labels`" in lacks
    assert "--source_condition is for the inversion" in error_line(capsys, *asked, *source)
    assert "--source_condition: `conditions` lacks hat" in error_line(capsys, *asked, "--inversion", *source[:2])


def test_describe_names_them(checkpoint, tmp_path, monkeypatch, capsys):
    from tiny_diffusers import plots

    monkeypatch.setattr(plots, "draw_network", lambda *args: None)
    assert run("describe", checkpoint, output=tmp_path / "a.svg") == 0
    assert "conditions: age 20 to 60, hat 0 or 1" in capsys.readouterr().out


def test_interpolate_and_edit_take_them(checkpoint, tmp_path):
    given = ("--condition", "age=20,60", "--condition", "hat=1")
    assert run("interpolate", checkpoint, *given, **FAST, num_frames=3, seeds="0,0", output=f"{tmp_path}/walk/") == 0
    frames = [np.asarray(Image.open(tmp_path / "walk" / f"{i:05}.png")).astype(int) for i in range(3)]
    assert not np.array_equal(frames[0], frames[2])

    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    edited = []
    for age in (20, 60):
        output, image = f"{tmp_path}/edit{age}/", tmp_path / "a.png"
        flags = ("--condition", f"age={age}", "--condition", "hat=1", "--num_images", "1")
        assert run("edit", checkpoint, *flags, **FAST, image=image, output=output, strength=1) == 0
        edited.append(np.asarray(Image.open(f"{output}/a.png")).astype(int))
    assert not np.array_equal(*edited)


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("sample", ["agee=3"], "Unknown condition 'agee': the conditions are age, hat. Did you mean 'age'"),
        ("sample", ["age=3"], "lacks hat"),
        ("sample", ["age=nan"], "'nan' is not a list of finite numbers"),
        ("sample", ["age"], "'age' is not a name and its value, such as age=30"),
        ("sample", ["age=1", "age=2", "hat=1"], "--condition age: it is given twice"),
        ("sample", ["age=1,2,3", "hat=1", "--num_images 2"], "--num_images 2 is less than the 3 of --condition: give"),
        ("sample", ["age=1", "hat=1", "--guidance_scale 0"], "--guidance_scale 0 draws samples without conditions"),
        ("interpolate", ["age=1,2,3", "hat=1"], "--condition age has 3 values: give 2 at most"),
        ("interpolate", [], "give --condition NAME=VALUE for each of age (20 to 60), hat (0 or 1), or --guidance"),
    ],
)
def test_each_mistake_is_one_line(checkpoint, capsys, command, flags, words):
    flags = [word for flag in flags for word in (("--condition", flag) if "--" not in flag else flag.split())]
    assert words in error_line(capsys, command, checkpoint, *flags, **FAST)


def test_a_checkpoint_without_conditions_refuses_them(tiny_unet, tmp_path, capsys):
    TinyPipeline(tiny_unet("none"), TinyDDIMScheduler()).save_pretrained(tmp_path / "plain")
    for command in ("sample", "interpolate"):
        line = error_line(capsys, command, tmp_path / "plain", "--condition", "age=3", **FAST)
        assert "--condition means nothing to" in line and "leave it out" in line


@pytest.mark.parametrize("family", ["pixelcnn", "vae", "dcgan"])
def test_the_families_without_guidance_take_them(tmp_path, capsys, family):
    pipe, model = conditional_pipeline(family, STATISTICS, classes=2), tmp_path / "model"
    pipe.save_pretrained(model)
    given = ("--condition", "age=20,60", "--condition", "hat=1")
    assert run("sample", model, *given, **PLAIN, num_images=4, output=f"{tmp_path}/out/") == 0
    conditions = {"age": [20, 20, 60, 60], "hat": 1}
    generator = [torch.Generator().manual_seed(i) for i in range(4)]
    expected = pipe(class_labels=[0, 1] * 2, conditions=conditions, generator=generator, output_type="np").images
    drawn = [np.load(tmp_path / "out" / f"{i:05}.npy") for i in range(4)]  # no picture holds two channels
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert "Did you mean 'age'" in error_line(capsys, "sample", model, "--condition", "agee=3", **PLAIN)
    assert "--guidance_scale means nothing" in error_line(capsys, "sample", model, *given, guidance_scale=0, **PLAIN)
    if family == "pixelcnn":
        return
    walk = {**PLAIN, "num_frames": 3, "seeds": "0,0", "class_labels": 1}
    assert run("interpolate", model, *given, **walk, output=f"{tmp_path}/walk/") == 0
    assert not np.allclose(np.load(tmp_path / "walk" / "00000.npy"), np.load(tmp_path / "walk" / "00002.npy"))
    lacks = error_line(capsys, "interpolate", model, **walk)
    assert lacks.endswith("give --condition NAME=VALUE for each of age (20 to 60), hat (0 or 1).")


def test_reconstructions_are_by_the_conditions_of_the_images(tmp_path, capsys, monkeypatch):
    conditional_pipeline("vae", STATISTICS, classes=2).save_pretrained(tmp_path)
    rng, rows = np.random.default_rng(0), np.arange(8)
    columns = {"age": 20.0 + 5 * rows, "hat": rows // 4, "kind": np.array(["kind 0", "kind 1"])[rows % 2]}
    np.savez(tmp_path / "data.npz", image=rng.integers(0, 256, (8, 12, 16, 2), dtype=np.uint8), **columns)
    settings = {"train_data_dir": str(tmp_path / "data.npz"), "condition_columns": "age,hat", "label_column": "kind"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    seen, reconstruct = [], TinyVAEPipeline.reconstruct
    watched = functools.wraps(reconstruct)(lambda *a, **k: seen.append(k) or reconstruct(*a, **k))
    monkeypatch.setattr(TinyVAEPipeline, "reconstruct", watched)
    flags = ("--num_images", "3", "--index", "4", "--output", str(tmp_path / "a.png"))
    assert run("plot", "reconstructions", tmp_path, *flags) == 0
    assert seen[0]["conditions"].tolist() == [[40, 1], [45, 1], [50, 1]]
    assert seen[0]["class_labels"] == ["kind 0", "kind 1", "kind 0"]
    given = ("--condition", "age=30", "--condition", "hat=1")
    assert "--condition is for --image" in error_line(capsys, "plot", "reconstructions", tmp_path, *flags, *given)

    np.save(tmp_path / "one.npy", rng.random((12, 16, 2), dtype=np.float32))
    flags = ("--image", tmp_path / "one.npy", "--class_labels", "1", "--output", tmp_path / "a.png")
    assert run("plot", "reconstructions", tmp_path, *flags, *given) == 0
    assert seen[-1] == {"class_labels": "1", "conditions": {"age": [30.0], "hat": [1.0]}}
    assert "draws by conditions: give" in error_line(capsys, "plot", "reconstructions", tmp_path, *flags)


def test_values_far_outside_the_range_warn_in_one_line(make_pipe, tmp_path, capsys):
    make_pipe().save_pretrained(tmp_path / "model")
    flags = ("--condition", "age=500", "--condition", "hat=1", "--num_images", "1")
    assert run("sample", tmp_path / "model", *flags, **FAST, output=f"{tmp_path}/s.png") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "far outside" in line]
    assert lines == ["warning: age 500 is far outside the values of the training images, 20 to 60."]


# ---------------------------------------------------------------------------------------------------------- evaluation


def squares(count=200, seed=0, split="train"):
    """Images with a square whose column and gray are conditions: of its place a number, of its brightness a label."""
    rng = np.random.default_rng(seed)
    places, bright = rng.integers(0, 6, count), rng.integers(0, 2, count)
    images = rng.integers(0, 20, (count, 1, 8, 8), dtype=np.uint8)
    for image, place, is_bright in zip(images, places, bright, strict=True):
        image[0, 3:6, place : place + 3] = 220 if is_bright else 110
    conditions = torch.from_numpy(np.stack([20 + 8 * places, bright], axis=1).astype(np.float32))
    images = torch.from_numpy(images)
    data = ImageData(images, None, None, "squares", split, "", conditions=conditions, condition_names=["age", "hat"])
    return data.take(torch.arange(count))


def test_the_regressor_reads_places_and_labels_off_images(monkeypatch):
    trained = regressor.load_regressor(squares(), squares(seed=1, split="test"))
    figures = trained.compare(trained.held_out)
    assert figures["age"]["condition_correlation"].value > 0.9 and figures["age"]["condition_error"].value < 6
    assert figures["hat"]["condition_agreement"].value > 0.95
    assert "age with a mean error of" in trained.summary()
    monkeypatch.setattr(regressor, "train_network", lambda *args: pytest.fail("it is trained again"))
    again = regressor.load_regressor(squares(), squares(seed=1, split="test"))
    torch.testing.assert_close(again.predict(squares().images), trained.predict(squares().images))


def test_figures_of_a_condition():
    values, wanted = np.array([[1.0, 0.2], [3, 0.9], [5, 0.4]]), np.array([[2.0, 0], [4, 1], [6, 1]])
    number, label = regressor.compare(values, wanted, [False, True])
    assert number["condition_error"].value == 1 and number["condition_correlation"].value == pytest.approx(1)
    assert label["condition_agreement"].value == pytest.approx(2 / 3)
    (constant,) = regressor.compare(values[:, :1], np.full((3, 1), 2.0), [False])
    assert "condition_correlation" not in constant


@pytest.mark.parametrize("classes", [None, 2])
def test_evaluate_draws_by_the_conditions_of_the_reference(make_pipe, monkeypatch, tmp_path, classes):
    data, drawn = squares(60), {}
    if classes:
        data.labels, data.id2label = torch.arange(60) % 2, {0: "kind 0", 1: "kind 1"}
    sample = image_sets.sample
    monkeypatch.setattr(image_sets, "sample", lambda pipe, *a, **k: drawn.update(k) or sample(pipe, *a, **k))
    monkeypatch.setattr(regressor, "train_network", lambda *args: None)
    metrics = ["frechet_distance", "condition_agreement"]
    protocol = Protocol(**MEASURED, metrics=metrics, sampling={"num_inference_steps": 2})
    report = evaluate(make_pipe(classes), data, protocol, output_dir=tmp_path)
    rows = np.resize(image_sets.order_of(data.images.numpy()), 64)  # of 60 images, and again
    assert torch.equal(drawn["conditions"], data.conditions[rows])
    if classes:
        assert (drawn["class_labels"] == data.labels[rows].numpy()).all()
    assert report.source["conditions"] == ["age", "hat"]
    assert report.per_condition["hat"].keys() == {"condition_agreement"}
    assert "condition_agreement" in report.figures and "condition_agreement" in report.baselines["real"]["figures"]
    assert report.measured_by["regressor"]["conditions"] == ["age", "hat"]
    assert any("(age, hat)" in warning for warning in report.warnings)
    assert Report.load(tmp_path).per_condition == report.per_condition and "| age |" in report.markdown()


@pytest.mark.parametrize("kind", ["samples", "reconstructions"])
@pytest.mark.parametrize("family", ["pixelcnn", "vae", "dcgan"])
def test_evaluate_draws_and_measures_by_those_of_the_reference_in_each_family(monkeypatch, family, kind):
    if kind == "reconstructions" and family != "vae":
        return
    pipe, count = conditional_pipeline(family, STATISTICS, classes=2), 20
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *pipe._image_shape), dtype=torch.uint8, generator=generator)
    conditions = torch.stack([torch.linspace(20, 60, count), torch.arange(count) // 10], dim=1)
    names, labels = {0: "kind 0", 1: "kind 1"}, torch.arange(count) % 2
    data = ImageData(images, labels, names, "noise", "test", "", conditions=conditions, condition_names=["age", "hat"])
    seen, sample = {}, image_sets.sample
    monkeypatch.setattr(image_sets, "sample", lambda pipe, *a, **k: seen.update(k) or sample(pipe, *a, **k))
    monkeypatch.setattr(regressor, "train_network", lambda *args: None)
    metrics = ["frechet_distance"]
    metrics += [] if family == "dcgan" else ["bits_per_dim"]
    metrics += [] if family == "pixelcnn" else ["condition_agreement"]  # whose images are too small to read
    report = evaluate(pipe, data, Protocol(**MEASURED | {"num_images": 24}, metrics=metrics, kind=kind))
    rows = torch.from_numpy(np.resize(image_sets.order_of(images.numpy()), seen["num_images"]))
    assert seen["num_images"] == (24 if kind == "samples" else count)
    assert torch.equal(seen["conditions"], conditions[rows]) and (seen["class_labels"] == labels[rows].numpy()).all()
    assert ("condition_agreement" in report.figures) == (family != "pixelcnn")
    if family == "dcgan":
        return
    rows = rows[:count]
    noise = [torch.Generator().manual_seed(i) for i in range(count)]
    bits = pipe.bits_per_dim(images[rows], labels[rows], noise, conditions[rows])
    assert report.figures["bits_per_dim"]["value"] == pytest.approx(bits.mean().item(), rel=1e-5)
    assert report.measured_by["likelihood_given"] == ["class", "age", "hat"]
    assert "levels, given class, age, hat." in report.markdown()


def test_evaluate_leaves_out_what_the_regressor_cannot_learn(make_pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(regressor, "train_network", lambda *args: None)
    monkeypatch.setattr(image_sets, "sample", lambda *args, **kwargs: pytest.fail("images are drawn"))
    data = squares(60)
    protocol = Protocol(**MEASURED, metrics=["condition_agreement"], sampling={"num_inference_steps": 2})
    data.conditions[:] = torch.tensor([40.0, 1])
    with pytest.raises(UserError, match="condition_agreement: all reference images have the same conditions"):
        evaluate(make_pipe(), data, protocol)
    data.conditions[regressor.held_out(60, regressor.HELD_OUT)[1][0]] = torch.tensor([50.0, 0])  # not to train on
    with pytest.raises(UserError, match="real images to train a regressor on have the same conditions"):
        evaluate(make_pipe(), data, protocol)

    monkeypatch.undo()
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(regressor, "train_network", lambda *args: None)
    data = squares(60)
    data.conditions[:, 1] = 1
    data.conditions[:2, 0] = 90
    report = evaluate(make_pipe(), data, protocol)
    assert report.per_condition.keys() == {"age"}
    assert any("agreement with hat was not measured" in warning for warning in report.warnings)
    assert any("of 64 images were drawn by values far outside" in warning for warning in report.warnings)


def test_the_pipeline_says_what_is_a_label(monkeypatch):
    monkeypatch.setattr(regressor, "train_network", lambda *args: None)
    data = squares(40)
    trained = regressor.load_regressor(data, data, labels=[])  # `hat` is 0 and 1 here, and a number to the model
    assert trained.compare(data)["hat"].keys() >= {"condition_error"}
    data.conditions[:] = data.conditions[:1].clone()  # no correlation with one value
    assert "age with a mean error of" in trained.summary() and "correlation" not in trained.summary()


def test_evaluate_names_what_is_missing(make_pipe):
    data = squares(60)
    without = ImageData(data.images, None, None, "squares", "test", "")
    asked = {**MEASURED, "metrics": ["condition_agreement"], "sampling": {"num_inference_steps": 2}}
    with pytest.raises(UserError, match="no conditions: name their columns by --condition_columns"):
        evaluate(make_pipe(), without, Protocol(**asked))
    with pytest.raises(UserError, match="has no age, hat: name the columns"):
        evaluate(make_pipe(), without, Protocol(**{**asked, "metrics": ["frechet_distance"]}))
    with pytest.raises(UserError, match="drawn by no conditions"):
        evaluate(without, data, Protocol(**asked))
    of_call = {"conditions": {"age": 30, "hat": 1}}
    with pytest.raises(UserError, match="`sampling` gives `conditions`.* leave it out"):
        evaluate(make_pipe(), data, Protocol(**{**asked, "sampling": of_call}))
    with pytest.raises(
        UserError, match="takes the class of a real image, and the reference has no labels.* --label_column"
    ):
        evaluate(make_pipe(2), data, Protocol(**asked))
    with pytest.raises(UserError, match="bits_per_dim: they depend on the conditions"):
        evaluate(make_pipe(), data, Protocol(**{**asked, "metrics": ["bits_per_dim"]}))


def test_evaluate_finds_the_columns_of_the_run(tmp_path):
    arrays = {}
    for split, seed in (("train", 0), ("test", 1)):
        data = squares(64, seed)
        arrays |= {f"image_{split}": data.images[:, 0].numpy(), f"age_{split}": data.conditions[:, 0].numpy()}
    np.savez(tmp_path / "squares.npz", **arrays)
    flags = ("--train_data_dir", str(tmp_path / "squares.npz"), "--condition_columns", "age_train")
    folder = tmp_path / "run"
    train_conditional.main([*TINY_DIFFUSION, *flags, "--max_train_steps", "1", "--output_dir", str(folder)])
    measured = ("--features", "pixels", "--num_images", "20", "--num_jackknife", "0", "--baselines", "none")
    assert run("evaluate", folder, *measured, **FAST) == 0
    (report,) = (folder / "reports").rglob("report.json")
    report = json.loads(report.read_text())
    assert report["source"]["conditions"] == ["age"] and report["measured_by"]["reference"]["split"] == "test"
