import json
import os
import re
import tempfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from tiny_diffusers import progress
from tiny_diffusers.data import decoding, load_images, loading
from tiny_diffusers.errors import UserError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    return path


@pytest.fixture
def load(tmp_path):
    """Returns `load_images` with all its files in the test's own folder."""
    return lambda name, **kwargs: load_images(str(name), cache_dir=tmp_path / "cache", **kwargs)


def put(path, value=0, **options):
    """Saves an 8x8 gray image of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path, **options)


def put_classes(folder, *names, count=4):
    for name in names:
        for number in range(count):
            put(folder / name / f"{number}.png", number)


def save_parquet(path, count, value=7, **columns):
    """Saves `count` images of one value, and more columns, to a parquet file."""
    put(path.with_suffix(".png"), value)
    image = {"bytes": path.with_suffix(".png").read_bytes(), "path": None}
    path.with_suffix(".png").unlink()
    datasets.Dataset.from_dict({"image": [image] * count, **columns}).to_parquet(path)


def values(data):
    """Returns the value of each image."""
    assert (data.images == data.images[:, :1, :1, :1]).all()
    return data.images[:, 0, 0, 0].tolist()


def class_counts(data):
    return {name: int((data.labels == label).sum()) for label, name in data.id2label.items()}


# The property of all folders


NAMES = ["cat", "dog", "train", "test", "val", "set[ab]", "run*", "v1?", "seta", "a b", "ü", "__MACOSX", ".hidden"]
NAMES += [".ipynb_checkpoints", "metadata", "-1"]
FILES = ["train.png", "0.png", "1.png", "test_1.png", ".a.png", "no_suffix", "b.txt", "[1].png", "x.PNG", "y.jpg"]
FILES += ["metadata.png", "broken.dat", "notes.txt", "dog"]
TREES = st.lists(st.tuples(st.lists(st.sampled_from(NAMES), max_size=3), st.sampled_from(FILES)), max_size=12)
LINKS = st.lists(st.tuples(st.lists(st.sampled_from(NAMES), max_size=2), st.sampled_from(NAMES)), max_size=3)


@settings(max_examples=60, deadline=None)
@given(tree=TREES, links=LINKS, data=st.data())
def test_each_file_that_decodes_is_loaded_or_in_the_notes(tree, links, data):
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "images")
        root.mkdir()
        images, folders = {}, [root]
        for parents, file in tree:
            path = root.joinpath(*parents, file)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    continue
            except OSError:  # a file has the name of the folder
                continue
            if file in ("broken.dat", "notes.txt"):
                path.write_text("no image")
                continue
            image_format = "JPEG" if file == "y.jpg" else "PNG"
            Image.new("L", (8, 8), 0).save(path, format=image_format)
            images[path] = path.relative_to(root).parts
            folders.append(path.parent)
        for parents, name in links:
            place = root.joinpath(*parents)
            if place.is_dir() and not (place / name).exists():
                os.symlink(data.draw(st.sampled_from(folders)), place / name, target_is_directory=True)

        loaded = {}
        notes = set()
        for split in ("train", "validation", "test"):
            try:
                result = load_images(str(root), split=split, cache_dir=scratch)
            except UserError as error:
                assert re.search("holds no images|Unknown split|is empty", str(error))
                notes |= set(re.findall("hidden images, left out, .*?(?=;|$)", str(error)))
                continue
            loaded[split] = result
            notes |= set(result.notes)

        left_out = 0
        for note in notes:
            if found := re.match(r"(hidden images|images beside the class folders), left out, (\d+)", note):
                left_out += int(found[2])
        assert sum(map(len, loaded.values())) + left_out == len(images)

        visible = [parts for parts in images.values() if not any(part[0] == "." or "__" in part for part in parts)]
        tops = {parts[0] for parts in visible if len(parts) > 1}
        if tops and tops <= {"train", "test", "val"} and not links:
            assert any("read as splits" in note for note in notes)
        elif tops and not links and sum(len(parts) > 1 for parts in visible) * 2 >= len(visible):
            assert set(loaded["train"].id2label.values()) == tops


# Names


def test_names_of_splits_are_names_of_files(load, folder):
    for number in range(9):
        put(folder / f"{number}.png", number)
    put(folder / "train.png", 9)
    assert values(load(folder)) == list(range(10))


def test_samples_named_by_splits_are_all_read(load, folder):
    for number in range(100):
        put(folder / f"{'train_' if number < 40 else ''}{number:03d}.png", number)
    assert sorted(values(load(folder))) == list(range(100))


def test_a_class_may_have_the_name_of_a_split(load, folder):
    put_classes(folder, "bus", "car", "train")
    data = load(folder)
    assert class_counts(data) == {"bus": 4, "car": 4, "train": 4}
    assert data.notes == ["sub-folders read as classes, 3: bus, car, train"]


@pytest.mark.parametrize("name", ["train_test_split.txt", "train.txt", "val.json", "train_log.jsonl", "README.md"])
def test_other_files_change_no_class(load, folder, name):
    put_classes(folder, "cat", "dog")
    (folder / name).write_text("{}")
    data = load(folder)
    assert class_counts(data) == {"cat": 4, "dog": 4}
    assert f"files that are not images, left out: {name}" in data.notes


@pytest.mark.parametrize("name", ["set[ab]", "v1?", "run*"])
def test_a_folder_is_no_pattern(load, tmp_path, name):
    put(tmp_path / name / "1.png", 1)
    for other in ("seta", "v1a", "runs"):
        put(tmp_path / other / "2.png", 2)
    assert values(load(tmp_path / name)) == [1]


@pytest.mark.parametrize("name", ["set[ab]", "v1?", "run*"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_parquet_file_is_no_pattern(load, tmp_path, name, kind):
    for each, count in ((name, 1), ("seta", 2), ("v1a", 2), ("runs", 2)):
        save_parquet(tmp_path / each / "part.parquet", count)
    assert values(load(tmp_path / name / "part.parquet" if kind == "file" else tmp_path / name)) == [7]


def test_a_row_of_a_parquet_file_names_no_file_elsewhere(load, tmp_path, folder):
    put(tmp_path / "private.png", 9)
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    put(folder / "own.png", 3)
    outside = [str(tmp_path / "private.png"), "../private.png", "link.png", "pipe.png", "/dev/zero", "/nowhere"]
    image = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    for path in ("own.png", *outside):
        rows = [{"bytes": None, "path": path}]
        datasets.Dataset.from_dict({"image": rows}, image).to_parquet(folder / "part.parquet")
        if path == "own.png":
            assert values(load(folder)) == [3]
        else:
            with pytest.raises(UserError, match="1 of 1 images .* are broken.*no file of the dataset"):
                load(folder)


# Classes and splits


def test_sub_folders_of_classes_belong_to_them(load, folder):
    for name in ("cat/2019", "cat/2020", "dog/2019", "dog/2020/may"):
        put(folder / name / "1.png")
    assert class_counts(load(folder)) == {"cat": 2, "dog": 2}


def test_a_stray_image_is_named(load, folder):
    put_classes(folder, "cat", "dog")
    put(folder / "stray.png", 99)
    data = load(folder, require_labels=True)
    assert class_counts(data) == {"cat": 4, "dog": 4} and 99 not in values(data)
    assert "images beside the class folders, left out, 1: stray.png" in data.notes


def test_the_cache_tells_a_folder_from_its_parent(load, folder):
    put_classes(folder / "animals", "cat", "dog")
    data = load(folder)
    assert class_counts(data) == {"animals": 8}
    assert "'animals' is the only class: if its sub-folders are the classes, name that folder" in data.notes
    assert class_counts(load(folder / "animals")) == {"cat": 4, "dog": 4}


def test_a_folder_beside_many_images_is_no_class(load, folder):
    put_classes(folder, "extra", count=1)
    for number in range(4):
        put(folder / f"{number}.png", number)
    data = load(folder)
    assert len(data) == 5 and data.labels is None
    assert "most images of 'train' lie in no sub-folder: its sub-folders are not read as classes" in data.notes


@pytest.mark.parametrize("name", ["val", "valid", "validation", "VAL"])
def test_validation_has_several_names(load, folder, name):
    put_classes(folder / "train", "cat", "dog")
    put_classes(folder / name, "dog", count=2)
    for split in ("validation", "val"):
        data = load(folder, split=split)
        assert class_counts(data) == {"cat": 0, "dog": 2}  # the same indices as in the other split
    assert class_counts(load(folder)) == {"cat": 4, "dog": 4}
    assert f"folders read as splits, with classes below them: {', '.join(sorted(['train', name]))}" in data.notes
    with pytest.raises(UserError, match="Unknown split of '.*' 'test': it must be one of train, validation"):
        load(folder, split="test")


def test_slices_of_splits(load, folder):
    for number in range(10):
        put(folder / "train" / f"{number}.png", number)
        put(folder / "test" / f"{number}.png", 10 + number)
    for split, expected in {
        "train[:3]": [0, 1, 2],
        "train[80%:]": [8, 9],
        "test[-1:]": [19],
        "train[:1]+test[:1]": [0, 10],
        "all": list(range(20)),
    }.items():
        assert values(load(folder, split=split)) == expected
    with pytest.raises(UserError, match="Unknown split"):
        load(folder, split="train[:")
    with pytest.raises(UserError, match=r"'train\[:0\]' of .* is empty"):
        load(folder, split="train[:0]")


# Links and hidden files


def test_links_are_followed_once(load, tmp_path, folder):
    put_classes(tmp_path / "elsewhere", "dogs")
    put_classes(folder, "cat")
    os.symlink(tmp_path / "elsewhere" / "dogs", folder / "dog")
    os.symlink(folder, folder / "cat" / "loop")
    os.symlink(tmp_path, folder / "above")
    os.symlink(folder / "cat" / "0.png", folder / "cat" / "linked.png")
    os.symlink(tmp_path / "missing", folder / "dangling.png")
    os.symlink(folder / "itself", folder / "itself")
    data = load(folder)
    assert class_counts(data) == {"cat": 5, "dog": 4}
    assert "folders not entered (read already, or no permission), 2: above, cat/loop" in data.notes


def test_hidden_images_are_counted(load, folder):
    put(folder / "1.png", 1)
    for name in (".2.png", ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/1.png"):
        put(folder / name, 2)
    (folder / "__MACOSX" / "._1.png").write_bytes(b"\x00\x05\x16\x07")
    data = load(folder)
    assert values(data) == [1]
    names = ".2.png, .ipynb_checkpoints/1-checkpoint.png, __MACOSX/1.png"
    assert data.notes == [f"hidden images, left out, 3: {names}"]


def test_pipes_are_not_opened(load, folder):
    put(folder / "1.png", 1)
    os.mkfifo(folder / "2.png")
    os.symlink("/dev/zero", folder / "3.png")
    assert values(load(folder)) == [1]


# Metadata


def test_metadata_that_lists_some_images(load, folder):
    for number in range(10):
        put(folder / f"{number}.png", number)
    rows = [f"{number}.png,{'cat' if number % 2 else 'dog'},{number / 7}" for number in range(6)]
    (folder / "metadata.csv").write_text("file_name,kind,weight\n" + "\n".join([*rows, "gone.png,cat,1.0"]) + "\n")
    data = load(folder)
    assert values(data) == list(range(10)) and data.labels is None
    assert data.notes == [
        "metadata.csv lists 6 of 10 images: the others are kept",
        "metadata.csv lists 1 files that are no images here",
        "4 of 10 images of 'images' have no label: labels are left out",
    ]
    assert class_counts(load(folder, classes="cat,dog")) == {"cat": 3, "dog": 3}
    for column, words in {"weight": "neither integers nor strings", "kin": "Did you mean 'kind'"}.items():
        with pytest.raises(UserError, match=words):
            load(folder, label_column=column)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_names_columns_of_labels(load, folder, kind):
    rows = []
    for number in range(4):
        put(folder / "train" / "raw" / f"{number}.png", number)
        rows.append({"file_name": f"raw/{number}.png", "kind": 10 - number % 2, "size": "big"})
    table = folder / "train" / f"metadata.{kind}"
    dataset = datasets.Dataset.from_list(rows)
    {"csv": dataset.to_csv, "jsonl": dataset.to_json, "parquet": dataset.to_parquet}[kind](table)
    data = load(folder)
    assert data.labels.tolist() == [1, 0, 1, 0] and data.id2label == {0: "9", 1: "10"}  # integers, sorted as such
    assert "label_column: 'kind' was chosen from kind, size" in data.notes
    assert load(folder, label_column="size").id2label == {0: "big"}
    with pytest.raises(UserError, match="image_column 'kind' of .* holds no images: choose one of image"):
        load(folder, image_column="kind")


def test_damaged_metadata_is_said(load, folder):
    put_classes(folder, "cat", "dog")
    (folder / "metadata.csv").write_text("path,label\n1.png,2\n")
    (folder / "metadata.jsonl").write_text("{")
    (folder / "cat" / "metadata.csv").write_text("file_name,kind\n0.png,2,3\n")
    data = load(folder)
    assert class_counts(data) == {"cat": 4, "dog": 4}
    assert "metadata.csv, left out: it has no 'file_name'" in data.notes
    assert any(note.startswith("metadata.jsonl, left out: Expecting") for note in data.notes)


def test_classes_stay_beside_metadata_that_labels_some_images(load, folder):
    put_classes(folder, "cat", "dog")
    (folder / "metadata.csv").write_text("file_name,label\ncat/0.png,x\ncat/1.png,y\ndog/0.png,x\ndog/1.png,y\n")
    assert class_counts(load(folder)) == {"cat": 4, "dog": 4}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "npz"])
def test_labels_that_are_not_read_are_said(load, folder, tmp_path, kind):
    labels = [0.0, 1.0, 0.0, 1.0]
    if kind == "parquet":
        source = tmp_path / "a.parquet"
        save_parquet(source, 4, label=labels)
    elif kind == "npz":
        source = tmp_path / "a.npz"
        np.savez(source, images=np.zeros((4, 8, 8), np.uint8), labels=np.array(labels))
    else:
        source = folder
        rows = [{"file_name": f"{number}.png", "label": label} for number, label in enumerate(labels)]
        for row in rows:
            put(folder / row["file_name"])
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load(source)
    assert data.labels is None and len(data.notes) == 1
    assert re.match(r"not read as labels: labels? \(labels are whole numbers or strings", data.notes[0])


def test_a_column_named_label_holds_labels_though_no_value_repeats(load, folder, tmp_path):
    for number in range(3):
        put(folder / f"{number}.png", number)
    (folder / "metadata.csv").write_text("file_name,caption,label\n0.png,a,x\n1.png,b,y\n2.png,c,z\n")
    data = load(folder, require_labels=True)
    assert data.id2label == {0: "x", 1: "y", 2: "z"} and data.labels.tolist() == [0, 1, 2]
    save_parquet(tmp_path / "few.parquet", 3, label=[5, 7, 9], serial=[1, 2, 3])
    assert load(tmp_path / "few.parquet", require_labels=True).id2label == {0: "5", 1: "7", 2: "9"}


@pytest.mark.parametrize("zipped", [False, True])
def test_labels_of_stylegan_and_edm(load, folder, zipped):
    for number in range(6):
        put(folder / f"0000{number // 3}" / f"img{number}.png", number)
    labels = [[f"0000{number // 3}/img{number}.png", number % 2] for number in range(6)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    data = load(archive(folder) if zipped else folder, require_labels=True)
    assert data.labels.tolist() == [0, 1] * 3 and data.id2label == {0: "0", 1: "1"}
    (folder / "dataset.json").write_text(json.dumps({"labels": None}))
    assert load(folder).labels is None


# Archives, arrays and single files


def archive(folder, name="data.zip", prefix=""):
    path = folder.parent / name
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(folder.rglob("*")):
            if each.is_file():
                file.write(each, prefix + each.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_a_zip_is_read_like_its_folder(load, tmp_path, folder, prefix):
    put_classes(folder, "cat", "dog")
    put(folder / "__MACOSX" / "1.png")
    (folder / "notes.txt").write_text("no image")
    expected = load(folder)
    path = archive(folder, prefix=prefix)
    (tmp_path / "inside").mkdir()
    for data in (load(path), load(path.rename(tmp_path / "inside" / "data.zip").parent)):
        assert data.fingerprint == expected.fingerprint and data.id2label == expected.id2label
        assert any(note.startswith("hidden images, left out, 1: ") for note in data.notes)
        assert "files that are not images, left out: notes.txt" in data.notes


def test_each_of_several_archives_is_a_folder(load, tmp_path, folder):
    put(folder / "1.png", 1)
    for name in ("cat.zip", "dog.zip"):
        (tmp_path / "archives").mkdir(exist_ok=True)
        archive(folder, name).rename(tmp_path / "archives" / name)
    assert class_counts(load(tmp_path / "archives")) == {"cat": 1, "dog": 1}


def test_members_outside_an_archive_are_not_read(load, tmp_path, folder):
    put(folder / "1.png", 1)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for name in ("1.png", "../2.png", "/3.png"):
            file.writestr(zipfile.ZipInfo(name), (folder / "1.png").read_bytes())
    data = load(tmp_path / "data.zip")
    assert values(data) == [1]
    names = "data.zip: ../2.png (outside of the archive), data.zip: /3.png (outside of the archive)"
    assert data.notes == [f"files that are not images, left out: {names}"]
    (tmp_path / "bad.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="holds no images.*bad.zip .File is not a zip file"):
        load(tmp_path / "bad.zip")


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 8, 1), (6, 1, 8, 8), (6, 8, 8, 3), (6, 3, 8, 8)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_arrays(load, tmp_path, shape, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    labels = np.array([1, 0, 2, 1, 0, 2])
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "b.npz", pixels)
    np.savez_compressed(tmp_path / "c.npz", labels=labels, images=pixels)
    gray = 3 not in (shape[1], shape[-1])
    expected = pixels.reshape(6, 1, 8, 8) if gray else np.moveaxis(pixels, -1, 1) if shape[-1] == 3 else pixels
    for name in ("a.npy", "b.npz", "c.npz"):
        data = load(tmp_path / name)
        assert np.array_equal(data.images.numpy(), expected) and data.notes == []
        assert (data.labels is None) == (name != "c.npz")
    assert data.labels.tolist() == labels.tolist() and len(data) == 6
    np.savez(tmp_path / "d.npz", images=pixels, serial=np.arange(6))
    assert load(tmp_path / "d.npz").labels is None
    assert load(tmp_path / "d.npz", label_column="serial").labels.tolist() == list(range(6))
    assert load(tmp_path / "c.npz", split="train[:2]").labels.tolist() == [1, 0]


def test_arrays_named_by_splits(load, tmp_path):
    arrays = {"x_train": np.zeros((4, 8, 8), bool), "y_train": np.arange(4), "x_test": np.ones((2, 8, 8), bool)}
    np.savez(tmp_path / "a.npz", **arrays, y_test=np.arange(2))
    assert values(load(tmp_path / "a.npz")) == [0] * 4
    data = load(tmp_path / "a.npz", split="test")
    assert values(data) == [255, 255] and data.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="Unknown split of .* 'validation': it must be one of train, test"):
        load(tmp_path / "a.npz", split="validation")


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"images": np.zeros((2, 8, 8))}, "All values of the images of 'a' are 0"),
        ({"images": np.full((2, 8, 8), -1)}, "holds values from -1 to -1: they must be from 0 to 65535"),
        ({"x": np.zeros((2, 8), int)}, "no image column: its arrays are x .2, 8.*shape .N, H, W."),
        ({"x": np.array([{}, {}], dtype=object)}, "cannot be read: .*allow_pickle"),
    ],
)
def test_arrays_that_are_no_images(load, tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "a.npz")


def test_a_parquet_file_is_read(load, tmp_path):
    put(tmp_path / "1.png")
    save_parquet(tmp_path / "some.parquet", 4, value=5, label=[0, 1, 0, 1])
    data = load(tmp_path / "some.parquet")
    assert values(data) == [5] * 4 and data.labels.tolist() == [0, 1, 0, 1] and data.name == "some"
    with pytest.raises(UserError, match="is no dataset: give a folder, or a file of .zip, .npz, .npy, .parquet"):
        load(tmp_path / "1.png")


def test_images_beside_parquet_files_are_said(load, folder):
    save_parquet(folder / "some.parquet", 1)
    for name in "abc":  # more than there are parquet files, so that `datasets` would read these
        put(folder / f"{name}.png", 5)
    data = load(folder)
    assert values(data) == [7]
    assert data.notes == ["images beside the parquet or arrow files, left out, 3: a.png, b.png, c.png"]


# Formats


@pytest.mark.parametrize("suffix", ["avif", "mpo", "qoi", "webp", "tga", "pcx"])
def test_all_formats_of_pillow_are_read(load, folder, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for number in range(4):
        put(folder / f"a{number}.png", 80)
        path = folder / f"b{number}.{suffix}"
        if suffix == "qoi":  # which older versions of Pillow cannot write: one pixel, then runs of it
            header = b"qoif" + (8).to_bytes(4, "big") * 2 + b"\x03\x00"
            path.write_bytes(header + b"\xfe\x50\x50\x50" + b"\xfd\xc0" + bytes(7) + b"\x01")
        else:
            Image.new("RGB", (8, 8), (80, 80, 80)).save(path, format="JPEG" if suffix == "mpo" else None)
    data = load(folder)
    assert len(data) == 8 and (data.images.int() - 80).abs().max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "tiff", "webp", "png"])
def test_the_first_frame_is_read_and_said(load, folder, suffix):
    frames = [Image.new("L", (8, 8), value) for value in (10, 200, 90)]
    options = {} if suffix != "webp" else {"lossless": True}
    frames[0].save(folder / f"1.{suffix}", save_all=True, append_images=frames[1:], **options)
    data = load(folder, channels=1)
    assert values(data) == [10]
    assert "1 of 1 images have several frames or pages: the first was taken" in data.notes


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_wide_pixels_are_scaled_by_what_the_set_holds(load, folder, bits, dtype):
    highest = 2**bits - 1
    for number, value in enumerate((0, highest // 3, highest)):
        Image.fromarray(np.full((8, 8), value, dtype)).save(folder / f"{number}.tiff")
    data = load(folder)
    assert values(data) == [0, 85, 255]
    wider = "16 bits a pixel" if bits == 16 else f"{bits}-bit values in wider pixels"
    how = "kept" if bits == 8 else "scaled to 8 (value_range keeps them)"
    assert data.notes == [f"3 of 3 images had {wider}, {how}"]


def test_images_that_are_refused_are_named_with_the_reason(load, folder, monkeypatch):
    monkeypatch.setattr(decoding, "_MAX_BROKEN_SHARE", 0.6)
    for number in range(2):
        put(folder / f"{number}.png", number)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "float.tiff")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(folder / "int.tiff")
    Image.new("1", (8_192, 8_193)).save(folder / "large.png")
    Image.new("L", (8, 8)).save(folder / "program.eps")
    data = load(folder)
    assert data.notes == [
        "files that are not images, left out: program.eps",
        "broken files skipped, 3: float.tiff (floating-point values have no fixed range), "
        "int.tiff (holds values from 70000 to 70000: they must be from 0 to 65535, or value_range must be set), "
        "large.png (more than 67,108,864 pixels)",
    ]


# Names of datasets, and the cache


def test_an_empty_name_is_refused(load):
    with pytest.raises(UserError, match="name is empty: give a Hub id such as ylecun/mnist, a folder, or digits"):
        load("")
    with pytest.raises(UserError, match="name is empty"):
        load_images(train_data_dir="")


def test_a_folder_named_digits(load, tmp_path, monkeypatch):
    put(tmp_path / "digits" / "1.png", 1)
    monkeypatch.chdir(tmp_path)
    embedded = load("digits")
    assert len(embedded) == 1797
    assert embedded.notes == ["'digits' is the embedded dataset: name the folder or file of this name ./digits"]
    assert values(load("./digits")) == [1]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert values(load("~/digits")) == [1]


def test_a_folder_named_like_a_dataset_of_the_hub_stands_in_for_it(load, tmp_path, monkeypatch):
    put(tmp_path / "ylecun" / "mnist" / "1.png", 1)
    monkeypatch.chdir(tmp_path)
    assert values(load("ylecun/mnist")) == [1]


def test_a_folder_needs_no_cache(folder, tmp_path, monkeypatch):
    put_classes(folder, "cat", "dog")
    (tmp_path / "file").touch()
    monkeypatch.setattr(loading, "cache_root", lambda cache_dir=None: tmp_path / "file" / "cache")
    monkeypatch.setattr(loading, "open_dataset", None)
    assert len(load_images(str(folder))) == 8


def test_a_cache_of_datasets_that_cannot_be_written_is_named(folder, tmp_path):
    save_parquet(folder / "some.parquet", 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/below.*the cache of `datasets`: set `cache_dir` or HF_HOME"):
        load_images(str(folder), cache_dir=tmp_path / "file" / "below")


@pytest.mark.parametrize("is_terminal, seconds", [(True, 0.5), (False, 15)])
def test_the_progress_bar_does_not_flood_a_log(load, folder, monkeypatch, is_terminal, seconds):
    put(folder / "1.png")
    bars, tqdm = [], progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **options: bars.append(options) or tqdm(**options))
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    load(folder)
    assert bars[0]["mininterval"] == seconds
