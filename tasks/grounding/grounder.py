"""From files and queries to token maps: one model, one way of making maps (:class:`MapSettings`), queries encoded once.

Shapes: B images, Q queries, M texts. A query is what is looked for: a phrase, or a finding by its prompts. Its map is at every token the
highest of its texts' maps: they are alternatives (a tube, a line, a pacemaker). What is contrasted with is taken off text by text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from medvl.model import DualEncoder
from medvl.nn.activations import early_affinity
from medvl.types import ImageBatch, ImageFeatures, ImageSample, join_texts
from reports.prompts import PromptSet
from tasks.grounding.crops import crop_maps
from tasks.grounding.maps import GridMaps, batch_extent, native_step_mm, token_mm
from tasks.grounding.refinements import against_general, mixed_by, resampled, smoothed
from tasks.grounding.settings import MapSettings
from tasks.grounding.shifts import shifted_maps
from tasks.grounding.sources import SourceError, source


@dataclass(frozen=True)
class Query:
    """What is looked for."""

    name: str  # the phrase, or the finding's id
    positive: tuple[str, ...]  # texts that say it
    negative: tuple[str, ...]  # texts that deny it
    kind: Literal["phrase", "finding"] = "phrase"


def phrase_query(phrase: str) -> Query:
    """A phrase as it stands.

    Raises:
        ValueError: an empty one.
    """
    if not phrase.strip():
        raise ValueError("grounding needs at least one phrase, and no empty one")
    return Query(phrase, (phrase,), (f"no {phrase}",))


def finding_query(name: str, prompts: PromptSet) -> Query:
    """A finding by its prompt pair.

    Raises:
        KeyError: no prompts for it.
    """
    pair = prompts.findings[name]
    return Query(name, tuple(pair.positive), tuple(pair.negative), "finding")


class Grounder:
    """Maps of a model for Q queries.

    Raises:
        ValueError: no query.
    """

    def __init__(self, model: DualEncoder, queries: Sequence[Query], settings: MapSettings | None = None) -> None:
        if not queries:
            raise ValueError("grounding needs at least one phrase, and no empty one")
        self.model, self.queries, self.settings = model, tuple(queries), settings or MapSettings()
        self.source = source(self.settings.source)
        self._column: dict[str, int] = {}
        for query in self.queries:
            for text in (*query.positive, *(query.negative if self.settings.negation else ())):
                self._column.setdefault(text, len(self._column))
        general = [self.settings.against] if self.settings.against else []
        texts = [*self._column, *general]
        self.texts = join_texts([model.encode_text(texts[start : start + 256]) for start in range(0, len(texts), 256)])

    def of_files(self, paths: Sequence[Path]) -> list[GridMaps]:
        """Maps of files, each read here.

        Raises:
            UnreadableImageError: a file that cannot be read.
        """
        return self.of_samples([self.model.read(path) for path in paths], paths)

    def of_samples(self, samples: Sequence[ImageSample], paths: Sequence[Path] | None = None) -> list[GridMaps]:
        """Maps of images that were read, as one batch.

        Args:
            paths: their files, which crops of a higher resolution are read from.
        Raises:
            SourceError: a model that the source cannot read.
            ValueError: images that the tower does not take, or crops without paths.
            NotImplementedError: crops with a reader of one resolution.
        """
        scores, extent = self._scores(samples)
        found = []
        for i, sample in enumerate(samples):
            own, step = scores[i], native_step_mm(sample)
            offset = self.model.token_offset.get(len(step))
            if self.settings.crops > 1:
                if paths is None:
                    raise ValueError("crops of a higher resolution are read from the image's file")
                own, offset = self._with_crops(own, sample, Path(paths[i]), extent, offset), None
            if self.settings.smoothing_mm > 0 or self.settings.finer > 1:
                size = token_mm(sample.transform, step, own.shape[1:], extent)
                own = smoothed(own, size, self.settings.smoothing_mm, self.settings.finer)
            found.append(GridMaps(own.float().cpu(), sample.transform, step, extent, offset, self.source.unit))
        return found

    def _scores(self, samples: Sequence[ImageSample]) -> tuple[Tensor, tuple[int, ...]]:
        """(B, Q, *grid) of whole images or crops, and the voxels that the grid covers."""
        batch = self.model.reader.collate(samples).to(self.model.device)
        maps, features = self._of_batch(batch)
        extent = batch_extent(samples, features)
        if self.settings.shifts > 1:
            cells = [size // count for size, count in zip(extent[-2:], maps.shape[-2:], strict=True)]
            if any(size % count for size, count in zip(extent[-2:], maps.shape[-2:], strict=True)) or min(cells) < self.settings.shifts:
                raise SourceError(
                    f"tokens of {extent[-2:]} pixels on {tuple(maps.shape[-2:])} cells cannot be parted {self.settings.shifts} times"
                )
            maps = shifted_maps(batch, cells, self.settings.shifts, lambda moved: self._of_batch(moved)[0])
        return maps, extent

    def _of_batch(self, batch: ImageBatch) -> tuple[Tensor, ImageFeatures]:
        """(B, Q, *grid) as the tower gives them, and what it made of the batch."""
        settings = self.settings
        seen = self.source.see(self.model, batch)
        try:
            scores = self.source.scores(self.model, seen, self.texts)
        except SourceError:
            raise
        except ValueError as error:
            raise SourceError(str(error)) from error
        if settings.against:
            scores, general = scores[:, :-1], scores[:, -1:]
            scores = against_general(scores, general, ratio=self.source.unit != "cosine")
        maps = torch.stack([self._of_query(scores, query) for query in self.queries], 1)
        if settings.early > 0:
            grid = tuple(maps.shape[2:])
            affinity = early_affinity(lambda: self.model.image(batch), self.model.image, len(batch.pixels), grid)
            maps = (1 - settings.early) * maps + settings.early * mixed_by(maps, affinity)
        return maps, seen.features

    def _of_query(self, scores: Tensor, query: Query) -> Tensor:
        found = scores[:, [self._column[text] for text in query.positive]].amax(1)
        if self.settings.negation:
            found = found - scores[:, [self._column[text] for text in query.negative]].amax(1)
        return found

    def _with_crops(self, whole: Tensor, sample: ImageSample, path: Path, extent: Sequence[int], offset: Sequence[float] | None) -> Tensor:
        """The mean of the whole image's map and that of crops, on the crops' grid; of both each token's score lies where it looks."""
        factor = self.settings.crops
        if tuple(extent[-2:]) != tuple(sample.pixels.shape[-2:]):
            raise SourceError(f"the tower's tokens reach beyond its image ({tuple(extent[-2:])} pixels), so crops do not lie on its grid")
        enlarged = self.model.reader.enlarged(factor, path).read(path)
        side, tokens = sample.pixels.shape[-2:], whole.shape[-2:]  # of the grid as it is after shifts
        crops = crop_maps(enlarged, side, tokens, lambda parts: self._scores(parts)[0])
        cells = [size / count for size, count in zip(extent, whole.shape[1:], strict=True)]
        shift = [0.0] * len(cells) if offset is None else [away / cell for away, cell in zip(offset, cells, strict=True)]
        parts = [1] * (len(cells) - 2) + [factor, factor]
        coarse = resampled(whole, parts, shift)
        fine = resampled(crops.to(coarse.device), [1] * len(cells), shift)
        if fine.ndim == 4 and fine.shape[1] < coarse.shape[1]:  # the whole is padded to the longest of its batch
            fine = F.pad(fine, (0, 0, 0, 0, 0, coarse.shape[1] - fine.shape[1]), value=torch.nan)
        return torch.where(torch.isfinite(fine), (coarse + fine) / 2, coarse)
