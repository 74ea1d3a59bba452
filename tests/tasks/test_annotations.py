"""Annotation files written as they are published, good rows and broken ones, and what comes of them."""

from __future__ import annotations

import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medvl.data.manifest import read_manifest
from medvl.geometry import GridTransform
from medvl.geometry.regions import Box, Ellipse, Mask, Polygon, Rle
from medvl.types import ImageSample, UnreadableImageError
from modalities.ct.mask_stack import laid_on, read_stacked_mask
from tasks.annotations import (
    FORMATS,
    Annotation,
    AnnotationError,
    AnnotationSet,
    FileMask,
    agreed,
    cases,
    find_images,
    read_annotations,
    read_padchest_gr,
)

SECRET = "Mrs Jones has a mass"
"""A sentence that no message may hold."""


def put(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def dump(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def reasons(found: AnnotationSet) -> dict[int, str]:
    return {bad.row: bad.reason for bad in found.rejected}


# --- MS-CXR --------------------------------------------------------------------------------------------------------------------------

MS_CXR = "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height"


def test_ms_cxr_groups_the_boxes_of_a_phrase(tmp_path):
    where = "files/p10/p10000032/s50414267"
    found = read_annotations(
        "ms_cxr",
        put(
            tmp_path / "MS_CXR_Local_Alignment_v1.0.0.csv",
            MS_CXR,
            f"02aa-1,Pneumonia,left basilar consolidation,{where}/02aa-1.jpg,10,20,30,40,200,100",
            f"02aa-1,Pneumothorax,Small left apical pneumothorax,{where}/02aa-1.jpg,5,5,10,10,200,100",
            f'02aa-1,Pneumonia,left basilar consolidation,{where}/02aa-1.jpg,100,20,30,40,200,100',
            '7bb-2,Lung Opacity,"opacities, both bases",elsewhere/7bb-2.jpg,0,0,200.5,99,200,100',
        ),
    )  # fmt: skip
    assert not found.rejected
    assert [(one.image, one.finding, one.category, len(one.regions)) for one in found] == [
        ("02aa-1", "pneumonia", "Pneumonia", 2),
        ("02aa-1", "pneumothorax", "Pneumothorax", 1),
        ("7bb-2", "lung_opacity", "Lung Opacity", 1),
    ]
    assert found[0].regions == (Box.from_xywh(10, 20, 30, 40), Box.from_xywh(100, 20, 30, 40))
    assert (found[0].size, found[0].patient, found[0].study) == ((100, 200), "10000032", "50414267")
    assert found[2].phrase == "opacities, both bases"
    assert found[2].patient is None
    mask = cases(found)[0].mask((100, 200))
    assert mask.sum() == 2 * 30 * 40
    assert mask[20:60, 10:40].all()
    assert mask[20:60, 100:130].all()


def test_ms_cxr_as_coco_says_the_same(tmp_path):
    where = "files/p10/p10000032/s50414267"
    rows = [("left basilar consolidation", 1, 1, [10, 20, 30, 40]), ("Small left apical pneumothorax", 1, 2, [5, 5, 10, 10])]
    as_json = dump(
        tmp_path / "MS_CXR_Local_Alignment_v1.0.0.json",
        {
            "info": {},
            "images": [{"id": 1, "file_name": "02aa-1.jpg", "path": f"{where}/02aa-1.jpg", "width": 200, "height": 100}],
            "categories": [{"id": 1, "name": "Pneumonia"}, {"id": 2, "name": "Pneumothorax"}],
            "annotations": [
                *({"image_id": image, "category_id": kind, "bbox": box, "label_text": text} for text, image, kind, box in rows),
                {"id": 8, "image_id": 9, "category_id": 1, "bbox": [1, 1, 1, 1], "label_text": SECRET},
                {"id": 9, "image_id": 1, "category_id": 2, "bbox": [1, 1, 1], "label_text": SECRET},
                {"id": 10, "image_id": [1], "category_id": {}, "bbox": 3, "label_text": 4},
            ],
        },
    )  # fmt: skip
    as_csv = put(
        tmp_path / "same.csv",
        MS_CXR,
        *(
            f"02aa-1,{('', 'Pneumonia', 'Pneumothorax')[kind]},{text},{where}/02aa-1.jpg,{','.join(map(str, box))},200,100"
            for text, _, kind, box in rows
        ),
    )
    found = read_annotations("ms_cxr", as_json)
    assert found.annotations == read_annotations("ms_cxr", as_csv).annotations
    assert set(reasons(found)) == {3, 4, 5}
    assert "none of the file's images" in reasons(found)[3]


def test_ms_cxr_of_version_1_1_brings_its_patients_and_splits(tmp_path):
    found = read_annotations(
        "ms_cxr",
        put(
            tmp_path / "v1.1.csv",
            "subject_id,study_id,dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height,split",
            "10000032,50414267,02aa,Edema,pulmonary edema,files/p10/p10000032/s50414267/02aa.jpg,1,2,3,4,20,30,valid",
        ),
    )
    assert (found[0].patient, found[0].study, found[0].split, found[0].size) == ("10000032", "50414267", "val", (30, 20))


def test_bad_rows_are_listed_and_take_only_their_own_phrase_with_them(tmp_path):
    found = read_annotations(
        "ms_cxr",
        put(
            tmp_path / "broken.csv",
            MS_CXR,
            f"a,Edema,{SECRET},p/a.jpg,1,2,3,4,20,30",
            f"a,Edema,{SECRET},p/a.jpg,1,2,-3,4,20,30",  # the other half of row 2's phrase
            f"a,Edema,{SECRET} here,p/a.jpg,{SECRET},2,3,4,20,30",
            f"a,Edema,{SECRET} here too,p/a.jpg,nan,2,3,4,20,30",
            f"a,Edema,{SECRET} outside,p/a.jpg,18,2,30,4,20,30",
            f"a,Edema,{SECRET} one cell short,p/a.jpg,1,2,3,4,20",
            f",Edema,{SECRET},p/a.jpg,1,2,3,4,20,30",
            "a,Edema,,p/a.jpg,1,2,3,4,20,30",
            f"a,Edema,{SECRET} of no size,p/a.jpg,1,2,3,4,20,{SECRET}",
            "",
            "a,Edema,a phrase that is fine,p/a.jpg,1,2,3,4,20,30",
        ),
    )
    assert [one.phrase for one in found] == ["a phrase that is fine"]
    told = reasons(found)
    assert set(told) == set(range(2, 11))
    assert "row 3 of the same phrase" in told[2]
    assert "size above 0" in told[3]
    assert told[4] == told[5] == "x is no finite number"
    assert "leaves the image" in told[6]
    assert "9 cells where the header has 10" in told[7]
    report = found.rejection_report()
    assert report.startswith("ms_cxr: 9 rows left out, 1 annotations kept")
    found.write_rejected(tmp_path / "rejected.csv")
    for text in (report, repr(found), (tmp_path / "rejected.csv").read_text(), repr(found[0])):
        assert "Jones" not in text
        assert "phrase that is fine" not in text


# --- labels with boxes ---------------------------------------------------------------------------------------------------------------


def test_chestx_det10(tmp_path):
    found = read_annotations(
        "chestx_det10",
        dump(
            tmp_path / "test.json",
            [
                {"file_name": "00000042_006.png", "syms": ["Fibrosis", "Fibrosis"], "boxes": [[632, 721, 909, 969], [129, 611, 474, 909]]},
                {"file_name": "00000043_000.png", "syms": ["Calcification", "Fracture"], "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]},
                {"file_name": "00000044_000.png", "syms": [], "boxes": []},
                {"file_name": "00000045_000.png", "syms": ["Mass"], "boxes": []},
                {"file_name": "00000046_000.png", "syms": ["Mass", "Nodule"], "boxes": [[9, 9, 5, 12], [5, 6, 7, 8]]},
                "nothing",
            ],
        ),
    )
    assert [(one.image, one.phrase, one.finding, one.negative) for one in found] == [
        ("00000042_006.png", "Fibrosis", "pulmonary_fibrosis", False),
        ("00000043_000.png", "Calcification", "calcified_density", False),
        ("00000043_000.png", "Fracture", "fracture", False),
        ("00000044_000.png", "No finding", "no_finding", True),
        ("00000046_000.png", "Nodule", "lung_nodule", False),
    ]
    assert (found[0].patient, found[0].split, found[0].size) == ("00000042", "test", (1024, 1024))
    mask = cases(found)[0].mask((1024, 1024))
    expected = np.zeros((1024, 1024), dtype=bool)
    expected[721:969, 632:909] = expected[611:909, 129:474] = True
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(cases(found)[0].mask((512, 512)), expected[1::2, 1::2])  # half the size: their centres are these
    assert set(reasons(found)) == {4, 5, 6}


def test_rsna(tmp_path):
    found = read_annotations(
        "rsna",
        put(
            tmp_path / "stage_2_train_labels.csv",
            "patientId,x,y,width,height,Target",
            "0004cfab,,,,,0",
            "00436515,264.0,152.0,213.0,379.0,1",
            "00436515,562.0,152.0,256.0,453.0,1",
            "00436516,,,,,1",
            "00436517,1.0,2.0,3.0,4.0,2",
        ),
    )
    assert [(one.image, one.negative, one.finding, len(one.regions)) for one in found] == [
        ("0004cfab", True, "pneumonia", 0),
        ("00436515", False, "pneumonia", 2),
    ]
    assert cases(found)[1].mask((1024, 1024)).sum() == 213 * 379 + 256 * 453
    assert not cases(found)[0].mask((1024, 1024)).any()
    assert reasons(found) == {5: "x is no finite number", 6: "Target is neither 0 nor 1"}


def test_rsna_as_medklip_has_it(tmp_path):
    where = "/mnt/rsna/1.2.276.0.1/1.2.276.0.2"
    found = read_annotations(
        "rsna",
        put(
            tmp_path / "test.csv",
            "ID,img_path,boxes,classes",
            f"397fe03a,{where}/1.2.276.0.3.dcm,nan,0",
            f"7a0105da,{where}/1.2.276.0.4.dcm,197.0;291.0;289.0;454.0|683.0;265.0;247.0;524.0,1",
            f"7a0105db,{where}/1.2.276.0.5.dcm,197.0;291.0;289.0,1",
            f"7a0105dc,{where}/1.2.276.0.6.dcm,nan,1",
        ),
    )
    assert [(one.image, one.negative) for one in found] == [("1.2.276.0.3.dcm", True), ("1.2.276.0.4.dcm", False)]
    assert found[1].regions == (Box.from_xywh(197, 291, 289, 454), Box.from_xywh(683, 265, 247, 524))
    assert set(reasons(found)) == {4, 5}


VINDR_ROWS = (
    "50a4,No finding,14,R11,,,,",
    "50a4,No finding,14,R15,,,,",
    "50a4,No finding,14,R2,,,,",
    "9a5f,Cardiomegaly,3,R10,691,1375,1653,1831",
    "9a5f,Cardiomegaly,3,R9,700,1370,1660,1840",
    "9a5f,Nodule/Mass,8,R10,100,100,200,200",
    "9a5f,Nodule/Mass,8,R8,180,180,300,300",
    "9a5f,Aortic enlargement,0,R10,10,10,20,20",
    "9a5f,No finding,14,R8,,,,",
)


def test_vindr_cxr_keeps_all_readers_and_a_rule_says_what_counts(tmp_path):
    found = read_annotations(
        "vindr_cxr", put(tmp_path / "train.csv", "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", *VINDR_ROWS)
    )
    assert len(found) == 9
    assert (found[0].finding, found[0].negative, found[0].reader, found[0].split) == ("no_finding", True, "R11", "train")
    assert found[3].regions == (Box.from_xyxy(691, 1375, 1653, 1831),)
    assert found[5].finding == "lung_lesion"
    both = {case.phrase: case for case in cases(found) if case.image == "9a5f"}
    assert len(both["Nodule/Mass"].regions) == 2  # union: 100 x 100 and 120 x 120, 20 x 20 of them shared
    assert both["Nodule/Mass"].mask((2000, 2000)).sum() == 10000 + 14400 - 400
    shared = {(case.image, case.phrase): case for case in cases(agreed(found))}
    assert len(shared["9a5f", "Cardiomegaly"].regions) == 2
    for phrase in ("Nodule/Mass", "Aortic enlargement"):  # too little shared, and one reader alone: open, not absent
        assert (shared["9a5f", phrase].regions, shared["9a5f", phrase].negative) == ((), False)
    assert shared["50a4", "No finding"].negative
    assert not shared["9a5f", "No finding"].negative
    assert all(one.reader is None for one in agreed(found))
    assert len({(c.image, c.phrase): c for c in cases(agreed(found, least_overlap=0.01))}["9a5f", "Nodule/Mass"].regions) == 2
    assert len({(c.image, c.phrase): c for c in cases(agreed(found, readers=3))}["9a5f", "Cardiomegaly"].regions) == 0
    for wrong in ({"readers": 1}, {"least_overlap": 0.0}, {"least_overlap": 1.5}):
        with pytest.raises(ValueError, match="agreement"):
            agreed(found, **wrong)


def test_vindr_cxr_from_physionet(tmp_path):
    train = read_annotations(
        "vindr_cxr",
        put(
            tmp_path / "annotations_train.csv",
            "image_id,rad_id,class_name,x_min,y_min,x_max,y_max",
            "0005e8e3,R10,Infiltration,900.96,587.81,1205.36,888.71",
            "0005e8e3,R8,No finding,,,,",
            "0005e8e3,R9,Lung Opacity,900.96,587.81,1205.36,",
        ),
    )
    assert (train[0].finding, train[0].reader) == ("infiltrate", "R10")
    assert train[0].regions[0].boxes[0].low == pytest.approx((587.31, 900.46))
    assert reasons(train) == {4: "y_max is no finite number"}
    test = read_annotations(
        "vindr_cxr",
        put(tmp_path / "annotations_test.csv", "image_id,class_name,x_min,y_min,x_max,y_max", "1,COPD,1,2,3,4", "2,Tuberculosis,,,,"),
    )
    assert [(one.reader, one.split, one.finding, one.negative) for one in test] == [
        (None, "test", "copd", False),
        (None, "test", "tuberculosis", False),
    ]
    assert agreed(test).annotations == test.annotations


def test_chestxray_14_reads_past_its_header(tmp_path):
    found = read_annotations(
        "chestxray_14",
        put(
            tmp_path / "BBox_List_2017.csv",
            "Image Index,Finding Label,Bbox [x,y,w,h],,,",
            "00013118_008.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,",
            "00014716_007.png,Infiltrate,686.101694915254,131.543498411017,185.491525423729,313.491525423729",
            "00014717_007.png,Mass,686.1,131.5",
        ),
    )
    assert [(one.image, one.phrase, one.finding, one.patient) for one in found] == [
        ("00013118_008.png", "Atelectasis", "atelectasis", "00013118"),
        ("00014716_007.png", "Infiltrate", "infiltrate", "00014716"),
    ]
    rows, columns = np.nonzero(cases(found)[0].mask((1024, 1024)))
    inside = [(n, math.ceil(a - 0.5), math.ceil(a + b - 0.5) - 1) for n, a, b in ((rows, 547.0192, 79.1864), (columns, 225.0847, 86.7797))]
    assert all((at.min(), at.max()) == (low, high) for at, low, high in inside)
    assert set(reasons(found)) == {4}


# --- PadChest-GR ---------------------------------------------------------------------------------------------------------------------


def padchest(tmp_path: Path) -> Path:
    return dump(
        tmp_path / "grounded_reports_20240819.json",
        [
            {
                "StudyID": "s1",
                "ImageID": "2168_a.png",
                "PreviousStudyID": None,
                "findings": [
                    {
                        "sentence_en": "Bilateral pleural effusion.",
                        "sentence_es": "Derrame pleural bilateral.",
                        "abnormal": True,
                        "boxes": [[0.1, 0.5, 0.3, 0.9], [0.6, 0.5, 0.9, 1.0]],
                        "extra_boxes": [[0.1, 0.5, 0.35, 0.9]],
                        "labels": ["pleural effusion"],
                        "locations": ["bilateral"],
                    },
                    {"sentence_en": "No pneumothorax.", "sentence_es": "Sin neumotorax.", "abnormal": False},
                    {"sentence_en": "Chronic changes.", "sentence_es": "Cambios.", "abnormal": True, "boxes": [], "labels": ["x", "y"]},
                    {"sentence_en": SECRET, "sentence_es": SECRET, "abnormal": True, "boxes": [[0.1, 0.2, 1.4, 0.5]]},
                    {"sentence_en": SECRET + ".", "abnormal": True, "boxes": [[10, 20, 40, 50]]},
                    {"abnormal": True, "boxes": []},
                    7,
                ],
            },
            {"StudyID": "s2", "ImageID": "2169_b.png"},
        ],
    )


def test_padchest_gr(tmp_path):
    put(tmp_path / "master_table.csv", "StudyID,ImageID,PatientID,split,label", "s1,2168_a.png,p7,validation,pleural effusion")
    found = read_annotations("padchest_gr", padchest(tmp_path))
    assert [(one.phrase, one.finding, len(one.regions), one.negative) for one in found] == [
        ("Bilateral pleural effusion.", "pleural_effusion", 2, False),
        ("No pneumothorax.", None, 0, True),
        ("Chronic changes.", None, 0, False),
    ]
    assert (found[0].patient, found[0].split, found[0].study) == ("p7", "val", "s1")
    expected = np.zeros((100, 200), dtype=bool)
    expected[50:90, 20:60] = expected[50:100, 120:180] = True
    np.testing.assert_array_equal(cases(found)[0].mask((100, 200)), expected)
    assert len(found.rejected) == 5
    assert "finding 4: a box leaves the image" in found.rejection_report()
    assert "Jones" not in found.rejection_report()
    spanish = read_padchest_gr(tmp_path / "grounded_reports_20240819.json", extra_boxes=True, language="es")
    assert [(one.phrase, one.reader, len(one.regions)) for one in spanish][:2] == [
        ("Derrame pleural bilateral.", None, 2),
        ("Derrame pleural bilateral.", "extra", 1),
    ]


# --- outlines ------------------------------------------------------------------------------------------------------------------------


def test_siim_with_the_space_in_its_header(tmp_path):
    found = read_annotations(
        "siim",
        put(
            tmp_path / "train-rle.csv",
            "ImageId, EncodedPixels",
            "1.2.276.0.1,1024 3 1021 5",
            "1.2.276.0.1,5120 2",
            "1.2.276.0.2, -1",
            "1.2.276.0.3,-1",
            "1.2.276.0.4,1 2 3",
            "1.2.276.0.5,1 2 3 x",
            "1.2.276.0.6,0 99999999",
            "1.2.276.0.7,",
        ),
    )
    assert [(one.image, one.negative, len(one.regions)) for one in found] == [
        ("1.2.276.0.1", False, 2),
        ("1.2.276.0.2", True, 0),
        ("1.2.276.0.3", True, 0),
    ]
    expected = np.zeros((1024, 1024), dtype=bool)  # down the columns: runs at the tops of the second, third and sixth
    expected[0:3, 1] = expected[0:5, 2] = expected[0:2, 5] = True
    np.testing.assert_array_equal(cases(found)[0].mask((1024, 1024)), expected)
    assert set(reasons(found)) == {6, 7, 8, 9}


def test_object_cxr_has_three_kinds_of_outlines(tmp_path):
    found = read_annotations(
        "object_cxr",
        put(
            tmp_path / "dev.csv",
            "image_name,annotation",
            "00001.jpg,0 10 20 30 50;1 40 10 60 20;2 5 5 15 5 15 15 5 15",
            "00002.jpg,",
            "00003.jpg,3 1 2 3 4",
            "00004.jpg,2 1 2 3 4 5",
            "00005.jpg,0 30 20 10 50",
        ),
    )
    assert [(one.image, one.negative, one.split, one.finding) for one in found] == [
        ("00001.jpg", False, "val", "foreign_body"),
        ("00002.jpg", True, "val", "foreign_body"),
    ]
    box, ellipse, polygon = found[0].regions
    assert (type(box), type(ellipse), type(polygon)) == (Box, Ellipse, Polygon)
    mask = cases(found)[0].mask((64, 64))
    assert mask[20:50, 10:30].all()
    assert mask[5:15, 5:15].all()
    assert mask[15, 50]
    assert not mask[10, 40]
    assert mask.sum() == pytest.approx(600 + 100 + math.pi * 10 * 5, abs=8)
    assert set(reasons(found)) == {4, 5, 6}


def test_chexlocalize_masks_and_outlines(tmp_path):
    masks = read_annotations(
        "chexlocalize",
        dump(
            tmp_path / "gt_segmentations_val.json",
            {
                "patient64622_study1_view1_frontal": {
                    "Edema": {"size": [7, 5], "counts": "331N00000140L05OM"},  # written by pycocotools
                    "Cardiomegaly": {"size": [4, 4], "counts": "`0"},
                    "Airspace Opacity": {"size": [4, 4], "counts": [3, 2, 11]},
                    "Pneumothorax": {"size": [4, 4], "counts": "zzz"},
                    "Atelectasis": {"size": [4, 4]},
                    "Consolidation": {"counts": "`0"},
                },
                "patient1_study2_view2_lateral": [],
            },
        ),
    )
    assert [(one.image, one.patient, one.finding, one.negative, one.split) for one in masks] == [
        ("patient64622/study1/view1_frontal", "patient64622", "edema", False, "val"),
        ("patient64622/study1/view1_frontal", "patient64622", "cardiomegaly", True, "val"),
        ("patient64622/study1/view1_frontal", "patient64622", "lung_opacity", False, "val"),
    ]
    bits = "00011101010101100000110110000001000"
    np.testing.assert_array_equal(cases(masks)[0].mask((7, 5)).T.ravel(), [bit == "1" for bit in bits])
    assert len(masks.rejected) == 4
    outlines = read_annotations(
        "chexlocalize",
        dump(
            tmp_path / "gt_annotations_test.json",
            {
                "patient64622_study1_view1_frontal": {
                    "img_size": [40, 60],
                    "Edema": [[[10, 10], [20, 10], [20, 30], [10, 30]], [[40.5, 5.0], [50.5, 5.0], [45.5, 20.0]]],
                    "Fracture": [[[10, 10], [200, 10], [20, 30]]],
                    "Pneumonia": [[[10, 10], ["a", 10], [20, 30]]],
                }
            },
        ),
    )
    assert [(one.phrase, len(one.regions), one.size, one.split) for one in outlines] == [("Edema", 2, (40, 60), "test")]
    mask = cases(outlines)[0].mask((40, 60))
    assert mask[10:30, 10:20].all()
    assert mask[:, :30].sum() == 200
    assert mask[:, 30:].sum() == pytest.approx(75, abs=8)
    assert len(outlines.rejected) == 2


# --- ReXGroundingCT ------------------------------------------------------------------------------------------------------------------

LPS = np.array([[-0.8, 0, 0, 100], [0, -0.7, 0, 90], [0, 0, 2.0, -50], [0, 0, 0, 1.0]])  # (x, y, z) to RAS mm, as CT series often are


def rex(tmp_path: Path, suffix: str = ".nii.gz") -> tuple[Path, np.ndarray]:
    """A data set with one volume of 6 x 5 x 4 voxels and three findings, the third with no mask."""
    stack = np.zeros((3, 6, 5, 4), dtype=np.uint8)
    stack[0, 1:3, 2, 0:3] = 1
    stack[0, 5, 4, 3] = 2  # another entity
    stack[1, 0, 0:2, 1] = 1
    folder = tmp_path / "segmentations"
    folder.mkdir()
    name = f"train_1741_b_2{suffix}"
    nib.save(nib.Nifti1Image(stack, LPS), folder / name)
    entry = {
        "name": name,
        "findings": {"0": "consolidation in the right lower lobe", "1": "a nodule", "2": "an opacity"},
        "entity_counts": {"0": 2, "1": 1, "2": 0},
        "shape": [6, 5, 4],
        "pixels": {"0": 7, "1": 2, "2": 0},
        "categories": {"0": "2b", "1": "2d", "2": "2a"},
        "protocol": "protocol1",
    }
    blind = {"name": "valid_9_a_1.nii.gz", "findings": {"0": "an effusion"}, "shape": [6, 5, 4], "categories": {"0": "1a"}}
    return dump(
        tmp_path / "dataset.json", {"train": [entry], "test": [blind, {**entry, "name": "../../x.nii"}, {**entry, "shape": 3}]}
    ), stack


def test_rexgrounding_ct(tmp_path):
    path, stack = rex(tmp_path)
    found = read_annotations("rexgrounding_ct", path)
    assert [(one.image, one.category, one.patient, one.study, one.split, len(one.regions), one.negative) for one in found] == [
        ("train_1741_b_2.nii.gz", "2b", "train_1741", "train_1741_b", "train", 1, False),
        ("train_1741_b_2.nii.gz", "2d", "train_1741", "train_1741_b", "train", 1, False),
        ("train_1741_b_2.nii.gz", "2a", "train_1741", "train_1741_b", "train", 0, False),
        ("valid_9_a_1.nii.gz", "1a", "valid_9", "valid_9_a", "test", 0, False),
    ]
    assert len(found.rejected) == 2
    for case, values in zip(cases(found)[:2], stack[:2], strict=True):
        assert case.size == (4, 5, 6)
        np.testing.assert_array_equal(case.mask((4, 5, 6)), values.transpose(2, 1, 0) != 0)
    with pytest.raises(ValueError, match="does not belong"):
        found[0].regions[0].mask((6, 5, 4))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "ASR", "PIL"])
def test_masks_of_volumes_turn_to_the_axes_of_their_volume(tmp_path, codes):
    """Against nibabel: the CT as any program may have saved it, the mask as it is."""
    path, stack = rex(tmp_path)
    found = read_annotations("rexgrounding_ct", path)
    turn = nib.orientations.ornt_transform(nib.io_orientation(LPS), nib.orientations.axcodes2ornt(codes))
    turned = nib.Nifti1Image(stack[0], LPS).as_reoriented(turn)
    expected = np.asarray(turned.dataobj).transpose(2, 1, 0) != 0
    sample = ImageSample(
        torch.zeros(1, *expected.shape),
        torch.ones(expected.shape[0], dtype=torch.bool),
        GridTransform(expected.shape),
        affine=turned.affine[:, [2, 1, 0, 3]],
    )
    case = cases(found)[0]
    np.testing.assert_array_equal(case.mask_on(sample), expected)
    moved = np.array(sample.affine)
    moved[0, 3] += 3
    with pytest.raises(UnreadableImageError, match="same grid"):
        case.mask_on(replace(sample, affine=moved))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_one_of_a_stack_of_masks_is_what_nibabel_has(tmp_path, suffix, first, dtype):
    rng = np.random.default_rng(3)
    stack = (rng.random((5, 7, 6, 4)) < 0.3).astype(dtype)
    saved = stack if first else np.moveaxis(stack, 0, -1)
    nib.save(nib.Nifti1Image(saved, LPS), tmp_path / f"m{suffix}")
    for index in range(5):
        mask, affine = read_stacked_mask(tmp_path / f"m{suffix}", index, (4, 6, 7))
        np.testing.assert_array_equal(mask, stack[index].transpose(2, 1, 0) != 0)
        np.testing.assert_allclose(affine, LPS[:, [2, 1, 0, 3]], atol=1e-6)
    with pytest.raises(UnreadableImageError, match="5 masks"):
        read_stacked_mask(tmp_path / f"m{suffix}", 5, (4, 6, 7))
    with pytest.raises(UnreadableImageError, match="expected masks of"):
        read_stacked_mask(tmp_path / f"m{suffix}", 0, (4, 6, 8))


def test_stacks_that_cannot_be_read_say_so(tmp_path):
    path, stack = rex(tmp_path, ".nii")
    good = (tmp_path / "segmentations" / "train_1741_b_2.nii").read_bytes()
    (tmp_path / "cut.nii").write_bytes(good[:-5])
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(good)[:-9])
    (tmp_path / "text.nii").write_text("no volume")
    nib.save(nib.Nifti1Image(stack.astype(np.complex64), LPS), tmp_path / "complex.nii")
    for name, says in (
        ("cut.nii", "cut short"),
        ("cut.nii.gz", "cut short|not a readable"),
        ("text.nii", "not a readable"),
        ("complex.nii", "neither"),
    ):
        with pytest.raises(UnreadableImageError, match=says):
            read_stacked_mask(tmp_path / name, 2)
    with pytest.raises(UnreadableImageError, match=r"cannot be opened|expected a file"):
        read_stacked_mask(tmp_path / "none.nii")
    mask, affine = read_stacked_mask(tmp_path / "segmentations" / "train_1741_b_2.nii", 1)
    np.testing.assert_array_equal(laid_on(path, mask, affine, affine, (4, 5, 6)), mask)


# --- our own -------------------------------------------------------------------------------------------------------------------------


def test_the_plain_table(tmp_path):
    picture = np.zeros((20, 30), dtype=np.uint8)
    picture[3:9, 4:11] = 255
    Image.fromarray(picture).save(tmp_path / "effusion.png")
    Image.fromarray(np.dstack([picture, picture * 0, picture * 0, picture * 0 + 255])).save(tmp_path / "colour.png")
    found = read_annotations(
        "plain",
        put(
            tmp_path / "boxes.csv",
            "image,phrase,finding,x,y,width,height,mask,patient,split,image_width,image_height",
            "a.png,a nodule,Nodule,2,3,4,5,,p1,test,30,20",
            "a.png,a nodule,Nodule,12,3,4,5,,p1,test,30,20",
            "a.png,an effusion,pleural_effusion,,,,,effusion.png,p1,test,,",
            "a.png,an effusion in colour,,,,,,colour.png,p1,test,,",
            "b.png,a nodule,Nodule,,,,,,,,,",
            "c.png,a nodule,Nodule,1,2,,4,,,,,",
            "c.png,a mass,Mass,1,2,3,4,effusion.png,,,,",
            "c.png,a scar,,,,,,none.png,,,,",
            "c.png,another scar,,,,,,../effusion.png,,,,",
            "c.png,a third,,,,,,/etc/passwd,,,,",
        ),
    )
    assert [(one.image, one.phrase, one.finding, one.negative) for one in found] == [
        ("a.png", "a nodule", "lung_nodule", False),
        ("a.png", "an effusion", "pleural_effusion", False),
        ("a.png", "an effusion in colour", None, False),
        ("b.png", "a nodule", "lung_nodule", True),
    ]
    made = cases(found)
    assert (made[0].patient, made[3].patient) == ("p1", "b.png")
    assert made[0].mask((20, 30)).sum() == 40
    assert made[0].mask((40, 60)).sum() == 160  # another copy of the image, twice the size
    for case in made[1:3]:
        np.testing.assert_array_equal(case.mask((20, 30)), picture > 0)
        with pytest.raises(ValueError, match="does not belong"):
            case.mask((21, 30))
    told = reasons(found)
    assert set(told) == {7, 8, 9, 10, 11}
    assert told[10] == told[11] == "names a file outside the annotations' folder"
    (tmp_path / "effusion.png").write_text("no picture")
    with pytest.raises(UnreadableImageError, match="no readable picture"):
        made[1].mask((20, 30))


def test_a_table_of_masks_of_volumes(tmp_path):
    values = np.zeros((6, 5, 4), dtype=np.uint8)
    values[1:3, 2, 0:3] = 1
    nib.save(nib.Nifti1Image(values, LPS), tmp_path / "m.nii.gz")
    found = read_annotations("plain", put(tmp_path / "masks.csv", "image,phrase,mask", "v.nii.gz,a nodule,m.nii.gz", "w.nii.gz,a nodule,"))
    assert isinstance(found[0].regions[0], FileMask)
    np.testing.assert_array_equal(cases(found)[0].mask((4, 5, 6)), values.transpose(2, 1, 0) > 0)
    assert found[0].regions[0].boxes == (Box((-0.5, 1.5, 0.5), (2.5, 2.5, 2.5)),)
    assert found[1].negative


# --- files, cases, and what cannot be read -------------------------------------------------------------------------------------------


def test_images_are_found_by_name_stem_and_path(tmp_path):
    for name in ("x/1.2.276.0.3.dcm", "x/a.png", "y/a.jpg", "p1/study1/view1.jpg", "p2/study1/view1.jpg", "v.nii.gz", "b.jpg", "z/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    keys = [
        "1.2.276.0.3",
        "a.png",
        "p2/study1/view1",
        "v.nii.gz",
        "v",
        "a",
        "gone",
        "view1",
        "b.png",
        "study1/view1",
        "p1/study1/view1.png",
        "/",
    ]
    found = find_images([Annotation(key, "x") for key in keys], tmp_path)
    assert {key: path.relative_to(tmp_path).as_posix() for key, path in found.paths.items()} == {
        "1.2.276.0.3": "x/1.2.276.0.3.dcm",
        "a.png": "x/a.png",
        "p2/study1/view1": "p2/study1/view1.jpg",
        "v.nii.gz": "v.nii.gz",
        "v": "v.nii.gz",
        "b.png": "z/b.png",
        "p1/study1/view1.png": "p1/study1/view1.jpg",
    }
    assert found.missing == ("gone", "/")
    assert found.ambiguous == ("a", "view1", "study1/view1")
    with pytest.raises(ValueError, match="no such folder"):
        find_images([], tmp_path / "none")


def test_images_of_a_manifest_bring_their_patients(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    put(tmp_path / "m.csv", "study_id,patient_id,modality,path", "s1,p1,xray,a.png", "s2,p2,xray,b.png")
    annotations = [Annotation("a", "x"), Annotation("b.dcm", "x", patient="theirs"), Annotation("c", "x")]
    found = find_images(annotations, read_manifest(tmp_path / "m.csv"))
    assert found.paths == {"a": tmp_path / "a.png", "b.dcm": tmp_path / "b.png"}
    assert found.missing == ("c",)
    assert [case.patient for case in cases(annotations, found.patients)] == ["p1", "p2", "c"]


def test_cases_join_readers_and_keep_categories_apart():
    box = Box.from_xywh(1, 1, 2, 2)
    notes = [
        Annotation("a", "opacity", category="Pneumonia", regions=(box,), reader="1", patient="p"),
        Annotation("b", "opacity", category="Pneumonia", negative=True, reader="1"),
        Annotation("a", "opacity", category="Pneumonia", negative=True, reader="2"),
        Annotation("a", "opacity", category="Edema", regions=(Mask(np.eye(8, dtype=bool)),)),
    ]
    made = cases(notes)
    assert [(case.image, case.category, len(case.regions), case.negative, case.patient) for case in made] == [
        ("a", "Pneumonia", 1, False, "p"),
        ("b", "Pneumonia", 0, True, "b"),
        ("a", "Edema", 1, False, "a"),
    ]
    with pytest.raises(ValueError, match="2 sizes"):
        cases([replace(notes[0], size=(8, 8)), replace(notes[0], size=(9, 9), reader="2")])
    sample = ImageSample(torch.zeros(1, 4, 4), torch.ones(4, 4, dtype=torch.bool), GridTransform((16, 16)))
    assert cases([replace(notes[0], size=(8, 8))])[0].mask_on(sample).sum() == 16


def test_rows_that_contradict_each_other_are_left_out(tmp_path):
    header = "image,phrase,x,y,width,height,image_width,image_height"
    found = read_annotations(
        "plain", put(tmp_path / "a.csv", header, "a,n,1,1,2,2,,", "a,n,,,,,,", "b,n,1,1,2,2,9,9", "b,n,1,1,2,2,8,8", "c,n,1,1,2,2,,")
    )
    assert [one.image for one in found] == ["c"]
    told = reasons(found)
    assert "both that it is there and that it is not" in told[2]
    assert told[2] == told[3]
    assert "different sizes" in told[4]
    assert told[4] == told[5]


def test_files_that_cannot_be_read_are_refused_whole(tmp_path):
    with pytest.raises(AnnotationError, match=r"known are plain, ms_cxr"):
        read_annotations("coco", tmp_path / "a.csv")
    for name in FORMATS:
        with pytest.raises(AnnotationError, match="cannot be read"):
            read_annotations(name, tmp_path / "none")
    put(tmp_path / "other.csv", "a,b", "1,2")
    dump(tmp_path / "other.json", 5)
    (tmp_path / "latin.csv").write_bytes("image_id,é".encode("latin-1"))
    (tmp_path / "null.csv").write_bytes(b"image_id\0,b\n")
    (tmp_path / "half.csv.gz").write_bytes(gzip.compress(b"image_id,b\n" * 100)[:-9])
    (tmp_path / "cut.json").write_text('[{"file_name": "' + SECRET)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("ms_cxr", "rsna", "vindr_cxr", "chestxray_14", "siim", "object_cxr", "plain"):
        with pytest.raises(AnnotationError, match="column"):
            read_annotations(name, tmp_path / "other.csv")
    for name in ("ms_cxr", "chestx_det10", "padchest_gr", "chexlocalize", "rexgrounding_ct"):
        with pytest.raises(AnnotationError, match="got int"):
            read_annotations(name, tmp_path / "other.json")
    with pytest.raises(AnnotationError, match="semicolons part them"):
        read_annotations("rsna", put(tmp_path / "saved.csv", "patientId;x;y;width;height;Target", "0004;;;;;0"))
    for file, says in (("latin.csv", "UTF-8"), ("null.csv", "null byte"), ("half.csv.gz", "gzip")):
        with pytest.raises(AnnotationError, match=says):
            read_annotations("vindr_cxr", tmp_path / file)
    for file, says in (("cut.json", "line 1, column"), ("deep.json", "nested too deep")):
        with pytest.raises(AnnotationError, match=says) as caught:
            read_annotations("chestx_det10", tmp_path / file)
        assert "Jones" not in str(caught.value)


def test_a_packed_table_is_read_as_it_is(tmp_path):
    text = "image_id,class_name,rad_id,x_min,y_min,x_max,y_max\n1,Mass,R1,1,2,3,4\n"
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(text.encode("utf-8-sig")))
    found = read_annotations("vindr_cxr", tmp_path / "train.csv.gz")
    assert [one.image for one in found] == ["1"]
    assert found.select(lambda one: one.image != "1").annotations == ()
    assert found.images == ("1",)


ENTRIES = {
    "ms_cxr": ("image_id", "category_id", "bbox", "label_text", "id", "name", "file_name", "path", "width", "height"),
    "chestx_det10": ("file_name", "syms", "boxes"),
    "padchest_gr": ("StudyID", "ImageID", "findings", "sentence_en", "abnormal", "boxes", "labels"),
    "rexgrounding_ct": ("name", "findings", "shape", "pixels", "categories"),
    "chexlocalize": ("img_size", "Edema", "size", "counts"),
}
SCALARS = (None, True, False, 0, 1, -1, 3, 0.5, 1e308, math.nan, math.inf, 10**400, 2**70, "", " ", "1", "a.png", "../a", "\ud800", SECRET)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_whatever_stands_in_an_entry_it_is_an_annotation_or_a_rejected_row(tmp_path, name):
    rng = random.Random(7)

    def anything(depth: int) -> Any:
        kind = rng.randrange(6) if depth else 5
        if kind < 2:
            return [anything(depth - 1) for _ in range(rng.choice((0, 1, 2, 3, 4, 4)))]
        if kind < 3:
            return {rng.choice(ENTRIES[name]): anything(depth - 1) for _ in range(4)}
        return {"0": anything(depth - 1)} if kind == 3 else rng.choice(SCALARS)

    def entry() -> Any:
        return {field: anything(3) for field in ENTRIES[name] if rng.random() < 0.9}

    kept = left_out = 0
    for _ in range(150):
        content: Any = [entry() for _ in range(3)]
        if name == "ms_cxr":
            content = {"images": content, "annotations": [entry() for _ in range(3)], "categories": [entry() for _ in range(3)]}
        elif name == "chexlocalize":
            content = {"a": entry(), "b": entry(), "c": anything(1)}
        elif name == "rexgrounding_ct":
            content = {"train": content}
        found = read_annotations(name, dump(tmp_path / f"{name}.json", content))
        assert "Jones" not in found.rejection_report()
        assert all(one.image and one.phrase for one in found)
        kept, left_out = kept + len(found), left_out + len(found.rejected)
    assert left_out > 100


def test_run_lengths_are_not_unpacked_beyond_their_picture(tmp_path):
    """A string of a few characters that declares 2^50 pixels."""
    bomb = {"a": {"Edema": {"size": [2**25, 2**25], "counts": "o" * 9 + "1"}, "Mass": {"size": [4, 4], "counts": "o" * 8 + "1"}}}
    found = read_annotations("chexlocalize", dump(tmp_path / "gt_segmentations_val.json", bomb))
    assert len(found.rejected) == 2
    assert not found.annotations
    assert isinstance(Rle((16,), (4, 4)).mask((4, 4)), np.ndarray)
