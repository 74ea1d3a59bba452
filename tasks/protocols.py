"""What a score, and what a figure, hangs on, each as one object with one hash: weights, preprocessing, prompts, rule, names of classes.

Two scores of one protocol may be compared, calibrated and tabled together; a study's score does not depend on which other findings are
scored beside it, unless the rule joins classes, and then they belong to the protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from medvl.types import ImageReader
from reports.prompts import PromptSet
from tasks.scoring import Rule

METRICS = "medvl.metrics 2"
"""Definitions of the metrics; changes when any of them does."""


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


@dataclass(frozen=True)
class EvaluationProtocol:
    """How a figure was made: two results may be tabled together where all of this is the same but the weights.

    ``unit`` is what counts once: a study, a patient, or each image by itself. Metrics are those of :mod:`medvl.metrics`;
    intervals are percentile bootstrap over patients.
    """

    score: ScoreProtocol
    findings: tuple[str, ...]
    manifest_sha256: str
    split: str
    split_source: str
    modality: str
    unit: str
    texts: Mapping[str, Any] | None  # what made the texts of retrieval
    decisions_sha256: str | None
    repeats: int
    seed: int
    name: str | None = None  # of the named protocol, if there was one
    metrics: str = METRICS
    pools: Mapping[str, int] | None = None  # small pools of retrieval: "size" and "repeats"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the hash of all, and that of all but the weights, which results to be tabled together share."""
        told = asdict(self)
        if self.pools is None:
            del told["pools"]  # or results without would have another hash than before there were any
        method = {**told, "score": {**told["score"], "weights_sha256": None}, "decisions_sha256": None}
        return {**told, "sha256": sha256_of(told), "method_sha256": sha256_of(method)}


@dataclass(frozen=True)
class NamedProtocol:
    """What a protocol by name fixes; None leaves it to the command line."""

    name: str
    prompts: str | None = None
    labels: str | None = None
    preset: str | None = None
    split: str | None = None
    modality: str | None = None
    text_policy: str | None = None
    unit: str | None = None


def named_protocol(name: str) -> NamedProtocol:
    """One that comes with the package, or of a YAML file.

    Raises:
        KeyError: no such protocol; the message lists all.
        ValueError: a file with something else in it.
    """
    folder = Path(__file__).with_name("evaluation_protocols")
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else folder / f"{name}.yaml"
    if not path.is_file():
        raise KeyError(f"no protocol {name}; known are {', '.join(sorted(one.stem for one in folder.glob('*.yaml')))}, or a YAML file")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {one.name for one in fields(NamedProtocol)} - {"name"}
    if not isinstance(content, dict) or set(content) - known:
        raise ValueError(f"{path}: expected a protocol with {', '.join(sorted(known))}")
    return NamedProtocol(path.stem, **content)
