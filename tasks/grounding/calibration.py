"""Thresholds of maps from validation images: their highest scores, and the overlap of what lies above each level with their masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medvl.types import UnreadableImageError
from tasks.grounding.evaluation import GroundingImage, encoded
from tasks.grounding.grounder import Grounder
from tasks.grounding.maps import GridMaps
from tasks.grounding.thresholds import STEPS, MapThresholds, dice_by_level, fit_thresholds
from tasks.masks import MaskError


def calibrate_maps(
    grounder: Grounder,
    images: Sequence[GroundingImage],
    weights_sha256: str,
    modality: str,
    *,
    false_share: float = 0.05,
    fitted_on: Mapping[str, Any] | None = None,
    prompts_sha256: str | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[MapThresholds, list[tuple[str, str]]]:
    """Thresholds, and the studies that were left out with the reason.

    Raises:
        ValueError: images that cannot tell a threshold; see :func:`tasks.grounding.thresholds.fit_thresholds`.
    """
    rejected: list[tuple[str, str]] = []
    scores: list[Any] = []
    labels: list[Any] = []
    patients: set[str] = set()
    names = [query.name for query in grounder.queries]
    kept: list[tuple[int, GridMaps, Any, tuple[int, ...]]] = []  # grids and packed masks: maps of all would not fit in memory
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        for image, sample, maps in encoded(grounder, part, rejected):
            row, truth = np.full((2, len(names)), np.nan)
            try:
                for asked in image.asked:
                    mask = None if asked.mask is None else asked.mask(sample)
                    native = maps.native(asked.query)
                    row[asked.query] = float(np.nanmax(native)) if np.isfinite(native).any() else np.nan
                    truth[asked.query] = float(asked.present)
                    if mask is not None and mask.any():
                        kept.append((asked.query, maps, np.packbits(mask), mask.shape))
            except (MaskError, UnreadableImageError) as error:
                rejected.append((image.study, str(error)))
                continue
            scores.append(row)
            labels.append(truth)
            patients.add(image.patient)
        progress(len(part))
    if not scores:
        raise ValueError(f"no validation image could be measured; {len(rejected)} were left out")
    every = np.stack(scores)
    finite = every[np.isfinite(every)]
    grid = np.linspace(finite.min(), finite.max(), STEPS) if len(finite) else np.zeros(1)
    dice: dict[str, Any] = {name: [] for name in names}
    for query, maps, packed, shape in kept:
        mask = np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).astype(bool)
        dice[names[query]].append(dice_by_level(maps.native(query), mask, grid))
    facts = {"images": len(scores), "patients": len(patients), "with_masks": len(kept), **(fitted_on or {})}
    fitted = fit_thresholds(
        *(every, np.stack(labels), {name: np.array(table) for name, table in dice.items()}, grid, names),
        weights_sha256=weights_sha256,
        modality=modality,
        settings=grounder.settings,
        false_share=false_share,
        fitted_on=facts,
        prompts_sha256=prompts_sha256,
    )
    return fitted, rejected
