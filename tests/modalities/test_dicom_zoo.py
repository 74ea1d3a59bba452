"""Every file of the DICOM zoo and of pydicom's own test files: equal to an independent chain within a grey level, or refused.

The independent chain is pydicom's decoders and LUT functions in float64, with the window's output range taken from the standard. Where
pydicom's chain does not do it (functional groups, floats), the few lines that are missing stand here.

``table()`` makes the table of outcomes; ``python tests/modalities/test_dicom_zoo.py`` prints it.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medvl.types import UnreadableImageError
from modalities.dicom import read_dicom, read_radiograph, show

ZOO = Path(__file__).resolve().parents[2] / "../shared/data/dicom_zoo"
BUNDLED = Path(pydicom.__file__).parent / "data/test_files"
GREY_LEVEL = 1 / 255


def zoo_files() -> list[Path]:
    return sorted(ZOO.glob("*.dcm"))


def bundled_files() -> list[Path]:
    return sorted(p for p in BUNDLED.glob("*.dcm") if p.is_file())


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    name: str
    outcome: str  # read, or refused: why
    values: float | None = None  # largest difference of the values
    levels: float | None = None  # largest difference of the picture, in grey levels of 8 bits
    note: str = ""


def opened(path: Path) -> Dataset:
    ds = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in ds.file_meta:
        implicit, little = ds.original_encoding
        ds.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        )
    return ds


def flattened(ds: Dataset) -> Dataset:
    """Rescale and window of the first frame's functional groups at the top, where pydicom's functions look."""
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for macro in ds[name].value[0] if name in ds else []:
            if macro.VR == "SQ" and macro.keyword in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for element in macro.value[0]:
                    ds[element.tag] = element
    return ds


def reference(ds: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Values and picture of the first frame by pydicom, float64."""
    stored = pixel_array(ds, index=0)
    if ds.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        colour = apply_color_lut(stored, ds) if ds.PhotometricInterpretation == "PALETTE COLOR" else stored
        top = 2.0 ** (8 * colour.dtype.itemsize) - 1
        grey = colour[..., :3].astype(np.float64) @ [0.299, 0.587, 0.114]
        return grey, grey / top
    values = apply_modality_lut(stored, ds)
    if "BitsStored" not in ds:  # float pixels: pydicom cannot tell the range; the one window there is a step
        assert (ds.WindowWidth, ds.VOILUTFunction) == (1, "LINEAR")
        return values, (values > ds.WindowCenter - 0.5).astype(np.float64)
    shown = apply_voi_lut(values, ds, prefer_lut=True).astype(np.float64)
    if ds.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif ds.get("WindowCenter") is not None:
        low, high = window_output(ds)
    elif ds.BitsAllocated == 8 and ds.get("BitsStored") == 8 and not ds.PixelRepresentation and "ModalityLUTSequence" not in ds:
        low, high = 0.0, 255.0
    else:
        flat = values.ravel()
        padding = ds.get("PixelPaddingValue")
        flat = flat if padding is None else flat[stored.ravel() != padding]
        low, high = np.percentile(flat[:: max(1, flat.size // 2**18)], [0.1, 99.9])
        if low == high:
            low, high = flat.min(), flat.max()
    shown = np.clip((shown - low) / (high - low), 0, 1)
    return values, 1 - shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown


def window_output(ds: Dataset) -> tuple[float, float]:
    """The range that pydicom's apply_windowing maps to."""
    if ds.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    low = -(2.0 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0.0
    high = 2.0 ** (ds.BitsStored - 1) - 1 if ds.PixelRepresentation else 2.0**ds.BitsStored - 1
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept


def compare(path: Path) -> Outcome:
    """Read with ours, then with pydicom's; the differences, or why it was refused."""
    try:
        image = read_dicom(path)
    except UnreadableImageError as error:
        return Outcome(path.name, "refused", note=str(error).removeprefix(f"{path}: "))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, picture = reference(flattened(opened(path)))
    seen = np.ones(values.shape, bool) if image.padding is None else ~image.padding
    got = show(image).pixels
    levels = float(np.abs(got - picture)[seen].max() * 255)
    exact = read_dicom(path, exact=True)
    assert image.sha256 == exact.sha256
    assert image.sha256 == hashlib.sha256(image.values.astype("<f4").tobytes()).hexdigest()
    note = "; ".join(image.warnings)
    if image.frames == 1:
        try:
            np.testing.assert_allclose(read_radiograph(path).pixels, got, atol=1e-6)
        except UnreadableImageError as error:
            note += f" (as a radiograph: {str(error).removeprefix(f'{path}: ')})"
    return Outcome(path.name, "read", float(np.abs(image.values - values).max()), levels, note)


def table() -> str:
    """Markdown of all outcomes."""
    lines = ["| file | outcome | max difference of values | max difference in grey levels | note |", "|---|---|---|---|---|"]
    for path in [*zoo_files(), *bundled_files()]:
        o = compare(path)
        figures = ["" if f is None else f"{f:.2g}" for f in (o.values, o.levels)]
        where = "zoo" if path.parent == ZOO else "pydicom"
        lines.append(f"| {where}/{o.name} | {o.outcome} | {figures[0]} | {figures[1]} | {o.note} |")
    return "\n".join(lines) + "\n"


REFUSED = {
    "emri_small_jpeg_2k_lossless_too_short.dcm": "cut short",
    "liver.dcm": "Segmentation",
    "liver_deflate.dcm": "Segmentation",
    "liver_nonbyte_aligned.dcm": "Segmentation",
    "liver_rle.dcm": "Segmentation",
}
"""Files of the zoo that are no images or damaged, and a word of the message."""

REFUSED_BUNDLED = {
    "ExplVR_BigEndNoMeta.dcm": "expected a DICOM file",
    "ExplVR_LitEndNoMeta.dcm": "expected a DICOM file",
    "JPEG-lossy.dcm": "could not be decoded",  # no plug-in of pydicom's decodes it either
    "JPEG2000-embedded-sequence-delimiter.dcm": "would unfold to",
    "MR_truncated.dcm": "cut short",
    "UN_sequence.dcm": "no pixel data",
    "badVR.dcm": "RT Dose",
    "empty_charset_LEI.dcm": "no pixel data",
    "liver_1frame.dcm": "Segmentation",
    "liver_expb_1frame.dcm": "Segmentation",
    "meta_missing_tsyntax.dcm": "0 rows",
    "nested_priv_SQ.dcm": "0 rows",
    "no_meta.dcm": "expected a DICOM file",
    "no_meta_group_length.dcm": "no pixel data",
    "priv_SQ.dcm": "no pixel data",
    "reportsi.dcm": "SR",
    "reportsi_with_empty_number_tags.dcm": "SR",
    "rtdose.dcm": "RT Dose",
    "rtdose_1frame.dcm": "RT Dose",
    "rtdose_expb.dcm": "RT Dose",
    "rtdose_expb_1frame.dcm": "RT Dose",
    "rtdose_rle.dcm": "RT Dose",
    "rtdose_rle_1frame.dcm": "RT Dose",
    "rtplan.dcm": "RT Plan",
    "rtplan_truncated.dcm": "RT Plan",
    "rtstruct.dcm": "expected a DICOM file",
    "test-SR.dcm": "SR",
    "waveform_ecg.dcm": "no pixel data",
}


def check(path: Path, refused: dict[str, str]) -> None:
    outcome = compare(path)
    if path.name in refused:
        assert outcome.outcome == "refused"
        assert refused[path.name] in outcome.note
        return
    assert outcome.outcome == "read", outcome.note
    assert outcome.levels is not None
    assert outcome.levels <= 1
    assert outcome.values is not None
    assert outcome.values <= 1e-6 * max(1000.0, abs(read_dicom(path).value_range[1]))


@pytest.mark.skipif(not ZOO.is_dir(), reason="shared data folder with the DICOM zoo is absent")
@pytest.mark.parametrize("path", zoo_files(), ids=lambda p: p.name)
def test_the_zoo_is_read_equal_to_pydicom_or_refused(path):
    check(path, REFUSED)


@pytest.mark.parametrize("path", bundled_files(), ids=lambda p: p.name)
def test_the_files_of_pydicom_are_read_equal_to_it_or_refused(path):
    check(path, REFUSED_BUNDLED)


@pytest.mark.skipif(not ZOO.is_dir(), reason="shared data folder with the DICOM zoo is absent")
def test_the_same_image_in_several_codings_has_one_hash():
    pairs = [("693_J2KR", "693_UNCR"), ("OBXXXX1A", "OBXXXX1A_rle"), ("emri_small", "emri_small_big_endian")]
    for first, second in pairs:
        assert read_dicom(ZOO / f"{first}.dcm").sha256 == read_dicom(ZOO / f"{second}.dcm").sha256


GE = ZOO.parent / "ct/ge_series"


@pytest.mark.skipif(not GE.is_dir(), reason="shared data folder with the GE series is absent")
def test_slices_of_the_ge_series_agree_with_simpleitk():
    sitk = pytest.importorskip("SimpleITK")
    paths = sorted(GE.glob("*.dcm"))
    assert len(paths) == 28
    for path in paths[::5]:
        image, other = read_dicom(path), sitk.ReadImage(str(path))
        np.testing.assert_array_equal(image.values, sitk.GetArrayFromImage(other)[0])
        assert image.unit == "HU"
        assert image.position_mm == pytest.approx(other.GetOrigin())
        assert image.spacing_mm == pytest.approx(other.GetSpacing()[1::-1])
        direction = np.array(other.GetDirection()).reshape(3, 3)
        np.testing.assert_allclose(image.orientation, [*direction[:, 0], *direction[:, 1]], atol=1e-6)


if __name__ == "__main__":
    sys.stdout.write(table())
