"""`tiny-diffusers plot KIND`, `describe` and `compare --settings`."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.utils import logging
from PIL import Image

import tiny
from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDCGANDiscriminator,
    TinyDCGANGenerator,
    TinyDCGANPipeline,
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyPipeline,
    TinyPixelCNNModel,
    TinyPixelCNNPipeline,
    TinyTransformer2DModel,
    TinyUNet2DModel,
    TinyVAEModel,
    TinyVAEPipeline,
    cli,
    noising,
    plots,
)
from tiny_diffusers.commands import plotting_images
from tiny_diffusers.commands.shared import names_that_differ
from tiny_diffusers.errors import UserError
from tiny_diffusers.network_summary import stages, summarize
from tiny_diffusers.plots import Curve, Curves, Panel, Strip, captioned_strips
from tiny_diffusers.plots import curves as drawing


SCHEDULERS = {"betas": TinyDDIMScheduler, "flow": TinyFlowMatchScheduler, "edm": TinyEDMScheduler}
FLAGS = ("--num_inference_steps", 3, "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_unet):
    """A checkpoint of each family and objective, of 8x8 gray images."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    pipes = {name: TinyPipeline(tiny_unet(), scheduler()) for name, scheduler in SCHEDULERS.items()}
    pipes["conditional"] = TinyConditionalPipeline(
        tiny_unet(num_class_embeds=3), TinyDDIMScheduler(), id2label={0: "cat", 1: "dog", 2: "frog"}
    )
    pipes["vae"] = TinyVAEPipeline(TinyVAEModel(8, 1, 4, (8,)))
    pipes["dcgan"] = TinyDCGANPipeline(TinyDCGANGenerator(8, 1, 4, (8,)).eval(), TinyDCGANDiscriminator(8, 1, (8,)))
    pipes["pixelcnn"] = TinyPixelCNNPipeline(TinyPixelCNNModel(8, 1, 16, hidden_channels=8, num_layers=2).eval())
    pipes["small"] = TinyPixelCNNPipeline(TinyPixelCNNModel(4, 1, 16, hidden_channels=8, num_layers=2).eval())
    for name, pipe in pipes.items():
        pipe.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("a", "0.001"), ("b", "0.002")):
        flags = ("--learning_rate", rate, "--validation_split", "0.1", "--save_images_steps", "2")
        tiny.train(folder / name, *flags, steps=4)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Works in a folder of the test's own; what the command line sets for the whole process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def drawn(monkeypatch):
    """The strips that a command draws."""
    found = []

    def record(strips, **options):
        found[:] = strips
        return captioned_strips(strips, **options)

    monkeypatch.setattr(plots, "captioned_strips", record)
    return found


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def error_line(capsys, *arguments):
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("tiny-diffusers: error: ")
    return lines[-1]


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


class TestNoiseLevels:
    @pytest.mark.parametrize("name", noising.SCHEDULES)
    def test_they_are_those_of_the_schedulers_own_noising(self, name):
        scheduler = noising.build_schedule(name, 100)
        levels = noising.noise_levels(scheduler)
        image, noise = torch.rand(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
        for t in (1, 50, 99):
            timestep = t if name != "edm" else np.log(levels.noise[t]) / 4
            expected = scheduler.add_noise(image, noise, torch.tensor([timestep]))
            ours = levels.signal[t] * image + levels.noise[t] * noise
            torch.testing.assert_close(ours.float(), expected.float(), atol=1e-4, rtol=1e-4)

    def test_that_of_betas_is_alphas_cumprod(self):
        scheduler = TinyDDIMScheduler(beta_schedule="cosine")
        levels = noising.noise_levels(scheduler)
        np.testing.assert_allclose(levels.signal**2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(levels.betas, scheduler.betas)
        np.testing.assert_allclose(levels.signal**2 + levels.noise**2, 1)

    @pytest.mark.parametrize("name", ["cosine", "flow", "edm"])
    def test_timesteps_go_from_t_toward_the_image(self, name):
        scheduler = noising.build_schedule(name, 100)
        timesteps = noising.timesteps_from(scheduler, 50, 5)
        assert len(timesteps) == 5 and sorted(timesteps, reverse=True) == timesteps
        scheduler.set_timesteps(timesteps=timesteps)
        if name == "edm":
            assert float(scheduler.sigmas[0]) == pytest.approx(noising.noise_levels(scheduler).noise[50], rel=1e-4)
            assert noising.caption(scheduler, timesteps[-1]) == "sigma 0.002"
        else:
            assert timesteps[0] == 50 and noising.caption(scheduler, 50) == "t = 50"


class TestCurves:
    CURVES = Curves([Panel("a title", "step", "loss", True, [Curve("a", [1, 2], [0.5, 0.25], 3, "points")])])

    def test_a_file_gives_the_curves_again(self, tmp_path):
        assert Curves.load(self.CURVES.save(tmp_path / "a.json")) == self.CURVES
        assert b"a title" in self.CURVES.draw(tmp_path / "a.svg").read_bytes()

    def test_names_are_drawn_as_they_are(self, tmp_path):
        names = ("$\\foo$", "_hidden", "a\nb\x1b[31m", "")
        curves = [Curve(name, [1, 2], [0.0, -1.0], style) for style, name in enumerate(names)]
        text = Curves([Panel("$x", "step", "$", False, curves)]).draw(tmp_path / "a.svg").read_text()
        assert "$\\foo$" in text and "_hidden" in text and "\x1b" not in text

    def test_no_two_curves_of_forty_look_alike(self):
        from tiny_diffusers.plots.curves import _options

        looks = [_options(Curve("", list(range(99)), list(range(99)), style)) for style in range(40)]
        in_gray = {(str(look["linestyle"]), look.get("marker")) for look in looks[:35]}
        assert len(in_gray) == 35
        assert len({(look["color"], str(look["linestyle"]), look.get("marker")) for look in looks}) == 40

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("[]", "is no file of curves"),
            ("{", "is no file of curves"),
            ('{"format": 2, "panels": []}', "has format 2"),
            ('{"format": 1, "panels": []}', "1 to 8 panels"),
            ('{"format": 1, "panels": [{"title": 1}]}', "is no file of curves"),
            (("0.25", "NaN"), "finite numbers"),
            (("0.25", '"x"'), "finite numbers"),
            (("[1, 2]", "[1]"), "as many values"),
            (("points", "blinking"), "its look one of line"),
            ((": 3", ": -3"), "a number from 0"),
            (("a title", "x" * 200), "at most 120 characters"),
            (
                (
                    '"panels": [',
                    '"panels": [{"title": "", "xlabel": "", "ylabel": "", "is_logarithmic": true, "curves": []}, ',
                ),
                "each with curves",
            ),
        ],
    )
    def test_a_file_of_anything_else_is_refused(self, tmp_path, change, words):
        file = self.CURVES.save(tmp_path / "a.json")
        file.write_text(change if isinstance(change, str) else file.read_text().replace(*change))
        with pytest.raises(UserError, match=words):
            Curves.load(file)

    def test_both_losses_of_several_runs(self, tmp_path):
        for name in "ab":
            lines = [{"step": i, "loss": 1 / i} for i in range(1, 30)] + [{"step": 9, "val_loss": 0.5}]
            (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
        logs = {name: tmp_path / name for name in "ab"}
        (panel,) = plots.loss_curves_of_runs(logs, "both").panels
        assert [curve.label for curve in panel.curves] == [
            f"{name}, {loss}" for name in "ab" for loss in ("training loss", "validation loss")
        ]
        assert [curve.style for curve in panel.curves] == [0, 0, 1, 1]
        (panel,) = plots.loss_curves_of_runs(logs, "train").panels
        assert panel.title == "training loss" and panel.is_logarithmic

    def test_the_losses_of_each_network_of_several_runs(self, tmp_path):
        for name in "ab":
            (tmp_path / name).write_text('{"step": 1, "generator_loss": 2.0, "discriminator_loss": 0.5}')
        logs = {name: tmp_path / name for name in "ab"}
        for which in (None, "train"):
            (panel,) = plots.loss_curves_of_runs(logs, which).panels
            assert [(curve.label, curve.y, curve.style) for curve in panel.curves] == [
                (f"{run}, {network}", [loss], style)
                for style, run in enumerate("ab")
                for network, loss in (("generator", 2.0), ("discriminator", 0.5))
            ]
            assert [curve.look for curve in panel.curves] == ["line", "thin"] * 2

    def test_a_schedule_has_a_short_name_and_no_empty_curve(self, tmp_path):
        levels = noising.noise_levels(noising.build_schedule("flow", 1))._asdict()  # its only step has no noise
        curves = plots.schedule_curves({"x" * 200: levels})
        assert [len(panel.curves) for panel in curves.panels] == [1]
        assert Curves.load(curves.save(tmp_path / "a.json")) == curves

    def test_many_runs_are_told_apart_beside_the_picture(self, tmp_path):
        curves = [Curve(f"run {style}", [1, 2], [0.5, 0.2], style) for style in range(6)]
        (axes,) = plots.new_axes()
        drawing._draw_panel(axes, Panel("", "step", "loss", True, curves), has_legend=True)
        axes.figure.canvas.draw()
        assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1
        many = [Curve(f"run {style} {'x' * 60}", [1, 2], [0.5, 0.2], style) for style in range(60)]
        (wide,) = plots.new_axes()
        drawing._draw_panel(wide, Panel("", "step", "loss", True, many), has_legend=True)
        wide.figure.canvas.draw()
        assert wide.get_window_extent().width > 600 and wide.get_window_extent().height > 400
        looks = {(line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
        assert len(looks) == len(curves)  # without colors

    def test_losses_below_0_are_on_a_linear_axis(self, tmp_path):
        (tmp_path / "a").write_text('{"step": 1, "loss": -1.0}')
        assert not plots.loss_curves_of_run(tmp_path / "a").panels[0].is_logarithmic


class TestStrips:
    def test_every_image_has_its_position_and_its_caption(self):
        images = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
        picture = np.asarray(captioned_strips([Strip(images, ["a", "b"]), Strip(images[:2])], padding=2))
        for column in range(3):
            x = 2 + column * (128 + 2)
            enlarged = images[column].repeat(2, 0).repeat(2, 1)
            np.testing.assert_array_equal(picture[2 : 2 + 128, x : x + 128], enlarged)
        captions = picture[130:156, 2:]
        assert [(captions[:, i * 130 : i * 130 + 128] < 128).any() for i in range(3)] == [True, True, False]
        assert (picture[156:, 2 + 2 * 130 :] == 255).all()  # the second strip is shorter

    def test_labels_are_one_short_line(self):
        image = Image.new("L", (8, 8))
        wide = captioned_strips([Strip([image], label="x" * 10_000, heading="a\nb\x1b[31m")])
        assert wide.width < 1000
        with pytest.raises(ValueError, match="of one size"):
            captioned_strips([Strip([image]), Strip([Image.new("L", (4, 4))])])


class TestPlotCurves:
    def test_schedules(self, checkpoints, capsys):
        assert run("plot", "schedules", "--output", "betas.svg") == 0
        curves = Curves.load("betas.json")
        assert [len(panel.curves) for panel in curves.panels] == [4, 4, 4]
        linear = curves.panels[2].curves[0]
        assert linear.label == "linear" and [linear.y[0], linear.y[-1]] == pytest.approx([1e-4, 0.02])
        assert run("plot", "schedules", checkpoints / "flow", checkpoints / "edm", "--output", "own.png") == 0
        share, ratio = Curves.load("own.json").panels  # neither has betas
        halfway = share.curves[0].x.index(500)
        assert share.curves[0].y[halfway] == 0.5 and "EDM" in share.xlabel
        assert "can't have a noise schedule" in error_line(capsys, "plot", "schedules", checkpoints / "vae")
        assert "Unknown schedule 'cosin'" in error_line(capsys, "plot", "schedules", "--schedules", "cosin")

    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (["runs/a"], ["a"]),
            (["runs/a", "runs/b"], ["a", "b"]),
            (["runs/a", "other/b"], ["a", "b"]),
            (["x/a", "y/a"], ["x", "y"]),
            (["study/linear/seed-0", "study/cosine/seed-0"], ["linear", "cosine"]),
            (["study/a/seed-0", "study/a/seed-1", "study/b/seed-0"], ["a/seed-0", "a/seed-1", "b/seed-0"]),
            (["a", "runs/a"], ["a", "runs/a"]),
            (["runs/a", "runs/a"], ["runs/a", "runs/a"]),
        ],
    )
    def test_runs_have_the_names_that_tell_them_apart(self, paths, names):
        assert names_that_differ(paths) == names

    def test_losses_and_their_short_form(self, trained, capsys):
        assert run("plot", trained / "a", trained / "b", "--output", "short.png") == 0
        assert run("plot", "losses", trained / "a", trained / "b", "--output", "long.png") == 0
        assert Curves.load("short.json") == Curves.load("long.json")
        assert run("plot", "--output", "one.png", trained / "a") == 0
        assert [panel.title for panel in Curves.load("one.json").panels] == ["a"]
        assert run("plot", "losses", trained / "a", "--which", "train", "--output", "train.png") == 0
        assert Curves.load("train.json").panels[0].title == "training loss"

    def test_a_file_is_drawn_again(self, trained, tmp_path, capsys):
        assert run("plot", trained / "a", "--output", "a.png") == 0
        picture = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").unlink()
        assert run("plot", "a.json") == 0
        assert (tmp_path / "a.png").read_bytes() == picture
        assert run("plot", "--from", "a.json", "--output", "b.svg") == 0
        assert Curves.load("b.json") == Curves.load("a.json")
        assert "There is no file 'none.json'" in error_line(capsys, "plot", "none.json")
        assert "Give one file" in error_line(capsys, "plot", "redraw")

    def test_other_json_files_are_not_replaced(self, trained, tmp_path, capsys):
        (tmp_path / "run.json").write_text("{}")
        assert "exists and holds something else" in error_line(capsys, "plot", trained / "a", "--output", "run.png")
        assert (tmp_path / "run.json").read_text() == "{}"

    def test_mistakes_are_one_line(self, trained, checkpoints, tmp_path, capsys):
        def line(*arguments):
            return error_line(capsys, "plot", *arguments)

        assert "Did you mean 'denoising'" in line("denoisin", checkpoints / "betas")
        assert "kind of picture" in line()
        assert "no training log" in line(checkpoints / "betas")
        assert "must be a file that ends in .png, .svg or .pdf" in line(trained / "a", "--output", "x.gif")
        assert "--which" in line("losses", trained / "a", "--which", "test")
        (tmp_path / "bare").mkdir()
        (tmp_path / "bare" / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}')
        missing = line("losses", trained / "a", "bare", "--which", "validation")
        assert "'bare' has no validation loss in its log" in missing
        assert "Did you mean '--output'" in line("forward", "digits", "--outptu", "x.png")


class TestForward:
    def test_each_row_is_a_schedule_and_each_column_a_timestep(self, drawn):
        assert (
            run("plot", "forward", "digits", "--timesteps", "0,500,999", "--index", 3, "--schedules", "cosine,edm")
            == 0
        )
        assert [strip.label for strip in drawn] == ["cosine", "edm"]
        assert drawn[-1].captions == ["t = 0", "t = 500", "t = 999"]
        first = pixels([strip.images[0] for strip in drawn]).astype(int)
        assert np.abs(first[0] - first[1]).max() < 10  # hardly any noise
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(drawn[0].images[-1], plotting_images._to_pil(noise)[0], atol=1)

    def test_it_takes_pictures_and_the_data_of_runs(self, drawn, trained, tmp_path):
        Image.new("RGB", (300, 200), "red").save("a.png")
        assert run("plot", "forward", "a.png", "--schedules", "flow") == 0
        assert drawn[0].images[0].size == (64, 64) and drawn[0].images[0].getpixel((0, 0)) == (255, 0, 0)
        assert run("plot", "forward", trained / "a", "--schedules", "flow", "--index", 5) == 0
        own = pixels(drawn[0].images)
        assert run("plot", "forward", "digits", "--schedules", "flow", "--index", 5) == 0
        np.testing.assert_array_equal(own, pixels(drawn[0].images))

    def test_mistakes_are_one_line(self, tmp_path, capsys):
        (tmp_path / "cut.png").write_bytes(b"\x89PNG")

        def line(*arguments):
            return error_line(capsys, "plot", "forward", *arguments)

        assert "--timesteps 1000: there are 1,000 timesteps" in line("digits", "--timesteps", "0,1000")
        assert "not a list of whole numbers" in line("digits", "--timesteps", "a")
        assert "number 5000 on" in line("digits", "--index", 5000)
        assert "can't be read as a picture" in line("cut.png")
        assert "it must be a file that ends in" in line("digits", "--output", "x.xyz")


class TestDenoising:
    @pytest.mark.parametrize("objective", SCHEDULERS)
    def test_a_row_for_each_number_of_steps(self, checkpoints, drawn, objective):
        arguments = ("--num_inference_steps", "2,3", "--dtype", "float32")
        assert run("plot", "denoising", checkpoints / objective, *arguments) == 0
        assert [strip.label for strip in drawn] == ["2 steps", "3 steps"]
        assert [len(strip.images) for strip in drawn] == [3, 4]
        assert drawn[0].captions[0] == {"betas": "t = 500", "flow": "t = 1000", "edm": "sigma 80"}[objective]
        pipe = TinyPipeline.from_pretrained(checkpoints / objective)
        generator = torch.Generator().manual_seed(0)
        expected = pipe(generator=[generator], num_inference_steps=3).images[0]
        np.testing.assert_allclose(drawn[1].images[-1], expected, atol=1)
        np.testing.assert_allclose(drawn[0].images[0], drawn[1].images[0], atol=1)  # from one noise

    def test_the_last_predicted_x_0_is_the_image(self, checkpoints, drawn):
        arguments = ("--num_inference_steps", "3", "--what", "x0", "--dtype", "float32")
        assert run("plot", "denoising", checkpoints / "flow", *arguments) == 0
        np.testing.assert_allclose(drawn[0].images[-2], drawn[0].images[-1], atol=1)

    @pytest.mark.parametrize("objective", [*SCHEDULERS, "conditional"])
    def test_real_images_are_noised_to_t(self, checkpoints, drawn, objective):
        arguments = ("--dataset_name", "digits", "--from_timesteps", "1,500", "--num_inference_steps", 20)
        assert run("plot", "denoising", checkpoints / objective, *arguments, "--dtype", "float32") == 0
        given, *states, result = drawn[0].images
        assert drawn[0].captions[0] == "given" and drawn[0].label.startswith("from ")
        np.testing.assert_allclose(np.asarray(given).astype(int), states[0], atol=40)  # at t = 1 little is added
        assert len(drawn[1].images) > len(drawn[0].images)  # steps are as many as t is far

    def test_few_timesteps_have_fewer_rows(self, tiny_unet, drawn, tmp_path):
        TinyPipeline(tiny_unet(), TinyDDIMScheduler(num_train_timesteps=3)).save_pretrained(tmp_path / "few")
        assert run("plot", "denoising", tmp_path / "few") == 0
        assert [strip.label for strip in drawn] == ["3 steps"]
        assert run("plot", "denoising", tmp_path / "few", "--dataset_name", "digits") == 0
        assert [strip.label for strip in drawn] == ["from t = 1", "from t = 2"]

    def test_mistakes_are_one_line(self, checkpoints, capsys):
        def line(name, *arguments):
            return error_line(capsys, "plot", "denoising", checkpoints / name, *arguments)

        real = ("--dataset_name", "digits")
        assert "is a TinyVAEPipeline, which can't denoise" in line("vae")
        assert "--from_timesteps is for real images" in line("betas", "--from_timesteps", "3")
        assert "--from_timesteps 1000: there are 1,000 timesteps" in line("betas", *real, "--from_timesteps", "1000")
        assert "--from_timesteps 0" in line("betas", *real, "--from_timesteps", "0")
        assert "give one number" in line("betas", *real, "--num_inference_steps", "2,3")
        assert "give ddim or ddpm" in line("betas", *real, "--scheduler", "dpm")
        assert "give only one" in line("betas", *real, "--image", "a.png")


class TestSamples:
    def test_each_family_draws_from_the_same_seeds(self, checkpoints, drawn):
        names = ("betas", "conditional", "vae", "dcgan", "pixelcnn")
        folders = [checkpoints / name for name in names]
        assert run("plot", "samples", *folders, "--num_images", 4, *FLAGS) == 0
        assert [strip.label for strip in drawn] == list(names)
        assert drawn[1].captions == ["cat", "cat", "dog", "frog"] and not drawn[0].captions
        pipe = TinyPipeline.from_pretrained(checkpoints / "vae")
        expected = pipe(batch_size=4, generator=[torch.Generator().manual_seed(i) for i in range(4)]).images
        np.testing.assert_allclose(pixels(drawn[2].images), pixels(expected), atol=1)

    def test_mistakes_are_one_line(self, checkpoints, capsys):
        def line(*arguments):
            return error_line(capsys, "plot", "samples", *arguments, "--num_images", 2)

        sizes = line(checkpoints / "vae", checkpoints / "small")
        assert "draws 8x8 pixels and" in sizes and "4x4: give checkpoints of one size" in sizes
        few = line(checkpoints / "conditional", "--class_labels", "cat,dog,frog")
        assert "--num_images 2 is less than the 3 of --class_labels" in few
        assert "--temperature means nothing to any" in line(checkpoints / "vae", "--temperature", 0.5)


class TestEpochs:
    def test_the_grids_of_a_run_in_order(self, trained, drawn):
        assert run("plot", "epochs", trained / "a") == 0
        captions = [caption for strip in drawn for caption in strip.captions]
        assert [caption.partition(",")[0] for caption in captions] == ["step 2", "step 4"]
        assert captions[-1].endswith(f"epoch {4 * 8 / 58:.3g}")

    def test_the_last_grid_is_left_out_if_it_is_of_another_size(self, drawn, tmp_path):
        (tmp_path / "samples").mkdir()
        (tmp_path / "train_log.jsonl").write_text('{"step": 3, "loss": 1.0, "epoch": 1.0}')
        for name, width in (("samples/step-0000001", 8), ("samples/step-0000002", 8), ("samples", 16)):
            Image.new("L", (width, 8)).save(f"{name}.png")
        assert run("plot", "epochs", tmp_path) == 0
        assert [strip.captions for strip in drawn] == [["step 1", "step 2"]]

    def test_mistakes_are_one_line(self, trained, checkpoints, tmp_path, capsys):
        assert "has no sample grids" in error_line(capsys, "plot", "epochs", checkpoints / "vae")
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / "step-0000001.png").write_text("text")
        assert "can't be read as a picture" in error_line(capsys, "plot", "epochs", tmp_path)
        for step, side in ((1, 8), (2, 16)):
            Image.new("L", (side, side)).save(f"samples/step-{step:07}.png")
        assert "of several sizes" in error_line(capsys, "plot", "epochs", tmp_path)


class TestInterpolation:
    @pytest.mark.parametrize(
        ("name", "labels"),
        [("betas", ["DDIM", "DDPM"]), ("flow", ["ODE", "eta 1"]), ("conditional", ["DDIM", "DDPM"]), ("vae", [""])],
    )
    def test_the_ends_without_fresh_noise_are_the_samples(self, checkpoints, drawn, name, labels, capsys):
        flags = FLAGS if name != "vae" else ("--dtype", "float32", "--device", "cpu")
        assert run("plot", "interpolation", checkpoints / name, "--num_frames", 3, *flags) == 0
        assert [strip.label for strip in drawn] == labels and drawn[-1].captions == ["0%", "50%", "100%"]
        assert "warning" not in capsys.readouterr().err
        pipe = TinyPipeline.from_pretrained(checkpoints / name)
        options = {} if name == "vae" else {"num_inference_steps": 3, "eta": 0.0}
        if name == "conditional":
            options["class_labels"] = "cat"
        expected = pipe(generator=[torch.Generator().manual_seed(1)], batch_size=1, **options).images[0]
        np.testing.assert_allclose(drawn[0].images[-1], expected, atol=1)

    def test_mistakes_are_one_line(self, checkpoints, capsys):
        assert "has no latents" in error_line(capsys, "plot", "interpolation", checkpoints / "pixelcnn")
        assert "--num_frames" in error_line(capsys, "plot", "interpolation", checkpoints / "vae", "--num_frames", 1)


class TestGuidance:
    def test_classes_by_scales_and_walks_between_classes(self, checkpoints, drawn):
        flags = ("--guidance_scales", "0,1,3", "--num_frames", 4, "--num_walks", 1)
        assert run("plot", "guidance", checkpoints / "conditional", *flags, *FLAGS) == 0
        assert [strip.label for strip in drawn] == ["cat", "dog", "frog", "cat to dog"]
        assert drawn[2].captions == ["w = 0", "w = 1", "w = 3"] and len(drawn[3].images) == 4
        first = pixels([strip.images[0] for strip in drawn[:3]])
        np.testing.assert_array_equal(first[0], first[1])  # at w = 0 no class counts
        pipe = TinyPipeline.from_pretrained(checkpoints / "conditional")
        generator = [torch.Generator().manual_seed(0)]
        expected = pipe("dog", guidance_scale=3.0, num_inference_steps=3, generator=generator).images[0]
        np.testing.assert_allclose(drawn[1].images[2], expected, atol=1)

    def test_mistakes_are_one_line(self, checkpoints, capsys):
        assert "has no classes" in error_line(capsys, "plot", "guidance", checkpoints / "betas")
        assert "can't be guided" in error_line(capsys, "plot", "guidance", checkpoints / "dcgan")
        arguments = ("plot", "guidance", checkpoints / "conditional", "--guidance_scales", "1,inf")
        assert "not a list of finite numbers" in error_line(capsys, *arguments)


class TestReconstructions:
    def test_pairs_of_images(self, checkpoints, drawn):
        arguments = ("--dataset_name", "digits", "--num_images", 10)
        assert run("plot", "reconstructions", checkpoints / "vae", *arguments) == 0
        assert [(strip.label, len(strip.images)) for strip in drawn] == [
            *(("given", 8), ("rebuilt", 8), ("given", 2), ("rebuilt", 2))
        ]
        pipe = TinyPipeline.from_pretrained(checkpoints / "vae")
        expected = pipe.reconstruct(torch.from_numpy(pixels(drawn[0].images) / 255.0)[:, None]).images
        np.testing.assert_allclose(pixels(drawn[1].images), pixels(expected), atol=1)

    def test_mistakes_are_one_line(self, checkpoints, capsys):
        assert "can't reconstruct" in error_line(capsys, "plot", "reconstructions", checkpoints / "betas")
        assert "--dataset_name" in error_line(capsys, "plot", "reconstructions", checkpoints / "vae")


class TestDescribe:
    NETWORKS = {
        "unet": lambda: TinyUNet2DModel(16, 1, 1, (8, 16), layers_per_block=1, attention=("none", "full")),
        "stock": lambda: UNet2DModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        "conditional": lambda: TinyUNet2DModel(
            8, 1, 1, (8,), layers_per_block=1, attention="none", num_class_embeds=2
        ),
        "transformer": lambda: TinyTransformer2DModel(
            8,
            1,
            1,
            patch_size=2,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=4,
            position_embedding="learned",
        ),
        "vae": lambda: TinyVAEModel(8, 1, 4, (8, 8)),
        "generator": lambda: TinyDCGANGenerator(8, 1, 4, (8,), num_class_embeds=2, num_conditions=1),
        "discriminator": lambda: TinyDCGANDiscriminator(8, 1, (8,)),
        "baseline": lambda: TinyPixelCNNModel(4, 1, variant="baseline", hidden_channels=8, num_layers=4),
        "gated": lambda: TinyPixelCNNModel(4, 1, 16, hidden_channels=8, num_layers=2, num_conditions=2),
        "plusplus": lambda: TinyPixelCNNModel(8, 1, variant="plusplus", hidden_channels=8, num_layers=1),
        "row_lstm": lambda: TinyPixelCNNModel(4, 1, 16, "row_lstm", hidden_channels=8, num_layers=2, num_conditions=2),
    }

    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_parameters_of_the_layers_are_those_of_the_network(self, name, tmp_path):
        network = self.NETWORKS[name]()
        total = sum(parameter.numel() for parameter in network.parameters())
        for leaves in (False, True):
            rows = summarize(network, leaves)
            assert sum(row.parameters for row in rows) == total
            assert len({row.name for row in rows}) == len(rows)
        plots.draw_network(stages(network), name, tmp_path / "a.svg")

    @pytest.mark.parametrize("name", ["unet", "stock"])
    def test_the_levels_of_a_unet(self, name):
        parts = stages(self.NETWORKS[name]())
        flow = [stage for stage in parts if stage.kind != "embedding"]
        assert [stage.title for stage in flow] == ["input", "16x16", "8x8", "16x16", "output"]
        assert [stage.has_attention for stage in flow] == [False, False, True, False, False]
        assert flow[1].skips_to == 3 and flow[2].lines[0] == "8 → 16 channels"

    def test_the_blocks_of_a_transformer(self):
        parts = stages(self.NETWORKS["transformer"]())
        flow = [stage for stage in parts if stage.kind != "embedding"]
        assert [(stage.title, stage.side, stage.has_attention) for stage in flow] == [
            ("input", 8, False),
            ("4x4", 4, True),  # of patches: their embedding, two blocks, the norm and the projection
            ("output", 8, False),
        ]
        assert flow[1].lines[:2] == ["8 → 4 channels", "5 layers"]
        assert [stage.title for stage in parts[3:]] == ["time_embed", "modulation_out"]

    @pytest.mark.parametrize(
        ("network", "titles"),
        [
            (
                lambda: TinyUNet2DModel((8, 12), 1, 1, (8, 8), layers_per_block=1, attention="none"),
                ["input", "8x12", "4x6", "8x12", "output"],
            ),
            (
                lambda: TinyTransformer2DModel((8, 12), 1, 1, 2, 1, 1, 8),
                ["input", "4x6", "output"],
            ),
            (lambda: TinyVAEModel((8, 12), 1, 4, (8,)), ["input", "4x6", "vector", "4x6", "8x12", "output"]),
            (lambda: TinyPixelCNNModel((4, 6), 1, hidden_channels=8, num_layers=1), ["input", "4x6", "output"]),
            (
                lambda: TinyPixelCNNModel((4, 6), 1, variant="row_lstm", hidden_channels=8, num_layers=2),
                ["input", "4x6", "output"],
            ),
        ],
        ids=["unet", "transformer", "vae", "pixelcnn", "row_lstm"],
    )
    def test_parts_have_their_height_and_width(self, network, titles):
        assert [stage.title for stage in stages(network()) if stage.kind != "embedding"] == titles

    def test_a_network_of_no_size_is_one_line(self):
        network = UNet2DModel(
            sample_size=None,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
        with pytest.raises(ValueError, match="has no `sample_size`: set it"):
            summarize(network)

    def test_the_shapes_are_those_of_one_image(self):
        rows = {row.name: row.shape for row in summarize(self.NETWORKS["unet"]())}
        assert rows["conv_in"] == (8, 16, 16) and rows["mid.0"] == (16, 8, 8) and rows["conv_out"] == (1, 16, 16)

    def test_the_latents_of_a_vae_are_between_its_halves(self):
        titles = [stage.title for stage in stages(self.NETWORKS["vae"]())]
        assert titles == ["input", "4x4", "2x2", "vector", "2x2", "4x4", "8x8", "output"]

    def test_the_command_prints_the_table_and_draws_each_network(self, checkpoints, tmp_path, capsys):
        assert run("describe", checkpoints / "dcgan", "--output", "net.png") == 0
        printed = capsys.readouterr().out
        assert "generator: TinyDCGANGenerator" in printed and "UpBlock" in printed
        assert sorted(path.name for path in tmp_path.iterdir()) == ["net-discriminator.png", "net-generator.png"]
        assert run("describe", checkpoints / "betas", "--leaves", "--output", "net.svg") == 0
        assert "GroupNorm" in capsys.readouterr().out
        assert "it must be a file" in error_line(capsys, "describe", checkpoints / "vae", "--output", "net.gif")


class TestCompareSettings:
    def test_the_settings_that_differ_are_a_column_each(self, trained, tmp_path, capsys):
        assert run("compare", trained / "a", trained / "b", "--settings", "--output", "table.md") == 0
        head, _, *rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
        columns = [cell.strip() for cell in head.strip("|").split("|")]
        assert columns[:2] == ["run", "learning_rate"] and "validation loss, lowest" in columns
        assert "output_dir" not in columns and len(rows) == 2
        assert [row.strip("| ").split(" | ")[1] for row in rows] == ["0.001", "0.002"]
        assert "settings are the same in all runs" in capsys.readouterr().out
        assert run("compare", trained / "a", trained / "b", "--all_settings") == 0
        assert "train_batch_size" in capsys.readouterr().out

    def test_of_a_run_with_several_reports_one_is_named(self, trained, tmp_path, capsys):
        shutil.copytree(trained / "a", "a")
        protocol = ("--features", "pixels", "--metrics", "frechet_distance", "--num_images", 8, "--split", "train")
        for steps in (2, 3):
            assert run("evaluate", "a", *protocol, "--num_inference_steps", steps, "--name", f"of-{steps}") == 0
        line = error_line(capsys, "compare", "a", trained / "b", "--settings")
        assert "2 reports (of-2, of-3) and none is published" in line
        values = set()
        for report in ("a/reports/of-2/report.json", "a/reports/of-3"):
            assert run("compare", report, trained / "b", "--settings") == 0
            row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {report}"))
            values.add(row.split(" | ")[-1])
            assert " | 0.001 | " in row
        assert len(values) == 2

    def test_a_folder_of_no_run_is_refused(self, checkpoints, trained, capsys):
        line = error_line(capsys, "compare", trained / "a", checkpoints / "vae", "--settings")
        assert "has no config.yaml" in line
