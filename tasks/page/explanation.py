"""The page of one study's explanation: the image, its scores, and beside each visual sign where in the image it is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvl.metrics import peak
from medvl.model import DualEncoder
from tasks.explanation import Explanation, FindingExplanation, Sign
from tasks.page.figures import write_figures
from tasks.page.images import Drawn, PageImage, jpeg_uri, map_of, page_image
from tasks.render import thumbnail

SHOWN, VIEWS = 5, 4
"""Findings whose maps are drawn, the highest, and images of a study that are."""
SIDE = {"image": 512, "map": 220}
BAR, CURVE = 160, (260, 90)  # pixels


def write_explanation(
    path: Path,
    model: DualEncoder,
    explanation: Explanation,
    facts: Mapping[str, Any],
    *,
    called: Mapping[str, str] | None = None,
    probabilities: Mapping[str, float] | None = None,
    unfamiliar: str | None = None,
    findings: int = SHOWN,
) -> Path:
    """Write the page whole or not at all.

    Args:
        facts: how the scores were made, a line each.
        called: what findings are called, if not by their ids.
        probabilities: calibrated ones of the findings, where there are.
        unfamiliar: why the study is not what the model was made for, if it is not.
        findings: how many have maps drawn, the highest scores first; a class that says that nothing is wrong has none.
    """
    names = called or {}
    ordered = sorted(explanation.findings, key=lambda one: -one.score)
    views = [page_image(model, one) for one in explanation.paths[:VIEWS]]
    shown_ones = [one for one in ordered if any(sign.positive for sign in one.signs)][:findings]
    maps = {one.finding: _maps(model, views, one) for one in shown_ones} if views and views[0].features.tokens is not None else {}
    limit = max((float(np.nanmax(np.abs(drawn.scores))) for of in maps.values() for row in of for drawn in row), default=0.0) or 1.0
    sections = [
        {
            "name": names.get(one.finding, one.finding).replace("_", " "),
            "score": f"{one.score:.3f}",
            "bar": _bar(one.score),
            "probability": None if probabilities is None else f"{probabilities[one.finding]:.3f}",
            "how": one.how,
            "scale": None if one.scale == "none" or one.whole is None else f"{one.scale} {one.whole:.3f}",
            "signs": _signs(one, maps.get(one.finding), limit),
            "views": [_told(view.path, view.alone, view.change(one.score)) for view in one.views] if len(one.views) > 1 else [],
            "curves": [curve for series in explanation.slices if (curve := _curve(series, one.finding)) is not None],
        }
        for one in ordered
    ]
    page = {
        "images": [_image(view) for view in views],
        "unfamiliar": unfamiliar,
        "left_out": max(0, len(explanation.paths) - len(views)),
        "findings": sections,
        "drawn": len(maps),
        "limit": f"{limit:.2f}",
        "facts": dict(facts),
        "volumes": bool(views) and views[0].sample.affine is not None,
    }
    return write_figures(path, "explanation.html", page)


def _maps(model: DualEncoder, views: Sequence[PageImage], one: FindingExplanation) -> list[list[Drawn]]:
    """The maps of each sign, one for each image; none of what speaks against a finding.

    A sign's map is the highest token cosine with any of its prompts. Of a volume the slice that the map points at is shown.
    """
    found = []
    for sign in one.signs:
        row = []
        for view in views if sign.positive else ():
            scores = map_of(model, view, tuple(sign.positive))
            row.append(view.drawn(scores, peak(scores)))
        found.append(row)
    return found


def _signs(one: FindingExplanation, maps: list[list[Drawn]] | None, limit: float) -> list[dict[str, Any]]:
    """Lines of the table, the strongest signs first; bars are of scores where these are shares, else of what the signs add."""
    shares = all(0 <= sign.score <= 1 for sign in one.signs) and one.scale != "logit"
    largest = max((abs(sign.contribution) for sign in one.signs if sign.contribution is not None), default=0.0) or 1.0
    pictures = [[_map(drawn, limit) for drawn in row] for row in maps] if maps is not None else [[] for _ in one.signs]
    rows = []
    for sign, row in sorted(zip(one.signs, pictures, strict=True), key=lambda pair: (not pair[0].positive, -pair[0].score)):
        part = sign.contribution
        length = sign.score if shares else 0.0 if part is None else abs(part) / largest
        rows.append(
            {
                "about": sign.about.replace("_", " "),
                "against": not sign.positive,
                "score": f"{sign.score:.3f}",
                "contribution": "" if part is None else f"{part:+.3f}",
                "bar": round(BAR / 2 * length),
                "negative": not shares and part is not None and part < 0,
                "prompts": _prompts(sign),
                "pictures": row,
            }
        )
    return rows


def _prompts(sign: Sign) -> str:
    """The first prompt of each side, for a person."""
    return " / ".join(texts[0] for texts in (sign.positive, sign.negative) if texts)


def _map(drawn: Drawn, limit: float) -> dict[str, str]:
    png = thumbnail(
        drawn.picture.pixels,
        scores=drawn.scores,
        peak=drawn.peak,
        limits=(-limit, limit),
        orientation=drawn.picture.orientation,
        side=SIDE["map"],
        pixel_aspect=drawn.picture.pixel_aspect,
    )
    return {"src": jpeg_uri(png), "what": drawn.what}


def _image(view: PageImage) -> dict[str, str]:
    drawn = view.drawn(np.zeros_like(view.native), None)
    picture = drawn.picture
    png = thumbnail(picture.pixels, orientation=picture.orientation, side=SIDE["image"], pixel_aspect=picture.pixel_aspect)
    return {"src": jpeg_uri(png), "what": drawn.what}


def _curve(series: Any, finding: str) -> dict[str, Any] | None:
    """Scores of a volume's slices from the feet to the head, as a line; None where they were not scored."""
    scores = series.findings.get(finding)
    if not scores:
        return None
    width, height = CURVE
    low, high = min(scores), max(scores)
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)
    best = max(range(len(scores)), key=scores.__getitem__)

    def at(i: int) -> tuple[float, float]:
        x = 6 + i * (width - 12) / max(1, len(scores) - 1)
        return round(x, 1), round(6 + (height - 12) * (1 - (scores[i] - low) / (high - low)), 1)

    return {
        "line": " ".join(f"{x},{y}" for x, y in map(at, range(len(scores)))),
        "best": dict(zip("xy", at(best), strict=True)),
        "what": f"{Path(series.path).name}: highest in slice {series.index[best]:.0f}, z {series.z_mm[best]:.0f} mm: {scores[best]:.3f}",
    }


def _told(path: str, alone: float, change: float | None) -> dict[str, str]:
    return {"path": Path(path).name, "alone": f"{alone:.3f}", "change": "" if change is None else f"{change:+.3f}"}


def _bar(score: float) -> int | None:
    return round(BAR * score) if 0 <= score <= 1 else None
