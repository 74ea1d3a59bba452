"""``medvl card``: the card of a saved run."""

from __future__ import annotations

from pathlib import Path

import click

from tasks.commands.common import check_out_file, usage_errors, weights_sha256


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where to write it; MODEL_CARD.md in RUN unless told.")
@click.option("--name", metavar="NAME", help="Write it to model_cards/NAME.md.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="results.json of this model; the one in RUN, or beside it where that is of these weights, unless told.",
)
@click.option(
    "--probes", type=click.Path(path_type=Path), metavar="FILE", help="probes.json of this model; found as the results unless told."
)
@click.option(
    "--about",
    "about_path",
    type=click.Path(path_type=Path),
    metavar="YAML",
    help="Yours: name, intended_use, not_for, data, failures.",
)
@click.option(
    "--license", "licence", metavar="NAME", help="Of the weights, as the Hugging Face hub names licences: apache-2.0, cc-by-nc-4.0."
)
@click.option(
    "--check",
    "checked",
    type=click.Path(path_type=Path),
    metavar="CARD",
    help="Only see that CARD has no figure without a source.",
)
def card(
    run: Path,
    out: Path | None,
    name: str | None,
    results: Path | None,
    probes: Path | None,
    about_path: Path | None,
    licence: str | None,
    checked: Path | None,
) -> None:
    """Write the card of a saved model: what it is and is for, what is done to an image before it, how it was trained and measured, and its
    limits.

    RUN is the folder that medvl fit or medvl demo wrote the model to. Both leave a card there; write it anew once there are results.
    Markdown, with the front matter of the Hugging Face hub. A share or percentage in --about that is no figure of results or probes ends
    it, as does, with --check, a line of results or probes in CARD that these files do not make.

    \b
    Examples:
      medvl card run
      medvl card run --results results/results.json --probes probes/probes.json
      medvl card demo/model --name demo --license apache-2.0
      medvl card demo/model --check model_cards/demo.md
    """
    if out is not None and name is not None:
        raise click.UsageError("give --out or --name")
    if name is not None:
        if Path(name).name != name or name in (".", ".."):
            raise click.UsageError(f"--name {name}: expected a name, not a path")
        out = Path("model_cards") / f"{name}.md"
    check_out_file(out, "--out")
    from medvl.model import ConfigError
    from tasks.card import PROBES, RESULTS, About, ResultsError, check_card, write_card

    with usage_errors(FileNotFoundError, ConfigError, ResultsError):
        weights = weights_sha256(run) if (run / "config.json").is_file() else None
        results = results or _beside(run, RESULTS, weights)
        probes = probes or _beside(run, PROBES, weights)
        if checked is not None:
            if results is None:
                raise click.UsageError(f"--check {checked}: there are no results of {run}; give --results")
            check_card(checked, results, probes)
            click.echo(f"{checked}: every figure has its source.")
            return
        about = None if about_path is None else About.load(about_path)
        click.echo(write_card(run, results, out, licence, probes, about))


def _beside(run: Path, name: str, weights: str | None) -> Path | None:
    """The file in the run's folder, else the one beside that folder if it is of the run's weights."""
    if (run / name).is_file():
        return run / name
    beside = run.resolve().parent / name
    if weights is None or not beside.is_file():
        return None
    return beside if weights in beside.read_text(encoding="utf-8", errors="replace") else None
