"""Report retrieval: an image or a text to the reports that fit it best.

Shapes: B images, R reports, M different sentences of all reports, D width. A report is the set of its sentences. For an image, a report
scores the mean similarity of its sentences; for a text, the highest cosine of any of its sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medvl.data.manifest import StudyImage
from medvl.model import DualEncoder, batches
from medvl.nn.similarity import unit
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


@dataclass(frozen=True)
class Hit:
    """One retrieved report."""

    rank: int
    study_id: str
    score: float
    sentence: str  # the sentence of the report that fits the query best


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


@torch.inference_mode()
def text_to_reports(model: DualEncoder, texts: Sequence[str], index: ReportIndex) -> tuple[Tensor, Tensor]:
    """(Q, R) report scores and (Q, M) sentence cosines of Q query texts."""
    cosine = unit(model.encode_text(texts).pooled) @ unit(index.features.pooled).T
    return torch.stack([cosine.masked_fill(~row, -torch.inf).amax(1) for row in index.members], dim=1), cosine


def search(model: DualEncoder, query: str | Path, index: ReportIndex, top: int = 5) -> list[Hit]:
    """The reports that fit a text (str) or an image file (Path) best, best first; equal scores keep the order of the index.

    Raises:
        UnreadableImageError: an image that cannot be read.
        ValueError: an empty query text, or ``top`` below 1.
    """
    if top < 1:
        raise ValueError(f"top is {top}, expected at least 1")
    if isinstance(query, Path):
        reports, sentences = image_to_reports(model, model.encode_image(query), index)
    elif query.strip():
        reports, sentences = text_to_reports(model, [query], index)
    else:
        raise ValueError("the query is empty")
    scores, order = reports[0].sort(descending=True, stable=True)
    best = sentences[0][None].masked_fill(~index.members, -torch.inf).argmax(1)
    return [
        Hit(rank + 1, index.study_ids[r], float(scores[rank]), index.sentences[int(best[r])]) for rank, r in enumerate(order[:top].tolist())
    ]
