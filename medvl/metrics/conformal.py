"""Split-conformal sets for one finding: which of absent and present cannot be ruled out, with coverage that does not hang on the model.

Shapes: N rows. Column 0 of a set is absent, column 1 is present. A set of one is a decision; both or none is an abstention.

The guarantee: if validation rows and the new one are exchangeable, the set holds the true label with chance at least 1 - alpha, on average
over validation sets. It is lost where patients differ (another site), and rows of one patient are not exchangeable with those of others:
fit on one row a patient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvl.metrics.bootstrap import Statistic, mean_statistic
from medvl.metrics.labels import known_finite, known_probabilities

ABSTAIN = -1


@dataclass(frozen=True)
class ConformalBinary:
    """A label y belongs to the set if its nonconformity, 1 - p for present and p for absent, is at most the limit of that label."""

    alpha: float  # chance that a set may miss the true label
    class_conditional: bool  # whether the chance holds for each label by itself
    limit_absent: float  # in [0, 1]; 1 rules nothing out
    limit_present: float
    n_absent: int  # validation rows
    n_present: int

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and 0 <= self.limit_absent <= 1 and 0 <= self.limit_present <= 1):
            raise ValueError(f"alpha must lie between 0 and 1 and limits in [0, 1], got {self}")

    @classmethod
    def fit(cls, probabilities: ArrayLike, labels: ArrayLike, alpha: float = 0.1, *, class_conditional: bool = True) -> ConformalBinary:
        """Limits from validation rows: the ceil((n + 1) (1 - alpha))-th smallest nonconformity of n true labels, or 1 where n is less.

        Args:
            probabilities: (N,) of present, in [0, 1]. They need not be calibrated: coverage holds for any, better ones make smaller sets.
            labels: (N,) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count, so coverage is one of stated labels.
            alpha: in (0, 1).
            class_conditional: limits from the rows of each label (Mondrian), so that 1 - alpha holds among patients with the finding and
                among those without; else one limit, with which a rare finding may be missed far more often than alpha.
        Raises:
            ValueError: shapes that differ, another label, a value that is no probability, no positive or no negative, or an alpha outside.
        Source: Papadopoulos et al. 2002, doi:10.1007/3-540-36755-1_29; Angelopoulos & Bates 2021, arXiv:2107.07511, sec. 1; by class
            (Mondrian): Vovk et al. 2005, "Algorithmic learning in a random world", sec. 4.5.
        """
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
        known_probabilities(labels, probabilities)
        positive, p = known_finite(labels, probabilities)
        of_absent, of_present = p[~positive], 1 - p[positive]
        if class_conditional:
            limits = (_limit(of_absent, alpha), _limit(of_present, alpha))
        else:
            limits = (_limit(np.concatenate([of_absent, of_present]), alpha),) * 2
        return cls(alpha, class_conditional, *limits, n_absent=len(of_absent), n_present=len(of_present))

    def sets(self, probabilities: ArrayLike) -> NDArray[np.bool_]:
        """(N, 2) bool, whether absent and present belong to the set of each of (N,) probabilities.

        Raises:
            ValueError: a value that is NaN or outside [0, 1].
        """
        p = np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
            raise ValueError(f"probabilities of shape {p.shape} must be (N,), in [0, 1] and not NaN")
        return np.stack([p <= self.limit_absent, 1 - p <= self.limit_present], axis=1)

    def decide(self, probabilities: ArrayLike) -> NDArray[np.int64]:
        """(N,) of 1 present, 0 absent and ``ABSTAIN`` where the set holds both or none. Raises as :meth:`sets` does."""
        return decisions(self.sets(probabilities))

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ConformalBinary:
        """The record that :meth:`to_dict` made."""
        return cls(**record)


def decisions(sets: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N,) of 1 present, 0 absent and ``ABSTAIN``, from (N, 2) sets: abstention by set size."""
    return np.where(sets.sum(axis=1) == 1, sets[:, 1].astype(np.int64), ABSTAIN)


def coverage_statistic(labels: ArrayLike, sets: NDArray[np.bool_]) -> Statistic:
    """Share of rows whose (N, 2) set holds the true label; rows labelled -1 or NaN do not count.

    For the coverage among those with the finding, give the other rows the label NaN.
    """
    given = _labels(labels, sets)
    held = np.where(given == 1, sets[:, 1], sets[:, 0])
    return mean_statistic(np.where((given == 1) | (given == 0), held.astype(np.float64), math.nan))


def abstention_statistic(sets: NDArray[np.bool_]) -> Statistic:
    """Share of rows, of any label, whose (N, 2) set is no decision."""
    return mean_statistic((decisions(sets) == ABSTAIN).astype(np.float64))


def decided_accuracy_statistic(labels: ArrayLike, sets: NDArray[np.bool_]) -> Statistic:
    """Share of decisions that are right, of rows that are labelled 1 or 0 and decided; NaN if none is.

    Coverage promises nothing about this one: abstaining on easy rows would keep it low.
    """
    given, decided = _labels(labels, sets), decisions(sets)
    counts = ((given == 1) | (given == 0)) & (decided != ABSTAIN)
    return mean_statistic(np.where(counts, (given == decided).astype(np.float64), math.nan))


def _labels(labels: ArrayLike, sets: NDArray[np.bool_]) -> NDArray[np.float64]:
    given = np.asarray(labels, dtype=np.float64)
    if sets.shape != (*given.shape, 2) or given.ndim != 1:
        raise ValueError(f"labels have shape {given.shape}, sets {sets.shape}; they must be (N,) and (N, 2)")
    return given


def _limit(nonconformity: NDArray[np.float64], alpha: float) -> float:
    n = len(nonconformity)
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))  # 10 * (1 - 0.7) is 3, not 3.0000000000000004
    return float(np.sort(nonconformity)[rank - 1]) if rank <= n else 1.0
