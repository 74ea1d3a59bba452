"""``medvl ground``, ``calibrate-maps`` and ``evaluate-maps`` on folders, manifests and annotation files, whole and broken."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import medvl
from medvl.metrics import overlap
from tasks.cli import cli
from tasks.grounding.outputs import load_grids
from tasks.phantoms import write_cohort


def command(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in args])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty small phantoms with masks, most of them for validation."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 60, 4242, size=64, counts={"train": 0, "val": 45, "test": 15}, workers=1)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model that knows nothing, so that thresholds may lie beside it."""
    return Path(shutil.copytree(tiny.model, tmp_path_factory.mktemp("run") / "model"))


@pytest.fixture(scope="module")
def calibrated(model: Path, cohort: Path) -> Result:
    return command("calibrate-maps", cohort, "--model", model, "--false-share", "0.2")


def test_thresholds_of_validation_make_found_or_not_found(calibrated: Result, model: Path, cohort: Path, tmp_path: Path) -> None:
    assert calibrated.exit_code == 0, calibrated.output
    (file,) = (model / "grounding").glob("xray-*.json")
    fitted = json.loads(file.read_text())
    assert fitted["fitted_on"]["false_share"] <= 0.2 and fitted["fitted_on"]["split"] == "val" and fitted["notice"]
    film = next(cohort.parent.glob("xray/*.dcm"))
    done = command("ground", film, "--phrase", "a nodule", "--finding", "edema", "--model", model, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    for one in json.loads(done.stdout)["maps"]:
        assert one["threshold_from"] == "validation" and one["found"] == (one["score"] >= (one["threshold"] or np.inf))
        assert bool(one["boxes"]) == one["found"] and 0 <= one["probability"] <= 1
        scores = np.load(tmp_path / one["npy"])
        for box in one["boxes"]:
            inside = tuple(slice(int(a + 0.5), int(b + 0.5)) for a, b in zip(box["low"], box["high"], strict=True))
            assert np.nanmax(scores[inside]) == pytest.approx(box["score"]) and box["size_mm2"] > 0
    maps, names = load_grids(tmp_path / "grids.npz")
    np.testing.assert_allclose(maps.native(1), np.load(tmp_path / "edema.npy"), atol=2e-3)
    assert names == ("a_nodule", "edema")


def test_without_thresholds_a_phrase_is_held_against_its_denial_and_says_so(tiny: Any, tmp_path: Path) -> None:
    done = command("ground", tiny.dicom, "--phrase", "a nodule", "--model", tiny.model, "--out", tmp_path)
    assert done.exit_code == 0 and "not calibrated" in done.output
    (one,) = json.loads((tmp_path / "maps.json").read_text())
    loaded = medvl.load(tiny.model, device="cpu")
    denied = loaded.similarity.maps(loaded.encode_image(tiny.dicom), loaded.encode_text("no a nodule"))
    assert one["threshold"] == pytest.approx(float(denied.nan_to_num(-9).max()), abs=1e-5)
    assert one["found"] is (one["max"] >= one["threshold"]) and one["probability"] is None


def test_a_folder_gives_each_image_its_own_and_goes_on_where_it_stopped(tiny: Any, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    shutil.copy(tiny.dicom, films / "a.dcm")
    shutil.copy(tiny.png, films / "b.png")
    shutil.copy(tiny.broken, films / "broken.dcm")
    asked = ("ground", films, "--phrase", "a nodule", "--phrase", "heart", "--model", tiny.model, "--out", tmp_path / "out")
    done = command(*asked, "--json")
    assert done.exit_code == 1 and "1 rejected (files)" in done.stderr, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(one["path"]).name for one in lines] == ["a.dcm", "b.png", "broken.dcm"]
    assert [one["ok"] for one in lines] == [True, True, False]
    with (tmp_path / "out" / "maps.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 and {row["phrase"] for row in table} == {"a nodule", "heart"}
    with (tmp_path / "out" / "rejected.csv").open() as file:
        assert "broken.dcm" in file.read()
    folders = [tmp_path / "out" / row["folder"] for row in table]
    stamps = {folder: (folder / "maps.json").stat().st_mtime_ns for folder in folders}
    (folders[0] / "heart.png").unlink()  # as if the run had been stopped there
    assert command(*asked).exit_code == 1
    assert (folders[0] / "heart.png").is_file()
    assert {folder for folder in stamps if (folder / "maps.json").stat().st_mtime_ns == stamps[folder]} == {folders[2]}
    other = command("ground", films, "--phrase", "a nodule", "--model", tiny.model, "--out", tmp_path / "out")
    assert other.exit_code == 1 and (folders[2] / "maps.json").stat().st_mtime_ns != stamps[folders[2]], "another question is asked anew"


def test_a_manifest_and_refinements(tiny: Any, tmp_path: Path) -> None:
    done = command(
        *("ground", tiny.manifest, "--phrase", "a nodule", "--model", tiny.model, "--out", tmp_path, "--shifts", "2", "--smooth", "10"),
        *("--against", "a chest X-ray", "--negation"),
    )
    with (tmp_path / "maps.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) >= 20, done.output
    record = json.loads((tmp_path / table[0]["folder"] / "maps.json").read_text())[0]["maps"]
    assert (record["shifts"], record["smoothing_mm"], record["against"], record["negation"]) == (2, 10.0, "a chest X-ray", True)


def test_dicom_objects_refer_to_the_film_and_hold_the_map_and_what_was_found(model: Path, cohort: Path, tmp_path: Path) -> None:
    pydicom, highdicom = pytest.importorskip("pydicom"), pytest.importorskip("highdicom")
    film = sorted((cohort.parent / "xray").glob("*.dcm"))[0]
    asked = ("--phrase", "a nodule", "--finding", "edema", "--out", tmp_path, "--dicom", "--json")
    done = command("ground", film, "--model", model, *asked)
    assert done.exit_code == 0, done.output
    source = pydicom.dcmread(film)
    records = json.loads(done.stdout)["maps"]
    for one in records:
        scores = np.load(tmp_path / one["npy"])
        written = pydicom.dcmread(tmp_path / one["dicom"]["map"])
        np.testing.assert_array_equal(np.frombuffer(written.FloatPixelData, "<f4").reshape(scores.shape), scores)
        assert written.StudyInstanceUID == source.StudyInstanceUID
    assert highdicom.sr.srread(tmp_path / records[0]["dicom"]["report"]).StudyInstanceUID == source.StudyInstanceUID
    found = [one for one in records if one["found"]]
    assert ((tmp_path / "segmentation.dcm").is_file()) == bool(found)
    if found:
        masks = highdicom.seg.segread(tmp_path / "segmentation.dcm")
        assert masks.number_of_segments == len(found)
    picture = command("ground", next(iter((cohort.parent / "masks").glob("*.png"))), "--model", model, *asked)
    assert picture.exit_code == 1 and "needs DICOM sources" in picture.output
    shares = command("ground", film, "--model", model, *asked, "--maps", tmp_path)
    assert shares.exit_code == 1 and "no coded quantity" in shares.output


def test_maps_made_elsewhere_are_shown_and_not_judged(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    grid = np.zeros((8, 8))
    grid[2, 6] = 1.0
    np.save(tmp_path / "maps" / "a_nodule.npy", grid)
    asked = ("ground", tiny.png, "--model", tiny.model, "--out", tmp_path / "out", "--maps", tmp_path / "maps", "--json")
    done = command(*asked, "--phrase", "a nodule")
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)["maps"]
    assert one["found"] is None and one["unit"] == "external" and one["maps"] == {"source": "external"}
    assert abs(one["peak"][0] - 2.5 * 48 / 8) <= 3 and abs(one["peak"][1] - 6.5 * 40 / 8) <= 3
    missing = command(*asked, "--phrase", "heart")
    assert missing.exit_code == 1 and "no map of" in json.loads(missing.stdout)["error"]


def test_each_image_of_several_has_its_own_maps_made_elsewhere(tiny: Any, tmp_path: Path) -> None:
    """Names that begin alike are not mixed up, and one image's map is not taken for another's."""
    films, maps = tmp_path / "films", tmp_path / "maps"
    films.mkdir()
    for name, column in (("1.2.840.1.png", 1), ("1.2.840.2.png", 6)):
        shutil.copy(tiny.png, films / name)
        (maps / Path(name).stem).mkdir(parents=True)
        grid = np.zeros((8, 8))
        grid[4, column] = 1.0
        np.save(maps / Path(name).stem / "a_nodule.npy", grid)
    shutil.copy(tiny.png, films / "third.png")
    np.save(maps / "a_nodule.npy", np.zeros((8, 8)))
    asked = ("ground", films, "--phrase", "a nodule", "--model", tiny.model, "--out", tmp_path / "out", "--maps", maps, "--json")
    done = command(*asked)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and [one["ok"] for one in lines] == [True, True, False] and "third" in lines[2]["error"]
    assert [one["maps"][0]["peak"][1] < 20 for one in lines[:2]] == [True, False]
    np.save(maps / "1.2.840.1" / "a_nodule.npy", grid)  # changed since: made again
    assert json.loads(command(*asked).stdout.splitlines()[0])["maps"][0]["peak"][1] > 20


def test_a_map_that_is_nan_throughout_has_no_picture_and_costs_no_other(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "a_nodule.npy", np.full((8, 8), np.nan))
    np.save(tmp_path / "maps" / "heart.npy", np.eye(8))
    flags = ("--phrase", "a nodule", "--phrase", "heart", "--maps", tmp_path / "maps", "--json")
    done = command("ground", tiny.png, *flags, "--model", tiny.model, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    empty, heart = json.loads(done.stdout)["maps"]
    assert empty["png"] is None and empty["peak"] is None and empty["score"] is None and (tmp_path / "out" / heart["png"]).is_file()


def test_other_questions_leave_no_files_of_the_first(tiny: Any, tmp_path: Path) -> None:
    options = ("--model", tiny.model, "--out", tmp_path)
    command("ground", tiny.png, "--phrase", "a nodule", *options)
    (tmp_path / "of_someone_else.png").write_bytes(b"kept")
    command("ground", tiny.png, "--phrase", "heart", *options)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["grids.npz", "heart.npy", "heart.png", "maps.json", "of_someone_else.png"]


def test_a_phrase_that_is_called_like_a_finding_is_another_question(calibrated: Result, model: Path, tiny: Any, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(tiny.png, films / name)
    kinds = []
    for flag in ("--phrase", "--finding"):
        done = command("ground", films, flag, "edema", "--model", model, "--out", tmp_path / "out", "--json")
        (one,) = json.loads(done.stdout.splitlines()[0])["maps"]
        kinds.append((one["kind"], one["score"]))
    assert [kind for kind, _ in kinds] == ["phrase", "finding"] and kinds[0][1] != kinds[1][1]


def test_thresholds_of_these_very_studies_measure_nothing(calibrated: Result, model: Path, cohort: Path, tmp_path: Path) -> None:
    done = command("evaluate-maps", cohort, "--model", model, "--split", "val", "--out", tmp_path, "--repeats", "10", "--json")
    assert done.exit_code == 0 and "chosen on these very studies" in done.stderr
    assert json.loads(done.stdout)["thresholds"] is None and "found" not in json.loads(done.stdout)["macro"]


def test_thresholds_need_no_masks_and_know_their_prompts(model: Path, cohort: Path, tmp_path: Path) -> None:
    with cohort.open() as file:
        rows = list(csv.DictReader(file))
    with (cohort.parent / "bare.csv").open("w", newline="") as file:
        names = [name for name in rows[0] if not name.startswith("mask_")]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    place = tmp_path / "bare.json"
    done = command("calibrate-maps", cohort.parent / "bare.csv", "--model", model, "--false-share", "0.2", "--out", place)
    assert done.exit_code == 0, done.output
    fitted = json.loads(place.read_text())
    assert fitted["fitted_on"]["with_masks"] == 0 and fitted["fitted_on"]["present"] > 5
    assert {one["spread"] for one in fitted["findings"].values()} == {None}
    film = next(cohort.parent.glob("xray/*.dcm"))
    options = ("--model", model, "--thresholds", place, "--out", tmp_path / "out")
    assert command("ground", film, "--finding", "edema", *options).exit_code == 0
    other = command("ground", film, "--finding", "edema", "--prompts", "chest_xray", *options)
    assert other.exit_code == 2 and "other prompts" in " ".join(other.output.split())
    wrong = command("calibrate-maps", cohort, "--model", model, "--finding", "edema", "--finding", "typo", "--out", place)
    assert wrong.exit_code == 2 and "typo" in wrong.output


def test_an_offset_by_masks_is_noted_with_the_model(model: Path, cohort: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    done = command("calibrate-maps", cohort, "--model", copy, "--false-share", "0.2", "--offset")
    assert done.exit_code == 0 and "voxels from their cells" in done.output, done.output
    (offset,) = json.loads((copy / "config.json").read_text())["token_offset"].values()
    assert len(offset) == 2 and medvl.load(copy, device="cpu").token_offset == {2: tuple(offset)}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--source", "cross_attention"), "CrossAttentionSimilarity"),
        (("--source", "values"), "self-attentions"),
        (("--source", "nowhere"), "nowhere"),
        (("--thresholds", "/nowhere.json"), "no thresholds that"),
        (("--maps", "/nowhere"), "no such folder"),
        (("--crops", "99"), "99"),
    ],
)
def test_what_does_not_go_is_refused_at_once(tiny: Any, tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    done = command("ground", tiny.png, "--phrase", "x", "--model", tiny.model, "--out", tmp_path, *args)
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output


def test_maps_are_measured_with_their_masks(calibrated: Result, model: Path, cohort: Path, tmp_path: Path) -> None:
    """Of one case the measures again, from files that `medvl ground` leaves."""
    done = command("evaluate-maps", cohort, "--model", model, "--out", tmp_path / "eval", "--repeats", "50", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "eval" / "results.json").read_text())
    with (tmp_path / "eval" / "cases.csv").open() as file:
        cases = list(csv.DictReader(file))
    with cohort.open() as file:
        rows = {row["study_id"]: row for row in csv.DictReader(file)}
    present = [one for one in cases if one["present"] == "1"]
    expected = sum(bool(row[f"mask_{name}"]) for row in rows.values() for name in found["per_group"] if row["split"] == "test")
    assert len(present) == expected == found["cases"]["present"]
    one = present[0]
    row = rows[one["study_id"]]
    command("ground", cohort.parent / row["path"], "--finding", one["category"], "--model", model, "--out", tmp_path / "one")
    (said,) = json.loads((tmp_path / "one" / "maps.json").read_text())
    scores = np.load(tmp_path / "one" / said["npy"])
    mask = np.asarray(Image.open(cohort.parent / row[f"mask_{one['category']}"])) > 0
    assert float(one["pointing_game"]) == float(mask[tuple(said["peak"])])
    inside, outside = scores[mask & np.isfinite(scores)], scores[~mask & np.isfinite(scores)]
    assert float(one["contrast"]) == pytest.approx((inside.mean() - outside.mean()) / np.sqrt(inside.var() + outside.var()), abs=1e-4)
    assert float(one["mean_iou"]) == pytest.approx(
        np.mean([overlap(np.nan_to_num(scores, nan=-9) >= t, mask)[0] for t in (0.1, 0.2, 0.3, 0.4, 0.5)])
    )
    values = [float(case["pointing_game"]) for case in present if case["category"] == one["category"]]
    measured = found["per_group"][one["category"]]["pointing_game"]
    assert measured["value"] == pytest.approx(np.mean(values)) and measured["n"] == len(values)
    absent = [float(case["false_found"]) for case in cases if case["present"] == "0" and case["category"] == one["category"]]
    assert found["per_group"][one["category"]]["false_found"]["value"] == pytest.approx(np.mean(absent))
    assert found["protocol"]["format"] == "manifest" and len(found["protocol"]["sha256"]) == 64


def test_annotations_of_data_sets_are_measured_and_what_is_missing_is_listed(model: Path, cohort: Path, tmp_path: Path) -> None:
    films = sorted((cohort.parent / "xray").glob("*.dcm"))[:3]
    det10 = [
        {"file_name": films[0].name, "syms": ["Nodule", "Effusion"], "boxes": [[100, 200, 400, 500], [600, 300, 900, 800]]},
        {"file_name": films[1].name, "syms": [], "boxes": []},
        {"file_name": "gone.png", "syms": ["Mass"], "boxes": [[1, 1, 5, 5]]},
    ]
    (tmp_path / "test.json").write_text(json.dumps(det10))
    with Image.open(next(iter((cohort.parent / "masks").glob("*.png")))) as picture:
        width, height = picture.size
    (tmp_path / "ms.csv").write_text(
        "dicom_id,category_name,label_text,x,y,w,h,image_width,image_height\n"
        f"{films[2].stem},Pneumothorax,a large left pneumothorax,3,4,20,20,{width},{height}\n"
        f"{films[2].stem},Pneumothorax,a large left pneumothorax,30,34,10,10,{width},{height}\n"
        f"{films[0].stem},Edema,edema,x,4,20,20,{width},{height}\n"
    )
    options = ("--images", cohort.parent / "xray", "--split", "all", "--model", model, "--repeats", "20", "--json")
    done = command("evaluate-maps", tmp_path / "test.json", "--format", "chestx_det10", *options, "--out", tmp_path / "det10")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert found["cases"]["present"] == 2 and {"Nodule", "Effusion"} <= set(found["per_group"])
    assert (
        found["protocol"]["queries"].startswith("prompts of findings") and "gone.png" in (tmp_path / "det10" / "rejected.csv").read_text()
    )
    done = command("evaluate-maps", tmp_path / "ms.csv", "--format", "ms_cxr", *options, "--out", tmp_path / "ms")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert found["cases"] == {"present": 1, "absent": 0} and list(found["per_group"]) == ["Pneumothorax"]
    assert "a large left" not in (tmp_path / "ms" / "rejected.csv").read_text() + (tmp_path / "ms" / "cases.csv").read_text()
    refused = command("evaluate-maps", tmp_path / "ms.csv", "--format", "ms_cxr", "--model", model, "--out", tmp_path / "ms")
    assert refused.exit_code == 2 and "--images" in refused.output
