"""Distances to known images: against scikit-learn, scipy and plain loops, and how often images like the known ones are flagged."""

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from medvl.metrics.familiarity import Gaussian, Limit, choose_limit, cross_fitted_distances, directions, shrunk_covariance


def draws(rng, n, width):
    """Correlated features of very unequal variance, about a mean that is not 0."""
    mixing = np.random.default_rng(width).normal(size=(width, width)) * np.geomspace(2, 0.02, width)
    return rng.normal(size=(n, width)) @ mixing + 3


@pytest.mark.parametrize(("n", "width"), [(200, 5), (40, 40), (15, 60), (2, 3), (30, 1)])
def test_the_covariance_is_that_of_ledoit_and_wolf(n, width):
    values = draws(np.random.default_rng(n), n, width)
    theirs = LedoitWolf().fit(values)
    covariance, share = shrunk_covariance(values)
    np.testing.assert_allclose(covariance, theirs.covariance_, rtol=1e-9, atol=1e-12)
    assert share == pytest.approx(theirs.shrinkage_, rel=1e-9, abs=1e-12) and 0 <= share <= 1


@pytest.mark.parametrize(("n", "width"), [(300, 6), (25, 40)])
def test_distances_are_those_of_mahalanobis_between_directions(n, width):
    rng = np.random.default_rng(1)
    known, new = draws(rng, n, width), draws(rng, 7, width) + rng.normal(size=width)
    unit = known / np.sqrt((known**2).sum(1))[:, None]
    theirs = LedoitWolf().fit(unit)
    precision = np.linalg.inv(theirs.covariance_)
    expected = [mahalanobis(one / np.sqrt((one**2).sum()), unit.mean(0), precision) for one in new]
    made = Gaussian.fit(known)
    np.testing.assert_allclose(made.distances(new), expected, rtol=1e-7)
    np.testing.assert_allclose(made.distances(new * 17), expected, rtol=1e-7)
    np.testing.assert_allclose(Gaussian.fit(known[::-1]).distances(new[::-1]), expected[::-1], rtol=1e-7)


def test_no_image_is_measured_from_one_of_its_own_patient():
    """Every distance is that from the Gaussian of all other folds, a patient is in one fold, and folds are about equal."""
    rng = np.random.default_rng(2)
    known = draws(rng, 50, 4)
    patients = [f"p{i // 3}" for i in range(50)]
    found = cross_fitted_distances(known, patients, folds=4)
    names = sorted(set(patients))
    left = [[name for name in names if name in own] for own in _folds(known, patients, found, names)]
    assert sorted(name for own in left for name in own) == names and {len(own) for own in left} <= {4, 5}
    order = rng.permutation(50)
    np.testing.assert_allclose(cross_fitted_distances(known[order], [patients[i] for i in order], folds=4), found[order], rtol=1e-9)


def _folds(known, patients, found, names):
    """The folds that explain the distances, by trying which patients were left out together with the first that is left."""
    import hashlib
    import itertools

    order = sorted(names, key=lambda one: hashlib.sha256(one.encode()).digest())
    own = np.array(patients)
    for start in range(4):
        fold = list(itertools.islice(order, start, None, 4))
        inside = np.isin(own, fold)
        np.testing.assert_allclose(found[inside], Gaussian.fit(known[~inside]).distances(known[inside]), rtol=1e-9)
        yield fold


@pytest.mark.parametrize(("n", "quantile", "rank"), [(400, 0.99, 397), (99, 0.99, 99), (40, 0.99, 40), (9, 0.7, 7), (19, 0.95, 19)])
def test_the_limit_is_the_rank_of_split_conformal_prediction(n, quantile, rank):
    distances = np.random.default_rng(3).permutation(np.arange(1.0, n + 1))
    limit = choose_limit(distances, quantile)
    assert limit == Limit(float(rank), rank, n)
    assert limit.rate == pytest.approx(1 - rank / (n + 1))
    assert limit.rate <= 1 - quantile + 1e-12 or rank == n


@pytest.mark.parametrize(("n", "width", "quantile"), [(200, 8, 0.9), (120, 30, 0.95), (40, 60, 0.9), (400, 16, 0.99)])
def test_new_images_like_the_known_ones_are_flagged_at_about_the_rate_that_is_said(n, width, quantile):
    """Mean over draws of the known images, of which 400 new ones each; never above by more than chance, and not far below."""
    rng = np.random.default_rng(4)
    rates = []
    for _ in range(40):
        known, new = draws(rng, n, width), draws(rng, 400, width)
        limit = choose_limit(cross_fitted_distances(known, [str(i) for i in range(n)]), quantile)
        rates.append(float((Gaussian.fit(known).distances(new) > limit.distance).mean()))
    error = np.std(rates) / np.sqrt(len(rates))
    assert 0.55 * limit.rate - 3 * error <= np.mean(rates) <= limit.rate + 3 * error
    far = draws(rng, 400, width) * np.linspace(-3, 3, width)
    assert (Gaussian.fit(known).distances(far) > limit.distance).mean() > 0.9


def test_features_that_do_not_vary_flag_whatever_is_not_the_same():
    made = Gaussian.fit(np.tile([3.0, 4.0], (30, 1)))
    np.testing.assert_allclose(made.distances([[0.6, 0.8], [0.0, 0.0]]), [0, 1 / np.sqrt(np.finfo(float).eps)], atol=1e-6)


def test_a_vector_of_nothing_has_no_direction():
    np.testing.assert_array_equal(directions([[0.0, 0.0], [0.0, 5.0]]), [[0, 0], [0, 1]])


def test_what_cannot_be_fitted_is_refused():
    good = np.eye(3)
    for call, said in (
        (lambda: shrunk_covariance([[1.0, 2.0]]), "at least 2 rows"),
        (lambda: Gaussian.fit([1.0, 2.0]), "must be"),
        (lambda: Gaussian.fit([[1.0, np.nan], [1.0, 2.0]]), "finite"),
        (lambda: Gaussian(np.zeros(2), good), "expected"),
        (lambda: Gaussian(np.zeros(3), -good), "not positive definite"),
        (lambda: Gaussian(np.full(3, np.inf), good), "finite"),
        (lambda: cross_fitted_distances(good, ["a", "b"]), "3 images and 2 patients"),
        (lambda: cross_fitted_distances(good, ["a"] * 3), "one patient"),
        (lambda: choose_limit([], 0.9), "0 distances"),
        (lambda: choose_limit([1.0], 1.0), "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
