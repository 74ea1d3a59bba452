"""Calibration, thresholds and sets beside a model: what is fitted, what a diagnosis makes of it, and whose scores it is for."""

import csv
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import expit, logit

from medvl.metrics import ConformalBinary, Platt, choose_threshold
from tasks.cli import cli
from tasks.decisions import Decisions, DecisionsError, fit_decisions, load_decisions, place_of
from tasks.protocols import sha256_of


def run(*args, code=0):
    done = CliRunner().invoke(cli, [*map(str, args)])
    assert done.exit_code == code, done.output
    return done


def cohort(n=300, seed=0):
    """Two findings whose scores are logits about right, and one that nobody has; every third patient has two studies."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 3)) < (0.3, 0.5, 0.0)).astype(float)
    labels[rng.random((n, 3)) < 0.1] = np.nan
    labels[rng.random((n, 3)) < 0.05] = -1
    scores = expit(np.nan_to_num(labels) * 1.5 + rng.normal(0, 1, (n, 3)) - 2)
    patients = [str(i if i % 3 else max(0, i - 1)) for i in range(n)]
    return scores, labels, patients


def test_each_finding_is_fitted_to_what_is_known_of_it():
    scores, labels, patients = cohort()
    made = fit_decisions(scores, labels, patients, ("a", "b", "c"), "p", of_odds=True, coverage=0.8)
    assert set(made.findings) == {"a", "b"} and "0 patients with it" in made.left_out["c"]
    first = np.array([patients.index(p) == i for i, p in enumerate(patients)])
    assert made.fitted_on["patients"] == first.sum() < made.fitted_on["studies"] == 300
    for i, name in enumerate("ab"):
        known = np.isin(labels[:, i], (0, 1))
        platt = Platt.fit(logit(scores[known, i]), labels[known, i])
        probability = platt.apply(logit(scores[:, i]))
        np.testing.assert_allclose([made.probabilities({name: s})[name] for s in scores[:5, i]], probability[:5], rtol=1e-9)
        chosen = choose_threshold(labels[known, i], probability[known], "youden")
        assert made.findings[name].threshold.value == pytest.approx(chosen.value)
        alone = known & first
        sets = ConformalBinary.fit(probability[alone], labels[alone, i], 0.2)
        assert made.findings[name].sets == sets
        for p in probability[:20]:
            found = made.decide({name: float(p)})[name]
            assert found["call"] == ("present" if p >= chosen.value else "absent")
            inside = [word for word, kept in (("absent", p <= sets.limit_absent), ("present", 1 - p <= sets.limit_present)) if kept]
            assert found["set"] == inside and found["abstains"] == (len(inside) != 1)


@pytest.mark.parametrize("method", ["platt", "isotonic", "temperature"])
def test_decisions_come_back_from_their_file(tmp_path, method):
    scores, labels, patients = cohort()
    made = fit_decisions(scores, labels, patients, ("a", "b", "c"), "p", of_odds=True, method=method)
    path = place_of(tmp_path, "p" * 64)
    made.save(path)
    again = load_decisions(path, "p")
    assert again.to_dict() == made.to_dict() and "research use" in path.read_text()
    given = {name: float(scores[0, i]) for i, name in enumerate("abc") if name in made.findings}
    assert again.probabilities(given) == made.probabilities(given)
    with pytest.raises(DecisionsError, match="no calibration of c"):
        again.probabilities({"c": 0.5})
    with pytest.raises(DecisionsError, match="fitted to the scores of another model"):
        load_decisions(path, "q")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DecisionsError, match="no decisions that"):
        load_decisions(path, "p")
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(DecisionsError, match="format 99"):
        load_decisions(path, "p")


def test_scores_that_are_no_odds_are_calibrated_as_they_are():
    scores, labels, patients = cohort()
    values = scores * 8 - 3
    made = fit_decisions(values, labels, patients, ("a", "b", "c"), "p", of_odds=False)
    known = np.isin(labels[:, 0], (0, 1))
    platt = Platt.fit(values[known, 0], labels[known, 0])
    assert made.probabilities({"a": -1.0})["a"] == pytest.approx(float(platt.apply([-1.0])[0]))


@pytest.fixture
def model(tiny, tmp_path):
    return shutil.copytree(tiny.model, tmp_path / "model")


@pytest.fixture
def table(tiny, tmp_path):
    """All studies of the tiny cohort as validation studies."""
    shutil.copytree(tiny.folder, tmp_path / "studies")
    path = tmp_path / "studies" / "manifest.csv"
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({**line, "split": "val"} for line in lines)
    return path


def test_a_calibrated_model_gives_probabilities(tiny, table, model, tmp_path):
    chosen = ["--finding", "cardiomegaly", "--finding", "pleural_effusion"]
    before = json.loads(run("diagnose", tiny.dicom, "--model", model, *chosen, "--json").stdout.splitlines()[0])
    assert before["calibrated"] is False and "decisions" not in before
    said = run("calibrate", table, "--model", model, *chosen)
    (file,) = (model / "decisions").iterdir()
    assert file.name in said.output.replace("\n", "") and "cardiomegaly" in said.output
    made = Decisions.from_dict(json.loads(file.read_text()))
    after = json.loads(run("diagnose", tiny.dicom, "--model", model, *chosen, "--json").stdout.splitlines()[0])
    assert after["calibrated"] is True and set(after["decisions"]) == {"cardiomegaly", "pleural_effusion"}
    assert after["protocol"] != before["protocol"]
    for name, score in before["findings"].items():
        calibrator = made.findings[name].calibrator
        assert after["findings"][name] == pytest.approx(float(calibrator.apply([logit(score)])[0]), rel=1e-6)
    shown = run("diagnose", tiny.dicom, "--model", model, *chosen).output
    assert "probability" in shown and "not ruled out" in shown and "90% coverage" in " ".join(shown.split())
    run("diagnose", tiny.dicom, "--model", model, *chosen, "--out", tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as table:
        (line,) = csv.DictReader(table)
    assert line["calibrated"] == "1" and float(line["cardiomegaly"]) == pytest.approx(after["findings"]["cardiomegaly"])
    # of one finding it holds as well, of another rule or a finding that it has not it does not
    assert json.loads(run("diagnose", tiny.dicom, "--model", model, *chosen[:2], "--json").stdout.splitlines()[0])["calibrated"] is True
    other = run("diagnose", tiny.dicom, "--model", model, *chosen, "--preset", "chexzero", "--json")
    assert json.loads(other.stdout.splitlines()[0])["calibrated"] is False
    more = run("diagnose", tiny.dicom, "--model", model, *chosen, "--finding", "edema", "--json")
    assert json.loads(more.stdout.splitlines()[0])["calibrated"] is False and "no calibration of edema" in more.stderr
    wrong = run("diagnose", tiny.dicom, "--model", model, *chosen, "--preset", "chexzero", "--decisions", file, code=2)
    assert "another model, preset" in " ".join(wrong.output.split())


def test_what_cannot_be_calibrated_is_said(table, model):
    for more, said in (
        (["--preset", "gloria", "--finding", "cardiomegaly"], "cannot be calibrated"),
        (["--split", "train"], "no xray row of split 'train'"),
        (["--split", "test"], "'test' is not one of"),
        (["--threshold", "at_sensitivity"], "--wanted goes with"),
        (["--wanted", "0.9"], "--wanted goes with"),
    ):
        assert said in " ".join(run("calibrate", table, "--model", model, *more, code=2).output.split())


def test_a_hash_does_not_hang_on_the_order_of_keys():
    assert sha256_of({"a": 1, "b": [2]}) == sha256_of({"b": [2], "a": 1}) != sha256_of({"a": 1, "b": [3]})
