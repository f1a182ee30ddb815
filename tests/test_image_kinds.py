"""Images of other channels and values than 8-bit gray and RGB, from file to sample."""

import json
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image

from tiny import TINY_DIFFUSION, TINY_RUN, train
from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDDIMScheduler,
    TinyPipeline,
    TinyVAEModel,
    TinyVAEPipeline,
    cards,
    cli,
    plots,
)
from tiny_diffusers.commands import real_images, shared
from tiny_diffusers.data import ImageData, denormalize, load_images, normalize
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import Protocol, evaluate, features
from tiny_diffusers.evaluation.images import as_levels, read_folder, round_to_8_bits
from tiny_diffusers.pipelines.pipeline_tiny import to_picture
from tiny_diffusers.train_scripts import train_conditional, train_dcgan, train_pixelcnn, train_unconditional, train_vae


LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the five channels, so that their order is seen


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))


def save(path, array):
    np.save(path, array)
    return str(path)


def arrays(count=12, channels=5, height=12, width=16, dtype=np.float32):
    values = np.random.default_rng(0).random((count, channels, height, width))
    return (values * (1 if dtype == np.float32 else np.iinfo(dtype).max)).astype(dtype)


# Channels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [2, 4, 5])
def test_the_channels_of_an_array_are_kept_in_order(tmp_path, channels, dtype):
    images = arrays(channels=channels, dtype=dtype)
    value_range = None if dtype == np.uint8 else "measured"
    for number, array in enumerate((images, images.transpose(0, 2, 3, 1))):
        for asked in (None, channels):
            data = load_images(save(tmp_path / f"{number}.npy", array), channels=asked, value_range=value_range)
            assert np.array_equal(data.images.numpy(), images)


def test_the_axis_of_channels_is_told_or_asked_for(tmp_path):
    data = load_images(save(tmp_path / "last.npy", arrays(3, 8, 8, 12, np.uint8)), channels=12)
    assert data.images.shape == (3, 12, 8, 8)
    cube = save(tmp_path / "cube.npy", arrays(3, 8, 8, 8, np.uint8))
    with pytest.raises(
        UserError, match=r"shape \(8, 8, 8\): none of the first and the last look like it. Set `channels`"
    ):
        load_images(cube)
    with pytest.raises(UserError, match=r"both of the first and the last are 8 long"):
        load_images(cube, channels=8)
    with pytest.raises(UserError, match=r"none of the first and the last are 5 long"):
        load_images(cube, channels=5)


@pytest.mark.parametrize("feature", ["array", "lists"])
def test_array_columns_of_parquet_files(tmp_path, feature):
    images = arrays(4, 5)
    value = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
    value = datasets.Array3D((5, 12, 16), "float32") if feature == "array" else value
    features = datasets.Features({"map": value, "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"map": list(images), "label": [0, 1, 0, 1]}, features=features)
    table.to_parquet(tmp_path / "maps.parquet")
    data = load_images(str(tmp_path / "maps.parquet"), cache_dir=tmp_path / "datasets")
    assert np.array_equal(data.images.numpy(), images) and data.labels.tolist() == [0, 1, 0, 1]
    assert data.value_range == (images.min(), images.max())


def test_pages_become_channels_where_asked_for(tmp_path):
    pages = arrays(1, 5, dtype=np.uint16)[0]
    first, *others = map(Image.fromarray, pages)
    (tmp_path / "stack").mkdir()
    first.save(tmp_path / "stack" / "0.tiff", save_all=True, append_images=others)
    data = load_images(str(tmp_path / "stack"), channels=5, value_range=(0, 65535))
    assert np.array_equal(data.images[0].numpy(), pages)
    one = load_images(str(tmp_path / "stack"))
    assert one.images.shape[1] == 1 and any("(value_range keeps them)" in note for note in one.notes)
    with pytest.raises(UserError, match="have 1 channels, and 7 are asked for"):
        load_images(str(tmp_path / "stack"), channels=7)


def test_alpha_is_kept_where_asked_for(tmp_path):
    pixels = arrays(1, 4, dtype=np.uint8)[0].transpose(1, 2, 0)
    folder = tmp_path / "icons"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "0.png")
    Image.fromarray(pixels[..., :3]).save(folder / "1.png")
    data = load_images(str(folder), channels=4)
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), pixels) and (data.images[1, 3] == 255).all()
    assert data.notes == ["1 of 2 images had no alpha channel, an opaque one was added"]
    gray = load_images(str(folder), channels=2).images
    assert gray.shape[1] == 2 and np.array_equal(gray[0, 1].numpy(), pixels[..., 3])
    assert load_images(str(folder)).images.shape[1] == 3  # laid on white


# Values


def test_values_are_measured_given_or_scaled(tmp_path):
    images = arrays(dtype=np.uint16)
    file = save(tmp_path / "deep.npy", images)
    assert load_images(file).images.dtype == torch.uint8
    measured = load_images(file, value_range="measured")
    assert measured.value_range == (images.min(), images.max()) and "kept as measured" in measured.notes[-1]
    window = load_images(file, value_range=(100, 60_000))
    assert np.array_equal(window.images.numpy(), images.clip(100, 60_000)) and "clipped" in window.notes[-1]
    assert load_images(file, value_range=["100", "60000"]).fingerprint == window.fingerprint  # from the cache
    assert len({data.fingerprint for data in (load_images(file), measured, window)}) == 3


def test_values_are_normalized_to_their_range_and_back():
    values = torch.tensor([-3.0, 0.0, 5.0])
    assert normalize(values, (-3, 5)).tolist() == [-1, -0.25, 1]
    torch.testing.assert_close(denormalize(normalize(values, (-3, 5)), (-3, 5)), values)
    assert denormalize(torch.tensor([-2.0, 2.0]), (-3, 5)).tolist() == [-3, 5]


@pytest.mark.parametrize(
    ("array", "options", "words"),
    [
        (np.full((2, 8, 8), np.nan), {}, r"2 of 2 images .* \(NaN or infinite values\)"),
        (np.full((2, 8, 8), np.inf), {}, r"NaN or infinite values"),
        (np.zeros((2, 8, 8)), {}, "All values of the images of 'x' are 0: there is nothing to learn"),
        (np.zeros((2, 8, 8)), {"value_range": (1, 0)}, "two finite numbers, the lower one first.* not '1 0'"),
        (np.zeros((2, 8, 8)), {"value_range": ["low", "high"]}, "or 'measured', not 'low high'"),
        (
            np.eye(8)[None],
            {"value_range": (5, 6)},
            "'x' are 5 in the value range, which 5 to 6 clips: there is nothing",
        ),
        (np.full((2, 8, 8), -1), {}, "from -1 to -1: they must be from 0 to 65535, or value_range must be set"),
    ],
)
def test_bad_values_are_one_line(tmp_path, array, options, words):
    with pytest.raises(UserError, match=words) as error:
        load_images(save(tmp_path / "x.npy", array), **options)
    assert "\n" not in str(error.value)


def test_what_is_clipped_is_counted(tmp_path):
    file = save(tmp_path / "x.npy", np.arange(200, dtype=np.uint16).reshape(2, 10, 10))
    assert (
        load_images(file, value_range=(10, 500)).notes[-1] == "values from 0 to 199, 5% of them clipped to 10 to 500"
    )


def test_resizing_stays_within_the_values(tmp_path):
    edges = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((3, 3), int)).astype(np.float32)[None]
    data = load_images(save(tmp_path / "edges.npy", edges), resolution=16)
    assert data.value_range == (0, 1) and data.images.shape[2:] == (16, 16)


@pytest.mark.parametrize("channels", [1, 2])
def test_booleans_have_one_scale(tmp_path, channels):
    masks = np.random.default_rng(0).random((4, channels, 8, 8)) < 0.5
    data = load_images(save(tmp_path / "masks.npy", masks), value_range="measured")
    assert data.value_range == (0, 255) and np.array_equal(data.images.numpy() == 255, masks)


def test_float_colors_become_gray(tmp_path):
    images = arrays(2, 3)
    gray = load_images(save(tmp_path / "x.npy", images), channels=1).images
    np.testing.assert_allclose(gray[:, 0], np.einsum("c,nchw->nhw", [0.299, 0.587, 0.114], images), rtol=1e-5)


def test_pictures_of_16_bits_a_channel_keep_their_values_or_are_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(8 * 3 * 2) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)  # 16 bits, RGB
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert load_images(str(tmp_path / "deep")).images.dtype == torch.uint8
    with pytest.raises(UserError, match=r"16 bits a channel, of which Pillow reads 8: save it as \.npy"):
        load_images(str(tmp_path / "deep"), value_range=(0, 65535))


def test_floats_and_integers_are_not_mixed(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"damaged")
    for number in range(1, 101):  # one in a hundred may be damaged
        Image.fromarray(arrays(1, 1)[0, 0]).save(folder / f"{number}.tiff")
    data = load_images(str(folder))
    assert len(data) == 100 and data.value_range == (arrays(1, 1).min(), arrays(1, 1).max())
    Image.new("L", (16, 12)).save(folder / "101.png")
    with pytest.raises(UserError, match="2 of 102 images .*integers among floating-point values: set value_range"):
        load_images(str(folder))
    assert load_images(str(folder), value_range=(0, 1), max_samples=3).images.dtype == torch.float32


def test_a_folder_of_arrays_is_a_dataset(tmp_path):
    images = arrays(3, 5)
    (tmp_path / "maps").mkdir()
    for number, image in enumerate(images):
        np.save(tmp_path / "maps" / f"{number}.npy", image.transpose(1, 2, 0))
    assert np.array_equal(load_images(str(tmp_path / "maps")).images.numpy(), images)
    Image.new("L", (8, 8)).save(tmp_path / "maps" / "picture.png")
    data = load_images(str(tmp_path / "maps"))
    assert len(data) == 1 and data.notes == ["files that are not images, left out: 0.npy, 1.npy, 2.npy"]


def test_ragged_lists_are_broken_images(tmp_path):
    rows = [[[[0.0, 1.0], [2.0, 3.0]]] * 3] * 100 + [[[[0.0, 1.0], [2.0]]] * 3]
    value = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": value}))
    table.to_parquet(tmp_path / "ragged.parquet")
    data = load_images(str(tmp_path / "ragged.parquet"), channels=3, cache_dir=tmp_path / "datasets")
    assert len(data) == 100 and "broken files skipped, 1: row 100" in data.notes


# Pictures and pipelines


def test_pictures_of_any_channels():
    pixels = arrays(1, 5, dtype=np.uint8)[0].transpose(1, 2, 0)
    modes = {channels: to_picture(pixels[..., :channels]).mode for channels in range(1, 6)}
    assert modes == {1: "L", 2: "L", 3: "RGB", 4: "RGBA", 5: "L"}
    assert np.array_equal(to_picture(pixels), np.hstack(list(pixels.transpose(2, 0, 1))))
    assert np.array_equal(to_picture(pixels, [3, 1, 0]), pixels[..., [3, 1, 0]])
    assert np.array_equal(to_picture(pixels, [4]), pixels[..., 4])
    for wrong in ([0, 1], [5], [-1]):
        with pytest.raises(ValueError, match="one or three of the channels 0 to 4"):
            to_picture(pixels, wrong)


def vae(channels=5, **options):
    torch.manual_seed(0)
    return TinyVAEPipeline(TinyVAEModel(8, channels, 4, (8,)).eval(), **options)


def test_arrays_of_a_pipeline_are_in_its_value_range(tmp_path):
    pipe = vae(value_range={"low": -100, "high": 3000})
    pipe.save_pretrained(tmp_path)
    again = TinyPipeline.from_pretrained(tmp_path)
    latents = torch.zeros(2, 4)
    unit = again(2, latents=latents, output_type="pt").images
    values = again(2, latents=latents, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(values).permute(0, 3, 1, 2), 3100 * unit - 100)
    torch.testing.assert_close(again.encode(values), again.encode(unit), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"value range \[-100, 3000\], got -101"):
        again.encode(np.full((1, 8, 8, 5), -101.0))
    again.show_channels = [3, 1, 0]
    assert again(1).images[0].mode == "RGB"
    with pytest.raises(ValueError, match="8-bit images"):
        again.bits_per_dim(torch.zeros(1, 5, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="'low' below 'high'"):
        vae(value_range={"low": 1, "high": 0})


def test_the_config_of_8_bit_images_has_no_range(tmp_path):
    vae().save_pretrained(tmp_path)
    assert "value_range" not in (tmp_path / "model_index.json").read_text()


def test_only_pictures_of_a_stock_network_name_a_stock_pipeline(tmp_path):
    def named(channels, **options):
        options["scheduler"] = TinyDDIMScheduler()
        unet = UNet2DModel(
            8, channels, channels, block_out_channels=(4,), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
        )  # fmt: skip
        TinyPipeline(unet, **options).save_pretrained(tmp_path)
        pipe = TinyPipeline.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, channels)
        return json.loads((tmp_path / "model_index.json").read_text())["_class_name"]

    assert [named(channels) for channels in (1, 3, 4)] == ["DDIMPipeline"] * 3
    assert named(2) == named(1, value_range={"low": 0, "high": 10}) == "TinyPipeline"


@pytest.mark.parametrize(("kind", "limits"), [("low_resolution:2", (0, 10)), ("image:5", (0, 1))])
def test_arrays_that_condition_have_the_values_of_what_they_show(tiny_unet, kind, limits):
    unet = tiny_unet("none", in_channels=10, out_channels=5)
    pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(), conditioning=kind, value_range={"low": 0, "high": 10})
    size = pipe._conditioning.shape[1:]
    unit = torch.rand(1, 5, *size, generator=torch.Generator().manual_seed(0))
    given = limits[1] * unit.permute(0, 2, 3, 1).numpy()
    torch.testing.assert_close(pipe._encode_image(given, 1.0), pipe._encode_image(unit, 1.0))


def test_the_axis_of_channels_of_a_batch_is_not_guessed():
    assert (
        len(plots.to_pil(np.zeros((2, 4, 8, 8), np.uint8))) == len(plots.to_pil(np.zeros((2, 8, 8, 3), np.uint8))) == 2
    )
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 4\) look like \(N, H, W, C\): give 4 channels first"):
        plots.to_pil(np.zeros((2, 8, 8, 4), np.uint8))


def test_a_card_names_the_channels_and_the_values(tmp_path):
    vae(12, value_range={"low": -1, "high": 2.5}).save_pretrained(tmp_path)
    cards.write_card(tmp_path, model_name="A", command="tiny-diffusers train vae", settings={}, data={})
    card = (tmp_path / "README.md").read_text()
    assert "model of 8x8 12-channel images" in card and "values from -1.0 to 2.5." in card


# Families


FAMILIES = {
    "diffusion": (train_unconditional, TINY_DIFFUSION),
    "vae": (train_vae, [*TINY_RUN, "--block_out_channels", "8", "--latent_dim", "4"]),
    "dcgan": (train_dcgan, [*TINY_RUN, "--generator_channels", "8", "--discriminator_channels", "8"]),
    "pixelcnn": (
        train_pixelcnn,
        [*TINY_RUN, "--variant", "plusplus", "--hidden_channels", "4", "--num_layers", "1", "--resolution", "3x4"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["2 channels of 8 bits", "5 channels of floats"])
def test_each_family_learns_other_channels_and_values(tmp_path, family, kind):
    script, flags = FAMILIES[family]
    images = arrays(16, 2, dtype=np.uint8)
    if kind == "5 channels of floats":
        images = 1000 * np.broadcast_to(np.array(LEVELS, np.float32)[:, None, None], (16, 5, 12, 16)).copy()
    file = save(tmp_path / "data.npy", images)
    if family == "pixelcnn" and images.dtype == np.float32:
        with pytest.raises(UserError, match="one of 256 levels .* data has values from 100 to 900"):
            train(tmp_path / "run", "--train_data_dir", file, steps=2, script=script, flags=flags)
        return
    folder = train(tmp_path / "run", "--train_data_dir", file, steps=2, script=script, flags=flags)
    pipe = TinyPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2} if family == "diffusion" else {}
    samples = pipe(batch_size=2, output_type="np", **steps).images
    assert samples.shape == (2, *((3, 4) if family == "pixelcnn" else (12, 16)), images.shape[1])
    assert pipe._value_range == (None if images.dtype == np.uint8 else (100, 900))
    assert samples.min() >= (0 if images.dtype == np.uint8 else 100)
    assert (folder / "samples.png").is_file()


def test_a_conditional_run_of_channels_and_values_resumes_and_travels(tmp_path, train_in_two):
    np.savez(tmp_path / "x.npz", images=1000 * arrays(16, 5, 8, 8), labels=np.arange(16) % 2)
    flags = ("--train_data_dir", str(tmp_path / "x.npz"), "--value_range", "-1e2", "2000")
    folder = train_in_two(*flags, stopped_at=2, steps=4, script=train_conditional)
    whole = train(tmp_path / "whole", *flags, steps=4, script=train_conditional)
    for name in ("unet/diffusion_pytorch_model.safetensors", "train_log.jsonl", "samples.png"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes(), name

    pipes = [TinyPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        assert pipe.config.value_range == {"low": -100.0, "high": 2000.0}
    ours, stock = (
        pipe(1, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
        for pipe in pipes
    )
    assert np.array_equal(ours, stock) and ours.shape == (1, 8, 8, 5) and ours.min() >= -100 and ours.max() > 1


def test_samples_of_other_channels_are_saved_as_arrays_or_shown(tmp_path, capsys):
    vae(value_range={"low": 0, "high": 10}).save_pretrained(tmp_path / "vae")
    sample = ["sample", str(tmp_path / "vae"), "--num_images", "2", "--dtype", "float32", "--output"]
    assert cli.main([*sample, f"{tmp_path}/arrays/"]) == 0
    first, second = (np.load(tmp_path / "arrays" / f"0000{i}.npy") for i in range(2))
    assert first.shape == (8, 8, 5) and first.max() > 1 and not np.array_equal(first, second)
    assert cli.main([*sample, f"{tmp_path}/shown/", "--show_channels", "3", "1", "0"]) == 0
    shown = np.asarray(Image.open(tmp_path / "shown" / "00000.png"))
    assert np.array_equal(shown, np.rint(first[..., [3, 1, 0]] * 25.5))
    assert cli.main([*sample, f"{tmp_path}/grid.png"]) == 0
    assert cli.main([*sample, f"{tmp_path}/grid.png", "--show_channels", "5"]) == 2
    assert "one or three of the channels 0 to 4" in capsys.readouterr().err


@pytest.fixture
def deep(tmp_path, tiny_unet):
    """A checkpoint of diffusion of five channels from -100 to 3000, and an image that it takes."""
    pipe = TinyPipeline(
        tiny_unet("none", in_channels=5, out_channels=5), TinyDDIMScheduler(), value_range={"low": -100, "high": 3000}
    )
    pipe.save_pretrained(tmp_path / "deep")
    image = save(tmp_path / "given.npy", 3000 * arrays(1, 5, 8, 8)[0].transpose(1, 2, 0))
    return tmp_path / "deep", image


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


FAST = ("--num_inference_steps", 2, "--dtype", "float32", "--device", "cpu")


def test_edit_takes_and_saves_arrays(deep, tmp_path, capsys):
    checkpoint, image = deep
    edit = ("edit", checkpoint, "--image", image, *FAST, "--num_images", 2, "--output")
    mask = ("--task", "inpaint", "--mask", tmp_path / "mask.png")
    Image.fromarray(np.uint8([[0] * 4 + [255] * 4] * 8)).save(tmp_path / "mask.png")
    assert run(*edit, f"{tmp_path}/results/", *mask) == 0
    results = [np.load(tmp_path / "results" / f"given-{i}.npy") for i in range(2)]
    np.testing.assert_allclose(results[0][:, :4], np.load(image)[:, :4], atol=2)  # what is known is kept
    assert not np.array_equal(*results)
    assert run(*edit, tmp_path / "edited.png", *mask) == 0
    assert run(*edit, tmp_path / "edited.png", "--strength", 0.5, "--show_channels", 3, 1, 0) == 0
    assert Image.open(tmp_path / "edited.png").mode == "RGB"
    capsys.readouterr()
    assert run("edit", checkpoint, "--image", tmp_path / "mask.png", "--output", tmp_path / "out.png") == 2
    assert "has 1 channels, and 5 are needed: give a .npy file of shape (H, W, 5)" in capsys.readouterr().err


def test_interpolate_takes_and_saves_arrays(deep, tmp_path):
    checkpoint, image = deep
    options = ("--num_frames", 2, "--num_inference_steps", 20, "--dtype", "float32", "--device", "cpu")
    assert run("interpolate", checkpoint, "--images", image, image, *options, "--output", f"{tmp_path}/frames/") == 0
    frame = np.load(tmp_path / "frames" / "00000.npy")
    assert frame.shape == (8, 8, 5) and frame.min() >= -100 and frame.max() > 100


def test_pictures_of_plots_have_the_models_values(deep, tmp_path, monkeypatch):
    checkpoint, image = deep
    loaded = real_images.load_picture(Path(image), (8, 8), 5, (-100, 3000))
    expected = torch.from_numpy(np.load(image)).permute(2, 0, 1)[None]
    torch.testing.assert_close(denormalize(loaded, (-100, 3000)), expected, rtol=0, atol=0.01)
    output = ("--output", tmp_path / "plot.png", "--show_channels", 4)
    steps = ("--from_timesteps", 500, "--num_states", 1, *FAST)
    assert run("plot", "denoising", checkpoint, "--image", image, *steps, *output) == 0
    assert Image.open(tmp_path / "plot.png").mode == "L"


def test_a_16_bit_picture_is_read_with_the_models_values(tmp_path):
    pixels = np.full((8, 8), 1000, np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    assert (shared.read_picture("--image", tmp_path / "deep.png", 1, (0, 65535)) == 1000).all()
    clipped = shared.read_picture("--image", tmp_path / "deep.png", 3, (0, 500))
    assert clipped.shape == (8, 8, 3) and (clipped == 500).all()
    levels = np.asarray(shared.read_picture("--image", tmp_path / "deep.png", 1))
    assert (levels == round(1000 * 255 / 1023)).all()  # of 10 bits


def test_a_plot_of_a_runs_data_has_its_channels_and_values(tmp_path):
    images = 1000 * arrays(4, 12, 8, 8)
    (tmp_path / "run").mkdir()
    file = save(tmp_path / "x.npy", images)
    config = f"train_data_dir: {file}\nchannels: 12\nvalue_range: ['0', '2000']\nsplit: train\n"
    (tmp_path / "run" / "config.yaml").write_text(config)
    loaded = real_images.to_tensor(real_images.load_dataset({}, tmp_path / "run", 1, 1))
    torch.testing.assert_close(loaded, torch.from_numpy(images[1:2]) / 1000 - 1)


def test_jpeg_is_refused_before_images_with_alpha_are_drawn(tmp_path, capsys):
    vae(4).save_pretrained(tmp_path / "vae")
    assert run("sample", tmp_path / "vae", "--output", tmp_path / "x.jpg") == 2
    assert "JPEG has no alpha channel: give a .png, or --show_channels 0 1 2" in capsys.readouterr().err


# Evaluation


def test_samples_in_a_folder_are_measured_with_the_references_values(tmp_path, capsys):
    images = 1000 * arrays(24, 5, 8, 8)
    reference = save(tmp_path / "x.npy", images)
    (tmp_path / "samples").mkdir()
    for number, image in enumerate(2 * images[:12]):
        np.save(tmp_path / "samples" / f"{number}.npy", image.transpose(1, 2, 0))
    measured = ("--features", "pixels", "--num_images", 12, "--num_jackknife", 0, "--baselines", "none")
    options = ("--dataset_name", reference, *measured, "--output", tmp_path / "report")
    assert run("evaluate", "--images", tmp_path / "samples", *options, "--metrics", "frechet_distance") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert any("clipped to" in note for note in report["warnings"])
    assert run("evaluate", tmp_path, *options, "--channels", 5) == 2
    assert "--channels and --value_range are for --images" in capsys.readouterr().err


def test_arrays_of_8_bit_images_in_a_folder_lie_from_0_to_1(tmp_path):
    images = arrays(3, 5, dtype=np.uint8)
    (tmp_path / "samples").mkdir()
    for number, image in enumerate(images):
        np.save(tmp_path / "samples" / f"{number}.npy", (image.transpose(1, 2, 0) / 255).astype(np.float32))
    data = round_to_8_bits(read_folder(tmp_path / "samples", value_range=(0, 1)))
    assert np.array_equal(data.images.numpy(), images) and data.value_range is None


def test_an_evaluation_of_other_channels_and_values(tmp_path):
    data = load_images(save(tmp_path / "x.npy", arrays(24, 5, 8, 8)), value_range=(0, 1))
    pipe = vae(value_range={"low": 0, "high": 1})
    pipe.set_progress_bar_config(disable=True)
    protocol = {"features": "pixels", "num_images": 12, "num_jackknife": 4, "metrics": ["frechet_distance"]}
    report = evaluate(pipe, data, Protocol(**protocol), output_dir=tmp_path / "report")
    assert report.figures["frechet_distance"]["value"] > 0 and (tmp_path / "report" / "report.png").is_file()
    assert any("values from 0 to 1 measured as 0 to 255" in note for note in report.warnings)
    same = evaluate(data, data, Protocol(**protocol | {"baselines": ["none"]}))
    other = evaluate(data, data, Protocol(**protocol | {"baselines": ["none"], "feature_channels": [3, 1, 0]}))
    assert other.measured_by["features"]["channels"] == [3, 1, 0] and "channels" not in same.measured_by["features"]
    with pytest.raises(UserError, match="feature_channels .* the channels 0 to 4"):
        evaluate(data, data, Protocol(**protocol | {"feature_channels": [5]}))
    with pytest.raises(UserError, match="images have 8 bits and the reference's values from 0 to 1"):
        evaluate(vae(), data, Protocol(**protocol))


def test_the_features_of_a_network_need_one_channel_or_three():
    with pytest.raises(UserError, match="1 or 3 channels, and these have 5: choose the features 'pixels'"):
        features.to_rgb(torch.zeros(1, 5, 8, 8))


@pytest.mark.parametrize("limits", [(0.1, 0.7), (-16.281606674194336, 470.82196044921875)])
def test_rounding_stays_within_the_range(limits):
    pipe = vae(1, value_range=dict(zip(("low", "high"), limits, strict=True)))
    values = pipe._to_images(torch.tensor([[[[-1.0, 1.0]]]]), "np")
    assert values.dtype == np.float32 and values.ravel().tolist() == np.float32(limits).tolist()
    assert pipe._from_values(values).ravel().tolist() == [0, 1]
    data = ImageData(torch.tensor(limits).view(2, 1, 1, 1), None, None, "x", "train", "", value_range=limits)
    assert as_levels(data).images.ravel().tolist() == pytest.approx([0, 255], abs=1e-3)
    assert 0 <= as_levels(data).images.min() and as_levels(data).images.max() <= 255


@pytest.mark.slow
def test_a_16_bit_ramp_comes_back_from_an_overfitted_model(tmp_path):
    ramp = np.linspace(0, 65535, 16).round().astype(np.uint16).reshape(4, 4)
    file = save(tmp_path / "ramp.npy", np.broadcast_to(ramp, (16, 4, 4)).copy())
    argv = [
        *(
            "--train_data_dir",
            file,
            "--value_range",
            "measured",
            "--validation_split",
            "0",
            "--train_batch_size",
            "16",
        ),
        *("--prediction_type", "sample", "--learning_rate", "1e-2", "--ema_max_decay", "0.9"),
    ]
    flags = [
        *("--block_out_channels", "16", "--norm_num_groups", "4", "--attention", "full", "--layers_per_block", "1"),
        *("--mixed_precision", "no", "--num_threads", "1", "--save_images_steps", "0", "--eval_batch_size", "4"),
    ]
    folder = train(tmp_path / "run", *argv, steps=200, flags=flags)
    pipe = TinyPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(batch_size=4, num_inference_steps=20, eta=0.0, output_type="np").images[..., 0]
    assert np.abs(samples - ramp).mean() < 0.01 * 65535
