"""``medvl diagnose``: a score per finding for the studies that image files make up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tasks.commands.common import (
    REJECTED,
    cache_option,
    check_out_file,
    check_out_folder,
    console,
    echo_notice,
    json_option,
    json_text,
    load_manifest,
    load_model,
    model_options,
    new_table,
    progress,
    prompts_option,
    report_rejected,
    usage_errors,
    write_csv,
)
from tasks.commands.scores import (
    decisions_of,
    decisions_option,
    familiar_of,
    labels_option,
    preset_option,
    prompts_of,
    score_protocol,
    scoring_of,
)

if TYPE_CHECKING:
    from rich.table import Table

    from medvl.data.manifest import StudyImage
    from medvl.model import DualEncoder
    from medvl.types import ImageReader
    from tasks.decisions import Decisions
    from tasks.diagnosis_table import DiagnosisTable
    from tasks.protocols import ScoreProtocol
    from tasks.scoring import Scorer
    from tasks.zero_shot import Diagnosis, PromptBank, SliceScores

BAR = 24  # characters of a full bar
TABLES = (".csv", ".parquet", ".pq")


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@model_options
@prompts_option
@click.option("--finding", "findings", multiple=True, metavar="NAME", help="Score only this finding (repeatable).")
@labels_option
@preset_option
@cache_option
@json_option
@click.option("--out", type=click.Path(path_type=Path), metavar="OUT", help="Write a line a study to OUT.csv or OUT.jsonl, as it is known.")
@click.option("--anew", is_flag=True, help="Begin --out anew, not where it was stopped.")
@click.option("--sr", "sr_folder", type=click.Path(path_type=Path), metavar="DIR", help="Write a DICOM SR of each study (extra 'sr').")
@click.option(
    "--explain",
    "explain_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write what each study's scores are made of: a JSON, and a page with maps.",
)
@decisions_option
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), metavar="OUT", help="Write the scores as a table at the end.")
@click.option("--rejected", "rejected_path", type=click.Path(path_type=Path), metavar="OUT", help="List unreadable files in a CSV.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Images encoded at once.")
@click.pass_context
def diagnose(
    ctx: click.Context,
    files: tuple[Path, ...],
    model: Path,
    device: str | None,
    prompts: Path | None,
    findings: tuple[str, ...],
    labels: str | None,
    preset: str | None,
    cache: Path | None,
    as_json: bool,
    out: Path | None,
    anew: bool,
    sr_folder: Path | None,
    explain_folder: Path | None,
    decisions_path: Path | None,
    csv_path: Path | None,
    rejected_path: Path | None,
    batch_size: int,
) -> None:
    """Score findings in images by comparing them with prompts.

    FILE is an image (DICOM, PNG, JPEG, TIFF), with a CT model a volume (NIfTI, MHA, NRRD, a zip or the folder of a DICOM series), a folder
    of them, or a manifest (.csv, .parquet) whose studies are scored; in folders tables and what is named masks are passed over. DICOM
    films, and series folders, whose headers name the same study are one, scored by the mean over its images, or from all of them together
    where the model pools views or series; a picture is a study of its own. With --json one object a line per study, in order, as soon as
    it is known; of a volume it has the score of every slice, each as if it were the whole study. Scores are no probabilities, unless
    `medvl calibrate` has made them so on validation studies. --explain writes, for each study, what each visual sign (or prompt) and each
    image adds to each score, and a page that shows where in the image the signs of the highest scores are found.

    \b
    Examples:
      medvl diagnose film.dcm --model demo/model
      medvl diagnose folder/ other.png --model demo/model --json --rejected bad.csv
      medvl diagnose film.dcm --model demo/model --finding pneumothorax --finding edema
      medvl diagnose folder/ --model demo/model --labels chexpert_14 --preset xplainer --out scores.csv
      medvl diagnose film.dcm --model demo/model --prompts chest_xray --preset xplainer --explain explained
      medvl diagnose volume.nii.gz series_folder/ --model demo_ct/model
    """
    prompt_set = prompts_of(prompts, labels)
    if unknown := [name for name in findings if name not in prompt_set.findings]:
        raise click.UsageError(f"--finding {', '.join(unknown)}: no prompts for it; known: {', '.join(prompt_set.findings)}")
    check_out_file(csv_path, "--csv")
    check_out_file(out, "--out")
    check_out_file(rejected_path, "--rejected")
    if sr_folder is not None:
        check_out_folder(sr_folder, "--sr")
    if explain_folder is not None:
        check_out_folder(explain_folder, "--explain")
    encoder = load_model(model, device, cache)
    from medvl.types import UnreadableImageError
    from tasks.familiarity import place_of
    from tasks.protocols import sha256_of
    from tasks.scoring import Scorer
    from tasks.zero_shot import diagnose as score_files

    published = {} if labels is None else {finding: label for label, finding in prompt_set.label_set(labels).items()}
    wanted = list(dict.fromkeys(findings)) or list(published) or None
    scoring = scoring_of(encoder, preset, prompt_set, wanted, labels)
    names = {name: published.get(name, name) for name in scoring.findings}
    protocol = score_protocol(model, encoder, preset, prompt_set, scoring, labels)
    decisions = decisions_of(decisions_path, model, protocol, scoring.findings)
    familiar = familiar_of(decisions_path, model, encoder, protocol)
    fingerprint = sha256_of([protocol.sha256, scoring.findings, None if decisions is None else decisions.to_dict(), *familiar.hashes])
    found = find_studies(encoder.reader, files)
    shown = None if as_json or out is not None else console()
    kept: list[Diagnosis] = []
    rejected = list(found.rejected)
    unknown_kinds: set[str] = set()
    with ExitStack() as stack:
        table = None if out is None else stack.enter_context(_table(out, list(names.values()), fingerprint, decisions is not None, anew))
        if table is not None and isinstance(scoring, Scorer) and scoring.rule.depends_on_run and table.done:
            raise click.UsageError(f"--preset {preset}: its scores depend on all studies of a run, which cannot go on; give --anew")
        todo = [one for one in found.studies if table is None or one.study_id not in table.done]
        step = stack.enter_context(progress("studies", len(found.studies))) if out is not None else None
        if step is not None and table is not None:
            step(len(found.studies) - len(todo))
            rejected += table.rejected
        results = score_files(encoder, (), scoring, batch_size, [one.paths for one in todo])
        for (name, _, _), result in zip(todo, results, strict=True):
            one = named_if_empty_folder(result, encoder.reader)
            one = replace(one, unfamiliar=familiar.reasons(one))
            unknown_kinds |= {of.modality for of in one.encoded} - set(familiar.known)
            raw = one
            if decisions is not None and one.ok:
                one = replace(one, findings=decisions.probabilities(one.findings))
            rejected += one.unreadable.items() if table is None else [(one.path, one.error)] if one.error else []
            if csv_path is not None:
                kept.append(one)
            if explain_folder is not None and one.ok:
                how = {
                    "model": model.name,
                    "preset": str(protocol.rule["name"]),
                    "prompts": protocol.prompts_sha256,
                    "protocol": fingerprint,
                }
                try:
                    page = _write_explanation(
                        explain_folder, name, encoder, raw, scoring, names, how, one if decisions is not None else None
                    )
                except (UnreadableImageError, OSError) as error:  # it was there a moment ago, to be scored
                    rejected.append((one.path, f"no explanation: {error}"))
                else:
                    if out is None and not as_json:
                        click.echo(f"Open {page}.")
            if table is not None:
                scores = {names[key]: value for key, value in one.findings.items()}
                table.add(name, one.ok, one.error, scores, one.paths, one.unfamiliar_text)
            if sr_folder is not None and one.ok:
                rejected += _write_sr(sr_folder, one, names, model, protocol, fingerprint, decisions is not None)
            if step is not None:
                step(1)
            if as_json:
                click.echo(json_text({**as_object(one, names, decisions), "protocol": fingerprint}))
            elif shown is not None and one.ok:
                click.echo("\n".join(one.paths))
                shown.print(as_table(one, names, decisions))
    if csv_path is not None:
        _write_table(csv_path, kept, names)
    if rejected_path is None and out is not None and rejected:
        rejected_path = out.with_name(f"{out.stem}.rejected.csv")
    report_rejected(rejected, "files", rejected_path)
    if table is not None and table.unfamiliar:
        click.echo(f"{table.unfamiliar} of {len(table.done)} studies are not what the model was made for: column 'unfamiliar'", err=True)
    for kind in sorted(unknown_kinds):
        told = f"no {place_of(model, kind)}, which `medvl calibrate` makes"
        click.echo(f"{kind}: what images look like is not compared with those of validation: {told}", err=True)
    if not as_json:
        echo_notice()
    if rejected:
        ctx.exit(REJECTED)


class GivenStudy(NamedTuple):
    """A study that a command was given."""

    study_id: str  # of a manifest; else the path of its first file
    paths: list[Path]
    patients: tuple[str, ...] = ()  # that the rows of a manifest name


@dataclass(frozen=True)
class Found:
    """What a command was given: studies, and what of a manifest cannot be used."""

    studies: list[GivenStudy]
    rejected: list[tuple[str, str]]


def find_studies(reader: ImageReader, files: Sequence[Path]) -> Found:
    """The studies of files and folders by their headers, of a manifest as it says."""
    from tasks.zero_shot import group_by_study

    tables = [path for path in files if path.is_file() and path.suffix.lower() in TABLES]
    images = find_images(reader, [path for path in files if path not in tables])
    studies = [GivenStudy(str(paths[0]), paths) for paths in group_by_study(reader, images)]
    rejected: list[tuple[str, str]] = []
    for path in tables:
        manifest = load_manifest(path, None, allow_outside=True)
        rejected += [(str(bad.path), str(bad)) for bad in manifest.rejected]
        of: dict[str, list[StudyImage]] = {}
        for row in manifest.rows:
            of.setdefault(row.study_id, []).append(row)
        studies += [
            GivenStudy(name, [row.path for row in rows], tuple(sorted({row.patient_id for row in rows}))) for name, rows in of.items()
        ]
    return Found(studies, rejected)


def _table(out: Path, labels: list[str], protocol: str, calibrated: bool, anew: bool) -> DiagnosisTable:
    from tasks.diagnosis_table import DiagnosisTable

    with usage_errors(ValueError):
        return DiagnosisTable(out, labels, protocol, calibrated, anew)


def _write_sr(
    folder: Path, result: Diagnosis, names: dict[str, str], model: Path, protocol: ScoreProtocol, fingerprint: str, calibrated: bool
) -> list[tuple[str, str]]:
    """A DICOM SR of a study in the folder; or the study and why there is none."""
    from tasks.structured_report import SrProvenance, write_report

    hashes = (protocol.prompts_sha256, protocol.preprocessing_sha256)
    provenance = SrProvenance(model.name, *hashes, str(protocol.rule["name"]), fingerprint, calibrated)
    sources = [Path(path) for path in result.paths if path not in result.unreadable]
    reasons = tuple(dict.fromkeys(reason for _, reason in result.unfamiliar))  # without paths, which may hold a name
    try:
        write_report(folder, sources, {names[name]: score for name, score in result.findings.items()}, provenance, unfamiliar=reasons)
    except ValueError as error:
        return [(result.path, f"no SR: {error}")]
    return []


def _write_explanation(
    folder: Path,
    name: str,
    encoder: DualEncoder,
    raw: Diagnosis,
    scoring: PromptBank | Scorer,
    names: dict[str, str],
    facts: dict[str, str],
    calibrated: Diagnosis | None,
) -> Path:
    """A study's explanation as JSON and as a page, both named after the study; the page.

    Args:
        name: id of the study; files are named after it and, by a hash, its images: its first film alone is another study.
        raw: its scores; ``calibrated`` has probabilities in their place, where there are.
    """
    from medvl.files import write_atomically
    from tasks.explanation import explain
    from tasks.grounding import slug
    from tasks.page.explanation import write_explanation
    from tasks.scoring import Scorer

    of_run = isinstance(scoring, Scorer) and scoring.rule.depends_on_run
    found = explain(encoder, raw, scoring, list(raw.findings.values()) if of_run else None)
    probabilities = None if calibrated is None else dict(calibrated.findings)
    of = hashlib.sha256("\0".join((name, *raw.paths)).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    base = folder / f"{slug(Path(name).name)[:60]}-{of}"
    told = found.to_dict() | {"study": name, "how": facts, "unfamiliar": raw.unfamiliar_text}
    for one in told["findings"]:
        one["label"] = names[one["finding"]]
        one["probability"] = None if probabilities is None else probabilities[one["finding"]]
    write_atomically(base.with_suffix(".json"), (json_text(told) + "\n").encode("utf-8", "surrogateescape"))
    return write_explanation(
        base.with_suffix(".html"), encoder, found, facts, called=names, probabilities=probabilities, unfamiliar=raw.unfamiliar_text
    )


def _write_table(path: Path, results: Sequence[Diagnosis], names: dict[str, str]) -> None:
    write_csv(
        path,
        ("path", "paths", "ok", "error", *names.values(), "unfamiliar"),
        (
            (
                *(r.path, json_text(r.paths), int(r.ok), r.error or ""),
                *(repr(r.findings[name]) if r.ok else "" for name in names),
                r.unfamiliar_text or "",
            )
            for r in results
        ),
    )


def find_images(reader: ImageReader, files: Sequence[Path]) -> list[Path]:
    """The files in the order given, a folder replaced by the images in it; a folder without one stays, to be rejected by name."""
    found: list[Path] = []
    for path in files:
        found += (reader.find_images(path) or [path]) if path.is_dir() else [path]
    return found


def named_if_empty_folder(result: Diagnosis, reader: ImageReader) -> Diagnosis:
    """A folder in which the reader finds no image says so; one that is itself an image, as of a series, keeps its error."""
    error = None if result.ok else why_empty(Path(result.path), reader)
    return result if error is None else replace(result, error=error, unreadable={result.path: error})


def why_empty(path: Path, reader: ImageReader) -> str | None:
    """What to say of a folder in which the reader finds no image; None of any other path."""
    if not path.is_dir() or reader.find_images(path):
        return None
    return f"{path}: no image in this folder; expected DICOM files or {', '.join(sorted(reader.suffixes - {'.dcm', '.dicom'}))}"


def as_object(result: Diagnosis, names: dict[str, str] | None = None, decisions: Decisions | None = None) -> dict[str, Any]:
    """One study as JSON has it; ``slices`` only of volumes from a tower that keeps slices, ``signs`` only of rules that have them.

    Args:
        names: what findings are called, if not by their ids.
        decisions: what made probabilities of its scores.
    """
    from medvl.types import RESEARCH_USE

    called = names or {}

    return {
        "path": result.path,
        "paths": list(result.paths),
        "ok": result.ok,
        "error": result.error,
        "findings": {called.get(name, name): score for name, score in result.findings.items()},
        **({"signs": {called.get(name, name): of for name, of in result.signs.items()}} if result.signs else {}),
        **({"slices": [asdict(one) for one in result.slices]} if result.slices else {}),
        **({"decisions": _called(decisions.decide(result.findings), called)} if decisions is not None and result.ok else {}),
        "calibrated": decisions is not None,
        "unfamiliar": result.unfamiliar_text,
        "warnings": list(result.warnings),
        "notice": RESEARCH_USE,
    }


def _called(of_findings: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in of_findings.items()}


def as_table(result: Diagnosis, names: dict[str, str] | None = None, decisions: Decisions | None = None) -> Table:
    """One study for a person; below a finding its signs, where a rule has them, the strongest first."""
    kind = "scores are not calibrated: compare studies, not findings"
    if decisions is not None:
        coverage = decisions.fitted_on.get("coverage")
        kind = f"probabilities, calibrated on validation; what cannot be ruled out at {coverage:.0%} coverage"
    told = [f"not what the model was made for: {result.unfamiliar_text}"] if result.unfamiliar else []
    notes = "; ".join((kind, *told, *([result.error] if result.error else []), *result.warnings))
    called = {} if decisions is None else decisions.decide(result.findings)
    deep = (*(("not ruled out",) if called else ()), *(("best slice",) if result.slices else ()))
    bar = "0" + "1".rjust(BAR - 1) if all(0 <= score <= 1 for score in result.findings.values()) else ""
    table = new_table(
        None,
        "finding",
        "score" if decisions is None else "probability",
        bar,
        *deep,
        numbers=("score", "probability"),
        whole=("finding", *deep),
        caption=notes,
    )
    inside = all(0 <= score <= 1 for score in result.findings.values())
    for name, score in result.findings.items():
        best: tuple[str, ...] = (" or ".join(called[name]["set"]) or "nothing: unlike validation",) if called else ()
        best += ("; ".join(_best_slice(one, name) for one in result.slices),) if result.slices else ()
        table.add_row((names or {}).get(name, name), f"{score:.3f}", "█" * round(score * BAR) if inside else "", *best)
        for sign, value in sorted(result.signs.get(name, {}).items(), key=lambda pair: -pair[1]):
            table.add_row(f"  {sign}", f"{value:.3f}", "░" * round(value * BAR) if inside else "")
    return table


def _best_slice(of: SliceScores, finding: str) -> str:
    """The slice of a volume that speaks most for a finding: its place in the file, from 0, and its height in the patient."""
    scores = of.findings[finding]
    best = max(range(len(scores)), key=scores.__getitem__)
    return f"{of.index[best]:.0f} (z {of.z_mm[best]:.0f} mm): {scores[best]:.3f}"
