"""Pictures of similarity maps: the one place that knows matplotlib. Figures are objects drawn by Agg; there is no current figure.

Shapes: H rows, W columns, in the native pixels of the image. A map's colours are blue below 0 and red above, paler towards 0; pixels where
it is NaN stay grey. White isolines enclose the highest 10, 5 and 1 percent of its pixels.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke
from numpy.typing import NDArray

from medvl.files import write_atomically
from medvl.types import RESEARCH_USE

TOP_SHARES = (0.10, 0.05, 0.01)
"""Shares of a map's pixels that its isolines enclose."""
COLOURS = LinearSegmentedColormap.from_list("similarity", ["#0a5bff", "#6cb6ff", "#b0b0b0", "#ff9a6b", "#ff1f3d"])
"""Bright at both ends, where the usual diverging scales are dark: a radiograph is dark where the lungs are."""
LEVELS = 1025
"""Shades of a coloured map, and one for nothing."""
STRONGEST = 0.65
"""Opacity of the colours at the limits; the image shows through everywhere."""
MASK_COLOUR, PEAK_COLOUR = "#ffd400", "#00e5ff"
DPI = 100
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A"}


def overlay(
    native: NDArray[np.float32],
    scores: NDArray[np.float32],
    phrase: str,
    path: Path,
    *,
    mask: NDArray[np.bool_] | None = None,
    region: NDArray[np.bool_] | None = None,
    peak: tuple[int, int] | None = None,
    limits: tuple[float, float] | None = None,
    orientation: tuple[str, str] | None = None,
    label: str = "cosine",
    pixel_aspect: float = 1.0,
    column_mm: float | None = None,
) -> Path:
    """Write the picture that :func:`plot_map` makes as PNG; the arguments are its."""
    figure = plot_map(
        *(native, scores, phrase),
        mask=mask,
        region=region,
        peak=peak,
        limits=limits,
        orientation=orientation,
        label=label,
        pixel_aspect=pixel_aspect,
        column_mm=column_mm,
    )
    write_atomically(path, _png(figure))
    return path


def plot_map(
    native: NDArray[np.float32],
    scores: NDArray[np.float32],
    phrase: str,
    *,
    mask: NDArray[np.bool_] | None = None,
    region: NDArray[np.bool_] | None = None,
    peak: tuple[int, int] | None = None,
    limits: tuple[float, float] | None = None,
    orientation: tuple[str, str] | None = None,
    label: str = "cosine",
    pixel_aspect: float = 1.0,
    column_mm: float | None = None,
) -> Figure:
    """A similarity map over its image, with colour bar, isolines and footer.

    Args:
        native: (H, W) grey in 0..1.
        scores: (H, W), NaN where the tower did not look.
        phrase: the title.
        mask: (H, W), the truth, outlined in yellow.
        region: (H, W), what was found, outlined in cyan.
        peak: row and column, marked with a cross.
        limits: ends of the colour scale; None takes the largest absolute score on both sides, so that the colour of 0 stays.
        orientation: DICOM's PatientOrientation, such as ("L", "F"); without it no side is marked.
        label: of the colour bar.
        pixel_aspect: height of a pixel over its width, in mm.
        column_mm: width of a pixel, for a scale bar; None: no bar, since nobody knows how long it would be.
    Raises:
        ValueError: arrays of different shapes, or scores without a finite value.
    """
    _check(native, scores, mask)
    _check(native, None, region)
    rows, columns = native.shape
    across, down = _axes_pixels(max(1, round(rows * pixel_aspect)), columns)
    left, right, top, bottom = 16, 120, 44, 34  # pixels for title, colour bar and footer
    width, height = across + left + right, down + top + bottom
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((left / width, bottom / height, across / width, down / height))
    colours, levels = _draw(axes, native, scores, mask, peak, _limits(scores, limits))
    if region is not None:
        _outline(axes, region, PEAK_COLOUR)
    axes.set_aspect("auto")  # the axes have the picture's proportions in mm
    _mark_sides(axes, orientation)
    if column_mm is not None:
        _scale_bar(axes, columns, column_mm)
    beside = figure.add_axes(((left + across + 14) / width, bottom / height, 14 / width, down / height))
    bar = figure.colorbar(colours, cax=beside)
    bar.set_label(label)
    for level in levels:
        bar.ax.axhline(level, color="white", linewidth=2.2)
        bar.ax.axhline(level, color="black", linewidth=1.0)
    _title(figure, phrase, left / width, 1 - 14 / height, across + 100)
    note = f"{RESEARCH_USE} · lines: highest 10, 5, 1 % of pixels" + (" · yellow: true mask" if mask is not None else "")
    note += " · cyan: found" if region is not None and region.any() else ""
    figure.text(left / width, 10 / height, note, fontsize=7.5, color="#444444", va="center")
    return figure


@dataclass(frozen=True)
class Panel:
    """An image of a grid, with the map of each phrase."""

    native: NDArray[np.float32]  # (H, W) grey in 0..1
    scores: Sequence[NDArray[np.float32] | None]  # one (H, W) for each phrase; None leaves the image bare
    name: str = ""
    orientation: tuple[str, str] | None = None
    masks: Sequence[NDArray[np.bool_] | None] = ()  # the truth of each phrase, if there are any
    pixel_aspect: float = 1.0


def plot_grid(panels: Sequence[Panel], phrases: Sequence[str], *, label: str = "cosine", side: float = 2.2) -> Figure:
    """Images by phrases, a row an image, as papers have it: one colour scale for all, so that maps can be compared.

    Args:
        panels: R rows.
        phrases: Q columns.
        label: of the colour bar.
        side: width of a picture in inches.
    Raises:
        ValueError: no image, no phrase, a row with another number of maps, arrays of different shapes, or no map with a finite value.
    """
    if not panels or not phrases or any(len(panel.scores) != len(phrases) for panel in panels):
        raise ValueError(f"a grid of {len(panels)} images and {len(phrases)} phrases needs a map, or None, for each phrase of each image")
    every = [one for panel in panels for one in panel.scores if one is not None]
    largest = max((float(np.nanmax(np.abs(one))) for one in every if np.isfinite(one).any()), default=0.0)
    if not largest:
        raise ValueError("no similarity map has a finite value: there is nothing to draw")
    heights = [side * panel.native.shape[0] * panel.pixel_aspect / panel.native.shape[1] for panel in panels]
    left, right, top, bottom, gap = 0.35, 0.9, 0.45, 0.3, 0.06
    width = left + len(phrases) * (side + gap) + right
    height = top + sum(heights) + gap * len(panels) + bottom
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    colours: Any = None
    below = height - top
    for panel, tall in zip(panels, heights, strict=True):
        below -= tall
        masks = panel.masks or [None] * len(phrases)
        for column, (scores, mask) in enumerate(zip(panel.scores, masks, strict=True)):
            _check(panel.native, scores, mask)
            at = (left + column * (side + gap), below)
            axes = figure.add_axes((at[0] / width, at[1] / height, side / width, tall / height))
            limits = None if scores is None else (-largest, largest)
            drawn, _ = _draw(axes, panel.native, scores, mask, None, limits)
            colours = drawn or colours
            axes.set_aspect("auto")
            _mark_sides(axes, panel.orientation)
        figure.text(
            0.17 / width, (below + tall / 2) / height, panel.name, rotation=90, ha="center", va="center", fontsize=9, parse_math=False
        )
        below -= gap
    for column, phrase in enumerate(phrases):
        at_x = (left + column * (side + gap) + side / 2) / width
        words = textwrap.shorten(" ".join(phrase.split()), max(12, round(side * 13)), placeholder="…")
        figure.text(at_x, 1 - 0.22 / height, words, ha="center", va="center", fontsize=10, weight="bold", parse_math=False)
    beside = figure.add_axes(((width - right + 0.1) / width, bottom / height, 0.14 / width, (height - top - bottom) / height))
    figure.colorbar(colours, cax=beside).set_label(label)
    figure.text(left / width, 0.12 / height, RESEARCH_USE, fontsize=7.5, color="#444444", va="center")
    return figure


def thumbnail(
    native: NDArray[np.float32],
    *,
    scores: NDArray[np.float32] | None = None,
    mask: NDArray[np.bool_] | None = None,
    peak: tuple[int, int] | None = None,
    limits: tuple[float, float] | None = None,
    orientation: tuple[str, str] | None = None,
    side: int = 256,
    pixel_aspect: float = 1.0,
) -> bytes:
    """A small picture without frame or text as PNG, its longer side ``side`` pixels; arguments as in :func:`plot_map`.

    Raises:
        ValueError: arrays of different shapes, or scores without a finite value.
    """
    _check(native, scores, mask)
    rows, columns = native.shape[0] * pixel_aspect, native.shape[1]
    scale = side / max(rows, columns)
    figure = Figure(figsize=(max(1, round(columns * scale)) / DPI, max(1, round(rows * scale)) / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    _draw(axes, native, scores, mask, peak, None if scores is None else _limits(scores, limits), smooth=True)
    axes.set_aspect("auto")  # the figure has the picture's proportions in mm
    _mark_sides(axes, orientation)
    return _png(figure)


def coloured(scores: NDArray[np.float32], limits: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """(H, W, 4) RGBA of a map, 8 bits, to lay over an image: the colours and opacities of :func:`plot_map`, and nothing where it is NaN.

    Args:
        scores: (H, W).
        limits: as in :func:`plot_map`.
    Raises:
        ValueError: limits that do not rise.
    """
    low, high = _limits(scores, limits)
    shades = np.linspace(low, high, LEVELS - 1)
    table = np.zeros((LEVELS, 4), dtype=np.uint8)  # the last one stays clear
    table[:-1] = (COLOURS(np.linspace(0, 1, LEVELS - 1)) * 255).round()
    table[:-1, 3] = (255 * STRONGEST * np.clip(np.abs(shades) / max(abs(low), abs(high)), 0, 1)).round()
    place = np.multiply(scores, (LEVELS - 2) / (high - low), dtype=np.float32)
    place += np.float32(0.5 - low * (LEVELS - 2) / (high - low))
    np.clip(place, 0, LEVELS - 2, out=place)
    np.copyto(place, LEVELS - 1, where=np.isnan(place))
    found: NDArray[np.uint8] = table.view(np.uint32)[:, 0].take(place.astype(np.uint16)).view(np.uint8).reshape(*scores.shape, 4)
    return found


def _draw(
    axes: Axes,
    native: NDArray[np.float32],
    scores: NDArray[np.float32] | None,
    mask: NDArray[np.bool_] | None,
    peak: tuple[int, int] | None,
    limits: tuple[float, float] | None,
    smooth: bool = False,
) -> tuple[Any, list[float]]:
    """Image, map, isolines, outline and cross on axes without frame; what the colour bar needs, and the isolines' levels."""
    axes.set_axis_off()
    axes.imshow(native, cmap="gray", vmin=0, vmax=1, interpolation="bilinear" if smooth else "auto")
    colours, levels = None, []
    if scores is not None and limits is not None:
        norm = Normalize(*limits)
        shown = np.nan_to_num(scores, nan=0.0)
        strength = np.clip(np.abs(shown) / max(abs(limits[0]), abs(limits[1])), 0, 1)
        opacity = np.where(np.isfinite(scores), STRONGEST * strength, 0.0)
        colours = axes.imshow(scores, cmap=COLOURS, norm=norm, alpha=opacity, interpolation="nearest")
        levels = isolines(scores)
        if levels:
            edge: list[AbstractPathEffect] = [withStroke(linewidth=2.0, foreground="black", alpha=0.6)]
            lines = axes.contour(np.ma.masked_invalid(scores), levels=levels, colors="white", linewidths=(0.7, 1.0, 1.4)[: len(levels)])
            lines.set_path_effects(edge)
        colours = _opaque(norm)
    if mask is not None:
        _outline(axes, mask, MASK_COLOUR)
    if peak is not None:
        stroke = [withStroke(linewidth=3.5, foreground="black")]
        axes.plot(peak[1], peak[0], "+", color=PEAK_COLOUR, markersize=13, markeredgewidth=1.8, path_effects=stroke)
    axes.set_xlim(-0.5, native.shape[1] - 0.5)
    axes.set_ylim(native.shape[0] - 0.5, -0.5)
    return colours, levels


def _outline(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """The border of a mask; nothing of an empty one."""
    if mask.any():
        closed = np.pad(mask, 1).astype(float)  # so that a mask that touches the border is closed there
        at = (np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1))
        axes.contour(*at, closed, levels=[0.5], colors=colour, linewidths=1.4)


def _scale_bar(axes: Axes, columns: int, column_mm: float) -> None:
    """A bar of a round number of mm, at most a quarter of the picture, at the lower left."""
    room = 0.25 * columns * column_mm
    length = max((step for step in (1, 2, 5, 10, 20, 50, 100, 200) if step <= room), default=None)
    if length is None:
        return
    share, stroke = length / (columns * column_mm), [withStroke(linewidth=2.5, foreground="black")]
    axes.plot((0.03, 0.03 + share), (0.03, 0.03), transform=axes.transAxes, color="white", linewidth=2.5, path_effects=stroke)
    words = f"{length // 10} cm" if length >= 10 else f"{length} mm"
    axes.text(0.03, 0.04, words, transform=axes.transAxes, color="white", fontsize=9, va="bottom", path_effects=stroke)


def isolines(scores: NDArray[np.float32]) -> list[float]:
    """Levels that enclose the highest shares of the finite pixels (``TOP_SHARES``), rising; none for a flat map."""
    seen = scores[np.isfinite(scores)]
    if not seen.size or seen.min() == seen.max():
        return []
    levels = np.unique(np.quantile(seen, [1 - share for share in TOP_SHARES]))
    return [float(level) for level in levels if seen.min() < level < seen.max()]


def _limits(scores: NDArray[np.float32], limits: tuple[float, float] | None) -> tuple[float, float]:
    if limits is not None:
        if not limits[0] < limits[1]:
            raise ValueError(f"the colour limits run from {limits[0]} to {limits[1]}; expected the lower first")
        return limits
    largest = float(np.nanmax(np.abs(scores))) or 1.0
    return -largest, largest


def _opaque(norm: Normalize) -> Any:
    """What a colour bar is made from: the scale without the map's changing opacity, as pale as the map is over white."""
    at = np.linspace(0, 1, 256)
    values = norm.vmin + at * (norm.vmax - norm.vmin)  # type: ignore[operator]
    strength = STRONGEST * np.clip(np.abs(values) / max(abs(norm.vmin or 0), abs(norm.vmax or 0)), 0, 1)[:, None]
    rgb = COLOURS(at)[:, :3]
    return ScalarMappable(norm, ListedColormap(rgb * strength + 0.5 * (1 - strength)))


def _mark_sides(axes: Axes, orientation: tuple[str, str] | None) -> None:
    """The letters of the patient's sides at the image's left and right, where the file says which they are."""
    side = orientation[0][:1] if orientation else ""
    if side not in OPPOSITE:
        return
    stroke = [withStroke(linewidth=2.5, foreground="black")]
    for x, letter, align in ((0.985, side, "right"), (0.015, OPPOSITE[side], "left")):
        axes.text(
            x, 0.985, letter, transform=axes.transAxes, ha=align, va="top", color="white", fontsize=12, weight="bold", path_effects=stroke
        )


def _title(figure: Figure, phrase: str, x: float, y: float, pixels: int) -> None:
    """The phrase on one line, cut where the picture ends; nothing in it is markup."""
    room = max(12, pixels // 8)
    text = " ".join(phrase.split())
    text = text if len(text) <= room else f"{text[: room - 1]}…"
    figure.text(x, y, text, fontsize=12, weight="bold", va="center", parse_math=False)


def _axes_pixels(rows: int, columns: int, smallest: int = 512, largest: int = 1280) -> tuple[int, int]:
    """Width and height of the drawn image: a whole multiple for small images, so that their pixels stay squares; large ones shrink."""
    longest = max(rows, columns)
    scale: float = -(-smallest // longest) if longest < smallest else min(1.0, largest / longest)
    return max(1, round(columns * scale)), max(1, round(rows * scale))


def _check(native: NDArray[np.float32], scores: NDArray[np.float32] | None, mask: NDArray[np.bool_] | None) -> None:
    shapes: Sequence[tuple[str, Any]] = (("similarity map", scores), ("mask", mask))
    for name, array in shapes:
        if array is not None and array.shape != native.shape:
            raise ValueError(f"the {name} has shape {array.shape}, the image {native.shape}; both must be in native pixels")
    if native.ndim != 2 or not native.size:
        raise ValueError(f"the image has shape {native.shape}, expected (rows, columns)")
    if scores is not None and not np.isfinite(scores).any():
        raise ValueError("the similarity map has no finite value: there is nothing to draw")


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a phrase in a script the font lacks; maps.json has it whole
        figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()
