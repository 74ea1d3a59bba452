r"""The language of ``--filter``: which studies of an archive a search is about, as arrays and as SQL that agree row for row.

    modality = ct and age >= 60 and not (view = LATERAL) and date >= 2020-01 and sex in (F, M)
    present(pleural_effusion) and not absent(pneumothorax) and label(edema) = 1 and patient_id != "P 7" and known(age)

Conditions are joined by ``not``, ``and``, ``or``, which bind in this order, and by parentheses. Names and keywords may be in capitals.

| condition | of | meaning |
|---|---|---|
| ``=  !=  in (a, b)  not in (a, b)`` | every field, ``label(f)``, ``fact(f)`` | equal to the value, or to one of them |
| ``<  <=  >  >=`` | ``age``, ``date`` | order |
| ``present(f)``, ``absent(f)``, ``uncertain(f)`` | a finding | what the report says of it: ``fact(f)`` = 1, 0, -1 |
| ``mentioned(f)`` | a finding | whether the report says anything of it |
| ``label(f)`` | a finding | what the manifest says of it: 1 present, 0 absent, -1 uncertain |
| ``known(x)`` | every field, ``label(f)`` | whether there is a value |

Fields are ``study_id``, ``patient_id``, ``source`` (text, compared exactly), ``modality``, ``view``, ``sex``, ``split`` (text, where A to Z
are as a to z), ``age`` (a number of years) and ``date`` (of the study). The field decides what a value is; quotes only hold it together: a
value with blanks, brackets, commas, quotes, ``=``, ``!``, ``<`` or ``>``, or that is a keyword, stands in ``"..."`` or ``'...'``, where
``\\``, ``\"``, ``\'``, ``\n``, ``\r``, ``\t``, ``\uXXXX`` and ``\UXXXXXXXX`` are escapes.

A date is a day, ``2020-02-29``, or all days of a month, ``2020-02``, or year, ``2020``: ``=`` is one of these days, ``<`` before the first,
``<=`` not after the last, ``>`` after the last, ``>=`` not before the first.

What is not known is neither equal nor unequal to anything: a condition on it is unknown, ``not`` leaves it so, ``and`` is unknown unless a
part is false, ``or`` unless a part is true (Kleene's logic, which is SQL's), and only studies of which the whole is true are found. So
``not present(f)`` finds reports that call f absent or uncertain; those that are silent on it are found by ``not mentioned(f)``. Only
``known`` and ``mentioned`` are never unknown.

Shapes: N studies.
"""

from __future__ import annotations

import abc
import calendar
import datetime
import difflib
import functools
import math
import operator as operators
import re
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

import numpy as np
from lark import Lark, Token, Transformer_NonRecursive, UnexpectedCharacters, UnexpectedToken
from lark.exceptions import VisitError
from numpy.typing import NDArray

Dialect = Literal["sqlite", "postgres"]
Operator = Literal["=", "!=", "<", "<=", ">", ">=", "in", "not in"]
Mask = NDArray[np.bool_]

NO_CODE = -1
"""Code of a text that is not known."""
NO_DAY: int = np.iinfo(np.int32).min
"""Day number of a date that is not known."""
NOT_MENTIONED = -2
"""Code of a finding that is not mentioned, or has no label."""

_STATES = {"present": 1, "absent": 0, "uncertain": -1}
_KEYWORDS = ("and", "or", "not", "in")
_OPPOSITE: Mapping[Operator, Operator] = {
    "=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">", "in": "not in", "not in": "in"
}  # fmt: skip
_ORDERS: Mapping[str, Callable[[Any, Any], Any]] = {"<": operators.lt, "<=": operators.le, ">": operators.gt, ">=": operators.ge}
_EQUALS = ("=", "in")

_LONGEST = 100_000  # characters
_DEEPEST = 64  # brackets and nots in each other
_MOST_CONDITIONS = 400  # each date of a list is one; SQLite takes expressions of depth 1000
_MOST_VALUES = 10_000  # SQLite takes 32,766 placeholders
_FEW = 4  # codes that are looked for one by one: each costs a pass over N codes, a table one slow pass

_PLAIN = r"[^\s()=!<>,\"']"
_GRAMMAR = rf"""
?start: either
?either: both (_OR both)*
?both: one (_AND one)*
?one: _NOT one -> negation
    | _LPAR either _RPAR -> group
    | operand OPERATOR value -> comparison
    | operand _IN values -> among
    | operand _NOT _IN values -> not_among
    | call -> truth
?operand: WORD | call
call: WORD _LPAR argument _RPAR
?argument: WORD | STRING | call
?value: WORD | STRING
values: _LPAR value (_COMMA value)* _RPAR

OPERATOR: "!=" | "<=" | ">=" | "=" | "<" | ">"
_LPAR: "("
_RPAR: ")"
_COMMA: ","
_AND.2: /and(?!{_PLAIN})/i
_OR.2: /or(?!{_PLAIN})/i
_NOT.2: /not(?!{_PLAIN})/i
_IN.2: /in(?!{_PLAIN})/i
STRING: /"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'/s
WORD: /{_PLAIN}+/
%ignore /\s+/
"""
_SHOWN = {  # terminal -> what a message calls it, in the order in which a message lists them
    "WORD": "a name or value", "STRING": "a quoted value", "OPERATOR": "=, !=, <, <=, >, >=", "_IN": "in", "_NOT": "not", "_AND": "and",
    "_OR": "or", "_LPAR": "(", "_RPAR": ")", "_COMMA": "a comma", "$END": "the end",
}  # fmt: skip
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "r": "\r", "t": "\t"}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2}))?)?")
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class FilterError(ValueError):
    """A filter that cannot be used. The message quotes the part of it at fault, with a caret below.

    Attributes:
        position: characters before the fault.
    """

    def __init__(self, problem: str, text: str, position: int) -> None:
        start = max(0, min(position, len(text)) - 60)
        shown = "".join(c if c.isprintable() else " " for c in text[start : start + 120])
        before, after = ("..." if start else ""), ("..." if start + 120 < len(text) else "")
        super().__init__(f"filter: {problem}\n  {before}{shown}{after}\n  {' ' * (len(before) + position - start)}^")
        self.position = position


@dataclass(frozen=True)
class Period:
    """A day, or all days of a month (``day`` None) or of a year (``month`` None too). As text: YYYY-MM-DD, YYYY-MM, YYYY.

    Raises:
        ValueError: no such year (1 to 9999), month or day.
    """

    year: int
    month: int | None = None
    day: int | None = None

    def __post_init__(self) -> None:
        if self.month is None and self.day is not None:
            raise ValueError(f"a day of the year {self.year} needs a month")
        datetime.date(self.year, self.month or 1, self.day or 1)

    @classmethod
    def of(cls, text: str) -> Period:
        """From YYYY, YYYY-MM or YYYY-MM-DD.

        Raises:
            ValueError: another form, or no such date.
        """
        found = _DATE.fullmatch(text)
        if found is None:
            raise ValueError("expected a date as YYYY-MM-DD, YYYY-MM or YYYY")
        try:
            return cls(*(int(part) for part in found.groups() if part is not None))
        except ValueError as error:
            raise ValueError(f"expected a date of the calendar ({error})") from None

    @property
    def first(self) -> datetime.date:
        """The first day."""
        return datetime.date(self.year, self.month or 1, self.day or 1)

    @property
    def last(self) -> datetime.date:
        """The last day."""
        month = self.month or 12
        return datetime.date(self.year, month, self.day or calendar.monthrange(self.year, month)[1])

    def __str__(self) -> str:
        return "-".join([f"{self.year:04}", *(f"{part:02}" for part in (self.month, self.day) if part is not None)])


Value = str | float | int | Period


def day_number(date: str | datetime.date | None) -> int:
    """Days from 1970-01-01 to a date, given as such or as YYYY-MM-DD; ``NO_DAY`` for None.

    Raises:
        ValueError: text of another form, or no such date.
    """
    if date is None:
        return NO_DAY
    if isinstance(date, str):
        period = Period.of(date)
        if period.day is None:
            raise ValueError(f"expected a day as YYYY-MM-DD, got {date}")
        date = period.first
    return date.toordinal() - datetime.date(1970, 1, 1).toordinal()


@dataclass(frozen=True, eq=False)
class TextColumn:
    """A text of each of N studies, as codes of a vocabulary.

    Args:
        codes: (N,) int32, place in the vocabulary; ``NO_CODE`` where not known.
        vocabulary: texts, each once.
    Raises:
        ValueError: a code without a text.
    """

    codes: NDArray[np.int32]
    vocabulary: Sequence[str] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.codes) and not NO_CODE <= int(self.codes.min()) <= int(self.codes.max()) < len(self.vocabulary):
            raise ValueError(f"codes run from {self.codes.min()} to {self.codes.max()}; expected {NO_CODE} to {len(self.vocabulary) - 1}")

    @classmethod
    def encode(cls, texts: Iterable[str | None]) -> TextColumn:
        """The column of N texts, None where not known; the vocabulary in the order of first appearance."""
        places: dict[str, int] = {}
        codes = [NO_CODE if text is None else places.setdefault(text, len(places)) for text in texts]
        return cls(np.array(codes, np.int32), list(places))

    def places(self, texts: Iterable[str], any_case: bool) -> set[int]:
        """The codes of these texts; with ``any_case``, of every text that is one of them but for the case of A to Z."""
        if any_case:
            return {code for text in texts for code in self._folded.get(_folded(text), ())}
        return {self._exact[text] for text in texts if text in self._exact}

    @functools.cached_property
    def _exact(self) -> dict[str, int]:
        return dict(zip(self.vocabulary, range(len(self.vocabulary)), strict=True))

    @functools.cached_property
    def _folded(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for code, text in enumerate(self.vocabulary):
            found.setdefault(_folded(text), []).append(code)
        return found

    def among(self, codes: Collection[int]) -> Mask:
        """(N,) bool: where the code is one of these."""
        if len(codes) > _FEW:
            table = np.zeros(len(self.vocabulary) + 1, bool)  # the last one for NO_CODE
            table[list(codes)] = True
            return table[self.codes]
        found = np.zeros(len(self.codes), bool)
        for code in codes:
            found |= self.codes == code
        return found


@dataclass(frozen=True, eq=False)
class Columns:
    """What filters look at, of N studies.

    Args:
        count: N.
        texts: field -> column, for the text fields of :data:`FIELDS`.
        age: (N,) float64, years; NaN where not known.
        date: (N,) int32, see :func:`day_number`; ``NO_DAY`` where not known.
        facts: finding -> (N,) int8, what the report says: 1 present, 0 absent, -1 uncertain, ``NOT_MENTIONED``. A finding that is not here
            is mentioned in no report.
        labels: the same of the manifest's labels.
    Raises:
        ValueError: a column that is not (N,).
    """

    count: int
    texts: Mapping[str, TextColumn]
    age: NDArray[np.float64]
    date: NDArray[np.int32]
    facts: Mapping[str, NDArray[np.int8]] = field(default_factory=dict)
    labels: Mapping[str, NDArray[np.int8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns: dict[str, NDArray[Any]] = {name: column.codes for name, column in self.texts.items()}
        columns |= {"age": self.age, "date": self.date}
        columns |= {f"fact({finding})": column for finding, column in self.facts.items()}
        columns |= {f"label({finding})": column for finding, column in self.labels.items()}
        for name, column in columns.items():
            if column.shape != (self.count,):
                raise ValueError(f"column {name}: expected shape ({self.count},), got {column.shape}")

    def text(self, name: str) -> TextColumn:
        """The column of a text field.

        Raises:
            ValueError: there is none.
        """
        if name not in self.texts:
            raise ValueError(f"there is no column {name} to filter by; there are {', '.join(self.texts) or 'no text columns'}")
        return self.texts[name]


@dataclass
class _Sql:
    """A fragment in the making: its dialect, and what its placeholders stand for, in their order."""

    dialect: Dialect
    bound: list[object] = field(default_factory=list)

    def bind(self, value: object) -> str:
        """The placeholder of one more value."""
        self.bound.append(value)
        return "?" if self.dialect == "sqlite" else "%s"


class Field(abc.ABC):
    """What a condition is about; one subclass for each type."""

    has_order: ClassVar[bool] = False
    expects: ClassVar[str]
    """What a value must be, for a message."""

    @property
    @abc.abstractmethod
    def source(self) -> tuple[str, str]:
        """Name of the field, "fact" or "label"; and the finding, or "" for a field."""

    @abc.abstractmethod
    def value(self, text: str) -> Value:
        """A value from its text; ValueError says what was expected."""

    @abc.abstractmethod
    def known(self, columns: Columns) -> Mask:
        """(N,) bool: where there is a value."""

    @abc.abstractmethod
    def holds(self, columns: Columns, operator: Operator, values: tuple[Value, ...]) -> Mask:
        """(N,) bool, a new array: where the comparison is true."""

    def expression(self, sql: _Sql) -> str:
        """The field's value in SQL."""
        return f"s.{self}"

    def condition(self, sql: _Sql, operator: Operator, values: tuple[Value, ...]) -> str:
        """The comparison in SQL."""
        left = self.expression(sql)
        marks = [sql.bind(self._stored(value)) for value in values]
        if operator in ("in", "not in"):
            return f"{left} {operator.upper()} ({', '.join(marks)})"
        return f"{left} {'<>' if operator == '!=' else operator} {marks[0]}"

    def _stored(self, value: Value) -> Value:
        """The value as it is compared in SQL."""
        return value

    def __str__(self) -> str:
        return self.source[0]


@dataclass(frozen=True)
class TextField(Field):
    """A text; with ``any_case``, A to Z are as a to z (and no other letters, for in this SQLite, PostgreSQL and Python agree)."""

    name: str
    any_case: bool = False
    expects: ClassVar[str] = "text"

    @property
    def source(self) -> tuple[str, str]:
        """The field."""
        return self.name, ""

    def value(self, text: str) -> str:
        """The text itself."""
        return text

    def known(self, columns: Columns) -> Mask:
        """Where there is a text."""
        return columns.text(self.name).codes != NO_CODE

    def holds(self, columns: Columns, operator: Operator, values: tuple[Value, ...]) -> Mask:
        """Found in the vocabulary first, then by code."""
        column = columns.text(self.name)
        found = column.among(column.places(map(str, values), self.any_case))
        return found if operator in _EQUALS else ~found & self.known(columns)

    def expression(self, sql: _Sql) -> str:
        """The column under a rule that takes the case of A to Z, and nothing else, out of it."""
        if not self.any_case:
            return f"s.{self.name}"
        return f"s.{self.name} COLLATE NOCASE" if sql.dialect == "sqlite" else f'LOWER(s.{self.name} COLLATE "C")'

    def _stored(self, value: Value) -> Value:
        return _folded(str(value)) if self.any_case else value


@dataclass(frozen=True)
class AgeField(Field):
    """Age in years."""

    has_order: ClassVar[bool] = True
    expects: ClassVar[str] = "a number of years"

    @property
    def source(self) -> tuple[str, str]:
        """The field."""
        return "age", ""

    def value(self, text: str) -> float:
        """A finite number."""
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not math.isfinite(number):
            raise ValueError(f"expected {self.expects} such as 60 or 0.5")
        return number

    def known(self, columns: Columns) -> Mask:
        """Where it is not NaN."""
        return ~np.isnan(columns.age)

    def holds(self, columns: Columns, operator: Operator, values: tuple[Value, ...]) -> Mask:
        """NaN is in no order and equal to nothing, as it must be."""
        if operator in _ORDERS:
            return np.asarray(_ORDERS[operator](columns.age, values[0]))
        found = columns.age == values[0] if len(values) == 1 else np.isin(columns.age, np.array(values, np.float64))
        return found if operator in _EQUALS else ~found & self.known(columns)


@dataclass(frozen=True)
class DateField(Field):
    """Day of the study; values are periods."""

    has_order: ClassVar[bool] = True
    expects: ClassVar[str] = "a date"

    @property
    def source(self) -> tuple[str, str]:
        """The field."""
        return "date", ""

    def value(self, text: str) -> Period:
        """See :meth:`Period.of`."""
        return Period.of(text)

    def known(self, columns: Columns) -> Mask:
        """Where there is a day."""
        return columns.date != NO_DAY

    def holds(self, columns: Columns, operator: Operator, values: tuple[Value, ...]) -> Mask:
        """By the first and the last day of the periods."""
        if operator in _ORDERS:
            return np.asarray(_ORDERS[operator](columns.date, day_number(_bound(operator, values[0])))) & self.known(columns)
        found = np.zeros(columns.count, bool)
        for value in values:
            assert isinstance(value, Period)
            found |= (columns.date >= day_number(value.first)) & (columns.date <= day_number(value.last))
        return found if operator in _EQUALS else ~found & self.known(columns)

    def condition(self, sql: _Sql, operator: Operator, values: tuple[Value, ...]) -> str:
        """Dates are ISO texts of one length, so that text order is order in time."""
        left = self.expression(sql)
        if operator in _ORDERS:
            return f"{left} {operator} {sql.bind(_bound(operator, values[0]).isoformat())}"
        parts = []
        for value in values:
            assert isinstance(value, Period)
            parts.append(f"{left} BETWEEN {sql.bind(value.first.isoformat())} AND {sql.bind(value.last.isoformat())}")
        return f"{'' if operator in _EQUALS else 'NOT '}({' OR '.join(parts)})"


@dataclass(frozen=True)
class FindingField(Field):
    """The state of a finding: in the report (``fact``) or by the manifest (``label``)."""

    kind: Literal["fact", "label"]
    finding: str
    expects: ClassVar[str] = "1 (present), 0 (absent) or -1 (uncertain)"

    @property
    def source(self) -> tuple[str, str]:
        """Kind and finding."""
        return self.kind, self.finding

    def value(self, text: str) -> int:
        """One of 1, 0, -1."""
        states = {str(code): code for code in _STATES.values()}
        if text not in states:
            raise ValueError(f"expected {self.expects}")
        return states[text]

    def known(self, columns: Columns) -> Mask:
        """Where the finding is mentioned."""
        return self._codes(columns) != NOT_MENTIONED

    def holds(self, columns: Columns, operator: Operator, values: tuple[Value, ...]) -> Mask:
        """By code."""
        codes = self._codes(columns)
        found = np.zeros(columns.count, bool)
        for value in values:
            found |= codes == value
        return found if operator in _EQUALS else ~found & self.known(columns)

    def expression(self, sql: _Sql) -> str:
        """A scalar subquery: NULL where there is no row."""
        rows = f"study_findings f WHERE f.study_id = s.study_id AND f.finding = {sql.bind(self.finding)}"
        return f"(SELECT f.{self.kind} FROM {rows})"  # noqa: S608 (the finding is bound; the kind is one of two words)

    def _codes(self, columns: Columns) -> NDArray[np.int8]:
        found = (columns.facts if self.kind == "fact" else columns.labels).get(self.finding)
        return np.full(columns.count, NOT_MENTIONED, np.int8) if found is None else found

    def __str__(self) -> str:
        return f"{self.kind}({_quoted(self.finding)})"


def _bound(operator: str, value: Value) -> datetime.date:
    """The day of a period that an order is about."""
    assert isinstance(value, Period)
    return value.first if operator in ("<", ">=") else value.last


FIELDS: Mapping[str, Field] = {
    **{name: TextField(name) for name in ("study_id", "patient_id", "source")},
    **{name: TextField(name, any_case=True) for name in ("modality", "view", "sex", "split")},
    "age": AgeField(),
    "date": DateField(),
}
"""The fields of a study by name."""


class Node(abc.ABC):
    """A part of a filter that is true, false or unknown of a study."""

    @abc.abstractmethod
    def holds(self, columns: Columns, truth: bool) -> Mask:
        """(N,) bool, a new array: where it is true, or with ``truth`` False, where it is false. Unknown is neither."""

    @abc.abstractmethod
    def condition(self, sql: _Sql) -> str:
        """The same in SQL, fit to stand beside AND, OR and NOT."""

    @property
    @abc.abstractmethod
    def fields(self) -> frozenset[Field]:
        """What it is about."""


@dataclass(frozen=True)
class Comparison(Node):
    """``field operator value``, or ``field in (values)``.

    Raises:
        ValueError: no value; several where the operator takes one; an order where the field has none.
    """

    field: Field
    operator: Operator
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values or (len(self.values) > 1 and self.operator not in ("in", "not in")):
            raise ValueError(f"{self.field} {self.operator}: got {len(self.values)} values")
        if self.operator in _ORDERS and not self.field.has_order:
            raise ValueError(f"{self.field} is {self.field.expects}, which has no order: expected =, !=, in or not in, got {self.operator}")

    def holds(self, columns: Columns, truth: bool) -> Mask:
        """A comparison is false where its opposite is true."""
        return self.field.holds(columns, self.operator if truth else _OPPOSITE[self.operator], self.values)

    def condition(self, sql: _Sql) -> str:
        """See :meth:`Field.condition`."""
        return self.field.condition(sql, self.operator, self.values)

    @property
    def fields(self) -> frozenset[Field]:
        """The field."""
        return frozenset([self.field])

    def __str__(self) -> str:
        if self.operator in ("in", "not in"):
            return f"{self.field} {self.operator} ({', '.join(map(_shown, self.values))})"
        if isinstance(self.field, FindingField) and self.field.kind == "fact" and self.operator == "=":
            state = next(name for name, code in _STATES.items() if code == self.values[0])
            return f"{state}({_quoted(self.field.finding)})"
        return f"{self.field} {self.operator} {_shown(self.values[0])}"


@dataclass(frozen=True)
class Known(Node):
    """Whether there is a value; never unknown."""

    field: Field

    def holds(self, columns: Columns, truth: bool) -> Mask:
        """Known, or not."""
        known = self.field.known(columns)
        return known if truth else ~known

    def condition(self, sql: _Sql) -> str:
        """NOT NULL."""
        return f"{self.field.expression(sql)} IS NOT NULL"

    @property
    def fields(self) -> frozenset[Field]:
        """The field."""
        return frozenset([self.field])

    def __str__(self) -> str:
        if isinstance(self.field, FindingField) and self.field.kind == "fact":
            return f"mentioned({_quoted(self.field.finding)})"
        return f"known({self.field})"


@dataclass(frozen=True)
class Not(Node):
    """True where the part is false, false where it is true."""

    part: Node

    def holds(self, columns: Columns, truth: bool) -> Mask:
        """The part, the other way round."""
        return self.part.holds(columns, not truth)

    def condition(self, sql: _Sql) -> str:
        """NOT, which leaves NULL as it is."""
        return f"NOT ({self.part.condition(sql)})"

    @property
    def fields(self) -> frozenset[Field]:
        """Those of the part."""
        return self.part.fields

    def __str__(self) -> str:
        return f"not {_bracketed(self.part)}"


@dataclass(frozen=True)
class _Joined(Node):
    """Two parts or more, joined by the word that the class is named after.

    Raises:
        ValueError: fewer than two.
    """

    parts: tuple[Node, ...]
    word: ClassVar[str]
    all_of: ClassVar[bool]
    """Whether it takes all parts to be true (then one is enough to be false), or one (then all)."""

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"{self.word} joins two conditions or more, got {len(self.parts)}")

    def holds(self, columns: Columns, truth: bool) -> Mask:
        """Every part or any part."""
        found, *others = (part.holds(columns, truth) for part in self.parts)
        for other in others:
            if self.all_of == truth:
                found &= other
            else:
                found |= other
        return found

    def condition(self, sql: _Sql) -> str:
        """In brackets."""
        return f"({f' {self.word.upper()} '.join(part.condition(sql) for part in self.parts)})"

    @property
    def fields(self) -> frozenset[Field]:
        """Those of all parts."""
        return frozenset().union(*(part.fields for part in self.parts))

    def __str__(self) -> str:
        return f" {self.word} ".join(map(_bracketed, self.parts))


@dataclass(frozen=True)
class And(_Joined):
    """True where all parts are, false where one is false."""

    word: ClassVar[str] = "and"
    all_of: ClassVar[bool] = True


@dataclass(frozen=True)
class Or(_Joined):
    """True where one part is, false where all are false."""

    word: ClassVar[str] = "or"
    all_of: ClassVar[bool] = False


@dataclass(frozen=True)
class Filter:
    """A filter, from :func:`parse_filter`. As text it is in one form, which gives the same filter again."""

    root: Node

    def mask(self, columns: Columns) -> Mask:
        """(N,) bool, a new array: the studies of which the filter is true.

        Raises:
            ValueError: a text field that there is no column of.
        """
        return self.root.holds(columns, True)

    def where(self, dialect: Dialect) -> tuple[str, list[object]]:
        """The same as a condition in SQL, in brackets, with what its placeholders stand for.

        It is about a table under the alias ``s`` with a column for each of :data:`FIELDS` (age a double, all others text, dates as
        YYYY-MM-DD, NULL where not known) and about ``study_findings(study_id, finding, fact, label)``: at most one row of a study and a
        finding, fact and label 1, 0, -1 or NULL. The text holds no value of the filter, and no ``%`` but those of its placeholders.

        Args:
            dialect: ``sqlite`` has ``?`` for a placeholder, ``postgres`` ``%s`` as psycopg takes it.
        """
        sql = _Sql(dialect)
        return f"({self.root.condition(sql)})", sql.bound

    def fields(self) -> frozenset[str]:
        """Names of the fields that it looks at; "fact" and "label" where it looks at findings."""
        return frozenset(one.source[0] for one in self.root.fields)

    def findings(self) -> frozenset[str]:
        """The findings that it looks at."""
        return frozenset(one.source[1] for one in self.root.fields) - {""}

    def __str__(self) -> str:
        return str(self.root)


def parse_filter(text: str, findings: Collection[str] | None) -> Filter:
    """The filter that a text says; see the head of this module for the language.

    Args:
        text: at most 100,000 characters, 400 conditions, 10,000 values, 64 brackets in each other.
        findings: the names that a finding may have, capitals or not; None: any.
    Raises:
        FilterError: where it is not the language, a field or finding that there is not, a value of another type, or too much of anything.
    """
    if len(text) > _LONGEST:
        raise FilterError(f"expected at most {_LONGEST} characters, got {len(text)}", text, _LONGEST)
    if not text.strip():
        raise FilterError("expected a condition such as age >= 60, got nothing; without a filter every study is found", text, 0)
    try:
        tree = _parser().parse(text)
    except UnexpectedToken as error:
        raise _syntax_error(text, error) from None
    except UnexpectedCharacters as error:
        at = error.pos_in_stream or 0
        known = "a quote that is never closed" if text[at] in "\"'" else "'!'; unequal is !="
        raise FilterError(f"expected the filter to go on, got {known}", text, at) from None
    try:
        part = _Builder(text, findings).transform(tree)
    except VisitError as error:
        raise error.orig_exc from None
    assert isinstance(part, _Part)
    return Filter(part.node)


@functools.cache
def _parser() -> Lark:
    return Lark(_GRAMMAR, parser="lalr", lexer="basic")


def _syntax_error(text: str, error: UnexpectedToken) -> FilterError:
    came = error.token
    position = len(text.rstrip()) if came.type == "$END" else came.start_pos or 0
    wanted = error.accepts or error.expected
    shown = [words for name, words in _SHOWN.items() if name in wanted]
    expected = " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    hint = ""
    if came.type in ("WORD", "STRING") and "_AND" in wanted:
        hint = "; a value with blanks needs quotes"
    elif came.type in ("_AND", "_OR", "_NOT", "_IN") and "STRING" in wanted:
        hint = "; a value that is a keyword needs quotes"
    return FilterError(f"expected {expected}, got {'the end' if came.type == '$END' else _clipped(came)}{hint}", text, position)


class _Part(NamedTuple):
    """A node on its way: where it starts, and how much it holds, against the limits."""

    node: Node
    start: int
    depth: int = 0
    conditions: int = 1
    values: int = 0


class _Call(NamedTuple):
    """``name(argument)``, not yet looked at."""

    name: Token
    argument: Any  # Token or _Call


class _Builder(Transformer_NonRecursive[Token, Any]):
    """From the syntax tree to nodes: names, types, limits. Methods are named after rules of the grammar and take the rule's parts."""

    def __init__(self, text: str, findings: Collection[str] | None) -> None:
        super().__init__()
        self.text = text
        self.findings = None if findings is None else {name.casefold(): name for name in findings} | {name: name for name in findings}

    def either(self, parts: list[_Part]) -> _Part:
        return self._joined(Or, parts)

    def both(self, parts: list[_Part]) -> _Part:
        return self._joined(And, parts)

    def negation(self, parts: list[_Part]) -> _Part:
        return self._deeper(parts[0]._replace(node=Not(parts[0].node)))

    def group(self, parts: list[_Part]) -> _Part:
        return self._deeper(parts[0])

    def comparison(self, parts: list[Any]) -> _Part:
        operand, operator, value = parts
        one = self._field(operand)
        if operator in _ORDERS and not one.has_order:
            self._fail(f"{one} is {one.expects}, which has no order: expected =, !=, in or not in, got {operator}", operator)
        return self._compared(operand, one, operator.value, [value])

    def among(self, parts: list[Any]) -> _Part:
        return self._compared(parts[0], self._field(parts[0]), "in", parts[1])

    def not_among(self, parts: list[Any]) -> _Part:
        return self._compared(parts[0], self._field(parts[0]), "not in", parts[1])

    def truth(self, parts: list[_Call]) -> _Part:
        (call,) = parts
        name, start = call.name.lower(), _start(call)
        if name in _STATES:
            return _Part(Comparison(FindingField("fact", self._finding(call.argument)), "=", (_STATES[name],)), start)
        if name == "mentioned":
            return _Part(Known(FindingField("fact", self._finding(call.argument))), start)
        if name == "known":
            return _Part(Known(self._field(call.argument)), start)
        if name in ("fact", "label"):
            self._fail(f"expected a comparison such as {name}(...) = 1, got {name}(...) alone", call.name)
        return self._fail(_unknown("condition", call.name, [*_STATES, "mentioned", "known", "label", "fact"]), call.name)

    def call(self, parts: list[Any]) -> _Call:
        return _Call(*parts)

    def values(self, parts: list[Token]) -> list[Token]:
        return parts

    def _joined(self, kind: type[_Joined], parts: list[_Part]) -> _Part:
        conditions, values = sum(part.conditions for part in parts), sum(part.values for part in parts)
        joined = _Part(kind(tuple(part.node for part in parts)), parts[0].start, max(part.depth for part in parts), conditions, values)
        return self._within_limits(joined)

    def _deeper(self, part: _Part) -> _Part:
        return self._within_limits(part._replace(depth=part.depth + 1))

    def _compared(self, operand: Token | _Call, one: Field, operator: Operator, values: list[Token]) -> _Part:
        node = Comparison(one, operator, tuple(self._value(one, value) for value in values))
        conditions = len(values) if isinstance(one, DateField) else 1
        return self._within_limits(_Part(node, _start(operand), conditions=conditions, values=len(values)))

    def _within_limits(self, part: _Part) -> _Part:
        for what, count, most in (
            ("brackets and nots in each other", part.depth, _DEEPEST),
            ("conditions, each date of a list counted", part.conditions, _MOST_CONDITIONS),
            ("values", part.values, _MOST_VALUES),
        ):
            if count > most:
                raise FilterError(f"expected at most {most} {what}, got more", self.text, part.start)
        return part

    def _value(self, one: Field, token: Token) -> Value:
        text = self._text(token)
        try:
            return one.value(text)
        except ValueError as error:
            return self._fail(f"{one}: {error}, got {_clipped(text)}", token)

    def _field(self, operand: Token | _Call) -> Field:
        if isinstance(operand, _Call):
            kind = operand.name.lower()
            if kind in ("fact", "label"):
                return FindingField("fact" if kind == "fact" else "label", self._finding(operand.argument))
            if kind in (*_STATES, "mentioned", "known"):
                self._fail(f"expected a field, label(...) or fact(...), got {kind}(...), which is a condition in itself", operand.name)
            return self._fail(_unknown("name", operand.name, ["label", "fact"]), operand.name)
        name = self._text(operand).lower()
        if name in FIELDS:
            return FIELDS[name]
        if self.findings is not None and name in self.findings:
            self._fail(f"expected a field, got the finding {name}: write present({name}) or label({name}) = 1", operand)
        return self._fail(_unknown("field", operand, FIELDS), operand)

    def _finding(self, argument: Token | _Call) -> str:
        if isinstance(argument, _Call):
            return self._fail(f"expected a finding, got {argument.name}(...)", argument.name)
        name = self._text(argument)
        if self.findings is None:
            return name
        found = self.findings.get(name) or self.findings.get(name.casefold())
        return found or self._fail(_unknown("finding", name, set(self.findings.values())), argument)

    def _text(self, token: Token) -> str:
        """What a word or a quoted text stands for."""
        text = _ESCAPE.sub(lambda found: self._escaped(token, found), token[1:-1]) if token.type == "STRING" else str(token)
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
            self._fail("expected text that a database can hold, got a null character or half of a surrogate pair", token)
        return text

    def _escaped(self, token: Token, found: re.Match[str]) -> str:
        short, long, letter = found.groups()
        if letter is None and int(short or long, 16) <= 0x10FFFF:
            return chr(int(short or long, 16))
        if letter in _ESCAPES:
            return _ESCAPES[letter]
        at = (token.start_pos or 0) + 1 + found.start()
        raise FilterError(rf"expected an escape of \\ \" \' \n \r \t \uXXXX \UXXXXXXXX, got {_clipped(found[0])}", self.text, at)

    def _fail(self, problem: str, token: Token) -> NoReturn:
        raise FilterError(problem, self.text, token.start_pos or 0)


def _start(operand: Token | _Call) -> int:
    return (operand.name if isinstance(operand, _Call) else operand).start_pos or 0


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    """What to say of a name that there is not: the closest ones, or where none is close, some."""
    close = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.6)
    if close:
        return f"unknown {what} {_clipped(name)}; did you mean {close[0]}?"
    listed = sorted(known)
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return f"unknown {what} {_clipped(name)}; expected one of {', '.join(listed[:12])}{more}"


def _folded(text: str) -> str:
    return text.translate(_ASCII_LOWER)


def _clipped(text: str) -> str:
    """Text fit for one line of a message."""
    return repr(str(text) if len(text) <= 40 else f"{text[:37]}...")


def _bracketed(part: Node) -> str:
    """A part as it stands in another."""
    return f"({part})" if isinstance(part, _Joined) else str(part)


def _shown(value: Value) -> str:
    """A value as the language has it."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """Text as a word where it can be one, otherwise in quotes."""
    if re.fullmatch(f"{_PLAIN}+", text) and text.isprintable() and text.lower() not in _KEYWORDS:
        return text
    return '"' + "".join(_escape(c) for c in text) + '"'


def _escape(character: str) -> str:
    if character in '\\"':
        return f"\\{character}"
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"
