"""The scores of one study as a DICOM SR (TID 1500) beside its images: what was scored, by what, and that it is research.

Findings that have a SNOMED CT term which says just that are coded by it, all others by their names in the scheme 99MEDVL. A score is called
a probability only where it was calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import medvl
from modalities.structured_report import Concept, Device, private, write_measurement_report

NOTICE = "research use, not for diagnosis"
DESCRIPTION = f"medvl zero-shot scores: {NOTICE}"
SCORE = private("sr_score", "Zero-shot score, not calibrated")
PROBABILITY = private("sr_probability", "Calibrated zero-shot probability")
FINDING_CODES: Mapping[str, Concept] = {
    "cardiomegaly": Concept("8186001", "SCT", "Cardiomegaly"),
    "pleural_effusion": Concept("60046008", "SCT", "Pleural effusion"),
    "consolidation": Concept("95436008", "SCT", "Lung consolidation"),
    "pneumothorax": Concept("36118008", "SCT", "Pneumothorax"),
    "lung_nodule": Concept("786838002", "SCT", "Nodule of lung"),
    "edema": Concept("19242006", "SCT", "Pulmonary edema"),
    "atelectasis": Concept("46621007", "SCT", "Atelectasis"),
    "rib_fracture": Concept("33737001", "SCT", "Fracture of rib"),
    "emphysema": Concept("87433001", "SCT", "Pulmonary emphysema"),
}
"""SNOMED CT terms of ``medvl.types.FINDINGS``; a support device may be any of many, so it has none."""


@dataclass(frozen=True)
class SrProvenance:
    """What the scores of a report hang on; hashes as they stand in the other outputs of the run."""

    model: str  # name
    prompts_hash: str
    preprocessing_hash: str
    preset: str  # how similarities became scores
    protocol_hash: str
    calibrated: bool
    version: str = medvl.__version__


ITEMS: Mapping[str, Concept] = {
    "model": private("sr_model", "Model"),
    "prompts_hash": private("sr_prompts", "Prompts hash"),
    "preprocessing_hash": private("sr_preprocessing", "Preprocessing hash"),
    "preset": private("sr_preset", "Scoring preset"),
    "protocol_hash": private("sr_protocol", "Protocol hash"),
    "calibrated": private("sr_calibrated", "Calibrated"),
    "version": private("sr_version", "medvl version"),
}
"""Field of the provenance -> what it is called in the report."""
UNFAMILIAR = private("sr_unfamiliar", "Input unlike what the model was made for")


def write_report(
    out: Path,
    sources: Sequence[Path],
    scores: Mapping[str, float],
    provenance: SrProvenance,
    *,
    unfamiliar: Sequence[str] = (),
    written: datetime | None = None,
    series: int | Literal["largest"] | None = "largest",
) -> Path:
    """Write the scores of one study as a DICOM SR; the same study, scores and provenance give the same bytes.

    Args:
        out: the file, where it ends in ``.dcm``; else a folder, made if need be, in which the file is named by the report's own UID.
        sources: the DICOM files that were scored, of one study; of a folder or zip the CT series that the reader takes.
        scores: finding -> score.
        provenance: how the scores came about.
        unfamiliar: why the images are not what the model was made for, in words without a path; none: the report does not speak of it.
        written: date and time of the report; None: the latest of the sources' own.
        series: which series of a folder that holds several, as the CT reader was told.
    Returns:
        the file.
    Raises:
        ImportError: highdicom is not installed (extra ``sr``).
        ValueError: sources that are no DICOM, or not of one study and patient; no scores, or one that is no finite number; a provenance
            with an empty field.
    """
    told = {name: getattr(provenance, name) for name in ITEMS}
    if empty := [name for name, value in told.items() if isinstance(value, str) and not value.strip()]:
        raise ValueError(f"a report must say what its scores hang on; empty: {', '.join(empty)}")
    if not all(name.strip() for name in scores):
        raise ValueError("a report must say what a score is of; a finding has no name")
    return write_measurement_report(
        out,
        sources,
        {name: (finding_code(name), score) for name, score in scores.items()},
        measure=PROBABILITY if provenance.calibrated else SCORE,
        device=Device("medvl", provenance.version, provenance.model),
        context=[*((ITEMS[name], value) for name, value in told.items()), *([(UNFAMILIAR, "; ".join(unfamiliar))] if unfamiliar else [])],
        notice=NOTICE,
        description=DESCRIPTION,
        written=written,
        series=series,
    )


def finding_code(name: str) -> Concept:
    """The term of a finding, however its label set writes it ("Pleural Effusion"); one of our own where SNOMED CT has none for certain."""
    known = FINDING_CODES.get("_".join(name.lower().split()))
    return private(name, name.replace("_", " ")) if known is None else known
