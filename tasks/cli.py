"""The ``medvl`` command: one group, a module per subcommand, nothing heavy imported before a subcommand runs.

Exit codes: 0 fine, 1 some inputs rejected, 2 usage, 3 internal error. An exception that our own code raised by intent says what was wrong
with the input and what to do, so it is a usage error. Of any other only kind and place are shown: its message may quote what a file holds.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

import medvl
from tasks.commands.average import average
from tasks.commands.calibrate import calibrate
from tasks.commands.calibrate_maps import calibrate_maps
from tasks.commands.card import card
from tasks.commands.common import INTERNAL
from tasks.commands.compare import compare
from tasks.commands.demo import demo
from tasks.commands.diagnose import diagnose
from tasks.commands.evaluate import evaluate
from tasks.commands.evaluate_maps import evaluate_maps
from tasks.commands.ground import ground
from tasks.commands.index import index
from tasks.commands.index_shards import embed, merge
from tasks.commands.inspect import inspect
from tasks.commands.match import match
from tasks.commands.phantom import phantom
from tasks.commands.probe import probe
from tasks.commands.read import calibrate_reading, read
from tasks.commands.reports import reports
from tasks.commands.search import search
from tasks.commands.shards import shards
from tasks.commands.tabulate import tabulate
from tasks.commands.train import fit, test, validate
from tasks.commands.view import view

OURS = ("medvl", "modalities", "reports", "tasks")
BROKEN_PIPE, INTERRUPTED = 141, 130  # 128 + the signal, as shells report it


class Guarded(click.Group):
    """A group in which an unexpected exception ends in one line and exit code 3, with a traceback only on request."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Subcommands in the order they were added: the way a user meets them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # the reader of our output has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(BROKEN_PIPE)
        except KeyboardInterrupt:
            click.echo("medvl: interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            if raised_by_intent(error):
                raise click.UsageError(str(error)) from error
            if not ctx.params["debug"]:
                click.echo(f"medvl: internal error: {_told(error)}; set MEDVL_DEBUG=1 for the traceback", err=True)
            ctx.exit(INTERNAL)


def raised_by_intent(error: Exception) -> bool:
    """Whether a ``raise`` statement in one of our packages wrote the message, or the class is ours: such messages are safe to show."""
    if type(error).__module__.partition(".")[0] in OURS:
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, (ValueError, LookupError, OSError)) and _is_ours(last.filename) and (last.line or "").startswith("raise ")


def _is_ours(file: str) -> bool:
    root = Path(__file__).parent.parent
    return any(Path(file).is_relative_to(root / name) for name in OURS)


def _told(error: Exception) -> str:
    """Kind and place of an exception, and for the operating system's errors what it said of which path."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _is_ours(frame.filename)] or frames
    place = f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}"
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}{f': {error.filename}' if error.filename else ''} ({place})"
    if isinstance(error, ImportError) and error.name:
        return f"{type(error).__name__}: {error.name} ({place})"
    return f"{type(error).__name__} ({place})"


@click.group(cls=Guarded, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(medvl.__version__, prog_name="medvl")
@click.option("--debug", is_flag=True, envvar="MEDVL_DEBUG", help="Show the traceback of an internal error (also MEDVL_DEBUG=1).")
def cli(debug: bool) -> None:
    """Image and report encoders for medical imaging: train, diagnose, ground, search, evaluate.

    Research use, not for diagnosis.

    \b
    Examples:
      medvl demo --out demo                          phantoms, training, evaluation and a page to look at: minutes, no data needed
      medvl phantom data --studies 200 --seed 1      synthetic radiographs with reports and masks
      medvl inspect film.dcm volume.nii.gz           modality, geometry, units and warnings of files
      medvl reports labels reports.csv --label-set chexpert_14 --out labels.csv
      medvl match --config RECIPE --manifest data/manifest.csv    how well two towers match before any training
      medvl fit --config tasks/recipes/NAME.yaml     train on a study manifest
      medvl diagnose film.dcm folder/ --model demo/model --json
      medvl calibrate data/manifest.csv --model demo/model     probabilities and decisions, fitted on validation studies
      medvl ground film.dcm --phrase "left pleural effusion" --model demo/model --out maps
      medvl view film.dcm --model demo/model          a page on this machine: the image, and maps of what is typed
      medvl index build demo/data/manifest.csv --model demo/model --store archive.db
      medvl search --store archive.db --model demo/model --query "large pneumothorax" --top 5
      medvl read film.dcm --store archive.db --model demo/model       what the reports of similar studies say, or nothing
      medvl evaluate --model demo/model --manifest demo/data/manifest.csv --out results
      medvl tabulate results other/results.json            results of one protocol side by side, with paired differences
      medvl compare clip siglip radzero --out compared      recipes under the same budget, in one table
      medvl card run --results results/results.json

    Exit codes: 0 fine, 1 some inputs rejected, 2 usage, 3 internal error.
    """


for _command in (
    *(demo, phantom, inspect, reports, shards, match, fit, validate, test, average),
    *(diagnose, calibrate, ground, calibrate_maps, view, index, search, read, calibrate_reading),
    *(evaluate, evaluate_maps, tabulate, probe, compare, card),
):
    cli.add_command(_command)
for _command in (embed, merge):
    index.add_command(_command)


def main() -> None:
    """Run the command line; ends the process with the exit code."""
    cli.main(prog_name="medvl")
