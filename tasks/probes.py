"""What a model's scores hang on besides the finding: negation, wording, side, and what may happen to a picture.

Shapes: N images, F findings, P prompts. Scores are those of the model's own similarity. Everything is of the studies given, which should be
held out; nothing is fitted. Every figure has n and an interval over patients.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medvl.data.manifest import StudyImage
from medvl.data.studies import as_listed
from medvl.metrics import Interval, Statistic, auroc_statistic, bootstrap_intervals, combined, mean_statistic
from medvl.model import DualEncoder, batches
from medvl.types import ImageFeatures, ImageSample, Side, TextFeatures, UnreadableImageError
from reports.facts import LexiconFacts
from reports.prompts import PromptSet
from tasks.zero_shot import PromptBank, encode_prompts, pair_logits

SEVERITIES = (1, 2, 3, 4, 5)
Corruption = Callable[[NDArray[np.float32], int, np.random.Generator], NDArray[np.float32]]


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


def corruptions(
    model: DualEncoder,
    data: Read,
    bank: PromptBank,
    repeats: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Probe]:
    """Mean AUROC of the contrast under each corruption at five severities, and untouched (``none``), of native pixels given as an array.

    Films alone; the pixels are those that a person would be shown.
    """
    films = [i for i, sample in enumerate(data.samples) if sample.affine is None]
    labels, patients = data.labels(bank.findings)[films], [data.patients[i] for i in films]
    natives = [model.reader.native(data.rows[i].path).numpy() for i in films]

    def mean(samples: Sequence[ImageSample]) -> Interval:
        scores = np.round(similarities(model, samples, lambda images: pair_logits(model, images, bank)), 9)
        found = [auroc_statistic(labels[:, f], scores[:, f]) for f in range(len(bank.findings)) if {0.0, 1.0} <= set(labels[:, f].tolist())]
        every = combined([(1 / len(found), one) for one in found])
        return bootstrap_intervals({"x": every}, patients, repeats=repeats)["x"]

    yield Probe("corruption", "none", "0", mean([model.reader.read_array(one) for one in natives]))
    for name, corrupt in CORRUPTIONS.items():
        for severity in SEVERITIES:
            rng = np.random.default_rng([seed, severity])
            yield Probe("corruption", name, str(severity), mean([model.reader.read_array(corrupt(one, severity, rng)) for one in natives]))
            progress(1)


def similarities(
    model: DualEncoder, samples: Sequence[ImageSample], of: Callable[[ImageFeatures], torch.Tensor], size: int = 32
) -> NDArray[np.float64]:
    """(N, ...) of the images, a batch at a time."""
    with torch.inference_mode():
        return np.concatenate([of(model.encode_samples(part)).double().cpu().numpy() for part in batches(samples, size)])


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
    reader, found = LexiconFacts(), []
    for row in rows:
        text = " ".join(part for part in (row.report, row.findings, row.impression) if part)
        stated: dict[str, set[Side | None]] = {}
        for one in reader.facts(text):
            if one.fact.state == "present":
                stated.setdefault(one.fact.finding, set()).add(one.fact.side)
        found.append({name: next(iter(own)) for name, own in stated.items() if len(own) == 1 and None not in own})
    return found  # type: ignore[return-value]


def flipped(sample: ImageSample) -> ImageSample:
    """The image flipped left to right, for a probe alone: its record no longer leads to native pixels."""
    valid = sample.valid if sample.pixels.ndim == 4 else sample.valid.flip(-1)
    return replace(sample, pixels=sample.pixels.flip(-1), valid=valid)


def _noise(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return (image + rng.normal(0, (0.02, 0.04, 0.08, 0.12, 0.2)[severity - 1], image.shape)).clip(0, 1).astype(np.float32)


def _blur(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    sigma = (0.004, 0.008, 0.014, 0.022, 0.035)[severity - 1] * min(image.shape)
    return np.asarray(ndimage.gaussian_filter(image, sigma), dtype=np.float32)


def _contrast(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return (image.mean() + (image - image.mean()) * (0.8, 0.6, 0.45, 0.3, 0.2)[severity - 1]).astype(np.float32)


def _jpeg(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    stream = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(stream, "JPEG", quality=(60, 40, 25, 15, 8)[severity - 1])
    return (np.asarray(Image.open(stream)) / 255).astype(np.float32)


def _crop(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    share = (0.95, 0.9, 0.85, 0.8, 0.7)[severity - 1]
    rows, columns = (max(1, round(side * share)) for side in image.shape)
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
    return image[top : top + rows, left : left + columns]


def _rotation(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    degrees = (2, 4, 8, 12, 20)[severity - 1] * rng.choice([-1, 1])
    return np.asarray(ndimage.rotate(image, degrees, reshape=False, order=1, mode="constant"), dtype=np.float32).clip(0, 1)


def _resolution(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    factor = (1.5, 2, 3, 4, 6)[severity - 1]
    picture = Image.fromarray(image)
    width, height = (max(8, round(side / factor)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR), dtype=np.float32).clip(0, 1)


def _marker(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A burnt-in letter in an upper corner, of either side: what it says is not to be trusted."""
    picture = Image.fromarray((image * 255).round().astype(np.uint8))
    size = max(6, round(min(image.shape) * (0.04, 0.07, 0.1, 0.14, 0.2)[severity - 1]))
    right, letter = bool(rng.integers(2)), "LR"[int(rng.integers(2))]
    at = (picture.width - 2 * size if right else size // 2, size // 2)
    ImageDraw.Draw(picture).text(at, letter, fill=255, font=ImageFont.load_default(size=size))
    return (np.asarray(picture) / 255).astype(np.float32)


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "noise": _noise,
        "blur": _blur,
        "contrast": _contrast,
        "JPEG": _jpeg,
        "crop": _crop,
        "rotation": _rotation,
        "resolution": _resolution,
        "marker": _marker,
    }
)
"""Of films in 0 to 1, at the severities 1 to 5."""


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
        progress: called with images read, then with each corruption done; their number is ``len(rows) + 5 * len(CORRUPTIONS)``.
    Raises:
        ValueError: nothing that can be read, or no finding to measure.
    """
    data = read(model, rows, progress)
    names = usable(data, prompts)
    bank = encode_prompts(model, prompts, names)
    found = [*negation(model, data, bank, repeats), *wording(model, data, prompts, names, repeats)]
    found += laterality(model, data, prompts, names, repeats)
    if any(sample.affine is None for sample in data.samples):
        found += corruptions(model, data, bank, repeats, seed, progress)
    return found, data
