"""Zero-shot diagnosis: a score per finding from pairs of positive and negative prompts.

Shapes: B images, F findings, P prompts. A score is the softmax of the pair: the sigmoid of (mean similarity with the positive prompts -
mean similarity with the negative prompts), similarities as logits, so the learned temperature is in them. It is not calibrated, so it
is called a score and not a probability. A study of several images has the sigmoid of the mean over its images of that difference; with a
tower that pools views, that of the study's own features, made of all its images together. Other rules, published ones among them, are a
:class:`tasks.scoring.Scorer`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medvl.model import DualEncoder, packed
from medvl.nn.similarity import slice_logits
from medvl.types import ImageFeatures, ImageReader, ImageSample, TextFeatures, UnreadableImageError
from reports.prompts import PromptSet
from tasks.scoring import Scorer


@dataclass(frozen=True)
class PromptBank:
    """Prompts of F findings, encoded once: P texts and which of them count for and against which finding."""

    findings: tuple[str, ...]
    features: TextFeatures  # P texts
    positive: Tensor  # (F, P), rows that average a finding's positive prompts
    negative: Tensor  # (F, P), the same for its negative prompts
    texts: tuple[str, ...] = ()  # P


@dataclass(frozen=True)
class SliceScores:
    """Which slices of a volume speak for a finding: S slices of the tower's grid, from the feet to the head."""

    path: str
    index: tuple[float, ...]  # of a slice's middle along the file's own axis that the slices are stacked in, from 0
    z_mm: tuple[float, ...]  # its height in the patient, towards superior (RAS), in the middle of the slice
    findings: dict[str, tuple[float, ...]]  # score of each slice as if it were the whole study, in (0, 1)


@dataclass(frozen=True)
class Encoded:
    """What the tower made of one image, or of the images of a study that it pools."""

    paths: tuple[str, ...]
    modality: str  # xray or ct
    appearance: Tensor = field(repr=False)  # (D,) or (2 D,) float64, on the CPU; see :func:`appearance`


@dataclass(frozen=True)
class Diagnosis:
    """Scores of one study, or why there are none."""

    paths: tuple[str, ...]
    ok: bool  # at least one image was read
    error: str | None = None  # also where ok, if some of the images could not be read
    findings: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason
    slices: tuple[SliceScores, ...] = ()  # of the study's volumes
    signs: dict[str, dict[str, float]] = field(default_factory=dict)  # finding -> visual sign (or kind) -> its score, where a rule has them
    encoded: tuple[Encoded, ...] = field(default=(), repr=False, compare=False)  # of the images that were read
    unfamiliar: tuple[tuple[str, str], ...] = ()  # (path, reason) of what the model was not made for; no path: of the whole study

    @property
    def path(self) -> str:
        """The first of the study's files."""
        return self.paths[0]

    @property
    def unfamiliar_text(self) -> str | None:
        """``unfamiliar`` as one text, with the file of each reason where the study has several; None where there is no reason."""
        named = len(self.paths) > 1
        return "; ".join(f"{path}: {reason}" if named and path else reason for path, reason in self.unfamiliar) or None


def encode_prompts(model: DualEncoder, prompts: PromptSet, findings: Sequence[str] | None = None) -> PromptBank:
    """Encode the prompt pairs of a set.

    Args:
        findings: which of the set, in this order; None takes those that its label sets name, or all.
    Raises:
        KeyError: a finding that the set does not know.
    """
    names = prompts.labels if findings is None else tuple(findings)
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
    return PromptBank(names, model.encode_text(texts), positive.to(device), negative.to(device), tuple(texts))


@torch.inference_mode()
def pair_logits(model: DualEncoder, images: ImageFeatures, bank: PromptBank) -> Tensor:
    """(B, F) mean similarity with the positive prompts less that with the negative ones."""
    similarity = model.similarity(images, bank.features)  # (B, P)
    return ((bank.positive - bank.negative) @ similarity.T).T


def score(model: DualEncoder, images: ImageFeatures, bank: PromptBank) -> Tensor:
    """(B, F) scores in (0, 1) of single images or of pooled studies: the pair softmax of the module's docstring."""
    return pair_logits(model, images, bank).sigmoid()


@torch.inference_mode()
def slice_scores(model: DualEncoder, images: ImageFeatures, bank: PromptBank) -> Tensor:
    """(B, F, S) scores in (0, 1) of every slice of volumes, each as if it were the whole study; NaN on padding.

    Raises:
        ValueError: the image tower keeps no slices.
    """
    logits = slice_logits(model.similarity, images, bank.features)  # (B, P, S)
    return ((bank.positive - bank.negative) @ logits).sigmoid()


def diagnose(
    model: DualEncoder,
    paths: Sequence[Path],
    scoring: PromptBank | Scorer,
    batch_size: int = 16,
    studies: Sequence[Sequence[Path]] | None = None,
) -> Iterator[Diagnosis]:
    """Score the studies that the files make up, in the order of their first files; a file that cannot be read costs only itself.

    Headers are read first, to know the studies; images then a batch at a time, and each study is yielded once its last image is scored.
    By a rule that depends on the run, all are yielded once the last is.

    Args:
        studies: the files of each, where that is known; then ``paths`` does not count.
    """
    studies = group_by_study(model.reader, paths) if studies is None else studies
    outcomes = _outcomes(model, studies, scoring, batch_size)
    together = (list(islice(outcomes, len(study))) for study in studies)
    if isinstance(scoring, PromptBank) or not scoring.rule.depends_on_run:
        for found in together:
            yield _diagnosis(found, scoring)
        return
    kept = list(together)
    matrices = [_of_study(found, scoring) for found in kept]
    good = [i for i, one in enumerate(matrices) if one is not None]
    scores = scoring.scores(torch.stack([one for one in matrices if one is not None])) if good else torch.empty(0)
    of = dict(zip(good, scores, strict=True))
    for i, found in enumerate(kept):
        yield _diagnosis(found, scoring, of.get(i))


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
    logits: Tensor | None = None  # (F,), or (parts, G) of a rule, float64, on the CPU; where the tower pools views, those of the study
    error: str = ""
    warnings: tuple[str, ...] = ()
    slices: SliceScores | None = None
    modality: str = ""
    appearance: Tensor | None = None  # as of :class:`Encoded`; where the tower pools views, that of the study


def _outcomes(model: DualEncoder, together: Sequence[Sequence[Path]], scoring: PromptBank | Scorer, batch_size: int) -> Iterator[_Outcome]:
    """One outcome per file, in order, a batch at a time; files that stand together are encoded together."""
    for part in packed(together, batch_size):
        read = [[(path, _read(model, path)) for path in paths] for paths in part]
        good = [[(path, one) for path, one in group if not isinstance(one, UnreadableImageError)] for group in read]
        scored = _scored(model, good, scoring)
        for path, one in (pair for group in read for pair in group):
            yield _Outcome(str(path), error=str(one)) if isinstance(one, UnreadableImageError) else scored[path]


def _scored(model: DualEncoder, groups: Sequence[Sequence[tuple[Path, ImageSample]]], scoring: PromptBank | Scorer) -> dict[Path, _Outcome]:
    """Path -> outcome of the images that were read; films and volumes each in a batch of their own."""
    found: dict[Path, _Outcome] = {}
    for modality in ("xray", "ct"):
        of_kind = [[pair for pair in group if modality_of_sample(pair[1]) == modality] for group in groups]
        units = of_kind if model.image.pools(modality) else [[pair] for group in of_kind for pair in group]
        if not (units := [unit for unit in units if unit]):
            continue
        features = encode(model, [[sample for _, sample in unit] for unit in units])
        slices = None
        if isinstance(scoring, PromptBank):
            logits = pair_logits(model, features, scoring).cpu().double()
            if features.slices is not None:
                slices = slices_of_images(slice_scores(model, features, scoring), features).cpu()
        else:
            logits = scoring.group_scores(model, features).cpu()
            if features.slices is not None and not scoring.rule.depends_on_run:
                slices = slices_of_images(scoring.slice_scores(model, features), features).cpu()
        seen = appearance(features).cpu()
        for i, (unit, own, vector) in enumerate(zip(units, logits, seen, strict=True)):
            for k, (path, sample) in enumerate(unit):
                by_slice = None if slices is None else _by_slice(path, sample, slices[i, k], scoring.findings)
                found[path] = _Outcome(str(path), own, "", sample.warnings, by_slice, modality, vector)
    return found


def appearance(features: ImageFeatures) -> Tensor:
    """(B, D) or (B, 2 D) float64: the direction of the pooled vector and, of a tower with tokens, that of the mean of the valid tokens.

    The pooled vector alone says less of what is not in the reports: a view, for one.
    """
    parts = [features.pooled.double()]
    if features.tokens is not None:
        tokens = features.tokens.double()
        valid = tokens.new_ones(tokens.shape[:2]) if features.token_valid is None else features.token_valid.double()
        kept = tokens.masked_fill(valid[..., None] == 0, 0.0)  # an invalid one may hold anything
        parts.append(kept.sum(1) / valid.sum(1, keepdim=True).clamp_min(1))
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


def modality_of_sample(sample: ImageSample) -> str:
    """``ct`` of a volume, else ``xray``."""
    return "xray" if sample.affine is None else "ct"


def slices_of_images(scores: Tensor, features: ImageFeatures) -> Tensor:
    """(B, V, F, S) scores of the slices of each series, from the (B, F, V * S) of all; V is 1 where series are not pooled."""
    return scores.unflatten(-1, (1 if features.views is None else features.views.shape[1], -1)).transpose(1, 2)


def _by_slice(path: Path, sample: ImageSample, scores: Tensor, findings: Sequence[str]) -> SliceScores:
    """The (F, S) scores of a volume's slices, with where each slice lies in its file."""
    rows, columns = sample.pixels.shape[2:]
    kept = sample.valid.nonzero().flatten().tolist()
    middle = np.array([[s, (rows - 1) / 2, (columns - 1) / 2] for s in kept])
    native = sample.transform.to_native(middle)
    assert sample.affine is not None
    world = native @ sample.affine[:3, :3].T + sample.affine[:3, 3]
    by_finding = {name: tuple(scores[f, kept].tolist()) for f, name in enumerate(findings)}
    return SliceScores(str(path), tuple(native[:, sample.transform.axes[0]].tolist()), tuple(world[:, 2].tolist()), by_finding)


def encode(model: DualEncoder, together: Sequence[Sequence[ImageSample]]) -> ImageFeatures:
    """Features in one batch, a row for each group: of studies where the tower pools their images, else each group is a single image."""
    if model.image.pools(modality_of_sample(together[0][0])):
        return model.encode_studies(together, batch_size=sum(map(len, together)))
    return model.encode_samples([sample for (sample,) in together])


def _read(model: DualEncoder, path: Path) -> ImageSample | UnreadableImageError:
    try:
        return model.read(path)
    except UnreadableImageError as error:
        return error


def _images(outcomes: Sequence[_Outcome]) -> list[Tensor]:
    """What each image of a study has; films that were encoded together have one result between them."""
    return list({id(one.logits): one.logits for one in outcomes if one.logits is not None}.values())


def _encoded(outcomes: Sequence[_Outcome]) -> tuple[Encoded, ...]:
    """What each image of a study has, or those together that were encoded together."""
    of: dict[int, list[_Outcome]] = {}
    for one in outcomes:
        if one.appearance is not None:
            of.setdefault(id(one.appearance), []).append(one)
    return tuple(
        Encoded(tuple(one.path for one in unit), unit[0].modality, unit[0].appearance)
        for unit in of.values()
        if unit[0].appearance is not None
    )


def _of_study(outcomes: Sequence[_Outcome], scorer: Scorer) -> Tensor | None:
    """(parts, F) of a study before what all studies of a run decide; None where no image was read."""
    images = _images(outcomes)
    return scorer.study_scores(torch.stack(images)) if images else None


def study_scores(images: Sequence[Tensor], scoring: PromptBank | Scorer) -> Tensor:
    """(F,) of a study from what each of its images has, or all of them together: logits (F,), or (parts, G) of a rule."""
    if isinstance(scoring, PromptBank):
        return torch.stack(list(images)).mean(0).sigmoid()
    return scoring.scores(scoring.study_scores(torch.stack(list(images)))[None])[0]


def _diagnosis(outcomes: Sequence[_Outcome], scoring: PromptBank | Scorer, decided: Tensor | None = None) -> Diagnosis:
    """The images of one study as one result; where there are several, a warning says which file it is of.

    Args:
        decided: (F,) scores, where they depend on other studies.
    """
    paths = tuple(one.path for one in outcomes)
    unreadable = {one.path: one.error for one in outcomes if one.logits is None}
    error = "; ".join(unreadable.values()) or None
    if error is not None and len(paths) > 1:
        error = f"{len(unreadable)} of the study's {len(paths)} files could not be read: {error}"
    if not (images := _images(outcomes)):
        return Diagnosis(paths, ok=False, error=error, unreadable=unreadable)
    signs: dict[str, dict[str, float]] = {}
    scores = study_scores(images, scoring) if decided is None else decided
    if not isinstance(scoring, PromptBank):
        for group, value in scoring.signs(torch.stack(images)):
            signs.setdefault(scoring.findings[group.finding], {})[group.about] = value
    return Diagnosis(
        paths,
        ok=True,
        error=error,
        findings=dict(zip(scoring.findings, scores.tolist(), strict=True)),
        warnings=tuple(note if len(paths) == 1 else f"{one.path}: {note}" for one in outcomes for note in one.warnings),
        unreadable=unreadable,
        slices=tuple(one.slices for one in outcomes if one.slices is not None),
        signs={name: of for name, of in signs.items() if len(of) > 1},
        encoded=_encoded(outcomes),
    )
