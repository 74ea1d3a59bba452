"""What a set of prompts holds: per finding, sentences for and against it, and the words that more sentences are made of.

The hash of a set covers everything that a score could depend on, so that a saved result says which texts made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from typing import Any

from reports.prompts.nouns import Noun, sentence


@dataclass(frozen=True)
class PromptPair:
    """What is said of one finding when it is there and when it is not, and the phrase that grounding looks for."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    phrase: str


@dataclass(frozen=True)
class DescriptorPrompts:
    """One visual sign of a finding, and the sentences that say it is there or not (the Xplainer scheme)."""

    descriptor: str
    positive: str
    negative: str


@dataclass(frozen=True)
class Templates:
    """Sentences with slots.

    ``{a_finding}`` is the finding with the article it takes, ``{finding}`` without, ``{is}`` its "is" or "are"; in ``expanded`` also
    ``{location}``; in ``described`` and ``undescribed`` there are ``{a_descriptor}`` and ``{descriptor}``, of which ``{is}`` is the verb.
    """

    positive: tuple[str, ...] = ("There {is} {a_finding}.",)
    negative: tuple[str, ...] = ("There {is} no {finding}.",)
    uncertain: tuple[str, ...] = ("There may be {a_finding}.",)
    expanded: tuple[str, ...] = ("There {is} {a_finding} {location}.",)
    described: str = "There {is} {a_descriptor} indicating {a_finding}."
    undescribed: str = "There {is} no {descriptor} indicating {a_finding}."


@dataclass(frozen=True)
class FindingWords:
    """The words for a finding that prompts are made of. Empty fields make no sentences."""

    names: tuple[Noun, ...]  # the finding's name, then its synonyms
    uncertain: tuple[str, ...] = ()  # whole sentences, in place of those of the templates
    severities: tuple[str, ...] = ()  # adjectives
    subtypes: tuple[Noun, ...] = ()  # kinds of the finding; none: its name
    locations: tuple[str, ...] = ()  # with their preposition: "in the left upper lobe"
    descriptors: tuple[Noun, ...] = ()  # visual signs
    parents: tuple[str, ...] = ()  # findings of which this is a kind
    normal: bool = False  # the class says that nothing is wrong: its positive prompts deny


@dataclass(frozen=True)
class PromptSet:
    """Prompts of every finding in one file. ``sha256`` is of the content, not of the file's comments or layout."""

    version: str
    findings: Mapping[str, PromptPair] = field(hash=False)
    words: Mapping[str, FindingWords] = field(default_factory=dict, hash=False)
    templates: Templates = Templates()
    label_sets: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)  # name -> label as published -> finding

    @cached_property
    def sha256(self) -> str:
        """Hash of version, finding names in their order, sentences; where the set has words, of these and all that is made of them too."""
        content: list[Any] = [self.version, [[n, p.positive, p.negative, p.phrase] for n, p in self.findings.items()]]
        if self.words or self.label_sets or self.templates != Templates():
            words = [[name, asdict(words)] for name, words in self.words.items()]
            label_sets = [[name, list(labels.items())] for name, labels in self.label_sets.items()]
            content.append([asdict(self.templates), words, label_sets, list(self.sentences())])
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()

    def pair(self, finding: str) -> PromptPair:
        """The prompts of a finding in the set, else the template's (:func:`prompt_pair`)."""
        return self.findings.get(finding) or prompt_pair(finding)

    def name(self, finding: str) -> Noun:
        """What the finding is called in a sentence; of a finding without words in the set, its id in words."""
        return self._words(finding).names[0]

    def synonyms(self, finding: str) -> tuple[Noun, ...]:
        """What else it is called."""
        return self._words(finding).names[1:]

    def uncertain(self, finding: str) -> tuple[str, ...]:
        """Sentences that leave open whether the finding is there; of a class that says that nothing is wrong only its own."""
        words = self._words(finding)
        if words.normal:
            return words.uncertain
        return words.uncertain or filled(self.templates.uncertain, words.names[:1])

    def phrases(self, finding: str) -> tuple[str, ...]:
        """Every severity x subtype x location of a finding without a sentence around it: "mild linear atelectasis at the lung bases".

        No severity and no location are among the choices. The generation scheme is that of GLoRIA (ICCV 2021), less its words of change
        ("improved", "persistent"), which one image cannot show.
        """
        found = (f"{noun.text} {location}".rstrip() for noun, location in self._combinations(finding))
        return tuple(dict.fromkeys(found))

    def expand(self, finding: str, n: int | None = None, seed: int = 0) -> tuple[str, ...]:
        """Positive sentences for every severity x subtype x location, or ``n`` of them.

        Args:
            n: how many; None, or more than there are, takes all.
            seed: which of them: those whose hash with the seed is smallest, so that a draw is the same on every machine and in every
                version, and that of a smaller ``n`` lies within that of a larger. They come in the order of the whole list.
        Raises:
            ValueError: ``n`` is negative.
        """
        if n is not None and n < 0:
            raise ValueError(f"n is {n}, expected None or at least 0")
        found: dict[str, None] = {}
        for noun, location in self._combinations(finding):
            found.update(dict.fromkeys(filled(self.templates.expanded, [noun], location=location)))
        return chosen(tuple(found), n, f"{seed}/{finding}")

    def descriptors(self, finding: str) -> tuple[DescriptorPrompts, ...]:
        """The visual signs of a finding, each with its pair of sentences; empty where the set has none."""
        words = self._words(finding)
        return tuple(
            DescriptorPrompts(
                sign.text,
                _described(self.templates.described, sign, words.names[0]),
                _described(self.templates.undescribed, sign, words.names[0]),
            )
            for sign in words.descriptors
        )

    def is_normal(self, finding: str) -> bool:
        """Whether the class says that nothing is wrong."""
        return self._words(finding).normal

    def parents(self, finding: str) -> tuple[str, ...]:
        """The findings of which it is a kind."""
        return self._words(finding).parents

    def children(self, finding: str) -> tuple[str, ...]:
        """The findings of the set that are a kind of it, in the set's order."""
        return tuple(name for name, words in self.words.items() if finding in words.parents)

    def subset(self, findings: Iterable[str], *, with_children: bool = False) -> PromptSet:
        """The set of some of the findings, in the order given; ``with_children`` adds all kinds of each after the last.

        Parents that are left out are no longer parents, and label sets of which a finding is left out are left out.

        Raises:
            KeyError: a finding that the set does not have.
        """
        names = dict.fromkeys(findings)
        if unknown := [name for name in names if name not in self.findings]:
            raise KeyError(f"no prompts for {', '.join(unknown)}; the set has {', '.join(self.findings)}")
        if with_children:
            names.update(dict.fromkeys(self._descendants(names)))
        return replace(
            self,
            findings={name: self.findings[name] for name in names},
            words={name: _kind_within(self.words[name], names) for name in names if name in self.words},
            label_sets={name: labels for name, labels in self.label_sets.items() if names.keys() >= set(labels.values())},
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The findings that the label sets name; all where there is no label set."""
        named = dict.fromkeys(finding for labels in self.label_sets.values() for finding in labels.values())
        return tuple(named or self.findings)

    def label_set(self, name: str) -> Mapping[str, str]:
        """Label as the data set publishes it -> finding.

        Raises:
            KeyError: a label set that the set does not have.
        """
        if name not in self.label_sets:
            raise KeyError(f"no label set {name}; the set has {', '.join(self.label_sets) or 'none'}")
        return self.label_sets[name]

    def with_descriptors(self, descriptors: Mapping[str, Sequence[str]]) -> PromptSet:
        """The set with more visual signs, written as in a prompt file ("a meniscus", "some air bronchograms"); equal ones once.

        Raises:
            KeyError: a finding that the set does not have.
        """
        if unknown := [name for name in descriptors if name not in self.findings]:
            raise KeyError(f"no prompts for {', '.join(unknown)}; the set has {', '.join(self.findings)}")
        words = dict(self.words)
        for name, more in descriptors.items():
            old = self._words(name)
            signs: dict[str, Noun] = {}
            for noun in (*old.descriptors, *map(Noun.read, more)):
                signs.setdefault(noun.text.casefold(), noun)
            words[name] = replace(old, descriptors=tuple(signs.values()))
        return replace(self, words=words)

    def sentences(self) -> Iterator[tuple[str, str, str]]:
        """(finding, state, sentence) of everything in the set that an image could be compared with; state "phrase" has no sentence."""
        for name, pair in self.findings.items():
            yield from ((name, "present", text) for text in pair.positive)
            yield from ((name, "absent", text) for text in pair.negative)
            yield name, "phrase", pair.phrase
            if name in self.words:
                yield from ((name, "uncertain", text) for text in self.uncertain(name))
                yield from ((name, "present", text) for text in self.expand(name))
                for one in self.descriptors(name):
                    yield name, "present", one.positive
                    yield name, "absent", one.negative

    def _words(self, finding: str) -> FindingWords:
        return self.words.get(finding) or FindingWords((Noun(finding_words(finding)),))

    def _combinations(self, finding: str) -> Iterator[tuple[Noun, str]]:
        words = self._words(finding)
        if words.normal:
            return
        kinds = words.subtypes or words.names[:1]
        for severity, kind, location in product(("", *words.severities), kinds, ("", *words.locations)):
            yield kind.described(severity), location

    def _descendants(self, findings: Iterable[str]) -> Iterator[str]:
        todo, seen = list(findings), set()
        while todo:
            for child in self.children(todo.pop(0)):
                if child not in seen:
                    seen.add(child)
                    todo.append(child)
                    yield child


def prompt_pair(finding: str) -> PromptPair:
    """Template prompts for any finding name, ``hiatal_hernia`` or "hiatal hernia".

    Raises:
        ValueError: a name without a letter.
    """
    noun = Noun(finding_words(finding))
    return PromptPair(filled(Templates().positive, [noun]), filled(Templates().negative, [noun]), noun.text)


def finding_words(finding: str) -> str:
    """A finding's id in words.

    Raises:
        ValueError: a name without a letter.
    """
    words = " ".join(finding.replace("_", " ").split()).strip(" .")
    if not any(c.isalpha() for c in words):
        raise ValueError(f"a finding name needs letters, got {finding!r}")
    return words


def filled(templates: Iterable[str], nouns: Iterable[Noun], **slots: str) -> tuple[str, ...]:
    """Each template with each noun in the finding's slots, equal ones once."""
    nouns = tuple(nouns)
    found = (
        sentence(template, **{"a_finding": noun.indefinite, "finding": noun.text, "is": noun.verb, **slots})
        for template in templates
        for noun in nouns
    )
    return tuple(dict.fromkeys(found))


def chosen(texts: Sequence[str], n: int | None, salt: str) -> tuple[str, ...]:
    """The ``n`` texts whose hash with ``salt`` is smallest, in the order they stand in; all for None."""
    if n is None or n >= len(texts):
        return tuple(texts)
    by_hash = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{salt}/{texts[i]}".encode()).digest())
    return tuple(texts[i] for i in sorted(by_hash[:n]))


def template_slots() -> dict[str, frozenset[str]]:
    """Which slots the templates of each kind may have."""
    of_finding, of_descriptor = {"a_finding", "finding", "is"}, {"a_descriptor", "descriptor", "is", "a_finding", "finding"}
    described = {"described": of_descriptor, "undescribed": of_descriptor, "expanded": {*of_finding, "location"}}
    return {part.name: frozenset(described.get(part.name, of_finding)) for part in fields(Templates)}


def _kind_within(words: FindingWords, names: Container[str]) -> FindingWords:
    return replace(words, parents=tuple(parent for parent in words.parents if parent in names))


def _described(template: str, sign: Noun, finding: Noun) -> str:
    slots = {"a_descriptor": sign.indefinite, "descriptor": sign.text, "is": sign.verb}
    return sentence(template, a_finding=finding.indefinite, finding=finding.text, **slots)
