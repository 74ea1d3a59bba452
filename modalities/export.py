"""Writing DICOM and NIfTI: synthetic radiographs (DX), CT series and CT volumes, which say that they are; maps on the grid of a volume.

Volumes are (S, H, W) with a 4 x 4 affine from voxel index (s, h, w) to RAS mm; files are written whole or not at all (a temporary name,
then a rename), and equal input gives equal bytes: UIDs come from the names given, and no clock is read.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvl.geometry import lps_to_ras

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SYNTHETIC_NOTE = "SYNTHETIC: simulated from a numerical phantom, no real patient; research use, not for diagnosis"
MANUFACTURER = "medvl thorax phantom (synthetic)"
DX_STORAGE, CT_STORAGE = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.2"  # DX for presentation, CT; PS3.4 B.5
IMPLEMENTATION_UID = "2.25.286514937163906384217452236890251176301"
VIEW_POSITIONS = {"PA": "PA", "AP": "AP", "lateral": "LL"}  # a left lateral: the left side against the detector; PS3.3 C.8.11.5
ORIENTATIONS = {"PA": ["L", "F"], "AP": ["L", "F"], "lateral": ["P", "F"]}  # where a row and a column run to
CT_INTERCEPT = -1024
PIXEL_DATA = 0x7FE00010


def uid(*names: str) -> str:
    """A DICOM UID (2.25 and a 128-bit number; PS3.5 B.2) that hangs on the names alone."""
    digest = hashlib.blake2b("\x1f".join(names).encode(), digest_size=16).digest()
    return f"2.25.{int.from_bytes(digest, 'big')}"


def write_radiograph_dicom(
    path: Path,
    pixels: NDArray[np.uint16],
    *,
    view: Literal["PA", "AP", "lateral"],
    spacing_mm: tuple[float, float],
    patient_id: str,
    study_id: str,
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = "MONOCHROME2",
    window: tuple[float, float] | None = None,
    sex: str | None = None,
    age: int | None = None,
) -> None:
    """Write one radiograph as Digital X-Ray Image Storage, for presentation, 12 bits in 16.

    Args:
        path: the file; its folder must exist.
        pixels: (R, C) in 0..4095, bright = dense; MONOCHROME1 stores 4095 minus them.
        view: PA and AP with the patient's left at the right, lateral with the front at the left.
        spacing_mm: between rows and between columns, at the detector.
        patient_id: also the patient's name; ``study_id`` also names the UIDs.
        study_id: likewise.
        photometric: how to store it.
        window: centre and width on ``pixels``; turned round together with them.
        sex: "F" or "M".
        age: years.
    Raises:
        ValueError: pixels that are not (R, C) uint16 within 12 bits.
    """
    if pixels.ndim != 2 or pixels.dtype != np.uint16 or pixels.max(initial=0) > 4095:
        raise ValueError(
            f"{path}: a radiograph must be (rows, columns) uint16 in 0..4095, "
            f"got {pixels.dtype} of shape {pixels.shape} up to {pixels.max(initial=0)}"
        )
    inverted = photometric == "MONOCHROME1"
    ds = _dataset(DX_STORAGE, "DX", patient_id, study_id, view, sex, age)
    ds.ImageType = ["DERIVED", "PRIMARY", ""]
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.InstanceNumber = "1"
    ds.BodyPartExamined = "CHEST"
    ds.AnatomicRegionSequence = [_code("43799004", "SCT", "Chest")]
    ds.ImageLaterality = "U"  # both halves of the body
    ds.ViewPosition = VIEW_POSITIONS[view]
    ds.PatientOrientation = ORIENTATIONS[view]
    ds.AcquisitionContextSequence = []
    ds.DetectorType = ""
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", 1 if inverted else -1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    ds.ImagerPixelSpacing = ds.PixelSpacing = [_decimal(step) for step in spacing_mm]
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    if window is not None:
        centre, width = window
        ds.WindowCenter, ds.WindowWidth = _decimal(4096 - centre if inverted else centre), _decimal(width)  # PS3.3 C.11.2.1.2.1
    stored = 4095 - pixels if inverted else pixels
    ds.PixelData = np.ascontiguousarray(stored, dtype="<u2").tobytes()
    save_dicom(ds, path)


def write_ct_series(
    folder: Path,
    volume_hu: NDArray[np.int16],
    affine: NDArray[np.float64],
    *,
    patient_id: str,
    study_id: str,
    sex: str | None = None,
    age: int | None = None,
) -> None:
    """Write a volume as a series of CT Image Storage files, one per slice, ``0001.dcm`` on.

    Args:
        folder: is made; files there are replaced.
        volume_hu: (S, H, W); slices are the first axis.
        affine: (s, h, w) to RAS mm.
        patient_id: as in :func:`write_radiograph_dicom`, likewise ``study_id``, ``sex`` and ``age``.
        study_id: likewise.
        sex: likewise.
        age: likewise.
    """
    _check_volume(volume_hu, affine, folder)
    folder.mkdir(parents=True, exist_ok=True)
    lps = lps_to_ras(np.asarray(affine, dtype=np.float64))
    slice_step, row_step, column_step = (float(np.linalg.norm(lps[:3, i])) for i in range(3))
    along_row, along_column = lps[:3, 2] / column_step, lps[:3, 1] / row_step
    stored = np.clip(volume_hu.astype(np.int32) - CT_INTERCEPT, 0, 65535).astype("<u2")
    for index, plane in enumerate(stored):
        ds = _dataset(CT_STORAGE, "CT", patient_id, study_id, f"ct{index}", sex, age, series="ct")
        ds.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
        ds.InstanceNumber, ds.AcquisitionNumber = str(index + 1), "1"
        ds.BodyPartExamined, ds.PatientPosition, ds.KVP = "CHEST", "HFS", ""
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = uid(study_id, "frame"), ""
        position = lps @ np.array([index, 0, 0, 1.0])
        ds.ImagePositionPatient = [_decimal(v) for v in position[:3]]
        ds.ImageOrientationPatient = [_decimal(v) for v in (*along_row, *along_column)]
        ds.PixelSpacing, ds.SliceThickness = [_decimal(row_step), _decimal(column_step)], _decimal(slice_step)
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = plane.shape
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(CT_INTERCEPT), "1", "HU"
        ds.WindowCenter, ds.WindowWidth = ["-600", "40"], ["1500", "400"]
        ds.WindowCenterWidthExplanation = ["LUNG", "MEDIASTINUM"]
        ds.PixelData = np.ascontiguousarray(plane).tobytes()
        save_dicom(ds, folder / f"{index + 1:04d}.dcm")


def write_nifti(path: Path, volume: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write a volume as ``.nii.gz``: int16 HU, or uint8 for a mask.

    The file's axes are (W, H, S), x fastest, as NIfTI tools expect; the affine is turned with them.

    Args:
        path: the file; its folder must exist.
        volume: (S, H, W) int16 or bool.
        affine: (s, h, w) to RAS mm.
    """
    _check_volume(volume, affine, path)
    data = volume.astype(np.uint8) if volume.dtype == bool else np.asarray(volume, dtype=np.int16)
    write_whole(path, _nifti_bytes(data, affine, b"synthetic thorax phantom (medvl)"))


def _nifti_bytes(data: NDArray[Any], affine: NDArray[np.float64], description: bytes) -> bytes:
    """A gzipped NIfTI-1 of (S, H, W) data; no clock is read, so that equal input gives equal bytes."""
    import nibabel
    from isal import igzip

    turned = np.asarray(affine, dtype=np.float64)[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(data.transpose(2, 1, 0), turned)
    image.header.set_xyzt_units("mm")
    image.set_qform(turned, code=1)
    image.set_sform(turned, code=1)
    image.header["descrip"] = description
    packed: bytes = igzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
    return packed


def nifti_bytes(values: NDArray[np.int16] | NDArray[np.float32], affine: NDArray[np.float64]) -> bytes:
    """What :func:`write_nifti` and :func:`write_map` would write, for whoever sends it on: a gzipped NIfTI-1 whose axes are (W, H, S).

    Args:
        values: (S, H, W).
        affine: (s, h, w) to mm.
    """
    _check_volume(values, affine, Path("a NIfTI to send"))
    return _nifti_bytes(values, affine, b"medvl, research use only")


def write_map(path: Path, scores: NDArray[np.float32], affine: NDArray[np.float64]) -> None:
    """Write a map as float32 ``.nii.gz`` on the voxels of the volume it belongs to, NaN where nothing is known.

    Args:
        path: the file; its folder must exist.
        scores: (S, H, W).
        affine: (s, h, w) to RAS mm.
    """
    _check_volume(scores, affine, path)
    write_whole(path, _nifti_bytes(np.asarray(scores, dtype=np.float32), affine, b"similarity map (medvl), research use only"))


def read_map(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A map that :func:`write_map` or another tool wrote as NIfTI: (S, H, W), x being the last axis, and its affine to RAS mm.

    Raises:
        ValueError: no NIfTI, or one that is no volume.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj, dtype=np.float64)
    except (ImageFileError, OSError, EOFError) as error:
        raise ValueError(f"{path}: no NIfTI volume that can be read ({type(error).__name__})") from error
    if values.ndim != 3:
        raise ValueError(f"{path}: {values.ndim} axes, expected a volume of 3")
    return values.transpose(2, 1, 0), np.asarray(image.affine, dtype=np.float64)[:, [2, 1, 0, 3]]


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place whole: a reader never sees half of it, and a killed run leaves none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def _check_volume(volume: NDArray[Any], affine: NDArray[np.float64], where: Path) -> None:
    if volume.ndim != 3 or np.shape(affine) != (4, 4):
        raise ValueError(f"{where}: expected a volume (S, H, W) and a 4 x 4 affine, got shapes {volume.shape} and {np.shape(affine)}")


def _dataset(
    sop_class: str, modality: str, patient_id: str, study_id: str, image: str, sex: str | None, age: int | None, series: str | None = None
) -> Dataset:
    """Patient, study, series, equipment and SOP modules, which radiographs and CT share."""
    from pydicom.dataset import Dataset

    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, uid(study_id, image, "instance")
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(study_id, "study"), uid(study_id, series or image, "series")
    ds.PatientID, ds.PatientName = patient_id, f"Synthetic^{patient_id}"
    ds.PatientBirthDate, ds.PatientSex = "", sex or ""
    if age is not None:
        ds.PatientAge = f"{age:03d}Y"
    ds.PatientIdentityRemoved, ds.DeidentificationMethod = "YES", "No patient: the data are simulated"
    ds.StudyID, ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.ReferringPhysicianName = study_id[-16:], "", "", "", ""
    ds.Modality, ds.SeriesNumber = modality, "1"
    ds.Manufacturer, ds.ManufacturerModelName = MANUFACTURER, "thorax phantom"
    ds.SeriesDescription, ds.ImageComments = "Synthetic chest", SYNTHETIC_NOTE
    return ds


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _decimal(value: float) -> str:
    """A DICOM decimal string: at most 16 characters (PS3.5 6.2)."""
    text = f"{float(value):.10g}"
    return text if len(text) <= 16 else f"{float(value):.8e}"


def save_dicom(ds: Dataset, path: Path) -> None:
    """Put a dataset in place as a whole file, explicit VR little endian, with file meta information of ours."""
    from pydicom import dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(ds.SOPClassUID), UID(ds.SOPInstanceUID)
    meta.TransferSyntaxUID, meta.ImplementationClassUID, meta.ImplementationVersionName = (
        ExplicitVRLittleEndian,
        UID(IMPLEMENTATION_UID),
        "MEDVL",
    )
    ds.file_meta = meta
    if PIXEL_DATA in ds:
        ds[PIXEL_DATA].VR = "OW"
    content = io.BytesIO()
    dcmwrite(content, ds, enforce_file_format=True, little_endian=True, implicit_vr=False)
    write_whole(path, content.getvalue())
