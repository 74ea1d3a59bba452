"""``medvl diagnose``: a score per finding for the studies that image files make up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tasks.commands.common import (
    REJECTED,
    cache_option,
    check_out_file,
    console,
    echo_notice,
    json_option,
    json_text,
    load_model,
    load_prompt_set,
    model_options,
    new_table,
    prompts_option,
    report_rejected,
    write_csv,
)

if TYPE_CHECKING:
    from rich.table import Table

    from medvl.types import ImageReader
    from tasks.zero_shot import Diagnosis, SliceScores

BAR = 24  # characters of a full bar


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@model_options
@prompts_option
@click.option("--finding", "findings", multiple=True, metavar="NAME", help="Score only this finding (repeatable).")
@cache_option
@json_option
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), metavar="OUT", help="Write the scores as a table too.")
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
    cache: Path | None,
    as_json: bool,
    csv_path: Path | None,
    rejected_path: Path | None,
    batch_size: int,
) -> None:
    """Score findings in images by comparing them with prompt pairs.

    FILE is an image (DICOM, PNG, JPEG, TIFF), with a CT model a volume (NIfTI, MHA, NRRD, a zip or the folder of a DICOM series), or a
    folder of them; tables and folders named masks are passed over. DICOM films, and series folders, whose headers name the same study are
    one, scored by the mean over its images, or from all of them together where the model pools views or series; a picture is a study of
    its own. With --json one object a line per study, in order, as soon as it is known; of a volume it has the score of every slice, each
    as if it were the whole study. Scores are not calibrated: not probabilities.

    \b
    Examples:
      medvl diagnose film.dcm --model demo/model
      medvl diagnose folder/ other.png --model demo/model --json --rejected bad.csv
      medvl diagnose film.dcm --model demo/model --finding pneumothorax --finding edema
      medvl diagnose volume.nii.gz series_folder/ --model demo_ct/model
    """
    prompt_set = load_prompt_set(prompts)
    if unknown := [name for name in findings if name not in prompt_set.findings]:
        raise click.UsageError(f"--finding {', '.join(unknown)}: no prompts for it; known: {', '.join(prompt_set.findings)}")
    check_out_file(csv_path, "--csv")
    check_out_file(rejected_path, "--rejected")
    encoder = load_model(model, device, cache)
    from tasks.zero_shot import diagnose as score_files
    from tasks.zero_shot import encode_prompts

    bank = encode_prompts(encoder, prompt_set, list(dict.fromkeys(findings)) or None)
    results: list[Diagnosis] = []
    out = None if as_json else console()
    for result in score_files(encoder, find_images(encoder.reader, files), bank, batch_size):
        results.append(named_if_empty_folder(result, encoder.reader))
        if out is None:
            click.echo(json_text(as_object(results[-1])))
        elif results[-1].ok:
            click.echo("\n".join(results[-1].paths))
            out.print(as_table(results[-1]))
    rejected = [one for result in results for one in result.unreadable.items()]
    if csv_path is not None:
        write_csv(
            csv_path,
            ("path", "paths", "ok", "error", *bank.findings),
            (
                (r.path, json_text(r.paths), int(r.ok), r.error or "", *(repr(r.findings[name]) if r.ok else "" for name in bank.findings))
                for r in results
            ),
        )
    report_rejected(rejected, "files", rejected_path)
    if not as_json:
        echo_notice()
    if rejected:
        ctx.exit(REJECTED)


def find_images(reader: ImageReader, files: Sequence[Path]) -> list[Path]:
    """The files in the order given, a folder replaced by the images in it; a folder without one stays, to be rejected by name."""
    found: list[Path] = []
    for path in files:
        found += (reader.find_images(path) or [path]) if path.is_dir() else [path]
    return found


def named_if_empty_folder(result: Diagnosis, reader: ImageReader) -> Diagnosis:
    """A folder in which the reader finds no image says so; one that is itself an image, as of a series, keeps its error."""
    path = Path(result.path)
    if result.ok or not path.is_dir() or reader.find_images(path):
        return result
    error = f"{result.path}: no image in this folder; expected DICOM files or {', '.join(sorted(reader.suffixes - {'.dcm', '.dicom'}))}"
    return replace(result, error=error, unreadable={result.path: error})


def as_object(result: Diagnosis) -> dict[str, Any]:
    """One study as JSON has it; ``slices`` only of volumes from a tower that keeps slices."""
    from medvl.types import RESEARCH_USE

    return {
        "path": result.path,
        "paths": list(result.paths),
        "ok": result.ok,
        "error": result.error,
        "findings": result.findings,
        **({"slices": [asdict(one) for one in result.slices]} if result.slices else {}),
        "calibrated": False,
        "warnings": list(result.warnings),
        "notice": RESEARCH_USE,
    }


def as_table(result: Diagnosis) -> Table:
    """One study for a person."""
    notes = "; ".join(
        ("scores are not calibrated: compare studies, not findings", *([result.error] if result.error else []), *result.warnings)
    )
    deep = ("best slice",) if result.slices else ()
    bar = "0" + "1".rjust(BAR - 1)
    table = new_table(None, "finding", "score", bar, *deep, numbers=("score",), whole=("finding", *deep), caption=notes)
    for name, score in result.findings.items():
        best = ("; ".join(_best_slice(one, name) for one in result.slices),) if deep else ()
        table.add_row(name, f"{score:.3f}", "█" * round(score * BAR), *best)
    return table


def _best_slice(of: SliceScores, finding: str) -> str:
    """The slice of a volume that speaks most for a finding: its place in the file, from 0, and its height in the patient."""
    scores = of.findings[finding]
    best = max(range(len(scores)), key=scores.__getitem__)
    return f"{of.index[best]:.0f} (z {of.z_mm[best]:.0f} mm): {scores[best]:.3f}"
