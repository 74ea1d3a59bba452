"""Batches balanced by findings and by patients: chances, lengths, shares, and what follows from seed and epoch alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.data.sampling import BalancedBatches, apart, capped
from medvl.data.studies import generator


def test_chances_follow_the_caps():
    findings = [("effusion",)] * 6 + [("effusion", "nodule")] * 2 + [()] * 12
    chances = capped(findings, 3)
    assert chances[:6] == pytest.approx(3 / 8) and chances[6:8] == pytest.approx(1)  # two nodules: each finding below its cap
    assert chances[8:] == pytest.approx(3 / 12)
    assert capped(findings, 100) == pytest.approx(1)
    both = capped([("a", "b")] * 4, 2)
    assert both == pytest.approx(1 - (1 - 0.5) ** 2)
    with pytest.raises(ValueError, match="cap is 0"):
        capped(findings, 0)


def test_each_item_comes_as_often_as_its_chance_and_an_epoch_has_one_length():
    chances = np.array([1.0, 0.75, 0.5, 0.25, 0.25, 0.25])
    plan = BalancedBatches(chances, None, 6, 1, seed=4)
    seen = np.zeros(6)
    epochs = 3000
    for epoch in range(epochs):
        plan.set_epoch(epoch)
        order = plan.order()
        assert len(order) == len(set(order.tolist())) == len(plan) == 3
        seen[order] += 1
    assert seen[0] == epochs
    assert np.abs(seen / epochs - chances).max() < 5 * math.sqrt(0.25 / epochs)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 6))
@settings(deadline=None)
def test_patients_are_apart_while_there_are_others(patients, size):
    order = generator(0, "test").permutation(len(patients))
    found = apart(order, patients, size)
    assert sorted(found.tolist()) == list(range(len(patients)))
    for start in range(0, len(found), size):
        batch = [patients[i] for i in found[start : start + size]]
        rest = {patients[i] for i in found[start:]}  # what could have been chosen
        assert len(set(batch)) == min(len(batch), len(rest))


def test_without_repeats_the_order_is_the_shuffle():
    order = generator(1, "test").permutation(12)
    assert np.array_equal(apart(order, list(range(12)), 4), order)


def test_batches_are_shared_and_resumed_like_others():
    chances, patients = capped([("a",)] * 20 + [("b",)] * 4, 5), [i // 2 for i in range(24)]

    def plan(**more):
        return BalancedBatches(chances, patients, 24, 2, seed=2, **more)

    whole = BalancedBatches(chances, patients, 24, 4, seed=2)
    batches = [[d.index for d in batch] for batch in whole]
    assert len(batches) == 2 == len(whole)  # 5 + 4 of 24
    for batch in batches:
        assert len({patients[i] for i in batch}) == 4
    for rank in (0, 1):
        shares = list(plan(rank=rank, world_size=2))
        assert [[d.index for d in batch] for batch in shares] == batches
        assert all([d.words_only for d in batch] == [rank == 1, rank == 1, rank == 0, rank == 0] for batch in shares)
    whole.start = 1
    assert [[d.index for d in batch] for batch in whole] == batches[1:]
    whole.set_epoch(1)
    assert [[d.index for d in batch] for batch in whole] != batches
