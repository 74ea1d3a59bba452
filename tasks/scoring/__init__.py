"""How similarities with prompts become a score for each finding: one scorer, every published rule.

A rule (:mod:`tasks.scoring.rules`) is data: where the prompts are from, how those of a class are pooled, what they are set against, and how
views and classes are joined. ``presets.yaml`` has one for each published system, and ``medvl``, ours.
"""

from __future__ import annotations

from tasks.scoring.presets import preset, preset_names
from tasks.scoring.rules import Rule
from tasks.scoring.scorer import Scorer

__all__ = ["Rule", "Scorer", "preset", "preset_names"]
