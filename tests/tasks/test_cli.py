"""The command line as a user meets it: exit codes, strict JSON, files written, and what is not imported."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tasks.cli import cli

ROOT = Path(__file__).resolve().parents[2]
NOTICE = "research use, not for diagnosis"
COMMANDS = [
    "demo",
    "phantom",
    "inspect",
    "reports",
    "shards",
    "match",
    "fit",
    "validate",
    "test",
    "average",
    "diagnose",
    "calibrate",
    "ground",
    "calibrate-maps",
    "view",
    "index",
    "search",
    "read",
    "calibrate-reading",
    "evaluate",
    "evaluate-maps",
    "tabulate",
    "probe",
    "compare",
    "card",
]


def medvl(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT.parent, timeout=120)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, atexit\n"
        "heavy = ('torch', 'numpy', 'pandas', 'lightning', 'monai', 'matplotlib', 'transformers', 'scipy', 'PIL')\n"
        "atexit.register(lambda: print('LOADED', [n for n in heavy if n in sys.modules]))\n"
        "from tasks.cli import main\n"
        "sys.argv = ['medvl', '--help']\n"
        "main()\n"
    )
    start = time.monotonic()
    done = python(code)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    assert "Examples:" in done.stdout and "not for diagnosis" in done.stdout
    assert [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.startswith("  ")] == COMMANDS
    if len(os.sched_getaffinity(0)) > os.getloadavg()[0]:  # on a busy machine the clock measures the others
        assert seconds < 0.5


def test_diagnose_does_not_pay_for_what_it_does_not_use(tiny: Any) -> None:
    code = (
        "import sys, atexit\n"
        "unused = ('monai', 'lightning', 'pandas', 'matplotlib', 'timm', 'sklearn')\n"
        "atexit.register(lambda: print('LOADED', [n for n in unused if n in sys.modules], file=sys.stderr))\n"
        "from tasks.cli import main\n"
        f"sys.argv = ['medvl', 'diagnose', {str(tiny.dicom)!r}, '--model', {str(tiny.model)!r}, '--json', '--device', 'cpu']\n"
        "main()\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert strict(done.stdout)["ok"] is True
    assert "LOADED []" in done.stderr


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("fit", "validate", "test")])
def test_every_command_has_help_with_examples(command: str) -> None:
    done = medvl(command, "--help")
    assert done.exit_code == 0 and "Examples:" in done.output and f"medvl {command}" in done.output


# diagnose


def test_diagnose_writes_an_object_a_line_in_order_and_a_bad_file_costs_only_itself(tiny: Any, tmp_path: Path) -> None:
    files = [tiny.png, tiny.broken, tmp_path / "absent.png", tiny.dicom]
    tables = ["--csv", tmp_path / "s.csv", "--rejected", tmp_path / "r.csv"]
    done = medvl("diagnose", *files, "--model", tiny.model, "--json", "--batch-size", 2, *tables)
    assert done.exit_code == 1
    found = [strict(line) for line in done.stdout.splitlines()]
    assert [one["path"] for one in found] == [str(file) for file in files]
    assert [one["paths"] for one in found] == [[str(file)] for file in files]
    assert [one["ok"] for one in found] == [True, False, False, True]
    for one in found:
        assert set(one) == {"path", "paths", "ok", "error", "findings", "calibrated", "protocol", "unfamiliar", "warnings", "notice"}
        assert one["calibrated"] is False and one["notice"] == NOTICE
        assert (one["error"] is None) == one["ok"] and bool(one["findings"]) == one["ok"]
        assert all(0 <= score <= 1 for score in one["findings"].values())
    assert len(found[0]["findings"]) >= 10
    assert "2 rejected" in done.stderr
    with (tmp_path / "r.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [str(tiny.broken), str(tmp_path / "absent.png")]
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, one in zip(rows, found, strict=True):
        assert row["path"] == one["path"] and row["ok"] == str(int(one["ok"]))
        assert {k: float(v) for k, v in row.items() if k in one["findings"]} == one["findings"]


def test_diagnose_writes_an_object_per_study_and_no_uid(tiny: Any, tmp_path: Path) -> None:
    import pydicom

    uid, files = "1.2.826.0.1.4711", [tmp_path / name for name in ("pa.dcm", "lateral.dcm", "cut.dcm")]
    for file in files:
        dataset = pydicom.dcmread(tiny.dicom)
        dataset.StudyInstanceUID = uid
        dataset.save_as(file)
    files[2].write_bytes(files[2].read_bytes()[:-500])
    whole = medvl("diagnose", files[0], tiny.png, files[1], "--model", tiny.model, "--json")
    assert whole.exit_code == 0, whole.output
    assert [strict(line)["paths"] for line in whole.stdout.splitlines()] == [[str(file) for file in files[:2]], [str(tiny.png)]]
    tables = ["--csv", tmp_path / "s.csv", "--rejected", tmp_path / "r.csv"]
    done = medvl("diagnose", *files, "--model", tiny.model, "--json", *tables)
    assert done.exit_code == 1 and "1 rejected (files)" in done.stderr
    one = strict(done.stdout)
    assert one["ok"] is True and one["path"] == str(files[0]) and one["paths"] == [str(file) for file in files]
    assert str(files[2]) in one["error"] and str(files[0]) not in one["error"] and one["findings"]
    with (tmp_path / "r.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [str(files[2])]
    with (tmp_path / "s.csv").open(newline="") as file:
        assert [(row["ok"], strict(row["paths"])) for row in csv.DictReader(file)] == [("1", one["paths"])]
    shown = medvl("diagnose", *files, "--model", tiny.model)
    assert shown.exit_code == 1 and all(str(file) in shown.stdout for file in files)
    for text in (whole.output, done.output, shown.output, (tmp_path / "s.csv").read_text(), (tmp_path / "r.csv").read_text()):
        assert uid not in text and "4711" not in text.replace(str(tmp_path), "")


def test_diagnose_takes_folders_and_passes_over_tables_and_masks(tiny: Any) -> None:
    done = medvl("diagnose", tiny.folder, "--model", tiny.model, "--json", "--finding", "edema", "--finding", "lung_nodule")
    assert done.exit_code == 0, done.stderr
    found = [strict(line) for line in done.stdout.splitlines()]
    assert [one["path"] for one in found] == sorted(str(p) for p in (tiny.folder / "images").iterdir())
    assert all(list(one["findings"]) == ["edema", "lung_nodule"] for one in found)


def test_diagnose_rejects_a_folder_without_an_image(tiny: Any, tmp_path: Path) -> None:
    done = medvl("diagnose", tmp_path, tiny.png, "--model", tiny.model, "--json")
    assert done.exit_code == 1
    first, second = (strict(line) for line in done.stdout.splitlines())
    assert "no image in this folder" in first["error"] and second["ok"]


def test_diagnose_shows_a_person_a_table(tiny: Any) -> None:
    done = medvl("diagnose", tiny.png, "--model", tiny.model)
    assert done.exit_code == 0
    assert str(tiny.png) in done.stdout and "pleural_effusion" in done.stdout and "not calibrated" in done.stdout
    assert done.stdout.rstrip().endswith(NOTICE)


def test_no_output_holds_identifiers_of_the_header(tiny: Any, tmp_path: Path) -> None:
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(tiny.dicom.read_bytes()[:-500])
    for command in (
        ["diagnose", tiny.dicom, cut, "--json"],
        ["ground", tiny.dicom, "--phrase", "heart", "--out", tmp_path / "m"],
        ["ground", cut, "--phrase", "heart", "--out", tmp_path / "m", "--json"],
    ):
        done = medvl(*command, "--model", tiny.model)
        assert done.exit_code in (0, 1)
        assert "secret" not in done.output.lower()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["diagnose", "{png}", "--model", "/nowhere"], "no such folder"),
        (["diagnose", "{png}", "--model", "{folder}"], "no config.json"),
        (["diagnose", "{png}", "--model", "{model}", "--finding", "dragon_sign"], "dragon_sign"),
        (["diagnose", "{png}", "--model", "{model}", "--prompts", "/nowhere.yaml"], "no prompt file"),
        (["diagnose", "{png}", "--model", "{model}", "--device", "toaster"], "no such device"),
        (["diagnose", "--model", "{model}"], "Missing argument"),
        (["ground", "/nowhere.png", "--phrase", "x", "--model", "{model}", "--out", "{tmp}"], "no such file"),
        (["ground", "{png}", "--model", "{model}", "--out", "{tmp}"], "--phrase TEXT or --finding NAME"),
        (["ground", "{png}", "--phrase", " ", "--model", "{model}", "--out", "{tmp}"], "empty"),
        (["ground", "{png}", "--phrase", "x", "--model", "{model}", "--out", "{png}"], "cannot be made a folder"),
        (["index", "build", "/nowhere.csv", "--model", "{model}", "--store", "{tmp}/a.db"], "no such file"),
        (["index", "add", "{manifest}", "--model", "{model}", "--store", "{tmp}/a.db"], "no such store"),
        (["index", "stats", "--store", "{png}"], "no SQLite file"),
        (["index", "remove", "--store", "{png}"], "nothing to take out"),
        (["search", "--model", "{model}", "--store", "/nowhere.db", "--query", "x"], "no such store"),
        (["search", "--model", "{model}", "--store", "{png}", "--query", " "], "empty"),
        (["search", "--model", "{model}", "--store", "{png}"], "nothing is asked"),
        (["search", "--model", "{model}", "--store", "{png}", "--query", "film.png"], "ends like an image"),
        (["evaluate", "--model", "{model}", "--manifest", "{manifest}", "--split", "val", "--out", "{tmp}"], "no xray row in split val"),
        (["evaluate", "--model", "{model}", "--manifest", "{png}", "--out", "{tmp}"], "expected .csv"),
        (["phantom", "{png}", "--studies", "1"], "cannot be made a folder"),
        (["phantom", "{tmp}", "--studies", "0"], "0 is not in the range"),
        (["diagnose", "{png}", "--model", "{model}", "--csv", "{png}/x.csv"], "cannot be made a folder"),
        (["diagnose", "{png}", "--model", "{model}", "--rejected", "{png}/x.csv"], "cannot be made a folder"),
        (["diagnose", "{png}", "--model", "{model}", "--csv", "{folder}"], "expected the name of a file"),
        (["nonsense"], "No such command"),
    ],
)
def test_usage_errors_say_what_is_wrong_and_exit_with_2(args: list[str], said: str, tiny: Any, tmp_path: Path) -> None:
    places = {"png": tiny.png, "model": tiny.model, "folder": tiny.folder, "manifest": tiny.manifest, "tmp": tmp_path / "out"}
    done = medvl(*(arg.format(**places) for arg in args))
    assert done.exit_code == 2, done.output
    assert said in done.stderr and "Traceback" not in done.output


def test_output_files_are_looked_at_before_anything_is_scored(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks.commands.diagnose as command

    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("the model was loaded"))
    for option in ("--csv", "--rejected"):
        done = medvl("diagnose", tiny.png, "--model", tiny.model, option, tiny.png / "deep" / "x.csv")
        assert done.exit_code == 2 and f"{option} {tiny.png}/deep: cannot be made a folder" in done.stderr


def changed_copy(model: Path, folder: Path, **changes: Any) -> Path:
    """A run whose config says something else; ``weights`` replaces the weights and adapts their hash."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    if "weights" in changes:
        weights = changes.pop("weights")
        (folder / "model.safetensors").write_bytes(weights)
        config["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    for part, arguments in changes.items():
        config["model"][part]["init_args"].update(arguments)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": {"widths": [-1, 2, 3]}}, "image: modalities.xray.conv.ConvEncoder"),
        ({"image": {"embed_dim": 1e9}}, "image: modalities.xray.conv.ConvEncoder"),
        ({"image": {"embed_dim": 1_000_000}}, "more memory than"),
        ({"image": {"embed_dim": 24}}, "24 dimensions, the report tower in 16"),
        ({"reader": {"size": 1e7}}, "reader: modalities.xray.reader.XrayReader"),
        ({"weights": b"\x10\0\0\0\0\0\0\0{"}, "no whole safetensors file"),
    ],
)
def test_a_run_that_was_tampered_with_is_a_usage_error(changes: dict[str, Any], said: str, tiny: Any, tmp_path: Path) -> None:
    done = medvl("diagnose", tiny.png, "--model", changed_copy(tiny.model, tmp_path / "run", **changes), "--device", "cpu")
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.output


# ground


def test_ground_writes_maps_in_native_pixels_and_tells_of_them(tiny: Any, tmp_path: Path) -> None:
    phrases = ["left pleural effusion", "Left pleural effusion!", "a nodule"]
    flags = [flag for phrase in phrases for flag in ("--phrase", phrase)]
    done = medvl("ground", tiny.dicom, *flags, "--finding", "edema", "--model", tiny.model, "--out", tmp_path / "maps", "--json")
    assert done.exit_code == 0, done.output
    told = strict((tmp_path / "maps" / "maps.json").read_text())
    assert strict(done.stdout)["maps"] == told
    assert [one["slug"] for one in told] == ["left_pleural_effusion", "left_pleural_effusion_2", "a_nodule", "edema"]
    assert [one["phrase"] for one in told] == [*phrases, "edema"]
    assert [one["kind"] for one in told] == ["phrase"] * 3 + ["finding"]
    sha256 = json.loads((tiny.model / "config.json").read_text())["weights_sha256"]
    for one in told:
        scores = np.load(tmp_path / "maps" / one["npy"], allow_pickle=False)
        assert scores.dtype == np.float32 and scores.shape == (one["rows"], one["columns"]) == (48, 40)
        assert np.unravel_index(np.nanargmax(scores), scores.shape) == tuple(one["peak"])
        assert (one["min"], one["max"]) == (pytest.approx(np.nanmin(scores)), pytest.approx(np.nanmax(scores)))
        assert one["finite_fraction"] == np.isfinite(scores).mean()
        assert one["weights_sha256"] == sha256 and one["path"] == str(tiny.dicom) and one["notice"] == NOTICE
        with Image.open(tmp_path / "maps" / one["png"]) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == sorted(
        ["grids.npz", "maps.json", *(one[kind] for one in told for kind in ("npy", "png"))]
    )


def test_ground_rejects_an_unreadable_file(tiny: Any, tmp_path: Path) -> None:
    done = medvl("ground", tiny.broken, "--phrase", "x", "--model", tiny.model, "--out", tmp_path, "--json")
    assert done.exit_code == 1
    told = strict(done.stdout)
    assert told["ok"] is False and told["maps"] == [] and "broken.dcm" in told["error"]


# evaluate


def test_evaluate_writes_results_and_shows_them(tiny: Any, tmp_path: Path) -> None:
    done = medvl("evaluate", "--model", tiny.model, "--manifest", tiny.manifest, "--out", tmp_path, "--repeats", 20)
    assert done.exit_code == 0, done.output
    told = strict((tmp_path / "results.json").read_text())
    assert told["images"] == 24 and told["data"]["split"] == "test"
    for words in ("pleural_effusion", "95 %", "pool 24", "chance", NOTICE, f"{told['zero_shot']['macro_auroc']:.3f}"):
        assert words in done.stdout
    assert (tmp_path / "predictions.csv").is_file()
    done = medvl("evaluate", "--model", tiny.model, "--manifest", tiny.manifest, "--out", tmp_path, "--repeats", 20, "--json")
    assert strict(done.stdout) == told
    done = medvl("evaluate", "--model", tiny.model, "--manifest", tiny.manifest, "--out", tmp_path, "--repeats", 20, "--baseline")
    assert done.exit_code == 0, done.output
    beside = strict((tmp_path / "results.json").read_text())["baseline"]
    assert f"{beside['macro_auroc']:.3f}" in done.stdout and "logistic regression" in done.stdout


def test_evaluate_goes_on_without_bad_inputs_and_exits_with_1(tiny: Any, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    shutil.copytree(tiny.folder, studies)
    (studies / "images" / "s08.dcm").write_bytes(b"gone bad")
    (studies / "images" / "s09.png").unlink()
    table = studies / "manifest.csv"
    done = medvl("evaluate", "--model", tiny.model, "--manifest", table, "--out", tmp_path / "out", "--repeats", 0, "--json")
    assert done.exit_code == 1
    told = strict(done.stdout)
    assert told["images"] == 22 and told["rejected"] == 1 and told["data"]["bad_rows"] == 1
    assert "s08" in done.stderr and "row 11" in done.stderr


def test_a_cache_changes_nothing_but_the_second_reading(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modalities.xray.reader import XrayReader

    def results(*more: Any) -> tuple[Any, str]:
        out = tmp_path / "out"
        done = medvl("evaluate", "--model", tiny.model, "--manifest", tiny.manifest, "--out", out, "--repeats", 5, *more)
        assert done.exit_code in (0, 1), done.output
        return strict((out / "results.json").read_text()), (out / "predictions.csv").read_text()

    plain = results()
    said = medvl("diagnose", tiny.dicom, tiny.png, "--model", tiny.model, "--json").stdout
    assert results("--cache", tmp_path / "cache") == plain
    monkeypatch.setattr(XrayReader, "read", lambda *_: pytest.fail("read again"))
    assert results("--cache", tmp_path / "cache") == plain
    cached = medvl("diagnose", tiny.dicom, tiny.png, "--model", tiny.model, "--json", "--cache", tmp_path / "cache")
    assert cached.stdout == said
    done = medvl("diagnose", tiny.png, "--model", tiny.model, "--cache", tiny.png)
    assert done.exit_code == 2 and "--cache" in done.stderr


def test_evaluate_reads_a_table_that_names_things_otherwise(tiny: Any, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    shutil.copytree(tiny.folder, studies)
    table = studies / "manifest.csv"
    table.write_text(table.read_text().replace("study_id,patient_id", "exam,subject", 1))
    (tmp_path / "columns.yaml").write_text("study_id: exam\npatient_id: subject\n")
    columns = ["--columns", tmp_path / "columns.yaml"]
    done = medvl("evaluate", "--model", tiny.model, "--manifest", table, *columns, "--out", tmp_path / "o", "--repeats", 0)
    assert done.exit_code == 0, done.output


def test_evaluate_names_labels_that_it_has_no_prompts_for(tiny: Any, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    shutil.copytree(tiny.folder, studies)
    table = studies / "manifest.csv"
    table.write_text(table.read_text().replace(",lung_nodule,", ",dragon_sign,", 1))
    (tmp_path / "columns.yaml").write_text("labels: [cardiomegaly, dragon_sign]\n")
    columns = ["--columns", tmp_path / "columns.yaml"]
    done = medvl("evaluate", "--model", tiny.model, "--manifest", table, *columns, "--out", tmp_path / "o", "--repeats", 0, "--json")
    assert done.exit_code == 0, done.output
    told = strict(done.stdout)
    assert list(told["zero_shot"]["per_finding"]) == ["cardiomegaly"]
    assert told["prompts"]["labelled_without_prompts"] == ["dragon_sign"] and "dragon_sign" in done.stderr


# what is handed on


def test_training_commands_hand_their_arguments_on_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stub = types.ModuleType("medvl.training.cli")
    stub.run = lambda subcommand, args, finished: calls.append((subcommand, args)) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medvl.training.cli", stub)
    given = ["--config", "r.yaml", "--model.loss=x", "--help", "-h", "--trainer.fast_dev_run=true", "left", "--json", "--debug"]
    for command in ("fit", "validate", "test"):
        assert medvl(command, *given).exit_code == 0
    assert calls == [(command, given) for command in ("fit", "validate", "test")]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_run_s_folder_is_looked_at_before_images_are_read(
    command: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medvl.training.data import StudyDataModule

    monkeypatch.setattr(StudyDataModule, "setup", lambda *_: pytest.fail("the manifest was read"))
    recipe = ROOT / "tasks" / "recipes" / "xray_phantom.yaml"
    out = tiny.png if command == "fit" else tmp_path / "absent"
    done = medvl(command, "--config", recipe, "--data.init_args.manifest", tiny.manifest, "--out", out)
    assert done.exit_code == 2, done.output
    assert str(out) in done.stderr and ("cannot be made a folder" if command == "fit" else "does not exist") in done.stderr


def test_the_exit_code_of_training_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("medvl.training.cli")
    stub.run = lambda subcommand, args, finished: 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medvl.training.cli", stub)
    assert medvl("fit").exit_code == 1


def test_phantom_writes_a_cohort(tmp_path: Path) -> None:
    done = medvl("phantom", tmp_path / "cohort", "--studies", 2, "--seed", 3, "--size", 64, "--workers", 1, "--json")
    assert done.exit_code == 0, done.output
    told = strict(done.stdout)
    assert told["synthetic"] is True and told["notice"] == NOTICE and Path(told["manifest"]).is_file()
    assert len(list((tmp_path / "cohort" / "xray").glob("*.dcm"))) == 2


def test_demo_hands_its_options_on_and_shows_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tasks.demo

    calls = []
    found = {"images": 3, "patients": 2, "notice": NOTICE}
    monkeypatch.setattr(tasks.demo, "run_demo", lambda out, seed, sizes, modalities: calls.append((out, seed, sizes, modalities)) or found)
    done = medvl("demo", "--out", tmp_path / "d", "--seed", 4, "--train-studies", 64, "--epochs", 2)
    assert done.exit_code == 0, done.output
    ((out, seed, sizes, modalities),) = calls
    size = sizes["xray"]
    assert (out, seed, size.train, size.epochs) == (tmp_path / "d", 4, 64, 2) and size.test == tasks.demo.SIZES["xray"].test
    assert modalities == ("xray",)
    assert "3 images of 2 patients" in done.stdout and NOTICE in done.stdout
    assert strict(medvl("demo", "--out", tmp_path / "d", "--json").stdout) == found
    assert medvl("demo", "--out", tmp_path / "d", "--modality", "both", "--json").exit_code == 0
    assert calls[-1][2] == tasks.demo.SIZES and calls[-1][3] == ("xray", "ct")
    assert medvl("demo", "--out", tmp_path / "d", "--modality", "ct", "--epochs", 1, "--json").exit_code == 0
    assert set(calls[-1][2]) == {"ct"} and calls[-1][2]["ct"].epochs == 1


# internal errors


def test_an_internal_error_is_one_line_without_the_message(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    import tasks.zero_shot

    def broken(*args: Any) -> None:
        raise RuntimeError("Secret^Name was here")

    monkeypatch.setattr(tasks.zero_shot, "encode_prompts", broken)
    done = medvl("diagnose", tiny.png, "--model", tiny.model)
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1 and "RuntimeError" in done.stderr and "Secret" not in done.output and "MEDVL_DEBUG" in done.stderr
    done = medvl("--debug", "diagnose", tiny.png, "--model", tiny.model)
    assert done.exit_code == 3 and "Traceback" in done.stderr
    monkeypatch.setenv("MEDVL_DEBUG", "1")
    assert "Traceback" in medvl("diagnose", tiny.png, "--model", tiny.model).stderr


def test_what_our_code_refuses_by_intent_is_a_usage_error_with_its_message(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    from medvl.data.manifest import read_manifest

    stub = types.ModuleType("medvl.training.cli")
    stub.run = lambda subcommand, args, finished: read_manifest(args[0])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medvl.training.cli", stub)
    done = medvl("fit", tiny.png)
    assert done.exit_code == 2 and "expected .csv, .tsv" in done.stderr
    stub.run = lambda subcommand, args, finished: int("Secret^Name")  # type: ignore[attr-defined]
    done = medvl("fit", tiny.png)
    assert done.exit_code == 3 and "ValueError" in done.stderr and "Secret" not in done.output


def test_a_reader_that_leaves_early_is_no_internal_error(tiny: Any, tmp_path: Path) -> None:
    for i in range(40):
        shutil.copyfile(tiny.png, tmp_path / f"{i}.png")
    args = ["medvl", "diagnose", str(tmp_path), "--model", str(tiny.model), "--json", "--batch-size", "1"]
    code = f"import sys; from tasks.cli import main; sys.argv = {args!r}; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read().decode()
        assert process.wait(60) == 141
    assert "Traceback" not in told and "internal error" not in told
