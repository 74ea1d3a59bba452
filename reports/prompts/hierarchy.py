"""Labels scored by the kinds that they divide into (CHiLS): "lung opacity" is likely where one of its kinds is.

Letters: F labels, K kinds. Scores are in [0, 1]; leading axes, such as the studies, are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reports.prompts.registry import PromptSet


def kinds_of(prompts: PromptSet, labels: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """What the labels divide into, and which kind is whose: K names and a (F, K) mask for :func:`roll_up`.

    Kinds at every depth count; a kind may have several labels above it, and a label may be a kind of another.
    """
    below = [tuple(prompts.subset([label], with_children=True).findings)[1:] for label in labels]
    names = tuple(dict.fromkeys(kind for kinds in below for kind in kinds))
    mask = np.array([[name in kinds for name in names] for kinds in below], dtype=bool)
    return names, mask.reshape(len(labels), len(names))


def roll_up(
    labels: NDArray[np.floating], kinds: NDArray[np.floating], mask: NDArray[np.bool_], *, reweight: bool = True
) -> NDArray[np.float64]:
    """Scores of labels from their own and those of their kinds.

    The score of label f is label_f * max(label_f, max of kind_k over the kinds of f): each kind is weighted by its label, and the
    label's own name is one of its kinds. CHiLS (arXiv:2302.02551) takes both from softmaxes over all classes and answers with the label
    of the best product; here a score is of each finding by itself, so that several labels can be true.

    Args:
        labels: (..., F).
        kinds: (..., K).
        mask: (F, K), True where k is a kind of f.
        reweight: False takes the maximum alone, without the weight of the label.
    Returns:
        (..., F).
    Raises:
        ValueError: shapes that do not fit, or a score outside [0, 1].
    """
    labels, kinds = np.asarray(labels, dtype=np.float64), np.asarray(kinds, dtype=np.float64)
    if labels.shape[:-1] != kinds.shape[:-1] or mask.shape != (labels.shape[-1], kinds.shape[-1]):
        raise ValueError(
            f"labels {labels.shape} and kinds {kinds.shape} do not fit a mask of {mask.shape}, expected (..., F), (..., K), (F, K)"
        )
    for name, scores in (("label", labels), ("kind", kinds)):
        if np.any((scores < 0) | (scores > 1)):
            raise ValueError(f"a {name} has the score {scores[(scores < 0) | (scores > 1)][0]:g}, expected 0 to 1")
    of_kinds = np.where(mask, kinds[..., None, :], -np.inf).max(axis=-1, initial=-np.inf)  # (..., F)
    best = np.maximum(labels, of_kinds)
    return labels * best if reweight else best
