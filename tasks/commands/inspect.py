"""``medvl inspect``: what image files hold, before anything is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tasks.commands.common import REJECTED, console, echo_notice, json_option, json_text, new_table

if TYPE_CHECKING:
    from rich.table import Table

    from modalities.inspection import Inspection

NUMBERS = "{:.4g}".format


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@json_option
@click.pass_context
def inspect(ctx: click.Context, files: tuple[Path, ...], as_json: bool) -> None:
    """Show modality, geometry, units and warnings of images: DICOM, NIfTI, MHA, NRRD, PNG, JPEG, TIFF.

    A FILE is one record, in the order given, also where several belong to one series. A folder or zip is grouped into its images and
    series. With --json one object a line; nothing from a header that identifies a patient is in it.

    \b
    Examples:
      medvl inspect film.dcm volume.nii.gz
      medvl inspect series_folder/ study.zip --json
    """
    from modalities.inspection import inspect_paths

    rejected = 0
    for path in files:
        for found in inspect_paths(path):
            rejected += not found.ok
            if as_json:
                click.echo(json_text(found.to_dict()))
            elif found.ok:
                console().print(as_table(found))
            else:
                click.echo(f"rejected: {found.error}", err=True)
    if not as_json:
        echo_notice()
    if rejected:
        ctx.exit(REJECTED)


def as_table(found: Inspection) -> Table:
    """One record for a person."""
    axes = "rows x columns" if found.kind == "image" else "x, y, z of the closest RAS"
    title = found.path if found.series is None else f"{found.path}, series {found.series}"
    table = new_table(title, "property", "value", whole=("value",))
    rows = {
        "modality": found.modality,
        f"shape ({axes})": None if found.shape is None else " x ".join(map(str, found.shape)),
        "spacing, mm": None if found.spacing_mm is None else " x ".join(map(NUMBERS, found.spacing_mm)),
        "values": None
        if found.value_range is None
        else " to ".join(map(NUMBERS, found.value_range)) + f" {found.unit or '(unit unknown)'}",
        "Hounsfield units": None if found.hu_verdict is None else f"{found.hu_verdict}: {found.hu_evidence}",
        "photometric": found.photometric,
        "transfer syntax": found.transfer_syntax,
        "stored orientation": found.orientation,
        "view": found.view,
        "frames": None if (found.frames or 1) == 1 else str(found.frames),
        "files": None if (found.files or 1) == 1 else str(found.files),
        "repaired": "\n".join(found.repairs) or None,
        "warnings": "\n".join(found.warnings) or None,
        "sha256 of values": found.sha256,
    }
    from rich.markup import escape

    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape(value))
    return table
