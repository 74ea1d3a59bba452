"""The demo's page: one HTML file that needs nothing else, for a reader who knows the images and not this program.

:class:`DemoPage` holds what is shown as plain values and pictures, a part for each kind of image; :func:`page_part` gathers a part from a
model and its predictions; ``page.html`` lays it out, with everything escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvl.model import DualEncoder
from medvl.types import TextSource
from reports.prompts import PromptSet, load_prompts
from reports.text_source import ReportSentences
from tasks.evaluation import Predictions
from tasks.page.content import WORDS, DemoPage, Part, write_page
from tasks.page.examples import choose_examples, galleries, queries
from tasks.page.measures import BINS, cards, distribution, finding_rows, macro_row, title_of, told

__all__ = ["BINS", "DemoPage", "Part", "choose_examples", "distribution", "page_part", "page_title", "told", "write_page"]


def page_title(modalities: tuple[str, ...]) -> str:
    """The page's heading."""
    seen = " and ".join({"xray": "chest radiographs", "ct": "chest CT"}[name] for name in modalities)
    return f"What the model sees in {seen} it was never trained on"


def page_part(
    *,
    modality: str,
    model: DualEncoder,
    predictions: Predictions,
    results: Mapping[str, Any],
    baseline: Mapping[str, Any],
    facts: Mapping[str, Any],
    prompts: PromptSet | None = None,
    source: TextSource | None = None,
) -> Part:
    """Gather what the page shows of one kind of image.

    Args:
        modality: ``xray`` or ``ct``.
        model: what made ``predictions``; draws the maps of the examples.
        predictions: of the held-out images.
        results: of :func:`tasks.evaluation.results`.
        baseline: ``macro_auroc`` and ``per_finding`` of the thumbnail baseline, AUROC or None.
        facts: how it was made, for the methods box; nested values are told in one line.
        prompts: that ``predictions`` were made with; the built-in ones unless told.
        source: that reports were split with; their sentences unless told.
    """
    prompts, source, words = prompts or load_prompts(), source or ReportSentences(), WORDS[modality]
    rows = finding_rows(predictions, results, baseline)
    return Part(
        words=words,
        cards=cards(results, baseline, rows, words),
        rows=rows,
        macro=macro_row(results, baseline),
        distributions=tuple(
            distribution(title_of(name), predictions.labels[:, j], predictions.scores[:, j])
            for j, name in enumerate(predictions.findings)
            if {0.0, 1.0} <= set(predictions.labels[:, j])
        ),
        galleries=galleries(model, predictions, prompts, source),
        queries=queries(model, predictions),
        methods=tuple((title_of(str(name)), told(value)) for name, value in facts.items()),
        rejected=len(predictions.rejected),
    )
