"""`medvl diagnose` into a table: presets, labels as published, going on after a kill, manifests, DICOM SR, and what a bad file costs."""

import csv
import json
import shutil

import pydicom
import pytest
from click.testing import CliRunner

import medvl
from reports.prompts import load_prompts
from tasks.cli import cli
from tasks.diagnosis_table import DiagnosisTable
from tasks.phantoms import write_cohort
from tasks.scoring import Scorer, preset
from tasks.zero_shot import diagnose, group_by_study


def run(*args, code=0):
    done = CliRunner().invoke(cli, ["diagnose", *map(str, args)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def films(tiny, tmp_path):
    """Ten films, of which one is cut short."""
    folder = tmp_path / "films"
    folder.mkdir()
    for file in sorted((tiny.folder / "images").iterdir())[:10]:
        shutil.copy(file, folder)
    bad = folder / "s04.dcm"
    bad.write_bytes(bad.read_bytes()[:600])
    return folder


def rows(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["xplainer", "gloria", "chexzero"])
def test_a_table_has_the_labels_as_published_and_the_scores_of_the_rule(tiny, films, tmp_path, name):
    chosen = ["--finding", "edema", "--finding", "cardiomegaly", "--finding", "pleural_effusion"]
    labels = ["--labels", "chexpert_14", *chosen]
    run(films, "--model", tiny.model, "--preset", name, *labels, "--out", tmp_path / "scores.csv", code=1)
    found = rows(tmp_path / "scores.csv")
    assert list(found[0])[:6] == ["id", "ok", "error", "Edema", "Cardiomegaly", "Pleural Effusion"]
    model = medvl.load(tiny.model, device="cpu")
    scorer = Scorer.of(model, preset(name), load_prompts("chexpert_14"), ["edema", "cardiomegaly", "pleural_effusion"], "chexpert_14")
    files = sorted(films.iterdir())
    expected = list(diagnose(model, files, scorer))
    assert len(found) == len(expected) == 10
    for line, one in zip(found, expected, strict=True):
        assert line["id"] == one.path and json.loads(line["paths"]) == list(one.paths) and line["ok"] == str(int(one.ok))
        if one.ok:
            assert float(line["Edema"]) == pytest.approx(one.findings["edema"], rel=1e-5, abs=1e-6)
        else:
            assert line["Edema"] == "" and "s04.dcm" in line["error"]
    assert {line["calibrated"] for line in found} == {"0"} and {line["notice"] for line in found} == {"research use, not for diagnosis"}
    assert len({line["protocol"] for line in found}) == 1 and len(found[0]["protocol"]) == 64
    with (tmp_path / "scores.rejected.csv").open() as file:
        assert [line["path"] for line in csv.DictReader(file)] == [str(films / "s04.dcm")]


@pytest.mark.parametrize("name", ["scores.csv", "scores.jsonl"])
@pytest.mark.parametrize("cut", [1, 40, 700, 2500])
def test_a_killed_run_goes_on_and_ends_with_what_one_run_writes(tiny, films, tmp_path, monkeypatch, name, cut):
    """Whatever byte the kill came at; what is there is not read again."""
    import modalities.xray.reader as reader

    whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
    args = [films, "--model", tiny.model, "--finding", "edema", "--finding", "lung_nodule"]
    run(*args, "--out", whole, code=1)
    killed.parent.mkdir()
    content = whole.read_bytes()[:-cut]
    killed.write_bytes(content)
    left, read = 10 - (content.count(b"\n") - (name == "scores.csv")), []
    original = reader.XrayReader.read
    monkeypatch.setattr(reader.XrayReader, "read", lambda self, path: read.append(path) or original(self, path))
    run(*args, "--out", killed, code=1)
    assert len(read) == min(left, 10)
    one, other = rows(whole), rows(killed)
    assert [line["id"] for line in one] == [line["id"] for line in other]
    for a, b in zip(one, other, strict=True):
        if a["ok"] in (True, "1"):
            assert float(a["edema"]) == pytest.approx(float(b["edema"]), rel=1e-6)  # of another batch
        else:
            assert a == b
    assert (whole.parent / "scores.rejected.csv").read_text() == (killed.parent / "scores.rejected.csv").read_text()


def test_a_table_of_another_protocol_is_not_gone_on_with(tiny, films, tmp_path):
    out = tmp_path / "scores.csv"
    base = [films, "--model", tiny.model, "--out", out]
    run(*base, "--finding", "edema", code=1)
    for more in (["--finding", "cardiomegaly"], ["--finding", "edema", "--preset", "chexzero"]):
        assert "give --anew" in run(*base, *more, code=2).output
    run(*base, "--finding", "edema", "--preset", "chexzero", "--anew", code=1)
    before = out.read_text()
    run(*base, "--finding", "edema", "--preset", "chexzero", code=1)
    assert out.read_text() == before
    run(*base, "--finding", "edema", "--preset", "gloria", "--anew", code=1)
    assert "depend on all studies of a run" in " ".join(run(*base, "--finding", "edema", "--preset", "gloria", code=2).output.split())


def test_the_studies_of_a_manifest_have_its_ids(tiny, tmp_path):
    done = run(tiny.manifest, "--model", tiny.model, "--finding", "edema", "--out", tmp_path / "scores.jsonl", code=1)
    found = rows(tmp_path / "scores.jsonl")
    assert [line["id"] for line in found][:3] == ["s00", "s01", "s02"] and found[-1]["id"] == "s-ct" and not found[-1]["ok"]
    assert sum(line["ok"] for line in found) == 26 and "1 rejected" in done.output


def test_signs_explain_a_finding(tiny):
    done = run(tiny.dicom, "--model", tiny.model, "--labels", "chexpert_14", "--finding", "edema", "--preset", "xplainer", "--json")
    found = json.loads(done.stdout.splitlines()[0])
    signs = found["signs"]["Edema"]
    assert set(signs) == {one.descriptor for one in load_prompts("chexpert_14").descriptors("edema")}
    product = 1.0
    for value in signs.values():
        product *= value
    assert found["findings"]["Edema"] == pytest.approx(product ** (1 / len(signs)), rel=1e-6)
    shown = run(tiny.dicom, "--model", tiny.model, "--labels", "chexpert_14", "--finding", "edema", "--preset", "xplainer")
    assert all(sign[:12] in shown.output for sign in signs)


def test_a_report_in_dicom_is_written_of_what_is_dicom(tiny, tmp_path):
    pytest.importorskip("highdicom", reason="DICOM SR needs the extra 'sr'")
    write_cohort(tmp_path / "data", 1, 3, size=64, counts={"train": 1}, workers=1)
    (film,) = (tmp_path / "data" / "xray").glob("*.dcm")
    done = run(film, tiny.png, "--model", tiny.model, "--finding", "edema", "--sr", tmp_path / "sr", "--json", code=1)
    (file,) = (tmp_path / "sr").iterdir()
    report = pydicom.dcmread(file)
    assert report.StudyInstanceUID == pydicom.dcmread(film).StudyInstanceUID
    score = json.loads(done.stdout.splitlines()[0])["findings"]["edema"]
    assert f"{score:.4f}"[:6] in str(report)
    assert "no SR" in done.stderr and tiny.png.name in done.stderr


def test_names_that_are_not_there_are_refused(tiny, tmp_path):
    for more, said in (
        (["--preset", "chexone"], "no scoring preset chexone"),
        (["--labels", "chexpert_15"], "chexpert_15"),
        (["--preset", "xplainer", "--finding", "edema"], "needs descriptors"),
        (["--out", str(tmp_path / "scores.txt")], "ends in .csv or .jsonl"),
    ):
        assert said in " ".join(run(tiny.dicom, "--model", tiny.model, *more, code=2).output.split())


def test_a_name_with_quotes_and_line_breaks_survives(tmp_path):
    path = tmp_path / "t.csv"
    odd = 'a "film",\nnew line.dcm'
    with DiagnosisTable(path, ["x"], "h") as table:
        table.add(odd, True, None, {"x": 0.5}, [odd])
        table.add("b", False, 'b: "no" image', {}, ["b"])
    for cut in range(1, len(path.read_bytes())):
        shorter = tmp_path / "cut.csv"
        shorter.write_bytes(path.read_bytes()[:-cut])
        with DiagnosisTable(shorter, ["x"], "h") as table:
            assert table.done <= {odd, "b"}
            table.add(odd, True, None, {"x": 0.5}, [odd])
            table.add("b", False, 'b: "no" image', {}, ["b"])
        assert shorter.read_bytes() == path.read_bytes()


def test_studies_are_those_of_headers(tiny):
    model = medvl.load(tiny.model, device="cpu")
    files = sorted((tiny.folder / "images").iterdir())[:4]
    assert group_by_study(model.reader, files) == [[file] for file in files]
