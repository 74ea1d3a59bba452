"""Results side by side: differences against scikit-learn and loops over predictions.csv; results of different protocols are refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import average_precision_score, roc_auc_score

from tasks.cli import cli
from tasks.tabulation import TabulationError, difference_rows, differing_fields, load_result, tabulate

FINDINGS = ("cardiomegaly", "pleural_effusion", "lung_nodule")


def evaluate(model: Path, table: Path, out: Path, *options: str) -> Path:
    arguments = ["evaluate", str(table), "--model", str(model), "--out", str(out), "--repeats", "60", "--no-baseline", *options]
    done = CliRunner().invoke(cli, [*arguments, "--allow-leak", "similar-images"])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def pair(tiny: Any, other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("pair")
    return evaluate(tiny.model, tiny.manifest, out / "first"), evaluate(other_model, tiny.manifest, out / "second")


def lines(folder: Path, name: str = "predictions.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def columns(folder: Path, finding: str) -> tuple[list[int], list[float]]:
    own = [one for one in lines(folder) if one["finding"] == finding and one["label"] in ("0", "1")]
    return [int(one["label"]) for one in own], [float(one["score"]) for one in own]


def test_differences_are_those_of_scikit_learn(pair: tuple[Path, Path]) -> None:
    table = tabulate([load_result(folder) for folder in pair])
    assert [one.name for one in table.results] == ["first", "second"] and table.shared == 24 and not table.differing
    of = {one.metric: one for one in table.differences}
    for metric, reference in (("AUROC", roc_auc_score), ("AUPRC", average_precision_score)):
        values = []
        for name in FINDINGS:
            (labels, first), (same, second) = (columns(folder, name) for folder in pair)
            assert labels == same
            values.append(reference(labels, second) - reference(labels, first))
            assert of[metric].compared[name].difference.value == pytest.approx(values[-1], abs=1e-12)
            assert of[metric].compared[name].difference.n == len(labels)
        assert of[metric].compared["macro"].difference.value == pytest.approx(np.mean(values), abs=1e-12)
    assert any(abs(one.difference.value) > 0.01 for one in of["AUROC"].compared.values()), "the models differ"
    assert set(of["AUROC"].delong) == set(FINDINGS)


def test_pointing_and_retrieval_are_compared_row_by_row(pair: tuple[Path, Path]) -> None:
    table = tabulate([load_result(folder) for folder in pair])
    of: dict[str, list[Any]] = {}
    for one in table.differences:
        of.setdefault(one.metric, []).append(one.compared)
    focal = json.loads((pair[0] / "results.json").read_text())["grounding"]["focal_findings"]
    (pointing,) = of["pointing game"]
    for name in focal:
        hits = [[float(one["hit"]) for one in lines(folder) if one["finding"] == name and one["hit"]] for folder in pair]
        assert pointing[name].difference.value == pytest.approx(np.mean(hits[1]) - np.mean(hits[0]), abs=1e-12)
    for found, direction in zip(of["Recall@10"], ("image_to_report", "report_to_image"), strict=True):
        recalls = []
        for folder in pair:
            own = [one for one in lines(folder, "retrieval.csv") if one["direction"] == direction]
            chances = []
            for one in own:
                tied, hits, draws = int(one["tied_strict"]), int(one["hits_strict"]), 10 - int(one["above_strict"])
                draws = min(max(draws, 0), tied)
                chances.append(1 - math.comb(tied - hits, draws) / math.comb(tied, draws))
            recalls.append(np.mean(chances))
        assert found[direction].difference.value == pytest.approx(recalls[1] - recalls[0], abs=1e-12)


def test_a_model_against_itself_differs_in_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "again")
    table = tabulate([load_result(pair[0]), load_result(tmp_path / "again")])
    for one in table.differences:
        for found in one.compared.values():
            assert found.difference.value == 0 and found.p_value == 1
    assert all(test.p_value == 1 for one in table.differences for test in one.delong.values())


def test_other_protocols_are_refused_unless_asked_for(pair: tuple[Path, Path], tiny: Any, tmp_path: Path) -> None:
    chexzero = evaluate(tiny.model, tiny.manifest, tmp_path / "chexzero", "--preset", "chexzero")
    both = [load_result(pair[0]), load_result(chexzero)]
    with pytest.raises(TabulationError, match=r"score\.rule\.name: .*chexzero.*--across"):
        tabulate(both)
    table = tabulate(both, across=True)
    assert "score.rule.name" in table.differing and table.differences
    reached = CliRunner().invoke(cli, ["tabulate", str(pair[0]), str(chexzero)])
    assert reached.exit_code == 2 and "the protocols differ" in reached.output


def test_results_of_other_tables_stand_beside_each_other_without_differences(pair: tuple[Path, Path], tiny: Any, tmp_path: Path) -> None:
    other = tmp_path / "cohort" / "manifest.csv"
    shutil.copytree(tiny.folder, tmp_path / "cohort")
    other.write_text(other.read_text() + "\n")
    third = evaluate(tiny.model, other, tmp_path / "third")
    table = tabulate([load_result(pair[0]), load_result(third)], across=True)
    assert table.why_not_paired == "they measured other tables" and not table.differences
    assert set(table.differing) == {"manifest_sha256"}


def test_a_study_that_one_could_not_read_is_left_out_of_the_differences(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "fewer")
    kept = [one for one in lines(pair[1]) if one["row"] != lines(pair[1])[0]["row"]]
    with (tmp_path / "fewer" / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    table = tabulate([load_result(pair[0]), load_result(tmp_path / "fewer")])
    assert table.shared == 23
    name = FINDINGS[1]
    gone = lines(pair[1])[0]["row"]
    sides = []
    for folder in pair:
        own = [one for one in lines(folder) if one["finding"] == name and one["label"] in ("0", "1") and one["row"] != gone]
        sides.append(roc_auc_score([int(one["label"]) for one in own], [float(one["score"]) for one in own]))
    (areas,) = (one for one in table.differences if one.metric == "AUROC")
    assert areas.compared[name].difference.value == pytest.approx(sides[1] - sides[0], abs=1e-12)


def test_the_command_writes_its_tables(pair: tuple[Path, Path], tmp_path: Path) -> None:
    names = ["--name", "one", "--name", "two"]
    done = CliRunner().invoke(cli, ["tabulate", *map(str, pair), *names, "--out", str(tmp_path), "--repeats", "30"])
    assert done.exit_code == 0, done.output
    assert "not for diagnosis" in done.output and "two less one" in done.output
    table = lines(tmp_path, "table.csv")
    measured = json.loads((pair[1] / "results.json").read_text())
    (mean,) = (row for row in table if (row["metric"], row["finding"]) == ("AUROC", "mean"))
    assert mean["two"].startswith(f"{measured['zero_shot']['macro_auroc']:.3f} (")
    heading, rows = difference_rows(tabulate([load_result(one) for one in pair], repeats=30))
    assert [[*row.values()][1:] for row in lines(tmp_path, "differences.csv")] == [row[1:] for row in rows] and heading[0] == "result"
    told = json.loads((tmp_path / "tabulated.json").read_text())
    assert told["reference"] == "one" and told["units_shared"] == 24


@pytest.mark.parametrize("what", ["gone", "text", "old", "no table"])
def test_what_is_no_result_is_told(pair: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    shutil.copytree(pair[0], tmp_path / "x")
    file = tmp_path / "x" / "results.json"
    if what == "gone":
        file.unlink()
    elif what == "text":
        file.write_text("[]")
    elif what == "old":
        file.write_text(json.dumps({"zero_shot": {}}))
    else:
        (tmp_path / "x" / "predictions.csv").write_text("study_id,finding\n")
    done = CliRunner().invoke(cli, ["tabulate", str(pair[0]), str(tmp_path / "x")])
    assert done.exit_code == 2 and "results.json" in done.output


def test_fields_that_differ_are_named_but_for_the_weights() -> None:
    base = {"score": {"weights_sha256": "a", "rule": {"name": "x"}}, "split": "test", "sha256": "1", "method_sha256": "2"}
    other = {"score": {"weights_sha256": "b", "rule": {"name": "y"}}, "split": "test", "sha256": "3", "method_sha256": "4"}
    assert differing_fields([base, other]) == {"score.rule.name": ("x", "y")}
