"""Thresholds chosen on validation scores, to be kept beside the model and applied to other patients.

Shapes: N validation rows. A row is called positive if its score is at or above the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvl.metrics.classification import f1, mcc
from medvl.metrics.labels import known_finite

Rule = Literal["youden", "best_f1", "best_mcc", "at_sensitivity", "at_specificity"]


@dataclass(frozen=True)
class Threshold:
    """A threshold, the rule it was chosen by, and what it gave on the rows it was chosen on (better than it will give on others)."""

    value: float
    rule: Rule
    wanted: float | None  # the sensitivity or specificity asked for
    sensitivity: float
    specificity: float
    f1: float
    mcc: float
    n_positive: int
    n_negative: int

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Threshold:
        """The record that :meth:`to_dict` made."""
        return cls(**record)


def choose_threshold(labels: ArrayLike, scores: ArrayLike, rule: Rule, wanted: float | None = None) -> Threshold:
    """The best threshold by a rule, among the scores that occur and one just above the highest (nothing is called positive).

    ``youden``: largest sensitivity + specificity - 1. ``best_f1``, ``best_mcc``: largest F1, MCC; of equally good ones the lowest, since a
    missed finding is the worse error. ``at_sensitivity``: the highest threshold whose sensitivity is at least ``wanted``.
    ``at_specificity``: the lowest whose specificity is at least ``wanted``.

    Args:
        labels: (N,) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        scores: (N,), any order-preserving scale, finite.
        rule: see above.
        wanted: in (0, 1], for the last two rules and for none of the others.
    Raises:
        ValueError: shapes that differ, labels without a positive or a negative, a score that is not finite, or a ``wanted`` that does not
            fit the rule.
    Source: Youden 1950, doi:10.1002/1097-0142(1950)3:1<32::AID-CNCR2820030106>3.0.CO;2-3.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"no rule {rule!r}; there are {', '.join(get_args(Rule))}")
    if rule.startswith("at_") != (wanted is not None) or (wanted is not None and not 0 < wanted <= 1):
        raise ValueError(f"rule {rule} with wanted={wanted}: at_sensitivity and at_specificity need a value in (0, 1], the others none")
    positive, values = known_finite(labels, scores)
    candidates, (tp, fp, fn, tn) = _confusions(positive, values)
    quality = {
        "youden": tp * tn - fp * fn,  # (sensitivity + specificity - 1) P N, exact, so that ties are ties
        "best_f1": f1(tp, fp, fn, tn),
        "best_mcc": np.round(mcc(tp, fp, fn, tn), 12),  # the root leaves the last bits of equal ones apart
    }
    if rule == "at_sensitivity":
        best = int(np.flatnonzero(tp / (tp + fn) >= wanted)[-1])
    elif rule == "at_specificity":
        best = int(np.flatnonzero(tn / (tn + fp) >= wanted)[0])
    else:
        best = int(np.argmax(quality[rule]))
    return Threshold(
        value=float(candidates[best]),
        rule=rule,
        wanted=wanted,
        sensitivity=float(tp[best] / (tp[best] + fn[best])),
        specificity=float(tn[best] / (tn[best] + fp[best])),
        f1=float(quality["best_f1"][best]),
        mcc=float(mcc(tp, fp, fn, tn)[best]),
        n_positive=int(positive.sum()),
        n_negative=int((~positive).sum()),
    )


def _confusions(positive: NDArray[np.bool_], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(C,) thresholds, rising, and (4, C) TP, FP, FN and TN at each."""
    candidates = np.unique(values)
    candidates = np.append(candidates, np.nextafter(candidates[-1], np.inf))
    fn = np.searchsorted(np.sort(values[positive]), candidates, side="left").astype(np.float64)
    tn = np.searchsorted(np.sort(values[~positive]), candidates, side="left").astype(np.float64)
    return candidates, np.stack([positive.sum() - fn, (~positive).sum() - tn, fn, tn])
