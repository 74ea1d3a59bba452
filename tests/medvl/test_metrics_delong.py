"""DeLong against the definition pair by pair, and paired bootstrap against a plain loop and against DeLong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare, norm
from sklearn.metrics import roc_auc_score

from medvl.metrics import (
    MACRO,
    auroc_statistic,
    bootstrap_interval,
    combined,
    compare_models,
    delong_covariance,
    delong_interval,
    delong_test,
    sensitivity_statistic,
)


def psi(x, y):
    return 1.0 if x > y else 0.5 if x == y else 0.0


def plain_covariance(labels, models):
    """AUROCs and their covariance from the definition: every positive against every negative, sample covariances in plain loops."""
    xs = [i for i, y in enumerate(labels) if y]
    ys = [i for i, y in enumerate(labels) if not y]
    v10 = [[sum(psi(s[i], s[j]) for j in ys) / len(ys) for i in xs] for s in models]
    v01 = [[sum(psi(s[i], s[j]) for i in xs) / len(xs) for j in ys] for s in models]
    aucs = [sum(v) / len(v) for v in v10]

    def covariance(v, a, b):
        return sum((p - aucs[a]) * (q - aucs[b]) for p, q in zip(v[a], v[b], strict=True)) / (len(v[a]) - 1)

    k = range(len(models))
    return aucs, [[covariance(v10, a, b) / len(xs) + covariance(v01, a, b) / len(ys) for b in k] for a in k]


def plain_clustered_variance(labels, scores, patients):
    """Obuchowski's variance of one AUROC, patient by patient."""
    xs = [i for i, y in enumerate(labels) if y]
    ys = [i for i, y in enumerate(labels) if not y]
    v10 = {i: sum(psi(scores[i], scores[j]) for j in ys) / len(ys) for i in xs}
    v01 = {j: sum(psi(scores[i], scores[j]) for i in xs) / len(xs) for j in ys}
    auc = sum(v10.values()) / len(xs)
    s10 = s01 = s11 = 0.0
    for patient in set(patients):
        mine = [i for i, name in enumerate(patients) if name == patient]
        a = sum(v10[i] - auc for i in mine if labels[i])
        b = sum(v01[i] - auc for i in mine if not labels[i])
        s10, s01, s11 = s10 + a * a, s01 + b * b, s11 + a * b
    i10, i01, i = len({patients[x] for x in xs}), len({patients[y] for y in ys}), len(set(patients))
    m, n = len(xs), len(ys)
    return s10 * i10 / (i10 - 1) / m**2 + s01 * i01 / (i01 - 1) / n**2 + 2 * s11 * i / (i - 1) / (m * n)


score = st.one_of(st.integers(-2, 2).map(float), st.floats(-100, 100))
rows = st.lists(st.tuples(st.booleans(), score, score, score), min_size=4, max_size=25)


@given(rows)
def test_covariance_equals_the_definition(rows):
    labels, *models = (list(column) for column in zip(*rows, strict=True))
    assume(2 <= sum(labels) <= len(labels) - 2)
    values, covariance = delong_covariance(np.array(labels), np.array(models))
    expected, expected_covariance = plain_covariance(labels, models)
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    assert covariance == pytest.approx(np.array(expected_covariance), abs=1e-12)
    one = delong_interval(labels, models[0], level=0.9)
    assert one.value == pytest.approx(roc_auc_score(labels, models[0]), abs=1e-12)
    assert one.standard_error == pytest.approx(math.sqrt(max(expected_covariance[0][0], 0)), abs=1e-9)
    assert one.ci_high == pytest.approx(min(1, expected[0] + norm.ppf(0.95) * math.sqrt(max(expected_covariance[0][0], 0))), abs=1e-6)


@given(rows)
def test_paired_test_equals_the_definition(rows):
    labels, a, b, _ = (list(column) for column in zip(*rows, strict=True))
    assume(2 <= sum(labels) <= len(labels) - 2)
    aucs, c = plain_covariance(labels, [a, b])
    variance = c[0][0] + c[1][1] - 2 * c[0][1]
    got = delong_test(labels, a, b)
    assert got.difference == pytest.approx(aucs[0] - aucs[1], abs=1e-12)
    assert got.standard_error == pytest.approx(math.sqrt(max(variance, 0)), abs=1e-7)
    if variance > 1e-9:
        assert got.p_value == pytest.approx(2 * norm.sf(abs(aucs[0] - aucs[1]) / math.sqrt(variance)), abs=1e-7)
        assert delong_test(labels, b, a).p_value == pytest.approx(got.p_value)


@given(rows, st.randoms(use_true_random=False))
def test_rows_of_one_patient_are_summed_first(rows, rng):
    labels, a, b, _ = (list(column) for column in zip(*rows, strict=True))
    patients = [f"p{rng.randrange(8)}" for _ in rows]
    assume(len({p for p, y in zip(patients, labels, strict=True) if y}) >= 2)
    assume(len({p for p, y in zip(patients, labels, strict=True) if not y}) >= 2)
    got = delong_interval(labels, a, patients)
    assert got.standard_error**2 == pytest.approx(max(plain_clustered_variance(labels, a, patients), 0), abs=1e-12)
    assert got.n_patients == len(set(patients))
    alone = [str(i) for i in range(len(rows))]
    assert delong_test(labels, a, b, alone).standard_error == pytest.approx(delong_test(labels, a, b).standard_error, abs=1e-9)


def test_delong_where_there_is_nothing_to_measure():
    labels, scores = [1, 1, 0, 0, -1, math.nan], [0.9, 0.6, 0.7, 0.1, 0.4, math.nan]
    same = delong_test(labels, scores, [10 * s for s in scores])
    assert (same.difference, same.standard_error, same.z, same.p_value, same.n) == (0, 0, 0, 1, 4)
    sure = delong_test([1, 1, 0, 0], [2, 2, 1, 1], [1, 1, 1, 1])
    assert sure.difference == 0.5 and math.isnan(sure.p_value) and sure.to_dict()["p_value"] is None  # no error to measure it by
    assert math.isnan(delong_interval([1, 1], [1, 2]).value)
    lonely = delong_interval([1, 0, 0], [0.5, 0.2, 0.7])
    assert lonely.value == 0.5 and math.isnan(lonely.standard_error) and math.isnan(lonely.ci_low)
    json.dumps(lonely.to_dict(), allow_nan=False)
    perfect = delong_interval([1, 1, 0, 0], [3, 4, 1, 2])
    assert (perfect.ci_low, perfect.ci_high) == (1, 1)
    with pytest.raises(ValueError, match="patient ids"):
        delong_interval([1, 0], [0.5, 0.2], ["a"])
    with pytest.raises(ValueError, match="level"):
        delong_test([1, 0], [0.5, 0.2], [0.1, 0.2], level=95)


def test_p_values_of_equal_models_are_uniform():
    generator = np.random.default_rng(0)
    p = []
    for _ in range(1000):
        labels = generator.random(200) < 0.3
        truth = labels + generator.normal(size=200)
        p.append(delong_test(labels, truth + generator.normal(size=200), truth + generator.normal(size=200)).p_value)
    assert chisquare(np.histogram(p, bins=10, range=(0, 1))[0]).pvalue > 0.01


# --- paired bootstrap


@pytest.fixture
def two_models():
    generator = np.random.default_rng(4)
    patient_ids = [f"p{i}" for i in generator.integers(120, size=240)]
    labels = (generator.random((240, 2)) < 0.4).astype(float)
    labels[generator.random((240, 2)) < 0.05] = np.nan
    truth = np.nan_to_num(labels) + generator.normal(size=(240, 2))
    first, second = truth + 0.3 * generator.normal(size=(240, 2)), truth + 0.8 * generator.normal(size=(240, 2))
    return labels, first, second, patient_ids


def statistics(labels, scores):
    return {"edema": auroc_statistic(labels[:, 0], scores[:, 0]), "effusion": auroc_statistic(labels[:, 1], scores[:, 1])}


def test_paired_comparison_equals_a_plain_loop(two_models):
    labels, first, second, patient_ids = two_models
    got = compare_models(statistics(labels, first), statistics(labels, second), patient_ids, repeats=60, seed=2)
    patients = sorted(set(patient_ids))
    generator = np.random.default_rng(2)
    draws = []
    for _ in range(60):
        drawn = [patients[i] for i in generator.integers(len(patients), size=len(patients))]
        rows = np.array([row for name in drawn for row, owner in enumerate(patient_ids) if owner == name])
        difference = []
        for f in range(2):
            kept = rows[~np.isnan(labels[rows, f])]
            difference.append(roc_auc_score(labels[kept, f], first[kept, f]) - roc_auc_score(labels[kept, f], second[kept, f]))
        draws.append(difference)
    columns = dict(zip(("edema", "effusion"), np.array(draws).T, strict=True)) | {MACRO: np.mean(draws, axis=1)}
    for name, values in columns.items():
        d = got[name].difference
        assert (d.ci_low, d.ci_high) == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)
        assert got[name].p_value == pytest.approx(min(1, 2 * (1 + min((values <= 0).sum(), (values >= 0).sum())) / 61))
        assert d.value == pytest.approx(got[name].first.value - got[name].second.value)
    alone = bootstrap_interval(auroc_statistic(labels[:, 0], first[:, 0]), patient_ids, repeats=60, seed=2)
    assert got["edema"].first == alone
    by_sum = combined([(1, statistics(labels, first)["edema"]), (-1, statistics(labels, second)["edema"])])
    assert got["edema"].difference == bootstrap_interval(by_sum, patient_ids, repeats=60, seed=2)
    json.dumps(got[MACRO].to_dict(), allow_nan=False)


def test_paired_bootstrap_and_delong_agree(two_models):
    labels, first, second, patient_ids = two_models
    by_bootstrap = compare_models(statistics(labels, first), statistics(labels, second), patient_ids, repeats=4000)["edema"].difference
    by_delong = delong_test(labels[:, 0], first[:, 0], second[:, 0], patient_ids)
    assert by_bootstrap.value == pytest.approx(by_delong.difference)
    assert by_bootstrap.ci_high - by_bootstrap.ci_low == pytest.approx(by_delong.ci_high - by_delong.ci_low, rel=0.1)
    unpaired = math.hypot(*(delong_interval(labels[:, 0], scores[:, 0], patient_ids).standard_error for scores in (first, second)))
    assert by_delong.standard_error < 0.8 * unpaired  # what is hard for both does not count


def test_equal_models_do_not_differ_and_others_are_refused(two_models):
    labels, first, _, patient_ids = two_models
    same = compare_models(statistics(labels, first), statistics(labels, 2 * first), patient_ids, repeats=20)
    assert same["edema"].difference.value == 0 and same["edema"].p_value == 1
    assert math.isnan(compare_models(statistics(labels, first), statistics(labels, first), patient_ids, repeats=0)["edema"].p_value)
    other = sensitivity_statistic(np.ones(240), first[:, 0], 0.5)
    with pytest.raises(ValueError, match="edema: the two models count different rows"):
        compare_models({"edema": statistics(labels, first)["edema"]}, {"edema": other}, patient_ids)
    with pytest.raises(ValueError, match="only one has"):
        compare_models(statistics(labels, first), {"edema": other}, patient_ids)
    with pytest.raises(ValueError, match=MACRO):
        compare_models({MACRO: other}, {MACRO: other}, patient_ids)
