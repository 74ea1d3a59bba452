"""The page without a server: a folder whose index.html opens from disk, with the images and maps in scripts beside it.

A page from disk may load scripts but fetch nothing, so what the server would answer stands in them: ``data.js`` with what the page begins
with, ``study-N.js`` with one study, loaded when it is opened.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medvl.files import write_atomically
from medvl.types import RESEARCH_USE, UnreadableImageError
from tasks.view.content import Kind, NoMapError, Viewer
from tasks.view.server import STATIC, static_file
from tasks.view.studies import Study

MOST_FINDINGS = 20
"""Maps of findings in an exported study, those of the highest scores: each is some hundred kB, and a set may name hundreds of findings."""
DATA_SCRIPT = '<script src="data.js" defer></script>'


def export_page(folder: Path, viewer: Viewer, studies: Sequence[Study], phrases: Sequence[str]) -> list[tuple[str, str]]:
    """Write the page of some studies; those that cannot be read, with the reason, which the page lists too.

    Args:
        folder: must exist; files there of the same names are replaced.
        phrases: that the page has maps of, besides those of findings.
    """
    rejected: list[tuple[str, str]] = []
    for number, study in enumerate(studies):
        try:
            told = _study(viewer, study, phrases)
        except UnreadableImageError as error:
            study.error = str(error).replace(str(study.path), study.name)
            rejected.append((str(study.path), str(error)))
        else:
            _write(folder / f"study-{number}.js", f"medvl.takeStudy({number}, {json.dumps(told, allow_nan=False)});\n")
        study.checked = True
    for name in STATIC:
        write_atomically(folder / name, static_file(name))
    state = {
        "notice": RESEARCH_USE,
        "models": [{"name": model.name} for model in viewer.models],
        "studies": [one.to_dict(number) for number, one in enumerate(studies)],
        "phrases": list(phrases),
        "maxUpload": 0,
    }
    _write(folder / "data.js", f'"use strict";\nvar medvl = medvl || {{}};\nmedvl.data = {json.dumps(state, allow_nan=False)};\n')
    page = static_file("index.html").decode().replace("<!-- data -->", DATA_SCRIPT)
    _write(folder / "index.html", page.replace("'self'", "'self' file:"))  # not every browser counts a neighbour on disk as itself
    return rejected


def _study(viewer: Viewer, study: Study, phrases: Sequence[str]) -> dict[str, Any]:
    shown = viewer.show(study.path)
    models: list[dict[str, Any]] = []
    for number in range(len(viewer.models)):
        try:
            scores = viewer.scores(study.path, number)
        except UnreadableImageError as error:  # one model is for radiographs, another for CT
            models.append({"scores": {"error": str(error), "findings": [], "notes": [], "unfamiliar": []}, "maps": []})
            continue
        best = sorted(scores["findings"], key=lambda row: -row["score"])[:MOST_FINDINGS]
        asked: list[tuple[Kind, str]] = [("phrase", phrase) for phrase in phrases]
        asked += [("finding", row["finding"]) for row in best]
        models.append({"scores": scores, "maps": _maps(viewer, study.path, number, asked)})
    return {"info": {"name": study.name, **shown.to_dict()}, "image": base64.b64encode(shown.nifti).decode(), "models": models}


def _maps(viewer: Viewer, path: Path, model: int, asked: Sequence[tuple[Kind, str]]) -> list[dict[str, Any]]:
    try:
        return [viewer.map(path, model, kind, what) for kind, what in asked]
    except NoMapError:
        return []


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode("utf-8", "surrogateescape"))
