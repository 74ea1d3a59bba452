"""Contrastive losses with any number of positives, exact at any batch size."""

from medvl.losses.modules import LikenessInfoNCE, MultiPositiveInfoNCE, MultiPositiveSigmoid, Objective
from medvl.losses.objectives import (
    info_nce,
    info_nce_of_logits,
    likeness_info_nce,
    multi_positive_info_nce,
    sigmoid_loss,
    soft_target_loss,
)
from medvl.losses.pairs import Pairs, pairs_of
from medvl.losses.terms import (
    FalseTextContrast,
    FeatureMimic,
    ImageImageContrast,
    MultiLabelCodes,
    SentencePrototypes,
    Term,
    TermContext,
    TextTextContrast,
    UniformityAlignment,
)

__all__ = [
    "FalseTextContrast",
    "FeatureMimic",
    "ImageImageContrast",
    "LikenessInfoNCE",
    "MultiLabelCodes",
    "MultiPositiveInfoNCE",
    "MultiPositiveSigmoid",
    "Objective",
    "Pairs",
    "SentencePrototypes",
    "Term",
    "TermContext",
    "TextTextContrast",
    "UniformityAlignment",
    "info_nce",
    "info_nce_of_logits",
    "likeness_info_nce",
    "multi_positive_info_nce",
    "pairs_of",
    "sigmoid_loss",
    "soft_target_loss",
]
