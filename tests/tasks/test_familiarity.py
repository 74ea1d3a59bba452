"""What a model was not made for: photographs, lateral films and other parts of the body, in every output, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import skimage
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

import medvl
from medvl.metrics.familiarity import FEWEST
from medvl.model import DualEncoder
from medvl.nn.similarity import TokenSimilarity
from medvl.types import FINDINGS, ImageBatch, ImageFeatures
from modalities.ct.reader import CtReader
from modalities.dicom import Stated, stated
from modalities.export import write_ct_series, write_radiograph_dicom
from modalities.xray import ConvEncoder, XrayReader
from reports import MiniLmReportEncoder
from tasks.cli import cli
from tasks.familiarity import (
    Familiar,
    FamiliarityError,
    fit_familiarity,
    load_familiarity,
    place_of,
    stated_of,
    terms_of,
    unlike_terms,
)
from tasks.phantoms import write_cohort
from tasks.zero_shot import Diagnosis, Encoded, appearance

SIZE, COUNTS = 64, {"train": 100, "val": 100, "test": 30}
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")
ASKED = ["--finding", "cardiomegaly", "--finding", "pleural_effusion"]


def run(*args, code=0):
    done = CliRunner().invoke(cli, [*map(str, args)])
    assert done.exit_code == code, done.output
    return done


def rows(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Frontal phantoms."""
    return write_cohort(tmp_path_factory.mktemp("frontal"), sum(COUNTS.values()), 11, size=SIZE, counts=COUNTS, workers=1).parent


@pytest.fixture(scope="module")
def laterals(tmp_path_factory):
    """Lateral films of other phantoms, and the same without a header."""
    folder = tmp_path_factory.mktemp("lateral")
    write_cohort(folder, 8, 12, size=SIZE, lateral=True, workers=1)
    films = sorted((folder / "xray").glob("*lateral.dcm"))
    reader = XrayReader(SIZE)
    for film in films:
        Image.fromarray((reader.native(film).numpy() * 255).round().astype(np.uint8)).save(film.with_suffix(".png"))
    return films


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    """A small tower that has learned a little of what the training phantoms have, and no calibration."""
    torch.manual_seed(0)
    tower, reader = ConvEncoder(embed_dim=48, widths=(16, 32, 64), blocks=(1, 1, 1)), XrayReader(SIZE)
    lines = [line for line in rows(cohort / "manifest.csv") if line["split"] == "train"]
    batch = reader.collate([reader.read(cohort / line["path"]) for line in lines])
    truth = torch.tensor([[float(line[name] == "1") for name in FINDINGS] for line in lines])
    head = torch.nn.Linear(48, len(FINDINGS))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], 1e-3)
    for _ in range(15):
        some = torch.randperm(len(lines))[:24]
        given = ImageBatch(batch.pixels[some], batch.valid[some])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(tower(given).pooled), truth[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = MiniLmReportEncoder(48, hidden_dim=None)
    return DualEncoder(tower.eval(), report, TokenSimilarity(), reader).save(tmp_path_factory.mktemp("runs") / "trained")


@pytest.fixture(scope="module")
def calibrated(trained, cohort, tmp_path_factory):
    """The same with what `medvl calibrate` leaves."""
    model = shutil.copytree(trained, tmp_path_factory.mktemp("calibrated") / "trained")
    done = CliRunner().invoke(cli, ["calibrate", str(cohort / "manifest.csv"), "--model", str(model), *ASKED])
    assert done.exit_code in (0, 1), done.output
    assert (
        "images lie within" in done.output
        and "The farthest image sets this limit" in done.output
        and "xray.safetensors" in done.output.replace("\n", "")
    )
    return model


@pytest.fixture
def hand(cohort, tmp_path):
    """A frontal phantom whose header says that it is a hand, and more that nobody may see."""
    ds = pydicom.dcmread(next(iter(sorted((cohort / "xray").iterdir()))))
    ds.BodyPartExamined, ds.PatientName, ds.StudyDescription = "HAND", "Secret^Name", "SECRET reason"
    ds.StudyInstanceUID = "1.2.3.4.5"
    path = tmp_path / "hand.dcm"
    ds.save_as(path)
    return path


def told(model, *paths, more=()):
    done = run("diagnose", *paths, "--model", model, *ASKED, "--json", *more)
    return [json.loads(line) for line in done.stdout.splitlines()]


def photographs():
    return [Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS]


def test_photographs_and_laterals_are_flagged_and_films_like_those_of_calibration_seldom(calibrated, cohort, laterals):
    of_photos = told(calibrated, *photographs())
    assert all("image unlike those of calibration: distance" in one["unfamiliar"] and one["ok"] for one in of_photos)
    assert all(set(one["findings"]) == {"cardiomegaly", "pleural_effusion"} for one in of_photos)
    of_films = told(calibrated, *laterals)
    assert all("view L" in one["unfamiliar"] for one in of_films)  # what the header says
    of_pictures = told(calibrated, *(film.with_suffix(".png") for film in laterals))
    assert all(one["unfamiliar"] is None or "view" not in one["unfamiliar"] for one in of_pictures)
    held_out = [cohort / line["path"] for line in rows(cohort / "manifest.csv") if line["split"] == "test"]
    assert sum(one["unfamiliar"] is not None for one in told(calibrated, *held_out)) <= 2
    known, model = loaded(calibrated), medvl.load(calibrated, device="cpu")
    frontal, lateral = (
        known.gaussian.distances(appearance(model.encode_image(paths)).numpy())
        for paths in (held_out, [film.with_suffix(".png") for film in laterals])
    )
    truth = [0] * len(frontal) + [1] * len(lateral)
    assert roc_auc_score(truth, np.concatenate([frontal, lateral])) > 0.9  # what it looks like alone, to a tower that knows this little


def loaded(model):
    path = place_of(model, "xray")
    record = load_raw(path)
    return load_familiarity(path, record["weights_sha256"], record["preprocessing_sha256"])


def looks(model, paths):
    """Direction of the pooled vector and of the mean valid token, a loop over images, each as (2 D,) divided by its length."""
    features = model.encode_image(paths)
    found = []
    for pooled, tokens, valid in zip(features.pooled.double(), features.tokens.double(), features.token_valid, strict=True):
        mean = tokens[valid].numpy().mean(0)
        both = np.concatenate([pooled.numpy() / np.linalg.norm(pooled.numpy()), mean / np.linalg.norm(mean)])
        found.append(both / np.sqrt(2))
    return np.array(found)


def test_tokens_that_are_padding_do_not_move_how_an_image_looks_and_a_tower_without_tokens_has_one():
    rng = torch.Generator().manual_seed(0)
    pooled, tokens = torch.randn(2, 3, generator=rng), torch.randn(2, 4, 3, generator=rng)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    own = appearance(ImageFeatures(pooled, tokens, token_valid=valid))
    tokens[1, 2:] = torch.nan
    assert torch.equal(appearance(ImageFeatures(pooled, tokens, token_valid=valid)), own) and own.shape == (2, 6)
    torch.testing.assert_close(own[1, 3:], torch.nn.functional.normalize(tokens[1, :2].double().mean(0), dim=0))
    torch.testing.assert_close(appearance(ImageFeatures(pooled)), torch.nn.functional.normalize(pooled.double(), dim=1))


def test_the_distance_and_the_limit_are_those_of_the_features(calibrated, cohort):
    """By scikit-learn, from features of the model's own method."""
    model = medvl.load(calibrated, device="cpu")
    lines = [line for line in rows(cohort / "manifest.csv") if line["split"] == "val"]
    unit = looks(model, [cohort / line["path"] for line in lines])
    fitted = LedoitWolf().fit(unit)
    distance = float(np.sqrt(fitted.mahalanobis(looks(model, photographs()[:1]))[0]))
    (said,) = told(calibrated, photographs()[0])
    words = said["unfamiliar"].split()
    assert float(words[words.index("distance") + 1].rstrip(",")) == pytest.approx(distance, rel=0.02)
    config = json.loads((calibrated / "config.json").read_text())
    own = (calibrated / "familiarity" / "xray.safetensors").read_bytes()
    record = json.loads(json.loads(own[8 : 8 + int.from_bytes(own[:8], "little")])["__metadata__"]["record"])
    assert record["weights_sha256"] == config["weights_sha256"] and record["limit"]["count"] == len(lines) == 100
    assert record["limit"]["inside"] == 100 and record["fitted_on"]["quantile"] == 0.99
    assert record["terms"] == {"modality": {"DX": 100}, "body_part": {"CHEST": 100}, "projection": {"frontal": 100}}
    assert record["fitted_on"]["patients"] == len({line["patient_id"] for line in lines})
    assert f"100 of 100 lie within {record['limit']['distance']:.1f}" in said["unfamiliar"]
    within = np.sqrt(fitted.mahalanobis(unit)) <= record["limit"]["distance"]
    assert within.all()  # cross-fitted distances are larger than those of a fit to the image itself


def test_prompts_and_presets_do_not_matter(calibrated, tmp_path):
    plain, preset = told(calibrated, photographs()[0])[0], told(calibrated, photographs()[0], more=["--preset", "chexzero"])[0]
    assert plain["unfamiliar"] == preset["unfamiliar"] and plain["calibrated"] and not preset["calibrated"]


def test_without_calibration_the_header_alone_speaks_and_the_command_says_so(trained, cohort, laterals, hand):
    films = sorted((cohort / "xray").iterdir())[:2]
    done = run("diagnose", *films, *photographs()[:1], *laterals[:1], hand, "--model", trained, *ASKED, "--json")
    found = [json.loads(line)["unfamiliar"] for line in done.stdout.splitlines()]
    assert found[:3] == [None] * 3 and found[3] == f"view {pydicom.dcmread(laterals[0]).ViewPosition}" and found[4] == "body part HAND"
    assert "familiarity/xray.safetensors, which `medvl calibrate` makes" in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["scores.csv", "scores.jsonl"])
def test_tables_and_reports_carry_it(calibrated, cohort, hand, tmp_path, name):
    pytest.importorskip("highdicom", reason="DICOM SR needs the extra 'sr'")
    held_out = next(cohort / line["path"] for line in rows(cohort / "manifest.csv") if line["split"] == "val")
    out, args = tmp_path / name, [held_out, hand, "--model", calibrated, *ASKED]
    done = run("diagnose", *args, "--out", out, "--sr", tmp_path / "sr", "--csv", tmp_path / "all.csv")
    first, second = rows(out)
    assert not first["unfamiliar"] and second["unfamiliar"] == "body part HAND" and float(second["cardiomegaly"]) >= 0
    assert [line["unfamiliar"] for line in rows(tmp_path / "all.csv")] == ["", "body part HAND"]
    assert "1 of 2 studies are not what the model was made for" in done.output
    reports = {report.StudyInstanceUID: str(report) for report in map(pydicom.dcmread, (tmp_path / "sr").iterdir())}
    assert "body part HAND" in reports.pop("1.2.3.4.5") and "made for" not in next(iter(reports.values()))
    text = out.read_text()
    assert "Secret" not in text and "SECRET" not in text
    shown = " ".join(run("diagnose", *args).output.split())
    assert "not what the model was made for: body part HAND" in shown


@pytest.mark.parametrize("name", ["scores.csv", "scores.jsonl"])
def test_a_killed_run_ends_with_the_bytes_of_one_run(calibrated, cohort, hand, laterals, tmp_path, name):
    films = [*sorted((cohort / "xray").iterdir())[:2], hand, *laterals[:2], *photographs()[:2]]
    args = ["diagnose", *films, "--model", calibrated, *ASKED, "--batch-size", 1, "--out"]
    whole = tmp_path / "whole" / name
    said = run(*args, whole).output
    content = whole.read_bytes()
    for cut in (1, 300, len(content) // 2, len(content) - 10):
        killed = tmp_path / f"{cut}{name}"
        killed.write_bytes(content[:-cut])
        assert "5 of 7 studies" in said and "5 of 7 studies" in run(*args, killed).output
        assert killed.read_bytes() == content


def test_a_table_from_before_calibration_is_not_gone_on_with(trained, calibrated, hand, tmp_path):
    out = tmp_path / "scores.csv"
    other = ["--finding", "edema"]  # without decisions before and after
    run("diagnose", hand, "--model", trained, *other, "--out", out)
    assert "give --anew" in run("diagnose", hand, "--model", calibrated, *other, "--out", out, code=2).output


def test_a_study_of_several_films_names_the_one(calibrated, cohort, hand, laterals, tmp_path):
    pytest.importorskip("highdicom", reason="DICOM SR needs the extra 'sr'")
    together = []
    for film in (sorted((cohort / "xray").iterdir())[0], hand):
        ds = pydicom.dcmread(film)
        ds.StudyInstanceUID, ds.SOPInstanceUID = "1.2.3.9", f"1.2.3.9.{len(together)}"
        ds.PatientID = ds.PatientName = "p"
        together.append(tmp_path / f"film{len(together)}.dcm")
        ds.save_as(together[-1])
    (one,) = told(calibrated, *together, more=["--sr", tmp_path / "sr"])
    assert one["unfamiliar"] == f"{together[1]}: body part HAND"
    (report,) = (tmp_path / "sr").iterdir()
    assert "body part HAND" in str(pydicom.dcmread(report)) and "film1.dcm" not in str(pydicom.dcmread(report))


def test_what_belongs_to_other_weights_or_preprocessing_is_refused(calibrated, trained, hand, tmp_path):
    other = medvl.load(trained, device="cpu")
    with torch.no_grad():
        other.image.pool[1].bias += 1
    folder = other.save(tmp_path / "other")
    shutil.copytree(calibrated / "familiarity", folder / "familiarity")
    assert "other weights or another preprocessing" in " ".join(run("diagnose", hand, "--model", folder, code=2).output.split())
    path = place_of(calibrated, "xray")
    weights, preprocessing = (load_raw(path)[key] for key in ("weights_sha256", "preprocessing_sha256"))
    assert load_familiarity(path, weights, preprocessing).modality == "xray"
    with pytest.raises(FamiliarityError, match="another preprocessing"):
        load_familiarity(path, weights, "0" * 64)
    damaged = tmp_path / "xray.safetensors"
    for content in (path.read_bytes()[:-9], b"", b"x" * 200, path.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 9')):
        damaged.write_bytes(content)
        with pytest.raises(FamiliarityError, match=r"that `medvl calibrate` wrote|format 9"):
            load_familiarity(damaged, weights, preprocessing)


def load_raw(path):
    content = path.read_bytes()
    return json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["record"])


def test_it_comes_back_from_its_file_with_the_same_bytes(tmp_path):
    features = np.random.default_rng(0).normal(size=(30, 5)) + 2
    patients = [str(i) for i in range(30)]
    hashes = {"weights_sha256": "a", "preprocessing_sha256": "b", "modality": "ct"}
    made = fit_familiarity(features, patients, {"body_part": {"CHEST": 3}}, **hashes, fitted_on={"split": "val"})
    made.save(tmp_path / "x" / "ct.safetensors")
    again = load_familiarity(tmp_path / "x" / "ct.safetensors", "a", "b")
    assert again.to_bytes() == made.to_bytes() and again.terms == {"body_part": {"CHEST": 3}}
    far = np.eye(5)[:1] * -4
    assert again.unlike(far) == made.unlike(far) and made.unlike(far)[0].startswith("image unlike")
    assert made.unlike(features[:1] * 3) == [None]
    for count, said in ((FEWEST - 1, "at least 20"), (FEWEST, "one patient")):
        with pytest.raises(FamiliarityError, match=said):
            fit_familiarity(features[:count], ["p"] * count, {}, **hashes)


def test_too_few_images_are_said_and_leave_no_file(trained, cohort, tmp_path):
    model = shutil.copytree(trained, tmp_path / "model")
    lines = rows(cohort / "manifest.csv")
    few = cohort / "few.csv"
    with few.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows([line for line in lines if line["split"] == "val"][: FEWEST - 1])
    done = CliRunner().invoke(cli, ["calibrate", str(few), "--model", str(model), *ASKED])
    assert done.exit_code in (0, 1) and "19 images: at least 20" in done.output and not (model / "familiarity").exists()


def test_decisions_kept_elsewhere_have_it_beside_them(trained, cohort, tmp_path):
    place = tmp_path / "kept" / "mine.json"
    CliRunner().invoke(cli, ["calibrate", str(cohort / "manifest.csv"), "--model", str(trained), *ASKED, "--out", str(place)])
    assert sorted(path.name for path in place.parent.iterdir()) == ["mine.json", "mine.xray.safetensors"]
    (one,) = told(trained, photographs()[0], more=["--decisions", place])
    assert "image unlike" in one["unfamiliar"]
    assert told(trained, photographs()[0])[0]["unfamiliar"] is None


@pytest.mark.parametrize(
    ("found", "modality", "terms", "several", "expected"),
    [
        (Stated("DX", "CHEST", "PA"), "xray", {}, False, []),
        (Stated("CR", "THORAX", "AP"), "xray", {"projection": {"frontal": 3}}, False, []),
        (Stated(), "xray", {"projection": {"frontal": 3}, "body_part": {"CHEST": 3}}, False, []),
        (Stated("CR", "HAND", "PA"), "xray", {}, False, ["body part HAND"]),
        (Stated("CR", "HAND", "PA"), "xray", {"body_part": {"HAND": 9}}, False, []),
        (Stated("CR", "CHEST", "PA"), "xray", {"body_part": {"HAND": 9}}, False, ["body part CHEST"]),
        (Stated("CR", "LUNG", "PA"), "xray", {"body_part": {"HAND": 9, "CHEST": 1}}, False, []),
        (Stated("MG", "BREAST", "MLO"), "xray", {}, False, ["body part BREAST", "modality MG", "view MLO"]),
        (Stated("MG", None, None), "xray", {"modality": {"MG": 1}}, False, []),
        (Stated("OT", None, None), "xray", {}, False, []),
        (Stated("DX", None, "LL"), "xray", {}, False, ["view LL"]),
        (Stated("DX", None, "LL"), "xray", {"projection": {"frontal": 9}}, True, ["view LL"]),
        (Stated("DX", None, "LL"), "xray", {"projection": {"frontal": 9, "lateral": 1}}, False, []),
        (Stated("DX", None, "PA"), "xray", {"projection": {"lateral": 9}}, False, ["view PA"]),
        (Stated("DX", None, "LATERAL"), "xray", {}, True, []),
        (Stated("DX", None, "RAO"), "xray", {}, True, ["view RAO"]),
        (Stated("CT", "HEAD", None), "ct", {}, False, ["body part HEAD"]),
        (Stated("CT", "CHESTABDOMEN", None), "ct", {"body_part": {"CHEST": 4}}, False, []),
    ],
)
def test_what_a_header_says_is_held_against_calibration_or_the_chest_from_the_front(found, modality, terms, several, expected):
    assert unlike_terms(found, modality, terms, several) == expected


def test_the_view_of_the_table_counts_over_that_of_the_file():
    images = [(Stated("DX", None, "PA"), None), (Stated("DX", "CHEST", "PA"), "lateral"), (Stated(), "AP"), (Stated(), "upside down")]
    assert terms_of(images) == {"modality": {"DX": 2}, "body_part": {"CHEST": 1}, "projection": {"frontal": 2, "lateral": 1}}


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_only_known_terms_leave_a_header(tmp_path):
    path = tmp_path / "film.dcm"
    pixels = np.zeros((16, 16), np.uint16)
    pixels[4:9] = 900
    write_radiograph_dicom(path, pixels, view="lateral", spacing_mm=(1, 1), patient_id="p", study_id="s")
    assert stated(path) == Stated("DX", "CHEST", pydicom.dcmread(path).ViewPosition) and stated(path).projection == "lateral"
    ds = pydicom.dcmread(path)
    for part, view, modality, expected in (
        ("T-SPINE", "pa ", "cr", Stated("CR", "TSPINE", "PA")),
        ("DOE JOHN", "DOE", "XX", Stated()),
        ("", "", "", Stated()),
    ):
        ds.BodyPartExamined, ds.ViewPosition, ds.Modality = part, view, modality
        ds.save_as(path)
        assert stated(path) == expected
    for content in (b"", b"\0" * 128 + b"DICM" + b"nothing", b"\x89PNG"):
        path.write_bytes(content)
        assert stated(path) == Stated()
    assert stated(tmp_path) == stated(tmp_path / "absent") == Stated()


def test_a_series_says_what_its_first_slice_says(tmp_path):
    affine = np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    write_ct_series(tmp_path / "ct", np.zeros((3, 8, 8), np.int16), affine, patient_id="p", study_id="s")
    (tmp_path / "ct" / "0000.txt").write_text("no slice")
    for file in (tmp_path / "ct").glob("*.dcm"):
        ds = pydicom.dcmread(file)
        ds.BodyPartExamined = "HEAD"
        ds.save_as(file)
    reader = CtReader()
    assert stated_of(reader, tmp_path / "ct").body_part == "HEAD"
    assert stated_of(reader, tmp_path / "empty") == Stated()


def test_films_that_are_pooled_are_measured_as_one_study(tmp_path):
    rng = np.random.default_rng(0)
    hashes = {"weights_sha256": "a", "preprocessing_sha256": "b", "modality": "xray"}
    known = fit_familiarity(rng.normal(size=(40, 3)) * 0.1 + 1, [str(i) for i in range(40)], {}, **hashes)
    paths = (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    result = Diagnosis(paths, True, encoded=(Encoded(paths, "xray", torch.tensor([-5.0, 0, 0], dtype=torch.float64)),))
    ((path, reason),) = Familiar(XrayReader(SIZE), True, {"xray": known}).reasons(result)
    assert path == "" and reason.startswith("study unlike those of calibration")
    assert Familiar(XrayReader(SIZE), True).reasons(result) == ()
