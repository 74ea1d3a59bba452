"""How well towers match before training: which studies, which features, what the command says."""

import json

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import medvl
from medvl.data.manifest import read_manifest
from medvl.nn.match import debiased_linear_cka, mutual_neighbours
from medvl.nn.projector import ProjectedEncoder
from modalities.xray import ConvEncoder, TimmEncoder
from modalities.xray.extended import ExtendedEncoder
from reports import MiniLmReportEncoder
from reports.text_source import ReportSentences
from tasks.cli import cli
from tasks.matching import Pairs, chosen, image_trunk, match, paired_features, report_trunk, trained_towers


def recipe(tmp_path, image):
    written = {
        "model": {"image": image, "report": {"class_path": "reports.towers.MiniLmReportEncoder", "init_args": {"embed_dim": 8}}},
        "data": {"init_args": {"reader": {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 32}}}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


def test_one_study_of_each_patient_in_an_order_of_the_seed(tiny):
    rows = read_manifest(tiny.manifest, strict=False).select(modality="xray").rows
    found = chosen(rows, ReportSentences(), most=100)
    assert len({row.patient_id for row, _ in found}) == len(found) == 24 < len(rows)
    assert all(texts == ReportSentences().texts(row.report, row.findings, row.impression) for row, texts in found)
    names = [[row.study_id for row, _ in chosen(rows, ReportSentences(), 10, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and len(names[0]) == 10
    assert names[0] == [row.study_id for row, _ in chosen(rows[::-1], ReportSentences(), 10)], "whatever the order of the table"


def test_features_are_those_of_the_towers_without_layers_at_random():
    torch.manual_seed(0)
    inner = TimmEncoder("vit_tiny_patch16_224", 8, image_size=32).eval()
    batch = medvl.types.ImageBatch(torch.randn(3, 1, 32, 32))
    with torch.no_grad():
        expected = inner.backbone.forward_head(inner.backbone.forward_features(batch.pixels), pre_logits=True)
        assert torch.equal(image_trunk(inner, batch), expected)
        assert torch.equal(image_trunk(ProjectedEncoder(inner, 4), batch), expected)
        bare = TimmEncoder("vit_tiny_patch16_224", None, image_size=32).eval()
        assert torch.equal(image_trunk(ExtendedEncoder(bare, 1, 4), batch), bare(batch).pooled)
        conv = ConvEncoder(embed_dim=8, widths=(4, 4), blocks=(1, 1)).eval()
        assert torch.equal(image_trunk(conv, batch), conv(batch).pooled)
        report = MiniLmReportEncoder(8)
        assert torch.equal(report_trunk(report, ["no effusion"]), report.trunk_embeddings(["no effusion"]))


def test_features_are_row_by_row_of_the_same_study_and_bad_files_are_told(tiny):
    model = medvl.load(tiny.model, device="cpu")
    rows = read_manifest(tiny.manifest, strict=False).select(modality="xray").rows
    studies = chosen(rows, ReportSentences(), most=12)
    broken = (type(rows[0])(**{**rows[0].__dict__, "path": tiny.broken}), ("a text",))
    pairs = paired_features(trained_towers(model), [*studies[:5], broken, *studies[5:]], batch_size=4)
    assert [path for path, _ in pairs.rejected] == [str(tiny.broken)]
    assert len(pairs.image) == len(pairs.text) == 12
    for i in (0, 5, 11):
        row, texts = studies[i]
        np.testing.assert_allclose(pairs.image[i], model.encode_image(row.path).pooled[0].numpy(), rtol=1e-4, atol=1e-5)
        vectors = model.encode_text(texts).pooled.numpy()
        np.testing.assert_allclose(pairs.text[i], (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0), rtol=1e-4, atol=1e-5)


def test_the_command_gives_what_the_functions_give(tiny, tmp_path):
    config = recipe(
        tmp_path, {"class_path": "modalities.xray.ConvEncoder", "init_args": {"embed_dim": 8, "widths": [4, 4], "blocks": [1, 1]}}
    )
    torch.manual_seed(0)
    asked = ["match", "--manifest", str(tiny.manifest), "--split", "test", "--k", "3", "--json"]
    told = CliRunner().invoke(cli, [*asked, "--config", str(config)])
    assert told.exit_code in (0, 1), told.output
    result = json.loads(told.stdout)
    assert result["n"] == 22 and result["text_width"] == 384 and result["image_width"] == 8
    assert result["cka"]["ci_low"] < result["cka"]["value"] < result["cka"]["ci_high"]
    assert result["mutual_knn"]["chance"]["mean"] == pytest.approx(3 / 21, rel=0.2)
    run = json.loads(CliRunner().invoke(cli, [*asked, "--model", str(tiny.model), "--device", "cpu"]).stdout)
    rows = read_manifest(tiny.manifest, strict=False).select(modality="xray", split="test").rows
    pairs = paired_features(trained_towers(medvl.load(tiny.model, device="cpu")), chosen(rows, ReportSentences(), 2000))
    assert run["cka"]["value"] == pytest.approx(debiased_linear_cka(pairs.image, pairs.text), abs=1e-6)
    assert run["mutual_knn"]["value"] == pytest.approx(mutual_neighbours(pairs.image, pairs.text, 3).mean())
    shown = CliRunner().invoke(cli, [*asked[:-1], "--model", str(tiny.model), "--device", "cpu"])
    assert "22 studies, one of each patient" in shown.output and "mutual kNN, k = 3" in shown.output


def test_the_same_thing_seen_twice_matches_and_two_things_do_not():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(60, 12)).astype(np.float32)
    same = match(Pairs(one, (one @ np.linalg.qr(rng.normal(size=(12, 12)))[0]).astype(np.float32)), k=5)
    assert same["cka"]["value"] == pytest.approx(1) and same["mutual_knn"]["value"] == 1
    assert same["cka"]["chance"]["p_value"] == pytest.approx(1 / 201)
    other = match(Pairs(one, rng.normal(size=(60, 9)).astype(np.float32)), k=5)
    assert abs(other["cka"]["value"]) < 0.2 and other["cka"]["chance"]["p_value"] > 0.01
    with pytest.raises(ValueError, match="6 paired studies; expected at least 11"):
        match(Pairs(one[:6], one[:6]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the two"),
        (["--config", "x.yaml", "--model", "y"], "one of the two"),
        (["--config", "absent.yaml"], "no such file"),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny, options, message):
    told = CliRunner().invoke(cli, ["match", "--manifest", str(tiny.manifest), *options])
    assert told.exit_code == 2
    assert message in told.output


def test_a_recipe_without_towers_is_refused(tiny, tmp_path):
    (tmp_path / "r.yaml").write_text("trainer: {max_epochs: 1}\n")
    told = CliRunner().invoke(cli, ["match", "--manifest", str(tiny.manifest), "--config", str(tmp_path / "r.yaml")])
    assert told.exit_code == 2 and "expected model.image, model.report" in told.output
