"""Subgroup tables against scikit-learn on the rows of each subgroup, and intervals of differences against a bootstrap in plain loops."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medvl.metrics import subgroup_table

NAMES = ("edema", "fracture", "rare")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    n = 400
    labels = (rng.random((n, 3)) < (0.4, 0.3, 0.02)).astype(float)
    labels[rng.random((n, 3)) < 0.05] = np.nan
    labels[rng.random((n, 3)) < 0.05] = -1
    sex = np.where(rng.random(n) < 0.4, "female", "male")
    noise = np.where(sex == "female", 2.0, 0.7)[:, None]  # scores of women are worse
    scores = np.nan_to_num(labels) + noise * rng.normal(size=(n, 3))
    patients = [f"p{i // 2}" for i in range(n)]
    return labels, scores, sex, patients


def area(labels, scores, rows):
    known = rows & np.isin(labels, (0, 1))
    return roc_auc_score(labels[known], scores[known])


def test_every_subgroup_has_the_auroc_of_its_rows(data):
    labels, scores, sex, patients = data
    table = subgroup_table(labels, scores, NAMES, sex.tolist(), patients, repeats=20)
    for group in ("female", "male"):
        own = table.metrics["auroc"][group]
        rows = sex == group
        assert set(own.per_finding) == {"edema", "fracture"}, "a finding of two or three positives does not count"
        for f, name in enumerate(NAMES[:2]):
            assert own.per_finding[name].value == pytest.approx(area(labels[:, f], scores[:, f], rows), abs=1e-12)
            assert own.per_finding[name].n == int((rows & np.isin(labels[:, f], (0, 1))).sum())
        mean = np.mean([area(labels[:, f], scores[:, f], rows) for f in (0, 1)])
        rest = np.mean([area(labels[:, f], scores[:, f], ~rows) for f in (0, 1)])
        assert own.mean.value == pytest.approx(mean, abs=1e-12)
        assert own.to_rest.interval.value == pytest.approx(mean - rest, abs=1e-12)
        assert own.to_rest.findings == ("edema", "fracture")
        assert table.rows[group] == rows.sum() and table.patients[group] == len({p for p, r in zip(patients, rows, strict=True) if r})
    gap = table.gaps["auroc"]
    assert (gap.highest, gap.lowest) == ("male", "female")
    assert gap.difference.interval.value == pytest.approx(-table.metrics["auroc"]["female"].to_rest.interval.value, abs=1e-12)
    assert gap.difference.interval.ci_low > 0 and gap.difference.p_value < 0.1


def test_the_interval_of_a_difference_is_that_of_a_bootstrap_in_loops(data):
    labels, scores, sex, patients = data
    table = subgroup_table(labels[:, :2], scores[:, :2], NAMES[:2], sex.tolist(), patients, repeats=400, seed=3)
    rng = np.random.default_rng(11)
    rows_of = [[2 * k, 2 * k + 1] for k in range(200)]
    drawn = []
    for _ in range(400):
        rows = np.array([i for k in rng.integers(200, size=200) for i in rows_of[k]])
        y, s, g = labels[rows], scores[rows], sex[rows] == "female"
        drawn.append(np.mean([area(y[:, f], s[:, f], g) - area(y[:, f], s[:, f], ~g) for f in (0, 1)]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = table.metrics["auroc"]["female"].to_rest.interval
    assert found.ci_low == pytest.approx(low, abs=0.03) and found.ci_high == pytest.approx(high, abs=0.03)


def test_calls_at_given_thresholds_are_measured_too(data):
    labels, scores, sex, patients = data
    cuts = {"edema": 0.4, "fracture": 0.6}
    table = subgroup_table(labels, scores, NAMES, sex.tolist(), patients, thresholds=cuts, repeats=5)
    rows = (sex == "male") & np.isin(labels[:, 0], (0, 1))
    positive, called = labels[rows, 0] == 1, scores[rows, 0] >= 0.4
    own = table.metrics["sensitivity"]["male"].per_finding["edema"]
    assert own.value == pytest.approx((positive & called).sum() / positive.sum(), abs=1e-12)
    spared = table.metrics["specificity"]["male"].per_finding["edema"]
    assert spared.value == pytest.approx((~positive & ~called).sum() / (~positive).sum(), abs=1e-12)


def test_a_calibration_that_turns_a_finding_round_leaves_its_ranking(data):
    labels, scores, sex, patients = data
    turned = 1 / (1 + np.exp(scores))
    found = subgroup_table(labels, scores, NAMES, sex.tolist(), patients, thresholds={"edema": 0.4}, probabilities=turned, repeats=5)
    rows = (sex == "male") & np.isin(labels[:, 0], (0, 1))
    assert found.metrics["auroc"]["male"].per_finding["edema"].value == pytest.approx(area(labels[:, 0], scores[:, 0], sex == "male"))
    positive, called = labels[rows, 0] == 1, turned[rows, 0] >= 0.4
    own = found.metrics["sensitivity"]["male"].per_finding["edema"]
    assert own.value == pytest.approx((positive & called).sum() / positive.sum(), abs=1e-12)
    with pytest.raises(ValueError, match="as the scores"):
        subgroup_table(labels, scores, NAMES, sex.tolist(), patients, probabilities=turned[:, :1])


def test_subgroups_that_share_no_finding_have_no_gap():
    labels = np.array([[1, np.nan]] * 10 + [[0, np.nan]] * 10 + [[np.nan, 1]] * 10 + [[np.nan, 0]] * 10, dtype=float)
    scores = np.arange(80, dtype=float).reshape(40, 2)
    groups = ["A"] * 20 + ["B"] * 20
    table = subgroup_table(labels, scores, ("x", "y"), groups, list(range(40)), repeats=10)
    assert table.gaps == {"auroc": None}
    assert table.metrics["auroc"]["A"].mean.value == 0.0 and set(table.metrics["auroc"]["A"].per_finding) == {"x"}
    told = table.to_dict()
    assert json.loads(json.dumps(told, allow_nan=False))["groups"]["A"]["auroc"]["less_the_rest"]["value"] is None
    assert math.isnan(table.metrics["auroc"]["A"].to_rest.p_value)


def test_a_gap_in_one_finding_is_not_the_widest_of_a_table_of_many():
    rng = np.random.default_rng(2)
    n, f = 600, 6
    groups = np.repeat(["A", "B", "C"], n // 3)
    labels = (rng.random((n, f)) < 0.5).astype(float)
    scores = labels + rng.normal(size=(n, f))
    labels[groups == "C", 1:] = np.nan  # the third has one finding alone, and scores that are upside down
    scores[groups == "C", 0] *= -1
    table = subgroup_table(labels, scores, list("uvwxyz"), groups.tolist(), list(range(n)), repeats=10)
    assert {table.gaps["auroc"].highest, table.gaps["auroc"].lowest} == {"A", "B"}
    assert len(table.gaps["auroc"].difference.findings) == 6 and table.metrics["auroc"]["C"].mean.value < 0.5


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected both \(3, 1\)"):
        subgroup_table(np.zeros((2, 1)), np.zeros((2, 1)), ("x",), ["a"] * 3, ["p"] * 3)
    with pytest.raises(ValueError, match="least is 0"):
        subgroup_table(np.zeros((2, 1)), np.zeros((2, 1)), ("x",), ["a"] * 2, ["p"] * 2, least=0)
