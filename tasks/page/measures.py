"""The page's figures: cards, table lines and score distributions, from results and predictions.

Shapes: N images, F findings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation import Predictions
from tasks.page.content import Card, Distribution, Estimate, FindingRow, Words

BINS = 20
TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


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


def macro_row(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> FindingRow | None:
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


def cards(results: Mapping[str, Any], baseline: Mapping[str, Any], rows: Sequence[FindingRow], words: Words) -> tuple[Card, ...]:
    """The main figures."""
    found = []
    if "zero_shot" in results:
        areas = results["zero_shot"]
        interval = areas["macro_auroc_interval"]
        beside = "a coin: 0.50"
        if baseline.get("macro_auroc") is not None:
            beside += f"; logistic regression on {words.thumbnail} thumbnails, trained on the labels: {baseline['macro_auroc']:.2f}"
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
                f"a random {words.element}: {np.mean(chances):.2f}",
                f"Pointing game, no tolerance; mean over {len(chances)} focal findings.",
            )
        )
    if "slice_hit_macro" in results.get("slices", {}):
        one = results["slices"]
        interval = one["slice_hit_macro_interval"]
        found.append(
            Card(
                "Best slice cuts the true mask",
                Estimate(one["slice_hit_macro"], interval["ci_low"], interval["ci_high"]),
                f"a random slice: {one['chance_macro']:.2f}",
                f"The slice of highest score, each scored alone; mean over {len(one['per_finding'])} findings.",
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
