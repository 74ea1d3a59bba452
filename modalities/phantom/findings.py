"""Ten findings: how often they occur, how large and where they are, how they change a chest, and the words for them.

A finding is planned first (numbers drawn, anatomy changed: a collapsed lobe pulls the heart over before anything is drawn), then drawn
into the volume with its exact mask. Arrays and axes as in :mod:`modalities.phantom.grid`; HU throughout.

Prevalence: of the studies in MIMIC-CXR 33 % have no finding, 29 % a device, 23 % an effusion, 20 % atelectasis, 17 % an enlarged heart,
12 % edema, 5 % consolidation, 4 % a pneumothorax, 3 % a lesion of the lung, 2 % a fracture (MIT-LCP/mimic-cxr, the table behind Johnson
et al., arXiv:1901.07042; emphysema is not counted there). Here rare ones are enriched until each is in 12 to 22 % of studies, a fifth of
studies has none, and what goes together in life does here: edema with a large heart and effusions, fractures with pneumothorax, chest
tubes with pneumothorax. Which numbers below were looked up, and where, is in SOURCES.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medvl.types import FINDINGS, Fact, Severity, Side
from modalities.phantom.anatomy import (
    SIDES,
    Anatomy,
    Chest,
    Fracture,
    cage_centre_y,
    cage_profile,
    ellipsoid,
    heart_extent,
    overlap,
    rib_curve,
)
from modalities.phantom.grid import Float, axis_box, blend, cover, polyline, smooth_noise, smoothstep, splat, spline

SEVERITIES: tuple[Severity, ...] = ("mild", "moderate", "severe")
FLUID_HU, LUNG_SOLID_HU, COLLAPSED_HU = 8.0, 32.0, 48.0
"""Effusion 7 +- 9 HU (exudate) to 10 +- 7 (transudate): Abramowitz et al., AJR 2009. Consolidated lung 20 to 45, airless collapsed lung a
little denser: not found in a source, chosen near blood and muscle."""


@dataclass(frozen=True)
class Plan:
    """One finding of one study before it is drawn: the facts it will be reported by, and how to draw it."""

    finding: str
    facts: tuple[Fact, ...]  # those known in advance; a draw may add to ``chest.facts`` (a nodule's zone depends on the lung that is left)
    draw: Callable[[Chest, np.random.Generator], None]
    fractures: tuple[Fracture, ...] = ()
    haze: float = 0.0
    pruning: float = 0.0


def sample_findings(rng: np.random.Generator) -> tuple[str, ...]:
    """Which findings a study has; about one study in five has none. Names in the order of FINDINGS."""
    u = dict(zip(FINDINGS, rng.random(len(FINDINGS)), strict=True))
    has = {"cardiomegaly": u["cardiomegaly"] < 0.14}
    has["edema"] = u["edema"] < (0.34 if has["cardiomegaly"] else 0.1)
    has["pleural_effusion"] = u["pleural_effusion"] < (0.45 if has["edema"] else 0.12)
    has["pneumothorax"] = u["pneumothorax"] < 0.13
    has["rib_fracture"] = u["rib_fracture"] < (0.34 if has["pneumothorax"] else 0.17)
    has["support_device"] = u["support_device"] < (0.36 if has["pneumothorax"] or has["edema"] else 0.16)
    has["consolidation"] = u["consolidation"] < 0.17
    has["atelectasis"] = u["atelectasis"] < (0.24 if has["pleural_effusion"] else 0.12)
    has["lung_nodule"] = u["lung_nodule"] < 0.2
    has["emphysema"] = u["emphysema"] < 0.12
    return tuple(name for name in FINDINGS if has[name])


def plan_findings(rng: np.random.Generator, anatomy: Anatomy, names: Sequence[str]) -> tuple[Anatomy, list[Plan]]:
    """Draw the numbers of every finding and bend the anatomy accordingly; plans come in the order they must be drawn in.

    Raises:
        ValueError: a name that is not in FINDINGS.
    """
    unknown = sorted(set(names) - set(FINDINGS))
    if unknown:
        raise ValueError(f"no phantom has the finding {', '.join(unknown)}; known are {', '.join(FINDINGS)}")
    seeds = dict(zip(_ORDER, rng.integers(2**62, size=len(_ORDER)), strict=True))  # one stream each: findings do not disturb each other
    plans = []
    for name in _ORDER:
        if name in names:
            anatomy, plan = _PLANNERS[name](np.random.default_rng(seeds[name]), anatomy, frozenset(names))
            plans.append(plan)
    return anatomy, plans


def _side(rng: np.random.Generator, right: float = 0.5) -> str:
    return "right" if rng.random() < right else "left"


def _severity(rng: np.random.Generator, weights: tuple[float, float, float] = (0.35, 0.4, 0.25)) -> Severity:
    return SEVERITIES[int(rng.choice(3, p=weights))]


def _fact_side(side: str) -> Side:
    return "right" if side == "right" else "left"


# --- cardiomegaly ------------------------------------------------------------------------------------------------------------------


def _cardiomegaly(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """Cardiothoracic ratio over 0.50, the usual limit on PA films; over 0.55 a heart is likely to be large on MRI too
    (doi:10.1186/s13244-021-01097-0). The steps mild to 0.55, moderate to 0.60, severe to 0.67 are ours.
    """
    severity = _severity(rng, (0.35, 0.4, 0.25))
    low, high = {"mild": (0.515, 0.55), "moderate": (0.55, 0.60), "severe": (0.60, 0.67)}[severity]
    a = replace(a, cardiothoracic_ratio=float(rng.uniform(low, high)), heart_angle=max(a.heart_angle - 0.12, 0.35), vessel=a.vessel * 1.05)

    def draw(chest: Chest, _: np.random.Generator) -> None:
        chest.add_mask("cardiomegaly", chest.box, chest.heart > 0.5)

    return a, Plan("cardiomegaly", (Fact("cardiomegaly", "present", severity=severity),), draw)


# --- emphysema ---------------------------------------------------------------------------------------------------------------------


def _emphysema(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """Hyperinflated: low flat domes (a rise under 15 mm is called flat: Eur Respir J, criteria for radiographs; drawn so when severe),
    barrel chest, slim heart; patches of lung below -950 HU, the usual threshold on CT.

    Mild, moderate and severe differ in extent and in hyperinflation; they fold the five centrilobular classes of Lynch et al., Radiology
    2015, into three, with steps of ours.
    """
    severity = _severity(rng, (0.3, 0.4, 0.3))
    degree = {"mild": 0.45, "moderate": 0.75, "severe": 1.0}[severity]
    ratio = a.cardiothoracic_ratio if "cardiomegaly" in names else float(rng.uniform(0.34, 0.41))
    a = replace(
        a,
        dome_z=(a.dome_z[0] + 24 * degree, a.dome_z[1] + 24 * degree),
        dome_rise=(a.dome_rise[0] * (1 - 0.68 * degree), a.dome_rise[1] * (1 - 0.68 * degree)),
        half_depth=min(a.half_depth + 12 * degree, 112),
        cardiothoracic_ratio=ratio,
        heart_angle=min(a.heart_angle + 0.12 * degree, 1.0),
        rib_drop=a.rib_drop * (1 - 0.22 * degree),
        lung_hu=a.lung_hu - 34 * degree,
    )
    bullae = int(rng.integers(0, 3)) if severity == "mild" else int(rng.integers(2, 9))
    upper = rng.random() < 0.8  # centrilobular, from smoking; else panlobular, basal

    def draw(chest: Chest, r: np.random.Generator) -> None:
        zone = np.clip((30 - chest.z) / 120, -1, 1) * (1 if upper else -1)
        patches = smoothstep((smooth_noise(r, chest.noise.shape, (15, 10, 16)) + 1.1 * zone + np.float32(2.4 * degree - 1.55)) * 1.3)
        region = chest.region
        affected = np.zeros(region.shape, dtype=bool)
        near_wall = (chest.wall_mm > 2) & (chest.wall_mm < 30)
        for side in SIDES:
            share = patches * chest.lung[side]
            share *= region < -600  # vessels stay
            blend(region, share, -968.0)
            affected |= share > 0.5
            for _ in range(bullae):
                spot = _spot(chest, r, side, near_wall & (chest.z < (0 if upper else 60)))
                if spot is None:
                    continue
                radius = float(np.clip(r.lognormal(2.3, 0.45), 5, 34))
                box, dist = ellipsoid(chest.grid, spot, np.array([radius * 1.15, radius, radius]))
                mine, theirs = overlap(chest.box, box)
                part, lung, d = region[mine], chest.lung[side][mine], dist[theirs]
                blend(part, cover(np.float32(1.2) - np.abs(d), 4.0) * lung, -420.0)  # a wall of about 1 mm
                inside = cover(d - 1, 4.0) * lung
                blend(part, inside, -990.0)
                affected[mine] |= inside > 0.5
        chest.add_mask("emphysema", chest.box, affected)

    return a, Plan("emphysema", (Fact("emphysema", "present", severity=severity),), draw, pruning=degree)


# --- edema -------------------------------------------------------------------------------------------------------------------------


def _edema(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """Perihilar haze (bat wing), blurred and redistributed vessels, septal lines at the bases (Gluecker et al., RadioGraphics 1999), 10 to
    20 mm long (10 to 30: Radiopaedia). Congested and edematous lung weighs 0.33 to 0.93 g/mL against 0.25 to 0.37 (Garnett et al., Can Med
    Assoc J 1977): 80 to 550 HU more, spread here over mild to severe.
    """
    severity = _severity(rng, (0.3, 0.4, 0.3))
    degree = {"mild": 0.0, "moderate": 0.5, "severe": 1.0}[severity] + float(rng.uniform(0, 0.3))
    lines = int(rng.integers(8, 20))

    def draw(chest: Chest, r: np.random.Generator) -> None:
        noise = smooth_noise(r, chest.noise.shape, (14, 9, 14))
        region, gain, reach = chest.region, np.float32(150 + 260 * degree), 48 + 22 * degree
        affected = np.zeros(region.shape, dtype=bool)
        for side in SIDES:
            h = chest.hilum[side]
            far = ((chest.z - np.float32(h[0] + 12)) / 1.35) ** 2 + ((chest.y - np.float32(h[1])) / 1.2) ** 2
            far = far + (chest.x - np.float32(h[2])) ** 2
            haze = np.exp(far * np.float32(-1 / reach**2)) + np.float32(0.16) * np.clip((chest.z + 60) / 150, 0, 1)
            haze *= np.clip(1 + np.float32(0.35) * noise, 0.2, 1.8)
            added = haze * gain
            added *= chest.lung[side]
            added *= np.clip(-region / 800, 0, 1)  # vessels and soft tissue gain nothing
            region += added
            affected |= added > np.float32(0.3) * gain
            _kerley(chest, r, side, lines)
        chest.add_mask("edema", chest.box, affected)

    return replace(a, vessel=a.vessel * 1.1), Plan(
        "edema", (Fact("edema", "present", severity=severity),), draw, haze=min(0.5 + 0.5 * degree, 1.0)
    )


def _kerley(chest: Chest, rng: np.random.Generator, side: str, lines: int) -> None:
    """Thickened septa: plates about 1 mm thick that run inwards from the lateral wall above the base."""
    sign = SIDES[side]
    dome = float(chest.anatomy.dome_z[0 if side == "right" else 1])
    z = dome + rng.uniform(-42, 18, lines)
    y = rng.uniform(-25, 25, lines)
    width = np.interp(z, chest.z.ravel(), chest.wall_half_width.ravel())
    depth = np.interp(z, chest.z.ravel(), chest.wall_half_depth.ravel())
    edge = sign * width * np.sqrt(np.clip(1 - (y / depth) ** 2, 0, 1)) * 0.97
    length = rng.uniform(10, 20, lines)
    points, volumes = [], []
    for shift in np.arange(-6, 6.1, 2.0):  # a plate is a row of thin rods
        start = np.stack([z, y + shift, edge], axis=1)
        p, v = _rods(start, start - np.stack([np.zeros(lines), np.zeros(lines), sign * length], axis=1), 2.4)
        points.append(p)
        volumes.append(v)
    box, share = splat(chest.grid, np.concatenate(points), np.concatenate(volumes))
    mine, theirs = overlap(chest.box, box)
    part = chest.region[mine]
    blend(part, share[theirs] * chest.lung[side][mine], 10.0)


def _rods(start: NDArray[np.float64], end: NDArray[np.float64], section_mm2: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    at = (np.arange(8) + 0.5) / 8
    points = start[:, None] + (end - start)[:, None] * at[None, :, None]
    volume = np.linalg.norm(end - start, axis=1) * section_mm2 / 8
    return points.reshape(-1, 3), np.repeat(volume, 8)


# --- consolidation -----------------------------------------------------------------------------------------------------------------

LOBES = {"right": ("upper lobe", "middle lobe", "lower lobe"), "left": ("upper lobe", "lingula", "lower lobe")}


def lobe(chest: Chest, side: str, name: str) -> Float:
    """Share of each voxel that belongs to a lobe, by flat fissures: the oblique one falls from T4 behind to the diaphragm in front, the
    minor one (and the upper border of the lingula) is level with the fourth rib in front. Gray's Anatomy.
    """
    s = chest.anatomy.scale
    oblique = chest.z - (np.float32(12 * s) - np.float32(1.1) * chest.y)  # positive in the lower lobe
    minor = chest.z - np.float32((6 if side == "right" else 14) * s)  # positive below
    below = cover(oblique, 5.0)
    if name == "lower lobe":
        return np.asarray(below * np.ones_like(chest.wall_mm), dtype=np.float32)
    part = cover(minor, 5.0)
    return np.asarray((1 - below) * (1 - part if name == "upper lobe" else part) * np.ones_like(chest.wall_mm), dtype=np.float32)


def _consolidation(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """Airless but not shrunken lung, segmental (40 mm across) to lobar (120 mm), with air bronchograms of 2 to 5 mm, ill-defined except at
    a fissure (words of the Fleischner glossary, Hansell et al., Radiology 2008; the sizes are ours, not looked up).
    """
    side = _side(rng, 0.55)
    name = LOBES[side][int(rng.choice(3, p=(0.3, 0.22, 0.48)))]
    radius, solid = float(np.clip(rng.normal(34, 9), 20, 58)), float(rng.uniform(0.72, 1.0))
    sides = [(side, name)]
    bilateral = bool(rng.random() < 0.12)
    if bilateral:
        other = "left" if side == "right" else "right"
        sides.append((other, name if name in LOBES[other] else "lower lobe"))
    fact = Fact("consolidation", "present", side="bilateral" if bilateral else _fact_side(side), location=name)
    if bilateral and sides[1][1] != name:
        fact = replace(fact, location=None)

    def draw(chest: Chest, r: np.random.Generator) -> None:
        for where, which in sides:
            region, lung = chest.region, chest.lung[where]
            here = lobe(chest, where, which) * lung
            spot = _spot(chest, r, where, (here > 0.8) & (chest.wall_mm > 8))
            if spot is None:
                continue
            scale = radius
            far = np.sqrt(((chest.z - spot[0]) / 0.9) ** 2 + ((chest.y - spot[1]) * 0.85) ** 2 + (chest.x - spot[2]) ** 2)
            field = (1 - far / np.float32(scale)) + np.float32(0.2) * smooth_noise(r, chest.noise.shape, (20, 12, 20))
            share = smoothstep(field * np.float32(2.4) + np.float32(0.45)) * here
            share *= np.float32(solid)
            _air_bronchograms(chest, r, where, spot, share, region)
            chest.add_mask("consolidation", chest.box, share > 0.4)

    return a, Plan("consolidation", (fact,), draw)


def _air_bronchograms(chest: Chest, rng: np.random.Generator, side: str, spot: NDArray[np.float64], share: Float, region: Float) -> None:
    """Fill the consolidation, but keep branching tubes of air open in it."""
    start = chest.hilum[side]
    bends = [spline(np.array([start, 0.5 * (start + spot) + rng.normal(0, 6, 3), spot + rng.normal(0, 14, 3)])) for _ in range(5)]
    tubes = [polyline(path, float(rng.uniform(1.2, 2.4))) for path in bends]
    box, air = splat(chest.grid, np.concatenate([p for p, _ in tubes]), np.concatenate([v for _, v in tubes]))
    mine, theirs = overlap(chest.box, box)
    filled = share.copy()
    filled[mine] *= 1 - air[theirs]
    blend(region, filled * (region < LUNG_SOLID_HU), LUNG_SOLID_HU)


# --- atelectasis -------------------------------------------------------------------------------------------------------------------


def _atelectasis(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """A lobe loses its air and most of its volume: a dense wedge against mediastinum or diaphragm, the dome rises and the mediastinum moves
    over (signs: Woodring and Reed, J Thorac Imaging 1996). How far, 14 to 32 mm and 8 to 20 mm, less for middle lobe and lingula, is ours.
    """
    side = _side(rng)
    name = ("upper lobe", "middle lobe" if side == "right" else "lingula", "lower lobe")[int(rng.choice(3, p=(0.27, 0.13, 0.6)))]
    index, sign = (0, -1) if side == "right" else (1, 1)
    lift, pull = float(rng.uniform(14, 32)), float(rng.uniform(8, 20))
    pull_top = pull * (1.0 if name == "upper lobe" else 0.35)
    if name not in ("upper lobe", "lower lobe"):
        lift, pull = 0.6 * lift, 0.45 * pull
    dome = list(a.dome_z)
    dome[index] -= lift
    a = replace(
        a,
        dome_z=(dome[0], dome[1]),
        shift=a.shift + sign * (pull if name == "lower lobe" else 0.6 * pull),
        shift_top=a.shift_top + sign * pull_top,
    )
    fact = Fact("atelectasis", "present", side=_fact_side(side), location=name)
    extent = float(rng.uniform(0.8, 1.2))

    def draw(chest: Chest, r: np.random.Generator) -> None:
        share = _collapsed_lobe(chest, side, name, extent) * chest.lung[side]
        region = chest.region
        blend(region, share * (region < COLLAPSED_HU), COLLAPSED_HU)
        chest.add_mask("atelectasis", chest.box, share > 0.4)

    return a, Plan("atelectasis", (fact,), draw)


def _collapsed_lobe(chest: Chest, side: str, name: str, extent: float) -> Float:
    """Where a collapsed lobe lies, as a share of each voxel."""
    s = chest.anatomy.scale
    lateral = SIDES[side] * (chest.x - chest.midline_x)  # mm from the midline
    apex = np.float32(chest.anatomy.apex_z)
    ones = np.ones_like(chest.wall_mm)
    if name == "lower lobe":  # behind the heart: a triangle that widens towards the diaphragm
        dome = np.float32(chest.anatomy.dome_z[0 if side == "right" else 1])
        down = np.clip((chest.z - np.float32(-25 * s)) / (dome + 10 + 25 * s), 0, 1.2)
        return np.asarray(
            cover(np.float32(14) + np.float32(58 * extent) * down - lateral, 5.0) * cover(chest.y - 4 + 10 * (1 - down), 12.0) * ones
        )
    if name == "upper lobe" and side == "right":  # against the apex and mediastinum, the minor fissure swung up and bowed
        rise = np.float32(62 * extent * s)
        edge = apex + np.float32(30 * s) + rise * (1 - np.clip((lateral - 18) / 85, 0, 1)) ** 0.8
        return np.asarray(cover(edge - chest.z, 5.0) * cover(np.float32(45) - chest.y, 30.0) * ones)
    if name == "upper lobe":  # forwards: a veil that fades downwards, densest beside the hilum
        front = cover(-chest.y - np.float32(18) - 0.35 * (chest.z + 30 * s), 14.0)
        return np.asarray(front * cover(np.float32(35 * s) - chest.z, 40.0) * cover(np.float32(105 * extent) - lateral, 40.0) * ones)
    middle = np.float32(46 * s)  # beside the heart, between the fissures
    thick = np.float32(19 * extent) * (1 - np.clip((lateral - 20) / 95, 0, 1))
    return np.asarray(cover(thick - np.abs(chest.z - middle - 0.25 * lateral), 5.0) * cover(-chest.y + 18, 14.0) * ones)


# --- nodule ------------------------------------------------------------------------------------------------------------------------


def _lung_nodule(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """Diameter as in the JSRT set (Shiraishi et al., AJR 2000), whose 154 nodules measure 5 to 60 mm, mean 17.2, geometric mean 15.9,
    standard deviation of the logarithm 0.41, but none below 9 mm (8 of the 154) unless calcified; radiographs are said to show 8 to 10 mm.
    Not looked up: that one in eight is calcified (granuloma, 250 to 600 HU), and how many a person with one has (here 1.9; CT shows more).
    """
    count = int(rng.choice([1, 2, 3, 4, 5], p=(0.55, 0.2, 0.12, 0.08, 0.05)))
    nodules = []
    for _ in range(count):
        calcified = bool(rng.random() < 0.125)
        size, least = 0.0, 5.0 if calcified else 9.0
        while not least <= size <= 60.0:
            size = float(rng.lognormal(np.log(15.9), 0.41))
        nodules.append((_side(rng, 0.55), size, float(rng.uniform(250, 600)) if calcified else float(rng.uniform(25, 60))))

    def draw(chest: Chest, r: np.random.Generator) -> None:
        region = chest.region
        for side, size, hu in nodules:
            radius = size / 2
            spot = _spot(chest, r, side, (chest.wall_mm > radius + 1.5) & (region < -650) & _projected_lung(chest, side))
            if spot is None:
                continue
            box, dist = ellipsoid(chest.grid, spot, radius * r.uniform(0.88, 1.12, 3))
            mine, theirs = overlap(chest.box, box)
            wobble = np.float32(0.12 * radius) * smooth_noise(r, dist.shape, (3, 3, 3)) if min(dist.shape) > 2 else np.float32(0)
            share = cover(dist + wobble, max(chest.grid.spacing_mm[0], 2.5))[theirs] * np.minimum(1, chest.lung[side][mine] * 1.3)
            part = region[mine]
            blend(part, share * (part < hu), hu)
            mask = np.zeros(region.shape, dtype=bool)
            mask[mine] = share > 0.5
            if not mask.any():
                mask[np.unravel_index(_nearest(chest, spot), region.shape)] = True
            chest.add_mask("lung_nodule", chest.box, mask)
            chest.facts.append(Fact("lung_nodule", "present", side=_fact_side(side), location=zone(chest, spot[0]), size_mm=round(size, 1)))

    return a, Plan("lung_nodule", (), draw)


def zone(chest: Chest, z: float) -> str:
    """Third of the lung's height."""
    a = chest.anatomy
    t = (z - a.apex_z) / (0.5 * sum(a.dome_z) + 15 - a.apex_z)
    return "upper zone" if t < 0.36 else "mid zone" if t < 0.68 else "lower zone"


def _projected_lung(chest: Chest, side: str) -> NDArray[np.bool_]:
    """Places that a frontal film shows over lung: not under the dome and, nine in ten, not behind heart or mediastinum."""
    index = 0 if side == "right" else 1
    return np.asarray((chest.z < chest.anatomy.dome_z[index] - 4) & (np.abs(chest.x - chest.midline_x) > 38))


def _nearest(chest: Chest, spot: NDArray[np.float64]) -> int:
    index = [int(np.abs(axis.ravel() - p).argmin()) for axis, p in zip((chest.z, chest.y, chest.x), spot, strict=True)]
    return int(np.ravel_multi_index(index, chest.wall_mm.shape))


def _spot(chest: Chest, rng: np.random.Generator, side: str, where: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """A random point (z, y, x) of the lung where the condition holds; None if there is none."""
    allowed = np.flatnonzero((chest.lung[side] > 0.6) & where)
    pick = rng.random()
    if not len(allowed):
        return None
    zi, yi, xi = np.unravel_index(int(allowed[int(pick * len(allowed))]), chest.wall_mm.shape)
    return np.array([chest.z.ravel()[zi], chest.y.ravel()[yi], chest.x.ravel()[xi]], dtype=np.float64)


# --- pleural effusion --------------------------------------------------------------------------------------------------------------

EFFUSION_ML = {"mild": (200.0, 500.0), "moderate": (500.0, 1000.0), "severe": (1000.0, 1900.0)}
"""175 to 525 mL blunt the angle on an erect PA film (Woodring, AJR 1984); some 500 mL hide the dome (teaching texts, not traced to a
paper); 1 L as the border of large is ours."""


def _pleural_effusion(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """Free fluid in a standing patient: a level that climbs towards the wall (meniscus); more than 1.3 L push the mediastinum away."""
    severity = _severity(rng, (0.4, 0.38, 0.22))
    bilateral = bool(rng.random() < (0.6 if "edema" in names else 0.12))
    if bilateral and severity == "severe":
        severity = "moderate"
    side = _side(rng, 0.55)
    sides = ["right", "left"] if bilateral else [side]
    amounts = {which: float(rng.uniform(*EFFUSION_ML[severity])) for which in sides}
    if not bilateral and amounts[side] > 1300 and "atelectasis" not in names:
        push = (amounts[side] - 1300) / 600 * 14 * -SIDES[side]
        a = replace(a, shift=a.shift + push, shift_top=a.shift_top + 0.6 * push)
    fact = Fact("pleural_effusion", "present", side="bilateral" if bilateral else _fact_side(side), severity=severity)
    rise = float(rng.uniform(38, 68))

    def draw(chest: Chest, _: np.random.Generator) -> None:
        region = chest.region
        for which in sides:
            lung = chest.lung[which]
            depth = np.clip(chest.wall_mm, 0, None)
            height = np.exp(depth * np.float32(-1 / 20.0))  # 1 at the wall
            height *= np.float32(rise)
            height += chest.z
            low = float(height.min())
            volume = np.bincount((height - low).astype(np.int64).ravel(), weights=lung.ravel()) * chest.grid.voxel_ml
            from_below = np.cumsum(volume[::-1])
            target = min(amounts[which], 0.85 * float(from_below[-1]))
            steps = int(np.searchsorted(from_below, target))
            excess = (from_below[steps] - target) / max(float(volume[::-1][steps]), 1e-9)
            level = low + len(volume) - 1 - steps + excess
            share = cover(height - np.float32(level), chest.grid.spacing_mm[0]) * lung
            blend(region, share, FLUID_HU)
            chest.lung[which] = lung - share
            chest.add_mask("pleural_effusion", chest.box, share > 0.5)

    return a, Plan("pleural_effusion", (fact,), draw)


# --- pneumothorax ------------------------------------------------------------------------------------------------------------------


def _pneumothorax(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """Air between lung and wall, most at the apex of a standing patient. Rim at the hilum 7 to 13, 13 to 20, 20 to 45 mm: the British
    Thoracic Society calls 2 cm or more large (MacDuff et al., Thorax 2010). One severe case in three is under tension: our choice.
    """
    severity = _severity(rng, (0.34, 0.36, 0.3))
    low, high = {"mild": (7.0, 13.0), "moderate": (13.0, 20.0), "severe": (20.0, 45.0)}[severity]
    rim = float(rng.uniform(low, high))
    side = _side(rng)
    apical = severity == "mild" or bool(rng.random() < 0.5)
    apex = rim * float(rng.uniform(1.8, 2.6) if apical else rng.uniform(1.2, 1.6)) + 8
    index, sign = (0, -1) if side == "right" else (1, 1)
    if severity == "severe" and rng.random() < 0.35 and "atelectasis" not in names:  # tension
        dome = list(a.dome_z)
        dome[index] += 12
        a = replace(a, shift=a.shift - sign * 14, shift_top=a.shift_top - sign * 9, dome_z=(dome[0], dome[1]))
    location = "apex" if apical and severity != "severe" else None
    fact = Fact("pneumothorax", "present", side=_fact_side(side), severity=severity, location=location)

    def draw(chest: Chest, _: np.random.Generator) -> None:
        lung, region = chest.lung[side], chest.region
        hilum_z = chest.hilum[side][0]
        base = chest.anatomy.dome_z[index] + (30 if severity == "severe" or not apical else 5)
        up = np.clip((hilum_z - chest.z) / (hilum_z - chest.anatomy.apex_z - 10), 0, 1)
        down = np.clip((base - chest.z) / np.float32(base - hilum_z), 0, 1)
        thick = (rim * np.minimum(1, 1.3 * down) + (apex - rim) * up**1.4).astype(np.float32)  # (s, 1, 1)
        below_apex = (chest.z - np.float32(chest.anatomy.apex_z)) * np.float32(0.9)
        depth = np.minimum(chest.wall_mm, below_apex)
        off = np.abs(chest.y - cage_centre_y(chest.anatomy, chest.z)) / chest.wall_half_depth  # lung stays by the wall in front and behind
        inner = depth - thick * np.maximum(smoothstep((0.88 - off) / 0.6), up**3)  # positive in the lung that is left
        share = cover(-inner, chest.grid.spacing_mm[2]) * lung
        total, lost = float(lung.sum()), float(share.sum())
        gain = min(1000.0 * 0.15 * (lost / max(total - lost, 1.0)), 260.0)  # the same tissue in less volume
        rest = lung - share
        region += rest * np.float32(gain) * (region < -500)
        blend(region, share, -1000.0)
        line = cover(np.float32(0.9) - np.abs(inner - 0.9), chest.grid.spacing_mm[2]) * lung  # visceral pleura, under 2 mm
        blend(region, line, 10.0)
        chest.lung[side] = rest
        chest.add_mask("pneumothorax", chest.box, share > 0.5)

    return a, Plan("pneumothorax", (fact,), draw)


# --- rib fracture ------------------------------------------------------------------------------------------------------------------

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth")


def _rib_fracture(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """One to five neighbouring ribs, 3.1 on average (3 on radiographs of crushed chests: World J Radiol 2011; fewer after minor trauma,
    where 47 % had one: Rofo 2014), the fourth to ninth and mostly lateral (most often fourth to seventh, lateral and posterolateral:
    Liebsch et al., PLoS ONE 2019). Ends stand off by 0.4 to 0.75 of the rib's height, or by 0.9 and more: offset to severely displaced in
    the Chest Wall Injury Society's terms; the undisplaced, over 90 % in contact, are not drawn. Two in five patients come weeks later,
    with callus: a cuff of young bone, 300 to 700 HU, round each break (not looked up).
    """
    side = _side(rng)
    count = int(rng.choice([1, 2, 3, 4, 5], p=(0.14, 0.2, 0.26, 0.22, 0.18)))
    first = int(rng.integers(4, 10 - min(count, 4)))
    region, low, high = [("anterior", 1.85, 2.15), ("lateral", 1.15, 1.75), ("posterior", 0.5, 1.0)][
        int(rng.choice(3, p=(0.15, 0.5, 0.35)))
    ]
    angle = float(rng.uniform(low, high))
    fractures, direction = [], float(rng.choice([-1.0, 1.0]))
    for rib in range(first, first + count):
        displaced = bool(rng.random() < 0.6)
        step = float(rng.uniform(0.9, 1.4) if displaced else rng.uniform(0.4, 0.75)) * a.rib_height * direction
        flail = bool(count >= 3 and rng.random() < 0.35)
        fractures.append(
            Fracture(
                side,
                rib,
                angle + float(rng.normal(0, 0.05)),
                float(rng.uniform(2.5, 7)),
                step,
                float(rng.uniform(38, 60)),
                4.0 if flail else 0.0,
            )
        )
    last = first + count - 1
    ribs = (
        f"{ORDINALS[first - 1]} rib" if count == 1 else f"{ORDINALS[first - 1]} {'and' if count == 2 else 'to'} {ORDINALS[last - 1]} ribs"
    )
    fact = Fact("rib_fracture", "present", side=_fact_side(side), location=f"{region} {ribs}")
    hematoma, healing = bool(rng.random() < 0.4), bool(rng.random() < 0.4)

    def draw(chest: Chest, r: np.random.Generator) -> None:
        for fracture in fractures if healing else ():
            box, dist = ellipsoid(chest.grid, _at_break(chest, fracture), np.array([r.uniform(9, 13), r.uniform(8, 12), r.uniform(8, 12)]))
            share = cover(dist, 4.0)
            dense = chest.hu[box]
            blend(dense, share * (dense < 300), float(r.uniform(300, 700)))
            chest.add_mask("rib_fracture", box, share > 0.5)
        if hematoma:  # blood under the parietal pleura at the fracture
            centre = _at_break(chest, fractures[len(fractures) // 2])
            box, dist = ellipsoid(chest.grid, centre, np.array([12.0 + 8 * len(fractures), 22.0, 12.0]))
            mine, theirs = overlap(chest.box, box)
            share = cover(dist[theirs], 5.0) * chest.lung[side][mine]
            blend(chest.region[mine], share, 50.0)
        if chest.fracture_mask is not None:
            whole = (slice(0, chest.grid.shape[0]), slice(0, chest.grid.shape[1]), slice(0, chest.grid.shape[2]))
            chest.add_mask("rib_fracture", whole, chest.fracture_mask)

    return a, Plan("rib_fracture", (fact,), draw, fractures=tuple(fractures))


def _at_break(chest: Chest, fracture: Fracture) -> NDArray[np.float64]:
    """(z, y, x) mm of a break, on the inner surface of the cage."""
    a = chest.anatomy
    z = float(rib_curve(a, fracture.rib, np.array([fracture.angle]))[0])
    width, depth = (float(v) for v in cage_profile(a, np.float32(z)))
    y = float(cage_centre_y(a, np.float32(z))) + depth * np.cos(fracture.angle) * 0.95
    return np.array([z, y, SIDES[fracture.side] * width * np.sin(fracture.angle) * 0.97])


# --- support devices ---------------------------------------------------------------------------------------------------------------

DEVICES = ("pacemaker", "central venous catheter", "endotracheal tube", "nasogastric tube", "chest tube")
METAL_HU, BARIUM_HU, CATHETER_HU, PLASTIC_HU = 9000.0, 8000.0, 4000.0, 700.0
"""On the extended scale (12-bit CT stops at 3071): titanium and lead wires; the stripe of tubes, 20 to 30 % barium sulphate by weight (not
looked up), of which barium has 8.51 cm2/g at 60 keV (xraydb): seven times water and more; thin catheters with their lumen; PVC tubing."""


def _support_device(rng: np.random.Generator, a: Anatomy, names: frozenset[str]) -> tuple[Anatomy, Plan]:
    """A pacemaker (generator 45 x 50 x 8 mm, left in five of six), a chest tube, most often for a pneumothorax, or the lines and tubes of
    intensive care, which come together: of ventilated patients most have a gastric tube and a central line too (shares not looked up).
    Across, by a third of a mm per French: catheters 2.5 mm (7 to 8 French), gastric tubes 5.2 (16), chest tubes 8 to 11 (24 to 32);
    tracheal tubes 10.6, as those for adults are about 1 cm (Radiopaedia).
    """
    group = rng.choice(["pacemaker", "chest tube", "intensive care"], p=(0.2, 0.5, 0.3) if "pneumothorax" in names else (0.4, 0.06, 0.54))
    if group == "intensive care":
        shares = {"endotracheal tube": 0.7, "nasogastric tube": 0.65, "central venous catheter": 0.8, "chest tube": 0.12, "pacemaker": 0.06}
        kinds = [kind for kind in DEVICES if rng.random() < shares[kind]] or ["central venous catheter"]
    else:
        kinds = [str(group)]
    sides = {
        "pacemaker": _side(rng, 0.17),
        "central venous catheter": _side(rng, 0.72),
        "chest tube": _side(rng),
    }
    facts = tuple(Fact("support_device", "present", side=_fact_side(sides[k]) if k in sides else None, kind=k) for k in kinds)

    def draw(chest: Chest, r: np.random.Generator) -> None:
        for kind in kinds:
            _DEVICE_DRAWERS[kind](chest, r, sides.get(kind, "right"))

    return a, Plan("support_device", facts, draw)


def _tube(chest: Chest, knots: NDArray[np.float64], radius_mm: float, hu: float, stripe_mm: float | None = None) -> None:
    """A bent tube or wire of one density; with ``stripe_mm`` a hollow one: air within, walls of plastic, a stripe of barium of that radius.

    Its mask is every voxel that it fills by a quarter of what it fills at most.
    """
    path = spline(knots)
    box, share = splat(chest.grid, *polyline(path, radius_mm, rings=2 if radius_mm > 1.5 else 0))
    if stripe_mm is None:
        blend(chest.hu[box], share, hu)
    else:
        blend(chest.hu[box], share, AIRWAY_HU)
        side = np.array([0.0, 0.0, radius_mm - 0.6])
        for parts, density in (((path - side, path + side), PLASTIC_HU), ((path + side * 0.8,), hu)):
            rods = [polyline(part, 0.9 if density == PLASTIC_HU else stripe_mm, rings=0) for part in parts]
            wall_box, wall = splat(chest.grid, np.concatenate([p for p, _ in rods]), np.concatenate([v for _, v in rods]))
            blend(chest.hu[wall_box], wall, density)
    chest.add_mask("support_device", box, share > 0.25 * min(1.0, float(share.max())))


AIRWAY_HU = -950.0


def _pacemaker(chest: Chest, rng: np.random.Generator, side: str) -> None:
    """Generator under the collar bone, one to two leads through the subclavian vein to atrium and ventricle."""
    a, sign, s = chest.anatomy, SIDES[side], chest.anatomy.scale
    z0, x0 = -88 * s + rng.uniform(-8, 10), sign * rng.uniform(92, 112)
    width, depth = (float(v) for v in cage_profile(a, np.float32(z0)))
    y0 = float(cage_centre_y(a, np.float32(z0))) - depth * np.sqrt(max(1 - (x0 / max(width, abs(x0) + 8)) ** 2, 0.05)) - 14
    size = rng.uniform(0.9, 1.1)
    box = chest.grid.box((z0 - 34, y0 - 14, x0 - 34), (z0 + 34, y0 + 14, x0 + 34))
    z, y, x = (axis[axis_box(axis, box)] for axis in chest.grid.axes_mm())
    tilt = rng.uniform(-0.4, 0.4)
    u, v = (z - z0) * np.cos(tilt) - (x - x0) * np.sin(tilt), (z - z0) * np.sin(tilt) + (x - x0) * np.cos(tilt)
    round_square = 1 - (np.abs(u / (22 * size)) ** 3 + np.abs(v / (25 * size)) ** 3) ** (1 / 3)
    share = cover((round_square * 22).astype(np.float32), 3.0) * cover(
        np.float32(4.0) - np.abs(y - np.float32(y0)), chest.grid.spacing_mm[1]
    )
    blend(chest.hu[box], share, METAL_HU * 0.7)
    chest.add_mask("support_device", box, share > 0.3)
    header = np.array([z0 - 20 * size, y0, x0 - sign * 6])
    vein = np.array([-104 * s, -30.0, sign * 62])
    brachio = np.array([-98 * s, -14.0, a.shift_top + sign * 24])
    cava = np.array([-70 * s, -6.0, -20 + a.shift_top])
    atrium = chest.heart_centre + np.array([-6.0, 0.0, -34.0])
    factor, _, left_edge = heart_extent(a)
    tip = np.array([chest.heart_centre[0] + 24 * factor, chest.heart_centre[1] - 10, a.shift + 0.62 * (left_edge - a.shift)])
    loop = np.array([z0 - 34 * size, y0 + 6, x0 - sign * 2])
    valve = chest.heart_centre + np.array([14 * factor, -6.0, -14.0])
    lead = np.stack([header, loop, vein, brachio, cava, atrium])
    _tube(chest, np.concatenate([lead, [valve, tip]]), 1.0, METAL_HU)
    if rng.random() < 0.65:
        appendage = chest.heart_centre + np.array([-20.0 * factor, -18.0, -12.0])
        beside = np.array([[0.0, 0, 0], [2, 0, 3], [3, 0, 0], [3, 0, 0], [0, 2, 2], [0, 0, 0]])
        _tube(chest, np.concatenate([lead + beside, [appendage]]), 1.0, METAL_HU)


def _central_line(chest: Chest, rng: np.random.Generator, side: str) -> None:
    """From the neck or below the collar bone to where the vena cava enters the atrium."""
    a, sign, s = chest.anatomy, SIDES[side], chest.anatomy.scale
    end = np.array([rng.uniform(-48, -8) * s, -6.0, -22 + a.shift_top])
    cava = np.array([-84 * s, -7.0, -19 + a.shift_top])
    brachio = np.array([-108 * s, -14.0, (sign * 26) + a.shift_top])
    if rng.random() < 0.6:  # jugular
        knots = np.array([[-185, -10, sign * 46], [-150 * s, -16, sign * 34], brachio, cava, end])
    else:
        knots = np.array([[-96 * s, -60, sign * 118], [-112 * s, -38, sign * 74], brachio, cava, end])
    _tube(chest, knots, 1.25, CATHETER_HU)


def _endotracheal(chest: Chest, rng: np.random.Generator, side: str) -> None:
    """Tip 2.5 to 6.5 cm above the carina: 5 +- 2 with the neck neutral (Goodman et al., AJR 1976), 3 +- 2 bent (Radiopaedia)."""
    a = chest.anatomy
    top = a.shift_top
    tip = chest.carina[0] - rng.uniform(25, 65)
    knots = np.array([[-191, 2, top * 0.3], [-165, 6, top * 0.7], [min(tip - 8, -120), 11, top], [tip, 13, top]])
    _tube(chest, knots, 5.3, BARIUM_HU, stripe_mm=0.8)


def _nasogastric(chest: Chest, rng: np.random.Generator, side: str) -> None:
    """Down the oesophagus behind the heart into the stomach."""
    a, s = chest.anatomy, chest.anatomy.scale
    dome = a.dome_z[1]
    knots = np.array(
        [
            [-191, 12, a.shift_top * 0.3 + 3], [-120 * s, 26, a.shift_top + 4], [-50 * s, 30, a.shift_top * 0.5 + a.shift * 0.5 + 2],
            [30 * s, 24, a.shift + 7], [dome + 4, 8, 22 + a.shift * 0.6],
            [dome + 38, -12, rng.uniform(44, 62)], [dome + 62, -20, rng.uniform(30, 64)],
        ]
    )  # fmt: skip
    _tube(chest, knots, 2.6, BARIUM_HU, stripe_mm=0.75)


def _chest_tube(chest: Chest, rng: np.random.Generator, side: str) -> None:
    """In at the fifth interspace on the flank, up along the inner wall towards the apex."""
    a, sign = chest.anatomy, SIDES[side]
    z0 = rng.uniform(5, 45)
    heights = np.array([z0, z0 - 22, z0 - 60, a.apex_z + rng.uniform(28, 55)])
    width, _ = cage_profile(a, heights.astype(np.float32))
    inward = np.array([1.0, 0.84, 0.78, 0.62])
    x = sign * width * inward
    y = cage_centre_y(a, heights.astype(np.float32)) + np.array([0, 4, 10, 8])
    inside = np.stack([heights, y, x], axis=1)
    outside = np.array([[z0 + 26, y[0] - 6, sign * (width[0] + a.muscle + a.fat + 8)]])
    _tube(chest, np.concatenate([outside, inside]).astype(np.float64), float(rng.uniform(4.0, 5.4)), BARIUM_HU, stripe_mm=1.0)


_DEVICE_DRAWERS: dict[str, Callable[[Chest, np.random.Generator, str], None]] = {
    "pacemaker": _pacemaker,
    "central venous catheter": _central_line,
    "endotracheal tube": _endotracheal,
    "nasogastric tube": _nasogastric,
    "chest tube": _chest_tube,
}

_PLANNERS: dict[str, Callable[[np.random.Generator, Anatomy, frozenset[str]], tuple[Anatomy, Plan]]] = {
    "cardiomegaly": _cardiomegaly,
    "emphysema": _emphysema,
    "edema": _edema,
    "atelectasis": _atelectasis,
    "consolidation": _consolidation,
    "pleural_effusion": _pleural_effusion,
    "pneumothorax": _pneumothorax,
    "lung_nodule": _lung_nodule,
    "rib_fracture": _rib_fracture,
    "support_device": _support_device,
}
_ORDER = tuple(_PLANNERS)
"""Air and parenchyma first, then what displaces lung, then what must lie in the lung that is left, then bone and metal."""
