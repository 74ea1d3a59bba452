"""Zero-shot scores against a plain-Python computation from the features, and what a bad file may cost."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
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
    temperature, sharpness = (t.log.exp().item() for t in (model.similarity.token_temperature, model.similarity.sharpness))
    tokens = [cosine(t, text) for t, seen in zip(image.tokens[i].double().numpy(), image.token_valid[i], strict=True) if seen]
    return math.log(sum(math.exp(sharpness * c) for c in tokens) / len(tokens)) / sharpness / temperature


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


def test_only_unreadable_files_give_only_errors(model: Any, tiny: Any, tmp_path: Path) -> None:
    bank = encode_prompts(model, load_prompts(), ["edema"])
    other = copy(tiny.broken, tmp_path / "other.dcm", None)
    assert [r.ok for r in diagnose(model, [tiny.broken, other], bank)] == [False, False]


def copy(source: Path, target: Path, uid: str | None, cut: int = 0) -> Path:
    """A DICOM file under another StudyInstanceUID, ``cut`` bytes short."""
    shutil.copyfile(source, target)
    if uid is not None:
        dataset = pydicom.dcmread(target)
        dataset.StudyInstanceUID = uid
        dataset.save_as(target)
    if cut:
        target.write_bytes(target.read_bytes()[:-cut])
    return target


def test_images_of_one_study_are_one_result_with_the_mean_logit(model: Any, tiny: Any, tmp_path: Path) -> None:
    images = tiny.folder / "images"
    first, other, third = (
        copy(images / f"s{i:02d}.dcm", tmp_path / f"{i}.dcm", uid) for i, uid in ((0, "1.2.3"), (2, "1.2.4"), (4, "1.2.3"))
    )
    bank = encode_prompts(model, load_prompts(), ["edema", "lung_nodule"])
    files = [tiny.png, first, other, third, first, tiny.png]
    alone = [next(iter(diagnose(model, [file], bank))).findings for file in (first, third)]
    for batch_size in (1, 2, 3, 16):
        results = list(diagnose(model, files, bank, batch_size=batch_size))
        assert [r.paths for r in results] == [(str(tiny.png),), (str(first), str(third)), (str(other),)]
        assert [r.path for r in results] == [str(tiny.png), str(first), str(other)]
        assert all(r.ok and r.error is None for r in results)
        for name, got in results[1].findings.items():
            odds = [one[name] / (1 - one[name]) for one in alone]
            assert got == pytest.approx(1 / (1 + 1 / math.sqrt(odds[0] * odds[1])), abs=1e-5)  # mean logit = geometric mean of odds
            assert alone[0][name] != pytest.approx(alone[1][name], abs=1e-4)


def test_a_study_with_an_unreadable_image_is_scored_by_the_others_and_says_so(model: Any, tiny: Any, tmp_path: Path) -> None:
    good, cut = copy(tiny.dicom, tmp_path / "good.dcm", "1.2.3"), copy(tiny.dicom, tmp_path / "cut.dcm", "1.2.3", cut=500)
    bank = encode_prompts(model, load_prompts(), ["edema"])
    (both,), (alone,), (lost,) = (list(diagnose(model, files, bank)) for files in ([cut, good], [good], [cut]))
    assert both.paths == (str(cut), str(good)) and both.ok and both.findings == pytest.approx(alone.findings, abs=1e-6)
    assert both.error is not None and str(cut) in both.error and str(good) not in both.error and list(both.unreadable) == [str(cut)]
    assert not lost.ok and not lost.findings and lost.error is not None and str(cut) in lost.error


def test_warnings_of_a_study_of_several_name_their_file(model: Any, tiny: Any, tmp_path: Path) -> None:
    files = [copy(tiny.dicom, tmp_path / name, "1.2.3") for name in ("a.dcm", "b.dcm")]
    dataset = pydicom.dcmread(files[1])
    dataset.PresentationIntentType = "FOR PROCESSING"
    dataset.save_as(files[1])
    (result,) = diagnose(model, files, encode_prompts(model, load_prompts(), ["edema"]))
    assert [note for note in result.warnings if "FOR PROCESSING" in note and note.startswith(f"{files[1]}: ")]


def test_pixels_are_held_a_batch_at_a_time(model: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files, sizes = sorted((tiny.folder / "images").iterdir())[:7], []
    encode = type(model).encode_samples
    monkeypatch.setattr(type(model), "encode_samples", lambda self, samples: sizes.append(len(samples)) or encode(self, samples))
    results = diagnose(model, files, encode_prompts(model, load_prompts(), ["edema"]), batch_size=3)
    next(results)
    assert sizes == [3]
    assert len(list(results)) == 6 and sizes == [3, 3, 1]


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
