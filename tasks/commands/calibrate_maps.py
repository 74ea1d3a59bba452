"""``medvl calibrate-maps``: from maps to found or not found, with levels chosen on the validation images of a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tasks.commands.common import (
    REJECTED,
    check_out_file,
    console,
    echo_notice,
    labelled_findings,
    load_manifest,
    load_model,
    load_prompt_set,
    manifest_options,
    model_options,
    new_table,
    progress,
    prompts_option,
    report_rejected,
    usage_errors,
    validation_split_option,
    weights_sha256,
)
from tasks.commands.leaks import leak_options, leaks_checked
from tasks.commands.maps import batch_size_of, batch_size_option, settings_of, settings_options

if TYPE_CHECKING:
    from medvl.model import DualEncoder
    from tasks.grounding import Grounder
    from tasks.grounding.evaluation import GroundingImage


@click.command("calibrate-maps", short_help="Choose the thresholds of maps.")
@click.argument("manifest", type=click.Path(path_type=Path), metavar="MANIFEST")
@model_options
@prompts_option
@click.option("--finding", "findings", multiple=True, metavar="NAME", help="Only this finding (repeatable).")
@settings_options
@validation_split_option
@click.option(
    "--false-share",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.05,
    show_default=True,
    help="How often a finding may be found where it is absent.",
)
@click.option("--offset", "by_masks", is_flag=True, help="First choose by masks where tokens look, and note it in the model's config.json.")
@batch_size_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where to; beside the model unless told.")
@leak_options
@manifest_options
@click.pass_context
def calibrate_maps(
    ctx: click.Context,
    manifest: Path,
    model: Path,
    device: str | None,
    prompts: Path | None,
    findings: tuple[str, ...],
    split: str,
    false_share: float,
    by_masks: bool,
    batch_size: int | None,
    out: Path | None,
    trained_on: tuple[Path, ...],
    allowed: tuple[str, ...],
    columns: Path | None,
    modality: str,
    allow_outside: bool,
    **how: Any,
) -> None:
    """Choose when a map means that a finding is there, and how far it reaches, on the validation images of a MANIFEST.

    Each finding gets a calibration of its map's highest value; one threshold of the probability holds for all, so that an absent finding
    is found in no more than the share of images asked for; where there are masks or boxes, how far a region spreads is chosen by Dice.
    `medvl ground` of the same model with maps made the same way then says found or not found, with boxes.

    \b
    Examples:
      medvl calibrate-maps demo/data/manifest.csv --model demo/model
      medvl calibrate-maps films/manifest.csv --model runs/first --shifts 2 --false-share 0.02
      medvl calibrate-maps volumes/manifest.csv --modality ct --model runs/ct --offset
    """
    check_out_file(out, "--out")
    prompt_set = load_prompt_set(prompts)
    table = load_manifest(manifest, columns, allow_outside)
    rows = table.select(split=split, modality=modality).rows
    known = labelled_findings(rows)
    if unknown := [name for name in findings if name not in prompt_set.findings]:
        raise click.UsageError(f"--finding {', '.join(unknown)}: no prompts for it; known: {', '.join(prompt_set.findings)}")
    names = [name for name in (dict.fromkeys(findings) or prompt_set.labels) if name in known and name in prompt_set.findings]
    if not names:
        raise click.UsageError(f"{manifest}: no {modality} row of split {split!r} has a label of a finding that the prompts have")
    encoder = load_model(model, device)
    from tasks.grounding import Grounder, finding_query
    from tasks.grounding.calibration import calibrate_maps as fit
    from tasks.grounding.evaluation import of_manifest
    from tasks.grounding.thresholds import place_of

    settings = settings_of(**how)
    place = out or place_of(model, settings, modality)
    checked: dict[str, Any] = {"model": model, "trained_on": trained_on, "columns": columns, "allow_outside": allow_outside}
    leaks_checked(encoder.reader, manifest, table, rows, split, place.parent, allowed=allowed, **checked)
    grounder = Grounder(encoder, [finding_query(name, prompt_set) for name in names], settings)
    if by_masks:
        _choose_offset(encoder, grounder, of_manifest(rows, names), model, batch_size_of(batch_size, modality))
    images = of_manifest(rows, names, without_masks=True)
    with usage_errors(ValueError, NotImplementedError), progress("images", len(images)) as step:
        fitted, rejected = fit(
            *(grounder, images, weights_sha256(model), modality),
            false_share=false_share,
            batch_size=batch_size_of(batch_size, modality),
            prompts_sha256=prompt_set.sha256,
            fitted_on={"split": split, "manifest_sha256": table.sha256},
            progress=step,
        )
    fitted.save(place)
    shown = new_table(None, "finding", "found at a map of", "reaches to", numbers=("found at a map of", "reaches to"))
    for name in names:
        levels = fitted.levels(finding_query(name, prompt_set))
        shown.add_row(name, f"{levels.detect:.3f}", f"{levels.spread:.3f}", style=None if name in fitted.findings else "dim")
    console().print(shown)
    for name, why in fitted.left_out.items():
        click.echo(f"{name}: {why}", err=True)
    of = fitted.fitted_on
    click.echo(
        f"threshold {fitted.threshold:.3f}: on validation found in {of['false_share']:.1%} of {of['absent']} where absent and in "
        f"{of['found_share']:.1%} of {of['present']} where present; written to {place}"
    )
    problems = [*((str(bad.path), str(bad)) for bad in table.rejected), *rejected]
    report_rejected(problems, "rows")
    echo_notice()
    if problems:
        ctx.exit(REJECTED)


def _choose_offset(model: DualEncoder, grounder: Grounder, images: list[GroundingImage], folder: Path, batch_size: int) -> None:
    from medvl.model import note_offset
    from tasks.grounding.offset import offset_by_masks

    with usage_errors(ValueError), progress("masks", len(images)) as step:
        found = offset_by_masks(grounder, images, [], batch_size=batch_size, progress=step)
    model.token_offset[len(found.offset)] = found.offset
    note_offset(model, folder)
    told = ", ".join(f"{one:+.1f}" for one in found.offset)
    click.echo(
        f"tokens look at ({told}) voxels from their cells: peaks in {found.after:.1%} of {found.masks} validation masks, before in "
        f"{found.before:.1%} (means over findings)"
    )
