"""``medvl search``: ask an archive by texts, images, studies, or all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tasks.commands.common import (
    REJECTED,
    check_out_file,
    console,
    echo_notice,
    json_option,
    json_text,
    load_model,
    model_options,
    new_table,
    report_rejected,
    text_policy_option,
    text_source,
    usage_errors,
    weights_sha256,
)
from tasks.commands.index import archive_errors, store_option

if TYPE_CHECKING:
    from medvl.model import DualEncoder
    from tasks.archive.search import Archive, ArchiveHit, Mask


@click.command()
@model_options
@store_option
@click.option(
    "--query", "queries", multiple=True, metavar="TEXT|FILE", help="What to look for; an image if there is such a file, else a text."
)
@click.option("--like", "like", multiple=True, metavar="STUDY", help="Look for studies like this one of the archive.")
@click.option("--unlike", "unlike", multiple=True, metavar="STUDY|FILE|TEXT", help="An example of what is not wanted.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, metavar="K", help="How many studies.")
@click.option("--filter", "where", metavar="EXPR", help="Which studies may answer, such as 'age >= 60 and present(edema)'.")
@click.option("--match", metavar="EXPR", help="Words that reports must have: '\"ground glass\" NOT indication:cough'.")
@click.option(
    "--mode",
    type=click.Choice(["hybrid", "vector", "text"]),
    help="By vectors, by words, or both; both for texts unless told, else vectors.",
)
@click.option("--over", type=click.Choice(["sentence", "report", "image"]), help="Which vectors answer.")
@click.option(
    "--correct",
    type=click.Choice(["centre", "csls"]),
    help="Take out the gap between images and texts (centre), or what is near to every question (csls).",
)
@click.option("--all-duplicates", is_flag=True, help="Show every report of the same words as a hit of its own.")
@text_policy_option
@click.option("--html", type=click.Path(path_type=Path), metavar="OUT", help="Write a page with pictures and the sentences that matched.")
@json_option
@click.pass_context
def search(
    ctx: click.Context,
    model: Path,
    device: str | None,
    store: str,
    queries: tuple[str, ...],
    like: tuple[str, ...],
    unlike: tuple[str, ...],
    top: int,
    where: str | None,
    match: str | None,
    mode: str | None,
    over: str | None,
    correct: str | None,
    all_duplicates: bool,
    text_policy: str,
    html: Path | None,
    as_json: bool,
) -> None:
    """Find the studies of an archive that fit texts, images, or studies of it best.

    Several --query are one question: texts sentence by sentence, an image and a text as their sum. Reports of the same words are one hit.
    A --filter decides before anything is ranked: fields study_id, patient_id, modality, view, split, date, sex, age, source;
    present(FINDING), absent, uncertain, mentioned of what reports say; label(FINDING) = 1; and, or, not, in (...).

    \b
    Examples:
      medvl search --store archive.db --model demo/model --query "large left pneumothorax"
      medvl search --store archive.db --model demo/model --query film.dcm --filter "modality = xray and age >= 60" --json
      medvl search --store archive.db --model demo/model --query film.dcm --query "without a chest tube" --html hits.html
      medvl search --store archive.db --model demo/model --like S17 --unlike S4 --over image
    """
    if not (queries or like):
        raise click.UsageError("nothing is asked: give --query TEXT, --query FILE or --like STUDY")
    if any(not query.strip() for query in queries):
        raise click.UsageError("--query is empty")
    check_out_file(html, "--html")
    encoder = load_model(model, device)
    texts: list[str] = []
    files: list[str] = []
    for query in queries:
        (files if _is_image(query, encoder) else texts).append(query)
    from medvl.types import RESEARCH_USE, UnreadableImageError
    from tasks.archive.asking import Wanted, question_of
    from tasks.archive.filters import FilterError
    from tasks.archive.ingest import model_key
    from tasks.archive.opening import open_store
    from tasks.archive.search import Archive

    with archive_errors(), usage_errors(FilterError):
        archive = Archive(open_store(store))
        number = archive.model(model_key(encoder, weights_sha256(model), text_source(text_policy)))
        wanted = Wanted(
            tuple(texts),
            tuple(Path(file) for file in files),
            like,
            tuple(Path(one) if is_file(one) else one for one in unlike),
            over,  # type: ignore[arg-type]
            mode,  # type: ignore[arg-type]
            correct,  # type: ignore[arg-type]
            _allowed(archive, where, match),
            top,
            not all_duplicates,
        )
        try:
            question = question_of(wanted, archive, encoder, number)
        except UnreadableImageError as error:
            if as_json:
                click.echo(json_text({"query": list(queries), "ok": False, "error": str(error), "hits": [], "notice": RESEARCH_USE}))
            click.echo(f"1 file rejected:\n  {error}", err=True)
            ctx.exit(REJECTED)
        hits, recall = archive.search(question, number), archive.recall(question, number)
        pool = int(wanted.allowed.sum()) if wanted.allowed is not None else len(archive.derived.numbers)
    used = "hybrid" if question.vectors is not None and question.words is not None else "text" if question.vectors is None else "vector"
    if html is not None:
        from tasks.page.hits import write_hits

        facts = f"{len(hits)} of {pool} studies, {used}" + (f", {where}" if where else "") + (f", words {match}" if match else "")
        asked = [*texts, *(f"like {study}" for study in like), *(f"unlike {one}" for one in unlike)]
        lost = write_hits(html, hits, encoder, asked=asked, images=wanted.files, texts=texts, facts=facts)
        report_rejected(lost, "images to show")
    if as_json:
        told = {
            "query": list(queries),
            "like": list(like),
            "unlike": list(unlike),
            "mode": used,
            "over": question.over,
            "correction": question.correction,
            "filter": where,
            "match": match,
            "ok": True,
            "error": None,
            "recall_at_10_of_index": recall,
            "hits": [as_dict(hit) for hit in hits],
            "pool": pool,
            "notice": RESEARCH_USE,
        }
        click.echo(json_text(told))
        return
    from rich.markup import escape

    headings = ("rank", "study", "score", "sentences that fit best")
    how = used if recall is None else f"{used}, by an approximate index of recall@10 {recall:.3f}"
    title = f"{len(hits)} of {pool} studies for: {_told(queries, like)} ({how})"
    shown = new_table(title, *headings, numbers=("rank", "score"), whole=("study", "sentences that fit best"))
    for hit in hits:
        said = [one.words if one.words is not None else f"sentence {one.text}" for one in hit.sentences]
        same = [f"({len(hit.same_report)} more with this report)"] if hit.same_report else []
        shown.add_row(str(hit.rank), escape(hit.study.study_id), f"{hit.score:.3f}", escape("\n".join([*said, *same])))
    console().print(shown)
    if html is not None:
        click.echo(f"page: {html}")
    echo_notice()


def as_dict(hit: ArchiveHit) -> dict[str, Any]:
    """A hit for strict JSON."""
    told = hit.study.metadata
    return {
        "rank": hit.rank,
        "study_id": hit.study.study_id,
        "score": hit.score,
        "vector_score": hit.vector_score,
        "text_score": hit.text_score,
        "sentences": [{"text": one.words, "score": one.score} for one in hit.sentences],
        "same_report": list(hit.same_report),
        **{name: told[name] for name in ("modality", "view", "split", "date", "sex", "age")},
        "findings": dict(hit.study.findings),
        "images": [path for path, _ in hit.study.images],
    }


def _told(queries: tuple[str, ...], like: tuple[str, ...]) -> str:
    return " + ".join([*queries, *(f"like {study}" for study in like)])


def _allowed(archive: Archive, where: str | None, match: str | None) -> Mask | None:
    """What --filter and --match leave."""
    from tasks.archive.filters import parse_filter

    allowed: Mask | None = None
    if where is not None:
        derived = archive.derived
        allowed = parse_filter(where, derived.findings).mask(derived.columns)
    if match is not None:
        fits = archive.matching(match)
        allowed = fits if allowed is None else allowed & fits
    return allowed


def _is_image(query: str, encoder: DualEncoder) -> bool:
    """Whether a query is an image.

    Raises:
        click.UsageError: it ends like one, and there is no such file.
    """
    if is_file(query):
        return True
    if Path(query).suffix.lower() in encoder.reader.suffixes:
        raise click.UsageError(f"--query {query}: no such file (it was not taken for a text: it ends like an image)")
    return "/" in query and _is_folder(query)  # of a series; a word may be the name of a folder by chance


def is_file(query: str) -> bool:
    """Whether there is a file of that name; a text may be too long for one, or hold what no name may."""
    try:
        return Path(query).is_file()
    except (OSError, ValueError):
        return False


def _is_folder(query: str) -> bool:
    """Whether there is a folder of that name."""
    try:
        return Path(query).is_dir()
    except (OSError, ValueError):
        return False
