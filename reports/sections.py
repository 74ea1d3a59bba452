"""Sections of a radiology report: headings found, text between them assigned, nothing lost.

A report may have its headings on lines of their own, in the running text ("FINDINGS: ... IMPRESSION: ..."), in capitals or not, numbered,
in markdown, merged ("FINDINGS AND IMPRESSION:"), without a colon, or none. A word is a heading by where it stands, how it is written and
what follows: "findings are stable" and "no prior study: ..." are running text. In a report that has headings, a doubtful one is believed
if it is the only sign of its section and stands where that belongs, for indications often end without a full stop.

Headings that are none of ours ("LUNGS:", "LEFT KNEE:") stay in the section they stand in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

SectionName = Literal[
    "exam", "indication", "technique", "comparison", "findings", "impression", "recommendation", "addendum", "notification", "other"
]

_EXAM = r"(?:exam(?:ination)?s?|stud(?:y|ies)|procedures?)"
_IMAGING = r"(?:ct|cta|cxrs?|mri?|x-?rays?|radiographs?|films?|images?|imaging|scans?|reports?)"
_STRONG: dict[SectionName, str] = {
    "exam": rf"types? of {_EXAM}|{_EXAM} (?:type|name|title|description|performed|requested|date)|dates? of (?:{_EXAM}|service)",
    "indication": rf"(?:clinical )?indications?(?: for (?:the |this )?(?:{_EXAM}|{_IMAGING}))?"
    r"|clinical (?:histor(?:y|ies)|information|info|data|details?|statement|questions?|notes?|background|summary|context|presentation"
    r"|scenario|problem|concerns?|diagnos[ie]s|symptoms|reasons?|request|hx)|request details|signs and symptoms"
    rf"|reasons? for (?:the |this )?(?:{_EXAM}|{_IMAGING}|test|visit|referral|order|request|consult(?:ation)?)"
    r"|(?:relevant|pertinent|brief|patient|patient's|medical|past medical)(?: clinical| medical)? (?:history|information)"
    r"|(?:referral|request) information|history (?:general|of (?:the )?present illness)|presenting (?:complaints?|symptoms?|history)"
    r"|chief complaints?|clinical impression"
    r"|(?:provisional|working|ordering|admitting|admission|referring|referral|pre-?operative) diagnosis",
    "technique": r"techniques?|(?:imaging|scan(?:ning)?|acquisition|examination|exam|ct|mri?) (?:techniques?|protocol|parameters)"
    r"|technical (?:factors?|information|details|parameters|description|quality)|number of views|radiation dose",
    "comparison": r"(?:prior|previous) (?:(?:imaging )?procedures?(?: descriptions?)?|findings?)"
    rf"|(?:comparison|prior|previous|reference|correlative) (?:{_EXAM}|{_IMAGING}|dates?)"
    rf"|(?:prior|previous|old)(?: chest| relevant)? (?:{_EXAM}|{_IMAGING})|relevant (?:prior|previous)s?(?: (?:{_EXAM}|{_IMAGING}))?"
    r"|comparisons?(?: (?:is |made )*(?:to|with))?",
    "findings": rf"(?:(?:{_IMAGING}|chest|thora(?:x|cic)|radiographic|radiolog(?:ical|y)|reference|positive|procedure|detailed) )?findings?"
    r"|(?:radiology )?study observations?|(?:report (?:text|body)|body of (?:the )?report)",
    "impression": r"(?:(?:final|preliminary|overall|diagnostic|general|radiological|radiographic|radiologist's) )?impressions?"
    r"|(?:final )?conclusions?|summary of findings|final (?:diagnosis|assessment|interpretation|read)"
    r"|(?:radiolog(?:y|ical)|imaging) diagnos[ie]s|(?:impression|assessment) and plan",
    "recommendation": r"(?:(?:follow[- ]?up|management|further) )?recommendations?|recommended (?:follow[- ]?up|action|management)",
    "addendum": r"addend(?:um|a)(?: (?:report|to (?:the )?report|#? ?\d))?|(?:amended|corrected) report",
    "notification": r"notifications?|(?:critical|urgent|unexpected) (?:results?|findings?|values?)(?: (?:communication|notification))?"
    r"|(?:notification|communication) of (?:(?:critical|urgent) )?(?:results?|findings?)"
    r"|(?:electronically )?signed(?: by)?|(?:dictated|transcribed|reported|read|reviewed|interpreted|approved|verified) by"
    r"|(?:attending|reading|interpreting|referring|ordering) (?:physician|radiologist|provider)|report status",
    "other": r"(?:final|preliminary) report|(?:preliminary|wet) ?read",
}
_WEAK: dict[SectionName, str] = {  # words of running text too: believed at fewer places
    "exam": rf"{_EXAM}",
    "indication": r"(?:clinical|request|histor(?:y|ies)|hx|reasons?)",
    "technique": r"(?:protocol|methods?|contrast|views?|projections?)",
    "comparison": r"(?:priors?|compared (?:to|with))",
    "findings": r"(?:results?|observations?|description|discussion|narrative|report)",
    "impression": r"(?:opinion|summary|assessment|interpretation|imp)",
    "recommendation": r"(?:follow[- ]?up|advice|suggestions?)",
    "notification": r"(?:communication|radiologist|attending)",
}
_NAMED: tuple[tuple[SectionName, str], ...] = (*_STRONG.items(), *_WEAK.items())
_ANY = "|".join(pattern for _, pattern in _NAMED)
_JOIN = r"(?:[ \t]*[/&+,][ \t]*(?:and[ \t]+)?|[ \t]+and[ \t]+)"
_WORD = re.compile(r"[a-z]+")
_OPENING_WORDS = frozenset(
    _WORD.findall(
        """
    acquisition addenda addendum admission admitting advice amended approved assessment attending body brief chest chief clinical
    communication compared comparison comparisons conclusion conclusions contrast corrected correlative critical ct cta cxr cxrs
    date dates description detailed diagnostic dictated discussion electronically exam examination examinations exams film films
    final finding findings follow followup further general histories history hx image images imaging imp impression impressions
    indication indications interpretation interpreted interpreting management medical method methods mr mri narrative notification
    notifications number observation observations old opinion ordering overall past patient pertinent positive pre preliminary
    preoperative presenting previous prior priors procedure procedures projection projections protocol provisional radiation
    radiograph radiographic radiographs radiological radiologist radiology read reading reason reasons recommendation
    recommendations recommended reference referral referring relevant report reported reports request result results reviewed scan
    scanning scans signed signs studies study suggestion suggestions summary technical technique techniques thoracic thorax
    transcribed type types unexpected urgent verified view views wet wetread working x xray xrays
        """
    )
)
"""Words that a heading can begin with: where they stand the names are tried, which is much faster than trying them everywhere."""
_HEADING = re.compile(rf"(?:{_ANY})(?:\(s\))?(?![^\W_]|['-])(?:{_JOIN}(?:{_ANY})(?:\(s\))?(?![^\W_]|['-])){{0,4}}")
"""Names of sections in small letters, one or several joined; tried on the text in small letters."""
_EACH = re.compile("|".join(f"(?P<n{i}>{pattern})(?:\\(s\\))?(?![^\\W_]|['-])" for i, (_, pattern) in enumerate(_NAMED)))
_MARKS = r"(?:\*{1,3}|__?(?!_))?"
_LINE_OPENS = re.compile(r"(?:[ \t>#*=•-]|__?(?!_))*(?:\(?(?:(?P<n>\d{1,2})|[ivxIVX]{1,4}|[A-Ha-h])[.)])?[ \t]*" + _MARKS)
_NUMBERED = re.compile(r"(?:(?<=\s)|(?<=\A))\(?(?P<n>\d{1,2})[.)][ \t]*" + _MARKS + r"\Z")
_END = re.compile(
    rf"(?:[ \t]*\([^()\n]{{1,40}}\))?{_MARKS}[ \t]*"
    rf"(?:(?P<colon>:{_MARKS}|[ \t][-–—]+(?=[ \t]))|(?P<alone>(?=[ \t]*(?:[\r\n]|\Z)))|(?P<bare>(?=[ \t])|\.(?=[ \t])))"
)
_IN_TWO_DRESSES = re.compile(r"[a-z]+ [a-z ]*[A-Z]|[A-Z][a-z]+ (?:[A-Za-z][a-z]* )*[A-Z]{4}")
"""The end of a sentence and the heading after it: "2 weeks prior FINDINGS:"."""
_REMOVED = r"X{2,}|_{2,}|\[\*\*|<"
_NEXT_OPENS = re.compile(rf"\s*(?:[A-Z0-9(]|{_REMOVED}|\[)")
_NEXT_IS_A_WORD = re.compile(r"\s*(?:[A-Z][a-z]|[A-Z] [a-z]|\d)")
_NEXT_FLOWS = re.compile(
    r"\s*(?:is|are|was|were|be|has|have|had|may|might|can|could|should|would|suggest\w*|consistent|compatible|concerning|likely|which|that|not"
    r"|of|in|on|to|at|as|by|or|and|with|from|for)\b"
)
_AMID_CAPITALS = re.compile(r"\s*(?:X{2,}[\s,.]+)*(?!XX)[A-Z][A-Z'-]+[\s,]+(?!XX)[A-Z][A-Z'-]+")
_LAST_WORD = re.compile(r"([A-Za-z']+)\W*\Z")
_LEANING = frozenset(
    _WORD.findall(
        """
    no not the a an this these that those of with in on for from to by as at and or any his her its their our other are is was were be been
    see per if
        """
    )
)
"""Words that the next one belongs to: what follows them is no heading."""
_LEANING_SMALL = _LEANING | frozenset(
    _WORD.findall(
        "following same such new old significant acute additional prior previous above below main only more most further clinical"
    )
)
"""Such words before one in small letters."""
_LABEL = re.compile(r"(?:^[ \t]*|[.?!][ \t]+)(?P<words>[A-Z][A-Za-z0-9 ,()/&'-]{1,60}?)[ \t]*:", re.MULTILINE)
_LABEL_SAYS: tuple[tuple[SectionName, re.Pattern[str]], ...] = (
    ("comparison", re.compile(r"\b(?:comparisons?|previous|priors?)\b", re.IGNORECASE)),
    (
        "indication",
        re.compile(
            r"\b(?:reasons?|indications?|history|clinical|presentation|request(?:ed)?|provided|symptoms|diagnos[ie]s|dx)\b", re.IGNORECASE
        ),
    ),
    ("technique", re.compile(r"\b(?:techniques?|protocol)\b", re.IGNORECASE)),
    ("findings", re.compile(r"\b(?:findings?|observations?)\b", re.IGNORECASE)),
    ("impression", re.compile(r"\b(?:impressions?|conclusions?|summary)\b", re.IGNORECASE)),
    ("impression", re.compile(r"\bdiagnos[ie]s\b", re.IGNORECASE)),
    ("findings", re.compile(r"\bviews? of the chest\b", re.IGNORECASE)),
    ("findings", re.compile(r"\b(?:VIEWS?|PORTABLE|RADIOGRAPHS?|FILMS?|FRONTAL|LATERAL|X-?RAYS?|PA|AP)\b")),
)
_IS_A_SENTENCE = re.compile(r"\b(?:is|are|was|were|be|been|has|have|had|no|not|there|it|we|without)\b", re.IGNORECASE)
_SPELLED: dict[str, SectionName] = {
    "findings": "findings",
    "impression": "impression",
    "indication": "indication",
    "comparison": "comparison",
    "comparisons": "comparison",
    "technique": "technique",
    "examination": "exam",
    "recommendation": "recommendation",
    "recommendations": "recommendation",
}
_NEXT_NUMBER = re.compile(r"\n[ \t]*\(?(?:[2-9]|1\d)[.)]\s")
_BLANK_LINE = re.compile(r"\n[ \t]*\r?\n")
_SHORT: frozenset[SectionName] = frozenset({"exam", "indication", "technique", "comparison"})
_FIRST: tuple[SectionName, ...] = ("findings", "impression")
_ORDER: dict[SectionName, int] = {"findings": 1, "impression": 2, "recommendation": 3, "notification": 3}
"""Where a section stands in a report; the others come first."""
_ANYWHERE: frozenset[SectionName] = frozenset({"addendum", "other"})

_Place = Literal["line", "stop", "word"]
_Case = Literal["capitals", "title", "small"]
_Ending = Literal["colon", "alone", "bare"]


@dataclass(frozen=True)
class SectionSpan:
    """``text[start:body]`` is the heading (empty where none), ``text[body:end]`` what belongs to it. The spans of a report tile it."""

    name: SectionName
    start: int
    body: int
    end: int


@dataclass(frozen=True)
class Sections:
    """The text of each section, stripped at its ends, "" where absent; a section that comes twice is joined by a blank line.

    A merged heading counts as findings if it names them, else as impression, else as the first that it names. An addendum is apart: it may
    correct the report, so that neither its text nor what it corrects can be taken without looking at both. So is a recommendation: what it
    names ("CT to exclude embolism") is not seen. ``notification`` is who was told and who signed.
    """

    exam: str = ""
    indication: str = ""
    technique: str = ""
    comparison: str = ""
    findings: str = ""
    impression: str = ""
    recommendation: str = ""
    addendum: str = ""
    notification: str = ""
    other: str = ""  # before the first heading, under a heading that is none of these, or headless after a short section
    last_paragraph: str = ""  # the part of other that is headless after a short section

    @property
    def body(self) -> str:
        """What describes the image: findings, or the headless paragraph in their place, and impression; with none of them, ``other``."""
        return "\n\n".join(part for part in (self.findings or self.last_paragraph, self.impression) if part) or self.other


class _Candidate(NamedTuple):
    """A place that may hold a heading, and what speaks for it."""

    start: int  # number included
    word_at: int  # number excluded
    body: int
    names: tuple[SectionName, ...]
    strong: bool
    place: _Place
    case: _Case
    ending: _Ending
    number: int | None  # before it
    leans: bool  # on the word before it, in the same sentence
    runs_on: bool  # the line before it does not end a sentence
    flows: bool  # what follows goes on with the sentence: "are stable"
    opens: bool  # what follows begins like a sentence: a capital, a figure, a removed word
    word: bool  # ... and is a word in small letters after its capital
    amid: bool  # what follows is in capitals

    @property
    def name(self) -> SectionName:
        """The section that the heading counts as."""
        return next((name for name in _FIRST if name in self.names), self.names[0])


def section_spans(text: str) -> tuple[SectionSpan, ...]:
    """Where each section of a report is.

    Indication, technique, comparison and exam end at a blank line: what follows without a heading is ``other`` (many reports put their
    findings there). A recommendation within an item of a list ends with the item.
    """
    found: list[SectionSpan] = []
    headings = _headings(text)
    name: SectionName
    for (start, body, name), (end, *_) in zip([(0, 0, "other"), *headings], [*headings, (len(text), len(text), "other")], strict=True):
        content = body + len(text[body:end]) - len(text[body:end].lstrip())
        blank = _BLANK_LINE.search(text, content, end) if name in _SHORT else None
        item = _NEXT_NUMBER.search(text, body, end) if name == "recommendation" and found and start and text[start - 1] != "\n" else None
        if blank is not None:
            found += [SectionSpan(name, start, body, blank.start()), SectionSpan("other", blank.start(), blank.start(), end)]
        elif item is not None:
            found += [SectionSpan(name, start, body, item.start()), SectionSpan(found[-1].name, item.start(), item.start(), end)]
        elif start < end:
            found.append(SectionSpan(name, start, body, end))
    return tuple(found)


def split_sections(report: str) -> Sections:
    """Split a report; never raises, whatever the text."""
    parts: dict[str, list[str]] = {}
    before: SectionName | None = None
    for span in section_spans(report):
        if part := report[span.body : span.end].strip():
            parts.setdefault(span.name, []).append(part)
            if span.name == "other" and span.start == span.body and before in _SHORT:
                parts.setdefault("last_paragraph", []).append(part)
        before = span.name
    return Sections(**{name: "\n\n".join(texts) for name, texts in parts.items()})


def _headings(text: str) -> list[tuple[int, int, SectionName]]:
    """(start, start of the body, section) of each heading in order."""
    candidates = list(_candidates(text))
    taken = [c for c in candidates if _is_sure(c)]
    if 0 < len(taken) < len(candidates):
        taken = _with_those_that_fill_a_gap(candidates, taken)
    known = [(start, c.body, c.name) for start, c in zip(_numbered_starts(taken), taken, strict=True)]
    return _with_odd_labels(text, known) if ":" in text else known


def _is_sure(c: _Candidate) -> bool:
    """Whether a candidate is a heading whatever else the report holds."""
    if c.ending == "alone":
        return c.place == "line" and not c.flows and (c.case != "small" or not c.runs_on)
    if c.ending == "colon" and c.case == "small":
        return (c.place == "line" and not c.leans and (c.strong or not c.runs_on)) or (c.place == "stop" and c.strong)
    if c.ending == "colon":
        return c.place == "line" or (not c.leans and (c.strong or c.case == "capitals"))
    if c.leans and c.place == "word":
        return False
    if c.case == "capitals":
        return c.opens and not c.amid and (c.strong or c.place == "line")
    return c.case == "title" and c.place != "word" and c.strong and c.word


def _fits(c: _Candidate, styles: set[tuple[_Case, _Ending]]) -> bool:
    """Whether a candidate can be a heading in a report that has others, in these styles, if it is the only sign of its section."""
    styled = (c.case, c.ending) in styles
    if (c.ending == "bare" and c.flows) or (not c.strong and c.name in ("recommendation", "notification")):
        return False
    if c.ending == "colon":
        return c.strong and c.place == "line" if c.leans else c.strong or c.case != "small"
    if not c.strong:
        return c.place == "line" and c.case != "small" and c.opens and (styled or not c.runs_on)
    if c.case == "capitals":
        return not c.leans and (styled or not c.amid)
    return c.case == "title" and not c.leans and (c.opens or ((styled or c.place != "word") and _ORDER.get(c.name, 0) < 3))


def _with_those_that_fill_a_gap(candidates: list[_Candidate], taken: list[_Candidate]) -> list[_Candidate]:
    """With the candidates that are the only sign of their section and stand where it belongs: "cough findings: The heart ..."."""
    styles = {(c.case, c.ending) for c in taken}
    known = {c.start: c for c in taken}
    names = {name for c in taken for name in c.names}
    for c in candidates:
        if c.start in known or names.intersection(c.names) or not _fits(c, styles):
            continue
        if _is_free(c.name, c.start, [(k.start, k.body, k.name) for k in known.values()]):
            known[c.start] = c
            names.update(c.names)
    return [known[start] for start in sorted(known)]


def _candidates(text: str) -> Iterator[_Candidate]:
    small = text.lower()
    if len(small) != len(text):  # a few letters have two small ones
        small = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    reached = 0
    for word in _WORD.finditer(small):
        start = word.start()
        if word[0] not in _OPENING_WORDS or start < reached or (start and (small[start - 1].isalnum() or small[start - 1] in "'-/")):
            continue
        match = _HEADING.match(small, start)
        if match is None or _IN_TWO_DRESSES.match(text, start, match.end()):
            continue
        end = match.end()
        ending = _END.match(text, end)
        if ending is not None and ending["bare"] is not None and match[0].startswith("comparison "):  # "COMPARISON CT of the chest"
            ending = _END.match(text, start + len("comparison"))
        if ending is not None:
            reached = end if ending["bare"] is None or text[start].isupper() else word.end()
            yield from _candidate(text, match, ending)


def _candidate(text: str, match: re.Match[str], ending: re.Match[str]) -> Iterator[_Candidate]:
    """The candidate at a name of sections, unless it stands where no heading can."""
    start = match.start()
    line = max(text.rfind("\n", 0, start), text.rfind("\r", 0, start)) + 1
    at_line = _LINE_OPENS.fullmatch(text, line, start)
    number, before = None, text[max(0, start - 24) : start]
    word_at = line if at_line else start
    if at_line:
        number = int(at_line["n"]) if at_line["n"] else None
        start, before = line, text[max(0, line - 24) : line]
    elif numbered := _NUMBERED.search(before):
        number, start, before = int(numbered["n"]), start - len(before) + numbered.start(), before[: numbered.start()]
    else:
        marks = len(before) - len(re.sub(r"(?:\*{1,3}|(?<!_)__?)\Z", "", before))
        start, before = start - marks, before[: len(before) - marks]
    if not at_line and not before[-1:].isspace():
        return
    blank = at_line is not None and (not before.strip() or _BLANK_LINE.search(before[len(before.rstrip()) :]) is not None)
    before = before.rstrip()
    stopped = blank or not before or before[-1] in '.?!;:)]"_' or before.endswith("XX")
    words = text[match.start() : ending.start()]
    names, strong = _names(match[0])
    last = _LAST_WORD.search(before)
    end = ending.end()
    yield _Candidate(
        start=start,
        word_at=word_at,
        body=end,
        names=names,
        strong=strong,
        place="line" if at_line else "stop" if stopped else "word",
        case="capitals" if words.isupper() else "title" if words[0].isupper() else "small",
        ending="colon" if ending["colon"] is not None else "alone" if ending["alone"] is not None else "bare",
        number=number,
        leans=not stopped and last is not None and _leans(last[1], words),
        runs_on=not stopped,
        flows=_NEXT_FLOWS.match(text, end) is not None,
        opens=_NEXT_OPENS.match(text, end) is not None,
        word=_NEXT_IS_A_WORD.match(text, end) is not None,
        amid=_AMID_CAPITALS.match(text, end) is not None,
    )


def _leans(before: str, words: str) -> bool:
    """Whether words belong to the one before; those in capitals only if that is in capitals too."""
    if words[0].islower():
        return before.lower() in _LEANING_SMALL
    return before.lower() in _LEANING and not (words.isupper() and before.islower())


def _names(heading: str) -> tuple[tuple[SectionName, ...], bool]:
    """The sections that a heading in small letters names, and whether one of the words is hardly ever running text."""
    places = [int(match.lastgroup[1:]) for match in _EACH.finditer(heading) if match.lastgroup]
    return tuple(_NAMED[place][0] for place in places), len(places) > 1 or places[0] < len(_STRONG)


def _numbered_starts(headings: list[_Candidate]) -> list[int]:
    """Where headings start: a number within a sentence is the heading's if it counts them, else the sentence's ("at level 7 Findings:")."""
    starts, last = [], 0
    for place, heading in enumerate(headings, 1):
        counts = heading.number is None or heading.place != "word" or heading.number in (1, place, last + 1)
        starts.append(heading.start if counts else heading.word_at)
        last = heading.number or last
    return starts


def _with_odd_labels(text: str, known: list[tuple[int, int, SectionName]]) -> list[tuple[int, int, SectionName]]:
    """With labels before a colon, at the start of a line or a sentence, that are misspelt or hold a telling word in a name of their own.

    "IMPRSSION:" in capitals is believed; "Reference findings:" or "PA AND LATERAL CHEST:", under which stand the findings, are if their
    section has no other heading and they stand where it belongs.
    """
    taken = {start for start, *_ in known}
    bodies = {body for _, body, _ in known}
    found = list(known)
    for match in _LABEL.finditer(text):
        start = match.start("words") if match.start() < match.start("words") and text[match.start()] in ".?!" else match.start()
        words = match["words"]
        if start in taken or match.end() in bodies:
            continue
        close = difflib.get_close_matches(words.lower(), _SPELLED, n=1, cutoff=0.82) if words.isalpha() and words.isupper() else []
        if close:
            found.append((start, match.end(), _SPELLED[close[0]]))
            continue
        if words.count(" ") > 7 or not (found or words.isupper()) or _IS_A_SENTENCE.search(words):
            continue
        named = (name for name, says in _LABEL_SAYS if says.search(words))
        if (name := next((name for name in named if _is_free(name, start, found)), None)) is not None:
            found.append((start, match.end(), name))
    return sorted(found)


def _is_free(name: SectionName, start: int, found: list[tuple[int, int, SectionName]]) -> bool:
    """Whether a section has no heading yet, and one at ``start`` would stand in the order of sections."""
    order = _ORDER.get(name, 0)
    return all(
        n != name and (n in _ANYWHERE or (_ORDER.get(n, 0) <= order if at < start else _ORDER.get(n, 0) >= order)) for at, _, n in found
    )
