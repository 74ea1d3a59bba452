"""The comparison: statistics against scikit-learn and loops, tables, a run end to end, failures that cost only themselves."""

import csv
import math

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medvl.metrics import auroc_statistic, bootstrap_intervals, combined, contrast_to_noise, mean_statistic
from tasks.cli import cli
from tasks.comparison import METRICS, Job, Scores, jobs_of, lines_of, read_scores
from tasks.demo import recipe_path
from tasks.page.comparison import plot


def scores(seed=0, n=40, f=3):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0.0, 1.0, -1.0, math.nan], (n, f), p=[0.4, 0.4, 0.1, 0.1])
    hits = np.where(labels == 1, rng.random((n, f)) < 0.5, math.nan)
    focal = np.arange(f) != 1
    return Scores(
        tuple("abc"[:f]),
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


def test_two_recipes_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two recipes have one name: clip"):
        jobs_of([recipe_path("clip.yaml"), tmp_path / "clip.yaml"], 1, tmp_path, tmp_path, 1)


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
        "32",
        "--size",
        "32",
        "--out",
        str(out),
    ]
    args += ["--set", "data.init_args.reader.init_args.size=32", "--set", "data.init_args.batch_size=8"]
    return out, args, CliRunner().invoke(cli, args)


def test_a_comparison_end_to_end(compared):
    out, _, done = compared
    assert done.exit_code == 1, done.output  # the broken one
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    assert [row["recipe"] for row in rows] == ["clip", "radzero"]
    for row in rows:
        assert row["seeds"] == "2" and int(row["parameters"]) > 1000 and float(row["peak_memory_mb"]) > 100
        for m in METRICS:
            low, value, high = (float(row[f"{m}{end}"]) for end in ("_low", "", "_high"))
            assert low <= value <= high and int(row[f"{m}_n"]) > 0
    assert [row["best_on_validation"] for row in rows].count("True") == 1
    assert not rows[0]["auroc_difference"] and rows[1]["auroc_difference"]
    assert float(rows[1]["auroc_difference"]) == pytest.approx(float(rows[1]["auroc"]) - float(rows[0]["auroc"]), abs=2e-4)
    runs = list(csv.DictReader((out / "runs.csv").open()))
    assert {(row["recipe"], row["seed"]) for row in runs} == {(name, seed) for name in ("clip", "radzero") for seed in "01"}
    failed = list(csv.DictReader((out / "rejected.csv").open()))
    assert [row["run"] for row in failed] == ["broken-0", "broken-1"] and "dimensions" in failed[0]["reason"]
    page = (out / "comparison.html").read_text()
    assert (
        "esearch use, not for diagnosis" in page
        and "synthetic phantoms" in page
        and page.count("<svg") == len(METRICS)
        and "http" not in page
    )


def test_what_is_finished_is_kept_and_what_was_asked_otherwise_is_not(compared):
    out, args, _ = compared
    manifest = out / "data" / "manifest.csv"
    options = ("--data.init_args.reader.init_args.size=32", "--data.init_args.batch_size=8")
    jobs = jobs_of([recipe_path("clip.yaml"), recipe_path("radzero.yaml")], 2, out, manifest, 32, options)
    before = {job.folder: (job.folder / "run.json").stat().st_mtime_ns for job in jobs}
    (jobs[1].folder / "run.json").unlink()
    CliRunner().invoke(cli, [one for one in args if not one.endswith("broken.yaml")])
    after = {job.folder: (job.folder / "run.json").stat().st_mtime_ns for job in jobs}
    assert [after[job.folder] == before[job.folder] for job in jobs] == [True, False, True, True]
    other = [Job(job.name, job.recipe, job.seed, job.folder, job.manifest, 64, job.options) for job in jobs]
    assert lines_of(other) == []
    assert len(read_scores(jobs[0].folder, "val").patients) == 2
