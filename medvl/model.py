"""The dual encoder over any two towers, and its life on disk: model.safetensors beside config.json.

Shapes: B images, M texts. A config.json may come from anywhere, so it names classes only from packages that the caller trusts and
only subclasses of our base classes; everything else in it is data, and data that calls for more memory than the weights is refused.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import os
import shutil
import subprocess
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import medvl
from medvl.files import write_atomically
from medvl.types import (
    RESEARCH_USE,
    Configurable,
    ImageBatch,
    ImageEncoder,
    ImageFeatures,
    ImageReader,
    ImageSample,
    ReportEncoder,
    Similarity,
    TextBatch,
    TextFeatures,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1
TRUSTED_PACKAGES = ("medvl", "modalities", "reports")
LARGEST = 2**20  # of any number in a config: no width, side, depth or count of a model is larger
SEQUENCES = ("slice", "view")  # what a study's vector may be pooled of; the fields of ImageFeatures are named after them
T = TypeVar("T", bound=Configurable)
Item = TypeVar("Item")
ImageInput = str | os.PathLike[str] | NDArray[Any]


class ConfigError(ValueError):
    """A config.json that cannot be turned into a model; the message says which key and why."""


class DualEncoder(nn.Module):
    """An image tower and a report tower on one space, the similarity that joins them, and the reader that feeds the first.

    Args:
        image: tower of images; ``image.embed_dim`` must equal ``report.embed_dim``.
        report: tower of reports.
        similarity: how features become logits and maps.
        reader: how a file becomes what the image tower takes, in training and in use alike.
    Raises:
        ValueError: towers of different width.
    """

    def __init__(self, image: ImageEncoder, report: ReportEncoder, similarity: Similarity, reader: ImageReader) -> None:
        super().__init__()
        if image.embed_dim != report.embed_dim:
            raise ValueError(f"the image tower embeds in {image.embed_dim} dimensions, the report tower in {report.embed_dim}")
        self.image, self.report, self.similarity, self.reader = image, report, similarity, reader
        self.token_offset: dict[int, tuple[float, ...]] = {}
        """Axes of a grid (2 or 3) -> where its tokens look, in voxels of the tower's grid from the middle of their cells, as
        :mod:`medvl.nn.offset` measures it; not there: not measured, taken as none."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, images: ImageBatch, texts: TextBatch) -> tuple[ImageFeatures, TextFeatures]:
        """Features of both sides."""
        return self.image(images), self.report(texts)

    @torch.inference_mode()
    def encode_image(self, images: ImageInput | Sequence[ImageInput], batch_size: int = 32) -> ImageFeatures:
        """Features of files (DICOM, PNG, ...) or arrays (H, W), read as in training; on the model's device.

        Raises:
            UnreadableImageError: a file that cannot be read.
        """
        single = isinstance(images, (str, os.PathLike, np.ndarray))
        inputs: Sequence[ImageInput] = [images] if single else images  # type: ignore[assignment,list-item]
        samples = [self.read(item) for item in inputs]
        return join([self.encode_samples(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)])

    def read(self, image: ImageInput) -> ImageSample:
        """Read and preprocess one file or array, with the record that lays a map back on its pixels."""
        return self.reader.read_array(image) if isinstance(image, np.ndarray) else self.reader.read(Path(image))

    @torch.inference_mode()
    def encode_samples(self, samples: Sequence[ImageSample]) -> ImageFeatures:
        """Features of images that :meth:`read` has read, as one batch."""
        return self.image(self.reader.collate(samples).to(self.device))

    @torch.inference_mode()
    def encode_studies(self, studies: Sequence[Sequence[ImageInput | ImageSample]], batch_size: int = 32) -> ImageFeatures:
        """Features of studies, a row each, from all images of a study together: files, arrays or what :meth:`read` made of them.

        Args:
            studies: the images of each; their order does not move ``pooled``, and is that of ``views`` and of the grid's first axis.
            batch_size: images encoded at once; a study of more goes alone.
        Raises:
            TypeError: an image tower that encodes images one by one, or an image where the images of a study are expected.
            UnreadableImageError: a file that cannot be read.
            ValueError: no study, or one without an image.
        """
        if not self.image.pools_views:
            raise TypeError(
                f"{type(self.image).__name__} encodes images one by one; studies need a tower that pools views, such as "
                "modalities.xray.ViewPooledEncoder. encode_image gives a row per image"
            )
        for i, study in enumerate(studies):
            if not isinstance(study, (list, tuple)):
                raise TypeError(f"study {i} is a {type(study).__name__}, expected a list of its images")

        def encoded(part: Sequence[Sequence[ImageInput | ImageSample]]) -> ImageFeatures:
            samples = [one if isinstance(one, ImageSample) else self.read(one) for study in part for one in study]
            return self.image(self.reader.collate(samples).grouped([len(study) for study in part]).to(self.device))

        return join([encoded(part) for part in packed(studies, batch_size)])

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str]) -> TextFeatures:
        """Features of one string or many, on the model's device.

        Raises:
            TypeError: anything but strings.
        """
        given = (texts,) if isinstance(texts, str) or not isinstance(texts, Iterable) else tuple(texts)
        for i, text in enumerate(given):
            if not isinstance(text, str):
                raise TypeError(f"encode_text takes a string or a sequence of strings, but text {i} is of type {type(text).__name__}")
        return self.report(TextBatch(given))

    def offset_record(self) -> dict[str, list[float]]:
        """``token_offset`` as JSON holds it."""
        return {str(axes): list(offset) for axes, offset in self.token_offset.items()}

    def spec(self) -> dict[str, Any]:
        """What :func:`load` rebuilds this model from."""
        return {name: getattr(self, name).spec() for name in PARTS}

    def save(self, folder: str | os.PathLike[str], state: Mapping[str, Tensor] | None = None, **provenance: Any) -> Path:
        """Write ``model.safetensors``, ``config.json`` and, in a folder named after a part, the files it needs; each whole or not at all.

        The folder can be moved: :func:`load` says what it needs besides.

        Args:
            state: the weights, where this process does not hold them whole; None: its own.
            provenance: JSON-ready facts to keep beside the model (recipe, data hash, steps).
        """
        from safetensors.torch import save as to_bytes

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in (state or self.state_dict()).items()})
        files = {f"{part}/{name}": content for part in PARTS for name, content in getattr(self, part).files().items()}
        config = {
            "format": FORMAT,
            "medvl": medvl.__version__,
            "notice": RESEARCH_USE,
            "model": self.spec(),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
            "token_offset": self.offset_record(),
            "provenance": provenance,
        }
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, content)
        write_atomically(folder / WEIGHTS, weights)
        write_atomically(folder / CONFIG, (json.dumps(config, indent=2, allow_nan=False) + "\n").encode())
        return folder


PARTS: dict[str, type[Configurable]] = {
    "image": ImageEncoder,
    "report": ReportEncoder,
    "similarity": Similarity,
    "reader": ImageReader,
}


def load(
    folder: str | os.PathLike[str], *, device: torch.device | str | None = None, trust: Sequence[str] = TRUSTED_PACKAGES
) -> DualEncoder:
    """Rebuild a model that :meth:`DualEncoder.save` wrote, in evaluation mode.

    Guaranteed for our own towers, whatever config.json says: the network is not asked, no code but that of trusted packages runs, nothing
    is unpickled, and no file outside ``folder`` is opened, for initial weights are not fetched where model.safetensors follows. The one
    exception is a frozen text trunk, which a run leaves out on purpose: it comes from its package, its folder, or the models that were
    downloaded before, and its hash is compared. Sizes that the weights do not bear out are refused before memory is taken for them.

    Args:
        folder: the run's folder, with config.json and model.safetensors.
        device: where to put it; None takes CUDA if there is one.
        trust: packages whose classes the config may name. A config from elsewhere runs no code but theirs.
    Raises:
        FileNotFoundError: no config.json or model.safetensors in the folder.
        ConfigError: a format, class path or argument that is not accepted, a frozen trunk that is not here, or weights that cannot be
            read or do not fit the config.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; expected the folder that `medvl fit` or `medvl demo` wrote the model to")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ConfigError(f"{folder / CONFIG}: format {config['format']!r}, this version reads {FORMAT}")
        specs = {name: config["model"][name] for name in PARTS}
        expected_hash = config["weights_sha256"]
        files = dict(config.get("files", {}))
        offset = {int(axes): tuple(map(float, value)) for axes, value in config.get("token_offset", {}).items()}
        if not all(len(value) == axes and all(abs(one) <= LARGEST for one in value) for axes, value in offset.items()):
            raise ValueError("token_offset is no number for each axis")
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{folder / CONFIG}: not a medvl config.json ({type(error).__name__}: {error})") from error
    _check_files(folder, files)
    weights = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != expected_hash:
        raise ConfigError(
            f"{folder}: {WEIGHTS} is not the file that {CONFIG} was written for (sha256 differs); one of the two was replaced"
        )
    state = _parsed(weights, folder)
    with _Allowance(len(weights), len(state)):
        parts = {name: _part(name, specs[name], trust, folder) for name in PARTS}
    try:
        model = DualEncoder(**parts)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    _set_weights(model, state, folder)
    model.token_offset = offset
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def note_offset(model: DualEncoder, folder: Path) -> None:
    """Write where the model's tokens look into the config.json of its folder."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["token_offset"] = model.offset_record()
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2, allow_nan=False) + "\n").encode())


def load_weights(model: DualEncoder, folder: Path) -> None:
    """Set the weights of a model that was made otherwise to those of a run, strictly.

    Raises:
        FileNotFoundError: no model.safetensors in the folder.
        ConfigError: weights that cannot be read or are another model's.
    """
    _set_weights(model, _parsed((folder / WEIGHTS).read_bytes(), folder), folder)


def load_part(part: nn.Module, name: str, folder: Path) -> None:
    """Set the weights of one part (``image``, ``report``, ``similarity``) to those it has in a run, strictly.

    Raises:
        FileNotFoundError: no model.safetensors in the folder.
        ConfigError: weights that cannot be read, or are of another architecture.
    """
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder}: no {WEIGHTS} to take the weights of {name} from; name the folder of a finished run")
    weights = _parsed((folder / WEIGHTS).read_bytes(), folder)
    state = {key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(f"{name}.")}
    try:
        part.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{folder}: the weights of {name} do not fit the recipe's: {textwrap.shorten(str(error), 300)}") from error


def _part(name: str, spec: Any, trust: Sequence[str], folder: Path) -> Configurable:
    try:
        return build(spec, PARTS[name], trust, folder / name)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {name}: {error}") from error


def _parsed(weights: bytes, folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        return from_bytes(weights)
    except SafetensorError as error:
        raise ConfigError(f"{folder / WEIGHTS} is no whole safetensors file ({error}); copy or train it again") from error


def _set_weights(model: DualEncoder, state: dict[str, Tensor], folder: Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{folder}: the weights do not fit the config: {textwrap.shorten(str(error), 300)}") from error


def _check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise ConfigError unless every file that was saved with the model is there and as it was."""
    for name, expected in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.parts[:1] not in [(part,) for part in PARTS]:
            raise ConfigError(f"{folder / CONFIG}: file {name!r} is not in the folder of a part ({', '.join(PARTS)})")
        if not (folder / path).is_file():
            raise ConfigError(f"{folder}: no {name}, which {CONFIG} names; copy the whole folder")
        if hashlib.sha256((folder / path).read_bytes()).hexdigest() != expected:
            raise ConfigError(f"{folder}: {name} is not the file that {CONFIG} was written for (sha256 differs)")


class _Allowance(TorchDispatchMode):
    """While entered, new tensors are refused beyond what a file of ``size`` bytes and ``count`` tensors can call for, with some room."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.numbers, self.tensors = size + 2**24, 8 * count + 1000  # a number of a file has 2 or 4 bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        if shape and all(isinstance(side, int) for side in shape):  # of what makes tensors from nothing: empty, zeros, randn ...
            self.numbers -= math.prod(shape)
            self.tensors -= 1
            if self.numbers < 0 or self.tensors < 0:
                raise ValueError(f"calls for more memory than {WEIGHTS} bears out (at a tensor of shape {tuple(shape)})")
        return func(*args, **(kwargs or {}))


def build(spec: Any, base: type[T], trust: Sequence[str] = TRUSTED_PACKAGES, folder: Path | None = None) -> T:
    """Make the object that a ``{class_path, init_args}`` describes.

    Args:
        spec: what :meth:`medvl.types.Configurable.spec` gave.
        base: what it must be a subclass of.
        trust: packages whose classes may be named.
        folder: of the files that were saved with it; given, initial weights are left out, for a state dict follows.
    Raises:
        ConfigError: a class path outside ``trust``, one that names no subclass of ``base``, or arguments it does not take.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str) or not isinstance(spec.get("init_args", {}), dict):
        raise ConfigError(f"expected {{class_path, init_args}} for a {base.__name__}, got {type(spec).__name__}")
    path: str = spec["class_path"]
    module_name, _, name = path.rpartition(".")
    if module_name.partition(".")[0] not in trust and module_name not in trust:
        raise ConfigError(
            f"class path {path!r} is outside the trusted packages ({', '.join(trust)}). The medvl command takes classes of "
            f"{', '.join(TRUSTED_PACKAGES)} only; in Python, medvl.load(folder, trust=(...)) takes those of packages that you trust"
        )
    try:
        kind = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"class path {path!r} names nothing that can be imported ({type(error).__name__})") from error
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise ConfigError(f"class path {path!r} is no {base.__name__}")
    given = spec.get("init_args", {})
    if too_large := sorted(key for key, value in given.items() if not _is_moderate(value)):
        raise ConfigError(f"{path}: {', '.join(too_large)}: a number that is not finite or beyond {LARGEST}; no model has such sizes")
    arguments = {key: _built_argument(value, trust, None if folder is None else folder / key) for key, value in given.items()}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{path} does not take the arguments {sorted(arguments)}: {error}") from error
    try:
        return kind(**arguments) if folder is None else kind.rebuild(arguments, folder)
    except Exception as error:  # whatever a constructor makes of arguments from elsewhere, they are to blame
        raise ConfigError(f"{path} cannot be made: {textwrap.shorten(str(error), 600) or type(error).__name__}") from error


def _is_moderate(value: Any) -> bool:
    """Whether no number in a config's value, down to the next class path, is beyond ``LARGEST`` or not finite."""
    if isinstance(value, dict):
        return "class_path" in value or all(map(_is_moderate, value.values()))
    if isinstance(value, list):
        return all(map(_is_moderate, value))
    return not isinstance(value, (int, float)) or abs(value) <= LARGEST


def _built_argument(value: Any, trust: Sequence[str], folder: Path | None) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return build(value, Configurable, trust, folder)
    if isinstance(value, list):
        return [_built_argument(item, trust, None if folder is None else folder / str(i)) for i, item in enumerate(value)]
    return value


def join(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """Features of several batches as one; studies of fewer slices or views than the longest are padded, and the padding is not valid.

    Raises:
        ValueError: no batch at all.
    """
    if not parts:
        raise ValueError("no images were given")
    if len({part.grid for part in parts}) > 1 or any(len(_lengths(parts, kind)) > 1 for kind in SEQUENCES):
        parts = _of_equal_length(parts)

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("tokens", "token_valid", *(name for kind in SEQUENCES for name in (f"{kind}s", f"{kind}_weights", f"{kind}_valid")))
    return parts[0].replace(pooled=torch.cat([part.pooled for part in parts]), **{name: cat(name) for name in names})


def beside(one: ImageFeatures, other: ImageFeatures) -> ImageFeatures:
    """Features of images of one kind, then those of another: tokens are padded to the longer of the two and have no grid."""
    pooled = torch.cat([one.pooled, other.pooled])
    if one.tokens is None or other.tokens is None:
        return ImageFeatures(pooled)
    longest = max(one.tokens.shape[1], other.tokens.shape[1])
    tokens, valid = [], []
    for given, seen in ((one.tokens, one.token_valid), (other.tokens, other.token_valid)):
        more = longest - given.shape[1]
        tokens.append(F.pad(given, (0, 0, 0, more)))
        valid.append(F.pad(given.new_ones(given.shape[:2], dtype=torch.bool) if seen is None else seen, (0, more)))
    return ImageFeatures(pooled, torch.cat(tokens), token_valid=torch.cat(valid))


def _lengths(parts: Sequence[ImageFeatures], kind: str) -> set[int]:
    """How many slices, or views, the batches have; 0 for a tower that keeps none."""
    vectors = [getattr(part, f"{kind}s") for part in parts]
    return {0 if one is None else one.shape[1] for one in vectors}


def _of_equal_length(parts: Sequence[ImageFeatures]) -> list[ImageFeatures]:
    """Studies with slices or views, and with them tokens, added at the end up to the longest of the batches; slices in each view."""
    views = max(_lengths(parts, "view"))
    slices = max((_slices_of_a_view(part) for part in parts if part.slices is not None), default=0)
    grids = [part.grid for part in parts if part.grid is not None]
    if len({len(grid) for grid in grids}) > 1:
        raise ValueError(f"features on grids {grids} cannot be joined: some are of studies, some of single images")
    longest = tuple(max(side) for side in zip(*grids, strict=True))
    found = []
    for part in parts:
        changes: dict[str, Any] = {}
        own, most = (1, 1) if part.views is None else (part.views.shape[1], views)
        sides: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"view": ((own,), (most,))}
        if part.slices is not None:
            sides["slice"] = ((own, _slices_of_a_view(part)), (most, slices))
        for kind, (given, wanted) in sides.items():
            if (vectors := getattr(part, f"{kind}s")) is not None:
                valid = getattr(part, f"{kind}_valid")
                valid = torch.ones_like(vectors[..., 0], dtype=torch.bool) if valid is None else valid
                changes |= {f"{kind}s": _enlarged(vectors, given, wanted), f"{kind}_valid": _enlarged(valid, given, wanted)}
                weights = getattr(part, f"{kind}_weights")
                changes[f"{kind}_weights"] = None if weights is None else _enlarged(weights, given, wanted)
        if part.tokens is not None and part.grid is not None:
            valid = torch.ones_like(part.tokens[..., 0], dtype=torch.bool) if part.token_valid is None else part.token_valid
            changes |= {"tokens": _enlarged(part.tokens, part.grid, longest), "token_valid": _enlarged(valid, part.grid, longest)}
            changes["grid"] = longest
            if part.extent is not None:  # in cells of one size
                changes["extent"] = tuple(n // own * side for n, own, side in zip(part.extent, part.grid[-3:], longest[-3:], strict=True))
        found.append(part.replace(**changes))
    return found


def _slices_of_a_view(part: ImageFeatures) -> int:
    """How many slices one series has: all, or where series of a study are pooled, its share of them."""
    assert part.slices is not None
    return part.slices.shape[1] // (1 if part.views is None else part.views.shape[1])


def _enlarged(values: Tensor, given: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """(B, prod(given), ...) to (B, prod(wanted), ...), 0 on what is added at the end of each axis."""
    if given == wanted:
        return values
    laid = values.unflatten(1, given)
    new = laid.new_zeros(len(values), *wanted, *values.shape[2:])
    inside = (slice(None), *(slice(side) for side in given))
    new[inside] = laid
    return new.flatten(1, len(wanted))


def commit() -> str | None:
    """The commit that this code was checked out at, with ``-dirty`` if it was changed since; None for an installed copy."""
    root = Path(medvl.__file__).resolve().parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    asked = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603 (fixed words)
    return found.stdout.strip() or None


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def packed(groups: Sequence[Sequence[Item]], size: int) -> Iterator[list[Sequence[Item]]]:
    """Consecutive groups of at most ``size`` items together; a group of more comes alone."""
    part: list[Sequence[Item]] = []
    count = 0
    for group in groups:
        if part and count + len(group) > size:
            yield part
            part, count = [], 0
        part.append(group)
        count += len(group)
    if part:
        yield part
