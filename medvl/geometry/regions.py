"""Regions of an image in its own index space, and one way from each to a mask.

Index coordinates are those of :mod:`medvl.geometry.grids`: integers at pixel centres, so pixel 3 alone is 2.5 to 3.5. Data sets publish
corners counted in pixels from the image's outer corner, where pixel 3 is 3 to 4; an edge is such a corner less 1/2:

    x = 10, w = 5     covers columns 10 to 14, edges 9.5 and 14.5
    x1 = 10, x2 = 15  is the same box, its width x2 - x1

A pixel is inside where its centre is, on the low edge too and on the high edge not: with x = 10.4 column 10 (centre 10.5) is inside, with
x = 10.6 it is not, and a region that holds no centre is an empty mask. Axes follow tensors: (rows, columns), in volumes (slices, rows,
columns).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PIXELS = 2**30
"""Largest mask that is made: a volume of 1024 slices of 1024 x 1024."""
SLACK = 1.0
"""Pixels by which a region may leave the image, and is cut: published corners are rounded outwards. More is a mistake."""


class Region(ABC):
    """A part of an image."""

    @property
    @abstractmethod
    def boxes(self) -> tuple[Box, ...]:
        """The region as boxes: the one around it, none where it holds no pixel."""

    @abstractmethod
    def check(self, shape: Sequence[int]) -> None:
        """Whether the region can belong to an image of this shape.

        Raises:
            ValueError: it lies outside, or is of another size or number of axes.
        """

    @abstractmethod
    def mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """True inside.

        Raises:
            ValueError: as :meth:`check`.
        """

    @abstractmethod
    def scaled(self, shape_from: Sequence[int], shape_to: Sequence[int]) -> Region:
        """The region on another copy of the whole image: every axis by its own factor, outer edges onto outer edges.

        Shape (1, 1) as ``shape_from`` is that of fractions of the image. A copy that was cropped or padded is not one of the whole image.
        """


@dataclass(frozen=True)
class Box(Region):
    """A rectangle or cuboid between two edges along each axis.

    Raises:
        ValueError: edges that are no numbers, not 2 or 3 axes, or nothing between the edges.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_edges("box", self.low, self.high)

    @classmethod
    def from_xywh(cls, x: float, y: float, width: float, height: float) -> Box:
        """From a corner and a size in pixels of the image, counted from its outer corner."""
        return cls((y - 0.5, x - 0.5), (y + height - 0.5, x + width - 0.5))

    @classmethod
    def from_xyxy(cls, x1: float, y1: float, x2: float, y2: float) -> Box:
        """From two corners in pixels of the image: columns from x1 up to x2, x2 itself not."""
        return cls((y1 - 0.5, x1 - 0.5), (y2 - 0.5, x2 - 0.5))

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Itself."""
        return (self,)

    def check(self, shape: Sequence[int]) -> None:
        """See :meth:`Region.check`."""
        _check_inside("box", self.low, self.high, _checked(shape))

    def mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """See :meth:`Region.mask`."""
        self.check(shape)
        mask = np.zeros(tuple(shape), dtype=bool)
        mask[_span(self.low, self.high, shape)] = True
        return mask

    def scaled(self, shape_from: Sequence[int], shape_to: Sequence[int]) -> Box:
        """See :meth:`Region.scaled`."""
        return Box(_moved(self.low, shape_from, shape_to), _moved(self.high, shape_from, shape_to))


@dataclass(frozen=True)
class Ellipse(Region):
    """The ellipse, or ellipsoid, that touches the edges of a box."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_edges("ellipse", self.low, self.high)

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The box that it touches."""
        return (Box(self.low, self.high),)

    def check(self, shape: Sequence[int]) -> None:
        """See :meth:`Region.check`."""
        _check_inside("ellipse", self.low, self.high, _checked(shape))

    def mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """See :meth:`Region.mask`."""
        self.check(shape)
        mask = np.zeros(tuple(shape), dtype=bool)
        span = _span(self.low, self.high, shape)
        squares = (
            ((at - (low + high) / 2) / ((high - low) / 2)) ** 2 for at, low, high in zip(np.ogrid[span], self.low, self.high, strict=True)
        )
        mask[span] = sum(squares, start=np.zeros(())) <= 1
        return mask

    def scaled(self, shape_from: Sequence[int], shape_to: Sequence[int]) -> Ellipse:
        """See :meth:`Region.scaled`."""
        return Ellipse(_moved(self.low, shape_from, shape_to), _moved(self.high, shape_from, shape_to))


@dataclass(frozen=True)
class Polygon(Region):
    """A closed outline on a picture, inside by the even-odd rule: what it goes round twice is outside again.

    Raises:
        ValueError: fewer than 3 vertices, or coordinates that are no numbers.
    """

    vertices: tuple[tuple[float, float], ...]  # (row, column), the last is joined to the first

    def __post_init__(self) -> None:
        if len(self.vertices) < 3:
            raise ValueError(f"a polygon has 3 vertices or more, got {len(self.vertices)}")
        if any(len(vertex) != 2 or not all(map(math.isfinite, vertex)) for vertex in self.vertices):
            raise ValueError("a polygon's vertices are pairs of finite numbers (row, column)")

    @classmethod
    def from_xy(cls, points: Iterable[tuple[float, float]]) -> Polygon:
        """From (x, y) in pixels of the image, counted from its outer corner."""
        return cls(tuple((y - 0.5, x - 0.5) for x, y in points))

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The box around it; none around an outline that is a line."""
        low, high = self._edges
        return (Box(low, high),) if all(a < b for a, b in zip(low, high, strict=True)) else ()

    @property
    def _edges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        rows, columns = zip(*self.vertices, strict=True)
        return (min(rows), min(columns)), (max(rows), max(columns))

    def check(self, shape: Sequence[int]) -> None:
        """See :meth:`Region.check`."""
        _check_inside("polygon", *self._edges, _checked(shape))

    def mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """See :meth:`Region.mask`. In each row, a pixel is inside if an odd number of edges crosses the row at or before its centre."""
        self.check(shape)
        height, width = shape
        crossed = np.zeros((height, width + 1), dtype=bool)  # the parity changes at this column
        for one, other in zip(self.vertices, (*self.vertices[1:], self.vertices[0]), strict=True):
            (top, left), (bottom, right) = sorted((one, other))
            rows = np.arange(max(math.ceil(top), 0), min(math.ceil(bottom), height))
            if len(rows):
                at = left + (rows - top) * ((right - left) / (bottom - top))
                crossed[rows, np.clip(np.ceil(at), 0, width).astype(np.intp)] ^= True
        return np.logical_xor.accumulate(crossed[:, :width], axis=1)

    def scaled(self, shape_from: Sequence[int], shape_to: Sequence[int]) -> Polygon:
        """See :meth:`Region.scaled`."""
        moved = (_moved(vertex, shape_from, shape_to) for vertex in self.vertices)
        return Polygon(tuple((row, column) for row, column in moved))


@dataclass(frozen=True)
class Rle(Region):
    """A mask as lengths of runs, outside and inside by turns, down the columns of a picture from its upper left pixel.

    Raises:
        ValueError: lengths that are negative or do not add to the number of pixels, or a picture of more than ``MAX_PIXELS``.
    """

    counts: tuple[int, ...]  # outside first, 0 if the first pixel is inside
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = _checked(self.shape, axes=2)
        if any(count < 0 for count in self.counts):
            raise ValueError("run lengths must not be negative")
        if sum(self.counts) != rows * columns:
            raise ValueError(f"run lengths add to {sum(self.counts)}, the picture has {rows} x {columns} = {rows * columns} pixels")

    @classmethod
    def from_coco(cls, size: Sequence[int], counts: str | bytes | Sequence[int]) -> Rle:
        """From the ``size`` (rows, columns) and ``counts`` of COCO, a list or the packed string.

        Packed, a length is written in digits of 5 bits, lowest first, each plus 48 as a character, the sixth bit set where digits follow
        and the fifth of the last the sign; from the fourth on it is the difference to the length two before. Source: the COCO API's
        maskApi.c, function rleFrString.
        Raises:
            ValueError: no such string, or as above; it is read no further than the picture has pixels.
        """
        rows, columns = _checked(size, axes=2)
        if isinstance(counts, (str, bytes)):
            return cls(_unpacked(counts, rows * columns), (rows, columns))
        if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            raise ValueError("run lengths must be whole numbers")
        return cls(tuple(counts), (rows, columns))

    @classmethod
    def from_relative(cls, numbers: Sequence[int], shape: Sequence[int], *, first: int = 0) -> Rle:
        """From pairs of a start and a length, each start counted from the end of the run before, down the columns.

        Args:
            first: the number of the first pixel, which the first start is counted from.
        Raises:
            ValueError: an odd number of numbers, a length below 1, a start before the run before ends, or a run past the last pixel.
        """
        rows, columns = _checked(shape, axes=2)
        if len(numbers) % 2:
            raise ValueError(f"run lengths come in pairs of a start and a length, got {len(numbers)} numbers")
        counts = [int(number) for number in numbers]
        if counts:
            counts[0] -= first
        if any(start < 0 for start in counts[::2]) or any(length < 1 for length in counts[1::2]):
            raise ValueError("runs must follow one another, each with a length of 1 or more")
        rest = rows * columns - sum(counts)
        if rest < 0:
            raise ValueError(f"runs end {-rest} pixels past the last of {rows} x {columns}")
        return cls((*counts, rest), (rows, columns))

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The box around all runs."""
        return _around(self.mask(self.shape))

    def check(self, shape: Sequence[int]) -> None:
        """See :meth:`Region.check`."""
        _check_same("run lengths", self.shape, shape)

    def mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """See :meth:`Region.mask`."""
        self.check(shape)
        inside = np.arange(len(self.counts)) % 2 == 1
        return np.ascontiguousarray(np.repeat(inside, self.counts).reshape(self.shape[::-1]).T)

    def scaled(self, shape_from: Sequence[int], shape_to: Sequence[int]) -> Region:
        """See :meth:`Region.scaled`."""
        return self if tuple(shape_from) == tuple(shape_to) else Mask(self.mask(shape_from)).scaled(shape_from, shape_to)


@dataclass(frozen=True, eq=False)
class Mask(Region):
    """A mask as an array of the image's shape."""

    inside: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.inside.dtype != np.bool_ or self.inside.ndim not in (2, 3):
            raise ValueError(f"a mask is bool with 2 or 3 axes, got {self.inside.dtype} with {self.inside.ndim}")

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The box around all of it."""
        return _around(self.inside)

    def check(self, shape: Sequence[int]) -> None:
        """See :meth:`Region.check`."""
        _check_same("mask", self.inside.shape, shape)

    def mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """See :meth:`Region.mask`."""
        self.check(shape)
        return self.inside

    def scaled(self, shape_from: Sequence[int], shape_to: Sequence[int]) -> Mask:
        """See :meth:`Region.scaled`; a pixel is what the pixel was that its centre falls into."""
        self.check(shape_from)
        at = [
            ((2 * np.arange(to) + 1) * size // (2 * to)).astype(np.intp)  # floor((i + 1/2) size / to), in whole numbers
            for size, to in zip(shape_from, _checked(shape_to, axes=self.inside.ndim), strict=True)
        ]
        return Mask(self.inside[np.ix_(*at)])


def union(regions: Iterable[Region], shape: Sequence[int]) -> NDArray[np.bool_]:
    """True where any region is; nowhere without regions.

    Raises:
        ValueError: a region that does not belong to an image of this shape.
    """
    mask = np.zeros(_checked(shape), dtype=bool)
    for region in regions:
        mask |= region.mask(shape)
    return mask


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, by their edges.

    Raises:
        ValueError: boxes of different numbers of axes.
    """
    if len(one.low) != len(other.low):
        raise ValueError(f"boxes of {len(one.low)} and {len(other.low)} axes do not overlap")
    sides = zip(one.low, one.high, other.low, other.high, strict=True)
    shared = math.prod(max(0.0, min(b, d) - max(a, c)) for a, b, c, d in sides)
    sizes = [math.prod(b - a for a, b in zip(box.low, box.high, strict=True)) for box in (one, other)]
    return shared / (sum(sizes) - shared)


def _unpacked(text: str | bytes, most: int) -> tuple[int, ...]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    counts: list[int] = []
    total = value = bits = 0
    for byte in data:
        digit = byte - 48
        if not 0 <= digit < 64 or bits > 60:
            raise ValueError("packed run lengths hold a character that is none of their digits, or a number too long")
        value |= (digit & 31) << bits
        bits += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << bits
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        total += value
        if value < 0 or total > most:
            raise ValueError(f"packed run lengths hold a negative one or go past the picture's {most} pixels")
        value = bits = 0
    if bits:
        raise ValueError("packed run lengths end within a number")
    return tuple(counts)


def _checked(shape: Sequence[int], axes: int | None = None) -> tuple[int, ...]:
    if len(shape) not in ((2, 3) if axes is None else (axes,)) or min(shape) < 1 or math.prod(map(int, shape)) > MAX_PIXELS:
        raise ValueError(
            f"a shape of {axes or '2 or 3'} axes of at least 1 and no more than {MAX_PIXELS} pixels is needed, got {tuple(shape)}"
        )
    return tuple(int(n) for n in shape)


def _check_edges(what: str, low: Sequence[float], high: Sequence[float]) -> None:
    if len(low) != len(high) or len(low) not in (2, 3):
        raise ValueError(f"a {what} has 2 or 3 axes, got {len(low)} low and {len(high)} high edges")
    if not all(map(math.isfinite, (*low, *high))):
        raise ValueError(f"a {what}'s edges must be finite numbers")
    if any(a >= b for a, b in zip(low, high, strict=True)):
        raise ValueError(f"a {what} needs a size above 0 along every axis, got {tuple(b - a for a, b in zip(low, high, strict=True))}")


def _check_inside(what: str, low: Sequence[float], high: Sequence[float], shape: Sequence[int]) -> None:
    if len(low) != len(shape):
        raise ValueError(f"a {what} of {len(low)} axes does not belong to an image of {len(shape)}")
    for a, b, n in zip(low, high, shape, strict=True):
        if a < -0.5 - SLACK or b > n - 0.5 + SLACK or a >= n - 0.5 or b <= -0.5:
            raise ValueError(f"a {what} from {a + 0.5:g} to {b + 0.5:g} leaves the image, which runs from 0 to {n} there")


def _check_same(what: str, own: Sequence[int], shape: Sequence[int]) -> None:
    if tuple(own) != tuple(shape):
        raise ValueError(f"a {what} of {tuple(own)} does not belong to an image of {tuple(shape)}; scale it first")


def _span(low: Sequence[float], high: Sequence[float], shape: Sequence[int]) -> tuple[slice, ...]:
    """The pixels whose centres lie between the edges."""
    return tuple(slice(max(math.ceil(a), 0), max(min(math.ceil(b), n), 0)) for a, b, n in zip(low, high, shape, strict=True))


def _moved(at: Sequence[float], shape_from: Sequence[int], shape_to: Sequence[int]) -> tuple[float, ...]:
    return tuple((a + 0.5) * to / size - 0.5 for a, size, to in zip(at, shape_from, shape_to, strict=True))


def _around(mask: NDArray[np.bool_]) -> tuple[Box, ...]:
    if not mask.any():
        return ()
    lines: list[NDArray[Any]] = [
        np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis))) for axis in range(mask.ndim)
    ]
    return (Box(tuple(float(line[0]) - 0.5 for line in lines), tuple(float(line[-1]) + 0.5 for line in lines)),)
