"""Items of whole studies: which images and texts they hold, what a bad file costs, and that single images are served as ever."""

from __future__ import annotations

import csv
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import replace
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
from medvl.data.studies import Collate, Draw, Share, Skipped, StudyDataset, drawn, mirrored
from medvl.losses import MultiPositiveInfoNCE, pairs_of
from medvl.model import packed
from medvl.nn.similarity import PooledSimilarity
from medvl.training.data import StudyDataModule
from medvl.types import (
    ImageBatch,
    ImageFeatures,
    KnownStudy,
    PairBuilder,
    PairStudy,
    SourcedText,
    StudyWords,
    TextFeatures,
    TextPairs,
    TextSource,
    UnreadableImageError,
    equal_text_pairs,
)
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
    found = {data[Draw(epoch, 1)].texts for epoch in range(12)}
    assert found == {("There is an effusion.",), ("The heart is normal.",)}


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


class TwoSources(TextSource):
    """The report's sentences and a caption per word of it, as if from elsewhere."""

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        return ReportSentences().texts(report, findings, impression)

    def sourced(self, study: StudyWords) -> tuple[SourcedText, ...]:
        said = self.texts(study.report, study.findings, study.impression)
        words = dict.fromkeys(word for text in said for word in text.rstrip(".").lower().split())
        return (*(SourcedText(text, "report", 3.0) for text in said), *(SourcedText(word, "words", 1.0) for word in words))


class Swapper(PairBuilder):
    """Equal texts; "right" and "left" exchanged in those of flipped images; refuses what speaks of a nodule."""

    def mirrored(self, text: str) -> str | None:
        return None if "nodule" in text else text.replace("large", "left")

    def keeps(self, text: str) -> bool:
        return text != "The heart is normal."

    def pairs(self, studies: Sequence[PairStudy], rng: np.random.Generator | None = None) -> TextPairs:
        swapped = [
            replace(s, texts=tuple(replace(one, text=str(self.mirrored(one.text))) for one in s.texts)) if s.mirrored else s
            for s in studies
        ]
        made = equal_text_pairs(swapped)
        extra = () if rng is None else (SourcedText(f"false {rng.integers(1 << 30)}", "made"),)
        false = torch.zeros(len(made.texts) + len(extra), dtype=torch.bool)
        false[len(made.texts) :] = True
        positives = torch.cat([made.positives, torch.zeros(len(studies), len(extra), dtype=torch.bool)], dim=1)
        return TextPairs((*made.texts, *extra), positives, None, false)


def test_texts_keep_their_source_and_sources_are_drawn_by_weight(table: Path) -> None:
    rows = read_manifest(table).select(split="train", modality="xray")
    data = StudyDataset(rows, XrayReader(size=16), TwoSources(), sentences_per_image=1, seed=3)
    found = [data[Draw(epoch, 1)].sourced[0] for epoch in range(400)]  # row b: two sentences, seven words
    share = np.mean([one.source == "report" for one in found])
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    assert {one.text for one in found if one.source == "report"} == {"There is an effusion.", "The heart is normal."}
    assert found == [data[Draw(epoch, 1)].sourced[0] for epoch in range(400)]
    batch = Collate(data.reader)([data[0], data[1]])
    assert len(batch.sources) == len(batch.texts.texts) == 2
    three = replace_all(data, 3)[Draw(5, 1)].sourced
    assert len({one.text for one in three}) == 3


def replace_all(data: StudyDataset, count: int) -> StudyDataset:
    return StudyDataset(data.images, data.reader, TwoSources(), sentences_per_image=count, seed=3)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 5)), min_size=1, max_size=12), st.data())
def test_a_draw_has_no_text_twice_and_keeps_the_order(given_texts: list[tuple[str, float]], data: st.DataObject) -> None:
    texts = [SourcedText(f"text {i}", source, weight) for i, (source, weight) in enumerate(given_texts)]
    count = data.draw(st.integers(1, len(texts)))
    got = drawn(texts, count, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert len(set(got)) == count
    assert [texts.index(one) for one in got] == sorted(texts.index(one) for one in got)


def test_a_builder_leaves_texts_out_and_makes_false_ones_for_training_alone(table: Path) -> None:
    data = data_set(table, pairs=Swapper())
    data.drop_unreadable()
    assert all("The heart is normal." not in texts for texts in data.texts)
    items = [data[i] for i in (0, 1)]
    plain, train, again = (Collate(data.reader, seed=1, pairs=Swapper(), training=t)(items) for t in (False, True, True))
    assert not plain.false_texts.any()
    assert train.texts == again.texts and train.false_texts.tolist() == [False, False, True]
    assert train.sources == ("report", "report", "made")
    moved = train.to("cpu")
    assert torch.equal(moved.false_texts, train.false_texts) and moved.ignore is None


def test_a_flip_takes_the_text_along_or_is_refused(table: Path) -> None:
    rows = read_manifest(table).select(split="train", modality="xray")
    data = StudyDataset(rows, XrayReader(size=16), ReportSentences())
    data.drop_unreadable()
    by_view = {data[i].samples[0].view: data[i] for i in range(len(data))}
    items = [by_view["PA"], by_view["AP"], by_view["lateral"]]
    plain = Collate(data.reader)(items)
    flipped = Collate(data.reader, pairs=Swapper(), flip=1.0)(items)
    assert torch.equal(flipped.images.pixels[0], plain.images.pixels[0].flip(-1))
    assert torch.equal(flipped.images.pixels[1], plain.images.pixels[1].flip(-1))
    assert torch.equal(flipped.images.pixels[2], plain.images.pixels[2])  # a lateral film has no left and right
    assert torch.equal(flipped.images.valid[0], plain.images.valid[0].flip(-1))
    assert "The heart is left." in flipped.texts.texts and "The heart is large." not in flipped.texts.texts
    refused = Collate(data.reader, pairs=Swapper(), flip=1.0)([replace(items[0], sourced=(SourcedText("A nodule."),))])
    assert torch.equal(refused.images.pixels[0], plain.images.pixels[0])
    half = [Collate(data.reader, seed=s, pairs=Swapper(), flip=0.5)(items[:1]).images.pixels for s in range(40)]
    share = np.mean([not torch.equal(pixels[0], plain.images.pixels[0]) for pixels in half])
    assert 0.2 < share < 0.8


def test_flips_need_someone_who_writes_the_texts(table: Path) -> None:
    with pytest.raises(ValueError, match="nobody swaps left and right"):
        module(table, flip=0.5)
    with pytest.raises(ValueError, match="expected a chance from 0 to 1"):
        module(table, flip=1.5, pairs=Swapper())


def test_a_checkpoint_of_other_pairs_is_refused(table: Path) -> None:
    plain, paired = module(table), module(table, pairs=Swapper())
    paired.load_state_dict(paired.state_dict())
    with pytest.raises(ValueError, match="pairs"):
        plain.load_state_dict(paired.state_dict())
    older = {name: value for name, value in plain.state_dict().items() if name not in ("pairs", "flip")}
    plain.load_state_dict(older)


def test_reports_that_could_not_be_read_are_listed_and_stay(table: Path, tmp_path: Path) -> None:
    class Forgetful(Swapper):
        def prepare(self, studies: Sequence[KnownStudy]) -> None:
            self.unread = {studies[0].words[0].study_id: "no answer"}

    plain, data = module(table), module(table, pairs=Forgetful())
    assert data.write_skipped(tmp_path) > plain.write_skipped(tmp_path / "plain")
    unread = data.sets["train"].studies()[0].words[0].study_id
    with (tmp_path / "rejected.csv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file) if row["reason"] == "no answer"]
    assert listed and {row["study_id"] for row in listed} == {unread}
    assert len(data.sets["train"]) == len(plain.sets["train"])


def test_the_slices_of_a_volume_are_flipped_within() -> None:
    pixels = torch.arange(2 * 1 * 2 * 3 * 4, dtype=torch.float32).view(2, 1, 2, 3, 4)
    images = ImageBatch(pixels, torch.ones(2, 2, dtype=torch.bool))
    changed = mirrored(images, torch.tensor([False, True]))
    assert torch.equal(changed.pixels[0], pixels[0]) and torch.equal(changed.pixels[1], pixels[1].flip(-1))
    assert changed.valid is images.valid


def test_an_image_lost_during_a_run_is_listed_and_its_item_leaves_the_loss(table: Path, tmp_path: Path) -> None:
    """Against the loss of a batch that never had the item; a study that lost one view goes on with the others."""
    shutil.copytree(table.parent, tmp_path, dirs_exist_ok=True)
    data, studies = data_set(tmp_path / "manifest.csv", views="image"), data_set(tmp_path / "manifest.csv")
    data.drop_unreadable()
    studies.drop_unreadable()
    known = [data[Draw(3, i)] for i in range(len(data))]
    lost = next(i for i, item in enumerate(known) if "There is an effusion." in item.texts)
    data.images[lost].path.unlink()
    items = [data[Draw(3, i)] for i in range(len(data))]
    assert [item.missing for item in items] == [i == lost for i in range(len(items))]
    assert [item.frontal for item in items] == [item.frontal for item in known]
    assert [(one.row, Path(one.path).name) for one in items[lost].unread] == [(3, "b_ap.png")]
    assert "no such file" in items[lost].unread[0].reason
    batch = Collate(data.reader)(items)
    assert batch.unread == items[lost].unread
    rest = Collate(data.reader)(items[:lost] + items[lost + 1 :])
    left = batch.without(batch.missing)
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(len(items), 6, generator=rng, dtype=torch.float64)
    vectors = {text: torch.randn(6, generator=rng, dtype=torch.float64) for text in batch.texts.texts}
    losses = [
        MultiPositiveInfoNCE()(
            PooledSimilarity().double().parts(ImageFeatures(of), TextFeatures(torch.stack([vectors[text] for text in one.texts.texts]))),
            pairs_of(one.positives, tuple(one.positives.shape), one.ignore),
        )["loss"]
        for one, of in ((left, images), (rest, torch.cat([images[:lost], images[lost + 1 :]])))
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    assert "There is an effusion." not in rest.texts.texts

    (tmp_path / "a_lat.png").unlink()
    item = studies[Draw(0, 0)]
    assert (len(item.samples), item.missing, item.unread[0].row) == (2, False, 4)


def test_storage_that_is_gone_is_no_lost_image(table: Path, tmp_path: Path) -> None:
    shutil.copytree(table.parent, tmp_path, dirs_exist_ok=True)
    data = data_set(tmp_path / "manifest.csv")
    data.drop_unreadable()
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(UnreadableImageError, match=r"row 2: .*nor can any of the 2 items after it be read.*storage"):
        data[0]


def test_a_text_that_lost_its_own_study_is_dropped_though_it_is_a_share_of_another(table: Path) -> None:
    """A direction that takes no soft positives would otherwise have a text without any."""
    data = data_set(table)
    data.drop_unreadable()
    batch = replace(
        Collate(data.reader)([data[i] for i in range(3)]), positives=torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0, 0, 1.0]])
    )
    left = batch.without(torch.tensor([True, False, False]))
    assert left.positives.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert left.ignore is not None and left.ignore.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    pairs_of(left.positives, (3, 3), left.ignore)


def test_what_another_process_could_not_read_is_left_out_here_too(table: Path) -> None:
    data = data_set(table, views="image", cache=True)
    data.drop_unreadable()
    before, gone = len(data), data.images[1]
    pixels = [data.sample(i).pixels for i in range(before) if i != 1]
    data.leave_out([Skipped(gone.row, gone.study_id, str(gone.path), "elsewhere"), data.skipped[0]])
    assert len(data) == before - 1 and gone.row not in [image.row for image in data.images]
    assert sum(one.reason == "elsewhere" for one in data.skipped) == 1
    assert all(torch.equal(one, data.sample(i).pixels) for i, one in enumerate(pixels))
    assert [data[i].row for i in range(len(data))] == [image.row for image in data.images]


def test_labels_of_a_lost_item_are_not_known(table: Path) -> None:
    data = data_set(table)
    data.drop_unreadable()
    batch = replace(Collate(data.reader)([data[i] for i in range(3)]), labels=torch.ones(3, 2))
    labels = batch.without(torch.tensor([False, True, False])).labels
    assert labels.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    shared = replace(batch, labels=torch.ones(1, 2), share=Share(1, (2, 1), (2, 2)))
    assert not shared.without(torch.tensor([False, True, False])).labels.isnan().any()
    assert shared.without(torch.tensor([False, False, True])).labels.isnan().all()
