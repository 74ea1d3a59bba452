"""DeLong: the variance of an AUROC, and the paired test of two on the same patients, without resampling.

Letters: m positives X and n negatives Y among the N rows that count, K models, I patients.

With psi(x, y) = 1 if x > y, 1/2 if x = y, else 0, the structural components of a model with AUROC a are
    V10_i = 1/n sum_j psi(X_i, Y_j),   V01_j = 1/m sum_i psi(X_i, Y_j)
and their covariance between models, S10 over positives and S01 over negatives, gives that of the AUROCs, S10 / m + S01 / n.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import norm, rankdata

from medvl.metrics.bootstrap import PatientIds
from medvl.metrics.labels import known_rows


@dataclass(frozen=True)
class DeLongInterval:
    """An AUROC with its standard error and the interval value +- z standard_error, cut to [0, 1]; NaN where it is not defined."""

    value: float
    standard_error: float
    ci_low: float
    ci_high: float
    n: int
    n_patients: int
    n_positive: int
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: what is not finite becomes None."""
        return _strict(self)


@dataclass(frozen=True)
class DeLongTest:
    """Two AUROCs of the same rows, their difference (first - second) with its interval, and the two-sided p of no difference."""

    first: float
    second: float
    difference: float
    standard_error: float  # of the difference
    ci_low: float
    ci_high: float
    z: float
    p_value: float  # 1 where both order all pairs alike; NaN where they differ and yet there is no error to measure it by
    n: int
    n_patients: int
    n_positive: int
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: what is not finite becomes None."""
        return _strict(self)


def delong_interval(labels: ArrayLike, scores: ArrayLike, patient_ids: PatientIds | None = None, *, level: float = 0.95) -> DeLongInterval:
    """AUROC with the standard error of DeLong.

    The interval rests on the normal distribution: near 1 or with a few positives it is too narrow on one side and too wide on the other,
    and at exactly 1 or 0 it collapses to that point.

    Args:
        labels: (N,) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        scores: (N,), any order-preserving scale.
        patient_ids: (N,), see :func:`delong_covariance`.
        level: of the interval.
    Raises:
        ValueError: shapes that differ, another label, a NaN score of a row that counts, or a level outside (0, 1).
    Source: see :func:`delong_covariance`.
    """
    components, counts = _measured(labels, [scores], patient_ids, level)
    value, error = float(components.values[0]), _root(components.covariance(np.eye(1)))
    reach = float(ndtri((1 + level) / 2)) * error
    low, high = np.clip([value - reach, value + reach], 0, 1)
    return DeLongInterval(value, error, float(low), float(high), *counts, level=level)


def delong_test(
    labels: ArrayLike, first: ArrayLike, second: ArrayLike, patient_ids: PatientIds | None = None, *, level: float = 0.95
) -> DeLongTest:
    """Whether two models' AUROCs on the same rows differ: z = (a - b) / sqrt(var a + var b - 2 cov(a, b)), two-sided.

    Args:
        labels: (N,) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        first: (N,) scores of one model; the two models' scales need not be the same.
        second: (N,) scores of the other.
        patient_ids: (N,), see :func:`delong_covariance`.
        level: of the interval of the difference.
    Raises:
        ValueError: shapes that differ, another label, a NaN score of a row that counts, or a level outside (0, 1).
    Source: see :func:`delong_covariance`.
    """
    components, counts = _measured(labels, [first, second], patient_ids, level)
    one, other = (float(value) for value in components.values)
    difference, error = one - other, _root(components.covariance(np.array([[1.0, -1.0]])))
    z = difference / error if error > 0 else 0.0 if error == 0 and difference == 0 else math.nan
    reach = float(ndtri((1 + level) / 2)) * error
    p_value = float(2 * norm.sf(abs(z)))
    return DeLongTest(one, other, difference, error, difference - reach, difference + reach, z, p_value, *counts, level=level)


def delong_covariance(
    positive: NDArray[np.bool_], scores: NDArray[np.float64], patient_ids: PatientIds | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(K,) AUROCs of K models on the same rows and their (K, K) covariance, from midranks in O(K N log N).

    With T(z) the midrank of a score among all rows, T_X and T_Y among positives and among negatives:
        V10_i = (T(X_i) - T_X(X_i)) / n,   V01_j = 1 - (T(Y_j) - T_Y(Y_j)) / m

    Rows of one patient are not independent. With ``patient_ids`` the components are summed over the rows of each patient before their
    covariance is taken, which also counts patients with positive and negative rows; with one row a patient it is DeLong's own.

    Args:
        positive: (N,) bool.
        scores: (K, N).
        patient_ids: (N,), the patient of each row; None: every row is a patient of its own.
    Returns:
        NaN AUROCs without both labels; NaN covariance unless two patients have positives and two have negatives.
    Source: DeLong et al. 1988, doi:10.2307/2531595; midranks: Sun & Xu 2014, doi:10.1109/LSP.2014.2337313, alg. 2; patients: Obuchowski
        1997, doi:10.2307/2533958.
    """
    components = _Components.of(positive, scores, patient_ids)
    return components.values, components.covariance(np.eye(len(scores)))


@dataclass(frozen=True)
class _Components:
    """Structural components less the AUROC, summed over the rows of each patient; (K, I) of positives and of negatives."""

    values: NDArray[np.float64]  # (K,) AUROCs
    of_positives: NDArray[np.float64]
    of_negatives: NDArray[np.float64]
    rows: tuple[int, int]  # m, n
    patients: tuple[int, int, int]  # with a positive, with a negative, all

    @classmethod
    def of(cls, positive: NDArray[np.bool_], scores: NDArray[np.float64], patient_ids: PatientIds | None) -> _Components:
        k, m, n = len(scores), int(positive.sum()), int((~positive).sum())
        if not m or not n:
            return cls(np.full(k, math.nan), np.zeros((k, 0)), np.zeros((k, 0)), (m, n), (0, 0, 0))
        everyone = rankdata(scores, axis=1)
        v10 = (everyone[:, positive] - rankdata(scores[:, positive], axis=1)) / n
        v01 = 1 - (everyone[:, ~positive] - rankdata(scores[:, ~positive], axis=1)) / m
        values = v10.mean(axis=1)
        member = np.arange(len(positive)) if patient_ids is None else _members(patient_ids)
        patients = int(member.max()) + 1
        x, y = (
            np.array([np.bincount(member[side], row - value, patients) for row, value in zip(v, values, strict=True)], dtype=np.float64)
            for side, v in ((positive, v10), (~positive, v01))
        )
        return cls(values, x, y, (m, n), (len(np.unique(member[positive])), len(np.unique(member[~positive])), patients))

    def covariance(self, contrasts: NDArray[np.float64]) -> NDArray[np.float64]:
        """(C, C) covariance of C sums of AUROCs, weighted by (C, K). Contrasts before squares: equal models differ by exactly 0."""
        (m, n), (with_positive, with_negative, patients) = self.rows, self.patients
        if with_positive < 2 or with_negative < 2:
            return np.full((len(contrasts), len(contrasts)), math.nan)
        x, y = contrasts @ self.of_positives / m, contrasts @ self.of_negatives / n
        across = x @ y.T
        own = with_positive / (with_positive - 1) * (x @ x.T) + with_negative / (with_negative - 1) * (y @ y.T)
        return own + patients / (patients - 1) * (across + across.T)


def _measured(
    labels: ArrayLike, models: list[ArrayLike], patient_ids: PatientIds | None, level: float
) -> tuple[_Components, tuple[int, int, int]]:
    """The components, and rows, patients and positives that count."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    known = [known_rows(labels, scores) for scores in models]
    used, positive, _ = known[0]
    if patient_ids is not None and len(patient_ids) != len(used):
        raise ValueError(f"{len(used)} labels for {len(patient_ids)} patient ids; they must match")
    kept = None if patient_ids is None else [name for name, counts in zip(patient_ids, used, strict=True) if counts]
    components = _Components.of(positive, np.stack([scores for _, _, scores in known]), kept)
    patients = len(positive) if kept is None else len({str(name) for name in kept})
    return components, (len(positive), patients, int(positive.sum()))


def _root(covariance: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.maximum(covariance[0, 0], 0.0)))  # rounding may leave -1e-20; NaN stays


def _members(patient_ids: PatientIds) -> NDArray[np.int64]:
    return np.unique(np.asarray([str(name) for name in patient_ids]), return_inverse=True)[1].reshape(-1)


def _strict(record: DeLongInterval | DeLongTest) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in asdict(record).items()}
