"""What of a report is trained on: a text source per policy."""

from __future__ import annotations

from medvl.types import TextSource
from reports.sentences import report_sentences


class ReportSentences(TextSource):
    """The sentences of findings and impression, each a text of its own.

    Args:
        max_characters: longer sentences are cut at a word; keeps one run-on dictation from filling the text tower.
    """

    def __init__(self, max_characters: int = 600) -> None:
        if max_characters < 1:
            raise ValueError(f"max_characters is {max_characters}, expected at least 1")
        self.max_characters = max_characters

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """The different sentences in their order; empty if there is none with content."""
        sentences = report_sentences(report, findings, impression)
        cut = (s if len(s) <= self.max_characters else s[: self.max_characters].rsplit(" ", 1)[0] for s in sentences)
        return tuple(dict.fromkeys(cut))
