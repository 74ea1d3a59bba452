"""Calibration: from a score to a probability, fitted on validation studies and kept beside the model as plain JSON.

Shapes: N rows. Labels are 1, 0, -1 uncertain and NaN not mentioned; the last two do not count. A calibrator is fitted to one finding,
keeps the order of its scores (isotonic regression may tie them), and leaves a NaN score NaN: unknown is not unlikely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit

from medvl.metrics.labels import known_finite


class Calibrator(Protocol):
    """What turns scores into probabilities."""

    kind: ClassVar[str]

    def apply(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of the scores' shape."""

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :func:`calibrator_from_dict`."""


@dataclass(frozen=True)
class Temperature:
    """p = sigmoid(logit / temperature): how sure, but not where the even chance lies; a logit of 0 stays at 0.5."""

    kind: ClassVar[str] = "temperature"
    temperature: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"a temperature must be above 0 and finite, got {self.temperature}")

    @classmethod
    def fit(cls, logits: ArrayLike, labels: ArrayLike) -> Temperature:
        """The temperature of the smallest mean negative log-likelihood.

        Args:
            logits: (N,); of a pair of prompts (positive, negative) under a softmax it is the difference of the similarities.
            labels: (N,).
        Raises:
            ValueError: shapes that differ, a logit that is not finite, labels without a positive or a negative; logits that do not rise
                with the label (the best temperature would be infinite or negative), or with every row on its side of 0 (it would be 0).
        Source: Guo et al. 2017, arXiv:1706.04599, sec. 4.2, for two classes.
        """
        positive, values = known_finite(labels, logits)
        signed = np.where(positive, values, -values)
        if signed.sum() <= 0:
            raise ValueError(
                "the logits do not rise with the label, so no temperature makes them better than p = 0.5; see Platt, or the prompts"
            )
        if signed.min() >= 0:
            raise ValueError("every row lies on its side of 0, so the likelihood rises without end as the temperature falls; see Platt")
        unit = float(np.abs(values).mean())
        z = signed / unit

        def slope(inverse: float) -> float:
            """Derivative of the negative log-likelihood by the inverse temperature; rises from below 0 to above."""
            return float(-(expit(-inverse * z) * z).mean())

        high = 1.0
        while slope(high) < 0:
            high *= 2
        return cls(unit / float(brentq(slope, 0.0, high, xtol=1e-14, rtol=1e-13, maxiter=500)))

    def apply(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of logits of any shape."""
        return np.asarray(expit(np.asarray(scores, dtype=np.float64) / self.temperature))

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :func:`calibrator_from_dict`."""
        return {"kind": self.kind, "temperature": self.temperature}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Temperature:
        """The record that :meth:`to_dict` made."""
        return cls(float(record["temperature"]))


@dataclass(frozen=True)
class Platt:
    """p = sigmoid(slope * score + intercept), for scores of any scale; a model that is worse than chance gets a slope below 0."""

    kind: ClassVar[str] = "platt"
    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slope) and math.isfinite(self.intercept)):
            raise ValueError(f"slope and intercept must be finite, got {self.slope} and {self.intercept}")

    @classmethod
    def fit(cls, scores: ArrayLike, labels: ArrayLike) -> Platt:
        """Slope and intercept of the smallest cross-entropy to smoothed targets.

        With P positives and Q negatives the targets are (P + 1) / (P + 2) and 1 / (Q + 2), which keeps the slope finite where the scores
        separate them. Newton steps on standardised scores, halved until they descend.

        Args:
            scores: (N,), any scale.
            labels: (N,).
        Raises:
            ValueError: shapes that differ, a score that is not finite, labels without a positive or a negative.
        Source: Platt 1999, "Probabilistic outputs for support vector machines", sec. 2.2; Lin et al. 2007, doi:10.1007/s10994-007-5018-6.
        """
        positive, values = known_finite(labels, scores)
        p, q = int(positive.sum()), int((~positive).sum())
        targets = np.where(positive, (p + 1) / (p + 2), 1 / (q + 2))
        middle, width = float(values.mean()), float(values.std())
        if width <= 1e-12 * abs(middle):  # one value throughout: there is no slope to learn
            mean = float(targets.mean())
            return cls(0.0, math.log(mean / (1 - mean)))
        design = np.stack([(values - middle) / width, np.ones(len(values))], axis=1)  # (n, 2)
        slope, intercept = _newton(design, targets)
        return cls(slope / width, intercept - slope * middle / width)

    def apply(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of scores of any shape."""
        return np.asarray(expit(self.slope * np.asarray(scores, dtype=np.float64) + self.intercept))

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :func:`calibrator_from_dict`."""
        return {"kind": self.kind, "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Platt:
        """The record that :meth:`to_dict` made."""
        return cls(float(record["slope"]), float(record["intercept"]))


@dataclass(frozen=True)
class Isotonic:
    """The rising step function nearest the labels, joined by straight lines between its knots and level beyond them.

    It needs more rows than the others, and gives exactly 0 or 1 at the ends where validation saw one label only.
    """

    kind: ClassVar[str] = "isotonic"
    scores: tuple[float, ...]  # knots, rising
    probabilities: tuple[float, ...]  # at each knot, not falling

    def __post_init__(self) -> None:
        x, y = np.array(self.scores), np.array(self.probabilities)
        if not len(x) or x.shape != y.shape or not ((np.diff(x) > 0).all() and (np.diff(y) >= 0).all() and y[0] >= 0 and y[-1] <= 1):
            raise ValueError(f"{len(x)} knots and {len(y)} probabilities: there must be as many, rising, with probabilities in [0, 1]")

    @classmethod
    def fit(cls, scores: ArrayLike, labels: ArrayLike) -> Isotonic:
        """The non-falling function of the scores with the smallest squared error to the labels; equal scores get one value.

        Args:
            scores: (N,), any scale.
            labels: (N,).
        Raises:
            ValueError: shapes that differ, a score that is not finite, labels without a positive or a negative.
        Source: Zadrozny & Elkan 2002, doi:10.1145/775047.775151; pool adjacent violators: Ayer et al. 1955, doi:10.1214/aoms/1177728423.
        """
        positive, values = known_finite(labels, scores)
        knots, group = np.unique(values, return_inverse=True)
        group = group.reshape(-1)
        fitted = _pool_adjacent_violators(np.bincount(group[positive], minlength=len(knots)), np.bincount(group))
        kept = np.ones(len(knots), dtype=bool)
        kept[1:-1] = (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:])  # the ends of a level stretch say it all
        return cls(tuple(knots[kept].tolist()), tuple(fitted[kept].tolist()))

    def apply(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of scores of any shape."""
        return np.asarray(np.interp(np.asarray(scores, dtype=np.float64), self.scores, self.probabilities))

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :func:`calibrator_from_dict`."""
        return {"kind": self.kind, "scores": list(self.scores), "probabilities": list(self.probabilities)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Isotonic:
        """The record that :meth:`to_dict` made."""
        return cls(tuple(map(float, record["scores"])), tuple(map(float, record["probabilities"])))


def calibrator_from_dict(record: Mapping[str, Any]) -> Temperature | Platt | Isotonic:
    """The calibrator whose ``to_dict`` made the record.

    Raises:
        ValueError: a kind that does not exist, or parameters that cannot be.
    """
    kinds: dict[str, type[Temperature] | type[Platt] | type[Isotonic]] = {one.kind: one for one in (Temperature, Platt, Isotonic)}
    if record.get("kind") not in kinds:
        raise ValueError(f"no calibration of kind {record.get('kind')!r}; there are {', '.join(kinds)}")
    return kinds[record["kind"]].from_dict(record)


def _newton(design: NDArray[np.float64], targets: NDArray[np.float64], steps: int = 100) -> tuple[float, float]:
    """Coefficients (2,) of the logistic regression of (n, 2) ``design`` on (n,) soft targets; the loss is strictly convex."""

    def loss(at: NDArray[np.float64]) -> float:
        eta = design @ at
        return float((np.logaddexp(0, eta) - targets * eta).mean())

    at = np.array([0.0, math.log(targets.mean() / (1 - targets.mean()))])
    for _ in range(steps):
        p = expit(design @ at)
        gradient = design.T @ (p - targets) / len(targets)
        if np.abs(gradient).max() < 1e-13:
            break
        curvature = (design * (p * (1 - p))[:, None]).T @ design / len(targets)
        step = np.linalg.solve(curvature + 1e-14 * np.eye(2), gradient)
        size, now = 1.0, loss(at)
        while size > 1e-10 and loss(at - size * step) > now - 1e-4 * size * float(gradient @ step):
            size /= 2
        if size <= 1e-10:  # no descent left above rounding
            break
        at = at - size * step
    return float(at[0]), float(at[1])


def _pool_adjacent_violators(sums: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """(G,) non-falling means nearest the group means ``sums / weights``: neighbours that fall are pooled until none does."""
    blocks: list[tuple[int, int, int]] = []  # sum, weight, groups
    for total, weight in zip(sums.tolist(), weights.tolist(), strict=True):
        block = (total, weight, 1)
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:  # counts, so the comparison is exact
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    return np.repeat([total / weight for total, weight, _ in blocks], [groups for _, _, groups in blocks])
