"""Radiographs with outlines and masks: SIIM-ACR, Object-CXR and CheXlocalize.

What each docstring says of fields was read in public loaders and documentation of the data set, where it does not say that the file was.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from medvl.geometry.regions import Box, Ellipse, Polygon, Region, Rle
from tasks.annotations.boxed import SQUARE
from tasks.annotations.records import Annotation, AnnotationError, AnnotationSet, BadRowError, Gathering, finding_of, split_named
from tasks.annotations.sources import number_of, numbers_of, read_json, read_table, shape_of


def read_siim(path: str | Path) -> AnnotationSet:
    """SIIM-ACR pneumothorax: ``train-rle.csv``, one row for each mask of a 1024 x 1024 image, "-1" for a negative.

    Columns are ``ImageId`` (the SOP instance, and the DICOM file's name) and `` EncodedPixels``, in the first stage with a space before
    the name and before the "-1". A mask is pairs of a start and a length down the columns, each start counted from the end of the run
    before. The first start counts from 0, as the challenge's own mask_functions.py writes and reads it; counted from 1, as
    :meth:`Rle.from_relative` also can, masks would lie one pixel higher. Source: that script, as loaders carry it, and the first rows of
    a copy of the file.
    """
    table = read_table(path, "ImageId", "EncodedPixels")
    found = Gathering()
    finding = finding_of("Pneumothorax", "siim")
    for number, record in table.records:
        with found.row(number):
            cells = table.cells(record)
            image, runs = cells["ImageId"], cells["EncodedPixels"]
            negative = runs == "-1"
            if not runs:
                raise BadRowError("EncodedPixels is empty; a negative says -1")
            head = Annotation(image=image, phrase="Pneumothorax", finding=finding, category="Pneumothorax", size=SQUARE, negative=negative)
            found.add(number, head, None if negative else partial(_siim, runs))
    return found.close("siim", table.sha256)


def read_object_cxr(path: str | Path) -> AnnotationSet:
    """Object-CXR, foreign objects: ``train.csv`` or ``dev.csv``, one row for each image, an empty annotation for a negative.

    Columns are ``image_name`` (in the description ``image_path``) and ``annotation``: objects joined by semicolons, each a kind and its
    numbers, "0 x1 y1 x2 y2" a rectangle, "1 x1 y1 x2 y2" the ellipse in that rectangle, "2 x1 y1 x2 y2 ... xn yn" a polygon. Pixels
    count from the upper left corner; the size is not given. Source: the challenge's description, as loaders quote it. A row is rejected
    whole if one object is bad.
    """
    table = read_table(path, "annotation")
    column = next((name for name in ("image_name", "image_path") if name in table.header), None)
    if column is None:
        raise AnnotationError(f"{table.path}: missing column image_name (or image_path)")
    split = split_named(table.path)
    found = Gathering()
    for number, record in table.records:
        with found.row(number):
            cells = table.cells(record)
            objects = [part for part in cells["annotation"].split(";") if part.strip()]
            head = Annotation(
                image=PurePosixPath(cells[column]).name,
                phrase="foreign object",
                finding=finding_of("abnormal foreign body", "padchest"),
                category="foreign object",
                split=split,
                negative=not objects,
            )
            found.add(number, head, partial(_objects, objects))
    return found.close("object_cxr", table.sha256)


def read_chexlocalize(path: str | Path) -> AnnotationSet:
    """CheXlocalize: ``gt_segmentations_{val,test}.json`` with packed COCO masks, or ``gt_annotations_{val,test}.json`` with outlines.

    One key for each image, "patient64622_study1_view1_frontal", which becomes the path "patient64622/study1/view1_frontal" that CheXpert
    has for it. In segmentations every pathology has a mask, ``size`` [rows, columns] and ``counts``, all zeros where its label is not
    positive, which is taken as a negative. In annotations only the positive ones stand, as lists of contours of [x, y], beside
    ``img_size`` [rows, columns]; every contour is a region. Row: the number of the image. Source: README of rajpurkarlab/cheXlocalize
    and its sample of both files, in which outlines and masks agree. Pathologies are CheXpert's labels, Lung Opacity as "Airspace Opacity".
    """
    path = Path(path)
    content, sha256 = read_json(path)
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: expected an object with a key for each image, got {type(content).__name__}")
    split = split_named(path)
    found = Gathering()
    for number, (key, entry) in enumerate(content.items(), start=1):
        if not isinstance(entry, dict):
            with found.row(number):
                raise BadRowError("expected an object with a key for each pathology")
            continue
        for label, drawn in entry.items():
            if label != "img_size":
                with found.row(number):
                    _add_chexlocalize(found, number, key, label, drawn, entry.get("img_size"), split)
    return found.close("chexlocalize", sha256)


def _add_chexlocalize(found: Gathering, number: int, key: str, label: str, drawn: object, size: object, split: str | None) -> None:
    where = re.fullmatch(r"(patient\d+)_(study\d+)_(view.+)", key)
    try:
        shape = shape_of(drawn.get("size") if isinstance(drawn, dict) else size, "the image's size")
    except ValueError as error:
        raise BadRowError(str(error)) from None
    head = Annotation(
        image="/".join(where.groups()) if where else key,
        phrase=label,
        study=f"{where[1]}/{where[2]}" if where else None,
        patient=where[1] if where else None,
        finding=finding_of("Lung Opacity" if label == "Airspace Opacity" else label, "chexpert_14"),
        category=label,
        size=shape,
        split=split,
    )
    if not isinstance(drawn, dict):
        found.add(number, head, partial(_contours, drawn))
        return
    counts = drawn.get("counts")
    try:
        mask = Rle.from_coco(shape, counts) if isinstance(counts, (str, list)) else None
    except ValueError as error:
        raise BadRowError(str(error)) from None
    if mask is None:
        raise BadRowError("counts are neither text nor a list")
    negative = not any(mask.counts[1::2])
    found.add(number, replace(head, negative=negative), None if negative else partial(tuple, [mask]))


def _siim(runs: str) -> tuple[Region]:
    try:
        numbers = [int(number) for number in runs.split()]
    except ValueError:
        raise ValueError("EncodedPixels are no whole numbers") from None
    return (Rle.from_relative(numbers, SQUARE),)


def _objects(objects: list[str]) -> list[Region]:
    regions: list[Region] = []
    for place, text in enumerate(objects, start=1):
        kind, *rest = text.split()
        numbers = [number_of(number, f"object {place}: a coordinate") for number in rest]
        if kind not in ("0", "1", "2") or (kind == "2" and len(numbers) % 2) or (kind != "2" and len(numbers) != 4):
            raise ValueError(f"object {place} is none of a rectangle (0), an ellipse (1) and a polygon (2) with their coordinates")
        if kind == "2":
            regions.append(Polygon.from_xy(zip(numbers[::2], numbers[1::2], strict=True)))
        else:
            box = Box.from_xyxy(*numbers)
            regions.append(box if kind == "0" else Ellipse(box.low, box.high))
    return regions


def _contours(value: object) -> list[Region]:
    if not isinstance(value, list) or not all(isinstance(contour, list) for contour in value):
        raise ValueError("expected a list of contours, each a list of [x, y]")
    found: list[Region] = []
    for contour in value:
        points = [numbers_of(point, "a point", 2) for point in contour]
        found.append(Polygon.from_xy((x, y) for x, y in points))
    return found
