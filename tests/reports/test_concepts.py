"""Concepts of a text: the tokens that name a finding, against the words that a person would underline."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

import medvl
import reports.towers.concepts as module
from medvl.model import DualEncoder
from medvl.nn.local import ConceptSimilarity
from medvl.types import TextBatch
from modalities.xray import ConvEncoder, XrayReader
from reports import HuggingFaceReportEncoder, MiniLmReportEncoder
from reports.facts import FactSource, LexiconFacts, StatedSentence
from reports.towers import ConceptReportEncoder

UNDERLINED = {
    "Small left pleural effusion. No pneumothorax.": ["pleural effusion", "pneumothorax"],
    "No effusion on the left. There is a large effusion on the right.": ["effusion", "effusion"],
    "Pleural effusion and pulmonary edema, no pneumonia.": ["Pleural effusion", "pulmonary edema", "pneumonia"],
    "FINDINGS: There is  a 3 mm nodule.\nIMPRESSION: Nodule.": ["nodule", "Nodule"],
    "The patient was seen.": [],
    "": [],
}
TEXTS = tuple(UNDERLINED)


class CountedFacts(FactSource):
    """The lexicon, and which texts it was asked of."""

    def __init__(self) -> None:
        self.lexicon, self.asked = LexiconFacts(), list[str]()

    def sentences(self, text: str) -> tuple[StatedSentence, ...]:
        """As the lexicon finds them."""
        self.asked.append(text)
        return self.lexicon.sentences(text)


@pytest.fixture(scope="module")
def words() -> MiniLmReportEncoder:
    torch.manual_seed(0)
    return MiniLmReportEncoder(embed_dim=16, hidden_dim=None, tokens="words", keep_tokens=True)


def underlined(tower: MiniLmReportEncoder, text: str, concepts: torch.Tensor) -> list[str]:
    """The characters from the first to the last token of each concept, in their order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for span, number in zip(tower.spans([text])[0], concepts.tolist(), strict=False):
        found.setdefault(number, []).append(span)
    return [text[found[number][0][0] : found[number][-1][1]] for number in sorted(found) if number >= 0]


@pytest.mark.parametrize("tokens", ["words", "pieces"])
def test_concepts_are_the_words_that_name_a_finding_present_or_not_each_at_its_own_place(tokens: str) -> None:
    tower = MiniLmReportEncoder(embed_dim=16, hidden_dim=None, tokens=tokens)
    features = ConceptReportEncoder(tower)(TextBatch(TEXTS))
    assert features.concepts is not None and features.token_valid is not None
    for text, row in zip(TEXTS, features.concepts, strict=True):
        assert underlined(tower, text, row) == UNDERLINED[text]
    assert (features.concepts[~features.token_valid] == -1).all()
    row = features.concepts[1]  # of a word that comes twice each one is a concept of its own
    assert [(row == number).sum().item() for number in (0, 1)] == [1, 1] or tokens == "pieces"


def test_features_are_those_of_the_tower(words: MiniLmReportEncoder) -> None:
    got, expected = ConceptReportEncoder(words)(TextBatch(TEXTS)), words(TextBatch(TEXTS))
    assert torch.equal(got.pooled, expected.pooled) and torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.token_valid, expected.token_valid)
    assert ConceptReportEncoder(words)(TextBatch(())).concepts.shape[0] == 0


def test_a_text_is_read_once_and_what_is_kept_has_a_bound(words: MiniLmReportEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = CountedFacts()
    tower = ConceptReportEncoder(words, facts)
    first = tower(TextBatch(TEXTS)).concepts
    assert torch.equal(tower(TextBatch(TEXTS)).concepts, first) and facts.asked == list(TEXTS)
    monkeypatch.setattr(module, "_KEPT", 2)
    for text in (*TEXTS, *TEXTS):
        assert underlined(words, text, tower(TextBatch((text,))).concepts[0]) == UNDERLINED[text]
        assert len(tower._kept) <= 2


def test_precomputing_fills_the_cache_of_the_tower(words: MiniLmReportEncoder) -> None:
    calls: list[tuple[int, int]] = []
    ConceptReportEncoder(words).precompute(["Never seen before.", "Nor this one."], lambda done, todo: calls.append((done, todo)))
    assert calls == [(2, 2)]


def test_a_tower_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"marked on tokens: give the report tower `tokens: words`"):
        ConceptReportEncoder(MiniLmReportEncoder(embed_dim=16))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_is_saved_and_loaded_with_the_files_of_its_trunk(tiny_bert: Path, tmp_path: Path, frozen: bool) -> None:
    report = HuggingFaceReportEncoder(str(tiny_bert), embed_dim=16, tokens="words", frozen=frozen, hidden_dim=None)
    tower = ConvEncoder(embed_dim=16, widths=(8, 8, 16), blocks=(1, 1, 1))
    model = DualEncoder(tower, ConceptReportEncoder(report, LexiconFacts()), ConceptSimilarity(), XrayReader(size=32)).eval()
    model.save(tmp_path / "model")
    if not frozen:  # the run stands alone
        shutil.rmtree(tiny_bert)
        assert (tmp_path / "model" / "report" / "tower").is_dir()
    again = medvl.load(tmp_path / "model", device="cpu")
    assert isinstance(again.report, ConceptReportEncoder)
    texts = ("the heart is enlarged", "no pleural effusion")
    expected, got = model.encode_text(texts), again.encode_text(texts)
    torch.testing.assert_close(got.tokens, expected.tokens)
    assert torch.equal(got.concepts, expected.concepts) and (got.concepts >= 0).any()


def test_a_copy_marks_the_same_concepts_and_has_weights_of_its_own(words: MiniLmReportEncoder) -> None:
    tower = ConceptReportEncoder(words)
    twin = copy.deepcopy(tower)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    got, expected = twin(TextBatch(TEXTS)), tower(TextBatch(TEXTS))
    assert torch.equal(got.concepts, expected.concepts) and not torch.equal(got.pooled, expected.pooled)
