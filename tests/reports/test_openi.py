"""Open-i reader: fields against the standard library's parser, hostile files, and archives that break off."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path
from xml.dom import minidom

import pytest

from reports.openi import MAX_BYTES, OpeniImage, OpeniReport, UnreadableReportError, parse_openi, read_openi
from reports.sections import Sections

ARCHIVE = Path(__file__).resolve().parents[2] / "../shared/data/reports/openi_reports.tgz"
XML = b"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR7"/><MedlineCitation><Article><Abstract>
  <AbstractText Label="COMPARISON"/>
  <AbstractText Label="INDICATION"> XXXX with cough </AbstractText>
  <AbstractText Label="FINDINGS">Heart &lt; normal &#8212; clear.</AbstractText>
  <AbstractText Label="FINDINGS">Second film: clear.</AbstractText>
  <AbstractText Label="NOTE">Something.</AbstractText>
  <AbstractText Label="IMPRESSION">1. Normal.</AbstractText>
</Abstract></Article></MedlineCitation>
<MeSH><major>Calcinosis/lung/hilum/left</major><major> </major><major>Opacity</major><automatic>Calcinosis</automatic></MeSH>
<parentImage id="CXR7_IM-1-2001"><caption>PA and lateral</caption></parentImage><parentImage id="CXR7_IM-1-4004"/>
</eCitation>"""
BILLION = b"""<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<eCitation><uId id="CXR1"/><AbstractText Label="FINDINGS">&b;</AbstractText></eCitation>"""
EXTERNAL = b"""<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><eCitation><uId id="1"/><AbstractText>&e;</AbstractText></eCitation>"""


def test_a_report_is_read_whole() -> None:
    assert parse_openi(XML, "7.xml") == OpeniReport(
        study_id="CXR7",
        sections=Sections(
            indication="XXXX with cough",
            findings="Heart < normal — clear.\n\nSecond film: clear.",
            impression="1. Normal.",
            other="Something.",
        ),
        major=("Calcinosis/lung/hilum/left", "Opacity"),
        automatic=("Calcinosis",),
        images=(OpeniImage("CXR7_IM-1-2001", "PA and lateral"), OpeniImage("CXR7_IM-1-4004", "")),
    )
    assert parse_openi(XML, "7.xml").text.splitlines()[0] == "INDICATION: XXXX with cough"


@pytest.mark.parametrize(
    ("xml", "says"),
    [
        (BILLION, "document type"),
        (EXTERNAL, "document type"),
        (b"", "no well-formed XML"),
        (XML[:-20], "no well-formed XML"),
        (b"<html><body/></html>", "XML of another kind"),
        (b'<e><uId id=" "/><AbstractText Label="FINDINGS">x</AbstractText></e>', "XML of another kind"),
        (b'<?xml version="1.0" encoding="klingon"?><e/>', "encoding|well-formed"),
        (XML.replace(b"cough", b"\xff\xfe"), "no well-formed XML"),
        (b"<e>" + b" " * MAX_BYTES + b"</e>", "more than"),
        (b"<a>" * 100_000, "no well-formed XML"),
    ],
)
def test_what_is_no_report_is_refused_by_name_without_its_text(xml: bytes, says: str) -> None:
    with pytest.raises(UnreadableReportError, match=says) as caught:
        parse_openi(xml, "some/7.xml")
    assert "some/7.xml" in str(caught.value)
    assert "lol" not in str(caught.value) and "cough" not in str(caught.value)


def test_mutated_files_give_a_report_or_the_error() -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        xml = bytearray(XML)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(xml))
            what = rng.randrange(3)
            if what == 0:
                xml[at] = rng.randrange(256)
            elif what == 1:
                del xml[at : at + rng.randint(1, 30)]
            else:
                xml[at:at] = rng.choice([b"<", b"&", b"]]>", b"<!DOCTYPE a>", b"<a>", b"\x00", b"&#0;", b"<?x?>", XML[at : at + 20]])
        try:
            assert isinstance(parse_openi(bytes(xml), "x.xml"), OpeniReport)
        except UnreadableReportError:
            refused += 1
    assert 200 < refused < 2000


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def test_a_bad_file_is_told_of_and_the_others_are_read(tmp_path: Path) -> None:
    files = {"a/1.xml": XML, "a/2.xml": BILLION, "a/readme.txt": b"hello", "../3.xml": XML.replace(b"CXR7", b"CXR9")}
    archive = tmp_path / "reports.tgz"
    write_archive(archive, files)
    faults: list[UnreadableReportError] = []
    assert [report.study_id for report in read_openi(archive, faults.append)] == ["CXR7", "CXR9"]
    assert len(faults) == 1 and "a/2.xml" in str(faults[0])
    with pytest.raises(UnreadableReportError, match=r"2\.xml"):
        list(read_openi(archive))


def test_a_folder_and_a_file_are_read_like_an_archive(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/1.XML").write_bytes(XML)
    (tmp_path / "2.xml").write_bytes(XML.replace(b"CXR7", b"CXR2"))
    (tmp_path / "3.txt").write_bytes(b"x")
    assert [report.study_id for report in read_openi(tmp_path)] == ["CXR2", "CXR7"]
    assert next(read_openi(tmp_path / "2.xml")).study_id == "CXR2"
    with pytest.raises(UnreadableReportError, match=r"expected \.xml"):
        list(read_openi(tmp_path / "3.txt"))
    with pytest.raises(FileNotFoundError, match="expected an XML file"):
        list(read_openi(tmp_path / "none"))


def test_an_archive_that_breaks_off_gives_what_came_before(tmp_path: Path) -> None:
    rng = random.Random(1)
    noise = {f"{i}.xml": XML.replace(b"1. Normal.", rng.randbytes(2000).hex().encode()) for i in range(20)}
    whole = tmp_path / "whole.tgz"
    write_archive(whole, noise)
    for share in (0.05, 0.5, 0.9):
        broken = tmp_path / "broken.tgz"
        broken.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
        faults: list[UnreadableReportError] = []
        count = sum(1 for _ in read_openi(broken, faults.append))
        assert count < 20 and len(faults) == 1 and "breaks off" in str(faults[0])
    (tmp_path / "no.tgz").write_bytes(gzip.compress(b"no archive at all" * 100))
    with pytest.raises(UnreadableReportError, match="breaks off after 0"):
        list(read_openi(tmp_path / "no.tgz"))


def test_the_whole_collection_is_read_as_another_parser_reads_it() -> None:
    if not ARCHIVE.is_file():
        pytest.skip("the Open-i reports are not on this machine")
    reports = list(read_openi(ARCHIVE))
    assert len(reports) == len({report.study_id for report in reports}) == 3955
    counts = {
        name: sum(bool(getattr(r.sections, name)) for r in reports) for name in ("findings", "impression", "indication", "comparison")
    }
    assert counts == {"findings": 3425, "impression": 3921, "indication": 3865, "comparison": 3333}
    assert sum(len(report.images) for report in reports) == 7470
    assert sum(not report.images for report in reports) == 104
    assert sum(report.major == ("normal",) for report in reports) == 1391
    with tarfile.open(ARCHIVE) as archive:
        names = [member for member in archive.getmembers() if member.name.endswith(".xml")]
        for member, report in list(zip(names, reports, strict=True))[::100]:
            stream = archive.extractfile(member)
            assert stream is not None
            dom = minidom.parseString(stream.read())
            texts = {
                e.getAttribute("Label").lower(): "".join(c.data for c in e.childNodes).strip()
                for e in dom.getElementsByTagName("AbstractText")
            }
            assert {name: getattr(report.sections, name) for name in texts} == texts
            assert list(report.major) == [e.firstChild.data.strip() for e in dom.getElementsByTagName("major")]
