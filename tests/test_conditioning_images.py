"""A second column of images: how it is read from each kind of dataset, kept beside the images, and refused."""

import json
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tiny_diffusers.data import load_images
from tiny_diffusers.errors import UserError


COUNT = 4


@pytest.fixture
def load(tmp_path):
    """Returns `load_images` with all its files in the test's own folder."""
    return lambda name, **kwargs: load_images(str(name), cache_dir=tmp_path / "cache", **kwargs)


def image(value, mode="L", size=(8, 8)):
    return Image.new(mode, size, value)


def put(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def put_folder(root, column="conditioning_image_file_name", pair=lambda i: image((0, 0, 10 + i), "RGB")):
    """Saves gray images 0, 1, ..., each with a conditioning image, and the table that names both."""
    rows = []
    for i in range(COUNT):
        put(root / "images" / f"{i}.png", image(i))
        put(root / "edges" / f"{i}.png", pair(i))
        rows.append({"file_name": f"images/{i}.png", column: f"edges/{i}.png"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def check(data):
    """Checks that image i is i everywhere, and its conditioning image 10 + i in blue."""
    assert data.images.shape == (COUNT, 1, 8, 8) and data.conditioning_images.shape == (COUNT, 3, 8, 8)
    assert data.images[:, 0, 0, 0].tolist() == list(range(COUNT))
    assert data.conditioning_images[:, 2, 7, 7].tolist() == [10 + i for i in range(COUNT)]


@pytest.mark.parametrize("column", ["conditioning_image", "conditioning_image_file_name"])
@pytest.mark.parametrize("place", ["", "train"])
def test_a_folder_names_them_in_its_metadata(load, tmp_path, column, place):
    put_folder(tmp_path / "data" / place, column)
    data = load(tmp_path / "data", conditioning_column="conditioning_image")
    check(data)
    assert data.labels is None  # the folders part the images from their pairs


def test_a_zip_is_read_as_its_folder(load, tmp_path):
    put_folder(tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in (tmp_path / "data").rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path / "data"))
    check(load(tmp_path / "data.zip", conditioning_column="conditioning_image"))


def test_subfolders_of_the_images_stay_their_classes(load, tmp_path):
    rows = []
    for i in range(COUNT):
        kind = ("cat", "dog")[i % 2]
        put(tmp_path / "data" / kind / f"{i}.png", image(i))
        put(tmp_path / "data" / "edges" / f"{i}.png", image((0, 0, 10 + i), "RGB"))
        rows.append(f"{kind}/{i}.png,edges/{i}.png")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(["file_name,edges", *rows]))
    data = load(tmp_path / "data", conditioning_column="edges")
    assert data.id2label == {0: "cat", 1: "dog"} and len(data) == COUNT
    assert load(tmp_path / "data", conditioning_column="edges", label_column="none").labels is None
    for i, (label, value) in enumerate(zip([0, 0, 1, 1], [0, 2, 1, 3], strict=True)):
        assert (data.labels[i], data.images[i, 0, 0, 0]) == (label, value)
        assert data.conditioning_images[i, 2, 0, 0] == 10 + value


def test_a_column_of_parquet_is_no_image_column_then(load, tmp_path):
    feature = datasets.Image()
    columns = {
        "edges": [image((0, 0, 10 + i), "RGB") for i in range(COUNT)],
        "image": [image(i) for i in range(COUNT)],
    }
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features({"edges": feature, "image": feature}))
    dataset.to_parquet(tmp_path / "data.parquet")
    data = load(tmp_path / "data.parquet", conditioning_column="edges")
    check(data)
    assert not data.notes
    with pytest.raises(UserError, match="Unknown conditioning_column .*'edge'.*Did you mean 'edges'"):
        load(tmp_path / "data.parquet", conditioning_column="edge")


def test_an_array_of_an_npz(load, tmp_path):
    pairs = np.zeros((COUNT, 8, 8, 3), np.uint8)
    pairs[..., 2] = 10 + np.arange(COUNT)[:, None, None]
    images = np.broadcast_to(np.arange(COUNT, dtype=np.uint8)[:, None, None], (COUNT, 8, 8))
    np.savez(tmp_path / "data.npz", edges=pairs, x=images, serial=np.arange(COUNT))
    check(load(tmp_path / "data.npz", conditioning_column="edges"))
    for column, words in (("serial", "holds no images, one for each of"), ("edge", "Did you mean 'edges'")):
        with pytest.raises(UserError, match=words):
            load(tmp_path / "data.npz", conditioning_column=column)


@pytest.mark.parametrize("column", ["edges_train", "test_edges", "edges"])
def test_an_array_of_an_npz_is_found_by_its_name_in_another_split(load, tmp_path, column):
    images = np.arange(COUNT, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    arrays = {"x_train": images + 1, "edges_train": images + 2, "x_test": images + 3, "edges_test": images + 4}
    np.savez(tmp_path / "data.npz", **arrays)
    for split, value in (("train", 1), ("test", 3)):
        data = load(tmp_path / "data.npz", split=split, image_column="x_train", conditioning_column=column)
        assert data.images[0, 0, 0, 0] == value and data.conditioning_images[0, 0, 0, 0] == value + 1


def test_their_channels_can_be_given(load, tmp_path):
    put_folder(tmp_path / "data")
    options = {"conditioning_column": "conditioning_image"}
    gray = load(tmp_path / "data", conditioning_channels=1, **options)
    assert gray.conditioning_images.shape == (COUNT, 1, 8, 8)
    assert gray.conditioning_images[0, 0, 0, 0] == image((0, 0, 10), "RGB").convert("L").getpixel((0, 0))
    assert "4 of 4 conditioning images were in color, converted to gray" in gray.notes
    put_folder(tmp_path / "gray", pair=image)
    color = load(tmp_path / "gray", conditioning_channels=3, **options)
    assert color.images.shape == (COUNT, 1, 8, 8) and color.conditioning_images.shape == (COUNT, 3, 8, 8)
    assert (color.conditioning_images[:, :, 0, 0] == torch.arange(COUNT)[:, None]).all()
    with pytest.raises(UserError, match="conditioning_channels must be at least 1.* not 0"):
        load(tmp_path / "data", conditioning_channels=0, **options)


def test_the_cache_keeps_them_apart_from_the_images_alone(load, tmp_path):
    put_folder(tmp_path / "data")
    first, again = (load(tmp_path / "data", conditioning_column="conditioning_image") for _ in range(2))
    assert torch.equal(first.conditioning_images, again.conditioning_images)
    assert first.fingerprint == again.fingerprint
    alone = load(tmp_path / "data", label_column="none")
    assert alone.conditioning_images is None and len(alone) == 2 * COUNT
    put(tmp_path / "data" / "edges" / "0.png", image((0, 0, 99), "RGB"))
    changed = load(tmp_path / "data", conditioning_column="conditioning_image")
    assert changed.conditioning_images[0, 2, 0, 0] == 99 and changed.fingerprint != first.fingerprint


def test_both_are_resized_and_cropped_at_their_center(load, tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 200
    pairs = tmp_path / "data"
    put_folder(pairs, pair=lambda i: Image.fromarray(wide))
    for i in range(COUNT):
        put(pairs / "images" / f"{i}.png", Image.fromarray(wide).resize((48, 16), Image.Resampling.NEAREST))
    data = load(pairs, conditioning_column="conditioning_image", resolution=8)
    for images in (data.images, data.conditioning_images):  # of a side the dark would be seen
        assert images.shape == (COUNT, 1, 8, 8) and images.min() > 180


@pytest.mark.parametrize(
    ("column", "pair", "words"),
    [
        ("edges", None, "Unknown conditioning_column .*'edges': it must be one of conditioning_image"),
        ("conditioning_image", lambda i: image(0, size=(4, 4)), "have 4x4 pixels, and its images 8x8.*`resolution`"),
        ("conditioning_image", lambda i: image(0, size=(4, 8)), "have 8x4 pixels, and its images 8x8.*`resolution`"),
    ],
)
def test_a_column_that_does_not_fit_is_one_line(load, tmp_path, column, pair, words):
    put_folder(tmp_path / "data", **({} if pair is None else {"pair": pair}))
    with pytest.raises(UserError, match=words):
        load(tmp_path / "data", conditioning_column=column)


def test_a_column_of_other_things_and_missing_pairs_are_one_line(load, tmp_path):
    rows = put_folder(tmp_path / "data")
    table = tmp_path / "data" / "metadata.jsonl"
    table.write_text("\n".join(json.dumps({**row, "size": i}) for i, row in enumerate(rows)))
    with pytest.raises(UserError, match="conditioning_column 'size' of .* holds no images"):
        load(tmp_path / "data", conditioning_column="size")
    table.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "edges" / "0.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 conditioning images .*: edges/0.png \(no such file\)"):
        load(tmp_path / "data", conditioning_column="conditioning_image")
    del rows[0]["conditioning_image_file_name"]
    rows[1]["conditioning_image_file_name"] = ""
    (tmp_path / "data" / "edges" / "1.png").unlink()
    table.write_text("\n".join(map(json.dumps, rows)))
    missing = ", ".join(rf"images/{i}.png \(has no conditioning image\)" for i in range(2))
    with pytest.raises(UserError, match=f"2 of 4 conditioning images of 'data' are .*: {missing}"):
        load(tmp_path / "data", conditioning_column="conditioning_image")
    with pytest.raises(UserError, match="Unknown conditioning_column of 'digits'"):
        load("digits", conditioning_column="conditioning_image")
