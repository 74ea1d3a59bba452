"""Contrastive losses with any number of positives, exact at any batch size."""

from medvl.losses.modules import MultiPositiveInfoNCE, MultiPositiveSigmoid, Objective
from medvl.losses.objectives import info_nce, info_nce_of_logits, multi_positive_info_nce, sigmoid_loss, soft_target_loss
from medvl.losses.pairs import Pairs, pairs_of

__all__ = [
    "MultiPositiveInfoNCE",
    "MultiPositiveSigmoid",
    "Objective",
    "Pairs",
    "info_nce",
    "info_nce_of_logits",
    "multi_positive_info_nce",
    "pairs_of",
    "sigmoid_loss",
    "soft_target_loss",
]
