"""Images on a page: read once for the model and for the eye, drawn with or without a map, and put into the page as data."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from medvl.model import DualEncoder
from medvl.types import ImageFeatures, ImageSample
from tasks.grounding import native_maps, token_maps
from tasks.viewing import Shown, in_plane, shown, shown_slice


@dataclass(frozen=True)
class Drawn:
    """A map on one image: the picture it lies on, scores of its pixels, their peak, and what the picture is."""

    picture: Shown
    scores: NDArray[np.float32]
    peak: tuple[int, int] | None
    what: str


@dataclass(frozen=True)
class PageImage:
    """An image of the study, read for showing, with its features."""

    path: str
    sample: ImageSample
    features: ImageFeatures
    native: NDArray[np.float32]  # (H, W) of a film, (S, H, W) of a volume, 0 to 1
    orientation: tuple[str, str] | None  # of a film

    def drawn(self, scores: NDArray[np.float32], at: tuple[int, ...] | None) -> Drawn:
        """Scores of all its pixels on the film, or on the slice of the volume that the peak ``at`` lies in, else the middle one."""
        name = Path(self.path).name
        if self.sample.affine is None:
            return Drawn(Shown(self.native, self.orientation), scores, in_plane(at), name)
        cut, of_cut, place, level = shown_slice(self.native, scores, self.sample.affine, at)
        return Drawn(cut, of_cut, place, f"{name}, slice {level} from below")


@torch.inference_mode()
def page_image(model: DualEncoder, path: str) -> PageImage:
    sample = model.read(Path(path))
    features = model.encode_samples([sample])
    if sample.affine is not None:
        return PageImage(path, sample, features, model.reader.native(Path(path)).numpy(), None)
    film = shown(model.reader, Path(path))
    return PageImage(path, sample, features, film.pixels, film.orientation)


@torch.inference_mode()
def map_of(model: DualEncoder, image: PageImage, phrases: tuple[str, ...]) -> NDArray[np.float32]:
    """The highest token cosine with any of some phrases, on all pixels of the file; NaN where the model did not look."""
    grids = token_maps(model, image.features, phrases)[0].amax(0, keepdim=True)
    return native_maps(grids, image.sample.transform, image.features.extent, model.token_offset.get(grids.ndim - 1))[0]


def jpeg_uri(png: bytes) -> str:
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
