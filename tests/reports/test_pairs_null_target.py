"""The null image: one more row that texts without content belong to, in every similarity, and nothing where there are none."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from medvl.data.studies import StudyBatch
from medvl.losses import info_nce_of_logits
from medvl.nn.similarity import PooledSimilarity, SliceSimilarity, TokenSimilarity
from medvl.training.module import with_null_image, with_null_row
from medvl.types import ImageBatch, ImageFeatures, Similarity, TextBatch, TextFeatures


def features(rng: torch.Generator) -> ImageFeatures:
    return ImageFeatures(
        torch.randn(3, 8, generator=rng),
        tokens=torch.randn(3, 4, 8, generator=rng),
        grid=(2, 2),
        token_valid=torch.tensor([[True, True, True, False], [True] * 4, [True, True, False, False]]),
        slices=torch.randn(3, 5, 8, generator=rng),
        slice_weights=torch.full((3, 5), 0.2),
        slice_valid=torch.ones(3, 5, dtype=torch.bool),
    )


@pytest.mark.parametrize("similarity", [PooledSimilarity(), TokenSimilarity(), SliceSimilarity()])
def test_the_null_image_is_its_vector_in_every_part_and_moves_no_other_row(similarity: Similarity) -> None:
    rng = torch.Generator().manual_seed(0)
    images, texts, null = features(rng), TextFeatures(torch.randn(6, 8, generator=rng)), torch.randn(8, generator=rng)
    before, after = similarity.logits(images, texts), similarity.logits(with_null_image(images, null), texts)
    for name, logits in before.items():
        torch.testing.assert_close(after[name][:3], logits)
        expected = cosine_similarity(null[None], texts.pooled) / 0.07  # a mean or maximum over equal tokens is the token
        torch.testing.assert_close(after[name][3], expected, rtol=1e-4, atol=1e-4)


def a_batch(positives: list[list[int]], null: list[int] | None, ignore: list[list[int]] | None = None) -> StudyBatch:
    return StudyBatch(
        ImageBatch(torch.zeros(len(positives), 1, 2, 2)),
        TextBatch(tuple(f"text {j}" for j in range(len(positives[0])))),
        torch.tensor(positives, dtype=torch.bool),
        tuple(range(len(positives))),
        ignore=None if ignore is None else torch.tensor(ignore, dtype=torch.bool),
        null_texts=None if null is None else torch.tensor(null, dtype=torch.bool),
    )


def test_null_texts_are_positives_of_the_null_image_alone() -> None:
    positives, ignore = with_null_row(a_batch([[1, 0, 1], [0, 1, 1]], [0, 0, 1], [[0, 1, 0], [0, 0, 0]]))
    assert positives.tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    assert ignore.tolist() == [[False, True, False], [False, False, False], [False, False, False]]


def test_without_null_texts_the_loss_is_that_without_a_null_image() -> None:
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for null in (None, [0, 0, 0]):
        batch = a_batch([[1, 0, 1], [0, 1, 0]], null)
        positives, ignore = with_null_row(batch)
        assert info_nce_of_logits(logits, positives, ignore).item() == pytest.approx(
            info_nce_of_logits(logits[:2], batch.positives).item(), rel=1e-12
        )


def test_a_study_of_which_nothing_else_was_drawn_is_left_out() -> None:
    positives, ignore = with_null_row(a_batch([[1, 0], [0, 1]], [0, 1]))
    assert ignore.tolist() == [[False, False], [True, True], [False, False]]
    leaf = torch.zeros(3, 2, requires_grad=True)
    info_nce_of_logits(leaf, positives, ignore).backward()
    assert (leaf.grad[1] == 0).all() and (leaf.grad[2] != 0).any()
