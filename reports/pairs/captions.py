"""Captions made of facts or labels: from the coarsest word for a finding to the finest, or one per label.

Their wording is neither that of the evaluation prompts nor that of the synthetic reports, so that a score is not a look-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from medvl.types import SourcedText, StudyWords, TextSource
from reports.facts import LexiconFacts
from reports.facts.ontology import Ontology, load_ontology
from reports.facts.statements import FactSource, Statement
from reports.pairs.truth import Claim, claims_of, with_disputes
from reports.providers.base import Provider
from reports.sentences import report_sentences

_COUNTED = frozenset(
    {"abnormality", "aneurysm", "artery", "cyst", "device", "effusion", "fracture", "gallbladder", "granuloma", "hernia", "infiltrate",
     "lesion", "mass", "node", "nodule", "obstruction", "opacity", "plaque", "pneumothorax", "scar", "shift", "stone"}
)  # fmt: skip
"""Last words of findings that take an article."""
_SIDES = {"left": "on the left", "right": "on the right", "bilateral": "on both sides"}
_AMOUNTS = {"mild": "small", "moderate": "moderate", "severe": "large"}
_IN_WORDS = {
    "cyst_lung": "lung cyst",
    "enlarged_cardiomediastinum": "enlarged mediastinal silhouette",
}


def in_words(finding: str) -> str:
    """A finding's id as words: "lung abnormality"."""
    return _IN_WORDS.get(finding, finding.replace("_", " "))


def noun_phrase(finding: str, *before: str) -> str:
    """The finding with an article if it takes one, and with words before it: "an upper lobe opacity", "severe edema"."""
    words = " ".join([*before, in_words(finding)])
    if not _is_counted(finding):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def hierarchy(claim: Claim, ontology: Ontology) -> tuple[str, ...]:
    """Captions of a finding that is present, coarse to fine: its ancestors, itself, its side, its place and its degree as far as stated."""
    known = claim.finding in ontology.parents
    above = sorted(ontology.ancestors(claim.finding), key=ontology.depth) if known else []
    phrases = [noun_phrase(finding) for finding in (*above, claim.finding)]
    if claim.side is not None:
        phrases.append(f"{noun_phrase(claim.finding)} {_SIDES[claim.side]}")
    if claim.places:
        phrases.append(f"{noun_phrase(claim.finding)} {_located(claim)}")
    if claim.severity is not None:
        degree = _AMOUNTS[claim.severity] if _is_counted(claim.finding) else claim.severity
        where = f" {_SIDES[claim.side]}" if claim.side is not None else ""
        phrases.append(f"{noun_phrase(claim.finding, degree)}{where}")
    return tuple(dict.fromkeys(f"The image shows {phrase}." for phrase in phrases))


def _located(claim: Claim) -> str:
    places = " and ".join(sorted(claim.places))
    if claim.side == "bilateral":
        return f"in the {places} on both sides"
    return f"in the {claim.side} {places}" if claim.side else f"in the {places}"


def _is_counted(finding: str) -> bool:
    return in_words(finding).rsplit(" ", 1)[-1] in _COUNTED


class HierarchicalCaptions(TextSource):
    """For each finding that a report states to be present, captions from coarse ("a lung abnormality") to fine (side, place, degree).

    Uncertain findings, and what the report both states and denies, are left out.

    Args:
        facts: finds what a text states; None takes :class:`reports.facts.LexiconFacts`.
        levels: how many captions of a finding are kept, coarsest first; None keeps all.
        lexicon: folder of the lexicon whose ontology is used; None takes the one that comes with the package.
    Raises:
        ValueError: ``levels`` below 1.
    """

    def __init__(self, facts: FactSource | None = None, levels: int | None = None, lexicon: Path | None = None) -> None:
        if levels is not None and levels < 1:
            raise ValueError(f"levels is {levels}, expected at least 1 or None for all")
        self.facts = LexiconFacts(lexicon) if facts is None else facts
        self.ontology, self.levels = load_ontology(lexicon), levels

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """The captions of all findings, each once."""
        said = self._sentences(report, findings, impression)
        found = (claims_of(text, statements, self.ontology) for text, statements in said)
        claims = with_disputes([claim for stated in found for claim in stated], self.ontology)
        denied = {claim.finding for claim in claims if claim.disputed}
        shown = [
            claim
            for claim in claims
            if claim.state == "present" and claim.change != "resolved" and not denied & {claim.finding, *self._above(claim.finding)}
        ]
        return tuple(dict.fromkeys(caption for claim in shown for caption in hierarchy(claim, self.ontology)[: self.levels]))

    def _sentences(self, report: str | None, findings: str | None, impression: str | None) -> Iterator[tuple[str, Iterable[Statement]]]:
        """Sentences with what they state. A provider knows reports and sections, its fallback and a lexicon know sentences."""
        source: FactSource | None = self.facts
        if isinstance(source, Provider):
            if known := source.known(report, findings, impression):
                yield from ((one.text, one.statements) for text, reading in known for one in reading.image_sentences(text))
                return
            source = source.fallback
        if source is not None:
            yield from ((text, source.facts(text)) for text in report_sentences(report, findings, impression))

    def _above(self, finding: str) -> tuple[str, ...]:
        return self.ontology.ancestors(finding) if finding in self.ontology.parents else ()


class LabelCaptions(TextSource):
    """One caption for each label of the manifest: present, absent or uncertain. Zero-shot scores of a run that uses it are not zero-shot.

    Args:
        findings: which labels; None takes all that a study has.
        states: captions of which states are written.
    Raises:
        ValueError: an unknown state.
    """

    def __init__(self, findings: list[str] | None = None, states: list[Literal["present", "absent", "uncertain"]] | None = None) -> None:
        self.findings = None if findings is None else tuple(findings)
        self.states = ("present", "absent") if states is None else tuple(states)
        if unknown := set(self.states) - {"present", "absent", "uncertain"}:
            raise ValueError(f"states names {', '.join(sorted(unknown))}; known are present, absent, uncertain")

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """None: captions are made of labels, see :meth:`sourced`."""
        return ()

    def sourced(self, study: StudyWords) -> tuple[SourcedText, ...]:
        """The captions of the study's labels."""
        chosen = self.findings if self.findings is not None else tuple(study.labels)
        captions = [self._caption(finding, study.labels[finding]) for finding in chosen if finding in study.labels]
        return tuple(SourcedText(caption, "labels") for caption in captions if caption)

    def _caption(self, finding: str, label: int) -> str | None:
        state = {1: "present", 0: "absent", -1: "uncertain"}[label]
        if state not in self.states:
            return None
        if state == "absent":
            return f"The image shows no {in_words(finding)}."
        return f"The image {'shows' if state == 'present' else 'may show'} {noun_phrase(finding)}."
