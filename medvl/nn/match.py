"""How alike two representations of the same things are, before any training: centred kernel alignment and mutual nearest neighbours.

Shapes: N things (studies), P and Q widths of the two representations, R permutations. All in float64. Both measures are blind to rotation
and scale, so the widths need not agree and no projection stands between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
FEWEST = 4  # below it the unbiased estimate divides by zero


@dataclass(frozen=True)
class Chance:
    """What a measure is where the pairing is by chance."""

    mean: float
    upper: float  # 95 % of permutations are below
    p_value: float  # share of permutations, the pairing itself counted as one, that are at least as high


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Centred kernel alignment with linear kernels, in [0, 1]; with few things and wide features it is high whatever they are.

        CKA = |Xc' Yc|^2 / (|Xc' Xc| |Yc' Yc|),   Xc, Yc the columns less their means, Frobenius norms

    Args:
        x: (N, P).
        y: (N, Q).
    Returns:
        NaN where one of the two is constant.
    Raises:
        ValueError: lengths that differ, fewer than 4 rows, numbers that are not finite.
    Source: Kornblith et al., arXiv:1905.00414, section 3.
    """
    a, b = _centred(*_checked(x, y))
    return _ratio(float(np.sum((a.T @ b) ** 2)), math.sqrt(np.sum((a.T @ a) ** 2) * np.sum((b.T @ b) ** 2)))


def debiased_linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """:func:`linear_cka` from unbiased estimates of the three products, so that it is 0 on average where nothing is shared.

    With K = X X' and L = Y Y', their diagonals put to 0, and U(K) as :func:`u_centred` has it:
        CKA = <U(K), U(L)> / sqrt(<U(K), U(K)> <U(L), U(L)>)
    It lies in [-1, 1].

    Args, Returns, Raises: of :func:`linear_cka`.
    Source: unbiased HSIC of Song et al., JMLR 13 (2012), eq. 5, in the CKA of Kornblith et al.; U-centring of Szekely and Rizzo,
        doi:10.1214/14-AOS1255.
    """
    return _alignment(*map(u_centred, _kernels(x, y)))


def u_centred(kernel: Matrix) -> Matrix:
    """The (N, N) kernel with row and column means taken off so that products of two are unbiased; its diagonal is 0.

    With r_i the sum of row i and t of all, the diagonal left out:
        U_ij = K_ij - (r_i + r_j) / (N - 2) + t / ((N - 1) (N - 2))
    """
    n = len(kernel)
    bare = kernel - np.diag(np.diag(kernel))
    rows = bare.sum(1)
    centred = bare - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0.0)
    return centred


def cka_interval(x: ArrayLike, y: ArrayLike, groups: int = 20) -> tuple[float, float]:
    """95 % interval of :func:`debiased_linear_cka`: value -+ 1.96 standard errors of the delete-a-group jackknife.

    Rows i, i + groups, ... are left out together, so rows should be in random order. A bootstrap would count a row that was drawn twice
    as its own neighbour.

    Raises:
        ValueError: of :func:`linear_cka`, or groups that leave too few rows.
    Source: Wolter, Introduction to Variance Estimation, 2007, section 4.2.
    """
    k, l = _kernels(x, y)  # noqa: E741 (the letters of the formula)
    n = len(k)
    groups = min(groups, n)
    if groups < 2 or n - -(-n // groups) < FEWEST:
        raise ValueError(f"{n} rows in {groups} groups: expected two groups or more, and {FEWEST} rows without the largest")
    value = _alignment(u_centred(k), u_centred(l))
    without = []
    for group in range(groups):
        kept = np.arange(n) % groups != group
        without.append(_alignment(u_centred(k[np.ix_(kept, kept)]), u_centred(l[np.ix_(kept, kept)])))
    spread = np.array(without) - np.mean(without)
    error = math.sqrt((groups - 1) / groups * float(spread @ spread))
    return value - 1.96 * error, value + 1.96 * error


def cka_by_chance(x: ArrayLike, y: ArrayLike, repeats: int = 200, seed: int = 0) -> Chance:
    """:func:`debiased_linear_cka` of rows that are paired at random.

    Raises:
        ValueError: of :func:`linear_cka`.
    """
    u, v = (u_centred(kernel) for kernel in _kernels(x, y))
    norm = math.sqrt(float(np.sum(u * u) * np.sum(v * v)))
    return _chance(u, v, repeats, seed, norm)


def neighbours(x: ArrayLike, k: int) -> NDArray[np.bool_]:
    """(N, N): whether row j is among the ``k`` rows of highest cosine with row i, itself left out; of equal ones the earlier row.

    Raises:
        ValueError: k below 1 or above N - 1.
    """
    rows = np.asarray(x, dtype=np.float64)
    if not 1 <= k < len(rows):
        raise ValueError(f"{k} neighbours of {len(rows)} rows: expected 1 to {len(rows) - 1}")
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    found = np.zeros(cosines.shape, dtype=bool)
    np.put_along_axis(found, nearest, True, axis=1)
    return found


def mutual_neighbours(x: ArrayLike, y: ArrayLike, k: int = 10) -> NDArray[np.float64]:
    """(N,): the share of a row's ``k`` nearest rows in one representation that are so in the other too. Its mean is the measure.

    By chance it is k / (N - 1).

    Raises:
        ValueError: of :func:`linear_cka` and :func:`neighbours`.
    Source: "The Platonic Representation Hypothesis", arXiv:2405.07987, eq. 11.
    """
    a, b = _checked(x, y)
    shared: NDArray[np.float64] = (neighbours(a, k) & neighbours(b, k)).sum(1) / k
    return shared


def mutual_neighbours_by_chance(x: ArrayLike, y: ArrayLike, k: int = 10, repeats: int = 200, seed: int = 0) -> Chance:
    """The mean of :func:`mutual_neighbours` of rows that are paired at random.

    Raises:
        ValueError: of :func:`mutual_neighbours`.
    """
    a, b = _checked(x, y)
    return _chance(neighbours(a, k).astype(np.float64), neighbours(b, k).astype(np.float64), repeats, seed, norm=k * len(a))


def _chance(a: Matrix, b: Matrix, repeats: int, seed: int, norm: float) -> Chance:
    """Of <a, b> / norm, rows and columns of b permuted alike."""
    if repeats < 1:
        raise ValueError(f"{repeats} permutations, expected at least 1")
    rng = np.random.default_rng(seed)
    observed = float(np.vdot(a, b))
    drawn = np.array([np.vdot(a, b[np.ix_(order, order)]) for order in (rng.permutation(len(a)) for _ in range(repeats))])
    at_least = int(np.sum(drawn >= observed - 1e-12 * abs(observed)))
    return Chance(_ratio(float(drawn.mean()), norm), _ratio(float(np.quantile(drawn, 0.95)), norm), (1 + at_least) / (1 + repeats))


def _alignment(u: Matrix, v: Matrix) -> float:
    return _ratio(float(np.vdot(u, v)), math.sqrt(float(np.vdot(u, u) * np.vdot(v, v))))


def _ratio(value: float, norm: float) -> float:
    return value / norm if norm > 0 else math.nan


def _kernels(x: ArrayLike, y: ArrayLike) -> tuple[Matrix, Matrix]:
    a, b = _centred(*_checked(x, y))  # the mean of the rows moves no U-centred kernel, and costs digits
    return a @ a.T, b @ b.T


def _centred(x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    return x - x.mean(0), y - y.mean(0)


def _checked(x: ArrayLike, y: ArrayLike) -> tuple[Matrix, Matrix]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < FEWEST:
        raise ValueError(f"features have shapes {a.shape} and {b.shape}; expected (N, P) and (N, Q) with N at least {FEWEST}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold numbers that are not finite")
    return a, b
