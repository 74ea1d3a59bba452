"""The dual encoder over any two towers, and its life on disk: model.safetensors beside config.json.

Shapes: B images, M texts. A config.json may come from anywhere, so it names classes only from packages that the caller trusts and
only subclasses of our base classes; everything else in it is data.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import medvl
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
T = TypeVar("T", bound=Configurable)
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
    def encode_text(self, texts: str | Sequence[str]) -> TextFeatures:
        """Features of one string or many, on the model's device."""
        return self.report(TextBatch((texts,) if isinstance(texts, str) else tuple(texts)))

    def spec(self) -> dict[str, Any]:
        """What :func:`load` rebuilds this model from."""
        return {name: getattr(self, name).spec() for name in PARTS}

    def save(self, folder: str | os.PathLike[str], **provenance: Any) -> Path:
        """Write ``model.safetensors`` and ``config.json``, each whole or not at all.

        Args:
            provenance: JSON-ready facts to keep beside the model (recipe, data hash, steps).
        """
        from safetensors.torch import save as to_bytes

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()})
        config = {
            "format": FORMAT,
            "medvl": medvl.__version__,
            "notice": RESEARCH_USE,
            "model": self.spec(),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "provenance": provenance,
        }
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

    Args:
        folder: the run's folder, with config.json and model.safetensors.
        device: where to put it; None takes CUDA if there is one.
        trust: packages whose classes the config may name. A config from elsewhere runs no code but theirs.
    Raises:
        FileNotFoundError: no config.json or model.safetensors in the folder.
        ConfigError: a format, class path or argument that is not accepted, or weights that do not fit the config.
    """
    from safetensors.torch import load as from_bytes

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
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG}: not a medvl config.json ({type(error).__name__}: {error})") from error
    model = DualEncoder(**{name: build(specs[name], base, trust) for name, base in PARTS.items()})  # type: ignore[arg-type]
    weights = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != expected_hash:
        raise ConfigError(
            f"{folder}: {WEIGHTS} is not the file that {CONFIG} was written for (sha256 differs); one of the two was replaced"
        )
    try:
        model.load_state_dict(from_bytes(weights), strict=True)
    except RuntimeError as error:
        raise ConfigError(f"{folder}: the weights do not fit the config: {textwrap.shorten(str(error), 300)}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def build(spec: Any, base: type[T], trust: Sequence[str] = TRUSTED_PACKAGES) -> T:
    """Make the object that a ``{class_path, init_args}`` describes.

    Raises:
        ConfigError: a class path outside ``trust``, one that names no subclass of ``base``, or arguments it does not take.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str) or not isinstance(spec.get("init_args", {}), dict):
        raise ConfigError(f"expected {{class_path, init_args}} for a {base.__name__}, got {type(spec).__name__}")
    path: str = spec["class_path"]
    module_name, _, name = path.rpartition(".")
    if module_name.partition(".")[0] not in trust and module_name not in trust:
        raise ConfigError(f"class path {path!r} is outside the trusted packages {tuple(trust)}; pass trust=(...) if you trust it")
    try:
        kind = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"class path {path!r} names nothing that can be imported ({type(error).__name__})") from error
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise ConfigError(f"class path {path!r} is no {base.__name__}")
    arguments = {key: _built_argument(value, trust) for key, value in spec.get("init_args", {}).items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{path} does not take the arguments {sorted(arguments)}: {error}") from error


def _built_argument(value: Any, trust: Sequence[str]) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return build(value, Configurable, trust)
    if isinstance(value, list):
        return [_built_argument(item, trust) for item in value]
    return value


def join(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """Features of several batches as one.

    Raises:
        ValueError: no batch at all.
    """
    if not parts:
        raise ValueError("no images were given")

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("tokens", "token_valid", "slices", "slice_weights", "slice_valid")
    return ImageFeatures(pooled=torch.cat([part.pooled for part in parts]), grid=parts[0].grid, **{name: cat(name) for name in names})


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside ``path``, flush to disk, rename: readers see the old file or the new, never half of one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
