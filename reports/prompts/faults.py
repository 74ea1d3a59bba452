"""What is wrong with a set of prompts: the same sentence for and against, denials among the positives, kinds of each other in a circle.

Sentences are compared without case, punctuation and spacing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Container, Iterator
from graphlib import CycleError, TopologicalSorter
from string import Formatter

from reports.prompts.registry import FindingWords, PromptSet, Templates, template_slots

_DENIAL = re.compile(
    r"\b(?:no|not|without|absen(?:t|ce)|neither|nor|none|never|cannot|lack(?:s|ing)?|free of|negative for|ruled out|excluded?)\b|n['’]t\b",
    re.IGNORECASE,
)
"""Words that deny."""
_NORMALITY = re.compile(r"\b(?:normal(?:ly)?|intact|clear|unremarkable|sharp|preserved|healthy|patent)\b", re.IGNORECASE)
"""Words that deny by saying that all is well."""
_HEDGE = re.compile(
    r"\b(?:may|might|could|possibl[ey]|probabl[ey]|perhaps|uncertain|questionable|equivocal|suspected|suspicious|borderline"
    r"|cannot be excluded)\b",
    re.IGNORECASE,
)
"""Words that leave open."""
_SIDE = re.compile(r"\b(?:left|right|bilateral|both|unilateral)\b", re.IGNORECASE)
_OPPOSITE = {"present": ("absent", "uncertain"), "absent": ("uncertain",)}


def prompt_faults(
    prompts: PromptSet,
    known: Container[str] | None = None,
    *,
    wording: bool = True,
    exceptions: Collection[str] = (),
) -> tuple[str, ...]:
    """Every fault of a set, each in words that say where it is; empty if there is none.

    Args:
        known: ids of an ontology (``load_ontology().findings``). A finding must be among them, unless it is a kind of one that is: a set
            may divide a finding further than the ontology does, or a class that says that nothing is wrong. None: ids are not looked at.
        wording: also look at what sentences say: a positive one that denies or hedges, a negative one that does not deny, an uncertain
            one that does not hedge. A rule by words, so a right sentence can break it; ``exceptions`` lists such sentences.
        exceptions: sentences whose wording a person has checked.
    """
    found = [
        *_contradictions(prompts),
        *_repeats(prompts),
        *_braces(prompts),
        *_hierarchy(prompts),
        *_label_sets(prompts),
        *_empty(prompts),
    ]
    if known is not None:
        found += _unknown(prompts, known)
    if wording:
        checked = set(map(normal_form, exceptions))
        found += _wording(prompts, checked)
        for name, words in prompts.words.items():
            found += [f"finding {name}: {fault}" for fault in _combination_faults(words)]
    return tuple(dict.fromkeys(found))


def template_faults(templates: Templates) -> tuple[str, ...]:
    """Templates with a slot that nothing fills, or that are no template at all."""
    found = []
    for kind, slots in template_slots().items():
        value = getattr(templates, kind)
        for text in (value,) if isinstance(value, str) else value:
            try:
                named = {f"{name}!" if form or how else name for _, name, form, how in Formatter().parse(text) if name is not None}
            except ValueError:
                found.append(f"templates {kind}: a brace that nothing closes in {text!r}")
                continue
            if unknown := sorted(named - slots):
                listed = ", ".join(f"{{{name}}}" for name in unknown)
                found.append(f"templates {kind}: nothing fills {listed}; known are {', '.join(f'{{{s}}}' for s in sorted(slots))}")
            elif not named:
                found.append(f"templates {kind}: {text!r} has no slot, so that it says the same of every finding")
    return tuple(found)


def normal_form(sentence: str) -> str:
    """A sentence without case, punctuation and spacing, to compare it with others."""
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def denies(sentence: str) -> bool:
    """Whether a word of it denies something."""
    return _DENIAL.search(sentence) is not None


def _contradictions(prompts: PromptSet) -> Iterator[str]:
    """The same sentence in two states. Of two findings it is one as well: "The heart is large" cannot be for one and against the other.

    One sentence may count for several findings in the same state ("The lungs are clear").
    """
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, state, text in prompts.sentences():
        if state != "phrase":
            places[normal_form(text)][state].append(name)
    shown = {"present": "positive", "absent": "negative", "uncertain": "uncertain"}
    for text, states in places.items():
        for state, others in _OPPOSITE.items():
            for other in others:
                for a in dict.fromkeys(states.get(state, ())):
                    for b in dict.fromkeys(states.get(other, ())):
                        if a == b:
                            yield f"finding {a}: the same sentence stands in {shown[state]} and {shown[other]} ({text!r})"
                        else:
                            yield f"the same sentence is {shown[state]} of {a} and {shown[other]} of {b} ({text!r})"


def _repeats(prompts: PromptSet) -> Iterator[str]:
    for name in prompts.findings:
        pair, words = prompts.findings[name], prompts.words.get(name)
        lists = {"positive": pair.positive, "negative": pair.negative}
        if words is not None:
            nouns = {"names": words.names, "subtypes": words.subtypes, "descriptors": words.descriptors}
            lists |= {key: tuple(noun.text for noun in value) for key, value in nouns.items()}
            lists |= {"uncertain": words.uncertain, "severities": words.severities, "locations": words.locations, "parents": words.parents}
        for key, texts in lists.items():
            forms = list(map(normal_form, texts))
            for form in dict.fromkeys(form for form in forms if forms.count(form) > 1):
                yield f"finding {name}: {form!r} stands in {key} twice"


def _braces(prompts: PromptSet) -> Iterator[str]:
    for name, state, text in prompts.sentences():
        if "{" in text or "}" in text:
            yield f"finding {name}: a slot is not filled in {text!r} ({state})"


def _hierarchy(prompts: PromptSet) -> Iterator[str]:
    parents = {name: words.parents for name, words in prompts.words.items()}
    for name, of in parents.items():
        yield from (f"finding {name}: its parent {one} is no finding of the set" for one in of if one not in prompts.findings)
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        yield f"findings that are kinds of each other in a circle: {' of '.join(reversed(error.args[1]))}"


def _label_sets(prompts: PromptSet) -> Iterator[str]:
    for label_set, labels in prompts.label_sets.items():
        for label, name in labels.items():
            if name not in prompts.findings:
                yield f"label set {label_set}: {label} stands for {name}, which is no finding of the set"


def _empty(prompts: PromptSet) -> Iterator[str]:
    for name, pair in prompts.findings.items():
        yield from (f"finding {name}: it has no {key} sentence" for key in ("positive", "negative") if not getattr(pair, key))


def _unknown(prompts: PromptSet, known: Container[str]) -> Iterator[str]:
    for name in prompts.findings:
        line, seen = [name], {name}
        if prompts.is_normal(name):
            continue
        while line and line[0] not in known:
            line = [*line[1:], *(one for one in prompts.parents(line[0]) if one not in seen)]
            seen.update(line)
        if not line:
            yield f"finding {name}: neither it nor anything that it is a kind of is a finding of the ontology"


def _wording(prompts: PromptSet, checked: Container[str]) -> Iterator[str]:
    for name, state, text in prompts.sentences():
        if normal_form(text) in checked:
            continue
        if prompts.is_normal(name):
            state = {"present": "absent", "absent": "present"}.get(state, state)
        if state == "present" and denies(text):
            yield f"finding {name}: the positive sentence {text!r} has a word that denies"
        elif state == "present" and _HEDGE.search(text):
            yield f"finding {name}: the positive sentence {text!r} has a word that leaves it open"
        elif state == "absent" and not (denies(text) or _NORMALITY.search(text)):
            yield f"finding {name}: the negative sentence {text!r} has no word that denies"
        elif state == "uncertain" and not _HEDGE.search(text):
            yield f"finding {name}: the uncertain sentence {text!r} has no word that leaves it open"


def _combination_faults(words: FindingWords) -> Iterator[str]:
    """Choices that contradict each other once they are combined."""
    severities = {normal_form(text) for text in words.severities}
    for noun in words.subtypes:
        if both := sorted(severities & set(normal_form(noun.text).split())):
            yield f"the subtype {noun.text!r} has the severity {', '.join(both)} in it, which every severity would be put before"
        if _SIDE.search(noun.text) and any(_SIDE.search(location) for location in words.locations):
            yield f"the subtype {noun.text!r} names a side, and so do locations that it would be combined with"
