"""DICOM SR: scores of a study as one Comprehensive 3D SR after TID 1500 (PS3.16), through highdicom (extra ``sr``).

The report belongs to the study of the images that it was made of: patient and study stand in it as in their headers, and every image is
named. It is never complete or verified. Equal input gives equal bytes: UIDs come from a hash of sources, scores and context, and no clock
is read. Only the attributes of ``PATIENT_AND_STUDY`` are taken from a header, and none of their values reaches an error or a log.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medvl.types import UnreadableImageError
from modalities.ct.archive import is_zip, unpacked
from modalities.ct.read import choose_series
from modalities.ct.series import find_series
from modalities.dicom.file import ANY_SIZE, PIXEL_TAGS, UID_FORM, opened, quiet, uid_name
from modalities.export import save_dicom, uid

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PATIENT_AND_STUDY = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientSize", "PatientWeight"),
    *("PatientIdentityRemoved", "DeidentificationMethod"),
    *("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyDescription"),
)
"""What a report takes over from the header of its source (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2)."""
REQUIRED = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime", "AccessionNumber")
"""Those that must be there and may be empty, with ReferringPhysicianName."""
INSTANCE = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
DATES = ("Content", "Acquisition", "Series", "Study")
FORMS = {
    "PatientBirthDate": r"\d{8}",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?",
    "PatientSex": r"[MFO]",
    "PatientAge": r"\d{3}[DWMY]",
    "PatientSize": r"\d{1,8}(\.\d{1,7})?",
    "PatientWeight": r"\d{1,8}(\.\d{1,7})?",
    "PatientIdentityRemoved": r"YES|NO",
}
"""What a value must look like to be taken over; others are left out as if the source had none (PS3.5 6.2)."""
NOT_SAID = "not said in the source image"
UNDATED = datetime(1900, 1, 1)
"""The date of a report whose sources name none, as SR has to have one; the report then says so."""

PRIVATE_SCHEME = "99MEDVL"
PRIVATE_SCHEME_NAME = "medvl findings and report items"
SERIES_NUMBER = 9001
"""Far from those that scanners count."""
LONGEST_TEXT = 64
MODALITIES = {
    "CR": "Computed Radiography",
    "CT": "Computed Tomography",
    "DX": "Digital Radiography",
    "RF": "Radiofluoroscopy",
    "RG": "Radiographic imaging",
    "XA": "X-Ray Angiography",
}
"""PS3.16 CID 29; the code is the modality itself."""


@dataclass(frozen=True)
class Concept:
    """A coded term: ``scheme`` is DCM, SCT, UCUM, ... or ours."""

    code: str
    scheme: str
    meaning: str


def private(code: str, meaning: str) -> Concept:
    """A term of our own scheme; a meaning is cut to what DICOM holds."""
    return Concept(" ".join(code.replace("\\", "/").split()), PRIVATE_SCHEME, one_line(meaning))


def one_line(text: str, longest: int = LONGEST_TEXT) -> str:
    """As a DICOM long string: no backslash, which parts values, nor control characters, at most 64 characters (PS3.5 6.2).

    Cut by bytes of UTF-8, as there are readers that count those.
    """
    plain = "".join(c if c.isprintable() else " " for c in text.replace("\\", "/"))
    return " ".join(plain.split()).encode()[:longest].decode(errors="ignore").rstrip()


OTHER_MODALITY = Concept("OT", "DCM", "Other Modality")
PROCEDURES = {"CT": Concept("77477000", "SCT", "Computed tomography")}
PROCEDURES |= dict.fromkeys(("CR", "DX", "RF", "RG", "XA"), Concept("363680008", "SCT", "Radiographic imaging procedure"))
ANY_PROCEDURE = Concept("363679005", "SCT", "Imaging procedure")
YES, NO = Concept("373066001", "SCT", "Yes"), Concept("373067005", "SCT", "No")
NO_UNITS = Concept("1", "UCUM", "no units")
COMMENT = Concept("121106", "DCM", "Comment")
IMAGE_LIBRARY, IMAGE_GROUP = Concept("111028", "DCM", "Image Library"), Concept("126200", "DCM", "Image Library Group")
MODALITY, SOURCE = Concept("121139", "DCM", "Modality"), Concept("260753009", "SCT", "Source")
DEVICE = Concept("121007", "DCM", "Device")
PROVENANCE = private("sr_provenance", "Provenance")
NO_DATE = private("sr_no_date", "Date of the report")


@dataclass(frozen=True)
class Device:
    """What made the scores."""

    name: str
    version: str
    model: str


def write_measurement_report(
    out: Path,
    sources: Sequence[Path],
    scores: Mapping[str, tuple[Concept, float]],
    *,
    measure: Concept,
    device: Device,
    context: Sequence[tuple[Concept, str | bool]],
    notice: str,
    description: str,
    written: datetime | None = None,
    series: int | Literal["largest"] | None = "largest",
) -> Path:
    """Write one report about one study: a measurement without a unit for each finding, the context as text and yes or no, the notice.

    Args:
        out: the file, where it ends in ``.dcm``; else a folder, made if need be, in which the file is named by the report's own UID.
        sources: DICOM images of one study; of a folder or zip the CT series that :func:`modalities.ct.read.read_ct` reads in it, or, where
            it holds no CT, all its images.
        scores: name -> the finding's term and its score.
        measure: what a score is.
        device: the observer.
        context: what else is to be known about the scores; a bool becomes a coded yes or no.
        notice: for the reader, ahead of everything else.
        description: of the series; cut to 64 characters.
        written: date and time of the report, as local as those of the images; None: the latest of the sources' own, or, where none has
            any, ``UNDATED``, which the report then says.
        series: which CT series of a folder or zip with several.
    Returns:
        the file.
    Raises:
        ImportError: highdicom is not installed.
        ValueError: no scores, one that is no finite number, sources that are no DICOM images or not of one study and patient.
    """
    import_highdicom()
    if not scores:
        raise ValueError("a report needs at least one score, got none")
    if wrong := [name for name, (_, score) in scores.items() if not math.isfinite(score)]:
        raise ValueError(f"scores that are no finite numbers: {', '.join(wrong)}; leave them out of the report")
    images = read_sources(sources, series)
    date = written.replace(microsecond=0, tzinfo=None) if written else latest(images)
    key = (
        *(str(image.SOPInstanceUID) for image in images),
        *(part for name, (term, score) in scores.items() for part in (name, term.code, term.scheme, repr(float(score)))),
        *(f"{term.code}={value}" for term, value in context),
        *(measure.code, device.name, device.version, device.model, notice, description, (date or UNDATED).isoformat()),
    )
    if date is None:
        context = [*context, (NO_DATE, "not known: the source images name none")]
    with unheard(Path(sources[0])):
        content = _content(images, scores, measure, device, context, notice, key)
        report = report_document(images, content, device, description, date or UNDATED, key)
        path = out if out.suffix.lower() == ".dcm" else out / f"{report.SOPInstanceUID}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_dicom(report, path)
    return path


def import_highdicom() -> Any:
    """highdicom, imported when first asked for.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import highdicom.sr
    except ImportError as error:
        raise ImportError("a DICOM SR needs highdicom, which is not installed: pip install 'medvl[sr]'") from error
    return highdicom


def read_sources(sources: Sequence[Path], series: int | Literal["largest"] | None = "largest") -> list[Dataset]:
    """Headers of all images, each once, sorted by series, number and UID, with nothing but what a report takes over.

    Raises:
        ValueError: as :func:`write_measurement_report`.
    """
    found: dict[str, Dataset] = {}
    with ExitStack() as stack:
        for path in sources:
            for shown, place in _places(Path(path), series, stack):
                image, _ = read_header(shown, place)
                found.setdefault(str(image.SOPInstanceUID), image)
    if not found:
        raise ValueError("a DICOM SR needs the DICOM images that it is about, got none")
    check_one_study(Path(sources[0]), list(found.values()))
    return sorted(found.values(), key=lambda image: (image.SeriesInstanceUID, image.InstanceNumber or 0, image.SOPInstanceUID))


def check_one_study(path: Path, images: Sequence[Dataset]) -> None:
    """Refuse images of several studies or patients."""
    for keyword, words in (("StudyInstanceUID", "studies"), ("PatientID", "patients")):
        if (count := len({str(image[keyword].value) for image in images})) > 1:
            raise ValueError(f"{path} and what comes with it are of {count} {words}; a report is about one: write one for each")


def _places(path: Path, series: int | Literal["largest"] | None, stack: ExitStack) -> Iterator[tuple[Path, Path]]:
    """(what to call it, where it lies now) of each file that stands behind a source."""
    try:
        if path.is_file() and not is_zip(path):
            files: list[tuple[Path, int | None]] = [(path, None)]
        else:
            found = find_series(path)
            volumes = any(one.kind in ("volume", "slice") for one in found)
            chosen = [choose_series(path, found, series)[0]] if volumes else [one for one in found if one.kind == "other"]
            files = list(dict.fromkeys((item.file, item.member) for one in chosen for item in one.slices if min(item.shape) > 0))
        members = [member for _, member in files if member is not None]
        unzipped = dict(zip(members, stack.enter_context(unpacked(path, members)), strict=True)) if members else {}
    except UnreadableImageError as error:
        raise not_dicom(path, error) from None
    if not files:
        raise ValueError(f"{path}: a DICOM SR needs DICOM sources; expected images, got other DICOM objects alone")
    for file, member in files:
        yield file, file if member is None else unzipped[member]


def read_header(shown: Path, place: Path, more: Sequence[str] = (), what: str = "a DICOM SR") -> tuple[Dataset, dict[str, str]]:
    """What is taken over from the header of one image.

    Args:
        shown: how errors call the file.
        place: where it lies now.
        more: keywords of further elements.
        what: that needs it, for errors.
    Returns:
        the image as evidence, and the text of those of ``more`` that it has, values parted by backslashes.
    Raises:
        ValueError: no DICOM image, or one without usable UIDs.
    """
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    keywords = [*INSTANCE, *PATIENT_AND_STUDY, "DeidentificationMethodCodeSequence", "Modality", "InstanceNumber", "SpecificCharacterSet"]
    keywords += [f"{name}{part}" for name in DATES for part in ("Date", "Time")]
    try:
        with opened(place, header_only=True, largest=ANY_SIZE) as file:
            file.source.seek(0)
            header = read_partial(file.source, _at_pixels, force=True, specific_tags=[Tag(keyword) for keyword in (*keywords, *more)])
            values = {keyword: _text(header, keyword) for keyword in (*keywords, *more) if keyword in header}
    except UnreadableImageError as error:
        raise not_dicom(shown, error, place, what) from None
    if missing := [keyword for keyword in INSTANCE if not is_uid(values.get(keyword, ""))]:
        raise ValueError(f"{shown}: has no usable {' and no '.join(missing)}; {what} names the images that it is about by them")
    if "Image Storage" not in uid_name(values["SOPClassUID"]):
        raise ValueError(f"{shown}: expected a DICOM image, got {uid_name(values['SOPClassUID'])}")
    with unheard(shown, what):
        return _evidence(values), {keyword: values[keyword] for keyword in more if values.get(keyword)}


def is_uid(text: str) -> bool:
    """Whether it looks like a UID (PS3.5 9.1)."""
    return len(text) <= 64 and UID_FORM.fullmatch(text) is not None


def _at_pixels(tag: Any, vr: str | None, length: int) -> bool:
    return tag in PIXEL_TAGS


def _text(header: Dataset, keyword: str) -> str:
    value = header[keyword].value
    many = value if value is not None and not isinstance(value, str) and hasattr(value, "__iter__") else [value]
    if keyword.endswith("Name"):
        many = [value]  # a person's name counts as a row of characters
    if keyword.endswith("Sequence"):
        many = [one_line(str(code.get("CodeMeaning", ""))) for code in many]
    return "" if value is None else "\\".join(str(one) for one in many).strip(" \0")


def _evidence(values: Mapping[str, str]) -> Dataset:
    """A header for highdicom to copy from, which takes over whatever it is given and fails where what it needs is missing or malformed."""
    from pydicom.dataset import Dataset

    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 192"
    for keyword in INSTANCE:
        setattr(image, keyword, values[keyword])
    for keyword in PATIENT_AND_STUDY:
        value = values.get(keyword, "")
        if "Date" in keyword or "Time" in keyword:
            value = re.sub("[.:]", "", value) if re.fullmatch(r"\d{4}\.\d{2}\.\d{2}|\d{2}:\d{2}(:\d{2})?", value) else value  # of ACR-NEMA
        if keyword in FORMS and not (re.fullmatch(FORMS[keyword], value) and _is_moment(keyword, value)):
            value = ""
        if value or keyword in REQUIRED or keyword == "ReferringPhysicianName":
            setattr(image, keyword, value)
    if image.get("PatientIdentityRemoved") == "YES" and "DeidentificationMethod" not in image:  # needed then, in words or in codes
        image.DeidentificationMethod = values.get("DeidentificationMethodCodeSequence") or NOT_SAID
    image.Modality = values.get("Modality", "").upper()
    number = values.get("InstanceNumber", "")
    image.InstanceNumber = int(number) if re.fullmatch(r"\d{1,9}", number) else None
    for name in DATES:
        moment = _moment(values.get(f"{name}Date", ""), values.get(f"{name}Time", ""))
        if moment is not None:
            image.ContentDate, image.ContentTime = date_and_time(moment)
            break
    return image


def _is_moment(keyword: str, value: str) -> bool:
    """False for a date or time that no calendar or clock has."""
    if keyword.endswith("Date"):
        return _moment(value, "") is not None
    return not keyword.endswith("Time") or _moment("20000101", value) is not None


def _moment(date: str, time: str) -> datetime | None:
    """A DICOM date and time to the second, the time as far as it is given; None without a date."""
    digits = re.sub(r"\D", "", date)
    clock = re.sub(r"[^0-9]", "", time.split(".")[0])[:6]
    try:
        return datetime.strptime(digits + clock.ljust(6, "0"), "%Y%m%d%H%M%S")
    except ValueError:
        return None


def date_and_time(moment: datetime) -> tuple[str, str]:
    """As DICOM writes them, to the second."""
    date, time = moment.isoformat(timespec="seconds").split("T")
    return date.replace("-", ""), time.replace(":", "")


def latest(images: Sequence[Dataset]) -> datetime | None:
    """The last moment that images name as their own."""
    return max(
        (moment for image in images if (moment := _moment(image.get("ContentDate", ""), image.get("ContentTime", "")))), default=None
    )


def not_dicom(shown: Path, error: UnreadableImageError, place: Path | None = None, what: str = "a DICOM SR") -> ValueError:
    """The error for a source that is no DICOM image."""
    reason = str(error).removeprefix(f"{place or shown}: ")
    return ValueError(
        f"{shown}: {what} needs DICOM sources, whose patient, study and instances it names, not pictures or NIfTI; this one: {reason}"
    )


@contextmanager
def unheard(path: Path, what: str = "a DICOM SR") -> Iterator[None]:
    """Neither logs nor warnings nor errors of highdicom and pydicom: they quote header values."""
    logger = logging.getLogger("highdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with quiet():
            yield
    except OSError:
        raise
    except Exception as error:  # what is odd in a header can raise anything
        raise ValueError(f"{path}: {what} cannot be made of it: {type(error).__name__} at what its header says") from None
    finally:
        logger.setLevel(level)


def coded(term: Concept) -> Any:
    """As highdicom has it."""
    from highdicom.sr import CodedConcept

    return CodedConcept(term.code, term.scheme, term.meaning)


def _content(
    images: Sequence[Dataset],
    scores: Mapping[str, tuple[Concept, float]],
    measure: Concept,
    device: Device,
    context: Sequence[tuple[Concept, str | bool]],
    notice: str,
    key: Sequence[str],
) -> Any:
    """TID 1500 with a measurement group for each finding."""
    from highdicom import sr

    algorithm = sr.AlgorithmIdentification(device.model, device.version)
    groups = [
        sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(uid(*key, name, "tracking"), name),
            finding_type=coded(term),
            algorithm_id=algorithm,
            measurements=[sr.Measurement(coded(measure), float(score), coded(NO_UNITS))],
        )
        for name, (term, score) in scores.items()
    ]
    return report_content(images, groups, device, context, notice)


def report_content(
    images: Sequence[Dataset], groups: Sequence[Any], device: Device, context: Sequence[tuple[Concept, str | bool]], notice: str
) -> Any:
    """TID 1500: the notice, the images, the measurement groups, and the context in a container of its own."""
    from highdicom import sr

    observer = sr.DeviceObserverIdentifyingAttributes(
        uid(device.name, device.version, device.model, "device"),
        name=device.name,
        manufacturer_name=device.name,
        model_name=f"{device.name} {device.version}, model {device.model}",
        serial_number=device.version,
    )
    content = sr.MeasurementReport(
        sr.ObservationContext(observer_device_context=sr.ObserverContext(coded(DEVICE), observer)),
        coded(PROCEDURES.get(images[0].Modality, ANY_PROCEDURE)),
        groups,
    )
    items = content[0].ContentSequence
    items.insert(len(items) - 1, text_or_code(COMMENT, notice))
    items.insert(len(items) - 1, image_library(images))
    items.append(container(PROVENANCE, [text_or_code(term, value) for term, value in context]))
    return content


def image_library(images: Sequence[Dataset]) -> Any:
    """TID 1600: the images, a group for each modality."""
    from highdicom.sr import CodeContentItem, ImageContentItem

    groups = []
    for modality in dict.fromkeys(image.Modality for image in images):
        term = Concept(modality, "DCM", MODALITIES[modality]) if modality in MODALITIES else OTHER_MODALITY
        named = [
            ImageContentItem(coded(SOURCE), image.SOPClassUID, image.SOPInstanceUID, relationship_type="CONTAINS")
            for image in images
            if image.Modality == modality
        ]
        groups.append(container(IMAGE_GROUP, [CodeContentItem(coded(MODALITY), coded(term), "HAS ACQ CONTEXT"), *named]))
    return container(IMAGE_LIBRARY, groups)


def container(name: Concept, items: Sequence[Any]) -> Any:
    """Content items under a name."""
    from highdicom.sr import ContainerContentItem, ContentSequence

    container = ContainerContentItem(coded(name), relationship_type="CONTAINS")
    container.ContentSequence = ContentSequence(list(items))
    return container


def text_or_code(name: Concept, value: str | bool) -> Any:
    """A content item: text, or a coded yes or no."""
    from highdicom.sr import CodeContentItem, TextContentItem

    if isinstance(value, bool):
        return CodeContentItem(coded(name), coded(YES if value else NO), "CONTAINS")
    return TextContentItem(coded(name), value, "CONTAINS")


def report_document(evidence: Sequence[Dataset], content: Any, device: Device, description: str, date: datetime, key: Sequence[str]) -> Any:
    """The content as a Comprehensive 3D SR in the study of the evidence: the images first, then whatever else it refers to."""
    from highdicom.sr import Comprehensive3DSR

    report = Comprehensive3DSR(
        evidence=evidence,
        content=content,
        series_instance_uid=uid(*key, "series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=uid(*key, "instance"),
        instance_number=1,
        manufacturer=device.name,
    )
    report.SpecificCharacterSet, report.SeriesDescription = "ISO_IR 192", one_line(description)
    report.ManufacturerModelName, report.SoftwareVersions = one_line(device.model), device.version
    report.DeviceSerialNumber = device.version
    report.ContentDate, report.ContentTime = date_and_time(date)
    report.InstanceCreationDate, report.InstanceCreationTime = date_and_time(date)  # highdicom reads the clock
    for equipment in report.get("ContributingEquipmentSequence", ()):  # of later versions
        equipment.pop("ContributionDateTime", None)
    report.CodingSchemeIdentificationSequence = [private_scheme(device)]
    return report


def private_scheme(device: Device) -> Dataset:
    """What an object says of our own coding scheme (PS3.3 C.12.1)."""
    from pydicom.dataset import Dataset

    scheme = Dataset()
    scheme.CodingSchemeDesignator, scheme.CodingSchemeName = PRIVATE_SCHEME, PRIVATE_SCHEME_NAME
    scheme.CodingSchemeResponsibleOrganization = device.name
    return scheme
