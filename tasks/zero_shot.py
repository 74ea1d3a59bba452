"""Zero-shot diagnosis: a score per finding from pairs of positive and negative prompts.

Shapes: B images, F findings, P prompts. A score is the softmax of the pair: the sigmoid of (mean similarity with the positive prompts -
mean similarity with the negative prompts), similarities as logits, so the learned temperature is in them. It is not calibrated, so it
is called a score and not a probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from medvl.model import DualEncoder
from medvl.types import ImageFeatures, TextFeatures, UnreadableImageError
from reports.prompts import PromptSet


@dataclass(frozen=True)
class PromptBank:
    """Prompts of F findings, encoded once: P texts and which of them count for and against which finding."""

    findings: tuple[str, ...]
    features: TextFeatures  # P texts
    positive: Tensor  # (F, P), rows that average a finding's positive prompts
    negative: Tensor  # (F, P), the same for its negative prompts


@dataclass(frozen=True)
class Diagnosis:
    """Scores of one image, or why there are none."""

    path: str
    ok: bool
    error: str | None = None
    findings: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def encode_prompts(model: DualEncoder, prompts: PromptSet, findings: Sequence[str] | None = None) -> PromptBank:
    """Encode the prompt pairs of a set.

    Args:
        findings: which of the set, in this order; None takes all.
    Raises:
        KeyError: a finding that the set does not know.
    """
    names = tuple(prompts.findings) if findings is None else tuple(findings)
    unknown = [name for name in names if name not in prompts.findings]
    if unknown:
        raise KeyError(f"no prompts for {', '.join(unknown)}; the set has {', '.join(prompts.findings)}")
    pairs = [prompts.findings[name] for name in names]
    texts = list(dict.fromkeys(text for pair in pairs for text in (*pair.positive, *pair.negative)))
    column = {text: j for j, text in enumerate(texts)}
    positive, negative = torch.zeros(2, len(names), len(texts))
    for i, pair in enumerate(pairs):
        for weights, side in ((positive, pair.positive), (negative, pair.negative)):
            weights[i, [column[text] for text in side]] = 1 / len(side)
    device = model.device
    return PromptBank(names, model.encode_text(texts), positive.to(device), negative.to(device))


@torch.inference_mode()
def score(model: DualEncoder, images: ImageFeatures, bank: PromptBank) -> Tensor:
    """(B, F) scores in (0, 1): the pair softmax of mean similarities (the module's docstring has the formula)."""
    similarity = model.similarity(images, bank.features)  # (B, P)
    return ((bank.positive - bank.negative) @ similarity.T).T.sigmoid()


def diagnose(model: DualEncoder, paths: Sequence[Path], bank: PromptBank, batch_size: int = 16) -> Iterator[Diagnosis]:
    """Score files one batch at a time, in order; a file that cannot be read costs only itself."""
    for start in range(0, len(paths), batch_size):
        results: list[Diagnosis | None] = []
        samples = []
        for path in paths[start : start + batch_size]:
            try:
                samples.append(model.read(path))
                results.append(None)
            except UnreadableImageError as error:  # noqa: PERF203
                results.append(Diagnosis(str(path), ok=False, error=str(error)))
        scores = iter(zip(samples, score(model, model.encode_samples(samples), bank).tolist(), strict=True) if samples else ())
        for path, result in zip(paths[start : start + batch_size], results, strict=True):
            if result is not None:
                yield result
                continue
            sample, row = next(scores)
            yield Diagnosis(str(path), ok=True, findings=dict(zip(bank.findings, row, strict=True)), warnings=sample.warnings)
