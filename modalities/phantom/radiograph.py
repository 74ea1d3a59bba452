"""The radiograph of a phantom: Beer-Lambert along diverging rays, scatter, blur, quanta, logarithm, display processing, 12 bits.

Letters: R rows, C columns of the image; u, v detector coordinates in mm; m magnification of a plane. Images are bright where the
patient is dense (MONOCHROME2 sense). PA and AP are shown with the patient's left at the right; laterals with the front at the left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modalities.phantom.anatomy import cage_profile
from modalities.phantom.chest import Phantom
from modalities.phantom.grid import Bool, Float, Grid, cover

View = Literal["PA", "AP", "lateral"]

MU_WATER_PER_MM = 0.0206
"""Linear attenuation of water at 60 keV: 0.2059 cm2/g (NIST, Hubbell and Seltzer). 120 kVp through 3 mm Al, 0 to 0.2 mm Cu and 10 cm of
water have an effective energy of 55 to 62 keV (SpekPy); before the patient it is 40 to 54."""
BONE_STEEPNESS = 1.2
"""HU of bone come from CT at about 70 keV; at 60 keV cortical bone (0.3148 cm2/g, 1.92 g/cm3; NIST) exceeds water 1.2 times as far."""
PHOTONS_PER_MM2_UGY = 30174.0
"""Quanta per area and air kerma of the standard beam RQA5, IEC 62220-1:2003 from memory; SpekPy gives 29600 for such a beam, 2 % less."""
DETECTIVE_EFFICIENCY = 0.6
"""Detective quantum efficiency of CsI detectors, 0.60 at 0.5 per mm over six of a kind (Marshall et al., Phys Med Biol 2011)."""
SLAB_ROWS = 4  # planes along the ray that share one magnification: 19 mm at most, a change of 1 to 2 %
MAX_VALUE = 4095


@dataclass(frozen=True)
class Geometry:
    """Where source, patient and detector are. An infinite source distance gives parallel rays."""

    view: View
    source_mm: float = np.inf  # source to detector
    gap_mm: float = 0.0  # from the detector to the near face of the grid
    yaw: float = 0.0  # turn of the patient about the long axis, radians
    roll: float = 0.0  # turn in the image plane, radians
    offset_mm: tuple[float, float] = (0.0, 0.0)  # of the patient on the detector: down, right
    zoom: float = 1.0  # detector pixel relative to one that shows the grid's middle at its own size


@dataclass(frozen=True)
class Radiograph:
    """One image with what a file needs to say about it."""

    pixels: NDArray[np.uint16]  # (R, C), 12 bits, bright = dense
    spacing_mm: tuple[float, float]  # at the detector
    masks: dict[str, Bool]  # finding -> (R, C)
    view: View
    photometric: Literal["MONOCHROME1", "MONOCHROME2"]  # how it is to be stored
    window: tuple[float, float]  # centre and width, on ``pixels``


def sample_geometry(rng: np.random.Generator, view: View) -> Geometry:
    """PA and lateral at 180 cm, six feet since Danzer 1919; AP at 100 to 125 cm, as at the bedside, less well centred (not looked up)."""
    portable = view == "AP"
    source = float(rng.uniform(1000, 1250) if portable else rng.uniform(1780, 1850))
    spread = 1.6 if portable else 1.0
    return Geometry(
        view,
        source,
        gap_mm=float(rng.uniform(20, 40)),
        yaw=float(np.radians(np.clip(rng.normal(0, 1.8 * spread), -6, 6))),
        roll=float(np.radians(np.clip(rng.normal(0, 1.0 * spread), -3.5, 3.5))),
        offset_mm=(float(np.clip(rng.normal(0, 4 * spread), -10, 10)), float(np.clip(rng.normal(0, 4 * spread), -10, 10))),
        zoom=float(rng.uniform(0.97, 1.04)),
    )


def attenuation(volume_hu: NDArray[np.int16]) -> Float:
    """Linear attenuation per mm at every voxel."""
    hu = volume_hu.astype(np.float32)
    bone = np.maximum(hu, 0)
    bone *= BONE_STEEPNESS - 1
    hu += bone
    hu += 1000.0
    np.maximum(hu, 0, out=hu)
    hu *= MU_WATER_PER_MM / 1000.0
    return hu


def line_integral(volume: Float | Bool, spacing_mm: tuple[float, float, float], geometry: Geometry) -> Float:
    """Integral of ``volume`` (S, H, W) along the rays, times mm; for a mask the length in mm of the ray inside it.

    Rays are grouped in slabs that share a magnification m = source / (source - distance to the detector); each slab is summed, scaled by m
    and shifted by the patient's turn with cubic interpolation.

    Returns:
        (size, size) float32: rows go down; columns go to the patient's left (PA, AP) or to the back (lateral).
    """
    axis = 2 if geometry.view == "lateral" else 1
    slab = SLAB_ROWS * (2 if axis == 2 else 1)
    planes, step = volume.shape[axis], spacing_mm[axis]
    size = volume.shape[0]
    solid = volume.dtype == bool
    kind = np.uint8 if solid else np.float32  # a mask's counts per slab are small
    values: NDArray[Any] = volume.view(np.uint8) if solid else volume
    if axis == 1:
        sums = values.reshape(size, planes // slab, slab, volume.shape[2]).sum(axis=2, dtype=kind).transpose(1, 0, 2)
        across = spacing_mm[2]
    else:
        sums = values.reshape(size, volume.shape[1], planes // slab, slab).sum(axis=3, dtype=kind).transpose(2, 0, 1)
        across = spacing_mm[1]
    at = ((np.arange(planes // slab) + 0.5) * slab - planes / 2) * step  # slab centres along the ray axis, from the grid's middle
    half = planes * step / 2
    towards_detector = -at if geometry.view == "PA" else at  # PA: detector at the front; AP: at the back; lateral: at the left side
    distance = half - towards_detector + geometry.gap_mm
    if np.isinf(geometry.source_mm):
        m, middle = np.ones_like(at), 1.0
    else:
        m = geometry.source_mm / (geometry.source_mm - distance)
        middle = geometry.source_mm / (geometry.source_mm - half - geometry.gap_mm)
    pixel = spacing_mm[0] * geometry.zoom * middle
    detector = (np.arange(size) + 0.5 - size / 2) * pixel
    down, right = geometry.offset_mm
    turn = np.tan(geometry.yaw) * at
    rows = _interpolation((detector[None] - down) / m[:, None], spacing_mm[0], size)
    columns = _interpolation((detector[None] - right) / m[:, None] - turn[:, None], across, sums.shape[2])
    used = sums.any(axis=(1, 2)) if solid else np.ones(len(sums), dtype=bool)
    rows, columns, sums = rows[used], columns[used], sums[used].astype(np.float32, copy=False)
    image = np.matmul(np.matmul(rows, sums), columns.transpose(0, 2, 1)).sum(axis=0) * np.float32(step)
    return _rolled(image, geometry.roll, order=1 if solid else 3)


def pixel_mm(spacing_mm: tuple[float, float, float], shape: tuple[int, int, int], geometry: Geometry) -> float:
    """Spacing of the detector pixels of :func:`line_integral`."""
    axis = 2 if geometry.view == "lateral" else 1
    half = shape[axis] * spacing_mm[axis] / 2
    middle = 1.0 if np.isinf(geometry.source_mm) else geometry.source_mm / (geometry.source_mm - half - geometry.gap_mm)
    return spacing_mm[0] * geometry.zoom * middle


def _interpolation(at_mm: NDArray[np.float64], step: float, n: int) -> Float:
    """(K, outputs, n) weights of cubic convolution (Keys 1981, a = -1/2) at ``at_mm`` (K, outputs) on n samples centred on 0; 0 outside.

    Cubic, because linear interpolation would blur lines that a detector shows.
    """
    index = at_mm / step + n / 2 - 0.5
    low = np.floor(index).astype(np.int64)
    t = (index - low).astype(np.float32)
    taps = (
        -0.5 * t + t**2 - 0.5 * t**3,
        1 - 2.5 * t**2 + 1.5 * t**3,
        0.5 * t + 2 * t**2 - 1.5 * t**3,
        -0.5 * t**2 + 0.5 * t**3,
    )
    weights = np.zeros((*index.shape, n + 4), dtype=np.float32)  # a margin takes what falls outside
    k, o = np.ogrid[: index.shape[0], : index.shape[1]]
    for tap, value in enumerate(taps):
        weights[k, o, np.clip(low + 1 + tap, 0, n + 3)] += value
    return weights[..., 2:-2]


def _rolled(image: Float, roll: float, order: int) -> Float:
    if roll == 0:
        return image
    from scipy import ndimage

    c, s = np.cos(roll), np.sin(roll)
    matrix = np.array([[c, s], [-s, c]])
    centre = (np.array(image.shape) - 1) / 2
    return np.asarray(ndimage.affine_transform(image, matrix, centre - matrix @ centre, order=order, mode="nearest"), dtype=np.float32)


def project(phantom: Phantom, view: View, rng: np.random.Generator, geometry: Geometry | None = None) -> Radiograph:
    """Take a radiograph.

    Args:
        phantom: of whom.
        view: PA, AP or lateral.
        rng: positioning, exposure, processing and noise.
        geometry: instead of a random one.
    """
    geometry = sample_geometry(rng, view) if geometry is None else geometry
    mu = attenuation(phantom.volume_hu)
    if view == "lateral":
        _raise_arms(mu, phantom)
    path = np.maximum(line_integral(mu, phantom.spacing_mm, geometry), 0)
    spacing = pixel_mm(phantom.spacing_mm, phantom.volume_hu.shape, geometry)
    masks = {name: line_integral(mask, phantom.spacing_mm, geometry) for name, mask in phantom.masks.items()}
    ray_step = phantom.spacing_mm[2 if view == "lateral" else 1]
    crop = _collimation(rng, path.shape, view, phantom, spacing)
    intensity = np.exp(-path[crop])
    pixels = _detect(intensity, spacing, rng)
    centre, width = _window(pixels, rng)
    return Radiograph(
        pixels=pixels,
        spacing_mm=(spacing, spacing),
        masks={name: _shadow(mask, ray_step)[crop] for name, mask in masks.items()},
        view=view,
        photometric="MONOCHROME1" if rng.random() < 0.4 else "MONOCHROME2",
        window=(centre, width),
    )


def _shadow(length: Float, step: float) -> Bool:
    """Pixels whose ray meets a mask: half a voxel of it or, where a voxel or two fell between pixels, half of the most there is."""
    return length > 0.5 * min(step, float(length.max(initial=0.0)))


def _raise_arms(mu: Float, phantom: Phantom) -> None:
    """For a lateral the arms go up: nothing beside the trunk is left in the beam."""
    grid, a = Grid(phantom.volume_hu.shape[0]), phantom.anatomy
    z, _, x = grid.axes_mm()
    trunk = np.maximum(cage_profile(a, z)[0], 62.0) + np.float32(9 + a.muscle + a.fat)
    mu *= cover(trunk - np.abs(x), 6.0)


def _collimation(rng: np.random.Generator, shape: tuple[int, ...], view: View, phantom: Phantom, spacing: float) -> tuple[slice, slice]:
    """Blades cut rows or columns down to 0.85 to 1 of the side; a lateral is as wide as the grid is deep."""
    size = shape[0]
    if view == "lateral":
        columns = min(size, round(phantom.volume_hu.shape[1] * phantom.spacing_mm[1] / phantom.spacing_mm[0]))
        start = (size - columns) // 2
        return slice(0, size), slice(start, start + columns)
    short = round(size * float(rng.uniform(0.85, 1.0)))
    if rng.random() < 0.5:
        start = (size - short) // 2 + int(rng.integers(-2, 3))
        start = min(max(start, 0), size - short)
        return slice(0, size), slice(start, start + short)
    start = int(rng.integers(0, min(5, size - short + 1)))  # the lower abdomen goes first
    return slice(start, start + short), slice(0, size)


def _detect(intensity: Float, spacing: float, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Scatter, blur, quantum noise, logarithm and display processing.

    Behind a 12:1 anti-scatter grid less than half of the primary's contrast is left in the mediastinum, into which the lungs scatter: at
    least as much scatter as primary (Niklason et al., Med Phys 1981). Drawn are 0.5 to 1.3 times the primary there, 0.1 to 0.25 in lung;
    the detector gets 1.5 to 5 uGy under the lungs, round the 2.5 digital detectors are tested at (Marshall et al., Phys Med Biol 2011).
    Processing lowers the contrast of large areas and lifts that of detail, as multiscale processing on real systems does (Vuylsteke and
    Schoeters, SPIE 1994, not looked up).
    """
    from scipy import ndimage

    scatter = float(rng.uniform(0.12, 0.3))
    veil = ndimage.gaussian_filter(intensity, 30.0 / spacing, truncate=2.0, mode="nearest")
    light = intensity + scatter * veil
    # wider than focal spot and scintillator make it (half contrast at 1.29 per mm, a sigma of 0.15 mm: Marshall); little on pixels of 3 mm
    light = ndimage.gaussian_filter(light, float(rng.uniform(0.5, 1.0)) / spacing, truncate=3.0)
    reference = float(np.percentile(light[light < 0.6], 75)) if (light < 0.6).any() else 0.6
    kerma = float(rng.uniform(1.5, 5.0))
    quanta = PHOTONS_PER_MM2_UGY * DETECTIVE_EFFICIENCY * kerma * spacing**2 * np.maximum(light, 1e-5) / reference
    light = np.maximum(light * (1 + rng.standard_normal(light.shape, dtype=np.float32) / np.sqrt(quanta)), 1e-5)
    dense = -np.log(light)
    body = dense[dense > 0.35]
    low, high = np.percentile(body, (1.0, 99.5)) if body.size > 100 else (0.0, 5.0)
    shown = (dense - low) / max(float(high - low), 0.5)
    coarse = ndimage.gaussian_filter(shown, 34.0 / spacing, truncate=2.0, mode="nearest")
    middle = ndimage.gaussian_filter(shown, 9.0 / spacing, truncate=2.5, mode="nearest")
    squeeze, middle_gain, lift = float(rng.uniform(0.4, 0.65)), float(rng.uniform(0.8, 1.2)), float(rng.uniform(1.6, 2.8))
    processed = 0.5 + (1 - squeeze) * (coarse - 0.5) + middle_gain * (middle - coarse) + lift * (shown - middle)
    processed = np.where(dense < 0.2, np.minimum(processed, 0.02 + 0.1 * np.maximum(dense, 0)), processed)
    gamma = float(rng.uniform(0.85, 1.15))
    scaled = np.clip(0.06 + 0.86 * processed, 0, 1) ** gamma
    return np.asarray(np.rint(scaled * MAX_VALUE), dtype=np.uint16)


def _window(pixels: NDArray[np.uint16], rng: np.random.Generator) -> tuple[float, float]:
    """Centre and width that show nearly all of the image, as a technologist or the system would set them."""
    low, high = np.percentile(pixels, (1.0, 99.7))
    width = max(float(high - low) * float(rng.uniform(0.92, 1.15)), 200.0)
    centre = (float(low) + float(high)) / 2 + float(rng.normal(0, 0.03)) * width
    return round(centre), round(width)
