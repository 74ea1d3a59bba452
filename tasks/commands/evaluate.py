"""``medvl evaluate``: every figure of a model on labelled studies, with n and interval."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tasks.commands.common import (
    REJECTED,
    cache_option,
    check_out_folder,
    console,
    echo_notice,
    interval_options,
    json_option,
    json_text,
    load_manifest,
    load_model,
    manifest_options,
    model_facts,
    model_options,
    new_table,
    progress,
    prompts_option,
    report_rejected,
    text_policy_option,
    text_source,
    usage_errors,
)
from tasks.commands.figures import figure, interval, show_retrieval
from tasks.commands.leaks import leak_options, leaks_checked
from tasks.commands.scores import OURS, decisions_of, decisions_option, labels_option, preset_option, prompts_of, score_protocol, scoring_of

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("table_path", required=False, type=click.Path(path_type=Path), metavar="[MANIFEST]")
@model_options
@click.option("--manifest", type=click.Path(path_type=Path), metavar="MANIFEST", help="Table of labelled studies, if not given first.")
@click.option(
    "--protocol",
    "protocol_name",
    metavar="NAME",
    help="Prompts, labels, rule, split and texts as it has them: phantom, a label set's name, or a YAML.",
)
@labels_option
@preset_option
@decisions_option
@manifest_options
@click.option(
    "--split", type=click.Choice(["train", "val", "test", "all"]), default="test", show_default=True, help="Which rows to measure."
)
@prompts_option
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR|FILE.json", help="Where the figures and the tables go.")
@click.option(
    "--unit",
    type=click.Choice(["study", "patient", "image"]),
    default="study",
    show_default=True,
    help="What has one score and one label and counts once; where maps point is of images always.",
)
@interval_options
@click.option(
    "--pool",
    "pool",
    type=click.IntRange(min=2),
    metavar="N",
    help="Measure retrieval within random pools of N besides, as other work prints it; the full pool always.",
)
@click.option(
    "--pool-repeats",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How often the studies are dealt into pools of N.",
)
@click.option(
    "--baseline/--no-baseline",
    default=None,
    help="Train the thumbnail baseline on the table's training labels and show it beside; done unless told, where there are such labels.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Images encoded at once.")
@text_policy_option
@leak_options
@cache_option
@json_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    table_path: Path | None,
    model: Path,
    device: str | None,
    manifest: Path | None,
    protocol_name: str | None,
    labels: str | None,
    preset: str | None,
    decisions_path: Path | None,
    columns: Path | None,
    modality: str,
    allow_outside: bool,
    split: str,
    prompts: Path | None,
    out: Path,
    unit: str,
    repeats: int,
    seed: int,
    pool: int | None,
    pool_repeats: int,
    baseline: bool | None,
    batch_size: int,
    text_policy: str,
    trained_on: tuple[Path, ...],
    allowed: tuple[str, ...],
    cache: Path | None,
    as_json: bool,
) -> None:
    """Measure zero-shot classification, pointing game and retrieval on the labelled studies of MANIFEST.

    Writes results.json, predictions.csv, rejected.csv and, where there are reports, retrieval.csv. Intervals are bootstrapped over
    patients. A patient in two splits is in none: those rows are rejected, as are paths that leave the table's folder.
    First, patients, studies and images (equal or nearly so) that are also among the training or validation rows of the table, or of those
    given as --trained-on, are listed in leaks.csv and end it, unless allowed by name; shared report texts are counted.
    Several views or series of a study make one score, as in `medvl diagnose`. Where the table has sex, age, scanner, site or view (or what
    its column map calls groups), each subgroup is measured, against all others, with the widest gap.
    Beside the AUROC stands that of logistic regression on a thumbnail, trained on the labels of the table's training images. Where
    `medvl calibrate` has been run for these scores, calibration and the calls at the thresholds of validation are measured too.
    Retrieval is measured both ways over the full pool, strictly and with reports of the same sentences as hits; the facts of the first
    report are held against those of the study's own, and own reports against those with the finding on the other side, or otherwise severe.
    results.json holds the protocol with its hash: the same protocol on the same studies gives the same bytes.

    \b
    Examples:
      medvl evaluate demo/data/manifest.csv --model demo/model --protocol phantom --out results.json
      medvl evaluate --model run --manifest films.csv --columns columns.yaml --split all --out results --json
    """
    tables = [path for path in (table_path, manifest) if path is not None]
    if len(tables) != 1:
        raise click.UsageError("give the MANIFEST once: first, or as --manifest")
    manifest = tables[0]
    if protocol_name is not None:
        from tasks.protocols import named_protocol

        with usage_errors(KeyError, ValueError):
            fixed = named_protocol(protocol_name)
        given = {"prompts": prompts, "labels": labels, "preset": preset, "split": split, "modality": modality, "text_policy": text_policy}
        given["unit"] = unit
        for name, value in given.items():
            wanted = getattr(fixed, name)
            if wanted is not None and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE and str(value) != wanted:
                raise click.UsageError(f"--{name.replace('_', '-')} {value}: protocol {fixed.name} has {wanted}; leave one of them out")
        prompts = prompts if fixed.prompts is None else Path(fixed.prompts)
        labels, preset = fixed.labels or labels, fixed.preset or preset
        split, modality, text_policy = fixed.split or split, fixed.modality or modality, fixed.text_policy or text_policy
        unit = fixed.unit or unit
    if pool is None and ctx.get_parameter_source("pool_repeats") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--pool-repeats: say how large the pools are, with --pool N")
    if pool is not None and unit == "image":
        raise click.UsageError("--pool: pools are dealt of studies with their reports, not of images; leave out --unit image")
    if decisions_path is not None and unit != "study":
        raise click.UsageError(f"--decisions: `medvl calibrate` fits scores of studies, not of each {unit}; leave out --unit {unit}")
    prompt_set = prompts_of(prompts, labels)
    out, name = (out.parent, out.name) if out.suffix == ".json" else (out, "results.json")
    table = load_manifest(manifest, columns, allow_outside)
    rows = table.select(split=None if split == "all" else split, modality=modality).rows
    if not rows:
        raise click.UsageError(f"--manifest {manifest}: no {modality} row in split {split} among {len(table)} good rows")
    source = text_source(text_policy)
    if pool is not None:
        from tasks.retrieval import studies_of

        if pool > (told := len(studies_of(rows, source))):
            raise click.UsageError(f"--pool {pool}: {told} studies of split {split} have a report; take a pool of at most as many")
    encoder = load_model(model, device, cache)
    check_out_folder(out)
    facts = model_facts(model)
    checked: dict[str, Any] = {"model": model, "trained_on": trained_on, "columns": columns, "allow_outside": allow_outside}
    leaks = leaks_checked(encoder.reader, manifest, table, rows, split, out, allowed=allowed, **checked)
    from tasks.evaluation import REJECTED as REJECTED_CSV
    from tasks.evaluation import predict, results, write
    from tasks.protocols import EvaluationProtocol, sha256_of
    from tasks.retrieval_figures import Pools
    from tasks.zero_shot import PromptBank

    labelled = {name for row in rows for name in row.labels}
    asked = list(prompt_set.label_set(labels).values()) if labels is not None else [one for one in prompt_set.findings if one in labelled]
    scoring = scoring_of(encoder, preset, prompt_set, asked if labels is not None or asked else None, labels)
    rule = None if isinstance(scoring, PromptBank) or preset == OURS else scoring
    findings = None if labels is None else asked
    with progress("images", len(rows)) as advance:
        options: dict[str, Any] = {"findings": findings, "scorer": rule, "unit": unit, "batch_size": batch_size}
        with usage_errors(ValueError):
            predictions = predict(encoder, rows, prompt_set, source, **options, progress=advance)
    simple = None
    if baseline is not False:
        from tasks.baseline import learnable, thumbnail_baseline

        train = table.select(split="train", modality=modality).rows
        if learnable(train, predictions.findings) and any(row.split != "train" for row in predictions.rows):
            simple = thumbnail_baseline(encoder, train, predictions, repeats=repeats, seed=seed)
            predictions = replace(predictions, baseline=simple.scores)
        elif baseline:
            raise click.UsageError(
                f"--baseline: {manifest} has nothing to learn from ({modality} rows of split train with a finding present in one and"
                " absent in another) or nothing to measure outside split train"
            )
    scores = score_protocol(model, encoder, preset, prompt_set, scoring, labels)
    decisions = decisions_of(decisions_path, model, scores, predictions.findings) if unit == "study" else None
    pools = None if pool is None else Pools(pool, pool_repeats)
    with usage_errors(ValueError):
        measured = results(predictions, repeats=repeats, seed=seed, decisions=decisions, pools=pools)
    measured["protocol"] = EvaluationProtocol(
        score=scores,
        findings=predictions.findings,
        manifest_sha256=table.sha256,
        split=split,
        split_source=table.split_source,
        modality=modality,
        unit=predictions.unit,
        texts=predictions.texts,
        decisions_sha256=None if decisions is None else sha256_of(decisions.to_dict()),
        repeats=repeats,
        seed=seed,
        name=protocol_name,
        pools=None if pools is None else asdict(pools),
    ).as_dict()
    if simple is not None:
        measured["baseline"] = simple.measured
    measured["data"] = {
        "manifest_sha256": table.sha256,
        "split": split,
        "split_source": table.split_source,
        "modality": modality,
        "bad_rows": len(table.rejected),
    }
    measured["leak_check"] = leaks
    measured["model"] = facts
    left_out = sorted({name for row in rows for name in row.labels} - set(prompt_set.findings))
    if left_out:
        click.echo(f"labelled, but without prompts, so not measured: {', '.join(left_out)}", err=True)
    measured["prompts"] = {"version": prompt_set.version, "sha256": prompt_set.sha256, "labelled_without_prompts": left_out}
    unlearned = simple.rejected if simple is not None else ()
    bad_rows = [(bad.row, bad.study_id, "; ".join(bad.reasons), "table row") for bad in table.rejected]
    write(
        predictions,
        measured,
        out,
        [*bad_rows, *((row.row, row.study_id, why, "training image of the baseline") for row, why in unlearned)],
        name,
    )
    everything = f"all in {out / REJECTED_CSV}"
    report_rejected([(bad.path, str(bad)) for bad in table.rejected], f"rows of {manifest}; {everything}")
    report_rejected([(str(row.path), why) for row, why in predictions.rejected], f"images; {everything}")
    report_rejected([(str(row.path), why) for row, why in unlearned], f"training images of the baseline; {everything}")
    if as_json:
        click.echo(json_text(measured))
    else:
        show_results(measured)
        click.echo(f"Figures in {out / name}, scores in {out / 'predictions.csv'}.")
        echo_notice()
    if table.rejected or predictions.rejected or unlearned:
        ctx.exit(REJECTED)


def show_results(measured: dict[str, Any]) -> None:
    """The tables of results.json for a person."""
    out = console()
    unit = measured.get("unit", {"name": "image", "n": measured["images"]})
    counted = "" if unit["n"] == measured["images"] else f", each of {unit['n']} units ({unit['name']}) counted once"
    out.print(f"{measured['images']} images of {measured['patients']} patients{counted}")
    if zero_shot := measured.get("zero_shot"):
        pointing = measured.get("grounding", {}).get("per_finding", {})
        baseline = measured.get("baseline", {})
        numbers = ("AUROC", "95 % CI", *(("baseline",) if baseline else ()), "present/n", "pointing", "masks")
        note = "intervals: 95 %, bootstrap over patients; * not focal, not in the pointing mean"
        if baseline:
            note += f"; baseline: {baseline['what']}"
        table = new_table(None, "finding", *numbers, numbers=numbers, whole=("finding",), caption=note)
        for name, one in zero_shot["per_finding"].items():
            at = pointing.get(name)
            points = ("", "") if at is None else (figure(at["pointing_game"]) + ("" if at["focal"] else "*"), str(at["n"]))
            simple = (figure(baseline["per_finding"].get(name)),) if baseline else ()
            table.add_row(name, figure(one["auroc"]), interval(one), *simple, f"{one['n_positive']}/{one['n']}", *points)
        macro_pointing = figure(measured.get("grounding", {}).get("pointing_game_macro"))
        table.add_section()
        simple = (figure(baseline["macro_auroc"]),) if baseline else ()
        mean = (figure(zero_shot["macro_auroc"]), interval(zero_shot["macro_auroc_interval"]), *simple)
        table.add_row("mean", *mean, "", macro_pointing, "", style="bold")
        out.print(table)
    show_subgroups(out, measured.get("subgroups", {}).get("attributes", {}))
    if slices := measured.get("slices", {}).get("per_finding"):
        numbers = ("cuts the mask", "95 % CI", "random slice", "masks")
        table = new_table("slice of highest score", "finding", *numbers, numbers=numbers, whole=("finding",))
        for name, one in slices.items():
            table.add_row(name, figure(one["slice_hit"]), interval(one), figure(one["chance"]), str(one["n"]))
        table.add_section()
        macro = measured["slices"]
        mean = (figure(macro["slice_hit_macro"]), interval(macro["slice_hit_macro_interval"]), figure(macro["chance_macro"]))
        table.add_row("mean", *mean, "", style="bold")
        out.print(table)
    show_retrieval(out, measured.get("retrieval", {}))


def show_subgroups(out: Console, attributes: dict[str, Any]) -> None:
    """A table of all subgroups: mean AUROC, and how far it is from that of all others, over the findings that count in both."""
    if not attributes:
        return
    numbers = ("n", "AUROC", "95 % CI", "less the rest", "95 % CI of that")
    least = next(iter(attributes.values()))["least_of_each_label"]
    note = f"means of findings with {least} studies with it and {least} without in the subgroup, the difference of those that count in both"
    table = new_table("subgroups", "subgroup", *numbers, numbers=numbers, whole=("subgroup",), caption=note)
    for attribute, one in attributes.items():
        table.add_section()
        for group, found in one["groups"].items():
            mean, rest = found["auroc"]["mean"], found["auroc"]["less_the_rest"]
            table.add_row(
                f"{attribute} {group}", str(found["n"]), figure(mean["value"]), interval(mean), signed(rest["value"]), signed_interval(rest)
            )
        if gap := one["widest_gap"]["auroc"]:
            name = f"widest gap: {gap['highest']} less {gap['lowest']}"
            table.add_row(name, "", "", "", signed(gap["value"]), signed_interval(gap), style="bold")
    out.print(table)


def signed(value: float | None) -> str:
    """A difference to three digits."""
    return "–" if value is None else f"{value:+.3f}"


def signed_interval(of: dict[str, Any]) -> str:
    """Ends of the interval of a difference."""
    return " to ".join("?" if of[end] is None else f"{of[end]:+.2f}" for end in ("ci_low", "ci_high"))
