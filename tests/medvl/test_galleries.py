"""Hard galleries and agreement by shares: against loops over pairs and orders, scikit-learn, and resamples drawn by hand."""

from __future__ import annotations

import itertools
import json
import math
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from medvl.metrics import expected_agreement, fact_agreement, first_is_right, gallery_metrics, pairwise_accuracy

scores = st.lists(st.sampled_from([-math.inf, 0.0, 0.5, 1.0]), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(scores, scores)
def test_pairs_and_first_places_equal_loops_over_pairs_and_orders(right: list[float], wrong: list[float]) -> None:
    pairs = [1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong]
    assert pairwise_accuracy(np.array(right), np.array(wrong)) == pytest.approx(fmean(pairs), abs=1e-12)
    items = [(score, True) for score in right] + [(score, False) for score in wrong]
    orders = [order for order in itertools.permutations(items) if all(a[0] >= b[0] for a, b in itertools.pairwise(order))]
    assert first_is_right(np.array(right), np.array(wrong)) == pytest.approx(fmean(order[0][1] for order in orders), abs=1e-12)


@pytest.fixture
def galleries() -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str], list[str]]:
    """40 galleries of 13 patients, of two kinds and sizes of all sorts; a few lack one side."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(40):
        right, wrong = (np.round(generator.normal(shift, 1, generator.integers(0, most)), 1) for shift, most in ((0.3, 3), (0, 6)))
        found.append((right, wrong))
    return found, [f"kind {i % 2}" for i in range(40)], [f"p{i % 13:02d}" for i in range(40)]


def test_figures_are_means_over_galleries_that_have_both_sides(galleries: Any) -> None:
    found, kinds, patients = galleries
    got = gallery_metrics(iter(found), kinds, patients, repeats=100, seed=5)
    kept = [i for i, (right, wrong) in enumerate(found) if len(right) and len(wrong)]
    assert 10 < len(kept) < 40
    values = {
        "pairwise_accuracy": {i: fmean((r > w) + (r == w) / 2 for r in found[i][0] for w in found[i][1]) for i in kept},
        "recall@1": {
            i: fmean(label for score, label in items if score == max(score for score, _ in items))
            for i in kept
            if (items := [*((r, 1) for r in found[i][0]), *((w, 0) for w in found[i][1])])
        },
    }
    for name, of in values.items():
        assert got.metrics[name].value == pytest.approx(fmean(of.values()), abs=1e-12)
        assert (got.metrics[name].n, got.metrics[name].n_patients) == (len(kept), len({patients[i] for i in kept}))
        for kind, metrics in got.per_kind.items():
            assert metrics[name].value == pytest.approx(fmean(value for i, value in of.items() if kinds[i] == kind), abs=1e-12)
        assert np.flatnonzero(~np.isnan(got.per_gallery[name])).tolist() == kept
    assert set(got.per_kind) == {"kind 0", "kind 1"}
    chance = fmean(len(found[i][0]) / (len(found[i][0]) + len(found[i][1])) for i in kept)
    assert got.chance == pytest.approx({"pairwise_accuracy": 0.5, "recall@1": chance})
    names, draws, generator = sorted(set(patients)), [], np.random.default_rng(5)
    for _ in range(100):
        drawn = [names[p] for p in generator.integers(len(names), size=len(names))]
        draws.append(fmean(values["recall@1"][i] for patient in drawn for i in kept if patients[i] == patient))
    interval = got.metrics["recall@1"]
    assert (interval.ci_low, interval.ci_high) == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())


def test_no_gallery_is_a_figure_that_is_not_defined_and_bad_ones_are_refused() -> None:
    nothing = np.zeros(0)
    for found in ([], [(np.ones(1), nothing), (nothing, np.ones(2))]):
        got = gallery_metrics(found, ["a"] * len(found), ["p"] * len(found))
        assert {one.n for one in got.metrics.values()} == {0} and got.per_kind == {}
        assert all(math.isnan(one.value) for one in got.metrics.values()) and all(map(math.isnan, got.chance.values()))
        json.dumps([one.to_dict() for one in got.metrics.values()], allow_nan=False)
    with pytest.raises(ValueError, match="gallery 1 has a score that is NaN"):
        gallery_metrics([(np.ones(1), np.ones(1)), (np.ones(1), np.array([math.nan]))], "ab", "ab")
    with pytest.raises(ValueError, match="1 galleries, 2 kinds and 1 patients"):
        gallery_metrics([(np.ones(1), np.ones(1))], "ab", "a")


@pytest.fixture
def facts() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(6)
    return tuple(generator.choice([1, 0, -1, -2], p=[0.35, 0.3, 0.1, 0.25], size=(n, 3)).astype(np.int8) for n in (30, 12))  # type: ignore[return-value]


def test_agreement_by_shares_is_that_of_every_pair_by_its_weight(facts: Any) -> None:
    """scikit-learn over all pairs of a query and a gallery study, each weighing its share."""
    query, gallery = facts
    share = np.random.default_rng(1).integers(0, 3, size=(30, 12)) + np.eye(30, 12)[np.arange(30) % 12]
    share /= share.sum(1, keepdims=True)
    got = expected_agreement(query, gallery, share, list("abc"), range(30), repeats=0)
    pairs = [(q, g) for q in range(30) for g in range(12)]
    functions: dict[str, Any] = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    for state, value in (("present", 1), ("absent", 0)):
        cells = [
            [(query[q, j] == value, gallery[g, j] == value, share[q, g]) for q, g in pairs if -1 not in (query[q, j], gallery[g, j])]
            for j in range(3)
        ]
        for name, function in functions.items():
            each = []
            for of in (*cells, list(itertools.chain(*cells))):
                truth, said, weight = zip(*of, strict=True)
                each.append(function(truth, said, sample_weight=weight))
            found = [got.per_finding[finding][f"{state}_{name}"].value for finding in "abc"]
            assert found == pytest.approx(each[:3], abs=1e-12)
            assert got.micro[f"{state}_{name}"].value == pytest.approx(each[3], abs=1e-12)
            assert got.macro[f"{state}_{name}"].value == pytest.approx(fmean(each[:3]), abs=1e-12)


def test_a_share_of_one_is_that_study_and_equal_shares_are_chance(facts: Any) -> None:
    query, gallery = facts
    chosen = np.random.default_rng(2).integers(12, size=30)
    one = expected_agreement(query, gallery, np.eye(12)[chosen], list("abc"), range(30), repeats=20)
    plain = fact_agreement(query, gallery[chosen], list("abc"), range(30), gallery=gallery, repeats=20)
    assert one.to_dict() == plain.to_dict()
    anyone = expected_agreement(query, gallery, np.full((30, 12), 1 / 12), list("abc"), range(30), repeats=0)
    assert {kind: interval.value for kind, interval in anyone.micro.items()} == pytest.approx(plain.chance)


def test_shares_that_are_none_are_refused(facts: Any) -> None:
    query, gallery = facts
    for share in (np.full((30, 11), 1 / 11), np.full((30, 12), 0.5), np.tile([2.0, -1.0, *[0.0] * 10], (30, 1))):
        with pytest.raises(ValueError, match="add to 1"):
            expected_agreement(query, gallery, share, list("abc"), range(30))
