"""Metrics of boxes that were found against boxes that are there: IoU, matching, accuracy at an IoU, average precision.

Shapes: P found boxes, T true ones, N images, n axes (2 or 3). A box is (2, n), its lowest and highest corner as edges in native index
coordinates (a box of pixel 3 alone is 2.5 to 3.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.bootstrap import Statistic, ratio

Boxes = NDArray[np.float64]


def box_iou(found: Boxes, true: Boxes) -> NDArray[np.float64]:
    """(P, T) intersection over union of (P, 2, n) with (T, 2, n); 0 where either has no extent.

    Raises:
        ValueError: boxes of another shape, or whose lowest corner is above the highest.
    """
    for name, boxes in (("found", found), ("true", true)):
        if boxes.ndim != 3 or boxes.shape[1] != 2 or (boxes[:, 0] > boxes[:, 1]).any():
            raise ValueError(f"{name} boxes have shape {boxes.shape}; expected (boxes, 2, axes), the lowest corner first")
    low = np.maximum(found[:, None, 0], true[None, :, 0])
    high = np.minimum(found[:, None, 1], true[None, :, 1])
    both = np.clip(high - low, 0, None).prod(-1)
    sizes = [(boxes[:, 1] - boxes[:, 0]).prod(-1) for boxes in (found, true)]
    return ratio(both, sizes[0][:, None] + sizes[1][None] - both).clip(0, 1) * (both > 0) if both.size else both


@dataclass(frozen=True)
class Matches:
    """What became of one image's boxes."""

    scores: NDArray[np.float64]  # (P,) of the found boxes
    hits: NDArray[np.bool_]  # (P,) whether each one was the first to find some true box
    true: int  # T


def match_boxes(found: Boxes, scores: NDArray[np.float64], true: Boxes, iou: float = 0.5) -> Matches:
    """Found boxes in order of score, each against the true box that it overlaps most of those not yet taken; a hit at ``iou`` or more.

    Of equal scores the first comes first. Both may be empty.

    Source: PASCAL VOC 2010 development kit, sec. 3.4.1, with COCO's rule that a taken box is passed over for the next best.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou is {iou}, expected above 0 and at most 1")
    if len(found) != len(scores):
        raise ValueError(f"{len(found)} boxes with {len(scores)} scores; they must match")
    hits, free = np.zeros(len(found), dtype=bool), np.ones(len(true), dtype=bool)
    if len(found) and len(true):
        table = box_iou(found, true)
        for i in np.argsort(-scores, kind="stable"):
            j = int(np.where(free, table[i], -1.0).argmax())
            if free[j] and table[i, j] >= iou:
                hits[i], free[j] = True, False
    return Matches(np.asarray(scores, dtype=np.float64), hits, len(true))


def accuracy_at_iou(found: Boxes, scores: NDArray[np.float64], true: Boxes, iou: float = 0.5) -> float:
    """1 if the box of highest score overlaps some true box by ``iou`` or more, 0 if not or if none was found.

    Raises:
        ValueError: no true box (an image without the finding has none to be right about: leave it out).
    Source: phrase grounding's Acc@IoU, one box a phrase; here any of several true boxes will do.
    """
    if not len(true):
        raise ValueError("accuracy at an IoU: the image has no true box; leave it out")
    if not len(found):
        return 0.0
    best = int(np.argmax(scores))
    return float(match_boxes(found[[best]], scores[[best]], true, iou).hits[0])


def average_precision_statistic(images: Sequence[Matches]) -> Statistic:
    """Average precision over N images as a function of their weights: area under the precision that is highest at each recall or beyond.

    Boxes of one score enter together, so that their order does not matter. Images without a true box count: what is found there is false.
    NaN without a true box anywhere.

    Source: PASCAL VOC 2010 (area under the interpolated curve at every recall, not at 11 points).
    """
    scores = np.concatenate([one.scores for one in images]) if images else np.zeros(0)
    hits = np.concatenate([one.hits for one in images]) if images else np.zeros(0, dtype=bool)
    owner = np.repeat(np.arange(len(images)), [len(one.scores) for one in images])
    true = np.array([one.true for one in images], dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    scores, hits, owner = scores[order], hits[order], owner[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, dtype=int)

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights @ true
        if not len(scores):
            return np.where(total > 0, 0.0, math.nan)
        drawn = weights[:, owner]
        right, all_found = np.cumsum(drawn * hits, 1)[:, ends], np.cumsum(drawn, 1)[:, ends]
        precision = np.nan_to_num(ratio(right, all_found))
        best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        gained = np.diff(right, axis=1, prepend=0.0)
        return ratio((gained * best).sum(1), total)

    return Statistic(of_weights, np.ones(len(images), dtype=bool), n_positive=int(true.sum()))
