"""Texts of several batches joined, against lists of each text's own tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.types import TextFeatures, join_texts

D = 3


def batch(lengths: list[int], longest: int, marked: bool, seed: int) -> TextFeatures:
    """Texts of so many words each, padded to ``longest`` with what must not be seen."""
    rng = torch.Generator().manual_seed(seed)
    valid = torch.arange(longest) < torch.tensor(lengths, dtype=torch.long)[:, None]
    tokens = torch.randn(len(lengths), longest, D, generator=rng).masked_fill(~valid[..., None], torch.nan)
    concepts = torch.randint(-1, 3, valid.shape, generator=rng).masked_fill(~valid, -1)
    pooled = torch.randn(len(lengths), D, generator=rng)
    return TextFeatures(pooled, tokens, None if valid.all() else valid, concepts if marked else None)


def words_of(texts: TextFeatures) -> list[tuple[list[list[float]], list[int] | None]]:
    """For each text its words and their concepts."""
    valid = torch.ones(texts.tokens.shape[:2], dtype=torch.bool) if texts.token_valid is None else texts.token_valid
    marks = [None] * len(valid) if texts.concepts is None else [row[seen].tolist() for row, seen in zip(texts.concepts, valid, strict=True)]
    return [(row[seen].tolist(), mark) for row, seen, mark in zip(texts.tokens, valid, marks, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4), st.integers(0, 2), st.booleans(), st.integers(0, 9))
def test_every_text_keeps_its_words_in_order(lengths: list[list[int]], spare: int, marked: bool, seed: int) -> None:
    parts = [batch(one, max([1, *one]) + (spare if i % 2 else 0), marked, seed + i) for i, one in enumerate(lengths)]
    joined = join_texts(parts)
    assert words_of(joined) == [words for part in parts for words in words_of(part)]
    assert torch.equal(joined.pooled, torch.cat([part.pooled for part in parts]))
    assert (joined.concepts is None) == (not marked)
    assert joined.tokens.shape[1] == max(part.tokens.shape[1] for part in parts)


def test_joining_undoes_rows_and_adds_no_mask_where_nothing_is_padded() -> None:
    whole = TextFeatures(torch.randn(5, D), torch.randn(5, 4, D))
    again = join_texts([whole.rows(0, 2), whole.rows(2, 2), whole.rows(2, 5)])
    assert again.token_valid is None and again.concepts is None
    assert torch.equal(again.tokens, whole.tokens) and torch.equal(again.pooled, whole.pooled)


def test_texts_without_tokens_are_joined_too() -> None:
    parts = [TextFeatures(torch.randn(2, D)), TextFeatures(torch.randn(1, D))]
    joined = join_texts(parts)
    assert torch.equal(joined.pooled, torch.cat([one.pooled for one in parts])) and joined.tokens is None and joined.token_valid is None


def test_every_token_gets_its_gradient() -> None:
    short, long = torch.randn(2, 1, D, requires_grad=True), torch.randn(1, 3, D, requires_grad=True)
    joined = join_texts([TextFeatures(torch.zeros(2, D), short), TextFeatures(torch.zeros(1, D), long)])
    joined.tokens.sum().backward()
    assert torch.equal(short.grad, torch.ones(2, 1, D)) and torch.equal(long.grad, torch.ones(1, 3, D))


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(ValueError, match="no texts"):
        join_texts([])
    plain, worded = TextFeatures(torch.ones(1, D)), TextFeatures(torch.ones(1, D), torch.ones(1, 2, D))
    with pytest.raises(ValueError, match=r"tokens is there in some batches only"):
        join_texts([worded, plain])
    with pytest.raises(ValueError, match=r"concepts is there in some batches only"):
        join_texts([worded, TextFeatures(worded.pooled, worded.tokens, None, torch.zeros(1, 2, dtype=torch.long))])
