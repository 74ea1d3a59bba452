"""Metrics of probabilities and decisions against scikit-learn on repeated rows, against plain loops, and the table against its parts."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    matthews_corrcoef,
    recall_score,
    roc_auc_score,
)

from medvl.metrics import (
    MACRO,
    auprc_statistic,
    auroc_intervals,
    auroc_statistic,
    bootstrap_interval,
    brier_statistic,
    calibration_error_statistic,
    classification_table,
    f1_statistic,
    label_counts,
    mcc_statistic,
    sensitivity_statistic,
    specificity_statistic,
)

kinds = st.sampled_from([0.0, 0.0, 1.0, 1.0, -1.0, math.nan])
tied = st.tuples(kinds, st.integers(0, 4).map(lambda i: i / 4), st.integers(0, 3))
any_probability = st.tuples(kinds, st.floats(0, 1), st.integers(0, 3))
cohorts = st.one_of(st.lists(tied, min_size=2, max_size=40), st.lists(any_probability, min_size=2, max_size=40))

REFERENCES = {  # what scikit-learn gives for labels, probabilities and decisions
    "auroc": lambda y, p, called: roc_auc_score(y, p),
    "auprc": lambda y, p, called: average_precision_score(y, p),
    "brier": lambda y, p, called: brier_score_loss(y, p),
    "f1": lambda y, p, called: f1_score(y, called),
    "mcc": lambda y, p, called: matthews_corrcoef(y, called),
    "sensitivity": lambda y, p, called: recall_score(y, called),
    "specificity": lambda y, p, called: recall_score(y, called, pos_label=0),
}


def statistics(labels, p, threshold):
    return {
        "auroc": auroc_statistic(labels, p),
        "auprc": auprc_statistic(labels, p),
        "brier": brier_statistic(labels, p),
        "f1": f1_statistic(labels, p, threshold),
        "mcc": mcc_statistic(labels, p, threshold),
        "sensitivity": sensitivity_statistic(labels, p, threshold),
        "specificity": specificity_statistic(labels, p, threshold),
    }


@given(cohorts, st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0, 1.5]))
def test_metrics_equal_scikit_learn_on_repeated_rows(rows, threshold):
    labels, p, times = (np.array(column) for column in zip(*rows, strict=True))
    kept = np.isin(labels, (0, 1))
    for weights in (np.ones(len(rows), dtype=int), times):
        y, values = np.repeat(labels, kept * weights).astype(int), np.repeat(p, kept * weights)
        for name, statistic in statistics(labels, p, threshold).items():
            got = statistic.of_weights(weights[None].astype(float))[0]
            assert statistic.used.tolist() == kept.tolist() and statistic.n_positive == (labels == 1).sum()
            if len(set(y.tolist())) == 2:
                assert got == pytest.approx(REFERENCES[name](y, values, values >= threshold), abs=1e-12), name
            elif name in ("auroc", "mcc"):
                assert math.isnan(got)


def test_what_one_label_leaves_undefined():
    for label, undefined in ((0, {"auroc", "auprc", "f1", "mcc", "sensitivity"}), (1, {"auroc", "mcc", "specificity"})):
        found = statistics(np.full(4, label), np.array([0.1, 0.6, 0.7, 0.8]), 0.5)
        assert {name for name, statistic in found.items() if math.isnan(statistic.value)} == undefined
    assert all(math.isnan(statistic.value) for statistic in statistics(np.array([-1, np.nan]), np.array([0.1, 0.2]), 0.5).values())


def test_metrics_refuse_what_they_cannot_take():
    with pytest.raises(ValueError, match="calibrate the scores first"):
        brier_statistic([1, 0], [0.5, 1.2])
    with pytest.raises(ValueError, match="calibrate the scores first"):
        calibration_error_statistic([1, 0], [-0.1, 0.3])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        auprc_statistic([1, 0, -1], [0.5, math.nan, math.nan])
    assert auprc_statistic([1, 0, -1], [0.5, 0.2, math.nan]).value == 1.0  # a score may be missing where the label does not count
    with pytest.raises(ValueError, match="threshold is NaN"):
        f1_statistic([1, 0], [0.5, 0.2], math.nan)
    with pytest.raises(ValueError, match="one bin"):
        calibration_error_statistic([1, 0], [0.5, 0.2], bins=0)
    with pytest.raises(ValueError, match="of equal height"):
        calibration_error_statistic([1, 0], [0.5, 0.2], binning="height")
    with pytest.raises(ValueError, match=r"\(N,\)"):
        auprc_statistic([[1, 0]], [[0.5, 0.2]])
    with pytest.raises(ValueError, match="uncertain"):
        label_counts([1, 0, 2])


# --- calibration error


def plain_ece(labels, probabilities, bin_of):
    """Mean over bins, by rows, of |share of positives - mean probability|, in exact fractions."""
    bins: dict[int, list[tuple[int, Fraction]]] = {}
    for y, p, b in zip(labels, probabilities, bin_of, strict=True):
        bins.setdefault(b, []).append((int(y), Fraction(p)))
    gaps = [len(rows) * abs(Fraction(sum(y for y, _ in rows), len(rows)) - sum(p for _, p in rows) / len(rows)) for rows in bins.values()]
    return float(sum(gaps) / len(labels))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 16)), min_size=1, max_size=40), st.integers(1, 5))
def test_ece_of_equal_width_equals_a_plain_loop(rows, doublings):
    bins = 2**doublings  # their edges are exact in binary, as the probabilities are
    labels, p = [y for y, _ in rows], [i / 16 for _, i in rows]
    member = [max(math.ceil(Fraction(value) * bins) - 1, 0) for value in p]
    assert calibration_error_statistic(labels, p, bins).value == pytest.approx(plain_ece(labels, p, member), abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12), st.randoms(use_true_random=False))
def test_ece_of_equal_mass_has_bins_of_equally_many_rows(labels, bins, rng):
    p = [i / 1000 for i in sorted(rng.sample(range(1001), len(labels)))]
    member = [bins * i // len(labels) for i in range(len(labels))]
    sizes = [member.count(b) for b in set(member)]
    assert max(sizes) - min(sizes) <= 1
    order = list(range(len(labels)))
    rng.shuffle(order)
    got = calibration_error_statistic([labels[i] for i in order], [p[i] for i in order], bins, "mass").value
    assert got == pytest.approx(plain_ece(labels, p, member), abs=1e-12)


def test_ece_of_equal_mass_keeps_equal_probabilities_together():
    labels, p = [1, 0, 0, 1, 1, 1], [0.2, 0.2, 0.2, 0.2, 0.9, 0.9]
    assert calibration_error_statistic(labels, p, 3, "mass").value == pytest.approx((abs(2 - 0.8) + abs(2 - 1.8)) / 6)
    labels, p = [1, 0, 0, 0, 0, 0], [0.1, 0.5, 0.5, 0.5, 0.5, 0.5]  # a tie goes where its middle lies, here to the upper of two bins
    assert calibration_error_statistic(labels, p, 2, "mass").value == pytest.approx((0.9 + 2.5) / 6)


def test_ece_of_resamples_keeps_the_bins_and_counts_rows_by_weight():
    generator = np.random.default_rng(2)
    labels, p = (generator.random(50) < 0.4).astype(float), np.round(generator.random(50), 2)
    weights = generator.integers(0, 4, size=50)
    member = [max(math.ceil(Fraction(str(value)) * 10) - 1, 0) for value in p.tolist()]
    got = calibration_error_statistic(labels, p, 10).of_weights(weights[None].astype(float))[0]
    repeated = (np.repeat(column, weights).tolist() for column in (labels, p, member))
    assert got == pytest.approx(plain_ece(*repeated), abs=1e-12)


# --- the table


@pytest.fixture
def cohort():
    generator = np.random.default_rng(5)
    patient_ids = [f"p{i}" for i in generator.integers(60, size=150)]
    labels = (generator.random((150, 4)) < (0.4, 0.3, 0.5, 0.0)).astype(float)
    scores = labels + generator.normal(size=(150, 4))
    labels[generator.random((150, 4)) < 0.1] = np.nan
    labels[generator.random((150, 4)) < 0.05] = -1
    return labels, scores, patient_ids


NAMES = ["edema", "atelectasis", "effusion", "rib_fracture"]


def test_table_is_made_of_the_metrics_and_leaves_out_what_has_one_label(cohort):
    labels, scores, patient_ids = cohort
    p = 1 / (1 + np.exp(-scores))
    thresholds = {"edema": 0.5, "effusion": 0.7, "rib_fracture": 0.5}
    table = classification_table(labels, scores, NAMES, patient_ids, thresholds=thresholds, probabilities=p, repeats=60, seed=3)

    assert table.metrics["brier"]["edema"] == bootstrap_interval(brier_statistic(labels[:, 0], p[:, 0]), patient_ids, repeats=60, seed=3)
    f1 = bootstrap_interval(f1_statistic(labels[:, 2], scores[:, 2], 0.7), patient_ids, repeats=60, seed=3)
    assert table.metrics["f1"]["effusion"] == f1 and set(table.metrics["f1"]) == set(thresholds)
    alone = auroc_intervals(labels[:, :3], scores[:, :3], NAMES[:3], patient_ids, repeats=60, seed=3)
    assert table.macro["auroc"].interval == alone[MACRO]
    assert table.macro["auroc"].left_out == ("rib_fracture",)
    assert math.isnan(table.metrics["auroc"]["rib_fracture"].value)

    brier = {name: table.metrics["brier"][name].value for name in NAMES}
    assert not math.isnan(brier["rib_fracture"])  # defined by one label, and yet not in the mean
    assert table.macro["brier"].interval.value == pytest.approx(sum(brier[name] for name in NAMES[:3]) / 3)
    assert (table.macro["f1"].findings, table.macro["f1"].left_out) == (("edema", "effusion"), ("atelectasis", "rib_fracture"))
    assert math.isnan(table.metrics["sensitivity"]["rib_fracture"].value)

    for f, name in enumerate(NAMES):
        column = labels[:, f].tolist()
        counts = table.counts[name]
        told = (counts.positive, counts.negative, counts.uncertain, counts.unmentioned)
        assert told == (column.count(1), column.count(0), column.count(-1), sum(map(math.isnan, column)))
        assert table.metrics["auroc"][name].n == counts.positive + counts.negative
    assert min(table.counts["edema"].uncertain, table.counts["edema"].unmentioned) > 0
    record = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert record["findings"]["rib_fracture"]["labels"]["positive"] == 0 and record["findings"]["rib_fracture"]["auroc"]["value"] is None
    assert record["macro"]["f1"]["n_findings"] == 2


def test_table_without_probabilities_or_thresholds_has_the_ranking_alone(cohort):
    labels, scores, patient_ids = cohort
    table = classification_table(labels[:, 3:], scores[:, 3:], NAMES[3:], patient_ids, repeats=10)
    assert set(table.metrics) == {"auroc", "auprc"}
    assert math.isnan(table.macro["auroc"].interval.value) and table.macro["auroc"].findings == ()


def test_table_says_which_finding_it_refuses(cohort):
    labels, scores, patient_ids = cohort
    broken = scores.copy()
    broken[np.flatnonzero(np.isin(labels[:, 1], (0, 1)))[0], 1] = np.nan
    with pytest.raises(ValueError, match="atelectasis: 1 of"):
        classification_table(labels, broken, NAMES, patient_ids)
    with pytest.raises(ValueError, match="not in the table"):
        classification_table(labels, scores, NAMES, patient_ids, thresholds={"oedema": 0.5})
    with pytest.raises(ValueError, match="a column per name"):
        classification_table(labels, scores, NAMES, patient_ids, probabilities=scores[:, :2])
    with pytest.raises(ValueError, match="must differ"):
        classification_table(labels, scores, ["a", "a", "b", "c"], patient_ids)
