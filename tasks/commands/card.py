"""``medvl card``: the card of a saved run."""

from __future__ import annotations

from pathlib import Path

import click

from tasks.commands.common import check_out_file, usage_errors


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where to write it; MODEL_CARD.md in RUN unless told.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="results.json of this model; the one in RUN, if there is one, unless told.",
)
@click.option(
    "--license", "licence", metavar="NAME", help="Of the weights, as the Hugging Face hub names licences: apache-2.0, cc-by-nc-4.0."
)
def card(run: Path, out: Path | None, results: Path | None, licence: str | None) -> None:
    """Write the card of a saved model: what it is, what is done to an image before it, how it was trained and measured, and its limits.

    RUN is the folder that medvl fit or medvl demo wrote the model to. Both leave a card there; write it anew once there are results.
    Markdown, with the front matter of the Hugging Face hub.

    \b
    Examples:
      medvl card run
      medvl card run --results results/results.json
      medvl card demo/model --results demo/results.json --out CARD.md --license apache-2.0
    """
    check_out_file(out, "--out")
    from medvl.model import ConfigError
    from tasks.card import RESULTS, ResultsError, write_card

    if results is None and (run / RESULTS).is_file():
        results = run / RESULTS
    with usage_errors(FileNotFoundError, ConfigError, ResultsError):
        click.echo(write_card(run, results, out, licence))
