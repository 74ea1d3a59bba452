"""What the commands that make maps share: how maps are made, as options, and the thresholds that belong to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tasks.commands.common import usage_errors, weights_sha256

if TYPE_CHECKING:
    from tasks.grounding.settings import MapSettings
    from tasks.grounding.thresholds import MapThresholds

F = TypeVar("F", bound=Callable[..., Any])
NAMES = (
    *("model", "cosine", "attention", "words", "cross_attention"),
    *("values", "value_similarity", "early_attention", "gradient", "slices"),
)
"""Sources by name; a test compares them with :data:`tasks.grounding.sources.SOURCES`, which takes seconds to import."""


def settings_options(command: F) -> F:
    """``--source`` and the refinements."""
    for option in reversed(
        (
            click.option("--source", default="model", show_default=True, type=click.Choice(NAMES), help="Where maps come from."),
            click.option("--against", metavar="TEXT", help="Contrast with a general phrase, such as 'a chest X-ray'."),
            click.option("--negation", is_flag=True, help="Contrast with the denial of what is looked for."),
            click.option("--early", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE", help="Mix by the likeness of early layers."),
            click.option(
                "--crops", type=click.IntRange(1, 8), default=1, metavar="N", help="Look at overlapping crops, N times enlarged, too."
            ),
            click.option(
                "--shifts", type=click.IntRange(1, 16), default=1, metavar="N", help="Maps N times finer than tokens; N^2 passes."
            ),
            click.option("--smooth", type=click.FloatRange(0, 100), default=0.0, metavar="MM", help="Gaussian of this standard deviation."),
        )
    ):
        command = option(command)
    return command


def batch_size_option(command: F) -> F:
    """``--batch-size``: of volumes one, unless told."""
    return click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Images encoded at once; 16, of CT 1, unless told.")(
        command
    )


def batch_size_of(given: int | None, modality: str) -> int:
    """What was asked for, or what fits in memory."""
    return given or (1 if modality == "ct" else 16)


def settings_of(source: str, against: str | None, negation: bool, early: float, crops: int, shifts: int, smooth: float) -> MapSettings:
    """The options as a record; what is smoothed is smoothed between tokens too."""
    from tasks.grounding.settings import MapSettings

    with usage_errors(ValueError):
        return MapSettings(source, against or None, negation, early, crops, shifts, smooth, 4 if smooth > 0 else 1)


def thresholds_of(path: Path | None, model: Path, settings: MapSettings, modality: str, prompts_sha256: str | None) -> MapThresholds | None:
    """Thresholds for maps of such images that are made this way: of a file, or those beside the model; None if there are none.

    Args:
        prompts_sha256: of the prompts that findings are asked by; None: phrases alone are asked.
    """
    from tasks.grounding.thresholds import ThresholdsError, load_thresholds, place_of

    place = path or place_of(model, settings, modality)
    if path is None and not place.is_file():
        return None
    with usage_errors(ThresholdsError):
        return load_thresholds(place, weights_sha256(model), settings, modality, prompts_sha256)
