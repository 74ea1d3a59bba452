"""Concordance against Somers' D of scipy, pairs one at a time, and the AUROC of two levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import somersd
from sklearn.metrics import roc_auc_score

from medvl.metrics import concordance_statistic

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=20)


@given(ROWS)
def test_weighted_pairs_are_those_of_a_loop(rows: list[tuple[int, int, int]]) -> None:
    levels, scores, weights = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    top = bottom = 0.0
    for i in range(len(rows)):
        for j in range(len(rows)):
            if levels[i] > levels[j]:
                bottom += weights[i] * weights[j]
                top += weights[i] * weights[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    got = concordance_statistic(levels, scores).of_weights(weights[None])[0]
    assert np.isnan(got) if bottom == 0 else got == pytest.approx(top / bottom)


def test_it_is_somers_d_and_of_two_levels_the_auroc() -> None:
    rng = np.random.default_rng(0)
    levels, scores = rng.integers(0, 3, 80), rng.normal(size=80).round(1)
    assert concordance_statistic(levels, scores).value == pytest.approx((somersd(levels, scores).statistic + 1) / 2)
    two = levels > 0
    assert concordance_statistic(two, scores).value == pytest.approx(roc_auc_score(two, scores))


def test_rows_without_a_level_do_not_count_and_a_score_must_be_there() -> None:
    statistic = concordance_statistic([0, 1, np.nan], [0.1, 0.2, np.nan])
    assert statistic.value == 1.0 and statistic.used.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="NaN score"):
        concordance_statistic([0, 1], [0.1, np.nan])
    with pytest.raises(ValueError, match=r"both must be \(N,\)"):
        concordance_statistic([0, 1], [0.1])
