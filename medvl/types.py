"""Everyone's vocabulary: findings, batches, features, and the base classes that towers and readers come in by.

Shapes: B studies, I images, V views of a study, M texts, N image tokens, D embedding width, C channels, H rows, W columns, S slices.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

    from medvl.geometry import GridTransform

FINDINGS: tuple[str, ...] = (
    "cardiomegaly",
    "pleural_effusion",
    "consolidation",
    "pneumothorax",
    "lung_nodule",
    "edema",
    "atelectasis",
    "rib_fracture",
    "support_device",
    "emphysema",
)
"""Finding names as they stand in manifests, results and JSON."""

VIEWS: tuple[str, ...] = ("PA", "AP", "lateral")
"""Views of a radiograph as they stand in manifests and samples."""
OTHER_VIEW = len(VIEWS)
"""Index of a view that is none of these or not known."""

RESEARCH_USE = "research use, not for diagnosis"

State = Literal["present", "absent", "uncertain"]
Side = Literal["left", "right", "bilateral"]
Severity = Literal["mild", "moderate", "severe"]


@dataclass(frozen=True)
class Fact:
    """What is true of a study, in words a report can be made from: one finding, its state and where it is."""

    finding: str
    state: State
    side: Side | None = None
    location: str | None = None  # free anatomical words: "upper lobe", "lateral seventh rib"
    severity: Severity | None = None
    size_mm: float | None = None
    kind: str | None = None  # which one, where the finding is a family: "pacemaker", "endotracheal tube"


def view_index(view: str | None) -> int:
    """Place of a view in ``VIEWS``, in capitals or not; ``OTHER_VIEW`` for another word or None."""
    return next((i for i, known in enumerate(VIEWS) if view is not None and known.lower() == view.lower()), OTHER_VIEW)


@dataclass(frozen=True)
class ImageBatch:
    """What an image tower takes: I images, as many as there are, whichever studies they are of. A study's missing views take no room.

    ``pixels`` is (I, C, H, W) for X-ray and (I, C, S, H, W) for CT, float, as preprocessing made it.
    ``valid`` is (I, H, W) bool for X-ray, False on letterbox padding; (I, S) bool for CT, False on padded slices; None: all valid.
    ``position_mm`` is (I, S) for CT: height of each slice along the stacking axis, 0 at the first; None for X-ray.
    ``view`` is (I,) int64 for X-ray, see :func:`view_index`; None: not known.
    ``study`` is (I,) int64, the study 0 .. B-1 that each image is of, every study with at least one; None: each image stands for itself,
    so that B = I. Only towers that pool views (:attr:`ImageEncoder.pools_views`) look at it.
    ``others`` are images of another kind (CT beside radiographs), whose studies follow those of the first; None: there are none. Towers
    are given one kind at a time (:func:`medvl.training.passes.encode_images`).
    """

    pixels: Tensor
    valid: Tensor | None = None
    position_mm: Tensor | None = None
    view: Tensor | None = None
    study: Tensor | None = None
    others: ImageBatch | None = None

    @property
    def count(self) -> int:
        """B, of both kinds."""
        own = len(self.pixels) if self.study is None else int(self.study.max()) + 1
        return own if self.others is None else own + self.others.count

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same batch on another device."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})

    def studies(self, start: int, stop: int) -> ImageBatch:
        """The images of the studies from ``start`` to before ``stop``, renumbered from 0; of a batch of one kind."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.study is None:
            return replace(self, **{name: part[start:stop] for name, part in parts.items() if part is not None})
        chosen = (self.study >= start) & (self.study < stop)
        found = replace(self, **{name: part[chosen] for name, part in parts.items() if part is not None})
        return replace(found, study=self.study[chosen] - start)

    def grouped(self, counts: Sequence[int]) -> ImageBatch:
        """The same images as those of B studies, which have ``counts`` of them one after the other.

        Raises:
            ValueError: a study without an image, or counts that do not add to I.
        """
        if not all(count >= 1 for count in counts) or sum(counts) != len(self.pixels):
            raise ValueError(f"studies of {list(counts)} images: expected at least 1 of each and {len(self.pixels)} together")
        sizes = torch.tensor(counts, device=self.pixels.device)
        return replace(self, study=torch.repeat_interleave(torch.arange(len(counts), device=self.pixels.device), sizes))


@dataclass(frozen=True)
class ImageFeatures:
    """What an image tower returns. ``pooled`` and ``tokens`` are not normalised."""

    pooled: Tensor  # (B, D), one vector per study
    tokens: Tensor | None = None  # (B, N, D), same space as pooled; None if the tower keeps none
    grid: tuple[int, ...] | None = None  # (H, W) for X-ray, (S, H, W) for CT, both after V for studies of several; prod(grid) == N
    token_valid: Tensor | None = None  # (B, N) bool, False where a token saw only padding or is of a missing view; None: all valid
    extent: tuple[int, ...] | None = None  # voxels that (S, H, W) of the grid cover, where cells reach beyond the batch; None: the batch's
    slices: Tensor | None = None  # (B, S, D), one vector per CT slice in the space of pooled; of several series (B, V * S, D), one after
    # the other; None for towers without slices
    slice_weights: Tensor | None = None  # (B, S), share of each slice in pooled, rows sum to 1, 0 on padding; None without slices
    slice_valid: Tensor | None = None  # (B, S) bool, False on padding; None: all valid
    views: Tensor | None = None  # (B, V, D), one vector per view in the space of pooled, in the order of the batch, missing ones last
    view_weights: Tensor | None = None  # (B, V), share of each view in pooled, rows sum to 1, 0 where missing; None without views
    view_valid: Tensor | None = None  # (B, V) bool, False where missing; None without views

    def replace(self, **changes: Any) -> ImageFeatures:
        """A copy with the named fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class TextBatch:
    """What a report tower takes: M texts as strings; the tower owns its tokenizer."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class TextFeatures:
    """What a report tower returns. ``pooled`` and ``tokens`` are not normalised.

    A token is a word or a piece of one, as the tower was made, in the space of ``pooled``; special tokens are none. Which characters of
    the text each one is, the tower says: ``spans(texts)`` of :class:`reports.towers.trunk.TrunkReportEncoder`.
    """

    pooled: Tensor  # (M, D)
    tokens: Tensor | None = None  # (M, L, D); None if the tower keeps none
    token_valid: Tensor | None = None  # (M, L) bool, False on padding
    concepts: Tensor | None = None  # (M, L) int64: which concept of its text (0, 1, ...) a token is of, -1 none; None: not known

    def copied(self) -> TextFeatures:
        """A copy of every tensor: those of inference mode can take part in gradients only so."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: part.clone() for name, part in parts.items() if part is not None})

    def rows(self, start: int, stop: int) -> TextFeatures:
        """The texts from ``start`` to before ``stop``."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: part[start:stop] for name, part in parts.items() if part is not None})


def join_texts(parts: Sequence[TextFeatures]) -> TextFeatures:
    """The texts of several batches as one, in their order; those of fewer tokens are padded at the end, and the padding is not valid.

    Raises:
        ValueError: no batch at all, or tokens or concepts in some batches only.
    """
    if not parts:
        raise ValueError("no texts were given")
    for name in ("tokens", "concepts"):
        if len({getattr(part, name) is None for part in parts}) > 1:
            raise ValueError(f"TextFeatures.{name} is there in some batches only; the texts that are joined must come from one tower")
    pooled = torch.cat([part.pooled for part in parts])
    if parts[0].tokens is None:
        return TextFeatures(pooled)
    longest = max(_tokens(part).shape[1] for part in parts)
    exact = all(part.token_valid is None and _tokens(part).shape[1] == longest for part in parts)
    concepts = [_lengthened(part.concepts, longest, -1) for part in parts if part.concepts is not None]
    return TextFeatures(
        pooled,
        torch.cat([_lengthened(_tokens(part), longest, 0) for part in parts]),
        None if exact else torch.cat([_lengthened(_token_valid(part), longest, False) for part in parts]),
        torch.cat(concepts) if concepts else None,
    )


def _tokens(texts: TextFeatures) -> Tensor:
    assert texts.tokens is not None
    return texts.tokens


def _token_valid(texts: TextFeatures) -> Tensor:
    tokens = _tokens(texts)
    return tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if texts.token_valid is None else texts.token_valid


def _lengthened(values: Tensor, length: int, fill: float) -> Tensor:
    """(M, L, ...) to (M, length, ...)."""
    short = values.new_full((len(values), length - values.shape[1], *values.shape[2:]), fill)
    return torch.cat([values, short], 1) if short.shape[1] else values


@dataclass(frozen=True)
class ImageSample:
    """One image, read and preprocessed, with the record that lays a map back on its native pixels."""

    pixels: Tensor  # (C, H, W) float32; (C, S, H, W) for CT
    valid: Tensor  # (H, W) bool, False on letterbox padding; (S,) for CT, False on padded slices
    transform: GridTransform  # native grid <-> tower grid
    view: str | None = None  # PA, AP, lateral; None if the file does not say
    warnings: tuple[str, ...] = ()
    affine: NDArray[np.float64] | None = None  # of a volume: native index (s, h, w) to RAS mm
    spacing_mm: tuple[float, ...] | None = None  # of the tower's grid, where known


class Configurable:
    """Base of everything a saved model is rebuilt from: it remembers the arguments it was made with.

    A subclass needs nothing but a plain constructor with typed arguments that JSON can hold (or that are themselves configurable). One
    whose constructor fetches initial weights says in :meth:`architecture` how it is made without them; one that needs more than arguments
    and weights gives that as :meth:`files`.
    """

    _init_args: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        original = cls.__dict__.get("__init__")
        if original is None:
            return

        @functools.wraps(original)
        def remembering(self: Configurable, *args: Any, **kwargs: Any) -> None:
            if "_init_args" not in self.__dict__:  # the outermost constructor is the one that was called
                object.__setattr__(self, "_init_args", _given(original, self, *args, **kwargs))
            original(self, *args, **kwargs)

        cls.__init__ = remembering  # type: ignore[method-assign, assignment]

    def spec(self) -> dict[str, Any]:
        """``class_path`` and ``init_args``, ready for JSON.

        Raises:
            TypeError: an argument that JSON cannot hold.
        """
        kind = _own_class(type(self))
        arguments = {name: _jsonable(value, f"{kind.__name__}.{name}") for name, value in self.__dict__.get("_init_args", {}).items()}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}

    def files(self) -> dict[str, bytes]:
        """Name -> content of the files that a saved model must carry for :meth:`architecture`: here those of configurable arguments."""
        return _files(self.__dict__.get("_init_args", {}))

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """The object without initial weights: a state dict follows. Asks no network, opens no file that is neither in ``folder`` nor code.

        Args:
            arguments: of the constructor.
            folder: where :meth:`files` were written; need not exist if there were none.
        """
        return cls(**arguments)

    @classmethod
    def rebuild(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """The :meth:`architecture`, with the :meth:`spec` of the object that was saved.

        Raises:
            TypeError: arguments that the constructor does not take.
        """
        given = _given(cls.__init__, None, **arguments)
        made = cls.architecture(arguments, folder)
        if "_init_args" in made.__dict__:  # absent where no class on the way has a constructor of its own
            object.__setattr__(made, "_init_args", given)
        return made


def _own_class(kind: type) -> type:
    """The class itself, or of one that FSDP2 has mixed itself into, at run time and in place, the class that it was."""
    return next(one for one in kind.__mro__ if all(base.__name__ != "FSDPModule" for base in one.__mro__))


def _given(constructor: Callable[..., None], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Argument -> value of a call of a constructor, defaults and all, without ``self``."""
    signature = inspect.signature(constructor)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _files(value: Any) -> dict[str, bytes]:
    """Files of the configurables in an argument, each under the name or place that it has there."""
    if isinstance(value, Configurable):
        return value.files()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {f"{key}/{name}": content for key, item in items for name, content in _files(item).items()}


def _jsonable(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Configurable):
        return value.spec()
    if isinstance(value, dict):
        return {str(key): _jsonable(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, name) for item in value]
    raise TypeError(f"{name} is a {type(value).__name__}, which a config.json cannot hold; use plain values or a Configurable")


class ImageEncoder(Configurable, nn.Module, abc.ABC):
    """Base of image towers: :class:`ImageBatch` in, :class:`ImageFeatures` of width ``embed_dim`` out.

    ``pools_views`` says whether the tower makes one row of all images of a study (``ImageBatch.study``); others have a row per image. A
    tower of several modalities says it of each (:meth:`pools`).
    """

    embed_dim: int
    pools_views: bool = False

    def pools(self, modality: str) -> bool:
        """Whether it makes one row of all radiographs (``xray``), or all series (``ct``), of a study."""
        return self.pools_views

    @abc.abstractmethod
    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """Encode B studies, or images that each stand for themselves."""


class ReportEncoder(Configurable, nn.Module, abc.ABC):
    """Base of report towers: :class:`TextBatch` in, :class:`TextFeatures` of width ``embed_dim`` out."""

    embed_dim: int

    @abc.abstractmethod
    def forward(self, batch: TextBatch) -> TextFeatures:
        """Encode M texts."""

    def precompute(self, texts: Sequence[str]) -> None:
        """Told before training which texts will come, so that a frozen trunk can embed them once."""


@dataclass(frozen=True)
class Product:
    """Logits that need not be formed: a scale times the inner products of B images and M texts. Losses take them tile by tile."""

    image: Tensor  # (B, D)
    text: Tensor  # (M, D)
    scale: Tensor  # scalar, the inverse of a temperature

    @property
    def shape(self) -> tuple[int, int]:
        """(B, M)."""
        return len(self.image), len(self.text)

    def dense(self) -> Tensor:
        """(B, M) logits, in the type of the scale, under autocast too."""
        return (self.image @ self.text.T).to(self.scale.dtype) * self.scale


class Similarity(Configurable, nn.Module, abc.ABC):
    """Base of similarities. ``parts`` are trained each under the objective; the score is their mean unless a subclass says otherwise.

    ``reads_words`` says whether it looks at the tokens of a text; where it does not, whoever keeps the features of many texts drops them.
    """

    reads_words: ClassVar[bool] = True

    @abc.abstractmethod
    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """Name -> (B, M) logits, float32, or what makes them."""

    @abc.abstractmethod
    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, M, *grid) how well every token fits the text, in [-1, 1], a cosine unless a subclass says otherwise; NaN where a token saw
        only padding.

        Raises:
            ValueError: the image tower keeps no tokens.
        """

    def forward(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, M) scores: the mean of the parts."""
        return torch.stack(list(self.logits(images, texts).values())).mean(0)

    def logits(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor]:
        """:meth:`parts`, every one formed."""
        parts = self.parts(images, texts).items()
        return {name: part.dense() if isinstance(part, Product) else part for name, part in parts}


@dataclass(frozen=True)
class StudyWords:
    """What is known in words of one study. Its repr hides the text."""

    study_id: str
    report: str | None = field(default=None, repr=False)
    findings: str | None = field(default=None, repr=False)
    impression: str | None = field(default=None, repr=False)
    labels: Mapping[str, int] = field(default_factory=dict, hash=False)  # finding -> 1, 0 or -1; not mentioned: no key


@dataclass(frozen=True)
class SourcedText:
    """A text that is true of a study, and where it comes from."""

    text: str = field(repr=False)
    source: str = "report"
    weight: float = 1.0  # how often its source is drawn from, beside the other sources of the study


class TextSource(Configurable, abc.ABC):
    """Base of what turns a report into the texts to train on."""

    @abc.abstractmethod
    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """The texts that are true of the study; empty if the report says nothing usable."""

    def sourced(self, study: StudyWords) -> tuple[SourcedText, ...]:
        """The texts with their provenance. One source, the report, unless a subclass mixes several."""
        return tuple(SourcedText(text) for text in self.texts(study.report, study.findings, study.impression))


@dataclass(frozen=True)
class KnownStudy:
    """One item of a data set before training: what a :class:`PairBuilder` prepares for."""

    rows: tuple[int, ...]  # of the manifest, of its images
    words: tuple[StudyWords, ...]  # of the same rows
    texts: tuple[SourcedText, ...]  # all that may be drawn for it


@dataclass(frozen=True)
class PairStudy:
    """One item of a batch before it is paired: the study, by the manifest row of its first image, and the texts drawn for it."""

    row: int
    texts: tuple[SourcedText, ...]
    mirrored: bool = False  # its images were flipped left to right; the texts are still as the report has them


@dataclass(frozen=True)
class TextPairs:
    """Which of the M different texts of a batch are true of which of its B studies."""

    texts: tuple[SourcedText, ...]  # M; of equal texts the first
    positives: Tensor  # (B, M) bool, or float weights of 0 and more
    ignore: Tensor | None = None  # (B, M) bool, pairs of which the truth is not known
    false_texts: Tensor | None = None  # (M,) bool, texts that were made to be false: they need no positive
    null_texts: Tensor | None = None  # (M,) bool, texts without visual content, to be aligned with the null target


def equal_text_pairs(studies: Sequence[PairStudy]) -> TextPairs:
    """The different texts of a batch in their order; each is a positive of every study that it was drawn for."""
    texts: dict[str, SourcedText] = {}
    for study in studies:
        for one in study.texts:
            texts.setdefault(one.text, one)
    column = {text: j for j, text in enumerate(texts)}
    positives = torch.zeros(len(studies), len(texts), dtype=torch.bool)
    for i, study in enumerate(studies):
        positives[i, [column[one.text] for one in study.texts]] = True
    return TextPairs(tuple(texts.values()), positives)


class PairBuilder(Configurable, abc.ABC):
    """Base of what decides which texts of a batch are positives, negatives or neither; without one, a study's own and equal texts."""

    unread: Mapping[str, str] = MappingProxyType({})
    """study_id -> why its report could not be read as was asked for, after :meth:`prepare`; the study is paired all the same."""

    def prepare(self, studies: Sequence[KnownStudy]) -> None:
        """Told of every study of every split before training."""

    def keeps(self, text: str) -> bool:
        """Whether a text may be drawn at all."""
        return True

    def mirrored(self, text: str) -> str | None:
        """The text of the image flipped left to right; None where that cannot be written, so that the image must not be flipped."""
        return None

    @abc.abstractmethod
    def pairs(self, studies: Sequence[PairStudy], rng: np.random.Generator | None = None) -> TextPairs:
        """Pair a batch. ``rng`` is the only source of chance; None, as in validation: nothing that needs any (no hard negatives)."""


class ImageReader(Configurable, abc.ABC):
    """Base of readers: a file on disk to what a tower takes. One reader serves training and inference.

    ``suffixes`` names the files that a folder argument is searched for (lower case, with the dot).
    """

    suffixes: ClassVar[frozenset[str]] = frozenset()

    def find_images(self, folder: Path) -> list[Path]:
        """Every file under ``folder`` that this reader reads, sorted; hidden files and subfolders named ``masks`` are passed over."""
        inside = (path for path in folder.rglob("*") if path.suffix.lower() in self.suffixes and path.is_file())
        return sorted(
            path for path in inside if not any(part == "masks" or part.startswith(".") for part in path.relative_to(folder).parts)
        )

    def study_key(self, path: Path) -> str | None:
        """What the files of one study share, safe to keep in memory but never shown; None: the file is a study of its own. Never raises."""
        return None

    def sources(self, path: Path) -> tuple[Path, ...] | None:
        """The files that what :meth:`read` makes of ``path`` depends on, for whoever keeps it: the file, or all in a folder, sorted.

        None: they cannot be told, so that nothing of it can be kept.

        Raises:
            OSError: a folder that cannot be listed.
        """
        return tuple(sorted(one for one in path.rglob("*") if one.is_file())) if path.is_dir() else (path,)

    def describe(self) -> dict[str, str]:
        """What is done to an image, for a person: step -> words with units, every argument of the reader among them."""
        return {name.replace("_", " "): str(value) for name, value in self.spec()["init_args"].items()}

    @abc.abstractmethod
    def read(self, path: Path) -> ImageSample:
        """Read and preprocess one file.

        Raises:
            UnreadableImageError: the file cannot be read; the message names the path, what was expected and what came.
        """

    @abc.abstractmethod
    def read_array(self, array: Any) -> ImageSample:
        """Preprocess an (H, W) array, bright = dense, or an (S, H, W) array of HU, that the caller has read."""

    @abc.abstractmethod
    def native(self, path: Path) -> Tensor:
        """(H, W), or (S, H, W), float32 in 0..1: the image in native pixels as a person would be shown it (bright = dense)."""

    @abc.abstractmethod
    def collate(self, samples: Sequence[ImageSample]) -> ImageBatch:
        """Stack samples to a batch."""

    def enlarged(self, factor: int, path: Path | None = None) -> ImageReader:
        """A reader that shows the same part of an image on ``factor`` times the rows and columns.

        Args:
            path: the image it is for, for readers of several kinds.
        Raises:
            NotImplementedError: this reader reads at one resolution.
        """
        raise NotImplementedError(f"{type(self).__name__} reads at one resolution; crops of a higher one need a reader that has it")


class UnreadableImageError(ValueError):
    """A file that could not be read as an image; its message is safe to show (no header values that identify)."""
