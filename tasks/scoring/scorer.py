"""A rule with the prompts of some findings, encoded once by a model: features of images in, scores out.

Shapes: B images, G groups of prompts, F findings, N studies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medvl.model import DualEncoder
from medvl.nn.similarity import slices_as_studies, unit
from medvl.types import ImageFeatures, TextFeatures
from reports.prompts import PromptSet, scheme
from tasks.scoring.rules import Rule, combined, contrasted, of_study, over_classes, pooled_prompts, pooled_similarities, with_no_finding


@dataclass(frozen=True)
class Group:
    """Prompts that are scored together, by their places among all prompts."""

    finding: int
    about: str  # the class, its visual sign or its kind
    positive: tuple[int, ...]
    negative: tuple[int, ...]


@dataclass(frozen=True)
class Scorer:
    """See the module; :meth:`of` makes one."""

    rule: Rule
    findings: tuple[str, ...]
    texts: tuple[str, ...]  # P
    groups: tuple[Group, ...]
    normal: tuple[bool, ...]  # (F,) which findings say that nothing is wrong
    features: TextFeatures  # of the texts
    prompts_sha256: str
    preset_sha256: str

    @classmethod
    def of(
        cls, model: DualEncoder, rule: Rule, prompts: PromptSet, findings: Sequence[str] | None = None, label_set: str | None = None
    ) -> Scorer:
        """The rule for some findings of a set of prompts.

        Args:
            findings: which, in this order; None: those of the label set, or all that label sets name.
            label_set: classes are called as it publishes them; None: as the set of prompts calls them.
        Raises:
            KeyError: a finding or label set that the prompts do not have.
            ValueError: a rule that needs prompts against a class, where the scheme has none, or visual signs, or findings without any.
        """
        written = scheme(rule.prompts).prompts(prompts, findings, label_set=label_set)
        column: dict[str, int] = {}

        def at(texts: Sequence[str]) -> tuple[int, ...]:
            return tuple(column.setdefault(text, len(column)) for text in texts)

        names = tuple(one.finding for one in written)
        groups = tuple(
            Group(i, group.about, at(group.positive), at(group.negative)) for i, one in enumerate(written) for group in one.groups
        )
        if rule.needs_negative and (bare := sorted({names[one.finding] for one in groups if not one.negative})):
            raise ValueError(f"preset {rule.name} sets prompts against each other, and there are none against {', '.join(bare)}")
        normal = tuple(prompts.is_normal(name) for name in names)
        scored = {one.finding for one in groups}
        if missing := [name for i, name in enumerate(names) if i not in scored and not (normal[i] and rule.no_finding == "one_minus_max")]:
            raise ValueError(f"preset {rule.name} has no prompts for {', '.join(missing)}; leave these out with --finding")
        texts = tuple(column)
        described = {"rule": rule.as_dict(), "texts": texts, "groups": [[one.finding, one.positive, one.negative] for one in groups]}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        return cls(rule, names, texts, groups, normal, model.encode_text(texts), prompts.sha256, digest)

    @torch.inference_mode()
    def group_scores(self, model: DualEncoder, images: ImageFeatures) -> Tensor:
        """(B, parts, G) in float64: what each similarity of the rule makes of each group, before views and classes."""
        parts = [self._contrasted(name, model, images) for name in self.rule.similarity]
        return torch.stack(parts, 1).double()

    @torch.inference_mode()
    def slice_scores(self, model: DualEncoder, images: ImageFeatures) -> Tensor:
        """(B, F, S) scores of every slice of volumes, each as if it were the whole study; NaN on padding.

        Raises:
            ValueError: the image tower keeps no slices, or a rule that depends on the other studies of a run.
        """
        if self.rule.depends_on_run:
            raise ValueError(f"preset {self.rule.name} scores studies against each other, so a slice by itself has no score")
        single, valid = slices_as_studies(images)
        groups = self.group_scores(model, single)  # (B * S, parts, G)
        of_slices = self.scores(torch.stack([self.study_scores(one[None]) for one in groups]))
        return of_slices.unflatten(0, valid.shape).transpose(1, 2).masked_fill(~valid[:, None], torch.nan)

    def study_scores(self, groups: Tensor) -> Tensor:
        """(parts, F) of a study from the (V, parts, G) of its images."""
        members = [[g for g, one in enumerate(self.groups) if one.finding == i] for i in range(len(self.findings))]
        return combined(of_study(groups, self.rule.views), members, self.rule.combine)

    def scores(self, studies: Tensor) -> Tensor:
        """(N, F) of the (N, parts, F) of all studies of a run; one by one is the same, but for a rule that depends on the run."""
        weights = torch.tensor(list(self.rule.similarity.values()), dtype=studies.dtype, device=studies.device)
        joined = torch.stack([over_classes(studies[:, i], self.rule.classes) for i in range(studies.shape[1])], 1)
        return with_no_finding((joined * weights[:, None]).sum(1) / weights.sum(), self.normal, self.rule.no_finding)

    def signs(self, groups: Tensor) -> Iterator[tuple[Group, float]]:
        """Each group with its score in a study, from the (V, parts, G) of its images: what a finding's score is made of."""
        weights = torch.tensor(list(self.rule.similarity.values()), dtype=groups.dtype, device=groups.device)
        values = (of_study(groups, self.rule.views) * weights[:, None]).sum(0) / weights.sum()
        yield from zip(self.groups, values.tolist(), strict=True)

    def provenance(self) -> dict[str, Any]:
        """For outputs: what made the scores."""
        return {
            "preset": self.rule.name,
            "preset_sha256": self.preset_sha256,
            "prompts_sha256": self.prompts_sha256,
            "depends_on_run": self.rule.depends_on_run,
            "calibrated": False,
            **({"differs": self.rule.differs} if self.rule.differs else {}),
        }

    def _contrasted(self, name: str, model: DualEncoder, images: ImageFeatures) -> Tensor:
        """(B, G) of one similarity."""
        rule = self.rule
        sides = [[one.positive for one in self.groups], [one.negative for one in self.groups] if rule.needs_negative else []]
        if rule.pool.startswith("embedding"):
            scale = self._scale(model)
            vectors = unit(images.pooled)
            positive, negative = (
                scale * vectors @ pooled_prompts(self.features.pooled, side, rule.pool).T.to(vectors.dtype) if side else None
                for side in sides
            )
        else:
            similarity = self._similarity(name, model, images)
            positive, negative = (pooled_similarities(similarity, side, rule.pool, rule.k) if side else None for side in sides)
        assert positive is not None
        return contrasted(positive, negative, rule.contrast, rule.temperature)

    def _similarity(self, name: str, model: DualEncoder, images: ImageFeatures) -> Tensor:
        """(B, P)."""
        if name == "model":
            return model.similarity(images, self.features)
        if name == "pooled":
            return self._scale(model) * unit(images.pooled) @ unit(self.features.pooled).T
        return self._scale(model) * top_token_cosines(images, self.features, self.rule.top)

    def _scale(self, model: DualEncoder) -> Tensor | float:
        """What cosines are multiplied with.

        Raises:
            ValueError: a rule that takes the model's temperature, and a model whose similarity has none.
        """
        if self.rule.scale is not None:
            return self.rule.scale
        temperature = getattr(model.similarity, "temperature", None)
        if not isinstance(temperature, nn.Module):
            raise ValueError(f"preset {self.rule.name} takes the model's temperature, and {type(model.similarity).__name__} has none")
        return 1 / temperature()


def top_token_cosines(images: ImageFeatures, texts: TextFeatures, top: int) -> Tensor:
    """(B, P) mean of the ``top`` highest cosines between a token of the image and a token of the text (fewer where there are fewer).

    Where the text's tokens are marked by concepts, those of no concept do not count, unless it has none.

    Raises:
        ValueError: a tower that keeps no tokens.
    Source: "ConceptCLIP", arXiv:2501.15579, its evaluation code.
    """
    if images.tokens is None or texts.tokens is None:
        raise ValueError("this rule compares tokens: both towers must keep them (a report tower with keep_tokens: true)")
    patches, words = unit(images.tokens), unit(texts.tokens)
    valid = words.new_ones(words.shape[:2], dtype=torch.bool) if texts.token_valid is None else texts.token_valid
    if texts.concepts is not None:
        of_concept = valid & (texts.concepts >= 0)
        valid = torch.where(of_concept.any(1, keepdim=True), of_concept, valid)
    seen = patches.new_ones(patches.shape[:2], dtype=torch.bool) if images.token_valid is None else images.token_valid
    found = []
    for vectors, own in zip(words, valid, strict=True):
        cosines = (patches @ vectors[own].T).masked_fill(~seen[..., None], -torch.inf).flatten(1)
        best = cosines.topk(min(top, cosines.shape[1]), dim=1).values
        counted = best.isfinite()
        found.append(best.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp_min(1))
    return torch.stack(found, 1)
