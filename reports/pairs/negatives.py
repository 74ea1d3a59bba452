"""Hard negatives by rule: a sentence of a report changed in one point so that it is false of its study.

A text is given out only if the facts of the study make it false, by what they say and not by their silence (:mod:`reports.pairs.truth`).
Sentences that the rules cannot change into natural English are left alone: better few than wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from medvl.types import Configurable, Severity
from reports.facts.ontology import Ontology
from reports.facts.statements import Statement
from reports.pairs.laterality import swap_left_and_right
from reports.pairs.truth import FALSE, TRUE, UNKNOWN, Claim, claims_of, swap_sides, truth
from reports.placeholders import PLACEHOLDER

Rule = Literal["negation", "side", "severity", "finding", "location"]
RULES: tuple[Rule, ...] = get_args(Rule)

_SEEN = r"present|seen|noted|identified|demonstrated|visuali[sz]ed|visible|evident|appreciated|detected|observed|found"
_NORMAL = r"(?:completely |grossly |otherwise |clearly )?(?:normal|clear|unremarkable|within normal limits|intact|sharp|well[- ]expanded)"
_NEGATIVE_WORD = re.compile(
    r"\b(?:no|not|without|negative|absen\w+|free|neither|nor|never|un\w+able|resolved|cleared|den\w+)\b", re.IGNORECASE
)
_HEDGE = re.compile(
    r"\b(?:may|might|could|can|possibl\w+|probabl\w+|likely|suspect\w+|question\w+|suggest\w+|concern\w+|versus|vs|cannot|borderline|"
    r"consistent|compatible|represent\w*|if|differential|exclude\w*|rule|evaluat\w+|recommend\w*|correlat\w+|follow)\b",
    re.IGNORECASE,
)
_COMPARING = re.compile(
    r"\b(?:again|stable|unchanged|interval\w*|prior|previous\w*|since|now|still|remain\w*|persist\w*|new|increas\w+|decreas\w+|improv\w+|"
    r"wors\w+|chang\w+|grossly|otherwise)\b",
    re.IGNORECASE,
)
_CLAUSES = re.compile(
    r"[,;:()]|\b(?:but|although|though|which|that|while|however|except|other than|due to|secondary|because)\b", re.IGNORECASE
)
_SEVERAL = re.compile(_CLAUSES.pattern + r"|\b(?:and|or)\b|/", re.IGNORECASE)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|shows?|appears?|remains?|demonstrates?|reveals?|measur\w+|seen|noted|lies?|projects?|extends?|"
    r"obscures?|involves?|reflects?|indicates?|terminates?|courses?|passes?|overl\w+|blunt\w+|see)\b",
    re.IGNORECASE,
)
_NO_PLACE = re.compile(
    r"\b(?:lordotic|predominan\w+|in keeping|reflect\w*|indicat\w+|due to|secondary|sparing|spared|greater than|"
    r"(?:to|and|or|mid)[ -](?:the )?(?:upper|lower|middle|apical|bas\w+)|"
    r"(?:lobes?|zones?|apex|apices|bases?|apical|basilar) (?:and|or|to)\b|cardiac apex|heart)",
    re.IGNORECASE,
)
"""Where a word for a zone of the lungs is none, one of several, or that of a sign of something elsewhere."""
_UNDENIABLE = re.compile(
    r"\d|\bas\b|\b(?:greater|less|more) than\b|\bpatient\b|\bviews?\b|\blimited\b|\bstatus\b|\bs/p\b|\bpost\b",
    re.IGNORECASE,
)
"""What makes the negation of a sentence odd: numbers, comparisons, what is no finding."""
_FAR: Mapping[Severity, tuple[Severity, ...]] = {"mild": ("severe",), "severe": ("mild",), "moderate": ("mild", "severe")}
_ARTICLE = r"(?:a few|an?|the|some|several|multiple|few|scattered)"


@dataclass(frozen=True)
class Negative:
    """A text that is false of the study it was made for, and what it states: ``claims``, or if ``negated`` that not all of them hold."""

    text: str
    rule: Rule
    claims: tuple[Claim, ...]
    negated: bool = False

    def truth_from(self, value: int) -> int:
        """Truth of the text, of that of its claims."""
        return -value if self.negated else value


@dataclass(frozen=True)
class Noun:
    """How a finding is named where it can be replaced."""

    group: str
    count: bool
    measure: str
    names: tuple[str, ...]
    plural: tuple[str, ...] = ()
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Words:
    """The parsed ``negatives.yaml``."""

    version: str
    degrees: Mapping[str, tuple[str, Severity]]  # word -> (kind of word, degree)
    degree_words: Mapping[tuple[str, str], str]  # (kind of word, degree) -> word
    places: Mapping[str, tuple[str, Mapping[str, str]]]  # word -> (place, {word in its stead: place})
    nouns: Mapping[str, Noun]
    plain: frozenset[str]  # what may stand around a noun that is replaced

    @cached_property
    def degree(self) -> re.Pattern[str]:
        """Any word of ``degrees``."""
        return _any_of(self.degrees)

    @cached_property
    def place(self) -> re.Pattern[str]:
        """Any word of ``places``."""
        return _any_of(self.places)


@cache
def load_words(path: Path | None = None) -> Words:
    """Read a file like ``negatives.yaml``, which is taken without ``path``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML or not the format.
    """
    path = path or Path(__file__).with_name("negatives.yaml")
    if not path.is_file():
        raise FileNotFoundError(f"no file of words {path}; omit it to use the built-in words, or copy reports/pairs/negatives.yaml")
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        kinds = content["degrees"].items()
        degrees = {w: (kind.removeprefix("plain "), d) for kind, by in kinds for d, words in by.items() for w in words}
        return Words(
            version=str(content["version"]),
            degrees=degrees,
            degree_words={(kind, d): words[0] for kind, by in content["degrees"].items() for d, words in by.items()},
            places={word: (place, others) for word, others, place in content["places"]},
            nouns={
                finding: Noun(n["group"], n["count"], n["measure"], tuple(n["names"]), tuple(n.get("plural", ())), tuple(n.get("near", ())))
                for finding, n in content["nouns"].items()
            },
            plain=frozenset(content["plain"].split()),
        )
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        raise ValueError(
            f"{path}: expected version, degrees, places, nouns and plain as in reports/pairs/negatives.yaml ({kind})"
        ) from error


def hard_negatives(
    text: str,
    statements: Sequence[Statement],
    study: Sequence[Claim],
    ontology: Ontology,
    rules: Sequence[Rule] = RULES,
    words: Words | None = None,
) -> tuple[Negative, ...]:
    """Every negative that the rules make of one sentence, each false of the study.

    Args:
        text: one sentence that is true of the study.
        statements: of the sentence, spans within ``text``.
        study: everything that the study's report states, see :func:`reports.pairs.truth.with_disputes`.
        ontology: which finding is a kind of which.
        rules: which to use.
        words: see :func:`load_words`.
    """
    claims = claims_of(text, statements, ontology)
    if not claims or _HEDGE.search(text) or any(c.state == "uncertain" for c in claims):
        return ()
    words = words or load_words()
    makers = {"negation": _negations, "side": _sides, "severity": _severities, "finding": _findings, "location": _locations}
    made = [n for rule in rules for n in makers[rule](text, statements, claims, words)]
    return tuple(n for n in dict.fromkeys(made) if n.text != text and _truth(n, study, ontology) == FALSE)


def _truth(negative: Negative, study: Sequence[Claim], ontology: Ontology) -> int:
    """Of a negation the truth of the sentence that it denies, for it must be stated; of others that of what they claim.

    Where one of several claims is true the text is not counted as false: the others may be other words for the same.
    """
    values = [truth(claim, study, ontology) for claim in negative.claims]
    if not negative.negated and TRUE in values:
        return UNKNOWN
    return negative.truth_from(min(values))


def _sides(text: str, statements: Sequence[Statement], claims: tuple[Claim, ...], words: Words) -> Iterator[Negative]:
    """Left and right exchanged, where every finding that has a side is present on one."""
    if any(c.state != "present" or c.side not in ("left", "right") for c in claims):
        return
    swapped = swap_left_and_right(text)
    if swapped is not None:
        yield Negative(swapped, "side", swap_sides(claims))


def _severities(text: str, statements: Sequence[Statement], claims: tuple[Claim, ...], words: Words) -> Iterator[Negative]:
    """Another degree in the place of the only one."""
    graded = [c for c in claims if c.severity is not None]
    found = list(words.degree.finditer(text))
    if len(graded) != 1 or len(found) != 1 or any(c.state != "present" for c in claims):
        return
    match, claim = found[0], graded[0]
    kind, degree = words.degrees[match[0].lower()]
    if degree != claim.severity or re.match(r"\s*(?:to|-to-)\b", text[match.end() :]):
        return
    noun = words.nouns.get(claim.finding)
    if kind == "adjective":
        kind = noun.measure if noun is not None else "plain adjective"
    for other in _FAR[degree]:
        changed = _put(text, match.start(), match.end(), words.degree_words[kind, other])
        yield Negative(changed, "severity", tuple(replace(c, severity=other) if c == claim else c for c in claims))


def _locations(text: str, statements: Sequence[Statement], claims: tuple[Claim, ...], words: Words) -> Iterator[Negative]:
    """Another place in the stead of the only one that is a zone of the lungs."""
    found = list(words.place.finditer(text))
    if len(found) != 1 or any(c.state != "present" for c in claims) or _NO_PLACE.search(text):
        return
    place, others = words.places[found[0][0].lower()]
    if any(c.places != {place} for c in claims):
        return
    for word, other in others.items():
        changed = _put(text, found[0].start(), found[0].end(), word)
        yield Negative(changed, "location", tuple(replace(c, places=frozenset({other})) for c in claims))


def _findings(text: str, statements: Sequence[Statement], claims: tuple[Claim, ...], words: Words) -> Iterator[Negative]:
    """Another finding, which the study denies, in the place of the only one."""
    spans = {(s.start, s.end) for s in statements}
    if len(spans) != 1 or len(claims) != 1 or claims[0].state != "present" or claims[0].change is not None or claims[0].kind is not None:
        return
    claim, noun = claims[0], words.nouns.get(claims[0].finding)
    if noun is None:
        return
    forms = [(name, "names") for name in noun.names] + [(name, "plural") for name in noun.plural]
    at = next(((m, number) for name, number in sorted(forms, key=lambda f: -len(f[0])) if (m := _once(name, text))), None)
    if at is None:
        return
    match, number = at
    around = text[: match.start()] + text[match.end() :]
    if not all(word in words.plain or word in words.degrees for word in re.findall(r"[\w-]+", around.lower())):
        return
    measured = words.degree.search(text) is not None
    for other, theirs in words.nouns.items():
        fits = other not in (claim.finding, *noun.near) and (theirs.group, theirs.count) == (noun.group, noun.count)
        forms_there = theirs.names if number == "names" else theirs.plural
        if fits and forms_there and (not measured or theirs.measure == noun.measure):
            changed = _put(text, match.start(), match.end(), forms_there[0])
            yield Negative(changed, "finding", (replace(claim, finding=other),))


def _negations(text: str, statements: Sequence[Statement], claims: tuple[Claim, ...], words: Words) -> Iterator[Negative]:
    """A presence denied, or a denial turned into a presence."""
    states = {c.state for c in claims}
    if len(states) != 1 or _COMPARING.search(text) or _UNDENIABLE.search(text) or PLACEHOLDER.search(text):
        return
    if states == {"present"}:
        if len({(s.start, s.end) for s in statements}) == 1 and not (_NEGATIVE_WORD.search(text) or _SEVERAL.search(text)):
            changed = _denied(text, words)
            if changed is not None:
                denied = claims if words.degree.search(changed) else tuple(replace(c, severity=None) for c in claims)
                yield Negative(changed, "negation", denied, negated=True)  # "no effusion" denies every degree of it
        return
    normal = re.search(rf"\b(is|are|appears?) (?={_NORMAL}\b)", text, re.IGNORECASE)
    one_verb = len(_VERB.findall(text)) == 1
    if normal and one_verb and not re.search(r"[,;]|\bno\b|\bwithout\b|\bnot\b", text, re.IGNORECASE):
        verb, rest = normal[1].lower(), text[normal.end() :]
        if rest.lower().startswith("unremarkable"):
            yield Negative(f"{text[: normal.end()]}abnormal{rest[12:]}", "negation", claims, negated=True)
            return
        put = {"appear": "do not appear ", "appears": "does not appear "}.get(verb, f"{verb} not ")
        yield Negative(text[: normal.start()] + put + rest, "negation", claims, negated=True)
    elif re.match(r"normal\b", text, re.IGNORECASE) and not re.search(r"[,;]|\band\b", text, re.IGNORECASE):
        yield Negative(_capital("abnormal" + text[6:]), "negation", claims, negated=True)
    elif (changed := _affirmed(text, words)) is not None:
        yield Negative(changed, "negation", tuple(replace(c, state="present") for c in claims))


def _denied(text: str, words: Words) -> str | None:
    """The denial of a sentence that says that one finding is there; None where no pattern fits."""
    degree = words.degree.pattern
    verbs = _VERB.findall(text)
    if m := re.match(rf"(there (?:is|are)) (?:{_ARTICLE} )?(?:{degree} )?(.+)", text, re.IGNORECASE | re.DOTALL):
        return f"{m[1]} no {m[2]}" if len(verbs) == 1 else None
    if m := re.match(rf"(?:{_ARTICLE} )?(?:{degree} )?(.+?) ((?:is|are) (?:{_SEEN})\b.*)", text, re.IGNORECASE | re.DOTALL):
        return None if _VERB.search(m[1]) else f"No {_lower(m[1])} {m[2]}"
    if len(verbs) == 1 and (m := re.search(rf"\b(is|are) (?:{degree} )?(?=[a-z]+ed\b|tortuous\b|large\b|prominent\b)", text)):
        return f"{text[: m.start()]}{m[1]} not {text[m.end() :]}"
    adverb = any(words.degrees[m[0].lower()][0] == "adverb" for m in words.degree.finditer(text))
    if (
        not verbs
        and not adverb
        and len(_wordlike(text)) <= 12
        and not re.match(r"the\b|status|s/p|post|history|old\b|probable", text, re.IGNORECASE)
    ):
        bare = re.sub(rf"\A(?:{_ARTICLE} )?(?:{degree} )?", "", text, count=1, flags=re.IGNORECASE)
        return f"No {_lower(bare)}" if bare else None
    return None


def _affirmed(text: str, words: Words) -> str | None:
    """The presence of what a sentence denies; None where no pattern fits."""
    if len(_NEGATIVE_WORD.findall(text)) != 1 or _CLAUSES.search(text.replace(",", "")) or len(_VERB.findall(text)) > 2:
        return None
    if re.search(r"\bno (?:appreciable|significant)\b", text, re.IGNORECASE):
        return None  # a little of it is not denied
    text = re.sub(r"(?<=\b[Nn]o )(?:visuali[sz]ed|visible|definite|obvious|convincing|radiographic|clear) ", "", text)
    if m := re.match(
        r"(?:there (?:is|are) )?no (evidence|signs?) (?:of|for) (.+)",
        text,
        re.IGNORECASE | re.DOTALL,
    ):
        verb = "are" if m[1].lower() == "signs" else "is"
        return f"There {verb} {m[1].lower()} of {_joined(m[2])}"
    if m := re.match(r"(?:there (?:is|are)) no (.+)", text, re.IGNORECASE | re.DOTALL):
        listed, plural = _joined(m[1]), _is_list(m[1]) or _is_plural(m[1])
        return f"There {'are' if _is_plural(m[1]) else 'is'} {'' if plural else _article(m[1], words)}{_strip_any(listed)}"
    if m := re.match(rf"no (.+?) (is|are) ((?:{_SEEN})\b.*)", text, re.IGNORECASE | re.DOTALL):
        listed = _joined(m[1])
        verb = "are" if _is_list(m[1]) else m[2]
        return _capital(f"{'' if _is_list(m[1]) or m[2] == 'are' else _article(m[1], words)}{_strip_any(listed)} {verb} {m[3]}")
    if m := re.match(r"negative for (.+)", text, re.IGNORECASE | re.DOTALL):
        return f"Positive for {_joined(m[1])}"
    if m := re.search(r"\b(is|are) not (?=[a-z]+ed\b)", text):
        return f"{text[: m.start()]}{m[1]} {text[m.end() :]}"
    if m := re.match(rf"no (.+? (?:{_SEEN})\.?)\s*\Z", text, re.IGNORECASE | re.DOTALL):
        return None if re.search(r"\b(?:is|are|was|were|to)\b", m[1]) else _capital(_strip_any(_joined(m[1])))
    if (m := re.match(r"no ([^.]+?)(\.?)\s*\Z", text, re.IGNORECASE | re.DOTALL)) and not _VERB.search(m[1]):
        if re.search(r"\b(?:to suggest|to indicate|on either side|in either)\b", m[1]) or len(_wordlike(m[1])) > 10:
            return None
        several = _is_list(m[1]) or _is_plural(m[1])
        return _capital(f"{_strip_any(_joined(m[1]))} {'are' if several else 'is'} present{m[2]}")
    return None


def _joined(listed: str) -> str:
    """What was denied one by one, said together: "or" becomes "and"."""
    return re.sub(r"\b(?:and/or|or|nor)\b", "and", listed)


def _strip_any(words: str) -> str:
    return re.sub(r"\bany\s+", "", words)


def _is_list(words: str) -> bool:
    return re.search(r"\b(?:or|nor|and)\b|,|/", words) is not None


def _is_plural(words: str) -> bool:
    head = re.split(r"\b(?:in|of|on|at|within|involving|or|and|is|are)\b|[.,;]", words.strip())[0].strip()
    return re.search(r"(?:[a-z]{2}[^su\W]s|masses|pneumothoraces|opacities|lobes)\Z", head, re.IGNORECASE) is not None


def _article(words: str, table: Words) -> str:
    """The article, with a space behind it, of what is counted, as far as the table of nouns knows."""
    head = re.split(r"\b(?:in|of|on|at|within|involving)\b|[.,;]", words.strip())[0].strip().lower()
    counted = any(noun.count and any(head.endswith(name) for name in noun.names) for noun in table.nouns.values())
    if not counted:
        return ""
    return "an " if head[:1] in "aeiou" else "a "


def _put(text: str, start: int, end: int, word: str) -> str:
    """``word`` in the stead of a span, in its capitals, and the article before it made to fit."""
    old = text[start:end]
    if old.isupper() and len(old) > 1:
        word = word.upper()
    elif old[:1].isupper():
        word = _capital(word)
    before = text[:start]
    if m := re.search(r"\b([Aa])n? \Z", before):
        before = before[: m.start()] + m[1] + ("n " if word[:1].lower() in "aeiou" else " ")
    return before + word + text[end:]


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{longest})(?![\w-])", re.IGNORECASE)


def _once(name: str, text: str) -> re.Match[str] | None:
    found = list(re.finditer(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text, re.IGNORECASE))
    return found[0] if len(found) == 1 else None


def _wordlike(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower(text: str) -> str:
    """A small letter at the beginning, unless the first word is written in capitals."""
    first = text.split(" ", 1)[0]
    return text if len(first) > 1 and first.isupper() else text[:1].lower() + text[1:]


class HardNegatives(Configurable):
    """How many hard negatives a batch gets, and by which rules.

    Args:
        rules: of ``RULES``; a rule is drawn first, then a text that it makes.
        per_study: for each study of the batch, as far as its drawn sentences allow.
        words: a file like ``reports/pairs/negatives.yaml``; None takes that.
        verify: read each text with the fact source and drop it unless it states what was meant.
    Raises:
        ValueError: an unknown rule, or ``per_study`` below 1.
        FileNotFoundError: no such file of words.
    """

    def __init__(self, rules: list[str] | None = None, per_study: int = 1, words: Path | None = None, verify: bool = True) -> None:
        chosen = RULES if rules is None else tuple(rules)
        if unknown := sorted(set(chosen) - set(RULES)):
            raise ValueError(f"rules names {', '.join(unknown)}; known are {', '.join(RULES)}")
        if per_study < 1 or not chosen:
            raise ValueError(f"per_study is {per_study} and there are {len(chosen)} rules, expected at least 1 of both")
        self.rules: tuple[Rule, ...] = tuple(rule for rule in RULES if rule in chosen)
        self.per_study, self.verify = per_study, verify
        self.words = load_words(None if words is None else Path(words))

    def draw(self, found: Sequence[Negative], rng: np.random.Generator) -> tuple[Negative, ...]:
        """``per_study`` of the negatives of one study, or all if there are fewer: each time a rule that has any left, then one of its."""
        by_rule: dict[str, list[Negative]] = {}
        for negative in found:
            by_rule.setdefault(negative.rule, []).append(negative)
        chosen: list[Negative] = []
        while by_rule and len(chosen) < self.per_study:
            rule = list(by_rule)[int(rng.integers(len(by_rule)))]
            chosen.append(by_rule[rule].pop(int(rng.integers(len(by_rule[rule])))))
            if not by_rule[rule]:
                del by_rule[rule]
        return tuple(chosen)
