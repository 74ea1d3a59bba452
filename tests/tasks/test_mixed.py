"""Radiographs and CT in one run: batches, links between studies of a patient, features of both kinds, and a fit."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import medvl
from medvl.data.manifest import read_manifest
from medvl.data.sampling import MixedBatches
from medvl.data.studies import Collate, Item, StudyDataset, linked
from medvl.training.cli import run
from medvl.training.data import StudyDataModule
from medvl.training.passes import encode_images
from medvl.types import SourcedText, TextPairs
from modalities.ct import CtReader, MeanPooling, SlicePooledEncoder
from modalities.joint import JointEncoder, JointReader
from modalities.xray import ConvEncoder
from modalities.xray.reader import XrayReader
from reports.pairs import ReportPairs
from reports.text_source import ReportSentences
from tasks.demo import recipe_path
from tasks.phantoms import write_cohort


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("mixed"), 14, 3, size=32, ct=True, workers=1)


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    slices = SlicePooledEncoder(ConvEncoder(16, widths=(8, 8, 8), blocks=(1, 1, 1), in_chans=3, bands=()), MeanPooling())
    return JointEncoder(ConvEncoder(16, widths=(8, 8, 8), blocks=(1, 1, 1)), slices).eval()


READER = JointReader(XrayReader(size=32), CtReader(spacing_mm=(16, 11, 11), shape=(None, 32, 32)))


def test_every_batch_has_so_many_of_each_and_an_epoch_serves_the_longer_group_once():
    groups = [0] * 11 + [1] * 4
    batches = list(MixedBatches(groups, (3, 2), seed=1))
    assert len(batches) == 3  # 11 // 3
    for batch in batches:
        assert [groups[d.index] for d in batch] == [0, 0, 0, 1, 1]
    films = [d.index for batch in batches for d in batch[:3]]
    assert len(set(films)) == 9
    assert Counter(d.index for batch in batches for d in batch[3:]).most_common(1)[0][1] == 2  # 6 of 4: none a third time
    later = MixedBatches(groups, (3, 2), seed=1)
    later.start = 1
    assert list(later) == batches[1:]
    shares = [list(MixedBatches([0] * 12 + [1] * 8, (2, 1), rank=rank, world_size=2)) for rank in (0, 1)]
    for one, other in zip(*shares, strict=True):
        assert [d.index for d in one] == [d.index for d in other]
        assert [d.words_only for d in one] == [False] * 3 + [True] * 3 == [not d.words_only for d in other]
    with pytest.raises(ValueError, match="group 1 has 2 items"):
        MixedBatches([0] * 9 + [1] * 2, (3, 3))


def test_features_of_both_kinds_are_those_of_each_alone(table, tower):
    rows = list(read_manifest(table).rows)[:6]
    data = StudyDataset(rows, READER, ReportSentences())
    kinds = [row.modality for row in rows]
    assert {"xray", "ct"} == set(kinds)
    batch = Collate(READER)([data[i] for i in range(6)])
    order = sorted(range(6), key=lambda i: kinds[i] == "ct")
    assert batch.rows == tuple(rows[i].row for i in order) and batch.images.count == 6
    for size in (None, 1, 2, 4):
        with torch.no_grad():
            found = encode_images(tower, batch.images, size)
        for place, i in enumerate(order):
            with torch.no_grad():
                alone = tower(READER.collate([data.sample(i)]))
            torch.testing.assert_close(found.pooled[place], alone.pooled[0], rtol=1e-4, atol=1e-5)
            valid = torch.ones(alone.tokens.shape[1], dtype=torch.bool) if alone.token_valid is None else alone.token_valid[0]
            torch.testing.assert_close(found.tokens[place][found.token_valid[place]], alone.tokens[0][valid], rtol=1e-4, atol=1e-5)


def test_two_processes_share_a_mixed_batch_whatever_the_order_of_its_kinds(table):
    """The rows of each process's images are those that the pairs say are its."""
    data = StudyDataModule(str(table), READER, ReportSentences(), modality={"ct": 2, "xray": 3}, batch_size=5, cache=False)
    data.setup()
    train = data.sets["train"]
    whole = [Collate(READER)([train[draw] for draw in draws]) for draws in data._batches(0, 1)]
    assert all(batch.images.count == 5 for batch in whole)
    for rank in range(2):
        plan = data._batches(rank, 2)
        for draws in plan:
            batch = Collate(READER)([train[draw] for draw in draws])
            first, stop = batch.share.here
            kinds = [row.modality for row in train.images for wanted in batch.rows[first:stop] if row.row == wanted]
            assert sorted(kinds) == ["ct"] * 2 + ["xray"] * 3
            by_row = {row.row: row.modality for row in train.images}
            assert [by_row[row] for row in batch.rows[first:stop]] == ["xray"] * 3 + ["ct"] * 2
            assert batch.images.pixels.ndim == 4 and batch.images.others.pixels.ndim == 5


@pytest.mark.parametrize("links", ["none", "ignore", "positive"])
def test_links_between_studies_of_a_patient(links):
    kinds, patients = ["xray", "xray", "ct", "ct"], [7, 8, 7, 9]
    items = [Item((), (), i, 0, patient=p, modality=k) for i, (k, p) in enumerate(zip(kinds, patients, strict=True))]
    positives = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0.5]], dtype=np.float32)
    pairs = TextPairs(tuple(SourcedText(t) for t in "abcd"), torch.from_numpy(positives))
    found = linked(pairs, items, links)
    if links == "none":
        assert found is pairs
        return
    expected = np.zeros((4, 4), dtype=bool)
    for i in range(4):
        for k in range(4):
            if patients[i] == patients[k] and kinds[i] != kinds[k]:
                expected[i] |= (positives[k] > 0) & (positives[i] == 0)
    assert expected.sum() == 1 and expected[0, 2]
    if links == "ignore":
        assert np.array_equal(found.ignore.numpy(), expected) and found.positives is pairs.positives
    else:
        assert np.array_equal(found.positives.numpy(), np.where(expected, 1, positives)) and found.ignore is None


def test_a_false_text_that_the_other_study_states_leaves_the_loss_of_this_one():
    """Of this one it was made to be false, by what its own report says; that it is true of the other makes it unknown."""
    items = [Item((), (), 0, 0, patient=1), Item((), (), 1, 0, patient=1, modality="ct")]
    pairs = TextPairs((SourcedText("a"), SourcedText("b")), torch.eye(2, dtype=torch.bool), false_texts=torch.tensor([False, True]))
    assert linked(replace(pairs, positives=torch.tensor([[True, False], [False, True]])), items, "ignore").ignore.tolist() == [
        [False, True],
        [True, False],
    ]


def test_flips_do_not_go_with_links_that_are_positive_nor_with_sided_labels():
    pairs = ReportPairs()
    with pytest.raises(ValueError, match="links: positive"):
        Collate(READER, pairs=pairs, flip=0.5, links="positive")
    with pytest.raises(ValueError, match="sides of the labels left_pleural_effusion"):
        Collate(READER, pairs=pairs, flip=0.5, labels=["edema", "left_pleural_effusion"])
    Collate(READER, pairs=pairs, flip=0.5, labels=["cleft"])


def test_a_fit_trains_both_towers_and_the_model_reads_both(table, tmp_path):
    tiny = {"widths": "[8, 8, 8]", "blocks": "[1, 1, 1]"}
    args = ["--config", str(recipe_path("mixed_xray_ct.yaml")), "--data.init_args.manifest", str(table), "--out", str(tmp_path / "run")]
    for tower in ("xray", "ct.init_args.backbone"):
        args += [part for name, value in tiny.items() for part in (f"--model.image.init_args.{tower}.init_args.{name}", value)]
    args += ["--data.init_args.modality", "{xray: 3, ct: 2}", "--data.init_args.batch_size", "5", "--trainer.max_steps", "3"]
    args += [
        "--data.init_args.reader.init_args.xray.init_args.size",
        "32",
        "--trainer.enable_progress_bar",
        "false",
        "--model.micro_batch",
        "2",
    ]
    assert run("fit", args) == 0
    model = medvl.load(tmp_path / "run", device="cpu")
    start = {name: value.clone() for name, value in model.image.state_dict().items()}
    assert any(name.startswith("xray.") for name in start) and any(name.startswith("ct.") for name in start)
    for row in read_manifest(table).rows[:2]:
        assert torch.isfinite(model.similarity(model.encode_image(row.path), model.encode_text(["No pneumothorax."]))).all()
