"""After training: where the tokens of the image tower look, from images and the texts that are true of them, without masks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from medvl.data.studies import StudyBatch
from medvl.model import CONFIG, DualEncoder, load, write_atomically
from medvl.nn.offset import token_offsets
from medvl.nn.projector import ProjectedEncoder

PAIRS = 200
"""Pairs of an image and a text that are looked at: the median is then certain to a tenth of what single pairs scatter."""
TEXTS_AT_ONCE = 8
"""Of a batch, whose every text costs a backward pass."""
SECONDS = 300.0
"""After which no other batch is begun."""
log = logging.getLogger(__name__)


def measured_offset(model: DualEncoder, batches: Iterable[StudyBatch], pairs: int = PAIRS) -> dict[int, tuple[float, ...]]:
    """Axes of the grid -> median offset along each in voxels of the tower's grid, over ``pairs`` pairs or as many as there are.

    Raises:
        ValueError: no pair of one image and a text, or a tower whose tokens have no evidence.
    """
    found: list[torch.Tensor] = []
    count, start = 0, time.monotonic()
    for batch in batches:
        images, true = batch.images, batch.positives > 0
        if images.others is not None or (images.study is not None and len(images.study.unique()) < len(images.study)):
            continue  # of one image for each item alone is it known which image a text is of
        chosen = torch.nonzero(true.any(0)).flatten().tolist()[:TEXTS_AT_ONCE]
        if not chosen:
            continue
        texts = model.encode_text([batch.texts.texts[j] for j in chosen])
        own = token_offsets(model.image, model.similarity, images.to(model.device), texts, true[:, chosen].to(model.device))
        found.append(own[torch.isfinite(own).all(1)].cpu())
        count += len(found[-1])
        if count >= pairs or time.monotonic() - start > SECONDS:
            break
    if not count:
        raise ValueError("no image with a text of its own shows evidence of its tokens")
    offsets = torch.cat(found).double()
    return {offsets.shape[1]: tuple(round(float(value), 3) for value in offsets.median(0).values)}


def write_offset(folder: Path, batches: Iterable[StudyBatch]) -> None:
    """Measure the model of a run's folder and note it in its config.json; a model that cannot be measured is left as it is.

    A tower over features that are kept is not measured: the run has seen each image once on purpose, and this would show it some again.
    """
    try:
        model = load(folder)
        if any(isinstance(part, ProjectedEncoder) for part in model.image.modules()):
            return
        model.token_offset = measured_offset(model, batches)
    except Exception as error:  # a tower of someone's own may raise anything, and the run is done
        log.warning("where tokens look was not measured (%s): maps take them to look at their own cells", type(error).__name__)
        return
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["token_offset"] = model.offset_record()
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2, allow_nan=False) + "\n").encode())
