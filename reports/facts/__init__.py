"""What a report says: which finding is present, absent or uncertain, where, how severe, and whether it changed."""

from reports.facts.extract import LexiconFacts
from reports.facts.statements import FactSource, StatedSentence, Statement

__all__ = ["FactSource", "LexiconFacts", "StatedSentence", "Statement"]
