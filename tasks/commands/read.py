"""``medvl read`` and ``medvl calibrate-reading``: what the reports of similar studies say of images, and when that may be an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tasks.commands.common import (
    REJECTED,
    cache_option,
    check_out_file,
    console,
    echo_notice,
    gathered,
    json_option,
    json_text,
    labelled_findings,
    load_manifest,
    load_model,
    manifest_options,
    model_options,
    new_table,
    progress,
    report_rejected,
    text_policy_option,
    text_source,
    usage_errors,
    validation_split_option,
    weights_sha256,
    write_csv,
)
from tasks.commands.diagnose import GivenStudy, find_studies, why_empty
from tasks.commands.index import archive_errors, store_option
from tasks.commands.leaks import leak_options, leaks_checked

if TYPE_CHECKING:
    from medvl.model import DualEncoder
    from tasks.archive.neighbours import NeighbourSearch, Query, Scope
    from tasks.archive.reading import Reading, ReadingSettings, ReadingStatement

F = TypeVar("F", bound=Callable[..., Any])
VOTE = ("finding", "call", "reason", "evidence", "agreement", "present", "absent", "uncertain", "silent", "speaking", "effective")
SHARES = "% +   -   ?  no"  # of the weight: present, absent, uncertain, nothing
SOURCES = 3  # studies named below a statement on a terminal; the rest are counted


@dataclass(frozen=True)
class ScopeOptions:
    """Where neighbours come from, and of what they are asked, as :func:`scope_options` has it."""

    store: str
    over: str | None
    where: str | None
    voting: str | None
    text_policy: str
    findings: tuple[str, ...]


def scope_options(command: F) -> F:
    """Where neighbours come from, and of what they are asked: the command gets ``asked``, :class:`ScopeOptions`."""
    command = gathered(ScopeOptions, "asked")(command)
    for option in (
        click.option("--finding", "findings", multiple=True, metavar="NAME", help="Only this finding (repeatable)."),
        text_policy_option,
        click.option("--voting", type=click.Choice(["report", "label"]), help="What votes: what reports say, unless told, or labels."),
        click.option("--filter", "where", metavar="EXPR", help="Which studies may vote, such as 'split = train'; see `medvl search`."),
        click.option("--over", type=click.Choice(["report", "image"]), help="The nearest reports, unless told, or the nearest images."),
        store_option,
    ):
        command = option(command)
    return command


@click.command(short_help="Say of images what the reports of similar studies say.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@model_options
@scope_options
@click.option("--settings", "settings_path", type=click.Path(path_type=Path), metavar="FILE", help="Of `medvl calibrate-reading`.")
@cache_option
@json_option
@click.option("--out", type=click.Path(path_type=Path), metavar="OUT.csv", help="Write a line a study and finding.")
@click.option("--rejected", "rejected_path", type=click.Path(path_type=Path), metavar="OUT", help="List unreadable files in a CSV.")
@click.pass_context
def read(
    ctx: click.Context,
    files: tuple[Path, ...],
    model: Path,
    device: str | None,
    asked: ScopeOptions,
    settings_path: Path | None,
    cache: Path | None,
    as_json: bool,
    out: Path | None,
    rejected_path: Path | None,
) -> None:
    """Read images by their neighbours: the studies of an archive nearest to each vote on every finding, one vote a patient, and a sentence
    of theirs is shown for what they agree on, with the studies that it comes from. Where they disagree, are few or far, it abstains.

    FILE is an image, a folder of them or a manifest, as for `medvl diagnose`. Studies of a patient that a manifest names do not vote on
    that patient, nor do those of the patient of a file that is in the archive; of a copy elsewhere nobody knows. Without --settings, calls
    are by limits that were fitted to nothing; `medvl calibrate-reading` fits them on validation studies, together with --over, --filter and
    --voting, which are then taken from there. What is shown are words on other patients, not a report on this one.

    \b
    Examples:
      medvl read film.dcm --store archive.db --model demo/model
      medvl read folder/ --store archive.db --model demo/model --settings reading.json --out readings.csv
      medvl read demo/data/manifest.csv --store archive.db --model demo/model --filter "split = train" --over image --json
    """
    check_out_file(out, "--out")
    check_out_file(rejected_path, "--rejected")
    from tasks.archive.reading import ReadingError, ReadingSettings, load_reading

    settings = ReadingSettings()
    if settings_path is not None:
        with usage_errors(ReadingError):
            settings = load_reading(settings_path)
    if settings_path is not None and (unknown := [name for name in asked.findings if name not in settings.limits]):
        raise click.UsageError(
            f"--finding {', '.join(unknown)}: {settings_path} was not fitted for it, but for {', '.join(settings.limits)}"
        )
    encoder = load_model(model, device, cache)
    from medvl.types import RESEARCH_USE
    from tasks.archive.reading import read as read_neighbours

    scope = _scope(encoder, model, asked, settings.fitted_on.get("scope"))
    if settings_path is not None:
        with usage_errors(ReadingError):
            scope.check(settings)
    wanted = list(dict.fromkeys(asked.findings)) or list(settings.limits) or None
    lines: list[Sequence[Any]] = []
    with _search(asked.store, scope, wanted) as search:
        if settings_path is None and search.silent_findings:
            raise click.UsageError(f"--finding {', '.join(search.silent_findings)}: the archive says nothing of it")
        _tell_of_archive(settings, search)
        how = {**scope.to_dict(), "fitted": settings_path is not None}
        given = find_studies(encoder.reader, files)
        rejected = list(given.rejected)
        with progress("studies", len(given.studies)) if out is not None else _quiet() as step:
            for query, paths, error in _queries(encoder, search, given.studies, rejected):
                step(1)
                found = None if query.vectors is None else read_neighbours(search.neighbours(query, settings.k), search.findings, settings)
                lines += [] if found is None else _lines(query.study_id, found)
                if as_json:
                    what = {"votes": [], "statements": []} if found is None else found.to_dict()
                    head = {"study": query.study_id, "paths": paths, "ok": found is not None, "error": error}
                    click.echo(json_text({**head, **what, "how": how, "notice": RESEARCH_USE}))
                elif out is None and found is not None:
                    click.echo("\n".join(paths))
                    _show(found, settings_path is not None)
    if out is not None:
        write_csv(out, ("study", *VOTE, "text", "support", "sources"), lines)
    if rejected_path is None and out is not None and rejected:
        rejected_path = out.with_name(f"{out.stem}.rejected.csv")
    report_rejected(rejected, "files", rejected_path)
    if not as_json:
        echo_notice()
    if rejected:
        ctx.exit(REJECTED)


@click.command("calibrate-reading", short_help="Fit when neighbours may answer.")
@click.argument("manifest", type=click.Path(path_type=Path), metavar="MANIFEST")
@model_options
@scope_options
@validation_split_option
@click.option(
    "--error",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="How often a call may be wrong, on either side.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Where to, such as reading.json.")
@leak_options
@cache_option
@manifest_options
@click.pass_context
def calibrate_reading(
    ctx: click.Context,
    manifest: Path,
    model: Path,
    device: str | None,
    asked: ScopeOptions,
    split: str,
    error: float,
    out: Path,
    trained_on: tuple[Path, ...],
    allowed: tuple[str, ...],
    cache: Path | None,
    columns: Path | None,
    modality: str,
    allow_outside: bool,
) -> None:
    """Choose on the validation studies of a MANIFEST how many neighbours vote and with which weights, and for each finding how much they
    must agree, so that calls of present and calls of absent are each shown to be wrong at most --error of the time, with 90% confidence for
    each finding; where that is shown at no level, the finding is never called so.

    It holds for patients like these, this archive and what neighbours were asked for; all of it is recorded, and `medvl read` refuses to
    read by other ones. No study that may vote may be of a validation patient: leave them out of the archive, or with --filter. Half of the
    patients choose, the other half prove, each with one study: some 30 right calls of a kind and none wrong are needed.

    \b
    Examples:
      medvl calibrate-reading demo/data/manifest.csv --store archive.db --filter "split = train" --model demo/model --out reading.json
      medvl calibrate-reading films.csv --store archive.db --over image --model demo/model --error 0.05 --out reading.json
    """
    check_out_file(out, "--out")
    table = load_manifest(manifest, columns, allow_outside)
    rows = table.select(split=split, modality=modality).rows
    known = labelled_findings(rows)
    if not known:
        raise click.UsageError(f"{manifest}: no {modality} row of split {split!r} has a label")
    if missing := [name for name in asked.findings if name not in known]:
        raise click.UsageError(f"--finding {', '.join(missing)}: no {modality} row of split {split!r} has a label of it")
    encoder = load_model(model, device, cache)
    import numpy as np

    from medvl.data.studies import by_study
    from tasks.archive.reading import KS, fit_reading
    from tasks.evaluation import joined_labels

    scope = _scope(encoder, model, asked)
    rejected = [(str(bad.path), str(bad)) for bad in table.rejected]
    with _search(asked.store, scope, list(dict.fromkeys(asked.findings)) or known) as search:
        voted = [name for name in search.findings if name not in search.silent_findings]
        if not voted:
            raise click.UsageError(f"the archive says nothing of {', '.join(search.findings)}")
        groups = list(by_study(rows).values())
        studies = [
            GivenStudy(rows[g[0]].study_id, [rows[i].path for i in g], tuple(sorted({rows[i].patient_id for i in g}))) for g in groups
        ]
        _refuse_own(search, studies)
        checked: dict[str, Any] = {"model": model, "trained_on": trained_on, "columns": columns, "allow_outside": allow_outside}
        leaks = leaks_checked(encoder.reader, manifest, table, rows, split, out.absolute().parent, allowed=allowed, **checked)
        ks = [k for k in KS if k <= search.patients] or [search.patients]
        near, truth, names, patients = [], [], [], []
        labels = joined_labels(rows, voted, "study")
        with progress("studies", len(groups)) as done:
            for group, (query, _, _) in zip(groups, _queries(encoder, search, studies, rejected), strict=True):
                done(1)
                if query.vectors is not None:
                    near.append(search.neighbours(query, max(ks), sentences=False))
                    truth.append(labels[group[0]])
                    names.append(query.study_id)
                    patients.append(rows[group[0]].patient_id)
        if not near:
            raise click.UsageError(f"none of {len(groups)} studies could be read")
        record = {"split": split, "manifest_sha256": table.sha256, "leak_check": leaks, "scope": scope.to_dict(), "archive": search.facts()}
        with usage_errors(ValueError):
            settings = fit_reading(near, np.array(truth), voted, names, patients, ks=ks, error=error, fitted_on=record)
    settings.save(out)
    _show_fit(settings)
    for name in search.silent_findings:
        click.echo(f"left out: {name}: the archive says nothing of it", err=True)
    click.echo(f"Written to {out}.")
    report_rejected(rejected, "files and rows")
    echo_notice()
    if rejected or search.silent_findings:
        ctx.exit(REJECTED)


def _scope(encoder: DualEncoder, model: Path, options: ScopeOptions, fitted: Any = None) -> Scope:
    """What is asked for; what is not told, as settings were fitted, where there are."""
    from tasks.archive.ingest import model_key
    from tasks.archive.neighbours import Scope

    known = fitted if isinstance(fitted, dict) else {}
    told = (("over", options.over), ("filter", options.where), ("voting", options.voting))
    given = {name: value for name, value in told if value is not None}
    asked = {name: known[name] for name in ("over", "filter", "voting") if name in known} | given
    with usage_errors(ValueError):
        return Scope(model_key(encoder, weights_sha256(model), text_source(options.text_policy)), **asked)


@contextmanager
def _search(store: str, scope: Scope, findings: Sequence[str] | None) -> Iterator[NeighbourSearch]:
    """An archive to be asked for neighbours, let go of at the end; its errors, and those of a filter, as usage errors."""
    from reports.facts.ontology import load_ontology
    from tasks.archive.filters import FilterError
    from tasks.archive.neighbours import NeighbourSearch
    from tasks.archive.opening import open_store
    from tasks.archive.search import Archive

    with archive_errors(), usage_errors(FilterError):
        archive = Archive(open_store(store))
        try:
            yield NeighbourSearch(archive, scope, load_ontology(), findings)
        finally:
            archive.close()


@contextmanager
def _quiet() -> Iterator[Callable[[int], None]]:
    """In the place of a progress bar, where results are printed as they come."""
    yield lambda done: None


def _queries(
    encoder: DualEncoder, search: NeighbourSearch, studies: Sequence[GivenStudy], rejected: list[tuple[str, str]]
) -> Iterator[tuple[Query, list[str], str | None]]:
    """Each study as a query, with its files and why some could not be read; these are added to ``rejected``, an empty folder as such."""
    from tasks.archive.ingest import Encoder
    from tasks.archive.neighbours import queries

    lost: list[tuple[str, str]] = []
    reasons: dict[str, str] = {}
    for one, query in zip(studies, queries(Encoder(encoder), search.with_known_patients(studies), lost), strict=True):
        reasons |= {path: why_empty(Path(path), encoder.reader) or reason for path, reason in lost}
        lost.clear()
        paths = [str(path) for path in one.paths]
        own = [(path, reasons[path]) for path in dict.fromkeys(paths) if path in reasons]
        rejected += own
        yield query, paths, "; ".join(reason for _, reason in own) or None


def _refuse_own(search: NeighbourSearch, studies: Sequence[GivenStudy]) -> None:
    """See that no study that may vote is of a patient that settings are to be fitted on.

    Raises:
        click.UsageError: some are.
    """
    from tasks.archive.neighbours import Query

    asking = [Query(name, None, tuple(patients)) for name, _, patients in search.with_known_patients(studies)]
    if shared := [one.study_id for one in asking if (search.own(one) & search.allowed).any()]:
        raise click.UsageError(
            f"{len(shared)} of {len(asking)} validation studies, {shared[0]} among them, are of patients whose studies may vote; leave "
            "these out of the archive, or of the vote, as with --filter 'split = train'"
        )


def _tell_of_archive(settings: ReadingSettings, search: NeighbourSearch) -> None:
    """Say where settings were fitted against another archive, or against less of this one."""
    known, own = settings.fitted_on.get("archive"), search.facts()
    if known is not None and known != own:
        which = "another archive" if known.get("store") != own["store"] else "this archive as it was"
        click.echo(
            f"settings were fitted against {which}: {known.get('studies')} studies of {known.get('patients')} patients might vote, now "
            f"{own['studies']} of {own['patients']}; that calls are right as often holds for what they were fitted against",
            err=True,
        )


def _lines(study: str, found: Reading) -> Iterator[Sequence[Any]]:
    """A line for each finding; a number that is not there is empty, as is what no statement was made of."""
    for vote in found.votes:
        told = vote.to_dict()
        statement = next((one for one in found.statements if vote.finding in one.claims), None)
        text, support, sources = ("", "", "") if statement is None else (statement.text or "", statement.support, _sources(statement))
        yield (study, *("" if told[name] is None else told[name] for name in VOTE), text, support, sources)


def _sources(statement: ReadingStatement) -> str:
    return json_text(statement.to_dict()["sources"])


def _show(found: Reading, fitted: bool) -> None:
    """One study for a person."""
    from rich.markup import escape

    kind = "+ present, - absent, ? uncertain, no: not mentioned; "
    kind += "limits as fitted on validation" if fitted else "limits that were fitted to nothing: see `medvl calibrate-reading`"
    spoken = [vote for vote in found.votes if vote.speaking]
    silent = len(found.votes) - len(spoken)
    best = "" if math.isnan(found.best_score) else f", the best score {found.best_score:.3f}"
    notes = [f"{found.neighbours} studies of {found.patients} patients vote, worth {found.effective:.1f} equal ones{best}", kind]
    notes += [f"{silent} findings that none of them mentions are left out"] if silent else []
    numbers = ("evidence", "agree", SHARES, "patients")
    shown = new_table(None, "finding", "call", *numbers, numbers=numbers, whole=("finding", "call"), caption="; ".join(notes))
    for vote in spoken:
        call = vote.call if vote.reason is None else f"- {vote.reason}"
        figures = ("" if math.isnan(value) else f"{value:.2f}" for value in (vote.evidence, vote.agreement))
        shares = " ".join(f"{100 * share:.0f}".rjust(3) for share in (vote.present, vote.absent, vote.uncertain, vote.silent))
        shown.add_row(escape(vote.finding), call, *figures, shares, str(vote.speaking))
    console().print(shown)
    if not found.statements:
        return
    said = new_table(None, "what neighbours say", "support", "from", numbers=("support",), whole=("what neighbours say", "from"))
    for one in found.statements:
        claims = ", ".join(f"{name} {state}" for name, state in one.claims.items())
        sources = [f"{source.study_id} (score {source.score:.3f}, weight {source.weight:.2f})" for source in one.sources[:SOURCES]]
        sources += [f"and {len(one.sources) - SOURCES} more"] if len(one.sources) > SOURCES else []
        said.add_row(escape(claims if one.text is None else f"{one.text}\n  {claims}"), f"{one.support:.2f}", escape("\n".join(sources)))
    console().print(said)


def _show_fit(settings: ReadingSettings) -> None:
    """What was fitted and what was measured, for a person."""
    from rich.markup import escape

    of = settings.fitted_on
    weights = "by distance" if settings.temperature is None else f"at temperature {settings.temperature:g}"
    notes = (
        f"{settings.k} patients vote, weighed {weights}; a report that does not mention a finding "
        f"{'says that it is absent' if settings.silent == 'absent' else 'says nothing'}; nothing is read whose best score is below "
        f"{settings.floor:.3f}; chosen on {of['patients_chosen_on']} patients at macro AUROC {of['macro_auroc_chosen_on']:.3f}, shown on "
        f"{of['patients_proven_on']} others; the figures are of these studies, not of new ones"
    )
    heads = ("finding", "called present", "called absent")
    table = new_table(None, *heads, whole=heads, caption=notes)
    for name, one in of["limits"].items():
        table.add_row(escape(name), *(_limit(one[side]) for side in ("present", "absent")))
    console().print(table)


def _limit(side: dict[str, Any]) -> str:
    """The level of one side of a finding, and what was called by it."""
    return "never" if side["level"] is None else f"from {side['level']:.2f}: {side['wrong']} of {side['called']} wrong"
