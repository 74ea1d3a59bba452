"""From annotations to what grounding is measured on: one case for each phrase of an image, and where readers differ, what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from medvl.geometry.regions import Box, Region, overlap, union
from medvl.types import ImageSample
from tasks.annotations.files import FileMask
from tasks.annotations.records import Annotation, AnnotationSet


@dataclass(frozen=True)
class GroundingCase:
    """A phrase of one image and all of its region. Its repr hides text and patient."""

    image: str
    phrase: str = field(repr=False)
    patient: str = field(repr=False)  # the image's key where nothing better is known
    finding: str | None
    category: str | None
    regions: tuple[Region, ...]
    size: tuple[int, ...] | None  # of the image that the regions are drawn on; (1, 1): fractions of it; None: the image at hand
    negative: bool  # the source says that there is nothing to point at; without regions and not negative: nobody drew it
    study: str | None = None
    split: str | None = None

    def mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """True in the region, on a copy of the whole image of this shape; a NIfTI's mask in its own axes.

        Raises:
            ValueError: a region that leaves the image, or masks of another size that cannot be scaled to it.
            UnreadableImageError: a mask file that cannot be read.
        """
        drawn_on = tuple(shape) if self.size is None else self.size
        return union((region.scaled(drawn_on, shape) for region in self.regions), shape)

    def mask_on(self, sample: ImageSample) -> NDArray[np.bool_]:
        """True in the region, on the native grid of the image as it was read; masks of volumes are turned to its axes.

        Raises:
            ValueError: as :meth:`mask`.
            UnreadableImageError: a mask file that cannot be read, or whose voxels are not those of the volume.
        """
        shape = sample.transform.native_shape
        if len(shape) == 2 or sample.affine is None:
            return self.mask(shape)
        mask = replace(self, regions=tuple(region for region in self.regions if not isinstance(region, FileMask))).mask(shape)
        for region in self.regions:
            if isinstance(region, FileMask):
                mask |= region.on(sample.affine, shape)
        return mask


def cases(annotations: Sequence[Annotation], patients: Mapping[str, str] | None = None) -> tuple[GroundingCase, ...]:
    """One case for each image, phrase and category, in the order of their first annotations.

    The region is the union of all readers' (see :func:`agreed` for another rule); a phrase is negative where every reader says so. A
    phrase that a source gives under two categories is two cases, so that means by category are over all of its own.

    Args:
        patients: of images, as :func:`tasks.annotations.find_images` takes them from a manifest; they win over the annotations' own.
    Raises:
        ValueError: annotations of one phrase that are drawn on copies of different sizes.
    """
    known = patients or {}
    groups: dict[tuple[str, str, str | None], list[Annotation]] = {}
    for one in annotations:
        groups.setdefault((one.image, one.phrase, one.category), []).append(one)
    found = []
    for (image, phrase, category), group in groups.items():
        first = group[0]
        if len({one.size for one in group}) > 1:
            raise ValueError(f"image {image}: its annotations are drawn on copies of {len({one.size for one in group})} sizes")
        found.append(
            GroundingCase(
                image=image,
                phrase=phrase,
                patient=known.get(image) or next((one.patient for one in group if one.patient), image),
                finding=first.finding,
                category=category,
                regions=tuple(region for one in group for region in one.regions),
                size=first.size,
                negative=all(one.negative for one in group),
                study=first.study,
                split=first.split,
            )
        )
    return tuple(found)


def agreed(annotations: AnnotationSet, *, readers: int = 2, least_overlap: float = 0.5) -> AnnotationSet:
    """The boxes that several readers drew: one annotation without a reader for each image, phrase and category.

    A box counts if boxes of ``readers`` - 1 others or more overlap it by ``least_overlap`` (intersection over union, a reader counted
    once); all boxes that count are kept, so that the region is the union of those that agree. A phrase of which none does stays without
    regions and is no negative: it is open. It is negative where ``readers`` or more say so and nobody draws it. Phrases without a reader,
    such as those of a consensus, stay as they are. Regions that are no boxes count by the box around them.

    Raises:
        ValueError: fewer than 2 readers, or an overlap outside (0, 1].
    """
    if readers < 2 or not 0 < least_overlap <= 1:
        raise ValueError(f"agreement needs 2 readers or more and an overlap above 0 and up to 1, got {readers} and {least_overlap:g}")
    groups: dict[tuple[str, str, str | None], list[Annotation]] = {}
    for one in annotations:
        groups.setdefault((one.image, one.phrase, one.category), []).append(one)
    found = []
    for group in groups.values():
        if any(one.reader is None for one in group):
            found += group
            continue
        drawn = [(one.reader, region, boxes[0]) for one in group for region in one.regions if (boxes := region.boxes)]
        kept = tuple(region for reader, region, box in drawn if _others(reader, box, drawn, least_overlap) >= readers - 1)
        negative = not drawn and sum(one.negative for one in group) >= readers
        found.append(replace(group[0], reader=None, regions=kept, negative=negative))
    return replace(annotations, annotations=tuple(found))


def _others(reader: str | None, box: Box, drawn: Sequence[tuple[str | None, Region, Box]], least: float) -> int:
    """How many other readers drew a box that overlaps this one by ``least``."""
    return len({other for other, _, theirs in drawn if other != reader and overlap(box, theirs) >= least})
