"""Several texts per study, each from a named source: report, impression, rewrites from a file, captions; sources are drawn by weight."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvl.types import SourcedText, StudyWords, TextSource

log = logging.getLogger(__name__)


class MixedTexts(TextSource):
    """The texts of several sources, each text with the name of its source.

    With ``sentences_per_image`` each draw first takes a source, by weight, of those that have texts of the study left; without, all texts
    of all sources are trained on, and weights do not matter. A text that two sources give is of the first.

    Args:
        sources: name -> source, in order of precedence.
        weights: name -> how often it is drawn from beside the others; 1 unless given, 0 leaves it out.
    Raises:
        ValueError: no source, a weight that names none or is below 0, or all weights 0.
    """

    def __init__(self, sources: dict[str, TextSource], weights: dict[str, float] | None = None) -> None:
        given = weights or {}
        if unknown := sorted(set(given) - set(sources)):
            raise ValueError(f"weights name {', '.join(unknown)}; the sources are {', '.join(sources) or 'none'}")
        self.sources, self.weights = sources, {name: float(given.get(name, 1.0)) for name in sources}
        if min(self.weights.values(), default=0.0) < 0 or not any(self.weights.values()):
            raise ValueError(f"weights of sources must be 0 or more, and one of them more, got {self.weights}")

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """The texts that the report alone gives, without provenance."""
        return tuple(one.text for one in self.sourced(StudyWords("", report, findings, impression)))

    def sourced(self, study: StudyWords) -> tuple[SourcedText, ...]:
        """The texts of every source that is not left out, each once."""
        found: dict[str, SourcedText] = {}
        for name, source in self.sources.items():
            weight = self.weights[name]
            for one in source.sourced(study) if weight else ():
                found.setdefault(one.text, SourcedText(one.text, name, weight))
        return tuple(found.values())


@dataclass(frozen=True)
class RejectedLine:
    """A line of a file that could not be used, and why; safe to show."""

    line: int
    reason: str


class RewrittenTexts(TextSource):
    """Texts written elsewhere (paraphrases, translations, summaries) of studies named by their id.

    The file is JSON Lines: ``{"study_id": "s1", "texts": ["...", "..."]}``; a study may come on several lines. Lines that are no such
    thing are counted, logged by number without their text, and kept in ``rejected``.

    Args:
        path: the file.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a single usable line.
    """

    def __init__(self, path: str) -> None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no file of rewritten texts {file}")
        self.rejected: list[RejectedLine] = []
        self.by_study: dict[str, dict[str, None]] = {}
        for study_id, texts in self._read(file):
            self.by_study.setdefault(study_id, {}).update(dict.fromkeys(texts))
        if not self.by_study:
            raise ValueError(f'{file}: no line reads {{"study_id": "...", "texts": ["..."]}}{_first(self.rejected)}')
        if self.rejected:
            log.warning("%s: %d lines left out%s", file, len(self.rejected), _first(self.rejected))

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """None: the texts are found by study, see :meth:`sourced`."""
        return ()

    def sourced(self, study: StudyWords) -> tuple[SourcedText, ...]:
        """What the file has for the study."""
        return tuple(SourcedText(text, "rewritten") for text in self.by_study.get(study.study_id, ()))

    def _read(self, file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    self.rejected.append(RejectedLine(number, "not JSON in UTF-8"))
                    continue
                reason = _fault(record)
                if reason:
                    self.rejected.append(RejectedLine(number, reason))
                else:
                    yield record["study_id"], tuple(text for given in record["texts"] if (text := " ".join(given.split())))


def _fault(record: Any) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("study_id"), str):
        return "expected an object with the text study_id"
    texts = record.get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return "expected texts to be a list of text"
    return None if any(text.strip() for text in texts) else "texts has no text"


def _first(rejected: list[RejectedLine]) -> str:
    return f" (first: line {rejected[0].line}, {rejected[0].reason})" if rejected else ""
