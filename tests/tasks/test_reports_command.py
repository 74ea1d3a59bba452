"""``medvl reports``: what each subcommand writes, from every kind of source, and what it does with bad rows, big cells and a sudden end."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.types import Fact
from reports.facts import StatedSentence, Statement
from tasks import report_tables, report_work
from tasks.cli import cli
from tasks.report_tables import RejectedRow, ReportRow, ReportTableError, join_texts, open_reports, section_of, whole_file

ROOT = Path(__file__).resolve().parents[2]
NORMAL = "The heart is normal in size. No pleural effusion or pneumothorax."
EFFUSION = "FINDINGS:\nSmall left pleural effusion, unchanged.\n\nIMPRESSION:\n1. Effusion. 2. No pneumothorax."


def medvl(*args: Any) -> Result:
    return CliRunner().invoke(cli, ["reports", *(str(a) for a in args)])


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def write_table(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def read_all(source: Path, *columns: str, **options: Any) -> list[Any]:
    with open_reports(source, columns, **options) as table:
        return list(table.rows)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(
        tmp_path / "in.csv", [["uid", "report", "Pleural effusion"], ["a", NORMAL, "1"], ["b", EFFUSION, "0"], ["c", "", ""]]
    )


# labels


def test_labels_have_the_first_column_and_the_published_names(table: Path, tmp_path: Path) -> None:
    done = medvl("labels", table, "--text-column", "report", "--label-set", "ct_rate_18", "--out", tmp_path / "out.csv")
    assert done.exit_code == 0, done.output
    header, *rows = rows_of(tmp_path / "out.csv")
    assert header[0] == "uid" and len(header) == 19 and "Arterial wall calcification" in header
    assert [row[0] for row in rows] == ["a", "b", "c"]
    column = header.index("Pleural effusion")
    assert [row[column] for row in rows] == ["0", "1", ""]
    assert {cell for row in rows for cell in row[1:]} <= {"1", "0", "-1", ""}
    assert set(rows[2][1:]) == {""}


def test_labels_of_the_input_are_never_read(table: Path, tmp_path: Path) -> None:
    header, *rows = rows_of(table)
    other = write_table(tmp_path / "other.csv", [header, *([a, b, "-1"] for a, b, _ in rows)])
    for source, out in ((table, "1.csv"), (other, "2.csv")):
        assert medvl("labels", source, "--text-column", "report", "--label-set", "chexpert_14", "--out", tmp_path / out).exit_code == 0
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_labels_of_findings_and_impression_together(tmp_path: Path) -> None:
    source = write_table(
        tmp_path / "in.csv", [["id", "impression", "Findings_EN"], ["a", "No pneumothorax.", "Cardiomegaly."], ["b", "", "Clear lungs."]]
    )
    columns = ["--text-column", "Findings_EN", "--text-column", "impression"]
    assert medvl("labels", source, *columns, "--label-set", "chexpert_14", "--out", tmp_path / "out.csv").exit_code == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found[0]["Cardiomegaly"] == "1" and found[0]["Pneumothorax"] == "0" and found[1]["Cardiomegaly"] == ""


def test_labels_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    texts = [NORMAL, EFFUSION, "Possible edema."]
    source = write_table(tmp_path / "in.csv", [["id", "text"], *([f"r{i}", texts[i % 3]] for i in range(150))])
    for workers in (1, 2):
        args = ["--label-set", "chexpert_14", "--workers", workers, "--out", tmp_path / f"{workers}.csv"]
        assert medvl("labels", source, *args).exit_code == 0
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    assert [row[0] for row in rows_of(tmp_path / "2.csv")[1:]] == [f"r{i}" for i in range(150)]


def test_an_unknown_label_set_names_those_there_are(table: Path, tmp_path: Path) -> None:
    done = medvl("labels", table, "--label-set", "nonsense", "--out", tmp_path / "out.csv")
    assert done.exit_code == 2 and "ct_rate_18" in done.output and not (tmp_path / "out.csv").exists()


# facts


class OneFact(report_work.ExtractFacts):
    """Stands for a source of facts whose answer is known."""

    def sentences(self, text: str) -> tuple[StatedSentence, ...]:
        fact = Fact("pleural_effusion", "absent", size_mm=12.0)
        return (StatedSentence(text, 0, len(text), "findings", (Statement(fact, 3, 19, "new"),), compares=True),)


def test_facts_are_written_as_the_schema_says(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_work, "lexicon_facts", lambda _: OneFact())
    assert medvl("facts", table, "--text-column", "report", "--out", tmp_path / "f.jsonl").exit_code == 0
    lines = [strict(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    fact = {
        "finding": "pleural_effusion", "state": "absent", "side": None, "location": None, "severity": None, "size_mm": 12.0, "kind": None,
        "change": "new", "start": 3, "end": 19,
    }  # fmt: skip
    sentence = {"text": NORMAL, "start": 0, "end": len(NORMAL), "section": "findings", "compares": True, "facts": [fact]}
    assert lines[0] == {"id": "a", "sentences": [sentence]}


def test_facts_of_the_lexicon_stand_where_the_text_has_them(table: Path, tmp_path: Path) -> None:
    assert medvl("facts", table, "--text-column", "report", "--out", tmp_path / "f.jsonl.gz").exit_code == 0
    lines = [strict(line) for line in gzip.decompress((tmp_path / "f.jsonl.gz").read_bytes()).decode().splitlines()]
    effusion = [fact for sentence in lines[1]["sentences"] for fact in sentence["facts"] if fact["finding"] == "pleural_effusion"]
    assert {(fact["state"], EFFUSION[fact["start"] : fact["end"]].lower()) for fact in effusion} >= {("present", "pleural effusion")}
    assert [sentence["section"] for sentence in lines[1]["sentences"]] == ["findings", "impression", "impression"]
    assert lines[1]["sentences"][0]["compares"] and effusion[0]["side"] == "left" and effusion[0]["change"] == "unchanged"
    record = strict((tmp_path / "f.jsonl.gz.provenance.json").read_text())
    assert len(record["lexicon"]["sha256"]) == 64 and record["lexicon"]["version"] and record["medvl"] and record["reports"] == 3
    assert record["source"]["text_columns"] == ["report"]


def test_facts_without_text_hold_no_word_of_the_report(table: Path) -> None:
    done = medvl("facts", table, "--text-column", "report", "--no-text")
    assert done.exit_code == 0
    sentences = [sentence for line in done.stdout.splitlines() for sentence in strict(line)["sentences"]]
    assert sentences and not any("text" in sentence for sentence in sentences) and "normal in size" not in done.output


# parse and stats


def test_parse_gives_sections_and_sentences(table: Path, tmp_path: Path) -> None:
    assert medvl("parse", table, "--out", tmp_path / "p.jsonl").exit_code == 0
    parsed = strict((tmp_path / "p.jsonl").read_text().splitlines()[1])
    assert parsed["sections"] == {"findings": "Small left pleural effusion, unchanged.", "impression": "1. Effusion. 2. No pneumothorax."}
    assert [(s["section"], s["text"]) for s in parsed["sentences"]] == [
        ("findings", "Small left pleural effusion, unchanged."), ("impression", "Effusion."), ("impression", "No pneumothorax."),
    ]  # fmt: skip
    assert all(s["text"].rstrip(".") in EFFUSION[s["start"] : s["end"]] for s in parsed["sentences"])


@pytest.mark.parametrize(("rows", "count"), [("report", 3), ("sentence", 5)])
def test_parse_to_a_table(table: Path, tmp_path: Path, rows: str, count: int) -> None:
    assert medvl("parse", table, "--out", tmp_path / "p.csv", "--rows", rows).exit_code == 0
    header, *found = rows_of(tmp_path / "p.csv")
    assert header[0] == "uid" and len(found) == count and found[1][0] == ("b" if rows == "report" else "a")
    assert found[-1][header.index("section" if rows == "sentence" else "findings")] == ("impression" if rows == "sentence" else "")


def test_stats_count_what_is_there(tmp_path: Path) -> None:
    texts = [NORMAL, NORMAL, EFFUSION, ""]
    source = write_table(tmp_path / "in.csv", [["id", "report"], *([f"r{i}", text] for i, text in enumerate(texts))])
    found = strict(medvl("stats", source, "--json").stdout)
    assert found["reports"] == 4 and found["empty_reports"] == 1 and found["sentences"] == 7
    assert found["different_sentences"] == 5 and found["duplicate_share"] == pytest.approx(2 / 7)
    assert found["reports_with_section"]["impression"] == 1 and found["sentences_by_section"]["impression"] == 2
    assert found["sentences_per_report"] == {"mean": 7 / 4, "min": 0, "median": 2, "p95": 3, "max": 3}
    assert found["comparing_sentences"] == 1
    effusion = found["findings"]["pleural_effusion"]
    assert effusion["absent"] == {"statements": 2, "reports": 2} and effusion["present"]["reports"] == 1
    shown = medvl("stats", source)
    assert shown.exit_code == 0 and "pleural_effusion" in shown.stdout and "not for diagnosis" in shown.stdout


def test_spread_is_that_of_the_values_one_by_one() -> None:
    from collections import Counter
    from statistics import mean, median_low

    values = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    spread = report_work._spread(Counter(values))
    assert spread == {"mean": pytest.approx(mean(values)), "min": 1, "median": median_low(values), "p95": 9, "max": 9}


# check


def test_check_counts_and_never_prints(tmp_path: Path) -> None:
    rows = [
        ["study_id", "report", "PatientName"],
        ["12345678", "Discussed with Dr. Okonkwo on 03/04/2011. MRN 4471120.", "Haldane"],
        ["12345679", NORMAL, "___"],
        ["12345680", "Mrs. Haldane, 93-year-old. Compared with 03/05/2011.", ""],
    ]
    source = write_table(tmp_path / "in.csv", rows)
    done = medvl("check", source, "--json")
    assert done.exit_code == 1
    found = strict(done.stdout)
    assert found["reports"] == 3 and found["reports_touched"] == 2
    assert found["kinds"]["date"] == {"found": 2, "reports": 2} and found["kinds"]["name"] == {"found": 3, "reports": 2}
    assert found["columns"] == {"report": {"name": 2, "date": 2, "id": 1, "age_over_89": 1}, "PatientName": {"name": 1}}
    assert found["numbers_not_counted_in"] == ["study_id"]
    shown = medvl("check", source)
    assert shown.exit_code == 1 and "2 of 3 reports" in " ".join(shown.stdout.split())
    for secret in ("Okonkwo", "Haldane", "4471120", "2011", "12345678"):
        assert secret not in done.output + shown.output


def test_check_of_a_clean_table_exits_with_0(table: Path) -> None:
    assert medvl("check", table).exit_code == 0


def test_check_of_named_columns_alone(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in.csv", [["id", "report", "note"], ["a", NORMAL, "Dr. Okonkwo called."]])
    assert medvl("check", source, "--text-column", "report").exit_code == 0
    assert medvl("check", source).exit_code == 1


def test_check_sees_keys_that_the_first_line_has_not(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "a", "report": "Clear."}\n{"id": "b", "report": "Clear.", "seen": {"by": "Dr. Okonkwo"}}\n')
    found = strict(medvl("check", source, "--json").stdout)
    assert found["columns"] == {"others": {"name": 1}}


def test_check_says_how_to_get_presidio(table: Path) -> None:
    done = medvl("check", table, "--presidio", "no_such_model")
    assert done.exit_code == 2 and ("medvl[presidio]" in done.output or "neither an installed package nor a folder" in done.output)


# sources


def sources(folder: Path) -> dict[str, Path]:
    """The same two reports in every format of tables."""
    rows = [["id", "findings", "impression"], ["a", NORMAL, "Normal."], ["b", 'Größer, "links".\nZeile 2\tTab', ""]]
    made = {name: folder / f"in.{name}" for name in ("csv", "tsv", "csv.gz", "parquet", "jsonl", "jsonl.gz")}
    write_table(made["csv"], rows)
    write_table(made["tsv"], rows, "\t")
    made["csv.gz"].write_bytes(gzip.compress(b"\xef\xbb\xbf" + made["csv"].read_bytes()))
    pyarrow.parquet.write_table(
        pyarrow.table({name: [row[i] or None for row in rows[1:]] for i, name in enumerate(rows[0])}), made["parquet"]
    )
    lines = "".join(json.dumps(dict(zip(rows[0], row, strict=True))) + "\n" for row in rows[1:])
    made["jsonl"].write_text(lines)
    made["jsonl.gz"].write_bytes(gzip.compress(lines.encode()))
    return made


@pytest.mark.parametrize("name", ["csv", "tsv", "csv.gz", "parquet", "jsonl", "jsonl.gz"])
def test_every_format_gives_the_same_reports(tmp_path: Path, name: str) -> None:
    found = read_all(sources(tmp_path)[name])
    assert [(row.id, row.texts) for row in found] == [("a", (NORMAL, "Normal.")), ("b", ('Größer, "links".\nZeile 2\tTab', ""))]
    assert [row.id for row in read_all(sources(tmp_path)[name], "impression", id_column="findings")] == [NORMAL, found[1].texts[0]]


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "p10").mkdir()
    (tmp_path / "p10" / "s2.txt").write_text(EFFUSION, encoding="utf-8")
    (tmp_path / "p10" / "s1.txt").write_bytes(b"Gr\xf6\xdfer")
    (tmp_path / "s3.txt").write_text(NORMAL)
    done = medvl("facts", tmp_path, "--no-text")
    assert done.exit_code == 1 and "1 rejected" in done.stderr and "not UTF-8" in done.stderr
    assert [strict(line)["id"] for line in done.stdout.splitlines()] == ["p10/s2", "s3"]


def test_a_manifest_gives_a_study_once_and_labels_every_row(tmp_path: Path) -> None:
    rows = [["study_id", "patient_id", "modality", "path", "findings"]]
    rows += [["s1", "p", "xray", "1.png", NORMAL], ["s1", "p", "xray", "2.png", NORMAL], ["s2", "p", "xray", "3.png", NORMAL]]
    source = write_table(tmp_path / "manifest.csv", rows)
    assert [strict(line)["id"] for line in medvl("facts", source).stdout.splitlines()] == ["s1", "s2"]
    assert medvl("labels", source, "--label-set", "chexpert_14", "--out", tmp_path / "l.csv").exit_code == 0
    assert [row[0] for row in rows_of(tmp_path / "l.csv")] == ["study_id", "s1", "s1", "s2"]


def test_a_manifest_with_other_names_takes_a_column_map(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in.csv", [["file", "exam", "Befund"], ["1.png", "s1", NORMAL]])
    (tmp_path / "map.yaml").write_text("study_id: exam\nfindings: Befund\n")
    done = medvl("parse", source, "--columns", tmp_path / "map.yaml")
    assert done.exit_code == 0 and strict(done.stdout)["id"] == "s1"


XML = """<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{0}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None</AbstractText><AbstractText Label="INDICATION">Cough</AbstractText>
<AbstractText Label="FINDINGS">No pneumothorax. {0}.</AbstractText><AbstractText Label="IMPRESSION">Normal.</AbstractText>
</Abstract></Article></MedlineCitation><MeSH><major>normal</major></MeSH></eCitation>"""


def test_open_i_as_it_comes(tmp_path: Path) -> None:
    pytest.importorskip("reports.openi")
    with tarfile.open(tmp_path / "openi.tgz", "w:gz") as archive:
        for name, content in (("1.xml", XML.format(1)), ("2.xml", "<eCitation>"), ("3.xml", XML.format(3))):
            info = tarfile.TarInfo(f"ecgen-radiology/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    done = medvl("parse", tmp_path / "openi.tgz", "--out", tmp_path / "p.jsonl")
    assert done.exit_code == 1 and "1 rejected" in done.stderr
    lines = [strict(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[1]["sections"]["findings"] == "No pneumothorax. 3." and lines[0]["sections"]["impression"] == "Normal."
    chosen = read_all(tmp_path / "openi.tgz", "impression")
    assert [row.texts for row in chosen if isinstance(row, ReportRow)] == [("Normal.",), ("Normal.",)]


# bad rows


def test_bad_rows_are_listed_counted_and_cost_only_themselves(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    lines = [
        b"id,report",
        b"a,Clear lungs.",
        b"b,Secret Gr\xf6\xdfer.",
        b"c,one,too many",
        b'd,"broken"quote Secret',
        b",no id Secret",
        b"",
        b"e,Heart normal.",
        b'f,"never closed Secret',
    ]
    source.write_bytes(b"\r\n".join(lines))
    done = medvl("facts", source, "--no-text", "--out", tmp_path / "out" / "f.jsonl")
    assert done.exit_code == 1 and "5 rejected" in done.stderr
    assert [strict(line)["id"] for line in (tmp_path / "out" / "f.jsonl").read_text().splitlines()] == ["a", "e"]
    listed = rows_of(tmp_path / "out" / "rejected.csv")
    assert listed[0] == ["place", "reason"]
    assert [row[0] for row in listed[1:]] == ["row 3", "row 4", "row 5", "row 6", "row 9"]
    assert (
        "column 'report' holds what is not UTF-8" in listed[1][1] and "3 cells" in listed[2][1] and "column 'id' is empty" in listed[4][1]
    )
    assert "Secret" not in done.output + (tmp_path / "out" / "rejected.csv").read_text()
    assert strict((tmp_path / "out" / "f.jsonl.provenance.json").read_text())["rejected"] == 5
    good = write_table(tmp_path / "good.csv", [["id", "report"], ["a", NORMAL]])
    assert medvl("facts", good, "--out", tmp_path / "out" / "f.jsonl").exit_code == 0
    assert not (tmp_path / "out" / "rejected.csv").exists()


def test_a_file_that_happens_to_be_named_rejected_stays(table: Path, tmp_path: Path) -> None:
    (tmp_path / "rejected.csv").write_text("id,why\na,b\n")
    assert medvl("facts", table, "--out", tmp_path / "f.jsonl").exit_code == 0
    assert (tmp_path / "rejected.csv").read_text() == "id,why\na,b\n"


def test_bad_lines_of_jsonl(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b'{"id": 1, "text": "Clear."}\n\n[1]\n{"id": 2, "text": 5}\n{"id": 3, "text"\n{"id": 4, "text": "\\ud800"}\n{"id": 5}\n\xff\n'
    )
    found = read_all(source)
    assert [row.id for row in found if isinstance(row, ReportRow)] == ["1", "5"]
    bad = {row.place: row.reason for row in found if isinstance(row, RejectedRow)}
    assert list(bad) == ["line 3", "line 4", "line 5", "line 6", "line 8"]
    assert "JSON list" in bad["line 3"] and "'text' holds a JSON int" in bad["line 4"] and bad["line 5"] == "is no JSON"


def test_a_cell_as_large_as_a_book_is_read_and_an_endless_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit()
    source = write_table(tmp_path / "in.csv", [["id", "text"], ["a", "x" * 500_000], ["b", "Clear."]])
    assert [len(row.texts[0]) for row in read_all(source)] == [500_000, 6]
    monkeypatch.setattr(report_tables, "MAX_CELL", 1000)
    found = read_all(source)
    assert isinstance(found[0], RejectedRow) and "more than 1000 characters" in found[0].reason and found[1].id == "b"
    lines = tmp_path / "in.jsonl"
    lines.write_text(f'{{"id": "a", "text": "Clear."}}\n{{"id": "b", "text": "{"x" * 5000}"}}\n{{"id": "c", "text": "Clear."}}')
    assert [getattr(row, "id", None) for row in read_all(lines)] == ["a", None, "c"]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.xlsx", b"", "expected a .csv"),
        ("in.csv", b"", "no columns"),
        ("in.csv", b"id,body\na,b\n", "say which with --text-column"),
        ("in.csv", b"id,text,text\na,b,c\n", "2 times"),
        ("in.csv", b"id,t\xf6xt\na,b\n", "not UTF-8"),
        ("in.csv", b"id;text\na;b\n", "';' seems to part"),
        ("in.parquet", b"PAR1 not", "not a readable Parquet file"),
        ("in.jsonl", b"", "no lines"),
        ("in.jsonl", b"[]\n", "expected an object"),
        ("in.csv.gz", gzip.compress(b"id,text\n" + b"a,b\n" * 50_000)[:-40], "breaks off"),
        ("in.csv.gz", b"id,text\na,b\n", "breaks off or cannot be read"),
    ],
)
def test_sources_that_cannot_be_read_at_all(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    columns = ["--text-column", "text"] if b"text,text" in content else []
    done = medvl("facts", tmp_path / name, *columns, "--out", tmp_path / "out.jsonl")
    assert done.exit_code == 2 and said in " ".join(done.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_missing_column_is_guessed_and_no_cell_is_quoted(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in.csv", [["id", "Report_Text"], ["a", NORMAL]])
    with pytest.raises(ReportTableError, match="no column 'report_txt' among its 2; did you mean 'Report_Text'"):
        read_all(source, "report_txt")
    source = write_table(tmp_path / "headless.csv", [["a", "Secret words of a report"], ["b", NORMAL]])
    with pytest.raises(ReportTableError, match="is row 1 the header") as raised:
        read_all(source, "report")
    assert "Secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["facts", "{table}", "--out", "{tmp}/f.csv"], "expected a name that ends in .jsonl"),
        (["labels", "{table}", "--label-set", "chexpert_14", "--out", "{table}"], "is the source itself"),
        (["labels", "{table}", "--label-set", "chexpert_14", "--out", "{tmp}/rejected.csv"], "rejected rows are listed"),
        (["parse", "{rejected}", "--out", "{tmp}/p.jsonl"], "choose another folder"),
        (["labels", "{table}", "--label-set", "chexpert_14"], "Missing option"),
        (["parse", "/nowhere.csv"], "no such file or folder"),
        (["parse", "{table}", "--columns", "/nowhere.yaml"], "no such file"),
        (["facts", "{table}", "--lexicon", "/nowhere"], "no lexicon file"),
        (["facts", "{table}", "--workers", "0"], "not in the range"),
    ],
)
def test_usage_errors(args: list[str], said: str, table: Path, tmp_path: Path) -> None:
    before = table.read_bytes()
    rejected = tmp_path / "rejected.csv"
    rejected.write_bytes(before)
    done = medvl(*(arg.format(table=table, tmp=tmp_path, rejected=rejected) for arg in args))
    assert rejected.read_bytes() == before
    assert done.exit_code == 2 and said in " ".join(done.output.split()) and table.read_bytes() == before


# joining and writing


@pytest.mark.parametrize(
    ("column", "section"),
    [
        ("findings", "findings"),
        ("Findings_EN", "findings"),
        ("Impressions_EN", "impression"),
        ("ClinicalInformation_EN", "indication"),
        ("Technique_EN", "technique"),
        ("report_text", None),
        ("text", None),
        ("", None),
    ],
)
def test_sections_by_the_names_of_columns(column: str, section: str | None) -> None:
    assert section_of(column) == section


def test_texts_are_joined_as_sections() -> None:
    columns = ("indication", "findings", "note", "impression")
    joined = join_texts(columns, ("Cough.\n\nFever.", "Clear.", "Seen.", "Normal."))
    assert joined == "INDICATION:\nCough.\nFever.\n\nFINDINGS:\nClear.\n\nSeen.\n\nIMPRESSION:\nNormal."
    assert (
        join_texts(("findings",), ("  Clear. ",)) == "  Clear. " and join_texts(columns, ("", " ", "", "Normal.")) == "IMPRESSION:\nNormal."
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=80)), max_size=6), st.sampled_from([",", "\t"]))
def test_whatever_csv_can_hold_comes_back(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], delimiter: str) -> None:
    fit = [(a, b) for a, b in pairs if a.strip() and not any("\ud800" <= c <= "\udfff" or c == "\0" for c in a + b)]
    source = tmp_path_factory.mktemp("any") / ("in.csv" if delimiter == "," else "in.tsv")
    write_table(source, [["id", "text"], *map(list, fit)], delimiter)
    assert [(row.id, row.texts) for row in read_all(source)] == [(a.strip(), (b,)) for a, b in fit]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_make_the_reader_fail(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    source = tmp_path_factory.mktemp("any") / "in.csv"
    source.write_bytes(b"id,text\n" + data)
    assert all(isinstance(row, ReportRow | RejectedRow) for row in read_all(source))


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with whole_file(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.txt"]


@pytest.mark.parametrize(("sign", "workers"), [(signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_a_stopped_run_leaves_no_file_that_looks_whole_and_no_process(tmp_path: Path, sign: signal.Signals, workers: int) -> None:
    source = write_table(tmp_path / "in.csv", [["id", "text"], *([str(i), NORMAL * 20] for i in range(20_000))])
    out = tmp_path / "out" / "f.jsonl"
    code = "from tasks.cli import main; main()"
    args = [sys.executable, "-c", code, "reports", "facts", str(source), "--out", str(out), "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    # A shell starts what runs in the background with SIGINT ignored; the command is to be stopped as from a terminal.
    with subprocess.Popen(args, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **quiet) as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.glob("out/.f.jsonl*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sign)
        assert process.wait(30) != 0
        while children_of(process.pid):
            assert time.monotonic() < deadline, "a worker outlived the command"
            time.sleep(0.1)
    left = [path.name for path in out.parent.iterdir()]
    assert left == [] if sign == signal.SIGINT else all(name.startswith(".") and name.endswith(".tmp") for name in left)


def children_of(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """A table of 60 MB is read in less than a third of that, beyond what a table of one row takes."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tasks.report_tables import open_reports\n"
        "with open_reports(Path(sys.argv[1])) as table:\n"
        "    count = sum(1 for row in table.rows)\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    kilobytes = []
    for rows in (1, 60_000):
        source = write_table(tmp_path / f"{rows}.csv", [["id", "text"], *([str(i), "The lungs are clear. " * 48] for i in range(rows))])
        done = subprocess.run(
            [sys.executable, "-c", code, str(source)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
        count, peak = map(int, done.stdout.split())
        assert count == rows
        kilobytes.append(peak)
    assert kilobytes[1] - kilobytes[0] < 20_000


@pytest.mark.parametrize("command", ["parse", "check"])
def test_what_needs_no_lexicon_imports_no_torch(command: str, table: Path) -> None:
    code = (
        "import sys, atexit\n"
        "heavy = ('torch', 'pandas', 'pyarrow', 'transformers', 'spacy')\n"
        "atexit.register(lambda: print('LOADED', [n for n in heavy if n in sys.modules], file=sys.stderr))\n"
        "from tasks.cli import main\n"
        f"sys.argv = ['medvl', 'reports', {command!r}, {str(table)!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "LOADED []" in done.stderr, done.stderr


def test_the_ct_reports_labelled(shared_data: Path, tmp_path: Path) -> None:
    """The labels of the file, which the command does not read, are mostly those it gives."""
    source = shared_data / "reports" / "ct_reports_labelled.csv"
    assert medvl("labels", source, "--text-column", "report_text", "--label-set", "ct_rate_18", "--out", tmp_path / "l.csv").exit_code == 0
    with source.open(newline="", encoding="utf-8") as truth, (tmp_path / "l.csv").open(newline="") as made:
        theirs, ours = list(csv.DictReader(truth)), list(csv.DictReader(made))
    names = [name for name in theirs[0] if name not in ("AccessionNo", "report_text")]
    assert list(ours[0]) == ["AccessionNo", *names] and [row["AccessionNo"] for row in ours] == [row["AccessionNo"] for row in theirs]
    same = sum((a[name] == "1") == (b[name] == "1") for a, b in zip(theirs, ours, strict=True) for name in names)
    assert same / (len(names) * len(theirs)) > 0.9
