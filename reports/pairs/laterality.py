"""Left and right in words: the text of an image flipped left to right, or a refusal where no such text can be written.

A flipped chest is that of a situs inversus: heart, aortic arch, stomach and liver change sides, and reports that do not name them stay
silent on it. Flips are off unless asked for (``flip`` of :class:`medvl.training.data.StudyDataModule`).
"""

from __future__ import annotations

import re

_OTHER = {
    "left": "right",
    "lt": "rt",
    "l": "r",
    "lul": "rul",
    "lll": "rll",
    "luq": "ruq",
    "llq": "rlq",
    "lij": "rij",
    "lue": "rue",
    "lle": "rle",
    "lsc": "rsc",
    "lscv": "rscv",
    "levoscoliosis": "dextroscoliosis",
    "levoscoliotic": "dextroscoliotic",
    "levocurvature": "dextrocurvature",
    "levoconvex": "dextroconvex",
    "levoconvexity": "dextroconvexity",
    "levorotoscoliosis": "dextrorotoscoliosis",
    "levocurve": "dextrocurve",
}
_SWAP = {**_OTHER, **{b: a for a, b in _OTHER.items()}}
_LONG = "|".join(sorted((word for word in _SWAP if len(word) > 1), key=len, reverse=True))
_TURNS = {"levo": "dextro", "dextro": "levo"}
"""Prefixes that are written apart: "levo-scoliosis"."""
_SIDE = re.compile(
    rf"(?<![A-Za-z])(?:(?P<stem>left|right)(?P<ending>wards?|most|[ -]?sided(?:ly)?|-?hand(?:ed)?)?|(?P<word>{_LONG})"
    r"|(?P<turn>dextro|levo)(?=[ -](?:scolio|roto-?scolio|curv|convex))"
    r"|(?P<compared>[LR] ?[/<>=] ?[LR])"  # "L > R"
    r"|(?P<letter>[LR])(?=\)|\.? (?:[a-z]|IJ|PICC|SC\b)|-(?:sided|IJ|PICC|SC|UE|LE)\b))(?![A-Za-z])",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    # chambers, vessels and lobes that have their name from a side and keep it, or exist on one side only
    r"\b(?:left|right|lt|rt)\W+(?:sided\W+)?(?:(?:and|or)\W+(?:left|right)\W+)?(?:heart|ventric\w+|atri\w+|cardiac|main\b|bronch\w+|"
    r"anterior descending|coronary|subclavian artery|common carotid|brachiocephalic|aortic arch|middle lobe|mid lobe|dominant)"
    r"|\b(?:heart|ventricles?|atri\w+)\W+(?:\w+\W+)?(?:left|right)\b"
    r"|\bmiddle lobe|\bRML\b|\blingul\w*|\b(?:minor|horizontal) fissure|\bazygos\b|\b[LR]VH\b|\b[LR]AE\b|\b[LR]V\b|\bLAD\b"
    r"|\b(?:dextro|levo)(?:card\w+|version\w*|position\w*|rotat\w+|phase\w*|transposition)|\bsitus\b|\bhand\w*\W+domina\w+"
    # sides that are no sides of the image
    r"|\b[LR](?:MSB|MB|PA|VOT|CA|AO|PO|HD)\b|\b\d{1,2}[LR]\b"
    r"|\bright (?:now|away|angle)|\ball right\b|\bhas left\b|\bR/O\b",
    re.IGNORECASE,
)
_LEFT_OVER = re.compile(
    # a letter by itself, other than of a vertebra (L1, L-1, L-spine), and abbreviations that may begin with a side
    r"(?<![A-Za-z0-9'])[LR](?![A-Za-z0-9']|-\d|-?spine|-?S\b)|(?<![A-Za-z])(?i:dextro|levo|sinistr|dexter)"
    r"|(?<![A-Za-z0-9-])[LR][B-DF-HJ-NP-TV-Z]{1,3}(?![A-Za-z0-9])"
)
_LETTERS = str.maketrans("LRlr", "RLrl")
_NO_SIDE = frozenset({"LN", "LNS", "LP", "LDCT", "RT", "LT", "LR", "RF", "RR", "RSV", "RX", "LVL", "RBC", "RN", "RPT"})
"""Abbreviations that begin like a side and are none."""


def swap_left_and_right(text: str) -> str | None:
    """The text with sides changed: left and right, RUL and LUL, dextro- and levoscoliosis; capitals as they were.

    None where it cannot be written: the text names what has its name from a side ("left ventricle"), what one side lacks ("right middle
    lobe", "lingula"), a letter R or L, or an abbreviation that begins with one, of unclear meaning. A text without any side comes back
    as it is.
    """
    if _REFUSED.search(text):
        return None
    swapped = _SIDE.sub(_other_side, text)
    left_over = (found[0] for found in _LEFT_OVER.finditer(_SIDE.sub("", text)))
    return None if any(word not in _NO_SIDE for word in left_over) else swapped


def _other_side(match: re.Match[str]) -> str:
    if match["compared"]:
        return match["compared"].translate(_LETTERS)
    word = match["stem"] or match["word"] or match["turn"] or match["letter"]
    return _like(word, (_SWAP | _TURNS)[word.lower()]) + (match["ending"] or "")


def _like(model: str, word: str) -> str:
    """``word`` in the capitals of ``model``."""
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
