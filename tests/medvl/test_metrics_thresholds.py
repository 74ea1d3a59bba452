"""Thresholds against a search through all decisions, with scikit-learn's metrics, and what they promise on the rows they were chosen on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef, recall_score

from medvl.metrics import Threshold, choose_threshold, f1_statistic

rows = st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=2, max_size=30)
QUALITY = {"youden": balanced_accuracy_score, "best_f1": f1_score, "best_mcc": matthews_corrcoef}


def decisions(rows):
    """Every way to call rows positive from some score up, by rising threshold, and the scores that lie on the two sides of it."""
    labels, scores = np.array([y for y, _ in rows]), np.array([s for _, s in rows], dtype=float)
    assume(0 < labels.sum() < len(labels))
    cuts = [*sorted(set(scores.tolist())), max(scores) + 1]
    return labels, scores, [scores >= cut for cut in cuts]


@given(rows, st.sampled_from(sorted(QUALITY)))
def test_no_other_decision_is_better_and_none_as_good_is_lower(rows, rule):
    labels, scores, all_called = decisions(rows)
    got = choose_threshold(labels, scores, rule)
    quality = [QUALITY[rule](labels, called) for called in all_called]
    first_best = next(i for i, q in enumerate(quality) if q >= max(quality) - 1e-9)
    called = scores >= got.value
    assert called.tolist() == all_called[first_best].tolist()
    assert (got.sensitivity, got.specificity) == pytest.approx((recall_score(labels, called), recall_score(labels, called, pos_label=0)))
    assert (got.f1, got.mcc) == pytest.approx((f1_score(labels, called), matthews_corrcoef(labels, called)), abs=1e-12)
    assert (got.n_positive, got.n_negative) == (labels.sum(), (~labels).sum())


@given(rows, st.sampled_from([0.1, 0.5, 0.8, 0.95, 1.0]))
def test_wanted_sensitivity_and_specificity_are_reached_at_the_least_cost(rows, wanted):
    labels, scores, all_called = decisions(rows)
    sensitive = choose_threshold(labels, scores, "at_sensitivity", wanted)
    best = max(recall_score(labels, c, pos_label=0) for c in all_called if recall_score(labels, c) >= wanted)
    assert sensitive.sensitivity >= wanted and sensitive.specificity == pytest.approx(best)
    specific = choose_threshold(labels, scores, "at_specificity", wanted)
    best = max(recall_score(labels, c) for c in all_called if recall_score(labels, c, pos_label=0) >= wanted)
    assert specific.specificity >= wanted and specific.sensitivity == pytest.approx(best)


def test_uncertain_rows_do_not_choose_and_records_survive_json():
    labels, scores = [1, 1, 0, 0, -1, math.nan], [0.9, 0.6, 0.5, 0.1, 5.0, math.nan]
    got = choose_threshold(labels, scores, "youden")
    assert (got.value, got.n_positive, got.n_negative, got.f1) == (0.6, 2, 2, 1.0)
    assert f1_statistic(labels, scores, got.value).value == 1.0
    assert Threshold.from_dict(json.loads(json.dumps(got.to_dict(), allow_nan=False))) == got
    above_all = choose_threshold([1, 0], [0.3, 0.4], "at_specificity", 1.0)
    assert 0.4 < above_all.value < 0.4000001 and above_all.sensitivity == 0  # nothing is called positive


def test_thresholds_refuse_what_cannot_choose():
    with pytest.raises(ValueError, match="0 positive and 2 negative"):
        choose_threshold([0, 0], [0.1, 0.2], "youden")
    with pytest.raises(ValueError, match="infinite"):
        choose_threshold([1, 0], [math.inf, 0.2], "youden")
    with pytest.raises(ValueError, match="no rule 'j'"):
        choose_threshold([1, 0], [0.3, 0.2], "j")
    for rule, wanted in (("youden", 0.9), ("at_sensitivity", None), ("at_specificity", 1.5), ("at_sensitivity", 0.0)):
        with pytest.raises(ValueError, match="wanted"):
            choose_threshold([1, 0], [0.3, 0.2], rule, wanted)
