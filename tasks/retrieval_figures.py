"""Retrieval of an evaluation: ranking metrics both ways, what the first report says against the own, pools of N, harder galleries.

Shapes: N images, R reports, Q queries, G items of a pool, F findings. A query is an image or a report, what counts as a hit is a rule:
strict, the query's own study, or duplicates as hits, whatever says the same, sentence for sentence. Facts of a report are those of its
sentences (:mod:`tasks.report_facts`); grades of nDCG and clinical agreement are made of them, never of labels.

A row of ``retrieval.csv`` is a query: an image (direction image_to_report) or the report of a study (report_to_image). Twice, for the
strict rule and with duplicates as hits, it has what Recall@K, ranks and reciprocal ranks with ties, and chance, follow from: ``above``
items of the pool scored above the query's best relevant one, ``tied`` items that share its score, ``hits`` of these that are relevant,
``relevant`` items in the whole pool, and ``rank``, expected over a random order of the tied. ``first`` names the studies of the items of
the highest score, a JSON list, empty where more than ten share it, and ``first_tied`` counts them: with the reports, clinical agreement
follows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.data.manifest import StudyImage
from medvl.metrics import Interval, PooledRecall, RankingResult, expected_agreement, fact_relevance, pooled_recall, ranking_metrics
from medvl.types import Fact
from tasks.figures import estimate, interval_of, number
from tasks.hard_galleries import ATTRIBUTES, GALLERIES, measure_galleries, stated_with
from tasks.report_facts import ReportFacts

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_report", "report_to_image")
RULES = {"strict": "strict: the report of the image's own study", "duplicates": "any report with the same sentences"}
RANKINGS = {"mean_rank": "mean_rank", "mrr": "mrr", "map": "map", "ndcg@10": "ndcg_at_10"}
"""Metrics besides recall and the median rank, and what they are called in results.json."""
AGREEMENTS = tuple(f"{state}_{name}" for state in ("present", "absent") for name in ("f1", "precision", "recall"))
GRADED = "F1 of the present findings of the query's own report and of each of the pool"
MOST_FIRST = 10
"""Studies that ``retrieval.csv`` names as sharing the first place."""
COLUMNS = (
    *("direction", "study_id", "path", "pool"),
    *(f"{name}_{rule}" for rule in RULES for name in ("rank", "above", "tied", "hits", "relevant")),
    *("first", "first_tied"),
)


@dataclass(frozen=True)
class RetrievalScores:
    """Similarity of N images with R reports, and which of them belong together."""

    study_ids: tuple[str, ...]  # R
    sentences: tuple[tuple[str, ...], ...]  # R
    similarity: NDArray[np.float64]  # (N, R), rounded: what is equal up to the order of a sum is equal
    own: NDArray[np.bool_]  # (N, R): the report of the image's own study
    same: NDArray[np.bool_]  # (N, R): a report that says the same, sentence for sentence


@dataclass(frozen=True)
class Pools:
    """Small pools to measure besides the full one: pairs of each, and how often they are dealt."""

    size: int
    repeats: int = 100


@dataclass(frozen=True)
class Queries:
    """One direction of retrieval: Q queries against a pool of G."""

    direction: str
    similarity: NDArray[np.float64]  # (Q, G)
    own: NDArray[np.bool_]  # (Q, G)
    same: NDArray[np.bool_]  # (Q, G)
    images: NDArray[np.intp]  # (Q,) the image that each query is, or one of its study
    reports: NDArray[np.intp]  # (Q,) the report that each query is, or that of its study
    items: NDArray[np.intp]  # (G,) the report that each item is, or that of its study


def directions(scores: RetrievalScores, counted: NDArray[np.intp]) -> tuple[Queries, Queries]:
    """Images that count against reports and back; images whose study has no report are neither queries nor pool."""
    kept = counted[scores.own[counted].any(1)]
    similarity, own, same = scores.similarity[kept], scores.own[kept], scores.same[kept]
    reports, of_images = np.arange(own.shape[1]), own.argmax(1)
    return (
        Queries("image_to_report", similarity, own, same, kept, of_images, reports),
        Queries("report_to_image", similarity.T, own.T, same.T, kept[own.argmax(0)], reports, of_images),
    )


def retrieval_figures(
    scores: RetrievalScores,
    counted: NDArray[np.intp],
    patients: Sequence[str],
    facts: ReportFacts,
    *,
    pools: Pools | None = None,
    repeats: int,
    seed: int,
) -> dict[str, Any]:
    """Every figure of retrieval, JSON-ready: a part a direction, ``clinical_agreement``, ``hard_galleries`` and, if asked for, ``pools``.

    Args:
        scores: of all images.
        counted: the images that are queries.
        patients: (N,), the patient of each image.
        facts: of the reports' sentences.
        pools: small pools to measure besides.
        repeats: of the bootstrap over patients.
        seed: of that, and of the pools.
    Raises:
        ValueError: pools that do not fit.
    """
    stated = [facts.facts(sentences) for sentences in scores.sentences]
    names, said = facts.matrix(stated)
    options: dict[str, Any] = {"repeats": repeats, "seed": seed}
    found: dict[str, Any] = {}
    ways = directions(scores, counted)
    for way in ways:
        ids = [patients[i] for i in way.images]
        grades = fact_relevance(said[way.reports], said[way.items]) if names else None
        exact = ranking_metrics(way.similarity, way.own, RECALL_AT, ids, rule=RULES["strict"], grades=grades, **options)
        duplicates = ranking_metrics(way.similarity, way.same, RECALL_AT, ids, rule=RULES["duplicates"], grades=grades, **options)
        graded = grades is not None
        found[way.direction] = {
            **_ranking(exact, graded),
            "ndcg_grades": GRADED,
            "duplicates_as_hits": _ranking(duplicates, graded),
        }
    to_reports = ways[0]
    ids = [patients[i] for i in to_reports.images]
    found["clinical_agreement"] = _agreement(to_reports, names, said, ids, facts, **options)
    found["hard_galleries"] = {way.direction: _galleries(way, stated, patients, **options) for way in ways}
    if pools is not None:
        found["pools"] = _pools(ways, patients, pools, **options)
    return found


def _ranking(measured: RankingResult, graded: bool) -> dict[str, Any]:
    """Flat, as results.json has had it, the metrics of :data:`RANKINGS` behind; nDCG is null where no report states anything."""
    metrics, chance = measured.metrics, measured.chance
    flat: dict[str, Any] = {"rule": measured.rule, "pool": measured.pool, "chance": number(chance[f"recall@{RECALL_AT[-1]}"])}
    flat |= estimate("median_rank", metrics["median_rank"], chance=chance["median_rank"])
    for k in RECALL_AT:
        flat |= estimate(f"recall_at_{k}", metrics[f"recall@{k}"], chance=chance[f"recall@{k}"])
    for metric, name in RANKINGS.items():
        flat |= estimate(name, metrics[metric], chance=chance[metric])
    if not graded:
        flat |= {"ndcg_at_10": None, "ndcg_at_10_interval": {"ci_low": None, "ci_high": None, "n": 0, "chance": None}}
    return flat


def _agreement(
    way: Queries,
    names: Sequence[str],
    said: NDArray[np.int8],
    patients: Sequence[str],
    facts: ReportFacts,
    *,
    repeats: int,
    seed: int,
) -> dict[str, Any]:
    """What the first report of the pool says against what the own report says, beside what any report of the pool says on average."""
    pool = way.similarity.shape[1]
    found: dict[str, Any] = {
        "direction": way.direction,
        "rule": "the first report of the pool, those that tie by equal shares, against the own report; chance: any report of the pool",
        "pool": pool,
        "queries": len(way.similarity),
        "facts": facts.spec(),
        "findings": list(names),
    }
    if not names:
        return {**found, "uncertain": 0, "stated": {"present": 0, "absent": 0}, "micro": {}, "macro": {}, "per_finding": {}}
    own, gallery = said[way.reports], said[way.items]
    options: dict[str, Any] = {"repeats": repeats, "seed": seed}
    first = expected_agreement(own, gallery, first_shares(way.similarity), names, patients, **options)
    anyone = expected_agreement(own, gallery, np.full(way.similarity.shape, 1 / pool), names, patients, **options)
    return {
        **found,
        "uncertain": first.uncertain,
        "stated": first.stated,
        "micro": _with_chance(first.micro, anyone.micro, AGREEMENTS),
        "macro": _with_chance(first.macro, anyone.macro, AGREEMENTS),
        "per_finding": {
            name: _with_chance(first.per_finding[name], anyone.per_finding[name], ("present_f1", "absent_f1")) for name in names
        },
    }


def _with_chance(first: Mapping[str, Interval], anyone: Mapping[str, Interval], kinds: Sequence[str]) -> dict[str, Any]:
    """Each kind's figure with its interval, and beside it the chance level with its own."""
    found: dict[str, Any] = {}
    for kind in kinds:
        found |= estimate(kind, first[kind], chance=anyone[kind].value)
        found[f"{kind}_interval"]["chance_interval"] = interval_of(anyone[kind])
    return found


def first_shares(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """(Q, G) chance of each item to stand first, over all orders of those that tie."""
    first = similarity == similarity.max(axis=1, keepdims=True)
    return first / first.sum(axis=1, keepdims=True)


def _galleries(way: Queries, stated: Sequence[Sequence[Fact]], patients: Sequence[str], *, repeats: int, seed: int) -> dict[str, Any]:
    found = {}
    ids = [patients[i] for i in way.images]
    for attribute in ATTRIBUTES:
        told = [stated_with(facts, attribute) for facts in stated]
        queries, items = [told[r] for r in way.reports], [told[r] for r in way.items]
        measured = measure_galleries(way.similarity, queries, items, way.own, ids, attribute, repeats=repeats, seed=seed)
        found[GALLERIES[attribute]] = measured
    return found


def _pools(ways: Sequence[Queries], patients: Sequence[str], pools: Pools, *, repeats: int, seed: int) -> dict[str, Any]:
    """Recall within pools of N, both ways over the same pools, by both rules.

    Raises:
        ValueError: images that count by themselves, of which a study has several, or a pool larger than there are pairs.
    """
    to_reports = ways[0]
    if (to_reports.own.sum(0) != 1).any():
        raise ValueError("pools are dealt of pairs of a study and its report; where each image counts, a report has several images")
    paired = to_reports.own.argmax(1)  # pair i in row and column i
    similarity, same = to_reports.similarity[:, paired], to_reports.same[:, paired]
    ids = [patients[i] for i in to_reports.images]
    ks = [k for k in RECALL_AT if k <= pools.size]
    options: dict[str, Any] = {"partitions": pools.repeats, "repeats": repeats, "seed": seed}
    found: dict[str, Any] = {"size": pools.size, "repeats": pools.repeats}
    for way, turned in zip(ways, (False, True), strict=True):
        scores, equal = (similarity.T, same.T) if turned else (similarity, same)
        exact = pooled_recall(scores, ks, pools.size, ids, rule=RULES["strict"], **options)
        duplicates = pooled_recall(scores, ks, pools.size, ids, rule=RULES["duplicates"], relevant=equal, **options)
        found[way.direction] = {**_pooled(exact), "duplicates_as_hits": _pooled(duplicates)}
    return found


def _pooled(measured: PooledRecall) -> dict[str, Any]:
    flat: dict[str, Any] = {"rule": measured.rule, "pool": measured.pool, "pools": measured.pools, "left_out": measured.left_out}
    for k, interval in measured.recall.items():
        flat |= estimate(f"recall_at_{k}", interval, chance=measured.chance[k])
        flat[f"recall_at_{k}_interval"]["deals"] = list(measured.spread(k))
    return flat


def retrieval_lines(scores: RetrievalScores, counted: NDArray[np.intp], rows: Sequence[StudyImage]) -> Iterator[list[Any]]:
    """The lines of ``retrieval.csv``, a query each, under :data:`COLUMNS`."""
    for way in directions(scores, counted):
        to_reports = way.direction == "image_to_report"
        for similarity, own, same, image in zip(way.similarity, way.own, way.same, way.images, strict=True):
            row = rows[image]
            places = (value for relevant in (own, same) for value in (expected_rank(similarity, relevant), *_place(similarity, relevant)))
            first = np.flatnonzero(similarity == similarity.max())
            studies = [scores.study_ids[way.items[g]] for g in first] if len(first) <= MOST_FIRST else []
            path = row.path.name if to_reports else ""
            yield [way.direction, row.study_id, path, len(similarity), *places, json.dumps(studies), len(first)]


def _place(similarity: NDArray[np.float64], relevant: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Of (G,) items: how many score above the best relevant one, how many tie with it, how many of these and of all are relevant."""
    best = similarity[relevant].max()
    tied = similarity == best
    return int((similarity > best).sum()), int(tied.sum()), int((tied & relevant).sum()), int(relevant.sum())


def expected_rank(similarity: NDArray[np.float64], relevant: NDArray[np.bool_]) -> float:
    """Expected rank of the best relevant of (G,) items, 1 the best; ties in random order."""
    above, tied, hits, _ = _place(similarity, relevant)
    return float(above + (tied + 1) / (hits + 1))
