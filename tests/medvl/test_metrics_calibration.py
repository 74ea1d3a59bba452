"""Calibrators against scikit-learn and against optima that scipy finds by itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from medvl.metrics import Isotonic, Platt, Temperature, brier_statistic, calibration_error_statistic, calibrator_from_dict

score = st.one_of(st.integers(-3, 3).map(float), st.floats(-5, 5).map(lambda x: round(x, 6)))
rows = st.lists(st.tuples(st.booleans(), score), min_size=4, max_size=40)


def both_labels(rows):
    labels, scores = np.array([y for y, _ in rows]), np.array([s for _, s in rows])
    assume(0 < labels.sum() < len(labels))
    return labels, scores


@pytest.fixture
def cohort():
    """Logits that are too sure by a factor of 3 and too high by 2, with labels that do not count among them."""
    generator = np.random.default_rng(1)
    truth = generator.normal(size=2000) * 1.5
    labels = (generator.random(2000) < 1 / (1 + np.exp(-truth))).astype(float)
    labels[:20], labels[20:30] = np.nan, -1
    return 3 * truth, labels


# --- temperature


@given(rows)
def test_temperature_is_scipys_optimum(rows):
    labels, z = both_labels(rows)
    signed = np.where(labels, z, -z)
    assume(signed.sum() > 0.01 and signed.min() < -0.01)

    def loss(log_temperature):
        return np.logaddexp(0, -signed / math.exp(log_temperature)).mean()

    got = Temperature.fit(z, labels).temperature
    best = minimize_scalar(loss, bounds=(-12, 12), method="bounded", options={"xatol": 1e-10})
    assert loss(math.log(got)) <= best.fun + 1e-12
    if abs(best.x) < 5:
        assert got == pytest.approx(math.exp(best.x), rel=1e-4)


def test_temperature_equals_a_logistic_regression_through_the_origin(cohort):
    z, labels = cohort
    kept = np.isin(labels, (0, 1))
    reference = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(z[kept, None], labels[kept])
    got = Temperature.fit(z, labels)
    assert got.temperature == pytest.approx(1 / reference.coef_[0, 0], rel=1e-5)
    assert got.temperature == pytest.approx(3, rel=0.1)
    assert got.apply(z) == pytest.approx(reference.predict_proba(z[:, None])[:, 1], abs=1e-5)


def test_temperature_refuses_what_has_no_optimum():
    with pytest.raises(ValueError, match="do not rise"):
        Temperature.fit([-1, 1, 2], [1, 1, 0])
    with pytest.raises(ValueError, match="its side of 0"):
        Temperature.fit([1, 2, -1], [1, 1, 0])
    with pytest.raises(ValueError, match="above 0"):
        Temperature(0.0)


# --- Platt


@given(rows)
def test_platt_is_scipys_optimum(rows):
    labels, scores = both_labels(rows)
    p, q = labels.sum(), (~labels).sum()
    targets = np.where(labels, (p + 1) / (p + 2), 1 / (q + 2))

    def loss(at):
        eta = at[0] * scores + at[1]
        return (targets * np.logaddexp(0, -eta) + (1 - targets) * np.logaddexp(0, eta)).mean()

    got = Platt.fit(scores, labels)
    best = minimize(loss, [0, 0], method="BFGS", options={"gtol": 1e-9})
    assert loss([got.slope, got.intercept]) <= best.fun + 1e-10


def test_platt_equals_scikit_learn(cohort):
    z, labels = cohort
    kept = np.isin(labels, (0, 1))

    class Scores(LogisticRegression):
        """A model whose decision is the score itself."""

        def decision_function(self, X):
            return X[:, 0]

    model = Scores().fit(z[kept, None], labels[kept])
    reference = CalibratedClassifierCV(FrozenEstimator(model), method="sigmoid", ensemble=False).fit(z[kept, None], labels[kept])
    got = Platt.fit(z, labels)
    assert got.apply(z) == pytest.approx(reference.predict_proba(z[:, None])[:, 1], abs=1e-4)
    shifted = Platt.fit(0.25 + z / 1e4, labels)  # as narrow as cosines of prompts are
    assert shifted.apply(0.25 + z / 1e4) == pytest.approx(got.apply(z), abs=1e-9)


def test_platt_stays_finite_where_scores_separate_or_say_nothing():
    apart = Platt.fit([1.0, 2, 3, 4], [0, 0, 1, 1])
    assert apart.slope > 0 and apart.apply([1.0, 4.0]) == pytest.approx([1 / 4, 3 / 4], abs=0.15)
    flat = Platt.fit([0.3, 0.3, 0.3], [1, 0, 0])
    assert flat.slope == 0 and flat.apply([0.3]) == pytest.approx([(2 / 3 + 2 / 4) / 3])
    assert Platt.fit([1.0, 2, 3, 4], [1, 0, 1, 0]).slope < 0
    with pytest.raises(ValueError, match="finite"):
        Platt(math.inf, 0.0)


# --- isotonic


@given(rows, st.lists(score, min_size=1, max_size=20))
def test_isotonic_equals_scikit_learn(rows, new):
    labels, scores = both_labels(rows)
    reference = IsotonicRegression(out_of_bounds="clip").fit(scores, labels)
    got = Isotonic.fit(scores, labels)
    for at in (scores, np.array([-9.0, *new, 9.0])):
        assert got.apply(at) == pytest.approx(reference.predict(at), abs=1e-9)
    assert len(got.scores) == len(reference.X_thresholds_)


def test_isotonic_refuses_knots_that_fall():
    with pytest.raises(ValueError, match="rising"):
        Isotonic((0.0, 1.0), (0.6, 0.5))
    with pytest.raises(ValueError, match="rising"):
        Isotonic((1.0, 0.0), (0.4, 0.5))
    with pytest.raises(ValueError, match="0 knots"):
        Isotonic((), ())


# --- all of them


@pytest.mark.parametrize("kind", [Temperature, Platt, Isotonic])
def test_calibration_helps_on_other_studies_and_survives_json(cohort, kind):
    z, labels = cohort
    got = kind.fit(z[::2], labels[::2])
    stored = calibrator_from_dict(json.loads(json.dumps(got.to_dict(), allow_nan=False)))
    assert stored == got and type(stored) is kind
    p, before = stored.apply(z), 1 / (1 + np.exp(-z))
    test = np.arange(len(z)) % 2 == 1
    other = np.where(test, labels, np.nan)
    assert brier_statistic(other, p).value < brier_statistic(other, before).value - 0.01
    assert calibration_error_statistic(other, p, 10, "mass").value < calibration_error_statistic(other, before, 10, "mass").value / 2
    known = test & np.isin(labels, (0, 1))
    assert log_loss(labels[known], np.clip(p[known], 1e-6, 1)) < log_loss(labels[known], before[known])
    assert roc_auc_score(labels[known], p[known]) == pytest.approx(roc_auc_score(labels[known], z[known]), abs=0.01)


@pytest.mark.parametrize("kind", [Temperature, Platt, Isotonic])
def test_labels_that_do_not_count_move_nothing_and_unknown_stays_unknown(cohort, kind):
    z, labels = cohort
    kept = np.isin(labels, (0, 1))
    got = kind.fit(np.where(kept, z, np.nan), labels)
    assert got == kind.fit(z[kept], labels[kept])
    p = got.apply([[0.0, np.nan], [1.0, -1.0]])
    assert p.shape == (2, 2) and np.isnan(p).tolist() == [[False, True], [False, False]]
    with pytest.raises(ValueError, match="3 positive and 0 negative"):
        kind.fit([1.0, 2, 3, 4], [1, 1, 1, -1])
    with pytest.raises(ValueError, match="infinite"):
        kind.fit([1.0, math.inf], [1, 0])
    with pytest.raises(ValueError, match="NaN"):
        kind.fit([1.0, math.nan], [1, 0])


def test_a_record_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no calibration of kind 'beta'"):
        calibrator_from_dict({"kind": "beta"})
