"""Pair building: which texts of a batch are true of which study, false of it, or neither; and the texts to train on beside sentences."""

from reports.pairs.builder import ReportPairs
from reports.pairs.captions import HierarchicalCaptions, LabelCaptions
from reports.pairs.mixing import MixedTexts, RewrittenTexts
from reports.pairs.negatives import HardNegatives
from reports.pairs.soft import SoftTargets

__all__ = ["HardNegatives", "HierarchicalCaptions", "LabelCaptions", "MixedTexts", "ReportPairs", "RewrittenTexts", "SoftTargets"]
