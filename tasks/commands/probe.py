"""``medvl probe``: what a model's scores hang on besides the finding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tasks.commands.common import (
    REJECTED,
    check_out_folder,
    echo_notice,
    load_manifest,
    load_model,
    load_prompt_set,
    manifest_options,
    model_options,
    progress,
    prompts_option,
    report_rejected,
    usage_errors,
    weights_sha256,
    write_csv,
)
from tasks.commands.leaks import leak_options, leaks_checked


@click.command(short_help="Probe a model: negation, wording, side, corruptions.")
@model_options
@click.option("--manifest", type=click.Path(path_type=Path), metavar="MANIFEST", help="Labelled studies instead of phantoms.")
@manifest_options
@click.option("--split", type=click.Choice(["val", "test", "all"]), default="test", show_default=True, help="Which rows.")
@prompts_option
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where probes.json, probes.csv and probes.html go."
)
@click.option("--studies", type=click.IntRange(min=12), default=300, show_default=True, help="Phantoms to make, without a MANIFEST.")
@click.option("--repeats", type=click.IntRange(min=0), default=1000, show_default=True, help="Bootstrap resamples for the intervals.")
@click.option("--seed", type=click.IntRange(min=0), default=9000, show_default=True, help="Of phantoms and corruptions.")
@leak_options
@click.pass_context
def probe(
    ctx: click.Context,
    model: Path,
    device: str | None,
    manifest: Path | None,
    columns: Path | None,
    modality: str,
    allow_outside: bool,
    split: str,
    prompts: Path | None,
    out: Path,
    studies: int,
    repeats: int,
    seed: int,
    trained_on: tuple[Path, ...],
    allowed: tuple[str, ...],
) -> None:
    """See what a model does with negated prompts, other wordings, left and right, mild and severe, turned images, and corrupted ones.

    Corruptions are at five severities: of films noise, blur, contrast, JPEG, crop, rotation, resolution and burnt-in markers, of volumes
    noise, blur, contrast, rotation and thick slices. Without
    a MANIFEST the studies are new phantoms, which no demo trains on. Rows that share patients, studies or images with training or
    validation rows are listed in leaks.csv and end it, unless allowed by name.

    \b
    Examples:
      medvl probe --model demo/model --out probes
      medvl probe --model runs/first --manifest films/manifest.csv --out probes
    """
    check_out_folder(out)
    prompt_set = load_prompt_set(prompts)
    encoder = load_model(model, device)
    synthetic = manifest is None
    if manifest is None:
        from tasks.phantoms import write_cohort

        counts = {"test": studies}
        manifest = write_cohort(out / "data", studies, seed, xray=modality == "xray", ct=modality == "ct", counts=counts)
    table = load_manifest(manifest, columns, allow_outside)
    rows = table.select(split=None if split == "all" else split, modality=modality).rows
    if not rows:
        raise click.UsageError(f"{manifest}: no {modality} row in split {split}")
    checked: dict[str, Any] = {"model": model, "trained_on": trained_on, "columns": columns, "allow_outside": allow_outside}
    leaks = leaks_checked(encoder.reader, manifest, table, rows, split, out, allowed=allowed, **checked)
    from tasks.page.probes import write_probes
    from tasks.probes import probe_all, steps

    with progress("images and corruptions", steps(rows)) as done, usage_errors(ValueError):
        found, data = probe_all(encoder, rows, prompt_set, repeats=repeats, seed=seed, progress=done)
    header = ("probe", "name", "setting", "value", "ci_low", "ci_high", "n")
    facts = {
        "model": weights_sha256(model),
        "prompts": prompt_set.sha256,
        "manifest": table.sha256,
        "split": split,
        "images": len(data.rows),
        "patients": len(set(data.patients)),
        "data": "synthetic phantoms" if synthetic else "the manifest's",
        "interval": f"95 %, bootstrap over patients, {repeats} resamples",
    }
    write_csv(out / "probes.csv", header, (["" if v is None else v for v in one.row()] for one in found))
    from medvl.files import write_atomically
    from medvl.types import RESEARCH_USE

    told = {"notice": RESEARCH_USE, **facts, "leak_check": leaks, "probes": [dict(zip(header, one.row(), strict=True)) for one in found]}
    write_atomically(out / "probes.json", (json.dumps(told, indent=2, allow_nan=False) + "\n").encode())
    write_probes(out / "probes.html", found, facts)
    for one in found:
        if one.name in ("mean", "none") and one.figure.value == one.figure.value:  # not NaN
            click.echo(f"{one.probe}, {one.setting}: {one.figure.value:.3f} ({one.figure.ci_low:.3f} to {one.figure.ci_high:.3f})")
    click.echo(f"Open {out / 'probes.html'}; figures in {out / 'probes.csv'}.")
    rejected = [(str(bad.path), str(bad)) for bad in table.rejected] + list(data.rejected)
    report_rejected(rejected, "files and rows", out / "rejected.csv" if rejected else None)
    echo_notice()
    if rejected:
        ctx.exit(REJECTED)
