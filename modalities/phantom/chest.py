"""One phantom: a person, what is wrong with them, the CT volume, the facts for the report and the exact masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvl.types import Fact
from modalities.phantom.anatomy import Anatomy, Fracture, build_chest, sample_anatomy
from modalities.phantom.findings import plan_findings, sample_findings
from modalities.phantom.grid import Bool, Grid


@dataclass(frozen=True)
class Phantom:
    """A synthetic chest. Arrays are (S, H, W): superior to inferior, anterior to posterior, patient's right to left."""

    volume_hu: NDArray[np.int16]
    affine: NDArray[np.float64]  # 4 x 4, (s, h, w) to RAS mm
    masks: dict[str, Bool]  # finding -> where it is
    facts: tuple[Fact, ...]  # present findings, for the report
    anatomy: Anatomy

    @property
    def findings(self) -> frozenset[str]:
        """Names of the findings that are there."""
        return frozenset(self.masks)

    @property
    def sex(self) -> str:
        """F or M."""
        return self.anatomy.sex

    @property
    def age(self) -> int:
        """Years."""
        return self.anatomy.age

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along (S, H, W)."""
        steps = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(steps[0]), float(steps[1]), float(steps[2])


def sample_phantom(
    rng: np.random.Generator, size: int = 128, findings: Sequence[str] | None = None, anatomy: Anatomy | None = None
) -> Phantom:
    """Draw one phantom.

    Args:
        rng: the only source of chance.
        size: voxels along S and W; H (depth) has half as many. 128 gives 3 x 4.8 x 3 mm.
        findings: exactly these (none for an empty sequence); None draws them by their prevalence.
        anatomy: the person, to give one patient several studies; None draws one.
    Raises:
        ValueError: an unknown finding, or a size that is not a multiple of 16 from 32 on.
    """
    grid = Grid(size)
    anatomy_seed, finding_seed = rng.integers(2**62, size=2)
    if anatomy is None:
        anatomy = sample_anatomy(np.random.default_rng(anatomy_seed))
    finding_rng = np.random.default_rng(finding_seed)
    sampled = sample_findings(finding_rng)
    changed, plans = plan_findings(finding_rng, anatomy, sampled if findings is None else tuple(findings))
    fractures: tuple[Fracture, ...] = tuple(f for plan in plans for f in plan.fractures)
    haze, pruning = max((p.haze for p in plans), default=0.0), max((p.pruning for p in plans), default=0.0)
    chest = build_chest(grid, changed, fractures, haze, pruning)
    for plan in plans:
        before = len(chest.facts)
        plan.draw(chest, np.random.default_rng(finding_rng.integers(2**62)))
        if chest.masks.get(plan.finding) is not None and len(chest.facts) == before:
            chest.facts.extend(plan.facts)
    _pleura_over_lung(chest.masks)
    volume = np.clip(np.rint(chest.hu), -1024, 20000).astype(np.int16)
    return Phantom(volume, grid.affine(), chest.masks, tuple(chest.facts), changed)


def _pleura_over_lung(masks: dict[str, Bool]) -> None:
    """Where fluid or air has taken a voxel, no finding of the lung is left in it (unless nothing else of it is)."""
    taken = [masks[name] for name in ("pleural_effusion", "pneumothorax") if name in masks]
    for name in ("emphysema", "edema", "consolidation", "atelectasis"):
        if taken and name in masks:
            rest = masks[name] & ~np.logical_or.reduce(taken)
            if rest.any():
                masks[name] = rest
