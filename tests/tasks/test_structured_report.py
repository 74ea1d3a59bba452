"""Reports read back by highdicom and pydicom, checked by dciodvfy, and compared with the headers of their sources."""

import dataclasses
import datetime
import logging
import re
import shutil
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from medvl.types import FINDINGS
from modalities.export import write_ct_series, write_nifti, write_radiograph_dicom
from tasks.structured_report import FINDING_CODES, SrProvenance, finding_code, write_report

pytest.importorskip("highdicom", reason="needs highdicom (extra 'sr')")

PROVENANCE = SrProvenance("demo tower", "11aa" * 16, "22bb" * 16, "biovil", "33cc" * 16, calibrated=False, version="9.8.7")
SCORES = {name: (i + 1) / 13 for i, name in enumerate(FINDINGS)} | {"Lung Opacity": 1e-7, "a label of more than sixteen letters": 0.5}
AXIAL = np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
PATIENT = {
    "PatientName": "Secret^Person",
    "PatientID": "SECRET-ID-7",
    "PatientBirthDate": "19500203",
    "PatientSex": "F",
    "PatientAge": "061Y",
    "StudyID": "SECRETST",
    "StudyDate": "20110506",
    "StudyTime": "101112.25",
    "AccessionNumber": "SECRETACC",
    "ReferringPhysicianName": "Secret^Doctor",
    "StudyDescription": "Secret reason",
}
COPIED = (*PATIENT, "StudyInstanceUID", "PatientIdentityRemoved", "DeidentificationMethod")


def change(path, drop=(), **values):
    ds = pydicom.dcmread(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # malformed values are meant
        for name in drop:
            delattr(ds, name)
        for name, value in values.items():
            setattr(ds, name, value)
        ds.save_as(path)
    return path


@pytest.fixture
def film(tmp_path):
    """A radiograph whose header has all that a hospital's has."""
    path = tmp_path / "film.dcm"
    pixels = np.random.default_rng(0).integers(0, 4096, (24, 20)).astype(np.uint16)
    write_radiograph_dicom(path, pixels, view="PA", spacing_mm=(1, 1), patient_id="syn-p", study_id="syn-s")
    return change(path, **PATIENT, ContentDate="20110507", ContentTime="235958", PatientIdentityRemoved="NO")


@pytest.fixture
def ct(tmp_path):
    """A series of five slices, and a localizer of the same study beside it."""
    folder = tmp_path / "ct"
    volume = np.random.default_rng(1).integers(-900, 200, (5, 8, 8)).astype(np.int16)
    write_ct_series(folder, volume, AXIAL, patient_id="syn-p", study_id="syn-s")
    shutil.copy(folder / "0001.dcm", folder / "scout.dcm")
    change(folder / "scout.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SOPInstanceUID="1.2.3.4", SeriesInstanceUID="1.2.3")
    return folder


def instances(sources):
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sources]
    return {(h.StudyInstanceUID, h.SeriesInstanceUID, h.SOPClassUID, h.SOPInstanceUID) for h in headers}


def evidence(report):
    return {
        (study.StudyInstanceUID, series.SeriesInstanceUID, one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID)
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }


def walk(item):
    for child in item.get("ContentSequence", []):
        yield child
        yield from walk(child)


def code(item):
    return item.get("CodeValue") or item.LongCodeValue, item.CodingSchemeDesignator


def told(report):
    """Name -> value of every text and code of the tree, by pydicom alone."""
    found = {}
    for item in walk(report):
        if item.ValueType == "TEXT":
            found.setdefault(code(item.ConceptNameCodeSequence[0]), item.TextValue)
        elif item.ValueType == "CODE":
            found.setdefault(code(item.ConceptNameCodeSequence[0]), item.ConceptCodeSequence[0].CodeMeaning)
    return found


def measured(report):
    """(tracking identifier, finding, what was measured, value, unit) of each group, by highdicom."""
    rows = []
    for group in report.content.get_image_measurement_groups():
        (one,) = group.get_measurements()
        finding = (group.finding_type.value, group.finding_type.scheme_designator)
        rows.append((group.tracking_identifier, finding, one.name.value, one.value, (one.unit.value, one.unit.scheme_designator)))
    return rows


def test_a_film_is_reported_with_every_score_and_what_it_hangs_on(film, tmp_path):
    import highdicom.sr

    path = write_report(tmp_path / "sr", [film], SCORES, PROVENANCE)
    assert path.parent == tmp_path / "sr" and [path] == list(path.parent.iterdir())
    report, source = pydicom.dcmread(path), pydicom.dcmread(film)
    assert report.file_meta.MediaStorageSOPInstanceUID == report.SOPInstanceUID == path.stem
    assert report.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34" and report.Modality == "SR"
    assert (report.CompletionFlag, report.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert {name: report[name].value for name in COPIED if name in report} == {
        name: source[name].value for name in COPIED if name in source
    }
    assert len({report.SeriesInstanceUID, report.SOPInstanceUID, source.SeriesInstanceUID, source.SOPInstanceUID}) == 4
    assert (report.ContentDate, report.ContentTime) == ("20110507", "235958")
    assert evidence(report) == instances([film])
    images = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in walk(report) if item.ValueType == "IMAGE"]
    assert images == [source.SOPInstanceUID]
    items = told(report)
    assert items["121106", "DCM"] == "research use, not for diagnosis" and "not for diagnosis" in report.SeriesDescription
    ours = {name: value for (name, scheme), value in items.items() if scheme == "99MEDVL"}
    assert ours == {
        "sr_model": "demo tower",
        "sr_prompts": "11aa" * 16,
        "sr_preprocessing": "22bb" * 16,
        "sr_preset": "biovil",
        "sr_protocol": "33cc" * 16,
        "sr_calibrated": "No",
        "sr_version": "9.8.7",
    }
    assert items["121005", "DCM"] == "Device" and items["121013", "DCM"] == "medvl" and "medvl 9.8.7" in items["121015", "DCM"]
    expected = [
        (name, (finding_code(name).code, finding_code(name).scheme), "sr_score", score, ("1", "UCUM")) for name, score in SCORES.items()
    ]
    assert measured(highdicom.sr.srread(path)) == expected


def test_a_calibrated_score_is_called_a_probability(film, tmp_path):
    import highdicom.sr

    path = write_report(tmp_path / "sr.dcm", [film], {"edema": 0.25}, dataclasses.replace(PROVENANCE, calibrated=True))
    assert path == tmp_path / "sr.dcm"
    assert [row[2:4] for row in measured(highdicom.sr.srread(path))] == [("sr_probability", 0.25)]
    assert told(pydicom.dcmread(path))["sr_calibrated", "99MEDVL"] == "Yes"


def test_codes_of_findings():
    assert set(FINDING_CODES) == set(FINDINGS) - {"support_device"}
    for name, known in {  # as pydicom's copy of the standard has them
        "pleural_effusion": codes.SCT.PleuralEffusion,
        "pneumothorax": codes.SCT.Pneumothorax,
        "edema": codes.SCT.PulmonaryEdema,
    }.items():
        assert (FINDING_CODES[name].code, FINDING_CODES[name].meaning) == (known.value, known.meaning)
    assert finding_code("Pleural Effusion") == finding_code("pleural_effusion")
    assert dataclasses.astuple(finding_code("support_device")) == ("support_device", "99MEDVL", "support device")


def test_a_folder_and_a_zip_stand_for_the_series_that_is_read(ct, tmp_path):
    slices = sorted(ct.glob("0*.dcm"))
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as archive:
        for path in ct.iterdir():
            archive.write(path, path.name)
    reports = [write_report(tmp_path / f"{i}.dcm", [given], SCORES, PROVENANCE) for i, given in enumerate((ct, tmp_path / "ct.zip"))]
    listed = write_report(tmp_path / "2.dcm", [*slices[::-1], slices[0]], SCORES, PROVENANCE)
    assert reports[0].read_bytes() == reports[1].read_bytes() == listed.read_bytes()
    report = pydicom.dcmread(listed)
    assert evidence(report) == instances(slices)
    images = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in walk(report) if item.ValueType == "IMAGE"]
    assert images == [pydicom.dcmread(path).SOPInstanceUID for path in slices]
    assert told(report)["121058", "DCM"] == "Computed tomography"


def test_a_folder_of_films_stands_for_all_of_them(film, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    for name in ("a", "b"):
        change(shutil.copy(film, folder / f"{name}.dcm"), SOPInstanceUID=f"1.2.{ord(name)}")
    (folder / "notes.txt").write_text("no image")
    films = instances(folder.glob("*.dcm"))
    first = write_report(folder, [folder], SCORES, PROVENANCE)
    assert evidence(pydicom.dcmread(first)) == films
    again = write_report(tmp_path / "sr", [folder], SCORES, PROVENANCE)  # the report that lies there now is no source
    assert again.name == first.name and again.read_bytes() == first.read_bytes()
    (tmp_path / "reports").mkdir()
    shutil.copy(first, tmp_path / "reports")
    with pytest.raises(ValueError, match="reports: a DICOM SR needs DICOM sources; expected images"):
        write_report(tmp_path / "sr", [tmp_path / "reports"], SCORES, PROVENANCE)


def test_equal_input_gives_equal_bytes_and_other_input_another_report(film, tmp_path):
    def write(name, scores=SCORES, provenance=PROVENANCE, **more):
        return write_report(tmp_path / f"{name}.dcm", [film], scores, provenance, **more)

    first = write("first")
    assert first.read_bytes() == write("second").read_bytes()
    others = [
        write("score", SCORES | {"edema": 0.5000001}),
        write("model", provenance=dataclasses.replace(PROVENANCE, model="other")),
        write("prompts", provenance=dataclasses.replace(PROVENANCE, prompts_hash="44")),
        write("date", written=datetime.datetime(2020, 1, 2, 3, 4, 5, 6)),
    ]
    change(film, SOPInstanceUID="1.2.3.4")
    headers = [pydicom.dcmread(path) for path in (first, *others, write("source"))]
    for name in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert len({ds[name].value for ds in headers}) == len(headers)
    assert (headers[4].ContentDate, headers[4].ContentTime) == ("20200102", "030405")


def test_a_report_without_a_date_says_so(film, tmp_path):
    change(film, drop=["ContentDate", "ContentTime"], StudyDate="", StudyTime="")
    report = pydicom.dcmread(write_report(tmp_path / "sr", [film], SCORES, PROVENANCE))
    assert report.ContentDate == "19000101" and report.StudyDate == ""
    assert "not known" in told(report)["sr_no_date", "99MEDVL"]
    told_so = pydicom.dcmread(write_report(tmp_path / "sr", [film], SCORES, PROVENANCE, written=datetime.datetime(2020, 1, 2)))
    assert told_so.ContentDate == "20200102" and ("sr_no_date", "99MEDVL") not in told(told_so)


@pytest.mark.parametrize("charset", ["ISO_IR 100", "ISO_IR 192", ["", "ISO 2022 IR 87"]])
def test_names_are_read_in_the_charset_of_the_source(film, tmp_path, charset):
    name = "Yamada^Tarou=山田^太郎" if isinstance(charset, list) else "Müller^Jürgen"
    change(film, SpecificCharacterSet=charset, PatientName=name)
    report = pydicom.dcmread(write_report(tmp_path / "sr", [film], SCORES, PROVENANCE))
    assert str(report.PatientName) == name


def test_what_a_header_lacks_is_empty_and_what_is_malformed_left_out(film, tmp_path):
    odd = {"PatientSex": "X", "PatientBirthDate": "about 1950", "StudyDate": "20111399", "StudyTime": "25", "PatientAge": "old"}
    change(film, drop=["PatientName", "PatientID", "AccessionNumber", "ReferringPhysicianName"], PatientIdentityRemoved="YES", **odd)
    change(film, drop=["DeidentificationMethod"])
    report = pydicom.dcmread(write_report(tmp_path / "sr", [film], SCORES, PROVENANCE))
    empty = (
        "PatientName",
        "PatientID",
        "AccessionNumber",
        "ReferringPhysicianName",
        "PatientSex",
        "PatientBirthDate",
        "StudyDate",
        "StudyTime",
    )
    assert [str(report[name].value or "") for name in empty] == [""] * len(empty)
    assert "PatientAge" not in report and report.DeidentificationMethod == "not said in the source image"


def test_nothing_of_a_header_is_logged_or_warned_of(film, tmp_path, caplog):
    change(film, PatientName="Secret", PatientBirthDate="19500203", PatientID="SECRET" * 20)  # longer than DICOM holds
    caplog.clear()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path / "sr", [film], SCORES, PROVENANCE)
    assert "secret" not in caplog.text.lower() and str(pydicom.dcmread(film).SOPInstanceUID) not in caplog.text
    assert logging.getLogger("highdicom").level == logging.NOTSET


def test_sources_that_are_no_dicom_are_refused(film, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "film.png")
    write_nifti(tmp_path / "volume.nii.gz", np.zeros((2, 3, 4), np.int16), AXIAL)
    with zipfile.ZipFile(tmp_path / "volume.zip", "w") as archive:
        archive.write(tmp_path / "volume.nii.gz", "volume.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.dcm").touch()
    for name in ("nothing.dcm", "film.png", "volume.nii.gz", "volume.zip", "empty", "absent.dcm"):
        with pytest.raises(ValueError, match=f"{name}: a DICOM SR needs DICOM sources"):
            write_report(tmp_path / "sr", [film, tmp_path / name], SCORES, PROVENANCE)
    with pytest.raises(ValueError, match="needs the DICOM images"):
        write_report(tmp_path / "sr", [], SCORES, PROVENANCE)
    assert not (tmp_path / "sr").exists()


def test_what_cannot_be_reported_is_refused_without_a_word_of_the_header(film, tmp_path):
    def refuse(words, sources=(film,), scores=SCORES, provenance=PROVENANCE):
        with pytest.raises(ValueError, match=words) as error:
            write_report(tmp_path / "sr", sources, scores, provenance)
        assert "secret" not in str(error.value).lower() and not re.search(r"\d+(\.\d+){4}", str(error.value))
        assert not (tmp_path / "sr").exists()

    def other(name, **values):
        return change(shutil.copy(film, tmp_path / f"{name}.dcm"), SOPInstanceUID="1.2.3.4.5", **values)

    refuse("of 2 studies", [film, other("study", StudyInstanceUID="1.2.3.4.6")])
    refuse("of 2 patients", [film, other("patient", PatientID="SECRET-ID-8")])
    refuse("no usable StudyInstanceUID;", [other("anonymous", StudyInstanceUID="removed")])
    refuse("expected a DICOM image, got Basic Text SR", [other("text", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")])
    refuse("unregistered class", [other("private", SOPClassUID="1.2.3.4.5.6.7")])
    refuse("at least one score", scores={})
    refuse("no finite numbers: edema", scores={"edema": float("nan"), "atelectasis": 0.5})
    refuse("has no name", scores={" ": 0.5})
    refuse("empty: model, prompts_hash", provenance=dataclasses.replace(PROVENANCE, model="", prompts_hash=" "))


def test_a_series_is_named_where_a_folder_holds_several(ct, tmp_path):
    with pytest.raises(ValueError, match="has no series 9"):
        write_report(tmp_path / "sr", [ct], SCORES, PROVENANCE, series=9)
    report = pydicom.dcmread(write_report(tmp_path / "sr", [ct], SCORES, PROVENANCE, series=1))
    assert evidence(report) == instances([ct / "scout.dcm"])


def test_without_highdicom_the_extra_is_named(film, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom.sr", None)
    with pytest.raises(ImportError, match=r"medvl\[sr\]"):
        write_report(tmp_path / "sr", [film], SCORES, PROVENANCE)


def validate(path):
    """What dciodvfy finds wrong with a file; what it has is a list of lines."""
    validator = shutil.which("dciodvfy")
    if validator is None:
        pytest.skip("needs dciodvfy (package dicom3tools)")
    done = subprocess.run([validator, str(path)], capture_output=True, text=True, timeout=60)
    lines = (done.stdout + done.stderr).splitlines()
    assert "Comprehensive3DSR" in lines  # it has been recognised
    return [line for line in lines if "Error" in line]


def test_dciodvfy_finds_no_error_and_would_find_one(film, ct, tmp_path):
    calibrated = dataclasses.replace(PROVENANCE, calibrated=True, model="m" * 80)
    for source, provenance in ((film, PROVENANCE), (ct, calibrated)):
        path = write_report(tmp_path / "sr", [source], SCORES, provenance)
        assert validate(path) == []
    assert validate(change(path, drop=["VerificationFlag"]))


def test_dciodvfy_finds_no_error_where_the_source_lacks_much(film, tmp_path):
    change(film, drop=["PatientName", "PatientID", "StudyID", "ContentDate"], PatientSex="", PatientIdentityRemoved="YES")
    change(film, drop=["DeidentificationMethod"], StudyDate="")
    assert validate(write_report(tmp_path / "sr", [film], SCORES, PROVENANCE)) == []


@pytest.mark.parametrize(("name", "count"), [("dicom_zoo/RG1_J2KI.dcm", 1), ("dicom_zoo/RG3_J2KI.dcm", 1), ("ct/ge_series", 14)])
def test_real_images(shared_data, tmp_path, name, count):
    source = shared_data / name
    path = write_report(tmp_path / "sr", [source], SCORES, PROVENANCE)
    report = pydicom.dcmread(path)
    assert len(evidence(report)) == count
    assert evidence(report) <= instances(source.glob("*.dcm") if source.is_dir() else [source])
    assert validate(path) == []
