"""Words of a text that name a finding, marked for similarities that look for findings and not for words.

Shapes: M texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from medvl.types import ReportEncoder, TextBatch, TextFeatures
from reports.facts import LexiconFacts
from reports.facts.statements import FactSource
from reports.towers.trunk import TrunkReportEncoder
from reports.towers.words import Group, Span, overlapping

_KEPT = 2**16
"""Texts whose concepts are kept."""


class ConceptReportEncoder(ReportEncoder):
    """A report tower that says which of its tokens name a finding: :attr:`medvl.types.TextFeatures.concepts`.

    A concept is a finding that the text states, present or not, by the words that name it, found by their place in the text. (ConceptCLIP,
    arXiv:2501.15579, has concepts of the UMLS, which cannot be shipped.)

    Args:
        tower: gives the features; needs ``tokens``.
        facts: finds the findings; None takes the lexicon.
    Raises:
        ValueError: a tower without tokens.
    """

    def __init__(self, tower: TrunkReportEncoder, facts: FactSource | None = None) -> None:
        super().__init__()
        if tower.tokens_as is None:
            raise ValueError("concepts are marked on tokens: give the report tower `tokens: words`")
        self.tower, self.embed_dim = tower, tower.embed_dim
        self._facts = LexiconFacts() if facts is None else facts
        self._kept: dict[str, tuple[Group, ...]] = {}

    def precompute(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> None:
        """As the tower does."""
        self.tower.precompute(texts, progress)

    def forward(self, batch: TextBatch) -> TextFeatures:
        """The tower's features, with concepts."""
        features = self.tower(batch)
        assert features.tokens is not None
        concepts = torch.full(features.tokens.shape[:2], -1, dtype=torch.long)
        for i, groups in enumerate(self._concepts(batch.texts)):
            for number, places in enumerate(groups):
                concepts[i, list(places)] = number
        return TextFeatures(features.pooled, features.tokens, features.token_valid, concepts.to(features.tokens.device))

    def _concepts(self, texts: Sequence[str]) -> list[tuple[Group, ...]]:
        """The tokens of each concept of each text, kept for when a text comes again."""
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        missing = [text for text in dict.fromkeys(texts) if text not in self._kept]
        for text, tokens in zip(missing, self.tower.spans(missing), strict=True):
            stated = (one for sentence in self._facts.sentences(text) for one in sentence.statements)
            self._kept[text] = _groups(tokens, tuple(dict.fromkeys((one.start, one.end) for one in stated)))
        return [self._kept[text] for text in texts]


def _groups(tokens: Sequence[Span], concepts: Sequence[Span]) -> tuple[Group, ...]:
    """Indices of the tokens of each concept that has one; a token of two is of the later alone, and a concept left without is none."""
    owner: dict[int, int] = {}
    for number, (start, end) in enumerate(concepts):
        owner |= dict.fromkeys(overlapping(tokens, start, end), number)
    found: dict[int, list[int]] = {}
    for token, number in sorted(owner.items()):
        found.setdefault(number, []).append(token)
    return tuple(tuple(found[number]) for number in sorted(found))
