"""A person's chest: the numbers that vary from one to the next, and the tissues drawn from them in HU.

Frame and arrays as in :mod:`modalities.phantom.grid` (x left, y posterior, z down, mm; arrays (S, H, W)).

Sources of the ranges (what was looked up, and where, is in SOURCES.md beside this file): inner chest 27.9 cm wide in men, 25.7 in women,
cardiothoracic ratio 0.46 +- 0.04, films of healthy adults in Jos (drawn: 28.0, 25.2, 0.44 +- 0.03; upper limit 0.50); aorta that widens
by about 1 mm a decade: MRI of 3573 adults of MESA, J Magn Reson Imaging 2013, and descending aorta 24 +- 3 mm: Wolak et al., JACC Imaging
2008 (drawn: 26 mm); lung bases without disease -700 to -860 HU over all phases of breathing: J Comput Assist Tomogr 1979;
cancellous bone of L1 226 HU before 30 years, 2.5 less each year: Jang et al., Radiology 2019 (the thoracic spine drawn here: 240, 1.8
less); trachea 18 mm wide in men, 15 in women: J Korean Radiol Soc 1988; rib cortex 0.9 to 2.6 mm: Holcombe et al., J Anat 2019 (drawn
thicker and less dense, for the voxels). Soft tissue 20 to 60 HU, fat -120 to -80, cortex 300 to 1500, rib slope and the tree of vessels by
Murray's law are textbook knowledge, not looked up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.types import Fact
from modalities.phantom.grid import Bool, Box, Float, Grid, axis_box, blend, cover, polyline, smooth_noise, splat, spline, tubes

SIDES = {"right": -1.0, "left": 1.0}
"""Sign of x on each side of the patient."""
MUSCLE_HU, FAT_HU, AIR_HU, BLOOD_HU = 50.0, -100.0, -1000.0, 42.0
SHELL_BINS = 360  # the chest wall of one side, unrolled from the spine (0) to the sternum (pi)


@dataclass(frozen=True)
class Anatomy:
    """What a person is made of. Lengths in mm; z grows downwards, 0 at the middle of the grid."""

    sex: str  # "F" or "M"
    age: int
    scale: float  # height of the chest relative to an average man
    half_width: float  # inner chest, side to side
    half_depth: float  # inner chest, front to back
    apex_z: float
    dome_z: tuple[float, float]  # top of the right and left hemidiaphragm
    dome_rise: tuple[float, float]  # how far each dome stands above its rim
    muscle: float
    fat: float
    breast: float  # depth of the breasts, 0 in men
    cardiothoracic_ratio: float
    heart_angle: float  # of the long axis below horizontal, radians
    knob: float  # radius of the aortic arch
    shift: float  # of the mediastinum to the patient's left at heart level
    shift_top: float  # the same at the level of the trachea
    lung_hu: float
    bone_hu: float  # cancellous
    rib_height: float
    rib_drop: float  # how far ribs fall from spine to front, relative to average
    scapula: float  # how far the shoulder blades are turned out of the way
    stomach_air: float  # radius of the gastric bubble, 0 for none
    vessel: float  # relative calibre of lung vessels
    texture_seed: int


def sample_anatomy(rng: np.random.Generator) -> Anatomy:
    """A random adult without findings."""
    male = bool(rng.random() < 0.52)
    age = int(np.clip(rng.normal(58, 17), 18, 92))
    scale = float(np.clip(rng.normal(1.0 if male else 0.94, 0.035), 0.85, 1.08))
    habitus = float(np.clip(rng.normal(0, 1), -1.8, 2.4))  # thin to obese
    inspiration = float(rng.normal(0, 7))
    right_dome = 76 * scale + inspiration - 3 * max(habitus, 0)
    rise = float(np.clip(rng.normal(40, 5), 28, 52))
    return Anatomy(
        sex="M" if male else "F",
        age=age,
        scale=scale,
        half_width=float(np.clip(rng.normal(140 if male else 126, 6), 112, 154)) + 2 * habitus,
        half_depth=float(np.clip(rng.normal(94 if male else 85, 6), 72, 106)) + 1.5 * habitus,
        apex_z=float(-146 * scale + rng.normal(0, 4)),
        dome_z=(right_dome, right_dome + float(rng.normal(10, 5))),
        dome_rise=(rise, rise + float(rng.normal(-2, 3))),
        muscle=float(np.clip(rng.normal(15 if male else 11, 3), 6, 22)),
        fat=float(np.clip((11 if male else 15) * np.exp(0.45 * habitus), 4, 36)),
        breast=0.0 if male else float(np.clip(rng.normal(26 + 8 * habitus, 8), 6, 48)),
        cardiothoracic_ratio=float(np.clip(rng.normal(0.44 + 0.0003 * (age - 50) + 0.008 * habitus, 0.026), 0.36, 0.49)),
        heart_angle=float(np.clip(rng.normal(0.68 - 0.08 * habitus, 0.09), 0.4, 0.95)),
        knob=float(np.clip(12.0 + 0.06 * (age - 40) + rng.normal(0, 1.2), 9, 19)),
        shift=float(rng.normal(0, 2)),
        shift_top=float(rng.normal(0, 1.5)),
        lung_hu=float(np.clip(rng.normal(-850, 22), -895, -790)),
        bone_hu=float(np.clip(260 - 2.2 * (age - 25) + rng.normal(0, 30), 70, 320)),
        rib_height=float(np.clip(rng.normal(13 if male else 11.5, 0.9), 9.5, 15.5)),
        rib_drop=float(np.clip(rng.normal(1.0, 0.1), 0.7, 1.25)),
        scapula=float(np.clip(rng.normal(0, 12), -22, 22)),
        stomach_air=float(rng.uniform(16, 30)) if rng.random() < 0.7 else 0.0,
        vessel=float(np.clip(rng.normal(1.0, 0.08), 0.8, 1.2)),
        texture_seed=int(rng.integers(2**62)),
    )


@dataclass(frozen=True)
class Fracture:
    """A broken rib: ``angle`` on the unrolled wall (0 spine, pi sternum), the gap, and how far the front part stands off."""

    side: str
    rib: int
    angle: float
    gap_mm: float
    step_mm: float
    length_mm: float = 45.0  # of the displaced part
    second_gap_mm: float = 0.0  # a flail segment is broken at both ends


@dataclass
class Chest:
    """A chest being drawn: the volume, and the fields that findings are placed by (arrays over ``box``, the inner chest)."""

    grid: Grid
    anatomy: Anatomy
    hu: Float  # (S, H, W), the whole grid
    box: Box
    z: Float  # (s, 1, 1); y (1, h, 1), x (1, 1, w): voxel centres in the box
    y: Float
    x: Float
    lung: dict[str, Float]  # side -> share of the voxel that is aerated lung
    wall_mm: Float  # depth below the inner surface of the chest wall, negative in the wall
    noise: Float  # smooth, unit variance
    dome_z: dict[str, Float]  # side -> (1, h, w) height of the diaphragm
    hilum: dict[str, NDArray[np.float64]]  # side -> (z, y, x)
    midline_x: Float  # (s, 1, 1), where the mediastinum's middle lies
    carina: NDArray[np.float64]
    heart: Float
    heart_centre: NDArray[np.float64]
    wall_half_width: Float  # (s,), inner half width of the chest at each slice
    wall_half_depth: Float
    fractures: tuple[Fracture, ...] = ()
    fracture_mask: Bool | None = None  # whole grid
    masks: dict[str, Bool] = field(default_factory=dict)  # finding -> whole grid
    facts: list[Fact] = field(default_factory=list)

    @property
    def region(self) -> Float:
        """The view of ``hu`` inside the box."""
        return self.hu[self.box]

    def add_mask(self, finding: str, box: Box, inside: Bool) -> None:
        """Join ``inside``, an array over ``box``, to the finding's mask."""
        mask = self.masks.setdefault(finding, np.zeros(self.grid.shape, dtype=bool))
        mask[box] |= inside


def cage_profile(anatomy: Anatomy, z: Float) -> tuple[Float, Float]:
    """Inner half width and half depth of the rib cage at heights ``z``; about 0 above the apex."""
    t = np.clip((z - anatomy.apex_z) / (165 * anatomy.scale - anatomy.apex_z), 1e-4, 1.0)
    shape = (1 - (1 - np.minimum(t / 0.8, 1.0)) ** 2.7) ** 0.52
    shape = np.where(z > anatomy.apex_z, shape, 1e-3)
    return (anatomy.half_width * shape).astype(np.float32), (anatomy.half_depth * shape**0.75).astype(np.float32)


def cage_centre_y(anatomy: Anatomy, z: Float) -> Float:
    """The apex lies further back than the base (the sternum slopes forwards)."""
    t = np.clip((z - anatomy.apex_z) / 200.0, 0, 1.2)
    return (24.0 * (1 - t) - 2.0 * t).astype(np.float32)


def build_chest(grid: Grid, anatomy: Anatomy, fractures: tuple[Fracture, ...] = (), haze: float = 0.0, pruning: float = 0.0) -> Chest:
    """Draw a chest.

    Args:
        grid: where to.
        anatomy: who.
        fractures: broken ribs.
        haze: 0 to 1, how far edema blurs and widens the vessels (upper zones most).
        pruning: 0 to 1, the share of small vessels that emphysema has destroyed.
    """
    rng = np.random.default_rng(anatomy.texture_seed)  # the texture belongs to the person, not to the study
    z, y, x = grid.axes_mm()
    half_width, half_depth = cage_profile(anatomy, z)
    hu = _body(grid, anatomy, z, y, x, half_width, half_depth)
    _breasts(grid, anatomy, hu)
    chest = _cavity(grid, anatomy, hu, z, y, x, half_width, half_depth, rng)
    _ribs(chest, fractures)
    _spine_and_sternum(chest)
    _shoulder_girdle(chest)
    _airways(chest)
    _abdomen(chest)
    _aerate(chest, rng, haze, pruning)
    return chest


def _body(grid: Grid, a: Anatomy, z: Float, y: Float, x: Float, half_width: Float, half_depth: Float) -> Float:
    """Air, a ring of fat and muscle within: neck, shoulders and trunk as one tapering tube."""
    wall = 9 + a.muscle + a.fat
    s = a.scale
    heights = np.array([-192, -172, -158, -140, -112, -75, -45, -15, 15]) * s
    shoulder = np.interp(z.ravel(), heights, [60, 70, 108, 180, 222, 222, 198, 150, 0.0]).astype(np.float32)[:, None, None]
    neck = np.interp(z.ravel(), heights[:5], [56, 62, 72, 82, 70]).astype(np.float32)[:, None, None]
    width = np.maximum(half_width + wall, shoulder)
    depth = np.maximum(half_depth + wall + 4, neck + 0.6 * a.fat)
    centre = cage_centre_y(a, z) + 4
    px, py = (x / width) ** 2, ((y - centre) / depth) ** 2  # (s, 1, w), (s, h, 1)
    f = _radius(px, py)
    reach = np.minimum(depth + 25, width)
    f *= -reach
    f += reach  # depth under the skin in mm
    hu = cover(f, 4.0)
    hu *= FAT_HU - AIR_HU
    hu += AIR_HU
    f -= a.fat
    muscle = cover(f, 5.0)
    muscle *= MUSCLE_HU - FAT_HU
    hu += muscle
    return hu


def _radius(px: Float, py: Float) -> Float:
    """Radial coordinate of a cross-section a little squarer than an ellipse, 1 on its border; ``px`` is (x / a)^2, ``py`` (y / b)^2."""
    f = px + py
    f -= (np.float32(0.45) * np.minimum(px, 1.6)) * np.minimum(py, 1.6)
    return np.sqrt(f, out=f)


def _breasts(grid: Grid, a: Anatomy, hu: Float) -> None:
    """Half ellipsoids of fat and gland on the front of the trunk."""
    if a.breast <= 0:
        return
    front = float(cage_centre_y(a, np.float32(30.0 * a.scale)) - a.half_depth * 0.95 - 9 - a.muscle - a.fat * 0.8)
    for sign in SIDES.values():
        centre = np.array([36 * a.scale + 0.3 * a.breast, front, sign * 0.56 * a.half_width])
        radii = np.array([46 + 0.3 * a.breast, a.breast + 8, 50 + 0.25 * a.breast])
        box, dist = ellipsoid(grid, centre, radii)
        part = hu[box]
        np.maximum(part, AIR_HU + cover(dist, 4.0) * 940.0, out=part)


def ellipsoid(grid: Grid, centre: NDArray[np.float64], radii: NDArray[np.float64], angle: float = 0.0) -> tuple[Box, Float]:
    """Box and approximate signed distance (mm, positive inside) of an ellipsoid; ``angle`` turns it in the coronal plane, z towards x."""
    reach = np.array([max(radii[0], radii[2]), radii[1], max(radii[0], radii[2])]) if angle else radii
    box = grid.box(centre - reach - 6, centre + reach + 6)
    z, y, x = (axis[axis_box(axis, box)] for axis in grid.axes_mm())
    dz, dy, dx = z - np.float32(centre[0]), y - np.float32(centre[1]), x - np.float32(centre[2])
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = c * dz - s * dx, s * dz + c * dx  # (s, 1, w)
    plane = (u / np.float32(radii[0])) ** 2 + (v / np.float32(radii[2])) ** 2
    f = plane + (dy / np.float32(radii[1])) ** 2
    np.sqrt(f, out=f)
    return box, np.asarray((1 - f) * np.float32(np.cbrt(np.prod(radii))), dtype=np.float32)


def _cavity(
    grid: Grid, a: Anatomy, hu: Float, z: Float, y: Float, x: Float, half_width: Float, half_depth: Float, rng: np.random.Generator
) -> Chest:
    """The inner chest: where lungs are and where heart, great vessels, spine and diaphragm keep them out."""
    s = a.scale
    bottom = max(a.dome_z) + 95
    box = grid.box((a.apex_z - 14, -a.half_depth - 22, -a.half_width - 14), (bottom, a.half_depth + 30, a.half_width + 14))
    z, y, x = z[box[0]], y[:, box[1]], x[:, :, box[2]]
    half_width, half_depth = half_width[box[0]], half_depth[box[0]]
    centre = cage_centre_y(a, z)
    px, py = (x / half_width) ** 2, ((y - centre) / half_depth) ** 2
    f = _radius(px, py)
    share = (px / np.maximum(px + py, 1e-6)).astype(np.float32)
    wall = (1 - f) * (half_depth + (half_width - half_depth) * share)  # mm below the inner surface
    t = np.clip((z - a.apex_z) / 140, 0, 1)
    midline = (a.shift_top * (1 - t) + a.shift * t).astype(np.float32)

    air = cover(wall, 4.0)
    width = grid.spacing_mm[2]
    # mediastinum: widest where the great vessels are, thin behind the sternum
    heights = np.array([-190, -110, -80, -62, -44, -20, 10, 60, 200]) * s
    left = np.interp(z.ravel(), heights, [25, 24, 23, 22, 30, 26, 22, 19, 19]).astype(np.float32)[:, None, None]
    right = np.interp(z.ravel(), heights, [25, 25, 24, 24, 25, 24, 22, 19, 18]).astype(np.float32)[:, None, None]
    floor = np.where(y < 6, np.float32(0.15) + np.float32(0.3) * np.clip((z + 40) / 80, 0, 1), np.float32(0.15)).astype(np.float32)
    front = floor + (1 - floor) * np.exp(-(((y - 6) / 38) ** 2)).astype(np.float32)  # fat before the heart, oesophagus and aorta behind
    off = x - midline
    near = np.abs(x.ravel()) < 75  # nothing central reaches further out; a slice, since x is sorted
    core = (slice(None), slice(None), slice(int(near.argmax()), int(near.argmax() + near.sum())))
    off_core = off[core]
    air[core] *= cover(off_core - left * front, width) + cover(-right * front - off_core, width)
    spine_y = _spine_y(a, z)
    back = (slice(None), slice(int(np.searchsorted(y.ravel(), 15.0)), None), core[2])
    spine = np.sqrt((off_core * np.float32(0.92)) ** 2 + (y[back[:2]] - spine_y) ** 2)
    air[back] *= cover(spine - np.float32(19.5 * s), 6.0)
    chest = Chest(
        grid, a, hu, box, z, y, x, {}, wall, smooth_noise(rng, wall.shape, (11, 7, 12)), {}, {}, midline, np.zeros(3), wall, np.zeros(3),
        half_width, half_depth,
    )  # fmt: skip
    _great_vessels(chest, air)
    _heart(chest, air)
    for index, (side, sign) in enumerate(SIDES.items()):
        xc, rise = 0.50 * a.half_width * sign, a.dome_rise[index]
        bow = ((x - xc) / (0.50 * a.half_width)) ** 2 * np.float32(rise)
        bow = np.where(sign * (x - xc) < 0, np.minimum(0.35 * bow, 0.35 * rise), np.minimum(bow, 3.2 * rise))  # flatter medially
        sulcus = ((y + 12) / (0.82 * a.half_depth)) ** 2 * np.float32(1.25 * rise)
        chest.dome_z[side] = (np.float32(a.dome_z[index]) + bow + sulcus).astype(np.float32)
        lower, wide = (6, 30) if side == "right" else (-6, 32)  # the left hilum is the higher one
        chest.hilum[side] = np.array([-24.0 * s + lower, 6.0, a.shift * 0.7 + sign * wide])
    is_left = off > 0  # (s, 1, w)
    low = slice(int(np.searchsorted(z.ravel(), min(float(d.min()) for d in chest.dome_z.values()) - 4)), None)
    dome = np.where(is_left[low], chest.dome_z["left"], chest.dome_z["right"])
    air[low] *= cover(dome - z[low], grid.spacing_mm[0])
    chest.lung["left"] = air * is_left
    chest.lung["right"] = air - chest.lung["left"]
    chest.carina = np.array([-52.0 * s, 16.0, a.shift_top * 0.5 + a.shift * 0.5])
    return chest


def _spine_y(a: Anatomy, z: Float) -> Float:
    """Centre of the vertebral bodies: on the back wall, bowed by the kyphosis."""
    _, depth = cage_profile(a, z)
    back = cage_centre_y(a, z) + np.maximum(depth, 0.55 * a.half_depth)
    return np.asarray(back - 9, dtype=np.float32)


def _great_vessels(chest: Chest, air: Float) -> None:
    """Aortic arch and descending aorta, superior vena cava, pulmonary trunk: soft tissue that borders lung."""
    a, s = chest.anatomy, chest.anatomy.scale
    top, low = a.shift_top, a.shift
    knob = a.knob
    for centre, radii in (
        ((-66 * s, 14.0, 18 + top), (knob + 2, knob + 12, knob + 3)),  # arch
        ((-34 * s, -14.0, 23 + low * 0.6), (17, 18, 14)),  # pulmonary trunk
        ((-58 * s, -8.0, -18 + top), (46, 14, 13)),  # vena cava and ascending aorta
    ):
        box, dist = ellipsoid(chest.grid, np.array(centre), np.array(radii, dtype=float))
        _carve(chest, air, box, cover(dist, 4.0))
    columns = slice(int(np.searchsorted(chest.x.ravel(), -45.0)), int(np.searchsorted(chest.x.ravel(), 70.0)))
    rows = slice(int(np.searchsorted(chest.y.ravel(), 0.0)), None)
    x_aorta = 16 + low * 0.5 + np.float32(6) * np.clip(1 - (chest.z + 66 * s) / 120, -0.4, 1)
    aorta = np.sqrt((chest.x[:, :, columns] - x_aorta) ** 2 + (chest.y[:, rows] - (_spine_y(a, chest.z) - 16)) ** 2)
    below_arch = cover(chest.z + np.float32(70 * s), 4.0)
    air[:, rows, columns] *= 1 - cover(np.float32(knob) - aorta, 4.0) * below_arch


def _carve(chest: Chest, air: Float, box: Box, coverage: Float) -> None:
    """Take ``coverage``, an array over the grid box ``box``, out of the air of the inner chest."""
    mine, theirs = overlap(chest.box, box)
    air[mine] *= 1 - coverage[theirs]


def overlap(outer: Box, other: Box) -> tuple[Box, Box]:
    """The common part of two grid boxes, as slices into each."""
    mine, theirs = [], []
    for a, b in zip(outer, other, strict=True):
        low, high = max(a.start, b.start), max(min(a.stop, b.stop), max(a.start, b.start))
        mine.append(slice(low - a.start, high - a.start))
        theirs.append(slice(low - b.start, high - b.start))
    return (mine[0], mine[1], mine[2]), (theirs[0], theirs[1], theirs[2])


def heart_extent(a: Anatomy) -> tuple[float, float, float]:
    """Scale of the heart and x of its right and left border such that border to border over inner chest width is the asked-for ratio."""
    main, atrium = _heart_shape(a)
    left = main[1][2] + np.hypot(main[0][0] * np.sin(main[2]), main[0][2] * np.cos(main[2]))
    right = min(main[1][2] - np.hypot(main[0][0] * np.sin(main[2]), main[0][2] * np.cos(main[2])), atrium[1][2] - atrium[0][2])
    z = np.linspace(a.apex_z, max(a.dome_z), 64, dtype=np.float32)
    inner = 2 * float(cage_profile(a, z)[0].max())
    factor = a.cardiothoracic_ratio * inner / float(left - right)
    return factor, float(right * factor + a.shift), float(left * factor + a.shift)


_Shape = tuple[NDArray[np.float64], NDArray[np.float64], float]


def _heart_shape(a: Anatomy) -> tuple[_Shape, _Shape]:
    """Ventricles and right atrium of a heart of unit scale: radii (z, y, x), centre relative to the midline, turn in the coronal plane."""
    ventricles = (np.array([43.0, 66.0, 66.0]), np.array([0.0, -28.0, 19.0]), a.heart_angle)
    atrium = (np.array([38.0, 52.0, 30.0]), np.array([-4.0, -16.0, -15.0]), 0.0)
    return ventricles, atrium


def _heart(chest: Chest, air: Float) -> None:
    """The heart rests on the left dome; its share of each voxel stays in ``chest.heart``."""
    a = chest.anatomy
    factor, _, _ = heart_extent(a)
    floor = 0.5 * (a.dome_z[0] + a.dome_z[1])
    heart = np.zeros_like(air)
    height = factor * np.hypot(43 * np.cos(a.heart_angle), 66 * np.sin(a.heart_angle))
    base = np.array([floor + 26 - height, 0.0, a.shift])
    for radii, centre, angle in _heart_shape(a):
        depth = np.array([1.0, 0.9, 1.0])
        box, dist = ellipsoid(chest.grid, base + centre * factor, radii * factor * depth, angle)
        mine, theirs = overlap(chest.box, box)
        part = heart[mine]
        np.maximum(part, cover(dist[theirs], 4.0), out=part)
    floor_z = np.float32(floor + 34)
    heart *= cover(floor_z - chest.z, 6.0)
    heart *= cover(chest.wall_mm - 3, 4.0)
    air *= 1 - heart
    chest.heart = heart
    chest.heart_centre = base + np.array([0.0, -18.0, 12.0])


RIB_THICKNESS = 8.5  # from the inner to the outer surface
RIB_END = {11: 1.55, 12: 1.1}  # floating ribs stop on the flank


def rib_curve(a: Anatomy, rib: int, angle: NDArray[Any]) -> NDArray[np.float64]:
    """Height z of the middle of a rib (1 to 12) at angles from the spine (0) round to the front; falls, then its cartilage climbs."""
    head = a.apex_z - 6 + (rib - 1) * 22.8 * a.scale
    drop = min(26 + 13 * (rib - 1), 92) * a.rib_drop * a.scale
    front = 2.35
    fall = np.clip(angle / front, 0, 1)
    path = drop * (fall**1.25) - 9 * np.sin(np.clip(angle / 0.5, 0, 1) * np.pi)  # the neck of the rib first rises a little
    climb = np.clip((angle - front) / (np.pi - front), 0, 1) * (10 + 7 * max(rib - 3, 0)) * a.scale
    return np.asarray(head + path - climb, dtype=np.float64)


def _ribs(chest: Chest, fractures: tuple[Fracture, ...]) -> None:
    """Ribs are bands painted on the unrolled chest wall (height by angle), then wrapped on a shell around the inner chest."""
    a, grid = chest.anatomy, chest.grid
    z_all, y_all, x_all = grid.axes_mm()
    box = grid.box((a.apex_z - 30, -a.half_depth - 28, -a.half_width - 16), (176, a.half_depth + 34, a.half_width + 16))
    z, y, x = z_all[box[0]], y_all[:, box[1]], x_all[:, :, box[2]]
    # the shell hugs the cage; above the apex it closes like a dome
    width, depth = cage_profile(a, z)
    centre = cage_centre_y(a, z)
    width, depth = np.maximum(width, 4), np.maximum(depth, 4)
    px, py = (x / width) ** 2, ((y - centre) / depth) ** 2
    f = _radius(px, py)
    f -= 1
    f *= 0.5 * (width + depth)  # mm outside the inner surface
    f -= RIB_THICKNESS / 2
    shell = cover(np.float32(RIB_THICKNESS / 2) - np.abs(f, out=f), 4.0)
    sides = [_rib_map(chest, z.ravel(), side, fractures) for side in SIDES]
    coverage, density, broken = (np.concatenate(pair, axis=1) for pair in zip(*sides, strict=True))
    angle = np.arctan2(np.abs(x) * np.float32(a.half_depth / a.half_width), y - np.float32(4.0))[0]  # 0 at the spine, pi in front
    bins = np.clip((angle * (SHELL_BINS / np.pi)).astype(np.int32), 0, SHELL_BINS - 1) + SHELL_BINS * (x[0] > 0)  # (h, w): right, then left
    if fractures:  # the ends and the gap between them
        mask = np.zeros(grid.shape, dtype=bool)
        mask[box] = np.take(broken, bins, axis=1) & (shell > 0.4)
        chest.fracture_mask, chest.fractures = mask, fractures
    shell *= np.take(coverage, bins, axis=1)
    where = np.flatnonzero(shell > 0.02)
    zi, rest = np.divmod(where, bins.size)
    cell = (zi, bins.ravel()[rest])
    yi, xi = np.divmod(rest, bins.shape[1])
    _, rows, columns = grid.shape
    at = ((zi + box[0].start) * rows + (yi + box[1].start)) * columns + (xi + box[2].start)
    flat = chest.hu.reshape(-1)  # a view
    old, share = flat[at], shell.reshape(-1)[where]
    flat[at] = old + share * (density[cell] - old)


def _rib_map(chest: Chest, z: Float, side: str, fractures: tuple[Fracture, ...]) -> tuple[Float, Float, Bool]:
    """Coverage, HU and fracture mask of one side's ribs on the unrolled wall, each (s, SHELL_BINS)."""
    a = chest.anatomy
    angle = (np.arange(SHELL_BINS) + 0.5) * (np.pi / SHELL_BINS)
    radius = np.hypot(a.half_width * np.sin(angle), a.half_depth * np.cos(angle))  # mm per radian, roughly
    coverage = np.zeros((len(z), SHELL_BINS), dtype=np.float32)
    density = np.full_like(coverage, a.bone_hu)
    broken = np.zeros(coverage.shape, dtype=bool)
    step = chest.grid.spacing_mm[0]
    cortex = 850 + 1.2 * a.bone_hu
    for rib in range(1, 13):
        centre = rib_curve(a, rib, angle)
        height = a.rib_height * (0.85 if rib in (1, 11, 12) else 1.0) * (1.0 + 0.12 * (angle > 1.9))
        bone = np.clip((RIB_END.get(rib, 2.35) - angle) * radius / 6 + 0.5, 0, 1)
        cartilage = (angle > 2.35) & (rib <= 10)
        gap = np.ones_like(angle)
        near = np.zeros(angle.shape, dtype=bool)
        for f in fractures:
            if f.side != side or f.rib != rib:
                continue
            along = (angle - f.angle) * radius  # mm towards the front
            displaced = np.clip(np.where(along > 0, 1 - along / f.length_mm, 0.0), 0, 1)
            if f.second_gap_mm > 0:
                displaced = ((along > 0) & (along < f.length_mm)).astype(float)
                gap *= np.clip((np.abs(along - f.length_mm) - f.second_gap_mm / 2) / 1.5 + 0.5, 0, 1)
                near |= np.abs(along - f.length_mm) < 12
            centre = centre + f.step_mm * displaced
            gap *= np.clip((np.abs(along) - f.gap_mm / 2) / 1.5 + 0.5, 0, 1)
            near |= np.abs(along) < 12
        first = max(int(np.searchsorted(z, centre.min() - 12)), 0)
        last = min(int(np.searchsorted(z, centre.max() + 12)), len(z))
        if first >= last:
            continue
        off = np.abs(z[first:last, None] - centre)  # (rows, bins)
        band = np.clip((height / 2 - off) / step + 0.5, 0, 1)
        inner = np.clip((height / 2 - 2.2 - off) / step + 0.5, 0, 1)
        hu = np.where(cartilage, 110.0 + 0.6 * max(a.age - 40, 0), cortex + (a.bone_hu + 380 - cortex) * inner)
        weight = (band * np.where(cartilage, 0.75, bone) * gap).astype(np.float32)
        newer = weight > coverage[first:last]
        density[first:last][newer] = np.broadcast_to(hu, newer.shape)[newer]
        coverage[first:last][newer] = weight[newer]
        broken[first:last] |= (band > 0.3) & near
    return coverage, density.astype(np.float32), broken


def _spine_and_sternum(chest: Chest) -> None:
    """Vertebral bodies and discs, pedicles and arches, and the sternum."""
    a, grid = chest.anatomy, chest.grid
    z, y, x = grid.axes_mm()
    box = grid.box((-200, 20, -40), (200, 150, 40))
    z, y, x = z[box[0]], y[:, box[1]], x[:, :, box[2]]
    spine_y = _spine_y(a, z)
    size = (15.5 + 0.018 * (z + 150)) * a.scale
    phase = np.mod((z - a.apex_z + 6) / np.float32(22.8 * a.scale), 1.0)
    disc = cover(np.float32(0.11) - np.abs(phase - 0.5), 0.12)  # share of the height
    plate = cover(np.float32(0.19) - np.abs(phase - 0.5), 0.08) - disc
    body = cover(size - np.sqrt((x / np.float32(1.12)) ** 2 + (y - spine_y) ** 2), 4.0)
    hu = (0.8 * a.bone_hu + 30) * (1 - disc) + 80 * disc + 220 * np.clip(plate, 0, 1)
    part = chest.hu[box]
    blend(part, body, hu)
    level = np.exp(-(((phase - 0.12) / 0.22) ** 2)).astype(np.float32)
    pedicles = (
        cover(np.float32(4.5) - np.sqrt((np.abs(x) - 13 * np.float32(a.scale)) ** 2 + (0.5 * (y - spine_y - size - 4)) ** 2), 4.0) * level
    )
    blend(part, pedicles, 420.0)
    arch = cover(np.float32(12) - np.sqrt((0.55 * x) ** 2 + (y - spine_y - size - 20) ** 2), 5.0) * (
        np.float32(0.25) + np.float32(0.35) * level
    )
    blend(part, arch, 260.0)
    # sternum: a plate on the front wall
    box = grid.box((-115 * a.scale, -150, -26), (45 * a.scale, -20, 26))
    z, y, x = (axis[axis_box(axis, box)] for axis in grid.axes_mm())
    _, depth = cage_profile(a, z)
    front = cage_centre_y(a, z) - depth - 7
    half = np.where(z < -70 * a.scale, 24, 17).astype(np.float32)
    blend(chest.hu[box], cover(6 - np.abs(y - front), 4.0) * cover(half - np.abs(x), 3.0), a.bone_hu * 0.9)


def _shoulder_girdle(chest: Chest) -> None:
    """Collar bones, shoulder blades and heads of the humeri."""
    a, grid, s = chest.anatomy, chest.grid, chest.anatomy.scale
    rng = np.random.default_rng(a.texture_seed + 1)
    tilt = rng.normal(0, 5, 2)
    points, volumes = [], []
    for index, sign in enumerate(SIDES.values()):
        path = np.array([[-112, -52, 22], [-118, -46, 60], [-128, -22, 105], [-134, -2, 150], [-128, 4, 172]], dtype=float)
        path[:, 0] = path[:, 0] * s + np.linspace(0, 1, 5) * tilt[index]
        path[:, 2] *= sign
        for p, v in (polyline(spline(path), 6.0 if a.sex == "M" else 5.2, rings=3),):
            points.append(p)
            volumes.append(v)
    box, share = splat(grid, np.concatenate(points), np.concatenate(volumes))
    blend(chest.hu[box], share, 950.0)
    for index, sign in enumerate(SIDES.values()):
        box, dist = ellipsoid(grid, np.array([-118 * s + tilt[index], 8.0, sign * 182]), np.array([24.0, 23.0, 24.0]))
        blend(chest.hu[box], cover(dist, 4.0), 280.0)
    _scapulae(chest, tilt)


def _scapulae(chest: Chest, tilt: NDArray[np.float64]) -> None:
    """Thin triangular blades behind the upper ribs with a thick outer border and a spine; how far out depends on the arms."""
    a, grid, s = chest.anatomy, chest.grid, chest.anatomy.scale
    for index, sign in enumerate(SIDES.values()):
        medial = 104 + a.scapula
        corners = np.array(
            [[-116, medial + 6], [-124, 172], [-88, 166], [-8, medial + 36], [2, medial + 22], [-60, medial - 2]], dtype=float
        )  # (z, |x|), counted round
        corners[:, 0] = corners[:, 0] * s + tilt[index]
        box = grid.box((-135 * s, 0, 80 if sign > 0 else -190), (20 * s, 140, 190 if sign > 0 else -80))
        z, y, x = grid.axes_mm()
        z, y, x = z[box[0]], y[:, box[1]], x[:, :, box[2]]
        across = sign * x
        inside = np.full((z.shape[0], 1, x.shape[2]), np.float32(99))
        middle = corners.mean(axis=0)
        for (z0, x0), (z1, x1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            nz, nx = (x1 - x0), -(z1 - z0)
            norm = np.hypot(nz, nx) * (1 if nz * (middle[0] - z0) + nx * (middle[1] - x0) > 0 else -1)
            np.minimum(inside, ((z - z0) * (nz / norm) + (across - x0) * (nx / norm)).astype(np.float32), out=inside)
        plane = cover(inside, 3.0)
        rim = plane * cover(np.float32(5.5) - inside, 3.0)
        surface = np.float32(cage_centre_y(a, np.float32(-50 * s)) + 30 + 62) - np.float32(0.42) * (across - 104)
        sheet = cover(np.float32(2.2) - np.abs(y - surface), grid.spacing_mm[1])
        part = chest.hu[box]
        blend(part, sheet * plane, 420.0)
        blend(part, cover(np.float32(3.5) - np.abs(y - surface), grid.spacing_mm[1]) * rim, 560.0)


def _airways(chest: Chest) -> None:
    """Trachea and main bronchi: air."""
    a, s = chest.anatomy, chest.anatomy.scale
    c = chest.carina
    top = a.shift_top
    trachea = np.array([[-200, 2, top * 0.3], [-150 * s, 8, top], [-100 * s, 12, top + 1], c])
    right, left = chest.hilum["right"], chest.hilum["left"]
    for path, radius in (
        (trachea, 8.6 if a.sex == "M" else 7.4),
        (np.stack([c, 0.5 * (c + right) - np.array([0, 0, 2]), right + np.array([2, 4, -6])]), 6.2),
        (np.stack([c, 0.5 * (c + left) + np.array([2, 2, 0]), left + np.array([10, 6, 6])]), 5.4),
    ):
        box, share = splat(chest.grid, *polyline(spline(path), radius, rings=3))
        blend(chest.hu[box], np.minimum(share * 1.15, 1), AIR_HU)


def _abdomen(chest: Chest) -> None:
    """Gas in the stomach under the left dome; the rest of the upper abdomen is as dense as muscle."""
    a = chest.anatomy
    if a.stomach_air > 0:
        r = a.stomach_air
        centre = np.array([a.dome_z[1] + 9 + 0.8 * r, -18.0, 0.5 * a.half_width])
        box, dist = ellipsoid(chest.grid, centre, np.array([0.72 * r, 0.9 * r, 1.25 * r]))
        level = centre[0] + 0.25 * r  # fluid below, as in a standing patient
        z = chest.grid.axes_mm()[0][box[0]]
        blend(chest.hu[box], cover(dist, 4.0) * cover(np.float32(level) - z, 4.0), AIR_HU)


def _aerate(chest: Chest, rng: np.random.Generator, haze: float, pruning: float) -> None:
    """Fill the lungs: parenchyma denser at the base (standing), mottled, with arteries and veins."""
    a = chest.anatomy
    air = chest.lung["right"] + chest.lung["left"]
    parenchyma = np.float32(a.lung_hu) + np.float32(0.18) * (chest.z - 20) + np.float32(22) * chest.noise
    np.clip(parenchyma, -960, -700, out=parenchyma)
    blend(chest.region, air, parenchyma)
    points, volumes = [], []
    for side in SIDES:
        for leaves, offset, calibre in ((128, (0.0, 0.0, 0.0), 6.6), (64, (14.0, -10.0, -6.0), 5.2)):
            hilum = chest.hilum[side] + np.array([offset[0], offset[1], offset[2] * SIDES[side]])
            p, v = _tree(chest, rng, side, hilum, leaves, calibre * a.vessel, haze, pruning)
            points.append(p)
            volumes.append(v)
    box, share = splat(chest.grid, np.concatenate(points), np.concatenate(volumes))
    if haze > 0:
        share = _blur(share, haze)
    mine, theirs = overlap(chest.box, box)
    part = chest.region[mine]
    blend(part, share[theirs] * air[mine], BLOOD_HU)


def _blur(share: Float, haze: float) -> Float:
    """Fluid around the vessels: smear their borders over neighbouring voxels."""
    out = share * np.float32(1 - 0.6 * haze)
    for axis in (0, 2):
        out += np.float32(0.15 * haze) * (np.roll(share, 1, axis) + np.roll(share, -1, axis))
    return np.asarray(np.minimum(out, 1), dtype=np.float32)


def _tree(
    chest: Chest, rng: np.random.Generator, side: str, hilum: NDArray[np.float64], leaves: int, calibre: float, haze: float, pruning: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A binary tree of vessels from the hilum to random points of the lung, halved again and again along their longest extent.

    Radii follow Murray's law in its measured form (parent^k = sum of children^k, k about 2.6); lower zones are fuller than upper ones.
    """
    lung = chest.lung[side]
    candidates = np.flatnonzero((lung > 0.9) & (chest.wall_mm > 7))
    if len(candidates) < leaves:
        return np.zeros((0, 3)), np.zeros(0)
    chosen = candidates[(np.sort(rng.random(leaves)) * len(candidates)).astype(np.int64)]
    zi, yi, xi = np.unravel_index(chosen, lung.shape)
    points = np.stack([chest.z.ravel()[zi], chest.y.ravel()[yi], chest.x.ravel()[xi]], axis=1).astype(np.float64)
    points += rng.uniform(-1.5, 1.5, points.shape)
    clusters = points[None]  # (clusters, members, 3)
    parents = hilum[None]
    starts, ends, radii = [], [], []
    levels = int(np.log2(leaves))
    for level in range(1, levels + 1):
        axis = (clusters.max(axis=1) - clusters.min(axis=1)).argmax(axis=1)
        order = np.take_along_axis(clusters, axis[:, None, None], axis=2)[:, :, 0].argsort(axis=1, kind="stable")
        ordered = np.take_along_axis(clusters, order[:, :, None], axis=1)
        clusters = ordered.reshape(2 * len(clusters), -1, 3)
        parents = np.repeat(parents, 2, axis=0)
        target = clusters.mean(axis=1)
        fraction = 1.0 if level == levels else 0.42
        nodes = parents + (target - parents) * fraction + rng.normal(0, 2.0, target.shape)
        radius = np.full(len(nodes), calibre * 2.0 ** (-level / 2.6))
        radius *= 1 + np.clip(0.0026 * nodes[:, 0], -0.25, 0.3) + haze * np.where(nodes[:, 0] < chest.hilum[side][0], 0.45, 0.1)
        if pruning > 0 and level >= 4:
            radius *= rng.random(len(radius)) > 0.75 * pruning
        starts.append(parents)
        ends.append(nodes)
        radii.append(radius)
        parents = nodes
    points_out, volumes_out = [], []
    for level, (start, end, radius) in enumerate(zip(starts, ends, radii, strict=True), 1):
        p, v = tubes(start, end, radius, step_mm=1.5, rings=1 if level <= 3 else 0)
        points_out.append(p)
        volumes_out.append(v)
    return np.concatenate(points_out), np.concatenate(volumes_out)
