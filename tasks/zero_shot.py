"""Zero-shot diagnosis: a score per finding from pairs of positive and negative prompts.

Shapes: B images, F findings, P prompts. A score is the softmax of the pair: the sigmoid of (mean similarity with the positive prompts -
mean similarity with the negative prompts), similarities as logits, so the learned temperature is in them. It is not calibrated, so it
is called a score and not a probability. A study of several images has the sigmoid of the mean over its images of that difference; with a
tower that pools views, that of the study's own features, made of all its images together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from medvl.model import DualEncoder, packed
from medvl.types import ImageFeatures, ImageReader, ImageSample, TextFeatures, UnreadableImageError
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
    """Scores of one study, or why there are none."""

    paths: tuple[str, ...]
    ok: bool  # at least one image was read
    error: str | None = None  # also where ok, if some of the images could not be read
    findings: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason

    @property
    def path(self) -> str:
        """The first of the study's files."""
        return self.paths[0]


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
def pair_logits(model: DualEncoder, images: ImageFeatures, bank: PromptBank) -> Tensor:
    """(B, F) mean similarity with the positive prompts less that with the negative ones."""
    similarity = model.similarity(images, bank.features)  # (B, P)
    return ((bank.positive - bank.negative) @ similarity.T).T


def score(model: DualEncoder, images: ImageFeatures, bank: PromptBank) -> Tensor:
    """(B, F) scores in (0, 1) of single images or of pooled studies: the pair softmax of the module's docstring."""
    return pair_logits(model, images, bank).sigmoid()


def diagnose(model: DualEncoder, paths: Sequence[Path], bank: PromptBank, batch_size: int = 16) -> Iterator[Diagnosis]:
    """Score the studies that the files make up, in the order of their first files; a file that cannot be read costs only itself.

    Headers are read first, to know the studies; images then a batch at a time, and each study is yielded once its last image is scored.
    """
    studies = group_by_study(model.reader, paths)
    together = studies if model.image.pools_views else [[path] for study in studies for path in study]
    outcomes = _outcomes(model, together, bank, batch_size)
    for study in studies:
        yield _diagnosis(list(islice(outcomes, len(study))), bank.findings)


def group_by_study(reader: ImageReader, paths: Sequence[Path]) -> list[list[Path]]:
    """Files by the reader's study key, in the order given; a file without a key is a study of its own, one given twice counts once."""
    studies: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for path in paths:
        place = os.path.abspath(path)  # noqa: PTH100 (a link counts as a file of its own)
        if place in seen:
            continue
        seen.add(place)
        key = reader.study_key(path)
        studies.setdefault(f"file {place}" if key is None else f"study {key}", []).append(path)
    return list(studies.values())


@dataclass(frozen=True)
class _Outcome:
    """One image of a study: its logits, or why there are none."""

    path: str
    logits: Tensor | None = None  # (F,), float64, on the CPU; where the tower pools views, those of the study
    error: str = ""
    warnings: tuple[str, ...] = ()


def _outcomes(model: DualEncoder, together: Sequence[Sequence[Path]], bank: PromptBank, batch_size: int) -> Iterator[_Outcome]:
    """One outcome per file, in order, a batch at a time; files that stand together are encoded together."""
    for part in packed(together, batch_size):
        read = [[_read(model, path) for path in paths] for paths in part]
        samples = [[one for one in group if not isinstance(one, UnreadableImageError)] for group in read]
        rows = iter(pair_logits(model, encode(model, [group for group in samples if group]), bank).cpu().double() if any(samples) else ())
        for paths, group, good in zip(part, read, samples, strict=True):
            logits = next(rows) if good else None
            for path, one in zip(paths, group, strict=True):
                if isinstance(one, UnreadableImageError):
                    yield _Outcome(str(path), error=str(one))
                else:
                    yield _Outcome(str(path), logits=logits, warnings=one.warnings)


def encode(model: DualEncoder, together: Sequence[Sequence[ImageSample]]) -> ImageFeatures:
    """Features in one batch, a row for each group: of studies where the tower pools views, else each group is a single image."""
    if model.image.pools_views:
        return model.encode_studies(together, batch_size=sum(map(len, together)))
    return model.encode_samples([sample for (sample,) in together])


def _read(model: DualEncoder, path: Path) -> ImageSample | UnreadableImageError:
    try:
        return model.read(path)
    except UnreadableImageError as error:
        return error


def _diagnosis(outcomes: Sequence[_Outcome], findings: Sequence[str]) -> Diagnosis:
    """The images of one study as one result; where there are several, a warning says which file it is of."""
    paths = tuple(one.path for one in outcomes)
    logits = [one.logits for one in outcomes if one.logits is not None]
    unreadable = {one.path: one.error for one in outcomes if one.logits is None}
    error = "; ".join(unreadable.values()) or None
    if error is not None and len(paths) > 1:
        error = f"{len(unreadable)} of the study's {len(paths)} files could not be read: {error}"
    if not logits:
        return Diagnosis(paths, ok=False, error=error, unreadable=unreadable)
    scores = torch.stack(logits).mean(0).sigmoid().tolist()
    return Diagnosis(
        paths,
        ok=True,
        error=error,
        findings=dict(zip(findings, scores, strict=True)),
        warnings=tuple(note if len(paths) == 1 else f"{one.path}: {note}" for one in outcomes for note in one.warnings),
        unreadable=unreadable,
    )
