"""Items of whole studies: which images and texts they hold, what a bad file costs, and that single images are served as ever."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medvl.data.augment import Augment
from medvl.data.manifest import read_manifest
from medvl.data.studies import Collate, Draw, StudyDataset
from medvl.model import packed
from medvl.training.data import StudyDataModule
from modalities.xray.reader import XrayReader
from reports.text_source import ReportSentences

HEADER = ["study_id", "patient_id", "modality", "path", "view", "split", "findings"]
ROWS = [
    ("a", "1", "xray", "a_pa.png", "PA", "train", "The heart is large."),
    ("b", "2", "xray", "b_ap.png", "AP", "train", "There is an effusion. The heart is normal."),
    ("a", "1", "xray", "a_lat.png", "LL", "train", ""),  # row 4: the report stands in the study's other row
    ("c", "3", "xray", "c_bad.png", "PA", "train", "No pneumothorax."),
    ("c", "3", "xray", "c_lat.png", "lateral", "train", "No pneumothorax. The heart is normal."),
    ("d", "4", "xray", "d_pa.png", "PA", "train", ""),
    ("e", "5", "xray", "e_bad.png", "PA", "train", "Clear."),
    ("a", "1", "ct", "a.nii.gz", "", "train", "A nodule."),
    ("a", "1", "xray", "a_odd.png", "", "train", "The heart is large."),
    ("f", "6", "xray", "f_pa.png", "PA", "val", "Clear."),
]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("items"), np.random.default_rng(0)
    for row in ROWS:
        if "bad" in row[3] or row[2] == "ct":
            (folder / row[3]).write_bytes(b"\x89PNG\r\n\x1a\nnot really")
        else:
            Image.fromarray(rng.integers(0, 255, (24, 20), dtype=np.uint8)).save(folder / row[3])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *ROWS])
    return folder / "manifest.csv"


def data_set(table: Path, **options: Any) -> StudyDataset:
    rows = read_manifest(table).select(split="train", modality="xray")
    return StudyDataset(rows, XrayReader(size=16), ReportSentences(), **{"views": "study"} | options)


@pytest.mark.parametrize("cache", [True, False])
def test_an_item_is_a_study_and_a_bad_file_costs_only_itself(table: Path, cache: bool) -> None:
    data, seen = data_set(table, cache=cache), []
    assert [skip.study_id for skip in data.skipped] == ["d"]
    assert len(data) == 4
    data.drop_unreadable(lambda: seen.append(1))
    assert len(seen) == 7
    assert len(data) == 3
    assert [(skip.row, skip.study_id, Path(skip.path).name) for skip in data.skipped] == [
        (7, "d", "d_pa.png"),
        (5, "c", "c_bad.png"),
        (8, "e", "e_bad.png"),
    ]
    items = [data[i] for i in range(3)]
    assert [item.row for item in items] == [2, 3, 6]
    assert [[sample.view for sample in item.samples] for item in items] == [["PA", "lateral", None], ["AP"], ["lateral"]]
    said = [("The heart is large.",), ("There is an effusion.", "The heart is normal."), ("No pneumothorax.", "The heart is normal.")]
    assert [item.texts for item in items] == said
    reader = XrayReader(size=16)
    for name, sample in zip(("a_pa.png", "a_lat.png", "a_odd.png"), items[0].samples, strict=True):
        torch.testing.assert_close(sample.pixels, reader.read(table.parent / name).pixels, atol=2e-3, rtol=1e-3)  # float16 in the cache


def test_a_batch_says_whose_image_each_is(table: Path) -> None:
    data = data_set(table)
    data.drop_unreadable()
    batch = Collate(data.reader)([data[i] for i in (1, 0, 2)])
    assert batch.images.pixels.shape == (5, 1, 16, 16)
    assert batch.images.study.tolist() == [0, 1, 1, 1, 2]
    assert batch.images.view.tolist() == [1, 0, 2, 3, 2]
    assert batch.rows == (3, 2, 6)
    assert batch.positives.shape == (3, 4)
    assert batch.positives.sum(1).tolist() == [2, 1, 2]
    shared = batch.texts.texts.index("The heart is normal.")
    assert batch.positives[:, shared].tolist() == [True, False, True]


def test_views_are_augmented_each_its_own_and_stay_whose_they_are(table: Path) -> None:
    data = data_set(table)
    data.drop_unreadable()
    items = [data[i] for i in (0, 1)]
    plain, changed, again = (Collate(data.reader, augment, 3)(items).images for augment in (None, Augment(), Augment()))
    assert torch.equal(changed.pixels, again.pixels)
    assert torch.equal(changed.study, plain.study)
    assert torch.equal(changed.view, plain.view)
    assert all(not torch.equal(one, other) for one, other in zip(plain.pixels, changed.pixels, strict=True))
    offsets = (changed.pixels - plain.pixels)[:3].mean((1, 2, 3))
    assert len(set(offsets.tolist())) == 3
    other = [data[Draw(1, i)] for i in (0, 1)]
    assert not torch.equal(Collate(data.reader, Augment(), 3)(other).images.pixels, changed.pixels)


def test_sentences_are_drawn_for_the_study(table: Path) -> None:
    data = data_set(table, sentences_per_image=1)
    drawn = {data[Draw(epoch, 1)].texts for epoch in range(12)}
    assert drawn == {("There is an effusion.",), ("The heart is normal.",)}


def test_single_images_are_items_as_ever(table: Path) -> None:
    data = data_set(table, views="image")
    assert [skip.row for skip in data.skipped] == [4, 7]
    data.drop_unreadable()
    assert [data[i].row for i in range(len(data))] == [2, 3, 6, 10]
    batch = Collate(data.reader)([data[i] for i in range(4)])
    assert batch.images.study.tolist() == [0, 1, 2, 3]
    assert data[3].texts == ("The heart is large.",)


def test_another_word_for_an_item_is_refused(table: Path) -> None:
    with pytest.raises(ValueError, match="views is 'series', expected 'image' or 'study'"):
        data_set(table, views="series")


def module(table: Path, **options: Any) -> StudyDataModule:
    data = StudyDataModule(str(table), XrayReader(size=16), ReportSentences(), batch_size=2, **options)
    data.setup()
    return data


def test_a_checkpoint_of_images_is_not_one_of_studies(table: Path) -> None:
    images, studies = module(table), module(table, views="study")
    assert images.state_dict()["images"] == 6
    assert studies.state_dict()["images"] == 4
    studies.load_state_dict(studies.state_dict())
    for one, other in ((images, studies), (studies, images)):
        with pytest.raises(ValueError, match="written with another images, views"):
            one.load_state_dict(other.state_dict())
    older = {name: value for name, value in images.state_dict().items() if name != "views"}
    images.load_state_dict(older)
    with pytest.raises(ValueError, match="views"):
        studies.load_state_dict(older)


@given(st.lists(st.lists(st.integers(), max_size=5)), st.integers(1, 8))
def test_groups_are_packed_whole_in_order_and_no_fuller_than_asked(groups: list[list[int]], size: int) -> None:
    parts = list(packed(groups, size))
    assert [group for part in parts for group in part] == groups
    assert all(part and (len(part) == 1 or sum(map(len, part)) <= size) for part in parts)
    for part, later in itertools.pairwise(parts):
        assert sum(map(len, part)) + len(later[0]) > size
