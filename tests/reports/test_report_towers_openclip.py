"""OpenClipReportEncoder over tiny folders in the form of open_clip: its own encode_text, tokens by words, a run without its source."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import medvl
from medvl.model import DualEncoder
from medvl.nn.similarity import PooledSimilarity
from medvl.types import TextBatch
from modalities.xray import ConvEncoder, XrayReader
from reports import OpenClipReportEncoder
from reports.towers.words import origins

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is in the extra 'open_clip'")

CONFIG = "open_clip_config.json"
TEXTS = ("No pleural effusion.", "The  heart\nis enlarged, 1.5 cm more than before; lungs clear", "x", "")
VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
NATIVE = {"context_length": 24, "width": 16, "heads": 2, "layers": 2}
INSIDE = {"hf_tokenizer_name": "some-lab/tokenizer", "hf_model_pretrained": False, "context_length": 20}
KINDS: dict[str, tuple[dict[str, Any], bool]] = {  # text_cfg, and whether the text side is a module of its own
    "clip": (NATIVE, False),
    "custom": ({**NATIVE, "proj_bias": True, "ls_init_value": 0.1}, True),
    "siglip": (
        {
            **NATIVE,
            "vocab_size": 40,
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
            "hf_tokenizer_name": "some-lab/tokenizer",
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
        True,
    ),
    "bert-cls": ({**INSIDE, "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"}, True),
    "bert-mean": ({**INSIDE, "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}, True),
    "bert-pooler": ({**INSIDE, "hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}, True),
}
OWN = 12
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heart", "is", "en", "##larg", "##ed", "no", "pleural", "effusion"]
WORDS += ["lungs", "clear", "cm", "more", "than", "before", "x", ".", ",", ";", "1", "5", "15"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a kind, with weights that matter."""
    root = tmp_path_factory.mktemp("openclip")
    for kind, (text, custom) in KINDS.items():
        folder = root / kind
        folder.mkdir()
        if "hf_tokenizer_name" in text:
            write_tokenizer(folder)
        if kind.startswith("bert"):
            text = {**text, "hf_model_name": str(write_bert(root / f"config-{kind}"))}
        config = {"embed_dim": OWN, "vision_cfg": VISION, "text_cfg": text, **({"custom_text": True} if custom else {})}
        (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", pretrained_hf=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return {kind: root / kind for kind in KINDS}


def write_tokenizer(folder: Path) -> None:
    from transformers import BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)


def write_bert(folder: Path) -> Path:
    from transformers import BertConfig

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **size).save_pretrained(folder)
    return folder


def theirs(folder: Path) -> tuple[Any, Any]:
    """The whole model and its tokenizer, as open_clip itself loads them."""
    return open_clip.create_model(f"local-dir:{folder}", pretrained_hf=False).eval(), open_clip.get_tokenizer(f"local-dir:{folder}")


def tower(folder: Path, **options: Any) -> OpenClipReportEncoder:
    torch.manual_seed(1)
    return OpenClipReportEncoder(str(folder), **options).eval()


def joined(report: OpenClipReportEncoder) -> DualEncoder:
    return DualEncoder(ConvEncoder(report.embed_dim, widths=(4, 4), blocks=(1, 1)), report, PooledSimilarity(), XrayReader(size=32)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_is_open_clips_encode_text(folders, kind):
    model, tokenizer = theirs(folders[kind])
    with torch.no_grad():
        expected = model.encode_text(tokenizer(list(TEXTS)))
    frozen, trained = tower(folders[kind]), tower(folders[kind], frozen=False)
    for _ in range(2):  # computed, then from the cache
        assert torch.equal(frozen(TextBatch(TEXTS)).pooled, expected)
    with torch.no_grad():
        assert torch.equal(trained(TextBatch(TEXTS)).pooled, expected)
    assert frozen.embed_dim == OWN and expected.std() > 0.01
    with torch.no_grad():
        unit = torch.nn.functional.normalize(model.encode_text(tokenizer(list(TEXTS))), dim=-1)
        torch.testing.assert_close(frozen.trunk_embeddings(TEXTS), unit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_takes_the_place_of_open_clips_projection(folders, kind):
    """What its own projection made of the features is made of them again."""
    new, own = tower(folders[kind], embed_dim=6), tower(folders[kind], tokens=None)
    out = new(TextBatch(TEXTS)).pooled
    assert out.shape == (4, 6) and new.width == 16
    features = new.cached.vectors(TEXTS, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(own.cached.trunk.project(features), own(TextBatch(TEXTS)).pooled)
        expected = new.head(torch.nn.functional.normalize(features, dim=-1) * 4)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_gives_the_same_again(folders, kind, frozen, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(folders[kind], source)
    options = {"embed_dim": 6, "stretch_to": 50, "keep_positions": 8} if kind in ("clip", "bert-cls") else {}
    report = tower(source, frozen=frozen, tokens="words", **options)
    model = joined(report)
    with torch.no_grad():
        before = model.report(TextBatch(TEXTS))
    model.save(tmp_path / "run")
    if not frozen:
        shutil.rmtree(source)
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    again = medvl.load(tmp_path / "run", device="cpu")
    with torch.no_grad():
        after = again.report(TextBatch(TEXTS))
    assert torch.equal(after.pooled, before.pooled) and torch.equal(after.tokens, before.tokens)
    assert again.spec() == model.spec() and again.report.files() == report.files() and bool(report.files()) != frozen
    assert again.report.spans(TEXTS) == report.spans(TEXTS)
    assert "vision_cfg" not in report.files().get(CONFIG, b"").decode()


def test_a_frozen_tower_on_other_weights_is_refused(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders["clip"], source)
    joined(tower(source)).save(tmp_path / "run")
    weights = load_file(source / "open_clip_model.safetensors")
    save_file({key: value + 0.01 for key, value in weights.items()}, source / "open_clip_model.safetensors")
    with pytest.raises(medvl.model.ConfigError, match="trained on a trunk with sha256"):
        medvl.load(tmp_path / "run", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_trunk_unless_it_is_frozen(folders, kind):
    report = tower(folders[kind], embed_dim=6, frozen=False).train()
    report(TextBatch(TEXTS)).pooled.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in report.parameters())
    kept = tower(folders[kind], embed_dim=6).train()
    kept(TextBatch(TEXTS)).pooled.square().sum().backward()
    assert all(p.grad is not None for p in kept.head.parameters()) and not kept.cached.trunk.training


# Tokens


@pytest.mark.parametrize("kind", KINDS)
def test_words_have_their_characters_whatever_open_clip_cleans(folders, kind):
    report = tower(folders[kind], tokens="words")
    out = report(TextBatch(TEXTS))
    for m, (text, spans) in enumerate(zip(TEXTS, report.spans(TEXTS), strict=True)):
        words = re.findall(r"\d+\.\d+|\w+|[^\w\s]", text)
        if kind == "siglip":  # punctuation is no part of what it reads
            words = [word for word in words if word[0].isalnum()]
        found = [text[s:e] for s, e in spans]
        assert found == words[: len(found)] and len(found) >= min(len(words), 10)
        assert out.token_valid[m].sum() == len(spans)
    assert torch.isfinite(out.tokens).all() and out.tokens.shape[-1] == OWN


@pytest.mark.parametrize("kind", ["clip", "bert-cls"])
def test_a_word_is_the_mean_of_its_pieces_vectors(folders, kind):
    """Against open_clip's modules called one by one, of a word that has three pieces."""
    model, tokenizer = theirs(folders[kind])
    text = "The heart is enlarged"
    ids = tokenizer([text])
    with torch.no_grad():
        if kind == "clip":
            x = model.token_embedding(ids) + model.positional_embedding
            hidden = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))[0]
            projected = lambda vector: vector @ model.text_projection  # noqa: E731
            first = [tokenizer.decode([i]) for i in ids[0].tolist()]
            pieces = [n for n, piece in enumerate(first) if piece.strip() and piece.strip() in "enlarged"]
        else:
            hidden = model.text.transformer(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[0]
            projected = model.text.proj
            pieces = [4, 5, 6]  # [CLS] the heart is en ##larg ##ed
        expected = projected(hidden[pieces].mean(0))
        got = tower(folders[kind], tokens="words")(TextBatch((text,))).tokens[0, 3]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_pieces_of_open_clips_tokenizer_are_its_own_one_by_one(folders):
    """Each piece's characters, joined, are the text without its spaces; and as many as open_clip makes."""
    report, tokenizer = tower(folders["clip"], tokens="pieces", stretch_to=80), open_clip.tokenizer.SimpleTokenizer(context_length=80)
    for text in ("Pneumothorax (left), 12x9.3 mm!!", "Überprüfung: naïve café — 3µm", "don't   know\tyet", "&lt;b&gt; fish &amp; chips"):
        (spans,) = report.spans([text])
        assert len(spans) == len(tokenizer.encode(text))
        if "&" not in text:
            assert sorted({i for s, e in spans for i in range(s, e)}) == [i for i, c in enumerate(text) if not c.isspace()]
        assert all(0 <= s < e <= len(text) for s, e in spans) and list(spans) == sorted(spans)


def test_where_cleaned_characters_came_from():
    assert origins("  A  b\n", "a b") == [2, 3, 5, 7]
    text, cleaned = "T2 &amp; flair", "t2 & flair"
    assert [text[i] for i in origins(text, cleaned)[:-1]] == list("T2 & flair")
    assert origins("", "") == [0]


# Long texts


def test_the_clip_table_is_stretched_as_in_long_clip(folders):
    """The authors' loop for a factor of 4, in float64, which a table of 24 positions takes to 4 * 24 - 3 * 20."""
    report = tower(folders["clip"], stretch_to=4 * 24 - 3 * 20)
    old = load_file(folders["clip"] / "open_clip_model.safetensors")["positional_embedding"]
    new = report.cached.trunk.text.positional_embedding
    assert torch.equal(new[:20], old[:20])
    rows = old.double().numpy()
    expected = [rows[i] for i in range(20)]
    for i in range(20, 23):
        expected += [(1 - k / 4) * rows[i] + k / 4 * rows[i + 1] for k in range(4)]
    expected += [rows[23] + k / 4 * (rows[23] - rows[22]) for k in range(4)]
    np.testing.assert_allclose(new.detach().numpy(), np.stack(expected), atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "custom", "bert-cls"])
def test_a_stretched_tower_reads_on_where_the_other_stops(folders, kind):
    plain, long = tower(folders[kind]), tower(folders[kind], stretch_to=60, keep_positions=10)
    short, a, b = "no effusion", "no effusion " * 15, "no effusion " * 15 + "heart enlarged"
    assert torch.equal(plain(TextBatch((a,))).pooled, plain(TextBatch((b,))).pooled)
    assert not torch.allclose(long(TextBatch((a,))).pooled, long(TextBatch((b,))).pooled)
    torch.testing.assert_close(long(TextBatch((short,))).pooled, plain(TextBatch((short,))).pooled, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="is less than the"):
        tower(folders[kind], stretch_to=12)(TextBatch(TEXTS))


# What is refused


def test_what_open_clip_would_fetch_or_run_is_not(folders, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(folders["siglip"], folder)
    settings = json.loads((folder / CONFIG).read_text())
    settings["model_cfg"]["text_cfg"]["tokenizer_kwargs"] |= {"trust_remote_code": True, "cache_dir": "/etc"}
    (folder / CONFIG).write_text(json.dumps(settings))
    kwargs = tower(folder, frozen=False).trunk.found.config["text_cfg"]["tokenizer_kwargs"]
    assert kwargs == {"clean": "canonicalize"}
    for file in ("tokenizer.json", "vocab.txt"):
        (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the tokenizer .*some-lab/tokenizer"):
        tower(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ({**NATIVE, "embed_cls": True}, "CoCa"),
        ({**NATIVE, "depth": 3}, "cannot make its text_cfg: .*depth"),
        ({**NATIVE, "tokenizer_mode": "clips"}, "tokenizer_mode"),
        ("wide", "has no text_cfg"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused(folders, text, why, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(folders["clip"], folder)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": {"embed_dim": OWN, "vision_cfg": VISION, "text_cfg": text}}))
    with pytest.raises(ValueError, match=why):
        tower(folder)(TextBatch(TEXTS))


def test_weights_that_do_not_fit_or_are_none_are_refused(folders, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(folders["clip"], folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "ln_final.weight"}, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"text weights in .* do not fit"):
        tower(folder)(TextBatch(TEXTS))
    (folder / "open_clip_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        tower(folder)(TextBatch(TEXTS))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"report tower .* lacks weights"):
        tower(folder)
    checkpoint = folders["clip"] / "open_clip_model.safetensors"
    assert torch.equal(tower(folder, checkpoint=checkpoint)(TextBatch(TEXTS)).pooled, tower(folders["clip"])(TextBatch(TEXTS)).pooled)
    with pytest.raises(ValueError, match="frozen trunk needs its weights"):
        tower(folders["clip"], initial_weights=False)


def test_names_of_open_clips_list(monkeypatch, folders):
    text = {"context_length": 24, "width": 16, "heads": 2, "layers": 2}
    known = {"embed_dim": OWN, "vision_cfg": VISION, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", known)
    checkpoint = folders["clip"] / "open_clip_model.safetensors"
    assert torch.equal(
        OpenClipReportEncoder("ViT-tiny", checkpoint=checkpoint)(TextBatch(TEXTS)).pooled, tower(folders["clip"])(TextBatch(TEXTS)).pooled
    )
    assert OpenClipReportEncoder("ViT-tiny", frozen=False).embed_dim == OWN
    with pytest.raises(ValueError, match="has no weights; give checkpoint"):
        OpenClipReportEncoder("ViT-tiny")
    with pytest.raises(ValueError, match=r"no model named 'ViT-B-17' and there is no such folder; near it: ViT-B"):
        OpenClipReportEncoder("ViT-B-17")
    with pytest.raises(ValueError, match="tokenizer of the hub; give a folder"):
        OpenClipReportEncoder("ViT-B-16-SigLIP", frozen=False)


def test_without_open_clip_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'medvl\[open_clip\]'"):
        OpenClipReportEncoder("ViT-B-16")
