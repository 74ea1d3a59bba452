"""Retrieval of an evaluation against loops over reports, their facts and the matrix: ranks, grades, agreement, pools, harder galleries."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from medvl.types import Fact
from reports.facts import LexiconFacts
from reports.sentences import split_sentences
from reports.synthetic import write_report
from tasks.cli import cli
from tasks.hard_galleries import stated_with
from tasks.report_facts import lexicon_facts
from tasks.retrieval_figures import Pools, RetrievalScores, retrieval_figures

STUDIES = 26
WAYS = ("image_to_report", "report_to_image")
OTHER = {
    "left": {"right"},
    "right": {"left"},
    "mild": {"moderate", "severe"},
    "moderate": {"mild", "severe"},
    "severe": {"mild", "moderate"},
}


def reports_of(generator: np.random.Generator) -> list[tuple[str, ...]]:
    """Sentences of synthetic reports; the last two are the same, and one says nothing that the lexicon knows."""
    found = []
    for _ in range(STUDIES - 2):
        facts = []
        for name in ("pleural_effusion", "pneumothorax", "cardiomegaly", "consolidation"):
            if generator.random() < 0.6:
                side = None if name == "cardiomegaly" else str(generator.choice(["left", "right", "bilateral"], p=[0.45, 0.45, 0.1]))
                severity = str(generator.choice(["mild", "moderate", "severe"]))
                facts.append(Fact(name, "present" if generator.random() < 0.85 else "uncertain", side=side, severity=severity))  # type: ignore[arg-type]
        report = write_report(facts, generator)
        found.append(tuple(dict.fromkeys(split_sentences(f"{report.findings} {report.impression}"))))
    return [*found, found[-1], ("Technically limited film.",)]


@pytest.fixture(scope="module")
def scores() -> RetrievalScores:
    """Similarities with many ties; own reports lie a little higher. Image i is of study i + 1, so that rows and columns are apart."""
    generator = np.random.default_rng(4)
    sentences = reports_of(generator)
    own = np.roll(np.eye(STUDIES, dtype=bool), 1, axis=1)
    texts = [frozenset(one) for one in sentences]
    same = np.array([[texts[(i + 1) % STUDIES] == text for text in texts] for i in range(STUDIES)])
    similarity = np.round(generator.normal(size=(STUDIES, STUDIES)) + own * 1.2, 1)
    return RetrievalScores(tuple(f"s{i}" for i in range(STUDIES)), tuple(sentences), similarity, own, same)


PATIENTS = [f"p{i // 2}" for i in range(STUDIES)]


@pytest.fixture(scope="module")
def measured(scores: RetrievalScores) -> Any:
    found = retrieval_figures(scores, np.arange(STUDIES), PATIENTS, lexicon_facts(), pools=Pools(STUDIES, 2), repeats=1000, seed=1)
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.fixture(scope="module")
def stated(scores: RetrievalScores) -> list[list[Fact]]:
    source = LexiconFacts()
    return [[one.fact for sentence in sentences for one in source.facts(sentence)] for sentences in scores.sentences]


@pytest.fixture(scope="module")
def said(stated: list[list[Fact]]) -> list[dict[str, int]]:
    """Of each report what it says of each finding that any report names: kinds count for what they are kinds of."""
    ontology = LexiconFacts().lexicon.ontology
    named = {fact.finding for facts in stated for fact in facts}
    found = []
    for facts in stated:
        present, uncertain, absent = (
            {
                name
                for fact in facts
                if fact.state == state
                for name in (fact.finding, *(ontology.ancestors(fact.finding) if state != "absent" else ()))
            }
            for state in ("present", "uncertain", "absent")
        )
        one = dict.fromkeys(absent, 0) | dict.fromkeys(uncertain, -1) | dict.fromkeys(present, 1)
        found.append({name: one.get(name, -2) for name in sorted(named)})
    return found


def pairs(scores: RetrievalScores, way: str) -> list[tuple[int, dict[int, float]]]:
    """(report of the query, report of each item -> its score): image i is of study i + 1."""
    by_study = {(i + 1) % STUDIES: i for i in range(STUDIES)}
    table = {(i, r): scores.similarity[by_study[i], r] for i in range(STUDIES) for r in range(STUDIES)}
    return [(q, {g: float(table[(q, g) if way == WAYS[0] else (g, q)]) for g in range(STUDIES)}) for q in range(STUDIES)]


def grade(q: dict[str, int], g: dict[str, int]) -> float:
    known = [name for name in q if -1 not in (q[name], g[name])]
    first, second = ({name for name in known if of[name] == 1} for of in (q, g))
    return 2 * len(first & second) / (len(first) + len(second)) if first or second else 1.0


def orders(items: dict[int, float], generator: np.random.Generator, count: int) -> list[list[int]]:
    """Random orders of items that respect their scores."""
    return [sorted(items, key=lambda g: (-items[g], float(draw[g]))) for draw in generator.random((count, STUDIES))]


def resampled(values: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Percentile intervals of means over queries in the order of their reports, by drawing patients again, 4,000 times."""
    patients = [PATIENTS[(q - 1) % STUDIES] for q in range(STUDIES)]
    members = [[q for q in range(STUDIES) if patients[q] == one] for one in sorted(set(patients))]
    generator, means = np.random.default_rng(7), {name: [] for name in values}
    for _ in range(4000):
        rows = [q for i in generator.integers(len(members), size=len(members)) for q in members[i]]
        for name, of in values.items():
            means[name].append(fmean(of[q] for q in rows))
    return {name: (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))) for name, drawn in means.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["strict", "duplicates"])
def test_ranking_is_the_mean_over_orders_of_ties(scores: RetrievalScores, measured: Any, said: Any, way: str, rule: str) -> None:
    """Over 3,000 random orders of the tied, a query at a time; the means of ranks and of recall exactly."""
    one = measured[way] if rule == "strict" else measured[way]["duplicates_as_hits"]
    generator = np.random.default_rng(0)
    texts = [frozenset(sentences) for sentences in scores.sentences]
    found: dict[str, list[float]] = {name: [] for name in ("mrr", "map", "ndcg_at_10", "recall_at_5")}
    ranks = []
    for q, items in pairs(scores, way):
        good = {g for g in items if (g == q if rule == "strict" else texts[g] == texts[q])}
        best = max(items[g] for g in good)
        tied = [g for g in items if items[g] == best]
        ranks.append(sum(value > best for value in items.values()) + (len(tied) + 1) / (len(good & set(tied)) + 1))
        gains = {g: 2 ** grade(said[q], said[g]) - 1 for g in items}
        ideal = sum(gain / math.log2(p + 2) for p, gain in enumerate(sorted(gains.values(), reverse=True)[:10]))
        each: dict[str, list[float]] = {name: [] for name in found}
        for order in orders(items, generator, 300):
            places = [p for p, g in enumerate(order, 1) if g in good]
            each["mrr"].append(1 / places[0])
            each["map"].append(fmean(i / p for i, p in enumerate(places, 1)))
            each["ndcg_at_10"].append(sum(gains[g] / math.log2(p + 2) for p, g in enumerate(order[:10])) / ideal)
            each["recall_at_5"].append(places[0] <= 5)
        for name, values in each.items():
            found[name].append(fmean(values))
    assert one["mean_rank"] == pytest.approx(fmean(ranks)) and one["median_rank"] == pytest.approx(median(ranks))
    for name, values in found.items():
        assert one[name] == pytest.approx(fmean(values), abs=0.01), name
    drawn = resampled({"mean_rank": ranks, **found})
    for name, (low, high) in drawn.items():
        interval = one[f"{name}_interval"]
        assert interval["n"] == STUDIES and [interval["ci_low"], interval["ci_high"]] == pytest.approx([low, high], abs=0.12 * (high - low))
    assert one["pool"] == STUDIES and one["rule"].startswith("strict" if rule == "strict" else "any report")
    if rule == "strict":
        chance = {
            name: one[f"{name}_interval"]["chance"] for name in ("mean_rank", "median_rank", "mrr", "map", "recall_at_1", "recall_at_10")
        }
        reciprocal = fmean(1 / rank for rank in range(1, STUDIES + 1))
        middle = (STUDIES + 1) / 2
        assert list(chance.values()) == pytest.approx([middle, middle, reciprocal, reciprocal, 1 / STUDIES, 10 / STUDIES])


def shown(of: Any, kind: str, place: int) -> Any:
    return of[kind] if place == 0 else of[f"{kind}_interval"]["chance"]


def test_agreement_is_of_the_first_report_and_chance_of_every_report_in_turn(scores: RetrievalScores, measured: Any, said: Any) -> None:
    found = measured["clinical_agreement"]
    names = sorted(said[0])
    assert found["findings"] == names and found["pool"] == found["queries"] == STUDIES
    for state, value in (("present", 1), ("absent", 0)):
        per_finding: dict[str, list[list[float]]] = {
            name: [[0.0, 0.0], [0.0, 0.0]] for name in names
        }  # of first and anyone: 2 n(q & r), n(q) + n(r)
        for q, items in pairs(scores, WAYS[0]):
            first = [g for g in items if items[g] == max(items.values())]
            for place, drawn in enumerate((first, list(items))):
                for g in drawn:
                    for name in names:
                        mine, theirs = said[q][name], said[g][name]
                        if -1 not in (mine, theirs):
                            per_finding[name][place][0] += 2 * (mine == theirs == value) / len(drawn)
                            per_finding[name][place][1] += ((mine == value) + (theirs == value)) / len(drawn)
        kind = f"{state}_f1"
        for place in (0, 1):
            each = [top / bottom if bottom else None for top, bottom in (per_finding[name][place] for name in names)]
            assert [shown(found["per_finding"][name], kind, place) for name in names] == pytest.approx(each, abs=1e-9)
            assert shown(found["macro"], kind, place) == pytest.approx(fmean(value for value in each if value is not None), abs=1e-9)
            tops, bottoms = zip(*(per_finding[name][place] for name in names), strict=True)
            assert shown(found["micro"], kind, place) == pytest.approx(sum(tops) / sum(bottoms), abs=1e-9)
        assert found["micro"][f"{kind}_interval"]["chance_interval"]["n"] == STUDIES


def told(facts: list[Fact], attribute: str) -> dict[str, str]:
    found = {}
    for name in {fact.finding for fact in facts}:
        mine = [fact for fact in facts if fact.finding == name and fact.state != "absent" and getattr(fact, attribute) is not None]
        values = {getattr(fact, attribute) for fact in mine}
        if len(values) == 1 and values != {"bilateral"} and any(fact.state == "present" for fact in mine):
            found[name] = values.pop()
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "attribute"), [("other_side", "side"), ("other_severity", "severity")])
def test_galleries_are_the_own_report_and_those_that_say_otherwise(
    scores: RetrievalScores, measured: Any, stated: list[list[Fact]], way: str, kind: str, attribute: str
) -> None:
    values = [told(facts, attribute) for facts in stated]
    rows = []
    for q, items in pairs(scores, way):
        for name, value in values[q].items():
            wrong = [items[g] for g in items if values[g].get(name) in OTHER[value]]
            others = [items[g] for g in items if g != q and values[g].get(name) == value]
            if wrong:
                beaten = fmean((items[q] > w) + (items[q] == w) / 2 for w in wrong)
                first = 0.0 if max(wrong) > items[q] else 1 / (1 + wrong.count(items[q]))
                rest = fmean((o > w) + (o == w) / 2 for o in others for w in wrong) if others else None
                rows.append((name, beaten, first, rest, len(wrong), q))
    assert len(rows) > 10 and {rest for *_, rest, _, _ in rows} != {None}
    found = measured["hard_galleries"][way][kind]
    assert (found["galleries"], found["queries"], found["pool"]) == (len(rows), len({row[5] for row in rows}), STUDIES)
    assert found["median_wrong"] == median(row[4] for row in rows)
    for name, of in ((None, found), *found["per_finding"].items()):
        some = [row for row in rows if name in (None, row[0])]
        assert of["pairwise_accuracy"] == pytest.approx(fmean(row[1] for row in some))
        assert of["recall_at_1"] == pytest.approx(fmean(row[2] for row in some))
        assert of["recall_at_1_interval"]["chance"] == pytest.approx(fmean(1 / (1 + row[4]) for row in some))
        assert of["recall_at_1_interval"]["n"] == of["pairwise_accuracy_interval"]["n"] == len(some)
        if rests := [row[3] for row in some if row[3] is not None]:
            assert of["others_pairwise_accuracy"] == pytest.approx(fmean(rests)) and of["others_pairwise_accuracy_interval"]["n"] == len(
                rests
            )
    assert set(found["per_finding"]) == {row[0] for row in rows}


def test_what_a_report_leaves_open_is_neither_side() -> None:
    def one(*facts: Fact) -> dict[str, str]:
        return stated_with(facts, "side")

    left, right = Fact("edema", "present", side="left"), Fact("edema", "present", side="right")
    assert one(left) == one(left, Fact("edema", "present")) == one(left, Fact("edema", "absent", side="right")) == {"edema": "left"}
    assert one(left, Fact("edema", "uncertain", side="left")) == {"edema": "left"}
    for none in ((left, right), (left, Fact("edema", "uncertain", side="right")), (Fact("edema", "present", side="bilateral"),)):
        assert one(*none) == {}
    assert one(Fact("edema", "uncertain", side="left")) == one(Fact("edema", "absent", side="left")) == one() == {}


def test_one_pool_of_all_is_the_full_pool_both_ways(measured: Any) -> None:
    """Each pair's own report must be its hit, or the strict figures of one pool are others."""
    pools = measured["pools"]
    assert (pools["size"], pools["repeats"]) == (STUDIES, 2)
    for way in WAYS:
        for small, full in ((pools[way], measured[way]), (pools[way]["duplicates_as_hits"], measured[way]["duplicates_as_hits"])):
            assert small["pool"] == full["pool"] and small["rule"] == full["rule"] and (small["pools"], small["left_out"]) == (1, 0)
            for k in (1, 5, 10):
                assert small[f"recall_at_{k}"] == pytest.approx(full[f"recall_at_{k}"], abs=1e-12)
                chance = small[f"recall_at_{k}_interval"]["chance"]
                assert chance == pytest.approx(full[f"recall_at_{k}_interval"]["chance"], abs=1e-12)
    assert measured[WAYS[0]]["recall_at_1"] != measured[WAYS[1]]["recall_at_1"], "or the way back is not seen"


def test_reports_that_state_nothing_have_no_grades_and_no_galleries(scores: RetrievalScores) -> None:
    mute = RetrievalScores(scores.study_ids, tuple((f"Film {i}.",) for i in range(STUDIES)), scores.similarity, scores.own, scores.own)
    found = retrieval_figures(mute, np.arange(STUDIES), PATIENTS, lexicon_facts(), repeats=5, seed=0)
    json.dumps(found, allow_nan=False)
    assert found[WAYS[0]]["ndcg_at_10"] is None and found[WAYS[0]]["ndcg_at_10_interval"]["n"] == 0
    assert found[WAYS[0]]["map"] > 0 and found["clinical_agreement"]["per_finding"] == {} and "pools" not in found
    for way in WAYS:
        for one in found["hard_galleries"][way].values():
            assert one["galleries"] == 0 and one["pairwise_accuracy"] is None and one["recall_at_1_interval"]["n"] == 0


# --- the command


def medvl(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in args])


def test_evaluate_prints_rule_and_pool_and_its_csv_gives_the_figures_again(tiny: Any, tmp_path: Path) -> None:
    """Mean rank, reciprocal rank and the agreement of the first report, from retrieval.csv and the words of the table alone."""
    done = medvl("evaluate", tiny.manifest, "--model", tiny.model, "--out", tmp_path, "--repeats", 5, "--pool", 8, "--pool-repeats", 3)
    assert done.exit_code == 0, done.output
    for words in ("image to report, full pool 24, 24 queries", "3 pools of 8 dealt 3 times", "MRR", "MAP", "nDCG@10", "mean rank"):
        assert words in done.output, words
    assert "a hit is the own report, or any with the same sentences" in " ".join(done.output.split())
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["protocol"]["pools"] == {"size": 8, "repeats": 3}
    with (tmp_path / "retrieval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for way in WAYS:
        mine = [row for row in rows if row["direction"] == way]
        for rule, one in (("strict", found["retrieval"][way]), ("duplicates", found["retrieval"][way]["duplicates_as_hits"])):
            places = [[int(row[f"{name}_{rule}"]) for name in ("above", "tied", "hits")] for row in mine]
            inverse = [sum(math.comb(t - j, h - 1) / math.comb(t, h) / (a + j) for j in range(1, t - h + 2)) for a, t, h in places]
            assert one["mrr"] == pytest.approx(fmean(inverse), abs=1e-12)
            assert one["mean_rank"] == pytest.approx(fmean(a + (t + 1) / (h + 1) for a, t, h in places))
    with tiny.manifest.open(newline="") as file:
        texts = {row["study_id"]: row["findings"] for row in csv.DictReader(file)}
    top = bottom = 0.0
    for row in (row for row in rows if row["direction"] == WAYS[0]):
        first = json.loads(row["first"])
        assert len(first) == int(row["first_tied"]) > 0
        for name in ("cardiomegaly", "pleural effusion", "lung nodule"):
            yes = f"There is {name}"
            for other in first:
                top += 2 * (yes in texts[row["study_id"]] and yes in texts[other]) / len(first)
                bottom += ((yes in texts[row["study_id"]]) + (yes in texts[other])) / len(first)
    agreement = found["retrieval"]["clinical_agreement"]
    assert agreement["findings"] == ["cardiomegaly", "lung_nodule", "pleural_effusion"]
    assert agreement["micro"]["present_f1"] == pytest.approx(top / bottom, abs=1e-9)


def test_pools_that_cannot_be_dealt_are_usage_errors(tiny: Any, tmp_path: Path) -> None:
    given = ("evaluate", tiny.manifest, "--model", tiny.model, "--out", tmp_path)
    for more, says in (
        (("--pool", 25), "24 studies of split test have a report"),
        (("--pool", 1), "x>=2"),
        (("--pool-repeats", 3), "with --pool N"),
        (("--pool", 4, "--unit", "image"), "not of images"),
    ):
        done = medvl(*given, *more)
        assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output
    assert not list(tmp_path.iterdir())
