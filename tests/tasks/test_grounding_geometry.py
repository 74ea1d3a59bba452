"""A bright patch planted in native space is where the map points, within one token: pictures, DICOM of unequal spacing, volumes in every
orientation; with every refinement that keeps its place. The tower is made by hand and fires on brightness.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from medvl.metrics import contrast_of_moments, contrast_to_noise
from medvl.model import DualEncoder
from medvl.nn.similarity import PooledSimilarity
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, ReportEncoder, TextBatch, TextFeatures
from modalities.ct import CtReader
from modalities.export import write_nifti, write_radiograph_dicom
from modalities.xray import XrayReader
from tasks.grounding import Grounder, MapSettings, ground, native_step_mm, phrase_query
from tasks.grounding.evaluation import Asked, GroundingImage
from tasks.grounding.offset import offset_by_masks
from tasks.grounding.outputs import load_grids, save_grids

CELL = 8


class Bright(ImageEncoder):
    """Tokens of 8 pixels (2 slices): how bright the cell is, against a constant."""

    embed_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            self.stem.weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
            self.stem.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        first = batch.pixels[:, :1]
        if first.ndim == 4:
            cells = F.avg_pool2d(self.stem(first)[:, :1], CELL)
        else:
            cells = F.avg_pool3d(F.pad(first, (0, 0, 0, 0, 0, -first.shape[2] % 2)), (2, CELL, CELL))
        tokens = torch.cat([cells, torch.ones_like(cells)], 1).flatten(2).transpose(1, 2)
        extent = None if first.ndim == 4 else (2 * cells.shape[2], *first.shape[3:])
        return ImageFeatures(tokens.mean(1), tokens=tokens, grid=tuple(cells.shape[2:]), extent=extent)


class Words(ReportEncoder):
    """Every text means brightness; its denial, darkness."""

    embed_dim = 2

    def forward(self, batch: TextBatch) -> TextFeatures:
        signs = [[-1.0, 0.0] if text.startswith("no ") else [0.1, 1.0] if "X-ray" in text else [1.0, 0.0] for text in batch.texts]
        return TextFeatures(torch.tensor(signs))


def film_model() -> DualEncoder:
    return DualEncoder(Bright(), Words(), PooledSimilarity(), XrayReader(size=64)).eval()


def ct_model() -> DualEncoder:
    reader = CtReader(spacing_mm=(4.0, 3.0, 3.0), shape=(None, 64, 64), windows_hu=((-1000.0, 1000.0),), crop="none")
    return DualEncoder(Bright(), Words(), PooledSimilarity(), reader).eval()


def token_px(model: DualEncoder, path: Path) -> NDArray[np.float64]:
    """A token's side in native pixels, by native axes."""
    transform = model.read(path).transform
    cells = {3: (2, CELL, CELL), 2: (CELL, CELL)}[len(transform.shape)]
    found = np.zeros(len(cells))
    for axis, cell, scale in zip(transform.axes, cells, transform.scale, strict=True):
        found[axis] = cell / abs(scale)
    return found


PLACES = [(0.2, 0.3), (0.5, 0.5), (0.8, 0.15), (0.35, 0.85)]
REFINED = [
    {},
    {"source": "cosine"},
    {"negation": True},
    {"against": "a chest X-ray"},
    {"smoothing_mm": 8.0, "finer": 4},
    {"shifts": 2},
    {"crops": 2},
    {"early": 0.5},
    {"crops": 2, "shifts": 2, "smoothing_mm": 5.0, "finer": 2},
]


@pytest.mark.parametrize("settings", REFINED, ids=lambda s: "+".join(s) or "plain")
@pytest.mark.parametrize("shape", [(97, 160), (240, 131)])
def test_a_patch_in_a_picture_is_pointed_at(tmp_path: Path, shape: tuple[int, int], settings: dict[str, Any]) -> None:
    model = film_model()
    for i, place in enumerate(PLACES):
        pixels = np.full(shape, 40, dtype=np.uint8)
        at = np.array([int(share * n) for share, n in zip(place, shape, strict=True)])
        half = np.maximum(np.array(shape) // 20, 2)
        pixels[at[0] - half[0] : at[0] + half[0] + 1, at[1] - half[1] : at[1] + half[1] + 1] = 250
        file = tmp_path / f"{i}.png"
        Image.fromarray(pixels).save(file)
        (found,) = ground(model, file, ["bright"], MapSettings(**settings))
        assert found.peak is not None and found.scores.shape == shape
        assert (np.abs(np.array(found.peak) - at) <= token_px(model, file)).all(), (found.peak, at)


class Beside(Bright):
    """Tokens that look 6 pixels up and 5 to the right of their cells."""

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        return super().forward(replace(batch, pixels=torch.roll(batch.pixels, (6, -5), (-2, -1))))


@pytest.mark.parametrize("settings", [{}, {"shifts": 2}, {"crops": 2}, {"crops": 2, "shifts": 2, "smoothing_mm": 4.0, "finer": 2}], ids=str)
def test_tokens_that_look_beside_their_cells_are_laid_where_they_look(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of 128 pixels, two for each of the tower's, the map is half a token from the patch at most, and without the offset beside it."""
    model = DualEncoder(Beside(), Words(), PooledSimilarity(), XrayReader(size=64)).eval()
    pixels = np.full((128, 128), 30, dtype=np.uint8)
    pixels[56:72, 48:64] = 250
    Image.fromarray(pixels).save(tmp_path / "film.png")
    found = {}
    for offset in ({}, {2: (-6.0, 5.0)}):
        model.token_offset = offset
        (one,) = ground(model, tmp_path / "film.png", ["bright"], MapSettings(**settings))
        bright = one.scores >= np.nanmax(one.scores) - 0.05 * (np.nanmax(one.scores) - np.nanmin(one.scores))
        found[bool(offset)] = np.argwhere(bright).mean(0) - [63.5, 55.5]
    assert np.abs(found[True]).max() <= 8, found
    assert np.abs(found[True]).max() < np.abs(found[False]).max() - 2, found


def test_where_tokens_look_is_found_by_masks(tmp_path: Path) -> None:
    """Small patches at random places of films of 128 pixels, two for each of the tower's: the offset of a tower that looks 6 pixels up and
    5 to the right comes out within half a token, from none and from a wrong one, and peaks lie in more patches.
    """
    rng = np.random.default_rng(6)
    images = []
    for i in range(40):
        pixels = np.full((128, 128), 30, dtype=np.uint8)
        row, column = rng.integers(24, 92, 2)
        mask = np.zeros(pixels.shape, bool)
        mask[row : row + 12, column : column + 12] = True
        pixels[mask] = 250
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        asked = Asked(0, "bright", lambda sample, mask=mask: mask)
        images.append(GroundingImage(tmp_path / f"{i}.png", f"s{i}", f"p{i}", (asked,)))
    model = DualEncoder(Beside(), Words(), PooledSimilarity(), XrayReader(size=64)).eval()
    for start in ({}, {2: (-2.0, 2.0)}):
        model.token_offset = start
        rejected: list[tuple[str, str]] = []
        found = offset_by_masks(Grounder(model, [phrase_query("bright")]), images, rejected, batch_size=16)
        assert rejected == [] and found.masks == 40
        assert np.abs(np.array(found.offset) - [-6.0, 5.0]).max() <= CELL / 2, found
        assert found.after > found.before + 0.2, found
        model.token_offset = {2: found.offset}
        again = offset_by_masks(Grounder(model, [phrase_query("bright")]), images, rejected)
        assert again.before == pytest.approx(found.after, abs=0.15), "what was promised on the way is what maps do"
    with pytest.raises(ValueError, match="needs 30 masks of findings, got 10"):
        offset_by_masks(Grounder(model, [phrase_query("bright")]), images[:10], [])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_patch_in_a_dicom_of_unequal_spacing_is_pointed_at(tmp_path: Path, photometric: Any) -> None:
    model = film_model()
    pixels = np.full((150, 90), 300, dtype=np.uint16)
    pixels[100:112, 20:30] = 3900
    file = tmp_path / "film.dcm"
    write_radiograph_dicom(
        file, pixels, view="PA", spacing_mm=(0.8, 2.0), patient_id="p", study_id="s", photometric=photometric, window=(2048.0, 4096.0)
    )
    for settings in (MapSettings(), MapSettings(smoothing_mm=6.0, finer=4)):
        (found,) = ground(model, file, ["bright"], settings)
        assert found.peak is not None
        assert (np.abs(np.array(found.peak) - [105.5, 24.5]) <= token_px(model, file)).all(), found.peak
    np.testing.assert_allclose(native_step_mm(model.read(file)), (0.8, 2.0))


ORIENTATIONS = ["RAS", "LAS", "LPS", "RPI", "PSR", "IRA", "SAL", "AIL", "LIP"]


@pytest.mark.parametrize("code", ORIENTATIONS)
@pytest.mark.parametrize("settings", [{}, {"crops": 2}, {"shifts": 2, "smoothing_mm": 4.0, "finer": 2}], ids=["plain", "crops", "fine"])
def test_a_patch_in_a_volume_of_any_orientation_is_pointed_at(tmp_path: Path, code: str, settings: dict[str, Any]) -> None:
    """Anisotropic voxels, written by us once and turned by nibabel; the peak is compared in mm, in the world."""
    model = ct_model()
    volume = np.full((20, 50, 60), -900, dtype=np.int16)
    volume[12:15, 10:17, 40:47] = 900
    affine = np.diag([-2.5, -2.5, 6.0, 1.0])[:, [2, 1, 0, 3]].astype(float)
    affine[:3, 3] = (70, 60, -50)
    write_nifti(tmp_path / "plain.nii.gz", volume, affine)
    plain = nib.load(tmp_path / "plain.nii.gz")
    turn = nib.orientations.ornt_transform(nib.io_orientation(plain.affine), nib.orientations.axcodes2ornt(code))
    file = tmp_path / f"{code}.nii.gz"
    nib.save(plain.as_reoriented(turn), file)
    (maps,) = Grounder(model, [phrase_query("bright")], MapSettings(**settings)).of_files([file])
    scores = maps.native(0)
    assert scores.shape == nib.load(file).shape[::-1]
    s, h, w = np.unravel_index(np.nanargmax(scores), scores.shape)
    there = nib.affines.apply_affine(nib.load(file).affine, [w, h, s])
    patch = affine @ [13, 13, 43, 1]
    token_mm = np.array([24.0, 24.0, 8.0])  # R, A, S: 8 pixels of 3 mm, 2 slices of 4 mm
    assert (np.abs(there - patch[:3]) <= token_mm).all(), (there, patch)


def test_a_map_of_the_real_ct_lies_on_its_anatomy(shared_data: Path) -> None:
    """Bones are bright: the map of brightness lies on the mask's bones, and not on any of its mirror images."""
    folder = shared_data / "ct" / "chest_volume"
    with (folder / "structures.csv").open() as file:
        named = {int(row["id"]): row["structure"] for row in csv.DictReader(file)}
    bones = [label for label, name in named.items() if name.startswith(("vertebra", "rib", "scapula", "sternum", "clavicula", "humerus"))]
    reader = CtReader(spacing_mm=(2.5, 2.11, 2.11), shape=(None, 168, 168), windows_hu=((150.0, 800.0),), crop="none")
    model = DualEncoder(Bright(), Words(), PooledSimilarity(), reader).eval()
    (maps,) = Grounder(model, [phrase_query("bright")]).of_files([folder / "chest_ct.nii.gz"])
    mask = np.isin(nib.load(folder / "chest_ct_organs.nii.gz").get_fdata().transpose(2, 1, 0), bones)
    assert 0.005 < mask.mean() < 0.2
    scores = maps.native(0)
    own = contrast_to_noise(scores, mask)
    mirrored = [contrast_to_noise(scores, np.flip(mask, axes)) for axes in (0, 1, 2, (0, 1), (1, 2), (0, 2), (0, 1, 2))]
    assert own > 0.45 and own > max(mirrored) + 0.15, (own, mirrored)
    moments = maps.moments
    on_grid = contrast_of_moments(moments.of_mask(maps.scores, mask), moments.whole(maps.scores))
    assert on_grid[0, 0] == pytest.approx(own, abs=1e-4)


def test_grids_are_kept_in_float16_and_lay_out_the_same_map(tmp_path: Path) -> None:
    model = film_model()
    pixels = np.full((120, 80), 30, dtype=np.uint8)
    pixels[30:50, 20:40] = 240
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (maps,) = Grounder(model, [phrase_query("bright"), phrase_query("no light")]).of_files([tmp_path / "a.png"])
    save_grids(tmp_path / "grids.npz", maps, 2, ["bright", "no_light"])
    read, names = load_grids(tmp_path / "grids.npz")
    assert names == ("bright", "no_light") and read.scores.dtype == torch.float16
    for i in range(2):
        np.testing.assert_allclose(read.native(i), maps.native(i), atol=1e-3)
    box = np.array([[[29.5, 19.5], [49.5, 39.5]]])
    mean = read.moments.of_boxes(read.scores, box).mean[:, 0]
    np.testing.assert_allclose(mean.numpy(), [read.native(i)[30:50, 20:40].mean() for i in range(2)], atol=1e-6)
    (tmp_path / "grids.npz").write_bytes(b"no grids")
    with pytest.raises(ValueError, match="no token grids"):
        load_grids(tmp_path / "grids.npz")


def test_refinements_are_their_formulas() -> None:
    from tasks.grounding.refinements import against_general, mixed_by, smoothed

    rng = torch.Generator().manual_seed(0)
    scores, general = torch.rand(2, 3, 4, 4, generator=rng), torch.rand(2, 1, 4, 4, generator=rng)
    torch.testing.assert_close(against_general(scores, general, ratio=False), scores - general)
    expected = torch.stack([scores[b] / (general[b] + 0.1 * general[b].mean()) for b in range(2)])
    torch.testing.assert_close(against_general(scores, general, ratio=True), expected)
    affinity = torch.rand(2, 16, 16, generator=rng).softmax(-1)
    mixed = mixed_by(scores, affinity)
    for b in range(2):
        torch.testing.assert_close(mixed[b].flatten(1).T, affinity[b] @ scores[b].flatten(1).T)
    known = scores[0].clone()
    known[:, 0] = torch.nan
    found = smoothed(known, (5.0, 5.0), 0.0, finer=1)
    torch.testing.assert_close(found, known, equal_nan=True)
    from scipy import ndimage

    wide = torch.rand(1, 30, 30, generator=rng)
    ours = smoothed(wide, (2.0, 4.0), 6.0)[0, 13:17, 8:22].numpy()  # away from the edges, which SciPy continues otherwise
    theirs = ndimage.gaussian_filter(wide[0].double().numpy(), (3.0, 1.5), truncate=4.0)[13:17, 8:22]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="expected 0 or more"):
        smoothed(wide, (2.0, 4.0), -1.0)


def test_shifts_put_what_lies_between_tokens_in_its_place() -> None:
    from tasks.grounding.shifts import offsets, shifted_maps

    assert offsets(8, 2) == [-2.0, 2.0] and offsets(4, 4) == [-1.5, -0.5, 0.5, 1.5]
    pixels = torch.arange(32.0).expand(1, 1, 32, 32).contiguous()

    def maps_of(batch: ImageBatch) -> Tensor:
        mean = F.avg_pool2d(batch.pixels, 8)
        seen = F.avg_pool2d(batch.valid[:, None].float(), 8)  # type: ignore[index]
        return torch.where(seen == 1, mean, torch.nan)

    for finer in (2, 8):
        found = shifted_maps(ImageBatch(pixels), (8, 8), finer, maps_of)[0, 0]
        middles = (torch.arange(4 * finer) + 0.5) * 8 / finer - 0.5
        known = torch.isfinite(found)
        assert known[4 * finer // 2].sum() >= 3 * finer
        away = (found - middles)[known].abs()
        assert away.max() <= 0.5  # at the border, where of two whole shifts one shows the image
        torch.testing.assert_close(found[finer:-finer, finer:-finer], middles[finer:-finer].expand(2 * finer, -1))
    with pytest.raises(ValueError, match="cannot be parted"):
        shifted_maps(ImageBatch(pixels), (1, 4), 2, maps_of)
