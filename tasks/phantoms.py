"""A cohort of thorax phantoms on disk: radiographs, CT, masks, reports and the manifest that ties them together. All of it is synthetic.

Study i of a seed is the same whatever the cohort's size and the number of processes. The seed's hash is part of every id, so cohorts of
different seeds share nothing. A stopped run goes on where it was: each study leaves a record once its files are whole.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from medvl.memory import keep_freed_memory
from medvl.types import FINDINGS, Fact

if TYPE_CHECKING:
    from modalities.phantom.radiograph import View

FOLLOW_UP_SHARE = 0.1
"""Of neighbouring pairs of studies, how many are one patient: about one patient in twenty has two studies."""
AP_SHARE = 0.25
UNCERTAIN_SHARE = 0.03
"""Of mild findings, how many the report only suspects (label -1)."""
CHUNK = 8
TEXT_COLUMNS = ("indication", "technique", "comparison", "findings", "impression")
COLUMNS = (
    "study_id", "patient_id", "modality", "path", "view", "split", *TEXT_COLUMNS, *FINDINGS, "sex", "age", "origin",
    *(f"mask_{name}" for name in FINDINGS),
)  # fmt: skip


@dataclass(frozen=True)
class CohortSettings:
    """What a cohort's files hang on, apart from the number of studies and the splits."""

    seed_digest: str
    size: int
    ct: bool
    ct_series: bool
    lateral: bool
    xray: bool = True
    version: int = 3
    """Of the generator: one more whenever the same seed would give other files."""


def write_cohort(
    out: Path,
    studies: int,
    seed: int,
    *,
    size: int = 128,
    ct: bool = False,
    ct_series: bool = False,
    lateral: bool = False,
    xray: bool = True,
    counts: Mapping[str, int] | None = None,
    fractions: Mapping[str, float] | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write ``studies`` phantoms to OUT/xray, OUT/masks and, if asked for, OUT/ct and OUT/ct_series; then OUT/manifest.csv.

    Args:
        out: the folder, made if need be; what is there of this cohort is kept.
        studies: how many. A patient has one study or, one in twenty, two.
        seed: of everything; hashed into every id.
        size: pixels on the long side of a radiograph, voxels along two axes of a volume; a multiple of 16.
        ct: also the volume and 3D masks as NIfTI.
        ct_series: also the volume as a DICOM series.
        lateral: a lateral radiograph beside the frontal one.
        xray: False leaves the radiographs out, for a cohort of CT alone.
        counts: studies per split, train, val and test in this order, adding to ``studies``; a patient whose two studies would be parted
            keeps both in the earlier split, so a count can be one off.
        fractions: shares of train, val and test that patients are split by where ``counts`` is not given; 0.7, 0.1 and 0.2 unless told.
        workers: processes, one per CPU that this process may use unless told; 1 works in this process.
        progress: called with the number of studies that are newly done.
    Returns:
        the manifest.
    Raises:
        ValueError: arguments that contradict each other, or a folder that holds another cohort.
    """
    if studies < 1:
        raise ValueError(f"a cohort needs at least one study, got {studies}")
    from modalities.phantom.grid import Grid

    splits = _splits(studies, seed, counts, fractions)
    Grid(size)  # refuses a size before anything is written
    if not (xray or ct or ct_series) or (lateral and not xray):
        raise ValueError("a cohort needs radiographs (a lateral one comes with a frontal one), CT or both")
    settings = CohortSettings(seed_digest(seed), size, ct, ct_series, lateral, xray)
    _prepare(out, settings)
    done = {i: rows for i in range(studies) if (rows := _kept(out, study_name(settings, i)))}
    tell = progress or (lambda _: None)
    if done:
        tell(len(done))
    missing = [i for i in range(studies) if i not in done]
    for index, rows in _make(out, settings, seed, missing, workers):
        done[index] = rows
        tell(1)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for i in range(studies):
        writer.writerows({**row, "split": splits[i]} for row in done[i])
    manifest = out / "manifest.csv"
    _write(manifest, table.getvalue().encode())
    return manifest


def seed_digest(seed: int) -> str:
    """Twelve hex digits that stand for the seed in every id."""
    return hashlib.blake2b(f"medvl phantom cohort {seed}".encode(), digest_size=6).hexdigest()


def study_name(settings: CohortSettings, index: int) -> str:
    """Id of study ``index``."""
    return f"syn-{settings.seed_digest}-s{index:06d}"


def patient_of(seed: int, index: int) -> int:
    """The patient of study ``index``, named by the index of their first study."""
    pair = index - index % 2
    return pair if index % 2 and _uniform(seed, "follow-up", pair) < FOLLOW_UP_SHARE else index


def _uniform(seed: int, purpose: str, index: int) -> float:
    """A number in [0, 1) that hangs on its arguments alone."""
    return int.from_bytes(_digest(seed, purpose, index)[:6], "big") / 2**48


def _digest(seed: int, purpose: str, index: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{purpose}:{index}".encode(), digest_size=32).digest()


def _generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(_digest(seed, purpose, index), "big"))


def _splits(studies: int, seed: int, counts: Mapping[str, int] | None, fractions: Mapping[str, float] | None) -> list[str]:
    """The split of every study, by patient."""
    names = ("train", "val", "test")
    if counts is not None:
        if set(counts) - set(names) or sum(counts.values()) != studies or min(counts.values()) < 0:
            raise ValueError(f"split counts must be of train, val and test and add to the {studies} studies, got {dict(counts)}")
        order = [name for name in names for _ in range(counts.get(name, 0))]
        return [order[patient_of(seed, i)] for i in range(studies)]
    shares = dict(fractions or {"train": 0.7, "val": 0.1, "test": 0.2})
    if set(shares) - set(names) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"split fractions must be of train, val and test, 0 or more, and add to 1, got {shares}")
    bounds = np.cumsum([shares.get(name, 0.0) for name in names])
    at = [_uniform(seed, "split", patient_of(seed, i)) for i in range(studies)]
    return [names[min(int(np.searchsorted(bounds, value, side="right")), 2)] for value in at]


def _prepare(out: Path, settings: CohortSettings) -> None:
    """Make the folders; refuse one that another cohort lies in."""
    note = out / "cohort.json"
    wanted = {"origin": "synthetic", **asdict(settings)}
    if note.is_file():
        found = {"xray": True, **json.loads(note.read_text())}  # cohorts of before had no choice
        if found != wanted:
            differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise ValueError(
                f"{out} holds another phantom cohort (it differs in {', '.join(differing)}); choose an empty folder or the same settings"
            )
    kinds = {"xray": settings.xray, "ct": settings.ct, "ct_series": settings.ct_series}
    for name in ("masks", "records", *(kind for kind, wanted in kinds.items() if wanted)):
        (out / name).mkdir(parents=True, exist_ok=True)
    if not note.is_file():
        _write(note, (json.dumps(wanted, indent=2) + "\n").encode())


def _kept(out: Path, study: str) -> list[dict[str, Any]] | None:
    """Rows of a study that an earlier run finished, if all its files are there."""
    record = out / "records" / f"{study}.json"
    if not record.is_file():
        return None
    rows: list[dict[str, Any]] = json.loads(record.read_text())
    named = [value for row in rows for key, value in row.items() if key == "path" or key.startswith("mask_")]
    return rows if all((out / value).exists() for value in named) else None


def _make(
    out: Path, settings: CohortSettings, seed: int, missing: list[int], workers: int | None
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Make the missing studies, in this process or in several; results come in any order."""
    count = min(workers or usable_cpus(), -(-len(missing) // CHUNK))
    if count <= 1:
        for index in missing:
            yield index, make_study(out, settings, seed, index)
        return
    from multiprocessing import get_context

    with _one_thread_each(), ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin_worker) as pool:
        chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
        waiting = {pool.submit(_make_chunk, out, settings, seed, chunk) for chunk in chunks}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield from future.result()
        finally:
            for future in waiting:
                future.cancel()


def _begin_worker() -> None:
    """End with the parent, however that ends, and keep freed memory: to hand it back and fault it in again costs a fifth of a study."""
    import threading
    from multiprocessing import connection, parent_process

    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    keep_freed_memory()


def usable_cpus() -> int:
    """CPUs that this process may run on: a container or a batch job is often given fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Child processes share the cores between them: each one's linear algebra gets a single thread."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _make_chunk(out: Path, settings: CohortSettings, seed: int, indices: list[int]) -> list[tuple[int, list[dict[str, Any]]]]:
    return [(index, make_study(out, settings, seed, index)) for index in indices]


def make_study(out: Path, settings: CohortSettings, seed: int, index: int) -> list[dict[str, Any]]:
    """Make one study's files and return its manifest rows (without the split)."""
    from modalities.export import write_ct_series, write_nifti, write_radiograph_dicom
    from modalities.phantom import project, sample_anatomy, sample_phantom
    from reports.synthetic import write_report

    study, patient = study_name(settings, index), f"syn-{settings.seed_digest}-p{patient_of(seed, index):06d}"
    anatomy = sample_anatomy(_generator(seed, "anatomy", patient_of(seed, index)))
    phantom = sample_phantom(_generator(seed, "findings", index), settings.size, anatomy=anatomy)
    rng = _generator(seed, "images", index)
    facts = soften(phantom.facts, rng)
    report = write_report(facts, _generator(seed, "report", index))
    person = {"sex": phantom.sex, "age": phantom.age}
    common: dict[str, Any] = {"study_id": study, "patient_id": patient, **{name: getattr(report, name) for name in TEXT_COLUMNS}}
    common |= {**labels(facts), **person, "origin": "synthetic"}
    rows = []
    views: list[View] = ["AP" if rng.random() < AP_SHARE else "PA", *cast("list[View]", ["lateral"] if settings.lateral else [])]
    for view in views if settings.xray else ():
        shot = project(phantom, view, rng)
        path = f"xray/{study}_{view}.dcm"
        write_radiograph_dicom(
            out / path, shot.pixels, view=shot.view, spacing_mm=shot.spacing_mm, patient_id=patient, study_id=study,
            photometric=shot.photometric, window=shot.window, sex=phantom.sex, age=phantom.age,
        )  # fmt: skip
        row = {**common, "modality": "xray", "path": path, "view": view}
        for name, mask in shot.masks.items():
            if not mask.any():  # collimated away
                continue
            row[f"mask_{name}"] = f"masks/{study}_{view}_{name}.png"
            _write(out / row[f"mask_{name}"], _png(mask))
        rows.append(row)
    masks = {}
    if settings.ct:
        write_nifti(out / f"ct/{study}.nii.gz", phantom.volume_hu, phantom.affine)
        for name, solid in phantom.masks.items():
            masks[f"mask_{name}"] = f"masks/{study}_ct_{name}.nii.gz"
            write_nifti(out / masks[f"mask_{name}"], solid, phantom.affine)
        rows.append({**common, "modality": "ct", "path": f"ct/{study}.nii.gz", **masks})
    if settings.ct_series:
        write_ct_series(
            out / "ct_series" / study,
            phantom.volume_hu,
            phantom.affine,
            patient_id=patient,
            study_id=study,
            sex=phantom.sex,
            age=phantom.age,
        )
        rows.append({**common, "modality": "ct", "path": f"ct_series/{study}", **masks})
    _write(out / "records" / f"{study}.json", (json.dumps(rows) + "\n").encode())
    return rows


def soften(facts: tuple[Fact, ...], rng: np.random.Generator) -> tuple[Fact, ...]:
    """Turn a few mild facts into suspicions, as a reader of a subtle film would."""
    softened = []
    for fact in facts:
        alone = sum(other.finding == fact.finding for other in facts) == 1
        subtle = fact.severity == "mild" or (fact.finding == "lung_nodule" and (fact.size_mm or 99.0) < 12)
        unsure = rng.random() < UNCERTAIN_SHARE
        softened.append(replace(fact, state="uncertain") if unsure and subtle and alone else fact)
    return tuple(softened)


def labels(facts: tuple[Fact, ...]) -> dict[str, int]:
    """1 present, -1 uncertain, 0 absent, for every finding."""
    states = {fact.finding: fact.state for fact in facts}
    return {name: {"present": 1, "uncertain": -1}.get(states.get(name, "absent"), 0) for name in FINDINGS}


def _png(mask: NDArray[np.bool_]) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(content, "PNG")
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    from modalities.export import write_whole

    write_whole(path, content)
