"""Zero-shot AUROC and retrieval on the validation studies while a model trains.

Shapes: B items, F findings, R reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from medvl.data.studies import words_of
from medvl.metrics import auroc_intervals, recall_at_k
from medvl.model import batches
from medvl.training.data import StudyDataModule
from medvl.training.module import AlignmentModule
from medvl.training.passes import encode_images
from medvl.training.validation import ValidationMeasure
from medvl.types import ImageFeatures, ImageSample
from reports.prompts import load_prompts
from tasks.retrieval import build_index, image_to_reports
from tasks.zero_shot import encode_prompts, score

RECALL = 10


class ZeroShot(ValidationMeasure):
    """``auroc`` (mean over findings) and ``recall_at_10`` (own report among the first 10 of all that are measured).

    In a recipe: ``trainer.callbacks: [{class_path: medvl.training.validation.MeasureValidation, init_args: {measure: {class_path:
    tasks.validation.ZeroShot}}}]``. Findings are the columns of the manifest that are present and absent somewhere in the validation split;
    prompts are those of `medvl diagnose`. Images come from the data's own cache.

    Args:
        max_studies: items measured, the first of the split; None: all.
        batch_size: items encoded at once.
    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, max_studies: int | None = None, batch_size: int = 32) -> None:
        if min(batch_size, 1 if max_studies is None else max_studies) < 1:
            raise ValueError(f"max_studies {max_studies}, batch_size {batch_size}: expected at least 1")
        self.max_studies, self.batch_size = max_studies, batch_size

    def measure(self, module: AlignmentModule, data: StudyDataModule) -> dict[str, tuple[float, int]]:
        """Metric -> value and items measured."""
        return measure(module, data, self.max_studies, self.batch_size)


@torch.inference_mode()
def measure(module: AlignmentModule, data: StudyDataModule, limit: int | None = None, batch_size: int = 32) -> dict[str, tuple[float, int]]:
    """Metric -> value and items measured, on the first ``limit`` items of the validation split."""
    val, model = data.sets["val"], module.dual_encoder(data.reader)
    items = val.items[:limit]
    rows, labels = [val.images[indices[0]] for indices in items], [val.labels(indices) for indices in items]
    names = [name for name in load_prompts().findings if {0, 1} <= {of.get(name) for of in labels}]
    texts = {row.study_id: data.texts.sourced(words_of(row)) for row in rows}
    said = [(study, tuple(dict.fromkeys(one.text for one in own))) for study, own in texts.items() if own]
    bank = encode_prompts(model, load_prompts(), names) if names else None
    index = build_index(model, said) if len(said) > 1 else None
    scores, similarity = [], []
    measured: list[list[int]] = []
    of_one_kind = (list(group) for _, group in groupby(items, lambda item: val.images[item[0]].modality))
    for part in (part for group in of_one_kind for part in batches(group, batch_size)):
        read = [(indices, samples) for indices in part if (samples := val.read(indices)[0])]
        if not read:
            continue
        measured += [indices for indices, _ in read]
        features = _features(module, data, [samples for _, samples in read])
        if bank is not None:
            scores.append(score(model, features, bank).float().cpu().numpy())
        if index is not None:
            similarity.append(image_to_reports(model, features, index)[0].double().cpu().numpy())
    found: dict[str, tuple[float, int]] = {}
    if not measured:
        return found
    rows = [val.images[indices[0]] for indices in measured]
    patients = [row.patient_id for row in rows]
    if bank is not None:
        truth = np.array([[val.labels(indices).get(name, np.nan) for name in names] for indices in measured], dtype=np.float64)
        areas = auroc_intervals(truth, np.concatenate(scores), names, patients, repeats=0)
        found["auroc"] = (float(np.nanmean([areas[name].value for name in names])), len(measured))
    if index is not None:
        own = np.array([[row.study_id == study for study, _ in said] for row in rows])
        kept = np.flatnonzero(own.any(axis=1))  # those that have a report
        values = np.round(np.concatenate(similarity)[kept], 6)
        recall = recall_at_k(values, own[kept], (RECALL,), [patients[i] for i in kept], repeats=0)
        found[f"recall_at_{RECALL}"] = (recall.recall[RECALL].value, len(kept))
    return found


def _features(module: AlignmentModule, data: StudyDataModule, items: Sequence[Sequence[ImageSample]]) -> ImageFeatures:
    batch = data.reader.collate([one for samples in items for one in samples]).grouped([len(samples) for samples in items])
    return encode_images(module.image, batch.to(module.device), module.micro_batch)
