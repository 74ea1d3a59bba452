"""Whether the frozen sentence encoder can carry a prompt at all: probes fitted to training sentences alone, asked about the prompts.

The probes are scikit-learn's and see no image. A prompt that they read as its opposite no image tower can score.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from medvl.types import FINDINGS, Fact
from reports import MiniLmReportEncoder
from reports.prompts import load_prompts
from reports.synthetic import labelled_sentences

SIDELESS = {"cardiomegaly", "edema", "emphysema"}
LOCATIONS = {
    "consolidation": ["upper lobe", "lower lobe"],
    "pneumothorax": ["apex"],
    "lung_nodule": ["upper zone", "lower zone"],
    "atelectasis": ["upper lobe", "lower lobe"],
    "rib_fracture": ["lateral seventh rib", "posterior fourth to sixth ribs"],
}
KINDS = ["pacemaker", "central venous catheter", "endotracheal tube", "nasogastric tube", "chest tube"]


def training_sentences() -> tuple[list[str], NDArray[np.int64], NDArray[np.float64]]:
    """Sentences, labels (2 f absent, 2 f + 1 present) and weights that count finding and state alike."""
    texts: dict[str, int] = {}
    for f, finding in enumerate(FINDINGS):
        for state, side, location, kind, severity in product(
            ("absent", "present"),
            (None,) if finding in SIDELESS else ("left", "right"),
            LOCATIONS.get(finding, [None]),
            KINDS if finding == "support_device" else [None],
            ("mild", "severe"),
        ):
            fact = Fact(finding, state, side, location, severity, 8.0 if finding == "lung_nodule" else None, kind)  # type: ignore[arg-type]
            texts.update(dict.fromkeys(labelled_sentences([fact])[finding], 2 * f + (state == "present")))
    labels = np.array(list(texts.values()))
    weights = 1 / np.bincount(labels)[labels]
    return list(texts), labels, weights / weights.mean()


@pytest.fixture(scope="module")
def encoder() -> MiniLmReportEncoder:
    return MiniLmReportEncoder(embed_dim=8)


@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_probes_read_the_prompts_of_every_finding(encoder: MiniLmReportEncoder, kind: str) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    texts, labels, weights = training_sentences()
    x = encoder.trunk_embeddings(texts).numpy()
    prompts = load_prompts()
    pairs = [(f, prompts.findings[name]) for f, name in enumerate(FINDINGS)]
    asked = [(s, 2 * f + state) for f, pair in pairs for state, group in enumerate((pair.negative, pair.positive)) for s in group]
    wanted = np.array([label for _, label in asked])
    if kind == "linear":
        probe = LogisticRegression(C=30, max_iter=400, tol=1e-3).fit(x, labels, sample_weight=weights)
    else:
        rows = np.repeat(np.arange(len(x)), np.maximum(1, np.round(3 * weights)).astype(int))
        probe = MLPClassifier((256,), max_iter=40, random_state=0).fit(x[rows], labels[rows])
    scores = probe.predict_proba(encoder.trunk_embeddings([s for s, _ in asked]).numpy())
    own, opposite = scores[np.arange(len(asked)), wanted], scores[np.arange(len(asked)), wanted ^ 1]
    wrong = [s for (s, _), good in zip(asked, scores.argmax(1) == wanted, strict=True) if not good]
    assert np.mean(scores.argmax(1) == wanted) > 0.95, wrong
    assert np.mean(own > opposite) > 0.95
    for f in range(len(FINDINGS)):  # what zero-shot uses: the mean over the prompts of a finding
        own_prompts = wanted // 2 == f
        assert np.mean(own[own_prompts]) > 2 * np.mean(opposite[own_prompts]), FINDINGS[f]
    phrases = probe.predict(encoder.trunk_embeddings([p.phrase for p in prompts.findings.values()]).numpy())
    assert list(phrases) == [2 * f + 1 for f in range(len(FINDINGS))]
