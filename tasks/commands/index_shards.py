"""``medvl index embed`` and ``merge``: a large source embedded by many processes into shards, and these into an archive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tasks.commands.common import (
    REJECTED,
    check_out_folder,
    echo_notice,
    json_option,
    json_text,
    load_model,
    model_option,
    progress,
    report_rejected,
    text_source,
    usage_errors,
    weights_sha256,
)
from tasks.commands.index import (
    SourceOptions,
    archive_errors,
    check_store_folder,
    counting,
    finished,
    reading_options,
    source_of,
    store_option,
    tell,
)


@contextmanager
def _silent(what: str) -> Iterator[Callable[[int], None]]:
    """The progress of a process that does not speak."""
    yield lambda count: None


@click.command(short_help="Embed a large source into shards, by many processes.")
@reading_options
@model_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="SHARDS", help="Folder of the shards.")
@click.option(
    "--no-text", is_flag=True, help="Keep ids, metadata, paths and vectors alone: no word of a report, nothing made of its words."
)
@click.option("--shard-studies", type=click.IntRange(min=1), default=512, show_default=True, help="Studies of a shard.")
@click.option("--accelerator", default="auto", show_default=True, metavar="KIND", help="cpu, cuda or another that Lightning knows.")
@click.option(
    "--devices", default="auto", show_default=True, metavar="N", help="Of each node: how many, or which (0,2). auto: all; one CPU."
)
@click.option("--num-nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines that work together.")
@click.option("--strategy", default="auto", show_default=True, metavar="NAME", help="Lightning's; ddp if there are several processes.")
@click.pass_context
def embed(
    ctx: click.Context,
    given: SourceOptions,
    model: Path,
    out: Path,
    no_text: bool,
    shard_studies: int,
    accelerator: str,
    devices: str,
    num_nodes: int,
    strategy: str,
    rejected_path: Path | None,
    as_json: bool,
) -> None:
    """Embed what `medvl index build` takes into Parquet shards, one process for each device, to be merged into an archive afterwards.

    Each shard is written whole or not at all, so that a run can be stopped anywhere: the same command again, with as many devices as you
    like, passes over the shards that are there and makes the others. All processes must see SHARDS under the same path. On several machines
    start the command on each as your cluster does for Lightning (Slurm, torchrun).

    Shards hold the words of reports, ids and paths, as the archive does: the folder is made for its owner alone, and so are its files.
    With --no-text no word is in them; they fit archives without text alone.

    \b
    Examples:
      medvl index embed large/manifest.csv --model demo/model --out shards --devices 8
      medvl index embed reports.csv --text-column report --no-images --model demo/model --out shards --accelerator cpu --devices 4
      srun --nodes 4 --ntasks-per-node 8 medvl index embed large/manifest.csv --model demo/model --out shards --num-nodes 4 --devices 8
      medvl index merge shards --store archive.db
    """
    given.check()
    check_out_folder(out, mode=0o700)
    encoder = load_model(model, "cpu")  # each process takes it to its own device
    from medvl.training.ranks import Ranks
    from medvl.types import RESEARCH_USE
    from reports.facts import LexiconFacts
    from reports.facts.ontology import load_ontology
    from reports.openi import UnreadableReportError
    from tasks.archive.embedding import Embedding, planned
    from tasks.archive.ingest import model_key
    from tasks.archive.shards import ShardError
    from tasks.archive.sources import ReportReader
    from tasks.report_tables import ReportTableError

    texts = text_source(given.text_policy)
    asked: dict[str, Any] = {
        "SOURCE": given.source.name,
        "--modality": given.modality,
        "--split": given.split,
        "--text-policy": given.text_policy,
        "--no-images": given.no_images,
        "--no-text": no_text,
        "--text-column": list(given.text_columns),
        "--id-column": given.id_column,
        "--shard-studies": shard_studies,
    }
    with archive_errors(), usage_errors(ReportTableError, UnreadableReportError, ShardError):
        studies = source_of(given, encoder)
        plan = planned(out, model_key(encoder, weights_sha256(model), texts), asked, with_text=not no_text)
        with usage_errors(ValueError):
            ranks = Ranks(encoder, accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
        reader = ReportReader(texts, LexiconFacts(), load_ontology())
        embedding = Embedding(out, plan, studies, shard_studies, encoder, reader, with_images=not given.no_images)
        try:
            done = embedding.run(ranks, counting if ranks.first else _silent)
        except ShardError:
            if ranks.first:
                raise
            return  # all have found the same, and one says so
    if not ranks.first:
        return
    report_rejected(done.rejected, f"of {given.source}", rejected_path)
    counts = {"shards": done.shards, "made": done.made, "damaged": done.damaged, "studies": done.studies, "rejected": len(done.rejected)}
    if as_json:
        click.echo(json_text({**counts, "out": str(out), "ok": True, "notice": RESEARCH_USE}))
    else:
        again = f", {done.damaged} of them damaged before" if done.damaged else ""
        there = done.shards - done.made
        click.echo(f"{out}: {done.studies} studies in {done.shards} shards; {done.made} made now{again}, {there} there already")
        echo_notice()
    if done.rejected:
        ctx.exit(REJECTED)


@click.command(short_help="Write shards into an archive.")
@click.argument("shards", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SHARDS...")
@store_option
@click.option("--no-text", is_flag=True, help="Of an archive that is made: keep ids, metadata and vectors alone.")
@click.option("--rejected", "rejected_path", type=click.Path(path_type=Path), metavar="OUT", help="List what cannot be used.")
@json_option
@click.pass_context
def merge(ctx: click.Context, shards: tuple[Path, ...], store: str, no_text: bool, rejected_path: Path | None, as_json: bool) -> None:
    """Write folders of shards, which `medvl index embed` made, into an archive; one that is not there is made.

    The archive is then what `medvl index build` had made of the same source. No report and no image is read. The same again changes
    nothing. Shards that are missing or damaged are named, the others are merged, and the exit code is 1.

    \b
    Examples:
      medvl index merge shards --store archive.db
      medvl index merge shards other/shards --store postgresql://user@host/database
    """
    check_store_folder(store)
    from tasks.archive.ingest import Ingested
    from tasks.archive.merging import ShardFolder
    from tasks.archive.merging import merge as merge_folder
    from tasks.archive.opening import open_store
    from tasks.archive.shards import ShardError

    done, unusable, missing = Ingested(), list[str](), list[str]()
    with archive_errors(), usage_errors(ShardError):
        folders = [ShardFolder.at(folder) for folder in shards]
        wordless = [found.folder for found in folders if not found.with_text()]
        if wordless and len(wordless) < len(folders) and not no_text:
            raise click.UsageError(f"{wordless[0]}: holds no words, and other folders do; give --no-text, or merge them into two archives")
        kept = open_store(store, create=True, with_text=not (no_text or wordless))
        if kept.with_text and wordless:
            raise click.UsageError(
                f"{wordless[0]}: holds no words, and {kept.name} keeps them; give another --store, or embed without --no-text"
            )
        with progress("shards", sum(len(found.shards) for found in folders)) as advance:
            for found in folders:
                unusable += merge_folder(kept, found, done, advance)
        studies = finished(kept)
    for found in folders:
        missing += found.missing()
        if said := found.incomplete():
            done.rejected.append((str(found.folder), said))
    report_rejected(done.rejected, "of shards", rejected_path)
    tell(done, kept.name, studies, as_json, missing=missing, damaged=unusable)
    if done.rejected:
        ctx.exit(REJECTED)
