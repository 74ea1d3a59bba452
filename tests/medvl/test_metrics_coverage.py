"""Intervals of the patient-level bootstrap cover the truth as often as they say, on cohorts whose truth is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from medvl.metrics import (
    auprc_statistic,
    auroc_statistic,
    bootstrap_intervals,
    brier_statistic,
    delong_interval,
    f1_statistic,
    mcc_statistic,
    sensitivity_statistic,
    specificity_statistic,
)

PATIENTS = 300
SHIFT, SHARED = 1.2, 0.5  # what a finding adds to a score; the share of a score's variance that is the patient's
ILL, CHANGES = 0.35, 0.1  # patients with the finding, and the chance that one study of theirs says otherwise
PREVALENCE = ILL * (1 - CHANGES) + (1 - ILL) * CHANGES
THRESHOLD = 0.8


def clustered_cohort(generator):
    """One to four studies a patient, whose labels and whose scores go together; of any study alone the score is N(SHIFT * label, 1)."""
    studies = generator.integers(1, 5, size=PATIENTS)
    member = np.repeat(np.arange(PATIENTS), studies)
    ill, offset = generator.random(PATIENTS) < ILL, generator.normal(size=PATIENTS)
    labels = ill[member] ^ (generator.random(len(member)) < CHANGES)
    noise = generator.normal(size=len(member))
    return labels.astype(float), SHIFT * labels + math.sqrt(SHARED) * offset[member] + math.sqrt(1 - SHARED) * noise, member


def truths():
    """Each metric of the population that cohorts are drawn from."""
    found, right = norm.sf(THRESHOLD - SHIFT), norm.cdf(THRESHOLD)
    tp, fn, tn, fp = PREVALENCE * found, PREVALENCE * (1 - found), (1 - PREVALENCE) * right, (1 - PREVALENCE) * (1 - right)

    def precision(t):
        called = PREVALENCE * norm.sf(t - SHIFT)
        return called / (called + (1 - PREVALENCE) * norm.sf(t))

    return {
        "auroc": norm.cdf(SHIFT / math.sqrt(2)),
        "auprc": quad(lambda t: norm.pdf(t - SHIFT) * precision(t), -8, 8)[0],
        "brier": PREVALENCE * quad(lambda t: norm.pdf(t - SHIFT) * (1 - expit(t)) ** 2, -8, 10)[0]
        + (1 - PREVALENCE) * quad(lambda t: norm.pdf(t) * expit(t) ** 2, -9, 9)[0],
        "f1": 2 * tp / (2 * tp + fp + fn),
        "mcc": (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
        "sensitivity": found,
        "specificity": right,
    }


@pytest.mark.slow
def test_intervals_cover_the_truth_on_clustered_patients():
    generator = np.random.default_rng(0)
    truth = truths()
    covered = dict.fromkeys([*truth, "delong", "rows"], 0)
    cohorts = 2000
    for seed in range(cohorts):
        labels, scores, member = clustered_cohort(generator)
        statistics = {
            "auroc": auroc_statistic(labels, scores),
            "auprc": auprc_statistic(labels, scores),
            "brier": brier_statistic(labels, expit(scores)),
            "f1": f1_statistic(labels, scores, THRESHOLD),
            "mcc": mcc_statistic(labels, scores, THRESHOLD),
            "sensitivity": sensitivity_statistic(labels, scores, THRESHOLD),
            "specificity": specificity_statistic(labels, scores, THRESHOLD),
        }
        got = bootstrap_intervals(statistics, member, repeats=400, seed=seed)
        intervals = {name: got[name] for name in truth}
        for name, interval in intervals.items():
            covered[name] += interval.ci_low <= truth[name] <= interval.ci_high
        by_patient, by_row = delong_interval(labels, scores, member), delong_interval(labels, scores)
        covered["delong"] += by_patient.ci_low <= truth["auroc"] <= by_patient.ci_high
        covered["rows"] += by_row.ci_low <= truth["auroc"] <= by_row.ci_high
    share = {name: count / cohorts for name, count in covered.items()}
    assert share.pop("rows") < 0.93, share  # rows as if they were patients: too narrow, or the cohorts are not clustered
    assert all(0.93 <= value <= 0.97 for value in share.values()), share
