"""Results of several evaluations in one table, and their differences on the units that all of them measured.

Letters: K results, N units (studies, patients or images) that all measured, F findings that all measured.

Results may stand beside each other where their protocols differ in nothing but the weights (``method_sha256``); others only if that is
asked for, with what differs said. Everything is read from results.json and the tables beside it; no image, model or manifest is needed.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.metrics import (
    MACRO,
    Comparison,
    DeLongTest,
    Statistic,
    auprc_statistic,
    auroc_statistic,
    chance_of_a_hit,
    compare_models,
    delong_test,
    mean_statistic,
)
from tasks.evaluation import RETRIEVAL

PREDICTIONS = "predictions.csv"
RECALL = 10


class TabulationError(ValueError):
    """Results that cannot be read, or that do not belong into one table."""


@dataclass(frozen=True)
class Result:
    """One evaluation, as it lies in its folder."""

    name: str
    path: Path
    measured: Mapping[str, Any]
    lines: tuple[Mapping[str, str], ...] = field(repr=False)  # of predictions.csv
    queries: tuple[Mapping[str, str], ...] = field(repr=False)  # of retrieval.csv

    @property
    def protocol(self) -> Mapping[str, Any]:
        """How it was made."""
        found: Mapping[str, Any] = self.measured["protocol"]
        return found


@dataclass(frozen=True)
class Difference:
    """A result against the first: a metric of every finding that both have, and of their mean."""

    name: str
    metric: str
    compared: Mapping[str, Comparison]  # finding, or MACRO; first is this result, second the first one
    delong: Mapping[str, DeLongTest]  # finding -> the test of AUROC


@dataclass(frozen=True)
class Tabulation:
    """K results side by side."""

    results: tuple[Result, ...]
    differing: Mapping[str, tuple[Any, ...]]  # field of the protocol -> its value in each result, besides the weights
    differences: tuple[Difference, ...]
    shared: int  # units that all measured, which differences are made of
    why_not_paired: str | None = None


def load_result(path: Path, name: str | None = None) -> Result:
    """The results of a results.json, or of the folder that has one.

    Raises:
        TabulationError: no results of ``medvl evaluate`` with their protocol, or without the table of predictions beside them.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
        measured["protocol"]["method_sha256"], measured["zero_shot"]["per_finding"], measured["interval"]["repeats"]
    except OSError as error:
        raise TabulationError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise TabulationError(
            f"{file}: no results.json of `medvl evaluate` with a protocol ({type(error).__name__}); evaluate again"
        ) from None
    lines = _read(file.parent / PREDICTIONS)
    if not lines or not {"unit", "patient", "row", "hit"} <= lines[0].keys():
        raise TabulationError(f"{file.parent / PREDICTIONS}: not the table that goes with {file.name}; evaluate again")
    queries = _read(file.parent / RETRIEVAL) if (file.parent / RETRIEVAL).is_file() else ()
    return Result(name or file.parent.resolve().name, file, measured, lines, queries)


def tabulate(results: Sequence[Result], *, across: bool = False, repeats: int | None = None, seed: int = 0) -> Tabulation:
    """Put results beside each other and measure their differences from the first.

    Args:
        results: two or more.
        across: table them although their protocols differ.
        repeats: bootstrap resamples over patients; None takes the number of the first result.
    Raises:
        TabulationError: fewer than two, names that repeat, or protocols that differ where that was not asked for.
    """
    if len(results) < 2 or len({one.name for one in results}) != len(results):
        raise TabulationError(f"expected two or more results with names of their own, got {', '.join(one.name for one in results)}")
    differing = differing_fields([one.protocol for one in results])
    if differing and not across:
        told = "; ".join(f"{name}: {' / '.join(map(_short, values))}" for name, values in differing.items())
        raise TabulationError(f"the protocols differ, so the figures may not be comparable: {told}. Table them in spite of it: --across")
    units = [_units(one) for one in results]
    tables = {one.protocol["manifest_sha256"] for one in results}
    kinds = {one.protocol["unit"] for one in results}
    if len(tables) > 1 or len(kinds) > 1:
        return Tabulation(tuple(results), differing, (), 0, "they measured other tables" if len(tables) > 1 else "they count other units")
    shared = sorted(set(units[0]).intersection(*units[1:]))
    if not shared:
        return Tabulation(tuple(results), differing, (), 0, "no unit was measured by all of them")
    count = results[0].measured["interval"]["repeats"] if repeats is None else repeats
    first = results[0]
    patients = [units[0][key] for key in shared]
    differences = [
        Difference(one.name, metric, compare_models(*_on_both(statistics, base), ids, repeats=count, seed=seed), tests)
        for one in results[1:]
        for metric, statistics, base, ids, tests in _metrics(one, first, shared, patients)
    ]
    return Tabulation(tuple(results), differing, tuple(differences), len(shared))


def differing_fields(protocols: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Dotted field -> its value in each protocol, of those that are not the same in all; weights, and what is fitted to them, aside."""
    flat = [dict(_flat(one)) for one in protocols]
    names = dict.fromkeys(name for one in flat for name in one)
    beside = {"sha256", "method_sha256", "score.weights_sha256", "decisions_sha256"}
    values = {name: tuple(one.get(name) for one in flat) for name in names if name not in beside}
    return {name: given for name, given in values.items() if any(one != given[0] for one in given[1:])}


def as_rows(table: Tabulation) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of the table: a line a figure, a column a result, "value (low to high)"."""
    heading = ["metric", "finding", *(one.name for one in table.results)]
    lines = []
    for metric, place in (("AUROC", "zero_shot"), ("pointing game", "grounding")):
        of = [one.measured.get(place, {}) for one in table.results]
        key = {"AUROC": "auroc", "pointing game": "pointing_game"}[metric]
        macro = {"AUROC": "macro_auroc", "pointing game": "pointing_game_macro"}[metric]
        names = dict.fromkeys(name for one in of for name in one.get("per_finding", {}))
        for name in names:
            cells = [one.get("per_finding", {}).get(name) for one in of]
            lines.append([metric, name, *("" if cell is None else _estimate(cell[key], cell) for cell in cells)])
        lines.append([metric, "mean", *(_estimate(one.get(macro), one.get(f"{macro}_interval") or {}) for one in of)])
    for direction in ("image_to_report", "report_to_image"):
        of = [one.measured.get("retrieval", {}).get(direction, {}) for one in table.results]
        if any(of):
            name = f"Recall@{RECALL}, {direction.replace('_', ' ')}"
            key = f"recall_at_{RECALL}"
            lines.append([name, "", *(_estimate(one.get(key), one.get(f"{key}_interval") or {}) for one in of)])
    return heading, lines


def difference_rows(table: Tabulation) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of the differences from the first result."""
    heading = ["result", "metric", "finding", "difference", "ci_low", "ci_high", "p", "p_delong", "n", "n_patients"]
    lines = []
    for one in table.differences:
        for name, found in one.compared.items():
            interval, test = found.difference, one.delong.get(name)
            values = (interval.value, interval.ci_low, interval.ci_high, found.p_value, math.nan if test is None else test.p_value)
            cells = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
            lines.append([one.name, one.metric, "mean" if name == MACRO else name, *cells, str(interval.n), str(interval.n_patients)])
    return heading, lines


def as_dict(table: Tabulation) -> dict[str, Any]:
    """Strict JSON."""
    return {
        "results": [
            {"name": one.name, "method_sha256": one.protocol["method_sha256"], "weights_sha256": one.protocol["score"]["weights_sha256"]}
            for one in table.results
        ],
        "differing": {name: list(values) for name, values in table.differing.items()},
        "reference": table.results[0].name,
        "units_shared": table.shared,
        "not_paired": table.why_not_paired,
        "differences": [
            {
                "result": one.name,
                "metric": one.metric,
                "compared": {name: found.to_dict() for name, found in one.compared.items()},
                "delong": {name: test.to_dict() for name, test in one.delong.items()},
            }
            for one in table.differences
        ],
    }


def _metrics(
    one: Result, first: Result, shared: Sequence[str], patients: Sequence[str]
) -> Iterator[tuple[str, dict[str, Statistic], dict[str, Statistic], Sequence[str], dict[str, DeLongTest]]]:
    """Each metric of a result and of the first, by finding, over the same rows, with the patients of these and DeLong's test where it fits.

    Labels are those of the first where they agree; a unit whose label differs (an image more was read in one) does not count.
    """
    names = [name for name in first.protocol["findings"] if name in one.protocol["findings"]]
    arrays = [_arrays(result, shared, names) for result in (one, first)]
    labels = np.where(arrays[0][0] == arrays[1][0], arrays[1][0], math.nan)
    (_, scores), (_, base) = arrays
    for metric, statistic in (("AUROC", auroc_statistic), ("AUPRC", auprc_statistic)):
        sides = [{name: statistic(labels[:, f], given[:, f]) for f, name in enumerate(names)} for given in (scores, base)]
        tests = {}
        if metric == "AUROC":
            both = [f for f in range(len(names)) if {0.0, 1.0} <= set(labels[:, f].tolist())]
            tests = {names[f]: delong_test(labels[:, f], scores[:, f], base[:, f], patients) for f in both}
        yield metric, sides[0], sides[1], patients, tests
    hits, ids = _paired([_hits(result) for result in (one, first)])
    focal = [name for name in first.measured.get("grounding", {}).get("focal_findings", []) if name in names]
    if hits and focal:
        rows = sorted({row for row, name in hits if name in focal}, key=int)
        columns = [{name: np.array([hits.get((row, name), (math.nan,) * 2)[k] for row in rows]) for name in focal} for k in (0, 1)]
        sides = [{name: mean_statistic(values) for name, values in side.items()} for side in columns]
        yield "pointing game", sides[0], sides[1], [ids[row] for row in rows], {}
    for direction in ("image_to_report", "report_to_image"):
        found = [_recalls(result, direction) for result in (one, first)]
        both_found = [key for key in found[1] if key in found[0]]
        if both_found and {pool for side in found for _, pool in side.values()} == {found[1][both_found[0]][1]}:
            of_study = {line["study_id"]: line["patient"] for line in first.lines}
            values = [{direction: mean_statistic([side[key][0] for key in both_found])} for side in found]
            yield f"Recall@{RECALL}", values[0], values[1], [of_study[study] for study, _ in both_found], {}


def _on_both(first: Mapping[str, Statistic], second: Mapping[str, Statistic]) -> tuple[dict[str, Statistic], dict[str, Statistic]]:
    """The statistics that count any row."""
    kept = [name for name in first if first[name].used.any()]
    return {name: first[name] for name in kept}, {name: second[name] for name in kept}


def _units(result: Result) -> dict[str, str]:
    """Unit, as its rows of the table, -> patient."""
    rows: dict[str, dict[str, None]] = {}
    patients: dict[str, str] = {}
    for line in result.lines:
        rows.setdefault(line["unit"], {})[line["row"]] = None
        patients[line["unit"]] = line["patient"]
    return {" ".join(own): patients[unit] for unit, own in rows.items()}


def _arrays(result: Result, shared: Sequence[str], names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, F) labels and scores of the units by their rows."""
    place = {key.split()[0]: i for i, key in enumerate(shared)}
    column = {name: f for f, name in enumerate(names)}
    labels, scores = np.full((2, len(shared), len(names)), math.nan)
    for line in result.lines:
        if (i := place.get(line["row"])) is not None and (f := column.get(line["finding"])) is not None:
            labels[i, f] = float(line["label"]) if line["label"] else math.nan
            scores[i, f] = float(line["score"])
    return labels, scores


def _hits(result: Result) -> dict[tuple[str, str], tuple[float, str]]:
    """Row and finding -> whether the map's peak hit, and the patient."""
    return {(line["row"], line["finding"]): (float(line["hit"]), line["patient"]) for line in result.lines if line["hit"]}


def _paired(
    sides: Sequence[Mapping[tuple[str, str], tuple[float, str]]],
) -> tuple[dict[tuple[str, str], tuple[float, float]], dict[str, str]]:
    """What both have, and the patient of each row."""
    shared = [key for key in sides[0] if key in sides[1]]
    return {key: (sides[0][key][0], sides[1][key][0]) for key in shared}, {row: sides[1][row, name][1] for row, name in shared}


def _recalls(result: Result, direction: str) -> dict[tuple[str, str], tuple[float, int]]:
    """Study and path of each query -> its chance of a hit among the first ``RECALL``, strictly, and the pool."""
    own = [line for line in result.queries if line["direction"] == direction]
    above, tied, hits, pool = (np.array([int(line[key]) for line in own]) for key in ("above_strict", "tied_strict", "hits_strict", "pool"))
    chances = chance_of_a_hit(tied, hits, RECALL - above) if own else np.zeros(0)
    return {(line["study_id"], line["path"]): (float(chance), int(size)) for line, chance, size in zip(own, chances, pool, strict=True)}


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{before}{name}.")
        else:
            yield f"{before}{name}", item


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _estimate(value: float | None, interval: Mapping[str, Any]) -> str:
    if value is None:
        return ""
    ends = " to ".join("?" if interval.get(end) is None else f"{interval[end]:.3f}" for end in ("ci_low", "ci_high"))
    return f"{value:.3f} ({ends})"


def _read(path: Path) -> tuple[dict[str, str], ...]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(csv.DictReader(file))
    except OSError as error:
        raise TabulationError(f"{path}: cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise TabulationError(f"{path}: no table ({type(error).__name__})") from None
