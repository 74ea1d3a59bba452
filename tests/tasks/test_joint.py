"""One model for radiographs and CT: each file goes to its own reader and tower, and scores are those of the two models that it is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import medvl
from medvl.model import DualEncoder
from medvl.types import UnreadableImageError
from modalities.ct import CtReader, MeanPooling, SlicePooledEncoder
from modalities.dicom import modality_of
from modalities.joint import JointEncoder, JointReader
from modalities.xray import ConvEncoder
from tasks.cli import cli
from tasks.joint import join_models
from tasks.phantoms import write_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films, NIfTI volumes and DICOM series of three phantoms."""
    table = write_cohort(tmp_path_factory.mktemp("both"), 3, 5, size=32, ct=True, ct_series=True, workers=1)
    return table.parent


@pytest.fixture(scope="module")
def pair(tiny: Any) -> tuple[DualEncoder, DualEncoder]:
    """A radiograph model and a CT model over one report tower."""
    torch.manual_seed(3)
    xray = medvl.load(tiny.model, device="cpu")
    tower = SlicePooledEncoder(ConvEncoder(16, widths=(8, 8, 8), blocks=(1, 1, 1), in_chans=3, bands=()), MeanPooling())
    reader = CtReader(spacing_mm=(16, 11, 11), shape=(None, 32, 32))
    return xray, DualEncoder(tower, xray.report, xray.similarity, reader).eval()


@pytest.fixture(scope="module")
def joint(pair: tuple[DualEncoder, DualEncoder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return join_models(*pair).save(tmp_path_factory.mktemp("joint"))


def test_each_file_gets_the_features_of_its_own_model(pair: Any, joint: Path, cohort: Path) -> None:
    model = medvl.load(joint, device="cpu")
    assert isinstance(model.reader, JointReader) and isinstance(model.image, JointEncoder)
    film, volume, series = (sorted((cohort / kind).iterdir())[0] for kind in ("xray", "ct", "ct_series"))
    for path, alone in ((film, pair[0]), (volume, pair[1]), (series, pair[1])):
        found, expected = model.encode_image(path), alone.encode_image(path)
        torch.testing.assert_close(found.pooled, expected.pooled)
        torch.testing.assert_close(found.tokens, expected.tokens)
        torch.testing.assert_close(model.reader.native(path), alone.reader.native(path))
    array = model.read(np.full((20, 30, 30), -50.0)).pixels
    assert array.ndim == 4 and model.read(np.zeros((30, 30))).pixels.ndim == 3


def test_a_folder_of_everything_is_told_apart(joint: Path, cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort / "xray", tmp_path / "xray")
    shutil.copytree(cohort / "ct_series", tmp_path / "series")
    shutil.copy(sorted((cohort / "ct").iterdir())[0], tmp_path / "volume.nii.gz")
    films, series = sorted((tmp_path / "xray").iterdir()), sorted((tmp_path / "series").iterdir())
    reader = medvl.load(joint, device="cpu").reader
    assert reader.find_images(tmp_path) == sorted([*films, *series, tmp_path / "volume.nii.gz"])
    assert {modality_of(path) for path in films} == {"DX"} and {modality_of(next(path.iterdir())) for path in series} == {"CT"}
    shutil.copy(films[0], series[0] / "scout.dcm")  # a film in the folder of a series is still a film
    assert reader.find_images(series[0].parent) == sorted([series[0] / "scout.dcm", *series])


def test_mixed_files_are_diagnosed_as_by_the_two_models(pair: Any, joint: Path, cohort: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(b"\0" * 128 + b"DICM" + b"nothing of use")
    paths = [sorted((cohort / kind).iterdir())[i] for i in range(2) for kind in ("xray", "ct")]
    done = CliRunner().invoke(cli, ["diagnose", *map(str, [paths[0], broken, *paths[1:]]), "--model", str(joint), "--json"])
    assert done.exit_code == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["ok"] for one in found] == [True, False, True, True, True]
    for name, model in (("xray", pair[0]), ("ct", pair[1])):
        alone = model.save(tmp_path / name)
        own = [path for path in paths if path.parent.name == name]
        done = CliRunner().invoke(cli, ["diagnose", *map(str, own), "--model", str(alone), "--json"])
        for line in done.stdout.splitlines():
            expected = json.loads(line)
            (mine,) = (one for one in found if one["path"] == expected["path"])
            assert mine["findings"] == pytest.approx(expected["findings"], abs=1e-6)


def test_what_does_not_belong_together_is_refused(pair: Any, joint: Path, cohort: Path, tmp_path: Path) -> None:
    xray, ct = pair
    torch.manual_seed(9)
    other = DualEncoder(ct.image, type(xray.report)(16, hidden_dim=None), ct.similarity, ct.reader)
    with pytest.raises(ValueError, match="differ in their report, so their images lie in two spaces"):
        join_models(xray, other)
    with pytest.raises(ValueError, match="embeds in 16 dimensions, the CT tower in 8"):
        JointEncoder(xray.image, ConvEncoder(8, widths=(8, 8, 8), blocks=(1, 1, 1)))
    model = medvl.load(joint, device="cpu")
    film, volume = (sorted((cohort / kind).iterdir())[0] for kind in ("xray", "ct"))
    with pytest.raises(ValueError, match="radiographs and CT cannot share a batch"):
        model.reader.collate([model.read(film), model.read(volume)])
    with pytest.raises(ValueError, match="volumes are encoded one by one"):
        model.image(model.reader.collate([model.read(volume)] * 2).grouped([2]))
    with pytest.raises(UnreadableImageError, match=r"nowhere\.dcm"):
        model.read(tmp_path / "nowhere.dcm")


def test_the_card_says_what_either_reader_does(joint: Path) -> None:
    from tasks.card import model_card

    card = model_card(joint)
    reader = medvl.load(joint, device="cpu").reader
    assert isinstance(reader, JointReader)
    for kind, steps in (("radiographs", reader.xray.describe()), ("CT", reader.ct.describe())):
        for step, words in steps.items():
            assert f"| {kind}: {step} | {words} |" in card.replace("\\", "")
    assert "chest-x-ray" in card and "computed-tomography" in card


def test_what_a_cache_keeps_of_each_kind_hangs_on_its_own_files(joint: Path, cohort: Path, tmp_path: Path) -> None:
    from medvl.data.cache import CachedReader, SampleCache

    reader = medvl.load(joint, device="cpu").reader
    cached = CachedReader(reader, SampleCache(tmp_path / "cache"))
    paths = [sorted((cohort / kind).iterdir())[0] for kind in ("xray", "ct", "ct_series")]
    for path in (*paths, *paths):
        torch.testing.assert_close(cached.read(path).pixels, reader.read(path).pixels, rtol=0, atol=0)
    assert SampleCache(tmp_path / "cache").usage().entries == 3
    assert reader.sources(paths[2]) == tuple(sorted(paths[2].iterdir()))
    assert reader.sources(tmp_path / "nowhere.dcm") == (tmp_path / "nowhere.dcm",)
