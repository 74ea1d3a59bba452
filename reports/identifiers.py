"""De-identification check: where a text likely still names a person, a day, a number, a place or an address of someone.

Rules find what Safe Harbor lists (45 CFR 164.514(b)(2)) in the forms that reports have it: names with a title, a degree, a label or a
common given name; dates finer than a year; record numbers; phones; e-mail, web and IP addresses; streets, post codes and named hospitals;
ages over 89. They know what looks alike in radiology: measurements, vertebral levels, series and image numbers, eponyms. Surnames and towns
that stand alone are not found: a text without a find is not thereby free of identifiers.

presidio-analyzer finds names by a spaCy model and little without one, and the package index has no such model of spaCy's makers. So the
rules are the default, and :class:`PresidioIdentifiers` adds to them for whoever has a model on the machine.

Offsets are characters of the text that was given, end exclusive.
"""

from __future__ import annotations

import abc
import bisect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reports.placeholders import PLACEHOLDER

IdentifierKind = Literal["name", "date", "id", "phone", "email", "address", "age_over_89", "url", "ip"]
KINDS: tuple[IdentifierKind, ...] = get_args(IdentifierKind)

WORDS = Path(__file__).with_name("identifiers.yaml")

_MONTH = (
    r"(?:(?i:january|february|march|april|june|july|august|september|october|november|december)|May|MAY"
    r"|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|JAN|FEB|MAR|APR|JUN|JUL|AUG|SEPT?|OCT|NOV|DEC)\b\.?)"
)
_YEAR = r"(?:1[89]|2[01])\d\d"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_M = r"(?:0?[1-9]|1[0-2])"
_LEFT, _RIGHT = r"(?<![\w.,/-])", r"(?![\w/-]|[.,]\d)"

# A date in figures alone: day and month in either order, a year of four figures, or of two where the rest leaves no doubt.
_DATES = (
    rf"{_LEFT}{_YEAR}(?P<a>[-/.]){_M}(?P=a){_DAY}(?=T\d|{_RIGHT})",
    rf"{_LEFT}(?:{_M}(?P<b>[-/.]){_DAY}|{_DAY}(?P<c>[-/.]){_M})(?:(?<=[-/.\d])[-/.]){_YEAR}{_RIGHT}",
    rf"{_LEFT}(?:{_M}/{_DAY}|{_DAY}/{_M})/\d\d{_RIGHT}",
    rf"{_LEFT}(?:{_M}-{_DAY}|{_DAY}-{_M})-\d\d{_RIGHT}",
    rf"{_LEFT}(?:0[1-9]|[12]\d|3[01])\.(?:0[1-9]|1[0-2])\.\d\d{_RIGHT}",
    rf"{_LEFT}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]){_RIGHT}",
    rf"{_LEFT}{_M}[-/](?:19|20)\d\d{_RIGHT}",
    rf"{_LEFT}(?:0[1-9]|1[0-2])\.(?:19|20)\d\d{_RIGHT}",
    rf"(?i:\b(?:dated|since|on|performed|prior|exam(?:ination)?|radiographs?|study|film|ct|cxr)[ ]+(?:from[ ]+|of[ ]+|on[ ]+)?)"
    rf"(?P<hit>{_M}/{_DAY})(?![\w/%-]|[.,]\d|[ ]*(?i:cm|mm|mg|ml|seconds?|images?|murmur))",
)
_WORDED_DATES = (
    rf"\b{_MONTH}[ ]+{_DAY}(?:st|nd|rd|th)?\b(?!\.\d)(?:,?[ ]+{_YEAR})?",
    rf"\b{_DAY}(?:st|nd|rd|th)?(?:[ ]+of)?[ -]+{_MONTH}(?:,?[ -]+(?:{_YEAR}|\d\d\b))?",
    rf"\b{_MONTH},?[ ]+(?:of[ ]+)?{_YEAR}\b",
    rf"\b(?i:in|since|during|last|early|late|from|until|dated|the)[ ]+(?P<hit>{_MONTH})(?![\w-])",
)

_PHONES = (
    r"(?<![\w.-])(?:\+?1[ .-]?)?\(\d{3}\)[ ]?\d{3}[ .-]?\d{4}\b",
    r"(?<![\w.-])(?:\+?1[ .-])?[2-9]\d{2}(?P<s>[.-])\d{3}(?P=s)\d{4}(?![\w.-]\d)\b",
    r"(?<![\w.-])\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}\d\b",
    r"(?<![\w.,-])[2-9]\d{2}[ ]\d{3}[ ]\d{4}\b",
    r"(?<![\w.,-])0\d{2,4}[ ]\d{3,4}[ ]\d{3,4}\b",
    r"(?i:\b(?:phone|telephone|tel|call(?:ed)?(?:[ ]at)?|pager|paged(?:[ ]at)?|beeper|fax|cell|mobile|ext(?:ension)?)\b)"
    r"[ .:#]*(?:(?i:number|no|at|is)[ .:#]+)?(?P<hit>\d{1,3}[ .-]\d{3,4}(?:[ .-]\d{3,4})?|\d{4,11}(?![\w/]|[.,]\d))",
    r"(?<![\w.])x\d{4,5}(?![\w.]|[ ]*(?:cm|mm))",
    r"(?<![\w.,/-])[2-9]\d{2}-\d{4}(?![\w/-]|[.,]\d|[ ]*(?i:cm|mm|hu))",
)
_NUMBERED = (
    r"(?i:\b(?:mrn?|medical[ ]record|accession|acc(?:ount|t)?|csn|ssn|ss\#|social[ ]security|nhs|npi|dea|id"
    r"|(?:patient|pt|study|exam|visit|encounter|order|hospital|record|member|policy|license|licence|certificate|serial|lot|insurance|case)"
    r"[ ]?(?:id|no|number|num|\#))\b)[ .:#]*(?:(?i:number|no|num|id|is)\b[ .:#]*)?"
)
_IDS = (
    r"\b[0-2](?:\.(?:0|[1-9]\d*)){5,}\b",  # a DICOM UID
    r"\b[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\b",
    r"(?<![\w.-])\d{3}-\d{2}-\d{4}(?![\w-]|\.\d)",
    rf"{_NUMBERED}(?P<hit>(?=[A-Za-z-]{{0,6}}\d)(?=(?:\W?\w){{4}})[A-Za-z0-9]+(?:[ ]\d{{2,}}|-[A-Za-z0-9]+)*)(?![\w/]|[.,]\d)",
    r"(?<![\w.,/+-])\d{7,}(?![\w/]|[.,-]\d|[ ]*(?:cm|mm|ml))",
    r"(?<![\w.-])(?!IMG|SER|LOINC|CPT|ICD)[A-Z]{1,4}-?\d{6,}\b(?!\.\d)",
    r"(?<!\w)\#[ ]?\d{5,}\b",
)
_STREET = (
    r"(?:Street|Avenue|Road|Boulevard|Lane|Drive|Court|Terrace|Circle|Parkway|Highway|Square|Place|Way|Plaza|Trail|Turnpike|Crescent"
    r"|STREET|AVENUE|ROAD|BOULEVARD|LANE|DRIVE|(?:St|Ave?|Rd|Blvd|Ln|Dr|Ct|Pkwy|Hwy|Ter|Cir|Pl|Sq)\b\.?)"
)
_STATE = (
    r"(?:A[KLRSZ]|C[AOT]|D[CE]|F[LM]|G[AU]|HI|I[ADLN]|K[SY]|LA|M[ADEHINOPST]|N[CDEHJMVY]|O[HKR]|P[ARW]|RI|S[CD]|T[NX]|UT|V[AIT]|W[AIVY])"
)
_ADDRESSES = (
    rf"(?<![\w.,/-])\d{{1,5}}[A-Z]?[ ]+(?:(?:[NSEW]\.?|North|South|East|West)[ ]+)?"
    rf"(?:(?P<word>[A-Z][\w'’-]+)[ ]+){{1,3}}{_STREET}(?![\w'’-])",
    rf"\b(?:[A-Z][A-Za-z'’-]*\.?[ ]+){{0,3}}[A-Z][A-Za-z'’-]+,?[ ]+{_STATE}[ ]+\d{{5}}(?:-\d{{4}})?\b",
    r"(?<![\w.,/-])\d{1,5}[ ]+(?:[A-Z][\w'’-]+[ ]+){1,3}(?:Apt|Apartment|Suite|Ste|Unit)\b\.?[ ]*\#?\d+[A-Z]?\b",
    r"(?i:\bp\.?[ ]?o\.?[ ]+box[ ]+\d+)|\b(?:APO|FPO|DPO)[ ]+A[AEP][ ]+\d{5}\b",
    r"(?i:\b(?:zip(?:[ ]code)?|postal[ ]code|postcode)[ :]+)(?P<hit>[A-Z0-9]{3,5}(?:[ -][A-Z0-9]{3,4})?)\b",
    r"\b(?P<place>(?:St\.?[ ]+|[A-Z][a-z'’-]+[ ]+(?:of[ ]+|and[ ]+|&[ ]+)?){1,5})"
    r"(?:Hospital|Medical[ ]Cent(?:er|re)|Health[ ]System|Clinic|Infirmary|Hospice|Nursing[ ]Home)\b",
)
_OLD = r"(?<![\w.,/-])(?:9\d|1[0-3]\d)"
_SMALL = r"one|two|three|four|five|six|seven|eight|nine|ten"
_AGES = (
    rf"{_OLD}[ -]*(?i:(?:years?|yrs?)[ -]*(?:old|of[ ]age)\b|y\.?/?o\b|y\.?o\.(?!\w)|(?:year|yr)s?[ -]+(?:male|female|man|woman|m|f)\b)",
    r"(?i:\b(?:age|aged|age[ ]of|age[ ]is)[ :]+)(?P<hit>(?:9\d|1[0-3]\d))(?![\w%]|[.,]\d)",
    rf"{_OLD}[ ]?(?:M|F|male|female|man|woman)\b(?=[ ]*(?:,|with|w/|s/p|who|presenting|status))",
    rf"(?i:\b(?:ninety|(?:one|a)[ -]hundred)(?:[ -](?:and[ -])?(?:{_SMALL}))?[ -]+years?[ -]+(?:old|of[ ]age)\b)",
    r"(?i:\b(?:nonagenarian|centenarian)\b)",
)
_EMAILS = (r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}",)
_URLS = (
    r"(?i:\bhttps?://[^\s<>\"]+|\bwww\.[a-z0-9-]+\.[^\s<>\"]+)",
    r"(?<![\w@.-])(?:[a-z0-9][a-z0-9-]*\.)+(?:com|org|edu|gov|net)\b(?:/[^\s<>\"]*)?",
)
_ANY_HOSPITAL = frozenset({"Outside", "Local", "Another", "Same", "Community", "Veterans", "Childrens", "University"})
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPS = (
    rf"(?<![\w.])(?<!version[ ]){_OCTET}(?:\.{_OCTET}){{3}}(?![\w]|\.\d)",
    r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![\w:])",
)

_WORD = r"(?!X{2,})(?:[A-Z]['’][A-Z][a-z]+|(?:Mc|Mac|De|La|Le|Di|Van)?[A-Z][a-z]+(?:[-'’][A-Z][a-z]+)*)(?![\w'’-])"
_CAPITALS = r"(?!X{2,})(?:[A-Z]['’])?[A-Z]{2,}(?:[-'’][A-Z]+)*(?![\w'’-])"
_INITIAL = r"[A-Z](?:\.|\b)"
_PARTICLE = r"(?:(?:van|von|der|den|de|da|del|della|di|la|le|al|el|bin|ibn|dos)[ ]+)*"
_FULL = rf"(?:(?:{_INITIAL}[ ]*)+{_PARTICLE}{_WORD}|{_WORD}(?:,?[ ]+(?:{_INITIAL}[ ]+)?{_PARTICLE}{_WORD}){{0,2}})"
_CAPS_FULL = rf"(?:{_CAPITALS}(?:,?[ ]+(?:{_INITIAL}[ ]*)?{_CAPITALS}){{0,2}})"
_DEGREE = (
    r"(?:M\.?D\.?|Ph\.?D\.?|R\.?N\.?|D\.O\.|DO|NP|PA-C|ARNP|CRNP|FACR|FRCR|FRCPC|MBBS|MBChB|B\.?Sc\.?|M\.?Sc\.?|R\.?T\.?\(R\))(?![\w'’])"
)
_TITLE = r"(?:Dr|Drs|Mr|Mrs|Ms|Miss|Prof|Professor|Doctor|Nurse|Sister)\b\.?"
_ROLE = r"(?:(?:the|his|her)[ ])?(?:(?:nurse|doctor|resident|radiologist|physician|wife|husband|son|daughter)[ ])?"
_TOLD = (
    r"(?i:(?:discussed|reviewed|spoke|confirmed|shared)[ ]with|d/w|notified|informed"
    r"|(?:communicated|called|relayed|conveyed|reported|given|telephoned|faxed|paged)[ ]to"
    r"|(?:dictated|transcribed|signed|reviewed|read|interpreted|approved|performed|verified|reported|prepared|authenticated"
    r"|finali[sz]ed|acknowledged|requested|ordered|entered)[ ](?:electronically[ ])?by)"
)
_LABEL = (
    r"(?i:\b(?:patient(?:'s)?(?:[ ]name)?|name|surname|(?:first|last|family|given|maiden)[ ]name"
    r"|(?:referring|ordering|attending|requesting|primary|reading)(?:[ ](?:physician|doctor|provider|radiologist|md))?"
    r"|physician|radiologist|resident|technologist|clinician|dictated|transcribed|signed|reader|transcriptionist|contact|next[ ]of[ ]kin"
    r"|guardian|mother|father|spouse|wife|husband)(?:[ ]by)?[ ]*[:=][ ]*)"
)
_TITLED_NAMES = (
    rf"\b{_TITLE}[ ]*(?P<hit>{_FULL})",
    rf"\bDRS?\.[ ]*(?P<hit>{_CAPS_FULL})",
    rf"\bMRS\.[ ]*(?P<hit>{_CAPS_FULL})",
    r"\b(?:dr|mr|mrs|ms)\.[ ]+(?P<hit>(?!x{2,})[a-z]{3,}(?:-[a-z]+)?)\b",
    rf"\b{_TOLD}:?[ ]+{_ROLE}(?P<hit>{_FULL})",
)
_LABELLED_NAMES = (rf"{_LABEL}(?:{_TITLE}[ ]*)?(?P<hit>{_FULL}|{_CAPS_FULL})",)
_MARKED_NAMES = (
    rf"\b(?P<hit>{_FULL}|{_CAPS_FULL}),[ ]*{_DEGREE}",
    rf"\b(?P<hit>(?:{_INITIAL}[ ]*)*{_WORD}(?:[ ]+{_INITIAL})?[ ]+{_WORD})[ ]+(?:MD|M\.D\.|RN|R\.N\.|PhD)(?![\w'’])",
    r"(?<!\w)[A-Za-z][A-Za-z'’-]+\^[A-Za-z][A-Za-z'’-]*(?:\^[A-Za-z'’-]*)*",
)
_GIVEN_NAMES = (rf"\b(?P<given>[A-Z][a-z]+)[ ]+(?:{_INITIAL}[ ]*)?(?P<sur>{_PARTICLE}{_WORD})",)
_GIVEN_LAST = (rf"\b(?P<sur>{_WORD}),[ ]*(?P<given>[A-Z][a-z]+)\b",)
_NAME_PART = re.compile(r"[\w'’-]{2,}")
_FOLLOWING = re.compile(r"(?:['’]s?)?[ -]+(?:[A-Z]\b[ ]*)?([A-Za-z]+)")

# (kind, what a text must have for any of the patterns to be tried, the patterns), the surest kinds first
_RULES: tuple[tuple[IdentifierKind, str, tuple[str, ...]], ...] = (
    ("email", "@", _EMAILS),
    ("url", r"(?i:http|www\.)|\.(?:com|org|edu|gov|net)\b", _URLS),
    ("ip", r"\d\.\d+\.\d|[0-9A-Fa-f]:[0-9A-Fa-f]", _IPS),
    ("date", r"\d[-/.]\d|\d{8}", _DATES),
    ("phone", r"\d{3}", _PHONES),
    ("id", r"\d.?\d", _IDS),
    ("date", rf"\b{_MONTH}", _WORDED_DATES),
    ("age_over_89", r"\d\d|(?i:ninety|hundred|narian)", _AGES),
    ("address", r"\d|Hospital|Cent(?:er|re)|System|Clinic|Infirmary|Hospice|Home", _ADDRESSES),
    ("name", "[:=]", _LABELLED_NAMES),
    ("name", r"[,^]|MD|M\.D\.|RN|R\.N\.|PhD", _MARKED_NAMES),
    ("name", "", _TITLED_NAMES),
    ("name", "", _GIVEN_NAMES),
    ("name", ",", _GIVEN_LAST),
)


@dataclass(frozen=True)
class Identifier:
    """A likely identifier: what it is and where. Holds none of the text."""

    kind: IdentifierKind
    start: int
    end: int


class IdentifierSource(abc.ABC):
    """Base of what finds identifiers in a text."""

    @abc.abstractmethod
    def identifiers(self, text: str) -> tuple[Identifier, ...]:
        """Likely identifiers by place, no two overlapping. Never raises, whatever the text."""


class IdentifierRules(IdentifierSource):
    """The rules.

    Args:
        words: a YAML file like ``identifiers.yaml``, which is the default: given names, words that are no names, ends of eponyms.
    Raises:
        ValueError: the file lacks one of these lists.
    """

    def __init__(self, words: Path | None = None) -> None:
        lists = _load_words(WORDS if words is None else words)
        self._given, self._not_names, self._heads = (lists[name] for name in ("given_names", "not_names", "eponym_heads"))
        self._rules = [(kind, re.compile(needs), [re.compile(pattern) for pattern in patterns]) for kind, needs, patterns in _RULES]

    def identifiers(self, text: str) -> tuple[Identifier, ...]:
        """Likely identifiers by place; where two overlap, the kind that is told more surely."""
        text = PLACEHOLDER.sub(lambda match: "_" * len(match[0]), text)  # it may hold a made-up date: [**2101-10-20**]
        return _without_overlap(self._candidates(text))

    def _candidates(self, text: str) -> Iterator[Identifier]:
        """The surest kinds first."""
        for kind, needs, patterns in self._rules:
            if needs.search(text) is None:
                continue
            for match in (match for pattern in patterns for match in pattern.finditer(text)):
                if (span := self._span(kind, text, match)) is not None:
                    yield Identifier(kind, *span)

    def _span(self, kind: IdentifierKind, text: str, match: re.Match[str]) -> tuple[int, int] | None:
        """Where the identifier of a match is; None if it only looks like one."""
        span = match.span("hit") if "hit" in match.re.groupindex else match.span()
        if kind == "name":
            return self._name(text, match, *span)
        return span if kind != "address" or self._is_address(match) else None

    def _is_address(self, match: re.Match[str]) -> bool:
        """Whether a street has a name of its own, and a hospital more than its kind ("Outside Hospital")."""
        words = match.groupdict()
        if (place := words.get("place")) is not None:
            own = [word for word in re.findall(r"[A-Z][\w'’-]+", place) if word.casefold() not in self._not_names]
            return any(word not in _ANY_HOSPITAL for word in own)
        return (word := words.get("word")) is None or word.casefold() not in self._not_names

    def _name(self, text: str, match: re.Match[str], start: int, end: int) -> tuple[int, int] | None:
        """The name up to a word that is none: "Mary Smith No" ends before "No"."""
        words = list(_NAME_PART.finditer(text, start, end))
        other = next((n for n, word in enumerate(words) if word[0].casefold() in self._not_names), len(words))
        if other == 0 or (other == len(words) and self._is_eponym(text, end)):
            return None
        if "given" in match.re.groupindex:
            surname = match["sur"].split()[-1].casefold()
            if match["given"].casefold() not in self._given or {surname, surname.partition("-")[0]} & (self._not_names | self._heads):
                return None
        return start, words[other - 1].end() if other < len(words) else end

    def _is_eponym(self, text: str, end: int) -> bool:
        """Whether a sign, disease or device follows: "Charcot Marie Tooth disease", "Swan Ganz catheter"."""
        following = _FOLLOWING.match(text, end)
        return following is not None and following[1].casefold() in self._heads


class PresidioIdentifiers(IdentifierSource):
    """The rules, and what presidio-analyzer finds with a spaCy model: names and places that stand alone among it.

    Needs the extra ``presidio`` and a model on this machine; nothing is downloaded.

    Args:
        model: the name of an installed spaCy model, or a folder that holds one.
        threshold: presidio's score from which a find counts, in [0, 1].
    Raises:
        ImportError: presidio-analyzer or spaCy is not installed.
        ValueError: no such model.
    """

    KINDS: Mapping[str, IdentifierKind] = {
        "PERSON": "name", "LOCATION": "address", "PHONE_NUMBER": "phone", "EMAIL_ADDRESS": "email", "URL": "url",
        "IP_ADDRESS": "ip", "MEDICAL_LICENSE": "id", "US_SSN": "id", "US_PASSPORT": "id", "US_DRIVER_LICENSE": "id", "US_BANK_NUMBER": "id",
        "CREDIT_CARD": "id", "IBAN_CODE": "id", "UK_NHS": "id",
    }  # fmt: skip
    """Presidio's entities in our words. Its dates are left out, for "today", "2015" and "3 weeks" are among them."""

    def __init__(self, model: str, threshold: float = 0.5) -> None:
        self._rules, self._threshold = IdentifierRules(), threshold
        self._analyzer = _presidio(model)

    def identifiers(self, text: str) -> tuple[Identifier, ...]:
        """Likely identifiers by place; where both find one, the rules name its kind."""
        found = self._analyzer.analyze(text=text, language="en", entities=list(self.KINDS), score_threshold=self._threshold)
        theirs = (Identifier(self.KINDS[one.entity_type], one.start, one.end) for one in found)
        return _without_overlap([*self._rules.identifiers(text), *theirs])


def column_kind(column: str) -> IdentifierKind | None:
    """The kind of identifier that a column of this name holds in every cell ("PatientName", "birth_date"); None if the name tells none."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).casefold()
    key = re.sub(r"[\W_]+", "_", words).strip("_")
    return next((kind for kind, pattern in _COLUMNS.items() if re.fullmatch(pattern, key)), None)


_WHOSE = r"(?:patients?_|pt_|(?:referring|ordering|attending|performing|requesting|reading)_)?"
_COLUMNS: Mapping[IdentifierKind, str] = {
    "name": rf"{_WHOSE}(?:(?:first|last|family|given|middle|maiden|full|sur)_?)?names?"
    rf"|{_WHOSE}(?:physicians?|doctors?|radiologists?|operators?)(?:_name)?",
    "date": rf"{_WHOSE}(?:dob|date_of_birth|birth_?dates?|birthday)|date(?:_of_.+)?|dates"
    r"|(?:study|exam|series|acquisition|content|admission|discharge|visit|report)_?dates?",
    "id": rf"{_WHOSE}(?:mrn|ssn|medical_record(?:_(?:no|number|id))?|social_security(?:_(?:no|number))?|nhs(?:_(?:no|number))?)",
    "phone": rf"{_WHOSE}(?:tele)?(?:phone|fax|mobile|pager)s?(?:_(?:no|number))?",
    "email": rf"{_WHOSE}e_?mails?(?:_address(?:es)?)?",
    "address": rf"{_WHOSE}(?:street|home|postal)?_?(?:address(?:es)?)|zip(?:_?code)?|post_?code|postal_code|street",
}


def _load_words(path: Path) -> dict[str, frozenset[str]]:
    import yaml

    values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    wanted = ("given_names", "not_names", "eponym_heads")
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in wanted):
        raise ValueError(f"words {path}: expected texts {', '.join(wanted)}, words parted by spaces")
    return {name: frozenset(values[name].casefold().split()) for name in wanted}


def _without_overlap(found: Iterable[Identifier]) -> tuple[Identifier, ...]:
    """By place; of those that overlap the one that came first."""
    kept: list[Identifier] = []
    for one in found:
        at = bisect.bisect(kept, one.start, key=lambda other: other.start)
        if (at == 0 or kept[at - 1].end <= one.start) and (at == len(kept) or one.end <= kept[at].start):
            kept.insert(at, one)
    return tuple(kept)


def _presidio(model: str) -> Any:
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError as error:
        told = "presidio-analyzer is not installed: pip install 'medvl[presidio]', or check by the rules alone"
        raise ImportError(told, name=error.name) from None
    if not spacy.util.is_package(model) and not Path(model).is_dir():  # presidio would try to download it
        raise ValueError(f"spaCy model {model}: neither an installed package nor a folder; install it, or check by the rules alone")
    engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": model}])
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
