"""Statements of maps: regions against scikit-image, thresholds that keep their promise, and an empty answer for what is absent."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta
from skimage.filters import apply_hysteresis_threshold
from skimage.measure import label, regionprops

from medvl.metrics import Platt, overlap
from tasks.grounding.grounder import Query, phrase_query
from tasks.grounding.settings import MapSettings
from tasks.grounding.sources import SOURCES, source
from tasks.grounding.statements import Levels, state
from tasks.grounding.thresholds import (
    MapThresholds,
    ThresholdsError,
    dice_by_level,
    fit_thresholds,
    load_thresholds,
    lowest_threshold,
    place_of,
    score_at,
)


def test_regions_are_those_of_hysteresis_with_boxes_and_sizes() -> None:
    found_some = 0
    for case in range(120):
        rng = np.random.default_rng(case)
        shape = (17, 23) if case % 2 else (6, 11, 9)
        scores = rng.normal(size=shape).astype(np.float32)
        scores[rng.random(shape) < 0.1] = np.nan
        levels = Levels(detect=float(rng.uniform(1.0, 2.5)), spread=float(rng.uniform(0.0, 1.0)))
        step = tuple(rng.uniform(0.5, 3.0, len(shape)))
        said = state(scores, step, levels)
        low, high = levels.spread, levels.detect
        marked = label(np.nan_to_num(scores, nan=-99) >= low, connectivity=len(shape))
        kept = {number for number in np.unique(marked) if number and np.nanmax(scores[marked == number]) >= high}
        expected = np.isin(marked, list(kept))
        np.testing.assert_array_equal(said.mask, expected)
        if len(shape) == 2:  # scikit-image's has its own neighbours (4), so only what is inside ours is compared
            assert not (apply_hysteresis_threshold(np.nan_to_num(scores, nan=-99), low - 1e-9, high - 1e-9) & ~said.mask).any()
        props = {tuple(one.bbox): one for one in regionprops(label(expected, connectivity=len(shape)))}
        assert len(said.regions) == len(props) and said.found == bool(props)
        for region in said.regions:
            one = props[tuple(int(a + 0.5) for a in (*region.low, *region.high))]
            assert region.size == pytest.approx(one.area * math.prod(step) / (1000 if len(shape) == 3 else 1), rel=1e-6)
            assert region.score == pytest.approx(max(scores[tuple(at)] for at in one.coords))
            assert scores[region.peak] == pytest.approx(region.score)
        assert [one.score for one in said.regions] == sorted((one.score for one in said.regions), reverse=True)
        found_some += bool(props)
    assert 40 < found_some < 120


def test_a_map_that_says_nothing_is_not_found() -> None:
    nowhere = np.full((4, 5), np.nan, dtype=np.float32)
    said = state(nowhere, (1.0, 1.0), Levels(0.5, 0.1))
    assert said.found is False and said.peak is None and math.isnan(said.score) and not said.mask.any()
    flat = np.full((4, 5), 0.3, dtype=np.float32)
    assert state(flat, (1.0, 1.0), Levels(0.5, 0.1)).found is False
    assert state(flat, (1.0, 1.0)).found is None
    assert state(flat, (1.0, 1.0), Levels(math.inf, 0.1)).found is False
    (region,) = state(flat, (1.0, 1.0), Levels(0.2, 0.1)).regions  # one plateau has a middle
    assert (region.low, region.high) == ((-0.5, -0.5), (3.5, 4.5)) and region.peak == (2, 2)


def test_dice_by_level_is_dice_of_each_level() -> None:
    rng = np.random.default_rng(0)
    scores, mask = rng.normal(size=(9, 8)).astype(np.float32), rng.random((9, 8)) < 0.3
    scores[0] = np.nan
    grid = np.linspace(-2, 2, 11)
    expected = [overlap(np.nan_to_num(scores, nan=-99) >= level, mask)[1] for level in grid]
    np.testing.assert_allclose(dice_by_level(scores, mask, grid), expected, atol=1e-12)


def test_the_lowest_threshold_is_certain_of_its_share() -> None:
    rng = np.random.default_rng(1)
    absent = rng.random(400)
    threshold = lowest_threshold(absent, 0.05)
    count = int((absent >= threshold).sum())
    assert beta.ppf(0.95, count + 1, 400 - count) <= 0.05 < beta.ppf(0.95, count + 2, 400 - count - 1)
    with pytest.raises(ValueError, match="at least 60"):
        lowest_threshold(absent[:30], 0.05)


def finding(name: str) -> Query:
    return Query(name, (name,), (f"no {name}",), "finding")


def made(seed: int = 0, studies: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((studies, 3)) < 0.3).astype(float)
    scores = rng.normal(size=(studies, 3)) * [0.1, 0.2, 0.05] + labels * [0.3, 0.4, 0.01]
    labels[:5] = np.nan
    labels[5:9] = -1
    return scores, labels


def fitted(seed: int = 0, share: float = 0.05) -> MapThresholds:
    scores, labels = made(seed)
    dice = {"a": np.array([[0.1, 0.8, 0.2]]), "b": np.zeros((0, 3))}
    return fit_thresholds(
        *(scores, labels, dice, np.array([-0.5, -0.1, 5.0]), ["a", "b", "c"]),
        weights_sha256="w",
        modality="xray",
        settings=MapSettings(),
        false_share=share,
    )


def test_what_was_promised_on_validation_holds_on_others() -> None:
    for share in (0.05, 0.1):
        thresholds = fitted(share=share)
        scores, labels = made(seed=7, studies=6000)
        shares = []
        for i, name in enumerate("abc"):
            absent = scores[labels[:, i] == 0, i]
            shares.append(float((absent >= thresholds.levels(finding(name)).detect).mean()))
        assert np.mean(shares) < share and max(shares) < 2 * share
        present = scores[labels[:, 0] == 1, 0]
        assert (present >= thresholds.levels(finding("a")).detect).mean() > 0.8
    scores, labels = made()
    for i, name in enumerate("abc"):  # what was refused on validation stays refused on the way back from probability to score
        absent = scores[labels[:, i] == 0, i]
        assert (absent >= thresholds.levels(finding(name)).detect).mean() <= share
    every = [scores[labels[:, i] == 0, i] >= thresholds.levels(finding(name)).detect for i, name in enumerate("abc")]
    told = thresholds.fitted_on
    assert np.concatenate(every).sum() / told["absent"] == pytest.approx(told["false_share"])
    assert (
        thresholds.levels(finding("a")).spread == -0.1 and thresholds.levels(finding("b")).spread == thresholds.levels(finding("b")).detect
    )
    own = thresholds.findings["a"].calibrator
    assert own.apply([score_at(own, 0.3)])[0] == pytest.approx(0.3)
    assert score_at(Platt(-1.0, 0.0), 0.5) == math.inf
    assert thresholds.of(phrase_query("a")) is thresholds.pooled and thresholds.probability(finding("a"), math.nan) is None


def test_thresholds_come_back_from_their_file_and_refuse_other_maps(tmp_path: Path) -> None:
    thresholds = fitted()
    place = place_of(tmp_path, thresholds.settings, "xray")
    thresholds.save(place)
    assert load_thresholds(place, "w", MapSettings(), "xray") == thresholds
    with pytest.raises(ThresholdsError, match="other weights"):
        load_thresholds(place, "v", MapSettings(), "xray")
    assert load_thresholds(place, "w", MapSettings(), "xray", "any prompts") == thresholds
    replace(thresholds, prompts_sha256="p").save(place)
    with pytest.raises(ThresholdsError, match="other prompts"):
        load_thresholds(place, "w", MapSettings(), "xray", "q")
    assert load_thresholds(place, "w", MapSettings(), "xray", "p").prompts_sha256 == "p"
    with pytest.raises(ThresholdsError, match="made otherwise"):
        load_thresholds(place, "w", MapSettings(shifts=2), "xray")
    record = json.loads(place.read_text())
    for change in ({"format": 9}, {"findings": 3}, {"settings": {"source": "nowhere"}}):
        place.write_text(json.dumps(record | change))
        with pytest.raises(ThresholdsError):
            load_thresholds(place, "w", MapSettings(), "xray")


def test_what_cannot_tell_is_left_out_and_named() -> None:
    scores, labels = made()
    labels[:, 1] = 0
    found = fit_thresholds(
        *(scores, labels, {}, np.zeros(1), ["a", "b", "c"]), weights_sha256="w", modality="xray", settings=MapSettings(), false_share=0.05
    )
    assert "0 images with it" in found.left_out["b"] and "b" not in found.findings
    worse = scores * [1, 1, -1] - labels * [0, 0, 3.0]
    found = fit_thresholds(*(worse, labels, {}, np.zeros(1), ["a", "b", "c"]), weights_sha256="w", modality="xray", settings=MapSettings())
    assert found.levels(finding("c")).detect == math.inf and "no higher" in found.left_out["c"]
    with pytest.raises(ValueError, match="none of the labels"):
        fit_thresholds(
            *(scores, np.full_like(labels, np.nan), {}, np.zeros(1), ["a", "b", "c"]),
            weights_sha256="w",
            modality="xray",
            settings=MapSettings(),
        )


def test_settings_are_checked_and_hashed() -> None:
    assert MapSettings().sha256 != MapSettings(shifts=2).sha256
    assert MapSettings.from_dict(MapSettings(negation=True).to_dict()) == MapSettings(negation=True)
    for wrong in ({"source": "x"}, {"early": 2.0}, {"crops": 0}, {"shifts": 99}, {"smoothing_mm": -1.0}):
        with pytest.raises(ValueError, match=r"known|expected"):
            MapSettings(**wrong)
    assert set(SOURCES) == {source(name).name for name in SOURCES}


def test_options_name_every_source_and_format() -> None:
    from tasks.annotations import FORMATS as READ
    from tasks.commands.evaluate_maps import FORMATS
    from tasks.commands.maps import NAMES

    assert set(NAMES) == set(SOURCES)
    assert set(FORMATS) == {"manifest", *READ}
