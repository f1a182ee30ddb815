"""
Each family trains on images that are not square, resumes to the bit, and is measured on such images. Those without guidance
have two channels, classes and conditions.
"""

import numpy as np
import pytest
import yaml
from PIL import Image

from tiny import TINY_NETWORK
from tiny_diffusers import TinyPipeline, cli
from tiny_diffusers.evaluation.report import Report
from tiny_diffusers.train_scripts import (
    train_conditional,
    train_dcgan,
    train_pixelcnn,
    train_unconditional,
    train_vae,
)


NETWORK = []  # besides the flags of each family
HEIGHT, WIDTH = 12, 16
DIFFUSION = [*TINY_NETWORK, "--ddpm_num_inference_steps", "2"]
TRANSFORMER = ["--num_layers", "1", "--num_attention_heads", "1", "--attention_head_dim", "8"]
FAMILIES = {
    "unet": (train_unconditional, DIFFUSION),
    "transformer": (
        train_unconditional,
        ["--network", "transformer", "--ddpm_num_inference_steps", "2", *TRANSFORMER],
    ),
    "conditional": (train_conditional, [*DIFFUSION, "--conditioning", "low_resolution:4"]),
    "pixelcnn": (
        train_pixelcnn,
        ["--hidden_channels", "6", "--num_layers", "2", "--eval_batch_size", "1", "--class_dropout_prob", "0.5"],
    ),
    "vae": (train_vae, ["--block_out_channels", "8", "--latent_dim", "4"]),
    "dcgan": (
        train_dcgan,
        ["--generator_channels", "8", "--discriminator_channels", "8", "--latent_dim", "4"],
    ),
}
CONDITIONS = ["--class_conditional", "--condition_columns", "value,hat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 16 color images of 12x16 pixels in two classes: bright blocks on black."""
    folder = tmp_path_factory.mktemp("data") / "blocks"
    rng = np.random.default_rng(0)
    for i in range(16):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        row, column = rng.integers(HEIGHT - 3), rng.integers(WIDTH - 4)
        pixels[row : row + 3, column : column + 4] = rng.integers(80, 255, 3)
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """An .npz of 16 images of 12x16 pixels and two channels, with a number, a label and a class of each."""
    rng, values = np.random.default_rng(0), np.linspace(40, 220, 16)
    images = np.broadcast_to(values[:, None, None, None], (16, HEIGHT, WIDTH, 2)).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "values.npz"
    np.savez(
        path, image=images, value=values, hat=rng.integers(0, 2, 16), label=np.array(["a", "b"])[np.arange(16) % 2]
    )
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_equals_an_uninterrupted_one_and_its_images_have_the_datas_size(
    family, folder, arrays, train, train_in_two
):
    script, flags = FAMILIES[family]
    takes_conditions = script in (train_pixelcnn, train_vae, train_dcgan)
    data = [*CONDITIONS, "--train_data_dir", str(arrays)] if takes_conditions else ["--train_data_dir", str(folder)]
    argv = [*flags, *data]
    whole = train(*argv, name="whole", script=script, steps=2)
    resumed = train_in_two(*argv, stopped_at=1, script=script, steps=2)
    weights = sorted(path.relative_to(whole) for path in whole.glob("*/diffusion_pytorch_model.safetensors"))
    assert weights
    for path in (*weights, "samples.png"):
        assert (whole / path).read_bytes() == (resumed / path).read_bytes()
    assert yaml.safe_load((resumed / "config.yaml").read_text())["resolution"] == f"{HEIGHT}x{WIDTH}"
    pipe = TinyPipeline.from_pretrained(resumed)
    assert pipe._image_shape == (2 if takes_conditions else 3, HEIGHT, WIDTH)
    assert pipe._network.config.sample_size in ((HEIGHT, WIDTH), [HEIGHT, WIDTH])


def test_a_run_is_measured_on_images_of_its_size(folder, train, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    size = "6x8"
    run = train(*DIFFUSION, "--train_data_dir", str(folder), "--resolution", size, script=train_unconditional, steps=1)
    options = [
        *("--features", "pixels", "--num_images", "8", "--num_inference_steps", "1", "--num_jackknife", "0"),
        *("--metrics", "frechet_distance", "--baselines", "none", "--batch_size", "8"),
    ]
    assert cli.main(["evaluate", str(run), *options]) == 0
    assert f"resolution {size}" in capsys.readouterr().out
    reference = Report.load(run).measured_by["reference"]
    assert reference["shape"] == [3, 6, 8] and reference["load"]["resolution"] == size
    (report,) = run.rglob("report.json")
    assert cli.main(["evaluate", str(run), "--from_report", str(report), "--output", str(tmp_path / "again")]) == 0
    assert Report.load(tmp_path / "again").figures == Report.load(run).figures
    assert cli.main(["evaluate", str(run), *options, "--resolution", "6"]) == 2
    assert "6x8 color and the reference's are 6x6 color" in capsys.readouterr().err


def test_a_rectangle_that_the_levels_do_not_divide_is_refused_with_the_nearest(folder, check_mistake):
    data = ["--train_data_dir", str(folder)]
    words = ["--resolution 12x15", "multiple of 2", "the nearest size is 12x16"]
    two_levels = [*DIFFUSION, "--block_out_channels", "8", "8"]
    check_mistake([*two_levels, *data, "--resolution", "12x15"], words, script=train_unconditional)
    words = ["--generator_channels", "multiple of 8", "the nearest size is 8x16"]
    widths = ["--generator_channels", "8", "8", "8"]
    check_mistake([*data, *widths, "--resolution", "10x16"], words, script=train_dcgan)
