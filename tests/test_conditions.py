"""Conditions of images: how columns become numbers by name, are kept beside the images, and are refused."""

import json
import math

import datasets
import numpy as np
import pytest
from PIL import Image

from tiny_diffusers.data import load_images
from tiny_diffusers.data.conditions import parse_conditions
from tiny_diffusers.errors import UserError


COUNT = 4
AGES, HATS, TAGS = [20.5, 30, 40, 50], [True, False, True, False], [["red"], ["blue", "red"], [], ["blue"]]
EXPECTED = [[20.5, 1, 0, 1], [30, 0, 1, 1], [40, 1, 0, 0], [50, 0, 1, 0]]
NAMES = ["age", "hat", "blue", "red"]


@pytest.fixture
def load(tmp_path):
    """Returns `load_images` with all its files in the test's own folder."""
    return lambda name, **kwargs: load_images(str(name), cache_dir=tmp_path / "cache", **kwargs)


@pytest.fixture
def put(tmp_path):
    """Returns a function that saves images 0, 1, ... with a table of their columns, as one kind of dataset."""

    def save(kind, /, **columns):
        columns = columns or {"age": AGES, "hat": HATS, "tags": TAGS}
        pixels = [np.full((8, 8), i, np.uint8) for i in range(COUNT)]
        if kind == "npz":
            np.savez(tmp_path / "data.npz", image=pixels, **columns)
            return tmp_path / "data.npz"
        if kind == "parquet":
            images = [Image.fromarray(image) for image in pixels]
            features = datasets.Dataset.from_dict({"image": images, **columns}).features
            features["image"] = datasets.Image()
            dataset = datasets.Dataset.from_dict({"image": images, **columns}, features=features)
            dataset.to_parquet(tmp_path / "data.parquet")
            return tmp_path / "data.parquet"
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{i}.png")
        rows = [
            {"file_name": f"{i}.png", **{name: values[i] for name, values in columns.items()}} for i in range(COUNT)
        ]
        if kind == "jsonl":
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:  # as pandas writes a .csv
            cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
            (folder / "metadata.csv").write_text("\n".join(map(",".join, [[*rows[0]], *cells])))
        return folder

    return save


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_list_of_names_is_a_condition_for_each_label(load, put, kind):
    data = load(put(kind), condition_columns="age, hat,tags")
    assert data.condition_names == NAMES and data.conditions.tolist() == EXPECTED
    assert data.images[:, 0, 0, 0].tolist() == [*range(COUNT)]
    assert data.labels is None  # no condition is taken for labels


def test_columns_of_a_csv_and_arrays(load, put):
    data = load(put("csv", age=AGES, hat=HATS), condition_columns=["age", "hat"])
    assert data.conditions.tolist() == [row[:2] for row in EXPECTED]
    hot = np.array([[0, 1], [1, 1], [0, 0], [1, 0]])
    path = put("npz", age_train=np.array(AGES)[:, None], hot_train=hot, kind_train=np.array([0, 1, 0, 1]))
    data = load(path, condition_columns="hot_train,age")
    assert data.condition_names == ["hot_0", "hot_1", "age"]  # the same for each split
    assert data.conditions.tolist() == [[*row, age] for row, age in zip(hot.tolist(), AGES, strict=True)]
    assert data.labels.tolist() == [0, 1, 0, 1]


def test_classes_of_a_hub_dataset_are_a_condition_each(load, tmp_path):
    names = ["cat", "dog", "frog"]
    features = datasets.Features(
        image=datasets.Image(),
        kind=datasets.ClassLabel(names=names),
        all=datasets.Sequence(datasets.ClassLabel(names=names)),
    )
    rows = {"image": [Image.new("L", (8, 8))] * 3, "kind": [2, 0, 1], "all": [[0, 2], [1], []]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", condition_columns="kind")
    assert data.condition_names == names and data.conditions.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    data = load(tmp_path / "a.parquet", condition_columns="all", label_column="kind")
    assert data.condition_names == names and data.conditions.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert data.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        ([3, 1, None], ["c"], [[3], [1], [math.nan]]),
        (["True", "false", None], ["c"], [[1], [0], [math.nan]]),
        ([[1], [1, 7], []], ["c_1", "c_7"], [[1, 0], [1, 1], [0, 0]]),  # ids
        ([[1, 0], [0, 0], [1, 1]], ["c_0", "c_1"], [[1, 0], [0, 0], [1, 1]]),  # multi-hot
        ([[0.5, 2], [1.0, 3], None], ["c_0", "c_1"], [[0.5, 2], [1, 3], [math.nan] * 2]),  # numbers
    ],
)
def test_what_a_column_holds_decides_what_it_is(values, names, expected):
    found, found_names = parse_conditions({"c": values}, "data")
    assert found_names == names and found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


@pytest.mark.parametrize("values", [[20240101, 20240102, 20240103], [1e39, 1e39]])
def test_numbers_that_float32_cannot_hold_are_refused(values):
    with pytest.raises(UserError, match="condition 'c' of 'data' has numbers that float32 rounds by more than"):
        parse_conditions({"c": values}, "data")
    parse_conditions({"c": [0.1, 0.3, 0.1 + 0.2]}, "data")  # equal but for the last digit


def test_the_labels_of_a_hub_dataset_are_the_same_in_each_split_and_minus_one_is_none(load, tmp_path):
    names = ["cat", "dog", "frog"]
    features = datasets.Features(
        image=datasets.Image(),
        kind=datasets.ClassLabel(names=names),
        old=datasets.ClassLabel(names=["no", "yes"]),
        all=datasets.Sequence(datasets.ClassLabel(names=names)),
        place=datasets.Sequence(datasets.Value("int32"), length=2),
    )
    rows = {"kind": [1, -1], "old": [1, -1], "all": [[-1], [0]], "place": [[3, 5], [4, 6]]}
    rows["image"] = [Image.new("L", (8, 8))] * 2
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", condition_columns="all,place")
    assert data.condition_names == [*names, "place_0", "place_1"]  # numbers, and no ids
    assert data.conditions.tolist() == [[0, 0, 0, 3, 5], [1, 0, 0, 4, 6]]
    for column in ("kind", "old"):
        data = load(tmp_path / "a.parquet", condition_columns=column, drop_missing=True)
        assert data.conditions.tolist() == ([[0, 1, 0]] if column == "kind" else [[1]])


def test_the_names_of_arrays_keep_their_case_and_lose_their_split(load, put):
    path = put(
        "npz", MeanTemp_train=np.array(AGES), val=np.array(AGES), place=np.array([[3, 5], [4, 6], [3, 6], [1, 1]])
    )
    data = load(path, condition_columns="MeanTemp_train,place")
    assert data.condition_names == ["MeanTemp", "place_0", "place_1"]
    assert data.conditions[1].tolist() == [30, 4, 6]
    np.savez(path, image=np.zeros((COUNT, 8, 8), np.uint8), age_train=AGES, age=AGES)
    with pytest.raises(UserError, match="two of age_train, age have one name without their split"):
        load(path, condition_columns="age_train,age")


def test_they_follow_their_images_through_every_selection(load, put):
    path = put("jsonl", age=[20, None, 40, 50], kind=["a", "a", "b", "a"])
    asked = {"condition_columns": "age", "label_column": "kind"}
    data = load(path, classes="a", drop_missing=True, **asked)
    assert data.conditions.tolist() == [[20], [50]] and data.images[:, 0, 0, 0].tolist() == [0, 3]
    assert "1 of 3 images of 'data' (33.3%) have no value of age, left out" in data.notes
    one = load(path, classes="b", **asked)  # the image without a value is not among them
    assert one.conditions.tolist() == [[40]]
    some = load(path, max_samples=2, drop_missing=True, **asked)
    ages = {0: 20, 2: 40, 3: 50}
    assert some.conditions[:, 0].tolist() == [ages[i] for i in some.images[:, 0, 0, 0].tolist()]
    part = data.take(np.array([1]))
    assert part.conditions.tolist() == [[50]] and part.fingerprint != data.fingerprint


def test_the_cache_and_the_fingerprint_tell_conditions_apart(load, put):
    path = put("npz", age=np.array(AGES), size=np.array(AGES), other=np.arange(COUNT) + 0.5)
    plain, age, size, other = (load(path, condition_columns=c) for c in (None, "age", "size", "other"))
    assert len({data.fingerprint for data in (plain, age, size, other)}) == 4  # the names count as well
    again = load(path, condition_columns="age")
    assert again.fingerprint == age.fingerprint and again.condition_names == ["age"]
    assert again.conditions.tolist() == age.conditions.tolist()
    assert load(path).conditions is None and load(path).condition_names is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a", "b", "c", "d"], "condition column 'c' of .* holds text ('a')"),
        ([1, math.inf, 2, 3], "condition column 'c' of .* holds infinite numbers"),
        ([None] * 4, "condition column 'c' of .* has no values"),
        ([1, None, 2, None], "2 of 4 images of .* (50.0%) have no value of c: --drop_missing leaves these images out"),
        ([1, math.nan, 2, 3], "1 of 4 images of .* (25.0%) have no value of c"),
        ([[1.5], [2.5, 3], [], [1]], "holds lists of neither labels nor numbers"),
    ],
)
def test_each_bad_column_is_one_line(load, put, values, words):
    path = put("jsonl", c=values)
    pattern = words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=pattern) as error:
        load(path, condition_columns="c")
    assert "\n" not in str(error.value)


def test_each_bad_name_is_one_line(load, put):
    for kind in ("jsonl", "parquet"):
        with pytest.raises(UserError, match="Did you mean 'age'"):
            load(put(kind), condition_columns="agee")
    with pytest.raises(UserError, match="Did you mean 'age'"):
        load(put("npz", age=np.array(AGES)), condition_columns="agee")
    with pytest.raises(UserError, match="give each column once"):
        load("digits", condition_columns="age,age")
    with pytest.raises(UserError, match="'digits' has no condition column age"):
        load("digits", condition_columns="age")
    with pytest.raises(UserError, match="two conditions named 'red'"):
        load(put("jsonl", red=AGES, tags=TAGS), condition_columns="red,tags")
    with pytest.raises(UserError, match="drop_missing"):
        load("digits", drop_missing=True)
    with pytest.raises(UserError, match="holds images"):
        load(put("parquet"), condition_columns="image")
