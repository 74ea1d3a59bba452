"""Evaluation under a protocol: what it records, that it can be repeated to the byte, and figures against scikit-learn."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import logit
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

import medvl
import tasks.protocols
from medvl.data.manifest import read_manifest
from reports.prompts import load_prompts
from tasks.cli import cli
from tasks.decisions import Decisions
from tasks.protocols import named_protocol
from tasks.scoring import Scorer, preset
from tasks.zero_shot import diagnose


def run(*args, code=0):
    done = CliRunner().invoke(cli, [*map(str, args)])
    assert done.exit_code == code, done.output
    return done


def measured(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def table(tiny, tmp_path_factory):
    """The tiny cohort, half of its patients for validation and half for testing."""
    folder = shutil.copytree(tiny.folder, tmp_path_factory.mktemp("protocol") / "studies")
    path = folder / "manifest.csv"
    with path.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["modality"] == "xray"]
    patients = sorted({line["patient_id"] for line in lines})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({**line, "split": ["val", "test"][patients.index(line["patient_id"]) % 2]} for line in lines)
    return path


def test_the_same_protocol_twice_gives_the_same_bytes(tiny, table, tmp_path):
    base = ["evaluate", table, "--model", tiny.model, "--protocol", "phantom", "--repeats", "50"]
    run(*base, "--out", tmp_path / "one" / "results.json")
    run(*base, "--out", tmp_path / "two" / "mine.json")
    assert (tmp_path / "one" / "results.json").read_bytes() == (tmp_path / "two" / "mine.json").read_bytes()
    found = measured(tmp_path / "one" / "results.json")["protocol"]
    config = json.loads((tiny.model / "config.json").read_text())
    assert found["score"]["weights_sha256"] == config["weights_sha256"] and found["name"] == "phantom" and found["unit"] == "study"
    assert found["score"]["prompts_sha256"] == load_prompts().sha256 and found["score"]["rule"]["name"] == "medvl"
    assert found["manifest_sha256"] == read_manifest(table).sha256 and found["split"] == "test"
    run(*base, "--seed", "1", "--out", tmp_path / "three")
    other = measured(tmp_path / "three" / "results.json")["protocol"]
    assert other["sha256"] != found["sha256"] and other["method_sha256"] != found["method_sha256"]


def test_results_of_another_model_share_the_method_and_not_the_hash(tiny, other_model, table, tmp_path):
    found = []
    for i, model in enumerate((tiny.model, other_model)):
        run("evaluate", table, "--model", model, "--repeats", "0", "--no-baseline", "--out", tmp_path / str(i))
        found.append(measured(tmp_path / str(i) / "results.json")["protocol"])
    assert found[0]["method_sha256"] == found[1]["method_sha256"] and found[0]["sha256"] != found[1]["sha256"]


@pytest.mark.parametrize("name", [None, "chexzero", "gloria"])
def test_figures_of_a_preset_are_those_of_its_scores(tiny, table, tmp_path, name):
    """AUROC and AUPRC by scikit-learn of what `diagnose` gives for the same studies, labels that are not known left out."""
    run(
        "evaluate",
        table,
        "--model",
        tiny.model,
        *(["--preset", name] if name else []),
        "--repeats",
        "20",
        "--no-baseline",
        "--out",
        tmp_path,
    )
    found = measured(tmp_path / "results.json")
    rows = read_manifest(table).select(split="test").rows
    model, prompts = medvl.load(tiny.model, device="cpu"), load_prompts()
    names = list(found["classification"]["findings"])
    scorer = Scorer.of(model, preset(name or "medvl"), prompts, names)
    scores = [one.findings for one in diagnose(model, (), scorer, studies=[[row.path] for row in rows])]
    for finding in names:
        known = [i for i, row in enumerate(rows) if row.labels.get(finding) in (0, 1)]
        truth = [rows[i].labels[finding] for i in known]
        given = [round(scores[i][finding], 9) for i in known]
        own = found["classification"]["findings"][finding]
        if len(set(truth)) < 2:
            assert own["auroc"]["value"] is None
            continue
        assert own["auroc"]["value"] == pytest.approx(roc_auc_score(truth, given), abs=1e-6)
        assert own["auprc"]["value"] == pytest.approx(average_precision_score(truth, given), abs=1e-6)
        assert found["zero_shot"]["per_finding"][finding]["auroc"] == pytest.approx(own["auroc"]["value"], abs=1e-9)
    assert found["calibrated"] is False and found["protocol"]["score"]["rule"]["name"] == (name or "medvl")


def test_probabilities_and_calls_of_validation_are_measured(tiny, table, tmp_path):
    model = shutil.copytree(tiny.model, tmp_path / "model")
    CliRunner().invoke(cli, ["calibrate", str(table), "--model", str(model)])  # which may leave out findings that the cohort has not
    (file,) = (model / "decisions").iterdir()
    decisions = Decisions.from_dict(json.loads(file.read_text()))
    run("evaluate", table, "--model", model, "--repeats", "20", "--no-baseline", "--out", tmp_path / "out")
    found = measured(tmp_path / "out" / "results.json")
    assert decisions.covers(list(found["classification"]["findings"])), decisions.left_out
    assert found["calibrated"] is True and found["protocol"]["decisions_sha256"]
    rows = read_manifest(table).select(split="test").rows
    loaded = medvl.load(model, device="cpu")
    scorer = Scorer.of(loaded, preset("medvl"), load_prompts(), list(found["classification"]["findings"]))
    scores = [one.findings for one in diagnose(loaded, (), scorer, studies=[[row.path] for row in rows])]
    for finding in found["classification"]["findings"]:
        known = [i for i, row in enumerate(rows) if row.labels.get(finding) in (0, 1)]
        truth = np.array([rows[i].labels[finding] for i in known])
        probability = decisions.findings[finding].calibrator.apply(logit([scores[i][finding] for i in known]))
        own = found["classification"]["findings"][finding]
        raw = [round(scores[i][finding], 9) for i in known]
        if len(set(truth.tolist())) == 2:
            assert own["auroc"]["value"] == pytest.approx(roc_auc_score(truth, raw), abs=1e-6)
        assert own["brier"]["value"] == pytest.approx(brier_score_loss(truth, probability), abs=1e-5)
        if truth.any():
            called = probability >= decisions.findings[finding].threshold.value
            assert own["f1"]["value"] == pytest.approx(f1_score(truth, called), abs=1e-6)
    assert found["classification"]["decisions"]["fitted_on"]["split"] == "val"
    both = [name for name, one in found["classification"]["findings"].items() if one["auroc"]["value"] is not None]
    before = [
        brier_score_loss([rows[i].labels[name] for i in known], [scores[i][name] for i in known])
        for name in both
        if (known := [i for i, row in enumerate(rows) if row.labels.get(name) in (0, 1)])
    ]
    assert found["classification"]["before_calibration"]["brier"]["value"] == pytest.approx(np.mean(before), abs=1e-5)


def test_what_a_protocol_fixes_is_not_given_again(tiny, table, tmp_path):
    base = ["evaluate", table, "--model", tiny.model, "--out", tmp_path / "out"]
    for more, said in (
        (["--protocol", "phantom", "--split", "val"], "protocol phantom has test"),
        (["--protocol", "nothing"], "known are chestxray_14, chexpert_14"),
        (["--manifest", table], "give the MANIFEST once"),
        (["--labels", "chexpert_15"], "chexpert_15"),
    ):
        assert said in " ".join(run(*base, *more, code=2).output.split())
    own = tmp_path / "own.yaml"
    own.write_text("split: val\npreset: chexzero\n")
    assert named_protocol(str(own)).preset == "chexzero"
    run(*base, "--protocol", own, "--repeats", "0", "--no-baseline")
    assert measured(tmp_path / "out" / "results.json")["protocol"]["split"] == "val"
    own.write_text("splits: val\n")
    with pytest.raises(ValueError, match="expected a protocol with"):
        named_protocol(str(own))


def test_every_protocol_that_comes_with_the_package_names_what_there_is():
    folder = Path(tasks.protocols.__file__).with_name("evaluation_protocols")
    names = {path.stem for path in folder.glob("*.yaml")}
    assert names >= {
        "phantom",
        "chexpert_14",
        "chestxray_14",
        "vindr_cxr",
        "openi_18",
        "padchest",
        "rsna",
        "siim",
        "ct_rate_18",
        "merlin_30",
    }
    for name in names:
        fixed = named_protocol(name)
        assert preset(fixed.preset) and fixed.split == "test" and fixed.modality in ("xray", "ct")
        if fixed.labels is not None:
            assert fixed.labels == name and load_prompts(name).label_set(name) and fixed.unit == "study"


def test_a_label_set_s_protocol_measures_its_labels_and_says_which_the_table_lacks(tiny, table, tmp_path):
    run("evaluate", table, "--model", tiny.model, "--protocol", "chexpert_14", "--repeats", "5", "--no-baseline", "--out", tmp_path)
    found = measured(tmp_path / "results.json")
    assert found["protocol"]["score"]["label_set"] == "chexpert_14" and found["protocol"]["unit"] == "study"
    assert list(found["zero_shot"]["per_finding"]) == list(load_prompts("chexpert_14").label_set("chexpert_14").values())
    known = {name: one["auroc"] for name, one in found["zero_shot"]["per_finding"].items() if one["auroc"] is not None}
    assert set(known) == {"cardiomegaly", "pleural_effusion"}
    assert found["zero_shot"]["macro_auroc"] == pytest.approx(np.mean(list(known.values())))
    assert len(found["classification"]["macro"]["auroc"]["left_out"]) == 12
    with pytest.raises(AssertionError, match="chexpert_14 has test"):
        run("evaluate", table, "--model", tiny.model, "--protocol", "chexpert_14", "--split", "val", "--out", tmp_path)
