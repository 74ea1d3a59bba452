"""``medvl search``: the reports that fit a text or an image."""

from __future__ import annotations

from pathlib import Path

import click

from tasks.commands.common import (
    REJECTED,
    console,
    echo_notice,
    json_option,
    json_text,
    load_manifest,
    load_model,
    manifest_options,
    model_options,
    new_table,
    report_rejected,
    text_policy_option,
    text_source,
)


@click.command()
@model_options
@click.option(
    "--index", type=click.Path(path_type=Path), required=True, metavar="MANIFEST", help="Table of the studies whose reports are searched."
)
@manifest_options
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Search only this split; all unless told.")
@click.option("--query", required=True, metavar="TEXT|FILE", help="What to look for; an image if there is such a file, else a text.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, metavar="K", help="How many reports.")
@click.option("--rejected", "rejected_path", type=click.Path(path_type=Path), metavar="OUT", help="List rows that cannot be used in a CSV.")
@text_policy_option
@json_option
@click.pass_context
def search(
    ctx: click.Context,
    model: Path,
    device: str | None,
    index: Path,
    columns: Path | None,
    modality: str,
    allow_outside: bool,
    split: str | None,
    query: str,
    top: int,
    rejected_path: Path | None,
    text_policy: str,
    as_json: bool,
) -> None:
    """Find the reports of MANIFEST that fit a text or an image best.

    \b
    Examples:
      medvl search --model demo/model --index demo/data/manifest.csv --query "large left pneumothorax" --top 5
      medvl search --model demo/model --index demo/data/manifest.csv --query film.dcm --json
    """
    if not query.strip():
        raise click.UsageError("--query is empty")
    table = load_manifest(index, columns, allow_outside)
    encoder = load_model(model, device)
    wanted: str | Path = Path(query) if is_file(query) else query
    if isinstance(wanted, str) and Path(query).suffix.lower() in encoder.reader.suffixes:
        raise click.UsageError(f"--query {query}: no such file (it was not taken for a text: it ends like an image)")
    from medvl.types import RESEARCH_USE, UnreadableImageError
    from tasks.retrieval import build_index, studies_of
    from tasks.retrieval import search as find

    rows, source = table.select(split=split, modality=modality).rows, text_source(text_policy)
    studies = studies_of(rows, source)
    if not studies:
        raise click.UsageError(f"--index {index}: none of the {len(rows)} rows that were asked for has a report to search")
    report_rejected([(bad.path, str(bad)) for bad in table.rejected], f"rows of {index}", rejected_path)
    try:
        hits = find(encoder, wanted, build_index(encoder, studies), top)
    except UnreadableImageError as error:
        if as_json:
            click.echo(json_text({"query": query, "ok": False, "error": str(error), "hits": [], "notice": RESEARCH_USE}))
        click.echo(f"1 file rejected:\n  {error}", err=True)
        ctx.exit(REJECTED)
    if as_json:
        found = [{"rank": hit.rank, "study_id": hit.study_id, "score": hit.score, "sentence": hit.sentence} for hit in hits]
        kind = "image" if isinstance(wanted, Path) else "text"
        click.echo(
            json_text(
                {
                    "query": query,
                    "query_kind": kind,
                    "ok": True,
                    "error": None,
                    "hits": found,
                    "pool": len(studies),
                    "texts": source.spec(),
                    "notice": RESEARCH_USE,
                }
            )
        )
    else:
        from rich.markup import escape

        headings = ("rank", "study", "score", "sentence that fits best")
        title = f"{len(hits)} of {len(studies)} reports for: {query}"
        shown = new_table(title, *headings, numbers=("rank", "score"), whole=("study", "sentence that fits best"))
        for hit in hits:
            shown.add_row(str(hit.rank), escape(hit.study_id), f"{hit.score:.3f}", escape(hit.sentence))
        console().print(shown)
        echo_notice()
    if table.rejected:
        ctx.exit(REJECTED)


def is_file(query: str) -> bool:
    """Whether there is a file of that name; a text may be too long for one, or hold what no name may."""
    try:
        return Path(query).is_file()
    except (OSError, ValueError):
        return False
