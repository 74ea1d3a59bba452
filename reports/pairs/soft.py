"""Soft targets: how much a text is true of a study, from the likeness of texts or from the overlap of findings.

Shapes: B studies, M texts, W width of text embeddings, F findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from medvl.types import Configurable, ReportEncoder
from reports.pairs.truth import Claim

Kernel = Literal["cwcl", "softmax"]
Likeness = Literal["text", "labels"]


def cwcl_weights(similarity: Tensor) -> Tensor:
    """Cosines in [-1, 1] as weights in [0, 1]: (1 + s) / 2.

    Source: "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss", arXiv:2309.14580; there of one frozen tower with
    itself, and in the loss of one direction.
    """
    return (1 + similarity.clamp(-1, 1)) / 2


def softmax_weights(similarity: Tensor, temperature: float) -> Tensor:
    """Weights exp((s - 1) / temperature) in (0, 1], whose shares over a row or a column are the softmax of s / temperature.

    Source: the targets of "MedCLIP", arXiv:2210.10163, there with temperature 1 over cosines of labels.
    """
    return ((similarity.clamp(-1, 1) - 1) / temperature).exp()


def text_similarity(embeddings: Tensor, own: Tensor) -> Tensor:
    """(B, M): the cosine of text j with the likest text of study i.

    Args:
        embeddings: (M, W), L2-normalised.
        own: (B, M) bool, the texts of each study, one or more; the similarity with those is 1.
    """
    cosines = embeddings @ embeddings.T
    return torch.stack([cosines[row].amax(0) for row in own]).clamp(-1, 1)


def label_similarity(studies: Sequence[Sequence[Claim]], texts: Sequence[Sequence[Claim]], findings: Sequence[str]) -> Tensor:
    """(B, M) cosine of finding vectors: 1 present, 1/2 uncertain, -1 absent, 0 not stated; 0 where either states nothing.

    Source: MedCLIP, arXiv:2210.10163, whose vectors have no -1: there no denial is like another.
    """
    return F.normalize(_vectors(studies, findings), dim=1) @ F.normalize(_vectors(texts, findings), dim=1).T


def soften(positives: Tensor, weights: Tensor, share: float, floor: float, vetoed: Tensor) -> Tensor:
    """(B, M) float weights: 1 for positives, ``share`` of ``weights`` for other pairs, 0 for those below ``floor`` or ``vetoed``.

    CWCL and MedCLIP weigh the positives by the likeness too, so that a study's own text gets no more than a text like it; SCOLD
    (arXiv:2505.07019) smooths the labels of the batch by context, keeping the own text first, as is done here.
    """
    soft = torch.where(vetoed | (weights < floor), 0.0, share * weights)
    return torch.maximum(positives.float(), soft)


class SoftTargets(Configurable):
    """Weights of pairs that are no positives, by likeness.

    Args:
        likeness: ``text``: cosine of text embeddings with the study's likest own text, which knows little of negation; ``labels``: cosine
            of finding vectors of the text and of the whole study.
        kernel: cosine to weight, ``cwcl`` or ``softmax``.
        temperature: of ``softmax``. Texts of one subject have cosines of 0.6 and more; a sentence and a whole study share a few of many
            findings, for which 0.5 is a measure (with a ``floor`` of 0.1).
        share: what a pair that is as like as can be weighs beside a positive.
        floor: weights below it are 0; CWCL's kernel gives 1/2 to what has nothing in common.
        veto: no weight where the facts of the study say that the text is false.
        encoder: report tower with a frozen trunk whose embeddings are compared, for ``text``.
    Raises:
        ValueError: a word or number outside what is said above, or ``text`` without an encoder that has ``trunk_embeddings``.
    """

    def __init__(
        self,
        likeness: Likeness = "text",
        kernel: Kernel = "softmax",
        temperature: float = 0.1,
        share: float = 0.5,
        floor: float = 0.05,
        veto: bool = True,
        encoder: ReportEncoder | None = None,
    ) -> None:
        if likeness not in get_args(Likeness) or kernel not in get_args(Kernel):
            raise ValueError(
                f"likeness is {likeness!r} and kernel {kernel!r}, expected one of {get_args(Likeness)} and one of {get_args(Kernel)}"
            )
        if temperature <= 0 or not 0 < share <= 1 or not 0 <= floor < 1:
            raise ValueError(f"temperature {temperature}, share {share} and floor {floor}: expected above 0, in (0, 1] and in [0, 1)")
        if likeness == "text" and not hasattr(encoder, "trunk_embeddings"):
            raise ValueError("soft targets by likeness of texts need an encoder with a frozen trunk, such as reports.MiniLmReportEncoder")
        self.likeness, self.kernel, self.temperature = likeness, kernel, temperature
        self.share, self.floor, self.veto, self.encoder = share, floor, veto, encoder

    def prepare(self, texts: Sequence[str]) -> None:
        """Embed the texts once, before training."""
        if self.likeness == "text" and self.encoder is not None:
            self.encoder.precompute(texts)

    def weights(self, positives: Tensor, similarity: Tensor, false: Tensor, barred: Tensor) -> Tensor:
        """(B, M) weights for the loss, of bool positives, cosines, what is known to be false, and what may have no weight in any case."""
        kernel = cwcl_weights(similarity) if self.kernel == "cwcl" else softmax_weights(similarity, self.temperature)
        return soften(positives, kernel, self.share, self.floor, barred | false if self.veto else barred)

    @torch.no_grad()
    def embeddings(self, texts: Sequence[str]) -> Tensor:
        """(M, W), L2-normalised, on the CPU."""
        assert self.encoder is not None
        found: Tensor = self.encoder.trunk_embeddings(texts)  # type: ignore[operator]
        return F.normalize(found.float().cpu(), dim=-1)


def _vectors(stated: Sequence[Sequence[Claim]], findings: Sequence[str]) -> Tensor:
    index = {finding: i for i, finding in enumerate(findings)}
    value = {"present": 1.0, "uncertain": 0.5, "absent": -1.0}
    vectors = torch.zeros(len(stated), len(findings))
    for row, claims in enumerate(stated):
        for claim in claims:
            if claim.finding in index:
                at = index[claim.finding]
                vectors[row, at] = max(float(vectors[row, at]), value[claim.state], key=abs)
    return vectors
