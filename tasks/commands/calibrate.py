"""``medvl calibrate``: from scores to probabilities and decisions, fitted on the validation studies of a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tasks.commands.common import (
    REJECTED,
    cache_option,
    check_out_file,
    console,
    echo_notice,
    labelled_findings,
    load_manifest,
    load_model,
    manifest_options,
    model_options,
    new_table,
    progress,
    prompts_option,
    report_rejected,
    validation_split_option,
)
from tasks.commands.leaks import leak_options, leaks_checked
from tasks.commands.scores import OURS, labels_option, preset_option, prompts_of, score_protocol, scoring_of

if TYPE_CHECKING:
    from tasks.decisions import Decisions


@click.command(short_help="Make probabilities and decisions of scores.")
@click.argument("manifest", type=click.Path(path_type=Path), metavar="MANIFEST")
@model_options
@prompts_option
@click.option("--finding", "findings", multiple=True, metavar="NAME", help="Only this finding (repeatable).")
@labels_option
@preset_option
@validation_split_option
@click.option("--method", type=click.Choice(["platt", "isotonic", "temperature"]), default="platt", show_default=True)
@click.option(
    "--threshold",
    type=click.Choice(["youden", "best_f1", "best_mcc", "at_sensitivity", "at_specificity"]),
    default="youden",
    show_default=True,
    help="How the threshold of a call is chosen.",
)
@click.option("--wanted", type=click.FloatRange(0, 1, min_open=True), help="The sensitivity or specificity of --threshold at_...")
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.9,
    show_default=True,
    help="Of the sets of what cannot be ruled out, with the finding and without.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where to; beside the model unless told.")
@leak_options
@cache_option
@manifest_options
@click.pass_context
def calibrate(
    ctx: click.Context,
    manifest: Path,
    model: Path,
    device: str | None,
    prompts: Path | None,
    findings: tuple[str, ...],
    labels: str | None,
    preset: str | None,
    split: str,
    method: str,
    threshold: str,
    wanted: float | None,
    coverage: float,
    out: Path | None,
    trained_on: tuple[Path, ...],
    allowed: tuple[str, ...],
    cache: Path | None,
    columns: Path | None,
    modality: str,
    allow_outside: bool,
) -> None:
    """Fit, for each finding, a calibration, a threshold and conformal sets to the scores of the validation studies of a MANIFEST.

    `medvl diagnose` of the same model with the same preset, prompts and labels then writes probabilities, and says what cannot be ruled
    out; with any preset, prompts and labels, it says which images are unlike those of validation. A finding that too few of the studies
    have, or whose labels are missing, is left out and named. The guarantee of the sets holds for patients like those of validation.
    Validation studies that share patients, studies or images with training rows are listed in leaks.csv beside the decisions and end it,
    unless allowed by name: scores of what was trained on are better than those of new studies.

    \b
    Examples:
      medvl calibrate demo/data/manifest.csv --model demo/model
      medvl calibrate films/manifest.csv --model runs/first --labels chexpert_14 --preset xplainer --method isotonic
    """
    if threshold.startswith("at_") != (wanted is not None):
        raise click.UsageError("--wanted goes with --threshold at_sensitivity and at_specificity, which need it")
    check_out_file(out, "--out")
    prompt_set = prompts_of(prompts, labels)
    table = load_manifest(manifest, columns, allow_outside)
    rows = table.select(split=split, modality=modality).rows
    known = labelled_findings(rows)
    given = list(dict.fromkeys(findings)) or (list(prompt_set.label_set(labels).values()) if labels else list(prompt_set.labels))
    wanted_findings = [name for name in given if name in known]
    if not wanted_findings:
        raise click.UsageError(f"{manifest}: no {modality} row of split {split!r} has a label of {', '.join(given)}")
    encoder = load_model(model, device, cache)
    import numpy as np

    from medvl.data.studies import by_study
    from tasks.decisions import fit_decisions, place_of
    from tasks.evaluation import joined_labels
    from tasks.familiarity import FamiliarityError, fit_familiarity, stated_of, terms_of
    from tasks.familiarity import place_of as familiarity_place_of
    from tasks.scoring import Scorer
    from tasks.scoring import preset as rule_of
    from tasks.zero_shot import diagnose as score_files

    whole = scoring_of(encoder, preset, prompt_set, given, labels)
    protocol = score_protocol(model, encoder, preset, prompt_set, whole, labels)
    if isinstance(whole, Scorer) and whole.rule.depends_on_run:
        raise click.UsageError(f"--preset {preset}: its scores depend on the other studies of a run, so they cannot be calibrated")
    scoring = whole if protocol.classes else scoring_of(encoder, preset, prompt_set, wanted_findings, labels)
    place = out or place_of(model, protocol.sha256)
    checked: dict[str, Any] = {"model": model, "trained_on": trained_on, "columns": columns, "allow_outside": allow_outside}
    leaks = leaks_checked(encoder.reader, manifest, table, rows, split, place.parent, allowed=allowed, **checked)
    groups = list(by_study(rows).values())
    truth = joined_labels(rows, wanted_findings, "study")
    scores: list[list[float]] = []
    labelled: list[list[float]] = []
    patients: list[str] = []
    vectors: list[Any] = []
    their_patients: list[str] = []
    their_terms: list[Any] = []
    view_of = {str(row.path): row.view for row in rows}
    rejected: list[tuple[str, str]] = [(str(bad.path), str(bad)) for bad in table.rejected]
    with progress("studies", len(groups)) as done:
        for group, result in zip(groups, score_files(encoder, (), scoring, 16, [[rows[i].path for i in g] for g in groups]), strict=True):
            done(1)
            rejected += result.unreadable.items()
            if result.ok:
                scores.append([result.findings[name] for name in wanted_findings])
                labelled.append(truth[group[0]].tolist())
                patients.append(rows[group[0]].patient_id)
                vectors += [one.appearance.numpy() for one in result.encoded if one.modality == modality]
                their_patients += [patients[-1] for one in result.encoded if one.modality == modality]
                their_terms += [(stated_of(encoder.reader, Path(path)), view_of.get(path)) for one in result.encoded for path in one.paths]
    if not scores:
        raise click.UsageError(f"none of {len(groups)} studies could be read")
    rule = rule_of(preset or OURS)
    fitted_on = {"split": split, "manifest_sha256": table.sha256, "threshold": threshold, "wanted": wanted, "leak_check": leaks}
    options: dict[str, Any] = {"of_odds": rule.in_unit_interval, "method": method, "threshold": threshold, "wanted": wanted}
    decisions = fit_decisions(
        np.array(scores), np.array(labelled), patients, wanted_findings, protocol.sha256, coverage=coverage, fitted_on=fitted_on, **options
    )
    decisions.save(place)
    show(decisions)
    click.echo(f"Written to {place}.")
    try:
        familiarity = fit_familiarity(
            np.array(vectors),
            their_patients,
            terms_of(their_terms),
            weights_sha256=protocol.weights_sha256,
            preprocessing_sha256=protocol.preprocessing_sha256,
            modality=modality,
            fitted_on={"split": split, "manifest_sha256": table.sha256},
        )
    except FamiliarityError as error:
        click.echo(f"left out: which images the model was not made for: {error}", err=True)
    else:
        place = familiarity_place_of(model, modality, out)
        familiarity.save(place)
        limit = familiarity.limit
        click.echo(
            f"{limit.inside} of {limit.count} images lie within {limit.distance:.1f}, cross-fitted; farther ones will be told, about "
            f"{limit.rate:.1%} of images like these. Written to {place}."
        )
        if limit.inside == limit.count:
            click.echo("The farthest image sets this limit, and may be an odd one: 199 images and more leave it outside.", err=True)
    report_rejected(rejected, "files and rows")
    echo_notice()
    if rejected or decisions.left_out:
        ctx.exit(REJECTED)


def show(decisions: Decisions) -> None:
    """What was fitted, for a person."""
    of = decisions.fitted_on
    notes = f"fitted on {of['studies']} studies of {of['patients']} patients; the figures are of these and not of others"
    table = new_table(
        None,
        *("finding", "with", "without", "threshold", "sensitivity", "specificity"),
        numbers=("with", "without", "threshold", "sensitivity", "specificity"),
        whole=("finding",),
        caption=notes,
    )
    for name, one in decisions.findings.items():
        chosen = one.threshold
        figures = (f"{value:.3f}" for value in (chosen.value, chosen.sensitivity, chosen.specificity))
        table.add_row(name, str(chosen.n_positive), str(chosen.n_negative), *figures)
    console().print(table)
    for name, why in decisions.left_out.items():
        click.echo(f"left out: {name}: {why}", err=True)
