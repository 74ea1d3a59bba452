"""CT studies of several series from a table and from DICOM: trained, evaluated and diagnosed as studies; a bad one costs itself."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import medvl
from medvl.data.manifest import read_manifest
from medvl.training.cli import run
from modalities.export import write_ct_series
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.cli import cli
from tasks.demo import recipe_path
from tasks.evaluation import predict
from tasks.phantoms import write_cohort
from tasks.zero_shot import diagnose, encode_prompts


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Phantoms whose first studies have a second series: the volume once more, under another name; one of these is broken."""
    folder = tmp_path_factory.mktemp("series")
    single = write_cohort(folder, 10, 11, size=32, xray=False, ct=True, counts={"train": 5, "val": 2, "test": 3}, workers=1)
    with single.open() as file:
        header, *lines = list(csv.reader(file))
    at = {name: header.index(name) for name in ("path", "masks") if name in header}
    more = []
    for i, line in enumerate(lines[:8]):
        second = list(line)
        second[at["path"]] = f"ct/second{i}.nii.gz"
        shutil.copy(folder / line[at["path"]], folder / second[at["path"]])
        if "masks" in at:
            second[at["masks"]] = ""
        more.append(second)
    (folder / "ct" / "second0.nii.gz").write_bytes(b"\x1f\x8b nothing of use")
    with (folder / "series.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines, *more])
    return folder / "series.csv"


@pytest.fixture(scope="module")
def run_folder(table, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    recipe = yaml.safe_load(recipe_path("ct_series.yaml").read_text())
    recipe["data"]["init_args"]["reader"]["init_args"] |= {"spacing_mm": [16, 11, 11], "shape": [None, 32, 32]}
    recipe["data"]["init_args"] |= {"manifest": str(table), "batch_size": 3}
    recipe["trainer"] |= {"max_epochs": 1, "enable_progress_bar": False}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("fit", ["--config", str(out / "recipe.yaml"), "--out", str(out)]) == 1  # the broken series
    return out


def test_a_broken_series_costs_only_itself(run_folder):
    with (run_folder / "rejected.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert "second0.nii.gz" in line["path"]


def test_studies_are_evaluated_from_all_their_series(table, run_folder):
    model = medvl.load(run_folder, device="cpu")
    rows = read_manifest(table).select(split="test", modality="ct").rows
    found = predict(model, rows, load_prompts(), ReportSentences())
    assert found.unit == "study" and len(found.rows) == len(rows) == 4 and len(found.counted()) == 3
    for study in {row.study_id for row in rows}:
        scores = {tuple(found.scores[i]) for i, row in enumerate(found.rows) if row.study_id == study}
        assert len(scores) == 1  # of the study, in each of its rows
    alone = [model.read(row.path) for row in rows]
    of_study = next(study for study in {row.study_id for row in rows} if sum(row.study_id == study for row in rows) == 2)
    together = [one for one, row in zip(alone, rows, strict=True) if row.study_id == of_study]
    features = model.encode_studies([together])
    bank = encode_prompts(model, load_prompts(), found.findings)
    from tasks.zero_shot import score

    own = next(i for i, row in enumerate(found.rows) if row.study_id == of_study)
    np.testing.assert_allclose(score(model, features, bank)[0].numpy(), found.scores[own], rtol=1e-4)
    assert found.slice_hits is not None and len(found.slice_hits) == 4


def test_series_of_one_dicom_study_are_one_diagnosis(table, run_folder, tmp_path):
    """Two series folders of one StudyInstanceUID, and a third of another patient."""
    from modalities.ct.read import read_ct

    rows = read_manifest(table).select(split="test", modality="ct").rows
    folders = [tmp_path / name for name in ("thin", "thick", "other")]
    for row, folder, study in zip(rows[:3], folders, ("a", "a", "b"), strict=True):
        volume = read_ct(row.path)
        write_ct_series(folder, volume.voxels.astype(np.int16), volume.affine, patient_id="p", study_id=study)
    model = medvl.load(run_folder, device="cpu")
    bank = encode_prompts(model, load_prompts())
    found = list(diagnose(model, folders, bank))
    assert [len(one.paths) for one in found] == [2, 1] and all(one.ok for one in found)
    assert [len(one.slices) for one in found] == [2, 1]
    (single,) = diagnose(model, folders[:1], bank)
    assert single.slices[0].findings["lung_nodule"] == pytest.approx(found[0].slices[0].findings["lung_nodule"], rel=1e-3)
    assert single.findings != found[0].findings
    done = CliRunner().invoke(cli, ["diagnose", *map(str, folders), "--model", str(run_folder), "--json"])
    assert done.exit_code == 0, done.output
    assert len([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]) == 2


def test_a_tower_that_pools_no_series_is_told_of(table, tmp_path):
    recipe = yaml.safe_load(recipe_path("ct_slices.yaml").read_text())
    recipe["data"]["init_args"] |= {"manifest": str(table), "views": "study"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"SlicePooledEncoder encodes images one by one.*SeriesPooledEncoder"):
        run("fit", ["--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")])
