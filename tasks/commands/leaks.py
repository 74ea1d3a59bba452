"""The leak check as commands have it: its options, its progress, the list it leaves, and the refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tasks.commands.common import load_manifest, model_facts, progress, write_csv

if TYPE_CHECKING:
    from medvl.data.manifest import Manifest, StudyImage
    from medvl.types import ImageReader

LEAKS = "leaks.csv"
ALLOWED = ("patients", "studies", "images", "similar-images")
"""``tasks.leaks.KINDS``, here because a command line that is only asked for help loads nothing heavy."""
F = TypeVar("F", bound=Callable[..., Any])


def allow_leak_option(command: F) -> F:
    """``--allow-leak``."""
    return click.option(
        "--allow-leak", "allowed", type=click.Choice(ALLOWED), multiple=True, help="Measure in spite of this being shared; it is recorded."
    )(command)


def leak_options(command: F) -> F:
    """``--trained-on`` and ``--allow-leak``."""
    return click.option(
        "--trained-on",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="MANIFEST",
        help="Table whose training and validation rows may share nothing with what is measured; MANIFEST's own always count.",
    )(allow_leak_option(command))


def leaks_checked(
    reader: ImageReader,
    manifest: Path,
    table: Manifest,
    rows: Sequence[StudyImage],
    split: str,
    out: Path,
    *,
    allowed: Sequence[str],
    model: Path | None = None,
    trained_on: Sequence[Path] = (),
    columns: Path | None = None,
    allow_outside: bool = False,
) -> dict[str, Any]:
    """Check, list what is shared, if anything, in ``leaks.csv`` of ``out``, and say for results.json what was compared.

    Args:
        reader: as the model reads.
        rows: of the table of ``manifest``, those of ``split``.
        model: folder of the run, whose config.json says which table it was trained on; None: not trained yet.
        columns, allow_outside: how all tables are read.
    Raises:
        UsageError: something is shared that was not allowed.
    """
    training_table = None if model is None or not rows else _training_table(model, rows[0].modality)
    from tasks.leaks import Leak, Others, check_leaks, images_to_read

    others = [Others.of(str(manifest), table, split, trained=table.sha256 == training_table)]
    for path in trained_on:
        other = load_manifest(path, columns, allow_outside)
        if other.sha256 != table.sha256:
            others.append(Others.of(str(path), other))
        if other.rejected:
            click.echo(f"--trained-on {path}: {len(other.rejected)} bad rows, not compared", err=True)
    others = [one for one in others if one.rows]
    with progress("leak check", images_to_read(rows, others) if others else 0) as advance:
        check = check_leaks(rows, others, reader, trained_on=training_table, progress=advance)
    (out / LEAKS).unlink(missing_ok=True)
    if check.leaks:
        write_csv(out / LEAKS, Leak._fields, check.leaks)
    if training_table is not None and not check.training_table:
        click.echo("leak check: the model was trained on another table; give it as --trained-on to compare with it too", err=True)
    if refused := check.refused(allowed):
        told = ", ".join(f"{count} by {kind}" for kind, count in refused.items())
        raise click.UsageError(
            f"of {len(rows)} rows to be measured, some share with rows the model was trained or chosen on: {told}; all in {out / LEAKS}."
            f" Leave them out, or measure in spite of it: {' '.join(f'--allow-leak {kind}' for kind in refused)}"
        )
    return check.as_dict(allowed)


def _training_table(model: Path, modality: str) -> str | None:
    """SHA-256 of the table that the run was trained on, where it says; of a model joined from two runs that of the modality's."""
    provenance = model_facts(model)["provenance"] or {}
    of_kind = (provenance.get("joined") or {}).get(modality) or provenance
    found = of_kind.get("manifest_sha256")
    return None if found is None else str(found)
