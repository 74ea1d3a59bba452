"""What a model's scores hang on besides the finding: negation, wording, side, and what may happen to a picture.

Shapes: N images, F findings, P prompts. Scores are those of the model's own similarity. Everything is of the studies given, which should be
held out; nothing is fitted. Every figure has n and an interval over patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medvl.data.manifest import StudyImage
from medvl.data.studies import as_listed
from medvl.metrics import Interval, Statistic, auroc_statistic, bootstrap_intervals, combined, concordance_statistic, mean_statistic
from medvl.model import DualEncoder
from medvl.types import Fact, ImageFeatures, ImageSample, Side, TextFeatures, UnreadableImageError
from reports.facts import LexiconFacts
from reports.prompts import PromptSet
from tasks.corruptions import CORRUPTIONS, SEVERITIES, TURNS, VOLUME_CORRUPTIONS, Corruption
from tasks.zero_shot import PromptBank, encode_prompts, pair_logits

LEVELS: Mapping[str, float] = MappingProxyType({"mild": 0.0, "moderate": 1.0, "severe": 2.0})
FEWEST = 5
"""Studies that a finding needs at each of two levels of severity."""
KEPT_BYTES = 2**31
"""Of native films that are held while they are corrupted in one way after the other."""
VOLUME_FLIPS: Mapping[str, int] = MappingProxyType({"left and right changed": 3, "front and back changed": 2, "head and feet changed": 1})
"""Axis of a volume's pixels (C, S, H, W)."""


@dataclass(frozen=True)
class Probe:
    """One figure of one probe."""

    probe: str
    name: str  # finding, or "mean"
    setting: str
    figure: Interval

    def row(self) -> list[Any]:
        """For a table."""
        told = (None if not math.isfinite(v) else float(v) for v in (self.figure.value, self.figure.ci_low, self.figure.ci_high))
        return [self.probe, self.name, self.setting, *told, self.figure.n]


@dataclass(frozen=True)
class Read:
    """The images that could be read, with what is known of them."""

    rows: tuple[StudyImage, ...]
    samples: tuple[ImageSample, ...]
    rejected: tuple[tuple[str, str], ...]

    @property
    def patients(self) -> list[str]:
        """(N,)."""
        return [row.patient_id for row in self.rows]

    def labels(self, names: Sequence[str]) -> NDArray[np.float64]:
        """(N, F) 1, 0, -1 uncertain, NaN not mentioned."""
        return np.array([[row.labels.get(name, math.nan) for name in names] for row in self.rows], dtype=np.float64)


def read(model: DualEncoder, rows: Sequence[StudyImage], progress: Callable[[int], None] = lambda done: None) -> Read:
    """Read the images; one that cannot be read costs only itself.

    Raises:
        ValueError: none can be read.
    """
    kept, samples, rejected = [], [], []
    for row in rows:
        try:
            samples.append(as_listed(model.read(row.path), row))
            kept.append(row)
        except UnreadableImageError as error:
            rejected.append((str(row.path), str(error)))
        progress(1)
    if not kept:
        raise ValueError(f"none of {len(rows)} images could be read; first: {rejected[0][1] if rejected else 'no images were given'}")
    return Read(tuple(kept), tuple(samples), tuple(rejected))


def usable(data: Read, prompts: PromptSet) -> tuple[str, ...]:
    """Findings of the prompts that are present and absent somewhere.

    Raises:
        ValueError: there are none.
    """
    names = tuple(name for name in prompts.findings if {0, 1} <= {row.labels.get(name) for row in data.rows})
    if not names:
        raise ValueError("no finding of the prompts is present in one of the studies and absent in another")
    return names


def negation(model: DualEncoder, data: Read, bank: PromptBank, repeats: int = 1000) -> Iterator[Probe]:
    """AUROC of the prompts for a finding, of those against it as a score of its absence, and of the contrast of the two.

    A model that reads "no effusion" as "effusion" has 0.5 and less in the second: published systems have 0.39 to 0.49 (CARZero).
    """
    similarity = similarities(model, data.samples, lambda images: model.similarity(images, bank.features))
    labels = data.labels(bank.findings)
    sides = {
        "prompts for": (similarity @ bank.positive.cpu().double().numpy().T, labels),
        "prompts against, of absence": (
            similarity @ bank.negative.cpu().double().numpy().T,
            np.where(np.isin(labels, (0, 1)), 1 - labels, labels),
        ),
        "contrast": (similarity @ (bank.positive - bank.negative).cpu().double().numpy().T, labels),
    }
    for setting, (scores, truth) in sides.items():
        yield from areas("negation", setting, truth, scores, bank.findings, data.patients, repeats)


def wording(model: DualEncoder, data: Read, prompts: PromptSet, names: Sequence[str], repeats: int = 1000) -> Iterator[Probe]:
    """AUROC of each single prompt for a finding; ``setting`` is its place among them."""
    labels = data.labels(names)
    for f, name in enumerate(names):
        texts = prompts.findings[name].positive
        features = model.encode_text(texts)
        scores = similarities(model, data.samples, _to(model, features))
        found = [auroc_statistic(labels[:, f], np.round(scores[:, k], 9)) for k in range(len(texts))]
        for k, one in enumerate(found):
            yield Probe(
                "wording", name, f"prompt {k + 1} of {len(texts)}", bootstrap_intervals({"x": one}, data.patients, repeats=repeats)["x"]
            )


def laterality(model: DualEncoder, data: Read, prompts: PromptSet, names: Sequence[str], repeats: int = 1000) -> Iterator[Probe]:
    """Whether "left ..." outdoes "right ..." where the report has the finding on the left alone, and on the flipped image the other way.

    ``AUROC of left against right`` is over studies whose report states the finding on one side alone; ``follows a flip`` is the share of
    these whose difference of the two scores moves towards the other side when the image is flipped left to right.
    """
    sided = sides_of(data.rows)
    for name in names:
        at = [i for i, own in enumerate(sided) if own.get(name) in ("left", "right")]
        truth = np.array([1.0 if sided[i][name] == "left" else 0.0 for i in at])
        if len(set(truth)) < 2:
            continue
        phrase = prompts.findings[name].phrase
        features = model.encode_text([f"There is a left {phrase}.", f"There is a right {phrase}."])
        samples = [data.samples[i] for i in at]
        scores = similarities(model, samples, _to(model, features))
        turned = similarities(model, [flipped(one) for one in samples], _to(model, features))
        difference, other = scores[:, 0] - scores[:, 1], turned[:, 0] - turned[:, 1]
        follows = np.where(truth == 1, other < difference, other > difference).astype(float)
        patients = [data.patients[i] for i in at]
        for setting, one in (
            ("AUROC of left against right", auroc_statistic(truth, np.round(difference, 9))),
            ("follows a flip", mean_statistic(follows)),
        ):
            yield Probe("laterality", name, setting, bootstrap_intervals({"x": one}, patients, repeats=repeats)["x"])


def severity(model: DualEncoder, data: Read, prompts: PromptSet, bank: PromptBank, repeats: int = 1000) -> Iterator[Probe]:
    """Whether scores rise with the severity that reports state, among the studies that have the finding.

    ``score rises with severity`` is the chance that of two studies of different severity the more severe has the higher contrast;
    ``severe against mild prompts`` the same of the similarity with "severe ..." less that with "mild ...". 0.5 is chance. A finding with
    fewer than ``FEWEST`` studies at each of two levels has NaN, and n says how many state a severity.
    """
    stated = severities_of(data.rows)
    contrast = similarities(model, data.samples, lambda images: pair_logits(model, images, bank))
    settings = ("score rises with severity", "severe against mild prompts")
    found: dict[str, dict[str, Statistic]] = {setting: {} for setting in settings}
    counts = {}
    for f, name in enumerate(bank.findings):
        levels = np.array([LEVELS.get(own.get(name, ""), math.nan) for own in stated])
        counts[name] = int(np.isfinite(levels).sum())
        if sum(int((levels == level).sum()) >= FEWEST for level in LEVELS.values()) < 2:
            continue
        noun = prompts.name(name)
        texts = [f"There {noun.verb} {noun.described(word).indefinite}." for word in ("severe", "mild")]
        asked = similarities(model, data.samples, _to(model, model.encode_text(texts)))
        scores = (contrast[:, f], asked[:, 0] - asked[:, 1])
        for setting, values in zip(settings, scores, strict=True):
            found[setting][name] = concordance_statistic(levels, np.round(values, 9))
    for setting, statistics in found.items():
        if statistics:
            statistics["mean"] = combined([(1 / len(statistics), one) for one in statistics.values()])
        intervals = bootstrap_intervals(statistics, data.patients, repeats=repeats) if statistics else {}
        for name in (*bank.findings, *(("mean",) if statistics else ())):
            nothing = Interval(math.nan, math.nan, math.nan, counts.get(name, 0), 0)
            yield Probe("severity", name, setting, intervals.get(name, nothing))


def severities_of(rows: Sequence[StudyImage]) -> list[dict[str, str]]:
    """Of each row the findings whose severity its report states, the highest where it states several."""
    found = []
    for own in _facts_of(rows):
        highest: dict[str, str] = {}
        for fact in own:
            if fact.severity is not None and (fact.finding not in highest or LEVELS[fact.severity] > LEVELS[highest[fact.finding]]):
                highest[fact.finding] = fact.severity
        found.append(highest)
    return found


def orientation(
    model: DualEncoder, data: Read, bank: PromptBank, repeats: int = 1000, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Probe]:
    """Mean AUROC of the contrast of films that are turned or mirrored, or volumes whose ends are changed, and as they are."""
    if films := [i for i, sample in enumerate(data.samples) if sample.affine is None]:
        natives = _Natives(model, (data.rows[i] for i in films))
        yield Probe(
            "orientation", "mean", "films as they are", _mean_area(model, data, bank, films, map(model.reader.read_array, natives), repeats)
        )
        for name, turn in TURNS.items():
            turned = (model.reader.read_array(turn(one)) for one in natives)
            yield Probe("orientation", "mean", f"films {name}", _mean_area(model, data, bank, films, turned, repeats))
            progress(1)
    if volumes := [i for i, sample in enumerate(data.samples) if sample.affine is not None]:
        kept = [data.samples[i] for i in volumes]
        yield Probe("orientation", "mean", "volumes as they are", _mean_area(model, data, bank, volumes, kept, repeats))
        for name, axis in VOLUME_FLIPS.items():
            changed = (_volume_flipped(one, axis) for one in kept)
            yield Probe("orientation", "mean", f"volumes, {name}", _mean_area(model, data, bank, volumes, changed, repeats))
            progress(1)


def _volume_flipped(sample: ImageSample, axis: int) -> ImageSample:
    valid = sample.valid.flip(0) if axis == 1 else sample.valid
    return replace(sample, pixels=sample.pixels.flip(axis), valid=valid)


def _mean_area(
    model: DualEncoder, data: Read, bank: PromptBank, at: Sequence[int], samples: Iterable[ImageSample], repeats: int
) -> Interval:
    """Mean AUROC of the contrast over the findings that some of the images have and others do not."""
    labels, patients = data.labels(bank.findings)[list(at)], [data.patients[i] for i in at]
    scores = np.round(similarities(model, samples, lambda images: pair_logits(model, images, bank)), 9)
    found = [auroc_statistic(labels[:, f], scores[:, f]) for f in range(len(bank.findings)) if {0.0, 1.0} <= set(labels[:, f].tolist())]
    every = combined([(1 / len(found), one) for one in found])
    return bootstrap_intervals({"x": every}, patients, repeats=repeats)["x"]


def corruptions(
    model: DualEncoder,
    data: Read,
    bank: PromptBank,
    repeats: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Probe]:
    """Mean AUROC of the contrast under each corruption at five severities, and untouched (``none``).

    Films are corrupted as they would be shown to a person, native pixels given as an array; volumes as the reader gives them to the tower.
    """
    films = [i for i, sample in enumerate(data.samples) if sample.affine is None]
    volumes = [i for i, sample in enumerate(data.samples) if sample.affine is not None]
    if films:
        natives = _Natives(model, (data.rows[i] for i in films))
        untouched = map(model.reader.read_array, natives)
        yield Probe("corruption", "none", "0", _mean_area(model, data, bank, films, untouched, repeats))
        for name, corrupt in CORRUPTIONS.items():
            for level in SEVERITIES:
                rng = np.random.default_rng([seed, level])
                made = (model.reader.read_array(corrupt(one, level, rng)) for one in natives)
                yield Probe("corruption", name, str(level), _mean_area(model, data, bank, films, made, repeats))
                progress(1)
    if volumes:
        kept = [data.samples[i] for i in volumes]
        prefix = "volumes, " if films else ""
        yield Probe("corruption", f"{prefix}none", "0", _mean_area(model, data, bank, volumes, kept, repeats))
        for name, corrupt in VOLUME_CORRUPTIONS.items():
            for level in SEVERITIES:
                rng = np.random.default_rng([seed, level])
                made = (_corrupted(one, corrupt, level, rng) for one in kept)
                yield Probe("corruption", f"{prefix}{name}", str(level), _mean_area(model, data, bank, volumes, made, repeats))
                progress(1)


def _corrupted(volume: ImageSample, corrupt: Corruption, severity: int, rng: np.random.Generator) -> ImageSample:
    """The volume with its slices corrupted, and its padding as it was."""
    pixels = volume.pixels.float().clone()
    pixels[:, volume.valid] = torch.from_numpy(corrupt(pixels[:, volume.valid].numpy(), severity, rng))
    return replace(volume, pixels=pixels)


class _Natives:
    """Native pixels of films, again and again: kept as far as ``KEPT_BYTES`` goes, read anew beyond."""

    def __init__(self, model: DualEncoder, rows: Iterable[StudyImage]) -> None:
        self._reader, self._paths, self._kept, self._bytes = model.reader, [row.path for row in rows], dict[Path, NDArray[np.float32]](), 0

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for path in self._paths:
            if (found := self._kept.get(path)) is None:
                found = self._reader.native(path).numpy()
                if self._bytes + found.nbytes <= KEPT_BYTES:
                    self._kept[path] = found
                    self._bytes += found.nbytes
            yield found


def similarities(
    model: DualEncoder, samples: Iterable[ImageSample], of: Callable[[ImageFeatures], torch.Tensor], size: int = 32
) -> NDArray[np.float64]:
    """(N, ...) of the images, a batch at a time."""
    left, parts = iter(samples), []
    with torch.inference_mode():
        while part := list(islice(left, size)):
            parts.append(of(model.encode_samples(part)).double().cpu().numpy())
    return np.concatenate(parts)


def _to(model: DualEncoder, texts: TextFeatures) -> Callable[[ImageFeatures], torch.Tensor]:
    return lambda images: model.similarity(images, texts)


def areas(
    probe: str,
    setting: str,
    labels: NDArray[np.float64],
    scores: NDArray[np.float64],
    names: Sequence[str],
    patients: Sequence[str],
    repeats: int,
) -> Iterator[Probe]:
    """AUROC of each finding, and their mean."""
    found: dict[str, Statistic] = {name: auroc_statistic(labels[:, f], np.round(scores[:, f], 9)) for f, name in enumerate(names)}
    found["mean"] = combined([(1 / len(names), found[name]) for name in names])
    for name, one in found.items():
        yield Probe(probe, name, setting, bootstrap_intervals({name: one}, patients, repeats=repeats)[name])


def sides_of(rows: Sequence[StudyImage]) -> list[dict[str, Side]]:
    """Of each row the findings that its report states on one side alone."""
    found = []
    for own in _facts_of(rows):
        stated: dict[str, set[Side | None]] = {}
        for fact in own:
            stated.setdefault(fact.finding, set()).add(fact.side)
        found.append({name: next(iter(sides)) for name, sides in stated.items() if len(sides) == 1 and None not in sides})
    return found  # type: ignore[return-value]


def _facts_of(rows: Sequence[StudyImage]) -> Iterator[list[Fact]]:
    """Of each row what its report states to be present."""
    reader = LexiconFacts()
    for row in rows:
        text = " ".join(part for part in (row.report, row.findings, row.impression) if part)
        yield [one.fact for one in reader.facts(text) if one.fact.state == "present"]


def flipped(sample: ImageSample) -> ImageSample:
    """The image flipped left to right, for a probe alone: its record no longer leads to native pixels."""
    valid = sample.valid if sample.pixels.ndim == 4 else sample.valid.flip(-1)
    return replace(sample, pixels=sample.pixels.flip(-1), valid=valid)


def probe_all(
    model: DualEncoder,
    rows: Sequence[StudyImage],
    prompts: PromptSet,
    *,
    repeats: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Probe], Read]:
    """Every probe, and what was read.

    Args:
        progress: called with images read, then with each corruption and turn done: :func:`steps` of them.
    Raises:
        ValueError: nothing that can be read, or no finding to measure.
    """
    data = read(model, rows, progress)
    names = usable(data, prompts)
    bank = encode_prompts(model, prompts, names)
    found = [*negation(model, data, bank, repeats), *wording(model, data, prompts, names, repeats)]
    found += laterality(model, data, prompts, names, repeats)
    found += severity(model, data, prompts, bank, repeats)
    found += orientation(model, data, bank, repeats, progress)
    found += corruptions(model, data, bank, repeats, seed, progress)
    return found, data


def steps(rows: Sequence[StudyImage]) -> int:
    """How often :func:`probe_all` calls its progress, if every image can be read."""
    films, volumes = (any(row.modality == kind for row in rows) for kind in ("xray", "ct"))
    of_films, of_volumes = len(TURNS) + len(CORRUPTIONS) * len(SEVERITIES), len(VOLUME_FLIPS) + len(VOLUME_CORRUPTIONS) * len(SEVERITIES)
    return len(rows) + films * of_films + volumes * of_volumes
