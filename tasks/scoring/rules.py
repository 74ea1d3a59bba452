"""The arithmetic of zero-shot scores, each step by itself.

Shapes: B images, P prompts, G groups of prompts (a class by its name has one, a class by its visual signs one for each), F classes. In the
order in which a rule takes them:

    similarity   s (B, P) of image and prompt, or with pooled embeddings s+ and s- (B, G) of image and the pooled prompts of each side
    pool         s+ and s- (B, G) of the prompts for and against
    contrast     g (B, G)
    views        (G,) of a study from the (V, G) of its images
    combine      (F,) from the groups of each class
    classes      (F,) from all classes of the study, or from all studies of the run
    no finding   the class that says that nothing is wrong, from the others
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Source = Literal["model", "pooled", "top_tokens"]
Pool = Literal["embedding_norm", "embedding_raw", "mean", "max", "top_k"]
Contrast = Literal["none", "softmax", "difference", "sigmoid"]
Combine = Literal["mean", "geometric", "max", "roll_up"]
Views = Literal["mean", "max"]
Classes = Literal["none", "softmax", "zscore"]
NoFinding = Literal["as_label", "one_minus_max"]
WORDS: Mapping[str, Any] = {
    "pool": Pool,
    "contrast": Contrast,
    "combine": Combine,
    "views": Views,
    "classes": Classes,
    "no_finding": NoFinding,
}


@dataclass(frozen=True)
class Rule:
    """A published way to score, as data.

    Args:
        name: of the preset.
        prompts: the scheme of the prompts' wording (:func:`reports.prompts.scheme`).
        similarity: what image and prompt are compared by, and the weight of each where there are several: ``model``, what the model was
            trained by, with its learned temperature; ``pooled``, the cosine of the pooled vectors times ``scale``; ``top_tokens``, the mean
            of the ``top`` highest cosines of a token of the image with one of the prompt, times ``scale``.
        scale: of ``pooled`` and ``top_tokens``; None: the inverse of the model's temperature.
        pool: of the prompts of a side: ``embedding_norm``, the cosine with norm(mean_k norm(e_k)); ``embedding_raw``, with
            norm(mean_k e_k); ``mean``, ``max`` or ``top_k`` of their similarities.
        k: of ``top_k``.
        contrast: ``softmax`` of the pair (s+, s-) / temperature; ``difference`` s+ - s-; ``sigmoid`` of s+ / temperature; ``none``, s+.
        temperature: of the contrast.
        combine: of the groups of a class; ``geometric`` is exp mean log; ``roll_up``, of a class and its kinds in 0 to 1, is the score of
            the class times the highest of all (:func:`reports.prompts.roll_up`).
        views: of the images of a study, in each group.
        classes: ``softmax`` over the classes of a study; ``zscore`` of each class over the studies of the run.
        no_finding: scored by its own prompts, or as 1 - max of the others.
        top: of ``top_tokens``.
        differs: what cannot be as published with any model, for a person.
        source: where the rule is from.
    Raises:
        ValueError: an unknown word, or a pooling of embeddings with a similarity that has none.
    """

    name: str
    prompts: str
    similarity: Mapping[str, float] = field(default_factory=lambda: {"model": 1.0}, hash=False)
    scale: float | None = 1.0
    pool: Pool = "mean"
    k: int = 1
    contrast: Contrast = "softmax"
    temperature: float = 1.0
    combine: Combine = "mean"
    views: Views = "mean"
    classes: Classes = "none"
    no_finding: NoFinding = "as_label"
    top: int = 128
    differs: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name, known in WORDS.items():
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"rule {self.name}: {name} is {value!r}, expected one of {', '.join(get_args(known))}")
        if not self.similarity or set(self.similarity) - set(get_args(Source)):
            raise ValueError(f"rule {self.name}: similarity {dict(self.similarity)}, expected weights of {', '.join(get_args(Source))}")
        if self.pool.startswith("embedding") and set(self.similarity) != {"pooled"}:
            raise ValueError(f"rule {self.name}: pool {self.pool} is of pooled vectors, with similarity pooled alone")
        if self.no_finding == "one_minus_max" and not self.in_unit_interval:
            raise ValueError(
                f"rule {self.name}: one_minus_max needs scores in 0 to 1, with contrast softmax or sigmoid, or classes softmax"
            )
        if self.combine in ("geometric", "roll_up") and self.contrast not in ("softmax", "sigmoid"):
            raise ValueError(f"rule {self.name}: combine {self.combine} needs groups in 0 to 1, with contrast softmax or sigmoid")
        if self.temperature <= 0 or self.k < 1 or self.top < 1:
            raise ValueError(f"rule {self.name}: temperature {self.temperature}, k {self.k}, top {self.top}: expected above 0")

    @property
    def in_unit_interval(self) -> bool:
        """Whether scores lie in 0 to 1."""
        return self.classes == "softmax" or (self.classes == "none" and self.contrast in ("softmax", "sigmoid"))

    @property
    def needs_negative(self) -> bool:
        """Whether there must be prompts against a class."""
        return self.contrast in ("softmax", "difference")

    @property
    def depends_on_run(self) -> bool:
        """Whether a study's score depends on the other studies of the run, so that no score is to be compared with that of another."""
        return self.classes == "zscore"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, and for hashes of it."""
        return {**asdict(self), "similarity": dict(self.similarity)}


def pooled_prompts(embeddings: Tensor, sides: Sequence[Sequence[int]], pool: Pool) -> Tensor:
    """(G, D) unit vectors of the pooled prompts of each side; the embeddings (P, D) are not normalised."""
    if pool == "embedding_norm":
        embeddings = F.normalize(embeddings, dim=-1)
    return F.normalize(torch.stack([embeddings[list(side)].mean(0) for side in sides]), dim=-1)


def pooled_similarities(similarity: Tensor, sides: Sequence[Sequence[int]], pool: Pool, k: int = 1) -> Tensor:
    """(B, G) from (B, P)."""
    columns = [similarity[:, list(side)] for side in sides]
    if pool == "mean":
        return torch.stack([one.mean(1) for one in columns], 1)
    if pool == "max":
        return torch.stack([one.amax(1) for one in columns], 1)
    return torch.stack([one.topk(min(k, one.shape[1]), dim=1).values.mean(1) for one in columns], 1)


def contrasted(positive: Tensor, negative: Tensor | None, contrast: Contrast, temperature: float = 1.0) -> Tensor:
    """(B, G) of the sides (B, G)."""
    if contrast == "none":
        return positive
    if contrast == "sigmoid":
        return (positive / temperature).sigmoid()
    assert negative is not None
    difference = positive - negative
    return difference if contrast == "difference" else (difference / temperature).sigmoid()


def of_study(groups: Tensor, views: Views) -> Tensor:
    """(G,) of a study from the (V, G) of its images."""
    return groups.mean(0) if views == "mean" else groups.amax(0)


def combined(groups: Tensor, members: Sequence[Sequence[int]], combine: Combine) -> Tensor:
    """(..., F) from (..., G); ``members`` are the groups of each class. A class without groups has NaN."""
    found = []
    for own in members:
        if not own:
            found.append(torch.full_like(groups[..., 0], torch.nan))
            continue
        values = groups[..., list(own)]
        if combine == "geometric":
            found.append(values.clamp_min(torch.finfo(values.dtype).tiny).log().mean(-1).exp())
        elif combine == "roll_up":  # the class itself is its first group
            found.append(values[..., 0] * values.amax(-1))
        else:
            found.append(values.mean(-1) if combine == "mean" else values.amax(-1))
    return torch.stack(found, -1)


def over_classes(scores: Tensor, classes: Classes) -> Tensor:
    """(N, F) of N studies; ``zscore`` is over them, with the deviation of the population, and 0 where all are alike.

    Classes without a score (NaN) take no part in a softmax.
    """
    if classes == "softmax":
        return scores.nan_to_num(-torch.inf).softmax(-1).masked_fill(scores.isnan(), torch.nan)
    if classes == "zscore":
        deviation = scores.std(0, correction=0)
        return torch.where(deviation > 0, (scores - scores.mean(0)) / deviation.clamp_min(torch.finfo(scores.dtype).tiny), 0.0)
    return scores


def with_no_finding(scores: Tensor, normal: Sequence[bool], no_finding: NoFinding) -> Tensor:
    """(N, F) in which the classes that say that nothing is wrong are 1 - the highest of the others, if they are to be."""
    if no_finding == "as_label" or not any(normal) or all(normal):
        return scores
    is_normal = torch.tensor(normal, device=scores.device)
    highest = scores.masked_fill(is_normal, -torch.inf).amax(-1, keepdim=True)
    return torch.where(is_normal, 1 - highest, scores)
