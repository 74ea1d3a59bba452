"""Centring, CSLS and hubness against loops over vectors in double precision, and on spaces made with a gap and with hubs."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.metrics import (
    centre,
    centred,
    csls,
    hubness_of,
    k_occurrences,
    measure_hubness,
    modality_gap,
    neighbour_similarity,
    ranking_metrics,
)


def cosine(x: Any, y: Any) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / math.sqrt(
        sum(float(a) ** 2 for a in x) * sum(float(b) ** 2 for b in y)
    )


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return 3 * generator.normal(size=(30, 6)) + 1, generator.normal(size=(45, 6)) - 0.5


def plain_neighbours(vectors: np.ndarray, reference: np.ndarray, k: int) -> list[float]:
    return [fmean(sorted((cosine(x, y) for y in reference), reverse=True)[:k]) for x in vectors]


@pytest.mark.parametrize("k", [1, 4, 45])
def test_neighbour_similarity_and_csls_equal_a_loop(vectors: Any, k: int) -> None:
    queries, gallery = vectors
    back = min(k, 30)
    query_mean, gallery_mean = neighbour_similarity(queries, gallery, k), neighbour_similarity(gallery, queries, back)
    expected, expected_back = plain_neighbours(queries, gallery, k), plain_neighbours(gallery, queries, back)
    assert query_mean.tolist() == pytest.approx(expected, abs=1e-12)
    assert gallery_mean.tolist() == pytest.approx(expected_back, abs=1e-12)
    similarity = np.array([[cosine(x, y) for y in gallery] for x in queries])
    got = csls(similarity, query_mean, gallery_mean)
    assert [got[i, j] for i, j in itertools.product(range(30), range(45))] == pytest.approx(
        [2 * cosine(queries[i], gallery[j]) - expected[i] - expected_back[j] for i, j in itertools.product(range(30), range(45))], abs=1e-12
    )


def test_centring_equals_a_loop_and_takes_the_gap_away(vectors: Any) -> None:
    queries, gallery = vectors
    units = [[float(v) / math.sqrt(sum(float(w) ** 2 for w in row)) for v in row] for row in queries]
    mean = [fmean(column) for column in zip(*units, strict=True)]
    assert centre(queries).tolist() == pytest.approx(mean, abs=1e-12)
    for row, unit in zip(centred(queries, centre(queries)), units, strict=True):
        moved = [v - m for v, m in zip(unit, mean, strict=True)]
        assert row.tolist() == pytest.approx([v / math.sqrt(sum(w * w for w in moved)) for v in moved], abs=1e-12)
    assert modality_gap(queries, gallery) == pytest.approx(math.dist(centre(queries), centre(gallery)))
    assert modality_gap(queries, queries * 7) == pytest.approx(0, abs=1e-12)  # lengths do not count


def two_cones(generator: np.random.Generator, n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that share a direction, each modality in a cone of its own."""
    shared = generator.normal(size=(n, width))
    return (
        shared + 0.8 * generator.normal(size=(n, width)) + 3 * generator.normal(size=width),
        shared + 0.8 * generator.normal(size=(n, width)) + 3 * generator.normal(size=width),
    )


def test_centring_closes_the_gap_of_two_cones_and_keeps_the_pairs() -> None:
    image, text = two_cones(np.random.default_rng(1), 300, 32)
    moved = centred(image, centre(image)), centred(text, centre(text))
    assert modality_gap(image, text) > 1 and modality_gap(*moved) < 0.1
    own = np.eye(300, dtype=bool)
    before, after = (
        ranking_metrics(
            (x / np.linalg.norm(x, axis=1)[:, None]) @ y.T / np.linalg.norm(y, axis=1), own, [1], range(300), rule="strict", repeats=0
        )
        for x, y in ((image, text), moved)
    )
    assert after.metrics["recall@1"].value > before.metrics["recall@1"].value


def test_csls_takes_hubs_out_of_a_gallery_that_has_them() -> None:
    generator = np.random.default_rng(2)
    items = generator.normal(size=(200, 24))
    items[:5] = 0.3 * items[:5] + 1  # near the mean of all queries
    queries = items[generator.integers(5, 200, size=600)] + generator.normal(size=(600, 24)) + 0.7
    fitted, measured = queries[:300], queries[300:]
    plain = measure_hubness(measured, items, 5)
    corrected = measure_hubness(measured, items, 5, neighbour_similarity(items, fitted, 10))
    assert plain.skewness > 5, "the gallery was made to have hubs"
    assert corrected.skewness < plain.skewness and corrected.largest < 0.6 * plain.largest and corrected.never < plain.never
    assert plain.occurrences.sum() == pytest.approx(300 * 5) == corrected.occurrences.sum()


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_k_occurrences_are_the_mean_over_all_orders_of_ties(queries: int, items: int, k: int, rng: Any) -> None:
    k = min(k, items)
    scores = [[float(rng.randrange(3)) for _ in range(items)] for _ in range(queries)]
    expected = [0.0] * items
    for row in scores:
        orders = [o for o in itertools.permutations(range(items)) if all(row[a] >= row[b] for a, b in itertools.pairwise(o))]
        for order in orders:
            for i in order[:k]:
                expected[i] += 1 / len(orders)
    assert k_occurrences(np.array(scores), k).tolist() == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_skewness_is_the_third_moment(counts: list[int]) -> None:
    got = hubness_of(np.array(counts, dtype=float), 3, 10)
    mean = fmean(counts)
    spread = math.sqrt(fmean((n - mean) ** 2 for n in counts))
    assert got.skewness == pytest.approx(fmean((n - mean) ** 3 for n in counts) / spread**3 if len(set(counts)) > 1 else 0.0, abs=1e-9)
    assert (got.never, got.largest, got.k) == (counts.count(0) / len(counts), max(counts) / 10, 3)


def test_chunks_and_single_precision_do_not_move_a_result(vectors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery = vectors

    def everything(x: Any, y: Any) -> list[Any]:
        found = measure_hubness(x, y, 3)
        return [
            neighbour_similarity(x, y, 3),
            neighbour_similarity(y, x, 3),
            centre(y),
            centred(y, centre(y)).ravel(),
            found.occurrences,
            [found.skewness, modality_gap(x, y)],
        ]

    whole = everything(queries, gallery)
    single = everything(queries.astype(np.float32), gallery.astype(np.float32))
    monkeypatch.setattr("medvl.metrics.hubness._CELLS", 100)
    for one, other, small in zip(whole, everything(queries, gallery), single, strict=True):
        assert np.asarray(other) == pytest.approx(np.asarray(one), abs=1e-12)
        assert np.asarray(small) == pytest.approx(np.asarray(one), abs=1e-5)
    assert centred(gallery.astype(np.float32), centre(gallery)).dtype == np.float32


def test_a_memory_map_is_as_good_as_an_array(vectors: Any, tmp_path: Any) -> None:
    queries, gallery = vectors
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    assert neighbour_similarity(mapped, queries, 3).tolist() == neighbour_similarity(gallery, queries, 3).tolist()
    assert centred(mapped, centre(mapped)).tolist() == centred(gallery, centre(gallery)).tolist()


def test_a_large_gallery_is_worked_through_in_chunks() -> None:
    """150,000 x 400 cosines are 240 MB; what is held beside the vectors is a sixth of that."""
    generator = np.random.default_rng(3)
    gallery, queries = generator.normal(size=(150_000, 16)).astype(np.float32), generator.normal(size=(400, 16)).astype(np.float32)
    tracemalloc.start()
    means = neighbour_similarity(gallery, queries, 10)
    found = measure_hubness(queries, gallery, 10, means)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.occurrences.sum() == pytest.approx(4000)
    assert peak < 80e6


def test_half_precision_is_computed_in_single(vectors: Any) -> None:
    queries, gallery = (rows.astype(np.float16) for rows in vectors)
    expected = neighbour_similarity(queries.astype(np.float64), gallery.astype(np.float64), 3)
    assert neighbour_similarity(queries, gallery, 3) == pytest.approx(expected, abs=1e-5)
    assert centre(gallery) == pytest.approx(centre(gallery.astype(np.float64)), abs=1e-5)


def test_what_has_no_direction_or_does_not_fit_is_refused(vectors: Any) -> None:
    queries, gallery = vectors
    broken = gallery.copy()
    broken[7] = 0
    for call in (
        lambda: centre(broken),
        lambda: neighbour_similarity(queries, broken, 2),
        lambda: neighbour_similarity(broken, queries, 2),
        lambda: measure_hubness(queries, broken, 2),
        lambda: modality_gap(queries, broken),
        lambda: centred(broken, np.ones(6)),
    ):
        with pytest.raises(ValueError, match="vector 7 "):
            call()
    with pytest.raises(ValueError, match="vector 0 "):
        centred(np.eye(6), np.eye(6)[0])
    for k in (0, 46):
        with pytest.raises(ValueError, match="k must be 1 to the 45"):
            neighbour_similarity(queries, gallery, k)
        with pytest.raises(ValueError, match="1 to the"):
            k_occurrences(np.zeros((3, 45)), k)
    for call in (
        lambda: neighbour_similarity(queries, gallery[:, :3], 2),
        lambda: modality_gap(queries, gallery[:, :3]),
        lambda: centred(queries, np.ones(3)),
    ):
        with pytest.raises(ValueError, match="differ in width"):
            call()
    with pytest.raises(ValueError, match="at least one"):
        centre(np.zeros((0, 6)))
    with pytest.raises(ValueError, match="NaN in query row 1"):
        k_occurrences(np.array([[0.0, 1], [math.nan, 1]]), 1)
    with pytest.raises(ValueError, match="a mean a row"):
        csls(np.zeros((2, 3)), np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="at least one of each"):
        hubness_of(np.zeros(0), 1, 1)
