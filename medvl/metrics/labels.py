"""Labels of one finding: 1 present, 0 absent, -1 uncertain, NaN not mentioned. The last two never count, and are counted.

Shapes: N rows (studies).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class LabelCounts:
    """Rows of each kind; the first two are what a metric rests on, the last two are what it leaves out."""

    positive: int
    negative: int
    uncertain: int
    unmentioned: int

    @property
    def has_both(self) -> bool:
        """Whether there is something to tell apart."""
        return self.positive > 0 and self.negative > 0

    def to_dict(self) -> dict[str, int]:
        """Rows of each kind by name."""
        return asdict(self)


def label_counts(labels: ArrayLike) -> LabelCounts:
    """Count (N,) labels of each kind.

    Raises:
        ValueError: labels that are not (N,), or one that is not 1, 0, -1 or NaN.
    """
    given = np.asarray(labels, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"labels have shape {given.shape}, expected (N,)")
    positive, negative, uncertain = (int((given == value).sum()) for value in (1, 0, -1))
    counts = LabelCounts(positive, negative, uncertain, unmentioned=int(np.isnan(given).sum()))
    if sum(counts.to_dict().values()) != len(given):
        raise ValueError("labels must be 1, 0, -1 (uncertain) or NaN (not mentioned)")
    return counts


def known_rows(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """(N,) bool, the rows whose label is 1 or 0; of these n rows (n,) bool, True where the label is 1, and the (n,) scores.

    A score may be NaN where the label does not count.

    Raises:
        ValueError: shapes that differ, another label, or a NaN score of a row that counts.
    """
    given = np.asarray(labels, dtype=np.float64)
    if given.ndim != 1 or np.shape(scores) != given.shape:
        raise ValueError(f"labels have shape {given.shape}, scores {np.shape(scores)}; both must be (N,)")
    used = ~(np.isnan(given) | (given == -1))
    positive, values = checked(given[used], np.asarray(scores, dtype=np.float64)[used])
    return used, positive, values


def known_probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """:func:`known_rows` of probabilities.

    Raises:
        ValueError: also for a value outside [0, 1].
    """
    used, positive, values = known_rows(labels, probabilities)
    if len(values) and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"probabilities run from {values.min():g} to {values.max():g}, expected [0, 1]; calibrate the scores first")
    return used, positive, values


def known_finite(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """What something is fitted on: (n,) bool labels and (n,) finite scores of the rows that count, with both labels among them.

    Raises:
        ValueError: also for an infinite score, and for rows of one label only.
    """
    _, positive, values = known_rows(labels, scores)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are infinite; nothing can be fitted on them")
    if not 0 < positive.sum() < len(positive):
        raise ValueError(
            f"{int(positive.sum())} positive and {int((~positive).sum())} negative labels; a fit needs both. "
            "Leave the finding out, or validate on more studies"
        )
    return positive, values


def checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels as bool and scores as float64, both (N,).

    Raises:
        ValueError: shapes that differ, a label that is not 1 or 0, or a NaN score.
    """
    given, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if given.ndim != 1 or given.shape != values.shape:
        raise ValueError(f"labels have shape {given.shape}, scores {values.shape}; both must be (N,)")
    if not np.isin(given, (0, 1)).all():
        raise ValueError("labels must be 1 or 0; drop the uncertain (-1) and the missing first")
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; a score that is unknown cannot be ranked")
    return given.astype(bool), values
