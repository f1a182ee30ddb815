import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.utils import logging
from PIL import Image

from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDCGANGenerator,
    TinyDCGANPipeline,
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyImg2ImgPipeline,
    TinyPipeline,
    TinyPixelCNNModel,
    TinyPixelCNNPipeline,
    TinyVAEModel,
    TinyVAEPipeline,
    cards,
    cli,
    hub,
)
from tiny_diffusers.commands import evaluation, sampling
from tiny_diffusers.runs import RunFolder
from tiny_diffusers.samplers import SCHEDULERS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_unet):
    folder = tmp_path_factory.mktemp("checkpoint")
    TinyPipeline(tiny_unet(), TinyDDIMScheduler(beta_schedule="cosine")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conditional_checkpoint(tmp_path_factory, tiny_unet):
    folder = tmp_path_factory.mktemp("conditional")
    unet = tiny_unet(num_class_embeds=3)
    pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(), id2label={0: "cat", 1: "dog", 2: "frog"})
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def process_state(monkeypatch):
    """The command line sets what belongs to the whole process: as it was for the tests that follow."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # leaves torch's threads alone
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def sample(checkpoint, output, *arguments):
    """Runs `sample` in the exact number format with few steps; returns the images of the folder `output`."""
    options = ["--num_inference_steps", 3, "--dtype", "float32", "--device", "cpu", "--output", f"{output}/"]
    assert run("sample", checkpoint, *options, *arguments) == 0
    files = sorted(output.iterdir())
    assert [file.name for file in files] == [f"{i:05}.png" for i in range(len(files))]
    return [np.asarray(Image.open(file)) for file in files]


def error_line(capsys, *arguments):
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("tiny-diffusers: error: ")
    return lines[-1]


class TestSample:
    def test_image_i_is_the_pipelines_own_with_seed_plus_i(self, checkpoint, tmp_path):
        images = sample(checkpoint, tmp_path / "a", "--num_images", 3, "--seed", 5)
        pipe = TinyPipeline.from_pretrained(checkpoint)
        for i, image in enumerate(images):
            generator = torch.Generator().manual_seed(5 + i)
            expected = pipe(generator=generator, num_inference_steps=3).images[0]
            np.testing.assert_allclose(image, np.asarray(expected), atol=1)

    def test_the_images_of_two_models_are_not_mixed(self, checkpoint, tmp_path, capsys):
        sample(checkpoint, tmp_path / "a", "--num_images", 3)
        sample(checkpoint, tmp_path / "a", "--num_images", 3, "--seed", 5)  # replaces all of them
        message = error_line(capsys, "sample", checkpoint, "--output", f"{tmp_path}/a/", "--num_images", 2)
        assert "more numbered images than the 2 to be saved, such as 00002.png" in message

    def test_a_tilde_is_the_home_folder_wherever_it_is_typed(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "model").symlink_to(checkpoint)
        assert run("sample", "~/model", "--num_images", 1, "--num_inference_steps", 1, "--output=~/a.png") == 0
        assert (tmp_path / "a.png").is_file()

    def test_no_image_depends_on_the_batch_size(self, checkpoint, tmp_path):
        arguments = ("--num_images", 5, "--scheduler", "ddpm")  # its noise at each step is drawn per image too
        one, two = (sample(checkpoint, tmp_path / str(b), *arguments, "--batch_size", b) for b in (5, 2))
        np.testing.assert_allclose(one, two, atol=1)
        assert len(np.unique(one, axis=0)) == 5

    def test_a_picture_shows_all_images_enlarged(self, checkpoint, tmp_path, capsys):
        output = tmp_path / "new folder" / "samples.png"
        arguments = ("--num_images", 4, "--num_inference_steps", 2, "--output", output)
        assert run("sample", checkpoint, *arguments) == 0
        with Image.open(output) as picture:
            assert picture.mode == "L" and 512 <= picture.width <= 1024
        assert str(output) in capsys.readouterr().out

    @pytest.mark.parametrize("name", SCHEDULERS["betas"])
    def test_every_scheduler_samples(self, checkpoint, tmp_path, name):
        arguments = ("--num_images", 2, "--scheduler", name, "--num_inference_steps", 8)  # the fewest of pndm
        assert len(sample(checkpoint, tmp_path / name, *arguments)) == 2

    @pytest.mark.parametrize(("scheduler", "other"), [(TinyFlowMatchScheduler, "lms"), (TinyEDMScheduler, "unipc")])
    def test_every_scheduler_of_flow_and_edm_samples(self, tiny_unet, tmp_path, capsys, scheduler, other):
        checkpoint = tmp_path / "model"
        TinyPipeline(tiny_unet(), scheduler()).save_pretrained(checkpoint)
        objective = "flow" if scheduler is TinyFlowMatchScheduler else "edm"
        for name in SCHEDULERS[objective]:
            assert len(sample(checkpoint, tmp_path / name, "--num_images", 2, "--scheduler", name)) == 2
        message = error_line(capsys, "sample", checkpoint, "--scheduler", other)
        assert f"--scheduler {other} has no form for {objective}" in message and "heun" in message

    def test_a_number_of_steps_that_a_scheduler_cannot_take_is_one_line(self, checkpoint, tmp_path, capsys):
        arguments = ("--scheduler", "pndm", "--num_inference_steps", 3, "--output", tmp_path / "a.png")
        assert run("sample", checkpoint, *arguments) == 2
        assert "at least 8 with PNDMScheduler" in capsys.readouterr().err.splitlines()[-1]

    def test_the_scheduler_is_the_one_asked_for(self, checkpoint, tmp_path):
        pipe = TinyPipeline.from_pretrained(checkpoint)
        config = pipe.scheduler.config
        for name, scheduler in (
            ("dpm", DPMSolverMultistepScheduler.from_config(config)),
            ("sde_dpm", DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")),
            ("euler", EulerDiscreteScheduler.from_config(config)),
        ):
            pipe.scheduler = scheduler
            (image,) = sample(checkpoint, tmp_path / name, "--num_images", 1, "--scheduler", name)
            expected = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=3).images[0]
            np.testing.assert_allclose(image, np.asarray(expected), atol=1)

    def test_classes_share_the_images_evenly_and_in_order(self, conditional_checkpoint, tmp_path):
        arguments = ("--num_images", 4, "--class_labels", "frog, 0", "--guidance_scale", 2)
        images = sample(conditional_checkpoint, tmp_path / "a", *arguments)
        pipe = TinyPipeline.from_pretrained(conditional_checkpoint)
        generator = [torch.Generator().manual_seed(i) for i in range(4)]
        expected = pipe(
            class_labels=[2, 2, 0, 0],
            guidance_scale=2.0,
            generator=generator,
            num_inference_steps=3,
            output_type="pil",
        ).images
        np.testing.assert_allclose(images, [np.asarray(image) for image in expected], atol=1)

    def test_guidance_is_the_pipelines(self, conditional_checkpoint, tmp_path):
        flags = ("--guidance_interval", 0.0, 0.5, "--dynamic_thresholding", 0.9)
        arguments = ("--num_images", 2, "--class_labels", "cat", "--guidance_scale", 4)
        images = sample(conditional_checkpoint, tmp_path / "a", *arguments, *flags)
        pipe = TinyPipeline.from_pretrained(conditional_checkpoint)
        expected = pipe(
            class_labels=[0, 0],
            guidance_scale=4.0,
            guidance_interval=(0.0, 0.5),
            dynamic_thresholding=0.9,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
            num_inference_steps=3,
        ).images
        np.testing.assert_allclose(images, [np.asarray(image) for image in expected], atol=1)

    def test_temperature_is_a_pixelcnns(self, checkpoint, tmp_path, capsys):
        torch.manual_seed(0)
        network = TinyPixelCNNModel(4, 1, 16, hidden_channels=8, num_layers=2).eval()
        TinyPixelCNNPipeline(network).save_pretrained(tmp_path / "pixelcnn")
        paths = [tmp_path / f"{temperature}.png" for temperature in (1, 0.01)]
        for path in paths:
            assert run("sample", tmp_path / "pixelcnn", "--temperature", path.stem, "--output", path) == 0
        assert paths[0].read_bytes() != paths[1].read_bytes()
        line = error_line(capsys, "sample", checkpoint, "--temperature", 0.5, "--output", tmp_path / "x.png")
        assert "--temperature means nothing" in line

    def test_the_way_to_each_image_is_one_picture(self, checkpoint, tmp_path, capsys):
        arguments = ("--num_images", 3, "--batch_size", 2, "--num_inference_steps", 3, "--return_intermediates", 2)
        assert run("sample", checkpoint, *arguments, "--output", tmp_path / "way.png") == 0
        assert run("sample", checkpoint, *arguments[:-2], "--output", tmp_path / "grid.png") == 0
        with Image.open(tmp_path / "way.png") as way:
            assert way.width == way.height  # three images, each with two states before it
        line = error_line(capsys, "sample", checkpoint, *arguments, "--output", f"{tmp_path}/")
        assert "--return_intermediates" in line

    def test_the_rows_of_a_grid_are_named_where_each_is_of_one_class(self):
        assert sampling._class_rows(None) == {}
        assert sampling._class_rows(["cat"] * 4 + ["frog"] * 4) == {"columns": 4, "row_labels": ["cat", "frog"]}
        rows = sampling._class_rows(["cat"] * 32 + ["frog"] * 32)
        assert rows == {"columns": 16, "row_labels": ["cat", "cat", "frog", "frog"]}
        assert sampling._class_rows(["cat"] * 5 + ["dog"] * 4 + ["frog"] * 4) == {}

    def test_without_classes_a_conditional_checkpoint_draws_a_row_for_each(
        self, conditional_checkpoint, tmp_path, monkeypatch, capsys
    ):
        pipe = TinyPipeline.from_pretrained(conditional_checkpoint)
        images = sample(conditional_checkpoint, tmp_path / "all")
        expected = pipe(
            class_labels=[0] * 16 + [1] * 16 + [2] * 16,
            generator=[torch.Generator().manual_seed(i) for i in range(48)],
            num_inference_steps=3,
        ).images
        np.testing.assert_allclose(images, [np.asarray(image) for image in expected], atol=1)
        assert "drawing 48 images" in capsys.readouterr().err
        assert len(sample(conditional_checkpoint, tmp_path / "two", "--num_images", 2)) == 2
        assert len(sample(conditional_checkpoint, tmp_path / "none", "--guidance_scale", 0)) == 64  # of no class
        monkeypatch.setattr(sampling, "MAX_CLASSES", 2)
        assert len(sample(conditional_checkpoint, tmp_path / "many")) == 32
        assert "the first 2 of 3 classes; --class_labels names others" in capsys.readouterr().err

    def test_bad_input_is_one_line_before_any_work(self, checkpoint, conditional_checkpoint, tmp_path, capsys):
        def line(*arguments):
            return error_line(capsys, "sample", *arguments)

        assert "Did you mean 'heun'" in line(checkpoint, "--scheduler", "huen")
        assert "nowhere" in line(tmp_path / "nowhere")
        assert "model_index.json" in line(tmp_path)
        assert "--class_labels means nothing" in line(checkpoint, "--class_labels", "cat")
        assert "Did you mean 'cat'" in line(conditional_checkpoint, "--class_labels", "catt")
        few = line(conditional_checkpoint, "--class_labels", "cat,dog", "--num_images", 1)
        assert "--num_images 1 is less than the 2 of --class_labels" in few
        assert "num_inference_steps" in line(checkpoint, "--num_inference_steps", 0)
        assert "eta" in line(checkpoint, "--eta", 2)
        assert "--device" in line(checkpoint, "--device", "nothing")
        assert "'.xyz'" in line(checkpoint, "--output", tmp_path / "samples.xyz")
        (tmp_path / "file").touch()
        assert "can't be written to" in line(checkpoint, "--output", tmp_path / "file" / "samples.png")

    @pytest.mark.parametrize(
        "option",
        [("--num_images", "0"), ("--batch_size", "x"), ("--dtype", "int8"), ("--seed", "-1"), ("--seed", 2**64)],
    )
    def test_an_impossible_value_is_refused_by_its_flag(self, checkpoint, capsys, option):
        assert option[0] in error_line(capsys, "sample", checkpoint, *option)

    def test_an_unknown_flag_suggests_the_nearest(self, checkpoint, capsys):
        error = error_line(capsys, "sample", checkpoint, "--num_imags", 3)
        assert "Did you mean '--num_images' or '--image'?" in error  # the nearest first

    def test_what_is_not_the_users_mistake_keeps_its_traceback(self, checkpoint, tmp_path, monkeypatch):
        def fail(self, *args, **kwargs):
            raise RuntimeError("a fault")

        monkeypatch.setattr(TinyPipeline, "__call__", fail)
        with pytest.raises(RuntimeError, match="a fault"):
            run("sample", checkpoint, "--output", tmp_path / "samples.png")

    def test_the_number_format_that_is_chosen_is_said(self, checkpoint, tmp_path, monkeypatch, capsys):
        from tiny_diffusers import hardware

        monkeypatch.setattr(hardware, "default_dtype", lambda device: torch.bfloat16)
        arguments = ("--num_images", 1, "--num_inference_steps", 1, "--output", tmp_path / "a.png", "--device", "cpu")
        assert run("sample", checkpoint, *arguments) == 0
        assert "computing in torch.bfloat16 on cpu" in capsys.readouterr().err
        assert run("sample", checkpoint, *arguments, "--dtype", "float32") == 0
        assert "bfloat16" not in capsys.readouterr().err


class TestInterpolate:
    ARGUMENTS = ("--num_inference_steps", 3, "--dtype", "float32", "--device", "cpu")

    def test_its_ends_are_the_samples_of_its_seeds(self, checkpoint, tmp_path):
        output = tmp_path / "frames"
        arguments = ("--seeds", "3,8", "--num_frames", 5, "--output", f"{output}/")
        assert run("interpolate", checkpoint, *self.ARGUMENTS, *arguments) == 0
        frames = [np.asarray(Image.open(file)) for file in sorted(output.iterdir())]
        assert len(frames) == 5
        for frame, seed in ((frames[0], 3), (frames[-1], 8)):
            (image,) = sample(checkpoint, tmp_path / str(seed), "--num_images", 1, "--seed", seed, "--eta", 0)
            np.testing.assert_allclose(frame, image, atol=1)

    def test_an_animation_has_every_frame_enlarged(self, checkpoint, tmp_path):
        output = tmp_path / "walk.gif"
        assert run("interpolate", checkpoint, *self.ARGUMENTS, "--num_frames", 4, "--output", output) == 0
        with Image.open(output) as animation:
            assert animation.n_frames == 4 and animation.size == (256, 256)

    def test_a_picture_has_the_frames_in_a_row(self, checkpoint, tmp_path):
        output = tmp_path / "walk.png"
        assert run("interpolate", checkpoint, *self.ARGUMENTS, "--num_frames", 4, "--output", output) == 0
        with Image.open(output) as picture:
            assert picture.width > 3 * picture.height

    def test_it_walks_between_pictures(self, checkpoint, tmp_path, capsys):
        sample(checkpoint, tmp_path / "ends", "--num_images", 2)
        ends = sorted((tmp_path / "ends").iterdir())
        arguments = ("--images", *ends, "--interpolation", "linear", "--num_frames", 3)
        assert run("interpolate", checkpoint, *self.ARGUMENTS, *arguments, "--output", f"{tmp_path}/frames/") == 0
        assert len(list((tmp_path / "frames").iterdir())) == 3
        both = error_line(
            capsys, "interpolate", checkpoint, *arguments, "--seeds", "0,1", "--output", tmp_path / "a.gif"
        )
        assert "one of `seeds`" in both
        (tmp_path / "no.png").touch()
        line = error_line(capsys, "interpolate", checkpoint, "--images", tmp_path / "no.png", ends[0])
        assert "can't be read as a picture (of no format that Pillow knows)." in line

    def test_a_scheduler_that_adds_noise_takes_a_seed(self, checkpoint, tmp_path):
        def frames(name, *arguments):
            output = ("--scheduler", "ddpm", "--num_frames", 3, "--output", f"{tmp_path / name}/")
            assert run("interpolate", checkpoint, *self.ARGUMENTS, *output, *arguments) == 0
            return [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]

        one, same, other = frames("one"), frames("same", "--seed", 0), frames("other", "--seed", 7)
        assert one == same and all(a != b for a, b in zip(one, other, strict=True))

    def test_it_walks_between_classes(self, conditional_checkpoint, tmp_path):
        output = tmp_path / "walk.png"
        arguments = ("--seeds", "0,0", "--class_labels", "cat,frog", "--num_frames", 3, "--output", f"{output}")
        assert run("interpolate", conditional_checkpoint, *self.ARGUMENTS, *arguments) == 0

    def test_a_vae_and_a_gan_walk_their_latents(self, checkpoint, tmp_path, capsys):
        torch.manual_seed(0)
        vae = TinyVAEPipeline(TinyVAEModel(8, 1, 4, (8,)).eval())
        gan = TinyDCGANPipeline(TinyDCGANGenerator(8, 1, 4, (8,)).eval())
        device = ("--dtype", "float32", "--device", "cpu")
        for name, pipe in (("vae", vae), ("gan", gan)):
            pipe.save_pretrained(tmp_path / name)
            output = ("--seeds", "3,8", "--num_frames", 4, "--output", f"{tmp_path}/{name}-frames/")
            assert run("interpolate", tmp_path / name, *device, *output) == 0
            frames = [np.asarray(Image.open(file)) for file in sorted((tmp_path / f"{name}-frames").iterdir())]
            expected = pipe.interpolate(seeds=(3, 8), num_frames=4, output_type="np").images[..., 0]
            np.testing.assert_allclose(frames, 255 * expected, atol=1)

        ends = [tmp_path / "gan-frames" / f"{i:05}.png" for i in (0, 3)]
        output = ("--num_frames", 3, "--output", f"{tmp_path}/between/")
        assert run("interpolate", tmp_path / "vae", *device, "--images", *ends, *output) == 0
        expected = vae.interpolate([Image.open(end) for end in ends], num_frames=3).images
        frames = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "between").iterdir())]
        np.testing.assert_allclose(frames, [np.asarray(frame) for frame in expected], atol=1)
        line = error_line(capsys, "interpolate", tmp_path / "gan", *device, "--images", *ends, *output)
        assert "--images means nothing" in line

    def test_a_pixelcnn_has_no_latents(self, tmp_path, capsys):
        network = TinyPixelCNNModel(4, 1, 16, hidden_channels=8, num_layers=2).eval()
        TinyPixelCNNPipeline(network).save_pretrained(tmp_path / "pixelcnn")
        line = error_line(capsys, "interpolate", tmp_path / "pixelcnn", "--output", tmp_path / "a.gif")
        assert "a TinyPixelCNNPipeline, which has no latents to interpolate between" in line

    def test_bad_input_is_one_line(self, checkpoint, tmp_path, capsys):
        output = ("--output", tmp_path / "a.gif")
        assert "num_frames" in error_line(capsys, "interpolate", checkpoint, "--num_frames", 1, *output)
        for seeds in ("1", f"0,{2**64}"):
            line = error_line(capsys, "interpolate", checkpoint, "--seeds", seeds)
            assert f"'{seeds}' is not two whole numbers" in line


class TestEdit:
    ARGUMENTS = ["--num_inference_steps", 3, "--dtype", "float32", "--device", "cpu"]

    @pytest.fixture
    def pictures(self, tmp_path):
        folder = tmp_path / "pictures"
        folder.mkdir()
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{'ab'[i]}.png")
        (folder / "notes.txt").write_text("no picture")
        mask = Image.new("L", (8, 8))
        mask.paste(255, (4, 0, 8, 8))
        mask.save(tmp_path / "mask.png")
        return folder

    def edit(self, checkpoint, pictures, tmp_path, *arguments):
        """Edits a folder into a folder; returns the results by name."""
        output = tmp_path / "results"
        assert run("edit", checkpoint, "--image", pictures, *self.ARGUMENTS, *arguments, "--output", f"{output}/") == 0
        return {file.name: np.asarray(Image.open(file)) for file in sorted(output.iterdir())}

    def test_a_folder_becomes_a_folder_and_result_i_has_the_seed_plus_i(self, checkpoint, pictures, tmp_path):
        options = ["--strength", 0.7, "--num_images", 2, "--seed", 5, "--batch_size", 2]
        results = self.edit(checkpoint, pictures, tmp_path, *options)
        assert list(results) == ["a-0.png", "a-1.png", "b-0.png", "b-1.png"]
        pipe = TinyImg2ImgPipeline.from_pretrained(checkpoint)
        given = Image.open(pictures / "b.png")
        generator = [torch.Generator().manual_seed(8)]
        expected = pipe(given, strength=0.7, generator=generator, num_inference_steps=3, output_type="np").images[0]
        assert np.abs(results["b-1.png"] / 255.0 - expected[..., 0]).max() < 0.02

    def test_known_pixels_of_an_inpainted_picture_are_kept(self, checkpoint, pictures, tmp_path):
        options = ["--mask", tmp_path / "mask.png", "--num_images", 1, "--jump_n_sample", 1]
        results = self.edit(checkpoint, pictures, tmp_path, *options)
        assert list(results) == ["a.png", "b.png"]
        gray = np.asarray(Image.open(pictures / "a.png").convert("L"))
        np.testing.assert_array_equal(results["a.png"][:, :4], gray[:, :4])

    def test_an_inversion_has_one_result_unless_noise_is_asked_for(self, checkpoint, pictures, tmp_path):
        assert list(self.edit(checkpoint, pictures, tmp_path, "--inversion")) == ["a.png", "b.png"]
        assert len(self.edit(checkpoint, pictures, tmp_path / "noise", "--inversion", "--eta", 0.5)) == 8

    @pytest.mark.parametrize(
        ("arguments", "columns"),
        [
            (["--strength", 0.5], 2),
            (["--mask", "mask.png", "--num_images", 2], 6),
            (["--task", "super_resolution:2", "--degrade", "--num_images", 2], 6),
            (["--task", "deblur:0.7", "--degrade", "--method", "pigdm", "--noise_std", 0.1], 3),
            (["--task", "inpaint", "--mask", "mask.png"], 3),
        ],
    )
    def test_a_picture_shows_what_was_given_and_the_results(
        self, checkpoint, pictures, tmp_path, monkeypatch, arguments, columns
    ):
        """Given, mask or observed, results, and for several results mean and deviation."""
        monkeypatch.chdir(tmp_path)
        options = [*self.ARGUMENTS, "--num_images", 1, *arguments, "--output", "out.png"]
        assert run("edit", checkpoint, "--image", pictures, *options) == 0
        with Image.open("out.png") as picture:
            rows, scale = 2, (picture.width - 2) // columns - 2
            assert picture.width == columns * (scale + 2) + 2 and scale % 8 == 0
            assert picture.height >= rows * (scale + 2)

    def test_a_small_picture_is_enlarged(self, checkpoint, tmp_path):
        Image.new("L", (4, 4), 200).save(tmp_path / "small.png")
        options = [*self.ARGUMENTS, "--task", "super_resolution:2", "--num_images", 1, "--output", f"{tmp_path}/out/"]
        assert run("edit", checkpoint, "--image", tmp_path / "small.png", *options) == 0
        assert Image.open(tmp_path / "out" / "small.png").size == (8, 8)

    def test_a_class_guides(self, conditional_checkpoint, pictures, tmp_path):
        options = ["--class_labels", "frog", "--guidance_scale", 2, "--inversion", "--num_images", 1]
        assert len(self.edit(conditional_checkpoint, pictures, tmp_path, *options)) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--strength", 1.5], "`strength` must be in [0, 1]"),
            (["--mask", "mask.png", "--strength", 0.5], "--strength means nothing with --mask"),
            (["--noise_std", 0.1], "--noise_std means nothing with variations"),
            (["--task", "sharpen"], "super_resolution"),
            (["--task", "super_resolution"], "such as super_resolution:2"),
            (["--task", "super_resolution:3", "--degrade"], "divides the image's size"),
            (["--task", "deblur:0"], "from 0.1 to 100"),
            (["--task", "colorize"], "only those of 3 can be colored"),
            (["--task", "colorize:2"], "takes no number"),
            (["--task", "inpaint"], "takes a --mask"),
            (["--mask", "none.png"], "'none.png' can't be read as a picture (No such file or directory)."),
            (["--mask", "black.png"], "all black"),
            (["--mask", "large.png"], "size of the image"),
            (["--class_labels", "cat"], "has no classes"),
            (["--image", "none.png"], "can't be read as a picture"),
            (["--image", "."], "has no pictures"),
            (["--output", "pictures/", "--num_images", 1], "a.png' is one of the given pictures"),
            (["--image", "pictures/a.png", "--output", "pictures/a.png"], "is one of the given pictures"),
            (["--mask", "mask.png", "--output", "mask.png"], "is one of the given pictures"),
        ],
    )
    def test_mistakes_are_one_line(self, checkpoint, pictures, tmp_path, monkeypatch, capsys, arguments, message):
        empty = tmp_path / "empty"
        empty.mkdir()
        monkeypatch.chdir(empty if arguments[-1] == "." else tmp_path)
        Image.new("L", (8, 8)).save(tmp_path / "black.png")
        Image.new("L", (16, 16), 255).save(tmp_path / "large.png")
        options = ["--image", pictures, "--output", "out.png", *self.ARGUMENTS, *arguments]
        assert message in error_line(capsys, "edit", checkpoint, *options)

    def test_a_model_that_is_no_diffusion_is_refused(self, tmp_path, pictures, capsys):
        TinyVAEPipeline(TinyVAEModel(sample_size=8, block_out_channels=(8,), latent_dim=4)).save_pretrained(
            tmp_path / "vae"
        )
        line = error_line(capsys, "edit", tmp_path / "vae", "--image", pictures, "--output", tmp_path / "out.png")
        assert "a TinyVAEPipeline, which can't edit images" in line


class TestPlot:
    def test_one_run_and_several(self, tmp_path, capsys):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
        for runs in ("a",), ("a", "b"):
            output = tmp_path / f"{len(runs)}.png"
            assert run("plot", *(tmp_path / name for name in runs), "--output", output) == 0
            assert Image.open(output).size == (960, 540)
        assert run("plot", tmp_path / "a", "--output", tmp_path / "curves.txt") == 2
        assert run("plot", tmp_path / "nothing") == 2
        assert "no training log" in capsys.readouterr().err


class TestExportAndPush:
    def test_export_lays_the_code_and_takes_the_card_along(self, checkpoint, tmp_path):
        (checkpoint / "README.md").write_text("a card")
        (checkpoint / "reports" / "ddim-50").mkdir(parents=True)
        for name in ("report.json", ".paths.json"):
            (checkpoint / "reports" / "ddim-50" / name).touch()
        assert run("export", checkpoint, tmp_path / "exported") == 0
        assert [path.name for path in (tmp_path / "exported" / "reports" / "ddim-50").iterdir()] == ["report.json"]
        assert (tmp_path / "exported" / "unet" / "unet_tiny.py").is_file()
        assert (tmp_path / "exported" / "README.md").read_text() == "a card"

    def test_an_exported_card_loads_what_lies_beside_it(self, tiny_unet, tmp_path):
        pipe = TinyPipeline(tiny_unet(), TinyDDIMScheduler())
        source = hub.export(pipe, tmp_path / "source", with_code=False)
        for name in ("training.gif", "report.md"):
            RunFolder(source).record(source / name)
            (source / name).write_bytes(name.encode())
        (source / "loss_curves.png").write_bytes(b"of another run")
        cards.write_card(source, model_name="A", command="tiny-diffusers train vae", settings={}, data={})
        assert run("export", source, tmp_path / "code") == 0
        assert run("export", tmp_path / "code", tmp_path / "bare", "--no_code") == 0
        texts = [(tmp_path / name / "README.md").read_text() for name in ("source", "code", "bare")]
        assert ["trust_remote_code=True" in text for text in texts] == [False, True, False]
        assert texts[0] == texts[2] and "saved beside the weights" in texts[1]
        assert all(text.count("## How to load it") == text.count("## How it was made") == 1 for text in texts)
        assert (tmp_path / "code" / "training.gif").is_file() and (tmp_path / "code" / "report.md").is_file()
        assert not (tmp_path / "code" / "loss_curves.png").exists()

    def test_no_model_is_exported_onto_another(self, checkpoint, conditional_checkpoint, capsys):
        for target in (checkpoint, conditional_checkpoint):
            assert "holds a model or a run already" in error_line(capsys, "export", checkpoint, target)

    def test_push_hands_over_to_the_hub(self, monkeypatch, capsys):
        monkeypatch.setattr(hub, "push", lambda *args, **kwargs: f"{args} {kwargs}")
        assert run("push", "runs/digits", "me/digits", "--private") == 0
        assert (
            capsys.readouterr().out
            == "('runs/digits', 'me/digits') {'private': True, 'include': [], 'dry_run': False}\n"
        )

    def test_a_failed_push_is_one_line(self, tmp_path, capsys):
        assert "no model_index.json" in error_line(capsys, "push", tmp_path, "me/digits")


@pytest.mark.parametrize("command", ["sample", "interpolate", "evaluate"])
def test_ctrl_c_is_one_line_and_status_130(checkpoint, tmp_path, capsys, monkeypatch, command):
    def stop(args):
        raise KeyboardInterrupt

    for module in (sampling, evaluation):
        monkeypatch.setattr(module, "load_pipeline", stop)
    options = ["--dataset_name", "digits"] if command == "evaluate" else []
    assert run(command, checkpoint, "--output", tmp_path / "new", *options) == 130
    assert capsys.readouterr().err == "stopped.\n"


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "x"])
def test_names_that_no_system_takes_are_refused_in_one_line(checkpoint, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "too long" in error_line(capsys, "sample", checkpoint, "--output", f"{name}.png")
    assert "too long" in error_line(capsys, "interpolate", checkpoint, "--output", name)
    assert "too long" in error_line(capsys, "plot", name)
    error_line(capsys, "sample", name)


def test_no_name_commands_the_terminal(tmp_path, tiny_unet, capsys):
    names = {0: "\x1b[31mcat", 1: "dog"}
    TinyConditionalPipeline(tiny_unet(num_class_embeds=2), TinyDDIMScheduler(), id2label=names).save_pretrained(
        tmp_path
    )
    assert r"'\x1b[31m'" in error_line(capsys, "sample", tmp_path, "--class_labels", "\x1b[31m")
    error_line(capsys, "sample", tmp_path, "--\x1b[31m")
    error_line(capsys, "\x1b[31m")
    assert run("sample", tmp_path, "--num_inference_steps", 2, "--output", tmp_path / "\x1b[31m.png") == 0
    printed = capsys.readouterr()
    assert "\x1b[31m" not in printed.out + printed.err


def test_help_needs_neither_torch_nor_diffusers():
    script = (
        "import sys, tiny_diffusers.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("sample", "interpolate", "export", "push"):
        assert command in done.stdout


def test_each_command_has_an_example_that_it_takes(capsys):
    from tiny_diffusers.commands.plotting import KINDS
    from tiny_diffusers.studies.training import arguments_class
    from tiny_diffusers.training.arguments import parse_arguments

    for prefix, commands in (("", cli.COMMANDS), ("plot ", KINDS)):
        for name, command in commands.items():
            words = command.example.partition(" > ")[0].split()
            command.parser().parse_args(words)
            with pytest.raises(SystemExit):
                cli.main([*f"{prefix}{name} --help".split()])
            lines = capsys.readouterr().out.splitlines()
            assert lines[-2:] == ["example:", f"  tiny-diffusers {prefix}{name} {command.example}".rstrip()]
    script, *flags = cli.COMMANDS["train"].example.split()  # whose parser is the script's
    assert parse_arguments(arguments_class(script), flags).resolution == 32


def test_the_help_of_a_script_has_its_flags_in_groups_and_ends_with_its_examples(capsys):
    from tiny_diffusers.families.diffusion import DiffusionArguments
    from tiny_diffusers.training.arguments import parse_arguments

    assert cli.main(["train", "unconditional", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: tiny-diffusers train unconditional [--FLAG VALUE ...]"
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options:", "training data:", "training:", "network:", "diffusion:", "examples:"]
    command, _, flags = lines[-1].partition(" unconditional ")
    assert command == "  tiny-diffusers train" and parse_arguments(DiffusionArguments, flags.split()).resolution == 32


def test_the_help_lists_every_command_and_a_misspelled_one_is_told_its_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines if line[0] in cli.COMMANDS] == list(cli.COMMANDS)
    assert cli.main(["smaple"]) == 2
    assert "Unknown command 'smaple'" in (error := capsys.readouterr().err) and "Did you mean 'sample'?" in error
    assert cli.main(["train"]) == 2
    assert f"are required: {{{','.join(cli.SCRIPTS)}}}. --help" in capsys.readouterr().err


def test_a_shell_completes_commands_scripts_kinds_flags_choices_and_files(tmp_path, capsys):
    def complete(*words):
        names = " ".join(f"'{word}'" for word in words)
        ask = f"source completion; COMP_WORDS=({names}); COMP_CWORD={len(words) - 1}; _shtab_tiny_diffusers"
        done = subprocess.run(
            ["bash", "-c", f'{ask}; printf "%s\\n" "${{COMPREPLY[@]}}"'], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr
        return done.stdout.split()

    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    assert complete("tiny-diffusers", "sa") == ["sample"]
    assert complete("tiny-diffusers", "train", "un") == ["unconditional"]
    assert complete("tiny-diffusers", "train", "unconditional", "--max_train_m") == ["--max_train_minutes"]
    assert complete("tiny-diffusers", "plot", "guid") == ["guidance"]
    assert complete("tiny-diffusers", "plot", "guidance", "--num_w") == ["--num_walks"]
    assert complete("tiny-diffusers", "sample", "compl") == ["completion"]  # the file
    assert complete("tiny-diffusers", "sample", "runs", "--dtype", "bfl") == ["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_completion_of_other_shells_is_a_script_that_they_read(tmp_path, capsys, shell):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert cli.COMMANDS["doctor"].help in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    assert subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True).returncode == 0


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tiny_diffusers.cli"], capture_output=True, text=True)
    assert done.returncode == 2 and "COMMAND" in done.stderr
