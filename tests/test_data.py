import os
import re
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from tiny_diffusers.data import (
    AUGMENT_DRAWS,
    augment,
    cache,
    decoding,
    denormalize,
    held_out,
    load_images,
    loading,
    normalize,
)
from tiny_diffusers.errors import UserError


@pytest.fixture
def load(tmp_path):
    """Returns `load_images` with all its files in the test's own folder."""
    return lambda *args, **kwargs: load_images(*args, cache_dir=tmp_path / "cache", **kwargs)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    return path


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_images(folder, count, shape=(8, 8, 3), pattern="{:03d}.png"):
    arrays = [pixels(*shape, seed=seed) for seed in range(count)]
    for number, array in enumerate(arrays):
        path = folder / pattern.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return arrays


def png_header(width, height):
    """Returns the header of a PNG of this size, without pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def save_repository(folder, columns, features=None, split="train"):
    """Saves a split with the layout of a Hub repository: parquet files in data/."""
    dataset = datasets.Dataset.from_dict(columns, features=features)
    (folder / "data").mkdir(exist_ok=True)
    dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def encoded(count, tmp_path, shape=(8, 8)):
    files = []
    for seed in range(count):
        path = tmp_path / f"encoded-{seed}.png"
        Image.fromarray(pixels(*shape, seed=seed)).save(path)
        files.append({"bytes": path.read_bytes(), "path": None})
    return files


# The embedded digits


def test_digits_are_those_of_scikit_learn():
    data, reference = load_images(), load_digits()
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == torch.uint8
    assert torch.equal(data.labels, torch.from_numpy(reference.target).long())
    assert data.id2label == {digit: str(digit) for digit in range(10)}
    assert (data.name, data.split, data.notes, len(data)) == ("digits", "train", [], 1797)
    levels = data.images[:, 0].double() * 16 / 255  # back to 0..16: no level is lost by rounding
    assert np.array_equal(levels.round().numpy(), reference.images)


def test_digits_pass_through_the_same_resizing_as_files():
    data, original = load_images(resolution=16, max_samples=3), load_images(max_samples=3)
    for enlarged, image in zip(data.images, original.images, strict=True):
        expected = Image.fromarray(image[0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.array_equal(enlarged[0].numpy(), np.asarray(expected))
    assert data.notes == ["3 of 3 images were enlarged to 16x16"]


def test_classes_are_relabeled_in_the_order_given():
    everything, data = load_images(), load_images(classes="7, 2")
    assert data.id2label == {0: "7", 1: "2"}
    assert torch.equal(data.images[data.labels == 0], everything.images[everything.labels == 7])
    assert torch.equal(data.images[data.labels == 1], everything.images[everything.labels == 2])
    assert load_images(classes=[7, 2]).fingerprint == data.fingerprint


def test_max_samples_is_a_fixed_random_choice():
    data = load_images(max_samples=200)
    assert len(data) == 200 and len(data.labels.unique()) == 10
    assert data.fingerprint == load_images(max_samples=200).fingerprint
    assert load_images(max_samples=5000).fingerprint == load_images().fingerprint


def test_channels_can_be_asked_for():
    gray, color = load_images(max_samples=9), load_images(max_samples=9, channels=3)
    assert torch.equal(color.images, gray.images.expand(-1, 3, -1, -1))
    assert color.notes == ["9 of 9 images were gray, converted to RGB"]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"split": "tset"}, ["split", "'tset'", "train"]),
        ({"classes": "1,11"}, ["class", "'11'", "0, 1, 2"]),
        ({"classes": "1,2,1"}, ["classes '1,2,1'", "twice"]),
        ({"resolution": 0}, ["resolution must be at least 1,", "not 0"]),
        ({"resolution": (8, 0)}, ["a height and a width of at least 1, not (8, 0)"]),
        ({"max_samples": 0}, ["max_samples must be at least 1, not 0"]),
        ({"channels": 0}, ["channels must be at least 1, or None", "not 0"]),
        ({"channels": 5}, ["'digits' have 1 channels, and 5 are asked for"]),
        ({"train_data_dir": "/no/such/folder"}, ["There is no folder '/no/such/folder'"]),
        ({"dataset_name": "mnist", "train_data_dir": "."}, ["dataset_name 'mnist'", "train_data_dir '.'", "only one"]),
        (
            {"dataset_name": "no/such/folder"},
            ["no folder or file 'no/such/folder' here, and no dataset", "owner/name)"],
        ),
        (
            {"dataset_name": "./mispelled"},
            ["no folder or file './mispelled' here, and no dataset", "owner/name)", "digits"],
        ),
    ],
)
def test_each_mistake_is_one_line(load, kwargs, words):
    with pytest.raises(UserError) as error:
        load(**kwargs)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert not re.search("--[a-z]", str(error.value))  # not all callers have flags


def test_an_unreachable_hub_is_one_line(load, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub\nwith more lines")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(
        UserError, match="no folder or file 'someone/something' here, .*Couldn't reach.* a Hub id"
    ) as error:
        load("someone/something")
    assert "\n" not in str(error.value)


# Folders of images


def test_sub_folders_are_classes(load, folder):
    arrays = save_images(folder / "cat", 3) + save_images(folder / "dog", 2)
    data = load(str(folder))
    assert data.id2label == {0: "cat", 1: "dog"} and data.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), np.stack(arrays))
    assert data.name == "images"
    assert load(train_data_dir=folder).fingerprint == data.fingerprint


def test_a_flat_folder_has_no_labels(load, folder):
    save_images(folder, 3)
    assert load(folder.as_posix()).labels is None
    for needs_labels in ({"require_labels": True}, {"classes": "cat"}):
        with pytest.raises(UserError, match="no labels: its columns are image.*`label_column`"):
            load(folder.as_posix(), **needs_labels)


def test_folders_of_splits_are_not_classes(load, folder):
    save_images(folder / "train", 4)
    save_images(folder / "test", 2)
    assert load(str(folder)).labels is None
    assert len(load(str(folder), split="test")) == 2
    with pytest.raises(UserError, match="Unknown split of .* 'tests': .* train, test. Did you mean 'test'"):
        load(str(folder), split="tests")


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_a_folder_without_images_is_refused(load, folder, files):
    for name in files:
        (folder / name).write_text("no image")
    with pytest.raises(UserError, match="cannot be read|no image column"):
        load(str(folder))


def test_every_mode_becomes_eight_bit_gray_or_rgb(load, folder):
    red, rgb = pixels(8, 8), pixels(8, 8, 3)
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    images = {
        "a-palette": Image.fromarray(rgb).quantize(16),
        "b-rgba": Image.fromarray(np.dstack([rgb, alpha])),
        "c-16bit": Image.fromarray(red.astype(np.uint16) * 257),
        "d-1bit": Image.fromarray(red > 127),
        "e-la": Image.merge("LA", [Image.fromarray(red), Image.fromarray(alpha)]),
        "f-gray": Image.fromarray(red),
        "g-rgb": Image.fromarray(rgb),
    }
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    Image.fromarray(np.dstack([rgb, red])).convert("CMYK").save(folder / "h-cmyk.tiff")
    data = load(str(folder))

    on_white = np.where(alpha[..., None] == 255, rgb, 255)
    expected = [
        np.asarray(images["a-palette"].convert("RGB")),
        on_white,
        red[..., None].repeat(3, -1),
        np.where(red > 127, 255, 0)[..., None].repeat(3, -1),
        np.where(alpha == 255, red, 255)[..., None].repeat(3, -1),
        red[..., None].repeat(3, -1),
        rgb,
    ]
    assert np.array_equal(data.images[:7].permute(0, 2, 3, 1).numpy(), np.stack(expected))
    assert set(data.notes) == {
        "1 of 8 images had a palette, converted to RGB",
        "2 of 8 images had an alpha channel, laid on white",
        "1 of 8 images had 16 bits a pixel, scaled to 8 (value_range keeps them)",
        "1 of 8 images were CMYK, converted to RGB",
        "4 of 8 images were gray, converted to RGB",
    }


def test_color_can_be_converted_to_gray(load, folder):
    (array,) = save_images(folder, 1)
    data = load(str(folder), channels=1)
    assert np.array_equal(data.images[0, 0].numpy(), np.asarray(Image.fromarray(array).convert("L")))
    assert data.notes == ["1 of 1 images were in color, converted to gray"]


def test_exif_orientation_is_applied(load, folder):
    array = pixels(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(array).save(folder / "turned.png", exif=exif)
    assert np.array_equal(load(str(folder)).images[0, 0].numpy(), np.rot90(array, -1))


def test_images_that_are_not_square_are_cropped_to_a_square(load, folder):
    (array,) = save_images(folder, 1, shape=(8, 20))
    center = load(str(folder), resolution=8, center_crop=True)
    assert np.array_equal(center.images[0, 0].numpy(), array[:, 6:14])
    assert "center" in center.notes[0]
    anywhere = load(str(folder), resolution=8)
    assert any(np.array_equal(anywhere.images[0, 0].numpy(), array[:, left : left + 8]) for left in range(13))
    assert "(center_crop takes the center)" in anywhere.notes[0]


def test_rectangles_of_one_size_are_kept(load, folder):
    arrays = save_images(folder, 3, shape=(8, 20))
    data = load(str(folder))
    assert data.notes == [] and np.array_equal(data.images[:, 0].numpy(), np.stack(arrays))
    assert load(str(folder), resolution=(8, 20)).fingerprint == data.fingerprint


@pytest.mark.parametrize("size, crop", [((8, 10), (8, 10)), ((8, 20), (6, 16)), ((16, 8), (8, 4)), ((1, 99), (1, 16))])
def test_a_rectangle_is_the_largest_crop_of_its_aspect_ratio(load, folder, size, crop):
    (array,) = save_images(folder, 1, shape=(8, 16))
    (height, width), top, left = crop, (8 - crop[0]) // 2, (16 - crop[1]) // 2
    data = load(str(folder), resolution=size, center_crop=True)
    box = (left, top, left + width, top + height)
    expected = Image.fromarray(array).resize(size[::-1], Image.Resampling.BICUBIC, box=box)
    assert np.array_equal(data.images[0, 0].numpy(), np.asarray(expected))
    anywhere = load(str(folder), resolution=size)
    assert anywhere.images.shape == (1, 1, *size)
    assert "had another aspect ratio: a crop at a random position" in anywhere.notes[0]


def test_a_pair_of_equal_sides_is_the_square(load, folder, tmp_path):
    save_images(folder, 2, shape=(8, 20))
    data, again = load(str(folder), resolution=6), load(str(folder), resolution=(6, 6))
    assert data.fingerprint == again.fingerprint and data.notes == again.notes
    assert len(list((tmp_path / "cache" / "tiny_diffusers").iterdir())) == 1


def test_sizes_that_differ_need_a_resolution(load, folder):
    save_images(folder, 2, pattern="small-{}.png")
    save_images(folder, 1, shape=(16, 16, 3), pattern="tall-{}.png")
    with pytest.raises(UserError, match="differ in size .8x8, 16x16; height x width.: resize .*, or set `resolution`"):
        load(str(folder))
    data = load(str(folder), resolution=12)
    assert data.images.shape == (3, 3, 12, 12)
    assert data.notes == ["2 of 3 images were enlarged to 12x12", "1 of 3 images were reduced to 12x12"]


def test_broken_files_are_skipped_named_and_without_effect(load, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(decoding, "_MAX_BROKEN_SHARE", 0.5)
    clean = tmp_path / "clean"
    save_images(clean, 6, shape=(8, 8))
    shutil.copytree(clean, folder, dirs_exist_ok=True)
    color = tmp_path / "color.jpg"
    Image.fromarray(pixels(16, 16, 3)).save(color)
    (folder / "000-truncated.jpg").write_bytes(color.read_bytes()[:-300])  # the first file: RGB, of another size
    (folder / "001-empty.png").touch()
    (folder / "002-text.png").write_text("no image")
    (folder / "003-bomb.png").write_bytes(png_header(100_000, 100_000))
    (folder / "004-large.png").write_bytes(png_header(8_193, 8_193))
    (folder / "readme.txt").write_text("not even called an image")

    monkeypatch.chdir(tmp_path)
    data = load("images")
    assert data.fingerprint == load(str(clean)).fingerprint
    assert data.images.shape == (6, 1, 8, 8)
    assert data.notes == [
        "files that are not images, left out: readme.txt",
        "broken files skipped, 5: 000-truncated.jpg, 001-empty.png, 002-text.png, 003-bomb.png, 004-large.png",
    ]
    assert data.public_notes == ["files that are not images, left out", "broken files skipped, 5"]


def test_notes_that_are_shared_name_no_file():
    data = load_images(max_samples=2)
    shared = [
        "2 of 9 images were resized",
        "sub-folders read as classes, 2: cat, dog",
        "metadata.csv lists 2 of 3 images",
    ]
    data.notes = [*shared, "hidden images, left out, 1,002: .a, left out.png, b: c.png and 1,000 more"]
    data.notes.append("folders not entered (read already, or no permission), 1: my secret\nfolder")
    assert data.public_notes == [
        *shared,
        "hidden images, left out, 1,002",
        "folders not entered (read already, or no permission), 1",
    ]


def test_a_file_with_the_wrong_suffix_is_read_for_what_it_is(load, folder):
    Image.fromarray(pixels(8, 8)).save(folder / "a.png", format="BMP")
    assert np.array_equal(load(str(folder)).images[0, 0].numpy(), pixels(8, 8))


def test_more_than_one_per_cent_broken_stops(load, folder):
    save_images(folder, 98)
    (folder / "bad.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="1 of 99 images of 'images' are broken, more than 1%: bad.png"):
        load(str(folder))


# Repositories of parquet files


def test_columns_are_found_by_their_features(load, folder, tmp_path):
    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["cat", "frog"]),
            "picture": datasets.Image(),
        }
    )
    columns = {"caption": list("abcd"), "kind": [1, 0, 0, 1], "picture": encoded(4, tmp_path)}
    save_repository(folder, columns, features)
    data = load(str(folder), require_labels=True)
    assert data.labels.tolist() == [1, 0, 0, 1] and data.id2label == {0: "cat", 1: "frog"}
    assert np.array_equal(data.images[:, 0].numpy(), np.stack([pixels(8, 8, seed=seed) for seed in range(4)]))
    assert load(str(folder), classes="frog,cat").labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("values, names", [([7, 3, 3, 7], ["3", "7"]), (["dog", "cat", "cat", "dog"], ["cat", "dog"])])
def test_integers_and_strings_that_repeat_are_labels(load, folder, tmp_path, values, names):
    save_repository(folder, {"serial": [0, 1, 2, 3], "digit": values, "img": encoded(4, tmp_path)})
    data = load(str(folder))
    assert data.labels.tolist() == [1, 0, 0, 1] and list(data.id2label.values()) == names
    assert load(str(folder), label_column="serial").labels.tolist() == [0, 1, 2, 3]


def test_the_choice_between_label_columns_is_noted(load, folder, tmp_path):
    columns = {"coarse": [0, 0, 1, 1], "label": [0, 1, 0, 1], "image": encoded(4, tmp_path)}
    save_repository(folder, columns)
    data = load(str(folder))
    assert data.labels.tolist() == [0, 1, 0, 1]
    assert data.notes == ["label_column: 'label' was chosen from label, coarse"]


def test_missing_labels(load, folder, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    save_repository(folder, {"image": encoded(4, tmp_path), "label": [1, None, 0, -1]}, features)
    data = load(str(folder))
    assert data.labels is None and data.notes == ["2 of 4 images of 'images' have no label: labels are left out"]
    with pytest.raises(UserError, match="2 of 4 images of 'images' have no label"):
        load(str(folder), require_labels=True)
    assert load(str(folder), classes="a,b", require_labels=True).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"image_column": "imag"}, ["image_column", "'imag'", "Did you mean 'image'?"]),
        ({"image_column": "label"}, ["image_column 'label'", "no images", "choose one of image"]),
        ({"label_column": "lable"}, ["label_column", "Did you mean 'label'?"]),
        ({"label_column": "weight"}, ["label_column 'weight'", "neither classes", "image, label, weight"]),
        ({"classes": "cta"}, ["class", "'cta'", "Did you mean 'cat'?"]),
        ({"classes": "2"}, ["class", "'2'"]),
        ({"classes": "frog"}, ["No image", "'frog'"]),
        ({"split": "validation"}, ["split", "'validation'", "train, test"]),
        ({"split": "test"}, ["'test'", "empty"]),
        ({"dataset_config_name": "plain"}, ["plain"]),
    ],
)
def test_what_a_repository_lacks_is_one_line(load, folder, tmp_path, kwargs, words):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "frog"]),
            "weight": datasets.Value("float32"),
        }
    )
    save_repository(folder, {"image": encoded(2, tmp_path), "label": [0, 0], "weight": [0.5, 1.0]}, features)
    save_repository(folder, {"image": [], "label": [], "weight": []}, features, split="test")
    with pytest.raises(UserError) as error:
        load(str(folder), **kwargs)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert not re.search("--[a-z]", str(error.value))  # not all callers have flags


def test_a_repository_without_images_names_its_columns(load, folder):
    save_repository(folder, {"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(UserError, match="no image column: its columns are text, label"):
        load(str(folder))


def test_a_damaged_parquet_file_is_one_line(load, folder, tmp_path):
    save_repository(folder, {"image": encoded(2, tmp_path)})
    (file,) = (folder / "data").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read: .*[Pp]arquet"):
        load(str(folder))


# The cache


def test_the_second_start_needs_no_decoding(load, folder, monkeypatch):
    save_images(folder / "cat", 3)
    save_images(folder / "dog", 2)
    first = load(str(folder), resolution=16)
    monkeypatch.setattr(loading, "open_dataset", None)
    second = load(str(folder), resolution=16)
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
    assert (first.id2label, first.notes, first.fingerprint) == (second.id2label, second.notes, second.fingerprint)


def test_a_changed_folder_is_decoded_again(load, folder):
    save_images(folder, 3)
    assert len(load(str(folder))) == 3
    save_images(folder, 4)
    assert len(load(str(folder))) == 4


@pytest.mark.parametrize("file", ["images.npy", "data.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_cache_is_rebuilt(load, folder, tmp_path, file, damage):
    save_images(folder, 3)
    expected = load(str(folder)).images.clone()
    (path,) = (tmp_path / "cache" / "tiny_diffusers").glob(f"*/{file}")
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[-30] ^= 1
    path.unlink()  # the images in use are mapped from this file
    if damage != "remove":
        path.write_bytes({"flip": bytes(damaged), "truncate": content[:-30], "empty": b""}[damage])
    assert torch.equal(load(str(folder)).images, expected)
    assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_not_needed(folder, tmp_path, monkeypatch):
    save_images(folder, 3)
    (tmp_path / "file").touch()
    expected = load_images(str(folder), cache_dir=tmp_path / "cache").fingerprint
    monkeypatch.setattr(loading, "cache_root", lambda cache_dir=None: tmp_path / "file" / "below")
    assert load_images(str(folder), cache_dir=tmp_path / "cache").fingerprint == expected


def test_several_may_write_the_same_data_at_once(tmp_path):
    data = load_images(max_samples=20)
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda _: cache.write_cache(tmp_path / "key", data), range(16)))
    assert {each.fingerprint for each in written} == {data.fingerprint}
    assert torch.equal(cache.read_cache(tmp_path / "key").images, data.images)


def test_images_that_do_not_fit_in_memory_are_mapped_from_a_file(load, folder, monkeypatch):
    save_images(folder, 5, shape=(8, 8))
    expected = load(str(folder))
    monkeypatch.setattr(decoding, "_MEMORY_SHARE", 0)
    monkeypatch.setattr(loading, "read_cache", lambda directory: None)
    monkeypatch.setattr(loading, "write_cache", lambda directory, data: data)
    data = load(str(folder))
    assert isinstance(decoding._allocate((1,)), np.memmap)
    assert data.fingerprint == expected.fingerprint and torch.equal(data.images, expected.images)


# Held-out images


@pytest.mark.parametrize("num_images, share, count", [(200, 0.1, 20), (200, 0.001, 1), (200, 0.999, 199), (2, 0.5, 1)])
def test_held_out_is_a_partition(num_images, share, count):
    train, validation = held_out(num_images, share, seed=3)
    assert train.dtype == validation.dtype == torch.int64
    assert (len(train), len(validation)) == (num_images - count, count)
    assert torch.equal(train, train.unique())  # sorted
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(num_images))


def test_held_out_is_fixed_by_the_seed():
    # Saved runs rely on these splits.
    for seed, expected in {0: [0, 5, 8, 9], 1: [1, 4, 6, 8]}.items():
        train, validation = held_out(12, 0.3, seed)
        assert sorted(validation.tolist()) == expected
        assert train.tolist() == sorted(set(range(12)) - set(expected))
    again, other = held_out(200, 0.1, seed=3)[1], held_out(200, 0.1, seed=4)[1]
    assert torch.equal(again, held_out(200, 0.1, seed=3)[1]) and not torch.equal(again, other)


def test_the_first_held_out_indices_are_a_random_subset():
    """A validation takes as many as it has time for, of a dataset that may be sorted by class."""
    labels = torch.arange(10).repeat_interleave(1000)
    _, validation = held_out(len(labels), 0.5, seed=0)
    counts = labels[validation[:500]].bincount(minlength=10)
    assert counts.min() >= 30 and counts.max() <= 70  # 50 each, with a standard deviation of 7


def test_held_out_copies_no_image():
    # A million images of 64x64 pixels would take 12 GB: their number suffices.
    train, validation = held_out(10**6, 0.05)
    assert (len(train), len(validation)) == (950_000, 50_000)
    assert train.ndim == validation.ndim == 1


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_held_out_needs_a_share(share):
    with pytest.raises(UserError, match=f"between 0 and 1 .both excluded., not {share}"):
        held_out(10, share)


@pytest.mark.parametrize("num_images", [0, 1])
def test_held_out_needs_two_images(num_images):
    with pytest.raises(UserError, match=f"at least 2 images, not {num_images}"):
        held_out(num_images, 0.5)


# Ranges


def test_normalize_is_undone_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    images = normalize(levels)
    assert images.dtype == torch.float32 and (images[0], images[-1]) == (-1, 1)
    assert torch.equal(denormalize(images), levels)
    assert torch.equal(denormalize(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))


# Augmentation


def random_batch(batch=6, channels=3, height=8, width=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, channels, height, width, generator=generator) * 2 - 1
    return images, torch.rand(batch, AUGMENT_DRAWS, generator=generator)


EVERYTHING = {"random_flip": True, "random_crop_padding": 3, "color_jitter": 0.4, "cutout": 4}


def test_no_augmentation_changes_nothing():
    images, uniform = random_batch()
    assert torch.equal(augment(images, uniform), images)


def test_flip_mirrors_half_of_the_range():
    images, uniform = random_batch(2)
    uniform[:, 0] = torch.tensor([0.49, 0.5])
    flipped = augment(images, uniform, random_flip=True)
    assert torch.equal(flipped[0], images[0].flip(-1)) and torch.equal(flipped[1], images[1])


def test_crop_is_a_window_of_the_reflected_image():
    images, uniform = random_batch()
    uniform[0, 1:3], uniform[1, 1:3] = 0, 0.9999  # both extremes
    cropped = augment(images, uniform, random_crop_padding=3)
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="reflect")
    for image, source, (u, v) in zip(cropped, padded, uniform[:, 1:3], strict=True):
        top, left = int(u * 7), int(v * 7)
        assert torch.equal(image, source[:, top : top + 8, left : left + 10])


def test_color_jitter_factors():
    images, uniform = random_batch()
    uniform[:, 3:6] = 0.5  # every factor is 1
    torch.testing.assert_close(augment(images, uniform, color_jitter=0.8), images)
    black, flat, gray = uniform.clone(), uniform.clone(), uniform.clone()
    black[:, 3], flat[:, 4], gray[:, 5] = 0, 0, 0  # one factor each is 0
    assert torch.equal(augment(images, black, color_jitter=1), torch.full_like(images, -1))
    assert augment(images, flat, color_jitter=1).flatten(1).std(1).max() < 1e-6
    desaturated = augment(images, gray, color_jitter=1)
    torch.testing.assert_close(desaturated[:, 0], desaturated[:, 1])
    for image, result in zip(images, desaturated, strict=True):
        expected = Image.fromarray(denormalize(image).permute(1, 2, 0).numpy()).convert("L")
        difference = denormalize(result)[0].int() - torch.from_numpy(np.array(expected)).int()
        assert difference.abs().max() <= 1


def test_color_jitter_needs_gray_or_rgb_images():
    images, uniform = random_batch(channels=4)
    assert augment(images, uniform, random_flip=True, cutout=3).shape == images.shape
    with pytest.raises(UserError, match="color_jitter is for images of 1 or 3 channels .gray or RGB., not 4"):
        augment(images, uniform, color_jitter=0.1)


def test_cutout_is_a_square_of_mid_gray():
    images, uniform = random_batch(2)
    uniform[0, 6:], uniform[1, 6:] = 0.5, 0  # in the middle, and cut off by the corner
    holes = (augment(images, uniform, cutout=4) == 0).all(1)
    expected = torch.zeros(2, 8, 10, dtype=torch.bool)
    expected[0, 2:6, 3:7] = True
    expected[1, :2, :2] = True
    assert torch.equal(holes, expected)
    assert torch.equal(augment(images, uniform, cutout=4)[:, 0][~expected], images[:, 0][~expected])


@given(seed=st.integers(0, 2**31), channels=st.sampled_from([1, 3]), size=st.integers(4, 9))
def test_augmentation_is_independent_of_the_batch(seed, channels, size):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, channels, size, size, generator=generator) * 2 - 1
    uniform = torch.rand(5, AUGMENT_DRAWS, generator=generator)
    batch = augment(images, uniform, **EVERYTHING)
    order = torch.randperm(5, generator=generator)
    torch.testing.assert_close(augment(images[order], uniform[order], **EVERYTHING), batch[order])
    first = augment(images[:1], uniform[:1], **EVERYTHING)
    torch.testing.assert_close(first, batch[:1])  # close, since sums may be rounded differently
    assert batch.shape == images.shape and batch.abs().max() <= 1


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"random_crop_padding": 8}, "random_crop_padding must be from 0 to 7 for images of 8x10 pixels, not 8"),
        ({"color_jitter": 1.5}, "color_jitter must be from 0 to 1, not 1.5"),
        ({"cutout": -1}, "cutout must be 0 or more pixels, not -1"),
    ],
)
def test_settings_out_of_range_are_refused(kwargs, words):
    with pytest.raises(UserError, match=words):
        augment(*random_batch(), **kwargs)
    with pytest.raises(UserError, match="uniform has shape"):
        augment(random_batch()[0], torch.rand(6, 2))


# Real datasets


@pytest.mark.parametrize(
    "name, channels, size, classes",
    [
        ("mnist", 1, 28, 10),
        ("fashion_mnist", 1, 28, 10),
        ("cifar10", 3, 32, 10),
        ("anime_faces", 3, 64, None),
        ("flowers", 3, 32, 5),
    ],
)
def test_real_data(load, name, channels, size, classes):
    root = os.environ.get("TINY_DIFFUSERS_DATA")
    if root is None:
        pytest.skip("TINY_DIFFUSERS_DATA does not name a folder with real datasets")
    data = load(str(Path(root) / name), split="test", max_samples=20)
    assert data.images.shape == (20, channels, size, size) and data.notes == []
    assert (data.id2label and len(data.id2label)) == classes
