"""What an archive needs besides questions: to be checked, counted, and rid of patients."""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.archive.derived import Derived, open_derived
from tasks.archive.store import ArchiveError, ArchiveStore, Removed

SAID = {1: "present", 0: "absent", -1: "uncertain"}


def removed_for_good(store: ArchiveStore, *, patients: Collection[str] = (), studies: Collection[str] = ()) -> tuple[Removed, list[Path]]:
    """Take studies out, make anew what is derived, and look for what is left of them.

    Returns:
        What was removed, and the files in which some trace of it still is.
    Raises:
        ArchiveError: a store that cannot be written to.
    """
    gone = store.remove(study_ids=studies, patient_ids=patients)
    if gone.studies:
        open_derived(store)
    return gone, files_with(store, gone.traces)


def files_with(store: ArchiveStore, traces: Collection[str]) -> list[Path]:
    """The files of an archive that hold one of some texts, as UTF-8 or as JSON writes it."""
    wanted = {form for trace in traces for form in (trace.encode(), json.dumps(trace)[1:-1].encode()) if form}
    return [path for path in _files(store) if wanted and _holds(path, wanted)]


def problems_of(store: ArchiveStore) -> list[str]:
    """What is wrong with a store or with what is derived of it, in words; empty: nothing.

    What is derived and does not fit is made again first, as every question does.

    Raises:
        ArchiveError: a store that cannot be read.
    """
    problems = store.verify()
    try:
        derived = open_derived(store)
    except ArchiveError as error:
        return [*problems, str(error)]
    return [*problems, *_differences(store, derived)]


def _differences(store: ArchiveStore, derived: Derived) -> Iterator[str]:
    """Where the derived files say something else than the store."""
    if [row.id for row in store.rows()] != derived.numbers.tolist():
        yield "derived: its studies are not those of the store"
        return
    for number in store.models():
        for kind in derived.kinds(number):
            gallery = derived.gallery(number, kind)
            row = {int(owner): i for i, owner in enumerate(gallery.owners)}
            wrong = 0
            for owner, blob in store.vectors(number, kind):
                vector = np.frombuffer(blob, "<f4").astype(np.float64)
                length = float(np.linalg.norm(vector))
                wrong += owner in row and not np.allclose(gallery.matrix[row[owner]], vector / max(length, 1e-12), atol=1e-5)
            if wrong:
                yield f"derived: {wrong} {kind} vectors of model {number} differ from the store's; delete {derived.folder} and ask again"


def facts_of(store: ArchiveStore) -> dict[str, Any]:
    """What a store holds, JSON-ready."""
    counts = store.counts()
    said: dict[str, Counter[str]] = {}
    for _, name, fact, _ in store.findings():
        if fact is not None:
            said.setdefault(name, Counter())[SAID[fact]] += 1
    derived = open_derived(store)
    order = sorted(said, key=lambda name: (-said[name]["present"], name))
    folder = store.derived
    return {
        "studies": counts.studies,
        "patients": counts.patients,
        "reports": counts.reports,
        "sentences": counts.sentences,
        "images": counts.images,
        "with_text": store.with_text,
        "models": [
            {
                "weights_sha256": key.weights_sha256,
                "preprocessing_sha256": key.preprocessing_sha256,
                "width": key.width,
                "vectors": dict(counts.vectors[number]),
                "approximate": {kind: how for kind in derived.kinds(number) if (how := derived.approximate(number, kind))},
            }
            for number, key in store.models().items()
        ],
        "findings": {name: {state: said[name][state] for state in SAID.values()} for name in order},
        "bytes": sum(path.stat().st_size for path in store.files()),
        "derived_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0,
    }


def _files(store: ArchiveStore) -> Iterator[Path]:
    yield from store.files()
    folder = store.derived
    if folder.is_dir():
        yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _holds(path: Path, wanted: Collection[bytes]) -> bool:
    """Whether a file holds one of some byte strings."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(one) >= 0 for one in wanted)
