"""What a study's scores are made of: the prompts or visual signs of each finding, and each of its images, with what they add.

Shapes: V images of a study, F findings, G groups of prompts.

Contributions add up to ``whole``: the score itself where signs are averaged; its logarithm where they are multiplied (a geometric mean, a
label times its likeliest kind); its logit where it is the sigmoid of a mean of similarities. Where classes are joined by a softmax, where
several similarities are, or where a score depends on the other studies, they do not add up to anything and there are none. What an image
adds is the change of the score when it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medvl.model import DualEncoder
from medvl.types import RESEARCH_USE, ImageSample
from tasks.scoring import Scorer
from tasks.zero_shot import Diagnosis, PromptBank, SliceScores, encode, pair_logits, study_scores

Scale = Literal["score", "log score", "logit", "none"]


@dataclass(frozen=True)
class Sign:
    """A visual sign, a kind, or a single prompt, and what it adds to a finding's score."""

    about: str
    positive: tuple[str, ...]  # prompts for it
    negative: tuple[str, ...]
    score: float  # of the sign by itself; of a single prompt its similarity
    contribution: float | None


@dataclass(frozen=True)
class View:
    """One image of a study."""

    path: str
    alone: float  # score if it were the whole study
    without: float | None  # score of the others without it; None if it is the only one

    def change(self, score: float) -> float | None:
        """What the study's score owes to it."""
        return None if self.without is None else score - self.without


@dataclass(frozen=True)
class FindingExplanation:
    """One finding's score taken apart."""

    finding: str
    score: float
    how: str  # how the signs make the score, for a person
    scale: Scale  # what contributions add up to
    whole: float | None
    signs: tuple[Sign, ...]
    views: tuple[View, ...]


@dataclass(frozen=True)
class Explanation:
    """A study's scores taken apart. Scores are not calibrated."""

    paths: tuple[str, ...]  # of the images that were read
    findings: tuple[FindingExplanation, ...]
    slices: tuple[SliceScores, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        findings = []
        for one in self.findings:
            told = asdict(one)
            told["views"] = [{**asdict(view), "change": view.change(one.score)} for view in one.views]
            findings.append(told)
        return {
            "notice": RESEARCH_USE,
            "paths": list(self.paths),
            "calibrated": False,
            "findings": findings,
            "slices": [asdict(one) for one in self.slices],
        }


def explain(model: DualEncoder, diagnosis: Diagnosis, scoring: PromptBank | Scorer, decided: Sequence[float] | None = None) -> Explanation:
    """Take the scores of a diagnosed study apart; its images are read again.

    Args:
        scoring: what scored it.
        decided: (F,) scores, where they depend on the other studies of the run.
    Raises:
        UnreadableImageError: an image that could be read before cannot be read now.
        ValueError: nothing of the study could be read.
    """
    paths = [path for path in diagnosis.paths if path not in diagnosis.unreadable]
    if not paths:
        raise ValueError(f"{diagnosis.path}: no image of the study can be read, so there is nothing to explain")
    samples = [model.read(Path(path)) for path in paths]
    images = _images(model, samples, scoring)
    scores = study_scores(images, scoring).tolist() if decided is None else list(decided)

    def scores_of(kept: Sequence[int]) -> list[float]:
        by_itself = len(images) == len(samples)
        parts = [images[i] for i in kept] if by_itself else _images(model, [samples[i] for i in kept], scoring)
        found: list[float] = study_scores(parts, scoring).tolist()
        return found

    every = range(len(samples))
    alone = [scores_of([i]) for i in every]
    without = [scores_of([j for j in every if j != i]) for i in every] if len(samples) > 1 else None
    found = []
    for f, name in enumerate(scoring.findings):
        views = tuple(View(path, alone[v][f], None if without is None else without[v][f]) for v, path in enumerate(paths))
        how, scale, whole, signs = _signs(model, samples, images, scoring, f, scores)
        found.append(FindingExplanation(name, scores[f], how, scale, whole, signs, () if _of_run(scoring) else views))
    return Explanation(tuple(paths), tuple(found), diagnosis.slices)


def _of_run(scoring: PromptBank | Scorer) -> bool:
    return isinstance(scoring, Scorer) and scoring.rule.depends_on_run


@torch.inference_mode()
def _images(model: DualEncoder, samples: Sequence[ImageSample], scoring: PromptBank | Scorer) -> list[Tensor]:
    """What each image has, or all of them together where the tower pools: (F,) logits or (parts, G)."""
    return [_scored(model, group, scoring) for group in _groups(model, samples)]


def _groups(model: DualEncoder, samples: Sequence[ImageSample]) -> list[list[ImageSample]]:
    modality = "xray" if samples[0].affine is None else "ct"
    return [list(samples)] if model.image.pools(modality) else [[one] for one in samples]


def _scored(model: DualEncoder, group: list[ImageSample], scoring: PromptBank | Scorer) -> Tensor:
    features = encode(model, [group])
    if isinstance(scoring, PromptBank):
        return pair_logits(model, features, scoring)[0].double().cpu()
    return scoring.group_scores(model, features)[0].cpu()


def _signs(
    model: DualEncoder, samples: Sequence[ImageSample], images: Sequence[Tensor], scoring: PromptBank | Scorer, f: int, scores: list[float]
) -> tuple[str, Scale, float | None, tuple[Sign, ...]]:
    if isinstance(scoring, PromptBank):
        return _prompts(model, samples, scoring, f)
    rule = scoring.rule
    if scoring.normal[f] and rule.no_finding == "one_minus_max":
        others = [i for i in range(len(scores)) if not scoring.normal[i]]
        if others:
            highest = max(others, key=lambda i: scores[i])
            return (
                f"1 less the highest of the others, {scoring.findings[highest].replace('_', ' ')} {scores[highest]:.3f}",
                "none",
                None,
                (),
            )
    own = [(group, value) for group, value in scoring.signs(torch.stack(list(images))) if group.finding == f]
    values = [value for _, value in own]
    how, scale, whole, parts = _contributions(values, rule.combine)
    if rule.classes != "none" or len(rule.similarity) > 1:
        joined = {"softmax": "softmax over all findings", "zscore": "z-score over the studies of the run"}.get(rule.classes)
        how, scale, whole, parts = f"{how}, then {joined or 'a mean of several similarities'}", "none", None, [None] * len(values)
    signs = tuple(
        Sign(
            group.about,
            tuple(scoring.texts[i] for i in group.positive),
            tuple(scoring.texts[i] for i in group.negative),
            value,
            part,
        )
        for (group, value), part in zip(own, parts, strict=True)
    )
    return how, scale, whole, signs


def _contributions(values: Sequence[float], combine: str) -> tuple[str, Scale, float | None, list[float | None]]:
    """How groups make a score, what contributions add up to, and these; see the module."""
    if not values:
        return "no prompts", "none", None, []
    if len(values) == 1 and combine != "roll_up":
        return "its prompts alone", "score", values[0], [values[0]]
    if combine == "geometric":
        logs = [math.log(max(value, 5e-324)) / len(values) for value in values]
        return "geometric mean of its signs", "log score", sum(logs), list(logs)
    if combine == "mean":
        return "mean of its signs", "score", sum(values) / len(values), [value / len(values) for value in values]
    best = max(range(len(values)), key=lambda i: values[i])
    if combine == "max":
        return "the highest of its signs", "score", values[best], [value if i == best else 0.0 for i, value in enumerate(values)]
    shares = [0.0] * len(values)  # roll-up: the label itself is the first
    for i in (0, best):
        shares[i] += math.log(max(values[i], 5e-324))
    return "its own score times the highest of itself and its kinds", "log score", sum(shares), list(shares)


@torch.inference_mode()
def _prompts(
    model: DualEncoder, samples: Sequence[ImageSample], bank: PromptBank, f: int
) -> tuple[str, Scale, float | None, tuple[Sign, ...]]:
    """Our rule: the logit is the mean similarity with the prompts for less that with those against, over the images of the study."""
    features = [encode(model, [group]) for group in _groups(model, samples)]
    similarity = torch.stack([model.similarity(one, bank.features)[0].double().cpu() for one in features]).mean(0)  # (P,)
    signs = []
    for side, weights in ((1.0, bank.positive[f].cpu().double()), (-1.0, bank.negative[f].cpu().double())):
        for p in weights.nonzero().flatten().tolist():
            text = bank.texts[p]
            signs.append(
                Sign(
                    text,
                    (text,) if side > 0 else (),
                    (text,) if side < 0 else (),
                    float(similarity[p]),
                    float(side * weights[p] * similarity[p]),
                )
            )
    whole = sum(one.contribution or 0.0 for one in signs)
    return "sigmoid of the mean similarity with prompts for it less that with prompts against it", "logit", whole, tuple(signs)
