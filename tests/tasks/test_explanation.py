"""What a score is made of: against formulas in plain numbers; and the page, read as HTML, with maps where grounding has them."""

from __future__ import annotations

import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import medvl
from reports.prompts import load_prompts
from tasks.cli import cli
from tasks.explanation import _contributions, explain
from tasks.grounding import ground
from tasks.page import explanation as page
from tasks.page.images import page_image
from tasks.scoring import Scorer, preset
from tasks.zero_shot import diagnose, encode_prompts

FINDINGS = ("cardiomegaly", "pleural_effusion")


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return medvl.load(tiny.model, device="cpu")


@pytest.fixture(scope="module")
def xplainer(model: Any) -> Scorer:
    return Scorer.of(model, preset("xplainer"), load_prompts("chest_xray"), FINDINGS)


@pytest.mark.parametrize("values", [[0.2, 0.9, 0.5], [0.7], [1.0, 1e-9]])
def test_contributions_add_up_to_what_they_say(values: list[float]) -> None:
    for combine, whole in (
        ("geometric", math.log(statistics.geometric_mean(values))),
        ("mean", statistics.fmean(values)),
        ("max", max(values)),
        ("roll_up", math.log(values[0] * max(values))),
    ):
        how, scale, told, parts = _contributions(values, combine)
        expected = values[0] if len(values) == 1 and combine != "roll_up" else whole
        assert told == pytest.approx(expected, abs=1e-12) and sum(p for p in parts if p is not None) == pytest.approx(expected, abs=1e-12)
        assert how and scale in ("score", "log score")


def test_signs_are_those_of_the_published_formula(model: Any, xplainer: Scorer, tiny: Any) -> None:
    """p_d = softmax of the pair of cosines / 0.5, p_c = exp mean log p_d, in float64."""
    (one,) = diagnose(model, [tiny.dicom], xplainer)
    found = explain(model, one, xplainer)
    image = torch.nn.functional.normalize(model.encode_samples([model.read(tiny.dicom)]).pooled.double(), dim=-1)[0].numpy()

    def cosine(text: str) -> float:
        vector = model.encode_text([text]).pooled.double()[0].numpy()
        return float(image @ vector / np.linalg.norm(vector))

    for finding in found.findings:
        assert finding.score == pytest.approx(one.findings[finding.finding], abs=1e-9) and finding.scale == "log score"
        signs = load_prompts("chest_xray").descriptors(finding.finding)
        assert [sign.about for sign in finding.signs] == [sign.descriptor for sign in signs] and len(signs) > 3
        for sign in finding.signs:
            expected = 1 / (1 + math.exp((cosine(sign.negative[0]) - cosine(sign.positive[0])) / 0.5))
            assert sign.score == pytest.approx(expected, abs=1e-6)
        whole = sum(sign.contribution for sign in finding.signs if sign.contribution is not None)
        assert whole == pytest.approx(math.log(finding.score), abs=1e-9)
        assert [(view.alone, view.without) for view in finding.views] == [(pytest.approx(finding.score), None)]


def test_our_prompts_add_up_to_the_logit(model: Any, tiny: Any) -> None:
    bank = encode_prompts(model, load_prompts(), FINDINGS)
    (one,) = diagnose(model, (), bank, studies=[[tiny.dicom, tiny.png]])
    for finding in explain(model, one, bank).findings:
        whole = sum(sign.contribution or 0.0 for sign in finding.signs)
        assert 1 / (1 + math.exp(-whole)) == pytest.approx(one.findings[finding.finding], abs=1e-6)
        pair = load_prompts().findings[finding.finding]
        assert {sign.about for sign in finding.signs if sign.positive} == set(pair.positive)
        assert {sign.about for sign in finding.signs if sign.negative} == set(pair.negative)


@pytest.mark.parametrize("ours", [True, False])
def test_an_image_s_part_is_the_change_when_it_is_left_out(model: Any, xplainer: Scorer, tiny: Any, ours: bool) -> None:
    scoring = encode_prompts(model, load_prompts(), FINDINGS) if ours else xplainer
    (both,) = diagnose(model, (), scoring, studies=[[tiny.dicom, tiny.png]])
    alone = [next(iter(diagnose(model, [path], scoring))).findings for path in (tiny.dicom, tiny.png)]
    found = explain(model, both, scoring)
    assert found.paths == (str(tiny.dicom), str(tiny.png))
    for one in found.findings:
        first, second = one.views
        assert (first.alone, second.alone) == tuple(pytest.approx(of[one.finding], abs=1e-6) for of in alone)
        assert first.without == pytest.approx(alone[1][one.finding], abs=1e-6)
        assert second.change(one.score) == pytest.approx(both.findings[one.finding] - alone[0][one.finding], abs=1e-6)


def test_where_nothing_adds_up_nothing_is_said_to(model: Any, tiny: Any) -> None:
    prompts = load_prompts("chest_xray")
    for name, names, said in (
        ("medclip", FINDINGS, "softmax over all findings"),
        ("xplainer", ("no_finding", *FINDINGS), "less the highest of the others"),
    ):
        scorer = Scorer.of(model, preset(name), prompts, names)
        (one,) = diagnose(model, [tiny.png], scorer)
        first = explain(model, one, scorer).findings[0]
        assert said in first.how and first.whole is None and all(sign.contribution is None for sign in first.signs)


def test_maps_are_those_of_grounding_on_the_film_s_own_pixels(model: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = encode_prompts(model, load_prompts(), FINDINGS)
    (one,) = diagnose(model, [tiny.dicom], bank)
    found = explain(model, one, bank).findings[1]
    view = page_image(model, str(tiny.dicom))
    maps = page._maps(model, [view], found)
    for sign, row in zip(found.signs, maps, strict=True):
        assert len(row) == bool(sign.positive)
        for drawn in row:
            (expected,) = ground(model, tiny.dicom, [sign.about])
            assert drawn.scores.shape == (48, 40) == drawn.picture.pixels.shape
            np.testing.assert_allclose(drawn.scores, expected.scores, atol=1e-6)
            assert drawn.peak == expected.peak
    rows, columns = view.features.grid  # type: ignore[misc]
    spot = (rows - 3, columns // 2 - 1)

    def planted(*_: Any) -> torch.Tensor:
        grid = torch.zeros(1, 1, rows, columns)
        grid[0, 0, spot[0], spot[1]] = 1.0
        return grid

    monkeypatch.setattr("tasks.page.images.token_maps", planted)
    drawn = page._maps(model, [view], found)[0][0]
    scale, cell = 64 / 48, 64 / rows  # 48 x 40 is letterboxed to 64 x 64
    row, column = (spot[0] + 0.5) * cell / scale, ((spot[1] + 0.5) * cell - (64 - 40 * scale) / 2) / scale
    assert drawn.peak is not None and abs(drawn.peak[0] - row) <= cell and abs(drawn.peak[1] - column) <= cell


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag != "script"
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def test_the_command_explains_every_good_study_and_goes_on_where_it_was_stopped(tiny: Any, tmp_path: Path) -> None:
    """The labels of a set, by visual signs; a broken file costs only itself."""
    ask = ["--model", tiny.model, "--prompts", "chest_xray", "--preset", "xplainer", *(f"--finding={name}" for name in FINDINGS)]
    files = [tiny.dicom, tiny.broken, tiny.png]
    done = run("diagnose", *files, *ask, "--out", tmp_path / "a.csv", "--explain", tmp_path / "whole")
    assert done.exit_code == 1, done.output
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) == 4 and {Path(name).suffix for name in names} == {".json", ".html"} and names[0].startswith("s00_dcm-")
    told = json.loads((tmp_path / "whole" / names[1]).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert told["calibrated"] is False and "not for diagnosis" in told["notice"] and told["study"] == str(tiny.dicom)
    assert told["unfamiliar"] is None
    assert {one["label"] for one in told["findings"]} == set(FINDINGS)
    html = (tmp_path / "whole" / names[0]).read_text()
    seen = Page(html)
    signs = sum(len(load_prompts("chest_xray").descriptors(name)) for name in FINDINGS)
    assert len(seen.images) == 1 + signs and all(src.startswith("data:image/jpeg;base64,") for src in seen.images)
    assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", html) and "not for diagnosis" in html and len(html) < 1_000_000
    words = " ".join(" ".join(seen.text).split())
    for one in told["findings"]:
        assert f"{one['score']:.3f}" in words
        for sign in one["signs"]:
            assert sign["about"] in words and f"{sign['contribution']:+.3f}" in words
    run("diagnose", *files[:1], *ask, "--out", tmp_path / "b.csv", "--explain", tmp_path / "parts")
    again = run("diagnose", *files, *ask, "--out", tmp_path / "b.csv", "--explain", tmp_path / "parts")
    assert again.exit_code == 1
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_page_says_that_its_study_is_not_what_the_model_was_made_for(model: Any, tiny: Any, tmp_path: Path) -> None:
    bank = encode_prompts(model, load_prompts(), FINDINGS)
    (one,) = diagnose(model, [tiny.png], bank)
    path = page.write_explanation(tmp_path / "p.html", model, explain(model, one, bank), {}, unfamiliar="body part <HAND>", findings=1)
    text = path.read_text()
    assert "Not what the model was made for:" in text and "body part &lt;HAND&gt;." in text
    assert Page(text).images and len(Page(text).images) == 1 + len(load_prompts().findings[FINDINGS[0]].positive)
