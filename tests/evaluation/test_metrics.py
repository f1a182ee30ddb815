import math

import numpy as np
import pytest
import scipy.linalg

from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import metrics
from tiny_diffusers.evaluation.metrics import Moments


def normal(count, dim, seed=0, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, (count, dim))


def correlated(count, dim, seed=0):
    mixing = np.random.default_rng(seed + 100).normal(size=(dim, dim)) / np.sqrt(dim)
    return normal(count, dim, seed) @ mixing + 0.1 * seed


class TestMoments:
    def test_batches_add_up_to_the_moments_of_all(self):
        features = normal(1000, 5, shift=1e4)  # a mean far from 0 costs a naive sum of squares its digits
        moments = Moments(5)
        for part in np.array_split(features, [1, 7, 300]):
            moments.update(part)
        np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-9)

    def test_rows_may_repeat(self):
        features = normal(50, 3)
        rows = np.array([3, 3, 7, 49])
        np.testing.assert_allclose(Moments.of(features, rows).covariance, np.cov(features[rows].T))

    def test_without_some_rows_are_those_of_the_others(self):
        features = normal(50, 3, shift=10.0)
        rest = Moments.of(features).without(Moments.of(features[:20]))
        np.testing.assert_allclose(rest.mean, features[20:].mean(0))
        np.testing.assert_allclose(rest.covariance, np.cov(features[20:].T))

    def test_one_image_has_no_covariance(self):
        with pytest.raises(UserError, match="two images"):
            _ = Moments.of(normal(1, 3)).covariance


class TestFrechetDistance:
    def test_agrees_with_the_square_root_of_the_product_of_covariances(self):
        a, b = correlated(400, 20, seed=1), correlated(300, 20, seed=2)
        s_a, s_b = np.cov(a.T), np.cov(b.T)
        shift = a.mean(0) - b.mean(0)
        expected = shift @ shift + np.trace(s_a + s_b - 2 * scipy.linalg.sqrtm(s_a @ s_b).real)
        assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)

    def test_has_a_closed_form_for_diagonal_covariances(self):
        moments = []
        rng = np.random.default_rng(0)
        means, variances = rng.normal(size=(2, 12)), rng.uniform(0.1, 4, size=(2, 12))
        for mean, variance in zip(means, variances, strict=True):
            part = Moments(12)
            signs = scipy.linalg.hadamard(16)[:, 1:13]  # rows of orthogonal columns: an exactly diagonal covariance
            part.update(mean + signs * np.sqrt(variance * 15 / 16))
            moments.append(part)
        expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
        assert metrics.frechet_distance(*moments) == pytest.approx(expected, rel=1e-6)

    def test_fewer_samples_than_dimensions_are_no_special_case(self):
        a, b = correlated(30, 64, seed=1), correlated(40, 64, seed=2)
        # the trace of the root is the nuclear norm of the product of the centered features, without any root
        x, y = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (a, b))
        shift = a.mean(0) - b.mean(0)
        root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
        expected = shift @ shift + (x**2).sum() + (y**2).sum() - 2 * root
        assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)

    def test_few_rows_and_their_moments_have_one_distance_and_one_error(self, monkeypatch):
        few, reference = correlated(24, 32, seed=1), metrics.FrechetReference(correlated(100, 32, seed=2))
        rows = np.arange(0, 24, 2)
        assert reference.has_rank_above(len(few))
        assert reference.distance(few) == pytest.approx(reference.distance(Moments.of(few)), rel=1e-9)
        assert reference.distance(few, rows) == pytest.approx(reference.distance(Moments.of(few, rows)), rel=1e-9)
        errors = metrics.frechet_errors(few, reference, num_groups=6)
        monkeypatch.setattr(metrics.FrechetReference, "has_rank_above", lambda self, count: False)
        assert errors == pytest.approx(metrics.frechet_errors(few, reference, num_groups=6), rel=1e-6)

    def test_one_image_has_no_distance(self):
        with pytest.raises(UserError, match="at least two images, and there is 1"):
            metrics.frechet_distance(normal(1, 3), normal(20, 3))

    def test_is_symmetric_zero_to_itself_and_independent_of_order(self):
        a, b = correlated(100, 40, seed=1), correlated(30, 40, seed=2)
        distance = metrics.frechet_distance(a, b)
        assert metrics.frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
        assert metrics.frechet_distance(a[::-1], b) == pytest.approx(distance, rel=1e-9)
        assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)

    def test_to_a_set_without_spread_is_the_trace_of_the_other_covariance(self):
        b = normal(50, 6)
        same = np.tile(b.mean(0), (10, 1))
        assert metrics.frechet_distance(same, b) == pytest.approx(np.trace(np.cov(b.T)))


class TestFrechetInfinity:
    def test_finds_the_true_distance_that_samples_overestimate(self):
        dim, true = 32, 32 * 0.1**2
        reference = Moments(dim)
        basis = np.eye(dim) * np.sqrt(dim)
        exact = np.concatenate([basis, -basis])  # mean 0 and, up to a factor, covariance I: no sampling error
        reference.update(exact * np.sqrt((2 * dim - 1) / (2 * dim)))
        features = normal(3000, dim, seed=3, shift=0.1)
        plain = metrics.frechet_distance(features, reference)
        extrapolated = metrics.frechet_infinity(features, reference, min_size=300)
        assert plain > true
        assert abs(extrapolated - true) < abs(plain - true)
        assert extrapolated == pytest.approx(true, abs=0.05)


class TestKernelDistance:
    def test_agrees_with_a_direct_double_sum(self):
        x, y = correlated(12, 7, seed=1), correlated(12, 7, seed=2)

        def k(a, b):
            return (sum(p * q for p, q in zip(a, b, strict=True)) / 7 + 1) ** 3

        pairs = [(i, j) for i in range(12) for j in range(12)]
        expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (12 * 11)
        expected -= 2 * sum(k(x[i], y[j]) for i, j in pairs) / 144
        estimate = metrics.kernel_distance(x, y)
        assert estimate.value == pytest.approx(expected, rel=1e-10)
        assert metrics.kernel_distance(y, x).value == pytest.approx(expected, rel=1e-10)

    def test_is_unbiased_at_any_size(self):
        values = [
            metrics.kernel_distance(normal(20, 4, seed=s), normal(20, 4, seed=s + 1000)).value for s in range(300)
        ]
        assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(300)

    def test_reads_the_rows_in_chunks(self, monkeypatch):
        x, y = correlated(30, 7, seed=1), correlated(20, 7, seed=2)
        whole = metrics.kernel_distance(x, y)
        monkeypatch.setattr(metrics, "_ROWS", 7)
        chunked = metrics.kernel_distance(x, y)
        assert chunked[:2] == pytest.approx(whole[:2])

    def test_the_mean_of_a_reference_is_computed_once(self, monkeypatch):
        x, y = correlated(12, 7, seed=1), correlated(20, 7, seed=2)
        reference, whole = metrics.KernelReference(y), metrics.kernel_distance(x, y)
        counts, sums = [], metrics._kernel_sums
        monkeypatch.setattr(metrics, "_kernel_sums", lambda a, b=None: counts.append(len(a)) or sums(a, b))
        assert metrics.kernel_distance(x, reference) == metrics.kernel_distance(x, reference) == whole
        assert counts == [12, 12, 20, 12, 12]  # the rows of x and of the reference

    def test_needs_four_images(self):
        with pytest.raises(UserError, match="four images in each set: there are 3"):
            metrics.kernel_distance(normal(3, 4), normal(9, 4))


class TestStandardErrors:
    """Errors are those of repeated sampling: draws from a known Gaussian are measured against one reference."""

    DIM, DRAWS = 8, 200

    @pytest.mark.parametrize("scale", [0.8, 1.0], ids=["another distribution", "the same distribution"])
    @pytest.mark.parametrize("count", [12, 160], ids=["N near D", "N far above D"])
    def test_agree_with_the_standard_deviation_over_draws(self, count, scale):
        reference = normal(100, self.DIM)
        frechet = metrics.FrechetReference(reference)
        values, errors = [], []
        for seed in range(self.DRAWS):
            features = normal(count, self.DIM, seed + 1, scale, shift=2 * (1 - scale))
            kernel = metrics.kernel_distance(features, reference)
            extrapolated = metrics.frechet_infinity(features, frechet, min_size=max(count // 5, self.DIM))
            values.append((frechet.distance(features), extrapolated, kernel.value))
            if seed < self.DRAWS // 5:  # their mean needs fewer draws than the standard deviation
                errors.append((*metrics.frechet_errors(features, frechet), kernel.error))
        np.testing.assert_allclose(np.mean(errors, 0), np.std(values, 0, ddof=1), rtol=0.25)

    def test_of_a_mean_is_that_of_the_textbook(self):
        values = normal(400, 1)[:, 0]
        groups = np.arange(400) % 100
        errors = metrics.jackknife(lambda *omitted: values[~np.isin(groups, omitted)].mean(), 100)
        assert errors == pytest.approx([values.std() / 20] * 2, rel=0.15)


def brute_force(reference, features, k):
    """Computes precision, recall, density and coverage as the papers define them, one pair at a time."""

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    r_real, r_fake = ([radius(p, i) for i in range(len(p))] for p in (reference, features))
    d = [[np.linalg.norm(g - r) for r in reference] for g in features]
    n, m = len(features), len(reference)
    return {
        "precision": np.mean([any(d[i][j] <= r_real[j] for j in range(m)) for i in range(n)]),
        "recall": np.mean([any(d[i][j] <= r_fake[i] for i in range(n)) for j in range(m)]),
        "density": sum(d[i][j] <= r_real[j] for i in range(n) for j in range(m)) / (k * n),
        "coverage": np.mean([any(d[i][j] <= r_real[j] for i in range(n)) for j in range(m)]),
    }


class TestManifolds:
    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_agree_with_a_brute_force_version(self, k, monkeypatch):
        monkeypatch.setattr(metrics, "_ROWS", 7)  # several chunks, the last one incomplete
        reference, features = normal(33, 3), normal(25, 3, seed=1, scale=0.7, shift=0.3)
        measured = metrics.precision_recall(reference, features, k)
        equal_sizes = metrics.density_coverage(reference[:25], features, k)
        expected = brute_force(reference, features, k)
        expected |= {name: brute_force(reference[:25], features, k)[name] for name in equal_sizes}
        measured |= equal_sizes
        assert {name: estimate.value for name, estimate in measured.items()} == pytest.approx(expected)

    def test_coverage_of_real_images_does_not_depend_on_their_number(self):
        few = normal(1000, 8)
        values = [metrics.density_coverage(normal(m, 8, seed=m), few) for m in (1000, 9000)]
        values += [metrics.density_coverage(few, normal(9000, 8, seed=1))]
        coverages = [measured["coverage"].value for measured in values]
        assert coverages == pytest.approx([1 - 0.5**5] * 3, abs=0.015)  # the chance that the 5 nearest of all are real
        assert [measured["density"].value for measured in values] == pytest.approx([1] * 3, abs=0.08)

    def test_precision_and_recall_swap_with_the_sets(self):
        a, b = normal(60, 3), normal(50, 3, seed=1, scale=0.5)
        one, two = metrics.precision_recall(a, b), metrics.precision_recall(b, a)
        assert (one["precision"].value, one["recall"].value) == (two["recall"].value, two["precision"].value)

    def test_a_set_covers_itself_and_no_distant_set(self):
        a = normal(60, 3)
        assert metrics.precision_recall(a, a)["precision"].value == 1
        far = metrics.density_coverage(a, a + 100)
        assert (far["density"].value, far["coverage"].value) == (0, 0)

    def test_too_few_images_are_refused(self):
        with pytest.raises(UserError, match="nearest neighbors"):
            metrics.precision_recall(normal(3, 2), normal(9, 2))


class TestInceptionScore:
    def test_of_a_classifier_that_knows_nothing_is_1(self):
        assert metrics.inception_score(np.full((100, 7), 1 / 7)).value == pytest.approx(1)

    def test_of_one_that_knows_all_is_the_number_of_classes(self):
        assert metrics.inception_score(np.eye(7)[np.arange(70) % 7], num_splits=1).value == pytest.approx(7)


class TestNearestNeighbors:
    def test_agree_with_a_direct_search_and_a_copy_is_at_0(self, monkeypatch):
        monkeypatch.setattr(metrics, "_ROWS", 4)
        training = normal(75, 5).astype(np.float32) + 100
        features = normal(11, 5, seed=1).astype(np.float32) + 100
        features[3] = training[70]
        distances, nearest = metrics.nearest_neighbors(features, training)
        direct = np.linalg.norm(features[:, None].astype(float) - training[None], axis=2)
        np.testing.assert_array_equal(nearest, direct.argmin(1))
        np.testing.assert_allclose(distances, direct.min(1), rtol=1e-6)
        assert distances[3] == 0 and nearest[3] == 70


class TestClasses:
    def test_spread_is_the_root_of_the_covariances_trace(self):
        features, labels = correlated(40, 6), np.arange(40) % 2
        spreads = metrics.spread_within_classes(features, labels)
        assert spreads[1] == pytest.approx(math.sqrt(np.trace(np.cov(features[1::2].T))))

    def test_the_probe_tells_distant_classes_apart(self):
        labels = np.arange(90) % 3
        features = normal(90, 8) + 10 * np.eye(8)[labels]
        probe = metrics.class_probe(features, labels)
        assert (probe(normal(90, 8, seed=1) + 10 * np.eye(8)[labels]) == labels).all()
