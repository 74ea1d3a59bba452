"""Phrase grounding: score image tokens against a phrase and lay the scores back on the image's own pixels.

Shapes: B images, Q phrases, H rows, W columns. Scores are cosines in [-1, 1] unless a source says otherwise; pixels the tower never saw
are NaN, not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medvl.metrics import peak
from medvl.model import DualEncoder
from tasks.grounding.grounder import Grounder, Query, finding_query, phrase_query
from tasks.grounding.maps import GridMaps, SimilarityMap, batch_extent, native_maps, native_step_mm, slug, token_maps
from tasks.grounding.settings import MapSettings
from tasks.grounding.sources import SOURCES, MapSource, source

__all__ = [
    "SOURCES",
    "GridMaps",
    "Grounder",
    "MapSettings",
    "MapSource",
    "Query",
    "SimilarityMap",
    "batch_extent",
    "finding_query",
    "ground",
    "native_maps",
    "native_step_mm",
    "phrase_query",
    "slug",
    "source",
    "token_maps",
]


def ground(model: DualEncoder, path: Path, phrases: Sequence[str], settings: MapSettings | None = None) -> list[SimilarityMap]:
    """Similarity maps of an image file for each phrase.

    Args:
        settings: how maps are made; the model's own unless told.
    Raises:
        UnreadableImageError: the file cannot be read.
        ValueError: no phrase, an empty one, or a tower that keeps no tokens.
    """
    (maps,) = Grounder(model, [phrase_query(phrase) for phrase in phrases], settings).of_files([Path(path)])
    native = (maps.native(i) for i in range(len(phrases)))
    return [SimilarityMap(phrase, scores, peak(scores)) for phrase, scores in zip(phrases, native, strict=True)]
