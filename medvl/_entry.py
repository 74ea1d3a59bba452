"""The ``medvl`` command's first step: make sure that our packages are ours, then hand over to the command the distribution names.

Some of our top-level packages have everyday names. A module or folder of the same name that is found earlier on ``sys.path`` would be
imported in place of ours and fail in ways that tell nothing. So before anything is imported, every top-level package that the distribution
lists must resolve to the folder beside this one. Which packages and which command these are is read from the distribution's metadata.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

DISTRIBUTION = "medvl"
COMMANDS = "medvl.command"  # entry point group; holds one
USAGE_ERROR = 2


def main() -> None:
    """Run the command and exit with its code; exit with 2 and say what to do if our packages are hidden or not installed."""
    try:
        command = _load_command()
    except _CannotStartError as error:
        sys.stderr.write(f"medvl: {error}\n")
        sys.exit(USAGE_ERROR)
    sys.exit(command())


class _CannotStartError(Exception):
    """The installation, or what stands before it on the path, keeps the command from starting."""


def _load_command() -> Any:
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise _CannotStartError(f"{_home()} is not installed. Install it: pip install -e {_home()}") from None
    names = (distribution.read_text("top_level.txt") or "").split()
    commands = [entry for entry in distribution.entry_points if entry.group == COMMANDS]
    if not names or len(commands) != 1:
        raise _CannotStartError("the installation is out of date (its metadata names no command). Install medvl again, as its README says.")
    if hidden := [message for name in names if (message := shadowed(name))]:
        raise _CannotStartError("\n       ".join(hidden))
    return commands[0].load()


def shadowed(name: str) -> str | None:
    """None if importing ``name`` would give the package beside this one; otherwise what it would give, and what to do about it."""
    ours = _home() / name / "__init__.py"
    spec = importlib.util.find_spec(name)
    if spec is None:
        return f"package {name!r} is not at {ours.parent}. Install medvl again, as its README says."
    # a folder without __init__.py has no origin, only where its modules would be looked for
    found = Path(os.path.realpath(spec.origin or next(iter(spec.submodule_search_locations or ()), "")))
    if found == Path(os.path.realpath(ours)):
        return None
    folder = found.parent.parent if found.name == "__init__.py" else found.parent
    listed = [Path(os.path.realpath(entry)) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if folder in listed:
        otherwise = f"take {folder} off PYTHONPATH"
    elif folder == Path(os.path.realpath(os.curdir)):
        otherwise = "run medvl from another folder"
    else:
        otherwise = "uninstall the package it belongs to"
    return f"{found} hides medvl's own package {name!r} ({ours.parent}). Rename it, or {otherwise}."


def _home() -> Path:
    return Path(__file__).resolve().parent.parent
