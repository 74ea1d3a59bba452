"""What of a report is trained on: a text source per policy. A source is configurable, so that a run's recipe records the policy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from medvl.types import TextSource
from reports.placeholders import is_doubtful, normalize_placeholders
from reports.sections import split_sections
from reports.sentences import has_content, report_sentences, split_sentences

TextPolicy = Literal["impression", "findings", "both", "longer", "sentences"]
POLICIES: tuple[TextPolicy, ...] = get_args(TextPolicy)


class ReportSentences(TextSource):
    """The sentences of findings and impression, each a text of its own.

    Args:
        max_characters: longer sentences are cut at a word; keeps one run-on dictation from filling the text tower.
    """

    def __init__(self, max_characters: int = 600) -> None:
        _check_length(max_characters)
        self.max_characters = max_characters

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """The different sentences in their order; empty if there is none with content."""
        return _cut(report_sentences(report, findings, impression), self.max_characters)


class ReportText(TextSource):
    """One text of a report, or its sentences, by policy.

    ============  =========================================================================================
    impression    the impression
    findings      the findings
    both          findings, then impression
    longer        the one of the two with more characters, the findings if equal
    sentences     every different sentence of both, each a text of its own
    ============  =========================================================================================

    Findings without a heading after the blank line that ends an indication, technique, comparison or exam count as findings. With
    ``fall_back``, a report without what the policy wants gives the other of the two, else what follows no heading: MIMIC-CXR's rule of the
    last paragraph, which its labels were made by (impression, else findings, else last paragraph: policy ``impression``).

    Sentences without content are left out, the others joined by single spaces without list numbers; one that has no full stop gets one if
    another follows.

    Args:
        policy: see above.
        fall_back: whether a report that lacks the section still gives a text.
        addendum: whether an addendum is added after the impression. It may contradict what it corrects, hence not unless asked for.
        placeholders: every mark of a removed word made ``___`` (:func:`reports.placeholders.normalize_placeholders`); False keeps them.
        doubtful: ``drop`` leaves out a sentence whose sense a removed word may have decided ("XXXX pneumothorax").
        max_characters: a longer text is cut at a word.
    Raises:
        ValueError: a policy or a choice that is not known, or no room for a character.
    """

    def __init__(
        self,
        policy: TextPolicy = "both",
        fall_back: bool = True,
        addendum: bool = False,
        placeholders: bool = True,
        doubtful: Literal["drop", "keep"] = "drop",
        max_characters: int = 6000,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
        if doubtful not in ("drop", "keep"):
            raise ValueError(f"doubtful is {doubtful!r}, expected 'drop' or 'keep'")
        _check_length(max_characters)
        self.policy, self.fall_back, self.addendum = policy, fall_back, addendum
        self.placeholders, self.doubtful, self.max_characters = placeholders, doubtful, max_characters

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """One text, or the sentences; empty if the report has nothing that the policy takes."""
        found = self._chosen(_parts(report, findings, impression))
        if self.policy != "sentences":
            found = [_joined(found)] if found else []
        return _cut(found, self.max_characters)

    def _chosen(self, parts: _Parts) -> list[str]:
        """The sentences that the policy takes, in their order."""
        findings, impression, rest, addendum = (self._sentences(part) for part in parts)
        if self.policy == "impression":
            found = impression or (findings if self.fall_back else [])
        elif self.policy == "findings":
            found = findings or (impression if self.fall_back else [])
        elif self.policy == "longer":
            found = max(findings, impression, key=lambda sentences: len(_joined(sentences)))
        else:
            found = findings + impression
        if not found and self.fall_back:
            found = rest
        if found and self.addendum:
            found = found + addendum
        return _different(found) if self.policy == "sentences" else found

    def _sentences(self, text: str) -> list[str]:
        found = (sentence for sentence in split_sentences(text) if has_content(sentence))
        kept = (sentence for sentence in found if self.doubtful == "keep" or not is_doubtful(sentence))
        return [normalize_placeholders(sentence) if self.placeholders else sentence for sentence in kept]


class _Parts(NamedTuple):
    """What of a study's text describes the image."""

    findings: str
    impression: str
    rest: str  # what has no heading, where neither of them is there
    addendum: str


def _parts(report: str | None, findings: str | None, impression: str | None) -> _Parts:
    """Of the table's own columns, else of the whole report. A column may hold headings; what in it has none is the column's."""
    if not any(text and text.strip() for text in (findings, impression)):
        whole = split_sections(report or "")
        return _Parts(whole.findings or whole.last_paragraph, whole.impression, whole.other, whole.addendum)
    one, other = split_sections(findings or ""), split_sections(impression or "")
    return _Parts(
        findings=_paragraphs(one.other, one.findings, other.findings),
        impression=_paragraphs(one.impression, other.other, other.impression),
        rest="",
        addendum=_paragraphs(one.addendum, other.addendum),
    )


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _joined(sentences: list[str]) -> str:
    ended = [sentence if sentence[-1] in ".?!:;" else f"{sentence}." for sentence in sentences[:-1]]
    return " ".join([*ended, *sentences[-1:]])


def _different(sentences: Iterable[str]) -> list[str]:
    """Each sentence once, as it stands first; capitals and the stop at the end make no difference."""
    first: dict[str, str] = {}
    for sentence in sentences:
        first.setdefault(sentence.casefold().rstrip(" .!?"), sentence)
    return list(first.values())


def _cut(texts: Iterable[str], max_characters: int) -> tuple[str, ...]:
    cut = (text if len(text) <= max_characters else text[:max_characters].rsplit(" ", 1)[0] for text in texts)
    return tuple(dict.fromkeys(cut))


def _check_length(max_characters: int) -> None:
    if max_characters < 1:
        raise ValueError(f"max_characters is {max_characters}, expected at least 1")
