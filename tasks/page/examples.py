"""The page's examples: studies with their maps, and queries with the reports that fit them.

Shapes: N images, F findings, R reports, H rows, W columns, S slices. Examples are chosen by a rule, not by looks: of the positive studies
whose map peaks inside the mask the one with the median score, and the same of those whose map peaks beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medvl.data.manifest import StudyImage
from medvl.data.studies import as_listed
from medvl.model import DualEncoder
from medvl.types import ImageSample, TextSource
from reports.prompts import PromptSet
from tasks.evaluation import Predictions, finding_maps
from tasks.grounding import native_maps
from tasks.masks import finding_mask, masked_slices
from tasks.page.content import Example, Gallery, Picture, Profile, Query, Report
from tasks.page.measures import title_of
from tasks.render import thumbnail
from tasks.retrieval_figures import RetrievalScores, expected_rank
from tasks.viewing import Shown, in_plane, shown, shown_slice
from tasks.zero_shot import PromptBank, encode_prompts, slice_scores

TOP = 3  # reports shown for a query
QUERY_QUANTILES = ((0.1, "An easy one"), (0.5, "A typical one"), (0.9, "A hard one"))


def galleries(model: DualEncoder, predictions: Predictions, prompts: PromptSet, source: TextSource) -> tuple[Gallery, ...]:
    """A typical hit and a typical miss of every finding that has positive studies."""
    bank = encode_prompts(model, prompts, predictions.findings)
    found = []
    for j, name in enumerate(predictions.findings):
        chosen = choose_examples(predictions.labels[:, j], predictions.scores[:, j], predictions.hits[:, j])
        maps = {i: _finding_map(model, predictions.rows[i], bank, j) for i, _, _ in chosen}
        largest = max((float(np.nanmax(np.abs(scores))) for scores in maps.values()), default=0.0) or 1.0
        examples = tuple(
            _example(model, predictions, source, bank, name, i, verdict, good, maps[i], (-largest, largest)) for i, verdict, good in chosen
        )
        if examples:
            found.append(Gallery(title_of(name), examples))
    return tuple(found)


def choose_examples(
    labels: NDArray[np.float64], scores: NDArray[np.float64], hits: NDArray[np.float64]
) -> tuple[tuple[int, str, bool], ...]:
    """(row, what it shows, whether that is right) of up to two positive studies, by the rule in the module's docstring.

    Without a miss the second is the positive study with the lowest score; without masks the two are those with the median and the lowest.
    """
    positive = np.flatnonzero(labels == 1)
    if not len(positive):
        return ()
    ordered = positive[np.argsort(scores[positive], kind="stable")]
    right, wrong = (ordered[hits[ordered] == value] for value in (1, 0))
    chosen: list[tuple[int, str, bool]] = []
    if len(right):
        chosen.append((int(right[(len(right) - 1) // 2]), "peak inside the true mask", True))
    if len(wrong):
        chosen.append((int(wrong[(len(wrong) - 1) // 2]), "peak outside the true mask", False))
    elif len(right) and ordered[0] != chosen[0][0]:
        chosen.append((int(ordered[0]), "lowest score of all with the finding; peak inside the true mask", True))
    if not chosen:
        chosen.append((int(ordered[(len(ordered) - 1) // 2]), "median score; no mask to compare with", True))
    return tuple(chosen)


@torch.inference_mode()
def _finding_map(model: DualEncoder, row: StudyImage, bank: PromptBank, finding: int) -> NDArray[np.float32]:
    sample = as_listed(model.read(row.path), row)
    features = model.encode_samples([sample])
    return native_maps(
        finding_maps(model, features, bank)[0, finding][None],
        sample.transform,
        features.extent,
        model.token_offset.get(len(sample.transform.shape)),
    )[0]


def _example(
    model: DualEncoder,
    predictions: Predictions,
    source: TextSource,
    bank: PromptBank,
    name: str,
    i: int,
    verdict: str,
    good: bool,
    scores: NDArray[np.float32],
    limits: tuple[float, float],
) -> Example:
    row, j = predictions.rows[i], predictions.findings.index(name)
    sample = as_listed(model.read(row.path), row)
    mask = finding_mask(row, name, sample)
    draw = _film_pictures if sample.affine is None else _volume_pictures
    pictures = draw(model, _Map(row, sample, scores, mask, predictions.peaks[i][j], limits))
    without = predictions.scores[predictions.labels[:, j] == 0, j]
    score = float(predictions.scores[i, j])
    return Example(
        study_id=row.study_id,
        verdict=verdict,
        good=good,
        score=score,
        above=float((without < score).mean()) if len(without) else None,
        pictures=pictures,
        sentences=source.texts(row.report, row.findings, row.impression),
        profile=None if sample.affine is None else _profile(model, sample, bank, j, mask, predictions.peaks[i][j]),
    )


@dataclass(frozen=True)
class _Map:
    """A finding's map of one image, and what it is shown with."""

    row: StudyImage
    sample: ImageSample
    scores: NDArray[np.float32]  # on the native grid
    mask: NDArray[np.bool_] | None
    peak: tuple[int, ...] | None
    limits: tuple[float, float]


def _film_pictures(model: DualEncoder, of: _Map) -> tuple[Picture, ...]:
    view = shown(model.reader, of.row.path)
    found = [Picture("radiograph", thumbnail(view.pixels, orientation=view.orientation))]
    if of.mask is not None:
        found.append(Picture("true mask", thumbnail(view.pixels, mask=of.mask)))
    mapped = thumbnail(view.pixels, scores=of.scores, mask=of.mask, peak=in_plane(of.peak), limits=of.limits)
    return (*found, Picture("similarity map", mapped))


def _volume_pictures(model: DualEncoder, of: _Map) -> tuple[Picture, ...]:
    """The slice that the map peaks in, plain and with the map, and between them the slice that the true mask is largest in."""
    affine, mask = of.sample.affine, of.mask
    assert affine is not None
    volume = model.reader.native(of.row.path).numpy()
    view, flat, at, height = shown_slice(volume, of.scores, affine, of.peak)
    whole = np.zeros(volume.shape, dtype=np.float32) if mask is None else mask.astype(np.float32)
    aspect, of_mask = view.pixel_aspect, shown_slice(volume, whole, affine, of.peak)[1] > 0
    plain = Picture(f"slice {height + 1} from below", thumbnail(view.pixels, orientation=view.orientation, pixel_aspect=aspect))
    mapped = thumbnail(view.pixels, scores=flat, mask=of_mask, peak=at, limits=of.limits, pixel_aspect=aspect)
    if mask is None:
        return plain, Picture("similarity map", mapped)
    other, largest, _, level = shown_slice(volume, whole, affine, _largest(mask, of.sample))
    outlined = thumbnail(other.pixels, mask=largest > 0, pixel_aspect=aspect)
    return plain, Picture(f"true mask, slice {level + 1}", outlined), Picture("similarity map", mapped)


def _largest(mask: NDArray[np.bool_], sample: ImageSample) -> tuple[int, ...]:
    """A voxel in the slice that the mask covers most of."""
    at = np.argwhere(mask)
    level = at[:, sample.transform.axes[0]]
    best = int(np.bincount(level).argmax())
    return tuple(int(v) for v in at[level == best][0])


@torch.inference_mode()
def _profile(
    model: DualEncoder,
    sample: ImageSample,
    bank: PromptBank,
    finding: int,
    mask: NDArray[np.bool_] | None,
    peak: tuple[int, ...] | None,
) -> Profile | None:
    """The finding's scores over the slices; None for a tower that keeps no slices."""
    features = model.encode_samples([sample])
    if features.slices is None:
        return None
    scores = slice_scores(model, features, bank)[0, finding]
    masked = torch.zeros_like(sample.valid) if mask is None else torch.from_numpy(masked_slices(mask, sample))
    at = None
    if peak is not None:
        slice_of_peak = int(np.rint(sample.transform.to_tower(np.array(peak, dtype=np.float64))[0]))
        at = int(sample.valid[: max(slice_of_peak, 0)].sum())
    return Profile(tuple(scores[sample.valid].tolist()), tuple(masked[sample.valid].tolist()), at)


def queries(model: DualEncoder, predictions: Predictions) -> tuple[Query, ...]:
    """Retrieval for images at three quantiles of their own report's rank, among studies with a finding if there are any."""
    scores = predictions.retrieval
    if scores is None:
        return ()
    ranks = {i: expected_rank(scores.similarity[i], scores.own[i]) for i in np.flatnonzero(scores.own.any(1)).tolist()}
    findings = {row.study_id: _present(row) for row in predictions.rows}
    interesting = [i for i in ranks if findings[predictions.rows[i].study_id]] or list(ranks)
    ordered = sorted(interesting, key=lambda i: (ranks[i], i))
    chosen = {ordered[min(int(q * len(ordered)), len(ordered) - 1)]: caption for q, caption in QUERY_QUANTILES}
    return tuple(_query(model, predictions, scores, i, caption, ranks[i], findings) for i, caption in chosen.items())


def _query(
    model: DualEncoder,
    predictions: Predictions,
    scores: RetrievalScores,
    i: int,
    caption: str,
    rank: float,
    findings: Mapping[str, tuple[str, ...]],
) -> Query:
    row = predictions.rows[i]
    own_column = int(np.flatnonzero(scores.own[i])[0])
    mine, own_sentences = findings[row.study_id], set(scores.sentences[own_column])

    def report(column: int, rank: float) -> Report:
        theirs = findings[scores.study_ids[column]]
        return Report(
            rank=rank,
            study_id=scores.study_ids[column],
            own=column == own_column,
            sentences=tuple((text, text in own_sentences) for text in scores.sentences[column]),
            shared=tuple(name for name in mine if name in theirs),
            missed=tuple(name for name in mine if name not in theirs),
            extra=tuple(name for name in theirs if name not in mine),
        )

    view = _overview(model, row)
    best = np.argsort(-scores.similarity[i], kind="stable")[:TOP]
    return Query(
        caption=caption,
        study_id=row.study_id,
        picture=Picture("query", thumbnail(view.pixels, orientation=view.orientation, pixel_aspect=view.pixel_aspect)),
        findings=mine,
        own_rank=rank,
        pool=len(scores.study_ids),
        own=report(own_column, rank),
        hits=tuple(report(int(column), place) for place, column in enumerate(best, start=1)),
    )


def _overview(model: DualEncoder, row: StudyImage) -> Shown:
    """A radiograph, or the middle slice of a volume."""
    affine = model.read(row.path).affine
    if affine is None:
        return shown(model.reader, row.path)
    volume = model.reader.native(row.path).numpy()
    return shown_slice(volume, volume, affine, None)[0]


def _present(row: StudyImage) -> tuple[str, ...]:
    return tuple(title_of(name) for name, label in row.labels.items() if label == 1)
