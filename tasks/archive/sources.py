"""Where studies come from: a manifest, a folder of images and text files, Open-i's XML, a table of reports. Read one after the other.

A source gives :class:`Candidate`, the parts of a study; :func:`archived` makes of it what an archive keeps: sections, sentences, what they
state. What cannot be used is handed to ``reject`` with the row or path that it came from, and reading goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medvl.data.manifest import StudyImage
from medvl.types import ImageReader, TextSource
from reports.facts import FactSource
from reports.facts.ontology import Ontology
from reports.openi import read_openi
from reports.sections import Sections, split_sections
from tasks.archive.records import SECTIONS, ArchivedImage, ArchivedStudy, ArchivedText
from tasks.report_facts import ReportFacts

Reject = Callable[[str, str], None]
"""Called with a path or row, and what is wrong with it."""
Source = Callable[[Reject], "Iterator[Candidate]"]
"""Gives the studies of a source from its start, the same each time."""
OPENI = (".xml", ".tgz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz")
MOST_TEXT = 2**20
"""Characters of a text file; a longer one is no report."""
_DATE = re.compile(r"(\d{4})-?(\d{2})-?(\d{2})(?:\D.*)?")
_AGE = re.compile(r"0*(\d{1,3}(?:\.\d+)?)\s*([YMWD]?)[a-z]*", re.IGNORECASE)
_YEARS = {"Y": 1.0, "": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


@dataclass(frozen=True)
class Candidate:
    """The parts of a study, as a source has them."""

    study_id: str
    place: str  # the row or path, for messages
    patient_id: str = field(default="", repr=False)
    modality: str = "xray"
    source: str = ""
    report: str | None = field(default=None, repr=False)
    findings: str | None = field(default=None, repr=False)
    impression: str | None = field(default=None, repr=False)
    sections: Sections | None = field(default=None, repr=False)  # None: found in the texts
    images: tuple[tuple[Path, str | None], ...] = field(default=(), repr=False)  # (path, view)
    labels: Mapping[str, int] = field(default_factory=dict, repr=False)
    split: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict, repr=False)  # sex and age, as the table has them
    date: str | None = field(default=None, repr=False)


class ReportReader:
    """What an archive keeps of a report.

    Args:
        texts: which sentences are embedded.
        facts: what states something.
        ontology: of its findings.
    """

    def __init__(self, texts: TextSource, facts: FactSource, ontology: Ontology) -> None:
        self.texts = texts
        self._facts = ReportFacts(facts, ontology)

    def archived(self, study: Candidate) -> ArchivedStudy:
        """The study as it is kept."""
        sections = study.sections or sections_of(study)
        kept = {name: text for name in SECTIONS if (text := getattr(sections, name).strip())}
        given = (study.report, study.findings, study.impression) if study.sections is None else (sections.body, None, None)
        sentences = tuple(ArchivedText(text, self._facts.stated(text)) for text in self.texts.texts(*given))
        return ArchivedStudy(
            study.study_id,
            study.patient_id or study.study_id,
            study.modality,
            source=study.source,
            view=next((view for _, view in study.images if view), None),
            split=study.split,
            date=date_of(study.date),
            sex=(study.groups.get("sex") or "").strip().upper()[:1] or None,
            age=age_of(study.groups.get("age")),
            sections=kept,
            sentences=sentences,
            findings=self._facts.said(fact for sentence in sentences for fact in sentence.facts),
            labels=dict(study.labels),
            images=tuple(ArchivedImage(str(path), view, stamp_of(path)) for path, view in study.images),
        )


def sections_of(study: Candidate) -> Sections:
    """The sections of the texts of a study; findings and impression that stand apart are those."""
    if not (study.findings or study.impression):
        return split_sections(study.report or "")
    whole = split_sections(study.report or "")
    values = {name: getattr(whole, name) for name in SECTIONS}
    values |= {name: text for name, text in (("findings", study.findings), ("impression", study.impression)) if text}
    return Sections(**values)


def date_of(value: str | None) -> str | None:
    """YYYY-MM-DD of a date of DICOM (YYYYMMDD) or ISO 8601, with or without a time; None of anything else."""
    from datetime import date

    match = _DATE.fullmatch((value or "").strip())
    if match is None:
        return None
    try:
        return date(*map(int, match.groups())).isoformat()
    except ValueError:
        return None


def age_of(value: str | None) -> float | None:
    """Years, of a number or an age of DICOM (045Y, 018M, 003W, 010D; PS3.5, 6.2, AS); None of anything else."""
    match = _AGE.fullmatch((value or "").strip())
    return None if match is None else float(match[1]) * _YEARS[match[2].upper()]


def stamp_of(path: Path) -> str:
    """Size and time of change of a file; of a folder of all files in it together."""
    try:
        files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        stats = [one.stat() for one in files]
    except OSError:
        return "absent"
    return f"{len(stats)}:{sum(one.st_size for one in stats)}:{max((one.st_mtime_ns for one in stats), default=0)}"


def of_manifest(rows: Sequence[StudyImage], source: str, reject: Reject) -> Iterator[Candidate]:
    """The studies of a manifest, their images together, in the order of their first rows."""
    studies: dict[str, list[StudyImage]] = {}
    for row in rows:
        studies.setdefault(row.study_id, []).append(row)
    for study_id, images in studies.items():
        head = images[0]
        if len({(row.patient_id, row.modality) for row in images}) > 1:
            reject(f"row {head.row}", f"study {study_id}: its rows name several patients or modalities; give each a study of its own")
            continue
        told = next((row for row in images if row.text), head)
        yield Candidate(
            study_id,
            f"row {head.row}",
            head.patient_id,
            head.modality,
            source,
            told.report,
            told.findings,
            told.impression,
            images=tuple((row.path, row.view) for row in images),
            labels={name: value for row in reversed(images) for name, value in row.labels.items()},
            split=head.split,
            groups=head.groups,
            date=head.date,
        )


def of_openi(source: Path, reject: Reject) -> Iterator[Candidate]:
    """The studies of Open-i's XML: a file, a folder of them or the archive. Which patient a study is of is not told."""
    seen: set[str] = set()
    for report in read_openi(source, lambda error: reject(str(error).split(":", 1)[0], str(error))):
        if report.study_id in seen:
            reject(report.study_id, f"study {report.study_id}: comes a second time; the first is taken")
            continue
        seen.add(report.study_id)
        yield Candidate(report.study_id, report.study_id, report.study_id, "xray", source.name, sections=report.sections)


def of_table(source: Path, text_columns: Sequence[str], id_column: str | None, modality: str, reject: Reject) -> Iterator[Candidate]:
    """The reports of a table without images: .csv, .tsv, .jsonl (.gz too), .parquet."""
    from tasks.report_tables import RejectedRow, join_texts, open_reports

    seen: set[str] = set()
    with open_reports(source, text_columns, id_column) as table:
        for row in table.rows:
            if isinstance(row, RejectedRow):
                reject(row.place, f"{row.place}: {row.reason}")
            elif row.id in seen:
                reject(row.place, f"{row.place}: its id came before; the first is taken")
            else:
                seen.add(row.id)
                text = join_texts(table.text_columns, row.texts)
                yield Candidate(row.id, row.place, row.id, modality, source.name, report=text)


def of_folder(folder: Path, reader: ImageReader, modality: str, reject: Reject) -> Iterator[Candidate]:
    """The images below a folder, those of one study together, and text files: the report of the image of the same name, or one alone.

    A study is named by the path of its first image from the folder. Which patient it is of is not told: a file's header is not asked.
    """
    images: dict[str, list[Path]] = {}
    for path in reader.find_images(folder):
        images.setdefault(reader.study_key(path) or str(path), []).append(path)
    texts = {path.with_suffix(""): path for path in sorted(folder.rglob("*.txt")) if path.is_file()}
    for paths in images.values():
        beside = [file for path in paths if (file := texts.pop(_stem(path), None)) is not None]
        said = [text for path in beside if (text := _text_of(path, reject)) is not None]
        name = paths[0].relative_to(folder).as_posix()
        yield Candidate(
            name, str(paths[0]), "", modality, folder.name, "\n\n".join(said) or None, images=tuple((path, None) for path in paths)
        )
    for path in texts.values():
        if (alone := _text_of(path, reject)) is not None:
            yield Candidate(path.relative_to(folder).as_posix(), str(path), "", modality, folder.name, alone)


def _stem(path: Path) -> Path:
    """Without its suffixes: film.dcm and volume.nii.gz are film and volume."""
    name = path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem
    return path.with_name(name)


def _text_of(path: Path, reject: Reject) -> str | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reject(str(path), f"{path}: cannot be read as UTF-8 text ({type(error).__name__})")
        return None
    if len(text) > MOST_TEXT:
        reject(str(path), f"{path}: more than {MOST_TEXT} characters, expected one report")
        return None
    return text
