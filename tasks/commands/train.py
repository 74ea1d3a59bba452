"""``medvl fit``, ``validate`` and ``test``: handed on untouched to the trainer's command line."""

from __future__ import annotations

from pathlib import Path

import click

from tasks.commands.common import echo_notice

UNTOUCHED = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False, "help_option_names": []}


def _run(ctx: click.Context, subcommand: str, args: tuple[str, ...]) -> None:
    if args and set(args) <= {"--help", "-h"}:
        click.echo(ctx.get_help() + "\n\nEvery option (this takes the trainer a few seconds to list):\n")
    from medvl.training.cli import run

    code = run(subcommand, list(args), _write_card if subcommand == "fit" else None)
    if code == 0:
        echo_notice()
    ctx.exit(code)


def _write_card(folder: Path) -> None:
    """The card of a run that has ended; it has no results yet. One that cannot be written costs the run nothing."""
    from medvl.model import ConfigError
    from tasks.card import write_card

    try:
        write_card(folder)
    except (ConfigError, OSError) as error:
        click.echo(f"no model card was written: {error}", err=True)


@click.command(
    context_settings=UNTOUCHED,
    add_help_option=False,
    options_metavar=None,
    short_help="Train a model from a recipe (LightningCLI options).",
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
@click.pass_context
def fit(ctx: click.Context, args: tuple[str, ...]) -> None:
    """Train a model from a recipe; weights, model card, resolved recipe, logs and the checkpoint go to --out.

    Exits with 1 if an image or row had to be left out; rejected.csv in that folder says which and why. --dry-run takes a few steps and says
    what the run would cost: weights, memory, steps, time. --monitor and --mode say by what the best model is chosen; losses and measures
    are logged as CSV, and with --tensorboard, --wandb (offline unless WANDB_MODE says otherwise) or --mlflow there too.

    \b
    Examples:
      medvl fit --config tasks/recipes/xray_phantom.yaml --data.init_args.manifest data/manifest.csv --out run
      medvl fit --config tasks/recipes/xray_notes.yaml --data.init_args.manifest films.csv --trainer.max_epochs 5 --out run
      medvl fit --config tasks/recipes/clip.yaml --data.init_args.manifest films.csv --dry-run
      medvl fit --config run/config.yaml --out run --resume true      go on where a stopped run was
    """
    _run(ctx, "fit", args)


@click.command(context_settings=UNTOUCHED, add_help_option=False, options_metavar=None, short_help="Measure a run on its validation split.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
@click.pass_context
def validate(ctx: click.Context, args: tuple[str, ...]) -> None:
    """Measure the weights that a run kept on its validation split. Give the run's own resolved recipe and folder.

    \b
    Examples:
      medvl validate --config run/config.yaml --out run
      medvl validate --config run/config.yaml --out run --data.init_args.manifest other/manifest.csv
    """
    _run(ctx, "validate", args)


@click.command(context_settings=UNTOUCHED, add_help_option=False, options_metavar=None, short_help="Measure a run on its test split.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
@click.pass_context
def test(ctx: click.Context, args: tuple[str, ...]) -> None:
    """Measure the weights that a run kept on its test split. AUROC, pointing game and retrieval come from medvl evaluate.

    \b
    Examples:
      medvl test --config run/config.yaml --out run
      medvl test --config run/config.yaml --out run --data.init_args.manifest other/manifest.csv
    """
    _run(ctx, "test", args)
