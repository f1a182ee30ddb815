"""
Metrics: distances between two sets of features, and scores of one set's features or class probabilities.

Features are arrays (N, D), one row for each image. They may be memory-mapped: the Frechet distance reads them in
chunks. Random subsets are drawn with a seed. Standard errors are those over the images drawn, with the reference held
fixed: models are compared with the same reference. This module knows nothing of images, networks or files.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import UserError


_ROWS = 2048  # rows that are read, or compared with all others, at a time


class Estimate(NamedTuple):
    """
    Value of a metric with its uncertainty.

    Args:
        value (`float`): The value.
        error (`float`, *optional*): Its uncertainty.
        error_kind (`str`, *optional*): The kind of uncertainty: a standard deviation or a standard error, and of what.
    """

    value: float
    error: float | None = None
    error_kind: str | None = None


def _chunks(features: np.ndarray, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yields all rows, or those with the given indices, in chunks of `_ROWS`."""
    for start in range(0, len(features) if rows is None else len(rows), _ROWS):
        chunk = slice(start, start + _ROWS)
        yield features[chunk if rows is None else rows[chunk]]


# Frechet distance


class Moments:
    """
    Mean and covariance of features, accumulated batch by batch in float64 with constant memory.

    Args:
        dim (`int`): D, the number of features.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    @classmethod
    def of(cls, features: np.ndarray, rows: np.ndarray | None = None) -> "Moments":
        """Computes the moments of features (N, D), or of the rows with the given indices, in chunks."""
        moments = cls(features.shape[1])
        for chunk in _chunks(features, rows):
            moments.update(chunk)
        return moments

    def update(self, features: np.ndarray) -> None:
        """Adds a batch (B, D) by the numerically stable pairwise update of Chan, Golub and LeVeque (1979)."""
        features = np.asarray(features, dtype=np.float64)
        count, mean = len(features), features.mean(0)
        centered, shift = features - mean, mean - self.mean
        total = self.count + count
        self._scatter += centered.T @ centered + np.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def without(self, part: "Moments") -> "Moments":
        """Returns the moments of the other rows, where `part` holds those of some of them."""
        rest = Moments(len(self.mean))
        rest.count = self.count - part.count
        rest.mean = (self.count * self.mean - part.count * part.mean) / rest.count
        shift = part.mean - rest.mean
        rest._scatter = self._scatter - part._scatter
        rest._scatter -= np.outer(shift, shift) * (rest.count * part.count / self.count)
        return rest

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (D, D)."""
        if self.count < 2:
            raise _too_few(self.count)
        return self._scatter / (self.count - 1)


class FrechetReference:
    """
    Reference of Frechet distances. Its covariance is factored once; each distance then costs one eigenvalue problem.

    Args:
        reference (`np.ndarray` of shape `(N, D)` or [`Moments`]): The reference's features, or their moments.
    """

    def __init__(self, reference: np.ndarray | Moments):
        moments = reference if isinstance(reference, Moments) else Moments.of(reference)
        covariance = moments.covariance
        values, vectors = np.linalg.eigh(covariance)
        kept = values > values[-1] * len(values) * np.finfo(float).eps  # fewer samples than features leave zeros
        self.mean, self.trace = moments.mean, np.trace(covariance)
        self._root = vectors[:, kept] * np.sqrt(values[kept])  # (D, R), with covariance = root root^T

    def has_rank_above(self, count: int) -> bool:
        """Checks that the rank of the covariance exceeds a number of rows: a distance of them costs less than one of moments."""
        return count < self._root.shape[1]

    def distance(self, features: np.ndarray | Moments, rows: np.ndarray | None = None) -> float:
        """
        Computes |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

        The trace of the root is the sum of the square roots of the eigenvalues of root_b^T S_a root_b, a symmetric
        matrix with as many rows as S_b has rank. No matrix root is needed, and covariances may be singular.

        Args:
            features (`np.ndarray` of shape `(N, D)` or [`Moments`]): The features to compare with the reference.
            rows (`np.ndarray` of integers, *optional*): Indices of the rows to use. Defaults to all.

        Returns:
            `float`: The squared 2-Wasserstein distance between the two Gaussians, 0 or more.
        """
        count = len(features if rows is None else rows) if isinstance(features, np.ndarray) else None
        if count is not None and self.has_rank_above(count):
            mean, root = _centered_root(features if rows is None else features[rows])
            trace, root = np.square(root).sum(), root @ self._root  # (N, R)
            matrix = root @ root.T  # has the same eigenvalues, apart from zeros
        else:
            moments = features if isinstance(features, Moments) else Moments.of(features, rows)
            mean, trace = moments.mean, np.trace(moments.covariance)
            matrix = self._root.T @ moments.covariance @ self._root
        values = np.linalg.eigvalsh(matrix)
        # smaller eigenvalues are rounding errors, whose roots would not be small
        values = values[values > values.max(initial=0) * self._root.shape[1] * np.finfo(float).eps]
        shift = mean - self.mean
        distance = shift @ shift + trace + self.trace - 2 * np.sqrt(values).sum()
        return max(float(distance), 0.0)


def _centered_root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean (D,) of rows (N, D), and a matrix A (N, D) with their unbiased covariance A^T A."""
    if len(features) < 2:
        raise _too_few(len(features))
    mean = features.mean(0, dtype=np.float64)
    return mean, (features - mean) / np.sqrt(len(features) - 1)


def _too_few(count: int) -> UserError:
    return UserError(f"A covariance needs at least two images, and there is {count}.")


def frechet_distance(features: np.ndarray | Moments, reference: np.ndarray | Moments) -> float:
    """
    Computes the Frechet distance between the Gaussians fitted to two sets of features; symmetric. With the features of
    `inception` it is the FID.

    Args:
        features (`np.ndarray` of shape `(N, D)` or [`Moments`]): One set.
        reference (`np.ndarray` of shape `(M, D)` or [`Moments`]): The other.

    Returns:
        `float`: 0 or more.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a set has fewer than two rows.
    """
    return FrechetReference(reference).distance(features)


def frechet_infinity(
    features: np.ndarray,
    reference: np.ndarray | Moments | FrechetReference,
    max_parts: int = 5,
    min_size: int = 2000,
    seed: int = 0,
) -> float:
    """
    Extrapolates the Frechet distance to infinitely many samples (Chong & Forsyth 2020, arXiv 1911.07023).

    The bias of the distance falls as 1 / N to first order. The rows are split at random into k disjoint parts, for
    k = 1, 2, ..., and a line through (k / N, mean distance of the parts) is evaluated at 0. The paper draws one random
    subset of each of 15 sizes instead; here all rows count equally at each size, so the line has less noise. The whole
    reference is used each time: its own share of the bias remains.

    Args:
        features (`np.ndarray` of shape `(N, D)`): The features to compare with the reference, at least four rows.
        reference (`np.ndarray` of shape `(M, D)`, [`Moments`] or [`FrechetReference`]): The reference.
        max_parts (`int`, defaults to 5): The largest number of parts.
        min_size (`int`, defaults to 2000): The least size of a part, where that leaves two parts.
        seed (`int`, defaults to 0): Seed of the parts.

    Returns:
        `float`: The value of the line at 0. It can be negative.
    """
    if not isinstance(reference, FrechetReference):
        reference = FrechetReference(reference)
    count = len(features)
    num_parts = np.arange(1, min(max(count // min_size, 2), max_parts) + 1)
    rng = np.random.default_rng(seed)
    distances = []
    for k in num_parts:
        parts = np.array_split(rng.permutation(count), k)
        distances.append(np.mean([reference.distance(features, np.sort(part)) for part in parts]))
    _, intercept = np.polyfit(num_parts / count, distances, 1)
    return float(intercept)


def frechet_errors(
    features: np.ndarray, reference: FrechetReference, num_groups: int = 20, seed: int = 0
) -> "StandardErrors":
    """
    Computes the standard errors of the Frechet distance and of [`frechet_infinity`] by the [`jackknife`].

    A bootstrap is of no use here unless N is far above D: its resamples have 0.63 N distinct rows, which changes the
    rank of the covariance.

    Args:
        features (`np.ndarray` of shape `(N, D)`): The features that were compared, at least four rows.
        reference ([`FrechetReference`]): The reference.
        num_groups (`int`, defaults to 20): Number of groups that the rows are split into, at least 4.
        seed (`int`, defaults to 0): Seed of the groups.

    Returns:
        [`StandardErrors`]: Those of the distance and of the extrapolated distance.
    """
    rows = np.random.default_rng(seed).permutation(len(features))
    groups = [np.sort(group) for group in np.array_split(rows, min(num_groups, len(rows)))]
    total = None if reference.has_rank_above(len(features)) else Moments.of(features)

    def without(*omitted: int) -> float:
        if total is None:
            kept = [group for number, group in enumerate(groups) if number not in omitted]
            return reference.distance(features, np.sort(np.concatenate(kept)))
        rest = total
        for group in omitted:
            rest = rest.without(Moments.of(features, groups[group]))
        return reference.distance(rest)

    return jackknife(without, len(groups))


# Kernel distance


class KernelReference:
    """
    Reference of kernel distances. The mean of its own kernel, over all pairs of rows, is computed at the first use.

    Args:
        features (`np.ndarray` of shape `(M, D)`): The reference's features.
    """

    def __init__(self, features: np.ndarray):
        self.features = features

    @cached_property
    def mean(self) -> float:
        count = len(self.features)
        return _kernel_sums(self.features)[0].sum() / (count * (count - 1))


def kernel_distance(features: np.ndarray, reference: np.ndarray | KernelReference) -> Estimate:
    """
    Computes the squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, which is unbiased for any number
    of samples (Binkowski et al. 2018, arXiv 1801.01401). With the features of `inception` it is the KID.

    It is the estimate over all pairs of rows. Where others average it over random subsets, the expectation is the
    same, and the spread of such subsets, which overlap and are smaller than the set, is no error of the average.

    Args:
        features (`np.ndarray` of shape `(N, D)`): One set, at least four rows.
        reference (`np.ndarray` of shape `(M, D)` or [`KernelReference`]): The other, at least four rows.

    Returns:
        [`Estimate`]: The value, which can be negative, with its standard error: the jackknife over the rows of
        `features`, corrected as in [`jackknife`] in closed form.
    """
    if not isinstance(reference, KernelReference):
        reference = KernelReference(reference)
    n, m = len(features), len(reference.features)
    if min(n, m) < 4:
        smaller = min(n, m)
        raise UserError(f"A kernel distance needs at least four images in each set: there are {smaller}.")
    within, squares = _kernel_sums(features)
    across, _ = _kernel_sums(features, reference.features)
    value = within.sum() / (n * (n - 1)) - 2 * across.sum() / (n * m) + reference.mean

    # the value without each row in turn
    rest = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (across.sum() - across) / ((n - 1) * m)
    variance = (n - 1) * rest.var()
    # k(x_i, x_j) = mean + a_i + a_j + e_ij, where the variance of e is found from n (n - 3) / 2 degrees of freedom
    mean = within.sum() / (n * (n - 1))
    a = (within - (n - 1) * mean) / (n - 2)
    residual = (squares - n * (n - 1) * mean**2) / 2 - (n - 2) * a @ a
    interaction = 2 / (n * (n - 1)) * residual / (n * (n - 3) / 2)
    error = _standard_errors(variance, interaction).statistic
    return Estimate(float(value), error, "standard error over images, with the reference held fixed: jackknife")


def _kernel_sums(x: np.ndarray, y: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """
    Computes the sum of k(x_i, y_j) over j for each row i, (N,), and the sum of all squares; without `y`, of the pairs
    of different rows of `x`.
    """
    others = np.asarray(x if y is None else y, dtype=np.float64)
    sums, squares, start = np.zeros(len(x)), 0.0, 0
    for chunk in _chunks(x):
        stop = start + len(chunk)
        first = 0 if y is not None else start  # k is symmetric: pairs with earlier rows are known
        values = (chunk.astype(np.float64) @ others[first:].T / x.shape[1] + 1) ** 3
        if y is None:
            np.fill_diagonal(values, 0)
            later = values[:, len(chunk) :]
            sums[stop:] += later.sum(0)
            squares += np.vdot(later, later)
        sums[start:stop] += values.sum(1)
        squares += np.vdot(values, values)
        start = stop
    return sums, float(squares)


# Precision, recall, density, coverage


def precision_recall(reference: np.ndarray, features: np.ndarray, k: int = 3) -> dict[str, Estimate]:
    """
    Computes the share of generated images in the reference's manifold, and the share of the reference in the generated
    manifold (Kynkaanniemi et al. 2019, arXiv 1904.06991). The manifold of a set is the union of balls around its
    points, each with the distance to the k-th nearest neighbor as its radius.

    Args:
        reference (`np.ndarray` of shape `(M, D)`): Features of real images.
        features (`np.ndarray` of shape `(N, D)`): Features of generated images.
        k (`int`, defaults to 3): The neighbor whose distance is a ball's radius.

    Returns:
        `dict[str, Estimate]`: `precision` and `recall`, in [0, 1].
    """
    reference_radii, radii = _squared_radii(reference, k), _squared_radii(features, k)
    inside = []  # is each generated image in the reference's manifold?
    covered = np.zeros(len(reference), dtype=bool)  # is each real image in the generated manifold?
    for start, distances in _squared_distances(features, reference):
        inside.append((distances <= reference_radii).any(1))
        covered |= (distances <= radii[start : start + len(distances), None]).any(0)
    return {"precision": _mean_over_images(np.concatenate(inside)), "recall": _mean_over_images(covered)}


def density_coverage(reference: np.ndarray, features: np.ndarray, k: int = 5, seed: int = 0) -> dict[str, Estimate]:
    """
    Computes density, the number of the reference's balls that contain a generated image over its expectation k, and
    coverage, the share of these balls that contain a generated image (Naeem et al. 2020, arXiv 2002.09797).

    Balls around more points are smaller, and fewer of them contain one of N images: real images would cover 0.97 of as
    many others, and 0.4 of nine times as many. So the larger set is cut to the size of the smaller, at random.

    Args:
        reference, features, k (defaults to 5): As in [`precision_recall`].
        seed (`int`, defaults to 0): Seed of the cut.

    Returns:
        `dict[str, Estimate]`: `density`, 0 or more and 1 for a set like the reference, and `coverage`, in [0, 1].
    """
    size, rng = min(len(reference), len(features)), np.random.default_rng(seed)
    reference, features = (_cut(rows, size, rng) for rows in (reference, features))
    radii = _squared_radii(reference, k)
    balls = []  # number of balls around each generated image
    covered = np.zeros(len(reference), dtype=bool)
    for _, distances in _squared_distances(features, reference):
        inside = distances <= radii
        balls.append(inside.sum(1))
        covered |= inside.any(0)
    return {"density": _mean_over_images(np.concatenate(balls) / k), "coverage": _mean_over_images(covered)}


def _cut(features: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `size` random rows in their order, or all of as many."""
    return features if len(features) == size else features[np.sort(rng.choice(len(features), size, replace=False))]


def _mean_over_images(values: np.ndarray) -> Estimate:
    values = values.astype(np.float64)
    error = values.std() / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(error), "standard error over images, with the manifolds held fixed")


def _squared_distances(features: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields chunks of rows: the index of the first row, and the squared distances to all others, (rows, M)."""
    center = others[:_ROWS].mean(0)  # smaller norms lose fewer digits in the difference below
    others = others - center
    squares = np.einsum("md,md->m", others, others)
    for start in range(0, len(features), _ROWS):
        rows = features[start : start + _ROWS] - center
        distances = np.einsum("nd,nd->n", rows, rows)[:, None] + squares - 2 * (rows @ others.T)
        yield start, np.maximum(distances, 0, out=distances)


def _squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Computes the squared distance of each row to its k-th nearest neighbor among the other rows, (N,)."""
    if len(features) <= k:
        raise UserError(f"{k} nearest neighbors need more than {k} images: there are {len(features)}.")
    radii = []
    for start, distances in _squared_distances(features, features):
        each = np.arange(len(distances))
        distances[each, start + each] = np.inf  # no row is its own neighbor
        radii.append(np.partition(distances, k - 1, axis=1)[:, k - 1])
    return np.concatenate(radii)


# Scores of one set


def inception_score(probabilities: np.ndarray, num_splits: int = 10) -> Estimate:
    """
    Computes exp(E KL(p(y | x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498). It is 1 if p(y | x) is the same for
    every image, and at most the number of classes.

    Args:
        probabilities (`np.ndarray` of shape `(N, K)`): Probabilities of a classifier.
        num_splits (`int`, defaults to 10): Number of parts that the images are split into.

    Returns:
        [`Estimate`]: The mean over the parts, and their standard deviation.
    """
    parts = np.array_split(probabilities, min(num_splits, len(probabilities)))
    scores = [np.exp(_mutual_information(part)) for part in parts]
    if num_splits == 1:
        return Estimate(float(scores[0]))
    return Estimate(float(np.mean(scores)), float(np.std(scores)), f"standard deviation over {len(scores)} parts")


def classifier_score(probabilities: np.ndarray, num_groups: int) -> Estimate:
    """
    Computes the formula of the Inception Score, with any classifier, over all images at once.

    Args:
        probabilities (`np.ndarray` of shape `(N, K)`): Probabilities of the classifier.
        num_groups (`int`): Groups of the jackknife for the standard error; 0 for none.

    Returns:
        [`Estimate`]: The score, from 1 to K.
    """
    score = float(np.exp(_mutual_information(probabilities)))
    num_groups = min(num_groups, len(probabilities))
    if num_groups < 4:
        return Estimate(score)
    groups = np.arange(len(probabilities)) % num_groups
    errors = jackknife(
        lambda *left_out: np.exp(_mutual_information(probabilities[~np.isin(groups, left_out)])), num_groups
    )
    return Estimate(score, errors.statistic, f"standard error over images: jackknife of {num_groups} groups")


def _mutual_information(probabilities: np.ndarray) -> float:
    """Computes E KL(p(y | x) || p(y)) in nats, the information that an image gives of its class."""
    probabilities = probabilities.astype(np.float64)
    marginal = probabilities.mean(0)

    def negentropy(p: np.ndarray) -> np.ndarray:
        return (p * np.log(np.maximum(p, 1e-300))).sum(-1)

    return float(negentropy(probabilities).mean() - negentropy(marginal))


def nearest_neighbors(features: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Finds each row's nearest row in another set: in the training set, it shows whether a model repeats it.

    Args:
        features (`np.ndarray` of shape `(N, D)`): Features of generated images.
        references (`np.ndarray` of shape `(M, D)`): Features of the training images.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The Euclidean distances and the indices of the nearest rows, (N,) each.
    """
    nearest = np.zeros(len(features), dtype=np.int64)
    least = np.full(len(features), np.inf)
    for first in range(0, len(references), 8 * _ROWS):  # rows of the training set in memory at a time
        for start, distances in _squared_distances(features, references[first : first + 8 * _ROWS]):
            rows = slice(start, start + len(distances))
            column = distances.argmin(1)
            value = distances[np.arange(len(distances)), column]
            closer = value < least[rows]
            nearest[rows][closer], least[rows][closer] = first + column[closer], value[closer]
    # Recompute the distances without the rounding errors above, so that the distance of a copy is 0.
    exact = [
        np.linalg.norm(features[i : i + _ROWS].astype(np.float64) - references[nearest[i : i + _ROWS]], axis=1)
        for i in range(0, len(features), _ROWS)
    ]
    return np.concatenate(exact), nearest


def spread(features: np.ndarray) -> float:
    """Computes the RMS distance of features (N, D) from their mean, the root of the covariance's trace."""
    mean = sum(chunk.sum(0, dtype=np.float64) for chunk in _chunks(features)) / len(features)
    return float(np.sqrt(sum(np.square(chunk - mean).sum() for chunk in _chunks(features)) / (len(features) - 1)))


def spread_within_classes(features: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """Computes the [`spread`] of each class that has at least two rows; features are (N, D) and labels (N,)."""
    classes, counts = np.unique(labels, return_counts=True)
    return {int(label): spread(features[labels == label]) for label in classes[counts > 1]}


def class_probe(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """
    Fits a classifier of the data's own classes to features: linear discriminant analysis with Ledoit-Wolf shrinkage of
    the covariance. It has a closed form and no hyperparameters.

    Args:
        features (`np.ndarray` of shape `(N, D)`): Features of real images.
        labels (`np.ndarray` of shape `(N,)`): Their classes.

    Returns:
        `Callable`: features (B, D) -> classes (B,).
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels).predict


# Error bars


class StandardErrors(NamedTuple):
    """
    Standard errors of a statistic.

    Args:
        statistic (`float`): Of the statistic itself.
        extrapolated (`float`): Of the statistic extrapolated to infinitely many rows along 1 / N.
    """

    statistic: float
    extrapolated: float


def jackknife(statistic: Callable[..., float], num_groups: int) -> StandardErrors:
    """
    Computes the standard errors of a statistic of N rows from its values without one group of rows, and without two.

    The variance of a statistic is the sum of V_1, what each row adds on its own, of V_2, what pairs add, and so on.
    The jackknife's is V_1 + 2 V_2 to second order: too large near the null, and where N is near the number of
    dimensions. V_2 is found from pairs of groups and taken away (Efron & Stein 1981, "The jackknife estimate of
    variance"). The extrapolation along 1 / N, which lets each pair of rows count twice, does have V_1 + 2 V_2.

    Args:
        statistic (`Callable`): Indices of the groups to leave out (none, one or two) -> value.
        num_groups (`int`): Number G of disjoint groups of equal sizes, at least 4. The relative uncertainty of the
            errors is about 1 / sqrt(2 G).

    Returns:
        [`StandardErrors`]: The standard errors.
    """
    G = num_groups
    value = statistic()
    singles = np.array([statistic(i) for i in range(G)])
    pairs = np.array([statistic(i, (i + 1) % G) for i in range(G)])
    variance = (G - 1) * singles.var()
    interactions = G * value - (G - 1) * (singles + np.roll(singles, -1)) + (G - 2) * pairs
    return _standard_errors(variance, interactions.var(ddof=1) / 2)


def _standard_errors(variance: float, interaction: float) -> StandardErrors:
    """Returns the standard errors from the jackknife's variance V_1 + 2 V_2, and an estimate of V_2."""
    return StandardErrors(float(np.sqrt(variance - np.clip(interaction, 0, variance / 2))), float(np.sqrt(variance)))
