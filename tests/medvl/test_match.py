"""Measures of how alike two representations are, against the published formulas and scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from medvl.nn.match import (
    cka_by_chance,
    cka_interval,
    debiased_linear_cka,
    linear_cka,
    mutual_neighbours,
    mutual_neighbours_by_chance,
    neighbours,
)

SHAPES = st.tuples(st.integers(5, 30), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))


def pair(n, p, q, seed, shared=0.5):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 3))
    x = shared * common @ rng.normal(size=(3, p)) + rng.normal(size=(n, p)) + 2
    return x, shared * common @ rng.normal(size=(3, q)) + rng.normal(size=(n, q)) - 1


def unbiased_hsic(k, l):  # noqa: E741
    """Song et al. 2012, eq. 5, one number at a time."""
    n = len(k)
    k, l = ([[0.0 if i == j else float(m[i][j]) for j in range(n)] for i in range(n)] for m in (k, l))  # noqa: E741
    trace = sum(k[i][j] * l[j][i] for i in range(n) for j in range(n))
    product = sum(map(sum, k)) * sum(map(sum, l)) / ((n - 1) * (n - 2))
    crossed = sum(sum(k[i][j] for i in range(n)) * sum(l[j]) for j in range(n))
    return (trace + product - 2 / (n - 2) * crossed) / (n * (n - 3))


@settings(deadline=None, max_examples=40)
@given(SHAPES)
def test_cka_is_that_of_the_formulas(shape):
    x, y = pair(*shape)
    n = len(x)
    centre = np.eye(n) - 1 / n
    kernels = [centre @ (m @ m.T) @ centre for m in (x, y)]

    def hsic(a, b):
        return math.fsum((a * b).ravel())

    biased = hsic(*kernels) / math.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1]))
    assert linear_cka(x, y) == pytest.approx(biased, rel=1e-9)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    debiased = unbiased_hsic(k, l) / math.sqrt(unbiased_hsic(k, k) * unbiased_hsic(l, l))
    assert debiased_linear_cka(x, y) == pytest.approx(debiased, rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(SHAPES)
def test_rotation_scale_and_order_move_nothing(shape):
    x, y = pair(*shape)
    rng = np.random.default_rng(1)
    turned = 7 * y @ np.linalg.qr(rng.normal(size=(y.shape[1], y.shape[1])))[0]
    order = rng.permutation(len(x))
    planar = min(x.shape[1], y.shape[1]) > 1  # on a line all cosines are 1 or -1, and which row is nearest is the order's affair
    for measure in (linear_cka, debiased_linear_cka, *([lambda a, b: mutual_neighbours(a, b, 3).mean()] if planar else [])):
        assert measure(x[order], turned[order]) == pytest.approx(measure(x, y), abs=1e-9)
        assert measure(x, x) == pytest.approx(1)


def test_wide_features_of_noise_match_only_where_the_bias_stays():
    """What the debiased form is for: 60 rows of 500 random numbers."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 500)), rng.normal(size=(60, 500))
    assert linear_cka(x, y) > 0.8
    assert abs(debiased_linear_cka(x, y)) < 0.1
    found = cka_by_chance(x, y, repeats=100)
    assert abs(found.mean) < 0.03 and found.p_value > 0.01


@settings(deadline=None, max_examples=30)
@given(SHAPES, st.integers(1, 4))
def test_neighbours_are_those_of_scikit_learn(shape, k):
    x, y = pair(*shape)
    x, y = np.c_[x, x**2], np.c_[y, y**2]  # two and more columns: on a line all cosines are 1
    sets = []
    for rows in (x, y):
        index = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(rows).kneighbors(rows, return_distance=False)
        sets.append([set(found) - {i} for i, found in enumerate(index.tolist())])
    assert [set(np.flatnonzero(row)) for row in neighbours(x, k)] == sets[0]
    expected = [len(a & b) / k for a, b in zip(*sets, strict=True)]
    np.testing.assert_allclose(mutual_neighbours(x, y, k), expected)


def test_chance_is_what_chance_gives():
    x, y = pair(80, 6, 5, seed=2, shared=2.0)
    matched = mutual_neighbours(x, y, 8).mean()
    chance = mutual_neighbours_by_chance(x, y, 8, repeats=300)
    assert chance.mean == pytest.approx(8 / 79, rel=0.05)
    assert matched > chance.upper > chance.mean and chance.p_value == pytest.approx(1 / 301)
    drawn = [debiased_linear_cka(x, y[np.random.default_rng(s).permutation(80)]) for s in range(300)]
    found = cka_by_chance(x, y, repeats=300)
    assert found.mean == pytest.approx(np.mean(drawn), abs=0.02)
    assert found.upper == pytest.approx(np.quantile(drawn, 0.95), abs=0.05)
    assert cka_by_chance(x, y, repeats=50, seed=3) == cka_by_chance(x, y, repeats=50, seed=3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """The truth from 4000 rows; 100 samples of 120."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(3, 6)), rng.normal(size=(3, 5))

    def sample(n):
        common = rng.normal(size=(n, 3))
        return common @ maps[0] + rng.normal(size=(n, 6)), common @ maps[1] + 2 * rng.normal(size=(n, 5))

    truth = debiased_linear_cka(*sample(4000))
    intervals = [cka_interval(*sample(120)) for _ in range(100)]
    assert 85 <= sum(low <= truth <= high for low, high in intervals) <= 100
    assert all(0.01 < high - low < 0.6 for low, high in intervals)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 2)), "N at least 4"),
        (np.zeros((5, 2)), np.zeros((6, 2)), r"shapes \(5, 2\) and \(6, 2\)"),
        (np.full((5, 2), np.nan), np.zeros((5, 2)), "not finite"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        linear_cka(x, y)
    with pytest.raises(ValueError, match="5 neighbours of 5 rows: expected 1 to 4"):
        neighbours(np.eye(5), 5)
    assert math.isnan(linear_cka(np.ones((5, 2)), np.eye(5)))
