"""One model of a radiograph model and a CT model that share their report tower."""

from __future__ import annotations

import torch

from medvl.model import DualEncoder
from medvl.types import ReportEncoder, Similarity
from modalities.joint import JointEncoder, JointReader


def join_models(xray: DualEncoder, ct: DualEncoder) -> DualEncoder:
    """The two image towers and readers beside each other, with the report tower and similarity that both were trained with.

    Args:
        xray: trained first.
        ct: trained with the report tower and similarity of ``xray``, locked.
    Raises:
        ValueError: report towers or similarities that differ; such towers lie in two spaces.
    """
    for name in ("report", "similarity"):
        if not _equal(getattr(xray, name), getattr(ct, name)):
            raise ValueError(
                f"the two models differ in their {name}, so their images lie in two spaces; train the second with start and locked set to"
                " the report and similarity of the first"
            )
    joined = DualEncoder(JointEncoder(xray.image, ct.image), xray.report, xray.similarity, JointReader(xray.reader, ct.reader))
    joined.token_offset = {**xray.token_offset, **ct.token_offset}
    return joined


def _equal(one: ReportEncoder | Similarity, other: ReportEncoder | Similarity) -> bool:
    """By arguments, for a frozen trunk is not among the weights, and by weights."""
    mine, theirs = one.state_dict(), other.state_dict()
    same = one.spec() == other.spec() and one.files() == other.files() and mine.keys() == theirs.keys()
    return same and all(torch.equal(value.cpu(), theirs[key].cpu()) for key, value in mine.items())
