"""What the subcommands share: options, loading with errors a user can act on, JSON, progress, and the notice that goes with every output.

Exit codes: 0 fine, 1 some inputs rejected, 2 usage, 3 internal error. Standard output holds results, standard error all else.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from medvl.data.manifest import Manifest, StudyImage
    from medvl.model import DualEncoder
    from medvl.types import TextSource
    from reports.prompts import PromptSet
    from reports.text_source import TextPolicy

F = TypeVar("F", bound=Callable[..., Any])
REJECTED, INTERNAL = 1, 3
SHOWN = 10  # rejected inputs spelled out on standard error; the rest are counted


def gathered(kind: type[Any], name: str) -> Callable[[F], F]:
    """A command that gets the options of the names of a dataclass's fields as one of these, called ``name``."""
    names = [one.name for one in fields(kind)]

    def decorate(command: F) -> F:
        @wraps(command)
        def called(*args: Any, **options: Any) -> Any:
            return command(*args, **{name: kind(**{one: options.pop(one) for one in names})}, **options)

        return cast(F, called)

    return decorate


def model_options(command: F) -> F:
    """``--model`` and ``--device``."""
    return model_option(click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1; CUDA if there is one unless told.")(command))


def model_option(command: F) -> F:
    """``--model`` alone."""
    return click.option(
        "--model", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder with config.json and model.safetensors."
    )(command)


def manifest_options(command: F) -> F:
    """``--columns``, ``--modality`` and ``--allow-outside``, for commands that read a manifest."""
    command = click.option("--allow-outside", is_flag=True, help="Accept paths that leave the table's folder.")(command)
    command = click.option(
        "--modality", type=click.Choice(["xray", "ct"]), default="xray", show_default=True, help="Which rows of the manifest to use."
    )(command)
    return click.option(
        "--columns", type=click.Path(path_type=Path), metavar="YAML", help="How the table names its columns, if not as we do."
    )(command)


PROMPTS = "Prompt pairs, if not those for phantoms: a file, or a built-in set such as chest_xray, chest_ct, chexpert_14 or padchest."


def prompts_option(command: F) -> F:
    """``--prompts``."""
    return click.option("--prompts", type=click.Path(path_type=Path), metavar="YAML|SET", help=PROMPTS)(command)


def text_policy_option(command: F) -> F:
    """``--text-policy``, for commands that index reports."""
    return click.option(
        "--text-policy",
        type=click.Choice(["sentences", "impression", "findings", "both", "longer"]),
        default="sentences",
        show_default=True,
        help="What of a report is indexed: each sentence of findings and impression, or one text.",
    )(command)


def text_source(policy: str) -> TextSource:
    """The source of a ``--text-policy``; "sentences" is what recipes train on, the others make one text of a report."""
    from reports.text_source import ReportSentences, ReportText

    return ReportSentences() if policy == "sentences" else ReportText(cast("TextPolicy", policy))


def interval_options(command: F) -> F:
    """``--repeats`` and ``--seed`` of the bootstrap."""
    repeats = click.option(
        "--repeats", type=click.IntRange(min=0), default=1000, show_default=True, help="Bootstrap resamples for the intervals."
    )
    seed = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the resamples.")
    return repeats(seed(command))


def validation_split_option(command: F) -> F:
    """``--split`` of what is chosen and not measured."""
    return click.option(
        "--split", type=click.Choice(["val", "train"]), default="val", show_default=True, help="Which studies; never those of a figure."
    )(command)


def json_option(command: F) -> F:
    """``--json``, the same everywhere."""
    return click.option("--json", "as_json", is_flag=True, help="Print strict JSON instead of a table.")(command)


def cache_option(command: F) -> F:
    """``--cache``, for commands that may read the same images again."""
    return click.option(
        "--cache", type=click.Path(path_type=Path), metavar="DIR", help="Keep preprocessed images there, and take them from there."
    )(command)


@contextmanager
def usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of our own loaders, whose messages are safe to show, into usage errors."""
    try:
        yield
    except kinds as error:
        raise click.UsageError(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)) from error


def load_model(folder: Path, device: str | None, cache: Path | None = None) -> DualEncoder:
    """The model of a run, or a usage error that says what is missing; it reads through ``cache`` if given."""
    if cache is not None:
        check_out_folder(cache, "--cache")
    model = _load_model(folder, device)
    if cache is not None:
        from medvl.data.cache import CachedReader, SampleCache

        model.reader = CachedReader(model.reader, SampleCache(cache))
    return model


def _load_model(folder: Path, device: str | None) -> DualEncoder:
    if not folder.is_dir():
        raise click.UsageError(f"--model {folder}: no such folder; expected the one that `medvl fit` or `medvl demo` wrote the model to")
    from medvl.model import ConfigError, load

    with usage_errors(FileNotFoundError, ConfigError):
        if device is None:
            return load(folder)
        import torch

        try:
            where = torch.device(device)
        except RuntimeError:
            raise click.UsageError(f"--device {device}: no such device; expected cpu, cuda or cuda:1") from None
        if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
            raise click.UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        return load(folder, device=where)


def weights_sha256(folder: Path) -> str:
    """Hash of the weights, as the run's config.json has it (loading has compared it with the file)."""
    return str(model_facts(folder)["weights_sha256"])


def model_facts(folder: Path) -> dict[str, Any]:
    """What the run's config.json says of the model: hash of the weights, version, and how it came about."""
    from medvl.model import CONFIG

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return {name: config.get(name) for name in ("weights_sha256", "medvl", "provenance")}


def load_prompt_set(path: Path | None) -> PromptSet:
    """The prompts of a file, or the built-in ones."""
    from reports.prompts import load_prompts

    with usage_errors(FileNotFoundError, ValueError):
        return load_prompts(path)


def load_manifest(table: Path, columns: Path | None, allow_outside: bool = False) -> Manifest:
    """A manifest with its bad rows left out (they stand in ``rejected``)."""
    from medvl.data.manifest import ColumnMap, ManifestError, read_manifest

    for name, path in (("manifest", table), ("column map", columns)):
        if path is not None and not path.is_file():
            raise click.UsageError(f"{name} {path}: no such file")
    import yaml

    with usage_errors(ManifestError, ValueError, yaml.YAMLError):
        chosen = None if columns is None else ColumnMap.load(columns)
        return read_manifest(table, columns=chosen, allow_outside=allow_outside, strict=False)


def labelled_findings(rows: Iterable[StudyImage]) -> list[str]:
    """The findings that some row has as present or absent, by their names."""
    return sorted({name for row in rows for name, value in row.labels.items() if value in (0, 1)})


def json_text(value: Any) -> str:
    """Strict JSON on one line."""
    return json.dumps(value, allow_nan=False)


def console(*, stderr: bool = False) -> Console:
    """A rich console; on standard output for results, on standard error for progress."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def new_table(title: str | None, *columns: str, numbers: Sequence[str] = (), whole: Sequence[str] = (), caption: str = "") -> Table:
    """A table in the commands' style.

    Args:
        title: shown as it is, brackets and all.
        columns: headings.
        numbers: those whose cells stand at the right.
        whole: those whose cells are never cut, folded if need be.
        caption: below the table.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=None if title is None else escape(title), caption=escape(caption) or None, box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for name in columns:
        table.add_column(
            name, justify="right" if name in numbers else "left", no_wrap=name in numbers, overflow="fold" if name in whole else "ellipsis"
        )
    return table


def echo_notice() -> None:
    """The notice below every human-readable output."""
    from medvl.types import RESEARCH_USE

    click.echo(RESEARCH_USE)


def report_rejected(rejected: Sequence[tuple[str, str]], what: str, out: Path | None = None) -> None:
    """Count rejected inputs on standard error, spell out the first few, and list all in ``out`` if given.

    Args:
        rejected: what was rejected, and why.
        what: the inputs in the plural: "files", "rows".
    """
    if out is not None:
        write_csv(out, ("path", "reason"), rejected)
    if not rejected:
        return
    click.echo(f"{len(rejected)} rejected ({what})" + ("" if out is None else f", listed in {out}") + ":", err=True)
    for _, reason in rejected[:SHOWN]:
        click.echo(f"  {reason}", err=True)
    if len(rejected) > SHOWN:
        click.echo(f"  and {len(rejected) - SHOWN} more", err=True)


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a table whole or not at all."""
    from medvl.files import write_atomically

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def check_out_folder(folder: Path, option: str = "--out", mode: int = 0o777) -> None:
    """Make the output folder, with the rights ``mode`` if it is new, and see that it can be written to.

    Raises:
        click.UsageError: the path is a file, or cannot be made or written to.
    """
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"{option} {folder}: cannot be made a folder: {error.strerror}") from None
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.UsageError(f"{option} {folder}: cannot be written to: {error.strerror}") from None


def check_out_file(file: Path | None, option: str) -> None:
    """Make the folder of an output file, before work is put into what it shall hold; None: there is no such file.

    Raises:
        click.UsageError: the path is a folder, or its folder cannot be made or written to.
    """
    if file is None:
        return
    if file.is_dir():
        raise click.UsageError(f"{option} {file}: is a folder, expected the name of a file to write")
    check_out_folder(file.parent, option)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields a function that is called with how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
