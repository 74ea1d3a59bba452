"""Metrics against scikit-learn, against loops in plain Python, and against what a random order really gives."""

from __future__ import annotations

import itertools
import json
import math
import random
from fractions import Fraction
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from medvl.metrics import (
    MACRO,
    Interval,
    auroc,
    auroc_intervals,
    auroc_statistic,
    bootstrap_interval,
    bootstrap_intervals,
    mean_intervals,
    mean_statistic,
    median_statistic,
    peak,
    pointing_game,
    ratio_statistic,
    recall_at_k,
    tied_peaks,
)

# --- AUROC

tied_scores = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40)
any_scores = st.lists(st.tuples(st.booleans(), st.floats(-1e6, 1e6)), min_size=2, max_size=40)


@given(st.one_of(tied_scores, any_scores))
def test_auroc_equals_scikit_learn(rows):
    labels, scores = [label for label, _ in rows], [float(score) for _, score in rows]
    got = auroc(labels, scores)
    if len(set(labels)) < 2:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@given(tied_scores, st.randoms(use_true_random=False))
def test_weighted_auroc_equals_auroc_of_the_repeated_rows(rows, rng):
    labels, scores = np.array([label for label, _ in rows]), np.array([score for _, score in rows], dtype=float)
    weights = np.array([[rng.randrange(4) for _ in rows] for _ in range(5)])
    got = auroc_statistic(labels, scores).of_weights(weights.astype(float))
    for value, w in zip(got, weights, strict=True):
        repeated = np.repeat(labels, w)
        if len(set(repeated.tolist())) < 2:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(roc_auc_score(repeated, np.repeat(scores, w)), abs=1e-12)


def test_auroc_takes_infinite_scores_and_refuses_what_it_cannot_rank():
    assert auroc([1, 1, 0, 0], [np.inf, 0.0, 0.0, -np.inf]) == pytest.approx(3.5 / 4)
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        auroc([1, 0, 1], [0.1, math.nan, 0.3])
    with pytest.raises(ValueError, match="uncertain"):
        auroc([1, 0, -1], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="shape"):
        auroc([1, 0], [0.1, 0.2, 0.3])


def test_uncertain_and_unmentioned_labels_do_not_count():
    labels = np.array([[1.0, 1], [0, 0], [-1, 1], [np.nan, 0], [1, 1], [0, 0]])
    scores = np.array([[0.9, 1], [0.1, 0], [0.0, 1], [5.0, 0], [0.8, 1], [0.85, 0]])
    got = auroc_intervals(labels, scores, ["edema", "emphysema"], list("abcdef"), repeats=50)
    kept = [0, 1, 4, 5]
    assert got["edema"].value == pytest.approx(roc_auc_score(labels[kept, 0], scores[kept, 0]))
    assert (got["edema"].n, got["edema"].n_patients, got["edema"].n_positive) == (4, 4, 2)
    assert (got["emphysema"].n, got["emphysema"].value) == (6, 1.0)
    assert got[MACRO].value == pytest.approx((got["edema"].value + 1) / 2)


# --- bootstrap


def plain_bootstrap(columns, patient_ids, repeats, seed):
    """One resample after another, one row after another; ``columns`` are functions of a list of row numbers."""
    patients = sorted(set(patient_ids))
    generator = np.random.default_rng(seed)
    for _ in range(repeats):
        drawn = [patients[i] for i in generator.integers(len(patients), size=len(patients))]
        rows = [row for name in drawn for row, owner in enumerate(patient_ids) if owner == name]
        yield [column(rows) for column in columns]


def plain_auroc(labels, scores):
    pairs = [
        (a > b) + (a == b) / 2 for (x, a), (y, b) in itertools.product(zip(labels, scores, strict=True), repeat=2) if x == 1 and y == 0
    ]
    return sum(pairs) / len(pairs) if pairs else math.nan


@pytest.fixture
def cohort():
    generator = np.random.default_rng(3)
    patient_ids = [f"p{i}" for i in generator.integers(25, size=60)]
    labels = (generator.random((60, 3)) < (0.4, 0.3, 0.04)).astype(float)
    labels[generator.random((60, 3)) < 0.1] = np.nan
    labels[:2, 2] = (1, 0)
    scores = np.round(labels.copy() + generator.normal(size=(60, 3)), 1)
    scores[np.isnan(scores)] = 0
    return labels, scores, patient_ids


def test_bootstrap_equals_a_plain_loop(cohort):
    labels, scores, patient_ids = cohort
    names = ["edema", "emphysema", "rib_fracture"]
    got = auroc_intervals(labels, scores, names, patient_ids, repeats=80, seed=7)

    def column(f):
        return lambda rows: plain_auroc([labels[r, f] for r in rows], [scores[r, f] for r in rows])

    draws = np.array(list(plain_bootstrap([column(f) for f in range(3)], patient_ids, 80, 7)))
    assert 0 < np.isnan(draws[:, 2]).sum() < 80  # the rare finding is missing from some resamples, or nothing is tested
    for f, name in enumerate(names):
        good = [v for v in draws[:, f] if not math.isnan(v)]
        assert (got[name].repeats, got[name].skipped) == (len(good), 80 - len(good))
        assert (got[name].ci_low, got[name].ci_high) == pytest.approx(np.percentile(good, [2.5, 97.5]).tolist(), abs=1e-12)
    macro = [row.mean() for row in draws if not np.isnan(row).any()]
    assert (got[MACRO].ci_low, got[MACRO].ci_high) == pytest.approx(np.percentile(macro, [2.5, 97.5]).tolist(), abs=1e-12)
    assert got[MACRO].skipped == 80 - len(macro)


def test_row_order_chunks_and_company_do_not_move_an_interval(cohort, monkeypatch):
    labels, scores, patient_ids = cohort
    names = ["edema", "emphysema", "rib_fracture"]
    first = auroc_intervals(labels, scores, names, patient_ids, repeats=40, seed=1)
    order = np.random.default_rng(0).permutation(len(labels))
    assert auroc_intervals(labels[order], scores[order], names, [patient_ids[i] for i in order], repeats=40, seed=1) == first
    assert bootstrap_interval(auroc_statistic(labels[:, 0], scores[:, 0]), patient_ids, repeats=40, seed=1) == first["edema"]
    monkeypatch.setattr("medvl.metrics.bootstrap._CHUNK", 60 * 7)
    assert auroc_intervals(labels, scores, names, patient_ids, repeats=40, seed=1) == first
    assert auroc_intervals(labels, scores, names, patient_ids, repeats=40, seed=2) != first


def test_a_finding_without_both_classes_is_left_out_of_the_mean():
    labels = np.array([[1.0, 0], [0, 0], [1, 0], [0, 0]])
    scores = np.array([[0.9, 0.1], [0.1, 0.2], [0.2, 0.3], [0.3, 0.4]])
    got = auroc_intervals(labels, scores, ["edema", "emphysema"], list("abcd"), repeats=200)
    assert math.isnan(got["emphysema"].value) and math.isnan(got["emphysema"].ci_low) and got["emphysema"].skipped == 200
    assert got[MACRO].value == got["edema"].value == 0.75
    assert got[MACRO].repeats == got["edema"].repeats < 200  # some resamples hold one class only
    assert json.loads(json.dumps(got["emphysema"].to_dict(), allow_nan=False))["value"] is None


def test_patients_not_rows_are_resampled():
    """Twenty rows of one value a patient carry no more than one: the interval must not shrink by sqrt(20)."""
    values = np.random.default_rng(0).normal(size=50)
    by_patient = bootstrap_interval(mean_statistic(np.repeat(values, 20)), [f"p{i // 20}" for i in range(1000)])
    single = bootstrap_interval(mean_statistic(values), [f"p{i:02d}" for i in range(50)])
    as_rows = bootstrap_interval(mean_statistic(np.repeat(values, 20)), [f"r{i}" for i in range(1000)])
    width = single.ci_high - single.ci_low
    assert by_patient.ci_high - by_patient.ci_low == pytest.approx(width, rel=0.15)
    assert as_rows.ci_high - as_rows.ci_low < width / 3


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(11)
    covered = 0
    truth = 0.5 * (1 + math.erf(1 / 2))  # two unit normals one apart: Phi(1 / sqrt 2)
    for seed in range(150):
        labels = np.repeat([1.0, 0.0], 60)
        got = bootstrap_interval(auroc_statistic(labels, labels + generator.normal(size=120)), range(120), repeats=200, seed=seed)
        covered += got.ci_low <= truth <= got.ci_high
    assert 0.89 <= covered / 150 <= 0.99


def test_bootstrap_refuses_what_does_not_fit():
    statistic = mean_statistic([1.0, 2.0])
    with pytest.raises(ValueError, match="2 rows for 3 patient ids"):
        bootstrap_interval(statistic, ["a", "b", "c"])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(statistic, ["a", "b"], level=95)
    with pytest.raises(ValueError, match="no rows"):
        bootstrap_interval(mean_statistic([]), [])
    with pytest.raises(ValueError, match="macro"):
        bootstrap_intervals({MACRO: statistic}, ["a", "b"])
    assert bootstrap_interval(statistic, ["a", "b"], repeats=0).value == 1.5
    assert math.isnan(bootstrap_interval(statistic, ["a", "b"], repeats=0).ci_low)


def test_mean_intervals_ignore_what_is_not_there():
    values = np.array([[1.0, np.nan], [0, 0], [1, np.nan], [np.nan, np.nan]])
    got = mean_intervals(values, ["lung_nodule", "pneumothorax"], ["a", "a", "b", "c"], repeats=20)
    assert got["lung_nodule"].value == pytest.approx(2 / 3)
    assert (got["pneumothorax"].value, got["pneumothorax"].n) == (0.0, 1)
    assert (got[MACRO].value, got[MACRO].n, got[MACRO].n_patients) == (pytest.approx(1 / 3), 3, 2)


@given(
    st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(math.nan)), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
)
def test_weighted_median_is_the_median_of_repeated_rows(values, rng):
    statistic = median_statistic(values)
    weights = np.array([[rng.randrange(4) for _ in values] for _ in range(6)], dtype=float)
    for got, row in zip(statistic.of_weights(weights), weights, strict=True):
        repeated = [v for v, w in zip(values, row, strict=True) for _ in range(int(w)) if not math.isnan(v)]
        assert got == median(repeated) if repeated else math.isnan(got)


def test_a_quotient_of_sums_weighs_its_rows():
    statistic = ratio_statistic([1, 0, 3, 0], [2, 0, 4, 1])
    assert statistic.used.tolist() == [True, False, True, True]
    assert statistic.of_weights(np.array([[1.0, 1, 1, 1], [0, 5, 2, 0], [0, 1, 0, 0]]))[:2].tolist() == pytest.approx([4 / 7, 6 / 8])
    assert math.isnan(statistic.of_weights(np.array([[0.0, 1, 0, 0]]))[0])
    for top, bottom, says in (([1], [-1], "0 or more"), ([math.nan], [1], "finite"), ([1, 2], [1], "shape")):
        with pytest.raises(ValueError, match=says):
            ratio_statistic(top, bottom)
    with pytest.raises(ValueError, match="expected"):
        median_statistic(np.zeros((2, 2)))


def test_interval_is_strict_json():
    assert "n_positive" not in Interval(0.5, 0.4, 0.6, 10, 8).to_dict()
    assert Interval(math.nan, math.nan, math.nan, 0, 0, 0).to_dict()["n_positive"] == 0


# --- pointing game


def test_peak_is_the_maximum_and_never_a_nan():
    similarity = np.array([[np.nan, 0.1, 0.2], [0.3, 0.9, np.nan]])
    assert peak(similarity) == (1, 1)
    assert pointing_game(peak(similarity), np.array([[0, 0, 0], [0, 1, 0]])) == 1.0
    assert pointing_game(peak(similarity), np.array([[1, 1, 1], [1, 0, 1]])) == 0.0


@pytest.mark.parametrize("similarity", [np.full((4, 5), np.nan), np.full((4, 5), 0.3), np.where(np.eye(4) > 0, 0.3, np.nan)])
def test_a_map_that_points_nowhere_is_a_miss(similarity):
    assert peak(similarity) is None
    assert pointing_game(peak(similarity), np.ones(similarity.shape)) == 0.0
    assert pointing_game(tied_peaks(similarity), np.ones(similarity.shape)) == 0.0


def test_a_plateau_is_pointed_at_in_its_middle_and_counts_by_its_share():
    similarity = np.zeros((6, 6))
    similarity[0:3, 3:6] = 1
    assert peak(similarity) == (1, 4)
    mask = np.zeros((6, 6), dtype=bool)
    mask[0, 3:5] = True
    assert pointing_game(tied_peaks(similarity), mask) == pytest.approx(2 / 9)
    similarity[1, 4] = 0
    assert peak(similarity) == (0, 4)  # of the four nearest the centroid, the first row by row


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_pointing_game_equals_a_plain_search(rows, cols, rng):
    similarity = np.array([[rng.choice([0.0, 0.5, 1.0, math.nan]) for _ in range(cols)] for _ in range(rows)])
    mask = np.array([[rng.random() < 0.4 for _ in range(cols)] for _ in range(rows)])
    mask[rng.randrange(rows), rng.randrange(cols)] = True
    known = [similarity[r, c] for r in range(rows) for c in range(cols) if not math.isnan(similarity[r, c])]
    where = [(r, c) for r in range(rows) for c in range(cols) if known and similarity[r, c] == max(known)]
    if not known or (len(known) > 1 and len(set(known)) == 1):
        assert peak(similarity) is None
    else:
        assert peak(similarity) in where
        assert pointing_game(tied_peaks(similarity), mask) == pytest.approx(sum(bool(mask[at]) for at in where) / len(where))


def test_pointing_game_refuses_an_empty_mask_and_other_pixels():
    with pytest.raises(ValueError, match="leave the study out"):
        pointing_game((0, 0), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="must share it"):
        pointing_game((5, 0), np.ones((3, 3)))
    with pytest.raises(ValueError, match="rows, cols"):
        peak(np.zeros(3))


# --- retrieval


def plain_recall(scores, relevant, k):
    """Share of all orders that respect the scores in which a relevant item comes among the first k, exactly."""
    hits = total = 0
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            total += 1
            hits += any(relevant[i] for i in order[:k])
    return Fraction(hits, total)


def plain_rank(scores, relevant):
    ranks = [
        next(place for place, i in enumerate(order, start=1) if relevant[i])
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return Fraction(sum(ranks), len(ranks))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.randoms(use_true_random=False))
def test_recall_equals_the_mean_over_all_orders_of_ties(queries, pool, k, rng):
    scores = [[float(rng.randrange(3)) for _ in range(pool)] for _ in range(queries)]
    relevant = [[rng.random() < 0.3 for _ in range(pool)] for _ in range(queries)]
    for row in relevant:
        row[rng.randrange(pool)] = True
    got = recall_at_k(np.array(scores), np.array(relevant), [k], range(queries), repeats=0)
    expected = [plain_recall(s, m, k) for s, m in zip(scores, relevant, strict=True)]
    assert got.recall[k].value == pytest.approx(float(sum(expected) / queries))
    assert got.ranks.tolist() == pytest.approx([float(plain_rank(s, m)) for s, m in zip(scores, relevant, strict=True)])
    by_chance = [plain_recall([0.0] * pool, m, k) for m in relevant]
    assert got.chance[k] == pytest.approx(float(sum(by_chance) / queries))


def test_recall_of_strict_pairs_and_of_duplicates():
    generator = np.random.default_rng(5)
    texts = generator.integers(40, size=120)
    image = generator.normal(size=(120, 16))
    text = generator.normal(size=(40, 16))[texts]  # the same text has the same embedding
    image += text
    similarity = np.round(image @ text.T, 6)  # a matrix product may give equal columns that differ in the last bit
    strict = recall_at_k(similarity, np.eye(120, dtype=bool), [1, 10], range(120), repeats=50)
    duplicates = recall_at_k(similarity, texts[:, None] == texts[None, :], [1, 10], range(120), repeats=50)
    assert strict.pool == 120
    assert strict.chance == pytest.approx({1: 1 / 120, 10: 10 / 120})
    # one query at a time, with numpy's own sort: the pair's expected place among its equals, and the best duplicate
    for q in range(120):
        order = np.argsort(-similarity[q], kind="stable")
        best = int(np.argmax(texts[order] == texts[q])) + 1
        equals = int((texts == texts[q]).sum())
        assert duplicates.ranks[q] == pytest.approx(best)
        assert strict.ranks[q] == pytest.approx(best + (equals - 1) / 2)
    assert duplicates.recall[1].value > strict.recall[1].value > strict.chance[1]
    assert strict.recall[10].n == 120 and strict.recall[10].ci_low <= strict.recall[10].value <= strict.recall[10].ci_high


def test_recall_refuses_what_it_cannot_count():
    eye = np.eye(3, dtype=bool)
    with pytest.raises(ValueError, match="query row 1"):
        recall_at_k(np.array([[1.0, 0, 0], [0, math.nan, 0], [0, 0, 1]]), eye, [1], range(3))
    with pytest.raises(ValueError, match="1 queries, the first in row 2"):
        recall_at_k(np.zeros((3, 3)), eye & (np.arange(3) < 2), [1], range(3))
    with pytest.raises(ValueError, match="every K"):
        recall_at_k(np.zeros((3, 3)), eye, [0], range(3))
    with pytest.raises(ValueError, match="bool"):
        recall_at_k(np.zeros((3, 3)), np.eye(3), [1], range(3))


def test_a_random_order_is_at_chance():
    rng = random.Random(0)
    similarity = np.array([[rng.random() for _ in range(200)] for _ in range(200)])
    got = recall_at_k(similarity, np.eye(200, dtype=bool), [20], range(200))
    assert got.recall[20].ci_low <= got.chance[20] == 0.1 <= got.recall[20].ci_high
