"""``medvl compare``: recipes trained on the same data under the same budget, in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tasks.commands.common import REJECTED, check_out_folder, echo_notice, load_manifest, report_rejected, usage_errors
from tasks.commands.leaks import allow_leak_option, leaks_checked

if TYPE_CHECKING:
    from tasks.comparison import Line


@click.command(short_help="Train recipes on the same studies and compare them.")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR", help="Folder of tables, page and runs."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each recipe.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the runs of each recipe.")
@click.option("--manifest", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Studies instead of phantoms.")
@click.option(
    "--studies", type=click.IntRange(min=12), default=1700, show_default=True, help="Phantoms to make, a quarter of them held out."
)
@click.option("--data-seed", type=click.IntRange(min=0), default=200, show_default=True, help="Of the phantoms.")
@click.option("--size", type=click.IntRange(min=32), default=128, show_default=True, help="Side of the phantoms in pixels.")
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=5400,
    show_default=True,
    help="Images that each run sees in training, to the nearest that all batch sizes divide.",
)
@click.option("--anew", is_flag=True, help="Make finished runs again.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time, a thread each.")
@allow_leak_option
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="Passed to every fit, as --KEY=VALUE.")
def compare(
    recipes: tuple[str, ...],
    out: Path,
    seeds: int,
    first_seed: int,
    manifest: Path | None,
    studies: int,
    data_seed: int,
    size: int,
    images: int,
    workers: int,
    allowed: tuple[str, ...],
    options: tuple[str, ...],
    anew: bool,
) -> None:
    """Train every RECIPE (a file, or the name of one that comes with medvl) on the same studies, with the same number of images seen.

    All recipes are of one modality; those of CT need a --manifest (`medvl phantom DIR --studies 400 --ct --no-xray` makes one of phantoms).

    Leaves comparison.csv (a line a recipe: AUROC, pointing game, CNR, Recall@10, negation, each with its interval and its difference from
    the first recipe, on the images that both could read), runs.csv, comparison.html, and the runs. What this version has finished is kept:
    a comparison that was stopped goes on. First, test studies that share patients, studies or images with those of training or validation
    are listed in leaks.csv and end it, unless allowed by name. Runs that fail, and inputs that runs leave out, are listed in rejected.csv;
    the exit code is then 1.

    \b
    Examples:
      medvl compare clip siglip radzero xray_phantom --out compared
      medvl compare clip my_recipe.yaml --seeds 5 --manifest films/manifest.csv --images 100000 --out compared
      medvl compare clip gloria --seeds 1 --studies 60 --images 64 --out quick      a look in a minute, not a result
    """
    check_out_folder(out)
    from rich.console import Console

    from tasks.comparison import REJECTED as LISTED
    from tasks.comparison import check_modalities, reader_of
    from tasks.comparison import compare as run_comparison
    from tasks.demo import recipe_path

    found = []
    for name in recipes:
        path = Path(name) if Path(name).is_file() else recipe_path(f"{name}.yaml")
        if not path.is_file():
            raise click.UsageError(f"{name}: no such file, and no recipe of that name comes with medvl")
        found.append(path)
    given = None if manifest is None else load_manifest(manifest, None, allow_outside=False)
    with usage_errors(ValueError):
        check_modalities(found, [f"--{one}" for one in options], given)
    console, synthetic = Console(stderr=True), manifest is None
    if manifest is None:
        from tasks.phantoms import write_cohort

        test = max(4, studies // 5)
        val = max(2, studies // 20)
        manifest = write_cohort(
            out / "data", studies, data_seed, size=size, counts={"train": studies - test - val, "val": val, "test": test}, workers=workers
        )
    changes = [f"--{one}" for one in options]
    if (read_by := reader_of(found, changes)) is not None:
        table = load_manifest(manifest, None)
        tested = table.select(split="test", modality=read_by[0]).rows
        leaks_checked(read_by[1], manifest, table, tested, "test", out, allowed=allowed)
    lines, failed, left_out = run_comparison(
        found,
        range(first_seed, first_seed + seeds),
        out,
        manifest,
        images,
        workers,
        changes,
        console,
        synthetic,
        anew,
    )
    show(lines)
    click.echo(f"Open {out / 'comparison.html'}; figures in {out / 'comparison.csv'}.")
    echo_notice()
    if failed or left_out:
        everything = f"all in {out / LISTED}"
        report_rejected([(run, f"{run}: {why}") for run, why in failed.items()], f"runs; {everything}")
        inputs = {row: f"row {row}, {why} ({', '.join(runs)})" for (row, _, _, why), runs in left_out.items()}
        report_rejected([(str(row), why) for row, why in inputs.items()], f"inputs of runs; {everything}")
        raise SystemExit(REJECTED)


def show(lines: Sequence[Line]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from tasks.comparison import SHOWN
    from tasks.page.comparison import TITLES

    table = Table("recipe", *(TITLES[m] for m in SHOWN), "validation", "training s / 1000", "fit CPU s / 1000", "fit MB")
    for line in lines:
        cells = []
        for m in SHOWN:
            one = line.metrics.get(m)
            cells.append("–" if one is None else f"{one.value:.3f} ({one.ci_low:.3f} to {one.ci_high:.3f})")
        name = f"[bold]{line.name}[/bold]" if line.best else line.name
        training = "–" if math.isnan(line.training_seconds_per_1000) else f"{line.training_seconds_per_1000:.1f}"
        table.add_row(name, *cells, f"{line.choice:.3f}", training, f"{line.cpu_seconds_per_1000:.1f}", f"{line.peak_mb:.0f}")
    Console(width=160).print(table)
