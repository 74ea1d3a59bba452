"""Annotations of one's own: a CSV with one row for each box or mask."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tasks.annotations.files import FileMask, inside
from tasks.annotations.records import Annotation, AnnotationError, AnnotationSet, BadRowError, Gathering, finding_of, split_of
from tasks.annotations.sources import read_table, size_of, xywh

BOX = ("x", "y", "width", "height")
OPTIONAL = ("finding", "mask", "category", "patient", "study", "split", "reader", "image_width", "image_height")


def read_plain(path: str | Path) -> AnnotationSet:
    """``image, phrase`` and a region: the corner and size ``x, y, width, height`` in pixels, or a ``mask`` file; neither: a negative.

    ``image`` is a file name, or a path below the folder that images are sought in. ``finding`` is a label of ChestX-ray14 or CheXpert, or
    an id as prompt files have them. A mask is a picture, or a NIfTI for a volume, named from the table's folder, and what is not 0 is
    inside. Also ``category, patient, study, split, reader`` and, where boxes are of another copy of the image, ``image_width`` and
    ``image_height``. Rows of the same image and phrase belong together. Other columns are left aside.
    """
    table = read_table(path, "image", "phrase")
    if not set(BOX) <= set(table.header) and "mask" not in table.header:
        raise AnnotationError(f"{table.path}: expected columns {', '.join(BOX)}, or mask")
    found = Gathering()
    for number, record in table.records:
        with found.row(number):
            cells = dict.fromkeys((*BOX, *OPTIONAL), "") | table.cells(record)
            finding = cells["finding"]
            boxed = any(cells[name] for name in BOX)
            if boxed and cells["mask"]:
                raise BadRowError("has both a box and a mask; give each a row")
            head = Annotation(
                image=cells["image"],
                phrase=cells["phrase"],
                study=cells["study"] or None,
                patient=cells["patient"] or None,
                finding=(finding_of(finding, "chestxray_14", "chexpert_14") or finding) if finding else None,
                category=cells["category"] or finding or None,
                size=size_of(cells, "image_height", "image_width"),
                split=split_of(cells["split"]),
                reader=cells["reader"] or None,
                negative=not boxed and not cells["mask"],
            )
            if cells["mask"]:
                file = inside(table.path.parent, cells["mask"])
                if not file.is_file():
                    raise BadRowError("names a mask that is not there")
                found.add(number, head, partial(_mask, file))
            else:
                found.add(number, head, partial(xywh, cells, BOX) if boxed else None)
    return found.close("plain", table.sha256)


def _mask(file: Path) -> tuple[FileMask]:
    return (FileMask(file),)
