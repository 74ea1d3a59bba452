"""Words that de-identification took out of a report: their marks made one, and the sentences that cannot be trusted without them.

Collections mark a removed word in their own ways: ``XXXX`` (Open-i), ``___`` (MIMIC-CXR), ``[**2101-5-6**]`` (MIMIC-III), ``<NAME>``,
``[DATE]``, ``**NAME[AAA]`` (Pittsburgh). Programs take out too much: Open-i's "XXXX pneumothorax" may have been a new one, a small one or
none. A mark is therefore never deleted from a sentence, for "There is XXXX pneumothorax" without it would say more than was written.
"""

from __future__ import annotations

import re

REMOVED = "___"
"""The one mark that :func:`normalize_placeholders` leaves; MIMIC-CXR's, so that its reports stay as they are."""

_KIND = (
    r"(?i:(?:first |last |full )?names?|initials|patient|person|doctor|physician|provider|staff|hospital|institution|organi[sz]ation"
    r"|location|address|city|state|country|zip|dates?|time|year|month|day|age|phone|fax|email|url|id|mrn|ssn|accession(?: number)?|account"
    r"|redacted|removed|deleted|de-?identified|anonymi[sz]ed|masked|phi)"
)
PLACEHOLDER = re.compile(
    r"\[\*\*.{0,200}?\*\*\]"
    r"|\*\*[A-Z][A-Z-]{1,20}\[[^\[\]\n]{0,40}\]|\*\*(?:NAME|PLACE|INSTITUTION|DATE|AGE|PHONE|ID-NUM|ROOM|ZIP-CODE|DEVICE-ID)\b(?![:*])"
    r"|_{2,}"
    r"|\b[Xx]{3,}\b"
    rf"|<(?:{_KIND}|[A-Z]{{2,20}})(?:[ _-]?[A-Z0-9]{{1,10}}){{0,2}}>"
    rf"|\[{_KIND}(?:[ _-]?\d{{1,3}})?\]|\{{\{{?{_KIND}(?:[ _-]?\d{{1,3}})?\}}?\}}"
)
"""The mark of a removed word in any of these ways."""

_RAY = re.compile(r"(?<=\b[Xx]-)[Xx]{3,}\b")
_RUN = re.compile(rf"{re.escape(REMOVED)}(?:[ \t]*[,/-]?[ \t]*{re.escape(REMOVED)})+")
_GOES_ON = (
    r"is|are|was|were|be|been|has|have|had|and|or|but|of|in|on|at|to|for|from|by|with|without|as|than|that|which|who|within|over|overlying"
    r"|projecting|appear\w*|seen|noted|unchanged|stable|normal|intact|unremarkable|clear|demonstrate\w*|show\w*|remain\w*|consistent|compatible"
)
_DOUBTFUL = re.compile(
    r"(?:\A\W*|[,;:]\s+|\b(?:is|are|was|were|be|been|has|have|shows?|showed|demonstrates?|reveals?|seen|identified|noted|and|with|also|again|now"
    r"|represents?|representing|suggests?|suggesting)\s+)"
    rf"(?:{re.escape(REMOVED)}\s+)+(?!(?:{_GOES_ON})\b)(?=[a-z])"
)


def normalize_placeholders(text: str) -> str:
    """The text with every mark of a removed word, or a run of marks ("XXXX, XXXX"), made ``___``; "x-XXXX" becomes "x-ray".

    White space and everything else stays as it is. Done twice it changes nothing more.
    """
    return _RUN.sub(REMOVED, PLACEHOLDER.sub(REMOVED, _RAY.sub("ray", text)))


def has_words(text: str) -> bool:
    """Whether a letter is left once the marks are taken out."""
    return any(c.isalpha() for c in PLACEHOLDER.sub(" ", text))


def is_doubtful(sentence: str) -> bool:
    """Whether a removed word may have decided if what follows is there: "XXXX pneumothorax", "There are XXXX opacities".

    It is so where a word that denies could have stood: at the start of a clause, or after a verb or a joining word, right before words in
    small letters that it belongs to. "No XXXX effusion", "the XXXX are clear" and "lymph XXXX" keep their sense.
    """
    return _DOUBTFUL.search(normalize_placeholders(sentence)) is not None
