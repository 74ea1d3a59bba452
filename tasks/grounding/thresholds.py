"""Levels of maps, chosen on validation studies and kept beside the model: a calibration of each finding, one threshold for all, one spread.

Shapes: N studies, F findings. A map's score is its highest value. Of each finding a Platt calibration makes it a probability; one threshold
of that probability holds for all: the lowest at which no finding is found in more than the share asked for of the images where it is
absent, and all together in no more with 95 % certainty. How far a region spreads is chosen by Dice on those that have masks. A phrase that
is no finding of the set takes the calibration of all findings together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.files import write_atomically
from medvl.metrics import Platt
from medvl.types import RESEARCH_USE
from tasks.grounding.grounder import Query
from tasks.grounding.settings import MapSettings
from tasks.grounding.statements import Levels

FOLDER, FORMAT = "grounding", 1
STEPS = 64
"""Levels between the lowest and the highest score of validation that a spread is chosen from."""


class ThresholdsError(ValueError):
    """Thresholds that are damaged, or of other maps than these."""


@dataclass(frozen=True)
class QueryLevels:
    """Of one finding, or of all phrases together."""

    calibrator: Platt
    spread: float | None  # None: no masks to choose it by; regions reach as far as the phrase is found


@dataclass(frozen=True)
class MapThresholds:
    """Those of one model and one way of making maps.

    Args:
        weights_sha256: of the model.
        modality: xray or ct; a model of both has thresholds of each.
        settings: how its maps are made.
        threshold: of the probability.
        findings: by id.
        pooled: of any other phrase.
        left_out: finding -> why it has none of its own and takes ``pooled``, or is never found.
        prompts_sha256: of the prompts that findings were asked by.
        fitted_on: split, studies, patients, manifest; what the threshold gave there.
    """

    weights_sha256: str
    modality: str
    settings: MapSettings
    threshold: float
    findings: Mapping[str, QueryLevels]
    pooled: QueryLevels
    left_out: Mapping[str, str] = field(default_factory=dict)
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    prompts_sha256: str | None = None

    def of(self, query: Query) -> QueryLevels:
        """The finding's own, or those of any phrase; a phrase that is called like a finding is not asked by its prompts."""
        return self.findings.get(query.name, self.pooled) if query.kind == "finding" else self.pooled

    def probability(self, query: Query, score: float) -> float | None:
        """Calibrated probability of a map's highest score; None of a map that saw nothing."""
        return None if math.isnan(score) else float(self.of(query).calibrator.apply(np.array([score]))[0])

    def levels(self, query: Query) -> Levels:
        """The threshold on the scale of the query's map."""
        own = self.of(query)
        detect = score_at(own.calibrator, self.threshold)
        return Levels(detect, detect if own.spread is None else min(own.spread, detect))

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :meth:`from_dict`."""

        def one(levels: QueryLevels) -> dict[str, Any]:
            return {"calibrator": levels.calibrator.to_dict(), "spread": levels.spread}

        return {
            "format": FORMAT,
            "notice": RESEARCH_USE,
            "weights_sha256": self.weights_sha256,
            "modality": self.modality,
            "settings": self.settings.to_dict(),
            "threshold": self.threshold,
            "findings": {name: one(levels) for name, levels in self.findings.items()},
            "pooled": one(self.pooled),
            "left_out": dict(self.left_out),
            "fitted_on": dict(self.fitted_on),
            "prompts_sha256": self.prompts_sha256,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> MapThresholds:
        """The record that :meth:`to_dict` made."""
        from medvl.metrics import calibrator_from_dict

        def one(given: Mapping[str, Any]) -> QueryLevels:
            calibrator = calibrator_from_dict(given["calibrator"])
            if not isinstance(calibrator, Platt):
                raise ValueError("thresholds of maps are of a Platt calibration")
            return QueryLevels(calibrator, None if given["spread"] is None else float(given["spread"]))

        return cls(
            record["weights_sha256"],
            record["modality"],
            MapSettings.from_dict(record["settings"]),
            float(record["threshold"]),
            {name: one(given) for name, given in record["findings"].items()},
            one(record["pooled"]),
            record["left_out"],
            record["fitted_on"],
            record["prompts_sha256"],
        )

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())


def score_at(calibrator: Platt, probability: float) -> float:
    """The score that is calibrated to a probability; inf where a higher score does not mean a higher probability, or none reaches it."""
    if calibrator.slope <= 0 or probability >= 1:
        return math.inf
    odds = max(probability, 1e-12)
    return (math.log(odds / (1 - odds)) - calibrator.intercept) / calibrator.slope


def fit_thresholds(
    scores: NDArray[np.float64],
    labels: NDArray[np.float64],
    dice: Mapping[str, NDArray[np.float64]],
    grid: NDArray[np.float64],
    findings: Sequence[str],
    *,
    weights_sha256: str,
    modality: str,
    settings: MapSettings,
    false_share: float = 0.05,
    fitted_on: Mapping[str, Any] | None = None,
    prompts_sha256: str | None = None,
) -> MapThresholds:
    """Fit on validation images.

    Args:
        scores: (N, F), highest of each map; NaN of what was not seen.
        labels: (N, F) 1, 0, -1 uncertain, NaN not known.
        dice: finding -> (masks, levels) Dice of its maps above each level of ``grid``; may lack findings.
        grid: (levels,) rising.
        false_share: how often an absent finding may be found.
    Raises:
        ValueError: no finding with images with it and without it.
    """
    known = np.isin(labels, (0.0, 1.0)) & np.isfinite(scores)
    own: dict[str, QueryLevels] = {}
    left_out: dict[str, str] = {}
    probability = np.full(scores.shape, math.nan)
    if len({*labels[known].tolist()}) < 2:
        raise ValueError("thresholds of maps need validation images with findings and without them; none of the labels are so")
    pooled_dice = np.concatenate([table for table in dice.values() if len(table)]) if any(map(len, dice.values())) else None
    pooled = QueryLevels(Platt.fit(scores[known], labels[known]), _best(pooled_dice, grid))
    for i, name in enumerate(findings):
        rows = known[:, i]
        count = {value: int((labels[rows, i] == value).sum()) for value in (0.0, 1.0)}
        if min(count.values()) < 5:
            left_out[name] = f"{count[1.0]} images with it and {count[0.0]} without: at least 5 of each are needed"
            continue
        calibrator = Platt.fit(scores[rows, i], labels[rows, i])
        if calibrator.slope <= 0:
            left_out[name] = "its maps are no higher where it is present: it is never found"
        own[name] = QueryLevels(calibrator, _best(dice.get(name), grid))
    for i, name in enumerate(findings):
        calibrator = own.get(name, pooled).calibrator
        if calibrator.slope > 0:
            probability[known[:, i], i] = calibrator.apply(scores[known[:, i], i])
    absent = probability[(labels == 0) & np.isfinite(probability)]
    present = probability[(labels == 1) & np.isfinite(probability)]
    if not len(absent) or not len(present):
        raise ValueError("no finding has maps that tell its presence on the validation images, so no threshold can be chosen")
    columns = [probability[(labels[:, i] == 0) & np.isfinite(probability[:, i]), i] for i in range(len(findings))]
    threshold = max([lowest_threshold(absent, false_share), *(at_share(column, false_share) for column in columns if len(column))])
    given = {
        "false_share_wanted": false_share,
        "false_share": float((absent >= threshold).mean()),
        "found_share": float((present >= threshold).mean()),
        "absent": len(absent),
        "present": len(present),
    }
    return MapThresholds(
        weights_sha256, modality, settings, threshold, own, pooled, left_out, {**given, **(fitted_on or {})}, prompts_sha256
    )


def at_share(absent: NDArray[np.float64], share: float) -> float:
    """The lowest threshold at which at most a share of the absent is found."""
    ordered = np.sort(absent)[::-1]
    return _above(ordered, min(int(share * len(ordered)), len(ordered) - 1))


def _above(falling: NDArray[np.float64], refused: int) -> float:
    """Half way from a value that must not be found to the next higher one, so that the way back through a logarithm does not find it."""
    value = falling[refused]
    higher = falling[falling > value]
    return float((value + (higher[-1] if len(higher) else 1.0)) / 2)


def lowest_threshold(absent: NDArray[np.float64], share: float) -> float:
    """The lowest threshold at which so many of the absent are found that the upper end of the 95 % interval is at most ``share``.

    Source: Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404, one-sided.
    Raises:
        ValueError: fewer absent ones than can show so small a share.
    """
    from scipy.stats import beta

    count = len(absent)
    allowed = [k for k in range(count) if beta.ppf(0.95, k + 1, count - k) <= share]
    if not allowed:
        raise ValueError(f"{count} absent findings cannot show that at most {share:g} of them are found; at least {math.ceil(3 / share)}")
    ordered = np.sort(absent)[::-1]
    return _above(ordered, allowed[-1])


def dice_by_level(scores: NDArray[np.float32], mask: NDArray[np.bool_], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """(levels,) Dice of what is at or above each level with the mask."""
    counts = []
    for part in (scores[mask], scores[~mask]):
        places = np.searchsorted(grid, part[np.isfinite(part)], side="right")  # levels at or below each pixel
        counts.append(np.bincount(places, minlength=len(grid) + 1)[::-1].cumsum()[::-1][1:])
    inside, outside = counts
    return np.asarray(2 * inside / np.maximum(inside + outside + mask.sum(), 1))


def _best(dice: NDArray[np.float64] | None, grid: NDArray[np.float64]) -> float | None:
    if dice is None or not len(dice):
        return None
    return float(grid[int(dice.mean(0).argmax())])


def place_of(model: Path, settings: MapSettings, modality: str) -> Path:
    """Where the thresholds of a way of making maps lie beside a model."""
    return model / FOLDER / f"{modality}-{settings.sha256[:16]}.json"


def load_thresholds(
    path: Path, weights_sha256: str, settings: MapSettings, modality: str, prompts_sha256: str | None = None
) -> MapThresholds:
    """Thresholds of a file, for maps of this model made this way, of one kind of image, asked by these prompts.

    Raises:
        ThresholdsError: a file that cannot be read as such, or of other weights, settings, images or prompts.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ThresholdsError(f"{path}: format {record['format']}, expected {FORMAT}")
        found = MapThresholds.from_dict(record)
    except ThresholdsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ThresholdsError(f"{path}: no thresholds that `medvl calibrate-maps` wrote ({type(error).__name__})") from error
    if found.weights_sha256 != weights_sha256 or found.settings != settings or found.modality != modality:
        raise ThresholdsError(f"{path} is of other weights or images, or of maps that were made otherwise; run `medvl calibrate-maps`")
    if prompts_sha256 is not None and found.prompts_sha256 not in (None, prompts_sha256):
        raise ThresholdsError(f"{path} was chosen with other prompts; give --prompts as then, or run `medvl calibrate-maps` with these")
    return found
