"""Metrics and their intervals: ranking, probabilities, decisions, maps, retrieval; thresholds, calibration and conformal sets."""

from medvl.metrics.bootstrap import (
    MACRO,
    Interval,
    PatientIds,
    Resamples,
    Statistic,
    bootstrap_interval,
    bootstrap_intervals,
    bootstrap_resamples,
    combined,
    mean_intervals,
    mean_statistic,
)
from medvl.metrics.calibration import Calibrator, Isotonic, Platt, Temperature, calibrator_from_dict
from medvl.metrics.classification import (
    ClassificationTable,
    Macro,
    brier_statistic,
    calibration_error_statistic,
    classification_table,
    f1_statistic,
    mcc_statistic,
    sensitivity_statistic,
    specificity_statistic,
)
from medvl.metrics.conformal import (
    ABSTAIN,
    ConformalBinary,
    abstention_statistic,
    coverage_statistic,
    decided_accuracy_statistic,
    decisions,
)
from medvl.metrics.delong import DeLongInterval, DeLongTest, delong_covariance, delong_interval, delong_test
from medvl.metrics.labels import LabelCounts, label_counts
from medvl.metrics.maps import contrast_to_noise, peak, pointing_game, tied_peaks
from medvl.metrics.paired import Comparison, compare_models
from medvl.metrics.ranking import auprc_statistic, auroc, auroc_intervals, auroc_statistic
from medvl.metrics.retrieval import Retrieval, chance_of_a_hit, recall_at_k
from medvl.metrics.subgroups import Difference, Gap, Subgroup, SubgroupTable, subgroup_table
from medvl.metrics.thresholds import Threshold, choose_threshold

__all__ = [
    "ABSTAIN",
    "MACRO",
    "Calibrator",
    "ClassificationTable",
    "Comparison",
    "ConformalBinary",
    "DeLongInterval",
    "DeLongTest",
    "Difference",
    "Gap",
    "Interval",
    "Isotonic",
    "LabelCounts",
    "Macro",
    "PatientIds",
    "Platt",
    "Resamples",
    "Retrieval",
    "Statistic",
    "Subgroup",
    "SubgroupTable",
    "Temperature",
    "Threshold",
    "abstention_statistic",
    "auprc_statistic",
    "auroc",
    "auroc_intervals",
    "auroc_statistic",
    "bootstrap_interval",
    "bootstrap_intervals",
    "bootstrap_resamples",
    "brier_statistic",
    "calibration_error_statistic",
    "calibrator_from_dict",
    "chance_of_a_hit",
    "choose_threshold",
    "classification_table",
    "combined",
    "compare_models",
    "contrast_to_noise",
    "coverage_statistic",
    "decided_accuracy_statistic",
    "decisions",
    "delong_covariance",
    "delong_interval",
    "delong_test",
    "f1_statistic",
    "label_counts",
    "mcc_statistic",
    "mean_intervals",
    "mean_statistic",
    "peak",
    "pointing_game",
    "recall_at_k",
    "sensitivity_statistic",
    "specificity_statistic",
    "subgroup_table",
    "tied_peaks",
]
