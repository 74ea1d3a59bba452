"""``medvl reports``: sections, sentences, facts and labels of reports in tables of any size, statistics, and a check for identifiers."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

import medvl
from tasks.commands.common import REJECTED, SHOWN, check_out_file, console, echo_notice, json_option, json_text, new_table, usage_errors

if TYPE_CHECKING:
    from rich.table import Table

    from tasks.report_tables import RejectedRow, ReportRow, ReportTable, Row

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
REJECTED_CSV, LISTING = "rejected.csv", ("place", "reason")
UPDATE = 32  # rows between two looks at the progress bar


def source_options(command: F) -> F:
    """SOURCE, ``--text-column``, ``--id-column``, ``--columns`` and ``--workers``."""
    for option in (
        click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Processes to work with."),
        click.option(
            "--columns", type=click.Path(path_type=Path), metavar="YAML", help="How a study manifest names its columns, if not as we do."
        ),
        click.option("--id-column", metavar="COL", help="Column of the id, if not the first."),
        click.option(
            "--text-column",
            "text_columns",
            multiple=True,
            metavar="COL",
            help="Column of the report; several are joined as its sections. Unless told: findings and impression, or report, or text.",
        ),
        click.argument("source", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


def lexicon_option(command: F) -> F:
    """``--lexicon``."""
    return click.option(
        "--lexicon", type=click.Path(path_type=Path), metavar="DIR", help="Folder of an edited lexicon, if not the built-in one."
    )(command)


def out_option(metavar: str, *, required: bool = False, otherwise: str = "") -> Callable[[F], F]:
    """``--out``."""
    return click.option(
        "--out",
        required=required,
        type=click.Path(path_type=Path),
        metavar=metavar,
        help=f"File to write; rejected.csv goes beside it{otherwise}.",
    )


@click.group(epilog="Exit codes: 0 fine, 1 some rows rejected (check: something found), 2 usage, 3 internal error.")
def reports() -> None:
    """Read reports: sections, sentences, facts, labels, statistics, identifiers.

    SOURCE is a CSV, TSV, JSONL (.gz too) or Parquet table, a study manifest, a folder of .txt files, or Open-i's .tgz or XML. Tables are
    read row by row, whatever their size. Rows that cannot be read are listed in rejected.csv beside the output, and counted.

    \b
    Examples:
      medvl reports check reports.csv
      medvl reports stats reports.csv --text-column findings --text-column impression
      medvl reports parse reports/ --out parsed.jsonl
      medvl reports facts reports.parquet --out facts.jsonl --workers 4
      medvl reports labels reports.csv --text-column report --label-set chexpert_14 --out labels.csv
    """


@reports.command()
@source_options
@out_option("FILE", otherwise="; .jsonl or .csv, also .gz. Standard output unless told")
@click.option(
    "--rows",
    type=click.Choice(["report", "sentence"]),
    default="report",
    show_default=True,
    help="What a row of a CSV is: a report with its sections, or a sentence with its place.",
)
@click.pass_context
def parse(ctx: click.Context, out: Path | None, rows: str, **source: Any) -> None:
    """Split reports into sections and sentences.

    A line of JSONL is {"id", "sections": {name: text}, "sentences": [{"text", "start", "end", "section"}]}, offsets in characters of the
    report.

    \b
    Examples:
      medvl reports parse reports.csv --text-column report --out parsed.jsonl
      medvl reports parse reports.csv --out sentences.csv --rows sentence
    """
    from tasks.report_work import SECTIONS, parse_report

    header = ("id", *SECTIONS) if rows == "report" else ("id", "number", "section", "start", "end", "text")

    def lines(id_: str, parsed: dict[str, Any]) -> Iterable[Sequence[Any]]:
        if rows == "report":
            return [(id_, *(parsed["sections"].get(name, "") for name in SECTIONS))]
        return [(id_, n, *(one[key] for key in header[2:])) for n, one in enumerate(parsed["sentences"], start=1)]

    def write(file: IO[str], table: ReportTable) -> Callable[[str, dict[str, Any]], object]:
        if out is None or not is_csv(out):
            return lambda id_, parsed: file.write(json_line({"id": id_, **parsed}))
        writer = csv_writer(file, out)
        writer.writerow((table.id_column if "id" in header else "id", *header[1:]))
        return lambda id_, parsed: writer.writerows(lines(id_, parsed))

    check_out(out, source["source"], (".jsonl", ".csv", ".tsv"))
    done = work_on(Source(**source), parse_report, write, out)
    finish(ctx, done, out, {"command": "reports parse"})


@reports.command()
@source_options
@lexicon_option
@out_option("FILE", otherwise="; .jsonl or .jsonl.gz. Standard output unless told")
@click.option("--no-text", is_flag=True, help="Leave the words of the sentences out.")
@click.pass_context
def facts(ctx: click.Context, out: Path | None, lexicon: Path | None, no_text: bool, **source: Any) -> None:
    """Find what each sentence states: finding, state, side, place, severity, size, change.

    A line is {"id", "sentences": [{"text", "start", "end", "section", "compares", "facts": [{"finding", "state", "side", "location",
    "severity", "size_mm", "kind", "change", "start", "end"}]}]}, offsets in characters of the report. FILE.provenance.json says with which
    version and lexicon.

    \b
    Examples:
      medvl reports facts reports.csv --text-column report --out facts.jsonl
      medvl reports facts reports.csv --no-text --workers 2 --out facts.jsonl.gz
    """
    from tasks.report_work import ExtractFacts

    check_out(out, source["source"], (".jsonl",))
    record = lexicon_record(lexicon)

    def write(file: IO[str], _: ReportTable) -> Callable[[str, list[dict[str, Any]]], object]:
        return lambda id_, sentences: file.write(json_line({"id": id_, "sentences": sentences}))

    done = work_on(Source(**source), ExtractFacts(lexicon, with_text=not no_text), write, out)
    finish(ctx, done, out, {"command": "reports facts", "with_text": not no_text, "lexicon": record})


@reports.command()
@source_options
@lexicon_option
@click.option("--label-set", required=True, metavar="NAME", help="ct_rate_18, chexpert_14 or another; a wrong name shows all.")
@out_option("FILE", required=True, otherwise="; .csv or .tsv, also .gz")
@click.pass_context
def labels(ctx: click.Context, out: Path, label_set: str, lexicon: Path | None, **source: Any) -> None:
    """Label reports: 1 present, 0 absent, -1 uncertain, empty not mentioned.

    Writes the id under its own name and a column per label, named as the data set publishes it. Of SOURCE only the id and the text are
    read, whatever labels it has.

    \b
    Examples:
      medvl reports labels reports.csv --text-column report_text --label-set ct_rate_18 --out labels.csv
      medvl reports labels reports.csv --text-column findings --text-column impression --label-set chexpert_14 --out labels.csv
    """
    from tasks.report_work import LabelReport

    check_out(out, source["source"], (".csv", ".tsv"))
    record, labels_record, names = lexicon_record(lexicon), *label_set_record(label_set)

    def write(file: IO[str], table: ReportTable) -> Callable[[str, tuple[int | None, ...]], object]:
        writer = csv_writer(file, out)
        writer.writerow((table.id_column, *names))
        return lambda id_, values: writer.writerow((id_, *("" if value is None else value for value in values)))

    done = work_on(Source(**source, every_row=True), LabelReport(label_set, lexicon), write, out)
    finish(ctx, done, out, {"command": "reports labels", "label_set": labels_record, "lexicon": record})


@reports.command()
@source_options
@lexicon_option
@json_option
@click.pass_context
def stats(ctx: click.Context, lexicon: Path | None, as_json: bool, **source: Any) -> None:
    """Count sections, sentences and findings, and how many sentences repeat another or compare with a prior study.

    Findings are counted where they describe the image: in findings, impression, and text without a heading. A sentence repeats another if
    both have the same words, capitals and the closing stop aside.

    \b
    Examples:
      medvl reports stats reports.csv --text-column report
      medvl reports stats reports.jsonl --workers 2 --json
    """
    from tasks.report_work import CountReport, Statistics

    record, total = lexicon_record(lexicon), Statistics()

    def count(*_: Any) -> Callable[[str, Statistics], object]:
        return lambda _, one: total.add(one)

    done = work_on(Source(**source), CountReport(lexicon), count, None)
    found = {"source": str(source["source"]), **total.to_dict(), "rejected": done.rejected, "lexicon": record, "medvl": medvl.__version__}
    if as_json:
        click.echo(json_text(found))
    else:
        for table in stats_tables(found):
            console().print(table)
        echo_notice()
    finish(ctx, done, None, {})


@reports.command()
@source_options
@click.option(
    "--presidio", "model", metavar="MODEL", help="Ask presidio-analyzer too, with this spaCy model (a name or folder; extra presidio)."
)
@json_option
@click.pass_context
def check(ctx: click.Context, model: str | None, as_json: bool, **source: Any) -> None:
    """Count likely identifiers: names, dates, ids, phones, e-mails, addresses, ages over 89, URLs, IP addresses.

    Prints how many of each kind are in which column, and never what they are. Every column is read unless --text-column names some. Exits
    with 1 if anything was found. Rules find most of what reports hold, not all: nothing found does not prove a table free of identifiers.

    \b
    Examples:
      medvl reports check reports.csv
      medvl reports check reports.csv --text-column report --json
    """
    from tasks.report_work import CheckRow, identifier_source, is_pseudonym_column

    with usage_errors(ImportError, ValueError):
        identifier_source(model)
    chosen = Source(**source, every_row=True, every_column=not source["text_columns"])
    counts: Counter[tuple[str, str]] = Counter()
    touched: Counter[str] = Counter()
    rows = 0
    with opened(chosen, None) as (table, given, rejections):
        from tasks.processes import in_order

        for _, found in in_order(CheckRow(table.text_columns, model), ((None, row.texts) for row in given), chosen.workers):
            rows += 1
            counts.update({(column, kind): n for column, one in zip(table.text_columns, found, strict=True) for kind, n in one.items()})
            kinds = {kind for one in found for kind in one}
            touched.update([*kinds, *(["any"] if kinds else [])])
    pseudonyms = [column for column in table.text_columns if is_pseudonym_column(column)]
    record = check_record(chosen.source, counts, touched, rows, rejections.count, pseudonyms)
    if as_json:
        click.echo(json_text(record))
    else:
        console().print(check_table(record))
        if pseudonyms:
            click.echo(f"Numbers in {', '.join(pseudonyms)} are not counted; whether they are pseudonyms the table does not tell.")
    if counts or rejections.count:
        ctx.exit(REJECTED)


# sources


@dataclass(frozen=True)
class Source:
    """What a command was told of its input."""

    source: Path
    text_columns: tuple[str, ...] = ()
    id_column: str | None = None
    columns: Path | None = None
    workers: int = 1
    every_row: bool = False
    """Take every row of a study manifest; else a study's report is taken once, not with each of its images."""
    every_column: bool = False


@dataclass
class Rejections:
    """Counts rejected rows, keeps the first to show, and writes all to ``file``, made when the first comes."""

    file: Path | None
    stack: ExitStack
    count: int = 0
    shown: list[str] = field(default_factory=list)
    _writer: Any = None

    def add(self, row: RejectedRow) -> None:
        """Note one."""
        self.count += 1
        if self.count <= SHOWN:
            self.shown.append(f"{row.place}: {row.reason}")
        if self.file is None:
            return
        if self._writer is None:
            from tasks.report_tables import whole_file

            self._writer = csv.writer(self.stack.enter_context(whole_file(self.file)), lineterminator="\n")
            self._writer.writerow(LISTING)
        self._writer.writerow((row.place, row.reason))

    def tell(self, source: Path) -> None:
        """Say on standard error how many there were, and the first of them; an older list goes if there were none."""
        if not self.count:
            if self.file is not None and is_listing(self.file):
                self.file.unlink()
            return
        click.echo(f"{self.count} rejected (rows of {source})" + ("" if self.file is None else f", listed in {self.file}") + ":", err=True)
        for line in self.shown:
            click.echo(f"  {line}", err=True)
        if self.count > len(self.shown):
            click.echo(f"  and {self.count - len(self.shown)} more", err=True)


@contextmanager
def opened(source: Source, out: Path | None) -> Iterator[tuple[ReportTable, Iterator[ReportRow], Rejections]]:
    """The table, its readable rows under a progress bar, and what gathers the others, told of at the end."""
    from tasks.report_tables import USUAL, ReportTableError, open_reports

    usual: Sequence[Sequence[str]] = USUAL
    id_column = source.id_column
    if source.columns is not None:
        names = manifest_names(source.columns)
        usual, id_column = ((names.findings, names.impression), (names.report,)), id_column or names.study_id
    with usage_errors(ReportTableError), ExitStack() as stack:
        table = stack.enter_context(
            open_reports(source.source, source.text_columns, id_column, usual=usual, every_column=source.every_column)
        )
        rejections = Rejections(None if out is None else out.with_name(REJECTED_CSV), stack)
        rows = readable(stack.enter_context(watched(table, source.source.name)), rejections)
        yield table, rows if source.every_row or not table.is_manifest else once(rows), rejections
    rejections.tell(source.source)


def is_listing(path: Path) -> bool:
    """Whether a file is a list of rejected rows that an earlier run wrote."""
    try:
        with path.open("rb") as file:
            return file.readline(100).strip() == ",".join(LISTING).encode()
    except OSError:
        return False


def manifest_names(path: Path) -> Any:
    """The column map of a study manifest."""
    import yaml

    from medvl.data.manifest import ColumnMap

    if not path.is_file():
        raise click.UsageError(f"column map {path}: no such file")
    with usage_errors(ValueError, yaml.YAMLError):
        return ColumnMap.load(path)


def readable(rows: Iterable[Row], rejections: Rejections) -> Iterator[ReportRow]:
    """The rows that could be read."""
    from tasks.report_tables import ReportRow

    for row in rows:
        if isinstance(row, ReportRow):
            yield row
        else:
            rejections.add(row)


def once(rows: Iterable[ReportRow]) -> Iterator[ReportRow]:
    """A study's report once where the rows of its images repeat it, one after the other."""
    last: ReportRow | None = None
    for row in rows:
        if last is None or (row.id, row.texts) != (last.id, last.texts):
            yield row
        last = row


@contextmanager
def watched(table: ReportTable, what: str) -> Iterator[Iterator[Row]]:
    """The rows, with a bar on standard error that says how far they are read."""
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]} reports"))
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True)) as bar:
        task = bar.add_task(escape(what), total=table.size, rows=0)

        def rows() -> Iterator[Row]:
            number = 0
            for number, row in enumerate(table.rows, start=1):
                yield row
                if number % UPDATE == 0:
                    bar.update(task, completed=table.position(), rows=number)
            size = table.size or max(number, 1)
            bar.update(task, completed=size, total=size, rows=number)

        yield rows()


# output


@dataclass(frozen=True)
class Done:
    """What a command has gone through."""

    source: Path
    id_column: str
    text_columns: tuple[str, ...]
    reports: int
    rejected: int


def work_on(
    source: Source, work: Callable[[str], R], write: Callable[[IO[str], ReportTable], Callable[[str, R], object]], out: Path | None
) -> Done:
    """Do ``work`` on the text of every report, and hand each id and result in order to what ``write`` makes of the file and the table.

    ``out`` is written whole or not at all; None: standard output.
    """
    from tasks.processes import in_order
    from tasks.report_tables import join_texts, whole_file

    reports = 0
    with opened(source, out) as (table, rows, rejections), ExitStack() as stack:
        file: IO[str] = sys.stdout if out is None else stack.enter_context(whole_file(out))
        take = write(file, table)
        items = ((row.id, join_texts(table.text_columns, row.texts)) for row in rows)
        for id_, result in in_order(work, items, source.workers):
            take(id_, result)
            reports += 1
    return Done(source.source, table.id_column, table.text_columns, reports, rejections.count)


def finish(ctx: click.Context, done: Done, out: Path | None, record: dict[str, Any]) -> None:
    """Write OUT.provenance.json, and exit with 1 if rows were rejected."""
    if out is not None:
        from tasks.report_tables import whole_file

        source = {"name": done.source.name, "sha256": file_sha256(done.source) if done.source.is_file() else None}
        columns = {"id_column": done.id_column, "text_columns": list(done.text_columns)}
        counts = {"reports": done.reports, "rejected": done.rejected}
        made = {"name": out.name, "sha256": file_sha256(out)}
        with whole_file(out.with_name(f"{out.name}.provenance.json")) as file:
            json.dump({"medvl": medvl.__version__, **record, "source": {**source, **columns}, **counts, "out": made}, file, indent=2)
            file.write("\n")
    if done.rejected:
        ctx.exit(REJECTED)


def check_out(out: Path | None, source: Path, suffixes: Sequence[str]) -> None:
    """See before the work that the output can be written and is not the input.

    Raises:
        click.UsageError: another suffix, a place that cannot be written to, or the source itself.
    """
    if out is None:
        return
    if not out.name.lower().removesuffix(".gz").endswith(tuple(suffixes)):
        raise click.UsageError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}, with or without .gz")
    check_out_file(out, "--out")
    listing = out.with_name(REJECTED_CSV)
    if out.name == REJECTED_CSV or (listing.exists() and source.exists() and listing.samefile(source)):
        raise click.UsageError(
            f"--out {out}: rejected rows are listed in {listing}; choose another {'name' if out == listing else 'folder'}"
        )
    if out.exists() and source.exists() and out.samefile(source):
        raise click.UsageError(f"--out {out}: is the source itself")


def is_csv(out: Path) -> bool:
    """Whether an output file is a table and not JSONL."""
    return out.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def csv_writer(file: IO[str], out: Path) -> Any:
    """A writer of commas or, if the name says so, tabs."""
    tabs = out.name.lower().removesuffix(".gz").endswith(".tsv")
    return csv.writer(file, delimiter="\t" if tabs else ",", lineterminator="\n")


def json_line(value: Any) -> str:
    """Strict JSON, in ASCII whatever the terminal takes, and a line break."""
    return f"{json.dumps(value, allow_nan=False)}\n"


def file_sha256(path: Path) -> str:
    """Hash of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def lexicon_record(lexicon: Path | None) -> dict[str, str]:
    """Version and hash of the lexicon."""
    from reports.facts.lexicon import load_lexicon

    with usage_errors(FileNotFoundError, ValueError):
        loaded = load_lexicon(lexicon)
    return {"version": loaded.version, "sha256": loaded.sha256}


def label_set_record(name: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Name and hash of a label set, and its labels as published."""
    from reports.facts.label_sets import load_label_set

    with usage_errors(ValueError):
        chosen = load_label_set(name)
    content = [chosen.name, chosen.names, *({label: sorted(of) for label, of in one.items()} for one in (chosen.covers, chosen.denied_by))]
    return {"name": name, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}, chosen.names


# tables for a person


def stats_tables(found: dict[str, Any]) -> Iterator[Table]:
    """The statistics as tables: all in all, sections, findings."""
    sentences = found["sentences"]
    table = new_table(found["source"], "", "count", "share", numbers=("count", "share"))
    table.add_row("reports", str(found["reports"]), "")
    for name, key, of in (
        ("without text", "empty_reports", found["reports"]),
        ("rejected rows", "rejected", None),
        ("sentences", "sentences", None),
        ("that state a finding", "sentences_with_facts", sentences),
        ("that compare with a prior", "comparing_sentences", sentences),
        ("different ones", "different_sentences", sentences),
    ):
        table.add_row(name, str(found[key]), _share(found[key], of))
    for name, key in (("sentences a report", "sentences_per_report"), ("words a sentence", "words_per_sentence")):
        spread = found[key]
        if spread["mean"] is not None:
            shown = f"{spread['mean']:.1f} (median {spread['median']}, 95 % {spread['p95']}, {spread['min']} to {spread['max']})"
            table.add_row(name, shown, "")
    yield table
    table = new_table(None, "section", "reports", "share", "sentences", numbers=("reports", "share", "sentences"))
    for name, count in found["reports_with_section"].items():
        table.add_row(name, str(count), _share(count, found["reports"]), str(found["sentences_by_section"][name]))
    yield table
    states = ("present", "uncertain", "absent")
    table = new_table(None, "finding", *states, numbers=states, caption="reports with it")
    for name, counts in found["findings"].items():
        table.add_row(name, *(str(counts[state]["reports"]) for state in states))
    yield table


def _share(count: int, of: int | None) -> str:
    return f"{count / of:.1%}" if of else ""


def check_record(
    source: Path, counts: Counter[tuple[str, str]], touched: Counter[str], rows: int, rejected: int, pseudonyms: Sequence[str]
) -> dict[str, Any]:
    """What was found as plain values: counts alone."""
    from reports.identifiers import KINDS

    columns = list(dict.fromkeys(column for column, _ in counts))
    return {
        "source": str(source),
        "reports": rows,
        "rejected": rejected,
        "reports_touched": touched["any"],
        "kinds": {kind: {"found": sum(counts[column, kind] for column in columns), "reports": touched[kind]} for kind in KINDS},
        "columns": {column: {kind: counts[column, kind] for kind in KINDS if counts[column, kind]} for column in columns},
        "numbers_not_counted_in": list(pseudonyms),
    }


def check_table(record: dict[str, Any]) -> Table:
    """The counts as a table: a row a kind, a column a column of the source."""
    names = list(record["columns"])
    table = new_table(
        record["source"],
        "kind",
        "found",
        "reports",
        *names,
        numbers=("found", "reports", *names),
        caption=f"{record['reports_touched']} of {record['reports']} reports hold what is likely an identifier",
    )
    for kind, found in record["kinds"].items():
        cells = (str(record["columns"][name].get(kind, 0)) for name in names)
        table.add_row("age > 89" if kind == "age_over_89" else kind, str(found["found"]), str(found["reports"]), *cells)
    return table
