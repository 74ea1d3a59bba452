"""Zero-shot scores against a plain-Python computation from the features, and what a bad file may cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medvl
from reports.prompts import load_prompts
from tasks.zero_shot import diagnose, encode_prompts, score


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return medvl.load(tiny.model, device="cpu")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def similarity(model: Any, image: Any, i: int, text: np.ndarray) -> float:
    """The logit of TokenSimilarity for one image and one text, from its published formula, in float64."""
    temperature, token_temperature = (t.log.exp().item() for t in (model.similarity.temperature, model.similarity.token_temperature))
    sharpness = model.similarity.log_sharpness.exp().item()
    pooled = cosine(image.pooled[i].double().numpy(), text) / temperature
    tokens = [cosine(t, text) for t, seen in zip(image.tokens[i].double().numpy(), image.token_valid[i], strict=True) if seen]
    soft_max = math.log(sum(math.exp(sharpness * c) for c in tokens) / len(tokens)) / sharpness / token_temperature
    return (pooled + soft_max) / 2


def test_score_is_the_pair_softmax_of_mean_similarities(model: Any, tiny: Any) -> None:
    prompts, names = load_prompts(), ["pneumothorax", "edema"]
    image = model.encode_image([tiny.dicom, tiny.png])
    got = score(model, image, encode_prompts(model, prompts, names))
    assert got.shape == (2, 2)
    for j, name in enumerate(names):
        pair = prompts.findings[name]
        sides = [[model.encode_text(text).pooled[0].double().numpy() for text in side] for side in (pair.positive, pair.negative)]
        for i in range(2):
            for_it, against = (np.mean([similarity(model, image, i, text) for text in side]) for side in sides)
            assert got[i, j].item() == pytest.approx(math.exp(for_it) / (math.exp(for_it) + math.exp(against)), abs=2e-5)


def test_batch_size_and_company_do_not_move_a_score(model: Any, tiny: Any) -> None:
    files = sorted((tiny.folder / "images").iterdir())[:7]
    bank = encode_prompts(model, load_prompts(), ["cardiomegaly", "lung_nodule"])
    together = [d.findings for d in diagnose(model, files, bank, batch_size=7)]
    apart = [d.findings for d in diagnose(model, files, bank, batch_size=1)]
    assert len({d["cardiomegaly"] for d in together}) == 7
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_an_unreadable_file_costs_only_itself_and_keeps_its_place(model: Any, tiny: Any, tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    bank = encode_prompts(model, load_prompts(), ["edema"])
    files = [tiny.png, tiny.broken, text, tmp_path / "absent.dcm", tiny.dicom]
    for batch_size in (1, 2, 5):
        results = list(diagnose(model, files, bank, batch_size=batch_size))
        assert [r.path for r in results] == [str(f) for f in files]
        assert [r.ok for r in results] == [True, False, False, False, True]
        assert all(r.error and r.path in r.error and not r.findings for r in results if not r.ok)
        alone = next(iter(diagnose(model, [tiny.dicom], bank)))
        assert results[-1].findings == pytest.approx(alone.findings, abs=1e-5)


def test_only_unreadable_files_give_only_errors(model: Any, tiny: Any) -> None:
    bank = encode_prompts(model, load_prompts(), ["edema"])
    assert [r.ok for r in diagnose(model, [tiny.broken, tiny.broken], bank)] == [False, False]


def test_unknown_finding_is_named(model: Any) -> None:
    with pytest.raises(KeyError, match=r"dragon_sign.*cardiomegaly"):
        encode_prompts(model, load_prompts(), ["edema", "dragon_sign"])


def test_prompt_weights_average_each_side(model: Any) -> None:
    prompts = load_prompts()
    bank = encode_prompts(model, prompts)
    assert bank.findings == tuple(prompts.findings)
    for weights in (bank.positive, bank.negative):
        torch.testing.assert_close(weights.sum(1), torch.ones(len(bank.findings)))
    assert not ((bank.positive > 0) & (bank.negative > 0)).any()
