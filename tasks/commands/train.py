"""``medvl fit``, ``validate`` and ``test``: handed on untouched to the trainer's command line."""

from __future__ import annotations

import click

from tasks.commands.common import echo_notice

UNTOUCHED = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False, "help_option_names": []}


def _run(ctx: click.Context, subcommand: str, args: tuple[str, ...]) -> None:
    from medvl.training.cli import run

    code = run(subcommand, list(args))
    if code == 0:
        echo_notice()
    ctx.exit(code)


@click.command(context_settings=UNTOUCHED, add_help_option=False, short_help="Train a model from a recipe (LightningCLI options).")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def fit(ctx: click.Context, args: tuple[str, ...]) -> None:
    """Train a model from a recipe: medvl fit --config RECIPE.yaml [--data.init_args.manifest TABLE] [--trainer.max_epochs N]."""
    _run(ctx, "fit", args)


@click.command(context_settings=UNTOUCHED, add_help_option=False, short_help="Measure a run on its validation split.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def validate(ctx: click.Context, args: tuple[str, ...]) -> None:
    """Measure a run on its validation split: medvl validate --config RECIPE.yaml --ckpt_path FILE."""
    _run(ctx, "validate", args)


@click.command(context_settings=UNTOUCHED, add_help_option=False, short_help="Measure a run on its test split.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def test(ctx: click.Context, args: tuple[str, ...]) -> None:
    """Measure a run on its test split: medvl test --config RECIPE.yaml --ckpt_path FILE."""
    _run(ctx, "test", args)
