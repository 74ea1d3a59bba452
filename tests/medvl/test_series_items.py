"""CT studies as training items: any number of series of any length, one that cannot be read, encoded whole or in parts."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medvl.data.manifest import read_manifest
from medvl.data.studies import Collate, StudyBatch, StudyDataset
from medvl.training.passes import encode_images
from medvl.types import ImageBatch, ImageEncoder
from modalities.ct import CtReader, SeriesPooledEncoder, SlicePooledEncoder
from modalities.ct.volumes import MonaiVitEncoder
from modalities.export import write_nifti
from modalities.joint import JointEncoder, JointReader
from modalities.pooling import GatedAttention, MeanPooling
from modalities.xray import ConvEncoder, ViewPooledEncoder, XrayReader
from reports.text_source import ReportSentences

D, SIDE = 8, 32
SERIES = (("a", 5), ("b", 10), ("a", 9), ("c", 3), ("b", 4), ("a", 6))
"""Study and slices of each row: series of one study stand apart in the table and have other lengths."""
READER = CtReader(spacing_mm=(None, None, None), shape=(None, None, None), crop="none", windows_hu=[(-160.0, 240.0)])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for i, (study, count) in enumerate(SERIES):
        affine = np.array([[0, 0, -4.0, 60], [0, -4.0, 0, 60], [4.0 + i, 0, 0, 0], [0, 0, 0, 1]])
        write_nifti(tmp_path / f"{i}.nii.gz", rng.integers(-150, 230, (count, SIDE, SIDE)).astype(np.int16), affine)
        lines.append([study, study, "ct", f"{i}.nii.gz", "train", f"Effusion in study {study}."])
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["study_id", "patient_id", "modality", "path", "split", "findings"], *lines])
    return tmp_path / "table.csv"


def of_studies(table: Path) -> StudyDataset:
    return StudyDataset(read_manifest(table).rows, READER, ReportSentences(), views="study")


def batch_of(data: StudyDataset) -> StudyBatch:
    return Collate(READER)([data[i] for i in range(len(data))])


def tower(kind: str) -> ImageEncoder:
    torch.manual_seed(0)
    if kind == "slices":
        inner: ImageEncoder = SlicePooledEncoder(ConvEncoder(D, (4, 4, 4), (1, 1, 1), bands=()), GatedAttention(D, 4), chunk=3)
    else:
        inner = MonaiVitEncoder(D, (12, SIDE, SIDE), (4, 8, 8), width=16, depth=1, heads=2, mlp_dim=16)
    return SeriesPooledEncoder(inner, MeanPooling() if kind == "mean" else GatedAttention(D, 4)).eval()


KINDS = pytest.mark.parametrize("kind", ["slices", "volumes", "mean"])


def test_an_item_is_a_study_with_all_its_series(table: Path) -> None:
    batch = batch_of(of_studies(table))
    assert batch.images.study is not None and batch.images.valid is not None
    assert batch.images.study.tolist() == [0, 0, 0, 1, 1, 2] and batch.images.count == 3
    assert batch.images.valid.sum(1).tolist() == [5, 9, 6, 10, 4, 3] and batch.images.pixels.shape[2] == 10
    assert batch.positives.tolist() == np.eye(3, dtype=bool).tolist()


@KINDS
@torch.no_grad()
def test_a_study_is_the_pool_of_its_series_each_encoded_alone(table: Path, kind: str) -> None:
    """Against each file through the plain tower with no neighbour and no padding, and the pooling of these by its formula."""
    data, encoder = of_studies(table), tower(kind)
    found = encoder(batch_of(data).images)
    for row, indices in enumerate(data.items):
        alone = [encoder.backbone(READER.collate([data.sample(i)])) for i in indices]
        vectors = torch.cat([one.pooled for one in alone])
        if kind == "mean":
            shares = torch.full((len(vectors),), 1 / len(vectors))
        else:
            pooling = encoder.pooling
            gated = (vectors @ pooling.content.weight.T).tanh() * (vectors @ pooling.gate.weight.T).sigmoid()
            shares = (gated @ pooling.score.weight[0]).softmax(0)
        torch.testing.assert_close(found.pooled[row], shares @ vectors, atol=1e-5, rtol=1e-5)
        tokens, valid = (x[row].unflatten(0, (3, -1)) for x in (found.tokens, found.token_valid))
        for view, one in enumerate(alone):
            torch.testing.assert_close(tokens[view][valid[view]], one.tokens[0], atol=1e-5, rtol=1e-5)
        assert not valid[len(alone) :].any()


@KINDS
def test_parts_of_a_batch_give_the_features_and_gradients_of_the_whole(table: Path, kind: str) -> None:
    images, encoder = batch_of(of_studies(table)).images, tower(kind)
    results = []
    for size in (None, 1, 2):
        encoder.zero_grad()
        found = encode_images(encoder, images, size)
        loss = (found.pooled * torch.arange(D)).sum() + (found.tokens.square() * found.token_valid[..., None]).sum()
        loss.backward()
        results.append((found, {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}))
    (whole, expected), *others = results
    assert expected
    for found, gradients in others:
        assert (found.grid, found.extent) == (whole.grid, whole.extent)
        torch.testing.assert_close(found.pooled, whole.pooled, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.view_valid, whole.view_valid) and torch.equal(found.token_valid, whole.token_valid)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


@KINDS
@torch.no_grad()
def test_a_series_that_is_gone_in_the_middle_of_training_leaves_the_others(table: Path, kind: str) -> None:
    """As in a batch of a table that never had it; it is listed, and no pair of the study is lost."""
    data, encoder = of_studies(table), tower(kind)
    data.drop_unreadable()
    (table.parent / "2.nii.gz").unlink()
    (table.parent / "4.nii.gz").write_bytes(b"\x1f\x8b nothing of use")
    batch = batch_of(data)
    assert [(one.row, one.study_id) for one in batch.unread] == [(data.images[2].row, "a"), (data.images[4].row, "b")]
    assert batch.missing is not None and not batch.missing.any() and batch.positives.tolist() == np.eye(3, dtype=bool).tolist()
    kept = [image for image in read_manifest(table, check_files=False).rows if image.path.name not in ("2.nii.gz", "4.nii.gz")]
    other = batch_of(StudyDataset(kept, READER, ReportSentences(), views="study"))
    torch.testing.assert_close(encoder(batch.images).pooled, encoder(other.images).pooled, atol=1e-6, rtol=1e-6)


def test_films_and_series_of_a_study_are_pooled_each_with_its_own(table: Path) -> None:
    """One batch with items of both kinds, ``views: study`` for both."""
    rng = np.random.default_rng(1)
    rows = list(read_manifest(table).rows)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)).save(table.parent / f"{i}.png")
        film = replace(rows[0], modality="xray", path=table.parent / f"{i}.png", view="PA", study_id="a" if i < 2 else "c", row=100 + i)
        rows.append(film)
    reader = JointReader(XrayReader(size=SIDE), READER)
    data = StudyDataset(rows, reader, ReportSentences(), views={"xray": "study", "ct": "study"})
    batch = Collate(reader)([data[i] for i in range(len(data))])
    assert batch.images.study.tolist() == [0, 0, 1] and batch.images.others.study.tolist() == [0, 0, 0, 1, 1, 2]
    series = tower("slices")
    joint = JointEncoder(ViewPooledEncoder(ConvEncoder(D, (4, 4, 4), (1, 1, 1)), MeanPooling()), series).eval()
    with torch.no_grad():
        found = encode_images(joint, batch.images, None)
        volumes: ImageBatch = batch.images.others
        torch.testing.assert_close(found.pooled[2:], series(volumes).pooled)
    assert len(found.pooled) == batch.images.count == 5
