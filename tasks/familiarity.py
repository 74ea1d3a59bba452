"""What a model was not made for: by what the file's header says, and by where its features lie beside those of validation images.

Fitted by `medvl calibrate` for one kind of image, and kept beside the model as safetensors: mean and covariance of features, none of an
image alone. It belongs to the weights and the preprocessing, whatever the prompts. Both sources are told, neither drops a score.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from medvl.files import write_atomically
from medvl.metrics.familiarity import FEWEST, Gaussian, Limit, choose_limit, cross_fitted_distances
from medvl.types import RESEARCH_USE, ImageReader
from modalities.dicom import Stated, stated
from modalities.dicom.stated import FRONTAL, LATERAL, OF_THE_CHEST, PROJECTIONS
from tasks.zero_shot import Diagnosis

FOLDER, FORMAT = "familiarity", 1
QUANTILE = 0.99
RADIOGRAPHS = frozenset({"CR", "DX", "RG", "RF"})
SAYS_NOTHING = "OT"  # the modality of films that were scanned in, among much else


class FamiliarityError(ValueError):
    """A file that is damaged, or of another model than this one; or images that nothing can be fitted to."""


@dataclass(frozen=True)
class Familiarity:
    """How the images of one kind look to a model, and what their headers say.

    Args:
        weights_sha256, preprocessing_sha256: of the model that made the features.
        modality: ``xray`` or ``ct``.
        terms: element (``modality``, ``body_part``, ``projection``) -> term -> how many images of calibration have it.
        fitted_on: split, images, patients, manifest.
    """

    weights_sha256: str
    preprocessing_sha256: str
    modality: str
    gaussian: Gaussian
    limit: Limit
    terms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fitted_on: Mapping[str, Any] = field(default_factory=dict)

    def unlike(self, features: ArrayLike) -> list[str | None]:
        """Of each of (M, D) features why the image is unlike those of calibration; None where it is not."""
        told = f"{self.limit.inside} of {self.limit.count} lie within {self.limit.distance:.1f}"
        return [
            f"image unlike those of calibration: distance {distance:.1f}, {told}" if distance > self.limit.distance else None
            for distance in self.gaussian.distances(features)
        ]

    def to_bytes(self) -> bytes:
        """The same bytes for the same content; back with :func:`load_familiarity`."""
        from safetensors.numpy import save

        record = {
            "format": FORMAT,
            "notice": RESEARCH_USE,
            "weights_sha256": self.weights_sha256,
            "preprocessing_sha256": self.preprocessing_sha256,
            "modality": self.modality,
            "limit": {"distance": self.limit.distance, "inside": self.limit.inside, "count": self.limit.count},
            "terms": {element: dict(of) for element, of in self.terms.items()},
            "fitted_on": dict(self.fitted_on),
        }
        text = json.dumps(record, sort_keys=True, allow_nan=False)
        return bytes(save({"mean": self.gaussian.mean, "covariance": self.gaussian.covariance}, {"record": text}))

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.to_bytes())


def fit_familiarity(
    features: ArrayLike,
    patients: Sequence[str],
    terms: Mapping[str, Mapping[str, int]],
    *,
    weights_sha256: str,
    preprocessing_sha256: str,
    modality: str,
    quantile: float = QUANTILE,
    fitted_on: Mapping[str, Any] | None = None,
) -> Familiarity:
    """Fit to the (N, D) features of validation images; the limit is of distances that were cross-fitted by patient.

    All images of a patient count: their first alone would leave out whole kinds of views.

    Raises:
        FamiliarityError: fewer than ``FEWEST`` images, or all of one patient.
    """
    if len(patients) < FEWEST:
        raise FamiliarityError(f"{len(patients)} images: at least {FEWEST} are needed")
    try:
        limit = choose_limit(cross_fitted_distances(features, patients), quantile)
        gaussian = Gaussian.fit(features)
    except ValueError as error:
        raise FamiliarityError(str(error)) from error
    counted = {"images": len(patients), "patients": len(set(patients)), "quantile": quantile, **(fitted_on or {})}
    return Familiarity(weights_sha256, preprocessing_sha256, modality, gaussian, limit, terms, counted)


def place_of(model: Path, modality: str, decisions: Path | None = None) -> Path:
    """Where it lies: beside a model, or beside decisions that lie elsewhere."""
    return (
        model / FOLDER / f"{modality}.safetensors" if decisions is None else decisions.with_name(f"{decisions.stem}.{modality}.safetensors")
    )


def load_familiarity(path: Path, weights_sha256: str, preprocessing_sha256: str) -> Familiarity:
    """That of a file, for images that this model has encoded.

    Raises:
        FamiliarityError: a file that cannot be read as such, or that was fitted with other weights or another preprocessing.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        content = path.read_bytes()
        arrays = load(content)
        record = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["record"])
        if record["format"] != FORMAT:
            raise FamiliarityError(f"{path}: format {record['format']}, expected {FORMAT}")
        gaussian = Gaussian(*(arrays[name].astype(np.float64) for name in ("mean", "covariance")))
        terms = {element: {str(term): int(n) for term, n in of.items()} for element, of in record["terms"].items()}
        hashes = (record["weights_sha256"], record["preprocessing_sha256"], record["modality"])
        found = Familiarity(*hashes, gaussian, Limit(**record["limit"]), terms, record["fitted_on"])
    except FamiliarityError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise FamiliarityError(f"{path}: no images of calibration that `medvl calibrate` wrote ({type(error).__name__})") from error
    if (found.weights_sha256, found.preprocessing_sha256) != (weights_sha256, preprocessing_sha256):
        raise FamiliarityError(
            f"{path} was fitted with other weights or another preprocessing than this model's; run `medvl calibrate`, or delete the file"
        )
    return found


@dataclass(frozen=True)
class Familiar:
    """What images are held against: those of calibration where they are known, else the chest from the front.

    Args:
        reader: of the model; it knows which files an image is made of.
        several_views: the tower pools the films of a study, so that it was made for lateral ones too.
        known: kind of image -> what calibration made of it.
    """

    reader: ImageReader
    several_views: bool = False
    known: Mapping[str, Familiarity] = field(default_factory=dict)

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of what is known of each kind."""
        return tuple(hashlib.sha256(one.to_bytes()).hexdigest() for _, one in sorted(self.known.items()))

    def reasons(self, result: Diagnosis) -> tuple[tuple[str, str], ...]:
        """(path, reason) of what speaks against each image of a study that was read; the path is empty where it is of all together."""
        found = []
        for one in result.encoded:
            known = self.known.get(one.modality)
            for path in one.paths:
                terms = unlike_terms(
                    stated_of(self.reader, Path(path)), one.modality, {} if known is None else known.terms, self.several_views
                )
                found += [(path, term) for term in terms]
            if known is not None and (reason := known.unlike(one.appearance.numpy()[None])[0]):
                found.append((one.paths[0], reason) if len(one.paths) == 1 else ("", reason.replace("image", "study", 1)))
        return tuple(found)


def stated_of(reader: ImageReader, path: Path) -> Stated:
    """The terms in the header of a file, or of the first DICOM file of a folder."""
    if not path.is_dir():
        return stated(path)
    try:
        files = reader.sources(path) or ()
    except OSError:
        return Stated()
    return next((found for file in files if (found := stated(file)) != Stated()), Stated())


def unlike_terms(found: Stated, modality: str, terms: Mapping[str, Mapping[str, int]], several_views: bool = False) -> list[str]:
    """What a header says that those of calibration do not, and that is not of the chest from the front either.

    Posterior-anterior and anterior-posterior are one here. A term that is not known is no reason. Where neither headers nor table of the
    calibration name a view, it is to be frontal, or, of a tower that pools the films of a study, frontal or lateral.

    Args:
        terms: as of :class:`Familiarity`.
    """
    told = []
    parts = set(terms.get("body_part", ()))
    expected = parts | OF_THE_CHEST if not parts or parts & OF_THE_CHEST else parts
    if found.body_part is not None and found.body_part not in expected:
        told.append(f"body part {found.body_part}")
    if modality == "xray":
        if found.modality is not None and found.modality not in {*RADIOGRAPHS, SAYS_NOTHING, *terms.get("modality", ())}:
            told.append(f"modality {found.modality}")
        seen = set(terms.get("projection", ())) or {FRONTAL, *((LATERAL,) if several_views else ())}
        if found.projection is not None and found.projection not in seen:
            told.append(f"view {found.view}")
    return told


def terms_of(images: Iterable[tuple[Stated, str | None]]) -> dict[str, dict[str, int]]:
    """Element -> term -> how many images have it, of what their headers say and, before these, the view that their table names."""
    counts: dict[str, Counter[str]] = {"modality": Counter(), "body_part": Counter(), "projection": Counter()}
    for found, view in images:
        listed = PROJECTIONS.get((view or "").upper())
        for element, term in (("modality", found.modality), ("body_part", found.body_part), ("projection", listed or found.projection)):
            counts[element].update([term] if term else [])
    return {element: dict(sorted(of.items())) for element, of in counts.items() if of}
