"""The study manifest: what it reads, every way a row can be bad, and that no patient and no text gets into a message."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.data.manifest import Box, ColumnMap, ManifestError, RejectedRow, SplitFractions, StudyImage, read_manifest

HEADER = ["study_id", "patient_id", "modality", "path", "view", "split", "report", "edema", "pneumothorax", "boxes", "mask_edema"]


def record(i, **changes):
    """One good row; its patient and report are words that must never show up in a message."""
    row = {
        "study_id": f"s{i}",
        "patient_id": f"SECRETPATIENT{i}",
        "modality": "xray",
        "path": f"img/{i}.png",
        "view": "PA",
        "split": "train",
        "report": f"SECRETREPORT {i}, no edema.",
        "edema": "0",
        "pneumothorax": "",
        "boxes": "",
        "mask_edema": "",
    }
    return row | changes


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "table"
    (root / "img").mkdir(parents=True)
    (root / "series").mkdir()
    for i in range(30):
        (root / f"img/{i}.png").touch()
    return root


@pytest.fixture
def write(folder):
    def write(rows, header=None, name="manifest.csv"):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header or list(rows[0]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return folder / name

    return write


def bad_rows(path, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, **options)
    assert "SECRET" not in str(caught.value)
    return {bad.row: " | ".join(bad.reasons) for bad in caught.value.rejected}


# --- what it reads


def test_a_good_table_becomes_typed_rows(folder, write):
    boxes = [{"finding": "edema", "x": 1, "y": 2.5, "width": 3, "height": 4}]
    table = write(
        [
            record(0, edema="1", pneumothorax="-1", boxes=json.dumps(boxes), mask_edema="img/9.png"),
            record(1, modality="CT", path="series", view="Axial", split="validation", edema="1.0"),
            record(2, modality="X-ray", view="AP Supine", split="Test", report=" ", edema=""),
        ]
    )
    manifest = read_manifest(table)
    assert [row.row for row in manifest] == [2, 3, 4]
    assert manifest[0] == StudyImage(
        study_id="s0",
        patient_id="SECRETPATIENT0",
        modality="xray",
        path=folder / "img/0.png",
        view="PA",
        split="train",
        report="SECRETREPORT 0, no edema.",
        findings=None,
        impression=None,
        labels={"edema": 1, "pneumothorax": -1},
        boxes=(Box("edema", 1, 2.5, 3, 4),),
        masks={"edema": folder / "img/9.png"},
        row=2,
    )
    assert [(row.modality, row.view, row.split) for row in manifest] == [
        ("xray", "PA", "train"),
        ("ct", "Axial", "val"),
        ("xray", "AP", "test"),
    ]
    assert (manifest.label_names, manifest.without_report, manifest.rejected) == (("edema", "pneumothorax"), 1, ())
    assert np.array_equal(manifest.label_array(), [[1, -1], [1, np.nan], [np.nan, np.nan]], equal_nan=True)
    assert manifest.label_array(["rib_fracture"]).shape == (3, 1)
    assert manifest.sha256 == hashlib.sha256(table.read_bytes()).hexdigest()


def test_repr_shows_no_patient_and_no_text(write):
    manifest = read_manifest(write([record(0)]))
    assert "SECRET" not in repr(manifest) + repr(manifest[0]) + str(manifest.select(split="train"))


def test_select_keeps_what_is_asked_for(write):
    rows = [
        record(i, split=("train", "val", "test")[i % 3], modality=("DX", "CT")[i % 2], report="" if i < 2 else "text") for i in range(12)
    ]
    manifest = read_manifest(write(rows))
    assert [row.study_id for row in manifest.select(split="val")] == ["s1", "s4", "s7", "s10"]
    assert [row.study_id for row in manifest.select(split=("train", "val"), modality="ct")] == ["s1", "s3", "s7", "s9"]
    assert len(manifest.select(with_report=True)) == 10 == len(manifest) - manifest.without_report
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        manifest.select(split="dev")
    with pytest.raises(ValueError, match="unknown modality"):
        manifest.select(modality="MR")


def test_text_is_the_report_or_its_sections(write):
    header = [name for name in HEADER if name != "report"] + ["findings", "impression"]
    rows = [record(0, findings="Clear lungs.", impression="Normal."), record(1, impression="Normal."), record(2)]
    manifest = read_manifest(write(rows, header))
    assert [row.text for row in manifest] == ["FINDINGS: Clear lungs.\nIMPRESSION: Normal.", "IMPRESSION: Normal.", ""]
    assert manifest.without_report == 1


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "parquet", "bom", "crlf"])
def test_every_format_gives_the_same_rows(folder, kind):
    """Written by pandas, read by us."""
    frame = pd.DataFrame([record(i, edema=1.0 if i else np.nan, report='two\nlines, "quoted"', patient_id=100 + i) for i in range(4)])
    name = {"bom": "m.csv", "crlf": "m.csv"}.get(kind, f"m.{kind}")
    if kind == "parquet":
        frame.to_parquet(folder / name)
    else:
        frame.to_csv(
            folder / name,
            index=False,
            sep="\t" if kind == "tsv" else ",",
            encoding="utf-8-sig" if kind == "bom" else "utf-8",
            lineterminator="\r\n" if kind == "crlf" else "\n",
        )
    manifest = read_manifest(folder / name)
    assert [row.labels for row in manifest] == [{}, *[{"edema": 1}] * 3]
    assert [row.patient_id for row in manifest] == ["100", "101", "102", "103"]
    assert {row.report for row in manifest} == {'two\nlines, "quoted"'}


def test_parquet_may_hold_numbers_booleans_and_lists(folder):
    frame = pd.DataFrame([record(0), record(1)]).assign(edema=[True, None], pneumothorax=[-1, 0], patient_id=[7.0, 8.0])
    frame.loc[0, "path"] = "img/\0.png"
    frame.to_parquet(folder / "m.parquet")
    assert bad_rows(folder / "m.parquet") == {2: "path names a file that is not there"}
    frame.loc[0, "path"] = "img/0.png"
    frame["boxes"] = [[{"finding": "edema", "x": 0, "y": 0, "width": 2, "height": 2}], None]
    frame.to_parquet(folder / "m.parquet")
    manifest = read_manifest(folder / "m.parquet")
    assert [row.labels for row in manifest] == [{"edema": 1, "pneumothorax": -1}, {"pneumothorax": 0}]
    assert [row.patient_id for row in manifest] == ["7", "8"]
    assert manifest[0].boxes == (Box("edema", 0, 0, 2, 2),)


def test_rows_are_numbered_as_a_spreadsheet_shows_them(folder, write):
    table = write([record(0, report="a\nb\nc"), record(1), record(2, edema="7")])
    table.write_text(table.read_text().replace("s1,", f"\n{',' * 10}\n,,\ns1,", 1))  # rows without content are skipped but counted
    assert set(bad_rows(table)) == {7}
    assert [row.row for row in read_manifest(table, strict=False)] == [2, 6]


# --- other tables


def test_a_column_map_reads_other_names(folder, write, tmp_path):
    rows = [
        {
            "Study": f"s{i}",
            "Subject": f"p{i}",
            "File": f"img/{i}.png",
            "Note": "text",
            "Pleural Effusion": "1.0",
            "Dx": ("TB", "none")[i % 2],
        }
        for i in range(4)
    ]
    values = {
        "study_id": "Study",
        "patient_id": "Subject",
        "path": "File",
        "report": "Note",
        "labels": {"pleural_effusion": "Pleural Effusion"},
        "label_values": {"Dx": {"TB": {"consolidation": 1}}},
        "constants": {"modality": "xray"},
    }
    (tmp_path / "columns.yaml").write_text(json.dumps(values))  # JSON is YAML
    table = write(rows)
    for columns in (values, ColumnMap.load(tmp_path / "columns.yaml"), ColumnMap(**values)):
        manifest = read_manifest(table, columns=columns)
        assert manifest.label_names == ("pleural_effusion", "consolidation")
        assert manifest[0].labels == {"consolidation": 1, "pleural_effusion": 1}
        assert manifest[1].labels == {"pleural_effusion": 1}
        assert (manifest[0].text, manifest[0].modality) == ("text", "xray")


def test_a_column_map_is_checked():
    with pytest.raises(ValueError, match="unknown key image; known: study_id"):
        ColumnMap.from_dict({"image": "path"})
    with pytest.raises(ValueError, match="must be 1, 0 or -1"):
        ColumnMap(label_values={"Dx": {"TB": {"consolidation": 2}}})
    with pytest.raises(ValueError, match="constants may set"):
        ColumnMap(constants={"path": "a.png"})


def test_missing_columns_are_named_beside_what_came(write):
    table = write([{"study_id": "s", "patient_id": "p", "Modality": "CT", "image": "a"}])
    with pytest.raises(
        ManifestError, match=r"missing column modality .*, path .*the table has study_id, patient_id, Modality, image"
    ) as caught:
        read_manifest(table)
    assert "here: modality: Modality; path: image; constants: {modality: xray}" in str(caught.value)
    assert "--columns" in str(caught.value)
    with pytest.raises(ManifestError, match=r"missing column note \(for report\)"):
        read_manifest(write([record(0)]), columns=ColumnMap(report="note"))
    with pytest.raises(ManifestError, match=r"missing column oedema \(for labels\[edema\]\)"):
        read_manifest(write([record(0)]), columns=ColumnMap(labels={"edema": "oedema"}))


def test_a_table_with_another_separator_is_told_so(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("study_id;patient_id;modality;path\ns;p;xray;a.png\n")
    with pytest.raises(ManifestError, match="it looks as if semicolons part them"):
        read_manifest(table)


def test_a_table_without_a_header_is_not_quoted(write):
    table = write([record(i) for i in range(3)])
    table.write_text("\n".join(table.read_text().splitlines()[1:]))
    with pytest.raises(ManifestError, match="If row 1 is a record, add a header") as caught:
        read_manifest(table)
    assert "SECRET" not in str(caught.value)


# --- bad rows


def test_every_bad_row_is_told_at_once(folder, write):
    (folder / "img/dir.png").mkdir()
    table = write(
        [
            record(0),
            record(1, study_id="", patient_id=" "),
            record(2, modality="SECRET MR"),
            record(3, split="SECRET"),
            record(4, edema="SECRET", pneumothorax="2"),
            record(5, path="img/none.png"),
            record(6, path=""),
            record(7, path="img/0.png"),
            record(8, path="./img//0.png"),
            record(9, path="img/dir.png"),
            record(10, boxes="[{SECRET"),
            record(11, mask_edema="img/none.png"),
        ]
    )
    reasons = bad_rows(table)
    assert sorted(reasons) == list(range(3, 14))
    assert reasons[3] == "study_id is empty | patient_id is empty"
    assert reasons[4].startswith("modality is not one of xray")
    assert reasons[5] == "split is not one of train, val, test"
    assert reasons[6] == "edema is none of 1, 0, -1 and empty | pneumothorax is none of 1, 0, -1 and empty"
    assert reasons[7] == "path names a file that is not there"
    assert reasons[8] == "path is empty"
    assert reasons[9] == reasons[10] == "path is that of row 2 too"
    assert reasons[11] == "path is no file"
    assert reasons[12].startswith("boxes is no JSON list")
    assert reasons[13] == "mask_edema names a file that is not there"
    assert set(bad_rows(table, check_files=False)) == set(reasons) - {7, 11, 13}
    manifest = read_manifest(table, strict=False)
    assert [row.study_id for row in manifest] == ["s0"]
    assert {bad.row: " | ".join(bad.reasons) for bad in manifest.rejected} == reasons


def test_a_long_list_is_cut_and_counted(write):
    with pytest.raises(ManifestError) as caught:
        read_manifest(write([record(i, edema="x") for i in range(27)]))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("27 of 27 rows are bad") and lines[-2].strip() == "and 7 more" and len(lines) == 23
    assert lines[1].strip() == "row 2: study s0, img/0.png: edema is none of 1, 0, -1 and empty"
    assert len(caught.value.rejected) == 27


def test_a_message_stays_on_its_line():
    assert "\n" not in str(RejectedRow(2, "s\nforged", "a\x1b[2J.png", ("bad",)))
    assert len(str(RejectedRow(2, "s" * 5000, "p", ("bad",)))) < 300


def test_a_patient_in_two_splits_is_refused_with_all_its_rows(write):
    rows = [record(i) for i in range(4)]
    for i, split in ((1, "train"), (3, "test")):
        rows[i] |= {"patient_id": "SECRET", "split": split}
    assert bad_rows(write(rows)) == dict.fromkeys((3, 5), "its patient is in more than one split: train (row 3), test (row 5)")


def test_a_study_of_two_patients_is_refused(write):
    rows = [record(i) for i in range(3)]
    rows[2]["study_id"] = "s0"
    assert bad_rows(write(rows)) == dict.fromkeys((2, 4), "study has rows of 2 patients")


def test_ragged_rows_and_broken_files_are_told(folder, write):
    table = write([record(i) for i in range(3)])
    lines = table.read_text().splitlines()
    lines[2] += ",one,more"
    lines[3] = lines[3].rsplit(",", 2)[0]
    table.write_text("\n".join(lines))
    assert {row: text[:30] for row, text in bad_rows(table).items()} == {
        3: "13 cells where the header has ",
        4: "9 cells where the header has 1",
    }

    cases = {
        "quote.csv": b'study_id,patient_id,modality,path\ns,p,CT,"a\nb,c,d,e\n',
        "latin.csv": "study_id,patient_id,modality,path\ns,p,CT,\xe9.png\n".encode("latin-1"),
        "empty.csv": b"",
        "null.csv": b"study_id,patient_id,modality,path\ns,p,CT,a\0b\n",
        "twice.csv": b"study_id,patient_id,modality,path,path\n",
        "cut.csv.gz": gzip.compress(b"study_id,patient_id,modality,path\n" * 100)[:30],
        "no.parquet": b"PAR1 is not enough",
        "table.xlsx": b"PK",
    }
    said = {}
    for name, data in cases.items():
        (folder / name).write_bytes(data)
        with pytest.raises(ManifestError, match=name) as caught:
            read_manifest(folder / name)
        said[name] = str(caught.value)
    assert "quote may be missing" in said["quote.csv"]
    assert "byte 41 is not UTF-8" in said["latin.csv"]
    assert "line 2: null byte" in said["null.csv"]
    assert "row 1 has 0 columns" in said["empty.csv"]
    assert "column path appears more than once" in said["twice.csv"]
    assert "not a whole gzip" in said["cut.csv.gz"]
    assert "not a readable Parquet" in said["no.parquet"]
    with pytest.raises(ManifestError, match="No such file"):
        read_manifest(folder / "absent.csv")


def test_rejected_rows_are_written_down(write, tmp_path):
    manifest = read_manifest(write([record(0), record(1, edema="x", split="y")]), strict=False)
    manifest.write_rejected(tmp_path / "rejected.csv")
    got = pd.read_csv(tmp_path / "rejected.csv").to_dict("records")
    reasons = "split is not one of train, val, test; edema is none of 1, 0, -1 and empty"
    assert got == [{"row": 3, "study_id": "s1", "path": "img/1.png", "reasons": reasons}]


# --- paths


@pytest.mark.parametrize(
    "path", ["../out.png", "img/../../out.png", "{out}", "C:\\out.png", "..\\out.png", "link/out.png", "out_link.png", "img/../img/1.png"]
)
def test_a_path_that_leaves_the_folder_is_refused(folder, write, path):
    outside = folder.parent / "out.png"
    outside.touch()
    (folder / "link").symlink_to(folder.parent)
    (folder / "out_link.png").symlink_to(outside)
    table = write([record(0, path=path.format(out=outside))])
    assert "path" in bad_rows(table)[2] and "not there" not in bad_rows(table)[2]
    assert bad_rows(table, check_files=False)
    assert "mask_edema" in bad_rows(write([record(0, mask_edema=path.format(out=outside))]))[2]
    if "\\" not in path or os.name == "nt":
        assert read_manifest(write([record(0, path=path.format(out=outside))]), allow_outside=True)[0].path.exists()


def test_a_link_that_stays_inside_is_fine(folder, write):
    (folder / "again").symlink_to(folder / "img")
    (folder / "loop").symlink_to(folder / "loop")
    assert read_manifest(write([record(0, path="again/3.png")]))[0].path == folder / "again/3.png"
    assert "not there" in bad_rows(write([record(0, path="loop/3.png")]))[2]


def test_the_table_may_be_reached_through_a_link(folder, write, tmp_path, monkeypatch):
    write([record(0)])
    (tmp_path / "link").symlink_to(folder)
    assert read_manifest(tmp_path / "link/manifest.csv")[0].path == folder / "img/0.png"
    monkeypatch.chdir(folder)
    assert read_manifest("manifest.csv")[0].path == folder / "img/0.png"


# --- boxes


@pytest.mark.parametrize(
    "cell",
    [
        "{}1",
        "1",
        '[{"finding": "edema"}]',
        '[{"finding": "", "x": 0, "y": 0, "width": 1, "height": 1}]',
        '[{"finding": "edema", "x": NaN, "y": 0, "width": 1, "height": 1}]',
        '[{"finding": "edema", "x": -1, "y": 0, "width": 1, "height": 1}]',
        '[{"finding": "edema", "x": 0, "y": 0, "width": 0, "height": 1}]',
        '[{"finding": "edema", "x": "0", "y": 0, "width": 1, "height": 1}]',
        '[{"finding": "edema", "x": true, "y": 0, "width": 1, "height": 1}]',
        '[{"finding": "edema", "x": 1' + "0" * 400 + ', "y": 0, "width": 1, "height": 1}]',
        "[" * 100_000,
    ],
)
def test_a_broken_box_is_refused(write, cell):
    assert "boxes is no JSON list" in bad_rows(write([record(0, boxes=cell)]))[2]


def test_a_box_covers_its_pixels():
    mask = Box("edema", x=1, y=2, width=3, height=1).mask((4, 5))
    assert np.argwhere(mask).tolist() == [[2, 1], [2, 2], [2, 3]]


# --- splits


def test_splits_are_made_by_patient_and_stay_when_the_table_grows(folder, write):
    header = [name for name in HEADER if name != "split"]
    rows = [record(i, patient_id=f"p{i // 2}") for i in range(30)]
    short = read_manifest(write(rows[:10], header))
    long = read_manifest(write(rows, header))
    by_patient = {row.patient_id: set() for row in long}
    for row in long:
        by_patient[row.patient_id].add(row.split)
    assert all(len(splits) == 1 for splits in by_patient.values())
    assert [row.split for row in short] == [row.split for row in long][:10]
    assert long.split_source == "hash of patient_id: train 0.7, val 0.1, test 0.2, seed 0"
    other = read_manifest(write(rows, header), splits=SplitFractions(seed=1))
    assert [row.split for row in other] != [row.split for row in long]
    whole = read_manifest(write(rows), columns=ColumnMap(split=None), splits=SplitFractions(0, 0, 1))
    assert {row.split for row in whole} == {"test"}
    assert read_manifest(write(rows), splits=SplitFractions(0, 0, 1)).split_source == "column split"


def test_fractions_are_met_and_checked():
    splits = [SplitFractions(0.6, 0.25, 0.15, seed=4).split_of(f"p{i}") for i in range(4000)]
    assert [splits.count(name) / 4000 for name in ("train", "val", "test")] == pytest.approx([0.6, 0.25, 0.15], abs=0.025)
    assert {SplitFractions(0.5, 0.5, 0).split_of(f"p{i}") for i in range(200)} == {"train", "val"}
    for shares in ((0.5, 0.5, 0.5), (1.5, -0.5, 0), (float("nan"), 0.5, 0.5)):
        with pytest.raises(ValueError, match="add to 1"):
            SplitFractions(*shares)


# --- whatever comes


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.lists(
            st.one_of(st.text(st.characters(exclude_characters="\0"), max_size=12), st.sampled_from(["1", "xray", "train", "../x", "[]"])),
            min_size=9,
            max_size=12,
        ),
        max_size=6,
    )
)
def test_any_cells_are_read_or_refused_by_row(tmp_path_factory, rows):
    """A table that Python's own csv module wrote never ends in anything but rows or reasons, and every record is in one of the two."""
    table = tmp_path_factory.mktemp("any") / "m.csv"
    with table.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([HEADER, *rows])
    filled = sum(any(cell.strip() for cell in row) for row in rows)
    manifest = read_manifest(table, strict=False)
    assert len(manifest) + len(manifest.rejected) == filled


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("m.csv", "m.csv.gz", "m.parquet"):
        (folder / name).write_bytes(data)
        with pytest.raises(ManifestError):
            read_manifest(folder / name)


# --- the real table


@pytest.fixture
def real_folder():
    folder = Path(__file__).resolve().parents[2] / "../shared/data/cxr"
    if not (folder / "manifest.csv").exists():
        pytest.skip("real chest X-rays are not on this machine")
    return folder


def test_the_real_table_is_read_by_a_column_map(real_folder):
    frame = pd.read_csv(real_folder / "manifest.csv")
    manifest = read_manifest(real_folder / "manifest.csv", columns={"path": "image", "report": "text"})
    assert [row.study_id for row in manifest] == frame.study_id.tolist()
    assert (len(manifest), manifest.without_report) == (130, int(frame.text.isna().sum()))
    assert sum(row.view == "lateral" for row in manifest) == int((frame.view == "L").sum())
    assert all(row.path.is_file() and row.modality == "xray" for row in manifest)
    splits = {name: {row.patient_id for row in manifest.select(split=name)} for name in ("train", "val", "test")}
    assert not splits["train"] & splits["val"] and not splits["train"] & splits["test"] and not splits["val"] & splits["test"]
    assert all(splits.values())
