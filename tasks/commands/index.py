"""``medvl index``: an archive of studies in one file, to be asked with ``medvl search``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tasks.commands.common import (
    REJECTED,
    check_out_folder,
    console,
    echo_notice,
    gathered,
    json_option,
    json_text,
    load_manifest,
    load_model,
    model_options,
    new_table,
    report_rejected,
    text_policy_option,
    text_source,
    usage_errors,
    weights_sha256,
)

if TYPE_CHECKING:
    from medvl.model import DualEncoder
    from tasks.archive.ingest import Ingested
    from tasks.archive.sources import Candidate, Reject, Source
    from tasks.archive.store import ArchiveStore

F = TypeVar("F", bound=Callable[..., Any])
MANIFEST = ("study_id", "patient_id", "modality", "path")
"""Columns by which a table is told to be a manifest."""


def store_option(command: F) -> F:
    """``--store``."""
    return click.option("--store", required=True, metavar="FILE|ADDRESS", help="The archive: a file, or postgresql://user@host/database.")(
        command
    )


def check_store_folder(store: str) -> None:
    """Make the folder of a store that is a file."""
    from tasks.archive.opening import SCHEMES

    if not store.startswith(SCHEMES):
        check_out_folder(Path(store).absolute().parent, "--store")


@contextmanager
def archive_errors() -> Iterator[None]:
    """Errors of the archive as usage errors: their messages are safe to show."""
    from tasks.archive.store import ArchiveError

    with usage_errors(ArchiveError):
        yield


@contextmanager
def opened(store: str) -> Iterator[ArchiveStore]:
    """A store that is there, let go of at the end; its errors as usage errors."""
    from tasks.archive.opening import open_store

    with archive_errors():
        kept = open_store(store)
        try:
            yield kept
        finally:
            kept.close()


@click.group(short_help="Keep an archive of studies to be searched.")
def index() -> None:
    """Keep an archive of studies: reports by section, sentences and what they state, metadata, paths, and vectors of one model or several.

    It is one SQLite file, made for its owner alone. What is made of it for speed stands beside it in FILE.derived and is made again
    whenever it does not fit.

    \b
    Examples:
      medvl index build demo/data/manifest.csv --model demo/model --store archive.db
      medvl index add more/ --model demo/model --store archive.db
      medvl index stats --store archive.db
      medvl index remove --patient P17 --store archive.db
      medvl index verify --store archive.db
      medvl index embed large/manifest.csv --model demo/model --out shards --devices 8
      medvl index merge shards --store archive.db
    """


@dataclass(frozen=True)
class SourceOptions:
    """What studies are read of, and how, as :func:`reading_options` has it."""

    source: Path
    columns: Path | None
    modality: str | None
    allow_outside: bool
    split: str | None
    text_policy: str
    no_images: bool
    text_columns: tuple[str, ...]
    id_column: str | None

    def check(self) -> None:
        """See that the source is there, before a model is loaded for it."""
        if not self.source.exists():
            raise click.UsageError(f"{self.source}: no such file or folder")


def reading_options(command: F) -> F:
    """What studies are read of, and how: the command gets ``given``, :class:`SourceOptions`."""
    found = gathered(SourceOptions, "given")(command)
    for option in (
        json_option,
        click.option("--rejected", "rejected_path", type=click.Path(path_type=Path), metavar="OUT", help="List what cannot be used."),
        click.option("--id-column", metavar="COL", help="Of a table that is no manifest: its ids, if not the first column."),
        click.option("--text-column", "text_columns", multiple=True, metavar="COL", help="Of a table that is no manifest: its reports."),
        click.option("--no-images", is_flag=True, help="Encode the reports alone."),
        text_policy_option,
        click.option("--split", type=click.Choice(["train", "val", "test"]), help="Of a manifest, this split; all unless told."),
        click.option("--allow-outside", is_flag=True, help="Accept paths that leave the table's folder."),
        click.option(
            "--modality",
            type=click.Choice(["xray", "ct"]),
            help="Rows of a manifest; what other sources are. Unless told, what the model reads.",
        ),
        click.option("--columns", type=click.Path(path_type=Path), metavar="YAML", help="How a manifest names its columns."),
        click.argument("source", type=click.Path(path_type=Path), metavar="MANIFEST|FOLDER|XML|TABLE"),
    ):
        found = option(found)
    return found


def source_options(command: F) -> F:
    """What ``build`` and ``add`` read, and how, and where to."""
    return model_options(store_option(reading_options(command)))


@index.command(short_help="Make an archive of studies.")
@source_options
@click.option("--no-text", is_flag=True, help="Keep ids, metadata and vectors alone: no word of a report, nothing made of its words.")
@click.pass_context
def build(ctx: click.Context, store: str, no_text: bool, **what: Any) -> None:
    """Make an archive of the studies of a manifest, a folder of images (and .txt reports of the same names), Open-i's XML, or a table of
    reports (.csv, .tsv, .jsonl, .parquet).

    The same command again goes on where it was stopped, and changes nothing of what is there as it is now. What cannot be used is listed
    with its reason.

    \b
    Examples:
      medvl index build demo/data/manifest.csv --model demo/model --store archive.db
      medvl index build openi_reports.tgz --model demo/model --store openi.db
      medvl index build reports.csv --id-column id --text-column report --no-images --model demo/model --store reports.db
    """
    check_store_folder(store)
    _fill(ctx, store, create=True, with_text=not no_text, **what)


@index.command(short_help="Add studies, or the vectors of another model.")
@source_options
@click.pass_context
def add(ctx: click.Context, store: str, **what: Any) -> None:
    """Add studies to an archive, or vectors of another model to the studies that are there.

    \b
    Examples:
      medvl index add new/manifest.csv --model demo/model --store archive.db
      medvl index add demo/data/manifest.csv --model other/model --store archive.db
    """
    _fill(ctx, store, create=False, with_text=True, **what)


def _fill(
    ctx: click.Context,
    store: str,
    *,
    create: bool,
    with_text: bool,
    given: SourceOptions,
    model: Path,
    device: str | None,
    rejected_path: Path | None,
    as_json: bool,
) -> None:
    given.check()
    encoder = load_model(model, device)
    from reports.facts import LexiconFacts
    from reports.facts.ontology import load_ontology
    from reports.openi import UnreadableReportError
    from tasks.archive.ingest import Encoder, Ingested, check_key, ingest, model_key
    from tasks.archive.opening import open_store
    from tasks.archive.sources import ReportReader
    from tasks.report_tables import ReportTableError

    texts = text_source(given.text_policy)
    done = Ingested()

    def reject(place: str, reason: str) -> None:
        done.rejected.append((place, reason))

    with archive_errors(), usage_errors(ReportTableError, UnreadableReportError):
        kept = open_store(store, create=create, with_text=with_text)
        key = model_key(encoder, weights_sha256(model), texts)
        check_key(kept, key)
        number = kept.model(key)
        studies = source_of(given, encoder)(reject)
        with counting("studies") as advance:
            reader = ReportReader(texts, LexiconFacts(), load_ontology())
            ingest(kept, studies, Encoder(encoder, with_images=not given.no_images), reader, number, done, advance)
        studies_there = finished(kept)
    report_rejected(done.rejected, f"of {given.source}", rejected_path)
    tell(done, kept.name, studies_there, as_json)
    if done.rejected:
        ctx.exit(REJECTED)


def finished(store: ArchiveStore) -> int:
    """Make what is derived of a store that was written to, and let go of it; how many studies it has."""
    from tasks.archive.derived import open_derived

    with counting("index") as advance:
        open_derived(store, lambda _, count: advance(count))
    studies = store.counts().studies
    store.close()
    return studies


def tell(done: Ingested, store: str, studies: int, as_json: bool, **more: Any) -> None:
    """Say what became of studies that were written to a store.

    Args:
        done: what became of them.
        store: its name.
        studies: that it has now.
        as_json: as JSON.
        more: entries of the JSON.
    """
    from medvl.types import RESEARCH_USE

    if as_json:
        counts = {"added": done.added, "changed": done.changed, "unchanged": done.unchanged, "rejected": len(done.rejected)}
        click.echo(json_text({**counts, **more, "studies": studies, "store": store, "ok": True, "notice": RESEARCH_USE}))
    else:
        click.echo(f"{store}: {done.added} added, {done.changed} changed, {done.unchanged} there already; {studies} studies in all")
        echo_notice()


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """A progress line for a number that is not known before."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    shown = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*shown, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda count: bar.advance(task, count)


def source_of(given: SourceOptions, model: DualEncoder) -> Source:
    """What gives the studies of a source, by what it is.

    Raises:
        click.UsageError: options that do not go with it.
        ReportTableError: a table that cannot be read, or has no such column.
    """
    from tasks.archive.sources import OPENI, of_folder, of_manifest, of_openi, of_table
    from tasks.report_tables import open_reports

    source, read = given.source, _read_by(model)
    kind = given.modality or (read[0] if len(read) == 1 else "xray")
    is_folder = source.is_dir()
    if source.name.lower().endswith(OPENI) or (is_folder and any(source.rglob("*.xml")) and not model.reader.find_images(source)):
        return lambda reject: of_openi(source, reject)
    if is_folder:
        return lambda reject: of_folder(source, model.reader, kind, reject)
    if given.columns is None and not _is_manifest(source):
        with open_reports(source, given.text_columns, given.id_column):  # whether it can be
            return lambda reject: of_table(source, given.text_columns, given.id_column, kind, reject)
    if given.text_columns or given.id_column:
        raise click.UsageError("--text-column and --id-column are for tables that are no manifest; this one has --columns for it")
    table = load_manifest(source, given.columns, given.allow_outside)
    rows = table.select(split=given.split, modality=given.modality or (read[0] if len(read) == 1 else None)).rows

    def of_rows(reject: Reject) -> Iterator[Candidate]:
        for bad in table.rejected:
            reject(bad.path, str(bad))
        yield from of_manifest(rows, source.name, reject)

    return of_rows


def _read_by(model: DualEncoder) -> tuple[str, ...]:
    """The modalities that a model reads."""
    return tuple(kind for kind, suffix in (("xray", ".png"), ("ct", ".nii")) if suffix in model.reader.suffixes)


def _is_manifest(source: Path) -> bool:
    """Whether a table has the columns of a study manifest."""
    import csv

    if source.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return set(MANIFEST) <= set(pyarrow.parquet.read_schema(source).names)
    if source.suffix.lower() not in (".csv", ".tsv"):
        return False
    with source.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file, delimiter="\t" if source.suffix.lower() == ".tsv" else ","), [])
    return set(MANIFEST) <= {name.strip() for name in header}


@index.command(short_help="Take studies or patients out, with every trace.")
@store_option
@click.option("--patient", "patients", multiple=True, metavar="ID", help="All studies of a patient.")
@click.option("--study", "studies", multiple=True, metavar="ID", help="A study.")
@json_option
@click.pass_context
def remove(ctx: click.Context, store: str, patients: tuple[str, ...], studies: tuple[str, ...], as_json: bool) -> None:
    """Take studies out of an archive: their rows are overwritten, the full-text index is merged, what is derived is made again; then every
    file is looked through for their ids, paths and sentences.

    What the disk itself keeps of overwritten files, copies and backups are beyond its reach.

    \b
    Examples:
      medvl index remove --patient P17 --patient P18 --store archive.db
      medvl index remove --study S4 --store archive.db
    """
    if not patients and not studies:
        raise click.UsageError("nothing to take out: give --patient ID or --study ID")
    from tasks.archive.upkeep import removed_for_good

    with opened(store) as kept:
        gone, left = removed_for_good(kept, patients=patients, studies=studies)
    if as_json:
        click.echo(json_text({"removed": list(gone.studies), "traces_left": len(left), "ok": not left}))
    else:
        click.echo(f"{len(gone.studies)} studies removed" + ("" if gone.studies else "; none has such an id"))
        click.echo(f"{len(gone.traces)} ids, paths and sentences were looked for in every file of the archive: {len(left)} found")
    for where in left:
        click.echo(f"  still in {where}", err=True)
    if left or not gone.studies:
        ctx.exit(REJECTED)


@index.command(short_help="Check that an archive is whole.")
@store_option
@json_option
@click.pass_context
def verify(ctx: click.Context, store: str, as_json: bool) -> None:
    """Check an archive: pages, references, full-text index and vectors of the file, and what is derived of it.

    \b
    Example:
      medvl index verify --store archive.db
    """
    from tasks.archive.upkeep import problems_of

    with opened(store) as kept:
        problems = problems_of(kept)
    if as_json:
        click.echo(json_text({"ok": not problems, "problems": problems}))
    else:
        click.echo(f"{kept.name}: " + ("whole" if not problems else f"{len(problems)} problems"))
        for problem in problems:
            click.echo(f"  {problem}")
    if problems:
        ctx.exit(REJECTED)


@index.command(short_help="Say what an archive holds.")
@store_option
@json_option
def stats(store: str, as_json: bool) -> None:
    """Count what an archive holds, by kind, model and finding.

    \b
    Example:
      medvl index stats --store archive.db
    """
    from tasks.archive.upkeep import facts_of

    with opened(store) as kept:
        told = facts_of(kept)
    if as_json:
        click.echo(json_text(told))
        return
    table = new_table(kept.name, "what", "how many", numbers=("how many",))
    for name in ("studies", "patients", "reports", "sentences", "images"):
        table.add_row({"sentences": "different sentences"}.get(name, name), f"{told[name]:,}")
    for model in told["models"]:
        for kind, count in model["vectors"].items():
            table.add_row(f"{kind} vectors of model {model['weights_sha256'][:12]} ({model['width']} numbers)", f"{count:,}")
            if how := model["approximate"].get(kind):
                table.add_row(f"recall@10 of its approximate index, on {how['trials']} of its own", f"{how['recall']:.3f}")
    table.add_row("bytes of the file", f"{told['bytes']:,}")
    table.add_row("bytes of what is derived", f"{told['derived_bytes']:,}")
    console().print(table)
    if told["findings"]:
        said = new_table("What reports say", "finding", "present", "uncertain", "absent", numbers=("present", "uncertain", "absent"))
        for name, count in told["findings"].items():
            said.add_row(name, f"{count['present']:,}", f"{count['uncertain']:,}", f"{count['absent']:,}")
        console().print(said)
    echo_notice()
