"""Retrieval against a loop over reports and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medvl
from medvl.data.manifest import read_manifest
from reports.text_source import ReportSentences
from tasks.retrieval import build_index, image_to_reports, search, studies_of

STUDIES = [
    ("a", ("There is a nodule.", "No effusion.")),
    ("b", ("No effusion.",)),
    ("c", ("The heart is large.", "No effusion.", "There is a nodule.")),
    ("d", ("No effusion.",)),
]


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return medvl.load(tiny.model, device="cpu")


def unit(x: torch.Tensor) -> np.ndarray:
    return (x / x.norm(dim=-1, keepdim=True)).double().numpy()


def test_an_image_scores_a_report_by_the_mean_of_its_sentences(model: Any, tiny: Any) -> None:
    index = build_index(model, STUDIES, batch_size=2)
    assert sorted(index.sentences) == sorted({s for _, sentences in STUDIES for s in sentences})
    image = model.encode_image(tiny.png)
    expected = [np.mean([model.similarity(image, model.encode_text(s)).item() for s in sentences]) for _, sentences in STUDIES]
    np.testing.assert_allclose(image_to_reports(model, image, index)[0][0].numpy(), expected, rtol=1e-4, atol=1e-4)
    hits = search(model, tiny.png, index, top=4)
    assert [hit.study_id for hit in hits if hit.study_id != "d"] == [
        STUDIES[i][0] for i in np.argsort(np.negative(np.round(expected, 4)), kind="stable") if STUDIES[i][0] != "d"
    ]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]


def test_a_text_scores_a_report_by_its_nearest_sentence(model: Any) -> None:
    index = build_index(model, STUDIES)
    query = "The heart is large."
    texts = {s: unit(model.encode_text(s).pooled)[0] for _, sentences in STUDIES for s in sentences}
    expected = {study: max(float(texts[query] @ texts[s]) for s in sentences) for study, sentences in STUDIES}
    hits = search(model, query, index, top=10)
    assert hits[0].study_id == "c" and hits[0].sentence == query and hits[0].score == pytest.approx(1, abs=1e-5)
    assert {hit.study_id: hit.score for hit in hits} == pytest.approx(expected, abs=1e-5)
    for hit in hits:
        assert hit.sentence in dict(STUDIES)[hit.study_id]
        assert float(texts[query] @ texts[hit.sentence]) == pytest.approx(hit.score, abs=1e-5)
    assert [hit.study_id for hit in hits if hit.study_id in "bd"] == ["b", "d"], "equal scores keep the order of the index"


def test_the_order_of_the_index_does_not_move_a_score(model: Any, tiny: Any) -> None:
    forward, backward = (
        {hit.study_id: hit.score for hit in search(model, tiny.png, build_index(model, studies), top=4)}
        for studies in (STUDIES, STUDIES[::-1])
    )
    assert forward == pytest.approx(backward, abs=1e-5)


def test_what_cannot_be_searched_is_refused(model: Any, tiny: Any) -> None:
    index = build_index(model, STUDIES)
    with pytest.raises(ValueError, match="empty"):
        search(model, "  ", index)
    with pytest.raises(ValueError, match="at least 1"):
        search(model, "a nodule", index, top=0)
    with pytest.raises(ValueError, match="no report"):
        build_index(model, [])
    with pytest.raises(ValueError, match=r"1 studies have no sentence.*study y"):
        build_index(model, [("x", ("A sentence.",)), ("y", ())])
    with pytest.raises(ValueError, match="broken"):
        search(model, Path(tiny.broken), index)


def test_a_study_comes_once_and_only_with_a_report(tiny: Any) -> None:
    rows = read_manifest(tiny.manifest).rows
    studies = studies_of([*rows, *rows], ReportSentences())
    assert [study for study, _ in studies] == [row.study_id for row in rows if row.modality == "xray"]
    assert all(sentences for _, sentences in studies)
