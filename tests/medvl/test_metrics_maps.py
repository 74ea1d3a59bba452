"""Map and box metrics on 500 random cases against implementations that share no code: scikit-learn, scikit-image, and plain loops."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.measure import label, regionprops
from sklearn.metrics import f1_score, jaccard_score

from medvl.geometry import GridMoments, letterbox
from medvl.metrics import (
    IOU_THRESHOLDS,
    Matches,
    accuracy_at_iou,
    area_above,
    average_precision_statistic,
    bootstrap_interval,
    box_iou,
    contrast_of_moments,
    contrast_to_noise,
    distance_to_centre,
    match_boxes,
    mean_iou,
    overlap,
    peak,
    pointing_game,
    tied_peaks,
)

CASES = 500


def cases() -> Iterator[tuple[np.random.Generator, np.ndarray, np.ndarray]]:
    """Maps of two or three axes with NaN, ties and plateaus, and masks of boxes, blobs, points, everything and nothing."""
    for case in range(CASES):
        rng = np.random.default_rng(case)
        shape = tuple(int(n) for n in rng.integers(2, 14 if case % 3 else 8, 2 if case % 3 else 3))
        scores = np.round(rng.normal(size=shape), int(rng.integers(0, 4))).astype(np.float32)
        if case % 4 == 1:
            scores[rng.random(shape) < 0.3] = np.nan
        if case % 50 == 7:
            scores[:] = 0.25
        if case % 50 == 9:
            scores[:] = np.nan
        mask = np.zeros(shape, dtype=bool)
        kind = case % 6
        if kind in (0, 1):
            for _ in range(int(rng.integers(1, 4))):
                low = [int(rng.integers(0, n)) for n in shape]
                mask[tuple(slice(a, a + int(rng.integers(1, 5))) for a in low)] = True
        elif kind == 2:
            mask = rng.random(shape) < 0.3
        elif kind == 3:
            mask[tuple(int(rng.integers(0, n)) for n in shape)] = True
        elif kind == 4:
            mask[:] = True
        yield rng, scores, mask


def test_contrast_to_noise_is_the_formula_over_single_pixels() -> None:
    seen = 0
    for _, scores, mask in cases():
        inside = [float(s) for s, m in zip(scores.ravel(), mask.ravel(), strict=True) if m and not math.isnan(s)]
        outside = [float(s) for s, m in zip(scores.ravel(), mask.ravel(), strict=True) if not m and not math.isnan(s)]
        signed, absolute = contrast_to_noise(scores, mask), contrast_to_noise(scores, mask, absolute=True)
        noise = math.sqrt(statistics.pvariance(inside) + statistics.pvariance(outside)) if inside and outside else 0.0
        if noise == 0:
            assert math.isnan(signed) and math.isnan(absolute)
            continue
        expected = (statistics.fmean(inside) - statistics.fmean(outside)) / noise
        assert signed == pytest.approx(expected, abs=1e-9) and absolute == pytest.approx(abs(expected), abs=1e-9)
        seen += 1
    assert seen > 250


def test_overlap_and_mean_iou_are_scikit_learns() -> None:
    seen = 0
    for rng, scores, mask in cases():
        found = rng.random(mask.shape) < 0.4
        iou, dice = overlap(found, mask)
        if not (found | mask).any():
            assert math.isnan(iou) and math.isnan(dice)
        else:
            assert iou == pytest.approx(jaccard_score(mask.ravel(), found.ravel(), zero_division=0), abs=1e-12)
            assert dice == pytest.approx(f1_score(mask.ravel(), found.ravel(), zero_division=0), abs=1e-12)
        if not mask.any():
            with pytest.raises(ValueError, match="leave the study out"):
                mean_iou(scores, mask)
            continue
        calls = [[not math.isnan(s) and s >= t for s in scores.ravel()] for t in IOU_THRESHOLDS]
        expected = np.mean([jaccard_score(mask.ravel(), call, zero_division=0) for call in calls])
        assert mean_iou(scores, mask) == pytest.approx(expected, abs=1e-12)
        seen += 1
    assert seen > 300
    with pytest.raises(ValueError, match="at least one threshold"):
        mean_iou(np.zeros((2, 2)), np.ones((2, 2), dtype=bool), ())
    with pytest.raises(ValueError, match="must match"):
        overlap(np.zeros((2, 2), dtype=bool), np.zeros((3, 2), dtype=bool))


def test_the_pointing_game_is_the_share_of_tied_highest_pixels_inside() -> None:
    for _, scores, mask in cases():
        pixels = {index: float(s) for index, s in np.ndenumerate(scores) if not math.isnan(s)}
        highest = max(pixels.values(), default=None)
        tied = [index for index, s in pixels.items() if s == highest]
        nowhere = not pixels or (len(pixels) > 1 and len(tied) == len(pixels))
        if not mask.any():
            with pytest.raises(ValueError, match="leave the study out"):
                pointing_game(peak(scores), mask)
            continue
        expected = 0.0 if nowhere else sum(bool(mask[index]) for index in tied) / len(tied)
        assert pointing_game(tied_peaks(scores), mask) == pytest.approx(expected)
        one = peak(scores)
        assert (one is None) == nowhere and (one is None or one in tied)
        assert pointing_game(one, mask) == (0.0 if one is None else float(mask[one]))


def test_area_above_is_a_share_of_what_was_seen() -> None:
    for _, scores, _ in cases():
        known = [float(s) for s in scores.ravel() if not math.isnan(s)]
        found = area_above(scores, 0.5)
        assert math.isnan(found) if not known else found == pytest.approx(sum(s >= 0.5 for s in known) / len(known))


def test_the_distance_is_to_the_nearest_pieces_centroid_in_mm() -> None:
    seen = 0
    for rng, scores, mask in cases():
        at = peak(scores)
        step = np.diag(rng.uniform(0.5, 6.0, mask.ndim))
        if mask.ndim == 3:
            step = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ step  # an oblique volume
        if not mask.any():
            with pytest.raises(ValueError, match="leave the study out"):
                distance_to_centre(at, mask, step)
            continue
        away, along = distance_to_centre(at, mask, step)
        if at is None:
            assert math.isnan(away) and math.isnan(along)
            continue
        vectors = [
            sum((a - c) * step[:, k] for k, (a, c) in enumerate(zip(at, piece.centroid, strict=True)))
            for piece in regionprops(label(mask, connectivity=mask.ndim))
        ]
        best = min(vectors, key=np.linalg.norm)
        axis = step[:, 0] / np.linalg.norm(step[:, 0])
        assert away == pytest.approx(math.dist(best, [0.0] * len(best)), abs=1e-9)
        assert along == pytest.approx(abs(sum(a * b for a, b in zip(best, axis, strict=True))), abs=1e-9)
        seen += 1
    assert seen > 300


# --- boxes -------------------------------------------------------------------------------------------------------------------------


def random_boxes(rng: np.random.Generator, count: int, axes: int) -> np.ndarray:
    low = rng.integers(0, 12, (count, 1, axes))
    return np.concatenate([low, low + rng.integers(1, 8, (count, 1, axes))], axis=1).astype(float) - 0.5


def pixels_of(box: np.ndarray) -> set[tuple[int, ...]]:
    sides = [range(math.ceil(a), math.ceil(b)) for a, b in zip(*box, strict=True)]
    return set(np.ndindex(*[len(s) for s in sides])) and {
        tuple(s[i] for s, i in zip(sides, at, strict=True)) for at in np.ndindex(*map(len, sides))
    }


def plain_matches(found: np.ndarray, scores: np.ndarray, true: np.ndarray, iou: float) -> list[bool]:
    """The rule over sets of pixels, one box at a time."""
    theirs, taken, hits = [pixels_of(box) for box in true], set(), [False] * len(found)
    for i in sorted(range(len(found)), key=lambda i: (-scores[i], i)):
        mine = pixels_of(found[i])
        shares = {j: len(mine & other) / len(mine | other) for j, other in enumerate(theirs) if j not in taken}
        if shares and max(shares.values()) >= iou:
            taken.add(max(shares, key=lambda j: shares[j]))
            hits[i] = True
    return hits


def plain_average_precision(images: list[tuple[np.ndarray, list[bool], int]]) -> float:
    """Every recall level in turn: the best precision of any threshold that reaches it."""
    total = sum(true for _, _, true in images)
    if not total:
        return math.nan
    every = [(float(s), hit) for scores, hits, _ in images for s, hit in zip(scores, hits, strict=True)]
    points = []
    for threshold in {s for s, _ in every}:
        kept = [hit for s, hit in every if s >= threshold]
        points.append((sum(kept), sum(kept) / len(kept)))
    return sum(max((precision for right, precision in points if right >= level), default=0.0) for level in range(1, total + 1)) / total


def box_case(case: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(case)
    axes = 2 if case % 3 else 3
    found, true = random_boxes(rng, int(rng.integers(0, 5)), axes), random_boxes(rng, int(rng.integers(0, 4)), axes)
    if len(found) and len(true):
        found[0] = true[0] + rng.integers(0, 2)
    return found, np.round(rng.random(len(found)), 1), true


def test_box_metrics_are_those_of_sets_of_pixels() -> None:
    for case in range(CASES):
        found, scores, true = box_case(case)
        table = box_iou(found, true)
        for i, a in enumerate(found):
            for j, b in enumerate(true):
                assert table[i, j] == pytest.approx(len(pixels_of(a) & pixels_of(b)) / len(pixels_of(a) | pixels_of(b)), abs=1e-12)
        matches = match_boxes(found, scores, true, 0.4)
        assert matches.hits.tolist() == plain_matches(found, scores, true, 0.4)
        if not len(true):
            with pytest.raises(ValueError, match="leave it out"):
                accuracy_at_iou(found, scores, true)
        else:
            best = [max(range(len(found)), key=lambda i: scores[i])] if len(found) else []
            expected = any(
                len(pixels_of(found[i]) & pixels_of(b)) / len(pixels_of(found[i]) | pixels_of(b)) >= 0.5 for i in best for b in true
            )
            assert accuracy_at_iou(found, scores, true) == float(expected)


def test_average_precision_is_the_best_precision_at_every_recall() -> None:
    for group in range(0, CASES, 5):
        images = []
        for case in range(group, group + 5):
            found, scores, true = box_case(case)
            images.append((match_boxes(found, scores, true, 0.4), plain_matches(found, scores, true, 0.4)))
        expected = plain_average_precision([(m.scores, hits, m.true) for m, hits in images])
        got = average_precision_statistic([m for m, _ in images]).value
        assert math.isnan(got) if math.isnan(expected) else got == pytest.approx(expected, abs=1e-12)


def test_average_precision_counts_an_image_as_often_as_it_is_drawn() -> None:
    images = [match_boxes(*box_case(case), 0.4) for case in (5, 8, 12, 13)]
    weights = np.array([[2.0, 0.0, 1.0, 3.0]])
    repeated = [image for image, times in zip(images, weights[0], strict=True) for _ in range(int(times))]
    assert average_precision_statistic(images).of_weights(weights)[0] == pytest.approx(average_precision_statistic(repeated).value)
    interval = bootstrap_interval(average_precision_statistic(images), ["a", "b", "c", "d"], repeats=200)
    assert interval.ci_low <= interval.value <= interval.ci_high
    nothing = [Matches(np.zeros(0), np.zeros(0, dtype=bool), 2)]
    assert average_precision_statistic(nothing).value == 0.0


def test_box_metrics_refuse_what_is_no_box() -> None:
    box = np.array([[[3.0, 3.0], [1.0, 5.0]]])
    with pytest.raises(ValueError, match="lowest corner first"):
        box_iou(box, box)
    with pytest.raises(ValueError, match="must match"):
        match_boxes(box[:, ::-1], np.zeros(2), box[:, ::-1])
    with pytest.raises(ValueError, match="at most 1"):
        match_boxes(box[:, ::-1], np.zeros(1), box[:, ::-1], 1.5)


# --- on the grid -------------------------------------------------------------------------------------------------------------------


def test_contrast_on_the_grid_is_that_of_the_map() -> None:
    """Grids laid out by SciPy, which shares nothing with our laying out: 64 pixels of 8 tokens."""
    rng = np.random.default_rng(3)
    transform = letterbox((64, 64), 64)
    grids = rng.normal(size=(4, 8, 8)).astype(np.float32)
    at = np.clip((np.arange(64) + 0.5) / 8 - 0.5, 0, 7)
    places = np.stack(np.meshgrid(at, at, indexing="ij"))
    maps = [ndimage.map_coordinates(grid.astype(np.float64), places, order=1) for grid in grids]
    moments = GridMoments(transform, (8, 8))
    boxes = np.array([[[9.5, 4.5], [30.5, 20.5]], [[-0.5, -0.5], [10.5, 63.5]]])
    got = contrast_of_moments(moments.of_boxes(torch.from_numpy(grids), boxes), moments.whole(torch.from_numpy(grids)))
    for q, scores in enumerate(maps):
        for r, mask in enumerate((np.s_[10:31, 5:21], np.s_[0:11, 0:64])):
            where = np.zeros((64, 64), dtype=bool)
            where[mask] = True
            expected = (scores[where].mean() - scores[~where].mean()) / math.sqrt(scores[where].var() + scores[~where].var())
            assert got[q, r] == pytest.approx(expected, abs=1e-5)
    flat = torch.full((1, 8, 8), 0.3)
    assert np.isnan(contrast_of_moments(moments.of_boxes(flat, boxes), moments.whole(flat))).all()
    signed, absolute = (
        contrast_of_moments(moments.of_boxes(torch.from_numpy(grids), boxes), moments.whole(torch.from_numpy(grids)), absolute=a)
        for a in (False, True)
    )
    np.testing.assert_allclose(np.abs(signed), absolute)
