"""Evaluation of a model on labelled studies: zero-shot AUROC, pointing game, retrieval; every figure with n and a patient-level interval.

Shapes: N images, F findings, R reports, G items of a pool. What counts once is the unit: a study (several views, series or
reconstructions make one score), a patient, or each image by itself. Each image has the score, the label and the similarities of its unit,
and figures made of these count a unit once; where a map points is a matter of each image still, and a report belongs to a study.
What is predicted is kept apart from what is measured: of ``predictions.csv`` and ``retrieval.csv`` follows ``results.json``, with patients
and masks of the data; but for what hangs on the whole order of a pool (average precision, nDCG, small pools, harder galleries).
Retrieval is :mod:`tasks.retrieval_figures`, which says what a row of ``retrieval.csv`` holds.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from medvl.data.manifest import StudyImage
from medvl.data.studies import as_listed, by_study
from medvl.files import write_atomically
from medvl.metrics import (
    MACRO,
    Interval,
    auroc_intervals,
    classification_table,
    contrast_to_noise,
    mean_intervals,
    peak,
    pointing_game,
    subgroup_table,
)
from medvl.model import DualEncoder, packed
from medvl.types import RESEARCH_USE, ImageFeatures, ImageSample, TextSource, UnreadableImageError
from reports.prompts import PromptSet
from tasks.decisions import Decisions
from tasks.figures import estimate, interval_of, number
from tasks.grounding import batch_extent, native_maps
from tasks.masks import MaskError, finding_mask, masked_slices
from tasks.protocols import sha256_of
from tasks.report_facts import ReportFacts, lexicon_facts
from tasks.retrieval import build_index, image_to_reports, studies_of
from tasks.retrieval_figures import COLUMNS, Pools, RetrievalScores, retrieval_figures, retrieval_lines
from tasks.scoring import Scorer
from tasks.subgroups import subgroups
from tasks.zero_shot import PromptBank, encode, encode_prompts, pair_logits, slice_scores, slices_of_images

FOCAL_FRACTION = 0.25
"""A finding is focal if its mask covers less than this share of the image in the median positive study; only these are pointed at."""
RETRIEVAL, REJECTED = "retrieval.csv", "rejected.csv"
Unit = Literal["image", "study", "patient"]


@dataclass(frozen=True)
class Predictions:
    """What a model says of N images about F findings, and what is known of them."""

    findings: tuple[str, ...]
    rows: tuple[StudyImage, ...]  # N
    labels: NDArray[np.float64]  # (N, F): 1, 0, -1 uncertain, NaN not mentioned
    scores: NDArray[np.float64]  # (N, F)
    peaks: tuple[
        tuple[tuple[int, ...] | None, ...], ...
    ]  # N x F: (row, column), of volumes (slice, row, column), of the map's peak, native
    hits: NDArray[np.float64]  # (N, F): 1 peak in the mask, 0 beside it, NaN without a mask
    mask_fraction: NDArray[np.float64]  # (N, F): share of the image that the mask covers, NaN without a mask
    retrieval: RetrievalScores | None
    rejected: tuple[tuple[StudyImage, str], ...]  # images that could not be read or whose mask does not fit, and why
    baseline: NDArray[np.float64] | None = None  # (N, F) scores of the thumbnail baseline, NaN where it has none; None if it was not run
    slice_hits: NDArray[np.float64] | None = None  # (N, F): 1 the mask reaches into the slice of highest score, 0 not, NaN without a mask
    slice_fraction: NDArray[np.float64] | None = None  # (N, F): share of the slices that the mask reaches into; both None without slices
    contrast: NDArray[np.float64] | None = None  # (N, F): contrast-to-noise of map and mask, signed; NaN without a mask
    texts: dict[str, Any] | None = None  # what made the reports' texts, as Configurable.spec gives it
    unit: Unit = "image"  # labels and scores are of units, the same in every image of one

    def counted(self) -> NDArray[np.intp]:
        """The images whose labels and scores count: the first of each unit."""
        return np.array([indices[0] for indices in by_unit(self.rows, self.unit)], dtype=np.intp)

    def queries(self) -> NDArray[np.intp]:
        """The images whose similarities with reports count: the first of each study, or all where images count."""
        return np.array([indices[0] for indices in by_unit(self.rows, _of_reports(self.unit))], dtype=np.intp)


def by_unit(rows: Sequence[StudyImage], unit: Unit) -> list[list[int]]:
    """Indices of the images of each unit; units and images in the order given. Images of two modalities are two units."""
    if unit == "image":
        return [[i] for i in range(len(rows))]
    if unit == "study":
        return list(by_study(rows).values())
    found: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault((row.patient_id, row.modality), []).append(i)
    return list(found.values())


def _of_reports(unit: Unit) -> Unit:
    return "image" if unit == "image" else "study"


@torch.inference_mode()
def predict(
    model: DualEncoder,
    rows: Sequence[StudyImage],
    prompts: PromptSet,
    source: TextSource,
    *,
    findings: Sequence[str] | None = None,
    scorer: Scorer | None = None,
    unit: Unit = "study",
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> Predictions:
    """Score, point and compare every image of ``rows``; with a tower that pools views, score and compare every study.

    Args:
        prompts: prompt pairs; the map of a finding is, at every token, the highest of those of its positive prompts.
        source: splits reports into sentences for retrieval.
        findings: which to score; None takes those of the prompts that any row has a label for.
        scorer: the rule of a preset, for these findings; None: ours. Maps and retrieval are the same by any.
        unit: what has one score and one label, and counts once.
        progress: called with the number of images done.
    Raises:
        ValueError: no image that can be read, or images that are to count by themselves where the tower pools those of a study.
    """
    labelled = {name for row in rows for name in row.labels}
    if scorer is not None:
        findings = scorer.findings
    names = tuple(findings) if findings is not None else tuple(name for name in prompts.findings if name in labelled)
    bank = encode_prompts(model, prompts, names)
    index_of = studies_of(rows, source)
    index = build_index(model, index_of) if index_of else None

    read: list[StudyImage] = []
    rejected: list[tuple[StudyImage, str]] = []
    peaks, hits, fractions, contrasts, similarities, levels = [], [], [], [], [], []
    encoded: list[tuple[torch.Tensor, int]] = []  # logits, or what a rule makes of an image or study encoded at once; of how many images
    modalities = {row.modality for row in rows}
    pools = len(modalities) == 1 and model.image.pools(*modalities)
    if pools and unit == "image":
        raise ValueError("the image tower makes one score of all images of a study; count studies or patients, not images")
    together = [[rows[i] for i in indices] for indices in by_study(rows).values()] if pools else [[row] for row in rows]
    for part in packed(together, batch_size):
        groups = [[one for row in group if (one := _read(model, row, names, rejected)) is not None] for group in part]
        images = [one for group in groups for one in group]
        if images:
            counts = [len(group) for group in groups if group]
            features = encode(model, [[one.sample for one in group] for group in groups if group])
            values = pair_logits(model, features, bank).double() if scorer is None else scorer.group_scores(model, features)
            encoded += zip(values.cpu(), counts, strict=True)
            maps = finding_maps(model, features, bank)
            if pools:
                maps = torch.stack([maps[study, :, view] for study, count in enumerate(counts) for view in range(count)])
            if index is not None:
                similarities.append(np.repeat(image_to_reports(model, features, index)[0].double().cpu().numpy(), counts, axis=0))
            if features.slices is not None:
                of_images = slices_of_images(slice_scores(model, features, bank), features)
                highest = of_images.nan_to_num(-1.0).argmax(-1).cpu().numpy()  # (B, V, F)
                at_images = [highest[study, view] for study, count in enumerate(counts) for view in range(count)]
                levels += [_slice_hits(one, names, at) for one, at in zip(images, at_images, strict=True)]
            extent = batch_extent([one.sample for one in images], features)
            for one, grids in zip(images, maps, strict=True):
                found = [  # a map at a time: ten of a full CT have gigabytes
                    _pointed(one.masks[name], native_maps(grid[None], one.sample.transform, extent, model.token_offset.get(grid.ndim))[0])
                    for name, grid in zip(names, grids, strict=True)
                ]
                peaks.append(tuple(one.peak for one in found))
                hits.append([one.hit for one in found])
                fractions.append([one.fraction for one in found])
                contrasts.append([one.contrast for one in found])
        read += [one.row for one in images]
        progress(sum(map(len, part)))
    if not read:
        raise ValueError(f"none of {len(rows)} images could be read; first: {rejected[0][1] if rejected else 'no images were given'}")
    return Predictions(
        findings=names,
        rows=tuple(read),
        labels=joined_labels(read, names, unit),
        scores=_unit_scores(encoded, by_unit(read, unit), scorer),
        peaks=tuple(peaks),
        hits=np.array(hits),
        mask_fraction=np.array(fractions),
        retrieval=_pairs(read, index_of, _unit_means(np.concatenate(similarities), read, unit)) if index is not None else None,
        rejected=tuple(rejected),
        slice_hits=np.array([[hit for hit, _ in line] for line in levels]) if levels else None,
        slice_fraction=np.array([[share for _, share in line] for line in levels]) if levels else None,
        unit=unit,
        contrast=np.array(contrasts),
        texts=source.spec(),
    )


def _unit_scores(encoded: Sequence[tuple[torch.Tensor, int]], units: Sequence[Sequence[int]], scorer: Scorer | None) -> NDArray[np.float64]:
    """(N, F) scores of the units, the same in every image of one, from what was encoded at once: images, or whole studies.

    Ours is the sigmoid of the mean logit, as in ``medvl diagnose``; a rule joins views in its own way, and some need all units at once.
    """
    of_image = np.repeat(np.arange(len(encoded)), [count for _, count in encoded])
    parts = [torch.stack([encoded[k][0] for k in dict.fromkeys(of_image[list(indices)].tolist())]) for indices in units]
    if scorer is None:
        of_units = torch.stack([part.mean(0) for part in parts]).sigmoid().numpy()
    else:
        of_units = scorer.scores(torch.stack([scorer.study_scores(part) for part in parts])).numpy()
    scores = np.empty((len(of_image), of_units.shape[1]))
    for indices, own in zip(units, of_units, strict=True):
        scores[list(indices)] = own
    return scores


def _unit_means(similarity: NDArray[np.float64], rows: Sequence[StudyImage], unit: Unit) -> NDArray[np.float64]:
    """(N, R) similarities of images to those of their studies, the mean of their images, unless images count by themselves."""
    found = similarity.copy()
    for indices in by_unit(rows, _of_reports(unit)):
        if len(indices) > 1:
            found[indices] = similarity[indices].mean(0)
    return found


@dataclass(frozen=True)
class _Image:
    """A row of the table as it was read."""

    row: StudyImage
    sample: ImageSample
    masks: dict[str, NDArray[np.bool_] | None]


def _read(model: DualEncoder, row: StudyImage, names: Sequence[str], rejected: list[tuple[StudyImage, str]]) -> _Image | None:
    """Read an image and its masks; None, with the reason added to ``rejected``, if either cannot be used."""
    try:
        sample = as_listed(model.read(row.path), row)
        return _Image(row, sample, {name: finding_mask(row, name, sample) for name in names})
    except (UnreadableImageError, MaskError) as error:
        rejected.append((row, str(error)))
        return None


def _slice_hits(image: _Image, names: Sequence[str], highest: NDArray[np.intp]) -> list[tuple[float, float]]:
    """Of each finding whether its mask reaches into its slice of highest score, and into what share of slices; NaN without a mask."""
    found = []
    for name, at in zip(names, highest, strict=True):
        mask = image.masks[name]
        inside = None if mask is None else masked_slices(mask, image.sample)
        found.append((math.nan, math.nan) if inside is None else (float(inside[at]), float(inside[image.sample.valid.numpy()].mean())))
    return found


def joined_labels(rows: Sequence[StudyImage], names: Sequence[str], unit: Unit) -> NDArray[np.float64]:
    """(N, F) labels of the unit of each image, what any image of it says: 1 before -1 (uncertain) before 0 before NaN."""
    labels = np.array([[row.labels.get(name, math.nan) for name in names] for row in rows], dtype=np.float64).reshape(len(rows), len(names))
    for indices in by_unit(rows, unit):
        if len(indices) > 1:
            own = labels[indices]
            labels[indices] = np.select([(own == value).any(0) for value in (1, -1, 0)], [1.0, -1.0, 0.0], math.nan)
    return labels


def finding_maps(model: DualEncoder, images: ImageFeatures, bank: PromptBank) -> torch.Tensor:
    """(B, F, *grid): highest token cosine with any positive prompt of a finding: they are alternatives (a tube, a line, a pacemaker)."""
    maps = model.similarity.maps(images, bank.features)  # (B, P, *grid)
    return torch.stack([maps[:, of_finding > 0].amax(1) for of_finding in bank.positive], dim=1)


class _Pointed(NamedTuple):
    """What a map makes of a finding's mask; NaN without one."""

    peak: tuple[int, ...] | None
    hit: float = math.nan  # whether the peak lies in the mask
    fraction: float = math.nan  # of the image that the mask covers
    contrast: float = math.nan


def _pointed(mask: NDArray[np.bool_] | None, scores: NDArray[np.float32]) -> _Pointed:
    at = peak(scores)
    if mask is None:
        return _Pointed(at)
    return _Pointed(at, pointing_game(at, mask), float(mask.mean()), contrast_to_noise(scores, mask))


def _pairs(
    rows: Sequence[StudyImage], index: Sequence[tuple[str, tuple[str, ...]]], similarity: NDArray[np.float64]
) -> RetrievalScores | None:
    """Keep the reports whose study has an image that could be read, and mark what belongs together."""
    sentences = {study: frozenset(found) for study, found in index}
    read = {row.study_id for row in rows}
    kept = [j for j, (study, _) in enumerate(index) if study in read]
    if not kept:
        return None
    ids = [index[j][0] for j in kept]
    own = np.array([[row.study_id == study for study in ids] for row in rows], dtype=bool)
    same = np.array([[sentences.get(row.study_id) == sentences[study] for study in ids] for row in rows], dtype=bool)
    return RetrievalScores(tuple(ids), tuple(index[j][1] for j in kept), np.round(similarity[:, kept], 6), own, same)


def results(
    predictions: Predictions,
    *,
    repeats: int = 1000,
    seed: int = 0,
    decisions: Decisions | None = None,
    facts: ReportFacts | None = None,
    pools: Pools | None = None,
) -> dict[str, Any]:
    """Every metric of a prediction, JSON-ready (NaN as null).

    Args:
        decisions: fitted on other patients to scores of the same protocol; then probabilities and calls are measured too.
        facts: of the reports' sentences; by default those of the lexicon that comes with the package.
        pools: small pools to measure retrieval within, besides the full one.
    Raises:
        ValueError: pools that do not fit.
    """
    patients = [row.patient_id for row in predictions.rows]
    names, counted = predictions.findings, predictions.counted()
    found: dict[str, Any] = {
        "notice": RESEARCH_USE,
        "images": len(predictions.rows),
        "studies": len({row.study_id for row in predictions.rows}),
        "patients": len(set(patients)),
        "rejected": len(predictions.rejected),
        "interval": {"level": 0.95, "method": "percentile bootstrap over patients", "repeats": repeats, "seed": seed},
        "calibrated": decisions is not None,
        "unit": {"name": predictions.unit, "n": len(counted)},
    }
    if predictions.unit != "image":
        plural = {"study": "studies", "patient": "patients"}[predictions.unit]
        found["scored"] = f"{plural}: zero_shot counts each {predictions.unit} once, retrieval each study, grounding each image"
    if names:
        labels, scores = predictions.labels[counted], predictions.scores[counted]
        areas = auroc_intervals(labels, scores, names, [patients[i] for i in counted], repeats=repeats, seed=seed)
        found["zero_shot"] = {
            **_macro("macro_auroc", areas),
            "per_finding": {name: {"auroc": number(areas[name].value), **interval_of(areas[name])} for name in names},
        }
        found["classification"] = _classification(labels, scores, names, [patients[i] for i in counted], repeats, seed, decisions)
        found["subgroups"] = _subgroups(predictions, patients, repeats, seed, decisions)
        found["grounding"] = _grounding(predictions, patients, repeats, seed)
        if predictions.slice_hits is not None:
            found["slices"] = _slices(predictions, patients, repeats, seed)
    if predictions.texts is not None:
        found["texts"] = predictions.texts
    if predictions.retrieval is not None:
        found["retrieval"] = retrieval_figures(
            predictions.retrieval,
            predictions.queries(),
            patients,
            facts if facts is not None else lexicon_facts(),
            pools=pools,
            repeats=repeats,
            seed=seed,
        )
    return found


def _classification(
    labels: NDArray[np.float64],
    scores: NDArray[np.float64],
    names: Sequence[str],
    patients: Sequence[str],
    repeats: int,
    seed: int,
    decisions: Decisions | None,
) -> dict[str, Any]:
    """Ranking of the scores, and where there are decisions that cover all findings, calibration and calls at the thresholds of validation.

    A calibration fitted to a finding that validation had ranked the wrong way round turns it round: AUROC and AUPRC are of the scores.
    """
    options: dict[str, Any] = {"repeats": repeats, "seed": seed}
    if decisions is None or not decisions.covers(names):
        return classification_table(labels, scores, names, patients, **options).to_dict()
    shares = bool(((scores >= 0) & (scores <= 1)).all())
    before = classification_table(labels, scores, names, patients, probabilities=scores if shares else None, **options).to_dict()
    probabilities, cuts = _calls(decisions, names, scores)
    found = classification_table(labels, probabilities, names, patients, thresholds=cuts, probabilities=probabilities, **options).to_dict()
    for own, of_scores in ((found["macro"], before["macro"]), *((found["findings"][name], before["findings"][name]) for name in names)):
        own |= {metric: of_scores[metric] for metric in ("auroc", "auprc")}
    uncalibrated = {metric: value for metric, value in before["macro"].items() if metric not in ("auroc", "auprc")}
    return {
        **found,
        "before_calibration": uncalibrated,
        "thresholds": cuts,
        "decisions": {"sha256": sha256_of(decisions.to_dict()), "fitted_on": dict(decisions.fitted_on)},
    }


def _calls(decisions: Decisions, names: Sequence[str], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], dict[str, float]]:
    """(N, F) probabilities of the scores, and the thresholds of these."""
    given = [decisions.probabilities(dict(zip(names, row, strict=True))) for row in scores.tolist()]
    return np.array([[one[name] for name in names] for one in given]), {name: decisions.findings[name].threshold.value for name in names}


def _subgroups(predictions: Predictions, patients: list[str], repeats: int, seed: int, decisions: Decisions | None) -> dict[str, Any]:
    """Each attribute that parts the units: AUROC of each subgroup; of calls at the thresholds of validation sensitivity and specificity."""
    names, counted = predictions.findings, predictions.counted()
    labels, scores = predictions.labels[counted], predictions.scores[counted]
    ids = [patients[i] for i in counted]
    calls: dict[str, Any] = {}
    if decisions is not None and decisions.covers(names):
        calls["probabilities"], calls["thresholds"] = _calls(decisions, names, scores)
    found: dict[str, Any] = {"attributes": {}, "of_one_kind": {}}
    for attribute, groups in subgroups(predictions.rows, by_unit(predictions.rows, predictions.unit)).items():
        kinds = sorted(set(groups))
        if len(kinds) < 2:
            found["of_one_kind"][attribute] = kinds[0]
            continue
        table = subgroup_table(labels, scores, names, groups, ids, repeats=repeats, seed=seed, **calls)
        found["attributes"][attribute] = table.to_dict()
    return found


def _grounding(predictions: Predictions, patients: list[str], repeats: int, seed: int) -> dict[str, Any]:
    names = predictions.findings
    masked = [j for j, name in enumerate(names) if not np.isnan(predictions.hits[:, j]).all()]
    median = {names[j]: float(np.nanmedian(predictions.mask_fraction[:, j])) for j in masked}
    focal = [name for name in median if median[name] < FOCAL_FRACTION]
    columns = [names.index(name) for name in focal]
    found: dict[str, Any] = {
        "focal_findings": focal,
        "focal_below_median_mask_fraction": FOCAL_FRACTION,
        "tolerance_px": 0,
        "per_finding": {},
    }
    if masked:
        every = mean_intervals(predictions.hits[:, masked], [names[j] for j in masked], patients, repeats=repeats, seed=seed)
        found["per_finding"] = {
            name: {
                "pointing_game": number(every[name].value),
                **interval_of(every[name]),
                "focal": name in focal,
                "median_mask_fraction": median[name],
            }
            for name in median
        }
    if focal:
        hits = predictions.hits[:, columns]
        found.update(_macro("pointing_game_macro", mean_intervals(hits, focal, patients, repeats=repeats, seed=seed)))
    return found


def _slices(predictions: Predictions, patients: list[str], repeats: int, seed: int) -> dict[str, Any]:
    """How often a finding's slice of highest score is one that its mask reaches into, beside what a random slice would do."""
    hits, share = predictions.slice_hits, predictions.slice_fraction
    assert hits is not None and share is not None
    masked = [j for j in range(len(predictions.findings)) if not np.isnan(hits[:, j]).all()]
    found: dict[str, Any] = {"rule": "the mask reaches into the slice of highest score", "per_finding": {}}
    if masked:
        names = [predictions.findings[j] for j in masked]
        every = mean_intervals(hits[:, masked], names, patients, repeats=repeats, seed=seed)
        chance = {name: float(np.nanmean(share[:, j])) for name, j in zip(names, masked, strict=True)}
        found["per_finding"] = {
            name: {"slice_hit": number(every[name].value), **interval_of(every[name]), "chance": chance[name]} for name in names
        }
        found |= {**_macro("slice_hit_macro", every), "chance_macro": float(np.mean(list(chance.values())))}
    return found


def _macro(name: str, intervals: dict[str, Interval]) -> dict[str, Any]:
    """The mean over findings as a bare number under ``name``, its interval beside it."""
    return estimate(name, intervals.get(MACRO) or next(iter(intervals.values())))


def write(
    predictions: Predictions,
    measured: dict[str, Any],
    folder: Path,
    others: Sequence[tuple[int, str, str, str]] = (),
    name: str = "results.json",
) -> None:
    """Write ``results.json``, ``predictions.csv``, ``rejected.csv`` and, if there are reports, ``retrieval.csv``; an older one goes.

    Args:
        name: of the first, if it is to have another.
        others: further lines of ``rejected.csv`` besides the predictions' own: row, study_id, reason, what was rejected.

    ``predictions.csv`` has a line per image and finding: ``score`` and ``label`` are those of the image's unit in each of its lines,
    ``unit`` numbers the units, ``images`` says how many images the score is made of, ``patient`` is the row of the patient's first image
    (no id), and the peak is the image's own; ``hit`` says whether it lies in the finding's mask, where there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RETRIEVAL).unlink(missing_ok=True)
    baseline = predictions.baseline
    deep = ["peak_slice"] if any(at is not None and len(at) == 3 for row in predictions.peaks for at in row) else []
    units = by_unit(predictions.rows, predictions.unit)
    unit_of = {i: number for number, indices in enumerate(units) for i in indices}
    first: dict[str, int] = {}
    for row in predictions.rows:
        first.setdefault(row.patient_id, row.row)
    _write_csv(
        folder / "predictions.csv",
        [
            *("study_id", "finding", "label", "score", "peak_row", "peak_col", "path"),
            *(*deep, *([] if baseline is None else ["baseline_score"]), "images", "unit", "patient", "row", "hit"),
        ],
        (
            [
                row.study_id,
                name,
                _label(predictions.labels[i, j]),
                repr(float(predictions.scores[i, j])),
                *(predictions.peaks[i][j] or ("", ""))[-2:],
                row.path.name,
                *((predictions.peaks[i][j] or ("",))[0] for _ in deep),
                *([] if baseline is None else ["" if np.isnan(baseline[i, j]) else repr(float(baseline[i, j]))]),
                *(len(units[unit_of[i]]), unit_of[i], first[row.patient_id], row.row, _label(predictions.hits[i, j])),
            ]
            for i, row in enumerate(predictions.rows)
            for j, name in enumerate(predictions.findings)
        ),
    )
    if predictions.retrieval is not None:
        lines_of = retrieval_lines(predictions.retrieval, predictions.queries(), predictions.rows)
        _write_csv(folder / RETRIEVAL, list(COLUMNS), lines_of)
    lines = [*others, *((row.row, row.study_id, why, "image") for row, why in predictions.rejected)]
    _write_csv(folder / REJECTED, ["row", "study_id", "reason", "what"], (list(line) for line in lines))
    write_atomically(folder / name, (json.dumps(measured, indent=2, allow_nan=False) + "\n").encode())


def _label(value: float) -> str:
    return "" if math.isnan(value) else str(int(value))


def _write_csv(path: Path, header: list[str], lines: Any) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(header)
    table.writerows(lines)
    write_atomically(path, text.getvalue().encode())
