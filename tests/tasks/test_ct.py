"""CT from the command line on phantoms: trained, diagnosed, grounded in 3D and evaluated, against nibabel and plain recomputation."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

import medvl
from tasks.cli import cli
from tasks.corruptions import VOLUME_CORRUPTIONS
from tasks.demo import recipe_path
from tasks.phantoms import write_cohort

SIZE, STUDIES = 32, 12
SEEN = [part for kind in ("patients", "studies", "images") for part in ("--allow-leak", kind)]  # studies of training are measured, as asked


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes and films of twelve phantoms, with masks; a third of them for testing."""
    folder = tmp_path_factory.mktemp("ct")
    return write_cohort(folder, STUDIES, 11, size=SIZE, ct=True, counts={"train": 6, "val": 2, "test": 4}, workers=1)


@pytest.fixture(scope="module")
def run_folder(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CT recipe, two steps of it, on small slices."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    recipe = yaml.safe_load(recipe_path("ct_slices.yaml").read_text())
    recipe["data"]["init_args"]["reader"]["init_args"] |= {"spacing_mm": [16, 11, 11], "shape": [None, 32, 32]}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = {
        "config": out / "recipe.yaml",
        "data.init_args.manifest": cohort,
        "data.init_args.batch_size": 3,
        "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": "false",
        "out": out,
    }
    done = CliRunner().invoke(cli, ["fit", *(f"--{name}={value}" for name, value in arguments.items())])
    assert done.exit_code == 0, done.output
    return out


def test_where_tokens_look_is_measured_and_not_said_of_a_few_pairs(cohort: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are encoded one by one, so a token looks at its own."""
    from medvl.training import offset
    from medvl.training.data import StudyDataModule
    from reports.text_source import ReportSentences

    noted = json.loads((run_folder / "config.json").read_text())["token_offset"]
    model = medvl.load(run_folder, device="cpu")
    data = StudyDataModule(manifest=cohort, reader=model.reader, texts=ReportSentences(), batch_size=3, modality="ct")
    data.setup()
    assert noted == {} and model.token_offset == {}
    with pytest.raises(ValueError, match="fewer than 30 pairs"):
        offset.measured_offset(model, data.some_batches())
    monkeypatch.setattr(offset, "FEWEST", 3)
    found = offset.measured_offset(model, data.some_batches())
    assert list(found) == [3] and found[3][0] == 0 and max(map(abs, found[3])) < 32
    folder = Path(shutil.copytree(run_folder, run_folder.parent / "measured"))
    offset.write_offset(folder, data.some_batches)
    assert medvl.load(folder, device="cpu").token_offset == found
    offset.write_offset(folder, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    offset.write_offset(folder / "nowhere", data.some_batches)
    assert medvl.load(folder, device="cpu").token_offset == found, "a failure costs nothing"


def volumes(cohort: Path) -> list[Path]:
    return sorted((cohort.parent / "ct").glob("*.nii.gz"))


def strict(text: str) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines() if line.startswith("{")]


def test_a_volume_is_diagnosed_and_a_folder_finds_the_volumes_alone(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"\x1f\x8b nothing of use")
    files = [str(volumes(cohort)[0]), str(broken), str(cohort.parent / "ct")]
    done = CliRunner().invoke(cli, ["diagnose", *files, "--model", str(run_folder), "--json"])
    assert done.exit_code == 1
    found = strict(done.stdout)
    assert [one["ok"] for one in found] == [True, False] + [True] * (STUDIES - 1)
    assert str(broken) in found[1]["error"]
    assert all(0 < score < 1 for score in found[0]["findings"].values())
    shown = CliRunner().invoke(cli, ["diagnose", files[0], "--model", str(run_folder), "--finding", "lung_nodule"], env={"COLUMNS": "120"})
    best = max(scores := found[0]["slices"][0]["findings"]["lung_nodule"])
    z = found[0]["slices"][0]["z_mm"][scores.index(best)]
    assert f"(z {z:.0f} mm): {best:.3f}" in shown.output


def test_a_series_that_is_refused_says_why_and_an_empty_folder_that_it_is_empty(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    from modalities.export import write_ct_series

    (tmp_path / "empty").mkdir()
    volume = np.random.default_rng(0).integers(-1000, 200, (8, 16, 16)).astype(np.int16)
    affine = np.array([[0, 0, -4, 0], [0, -4, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]])
    write_ct_series(tmp_path / "series", volume, affine, patient_id="p", study_id="s")
    sorted((tmp_path / "series").iterdir())[3].unlink()
    paths = [str(tmp_path / "series"), str(tmp_path / "empty")]
    done = CliRunner().invoke(cli, ["diagnose", *paths, "--model", str(run_folder), "--json"])
    series, empty = strict(done.stdout)
    assert done.exit_code == 1 and "missing" in series["error"] and "no image in this folder; expected DICOM files or .gz" in empty["error"]


def test_a_map_of_a_volume_lies_on_the_voxels_and_millimetres_of_its_file(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    file = volumes(cohort)[1]
    options = ["--phrase", "left pleural effusion", "--model", str(run_folder), "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(cli, ["ground", str(file), *options])
    assert done.exit_code == 0, done.output
    record = strict(done.stdout)[0]["maps"][0]
    image, native = nib.load(tmp_path / record["nifti"]), nib.load(file)
    assert image.shape == native.shape
    np.testing.assert_allclose(image.affine, native.affine, atol=1e-5)
    array, written = np.load(tmp_path / record["npy"]), image.get_fdata()
    np.testing.assert_array_equal(array, written.transpose(2, 1, 0).astype(np.float32))
    assert array[tuple(record["peak"])] == pytest.approx(np.nanmax(array))
    s, h, w = record["peak"]
    np.testing.assert_allclose(record["peak_ras_mm"], nib.affines.apply_affine(native.affine, [w, h, s]), atol=1e-3)
    with Image.open(tmp_path / record["png"]) as picture:
        assert min(picture.size) > 100


def test_every_orientation_of_a_file_gives_the_same_scores_and_the_same_map_in_the_world(
    cohort: Path, run_folder: Path, tmp_path: Path
) -> None:
    plain = nib.load(volumes(cohort)[2])
    found = []
    for code in ("LAS", "RPI", "PSR", "IRA"):
        path = tmp_path / f"{code}.nii.gz"
        nib.save(
            plain.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(plain.affine), nib.orientations.axcodes2ornt(code))),
            path,
        )
        done = CliRunner().invoke(
            cli, ["ground", str(path), "--phrase", "heart", "--model", str(run_folder), "--out", str(tmp_path), "--json"]
        )
        scores = CliRunner().invoke(cli, ["diagnose", str(path), "--model", str(run_folder), "--json"])
        written = nib.as_closest_canonical(nib.load(tmp_path / strict(done.stdout)[0]["maps"][0]["nifti"]))
        found.append((written.affine, written.get_fdata(), list(strict(scores.stdout)[0]["findings"].values())))
    for affine, scores_of_voxels, scores in found[1:]:
        np.testing.assert_allclose(affine, found[0][0], atol=1e-3)
        np.testing.assert_allclose(scores_of_voxels, found[0][1], atol=1e-5)
        np.testing.assert_allclose(scores, found[0][2], atol=1e-5)


def test_a_shorter_study_beside_a_longer_one_keeps_its_map_and_features(cohort: Path, run_folder: Path) -> None:
    """A batch is padded to its longest study; alone, together, and joined from two batches must be the same."""
    import medvl
    from medvl.model import join
    from tasks.grounding import batch_extent, native_maps, token_maps

    model = medvl.load(run_folder, device="cpu")
    whole = np.asarray(nib.load(volumes(cohort)[0]).dataobj).transpose(2, 1, 0)
    affine = nib.load(volumes(cohort)[0]).affine[:, [2, 1, 0, 3]]
    samples = [model.reader.read_array(whole[: len(whole) // 2], affine), model.reader.read_array(whole, affine)]
    assert samples[0].pixels.shape[1] < samples[1].pixels.shape[1]
    alone = [model.encode_samples([sample]) for sample in samples]
    together, joined = model.encode_samples(samples), join(alone)
    for features in (together, joined):
        maps = token_maps(model, features, ["left pleural effusion"])
        for i, sample in enumerate(samples):
            expected = native_maps(token_maps(model, alone[i], ["left pleural effusion"])[0], sample.transform)
            np.testing.assert_allclose(native_maps(maps[i], sample.transform, batch_extent(samples)), expected, atol=1e-5)
            torch.testing.assert_close(features.pooled[i], alone[i].pooled[0], atol=1e-5, rtol=1e-5)


def test_evaluation_points_at_3d_masks(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    options = ["--manifest", str(cohort), "--modality", "ct", "--split", "all", "--repeats", "20", *SEEN, "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(cli, ["evaluate", "--model", str(run_folder), *options])
    assert done.exit_code == 0, done.output
    measured = strict(done.stdout)[0]
    assert measured["images"] == STUDIES
    with cohort.open(newline="") as file:
        rows = {row["study_id"]: row for row in csv.DictReader(file) if row["modality"] == "ct"}
    hits: dict[str, list[bool]] = {}
    with (tmp_path / "predictions.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            mask = rows[line["study_id"]][f"mask_{line['finding']}"]
            if line["label"] == "1" and mask:
                inside = np.asarray(nib.load(cohort.parent / mask).dataobj).transpose(2, 1, 0)
                hits.setdefault(line["finding"], []).append(
                    bool(inside[int(line["peak_slice"]), int(line["peak_row"]), int(line["peak_col"])])
                )
    assert len(hits) > 3
    for name, of_finding in hits.items():
        assert measured["grounding"]["per_finding"][name]["pointing_game"] == pytest.approx(np.mean(of_finding)), name
    provenance = measured["model"]["provenance"]
    assert len(provenance["recipe_sha256"]) == 64
    assert set(provenance) >= {"commit", "manifest_sha256", "chosen_by"}


def test_slices_have_scores_heights_and_a_place_in_the_file(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    """Heights against nibabel's affine, and how often the best slice is one of the mask's from these heights alone."""
    done = CliRunner().invoke(cli, ["diagnose", *map(str, volumes(cohort)), "--model", str(run_folder), "--json"])
    by_study = {Path(one["path"]).name.removesuffix(".nii.gz"): one["slices"][0] for one in strict(done.stdout)}
    for study, found in by_study.items():
        image = nib.load(cohort.parent / "ct" / f"{study}.nii.gz")
        middle = (np.array(image.shape) - 1) / 2
        world = [nib.affines.apply_affine(image.affine, [middle[0], middle[1], index])[2] for index in found["index"]]
        np.testing.assert_allclose(found["z_mm"], world, atol=1e-3)
        assert found["z_mm"] == sorted(found["z_mm"]) and len(found["z_mm"]) > 10
        assert all(len(scores) == len(world) and all(0 < score < 1 for score in scores) for scores in found["findings"].values())
    options = ["--manifest", str(cohort), "--modality", "ct", "--split", "all", "--repeats", "20", *SEEN, "--out", str(tmp_path), "--json"]
    measured = strict(CliRunner().invoke(cli, ["evaluate", "--model", str(run_folder), *options]).stdout)[0]["slices"]
    hits: dict[str, list[bool]] = {}
    with cohort.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["modality"] == "ct"]
    for row in rows:
        found = by_study[row["study_id"]]
        heights, step = np.array(found["z_mm"]), float(np.diff(found["z_mm"])[0])
        for name, scores in found["findings"].items():
            if row[name] == "1" and row[f"mask_{name}"]:
                mask = nib.load(cohort.parent / row[f"mask_{name}"])
                z = np.unique(nib.affines.apply_affine(mask.affine, np.argwhere(np.asarray(mask.dataobj)))[:, 2])
                thick = float(mask.header.get_zooms()[2])
                cut = set(np.flatnonzero((np.abs(heights[:, None] - z[None]) < (step + thick) / 2 - 1e-3).any(1)).tolist())
                hits.setdefault(name, []).append(int(np.argmax(scores)) in cut)
    assert len(hits) > 3
    for name, of_finding in hits.items():
        assert measured["per_finding"][name]["slice_hit"] == pytest.approx(np.mean(of_finding)), name
    assert measured["slice_hit_macro"] == pytest.approx(np.mean([np.mean(one) for one in hits.values()]))


def test_slices_that_the_reader_padded_have_no_score(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    """A reader with a fixed number of slices, more than the volume has: its padding is in no list, no table and no hit."""
    import medvl
    from modalities.ct import CtReader
    from tasks.masks import masked_slices

    model = medvl.load(run_folder, device="cpu")
    model.reader = CtReader(spacing_mm=(8.0, 11, 11), shape=(64, 32, 32), crop="none")
    folder = model.save(tmp_path / "padding")
    done = CliRunner().invoke(cli, ["diagnose", str(volumes(cohort)[0]), "--model", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    found = strict(done.stdout)[0]["slices"][0]
    count = round(352 / 8)
    assert len(found["z_mm"]) == count and all(len(scores) == count for scores in found["findings"].values())
    sample = model.reader.read(volumes(cohort)[0])
    assert sample.pixels.shape[1] == 64 and int(sample.valid.sum()) == count
    everywhere = masked_slices(np.ones(sample.transform.native_shape, dtype=bool), sample)
    np.testing.assert_array_equal(everywhere, sample.valid.numpy())


def test_a_mask_between_coarse_slices_has_no_holes_and_ends_where_the_tower_ends() -> None:
    """Native slices of 5 mm, tower slices of 3 mm: by the overlap of intervals in mm."""
    from modalities.ct import CtReader
    from tasks.masks import masked_slices

    volume = np.full((30, 24, 24), -1000.0, dtype=np.float32)
    volume[:, 4:20, 4:20] = 40
    affine = np.array([[0, 0, -4, 0], [0, -4, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]])
    mask = np.zeros(volume.shape, dtype=bool)
    mask[10:15, 8:12, 8:12] = True
    for slices in (None, 20):
        sample = CtReader(spacing_mm=(3, 4, 4), shape=(None, 24, 24), crop="none", max_slices=slices).read_array(volume, affine)
        points = np.array([[s, 12.0, 12.0] for s in range(sample.pixels.shape[1])])
        middle = sample.transform.to_native(points)[:, 0] * 5  # mm
        expected = (middle + 1.5 > 9.5 * 5 + 1e-3) & (middle - 1.5 < 14.5 * 5 - 1e-3)
        np.testing.assert_array_equal(masked_slices(mask, sample), expected)
        above = np.zeros(volume.shape, dtype=bool)
        above[29] = True
        assert masked_slices(above, sample).any() == (slices is None)


def test_the_page_of_volumes_shows_slices_and_their_scores(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    import medvl
    from medvl.data.manifest import read_manifest
    from reports.prompts import load_prompts
    from reports.text_source import ReportSentences
    from tasks.evaluation import predict, results
    from tasks.page import DemoPage, page_part, page_title, write_page

    model = medvl.load(run_folder, device="cpu")
    rows = read_manifest(cohort).select(modality="ct").rows
    predictions = predict(model, rows, load_prompts(), ReportSentences())
    measured = results(predictions, repeats=20)
    part = page_part(modality="ct", model=model, predictions=predictions, results=measured, baseline={}, facts={"seed": 1})
    html = write_page(tmp_path / "page.html", DemoPage(page_title(("ct",)), (part, part))).read_text()
    assert "chest CT it was never trained on" in html and "Every CT volume on this page" in html and "a random voxel" in html
    examples = [example for gallery in part.galleries for example in gallery.examples]
    assert html.count('<svg class="profile"') == 2 * len(examples) > 0
    for example in examples:
        assert example.profile is not None and any(example.profile.masked) and example.profile.peak is not None
        assert len(example.profile.scores) == len(example.profile.masked)
        assert example.pictures[1].caption.startswith("true mask, slice ")
    assert f"{measured['slices']['slice_hit_macro']:.2f} <small>" in html


def test_a_mask_on_other_voxels_costs_its_study_alone(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    with cohort.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["modality"] == "ct"]
    name, row = next((key, row) for row in rows for key, value in row.items() if key.startswith("mask_") and value and row[key[5:]] == "1")
    mask = nib.load(cohort.parent / row[name])
    shifted = mask.affine.copy()
    shifted[0, 3] += 30
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj), shifted), tmp_path / "shifted.nii.gz")
    for row_of in rows:
        row_of["path"] = str(cohort.parent / row_of["path"])
        for key in [key for key in row_of if key.startswith("mask_") and row_of[key]]:
            row_of[key] = str(cohort.parent / row_of[key])
    row[name] = "shifted.nii.gz"
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    options = [
        "--manifest",
        str(table),
        "--modality",
        "ct",
        "--split",
        "all",
        "--repeats",
        "0",
        "--no-baseline",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(cli, ["evaluate", "--model", str(run_folder), *options, "--json"])
    assert done.exit_code == 2  # every path leaves the table's folder
    done = CliRunner().invoke(cli, ["evaluate", "--model", str(run_folder), *options, "--allow-outside", "--json"])
    assert done.exit_code == 1, done.output
    assert strict(done.stdout)[0]["images"] == STUDIES - 1
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [line["study_id"] for line in listed] == [row["study_id"]]
    assert "expected the same grid" in listed[0]["reason"]


def test_a_volume_is_explained_by_signs_slices_and_maps(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    """The score of each slice by a preset, and pictures of the slices that the signs' maps point at."""
    volume = volumes(cohort)[0]
    ask = ["--model", str(run_folder), "--prompts", "chest_ct", "--preset", "xplainer", "--finding", "pleural_effusion", "--json"]
    done = CliRunner().invoke(cli, ["diagnose", str(volume), *ask, "--explain", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (scored,) = strict(done.stdout)
    (series,) = scored["slices"]
    (explained,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    (finding,) = explained["findings"]
    assert finding["score"] == pytest.approx(scored["findings"]["pleural_effusion"], abs=1e-6)
    assert explained["slices"][0]["findings"]["pleural_effusion"] == pytest.approx(series["findings"]["pleural_effusion"])
    page = next(tmp_path.glob("*.html")).read_text()
    best = max(series["findings"]["pleural_effusion"])
    assert f"{best:.3f}" in page and "from below" in page and "<polyline" in page
    assert page.count("data:image/jpeg;base64,") == 1 + len(finding["signs"]) and len(finding["signs"]) > 3


def test_volumes_are_probed_turned_and_corrupted(cohort: Path, run_folder: Path, tmp_path: Path) -> None:
    ask = ["--model", str(run_folder), "--manifest", str(cohort), "--modality", "ct", "--split", "all", "--repeats", "3"]
    done = CliRunner().invoke(cli, ["probe", *ask, "--out", str(tmp_path), *SEEN])
    assert done.exit_code == 0, done.output
    probes = json.loads((tmp_path / "probes.json").read_text())["probes"]
    corrupted = {(one["name"], one["setting"]) for one in probes if one["probe"] == "corruption"}
    assert len(corrupted) == 1 + 5 * len(VOLUME_CORRUPTIONS) and ("thick slices", "5") in corrupted
    turned = {one["setting"]: one["value"] for one in probes if one["probe"] == "orientation"}
    assert len(turned) == 4 and len(set(turned.values())) > 1, turned
