"""The demo's page: one HTML file that needs nothing else, for a reader who knows radiographs and not this program.

Shapes: N images, F findings, R reports, H rows, W columns. :class:`DemoPage` holds what is shown as plain values and pictures;
:func:`build_demo_page` gathers it from a model and its predictions; ``page.html`` lays it out, with everything escaped.

Examples are chosen by a rule, not by looks: of the positive studies whose map peaks inside the mask the one with the median score, and the
same of those whose map peaks beside it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medvl.data.manifest import StudyImage
from medvl.model import DualEncoder, write_atomically
from medvl.types import RESEARCH_USE, TextSource
from reports.prompts import PromptSet, load_prompts
from reports.text_source import ReportSentences
from tasks.evaluation import Predictions, RetrievalScores, expected_rank, finding_maps
from tasks.grounding import native_maps
from tasks.masks import finding_mask
from tasks.render import thumbnail
from tasks.viewing import in_plane, shown
from tasks.zero_shot import encode_prompts

BINS = 20
TOP = 3  # reports shown for a query
QUERY_QUANTILES = ((0.1, "An easy one"), (0.5, "A typical one"), (0.9, "A hard one"))
TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Card:
    """One main figure."""

    title: str
    estimate: Estimate
    beside: str  # what to compare it with
    meaning: str


@dataclass(frozen=True)
class FindingRow:
    """One line of the table."""

    title: str
    auroc: Estimate
    n: int
    n_positive: int
    baseline: float | None
    pointing: Estimate | None  # None without masks
    n_masks: int
    chance: float | None  # share of the image that the mask covers on average: the pointing game of a random pixel
    focal: bool


@dataclass(frozen=True)
class Distribution:
    """Scores of the studies with and without a finding: shares per bin, 1 the highest of both, on a logit axis."""

    title: str
    present: tuple[float, ...]
    absent: tuple[float, ...]
    n_present: int
    n_absent: int
    ticks: tuple[tuple[float, str], ...]  # position in 0..1, label


@dataclass(frozen=True)
class Picture:
    """PNG bytes with a caption."""

    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as a data: address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Example:
    """One study of the gallery."""

    study_id: str
    verdict: str
    good: bool
    score: float
    above: float | None  # share of the studies without the finding that score lower
    pictures: tuple[Picture, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """Examples of one finding."""

    title: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Report:
    """A retrieved report beside the query's own."""

    rank: float
    study_id: str
    own: bool
    sentences: tuple[tuple[str, bool], ...]  # and whether the query's own report has the very same one
    shared: tuple[str, ...]  # findings of both studies
    missed: tuple[str, ...]  # findings of the query only
    extra: tuple[str, ...]  # findings of the retrieved study only


@dataclass(frozen=True)
class Query:
    """A radiograph and the reports that fit it best."""

    caption: str
    study_id: str
    picture: Picture
    findings: tuple[str, ...]
    own_rank: float
    pool: int
    own: Report
    hits: tuple[Report, ...]


@dataclass(frozen=True)
class DemoPage:
    """All that is on the page."""

    title: str
    cards: tuple[Card, ...]
    rows: tuple[FindingRow, ...]
    macro: FindingRow | None
    distributions: tuple[Distribution, ...]
    galleries: tuple[Gallery, ...]
    queries: tuple[Query, ...]
    methods: tuple[tuple[str, str], ...]
    rejected: int = 0
    notice: str = RESEARCH_USE


def write_page(path: Path, content: DemoPage) -> Path:
    """Write the page whole or not at all; every text is escaped, every picture is inside."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figure=_figure, percent=_percent)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, template.render(page=content).encode("utf-8"))
    return path


def build_demo_page(
    path: Path,
    *,
    model: DualEncoder,
    predictions: Predictions,
    results: Mapping[str, Any],
    baseline: Mapping[str, Any],
    facts: Mapping[str, Any],
    prompts: PromptSet | None = None,
    source: TextSource | None = None,
) -> Path:
    """Gather what the page shows and write it.

    Args:
        path: the HTML file.
        model: what made ``predictions``; draws the maps of the examples.
        predictions: of the held-out images.
        results: of :func:`tasks.evaluation.results`.
        baseline: ``macro_auroc`` and ``per_finding`` of the thumbnail baseline, AUROC or None.
        facts: how it was made, for the methods box; nested values are told in one line.
        prompts: that ``predictions`` were made with; the built-in ones unless told.
        source: that reports were split with; their sentences unless told.
    """
    prompts, source = prompts or load_prompts(), source or ReportSentences()
    rows = finding_rows(predictions, results, baseline)
    return write_page(
        path,
        DemoPage(
            title="What the model sees in chest radiographs it was never trained on",
            cards=cards(predictions, results, baseline, rows),
            rows=rows,
            macro=_macro_row(results, baseline),
            distributions=tuple(
                distribution(title_of(name), predictions.labels[:, j], predictions.scores[:, j])
                for j, name in enumerate(predictions.findings)
                if {0.0, 1.0} <= set(predictions.labels[:, j])
            ),
            galleries=galleries(model, predictions, prompts, source),
            queries=queries(model, predictions),
            methods=tuple((title_of(str(name)), told(value)) for name, value in facts.items()),
            rejected=len(predictions.rejected),
        ),
    )


def finding_rows(predictions: Predictions, results: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[FindingRow, ...]:
    """The table's lines, in the order of the findings."""
    pointing = results.get("grounding", {}).get("per_finding", {})
    rows = []
    for j, name in enumerate(predictions.findings):
        one, at = results["zero_shot"]["per_finding"][name], pointing.get(name)
        rows.append(
            FindingRow(
                title=title_of(name),
                auroc=Estimate(one["auroc"], one["ci_low"], one["ci_high"]),
                n=one["n"],
                n_positive=one["n_positive"],
                baseline=baseline.get("per_finding", {}).get(name),
                pointing=None if at is None else Estimate(at["pointing_game"], at["ci_low"], at["ci_high"]),
                n_masks=0 if at is None else at["n"],
                chance=None if at is None else float(np.nanmean(predictions.mask_fraction[:, j])),
                focal=at is not None and at["focal"],
            )
        )
    return tuple(rows)


def _macro_row(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> FindingRow | None:
    if "zero_shot" not in results:
        return None
    areas, pointing = results["zero_shot"], results.get("grounding", {})
    interval = areas["macro_auroc_interval"]
    return FindingRow(
        title="Mean",
        auroc=Estimate(areas["macro_auroc"], interval["ci_low"], interval["ci_high"]),
        n=interval["n"],
        n_positive=0,
        baseline=baseline.get("macro_auroc"),
        pointing=_pointing_macro(pointing),
        n_masks=pointing.get("pointing_game_macro_interval", {}).get("n", 0),
        chance=None,
        focal=True,
    )


def _pointing_macro(grounding: Mapping[str, Any]) -> Estimate | None:
    if "pointing_game_macro" not in grounding:
        return None
    interval = grounding["pointing_game_macro_interval"]
    return Estimate(grounding["pointing_game_macro"], interval["ci_low"], interval["ci_high"])


def cards(
    predictions: Predictions, results: Mapping[str, Any], baseline: Mapping[str, Any], rows: Sequence[FindingRow]
) -> tuple[Card, ...]:
    """The main figures."""
    found = []
    if "zero_shot" in results:
        areas = results["zero_shot"]
        interval = areas["macro_auroc_interval"]
        beside = "a coin: 0.50"
        if baseline.get("macro_auroc") is not None:
            beside += f"; logistic regression on 16 × 16 thumbnails, trained on the labels: {baseline['macro_auroc']:.2f}"
        found.append(
            Card(
                f"Mean AUROC over {len(rows)} findings",
                Estimate(areas["macro_auroc"], interval["ci_low"], interval["ci_high"]),
                beside,
                "How often a study with the finding scores above one without it.",
            )
        )
    if (pointing := _pointing_macro(results.get("grounding", {}))) is not None:
        chances = [row.chance for row in rows if row.focal and row.chance is not None]
        found.append(
            Card(
                "Map peaks inside the true mask",
                pointing,
                f"a random pixel: {np.mean(chances):.2f}",
                f"Pointing game, no tolerance; mean over {len(chances)} focal findings.",
            )
        )
    if "retrieval" in results:
        one = results["retrieval"]["image_to_report"]
        interval = one["recall_at_10_interval"]
        found.append(
            Card(
                f"Own report among the first 10 of {one['pool']}",
                Estimate(one["recall_at_10"], interval["ci_low"], interval["ci_high"]),
                f"a random order: {one['chance']:.2f}",
                f"Recall@10, image to report; median rank of the own report {one['median_rank']:g}.",
            )
        )
    return tuple(found)


def distribution(title: str, labels: NDArray[np.float64], scores: NDArray[np.float64]) -> Distribution:
    """Histograms of (N,) scores with label 1 and 0 on one logit axis that holds the middle 99 percent; the rest counts at its ends."""
    values = np.clip(scores, 1e-6, 1 - 1e-6)
    at = np.log(values / (1 - values))
    known = np.isin(labels, (0, 1))
    low, high = np.quantile(at[known], (0.005, 0.995))
    middle, half = (low + high) / 2, max(high - low, 0.2) / 2 * 1.04
    low, high = middle - half, middle + half
    edges = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(np.clip(at[labels == label], low, high), edges)[0].astype(float) for label in (1, 0)]
    shares = [count / max(count.sum(), 1) for count in counts]
    highest = max(float(share.max()) for share in shares) or 1.0
    return Distribution(
        title=title,
        present=tuple(float(v) / highest for v in shares[0]),
        absent=tuple(float(v) / highest for v in shares[1]),
        n_present=int(counts[0].sum()),
        n_absent=int(counts[1].sum()),
        ticks=_ticks(low, high),
    )


def _ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Scores to name on a logit axis: round ones that lie in it, or its ends."""
    placed = [((math.log(score / (1 - score)) - low) / (high - low), f"{score:g}") for score in TICKS]
    inside = [(at, label) for at, label in placed if 0.07 <= at <= 0.93]
    if len(inside) >= 2:
        return tuple(inside)
    scores = [1 / (1 + math.exp(-(low + at * (high - low)))) for at in (0.1, 0.9)]
    return tuple((at, f"{score:.3g}") for at, score in zip((0.1, 0.9), scores, strict=True))


def galleries(model: DualEncoder, predictions: Predictions, prompts: PromptSet, source: TextSource) -> tuple[Gallery, ...]:
    """A typical hit and a typical miss of every finding that has positive studies."""
    bank = encode_prompts(model, prompts, predictions.findings)
    found = []
    for j, name in enumerate(predictions.findings):
        chosen = choose_examples(predictions.labels[:, j], predictions.scores[:, j], predictions.hits[:, j])
        maps = {i: _finding_map(model, predictions.rows[i], bank, j) for i, _, _ in chosen}
        largest = max((float(np.nanmax(np.abs(scores))) for scores in maps.values()), default=0.0) or 1.0
        examples = tuple(
            _example(model, predictions, source, name, i, verdict, good, maps[i], (-largest, largest)) for i, verdict, good in chosen
        )
        if examples:
            found.append(Gallery(title_of(name), examples))
    return tuple(found)


def choose_examples(
    labels: NDArray[np.float64], scores: NDArray[np.float64], hits: NDArray[np.float64]
) -> tuple[tuple[int, str, bool], ...]:
    """(row, what it shows, whether that is right) of up to two positive studies, by the rule in the module's docstring.

    Without a miss the second is the positive study with the lowest score; without masks the two are those with the median and the lowest.
    """
    positive = np.flatnonzero(labels == 1)
    if not len(positive):
        return ()
    ordered = positive[np.argsort(scores[positive], kind="stable")]
    right, wrong = (ordered[hits[ordered] == value] for value in (1, 0))
    chosen: list[tuple[int, str, bool]] = []
    if len(right):
        chosen.append((int(right[(len(right) - 1) // 2]), "peak inside the true mask", True))
    if len(wrong):
        chosen.append((int(wrong[(len(wrong) - 1) // 2]), "peak outside the true mask", False))
    elif len(right) and ordered[0] != chosen[0][0]:
        chosen.append((int(ordered[0]), "lowest score of all with the finding; peak inside the true mask", True))
    if not chosen:
        chosen.append((int(ordered[(len(ordered) - 1) // 2]), "median score; no mask to compare with", True))
    return tuple(chosen)


@torch.inference_mode()
def _finding_map(model: DualEncoder, row: StudyImage, bank: Any, finding: int) -> NDArray[np.float32]:
    sample = model.read(row.path)
    grids = finding_maps(model, model.encode_samples([sample]), bank)[0, finding]
    return native_maps(grids[None], sample.transform)[0]


def _example(
    model: DualEncoder,
    predictions: Predictions,
    source: TextSource,
    name: str,
    i: int,
    verdict: str,
    good: bool,
    scores: NDArray[np.float32],
    limits: tuple[float, float],
) -> Example:
    row, j = predictions.rows[i], predictions.findings.index(name)
    view = shown(model.reader, row.path)
    native, sides = view.pixels, view.orientation
    mask = finding_mask(row, name, model.read(row.path))
    pictures = [Picture("radiograph", thumbnail(native, orientation=sides))]
    if mask is not None:
        pictures.append(Picture("true mask", thumbnail(native, mask=mask)))
    at = in_plane(predictions.peaks[i][j])
    pictures.append(Picture("similarity map", thumbnail(native, scores=scores, mask=mask, peak=at, limits=limits)))
    without = predictions.scores[predictions.labels[:, j] == 0, j]
    score = float(predictions.scores[i, j])
    return Example(
        study_id=row.study_id,
        verdict=verdict,
        good=good,
        score=score,
        above=float((without < score).mean()) if len(without) else None,
        pictures=tuple(pictures),
        sentences=source.texts(row.report, row.findings, row.impression),
    )


def queries(model: DualEncoder, predictions: Predictions) -> tuple[Query, ...]:
    """Retrieval for images at three quantiles of their own report's rank, among studies with a finding if there are any."""
    scores = predictions.retrieval
    if scores is None:
        return ()
    ranks = {i: expected_rank(scores.similarity[i], scores.own[i]) for i in np.flatnonzero(scores.own.any(1)).tolist()}
    findings = {row.study_id: _present(row) for row in predictions.rows}
    interesting = [i for i in ranks if findings[predictions.rows[i].study_id]] or list(ranks)
    ordered = sorted(interesting, key=lambda i: (ranks[i], i))
    chosen = {ordered[min(int(q * len(ordered)), len(ordered) - 1)]: caption for q, caption in QUERY_QUANTILES}
    return tuple(_query(model, predictions, scores, i, caption, ranks[i], findings) for i, caption in chosen.items())


def _query(
    model: DualEncoder,
    predictions: Predictions,
    scores: RetrievalScores,
    i: int,
    caption: str,
    rank: float,
    findings: Mapping[str, tuple[str, ...]],
) -> Query:
    row = predictions.rows[i]
    own_column = int(np.flatnonzero(scores.own[i])[0])
    mine, own_sentences = findings[row.study_id], set(scores.sentences[own_column])

    def report(column: int, rank: float) -> Report:
        theirs = findings[scores.study_ids[column]]
        return Report(
            rank=rank,
            study_id=scores.study_ids[column],
            own=column == own_column,
            sentences=tuple((text, text in own_sentences) for text in scores.sentences[column]),
            shared=tuple(name for name in mine if name in theirs),
            missed=tuple(name for name in mine if name not in theirs),
            extra=tuple(name for name in theirs if name not in mine),
        )

    view = shown(model.reader, row.path)
    best = np.argsort(-scores.similarity[i], kind="stable")[:TOP]
    return Query(
        caption=caption,
        study_id=row.study_id,
        picture=Picture("query", thumbnail(view.pixels, orientation=view.orientation)),
        findings=mine,
        own_rank=rank,
        pool=len(scores.study_ids),
        own=report(own_column, rank),
        hits=tuple(report(int(column), place) for place, column in enumerate(best, start=1)),
    )


def _present(row: StudyImage) -> tuple[str, ...]:
    return tuple(title_of(name) for name, label in row.labels.items() if label == 1)


def title_of(name: str) -> str:
    """A snake_case name in words."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def told(value: Any) -> str:
    """A value of the methods box in one line; long hashes are cut."""
    if isinstance(value, Mapping):
        words = ((str(name).replace("_", " "), item) for name, item in value.items())
        return ", ".join(f"{name} ({told(item)})" if isinstance(item, Mapping) else f"{name} {told(item)}" for name, item in words)
    if isinstance(value, str):
        return f"{value[:12]}…" if len(value) >= 40 and set(value) <= set("0123456789abcdef") else value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Iterable):
        return ", ".join(told(item) for item in value)
    return "not given" if value is None else str(value)


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
