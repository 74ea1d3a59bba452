"""Published ways to word prompts, by name: the texts of each class in the groups that a scoring rule works on.

A group is what is scored together: a class by its name has one, a class by its visual signs one for each sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from reports.prompts.nouns import Noun
from reports.prompts.registry import PromptSet, chosen

Over = Literal["class", "pair", "descriptor", "expansion", "kind"]


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that are scored together; ``negative`` is empty where the scheme has none."""

    about: str  # the class, its visual sign or its kind
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class ClassPrompts:
    """All prompts of one class. A class that says that nothing is wrong has no groups where signs are scored: the others score it."""

    finding: str
    groups: tuple[PromptGroup, ...]


@dataclass(frozen=True)
class PromptScheme:
    """How a published system words its prompts; ``reports/prompts/schemes.yaml`` says what the fields mean."""

    name: str
    over: Over
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    lower: bool = False
    n: int | None = None
    phantom_overlap: bool = False  # on phantoms the score is in part a lookup
    source: str = ""

    def prompts(
        self,
        prompts: PromptSet,
        findings: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        n: int | None = None,
        seed: int = 0,
    ) -> tuple[ClassPrompts, ...]:
        """The texts for some findings of a set.

        Args:
            findings: which, in this order; None takes those of the label set, without one all that label sets name.
            label_set: classes are called as it publishes them ("Pleural Effusion"); None: as the prompt set calls them.
            n: how many combinations of severity, subtype and location; None takes the scheme's number.
            seed: which of them, see :meth:`PromptSet.expand`.
        Raises:
            KeyError: a finding or label set that the prompt set does not have.
            ValueError: findings without the visual signs that the scheme is made of; all are named.
        """
        called = {} if label_set is None else {finding: label for label, finding in prompts.label_set(label_set).items()}
        if findings is None:
            findings = tuple(called) or prompts.labels
        kept = tuple(prompts.subset(findings).findings)
        bare = [name for name in kept if not prompts.descriptors(name) and not prompts.is_normal(name)]
        if self.over == "descriptor" and bare:
            raise ValueError(
                f"scheme {self.name} needs descriptors, and the set has none for {', '.join(bare)}; leave these out, or add some with "
                "PromptSet.with_descriptors"
            )
        n = self.n if n is None else n
        return tuple(ClassPrompts(name, tuple(self._groups(prompts, name, called.get(name), n, seed))) for name in kept)

    def _groups(self, prompts: PromptSet, finding: str, called: str | None, n: int | None, seed: int) -> Iterator[PromptGroup]:
        noun = prompts.name(finding) if called is None else Noun(called)
        name = noun.text.lower() if self.lower else noun.text
        if prompts.is_normal(finding) and self.over in ("descriptor", "expansion"):
            return
        if self.over == "pair":
            yield _pair_group(prompts, finding)
        elif self.over == "kind":
            for kind in prompts.subset([finding], with_children=True).findings:
                yield _pair_group(prompts, kind)
        elif self.over == "descriptor":
            for one in prompts.descriptors(finding):
                yield self._group(one.descriptor, name, noun, d=one.descriptor)
        elif self.over == "expansion":
            phrases = chosen(prompts.phrases(finding), n, f"{seed}/{finding}")
            parts = [self._group(finding, name, noun, p=phrase) for phrase in phrases]
            yield PromptGroup(finding, tuple(t for part in parts for t in part.positive), tuple(t for part in parts for t in part.negative))
        else:
            yield self._group(finding, name, noun)

    def _group(self, about: str, name: str, noun: Noun, **slots: str) -> PromptGroup:
        slots |= {"c": name, "C": name[:1].upper() + name[1:], "is": noun.verb}
        return PromptGroup(about, *(tuple(t.format(**slots) for t in templates) for templates in (self.positive, self.negative)))


def scheme(name: str) -> PromptScheme:
    """A scheme by name.

    Raises:
        KeyError: no such scheme; the message lists all.
    """
    if name not in _schemes():
        raise KeyError(f"no prompt scheme {name}; known are {', '.join(_schemes())}")
    return _schemes()[name]


def scheme_names() -> tuple[str, ...]:
    """The schemes that come with the package."""
    return tuple(_schemes())


def _pair_group(prompts: PromptSet, finding: str) -> PromptGroup:
    pair = prompts.pair(finding)
    return PromptGroup(finding, pair.positive, pair.negative)


@cache
def _schemes() -> Mapping[str, PromptScheme]:
    content: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("schemes.yaml").read_text(encoding="utf-8"))
    return {name: PromptScheme(name, **{key: _frozen(value) for key, value in entry.items()}) for name, entry in content["schemes"].items()}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
