"""The page of a search: what was asked, and each hit with its picture, its report with the sentences that fit, and a map of the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvl.metrics import peak
from medvl.model import DualEncoder
from medvl.types import UnreadableImageError
from reports.facts.ontology import load_ontology
from tasks.archive.search import ArchiveHit
from tasks.page.figures import write_figures
from tasks.page.images import PageImage, jpeg_uri, map_of, page_image
from tasks.render import overlay, thumbnail

SIDE = 260
"""Pixels of the longer side of a picture."""


def write_hits(
    path: Path,
    hits: Sequence[ArchiveHit],
    model: DualEncoder,
    *,
    asked: Sequence[str],
    images: Sequence[Path] = (),
    texts: Sequence[str] = (),
    facts: str = "",
) -> list[tuple[str, str]]:
    """Write the page; maps go into a folder beside it that is named after it.

    Args:
        path: of the page.
        hits: best first.
        model: draws the pictures and the maps.
        asked: what was asked, line by line.
        images: that were asked with.
        texts: that were asked with; a map is of these, else of the hit's best sentence.
        facts: how it was searched, in a line.
    Returns:
        (path, why) of images that could not be shown.
    """
    lost: list[tuple[str, str]] = []
    maps = path.with_name(path.stem + "_maps")
    shown = [_hit(hit, model, maps, texts, lost) for hit in hits]
    queries = [picture for file in images if (picture := _picture(_image(model, str(file), lost))) is not None]
    write_figures(path, "hits.html", {"asked": list(asked), "queries": queries, "hits": shown, "facts": facts})
    return lost


def _hit(hit: ArchiveHit, model: DualEncoder, maps: Path, texts: Sequence[str], lost: list[tuple[str, str]]) -> dict[str, Any]:
    image = _image(model, hit.study.images[0][0], lost) if hit.study.images else None
    matched = {one.text: one.score for one in hit.sentences}
    best = next((one.words for one in hit.sentences if one.words), None)
    phrases = tuple(texts) or ((best,) if best else ())
    told = hit.study.metadata
    known = [
        f"{name} {told[name]:g}" if name == "age" else f"{name} {told[name]}"
        for name in ("modality", "view", "date", "sex", "age")
        if told[name]
    ]
    return {
        "rank": hit.rank,
        "study_id": hit.study.study_id,
        "score": f"{hit.score:.3f}",
        "parts": [f"{name} {value:.3f}" for name, value in (("vectors", hit.vector_score), ("words", hit.text_score)) if value is not None],
        "known": ", ".join(known),
        "picture": _picture(image),
        "images": len(hit.study.images),
        "map": None if image is None or not phrases else _map(model, image, phrases, maps / f"{hit.rank}.png"),
        "phrase": "; ".join(phrases),
        "sentences": [
            {"words": words, "score": f"{matched[text]:.2f}" if text in matched else None} for text, words in hit.study.sentences if words
        ],
        "present": _most_special(hit, 1),
        "uncertain": _most_special(hit, -1),
        "same": list(hit.same_report),
    }


def _most_special(hit: ArchiveHit, state: int) -> list[str]:
    """The findings of a state, in words, without those that another of them is a kind of."""
    ontology = load_ontology()
    named = [name for name, value in hit.study.findings.items() if value == state]
    above = {more for name in named if name in ontology.parents for more in ontology.ancestors(name)}
    return [name.replace("_", " ") for name in named if name not in above]


def _image(model: DualEncoder, path: str, lost: list[tuple[str, str]]) -> PageImage | None:
    try:
        return page_image(model, path)
    except UnreadableImageError as error:
        lost.append((path, str(error)))
        return None


def _picture(image: PageImage | None) -> dict[str, str] | None:
    if image is None:
        return None
    drawn = image.drawn(np.zeros_like(image.native), None)
    picture = drawn.picture
    png = thumbnail(picture.pixels, orientation=picture.orientation, side=SIDE, pixel_aspect=picture.pixel_aspect)
    return {"src": jpeg_uri(png), "what": drawn.what}


def _map(model: DualEncoder, image: PageImage, phrases: tuple[str, ...], path: Path) -> str | None:
    """The map of phrases on an image, written to a file; how the page names it, or None where the model keeps no tokens."""
    if image.features.tokens is None:
        return None
    path.parent.mkdir(exist_ok=True)
    scores = map_of(model, image, phrases)
    drawn = image.drawn(scores, peak(scores))
    picture = drawn.picture
    overlay(
        *(picture.pixels, drawn.scores, "; ".join(phrases), path),
        peak=drawn.peak,
        orientation=picture.orientation,
        pixel_aspect=picture.pixel_aspect,
        column_mm=picture.column_mm,
    )
    return f"{path.parent.name}/{path.name}"
