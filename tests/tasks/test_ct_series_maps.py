"""Series of one CT study, thin, thick and the other way up: the map of each lies in its own millimetres, alone and beside the others."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from numpy.typing import NDArray
from torch import nn

import medvl
from medvl.data.manifest import StudyImage
from medvl.model import DualEncoder, join
from medvl.nn.similarity import PooledSimilarity
from medvl.training.cli import run
from medvl.types import ImageBatch, ImageEncoder
from modalities.ct import CtReader, SeriesPooledEncoder, SlicePooledEncoder
from modalities.ct.volumes import VolumeEncoder
from modalities.export import write_ct_series, write_nifti
from modalities.pooling import GatedAttention, MeanPooling
from modalities.xray import ConvEncoder
from reports import MiniLmReportEncoder
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.cli import cli
from tasks.demo import recipe_path
from tasks.evaluation import finding_maps, predict
from tasks.grounding import batch_extent, ground, native_maps, token_maps
from tasks.phantoms import write_cohort
from tasks.zero_shot import diagnose, encode_prompts, score

PHRASE, NAMES = "There is a pleural effusion.", ["pleural_effusion", "atelectasis"]
D, SIDE, DEPTH = 8, 32, 4
STACKS = ((10, 16.0, False), (21, 7.5, True), (30, 5.0, False))
"""Slices, their spacing in mm, whether the file runs to the feet: of the first two the number is no multiple of a token's depth."""


class Cells(VolumeEncoder):
    """Means of cells through a fixed function: a token's vector says how bright its cell is."""

    stride = (DEPTH, 8, 8)
    in_chans = 3

    def __init__(self) -> None:
        super().__init__(D, D)
        torch.nn.init.eye_(self.project.weight)
        self.mix = nn.Conv3d(3, D, self.stride, self.stride)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        longer = -pixels.shape[2] % DEPTH
        return self.mix(torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, longer, -1, -1)], 2)).tanh()


def slices() -> SlicePooledEncoder:
    return SlicePooledEncoder(ConvEncoder(D, widths=(4, 4, 4), blocks=(1, 1, 1), in_chans=3, bands=()), GatedAttention(D, 4))


def made(tower: Callable[[], ImageEncoder]) -> DualEncoder:
    """A model that pools the series of a study, on the files' own voxels."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    reader = CtReader(spacing_mm=(None, None, None), shape=(None, None, None), crop="none")
    return DualEncoder(
        SeriesPooledEncoder(tower(), MeanPooling()), MiniLmReportEncoder(D, hidden_dim=None), PooledSimilarity(), reader
    ).eval()


@pytest.fixture(params=[Cells, slices], ids=["volumes", "slices"])
def model(request: Any) -> DualEncoder:
    return made(request.param)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three reconstructions whose HU depend on the height in mm alone."""
    folder, found = tmp_path_factory.mktemp("study"), []
    for i, (count, spacing, down) in enumerate(STACKS):
        height = np.arange(count) * spacing
        hu = np.round(60 + 90 * np.sin(height / 25)).astype(np.int16)
        volume = np.repeat(hu, SIDE * SIDE).reshape(count, SIDE, SIDE)
        affine = np.array([[0, 0, -4.0, 60], [0, -4.0, 0, 60], [spacing, 0, 0, 0], [0, 0, 0, 1]])
        if down:
            volume, affine = volume[::-1], affine @ np.array([[-1, 0, 0, count - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        found.append(folder / f"{i}.nii.gz")
        write_nifti(found[-1], np.ascontiguousarray(volume), affine)
    return found


def upwards(scores: NDArray[np.float32], down: bool) -> NDArray[np.float32]:
    """(S,) from the feet, of a map (S, H, W) that depends on the height alone."""
    np.testing.assert_allclose(scores, np.broadcast_to(scores[:, :1, :1], scores.shape), atol=1e-5)
    return scores[::-1, 0, 0] if down else scores[:, 0, 0]


@torch.no_grad()
def test_a_map_lies_at_the_heights_that_its_tokens_saw(study: list[Path]) -> None:
    """Against tokens of cells of a volume cut by hand, and numpy's interpolation between the heights of their middles."""
    model = made(Cells)
    tower = model.image.backbone
    text = torch.nn.functional.normalize(model.encode_text([PHRASE]).pooled, dim=-1)[0]
    for path, (count, spacing, down) in zip(study, STACKS, strict=True):
        pixels = model.read(path).pixels
        cells = [pixels[:, z : z + DEPTH] for z in range(0, count, DEPTH)]
        cells[-1] = torch.cat([cells[-1], *[cells[-1][:, -1:]] * (DEPTH - cells[-1].shape[1])], 1)
        cosines = [torch.nn.functional.cosine_similarity(tower.features(one[None])[0, :, 0, 0, 0], text, 0).item() for one in cells]
        middles = [spacing * (DEPTH * k + (DEPTH - 1) / 2) for k in range(len(cells))]
        assert np.ptp(cosines) > 0.05
        expected = np.interp(spacing * np.arange(count), middles, cosines)
        (found,) = ground(model, path, [PHRASE])
        np.testing.assert_allclose(upwards(found.scores, down), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_series_has_the_map_that_it_has_alone(model: DualEncoder, study: list[Path], order: tuple[int, ...]) -> None:
    samples = [model.read(study[i]) for i in order]
    alone = {i: ground(model, study[i], [PHRASE])[0].scores for i in order}
    together = model.encode_studies([samples])
    joined = join([model.encode_studies([samples[:1]]), model.encode_studies([samples[1:]])])
    assert joined.grid == (2, *together.grid[1:]) and joined.extent == together.extent
    for features, places in ((together, [(0, 0), (0, 1), (0, 2)]), (joined, [(0, 0), (1, 0), (1, 1)])):
        maps = token_maps(model, features, [PHRASE])
        extent = batch_extent(samples, features)
        for i, sample, (row, view) in zip(order, samples, places, strict=True):
            found = native_maps(maps[row, :, view], sample.transform, extent)[0]
            assert not np.isnan(alone[i]).any()
            np.testing.assert_allclose(found, alone[i], atol=1e-5)


def test_evaluation_points_in_each_series_as_grounding_does(model: DualEncoder, study: list[Path]) -> None:
    rows = [
        StudyImage("a" if i < 2 else "b", "p", "ct", path, None, "test", PHRASE, None, None, {}, (), {}, i) for i, path in enumerate(study)
    ]
    found = predict(model, rows, load_prompts(), ReportSentences(), findings=NAMES)
    assert found.unit == "study" and not found.rejected
    bank = encode_prompts(model, load_prompts(), NAMES)
    for row, peaks in zip(rows, found.peaks, strict=True):
        sample = model.read(row.path)
        features = model.encode_samples([sample])
        for scores, at in zip(native_maps(finding_maps(model, features, bank)[0], sample.transform, features.extent), peaks, strict=True):
            assert scores[at] == pytest.approx(np.nanmax(scores), abs=1e-5)


@torch.no_grad()
def test_a_study_of_one_series_is_scored_as_by_the_tower_alone(model: DualEncoder, study: list[Path]) -> None:
    plain = DualEncoder(model.image.backbone, model.report, model.similarity, model.reader)
    for path in study:
        (one,), (other,) = (list(diagnose(m, [path], encode_prompts(m, load_prompts(), NAMES))) for m in (model, plain))
        assert one.findings == pytest.approx(other.findings, abs=1e-6)
        np.testing.assert_allclose(ground(model, path, [PHRASE])[0].scores, ground(plain, path, [PHRASE])[0].scores, atol=1e-6)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three series of one DICOM study, of which one has a cut file, and one series of another."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(0)
    for name, study, count in (("a1", "a", 6), ("a2", "a", 9), ("a3", "a", 7), ("b1", "b", 5)):
        volume = rng.integers(-200, 200, (count, SIDE, SIDE)).astype(np.int16)
        volume[:, :2] = -1000
        affine = np.array([[0, 0, -4.0, 60], [0, -4.0, 0, 60], [8.0, 0, 0, 0], [0, 0, 0, 1]])
        write_ct_series(folder / name, volume, affine, patient_id="p", study_id=study)
    broken = folder / "a3" / "0004.dcm"
    broken.write_bytes(broken.read_bytes()[:-800])
    return folder


def test_a_series_that_cannot_be_read_leaves_the_study_to_the_others(model: DualEncoder, archive: Path) -> None:
    found = [archive / name for name in ("a3", "a1", "a2", "b1")]
    bank = encode_prompts(model, load_prompts(), NAMES)
    of_a, of_b = diagnose(model, found, bank)
    assert of_a.ok and of_b.ok and len(of_a.paths) == 3 and list(of_a.unreadable) == [str(archive / "a3")]
    expected = score(model, model.encode_studies([[archive / "a2", archive / "a1"]]), bank)[0].tolist()  # whatever their order
    assert list(of_a.findings.values()) == pytest.approx(expected, abs=1e-5)
    (lost,) = diagnose(model, [archive / "a3"], bank)
    assert not lost.ok


def test_the_command_takes_a_folder_or_a_table_of_series(archive: Path, tmp_path: Path) -> None:
    run_folder = made(slices).save(tmp_path / "model")
    with (tmp_path / "table.csv").open("w", newline="") as file:
        rows = [[name[0], "p", "ct", str(archive / name), "test"] for name in ("a1", "a2", "a3", "b1")]
        csv.writer(file).writerows([["study_id", "patient_id", "modality", "path", "split"], *rows])
    said = []
    for given in (archive, tmp_path / "table.csv"):
        rejected = tmp_path / f"{given.stem}_rejected.csv"
        done = CliRunner().invoke(cli, ["diagnose", str(given), "--model", str(run_folder), "--json", "--rejected", str(rejected)])
        assert done.exit_code == 1, done.output
        with rejected.open() as file:
            (line,) = csv.DictReader(file)
        assert line["path"] == str(archive / "a3")
        said.append([json.loads(one) for one in done.stdout.splitlines() if one.startswith("{")])
    for studies in said:
        assert [[Path(path).name for path in one["paths"]] for one in studies] == [["a1", "a2", "a3"], ["b1"]]
        assert all(one["ok"] for one in studies)
    assert said[0][0]["findings"] == said[1][0]["findings"]


def test_the_recipe_takes_volumes_and_the_mean(tmp_path: Path) -> None:
    """The tower of ct_clip.yaml in ct_series.yaml, as its head says, in parts of a batch and with a broken series."""
    table = write_cohort(tmp_path, 10, 11, size=32, xray=False, ct=True, counts={"train": 6, "val": 2, "test": 2}, workers=1)
    with table.open() as file:
        header, *lines = list(csv.reader(file))
    at = header.index("path")
    more = []
    for i, line in enumerate(lines[:7]):
        image = nib.load(tmp_path / line[at])
        thick = nib.Nifti1Image(np.asarray(image.dataobj)[:, :, ::2], image.affine @ np.diag([1, 1, 2, 1]))
        second = [*line[:at], f"ct/thick{i}.nii.gz", *line[at + 1 :]]
        nib.save(thick, tmp_path / second[at])
        more.append([("" if name == "masks" else value) for name, value in zip(header, second, strict=True)])
    (tmp_path / "ct" / "thick0.nii.gz").write_bytes(b"\x1f\x8b nothing of use")
    with (tmp_path / "series.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines, *more])
    recipe, volumes = (yaml.safe_load(recipe_path(f"{name}.yaml").read_text()) for name in ("ct_series", "ct_clip"))
    tower = recipe["model"]["image"]["init_args"]
    tower["backbone"], tower["pooling"] = volumes["model"]["image"], {"class_path": "modalities.pooling.MeanPooling"}
    recipe["model"]["micro_batch"] = 2
    recipe["data"]["init_args"] |= {"manifest": str(tmp_path / "series.csv"), "batch_size": 3}
    recipe["trainer"] |= {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    assert run("fit", ["--config", str(tmp_path / "recipe.yaml"), "--out", str(out)]) == 1  # the broken series
    with (out / "rejected.csv").open() as file:
        assert [Path(line["path"]).name for line in csv.DictReader(file)] == ["thick0.nii.gz"]
    model = medvl.load(out, device="cpu")
    pair = [tmp_path / lines[1][at], tmp_path / more[1][at]]
    features = model.encode_studies([pair, pair[::-1]])
    torch.testing.assert_close(features.pooled[0], features.pooled[1], atol=1e-5, rtol=1e-5)
    assert features.grid is not None and features.grid[0] == 2 and features.view_weights.tolist() == [[0.5, 0.5]] * 2


def test_batches_of_volumes_say_how_far_their_cells_reach() -> None:
    torch.manual_seed(0)
    tower = SeriesPooledEncoder(Cells(), MeanPooling()).eval()
    pixels = torch.randn(3, 3, 10, SIDE, 24)
    found = tower(ImageBatch(pixels, torch.ones(3, 10, dtype=torch.bool), study=torch.tensor([0, 0, 1])))
    assert found.grid == (2, 3, 4, 3) and found.extent == (12, 32, 24)
    short = tower(ImageBatch(pixels[:1, :, :5], torch.ones(1, 5, dtype=torch.bool), study=torch.tensor([0])))
    assert short.extent == (8, 32, 24) and join([short, found]).extent == join([found, short]).extent == (12, 32, 24)
