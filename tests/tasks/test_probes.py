"""Probes: figures against scikit-learn of plain scores, corruptions that do what they say, and the command with a bad file."""

import csv
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import somersd
from sklearn.metrics import roc_auc_score

import medvl
from medvl.data.manifest import StudyImage, read_manifest
from medvl.metrics import Interval
from reports.prompts import load_prompts
from tasks.cli import cli
from tasks.corruptions import CORRUPTIONS, SEVERITIES, TURNS, VOLUME_CORRUPTIONS
from tasks.page.probes import write_probes
from tasks.probes import (
    Probe,
    Read,
    _corrupted,
    _Natives,
    flipped,
    laterality,
    negation,
    orientation,
    read,
    severities_of,
    severity,
    sides_of,
    usable,
    wording,
)
from tasks.zero_shot import PromptBank, encode_prompts, pair_logits


@pytest.fixture(scope="module")
def loaded(tiny):
    model = medvl.load(tiny.model, device="cpu")
    rows = [row for row in read_manifest(tiny.manifest, strict=False).rows if row.modality == "xray"]
    return model, read(model, rows), load_prompts()


def test_negation_is_the_area_under_each_side_alone(loaded):
    model, data, prompts = loaded
    names = usable(data, prompts)
    found = {(one.name, one.setting): one.figure for one in negation(model, data, encode_prompts(model, prompts, names), repeats=20)}
    features = model.encode_image([row.path for row in data.rows])
    for name in names:
        known = [i for i, row in enumerate(data.rows) if row.labels.get(name) in (0, 1)]
        truth = np.array([data.rows[i].labels[name] for i in known])
        plus, minus = (
            model.similarity(features, model.encode_text(side)).detach().double().mean(1).numpy()[known]
            for side in (prompts.findings[name].positive, prompts.findings[name].negative)
        )
        for setting, label, score in (
            ("prompts for", truth, plus),
            ("prompts against, of absence", 1 - truth, minus),
            ("contrast", truth, plus - minus),
        ):
            assert found[name, setting].value == pytest.approx(roc_auc_score(label, score.round(6)), abs=0.02)
            assert found[name, setting].n == len(known)
    means = {setting: np.mean([found[name, setting].value for name in names]) for setting in ("prompts for", "contrast")}
    for setting, mean in means.items():
        assert found["mean", setting].value == pytest.approx(mean)


def test_wording_has_a_figure_for_each_prompt(loaded):
    model, data, prompts = loaded
    names = usable(data, prompts)[:1]
    found = list(wording(model, data, prompts, names, repeats=0))
    assert [one.setting for one in found] == [f"prompt {k + 1} of {len(found)}" for k in range(len(prompts.findings[names[0]].positive))]


def test_sides_are_those_that_reports_name_alone(loaded):
    from dataclasses import replace

    row = loaded[1].rows[0]
    said = {
        "Small left pleural effusion. No right pleural effusion.": {"pleural_effusion": "left"},
        "Bilateral pleural effusions.": {"pleural_effusion": "bilateral"},
        "Left pleural effusion. Right pleural effusion.": {},
        "Pleural effusion.": {},
        "No left pleural effusion.": {},
    }
    for text, sides in said.items():
        (found,) = sides_of([replace(row, report=text, findings=None, impression=None)])
        assert {name: side for name, side in found.items() if name == "pleural_effusion"} == sides, text


def test_a_model_that_looks_at_sides_follows_a_flip(loaded):
    """Scores that are made of the two halves of the picture themselves."""
    from dataclasses import replace
    from types import SimpleNamespace

    import torch

    _, data, prompts = loaded
    rows = [
        replace(data.rows[i], report=f"{side} pleural effusion.", findings=None, impression=None)
        for i, side in enumerate(["Left", "Right"] * 3)
    ]
    samples = []
    for i, row in enumerate(rows):
        pixels = torch.zeros(1, 64, 64)
        pixels[..., 40:60] = 1.0  # the patient's left lies at the right of the picture
        sample = replace(data.samples[i], pixels=pixels if row.report.startswith("Left") else pixels.flip(-1))
        samples.append(sample)
    halves = SimpleNamespace(
        encode_text=lambda texts: ["left" in text for text in texts],
        encode_samples=lambda part: torch.stack([one.pixels[0] for one in part]),
        similarity=lambda images, left: torch.stack(
            [images[..., 32:].mean((1, 2)) if one else images[..., :32].mean((1, 2)) for one in left], 1
        ),
    )
    found = {
        one.setting: one.figure
        for one in laterality(halves, replace(data, rows=tuple(rows), samples=tuple(samples)), prompts, ["pleural_effusion"], 0)
    }
    assert found["AUROC of left against right"].value == 1 and found["follows a flip"].value == 1 and found["follows a flip"].n == 6


def test_corruptions_grow_and_keep_to_the_range():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :80]
    image = (0.5 + 0.3 * np.sin(x / 5) * np.cos(y / 7) + 0.1 * rng.random((96, 80))).astype(np.float32).clip(0, 1)
    for name, corrupt in CORRUPTIONS.items():
        changes = []
        for level in SEVERITIES:
            made = corrupt(image, level, np.random.default_rng(1))
            assert made.dtype == np.float32 and made.min() >= 0 and made.max() <= 1, name
            assert np.array_equal(made, corrupt(image, level, np.random.default_rng(1))), name
            if name == "crop":
                changes.append(1 - made.size / image.size)
            else:
                assert made.shape == image.shape
                changes.append(float(np.abs(made - image).mean()))
        assert changes[0] > 0 and changes == sorted(changes), (name, changes)
    blurred = CORRUPTIONS["contrast"](image, 5, rng)
    assert blurred.std() == pytest.approx(0.2 * image.std(), rel=1e-3)


def test_a_flip_is_left_to_right(loaded):
    sample = loaded[1].samples[0]
    turned = flipped(sample)
    assert np.array_equal(turned.pixels.numpy()[..., ::-1], sample.pixels.numpy())
    assert np.array_equal(turned.valid.numpy()[..., ::-1], sample.valid.numpy())


def test_the_command_writes_tables_and_a_page_and_a_bad_file_costs_itself(tiny, tmp_path):
    folder = shutil.copytree(tiny.folder, tmp_path / "studies")
    (folder / "images" / "s03.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    args = ["probe", "--model", str(tiny.model), "--manifest", str(folder / "manifest.csv"), "--split", "all", "--repeats", "10"]
    done = CliRunner().invoke(cli, [*args, "--out", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    with (tmp_path / "out" / "rejected.csv").open() as file:
        assert "s03.png" in next(csv.DictReader(file))["path"]
    told = json.loads((tmp_path / "out" / "probes.json").read_text())
    assert told["images"] == 25 and told["notice"] == "research use, not for diagnosis"
    corrupted = [one for one in told["probes"] if one["probe"] == "corruption"]
    assert len(corrupted) == 1 + len(CORRUPTIONS) * len(SEVERITIES) and all(one["n"] == 25 for one in corrupted)
    page = (tmp_path / "out" / "probes.html").read_text()
    assert "esearch use" in page and page.count("<svg") == len(CORRUPTIONS) and "http" not in page
    wrong = CliRunner().invoke(
        cli, [*args[:3], "--manifest", str(folder / "manifest.csv"), "--modality", "ct", "--out", str(tmp_path / "ct")]
    )
    assert wrong.exit_code == 2


@pytest.mark.parametrize(("values", "lowest"), [([0.9, 0.7, 0.5], 0.4), ([0.8, 0.3, 0.1], 0.0)])
def test_a_curve_has_its_values_at_their_heights_however_low(tmp_path, values, lowest):
    def of(name, setting, value):
        return Probe("corruption", name, setting, Interval(value, value, value, 9, 9))

    page = write_probes(tmp_path / "p.html", [of("none", "0", values[0]), *(of("blur", str(i), values[i]) for i in (1, 2))], {})
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', page.read_text())]
    np.testing.assert_allclose(heights, [118 * (1 - (value - lowest) / (1 - lowest)) + 12 for value in values], atol=0.06)


class Planted:
    """Tower and similarity in one: an image is the number in its first pixel; texts are 1, and "severe" is twice what "mild" is."""

    def __init__(self, numbers):
        self.numbers = np.asarray(numbers, dtype=float)

    def similarity(self, images, texts):
        return torch.outer(images, texts)

    def encode_samples(self, samples):
        return torch.tensor([self.numbers[one] for one in samples], dtype=torch.float64)

    def encode_text(self, texts):
        return torch.tensor([2.0 if "severe" in text else 1.0 for text in texts], dtype=torch.float64)


def test_severity_is_the_concordance_of_score_and_stated_severity(monkeypatch):
    """Against Somers' D of scipy, with a score that is severity and noise; a finding with too few has no figure, and its n."""
    rng = np.random.default_rng(4)
    words = [("mild", "moderate", "severe")[i % 3] for i in range(60)]
    numbers = np.array([("mild", "moderate", "severe").index(word) for word in words]) + rng.normal(size=60)
    reports = [f"There is {word} cardiomegaly." + (" Small right pleural effusion." if i < 3 else "") for i, word in enumerate(words)]
    rows = [
        StudyImage(f"s{i}", f"p{i // 2}", "xray", Path(f"{i}.png"), None, "test", text, None, None, {"cardiomegaly": 1}, (), {}, i)
        for i, text in enumerate(reports)
    ]
    assert [own["cardiomegaly"] for own in severities_of(rows)] == words
    data = Read(tuple(rows), tuple(range(60)), ())
    names = ("cardiomegaly", "pleural_effusion")
    monkeypatch.setattr("tasks.probes.pair_logits", lambda model, images, bank: images[:, None].expand(-1, 2))
    bank = PromptBank(names, *[None] * 3)
    found = {(one.setting, one.name): one.figure for one in severity(Planted(numbers), data, load_prompts(), bank, 50)}
    levels = [("mild", "moderate", "severe").index(word) for word in words]
    expected = (somersd(levels, numbers.round(9)).statistic + 1) / 2
    for setting in ("score rises with severity", "severe against mild prompts"):
        assert found[setting, "cardiomegaly"].value == pytest.approx(expected, abs=1e-9)
        assert found[setting, "mean"].value == pytest.approx(expected, abs=1e-9)
        assert found[setting, "cardiomegaly"].ci_low < expected < found[setting, "cardiomegaly"].ci_high
        assert np.isnan(found[setting, "pleural_effusion"].value) and found[setting, "pleural_effusion"].n == 3


def test_films_are_turned_as_numpy_turns_them(loaded):
    image = np.arange(12, dtype=np.float32).reshape(3, 4) / 12
    assert np.array_equal(TURNS["by 180 degrees"](image), image[::-1, ::-1])
    assert np.array_equal(TURNS["mirrored left to right"](image), np.fliplr(image))
    assert np.array_equal(TURNS["mirrored top to bottom"](image), np.flipud(image))
    assert np.array_equal(TURNS["by 90 degrees, clockwise"](image), image.T[:, ::-1])
    assert np.array_equal(TURNS["by 90 degrees, counterclockwise"](image), image.T[::-1])
    model, data, prompts = loaded
    names = usable(data, prompts)
    bank = encode_prompts(model, prompts, names)
    found = {one.setting: one.figure.value for one in orientation(model, data, bank, repeats=5)}
    assert len(found) == 1 + len(TURNS)
    turned = [model.reader.read_array(np.fliplr(model.reader.native(row.path).numpy()).copy()) for row in data.rows]
    scores = pair_logits(model, model.encode_samples(turned), bank).double().numpy()
    truth = data.labels(names)
    areas = [roc_auc_score(truth[known, f], scores[known, f]) for f in range(len(names)) if (known := np.isin(truth[:, f], (0, 1))).any()]
    assert found["films mirrored left to right"] == pytest.approx(np.mean(areas), abs=0.01)


def test_corruptions_of_volumes_do_more_the_severer_they_are():
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(1, 12, 96, 100)).astype(np.float32)
    for name, corrupt in VOLUME_CORRUPTIONS.items():
        changes = []
        for level in SEVERITIES:
            made = corrupt(volume, level, np.random.default_rng(1))
            assert made.shape == volume.shape and made.dtype == np.float32, name
            changes.append(float(np.abs(made - volume).mean()))
        assert changes[0] > 0 and changes == sorted(changes), (name, changes)
    steps_in_height = np.broadcast_to(np.arange(12, dtype=np.float32)[None, :, None, None], volume.shape)
    for name in ("blur within slices", "rotation"):  # slices stay by themselves
        np.testing.assert_allclose(VOLUME_CORRUPTIONS[name](steps_in_height.copy(), 5, rng), steps_in_height, atol=1e-4)
    thick = VOLUME_CORRUPTIONS["thick slices"](volume, 2, rng)
    np.testing.assert_allclose(thick[:, 1:-1], (volume[:, :-2] + volume[:, 1:-1] + volume[:, 2:]) / 3, atol=1e-6)


def test_natives_are_read_anew_where_they_would_fill_memory(loaded, monkeypatch):
    model, data, _ = loaded
    reads = []
    native = model.reader.native
    monkeypatch.setattr(type(model.reader), "native", lambda self, path: reads.append(path) or native(path))
    for limit, expected in ((2**31, 3), (0, 6), (48 * 40 * 4, 5)):
        monkeypatch.setattr("tasks.probes.KEPT_BYTES", limit)
        reads.clear()
        films = _Natives(model, data.rows[:3])
        first, second = (list(films) for _ in range(2))
        assert len(reads) == expected and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class Padded:
    """What of a sample a corruption looks at."""

    pixels: torch.Tensor
    valid: torch.Tensor


def test_padding_of_a_volume_is_no_part_of_its_corruption():
    pixels = torch.randn(1, 6, 40, 40)
    pixels[:, 4:] = 1e6
    valid = torch.tensor([True] * 4 + [False] * 2)
    volume = Padded(pixels, valid)
    for corrupt in VOLUME_CORRUPTIONS.values():
        made = _corrupted(volume, corrupt, 5, np.random.default_rng(0))
        alone = corrupt(pixels[:, :4].numpy(), 5, np.random.default_rng(0))
        assert np.array_equal(made.pixels[:, :4].numpy(), alone) and (made.pixels[:, 4:] == 1e6).all()
