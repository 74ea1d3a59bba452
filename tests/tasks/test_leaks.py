"""The leak check: what is shared is found, whatever file it comes in, and nothing else; against ImageHash's own tables and numpy."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageEnhance

from medvl.data.manifest import read_manifest
from modalities.xray import XrayReader
from tasks.cli import cli
from tasks.commands.leaks import ALLOWED
from tasks.leaks import KINDS, SAME_IMAGE, SIMILAR_BITS, Others, check_leaks, correlation, fingerprint, nearest_hash

HEADER = "study_id,patient_id,modality,path,split,report\n"


def scene(seed: int) -> Image.Image:
    """A film-like picture: broad shapes, different for every seed."""
    rng = np.random.default_rng(seed)
    broad = Image.fromarray(rng.integers(30, 220, (9, 8), dtype=np.uint8)).resize((160, 180), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(broad, float) + rng.normal(0, 3, (180, 160)), 0, 255).astype(np.uint8))


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    """A table of ten training films, and one of ten others of which four share something with it."""
    for name in ("seen", "new"):
        (tmp_path / name).mkdir()
    lines = {"seen": [], "new": []}
    for i in range(10):
        scene(i).save(tmp_path / "seen" / f"{i}.png")
        lines["seen"].append(f"s{i},p{i},xray,{i}.png,train,Report {i} of the lungs.")
    for i in range(10):
        scene(100 + i).save(tmp_path / "new" / f"{i}.png")
        lines["new"].append(f"n{i},q{i},xray,{i}.png,test,Another report {i}.")
    scene(3).save(tmp_path / "new" / "0.tif")  # the same pixels in another file
    lines["new"][0] = "n0,q0,xray,0.tif,test,report 4  of the Lungs."
    ImageEnhance.Contrast(scene(5)).enhance(0.9).resize((120, 135), Image.Resampling.BILINEAR).save(tmp_path / "new" / "1.jpg", quality=60)
    lines["new"][1] = "n1,q1,xray,1.jpg,test,"
    lines["new"][2] = "n2,p7,xray,2.png,test,Another report 2."
    lines["new"][3] = "s8,q3,xray,3.png,test,Another report 3."
    (tmp_path / "new" / "9.png").write_bytes(b"no image")
    for name, rows in lines.items():
        (tmp_path / name / "table.csv").write_text(HEADER + "\n".join(rows) + "\n")
    return tmp_path / "new" / "table.csv", tmp_path / "seen" / "table.csv"


def test_everything_that_is_shared_is_found_and_nothing_else(tables: tuple[Path, Path]) -> None:
    new, seen = (read_manifest(path) for path in tables)
    found = check_leaks(new.rows, [Others.of("seen", seen)], XrayReader(), trained_on=seen.sha256)
    told = {(leak.kind, leak.study_id, leak.other_study_id) for leak in found.leaks}
    assert told == {("images", "n0", "s3"), ("similar-images", "n1", "s5"), ("patients", "n2", "s7"), ("studies", "s8", "s8")}
    assert found.counts() == dict.fromkeys(KINDS, 1)
    assert found.refused(["images", "studies"]) == {"patients": 1, "similar-images": 1}
    assert (found.shared_texts, found.studies_with_text, found.unread, found.training_table) == (1, 9, 1, True)


def test_what_may_be_allowed_is_what_is_found() -> None:
    assert ALLOWED == KINDS


def test_what_counts_as_seen(tables: tuple[Path, Path]) -> None:
    seen = read_manifest(tables[1])
    assert len(Others.of("", seen).rows) == 10
    assert len(Others.of("", seen, "test").rows) == 10
    assert len(Others.of("", seen, "val").rows) == 10
    assert Others.of("", seen, "train").rows == () and Others.of("", seen, "all").rows == ()
    assert len(Others.of("", seen, "train", trained=True).rows) == 10
    assert len(Others.of("", seen, "all", trained=True).rows) == 10


bit_tables = st.integers(0, 6).flatmap(lambda n: arrays(bool, (n, 256)))


@given(bit_tables, bit_tables)
def test_nearest_hashes_are_those_of_a_loop(bits: Any, others: Any) -> None:
    nearest, distance = nearest_hash(bits, others)
    for i, own in enumerate(bits):
        each = [int((own ^ other).sum()) for other in others]
        assert distance[i] == min(each, default=257)
        assert not each or nearest[i] == each.index(min(each))


def test_correlation_is_that_of_numpy(tmp_path: Path) -> None:
    samples = []
    for i in range(2):
        scene(i).resize((128, 128)).save(tmp_path / "a.png")
        samples.append(XrayReader(size=128).read(tmp_path / "a.png"))
    cells = [one.pixels[0].double().numpy().reshape(64, 2, 64, 2).mean((1, 3)).ravel() for one in samples]
    assert correlation(*samples) == pytest.approx(np.corrcoef(*cells)[0, 1], abs=1e-6)


def test_real_films_are_told_apart_and_their_copies_found(shared_data: Path, tmp_path: Path) -> None:
    reader, films = XrayReader(), sorted((shared_data / "cxr" / "images").glob("*.png"))[::6]
    hashes = np.array([fingerprint(reader.read(film))[1] for film in films])
    for i, film in enumerate(films):
        apart = nearest_hash(hashes[i : i + 1], np.delete(hashes, i, 0))[1][0]
        with Image.open(film) as image:
            image.convert("L").resize((224, 224 * image.height // image.width)).save(tmp_path / "copy.jpg", quality=50)
        copy = reader.read(tmp_path / "copy.jpg")
        assert nearest_hash(fingerprint(copy)[1][None], hashes[i : i + 1])[1][0] <= SIMILAR_BITS < apart
        assert correlation(copy, reader.read(film)) >= SAME_IMAGE


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def test_the_command_refuses_lists_and_goes_on_when_allowed_by_name(tiny: Any, tmp_path: Path) -> None:
    lines = tiny.manifest.read_text().splitlines()
    header = lines[0].split(",")
    with tiny.manifest.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["modality"] == "xray"]
    folder = tmp_path / "other"
    shutil.copytree(tiny.manifest.parent, folder)
    taken = next(row for row in rows if row["split"] == "test" and row["path"])
    with (folder / "trained.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerow({**taken, "study_id": "elsewhere", "patient_id": "someone", "split": "train"})
    ask = (
        "evaluate",
        tiny.manifest,
        "--model",
        tiny.model,
        "--trained-on",
        folder / "trained.csv",
        "--repeats",
        20,
        "--out",
        tmp_path / "out",
    )
    refused = run(*ask)
    assert refused.exit_code == 2 and "1 by images" in refused.output and "--allow-leak images" in refused.output
    assert "someone" not in refused.output and not (tmp_path / "out" / "results.json").exists()
    with (tmp_path / "out" / "leaks.csv").open(newline="") as file:
        (leak,) = csv.DictReader(file)
    assert (leak["kind"], leak["study_id"], leak["other_study_id"], leak["bits"]) == ("images", taken["study_id"], "elsewhere", "0")
    allowed = run(*ask, "--allow-leak", "images")
    told = json.loads((tmp_path / "out" / "results.json").read_text())["leak_check"]
    assert allowed.exit_code in (0, 1), allowed.output
    assert told["shared"] == {"patients": 0, "studies": 0, "images": 1, "similar-images": 0} and told["allowed"] == ["images"]


@pytest.fixture
def leaking(tiny: Any, tmp_path: Path) -> Path:
    """The cohort with its test films as validation and test, and one of them among the training films of another patient."""
    folder = tmp_path / "leaking"
    shutil.copytree(tiny.folder, folder)
    with tiny.manifest.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["modality"] == "xray"]
    for i, row in enumerate(rows):
        row["split"], row["patient_id"] = ("val", "test")[i % 2], f"p{i:02d}"
    for i in (6, 7):
        shutil.copy(folder / rows[i]["path"], folder / f"images/again{i}{Path(rows[i]['path']).suffix}")
        rows.append({**rows[i], "study_id": f"t{i}", "patient_id": f"q{i}", "split": "train"})
        rows[-1]["path"] = f"images/again{i}{Path(rows[i]['path']).suffix}"
    with (folder / "leaking.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return folder / "leaking.csv"


def test_calibration_and_probes_are_refused_what_was_trained_on(tiny: Any, leaking: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    arguments = ["calibrate", leaking, "--model", model, "--finding", "pleural_effusion", "--finding", "cardiomegaly"]
    done = run(*arguments)
    assert done.exit_code == 2 and "1 by images" in done.output, done.output
    with (model / "decisions" / "leaks.csv").open(newline="") as file:
        assert [(row["kind"], row["study_id"], row["other_study_id"]) for row in csv.DictReader(file)] == [("images", "s06", "t6")]
    assert not list((model / "decisions").glob("*.json"))
    allowed = run(*arguments, "--allow-leak", "images")
    assert allowed.exit_code == 0, allowed.output
    (file,) = (model / "decisions").glob("*.json")
    assert json.loads(file.read_text())["fitted_on"]["leak_check"]["allowed"] == ["images"]
    probed = run("probe", "--model", model, "--manifest", leaking, "--out", tmp_path / "probes", "--repeats", 5)
    assert probed.exit_code == 2 and "by images" in probed.output and not (tmp_path / "probes" / "probes.json").exists()
    with (tmp_path / "probes" / "leaks.csv").open(newline="") as file:
        assert ("images", "s07", "t7") in [(row["kind"], row["study_id"], row["other_study_id"]) for row in csv.DictReader(file)]


def test_recipes_are_not_compared_on_studies_that_they_train_on(leaking: Path, tmp_path: Path) -> None:
    done = run("compare", "clip", "--manifest", leaking, "--out", tmp_path / "out", "--seeds", 1, "--images", 16)
    assert done.exit_code == 2 and "by images" in done.output, done.output
    assert (tmp_path / "out" / "leaks.csv").is_file() and not (tmp_path / "out" / "runs").exists()
