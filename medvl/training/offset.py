"""After training: where the tokens of the image tower look, from images and the texts that are true of them, without masks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from medvl.data.studies import StudyBatch
from medvl.model import DualEncoder, load, note_offset
from medvl.nn.offset import token_offsets
from medvl.nn.projector import ProjectedEncoder

PAIRS = 200
"""Pairs of an image and a text that are looked at: the median is then certain to a tenth of what single pairs scatter."""
TEXTS_AT_ONCE = 8
"""Of a batch, whose every text costs a backward pass."""
FEWEST = 30
"""Pairs below which nothing is said: single ones scatter by half a token."""
SECONDS = 300.0
"""After which no other batch is begun."""
log = logging.getLogger(__name__)


def measured_offset(model: DualEncoder, batches: Iterable[StudyBatch], pairs: int = PAIRS) -> dict[int, tuple[float, ...]]:
    """Axes of the grid -> median offset along each in voxels of the tower's grid.

    Of each batch a few texts are taken, each with the images that it is true of; batches go on until each kind of image that came has
    ``pairs`` pairs, there are no more, or time is up. A kind with fewer than ``FEWEST`` pairs has no offset.

    Raises:
        ValueError: no kind has enough pairs, or a tower whose tokens have no evidence.
    """
    found: dict[int, list[torch.Tensor]] = {}
    start = time.monotonic()
    for batch in batches:
        if time.monotonic() - start > SECONDS:
            break
        images = batch.images
        if images.others is not None or (images.study is not None and len(images.study.unique()) < len(images.study)):
            continue  # of one image for each item alone is it known which image a text is of
        axes = images.pixels.ndim - 2
        if sum(map(len, found.get(axes, []))) >= pairs:
            continue
        true = (batch if batch.missing is None else batch.without(batch.missing)).positives > 0
        texts = torch.nonzero(true.any(0)).flatten().tolist()[:TEXTS_AT_ONCE]
        if not texts:
            continue
        features = model.encode_text([batch.texts.texts[j] for j in texts])
        for row in torch.nonzero(true[:, texts].any(1)).flatten().tolist():  # one image at a time, whatever a training step would hold
            image = images.studies(row, row + 1).to(model.device)
            own = token_offsets(model.image, model.similarity, image, features, true[row : row + 1, texts])
            found.setdefault(axes, []).append(own.cpu())
    told: dict[int, tuple[float, ...]] = {}
    for axes, parts in found.items():
        offsets = torch.cat(parts).double()
        if bool((torch.isfinite(offsets).sum(0) >= FEWEST).all()):
            told[axes] = tuple(round(float(value), 3) for value in offsets.nanmedian(0).values)
    if not told:
        raise ValueError(f"fewer than {FEWEST} pairs of an image and a text of its own show evidence of tokens")
    return told


def write_offset(folder: Path, batches: Callable[[], Iterable[StudyBatch]], device: torch.device | str | None = None) -> None:
    """Measure the model of a run's folder and note it in its config.json; a model that cannot be measured is left as it is.

    A tower over features that are kept is not measured: the run has seen each image once on purpose, and this would show it some again.
    """
    try:
        model = load(folder, device=device)
        if any(isinstance(part, ProjectedEncoder) for part in model.image.modules()):
            return
        model.token_offset = measured_offset(model, batches())
        note_offset(model, folder)
    except Exception as error:  # a tower of someone's own may raise anything, and the run is done
        log.warning("where tokens look was not measured (%s): maps take them to look at their own cells", type(error).__name__)
