"""``medvl evaluate-maps``: how well maps point, overlap and keep silent, on masks, boxes and the formats of public data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tasks.commands.common import (
    REJECTED,
    check_out_folder,
    console,
    echo_notice,
    interval_options,
    json_option,
    json_text,
    load_manifest,
    load_model,
    load_prompt_set,
    manifest_options,
    model_facts,
    model_options,
    new_table,
    progress,
    prompts_option,
    report_rejected,
    usage_errors,
    weights_sha256,
    write_csv,
)
from tasks.commands.diagnose import TABLES
from tasks.commands.leaks import leak_options, leaks_checked
from tasks.commands.maps import batch_size_of, batch_size_option, settings_of, settings_options, thresholds_of

if TYPE_CHECKING:
    from medvl.model import DualEncoder
    from tasks.grounding import MapSettings, Query
    from tasks.grounding.evaluation import GroundingImage, Measured
    from tasks.grounding.thresholds import MapThresholds

FORMATS = (
    *("manifest", "ms_cxr", "chestx_det10", "rsna", "vindr_cxr", "padchest_gr", "rexgrounding_ct"),
    *("chestxray_14", "siim", "object_cxr", "chexlocalize", "plain"),
)
"""``manifest`` and the names of :data:`tasks.annotations.FORMATS`; a test compares them."""
COLUMNS = {
    "pointing_game": "points",
    "contrast": "CNR",
    "mean_iou": "mIoU",
    "dice": "Dice",
    "average_precision": "AP",
    "found": "found",
    "false_found": "false",
    "distance_mm": "mm",
}
"""Measures that are shown, and their headings; all others are in results.json."""
DIGITS = {"distance_mm": 0, "false_found": 3}
OF_SPLIT = {"all": ("train", "val", "test")}
"""Splits that a choice of --split holds, besides the one of its own name."""
CHUNK = 64
"""Images whose queries are encoded together: a set of sentences has thousands, of which an image asks a few."""


@click.command("evaluate-maps", short_help="Measure maps on masks, boxes or annotation files.")
@click.argument("table_path", type=click.Path(path_type=Path), metavar="MANIFEST|ANNOTATIONS")
@model_options
@click.option("--format", "format_name", type=click.Choice(FORMATS), default="manifest", show_default=True, help="What the table is.")
@click.option("--images", type=click.Path(path_type=Path), metavar="DIR|MANIFEST", help="Where the images of annotations are.")
@prompts_option
@settings_options
@click.option(
    "--thresholds", type=click.Path(path_type=Path), metavar="FILE", help="Of `medvl calibrate-maps`; beside the model unless told."
)
@click.option("--split", default="test", show_default=True, metavar="NAME|all", help="Which rows to measure, where the table says.")
@click.option("--agreed", is_flag=True, help="Of several readers' boxes only those that two agree on.")
@click.option("--iou-threshold", "iou_thresholds", type=float, multiple=True, metavar="X", help="Of the mean IoU, on the scale of the map.")
@batch_size_option
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where the figures and the tables go.")
@interval_options
@leak_options
@manifest_options
@json_option
@click.pass_context
def evaluate_maps(
    ctx: click.Context,
    table_path: Path,
    model: Path,
    device: str | None,
    format_name: str,
    images: Path | None,
    prompts: Path | None,
    thresholds: Path | None,
    split: str,
    agreed: bool,
    iou_thresholds: tuple[float, ...],
    batch_size: int | None,
    out: Path,
    repeats: int,
    seed: int,
    trained_on: tuple[Path, ...],
    allowed: tuple[str, ...],
    columns: Path | None,
    modality: str,
    allow_outside: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Measure maps: pointing game, contrast-to-noise, mean IoU, distance to the centre; and at the thresholds of validation Dice, boxes,
    how often what is there is found, and how often what is absent.

    The table is a manifest with masks or boxes and labels, or a file of annotations with --format and --images. Sets of findings are asked
    by the prompts of each finding, sets of sentences by each sentence. Writes results.json with n and patient-level intervals per category
    and over categories, cases.csv with a line a case, and rejected.csv. What is held against a finding without thresholds of
    `medvl calibrate-maps` is not measured.

    \b
    Examples:
      medvl evaluate-maps demo/data/manifest.csv --model demo/model --out grounding
      medvl evaluate-maps MS_CXR_Local_Alignment_v1.0.0.csv --format ms_cxr --images files --split all --model run --out ms_cxr
      medvl evaluate-maps test.json --format chestx_det10 --images test_data --split all --shifts 2 --model run --out det10
    """
    if (format_name == "manifest") != (images is None):
        raise click.UsageError("--images goes with a --format of annotations, which needs it; a manifest names its own")
    if not table_path.is_file() and not table_path.is_dir():
        raise click.UsageError(f"{table_path}: no such file")
    encoder = load_model(model, device)
    check_out_folder(out)
    from medvl.metrics import IOU_THRESHOLDS
    from tasks.grounding import Grounder
    from tasks.grounding.evaluation import of_manifest, results
    from tasks.grounding.protocol import GroundingProtocol, asked_by
    from tasks.protocols import sha256_of

    settings = settings_of(**how)
    prompt_set = load_prompt_set(prompts)
    kind = "ct" if format_name == "rexgrounding_ct" else modality
    levels = thresholds_of(thresholds, model, settings, kind, prompt_set.sha256)
    cuts = tuple(sorted(iou_thresholds)) or IOU_THRESHOLDS
    problems: list[tuple[str, str]] = []
    leaks: dict[str, Any] | None = None
    if images is None:
        from tasks.grounding import finding_query

        table = load_manifest(table_path, columns, allow_outside)
        rows = table.select(split=None if split == "all" else split, modality=modality).rows
        checked: dict[str, Any] = {"model": model, "trained_on": trained_on, "columns": columns, "allow_outside": allow_outside}
        leaks = leaks_checked(encoder.reader, table_path, table, rows, split, out, allowed=allowed, **checked)
        names = [name for name in prompt_set.labels if any(row.labels.get(name) in (0, 1) for row in rows)]
        queries, asked, data = [finding_query(name, prompt_set) for name in names], of_manifest(rows, names), table.sha256
        problems += [(str(bad.path), str(bad)) for bad in table.rejected]
        if (
            levels is not None
            and levels.fitted_on.get("manifest_sha256") == table.sha256
            and levels.fitted_on.get("split") in OF_SPLIT.get(split, (split,))
        ):
            levels = None
            click.echo("the thresholds were chosen on these very studies: what is found is not measured; take another split", err=True)
    else:
        queries, asked, data, problems = _annotated(format_name, table_path, images, split, agreed, prompt_set)
    if not asked:
        raise click.UsageError(f"{table_path}: nothing to measure in split {split!r}; {len(problems)} rows or images could not be used")
    with progress("images", len(asked)) as step, usage_errors(NotImplementedError):
        measured = _measured(encoder, settings, queries, asked, levels, cuts, batch_size_of(batch_size, kind), step)
    problems += measured.rejected
    if not measured.cases:
        report_rejected(problems, "images", out / "rejected.csv")
        ctx.exit(REJECTED)
    with usage_errors(ValueError):
        found = results(measured, Grounder(encoder, queries[:1], settings), levels, iou_thresholds=cuts, repeats=repeats, seed=seed)
    found["protocol"] = GroundingProtocol(
        format=format_name,
        data_sha256=data,
        split=split,
        queries=asked_by(format_name),
        prompts_sha256=prompt_set.sha256,
        weights_sha256=weights_sha256(model),
        maps=settings.to_dict(),
        token_offset=encoder.offset_record(),
        thresholds_sha256=None if levels is None else sha256_of(levels.to_dict()),
        mean_iou_thresholds=cuts,
        repeats=repeats,
        seed=seed,
    ).as_dict()
    found |= {"leak_check": leaks, "model": model_facts(model), "left_out": len(problems)}
    _write(out, found, measured)
    (out / "rejected.csv").unlink(missing_ok=True)
    report_rejected(problems, "rows and images", out / "rejected.csv" if problems else None)
    if as_json:
        click.echo(json_text(found))
    else:
        _show(found)
        if levels is None:
            click.echo("no thresholds beside the model for maps made this way: what is found is not measured; see `medvl calibrate-maps`")
        if leaks is None:
            click.echo("leak check: annotations were not compared with training images; see `medvl leaks`")
        click.echo(f"Figures in {out / 'results.json'}, every case in {out / 'cases.csv'}.")
        echo_notice()
    if problems:
        ctx.exit(REJECTED)


def _annotated(
    format_name: str, path: Path, images: Path, split: str, agree: bool, prompts: Any
) -> tuple[list[Query], list[GroundingImage], str, list[tuple[str, str]]]:
    """Queries and images of a file of annotations, its hash, and what of it cannot be used."""
    from tasks.annotations import AnnotationError, agreed, cases, find_images, read_annotations
    from tasks.grounding.protocol import images_of, queries_of

    with usage_errors(AnnotationError, OSError):
        annotations = read_annotations(format_name, path)
    problems = [(str(path), str(bad)) for bad in annotations.rejected]
    if split != "all":
        annotations = annotations.select(lambda one: one.split in (None, split))
    if agree:
        annotations = agreed(annotations)
    with usage_errors(ValueError):
        files = find_images(annotations, load_manifest(images, None, True) if images.suffix.lower() in TABLES else images)
    problems += [(key, "no file of this name among the images") for key in files.missing]
    problems += [(key, "several files of this name among the images") for key in files.ambiguous]
    with usage_errors(ValueError):
        every = cases(annotations, files.patients or None)
    queries, which = queries_of(every, format_name, prompts)
    return queries, images_of(every, which, files.paths), annotations.sha256, problems


def _measured(
    model: DualEncoder,
    settings: MapSettings,
    queries: Sequence[Query],
    images: Sequence[GroundingImage],
    thresholds: MapThresholds | None,
    cuts: Sequence[float],
    batch_size: int,
    step: Any,
) -> Measured:
    """Measure in parts, each with the queries that its images ask."""
    from tasks.grounding import Grounder
    from tasks.grounding.evaluation import Measured, measure

    parts = []
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        used = sorted({asked.query for image in part for asked in image.asked})
        place = {query: i for i, query in enumerate(used)}
        renumbered = [replace(image, asked=tuple(replace(one, query=place[one.query]) for one in image.asked)) for image in part]
        grounder = Grounder(model, [queries[query] for query in used], settings)
        with usage_errors(ValueError):
            parts.append(measure(grounder, renumbered, thresholds, iou_thresholds=cuts, batch_size=batch_size, progress=step))
    return Measured(
        tuple(case for one in parts for case in one.cases),
        tuple(bad for one in parts for bad in one.rejected),
        any(one.volumes for one in parts),
    )


def _write(out: Path, found: dict[str, Any], measured: Measured) -> None:
    import json

    from medvl.files import write_atomically
    from tasks.grounding.evaluation import MEANS

    write_atomically(out / "results.json", (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())
    patients = {name: str(i) for i, name in enumerate(dict.fromkeys(case.patient for case in measured.cases))}
    lines = [
        (
            *(case.study, case.path.name, patients[case.patient], case.group, str(int(case.present)), repr(case.score)),
            "" if case.peak is None else " ".join(map(str, case.peak)),
            *("" if (value := case.values.get(name)) is None or value != value else repr(value) for name in MEANS),
        )
        for case in measured.cases
    ]
    write_csv(out / "cases.csv", ("study_id", "file", "patient", "category", "present", "score", "peak", *MEANS), lines)


def _show(found: dict[str, Any]) -> None:
    shown = {name: heading for name, heading in COLUMNS.items() if name in found["macro"]}
    table = new_table(None, "category", "n", *shown.values(), numbers=["n", *shown.values()], whole=["category"])

    def cell(group: dict[str, Any], name: str) -> str:
        one = group.get(name)
        return "" if one is None or one["value"] is None else f"{one['value']:.{DIGITS.get(name, 2)}f}"

    for group, values in found["per_group"].items():
        table.add_row(group, str(values.get("pointing_game", {}).get("n", "")), *(cell(values, name) for name in shown))
    table.add_row("mean", "", *(cell(found["macro"], name) for name in shown), style="bold")
    console().print(table)
    cases = found["cases"]
    click.echo(f"{cases['present']} present and {cases['absent']} absent cases in {found['images']} images of {found['patients']} patients")
    for name in shown:
        one = found["macro"][name]
        if one["value"] is not None and one["ci_low"] is not None:
            digits = DIGITS.get(name, 2) + 1
            low, high = (f"{one[end]:.{digits}f}" for end in ("ci_low", "ci_high"))
            click.echo(f"{name.replace('_', ' ')}: {one['value']:.{digits}f} ({low} to {high}), mean of {one['groups']}")
