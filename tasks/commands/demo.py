"""``medvl demo``: the whole path on phantoms, ending in one page."""

from __future__ import annotations

from pathlib import Path

import click

from tasks.commands.common import check_out_folder, echo_notice, json_option, json_text


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, metavar="DIR", help="Where all of it goes."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of phantoms, weights and order.")
@click.option("--train-studies", type=click.IntRange(min=1), metavar="N", help="Phantoms to train on; the recipe's number unless told.")
@click.option("--test-studies", type=click.IntRange(min=1), metavar="N", help="Held-out phantoms; the recipe's number unless told.")
@click.option(
    "--epochs", type=click.IntRange(min=1), metavar="N", help="Passes over the training phantoms; the recipe's number unless told."
)
@json_option
def demo(out: Path, seed: int, train_studies: int | None, test_studies: int | None, epochs: int | None, as_json: bool) -> None:
    """Make phantoms, train on them, evaluate on held-out ones and write a page to look at.

    Leaves results.json, predictions.csv, report.html, model/ and data/ in DIR. Everything shown is synthetic.

    \b
    Examples:
      medvl demo
      medvl demo --out demo1 --seed 1
      medvl demo --out quick --train-studies 64 --test-studies 32 --epochs 1    a look in under a minute, not a result
    """
    check_out_folder(out)
    from tasks.demo import VAL_STUDIES, DemoSize, run_demo

    val = None if train_studies is None else max(8, min(VAL_STUDIES, train_studies // 8))
    chosen = {"train": train_studies, "val": val, "test": test_studies, "epochs": epochs}
    results = run_demo(out, seed, DemoSize(**{name: value for name, value in chosen.items() if value is not None}))
    if as_json:
        click.echo(json_text(results))
        return
    from tasks.commands.evaluate import show_results

    show_results(results)
    click.echo(f"Open {out / 'report.html'}; figures in {out / 'results.json'}, the model in {out / 'model'}.")
    echo_notice()
