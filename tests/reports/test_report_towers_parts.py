"""Words, poolings and positions of report towers, each against plain Python over one text or row at a time."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.towers.pooling import AttentionPooling, pool
from reports.towers.positions import stretch
from reports.towers.words import merge, origins, overlapping, pieces_of_words, word_spans

TEXT = st.text(alphabet=st.sampled_from("aB3 .,;_-%\n\té²µ中İ'&<"), max_size=40)


@given(TEXT)
def test_words_cover_all_but_white_space_once(text: str) -> None:
    spans = word_spans(text)
    covered = [i for start, end in spans for i in range(start, end)]
    assert covered == [i for i, c in enumerate(text) if not c.isspace()]
    assert all(start < end and len(text[start:end].split()) == 1 for start, end in spans)


def test_decimals_stay_whole_and_signs_stand_alone() -> None:
    text = "T2-weighted: 1.5 x 2,25 cm (see 3.)"
    assert [text[s:e] for s, e in word_spans(text)] == ["T2", "-", "weighted", ":", "1.5", "x", "2,25", "cm", "(", "see", "3", ".", ")"]


@st.composite
def text_and_pieces(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]]]:
    """A text cut at random places, with special tokens among the pieces and the end cut away."""
    text = draw(TEXT)
    cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=12))})
    pieces = list(pairwise(cuts))[: draw(st.integers(0, 12))]
    for place in draw(st.lists(st.integers(0, len(pieces)), max_size=2)):
        pieces.insert(place, (0, 0))
    return text, pieces


@given(text_and_pieces())
@settings(max_examples=300)
def test_a_word_has_the_pieces_that_share_a_character_with_it(given_: tuple[str, list[tuple[int, int]]]) -> None:
    text, pieces = given_
    words, groups = pieces_of_words(pieces, word_spans(text))
    expected = []
    for word in word_spans(text):
        sharing = tuple(i for i, piece in enumerate(pieces) if set(range(*piece)) & set(range(*word)))
        if sharing:
            expected.append((word, sharing))
    assert list(zip(words, groups, strict=True)) == expected


@given(TEXT, st.integers(0, 40), st.integers(0, 40))
def test_a_phrase_overlaps_the_words_it_has_a_character_of(text: str, start: int, end: int) -> None:
    spans = word_spans(text)
    assert overlapping(spans, start, end) == tuple(i for i, s in enumerate(spans) if set(range(*s)) & set(range(start, end)))


@given(TEXT)
def test_characters_of_a_tidied_text_are_those_they_came_from(text: str) -> None:
    tidy = " ".join(text.split())
    places = origins(text, tidy)
    assert len(places) == len(tidy) + 1 and places == sorted(places)
    assert all(text[i] == c or (text[i].isspace() and c == " ") for i, c in zip(places, tidy, strict=False))


@given(TEXT, TEXT)
def test_any_cleaning_has_a_place_for_every_character(text: str, cleaned: str) -> None:
    places = origins(text, cleaned)
    assert len(places) == len(cleaned) + 1 and places == sorted(places) and all(0 <= place <= len(text) for place in places)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Nodule, 1.5 cm; T2 & FLAIR.", "nodule 15 cm t2 flair"),
        ("Caf\u00e9 au lait &amp; more &lt;tests&gt; done", "cafe au lait & more <tests> done"),
        ("a" * 50 + " &amp; b" * 20 + "c" * 50, "a" * 50 + " & b" * 20 + "c" * 50),
    ],
)
def test_characters_stay_with_their_words_through_a_cleaning(text: str, cleaned: str) -> None:
    places = origins(text, cleaned)
    wrong = [i for i, c in enumerate(cleaned) if text[places[i]].lower() != c and c.isalnum() and c != "e"]
    assert wrong == []


def test_places_of_a_long_and_hostile_text_are_found_in_time_that_grows_with_it() -> None:
    """Looking up characters is counted: some hundreds for each, whatever the texts; the longest common parts would take its square."""

    class Counted(str):
        looked_at = 0

        def __getitem__(self, key: Any) -> str:
            Counted.looked_at += 1
            return super().__getitem__(key)

    text = Counted("ab" * 10_000)
    places = origins(text, "ba" * 5_000 + "c" * 5_000)
    assert len(places) == 15_001 and Counted.looked_at < 1000 * 15_000


def test_groups_are_averaged_row_by_row_and_gradients_flow() -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    groups = [[(0, 1), (4,)], [], [(2,), (1, 2, 3), (0,)]]
    merged, valid = merge(hidden, groups)
    assert merged.shape == (3, 3, 4) and valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    for m, words in enumerate(groups):
        for w, group in enumerate(words):
            np.testing.assert_allclose(merged[m, w].tolist(), np.mean([hidden[m, i].tolist() for i in group], axis=0), rtol=1e-12)
    merged.sum().backward()
    assert hidden.grad is not None and hidden.grad[1].abs().sum() == 0
    np.testing.assert_allclose(hidden.grad[2, :, 0].tolist(), [1, 1 / 3, 1 + 1 / 3, 1 / 3, 0])
    assert merge(hidden[:0], [])[0].shape == (0, 1, 4) and merge(hidden[:1], [[]])[0].shape == (1, 1, 4)


@pytest.mark.parametrize("pooling", ["cls", "mean", "weighted_mean", "eos", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pooling_sees_no_padding_on_either_side(pooling: str, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (1, 4, 2)]
    hidden, valid = torch.full((3, 5, 3), 1e6, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    for m, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(5 - len(row), 5)
        hidden[m, place], valid[m, place] = row, True
    found = pool(hidden, valid, pooling)  # type: ignore[arg-type]
    for row, got in zip(rows, found, strict=True):
        values = row.tolist()
        weights = {"cls": [1, *[0] * 4], "mean": [1] * 5, "weighted_mean": [1, 2, 3, 4, 5]}.get(pooling, [0] * (len(values) - 1) + [1])
        used = weights[: len(values)]
        expected = [sum(w * v[d] for w, v in zip(used, values, strict=True)) / sum(used) for d in range(3)]
        np.testing.assert_allclose(got.tolist(), expected, rtol=1e-12)


def test_a_pooling_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="is none of cls, mean"):
        pool(torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), "attention")


def test_attention_pooling_sees_no_padding() -> None:
    module = AttentionPooling(3)
    torch.nn.init.normal_(module.query, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[True, True, True, False]])
    scores = [math.exp(sum(a * b for a, b in zip(h, module.query.tolist(), strict=True)) / 3**0.5) for h in hidden[0, :3].tolist()]
    expected = sum(s / sum(scores) * h for s, h in zip(scores, hidden[0, :3], strict=True))
    torch.testing.assert_close(module(hidden, valid)[0], expected)


def in_plain_python(table: list[list[float]], count: int, keep: int) -> list[list[float]]:
    """One row at a time: the place between two old rows, or beyond the last."""
    found = [row[:] for row in table[:keep]]
    for p in range(keep, count):
        x = keep + (p - keep) * (len(table) - keep) / (count - keep)
        i = min(int(x), len(table) - 2)
        found.append([a + (x - i) * (b - a) for a, b in zip(table[i], table[i + 1], strict=True)])
    return found


@given(st.integers(3, 30), st.integers(0, 40), st.integers(0, 28))
@settings(deadline=None)
def test_a_stretched_table_is_linear_between_its_rows(known: int, more: int, keep: int) -> None:
    table = torch.randn(known, 4, generator=torch.Generator().manual_seed(known))
    if keep > known - 2:
        with pytest.raises(ValueError, match="leaves none"):
            stretch(table, known + more, keep)
        return
    found = stretch(table, known + more, keep)
    assert found.dtype == table.dtype and torch.equal(found[:keep], table[:keep])
    np.testing.assert_allclose(found.numpy(), np.array(in_plain_python(table.double().tolist(), known + more, keep)), atol=1e-5)
