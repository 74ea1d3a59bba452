"""Geometry as a record: how a file's own grid became the grid a tower sees, and the way back; LPS to RAS, once.

Index coordinates have integers at pixel or voxel centres, so n of them cover [-0.5, n - 0.5]. Axes follow tensors: (H, W) in 2D,
(S, H, W) in 3D. World space is RAS in mm; affines are 4 x 4 and take (s, h, w, 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvl.geometry.grids import GridTransform, Step, letterbox
from medvl.geometry.moments import GridMoments, Moments
from medvl.geometry.resampling import Taps, resample

__all__ = ["LPS_TO_RAS", "GridMoments", "GridTransform", "Moments", "Step", "Taps", "letterbox", "lps_to_ras", "resample"]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM's patient axes (left, posterior, superior) to RAS; its own inverse. DICOM PS3.3 C.7.6.2.1.1."""


def lps_to_ras(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn a 4 x 4 affine whose world is LPS (DICOM) into one whose world is RAS (NIfTI), or back."""
    if affine.shape != (4, 4):
        raise ValueError(f"affine has shape {affine.shape}, expected (4, 4)")
    return LPS_TO_RAS @ affine
