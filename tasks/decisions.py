"""From score to decision: calibration, threshold and conformal sets of each finding, fitted on validation studies, kept beside the model.

Shapes: N studies, F findings. The file belongs to one protocol of scores (:mod:`tasks.protocols`) and says so; it is plain JSON, so it
can be copied to another machine that has the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from medvl.files import write_atomically
from medvl.metrics import Calibrator, ConformalBinary, Isotonic, Platt, Temperature, Threshold, calibrator_from_dict, choose_threshold
from medvl.metrics.thresholds import Rule as ThresholdRule
from medvl.types import RESEARCH_USE

FOLDER, FORMAT = "decisions", 1
Method = Literal["platt", "isotonic", "temperature"]
METHODS: Mapping[str, Any] = {"platt": Platt, "isotonic": Isotonic, "temperature": Temperature}
SMALLEST = 1e-12
"""Scores nearer to 0 or 1 count as so far from it, before the logarithm of their odds is taken."""


class DecisionsError(ValueError):
    """Decisions that are damaged, or of other scores than these."""


@dataclass(frozen=True)
class FindingDecision:
    """How the score of one finding becomes a probability, and that a decision."""

    calibrator: Calibrator
    threshold: Threshold  # of the probability
    sets: ConformalBinary

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {"calibrator": self.calibrator.to_dict(), "threshold": self.threshold.to_dict(), "sets": self.sets.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> FindingDecision:
        """The record that :meth:`to_dict` made."""
        parts = (calibrator_from_dict(record["calibrator"]), Threshold.from_dict(record["threshold"]))
        return cls(*parts, ConformalBinary.from_dict(record["sets"]))


@dataclass(frozen=True)
class Decisions:
    """Those of all findings of one protocol.

    Args:
        protocol: hash of the scores' protocol.
        of_odds: scores lie in 0 to 1, and the logarithm of their odds is what is calibrated.
        findings: by their ids.
        left_out: finding -> why it has none.
        fitted_on: what it was fitted on: split, studies, patients, manifest.
    """

    protocol: str
    of_odds: bool
    findings: Mapping[str, FindingDecision]
    left_out: Mapping[str, str] = field(default_factory=dict)
    fitted_on: Mapping[str, Any] = field(default_factory=dict)

    def probabilities(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The calibrated probability of each finding.

        Raises:
            DecisionsError: a finding without a calibration.
        """
        if missing := [name for name in scores if name not in self.findings]:
            raise DecisionsError(f"no calibration of {', '.join(missing)}")
        given = {name: prepared(np.array([score])) if self.of_odds else np.array([score]) for name, score in scores.items()}
        return {name: float(self.findings[name].calibrator.apply(values)[0]) for name, values in given.items()}

    def decide(self, probabilities: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """Finding -> ``call`` at the threshold, and ``set``: what cannot be ruled out at the coverage asked for; both or none abstains."""
        found = {}
        for name, probability in probabilities.items():
            own = self.findings[name]
            absent, present = own.sets.sets([probability])[0].tolist()
            kept = [word for word, inside in (("absent", absent), ("present", present)) if inside]
            call = "present" if probability >= own.threshold.value else "absent"
            found[name] = {"call": call, "set": kept, "abstains": len(kept) != 1}
        return found

    def covers(self, findings: Sequence[str]) -> bool:
        """Whether every one of the findings has a calibration."""
        return all(name in self.findings for name in findings)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :meth:`from_dict`."""
        return {
            "format": FORMAT,
            "notice": RESEARCH_USE,
            "protocol": self.protocol,
            "of_odds": self.of_odds,
            "findings": {name: one.to_dict() for name, one in self.findings.items()},
            "left_out": dict(self.left_out),
            "fitted_on": dict(self.fitted_on),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Decisions:
        """The record that :meth:`to_dict` made."""
        findings = {name: FindingDecision.from_dict(one) for name, one in record["findings"].items()}
        return cls(record["protocol"], bool(record["of_odds"]), findings, record["left_out"], record["fitted_on"])

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())


def prepared(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of the odds of scores in 0 to 1."""
    return np.asarray(logit(np.clip(scores, SMALLEST, 1 - SMALLEST)))


def fit_decisions(
    scores: NDArray[np.float64],
    labels: NDArray[np.float64],
    patients: Sequence[str],
    findings: Sequence[str],
    protocol: str,
    *,
    of_odds: bool,
    method: Method = "platt",
    threshold: ThresholdRule = "youden",
    wanted: float | None = None,
    coverage: float = 0.9,
    fitted_on: Mapping[str, Any] | None = None,
) -> Decisions:
    """Fit on validation studies; a finding that cannot be fitted is left out with the reason.

    Conformal limits are from the first study of each patient: rows of one patient are not exchangeable with those of others. They are of
    probabilities that were calibrated on the same rows, which costs next to nothing of the coverage for the two or three numbers of Platt
    and temperature, and more for isotonic steps.

    Args:
        scores, labels: (N, F); labels 1, 0, -1 uncertain, NaN not mentioned.
        patients: (N,) of each study.
        of_odds: calibrate the logarithm of the odds of the scores, which then lie in 0 to 1.
        coverage: of the conformal sets, among those with a finding and among those without.
        others: see :class:`Decisions` and :func:`medvl.metrics.choose_threshold`.
    """
    first = np.array([patients.index(patient) == i for i, patient in enumerate(patients)])
    found: dict[str, FindingDecision] = {}
    left_out: dict[str, str] = {}
    for i, name in enumerate(findings):
        column, truth = scores[:, i], labels[:, i]
        known = np.isin(truth, (0.0, 1.0)) & np.isfinite(column)
        count = {value: int((truth[known & first] == value).sum()) for value in (0.0, 1.0)}
        if min(count.values()) < 2:
            left_out[name] = f"{count[1.0]} patients with it and {count[0.0]} without: at least 2 of each are needed"
            continue
        given = prepared(column[known]) if of_odds else column[known]
        try:
            calibrator = METHODS[method].fit(given, truth[known])
        except ValueError as error:
            left_out[name] = str(error)
            continue
        probability = calibrator.apply(given)
        chosen = choose_threshold(truth[known], probability, threshold, wanted)
        alone = first[known]
        sets = ConformalBinary.fit(probability[alone], truth[known][alone], round(1 - coverage, 9))
        found[name] = FindingDecision(calibrator, chosen, sets)
    studies = {"studies": len(scores), "patients": int(first.sum()), "method": method, "coverage": coverage}
    return Decisions(protocol, of_odds, found, left_out, {**studies, **(fitted_on or {})})


def place_of(model: Path, protocol: str) -> Path:
    """Where the decisions of a protocol lie beside a model."""
    return model / FOLDER / f"{protocol[:16]}.json"


def load_decisions(path: Path, protocol: str) -> Decisions:
    """Decisions of a file, for scores of this protocol.

    Raises:
        DecisionsError: a file that cannot be read as such, or that was fitted to scores of another protocol.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise DecisionsError(f"{path}: format {record['format']}, expected {FORMAT}")
        found = Decisions.from_dict(record)
    except DecisionsError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DecisionsError(f"{path}: no decisions that `medvl calibrate` wrote ({type(error).__name__})") from error
    if found.protocol != protocol:
        raise DecisionsError(f"{path} was fitted to the scores of another model, preset, prompts or preprocessing; run `medvl calibrate`")
    return found
