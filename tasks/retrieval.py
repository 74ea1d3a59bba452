"""Report retrieval as it is measured: an image to the reports of a pool, by the model's own similarity. Archives are :mod:`tasks.archive`.

Shapes: B images, R reports, M different sentences of all reports, D width. A report is the set of its sentences, and scores their mean
similarity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medvl.data.manifest import StudyImage
from medvl.model import DualEncoder, batches
from medvl.types import ImageFeatures, TextFeatures, TextSource, join_texts


@dataclass(frozen=True)
class ReportIndex:
    """Reports as sets of encoded sentences."""

    study_ids: tuple[str, ...]  # R
    sentences: tuple[str, ...]  # M
    features: TextFeatures  # M sentences
    members: Tensor  # (R, M) bool, True where sentence m stands in report r

    def __len__(self) -> int:
        return len(self.study_ids)


def build_index(model: DualEncoder, studies: Sequence[tuple[str, tuple[str, ...]]], batch_size: int = 512) -> ReportIndex:
    """Encode the sentences of (study_id, sentences) pairs; their words are kept if the model's similarity reads them.

    Raises:
        ValueError: no report, or one without a sentence.
    """
    if not studies:
        raise ValueError("there is no report to index")
    empty = [study_id for study_id, sentences in studies if not sentences]
    if empty:
        raise ValueError(f"{len(empty)} studies have no sentence to index (first: study {empty[0]}); leave them out")
    texts = tuple(dict.fromkeys(text for _, sentences in studies for text in sentences))
    column = {text: j for j, text in enumerate(texts)}
    members = torch.zeros(len(studies), len(texts), dtype=torch.bool)
    for row, (_, sentences) in enumerate(studies):
        members[row, [column[text] for text in sentences]] = True
    parts = (model.encode_text(part) for part in batches(texts, batch_size))
    features = join_texts([part if model.similarity.reads_words else TextFeatures(part.pooled) for part in parts])
    return ReportIndex(tuple(study_id for study_id, _ in studies), texts, features, members.to(features.pooled.device))


def studies_of(rows: Iterable[StudyImage], source: TextSource) -> list[tuple[str, tuple[str, ...]]]:
    """(study_id, sentences) of the studies that have a report; a study with several images comes once."""
    found: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if row.study_id not in found and (sentences := source.texts(row.report, row.findings, row.impression)):
            found[row.study_id] = sentences
    return list(found.items())


@torch.inference_mode()
def image_to_reports(model: DualEncoder, images: ImageFeatures, index: ReportIndex) -> tuple[Tensor, Tensor]:
    """(B, R) report scores and (B, M) sentence similarities."""
    similarity = model.similarity(images, index.features)
    members = index.members.float()
    return similarity @ (members / members.sum(1, keepdim=True)).T, similarity
