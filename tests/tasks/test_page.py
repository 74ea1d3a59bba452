"""The demo's page: one escaped, self-contained file that says what the results say."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import medvl
from medvl.data.manifest import read_manifest
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.evaluation import predict, results
from tasks.page import BINS, DemoPage, choose_examples, distribution, page_part, page_title, told, write_page

EVIL = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)>"
VOID = {"meta", "img", "br", "line", "rect", "circle", "link", "input"}


class Parsed(HTMLParser):
    """Every tag, attribute and text, and whether tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return medvl.load(tiny.model, device="cpu")


@pytest.fixture(scope="module")
def predictions(model: Any, tiny: Any) -> Any:
    rows = read_manifest(tiny.manifest).select(split="test", modality="xray").rows
    return predict(model, rows, load_prompts(), ReportSentences())


BASELINE = {"macro_auroc": 0.61234, "per_finding": {"cardiomegaly": 0.71, "lung_nodule": None}}


def build(path: Path, model: Any, predictions: Any, facts: Any = None) -> Parsed:
    measured = results(predictions, repeats=50)
    part = page_part(modality="xray", model=model, predictions=predictions, results=measured, baseline=BASELINE, facts=facts or {"seed": 3})
    write_page(path, DemoPage(page_title(("xray",)), (part,)))
    return Parsed(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(model: Any, predictions: Any, tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    return build(tmp_path_factory.mktemp("page") / "report.html", model, predictions)


def test_the_page_needs_nothing_else(page: Parsed) -> None:
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "xlink:href", "action"):
            assert value.startswith("data:image/png;base64,")
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert not re.search(r"url\(|@import", " ".join(page.text))
    assert not page.open, "every tag is closed"


def test_it_says_at_once_what_it_is(page: Parsed) -> None:
    opening = page.words[: page.words.index("Mean AUROC over")]
    assert "Synthetic phantoms, no patients · research use, not for diagnosis" in opening
    assert "What this does not show" in page.words and page.words.endswith("synthetic data throughout")


def test_its_figures_are_those_of_the_results(page: Parsed, predictions: Any) -> None:
    measured = results(predictions, repeats=50)
    assert f"{measured['zero_shot']['macro_auroc']:.2f}" in page.words
    for name, one in measured["zero_shot"]["per_finding"].items():
        title = name.replace("_", " ").capitalize()
        line = f"{title} {one['auroc']:.3f} {one['ci_low']:.2f} – {one['ci_high']:.2f}"
        baseline = BASELINE["per_finding"].get(name)  # type: ignore[attr-defined]
        assert f"{line} {'–' if baseline is None else f'{baseline:.2f}'} {one['n_positive']} / {one['n']}" in page.words
    assert f"trained on the labels: {BASELINE['macro_auroc']:.2f}" in page.words
    recall = measured["retrieval"]["image_to_report"]
    assert f"Own report among the first 10 of {recall['pool']} {recall['recall_at_10']:.2f}" in page.words
    assert f"a random order: {recall['chance']:.2f}" in page.words
    assert f"{measured['grounding']['pointing_game_macro']:.2f}" in page.words


def test_every_picture_is_a_png_with_words_for_it(page: Parsed) -> None:
    uris = [value for name, value in page.attributes if name == "src"]
    assert len(uris) >= 8
    for uri in uris:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))) as picture:
            assert picture.format == "PNG" and max(picture.size) == 256
    assert len([1 for name, value in page.attributes if name == "alt" and value]) == len(uris)


def test_texts_are_escaped_wherever_they_come_from(model: Any, predictions: Any, tmp_path: Path) -> None:
    rows = tuple(replace(row, study_id=f"{EVIL}{i}", findings=f"Fine. {EVIL}.") for i, row in enumerate(predictions.rows))
    retrieval = replace(
        predictions.retrieval, study_ids=tuple(row.study_id for row in rows), sentences=tuple((EVIL, "No effusion.") for _ in rows)
    )
    evil = replace(predictions, rows=rows, retrieval=retrieval)
    parsed = build(tmp_path / "report.html", model, evil, {EVIL: {EVIL: [EVIL, 1]}})
    assert "script" not in parsed.tags and not any(name.startswith("on") for name, _ in parsed.attributes)
    assert all(value.startswith("data:image/png") for name, value in parsed.attributes if name == "src")
    assert parsed.words.count("alert('x')") > 5, "it is shown as text"


def test_a_retrieved_report_is_marked_where_it_says_the_very_same(page: Parsed, predictions: Any) -> None:
    assert page.words.count("its own report") == page.words.count("own report at rank")
    pool = len(predictions.retrieval.study_ids)
    ranks = [float(found) for found in re.findall(rf"own report at rank ([\d.]+) of {pool}", page.words)]
    assert ranks == sorted(ranks) and 1 <= len(ranks) <= 3


def test_without_labels_masks_or_reports_there_is_still_a_page(model: Any, predictions: Any, tmp_path: Path) -> None:
    unknown = np.full_like(predictions.hits, np.nan)
    bare = replace(predictions, retrieval=None, hits=unknown, mask_fraction=unknown)
    parsed = build(tmp_path / "report.html", model, bare)
    assert "no masks" in parsed.words and "Which report fits" not in parsed.words and "peak inside" not in parsed.words
    nothing = replace(bare, labels=np.full_like(bare.labels, np.nan))
    parsed = build(tmp_path / "nothing.html", model, nothing)
    assert "nan" not in parsed.words.lower().split()


def test_examples_are_the_median_hit_and_the_median_miss() -> None:
    labels = np.array([1, 1, 1, 1, 1, 0, 1, np.nan])
    scores = np.array([0.9, 0.2, 0.5, 0.7, 0.1, 0.99, 0.3, 0.5])
    hits = np.array([1, 1, 1, 0, 0, np.nan, 0, np.nan])
    chosen = choose_examples(labels, scores, hits)
    assert [(row, good) for row, _, good in chosen] == [(2, True), (6, False)]
    all_hit = choose_examples(labels, scores, np.where(labels == 1, 1.0, np.nan))
    assert [(row, good) for row, _, good in all_hit] == [(6, True), (4, True)] and "lowest" in all_hit[1][1]
    assert [row for row, _, _ in choose_examples(labels, scores, np.full(8, np.nan))] == [6]
    assert choose_examples(np.zeros(8), scores, hits) == ()


def test_distributions_hold_every_study_once() -> None:
    rng = np.random.default_rng(0)
    labels = np.r_[np.ones(30), np.zeros(70), np.full(5, -1), np.full(5, np.nan)]
    scores = 1 / (1 + np.exp(-rng.normal(labels == 1, 1.0)))
    found = distribution("Edema", labels, scores)
    assert (found.n_present, found.n_absent) == (30, 70)
    assert len(found.present) == len(found.absent) == BINS
    assert max(*found.present, *found.absent) == 1
    assert sum(found.present) == pytest.approx(sum(found.absent)), "both are shares of their group"
    assert all(0 <= at <= 1 for at, _ in found.ticks) and len(found.ticks) >= 2
    one_value = distribution("Edema", labels, np.full(110, 0.5))
    assert sum(v > 0 for v in one_value.present) == 1


def test_facts_are_told_in_one_line() -> None:
    sha256 = "ab" * 32
    facts = json.loads(json.dumps({"studies": {"train": 10, "test": 5}, "sha256": sha256, "seconds": {"training": 12.34567}, "none": None}))
    assert told(facts) == "studies (train 10, test 5), sha256 abababababab…, seconds (training 12.35), none not given"
