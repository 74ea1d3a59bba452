"""How far an image's features lie from those of images that are known, and from where on that is called unfamiliar.

Shapes: N known images, M new ones, D embedding width. Everything is float64. One Gaussian is fitted to all known images: findings occur
together, so that there are no classes to give a mean each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cholesky, solve_triangular

Array = NDArray[np.float64]
FOLDS = 10
FEWEST = 20
"""Images, below which nothing is fitted: a limit that one of them in twenty passes tells little."""


@dataclass(frozen=True)
class Gaussian:
    """Where the known images lie.

    Args:
        mean: (D,).
        covariance: (D, D), positive definite.
    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a covariance that is not positive definite.
    """

    mean: Array
    covariance: Array

    def __post_init__(self) -> None:
        width = len(self.mean)
        if self.mean.shape != (width,) or self.covariance.shape != (width, width):
            raise ValueError(f"mean of shape {self.mean.shape} and covariance of {self.covariance.shape}, expected (D,) and (D, D)")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("mean and covariance must be finite")
        try:
            self._root  # noqa: B018 (looked at so that it fails here)
        except np.linalg.LinAlgError:
            raise ValueError("the covariance is not positive definite") from None

    @cached_property
    def _root(self) -> Array:
        """Lower triangular L with L L^T the covariance."""
        return np.asarray(cholesky(self.covariance, lower=True))

    @classmethod
    def fit(cls, features: ArrayLike) -> Gaussian:
        """Mean and shrunk covariance (:func:`shrunk_covariance`) of (N, D) directions."""
        unit = directions(features)
        return cls(unit.mean(axis=0), shrunk_covariance(unit)[0])

    def distances(self, features: ArrayLike) -> Array:
        """(M,) Mahalanobis distances sqrt((u - mean)^T covariance^-1 (u - mean)), u the directions of (M, D) features.

        Source: "A Simple Unified Framework for Detecting Out-of-Distribution Samples", arXiv:1807.03888, eq. 2, here with one mean for all
        classes, of the last layer alone, and of directions rather than of features.
        """
        apart = directions(features) - self.mean
        return np.asarray(np.linalg.norm(solve_triangular(self._root, apart.T, lower=True), axis=0))


@dataclass(frozen=True)
class Limit:
    """The distance beyond which an image is called unfamiliar: ``inside`` of the ``count`` known images lie at or below it."""

    distance: float
    inside: int
    count: int

    @property
    def rate(self) -> float:
        """The largest share of exchangeable new images that is to be expected beyond it, 1 - inside / (count + 1)."""
        return 1 - self.inside / (self.count + 1)


def directions(features: ArrayLike) -> Array:
    """(M, D) features divided by their lengths: lengths are not in the scores either; a vector of 0 stays.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    given = np.asarray(features, dtype=np.float64)
    if given.ndim != 2 or not np.isfinite(given).all():
        raise ValueError(f"features of shape {given.shape} must be (M, D) and finite")
    return given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def shrunk_covariance(values: ArrayLike) -> tuple[Array, float]:
    """Covariance (divided by N) shrunk towards mu I, and by how much: (1 - a) S + a mu I, mu the mean variance.

    With x_i centred, S = 1/N sum_i x_i x_i^T and the norm |A|^2 = sum_jk A_jk^2 / D:
        d^2 = |S - mu I|^2,  b^2 = min(d^2, 1/N^2 sum_i |x_i x_i^T - S|^2),  a = b^2 / d^2

    Values that do not vary at all get the covariance 0 shrunk to the smallest positive number that can be inverted, and a of 1.

    Args:
        values: (N, D).
    Raises:
        ValueError: fewer than 2 rows.
    Source: Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices",
        doi:10.1016/S0047-259X(03)00096-4, lemma 3.2 to 3.4.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"values of shape {x.shape}, expected (N, D) with at least 2 rows")
    x = x - x.mean(axis=0)
    count, width = x.shape
    sample = x.T @ x / count
    mu = float(np.trace(sample)) / width
    if mu <= np.finfo(np.float64).eps:
        return np.eye(width) * np.finfo(np.float64).eps, 1.0
    target = mu * np.eye(width)
    d2 = float(((sample - target) ** 2).sum()) / width
    b2 = (float((np.square(x).sum(axis=1) ** 2).sum()) / count - float((sample**2).sum())) / (count * width)
    share = 1.0 if d2 <= 0 else min(1.0, max(0.0, b2 / d2))
    if width == 1:
        share = 0.0  # the target is the covariance itself
    return (1 - share) * sample + share * target, share


def cross_fitted_distances(features: ArrayLike, patients: Sequence[str], folds: int = FOLDS) -> Array:
    """(N,) distances of known images, each from the Gaussian of those of other patients' folds: as far as new images would be.

    A patient's fold hangs on a hash of the id and on no generator: patients in the order of their hashes, dealt round.

    Raises:
        ValueError: lengths that differ, or fewer than 2 patients.
    """
    given = np.asarray(features, dtype=np.float64)
    if len(given) != len(patients):
        raise ValueError(f"{len(given)} images and {len(patients)} patients, expected as many")
    order = sorted(set(patients), key=lambda one: hashlib.sha256(one.encode("utf-8", "surrogateescape")).hexdigest())
    if len(order) < 2:
        raise ValueError("all images are of one patient; at least 2 are needed")
    fold_of = {patient: i % min(folds, len(order)) for i, patient in enumerate(order)}
    fold = np.array([fold_of[patient] for patient in patients])
    found = np.empty(len(given))
    for k in range(fold.max() + 1):
        found[fold == k] = Gaussian.fit(given[fold != k]).distances(given[fold == k])
    return found


def choose_limit(distances: ArrayLike, quantile: float = 0.99) -> Limit:
    """The ceil((N + 1) quantile)-th smallest of N cross-fitted distances; the largest where N is less than that.

    Of new images that are exchangeable with these, at most 1 - quantile lie beyond it, on average over the known ones; where N is too
    small for that, 1 / (N + 1). Exact if the distances came from a Gaussian that none of them was fitted to; after cross-fitting the
    images to come are measured from one of more images, and lie a little nearer.

    Raises:
        ValueError: no distances, or a quantile outside (0, 1).
    Source: Vovk et al. 2005, "Algorithmic learning in a random world"; cross-fitting: Vovk 2015, arXiv:1208.0806.
    """
    given = np.sort(np.asarray(distances, dtype=np.float64))
    if not (len(given) and 0 < quantile < 1):
        raise ValueError(f"{len(given)} distances and quantile {quantile}; expected at least 1 and a quantile between 0 and 1")
    rank = min(len(given), math.ceil(round((len(given) + 1) * quantile, 9)))
    return Limit(float(given[rank - 1]), rank, len(given))
