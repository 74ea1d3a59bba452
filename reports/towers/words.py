"""Words of a text as character spans, and the vectors of word pieces merged to those of words.

Offsets are characters (Python string indices) of the text that was given, end exclusive. Words do not depend on a tokenizer: a run of
letters and digits, a number with its decimals, or one other sign. Shapes: M texts, L tokens, W width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

_REACH, _SURE = 40, 4
"""How many characters apart, both texts together, two places may be that belong together again, and how many must agree there: two after
one character, more after more."""

Span = tuple[int, int]
Group = tuple[int, ...]

_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s]")


def word_spans(text: str) -> tuple[Span, ...]:
    """(start, end) of every word in order: "Nodule, 1.5 cm." has Nodule / , / 1.5 / cm / . as its five words."""
    return tuple(match.span() for match in _WORD.finditer(text))


def overlapping(spans: Sequence[Span], start: int, end: int) -> tuple[int, ...]:
    """Indices of the spans that share a character with [start, end): where the vectors of a phrase are among the tokens of its text."""
    return tuple(i for i, (first, last) in enumerate(spans) if start < end and first < end and start < last)


def origins(text: str, cleaned: str) -> list[int]:
    """For every character of ``cleaned`` the index in ``text`` that it came from, never falling; ``len(text)`` at the end is one more.

    Runs of white space made one, and small letters for capitals, are followed exactly. What else a cleaning did (entities, accents) is
    passed over to where the two next agree for a few characters, no further than a bound away; a character that came from none gets the
    place of the one before it. The time grows with the length alone, whatever the texts.
    """
    kept = [i for i, c in enumerate(text) if not c.isspace() or (i > 0 and not text[i - 1].isspace())]
    while kept and text[kept[-1]].isspace():
        kept.pop()
    if len(kept) == len(cleaned) and all(_same(text[i], c) for i, c in zip(kept, cleaned, strict=True)):
        return [*kept, len(text)]
    places, i, last = list[int](), 0, 0
    while len(places) < len(cleaned):
        j = len(places)
        if not _agree(text, i, cleaned, j, 1):
            skipped, made = _apart(text, i, cleaned, j)
            places += [last] * min(made, len(cleaned) - j)
            i += skipped
            continue
        last = min(i, len(text) - 1)
        places.append(last)
        i += 1
    return [*places, len(text)]


def _apart(text: str, i: int, cleaned: str, j: int) -> tuple[int, int]:
    """How many characters from ``i`` and ``j`` on lie before the nearest place where the two agree; one each if none is near."""
    ways = ((skipped, n - skipped) for n in range(1, _REACH) for skipped in range(n, -1, -1))
    return next(((s, m) for s, m in ways if _agree(text, i + s, cleaned, j + m, min(s + m + 1, _SURE))), (1, 1))


def _agree(text: str, i: int, cleaned: str, j: int, count: int) -> bool:
    """Whether ``count`` characters from ``i`` and ``j`` on are the same, or as many as ``cleaned`` still has and at least one."""
    rest = min(count, len(cleaned) - j)
    return 0 < rest <= len(text) - i and all(_same(text[i + k], cleaned[j + k]) for k in range(rest))


def _same(original: str, cleaned: str) -> bool:
    return original == cleaned or original.lower() == cleaned or (original.isspace() and cleaned == " ")


def pieces_of_words(pieces: Sequence[Span], words: Sequence[Span]) -> tuple[tuple[Span, ...], tuple[Group, ...]]:
    """The words that a tokenizer's pieces reach, and for each the indices of the pieces that share a character with it.

    A piece may reach several words (")."). Words that were cut away with the end of a text have no piece and are left out.

    Args:
        pieces: spans in order, empty ones for special tokens.
        words: spans in order that do not overlap.
    """
    found: list[list[int]] = [[] for _ in words]
    first = 0
    for index, (start, end) in enumerate(pieces):
        if start >= end:
            continue
        while first < len(words) and words[first][1] <= start:
            first += 1
        for word in range(first, len(words)):
            if words[word][0] >= end:
                break
            found[word].append(index)
    reached = [i for i, group in enumerate(found) if group]
    return tuple(words[i] for i in reached), tuple(tuple(found[i]) for i in reached)


def merge(hidden: Tensor, groups: Sequence[Sequence[Group]]) -> tuple[Tensor, Tensor]:
    """The mean of each group of tokens, (M, N, W), and (M, N) bool, False on padding; N is the largest number of groups, at least 1.

    Args:
        hidden: (M, L, W).
        groups: for each text, for each of its words, the indices of its tokens.
    """
    count = max([1, *map(len, groups)])
    places = [
        (text, token, text * count + word) for text, words in enumerate(groups) for word, group in enumerate(words) for token in group
    ]
    texts, tokens, words = torch.tensor(places, dtype=torch.long, device=hidden.device).reshape(-1, 3).T
    sums = hidden.new_zeros(len(groups) * count, hidden.shape[-1]).index_add(0, words, hidden[texts, tokens])
    sizes = torch.bincount(words, minlength=len(groups) * count)
    merged = sums / sizes.clamp_min(1)[:, None].to(hidden.dtype)
    return merged.view(len(groups), count, hidden.shape[-1]), (sizes > 0).view(len(groups), count)
