"""Metrics and the intervals they share: ranking, pointing game, Recall@K, and the patient-level bootstrap."""

from medvl.metrics.bootstrap import (
    MACRO,
    Interval,
    PatientIds,
    Statistic,
    bootstrap_interval,
    bootstrap_intervals,
    combined,
    mean_intervals,
    mean_statistic,
)
from medvl.metrics.maps import contrast_to_noise, peak, pointing_game, tied_peaks
from medvl.metrics.ranking import auroc, auroc_intervals, auroc_statistic
from medvl.metrics.retrieval import Retrieval, recall_at_k

__all__ = [
    "MACRO",
    "Interval",
    "PatientIds",
    "Retrieval",
    "Statistic",
    "auroc",
    "auroc_intervals",
    "auroc_statistic",
    "bootstrap_interval",
    "bootstrap_intervals",
    "combined",
    "contrast_to_noise",
    "mean_intervals",
    "mean_statistic",
    "peak",
    "pointing_game",
    "recall_at_k",
    "tied_peaks",
]
