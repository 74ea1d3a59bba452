"""``medvl demo``: the whole path on phantoms, ending in one page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tasks.commands.common import check_out_folder, echo_notice, json_option, json_text

if TYPE_CHECKING:
    from tasks.demo import Modality


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, metavar="DIR", help="Where all of it goes."
)
@click.option(
    "--modality",
    type=click.Choice(["xray", "ct", "both"]),
    default="xray",
    show_default=True,
    help="Radiographs, CT volumes, or one model for both.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of phantoms, weights and order.")
@click.option("--train-studies", type=click.IntRange(min=1), metavar="N", help="Phantoms to train on; the recipe's number unless told.")
@click.option("--test-studies", type=click.IntRange(min=1), metavar="N", help="Held-out phantoms; the recipe's number unless told.")
@click.option(
    "--epochs", type=click.IntRange(min=1), metavar="N", help="Passes over the training phantoms; the recipe's number unless told."
)
@json_option
def demo(
    out: Path, modality: str, seed: int, train_studies: int | None, test_studies: int | None, epochs: int | None, as_json: bool
) -> None:
    """Make phantoms, train on them, evaluate on held-out ones and write a page to look at.

    Leaves results.json, predictions.csv, report.html, model/ and data/ in DIR; figures of CT are under "ct" in results.json. With both,
    phantoms, runs and predictions lie in DIR/xray and DIR/ct, and DIR/model reads either kind. Everything shown is synthetic.

    \b
    Examples:
      medvl demo
      medvl demo --out demo1 --seed 1
      medvl demo --out demo_both --modality both
      medvl demo --out quick --train-studies 64 --test-studies 32 --epochs 1    a look in under a minute, not a result
    """
    check_out_folder(out)
    from tasks.demo import SIZES, run_demo

    halves: tuple[Modality, ...] = ("xray", "ct") if modality == "both" else ("ct",) if modality == "ct" else ("xray",)
    asked = {"train": train_studies, "test": test_studies, "epochs": epochs}
    chosen = {name: value for name, value in asked.items() if value is not None}
    sizes = {}
    for name in halves:
        val = SIZES[name].val if train_studies is None else max(8, min(SIZES[name].val, train_studies // 8))
        sizes[name] = replace(SIZES[name], val=val, **chosen)
    results = run_demo(out, seed, sizes, modalities=halves)
    if as_json:
        click.echo(json_text(results))
        return
    from tasks.commands.evaluate import show_results

    for part in (results, results.get("ct")):
        if part is not None and "images" in part:
            show_results(part)
    click.echo(f"Open {out / 'report.html'}; figures in {out / 'results.json'}, the model in {out / 'model'}.")
    echo_notice()
