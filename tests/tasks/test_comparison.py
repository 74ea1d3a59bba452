"""The comparison: statistics against scikit-learn and loops, tables, a run end to end, failures that cost only themselves."""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medvl.data.manifest import StudyImage, read_manifest
from medvl.metrics import auroc_statistic, bootstrap_intervals, combined, contrast_to_noise, mean_statistic
from reports.text_source import ReportSentences, ReportText
from tasks.cli import cli
from tasks.comparison import (
    METRICS,
    SHOWN,
    Job,
    Scores,
    Settings,
    _in_a_process,
    _retrieved,
    _training_seconds,
    budget,
    check_modalities,
    finished,
    jobs_of,
    left_out,
    lines_of,
    names_of,
    read_scores,
    scores_of,
    settings,
    train_and_score,
    write_tables,
)
from tasks.demo import recipe_path
from tasks.evaluation import Predictions
from tasks.page.comparison import plot, write_comparison


def scores(seed=0, n=40, f=3):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0.0, 1.0, -1.0, math.nan], (n, f), p=[0.4, 0.4, 0.1, 0.1])
    hits = np.where(labels == 1, rng.random((n, f)) < 0.5, math.nan)
    focal = np.arange(f) != 1
    return Scores(
        tuple("abc"[:f]),
        np.arange(2, n + 2),
        tuple(str(i // 2) for i in range(n)),
        labels,
        rng.random((n, f)),
        hits,
        hits * 2 - 0.5,
        focal,
        rng.random(n).round(),
    )


def test_each_metric_is_what_it_says():
    made = scores()
    found = {m: bootstrap_intervals({m: one}, made.patients, repeats=0)[m].value for m, one in made.statistics().items()}
    assert set(found) == set(METRICS)
    known = [np.isin(made.labels[:, f], (0, 1)) for f in range(3)]
    areas = [roc_auc_score(made.labels[k, f], made.scores[k, f]) for f, k in enumerate(known)]
    assert found["auroc"] == pytest.approx(np.mean(areas))
    right = [balanced_accuracy_score(made.labels[k, f], made.scores[k, f] > 0.5) for f, k in enumerate(known)]
    assert found["negation"] == pytest.approx(np.mean(right))
    assert found["pointing"] == pytest.approx(np.mean([np.nanmean(made.hits[:, f]) for f in (0, 2)]))
    assert found["cnr"] == pytest.approx(np.mean([np.nanmean(made.contrast[:, f]) for f in (0, 2)]))
    assert found["cnr_absolute"] == pytest.approx(np.mean([np.nanmean(abs(made.contrast[:, f])) for f in (0, 2)]))
    assert found["cnr_absolute"] > found["cnr"]
    assert found["recall_at_10"] == pytest.approx(made.recall.mean())


def test_a_combination_is_resampled_as_one():
    """The difference of two models over the same resamples; against a bootstrap by hand."""
    one, other = scores(1), scores(2)
    a, b = (mean_statistic(x.recall) for x in (one, other))
    found = bootstrap_intervals({"d": combined([(1.0, a), (-1.0, b)])}, one.patients, repeats=4000, seed=3)["d"]
    assert found.value == pytest.approx(one.recall.mean() - other.recall.mean())
    groups = np.array([int(p) for p in one.patients])
    rng = np.random.default_rng(8)
    draws = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(0, 20, 20)])
        draws.append(one.recall[rows].mean() - other.recall[rows].mean())
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))), abs=0.03)
    same = bootstrap_intervals({"d": combined([(1.0, a), (-1.0, a)])}, one.patients, repeats=50)["d"]
    assert same.ci_low == same.ci_high == 0
    with pytest.raises(ValueError, match="same rows"):
        combined([(1.0, a), (1.0, auroc_statistic([0, 1], [0.2, 0.3]))])


def test_contrast_to_noise():
    rng = np.random.default_rng(0)
    scores, mask = rng.random((9, 7)), rng.random((9, 7)) < 0.3
    scores[0, :3] = math.nan
    inside = [scores[i] for i in np.ndindex(9, 7) if mask[i] and not math.isnan(scores[i])]
    outside = [scores[i] for i in np.ndindex(9, 7) if not mask[i] and not math.isnan(scores[i])]
    expected = (np.mean(inside) - np.mean(outside)) / math.sqrt(np.var(inside) + np.var(outside))
    assert contrast_to_noise(scores, mask) == pytest.approx(expected)
    assert contrast_to_noise(scores, ~mask) == pytest.approx(-expected)
    assert math.isnan(contrast_to_noise(scores, np.zeros_like(mask))) and math.isnan(
        contrast_to_noise(np.ones((2, 2)), np.eye(2, dtype=bool))
    )
    with pytest.raises(ValueError, match="must match"):
        contrast_to_noise(scores, mask[:2])


def test_a_plot_lays_values_in_order():
    line = bootstrap_intervals({"x": mean_statistic(np.arange(10.0))}, list("abcdefghij"), repeats=50)["x"]
    made = plot("title", [("one", line, True), ("two", line, False)])
    low, x, high = (made["dots"][0][name] for name in ("low", "x", "high"))
    assert 160 <= low < x < high <= 540 and made["dots"][0]["colour"] != made["dots"][1]["colour"]


def test_recipes_of_one_name_are_told_apart(tmp_path):
    files = [tmp_path / name for name in ("clip.yaml", "a/clip.yaml", "clip-2.yaml", "b/clip.yaml")]
    assert names_of(files) == ["clip", "clip-3", "clip-2", "clip-4"]
    with pytest.raises(ValueError, match=r"clip.yaml was given twice"):
        names_of([tmp_path / "clip.yaml", tmp_path / "a" / ".." / "clip.yaml"])


@given(st.integers(1, 5000), st.lists(st.sampled_from([4, 8, 12, 16, 20, 64]), min_size=1, max_size=4), st.integers(1, 3000))
def test_a_budget_is_the_same_for_all_and_ends_with_a_validation(images, steps, epoch):
    unit = math.lcm(*steps)
    if unit > 2 * images:
        with pytest.raises(ValueError, match="one batch size"):
            budget(images, steps, epoch)
        return
    total, checks = budget(images, steps, epoch)
    assert checks >= 1 and all(total % (checks * step) == 0 for step in steps)
    assert abs(total - images) <= max(unit * checks / 2, unit - images)
    assert checks <= max(1, images / epoch + 0.5)


def test_a_study_of_several_images_counts_once():
    """Where a tower scores studies, each image has its study's label: two images of one patient are one row of AUROC."""
    rows = tuple(
        StudyImage(study, study, "xray", Path(f"{i}.png"), None, "test", None, None, None, {}, (), {}, i) for i, study in enumerate("aabbc")
    )
    labels, values = np.array([[1.0, 1, 0, 0, 1]]).T, np.array([[0.9, 0.9, 0.6, 0.6, 0.5]]).T
    nothing = np.full((5, 1), math.nan)
    made = Predictions(("x",), rows, labels, values, ((None,),) * 5, nothing, nothing, None, (), contrast=nothing, unit="study")
    found = scores_of(made).statistics()
    assert found["auroc"].of_weights(np.ones((1, 5)))[0] == roc_auc_score([1, 0, 1], [0.9, 0.6, 0.5]) == 0.5
    assert "pointing" not in found and "recall_at_10" not in found
    assert scores_of(replace(made, unit="image")).statistics()["auroc"].of_weights(np.ones((1, 5)))[0] == pytest.approx(2 / 3)


def finished_job(tmp_path, name, made):
    """A run as its process leaves it, whose scores are ``made``."""
    recipe, manifest = tmp_path / f"{name}.yaml", tmp_path / "manifest.csv"
    recipe.write_text(name)
    manifest.touch()
    job = Job(name, recipe, 0, tmp_path / f"{name}-0", manifest, 16)
    job.folder.mkdir()
    leave(job, made)
    return job


def leave(job, made, out=()):
    """What a run leaves that has ``made`` of both splits, and left ``out``."""
    taken = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_mb": 1.0}
    seen = {"images": 16, "batch_size": 8, "parameters": 5}
    note = {"key": job.key(), "name": job.name, "seed": job.seed, "left_out": list(out), **seen, **taken}
    (job.folder / "run.json").write_text(json.dumps(note))
    arrays = {f"{split}.{key}": np.asarray(value) for split in ("val", "test") for key, value in asdict(made).items()}
    np.savez(job.folder / "scores.npz", **arrays)


def test_the_best_is_chosen_by_what_validation_has(tmp_path):
    """Without masks there is no pointing game; the better of two is the better still, wherever it stands, and of nothing none is best."""
    bare = {"hits": np.full((40, 3), math.nan), "contrast": np.full((40, 3), math.nan), "focal": np.zeros(3, dtype=bool)}
    poor = replace(scores(1), **bare)
    good = replace(poor, scores=np.where(poor.labels == 1, 0.9, 0.1))
    unknown = replace(poor, labels=np.full((40, 3), math.nan), recall=np.full(40, math.nan))
    lines = lines_of([finished_job(tmp_path, "poor", poor), finished_job(tmp_path, "good", good)], repeats=10)
    assert [line.best for line in lines] == [False, True]
    assert lines[1].choice == pytest.approx((1 + good.recall.mean()) / 2)
    none = lines_of([finished_job(tmp_path, "unknown", unknown)], repeats=10)
    assert not none[0].best and math.isnan(none[0].choice)


def test_differences_are_from_the_first_recipe_or_there_are_none(tmp_path):
    jobs = [finished_job(tmp_path, name, scores(i)) for i, name in enumerate(("first", "second", "third"))]
    assert [bool(line.difference) for line in lines_of(jobs, repeats=10)] == [False, True, True]
    (jobs[0].folder / "run.json").unlink()
    lines = lines_of(jobs, repeats=10)
    assert [line.name for line in lines] == ["second", "third"] and not any(line.difference for line in lines)
    page = write_comparison(tmp_path / "page.html", lines, jobs[0].name, {}, synthetic=False).read_text()
    assert "<b>first</b>, which differences would be from, has no finished run" in page


def test_what_one_could_not_read_is_compared_for_none(tmp_path):
    """Rows in another order, and one missing: the differences are those on what both have."""
    whole, other = scores(1), scores(2)
    part = other.of(np.random.default_rng(0).permutation(other.rows)[:-3])
    jobs = [finished_job(tmp_path, "whole", whole), finished_job(tmp_path, "part", part)]
    difference = lines_of(jobs, repeats=10)[1].difference["recall_at_10"]
    both = np.intersect1d(whole.rows, part.rows)
    assert difference.value == pytest.approx(other.recall[both - 2].mean() - whole.recall[both - 2].mean()) and difference.n == 37


def test_what_counts_for_one_alone_counts_for_none(tmp_path):
    """Towers of studies against towers of images, and maps without contrast; a loop is the reference."""
    images, studies = scores(1), scores(2)
    first = np.arange(40) % 2 == 0  # the label and the query of a study stand in its first image
    studies = replace(studies, labels=np.where(first[:, None], images.labels, math.nan), recall=np.where(first, studies.recall, math.nan))
    flat = np.random.default_rng(5).random((40, 3)) < 0.3
    studies = replace(studies, hits=images.hits, contrast=np.where(flat, math.nan, images.contrast * 0.5))
    jobs = [finished_job(tmp_path, "images", images), finished_job(tmp_path, "studies", studies)]
    found = lines_of(jobs, repeats=10)[1].difference
    areas, ratios = [], []
    for f in range(3):
        known = [i for i in range(0, 40, 2) if images.labels[i, f] in (0, 1)]
        one, other = (roc_auc_score(images.labels[known, f], x.scores[known, f]) for x in (studies, images))
        areas.append(one - other)
    for f in (0, 2):
        both = [i for i in range(40) if not math.isnan(images.contrast[i, f]) and not flat[i, f]]
        ratios.append(sum(-0.5 * images.contrast[i, f] for i in both) / len(both))
    assert found["auroc"].value == pytest.approx(np.mean(areas))
    assert found["cnr"].value == pytest.approx(np.mean(ratios)) and found["pointing"].value == 0
    assert found["recall_at_10"].value == pytest.approx(np.mean(studies.recall[first] - images.recall[first]))


def test_models_that_read_nothing_in_common_have_no_difference(tmp_path):
    made = scores(1)
    parts = {"first": made.of(made.rows[:20]), "second": made.of(made.rows[20:])}
    first, second = lines_of([finished_job(tmp_path, name, part) for name, part in parts.items()], repeats=10)
    assert first.metrics and second.metrics and not second.difference


def test_patients_are_told_apart_by_the_table(tmp_path):
    """Whatever a run left out, a patient is the same in all."""
    rows = [
        StudyImage(s, p, "xray", Path(f"{i}.png"), None, "test", None, None, None, {}, (), {}, i + 2)
        for i, (s, p) in enumerate(["ap", "bq", "cp"])
    ]
    nothing = np.full((2, 1), math.nan)
    made = Predictions(("x",), tuple(rows[1:]), nothing, nothing, ((None,),) * 2, nothing, nothing, None, (), contrast=nothing)
    found = scores_of(made, rows)
    assert found.patients == ("3", "2") and found.rows.tolist() == [3, 4]


def test_a_run_is_kept_by_what_it_was_asked_for_and_by_the_code(tmp_path, monkeypatch):
    job = finished_job(tmp_path, "one", scores())
    assert finished(job)
    monkeypatch.setattr("medvl.__version__", "0.0.0")
    assert not finished(job)


def test_a_run_of_an_older_version_is_made_again_whatever_it_left(tmp_path):
    """Its key has no version, its note no inputs left out, its scores no rows."""
    job = finished_job(tmp_path, "one", scores())
    note = json.loads((job.folder / "run.json").read_text())
    del note["key"]["medvl"], note["left_out"]
    (job.folder / "run.json").write_text(json.dumps(note))
    with np.load(job.folder / "scores.npz") as file:
        np.savez(job.folder / "scores.npz", **{name: file[name] for name in file.files if not name.endswith("rows")})
    assert not finished(job) and lines_of([job]) == [] and not left_out([job])


def test_a_run_that_is_made_again_and_ends_early_leaves_nothing_of_the_old_one(tmp_path, monkeypatch):
    """Killed at once, it is not taken for the run before, nor are that one's logs, checkpoint and list read as its own."""
    job = finished_job(tmp_path, "one", scores())
    (job.folder / "model").mkdir()
    (job.folder / "model" / "rejected.csv").write_text("row,study_id,path,reason\n2,a,a.png,gone\n")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    ran = _in_a_process(replace(job, images=32), {})
    assert ran is not None and ran.startswith("exit 1")
    assert not finished(job) and not left_out([job]) and [file.name for file in job.folder.iterdir()] == ["log.txt"]


@pytest.fixture
def made_runs(tmp_path, monkeypatch):
    """``medvl compare clip radzero`` on a table of films, whose runs are made by ``make(job)`` in place of a process."""
    lines = [f"s{i},p{i},{i}.png,xray,{split}" for i, split in enumerate(("train", "val", "test"))]
    (tmp_path / "manifest.csv").write_text("\n".join(["study_id,patient_id,path,modality,split", *lines, ""]))
    for i in range(3):
        (tmp_path / f"{i}.png").touch()

    def compared(make, *more):
        def in_a_process(job, running):
            job.folder.mkdir(parents=True)
            return make(job)

        monkeypatch.setattr("tasks.comparison._in_a_process", in_a_process)
        args = ["clip", "radzero", "--seeds", "2", "--images", "16", "--manifest", str(tmp_path / "manifest.csv")]
        done = CliRunner().invoke(cli, ["compare", *args, "--out", str(tmp_path / "out"), *more])
        file = tmp_path / "out" / "rejected.csv"
        return done, list(csv.DictReader(file.open())) if file.is_file() else None

    return compared


def test_what_runs_leave_out_is_listed_counted_and_told_by_the_exit_code(made_runs):
    def make(job):
        own = {"clip-0": [(3, "s1", "1.png", "cut short")], "clip-1": [(3, "s1", "1.png", "cut short"), (2, "s0", "0.png", "no film")]}
        leave(job, scores(job.seed), own.get(job.folder.name, []))

    done, listed = made_runs(make)
    assert done.exit_code == 1 and "2 rejected (inputs of runs; all in " in done.output and "row 2, no film (clip-1)" in done.output, (
        done.output
    )
    assert [tuple(line.values()) for line in listed] == [
        ("clip-1", "2", "s0", "0.png", "no film"),
        ("clip-0 clip-1", "3", "s1", "1.png", "cut short"),
    ]


def test_a_run_that_failed_is_listed_with_what_its_fit_left_out(made_runs):
    def make(job):
        if job.name == "clip":
            return leave(job, scores(job.seed))
        (job.folder / "model").mkdir()
        (job.folder / "model" / "rejected.csv").write_text("row,study_id,path,reason\n2,s0,0.png,no film\n")
        return "exit 1: none of 1 images could be read"

    done, listed = made_runs(make)
    assert done.exit_code == 1 and "2 rejected (runs; " in done.output and "1 rejected (inputs of runs; " in done.output, done.output
    assert [line["runs"] for line in listed] == ["radzero-0", "radzero-1", "radzero-0 radzero-1"]


def test_runs_that_leave_nothing_out_end_well(made_runs):
    done, listed = made_runs(lambda job: leave(job, scores(job.seed)))
    assert done.exit_code == 0 and listed is None, done.output


@pytest.mark.parametrize(
    ("recipe", "more", "said"),
    [
        ("mixed_xray_ct", [], "trains on several modalities"),
        ("ct_slices", [], "the phantoms made here are radiographs"),
        ("clip", ["--set", "data.init_args.modality=ct"], "is of ct, and the phantoms"),
    ],
)
def test_studies_that_a_recipe_is_not_for_are_refused_before_anything_is_made(tmp_path, recipe, more, said):
    done = CliRunner().invoke(cli, ["compare", recipe, "--out", str(tmp_path / "out"), *more])
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert not list((tmp_path / "out").glob("*"))


def test_fresh_seeds_are_trained_after_a_choice(made_runs):
    """Two from the third on, and none of those before."""
    trained = []

    def make(job):
        trained.append((job.name, job.seed))
        leave(job, scores(job.seed))

    done, _ = made_runs(make, "--first-seed", "3")
    assert done.exit_code == 0 and trained == [("clip", 3), ("radzero", 3), ("clip", 4), ("radzero", 4)], done.output


def test_recipes_of_two_modalities_are_not_compared(tmp_path):
    """Each has its own studies in the table, and no line of one is a line of the other."""
    films = "".join(f"a{i},a{i},{i}.png,xray,{split}\n" for i, split in enumerate(("train", "val", "test")))
    volumes = "".join(f"b{i},b{i},{i}.nii.gz,ct,{split}\n" for i, split in enumerate(("train", "val", "test")))
    (tmp_path / "manifest.csv").write_text("study_id,patient_id,path,modality,split\n" + films + volumes)
    table = read_manifest(tmp_path / "manifest.csv", check_files=False)
    clip, slices = recipe_path("clip.yaml"), recipe_path("ct_slices.yaml")
    check_modalities([clip], [], table)
    check_modalities([slices], [], table)
    films_alone = table.select(modality="xray")
    with pytest.raises(ValueError, match=r"ct_slices\.yaml is of ct, and the manifest has no training rows of it"):
        check_modalities([slices], [], films_alone)
    with pytest.raises(ValueError, match=r"these are clip\.yaml of xray, ct_slices\.yaml of ct"):
        check_modalities([clip, slices], [], table)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Settings("xray", 16, 1, None, None)),
        (["data.init_args.batch_size=8", "data.init_args.batch_size=4"], Settings("xray", 4, 1, None, None)),
        (["data.batch_size=8", "trainer.accumulate_grad_batches=2"], Settings("xray", 8, 2, None, None)),
        (["data={init_args: {batch_size: 8}}", "trainer={accumulate_grad_batches: 3}"], Settings("xray", 8, 3, None, None)),
        (["data.init_args={modality: ct}", "trainer.max_steps=7"], Settings("ct", 16, 1, None, 7)),
    ],
)
def test_what_is_set_counts_however_it_is_written(tmp_path, options, expected):
    """The forms that a fit takes: last one wins, a mapping adds, ``init_args`` may be left out."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {class_path: medvl.training.StudyDataModule, init_args: {batch_size: 16, texts: {class_path: reports.ReportText}}}"
    )
    assert settings(recipe, [f"--{one}" for one in options]) == expected


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("data.modality={xray: 12, ct: 4}", "trains on several modalities"),
        ("data.init_args.columns=columns.yaml", "columns of its own"),
        ("data.init_args.batch_size=many", "batch_size is 'many'"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(option, said):
    with pytest.raises(ValueError, match=rf"clip\.yaml.* {said}"):
        settings(recipe_path("clip.yaml"), [f"--{option}"])


@pytest.mark.parametrize(("batch_size", "steps", "fits"), [(4, 2, True), (8, 2, False), (4, 9, False)])
def test_a_run_is_scored_as_it_was_trained_or_fails(tmp_path, monkeypatch, batch_size, steps, fits):
    """The resolved recipe, not the recipe, says what is retrieved; if its budget is another than was planned, there is no run."""
    lines = [f"s{i},p{i},{i}.png,xray,{split}" for i, split in enumerate(["train"] * 4 + ["val", "test", "test"])]
    (tmp_path / "manifest.csv").write_text("\n".join(["study_id,patient_id,path,modality,split", *lines, ""]))
    for i in range(7):
        (tmp_path / f"{i}.png").touch()
    job = Job("clip", recipe_path("clip.yaml"), 0, tmp_path / "clip-0", tmp_path / "manifest.csv", 8, options=("--data.batch_size=4",))
    sources = []

    def fit(subcommand, args):
        assert subcommand == "fit" and "--trainer.max_steps=2" in args and args[-1] == "--data.batch_size=4"
        folder = job.folder / "model"
        folder.mkdir(parents=True)
        texts = {"class_path": "reports.text_source.ReportSentences", "init_args": {}}
        data = {"init_args": {"modality": "xray", "batch_size": batch_size, "texts": texts, "manifest": str(job.manifest)}}
        (folder / "config.yaml").write_text(json.dumps({"data": data, "trainer": {"max_steps": steps, "accumulate_grad_batches": 1}}))
        (folder / "rejected.csv").write_text("row,study_id,path,reason\n2,s0,0.png,no film\n")

    def predicted(model, rows, prompts, source):
        sources.append(type(source))
        nothing = np.full((1, 1), math.nan)
        left = tuple((row, "no masks") for row in rows[1:])
        return Predictions(("x",), tuple(rows[:1]), nothing, nothing, ((None,),), nothing, nothing, None, left, contrast=nothing)

    monkeypatch.setattr("medvl.training.cli.run", fit)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)  # of this process, which has other tests to run
    monkeypatch.setattr("medvl.training.module.trainable", lambda model: 5)
    monkeypatch.setattr("tasks.comparison.load", lambda folder: None)
    monkeypatch.setattr("tasks.comparison.predict", predicted)
    if not fits:
        with pytest.raises(ValueError, match=r"clip\.yaml was trained as .*, not as "):
            train_and_score(job)
        assert not finished(job) and not sources
        return
    train_and_score(job)
    assert finished(job) and set(sources) == {ReportSentences}  # the recipe has ReportText
    assert json.loads((job.folder / "run.json").read_text())["images"] == 8
    assert [(row, study, why) for row, study, _, why in left_out([job])] == [(2, "s0", "no film"), (8, "s6", "no masks")]
    assert read_scores(job.folder, "test").rows.tolist() == [7]


def test_seconds_of_training_are_those_of_the_steps(tmp_path):
    """200 images a second, then 50: of as many images each, 1000 took (1000 / 200 + 1000 / 50) / 2 seconds."""
    log = tmp_path / "metrics.csv"
    assert _training_seconds(log) is None
    log.write_text("step,train/loss\n0,1.0\n")
    assert _training_seconds(log) is None
    log.write_text("step,val/loss,watch/samples_per_second\n9,,200\n9,1.0,\n19,,50\n")
    assert _training_seconds(log) == pytest.approx(12.5)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is the accelerator's")
def test_the_memory_of_a_run_is_not_that_of_what_started_it():
    """A child starts with the peak of its parent in getrusage, however small it is itself."""
    child = "import resource; from tasks.comparison import _peak_mb; print(_peak_mb(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    held = "held = bytearray(b'1') * (1500 * 2**20)"
    parent = f"import subprocess, sys; {held}; sys.exit(subprocess.call([sys.executable, '-c', {child!r}]))"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    peak, inherited = map(float, done.stdout.split())
    assert 50 < peak < 1400 < inherited / 1024


def test_costs_say_what_they_are_of(tmp_path):
    """A run of few steps has no seconds of training; the mean is of those that have, and without any there is a dash."""
    jobs = [finished_job(tmp_path, name, scores()) for name in ("logged", "short")]
    jobs += [replace(jobs[0], seed=1, folder=tmp_path / "logged-1")]
    jobs[2].folder.mkdir()
    leave(jobs[2], scores())
    note = json.loads((jobs[0].folder / "run.json").read_text()) | {"training_seconds_per_1000": 3.25, "cpu_seconds": 4.0}
    (jobs[0].folder / "run.json").write_text(json.dumps(note))
    lines = lines_of(jobs, repeats=10)
    write_tables(lines, jobs, {}, tmp_path)
    logged, short = csv.DictReader((tmp_path / "comparison.csv").open())
    assert float(logged["training_seconds_per_1000_images"]) == 3.25 and short["training_seconds_per_1000_images"] == ""
    assert float(logged["fit_cpu_seconds_per_1000_images"]) == pytest.approx(1000 * (4 + 1) / 2 / 16, abs=0.01)
    runs = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(run["training_seconds_per_1000_images"], run["fit_cpu_seconds"]) for run in runs] == [
        ("3.25", "4.0"),
        ("", "1.0"),
        ("", "1.0"),
    ]
    page = write_comparison(tmp_path / "page.html", lines, "logged", {}, synthetic=False).read_text()
    assert "whole fit, CPU s" in page and "<td>3.2</td>" in page and "<td>–</td><td>62.5</td>" in page


def test_retrieval_is_of_what_was_trained_on_whatever_the_recipe_says(tmp_path):
    """The resolved recipe of a fit, with what was set on the command line."""
    kinds = {"reports.text_source.ReportText": ReportText, "reports.text_source.ReportSentences": ReportSentences}
    for path, kind in kinds.items():
        (tmp_path / "config.yaml").write_text(f"data: {{init_args: {{texts: {{class_path: {path}, init_args: {{}}}}}}}}")
        assert isinstance(_retrieved(tmp_path / "config.yaml"), kind)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two recipes that work and one that cannot, on a few phantoms."""
    out = tmp_path_factory.mktemp("compared")
    broken = out / "broken.yaml"
    broken.write_text(recipe_path("clip.yaml").read_text().replace("embed_dim: 128, hidden_dim", "embed_dim: 64, hidden_dim"))
    args = [
        "compare",
        "clip",
        "radzero",
        str(broken),
        "--seeds",
        "2",
        "--studies",
        "40",
        "--images",
        "64",
        "--size",
        "32",
        "--out",
        str(out),
    ]
    args += [
        "--set",
        "data.init_args.reader.init_args.size=32",
        "--set",
        "data.init_args.batch_size=8",
        "--set",
        "trainer.log_every_n_steps=4",
    ]
    return out, args, CliRunner().invoke(cli, args)


@pytest.mark.slow
def test_a_comparison_end_to_end(compared):
    out, _, done = compared
    assert done.exit_code == 1, done.output  # the broken one
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    assert [row["recipe"] for row in rows] == ["clip", "radzero"]
    for row in rows:
        assert row["seeds"] == "2" and int(row["parameters"]) > 1000 and float(row["fit_peak_memory_mb"]) > 100
        assert min(float(row[f"{name}_seconds_per_1000_images"]) for name in ("training", "fit_cpu")) > 0
        for m in METRICS:
            low, value, high = (float(row[f"{m}{end}"]) for end in ("_low", "", "_high"))
            assert low <= value <= high and int(row[f"{m}_n"]) > 0
    assert [row["best_on_validation"] for row in rows].count("True") == 1
    assert not rows[0]["auroc_difference"] and rows[1]["auroc_difference"]
    assert float(rows[1]["auroc_difference"]) == pytest.approx(float(rows[1]["auroc"]) - float(rows[0]["auroc"]), abs=2e-4)
    runs = list(csv.DictReader((out / "runs.csv").open()))
    assert {row["images"] for row in runs} == {"64"}  # 8 steps of 8; an epoch of 30 images has 3
    for folder in (out / "runs").glob("[cr]*-?"):
        logged = list(csv.DictReader((folder / "model" / "logs" / "version_0" / "metrics.csv").open()))
        validated = {int(row["step"]) + 1: float(row["val/loss"]) for row in logged if row.get("val/loss")}
        kept = json.loads((folder / "model" / "config.json").read_text())["provenance"]
        assert list(validated) == [4, 8] and kept["step"] == min(validated, key=validated.get)
    assert {(row["recipe"], row["seed"]) for row in runs} == {(name, seed) for name in ("clip", "radzero") for seed in "01"}
    failed = list(csv.DictReader((out / "rejected.csv").open()))
    assert [row["runs"] for row in failed] == ["broken-0", "broken-1"] and "dimensions" in failed[0]["reason"]
    page = (out / "comparison.html").read_text()
    assert (
        "esearch use, not for diagnosis" in page
        and "synthetic phantoms" in page
        and page.count("<svg") == len(SHOWN)
        and page.count("<small>absolute ") == 2
        and "http" not in page
    )


@pytest.mark.slow
def test_what_is_finished_is_kept_and_what_was_asked_otherwise_is_not(compared):
    out, args, _ = compared
    manifest = out / "data" / "manifest.csv"
    options = ("--data.init_args.reader.init_args.size=32", "--data.init_args.batch_size=8", "--trainer.log_every_n_steps=4")
    jobs = jobs_of([recipe_path("clip.yaml"), recipe_path("radzero.yaml")], range(2), out, manifest, 64, options)
    before = {job.folder: (job.folder / "run.json").stat().st_mtime_ns for job in jobs}
    (jobs[1].folder / "run.json").unlink()
    lost, missed = (read_manifest(manifest).select(split=split).rows[0] for split in ("test", "train"))
    for one in (lost, missed):
        one.path.write_bytes(b"no longer a film")
    done = CliRunner().invoke(cli, [one for one in args if not one.endswith("broken.yaml")])
    assert done.exit_code == 1 and "2 rejected (inputs of runs" in done.output and "rejected (runs" not in done.output, done.output
    listed = [(line["runs"], line["row"], line["study_id"]) for line in csv.DictReader((out / "rejected.csv").open())]
    assert listed == [("radzero-0", str(one.row), one.study_id) for one in sorted((lost, missed), key=lambda one: one.row)]
    clip, radzero = csv.DictReader((out / "comparison.csv").open())
    assert int(clip["recall_at_10_n"]) == int(radzero["recall_at_10_n"]) + 1 and radzero["recall_at_10_difference"]
    after = {job.folder: (job.folder / "run.json").stat().st_mtime_ns for job in jobs}
    assert [after[job.folder] == before[job.folder] for job in jobs] == [True, False, True, True]
    other = [replace(job, images=128) for job in jobs]
    assert lines_of(other) == []
    assert len(read_scores(jobs[0].folder, "val").patients) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_is_stopped_starts_no_other_run_and_leaves_none_behind(compared, tmp_path, number):
    """The signal goes to the comparison alone; its runs end with it, and so does the log that they write."""
    given = ["--seeds", "3", "--images", "4000", "--manifest", str(compared[0] / "data" / "manifest.csv"), "--out", str(tmp_path)]
    start = "from tasks.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", start, "compare", "clip", *given, *compared[1][-6:]], stderr=subprocess.DEVNULL)
    run = tmp_path / "runs" / "clip-0" / "model" / "config.yaml"
    until(run.is_file)
    children = Path(f"/proc/{process.pid}/task")
    ids = {int(child) for task in children.iterdir() for child in (task / "children").read_text().split()}
    assert ids
    process.send_signal(number)
    process.wait(timeout=20)
    until(lambda: not any(alive(child) for child in ids))
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["clip-0"]


def until(true, seconds=40):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(process):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
