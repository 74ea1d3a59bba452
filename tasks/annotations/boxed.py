"""Radiographs with boxes: MS-CXR, ChestX-Det10, RSNA, VinDr-CXR, ChestX-ray14 and PadChest-GR.

Where a phrase is a label, it is the label as published with its underscores as spaces. Corners and sizes are pixels counted from the
image's outer corner (:mod:`medvl.geometry.regions`); a box x1, y1, x2, y2 is x2 - x1 wide, as all loaders that were read take it.

Where a docstring says "read whole", the published file was; of the others, which are behind agreements, fields were learnt from public
loaders and documentation, and those of which no loader was seen either are marked (unseen).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from medvl.geometry.regions import Box
from tasks.annotations.records import Annotation, AnnotationError, AnnotationSet, BadRowError, Gathering, finding_of, split_named, split_of
from tasks.annotations.sources import entries, number_of, numbers_of, read_json, read_table, size_of, text_of, xywh, xyxy

SQUARE = (1024, 1024)
"""Pixels of every image of ChestX-ray14, of its subset ChestX-Det10, of RSNA and of SIIM, as they are published."""
FRACTIONS = (1, 1)
NORMAL = "No finding"


def read_ms_cxr(path: str | Path) -> AnnotationSet:
    """MS-CXR: phrases of reports with boxes, on images of MIMIC-CXR; ``MS_CXR_Local_Alignment_v1.*.csv``, or the COCO ``.json``.

    CSV: one row for each box, ``dicom_id, category_name, label_text, path, x, y, w, h, image_width, image_height``, in 1.1 also
    ``subject_id, study_id, split``. JSON: ``images`` (``id, file_name, path, width, height``), ``annotations`` (``image_id, category_id,
    bbox`` [x, y, w, h], ``label_text``) and ``categories`` (``id, name``); ``subject_id``, ``study_id`` and ``split`` of an image
    (unseen). The key is the DICOM id, which is the stem of ``file_name``; without ids patient and study are told from ``path``.
    Source: the data set's own JSON-to-CSV script (microsoft/hi-ml), and loaders of version 1.1. Categories are CheXpert's labels.
    """
    path = Path(path)
    found = Gathering()
    if path.suffix.lower() == ".json":
        content, sha256 = read_json(path)
        if not isinstance(content, dict):
            raise AnnotationError(f"{path}: expected an object with images, annotations and categories, got {type(content).__name__}")
        images = {_id(entry, "id"): entry for _, entry in entries(path, content.get("images"), "images")}
        names = {_id(entry, "id"): entry.get("name") for _, entry in entries(path, content.get("categories"), "categories")}
        for number, entry in entries(path, content.get("annotations"), "annotations"):
            with found.row(number):
                image, name = images.get(_id(entry, "image_id")), names.get(_id(entry, "category_id"))
                if not image or not isinstance(name, str):
                    raise BadRowError("image_id or category_id is none of the file's images or categories")
                fields = {**image, "label_text": entry.get("label_text"), "category_name": name}
                fields["dicom_id"] = PurePosixPath(text_of(image, "file_name")).stem
                head = _ms_cxr(fields, size_of(image, "height", "width"))
                found.add(number, head, partial(_coco_box, entry.get("bbox")))
        return found.close("ms_cxr", sha256)
    table = read_table(path, "dicom_id", "category_name", "label_text", "x", "y", "w", "h")
    for number, record in table.records:
        with found.row(number):
            cells = table.cells(record)
            found.add(number, _ms_cxr(cells, size_of(cells, "image_height", "image_width")), partial(xywh, cells))
    return found.close("ms_cxr", table.sha256)


def read_chestx_det10(path: str | Path) -> AnnotationSet:
    """ChestX-Det10: ``train.json`` or ``test.json``, a list of ``file_name``, ``syms`` (labels) and ``boxes`` [x1, y1, x2, y2].

    The two lists go together; an image with none of the ten findings has empty ones and becomes a negative "No finding". The split is
    the file's name. Images are 1024 x 1024, as those of ChestX-ray14 of which they are (the copy that comes with the boxes unseen).
    Source: README of Deepwise-AILab/ChestX-Det10-Dataset; both files read whole. Labels are ChestX-ray14's, with Calcification and
    Fracture.
    """
    path = Path(path)
    content, sha256 = read_json(path)
    found = Gathering()
    for number, entry in entries(path, content, "images"):
        with found.row(number):
            image = text_of(entry, "file_name")
            labels, boxes = entry.get("syms"), entry.get("boxes")
            if not isinstance(labels, list) or not isinstance(boxes, list) or len(labels) != len(boxes):
                raise BadRowError("syms and boxes are no two lists of one length")
            if not all(isinstance(label, str) and label.strip() for label in labels):
                raise BadRowError("syms holds what is no label")
            shared = {"image": image, "patient": _nih_patient(image), "size": SQUARE, "split": split_named(path)}
            if not labels:
                found.add(number, _labelled(NORMAL, **shared, finding=finding_of(NORMAL, "vindr_cxr"), negative=True))
            for label, box in zip(labels, boxes, strict=True):
                head = _labelled(label, **shared, finding=finding_of(label, "chestxray_14", "vindr_cxr", "chexpert_14"))
                found.add(number, head, partial(_corner_box, box))
    return found.close("chestx_det10", sha256)


def read_rsna(path: str | Path) -> AnnotationSet:
    """RSNA pneumonia: ``stage_2_train_labels.csv``, or MedKLIP's ``test.csv``; Target or class 0 is a negative.

    RSNA: ``patientId, x, y, width, height, Target``, one row for each box, the file is named after ``patientId``. MedKLIP: ``ID,
    img_path, boxes, classes``, one row for each image, boxes "x;y;w;h" joined by bars, "nan" without; the key is the name of the file in
    ``img_path``, which is the SOP instance of the first release, not ``patientId``. Images are 1024 x 1024. Source: a copy of the
    first, and MediaBrain-SJTU/MedKLIP, Sample_Zero-Shot_Grounding_RSNA; both read whole.
    """
    table = read_table(path)
    found = Gathering()
    packed = {"ID", "boxes", "classes"} <= set(table.header)
    if not packed:
        table.need("patientId", "x", "y", "width", "height", "Target")
    finding = finding_of("Pneumonia", "rsna")
    for number, record in table.records:
        with found.row(number):
            cells = table.cells(record)
            target = cells["classes" if packed else "Target"]
            if target not in ("0", "1"):
                raise BadRowError(f"{'classes' if packed else 'Target'} is neither 0 nor 1")
            image = PurePosixPath(cells.get("img_path", "")).name or cells["ID"] if packed else cells["patientId"]
            head = _labelled("Pneumonia", image=image, patient=image, size=SQUARE, finding=finding, negative=target == "0")
            draw = partial(_packed_boxes, cells["boxes"]) if packed else partial(xywh, cells, ("x", "y", "width", "height"))
            found.add(number, head, draw if target == "1" else None)
    return found.close("rsna", table.sha256)


def read_vindr_cxr(path: str | Path) -> AnnotationSet:
    """VinDr-CXR: Kaggle's ``train.csv``, or PhysioNet's ``annotations_train.csv`` and ``annotations_test.csv``.

    ``image_id, class_name, x_min, y_min, x_max, y_max``, one row for each box, with ``rad_id`` in the training sets, where every image has
    three of 17 readers, and without it in the test set, which is a consensus (unseen). Kaggle adds ``class_id``; copies with smaller
    pictures add ``width, height`` of the original (unseen), which are used. "No finding" has no box and becomes a negative; another class
    without a box stays without regions. All readers are kept: see :func:`tasks.annotations.agreed`. Split: from the file's name. Source:
    public loaders of both files. Classes are those of the label set vindr_cxr.
    """
    table = read_table(path, "image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
    found = Gathering()
    split = split_named(table.path)
    for number, record in table.records:
        with found.row(number):
            cells = table.cells(record)
            label = cells["class_name"]
            head = _labelled(
                label,
                image=cells["image_id"],
                size=size_of(cells, "height", "width") or size_of(cells, "image_height", "image_width"),
                split=split,
                reader=cells.get("rad_id") or None,
                finding=finding_of(label, "vindr_cxr"),
                negative=label.casefold() == NORMAL.casefold(),
            )
            boxed = not head.negative and any(cells[name] for name in ("x_min", "y_min", "x_max", "y_max"))
            found.add(number, head, partial(xyxy, cells) if boxed else None)
    return found.close("vindr_cxr", table.sha256)


def read_chestxray_14(path: str | Path) -> AnnotationSet:
    """ChestX-ray14: ``BBox_List_2017.csv``, one row for each box, of 8 of the 14 findings, in pixels of the 1024 x 1024 PNG.

    The header is ``Image Index,Finding Label,Bbox [x,y,w,h],,,``, so that the numbers stand under ``Bbox [x``, ``y``, ``w`` and ``h]``
    with three columns without a name after them, which rows may lack; numbers are fractional. The label of infiltration is here
    "Infiltrate". The patient is the part of the file's name before "_". Source: a copy of the file, read
    whole (without the three columns), and loaders that quote its header.
    """
    table = read_table(path, "Image Index", "Finding Label")
    if len(table.header) < 6:
        raise AnnotationError(f"{table.path}: expected 6 columns or more, Image Index, Finding Label and four of the box")
    found = Gathering()
    for number, record in table.records:
        with found.row(number):
            if len(record) < 6:
                raise BadRowError(f"{len(record)} cells, expected 6 or more")
            image, label = record[0].strip(), record[1].strip()
            known = "Infiltration" if label == "Infiltrate" else label
            head = _labelled(label, image=image, patient=_nih_patient(image), size=SQUARE, finding=finding_of(known, "chestxray_14"))
            found.add(number, head, partial(xywh, dict(zip(("x", "y", "w", "h"), record[2:6], strict=True))))
    return found.close("chestxray_14", table.sha256)


def read_padchest_gr(path: str | Path, *, extra_boxes: bool = False, language: str = "en") -> AnnotationSet:
    """PadChest-GR: ``grounded_reports_20240819.json``, a list of studies with the sentences of their reports.

    A study has ``StudyID, ImageID`` and ``findings``; one of these ``sentence_en, sentence_es, abnormal, boxes, extra_boxes, labels,
    locations, progression``. Boxes are [x1, y1, x2, y2] in fractions of the image, so the size is (1, 1). A sentence that is not abnormal
    often lacks boxes and labels, and is a negative; an abnormal one without boxes stays without regions. With exactly one label the
    finding is PadChest's. Patient and split are taken from ``master_table.csv`` (``StudyID, PatientID, split``) if it lies beside the
    file. Row: the number of the study. Source: public loaders of the release. What parts ``extra_boxes`` from ``boxes`` was not found
    written; loaders read ``boxes`` alone.

    Args:
        extra_boxes: take these too, as the drawing of a second reader "extra".
        language: which sentences, en or es.
    """
    path = Path(path)
    content, sha256 = read_json(path)
    known = _master_table(path.with_name("master_table.csv"))
    found = Gathering()
    for number, study in entries(path, content, "studies"):
        with found.row(number):
            image, study_id = text_of(study, "ImageID"), text_of(study, "StudyID", needed=False) or None
            patient, split = known.get(study_id or "", (None, None))
            if not isinstance(study.get("findings"), list):
                raise BadRowError("findings is missing or no list")
            for place, entry in enumerate(study["findings"], start=1):
                with found.row(number):
                    if not isinstance(entry, dict) or not isinstance(entry.get(f"sentence_{language}"), str):
                        raise BadRowError(f"finding {place} holds no sentence_{language}")
                    labels = entry.get("labels")
                    label = labels[0] if isinstance(labels, list) and len(labels) == 1 and isinstance(labels[0], str) else None
                    head = Annotation(
                        image=image,
                        phrase=entry[f"sentence_{language}"].strip(),
                        study=study_id,
                        patient=patient,
                        finding=finding_of(label, "padchest") if label else None,
                        category=label,
                        size=FRACTIONS,
                        split=split,
                    )
                    boxes = entry.get("boxes") or []
                    negative = entry.get("abnormal") is False and not boxes
                    found.add(number, replace(head, negative=negative), partial(_fractions, boxes, place))
                    if extra_boxes and entry.get("extra_boxes"):
                        found.add(number, replace(head, reader="extra"), partial(_fractions, entry["extra_boxes"], place))
    return found.close("padchest_gr", sha256)


def _ms_cxr(fields: Mapping[str, Any], size: tuple[int, int] | None) -> Annotation:
    where = re.search(r"(?:^|/)p(\d+)/s(\d+)(?:/|$)", text_of(fields, "path", needed=False))
    category = text_of(fields, "category_name")
    return Annotation(
        image=text_of(fields, "dicom_id"),
        phrase=text_of(fields, "label_text"),
        study=text_of(fields, "study_id", needed=False) or (where[2] if where else None),
        patient=text_of(fields, "subject_id", needed=False) or (where[1] if where else None),
        finding=finding_of(category, "chexpert_14"),
        category=category,
        size=size,
        split=split_of(text_of(fields, "split", needed=False)),
    )


def _labelled(label: str, **fields: Any) -> Annotation:
    return Annotation(phrase=label.replace("_", " ").strip(), category=label, **fields)


def _id(entry: Mapping[str, Any], name: str) -> int | str | None:
    value = entry.get(name)
    return value if isinstance(value, (int, str)) else None


def _nih_patient(image: str) -> str | None:
    return image.split("_", 1)[0] if "_" in image else None


def _coco_box(value: object) -> tuple[Box]:
    return (Box.from_xywh(*numbers_of(value, "bbox", 4)),)


def _corner_box(value: object) -> tuple[Box]:
    return (Box.from_xyxy(*numbers_of(value, "a box", 4)),)


def _packed_boxes(cell: str) -> list[Box]:
    parts = [part.split(";") for part in cell.split("|")]
    return [Box.from_xywh(*(number_of(number, "a box") for number in numbers_of(part, "a box", 4))) for part in parts]


def _fractions(boxes: object, place: int) -> list[Box]:
    if not isinstance(boxes, list):
        raise ValueError(f"finding {place}: boxes is no list")
    corners = [numbers_of(box, f"finding {place}: a box", 4) for box in boxes]
    if any(not -0.01 <= number <= 1.01 for box in corners for number in box):
        raise ValueError(f"finding {place}: a box leaves the image, whose corners are 0, 0 and 1, 1")
    return [Box.from_xyxy(*(min(max(number, 0.0), 1.0) for number in box)) for box in corners]


def _master_table(path: Path) -> dict[str, tuple[str | None, str | None]]:
    """Study -> patient and split; empty without such a table."""
    if not path.is_file():
        return {}
    table = read_table(path, "StudyID", "PatientID", "split")
    at = [table.header.index(name) for name in ("StudyID", "PatientID", "split")]
    rows = ([record[i].strip() for i in at] for _, record in table.records if len(record) == len(table.header))
    return {study: (patient or None, split_of(split)) for study, patient, split in rows}
