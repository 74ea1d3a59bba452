"""Conformal sets: their limits against a count, and their coverage against what they promise."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvl.metrics import (
    ABSTAIN,
    ConformalBinary,
    abstention_statistic,
    coverage_statistic,
    decided_accuracy_statistic,
    decisions,
)


def cohort(generator, n, prevalence=0.2):
    """A model that is not calibrated: probabilities of present that are too low, of a rare finding."""
    labels = (generator.random(n) < prevalence).astype(float)
    return labels, 1 / (1 + np.exp(-(2 * labels - 2.5 + generator.normal(size=n))))


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=30),
    st.lists(st.integers(0, 20), min_size=1, max_size=30),
    st.sampled_from(["0.05", "0.1", "0.3", "0.5", "0.7", "0.95"]),
    st.booleans(),
)
def test_limits_are_the_smallest_that_hold_enough_rows(absent, present, alpha, class_conditional):
    p, labels = [i / 20 for i in absent + present], [0] * len(absent) + [1] * len(present)
    got = ConformalBinary.fit(p, labels, float(alpha), class_conditional=class_conditional)
    wrong = [[Fraction(i, 20) for i in absent], [1 - Fraction(i, 20) for i in present]]
    groups = wrong if class_conditional else [wrong[0] + wrong[1]] * 2
    for limit, rows in zip((got.limit_absent, got.limit_present), groups, strict=True):
        enough = (len(rows) + 1) * (1 - Fraction(alpha))
        holds = [c for c in [*rows, Fraction(1)] if sum(r <= c for r in rows) >= enough or c == 1]
        assert limit == pytest.approx(float(min(holds)))
    sets = got.sets(p)
    assert sets[:, 0].tolist() == [value <= got.limit_absent for value in p]
    assert sets[:, 1].tolist() == [1 - value <= got.limit_present for value in p]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("class_conditional", [True, False])
def test_coverage_is_within_a_point_of_what_is_promised(alpha, class_conditional):
    """Mean over 100 random splits into validation and test rows."""
    generator = np.random.default_rng(0)
    labels, p = cohort(generator, 6000)
    found = []
    for _ in range(100):
        order = generator.permutation(len(labels))
        fit, test = order[:3000], order[3000:]
        sets = ConformalBinary.fit(p[fit], labels[fit], alpha, class_conditional=class_conditional).sets(p[test])
        of_class = [coverage_statistic(np.where(labels[test] == y, y, np.nan), sets).value for y in (0, 1)]
        found.append([coverage_statistic(labels[test], sets).value, *of_class])
    overall, absent, present = np.mean(found, axis=0)
    assert abs(overall - (1 - alpha)) < 0.01
    if class_conditional:
        assert abs(absent - (1 - alpha)) < 0.01 and abs(present - (1 - alpha)) < 0.01
    else:
        assert present < 1 - 2 * alpha < 1 - alpha < absent  # the rare finding pays, which is what the classes are for


def test_too_few_rows_rule_nothing_out():
    got = ConformalBinary.fit([0.1, 0.2, 0.9], [0, 0, 1], alpha=0.1)
    assert (got.limit_absent, got.limit_present, got.n_absent, got.n_present) == (1, 1, 2, 1)
    assert got.sets([0.0, 1.0]).all() and got.decide([0.0, 1.0]).tolist() == [ABSTAIN, ABSTAIN]


def test_a_set_of_one_is_a_decision():
    rule = ConformalBinary(0.1, True, limit_absent=0.6, limit_present=0.6, n_absent=50, n_present=50)
    p = [0.1, 0.5, 0.9, 0.39]
    assert rule.sets(p).tolist() == [[True, False], [True, True], [False, True], [True, False]]
    assert rule.decide(p).tolist() == [0, ABSTAIN, 1, 0]
    narrow = ConformalBinary(0.5, True, limit_absent=0.2, limit_present=0.2, n_absent=50, n_present=50)
    assert narrow.sets([0.5]).tolist() == [[False, False]] and narrow.decide([0.5]).tolist() == [ABSTAIN]

    sets = rule.sets(p)
    labels = [0, 1, 0, math.nan]
    assert decisions(sets).tolist() == rule.decide(p).tolist()
    assert coverage_statistic(labels, sets).value == pytest.approx(2 / 3)
    assert abstention_statistic(sets).value == 1 / 4
    assert decided_accuracy_statistic(labels, sets).value == 1 / 2
    assert coverage_statistic(labels, sets).used.tolist() == [True, True, True, False]
    assert decided_accuracy_statistic(labels, sets).used.tolist() == [True, False, True, False]


def test_a_rule_survives_json_and_ignores_labels_that_do_not_count():
    labels, p = cohort(np.random.default_rng(3), 200)
    got = ConformalBinary.fit(p, labels)
    assert ConformalBinary.from_dict(json.loads(json.dumps(got.to_dict(), allow_nan=False))) == got
    assert ConformalBinary.fit([*p, math.nan, 0.3], [*labels, math.nan, -1]) == got


def test_rules_refuse_what_gives_no_guarantee():
    with pytest.raises(ValueError, match="alpha"):
        ConformalBinary.fit([0.1, 0.9], [0, 1], alpha=1.0)
    with pytest.raises(ValueError, match="calibrate the scores first"):
        ConformalBinary.fit([0.1, 1.9], [0, 1])
    with pytest.raises(ValueError, match="0 positive"):
        ConformalBinary.fit([0.1, 0.2], [0, 0])
    rule = ConformalBinary.fit([0.1, 0.9], [0, 1])
    with pytest.raises(ValueError, match="not NaN"):
        rule.sets([0.5, math.nan])
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        coverage_statistic([1, 0], rule.sets([0.5]))
    with pytest.raises(ValueError, match="limits"):
        ConformalBinary.from_dict(rule.to_dict() | {"limit_absent": 2.0})
