"""Everything in the README runs as it stands there, in its order, in an empty folder."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_make_has_the_two_commands():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for language, code in blocks() if language == "bash" for line in code.splitlines() if line.startswith("make ")}
    assert named == {"demo", "test"}
    assert named <= targets


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_every_example_runs(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "recipes").symlink_to(ROOT / "tasks" / "recipes")
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    outputs = []
    for language, code in blocks():
        if "make " in code:
            continue
        if language == "python":
            (tmp_path / "scripts").mkdir(exist_ok=True)
            (tmp_path / "scripts" / "example.py").write_text(code)
            code = f"{sys.executable} scripts/example.py"
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        outputs.append(done.stdout)
    assert len(outputs) == 7
    compared = list(csv.DictReader((tmp_path / "compared" / "comparison.csv").read_text().splitlines()))
    assert [row["recipe"] for row in compared] == ["clip", "radzero"] and all(row["auroc"] for row in compared)
    del outputs[1]
    studies = [json.loads(line) for line in outputs[1].splitlines() if line.startswith("{")]
    assert len(studies) == 300
    assert all(study["ok"] and len(study["findings"]) == 10 for study in studies)
    with (tmp_path / "scores.csv").open() as table:
        lines = list(csv.DictReader(table))
    assert len(lines) == 300 and {line["ok"] for line in lines} == {"1"} and all(float(line["edema"]) for line in lines)
    assert len(list((tmp_path / "runs" / "first" / "decisions").iterdir())) == 1 and "pleural_effusion" in outputs[1]
    assert outputs[2].count("cardiomegaly") == 3
    scores = np.load(tmp_path / "maps" / "left_pleural_effusion.npy")
    assert scores.ndim == 2
    assert np.isfinite(scores).any()
    assert "1" in outputs[4] and (tmp_path / "hits.html").read_text(encoding="utf-8").count("<article>") == 3
    labels, truth = (list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("labels.csv", "phantoms/manifest.csv"))
    told = {row["study_id"]: row["Pneumothorax"] for row in labels}
    assert len(told) == 300 and set(told.values()) == {"1", "0", ""}
    assert {row["study_id"] for row in truth if row["pneumothorax"] == "1"} == {study for study, value in told.items() if value == "1"}
    assert "0 of 300 reports" in outputs[5]
