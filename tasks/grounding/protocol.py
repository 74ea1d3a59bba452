"""What grounding is measured by on each kind of data: how a label becomes a query, and the record that a figure carries.

A set whose labels are findings is asked by the prompts of the finding; a set of sentences by each sentence as it stands. Figures are given
by category of the set, as it names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medvl.types import ImageSample
from reports.prompts import PromptSet
from tasks.annotations import GroundingCase
from tasks.grounding.evaluation import Asked, GroundingImage, MaskOf
from tasks.grounding.grounder import Query, finding_query, phrase_query

SENTENCES = frozenset({"ms_cxr", "padchest_gr", "rexgrounding_ct", "plain"})
"""Formats whose phrases are sentences of their own."""
NOTHING = frozenset({"no finding", "normal", "no findings"})
"""Labels of a set that say that there is nothing: a map of them is no false finding."""


@dataclass(frozen=True)
class GroundingProtocol:
    """All that a figure hangs on."""

    format: str  # of the annotations; manifest: masks, boxes and labels of a manifest
    data_sha256: str
    split: str
    queries: str  # prompts of findings, or sentences
    prompts_sha256: str
    weights_sha256: str
    maps: Mapping[str, Any]
    token_offset: Mapping[str, Any]
    thresholds_sha256: str | None
    mean_iou_thresholds: tuple[float, ...]
    repeats: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Strict JSON with its own hash: the same hash, the same figures."""
        record = asdict(self)
        text = json.dumps(record, sort_keys=True)
        return {**record, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def asked_by(format_name: str) -> str:
    """How a format's labels become queries, in words."""
    return "sentences as they stand" if format_name in SENTENCES else "prompts of findings, labels without prompts as they stand"


def queries_of(cases: Sequence[GroundingCase], format_name: str, prompts: PromptSet) -> tuple[list[Query], list[int]]:
    """The different queries of some cases, and which one each case asks."""
    queries: dict[tuple[str, str], Query] = {}
    which: list[int] = []
    for case in cases:
        known = case.finding is not None and case.finding in prompts.findings and format_name not in SENTENCES
        query = finding_query(case.finding, prompts) if known and case.finding is not None else phrase_query(case.phrase)
        queries.setdefault((query.kind, query.name), query)
        which.append(list(queries).index((query.kind, query.name)))
    return list(queries.values()), which


def images_of(cases: Sequence[GroundingCase], which: Sequence[int], paths: Mapping[str, Path]) -> list[GroundingImage]:
    """Cases by image; those whose region nobody drew, and those of images that are not there, are left out."""
    found: dict[str, list[tuple[GroundingCase, Asked]]] = {}
    for case, query in zip(cases, which, strict=True):
        if case.image not in paths or not (case.regions or case.negative):
            continue
        if case.negative and case.phrase.strip().lower() in NOTHING:
            continue  # true of the image, and no place in it
        group = case.category or case.finding or "phrases"
        found.setdefault(case.image, []).append((case, Asked(query, group, _mask_of(case) if case.regions else None)))
    return [
        GroundingImage(paths[image], parts[0][0].study or image, parts[0][0].patient, tuple(asked for _, asked in parts))
        for image, parts in found.items()
    ]


def _mask_of(case: GroundingCase) -> MaskOf:
    def mask(sample: ImageSample) -> Any:
        return case.mask_on(sample)

    return mask
