"""Retrieval against a loop over reports and sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import medvl
from medvl.data.manifest import read_manifest
from reports.text_source import ReportSentences
from tasks.retrieval import build_index, image_to_reports, studies_of

STUDIES = [
    ("a", ("There is a nodule.", "No effusion.")),
    ("b", ("No effusion.",)),
    ("c", ("The heart is large.", "No effusion.", "There is a nodule.")),
    ("d", ("No effusion.",)),
]


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return medvl.load(tiny.model, device="cpu")


def test_an_image_scores_a_report_by_the_mean_of_its_sentences(model: Any, tiny: Any) -> None:
    index = build_index(model, STUDIES, batch_size=2)
    assert sorted(index.sentences) == sorted({s for _, sentences in STUDIES for s in sentences})
    image = model.encode_image(tiny.png)
    expected = [np.mean([model.similarity(image, model.encode_text(s)).item() for s in sentences]) for _, sentences in STUDIES]
    np.testing.assert_allclose(image_to_reports(model, image, index)[0][0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_index_does_not_move_a_score(model: Any, tiny: Any) -> None:
    image = model.encode_image(tiny.png)
    forward, backward = (
        dict(zip(index.study_ids, image_to_reports(model, image, index)[0][0].tolist(), strict=True))
        for index in (build_index(model, STUDIES), build_index(model, STUDIES[::-1]))
    )
    assert forward == pytest.approx(backward, abs=1e-5)


def test_what_cannot_be_indexed_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no report"):
        build_index(model, [])
    with pytest.raises(ValueError, match=r"1 studies have no sentence.*study y"):
        build_index(model, [("x", ("A sentence.",)), ("y", ())])


def test_a_study_comes_once_and_only_with_a_report(tiny: Any) -> None:
    rows = read_manifest(tiny.manifest).rows
    studies = studies_of([*rows, *rows], ReportSentences())
    assert [study for study, _ in studies] == [row.study_id for row in rows if row.modality == "xray"]
    assert all(sentences for _, sentences in studies)
