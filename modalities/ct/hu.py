"""Hounsfield units exactly once: what a volume's histogram says of its units, and when metadata may correct them.

Air is -1000 HU and soft tissue 0 to 80 by definition, so their peaks lie about 1040 apart whatever was added to both. Where the pair
lies tells how often the rescale was applied: air near -1000 once, near 0 (or another usual -intercept) never, near -2000 twice.
The peaks only judge. A volume is changed by metadata or an explicit wish, never by its peaks alone.

Letters: p the air peak, q the soft tissue peak, in the units of the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

HuState = Literal["ok", "not_rescaled", "rescaled_twice", "not_ct", "unknown"]
RescalePolicy = Literal["auto", "apply", "never"]

BIN_HU = 10
SAMPLES = 2**20
"""Voxels that are looked at, spread evenly; a peak of one voxel in a hundred then holds 10,000."""
USUAL_INTERCEPTS = (1000, 1024, 8192, 10240, 32768)
"""-RescaleIntercept of CT scanners: nearly all 1024 or 1000, Siemens' extended scale 8192 or 10240, unsigned 16 bit 32768."""
GAP_HU = (930, 1130)
"""Air to soft tissue: from air of -970 and water to air clipped at -1024 and contrasted blood of 100."""
PEAK_HALF_WIDTH = 60
LEAST_PEAK = 0.015
STANDS_OUT = 2.0
"""How far a peak rises above the mean within 400 on either side; flat noise does not."""
LEAST_VOXELS = 4096
SURE_TISSUE = 0.05
LEAST_BETWEEN = 0.003
"""Lung, fat and partial volume lie between air and tissue in every body; between padding and a body lies nothing."""
MOST_BELOW = 0.003


@dataclass(frozen=True)
class HuVerdict:
    """How often the rescale to HU was applied, as far as the values tell."""

    state: HuState
    evidence: str  # in words; numbers are of the histogram only
    air: float | None = None  # where the air peak lies, in the units of the values
    tissue: float | None = None  # likewise soft tissue


@dataclass(frozen=True)
class _Pair:
    air: float
    tissue: float
    air_share: float
    tissue_share: float
    shift: float  # 0 for HU; what was added to the air peak of HU


def hu_verdict(values: NDArray[Any], padding: tuple[float, float] | None = None) -> HuVerdict:
    """Judge the units of a volume by its air and soft tissue peaks.

    Args:
        values: (S, H, W) or any shape, integer or float; NaN is passed over.
        padding: lowest and highest value that marks voxels outside the scanned field; these are passed over.
    Returns:
        'ok', 'not_rescaled', 'rescaled_twice', 'not_ct' (constant, a mask, an 8-bit picture, normalised intensities), or 'unknown' where
        air or soft tissue cannot be found or several readings fit.
    """
    sample = spread_sample(values)
    sample = sample[np.isfinite(sample)]
    if padding is not None and not (-1100 <= padding[0] <= padding[1] <= 2000):
        sample = sample[(sample < padding[0]) | (sample > padding[1])]
    if sample.size == 0:
        return HuVerdict("not_ct", "no finite voxel outside the padding")
    other = _not_ct(sample)
    if other:
        return HuVerdict("not_ct", other)
    sample = sample[(sample > -40000) & (sample < 70000)]
    if sample.size < LEAST_VOXELS:
        return HuVerdict("unknown", f"{sample.size} voxels from -40000 to 70000, too few for peaks (at least {LEAST_VOXELS})")
    histogram, start = _histogram(sample)
    modes = _modes(histogram, start)
    pairs = _pairs(histogram, start, modes)
    best: dict[HuState, _Pair] = {}
    for pair in pairs:
        state = _reading(pair, histogram, start)
        if state and (state not in best or pair.tissue_share * pair.air_share > best[state].tissue_share * best[state].air_share):
            best[state] = pair
    return _judge(best, modes)


def _judge(best: Mapping[HuState, _Pair], modes: list[tuple[float, float]]) -> HuVerdict:
    """The verdict from the best pair of each reading."""
    if not best:
        found = ", ".join(f"{at:.0f} ({share:.0%})" for at, share in sorted(modes, key=lambda m: -m[1])[:4]) or "none"
        return HuVerdict("unknown", f"no pair of peaks about 1040 apart that could be air and soft tissue; peaks: {found}")
    good = best.get("ok")
    others = [(state, pair) for state, pair in best.items() if state != "ok"]
    if good is not None and all(good.tissue_share >= min(SURE_TISSUE, pair.tissue_share) for _, pair in others):
        return HuVerdict("ok", _words(good), good.air, good.tissue)
    if len(best) > 1:
        listed = "; ".join(f"{state}: {_words(pair)}" for state, pair in best.items())
        return HuVerdict("unknown", f"several readings fit ({listed})")
    state, pair = others[0]
    why = {
        "not_rescaled": f"{_words(pair)}: {pair.shift:.0f} above HU, so the rescale intercept seems not to be applied",
        "rescaled_twice": f"{_words(pair)}: {-pair.shift:.0f} below HU, so the rescale intercept seems to be applied twice",
    }
    return HuVerdict(state, why[state], pair.air, pair.tissue)


def _words(pair: _Pair) -> str:
    return f"air peak at {pair.air:.0f} ({pair.air_share:.0%} of voxels), soft tissue at {pair.tissue:.0f} ({pair.tissue_share:.0%})"


def _not_ct(sample: NDArray[Any]) -> str | None:
    """Why these values are no CT at all, or None."""
    low, high = float(sample.min()), float(sample.max())
    if low == high:
        return f"every voxel is {low:g}"
    whole = sample.dtype.kind in "iu" or bool((sample == np.rint(sample)).all())
    if whole and low >= 0 and high <= 255:
        return f"whole numbers from {low:.0f} to {high:.0f}: a mask or an 8-bit picture"
    if high - low <= 2.5:
        return f"values from {low:.3g} to {high:.3g}: normalised intensities"
    return None


def _histogram(sample: NDArray[Any]) -> tuple[NDArray[np.float64], float]:
    """Shares of the voxels per bin of 10, and where the first bin starts."""
    start = math.floor((float(sample.min()) + BIN_HU / 2) / BIN_HU) * BIN_HU - BIN_HU / 2  # bins are centred on multiples of 10
    index = ((sample.astype(np.float32) - np.float32(start)) / BIN_HU).astype(np.int64)
    return np.bincount(index) / sample.size, start


def _share(histogram: NDArray[np.float64], start: float, low: float, high: float) -> float:
    """Share of voxels from ``low`` to ``high``, in whole bins."""
    first, last = (round((value - start - BIN_HU / 2) / BIN_HU) for value in (low, high))
    return float(histogram[max(first, 0) : max(last + 1, 0)].sum())


def _modes(histogram: NDArray[np.float64], start: float) -> list[tuple[float, float]]:
    """Peaks of the smoothed histogram: where, and the share of voxels within 60 of it."""
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
    padded = np.pad(histogram, 8)
    smooth = np.convolve(padded, kernel / kernel.sum(), mode="same")
    peaks = np.flatnonzero((smooth[1:-1] > smooth[:-2]) & (smooth[1:-1] >= smooth[2:])) + 1
    around = np.convolve(padded, np.full(81, 1 / 81))[40:-40]
    found = [float(start + BIN_HU / 2 + (peak - 8) * BIN_HU) for peak in peaks if smooth[peak] >= STANDS_OUT * around[peak]]
    shares = [(at, _share(histogram, start, at - PEAK_HALF_WIDTH, at + PEAK_HALF_WIDTH)) for at in found]
    return [(at, share) for at, share in shares if share >= LEAST_PEAK]


def _pairs(histogram: NDArray[np.float64], start: float, modes: list[tuple[float, float]]) -> list[_Pair]:
    """Peaks that lie as far apart as air and soft tissue, with a body's partial volume between them."""
    found = []
    for air, air_share in modes:
        for tissue, tissue_share in modes:
            between = _share(histogram, start, air + 80, tissue - 180)
            if GAP_HU[0] <= tissue - air <= GAP_HU[1] and between >= LEAST_BETWEEN:
                found.append(_Pair(air, tissue, air_share, tissue_share, air + 1000))
    return found


def _reading(pair: _Pair, histogram: NDArray[np.float64], start: float) -> HuState | None:
    """What a pair would mean; None where it lies at no usual place or where something lies below its air that is no padding."""
    if abs(pair.shift) <= 70:
        return "ok"
    if not any(abs(abs(pair.shift) - usual) <= 70 for usual in USUAL_INTERCEPTS):
        return None
    low, high = pair.air - 700, pair.air - 130
    below = _share(histogram, start, low, high)
    if below > MOST_BELOW and below - _lone_spikes(histogram, start, low, high) > MOST_BELOW:
        return None
    return "not_rescaled" if pair.shift > 0 else "rescaled_twice"


def _lone_spikes(histogram: NDArray[np.float64], start: float, low: float, high: float) -> float:
    """Share of voxels in bins that stand alone, as a padding value does."""
    first, last = (round((value - start - BIN_HU / 2) / BIN_HU) for value in (low, high))
    total = 0.0
    for index in range(max(first, 0), min(last + 1, len(histogram))):
        around = histogram[max(index - 3, 0) : index + 4].sum() - histogram[index]
        if histogram[index] > MOST_BELOW and around < 0.02 * histogram[index]:
            total += float(histogram[index])
    return total


def spread_sample(values: NDArray[Any]) -> NDArray[Any]:
    """About ``SAMPLES`` values spread evenly over an array, flat."""
    if values.size <= SAMPLES:
        return np.asarray(values).ravel()
    if values.ndim != 3:
        flat = np.asarray(values).reshape(-1)
        return flat[:: -(-flat.size // SAMPLES)]
    ratio = values.size / SAMPLES
    within = min(math.ceil(ratio ** (1 / 3)), 4)
    across = min(math.ceil(ratio / within**2), max(values.shape[0] // 8, 1))
    return np.ascontiguousarray(values[::across, ::within, ::within]).ravel()


def needs_rescale(
    values: NDArray[Any], rescale: tuple[float, float] | None, policy: RescalePolicy, padding: tuple[float, float] | None = None
) -> tuple[bool, str | None]:
    """Whether ``rescale`` is still to be applied to ``values``, and what to record about it.

    'auto' tries both: it applies the metadata's rescale only where the values are not in HU as they are and would be after it.

    Args:
        values: the volume as it is, or a sample of it.
        rescale: (slope, intercept) of the metadata: HU = slope * value + intercept; None if there is none.
        policy: 'auto', 'apply' (always) or 'never'.
        padding: as in :func:`hu_verdict`.
    Returns:
        whether to apply, and a note for repairs (applied) or warnings (not applied).
    Raises:
        ValueError: 'auto' cannot tell, or 'apply' without a rescale.
    """
    if rescale is None:
        if policy == "apply":
            raise ValueError("rescale_policy='apply' needs rescale=(slope, intercept)")
        return False, None
    slope, intercept = rescale
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise ValueError(
            f"the metadata's rescale is slope {slope:g} and intercept {intercept:g}; expected finite numbers and a slope not 0"
        )
    named = f"slope {slope:g} and intercept {intercept:g} of the metadata"
    if policy == "never" or (slope, intercept) == (1, 0):
        return False, None
    if policy == "apply":
        return True, f"rescaled by {named}, as asked"
    sample = spread_sample(values)
    before = hu_verdict(sample, padding)
    after = hu_verdict(sample.astype(np.float32) * np.float32(slope) + np.float32(intercept))
    if before.state == "ok" and after.state != "ok":
        return False, f"already in HU ({before.evidence}); {named} not applied again"
    if after.state == "ok" and before.state != "ok":
        return True, f"rescaled by {named}: stored values were not in HU ({before.evidence})"
    both = "both with and without" if before.state == "ok" else "neither with nor without"
    raise ValueError(
        f"cannot tell whether {named} are applied already: {both} them the values look like HU ({before.evidence}). "
        "Pass rescale_policy='apply' or 'never'"
    )


def rescale_from_metadata(row: Mapping[str, Any]) -> tuple[float, float]:
    """(slope, intercept) from a row of a CT-RATE metadata table, columns ``RescaleSlope`` and ``RescaleIntercept``.

    CT-RATE's first release holds stored values that need them, its second HU; ``rescale_policy='auto'`` tells which is which.

    Raises:
        ValueError: a column is missing or no number; the message names columns only.
    """
    found = []
    for column in ("RescaleSlope", "RescaleIntercept"):
        try:
            number = float(str(row[column]).strip())
        except (KeyError, ValueError):
            raise ValueError(f"column {column} is missing or holds no number; expected a CT-RATE metadata row") from None
        if not math.isfinite(number):
            raise ValueError(f"column {column} holds no finite number; expected a CT-RATE metadata row")
        found.append(number)
    if found[0] == 0:
        raise ValueError("column RescaleSlope is 0; expected a CT-RATE metadata row")
    return found[0], found[1]
