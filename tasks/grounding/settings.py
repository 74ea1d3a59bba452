"""How a map is made: its source and its refinements, as a record with a hash; thresholds belong to one such record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tasks.grounding.sources import source


@dataclass(frozen=True)
class MapSettings:
    """What makes a map.

    Args:
        source: by name (:data:`tasks.grounding.sources.SOURCES`).
        against: a general phrase that is contrasted with; None: none.
        negation: the phrase's denial is contrasted with: what speaks for "no effusion" speaks against "effusion".
        early: share of the map that is mixed by the likeness of early layers, 0 to 1.
        crops: how many times enlarged the overlapping crops are that are looked at too; 1: none.
        shifts: parts of a token along rows and columns that the image is shifted by, for maps finer than tokens; 1: none.
        smoothing_mm: standard deviation of a Gaussian.
        finer: cells per token along rows and columns on which it is smoothed.
    Raises:
        ValueError: an unknown source, or numbers out of range.
    """

    source: str = "model"
    against: str | None = None
    negation: bool = False
    early: float = 0.0
    crops: int = 1
    shifts: int = 1
    smoothing_mm: float = 0.0
    finer: int = 1

    def __post_init__(self) -> None:
        source(self.source)
        if (
            not 0 <= self.early <= 1
            or not 1 <= self.crops <= 8
            or not 0 <= self.smoothing_mm <= 100
            or not 1 <= min(self.finer, self.shifts) <= max(self.finer, self.shifts) <= 16
        ):
            raise ValueError(
                f"early {self.early}, crops {self.crops}, smoothing_mm {self.smoothing_mm}, finer {self.finer}, shifts "
                f"{self.shifts}: expected 0 to 1, 1 to 8, 0 to 100, 1 to 16 and 1 to 16"
            )

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> MapSettings:
        """The record that :meth:`to_dict` made."""
        return cls(**record)

    @property
    def sha256(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
