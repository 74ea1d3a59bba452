"""``medvl average``: a fine-tuned model drawn back towards its start."""

from __future__ import annotations

from pathlib import Path

import click

from tasks.commands.common import check_out_folder, echo_notice, usage_errors


@click.command()
@click.argument("start", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("finetuned", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Share of FINETUNED: 0 is START, 1 is FINETUNED."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the averaged model.")
def average(start: Path, finetuned: Path, alpha: float, out: Path) -> None:
    """Average the weights of two models of one architecture (WiSE-FT): what FINETUNED has learned, with some of the robustness of START.

    Choose alpha on validation, never on test. START and FINETUNED are folders of runs.

    \b
    Examples:
      medvl average pretrained run --alpha 0.5 --out averaged
      medvl evaluate --model averaged --manifest data/manifest.csv --split val --out results
    """
    from medvl.model import ConfigError
    from tasks.averaging import save_average

    check_out_folder(out)
    with usage_errors(ValueError, FileNotFoundError, ConfigError):
        save_average(start, finetuned, alpha, out)
    click.echo(f"{out}: {1 - alpha:g} of {start} and {alpha:g} of {finetuned}", err=True)
    echo_notice()
