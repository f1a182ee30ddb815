"""Conditions by name: their forms, standardization, guidance, the pipelines that take them, and what is refused."""

import warnings

import numpy as np
import pytest
import torch

from tiny import conditional_pipeline
from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDDIMScheduler,
    TinyImg2ImgPipeline,
    TinyInpaintPipeline,
    TinyInterpolationPipeline,
    TinyPipeline,
    TinyRestorationPipeline,
)
from tiny_diffusers.pipelines.pipeline_tiny_conditions import ConditionStatistics, spell_numbers


STATISTICS = {
    "names": ["smiling", "age"],
    "means": [0.5, 40.0],
    "deviations": [0.5, 10.0],
    "lows": [0.0, 20.0],
    "highs": [1.0, 60.0],
}
ROW = {"smiling": 1, "age": 30}
OTHERS = ("pixelcnn", "vae", "dcgan")  # families without guidance
FAMILIES = ("diffusion", *OTHERS)


@pytest.fixture
def make_pipe(make_unet, quiet):
    def make(cls=TinyConditionalPipeline, classes=None, family="diffusion", **options):
        if family != "diffusion":
            return conditional_pipeline(family, options.pop("condition_statistics", STATISTICS), classes, **options)
        unet = make_unet(stock=False, classes=classes, num_conditions=2)
        options = {"condition_statistics": STATISTICS, **options}
        return quiet(cls(unet, TinyDDIMScheduler(), **options))

    return make


def draw(pipe, *args, seed=0, **options):
    options = {"output_type": "np", **({"num_inference_steps": 3} if "unet" in pipe.components else {}), **options}
    return pipe(*args, generator=torch.Generator().manual_seed(seed), **options).images


def test_statistics_standardize_numbers_and_send_labels_to_minus_one_and_one():
    values = torch.tensor([[0, 20], [1, 60], [0, 40], [0, 40.0]])
    statistics = ConditionStatistics.measure(values, ["smiling", "age"])
    assert statistics.are_labels == [True, False]
    assert (statistics.lows, statistics.highs) == ([0, 20], [1, 60])
    standardized = statistics.standardize(values)
    assert standardized[:, 0].tolist() == [-1, 1, -1, -1]
    torch.testing.assert_close(standardized[:, 1].mean(), torch.tensor(0.0))
    torch.testing.assert_close(standardized[:, 1].std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(statistics.restore(standardized), values)
    with pytest.raises(ValueError, match="'age' is 40 for all training images"):
        ConditionStatistics.measure(values[2:, 1:], ["age"])


def test_examples_show_what_the_first_condition_does():
    rows, texts = ConditionStatistics(**STATISTICS).examples()
    assert rows == [{"smiling": 0, "age": 40}, {"smiling": 1, "age": 40}] and texts == ["smiling 0", "smiling 1"]
    swapped = {name: values[::-1] for name, values in STATISTICS.items()}
    rows, texts = ConditionStatistics(**swapped).examples()
    assert rows == [{"age": age, "smiling": 0} for age in (20, 40, 60)] and texts == ["age 20", "age 40", "age 60"]


def test_numbers_are_spelled_with_as_many_digits_as_tell_them_apart():
    assert spell_numbers([1985.0, 2000.5, 2016.0]) == ["1985", "2000.5", "2016"]
    assert spell_numbers([1e7, 1e7 + 1, 1e7]) == ["10000000", "10000001", "10000000"]
    years = {"names": ["year"], "means": [2000.0], "deviations": [9.0], "lows": [1985.0], "highs": [2016.0]}
    assert ConditionStatistics(**years).examples()[1] == ["year 1985", "year 2000.5", "year 2016"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "form",
    [
        {"age": [30, 50], "smiling": [1, 0]},
        [{"age": 30, "smiling": 1}, {"smiling": False, "age": 50.0}],
        torch.tensor([[1, 30], [0, 50]]),
        np.array([[1, 30.0], [0, 50]]),
        {"age": torch.tensor([30, 50]), "smiling": np.array([1, 0])},
    ],
    ids=["dict", "dicts", "tensor", "array", "tensors"],
)
def test_each_form_gives_the_same_input_of_the_network(make_pipe, form, family):
    pipe, seen = make_pipe(family=family), []
    pipe._network.condition_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert len(draw(pipe, conditions=form)) == 2
    assert seen and all(conditions.tolist() == [[1, -1], [-1, 1]] for conditions in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_stands_for_all_and_several_are_a_batch(make_pipe, family):
    pipe = make_pipe(classes=3, family=family)
    assert len(draw(pipe, class_labels=1, conditions=ROW, batch_size=3)) == 3
    assert len(draw(pipe, class_labels=[0, 1], conditions=ROW)) == 2
    assert len(draw(pipe, class_labels=1, conditions={"smiling": 1, "age": [20, 40, 60]})) == 3
    for many in ([0, 1], [0, 1, 2, 0]):
        with pytest.raises(ValueError, match="must be one"):
            draw(pipe, class_labels=many, conditions={"smiling": 1, "age": [20, 40, 60]})
    for given, words in (({"class_labels": 1}, "needs `conditions`"), ({"conditions": ROW}, "needs `class_labels`")):
        with pytest.raises(ValueError, match=words):
            draw(pipe, **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_null_class_has_weight_only_where_it_was_trained(make_pipe, family):
    """Class and conditions are dropped together, and by a VAE or a DCGAN never."""
    mixed, whole = torch.tensor([[0.5, 0.2, 0.3, 0]]), torch.tensor([[0.0, 0, 0, 1]])
    drops = {} if family in ("vae", "dcgan") else {"class_dropout_prob": 0.1}
    pipe = make_pipe(classes=3, family=family, **drops)
    assert len(draw(pipe, class_labels=mixed, conditions=ROW)) == 1
    for weights in (whole, torch.tensor([[0.5, 0, 0, 0.5]])):
        with pytest.raises(
            ValueError, match="the null class, row 3, a weight of 0: " + ("training" if drops else "no")
        ):
            draw(pipe, class_labels=weights, conditions=ROW)
    if family in OTHERS:
        pipe = make_pipe(classes=3, family=family, condition_statistics=None, **drops)
        if drops:
            assert len(draw(pipe, class_labels=whole)) == 1
            pipe.register_to_config(class_dropout_prob=0)
        with pytest.raises(ValueError, match="a weight of 0: no label was dropped"):
            draw(pipe, class_labels=whole)


def test_a_pixelcnn_draws_and_measures_images_of_any_kind_without_class_and_conditions(make_pipe):
    pipe = make_pipe(classes=3, family="pixelcnn", class_dropout_prob=0.1)
    seen = []
    pipe.pixelcnn.condition_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert len(draw(pipe, batch_size=2)) == 2 and seen and all(each.isnan().all() for each in seen)
    images = torch.randint(256, (2, 2, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    null = torch.full((2,), 3), torch.full((2, 2), torch.nan)
    bits = pipe.pixelcnn.nll(pipe.pixelcnn.quantize(images / 255), *null)
    torch.testing.assert_close(pipe.bits_per_dim(images), bits)
    for call in (lambda **given: draw(pipe, **given), lambda **given: pipe.bits_per_dim(images, **given)):
        with pytest.raises(ValueError, match="needs `conditions`"):
            call(class_labels=1)
        with pytest.raises(ValueError, match="needs `class_labels`"):
            call(conditions=ROW)
    never = make_pipe(classes=3, family="pixelcnn", class_dropout_prob=0)
    with pytest.raises(ValueError, match="needs `conditions`"):
        draw(never)


@pytest.mark.parametrize("classes", [None, 3])
def test_guidance_is_a_mix_of_the_two_predictions(make_pipe, classes):
    pipe = make_pipe(classes=classes)
    labels = None if classes is None else 1
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep, w = torch.tensor(500), 3.0
    label, null = (None, None) if classes is None else (torch.tensor([1]), torch.tensor([3]))
    given = torch.tensor([[1.0, -1.0]])
    with torch.no_grad():
        conditional = pipe.unet(x, timestep, label, conditions=given).sample
        unconditional = pipe.unet(x, timestep, null).sample
        pipe.scheduler.set_timesteps(1)
        pipe._num_timesteps = 1
        encoded = pipe._encode_conditions(ROW)
        predict = pipe._guided_predict(label, w, (0.0, 1.0), conditions=encoded)
        torch.testing.assert_close(predict(x, timestep, 0), w * conditional + (1 - w) * unconditional)
    assert not torch.equal(conditional, unconditional)

    plain = draw(pipe, labels, guidance_scale=0.0)
    np.testing.assert_allclose(draw(pipe, labels, guidance_scale=0.0, conditions=ROW), plain, atol=1e-6)
    strong = {"guidance_scale": 4.0, "conditions": ROW}
    assert not np.allclose(draw(pipe, labels, **strong), draw(pipe, labels, conditions=ROW))
    never = draw(pipe, labels, **strong, guidance_interval=(0.5, 0.5), clip_sample=False)
    np.testing.assert_allclose(never, draw(pipe, labels, conditions=ROW, clip_sample=False), atol=1e-6)
    assert draw(pipe, labels, **strong, dynamic_thresholding=0.9).shape == (1, 8, 8, 1)


def test_an_unconditional_pipeline_draws_without_conditions(make_pipe, quiet):
    pipe = make_pipe()
    plain = quiet(TinyPipeline(pipe.unet, pipe.scheduler))
    np.testing.assert_allclose(draw(plain), draw(pipe, guidance_scale=0.0), atol=1e-6)


def test_they_survive_a_save_and_a_change_of_pipeline(make_pipe, quiet, tmp_path):
    pipe = make_pipe(class_dropout_prob=0.1)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(TinyPipeline.from_pretrained(tmp_path))
    assert loaded.config.condition_statistics == STATISTICS
    np.testing.assert_allclose(draw(loaded, conditions=ROW), draw(pipe, conditions=ROW), atol=1e-5)
    back = TinyConditionalPipeline.from_pipe(TinyInpaintPipeline.from_pipe(loaded))
    assert back._condition_statistics == pipe._condition_statistics


@pytest.mark.parametrize("family", OTHERS)
def test_the_families_without_guidance_draw_by_them_and_survive_a_save(make_pipe, tmp_path, family):
    pipe = make_pipe(classes=3, family=family)
    of_age = [draw(pipe, class_labels=1, conditions=ROW | {"age": age}) for age in (20, 60)]
    assert not np.allclose(*of_age)
    pipe.save_pretrained(tmp_path)
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipe) and loaded.config.condition_statistics == STATISTICS
    np.testing.assert_allclose(draw(loaded, class_labels=1, conditions=ROW | {"age": 60}), of_age[1], atol=1e-6)


@pytest.mark.parametrize("family", ["vae", "dcgan"])
@pytest.mark.parametrize("classes", [None, 3])
def test_a_walk_of_theirs_is_linear_in_the_values(make_pipe, family, classes):
    pipe, labels = make_pipe(classes=classes, family=family), None if classes is None else [0, 2]
    given = {"class_labels": labels, "conditions": {"smiling": 1, "age": [20, 60]}}
    frames = pipe.interpolate(seeds=(3, 3), num_frames=5, output_type="np", **given).images
    weights = [None] * 5 if classes is None else torch.eye(4)[[0, 2]]
    weights = weights if classes is None else torch.lerp(*weights, torch.linspace(0, 1, 5)[:, None])
    for frame, age, label in zip(frames, (20, 30, 40, 50, 60), weights, strict=True):
        expected = draw(pipe, seed=3, class_labels=label, conditions={"smiling": 1, "age": age})
        np.testing.assert_allclose(frame, expected[0], atol=1e-5)


def test_a_vae_encodes_and_decodes_by_them(make_pipe):
    pipe = make_pipe(classes=3, family="vae")
    images = torch.randint(256, (2, 2, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels, given = images / 255, {"class_labels": [0, 2], "conditions": {"smiling": 1, "age": [20, 60]}}
    network = {"class_labels": torch.tensor([0, 2]), "conditions": torch.tensor([[1.0, -2], [1, 2]])}
    with torch.no_grad():
        mean = pipe.vae.encode(2 * pixels - 1, **network).mean
        expected = pipe.vae.decode(mean, **network)
    torch.testing.assert_close(pipe.encode(pixels, **given), mean)
    rebuilt = pipe.reconstruct(pixels, output_type="latent", **given).images
    torch.testing.assert_close(rebuilt, expected)
    frames = pipe.interpolate(pixels, num_frames=2, output_type="latent", **given).images
    torch.testing.assert_close(frames, expected)
    bits = [pipe.bits_per_dim(images, labels, torch.Generator().manual_seed(0), ROW) for labels in (0, 2)]
    assert bits[0].shape == (2,) and not torch.equal(*bits)
    for call in (pipe.encode, pipe.reconstruct, pipe.interpolate):
        with pytest.raises(ValueError, match="needs `conditions`: give smiling, age"):
            call(pixels, class_labels=1)
    with pytest.raises(ValueError, match="needs `conditions`: give smiling, age"):
        pipe.bits_per_dim(images, 1)


def test_a_pixelcnn_completes_and_measures_by_them_and_draws_without_if_it_has_learned_to(make_pipe):
    pipe = make_pipe(family="pixelcnn", class_dropout_prob=0.1)
    images = torch.randint(16, (2, 2, 3, 4), generator=torch.Generator().manual_seed(1)) / 15
    given = torch.zeros(3, 4)
    given[:1] = 1
    completed = draw(pipe, images=images, mask=given, conditions=ROW)
    np.testing.assert_allclose(completed[:, :1], images.permute(0, 2, 3, 1)[:, :1], atol=1e-6)
    np.testing.assert_array_equal(draw(pipe, images=images, mask=given, conditions=ROW, use_cache=False), completed)
    assert not np.array_equal(draw(pipe, images=images, mask=given, conditions=ROW | {"age": 60}), completed)
    assert len(draw(pipe, conditions={"smiling": 1, "age": [20, 40]}, images=images[:1], mask=given)) == 2

    levels = (images * 255).to(torch.uint8)
    by_hand = pipe.pixelcnn.nll(pipe.pixelcnn.quantize(levels / 255), None, torch.tensor([[1.0, -1], [1, -1]]))
    torch.testing.assert_close(pipe.bits_per_dim(levels, conditions=ROW), by_hand)
    torch.testing.assert_close(pipe.bits_per_dim(levels), pipe.pixelcnn.nll(pipe.pixelcnn.quantize(levels / 255)))
    assert draw(pipe).shape == (1, 3, 4, 2)

    never = make_pipe(family="pixelcnn", class_dropout_prob=0.0)
    both = make_pipe(family="pixelcnn", classes=3, class_dropout_prob=0.1)
    assert both.bits_per_dim(levels).shape == both.bits_per_dim(levels, 1, conditions=ROW).shape == (2,)
    for call, words in (
        (lambda: draw(never), "needs `conditions`"),
        (lambda: never.bits_per_dim(levels), "needs `conditions`"),
        (lambda: both.bits_per_dim(levels, 1), "needs `conditions`"),  # they were dropped together only
        (lambda: both.bits_per_dim(levels, conditions=ROW), "needs `class_labels`"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


EDITS = {
    TinyImg2ImgPipeline: {"strength": 0.7},
    TinyInpaintPipeline: {"mask_image": torch.eye(8), "jump_n_sample": 1},
    TinyRestorationPipeline: {"operator": "super_resolution", "factor": 2},
}


@pytest.mark.parametrize("cls", EDITS, ids=lambda cls: cls.__name__)
def test_edits_take_them(make_pipe, cls):
    pipe, options = make_pipe(cls, class_dropout_prob=0.1), EDITS[cls]
    size = 4 if cls is TinyRestorationPipeline else 8
    image = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(1))

    def edit(conditions, **further):
        return draw(pipe, image, num_images=2, conditions=conditions, **options, **further)

    assert edit({"smiling": 1, "age": [20, 60]}).shape == (4, 8, 8, 1)  # one for each image
    assert not np.allclose(edit(ROW), edit(ROW | {"age": 60}))
    with pytest.raises(ValueError, match="needs `conditions`"):
        edit(None)
    with pytest.raises(ValueError, match="one for each of 2 images, got 3"):
        edit({"smiling": 1, "age": [20, 30, 60]})


def test_an_inversion_is_undone_with_the_same_conditions(make_pipe):
    pipe = make_pipe(TinyImg2ImgPipeline, class_dropout_prob=0.1)
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"inversion": True, "strength": 1.0, "num_inference_steps": 20, "clip_sample": False}
    same = draw(pipe, image, conditions=ROW, source_conditions=ROW, **options)
    other = draw(pipe, image, conditions=ROW, **options)  # inverted without conditions
    original = image.permute(0, 2, 3, 1).numpy()
    assert np.abs(same - original).mean() < np.abs(other - original).mean()
    with pytest.raises(ValueError, match="`source_conditions` are for the inversion"):
        draw(pipe, image, conditions=ROW, source_conditions=ROW)


def test_a_walk_is_linear_in_the_values(make_pipe):
    walk, pipe = make_pipe(TinyInterpolationPipeline), make_pipe()
    options = {"num_inference_steps": 3, "output_type": "np"}
    ends = {"smiling": 1, "age": [20, 60]}
    frames = walk(seeds=(3, 3), num_frames=5, conditions=ends, **options).images
    for frame, age in zip(frames, (20, 30, 40, 50, 60), strict=True):
        expected = draw(pipe, seed=3, conditions={"smiling": 1, "age": age}, eta=0.0)
        np.testing.assert_allclose(frame, expected[0], atol=1e-5)


def test_what_is_missing_is_named_with_the_way_to_do_without(make_pipe):
    with pytest.raises(ValueError, match="needs `conditions`: give smiling, age, or `guidance_scale=0`"):
        draw(make_pipe())
    for family in ("vae", "dcgan"):
        with pytest.raises(ValueError, match=r"needs `conditions`: give smiling, age\.$"):
            draw(make_pipe(family=family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({"smiling": 1, "agee": 3}, "Unknown condition 'agee': the conditions are smiling, age. Did you mean 'age'"),
        ({"smiling": 1}, "lacks age"),
        ({"smiling": 1, "age": float("nan")}, "finite, got nan for 'age'"),
        ({"smiling": [1, 0], "age": [1, 2, 3]}, "has 2 values of 'smiling': give one, or 3"),
        ({"smiling": 1, "age": "x"}, "`conditions`: 'x' is no number for 'age'"),
        ({"smiling": 1, "age": None}, "`conditions`: None is no number for 'age'"),
        ({"smiling": 1, "age": 10**400}, "`conditions`: 1000.*0... is no number for 'age'"),
        ("age=3", "`conditions`: 'age=3' is no number for 'smiling, age'"),
        (torch.zeros(1, 3), r"of shape \(B, 2\), got the shape \(1, 3\)"),
    ],
)
def test_each_mistake_is_one_line(make_pipe, conditions, words, family):
    with pytest.raises(ValueError, match=words) as error:
        draw(make_pipe(family=family), conditions=conditions)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_far_outside_the_range_warn_with_it(make_pipe, family):
    pipe = make_pipe(family=family)
    with pytest.warns(
        UserWarning, match="age 90 is far outside the values of the training images, 20 to 60"
    ) as record:
        draw(pipe, conditions={"smiling": 1, "age": 90})
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, conditions={"smiling": 1, "age": 62})


def test_a_network_without_conditions_refuses_them(make_unet):
    for stock in (False, True):
        pipe = TinyConditionalPipeline(make_unet(stock=stock), TinyDDIMScheduler())
        with pytest.raises(ValueError, match="has no conditions: leave out `conditions`"):
            pipe(conditions=ROW)
        with pytest.raises(ValueError, match="takes no conditions and `condition_statistics` describes 2"):
            TinyConditionalPipeline(make_unet(stock=stock), TinyDDIMScheduler(), condition_statistics=STATISTICS)


@pytest.mark.parametrize("family", OTHERS)
def test_nor_do_other_families_take_conditions_that_their_network_lacks(make_pipe, family):
    pipe = make_pipe(family=family, condition_statistics=None)
    with pytest.raises(ValueError, match="has no conditions: leave out `conditions`"):
        pipe(conditions=ROW)
    with pytest.raises(ValueError, match="takes no conditions and `condition_statistics` describes 2"):
        type(pipe)(pipe._network, condition_statistics=STATISTICS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": ["age", "age"]}, "a name of its own"),
        ({"names": ["age", ""]}, "a name of its own"),
        ({"means": [1.0]}, "lists of one length"),
        ({"means": ["a", 1.0]}, "wrong value in means for 'smiling'"),
        ({"deviations": [1.0, 0.0]}, "wrong value in deviations for 'age'"),
        ({"highs": [1.0, float("inf")]}, "wrong value in highs for 'age'"),
        ({"further": []}, "must be a dict of names.* 'further'"),
    ],
)
def test_damaged_statistics_are_refused(make_pipe, change, words):
    with pytest.raises(ValueError, match=words):
        make_pipe(condition_statistics=STATISTICS | change)


def test_statistics_of_other_numbers_than_the_networks_are_refused(make_pipe):
    for statistics in (None, {name: values[:1] for name, values in STATISTICS.items()}):
        with pytest.raises(ValueError, match="takes 2 conditions and"):
            make_pipe(condition_statistics=statistics)
