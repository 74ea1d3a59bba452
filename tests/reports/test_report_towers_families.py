"""Report towers over every family of text models: transformers' own forward pass of one text, a run without its source, tokens by words."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
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
from reports import HuggingFaceReportEncoder, Lora, MiniLmReportEncoder
from reports.towers import overlapping

TEXTS = ("No pleural effusion.", "The heart is enlarged, 1.5 cm more than before; lungs clear", "x")
CORPUS = [*TEXTS, "small left pleural effusion of 12,5 mm", "the lungs are clear and the heart is normal", "no pneumothorax"] * 20
INPUTS = ["input_ids", "attention_mask"]
ENDS = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}


def byte_level(folder: Path, size: int = 300, end: bool = False, **special: str) -> Any:
    """A byte-level tokenizer as RoBERTa, GPT-NeoX and Qwen have one; ``end`` frames a text as RoBERTa does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = list(dict.fromkeys(special.values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=names, initial_alphabet=alphabet))
    if end:
        sep, cls = ((name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>"))
        tokenizer.post_processor = processors.RobertaProcessing(sep, cls)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=INPUTS, **{f"{name}_token": value for name, value in special.items()}
    )
    made.save_pretrained(folder)
    return made


def sentence_piece(folder: Path, end: bool = False) -> Any:
    """A tokenizer of pieces with a mark for the space, as Llama, Gemma and T5 have one; whole texts are one word to it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=list(ENDS.values()), unk_token="<unk>"))
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=INPUTS, **{f"{name}_token": value for name, value in ENDS.items()}
    )
    made.save_pretrained(folder)
    return made


def word_pieces(folder: Path) -> Any:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heart", "is", "en", "##larg", "##ed", "no", "pleural", "effusion"]
    words += ["lungs", "clear", "cm", "more", "than", "before", "x", ".", ",", ";", "1", "5"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    made = BertTokenizerFast.from_pretrained(folder)
    made.save_pretrained(folder)
    return made


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPECIAL = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}


def _made(folder: Path, model: Any) -> Any:
    """Weights that matter: fresh ones of these classes are so small that every layer is nearly the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def bert(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    word_pieces(folder)
    return _made(folder, BertModel(BertConfig(vocab_size=26, max_position_embeddings=24, **SMALL)))


def roberta(folder: Path) -> Any:
    from transformers import RobertaConfig, RobertaModel

    vocab = len(byte_level(folder, end=True, **SPECIAL))
    return _made(folder, RobertaModel(RobertaConfig(vocab_size=vocab, max_position_embeddings=66, pad_token_id=1, **SMALL)))


def mpnet(folder: Path) -> Any:
    from transformers import MPNetConfig, MPNetModel

    vocab = len(byte_level(folder, end=True, **SPECIAL))
    return _made(folder, MPNetModel(MPNetConfig(vocab_size=vocab, max_position_embeddings=66, **SMALL)))


def modernbert(folder: Path) -> Any:
    from transformers import ModernBertConfig, ModernBertModel

    vocab = len(byte_level(folder, end=True, **SPECIAL))
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    return _made(
        folder, ModernBertModel(ModernBertConfig(vocab_size=vocab, max_position_embeddings=200, local_attention=8, **tokens, **SMALL))
    )


def longformer(folder: Path) -> Any:
    from transformers import LongformerConfig, LongformerModel

    vocab = len(byte_level(folder, end=True, **SPECIAL))
    options = {"attention_window": 8, "max_position_embeddings": 130, "pad_token_id": 1}
    return _made(folder, LongformerModel(LongformerConfig(vocab_size=vocab, **options, **SMALL)))


def qwen(folder: Path) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    vocab = len(byte_level(folder, pad="<|endoftext|>", eos="<|endoftext|>"))
    return _made(folder, Qwen3Model(Qwen3Config(vocab_size=vocab, num_key_value_heads=1, head_dim=8, **SMALL)))


def neox(folder: Path) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    vocab = len(byte_level(folder, bos="<|endoftext|>", eos="<|endoftext|>"))
    return _made(folder, GPTNeoXModel(GPTNeoXConfig(vocab_size=vocab, max_position_embeddings=128, **SMALL)))


def llama(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaModel

    vocab = len(sentence_piece(folder))
    return _made(folder, LlamaModel(LlamaConfig(vocab_size=vocab, num_key_value_heads=1, **SMALL)))


def gemma(folder: Path) -> Any:
    from transformers import GemmaConfig, GemmaModel

    vocab = len(sentence_piece(folder))
    return _made(folder, GemmaModel(GemmaConfig(vocab_size=vocab, num_key_value_heads=1, head_dim=8, **SMALL)))


def t5(folder: Path) -> Any:
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    vocab = len(sentence_piece(folder, end=True))
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    _made(folder, T5ForConditionalGeneration(T5Config(vocab_size=vocab, decoder_start_token_id=0, **size)))
    return T5EncoderModel.from_pretrained(folder)


def clip(folder: Path) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = byte_level(folder, end=True, **SPECIAL)
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return _made(folder, CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **ends, **SMALL)))


FAMILIES: dict[str, Callable[[Path], Any]] = {
    f.__name__: f for f in (bert, roberta, mpnet, modernbert, longformer, qwen, neox, llama, gemma, t5, clip)
}
DECODERS = ("qwen", "neox", "llama", "gemma")
TABLED = ("bert", "roberta", "mpnet", "longformer", "clip")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name -> (folder as save_pretrained writes it, the model it was saved from)."""
    root = tmp_path_factory.mktemp("families")
    found = {}
    for name, make in FAMILIES.items():
        folder = root / name
        folder.mkdir()
        torch.manual_seed(0)
        found[name] = (folder, make(folder).eval())
        found[name][1].config.use_cache = False  # keys and values for generation go through other kernels, which round otherwise
    return found


def own_hidden(folder: Path, model: Any, text: str, append: bool = False) -> tuple[torch.Tensor, list[int]]:
    """(L, H) and token ids of one text, so without padding, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    if append:
        inputs = {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([[tokenizer.eos_token_id]])], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "longformer" in type(model).__name__.lower():
        inputs["global_attention_mask"] = torch.tensor([[1] + [0] * (inputs["input_ids"].shape[1] - 1)])
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0], inputs["input_ids"][0].tolist()


def by_hand(hidden: np.ndarray, pooling: str) -> np.ndarray:
    """A pooling in plain float64, over tokens without padding."""
    rows = [row.astype(np.float64) for row in hidden]
    if pooling == "cls":
        return rows[0]
    if pooling in ("last", "eos"):
        return rows[-1]
    weights = [i + 1 if pooling == "weighted_mean" else 1 for i in range(len(rows))]
    return sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pooling", ["cls", "mean", "weighted_mean", "last", "eos"])
def test_a_text_is_what_transformers_makes_of_it(models, name, pooling):
    folder, model = models[name]
    tower = HuggingFaceReportEncoder(str(folder), None, pooling=pooling)
    together = tower(TextBatch(TEXTS)).pooled
    assert tower.embed_dim == 16 and together.shape == (3, 16) and together.dtype == torch.float32
    for text, row in zip(TEXTS, together, strict=True):
        hidden, _ = own_hidden(folder, model, text, append=pooling == "eos" and name in DECODERS)
        expected = by_hand(hidden.numpy(), pooling)
        np.testing.assert_allclose(row.numpy(), expected, atol=2e-5, rtol=1e-4)
        alone = HuggingFaceReportEncoder(str(folder), None, pooling=pooling)(TextBatch((text,))).pooled[0]
        if pooling in ("cls", "last", "eos") and len(hidden) > 1:  # bit for bit; one vector alone rounds by where weights lie in memory
            assert torch.equal(alone, hidden[0 if pooling == "cls" else -1])
    free = HuggingFaceReportEncoder(str(folder), None, pooling=pooling, frozen=False).eval()
    torch.testing.assert_close(free(TextBatch(TEXTS)).pooled, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_text_and_a_long_one_are_taken(models, name):
    tower = HuggingFaceReportEncoder(str(models[name][0]), 4, max_tokens=4096, tokens="words")
    out = tower(TextBatch(("", TEXTS[0], "no effusion " * 300)))
    assert torch.isfinite(out.pooled).all() and torch.isfinite(out.tokens).all()
    assert not out.token_valid[0].any() and out.token_valid[1].sum() == 4
    none = tower(TextBatch(()))
    assert none.pooled.shape == (0, 4) and none.tokens.shape == (0, 1, 4) and tower.spans(()) == ()


def joined(tower: HuggingFaceReportEncoder) -> DualEncoder:
    return DualEncoder(ConvEncoder(tower.embed_dim, widths=(4, 4), blocks=(1, 1)), tower, PooledSimilarity(), XrayReader(size=32))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_gives_the_same_again(models, name, frozen, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(models[name][0], source)
    long = {"stretch_to": 150, "keep_positions": 5} if name in TABLED else {}
    torch.manual_seed(1)
    tower = HuggingFaceReportEncoder(str(source), 6, frozen=frozen, tokens="words", **long)
    model = joined(tower).eval()
    texts = (*TEXTS, "no effusion " * 40)
    with torch.no_grad():
        before = model.report(TextBatch(texts))
    model.save(tmp_path / "run")
    if not frozen:
        shutil.rmtree(source)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = medvl.load(tmp_path / "run", device="cpu")
    with torch.no_grad():
        after = again.report(TextBatch(texts))
    assert torch.equal(after.pooled, before.pooled) and torch.equal(after.tokens, before.tokens)
    assert torch.equal(after.token_valid, before.token_valid)
    assert again.report.spec() == tower.spec() and again.report.spans(texts) == tower.spans(texts)
    assert again.spec() == model.spec() and not any(
        str(tmp_path / "source") in f.read_text() for f in (tmp_path / "run/report").glob("*.json")
    )


def test_bfloat16_halves_the_memory_and_gives_nearly_the_same(models):
    folder, _ = models["qwen"]
    full, half = (HuggingFaceReportEncoder(str(folder), None, pooling="last", precision=p) for p in ("float32", "bfloat16"))
    a, b = (tower(TextBatch(TEXTS)).pooled for tower in (full, half))
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    assert (torch.nn.functional.cosine_similarity(a, b) > 0.99).all()
    assert {p.dtype for p in half.cached.trunk.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="bfloat16 for a frozen trunk"):
        HuggingFaceReportEncoder(str(folder), 4, frozen=False, precision="bfloat16")


def test_padding_on_the_left_is_no_different(models, tmp_path):
    folder = tmp_path / "left"
    shutil.copytree(models["qwen"][0], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    left, right = (HuggingFaceReportEncoder(str(f), None, pooling="last") for f in (folder, models["qwen"][0]))
    assert torch.equal(left(TextBatch(TEXTS)).pooled, right(TextBatch(TEXTS)).pooled)


@pytest.mark.parametrize("name", ["clip", "t5", "bert"])
def test_types_of_tokens_go_to_models_that_know_them(models, name, tmp_path):
    """A tokenizer of the general class names them for models that have none."""
    folder = tmp_path / "types"
    shutil.copytree(models[name][0], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    typed, plain = (HuggingFaceReportEncoder(str(f), None) for f in (folder, models[name][0]))
    assert "token_type_ids" in typed.cached.trunk.tokenize(TEXTS)[0].inputs
    assert torch.equal(typed(TextBatch(TEXTS)).pooled, plain(TextBatch(TEXTS)).pooled)


def test_weights_that_lack_a_layer_are_refused(models, tmp_path):
    folder = tmp_path / "lacking"
    shutil.copytree(models["bert"][0], folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layer.1.output" not in k}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 4 of a BertModel \(encoder.layer.1.output"):
        HuggingFaceReportEncoder(str(folder), 4).trunk_embeddings(TEXTS)


def test_a_model_with_an_image_side_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no text model alone"):
        HuggingFaceReportEncoder(str(tmp_path), 4)


# Attention pooling


@pytest.mark.parametrize("frozen", [True, False])
def test_attention_pooling_starts_as_the_mean_and_learns(models, frozen, tmp_path):
    folder, model = models["roberta"]
    torch.manual_seed(3)
    tower = HuggingFaceReportEncoder(str(folder), None, pooling="attention", frozen=frozen).eval()
    mean = HuggingFaceReportEncoder(str(folder), None)
    torch.testing.assert_close(tower(TextBatch(TEXTS)).pooled, mean(TextBatch(TEXTS)).pooled, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        tower.attend.query.normal_()
    found = tower(TextBatch(TEXTS)).pooled
    for text, row in zip(TEXTS, found, strict=True):
        hidden = own_hidden(folder, model, text)[0].double().numpy()
        scores = np.exp(hidden @ tower.attend.query.detach().double().numpy() / 4)
        np.testing.assert_allclose(row.detach().numpy(), (scores / scores.sum()) @ hidden, atol=2e-5)
    found.square().sum().backward()
    assert tower.attend.query.grad.abs().sum() > 0
    kept = HuggingFaceReportEncoder(str(folder), None, pooling="attention", keep_tokens=True)
    kept.attend.load_state_dict(tower.attend.state_dict())
    first = kept(TextBatch(TEXTS)).pooled
    torch.testing.assert_close(first, found, atol=1e-5, rtol=1e-5)
    kept.cached.trunk.encode = lambda *_: pytest.fail("computed again")
    assert torch.equal(kept(TextBatch(TEXTS)).pooled, first)
    with pytest.raises(ValueError, match="pooling is 'attention'"):
        tower.trunk_embeddings(TEXTS)
    model = joined(HuggingFaceReportEncoder(str(folder), 4, pooling="attention", frozen=frozen)).eval()
    model.save(tmp_path / "run")
    again = medvl.load(tmp_path / "run", device="cpu")
    with torch.no_grad():
        assert torch.equal(again.report(TextBatch(TEXTS)).pooled, model.report(TextBatch(TEXTS)).pooled)


# Tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_the_mean_of_their_pieces(models, name):
    """Pieces by transformers' own offsets of one text; a word is compared with the pieces that share a character with it."""
    from transformers import AutoTokenizer

    folder, model = models[name]
    tower = HuggingFaceReportEncoder(str(folder), None, tokens="words")
    out = tower(TextBatch(TEXTS))
    for m, (text, spans) in enumerate(zip(TEXTS, tower.spans(TEXTS), strict=True)):
        assert [text[s:e] for s, e in spans] == re.findall(r"\d+\.\d+|\w+|[^\w\s]", text)
        assert out.token_valid[m].sum() == len(spans)
        hidden, _ = own_hidden(folder, model, text)
        offsets = AutoTokenizer.from_pretrained(folder)(text, return_offsets_mapping=True)["offset_mapping"]
        for i, (start, end) in enumerate(spans):
            pieces = [hidden[n].double().numpy() for n, (s, e) in enumerate(offsets) if set(range(s, e)) & set(range(start, end))]
            np.testing.assert_allclose(out.tokens[m, i].numpy(), sum(pieces) / len(pieces), atol=2e-5)
    assert torch.equal(out.tokens[~out.token_valid], torch.zeros_like(out.tokens[~out.token_valid]))


def test_the_words_of_a_phrase_are_found_by_its_characters(models):
    tower = HuggingFaceReportEncoder(str(models["bert"][0]), 4, tokens="words")
    text = TEXTS[1]
    (spans,) = tower.spans([text])
    start = text.index("enlarged, 1.5 cm")
    found = overlapping(spans, start, start + len("enlarged, 1.5 cm"))
    assert [text[slice(*spans[i])] for i in found] == ["enlarged", ",", "1.5", "cm"]
    assert overlapping(spans, 3, 4) == ()  # a space


def test_pieces_and_words_cover_the_same_characters_and_a_cut_text_gives_what_was_seen(models):
    folder = str(models["bert"][0])
    pieces, words = (HuggingFaceReportEncoder(folder, 4, tokens=kind, max_tokens=7) for kind in ("pieces", "words"))
    text = TEXTS[1]  # the heart is en ##larg | ##ed , ...
    assert [text[s:e] for s, e in pieces.spans([text])[0]] == ["The", "heart", "is", "en", "larg"]
    assert [text[s:e] for s, e in words.spans([text])[0]] == ["The", "heart", "is", "enlarged"]
    assert pieces(TextBatch((text,))).tokens.shape == (1, 5, 4) and words(TextBatch((text,))).tokens.shape == (1, 4, 4)


def test_tokens_lie_in_the_space_of_pooled(models):
    """A text of one token that is the mean of itself: its word goes where the text goes."""
    folder = str(models["qwen"][0])
    for standardise in (False, True):
        torch.manual_seed(0)
        tower = HuggingFaceReportEncoder(folder, 4, pooling="mean", tokens="words", standardise=standardise)
        tower.train()(TextBatch(TEXTS))
        out = tower.eval()(TextBatch(("x",)))
        torch.testing.assert_close(out.tokens[0, 0], out.pooled[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_token_gradients_reach_what_trains(models, frozen):
    tower = HuggingFaceReportEncoder(str(models["bert"][0]), 4, tokens="words", frozen=frozen)
    tower(TextBatch(TEXTS)).tokens.square().sum().backward()
    trained = {name: p for name, p in tower.named_parameters() if "pooler" not in name}
    assert trained and all(p.grad is not None for p in trained.values())


def test_no_tokens_no_spans_and_a_slow_tokenizer_none_either(models, tmp_path):
    with pytest.raises(ValueError, match="tokens='words'"):
        HuggingFaceReportEncoder(str(models["bert"][0]), 4).spans(TEXTS)
    shutil.copytree(models["bert"][0], tmp_path / "slow")
    (tmp_path / "slow/tokenizer.json").unlink()
    (tmp_path / "slow/vocab.json").write_text(json.dumps({"<unk>": 0, "x</w>": 1}))
    (tmp_path / "slow/merges.txt").write_text("#version\n")
    (tmp_path / "slow/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}))
    with pytest.raises(ValueError, match=r"a CTRLTokenizer does not keep.*tokenizer.json"):
        HuggingFaceReportEncoder(str(tmp_path / "slow"), 4, tokens="words").spans(TEXTS)
    with pytest.raises(ValueError, match="tokens is 'pieces', 'words' or None"):
        HuggingFaceReportEncoder(str(models["bert"][0]), 4, tokens="letters")


# CXR-BERT


@pytest.fixture
def cxr_bert(tmp_path: Path) -> Path:
    """A folder with the keys and the config of CXR-BERT's repository, from transformers' BertForMaskedLM and a head made by hand."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path / "cxr"
    folder.mkdir()
    word_pieces(folder)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=26, max_position_embeddings=24, **SMALL))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, shape in {"dense_to_hidden": (6, 16), "dense_to_output": (6, 6)}.items():
        state[f"cls_projection_head.{name}.weight"], state[f"cls_projection_head.{name}.bias"] = torch.randn(shape), torch.randn(6)
    state["cls_projection_head.LayerNorm.weight"], state["cls_projection_head.LayerNorm.bias"] = torch.rand(6) + 0.5, torch.randn(6)
    state["bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "model_type": "cxr-bert", "projection_size": 6, "architectures": ["CXRBertModel"]}
    config["auto_map"] = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class="CXRBertTokenizer", auto_map={"AutoTokenizer": ["configuration_cxrbert.CXRBertTokenizer", None]})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "modeling_cxrbert.py").write_text("raise RuntimeError('this was run')")
    (folder / "configuration_cxrbert.py").write_text("raise RuntimeError('this was run')")
    return folder


def by_its_authors(folder: Path, text: str) -> np.ndarray:
    """dense, GELU, LayerNorm(1e-12), dense of the classification token, in numpy."""
    from scipy.special import erf
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    state = load_file(folder / "model.safetensors")
    settings = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in ("model_type", "auto_map")}
    model = BertForMaskedLM(BertConfig(**settings)).eval()
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        inputs = BertTokenizerFast.from_pretrained(folder)(text, return_tensors="pt")
        x = model(**inputs, output_hidden_states=True).hidden_states[-1][0, 0].double().numpy()
    w = {k.removeprefix("cls_projection_head."): v.double().numpy() for k, v in state.items() if k.startswith("cls_projection")}
    x = w["dense_to_hidden.weight"] @ x + w["dense_to_hidden.bias"]
    x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-12) * w["LayerNorm.weight"] + w["LayerNorm.bias"]
    return w["dense_to_output.weight"] @ x + w["dense_to_output.bias"]


@pytest.mark.parametrize("frozen", [True, False])
def test_cxr_bert_projects_its_classification_token(cxr_bert, frozen, tmp_path):
    tower = HuggingFaceReportEncoder(str(cxr_bert), None, pooling="cls", frozen=frozen, stretch_to=30 if frozen else None).eval()
    assert tower.embed_dim == 6
    found = tower(TextBatch(TEXTS[:1])).pooled
    np.testing.assert_allclose(found[0].detach().numpy(), by_its_authors(cxr_bert, TEXTS[0]), atol=2e-5)
    joined(tower).save(tmp_path / "run")
    if not frozen:
        shutil.rmtree(cxr_bert)
    again = medvl.load(tmp_path / "run", device="cpu")
    assert torch.equal(again.report(TextBatch(TEXTS[:1])).pooled, found)


def test_cxr_bert_without_its_projection_is_bert(cxr_bert):
    tower = HuggingFaceReportEncoder(str(cxr_bert), None, pooling="cls", projection=False, tokens="words")
    assert tower(TextBatch(TEXTS)).pooled.shape == (3, 16) and tower(TextBatch(TEXTS)).tokens.shape == (3, 13, 16)
    weights = load_file(cxr_bert / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "dense_to_output" not in k}, cxr_bert / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit a CXR-BERT.*projection=False"):
        HuggingFaceReportEncoder(str(cxr_bert), None, pooling="cls").trunk_embeddings(TEXTS)


# Long texts


@pytest.mark.parametrize("name", TABLED)
def test_stretching_keeps_the_first_positions_and_takes_longer_texts(models, name):
    folder = models[name][0]
    plain = HuggingFaceReportEncoder(str(folder), None, max_tokens=4096)
    long = HuggingFaceReportEncoder(str(folder), None, stretch_to=200)
    short = ("no effusion", "x")
    assert torch.equal(long(TextBatch(short)).pooled, plain(TextBatch(short)).pooled)
    count = {"bert": 24, "roberta": 64, "mpnet": 64, "longformer": 128, "clip": 64}[name]
    assert plain.cached.trunk.max_tokens == count and long.cached.trunk.max_tokens == 200
    assert len(plain.cached.trunk.tokenize(["no effusion " * 300])[0].inputs["input_ids"]) == count
    assert len(long.cached.trunk.tokenize(["no effusion " * 300])[0].inputs["input_ids"]) == 200
    a, b = (next(p for n, p in t.cached.trunk.encoder.named_parameters() if "position_embedding" in n) for t in (plain, long))
    before = len(a) - count
    assert torch.equal(a[: before + 20], b[: before + 20]) and len(b) == before + 200
    torch.testing.assert_close(long(TextBatch(("no effusion " * 300,))).pooled, long(TextBatch(("no effusion " * 400,))).pooled)


@pytest.mark.parametrize("name", ["modernbert", "qwen", "t5"])
def test_positions_without_a_table_need_no_stretching(models, name):
    with pytest.raises(ValueError, match="needs no stretching"):
        HuggingFaceReportEncoder(str(models[name][0]), 4, stretch_to=300).trunk_embeddings(TEXTS)


@pytest.mark.parametrize(
    ("count", "keep", "said"),
    [(20, 5, "less than the 24 positions"), (60, 23, "leaves none of 24"), (60, -1, "leaves none"), (1000, 5, "more than 32 times")],
)
def test_a_table_is_not_stretched_to_less(models, count, keep, said):
    with pytest.raises(ValueError, match=said):
        HuggingFaceReportEncoder(str(models["bert"][0]), 4, stretch_to=count, keep_positions=keep).trunk_embeddings(TEXTS)


def test_minilm_takes_a_long_report():
    tower = MiniLmReportEncoder(None, stretch_to=1024)
    plain = MiniLmReportEncoder(None, max_tokens=512)
    texts = ("no effusion",)
    assert torch.equal(tower(TextBatch(texts)).pooled, plain(TextBatch(texts)).pooled)
    assert len(tower.cached.trunk.tokenize(["no effusion " * 600])[0].inputs["input_ids"]) == 1024


# LoRA


def lora_tower(folder: Path, **options: Any) -> HuggingFaceReportEncoder:
    pytest.importorskip("peft", reason="peft is in the extra 'lora'")
    return HuggingFaceReportEncoder(str(folder), 6, pooling="last", lora=Lora(rank=2, alpha=8), **options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*DECODERS, "bert", "t5"])
def test_lora_trains_adapters_alone_and_saves_no_more(models, name, precision, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(models[name][0], source)
    tower = lora_tower(source, precision=precision)
    plain = HuggingFaceReportEncoder(str(source), None, pooling="last", precision=precision)
    with torch.no_grad():
        torch.testing.assert_close(
            tower.trunk_embeddings(TEXTS), plain.trunk_embeddings(TEXTS), atol=2e-2 if precision == "bfloat16" else 1e-5, rtol=0
        )
    before = {name: p.clone() for name, p in tower.named_parameters()}
    optimizer = torch.optim.Adam([p for p in tower.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        tower(TextBatch(TEXTS)).pooled.square().sum().backward()
        optimizer.step()
    moved = {name for name, p in tower.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if "lora_" in name or name.startswith("head.")}
    assert {p.dtype for name, p in tower.named_parameters() if "lora_" in name} == {torch.float32}
    assert all("lora_" in key or key.startswith(("head.", "trunk_sha256")) for key in tower.state_dict())
    model = joined(tower).eval()
    with torch.no_grad():
        expected = model.report(TextBatch(TEXTS)).pooled
    model.save(tmp_path / "run")
    again = medvl.load(tmp_path / "run", device="cpu")
    with torch.no_grad():
        assert torch.equal(again.report(TextBatch(TEXTS)).pooled, expected)
    assert again.report.spec() == tower.spec()
    weights = load_file(source / "model.safetensors")
    save_file({key: value + 0.01 for key, value in weights.items()}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(medvl.model.ConfigError, match="trained on a trunk with sha256"):
        medvl.load(tmp_path / "run", device="cpu")


def test_lora_adds_the_product_of_its_matrices(models):
    """One projection of the first layer, by numpy."""
    tower = lora_tower(models["qwen"][0])
    layer = tower.trunk.encoder.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x = torch.randn(3, 16)
    base, a, b = (
        w.detach().double().numpy() for w in (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    expected = x.double().numpy() @ (base + 8 / 2 * b @ a).T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)


def test_a_copy_of_a_lora_tower_shares_the_base_but_not_the_adapters(models):
    import copy

    tower = lora_tower(models["qwen"][0])
    twin = copy.deepcopy(tower)
    for (name, a), (_, b) in zip(tower.named_parameters(), twin.named_parameters(), strict=True):
        assert (a is b) == (name.startswith("trunk.") and "lora_" not in name)
        assert torch.equal(a, b)
    assert twin.spec() == tower.spec()


def test_gradient_checkpointing_changes_no_gradient(models):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tower = lora_tower(models["qwen"][0], gradient_checkpointing=checkpointing).train()
        tower(TextBatch(TEXTS)).pooled.square().sum().backward()
        grads.append({name: p.grad for name, p in tower.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and any(g.abs().sum() > 0 for g in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


def test_lora_goes_with_a_frozen_trunk_and_needs_peft(models, monkeypatch):
    with pytest.raises(ValueError, match="leave out frozen=False"):
        HuggingFaceReportEncoder(str(models["qwen"][0]), 4, frozen=False, lora=Lora())
    with pytest.raises(ValueError, match="rank is 1 to 1024"):
        Lora(rank=0)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"medvl\[lora\]"):
        HuggingFaceReportEncoder(str(models["qwen"][0]), 4, lora=Lora())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", FAMILIES)
def test_cuda_gives_what_the_cpu_gives(models, name):
    folder = str(models[name][0])
    cpu, cuda = (HuggingFaceReportEncoder(folder, None, pooling="last", tokens="words") for _ in range(2))
    here, there = cpu(TextBatch(TEXTS)), cuda.cuda()(TextBatch(TEXTS))
    assert there.pooled.is_cuda and there.tokens.is_cuda and cuda.spans(TEXTS) == cpu.spans(TEXTS)
    torch.testing.assert_close(there.pooled.cpu(), here.pooled, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(there.tokens.cpu(), here.tokens, atol=1e-3, rtol=1e-3)
    assert torch.equal(there.token_valid.cpu(), here.token_valid)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_lora_learns_on_cuda_under_autocast(models):
    tower = lora_tower(models["qwen"][0], precision="bfloat16", tokens="words").train().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        out = tower(TextBatch(TEXTS))
        (out.pooled.float().square().sum() + out.tokens.float().square().sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in tower.parameters() if p.requires_grad)
