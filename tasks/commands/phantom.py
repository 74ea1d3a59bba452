"""``medvl phantom``: synthetic chests as real files."""

from __future__ import annotations

from pathlib import Path

import click

from tasks.commands.common import check_out_folder, echo_notice, json_option, json_text, progress, usage_errors


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--studies", type=click.IntRange(min=1), required=True, metavar="N", help="How many patients, each with one study.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option(
    "--size",
    type=click.IntRange(min=32, max=512),
    default=128,
    show_default=True,
    help="Rows and columns of a radiograph, a multiple of 16.",
)
@click.option("--xray/--no-xray", default=True, help="Radiographs, or CT alone.")
@click.option("--lateral", is_flag=True, help="A lateral radiograph beside the frontal one.")
@click.option("--ct", is_flag=True, help="The CT volume too, as NIfTI.")
@click.option("--ct-series", is_flag=True, help="The CT volume too, as a DICOM series.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes; one per core unless told.")
@json_option
def phantom(
    out: Path, studies: int, seed: int, size: int, xray: bool, lateral: bool, ct: bool, ct_series: bool, workers: int | None, as_json: bool
) -> None:
    """Write a cohort of synthetic thorax phantoms to OUT.

    Radiographs are DICOM in OUT/xray, masks lie in OUT/masks, reports and labels in OUT/manifest.csv. Everything is synthetic.

    \b
    Examples:
      medvl phantom data --studies 200 --seed 1
      medvl phantom data3d --studies 10 --seed 2 --ct --lateral
      medvl phantom dataCT --studies 10 --seed 2 --ct --no-xray
    """
    check_out_folder(out)
    from medvl.types import RESEARCH_USE
    from tasks.phantoms import write_cohort

    with usage_errors(ValueError), progress("phantoms", studies) as advance:
        manifest = write_cohort(
            out, studies, seed, size=size, ct=ct, ct_series=ct_series, lateral=lateral, xray=xray, workers=workers, progress=advance
        )
    if as_json:
        click.echo(json_text({"manifest": str(manifest), "studies": studies, "seed": seed, "synthetic": True, "notice": RESEARCH_USE}))
        return
    click.echo(f"{studies} synthetic studies, seed {seed}: {manifest}")
    echo_notice()
