"""Sentences of a report: where one ends and the next begins, and which of them to train on.

The rules are for radiology: decimals and units, numbered impressions, "Dr." and "vs.", removed words (XXXX, ___), full stops without a
space after them, line breaks that only wrap, lines that open with a label ("PLEURA: ..."), items that open with a lone quotation mark.
A general splitter gets these wrong, and a wrong split turns a finding into half a sentence.
"""

from __future__ import annotations

import re
from itertools import pairwise

from reports.placeholders import has_words
from reports.sections import split_sections

_NEVER_ENDS = re.compile(r"dr|mr|mrs|ms|prof|st|vs|approx|esp|incl|e\.g|i\.e|cf|figs?|ca|resp|dept|ext|lat|rt|lt|bilat|jr")
"""Abbreviations after which a sentence goes on, whatever follows."""

_ENDS_BEFORE_CAPITAL = re.compile(r"[ckm]?m|k?g|m[gl]|hrs?|min|sec|[ap]\.?m|etc|inc|pts?|post|ant|sup|inf")
"""Units and abbreviations that end a sentence if a capital follows, and not if a small letter does."""

_END = re.compile(r"""(?P<stop>[.?!]+)["'”’)\]]*(?=\s|\Z)|(?P<tight>(?<=[a-z][a-z]|XX)[.;](?=[A-Z](?:[a-z]|\s)))""")
"""A stop before white space, or one without: "bilaterally.There"."""

_PARAGRAPH = re.compile(
    r"\n[ \t]*\r?\n|\n[ \t]*(?=[-*•·–][ \t]|[-•·–][A-Za-z(])|\n[ \t]*(?=\(?\d{1,2}[.)]\s)|\n[ \t]*(?=[A-Z][A-Za-z ,/&()-]{1,40}:(?:\s|\Z))"
)
"""A blank line, or a line break before an item of a list or a label ("LUNGS: ...")."""

_ITEM = re.compile(r"""(?:(?<=\s)|(?<=[.?!)]))(?:["“”](?=\s+[A-Z0-9(])|[•·]+(?=\s*\w))|(?<=[.?!]\s)["“”](?=[A-Z0-9])""")
"""A mark that opens an item within a line: a bullet, or a quotation mark that closes nothing ("... preserved. " Hiatal hernia")."""

_QUOTED_ITEM = re.compile(r"""(?<=\s)["“](?=[A-Z])|(?<=[\w,])["”](?=\s+[A-Z])""")
"""An opening or a closing mark that counts only in a text with such items: a word in quotation marks looks the same."""

_NUMBER = re.compile(r"(?P<opens>\A\s*|(?<=[.?!;:])\s+|(?<=\s))\(?(?P<n>\d{1,2})[.)]+(?:(?=[A-Z])|\s+)")
_SECOND = re.compile(r"\s\(?2[.)]\s*[A-Z]")
_MARKER = re.compile(r"(?:\(?\d{1,2}(?:[.)]+,?\s+|[.)]+(?=[A-Z]))|[-*–]+\s+|[-–]+(?=[A-Za-z(])|[•·]+[?\s]*)+")
_QUOTES = '"“”'
_LETTERED = frozenset({"hepatitis", "vitamin", "type", "grade", "group", "class", "stage", "segment", "level", "protein", "factor", "zone"})
"""Words that a single capital belongs to, so that it is no initial: "hepatitis C. The lungs ..."."""

_BELONGS_TO_THE_LAST = re.compile(r"\W*\Z|\([^()]{0,40}\?\)\W*\Z")
"""A piece that is no sentence of its own: signs only, or a question in brackets ("(cyst?)")."""

_STOPS = re.compile(r"\s*\.{2,}\Z")
_NOT_SPACE = re.compile(r"\S")


def sentence_spans(text: str) -> tuple[tuple[int, int], ...]:
    """(start, end) of each sentence in order, list markers included; between the spans there is white space only."""
    found: list[tuple[int, int]] = []
    start = 0
    for paragraph in [*_PARAGRAPH.finditer(text), None]:
        end = len(text) if paragraph is None else paragraph.start()
        found += [(start + begin, start + stop) for begin, stop in _split_paragraph(text[start:end])]
        start = end if paragraph is None else paragraph.end()
    return tuple(found)


def split_sentences(text: str) -> tuple[str, ...]:
    """Sentences with single spaces, without list markers ("2.", "-", a lone quotation mark), a run of full stops at the end made one.

    Never raises.
    """
    sentences = (_tidy(text[start:end]) for start, end in sentence_spans(text))
    return tuple(sentence for sentence in sentences if sentence)


def has_content(sentence: str) -> bool:
    """Whether a letter is left once the marks of removed words are taken out, and it is no bare label ("Left knee:")."""
    return not sentence.endswith(":") and has_words(sentence)


def report_sentences(report: str | None = None, findings: str | None = None, impression: str | None = None) -> tuple[str, ...]:
    """The sentences of a study to train on: of findings and impression, each once, in order, those without content left out.

    Args:
        report: a whole report; used when findings and impression are both missing or blank. Its indication, comparison, technique and
            exam are left out, for they do not describe the image; a text without headings is taken whole.
        findings: that section, if the table has it apart.
        impression: likewise.
    """
    given = [text for text in (findings, impression) if text and text.strip()]
    if given:
        sections = [split_sections(text) for text in given]
        bodies = [part for s in sections for part in (s.other, s.findings, s.impression)]
    else:
        bodies = [split_sections(report or "").body]
    first: dict[str, str] = {}
    for sentence in (s for body in bodies for s in split_sentences(body)):
        if has_content(sentence):
            first.setdefault(sentence.casefold().rstrip(" .!?"), sentence)
    return tuple(first.values())


def _split_paragraph(text: str) -> list[tuple[int, int]]:
    markers = _list_numbers(text)
    inside = {i for start, end in markers for i in range(start, end)}
    ends = {m.end() for m in _END.finditer(text) if m.start() not in inside and _ends_sentence(text, m)}
    cuts = sorted({0, len(text)} | ends | _items(text) | {start for start, _ in markers})
    found: list[tuple[int, int]] = []
    for start, end in (_strip(text, *cut) for cut in pairwise(cuts)):
        if found and start < end and _BELONGS_TO_THE_LAST.match(text, start, end):
            found[-1] = (found[-1][0], end)
        elif start < end:
            found.append((start, end))
    return found


def _items(text: str) -> set[int]:
    """Where items begin that a bullet or a quotation mark opens."""
    if not any(mark in text for mark in _QUOTES + "•·"):
        return set()
    found = {m.start() for m in _ITEM.finditer(text)}
    if found or text[:1] in ('"', "“"):
        found |= {m.start() if text[m.start() - 1].isspace() else m.end() for m in _QUOTED_ITEM.finditer(text)}
    return found


def _list_numbers(text: str) -> list[tuple[int, int]]:
    """(start, end) of the numbers of a list.

    A number is one of a list if it opens the text or follows a stop; within a line, if it is the next expected, or 1 with a 2 to come.
    So "1. Clear lungs 2. Old fracture" is two items, and "at level 7. Heart normal" holds no list.
    """
    found, last = [], 0
    for match in _NUMBER.finditer(text):
        number, following = int(match["n"]), text[match.end() : match.end() + 1]
        opens = match.start() == 0 or match["opens"] != ""
        begins = number == 1 and following.isupper() and _SECOND.search(text, match.end())
        if (opens and not following.islower()) or (last and number == last + 1 and following.isupper()) or begins:
            found.append((match.start(), match.end()))
            last = number
    return found


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if match["tight"]:
        return True
    begin = match.start()
    while begin > max(0, match.start() - 40) and (text[begin - 1].isalpha() or text[begin - 1] == "."):
        begin -= 1
    before = text[begin : match.start()].lstrip(".").lower()
    following = _NOT_SPACE.search(text, match.end())
    after = following[0] if following else ""
    if not after or match["stop"] != ".":
        return not after.islower()
    if _NEVER_ENDS.fullmatch(before) or (before == "no" and after.isdigit()) or _is_initial(text, begin, match.start()):
        return False
    if after.islower():
        return match.end() - match.start() == 1 and len(before) >= 3 and not _ENDS_BEFORE_CAPITAL.fullmatch(before)
    return True


def _is_initial(text: str, start: int, end: int) -> bool:
    """A single capital such as that of "J. Smith", and not of "hepatitis C"."""
    if end - start != 1 or not text[start].isupper():
        return False
    before = text[max(0, start - 40) : start].split()[-1:]
    return not before or before[0].lower() not in _LETTERED


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _tidy(sentence: str) -> str:
    text = " ".join(sentence.split())
    if marker := _MARKER.match(text):
        text = text[marker.end() :]
    if text[:1] in _QUOTES or text[-1:] in _QUOTES:
        text = _without_stray_quotes(text)
    return _STOPS.sub(".", text).strip()


def _without_stray_quotes(text: str) -> str:
    """Without the quotation marks around the whole, or one at an end that has no other."""
    core = text.strip(_QUOTES + " ")
    return text if sum(c in _QUOTES for c in core) % 2 else core
