"""
What is measured: distances between two sets of features, and what one set's features or class probabilities tell.

Features are arrays (N, D), one row an image; they may be memory-mapped, and the Frechet distance reads them in chunks.
Where a metric draws rows at random it draws them with a seed. Nothing here knows images, networks or files.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..errors import UserError


_ROWS = 2048  # read, or measured against all others, at a time


class Estimate(NamedTuple):
    """
    A figure with its uncertainty.

    Args:
        value (`float`): The figure.
        error (`float`, *optional*): How uncertain it is.
        error_kind (`str`, *optional*): What `error` is: a standard deviation or a standard error, and of what.
    """

    value: float
    error: float | None = None
    error_kind: str | None = None


def _chunks(features: np.ndarray, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """All rows, or those with the numbers given, so many at a time in memory."""
    for start in range(0, len(features) if rows is None else len(rows), _ROWS):
        some = slice(start, start + _ROWS)
        yield features[some if rows is None else rows[some]]


# Frechet distance


class Moments:
    """
    Mean and covariance of features, gathered batch by batch in float64: memory does not grow with their number.

    Args:
        dim (`int`): D, the features' dimensions.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    @classmethod
    def of(cls, features: np.ndarray, rows: np.ndarray | None = None) -> "Moments":
        """The moments of features (N, D), or of the rows with these numbers, read in chunks."""
        moments = cls(features.shape[1])
        for chunk in _chunks(features, rows):
            moments.update(chunk)
        return moments

    def update(self, features: np.ndarray) -> None:
        """Adds a batch (B, D) by the pairwise update of Chan, Golub and LeVeque (1979), which loses no digits."""
        features = np.asarray(features, dtype=np.float64)
        count, mean = len(features), features.mean(0)
        centred, shift = features - mean, mean - self.mean
        total = self.count + count
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (D, D)."""
        if self.count < 2:
            raise UserError(f"A covariance needs at least two images, and there is {self.count}.")
        return self._scatter / (self.count - 1)


class FrechetReference:
    """
    One side of a Frechet distance, factored once, so that each set measured against it costs one eigenvalue problem.

    Args:
        reference (`np.ndarray` of shape `(N, D)` or [`Moments`]): The reference's features, or their moments.
    """

    def __init__(self, reference: np.ndarray | Moments):
        moments = reference if isinstance(reference, Moments) else Moments.of(reference)
        covariance = moments.covariance
        values, vectors = np.linalg.eigh(covariance)
        kept = values > values[-1] * len(values) * np.finfo(float).eps  # fewer samples than dimensions leave zeros
        self.mean, self.trace = moments.mean, np.trace(covariance)
        self._root = vectors[:, kept] * np.sqrt(values[kept])  # (D, R), with covariance = root root^T

    def distance(self, features: np.ndarray | Moments, rows: np.ndarray | None = None) -> float:
        """
        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, equation 6).

        The trace of the root is the sum of the square roots of the eigenvalues of root_b^T S_a root_b, which is
        symmetric and as small as the rank of S_b: no root of a matrix is taken, and singular covariances are no
        special case.

        Args:
            features (`np.ndarray` of shape `(N, D)` or [`Moments`]): What is measured.
            rows (`np.ndarray` of integers, *optional*): The rows of it to measure. Defaults to all.

        Returns:
            `float`: The distance, 0 or more; a squared 2-Wasserstein distance between two Gaussians.
        """
        moments = features if isinstance(features, Moments) else Moments.of(features, rows)
        covariance = moments.covariance
        values = np.linalg.eigvalsh(self._root.T @ covariance @ self._root)
        # below this an eigenvalue is rounding error, whose root would not be small
        values = values[values > values.max(initial=0) * len(values) * np.finfo(float).eps]
        shift = moments.mean - self.mean
        distance = shift @ shift + np.trace(covariance) + self.trace - 2 * np.sqrt(values).sum()
        return max(float(distance), 0.0)


def frechet_distance(features: np.ndarray | Moments, reference: np.ndarray | Moments) -> float:
    """
    The Frechet distance between the Gaussians fitted to two sets of features; symmetric. With the features of
    `inception` it is the FID.

    Args:
        features (`np.ndarray` of shape `(N, D)` or [`Moments`]): One set.
        reference (`np.ndarray` of shape `(M, D)` or [`Moments`]): The other.

    Returns:
        `float`: 0 or more.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: where a set has less than two rows.
    """
    return FrechetReference(reference).distance(features)


def frechet_infinity(
    features: np.ndarray,
    reference: np.ndarray | Moments | FrechetReference,
    num_points: int = 15,
    min_size: int | None = None,
    seed: int = 0,
) -> Estimate:
    """
    The Frechet distance extrapolated to infinitely many samples (Chong & Forsyth 2020, arXiv 1911.07023).

    The distance's bias falls as 1 / N to first order: it is measured at `num_points` random subsets of even sizes, and the
    line through (1 / N, distance) read at 0. The reference is kept whole, so its own share of the bias stays.

    Args:
        features (`np.ndarray` of shape `(N, D)`):
            What is measured.
        reference (`np.ndarray` of shape `(M, D)`, [`Moments`] or [`FrechetReference`]):
            What it is measured against.
        num_points (`int`, defaults to 15):
            Subsets on the line, as in the paper.
        min_size (`int`, *optional*):
            The smallest subset. Defaults to N / 10 and at least 2,000, or to N / 2 where that is more than there is.
        seed (`int`, defaults to 0):
            Draws the subsets.

    Returns:
        [`Estimate`]: The line's value at 0 with its standard error. It can be negative.
    """
    if not isinstance(reference, FrechetReference):
        reference = FrechetReference(reference)
    count = len(features)
    if min_size is None:
        min_size = max(count // 10, min(2000, count // 2))
    sizes = np.linspace(min_size, count, num_points).round().astype(int)
    rng = np.random.default_rng(seed)
    distances = [reference.distance(features, np.sort(rng.choice(count, size, replace=False))) for size in sizes]

    line = np.stack([np.ones(num_points), 1 / sizes], axis=1)  # (points, 2)
    coefficients, *_ = np.linalg.lstsq(line, np.array(distances), rcond=None)
    residual = np.array(distances) - line @ coefficients
    variance = (residual @ residual) / max(num_points - 2, 1)
    error = float(np.sqrt(variance * np.linalg.inv(line.T @ line)[0, 0]))
    return Estimate(float(coefficients[0]), error, f"standard error of the line through {num_points} sizes")


# Kernel distance


def kernel_distance(
    features: np.ndarray,
    reference: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """
    The squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, unbiased at any number of samples (Binkowski et
    al. 2018, arXiv 1801.01401). With the features of `inception` it is the KID.

    Args:
        features (`np.ndarray` of shape `(N, D)`):
            One set.
        reference (`np.ndarray` of shape `(M, D)`):
            The other.
        num_subsets (`int`, defaults to 100):
            Subsets drawn of each; 1 with `subset_size` at the sets' size uses all of both.
        subset_size (`int`, defaults to 1000):
            Rows of a subset. At most half of the smaller set where more subsets than one are drawn, as they would be
            nearly the same otherwise.
        seed (`int`, defaults to 0):
            Draws the subsets.

    Returns:
        [`Estimate`]: The mean over the subsets, which can be negative, with their standard deviation.
    """
    smaller = min(len(features), len(reference))
    size = min(subset_size, smaller if num_subsets == 1 else smaller // 2)
    if size < 2:
        raise UserError(f"A kernel distance needs at least four images of each kind, and there are {smaller}.")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        x, y = (_subset(rows, size, rng) for rows in (features, reference))
        values.append(_squared_discrepancy(x, y))
    return Estimate(
        float(np.mean(values)),
        float(np.std(values)) if num_subsets > 1 else None,
        f"standard deviation over {num_subsets} subsets of {size:,}" if num_subsets > 1 else None,
    )


def _subset(features: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    return features[np.sort(rng.choice(len(features), size, replace=False))].astype(np.float64)


def _squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate from two sets of one size: no row is compared with itself."""
    size, dim = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / dim + 1) ** 3

    within = sum(values.sum() - np.trace(values) for values in (kernel(x, x), kernel(y, y)))
    return within / (size * (size - 1)) - 2 * kernel(x, y).mean()


# Precision, recall, density, coverage


def precision_recall(reference: np.ndarray, features: np.ndarray, k: int = 3) -> dict[str, Estimate]:
    """
    The share of generated images within the reference's manifold, and of the reference within the generated one's
    (Kynkaanniemi et al. 2019, arXiv 1904.06991). A manifold is the union of the balls around its points that reach to
    their k-th nearest neighbours.

    Args:
        reference (`np.ndarray` of shape `(M, D)`): Features of real images.
        features (`np.ndarray` of shape `(N, D)`): Features of generated images.
        k (`int`, defaults to 3): The neighbour that gives a ball its radius.

    Returns:
        `dict[str, Estimate]`: `precision` and `recall`, in [0, 1].
    """
    reference_radii, radii = _squared_radii(reference, k), _squared_radii(features, k)
    inside = []  # whether each generated image lies in the reference's manifold
    covered = np.zeros(len(reference), dtype=bool)  # whether each real one lies in the generated manifold
    for start, distances in _squared_distances(features, reference):
        inside.append((distances <= reference_radii).any(1))
        covered |= (distances <= radii[start : start + len(distances), None]).any(0)
    return {"precision": _mean(np.concatenate(inside)), "recall": _mean(covered)}


def density_coverage(reference: np.ndarray, features: np.ndarray, k: int = 5) -> dict[str, Estimate]:
    """
    How many of the reference's balls a generated image lies in, in units of what is expected, and the share of these
    balls that have a generated image (Naeem et al. 2020, arXiv 2002.09797).

    Args:
        reference (`np.ndarray` of shape `(M, D)`): Features of real images.
        features (`np.ndarray` of shape `(N, D)`): Features of generated images.
        k (`int`, defaults to 5): The neighbour that gives a ball its radius.

    Returns:
        `dict[str, Estimate]`: `density`, 0 or more, 1 for a set like the reference; and `coverage`, in [0, 1].
    """
    radii = _squared_radii(reference, k)
    balls = []  # for each generated image, the balls it lies in
    covered = np.zeros(len(reference), dtype=bool)
    for _, distances in _squared_distances(features, reference):
        inside = distances <= radii
        balls.append(inside.sum(1))
        covered |= inside.any(0)
    return {"density": _mean(np.concatenate(balls) / k), "coverage": _mean(covered)}


def _mean(values: np.ndarray) -> Estimate:
    values = values.astype(np.float64)
    error = values.std() / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(error), "standard error over images, with the manifolds held fixed")


def _squared_distances(features: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Chunks of rows against all others: the number of the first row, and (rows, M) squared distances."""
    centre = others[:_ROWS].mean(0)  # small norms lose fewer digits in the difference below
    others = others - centre
    squares = np.einsum("md,md->m", others, others)
    for start in range(0, len(features), _ROWS):
        rows = features[start : start + _ROWS] - centre
        distances = np.einsum("nd,nd->n", rows, rows)[:, None] + squares - 2 * (rows @ others.T)
        yield start, np.maximum(distances, 0, out=distances)


def _squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """(N,): the squared distance of each row to its k-th nearest neighbour among the others."""
    if len(features) <= k:
        raise UserError(
            f"The {k} nearest neighbours of an image need more than {k} images: there are {len(features)}."
        )
    radii = []
    for start, distances in _squared_distances(features, features):
        each = np.arange(len(distances))
        distances[each, start + each] = np.inf  # not a neighbour of itself
        radii.append(np.partition(distances, k - 1, axis=1)[:, k - 1])
    return np.concatenate(radii)


# One set


def inception_score(probabilities: np.ndarray, num_splits: int = 10) -> Estimate:
    """
    exp(E KL(p(y | x) || p(y))): between 1, for a classifier that is always of one mind or of none, and the number of classes
    (Salimans et al. 2016, arXiv 1606.03498).

    Args:
        probabilities (`np.ndarray` of shape `(N, K)`): A classifier's probabilities.
        num_splits (`int`, defaults to 10): Parts that it is measured on.

    Returns:
        [`Estimate`]: The mean over the parts, with their standard deviation.
    """
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), min(num_splits, len(probabilities))):
        marginal = part.mean(0)
        terms = part * (np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(marginal, 1e-300)))
        scores.append(np.exp(terms.sum(1).mean()))
    if num_splits == 1:
        return Estimate(float(scores[0]))
    return Estimate(float(np.mean(scores)), float(np.std(scores)), f"standard deviation over {len(scores)} parts")


def nearest_neighbours(features: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Each row's nearest row of another set: of the training set, to see whether a model repeats it.

    Args:
        features (`np.ndarray` of shape `(N, D)`): Features of generated images.
        references (`np.ndarray` of shape `(M, D)`): Features of the training images.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The Euclidean distances, and the numbers of the nearest rows, (N,) each.
    """
    nearest = np.zeros(len(features), dtype=np.int64)
    least = np.full(len(features), np.inf)
    for first in range(0, len(references), 8 * _ROWS):  # so much of the training set at a time in memory
        for start, distances in _squared_distances(features, references[first : first + 8 * _ROWS]):
            rows = slice(start, start + len(distances))
            column = distances.argmin(1)
            value = distances[np.arange(len(distances)), column]
            closer = value < least[rows]
            nearest[rows][closer], least[rows][closer] = first + column[closer], value[closer]
    exact = [
        np.linalg.norm(features[i : i + _ROWS].astype(np.float64) - references[nearest[i : i + _ROWS]], axis=1)
        for i in range(0, len(features), _ROWS)
    ]  # a copy's distance is 0, not what rounding makes of it
    return np.concatenate(exact), nearest


def spread(features: np.ndarray) -> float:
    """The root mean square distance of features (N, D) from their mean: the root of their covariance's trace."""
    mean = sum(chunk.sum(0, dtype=np.float64) for chunk in _chunks(features)) / len(features)
    return float(np.sqrt(sum(np.square(chunk - mean).sum() for chunk in _chunks(features)) / (len(features) - 1)))


def spread_within_classes(features: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """
    The diversity of each class: [`spread`] of its images.

    Args:
        features (`np.ndarray` of shape `(N, D)`): Features.
        labels (`np.ndarray` of shape `(N,)`): The class of each row.

    Returns:
        `dict[int, float]`: class -> spread, of classes with two images or more.
    """
    classes, counts = np.unique(labels, return_counts=True)
    return {int(label): spread(features[labels == label]) for label in classes[counts > 1]}


def class_probe(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """
    A classifier of the data's own classes on top of the features: linear discriminant analysis with the covariance shrunk by
    Ledoit and Wolf's formula. It has a closed form and nothing to tune.

    Args:
        features (`np.ndarray` of shape `(N, D)`): Features of real images.
        labels (`np.ndarray` of shape `(N,)`): Their classes.

    Returns:
        `Callable`: features (B, D) -> classes (B,).
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels).predict


# Error bars


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, num_resamples: int = 20, seed: int = 0) -> float:
    """
    The standard error of a statistic: its standard deviation over resamples of the rows with replacement (Efron 1979).

    Only their spread is used. A resample has fewer distinct rows, so the mean of a Frechet distance over resamples is
    further from the truth than the distance itself.

    Args:
        statistic (`Callable`): The numbers of rows (N,), some of them repeated -> a number.
        count (`int`): N, the rows there are.
        num_resamples (`int`, defaults to 20): At least 2; the error is known to a share of about 1 / sqrt(2 resamples).
        seed (`int`, defaults to 0): Draws the resamples.

    Returns:
        `float`: The standard error.
    """
    rng = np.random.default_rng(seed)
    return float(np.std([statistic(np.sort(rng.integers(0, count, count))) for _ in range(num_resamples)], ddof=1))
