"""Frontal and lateral phantoms from the command line: trained, diagnosed, evaluated, grounded and searched by studies."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import medvl
from medvl.data.manifest import read_manifest
from medvl.model import DualEncoder
from medvl.nn.similarity import PooledSimilarity
from modalities.xray import ConvEncoder, XrayReader
from reports import MiniLmReportEncoder
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.archive.asking import of_image
from tasks.cli import cli
from tasks.demo import recipe_path
from tasks.evaluation import predict, results
from tasks.grounding import ground
from tasks.phantoms import write_cohort
from tasks.zero_shot import diagnose, encode_prompts

SIZE, COUNTS = 32, {"train": 9, "val": 2, "test": 5}
TESTED = 4  # the first study of the test split is a follow-up of the last before it, and goes with its patient
STUDIES, NAMES = sum(COUNTS.values()), ["pleural_effusion", "atelectasis"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frontal and a lateral film of each of sixteen phantoms."""
    return write_cohort(tmp_path_factory.mktemp("views"), STUDIES, 5, size=SIZE, lateral=True, counts=COUNTS, workers=1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe with a smaller tower on smaller films."""
    settings = yaml.safe_load(recipe_path("xray_views.yaml").read_text())
    tower = settings["model"]["image"]["init_args"]
    tower["backbone"]["init_args"] |= {"embed_dim": 16, "widths": [8, 8, 16], "blocks": [1, 1, 1]}
    tower["pooling"]["init_args"] = {"embed_dim": 16, "hidden_dim": 8}
    settings["model"]["report"]["init_args"] |= {"embed_dim": 16, "hidden_dim": 16}
    settings["data"]["init_args"]["reader"]["init_args"] = {"size": SIZE}
    settings["data"]["init_args"]["batch_size"] = 3
    settings["trainer"] |= {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    settings |= {"checkpoint_every": 1, "keep_best": False}
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def fit(recipe: Path, table: Path, out: Path, *options: str) -> Any:
    torch.set_num_threads(1)
    return CliRunner().invoke(cli, ["fit", f"--config={recipe}", f"--data.init_args.manifest={table}", f"--out={out}", *options])


@pytest.fixture(scope="module")
def run_folder(recipe: Path, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    done = fit(recipe, cohort, out)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def model(run_folder: Path) -> DualEncoder:
    """With vectors of the kinds of view that a few steps would not bring about."""
    found = medvl.load(run_folder, device="cpu")
    with torch.no_grad():
        found.image.view_embedding.weight.add_(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 0.3)
    return found


def films(cohort: Path) -> dict[str, list[Path]]:
    """Study -> its two films."""
    found: dict[str, list[Path]] = {}
    for path in sorted((cohort.parent / "xray").glob("*.dcm")):
        found.setdefault(path.name.rpartition("_")[0], []).append(path)
    assert {len(paths) for paths in found.values()} == {2}
    return found


def strict(text: str) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines() if line.startswith("{")]


def test_the_recipe_trains_every_part_and_its_run_is_loaded(recipe: Path, run_folder: Path, cohort: Path) -> None:
    with next((run_folder / "logs").rglob("metrics.csv")).open() as file:
        losses = [float(line["train/loss"]) for line in csv.DictReader(file) if line["train/loss"]]
    assert len(losses) == 2 * 3
    assert all(map(math.isfinite, losses))
    weights = load_file(run_folder / "model.safetensors")
    assert (weights["image.view_embedding.weight"] != 0).any(1).tolist()[2]  # laterals are in every study
    config = json.loads((run_folder / "config.json").read_text())
    assert config["model"]["image"]["class_path"] == "modalities.xray.views.ViewPooledEncoder"
    assert config["model"]["image"]["init_args"]["pooling"]["class_path"] == "modalities.pooling.GatedAttention"
    assert torch.load(run_folder / "resume.ckpt", weights_only=True)["global_step"] == 6


def test_a_stopped_run_of_studies_ends_with_the_same_weights(recipe: Path, run_folder: Path, cohort: Path, tmp_path: Path) -> None:
    from medvl.training.cli import run

    class StopNowError(Exception):
        pass

    original, calls = torch.optim.AdamW.step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == 4:
            raise StopNowError
        calls.append(1)
        return original(self, *args, **kwargs)

    arguments = [f"--config={recipe}", f"--data.init_args.manifest={cohort}", f"--out={tmp_path}", "--resume=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(StopNowError):
            run("fit", arguments)
    with pytest.raises(ValueError, match="written with another images, views"):
        run("fit", [*arguments, "--data.init_args.views=image"])
    assert run("fit", arguments) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path, run_folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_bad_film_of_a_study_is_listed_and_the_other_kept(recipe: Path, cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort.parent, tmp_path / "data")
    table = tmp_path / "data" / "manifest.csv"
    row = next(row for row in read_manifest(table).select(split="train") if row.view == "lateral")
    row.path.write_bytes(row.path.read_bytes()[:-800])
    done = fit(recipe, table, tmp_path / "out", "--trainer.max_epochs=1")
    assert done.exit_code == 1, done.output
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [(int(line["row"]), line["study_id"]) for line in listed] == [(row.row, row.study_id)]
    saved = torch.load(tmp_path / "out" / "resume.ckpt", weights_only=True)
    assert saved["StudyDataModule"]["images"] == COUNTS["train"]


def test_studies_need_a_tower_that_pools_views(recipe: Path, cohort: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["image"] = settings["model"]["image"]["init_args"]["backbone"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    from medvl.training.cli import run

    with pytest.raises(ValueError, match=r"views: study, but ConvEncoder encodes images one by one.*ViewPooledEncoder"):
        run("fit", [f"--config={path}", f"--data.init_args.manifest={cohort}", f"--out={tmp_path / 'out'}"])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def manual_scores(model: DualEncoder, paths: list[Path]) -> dict[str, float]:
    """From what the backbone says of each film alone and the formulas of tower, similarity and score, in float64."""
    temperature, sharpness = (t.log.exp().item() for t in (model.similarity.token_temperature, model.similarity.sharpness))
    tokens = []
    for path in paths:
        sample = model.reader.read(path)
        kind = {"PA": 0, "AP": 1, "lateral": 2}[path.stem.rpartition("_")[2]]
        with torch.no_grad():
            alone = model.image.backbone(model.reader.collate([sample]))
        mark = model.image.view_embedding.weight[kind].detach().double().numpy()
        tokens += [t.double().numpy() + mark for t, seen in zip(alone.tokens[0], alone.token_valid[0], strict=True) if seen]

    def similarity(text: str) -> float:
        word = model.encode_text(text).pooled[0].double().numpy()
        return math.log(sum(math.exp(sharpness * cosine(t, word)) for t in tokens) / len(tokens)) / sharpness / temperature

    pairs = load_prompts().findings
    means = {
        name: [np.mean([similarity(text) for text in side]) for side in (pairs[name].positive, pairs[name].negative)] for name in NAMES
    }
    return {name: 1 / (1 + math.exp(against - for_it)) for name, (for_it, against) in means.items()}


def test_a_study_of_two_films_is_scored_from_both_together(model: DualEncoder, cohort: Path) -> None:
    bank, studies = encode_prompts(model, load_prompts(), NAMES), list(films(cohort).values())[:3]
    files = [studies[0][0], *studies[1], studies[0][1], studies[2][1]]  # of the last study the lateral alone
    found = list(diagnose(model, files, bank))
    assert [one.paths for one in found] == [tuple(map(str, paths)) for paths in (studies[0], studies[1], studies[2][1:])]
    for one, paths in zip(found, (studies[0], studies[1], studies[2][1:]), strict=True):
        assert one.findings == pytest.approx(manual_scores(model, paths), abs=2e-5)
    for batch_size in (1, 2, 3):
        for one, other in zip(found, diagnose(model, files, bank, batch_size=batch_size), strict=True):
            assert other.findings == pytest.approx(one.findings, abs=1e-5)
    (turned,) = diagnose(model, studies[0][::-1], bank)
    assert turned.findings == pytest.approx(found[0].findings, abs=1e-5)
    alone = [next(iter(diagnose(model, [path], bank))).findings for path in studies[0]]
    assert found[0].findings != pytest.approx({name: (alone[0][name] + alone[1][name]) / 2 for name in NAMES}, abs=1e-5)


def test_a_film_that_cannot_be_read_leaves_the_study_to_the_others(model: DualEncoder, cohort: Path, tmp_path: Path) -> None:
    frontal, lateral = next(iter(films(cohort).values()))
    cut = tmp_path / lateral.name
    cut.write_bytes(lateral.read_bytes()[:-800])
    bank = encode_prompts(model, load_prompts(), NAMES)
    (both,), (lost,) = (list(diagnose(model, paths, bank)) for paths in ([cut, frontal], [cut]))
    assert both.ok
    assert list(both.unreadable) == [str(cut)]
    assert both.findings == pytest.approx(manual_scores(model, [frontal]), abs=2e-5)
    assert not lost.ok


def test_the_command_says_what_diagnose_says(run_folder: Path, cohort: Path) -> None:
    done = CliRunner().invoke(cli, ["diagnose", str(cohort.parent / "xray"), "--model", str(run_folder), "--json"])
    assert done.exit_code == 0, done.output
    found = strict(done.stdout)
    assert len(found) == STUDIES
    plain = medvl.load(run_folder, device="cpu")
    for one in found[:2]:
        scores = manual_scores(plain, [Path(path) for path in one["paths"]])
        assert {name: one["findings"][name] for name in NAMES} == pytest.approx(scores, abs=2e-5)


def test_encode_studies_is_the_tower_on_any_batches_and_survives_saving(model: DualEncoder, cohort: Path, tmp_path: Path) -> None:
    a, b, c = list(films(cohort).values())[:3]
    studies = [a, [b[0]], [*c, a[1]]]
    whole, apart = model.encode_studies(studies), model.encode_studies(studies, batch_size=2)
    read = model.encode_studies([[model.read(path) for path in study] for study in studies])
    again = medvl.load(model.save(tmp_path / "again"), device="cpu").encode_studies(studies)
    assert whole.pooled.shape == (3, 16)
    assert whole.grid == (3, 8, 8)
    assert whole.view_valid.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    torch.testing.assert_close(whole.view_weights.sum(1), torch.ones(3))
    for other in (apart, read, again):
        assert other.grid == whole.grid
        for name in ("pooled", "tokens", "views", "view_weights"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
        assert torch.equal(other.token_valid, whole.token_valid)
        assert torch.equal(other.view_valid, whole.view_valid)
    single = model.encode_image([a[0], b[0]])
    assert single.grid == (8, 8)
    torch.testing.assert_close(single.pooled[1], whole.pooled[1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        model.encode_studies([a, []])
    with pytest.raises(TypeError, match="study 0 is a PosixPath, expected a list of its images"):
        model.encode_studies(a)
    with pytest.raises(ValueError, match="no images were given"):
        model.encode_studies([])
    plain = DualEncoder(ConvEncoder(16, (8,), (1,)), MiniLmReportEncoder(16, hidden_dim=None), PooledSimilarity(), XrayReader(size=SIZE))
    with pytest.raises(TypeError, match="ConvEncoder encodes images one by one"):
        plain.encode_studies([a])


@pytest.fixture(scope="module")
def predictions(model: DualEncoder, cohort: Path) -> Any:
    return predict(model, read_manifest(cohort).rows, load_prompts(), ReportSentences(), findings=NAMES, batch_size=5)


def test_evaluation_counts_a_study_once_and_points_in_each_film(model: DualEncoder, cohort: Path, predictions: Any) -> None:
    rows = read_manifest(cohort).rows
    assert [row.path for row in predictions.rows] == [row.path for row in rows]
    bank = encode_prompts(model, load_prompts(), NAMES)
    studies = films(cohort)
    by_study = {name: next(iter(diagnose(model, paths, bank))).findings for name, paths in studies.items()}
    for row, scores in zip(predictions.rows, predictions.scores, strict=True):
        assert dict(zip(NAMES, scores, strict=True)) == pytest.approx(by_study[row.study_id], abs=1e-5)
    measured = results(predictions, repeats=30)
    assert (measured["images"], measured["studies"]) == (2 * STUDIES, STUDIES)
    assert measured["scored"].startswith("studies")
    labels = {row.study_id: row.labels for row in rows}
    for name in NAMES:
        known = [study for study in studies if labels[study][name] in (0, 1)]
        area = measured["zero_shot"]["per_finding"][name]
        expected = roc_auc_score([labels[study][name] for study in known], [by_study[study][name] for study in known])
        assert (area["auroc"], area["n"]) == (pytest.approx(expected), len(known))
    assert measured["retrieval"]["image_to_report"]["recall_at_1_interval"]["n"] == STUDIES
    assert measured["retrieval"]["report_to_image"]["pool"] == STUDIES
    pair = load_prompts().findings["atelectasis"].positive
    for i in (0, 1, 5):  # the map of a film is its own, whatever stands beside it
        maps = np.max([one.scores for one in ground(model, predictions.rows[i].path, pair)], axis=0)
        row, column = predictions.peaks[i][NAMES.index("atelectasis")]
        assert maps[row, column] == pytest.approx(np.nanmax(maps), abs=1e-5)


def test_labels_of_a_study_are_those_of_any_of_its_films(model: DualEncoder, cohort: Path) -> None:
    said = [({"edema": 0}, {"edema": 1}, 1), ({"edema": 0}, {"edema": -1}, -1), ({}, {"edema": 0}, 0)]
    given = [label for one, other, _ in said for label in (one, other)]
    rows = [replace(row, labels=label) for row, label in zip(read_manifest(cohort).rows, given, strict=False)]
    found = predict(model, rows, load_prompts(), ReportSentences(), findings=["edema"])
    assert found.labels[:, 0].tolist() == [value for _, _, value in said for _ in range(2)]
    assert found.counted().tolist() == [0, 2, 4]


def test_the_evaluate_command_writes_a_line_per_film_with_the_score_of_its_study(run_folder: Path, cohort: Path, tmp_path: Path) -> None:
    options = ["--manifest", str(cohort), "--out", str(tmp_path), "--repeats", "20", "--json"]
    done = CliRunner().invoke(cli, ["evaluate", "--model", str(run_folder), *options])
    assert done.exit_code == 0, done.output
    measured = strict(done.stdout)[0]
    assert (measured["images"], measured["studies"]) == (2 * TESTED, TESTED)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["images"] for line in lines} == {"2"}
    for column in ("score", "baseline_score"):
        of = {(line["study_id"], line["finding"]): set() for line in lines}
        for line in lines:
            of[line["study_id"], line["finding"]].add(line[column])
        assert {len(values) for values in of.values()} == {1}
    for name, simple in measured["baseline"]["per_finding"].items():
        known = {line["study_id"]: line for line in lines if line["finding"] == name and line["label"] in ("0", "1")}
        if simple is not None:
            truth = [int(line["label"]) for line in known.values()]
            assert simple == pytest.approx(roc_auc_score(truth, [float(line["baseline_score"]) for line in known.values()]))
    with (tmp_path / "retrieval.csv").open(newline="") as file:
        queries = [line["direction"] for line in csv.DictReader(file)]
    assert queries.count("image_to_report") == queries.count("report_to_image") == TESTED


def test_a_single_film_is_grounded_and_searched_with(model: DualEncoder, run_folder: Path, cohort: Path, tmp_path: Path) -> None:
    frontal, lateral = next(iter(films(cohort).values()))
    (found,) = ground(model, lateral, ["pleural effusion"])
    assert found.scores.shape == tuple(model.reader.native(lateral).shape)
    features, text = model.encode_studies([[frontal, lateral]]), model.encode_text(["pleural effusion"])
    grid = model.similarity.maps(features, text)[0, :, 1]
    np.testing.assert_allclose(model.read(lateral).transform.map_to_native(grid)[0].numpy(), found.scores, atol=1e-5)
    done = CliRunner().invoke(
        cli, ["ground", str(lateral), "--phrase", "heart", "--model", str(run_folder), "--out", str(tmp_path), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert np.load(tmp_path / "heart.npy").shape == found.scores.shape
    assert of_image(model, frontal).shape == (1, model.image.embed_dim)


def test_the_view_of_the_table_counts_over_that_of_the_file(model: DualEncoder, cohort: Path) -> None:
    """Of two films the table calls both PA, says nothing, or calls both something else; a file says what it is."""
    rows = read_manifest(cohort).rows[:2]
    found = {}
    for view in ("PA", None, "oblique"):
        given = [replace(row, view=view) for row in rows]
        found[view] = predict(model, given, load_prompts(), ReportSentences(), findings=NAMES).scores[0].tolist()
    assert found[None] == pytest.approx(list(manual_scores(model, [row.path for row in rows]).values()), abs=2e-5)
    assert len({scores[0] for scores in found.values()}) == 3
