"""What a score hangs on, as one object with one hash: weights, preprocessing, prompts, rule, and what classes are called.

Two scores of one protocol may be compared, calibrated and tabled together; a study's score does not depend on which other findings are
scored beside it, unless the rule joins classes, and then they belong to the protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medvl.types import ImageReader
from reports.prompts import PromptSet
from tasks.scoring import Rule


@dataclass(frozen=True)
class ScoreProtocol:
    """See the module; hashes are SHA-256."""

    weights_sha256: str
    preprocessing_sha256: str
    prompts_sha256: str
    rule: Mapping[str, Any]
    label_set: str | None = None  # classes are called as it publishes them
    classes: tuple[str, ...] | None = None  # of a rule that joins classes

    @classmethod
    def of(
        cls, weights_sha256: str, reader: ImageReader, prompts: PromptSet, rule: Rule, findings: Sequence[str], label_set: str | None
    ) -> ScoreProtocol:
        """That of a model's weights and reader, a set of prompts, a rule, and the findings that are scored."""
        joins = rule.classes == "softmax" or rule.no_finding != "as_label"
        kept = tuple(findings) if joins else None
        told = {name: value for name, value in rule.as_dict().items() if name not in ("differs", "source")}
        return cls(weights_sha256, sha256_of(reader.spec()), prompts.sha256, told, label_set, kept)

    @property
    def sha256(self) -> str:
        """Hash of all of it."""
        return sha256_of(asdict(self))


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON-ready value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
