"""``medvl tabulate``: results of several evaluations side by side, with paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tasks.commands.common import check_out_folder, console, echo_notice, json_option, json_text, new_table, usage_errors, write_csv

if TYPE_CHECKING:
    from rich.table import Table

DIRECTIONS = ("image_to_report", "report_to_image")


@click.command(short_help="Results of evaluations side by side.")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULTS...")
@click.option(
    "--name", "names", multiple=True, metavar="NAME", help="What each is called, in their order; their folders' names unless told."
)
@click.option("--across", is_flag=True, help="Table them although their protocols differ; what differs is said.")
@click.option("--repeats", type=click.IntRange(min=0), help="Bootstrap resamples of the differences; as in the first unless told.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the resamples.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Write table.csv, differences.csv and tabulated.json there.")
@json_option
def tabulate(
    results: tuple[Path, ...], names: tuple[str, ...], across: bool, repeats: int | None, seed: int, out: Path | None, as_json: bool
) -> None:
    """Put the RESULTS of `medvl evaluate` (results.json, or its folder) in one table, and test their differences from the first.

    Results of different protocols (other prompts, rules, tables, splits, units) are refused unless --across is given. Differences are
    paired, on the studies that all measured: bootstrap over patients, and DeLong's test of each AUROC. Nothing is corrected for how many
    are tested.

    \b
    Examples:
      medvl tabulate first/results.json second/results.json
      medvl tabulate plain described --across --name "plain prompts" --name descriptors --out compared
    """
    from medvl.types import RESEARCH_USE
    from tasks.tabulation import TabulationError, as_dict, as_rows, difference_rows, load_result
    from tasks.tabulation import tabulate as tabled

    if names and len(names) != len(results):
        raise click.UsageError(f"--name was given {len(names)} times for {len(results)} results")
    if out is not None:
        check_out_folder(out)
    with usage_errors(TabulationError):
        loaded = [load_result(path, names[i] if names else None) for i, path in enumerate(results)]
        found = tabled(loaded, across=across, repeats=repeats, seed=seed)
    told = {"notice": RESEARCH_USE, **as_dict(found)}
    heading, lines = as_rows(found)
    columns, differences = difference_rows(found)
    if out is not None:
        from medvl.files import write_atomically

        write_csv(out / "table.csv", heading, lines)
        write_csv(out / "differences.csv", columns, differences)
        write_atomically(out / "tabulated.json", (json_text(told) + "\n").encode())
    if as_json:
        click.echo(json_text(told))
        return
    screen = console()
    for name, values in found.differing.items():
        click.echo(f"not the same protocol: {name}: {' / '.join(str(value)[:60] for value in values)}", err=True)
    for metric in dict.fromkeys(line[0] for line in lines):
        own = [line for line in lines if line[0] == metric]
        table = new_table(metric, "finding", *heading[2:], numbers=heading[2:])
        table.columns[0].no_wrap = True
        for line in own:
            cells = (_two_lines(cell) for cell in line[2:])
            table.add_row(line[1].replace("_", " "), *cells, style="bold" if line[1] == "mean" else None)
        screen.print(table)
    if found.why_not_paired:
        click.echo(f"No differences: {found.why_not_paired}.", err=True)
    for result in dict.fromkeys(row[0] for row in differences):
        own = [row for row in differences if row[0] == result and (row[1] == "AUROC" or row[2] in ("mean", *DIRECTIONS))]
        screen.print(_differences(f"{result} less {found.results[0].name}", own, found.shared))
    if not found.why_not_paired and out is not None:
        click.echo(f"All differences in {out / 'differences.csv'}.")
    echo_notice()


def _two_lines(estimate: str) -> str:
    """For a narrow column: the value of "0.928 (0.899 to 0.954)", and below it the interval to two digits."""
    value, _, ends = estimate.removesuffix(")").partition(" (")
    return f"{value}\n{'–'.join(f'{float(end):.2f}' if end != '?' else end for end in ends.split(' to '))}" if ends else value


def _differences(title: str, rows: Sequence[Sequence[str]], shared: int) -> Table:
    """AUROC of every finding, and the means of the other metrics."""
    note = f"on {shared} units that all measured; intervals 95 %, bootstrap over patients; nothing is corrected for how many are tested"
    numbers = ("difference", "95 % CI", "p", "p (DeLong)")
    table = new_table(title, "metric", *numbers, numbers=numbers, whole=("metric",), caption=note)
    for _, metric, finding, value, low, high, p, delong, *_ in rows:
        cells = [f"{float(cell):+.3f}" if cell else "–" for cell in (value, low, high)]
        tests = [f"{float(cell):.3f}" if cell else "–" for cell in (p, delong)]
        name = f"{metric} {finding.replace('_', ' ')}"
        table.add_row(name, cells[0], f"{cells[1]} to {cells[2]}", *tests, style="bold" if finding == "mean" else None)
    return table
