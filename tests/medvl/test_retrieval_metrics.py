"""Ranking metrics against their definition on one order, averaged over every order of tied items; against scikit-learn; pools and facts."""

from __future__ import annotations

import itertools
import json
import math
import time
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    label_ranking_average_precision_score,
    ndcg_score,
    precision_score,
    recall_score,
)

from medvl.metrics import (
    both_directions,
    fact_agreement,
    fact_relevance,
    pooled_recall,
    ranking_metrics,
    recall_at_k,
    same_present_facts,
)

RULE = "duplicates as hits"

# --- the definitions, on one order


def on_one_order(relevant: list[bool], grades: list[float], ks: list[int], gain: str) -> dict[str, float]:
    """Every metric of one query whose items, best first, are these."""

    def gained(g: float) -> float:
        return 2**g - 1 if gain == "exponential" else g

    def dcg(order: list[float], k: int) -> float:
        return sum(gained(g) / math.log2(place + 1) for place, g in enumerate(order[:k], start=1))

    def precisions(k: int) -> float:
        return sum(sum(relevant[:place]) / place for place in range(1, min(k, len(relevant)) + 1) if relevant[place - 1])

    best, everything, of_all = sorted(grades, reverse=True), len(grades), sum(relevant)
    rank = relevant.index(True) + 1
    found = {
        "rank": float(rank),
        "mrr": 1 / rank,
        "map": precisions(everything) / of_all,
        "ndcg": dcg(grades, everything) / dcg(best, everything),
    }
    for k in ks:
        found[f"recall@{k}"] = float(any(relevant[:k]))
        found[f"precision@{k}"] = sum(relevant[:k]) / k
        found[f"map@{k}"] = precisions(k) / min(of_all, k)
        found[f"ndcg@{k}"] = dcg(grades, k) / dcg(best, k)
        found[f"grade@{k}"] = sum(grades[:k]) / k
    return found


def over_all_orders(scores: list[float], relevant: list[bool], grades: list[float], ks: list[int], gain: str) -> dict[str, float]:
    """The mean over every order of the items that respects the scores."""
    found = [
        on_one_order([relevant[i] for i in order], [grades[i] for i in order], ks, gain)
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return {name: fmean(one[name] for one in found) for name in found[0]}


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties (infinities too), relevance, grades and candidates, of 1 to 3 queries and 1 to 6 items."""
    queries, pool = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    cells = queries * pool
    values = draw(st.sampled_from([(0.0,), (0.0, 1.0), (-math.inf, 0.5, 2.0, math.inf), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]))
    scores = np.array(draw(st.lists(st.sampled_from(values), min_size=cells, max_size=cells))).reshape(queries, pool)
    relevant = np.array(draw(st.lists(st.booleans(), min_size=cells, max_size=cells))).reshape(queries, pool)
    grades = np.array(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=cells, max_size=cells))).reshape(queries, pool)
    candidates = np.array(draw(st.lists(st.booleans(), min_size=cells, max_size=cells))).reshape(queries, pool)
    for q in range(queries):
        i, j = draw(st.integers(0, pool - 1)), draw(st.integers(0, pool - 1))
        relevant[q, i] = candidates[q, i] = candidates[q, j] = True
        grades[q, j] = 2.0
    return scores, relevant, grades, candidates


@settings(deadline=None, max_examples=80)
@given(tables(), st.sampled_from(["exponential", "linear"]), st.booleans())
def test_every_metric_is_the_mean_over_all_orders_of_ties(table: Any, gain: Any, restricted: bool) -> None:
    scores, relevant, grades, candidates = table
    ks = [1, 2, 4, 9]
    masked = np.where(candidates, scores, np.nan) if restricted else scores
    got = ranking_metrics(
        masked,
        relevant,
        ks,
        range(len(scores)),
        rule=RULE,
        grades=grades,
        gain=gain,
        candidates=candidates if restricted else None,
        repeats=0,
    )
    kept = [np.flatnonzero(row) if restricted else np.arange(scores.shape[1]) for row in candidates]
    rows = [(scores[q, c].tolist(), relevant[q, c].tolist(), grades[q, c].tolist()) for q, c in enumerate(kept)]
    expected = [over_all_orders(*row, ks, gain) for row in rows]
    at_random = [over_all_orders([0.0] * len(s), r, g, ks, gain) for s, r, g in rows]
    assert set(got.per_query) == set(expected[0])
    for name, values in got.per_query.items():
        assert values.tolist() == pytest.approx([one[name] for one in expected], abs=1e-12), name
        shown = "mean_rank" if name == "rank" else name
        assert got.metrics[shown].value == pytest.approx(fmean(one[name] for one in expected), abs=1e-12), name
        assert got.chance[shown] == pytest.approx(fmean(one[name] for one in at_random), abs=1e-12), name
    assert got.metrics["median_rank"].value == pytest.approx(median(one["rank"] for one in expected))
    assert (got.pool, got.smallest_pool) == (max(map(len, kept)), min(map(len, kept)))


@settings(deadline=None, max_examples=40)
@given(tables())
def test_without_grades_ndcg_is_of_relevant_or_not(table: Any) -> None:
    scores, relevant, _, _ = table
    got = ranking_metrics(scores, relevant, [2], range(len(scores)), rule=RULE, repeats=0)
    graded = ranking_metrics(
        scores, relevant, [2], range(len(scores)), rule=RULE, grades=relevant.astype(np.int8), gain="linear", repeats=0
    )
    assert got.per_query["ndcg"].tolist() == pytest.approx(graded.per_query["ndcg"].tolist(), abs=1e-12)
    assert "grade@2" not in got.metrics
    assert graded.per_query["grade@2"].tolist() == pytest.approx(got.per_query["precision@2"].tolist(), abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(tables())
def test_a_model_that_scores_everything_alike_is_at_chance(table: Any) -> None:
    _, relevant, grades, _ = table
    got = ranking_metrics(np.zeros(relevant.shape), relevant, [1, 3], range(len(relevant)), rule=RULE, grades=grades, repeats=0)
    for name, interval in got.metrics.items():
        if name != "median_rank":
            assert interval.value == pytest.approx(got.chance[name], abs=1e-12), name


@settings(deadline=None, max_examples=40)
@given(tables(), st.randoms(use_true_random=False))
def test_neither_the_order_of_items_nor_the_scale_of_scores_moves_a_metric(table: Any, rng: Any) -> None:
    scores, relevant, grades, _ = table
    order = list(range(scores.shape[1]))
    rng.shuffle(order)
    first = ranking_metrics(scores, relevant, [2], range(len(scores)), rule=RULE, grades=grades, repeats=0)
    other = ranking_metrics(
        np.arctan(scores[:, order]), relevant[:, order], [2], range(len(scores)), rule=RULE, grades=grades[:, order], repeats=0
    )
    for name, values in first.per_query.items():
        assert values.tolist() == pytest.approx(other.per_query[name].tolist(), abs=1e-12), name
        assert name == "rank" or ((values >= 0).all() and (values <= 1 + 1e-12).all()) or name.startswith("grade")


# --- scikit-learn, larger tables


@pytest.fixture
def large() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(4)
    grades = generator.choice([0.0, 0.0, 0.0, 1.0, 2.0, 3.0], size=(50, 200))
    return generator.normal(size=(50, 200)) + 0.4 * grades, grades > 1, grades


def test_untied_metrics_equal_scikit_learn(large: Any) -> None:
    scores, relevant, grades = large
    got = ranking_metrics(scores, relevant, [5, 20], range(50), rule=RULE, grades=grades, gain="linear", repeats=0)
    assert got.metrics["map"].value == pytest.approx(label_ranking_average_precision_score(relevant, scores), abs=1e-12)
    each = [average_precision_score(y, s) for y, s in zip(relevant, scores, strict=True)]
    assert got.per_query["map"].tolist() == pytest.approx(each, abs=1e-12)
    assert got.metrics["ndcg"].value == pytest.approx(ndcg_score(grades, scores), abs=1e-12)
    for k in (5, 20):
        assert got.metrics[f"ndcg@{k}"].value == pytest.approx(ndcg_score(grades, scores, k=k), abs=1e-12)
    exponential = ranking_metrics(scores, relevant, [5], range(50), rule=RULE, grades=grades, repeats=0)
    assert exponential.metrics["ndcg@5"].value == pytest.approx(ndcg_score(2**grades - 1, scores, k=5), abs=1e-12)


def test_tied_ndcg_equals_scikit_learn(large: Any) -> None:
    scores, relevant, grades = large
    rounded = np.round(scores)
    got = ranking_metrics(rounded, relevant, [7], range(50), rule=RULE, grades=grades, gain="linear", repeats=0)
    assert got.metrics["ndcg@7"].value == pytest.approx(ndcg_score(grades, rounded, k=7), abs=1e-12)
    assert got.metrics["ndcg"].value == pytest.approx(ndcg_score(grades, rounded), abs=1e-12)


def test_large_ties_are_what_random_orders_give(large: Any) -> None:
    """Twenty levels of score for 200 items: the mean over 400 shuffles, each measured untied, is near the closed form."""
    scores, relevant, grades = large
    rounded = np.round(scores * 2) / 2
    got = ranking_metrics(rounded, relevant, [5], range(50), rule=RULE, grades=grades, repeats=0)
    generator = np.random.default_rng(0)
    draws: dict[str, list[float]] = {name: [] for name in got.metrics}
    for _ in range(400):
        broken = rounded + generator.uniform(0, 0.1, size=rounded.shape)
        one = ranking_metrics(broken, relevant, [5], range(50), rule=RULE, grades=grades, repeats=0)
        for name, interval in one.metrics.items():
            draws[name].append(interval.value)
    for name, values in draws.items():
        if name != "median_rank":
            assert abs(got.metrics[name].value - fmean(values)) < 5 * np.std(values) / math.sqrt(400) + 1e-12, name


def test_recall_and_ranks_are_those_of_recall_at_k(large: Any) -> None:
    scores, relevant, _ = large
    rounded, patients = np.round(scores), [f"p{i // 2}" for i in range(50)]
    got = ranking_metrics(rounded, relevant, [1, 10], patients, rule=RULE, repeats=60, seed=3)
    plain = recall_at_k(rounded, relevant, [1, 10], patients, repeats=60, seed=3)
    assert got.per_query["rank"].tolist() == pytest.approx(plain.ranks.tolist())
    for k in (1, 10):
        assert got.metrics[f"recall@{k}"] == plain.recall[k]
        assert got.chance[f"recall@{k}"] == pytest.approx(plain.chance[k])


def test_chunks_do_not_move_a_result(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, relevant, grades = large
    args: Any = (np.round(scores), relevant, [3], range(50))
    whole = ranking_metrics(*args, rule=RULE, grades=grades, repeats=20), recall_at_k(*args, repeats=20).recall
    pools = pooled_recall(scores[:, :50], [1], 8, range(50), rule="strict", partitions=3, repeats=20)
    monkeypatch.setattr("medvl.metrics.ties.CELLS", 200 * 7)
    parts = ranking_metrics(*args, rule=RULE, grades=grades, repeats=20), recall_at_k(*args, repeats=20).recall
    assert parts[0].metrics == whole[0].metrics and parts[0].chance == pytest.approx(whole[0].chance) and parts[1] == whole[1]
    assert pooled_recall(scores[:, :50], [1], 8, range(50), rule="strict", partitions=3, repeats=20).recall == pools.recall


def test_intervals_draw_patients(large: Any) -> None:
    scores, relevant, _ = large
    patients = [f"p{i // 5}" for i in range(50)]
    got = ranking_metrics(scores, relevant, [5], patients, rule=RULE, repeats=200, seed=1)
    for name in ("mrr", "map", "ndcg@5", "mean_rank", "median_rank"):
        values = got.per_query["rank" if name.endswith("rank") else name]
        reduce = np.median if name == "median_rank" else np.mean
        generator = np.random.default_rng(1)
        draws = []
        for _ in range(200):
            drawn = generator.integers(10, size=10)
            draws.append(reduce(np.concatenate([values[5 * p : 5 * p + 5] for p in drawn])))
        assert (got.metrics[name].ci_low, got.metrics[name].ci_high) == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())
        assert got.metrics[name].n_patients == 10


# --- chance, rule, directions


def test_chance_of_the_median_rank_is_that_of_random_orders() -> None:
    generator = np.random.default_rng(2)
    relevant = generator.random((300, 40)) < 0.15
    relevant[:, 0] |= ~relevant.any(axis=1)
    got = ranking_metrics(generator.random((300, 40)), relevant, [1], range(300), rule=RULE, repeats=0)
    ranks: list[int] = []
    for row in relevant:
        places = np.arange(40)
        ranks.extend(int(np.flatnonzero(row[generator.permutation(places)])[0]) + 1 for _ in range(50))
    assert got.chance["median_rank"] == np.median(ranks)
    strict = ranking_metrics(np.zeros((4, 4)), np.eye(4, dtype=bool), [1], range(4), rule="strict", repeats=0)
    assert strict.chance["median_rank"] == strict.chance["mean_rank"] == 2.5
    assert strict.chance["mrr"] == strict.chance["map"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_a_result_says_its_rule_and_pool_in_strict_json() -> None:
    got = ranking_metrics(np.eye(5), np.eye(5, dtype=bool), [1], list("aabbc"), rule="strict", repeats=10)
    told = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert (told["rule"], told["pool"], told["smallest_pool"]) == ("strict", 5, 5)
    assert told["metrics"]["recall@1"]["value"] == 1.0 and told["metrics"]["recall@1"]["chance"] == pytest.approx(0.2)
    assert set(told["metrics"]) == set(got.metrics) == set(got.chance)


def test_both_directions_are_the_matrix_and_its_transpose() -> None:
    generator = np.random.default_rng(7)
    same = generator.integers(6, size=12)[:, None] == np.arange(6)[None, :]
    same = same[:, same.any(axis=0)]
    similarity = np.round(generator.normal(size=same.shape) + same, 1)
    grades, columns = same * 2.0, range(same.shape[1])
    got = both_directions(similarity, same, [1, 3], range(12), columns, rule=RULE, grades=grades, repeats=20)
    assert list(got) == ["image_to_report", "report_to_image"]
    forth = ranking_metrics(similarity, same, [1, 3], range(12), rule=RULE, grades=grades, repeats=20)
    back = ranking_metrics(similarity.T.copy(), same.T.copy(), [1, 3], columns, rule=RULE, grades=grades.T.copy(), repeats=20)
    for one, other in zip(got.values(), (forth, back), strict=True):
        assert one.to_dict() == other.to_dict()
    assert got["image_to_report"].pool == same.shape[1] and got["report_to_image"].pool == 12
    with pytest.raises(ValueError, match="both directions"):
        both_directions(similarity, same, [1], range(12), columns, rule=RULE, names=("a", "a"))


def test_ranking_refuses_what_it_cannot_count() -> None:
    eye, zeros = np.eye(3, dtype=bool), np.zeros((3, 3))
    with pytest.raises(ValueError, match="query row 1"):
        ranking_metrics(np.where(eye & (np.arange(3) == 1), np.nan, 0), eye, [1], range(3), rule="strict")
    with pytest.raises(ValueError, match="1 queries, the first in row 2"):
        ranking_metrics(zeros, eye & (np.arange(3) < 2), [1], range(3), rule="strict")
    with pytest.raises(ValueError, match="3 queries, the first in row 0"):
        ranking_metrics(zeros, eye, [1], range(3), rule="strict", candidates=~eye)
    with pytest.raises(ValueError, match="every K"):
        ranking_metrics(zeros, eye, [1, 0], range(3), rule="strict")
    with pytest.raises(ValueError, match="bool"):
        ranking_metrics(zeros, eye[:2], [1], range(3), rule="strict")
    with pytest.raises(ValueError, match="candidates"):
        ranking_metrics(zeros, eye, [1], range(3), rule="strict", candidates=np.ones((3, 2), dtype=bool))
    with pytest.raises(ValueError, match="in words"):
        ranking_metrics(zeros, eye, [1], range(3), rule=" ")
    with pytest.raises(ValueError, match="gain must be one of exponential, linear"):
        ranking_metrics(zeros, eye, [1], range(3), rule="strict", gain="log")  # type: ignore[arg-type]
    for wrong in (-1.0, math.nan, 65.0):
        with pytest.raises(ValueError, match="grades must be 0 to 64"):
            ranking_metrics(zeros, eye, [1], range(3), rule="strict", grades=np.where(eye, wrong, 0))
    with pytest.raises(ValueError, match="grade above 0"):
        ranking_metrics(zeros, eye, [1], range(3), rule="strict", grades=zeros)
    with pytest.raises(ValueError, match="grades have shape"):
        ranking_metrics(zeros, eye, [1], range(3), rule="strict", grades=np.ones((3, 2)))
    with pytest.raises(ValueError, match="no queries or no pool"):
        ranking_metrics(np.zeros((0, 3)), np.zeros((0, 3), dtype=bool), [1], [], rule="strict")
    with pytest.raises(ValueError, match="3 rows for 2 patient ids"):
        ranking_metrics(zeros, eye, [1], range(2), rule="strict")


# --- pools


def plain_pools(
    similarity: np.ndarray, relevant: np.ndarray, k: int, pool: int, partitions: int, seed: int
) -> tuple[list[float], list[float]]:
    """Recall@k of each partition and its chance, a query at a time, by the share of orders (as a hypergeometric tail in exact integers)."""
    generator = np.random.default_rng(seed)
    n, recalls, chances = len(similarity), [], []

    def a_hit(tied: int, hits: int, draws: int) -> float:
        draws = min(max(draws, 0), tied)
        return 1 - math.comb(tied - hits, draws) / math.comb(tied, draws)

    for _ in range(partitions):
        order = generator.permutation(n).tolist()
        found, at_random = [], []
        for start in range(0, n - n % pool, pool):
            members = order[start : start + pool]
            for i in members:
                best = max(similarity[i, j] for j in members if relevant[i, j])
                above = sum(similarity[i, j] > best for j in members)
                tied = [j for j in members if similarity[i, j] == best]
                found.append(a_hit(len(tied), sum(bool(relevant[i, j]) for j in tied), k - above))
                at_random.append(a_hit(pool, sum(bool(relevant[i, j]) for j in members), k))
        recalls.append(fmean(found))
        chances.append(fmean(at_random))
    return recalls, chances


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("pool", [1, 7, 16, 45])
def test_pools_equal_a_loop(pool: int, duplicates: bool) -> None:
    generator = np.random.default_rng(pool)
    texts = generator.integers(15, size=45)
    relevant = texts[:, None] == texts[None, :] if duplicates else np.eye(45, dtype=bool)
    similarity = np.round(generator.normal(size=(45, 45)) + 1.5 * relevant)
    patients = [f"p{i // 3}" for i in range(45)]
    got = pooled_recall(
        similarity, [1, 4], pool, patients, rule=RULE, relevant=relevant if duplicates else None, partitions=9, repeats=30, seed=5
    )
    assert (got.rule, got.pool, got.partitions, got.pools, got.left_out) == (RULE, pool, 9, 45 // pool, 45 % pool)
    for k in (1, 4):
        recalls, chances = plain_pools(similarity, relevant, k, pool, 9, 5)
        assert got.of_partitions[k].tolist() == pytest.approx(recalls)
        assert got.recall[k].value == pytest.approx(fmean(recalls))
        assert got.chance[k] == pytest.approx(fmean(chances))
        if not duplicates:
            assert got.chance[k] == pytest.approx(min(k / pool, 1))
        assert got.spread(k) == pytest.approx(tuple(np.quantile(recalls, [0.025, 0.975])))


def test_one_pool_of_all_is_the_full_pool() -> None:
    generator = np.random.default_rng(0)
    similarity = generator.normal(size=(30, 30)) + 2 * np.eye(30)
    patients = [f"p{i // 2}" for i in range(30)]
    full = recall_at_k(similarity, np.eye(30, dtype=bool), [1, 5], patients, repeats=50, seed=2)
    got = pooled_recall(similarity, [1, 5], 30, patients, rule="strict", partitions=4, repeats=50, seed=2)
    for k in (1, 5):
        assert (got.recall[k].value, got.recall[k].ci_low, got.recall[k].ci_high) == pytest.approx(
            (full.recall[k].value, full.recall[k].ci_low, full.recall[k].ci_high)
        )
        assert got.of_partitions[k].tolist() == pytest.approx([full.recall[k].value] * 4)
    back = pooled_recall(similarity.T, [1, 5], 30, patients, rule="strict", partitions=1, repeats=0)
    forth = recall_at_k(similarity.T, np.eye(30, dtype=bool), [1, 5], patients, repeats=0)
    assert back.recall[1].value == pytest.approx(forth.recall[1].value)


def test_smaller_pools_are_easier_and_patients_not_deals_make_the_interval() -> None:
    generator = np.random.default_rng(1)
    similarity = generator.normal(size=(160, 160)) + 2 * np.eye(160)
    by_pool = {n: pooled_recall(similarity, [1, 8], n, range(160), rule="strict", partitions=50) for n in (32, 64, 128)}
    assert by_pool[32].recall[1].value > by_pool[64].recall[1].value > by_pool[128].recall[1].value
    assert by_pool[128].left_out == 32 and by_pool[128].recall[1].n == 160  # each query is dealt at some time
    low, high = by_pool[32].spread(1)
    assert high - low < by_pool[32].recall[1].ci_high - by_pool[32].recall[1].ci_low
    told = json.loads(json.dumps(by_pool[32].to_dict(), allow_nan=False))
    assert (told["rule"], told["pool"], told["metrics"]["recall@8"]["chance"]) == ("strict", 32, pytest.approx(0.25))


def test_pools_refuse_what_does_not_fit() -> None:
    eye, zeros = np.eye(4, dtype=bool), np.zeros((4, 4))
    for pool in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 pairs"):
            pooled_recall(zeros, [1], pool, range(4), rule="strict")
    with pytest.raises(ValueError, match="partition"):
        pooled_recall(zeros, [1], 2, range(4), rule="strict", partitions=0)
    with pytest.raises(ValueError, match="all 4 pairs, got 0"):
        pooled_recall(zeros, [1], 2, range(4), rule="strict", relevant=eye[::-1])
    with pytest.raises(ValueError, match="must be"):
        pooled_recall(np.zeros((4, 5)), [1], 2, range(4), rule="strict")
    with pytest.raises(ValueError, match="every K"):
        pooled_recall(zeros, [0], 2, range(4), rule="strict")
    with pytest.raises(ValueError, match="in words"):
        pooled_recall(zeros, [1], 2, range(4), rule="")
    with pytest.raises(ValueError, match="NaN in query row 0"):
        pooled_recall(np.full((4, 4), np.nan), [1], 2, range(4), rule="strict")


# --- facts


def plain_overlap(q: list[int], g: list[int], overlap: str) -> float:
    known = [(a, b) for a, b in zip(q, g, strict=True) if -1 not in (a, b)]
    first, second = {i for i, (a, _) in enumerate(known) if a == 1}, {i for i, (_, b) in enumerate(known) if b == 1}
    if overlap == "count":
        return len(first & second)
    if not first | second:
        return 1.0
    return 2 * len(first & second) / (len(first) + len(second)) if overlap == "f1" else len(first & second) / len(first | second)


facts_of = st.integers(1, 6).flatmap(
    lambda f: st.tuples(*(st.lists(st.lists(st.integers(-2, 1), min_size=f, max_size=f), min_size=1, max_size=6) for _ in range(2)))
)


@settings(deadline=None)
@given(facts_of)
def test_shared_facts_equal_sets(rows: Any) -> None:
    query, gallery = (np.array(one, dtype=np.int8) for one in rows)
    for overlap in ("f1", "jaccard", "count"):
        got = fact_relevance(query, gallery, overlap)
        assert got.tolist() == [pytest.approx([plain_overlap(q, g, overlap) for g in rows[1]], abs=1e-6) for q in rows[0]]
    same = same_present_facts(query, gallery)
    assert same.tolist() == [[[a == 1 for a in q] == [b == 1 for b in g] for g in rows[1]] for q in rows[0]]


def test_shared_facts_are_symmetric_and_a_study_agrees_with_itself() -> None:
    facts = np.random.default_rng(0).integers(-2, 2, size=(20, 9)).astype(np.int8)
    for overlap in ("f1", "jaccard"):
        got = fact_relevance(facts, facts, overlap)
        assert np.array_equal(got, got.T) and (got.diagonal() == 1).all() and got.min() >= 0 and got.max() <= 1


def test_graded_relevance_makes_map_at_k_of_peers() -> None:
    """SPECTRE's MAP@k and CT-CLIP's mean overlap of the first k, each written out, from labels of 0 and 1, the query not in its gallery."""
    generator = np.random.default_rng(9)
    labels = generator.integers(0, 2, size=(40, 3)).astype(np.int8)
    labels[:, 0] |= ~labels.any(axis=1)
    scores = generator.normal(size=(40, 40))
    others = ~np.eye(40, dtype=bool)
    got = ranking_metrics(
        scores,
        same_present_facts(labels, labels),
        [5],
        range(40),
        rule="identical label vector",
        grades=fact_relevance(labels, labels, "jaccard"),
        candidates=others,
        repeats=0,
    )
    spectre, overlap = [], []
    for i in range(40):
        order = [j for j in np.argsort(-scores[i]).tolist() if j != i]
        hits = [labels[j].tolist() == labels[i].tolist() for j in order]
        spectre.append(sum(sum(hits[: p + 1]) / (p + 1) for p in range(5) if hits[p]) / min(sum(hits), 5))
        overlap.append(fmean((labels[j] & labels[i]).sum() / (labels[j] | labels[i]).sum() for j in order[:5]))
    assert got.metrics["map@5"].value == pytest.approx(fmean(spectre), abs=1e-12)
    assert got.metrics["grade@5"].value == pytest.approx(fmean(overlap), abs=1e-6)
    assert got.pool == got.smallest_pool == 39


@pytest.fixture
def retrieved() -> tuple[np.ndarray, np.ndarray, list[str]]:
    generator = np.random.default_rng(6)
    query = generator.choice([1, 0, -1, -2], p=[0.3, 0.35, 0.1, 0.25], size=(80, 4)).astype(np.int8)
    other = np.where(generator.random((80, 4)) < 0.5, query, generator.choice([1, 0, -1, -2], size=(80, 4))).astype(np.int8)
    query[:, 3], other[:, 3] = -2, 0  # never stated of the queries: no recall
    return query, other, ["edema", "micro", "", "present_f1"]


def test_fact_agreement_equals_scikit_learn(retrieved: Any) -> None:
    query, other, names = retrieved
    got = fact_agreement(query, other, names, [f"p{i // 2}" for i in range(80)], repeats=30)
    known = (query != -1) & (other != -1)
    assert got.uncertain == int((~known).sum()) > 0
    functions: dict[str, Any] = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    for state, value in (("present", 1), ("absent", 0)):
        assert got.stated[state] == int((query[known] == value).sum())
        for name, function in functions.items():
            kind = f"{state}_{name}"
            assert got.micro[kind].value == pytest.approx(function(query[known] == value, other[known] == value), abs=1e-12)
            each = [function(query[known[:, j], j] == value, other[known[:, j], j] == value, zero_division=np.nan) for j in range(4)]
            assert [got.per_finding[finding][kind].value for finding in names] == pytest.approx(each, abs=1e-12, nan_ok=True)
            assert got.macro[kind].value == pytest.approx(np.nanmean(each), abs=1e-12)
            assert got.micro[kind].ci_low <= got.micro[kind].value <= got.micro[kind].ci_high
    assert math.isnan(got.per_finding["present_f1"]["present_f1"].value) and math.isnan(
        got.per_finding["present_f1"]["absent_recall"].value
    )
    told = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert told["micro"]["present_f1"]["chance"] is None and set(told["per_finding"]) == set(names)


def test_fact_agreement_draws_patients(retrieved: Any) -> None:
    query, other, names = retrieved
    patients = [f"p{i // 4:02d}" for i in range(80)]
    got = fact_agreement(query, other, names, patients, repeats=100, seed=8).micro["present_f1"]
    generator, draws = np.random.default_rng(8), []
    for _ in range(100):
        rows = np.concatenate([np.arange(4 * p, 4 * p + 4) for p in generator.integers(20, size=20)])
        known = (query[rows] != -1) & (other[rows] != -1)
        draws.append(f1_score(query[rows][known] == 1, other[rows][known] == 1))
    assert (got.ci_low, got.ci_high) == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())


def test_chance_of_agreement_is_that_of_every_gallery_study_in_turn(retrieved: Any) -> None:
    query, gallery, names = retrieved
    got = fact_agreement(query, query, names, range(80), gallery=gallery, repeats=0)
    pairs = [(q, g) for q in query for g in gallery]
    first, second = np.array([q for q, _ in pairs]), np.array([g for _, g in pairs])
    every = fact_agreement(first, second, names, range(len(pairs)), repeats=0)
    assert got.micro["present_f1"].value == 1.0 > got.chance["present_f1"]
    assert got.chance == pytest.approx({kind: interval.value for kind, interval in every.micro.items()})


def test_facts_refuse_what_is_none() -> None:
    one = np.ones((2, 3), dtype=np.int8)
    for wrong, says in (
        (one + 1, "1 present, 0 absent"),
        (one.astype(float), "integers"),
        (one[:, :2], "same findings"),
        (one[0], "expected"),
    ):
        with pytest.raises(ValueError, match=says):
            fact_relevance(one, wrong)
        with pytest.raises(ValueError, match=says):
            same_present_facts(one, wrong)
        with pytest.raises(ValueError, match=says):
            fact_agreement(one, wrong, list("abc"), range(2))
    with pytest.raises(ValueError, match="f1, jaccard, count"):
        fact_relevance(one, one, "dice")  # type: ignore[arg-type]
    for names in (list("ab"), list("aab")):
        with pytest.raises(ValueError, match="names"):
            fact_agreement(one, one, names, range(2))
    with pytest.raises(ValueError, match="one shape"):
        fact_agreement(one, one[:1], list("abc"), range(2))


def test_an_archive_is_ranked_in_seconds_not_minutes() -> None:
    """2,000 x 2,000 with ties and several relevant; the bound is loose, a loop over queries or items in Python would break it."""
    generator = np.random.default_rng(0)
    facts = generator.integers(-2, 2, size=(2000, 14)).astype(np.int8)
    similarity = np.round(generator.normal(size=(2000, 2000)), 2)
    grades = fact_relevance(facts, facts)
    start = time.process_time()
    got = ranking_metrics(
        similarity, np.eye(2000, dtype=bool) | (grades > 0.7), [1, 5, 10], range(2000), rule=RULE, grades=grades, repeats=100
    )
    assert time.process_time() - start < 60
    assert got.metrics["ndcg"].n == 2000
    assert got.metrics["median_rank"].value == np.median(got.per_query["rank"])
